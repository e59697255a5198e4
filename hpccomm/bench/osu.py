"""The tables of the OSU Micro-Benchmarks 7.4, byte for byte, so that scripts made for them can read ours.

Several algorithms side by side, which OSU has not, are further columns of the same width.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpccomm.bench.loop import Row
from hpccomm.bench.messages import Outcome, tail

VERSION = "v7.4"
FIRST, WIDTH = 10, 20


def header(title: str, datatype: str, columns: Sequence[str]) -> str:
    """Everything above the first row."""
    names = "# Size".ljust(FIRST) + "".join(name.rjust(WIDTH) for name in columns)
    return f"\n# OSU MPI {title} Latency Test {VERSION}\n# Datatype: {datatype}.\n{names}\n"


def columns(full: bool, check: bool, percentiles: Sequence[int]) -> list[str]:
    """The names of a single algorithm's columns."""
    names = ["Avg Latency(us)"]
    if full:
        names += ["Min Latency(us)", "Max Latency(us)", "Iterations"]
    if check:
        names.append("Validation")
    return names + [f"P{p} Tail Lat(us)" for p in percentiles]


def named_header(title: str, datatype: str, full: bool, check: bool, percentiles: Sequence[int]) -> str:
    """The header of a single algorithm; the count of iterations is narrower than the rest."""
    text = header(title, datatype, columns(full, check, percentiles))
    return text.replace("Iterations".rjust(WIDTH), "Iterations".rjust(12))


def line(row: Row, full: bool, check: bool, percentiles: Sequence[int]) -> str:
    """A row of a single algorithm."""
    text = f"{row.bytes:<{FIRST}d}{row.avg_us:>{WIDTH}.2f}"
    if full:
        text += f"{row.min_us:>{WIDTH}.2f}{row.max_us:>{WIDTH}.2f}{row.iterations:>12d}"
    if check:
        text += ("Pass" if row.validated else "Fail").rjust(WIDTH)
    return text + "".join(f"{row.percentile(p):>{WIDTH}.2f}" for p in percentiles) + "\n"


def compared_columns(algorithms: Sequence[str]) -> list[str]:
    """The names of several algorithms' columns: the latency of each, then how many times faster than native."""
    names = [f"{name}(us)" for name in algorithms]
    if "native" in algorithms:
        names += [f"native/{name}" for name in algorithms if name != "native"]
    return names


def compared_line(rows: Sequence[Row], check: bool) -> str:
    """One size of several algorithms."""
    native = next((row.avg_us for row in rows if row.algorithm == "native"), None)
    text = f"{rows[0].bytes:<{FIRST}d}" + "".join(f"{row.avg_us:>{WIDTH}.2f}" for row in rows)
    if native is not None:
        text += "".join(f"{native / row.avg_us:>{WIDTH}.2f}" for row in rows if row.algorithm != "native")
    if check:
        text += ("Pass" if all(row.validated for row in rows) else "Fail").rjust(WIDTH)
    return text + "\n"


def barrier_table(row: Row, full: bool) -> str:
    """A barrier has no sizes."""
    names = ["Avg Latency(us)"] + (["Min Latency(us)", "Max Latency(us)"] if full else [])
    values = [row.avg_us] + ([row.min_us, row.max_us] if full else [])
    first = "# " + names[0] + "".join(name.rjust(WIDTH) for name in names[1:])
    second = f"{values[0]:>17.2f}" + "".join(f"{value:>{WIDTH}.2f}" for value in values[1:])
    return f"\n# OSU MPI Barrier Latency Test {VERSION}\n{first}\n{second}\n"


def messages_header(title: str, column: str, check: bool, percentiles: Sequence[int]) -> str:
    """The header of a point-to-point test."""
    tails = "P{} Tail Lat(us)" if "Latency" in column else "P{} Tail BW(MB/s)"
    names = [column, *(["Validation"] if check else []), *(tails.format(p) for p in percentiles)]
    text = "# Size".ljust(FIRST) + "".join(name.rjust(WIDTH) for name in names)
    return f"\n# OSU MPI {title} Test {VERSION}\n# Datatype: MPI_CHAR.\n{text}\n"


def messages_line(outcome: Outcome, check: bool, percentiles: Sequence[int]) -> str:
    """A row of a point-to-point test."""
    text = f"{outcome.bytes:<{FIRST}d}{outcome.value:>{WIDTH}.2f}"
    if check:
        text += ("Pass" if outcome.validated else "Fail").rjust(WIDTH)
    return text + "".join(f"{tail(outcome, p):>{WIDTH}.2f}" for p in percentiles) + "\n"
