"""A trace of the collective calls of all ranks, on one clock, for Perfetto or Chrome: ``HPCCOMM_TIMELINE=trace.json``.

Without the variable nothing is recorded, and the methods of communicators are untouched.  With it, each rank keeps the
last :data:`KEPT` calls (name, begin, end, bytes, communicator).  When the program ends the ranks send them to rank 0,
which writes one file.  Calls of one communicator have the same order on all ranks, so the n-th call of one rank is the
n-th of another: inside a call a rank waits until the last rank has begun it, and the trace names that rank.

*Clocks.*  A rank's clock is compared with rank 0's by messages to and fro, of which the fastest counts: its error is
at most half the time of that message.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpccomm.observe.nesting import nest

VARIABLE = "HPCCOMM_TIMELINE"
KEPT = 200_000
"""Events that a rank keeps; older ones are dropped."""
MESSAGES = 20
"""Messages to and fro for a comparison of clocks."""
AGREEMENT_SECONDS = 30.0
"""Seconds for which a rank waits at the end for the others; after them it writes a file of its own."""
_MEETINGS = (
    "Allreduce Allgather Allgatherv Reduce_scatter Reduce_scatter_block Alltoall Alltoallv Alltoallw Barrier "
    "Allreduce_view allreduce allgather alltoall barrier "
    "sparse_allgather sparse_allreduce onebit_allgather onebit_allreduce"
)
_OTHERS = "Bcast Reduce Gather Gatherv Scatter Scatterv Scan Exscan bcast reduce gather scatter scan exscan"
SYNCHRONISING = frozenset(_MEETINGS.split())
"""Calls that no rank completes before every rank has begun them."""
COLLECTIVES = SYNCHRONISING | frozenset(_OTHERS.split())
"""The methods that are recorded."""


class Event(NamedTuple):
    """One call, or one part of a program, on one rank; times in nanoseconds on this rank's clock."""

    name: str
    begin: int
    end: int
    nbytes: int
    comm: str
    """The communicator; empty for a part of the program."""
    number: int
    """The number of the call on its communicator; -1 inside another recorded call."""
    depth: int
    """0: not inside another recorded call."""


