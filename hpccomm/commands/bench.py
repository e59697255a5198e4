"""``hpccomm bench``: measure a collective and print the table of OSU or nccl-tests; with ``--json``, write a file."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpccomm.arguments import unknown_name
from hpccomm.commands.files import check_file, run_on_root
from hpccomm.commands.progress import Progress
from hpccomm.errors import ArgumentError
from hpccomm.performance.units import format_count, format_size

if TYPE_CHECKING:
    from hpccomm.bench.cold import FirstCalls
    from hpccomm.bench.flags import BenchArguments
    from hpccomm.bench.loop import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the name of the benchmark; the words after it are parsed by :mod:`hpccomm.bench.flags`."""
    parser.usage = "hpccomm bench COLLECTIVE [FLAG ...]"
    parser.epilog = "for the flags of a benchmark: hpccomm bench COLLECTIVE -h"
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    parser.add_argument("collective", nargs="?", help="allreduce, bcast, latency …; OSU's names too; compare")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="OSU's flags, and some of hpccomm")
    parser.set_defaults(help_text=parser.format_help)


def run(args: argparse.Namespace) -> int:
    """Measure and print (collective); returns the exit status."""
    if args.collective == "compare":
        from hpccomm.bench import compare

        return compare.run(args.flags)
    from mpi4py import MPI

    import hpccomm

    world = MPI.COMM_WORLD
    printer = Printer(world.rank == 0)
    try:
        command = parse_command(args, printer)
        if command is None:
            return 0
        if rank_count_error(command, world.size):
            return refuse(world, printer, rank_count_error(command, world.size))
        if path := command.json:
            run_on_root(lambda: check_file("--json", Path(path)), world)
        first_calls = measure_first_calls(command)
        comm = hpccomm.Communicator(world)
        command = fit_to_ranks(comm, command, printer)
    except ArgumentError as error:
        return refuse(world, printer, f"hpccomm bench: {error}")
    session = Session(comm, command, printer, first_calls)
    status = nccl_tables(session) if command.nccl else osu_tables(session)
    session.write_json()
    return status if comm.rank == 0 else 0


@dataclass(frozen=True)
class Printer:
    """The output of rank 0; every line is one write."""

    enabled: bool

    def print_line(self, line: str) -> None:
        """Write a line of the table to stdout."""
        if self.enabled:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    def print_error(self, line: str) -> None:
        """Write a warning or an error to stderr."""
        if self.enabled:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()


def parse_command(args: argparse.Namespace, printer: Printer) -> BenchArguments | None:
    """The parsed command; ``None`` after printing help or version."""
    from hpccomm.bench import flags, nccl_flags
    from hpccomm.bench.cases import CASES

    if args.help:
        printer.print_line(f"{args.help_text()}\nbenchmarks: {', '.join(CASES)}")
        return None
    name, words, nccl = flags.read_name(args.collective or "", args.flags)
    if name not in CASES and name[1:] in CASES and name[0] == "i":
        raise ArgumentError(f"{name}: non-blocking calls are not measured: use {name[1:]}, which blocks")
    if name not in CASES:
        problem = f"there is no benchmark {name!r}" if name else "the name of a benchmark is missing"
        raise unknown_name(problem, name, CASES)
    if {"-h", "--help"} & set(words):
        printer.print_line(flags.parser(name, nccl or nccl_flags.is_meant(words)).format_help())
        return None
    command = flags.parse_flags(name, words, nccl)
    if command.version:
        printer.print_line(title_of(command))
        return None
    return command


def refuse(world: Any, printer: Printer, why: str) -> int:
    """Rank 0 prints an error that all ranks found; the barrier keeps the others from ending before that."""
    printer.print_error(why)
    world.Barrier()
    return ArgumentError.exit_status


def rank_count_error(command: BenchArguments, ranks: int) -> str:
    """OSU's sentence for too few or too many ranks, with the command; empty where the number is right."""
    wanted = "exactly" if command.case.ends else "at least"
    if ranks == 2 or (ranks > 2 and not command.case.ends):
        return ""
    return f"This test requires {wanted} two processes: hpccomm-run -n 2 -m hpccomm bench {command.collective} …"


def measure_first_calls(command: BenchArguments) -> list[FirstCalls]:
    """The first calls of ``--cold`` on the smallest size, before anything else is called (collective)."""
    from hpccomm.bench import cold
    from hpccomm.bench.osu import DATATYPES

    if not command.cold:
        return []
    options = replace(command.options, dtype=DATATYPES[command.datatypes[0]])
    return cold.measure_first_calls(command.collective, command.sizes, command.algorithms, options)


