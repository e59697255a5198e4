"""``hpccomm bench``: OSU's flags and tables, nccl-tests' table, several algorithms in turns, results as JSON."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpccomm.errors import ArgumentError

if TYPE_CHECKING:
    from hpccomm.bench.flags import BenchArguments
    from hpccomm.bench.loop import Row

SUMMARY = "measure collectives and messages, in OSU's or nccl-tests' format"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured; its flags follow and are understood there."""
    parser.usage = "hpccomm bench COLLECTIVE [FLAG ...]"
    parser.epilog = "the flags of each: hpccomm bench COLLECTIVE -h"
    parser.add_argument("-h", "--help", action="store_true", help="this text")
    parser.add_argument("collective", nargs="?", help="allreduce, bcast, latency …, or OSU's osu_allreduce …")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="OSU's, and ours")
    parser.set_defaults(help_text=parser.format_help)


def run(args: argparse.Namespace) -> int:
    """Measure and print (collective); the exit status."""
    from mpi4py import MPI

    import hpccomm

    world = MPI.COMM_WORLD
    printer = Printer(world.rank == 0)
    try:
        asked = parse_command(args, printer)
        if asked is None:
            return 0
        if rank_count_error(asked, world.size):
            return refuse(world, printer, rank_count_error(asked, world.size))
        comm = hpccomm.Communicator(world)
        asked = fit_to_ranks(comm, asked, printer)
    except ArgumentError as error:
        return refuse(world, printer, f"hpccomm bench: {error}")
    session = Session(comm, asked, printer)
    status = nccl_tables(session) if asked.nccl else osu_tables(session)
    session.write_json()
    return status if comm.rank == 0 else 0


@dataclass(frozen=True)
class Printer:
    """Rank 0's voice; every line is one write."""

    enabled: bool

    def print_line(self, line: str) -> None:
        """A line of the table."""
        if self.enabled:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def print_error(self, line: str) -> None:
        """A line about it."""
        if self.enabled:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def parse_command(args: argparse.Namespace, printer: Printer) -> BenchArguments | None:
    """What is asked for; ``None`` if it was only a question."""
    from hpccomm.bench import flags
    from hpccomm.bench.cases import CASES

    if args.help:
        printer.print_line(f"{args.help_text()}\nmeasured: {', '.join(CASES)}")
        return None
    name = (args.collective or "").removeprefix("osu_")
    if name not in CASES:
        raise ArgumentError(f"say what to measure: {', '.join(CASES)} (not {args.collective!r})")
    if {"-h", "--help"} & set(args.flags):
        printer.print_line(flags.parser(name).format_help())
        return None
    asked = flags.parse_flags(name, args.flags)
    if asked.version:
        printer.print_line(title_of(asked))
        return None
    return asked


def refuse(world: Any, printer: Printer, why: str) -> int:
    """All ranks know alike; one of them speaks, before any of them ends."""
    printer.print_error(why)
    world.Barrier()
    return 1


def rank_count_error(asked: BenchArguments, ranks: int) -> str:
    """OSU's words where there are too few ranks, or too many."""
    if asked.case.ends:
        return "" if ranks == 2 else "This test requires exactly two processes"
    return "" if ranks > 1 else "This test requires at least two processes"


def fit_to_ranks(comm: Any, asked: BenchArguments, printer: Printer) -> BenchArguments:
    """With what these ranks have: algorithms, roots, memory."""
    from hpccomm.bench.loop import check_algorithms, known_algorithms

    if asked.options.root is not None and asked.options.root >= comm.size:
        raise ArgumentError(f"-k fixed:{asked.options.root}: there are {comm.size} ranks")
    if asked.options.on_device:
        claim_devices(comm, asked)
    names = known_algorithms(comm, asked.collective) if asked.algorithms == ("all",) else asked.algorithms
    check_algorithms(comm, asked.collective, names)
    if asked.warning:
        printer.print_error(f"hpccomm bench: {asked.warning}")
    return replace(asked, algorithms=tuple(names), sizes=limit_sizes(comm.size, asked, printer))


def claim_devices(comm: Any, asked: BenchArguments) -> None:
    """Take a device for each rank; raises on all ranks where one of them has none (collective)."""
    from hpccomm.transports import cuda

    rest = "leave -d out to measure host memory"
    cuda.claim_device(comm, "-d cuda", rest)
    if asked.case.ends and comm.device_transports()["aware"] != "yes":
        why = comm.device_transports()["aware"].removeprefix("no: ")
        raise ArgumentError(f"{asked.collective}: messages take memory of a device only where MPI does: {why}; {rest}")


def limit_sizes(ranks: int, asked: BenchArguments, printer: Printer) -> tuple[int, ...]:
    """Sizes that a rank has room for."""
    each = asked.memory_limit // (ranks if asked.case.size_per_rank and not asked.nccl else 1)
    kept = tuple(size for size in asked.sizes if size <= each)
    if len(kept) < len(asked.sizes):
        printer.print_error(
            f"Warning! Limiting max message size to: {each}. Increase -M, --mem-limit for higher message sizes."
        )
    return kept


