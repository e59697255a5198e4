"""A trace of the collective calls of all ranks, on one clock, for Perfetto or Chrome: ``HPCCOMM_TIMELINE=trace.json``.

The flight recorder (:mod:`hpccomm.observe.flight_recorder`) has the last calls of each rank; with the variable it keeps
262,144 of them.  When the program ends each rank makes its part of the file, and rank 0 writes it.  Calls of one
communicator have the same order on all ranks, so the n-th call of one rank is the n-th of another: inside a call a rank
waits until the last rank has begun it, and the trace names that rank.

*Clocks.*  A rank's clock is compared with rank 0's by messages to and fro, of which the fastest counts: its error is
at most half the time of that message.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.observe.flight_recorder import VARIABLE, Event, clock, recorder

MESSAGES = 20
"""Messages to and fro for a comparison of clocks."""
AGREEMENT_SECONDS = 30.0
"""Seconds for which a rank waits at the end for the others; after them it writes a file of its own."""
_MEETINGS = (
    "Allreduce Allgather Allgatherv Reduce_scatter Reduce_scatter_block Alltoall Alltoallv Alltoallw Barrier "
    "Allreduce_view allreduce allgather alltoall barrier reduce scan exscan "
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
    mine = align(found, offset)
    start = world.allreduce(min((each.begin for each in mine), default=sys.maxsize), MPI.MIN)
    hosts = world.allgather(MPI.Get_processor_name())
    kept = world.bcast(last_ranks(world.gather(list_meetings(mine, world.rank))))
    place = {"pid": number_nodes(hosts)[hosts[world.rank]], "tid": world.rank}
    text = encode(list_slices(mine, place, start, by_call(kept)))
    texts = world.gather(text)  # made by each rank, so that many ranks take no longer than one
    if texts is not None:
        save(Path(path), [encode(list_nodes(hosts)), *texts])


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
    """Write a trace."""
    save(path, [encode(build(events, offsets, hosts, ranks)["traceEvents"])])


def save(path: Path, texts: Sequence[str]) -> None:
    """Write a file of encoded events; one that cannot be written is a line on stderr, as the program has ended well."""
    rest = json.dumps(REST | {"otherData": {"program": " ".join(sys.argv)}})
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write('{"traceEvents": [')
            file.write(",\n".join(filter(None, texts)))
            file.write(f"], {rest[1:]}")
    except OSError as error:
        from hpccomm.log import logger

        logger().error(f"{VARIABLE}={path}: {error.strerror}: name a file that can be written")


REST = {"displayTimeUnit": "ms"}
"""What follows the events."""


def encode(events: Sequence[dict[str, Any]]) -> str:
    """Events as JSON, without the brackets of their list."""
    return json.dumps(events)[1:-1]


def build(
    events: Sequence[Sequence[Event]], offsets: Sequence[int], hosts: Sequence[str], ranks: Sequence[int]
) -> dict[str, Any]:
    """The trace in Chrome's format: a process is a node, a thread a rank; waiting is a slice inside its call."""
    aligned = [align(one, offset) for one, offset in zip(events, offsets, strict=True)]
    start = min((each.begin for one in aligned for each in one), default=0)
    last = by_call(last_ranks([list_meetings(one, rank) for rank, one in zip(ranks, aligned, strict=True)]))
    nodes, found = number_nodes(hosts), list_nodes(hosts)
    for rank, host, one in zip(ranks, hosts, aligned, strict=True):
        found += list_slices(one, {"pid": nodes[host], "tid": rank}, start, last)
    return {"traceEvents": found, **REST}


def align(events: Sequence[Event], offset: int) -> list[Event]:
    """The events on the clock of rank 0."""
    return [each._replace(begin=each.begin + offset, end=each.end + offset) for each in events]


def number_nodes(hosts: Iterable[str]) -> dict[str, int]:
    """The process of each node in the trace."""
    return {host: number for number, host in enumerate(dict.fromkeys(hosts))}


def list_nodes(hosts: Iterable[str]) -> list[dict[str, Any]]:
    """The events that name the nodes."""
    named = {"ph": "M", "name": "process_name", "tid": 0}
    return [named | {"pid": node, "args": {"name": f"node {host}"}} for host, node in number_nodes(hosts).items()]


def list_slices(
    events: Sequence[Event], place: dict[str, int], start: int, last: dict[tuple[int, int], Last]
) -> list[dict[str, Any]]:
    """What the trace has of a rank, whose place are its node and its number."""
    from hpccomm.observe.nesting import nest

    named: dict[str, Any] = {"ph": "M", "name": "thread_name", "args": {"name": f"rank {place['tid']}"}}
    found = [named | place]
    for each in events:
        found += slices(each, place, start, last.get((each.comm, each.call)))
    return nest(found)


class Last(NamedTuple):
    """The rank that began a call last."""

    rank: int
    begin: int


def list_meetings(events: Sequence[Event], rank: int) -> npt.NDArray[np.int64]:
    """``(n, 4)``: communicator, number, begin and rank of a rank's calls that wait for all ranks."""
    rows = [(each.comm, each.call, each.begin, rank) for each in events if each.call > 0 and each.name in SYNCHRONISING]
    return np.array(rows, np.int64).reshape(-1, 4)


def last_ranks(meetings: Sequence[npt.NDArray[np.int64]] | None) -> npt.NDArray[np.int64]:
    """Of the meetings of all ranks one row for each call: that of the lowest rank that began it last."""
    rows = np.concatenate(meetings or [np.empty((0, 4), np.int64)])
    comm, call, begin, rank = rows.T
    rows = rows[np.lexsort((-rank, begin, call, comm))]
    following = np.ones(len(rows), bool)
    following[:-1] = (rows[1:, :2] != rows[:-1, :2]).any(axis=1)
    return rows[following]


def by_call(rows: npt.NDArray[np.int64]) -> dict[tuple[int, int], Last]:
    """By communicator and number of the call, the rank that began it last."""
    return {(comm, call): Last(rank, begin) for comm, call, begin, rank in rows.tolist()}


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
