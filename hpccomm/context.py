"""The context of an MPI communicator: layout, private communicator, consistency table, tuning table, shared memory.

The context is made with the first :class:`hpccomm.Communicator` of an MPI communicator, on all ranks; an attribute of
the MPI communicator keeps it, and frees it with the communicator.  So the ranks can compare their first calls: shared
memory is made only when all ranks have entered the same first collective.  Rank 0 broadcasts all settings and the
tuning table, so that every rank selects the same algorithm.
"""

from __future__ import annotations

import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm import first_use, layout
from hpccomm.backends.schedules import Schedules
from hpccomm.backends.shared_memory import SharedMemory
from hpccomm.calls import between_nodes, consistency, watchdog
from hpccomm.calls.entry import FREED, Doors, Entry
from hpccomm.calls.fingerprint import REMEDIES, Fingerprint, mismatch_message
from hpccomm.calls.makers import Check
from hpccomm.calls.plans import Plan
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.hierarchical import HIERARCHICAL, Form, select_form
from hpccomm.collectives.schedule import Algorithm
from hpccomm.errors import ArgumentError, MismatchError, TransportError
from hpccomm.kernels import objects
from hpccomm.observe.flight_recorder import Call, Comm, count_bytes, recorder
from hpccomm.performance import tuning
from hpccomm.performance.probe import processor_name
from hpccomm.performance.units import format_ranges
from hpccomm.settings import check_environment
from hpccomm.transports.mpi import MessageTransport, mpi_name
from hpccomm.transports.segment import SharedSegment, unlink_memory_of_mpi

MAX_PLANS = 128
"""Plans cached per communicator."""

LOOK_SECONDS = 1.0
"""Seconds between two looks for compiled functions."""

NODE_PROGRESS_NS, PROGRESS_NS = 500_000, 100_000
"""Nanoseconds for which a rank waits for another rank of its node before it drives its messages, on one node and on
several; later up to ten times as long."""

SETTINGS = (
    "HPCCOMM_ALGORITHM",
    "HPCCOMM_TUNING",
    "HPCCOMM_SHARED_MEMORY",
    "HPCCOMM_CONSISTENCY",
    "HPCCOMM_GPU_TRANSPORT",
    "HPCCOMM_COMPILE",
    "HPCCOMM_DEBUG",
    "HPCCOMM_GUARD",
)
"""Environment variables that must be the same on every rank: rank 0's values are used."""


