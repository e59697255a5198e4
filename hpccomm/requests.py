"""Requests: non-blocking collectives of ours, and persistent ones of MPI.

A non-blocking call is run by a progress thread (:mod:`hpccomm.progress`) as the blocking call of the same name, with
the same checks, algorithms and errors.  Its request is a generalized request of MPI, so it may be completed by MPI's
own ``Waitall``, ``Testany`` and so on, together with requests of messages; its own ``Wait`` sleeps, and raises the
call's error.  Where no thread may call MPI, it is MPI's own request, and the ranks' calls are compared without waiting.

Persistent collectives are MPI's own requests; the ranks compare their calls when they make one.  MPI matches persistent
calls at ``*_init``, so the requests may be started in any order, also by ``MPI.Prequest.Startall``.  A start compares
nothing.
"""

from __future__ import annotations

import inspect
import re
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial, wraps
from typing import Any, Literal

import numpy as np
from mpi4py import MPI

from hpccomm.arrays import is_on_device
from hpccomm.calls import operations
from hpccomm.calls.blocks import PARTS, SIGNATURES, total_bytes
from hpccomm.calls.buffers import Buffer, pad_last, read_integers
from hpccomm.calls.call import Call
from hpccomm.calls.entry import FREED
from hpccomm.calls.fingerprint import IN_PLACE, Fingerprint
from hpccomm.calls.reader import Reader, is_in_place
from hpccomm.errors import ArgumentError, HpccommError
from hpccomm.observe.flight_recorder import count_bytes
from hpccomm.progress import Call as IssuedCall
from hpccomm.progress import has_thread, submit
from hpccomm.transports.polling import pause

SEND, RECV, BUF = "sendbuf", "recvbuf", "buf"

COMPARED: dict[str, tuple[str, ...]] = {
    "Allgather": (RECV,),
    "Allgatherv": (RECV,),
    "Allreduce": (SEND, RECV),
    "Alltoall": (RECV,),
    "Alltoallv": (),
    "Alltoallw": (),
    "Barrier": (),
    "Bcast": (BUF,),
    "Exscan": (SEND, RECV),
    "Gather": (SEND,),
    "Gatherv": (),
    "Reduce": (SEND, RECV),
    "Reduce_scatter": (SEND, RECV),
    "Reduce_scatter_block": (SEND, RECV),
    "Scan": (SEND, RECV),
    "Scatter": (RECV,),
    "Scatterv": (),
}
"""MPI's persistent collectives: the first of these buffers that is an array has the same length on all ranks."""

TEST_SECONDS, EAGER_SECONDS, AWAKE_SECONDS = 5e-5, 1e-3, 1e-2
"""How long a ``Test`` sleeps, so that the progress thread gets the interpreter; and how long a rank polls one of MPI's
requests before the recorder notes it, and before it sleeps between two polls."""


class CollectiveRequest(MPI.Grequest):
    """The request of a non-blocking collective, which a progress thread completes."""

    call: IssuedCall
    raises = True
    """Whether MPI's own ``Waitall`` and so on raise if the call has failed."""

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Sleep until the call is complete; raises the call's error."""
        self.call.sleep()
        return self._complete(status)

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Whether the call is complete; raises the call's error."""
        return self.call.sleep(TEST_SECONDS) and self._complete(status)

    def _complete(self, status: MPI.Status | None) -> Literal[True]:
        error, self.raises = self.call.error, False
        MPI.Request.Wait(self, status)
        if error is not None:
            raise error
        return True

    def wait(self, status: MPI.Status | None = None) -> None:
        """As :meth:`Wait`."""
        self.Wait(status)

    def test(self, status: MPI.Status | None = None) -> tuple[bool, None]:
        """As :meth:`Test`."""
        return self.Test(status), None

    def Cancel(self) -> None:
        """Raise: other ranks take part in the call."""
        raise ArgumentError(f"{self.call.text}: a collective call cannot be cancelled: complete it with Wait or Test")

    def Free(self) -> None:
        """Free the request of a complete call; MPI allows no other."""
        if not self.call.done():
            raise ArgumentError(f"{self.call.text}: the request is not complete: complete it with Wait or Test")
        super().Free()


