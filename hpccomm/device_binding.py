"""Calls on arrays that lie on a CUDA device: compared with what the other ranks call, then brought through the host.

*p ranks; n elements.*  Element-wise collectives go in chunks of elements; those that deal in parts for each rank in
chunks of columns, the same columns of every part.  On the host a chunk is a call like any other: the same algorithms,
the same shared memory, the same bits.  What cannot be divided goes in one chunk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm import messages, operations
from hpccomm.arrays import DeviceArray, bfloat16, given_back, lies_on_device, read_device
from hpccomm.binding import IN_PLACE, Binder, is_in_place
from hpccomm.errors import ArgumentError, TransportError
from hpccomm.messages import Message
from hpccomm.resources import Bound
from hpccomm.signature import UNKNOWN, Signature
from hpccomm.transports import cuda
from hpccomm.transports.cuda import Chunk, Piece, Staging

Host = Callable[[Any, Any], Any]
"""A collective of host arrays: ``host(send, recv)``."""


class Stream:
    """An array, or one of mpi4py's forms, whose work is on a stream that the array does not tell."""

    def __init__(self, given: Any, stream: Any) -> None:
        self.given, self.stream = given, stream


def on_stream(stream: Any, *buffers: Any) -> tuple[Any, ...]:
    """The buffers, bound to a stream where they are arrays on a device."""
    return tuple(Stream(each, stream) if array_of(each) is not None else each for each in buffers)


def array_of(given: Any) -> Any:
    """The device array in a buffer, be it a form or not; ``None`` for all else, and where the host can address it."""
    if os.environ.get(cuda.TRANSPORT) == cuda.ON_HOST:
        return None
    data = given.given if isinstance(given, Stream) else given
    data = data[0] if isinstance(data, list | tuple) and data else data
    return data if lies_on_device(data) else None


class Operand:
    """A buffer on a device as the binder understands buffers; its memory is never looked at from here."""

    def __init__(self, given: Any, device: cuda.Device, who: str) -> None:
        stream = given.stream if isinstance(given, Stream) else None
        form = given.given if isinstance(given, Stream) else given
        self.array: DeviceArray = read_device(array_of(given), who, stream)
        check_place(self.array, device, who)
        view = messages.at(self.array.address, self.array.size, self.array.dtype)
        view.flags.writeable = self.array.writable
        self.message: Message = messages.read([view, *form[1:]] if isinstance(form, list | tuple) else view, who)
        if self.message.opaque:
            raise ArgumentError(f"{who}: a derived datatype on a device: pass a contiguous array of a plain dtype")
        self.message.order = self.array.order

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the host's arrays that stand for it."""
        assert self.message.dtype is not None
        if self.message.half == "bfloat16":
            return bfloat16("a device's array")
        return np.dtype(self.message.half) if self.message.half else self.message.dtype

    def piece(self, first: int, count: int, at: int = 0) -> Piece:
        """Elements [first, first + count), at element ``at`` of a chunk."""
        width = self.dtype.itemsize
        return Piece(self.message.address + first * width, at * width, count * width)


def check_place(array: DeviceArray, device: cuda.Device, who: str) -> None:
    """Refuse memory that is no device's, or another device's than this rank's."""
    if array.size == 0:
        return
    place = device.where(array.address)
    if place is None:
        raise ArgumentError(f"{who}: the array's memory is not on a device, or was freed: pass an array that lives")
    if place != device.number:
        raise ArgumentError(
            f"{who}: the array lies on device {place}, this rank uses device {device.number}: "
            f"copy it, or select the device before the call, cupy.cuda.Device({place}).use()"
        )