def fit_to_ranks(comm: Any, command: BenchArguments, printer: Printer) -> BenchArguments:
    """Complete and check a command for these ranks: algorithms, root, device, memory."""
    from hpccomm.bench.loop import check_algorithms, list_algorithms

    root = command.options.root
    if root is not None and root >= comm.size:
        ranks = format_count(comm.size, "rank")
        raise ArgumentError(f"-k fixed:{root}: with {ranks} use a root from 0 to {comm.size - 1}")
    if command.options.on_device:
        claim_devices(comm, command)
    names = list_algorithms(comm, command.collective) if command.algorithms == ("all",) else command.algorithms
    check_algorithms(comm, command.collective, names)
    if command.warning:
        printer.print_error(f"hpccomm bench: {command.warning}")
    fitting = replace(command, algorithms=tuple(names), sizes=limit_sizes(comm.size, command, printer))
    check_sizes(comm.size, fitting)
    return fitting


def check_sizes(ranks: int, command: BenchArguments) -> None:
    """Raise where no size is left to measure."""
    from hpccomm.bench.loop import has_elements
    from hpccomm.bench.osu import DATATYPES

    for name in command.datatypes:
        options = replace(command.options, dtype=DATATYPES[name])
        if any(has_elements(command.collective, size, ranks, options) for size in command.sizes):
            return
    raise ArgumentError(
        f"{command.collective}: no size is left that gives {format_count(ranks, 'rank')} an element each: give larger "
        "sizes, or more memory with -M"
    )


def claim_devices(comm: Any, command: BenchArguments) -> None:
    """Take a device for each rank; raises on all ranks where one of them has none (collective)."""
    from hpccomm.transports import cuda

    rest = "leave -d out to measure host memory"
    cuda.claim_device(comm, "-d cuda", rest)
    if command.case.ends and comm.device_transports()["aware"] != "yes":
        why = comm.device_transports()["aware"].removeprefix("no: ")
        raise ArgumentError(f"{command.collective} -d cuda needs an MPI that takes device memory: {why}; {rest}")


def limit_sizes(ranks: int, command: BenchArguments, printer: Printer) -> tuple[int, ...]:
    """The sizes that fit into the memory limit of a rank."""
    each = command.memory_limit // (ranks if command.case.size_per_rank and not command.nccl else 1)
    sizes = tuple(size for size in command.sizes if size <= each)
    if len(sizes) < len(command.sizes):
        printer.print_error(
            f"Warning! Limiting max message size to: {each}. Increase -M, --mem-limit for higher message sizes."
        )
    return sizes


class Session:
    """One command on its ranks, and the rows measured so far."""

    def __init__(
        self, comm: Any, command: BenchArguments, printer: Printer, first_calls: Sequence[FirstCalls] = ()
    ) -> None:
        self.comm, self.command, self.printer, self.first_calls = comm, command, printer, first_calls
        self.print_line = printer.print_line
        self.rows: list[Row] = []
        self.work_done = 0.0
        tables = len(command.datatypes) * (2 * len(command.algorithms) if command.nccl else 1)
        work = sum(work_of(command, size) for size in command.sizes) * tables
        self.progress = Progress("hpccomm bench", "size", work, stream=None if comm.rank == 0 else io.StringIO())

    def run_sizes(
        self, datatype: str, algorithms: Sequence[str], sizes: Sequence[int], **options: Any
    ) -> Iterator[list[Row]]:
        """Measure size by size, with progress on stderr; yields the rows of each."""
        from hpccomm.bench.loop import measure
        from hpccomm.bench.osu import DATATYPES

        command = self.command
        chosen = replace(command.options, dtype=DATATYPES[datatype], **options)
        found = measure(self.comm, command.collective, sizes, algorithms, chosen)
        for size, rows in itertools.groupby(found, key=lambda row: row.bytes):
            measured = list(rows)
            self.rows += measured
            yield measured
            self.work_done += work_of(command, size)
            self.progress.show(self.work_done, f"{format_size(size)} of {datatype} measured")

    def print_first_calls(self) -> None:
        """Print the times of ``--cold`` as comments, which programs that read the table skip."""
        for what, field in (("the process", "process_us"), ("a new communicator", "communicator_us")):
            times = [f"{each.algorithm} {getattr(each, field):.2f}" for each in self.first_calls]
            if times:
                self.print_line(f"# First call of {what}, {self.first_calls[0].bytes} bytes (us): {', '.join(times)}")

    def report_wrong(self, rows: Sequence[Row]) -> bool:
        """Whether a result is wrong; prints what exactly."""
        for row in rows:
            if row.wrong:
                self.printer.print_error(f"hpccomm bench: {row.collective} of {row.bytes} bytes, {row.complaint}")
        return any(row.wrong for row in rows)

    def write_json(self) -> None:
        """Write the file of ``--json``."""
        from hpccomm.bench import report

        if self.command.json and self.comm.rank == 0:
            where = report.describe(self.comm, ["hpccomm", *sys.argv[1:]])
            if self.command.options.on_device:
                where["device"] = cuda_device()
            if self.first_calls:
                where["cold"] = [each._asdict() for each in self.first_calls]
            Path(self.command.json).write_text(report.text(where, self.rows), encoding="utf-8")


