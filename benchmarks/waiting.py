"""What a waiting rank costs the rank that computes on the same core, and the processor time that it takes.

On every core one rank computes and one waits for it in an allreduce: asleep (it looks for a message every 10 ms), in
ours or in native MPI, in turns.  A launch gives the time of the computation, and the waiting rank's processor time as a
part of the time that it waited, each as the median over the turns.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any

import numpy as np

from benchmarks import harness

TURNS = 9
SECONDS = 0.1
"""Length of the computation on an idle core."""
HEAD_START = 0.02
"""Seconds for which the waiting rank has waited when the computation begins."""
CONTENDERS = ("asleep", "ours", "native")


def measure() -> dict[str, dict[str, float]]:
    """One launch (collective)."""
    from mpi4py import MPI

    from hpccomm import Communicator

    world, cores = MPI.COMM_WORLD, sorted(os.sched_getaffinity(0))
    ours, x = Communicator(world), np.ones(1000)
    computes = world.rank < len(cores)
    os.sched_setaffinity(0, {cores[world.rank % len(cores)]})
    waits: dict[str, Callable[[], object]] = {
        "asleep": lambda: doze(world, computes, len(cores)),
        "ours": lambda: ours.Allreduce(MPI.IN_PLACE, x, algorithm="shared"),
        "native": lambda: world.Allreduce(MPI.IN_PLACE, x),
    }
    length = world.bcast(steps_of(SECONDS))
    turns = {name: lambda wait=wait: take_turn(world, computes, wait, length) for name, wait in waits.items()}
    mine = harness.take_turns(turns, TURNS, warmup=2)
    every = world.allgather({name: median(each) for name, each in mine.items()})
    return {
        "computation": {name: max(each[name] for each in every[: len(cores)]) for name in waits},
        "share": {name: max(each[name] for each in every[len(cores) :]) for name in waits},
    }


def take_turn(world: Any, computes: bool, wait: Callable[[], object], length: int) -> float:
    """Seconds of the computation; or the part of a core that the wait for it took."""
    world.Barrier()
    began, used = time.perf_counter(), cpu_seconds()
    if computes:
        time.sleep(HEAD_START)
        began = time.perf_counter()
        compute(length)
        found = time.perf_counter() - began
    wait()
    return found if computes else (cpu_seconds() - used) / (time.perf_counter() - began)


def cpu_seconds() -> float:
    """Processor time of this process."""
    used = getrusage(RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def doze(world: Any, computes: bool, cores: int) -> None:
    """Wait for the end of the computation on the same core with as little work as possible."""
    partner = (world.rank + cores) % (2 * cores)
    if computes:
        world.send(None, partner)
        return
    while not world.iprobe(partner):
        time.sleep(0.01)
    world.recv(source=partner)


compute = partial(harness.take_roots, 2000)
"""Work on an array in the first-level cache."""


def steps_of(seconds: float) -> int:
    """The length of a computation that takes so much processor time."""
    length = 1000
    began = time.process_time()
    compute(length)
    return int(length * seconds / (time.process_time() - began))


def tables(rows: list[dict[str, Any]]) -> str:
    """Medians over the launches, and the ratio to a sleeping neighbour launch by launch."""
    lines = []
    for name in CONTENDERS:
        times, shares = ([row[what][name] for row in rows] for what in ("computation", "share"))
        beside = [row["computation"]["asleep"] for row in rows]
        ratio = harness.spread(harness.ratios(times, beside), ".2f")
        lines.append([name, harness.spread(times, ".0f", 1e3), ratio, harness.spread(shares, ".1f", 100)])
    return harness.table(["neighbour", "computation, ms", "/ asleep", "core used by the neighbour, %"], lines, words=1)


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = harness.parser("waiting", __doc__, rounds=5, file="waiting.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    if args.work:
        harness.write_on_rank0(args.work, measure())
        return 0
    run = harness.on_node(2 * len(os.sched_getaffinity(0)))
    record = harness.Record(args.file, lambda row: row["round"], seconds=args.seconds)
    launch = ["-m", "benchmarks.waiting"]
    record.recall_all(range(args.rounds), lambda k: {"round": k, **harness.launch(run, launch, "--work")})
    harness.emit(tables(record.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
