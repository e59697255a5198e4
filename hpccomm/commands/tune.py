"""``hpccomm tune``: measure which algorithm is fastest on this machine, and write the tuning table.

Run it under ``mpirun`` with as many nodes and ranks as your jobs have.  Every size is measured with native MPI and with
every algorithm.  Finished measurements are saved in a ``.partial`` file, from which an interrupted run is resumed.  On
several nodes single rounds are measured too; the cost model is fitted to them and compared with the measurements.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.hierarchical import HIERARCHICAL
from hpccomm.commands.files import check_file, check_folder, run_on_root
from hpccomm.commands.progress import show_progress
from hpccomm.errors import ArgumentError
from hpccomm.layout import Link
from hpccomm.performance import tuning
from hpccomm.performance.cost import prediction
from hpccomm.performance.machine import Machine
from hpccomm.performance.measured import CostCurve
from hpccomm.performance.probe import processor_name
from hpccomm.performance.tuning import COLLECTIVES, Row, Table
from hpccomm.performance.units import format_count, format_shape, size_of

SIZES = "4,64,1Ki,4Ki,16Ki,64Ki,256Ki,1Mi,4Mi,16Mi,64Mi"
QUICK = "4,1Ki,16Ki,256Ki,4Mi"
SECONDS = 0.4
"""Measuring time for each algorithm at each size."""
NEAR_RATIO = 0.15
"""Relative error up to which a prediction is counted as close."""


class Site(NamedTuple):
    """The place of a measurement."""

    nodes: int
    per_node: int
    mpi: str
    host: str
    when: str
    cpu: str = ""


class Task(NamedTuple):
    """One measurement of all algorithms in turns, so that all are measured under the same load."""

    collective: str
    bytes: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    known = ",".join(COLLECTIVES)
    add("--collective", default=known, metavar="NAMES", help=f"collectives to tune (default {known})")
    add("--algorithm", metavar="NAMES", help="algorithms to measure (default: all)")
    add("--sizes", metavar="BYTES", help=f"sizes to measure (default {SIZES})")
    add("--quick", action="store_true", help=f"measure fewer sizes: {QUICK}")
    add("--freeze", metavar="FILE", help="write what auto decides now into FILE; HPCCOMM_TUNING=FILE pins it")
    add("--probe", action="store_true", help="only probe the cores of each node again; takes a second")
    add(
        "--out",
        metavar="FILE",
        help="tuning table to write (default: the one in ~/.config/hpccomm that jobs with this host and MPI read)",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, fit the model, write the table and print the decisions (collective)."""
    from mpi4py import MPI

    from hpccomm import Communicator

    if args.freeze:
        return freeze(Communicator(MPI.COMM_WORLD), Path(args.freeze))
    if args.out and not args.probe:
        run_on_root(lambda: check_folder("--out", Path(args.out)), MPI.COMM_WORLD)
    for line in probe_nodes(MPI.COMM_WORLD):
        print(line)
    if args.probe:
        return 0
    comm = Communicator(MPI.COMM_WORLD)
    if comm.size == 1:
        raise ArgumentError("one rank has nothing to tune: hpccomm-run -n 4 -m hpccomm tune")
    site = site_of(comm)
    out = Path(args.out) if args.out else tuning.user_file(site.mpi, site.host)
    wanted = args.algorithm.split(",") if args.algorithm else []
    todo = tasks(args)
    curves, link = rounds_of(comm, todo, wanted)
    rows = measure_tasks(comm, site, todo, out.with_name(out.name + ".partial"), wanted)
    if comm.rank == 0:
        finish(rows, site, out, curves, link)
    return 0


def freeze(comm: Any, path: Path) -> int:
    """Compare what no first use has compared yet, and write all decisions (collective)."""
    run_on_root(lambda: check_file("--freeze", path), comm)
    compare_all(comm)
    if comm.rank == 0:
        tuning.write(comm.context.table.freeze(), path)
        print(f"# decisions for {comm.layout.describe()} written to {path}: HPCCOMM_TUNING={path} pins them")
    return 0


