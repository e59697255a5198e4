"""Pictures of runs: the loss against what a rank has sent, and against the time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from hpccomm.bench.plot import COLOURS, DASHES
from hpccomm.errors import ArgumentError

Run = dict[str, Any]
"""What ``--json`` keeps of one method."""


class Curve(NamedTuple):
    """One method, a point an epoch."""

    method: str
    loss: list[float]
    megabytes: list[float]
    """That rank 0 has sent since the beginning."""
    seconds: list[float]
    """Computing, exchanging and stepping since the beginning, the mean over the ranks."""


def curves(runs: Sequence[Run]) -> list[Curve]:
    """In the order of the runs."""
    return [curve(run) for run in runs]


def curve(run: Run) -> Curve:
    """Sums over the epochs."""
    epochs = run["epochs"]
    times = map(seconds_of, epochs)
    sent = (each["wire_bytes"] * run["steps_an_epoch"] / 1e6 for each in epochs)
    return Curve(run["method"], [each["loss"] for each in epochs], list(accumulate(sent)), list(accumulate(times)))


def seconds_of(epoch: dict[str, Any]) -> float:
    """All of an epoch: computing, exchanging and stepping."""
    return float(epoch["compute_s"] + epoch["communication_s"] + epoch["step_s"])


def check_drawable(file: Path) -> None:
    """Raise where no picture can be drawn of the kind that the file's ending says."""
    kinds = canvas().get_supported_filetypes()
    if file.suffix[1:] not in kinds:
        raise ArgumentError(f"--plot {file}: end the name with .png, .svg or .pdf")


def canvas() -> Any:
    """An empty one; raises without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ArgumentError("--plot draws with matplotlib: pip install 'hpccomm[plot]'") from None
    return FigureCanvasAgg(Figure(figsize=(11, 4.6), layout="constrained"))


def draw(runs: Sequence[Run], file: Path) -> None:
    """One line a method; a single rank sends nothing and has no picture of bytes."""
    found, figure = curves(runs), canvas().figure
    panels = [("seconds", "seconds"), ("megabytes", "megabytes sent by rank 0")]
    panels = [each for each in panels if any(getattr(curve, each[0])[-1] for curve in found)]
    for axes, (values, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, each in enumerate(found):
            dash = DASHES[number // len(COLOURS) % len(DASHES)]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(getattr(each, values), each.loss, dash, color=colour, marker="o", markersize=3, label=each.method)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylabel("loss")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.7)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    figure.suptitle(f"{runs[0]['dataset']}, {runs[0]['ranks']} ranks, seed {runs[0]['seed']}", fontsize=11)
    figure.savefig(file)
