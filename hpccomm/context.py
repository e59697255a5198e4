"""What a communicator holds behind its face: topology, a private channel, the roll call, the table, bound calls.

Made together by all ranks with the first collective call, so that a communicator that only sends and receives costs
nothing.  Everything that decides which way a call goes comes from rank 0, so that all ranks go the same way.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable
from functools import cached_property
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm import layout
from hpccomm.backends.hierarchical import TwoLevels
from hpccomm.backends.hierarchical_gathers import TwoLevelGathers
from hpccomm.backends.shared_memory import SharedMemory
from hpccomm.calls import consistency
from hpccomm.calls.fingerprint import REMEDIES, Fingerprint, mismatch_message
from hpccomm.calls.plans import Plan, PlanCache
from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.collectives.schedule import Algorithm
from hpccomm.errors import ArgumentError, MismatchError, TransportError
from hpccomm.kernels.shared_memory.collectives import MAX_WAIT_NS
from hpccomm.performance import tuning
from hpccomm.performance.cost import HIERARCHICAL
from hpccomm.transports.mpi import MessageTransport, mpi_name
from hpccomm.transports.segment import SharedSegment

MAX_PLANS = 128
"""Bound calls kept for each communicator."""

PROGRESS_NS = 100_000
"""Nanoseconds after which a rank that waits for another of its node looks after its messages to other nodes."""

SETTINGS = (
    "HPCCOMM_ALGORITHM",
    "HPCCOMM_TUNING",
    "HPCCOMM_SHARED_MEMORY",
    "HPCCOMM_ROLL_CALL",
    "HPCCOMM_GPU_TRANSPORT",
)
"""Environment variables that must mean the same on every rank: rank 0's are taken."""


