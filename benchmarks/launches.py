"""The same ``hpccomm bench`` in several launches as one: medians, and ratios to native launch by launch.

``scripts/bench launches --rounds 3 --ranks 4 allreduce --algorithm native,ring -m 1Mi:64Mi`` takes the flags of
``hpccomm bench``; the file holds the medians in the form of ``hpccomm bench --json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks import harness

Launch = dict[str, Any]
NEW_ARRAYS = "new_p50_us"
"""The field of a row for calls on new arrays, their making included."""


def medians(launches: Sequence[Launch]) -> list[dict[str, Any]]:
    """A row for each algorithm and size: the median of every number over the launches."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for each in launches:
        for row in each["rows"]:
            groups.setdefault((row["algorithm"], row["bytes"]), []).append(row)
    return [{name: merge_values([row[name] for row in rows]) for name in rows[0]} for rows in groups.values()]


def merge_values(values: list[Any]) -> Any:
    """The value on which all launches agree; else the median of numbers, and None for anything else."""
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return median(values)
    return None


def ratios_to_native(launches: Sequence[Launch], algorithm: str, size: int, field: str = "p50_us") -> list[float]:
    """How many times as fast as native, launch by launch; older files have no times on new arrays."""
    found = []
    for each in launches:
        times = {row["algorithm"]: row.get(field) for row in each["rows"] if row["bytes"] == size}
        if times.get("native") and times.get(algorithm):
            found.append(times["native"] / times[algorithm])
    return found


def has_field(launches: Sequence[Launch], field: str) -> bool:
    """Whether some row has a value there."""
    return any(row.get(field) for each in launches for row in each["rows"])


def report(launches: Sequence[Launch]) -> str:
    """Bytes, medians in microseconds, ratios to native with their range."""
    times = {(row["algorithm"], row["bytes"]): row["p50_us"] for row in medians(launches)}
    names = list(dict.fromkeys(name for name, _ in times))
    others = [name for name in names if name != "native"]
    ratios = [(name, field) for field in ("p50_us", NEW_ARRAYS) for name in others if has_field(launches, field)]
    words = [f"native / {name}{', new arrays' * (field == NEW_ARRAYS)} (range)" for name, field in ratios]
    head = ["bytes", *(f"{name}, µs" for name in names), *words]
    return harness.table(
        head,
        [
            [
                str(size),
                *(harness.number(times[name, size]) for name in names),
                *(harness.spread(ratios_to_native(launches, name, size, field), ".2f") for name, field in ratios),
            ]
            for size in dict.fromkeys(size for _, size in times)
        ],
    )


def main() -> int:
    """Launch, write the medians, print the table."""
    parser = harness.parser("launches", __doc__, rounds=3, ranks="4", file="launches.json")
    parser.add_argument("collective")
    args, flags = harness.parse_known(parser)
    run = harness.on_node(args.ranks[0])
    bench = ["-m", "hpccomm", "bench", args.collective, *flags]
    found = [harness.launch(run, bench) for _ in range(args.rounds)]
    args.file.parent.mkdir(parents=True, exist_ok=True)
    joined = {**found[0], "launches": len(found), "rows": medians(found)}
    args.file.write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    harness.emit(report(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