class DeviceBinder(Binder):
    """A binder that takes arrays on a device, too."""

    @cached_property
    def staging(self) -> Staging:
        """The way through the host."""
        return Staging(cuda.device())

    def operands(self, who: str, *buffers: Any) -> list[Operand | None] | None:
        """The buffers on a device (``None`` for none and for in place); ``None`` where all are on the host."""
        there = [array_of(each) is not None for each in buffers]
        if not any(there):
            return None
        for each, lies in zip(buffers, there, strict=True):
            if not lies and not is_in_place(each):
                raise ArgumentError(
                    f"{who}: one buffer lies on a device, the other, {type(each).__name__}, on the host: "
                    "pass both of one kind"
                )
        try:
            device = self.staging.device
        except TransportError as error:
            raise ArgumentError(f"{who}: the array lies on a device: {error}") from None
        return [Operand(each, device, who) if lies else None for each, lies in zip(buffers, there, strict=True)]

    def staged(
        self,
        name: str,
        operands: Sequence[Operand | None],
        chunks: Sequence[Chunk],
        op: MPI.Op | None = None,
        root: int | None = None,
        count: int | None = None,
        algorithm: str | None = None,
    ) -> Bound:
        """A bound call: the calls of all ranks are compared, then the chunks go through the host."""
        here = [each for each in operands if each is not None]
        meet = self.compared(name, here[-1].message if here else None, op, root, count, algorithm)
        streams = [stream for each in here for stream in each.array.streams]
        kept = [each.array.owner for each in here]

        def run() -> None:
            meet()
            self.staging.run(chunks, streams)

        return Bound(run, kept.clear)

    def compared(
        self,
        name: str,
        data: Message | None,
        op: MPI.Op | None = None,
        root: int | None = None,
        count: int | None = None,
        algorithm: str | None = None,
    ) -> Callable[[], None]:
        """A meeting of all ranks that raises on each of them where their calls differ, or the memory they are for."""
        signature = Signature(
            name,
            operations.name_of(op) if op is not None else "",
            UNKNOWN if count is None else str(count),
            UNKNOWN if data is None else data.kind,
            "" if root is None else str(root),
            UNKNOWN if data is None else data.order,
            algorithm or "",
            "on a device",
        )
        return self.checked(signature, lambda: None, lockstep=True)

    def operand_of(self, x: Any, name: str, stream: Any) -> Operand:
        """One array on a device."""
        operands = self.operands(self.who(name), Stream(x, stream))
        assert operands is not None
        assert operands[0] is not None
        return operands[0]

    def beside(self, x: Any, name: str, stream: Any = None) -> tuple[DeviceArray, Any]:
        """What an array on a device is, and a new one like it, in C order."""
        array = self.operand_of(x, name, stream).array
        return array, self.staging.device.like(x, array.shape, array.dtype)

    def through_host(self, name: str, x: Any, function: Callable[[Any], Any], stream: Any = None) -> Any:
        """What ``function`` makes of the array when it sees it on the host, on the device again."""
        side = self.operand_of(x, name, stream)
        array, staging = side.array, self.staging
        if name:
            self.compared(name, side.message)()
        seen = np.empty(array.size, array.dtype)
        staging.fetch(array.address, seen.view(np.uint8), array.streams)
        result = np.ascontiguousarray(function(seen.reshape(array.shape, order="F" if array.order == "F" else "C")))
        made = staging.device.like(x, result.shape, result.dtype)
        there = read_device(made, self.who(name))
        staging.store(result.reshape(-1).view(np.uint8), there.address, there.streams)
        return given_back(made, x)

    # Collectives

    def allreduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None) -> Bound:
        """Allreduce."""
        return self.all_reduced(sendbuf, recvbuf, op, algorithm, False) or super().allreduce(
            key, sendbuf, recvbuf, op, algorithm
        )

    def all_reduced(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None, reproducible: bool
    ) -> Bound | None:
        """Allreduce on a device."""
        who = self.who("Allreduce")
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return None
        send, recv = self.reduced(operands, op, who)
        comm = self.comm
        self.check_algorithm("allreduce", recv, op, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Allreduce(a, b, op, algorithm, reproducible)

        chunks = elementwise(recv.message.elements, send, recv, host)
        return self.staged("Allreduce", operands, chunks, op, count=recv.message.elements, algorithm=algorithm)

    def reduced(self, operands: list[Operand | None], op: MPI.Op, who: str) -> tuple[Operand, Operand]:
        """What goes in and what comes out; the same twice when in place."""
        first, recv = operands
        if recv is None:
            raise ArgumentError(f"{who}: the buffer to receive into is None: pass an array")
        send = recv if first is None else first
        self.reduction_buffers(IN_PLACE if first is None else send.message, recv.message, op, who)
        return send, recv

    def check_algorithm(self, collective: str, data: Operand, op: Any, algorithm: str | None, who: str) -> None:
        """Refuse a name before the first message, as on the host."""
        if algorithm is not None:
            self.choose(collective, data.message, op, algorithm, who)

    def reduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str | None) -> Bound:
        """Reduce."""
        return self.reduced_to(sendbuf, recvbuf, op, root, algorithm, False) or super().reduce(
            key, sendbuf, recvbuf, op, root, algorithm
        )

    def reduced_to(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str | None, reproducible: bool
    ) -> Bound | None:
        """Reduce on a device; ranks other than the root write nothing."""
        who, comm = self.who("Reduce"), self.comm
        self.check_root(root, who)
        operands = self.operands(who, sendbuf, recvbuf if self.rank == root else None)
        if operands is None:
            return None
        if self.rank == root:
            send, recv = self.reduced(operands, op, who)
        else:
            assert operands[0] is not None
            send = recv = operands[0]
            self.operand(send.message, op, who)
        self.check_algorithm("reduce", send, op, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Reduce(a, b, op, root, algorithm, reproducible)

        into = recv if self.rank == root else None
        chunks = elementwise(send.message.elements, send, into, host)
        return self.staged("Reduce", operands, chunks, op, root, send.message.elements, algorithm)

    def bcast(self, key: Hashable, buf: Any, root: int, algorithm: str | None) -> Bound:
        """Bcast."""
        who, comm = self.who("Bcast"), self.comm
        operands = self.operands(who, buf)
        if operands is None:
            return super().bcast(key, buf, root, algorithm)
        (data,) = operands
        assert data is not None
        self.check_root(root, who)
        self.buffer(data.message, who, writable=self.rank != root)
        self.check_algorithm("bcast", data, None, algorithm, who)
        here = self.rank == root

        def host(a: Any, b: Any) -> None:
            comm.Bcast(a if here else b, root, algorithm)

        chunks = elementwise(data.message.elements, data if here else None, None if here else data, host)
        return self.staged("Bcast", operands, chunks, None, root, data.message.elements, algorithm)

    def allgather(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Bound:
        """Allgather."""
        who, comm, p = self.who("Allgather"), self.comm, self.size
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return super().allgather(key, sendbuf, recvbuf, algorithm)
        first, recv = self.moved(operands, who)
        each = recv.message.part(p)
        counts, displs = (each,) * p, tuple(each * k for k in range(p))
        send = recv if first is None else first
        self.check_gathering(send.message, recv.message, counts, displs, first is None, who)
        self.check_algorithm("allgather", recv, None, algorithm, who)
        begin = self.rank * each if first is None else 0

        def host(a: Any, b: Any) -> None:
            comm.Allgather(a, b, algorithm)

        chunks = [
            chunk(
                [send.piece(begin + lo, hi - lo)],
                [recv.piece(k * each + lo, hi - lo, k * (hi - lo)) for k in range(p)],
                send,
                recv,
                host,
            )
            for lo, hi in columns(each, p * recv.dtype.itemsize)
        ]
        return self.staged("Allgather", operands, chunks, count=each * p, algorithm=algorithm)

    def allgatherv(self, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Bound:
        """Allgatherv, in one chunk."""
        who, comm, p, me = self.who("Allgatherv"), self.comm, self.size, self.rank
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return super().allgatherv(sendbuf, recvbuf, algorithm)
        first, recv = self.moved(operands, who)
        counts, displs = recv.message.parts(p)
        if len(counts) != p:
            raise ArgumentError(f"{who}: {len(counts)} counts for {p} ranks: pass one a rank")
        send = recv if first is None else first
        self.check_gathering(send.message, recv.message, counts, displs, first is None, who)
        self.check_algorithm("allgather", recv, None, algorithm, who)
        cuts = np.cumsum([0, *counts]).tolist()
        reads = [send.piece(displs[me] if first is None else 0, counts[me])]
        writes = [recv.piece(displs[k], counts[k], cuts[k]) for k in range(p)]

        def host(a: Any, b: Any) -> None:
            comm.Allgatherv(a, [b, list(counts)], algorithm)

        chunks = [chunk(reads, writes, send, recv, host)]
        return self.staged("Allgatherv", operands, chunks, count=sum(counts), algorithm=algorithm)

    def moved(self, operands: list[Operand | None], who: str) -> tuple[Operand | None, Operand]:
        """What is sent (``None`` in place) and what is received into."""
        send, recv = operands
        if recv is None:
            raise ArgumentError(f"{who}: the buffer to receive into is None: pass an array")
        self.buffer(recv.message, who, writable=True)
        if send is not None:
            self.buffer(send.message, who)
        return send, recv

    def alltoall(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Bound:
        """Alltoall."""
        who, comm, p = self.who("Alltoall"), self.comm, self.size
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return super().alltoall(key, sendbuf, recvbuf, algorithm)
        first, recv = self.moved(operands, who)
        send = recv if first is None else first
        each = recv.message.part(p)
        if send.message.part(p) * send.dtype.itemsize != each * recv.dtype.itemsize or send.dtype != recv.dtype:
            raise ArgumentError(
                f"{who}: sends {send.message.part(p)} {send.message.kind} to each rank, receives {each} "
                f"{recv.message.kind}: make them agree"
            )
        if first is not None:
            self.check_apart(send.message, recv.message, who)
        self.check_algorithm("alltoall", recv, None, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Alltoall(a, b, algorithm)

        chunks = []
        for lo, hi in columns(each, p * recv.dtype.itemsize):
            reads, writes = (
                [side.piece(k * each + lo, hi - lo, k * (hi - lo)) for k in range(p)] for side in (send, recv)
            )
            chunks.append(chunk(reads, writes, send, recv, host))
        return self.staged("Alltoall", operands, chunks, count=each * p, algorithm=algorithm)

    def reduce_scatter_block(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None
    ) -> Bound:
        """Reduce_scatter_block."""
        return self.scattered_evenly(sendbuf, recvbuf, op, algorithm, False) or super().reduce_scatter_block(
            key, sendbuf, recvbuf, op, algorithm
        )

    def scattered_evenly(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None, reproducible: bool
    ) -> Bound | None:
        """Reduce_scatter_block on a device."""
        who, comm, p = self.who("Reduce_scatter_block"), self.comm, self.size
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return None
        first, recv = self.moved(operands, who)
        send = recv if first is None else first
        for each in (send, recv):
            self.operand(each.message, op, who)
        part = recv.message.part(p) if first is None else recv.message.elements
        self.check_parts(send.message, recv.message, (part,) * p, first is None, who)
        self.check_algorithm("reduce_scatter", recv, op, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Reduce_scatter_block(a, b, op, algorithm, reproducible)

        chunks = [
            chunk(
                [send.piece(k * part + lo, hi - lo, k * (hi - lo)) for k in range(p)],
                [recv.piece(lo, hi - lo)],
                send,
                recv,
                host,
            )
            for lo, hi in columns(part, p * recv.dtype.itemsize)
        ]
        return self.staged("Reduce_scatter_block", operands, chunks, op, count=part * p, algorithm=algorithm)

    def reduce_scatter_v(
        self,
        key: Hashable,
        sendbuf: Any,
        recvbuf: Any,
        told: tuple[int, ...] | None,
        op: MPI.Op,
        algorithm: str | None,
    ) -> Bound:
        """Reduce_scatter, in one chunk."""
        return self.scattered(sendbuf, recvbuf, told, op, algorithm, False) or super().reduce_scatter_v(
            key, sendbuf, recvbuf, told, op, algorithm
        )

    def scattered(
        self,
        sendbuf: Any,
        recvbuf: Any,
        told: tuple[int, ...] | None,
        op: MPI.Op,
        algorithm: str | None,
        reproducible: bool,
    ) -> Bound | None:
        """Reduce_scatter on a device."""
        who, comm = self.who("Reduce_scatter"), self.comm
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return None
        first, recv = self.moved(operands, who)
        send = recv if first is None else first
        for each in (send, recv):
            self.operand(each.message, op, who)
        if told is None and first is None:
            raise ArgumentError(f"{who}: in place it cannot know who gets how much: pass recvcounts")
        counts = tuple(self.resources.channel.allgather(recv.message.elements)) if told is None else told
        self.check_parts(send.message, recv.message, counts, first is None, who)
        self.check_algorithm("reduce_scatter", recv, op, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Reduce_scatter(a, b, counts, op, algorithm, reproducible)

        reads, writes = [send.piece(0, sum(counts))], [recv.piece(0, counts[self.rank])]
        chunks = [chunk(reads, writes, send, recv, host)]
        return self.staged("Reduce_scatter", operands, chunks, op, count=sum(counts), algorithm=algorithm)

    def reproducible(
        self, key: Hashable, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op
    ) -> Bound | None:
        """A reduction whose bits do not depend on order: chunk by chunk on the host."""
        methods: dict[str, Callable[..., Bound | None]] = {
            "Allreduce": self.all_reduced,
            "Reduce": self.reduced_to,
            "Reduce_scatter_block": self.scattered_evenly,
            "Reduce_scatter": self.scattered,
        }
        return methods[name](*buffers, *arguments, None, True) or super().reproducible(
            key, name, buffers, arguments, op
        )

    def allreduce_view(self, key: Hashable, buf: Any, op: MPI.Op) -> Bound:
        """Allreduce_view is for registered memory, which is the host's."""
        if array_of(buf) is not None:
            raise ArgumentError(f"{self.who('Allreduce_view')}: the array lies on a device: use Allreduce")
        return super().allreduce_view(key, buf, op)

    def inherited(self, name: str, buffers: tuple[Any, ...], root: int | None = None, op: Any = None) -> None:
        """MPI's own collectives take no device memory here."""
        if any(array_of(each) is not None for each in buffers):
            raise ArgumentError(
                f"{self.who(name)}: the array lies on a device: copy it to the host first, x.get() (CuPy) or "
                "x.cpu() (PyTorch)"
            )
        super().inherited(name, buffers, root, op)


def columns(count: int, bytes_each: int) -> list[tuple[int, int]]:
    """[lo, hi) of the chunks of ``count`` columns; one chunk, an empty one, of none."""
    step = max(1, chunk_columns(count, bytes_each))
    return list(pairwise([*range(0, count, step), count])) or [(0, 0)]


def chunk_columns(count: int, bytes_each: int) -> int:
    """Columns of a chunk."""
    return cuda.chunk_bytes(count * bytes_each) // bytes_each


def elementwise(count: int, send: Operand | None, recv: Operand | None, host: Host) -> list[Chunk]:
    """The chunks of a collective whose elements have nothing to do with one another."""
    known = send or recv
    assert known is not None
    return [
        chunk(
            [] if send is None else [send.piece(lo, hi - lo)],
            [] if recv is None else [recv.piece(lo, hi - lo)],
            send,
            recv,
            host,
        )
        for lo, hi in columns(count, known.dtype.itemsize)
    ]


def chunk(reads: list[Piece], writes: list[Piece], send: Operand | None, recv: Operand | None, host: Host) -> Chunk:
    """A chunk whose collective sees arrays; pieces of no bytes are left out."""

    def seen(octets: npt.NDArray[np.uint8], side: Operand | None) -> Any:
        return None if side is None else octets.view(side.dtype)

    def body(incoming: npt.NDArray[np.uint8], outgoing: npt.NDArray[np.uint8]) -> None:
        host(seen(incoming, send), seen(outgoing, recv))

    return Chunk([each for each in reads if each.nbytes], body, [each for each in writes if each.nbytes])
