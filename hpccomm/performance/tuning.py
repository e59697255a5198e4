"""Selects the algorithm of a call from a tuning table: by measurements, else by predicted prices, else native MPI.

*A row is one measurement; a shape is (nodes, ranks a node).*  The rules, in order:

1. With rows of this collective, datatype (else ``f4``) and memory: the rows of the nearest measured shape decide.  One
   node matches one node and several match several, at most a factor of four apart in nodes and in ranks a node.
   Between two measured sizes, times are interpolated on logarithmic scales; below the smallest size its time holds,
   above the largest, times grow with the bytes.  The fastest algorithm is selected if it beats native MPI, with the
   checks around it, by more than the noise, 5 %.
2. Without rows, on one node: native MPI.  So also with rows of another processor, or of fewer ranks a node only, until
   the first use has compared the algorithm of these rows with native MPI (:mod:`hpccomm.first_use`).
3. Without rows, on several nodes: the hierarchical algorithm if its price is a fifth below that of the cheapest flat
   one, which stands for native MPI; else native MPI.

The table is the file named by ``HPCCOMM_TUNING`` (``off`` for none), else the one in ``~/.config/hpccomm`` for this
host and MPI, else the default table of the package.  Trailing digits of host names are ignored, so a table of n017
serves n018.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import chain, takewhile
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.hierarchical import HIERARCHICAL
from hpccomm.layout import Link
from hpccomm.performance.machine import Machine
from hpccomm.performance.measured import REACH, CostCurve, Point, RoundType, Shape, distance, distance_key, interpolate
from hpccomm.performance.units import format_time

SCHEMA = 2
"""The version of files that are written; version 1, whose lines are single rows, is read as well."""
NOISE = 0.95
"""An algorithm replaces native MPI if it takes less than this fraction of its time."""
CHECKS = 1.0
"""Microseconds that a communicator's checks add to a native call on one node, whose rows are measured without them (on
the machine of the default table: 1.1 µs on two ranks).  On several nodes the rows of native MPI include them: where
ranks share cores, comparing calls takes as long as the other ranks of the node wait for a core."""
TRUST = 0.8
"""A predicted price counts if it is less than this fraction of native MPI's."""
FLAT_ALGORITHMS = ("ring", "butterfly", "doubling", "bruck")
"""The algorithms whose lowest price stands for native MPI between nodes, where nothing was measured."""
COLLECTIVES = (*ALGORITHMS, "alltoall")
"""The collectives that can be tuned; alltoall has no schedules, but shared memory and pairwise exchange."""
BLOCKWISE = ("allgather", "alltoall", "reduce_scatter")
"""Collectives whose calls are counted in bytes of all blocks, and have one block for each rank."""
DEFAULT_TABLE = Path(__file__).with_name("tuning_default.json")
"""The default table."""

Series = dict[str, list["Row"]]


class Choice(NamedTuple):
    """The algorithm of a call."""

    algorithm: str
    segment_bytes: int | None
    """The segment length with which it was measured, if any."""
    reason: str
    """The reason, as text."""
    lengths: tuple[int, int] = (0, -1)
    """The first and the last length in bytes for which it is selected, if known."""
    candidate: str = ""
    """The algorithm that was faster where rows were measured, and must be compared with native MPI here."""


class Row(NamedTuple):
    """One measurement: the call, its time, and the host."""

    collective: str
    algorithm: str
    nodes: int
    per_node: int
    bytes: int
    us: float
    """Median time in microseconds."""
    dtype: str = "f4"
    memory: str = "host"
    segment_bytes: int | None = None
    mpi: str = ""
    host: str = ""
    when: str = ""
    cpu: str = ""
    """The model of the processor, on one node."""

    @property
    def origin(self) -> str:
        """The host, MPI library and date of the measurement, as text."""
        return f"on {self.host or '(no host)'} with {self.mpi or '(no MPI)'}, {self.when or '(no date)'}"


