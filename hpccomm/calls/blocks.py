"""What each collective takes: its arguments, and the blocks of its buffers, checked before the first message.

*p ranks; a buffer has one block, p blocks of one length, or p blocks of any length.*  :data:`SIGNATURES` is the table
of the collectives.  The lengths of blocks of any length may differ between ranks, but what a rank sends to another must
be what that one receives from it: ranks of a node write both into the consistency table (:class:`Amounts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.calls.buffers import Buffer, check_datatype, check_reach, read_data, read_integers, split_form
from hpccomm.errors import ArgumentError
from hpccomm.kernels.entry.records import NOT_COMPARED

NONE, ONE, EQUAL = "no buffer", "one block", "equal blocks"
PARTS, TYPED = "blocks of any length", "blocks of any datatype"


class Signature(NamedTuple):
    """What one collective takes: the blocks of its buffers, whether only the root has them, and its arguments."""

    send: str
    recv: str
    arguments: tuple[str, ...] = ()
    """The arguments after the buffers, in MPI's order."""
    family: str = ""
    """The collective whose algorithms it uses; empty where only MPI has any."""
    synchronises: bool = False
    """Whether no rank leaves it before all ranks have entered."""
    send_at_root: bool = False
    recv_at_root: bool = False

    @property
    def varies(self) -> bool:
        """Whether blocks may have any length."""
        return bool({self.send, self.recv} & {PARTS, TYPED})

    @property
    def blockwise(self) -> bool:
        """Whether calls are counted in bytes of one block."""
        return EQUAL in self[:2]

    def blocks_of(self, number: int, in_place: bool) -> str:
        """The blocks of buffer ``number`` (0: send, 1: receive); in place the one buffer has those of both."""
        both = self[:2] if in_place else self[number : number + 1]
        return next((kind for kind in (PARTS, EQUAL) if kind in both), ONE)


SIGNATURES = {
    "Allreduce": Signature(ONE, ONE, ("op",), "allreduce", synchronises=True),
    "Reduce": Signature(ONE, ONE, ("op", "root"), "reduce", recv_at_root=True),
    "Reduce_scatter_block": Signature(EQUAL, ONE, ("op",), "reduce_scatter", synchronises=True),
    "Reduce_scatter": Signature(ONE, ONE, ("recvcounts", "op"), "reduce_scatter", synchronises=True),
    "Allgather": Signature(ONE, EQUAL, (), "allgather", synchronises=True),
    "Allgatherv": Signature(ONE, PARTS, (), "allgather", synchronises=True),
    "Bcast": Signature(NONE, ONE, ("root",), "bcast"),
    "Alltoall": Signature(EQUAL, EQUAL, (), "alltoall"),
    "Barrier": Signature(NONE, NONE, (), "barrier", synchronises=True),
    "Scan": Signature(ONE, ONE, ("op",)),
    "Exscan": Signature(ONE, ONE, ("op",)),
    "Gather": Signature(ONE, EQUAL, ("root",), recv_at_root=True),
    "Gatherv": Signature(ONE, PARTS, ("root",), recv_at_root=True),
    "Scatter": Signature(EQUAL, ONE, ("root",), send_at_root=True),
    "Scatterv": Signature(PARTS, ONE, ("root",), send_at_root=True),
    "Alltoallv": Signature(PARTS, PARTS),
    "Alltoallw": Signature(TYPED, TYPED),
}
"""All collectives; those without a family only MPI runs."""

