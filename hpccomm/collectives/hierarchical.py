"""Hierarchical: collectives in two levels, inside each node and between the nodes on one channel per local rank.

*p ranks on N nodes; a channel is a rank's path to the ranks with the same local rank on the other nodes, its peers; L
channels a node, one for each rank of the smallest node; k ranks a node where nodes are even; c the block of a rank.*
Ranks beyond L hand their vector or block to a channel of their node first and receive the result at the end, so nodes
may have different numbers of ranks, in any order::

    allreduce          reduce-scatter inside, allreduce on every channel, allgather inside;
                       every channel carries 2 (N-1)/N · n/L bytes, so all links of a node are busy
    allgather          N-1 rounds between the nodes, then k-1 inside; (p-k)/p of the vector enters a node
    reduce-scatter     the same backwards: inside, then between

A flat ring takes p-1 rounds and brings (p-1)/p of the vector into every node.

A message is one interval of blocks, so the blocks of an allgather or reduce-scatter are numbered by channel, then node:
with k ranks a node, local rank l of node a owns block l·N + a.  ``own_blocks`` holds these numbers;
:func:`reorder_by_rank` restores the order of ranks after an allgather, :func:`reorder_by_block` prepares a
reduce-scatter.  Without them an allgather of p = 4, k = 2 returns the ranks' blocks in the order 0, 2, 1, 3.

Zhang et al., *MiCS: near-linear scaling for training gigantic model on public cloud*, VLDB 2022, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import ring
from hpccomm.collectives.schedule import Algorithm, Rank, Step, Steps, block_per_rank, select_peer
from hpccomm.collectives.volume import FULL_VOLUME, HALF_VOLUME, Volume, ring_fraction

Ints = npt.NDArray[np.int64]


class Channels(NamedTuple):
    """Which rank drives which channel of which node."""

    node: Any
    """``(p,)`` the node of each rank, 0 … N-1."""
    local_rank: Any
    """``(p,)`` each rank's number in its node."""
    rank: Any
    """``(N, L)`` the rank that drives a channel."""
    surplus: int
    """Ranks of the largest node beyond L."""


def channels_of(nodes: Any) -> Channels:
    """The channels of ranks on ``nodes`` (any integers, one a rank, in any order)."""
    _, node, counts = np.unique(np.asarray(nodes), return_inverse=True, return_counts=True)
    local_rank = np.zeros(node.size, dtype=np.int64)
    for each in range(counts.size):
        local_rank[node == each] = np.arange(counts[each])
    width = int(counts.min())
    rank = np.array([np.flatnonzero(node == each)[:width] for each in range(counts.size)])
    return Channels(node, local_rank, rank, int(counts.max()) - width)


def build_allreduce(nodes: Any, inter: Algorithm | None = None) -> Algorithm:
    """The allreduce of ranks on ``nodes``; ``inter`` is the allreduce between channel peers, a ring by default."""
    inter = inter or Algorithm(ring.allreduce, block_per_rank, volume=FULL_VOLUME)
    channels = channels_of(nodes)
    count, width = channels.rank.shape
    per_channel = inter.blocks(count)

    def steps(r: Rank, p: int) -> Iterator[Step]:
        yield from fold_surplus(r, channels, width * per_channel, into_channel=True)
        yield from intra_node_steps(ring.reduce_scatter, r, channels, per_channel)
        yield from inter_node_steps(inter.steps, r, channels, per_channel)
        yield from intra_node_steps(ring.allgather, r, channels, per_channel)
        yield from fold_surplus(r, channels, width * per_channel, into_channel=False)

    volume = allreduce_volume(channels) if inter.volume is FULL_VOLUME else None
    return Algorithm(steps, lambda p: width * per_channel, volume=volume)


