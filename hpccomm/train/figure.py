"""Figures of runs: the loss against the bytes that rank 0 has sent, and against time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hpccomm.bench.plot import COLOURS, DASHES
from hpccomm.errors import ArgumentError

Run = dict[str, Any]
"""What ``--json`` writes for one method."""


SLOW_START = 3.0
"""A first epoch of so many times the median of the others is taken to contain compiling and other set-up."""


class Curve(NamedTuple):
    """One method, with a point for each epoch."""

    method: str
    loss: list[float]
    megabytes: list[float]
    """Sent by rank 0 since the start."""
    seconds: list[float]
    """Spent on gradients, exchanges and steps since the start, the mean over the ranks, without ``setup``."""
    setup: float = 0.0
    """Seconds by which the first epoch was longer than the others, if it was much longer."""


def curve(run: Run) -> Curve:
    """The curve of a run: running sums over its epochs."""
    epochs = run["epochs"]
    times = [seconds_of(epoch) for epoch in epochs]
    setup = setup_of(times)
    times[0] -= setup
    sent = (each["wire_bytes"] * run["steps_an_epoch"] / 1e6 for each in epochs)
    losses = [each["loss"] for each in epochs]
    return Curve(run["method"], losses, list(accumulate(sent)), list(accumulate(times)), setup)


def setup_of(times: Sequence[float]) -> float:
    """The set-up in the first epoch, which would push all others to the end of the time axis; 0 where it is short."""
    usual = median(times[1:]) if len(times) > 1 else times[0]
    return times[0] - usual if times[0] > SLOW_START * usual else 0.0


def seconds_of(epoch: dict[str, Any]) -> float:
    """Seconds of an epoch: gradients, exchanges and steps."""
    return float(epoch["compute_s"] + epoch["communication_s"] + epoch["step_s"])


def check_drawable(file: Path) -> None:
    """Raise where matplotlib is missing or cannot draw files with this suffix."""
    kinds = canvas().get_supported_filetypes()
    if file.suffix[1:] not in kinds:
        raise ArgumentError(f"--plot {file}: the file must end in .png, .svg or .pdf")


def canvas() -> Any:
    """An empty canvas; raises without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError("--plot needs matplotlib: pip install matplotlib") from None
    return FigureCanvasAgg(Figure(figsize=(11, 4.6), layout="constrained"))


def draw(runs: Sequence[Run], file: Path) -> None:
    """Draw one line for each method; runs on one rank send nothing and have no panel of bytes."""
    found, figure = [curve(run) for run in runs], canvas().figure
    panels = [("seconds", "seconds"), ("megabytes", "megabytes sent by rank 0")]
    panels = [each for each in panels if any(getattr(curve, each[0])[-1] for curve in found)]
    for axes, (values, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, each in enumerate(found):
            dash = DASHES[number // len(COLOURS) % len(DASHES)]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(getattr(each, values), each.loss, dash, color=colour, marker="o", markersize=3, label=each.method)
        setup = max(each.setup for each in found) if values == "seconds" else 0.0
        if values == "seconds":
            axes.set_xlim(left=0)
        else:
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"{label}, after a set-up of up to {setup:.1f} s" if setup else label)
        axes.set_ylabel("loss")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{runs[0]['dataset']}, {runs[0]['ranks']} ranks, seed {runs[0]['seed']}", fontsize=11)
    figure.savefig(file)