class Context:
    """The means of one communicator; creating them is collective."""

    def __init__(self, comm: MPI.Intracomm, again: PlanCache) -> None:
        self._plan_cache = again
        self.rank, self.size = comm.rank, comm.size
        self.private_comm = unwrap(comm).Dup()
        self.node = ranks_of_this_node(self.private_comm)
        self.layout = layout.discover(self.private_comm, self.node, MPI.Get_processor_name())
        self.members = self.layout.members(int(self.layout.nodes[self.rank]))
        self.settings = self.private_comm.bcast({name: os.environ.get(name, "") for name in SETTINGS})
        self.table = self.private_comm.bcast(self.load_table() if self.rank == 0 else None)
        self.messages = MessageTransport(self.private_comm, self.stray_message_error)
        self.consistency, self._segment = self.open_consistency_table()
        self.plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._decisions: dict[Hashable, tuning.Choice] = {}

    def load_table(self) -> tuning.Table:
        """This machine's decisions."""
        return tuning.load(mpi_name(), MPI.Get_processor_name(), ethernet=not layout.fast_networks())

    def counts(self, elements: int) -> tuple[int, ...]:
        """How many elements each rank says (collective)."""
        said = np.empty(self.size, np.int64)
        self.private_comm.Allgather(np.array([elements], np.int64), said)
        return tuple(said.tolist())

    def open_consistency_table(self) -> tuple[consistency.ConsistencyTable | None, SharedSegment | None]:
        """A roll call over the ranks of this node; none where they share no memory, or are alone."""
        if self.node.size == 1 or self.settings["HPCCOMM_ROLL_CALL"] == "off":
            return None, None
        try:
            segment = SharedSegment(self.node, consistency.bytes_needed(self.node.size))
        except TransportError as error:
            consistency.log_line(f"rank {self.rank}: mistakes between ranks will be noticed late: {error}")
            return None, None
        roll = consistency.ConsistencyTable(segment.buffer, self.members, self.rank)
        roll.progress = self.private_comm.Iprobe
        return roll, segment

    @property
    def shared_memory(self) -> SharedMemory | None:
        """Shared memory of all ranks; none across nodes or where it is not to be had."""
        memory = self.node_memory
        return memory if self.layout.count == 1 else None

    @cached_property
    def node_memory(self) -> SharedMemory | None:
        """Shared memory of this node's ranks; none anywhere if it is not to be had on some node."""
        if self.size == 1 or self.settings["HPCCOMM_SHARED_MEMORY"] == "off":
            return None
        made, trouble = None, ""
        try:
            made = SharedMemory(self.node, patience_ns=MAX_WAIT_NS if self.layout.count == 1 else PROGRESS_NS)
            made.mismatch = self.mismatch_error
        except TransportError as error:
            trouble = str(error)
        troubles = [each for each in self.private_comm.allgather(trouble) if each]
        if not troubles:
            return made
        if self.rank == 0:
            consistency.log_line(f"shared memory is not used, messages are slower: {troubles[0]}")
        if made:
            made.close()
        return None

    @cached_property
    def two_levels(self) -> TwoLevels | None:
        """Allreduces in shared memory inside the nodes and by messages between them, where there are several."""
        if self.layout.count == 1 or self.node_memory is None:
            return None
        lanes = hierarchical.channels_of(self.layout.nodes)
        return TwoLevels(self.node_memory, self.messages, lanes, self.table.machine.inter)

    @cached_property
    def two_level_gathers(self) -> TwoLevelGathers | None:
        """Allgathers and reduce-scatters that go the same way."""
        levels = self.two_levels
        return TwoLevelGathers(levels.memory, levels.transport, levels.channels) if levels else None

    def mismatch_error(self, words: list[int]) -> MismatchError:
        """The error when the ranks of a node brought different calls to shared memory."""
        calls = {rank: self.look_up_call(rank, word) for rank, word in zip(self.members, words, strict=True)}
        return MismatchError(mismatch_message(calls, self.rank))

    def look_up_call(self, rank: int, word: int) -> Fingerprint | None:
        """What a rank of this node calls by this word."""
        return self.consistency.look_up_call(rank, word) if self.consistency else None

    @cached_property
    def hierarchical_algorithms(self) -> dict[str, Algorithm]:
        """The algorithm in two levels for this placement, by collective."""
        return {collective: on(self.layout.nodes) for collective, on in HIERARCHICAL.items()}

    def algorithms(self, collective: str) -> dict[str, Algorithm]:
        """Our algorithms for a collective, by name."""
        found = dict(ALGORITHMS.get(collective, {}))
        if collective in self.hierarchical_algorithms:
            found["hierarchical"] = self.hierarchical_algorithms[collective]
        return found

    def names(self, collective: str) -> tuple[str, ...]:
        """What ``algorithm=`` may say for a collective."""
        shared = ("shared",) if self.shared_memory and collective in SharedMemory.collectives else ()
        return ("auto", "native", *shared, *self.algorithms(collective))

    def decide(self, collective: str, nbytes: int, dtype: str, allowed: tuple[str, ...], who: str) -> tuning.Choice:
        """Which of the ``allowed`` algorithms takes a call that named none."""
        key = (collective, nbytes, dtype, allowed)
        if key not in self._decisions:
            self._decisions[key] = self._decide(collective, nbytes, dtype, allowed, who)
            if len(self._decisions) > 4 * MAX_PLANS:
                self._decisions.pop(next(iter(self._decisions)))
        return self._decisions[key]

    def _decide(self, collective: str, nbytes: int, dtype: str, allowed: tuple[str, ...], who: str) -> tuning.Choice:
        wanted = algorithm_setting(self.settings["HPCCOMM_ALGORITHM"], collective)
        if wanted:
            if wanted not in self.names(collective):
                raise unknown_algorithm_error(who, wanted, self.names(collective), "HPCCOMM_ALGORITHM")
            if wanted in allowed:
                return tuning.Choice(wanted, None, "HPCCOMM_ALGORITHM says so")
        return self.table.choose(
            collective, self.layout.count, max(self.layout.per_node), nbytes, dtype, candidates=allowed
        )

    def stray_message_error(self, rank: int, tag: int, expected: int) -> MismatchError:
        """The error for a message of another call."""
        calls: dict[int, Fingerprint | None] = {self.rank: None, rank: None}
        if rank in self.members:
            calls = {self.rank: self.look_up_call(self.rank, expected), rank: self.look_up_call(rank, tag)}
        if None in calls.values():
            return MismatchError(
                f"rank {self.rank} got a message of another call from rank {rank}: {REMEDIES['collective']}, "
                "with the same operation, count and datatype"
            )
        return MismatchError(mismatch_message(calls, self.rank))

    def keep(self, key: Hashable, bound: Plan) -> Plan:
        """Remember a bound call; the oldest is given up."""
        self.plans[key] = bound
        if len(self.plans) > MAX_PLANS:
            self._plan_cache.clear()
            _, oldest = self.plans.popitem(last=False)
            oldest.free()
        return bound

    def forget(self) -> None:
        """Give up all bound calls."""
        self._plan_cache.clear()
        for bound in self.plans.values():
            bound.free()
        self.plans.clear()

    def close(self) -> None:
        """Give everything back (collective)."""
        self.forget()
        if self.consistency:
            self.consistency.close()
        if self._segment:
            self._segment.close()
        made: SharedMemory | None = self.__dict__.get("node_memory")
        if made:
            made.close()
        self.node.Free()
        self.messages.close()


def ranks_of_this_node(comm: MPI.Intracomm) -> MPI.Intracomm:
    """Those that share memory, in the order of their ranks (collective)."""
    return MPI.Intracomm(comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank))


def unwrap(comm: MPI.Intracomm) -> MPI.Intracomm:
    """The same communicator with mpi4py's own methods."""
    return MPI.Intracomm(comm)


def algorithm_setting(setting: str, collective: str) -> str:
    """What ``HPCCOMM_ALGORITHM`` says of a collective: ``ring`` for all, or ``allreduce=ring,bcast=tree``."""
    for part in filter(None, setting.replace(" ", "").split(",")):
        name, _, value = part.rpartition("=")
        if name in ("", collective):
            return value if value != "auto" else ""
    return ""


def unknown_algorithm_error(who: str, name: Any, names: tuple[str, ...], source: str = "algorithm") -> ArgumentError:
    """The error for an algorithm that does not exist here."""
    return ArgumentError(f"{who}: {source}={name!r} is not to be had here: use one of {', '.join(names)}")