def osu_tables(session: Session) -> int:
    """Print OSU's table for each datatype; stop at the first wrong result."""
    from hpccomm.bench import osu

    command, print_line = session.command, session.print_line
    columns = osu.columns_of(command.collective, command.algorithms, command.columns)
    print_line("")
    print_line(title_of(command))
    session.print_first_calls()
    if command.options.on_device and command.case.ends:
        print_line("# Send Buffer on DEVICE (D) and Receive Buffer on DEVICE (D)")
    for datatype in command.datatypes[:1] if command.collective == "barrier" else command.datatypes:
        if command.collective != "barrier":
            print_line(osu.datatype_line(datatype))
        print_line(osu.header(columns))
        for rows in session.run_sizes(datatype, command.algorithms, command.sizes):
            print_line(osu.line(columns, rows))
            if session.report_wrong(rows):
                print_line(osu.failure(f"osu_{command.collective}", rows[0].bytes))
                return 1
    return 0


CALL_SECONDS, BYTE_SECONDS = 5e-6, 5e-10
"""The cost of a call and of a byte, which only divide the expected time between sizes."""


def work_of(command: BenchArguments, size: int) -> float:
    """The time that a size takes, beside that of the others."""
    calls = command.options.iterations or command.case.repeats.counts(size)[0]
    return calls * (CALL_SECONDS + size * BYTE_SECONDS)


def title_of(command: BenchArguments) -> str:
    """OSU's title, which names the kind of memory unless it is the host's."""
    from hpccomm.bench import osu

    title = osu.title(command.collective)
    return title.replace("OSU MPI ", "OSU MPI-CUDA ", 1) if command.options.on_device else title


def cuda_device() -> dict[str, str]:
    """The name of the device and its driver."""
    from hpccomm.transports import cuda

    device = cuda.device()
    return {"name": device.name, "driver": device.driver}


def nccl_tables(session: Session) -> int:
    """Print nccl-tests' table for each datatype and algorithm."""
    from hpccomm.bench import nccl

    command = session.command
    session.print_first_calls()
    status = 0
    for datatype, algorithm in itertools.product(command.datatypes, command.algorithms):
        run = nccl_run(session, f"{command.collective} {algorithm}")
        for line in [*nccl.preamble(run, software()), *places(session.comm), *nccl.header()]:
            session.print_line(line)
        rows = list(nccl_rows(session, datatype, algorithm))
        for line in nccl.footer(run, rows, command.least):
            session.print_line(line)
        wrong = session.report_wrong(rows)
        status |= wrong or not nccl.fast_enough(rows, command.least)
    return int(status)


def nccl_rows(session: Session, datatype: str, algorithm: str) -> Iterator[Row]:
    """Measure each size out of place, then in place where MPI defines that."""
    from hpccomm.bench import nccl

    command = session.command
    for size in command.sizes:
        pair: list[Row] = []
        for in_place in (False, command.case.in_place):
            for rows in session.run_sizes(datatype, [algorithm], (size,), in_place=in_place):
                pair += rows
        if pair:
            session.print_line(nccl.line(pair[0], pair[1], command.options.root or 0))
            yield from pair


def nccl_run(session: Session, program: str) -> Any:
    """The parameters that stand above the first row."""
    from hpccomm.bench.nccl import Run

    command = session.command
    options = command.options
    smallest, largest = (min(command.sizes), max(command.sizes)) if command.sizes else (0, 0)
    calls = options.warmup or 0, options.iterations or 0
    return Run(f"hpccomm bench {program}", smallest, largest, command.factor, *calls, options.check, command.step_bytes)


def places(comm: Any) -> list[str]:
    """The lines of the ranks (collective)."""
    from hpccomm.bench import nccl
    from hpccomm.performance.probe import processor_name

    name = comm.layout.names[int(comm.layout.nodes[comm.rank])]
    mine = nccl.Place(comm.rank, os.getpid(), name, processor_name())
    return [nccl.device_line(nccl.Place(*each)) for each in comm.allgather(tuple(mine))]


def software() -> str:
    """Name and version of hpccomm and of the MPI library."""
    import hpccomm
    from hpccomm.transports.mpi import mpi_name

    return f"hpccomm {hpccomm.__version__} on {mpi_name()}"
