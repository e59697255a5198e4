"""Pictures of measurements: latency, bus bandwidth, and how many times faster than native."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpccomm.errors import ArgumentError


class Line(NamedTuple):
    """One algorithm of one file."""

    label: str
    algorithm: str
    rows: list[dict[str, Any]]


def draw(paths: Sequence[str], out: str) -> None:
    """Draw the files that ``hpccomm bench --json`` wrote into one picture (the ending of ``out`` says which kind)."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install 'hpccomm[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = [read(path) for path in paths]
    groups = [
        lines_of(file, Path(path).stem if len(paths) > 1 else "") for file, path in zip(files, paths, strict=True)
    ]
    panels = 3 if any(ratios(group) for group in groups) else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 4.4), constrained_layout=True)
    for group in groups:
        for line in group:
            plot_line(axes, line, ratios(group))
    finish(axes, files[0])
    figure.suptitle(caption(files[0]), fontsize=9)
    figure.savefig(out, dpi=140)
    pyplot.close(figure)


def read(path: str) -> dict[str, Any]:
    """A file of measurements."""
    try:
        found: dict[str, Any] = json.loads(Path(path).read_text())
        if not found["rows"] or "algorithm" not in found["rows"][0]:
            raise KeyError
    except (OSError, ValueError, KeyError, TypeError):
        raise ArgumentError(
            f"{path} holds no measurements of collectives: write it with hpccomm bench --json"
        ) from None
    return found


def lines_of(file: dict[str, Any], name: str) -> list[Line]:
    """A line for each algorithm."""
    algorithms = dict.fromkeys(row["algorithm"] for row in file["rows"])
    return [
        Line(" ".join(filter(None, (name, each))), each, [row for row in file["rows"] if row["algorithm"] == each])
        for each in algorithms
    ]


def ratios(group: Sequence[Line]) -> dict[int, float]:
    """Native's latency at each size, where native was measured beside others."""
    native = [row for line in group if line.algorithm == "native" for row in line.rows]
    return {row["bytes"]: row["avg_us"] for row in native} if len(group) > 1 else {}


def plot_line(axes: Any, line: Line, native: dict[int, float]) -> None:
    """One algorithm in every panel."""
    sizes = [row["bytes"] for row in line.rows]
    style = {"marker": "o", "markersize": 3, "linewidth": 2.2 if line.algorithm == "auto" else 1.3, "label": line.label}
    axes[0].plot(sizes, [row["avg_us"] for row in line.rows], **style)
    axes[1].plot(sizes, [row["busbw_GBps"] for row in line.rows], **style)
    if native and line.algorithm != "native":
        axes[2].plot([], [])
        axes[2].plot(sizes, [native[row["bytes"]] / row["avg_us"] for row in line.rows], **style)


def finish(axes: Any, file: dict[str, Any]) -> None:
    """Scales, names, grids."""
    titles = ("latency, µs", "bus bandwidth, GB/s", "times as fast as native")
    for panel, title in zip(axes, titles, strict=False):
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel("bytes")
        panel.set_title(title, fontsize=10)
        panel.grid(True, which="major", alpha=0.3)
        panel.xaxis.set_major_formatter(lambda size, _: readable(size))
        panel.legend(fontsize=8)
    if len(axes) == 3:
        axes[2].set_yscale("linear")
        axes[2].axhline(1, color="black", linewidth=0.8)


def readable(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.0f} GiB"


def caption(file: dict[str, Any]) -> str:
    """What was measured, where, and the command that did it."""
    row = file["rows"][0]
    where = f"{row['collective']}, {row['datatype']}, {file['ranks']}, {file['mpi']}, {file['machine']['cpu']}"
    return f"{where}\n{file['command']}"