def build_allgather(nodes: Any) -> Algorithm:
    """The allgather of ranks on ``nodes``."""
    channels = channels_of(nodes)
    order = block_order(channels)

    def steps(r: Rank, p: int) -> Iterator[Step]:
        for step in fold_surplus(r, channels, p, into_channel=True):
            yield step._replace(
                send=single_block(order.own_block[r]), recv=single_block(order.own_block[step.source]), reduce=False
            )
        channel = channels.local_rank[r] % channels.rank.shape[1]
        for step in channel_steps(ring.allgather, r, channels):
            yield map_blocks(step, lambda node: order.ends[channel, node])
        for step in intra_node_steps(ring.allgather, r, channels, 1):
            yield map_blocks(step, lambda each: order.channel_offsets[each])
        yield from fold_surplus(r, channels, p, into_channel=False)

    return Algorithm(steps, block_per_rank, own_blocks=lambda p: order.own_block, volume=gather_volume(channels))


def build_reduce_scatter(nodes: Any) -> Algorithm:
    """The reduce-scatter of ranks on ``nodes``."""
    channels = channels_of(nodes)
    order = block_order(channels)

    def steps(r: Rank, p: int) -> Iterator[Step]:
        yield from fold_surplus(r, channels, p, into_channel=True)
        channel = channels.local_rank[r] % channels.rank.shape[1]
        for step in intra_node_steps(ring.reduce_scatter, r, channels, 1):
            yield map_blocks(step, lambda each: order.channel_offsets[each])
        for step in channel_steps(ring.reduce_scatter, r, channels):
            yield map_blocks(step, lambda node: order.ends[channel, node])
        for step in fold_surplus(r, channels, p, into_channel=False):
            yield step._replace(send=single_block(order.own_block[step.to]), recv=single_block(order.own_block[r]))

    return Algorithm(steps, block_per_rank, own_blocks=lambda p: order.own_block, volume=gather_volume(channels))


# --- steps ----------------------------------------------------------------------------------------


def fold_surplus(r: Rank, channels: Channels, blocks: int, into_channel: bool) -> Iterator[Step]:
    """Ranks beyond the channels hand their vector to a channel, or receive the result; L of them a round."""
    width = channels.rank.shape[1]
    node, local_rank = channels.node[r], channels.local_rank[r]
    for first in range(width, width + channels.surplus, width):
        extra = (local_rank >= first) & (local_rank < first + width)
        driver = channels.rank[node, local_rank % width]
        partner = rank_at(channels, node, first + local_rank)
        partner = select_peer(local_rank < width, partner)
        if into_channel:
            yield Step(select_peer(extra, driver), (0, blocks), partner, (0, blocks), reduce=True)
        else:
            yield Step(partner, (0, blocks), select_peer(extra, driver), (0, blocks), reduce=False)


def rank_at(channels: Channels, node: Rank, local_rank: Rank) -> Rank:
    """The rank with this local rank on this node; nobody where the node is smaller."""
    size = int(channels.local_rank.max()) + 1
    table = np.full((channels.rank.shape[0], 2 * size + channels.rank.shape[1]), -1)
    table[channels.node, channels.local_rank] = np.arange(channels.node.size)
    return table[node, local_rank]


def intra_node_steps(steps: Steps, r: Rank, channels: Channels, per_channel: int) -> Iterator[Step]:
    """A schedule among the channels of a rank's node; its block is the ``per_channel`` blocks of a channel."""
    width = channels.rank.shape[1]
    node, local_rank = channels.node[r], channels.local_rank[r]
    for step in steps(local_rank, width):
        to = select_peer(local_rank < width, channels.rank[node, step.to % width])
        source = select_peer(local_rank < width, channels.rank[node, step.source % width])
        yield Step(to, scale_blocks(step.send, per_channel), source, scale_blocks(step.recv, per_channel), step.reduce)


def inter_node_steps(steps: Steps, r: Rank, channels: Channels, per_channel: int) -> Iterator[Step]:
    """A schedule among the peers of a channel; its blocks are those of the channel."""
    first = channels.local_rank[r] % channels.rank.shape[1] * per_channel
    for step in channel_steps(steps, r, channels):
        yield Step(step.to, shift_blocks(step.send, first), step.source, shift_blocks(step.recv, first), step.reduce)


