"""The tables of the OSU Micro-Benchmarks 7.4, byte for byte, so that scripts made for them read ours.

A table is a list of columns.  Several algorithms side by side, which OSU has not, are further columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hpccomm.bench.cases import CASES
from hpccomm.bench.loop import Row

VERSION = "7.4"
WIDTH = 20
DATATYPES = {
    "mpi_char": "i1",  # summed as MPI_SIGNED_CHAR: MPI defines no sums of MPI_CHAR
    "mpi_int": "i4",
    "mpi_float": "f4",
    "mpi_double": "f8",
    "half": "f2",
}
"""NumPy's names of OSU's datatypes, and of two more; the last is nccl-tests' word."""


class Column(NamedTuple):
    """A title, and what stands below it for the rows of one size (one an algorithm)."""

    title: str
    text: Callable[[Sequence[Row]], str]
    width: int = WIDTH


class ColumnOptions(NamedTuple):
    """Columns that are asked for."""

    full: bool = False
    check: bool = False
    percentiles: tuple[int, ...] = ()


def title(collective: str) -> str:
    """The line that says which test this is."""
    return f"# OSU MPI {CASES[collective].title} v{VERSION}"


def datatype_line(word: str) -> str:
    """The line above the titles."""
    return f"# Datatype: {word.upper()}."


def header(columns: Sequence[Column]) -> str:
    """The line of titles."""
    first, *rest = columns
    return first.title.ljust(first.width) + "".join(column.title.rjust(column.width) for column in rest)


def line(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """The line of one size."""
    first, *rest = columns
    start = first.text(rows)
    start = start.ljust(first.width) if first.title == "# Size" else start.rjust(first.width)
    return start + "".join(column.text(rows).rjust(column.width) for column in rest)


def columns_of(collective: str, algorithms: Sequence[str], wanted: ColumnOptions) -> list[Column]:
    """The table of one algorithm as OSU prints it, or of several."""
    found = osu_columns(collective, wanted) if len(algorithms) == 1 else comparison_columns(algorithms, wanted)
    if collective != "barrier":
        return [Column("# Size", lambda rows: str(rows[0].bytes), 10), *found]
    first = found[0]
    return [first._replace(title=f"# {first.title}", width=max(17, len(first.title) + 2)), *found[1:]]


def osu_columns(collective: str, wanted: ColumnOptions) -> list[Column]:
    """OSU's columns."""
    if is_bandwidth(collective):
        found = [Column("Bandwidth (MB/s)", lambda rows: number(rows[0].algbw_GBps * 1e3))]
    else:
        found = [Column("Avg Latency(us)", lambda rows: number(rows[0].avg_us))]
    if wanted.full:
        found.append(Column("Min Latency(us)", lambda rows: number(rows[0].min_us)))
        found.append(Column("Max Latency(us)", lambda rows: number(rows[0].max_us)))
        found.append(Column("Iterations", iterations, 12))
    if wanted.check:
        found.append(Column("Validation", validation))
    unit = "BW(MB/s)" if is_bandwidth(collective) else "Lat(us)"
    return found + [
        Column(f"P{p} Tail {unit}", lambda rows, k=k: number(tail(rows[0], k)))  # type: ignore[misc]
        for k, p in enumerate(wanted.percentiles)
    ]


def comparison_columns(algorithms: Sequence[str], wanted: ColumnOptions) -> list[Column]:
    """For each algorithm its median latency; then how many times as fast as native each is."""
    found: list[Column] = []
    for k, name in enumerate(algorithms):
        found.append(wide_column(f"{name} P50(us)", lambda rows, k=k: number(median(rows[k]))))
        if wanted.full:
            found.append(wide_column(f"{name} Avg(us)", lambda rows, k=k: number(rows[k].avg_us)))
            found.append(wide_column(f"{name} Min(us)", lambda rows, k=k: number(rows[k].min_us)))
            found.append(wide_column(f"{name} Max(us)", lambda rows, k=k: number(rows[k].max_us)))
        for j, p in enumerate(wanted.percentiles):
            found.append(wide_column(f"{name} P{p}(us)", lambda rows, k=k, j=j: number(rows[k].tails[j])))
    if "native" in algorithms:
        native = list(algorithms).index("native")
        for k, name in enumerate(algorithms):
            if k != native:
                found.append(
                    wide_column(f"native/{name}", lambda rows, k=k: number(median(rows[native]) / median(rows[k])))
                )
    if wanted.full:
        found.append(Column("Iterations", iterations, 12))
    return [*found, Column("Validation", validation)] if wanted.check else found


def median(row: Row) -> float:
    """Half of the calls are faster."""
    assert row.p50_us is not None
    return row.p50_us


def wide_column(name: str, text: Callable[..., str]) -> Column:
    """A column that is wide enough for its title."""
    return Column(name, text, max(WIDTH, len(name) + 2))


def is_bandwidth(collective: str) -> bool:
    """Whether the table shows bandwidth."""
    return CASES[collective].ends < 0


def number(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


def iterations(rows: Sequence[Row]) -> str:
    """Timed calls."""
    return str(rows[0].iterations)


def validation(rows: Sequence[Row]) -> str:
    """Pass where all results are right."""
    return "Pass" if all(row.validated for row in rows) else "Fail"


def tail(row: Row, k: int) -> float:
    """The k-th percentile, in the table's unit."""
    if not is_bandwidth(row.collective):
        return row.tails[k]
    return row.algbw_GBps * 1e3 * row.avg_us / row.tails[k]


def failure(program: str, size: int) -> str:
    """OSU's last line when a result is wrong."""
    return f"DATA VALIDATION ERROR: {program} exited with status 1 on message size {size}."
