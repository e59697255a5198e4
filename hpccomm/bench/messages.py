"""Point-to-point: latency, bandwidth one way and both ways, between ranks 0 and 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.bench.loop import LARGE, Options, percentile

WINDOW = 64
"""Messages in flight in the bandwidth tests."""


class Test(NamedTuple):
    """A point-to-point test."""

    title: str
    column: str
    smallest: int
    calls: tuple[int, int]
    """Timed and untimed calls up to 8 KiB."""
    large_calls: tuple[int, int]
    run: Callable[[Any, int, int, int, Options, int], Any]


class Outcome(NamedTuple):
    """One size: µs, or 10^6 bytes a second."""

    bytes: int
    value: float
    samples: Any
    iterations: int
    validated: bool | None


def measure_messages(
    comm: Any, name: str, sizes: Iterable[int], options: Options, window: int = WINDOW
) -> Iterator[Outcome]:
    """Measure a point-to-point test at each size (collective over two ranks)."""
    test = TESTS[name]
    for size in sizes:
        timed, untimed = test.calls if size <= LARGE else test.large_calls
        timed, untimed = options.iterations or timed, untimed if options.warmup is None else options.warmup
        good = exchanged(comm, size) if options.check else None
        samples = test.run(comm, size, timed, untimed, options, window)
        yield Outcome(size, float(samples.mean()), samples, timed, good)


def exchanged(comm: Any, size: int) -> bool:
    """Whether a message arrives as it was sent, both ways."""
    peer = 1 - comm.rank
    mine = ((np.arange(size) * 7 + comm.rank * 13) % 251).astype("u1")
    theirs = np.zeros(size, "u1")
    comm.Sendrecv(mine, peer, 0, theirs, peer, 0)
    good = bool((theirs == (np.arange(size) * 7 + peer * 13) % 251).all())
    return bool(comm.allreduce(good, MPI.LAND))


def latency(comm: Any, size: int, timed: int, untimed: int, options: Options, window: int) -> Any:
    """Half of there and back, microseconds."""
    buffer = np.zeros(size, "u1")
    samples = np.empty(timed)
    send, receive = comm.Send, comm.Recv
    for k in range(-untimed, timed):
        began = perf_counter()
        if comm.rank == 0:
            send(buffer, 1, 1)
            receive(buffer, 1, 1)
        else:
            receive(buffer, 0, 1)
            send(buffer, 0, 1)
        if k >= 0:
            samples[k] = (perf_counter() - began) * 5e5
    return samples


def bandwidth(comm: Any, size: int, timed: int, untimed: int, options: Options, window: int) -> Any:
    """A window of messages one way, a short answer; 10^6 bytes a second."""
    return windows(comm, size, timed, untimed, window, both=False)


def both_ways(comm: Any, size: int, timed: int, untimed: int, options: Options, window: int) -> Any:
    """A window of messages each way."""
    return windows(comm, size, timed, untimed, window, both=True)


def windows(comm: Any, size: int, timed: int, untimed: int, window: int, both: bool) -> Any:
    """Bandwidth of each window, as rank 0 sees it."""
    out, into, answer = np.zeros(size, "u1"), np.zeros(size, "u1"), np.zeros(4, "u1")
    peer, samples = 1 - comm.rank, np.empty(timed)
    sends, receives = both or comm.rank == 0, both or comm.rank == 1
    for k in range(-untimed, timed):
        began = perf_counter()
        requests = [comm.Irecv(into, peer, 2) for _ in range(window)] if receives else []
        requests += [comm.Isend(out, peer, 2) for _ in range(window)] if sends else []
        MPI.Request.Waitall(requests)
        if comm.rank == 0:
            comm.Recv(answer, 1, 3)
        else:
            comm.Send(answer, 0, 3)
        if k >= 0:
            samples[k] = size * window * (2 if both else 1) / 1e6 / (perf_counter() - began)
    return comm.bcast(samples)


def tail(outcome: Outcome, p: int) -> float:
    """A percentile of an outcome."""
    return percentile(outcome.samples, p)


TESTS = {
    "latency": Test("Latency", "Avg Latency(us)", 0, (10000, 100), (1000, 10), latency),
    "bw": Test("Bandwidth", "Bandwidth (MB/s)", 1, (100, 10), (20, 2), bandwidth),
    "bibw": Test("Bi-Directional Bandwidth", "Bandwidth (MB/s)", 1, (100, 10), (20, 2), both_ways),
}