def channel_steps(steps: Steps, r: Rank, channels: Channels) -> Iterator[Step]:
    """A schedule among the peers of a channel, its blocks counted from 0; ranks beyond the channels idle."""
    count, width = channels.rank.shape
    node, local_rank = channels.node[r], channels.local_rank[r]
    channel = local_rank % width
    for step in steps(node, count):
        to = select_peer((local_rank < width) & (np.asarray(step.to) >= 0), channels.rank[step.to, channel])
        source = select_peer((local_rank < width) & (np.asarray(step.source) >= 0), channels.rank[step.source, channel])
        yield Step(to, step.send, source, step.recv, step.reduce)


def scale_blocks(blocks: tuple[Rank, Rank], by: int) -> tuple[Rank, Rank]:
    """The interval in blocks that are ``by`` times finer."""
    return blocks[0] * by, blocks[1] * by


def shift_blocks(blocks: tuple[Rank, Rank], by: Rank) -> tuple[Rank, Rank]:
    """The interval ``by`` blocks further on."""
    return blocks[0] + by, blocks[1] + by


def single_block(block: Rank) -> tuple[Rank, Rank]:
    """The interval of one block."""
    return block, block + 1


def map_blocks(step: Step, offset_of: Any) -> Step:
    """The step with both ends of its intervals mapped through ``offset_of``."""
    return step._replace(
        send=(offset_of(step.send[0]), offset_of(step.send[1])), recv=(offset_of(step.recv[0]), offset_of(step.recv[1]))
    )


# --- order of blocks ------------------------------------------------------------------------------


class BlockOrder(NamedTuple):
    """The numbers of blocks in an allgather or reduce-scatter: by channel, then node, then local rank."""

    own_block: Ints
    """``(p,)`` the block that each rank owns."""
    ends: Ints
    """``(L, N+1)`` the first block of each node in a channel, and the end of the last node's."""

    @property
    def channel_offsets(self) -> Ints:
        """``(L+1,)`` the first block of each channel, and the end of the last."""
        return np.append(self.ends[:, 0], self.ends[-1, -1])


def block_order(channels: Channels) -> BlockOrder:
    """Number the blocks."""
    count, width = channels.rank.shape
    channel = channels.local_rank % width
    own_block = np.empty(channel.size, dtype=np.int64)
    own_block[np.lexsort((channels.local_rank, channels.node, channel))] = np.arange(channel.size)
    sizes = np.bincount(channel * count + channels.node, minlength=count * width)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return BlockOrder(own_block, ends[np.arange(width)[:, None] * count + np.arange(count + 1)])


def own_blocks(nodes: Any) -> Ints:
    """``(p,)`` the block that each rank owns."""
    return block_order(channels_of(nodes)).own_block


def reorder_by_rank(blocks: npt.NDArray[Any], nodes: Any) -> npt.NDArray[Any]:
    """The blocks of an allgather in the order of ranks, as a new array; ``blocks`` has a row a block."""
    return blocks[own_blocks(nodes)]


def reorder_by_block(blocks: npt.NDArray[Any], nodes: Any) -> npt.NDArray[Any]:
    """Blocks in the order of ranks as a reduce-scatter numbers them, as a new array; ``blocks`` has a row a block."""
    ordered = np.empty_like(blocks)
    ordered[own_blocks(nodes)] = blocks
    return ordered


# --- volumes --------------------------------------------------------------------------------------


def allreduce_volume(channels: Channels) -> Volume:
    """The volume of an allreduce with a ring between the nodes."""
    count, width = channels.rank.shape
    extra = -(-channels.surplus // width)
    return Volume(
        "2(p-1)/p n, +n a surplus rank",
        lambda p, _: 2 * (width - 1) + 2 * (count - 1) + 2 * extra,
        lambda p, _: 2 * ring_fraction(width) + 2 * ring_fraction(count) / width + extra,
        lambda p, _: Fraction(2 * (p - 1)),
    )


def gather_volume(channels: Channels) -> Volume | None:
    """The volume of an allgather or reduce-scatter; none is declared for nodes with different numbers of ranks."""
    count, width = channels.rank.shape
    return None if channels.surplus else HALF_VOLUME._replace(rounds=lambda p, _: count - 1 + width - 1)
