"""Merge several launches of one benchmark: medians over the launches, and the ratios to native with their range.

``python -m hpccomm.bench.launches a.json b.json … --out all.json`` writes the medians in the form of ``bench --json``
and prints a table in Markdown; ``scripts/bench_launches`` starts the launches.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

Key = tuple[str, int]


def medians(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each algorithm and size, which holds the median of every number over the launches."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for file in files:
        for row in file["rows"]:
            groups.setdefault((row["algorithm"], row["bytes"]), []).append(row)
    return [{name: merge_values([row[name] for row in rows]) for name in rows[0]} for rows in groups.values()]


def merge_values(values: list[Any]) -> Any:
    """The value that all launches share; else the median of numbers; else None."""
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return median(values)
    return None


def ratios(files: list[dict[str, Any]], algorithm: str, size: int) -> list[float]:
    """The speed of an algorithm as a multiple of native's, for each launch."""
    found = []
    for file in files:
        times = {row["algorithm"]: row["p50_us"] for row in file["rows"] if row["bytes"] == size}
        if "native" in times and algorithm in times:
            found.append(times["native"] / times[algorithm])
    return found


def table(files: list[dict[str, Any]]) -> str:
    """The table in Markdown: bytes, medians in microseconds, ratios to native with their range."""
    rows = medians(files)
    names = list(dict.fromkeys(row["algorithm"] for row in rows))
    others = [name for name in names if name != "native"]
    head = ["bytes", *(f"{name}, µs" for name in names), *(f"native / {name} (range)" for name in others)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
    for size in dict.fromkeys(row["bytes"] for row in rows):
        times = {row["algorithm"]: row["p50_us"] for row in rows if row["bytes"] == size}
        cells = [str(size), *(f"{times[name]:.4g}" for name in names)]
        for name in others:
            found = ratios(files, name, size)
            cells.append(f"**{median(found):.2f}** ({min(found):.2f}–{max(found):.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Read the files, merge them, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="files written by hpccomm bench --json, one for each launch")
    parser.add_argument("--out", help="write the medians into this file")
    args = parser.parse_args()
    files = [json.loads(Path(path).read_text(encoding="utf-8")) for path in args.files]
    if args.out:
        merged = {**files[0], "launches": len(files), "rows": medians(files)}
        Path(args.out).write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(files))
    return 0


if __name__ == "__main__":
    sys.exit(main())
