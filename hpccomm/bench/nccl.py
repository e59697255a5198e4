"""The table of nccl-tests: size, count, type, operation, root, then time, algbw, busbw and wrong elements, twice.

Sizes are those of the whole vector; bandwidths are in 10^9 bytes a second.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

from hpccomm.bench.cases import CASES
from hpccomm.bench.loop import Row

TYPES = {"float32": "float", "float64": "double", "int8": "int8", "int32": "int32", "int64": "int64", "float16": "half"}


def preamble(program: str, iterations: int, warmup: int, check: bool) -> str:
    """What stands above the list of ranks."""
    return (
        "# nccl-tests version 2.19.6 (format) hpccomm\n"
        f"# Collective test starting: {program}_perf\n"
        f"# nThread 1 nGpus 0 warmup iters: {warmup} iters: {iterations} agg iters: 1 "
        f"validation: {int(check)} graph: 0 unalign: 0\n#\n# Using devices\n"
    )


def device_line(rank: int) -> str:
    """A rank; its device is the host."""
    return f"#  Rank {rank:2d} Group  0 Pid {os.getpid():6d} on {platform.node():>10} device  0 [host] CPU\n"


def header() -> str:
    """Three lines: the halves, the names, the units."""
    half = f"{'time':>7}  {'algbw':>6}  {'busbw':>6}  {'#wrong':>6}"
    units = f"{'(us)':>7}  {'(GB/s)':>6}  {'(GB/s)':>6}  {'':>6}"
    names = f"#{'size':>11}  {'count':>12}  {'type':>8}  {'redop':>6}  {'root':>6}  "
    over = f"#{'':>56}{'out-of-place':>27}  {'in-place':>27}\n"
    below = f"#{'(B)':>11}  {'(elements)':>12}  {'':>8}  {'':>6}  {'':>6}  {units}  {units}\n"
    return f"#\n{over}{names}{half}  {half}\n{below}"


def line(apart: Row, in_place: Row) -> str:
    """One size: thirteen words."""
    case = CASES[apart.collective]
    size = case.whole(apart.bytes, apart.ranks)
    count = size // itemsize(apart.datatype)
    kind = TYPES.get(apart.datatype, apart.datatype)
    op, root = ("sum" if case.reduces else "none"), (0 if case.rooted else -1)
    left = f"{size:>12}  {count:>12}  {kind:>8}  {op:>6}  {root:>6}"
    return "  ".join([left, half(apart), half(in_place)]) + "\n"


def half(row: Row) -> str:
    """Time, algbw, busbw, wrong elements."""
    wrong = "N/A" if row.validated is None else str(row.wrong)
    return f"{short(row.avg_us):>7}  {short(row.algbw_GBps):>6}  {short(row.busbw_GBps):>6}  {wrong:>6}"


def short(number: float) -> str:
    """As many decimals as fit."""
    return f"{number:.2f}" if number < 1000 else f"{number:.1f}" if number < 100000 else f"{number:.0f}"


def itemsize(datatype: str) -> int:
    """Bytes an element."""
    import numpy as np

    return np.dtype(datatype).itemsize


def footer(program: str, rows: Sequence[Row]) -> str:
    """Wrong elements, and the mean of all bus bandwidths."""
    wrong = sum(row.wrong for row in rows)
    mean = sum(row.busbw_GBps for row in rows) / max(1, len(rows))
    verdict = "OK" if not wrong else "FAILED"
    return (
        f"# Out of bounds values : {wrong} {verdict}\n# Avg bus bandwidth    : {mean:.6g} \n#\n"
        f"# Collective test concluded: {program}_perf\n"
    )
