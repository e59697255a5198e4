"""The planner of calls on arrays on a CUDA device: it compares the ranks' calls and offers them to each transport.

*p ranks; n elements.*  :mod:`hpccomm.backends.device_selection` selects the transport at the first run of a plan; here
each collective describes how every transport would make the call.  Through the host, a call is made in chunks:
element-wise collectives in chunks of elements, collectives with a block per rank in chunks of columns, the same columns
of every block.  A chunk is an ordinary call on the host: the same algorithms, the same shared memory, the same bits.
Calls that cannot be divided are one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.arrays import DeviceArray, StreamBuffer, array_of, bfloat16, convert_like, read_device
from hpccomm.backends import cuda_ipc, device_selection
from hpccomm.backends import nccl as nvidia
from hpccomm.backends.cuda_ipc import PeerCopy, PeerReduce, Phase
from hpccomm.backends.device_selection import Call, DeviceTransports
from hpccomm.calls import operations
from hpccomm.calls.blocks import EQUAL, PARTS
from hpccomm.calls.buffers import Buffer, apply_displacement, read, view_at
from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint
from hpccomm.calls.plans import Plan, Run
from hpccomm.context import Once, algorithm_setting
from hpccomm.errors import ArgumentError, TransportError
from hpccomm.kernels.reductions.reference import code_of, has_kernel
from hpccomm.planner import IN_PLACE, Counts, Planner, is_in_place
from hpccomm.settings import DEVICE_SETTING, ON_HOST
from hpccomm.transports import cuda
from hpccomm.transports.cuda import Chunk, Extent, Staging

Host = Callable[[Any, Any], Any]
"""A collective of host arrays: ``host(send, recv)``."""
COLLECTIVES = {"Allgatherv": "allgather", "Reduce_scatter_block": "reduce_scatter"}
"""The collective whose algorithms a call uses, if its name is another."""


class Operand:
    """A buffer on a device, described as a host buffer; its memory is never accessed through this description."""

    def __init__(self, given: Any, device: cuda.Device, who: str) -> None:
        stream = given.stream if isinstance(given, StreamBuffer) else None
        form = given.buffer if isinstance(given, StreamBuffer) else given
        self.array: DeviceArray = read_device(array_of(given), who, stream)
        check_place(self.array, device, who)
        view = view_at(self.array.address, self.array.size, self.array.dtype)
        view.flags.writeable = self.array.writable
        self.buffer: Buffer = read([view, *form[1:]] if isinstance(form, list | tuple) else view, who)
        if self.buffer.opaque:
            raise ArgumentError(
                f"{who}: derived datatypes are not supported on a device: pass a contiguous array of a numeric dtype"
            )
        self.buffer.order = self.array.order

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its host copies."""
        assert self.buffer.dtype is not None
        if self.buffer.half == "bfloat16":
            return bfloat16("a device's array")
        return np.dtype(self.buffer.half) if self.buffer.half else self.buffer.dtype

    def extent(self, first: int, count: int, at: int = 0) -> Extent:
        """Elements [first, first + count), at element ``at`` of a chunk."""
        width = self.dtype.itemsize
        return Extent(self.buffer.address + first * width, at * width, count * width)

    def columns(self, each: int, ranks: int, lo: int, hi: int) -> list[Extent]:
        """Columns [lo, hi) of all ranks' blocks of ``each`` elements, one after the other in a chunk."""
        return [self.extent(k * each + lo, hi - lo, k * (hi - lo)) for k in range(ranks)]


def check_place(array: DeviceArray, device: cuda.Device, who: str) -> None:
    """Refuse memory that is not on this rank's device."""
    if array.size == 0:
        return
    place = device.find_device(array.address)
    if place is None:
        raise ArgumentError(f"{who}: the array's memory is not on a device, or was freed: pass an array that is alive")
    if place != device.number:
        raise ArgumentError(
            f"{who}: the array lies on device {place}, this rank uses device {device.number}: "
            f"copy it, or select the device before the first call, cupy.cuda.Device({place}).use()"
        )


