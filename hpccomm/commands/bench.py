"""``hpccomm bench``: OSU's flags and tables, several algorithms at once, results as JSON."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hpccomm.errors import ArgumentError

SUMMARY = "measure collectives and messages, in OSU's or nccl-tests' format"

DATATYPES = {"mpi_char": "i1", "mpi_int": "i4", "mpi_float": "f4", "mpi_double": "f8"}
LARGEST = {"collective": 1 << 20, "message": 1 << 22}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """OSU's flags, and ours by their long names."""
    add = parser.add_argument
    add("test", help="allreduce, bcast, … or latency, bw, bibw; OSU's names (osu_allreduce) too")
    add("-m", "--message-size", default="", metavar="[MIN:]MAX", help="bytes; a lone number is MAX")
    add("-i", "--iterations", type=int, help="timed calls a size (1000 up to 8 KiB, 100 above)")
    add("-x", "--warmup", type=int, help="untimed calls a size (100, 10)")
    add("-f", "--full", action="store_true", help="minimum and maximum over the ranks, iterations")
    add("-c", "--validation", action="store_true", help="check every element of the results, exactly")
    add("-u", "--validation-warmup", type=int, default=5, metavar="N", help="checked calls a size (5)")
    add(
        "-z",
        "--tail-lat",
        nargs="?",
        const="50,90,99",
        default="",
        metavar="P,P",
        help="percentiles, attached: -z50,99",
    )
    add("-T", "--type", action="append", metavar="TYPE", help="mpi_float (default), mpi_char, mpi_int, mpi_double, all")
    add("-l", "--in-place", action="store_true", help="in place")
    add("-k", "--root-rank", default="fixed:0", metavar="fixed:R|rotate", help="the root of rooted collectives")
    add("-W", "--window-size", type=int, default=64, help="messages in flight for bw and bibw (64)")
    add("-M", "--mem-limit", type=int, default=512 << 20, metavar="BYTES", help="memory a rank may take (512 MiB)")
    add("-d", "--accelerator", choices=("cuda",), help="buffers on the device")
    add("-v", "--version", action="store_true", help="the version of the format")
    add("--algorithm", default="auto", metavar="A,B", help="measure these in turns: native,auto,ring,…, or all")
    add("--registered", action="store_true", help="buffers in registered memory (comm.empty)")
    add("--format", choices=("osu", "nccl"), default="osu", help="whose table (osu)")
    add("--step-factor", type=int, default=2, help="from size to size (2)")
    add("--json", metavar="FILE", help="write all rows, the machine and the command to a file")


def run(args: argparse.Namespace) -> int:
    """Measure and print (collective); the exit status is OSU's."""
    if args.version:
        sys.stdout.write("hpccomm bench: the format of OSU Micro-Benchmarks v7.4\n")
        return 0
    check_arguments(args)
    from mpi4py import MPI

    import hpccomm
    from hpccomm.bench.messages import TESTS

    comm = hpccomm.Communicator(MPI.COMM_WORLD)
    name = args.test.removeprefix("osu_")
    if name in TESTS:
        return run_messages(comm, name, args)
    return run_collective(comm, name, args)


def check_arguments(args: argparse.Namespace) -> None:
    """What can be known before anything starts."""
    from hpccomm.bench.cases import CASES
    from hpccomm.bench.messages import TESTS

    name = args.test.removeprefix("osu_")
    if name not in CASES and name not in TESTS:
        raise ArgumentError(f"there is no test {args.test!r}: take one of {', '.join([*CASES, *TESTS])}")
    if args.accelerator:
        raise ArgumentError(f"-d cuda: {why_no_device()}; leave -d out to measure host buffers")
    for number in (args.iterations, args.step_factor - 1, args.validation_warmup):
        if number is not None and number < 1:
            raise ArgumentError("-i and -u want at least 1, --step-factor at least 2")
    sizes_of(args, "collective")
    percentiles_of(args)
    datatypes_of(args)


