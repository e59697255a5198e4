"""Calls on arrays that lie on a CUDA device: compared with what the other ranks call, then taken one of several ways.

*p ranks; n elements.*  Which way a call goes is chosen when it runs first (:mod:`hpccomm.backends.device_selection`);
here each
collective says how every way would make it.  Element-wise collectives go in chunks of elements; those that deal in
parts for each rank in chunks of columns, the same columns of every part.  On the host a chunk is a call like any other:
the same algorithms, the same shared memory, the same bits.  What cannot be divided goes in one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.arrays import DeviceArray, bfloat16, convert_like, is_on_device, read_device
from hpccomm.backends import cuda_ipc, device_selection
from hpccomm.backends import nccl as nvidia
from hpccomm.backends.cuda_ipc import Fold, PeerCopy, Phase
from hpccomm.backends.device_selection import Call, DeviceTransports
from hpccomm.calls import operations
from hpccomm.calls.buffers import Message, apply_displacement, read, view_at
from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint
from hpccomm.calls.plans import Plan, Run
from hpccomm.context import algorithm_setting
from hpccomm.errors import ArgumentError, TransportError
from hpccomm.kernels.reductions import reference as reductions
from hpccomm.planner import IN_PLACE, Binder, is_in_place
from hpccomm.transports import cuda
from hpccomm.transports.cuda import Chunk, Extent, Staging

Host = Callable[[Any, Any], Any]
"""A collective of host arrays: ``host(send, recv)``."""


class StreamBuffer:
    """An array, or one of mpi4py's forms, whose work is on a stream that the array does not tell."""

    def __init__(self, given: Any, stream: Any) -> None:
        self.buffer, self.stream = given, stream


def array_of(given: Any) -> Any:
    """The device array in a buffer, be it a form or not; ``None`` for all else."""
    data = given.buffer if isinstance(given, StreamBuffer) else given
    data = data[0] if isinstance(data, list | tuple) and data else data
    return data if is_on_device(data) else None


class Operand:
    """A buffer on a device as the binder understands buffers; its memory is never looked at from here."""

    def __init__(self, given: Any, device: cuda.Device, who: str) -> None:
        stream = given.stream if isinstance(given, StreamBuffer) else None
        form = given.buffer if isinstance(given, StreamBuffer) else given
        self.array: DeviceArray = read_device(array_of(given), who, stream)
        check_place(self.array, device, who)
        view = view_at(self.array.address, self.array.size, self.array.dtype)
        view.flags.writeable = self.array.writable
        self.message: Message = read([view, *form[1:]] if isinstance(form, list | tuple) else view, who)
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

    def extent(self, first: int, count: int, at: int = 0) -> Extent:
        """Elements [first, first + count), at element ``at`` of a chunk."""
        width = self.dtype.itemsize
        return Extent(self.message.address + first * width, at * width, count * width)


def check_place(array: DeviceArray, device: cuda.Device, who: str) -> None:
    """Refuse memory that is no device's, or another device's than this rank's."""
    if array.size == 0:
        return
    place = device.find_device(array.address)
    if place is None:
        raise ArgumentError(f"{who}: the array's memory is not on a device, or was freed: pass an array that lives")
    if place != device.number:
        raise ArgumentError(
            f"{who}: the array lies on device {place}, this rank uses device {device.number}: "
            f"copy it, or select the device before the first call, cupy.cuda.Device({place}).use()"
        )


