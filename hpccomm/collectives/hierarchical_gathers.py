"""Allgather and reduce-scatter in two levels: between the nodes, and inside them.

*N nodes of k ranks, p = N·k; rank r = a·k + l is on node a at place l; c the block of a rank.*  First the N ranks of
each place gather among themselves, all places at the same time; then each node gathers, N blocks a rank in every
message::

    allgather          (N−1) rounds between nodes, (k−1) inside them; (p−k)/p of the vector enters a node
    reduce-scatter     the same backwards: inside, then between

A flat ring takes p−1 rounds and brings (p−1)/p of the vector into every node.

Where nodes have different numbers of ranks, places that every node has are *lanes*; a rank beyond them hands its block
to a lane first and gets the result at the end.  So that a message is one interval, blocks lie in the order of lanes,
then nodes, while they travel: for nodes of k ranks a·k + l has block l·N + a.  ``slots`` says it; :func:`in_rank_order`
puts them in order afterwards, :func:`in_place_order` before a reduce-scatter.  Who leaves that out has C0 C2 C1 C3 for
p = 4, k = 2.

Zhang et al., *MiCS: near-linear scaling for training gigantic model on public cloud*, VLDB 2022, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import hierarchical, ring
from hpccomm.collectives.hierarchical import Lanes
from hpccomm.collectives.schedule import Algorithm, Rank, Step, one_each

Ints = npt.NDArray[np.int64]


def allgather_on(nodes: Any) -> Algorithm:
    """The allgather of ranks that live on ``nodes`` (any integers, one a rank; in any order)."""
    lanes = hierarchical.lanes_of(nodes)
    lie = blocks_of(lanes)

    def steps(r: Rank, p: int) -> Iterator[Step]:
        for step in hierarchical.folds(r, lanes, p, into_lane=True):
            yield step._replace(send=one(lie.slot[r]), recv=one(lie.slot[step.source]), reduce=False)
        lane = lanes.place[r] % lanes.rank.shape[1]
        for step in hierarchical.twins(ring.allgather, r, lanes):
            yield cut(step, lambda node: lie.ends[lane, node])
        for step in hierarchical.inside(ring.allgather, r, lanes, 1):
            yield cut(step, lambda lane: lie.lanes[lane])
        yield from hierarchical.folds(r, lanes, p, into_lane=False)

    return Algorithm(steps, one_each, slots=lambda p: lie.slot)


def reduce_scatter_on(nodes: Any) -> Algorithm:
    """The reduce-scatter of ranks that live on ``nodes``."""
    lanes = hierarchical.lanes_of(nodes)
    lie = blocks_of(lanes)

    def steps(r: Rank, p: int) -> Iterator[Step]:
        yield from hierarchical.folds(r, lanes, p, into_lane=True)
        lane = lanes.place[r] % lanes.rank.shape[1]
        for step in hierarchical.inside(ring.reduce_scatter, r, lanes, 1):
            yield cut(step, lambda lane: lie.lanes[lane])
        for step in hierarchical.twins(ring.reduce_scatter, r, lanes):
            yield cut(step, lambda node: lie.ends[lane, node])
        for step in hierarchical.folds(r, lanes, p, into_lane=False):
            yield step._replace(send=one(lie.slot[step.to]), recv=one(lie.slot[r]))

    return Algorithm(steps, one_each, slots=lambda p: lie.slot)


class Blocks(NamedTuple):
    """Where blocks lie while they travel."""

    slot: Ints
    """``(p,)`` the block that each rank has."""
    ends: Ints
    """``(L, N+1)`` where each node's blocks begin in a lane, and where the last one's end."""

    @property
    def lanes(self) -> Ints:
        """``(L+1,)`` where lanes begin."""
        return np.append(self.ends[:, 0], self.ends[-1, -1])


def blocks_of(lanes: Lanes) -> Blocks:
    """In the order of lanes, of nodes, and of places."""
    count, width = lanes.rank.shape
    lane = lanes.place % width
    slot = np.empty(lane.size, dtype=np.int64)
    slot[np.lexsort((lanes.place, lanes.node, lane))] = np.arange(lane.size)
    each = np.bincount(lane * count + lanes.node, minlength=count * width)
    ends = np.concatenate([[0], np.cumsum(each)])
    return Blocks(slot, ends[np.arange(width)[:, None] * count + np.arange(count + 1)])


def one(block: Rank) -> tuple[Rank, Rank]:
    """A single block."""
    return block, block + 1


def cut(step: Step, begins: Any) -> Step:
    """A step whose intervals are of something that begins at these blocks."""
    return step._replace(
        send=(begins(step.send[0]), begins(step.send[1])), recv=(begins(step.recv[0]), begins(step.recv[1]))
    )


def slots_of(nodes: Any) -> Ints:
    """``(p,)`` the block that each rank has."""
    return blocks_of(hierarchical.lanes_of(nodes)).slot


def in_rank_order(blocks: npt.NDArray[Any], nodes: Any) -> npt.NDArray[Any]:
    """A gathered vector in the order of ranks, as a new array; ``blocks`` has a row a block."""
    return blocks[slots_of(nodes)]


def in_place_order(blocks: npt.NDArray[Any], nodes: Any) -> npt.NDArray[Any]:
    """A vector in the order of ranks as a reduce-scatter takes it, as a new array; ``blocks`` has a row a block."""
    ordered = np.empty_like(blocks)
    ordered[slots_of(nodes)] = blocks
    return ordered
