"""Reads the arguments of a collective and checks them, before the first message: host and device alike.

*p ranks.*  :data:`READERS` is the table of the collectives.  A reader completes a :class:`~hpccomm.calls.call.Call`, or
raises; every error begins with the rank and the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls import operations
from hpccomm.calls.blocks import (
    EQUAL,
    ONE,
    PARTS,
    SIGNATURES,
    TYPED,
    amounts_of,
    block_bytes,
    find_blocks,
    find_typed_blocks,
    overlap_within,
    share_bytes,
    total_bytes,
)
from hpccomm.calls.buffers import Buffer, as_pairs, check_reach, read, read_one_block
from hpccomm.calls.call import Call, describe_counts
from hpccomm.calls.fingerprint import UNKNOWN
from hpccomm.errors import ArgumentError
from hpccomm.kernels.entry.records import NOT_COMPARED
from hpccomm.performance.units import format_count

IN_PLACE = MPI.IN_PLACE
Counts = tuple[int, ...]


class Member:
    """What serves one rank of a communicator."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    @property
    def rank(self) -> int:
        """This rank."""
        return int(self.comm.rank)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return int(self.comm.size)


class Reader(Member):
    """Reads the calls of one rank of a communicator."""

    def read(self, name: str, sendbuf: Any, recvbuf: Any, *arguments: Any) -> Call:
        """Read a call; ``arguments`` are those of its signature, and at last the algorithm."""
        *given, algorithm = arguments
        named = dict(zip(SIGNATURES[name].arguments, given, strict=True))
        call = Call(name, self.call_label(name), self.rank, self.size, Buffer(None), Buffer(None), algorithm=algorithm)
        for each, value in named.items():
            setattr(call, each, value)
        if call.root is not None:
            call.root = self.check_root(call.root, call.who)
        READERS[name](self, call, sendbuf, recvbuf)
        return call

    # One reader a collective

    def read_reduction(self, call: Call, sendbuf: Any, recvbuf: Any) -> None:
        """Read an allreduce, or the root's reduce."""
        call.send, call.recv = self.reduction_buffers(sendbuf, recvbuf, call.op, call.who)
        call.data, call.nbytes = call.recv, call.recv.nbytes

    def read_reduce(self, call: Call, sendbuf: Any, recvbuf: Any) -> None:
        """Read a reduce; ranks other than the root have nothing to receive into."""
        if call.here:
            return self.read_reduction(call, sendbuf, recvbuf)
        call.data = call.send = self.read_operand(sendbuf, call.op, call.who)
        call.nbytes = call.send.nbytes

    def read_scan(self, call: Call, sendbuf: Any, recvbuf: Any) -> None:
        """Read a scan, which only MPI runs."""
        self.read_reduction(call, sendbuf, recvbuf)
        if call.recv.half:
            raise ArgumentError(f"{call.who}: MPI cannot reduce {call.recv.kind}: cast to float32 before the call")

    def read_reduce_scatter(self, call: Call, sendbuf: Any, recvbuf: Any) -> None:
        """Read either reduce-scatter; without counts the ranks exchange theirs."""
        who, in_place = call.who, is_in_place(sendbuf) or sendbuf is recvbuf
        recv = self.read_operand(recvbuf, call.op, who, writable=True)
        send = recv if in_place else self.read_operand(sendbuf, call.op, who)
        self.check_forms(send, recv, who)
        if call.signature.blockwise:
            send = self.join_blocks(send, who)
            recv = send if in_place else recv
            each = recv.block_length(self.size) if in_place else recv.elements
            call.counts = (0 if send.opaque or recv.opaque else each,) * self.size
            call.count = str(call.counts[0])
        else:
            call.counts = self.scatter_counts(call.recvcounts, recv, in_place, who)
            call.recvcounts = call.recvcounts if recv.opaque else call.counts
        if not (send.opaque or recv.opaque):
            self.check_blocks(send, recv, call.counts, who)
            recv = recv if send is recv else replace(recv, count=call.counts[self.rank])
        call.count = call.count or describe_counts(call.counts)
        call.send, call.recv, call.data, call.nbytes = send, recv, send, send.nbytes

    def read_allgather(self, call: Call, sendbuf: Any, recvbuf: Any) -> None:
        """Read either allgather."""
        kind, who = call.signature.recv, call.who
        recv = call.recv = self.read_buffer(recvbuf, who, True, kind == PARTS)
        send = call.send = recv if is_in_place(sendbuf) else self.read_buffer(sendbuf, who)
        counts, _ = call.blocks()
        if not recv.opaque and len(counts) != self.size:
            ranks = format_count(self.size, "rank")
            raise ArgumentError(f"{who}: {len(counts)} counts for {ranks}: pass one count per rank")
        if send.opaque:
            find_blocks(recv, kind, self.size, who)
        else:
            self.check_allgather(send, recv, kind, who)
        call.data, call.nbytes = recv, total_bytes(recv, kind, self.size)
        call.count = count_gathered(call)

    def read_bcast(self, call: Call, sendbuf: Any, buf: Any) -> None:
        """Read a broadcast, which is in place."""
        call.data = call.send = call.recv = self.read_buffer(buf, call.who, writable=not call.here)
        call.nbytes = call.recv.nbytes

    def read_alltoall(self, call: Call, sendbuf: Any, recvbuf: Any) -> None:
        """Read an all-to-all."""
        recv = self.read_buffer(recvbuf, call.who, writable=True)
        send = recv if is_in_place(sendbuf) else self.read_buffer(sendbuf, call.who)
        sent, received = (total_bytes(each, EQUAL, self.size) for each in (send, recv))
        unknown = any(each.opaque and each.octets is None and each.raw is not None for each in (send, recv))
        if not unknown and (sent != received or sent % self.size):
            raise ArgumentError(
                f"{call.who}: sends {sent} bytes, receives {received}: "
                "pass buffers of equal size, a multiple of the ranks"
            )
        self.check_places(send, recv, call.who, EQUAL, EQUAL)
        call.send, call.recv, call.data, call.nbytes = send, recv, recv, max(sent, received)
        call.count = count_gathered(call)

    def read_moves(self, call: Call, sendbuf: Any, recvbuf: Any) -> None:
        """Read a collective that moves blocks and that only MPI runs."""
        form, buffers = call.signature, (sendbuf, recvbuf)
        send, recv = self.read_blocks(call, buffers)
        both = (recv, send) if form.send_at_root else (send, recv)
        data = next((each for each in both if each and each.known and TYPED not in form), None)
        call.data, call.count = data or Buffer(None), "" if form.varies else None
        if data and not form.varies:
            amount = block_bytes(data, form.recv if data is recv else form.send, self.size)[0]
            dtype = data.dtype or data.base
            call.count = UNKNOWN if amount == NOT_COMPARED or dtype is None else str(amount // dtype.itemsize)
        if form.varies:
            call.amounts = amounts_of(form, send, recv, self.size, call.root)
        shown = buffers if TYPED in form else (None if each is None else each for each in (send, recv))
        call.send, call.recv = (each if isinstance(each, Buffer) else Buffer(each) for each in shown)

    def read_blocks(self, call: Call, buffers: tuple[Any, Any]) -> tuple[Buffer | None, Buffer | None]:
        """Read and check the buffers of a collective that moves blocks; ``None`` for one that this rank does not have.

        Of a call in place both are the same buffer, but the receive buffer of a Scatter(v) in place is ``IN_PLACE``.
        """
        form, here, who = call.signature, call.here, call.who
        sends, receives = here or not form.send_at_root, here or not form.recv_at_root
        send = recv = None
        if TYPED in form:
            within = is_in_place(buffers[0])
            into = find_typed_blocks(buffers[1], self.size, who, writes=True)
            sent = [] if within else find_typed_blocks(buffers[0], self.size, who, writes=False)
            self.check_apart(sent, into, who)
            return Buffer(buffers[1] if within else buffers[0]), Buffer(buffers[1])
        if receives:
            keeps = form.send_at_root and here and is_in_place(buffers[1])
            recv = Buffer(IN_PLACE) if keeps else self.read_buffer(buffers[1], who, True, form.recv == PARTS)
        if sends:
            within = not form.send_at_root and here and is_in_place(buffers[0])
            send = recv if within else self.read_buffer(buffers[0], who, parts=form.send == PARTS)
        found = [
            find_blocks(each, kind, self.size, who) if each else None
            for each, kind in ((send, form.send), (recv, form.recv))
        ]
        if send is not recv and None not in found:
            self.check_moved(send, recv, found, who)
        return send, recv

    def check_moved(self, send: Any, recv: Any, blocks: list[Any], who: str) -> None:
        """Refuse buffers that overlap, that differ in type or memory order, or whose own block has two lengths."""
        self.check_apart(blocks[0], blocks[1], who)
        self.check_order(send, recv, who)
        sent, received = (each[0 if len(each) == 1 else self.rank][1] for each in blocks)
        if send.kind != recv.kind or sent != received:
            raise ArgumentError(
                f"{who}: sends {sent // send.dtype.itemsize} {send.kind} to itself, has room for "
                f"{received // recv.dtype.itemsize} {recv.kind} from itself: make both the same"
            )

    def check_apart(self, sent: Any, received: Any, who: str) -> None:
        """Refuse blocks that overlap."""
        if share_bytes(sent, received):
            raise ArgumentError(f"{who}: the buffers overlap: pass MPI.IN_PLACE, or a copy")
        if overlap_within(received):
            raise ArgumentError(f"{who}: blocks of the receive buffer overlap: pass other displacements")

    def scatter_counts(self, recvcounts: Counts | None, recv: Buffer, in_place: bool, who: str) -> Counts:
        """The number of elements for each rank; without ``recvcounts`` the ranks exchange theirs."""
        if recvcounts is None and in_place:
            raise ArgumentError(f"{who}: in place, the number of elements for each rank is unknown: pass recvcounts")
        return self.comm.context.exchange_counts(recv.elements) if recvcounts is None else recvcounts

    def call_label(self, name: str) -> str:
        """The rank and the call, with which every error begins."""
        return f"rank {self.rank}: {name}"

    def read_buffer(self, given: Any, who: str, writable: bool = False, parts: bool = False) -> Buffer:
        """Read and check a buffer to send, or with ``writable`` to receive into.

        ``parts``: it has one block per rank, so its displacements belong to the blocks.
        """
        buffer = read(given, who) if parts else read_one_block(given, who)
        if writable and not buffer.writable:
            raise ArgumentError(f"{who}: the receive buffer is read-only: pass a writable array")
        return self.check_room(buffer, who)

    def check_room(self, buffer: Buffer, who: str) -> Buffer:
        """Refuse a count larger than the buffer."""
        if buffer.dtype is not None and buffer.count is not None and buffer.count > buffer.size:
            raise ArgumentError(
                f"{who}: the buffer holds {buffer.size} elements of {buffer.kind}, the count is {buffer.count}: "
                "pass a longer buffer or a smaller count"
            )
        check_reach(buffer, 1, who)
        return buffer

    def read_operand(self, given: Any, op: MPI.Op, who: str, writable: bool = False) -> Buffer:
        """Read and check a buffer of a reduction."""
        buffer = self.check_room(as_pairs(self.read_buffer(given, who, writable)), who)
        if given is None:
            raise ArgumentError(f"{who}: the buffer is None: pass an array")
        if buffer.dtype is not None:
            operations.check_defined(op, np.dtype("f4") if buffer.half else buffer.dtype, who, buffer.pair)
        if buffer.half and not op.is_predefined:
            raise ArgumentError(f"{who}: a user-defined operation cannot reduce {buffer.kind}: cast to float32")
        return buffer

    def join_blocks(self, buffer: Buffer, who: str) -> Buffer:
        """The buffer of a block for each rank as one vector; a count in its form is that of one block."""
        check_reach(buffer, self.size, who)
        if buffer.dtype is None or buffer.count is None:
            return buffer
        whole = self.check_room(replace(buffer, count=buffer.count * self.size), who)
        return replace(whole, count=None, size=whole.elements)

    def reduction_buffers(self, sendbuf: Any, recvbuf: Any, op: MPI.Op, who: str) -> tuple[Buffer, Buffer]:
        """The send and the receive buffer of a reduction; the same buffer twice when in place."""
        recv = self.read_operand(recvbuf, op, who, writable=True)
        if is_in_place(sendbuf) or sendbuf is recvbuf:
            return recv, recv
        send = self.read_operand(sendbuf, op, who)
        self.check_forms(send, recv, who)
        if send.opaque or recv.opaque:
            return send, recv
        if send.kind != recv.kind or send.elements != recv.elements:
            raise ArgumentError(
                f"{who}: sends {send.elements} {send.kind}, receives {recv.elements} {recv.kind}: make both the same"
            )
        self.check_order(send, recv, who)
        if send.address == recv.address:
            return recv, recv
        self.check_overlap(send, recv, who)
        return send, recv

    def check_forms(self, send: Buffer, recv: Buffer, who: str) -> None:
        """Refuse a reduction of a derived datatype into contiguous elements, or the other way round."""
        if send.opaque != recv.opaque and not (send.datatype or recv.datatype or MPI.BYTE).is_predefined:
            raise ArgumentError(
                f"{who}: one buffer has a derived datatype, the other has not: give both the same datatype, or pass "
                "two contiguous arrays"
            )

    def check_order(self, send: Buffer, recv: Buffer, who: str) -> None:
        """Refuse arrays of different memory orders; an array of one dimension is in C order."""
        if send.order != recv.order:
            raise ArgumentError(
                f"{who}: one array is in C order, the other in Fortran order: pass np.ascontiguousarray(x)"
            )

    def check_overlap(self, send: Buffer, recv: Buffer, who: str, sends: str = ONE, receives: str = ONE) -> None:
        """Refuse buffers that have these blocks and overlap."""
        sent, received = find_blocks(send, sends, self.size, who), find_blocks(recv, receives, self.size, who)
        if send is not recv and sent and received and share_bytes(sent, received):
            raise ArgumentError(f"{who}: the buffers overlap: pass MPI.IN_PLACE, or a copy")

    def check_places(self, send: Buffer, recv: Buffer, who: str, sends: str, receives: str) -> None:
        """Refuse buffers that have these blocks and overlap, or of different memory orders."""
        self.check_overlap(send, recv, who, sends, receives)
        if not (send.opaque or recv.opaque):
            self.check_order(send, recv, who)

    def check_root(self, root: int, who: str) -> int:
        """Refuse a root that is not a rank; returns it as an integer of Python."""
        if not (isinstance(root, int | np.integer) and 0 <= root < self.size):
            raise ArgumentError(f"{who}: root {root} is not a rank: pass one of 0 … {self.size - 1}")
        return int(root)

    def check_blocks(self, send: Buffer, recv: Buffer, counts: Counts, who: str) -> None:
        """Refuse counts of a reduce-scatter that do not fit the buffers."""
        if len(counts) != self.size or min(counts) < 0:
            ranks = format_count(self.size, "rank")
            raise ArgumentError(f"{who}: recvcounts {counts} for {ranks}: pass one count per rank")
        total, in_place = sum(counts), send is recv
        if send.kind != recv.kind or send.elements != total or (not in_place and recv.elements < counts[self.rank]):
            raise ArgumentError(
                f"{who}: sends {send.elements} {send.kind}, receives {recv.elements} {recv.kind}, but the counts "
                f"are {total} in all and {counts[self.rank]} for this rank: make buffers and counts agree"
            )
        if not in_place:
            self.check_places(send, recv, who, ONE, ONE)

    def check_allgather(self, send: Buffer, recv: Buffer, kind: str, who: str) -> None:
        """Refuse counts and displacements of an allgather that do not fit the buffers."""
        blocks = find_blocks(recv, kind, self.size, who)
        if send is recv or blocks is None:
            return
        self.check_own_block(send, blocks, who)
        self.check_order(send, recv, who)
        if share_bytes([(send.address, send.nbytes)], blocks):
            raise ArgumentError(f"{who}: the buffers overlap: pass MPI.IN_PLACE, or a copy")

    def check_own_block(self, send: Buffer, blocks: Any, who: str) -> None:
        """Refuse to send more or less into the gathered blocks than this rank's has room for."""
        _, room = blocks[self.rank]
        if send.nbytes != room:
            raise ArgumentError(
                f"{who}: sends {send.nbytes} bytes, the receive buffer has room for {room} from this rank: "
                "make both the same"
            )

    def significant(self, name: str, sendbuf: Any, recvbuf: Any, root: int | None) -> tuple[Any, Any]:
        """The buffers of a collective, without the one that only the root has."""
        if root is None or self.rank == root:
            return sendbuf, recvbuf
        form = SIGNATURES[name]
        return None if form.send_at_root else sendbuf, None if form.recv_at_root else recvbuf


def count_gathered(call: Call) -> str | None:
    """The elements of an allgather or all-to-all for its fingerprint; ``None`` if they are unknown."""
    recv = call.recv
    if recv.dtype is not None:
        return describe_counts(call.blocks()[0])
    return None if recv.base is None else str(call.nbytes // recv.base.itemsize)


def is_in_place(sendbuf: Any) -> bool:
    """Whether a send buffer means in place; mpi4py accepts ``None`` as well."""
    return sendbuf is None or sendbuf is IN_PLACE


READERS: dict[str, Callable[[Reader, Call, Any, Any], None]] = {
    "Allreduce": Reader.read_reduction,
    "Reduce": Reader.read_reduce,
    "Reduce_scatter_block": Reader.read_reduce_scatter,
    "Reduce_scatter": Reader.read_reduce_scatter,
    "Allgather": Reader.read_allgather,
    "Allgatherv": Reader.read_allgather,
    "Bcast": Reader.read_bcast,
    "Alltoall": Reader.read_alltoall,
    "Barrier": lambda reader, call, sendbuf, recvbuf: None,
    "Scan": Reader.read_scan,
    "Exscan": Reader.read_scan,
    **dict.fromkeys(("Gather", "Gatherv", "Scatter", "Scatterv", "Alltoallv", "Alltoallw"), Reader.read_moves),
}
"""How each collective's call is read."""
