"""Allgather and reduce-scatter in two levels, for ranks on whole nodes: between the nodes, and inside them.

*N nodes of k ranks, p = N·k; rank r = a·k + l is on node a at place l; c the block of a rank.*  First the N ranks of
each place gather among themselves, all places at the same time; then each node gathers, N blocks a rank in every
message::

    allgather          (N−1) rounds between nodes, (k−1) inside them; (p−k)/p of the vector enters a node
    reduce-scatter     the same backwards: inside, then between

A flat ring takes p−1 rounds and brings (p−1)/p of the vector into every node.

So that a message inside a node is one interval, blocks lie in the order of places while they travel: rank a·k + l has
block l·N + a, which is what ``slots`` says.  :func:`in_rank_order` puts them in order afterwards,
:func:`in_place_order` before a reduce-scatter.  Who leaves that out has C0 C2 C1 C3 for p = 4, k = 2.

Zhang et al., *MiCS: near-linear scaling for training gigantic model on public cloud*, VLDB 2022, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import hierarchical, ring
from hpccomm.collectives.schedule import Algorithm, Rank, Step, one_each
from hpccomm.errors import ArgumentError


def allgather_on(nodes: Any) -> Algorithm:
    """The allgather of ranks that live on ``nodes`` (any integers, one a rank; as many ranks on each, in any order)."""
    lanes = whole_nodes(nodes)
    count = lanes.rank.shape[0]

    def steps(r: Rank, p: int) -> Iterator[Step]:
        yield from hierarchical.between(ring.allgather, r, lanes, count)
        yield from hierarchical.inside(ring.allgather, r, lanes, count)

    return Algorithm(steps, one_each, slots=lambda p: slots_of(lanes))


def reduce_scatter_on(nodes: Any) -> Algorithm:
    """The reduce-scatter of ranks that live on ``nodes``."""
    lanes = whole_nodes(nodes)
    count = lanes.rank.shape[0]

    def steps(r: Rank, p: int) -> Iterator[Step]:
        yield from hierarchical.inside(ring.reduce_scatter, r, lanes, count)
        yield from hierarchical.between(ring.reduce_scatter, r, lanes, count)

    return Algorithm(steps, one_each, slots=lambda p: slots_of(lanes))


def whole_nodes(nodes: Any) -> hierarchical.Lanes:
    """Who is where; raises unless all nodes have the same number of ranks."""
    lanes = hierarchical.lanes_of(nodes)
    if lanes.surplus:
        width = lanes.rank.shape[1]
        raise ArgumentError(
            f"a gather in two levels needs as many ranks on every node, here {width} to {width + lanes.surplus}: "
            "use a flat one"
        )
    return lanes


def slots_of(lanes: hierarchical.Lanes) -> npt.NDArray[np.int64]:
    """``(p,)`` the block that each rank has."""
    return np.asarray(lanes.place * lanes.rank.shape[0] + lanes.node)


def in_rank_order(blocks: npt.NDArray[Any], nodes: Any) -> npt.NDArray[Any]:
    """A gathered vector in the order of ranks, as a new array; ``blocks`` has a row a block."""
    return blocks[slots_of(whole_nodes(nodes))]


def in_place_order(blocks: npt.NDArray[Any], nodes: Any) -> npt.NDArray[Any]:
    """A vector in the order of ranks as a reduce-scatter takes it, as a new array; ``blocks`` has a row a block."""
    ordered = np.empty_like(blocks)
    ordered[slots_of(whole_nodes(nodes))] = blocks
    return ordered
