"""The watchdog: a thread that ends calls which can never complete, and reports calls that take long.

*A group is the ranks of one communicator; its processes on this node have their calls in memory that this rank reads
(:mod:`hpccomm.observe.flight_recorder`).*  A call that takes longer than ``HPCCOMM_STALL_SECONDS`` gives one report, by
the first rank that waits in it: who waits in which call, who is missing, and where the Python stacks of all ranks
stand; again after twice the time, and so on.  Ranks of other nodes are asked by messages on a communicator of their
own, where a thread may call MPI beside the program; nothing waits for an answer.  A call beyond a limit of its
communicator is reported, then all ranks are aborted.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain
from typing import Any, TypeVar

from mpi4py import MPI

from hpccomm import settings
from hpccomm.calls.consistency import free_met, leave_program, meet_later
from hpccomm.calls.departures import Launchers, Wire
from hpccomm.calls.fingerprint import format_ranks
from hpccomm.errors import HpccommError
from hpccomm.observe.flight_recorder import (
    INQUIRED,
    REPORTED,
    Call,
    Comm,
    Event,
    Inquiry,
    State,
    clock,
    find_ranks,
    open_ring,
    read_ranks,
    recorder,
)
from hpccomm.performance.units import format_ranges
from hpccomm.transports.polling import LONGEST_SECONDS

PERIOD, QUICK = 0.25, 0.05
"""Seconds between two checks by the watchdog, and while it asks or answers."""
PATIENCE = (2, 8)
"""Periods for which a rank may raise an error itself before the watchdog aborts all: on one node, and on several, where
it compares its call with theirs first (on busy cores half a second was too short)."""
ANSWER_SECONDS, NODE_SECONDS, NODE_TRIES = 3.0, 5.0, 2
"""How long ranks of this node may take to answer, and one of another node, of which so many are asked in turn."""
AWAKE_SECONDS = 2.0
"""A watchdog that has not looked for so long makes no report."""
FLUSH_SECONDS = 0.5
"""Seconds between the last log line and the abort: launchers drop output that they have not read (seen with hydra)."""
EXIT_SECONDS = 10.0
"""How long a rank that ends waits for its own calls, and for ranks that have not made its last calls yet."""
FREE_SECONDS = 0.1
"""How long a rank that frees a communicator waits for the others, before it leaves that to its next one, or the end."""
MOST_LINES = 32
OTHER_NODE = "on another node"

T = TypeVar("T")
CheckTime = Callable[[float], float | None]
"""Of the seconds that the oldest running call has taken, 0 for none: the limit if that is too long, else None."""


def stall_seconds() -> float:
    """Seconds after which the watchdog reports a call (``HPCCOMM_STALL_SECONDS``, 60).

    A wrong value, which :func:`~hpccomm.settings.check_environment` reports, counts as none.
    """
    value = os.environ.get("HPCCOMM_STALL_SECONDS", "")
    return 60.0 if not value or settings.seconds(value) else float(value)


def log_line(sentence: str) -> None:
    """Log one record, by default with a single write to stderr, so that lines of different ranks do not mix."""
    from hpccomm.log import logger

    logger().error(sentence)


class Group:
    """The ranks of one communicator.

    ``nodes`` are the ranks of each node, ``table`` is the consistency table of this one, if it has one, ``wire`` a
    communicator of the same ranks that only the watchdog uses, if it may.  ``of``: the group of which this one's
    communicator is a level, and its ranks there; their processes are found and asked by that group.
    """

    absent = OTHER_NODE
    """What is known of a rank whose process is not found here."""

    def __init__(
        self,
        comm: Comm,
        rank: int,
        nodes: list[tuple[int, ...]],
        table: Any,
        wire: MPI.Intracomm | None = None,
        of: tuple[Group, Sequence[int]] | None = None,
    ) -> None:
        self.comm, self.rank, self.nodes, self.table = comm, rank, nodes, table
        self._parent: Group | None = of[0] if of else None
        self._ranks: Sequence[int] = of[1] if of else ()
        self._checking, self._closed = threading.RLock(), False  # the watchdog, the end of the program, and close
        self._since = ((0, 0), 0.0)
        self._asked: list[tuple[int, int, float, Inquiry]] = []
        """What other nodes have asked and this rank has not answered: who, the number, when, and what was found."""
        self.answers: dict[int, list[State]] = {}
        """The answers of other nodes, by the number of what was asked."""
        self._refused = (0, "", 0.0)
        """The last call that a rank of another node refuses, why, and since when a rank of this node waits in it."""
        self.wire: Wire | None = None
        if wire is not None:
            mine = next(k for k, members in enumerate(nodes) if rank in members)
            self.wire = table.wire = Wire(wire, nodes[(mine + 1) % len(nodes)][0], table.note_departure)

    @property
    def processes(self) -> dict[int, int]:
        """The numbers of the processes of this node's ranks."""
        found: dict[int, int] = self._take_own(self._parent.processes) if self._parent else self.table.processes
        return found

    def _take_own(self, found: dict[int, T]) -> dict[int, T]:
        """What the group of which this one is a level has found of the ranks of both, by this group's ranks."""
        return {rank: found[there] for rank, there in enumerate(self._ranks) if there in found}

    def check_calls(self) -> None:
        """Log that another rank has refused a call which this one has completed; abort one that cannot complete.

        Texts of calls that another rank wants to read are written first.
        """
        with self._checking:
            if self.table and not self._closed:
                self.table.write_wanted_texts()
                self.tell()
                self._check_deadlock()
                self._check_refused()

    def tell(self) -> None:
        """Log that another rank has refused a call which this rank has completed, once for each such call."""
        with self._checking:
            while not self._closed and (refusal := self.table.take_refusal()):
                log_line(refusal)

    def _check_deadlock(self) -> None:
        """Abort all ranks if this rank is in a call that can never complete.

        A rank that can look itself raises the error, and has some time for that.
        """
        calls = self._find_calls()
        reason = self.table.deadlock_reason() if calls[0] else self.table.explain_awaited()
        if reason is None or calls != self._since[0]:
            self._since = (calls if reason else (0, 0), time.monotonic())
        elif time.monotonic() - self._since[1] > PATIENCE[len(self.nodes) > 1] * PERIOD and calls == self._find_calls():
            abort_all(reason)

    def _find_calls(self) -> tuple[int, int]:
        """The call in which this rank is, and that of the request of MPI for which it waits; 0 for none."""
        return self.table.active_seq, self.table.awaited

    def _check_refused(self) -> None:
        """Abort all ranks if one of this node waits in a call that a rank of another node has refused."""
        seq, reason, since = self._refused
        waiting, now = self.table.describe_waiting(seq) if seq else "", time.monotonic()
        if not waiting:
            self._refused = (seq, reason, now)
        elif now - since > PATIENCE[1] * PERIOD:
            abort_all(f"{waiting}, which {reason}")

    def is_first(self, event: Event) -> bool:
        """Whether no rank before this one on this node is in the same call and can report it."""
        for rank, pid in self.processes.items():
            if rank >= self.rank:
                continue
            with open_ring(pid) as ring:
                if ring and ring.is_awake(AWAKE_SECONDS):
                    calls = [(each.comm, each.call, each.name) for each in ring.running()]
                    if (event.comm, event.call, event.name) in calls:
                        return False
        return True

    # Messages between nodes, by the watchdog only

    def send(self, rank: int, tag: int, content: Any) -> None:
        """Send without waiting; only while MPI may be called."""
        assert self.wire is not None
        self.wire.send(json.dumps(content).encode(), rank, tag)

    @property
    def may_ask(self) -> bool:
        """Whether ranks of other nodes can be asked."""
        return self._parent.may_ask if self._parent else self.wire is not None

    @property
    def why_silent(self) -> str:
        """Why ranks of other nodes do not answer."""
        return "its node does not answer" if self.may_ask else NO_THREAD

    def ask(self, rank: int, number: int, comm: int) -> None:
        """Ask where the ranks of the node of ``rank`` stand."""
        if self._parent:
            self._parent.ask(self._ranks[rank], number, comm)
        else:
            self.send(rank, Wire.REQUEST, (number, comm))

    def find_answers(self, number: int, last: bool = False) -> dict[int, State]:
        """What ranks of other nodes have answered; with ``last`` it is forgotten."""
        if self._parent:
            found = self._take_own(self._parent.find_answers(number, last))
            return {rank: each._replace(rank=rank) for rank, each in found.items()}
        states = self.answers.pop(number, []) if last else self.answers.get(number, [])
        return {each.rank: each for each in states}

    def serve(self) -> bool:
        """Receive what other nodes have sent, and answer what is ready; returns whether more is to come soon."""
        if self.wire is None:
            return False
        for source, tag, octets in self.wire.receive():
            content = json.loads(octets)
            if tag == Wire.REQUEST:
                number, comm = content
                self._asked.append((source, number, time.monotonic(), Inquiry(self.processes, comm)))
            elif tag == Wire.REFUSAL:
                self._refused = (*content, time.monotonic())
            else:
                self.answers.setdefault(content[0], []).extend(State.decode(each) for each in content[1])
        self.tell_refused()
        left = []
        for source, number, when, inquiry in self._asked:
            late = time.monotonic() - when > ANSWER_SECONDS
            if inquiry.collect(late) or late:
                self.send(source, Wire.ANSWER, (number, list(inquiry.states.values())))
            else:
                left.append((source, number, when, inquiry))
        self._asked = left
        return bool(left)

    def tell_refused(self) -> None:
        """Tell the ranks of other nodes which call this one refuses, once; only while MPI may be called."""
        refused = self.table.take_own_refusal() if self.wire else None
        for rank in chain.from_iterable(self.nodes):
            if refused and rank not in self.table.members:
                self.send(rank, Wire.REFUSAL, refused)

    def close(self) -> None:
        """Leave the watchdog; its communicator is freed (collective).

        A check under way ends first: it reads memory that is then unmapped.
        """
        with self._checking:
            self._closed = True
        with _mpi:
            _watchdog.groups.pop(self.comm.number, None)
            self.tell_refused()
            wire, self.wire = self.wire, None
            if wire is None:
                return
            self.table.mark_gone(freed=True)
            self.table.tell_gone()
        self.table.wire = None
        free_met()
        wire.meet()  # a message under way could reach the next communicator (seen with MPICH)
        until = time.monotonic() + FREE_SECONDS
        while not (has_met := wire.has_met()) and time.monotonic() < until:
            time.sleep(LONGEST_SECONDS)
        if has_met:
            wire.comm.Free()
        else:
            meet_later(wire)


