"""A communicator with mpi4py's spelling whose collectives are checked, chosen, and where it pays our own.

Every collective goes the same way: understand the buffers, check them, decide which algorithm takes the call, bind it
once, run it.  A call with the same buffers, operation and algorithm finds what was bound the last time.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Hashable
from functools import cached_property, partial
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm import launcher
from hpccomm.arrays import DeviceArray
from hpccomm.calls.bounce_buffers import BounceBuffers
from hpccomm.calls.consistency import FLUSH_SECONDS
from hpccomm.calls.plans import Plan, PlanCache, Run, call_key
from hpccomm.collectives.compressed import messages, onebit, sparse
from hpccomm.context import Context, unwrap
from hpccomm.device_planner import DeviceBinder
from hpccomm.layout import Layout, Link
from hpccomm.performance.tuning import Choice
from hpccomm.planner import is_in_place
from hpccomm.requests import Persistent

IN_PLACE = MPI.IN_PLACE


class Communicator(MPI.Intracomm):
    """``MPI.Intracomm`` with our collectives: ``Communicator(MPI.COMM_WORLD)``.

    ``algorithm`` names the algorithm of all calls that do not name their own and that it can do (``"auto"``).  Shares
    the handle of the communicator it is made from.  The first collective call sets things up, on all ranks together.
    """

    _algorithm: str
    _context: Context | None = None
    _plan_cache: PlanCache
    _bounce_buffers: BounceBuffers
    _binder: DeviceBinder

    def __new__(cls, comm: MPI.Intracomm | None = None, algorithm: str = "auto") -> Communicator:
        self = super().__new__(cls, comm)
        self._algorithm = algorithm
        self._plan_cache = PlanCache()
        self._bounce_buffers = BounceBuffers()
        self._binder = DeviceBinder(self)
        if comm is not None and comm != MPI.COMM_NULL:
            launcher.check_world(MPI.COMM_WORLD.size, os.environ)
            install_abort_hook()
        return self

    @property
    def algorithm(self) -> str:
        """What takes the calls that name no algorithm."""
        return self._algorithm

    @algorithm.setter
    def algorithm(self, name: str) -> None:
        self._algorithm = name
        if self._context:
            self._context.forget()

    # What was found

    @property
    def context(self) -> Context:
        """What lies behind the collectives (the first use is collective)."""
        if self._context is None:
            self._context = Context(self, self._plan_cache)
        return self._context

    @property
    def layout(self) -> Layout:
        """Which ranks share a node (the first use is collective)."""
        return self.context.layout

    @property
    def link(self) -> Link:
        """What messages between these ranks cost: inside the node where they share one, else between nodes."""
        machine = self.context.table.machine
        return machine.intra if self.layout.count == 1 else machine.inter

    @property
    def intra_node(self) -> Communicator:
        """The ranks of this node (the first use is collective)."""
        return self._level("_intra_node", lambda: (int(self.layout.nodes[self.rank]), self.rank))

    @property
    def inter_node(self) -> Communicator:
        """The ranks with the same place on their nodes (the first use is collective)."""
        return self._level("_inter_node", lambda: (self.layout.local_rank(self.rank), self.rank))

    def _level(self, name: str, color_and_key: Callable[[], tuple[int, int]]) -> Communicator:
        if name not in self.__dict__:
            self.__dict__[name] = self.Split(*color_and_key())
        level: Communicator = self.__dict__[name]
        return level

    @cached_property
    def message_gather(self) -> messages.MessageGather:
        """What gathers messages of any length here."""
        return messages.MessageGather(self)

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """What ``algorithm=`` may say for ``"allreduce"``, ``"bcast"``, … here (the first use is collective)."""
        return self.context.names(collective)

    def explain(self, collective: str, nbytes: int, dtype: str = "f4") -> Choice:
        """Which algorithm takes a call of ``nbytes`` bytes, and why (the first use is collective)."""
        names = self.context.names(collective)[1:]
        return self.context.decide(collective, nbytes, dtype, names, f"rank {self.rank}: {collective}")

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = "f4") -> npt.NDArray[Any]:
        """Registered memory: seen by every rank of the node, so that an Allreduce in place copies nothing (collective).

        The same shape and dtype on all ranks.  Given back with the array.

        An ordinary array where the ranks do not share memory.
        """
        shared = self._binder.shared_memory
        return shared.empty(shape, dtype) if shared else np.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = "f4") -> npt.NDArray[Any]:
        """As :meth:`empty`, filled with zeros (collective)."""
        made = self.empty(shape, dtype)
        made[...] = 0
        return made

    def register(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A registered array with the shape, dtype and contents of ``x`` (collective; use it in place of ``x``)."""
        made = self.empty(x.shape, x.dtype)
        made[...] = x
        return made

    # For hpccomm.functional

    def device_array(self, x: Any, name: str, stream: Any = None) -> DeviceArray:
        """What an array on a device is; ``name`` is the function that it was handed to."""
        return self._binder.operand_of(x, name, stream).array

    def empty_like(self, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new array on the device, in C order, of ``x``'s library where that can make one."""
        return self._binder.staging.device.allocate_like(x, shape, dtype)

    def divide(self, x: Any) -> None:
        """Divide an array of float32 or float64 on the device by the number of ranks."""
        self._binder.divide(x)

    def call_on_host(self, name: str, x: Any, function: Callable[[Any], Any], stream: Any = None) -> Any:
        """What a function makes of an array on a device when it sees it on the host, on the device again.

        ``name`` is the collective that is compared with what the other ranks call; nothing for none.
        """
        return self._binder.call_on_host(name, x, function, stream)

    def device_transports(self) -> dict[str, str]:
        """The ways that arrays on a CUDA device can go here, and why others cannot (the first use is collective).

        Raises TransportError on all ranks where ``HPCCOMM_GPU_TRANSPORT`` names one that does not work.
        """
        return self._binder.transports.describe()

    # Communicators made from this one

    def Dup(self, info: MPI.Info | None = None) -> Communicator:
        """A communicator of the same ranks."""
        return self._wrap(unwrap(self).Dup(info))

    def Clone(self) -> Communicator:
        """A communicator of the same ranks."""
        return self._wrap(unwrap(self).Clone())

    def Dup_with_info(self, info: MPI.Info) -> Communicator:
        """A communicator of the same ranks with new hints."""
        return self._wrap(unwrap(self).Dup_with_info(info))

    def Split(self, color: int = 0, key: int = 0) -> Communicator:
        """One communicator for each color."""
        return self._wrap(unwrap(self).Split(color, key))

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Communicator:
        """One communicator for each group of ranks that share something."""
        return self._wrap(unwrap(self).Split_type(split_type, key, info))

    def Create(self, group: MPI.Group) -> Communicator:
        """A communicator of some of the ranks."""
        return self._wrap(unwrap(self).Create(group))

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Communicator:
        """A communicator of some of the ranks, made by them alone."""
        return self._wrap(unwrap(self).Create_group(group, tag))

    def _wrap(self, comm: MPI.Comm) -> Any:
        if comm == MPI.COMM_NULL or not isinstance(comm, MPI.Intracomm):
            return comm
        return type(self)(comm, self.algorithm)

    def Free(self) -> None:
        """Give the communicator and all that lies behind it back (collective)."""
        self._release()
        super().Free()

    def Disconnect(self) -> None:
        """As :meth:`Free`, after all pending messages."""
        self._release()
        super().Disconnect()

    def _release(self) -> None:
        for name in ("_intra_node", "_inter_node"):
            level = self.__dict__.pop(name, None)
            if level is not None and level != MPI.COMM_NULL:
                level.Free()
        if self._context is not None:
            self._binder.release()
            self._context.close()
            self._context = None

    # Calls that were made before

    def _cached_run(
        self, quick: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op | None, algorithm: str | None
    ) -> Run | None:
        """What runs a call with the very same objects."""
        known = self._plan_cache.get(quick)
        if known is None:
            return None
        run, sender, same_op, same_algorithm, dtype, _ = known
        same = sender == id(sendbuf) and same_op is op and same_algorithm is algorithm
        return run if same and dtype is (sendbuf if recvbuf is None else recvbuf).dtype else None

    def _run_uncached(
        self,
        key: Any,
        quick: Hashable,
        buffers: tuple[Any, Any],
        op: MPI.Op | None,
        call: Callable[..., None],
        bind: Callable[..., Plan],
        rest: tuple[Any, ...],
        receives: bool = True,
    ) -> None:
        """Make a call on other objects than before: bound to their memory, through arrays that stand in, or bound now.

        The next time it is found by its arguments, if it is kept.  ``call(sendbuf, recvbuf, *rest)`` makes it on other
        buffers, ``bind(key, sendbuf, recvbuf, *rest)`` binds it, ``rest`` ending with the algorithm; unless this rank
        ``receives``, the second buffer is not looked at.  What is passed on here is not enclosed in functions there: a
        name that a function encloses costs every call of the method that has it 20 ns, found or not.
        """
        sendbuf, recvbuf = buffers
        bound = self._cached_plan(key)
        if bound is None:
            into = recvbuf if receives else None
            if key is not None and self._bounce_buffers.run((key[0], key[-1]), call, sendbuf, into, rest):
                return None
            bound = bind(key, sendbuf, recvbuf, *rest)
        if key is not None:
            self._plan_cache.store(quick, sendbuf, recvbuf, op, rest[-1], bound.run)
            return bound.run()
        try:
            return bound.run()
        finally:
            bound.free()

    def _run_movement(
        self,
        call: Callable[[Any, Any, str | None], None],
        bind: Callable[[Hashable, Any, Any, str | None], Plan],
        quick: tuple[str, int],
        sendbuf: Any,
        recvbuf: Any,
        algorithm: str | None,
    ) -> None:
        """Make a call on other objects than before that reduces nothing and has no root."""
        key = call_key(quick[0], sendbuf, recvbuf, 0, algorithm)
        return self._run_uncached(key, quick, (sendbuf, recvbuf), None, call, bind, (algorithm,))

    def _run_reproducible(self, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op) -> bool:
        """Run a reduction whose bits do not depend on order; whether there was need."""
        rest = [each for each in arguments if each is not op]
        key = None if None in rest else call_key(name, *buffers, "reproducible", op.handle, *rest)
        bound = self._cached_plan(key) or self._binder.bind_reproducible(key, name, buffers, arguments, op)
        if bound is None:
            return False
        try:
            bound.run()
        finally:
            if key is None:
                bound.free()
        return True

    def _cached_plan(self, key: Hashable) -> Plan | None:
        """A call on the same memory."""
        return self._context.plans.get(key) if self._context and key is not None else None

    # Collectives

    def Allreduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        algorithm: str | None = None,
        reproducible: bool = False,
        stream: Any = None,
    ) -> None:
        """Reduce over all ranks, the result on all.  Buffers as in mpi4py; ``algorithm`` as in :meth:`algorithms`.

        ``reproducible=True``: the bits of a sum of floats depend on what is added alone, not on order, placement,
        algorithm or number of ranks (:mod:`hpccomm.kernels.reproducible`); it takes several times as long.  Arrays may
        lie on
        a CUDA device, both of them; ``stream`` is one that works on them and that they do not tell of themselves
        (CUDA's handle, CuPy's or PyTorch's object), here as in the other collectives.
        """
        if stream is not None:
            sendbuf, recvbuf = self._binder.attach_stream(stream, sendbuf, recvbuf)
        if reproducible and self._run_reproducible("Allreduce", (sendbuf, recvbuf), (op,), op):
            return None
        known = self._plan_cache.get(id(recvbuf))
        if known is not None:  # as _known, spelled out: calls on few bytes take less time than a call of Python's
            run, sender, same_op, same_algorithm, dtype, _ = known
            if sender == id(sendbuf) and same_op is op and same_algorithm is algorithm and recvbuf.dtype is dtype:
                return run()
        key = call_key("Allreduce", sendbuf, recvbuf, op.handle, algorithm)
        return self._run_uncached(
            key, id(recvbuf), (sendbuf, recvbuf), op, self.Allreduce, self._binder.allreduce, (op, algorithm)
        )

    def Allreduce_view(self, buf: npt.NDArray[Any], op: MPI.Op = MPI.SUM) -> npt.NDArray[Any]:
        """Reduce registered arrays over all ranks into one result that the ranks of a node share.

        Writes p times less than :meth:`Allreduce`.  Returns a read-only array like ``buf``, whose contents hold until
        the next such call on ``buf``.
        """
        key = call_key("Allreduce_view", buf, IN_PLACE, op.handle)
        bound = self._cached_plan(key) or self._binder.allreduce_view(key, buf, op)
        bound.run()
        result: npt.NDArray[Any] = bound.result
        return result

    def Allreduce_init(  # type: ignore[override]
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        info: MPI.Info = MPI.INFO_NULL,
        algorithm: str | None = None,
    ) -> Persistent:
        """A bound Allreduce to ``Start`` and ``Wait`` for as often as you like."""
        return Persistent(self._binder.allreduce(None, sendbuf, recvbuf, op, algorithm), (sendbuf, recvbuf))

    def Reduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        root: int = 0,
        algorithm: str | None = None,
        reproducible: bool = False,
        stream: Any = None,
    ) -> None:
        """Reduce over all ranks, the result on ``root``; elsewhere ``recvbuf`` is not looked at."""
        if stream is not None:
            sendbuf, recvbuf = self._binder.attach_stream(stream, sendbuf, recvbuf)
        if reproducible and self._run_reproducible("Reduce", (sendbuf, recvbuf), (op, root), op):
            return None
        quick = ("Reduce", id(recvbuf), root)
        known = self._cached_run(quick, sendbuf, recvbuf, op, algorithm)
        if known:
            return known()
        key = call_key("Reduce", sendbuf, recvbuf, op.handle, algorithm, root)
        rest = (op, root, algorithm)
        return self._run_uncached(
            key, quick, (sendbuf, recvbuf), op, self.Reduce, self._binder.reduce, rest, self.rank == root
        )

    def Reduce_init(  # type: ignore[override]
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        root: int = 0,
        info: MPI.Info = MPI.INFO_NULL,
        algorithm: str | None = None,
    ) -> Persistent:
        """A bound Reduce."""
        return Persistent(self._binder.reduce(None, sendbuf, recvbuf, op, root, algorithm), (sendbuf, recvbuf))

    def Reduce_scatter_block(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        algorithm: str | None = None,
        reproducible: bool = False,
        stream: Any = None,
    ) -> None:
        """Reduce over all ranks, an equal part of the result on each; ``algorithm`` as in :meth:`algorithms`."""
        if stream is not None:
            sendbuf, recvbuf = self._binder.attach_stream(stream, sendbuf, recvbuf)
        if reproducible and self._run_reproducible("Reduce_scatter_block", (sendbuf, recvbuf), (op,), op):
            return None
        quick = ("Reduce_scatter_block", id(recvbuf))
        known = self._cached_run(quick, sendbuf, recvbuf, op, algorithm)
        if known:
            return known()
        key = call_key("Reduce_scatter_block", sendbuf, recvbuf, op.handle, algorithm)
        rest = (op, algorithm)
        return self._run_uncached(
            key, quick, (sendbuf, recvbuf), op, self.Reduce_scatter_block, self._binder.reduce_scatter_block, rest
        )

    def Reduce_scatter_block_init(  # type: ignore[override]
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        info: MPI.Info = MPI.INFO_NULL,
        algorithm: str | None = None,
    ) -> Persistent:
        """A bound Reduce_scatter_block."""
        bound = self._binder.reduce_scatter_block(None, sendbuf, recvbuf, op, algorithm)
        return Persistent(bound, (sendbuf, recvbuf))

    def Reduce_scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Any = None,
        op: MPI.Op = MPI.SUM,
        algorithm: str | None = None,
        reproducible: bool = False,
        stream: Any = None,
    ) -> None:
        """Reduce over all ranks, ``recvcounts[r]`` elements of the result on rank r (asked for when not said).

        ``algorithm`` as in :meth:`algorithms`; ``"hierarchical"`` reduces inside the nodes first (Zhang et al., VLDB
        2022).
        """
        if stream is not None:
            sendbuf, recvbuf = self._binder.attach_stream(stream, sendbuf, recvbuf)
        told = self._counts(sendbuf, recvbuf) if recvcounts is None else tuple(recvcounts)
        if reproducible and self._run_reproducible("Reduce_scatter", (sendbuf, recvbuf), (told, op), op):
            return None
        quick = ("Reduce_scatter", id(recvbuf), told)
        known = self._cached_run(quick, sendbuf, recvbuf, op, algorithm) if told else None
        if known:
            return known()
        key = None if told is None else call_key("Reduce_scatter", sendbuf, recvbuf, op.handle, algorithm, told)
        rest = (told, op, algorithm)
        return self._run_uncached(
            key, quick, (sendbuf, recvbuf), op, self.Reduce_scatter, self._binder.reduce_scatter_v, rest
        )

    def _counts(self, sendbuf: Any, recvbuf: Any) -> tuple[int, ...] | None:
        """What each rank receives, where that can be asked before anything is bound: into NumPy arrays."""
        if type(recvbuf) is not np.ndarray or sendbuf is recvbuf or is_in_place(sendbuf):
            return None
        return self.context.counts(recvbuf.size)

    def Reduce_scatter_init(  # type: ignore[override]
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Any = None,
        op: MPI.Op = MPI.SUM,
        info: MPI.Info = MPI.INFO_NULL,
        algorithm: str | None = None,
    ) -> Persistent:
        """A bound Reduce_scatter."""
        told = None if recvcounts is None else tuple(recvcounts)
        bound = self._binder.reduce_scatter_v(None, sendbuf, recvbuf, told, op, algorithm)
        return Persistent(bound, (sendbuf, recvbuf))

    def Allgather(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None, stream: Any = None) -> None:
        """Collect an equal part from every rank, in rank order, on all.

        ``algorithm`` as in :meth:`algorithms`; ``"hierarchical"`` gathers between nodes and in the shared memory of
        each (Zhang et al., VLDB 2022).
        """
        if stream is not None:
            sendbuf, recvbuf = self._binder.attach_stream(stream, sendbuf, recvbuf)
        quick = ("Allgather", id(recvbuf))
        known = self._cached_run(quick, sendbuf, recvbuf, None, algorithm)
        if known:
            return known()
        return self._run_movement(self.Allgather, self._binder.allgather, quick, sendbuf, recvbuf, algorithm)

    def Allgather_init(  # type: ignore[override]
        self, sendbuf: Any, recvbuf: Any, info: MPI.Info = MPI.INFO_NULL, algorithm: str | None = None
    ) -> Persistent:
        """A bound Allgather."""
        return Persistent(self._binder.allgather(None, sendbuf, recvbuf, algorithm), (sendbuf, recvbuf))

    def Allgatherv(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None, stream: Any = None) -> None:
        """Collect a part of any length from every rank, in rank order, on all; else as :meth:`Allgather`."""
        if stream is not None:
            sendbuf, recvbuf = self._binder.attach_stream(stream, sendbuf, recvbuf)
        quick = ("Allgatherv", id(recvbuf))
        known = self._cached_run(quick, sendbuf, recvbuf, None, algorithm)
        if known:
            return known()
        return self._run_movement(self.Allgatherv, self._binder.allgatherv, quick, sendbuf, recvbuf, algorithm)

    def Allgatherv_init(  # type: ignore[override]
        self, sendbuf: Any, recvbuf: Any, info: MPI.Info = MPI.INFO_NULL, algorithm: str | None = None
    ) -> Persistent:
        """A bound Allgatherv."""
        return Persistent(self._binder.allgatherv(None, sendbuf, recvbuf, algorithm), (sendbuf, recvbuf))

    def Bcast(self, buf: Any, root: int = 0, algorithm: str | None = None, stream: Any = None) -> None:
        """Copy ``root``'s buffer to all ranks."""
        if stream is not None:
            (buf,) = self._binder.attach_stream(stream, buf)
        quick = ("Bcast", id(buf), root)
        known = self._cached_run(quick, None, buf, None, algorithm)
        if known:
            return known()
        key = call_key("Bcast", buf, IN_PLACE, 0, algorithm, root)
        return self._run_uncached(key, quick, (None, buf), None, self._bcast, self._bind_bcast, (root, algorithm))

    def _bcast(self, nothing: None, buf: Any, root: int, algorithm: str | None) -> None:
        """A Bcast with the buffers that other collectives have."""
        self.Bcast(buf, root, algorithm)

    def _bind_bcast(self, key: Hashable, nothing: None, buf: Any, root: int, algorithm: str | None) -> Plan:
        """The same, bound."""
        return self._binder.bcast(key, buf, root, algorithm)

    def Bcast_init(  # type: ignore[override]
        self, buf: Any, root: int = 0, info: MPI.Info = MPI.INFO_NULL, algorithm: str | None = None
    ) -> Persistent:
        """A bound Bcast."""
        return Persistent(self._binder.bcast(None, buf, root, algorithm), (buf,))

    def Alltoall(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None, stream: Any = None) -> None:
        """Give every rank an equal part of one's buffer."""
        if stream is not None:
            sendbuf, recvbuf = self._binder.attach_stream(stream, sendbuf, recvbuf)
        quick = ("Alltoall", id(recvbuf))
        known = self._cached_run(quick, sendbuf, recvbuf, None, algorithm)
        if known:
            return known()
        return self._run_movement(self.Alltoall, self._binder.alltoall, quick, sendbuf, recvbuf, algorithm)

    def Barrier(self) -> None:
        """Wait for all ranks."""
        (self._cached_plan("Barrier") or self._binder.barrier("Barrier")).run()

    # Collectives where the MPI library's own algorithm does the work; the calls are compared all the same

    def _run_inherited(
        self, name: str, buffers: tuple[Any, Any], root: int | None = None, op: MPI.Op | None = None
    ) -> None:
        """Run MPI's own."""
        strange = name == "Alltoallw" or (op is not None and not op.is_predefined)
        key = None if strange else call_key(name, *buffers, root, None if op is None else op.handle)
        (self._cached_plan(key) or self._binder.bind_inherited(key, name, buffers, root, op)).run()

    def Gather(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Collect an equal part from every rank on ``root``."""
        self._run_inherited("Gather", (sendbuf, recvbuf), root)

    def Gatherv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Collect a part of any length from every rank on ``root``."""
        self._run_inherited("Gatherv", (sendbuf, recvbuf), root)

    def Scatter(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Give every rank an equal part of ``root``'s buffer."""
        self._run_inherited("Scatter", (sendbuf, recvbuf), root)

    def Scatterv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Give every rank a part of any length of ``root``'s buffer."""
        self._run_inherited("Scatterv", (sendbuf, recvbuf), root)

    def Alltoallv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give every rank a part of any length of one's buffer."""
        self._run_inherited("Alltoallv", (sendbuf, recvbuf))

    def Alltoallw(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give every rank a part of any length and datatype of one's buffer."""
        self._run_inherited("Alltoallw", (sendbuf, recvbuf))

    def Scan(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce over the ranks up to this one."""
        self._run_inherited("Scan", (sendbuf, recvbuf), op=op)

    def Exscan(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce over the ranks below this one."""
        self._run_inherited("Exscan", (sendbuf, recvbuf), op=op)

    # Compressed: arrays on a device are brought to the host, and results back

    def sparse_allgather(
        self, indices: npt.NDArray[np.uint32], values: npt.NDArray[np.float32], n: int
    ) -> list[tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]]:
        """The sparse vectors of all ranks, in rank order (:mod:`hpccomm.collectives.compressed.sparse`)."""
        body = partial(sparse.sparse_allgather, self, n=n)
        found: list[Any] = self._binder.apply_to_copies("sparse_allgather", body, (indices, values))
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
        body = partial(sparse.sparse_allreduce, self, n=n, k=k, algorithm=algorithm, plan=plan)
        summed: sparse.SparseSum = self._binder.apply_to_copies("sparse_allreduce", body, (indices, values))
        return summed

    def onebit_allgather(
        self, bits: npt.NDArray[np.uint8], plus: float, minus: float, n: int
    ) -> npt.NDArray[np.float32]:
        """The sum of all ranks' signs times their scales (:mod:`hpccomm.collectives.compressed.onebit`)."""
        body = partial(onebit.onebit_allgather, self, plus=plus, minus=minus, n=n)
        total: npt.NDArray[np.float32] = self._binder.apply_to_copies("onebit_allgather", body, (bits,))
        return total

    def onebit_allreduce(
        self,
        x: npt.NDArray[np.float32],
        worker_error: npt.NDArray[np.float32],
        server_error: npt.NDArray[np.float32],
    ) -> onebit.OneBitMean:
        """The mean, one bit an element each way: :func:`hpccomm.collectives.compressed.onebit.onebit_allreduce`."""
        body, arrays = partial(onebit.onebit_allreduce, self), (x, worker_error, server_error)
        mean: onebit.OneBitMean = self._binder.apply_to_copies("onebit_allreduce", body, arrays, written=2)
        return mean


_hooks: list[Any] = []


def install_abort_hook() -> None:
    """From now on an uncaught exception on one rank ends all of them, with that rank's traceback."""
    if _hooks or MPI.COMM_WORLD.size == 1:
        return
    _hooks.append(sys.excepthook)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = traceback.format_exception(kind, error, trace)
        sys.stderr.write(f"[hpccomm] rank {MPI.COMM_WORLD.rank} ends all ranks:\n{''.join(lines)}")
        sys.stderr.flush()
        time.sleep(FLUSH_SECONDS)
        MPI.COMM_WORLD.Abort(1)

    sys.excepthook = hook
