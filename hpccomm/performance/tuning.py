"""Which algorithm takes a call: what was measured decides, a price where nothing was, native MPI in doubt.

*A row is one measurement; a shape is (nodes, ranks a node).*  The rule, in order:

1. The rows of this collective, datatype (else ``f4``) and kind of memory, at the measured shape nearest to
   the one asked for: one node for one node, several for several, at most a factor of four away in nodes and
   in ranks a node.  Between two measured sizes times are interpolated on logarithmic scales; below the
   smallest they are its own, above the largest they grow with the bytes.  The fastest algorithm wins if it
   beats native MPI, with the checks around it, by more than the noise, 5 %.
2. Nothing measured on one node: native MPI.
3. Nothing measured between nodes: the hierarchical algorithm where its price is a fifth below that of the
   cheapest flat one, which native MPI is taken to be; else native MPI.

A table is found through ``HPCCOMM_TUNING`` (a file, or ``off``), else in ``~/.config/hpccomm`` by host and
MPI, else the one that comes with the package.  Trailing digits of host names do not count: what n017 measured
serves n018.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives import ALGORITHMS
from hpccomm.layout import Link
from hpccomm.performance import cost
from hpccomm.performance.machine import Machine
from hpccomm.performance.measured import REACH, CostCurve, Point, RoundType, Shape, distance, distance_key, interpolate
from hpccomm.performance.units import format_time

SCHEMA = 1
NOISE = 0.95
"""An algorithm must take less than this share of native MPI's time to replace it."""
CHECKS = 1.0
"""Microseconds that a communicator's checks add to a native call on one node, whose rows are measured without them (on
the machine of the shipped table: 1.1 µs on two ranks).  On several nodes rows of native MPI have them in: where ranks
share cores, comparing calls with the node's other ranks takes as long as these wait for a core."""
TRUST = 0.8
"""A price must be less than this share of native MPI's to be believed."""
FLAT_ALGORITHMS = ("ring", "butterfly", "doubling", "bruck")
"""What native MPI is taken to be between nodes, where nothing was measured."""
DEFAULT_TABLE = Path(__file__).with_name("tuning_default.json")
"""The table that comes with the package."""

Series = dict[str, list["Row"]]


class Choice(NamedTuple):
    """Who takes a call."""

    algorithm: str
    segment_bytes: int | None
    """Length of the segments in which it flows, where it was measured with any."""
    reason: str
    """Why, for people."""


class Row(NamedTuple):
    """One measurement: what ran, how long it took, and where."""

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

    @property
    def origin(self) -> str:
        """Where it was measured, for people."""
        return f"on {self.host or '(no host)'} with {self.mpi or '(no MPI)'}, {self.when or '(no date)'}"