class NewGroup(Group):
    """The ranks of the world that are making a communicator of ours, which has no consistency table yet."""

    absent, why_silent = "in no communicator of hpccomm yet, or on another node", ""

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self._world = ranks
        text = f"ranks {format_ranges(self._world)}"
        made = Comm(recorder(), 1 << 61 | hash(self._world) & (1 << 60) - 1, text)
        super().__init__(made, rank, [tuple(range(len(ranks)))], None)

    @property
    def processes(self) -> dict[int, int]:
        """The ranks of this node that have made a communicator of ours, or make one."""
        places, (found, _) = {rank: k for k, rank in enumerate(self._world)}, find_ranks(os.getpid(), launcher=0)
        return {places[rank]: pid for rank, pid in found.items() if rank in places}


class Report:
    """Asks all ranks of a group where they stand; ``step`` until it has made the report."""

    numbers = 0

    def __init__(self, group: Group, comm: int) -> None:
        Report.numbers += 1
        self.group, self.comm, self._number = group, comm, Report.numbers
        self.began_call = 0
        """When the call began that is reported."""
        self._began, self._inquiry = time.monotonic(), Inquiry(group.processes, comm)
        self._nodes = [each for each in group.nodes if group.rank not in each] if group.may_ask else []
        self._tries = 0
        self._wait = list(self._nodes)
        self._ask()

    def _ask(self) -> None:
        """Ask one rank of each node that has not answered."""
        for members in self._wait:
            self.group.ask(members[self._tries % len(members)], self._number, self.comm)
        self._tries += 1
        self._until = time.monotonic() + NODE_SECONDS

    def step(self) -> bool:
        """Look for answers; returns whether the report is made."""
        here = self._inquiry.collect(time.monotonic() - self._began > ANSWER_SECONDS)
        there = self.group.find_answers(self._number)
        self._wait = [each for each in self._wait if not there.keys() & set(each)]
        if self._wait and time.monotonic() > self._until and self._tries < NODE_TRIES:
            self._ask()
        if not here or (self._wait and time.monotonic() <= self._until):
            return False
        found = self.group.find_answers(self._number, last=True) | self._inquiry.states
        for rank in range(sum(map(len, self.group.nodes))):
            found.setdefault(rank, State(rank, 0, False, self.group.absent, None, self.group.why_silent))
        self.finish(found)
        return True

    def finish(self, states: dict[int, State]) -> None:
        """Use the states of all ranks."""
        raise NotImplementedError