def begin_request(call: IssuedCall) -> CollectiveRequest:
    """A request that is complete when the call is."""

    def query(status: MPI.Status) -> None:
        status.Set_elements(MPI.BYTE, 0)
        status.Set_cancelled(False)
        request = known()
        if call.error is not None and (request is None or request.raises):
            raise MPI.Exception(MPI.ERR_OTHER)

    handle = MPI.Grequest.Start(query, None, None)
    request = CollectiveRequest(handle)
    request.call, known = call, weakref.ref(request)
    call.requests = (request, handle)
    return request


def start_beside(name: str, blocking: Callable[..., None]) -> Callable[..., MPI.Request]:
    """The non-blocking method for the ``blocking`` method ``name`` of a communicator."""
    form, native = inspect.signature(blocking), getattr(MPI.Intracomm, f"I{name.lower()}")

    def method(self: Any, *args: Any, **named: Any) -> MPI.Request:
        given = form.bind(self, *args, **named)
        given.apply_defaults()
        _, *arguments = given.arguments.items()
        if self == MPI.COMM_NULL:
            raise ArgumentError(FREED)
        if has_thread():
            return start_ours(self, name, dict(arguments), blocking)
        return start_native(self, name, dict(arguments), native)

    method.__name__ = f"I{name.lower()}"
    method.__qualname__ = f"Communicator.{method.__name__}"
    method.__doc__ = (
        f"""Start :meth:`{name}` and return its request; the buffers must not be used before it is complete."""
    )
    method.__signature__ = form  # type: ignore[attr-defined]
    return method


def start_ours(comm: Any, name: str, given: dict[str, Any], blocking: Callable[..., None]) -> MPI.Request:
    """Check the call and let a progress thread make it; a call on a device's arrays is complete at once."""
    spelling = f"I{name.lower()}"
    if given.get("stream") is not None or any(map(is_on_device, list_arrays(given))):
        at_once = partial(blocking, **given)
        return submit(comm, at_once, Fingerprint(spelling), begin_request, here=True)  # type: ignore[no-any-return]
    fingerprint, _ = read_call(comm, name, given, spelling)
    copies: list[MPI.Datatype] = []
    frozen = {key: freeze(value, copies, key in (SEND, RECV, BUF)) for key, value in given.items()}

    def function(channel: Any) -> None:
        try:
            blocking(channel, **frozen)
        except HpccommError as error:
            raise type(error)(respell(str(error))).with_traceback(error.__traceback__) from None
        finally:
            for each in copies:
                each.Free()

    nbytes = count_bytes([*list_arrays(given)])
    return submit(comm, function, fingerprint, begin_request, nbytes=nbytes)  # type: ignore[no-any-return]


def list_arrays(given: dict[str, Any]) -> Iterable[Any]:
    """The arrays of a call's buffers."""
    for key in (SEND, RECV, BUF):
        value = given.get(key)
        yield value[0] if isinstance(value, list | tuple) and value else value


def freeze(value: Any, copies: list[MPI.Datatype], is_data: bool = True) -> Any:
    """An argument that later changes of its lists and datatypes do not reach; data is not copied.

    Datatypes of the user's own are duplicated and appended to ``copies``: the user may free them at once.
    """
    if isinstance(value, list | tuple):
        members = [freeze(each, copies, is_data and number == 0) for number, each in enumerate(value)]
        return members if isinstance(value, list) else tuple(members)
    if isinstance(value, np.ndarray) and not is_data:
        return value.tolist()  # a list of counts: a tuple would be counts and displacements
    if isinstance(value, MPI.Datatype) and value != MPI.DATATYPE_NULL and not value.is_predefined:
        copies.append(value.Dup())
        return copies[-1]
    return value


def respell(sentence: str) -> str:
    """An error of a blocking call as that of the non-blocking one."""
    return BLOCKING_NAMES.sub(lambda found: f"I{found[0].lower()}", sentence)


BLOCKING_NAMES = re.compile(rf"\b({'|'.join(COMPARED)})\b(?=[(:])")
"""Where an error names a call."""


# MPI's own requests