@dataclass(frozen=True)
class Table:
    """The measurements and the parameters of a machine."""

    rows: tuple[Row, ...] = ()
    machine: Machine | None = None
    """The cost model for calls without measurements; ``None``: no prices."""
    source: str = "empty"
    """The origin of the table, as text."""
    cpu: str = ""
    """The model of the processor here: on one node, rows of another one were not measured here.  Empty: they count."""
    first_use: tuple[Row, ...] = ()
    """What first uses have measured here, one size in each size class."""
    frozen: bool = False
    """No first use compares anything any more."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle rows as plain tuples, in a third of the time."""
        rows, first_use = (list(map(tuple, each)) for each in (self.rows, self.first_use))
        return unpickle, (rows, self.machine, self.source, self.cpu, first_use, self.frozen)

    def choose(
        self,
        collective: str,
        nodes: int,
        per_node: int,
        nbytes: int,
        dtype: str = "f4",
        memory: str = "host",
        candidates: Sequence[str] = (),
    ) -> Choice:
        """The algorithm for ``nbytes`` bytes on nodes x per_node ranks, among ``candidates`` and native.

        No candidates means all; ``memory`` is ``"host"``, ``"registered"`` or ``"cuda"``.  The result depends on the
        arguments and the table only.
        """
        if nodes * per_node == 1:
            return Choice("native", None, "one rank needs no algorithm")
        found = self.find_series(collective, (nodes, per_node), dtype, memory)
        if found:
            choice = choose_measured(found, nbytes, candidates)
            why = self.why_unmeasured(found, (nodes, per_node), (collective, dtype, memory))
            if not why or choice.algorithm == "native":
                return choice
            return self.choose_first_use(collective, per_node, nbytes, choice.algorithm, why)
        if nodes > 1 and memory == "host" and self.machine is not None:
            return choose_priced(collective, (nodes, per_node), nbytes, candidates, self.machine)
        return Choice("native", None, f"nothing was measured ({self.source}): run `hpccomm tune`")

    def why_unmeasured(self, series: Series, shape: Shape, key: tuple[str, str, str]) -> str:
        """Why these rows say little of this node; empty if they hold."""
        row, (nodes, per_node) = series["native"][0], shape
        if nodes > 1:
            return ""
        if per_node > row.per_node and per_node > max(self.local_ranks(key), default=0):
            return f"not measured with {per_node} ranks on a node"
        return f"measured on {row.cpu} only" if self.cpu and row.cpu and row.cpu != self.cpu else ""

    def local_ranks(self, key: tuple[str, str, str]) -> list[int]:
        """The numbers of ranks on one node with rows of a (collective, datatype, memory)."""
        return [per_node for nodes, per_node in self.shapes_of(key) if nodes == 1]

    def choose_first_use(self, collective: str, per_node: int, nbytes: int, candidate: str, why: str) -> Choice:
        """What the first use of this size class has decided; before it, native MPI."""
        found = self.compared.get((collective, per_node, size_class(collective, per_node, nbytes)), {})
        if candidate in found and "native" in found:
            return choose_measured(found, nbytes, (candidate,))
        if self.frozen:
            return Choice("native", None, f"{why}, and the table is frozen")
        return Choice("native", None, f"{why}, so native MPI until a first use has compared it", candidate=candidate)

    @cached_property
    def compared(self) -> dict[tuple[str, int, int], Series]:
        """The rows of first uses by collective, ranks and size class."""
        found: dict[tuple[str, int, int], Series] = {}
        for row in self.first_use:
            key = (row.collective, row.per_node, size_class(row.collective, row.per_node, row.bytes))
            found.setdefault(key, {})[row.algorithm] = [row]
        return found

    def add_first_use(self, rows: Iterable[Row]) -> Table:
        """This table with what a first use has measured."""
        return replace(self, first_use=(*self.first_use, *rows))

    def freeze(self) -> Table:
        """A table that decides as this one does now, on any machine, and that no first use changes."""
        return replace(self, frozen=True)

    def find_series(self, collective: str, shape: Shape, dtype: str, memory: str) -> Series | None:
        """The measurements at the shape nearest to ``shape``, by algorithm, in ascending order of bytes."""
        key = (collective, shape, dtype, memory)
        if key not in self._nearest:
            found: Series | None = None
            for each in dict.fromkeys((dtype, "f4")):
                shapes = self.shapes_of((collective, each, memory))
                near = min(shapes, key=lambda known: (distance_key(known, shape), known), default=None)
                if near and distance(near, shape) <= REACH:
                    found = self.series_at((collective, each, memory), near)
                    break
            self._nearest[key] = found
        return self._nearest[key]

    @cached_property
    def _nearest(self) -> dict[tuple[str, Shape, str, str], Series | None]:
        """What :meth:`find_series` has found."""
        return {}

    @cached_property
    def _rows_of(self) -> dict[tuple[str, str, str], dict[Shape, list[Row]]]:
        """The rows by (collective, datatype, memory) and shape."""
        found: dict[tuple[str, str, str], dict[Shape, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in self.rows:
            found[row.collective, row.dtype, row.memory][row.nodes, row.per_node].append(row)
        return found

    def shapes_of(self, key: tuple[str, str, str]) -> list[Shape]:
        """The shapes with rows of native MPI of a (collective, datatype, memory)."""
        shapes = self._rows_of.get(key, {})
        return [shape for shape, rows in shapes.items() if any(row.algorithm == "native" for row in rows)]

    def series_at(self, key: tuple[str, str, str], shape: Shape) -> Series:
        """The rows of a (collective, datatype, memory) at a shape, by algorithm, in ascending order of bytes."""
        found: Series = {}
        for row in sorted(self._rows_of[key][shape], key=attrgetter("bytes")):
            found.setdefault(row.algorithm, []).append(row)
        return found

    def select_mpi(self, mpi: str) -> Table:
        """The rows of this MPI library, of any version; for collectives without such rows, those of all libraries."""
        wanted = {each for each in {row.mpi for row in self.rows} if family(each) == family(mpi)}
        same = replace(self, rows=tuple([row for row in self.rows if row.mpi in wanted]))
        return same.fill_from(self)

    def fill_from(self, other: Table) -> Table:
        """This table with the other's rows for collectives without rows here, and its machine if none was fitted.

        A collective on one node and the same on several nodes are treated apart.
        """
        measured = {(row.collective, row.nodes > 1) for row in self.rows}
        more = [row for row in other.rows if (row.collective, row.nodes > 1) not in measured]
        return replace(self, rows=(*self.rows, *more), machine=self.machine or other.machine)

    def explain(self, collective: str, nodes: int, per_node: int, **more: Any) -> list[str]:
        """The choices from 4 B to 1 GiB, one line for each range with the same one; ``more`` as in :meth:`choose`."""
        lines: list[tuple[int, int, str]] = []
        for nbytes in (1 << k for k in range(2, 31)):
            algorithm = self.choose(collective, nodes, per_node, nbytes, **more).algorithm
            if lines and lines[-1][2] == algorithm:
                lines[-1] = (lines[-1][0], nbytes, algorithm)
            else:
                lines.append((nbytes, nbytes, algorithm))
        return [f"{collective} {low} to {high} bytes: {algorithm}" for low, high, algorithm in lines]


def unpickle(
    rows: Iterable[Any], machine: Machine | None, source: str, cpu: str, first_use: Any, frozen: bool
) -> Table:
    """A table that was pickled."""
    return Table(tuple(map(Row._make, rows)), machine, source, cpu, tuple(map(Row._make, first_use)), frozen)


def size_class(collective: str, per_node: int, nbytes: int) -> int:
    """The size class of a call on one node: the bits of the length of a block, or of a vector."""
    return (nbytes // per_node if collective in BLOCKWISE else nbytes).bit_length()


def choose_measured(series: Series, nbytes: int, candidates: Sequence[str]) -> Choice:
    """The fastest measured algorithm."""
    times = {
        name: interpolate([(row.bytes, row.us) for row in rows], nbytes)
        for name, rows in series.items()
        if name == "native" or not candidates or name in candidates
    }
    if series["native"][0].nodes == 1:
        times["native"] += CHECKS
    best = min(times, key=lambda name: (times[name], name))
    native, row = times["native"], nearest_row(series[best], nbytes)
    if times[best] >= NOISE * native:
        best, row = "native", nearest_row(series["native"], nbytes)
    compared = format_time(times[best]) + ("" if best == "native" else f" against {format_time(native)} by native MPI")
    how = describe_evidence(series[best], nbytes)
    reason = f"{how} {row.origin}, {row.nodes} x {row.per_node} ranks: {compared}"
    return Choice(best, row.segment_bytes, reason)


def describe_evidence(rows: Sequence[Row], nbytes: int) -> str:
    """What a time is: measured at this size, or computed from sizes that were measured."""
    first, last = rows[0].bytes, rows[-1].bytes
    if nearest_row(rows, nbytes).bytes == nbytes:
        return "measured"
    if first < nbytes < last:
        return "interpolated between sizes measured"
    end = f"up to {last:,}" if nbytes > last else f"from {first:,}"
    return f"extrapolated from sizes {end} bytes measured"


def nearest_row(rows: Sequence[Row], nbytes: int) -> Row:
    """The row with the nearest number of bytes, by their ratio."""
    wanted = nbytes or 1
    return min(rows, key=lambda row: wanted / has if (has := row.bytes or 1) < wanted else has / wanted)


def choose_priced(collective: str, shape: Shape, nbytes: int, candidates: Sequence[str], machine: Machine) -> Choice:
    """The hierarchical algorithm if its price is far below that of every flat one, else native MPI."""
    native = Choice("native", None, "not measured between nodes, and no predicted price is far below native MPI's")
    from hpccomm.performance import cost

    possible = collective in cost.INPUT_COPIES and min(shape) > 1
    if not possible or (candidates and "hierarchical" not in candidates):
        return native
    names = ("hierarchical", *(name for name in FLAT_ALGORITHMS if name in ALGORITHMS[collective]))
    prices = {name: cost.prediction(name, collective, *shape, nbytes, machine).us for name in names}
    price, flat = prices["hierarchical"], min(us for name, us in prices.items() if name != "hierarchical")
    if price >= TRUST * flat:
        return native
    reason = f"not measured; the model predicts {format_time(price)} against {format_time(flat)} without hierarchy"
    return Choice("hierarchical", None, reason)


# --- files -----------------------------------------------------------------------------------------


def load(mpi: str, hostname: str, *, ethernet: bool = True, cpu: str = "") -> Table:
    """The table in force: that of ``HPCCOMM_TUNING``, that of this host and MPI, or the default table.

    ``mpi`` is the library's name and version, as in ``"Open MPI 5.0.11"``.  On a cluster one rank loads the table and
    broadcasts it, so that all ranks choose the same.  The default table's rows of several nodes were measured over TCP:
    without ``ethernet`` they are left out.  Rows of another processor than ``cpu`` must be compared here before they
    hold on one node, where a ``cpu`` is named.  If a file cannot be read, one warning names it and the default table
    is used.
    """
    setting = os.environ.get("HPCCOMM_TUNING", "")
    if setting == "off":
        return Table(source="HPCCOMM_TUNING=off")
    default = replace(read(DEFAULT_TABLE).select_mpi(mpi), machine=Machine(), source="the default table of hpccomm")
    default = replace(default, cpu=cpu)
    if not ethernet:
        default = replace(default, rows=tuple(row for row in default.rows if row.nodes == 1))
    path = Path(setting).expanduser() if setting else user_file(mpi, hostname)
    if not setting and not path.exists():
        return default
    try:
        found = read(path)
        return found if found.frozen else replace(found.fill_from(default), cpu=cpu)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "write it again with `hpccomm tune`, or set HPCCOMM_TUNING=off"
        warnings.warn(f"{path} is no tuning table ({error}): {remedy}", RuntimeWarning, stacklevel=2)
        return default


def user_file(mpi: str, hostname: str) -> Path:
    """The path of the user's table for a host and an MPI library."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "hpccomm" / f"{cluster(hostname)}-{slug(mpi)}.json"


def cluster(hostname: str) -> str:
    """A host's name without domain and trailing digits."""
    name = hostname.partition(".")[0]
    return slug(name.rstrip("0123456789-_") or name)


SLUG_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789.")


def slug(text: str) -> str:
    """The text in lower case letters, digits, points and dashes."""
    words = "".join(each if each in SLUG_CHARACTERS else " " for each in text.lower()).split()
    return "-".join(words) or "unknown"


@cache
def family(mpi: str) -> str:
    """The name of a library without its version."""
    return slug("".join(takewhile(lambda each: not each.isdecimal(), mpi)))


def read(path: Path) -> Table:
    """Read a table; raises ``ValueError``, ``KeyError`` or ``TypeError`` if the file holds none."""
    status = path.stat()
    return parse(path, status.st_mtime_ns, status.st_size)


@cache
def parse(path: Path, changed: int, nbytes: int) -> Table:
    """The table in a file, which is read once for all communicators."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, Mapping) or data.get("schema") not in (1, SCHEMA):
        raise ValueError(f"its schema is not 1 or {SCHEMA}")
    rows, first_use = (
        tuple(chain.from_iterable(parse_series(**line) for line in each))
        for each in (data["rows"], data.get("first_use", ()))
    )
    cpu, frozen = str(data.get("cpu", "")), data.get("frozen") is True
    return Table(rows, parse_machine(data["machine"]), str(path), cpu, first_use, frozen)


MOST = 1e18
"""No time, length or number of nodes is longer."""


def parse_series(bytes: Any, us: Any, **facts: Any) -> list[Row]:
    """The rows of one line of a file: ``bytes`` and ``us`` are the numbers of one row, or lists with those of several.

    Raises ``ValueError`` or ``TypeError`` if they cannot be.
    """
    sizes, times = (each if isinstance(each, list) else [each] for each in (bytes, us))
    row = Row(bytes=sizes[0], us=times[0], **facts) if sizes and times else None
    if row is None or len(sizes) != len(times):
        raise ValueError(f"{len(sizes)} bytes and {len(times)} us of {facts} must be as many, and one or more")
    if not {*map(type, (row.nodes, row.per_node, *sizes, *times))} <= {int, float} or min(row.nodes, row.per_node) < 1:
        raise ValueError(f"nodes, per_node, bytes and us of {row} must be numbers")
    right = all(0 < each < MOST for each in times) and all(0 <= each < MOST for each in sizes)
    if not right or not max(row.nodes, row.per_node) < MOST:
        raise ValueError(f"us of {row} and its line must be above 0, bytes at least 0: they are {times} and {sizes}")
    return [Row._make((*row[:4], *each, *row[6:])) for each in zip(sizes, times, strict=True)]


def parse_machine(data: Mapping[str, Any] | None) -> Machine | None:
    """Parse the machine of a file."""
    if data is None:
        return None
    curves = tuple(map(parse_cost_curve, data.get("curves", ())))
    return Machine(Link(*data["intra"]), Link(*data["inter"]), float(data["gamma"]), str(data["source"]), curves)


def parse_cost_curve(data: Mapping[str, Any]) -> CostCurve:
    """Parse the costs of a round type; raises ``ValueError`` without points, or if one takes no time."""
    points = tuple(Point(int(nbytes), float(cold), float(warm)) for nbytes, cold, warm in data["points"])
    if not points or min(min(point.cold, point.warm) for point in points) <= 0:
        raise ValueError(f"the costs of rounds {data['kind']} have no points, or one that takes no time")
    return CostCurve(int(data["nodes"]), int(data["per_node"]), RoundType(**data["kind"]), points)


def dump_cost_curve(curve: CostCurve) -> dict[str, Any]:
    """The costs of a round type as written to a file."""
    points = [(point.bytes, round(point.cold, 3), round(point.warm, 3)) for point in curve.points]
    return {**curve._asdict(), "kind": curve.kind._asdict(), "points": points}


def write(table: Table, path: Path) -> None:
    """Write a table, one line a series of rows; concurrent readers see the old file or the new one."""
    from hpccomm.files import write_text

    machine = None
    if table.machine is not None:
        machine = table.machine._asdict() | {"curves": [dump_cost_curve(each) for each in table.machine.curves]}
    costs = json.dumps(machine).replace('{"nodes"', '\n{"nodes"')
    frozen = f'"frozen": true,\n"cpu": {json.dumps(table.cpu)},\n' if table.frozen else ""
    first_use = f'"first_use": {dump_rows(table.first_use)},\n' if table.frozen else ""
    text = f'{{"schema": {SCHEMA},\n{frozen}{first_use}"machine": {costs},\n"rows": {dump_rows(table.rows)}}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def dump_rows(rows: Iterable[Row]) -> str:
    """Rows as written to a file: one line for those that differ in bytes and times only."""
    series: dict[Row, list[Row]] = {}
    for row in rows:
        series.setdefault(row._replace(bytes=0, us=0), []).append(row)
    return "[\n" + ",\n".join(map(dump_series, series.values())) + "\n]"


def dump_series(rows: Sequence[Row]) -> str:
    """One line of a file."""
    facts = {name: value for name, value in rows[0]._asdict().items() if value not in (None, "")}
    if len(rows) > 1:
        facts |= {"bytes": [row.bytes for row in rows], "us": [row.us for row in rows]}
    return json.dumps(facts)


# --- fitting ---------------------------------------------------------------------------------------

UNITS = (
    Machine(Link(1, 0), Link(0, 0), 0),
    Machine(Link(0, 1), Link(0, 0), 0),
    Machine(Link(0, 0), Link(1, 0), 0),
    Machine(Link(0, 0), Link(0, 1), 0),
    Machine(Link(0, 0), Link(0, 0), 1),
)
"""One machine for each parameter to fit: that parameter is 1, all others are 0."""


def fit(rows: Iterable[Row], source: str = "fitted") -> Machine:
    """The machine whose prices are nearest to the measured times: least squares of relative errors.

    Only rows of schedules that are not cut into segments count.  Parameters that these rows do not depend on (links
    between nodes on one node; gamma without reductions) keep their defaults.  No parameter becomes negative.
    """
    known = [row for row in rows if schedule_of(row) is not None]
    defaults = Machine()
    values = np.array([*defaults.intra, *defaults.inter, defaults.gamma])
    if known:
        design = np.array([cost_coefficients(row) for row in known]) / np.array([[row.us] for row in known])
        seen = (design > 0).any(axis=0)
        values[seen] = solve_nonnegative(design[:, seen])
    intra_alpha, intra_beta, inter_alpha, inter_beta, gamma = values.tolist()
    return Machine(Link(intra_alpha, intra_beta), Link(inter_alpha, inter_beta), gamma, source)


def schedule_of(row: Row) -> Any:
    """The schedule that was measured, if it can be priced as it ran."""
    if row.algorithm == "hierarchical":
        return HIERARCHICAL[row.collective](np.repeat(np.arange(row.nodes), row.per_node))
    algorithm = ALGORITHMS.get(row.collective, {}).get(row.algorithm)
    return None if algorithm is None or algorithm.segmented or row.nodes * row.per_node == 1 else algorithm


def cost_coefficients(row: Row) -> list[float]:
    """The price of the measured run on each of ``UNITS``."""
    from hpccomm.performance import cost

    home = np.repeat(np.arange(row.nodes), row.per_node)
    return [cost.price(schedule_of(row), home, row.bytes, unit).us for unit in UNITS]


def solve_nonnegative(design: Any) -> Any:
    """The x >= 0 with design x nearest to 1; negative entries are set to 0 and the rest is fitted again."""
    scale = np.abs(design).max(axis=0)
    active = np.ones(scale.size, dtype=bool)
    while True:
        x = np.zeros(scale.size)
        x[active] = np.linalg.lstsq((design / scale)[:, active], np.ones(len(design)), rcond=None)[0]
        if (x >= 0).all():
            return x / scale
        active &= x > 0