def compare_all(comm: Any) -> None:
    """Let every size class from 4 B to 64 MB have had its first use (collective)."""
    from hpccomm.first_use import FirstUse

    comm.Barrier()  # the first call sets up shared memory
    first_use = FirstUse(comm._planner, seconds=math.inf)
    for collective in COLLECTIVES:
        parts = comm.size if collective in tuning.BLOCKWISE else 1
        for nbytes in (parts << k for k in range(2, 27)):
            candidate = comm.explain(collective, nbytes).candidate
            if candidate:
                first_use.compare(collective, nbytes, candidate)


def probe_nodes(world: Any) -> list[str]:
    """Probe the cores of the ranks of each node again; what to print, on rank 0 (collective).

    The other ranks sleep meanwhile, so that they do not take part in what is measured.
    """
    from mpi4py import MPI

    from hpccomm.commands.warm import describe_probe
    from hpccomm.performance import probe

    node = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    cores = set().union(*node.allgather(os.sched_getaffinity(0)))
    line = describe_probe(*probe.ensure(cores, again=True)) if node.rank == 0 else ""
    request = world.Ibarrier()
    while not request.Test():
        time.sleep(ASLEEP_SECONDS)
    lines = world.gather(line and f"# {MPI.Get_processor_name()}: {line}")
    node.Free()
    return list(filter(None, lines or []))


ASLEEP_SECONDS = 0.005


def rounds_of(comm: Any, todo: Sequence[Task], wanted: Sequence[str]) -> tuple[tuple[CostCurve, ...], Link | None]:
    """Measure the rounds of allreduces; also returns the link by which schedules are selected now (collective)."""
    from hpccomm.bench.rounds import measure_round_costs

    sizes = [task.bytes for task in todo if task.collective == "allreduce"]
    if not sizes or comm.layout.count == 1:
        return (), None
    machine = comm.context.table.machine
    return measure_round_costs(comm, wanted or comm.algorithms("allreduce"), max(sizes)), machine and machine.inter


def site_of(comm: Any) -> Site:
    """The site of this run, as rank 0 describes it (collective)."""
    from mpi4py import MPI

    from hpccomm.first_use import today
    from hpccomm.transports.mpi import mpi_name

    where = MPI.Get_processor_name(), today(), processor_name() if comm.layout.count == 1 else ""
    site = Site(comm.layout.count, max(comm.layout.per_node), mpi_name(), *where)
    return Site(*comm.bcast(tuple(site)))


def tasks(args: argparse.Namespace) -> list[Task]:
    """Every collective at every size, in the order of the sizes given."""
    collectives = args.collective.split(",")
    unknown = [name for name in collectives if name not in COLLECTIVES]
    if unknown:
        raise ArgumentError(f"--collective {','.join(unknown)}: use one or several of {', '.join(COLLECTIVES)}")
    sizes = args.sizes or (QUICK if args.quick else SIZES)
    return [Task(name, int(size_of(size))) for name in collectives for size in sizes.split(",")]


def measure_tasks(comm: Any, site: Site, todo: Sequence[Task], partial: Path, wanted: Sequence[str] = ()) -> list[Row]:
    """Measure the tasks that are not done yet; returns all rows on rank 0 (collective)."""
    if wanted:
        known = {name for task in todo for name in comm.algorithms(task.collective)}
        unknown = sorted(set(wanted) - known)
        if unknown:
            raise ArgumentError(f"--algorithm {','.join(unknown)}: use one or several of {', '.join(sorted(known))}")
    rows = comm.bcast(read_partial(site, partial) if comm.rank == 0 else None)
    left = [task for task in todo if task not in {Task(row.collective, row.bytes) for row in rows}]
    for task in show_progress(left, "hpccomm tune", "size") if comm.rank == 0 else left:
        rows += measure_one(comm, site, task, wanted)
        if comm.rank == 0:
            tuning.write(Table(tuple(rows)), partial)
    if comm.rank == 0:
        partial.unlink(missing_ok=True)
    return rows