OBJECT_SIGNATURES = {
    "allgather": Signature(NONE, NONE, (), synchronises=True),
    "allreduce": Signature(NONE, NONE, ("op",), synchronises=True),
    "alltoall": Signature(NONE, NONE, (), synchronises=True),
    "bcast": Signature(NONE, NONE, ("root",)),
    "exscan": Signature(NONE, NONE, ("op",), synchronises=True),
    "gather": Signature(NONE, NONE, ("root",), recv_at_root=True),
    "reduce": Signature(NONE, NONE, ("op", "root"), synchronises=True),
    "scan": Signature(NONE, NONE, ("op",), synchronises=True),
    "scatter": Signature(NONE, NONE, ("root",)),
}
"""mpi4py's collectives of objects, of which the ranks compare the arguments after the object.

mpi4py holds the interpreter while it reduces objects, and the watchdog could not tell that a rank never comes, so
before a reduction all ranks wait for each other.
"""


class Amounts(NamedTuple):
    """Bytes that one rank sends to each rank, and receives from each, or ``NOT_COMPARED``."""

    sends: tuple[int, ...]
    receives: tuple[int, ...]


def find_blocks(buffer: Buffer, kind: str, p: int, who: str) -> list[tuple[int, int]] | None:
    """Address and bytes of each block of a contiguous buffer; ``None`` for a buffer that mpi4py must read.

    Raises if the buffer does not hold them.
    """
    if buffer.dtype is None:
        check_reach(buffer, p if kind == EQUAL else 1, who)
        return None
    item = buffer.dtype.itemsize
    counts: tuple[int, ...]
    displs: tuple[int, ...]
    if kind == ONE:
        counts, displs = (buffer.elements,), (0,)
    elif kind == EQUAL:
        if buffer.count is None and buffer.size % p:
            raise ArgumentError(
                f"{who}: the buffer of {buffer.size} {buffer.kind} has a block for each of {p} ranks: "
                "pass an array whose length is a multiple of the number of ranks, or a count"
            )
        each = buffer.block_length(p)
        counts, displs = (each,) * p, tuple(each * k for k in range(p))
    else:
        counts, displs = buffer.blocks(p)
    for name, values in (("counts", counts), ("displacements", displs)):
        if len(values) != len(counts) or (kind == PARTS and len(values) != p):
            raise ArgumentError(f"{who}: {len(values)} {name} for {p} ranks: pass one for each rank")
        if min(values) < 0:
            raise ArgumentError(f"{who}: {name} {list(values)}: pass numbers that are not negative")
    end = max((d + c for c, d in zip(counts, displs, strict=True) if c), default=0)
    if end > buffer.size:
        raise ArgumentError(
            f"{who}: the blocks end at element {end}, the buffer holds {buffer.size} {buffer.kind}: "
            "pass a longer buffer or smaller counts"
        )
    return [(buffer.address + d * item, c * item) for c, d in zip(counts, displs, strict=True)]


def find_typed_blocks(form: Any, p: int, who: str, writes: bool) -> list[tuple[int, int]]:
    """Address and bytes of each block of ``[data, counts, displacements in bytes, datatypes]``, checked.

    Empty for a form whose memory only mpi4py knows.  Of datatypes with gaps, blocks end with their last byte.
    """
    if not isinstance(form, list | tuple) or not 2 <= len(form) <= 4:
        raise ArgumentError(f"{who}: {type(form).__name__} is no buffer: pass [data, counts, displacements, datatypes]")
    data, *rest, types = form
    if data is None or data is MPI.BOTTOM or not isinstance(types, list | tuple):
        return []
    counts, displs = rest[0] if len(rest) == 1 else rest or ([1] * p, [0] * p)
    counts, displs = read_integers(counts, "count", who), read_integers(displs, "displacement", who)
    for name, values in (("counts", counts), ("displacements", displs), ("datatypes", types)):
        if len(values) != p:
            raise ArgumentError(f"{who}: {len(values)} {name} for {p} ranks: pass one for each rank")
    for each in types:
        check_datatype(each, who)
    memory = read_data(data, MPI.BYTE, who)
    if memory.opaque:
        return []
    if writes and not memory.writable:
        raise ArgumentError(f"{who}: the receive buffer is read-only: pass a writable array")
    nbytes, blocks = memory.size * memory.width, list[tuple[int, int]]()
    for count, displ, each in zip(counts, displs, types, strict=True):
        datatype = MPI.Datatype.fromcode(each) if isinstance(each, str) else each
        (_, extent), (first, used) = datatype.Get_extent(), datatype.Get_true_extent()
        begin, size = displ + first, (count - 1) * extent + used if count else 0
        if count < 0 or (count and not 0 <= begin <= begin + size <= nbytes):
            raise ArgumentError(
                f"{who}: {count} {datatype.Get_name() or 'elements'} at byte {displ} are outside the buffer of "
                f"{nbytes} bytes: pass a longer buffer or smaller counts"
            )
        dense = datatype.Get_size() == extent
        blocks.append((memory.address + begin, size if dense else 0))
    return blocks