class DevicePlanner(Planner):
    """A planner of calls with an array on a device."""

    def __init__(self, comm: Any, in_lockstep: bool = False) -> None:
        super().__init__(comm)
        self.in_lockstep = in_lockstep

    @Once
    def staging(self) -> Staging:
        """The transport through the host."""
        device_selection.read_setting(self.context.settings[cuda.TRANSPORT])
        return Staging(cuda.device())

    _transports: DeviceTransports | None = None

    @property
    def transports(self) -> DeviceTransports:
        """All transports (the first use is collective; a ``cached_property`` has a lock that thread-ranks share)."""
        if self._transports is None:
            self._transports = DeviceTransports(self.context, self.staging)
        return self._transports

    def release(self) -> None:
        """Free the transports (collective)."""
        if self._transports:
            self._transports.free()
        self._transports = None

    def operands(self, who: str, *buffers: Any, parts: bool = False) -> list[Operand | None]:
        """The buffers on a device; ``None`` for no buffer and for in place.

        ``parts``: the last buffer has one block per rank, so its displacements belong to the blocks.
        """
        there = [self.uses_device(each) for each in buffers]
        for each, lies in zip(buffers, there, strict=True):
            if not lies and not is_in_place(each):
                raise ArgumentError(
                    f"{who}: one buffer lies on a device, the other, {type(each).__name__}, on the host: "
                    "pass both in the same memory"
                )
        device = self.require_device(who)
        found = [Operand(each, device, who) if lies else None for each, lies in zip(buffers, there, strict=True)]
        for each in found[: len(found) - parts]:
            if each:
                each.buffer = apply_displacement(each.buffer, who)
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
        reproducible: bool = False,
    ) -> Plan:
        """A plan that compares the calls of all ranks, then runs the call by a transport that supports it."""
        here = [each for each in operands if each is not None]
        data, collective = here[-1], COLLECTIVES.get(name, name.lower())
        if algorithm is not None:  # an unknown one is refused before the first message, as on the host
            self.choose(collective, data.buffer, op, algorithm, self.call_label(name))
        ipc, native, nccl = self.eligibility(collective, data, op, algorithm, reproducible)
        offer = Call(
            call.nbytes,
            call.chunks,
            call.phases if ipc else None,
            call.native if native else None,
            call.dense if nccl else None,
        )
        check = self.bind_check(name, data.buffer, op, root, count, "reproducible" if reproducible else algorithm)
        streams = [stream for each in here for stream in each.array.streams]
        owners: list[Any] = [each.array.owner for each in here]
        ready: list[Run] = []

        def run() -> None:
            check()
            if not ready:
                ready.append(self.transports.bind(offer, streams))
            ready[0]()

        def free() -> None:
            owners.clear()
            ready.clear()

        return Plan(run, free)

    def algorithm_name(self, collective: str, algorithm: str | None) -> str:
        """The algorithm named by the caller, the communicator or the environment; empty if none is named."""
        name = algorithm or self.comm.algorithm
        name = name if name != "auto" else algorithm_setting(self.context.settings["HPCCOMM_ALGORITHM"], collective)
        return str(name)

    def eligibility(
        self, collective: str, data: Operand, op: MPI.Op | None, algorithm: str | None, reproducible: bool = False
    ) -> tuple[bool, bool, bool]:
        """Whether CUDA IPC, MPI's own collective and NCCL support a call's dtype, operation and algorithm."""
        name = self.algorithm_name(collective, algorithm)
        if reproducible or name not in ("", "native"):
            return False, False, False
        buffer, code = data.buffer, code_of(data.dtype)
        op_name = "" if op is None else operations.name_of(op)
        plain = not buffer.half and (op is None or (op.is_predefined and not self.why_not_native(buffer, op)))
        kernel = op is None or has_kernel(op_name, data.dtype)
        return not name and kernel, plain, not name and (op is None or nvidia.reduces(op_name, code))

    def bind_check(
        self,
        name: str,
        data: Buffer,
        op: MPI.Op | None = None,
        root: int | None = None,
        count: int | None = None,
        algorithm: str | None = None,
    ) -> Run:
        """A barrier that raises on all ranks if their calls, or the memory of their arrays, differ."""
        fingerprint = Fingerprint(
            name,
            operations.name_in_fingerprint(op) if op is not None else "",
            UNKNOWN if count is None else str(count),
            data.kind,
            "" if root is None else str(root),
            data.order,
            algorithm or "",
            "on a device",
        )
        return self.guard(fingerprint, lambda: None, lockstep=True)

    def operand_of(self, x: Any, name: str, stream: Any) -> Operand:
        """Read one array on a device."""
        if not self.uses_device(x):
            raise ArgumentError(
                f"{self.call_label(name)}: {DEVICE_SETTING}={ON_HOST} is for the methods of Communicator only: "
                "pass a NumPy array of the same memory"
            )
        return Operand(StreamBuffer(x, stream), self.require_device(self.call_label(name)), self.call_label(name))

    def divide(self, x: Any) -> None:
        """Divide an array by the number of ranks, on the device."""
        there, staging = read_device(x, self.call_label("mean")), self.staging
        cuda.wait(staging.device, there.streams)
        staging.device.divide(there.address, there.size, there.dtype, self.size, staging.up)
        staging.device.synchronize(staging.up)

    def call_on_host(self, name: str, x: Any, function: Callable[[Any], Any], stream: Any = None) -> Any:
        """Apply a host function to a copy of a device array, and copy the result to the device."""
        operand = self.operand_of(x, name, stream)
        array, staging = operand.array, self.staging
        if name:
            self.bind_check(name, operand.buffer)()
        copy = np.empty(array.size, array.dtype)
        staging.fetch(array.address, copy.view(np.uint8), array.streams)
        result = np.ascontiguousarray(function(copy.reshape(array.shape, order="F" if array.order == "F" else "C")))
        made = staging.device.allocate_like(x, result.shape, result.dtype)
        there = read_device(made, self.call_label(name))
        staging.store(result.reshape(-1).view(np.uint8), there.address, there.streams)
        return convert_like(made, x)

    # Collectives

    def allreduce(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None, reproducible: bool = False
    ) -> Plan:
        """Allreduce."""
        who = self.call_label("Allreduce")
        operands = self.operands(who, sendbuf, recvbuf)
        send, recv = self.reduction_operands(operands, op, who)
        host = host_call(self.comm.Allreduce, op, algorithm, reproducible)
        n, code, op_name = recv.buffer.elements, code_of(recv.dtype), operations.name_of(op)
        call = Call(
            recv.buffer.nbytes,
            lambda: elementwise_chunks(n, send, recv, host),
            lambda room: plan_reduce(n, send, recv, op_name, room),
            lambda: Planner.allreduce(self, None, send_argument(send, send is recv), recv.buffer, op, "native"),
            lambda nccl: nccl.allreduce(send.buffer.address, recv.buffer.address, n, code, op_name),
        )
        return self.bind_call("Allreduce", operands, call, op, None, n, algorithm, reproducible)

    def reduction_operands(self, operands: list[Operand | None], op: MPI.Op, who: str) -> tuple[Operand, Operand]:
        """The send and the receive operand of a reduction; the same operand twice when in place."""
        first, recv = operands
        if recv is None:
            raise ArgumentError(f"{who}: the receive buffer is None: pass an array")
        send = recv if first is None else first
        self.reduction_buffers(IN_PLACE if first is None else send.buffer, recv.buffer, op, who)
        return send, recv

    def reduce(
        self,
        key: Hashable,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op,
        root: int,
        algorithm: str | None,
        reproducible: bool = False,
    ) -> Plan:
        """Reduce; only the root writes."""
        who, here = self.call_label("Reduce"), self.rank == root
        self.check_root(root, who)
        operands = self.operands(who, sendbuf, recvbuf if here else None)
        if here:
            send, recv = self.reduction_operands(operands, op, who)
        else:
            assert operands[0] is not None
            send = recv = operands[0]
            self.read_operand(send.buffer, op, who)
        into, first = recv if here else None, send_argument(send, here and send is recv)
        host = host_call(self.comm.Reduce, op, root, algorithm, reproducible)
        n, code, op_name = send.buffer.elements, code_of(send.dtype), operations.name_of(op)
        call = Call(
            send.buffer.nbytes,
            lambda: elementwise_chunks(n, send, into, host),
            lambda room: plan_reduce(n, send, into, op_name, room),
            lambda: Planner.reduce(self, None, first, into.buffer if into else None, op, root, "native"),
            lambda nccl: nccl.reduce(send.buffer.address, recv.buffer.address, n, code, op_name, root),
        )
        return self.bind_call("Reduce", operands, call, op, root, n, algorithm, reproducible)

    def bcast(self, key: Hashable, sendbuf: None, buf: Any, root: int, algorithm: str | None) -> Plan:
        """Bcast."""
        who, comm, here = self.call_label("Bcast"), self.comm, self.rank == root
        operands = self.operands(who, buf)
        (data,) = operands
        assert data is not None
        self.check_root(root, who)
        self.read_buffer(data.buffer, who, writable=not here)

        def host(a: Any, b: Any) -> None:
            comm.Bcast(a if here else b, root, algorithm)

        buffer, n = data.buffer, data.buffer.elements
        call = Call(
            buffer.nbytes,
            lambda: elementwise_chunks(n, data if here else None, None if here else data, host),
            lambda room: plan_broadcast(n, data, root, here, room),
            lambda: Planner.bcast(self, None, None, buffer, root, "native"),
            lambda nccl: nccl.bcast(buffer.address, buffer.nbytes, root),
        )
        return self.bind_call("Bcast", operands, call, None, root, n, algorithm)

    def allgather(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Allgather."""
        who, p, me = self.call_label("Allgather"), self.size, self.rank
        operands = self.operands(who, sendbuf, recvbuf)
        send, recv, in_place = self.transfer_operands(operands, who)
        each, width = recv.buffer.block_length(p), recv.dtype.itemsize
        counts, displs = (each,) * p, tuple(each * k for k in range(p))
        self.check_allgather(send.buffer, recv.buffer, EQUAL, who)
        begin, nbytes = me * each if in_place else 0, each * width
        host = host_call(self.comm.Allgather, algorithm)
        call = Call(
            nbytes * p,
            lambda: [
                chunk([send.extent(begin + lo, hi - lo)], recv.columns(each, p, lo, hi), send, recv, host)
                for lo, hi in columns(each, p * width)
            ],
            lambda room: plan_allgather(send, begin, recv, counts, displs, me, room),
            lambda: Planner.allgather(self, None, send_argument(send, in_place), recv.buffer, "native"),
            lambda nccl: nccl.allgather(send.extent(begin, each).address, recv.buffer.address, nbytes),
        )
        return self.bind_call("Allgather", operands, call, count=each * p, algorithm=algorithm)

    def allgatherv(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Allgatherv, in one chunk."""
        who, comm, p, me = self.call_label("Allgatherv"), self.comm, self.size, self.rank
        operands = self.operands(who, sendbuf, recvbuf, parts=True)
        send, recv, in_place = self.transfer_operands(operands, who)
        counts, displs = recv.buffer.blocks(p)
        self.check_allgather(send.buffer, recv.buffer, PARTS, who)
        cuts = np.cumsum([0, *counts]).tolist()
        begin = displs[me] if in_place else 0
        reads = [send.extent(begin, counts[me])]
        writes = [recv.extent(displs[k], counts[k], cuts[k]) for k in range(p)]

        def host(a: Any, b: Any) -> None:
            comm.Allgatherv(a, [b, list(counts)], algorithm)

        call = Call(
            cuts[-1] * recv.dtype.itemsize,
            lambda: [chunk(reads, writes, send, recv, host)],
            lambda room: plan_allgather(send, begin, recv, counts, displs, me, room),
        )
        return self.bind_call("Allgatherv", operands, call, count=sum(counts), algorithm=algorithm)

    def transfer_operands(self, operands: list[Operand | None], who: str) -> tuple[Operand, Operand, bool]:
        """The send and the receive operand (the same operand twice when in place), and whether it is in place."""
        send, recv = operands
        if recv is None:
            raise ArgumentError(f"{who}: the receive buffer is None: pass an array")
        self.read_buffer(recv.buffer, who, writable=True)
        if send is None:
            return recv, recv, True
        self.read_buffer(send.buffer, who)
        return send, recv, False

    def alltoall(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Alltoall."""
        who, p, me = self.call_label("Alltoall"), self.size, self.rank
        operands = self.operands(who, sendbuf, recvbuf)
        send, recv, in_place = self.transfer_operands(operands, who)
        each, width = recv.buffer.block_length(p), recv.dtype.itemsize
        sent, nbytes = send.buffer.block_length(p), each * width
        if sent * send.dtype.itemsize != nbytes or send.dtype != recv.dtype:
            raise ArgumentError(
                f"{who}: sends {sent} {send.buffer.kind} to each rank, receives {each} {recv.buffer.kind}: "
                "make both the same"
            )
        if not in_place:
            self.check_overlap(send.buffer, recv.buffer, who)
        host = host_call(self.comm.Alltoall, algorithm)
        call = Call(
            nbytes * p,
            lambda: [
                chunk(send.columns(each, p, lo, hi), recv.columns(each, p, lo, hi), send, recv, host)
                for lo, hi in columns(each, p * width)
            ],
            lambda room: plan_alltoall(send, recv, each, p, me, room),
            lambda: Planner.alltoall(self, None, send_argument(send, in_place), recv.buffer, "native"),
            None if in_place else lambda nccl: nccl.alltoall(send.buffer.address, recv.buffer.address, nbytes),
        )
        return self.bind_call("Alltoall", operands, call, count=each * p, algorithm=algorithm)

    def reduce_scatter_block(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None, reproducible: bool = False
    ) -> Plan:
        """Reduce_scatter_block."""
        who, p, me = self.call_label("Reduce_scatter_block"), self.size, self.rank
        operands = self.operands(who, sendbuf, recvbuf)
        send, recv, in_place = self.transfer_operands(operands, who)
        for operand in (send, recv):
            self.read_operand(operand.buffer, op, who)
        each, width = recv.buffer.block_length(p) if in_place else recv.buffer.elements, recv.dtype.itemsize
        counts = (each,) * p
        self.check_blocks(send.buffer, recv.buffer, counts, who)
        host = host_call(self.comm.Reduce_scatter_block, op, algorithm, reproducible)
        code, op_name = code_of(recv.dtype), operations.name_of(op)
        source, into = send.buffer.address, recv.buffer.address
        call = Call(
            each * p * width,
            lambda: [
                chunk(send.columns(each, p, lo, hi), [recv.extent(lo, hi - lo)], send, recv, host)
                for lo, hi in columns(each, p * width)
            ],
            lambda room: plan_reduce_scatter(send, recv, counts, me, op_name, room),
            lambda: Planner.reduce_scatter_block(self, None, send_argument(send, in_place), recv.buffer, op, "native"),
            None if in_place else lambda nccl: nccl.reduce_scatter(source, into, each, code, op_name),
        )
        return self.bind_call("Reduce_scatter_block", operands, call, op, None, each * p, algorithm, reproducible)

    def reduce_scatter(
        self,
        key: Hashable,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Counts | None,
        op: MPI.Op,
        algorithm: str | None,
        reproducible: bool = False,
    ) -> Plan:
        """Reduce_scatter, in one chunk."""
        who = self.call_label("Reduce_scatter")
        operands = self.operands(who, sendbuf, recvbuf)
        send, recv, in_place = self.transfer_operands(operands, who)
        for operand in (send, recv):
            self.read_operand(operand.buffer, op, who)
        counts = self.scatter_counts(recvcounts, recv.buffer, in_place, who)
        self.check_blocks(send.buffer, recv.buffer, counts, who)
        host = host_call(self.comm.Reduce_scatter, counts, op, algorithm, reproducible)
        reads, writes = [send.extent(0, sum(counts))], [recv.extent(0, counts[self.rank])]
        op_name = operations.name_of(op)
        call = Call(
            sum(counts) * recv.dtype.itemsize,
            lambda: [chunk(reads, writes, send, recv, host)],
            lambda room: plan_reduce_scatter(send, recv, counts, self.rank, op_name, room),
        )
        return self.bind_call("Reduce_scatter", operands, call, op, None, sum(counts), algorithm, reproducible)

    def bind_reproducible(
        self, key: Hashable, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op
    ) -> Plan | None:
        """Bind a reduction whose bits do not depend on order: chunk by chunk on the host."""
        plan: Plan = getattr(self, name.lower())(None, *buffers, *arguments, None, reproducible=True)
        return plan

    def bind_inherited(
        self, key: Hashable, name: str, buffers: tuple[Any, ...], root: int | None = None, op: Any = None
    ) -> Plan:
        """MPI's own collectives run on host copies; arrays may lie on a device on some ranks only."""
        who = self.call_label(name)
        both = [self.copy_to_host(each, who) for each in buffers]
        into = both[1][1]
        if into and not into.writable:
            raise ArgumentError(f"{who}: the receive array is read-only: pass a writable array")
        inner = super().bind_inherited(None, name, tuple(form for form, _ in both), root, op)

        def run() -> None:
            inner.run()
            if into:
                received = both[1][0][0] if isinstance(both[1][0], list) else both[1][0]
                self.staging.store(received.ravel(into.order).view(np.uint8), into.address, into.streams)

        return Plan(run)

    def copy_to_host(self, form: Any, who: str) -> tuple[Any, DeviceArray | None]:
        """A buffer with a host copy in place of its device array, and that array; a host buffer as it is."""
        if not self.uses_device(form):
            return form, None
        known = Operand(form, self.require_device(who), who).array
        copy = np.empty(known.shape, known.dtype, "F" if known.order == "F" else "C")
        self.staging.fetch(known.address, copy.ravel("K").view(np.uint8), known.streams)
        data = form.buffer if isinstance(form, StreamBuffer) else form
        return [copy, *data[1:]] if isinstance(data, list | tuple) else copy, known

    def apply_to_copies(self, name: str, function: Callable[..., Any], arrays: Sequence[Any], written: int = 0) -> Any:
        """Apply a function of NumPy arrays to arrays that may lie on a device; the result's arrays then do as well.

        The function writes the last ``written`` of the arrays.
        """
        both = [self.copy_to_host(each, self.call_label(name)) for each in arrays]
        result = function(*(copy for copy, _ in both))
        for copy, known in both[len(both) - written :]:
            if known:
                self.staging.store(copy.view(np.uint8), known.address, known.streams)
        like = next(each for each in arrays if array_of(each) is not None)
        if hasattr(result, "_asdict"):
            fields = {field: self.copy_to_device(each, like) for field, each in result._asdict().items()}
            return result._replace(**fields)
        return self.copy_to_device(result, like)

    def copy_to_device(self, x: Any, like: Any) -> Any:
        """Copy an array, or all arrays of a list or tuple, to the device, as arrays of ``like``'s library."""
        if type(x) in (list, tuple):
            return type(x)(self.copy_to_device(each, like) for each in x)
        if not isinstance(x, np.ndarray):
            return x
        made = self.staging.device.empty(x.shape, x.dtype)
        there = read_device(made, self.call_label("result"))
        self.staging.store(np.ascontiguousarray(x).reshape(-1).view(np.uint8), there.address, there.streams)
        return convert_like(made, like)

    def require_device(self, who: str) -> cuda.Device:
        """The device; raises if there is none."""
        try:
            return self.staging.device
        except TransportError as error:
            raise ArgumentError(f"{who}: the array lies on a device: {error}") from None


def host_call(method: Callable[..., None], *arguments: Any) -> Host:
    """A collective of host arrays with the ``arguments`` that follow the buffers."""
    return lambda send, recv: method(send, recv, *arguments)


def send_argument(send: Operand, in_place: bool) -> Any:
    """The send argument of MPI's own collective."""
    return IN_PLACE if in_place else send.buffer


# Phases of CUDA IPC, each of at most ``room`` bytes


def phase_ranges(count: int, bytes_each: int, room: int) -> list[tuple[int, int]]:
    """[lo, hi) of the phases of ``count`` columns; one empty phase if there are none."""
    most = max(1, room // bytes_each)
    step = most - most % cuda_ipc.ALIGNMENT or most
    return list(pairwise([*range(0, count, step), count])) or [(0, 0)]


def plan_reduce(n: int, send: Operand, recv: Operand | None, op: str, room: int) -> list[Phase]:
    """Reduce all vectors, on the ranks that have a receive operand."""
    code, phases = code_of(send.dtype), []
    for lo, hi in phase_ranges(n, send.dtype.itemsize, room):
        extent = send.extent(lo, hi - lo)
        into = recv.extent(lo, hi - lo).address if recv else 0
        phases.append(Phase([extent], [PeerReduce(op, code, 0, extent.nbytes, into)]))
    return phases


def plan_broadcast(n: int, data: Operand, root: int, here: bool, room: int) -> list[Phase]:
    """Copy the root's vector."""
    extents = [data.extent(lo, hi - lo) for lo, hi in phase_ranges(n, data.dtype.itemsize, room)]
    if here:
        return [Phase([extent]) for extent in extents]
    return [Phase([], copies=[PeerCopy(root, 0, extent.nbytes, extent.address)]) for extent in extents]


def plan_allgather(
    send: Operand, begin: int, recv: Operand, counts: Sequence[int], displs: Sequence[int], me: int, room: int
) -> list[Phase]:
    """Copy the blocks of all ranks; this rank's begins at element ``begin`` of ``send``."""
    phases = []
    for lo, hi in phase_ranges(max(counts), recv.dtype.itemsize, room):
        ends = [(min(lo, count), min(hi, count)) for count in counts]
        extents = [recv.extent(displ + a, b - a) for displ, (a, b) in zip(displs, ends, strict=True)]
        copies = [PeerCopy(k, 0, extent.nbytes, extent.address) for k, extent in enumerate(extents)]
        a, b = ends[me]
        phases.append(Phase([send.extent(begin + a, b - a)], copies=copies))
    return phases


def plan_alltoall(send: Operand, recv: Operand, each: int, p: int, me: int, room: int) -> list[Phase]:
    """Copy this rank's block of every rank."""
    phases = []
    for lo, hi in phase_ranges(each, p * recv.dtype.itemsize, room):
        reads, writes = send.columns(each, p, lo, hi), recv.columns(each, p, lo, hi)
        copies = [PeerCopy(k, reads[me].first, extent.nbytes, extent.address) for k, extent in enumerate(writes)]
        phases.append(Phase(reads, copies=copies))
    return phases


def plan_reduce_scatter(
    send: Operand, recv: Operand, counts: Sequence[int], me: int, op: str, room: int
) -> list[Phase]:
    """Reduce this rank's block.  In place, the result overwrites columns that have been read already."""
    first, code = np.cumsum([0, *counts]).tolist(), code_of(recv.dtype)
    phases = []
    for lo, hi in phase_ranges(max(counts), len(counts) * recv.dtype.itemsize, room):
        ends = [(min(lo, count), min(hi, count)) for count in counts]
        reads = [send.extent(first[k] + a, b - a, k * (hi - lo)) for k, (a, b) in enumerate(ends)]
        a, b = ends[me]
        result = recv.extent(a, b - a)
        reduction = PeerReduce(op, code, reads[me].first, result.nbytes, result.address, shared=False)
        phases.append(Phase(reads, [reduction]))
    return phases


# Chunks through the host


def columns(count: int, bytes_each: int) -> list[tuple[int, int]]:
    """[lo, hi) of the chunks of ``count`` columns; one empty chunk if there are none."""
    step = max(1, cuda.chunk_bytes(count * bytes_each) // bytes_each)
    return list(pairwise([*range(0, count, step), count])) or [(0, 0)]


def elementwise_chunks(count: int, send: Operand | None, recv: Operand | None, host: Host) -> list[Chunk]:
    """The chunks of an element-wise collective."""
    known = send or recv
    assert known is not None

    def extents(operand: Operand | None, lo: int, hi: int) -> list[Extent]:
        return [] if operand is None else [operand.extent(lo, hi - lo)]

    return [
        chunk(extents(send, lo, hi), extents(recv, lo, hi), send, recv, host)
        for lo, hi in columns(count, known.dtype.itemsize)
    ]


def chunk(reads: list[Extent], writes: list[Extent], send: Operand | None, recv: Operand | None, host: Host) -> Chunk:
    """A chunk whose collective runs on arrays; empty extents are left out."""

    def view(octets: npt.NDArray[np.uint8], operand: Operand | None) -> Any:
        return None if operand is None else octets.view(operand.dtype)

    def body(incoming: npt.NDArray[np.uint8], outgoing: npt.NDArray[np.uint8]) -> None:
        host(view(incoming, send), view(outgoing, recv))

    return Chunk([each for each in reads if each.nbytes], body, [each for each in writes if each.nbytes])
