"""Allgather and reduce-scatter in two levels: between the nodes, and inside them.

*N nodes of k ranks, p = N·k; rank r = a·k + l is on node a at place l; c the block of a rank.*  First the N ranks of
each place gather among themselves, all places at the same time; then each node gathers, N blocks a rank in every
message::

    allgather          (N−1) rounds between nodes, (k−1) inside them; (p−k)/p of the vector enters a node
    reduce-scatter     the same backwards: inside, then between

A flat ring takes p−1 rounds and brings (p−1)/p of the vector into every node.

Where nodes have different numbers of ranks, places that every node has are *lanes*; a rank beyond them hands its block
to a lane first and gets the result at the end.  So that a message is one interval, blocks lie in the order of lanes,
then nodes, while they travel: for nodes of k ranks a·k + l has block l·N + a.  ``slots`` says it;
:func:`reorder_by_rank`
puts them in order afterwards, :func:`reorder_by_block` before a reduce-scatter.  Who leaves that out has C0 C2 C1 C3
for
p = 4, k = 2.

Zhang et al., *MiCS: near-linear scaling for training gigantic model on public cloud*, VLDB 2022, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import hierarchical, ring
from hpccomm.collectives.hierarchical import Channels
from hpccomm.collectives.schedule import Algorithm, Rank, Step, block_per_rank

Ints = npt.NDArray[np.int64]


def build_allgather(nodes: Any) -> Algorithm:
    """The allgather of ranks that live on ``nodes`` (any integers, one a rank; in any order)."""
    lanes = hierarchical.channels_of(nodes)
    lie = block_order(lanes)

    def steps(r: Rank, p: int) -> Iterator[Step]:
        for step in hierarchical.fold_surplus(r, lanes, p, into_lane=True):
            yield step._replace(
                send=block_interval(lie.own_block[r]), recv=block_interval(lie.own_block[step.source]), reduce=False
            )
        lane = lanes.place[r] % lanes.rank.shape[1]
        for step in hierarchical.channel_steps(ring.allgather, r, lanes):
            yield map_blocks(step, lambda node: lie.ends[lane, node])
        for step in hierarchical.intra_node_steps(ring.allgather, r, lanes, 1):
            yield map_blocks(step, lambda lane: lie.channel_offsets[lane])
        yield from hierarchical.fold_surplus(r, lanes, p, into_lane=False)

    return Algorithm(steps, block_per_rank, own_blocks=lambda p: lie.own_block)


def build_reduce_scatter(nodes: Any) -> Algorithm:
    """The reduce-scatter of ranks that live on ``nodes``."""
    lanes = hierarchical.channels_of(nodes)
    lie = block_order(lanes)

    def steps(r: Rank, p: int) -> Iterator[Step]:
        yield from hierarchical.fold_surplus(r, lanes, p, into_lane=True)
        lane = lanes.place[r] % lanes.rank.shape[1]
        for step in hierarchical.intra_node_steps(ring.reduce_scatter, r, lanes, 1):
            yield map_blocks(step, lambda lane: lie.channel_offsets[lane])
        for step in hierarchical.channel_steps(ring.reduce_scatter, r, lanes):
            yield map_blocks(step, lambda node: lie.ends[lane, node])
        for step in hierarchical.fold_surplus(r, lanes, p, into_lane=False):
            yield step._replace(send=block_interval(lie.own_block[step.to]), recv=block_interval(lie.own_block[r]))

    return Algorithm(steps, block_per_rank, own_blocks=lambda p: lie.own_block)


class BlockOrder(NamedTuple):
    """Where blocks lie while they travel."""

    own_block: Ints
    """``(p,)`` the block that each rank has."""
    ends: Ints
    """``(L, N+1)`` where each node's blocks begin in a lane, and where the last one's end."""

    @property
    def channel_offsets(self) -> Ints:
        """``(L+1,)`` where lanes begin."""
        return np.append(self.ends[:, 0], self.ends[-1, -1])


def block_order(lanes: Channels) -> BlockOrder:
    """In the order of lanes, of nodes, and of places."""
    count, width = lanes.rank.shape
    lane = lanes.place % width
    slot = np.empty(lane.size, dtype=np.int64)
    slot[np.lexsort((lanes.place, lanes.node, lane))] = np.arange(lane.size)
    each = np.bincount(lane * count + lanes.node, minlength=count * width)
    ends = np.concatenate([[0], np.cumsum(each)])
    return BlockOrder(slot, ends[np.arange(width)[:, None] * count + np.arange(count + 1)])


def block_interval(block: Rank) -> tuple[Rank, Rank]:
    """A single block."""
    return block, block + 1


def map_blocks(step: Step, begins: Any) -> Step:
    """A step whose intervals are of something that begins at these blocks."""
    return step._replace(
        send=(begins(step.send[0]), begins(step.send[1])), recv=(begins(step.recv[0]), begins(step.recv[1]))
    )


def own_blocks(nodes: Any) -> Ints:
    """``(p,)`` the block that each rank has."""
    return block_order(hierarchical.channels_of(nodes)).own_block


def reorder_by_rank(blocks: npt.NDArray[Any], nodes: Any) -> npt.NDArray[Any]:
    """A gathered vector in the order of ranks, as a new array; ``blocks`` has a row a block."""
    return blocks[own_blocks(nodes)]


def reorder_by_block(blocks: npt.NDArray[Any], nodes: Any) -> npt.NDArray[Any]:
    """A vector in the order of ranks as a reduce-scatter takes it, as a new array; ``blocks`` has a row a block."""
    ordered = np.empty_like(blocks)
    ordered[own_blocks(nodes)] = blocks
    return ordered
