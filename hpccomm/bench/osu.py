"""The tables of the OSU Micro-Benchmarks 7.4, byte for byte, so that scripts that parse OSU's output parse ours.

A table is a list of columns.  Where several algorithms are measured, which OSU cannot do, each adds its columns.
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
"""NumPy's names of OSU's datatypes, and of two more: ``mpi_double``, and ``half`` as nccl-tests calls it."""


class Column(NamedTuple):
    """A title, and the text below it for the rows of one size, one row for each algorithm."""

    title: str
    text: Callable[[Sequence[Row]], str]
    width: int = WIDTH


class ColumnOptions(NamedTuple):
    """The columns that the command line selects."""

    full: bool = False
    check: bool = False
    percentiles: tuple[int, ...] = ()
    new_arrays: bool = False


def title(collective: str) -> str:
    """The line that names the test."""
    return f"# OSU MPI {CASES[collective].title} v{VERSION}"


def datatype_line(word: str) -> str:
    """The line that names the datatype, above the titles."""
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


def columns_of(collective: str, algorithms: Sequence[str], options: ColumnOptions) -> list[Column]:
    """The columns of OSU's table for one algorithm, or of a comparison of several."""
    found = (
        osu_columns(collective, options)
        if len(algorithms) == 1
        else comparison_columns(collective, algorithms, options)
    )
    if collective != "barrier":
        return [Column("# Size", lambda rows: str(rows[0].bytes), 10), *found]
    first = found[0]
    return [first._replace(title=f"# {first.title}", width=max(17, len(first.title) + 2)), *found[1:]]


def osu_columns(collective: str, options: ColumnOptions) -> list[Column]:
    """The columns that OSU prints."""
    bandwidth = is_bandwidth(collective)
    if bandwidth:
        found = [bandwidth_column("Bandwidth (MB/s)", 0, "avg_us")]
    else:
        found = [statistic("Avg Latency(us)", 0, "avg_us")]
    if options.new_arrays:
        found += [statistic(title, 0, f"{field}_avg_us") for title, field in NEW_ARRAYS.items()]
    if options.full:
        found += [statistic("Min Latency(us)", 0, "min_us"), statistic("Max Latency(us)", 0, "max_us"), ITERATIONS]
    if options.check:
        found.append(VALIDATION)
    unit = "BW(MB/s)" if bandwidth else "Lat(us)"
    return found + [tail(f"P{p} Tail {unit}", 0, k, bandwidth) for k, p in enumerate(options.percentiles)]


def comparison_columns(collective: str, algorithms: Sequence[str], options: ColumnOptions) -> list[Column]:
    """The median latency or bandwidth of each algorithm, then the speed of each as a multiple of native's."""
    found: list[Column] = []
    bandwidth = is_bandwidth(collective)
    new = {title: f"{field}_p50_us" for title, field in NEW_ARRAYS.items()} if options.new_arrays else {}
    for k, name in enumerate(algorithms):
        make, unit = (bandwidth_column, "MB/s") if bandwidth else (statistic, "us")
        found.append(make(f"{name} P50({unit})", k, "p50_us"))
        found += [statistic(f"{name} {title}", k, field) for title, field in new.items()]
        if options.full:
            found += [statistic(f"{name} {word}(us)", k, f"{word.lower()}_us") for word in ("Avg", "Min", "Max")]
        found += [tail(f"{name} P{p}({unit})", k, j, bandwidth) for j, p in enumerate(options.percentiles)]
    if "native" in algorithms:
        native = list(algorithms).index("native")
        for title, field in {"": "p50_us", **new}.items():
            words = f" {title.removesuffix('(us)')}".rstrip()
            others = [(k, name) for k, name in enumerate(algorithms) if k != native]
            found += [speed_up(f"native/{name}{words}", native, k, field) for k, name in others]
    return [*found, *([ITERATIONS] if options.full else []), *([VALIDATION] if options.check else [])]


def statistic(title: str, k: int, field: str) -> Column:
    """A field of the k-th algorithm's row."""
    return wide_column(title, lambda rows: number(getattr(rows[k], field)))


def bandwidth_column(title: str, k: int, field: str) -> Column:
    """The bandwidth of the k-th algorithm that belongs to a time of its row, in MB/s."""
    return wide_column(title, lambda rows: number(bandwidth_of(rows[k], getattr(rows[k], field))))


def bandwidth_of(row: Row, microseconds: float) -> float:
    """The bandwidth in MB/s if a call of a row takes so long."""
    return row.algbw_GBps * 1e3 * row.avg_us / microseconds


def tail(title: str, k: int, j: int, bandwidth: bool = False) -> Column:
    """The j-th percentile of the k-th algorithm; of bandwidth tests in MB/s."""

    def text(rows: Sequence[Row]) -> str:
        row = rows[k]
        return number(bandwidth_of(row, row.tails[j]) if bandwidth else row.tails[j])

    return wide_column(title, text)


def speed_up(title: str, native: int, k: int, field: str) -> Column:
    """A median time of native over that of the k-th algorithm."""
    return wide_column(title, lambda rows: number(getattr(rows[native], field) / getattr(rows[k], field)))


def wide_column(name: str, text: Callable[..., str]) -> Column:
    """A column of OSU's width, or wider where its title needs that."""
    return Column(name, text, max(WIDTH, len(name) + 2))


def is_bandwidth(collective: str) -> bool:
    """Whether the table shows bandwidth."""
    return CASES[collective].ends < 0


def number(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


NEW_ARRAYS = {"New Arrays(us)": "new", "New, Call Only(us)": "new_call"}
"""Titles of the times on new arrays, with their making and without, and the fields of a row."""
ITERATIONS = Column("Iterations", lambda rows: str(rows[0].iterations), 12)
VALIDATION = Column("Validation", lambda rows: "Pass" if all(row.validated for row in rows) else "Fail")


def failure(program: str, size: int) -> str:
    """The last line that OSU prints when a result is wrong."""
    return f"DATA VALIDATION ERROR: {program} exited with status 1 on message size {size}."