NO_THREAD = "MPI without THREAD_MULTIPLE lets no thread ask it"


class StallReport(Report):
    """The report of a call that takes long."""

    def __init__(self, group: Group, event: Event, end: str = "") -> None:
        """``end``: why all ranks are aborted after the report; empty if they are not."""
        super().__init__(group, event.comm)
        self._event, self.began_call, self._end = event, event.begin, end

    def finish(self, states: dict[int, State]) -> None:
        """Log the report, unless a rank of another node before this one does."""
        event, me = self._event, self.group.rank
        first = min((rank for rank, each in states.items() if each.waits and each.call == event.call), default=me)
        awake = states[first].stacks is not None
        elsewhere = first < me and awake and first not in self.group.processes and event.call > 0
        over = self._end and not any(each.begin == event.begin for each in recorder().ring.running())
        if elsewhere or over:
            return
        log_line("\n".join((self.summary(states), *list_states(states, self.order))))
        if self._end or os.environ.get("HPCCOMM_STALL_ACTION") == "abort":
            abort_all(self._end or f"rank {me} aborts all ranks: HPCCOMM_STALL_ACTION=abort")

    def is_missing(self, state: State) -> bool:
        """Whether a rank has not entered the call; one without a number is missed by ranks that are in no call."""
        return state.call < self._event.call if self._event.call > 0 else not state.waits

    def order(self, state: State) -> bool:
        """Whether a rank comes last in the list: one that waits as it should."""
        return state.waits and state.call == self._event.call and not state.condition

    def summary(self, states: dict[int, State]) -> str:
        """Who waits, for how long, and who is missing."""
        event = self._event
        unseen = [rank for rank, each in sorted(states.items()) if each.text == NewGroup.absent]
        known = {rank: each for rank, each in states.items() if each.text not in (OTHER_NODE, NewGroup.absent)}
        missing = [rank for rank, each in sorted(known.items()) if self.is_missing(each)]
        silent = [rank for rank, each in sorted(states.items()) if each.condition and rank not in missing]
        parts = [
            f"rank {self.group.rank}: {event} not complete after {(clock() - event.begin) / 1e9:.0f} s",
            *([f"missing: {format_ranks(missing)}"] if missing else [] if unseen else ["no rank is missing"]),
            *([f"missing, or on another node: {format_ranks(unseen)}"] if unseen else []),
            *([f"no answer: {format_ranks(silent)}"] if silent else []),
        ]
        return "; ".join(parts)