class DeviceBinder(Binder):
    """A binder that takes arrays on a device, too."""

    @cached_property
    def staging(self) -> Staging:
        """The way through the host."""
        device_selection.read_setting(self.context.settings[cuda.TRANSPORT])
        return Staging(cuda.device())

    _transports: DeviceTransports | None = None

    @property
    def transports(self) -> DeviceTransports:
        """All ways (the first use is collective: no ``cached_property``, whose lock ranks that are threads share)."""
        if self._transports is None:
            self._transports = DeviceTransports(self.context, self.staging)
        return self._transports

    def release(self) -> None:
        """Give back what lies behind calls on a device (collective)."""
        if self._transports:
            self._transports.free()
        self._transports = None

    def uses_device(self, given: Any) -> bool:
        """Whether a buffer lies on a device, and not where rank 0 says that the host can address it (collective)."""
        return array_of(given) is not None and self.context.settings[cuda.TRANSPORT] != cuda.ON_HOST

    def attach_stream(self, stream: Any, *buffers: Any) -> tuple[Any, ...]:
        """The buffers, bound to a stream where they are arrays on a device (collective)."""
        return tuple(StreamBuffer(each, stream) if self.uses_device(each) else each for each in buffers)

    def operands(self, who: str, *buffers: Any, parts: bool = False) -> list[Operand | None] | None:
        """The buffers on a device (``None`` for none and for in place); ``None`` where all are on the host.

        ``parts``: the last one has a part for each rank, that lie where its form says.
        """
        there = [self.uses_device(each) for each in buffers]
        if not any(there):
            return None
        for each, lies in zip(buffers, there, strict=True):
            if not lies and not is_in_place(each):
                raise ArgumentError(
                    f"{who}: one buffer lies on a device, the other, {type(each).__name__}, on the host: "
                    "pass both of one kind"
                )
        device = self.require_device(who)
        found = [Operand(each, device, who) if lies else None for each, lies in zip(buffers, there, strict=True)]
        for each in found[: len(found) - parts]:
            if each:
                each.message = apply_displacement(each.message, who)
        return found

    def bind_call(
        self,
        name: str,
        operands: Sequence[Operand | None],
        call: Call,
        op: MPI.Op | None = None,
        root: int | None = None,
        count: int | None = None,
        algorithm: str | None = None,
    ) -> Plan:
        """A bound call: the calls of all ranks are compared, then it goes the way that was chosen for it."""
        here = [each for each in operands if each is not None]
        meet = self.bind_check(name, here[-1].message if here else None, op, root, count, algorithm)
        streams = [stream for each in here for stream in each.array.streams]
        kept: list[Any] = [each.array.owner for each in here]
        ready: list[Run] = []

        def run() -> None:
            meet()
            if not ready:
                ready.append(self.transports.bind(call, streams))
            ready[0]()

        def free() -> None:
            kept.clear()
            ready.clear()

        return Plan(run, free)

    def algorithm_name(self, collective: str, algorithm: str | None) -> str:
        """The algorithm that is asked for, by the caller, the communicator or the environment; nothing for none."""
        asked = algorithm or self.comm.algorithm
        asked = asked if asked != "auto" else algorithm_setting(self.context.settings["HPCCOMM_ALGORITHM"], collective)
        return str(asked)

    def eligibility(
        self,
        collective: str,
        data: Operand,
        op: MPI.Op | None,
        algorithm: str | None,
        reproducible: bool = False,
    ) -> Eligibility:
        """Which ways can make a call, as far as its dtype, operation and algorithm go."""
        name = self.algorithm_name(collective, algorithm)
        if reproducible or name not in ("", "native"):
            return Eligibility(False, False, False)
        message, code = data.message, reductions.code_of(data.dtype)
        word = "" if op is None else operations.name_of(op)
        plain = not message.half and (op is None or (op.is_predefined and not self.why_not_native(message, op)))
        kernel = op is None or reductions.has_kernel(word, data.dtype)
        return Eligibility(not name and kernel, plain, not name and (op is None or nvidia.reduces(word, code)))

    def bind_check(
        self,
        name: str,
        data: Message | None,
        op: MPI.Op | None = None,
        root: int | None = None,
        count: int | None = None,
        algorithm: str | None = None,
    ) -> Callable[[], None]:
        """A meeting of all ranks that raises on each of them where their calls differ, or the memory they are for."""
        signature = Fingerprint(
            name,
            operations.name_of(op) if op is not None else "",
            UNKNOWN if count is None else str(count),
            UNKNOWN if data is None else data.kind,
            "" if root is None else str(root),
            UNKNOWN if data is None else data.order,
            algorithm or "",
            "on a device",
        )
        return self.guard(signature, lambda: None, lockstep=True)

    def operand_of(self, x: Any, name: str, stream: Any) -> Operand:
        """One array on a device."""
        operands = self.operands(self.call_label(name), StreamBuffer(x, stream))
        if operands is None or operands[0] is None:
            raise ArgumentError(
                f"{self.call_label(name)}: {cuda.TRANSPORT}={cuda.ON_HOST} is for the methods of Communicator: "
                "pass the array's memory as NumPy's"
            )
        return operands[0]

    def divide(self, x: Any) -> None:
        """Divide by the number of ranks, where the array lies."""
        there, staging = read_device(x, self.call_label("mean")), self.staging
        cuda.wait(staging.device, there.streams)
        staging.device.divide(there.address, there.size, there.dtype, self.size, staging.up)
        staging.device.synchronize(staging.up)

    def call_on_host(self, name: str, x: Any, function: Callable[[Any], Any], stream: Any = None) -> Any:
        """What ``function`` makes of the array when it sees it on the host, on the device again."""
        side = self.operand_of(x, name, stream)
        array, staging = side.array, self.staging
        if name:
            self.bind_check(name, side.message)()
        seen = np.empty(array.size, array.dtype)
        staging.fetch(array.address, seen.view(np.uint8), array.streams)
        result = np.ascontiguousarray(function(seen.reshape(array.shape, order="F" if array.order == "F" else "C")))
        made = staging.device.allocate_like(x, result.shape, result.dtype)
        there = read_device(made, self.call_label(name))
        staging.store(result.reshape(-1).view(np.uint8), there.address, there.streams)
        return convert_like(made, x)

    # Collectives

    def allreduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None) -> Plan:
        """Allreduce."""
        return self.device_allreduce(sendbuf, recvbuf, op, algorithm, False) or super().allreduce(
            key, sendbuf, recvbuf, op, algorithm
        )

    def device_allreduce(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None, reproducible: bool
    ) -> Plan | None:
        """Allreduce on a device."""
        who = self.call_label("Allreduce")
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return None
        send, recv = self.reduction_operands(operands, op, who)
        comm = self.comm
        self.check_algorithm("allreduce", recv, op, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Allreduce(a, b, op, algorithm, reproducible)

        n, fits, in_place = (
            recv.message.elements,
            self.eligibility("allreduce", recv, op, algorithm, reproducible),
            send is recv,
        )
        code, word = reductions.code_of(recv.dtype), operations.name_of(op)
        call = Call(
            recv.message.nbytes,
            lambda: elementwise_chunks(n, send, recv, host),
            fits.kernel(lambda room: plan_reduce(n, send, recv, word, room)),
            fits.native(
                lambda: Binder.allreduce(self, None, send_argument(send, in_place), recv.message, op, "native")
            ),
            fits.dense(lambda nccl: nccl.allreduce(send.message.address, recv.message.address, n, code, word)),
        )
        return self.bind_call(
            "Allreduce", operands, call, op, count=n, algorithm=algorithm_label(algorithm, reproducible)
        )

    def reduction_operands(self, operands: list[Operand | None], op: MPI.Op, who: str) -> tuple[Operand, Operand]:
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

    def reduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str | None) -> Plan:
        """Reduce."""
        return self.device_reduce(sendbuf, recvbuf, op, root, algorithm, False) or super().reduce(
            key, sendbuf, recvbuf, op, root, algorithm
        )

    def device_reduce(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str | None, reproducible: bool
    ) -> Plan | None:
        """Reduce on a device; ranks other than the root write nothing."""
        who, comm = self.call_label("Reduce"), self.comm
        self.check_root(root, who)
        operands = self.operands(who, sendbuf, recvbuf if self.rank == root else None)
        if operands is None:
            return None
        if self.rank == root:
            send, recv = self.reduction_operands(operands, op, who)
        else:
            assert operands[0] is not None
            send = recv = operands[0]
            self.operand(send.message, op, who)
        self.check_algorithm("reduce", send, op, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Reduce(a, b, op, root, algorithm, reproducible)

        here = self.rank == root
        into = recv if here else None
        n, fits, first = (
            send.message.elements,
            self.eligibility("reduce", send, op, algorithm, reproducible),
            send_argument(send, here and send is recv),
        )
        code, word = reductions.code_of(send.dtype), operations.name_of(op)
        call = Call(
            send.message.nbytes,
            lambda: elementwise_chunks(n, send, into, host),
            fits.kernel(lambda room: plan_reduce(n, send, into, word, room)),
            fits.native(lambda: Binder.reduce(self, None, first, recv.message if here else None, op, root, "native")),
            fits.dense(lambda nccl: nccl.reduce(send.message.address, recv.message.address, n, code, word, root)),
        )
        return self.bind_call("Reduce", operands, call, op, root, n, algorithm_label(algorithm, reproducible))

    def bcast(self, key: Hashable, buf: Any, root: int, algorithm: str | None) -> Plan:
        """Bcast."""
        who, comm = self.call_label("Bcast"), self.comm
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

        message, n, fits = data.message, data.message.elements, self.eligibility("bcast", data, None, algorithm)
        call = Call(
            message.nbytes,
            lambda: elementwise_chunks(n, data if here else None, None if here else data, host),
            fits.kernel(lambda room: plan_broadcast(n, data, root, here, room)),
            fits.native(lambda: Binder.bcast(self, None, message, root, "native")),
            fits.dense(lambda nccl: nccl.bcast(message.address, message.nbytes, root)),
        )
        return self.bind_call("Bcast", operands, call, None, root, n, algorithm)

    def allgather(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Allgather."""
        who, comm, p = self.call_label("Allgather"), self.comm, self.size
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return super().allgather(key, sendbuf, recvbuf, algorithm)
        first, recv = self.transfer_operands(operands, who)
        each = recv.message.block_length(p)
        counts, displs = (each,) * p, tuple(each * k for k in range(p))
        send = recv if first is None else first
        self.check_allgather(send.message, recv.message, counts, displs, first is None, who)
        self.check_algorithm("allgather", recv, None, algorithm, who)
        begin = self.rank * each if first is None else 0

        def host(a: Any, b: Any) -> None:
            comm.Allgather(a, b, algorithm)

        def chunks() -> list[Chunk]:
            return [
                chunk(
                    [send.extent(begin + lo, hi - lo)],
                    [recv.extent(k * each + lo, hi - lo, k * (hi - lo)) for k in range(p)],
                    send,
                    recv,
                    host,
                )
                for lo, hi in columns(each, p * recv.dtype.itemsize)
            ]

        fits, nbytes = self.eligibility("allgather", recv, None, algorithm), each * recv.dtype.itemsize
        call = Call(
            nbytes * p,
            chunks,
            fits.kernel(lambda room: plan_allgather(send, begin, recv, counts, displs, self.rank, room)),
            fits.native(
                lambda: Binder.allgather(self, None, send_argument(send, first is None), recv.message, "native")
            ),
            fits.dense(lambda nccl: nccl.allgather(send.extent(begin, each).address, recv.message.address, nbytes)),
        )
        return self.bind_call("Allgather", operands, call, count=each * p, algorithm=algorithm)

    def allgatherv(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Allgatherv, in one chunk."""
        who, comm, p, me = self.call_label("Allgatherv"), self.comm, self.size, self.rank
        operands = self.operands(who, sendbuf, recvbuf, parts=True)
        if operands is None:
            return super().allgatherv(key, sendbuf, recvbuf, algorithm)
        first, recv = self.transfer_operands(operands, who)
        counts, displs = recv.message.blocks(p)
        if len(counts) != p:
            raise ArgumentError(f"{who}: {len(counts)} counts for {p} ranks: pass one a rank")
        send = recv if first is None else first
        self.check_allgather(send.message, recv.message, counts, displs, first is None, who)
        self.check_algorithm("allgather", recv, None, algorithm, who)
        cuts = np.cumsum([0, *counts]).tolist()
        begin = displs[me] if first is None else 0
        reads = [send.extent(begin, counts[me])]
        writes = [recv.extent(displs[k], counts[k], cuts[k]) for k in range(p)]

        def host(a: Any, b: Any) -> None:
            comm.Allgatherv(a, [b, list(counts)], algorithm)

        fits = self.eligibility("allgather", recv, None, algorithm)
        call = Call(
            cuts[-1] * recv.dtype.itemsize,
            lambda: [chunk(reads, writes, send, recv, host)],
            fits.kernel(lambda room: plan_allgather(send, begin, recv, counts, displs, me, room)),
        )
        return self.bind_call("Allgatherv", operands, call, count=sum(counts), algorithm=algorithm)

    def transfer_operands(self, operands: list[Operand | None], who: str) -> tuple[Operand | None, Operand]:
        """What is sent (``None`` in place) and what is received into."""
        send, recv = operands
        if recv is None:
            raise ArgumentError(f"{who}: the buffer to receive into is None: pass an array")
        self.buffer(recv.message, who, writable=True)
        if send is not None:
            self.buffer(send.message, who)
        return send, recv

    def alltoall(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Alltoall."""
        who, comm, p = self.call_label("Alltoall"), self.comm, self.size
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return super().alltoall(key, sendbuf, recvbuf, algorithm)
        first, recv = self.transfer_operands(operands, who)
        send = recv if first is None else first
        each = recv.message.block_length(p)
        if send.message.block_length(p) * send.dtype.itemsize != each * recv.dtype.itemsize or send.dtype != recv.dtype:
            raise ArgumentError(
                f"{who}: sends {send.message.block_length(p)} {send.message.kind} to each rank, receives {each} "
                f"{recv.message.kind}: make them agree"
            )
        if first is not None:
            self.check_overlap(send.message, recv.message, who)
        self.check_algorithm("alltoall", recv, None, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Alltoall(a, b, algorithm)

        def pieces(side: Operand, lo: int, hi: int) -> list[Extent]:
            return [side.extent(k * each + lo, hi - lo, k * (hi - lo)) for k in range(p)]

        def chunks() -> list[Chunk]:
            return [
                chunk(pieces(send, lo, hi), pieces(recv, lo, hi), send, recv, host)
                for lo, hi in columns(each, p * recv.dtype.itemsize)
            ]

        fits, nbytes = self.eligibility("alltoall", recv, None, algorithm), each * recv.dtype.itemsize
        call = Call(
            nbytes * p,
            chunks,
            fits.kernel(lambda room: plan_alltoall(send, recv, each, p, self.rank, room)),
            fits.native(
                lambda: Binder.alltoall(self, None, send_argument(send, first is None), recv.message, "native")
            ),
            fits.dense_out_of_place(
                first is not None,
                lambda nccl: nccl.alltoall(send.message.address, recv.message.address, nbytes),
            ),
        )
        return self.bind_call("Alltoall", operands, call, count=each * p, algorithm=algorithm)

    def reduce_scatter_block(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None
    ) -> Plan:
        """Reduce_scatter_block."""
        return self.device_reduce_scatter_block(sendbuf, recvbuf, op, algorithm, False) or super().reduce_scatter_block(
            key, sendbuf, recvbuf, op, algorithm
        )

    def device_reduce_scatter_block(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None, reproducible: bool
    ) -> Plan | None:
        """Reduce_scatter_block on a device."""
        who, comm, p = self.call_label("Reduce_scatter_block"), self.comm, self.size
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return None
        first, recv = self.transfer_operands(operands, who)
        send = recv if first is None else first
        for each in (send, recv):
            self.operand(each.message, op, who)
        part = recv.message.block_length(p) if first is None else recv.message.elements
        self.check_blocks(send.message, recv.message, (part,) * p, first is None, who)
        self.check_algorithm("reduce_scatter", recv, op, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Reduce_scatter_block(a, b, op, algorithm, reproducible)

        def chunks() -> list[Chunk]:
            return [
                chunk(
                    [send.extent(k * part + lo, hi - lo, k * (hi - lo)) for k in range(p)],
                    [recv.extent(lo, hi - lo)],
                    send,
                    recv,
                    host,
                )
                for lo, hi in columns(part, p * recv.dtype.itemsize)
            ]

        fits, in_place = self.eligibility("reduce_scatter", recv, op, algorithm, reproducible), first is None
        code, word = reductions.code_of(recv.dtype), operations.name_of(op)
        call = Call(
            part * p * recv.dtype.itemsize,
            chunks,
            fits.kernel(lambda room: plan_reduce_scatter(send, recv, (part,) * p, self.rank, word, room)),
            fits.native(
                lambda: Binder.reduce_scatter_block(
                    self, None, send_argument(send, in_place), recv.message, op, "native"
                )
            ),
            fits.dense_out_of_place(
                not in_place,
                lambda nccl: nccl.reduce_scatter(send.message.address, recv.message.address, part, code, word),
            ),
        )
        said = algorithm_label(algorithm, reproducible)
        return self.bind_call("Reduce_scatter_block", operands, call, op, count=part * p, algorithm=said)

    def reduce_scatter_v(
        self,
        key: Hashable,
        sendbuf: Any,
        recvbuf: Any,
        told: tuple[int, ...] | None,
        op: MPI.Op,
        algorithm: str | None,
    ) -> Plan:
        """Reduce_scatter, in one chunk."""
        return self.device_reduce_scatter(sendbuf, recvbuf, told, op, algorithm, False) or super().reduce_scatter_v(
            key, sendbuf, recvbuf, told, op, algorithm
        )

    def device_reduce_scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        told: tuple[int, ...] | None,
        op: MPI.Op,
        algorithm: str | None,
        reproducible: bool,
    ) -> Plan | None:
        """Reduce_scatter on a device."""
        who, comm = self.call_label("Reduce_scatter"), self.comm
        operands = self.operands(who, sendbuf, recvbuf)
        if operands is None:
            return None
        first, recv = self.transfer_operands(operands, who)
        send = recv if first is None else first
        for each in (send, recv):
            self.operand(each.message, op, who)
        if told is None and first is None:
            raise ArgumentError(f"{who}: in place it cannot know who gets how much: pass recvcounts")
        counts = self.context.counts(recv.message.elements) if told is None else told
        self.check_blocks(send.message, recv.message, counts, first is None, who)
        self.check_algorithm("reduce_scatter", recv, op, algorithm, who)

        def host(a: Any, b: Any) -> None:
            comm.Reduce_scatter(a, b, counts, op, algorithm, reproducible)

        reads, writes = [send.extent(0, sum(counts))], [recv.extent(0, counts[self.rank])]
        fits, word = self.eligibility("reduce_scatter", recv, op, algorithm, reproducible), operations.name_of(op)
        call = Call(
            sum(counts) * recv.dtype.itemsize,
            lambda: [chunk(reads, writes, send, recv, host)],
            fits.kernel(lambda room: plan_reduce_scatter(send, recv, counts, self.rank, word, room)),
        )
        said = algorithm_label(algorithm, reproducible)
        return self.bind_call("Reduce_scatter", operands, call, op, count=sum(counts), algorithm=said)

    def bind_reproducible(
        self, key: Hashable, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op
    ) -> Plan | None:
        """A reduction whose bits do not depend on order: chunk by chunk on the host."""
        methods: dict[str, Callable[..., Plan | None]] = {
            "Allreduce": self.device_allreduce,
            "Reduce": self.device_reduce,
            "Reduce_scatter_block": self.device_reduce_scatter_block,
            "Reduce_scatter": self.device_reduce_scatter,
        }
        return methods[name](*buffers, *arguments, None, True) or super().bind_reproducible(
            key, name, buffers, arguments, op
        )

    def allreduce_view(self, key: Hashable, buf: Any, op: MPI.Op) -> Plan:
        """Allreduce_view is for registered memory, which is the host's."""
        if self.uses_device(buf):
            raise ArgumentError(f"{self.call_label('Allreduce_view')}: the array lies on a device: use Allreduce")
        return super().allreduce_view(key, buf, op)

    def bind_inherited(
        self, key: Hashable, name: str, buffers: tuple[Any, ...], root: int | None = None, op: Any = None
    ) -> Plan:
        """MPI's own collectives see copies on the host; a rank may have its arrays here, another there."""
        if not any(self.uses_device(each) for each in buffers):
            return super().bind_inherited(key, name, buffers, root, op)
        who = self.call_label(name)
        both = [self.copy_to_host(each, who) for each in buffers]
        into = both[1][1]
        if into and not into.writable:
            raise ArgumentError(f"{who}: the array to receive into is read-only: pass one that can be written")
        inner = super().bind_inherited(None, name, tuple(form for form, _ in both), root, op)

        def run() -> None:
            inner.run()
            if into:
                received = both[1][0][0] if isinstance(both[1][0], list) else both[1][0]
                self.staging.store(received.ravel(into.order).view(np.uint8), into.address, into.streams)

        return Plan(run)

    def copy_to_host(self, form: Any, who: str) -> tuple[Any, DeviceArray | None]:
        """A buffer with a copy on the host in place of its array, and that array; else the buffer as it is."""
        if not self.uses_device(form):
            return form, None
        known = Operand(form, self.require_device(who), who).array
        copy = np.empty(known.shape, known.dtype, "F" if known.order == "F" else "C")
        self.staging.fetch(known.address, copy.ravel("K").view(np.uint8), known.streams)
        data = form.buffer if isinstance(form, StreamBuffer) else form
        return [copy, *data[1:]] if isinstance(data, list | tuple) else copy, known

    def apply_to_copies(self, name: str, function: Callable[..., Any], arrays: Sequence[Any], written: int = 0) -> Any:
        """What a function of NumPy arrays makes of arrays that may lie on a device: then its answer's arrays do, too.

        It writes the last ``written`` of them.
        """
        if not any(self.uses_device(each) for each in arrays):
            return function(*arrays)
        both = [self.copy_to_host(each, self.call_label(name)) for each in arrays]
        answer = function(*(copy for copy, _ in both))
        for copy, known in both[len(both) - written :]:
            if known:
                self.staging.store(copy.view(np.uint8), known.address, known.streams)
        like = next(each for each in arrays if array_of(each) is not None)
        if hasattr(answer, "_asdict"):
            fields = {field: self.copy_to_device(each, like) for field, each in answer._asdict().items()}
            return answer._replace(**fields)
        return self.copy_to_device(answer, like)

    def copy_to_device(self, x: Any, like: Any) -> Any:
        """An array, or all those in a list or a tuple, on the device, as ``like``'s library has them."""
        if type(x) in (list, tuple):
            return type(x)(self.copy_to_device(each, like) for each in x)
        if not isinstance(x, np.ndarray):
            return x
        made = self.staging.device.empty(x.shape, x.dtype)
        there = read_device(made, self.call_label("result"))
        self.staging.store(np.ascontiguousarray(x).reshape(-1).view(np.uint8), there.address, there.streams)
        return convert_like(made, like)

    def require_device(self, who: str) -> cuda.Device:
        """The device; raises where there is none."""
        try:
            return self.staging.device
        except TransportError as error:
            raise ArgumentError(f"{who}: the array lies on a device: {error}") from None


class Eligibility(NamedTuple):
    """Whether a call's dtype, operation and algorithm suit a way; each method leaves out what does not suit."""

    has_kernel: bool
    is_plain: bool
    is_dense: bool

    def kernel(self, turns: Callable[[int], Sequence[Phase]]) -> Callable[[int], Sequence[Phase]] | None:
        """For ranks that read each other's memory."""
        return turns if self.has_kernel else None

    def native(self, native: Callable[[], Plan]) -> Callable[[], Plan] | None:
        """For MPI's own collective."""
        return native if self.is_plain else None

    def dense(self, body: Callable[[nvidia.Nccl], None]) -> Callable[[nvidia.Nccl], None] | None:
        """For NCCL."""
        return body if self.is_dense else None

    def dense_out_of_place(
        self, holds: bool, body: Callable[[nvidia.Nccl], None]
    ) -> Callable[[nvidia.Nccl], None] | None:
        """For NCCL, which has it with two buffers only."""
        return body if self.is_dense and holds else None


def algorithm_label(algorithm: str | None, reproducible: bool) -> str | None:
    """What ranks must say alike beside the call itself."""
    return "reproducible" if reproducible else algorithm


def send_argument(send: Operand, in_place: bool) -> Any:
    """What MPI is told to send."""
    return IN_PLACE if in_place else send.message


# In turns, each of so many bytes at most


def cut(count: int, bytes_each: int, room: int) -> list[tuple[int, int]]:
    """[lo, hi) of the turns of ``count`` columns; one turn, an empty one, of none."""
    most = max(1, room // bytes_each)
    step = most - most % cuda_ipc.ALIGNMENT or most
    return list(pairwise([*range(0, count, step), count])) or [(0, 0)]


def plan_reduce(n: int, send: Operand, recv: Operand | None, op: str, room: int) -> list[Phase]:
    """All vectors reduced, wherever there is something to receive into."""
    code, turns = reductions.code_of(send.dtype), []
    for lo, hi in cut(n, send.dtype.itemsize, room):
        piece = send.extent(lo, hi - lo)
        into = recv.extent(lo, hi - lo).address if recv else 0
        turns.append(Phase([piece], [Fold(op, code, 0, piece.nbytes, into)]))
    return turns


def plan_broadcast(n: int, data: Operand, root: int, here: bool, room: int) -> list[Phase]:
    """The root's vector."""
    pieces = [data.extent(lo, hi - lo) for lo, hi in cut(n, data.dtype.itemsize, room)]
    if here:
        return [Phase([piece]) for piece in pieces]
    return [Phase([], takes=[PeerCopy(root, 0, piece.nbytes, piece.address)]) for piece in pieces]


def plan_allgather(
    send: Operand, begin: int, recv: Operand, counts: Sequence[int], displs: Sequence[int], me: int, room: int
) -> list[Phase]:
    """Everybody's part; this rank's begins at an element of ``send``."""
    turns = []
    for lo, hi in cut(max(counts), recv.dtype.itemsize, room):
        ends = [(min(lo, count), min(hi, count)) for count in counts]
        pieces = [recv.extent(displ + a, b - a) for displ, (a, b) in zip(displs, ends, strict=True)]
        takes = [PeerCopy(k, 0, piece.nbytes, piece.address) for k, piece in enumerate(pieces)]
        a, b = ends[me]
        turns.append(Phase([send.extent(begin + a, b - a)], takes=takes))
    return turns


def plan_alltoall(send: Operand, recv: Operand, each: int, p: int, me: int, room: int) -> list[Phase]:
    """A part from everybody for everybody."""
    turns = []
    for lo, hi in cut(each, p * recv.dtype.itemsize, room):
        reads = [send.extent(k * each + lo, hi - lo, k * (hi - lo)) for k in range(p)]
        into = [recv.extent(k * each + lo, hi - lo) for k in range(p)]
        takes = [PeerCopy(k, reads[me].first, piece.nbytes, piece.address) for k, piece in enumerate(into)]
        turns.append(Phase(reads, takes=takes))
    return turns


def plan_reduce_scatter(
    send: Operand, recv: Operand, counts: Sequence[int], me: int, op: str, room: int
) -> list[Phase]:
    """A part of the sum each.  In place the result is written over columns that have been read already."""
    first, code = np.cumsum([0, *counts]).tolist(), reductions.code_of(recv.dtype)
    turns = []
    for lo, hi in cut(max(counts), len(counts) * recv.dtype.itemsize, room):
        ends = [(min(lo, count), min(hi, count)) for count in counts]
        reads = [send.extent(first[k] + a, b - a, k * (hi - lo)) for k, (a, b) in enumerate(ends)]
        a, b = ends[me]
        into = recv.extent(a, b - a)
        turns.append(Phase(reads, [Fold(op, code, reads[me].first, into.nbytes, into.address, shared=False)]))
    return turns


# In chunks


def columns(count: int, bytes_each: int) -> list[tuple[int, int]]:
    """[lo, hi) of the chunks of ``count`` columns; one chunk, an empty one, of none."""
    step = max(1, chunk_columns(count, bytes_each))
    return list(pairwise([*range(0, count, step), count])) or [(0, 0)]


def chunk_columns(count: int, bytes_each: int) -> int:
    """Columns of a chunk."""
    return cuda.chunk_bytes(count * bytes_each) // bytes_each


def elementwise_chunks(count: int, send: Operand | None, recv: Operand | None, host: Host) -> list[Chunk]:
    """The chunks of a collective whose elements have nothing to do with one another."""
    known = send or recv
    assert known is not None
    return [
        chunk(
            [] if send is None else [send.extent(lo, hi - lo)],
            [] if recv is None else [recv.extent(lo, hi - lo)],
            send,
            recv,
            host,
        )
        for lo, hi in columns(count, known.dtype.itemsize)
    ]


def chunk(reads: list[Extent], writes: list[Extent], send: Operand | None, recv: Operand | None, host: Host) -> Chunk:
    """A chunk whose collective sees arrays; pieces of no bytes are left out."""

    def seen(octets: npt.NDArray[np.uint8], side: Operand | None) -> Any:
        return None if side is None else octets.view(side.dtype)

    def body(incoming: npt.NDArray[np.uint8], outgoing: npt.NDArray[np.uint8]) -> None:
        host(seen(incoming, send), seen(outgoing, recv))

    return Chunk([each for each in reads if each.nbytes], body, [each for each in writes if each.nbytes])
