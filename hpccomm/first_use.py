"""Compares an algorithm of ours with native MPI on machines where nothing was measured, at the first use of a size.

``auto`` takes what the tuning table says was faster.  The rows of one node were measured on one processor with a few
ranks.  Elsewhere the first call of a collective in a size class runs both on scratch memory, in turns: a few
milliseconds, with medians that all ranks share, so all of them decide alike, at this call.  Later calls of the class
keep the decision, and so do later programs of the user, by a file beside the compiled functions, unless the machine was
busy.  What all comparisons of a communicator may take is bounded; a class that is not compared any more stays native.

Sums of floating-point numbers may round differently in the two algorithms.  ``reproducible=True`` takes no part.
``HPCCOMM_GUARD=off`` compares nothing and takes the table as it is; ``hpccomm tune --freeze`` pins what was decided.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls.blocks import EQUAL, NONE, SIGNATURES, Signature
from hpccomm.kernels import objects
from hpccomm.performance import probe, tuning
from hpccomm.performance.tuning import BLOCKWISE, Row, size_class

ROUNDS = 5
"""Turns of each algorithm; their median counts."""
SECONDS = 0.02
"""What one comparison may take beyond its first round."""
ALL_SECONDS, SHARE = 0.06, 0.02
"""What all comparisons of a communicator may take, and the share of its further life that is added."""
MOST_BYTES = 1 << 22
"""Longer vectors are compared at this length."""
MOST_REPEATS = 64
SPREAD = 2.0
"""On an idle machine the middle round takes less than so many times the best one."""
Run = Callable[[], Any]


class FirstUse:
    """The comparisons of one communicator, which may take so many seconds in all."""

    def __init__(self, planner: Any, seconds: float | None = None) -> None:
        self._planner, self._began, self._spent = planner, time.monotonic(), 0.0
        self._seconds = ALL_SECONDS if seconds is None else seconds
        self._refused: set[tuple[str, int]] = set()
        self.enabled = True
        """False while calls are bound that must take no part."""

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Compare nothing meanwhile."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before

    def compare(self, collective: str, nbytes: int, candidate: str) -> bool:
        """Measure a size class, unless it takes too long; whether the table has changed (collective)."""
        context = self._planner.context
        key = collective, size_class(collective, self._planner.size, nbytes)
        if not key[1]:
            return False  # a call without data needs no comparison, and MPI takes it
        if key in self._refused or not self.enabled or context.settings["HPCCOMM_GUARD"] == "off":
            return False
        began = time.monotonic()
        length = min(MOST_BYTES, 1 << key[1] - 1)
        found = self._measure(collective, length, candidate)
        self._spent += time.monotonic() - began
        if found is None:
            self._refused.add(key)
            return False
        times, steady = found
        whole = 1 << key[1] - 1
        at = whole * self._planner.size if collective in BLOCKWISE else whole
        rows = [row_of(collective, name, self._planner.size, at, us) for name, us in times.items()]
        context.add_first_use(rows, keep=steady)
        return True

    def _measure(self, collective: str, length: int, candidate: str) -> tuple[dict[str, float], bool] | None:
        """What :func:`time_in_turns` finds; None if too much time has been spent (collective)."""
        comm = self._planner.context.private_comm
        plan = bind_ours(self._planner, collective, candidate, length)
        try:
            plan.run()  # compares the calls of all ranks before anything else is sent
            allowed = self._spent <= self._seconds + SHARE * (time.monotonic() - self._began)
            if not comm.bcast(allowed):
                return None
            runs = {candidate: plan.run, "native": bind_native(comm, collective, length)}
            return time_in_turns(comm, runs)
        finally:
            plan.free()


def time_in_turns(comm: Any, runs: dict[str, Run]) -> tuple[dict[str, float], bool]:
    """The median time of each run in microseconds for the slowest rank, and whether the rounds were alike (collective).

    Rounds differ where the machine is busy with other work: what they decide is not kept for later programs.
    """
    once = max(comm.allreduce(sum(time_of(run, 1) for run in runs.values()), MPI.MAX), 1e-7)
    repeats = int(min(MOST_REPEATS, max(1, SECONDS / ROUNDS / once)))
    rounds = int(min(ROUNDS, max(1, SECONDS / once)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for _ in range(rounds):
        for name in names:
            found[name].append(time_of(runs[name], repeats))
        names.reverse()
    middle = {name: sorted(times)[len(times) // 2] for name, times in found.items()}
    steady = rounds == ROUNDS and all(middle[name] <= SPREAD * min(times) for name, times in found.items())
    slowest = {name: 1e6 * float(comm.allreduce(seconds, MPI.MAX)) for name, seconds in middle.items()}
    return slowest, bool(comm.allreduce(steady, MPI.LAND))


def time_of(run: Run, repeats: int) -> float:
    """Seconds a run."""
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats


def scratch(collective: str, p: int, length: int) -> tuple[Any, Any]:
    """Vectors to send and to receive, of ``length`` bytes or blocks of so many."""
    n, (_, signature) = max(1, length // 4), of_family(collective)
    sent, received = (np.zeros(n * (p if kind == EQUAL else 1), "f4") for kind in signature[:2])
    return sent, received


def bind_ours(planner: Any, collective: str, algorithm: str, length: int) -> Any:
    """A plan of the algorithm on scratch memory."""
    send, recv = scratch(collective, planner.size, length)
    name, signature = of_family(collective)
    arguments = [ARGUMENTS[each] for each in signature.arguments]
    plan = planner.bind(None, name, send, recv, *arguments, algorithm)
    plan.result = (send, recv)  # which the plan does not hold
    return plan


def bind_native(comm: Any, collective: str, length: int) -> Run:
    """The same by MPI alone, as rows of one node have it."""
    name, signature = of_family(collective)
    buffers = [
        each for each, kind in zip(scratch(collective, comm.size, length), signature, strict=False) if kind != NONE
    ]
    return partial(getattr(comm, name), *buffers)


ARGUMENTS = {"op": MPI.SUM, "root": 0}


def of_family(collective: str) -> tuple[str, Signature]:
    """The first collective that uses these algorithms, and what it takes."""
    return next(each for each in SIGNATURES.items() if each[1].family == collective)


def row_of(collective: str, algorithm: str, ranks: int, nbytes: int, us: float) -> Row:
    """One measurement as a row of a table."""
    from hpccomm.transports.mpi import mpi_name

    row = Row(collective, algorithm, 1, ranks, nbytes, max(0.001, round(us, 3)), mpi=mpi_name(), when=today())
    return row._replace(host=MPI.Get_processor_name(), cpu=probe.processor_name())


def today() -> str:
    """The date."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


# The file


def file_name(mpi: str) -> str:
    """The name of the file for this machine and MPI library."""
    key = json.dumps([probe.identify(probe.all_cores()), mpi])
    return f"first-use-{zlib.crc32(key.encode()):08x}.json"


def load(mpi: str) -> tuple[Row, ...]:
    """What earlier programs have decided on this machine; a file that cannot be read is as good as none."""
    name = file_name(mpi)
    for folder in objects.folders():
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            rows = tuning.read(folder / name).rows
            return tuple(row for row in rows if (row.mpi, row.cpu) == (mpi, probe.processor_name()))
    return ()


def save(mpi: str, rows: Sequence[Row]) -> Path | None:
    """Keep decisions, with those that other programs have kept meanwhile; None if no folder can be written to."""
    folder = objects.writable_folder()
    if folder is None:
        return None
    known = {decision(row): row for row in (*load(mpi), *rows)}
    path = folder / file_name(mpi)
    try:
        tuning.write(tuning.Table(tuple(known.values())), path)
    except OSError:
        return None
    return path


def decision(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    return row.collective, row.algorithm, row.per_node, row.bytes