class NodesReport(Report):
    """The answer to a process of this node that asks for the ranks of other nodes."""

    def __init__(self, group: Group, number: int) -> None:
        super().__init__(group, 0)
        self._inquired = number

    def finish(self, states: dict[int, State]) -> None:
        """Write the states of other nodes' ranks to the recorder."""
        recorder().write_report(
            self._inquired, [each for rank, each in sorted(states.items()) if rank not in self.group.processes]
        )


def list_states(states: dict[int, State], last: Any) -> Iterator[str]:
    """A line for the ranks of each state, those with ``last`` at the end."""
    lines: dict[str, list[int]] = {}
    for rank, state in sorted(states.items(), key=lambda each: (last(each[1]), each[0])):
        lines.setdefault(str(state), []).append(rank)
    for number, (text, ranks) in enumerate(lines.items()):
        if number == MOST_LINES:
            yield f"  … and {len(lines) - MOST_LINES} more lines: hpccomm stacks {os.getpid()}"
            return
        yield f"  {format_ranks(ranks)}: {text}"


class Watchdog:
    """The thread, and what it watches."""

    def __init__(self) -> None:
        self.groups: dict[int, Group] = {}
        self.thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self.calls_mpi = True
        """False as soon as MPI ends."""
        self.limits: dict[int, CheckTime] = {}
        """What tells whether a running call takes too long, by communicator."""
        self._ending = set[int]()
        """When the running calls began that are beyond their limit and have a report."""
        self._reports: list[Report] = []
        self._reported: dict[tuple[int, int], int] = {}
        """How often a running call has been reported, by communicator and begin."""

    def start(self) -> None:
        """Start the thread at the first group."""
        with self._starting:
            if self.thread is None:
                self.thread = threading.Thread(target=self.run_watchdog, name="hpccomm-watchdog", daemon=True)
                self.thread.start()

    def run_watchdog(self) -> None:
        """Look after the calls for ever, also after an error of its own."""
        launchers, busy, told = Launchers(), False, False
        while True:
            time.sleep(QUICK if busy else PERIOD)
            try:
                busy = self._look(launchers)
            except Exception:
                if not told:
                    log_line(f"an error of the watchdog, which goes on:\n{traceback.format_exc()}")
                told = True

    def _look(self, launchers: Launchers) -> bool:
        """Look after the calls once; returns whether more is to be done soon."""
        loss = launchers.describe_loss()
        if loss:
            end_orphan(loss)
        recorder().answer_request()
        for group in list(self.groups.values()):
            with contextlib.suppress(ValueError):  # another thread frees the communicator
                group.check_calls()
        busy = False
        with _mpi:
            if self.calls_mpi:
                busy = any([each.serve() for each in list(self.groups.values())])
                self._begin_reports()
                self._check_limits()
                self._reports = [each for each in self._reports if not self._is_over(each)]
        return busy or bool(self._reports)

    def _is_over(self, report: Report) -> bool:
        """Continue a report; returns whether it needs no more steps, as after an error of its own."""
        try:
            return self.groups.get(report.group.comm.number) is not report.group or report.step()
        except Exception as error:
            log_line(f"rank {report.group.rank}: a report ends by an error: {type(error).__name__}: {error}")
            return True

    def _begin_reports(self) -> None:
        """Begin reports of calls that have taken too long, and those that others have asked for."""
        ring, limit = recorder().ring, max(PERIOD, stall_seconds())
        running = {(abs(each.comm), each.begin): each for each in ring.running()}
        self._reported = {key: times for key, times in self._reported.items() if key in running}
        for each in self._reports:
            running.pop((abs(each.comm), each.began_call), None)
        for key, event in running.items():
            group, times = self.groups.get(key[0]), self._reported.get(key, 0)
            if group and clock() - event.begin > limit * 1e9 * 2**times:
                self._reported[key] = times + 1
                if group.is_first(event):
                    self._reports.append(StallReport(group, event))
        wanted = ring.words[INQUIRED]
        if ring.words[REPORTED] < wanted and not any(isinstance(each, NodesReport) for each in self._reports):
            group = max(list(self.groups.values()), key=lambda each: sum(map(len, each.nodes)), default=None)
            if group:
                self._reports.append(NodesReport(group, wanted))

    def _check_limits(self) -> None:
        """Begin the report of a call that has taken too long, at whose end all ranks are aborted.

        The first rank of a node that waits in it makes the report.
        """
        now, running = clock(), recorder().ring.running()
        self._ending &= {each.begin for each in running}
        for number, check in list(self.limits.items()):
            calls, limit = [each for each in running if abs(each.comm) == number], None
            with contextlib.suppress(HpccommError, ValueError):  # another thread frees the communicator
                limit = check((now - calls[0].begin) / 1e9 if calls else 0.0)
            if limit is None or calls[0].begin in self._ending:
                continue
            reason = f"rank {recorder().ring.head['rank'][0]} aborts all ranks: {calls[0]} timed out after {limit:g} s"
            group = self.groups.get(number)
            if group is None:
                abort_all(reason)
            elif group.is_first(calls[0]):
                self._ending.add(calls[0].begin)
                self._reports.append(StallReport(group, calls[0], reason))

    def end(self, leaves: bool = False) -> None:
        """Call MPI no more, which ends, and look a last time whether ranks have refused calls of this one.

        ``leaves``: tell the other ranks that this one makes no more calls.
        """
        until = time.monotonic() + EXIT_SECONDS
        try:
            for group in [each for each in list(self.groups.values()) if each.table and self.calls_mpi]:
                with contextlib.suppress(ValueError):  # another thread frees the communicator
                    while group.table.is_ahead() and time.monotonic() < until:
                        group.table.progress()
                        time.sleep(LONGEST_SECONDS)
                    group.tell()
        finally:
            with _mpi:
                for group in list(self.groups.values()) if self.calls_mpi else []:
                    with contextlib.suppress(ValueError):
                        group.tell_refused()
                self.calls_mpi = False
            if leaves:
                leave_program()


