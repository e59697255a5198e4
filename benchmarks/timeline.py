"""What a timeline costs: programs with ``HPCCOMM_TIMELINE`` and without it.

In every round each job is launched three times, in another order with each round: *off* without the variable, *on* with
it, and the *null*, off once more, which shows how much two launches of the same job differ on this machine.  Ratios are
those of the job's own time to that of *off*, round by round.  Writing the file at the end is a time of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness

TRAINING = ["-m", "hpccomm", "train", "digits", "--method", "dgc", "--epochs", "20"]
JOBS: dict[str, tuple[Sequence[str], str]] = {
    "allreduce, 8 bytes": (["-m", "benchmarks.timeline", "--bytes", "8"], "--work"),
    "allreduce, 64 KiB": (["-m", "benchmarks.timeline", "--bytes", "65536"], "--work"),
    "train digits --method dgc": (TRAINING, "--json"),
}
"""The program of each job, and the flag behind which it takes the file of its times."""
CALLS = {8: 400_000, 65_536: 50_000}
"""Calls of a job by their bytes: of the short ones more than a timeline keeps."""
CONTENDERS = ("off", "on", "null")
LIMIT = 1.02
"""A timeline may cost two percent."""


def measure(nbytes: int) -> float:
    """Seconds of the calls of one launch, on the slowest rank (collective)."""
    import numpy as np
    from mpi4py import MPI

    from hpccomm import Communicator

    comm, x = Communicator(MPI.COMM_WORLD), np.zeros(nbytes // 4, "f4")
    for _ in range(1000):
        comm.Allreduce(MPI.IN_PLACE, x)
    calls = CALLS[nbytes]
    return calls * harness.time_collective(comm, lambda: comm.Allreduce(MPI.IN_PLACE, x), calls)


def seconds_of(found: Any) -> float:
    """A job's own time: the calls, or computing and exchanging in all epochs."""
    if isinstance(found, float):
        return found
    return sum(float(each["compute_s"] + each["communication_s"]) for each in found["epochs"])


def launch_job(ranks: int, job: str, traced: bool) -> dict[str, float]:
    """The job's own time and the rest of the launch: start, end, and the writing of the file."""
    program, flag = JOBS[job]
    with tempfile.TemporaryDirectory() as folder:
        env = {"HPCCOMM_TIMELINE": str(Path(folder, "trace.json"))} if traced else {}
        began = time.perf_counter()
        own = seconds_of(harness.launch(harness.on_node(ranks, env=env), program, flag))
        return {"own": own, "rest": time.perf_counter() - began - own}


def measure_round(key: tuple[int, str, int]) -> dict[str, Any]:
    """The three launches of a job."""
    ranks, job, number = key
    order = [*CONTENDERS[number % 3 :], *CONTENDERS[: number % 3]]
    times = {name: launch_job(ranks, job, name == "on") for name in order}
    return {"ranks": ranks, "job": job, "round": number, **times}


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """One line a job and number of ranks."""
    lines = []
    for ranks, job in dict.fromkeys((row["ranks"], row["job"]) for row in rows):
        each = [row for row in rows if (row["ranks"], row["job"]) == (ranks, job)]
        own = {name: [row[name]["own"] for row in each] for name in CONTENDERS}
        rest = [row["on"]["rest"] - row["off"]["rest"] for row in each]
        on, null = (harness.ratios(own[name], own["off"]) for name in ("on", "null"))
        verdict = "yes" if median(on) <= LIMIT else "no"
        cells = [f"{median(own['off']):.3g}", *(harness.spread(values, ".3f") for values in (on, null)), verdict]
        lines.append([f"{job}, {ranks} ranks", *cells, harness.spread(rest, ".2f")])
    head = ["job", "off, s", "on / off", "null / off", "at most 2 %", "more at start and end, s"]
    return harness.table(head, lines, words=1)


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = harness.parser("timeline", __doc__, rounds=6, ranks="2,4", file="timeline.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, choices=CALLS, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    if args.work:
        harness.write_on_rank0(args.work, measure(args.bytes))
        return 0
    record = harness.Record(args.file, lambda row: (row["ranks"], row["job"], row["round"]), seconds=args.seconds)
    keys = [(ranks, job, k) for k in range(args.rounds) for ranks in args.ranks for job in JOBS]
    record.recall_all(keys, measure_round)
    if record.rows:
        harness.emit(tables(record.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
