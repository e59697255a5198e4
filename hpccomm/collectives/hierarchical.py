"""Hierarchical: reduce inside each node, let every local rank talk to its twins on the other nodes, gather inside.

*N nodes, L lanes: the ranks of the smallest node; a rank's lane is its place in its node, its twins have the same lane
on the other nodes; m blocks a lane, as many as the inter-node schedule wants.*  All links of a node are busy and each
carries 2 (N−1)/N · n/L bytes a lane.  Ranks beyond L fold their vector into a lane first and get the result at the end,
so nodes may have different numbers of ranks, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives import ring
from hpccomm.collectives.schedule import Algorithm, Rank, Step, Steps, block_per_rank, select_peer


class Channels(NamedTuple):
    """Which rank drives which lane of which node."""

    node: Any
    """``(p,)`` the node of each rank, 0 … N-1."""
    place: Any
    """``(p,)`` each rank's place in its node."""
    rank: Any
    """``(N, L)`` the rank that drives a lane."""
    surplus: int
    """Ranks of the largest node beyond L."""


def channels_of(nodes: Any) -> Channels:
    """The lanes of ranks that live on ``nodes`` (any integers, one a rank)."""
    _, node, counts = np.unique(np.asarray(nodes), return_inverse=True, return_counts=True)
    place = np.zeros(node.size, dtype=np.int64)
    for each in range(counts.size):
        place[node == each] = np.arange(counts[each])
    width = int(counts.min())
    rank = np.array([np.flatnonzero(node == each)[:width] for each in range(counts.size)])
    return Channels(node, place, rank, int(counts.max()) - width)


def build_allreduce(nodes: Any, inter: Algorithm | None = None) -> Algorithm:
    """The allreduce of ranks that live on ``nodes``; ``inter`` is the allreduce between twins, a ring if not said."""
    inter = inter or Algorithm(ring.allreduce, block_per_rank)
    lanes = channels_of(nodes)
    count, width = lanes.rank.shape
    per_lane = inter.blocks(count)

    def steps(r: Rank, p: int) -> Iterator[Step]:
        yield from fold_surplus(r, lanes, width * per_lane, into_lane=True)
        yield from intra_node_steps(ring.reduce_scatter, r, lanes, per_lane)
        yield from inter_node_steps(inter.steps, r, lanes, per_lane)
        yield from intra_node_steps(ring.allgather, r, lanes, per_lane)
        yield from fold_surplus(r, lanes, width * per_lane, into_lane=False)

    return Algorithm(steps, lambda p: width * per_lane)


def fold_surplus(r: Rank, lanes: Channels, blocks: int, into_lane: bool) -> Iterator[Step]:
    """Ranks beyond the lanes hand their vector in, or get the result; L of them a round."""
    width = lanes.rank.shape[1]
    node, place = lanes.node[r], lanes.place[r]
    for first in range(width, width + lanes.surplus, width):
        extra = (place >= first) & (place < first + width)
        lane = lanes.rank[node, place % width]
        partner = rank_at_place(lanes, node, first + place)
        partner = select_peer(place < width, partner)
        if into_lane:
            yield Step(select_peer(extra, lane), (0, blocks), partner, (0, blocks), reduce=True)
        else:
            yield Step(partner, (0, blocks), select_peer(extra, lane), (0, blocks), reduce=False)


def rank_at_place(lanes: Channels, node: Rank, place: Rank) -> Rank:
    """Who has this place in this node; nobody where the node is smaller."""
    size = int(lanes.place.max()) + 1
    table = np.full((lanes.rank.shape[0], 2 * size + lanes.rank.shape[1]), -1)
    table[lanes.node, lanes.place] = np.arange(lanes.node.size)
    return table[node, place]


def intra_node_steps(steps: Steps, r: Rank, lanes: Channels, per_lane: int) -> Iterator[Step]:
    """A schedule among the lanes of one's node; its block is everything of a lane."""
    width = lanes.rank.shape[1]
    node, place = lanes.node[r], lanes.place[r]
    for step in steps(place, width):
        to = select_peer(place < width, lanes.rank[node, step.to % width])
        source = select_peer(place < width, lanes.rank[node, step.source % width])
        yield Step(to, scale_blocks(step.send, per_lane), source, scale_blocks(step.recv, per_lane), step.reduce)


def inter_node_steps(steps: Steps, r: Rank, lanes: Channels, per_lane: int) -> Iterator[Step]:
    """A schedule among the twins of one lane; its blocks are the lane's own."""
    first = lanes.place[r] % lanes.rank.shape[1] * per_lane
    for step in channel_steps(steps, r, lanes):
        yield Step(step.to, shift_blocks(step.send, first), step.source, shift_blocks(step.recv, first), step.reduce)


def channel_steps(steps: Steps, r: Rank, lanes: Channels) -> Iterator[Step]:
    """A schedule among the twins of one lane, its blocks counted from 0; nothing for ranks beyond the lanes."""
    count, width = lanes.rank.shape
    node, place = lanes.node[r], lanes.place[r]
    lane = place % width
    for step in steps(node, count):
        to = select_peer((place < width) & (np.asarray(step.to) >= 0), lanes.rank[step.to, lane])
        source = select_peer((place < width) & (np.asarray(step.source) >= 0), lanes.rank[step.source, lane])
        yield Step(to, step.send, source, step.recv, step.reduce)


def scale_blocks(blocks: tuple[Rank, Rank], by: int) -> tuple[Rank, Rank]:
    """Blocks counted in finer blocks."""
    return blocks[0] * by, blocks[1] * by


def shift_blocks(blocks: tuple[Rank, Rank], by: Rank) -> tuple[Rank, Rank]:
    """Blocks counted from another beginning."""
    return blocks[0] + by, blocks[1] + by