@dataclass(frozen=True)
class Table:
    """What is known about a machine."""

    rows: tuple[Row, ...] = ()
    machine: Machine | None = None
    """Prices of messages for what was not measured; ``None``: do not price."""
    source: str = "empty"
    """Where it comes from, for people."""

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

        No candidates means all; ``memory`` is ``"host"``, ``"registered"`` or ``"cuda"``.  Pure: the same
        question has the same answer.
        """
        if nodes * per_node == 1:
            return Choice("native", None, "one rank has nobody to talk to")
        found = self.find_series(collective, (nodes, per_node), dtype, memory)
        if found:
            return choose_measured(found, nbytes, candidates)
        if nodes > 1 and memory == "host" and self.machine is not None:
            return choose_priced(collective, (nodes, per_node), nbytes, candidates, self.machine)
        return Choice("native", None, f"nothing was measured ({self.source}): `hpccomm tune` does")

    def find_series(self, collective: str, shape: Shape, dtype: str, memory: str) -> Series | None:
        """The measurements at the shape nearest to ``shape``, by algorithm, the smallest size first."""
        for each in dict.fromkeys((dtype, "f4")):
            shapes = self.series.get((collective, each, memory), {})
            near = min(shapes, key=lambda known: (distance_key(known, shape), known), default=None)
            if near and distance(near, shape) <= REACH:
                return shapes[near]
        return None

    @cached_property
    def series(self) -> dict[tuple[str, str, str], dict[Shape, Series]]:
        """The rows by (collective, datatype, memory), shape and algorithm; only where native MPI has some."""
        found: dict[tuple[str, str, str], dict[Shape, Series]] = {}
        for row in sorted(self.rows, key=lambda row: row.bytes):
            shapes = found.setdefault((row.collective, row.dtype, row.memory), {})
            shapes.setdefault((row.nodes, row.per_node), {}).setdefault(row.algorithm, []).append(row)
        return {
            key: {shape: series for shape, series in shapes.items() if "native" in series}
            for key, shapes in found.items()
        }

    def select_mpi(self, mpi: str) -> Table:
        """The rows of this MPI library, of any version; of what it was not measured with, all."""
        same = Table(tuple(row for row in self.rows if family(row.mpi) == family(mpi)), self.machine, self.source)
        return same.fill_from(self)

    def fill_from(self, other: Table) -> Table:
        """With the other's rows of what has none here, and its machine if none was fitted.

        A collective on one node and between nodes are two things.
        """
        measured = {(row.collective, row.nodes > 1) for row in self.rows}
        more = tuple(row for row in other.rows if (row.collective, row.nodes > 1) not in measured)
        return Table(self.rows + more, self.machine or other.machine, self.source)

    def select_single_node(self) -> Table:
        """Without rows of several nodes."""
        return Table(tuple(row for row in self.rows if row.nodes == 1), self.machine, self.source)

    def explain(self, collective: str, nodes: int, per_node: int, **more: Any) -> list[str]:
        """The decisions from 4 B to 1 GiB, a line for each range with one answer; ``more`` as in choose."""
        lines: list[tuple[int, int, str]] = []
        for nbytes in (1 << k for k in range(2, 31)):
            algorithm = self.choose(collective, nodes, per_node, nbytes, **more).algorithm
            if lines and lines[-1][2] == algorithm:
                lines[-1] = (lines[-1][0], nbytes, algorithm)
            else:
                lines.append((nbytes, nbytes, algorithm))
        return [f"{collective} {low} to {high} bytes: {algorithm}" for low, high, algorithm in lines]


def choose_measured(series: Series, nbytes: int, candidates: Sequence[str]) -> Choice:
    """The fastest of what was measured."""
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
    reason = f"measured {row.origin}, {row.nodes} x {row.per_node} ranks: {compared}"
    return Choice(best, row.segment_bytes, reason)


def nearest_row(rows: Sequence[Row], nbytes: int) -> Row:
    """The row of the nearest size."""
    return min(rows, key=lambda row: abs(log(max(row.bytes, 1)) - log(max(nbytes, 1))))


def choose_priced(collective: str, shape: Shape, nbytes: int, candidates: Sequence[str], machine: Machine) -> Choice:
    """Hierarchical where it is far cheaper than anything flat."""
    native = Choice("native", None, "not measured between nodes, and no price speaks against native MPI")
    possible = collective in cost.HIERARCHICAL and min(shape) > 1
    if not possible or (candidates and "hierarchical" not in candidates):
        return native
    names = ("hierarchical", *(name for name in FLAT_ALGORITHMS if name in ALGORITHMS[collective]))
    prices = {name: cost.prediction(name, collective, *shape, nbytes, machine).us for name in names}
    ours, flat = prices["hierarchical"], min(us for name, us in prices.items() if name != "hierarchical")
    if ours >= TRUST * flat:
        return native
    reason = f"not measured; the model predicts {format_time(ours)} against {format_time(flat)} without hierarchy"
    return Choice("hierarchical", None, reason)


# --- files -----------------------------------------------------------------------------------------


def load(mpi: str, hostname: str, *, ethernet: bool = True) -> Table:
    """The table in force: ``HPCCOMM_TUNING``'s, this host's and MPI's, or the package's.

    ``mpi`` is the library's name and version, as in ``"Open MPI 5.0.11"``.  On a cluster one rank loads and
    tells the others, so that all decide alike.  What the package's table has of several nodes was measured over
    TCP: without ``ethernet`` it does not count.  A file that cannot be read is named in one warning, and the
    package's table serves.
    """
    setting = os.environ.get("HPCCOMM_TUNING", "")
    if setting == "off":
        return Table(source="HPCCOMM_TUNING=off")
    shipped = replace(
        read(DEFAULT_TABLE).select_mpi(mpi), machine=Machine(), source="the table that comes with hpccomm"
    )
    shipped = shipped if ethernet else shipped.select_single_node()
    path = Path(setting).expanduser() if setting else user_file(mpi, hostname)
    if not setting and not path.exists():
        return shipped
    try:
        return read(path).fill_from(shipped)
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "write it again with `hpccomm tune`, or set HPCCOMM_TUNING=off"
        warnings.warn(f"{path} is no tuning table ({error}): {remedy}", RuntimeWarning, stacklevel=2)
        return shipped


def user_file(mpi: str, hostname: str) -> Path:
    """Where this user keeps the table of a host and an MPI library."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "hpccomm" / f"{cluster(hostname)}-{slug(mpi)}.json"


def cluster(hostname: str) -> str:
    """A host's name without domain and trailing digits."""
    name = hostname.partition(".")[0]
    return slug(name.rstrip("0123456789-_") or name)