def why_no_device() -> str:
    """The reason, for people."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed (pip install 'hpccomm[cuda12]' or 'hpccomm[cuda13]')"
    if not cupy.cuda.is_available():
        return "CuPy finds no driver or device"
    return "device buffers are not measured yet"


def sizes_of(args: argparse.Namespace, kind: str, smallest: int = 1) -> list[int]:
    """OSU's sizes: doubling from the smallest to the largest."""
    low, _, high = args.message_size.rpartition(":")
    if args.message_size.endswith(":"):
        low, high = args.message_size[:-1], ""
    try:
        first, last = int(low or smallest), int(high or LARGEST[kind])
    except ValueError:
        raise ArgumentError(f"-m {args.message_size}: say [MIN:]MAX in bytes, e.g. -m 4:67108864") from None
    if first < 0 or first > last:
        raise ArgumentError(f"-m {args.message_size}: from {first} to {last} there is nothing to measure")
    found = [first]
    while max(1, found[-1]) * (args.step_factor if found[-1] else 1) <= last and found[-1] < last:
        found.append(found[-1] * args.step_factor if found[-1] else 1)
    return found


def percentiles_of(args: argparse.Namespace) -> list[int]:
    """At most five, as in OSU's."""
    try:
        found = [int(word) for word in args.tail_lat.split(",") if word]
    except ValueError:
        raise ArgumentError(f"-z{args.tail_lat}: attach the percentiles, e.g. -z50,99") from None
    if len(found) > 5 or not all(0 < p <= 100 for p in found):
        raise ArgumentError("-z takes at most five percentiles between 1 and 100")
    return found


def datatypes_of(args: argparse.Namespace) -> list[str]:
    """The datatypes to measure, in OSU's words."""
    words = [word.lower() for word in args.type or ["mpi_float"]]
    if "all" in words:
        words = ["mpi_char", "mpi_int", "mpi_float"]
    unknown = [word for word in words if word not in DATATYPES]
    if unknown:
        raise ArgumentError(f"-T {unknown[0]}: take one of {', '.join(DATATYPES)}, all")
    return words


def roots_of(args: argparse.Namespace, ranks: int) -> Callable[[int], int]:
    """The root of each call."""
    if args.root_rank == "rotate":
        return lambda k: k % ranks
    word, _, number = args.root_rank.partition(":")
    if word != "fixed" or not number.isdigit() or int(number) >= ranks:
        raise ArgumentError(f"-k {args.root_rank}: say fixed:R with R below {ranks}, or rotate")
    return lambda k: int(number)


def algorithms_of(comm: Any, collective: str, args: argparse.Namespace) -> list[str]:
    """The algorithms that take turns."""
    from hpccomm.bench.cases import CASES

    key = {"reduce_scatter_block": "reduce_scatter", "allgatherv": "allgather"}.get(collective, collective)
    known = comm.algorithms(key) if CASES[collective].chosen else ("auto", "native")
    names = list(known) if args.algorithm == "all" else args.algorithm.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ArgumentError(f"--algorithm {unknown[0]}: {collective} has {', '.join(known)}, and all")
    return names


def say(comm: Any, text: str) -> None:
    """Rank 0 prints, in one piece."""
    if comm.rank == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


def complain(comm: Any, text: str) -> None:
    """Rank 0 says what is wrong."""
    if comm.rank == 0:
        sys.stderr.write(text)
        sys.stderr.flush()


def run_collective(comm: Any, name: str, args: argparse.Namespace) -> int:
    """A collective, at all sizes and datatypes."""
    if comm.size < 2:
        complain(comm, "This test requires at least two processes\n")
        return 1
    from hpccomm.bench.loop import Options

    status, rows = 0, list[Any]()
    algorithms = algorithms_of(comm, name, args)
    for word in datatypes_of(args):
        options = Options(
            DATATYPES[word],
            args.iterations,
            args.warmup,
            args.validation,
            args.validation_warmup,
            args.in_place,
            args.registered,
            roots_of(args, comm.size),
        )
        table = nccl_table if args.format == "nccl" else osu_table
        status = table(comm, name, algorithms, options, args, word.upper(), rows)
        if status:
            break
    if args.json and comm.rank == 0:
        write_json(args.json, [row.record() for row in rows], machine(comm))
    return status


def sizes_within(comm: Any, name: str, args: argparse.Namespace) -> list[int]:
    """The sizes that a rank's memory limit allows."""
    from hpccomm.bench.cases import CASES

    case = CASES[name]
    if name == "barrier":
        return [0]
    limit = args.mem_limit // comm.size if case.parts else args.mem_limit
    wanted = sizes_of(args, "collective")
    fitting = [size for size in wanted if size <= limit]
    if len(fitting) < len(wanted):
        complain(comm, f"Warning! Limiting max message size to {limit}: increase -M, --mem-limit for larger ones. ")
    return fitting