class ComparedRequest(MPI.Request):
    """A non-blocking request of MPI; while it waits, the ranks' calls are compared."""

    compare: Callable[[bool], None]
    record: Callable[[], Any]
    buffers: tuple[Any, ...]
    """The arguments, which stay alive until the request does not."""

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Wait for the call; raises if another rank has made another one."""
        try:
            wait_on_record(self, status, partial(self.compare, True))
        finally:
            self.compare(False)
        return True

    def wait(self, status: MPI.Status | None = None) -> None:
        """As :meth:`Wait`."""
        self.Wait(status)


def wait_on_record(request: Any, status: MPI.Status | None, look: Callable[[], None] = lambda: None) -> None:
    """Wait for one of MPI's requests, and ``look`` between two polls; a long wait is one of the recorder's calls."""
    began = time.monotonic()
    while not MPI.Request.Test(request, status):
        look()
        pause(began, EAGER_SECONDS, 32)
        if time.monotonic() - began > EAGER_SECONDS:
            break
    else:
        return
    with request.record():
        while not MPI.Request.Test(request, status):
            look()
            pause(began, AWAKE_SECONDS, 32)  # MPI moves a part of a long message in each poll


def start_native(comm: Any, name: str, given: dict[str, Any], native: Callable[..., MPI.Request]) -> MPI.Request:
    """Let MPI make the call; it is compared with those of the ranks that have already made theirs."""
    spelling = f"I{name.lower()}"
    refuse_own_arguments(comm, spelling, given, "without a progress thread a non-blocking call")
    fingerprint, arguments = read_call(comm, name, given, spelling, for_mpi=True)
    compare = compare_quietly(comm, fingerprint)
    request = ComparedRequest(native(comm, *arguments.values()))
    request.compare, request.buffers = compare, tuple(given.values())
    request.record = partial(comm.context.call, spelling, *list_arrays(given), inside=True)
    return request


class PersistentRequest(MPI.Prequest):
    """A persistent request of MPI; a rank that waits in it for one that does not start its own is reported."""

    record: Callable[[], Any]
    buffers: tuple[Any, ...]
    """The arguments, which stay alive until the request does not."""

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Wait for the call."""
        wait_on_record(self, status)
        return True

    def wait(self, status: MPI.Status | None = None) -> None:
        """As :meth:`Wait`."""
        self.Wait(status)


def compare_quietly(comm: Any, fingerprint: Fingerprint) -> Callable[[bool], None]:
    """Compare a call with those of the ranks of this node that have made theirs; returns the function that goes on.

    It does so until the next call, and takes whether this rank waits.
    """
    table = comm._context.consistency if comm._context else None
    if table is None:
        return lambda waits: None
    with table.entered:  # ranks of other nodes are not waited for
        table.begin(table.announce(fingerprint))
        number = table.active_seq

    def compare(waits: bool) -> None:
        with suppress(ValueError):  # the communicator has been freed
            table.watch_request(number, waits)

    return compare


def compare_at_init(name: str) -> Callable[..., MPI.Prequest]:
    """The method ``<name>_init`` of a communicator."""
    native = getattr(MPI.Intracomm, f"{name}_init")
    form = inspect.signature(native)

    @wraps(native)
    def method(self: Any, *args: Any, algorithm: str | None = None, **named: Any) -> MPI.Prequest:
        given = form.bind(self, *args, **named)
        given.apply_defaults()
        _, *arguments = given.arguments.items()
        return make_request(self, name, native, {**dict(arguments), "algorithm": algorithm})

    return method