def read_partial(site: Site, partial: Path) -> list[Row]:
    """The rows of an interrupted run on the same shape and MPI."""
    try:
        rows = tuning.read(partial).rows
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in rows if (row.nodes, row.per_node, row.mpi) == site[:3]]


def measure_one(comm: Any, site: Site, task: Task, wanted: Sequence[str] = ()) -> Iterator[Row]:
    """Measure the wanted algorithms, or all, of a collective at one size (collective)."""
    from hpccomm.bench import Options, measure

    names = [name for name in comm.algorithms(task.collective) if name != "auto" and (not wanted or name in wanted)]
    options = Options(seconds=SECONDS, bare_native=site.nodes == 1)
    for found in measure(comm, task.collective, [task.bytes], algorithms=names, options=options):
        yield Row(
            task.collective,
            found.algorithm,
            site.nodes,
            site.per_node,
            task.bytes,
            found.p50_us or found.avg_us,
            mpi=site.mpi,
            host=site.host,
            when=site.when,
            cpu=site.cpu,
        )


def finish(
    rows: Sequence[Row], site: Site, out: Path, curves: Sequence[CostCurve] = (), link: Link | None = None
) -> None:
    """Merge with the rows of other shapes in the file, fit, write, and print decisions and predictions.

    ``link`` is the link by which schedules were selected while the rows were measured.
    """
    known = tuning.read(out) if out.exists() else Table()
    kept = merge_rows(known.rows, rows)
    old = known.machine.curves if known.machine else ()
    others = tuple(each for each in old if (each.nodes, each.per_node) != site[:2])
    machine = tuning.fit(kept, f"fitted on {site.host} with {site.mpi}, {site.when}")
    machine = machine._replace(curves=(*others, *curves) if curves else old)
    table = Table(kept, machine, str(out))
    tuning.write(table, out)
    shape = format_shape(site.nodes, site.per_node)
    print(f"# {format_count(len(rows), 'measurement')} on {shape}, {site.mpi}, written to {out}")
    for collective in dict.fromkeys(row.collective for row in rows):
        print("\n".join(replace(table, rows=tuple(rows)).explain(collective, site.nodes, site.per_node)))
    for line in compare_predictions(rows, machine._replace(inter=link or machine.inter)):
        print(line)


def compare_predictions(rows: Sequence[Row], machine: Machine) -> list[str]:
    """The lines that compare predictions with measurements, and how many are close; empty without predictions."""
    lines, near = [], 0
    for row in rows:
        if not can_be_priced(row):
            continue
        found = prediction(row.algorithm, row.collective, row.nodes, row.per_node, row.bytes, machine)
        ratio = found.us / row.us
        near += abs(ratio - 1) <= NEAR_RATIO
        lines.append(
            f"{row.collective:<15}{row.algorithm:<14}{row.bytes:>10}{row.us:>13.4g}{found.us:>13.4g}{ratio:>8.2f}"
            f"  {found.source}"
        )
    if not lines:
        return []
    titles = ("collective", "algorithm", "bytes", "measured us", "predicted us", "ratio")
    return [
        "# {:<13}{:<14}{:>10}{:>13}{:>13}{:>8}  by".format(*titles),
        *lines,
        f"# {near} of {len(lines)} predictions are within {NEAR_RATIO:.0%} of the measurement",
    ]


def can_be_priced(row: Row) -> bool:
    """Whether the cost model covers the algorithm of a row."""
    two_levels = row.algorithm == "hierarchical" and row.collective in HIERARCHICAL and row.nodes > 1
    return two_levels or row.algorithm in ALGORITHMS.get(row.collective, {})


def merge_rows(old: Sequence[Row], new: Sequence[Row]) -> tuple[Row, ...]:
    """The new rows, and the old rows of decisions that were not measured again.

    Times can be compared only within a run, where algorithms take turns; so old rows of a decision are dropped.
    """
    again = {decision_key(row) for row in new}
    return (*(row for row in old if decision_key(row) not in again), *new)


def decision_key(row: Row) -> Row:
    """The decision that a row belongs to."""
    return row._replace(algorithm="", bytes=0, us=0.0, segment_bytes=None, host="", when="", cpu="")
