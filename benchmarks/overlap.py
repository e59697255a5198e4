"""How much of an Iallreduce is hidden behind a computation of the same length, between the nodes of a virtual cluster.

Each launch measures, in turns, the call alone (issued and awaited at once), the computation alone on all ranks at a
time, and both: the call is issued, the rank computes, the rank waits.  The ratio is the time of both to the longer of
the two alone: 1 is perfect overlap, 2 is none.  ``numpy`` computes without the GIL, ``python`` holds it.  Times are
those of the slowest rank, as medians over the turns of a launch.

All nodes share this machine's cores, so the work of the call itself, in the ranks and in the system, delays the
computation: the *bound* is the longer of the call, and of the computation and that work one after the other.  The work
is the time that the cores take for both, less that for the computation alone.  Links take 64 KB at once, as network
cards do that cut segments into packets themselves: else the kernel does so on the cores that compute.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import harness
from hpccomm.cluster.nodes import Cluster, default_burst
from hpccomm.launcher import library

SHAPES = ["2x1,1gbit", "4x1,100mbit"]
NBYTES, TURNS = 1 << 24, 5
BURST = 70_000
"""Bytes that a link takes at once: a segment of 64 KB."""
AIMS = {"numpy": 1.15, "python": 1.3}
"""The largest ratio that ours shall have."""


def compute_in_python(steps: int) -> None:
    """Count."""
    total = 0
    for _ in range(steps):
        for k in range(200):
            total += k


COMPUTATIONS = {"numpy": partial(harness.take_roots, 20_000), "python": compute_in_python}


def measure(turns: int = TURNS) -> list[dict[str, Any]]:
    """One launch (collective): a row for each computation, and ours and native MPI."""
    from mpi4py import MPI

    from hpccomm import Communicator

    world = MPI.COMM_WORLD
    x, y = np.ones(NBYTES // 4, "f4"), np.zeros(NBYTES // 4, "f4")
    calls = {"ours": Communicator(world).Iallreduce, "native": MPI.Intracomm(world).Iallreduce}
    rows = []
    for kind, compute in COMPUTATIONS.items():
        for name, call in calls.items():
            alone = measure_turns(world, {"call": lambda call=call: call(x, y).Wait()}, turns)["call"]
            steps = steps_of(world, compute, alone)
            runs = {
                "call": lambda call=call: call(x, y).Wait(),
                "computation": lambda steps=steps, compute=compute: compute(steps),
                "both": lambda call=call, steps=steps, compute=compute: overlap(call(x, y), compute, steps),
            }
            times = measure_turns(world, runs, turns)
            work = measure_work(world, runs["both"], turns) - measure_work(world, runs["computation"], turns)
            rows.append({"compute": kind, "by": name, "work": work, **times})
            assert (y == world.size).all()
    return rows


def overlap(request: Any, compute: Callable[[int], None], steps: int) -> None:
    """Compute while a request is under way."""
    compute(steps)
    request.Wait()


def measure_turns(world: Any, runs: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """The median seconds of each, of the slowest rank in each turn (collective)."""
    timed = {name: partial(harness.time_collective, world, run) for name, run in runs.items()}
    return {name: median(times) for name, times in harness.take_turns(timed, turns).items()}


def measure_work(world: Any, run: Callable[[], object], turns: int) -> float:
    """Seconds for which a run keeps every core of the machine busy, on the average (collective)."""
    world.Barrier()
    before = harness.busy_seconds()
    for _ in range(turns):
        run()
    world.Barrier()
    return (harness.busy_seconds() - before) / turns / (os.cpu_count() or 1)


def steps_of(world: Any, compute: Callable[[int], None], seconds: float) -> int:
    """Steps of a computation that takes so long where all ranks compute at a time (collective)."""
    steps = 1000
    took = measure_turns(world, {"trial": lambda: compute(steps)}, TURNS)["trial"]
    return max(1, int(steps * seconds / took))


def measure_shape(shape: harness.Shape, rounds: int, turns: int) -> dict[str, Any]:
    """All launches on one cluster."""
    with Cluster(shape.nodes, shape.rate, burst=max(BURST, default_burst(shape.rate))) as cluster:
        run = harness.on_cluster(cluster, shape)
        launches = [
            harness.launch(run, ["-m", "benchmarks.overlap", "--turns", str(turns)], "--work") for _ in range(rounds)
        ]
    return {**shape._asdict(), "launches": launches}


def title(record: dict[str, Any]) -> str:
    """A record's shape in words."""
    return harness.Shape(record["nodes"], tuple(record["per_node"]), record["placement"], record["rate"]).title


def table(record: dict[str, Any]) -> str:
    """One shape: times alone, and the ratio, over the launches."""
    lines = []
    for kind in COMPUTATIONS:
        for name in ("ours", "native"):
            rows = [row for rows in record["launches"] for row in rows if (row["compute"], row["by"]) == (kind, name)]
            times = [
                harness.spread([row[what] for row in rows], ".4g", 1e3)
                for what in ("call", "work", "computation", "both")
            ]
            ratios = [row["both"] / max(row["call"], row["computation"]) for row in rows]
            bounds = [row["both"] / max(row["call"], row["computation"] + row["work"]) for row in rows]
            aim = f"{AIMS[kind]}" if name == "ours" else ""
            lines.append([kind, name, *times, *(harness.spread(sorted(each), ".2f") for each in (ratios, bounds)), aim])
    head = ["computation", "call by", "call, ms", "its work, ms", "computation, ms", "both, ms"]
    head += ["both / longer", "both / bound", "aim"]
    return f"### {title(record)}, {NBYTES >> 20} MB\n\n{harness.table(head, lines, words=2)}"


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = harness.parser("overlap", __doc__, rounds=5, file="overlap-{mpi}.json")
    harness.add_shapes(parser, SHAPES)
    parser.add_argument("--turns", type=int, default=TURNS, help=f"turns of a launch (default {TURNS})")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    if args.work:
        harness.write_on_rank0(args.work, measure(args.turns))
        return 0
    file = harness.results_file(args, mpi=library().family.name)
    record = harness.Record(file, title, seconds=args.seconds)
    shapes = {shape.title: shape for shape in args.shape}
    record.recall_all(shapes, lambda name: measure_shape(shapes[name], args.rounds, args.turns))
    for each in record.rows:
        harness.emit("\n" + table(each))
    return 0


if __name__ == "__main__":
    sys.exit(main())