def make_request(comm: Any, name: str, native: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Check the call, compare it with those of the other ranks, and let MPI make the request."""
    made: list[MPI.Prequest] = []
    with comm.context.call(f"{name}_init"):
        refuse_own_arguments(comm, f"{name}_init", given, "a persistent call")
        fingerprint, arguments = read_call(comm, name, given, f"{name}_init", for_mpi=True)
        comm._planner.guard(fingerprint, lambda: made.append(native(comm, *arguments.values())), True)()
    request = PersistentRequest(made[0])
    request.buffers = (made[0], *given.values())
    request.record = partial(comm.context.call, f"{name}_init", *list_arrays(given), inside=True)
    return request


def refuse_own_arguments(comm: Any, spelling: str, given: dict[str, Any], subject: str) -> None:
    """Take the arguments that MPI does not know out of a call; refuse those that ask for something."""
    who, algorithm = f"rank {comm.rank}: {spelling}", given.pop("algorithm", None)
    if algorithm not in (None, "auto", "native"):
        raise ArgumentError(
            f"{who}: {subject} is MPI's own request and cannot run algorithm={algorithm!r}: leave the "
            "algorithm out, or make the blocking call"
        )
    for key in ("reproducible", "stream"):
        if given.pop(key, None):
            raise ArgumentError(f"{who}: {subject} is MPI's own request and takes no {key}: make the blocking call")


def read_call(
    comm: Any, name: str, given: dict[str, Any], spelling: str, for_mpi: bool = False
) -> tuple[Fingerprint, dict[str, Any]]:
    """Check the arguments of a call; returns its fingerprint, and with ``for_mpi`` its arguments as MPI takes them."""
    planner, who = comm._planner, f"rank {comm.rank}: {spelling}"
    arguments, buffers = dict(given), {}
    op: Any = given.get("op")
    root: Any = given.get("root")
    if "op" in given:
        arguments["op"] = op = operations.read_op(op, who) if for_mpi else operations.resolve(op, who).op
    if "root" in given:
        arguments["root"] = root = planner.reader.check_root(root, who)
    if given.get("recvcounts") is not None:
        arguments["recvcounts"] = read_integers(given["recvcounts"], "recvcounts", who)
    form = SIGNATURES[name]
    ignored = {RECV: form.recv_at_root, SEND: form.send_at_root}
    for key in (SEND, RECV, BUF):
        if key not in given or name == "Alltoallw":
            continue
        if ignored.get(key) and root != comm.rank:
            buffers[key] = Buffer(None)
            continue
        read, parts = read_for_mpi if for_mpi else read_for_thread, (form.send if key == SEND else form.recv) == PARTS
        buffers[key] = read(planner, given[key], op, who, parts)
        arguments[key] = buffers[key].raw
    if for_mpi and name != "Barrier":
        check_as_blocking(planner.reader, name, {**given, **{key: arguments[key] for key in form.arguments}}, who)
    compared = [(key, buffers[key]) for key in COMPARED[name]]
    place = IN_PLACE if name.startswith("Alltoall") and is_in_place(given[SEND]) else ""
    return describe(name, spelling, compared, comm.size, op, root, place), arguments


def check_as_blocking(reader: Reader, name: str, given: dict[str, Any], who: str) -> None:
    """Refuse what the blocking call refuses: MPI's own requests read and write beyond short buffers."""
    form = SIGNATURES[name]
    buffers = reader.significant(name, given.get(SEND), given.get(RECV, given.get(BUF)), given.get("root"))
    try:
        reader.read(name, *buffers, *(given[each] for each in form.arguments), None)
    except ArgumentError as error:
        raise ArgumentError(str(error).replace(reader.call_label(name), who, 1)) from None


def read_for_mpi(planner: Any, given: Any, op: MPI.Op | None, who: str, parts: bool) -> Buffer:
    """Read and check a buffer, which belongs to MPI's library while the call runs."""
    if planner.uses_device(given):
        raise ArgumentError(f"{who}: MPI's own requests cannot take an array on a device: pass a copy on the host")
    buffer: Buffer = planner.reader.read_buffer(given, who, parts=parts)
    if op is not None and buffer.half:
        raise ArgumentError(f"{who}: MPI cannot reduce {buffer.kind}: cast to float32 before the call")
    if op is not None and buffer.dtype is not None:
        operations.check_defined(op, buffer.dtype, who)
    return buffer


def read_for_thread(planner: Any, given: Any, op: MPI.Op | None, who: str, parts: bool) -> Buffer:
    """Read a buffer of ours; the progress thread makes all other checks."""
    if given is None or given is MPI.IN_PLACE:
        return Buffer(given)
    padded = pad_last(given)
    whole = padded[0] if padded else given
    reader: Reader = planner.reader
    return reader.read_buffer(whole, who, parts=parts) if op is None else reader.read_operand(whole, op, who)


def describe(
    name: str,
    spelling: str,
    buffers: list[tuple[str, Buffer]],
    size: int,
    op: MPI.Op | None,
    root: int | None,
    place: str,
) -> Fingerprint:
    """The call as the other ranks see it."""
    key, data = next((each for each in buffers if not is_in_place(each[1].raw)), (BUF, Buffer(None)))
    kind = SIGNATURES[name].blocks_of(int(key != SEND), in_place=key not in COMPARED[name][:1])
    call = Call(name, "", 0, size, data, data, op, root, data=data if buffers else None)
    dtype = data.dtype or data.base
    call.count = None if dtype is None else str(total_bytes(data, kind, size) // dtype.itemsize)
    return call.describe("")._replace(collective=spelling, place=place)
