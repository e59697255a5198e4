"""``scripts/bench_collectives``: every collective on this node beside native MPI's, and an allreduce of 16-bit floats.

One launch a round for each; in it native MPI and ours take turns.  Figures are medians over the rounds of native MPI's
time by ours, with their range; ordinary arrays.  Every launch is kept as soon as it is done, and ``--more`` adds those
that are missing, so that the rounds may come in pieces.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.node import BEYOND_CACHE, OUT, row
from hpccomm.bench.launches import ratios
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
LEAST: dict[str, Callable[[int], int]] = {
    "reduce_scatter": lambda p: p + 1,
    "bcast": lambda p: 2 * (p - 1),
    "reduce": lambda p: p + 1,
    "allgather": lambda p: 2 * p * p,
    "alltoall": lambda p: 2 * p * p,
    "allreduce": lambda p: 2 * p,
}
"""How often p ranks together must at least read or write as many bytes as the table says: a copy reads and writes on
every rank that receives, a sum reads every rank's vector once, and every result is written."""

Launch = dict[str, Any]
Launches = dict[str, list[Launch]]
"""Of each case."""


def launch_case(ranks: int, words: Sequence[str]) -> Launch:
    """What one launch's ``--json`` says."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        bench = ["-m", "hpccomm", "bench", *words, "--algorithm", "native,auto", "-m", SIZES]
        bench += ["--step-factor", str(FACTOR), "-i", "30", "-x", "10", "--json", str(file)]
        command = [f"{Path(sys.executable).parent}/hpccomm-run", "-n", str(ranks), *bench]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: Launch = json.loads(file.read_text(encoding="utf-8"))
    return {**found, "command": found["command"].replace(f"{folder}/", "")}


def pending_cases(found: Launches, rounds: int, wanted: Sequence[str]) -> Iterator[str]:
    """The cases to be launched next, round by round; whoever launches adds to ``found``."""
    for number in range(1, rounds + 1):
        for name in wanted:
            if len(found.setdefault(name, [])) < number:
                yield name


def table(launches: Launches) -> str:
    """A row a size, a column a case."""
    sizes = sorted({each["bytes"] for found in launches.values() for launch in found for each in launch["rows"]})
    lines = [row("bytes", *launches), "|" + "---:|" * (len(launches) + 1)]
    for size in sizes:
        cells = []
        for found in launches.values():
            times = ratios(found, "auto", size)
            cells.append(f"**{median(times):.2f}** ({min(times):.2f}–{max(times):.2f})" if times else "")
        lines.append(row(str(size), *cells))
    return "\n".join(lines) + "\n"


def speeds(launches: Launches) -> str:
    """Of vectors that no cache holds: the bytes that must be read and written, in a second."""
    lines = [row("bytes", "GB/s", *launches), "|---:|---|" + "---:|" * len(launches)]
    found = [launch["rows"] for each in launches.values() for launch in each]
    for size in sorted({each["bytes"] for rows in found for each in rows if each["bytes"] >= BEYOND_CACHE}):
        for algorithm in ("native", "auto"):
            cells = [
                f"{median(launch_speeds(each, algorithm, size)):.0f}" if each else "" for each in launches.values()
            ]
            lines.append(row(str(size), algorithm, *cells))
    return "\n".join(lines) + "\n"


def launch_speeds(launches: list[Launch], algorithm: str, size: int) -> list[float]:
    """GB/s launch by launch."""
    rows = [each for launch in launches for each in launch["rows"]]
    mine = [each for each in rows if (each["algorithm"], each["bytes"]) == (algorithm, size)]
    return [LEAST[each["collective"]](each["ranks"]) * size / each["p50_us"] / 1e3 for each in mine]


def main() -> int:
    """Launch, write, print."""
    parser = argparse.ArgumentParser(prog="scripts/bench_collectives", description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("ranks", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--case", action="append", choices=CASES, help="this one only; may come several times")
    parser.add_argument("--more", action="store_true", help="go on with the launches that are kept, up to ROUNDS")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no launch after so long")
    args = parser.parse_args()
    mpi, end = library().family.name, time.monotonic() + args.seconds
    out = OUT / f"collectives-{mpi.replace(' ', '-').lower()}.json"
    kept: dict[str, Launches] = json.loads(out.read_text(encoding="utf-8")) if args.more and out.exists() else {}
    for ranks in args.ranks:
        found = kept.setdefault(str(ranks), {})
        for name in pending_cases(found, args.rounds, args.case or list(CASES)):
            if time.monotonic() > end:
                break
            found[name].append(launch_case(ranks, CASES[name]))
            out.write_text(json.dumps(kept).replace("}, {", "},\n{") + "\n", encoding="utf-8")
        sys.stdout.write(f"\n### {mpi}, {ranks} ranks\n\n{table(found)}\n{speeds(found)}")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