def watched(comm: Any, sizes: Iterable[int]) -> Iterator[int]:
    """A progress bar on rank 0's stderr, where somebody can see it."""
    bar: Any = None
    if comm.rank == 0:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            bar = tqdm(list(sizes), unit="size", leave=False, file=sys.stderr, disable=None)
    yield from bar if bar is not None else sizes


def osu_table(
    comm: Any, name: str, algorithms: list[str], options: Any, args: argparse.Namespace, datatype: str, rows: list[Any]
) -> int:
    """OSU's table; with several algorithms a column each."""
    from hpccomm.bench import measure, osu
    from hpccomm.bench.cases import CASES

    percentiles, single = percentiles_of(args), len(algorithms) == 1
    title = CASES[name].title
    if name != "barrier":
        columns = osu.compared_columns(algorithms) + (["Validation"] if args.validation else [])
        head = osu.named_header(title, datatype, args.full, args.validation, percentiles)
        say(comm, head if single else osu.header(title, datatype, columns))
    for size in watched(comm, sizes_within(comm, name, args)):
        found = list(measure(comm, name, [size], algorithms, options))
        rows += found
        if name == "barrier":
            say(comm, osu.barrier_table(found[0], args.full))
        elif found and single:
            say(comm, osu.line(found[0], args.full, args.validation, percentiles))
        elif found:
            say(comm, osu.compared_line(found, args.validation))
        if any(row.wrong for row in found):
            complain(comm, f"DATA VALIDATION ERROR: osu_{name} exited with status 1 on message size {size}.\n")
            return 1
    return 0


def nccl_table(
    comm: Any, name: str, algorithms: list[str], options: Any, args: argparse.Namespace, datatype: str, rows: list[Any]
) -> int:
    """nccl-tests' table, one algorithm after the other."""
    from dataclasses import replace

    from hpccomm.bench import measure, nccl

    timed, untimed = options.repeats(1 << 20)
    devices = comm.gather(nccl.device_line(comm.rank))
    for algorithm in algorithms:
        mine: list[Any] = []
        program = f"{name}_{algorithm}" if len(algorithms) > 1 else name
        say(comm, nccl.preamble(program, timed, untimed, options.check) + "".join(devices or []) + nccl.header())
        for size in watched(comm, sizes_within(comm, name, args)):
            apart = list(measure(comm, name, [size], [algorithm], replace(options, in_place=False)))
            inside = (
                apart
                if name == "bcast"
                else list(measure(comm, name, [size], [algorithm], replace(options, in_place=True)))
            )
            for left, right in zip(apart, inside, strict=True):
                say(comm, nccl.line(left, right))
                mine += [left, right]
        say(comm, nccl.footer(program, mine))
        rows += mine
    return int(any(row.wrong for row in rows))


def run_messages(comm: Any, name: str, args: argparse.Namespace) -> int:
    """A point-to-point test."""
    if comm.size != 2:
        complain(comm, "This test requires exactly two processes\n")
        return 1
    from hpccomm.bench import osu
    from hpccomm.bench.loop import Options
    from hpccomm.bench.messages import TESTS, measure_messages

    test, percentiles = TESTS[name], percentiles_of(args)
    options = Options(iterations=args.iterations, warmup=args.warmup, check=args.validation)
    say(comm, osu.messages_header(test.title, test.column, args.validation, percentiles))
    records = []
    for size in watched(comm, sizes_of(args, "message", test.smallest)):
        for outcome in measure_messages(comm, name, [size], options, args.window_size):
            say(comm, osu.messages_line(outcome, args.validation, percentiles))
            records.append({"test": name, "bytes": size, "value": outcome.value, "unit": test.column, "ranks": 2})
            if outcome.validated is False:
                complain(comm, f"DATA VALIDATION ERROR: osu_{name} exited with status 1 on message size {size}.\n")
                return 1
    if args.json and comm.rank == 0:
        write_json(args.json, records, machine(comm))
    return 0


def machine(comm: Any) -> dict[str, Any]:
    """Where this was measured, and with what."""
    import numpy as np
    from mpi4py import MPI

    import hpccomm
    from hpccomm.resources import mpi_name

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["hpccomm", *sys.argv[1:]]),
        "machine": {"host": MPI.Get_processor_name(), "cpu": processor(), "cores": len(os.sched_getaffinity(0))},
        "ranks": comm.topology.describe(),
        "mpi": mpi_name(),
        "versions": {"hpccomm": hpccomm.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: str, records: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """One object with everything somebody would ask of these numbers, and the rows."""
    Path(path).write_text(json.dumps({**where, "rows": records}, indent=1) + "\n")