def share_bytes(a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]]) -> bool:
    """Whether a block of one buffer shares bytes with a block of the other; blocks are (address, bytes)."""
    ends = sorted([(first, first + size, side) for side, blocks in enumerate((a, b)) for first, size in blocks if size])
    reached = [0, 0]
    for first, last, side in ends:
        if reached[1 - side] > first:
            return True
        reached[side] = max(reached[side], last)
    return False


def overlap_within(blocks: Sequence[tuple[int, int]]) -> bool:
    """Whether two blocks of one buffer share bytes."""
    ordered = sorted((first, first + size) for first, size in blocks if size)
    return any(a[1] > b[0] for a, b in pairwise(ordered))


def total_bytes(buffer: Buffer, kind: str, p: int) -> int:
    """Bytes in all blocks of a buffer; the count in the form of equal blocks is that of one block."""
    if kind == ONE or (buffer.dtype is None and buffer.count is None):
        return buffer.nbytes
    if buffer.dtype is None:
        return buffer.nbytes * p
    each = buffer.dtype.itemsize
    return each * (sum(buffer.blocks(p)[0]) if kind == PARTS else buffer.block_length(p) * p)


def block_bytes(buffer: Buffer, kind: str, p: int) -> tuple[int, ...]:
    """Bytes of each block, also of a buffer that mpi4py must read; ``NOT_COMPARED`` where that is unknown."""
    unknown = (NOT_COMPARED,) * (1 if kind == ONE else p)
    if buffer.dtype is not None:
        counts = (buffer.elements,) if kind == ONE else buffer.blocks(p)[0]
        return tuple(each * buffer.dtype.itemsize for each in counts)
    if kind == ONE:
        return unknown if buffer.octets is None else (buffer.octets,)
    try:
        return read_block_bytes(buffer.raw, p)
    except (AttributeError, LookupError, TypeError, ValueError):
        return unknown


def read_block_bytes(form: Any, p: int) -> tuple[int, ...]:
    """Bytes of each block of a form with counts and a datatype, or a datatype for each rank."""
    if isinstance(form[-1], MPI.Datatype | str):
        _, counts, _, datatype = split_form(form)
        types = [datatype] * p
    else:
        types = list(form[-1])
        counts = (form[1][0] if len(form) == 3 else form[1]) if len(form) > 2 else None
        counts = [1] * p if counts is None else counts
    if len(counts) != p or len(types) != p:
        raise ValueError
    return tuple(int(np.intp(count)) * int(each.Get_size()) for count, each in zip(counts, types, strict=True))


def amounts_of(form: Signature, send: Buffer | None, recv: Buffer | None, p: int, root: int | None) -> Amounts:
    """What this rank sends and receives in a call; ``None`` for a buffer that it does not have, or in place."""
    sends, receives = [NOT_COMPARED] * p, [NOT_COMPARED] * p
    for amounts, buffer, kind in ((sends, send, form.send), (receives, recv, form.recv)):
        if buffer is None:
            continue
        found = block_bytes(buffer, kind, p)
        if kind == ONE:
            assert root is not None
            amounts[root] = found[0]
        else:
            amounts[:] = found
    return Amounts(tuple(sends), tuple(receives))
