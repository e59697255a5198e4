"""Figures of measurements: latency, bus bandwidth and speed relative to native, against bytes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpccomm.errors import ArgumentError

NATIVE = "native"
KEYS = ("file", "collective", "datatype", "ranks", "in_place", "registered", "algorithm")
"""The fields that distinguish lines; a label names those that differ."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4A2B", "#5B2A86", "#8A8A8A", "#C8D400")
"""One colour for each algorithm; the first ones are Okabe and Ito's, which colour-blind readers can distinguish."""
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
"""One marker for each file or kind of call."""

Values = dict[str, Any]


class Line(NamedTuple):
    """One algorithm of one file."""

    key: Values
    label: str
    sizes: list[int]
    us: list[float]
    """Medians, which other load on the machine moves little; means where there are no medians."""
    busbw: list[float]
    ratio: list[float]
    """Native's time over this algorithm's; empty where native was not measured."""


class Panel(NamedTuple):
    """One of the diagrams side by side."""

    title: str
    unit: str
    values: str
    """The field of a line."""


PANELS = (
    Panel("Median latency", "µs", "us"),
    Panel("Bus bandwidth", "GB/s", "busbw"),
    Panel("Times as fast as native", "", "ratio"),
)


def draw(paths: Sequence[str], out: str) -> None:
    """Draw files of ``hpccomm bench --json`` into one figure, in the format that the suffix of ``out`` names.

    Raises ArgumentError for a file without measurements, ImportError without matplotlib.
    """
    files = {Path(path).stem: read(path) for path in paths}
    found = lines(files)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from None
    panels = [panel for panel in PANELS if any(getattr(line, panel.values) for line in found)]
    figure = Figure(figsize=(4.6 * len(panels) + 1.2, 5.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw_panel(axes, panel, found)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(heading(list(files.values())), fontsize=11, x=0.01, ha="left")
    figure.supxlabel(
        commands(files, 70 * len(panels)), fontsize=7, family="monospace", color="#555555", x=0.01, ha="left"
    )
    figure.savefig(out, dpi=150)


def read(path: str) -> Values:
    """Read a file of measurements."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        complete = all({"bytes", "avg_us", "p50_us", "busbw_GBps", *KEYS[1:]} <= set(row) for row in found["rows"])
        if found["rows"] and complete and {"machine", "mpi", "command"} <= set(found):
            return dict(found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ArgumentError(f"{path} holds no measurements: write them with hpccomm bench … --json {path}")


def lines(files: Mapping[str, Values]) -> list[Line]:
    """A line for each combination of :data:`KEYS`, in the order of measurement."""
    grouped: dict[tuple[Any, ...], list[Values]] = {}
    for name, file in files.items():
        for row in file["rows"]:
            grouped.setdefault((name, *(row[key] for key in KEYS[1:])), []).append(row)
    keys = [dict(zip(KEYS, each, strict=True)) for each in grouped]
    differ = [key for key in KEYS if varies(key, keys)] or ["algorithm"]
    return [
        line(key, label_of(key, differ), rows, grouped.get((*values[:-1], NATIVE), []))
        for key, (values, rows) in zip(keys, grouped.items(), strict=True)
    ]


def varies(key: str, keys: Sequence[Values]) -> bool:
    """Whether lines of one file differ in this field; files themselves are told apart by name."""
    files = {each["file"] for each in keys}
    if key == "file":
        return len(files) > 1
    return any(len({each[key] for each in keys if each["file"] == file}) > 1 for file in files)


def label_of(key: Values, differ: Sequence[str]) -> str:
    """The label of a line: the values in which it differs from others."""
    words = {
        "algorithm": str(key["algorithm"]),
        "ranks": f"{key['ranks']} ranks",
        "in_place": "in place" if key["in_place"] else "out of place",
        "registered": "registered" if key["registered"] else "ordinary",
    }
    return ", ".join(words.get(name, str(key[name])) for name in reversed(differ))


def line(key: Values, label: str, rows: Sequence[Values], native: Sequence[Values]) -> Line:
    """A line, the smallest size first."""
    rows = sorted((row for row in rows if row["bytes"]), key=lambda row: row["bytes"])
    native_us = {row["bytes"]: row_us(row) for row in native}
    comparable = key["algorithm"] != NATIVE and all(row["bytes"] in native_us for row in rows)
    return Line(
        key,
        label,
        [row["bytes"] for row in rows],
        [row_us(row) for row in rows],
        [row["busbw_GBps"] * row["avg_us"] / row_us(row) for row in rows],
        [native_us[row["bytes"]] / row_us(row) for row in rows] if comparable else [],
    )


def row_us(row: Values) -> float:
    """The median time, or the mean where no median was measured."""
    return float(row["p50_us"] or row["avg_us"])


def draw_panel(axes: Any, panel: Panel, found: Sequence[Line]) -> None:
    """Draw one panel."""
    algorithms = [name for name in dict.fromkeys(line.key["algorithm"] for line in found) if name != NATIVE]
    kinds = list(dict.fromkeys(kind(line) for line in found))
    for each in found:
        values = getattr(each, panel.values)
        if values:
            axes.plot(each.sizes, values, label=each.label, **style(each, algorithms, kinds))
    axes.set_title(panel.title + (f" ({panel.unit})" if panel.unit else ""), fontsize=10, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    if panel.values == "ratio":
        axes.axhline(1, color="black", linewidth=1.2)
    name_axes(axes, panel)


def kind(line: Line) -> tuple[Any, ...]:
    """All that identifies a line but its algorithm."""
    return tuple(line.key[key] for key in KEYS if key != "algorithm")


def style(line: Line, algorithms: Sequence[str], kinds: Sequence[tuple[Any, ...]]) -> Values:
    """Colours stand for algorithms, dashes for files and kinds of calls; native is black."""
    number = kinds.index(kind(line))
    native = line.key["algorithm"] == NATIVE
    return {
        "color": "black" if native else COLOURS[algorithms.index(line.key["algorithm"]) % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 3.5,
        "linewidth": 2.4 if line.key["algorithm"] == "auto" else 1.4,
        "alpha": 0.9,
    }


def name_axes(axes: Any, panel: Panel) -> None:
    """Ticks and labels: bytes on the x-axis, plain numbers on the y-axis, grid lines for both."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xlabel("bytes", fontsize=9)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def format_bytes(size: float) -> str:
    """Bytes in the largest binary unit of which they fill at least one: ``64Ki``."""
    for unit in ("", "Ki", "Mi", "Gi"):
        if size < 1024 or unit == "Gi":
            break
        size /= 1024
    return f"{size:g}{unit}"


def heading(files: Sequence[Values]) -> str:
    """The heading: collectives and datatypes, then the machines."""
    whats = dict.fromkeys(f"{row['collective']} of {row['datatype']}" for file in files for row in file["rows"])
    wheres = dict.fromkeys(describe_machine(file) for file in files)
    return "; ".join(whats) + "\n" + "\n".join(wheres)


def describe_machine(file: Values) -> str:
    """Ranks, processor and MPI of a file."""
    machine = file["machine"]
    return f"{machine.get('ranks', '')}, {machine.get('processor', '')}, {file['mpi']}"


def commands(files: Mapping[str, Values], width: int) -> str:
    """The commands that produced the files."""
    prefix = {name: f"{name}: " if len(files) > 1 else "$ " for name in files}
    return "\n".join(
        textwrap.fill(prefix[name] + file["command"], width, subsequent_indent="    ") for name, file in files.items()
    )