class Recorder:
    """The events of this rank."""

    def __init__(self, kept: int = KEPT, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.events: deque[Event] = deque(maxlen=kept)
        self.clock, self.place = clock, threading.local()
        self.numbers: dict[str, int] = defaultdict(int)
        self.groups: dict[tuple[int, ...], int] = defaultdict(int)

    def wrap(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, recorded."""

        @functools.wraps(method)
        def recording(comm: Any, *args: Any, **named: Any) -> Any:
            label = comm.__dict__.get("_timeline_label") or self.label(comm)
            depth, number = self.depth, -1
            if not depth:
                number = self.numbers[label]
                self.numbers[label] = number + 1
            self.place.depth = depth + 1
            begin = self.clock()
            try:
                return method(comm, *args, **named)
            finally:
                end = self.clock()
                self.place.depth = depth
                self.events.append(Event(name, begin, end, count_bytes(args), label, number, depth))

        return recording

    @property
    def depth(self) -> int:
        """The number of recorded calls in which this thread is."""
        return getattr(self.place, "depth", 0)

    def label(self, comm: Any) -> str:
        """The name of a communicator, the same on all of its ranks: its ranks of the world, and a count of those."""
        from mpi4py import MPI

        group, world = comm.private_comm.Get_group(), MPI.COMM_WORLD.Get_group()
        ranks = tuple(group.Translate_ranks(list(range(group.size)), world))
        number = self.groups[ranks] = self.groups[ranks] + 1
        found = f"ranks {shorten(ranks)}" + (f" #{number}" if number > 1 else "")
        comm.__dict__["_timeline_label"] = found
        return found

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Record a part of the program."""
        begin = self.clock()
        try:
            yield
        finally:
            self.events.append(Event(name, begin, self.clock(), 0, "", 0, self.depth))


def shorten(ranks: Sequence[int]) -> str:
    """Ranks as text: ``0-3,8``."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and found[-1][-1] == rank - 1:
            found[-1].append(rank)
        else:
            found.append([rank])
    return ",".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in found)


def count_bytes(args: Sequence[Any]) -> int:
    """The bytes of the first array among the arguments of a call; 0 where there is none."""
    for each in args:
        first = each[0] if isinstance(each, (list, tuple)) and each else each
        nbytes = getattr(first, "nbytes", None)
        if isinstance(nbytes, int):
            return nbytes
    return 0


recorder: Recorder | None = None


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part of the program in the trace: ``with part("forward"): ...``; nothing where no trace is recorded."""
    if recorder is None:
        yield
    else:
        with recorder.part(name):
            yield


def record(communicator: type) -> None:
    """Record the collective methods of a class from now on, and write the file when the program ends."""
    global recorder  # noqa: PLW0603
    if recorder is not None:
        return
    recorder = Recorder()
    for name in COLLECTIVES:
        method = getattr(communicator, name, None)
        if method is not None:
            setattr(communicator, name, recorder.wrap(name, method))
    atexit.register(finish, recorder)


def finish(found: Recorder) -> None:
    """Write the trace of all ranks (collective); where a rank does not come, that of this rank alone."""
    from mpi4py import MPI

    path = os.environ.get(VARIABLE, "")
    if not path or not MPI.Is_initialized() or MPI.Is_finalized():
        return
    world = MPI.COMM_WORLD
    if not all_arrive(world):
        write(Path(f"{path}.rank{world.rank}"), [list(found.events)], [0], [""], [world.rank])
        return
    offset = compare_clocks(world)
    mine = (list(map(tuple, found.events)), offset, MPI.Get_processor_name())
    gathered = world.gather(mine)
    if gathered is not None:
        events, offsets, names = zip(*gathered, strict=True)
        ranks = list(range(world.size))
        write(Path(path), [[Event(*each) for each in one] for one in events], list(offsets), list(names), ranks)


def all_arrive(world: Any) -> bool:
    """Whether all ranks come to the end of the program."""
    request, until = world.Ibarrier(), time.monotonic() + AGREEMENT_SECONDS
    while not request.Test():
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return True


def compare_clocks(world: Any) -> int:
    """Nanoseconds to add to this rank's clock for rank 0's (collective)."""
    mine, theirs = np.zeros(1, np.int64), np.zeros(1, np.int64)
    best, offset = sys.maxsize, 0
    for rank in range(1, world.size):
        for _ in range(MESSAGES):
            if world.rank == 0:
                world.Recv(theirs, rank)
                mine[0] = time.perf_counter_ns()
                world.Send(mine, rank)
            elif world.rank == rank:
                sent = time.perf_counter_ns()
                world.Send(mine, 0)
                world.Recv(theirs, 0)
                back = time.perf_counter_ns()
                if back - sent < best:
                    best, offset = back - sent, int(theirs[0]) - (sent + back) // 2
    return offset


def write(
    path: Path, events: Sequence[Sequence[Event]], offsets: Sequence[int], hosts: Sequence[str], ranks: Sequence[int]
) -> None:
    """Write the trace; a file that cannot be written is a line on stderr, as the program itself has ended well."""
    trace = build(events, offsets, hosts, ranks)
    try:
        path.write_text(json.dumps(trace), encoding="utf-8")
    except OSError as error:
        from hpccomm.log import logger

        logger().error(f"{VARIABLE}={path}: {error.strerror}: name a file that can be written")


def build(
    events: Sequence[Sequence[Event]], offsets: Sequence[int], hosts: Sequence[str], ranks: Sequence[int]
) -> dict[str, Any]:
    """The trace in Chrome's format: a process is a node, a thread a rank; waiting is a slice inside its call."""
    aligned = [
        [each._replace(begin=each.begin + offset, end=each.end + offset) for each in one]
        for one, offset in zip(events, offsets, strict=True)
    ]
    start = min((each.begin for one in aligned for each in one), default=0)
    nodes = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    found: list[dict[str, Any]] = []
    for host, node in nodes.items():
        found.append({"ph": "M", "name": "process_name", "pid": node, "tid": 0, "args": {"name": f"node {host}"}})
    last = last_ranks(aligned, ranks)
    for rank, host, one in zip(ranks, hosts, aligned, strict=True):
        place = {"pid": nodes[host], "tid": rank}
        found.append({"ph": "M", "name": "thread_name", **place, "args": {"name": f"rank {rank}"}})
        for each in one:
            found += slices(each, place, start, last.get((each.comm, each.number)) if each.depth == 0 else None)
    return {"traceEvents": nest(found), "displayTimeUnit": "ms", "otherData": {"program": " ".join(sys.argv)}}


class Last(NamedTuple):
    """The rank that began a call last."""

    rank: int
    begin: int


def last_ranks(events: Sequence[Sequence[Event]], ranks: Sequence[int]) -> dict[tuple[str, int], Last]:
    """By communicator and number of the call, the rank that began it last."""
    found: dict[tuple[str, int], Last] = {}
    for rank, one in zip(ranks, events, strict=True):
        for each in one:
            if each.depth == 0 and each.name in SYNCHRONISING:
                key = each.comm, each.number
                if key not in found or each.begin > found[key].begin:
                    found[key] = Last(rank, each.begin)
    return found


def slices(each: Event, place: dict[str, int], start: int, last: Last | None) -> Iterator[dict[str, Any]]:
    """The slice of an event, and inside it that of waiting for the last rank."""
    args: dict[str, Any] = {"bytes": each.nbytes, "communicator": each.comm} if each.comm else {}
    if each.depth == 0 and each.comm:
        args["call"] = each.number
    kind = "collective" if each.comm else "part"
    yield {"ph": "X", "name": each.name, "cat": kind, **place, **times(each.begin, each.end, start), "args": args}
    if last is not None and last.rank != place["tid"] and each.name in SYNCHRONISING and last.begin > each.begin:
        waited = times(each.begin, min(last.begin, each.end), start)
        yield {
            "ph": "X",
            "name": f"wait for rank {last.rank}",
            "cat": "wait",
            **place,
            **waited,
            "args": {"rank": last.rank},
        }


def times(begin: int, end: int, start: int) -> dict[str, float]:
    """Begin and duration in microseconds."""
    return {"ts": (begin - start) / 1000, "dur": (end - begin) / 1000}
