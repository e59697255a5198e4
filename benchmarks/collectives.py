"""Every collective on this node beside native MPI's, and an allreduce of 16-bit floats; ordinary arrays.

Each case has one launch a round, in which native MPI and ours take turns.  Figures are native MPI's time by ours,
medians over the rounds with their range: on the same arrays in all calls, then on new arrays, whose making counts.
Further tables have the first calls, and for vectors beyond the cache the bytes that must at least be read and written,
in a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import chain
from statistics import median
from typing import Any

from benchmarks import harness
from benchmarks.launches import NEW_ARRAYS, has_field, ratios_to_native
from benchmarks.node import BEYOND_CACHE
from hpccomm.launcher import library

CASES = {
    "reduce_scatter": ["reduce_scatter"],
    "bcast": ["bcast"],
    "reduce": ["reduce"],
    "allgather": ["allgather"],
    "alltoall": ["alltoall"],
    "allreduce": ["allreduce"],
    "allreduce, float16": ["allreduce", "-T", "half"],
}
SIZES, FACTOR = "4096:16777216", 4
LEAST_TRAFFIC: dict[str, Callable[[int], int]] = {
    "reduce_scatter": lambda p: p + 1,
    "bcast": lambda p: 2 * (p - 1),
    "reduce": lambda p: p + 1,
    "allgather": lambda p: 2 * p * p,
    "alltoall": lambda p: 2 * p * p,
    "allreduce": lambda p: 2 * p,
}
"""By how much p ranks together must at least read or write the size in the table: a copy reads and writes on every
rank that receives, a sum reads every rank's vector once, and every result is written."""

Launch = dict[str, Any]
Launches = dict[str, list[Launch]]
"""Of each case."""


def launch_case(key: tuple[int, str, int], sizes: str) -> Launch:
    """One launch of a case on so many ranks, with the key of its row."""
    ranks, case, number = key
    bench = ["-m", "hpccomm", "bench", *CASES[case], "--algorithm", "native,auto", "-m", sizes]
    bench += ["--step-factor", str(FACTOR), "-i", "30", "-x", "10", "--new-arrays", "--cold"]
    return {"on": ranks, "case": case, "round": number, **harness.launch(harness.on_node(ranks), bench)}


def read_old_form(data: dict[str, Any]) -> Iterator[Launch]:
    """Rows of files in which launches stand by ranks and case."""
    for ranks in [key for key in data if key.isdigit()]:
        for case, launches in data.pop(ranks).items():
            yield from ({"on": int(ranks), "case": case, "round": k, **each} for k, each in enumerate(launches))


def ratio_table(launches: Launches, field: str = "p50_us") -> str:
    """A row a size, a column a case."""
    found = chain.from_iterable(launches.values())
    sizes = sorted({row["bytes"] for launch in found for row in launch["rows"]})
    return harness.table(
        ["bytes", *launches],
        [
            [str(n), *(harness.spread(ratios_to_native(each, "auto", n, field), ".2f") for each in launches.values())]
            for n in sizes
        ],
    )


def first_call_table(launches: Launches) -> str:
    """Milliseconds of first calls, a column a case."""
    rows = []
    for what, field in (("of the process", "process_us"), ("of a new communicator", "communicator_us")):
        for name in ("native", "auto"):
            times = [
                [first[field] for one in each for first in one.get("cold", []) if first["algorithm"] == name]
                for each in launches.values()
            ]
            rows.append([f"first call {what}, {name}", *(harness.spread(each, ".3g", 1e-3) for each in times)])
    return harness.table(["ms", *launches], rows, words=1)


def speed_table(launches: Launches) -> str:
    """GB/s of vectors beyond the cache."""
    found = chain.from_iterable(launches.values())
    sizes = sorted({row["bytes"] for launch in found for row in launch["rows"] if row["bytes"] >= BEYOND_CACHE})
    rows = [
        [str(size), algorithm, *(f"{median(launch_speeds(each, algorithm, size)):.0f}" for each in launches.values())]
        for size in sizes
        for algorithm in ("native", "auto")
    ]
    return harness.table(["bytes", "GB/s", *launches], rows, words=2)


def launch_speeds(launches: list[Launch], algorithm: str, size: int) -> list[float]:
    """GB/s launch by launch."""
    rows = [each for launch in launches for each in launch["rows"]]
    mine = [each for each in rows if (each["algorithm"], each["bytes"]) == (algorithm, size)]
    return [LEAST_TRAFFIC[each["collective"]](each["ranks"]) * size / each["p50_us"] / 1e3 for each in mine]


def main() -> int:
    """Launch what the file lacks, write, print."""
    parser = harness.parser("collectives", __doc__, rounds=5, ranks="2,4", file="collectives-{mpi}.json")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; may come several times")
    parser.add_argument("--sizes", default=SIZES, help=f"BYTES:BYTES, a factor of {FACTOR} apart (default {SIZES})")
    args = harness.parse(parser)
    mpi = library().family.name
    file = harness.results_file(args, mpi=mpi)
    record = harness.Record(file, lambda row: (row["on"], row["case"], row["round"]), seconds=args.seconds)
    record.rows.extend(read_old_form(record.data))
    for ranks in args.ranks:
        keys = [(ranks, case, number) for number in range(args.rounds) for case in args.case or CASES]
        record.recall_all(keys, lambda key: launch_case(key, args.sizes))
        here = [row for row in record.rows if row["on"] == ranks]
        launches = {case: [row for row in here if row["case"] == case] for case in CASES}
        launches = {case: each for case, each in launches.items() if each}
        if launches:
            harness.emit(f"\n### {mpi}, {ranks} ranks\n", ratio_table(launches))
        if has_field(here, NEW_ARRAYS):
            harness.emit("On new arrays:\n", ratio_table(launches, NEW_ARRAYS), first_call_table(launches))
        if launches:
            harness.emit(speed_table(launches))
    return 0


if __name__ == "__main__":
    sys.exit(main())
