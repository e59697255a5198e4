"""The picture of the README, drawn from measurements of this documentation: allreduce, and ten whole programs.

Left, how many times as fast as the MPI underneath an allreduce is: the median of the launches as a line, the worst and
the best launch as a band.  Right, the same for the loops of ten programs: a dot for the median, a line from the worst
round to the best.  Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness, node
from hpccomm.bench.plot import COLOURS, format_bytes

FOLDER = Path(__file__).parent.parent / "docs"
FILES = {2: "node-p2.json", 4: "node-p4.json"}
INK = "#808080"
"""Readable on a white and on a dark page."""


def allreduce_ratios(file: Path) -> dict[int, list[float]]:
    """Open MPI's time over ours, launch by launch, by bytes."""
    times: dict[tuple[int, int], dict[str, float]] = defaultdict(dict)
    for one in node.read_rounds(file):
        for row in one["times"]:
            times[row["bytes"], one["round"]][row["contender"]] = row["p50_us"]
    found: dict[int, list[float]] = defaultdict(list)
    for (nbytes, _), one in sorted(times.items()):
        if {"Open MPI", "auto on Open MPI"} <= set(one):
            found[nbytes].append(one["Open MPI"] / one["auto on Open MPI"])
    return found


def program_ratios(file: Path) -> dict[str, list[float]]:
    """Native's time over ours for the loop of each program, round by round."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in json.loads(file.read_text())["records"]:
        if row["ranks"] == 2:
            found[row["program"]].append(row["native"]["loop"] / row["ours"]["loop"])
    return found


def draw_allreduce(axes: Any) -> None:
    """A line and a band for each number of ranks."""
    for colour, (ranks, name) in zip(COLOURS, FILES.items(), strict=False):
        ratios = allreduce_ratios(FOLDER / "measurements" / name)
        sizes = list(ratios)
        axes.fill_between(
            sizes, [min(ratios[n]) for n in sizes], [max(ratios[n]) for n in sizes], color=colour, alpha=0.2
        )
        axes.plot(sizes, [median(ratios[n]) for n in sizes], color=colour, label=f"{ranks} ranks", linewidth=2.2)
    axes.set_xscale("log", base=2)
    ticks = [4, 256, 16 << 10, 1 << 20, 64 << 20]
    axes.set_xticks(ticks, [format_bytes(each) for each in ticks])
    axes.set_title("allreduce, bytes of float32 (band: worst to best launch)", fontsize=11, loc="left", color=INK)
    axes.set_ylabel("times as fast as Open MPI", color=INK)
    axes.legend(frameon=False, labelcolor=INK, loc="upper left")


def draw_programs(axes: Any) -> None:
    """A dot and a line for each program."""
    ratios = program_ratios(FOLDER / "measurements" / "programs-open-mpi.json")
    names = sorted(ratios, key=lambda name: median(ratios[name]))
    for place, name in enumerate(names):
        axes.plot([min(ratios[name]), max(ratios[name])], [place, place], color=COLOURS[0], linewidth=2, alpha=0.5)
        axes.plot(median(ratios[name]), place, "o", color=COLOURS[0])
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_title("loops of ten programs, 2 ranks (worst, median, best)", fontsize=11, loc="left", color=INK)


def draw(out: Path) -> None:
    """Draw both panels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.patch.set_alpha(0)
    left, right = figure.subplots(1, 2)
    draw_allreduce(left)
    draw_programs(right)
    left.axhline(1, color=INK, linewidth=1)
    right.axvline(1, color=INK, linewidth=1)
    for axes in (left, right):
        axes.patch.set_alpha(0)
        axes.tick_params(colors=INK)
        axes.grid(True, color=INK, alpha=0.25, linewidth=0.6)
        for side in axes.spines.values():
            side.set_visible(False)
    harness.save(figure, out)


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(prog="scripts/bench glance", description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER / "figures" / "at-a-glance.svg", help="the picture")
    draw(parser.parse_args().out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
