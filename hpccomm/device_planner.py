"""The planner of calls on arrays on a CUDA device: it compares the ranks' calls and offers them to each transport.

The reader of the host reads them, from buffers that describe device memory.  :mod:`hpccomm.backends.device_selection`
selects the transport at the first run of a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.arrays import DeviceArray, StreamBuffer, array_of, convert_like, read_device
from hpccomm.backends import device_selection
from hpccomm.backends.device_selection import DeviceTransports
from hpccomm.calls.blocks import SIGNATURES
from hpccomm.calls.buffers import Buffer, read, view_at
from hpccomm.calls.call import Call
from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint
from hpccomm.calls.plans import Plan, Run
from hpccomm.calls.reader import is_in_place
from hpccomm.context import Once
from hpccomm.errors import ArgumentError, TransportError
from hpccomm.planner import Planner
from hpccomm.settings import DEVICE_SETTING, ON_HOST
from hpccomm.transports import cuda
from hpccomm.transports.cuda import Staging

ON_DEVICE = "on a device"
"""The memory that a fingerprint names."""


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
            self._transports = DeviceTransports(self)
        return self._transports

    def release(self) -> None:
        """Free the transports (collective)."""
        if self._transports:
            self._transports.free()
        self._transports = None

    def describe(self, given: Any, who: str) -> Buffer:
        """A buffer on a device, described as if it were the host's; its owner is the :class:`DeviceArray`."""
        device = self.require_device(who)
        stream = given.stream if isinstance(given, StreamBuffer) else None
        form = given.buffer if isinstance(given, StreamBuffer) else given
        array = read_device(array_of(given), who, stream)
        check_place(array, device, who)
        view = view_at(array.address, array.size, array.dtype)
        view.flags.writeable = array.writable
        buffer = read([view, *form[1:]] if isinstance(form, list | tuple) else view, who)
        if buffer.opaque:
            raise ArgumentError(
                f"{who}: derived datatypes are not supported on a device: pass a contiguous array of a numeric dtype"
            )
        buffer.order, buffer.owner = array.order, array
        return buffer

    def describe_both(self, who: str, *buffers: Any) -> list[Any]:
        """The buffers of a call, described; in place and no buffer stay."""
        there = [self.uses_device(each) for each in buffers]
        for each, lies in zip(buffers, there, strict=True):
            if not lies and not is_in_place(each):
                raise ArgumentError(
                    f"{who}: one buffer lies on a device, the other, {type(each).__name__}, on the host: "
                    "pass both in the same memory"
                )
        return [self.describe(each, who) if lies else each for each, lies in zip(buffers, there, strict=True)]

    def bind(
        self, key: Hashable, name: str, sendbuf: Any, recvbuf: Any, *arguments: Any, reproducible: bool = False
    ) -> Plan:
        """A plan that compares the calls of all ranks, then runs the call by a transport that takes it."""
        form, who = SIGNATURES[name], self.reader.call_label(name)
        if not form.family:
            return self.bind_copies(name, sendbuf, recvbuf, *arguments)
        root = dict(zip(form.arguments, arguments, strict=False)).get("root")
        buffers = self.describe_both(who, *self.reader.significant(name, sendbuf, recvbuf, root))
        if is_in_place(buffers[1]) and root in (None, self.rank):
            raise ArgumentError(f"{who}: the receive buffer is None: pass an array")
        call = self.reader.read(name, *buffers, *arguments)
        if call.send.known and call.recv.known and call.send.kind != call.recv.kind:
            raise ArgumentError(f"{who}: sends {call.send.kind}, receives {call.recv.kind}: make both the same")
        call.memory, call.reproducible = ON_DEVICE, reproducible
        if call.algorithm is not None:  # an unknown one is refused before the first message, as on the host
            self.choose(call, self.candidates(call))
        return self.plan_on_device(call)

    def plan_on_device(self, call: Call) -> Plan:
        """A plan that selects the transport when it runs first, which is collective."""
        check = self.bind_check(call.describe("reproducible" if call.reproducible else call.algorithm or ""))
        held, bound = [call], list[Plan]()

        def run() -> None:
            check()
            if not bound:
                bound.append(self.transports.bind(held[0], self.host_algorithm(held[0])))
            bound[0].run()

        def free() -> None:
            held.clear()
            bound.clear()

        return Plan(run, free, lasts=False)

    def host_algorithm(self, call: Call) -> str:
        """What the caller, the communicator or the environment have named for the host; empty if nothing."""
        name = "reproducible" if call.reproducible else call.algorithm or self.comm.algorithm
        return str(name) if name != "auto" else self.setting(call.collective)

    def bind_check(self, fingerprint: Fingerprint) -> Run:
        """A barrier that raises on all ranks if their calls, or the memory of their arrays, differ."""
        return self.guard(fingerprint, lambda: None, lockstep=True)

    def array(self, x: Any, name: str, stream: Any) -> Buffer:
        """Describe one array on a device."""
        who = self.reader.call_label(name)
        if not self.uses_device(x):
            raise ArgumentError(
                f"{who}: {DEVICE_SETTING}={ON_HOST} is for the methods of Communicator only: "
                "pass a NumPy array of the same memory"
            )
        return self.describe(StreamBuffer(x, stream), who)

    def empty_like(self, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new array on the device in C order, of ``x``'s library if that is supported."""
        return self.staging.device.allocate_like(x, shape, dtype)

    def divide(self, x: Any) -> None:
        """Divide an array of float32 or float64 by the number of ranks, on the device."""
        there, staging = read_device(x, self.reader.call_label("mean")), self.staging
        cuda.wait(staging.device, there.streams)
        staging.device.divide(there.address, there.size, there.dtype, self.size, staging.up)
        staging.device.synchronize(staging.up)

    def call_on_host(self, name: str, x: Any, function: Callable[[Any], Any], stream: Any = None) -> Any:
        """Apply a host function to a copy of a device array, and copy the result to the device.

        ``name`` is the collective of the consistency check; an empty name skips the check.
        """
        buffer, staging = self.array(x, name, stream), self.staging
        array: DeviceArray = buffer.owner
        if name:
            self.bind_check(Fingerprint(name, "", UNKNOWN, buffer.kind, "", buffer.order, "", ON_DEVICE))()
        copy = np.empty(array.size, array.dtype)
        staging.fetch(array.address, copy.view(np.uint8), array.streams)
        result = np.ascontiguousarray(function(copy.reshape(array.shape, order="F" if array.order == "F" else "C")))
        made = staging.device.allocate_like(x, result.shape, result.dtype)
        there = read_device(made, self.reader.call_label(name))
        staging.store(result.reshape(-1).view(np.uint8), there.address, there.streams)
        return convert_like(made, x)

    def bind_reproducible(
        self, key: Hashable, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op
    ) -> Plan | None:
        """Bind a reduction whose bits do not depend on order: chunk by chunk on the host."""
        return self.bind(None, name, *buffers, *arguments, None, reproducible=True)

    def bind_copies(self, name: str, sendbuf: Any, recvbuf: Any, *arguments: Any) -> Plan:
        """MPI's own collectives run on host copies; arrays may lie on a device on some ranks only."""
        who = self.reader.call_label(name)
        (send, _), (recv, into) = (self.copy_to_host(each, who) for each in (sendbuf, recvbuf))
        if into and not into.writable:
            raise ArgumentError(f"{who}: the receive array is read-only: pass a writable array")
        inner = super().bind(None, name, send, recv, *arguments)

        def run() -> None:
            inner.run()
            if into:
                received = recv[0] if isinstance(recv, list) else recv
                self.staging.store(received.ravel(into.order).view(np.uint8), into.address, into.streams)

        return Plan(run, lasts=False)

    def copy_to_host(self, form: Any, who: str) -> tuple[Any, DeviceArray | None]:
        """A buffer with a host copy in place of its device array, and that array; a host buffer as it is."""
        if not self.uses_device(form):
            return form, None
        known: DeviceArray = self.describe(form, who).owner
        copy = np.empty(known.shape, known.dtype, "F" if known.order == "F" else "C")
        self.staging.fetch(known.address, copy.ravel("K").view(np.uint8), known.streams)
        data = form.buffer if isinstance(form, StreamBuffer) else form
        return [copy, *data[1:]] if isinstance(data, list | tuple) else copy, known

    def apply_to_copies(self, name: str, function: Callable[..., Any], arrays: Sequence[Any], written: int = 0) -> Any:
        """Apply a function of NumPy arrays to arrays that may lie on a device; the result's arrays then do as well.

        The function writes the last ``written`` of the arrays.
        """
        both = [self.copy_to_host(each, self.reader.call_label(name)) for each in arrays]
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
        there = read_device(made, self.reader.call_label("result"))
        self.staging.store(np.ascontiguousarray(x).reshape(-1).view(np.uint8), there.address, there.streams)
        return convert_like(made, like)

    def require_device(self, who: str) -> cuda.Device:
        """The device; raises if there is none."""
        try:
            return self.staging.device
        except TransportError as error:
            raise ArgumentError(f"{who}: the array lies on a device: {error}") from None
