"""The summary of ``scripts/demo``: training and benchmark results in a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def training_lines(run: dict[str, Any]) -> list[str]:
    """The training job."""
    last = run["epochs"][-1]
    return [
        f"Trained: {run['dataset']}, {run['ranks']} ranks, gradients averaged by hpccomm ({run['method']})",
        f"  test accuracy after {last['epoch']} epochs   {100 * last['accuracy']:.1f} %",
        f"  in each epoch             {1e3 * last['compute_s']:.0f} ms computing, "
        f"{1e3 * last['communication_s']:.0f} ms communicating",
        f"  sent by each rank         {last['wire_bytes'] / 1000:.1f} kB a step",
    ]


def benchmark_lines(bench: dict[str, Any]) -> list[str]:
    """Times of allreduce beside those of the MPI underneath."""
    lines = [
        f"Measured: allreduce of float32 on {bench['machine']['ranks']}, every result checked",
        f"  {'bytes':>10}  {'the MPI underneath':>20}  {'hpccomm':>12}  times as fast",
    ]
    rows = bench["rows"]
    for native in (row for row in rows if row["algorithm"] == "native"):
        ours = next(row for row in rows if row["algorithm"] == "auto" and row["bytes"] == native["bytes"])
        before, now = native["p50_us"], ours["p50_us"]
        lines.append(f"  {native['bytes']:>10}  {before:>17.1f} µs  {now:>9.1f} µs  {before / now:>12.2f}")
    return lines


def main() -> int:
    """Read the two files and print."""
    train, bench = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    runs = train.get("runs", [train])
    lines = ["", *(line for run in runs for line in training_lines(run)), "", *benchmark_lines(bench), ""]
    lines += [f"({bench['mpi']}; medians; this machine now: shared or busy cores make any number worse)"]
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
