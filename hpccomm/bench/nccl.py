"""The table of nccl-tests 2.19.6: size, count, type, operation, root; then time, algbw, busbw, wrong elements, twice.

The first half is measured out of place, the second in place.  Sizes are those of the whole vector, counts those of what
one rank contributes; bandwidths are in 10^9 bytes a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpccomm.bench.cases import CASES
from hpccomm.bench.loop import Row

TYPES = {"float16": "half", "float32": "float", "float64": "double", "int8": "int8", "int32": "int32", "int64": "int64"}
LEFT = "{:>12}  {:>12}  {:>8}  {:>6}  {:>6}"
HALF = "  {:>7}  {:>6}  {:>6}  {:>6}"


class Run(NamedTuple):
    """The parameters of a run that stand above its first row."""

    program: str
    smallest: int
    largest: int
    factor: int
    warmup: int
    iterations: int
    check: bool
    step_bytes: int = 0
    """The bytes between sizes where the factor is 1."""


class Place(NamedTuple):
    """Where a rank runs."""

    rank: int
    pid: int
    host: str
    processor: str


def preamble(run: Run, software: str) -> list[str]:
    """The lines above the list of ranks."""
    return [
        f"# nccl-tests version 2.19.6 (its format; measured by {software})",
        f"# Collective test starting: {run.program}",
        f"# nThread 1 nGpus 0 minBytes {run.smallest} maxBytes {run.largest} step: {describe_step(run)} "
        f"warmup iters: {run.warmup} iters: {run.iterations} agg iters: 1 validation: {int(run.check)} "
        "graph: 0 unalign: 0",
        "#",
        "# Using devices",
    ]


def describe_step(run: Run) -> str:
    """The distance between sizes, as nccl-tests prints it."""
    return f"{run.factor}(factor)" if run.factor > 1 else f"{run.step_bytes}(bytes)"


def device_line(place: Place) -> str:
    """The line of a rank; its device is the host."""
    rank, pid, host, processor = place
    return f"#  Rank {rank:2d} Group  0 Pid {pid:6d} on {host:>10} device  0 [host] {processor}"


def header() -> list[str]:
    """The lines of titles: the two halves, the columns, the units."""
    empty = f"# {'':>10}  {'':>12}  {'':>8}  {'':>6}  {'':>6}"
    names = f"# {'size':>10}  {'count':>12}  {'type':>8}  {'redop':>6}  {'root':>6}"
    units = f"# {'(B)':>10}  {'(elements)':>12}  {'':>8}  {'':>6}  {'':>6}"
    return [
        "#",
        empty + "           out-of-place                       in-place          ",
        names + 2 * HALF.format("time", "algbw", "busbw", "#wrong") + " ",
        units + 2 * HALF.format("(us)", "(GB/s)", "(GB/s)", "") + " ",
    ]


def line(out_of_place: Row, in_place: Row, root: int) -> str:
    """The line of one size, thirteen words."""
    row = out_of_place
    case, width = CASES[row.collective], np.dtype(row.datatype).itemsize
    elements = row.bytes // width
    divided = case.size_per_rank or row.collective.startswith("reduce_scatter")
    count = elements // row.ranks if divided else elements
    size = (count * row.ranks if case.size_per_rank else elements) * width
    op, shown = "sum" if case.reduces else "none", root if case.has_root else -1
    left = LEFT.format(size, count, TYPES.get(row.datatype, row.datatype), op, shown)
    return left + half(row) + half(in_place)


def half(row: Row) -> str:
    """The columns of one row: time, algbw, busbw, wrong elements."""
    wrong = "N/A" if row.validated is None else f"{row.wrong:g}"
    return HALF.format(fit_number(row.avg_us, 7), fit_number(row.algbw_GBps, 6), fit_number(row.busbw_GBps, 6), wrong)


def fit_number(value: float, width: int) -> str:
    """A number with up to two decimals, as many as fit into the width."""
    for digits in (2, 1, 0):
        text = f"{value:.{digits}f}"
        if len(text) <= width:
            return text
    return f"{value:.{1 if width >= 7 else 0}e}"


def footer(run: Run, rows: Sequence[Row], least: float | None) -> list[str]:
    """The number of wrong results and the mean bus bandwidth, with a verdict on it where a ``least`` one is given."""
    wrong = sum(row.wrong > 0 for row in rows)
    verdict = "" if least is None else "OK" if fast_enough(rows, least) else "FAILED"
    return [
        f"# {'Out of bounds values':<20} : {wrong} {'FAILED' if wrong else 'OK'}",
        f"# {'Avg bus bandwidth':<20} : {mean_bandwidth(rows):g} {verdict}",
        "#",
        f"# Collective test concluded: {run.program}",
    ]


def mean_bandwidth(rows: Sequence[Row]) -> float:
    """The mean bus bandwidth over both halves of all rows."""
    return sum(row.busbw_GBps for row in rows) / max(1, len(rows))


def fast_enough(rows: Sequence[Row], least: float | None) -> bool:
    """Whether the mean bandwidth is at least 0.9 times ``least``, as in nccl-tests."""
    return least is None or mean_bandwidth(rows) >= 0.9 * least
