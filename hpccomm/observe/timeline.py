"""A trace of the collective calls of all ranks, on one clock, for Perfetto or Chrome: ``HPCCOMM_TIMELINE=trace.json``.

The flight recorder (:mod:`hpccomm.observe.flight_recorder`) has the last calls of each rank; with the variable it keeps
262,144 of them.  When the program ends the ranks send them to rank 0, which writes one file.  Calls of one communicator
have the same order on all ranks, so the n-th call of one rank is the n-th of another: inside a call a rank waits until
the last rank has begun it, and the trace names that rank.

*Clocks.*  A rank's clock is compared with rank 0's by messages to and fro, of which the fastest counts: its error is
at most half the time of that message.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpccomm.observe.flight_recorder import VARIABLE, Event, clock, recorder
from hpccomm.observe.nesting import nest

MESSAGES = 20
"""Messages to and fro for a comparison of clocks."""
AGREEMENT_SECONDS = 30.0
"""Seconds for which a rank waits at the end for the others; after them it writes a file of its own."""
_MEETINGS = (
    "Allreduce Allgather Allgatherv Reduce_scatter Reduce_scatter_block Alltoall Alltoallv Alltoallw Barrier "
    "Allreduce_view allreduce allgather alltoall barrier "
    "sparse_allgather sparse_allreduce onebit_allgather onebit_allreduce"
)
SYNCHRONISING = frozenset(_MEETINGS.split())
"""Calls that no rank completes before every rank has begun them."""


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part of the program in the trace: ``with part("forward"): ...``; nothing where no trace is recorded."""
    if os.environ.get(VARIABLE):
        with recorder().part(name):
            yield
    else:
        yield


def start() -> None:
    """Write the file when the program ends, if it is wanted."""
    if os.environ.get(VARIABLE):
        atexit.register(finish)


def finish() -> None:
    """Write the trace of all ranks (collective); where a rank does not come, that of this rank alone."""
    from mpi4py import MPI

    path = os.environ.get(VARIABLE, "")
    if not path or not MPI.Is_initialized() or MPI.Is_finalized():
        return
    world, found = MPI.COMM_WORLD, [each for each in recorder().ring.events() if each.end]
    if not all_arrive(world):
        write(Path(f"{path}.rank{world.rank}"), [found], [0], [""], [world.rank])
        return
    offset = compare_clocks(world)
    mine = (list(map(tuple, found)), offset, MPI.Get_processor_name())
    gathered = world.gather(mine)
    if gathered is not None:
        events, offsets, names = zip(*gathered, strict=True)
        ranks = list(range(world.size))
        write(Path(path), [[Event(*each) for each in one] for one in events], list(offsets), list(names), ranks)


def all_arrive(world: Any) -> bool:
    """Whether all ranks come to the end of the program in time: the same on all that come, late or not.

    Rank 0 asks every rank, which answers that it waits, or that it has given up before; a rank that waits is then told
    whether all do.
    """
    until = time.monotonic() + AGREEMENT_SECONDS
    if world.rank == 0:
        others = range(1, world.size)
        _sent.extend(world.isend(True, rank, ASK) for rank in others)
        together = all([receive(world, rank, ANSWER, until) for rank in others])
        _sent.extend(world.isend(together, rank, DECISION) for rank in others)
        return together
    waits = receive(world, 0, ASK, until)
    _sent.append(world.isend(waits, 0, ANSWER))
    return waits and bool(world.recv(source=0, tag=DECISION))


ASK, ANSWER, DECISION = 23464, 23465, 23466
"""Tags."""
_sent: list[Any] = []
"""Messages that a rank which has ended does not receive; their memory is kept."""


def receive(world: Any, rank: int, tag: int, until: float) -> bool:
    """The content of a message; False if it has not come until then."""
    while not world.Iprobe(rank, tag):
        if time.monotonic() > until:
            return False
        time.sleep(0.001)
    return bool(world.recv(source=rank, tag=tag))


def compare_clocks(world: Any) -> int:
    """Nanoseconds to add to this rank's clock for rank 0's (collective)."""
    mine, theirs = np.zeros(1, np.int64), np.zeros(1, np.int64)
    best, offset = sys.maxsize, 0
    for rank in range(1, world.size):
        for _ in range(MESSAGES):
            if world.rank == 0:
                world.Recv(theirs, rank)
                mine[0] = clock()
                world.Send(mine, rank)
            elif world.rank == rank:
                sent = clock()
                world.Send(mine, 0)
                world.Recv(theirs, 0)
                back = clock()
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
            found += slices(each, place, start, last.get((each.comm, each.call)))
    return {"traceEvents": nest(found), "displayTimeUnit": "ms", "otherData": {"program": " ".join(sys.argv)}}


class Last(NamedTuple):
    """The rank that began a call last."""

    rank: int
    begin: int


def last_ranks(events: Sequence[Sequence[Event]], ranks: Sequence[int]) -> dict[tuple[int, int], Last]:
    """By communicator and number of the call, the rank that began it last."""
    found: dict[tuple[int, int], Last] = {}
    for rank, one in zip(ranks, events, strict=True):
        for each in one:
            if each.call > 0 and each.name in SYNCHRONISING:
                key = each.comm, each.call
                if key not in found or each.begin > found[key].begin:
                    found[key] = Last(rank, each.begin)
    return found


def slices(each: Event, place: dict[str, int], start: int, last: Last | None) -> Iterator[dict[str, Any]]:
    """The slice of an event, and inside it that of waiting for the last rank."""
    args: dict[str, Any] = {"bytes": each.nbytes, "communicator": each.label} if each.comm else {}
    if each.call > 0:
        args |= {"call": each.call, "text": each.text}
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
