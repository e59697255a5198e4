"""What a waiting rank costs the rank that computes on the same core, and the processor time that it takes.

On every core one rank computes and one waits for it in an allreduce: asleep (it looks for a message every 10 ms), in
ours or in native MPI, in turns.  A launch gives the time of the computation, and the waiting rank's processor time as a
part of the time that it waited, each as the median over the turns.

A second launch has one rank on each core, and in every call another one of them comes late: what a call of 8 bytes
takes beyond the time by which it is late, in ours, in native MPI, and in native MPI again.
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
LATE_US = (20, 60, 100, 200, 500, 1000, 2000, 5000)
"""By how much a rank comes late."""
RIVALS = ("ours", "native", "null")


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


def measure_late() -> dict[str, dict[str, float]]:
    """One launch: microseconds a call beyond the time by which a rank is late, by that time (collective)."""
    from mpi4py import MPI

    from hpccomm import Communicator

    world, x, y = MPI.COMM_WORLD, np.ones(1), np.empty(1)
    calls = {"ours": Communicator(world).Allreduce, "native": world.Allreduce, "null": world.Allreduce}
    found = {}
    for late in LATE_US:
        number = max(10, 50_000 // late)

        def loop(call: Callable[..., Any], late: int = late, number: int = number) -> float:
            world.Barrier()
            began = time.perf_counter()
            for k in range(number):
                if k % world.size == world.rank:
                    spin(late * 1e-6)
                call(x, y)
            return (time.perf_counter() - began) / number * 1e6 - late

        turns = {name: partial(loop, call) for name, call in calls.items()}
        found[str(late)] = {name: median(each) for name, each in harness.take_turns(turns, TURNS).items()}
    return found


def spin(seconds: float) -> None:
    """Occupy the core."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


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
    neighbours = harness.table(
        ["neighbour", "computation, ms", "/ asleep", "core used by the neighbour, %"], lines, words=1
    )
    lines = []
    for late in map(str, LATE_US):
        each = {name: [row["late"][late][name] for row in rows] for name in RIVALS}
        lines.append([late, *(harness.spread(each[name], ".1f") for name in RIVALS)])
    return neighbours + "\n\n" + harness.table(["late by, µs", *(f"{name}, µs more" for name in RIVALS)], lines)


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = harness.parser("waiting", __doc__, rounds=5, file="waiting.json")
    for flag in ("--beside", "--late"):
        parser.add_argument(flag, type=Path, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    if args.beside or args.late:
        harness.write_on_rank0(args.beside or args.late, measure() if args.beside else measure_late())
        return 0
    cores = len(os.sched_getaffinity(0))
    record = harness.Record(args.file, lambda row: row["round"], seconds=args.seconds)
    program = ["-m", "benchmarks.waiting"]

    def launch(number: int) -> dict[str, Any]:
        beside = harness.launch(harness.on_node(2 * cores), program, "--beside")
        return {"round": number, **beside, "late": harness.launch(harness.on_node(cores), program, "--late")}

    record.recall_all(range(args.rounds), launch)
    harness.emit(tables(record.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
