"""Prints a schedule as one line a round, or draws it: ranks as rows, rounds as columns, messages as arrows.

*p ranks, b blocks, k the round.*  ``0-[3]->1``: rank 0 sends block 3 to rank 1; ``0-[2..4]->1``: blocks 2 to 4.
Rounds without messages are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives.schedule import Algorithm, without_node_steps

MAX_INCHES = 48.0
"""The largest height of a drawing."""
MAX_COLUMNS = 10
"""Rounds beside each other; further rounds are drawn below them."""
INK, SUM, COPY = "#7a7a7a", "#fb8c0026", "#1e88e526"
"""Text and lines, and the bands of rounds that sum or copy: readable on a white and on a dark page."""


class Message(NamedTuple):
    """One message, drawn as an arrow."""

    source: int
    to: int
    first: int
    size: int

    def label(self, blocks: int) -> str:
        """The blocks that it carries: ``3``, ``2..4``, ``6..1`` where they wrap around, ``all``."""
        if self.size == blocks:
            return "all" if blocks > 1 else "0"
        last = (self.first + self.size - 1) % blocks
        return str(self.first) if self.size == 1 else f"{self.first}..{last}"


class RoundColumn(NamedTuple):
    """One round, drawn as a column."""

    number: int
    reduce: bool
    messages: list[Message]


def rounds(algorithm: Algorithm, p: int, *root: int) -> Iterator[RoundColumn]:
    """The rounds of a schedule that have messages; what ranks of a node do among themselves is drawn as messages."""
    blocks, ranks = algorithm.blocks(p), np.arange(p)
    for k, step in enumerate(without_node_steps(algorithm.steps(ranks, p, *root), ranks)):
        to, lo, hi = (np.broadcast_to(x, (p,)) for x in (step.to, *step.send))
        messages = [
            Message(r, int(to[r]), int(lo[r]) % blocks, int(hi[r] - lo[r]))
            for r in range(p)
            if to[r] >= 0 and hi[r] > lo[r]
        ]
        if messages:
            yield RoundColumn(k, step.reduce, messages)


def text(algorithm: Algorithm, p: int, *root: int) -> Iterator[str]:
    """One line a round: its number, whether receivers sum or copy, and its messages."""
    blocks = algorithm.blocks(p)
    for each in rounds(algorithm, p, *root):
        arrows = (f"{m.source}-[{m.label(blocks)}]->{m.to}" for m in each.messages)
        yield f"round {each.number:>3}  {'sum ' if each.reduce else 'copy'}  {'  '.join(arrows)}"


def draw_schedule(
    algorithm: Algorithm, p: int, out: str | Path, title: str, *root: int, nodes: Sequence[int] = ()
) -> None:
    """Draw the schedule into ``out``, in the format of the name's suffix (png, svg, pdf).

    An arrow has the colour of its first block; it is solid where the receiver sums, dashed where it copies.  With
    ``nodes``, the node of each rank, arrows between nodes are thick and the nodes are marked at the left.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    columns = list(rounds(algorithm, p, *root))
    rows = [columns[k : k + MAX_COLUMNS] for k in range(0, len(columns), MAX_COLUMNS)] or [[]]
    width = max(len(rows[0]), 2)
    figure = Figure(
        figsize=(1.6 + 1.25 * width, min(MAX_INCHES, (1.2 + 0.55 * max(p, 2)) * len(rows) + 0.3)), layout="constrained"
    )
    for number, (axes, row) in enumerate(zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True)):
        for x, column in enumerate(row):
            draw_round(axes, x, column, algorithm.blocks(p), nodes)
        frame(axes, row, p, "" if number else title, width, nodes)
    said = "round (solid on orange: summed, dashed on blue: copied; in the boxes: blocks)"
    figure.supxlabel(said, fontsize=9, color=INK)
    with rc_context({"svg.hashsalt": title}):  # the same schedule gives the same file
        dated = {"metadata": {"Date": None}} if str(out).endswith(".svg") else {}
        figure.savefig(out, dpi=150, transparent=True, **dated)


def draw_round(axes: Any, x: int, column: RoundColumn, blocks: int, nodes: Sequence[int] = ()) -> None:
    """One column of arrows; the label with the blocks is at the tail, where no other arrow begins."""
    axes.axvspan(x + 0.01, x + 0.99, color=SUM if column.reduce else COPY, zorder=0, linewidth=0)
    line = "-" if column.reduce else (0, (4, 2))
    for m in column.messages:
        colour = colour_of(m.first, blocks)
        far = bool(nodes) and nodes[m.source] != nodes[m.to]
        arrow = {
            "arrowstyle": "-|>",
            "linewidth": 2.8 if far else 1.6,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 11,
        }
        ends = {"xy": (x + 0.94, m.to), "xytext": (x + 0.16, m.source)}
        axes.annotate("", **ends, arrowprops={**arrow, "color": colour, "linestyle": line})
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour, "linewidth": 1.0}
        label = {"fontsize": 8, "ha": "left", "va": "center", "zorder": 5, "bbox": box}
        axes.text(x + 0.07, m.source, m.label(blocks), color=colour, **label)


def colour_of(block: int, blocks: int) -> Any:
    """The colour of a block: ten distinct colours where they suffice, else a gradient."""
    from matplotlib import colormaps

    few = 10
    return colormaps["tab10"](block) if blocks <= few else colormaps["turbo"](block / (blocks - 1) * 0.9 + 0.05)


def frame(axes: Any, columns: list[RoundColumn], p: int, title: str, width: int, nodes: Sequence[int] = ()) -> None:
    """Label the ranks at the left and the rounds on top, and draw a line for each rank and between nodes."""
    axes.set_xlim(0, width)
    axes.set_ylim(p - 0.5, -0.5)
    axes.set_yticks(range(p), [f"node {nodes[r]}, rank {r}" if nodes else f"rank {r}" for r in range(p)])
    for r in range(1, p):
        if nodes and nodes[r] != nodes[r - 1]:
            axes.axhline(r - 0.5, color=INK, linewidth=1.6, zorder=2)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [str(each.number) for each in columns])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=INK)
    for r in range(p):
        axes.axhline(r, color=INK, linewidth=0.8, alpha=0.5, zorder=1)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, pad=8, color=INK)