class Once:
    """A property that is made at its first use, as ``functools.cached_property``, but without a lock.

    That has one lock for all objects until Python 3.12.  The first use may be collective, and the ranks' threads may
    make the contexts of two communicators in different orders.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make, self.__doc__ = make, make.__doc__

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        """Make the value and let it take the place of this property."""
        if owner is None:
            return self
        made = vars(owner)[self._make.__name__] = self._make(owner)
        return made


class PlanCache:
    """The plans and the compiled entry of one :class:`hpccomm.Communicator`, whose default algorithm they depend on."""

    def __init__(self) -> None:
        self.doors = Doors()
        self.plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self.entry: Entry | None = None
        self.stage = -1
        """The stage of the context for which the doors were opened."""
        self._held: dict[str, Any] = {}

    def hold(self, let_pass: Callable[[], None]) -> None:
        """Let calls wait before they enter by the doors: ``let_pass`` returns when they may."""
        if not self._held:
            self._held = dict(vars(self.doors))
            vars(self.doors).update({name: partial(self._enter_later, let_pass, name) for name in self._held})

    def let_go(self) -> None:
        """Let calls enter at once again."""
        vars(self.doors).update(self._held)
        self._held = {}

    def _enter_later(self, let_pass: Callable[[], None], name: str, *arguments: Any) -> Any:
        """Enter by a door that was held."""
        let_pass()
        return (self._held or vars(self.doors))[name](*arguments)

    def keep(self, key: Hashable, bound: Plan) -> Plan:
        """Cache a plan, if it has a key; beyond MAX_PLANS the oldest is freed."""
        if key is None:
            return bound
        self.plans[key] = bound
        if len(self.plans) > MAX_PLANS:
            _, oldest = self.plans.popitem(last=False)
            oldest.free()
        return bound

    def forget(self) -> None:
        """Free all cached plans."""
        if self.entry:
            self.entry.clear()
        for bound in self.plans.values():
            bound.free()
        self.plans.clear()

    def __del__(self) -> None:
        """Free the plans of a communicator that nobody uses any more."""
        with suppress(Exception):  # at the end of the program their parts may be gone
            if not MPI.Is_finalized():
                self.forget()

    def close(self) -> None:
        """Free all plans, and leave all calls to the Python path."""
        self.forget()
        self.doors.close()
        self.entry, self.stage = None, -1


class Context:
    """The context of one MPI communicator; creating it is collective."""

    def __init__(self, comm: MPI.Intracomm, of: tuple[Context, tuple[int, ...]] | None = None) -> None:
        """``of``: the context and the ranks there of which ``comm`` is a level: nothing is read, sent or opened."""
        keep_freed_memory()
        self._comm, self.rank, self.size = unwrap(comm), comm.rank, comm.size
        self.users: weakref.WeakSet[PlanCache] = weakref.WeakSet()
        self.closed = False
        self.queue: Any = None
        """The calls of progress threads (:mod:`hpccomm.progress`)."""
        self.waiters = 0
        """In a progress thread, the address of the number of threads that wait for its calls."""
        self.levels: dict[str, MPI.Intracomm] = {}
        self.stage = 0
        """0 before the first collective; rises when calls may run in another way than before."""
        self.node_memory: SharedMemory | None = None
        """Shared memory of this node's ranks; ``None`` on all nodes if it is not available on one of them."""
        self.awaits_code = False
        """Whether other algorithms take the calls of this node until shared memory's functions are compiled."""
        self._schedules: Schedules | None = None
        self._decisions: dict[Hashable, tuning.Choice] = {}
        self._look_again = 0.0
        self.consistency: consistency.ConsistencyTable | None = None
        self.level_table: consistency.ConsistencyTable | None = None
        """The consistency table of the level of this node's ranks."""
        self._segment: SharedSegment | None = None
        self.recorded: Comm
        """This communicator in the flight recorder."""
        self.issued: Comm | None = None
        """Its non-blocking calls there, which have numbers of their own."""
        self._group: watchdog.Group | None = None
        if of:
            self._take_from(*of)
        else:
            self._agree()

    def _agree(self) -> None:
        """Find out which ranks share a node, and take rank 0's settings and tuning table (collective)."""
        check_environment(os.environ)
        self.node = self._find_node()
        offer = None
        if self.rank == 0:
            self.settings = {name: os.environ.get(name, "") for name in SETTINGS}
            offer = self.settings, self.load_table(), MPI.Get_processor_name(), *name_of(self.private_comm)
        if self.size == MPI.COMM_WORLD.size and self.node.rank == 0:
            unlink_memory_of_mpi()
        self.settings, self.table, name, number, text = self.private_comm.bcast(offer)
        self.recorded = Comm(recorder(), number, text)
        self._agreed = self.table
        if self.node is self.private_comm or self.size == 1:
            self.layout = layout.on_one_node(self.size, name)
        else:
            self.layout = layout.discover(self.private_comm, self.node, MPI.Get_processor_name())
        self.open_consistency_tables()
        self.open_group(self._connect_tables() if self.layout.count > 1 else None)

    def _connect_tables(self) -> MPI.Intracomm | None:
        """Compare calls between nodes if each has a table; the communicator of the watchdogs, if they may have one.

        A node may lack memory for its table, so the ranks agree first (collective).
        """
        if self.settings["HPCCOMM_CONSISTENCY"] == "off":
            return None
        mine = self.consistency is not None, MPI.Query_thread() == MPI.THREAD_MULTIPLE
        complete, threads = (all(each) for each in zip(*self.private_comm.allgather(mine), strict=True))
        if self.consistency is None or not complete:
            return None
        mask = between_nodes.MASKS[self.settings["HPCCOMM_DEBUG"] or "sample"]
        self.consistency.between = between_nodes.BetweenNodes(self.private_comm, self.consistency, mask)
        return create_private_comm(self.private_comm) if threads else None

    def _find_node(self) -> MPI.Intracomm:
        """The ranks of this node, for our messages (collective); what MPI has made of all ranks is their level."""
        if self.size == 1:
            return MPI.COMM_SELF
        node = ranks_of_this_node(self.private_comm)
        if node.size == self.size:
            self.levels["intra"] = node
            return self.private_comm
        if node.size > 1:
            return node
        node.Free()
        return MPI.COMM_SELF

    @Once
    def node(self) -> MPI.Intracomm:
        """The ranks of this node, in rank order, for our messages; the first use of a level's is collective."""
        return self.private_comm if len(self.members) > 1 else MPI.COMM_SELF

    def _take_from(self, parent: Context, ranks: tuple[int, ...]) -> None:
        """Take everything from the context of which this one is a level; ``ranks`` are its ranks there.

        The tuning table is the one that all ranks agreed on: they may ask for a level at different times.
        """
        self.settings, self.table, self.layout = parent.settings, parent._agreed, parent.layout.select(ranks)
        self._agreed, self.waiters = self.table, parent.waiters
        self.consistency = parent.level_table if self.layout.count == 1 < self.size else None
        number = hash((parent.recorded.number, *ranks)) >> 2 & (1 << 60) - 1 | 1 << 60
        level = "intra-node" if self.layout.count == 1 else "inter-node"
        text = f"{level} ranks {format_ranges(ranks)} of {parent.recorded.text}"
        self.recorded = Comm(recorder(), number, text)
        self.open_group(of=(parent._group, ranks) if parent._group else None)

    @Once
    def members(self) -> tuple[int, ...]:
        """The ranks of this node."""
        return self.layout.members(int(self.layout.nodes[self.rank]))

    @Once
    def private_comm(self) -> MPI.Intracomm:
        """A communicator of the same ranks for our messages; the first use is collective."""
        return create_private_comm(self._comm)

    @Once
    def messages(self) -> MessageTransport:
        """Messages of schedules."""
        return MessageTransport(self.private_comm, self.stray_message_error, self.waiters)

    def prepare(self, name: str) -> None:
        """Set up what collectives need, at the first one, which is called ``name`` (collective).

        The ranks compare their first calls before: none waits for a rank that calls something else.
        """
        if self.stage:
            return
        self.check_open(name)
        self.run_together(Fingerprint(name), self.set_up, always=True)
        self.stage = 1

    def check_open(self, name: str) -> None:
        """Raise if the communicator has been freed, as by another :class:`hpccomm.Communicator` of the same handle."""
        if self.closed:
            raise ArgumentError(f"rank {self.rank}: {name}: {FREED}")

    def run_together(
        self, fingerprint: Fingerprint, body: Callable[[], None], always: bool = False, settles: bool = True
    ) -> None:
        """Run a body with messages between all ranks, once all ranks of this node have entered the same call.

        ``always``: it is one of the few that ranks of several nodes always compare.
        """
        table = self.consistency
        if table is None:
            return body()
        with table.entered:
            table.begin(table.announce(fingerprint), settles=settles)
            table.compare_nodes(always=always)
            table.wait()
            body()

    def compare_making(self, name: str, describe: Callable[[], tuple[Fingerprint, Check | None]]) -> None:
        """Compare a call that makes a communicator, before MPI makes it (collective).

        ``describe()`` returns its fingerprint and what compares more; where that fails, so does mpi4py's method, which
        says why.  A communicator that is out of step is not compared: a program makes a new one from it to go on.
        """
        self.check_open(name)
        if self.queue:
            self.queue.drain()
        if self.consistency is None or not self.has_all_tables or self.consistency.is_out_of_step:
            return
        try:
            fingerprint, check = describe()
        except Exception:
            return
        off = bool(self.consistency.between) and self.consistency.between.mask < 0
        compare_more = (lambda: check(self.private_comm)) if check and not off else (lambda: None)
        self.run_together(fingerprint, compare_more, always=True, settles=False)

    def set_up(self) -> None:
        """Make shared memory, unless its functions must be compiled first (collective)."""
        self.awaits_code = self.must_await_code()
        self.make_memory()

    def make_memory(self) -> None:
        """Make the shared memory of this node, and what is built on it (collective)."""
        self.node_memory, self._schedules = self.open_memory(), None

    def load_table(self) -> tuning.Table:
        """This machine's tuning table."""
        where = mpi_name(), MPI.Get_processor_name()
        if self.settings["HPCCOMM_GUARD"] == "off":
            return tuning.load(*where, ethernet=not layout.fast_networks())
        table = tuning.load(*where, ethernet=not layout.fast_networks(), cpu=processor_name())
        return table if table.frozen else table.add_first_use(first_use.load(mpi_name()))

    def add_first_use(self, rows: list[tuning.Row], keep: bool) -> None:
        """Decide by what the first use of a size class has measured, and with ``keep`` in later programs too."""
        self.table = self.table.add_first_use(rows)
        self._decisions.clear()
        if keep and self.rank == 0:
            first_use.save(mpi_name(), rows)

    def exchange_counts(self, elements: int) -> tuple[int, ...]:
        """The number of elements of every rank of a Reduce_scatter without counts (collective)."""
        counts = np.empty(self.size, np.int64)
        own = np.array([elements], np.int64)
        name = "Reduce_scatter without recvcounts"
        self.run_together(Fingerprint(name), lambda: self.private_comm.Allgather(own, counts))
        return tuple(counts.tolist())

    def open_consistency_tables(self) -> None:
        """Open the consistency tables of this node's ranks and of the level that they are.

        Both are ``None`` for one rank or without shared memory.
        """
        ranks = len(self.members)
        if self.size == 1 or self.settings["HPCCOMM_CONSISTENCY"] == "off":
            return
        nbytes = consistency.bytes_needed(ranks)
        if ranks == 1:  # a node of its own, whose calls are compared with those of other nodes
            self.consistency = consistency.ConsistencyTable(bytearray(nbytes), self.members, self.rank)
            return
        try:
            self._segment = SharedSegment(self.node, 2 * nbytes)
        except TransportError as error:
            watchdog.log_line(f"rank {self.rank}: no consistency table, mismatched calls may hang: {error}")
            return
        memory, place = memoryview(self._segment.buffer), self.layout.local_rank(self.rank)
        self.consistency = consistency.ConsistencyTable(memory[:nbytes], self.members, self.rank)
        self.level_table = consistency.ConsistencyTable(memory[nbytes : 2 * nbytes], tuple(range(ranks)), place)
        for table in (self.consistency, self.level_table):
            table.progress = self.private_comm.Iprobe

    def open_group(
        self, wire: MPI.Intracomm | None = None, of: tuple[watchdog.Group, tuple[int, ...]] | None = None
    ) -> None:
        """Let the watchdog look after the calls of this communicator.

        ``wire`` is for its messages; ``of``: the group of which this communicator is a level, and its ranks there.
        """
        recorder().set_rank(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
        if self.consistency or (of and self.size > 1):
            nodes = [self.layout.members(node) for node in range(self.layout.count)]
            self._group = watchdog.Group(self.recorded, self.rank, nodes, self.consistency, wire, of)
            watchdog.watch(self._group)

    def call(self, name: str, *buffers: Any, inside: bool = False) -> Call:
        """Record a call; a context manager."""
        return Call(self.recorded, name, count_bytes(buffers), inside)

    @property
    def has_all_tables(self) -> bool:
        """Whether every node has a consistency table: the same on all ranks."""
        return self.consistency is not None and bool(self.layout.count == 1 or self.consistency.between)

    def doubt(self, one_way: bool) -> None:
        """An exception of the program's own code has ended a call: the next one finds out whether ranks are in step."""
        if self.consistency:
            self.consistency.doubt(one_way)
            for each in list(self.users):
                each.close()

    def begin_issued(self, fingerprint: Fingerprint, nbytes: int) -> Call:
        """Record a call that a progress thread makes; a context manager."""
        if self.issued is None:
            self.issued = Comm(recorder(), -self.recorded.number, self.recorded.text)
        return Call(self.issued, f"{fingerprint.uncounted}", nbytes)

    @property
    def shared_memory(self) -> SharedMemory | None:
        """Shared memory of all ranks; ``None`` across nodes or where it is not available."""
        memory = self.node_memory
        return memory if self.layout.count == 1 else None

    def open_memory(self) -> SharedMemory | None:
        """Shared memory of this node's ranks; ``None`` on all nodes if it is not available on one of them."""
        if not self.wants_memory or self.awaits_code:
            return None
        memory, trouble = None, ""
        try:
            memory = SharedMemory(self.node, patience_ns=NODE_PROGRESS_NS if self.layout.count == 1 else PROGRESS_NS)
            memory.mismatch = self.mismatch_error
            if self.consistency:
                table = self.consistency
                memory.miss_call = table.miss_call
                memory.give_reason = table.write_reason
                memory.find_reason = lambda k: table.read_reason(table.members[k])
            if self.rank == 0 and memory.trouble:
                warn_once(memory.trouble)
        except TransportError as error:
            trouble = str(error)
        # the ranks of a node raise together
        all_troubles = self.private_comm.allgather(trouble) if self.layout.count > 1 else [trouble]
        troubles = [each for each in all_troubles if each]
        if not troubles:
            if self.consistency and memory:
                self.consistency.last_shared_call = memory.last_call
            return memory
        if self.rank == 0:
            watchdog.log_line(f"shared memory is not used, collectives use slower messages: {troubles[0]}")
        if memory:
            memory.close()
        return None

    @property
    def wants_memory(self) -> bool:
        """Whether collectives use shared memory where it is available."""
        return self.size > 1 and self.settings["HPCCOMM_SHARED_MEMORY"] != "off"

    def must_await_code(self) -> bool:
        """Whether other algorithms take the calls of this node until shared memory's functions are compiled."""
        if self.settings["HPCCOMM_SHARED_MEMORY"] == "off" or self.settings["HPCCOMM_COMPILE"] == "wait":
            return False
        if self.layout.count > 1 or self.consistency is None:
            return False
        complete = objects.complete()
        states = self.node.allgather((complete, complete or objects.can_compile()))
        done, possible = (all(each) for each in zip(*states, strict=True))
        if not done and self.rank == 0:
            (start_compiler if possible else tell_no_folder)()
        return possible and not done

    def announce_code(self) -> None:
        """On entering a call, tell the ranks of this node once that this rank has the functions."""
        if self.awaits_code and time.monotonic() > self._look_again:
            self._look_again = time.monotonic() + LOOK_SECONDS
            if objects.complete() and self.consistency:
                self.consistency.announce_code()

    def use_code(self) -> None:
        """Stop awaiting the functions: all decisions are made again (collective)."""
        self.awaits_code = False
        self.make_memory()
        self._decisions.clear()
        self.stage += 1
        for each in list(self.users):
            each.forget()

    @property
    def schedules(self) -> Schedules:
        """Schedules on messages; on several nodes they meet in the shared memory of each."""
        if self._schedules is None:
            self._schedules = Schedules(self.node_memory if self.layout.count > 1 else None, self.messages)
        return self._schedules

    @Once
    def hierarchical_algorithms(self) -> dict[str, Algorithm]:
        """The hierarchical schedule for this layout, by collective."""
        return {collective: on(self.layout.nodes) for collective, on in HIERARCHICAL.items()}

    def hierarchical_form(self, collective: str, nbytes: int, shared: bool) -> Form:
        """What runs for the hierarchical algorithm; ``shared``: the ranks of each node meet in shared memory."""
        return select_form(collective, self.layout.nodes, nbytes, self.table.machine.inter, shared)

    def mismatch_error(self, digests: list[int]) -> MismatchError:
        """The error when the ranks of a node enter different calls in shared memory."""
        words = dict(zip(self.members, digests, strict=True))
        self.look_up_call(self.rank, words[self.rank])  # which writes this rank's text for the others
        calls = {rank: self.look_up_call(rank, word) for rank, word in words.items()}
        return MismatchError(mismatch_message(calls, self.rank))

    def look_up_call(self, rank: int, digest: int) -> Fingerprint | None:
        """The call of a rank of this node with a digest."""
        return self.consistency.look_up_call(rank, digest) if self.consistency else None

    def algorithms(self, collective: str) -> dict[str, Algorithm]:
        """The schedules of hpccomm for a collective, by name."""
        found = dict(ALGORITHMS.get(collective, {}))
        if collective in self.hierarchical_algorithms:
            found["hierarchical"] = self.hierarchical_algorithms[collective]
        return found

    def decide(self, collective: str, nbytes: int, dtype: str, allowed: tuple[str, ...]) -> tuning.Choice:
        """The one of the ``allowed`` algorithms for a call that names none."""
        key = (collective, nbytes, dtype, allowed)
        if key not in self._decisions:
            self._decisions[key] = self._decide(collective, nbytes, dtype, allowed)
            if len(self._decisions) > 4 * MAX_PLANS:
                self._decisions.pop(next(iter(self._decisions)))
        return self._decisions[key]

    def _decide(self, collective: str, nbytes: int, dtype: str, allowed: tuple[str, ...]) -> tuning.Choice:
        wanted = algorithm_setting(self.settings["HPCCOMM_ALGORITHM"], collective)
        if wanted in allowed:
            return tuning.Choice(wanted, None, "set by HPCCOMM_ALGORITHM")
        return self.table.choose(
            collective, self.layout.count, max(self.layout.per_node), nbytes, dtype, candidates=allowed
        )

    def stray_message_error(self, rank: int, tag: int, expected: int) -> MismatchError:
        """The error when a message of another call arrives."""
        calls: dict[int, Fingerprint | None] = {self.rank: None, rank: None}
        if rank in self.members:
            calls = {self.rank: self.look_up_call(self.rank, expected), rank: self.look_up_call(rank, tag)}
        if None in calls.values():
            return MismatchError(
                f"rank {self.rank} received a message of another call from rank {rank}: {REMEDIES['collective']}, "
                "with the same operation, count and datatype"
            )
        return MismatchError(mismatch_message(calls, self.rank))

    def level(self, name: str) -> MPI.Intracomm:
        """MPI's communicator ``"intra"``, the ranks of this node, or ``"inter"``, those with the same local rank.

        On several nodes both are made at the first request, which is collective.
        """
        if name not in self.levels:
            self._make_level(name)
        made = self.levels[name]
        if made == MPI.COMM_NULL:
            raise ArgumentError(f"rank {self.rank}: {name}_node has been freed: leave it to its communicator's Free")
        if made.Get_attr(context_key()) is None:
            channel = self.layout.channel(self.rank)
            made.Set_attr(context_key(), Context(made, (self, self.members if name == "intra" else channel)))
        return made

    def _make_level(self, name: str) -> None:
        """Make a level; one of one rank without a message."""
        place = self.layout.local_rank(self.rank)
        if self.layout.count > 1:
            colors = {"intra": int(self.layout.nodes[self.rank]), "inter": place}
            made = {each: self.private_comm.Split(color, self.rank) for each, color in colors.items()}
        elif name == "intra" and self.size > 1:
            made = {name: self.private_comm.Split(0, self.rank)}
        else:
            made = {name: MPI.COMM_SELF.Split(0, 0)}
        self.levels |= {each: MPI.Intracomm(level) for each, level in made.items()}

    def close(self) -> None:
        """Free all resources (collective)."""
        if self.queue:
            self.queue.close()
        self.closed, self.stage = True, 0
        for level in self.levels.values():
            if level != MPI.COMM_NULL:
                level.Free()
        for plans in list(self.users):
            plans.close()
        for each in (self._group, self.consistency, self.level_table, self._segment, self.node_memory):
            if each:
                each.close()
        if 1 < len(self.members) < self.size:
            self.node.Free()
        if "private_comm" in vars(self):
            self.private_comm.Free()


@cache
def warn_once(trouble: str) -> None:
    """Say once in a process that the defaults are used, because a file cannot be."""
    watchdog.log_line(f"{trouble}; the defaults are used")


def close_context(comm: MPI.Comm, keyval: int, context: Context) -> None:
    """Free the context of a communicator that MPI frees; when MPI ends, the process frees its memory."""
    if comm not in (MPI.COMM_WORLD, MPI.COMM_SELF):
        context.close()


@cache
def context_key() -> int:
    """The attribute of an MPI communicator that keeps its context; MPI makes keys only after it has started."""
    return MPI.Comm.Create_keyval(delete_fn=close_context)


@cache
def start_compiler() -> None:
    """Compile in a process of its own, one for all communicators."""
    objects.compile_in_background()


@cache
def tell_no_folder() -> None:
    """Say once why a program waits for the compiler at each start, where its results can be kept nowhere."""
    if objects.writable_folder() is None:
        watchdog.log_line(
            "shared memory's functions are compiled anew by every program, as no folder for them can be written: "
            "set HPCCOMM_CACHE to one that can, and run `hpccomm warm`"
        )


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to twice :data:`KEPT_BYTES` of what the program frees for what it allocates next.

    glibc does so once a block of that length has been freed that was mapped for itself (mallopt(3), M_MMAP_THRESHOLD).
    Before, it may give the memory of some arrays of 100 KB back to the kernel in each iteration of a loop, and every
    page is zeroed again; whether it does depends on what else the heap holds, such as the modules of this package.
    """
    np.empty(KEPT_BYTES, np.uint8)


KEPT_BYTES = 1 << 22


def context_of(comm: MPI.Intracomm) -> Context:
    """The context of an MPI communicator; the first request is collective."""
    known: Any = comm.Get_attr(context_key())
    if known is None:
        with watchdog.watch_making(watchdog.find_world_ranks(unwrap(comm)), comm.rank):
            known = Context(comm)
        comm.Set_attr(context_key(), known)
    found: Context = known
    return found


def ranks_of_this_node(comm: MPI.Intracomm) -> MPI.Intracomm:
    """The ranks that share memory with this one, in rank order (collective)."""
    return MPI.Intracomm(comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank))


def create_private_comm(comm: MPI.Intracomm) -> MPI.Intracomm:
    """A communicator of the same ranks for our messages (collective).

    Unlike ``Dup`` this takes over no topology and no hints, and runs no copy callback of the user's attributes.  It
    does not ask for the group: MPICH gives a topology of fewer ranks than its parent the group of the parent.
    """
    return MPI.Intracomm(unwrap(comm).Split(0, comm.rank))


def name_of(comm: MPI.Intracomm) -> tuple[int, str]:
    """A number for a communicator that no other one has, and its ranks of the world as text; by its rank 0."""
    text = f"ranks {format_ranges(watchdog.find_world_ranks(comm))}"
    made[text] = made.get(text, 0) + 1
    number = f" #{made[text]}" if made[text] > 1 else ""
    return (WORLD << 18 | MPI.COMM_WORLD.rank + 1) << 32 | next(numbers), text + number


WORLD = int.from_bytes(os.urandom(2), "little") >> 6
"""Ten bits that tell ranks of equal number apart which were started separately, and then share a communicator."""
numbers, made = count(1), dict[str, int]()
"""What :func:`name_of` has given out."""


def unwrap(comm: MPI.Intracomm) -> MPI.Intracomm:
    """The same MPI communicator as mpi4py's own class."""
    own: type[MPI.Intracomm] = next(each for each in type(comm).__mro__ if each.__module__ == MPI.__name__)
    return own(comm)


def algorithm_setting(setting: str, collective: str) -> str:
    """The value of ``HPCCOMM_ALGORITHM`` for a collective: ``ring`` for all, or ``allreduce=ring,bcast=tree``."""
    for part in filter(None, setting.replace(" ", "").split(",")):
        name, _, value = part.rpartition("=")
        if name in ("", collective):
            return value if value != "auto" else ""
    return ""


def unknown_algorithm_error(who: str, name: Any, names: tuple[str, ...], source: str = "algorithm") -> ArgumentError:
    """The error for an algorithm that is not available in this communicator."""
    return ArgumentError(f"{who}: {source}={name!r} is not available here: use one of {', '.join(names)}")