class Session:
    """One command on its ranks, and the rows it has measured."""

    def __init__(self, comm: Any, asked: BenchArguments, printer: Printer) -> None:
        self.comm, self.asked, self.printer = comm, asked, printer
        self.print_line = printer.print_line
        self.rows: list[Row] = []

    def run_sizes(self, datatype: str, algorithms: Sequence[str], **options: Any) -> Iterator[list[Row]]:
        """The rows of each size, while a bar shows how far it is."""
        from hpccomm.bench.loop import measure
        from hpccomm.bench.osu import DATATYPES

        asked = self.asked
        chosen = replace(asked.options, dtype=DATATYPES[datatype], **options)
        found = measure(self.comm, asked.collective, asked.sizes, algorithms, chosen)
        sizes = itertools.groupby(found, key=lambda row: row.bytes)
        for _, rows in self.show_progress((size, list(rows)) for size, rows in sizes):
            self.rows += rows
            yield rows

    def show_progress(self, sizes: Iterable[Any]) -> Iterable[Any]:
        """With a progress bar on rank 0's stderr, where somebody can see it."""
        if self.comm.rank or not sys.stderr.isatty():
            return sizes
        try:
            from tqdm import tqdm
        except ImportError:
            return sizes
        bar: Iterable[Any] = tqdm(sizes, total=len(self.asked.sizes), unit="size", leave=False, delay=2)
        return bar

    def report_wrong(self, rows: Sequence[Row]) -> bool:
        """Whether a result is wrong; on stderr what exactly."""
        for row in rows:
            if row.wrong:
                self.printer.print_error(f"hpccomm bench: {row.collective} of {row.bytes} bytes, {row.complaint}")
        return any(row.wrong for row in rows)

    def write_json(self) -> None:
        """The file, if one was asked for."""
        from hpccomm.bench import report

        if self.asked.json and self.comm.rank == 0:
            where = report.describe(self.comm, ["hpccomm", *sys.argv[1:]])
            if self.asked.options.on_device:
                where["device"] = cuda_device()
            Path(self.asked.json).write_text(report.text(where, self.rows), encoding="utf-8")


def osu_tables(session: Session) -> int:
    """OSU's table, again for each datatype; stops at the first wrong result."""
    from hpccomm.bench import osu

    asked, say = session.asked, session.print_line
    columns = osu.columns_of(asked.collective, asked.algorithms, asked.columns)
    say("")
    say(title_of(asked))
    if asked.options.on_device and asked.case.ends:
        say("# Send Buffer on DEVICE (D) and Receive Buffer on DEVICE (D)")
    for datatype in asked.datatypes[:1] if asked.collective == "barrier" else asked.datatypes:
        if asked.collective != "barrier":
            say(osu.datatype_line(datatype))
        say(osu.header(columns))
        for rows in session.run_sizes(datatype, asked.algorithms):
            say(osu.line(columns, rows))
            if session.report_wrong(rows):
                say(osu.failure(f"osu_{asked.collective}", rows[0].bytes))
                return 1
    return 0


def title_of(asked: BenchArguments) -> str:
    """OSU's, which names the kind of memory where it is not the host's."""
    from hpccomm.bench import osu

    title = osu.title(asked.collective)
    return title.replace("OSU MPI ", "OSU MPI-CUDA ", 1) if asked.options.on_device else title


def cuda_device() -> dict[str, str]:
    """The device in words."""
    from hpccomm.transports import cuda

    device = cuda.device()
    return {"name": device.name, "driver": device.driver}


def nccl_tables(session: Session) -> int:
    """nccl-tests' table, again for each datatype and algorithm."""
    from hpccomm.bench import nccl

    asked = session.asked
    status = 0
    for datatype, algorithm in itertools.product(asked.datatypes, asked.algorithms):
        run = nccl_run(session, f"{asked.collective} {algorithm}")
        for line in [*nccl.preamble(run, software()), *places(session.comm), *nccl.header()]:
            session.print_line(line)
        rows = list(nccl_rows(session, datatype, algorithm))
        for line in nccl.footer(run, rows, asked.least):
            session.print_line(line)
        wrong = session.report_wrong(rows)
        status |= wrong or not nccl.fast_enough(rows, asked.least)
    return int(status)


def nccl_rows(session: Session, datatype: str, algorithm: str) -> Iterator[Row]:
    """Each size out of place, then in place where MPI has that."""
    from hpccomm.bench import nccl

    asked = session.asked
    for size in asked.sizes:
        pair: list[Row] = []
        one = Session(session.comm, replace(asked, sizes=(size,)), session.printer)
        for in_place in (False, asked.case.in_place):
            for rows in one.run_sizes(datatype, [algorithm], in_place=in_place):
                pair += rows
        if pair:
            session.print_line(nccl.line(pair[0], pair[1], asked.options.root or 0))
            session.rows += pair
            yield from pair


def nccl_run(session: Session, program: str) -> Any:
    """What is said before the first row."""
    from hpccomm.bench.nccl import Run

    asked = session.asked
    options = asked.options
    smallest, largest = (min(asked.sizes), max(asked.sizes)) if asked.sizes else (0, 0)
    calls = options.warmup or 0, options.iterations or 0
    return Run(f"hpccomm bench {program}", smallest, largest, asked.factor, *calls, options.check)


def places(comm: Any) -> list[str]:
    """A line a rank (collective)."""
    from hpccomm.bench import nccl, report

    name = comm.layout.names[int(comm.layout.nodes[comm.rank])]
    mine = nccl.Place(comm.rank, os.getpid(), name, report.processor())
    return [nccl.device_line(nccl.Place(*each)) for each in comm.allgather(tuple(mine))]


def software() -> str:
    """Who measures."""
    import hpccomm
    from hpccomm.transports.mpi import mpi_name

    return f"hpccomm {hpccomm.__version__} on {mpi_name()}"
