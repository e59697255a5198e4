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
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm import launcher, messages, operations
from hpccomm.collectives.engine import bind, bind_lanes
from hpccomm.collectives.schedule import Algorithm
from hpccomm.collectives.tuning import Choice
from hpccomm.errors import ArgumentError
from hpccomm.messages import Message, read
from hpccomm.persistent import Persistent
from hpccomm.resources import Again, Bound, Resources, plain, unknown
from hpccomm.rollcall import LAST_WORDS
from hpccomm.signature import UNKNOWN, Signature
from hpccomm.topology import Topology

IN_PLACE = MPI.IN_PLACE
Run = Callable[[], None]

SYNCHRONISING = ("Allreduce", "Allgather", "Allgatherv", "Reduce_scatter", "Reduce_scatter_block", "Barrier")
"""Collectives that nobody leaves before all have come."""

LOCKSTEP_BYTES = 1 << 18
"""From here on such a collective compares all calls before the first message."""

SEGMENT_BYTES = 1 << 17
"""Length of a segment in chains and trees where the table does not say."""

address = MPI.Get_address


class Communicator(MPI.Intracomm):
    """``MPI.Intracomm`` with our collectives: ``Communicator(MPI.COMM_WORLD)``.

    ``algorithm`` names the algorithm of all calls that do not name their own and that it can do (``"auto"``).  Shares
    the handle of the communicator it is made from.  The first collective call sets things up, on all ranks together.
    """

    algorithm: str
    _resources: Resources | None = None
    _again: Again

    def __new__(cls, comm: MPI.Intracomm | None = None, algorithm: str = "auto") -> Communicator:
        self = super().__new__(cls, comm)
        self.algorithm = algorithm
        self._again = Again()
        if comm is not None and comm != MPI.COMM_NULL:
            launcher.check_world(MPI.COMM_WORLD.size, os.environ)
            end_together()
        return self

    # What was found

    @property
    def resources(self) -> Resources:
        """What lies behind the collectives (the first use is collective)."""
        if self._resources is None:
            self._resources = Resources(self, self._again)
        return self._resources

    @property
    def topology(self) -> Topology:  # type: ignore[override]
        """Which ranks share a node (the first use is collective)."""
        return self.resources.topology

    @property
    def intra_node(self) -> Communicator:
        """The ranks of this node (the first use is collective)."""
        return self._level("_intra_node", lambda: (int(self.topology.nodes[self.rank]), self.rank))

    @property
    def inter_node(self) -> Communicator:
        """The ranks with the same place on their nodes (the first use is collective)."""
        return self._level("_inter_node", lambda: (self.topology.place(self.rank), self.rank))

    def _level(self, name: str, color_and_key: Callable[[], tuple[int, int]]) -> Communicator:
        if name not in self.__dict__:
            self.__dict__[name] = self.Split(*color_and_key())
        level: Communicator = self.__dict__[name]
        return level

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """What ``algorithm=`` may say for ``"allreduce"``, ``"bcast"``, … here (the first use is collective)."""
        return self.resources.names(collective)

    def explain(self, collective: str, nbytes: int, dtype: str = "f4") -> Choice:
        """Which algorithm takes a call of ``nbytes`` bytes, and why (the first use is collective)."""
        names = self.resources.names(collective)[1:]
        return self.resources.decide(collective, nbytes, dtype, names, f"rank {self.rank}: {collective}")

    def empty(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = "f4") -> npt.NDArray[Any]:
        """Registered memory: seen by every rank of the node, so that an Allreduce in place copies nothing (collective).

        An ordinary array where the ranks do not share memory.
        """
        shared = self._shared
        return shared.empty(shape, dtype) if shared else np.empty(shape, dtype)

    def zeros(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike = "f4") -> npt.NDArray[Any]:
        """As :meth:`empty`, filled with zeros (collective)."""
        made = self.empty(shape, dtype)
        made[...] = 0
        return made

    # Communicators made from this one

    def Dup(self, info: MPI.Info | None = None) -> Communicator:
        """A communicator of the same ranks."""
        return self._like(plain(self).Dup(info))

    def Clone(self) -> Communicator:
        """A communicator of the same ranks."""
        return self._like(plain(self).Clone())

    def Dup_with_info(self, info: MPI.Info) -> Communicator:
        """A communicator of the same ranks with new hints."""
        return self._like(plain(self).Dup_with_info(info))

    def Split(self, color: int = 0, key: int = 0) -> Communicator:
        """One communicator for each color."""
        return self._like(plain(self).Split(color, key))

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Communicator:
        """One communicator for each group of ranks that share something."""
        return self._like(plain(self).Split_type(split_type, key, info))

    def Create(self, group: MPI.Group) -> Communicator:
        """A communicator of some of the ranks."""
        return self._like(plain(self).Create(group))

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Communicator:
        """A communicator of some of the ranks, made by them alone."""
        return self._like(plain(self).Create_group(group, tag))

    def _like(self, comm: MPI.Comm) -> Any:
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
        if self._resources is not None:
            self._resources.close()
            self._resources = None
            self._again.clear()

    # Collectives

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, algorithm: str | None = None) -> None:
        """Reduce over all ranks, the result on all.  Buffers as in mpi4py; ``algorithm`` as in :meth:`algorithms`."""
        known = self._again.get((id(sendbuf), id(recvbuf), id(op), algorithm))
        if known is not None and recvbuf.dtype is known.dtype:
            known.run()
            return
        key = call_key("Allreduce", sendbuf, recvbuf, op.handle, algorithm)
        bound = self._resources.plans.get(key) if self._resources else None
        if bound is None:
            bound = self._bind_allreduce(key, sendbuf, recvbuf, op, algorithm)
        if key is not None and op.is_predefined:
            self._again.remember(sendbuf, recvbuf, op, algorithm, bound.run)
        bound.run()

    def Allreduce_init(  # type: ignore[override]
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        info: MPI.Info = MPI.INFO_NULL,
        algorithm: str | None = None,
    ) -> Persistent:
        """A bound Allreduce to ``Start`` and ``Wait`` for as often as you like."""
        return Persistent(self._bind_allreduce(None, sendbuf, recvbuf, op, algorithm), (sendbuf, recvbuf))

    def _bind_allreduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None) -> Bound:
        who = self._who("Allreduce")
        send, recv = self._reduction_buffers(sendbuf, recvbuf, op, who)
        choice = self._choose("allreduce", recv, op, algorithm, who)
        signature = self._signature("Allreduce", recv, choice, algorithm, op)
        if choice.algorithm == "native":
            return self._native(key, signature, "Allreduce", (send, recv), (op,), recv.nbytes)
        vector, source = recv.vector(), None if send is recv else send.vector()
        if choice.algorithm == "shared":
            plan = self._shared.bind_allreduce(
                send.address, recv.address, recv.elements, vector.dtype, operations.name_of(op), signature.word
            )
            return self._keep_shared(key, signature, plan)
        ours = self.resources.algorithms("allreduce")[choice.algorithm]
        plan = self._bind_whole(ours, vector, ours.steps(self.rank, self.size), choice, op, signature)
        copy_in = None if source is None else lambda: np.copyto(vector, source)
        return self._keep(key, signature, [copy_in, plan], plan.free, vector.nbytes)

    def Reduce(
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        root: int = 0,
        algorithm: str | None = None,
    ) -> None:
        """Reduce over all ranks, the result on ``root``; elsewhere ``recvbuf`` is not looked at."""
        key = call_key("Reduce", sendbuf, recvbuf, op.handle, algorithm, root)
        bound = self._resources.plans.get(key) if self._resources else None
        if bound is None:
            bound = self._bind_reduce(key, sendbuf, recvbuf, op, root, algorithm)
        bound.run()

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
        return Persistent(self._bind_reduce(None, sendbuf, recvbuf, op, root, algorithm), (sendbuf, recvbuf))

    def _bind_reduce(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str | None
    ) -> Bound:
        who = self._who("Reduce")
        self._check_root(root, who)
        if self.rank == root:
            send, recv = self._reduction_buffers(sendbuf, recvbuf, op, who)
        else:
            send = recv = self._operand(sendbuf, op, who)
        choice = self._choose("reduce", send, op, algorithm, who)
        signature = self._signature("Reduce", send, choice, algorithm, op, root)
        if choice.algorithm == "native":
            into = recv if self.rank == root else Message(recvbuf)
            return self._native(key, signature, "Reduce", (send, into), (op, root), 0)
        source = send.vector()
        if choice.algorithm == "shared":
            plan = self._shared.bind_reduce(
                send.address,
                recv.address if self.rank == root else 0,
                send.elements,
                source.dtype,
                operations.name_of(op),
                root,
                signature.word,
            )
            return self._keep_shared(key, signature, plan)
        work = recv.vector() if self.rank == root else np.empty_like(source)
        ours = self.resources.algorithms("reduce")[choice.algorithm]
        plan = self._bind_whole(ours, work, ours.steps(self.rank, self.size, root), choice, op, signature)
        in_place = self.rank == root and send is recv
        copy_in = None if in_place else lambda: np.copyto(work, source)
        return self._keep(key, signature, [copy_in, plan], plan.free, 0)

    def Reduce_scatter_block(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, algorithm: str | None = None
    ) -> None:
        """Reduce over all ranks, an equal part of the result on each."""
        key = call_key("Reduce_scatter_block", sendbuf, recvbuf, op.handle, algorithm)
        bound = self._resources.plans.get(key) if self._resources else None
        if bound is None:
            bound = self._bind_reduce_scatter_block(key, sendbuf, recvbuf, op, algorithm)
        bound.run()

    def Reduce_scatter_block_init(  # type: ignore[override]
        self,
        sendbuf: Any,
        recvbuf: Any,
        op: MPI.Op = MPI.SUM,
        info: MPI.Info = MPI.INFO_NULL,
        algorithm: str | None = None,
    ) -> Persistent:
        """A bound Reduce_scatter_block."""
        bound = self._bind_reduce_scatter_block(None, sendbuf, recvbuf, op, algorithm)
        return Persistent(bound, (sendbuf, recvbuf))

    def _bind_reduce_scatter_block(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None
    ) -> Bound:
        who = self._who("Reduce_scatter_block")
        recv = self._operand(recvbuf, op, who, writable=True)
        in_place = sendbuf is IN_PLACE or sendbuf is recvbuf
        send = recv if in_place else self._operand(sendbuf, op, who)
        if send.opaque or recv.opaque:
            counts = (0,) * self.size
        else:
            counts = ((recv.part(self.size) if in_place else recv.elements),) * self.size
            self._check_parts(send, recv, counts, in_place, who)
        return self._bind_reduce_scatter(key, "Reduce_scatter_block", (send, recv), counts, (op,), algorithm, in_place)

    def Reduce_scatter(
        self,
        sendbuf: Any,
        recvbuf: Any,
        recvcounts: Any = None,
        op: MPI.Op = MPI.SUM,
        algorithm: str | None = None,
    ) -> None:
        """Reduce over all ranks, ``recvcounts[r]`` elements of the result on rank r (asked for when not said)."""
        told = None if recvcounts is None else tuple(recvcounts)
        key = None if told is None else call_key("Reduce_scatter", sendbuf, recvbuf, op.handle, algorithm, told)
        bound = self._resources.plans.get(key) if self._resources and key else None
        if bound is None:
            bound = self._bind_reduce_scatter_v(key, sendbuf, recvbuf, told, op, algorithm)
        bound.run()
        if key is None:
            bound.free()

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
        bound = self._bind_reduce_scatter_v(None, sendbuf, recvbuf, told, op, algorithm)
        return Persistent(bound, (sendbuf, recvbuf))

    def _bind_reduce_scatter_v(
        self,
        key: Hashable,
        sendbuf: Any,
        recvbuf: Any,
        told: tuple[int, ...] | None,
        op: MPI.Op,
        algorithm: str | None,
    ) -> Bound:
        who = self._who("Reduce_scatter")
        recv = self._operand(recvbuf, op, who, writable=True)
        in_place = sendbuf is IN_PLACE or sendbuf is recvbuf
        send = recv if in_place else self._operand(sendbuf, op, who)
        if told is None and in_place:
            raise ArgumentError(f"{who}: in place it cannot know who gets how much: pass recvcounts")
        counts = told
        if counts is None:
            counts = tuple(self.resources.channel.allgather(recv.elements))
        if not (send.opaque or recv.opaque):
            self._check_parts(send, recv, counts, in_place, who)
        return self._bind_reduce_scatter(
            key, "Reduce_scatter", (send, recv), counts, (told if recv.opaque else counts, op), algorithm, in_place
        )

    def _bind_reduce_scatter(
        self,
        key: Hashable,
        name: str,
        buffers: tuple[Message, Message],
        counts: tuple[int, ...],
        arguments: tuple[Any, ...],
        algorithm: str | None,
        in_place: bool,
    ) -> Bound:
        send, recv = buffers
        op = arguments[-1]
        choice = self._choose("reduce_scatter", send, op, algorithm, self._who(name), sum(counts))
        signature = self._signature(name, send, choice, algorithm, op, count="+".join(map(str, shortened(counts))))
        if choice.algorithm == "native":
            return self._native(key, signature, name, (send, recv), arguments, send.nbytes)
        total, mine = sum(counts), counts[self.rank]
        cuts = np.cumsum([0, *counts])
        into, source = recv.vector(mine), send.vector(total)
        if choice.algorithm == "shared":
            plan = self._shared.bind_reduce_scatter(
                send.address, recv.address, counts, source.dtype, operations.name_of(op), signature.word
            )
            return self._keep_shared(key, signature, plan)
        work = np.empty_like(source)
        ours = self.resources.algorithms("reduce_scatter")[choice.algorithm]
        steps = ours.steps(self.rank, self.size)
        plan = bind(steps, work, cuts, self.resources.messages, operations.combiner(op), signature.word)
        part = work[cuts[self.rank] : cuts[self.rank + 1]]
        moves: list[Run | None] = [lambda: np.copyto(work, source), plan, lambda: np.copyto(into, part)]
        return self._keep(key, signature, moves, plan.free, work.nbytes)

    def Allgather(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None) -> None:
        """Collect an equal part from every rank, in rank order, on all."""
        key = call_key("Allgather", sendbuf, recvbuf, 0, algorithm)
        bound = self._resources.plans.get(key) if self._resources else None
        if bound is None:
            bound = self._bind_allgather(key, sendbuf, recvbuf, algorithm)
        bound.run()

    def Allgather_init(  # type: ignore[override]
        self, sendbuf: Any, recvbuf: Any, info: MPI.Info = MPI.INFO_NULL, algorithm: str | None = None
    ) -> Persistent:
        """A bound Allgather."""
        return Persistent(self._bind_allgather(None, sendbuf, recvbuf, algorithm), (sendbuf, recvbuf))

    def _bind_allgather(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Bound:
        who = self._who("Allgather")
        recv = self._buffer(recvbuf, who, writable=True)
        send = recv if sendbuf is IN_PLACE else self._buffer(sendbuf, who)
        each = 0 if recv.opaque else recv.part(self.size)
        counts = (each,) * self.size
        return self._bind_gathering(key, "Allgather", send, recv, counts, algorithm, sendbuf is IN_PLACE)

    def Allgatherv(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None) -> None:
        """Collect a part of any length from every rank, in rank order, on all."""
        bound = self._bind_allgatherv(sendbuf, recvbuf, algorithm)
        bound.run()
        bound.free()

    def Allgatherv_init(  # type: ignore[override]
        self, sendbuf: Any, recvbuf: Any, info: MPI.Info = MPI.INFO_NULL, algorithm: str | None = None
    ) -> Persistent:
        """A bound Allgatherv."""
        return Persistent(self._bind_allgatherv(sendbuf, recvbuf, algorithm), (sendbuf, recvbuf))

    def _bind_allgatherv(self, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Bound:
        who = self._who("Allgatherv")
        recv = self._buffer(recvbuf, who, writable=True)
        send = recv if sendbuf is IN_PLACE else self._buffer(sendbuf, who)
        counts = (0,) * self.size if recv.opaque else recv.parts(self.size)[0]
        if len(counts) != self.size:
            raise ArgumentError(f"{who}: {len(counts)} counts for {self.size} ranks: pass one a rank")
        return self._bind_gathering(None, "Allgatherv", send, recv, counts, algorithm, sendbuf is IN_PLACE)

    def _bind_gathering(
        self,
        key: Hashable,
        name: str,
        send: Message,
        recv: Message,
        counts: tuple[int, ...],
        algorithm: str | None,
        in_place: bool,
    ) -> Bound:
        who, me = self._who(name), self.rank
        octets = recv.octets or 0 if recv.dtype is None else sum(counts) * recv.dtype.itemsize
        choice = self._choose("allgather", recv, None, algorithm, who, octets)
        opaque = recv.opaque or send.opaque
        signature = self._signature(name, recv, choice, algorithm, count=UNKNOWN if opaque else str(sum(counts)))
        displs = recv.parts(self.size)[1] if name == "Allgatherv" else tuple(k * counts[0] for k in range(self.size))
        if not opaque:
            self._check_gathering(send, recv, counts, displs, in_place, who)
        if choice.algorithm == "native" or opaque:
            return self._native(key, signature, name, (recv if in_place else send, recv), (), octets)
        assert recv.dtype is not None
        cuts = np.cumsum([0, *counts])
        straight = list(displs) == cuts[:-1].tolist()
        work = recv.vector(int(cuts[-1])) if straight else np.empty(int(cuts[-1]), recv.dtype)
        mine = work[cuts[me] : cuts[me + 1]]
        if choice.algorithm == "shared":
            width = recv.dtype.itemsize
            own = recv.address + displs[me] * width if in_place else send.address
            sizes, places = [each * width for each in counts], [each * width for each in displs]
            shared = self._shared.bind_allgather(own, recv.address, sizes, places, signature.word)
            return self._keep_shared(key, signature, shared)
        source = recv.vector(counts[me], displs[me]) if in_place else send.vector(send.elements)
        copy_in = None if in_place and straight else lambda: np.copyto(mine.view("u1"), source.view("u1"))
        spread = None if straight else spreader(work, cuts, recv, counts, displs)
        ours = self.resources.algorithms("allgather")[choice.algorithm]
        steps = ours.steps(me, self.size)
        plan = bind(steps, work, cuts, self.resources.messages, None, signature.word)
        return self._keep(key, signature, [copy_in, plan, spread], plan.free, octets)

    def Bcast(self, buf: Any, root: int = 0, algorithm: str | None = None) -> None:
        """Copy ``root``'s buffer to all ranks."""
        key = call_key("Bcast", buf, IN_PLACE, 0, algorithm, root)
        bound = self._resources.plans.get(key) if self._resources else None
        if bound is None:
            bound = self._bind_bcast(key, buf, root, algorithm)
        bound.run()

    def Bcast_init(  # type: ignore[override]
        self, buf: Any, root: int = 0, info: MPI.Info = MPI.INFO_NULL, algorithm: str | None = None
    ) -> Persistent:
        """A bound Bcast."""
        return Persistent(self._bind_bcast(None, buf, root, algorithm), (buf,))

    def _bind_bcast(self, key: Hashable, buf: Any, root: int, algorithm: str | None) -> Bound:
        who = self._who("Bcast")
        self._check_root(root, who)
        data = self._buffer(buf, who, writable=self.rank != root)
        choice = self._choose("bcast", data, None, algorithm, who, data.nbytes)
        signature = self._signature("Bcast", data, choice, algorithm, None, root)
        if choice.algorithm == "native":
            return self._native(key, signature, "Bcast", (data,), (root,), 0)
        packed = Packed(data, self) if data.opaque else None
        vector = packed.octets if packed else data.vector()
        before = packed.pack if packed and self.rank == root else None
        after = packed.unpack if packed and self.rank != root else None
        if choice.algorithm == "shared":
            start = messages.address_of(vector) if packed else data.address
            shared = self._shared.bind_bcast(start, data.nbytes, root, signature.word)
            return self._keep_shared(key, signature, in_turn([before, shared, after]))
        ours = self.resources.algorithms("bcast")[choice.algorithm]
        steps = ours.steps(self.rank, self.size, root)
        plan = self._bind_whole(ours, vector.view("u1"), steps, choice, None, signature)
        return self._keep(key, signature, [before, plan, after], plan.free, 0)

    # Collectives where the MPI library's own algorithm does the work; the calls are compared all the same

    def Barrier(self) -> None:
        """Wait for all ranks."""
        self._inherited("Barrier", ())

    def Gather(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Collect an equal part from every rank on ``root``."""
        self._inherited("Gather", (sendbuf, recvbuf), root)

    def Gatherv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Collect a part of any length from every rank on ``root``."""
        self._inherited("Gatherv", (sendbuf, recvbuf), root)

    def Scatter(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Give every rank an equal part of ``root``'s buffer."""
        self._inherited("Scatter", (sendbuf, recvbuf), root)

    def Scatterv(self, sendbuf: Any, recvbuf: Any, root: int = 0) -> None:
        """Give every rank a part of any length of ``root``'s buffer."""
        self._inherited("Scatterv", (sendbuf, recvbuf), root)

    def Alltoall(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give every rank an equal part of one's buffer."""
        self._inherited("Alltoall", (sendbuf, recvbuf))

    def Alltoallv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give every rank a part of any length of one's buffer."""
        self._inherited("Alltoallv", (sendbuf, recvbuf))

    def Alltoallw(self, sendbuf: Any, recvbuf: Any) -> None:
        """Give every rank a part of any length and datatype of one's buffer."""
        self._inherited("Alltoallw", (sendbuf, recvbuf))

    def Scan(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce over the ranks up to this one."""
        self._inherited("Scan", (sendbuf, recvbuf), op=op)

    def Exscan(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce over the ranks below this one."""
        self._inherited("Exscan", (sendbuf, recvbuf), op=op)

    def _inherited(self, name: str, buffers: tuple[Any, ...], root: int | None = None, op: Any = None) -> None:
        who = self._who(name)
        if root is not None:
            self._check_root(root, who)
        messages = [read(each, who) for each in buffers if name != "Alltoallw"]
        dtype = count = ""
        if op is not None:
            first = messages[1]
            dtype = UNKNOWN if first.dtype is None else first.dtype.name
            count = UNKNOWN if first.dtype is None else str(first.elements)
            if first.dtype is not None:
                operations.check_defined(op, first.dtype, who)
        op_name = "" if op is None else operations.name_of(op)
        signature = Signature(name, op_name, count, dtype, "" if root is None else str(root))
        arguments = [each for each in (op, root) if each is not None]
        call = getattr(MPI.Intracomm, name)
        self._checked(signature, lambda: call(self, *buffers, *arguments), 0)()

    # Understanding and checking

    def _who(self, name: str) -> str:
        return f"rank {self.rank}: {name}"

    def _buffer(self, given: Any, who: str, writable: bool = False) -> Message:
        message = read(given, who)
        if writable and not message.writable:
            raise ArgumentError(f"{who}: the buffer to receive into is read-only: pass a writable copy")
        if message.dtype is not None and message.count is not None and message.count > message.size:
            raise ArgumentError(
                f"{who}: the buffer holds {message.size} elements of {message.dtype}, count says {message.count}: "
                "pass a longer buffer or a smaller count"
            )
        return message

    def _operand(self, given: Any, op: MPI.Op, who: str, writable: bool = False) -> Message:
        message = self._buffer(given, who, writable)
        if given is None:
            raise ArgumentError(f"{who}: the buffer is None: pass an array")
        if message.dtype is not None:
            operations.check_defined(op, message.dtype, who)
        return message

    def _reduction_buffers(self, sendbuf: Any, recvbuf: Any, op: MPI.Op, who: str) -> tuple[Message, Message]:
        recv = self._operand(recvbuf, op, who, writable=True)
        if sendbuf is IN_PLACE or sendbuf is recvbuf:
            return recv, recv
        send = self._operand(sendbuf, op, who)
        if send.opaque or recv.opaque:
            return send, recv
        if send.dtype != recv.dtype or send.elements != recv.elements:
            raise ArgumentError(
                f"{who}: sends {send.elements} {send.dtype}, receives {recv.elements} {recv.dtype}: make them alike"
            )
        if send.order != recv.order:
            raise ArgumentError(
                f"{who}: one array is in C order, the other in Fortran order: pass np.ascontiguousarray(x)"
            )
        if send.address == recv.address:
            return recv, recv
        self._check_apart(send, recv, who)
        return send, recv

    def _check_apart(self, send: Message, recv: Message, who: str) -> None:
        if send.overlaps(recv):
            raise ArgumentError(f"{who}: the buffers overlap: pass MPI.IN_PLACE, or a copy")

    def _check_root(self, root: int, who: str) -> None:
        if not 0 <= root < self.size:
            raise ArgumentError(f"{who}: root {root} is not one of the ranks 0 … {self.size - 1}")

    def _check_parts(self, send: Message, recv: Message, counts: tuple[int, ...], in_place: bool, who: str) -> None:
        if len(counts) != self.size or min(counts) < 0:
            raise ArgumentError(f"{who}: recvcounts {counts} for {self.size} ranks: pass one count a rank")
        total = sum(counts)
        if send.dtype != recv.dtype or send.elements != total or (not in_place and recv.elements < counts[self.rank]):
            raise ArgumentError(
                f"{who}: sends {send.elements} {send.dtype}, receives {recv.elements} {recv.dtype}, the parts "
                f"are {total} in all and {counts[self.rank]} here: make them agree"
            )
        if not in_place:
            self._check_apart(send, recv, who)

    def _check_gathering(
        self,
        send: Message,
        recv: Message,
        counts: tuple[int, ...],
        displs: tuple[int, ...],
        in_place: bool,
        who: str,
    ) -> None:
        assert recv.dtype is not None
        end = max((d + c for d, c in zip(displs, counts, strict=True)), default=0)
        if end > recv.size:
            raise ArgumentError(f"{who}: the parts end at element {end}, the buffer to receive into has {recv.size}")
        if in_place:
            return
        if send.nbytes != counts[self.rank] * recv.dtype.itemsize:
            raise ArgumentError(
                f"{who}: sends {send.nbytes} bytes, the buffer to receive into has "
                f"{counts[self.rank] * recv.dtype.itemsize} for this rank: make them agree"
            )
        self._check_apart(send, recv, who)

    # Deciding, binding, running

    @property
    def _shared(self) -> Any:
        return self.resources.shared

    def _choose(
        self,
        collective: str,
        data: Message,
        op: MPI.Op | None,
        algorithm: str | None,
        who: str,
        nbytes: int | None = None,
    ) -> Choice:
        names = self.resources.names(collective)
        if algorithm is not None and algorithm not in names:
            raise unknown(who, algorithm, names)
        fits = self._fitting(collective, data, op)
        if algorithm is not None and algorithm not in ("auto", "native", *fits):
            raise ArgumentError(self._unfit(who, algorithm, data, fits))
        wanted = algorithm or self.algorithm
        if wanted in ("native", *fits):
            return Choice(wanted, None, "named by the caller")
        if self.size == 1 or not fits:
            return Choice("native", None, "nothing to choose")
        dtype = data.dtype.char if data.dtype is not None and op is not None else "B"
        allowed = ("native", *(name for name in names if name in fits))
        return self.resources.decide(collective, data.nbytes if nbytes is None else nbytes, dtype, allowed, who)

    def _fitting(self, collective: str, data: Message, op: MPI.Op | None) -> tuple[str, ...]:
        """Our algorithms that can do this call."""
        ours = self.resources.algorithms(collective)
        if op is None:
            movable = data.dtype is not None or data.datatype is not None
            return (*ours, *(["shared"] if self._shared else [])) if movable else ()
        if data.dtype is None or data.dtype.kind not in "biufc":
            return ()
        fits = tuple(name for name, each in ours.items() if each.ordered or op.Is_commutative())
        shared = self._shared
        if shared and op.is_predefined and shared.reduces(operations.name_of(op), data.dtype):
            return (*fits, "shared")
        return fits

    def _unfit(self, who: str, wanted: str, data: Message, fits: tuple[str, ...]) -> str:
        if data.opaque:
            return f"{who}: algorithm={wanted!r} cannot reduce a derived datatype: leave the algorithm out"
        others = ", ".join(repr(name) for name in fits)
        return (
            f"{who}: algorithm={wanted!r} cannot do this operation in rank order on {data.dtype}: use one of {others}"
        )

    def _signature(
        self,
        name: str,
        data: Message,
        choice: Choice,
        algorithm: str | None,
        op: MPI.Op | None = None,
        root: int | None = None,
        count: str | None = None,
    ) -> Signature:
        simple = data.dtype is not None
        return Signature(
            name,
            operations.name_of(op) if op is not None else "",
            count if count is not None else str(data.elements) if simple else UNKNOWN,
            data.dtype.name if data.dtype is not None else UNKNOWN,
            "" if root is None else str(root),
            data.order if simple else UNKNOWN,
            choice.algorithm if algorithm else "",
        )

    def _bind_whole(
        self,
        ours: Algorithm,
        vector: npt.NDArray[Any],
        steps: Any,
        choice: Choice,
        op: MPI.Op | None,
        signature: Signature,
    ) -> Any:
        segment = choice.segment_bytes or (SEGMENT_BYTES if ours.lanes else 0)
        lanes = -(-vector.nbytes // segment) if segment and vector.nbytes else 1
        combine = None if op is None else operations.combiner(op)
        blocks = ours.blocks(self.size)
        return bind_lanes(steps, vector, blocks, lanes, self.resources.messages, combine, signature.word)

    def _native(
        self,
        key: Hashable,
        signature: Signature,
        name: str,
        buffers: tuple[Message, ...],
        arguments: tuple[Any, ...],
        lockstep_bytes: int,
    ) -> Bound:
        method = getattr(MPI.Intracomm, name)
        first = buffers[0]
        same = len(buffers) == 2 and buffers[1] is first
        forms = [IN_PLACE if same else first.raw, *(each.raw for each in buffers[1:])]
        reusable = key is not None and all(each.dtype is not None for each in buffers)
        if reusable:
            divided = parted(name, same)
            forms = [
                IN_PLACE if same and k == 0 else standing(each, each.part(self.size) if k in divided else each.elements)
                for k, each in enumerate(buffers)
            ]
        run = self._checked(signature, lambda: method(self, *forms, *arguments), lockstep_bytes)
        return self.resources.keep(key, Bound(run)) if reusable else Bound(run)

    def _keep(
        self,
        key: Hashable,
        signature: Signature,
        moves: list[Run | None],
        free: Run,
        lockstep_bytes: int,
    ) -> Bound:
        bound = Bound(self._checked(signature, in_turn(moves), lockstep_bytes), free)
        return bound if key is None else self.resources.keep(key, bound)

    def _keep_shared(self, key: Hashable, signature: Signature, plan: Run) -> Bound:
        roll, shared = self.resources.roll, self._shared
        word = roll.announce(signature) if roll else 0

        def late(seconds: float, positions: list[int]) -> None:
            if roll:
                roll.late(word, seconds, positions)

        def run() -> None:
            shared.late = late
            plan()

        bound = Bound(run)
        return bound if key is None else self.resources.keep(key, bound)

    def _checked(self, signature: Signature, body: Run, lockstep_bytes: int) -> Run:
        """``body`` between the two looks at what the other ranks call."""
        roll = self.resources.roll
        if roll is None:
            return body
        word = roll.announce(signature)
        enter = roll.begin if signature.collective in SYNCHRONISING else roll.enter
        leave, wait = roll.leave, roll.wait
        lockstep = lockstep_bytes >= LOCKSTEP_BYTES

        def run() -> None:
            try:
                enter(word)
                if lockstep:
                    wait()
                body()
                leave(word)
            except MPI.Exception as failure:
                roll.inside = 0
                roll.blame(word, failure)
            except BaseException:
                roll.inside = 0
                raise

        return run


class Packed:
    """The data of a derived datatype as plain bytes."""

    def __init__(self, data: Message, comm: MPI.Intracomm) -> None:
        assert data.datatype is not None
        self._data, self._comm = data, comm
        self._extent = (data.count or 0) * data.datatype.Get_extent()[1]
        self.octets = np.empty(data.octets or 0, np.uint8)

    def pack(self) -> None:
        """From the user's memory."""
        assert self._data.datatype is not None
        self._data.datatype.Pack(self._memory(), self.octets, 0, self._comm)

    def unpack(self) -> None:
        """Into the user's memory."""
        assert self._data.datatype is not None
        self._data.datatype.Unpack(self.octets, 0, self._memory(), self._comm)

    def _memory(self) -> MPI.memory:
        return MPI.memory.fromaddress(self._data.address, self._extent)


def call_key(name: str, sendbuf: Any, recvbuf: Any, *rest: Any) -> Hashable:
    """What makes two calls of one communicator the same; ``None`` for buffers that are not plain arrays."""
    try:
        if type(recvbuf) is np.ndarray:
            recv = (address(recvbuf), recvbuf.size, recvbuf.dtype, recvbuf.flags.num)
        elif recvbuf is IN_PLACE or recvbuf is None:
            recv = None
        else:
            return None
        if type(sendbuf) is np.ndarray:
            return (name, address(sendbuf), sendbuf.size, sendbuf.dtype, sendbuf.flags.num, recv, rest)
        return (name, recv, rest) if sendbuf is IN_PLACE else None
    except (BufferError, ValueError, KeyError):  # not contiguous, or of no datatype: to be refused with a reason
        return None


def parted(name: str, in_place: bool) -> tuple[int, ...]:
    """Which buffers of an MPI call are counted in elements a rank."""
    return {"Allgather": (1,), "Reduce_scatter_block": (int(in_place),)}.get(name, ())


def standing(message: Message, count: int) -> Any:
    """A form for mpi4py that does not keep the user's array alive."""
    assert message.dtype is not None
    try:
        datatype = MPI.Datatype.fromcode(message.dtype.char)
    except (KeyError, ValueError):
        return message.raw
    return [MPI.memory.fromaddress(message.address, message.size * message.dtype.itemsize), count, datatype]


def in_turn(moves: list[Run | None]) -> Run:
    """One after the other."""
    acts = [move for move in moves if move is not None]
    if len(acts) == 1:
        return acts[0]

    def run() -> None:
        for act in acts:
            act()

    return run


def spreader(work: npt.NDArray[Any], cuts: Any, recv: Message, counts: tuple[int, ...], displs: tuple[int, ...]) -> Run:
    """Copy what was gathered side by side to where the user wants each part."""
    pairs = [
        (recv.vector(count, displ), work[cuts[k] : cuts[k + 1]])
        for k, (count, displ) in enumerate(zip(counts, displs, strict=True))
        if count
    ]

    def spread() -> None:
        for part, gathered in pairs:
            part[...] = gathered

    return spread


def shortened(counts: tuple[int, ...]) -> tuple[Any, ...]:
    """Counts for a signature: all of them where they are few."""
    return counts if len(counts) <= 8 else (*counts[:8], f"and {len(counts) - 8} more", hash(counts))


_installed: list[Any] = []


def end_together() -> None:
    """From now on an uncaught exception on one rank ends all of them, with that rank's traceback."""
    if _installed or MPI.COMM_WORLD.size == 1:
        return
    _installed.append(sys.excepthook)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        lines = traceback.format_exception(kind, error, trace)
        sys.stderr.write(f"[hpccomm] rank {MPI.COMM_WORLD.rank} ends all ranks:\n{''.join(lines)}")
        sys.stderr.flush()
        time.sleep(LAST_WORDS)
        MPI.COMM_WORLD.Abort(1)

    sys.excepthook = hook
