"""``scripts/bench_collectives``: every collective on this node beside native MPI's, and an allreduce of 16-bit floats.

One launch a round for each; in it native MPI and ours take turns.  Figures are medians over the rounds of native MPI's
time by ours, with their range; ordinary arrays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from hpccomm.bench.launches import ratios
from hpccomm.bench.node import OUT, row
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
SIZES, FACTOR = "4096:16777216", 8

Launch = dict[str, Any]


def measured(ranks: int, words: Sequence[str]) -> Launch:
    """What one launch's ``--json`` says."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        bench = ["-m", "hpccomm", "bench", *words, "--algorithm", "native,auto", "-m", SIZES]
        bench += ["--step-factor", str(FACTOR), "-i", "30", "-x", "10", "--json", str(file)]
        command = [f"{Path(sys.executable).parent}/hpccomm-run", "-n", str(ranks), *bench]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found: Launch = json.loads(file.read_text(encoding="utf-8"))
    return found


def table(launches: dict[str, list[Launch]]) -> str:
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


def main() -> int:
    """Launch, write, print."""
    parser = argparse.ArgumentParser(prog="scripts/bench_collectives", description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("ranks", nargs="*", type=int, default=[2, 4])
    args = parser.parse_args()
    mpi = library().family.name
    kept: dict[str, dict[str, list[Launch]]] = {}
    for ranks in args.ranks:
        found: dict[str, list[Launch]] = {name: [] for name in CASES}
        for _ in range(args.rounds):
            for name, words in CASES.items():
                found[name].append(measured(ranks, words))
        kept[str(ranks)] = found
        sys.stdout.write(f"\n### {mpi}, {ranks} ranks\n\n{table(found)}")
        sys.stdout.flush()
    out = OUT / f"collectives-{mpi.replace(' ', '-').lower()}.json"
    out.write_text(json.dumps(kept).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
