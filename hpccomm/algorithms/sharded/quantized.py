"""Fewer bytes between the nodes of a partition group: qwZ, hpZ and qgZ of ZeRO++ (Wang et al., ICLR 2024).

*A partition group of p = n·k ranks on n nodes of k; m elements of a shard; M bytes of 16-bit parameters.*

====================  ==============================================================  =================================
argument              what happens                                                    bytes into a node, a micro-step
====================  ==============================================================  =================================
(none)                gather in forward and in backward, reduce-scatter               3 · (n−1)/n · M
``weight_code``       qwZ: shards are gathered in blocks of 8 bits                    a gather: 0.51 · (n−1)/n · M
``secondary_shard``   hpZ: a rank keeps 1/k of each gathered unit; all later gathers  those gathers: 0
                      of the step are inside the node
``gradient_code``     qgZ: rows for the k local ranks are exchanged in the node and   0.27 · (n−1)/n · M with ``int4``
                      added, then those for the n nodes between the nodes
====================  ==============================================================  =================================

All three: a quarter of the bytes.  Blocks are those of :mod:`hpccomm.collectives.compressed.two_phase`.  Every rank
decodes the same bytes, its own too, so that gathered parameters are the same on all ranks; what rounding loses is not
kept: master weights are exact, and a gradient is rounded twice in qgZ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpccomm.algorithms.transforms import Vector, check_choice, require
from hpccomm.arrays import narrow, reduction_dtype, to_device_like, to_host, view_for_mpi, widen
from hpccomm.collectives.compressed.two_phase import CODES, decode_blocks, encode_blocks, sum_of_codes

GatherCall = Callable[[Vector, Vector], int]
"""``gather(shard, whole)`` of equal shards in rank order; returns the bytes that this rank sends (collective)."""


def check_codes(
    stage: int, dtype: np.dtype[Any], weight_code: str | None, gradient_code: str | None, secondary_shard: bool
) -> None:
    """Raise for arguments that do not fit together."""
    for name, code in (("weight_code", weight_code), ("gradient_code", gradient_code)):
        check_choice(f"zero: {name}", code, (None, *CODES))
        require(
            not code or reduction_dtype(dtype) == np.float32,
            f"zero: {name} is {code!r}, but {dtype} travels: pass dtype float32, float16 or bfloat16, or leave it out",
        )
    given = [name for name, value in (("weight_code", weight_code), ("secondary_shard", secondary_shard)) if value]
    require(
        stage == 3 or not given,
        f"zero: {' and '.join(given)} at stage {stage}, where ranks keep whole parameters: pass stage=3, or leave out",
    )


def gather_coded(gather: GatherCall, code: str, shard: Vector, whole: Vector) -> int:
    """Gather in blocks (collective); vectors on a device are coded on the host."""
    kind = CODES[code]
    coded = encode_blocks(widen(to_host(shard)), kind)
    arrived = np.empty((whole.size // shard.size, coded.size), np.uint8)
    sent = gather(coded, arrived.reshape(-1))
    for row, part in zip(arrived, whole.reshape(len(arrived), -1), strict=True):
        part[...] = to_device_like(narrow(decode_blocks(row, part.size, kind), whole.dtype), whole)
    return sent


class SecondaryShards:
    """This rank's part of every unit that its node has gathered since the weights last changed.

    ``sizes``: the padded sizes of the units; ``node`` a communicator of the partition group's ranks on this node.
    """

    def __init__(self, node: Any, sizes: Sequence[int], dtype: np.dtype[Any], library: Any) -> None:
        self.node = node
        self.shards = [library.zeros(-(-size // node.size), dtype) for size in sizes]
        self.known: set[int] = set()

    @property
    def nbytes(self) -> int:
        """Bytes on this rank."""
        return sum(each.nbytes for each in self.shards)

    def fetch(self, number: int, whole: Vector, gather: Callable[[], int]) -> int:
        """Gather a unit inside the node, or by ``gather()`` for the first time; returns the bytes sent (collective)."""
        mine = self.shards[number]
        if number in self.known:
            arrived = np.empty_like(mine, shape=(mine.size * self.node.size,))
            self.node.Allgather(view_for_mpi(mine), view_for_mpi(arrived))
            whole[...] = arrived[: whole.size]
            return int((self.node.size - 1) * mine.nbytes)
        sent = gather()
        part = whole[self.node.rank * mine.size :][: mine.size]
        mine[: part.size] = part
        self.known.add(number)
        return sent

    def forget(self) -> None:
        """The weights have changed."""
        self.known.clear()


def make_secondary(partition: Any, sizes: Sequence[int], dtype: np.dtype[Any], library: Any) -> SecondaryShards | None:
    """The secondary shards of a partition group of several nodes; None inside one node (collective)."""
    return SecondaryShards(partition.intra_node, sizes, dtype, library) if partition.layout.count > 1 else None


class CodedReduce:
    """Reduce-scatters of shards in blocks: inside the nodes, then between them; in one hop where nodes are uneven."""

    nbytes = 0

    def __init__(self, partition: Any, code: str) -> None:
        layout = getattr(partition, "layout", None)
        self.code, self.hops, self.order = code, [partition], np.arange(partition.size)
        if layout is not None and layout.even and 1 < layout.count < layout.size:
            places = [layout.local_rank(rank) for rank in range(layout.size)]
            self.hops, self.order = [partition.intra_node, partition.inter_node], np.argsort(places, kind="stable")

    def __call__(self, room: Vector, total: Vector) -> int:
        """Add this rank's shard of the sum, without padding, to ``total``; returns the bytes sent."""
        rows, sent = widen(to_host(room)).reshape(len(self.order), -1)[self.order], 0
        for comm in self.hops:
            mine, more = sum_of_codes(comm, rows.reshape(comm.size, -1), self.code)
            rows, sent = mine, sent + more
        total += to_device_like(rows[: total.size], total)
        return sent
