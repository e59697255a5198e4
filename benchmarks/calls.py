"""Small calls as programs write them, with the same arrays and with new ones: native MPI against ours and itself.

A launch makes the calls in turns of native, ours, and native again as the null, and takes the median of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness

CALLS: dict[str, int] = {
    "comm.Allreduce(x, y)": 400,
    "comm.Allreduce(x128, y128)": 400,
    "comm.Allreduce(np.array([s]), np.empty(1))": 400,
    "comm.Allreduce(MPI.IN_PLACE, np.array([s]))": 400,
    "comm.Allreduce(np.ones(128), np.empty(128))": 400,
    "comm.Allreduce(np.ones(1024), np.empty(1024))": 200,
    "comm.Allreduce(np.ones(8192), np.empty(8192))": 100,
    "comm.Allreduce(np.ones(32768), np.empty(32768))": 40,
    "comm.Bcast(np.empty(1000))": 400,
    "comm.Allgather(np.ones(8), np.empty(8 * p))": 400,
    "comm.Alltoall(np.ones(8 * p), np.empty(8 * p))": 400,
    "comm.Reduce(np.ones(8), np.empty(8))": 400,
    "comm.Allreduce([a, 1, MPI.DOUBLE_INT], [b, 1, MPI.DOUBLE_INT], op=MPI.MINLOC)": 400,
    "comm.Allreduce([x, MPI.DOUBLE], [y, MPI.DOUBLE])": 400,
    "comm.Gather(x, x2 if r == 0 else None)": 400,
    "comm.Scan(x, y)": 400,
    "comm.Barrier()": 400,
}
"""The text of a call, and how many make a turn."""
TURNS = 15


def names_of(comm: Any) -> dict[str, Any]:
    """The names in the calls."""
    from mpi4py import MPI

    pair = np.dtype([("value", "f8"), ("index", "i4")])
    arrays = {"x": np.ones(1), "y": np.empty(1), "x128": np.ones(128), "y128": np.empty(128), "x2": np.ones(comm.size)}
    pairs = {"a": np.zeros(1, pair), "b": np.zeros(1, pair)}
    return {"comm": comm, "MPI": MPI, "np": np, "p": comm.size, "r": comm.rank, "s": 1.5, **arrays, **pairs}


def measure() -> list[dict[str, Any]]:
    """Median microseconds of every call, by contender (collective)."""
    from mpi4py import MPI

    from hpccomm import Communicator

    comms = {"native": MPI.COMM_WORLD, "ours": Communicator(MPI.COMM_WORLD), "again": MPI.COMM_WORLD}
    rows = []
    for text, count in CALLS.items():
        runs = {}
        for name, comm in comms.items():
            call = eval(f"lambda: {text}", names_of(comm))
            runs[name] = partial(harness.time_collective, MPI.COMM_WORLD, call, count)
            for _ in range(count):
                call()
        found = harness.take_turns(runs, TURNS)
        rows.append({"call": text, **{name: 1e6 * statistics.median(times) for name, times in found.items()}})
    return rows


def table(launches: list[list[dict[str, Any]]]) -> str:
    """Median times, and the median and the worst of the launches' ratios to native; native's to itself beside."""
    cells = []
    for rows in zip(*launches, strict=True):
        times = [statistics.median(row[name] for row in rows) for name in ("native", "ours")]
        ratios = {name: sorted(row["native"] / row[name] for row in rows) for name in ("ours", "again")}
        figures = [f"{pick(ratios[name]):.2f}" for name in ratios for pick in (statistics.median, min)]
        cells.append([f"`{rows[0]['call'].removeprefix('comm.')}`", *(f"{us:.2f}" for us in times), *figures])
    head = ["call", "native, µs", "ours, µs", "native / ours", "worst", "native / itself", "worst"]
    return harness.table(head, cells, words=1)


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = harness.parser("calls", __doc__, rounds=10, ranks="2,4", file="calls-p{ranks}.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    if args.work:
        harness.write_on_rank0(args.work, measure())
        return 0
    for ranks in args.ranks:
        run, file = harness.on_node(ranks), harness.results_file(args, ranks=ranks)
        record = harness.Record(file, lambda row: row["round"], seconds=args.seconds)
        launch = partial(harness.launch, run, ["-m", "benchmarks.calls"], "--work")
        record.recall_all(range(args.rounds), lambda k, launch=launch: {"round": k, "rows": launch()})
        harness.emit(f"\n## {ranks} ranks\n", table([row["rows"] for row in record.rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
