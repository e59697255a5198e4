"""A communicator with mpi4py's interface whose collectives are checked and run by the fastest available algorithm.

A collective reads its buffers, checks them, selects an algorithm, binds the call to a plan, and runs the plan.  The
next call with the same buffers, operation and algorithm finds the plan in a cache.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.calls import operations
from hpccomm.calls.blocks import NONE, OBJECT_SIGNATURES, SIGNATURES
from hpccomm.calls.bounce_buffers import BounceBuffers
from hpccomm.calls.buffers import hold, pad_last, read_integers
from hpccomm.calls.consistency import error_reports
from hpccomm.calls.entry import FREED, Doors, Key, refuse
from hpccomm.calls.fingerprint import Fingerprint
from hpccomm.calls.makers import MAKERS, describe_making
from hpccomm.calls.plans import KEPT as KEPT_BUFFERS
from hpccomm.calls.plans import Plan, call_key
from hpccomm.calls.reader import is_in_place
from hpccomm.calls.watchdog import FLUSH_SECONDS, find_world_ranks, list_waiting, watch_making
from hpccomm.context import Context, Once, PlanCache, context_of, unwrap
from hpccomm.errors import ArgumentError, HpccommError, LaunchError
from hpccomm.kernels.entry.records import MISS, NATIVE_IN_PLACE, NOT_MINE
from hpccomm.layout import Layout
from hpccomm.named_reductions import run_named
from hpccomm.observe import timeline
from hpccomm.observe.flight_recorder import library_folders
from hpccomm.performance.machine import Machine
from hpccomm.performance.tuning import Choice
from hpccomm.pickled import compare_objects, install
from hpccomm.planner import Planner
from hpccomm.progress import Queue, get_ready
from hpccomm.requests import COMPARED, compare_at_init, start_beside

if TYPE_CHECKING:
    from hpccomm.collectives.compressed import messages, onebit, sparse
    from hpccomm.device_planner import DevicePlanner

IN_PLACE = MPI.IN_PLACE
PICKLES = ("mpi4py", "auto")


def keep_ours(native: Callable[..., Any]) -> Callable[..., Any]:
    """A method of mpi4py that makes a communicator; the communicator is then one of ours."""
    name = native.__name__
    begin = compare_making if name in MAKERS else watch_group

    @wraps(native)
    def method(self: Communicator | Intercomm, *args: Any, **named: Any) -> Any:
        with begin(self, name, args, named):
            return adopt(native(self, *args, **named), self)

    return method


@contextmanager
def compare_making(comm: Any, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Iterator[None]:
    """Compare a maker that all ranks call, and record it, so that the watchdog reports which of them are missing.

    Create_intercomm also waits for the other group, as long as it must: only its comparison is recorded.
    """
    context: Context | None = getattr(comm, "_context", None)
    if context is not None:
        with context.call(name, inside=True):
            context.compare_making(name, partial(describe_making, comm, name, args, named))
            if name != "Create_intercomm":
                yield
                return
    yield


def watch_group(comm: Any, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> AbstractContextManager[Any]:
    """Let the watchdog report which ranks of a group are missing in Create_group; others wait as long as they must."""
    group = args[0] if args else named.get("group")
    if name == "Create_group" and isinstance(group, MPI.Group) and group:
        return watch_making(find_world_ranks(group), group.rank, name)
    return nullcontext()


def adopt(made: Any, parent: Communicator | Intercomm) -> Any:
    """A communicator that mpi4py has made from ``parent``, as ours and with the same settings.

    mpi4py makes a duplicate by ``type(parent).__new__`` without arguments, all others with its own classes.  Those get
    the parent's class if they have no topology, without a call of a subclass's own constructor.
    """
    if isinstance(made, tuple):  # with the request of a non-blocking call, before whose end there can be no context
        return (keep_settings(made[0], parent), *made[1:])
    made = keep_settings(made, parent)
    if isinstance(made, Communicator) and made != MPI.COMM_NULL:
        made._context = context_of(made)
    return made


def keep_settings(made: Any, parent: Communicator | Intercomm) -> Any:
    """A communicator that mpi4py has made from ``parent``, as ours and with the same settings, without a context."""
    if made == MPI.COMM_NULL:
        return made
    if not isinstance(made, Communicator | Intercomm):
        ours = OURS[type(made)]
        same = ours is Communicator and isinstance(parent, Communicator) and type(parent) not in OURS.values()
        made = ours.__new__(type(parent) if same else ours, made)
    made._algorithm, made._pickle = parent._algorithm, parent._pickle
    install(made)
    return made


class Communicator(MPI.Intracomm):
    """``MPI.Intracomm`` with our collectives: ``Communicator(MPI.COMM_WORLD)``.

    ``algorithm`` (``"auto"``) is the default algorithm of all calls that it can take.  A communicator shares the MPI
    handle of the communicator from which it is made.  Making one is collective.
    With ``pickle="auto"``, on all ranks, ``allreduce``, ``allgather`` and ``bcast`` send long NumPy arrays as they lie
    in memory (:mod:`hpccomm.pickled`).  Communicators made from it keep both settings; one with a topology is also an
    ``MPI.Cartcomm``, ``MPI.Graphcomm`` or ``MPI.Distgraphcomm``, whose neighbourhood collectives are MPI's.
    """

    _algorithm: str
    _pickle: str
    _context: Context | None = None
    plans: PlanCache
    """The plans of this communicator, and its compiled entry."""
    _doors: Doors
    _bounce_buffers: BounceBuffers
    _planner: Planner
    _levels: dict[str, Communicator]
    _level_of: tuple[Context, str] | None = None
    """The context that frees this communicator, and its name there."""

    def __new__(
        cls, comm: MPI.Intracomm | None = None, algorithm: str = "auto", *, pickle: str = "mpi4py"
    ) -> Communicator:
        if comm:
            check_world()
        kind = OURS[type(unwrap(comm))] if cls is Communicator and isinstance(comm, MPI.Topocomm) else cls
        self: Communicator = MPI.Intracomm.__new__(kind, comm)  # Python allows no other in a class with two bases
        if pickle not in PICKLES:
            raise ArgumentError(f"Communicator: pickle={pickle!r} is not known: use one of {', '.join(PICKLES)}")
        self._algorithm, self._pickle = algorithm, pickle
        if comm is not None:
            install(self)
        self.plans = PlanCache()
        self._doors = self.plans.doors
        self._bounce_buffers = BounceBuffers()
        self._planner = Planner(self)
        self._levels = {}
        if comm is not None and comm != MPI.COMM_NULL:
            install_abort_hook()
            self._context = context_of(self)
            get_ready()
        return self

    def __init__(self, *args: Any, **named: Any) -> None:  # a subclass may have other arguments
        if self._context is not None and self._context.layout.count > 1:
            self._context.level("intra")

    @property
    def algorithm(self) -> str:
        """The algorithm of calls that name none."""
        return self._algorithm

    @algorithm.setter
    def algorithm(self, name: str) -> None:
        self._algorithm = name
        self.plans.forget()

    # Properties of the communicator

    @property
    def context(self) -> Context:
        """What the collectives use: private communicator, layout, settings, shared memory."""
        if self._queue is not None:
            self._queue.let_pass()
        if self._context is None:
            if self == MPI.COMM_NULL:
                raise ArgumentError(FREED)
            self._context = context_of(self)
        return self._context

    @property
    def _own_context(self) -> Context:
        """The context, also while calls are under way."""
        return self._context or self.context

    @property
    def _queue(self) -> Queue | None:
        """The calls of progress threads, if there have been any."""
        return self._context.queue if self._context else None

    @staticmethod
    def _make_channel(private: MPI.Intracomm, algorithm: str) -> Communicator:
        """The communicator on which a progress thread makes the calls of another one."""
        channel = Communicator.__new__(Communicator, private, algorithm)
        channel._planner.in_lockstep = True
        return channel

    @Once
    def _device_planner(self) -> DevicePlanner:
        """The planner of calls with arrays on a device."""
        from hpccomm.device_planner import DevicePlanner

        return DevicePlanner(self, self._planner.in_lockstep)

    def _planner_of(self, *buffers: Any) -> Planner:
        """The planner of calls with these buffers."""
        return self._device_planner if any(map(self._planner.uses_device, buffers)) else self._planner

    def _prepare(self, name: str) -> None:
        """Set up what the first collective needs, which is ``name``, and let the compiled entry take later ones."""
        context = self.context
        if context.stage == 0:
            context.prepare(name)
        if self.plans.stage != context.stage:
            self._planner.open_doors()

    @property
    def private_comm(self) -> MPI.Intracomm:
        """The communicator of our own messages, which never meet the user's."""
        return self.context.private_comm

    @property
    def layout(self) -> Layout:
        """Which ranks share a node."""
        return self._own_context.layout

    @property
    def machine(self) -> Machine:
        """Latencies and bandwidths of messages inside a node and between nodes, by the tuning table."""
        return self.context.table.machine

    @property
    def intra_node(self) -> Communicator:
        """The ranks of this node.

        Its first use is collective if MPI has made this communicator from another one, or if it is a level itself.
        """
        return self._level("intra")

    @property
    def inter_node(self) -> Communicator:
        """The ranks with the same local rank on their nodes; collective as :attr:`intra_node` is."""
        return self._level("inter")

    def _level(self, name: str) -> Communicator:
        if self._levels.get(name, MPI.COMM_NULL) == MPI.COMM_NULL:
            level: Communicator = adopt(self.context.level(name), self)
            level._level_of = (self.context, name)
            self._levels[name] = level
        return self._levels[name]

    @Once
    def message_gather(self) -> messages.MessageGather:
        """The gather of variable-length messages on this communicator."""
        from hpccomm.collectives.compressed import messages

        return messages.MessageGather(self)

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """Valid values of ``algorithm=`` for ``"allreduce"``, ``"bcast"``, …."""
        return self._planner.names(collective)

    def explain(self, collective: str, nbytes: int, dtype: str = "f4") -> Choice:
        """The algorithm selected for a call of ``nbytes`` bytes, and the reason."""
        names = self._planner.names(collective)[1:]
        return self._planner.decide(collective, nbytes, dtype, names, f"rank {self.rank}: {collective}")

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = "f4") -> npt.NDArray[Any]:
        """An array in memory that all ranks of the node share: an Allreduce in place needs no copy (collective).

        Shape and dtype must be the same on all ranks.  The memory is released with the array.  Where the ranks do not
        share memory, the array is an ordinary one.
        """
        with self.context.call("empty"):
            self._prepare("empty")
            self._planner.use_code()
            shared, made = self._planner.shared_memory, list[npt.NDArray[Any]]()
            if shared is None:
                return np.empty(shape, dtype)
            self.context.run_together(Fingerprint("empty"), lambda: made.append(shared.empty(shape, dtype)))
            return made[0]

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = "f4") -> npt.NDArray[Any]:
        """An array as from :meth:`empty`, filled with zeros (collective)."""
        made = self.empty(shape, dtype)
        made[...] = 0
        return made

    def register(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A copy of ``x`` in registered memory, to be used in place of ``x`` (collective)."""
        made = self.empty(x.shape, x.dtype)
        made[...] = x
        return made

    def device_transports(self) -> dict[str, str]:
        """Each transport for arrays on a CUDA device: ``yes``, or ``no`` and the reason (the first use is collective).

        Raises TransportError on all ranks if ``HPCCOMM_GPU_TRANSPORT`` names a transport that does not work.
        """
        self.context.check_open("device_transports")
        return self._device_planner.transports.describe()

    @classmethod
    def Create_from_group(cls, *args: Any, **named: Any) -> Communicator:
        """A communicator of a group, without a parent."""
        return cls(MPI.Intracomm.Create_from_group(*args, **named))

    def Free(self) -> None:
        """Free the communicator and its context (collective)."""
        self._release()
        super().Free()
        self._doors.close(refuse)

    def Disconnect(self) -> None:
        """Complete all pending messages, then free as :meth:`Free` does (collective)."""
        self._release()
        super().Disconnect()
        self._doors.close(refuse)

    def _release(self) -> None:
        if self._queue is not None:
            self._queue.close()
        self._levels.clear()
        if self._level_of:
            context, name = self._level_of
            context.levels[name] = MPI.Intracomm(MPI.COMM_NULL)
        if "_device_planner" in vars(self):
            self._device_planner.release()
        self.plans.close()
        self._context = None

    # Calls that the compiled entry has not taken

    def _run_uncached(
        self, code: int, name: str, buffers: tuple[Any, ...], rest: tuple[Any, ...], stream: Any = None
    ) -> None:
        """Run a call that its door has left with ``code``: by a plan for its memory, bounce buffers or a new plan.

        ``rest`` are the arguments of its signature, and at last the algorithm.
        """
        if stream is not None:
            buffers = self._planner.attach_stream(stream, *buffers)
        with self.context.call(name, *buffers) as recorded:
            self._prepare(name)
            kind, (sendbuf, recvbuf) = self._read_kind(code), buffers
            marks = tuple(operations.key_of(each) if isinstance(each, MPI.Op) else each for each in rest)
            read = kind if kind and (kind.layout or not SIGNATURES[name].varies) else None  # else without its blocks
            key = read or (None if None in rest[:-1] else call_key(name, *buffers, *marks))
            bound = self._find_plan(key)
            if bound is None:
                padded, held = [pad_last(each) for each in buffers], (hold(sendbuf), hold(recvbuf))
                if any(padded):
                    return run_padded(partial(self._repeat, name), buffers, padded, rest)
                if key is None and not (held[0] is sendbuf and held[1] is recvbuf):
                    return self._repeat(name, *held, *rest)
                root = dict(zip(SIGNATURES[name].arguments, rest, strict=False)).get("root")
                _, into = self._planner.reader.significant(name, sendbuf, recvbuf, root)
                again = partial(self._repeat, name)
                if key is not None and self._bounce_buffers.run((name, *marks), again, sendbuf, into, rest):
                    return None
                bound = self._planner_of(sendbuf, into).bind(key, name, sendbuf, recvbuf, *rest)
            if kind and bound.row:  # the door takes later calls of this kind
                self.plans.entry.insert(kind, bound.row, bound.text)  # type: ignore[union-attr]
            recorded.describe(bound.text)
            try:
                return bound.run()
            except BaseException:
                KEPT_BUFFERS.extend(buffers if bound.pends else ())
                raise
            finally:
                if key is None:
                    bound.free()

    def _repeat(self, name: str, sendbuf: Any, recvbuf: Any, *rest: Any) -> None:
        """Make a call on other buffers."""
        form = SIGNATURES[name]
        buffers = (recvbuf,) if form.send == NONE else (sendbuf, recvbuf)
        getattr(self, name)(*buffers, *(rest if form.family else rest[:-1]))

    def _go_on(
        self,
        code: int,
        name: str,
        buffers: tuple[Any, Any],
        arguments: tuple[Any, ...] = (),
        algorithm: str | None = None,
        stream: Any = None,
        reproducible: bool = False,
    ) -> None:
        """Go on with a call that its door has answered with ``code``; ``arguments`` are those of its signature."""
        form = SIGNATURES[name]
        if code < NOT_MINE:
            self.plans.entry.resume(code)  # type: ignore[union-attr]
            return None
        if code > MISS:
            given = [each for each, blocks in zip(buffers, form[:2], strict=True) if blocks != NONE]
            return self._run_native(code, name, *given, *arguments)
        self._own_context.check_open(name)
        who, named = f"rank {self.rank}: {name}", dict(zip(form.arguments, arguments, strict=True))
        if "root" in named:
            named["root"] = self._planner.reader.check_root(named["root"], who)
        if form.family and "op" in named:
            return self._run_reduction(code, name, buffers, named, algorithm, reproducible, stream)
        if not form.family:
            if "op" in named:
                named["op"] = operations.read_op(named["op"], who)
            buffers = self._planner.reader.significant(name, *buffers, named.get("root"))
        return self._run_uncached(code, name, buffers, (*named.values(), algorithm), stream)

    def _run_reduction(
        self,
        code: int,
        name: str,
        buffers: tuple[Any, ...],
        arguments: dict[str, Any],
        algorithm: str | None,
        reproducible: bool,
        stream: Any,
    ) -> None:
        """Run a reduction that its door has answered with ``code``; ``arguments`` are those of its signature."""
        op, counts = arguments["op"], arguments.get("recvcounts")
        if stream is not None:
            buffers = self._planner.attach_stream(stream, *buffers)
        if counts is not None:
            arguments["recvcounts"] = read_integers(counts, "recvcounts", f"rank {self.rank}: {name}")
        if type(op) is not MPI.Op:
            arguments |= {"algorithm": algorithm, "reproducible": reproducible}
            return run_named(self, name, arguments.pop("op"), *buffers, **arguments)
        values = tuple(arguments.values())
        if reproducible and self._run_reproducible(name, buffers, values, op):
            return None
        return self._run_uncached(code, name, buffers, (*values, algorithm))

    def _read_kind(self, code: int) -> Key | None:
        """What the door has read of the call that it has answered with ``code``, if it takes such calls once bound."""
        entry = self.plans.entry
        if entry is None:
            return None
        entry.check_interrupted()
        return entry.key() if code == MISS else None

    def _run_native(self, code: int, name: str, *arguments: Any) -> None:
        """Make a call on messages whose door has returned ``code``; the ranks' calls are compared."""
        entry = self.plans.entry
        if code & NATIVE_IN_PLACE:
            arguments = (IN_PLACE, *arguments[1:])
        entry.run_native(code, NATIVE_CALLS[name], self, *arguments)  # type: ignore[union-attr]

    def _run_reproducible(self, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op) -> bool:
        """Run a reduction whose bits do not depend on order; ``False`` if the ordinary reduction already has that."""
        rest = [each for each in arguments if each is not op]
        read = buffers[:1] if name == "Reduce" and self.rank != arguments[-1] else buffers
        with self.context.call(name, *buffers, inside=True):
            self._prepare(name)
            key = None if None in rest else call_key(name, *buffers, "reproducible", operations.key_of(op), *rest)
            bound = self._find_plan(key) or self._planner_of(*read).bind_reproducible(key, name, buffers, arguments, op)
            if bound is None:
                return False
            try:
                bound.run()
            finally:
                if key is None:
                    bound.free()
        return True

    def _find_plan(self, key: Hashable) -> Plan | None:
        """The plan of an earlier call on the same memory."""
        return self.plans.plans.get(key) if key is not None else None

    # Collectives

    def Allreduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op | str = MPI.SUM,
        algorithm: str | None = None,
        reproducible: bool = False,
        stream: Any = None,
    ) -> None:
        """Reduce over all ranks; every rank receives the result.

        Buffers are those of mpi4py; ``algorithm`` is one of :meth:`algorithms`.  ``reproducible=True``: the bits of a
        sum of floats depend on the summands alone, not on order, placement, algorithm or number of ranks
        (:mod:`hpccomm.kernels.reproducible`); the call takes several times as long.  Both arrays may lie on a CUDA
        device; ``stream`` then names a stream with pending work on them that the arrays do not declare themselves (a
        CUDA handle, or a stream of CuPy or PyTorch), here as in the other collectives.
        """
        code = self._doors.allreduce(sendbuf, recvbuf, op, None, algorithm, stream or reproducible or None)
        if code is not None:
            self._go_on(code, "Allreduce", (sendbuf, recvbuf), (op,), algorithm, stream, reproducible)

    def Allreduce_view(self, buf: npt.NDArray[Any], op: MPI.Op | str = MPI.SUM) -> npt.NDArray[Any]:
        """Reduce registered arrays over all ranks into one result that the ranks of a node share.

        The ranks write p times fewer bytes than in :meth:`Allreduce`.  Returns a read-only array like ``buf``, which
        is valid until the next such call on ``buf``.
        """
        with self.context.call("Allreduce_view", buf) as recorded:
            self._prepare("Allreduce_view")
            op = operations.read_op(op, f"rank {self.rank}: Allreduce_view")
            key = self._planner.view_key(buf, op)
            bound = self._find_plan(key) or self._planner.allreduce_view(key, buf, op)
            recorded.describe(bound.text)
            bound.run()
        result: npt.NDArray[Any] = bound.result
        return result

    def Reduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op | str = MPI.SUM,
        root: int = 0,
        algorithm: str | None = None,
        reproducible: bool = False,
        stream: Any = None,
    ) -> None:
        """Reduce over all ranks; ``root`` receives the result, other ranks ignore ``recvbuf``."""
        code = self._doors.reduce(sendbuf, recvbuf, op, root, algorithm, stream or reproducible or None)
        if code is not None:
            self._go_on(code, "Reduce", (sendbuf, recvbuf), (op, root), algorithm, stream, reproducible)

    def Reduce_scatter_block(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op | str = MPI.SUM,
        algorithm: str | None = None,
        reproducible: bool = False,
        stream: Any = None,
    ) -> None:
        """Reduce over all ranks; each rank receives an equal block of the result."""
        code = self._doors.reduce_scatter_block(sendbuf, recvbuf, op, None, algorithm, stream or reproducible or None)
        if code is not None:
            self._go_on(code, "Reduce_scatter_block", (sendbuf, recvbuf), (op,), algorithm, stream, reproducible)

    def Reduce_scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Any = None,
        op: MPI.Op | str = MPI.SUM,
        algorithm: str | None = None,
        reproducible: bool = False,
        stream: Any = None,
    ) -> None:
        """Reduce over all ranks; rank r receives ``recvcounts[r]`` elements of the result.

        Without ``recvcounts`` the ranks exchange the lengths of their receive buffers.  ``algorithm="hierarchical"``
        reduces inside the nodes first (Zhang et al., VLDB 2022).
        """
        if recvcounts is None:
            recvcounts = self._counts(sendbuf, recvbuf)
        extra = stream or reproducible or None
        code = self._doors.reduce_scatter(sendbuf, recvbuf, op, recvcounts, algorithm, extra)
        if code is not None:
            self._go_on(code, "Reduce_scatter", (sendbuf, recvbuf), (recvcounts, op), algorithm, stream, reproducible)

    def _counts(self, sendbuf: Any, recvbuf: Any) -> tuple[int, ...] | None:
        """The receive counts of all ranks, if ``recvbuf`` is a NumPy array; otherwise binding determines them."""
        if type(recvbuf) is not np.ndarray or sendbuf is recvbuf or is_in_place(sendbuf):
            return None
        return self.context.exchange_counts(recvbuf.size)

    def Allgather(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None, stream: Any = None) -> None:
        """Gather blocks of equal length from all ranks, in rank order, on every rank.

        ``algorithm="hierarchical"`` gathers between nodes and in the shared memory of each (Zhang et al., VLDB 2022).
        """
        code = self._doors.allgather(sendbuf, recvbuf, None, None, algorithm, stream)
        if code is not None:
            self._go_on(code, "Allgather", (sendbuf, recvbuf), (), algorithm, stream)

    def Allgatherv(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None, stream: Any = None) -> None:
        """Gather blocks of any length from all ranks, in rank order, on every rank."""
        code = self._doors.allgatherv(sendbuf, recvbuf, None, None, algorithm, stream)
        if code is not None:
            self._go_on(code, "Allgatherv", (sendbuf, recvbuf), (), algorithm, stream)

    def Bcast(self, buf: Any, root: int = 0, algorithm: str | None = None, stream: Any = None) -> None:
        """Copy ``root``'s buffer to all ranks."""
        code = self._doors.bcast(None, buf, None, root, algorithm, stream)
        if code is not None:
            self._go_on(code, "Bcast", (None, buf), (root,), algorithm, stream)

    def Alltoall(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None, stream: Any = None) -> None:
        """Send a block of equal length to every rank."""
        code = self._doors.alltoall(sendbuf, recvbuf, None, None, algorithm, stream)
        if code is not None:
            self._go_on(code, "Alltoall", (sendbuf, recvbuf), (), algorithm, stream)

    def Barrier(self) -> None:
        """Wait until all ranks have entered."""
        code = self._doors.barrier(None, None, None, None, None, None)
        if code is not None:
            self._go_on(code, "Barrier", (None, None))

    barrier = Barrier

    # Collectives that the MPI library runs; the consistency table compares them as well

    def Gather(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Gather blocks of equal length on ``root``."""
        code = self._doors.gather(sendbuf, recvbuf, None, root, None, None)
        if code is not None:
            self._go_on(code, "Gather", (sendbuf, recvbuf), (root,))

    def Gatherv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Gather blocks of any length on ``root``."""
        code = self._doors.gatherv(sendbuf, recvbuf, None, root, None, None)
        if code is not None:
            self._go_on(code, "Gatherv", (sendbuf, recvbuf), (root,))

    def Scatter(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Scatter blocks of equal length of ``root``'s buffer."""
        code = self._doors.scatter(sendbuf, recvbuf, None, root, None, None)
        if code is not None:
            self._go_on(code, "Scatter", (sendbuf, recvbuf), (root,))

    def Scatterv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Scatter blocks of any length of ``root``'s buffer."""
        code = self._doors.scatterv(sendbuf, recvbuf, None, root, None, None)
        if code is not None:
            self._go_on(code, "Scatterv", (sendbuf, recvbuf), (root,))

    def Alltoallv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Send a block of any length to every rank."""
        code = self._doors.alltoallv(sendbuf, recvbuf, None, None, None, None)
        if code is not None:
            self._go_on(code, "Alltoallv", (sendbuf, recvbuf))

    def Alltoallw(self, sendbuf: Any, recvbuf: Any) -> None:
        """Send a block of any length and datatype to every rank."""
        self._go_on(NOT_MINE, "Alltoallw", (sendbuf, recvbuf))

    def Scan(self, sendbuf: Any, recvbuf: Any, op: MPI.Op | str = MPI.SUM) -> None:
        """Reduce over the ranks up to this one."""
        code = self._doors.scan(sendbuf, recvbuf, op, None, None, None)
        if code is not None:
            self._go_on(code, "Scan", (sendbuf, recvbuf), (op,))

    def Exscan(self, sendbuf: Any, recvbuf: Any, op: MPI.Op | str = MPI.SUM) -> None:
        """Reduce over the ranks below this one."""
        code = self._doors.exscan(sendbuf, recvbuf, op, None, None, None)
        if code is not None:
            self._go_on(code, "Exscan", (sendbuf, recvbuf), (op,))

    # Compressed collectives: arrays on a device are copied to the host, results are copied back

    def _compress(self, function: Callable[..., Any], arrays: tuple[Any, ...], written: int = 0, **more: Any) -> Any:
        """Run a collective of :mod:`hpccomm.collectives.compressed` that writes the last ``written`` arrays."""
        name, body = function.__name__, partial(function, self, **more)
        with self.context.call(name, arrays[0]):
            if not any(map(self._planner.uses_device, arrays)):
                return body(*arrays)
            return self._device_planner.apply_to_copies(name, body, arrays, written)

    def sparse_allgather(
        self, indices: npt.NDArray[np.uint32], values: npt.NDArray[np.float32], n: int
    ) -> list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]]:
        """The sparse vectors of all ranks, in rank order (:mod:`hpccomm.collectives.compressed.sparse`)."""
        from hpccomm.collectives.compressed import sparse

        found: list[Any] = self._compress(sparse.sparse_allgather, (indices, values), n=n)
        return found

    def sparse_allreduce(
        self,
        indices: npt.NDArray[np.uint32],
        values: npt.NDArray[np.float32],
        n: int,
        *,
        k: int | None = None,
        algorithm: str = "auto",
        plan: sparse.SparsePlan | None = None,
    ) -> sparse.SparseSum:
        """The sum of sparse vectors, or its k largest (:mod:`hpccomm.collectives.compressed.sparse`)."""
        from hpccomm.collectives.compressed import sparse

        more: dict[str, Any] = {"n": n, "k": k, "algorithm": algorithm, "plan": plan}
        summed: sparse.SparseSum = self._compress(sparse.sparse_allreduce, (indices, values), **more)
        return summed

    def onebit_allgather(
        self, bits: npt.NDArray[np.uint8], plus: float, minus: float, n: int
    ) -> npt.NDArray[np.float32]:
        """The sum of all ranks' signs times their scales (:mod:`hpccomm.collectives.compressed.onebit`)."""
        from hpccomm.collectives.compressed import onebit

        total: npt.NDArray[np.float32] = self._compress(onebit.onebit_allgather, (bits,), plus=plus, minus=minus, n=n)
        return total

    def onebit_allreduce(
        self, x: npt.NDArray[np.float32], worker_error: npt.NDArray[np.float32], server_error: npt.NDArray[np.float32]
    ) -> onebit.OneBitMean:
        """The mean by one-bit messages: :func:`hpccomm.collectives.compressed.onebit.onebit_allreduce`."""
        from hpccomm.collectives.compressed import onebit

        mean: onebit.OneBitMean = self._compress(onebit.onebit_allreduce, (x, worker_error, server_error), written=2)
        return mean


NATIVE_CALLS = {name: getattr(MPI.Intracomm, name) for name in SIGNATURES}
"""MPI's own collectives that the entry compares."""


def check_world() -> None:
    """Raise if MPI has not started, or if a launcher has started more ranks than MPI sees."""
    if not MPI.Is_initialized():
        raise LaunchError(
            "MPI has not started: under torchrun, torch.distributed.init_process_group('hpccomm') starts it; elsewhere "
            "leave mpi4py.rc.initialize as it is, or call MPI.Init_thread()"
        )
    if MPI.COMM_WORLD.size == 1:
        from hpccomm import launcher

        launcher.check_world(1, os.environ)


def run_padded(
    call: Callable[..., None], buffers: tuple[Any, Any], padded: Sequence[Any], rest: tuple[Any, ...]
) -> None:
    """Make a call on copies of the buffers that lack the padding of their last pair, see :func:`pad_last`."""
    for each in padded:
        if each:
            each[2][...] = each[1]
    call(*(each[0] if each else given for each, given in zip(padded, buffers, strict=True)), *rest)
    if padded[1]:
        padded[1][1][...] = padded[1][2]


class Cartcomm(Communicator, MPI.Cartcomm):
    """A communicator with a Cartesian topology."""

    Sub = keep_ours(MPI.Cartcomm.Sub)


class Graphcomm(Communicator, MPI.Graphcomm):
    """A communicator with a graph topology."""


class Distgraphcomm(Communicator, MPI.Distgraphcomm):
    """A communicator with a distributed graph topology."""


class Intercomm(MPI.Intercomm):
    """An intercommunicator whose collectives are MPI's, and whose ``Merge`` gives a :class:`Communicator`."""

    _algorithm: str
    _pickle: str


KEPT: dict[Any, str] = {
    Communicator: (
        "Dup Clone Dup_with_info Idup Idup_with_info Split Split_type Create Create_group Create_cart Create_graph "
        "Create_dist_graph Create_dist_graph_adjacent Create_intercomm Spawn Spawn_multiple Accept Connect Shrink"
    ),
    Intercomm: "Dup Clone Dup_with_info Split Create Merge",
}
"""Methods of mpi4py that make a communicator; where that is an intracommunicator, it is one of ours."""
for _class, _names in KEPT.items():
    for _name in _names.split():
        setattr(_class, _name, keep_ours(getattr(_class, _name)))

for _name in COMPARED:
    setattr(Communicator, f"{_name}_init", compare_at_init(_name))
    setattr(Communicator, f"I{_name.lower()}", start_beside(_name, getattr(Communicator, _name)))

for _name in OBJECT_SIGNATURES:
    setattr(Communicator, _name, compare_objects(_name))

OURS: dict[type[MPI.Comm], Any] = {
    MPI.Intracomm: Communicator,
    MPI.Cartcomm: Cartcomm,
    MPI.Graphcomm: Graphcomm,
    MPI.Distgraphcomm: Distgraphcomm,
    MPI.Intercomm: Intercomm,
}
"""Our class for each of mpi4py's."""


_hooks: list[Any] = []


def install_abort_hook() -> None:
    """Make an uncaught exception on one rank print its traceback, or our sentence, and abort all ranks.

    A hook that the program has set before is called first; on a single rank it stays alone.
    ``HPCCOMM_EXCEPTHOOK=off`` leaves ``sys.excepthook`` alone.
    """
    previous, process, alone = sys.excepthook, os.getpid(), MPI.COMM_WORLD.size == 1
    if _hooks or os.environ.get("HPCCOMM_EXCEPTHOOK") == "off" or (alone and previous is not sys.__excepthook__):
        return
    _hooks.append(previous)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() != process or MPI.Is_finalized():  # a child of fork is no rank
            return previous(kind, error, trace)
        head = "" if alone else f"rank {MPI.COMM_WORLD.rank} aborts all ranks: "
        line = find_own_line(head, error, trace)
        if alone:
            if not line:
                return previous(kind, error, trace)
            return write_lines(f"[hpccomm] {error}\n{line}")
        try:  # nothing may keep this rank from ending the others
            try:
                if previous is not sys.__excepthook__:
                    previous(kind, error, trace)
            finally:
                if line:
                    error_reports.write(str(error))
                full = f"[hpccomm] {head}uncaught exception:\n{''.join(traceback.format_exception(kind, error, trace))}"
                write_lines(line or full)
                write_lines(list_waiting(WAITING_SECONDS))
                time.sleep(FLUSH_SECONDS)
        finally:
            MPI.COMM_WORLD.Abort(1)

    sys.excepthook = hook


def write_lines(lines: str) -> None:
    """Write to stderr, also where a library has redirected ``sys.stderr``."""
    os.write(2, lines.encode(errors="replace"))


def find_own_line(head: str, error: BaseException, trace: TracebackType | None) -> str:
    """The program's own line in which an error of ours was raised, as text that follows the error's sentence.

    Empty for other errors, and with ``HPCCOMM_TRACEBACK=full``.
    """
    frames = [each for each in traceback.extract_tb(trace) if not each.filename.startswith(PACKAGE)]
    if not isinstance(error, HpccommError) or not frames or os.environ.get("HPCCOMM_TRACEBACK") == "full":
        return ""
    at = next((each for each in reversed(frames) if not each.filename.startswith(library_folders())), frames[-1])
    return f"[hpccomm] {head}{type(error).__name__} in {at.filename}:{at.lineno}: {at.line}\n"


WAITING_SECONDS = 0.3
"""How long a rank that has failed waits for others to say where they are."""

PACKAGE = os.path.join(os.path.dirname(__file__), "")


timeline.start()