def slug(text: str) -> str:
    """Lower case letters, digits, points and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-") or "unknown"


def family(mpi: str) -> str:
    """The name of a library without its version."""
    return slug(re.sub(r"\d[\d.]*.*", "", mpi))


def read(path: Path) -> Table:
    """The table in a file; ``ValueError``, ``KeyError`` or ``TypeError`` where it is none."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        raise ValueError(f"it has not the schema {SCHEMA}")
    rows = tuple(check_row(Row(**row)) for row in data["rows"])
    return Table(rows, parse_machine(data["machine"]), str(path))


def check_row(row: Row) -> Row:
    """The row, if its numbers are numbers."""
    numbers = (row.nodes, row.per_node, row.bytes, row.us)
    if not all(isinstance(number, (int, float)) for number in numbers) or min(row.nodes, row.per_node) < 1:
        raise ValueError(f"nodes, per_node, bytes and us of {row} must be numbers")
    if row.us <= 0 or row.bytes < 0:
        raise ValueError(f"{row} takes no time or has no bytes")
    return row


def parse_machine(data: Mapping[str, Any] | None) -> Machine | None:
    """The machine in a file."""
    if data is None:
        return None
    curves = tuple(map(parse_curve, data.get("curves", ())))
    return Machine(Link(*data["intra"]), Link(*data["inter"]), float(data["gamma"]), str(data["source"]), curves)


def parse_curve(data: Mapping[str, Any]) -> CostCurve:
    """A curve in a file; ``ValueError`` where it has no points, or one takes no time."""
    points = tuple(Point(int(nbytes), float(first), float(among)) for nbytes, first, among in data["points"])
    if not points or min(min(point.cold, point.warm) for point in points) <= 0:
        raise ValueError(f"a curve of {data['kind']} has no points, or one that takes no time")
    return CostCurve(int(data["nodes"]), int(data["per_node"]), RoundType(**data["kind"]), points)


def dump_curve(curve: CostCurve) -> dict[str, Any]:
    """A curve as it stands in a file."""
    points = [(point.bytes, round(point.cold, 3), round(point.warm, 3)) for point in curve.points]
    return {**curve._asdict(), "kind": curve.kind._asdict(), "points": points}


def write(table: Table, path: Path) -> None:
    """Write a table, a line a row; whoever reads meanwhile sees the old file or the new one."""
    machine = None
    if table.machine is not None:
        machine = table.machine._asdict() | {"curves": [dump_curve(each) for each in table.machine.curves]}
    told = ({name: value for name, value in row._asdict().items() if value not in (None, "")} for row in table.rows)
    rows = ",\n".join(map(json.dumps, told))
    costs = json.dumps(machine).replace('{"nodes"', '\n{"nodes"')
    text = f'{{"schema": {SCHEMA},\n"machine": {costs},\n"rows": [\n{rows}\n]}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


# --- fitting ---------------------------------------------------------------------------------------

UNITS = (
    Machine(Link(1, 0), Link(0, 0), 0),
    Machine(Link(0, 1), Link(0, 0), 0),
    Machine(Link(0, 0), Link(1, 0), 0),
    Machine(Link(0, 0), Link(0, 1), 0),
    Machine(Link(0, 0), Link(0, 0), 1),
)
"""One machine for each number to be fitted: all others cost nothing."""


def fit(rows: Iterable[Row], source: str = "fitted") -> Machine:
    """The machine whose prices are nearest to measured times: least squares of relative errors.

    Only rows of schedules that are not cut into segments count.  What they do not show (nodes, where there
    was one; sums, where nothing was reduced) keeps its default.  Nothing becomes negative.
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
    """The schedule that was measured, if it is one that can be priced as it ran."""
    if row.algorithm == "hierarchical":
        return cost.HIERARCHICAL[row.collective](np.repeat(np.arange(row.nodes), row.per_node))
    algorithm = ALGORITHMS.get(row.collective, {}).get(row.algorithm)
    return None if algorithm is None or algorithm.segmented or row.nodes * row.per_node == 1 else algorithm


def cost_coefficients(row: Row) -> list[float]:
    """How often the measured run pays each number of a machine."""
    home = np.repeat(np.arange(row.nodes), row.per_node)
    return [cost.price(schedule_of(row), home, row.bytes, unit).us for unit in UNITS]


def solve_nonnegative(design: Any) -> Any:
    """x >= 0 with design x nearest to 1; whatever would be negative is taken as 0, the rest fitted again."""
    scale = np.abs(design).max(axis=0)
    active = np.ones(scale.size, dtype=bool)
    while True:
        x = np.zeros(scale.size)
        x[active] = np.linalg.lstsq((design / scale)[:, active], np.ones(len(design)), rcond=None)[0]
        if (x >= 0).all():
            return x / scale
        active &= x > 0