_mpi = threading.RLock()
"""Held while the watchdog calls MPI."""
_watchdog = Watchdog()


@cache
def end_with_mpi() -> None:
    """Let the watchdog call MPI no more when MPI or the program ends."""
    keyval = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, value: _watchdog.end(leaves=True))
    MPI.COMM_SELF.Set_attr(keyval, None)
    atexit.register(_watchdog.end)


@contextlib.contextmanager
def watch_making(ranks: Sequence[int], rank: int, name: str = "Communicator") -> Iterator[None]:
    """Let the watchdog report that some ``ranks`` of the world make a communicator, and others do not.

    ``rank`` is this one's among them, ``name`` that of the call.
    """
    if len(ranks) == 1 or rank < 0 or os.environ.get("HPCCOMM_CONSISTENCY") == "off":
        yield
        return
    recorder().set_rank(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    group = NewGroup(ranks, rank)
    watch(group)
    try:
        with Call(group.comm, name, inside=True):
            yield
    finally:
        group.close()


def find_world_ranks(of: MPI.Intracomm | MPI.Group) -> Sequence[int]:
    """The ranks of the world that a communicator or a group has."""
    if of == MPI.COMM_WORLD:
        return range(of.size)
    world, group = MPI.COMM_WORLD.Get_group(), of if isinstance(of, MPI.Group) else of.Get_group()
    ranks = group.Translate_ranks(list(range(group.size)), world)
    for each in (world, *([group] if group is not of else [])):
        each.Free()
    return tuple(ranks)


def watch(group: Group) -> None:
    """Let the watchdog look after a group."""
    end_with_mpi()
    _watchdog.groups[group.comm.number] = group
    _watchdog.start()


def limit_calls(comm: int, check: CheckTime | None) -> None:
    """Let the watchdog ask ``check`` several times a second whether calls of a communicator take too long.

    Then it reports the call as one that takes long, and aborts all ranks; with None it asks no more.
    """
    if check is None:
        _watchdog.limits.pop(comm, None)
        return
    end_with_mpi()
    _watchdog.limits[comm] = check
    _watchdog.start()


def forget_watchdog() -> None:
    """A child of fork has no watchdog; its groups belong to its parent."""
    global _mpi  # noqa: PLW0603
    _mpi = threading.RLock()
    _watchdog.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=forget_watchdog)


def list_waiting(seconds: float) -> str:
    """A line for each rank of this node that is in a call, and where; takes at most so many seconds."""
    pids = {pid for group in list(_watchdog.groups.values()) for pid in group.processes.values()} - {os.getpid()}
    inquiry, until = Inquiry({rank: pid for pid, rank, _ in read_ranks(pids)}, 0), time.monotonic() + seconds
    while not inquiry.collect(time.monotonic() > until):
        time.sleep(QUICK)
    waiting = {rank: each for rank, each in inquiry.states.items() if each.waits}
    return "".join(f"{line}\n" for line in list_states(waiting, lambda state: False))


def end_orphan(reason: str) -> None:
    """End this process, which nobody waits for any more."""
    with contextlib.suppress(OSError, ValueError):
        log_line(reason)
    os.kill(os.getpid(), signal.SIGKILL)  # MPI cannot end in order without its launcher


def abort_all(reason: str) -> None:
    """Log the reason and abort all ranks."""
    log_line(reason)
    time.sleep(FLUSH_SECONDS)
    MPI.COMM_WORLD.Abort(1)
