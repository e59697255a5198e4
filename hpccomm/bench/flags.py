"""The flags of ``hpccomm bench``: OSU's, or nccl-tests' (:mod:`~hpccomm.bench.nccl_flags`), and hpccomm's own."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from hpccomm.arguments import explain
from hpccomm.bench import nccl_flags
from hpccomm.bench.cases import CASES, Case
from hpccomm.bench.loop import Options
from hpccomm.bench.osu import DATATYPES, ColumnOptions
from hpccomm.errors import ArgumentError
from hpccomm.performance.units import format_count, size_of

DEFAULT_PERCENTILES = "50,90,99"
MAX_PERCENTILES = 5
MEMORY_LIMIT = 512 << 20
LARGEST, LARGEST_MESSAGE = 1 << 20, 1 << 22
"""OSU's largest sizes: of collectives, and of tests between two ranks."""
NCCL_BYTES, NCCL_CALLS = 32 << 20, (20, 5)
"""The size that nccl-tests measures by default, and its numbers of timed and untimed calls."""


@dataclass(frozen=True)
class BenchArguments:
    """A command line that was parsed and checked."""

    collective: str
    sizes: tuple[int, ...]
    datatypes: tuple[str, ...]
    algorithms: tuple[str, ...]
    options: Options
    columns: ColumnOptions
    nccl: bool
    cold: bool
    factor: int
    memory_limit: int
    least: float | None
    json: str | None
    version: bool
    warning: str
    """A sentence about a flag that has no effect; empty if there is none."""
    step_bytes: int = 0
    """The bytes between sizes where ``factor`` is 1."""

    @property
    def case(self) -> Case:
        """The row of the collective in the table of benchmarks."""
        return CASES[self.collective]


class Parser(argparse.ArgumentParser):
    """A parser that raises ArgumentError instead of ending the process, so that only rank 0 reports a mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise the error."""
        raise ArgumentError(f"{explain(message, self)} ({self.prog} --help)")


class Other(NamedTuple):
    """A flag of OSU's that has no counterpart here, and what to do instead."""

    names: tuple[str, ...]
    instead: str
    same: str = ""
    """A pattern of the values that change nothing; empty for none."""

    @property
    def dest(self) -> str:
        """The name of the value among the arguments."""
        return self.names[-1][2:].replace("-", "_")


OTHERS = (
    Other(("-G", "--graph"), "draw a file: add --json FILE, then hpccomm plot FILE --out FILE.png"),
    Other(("-D", "--ddt"), "derived datatypes are not measured: leave it out"),
    Other(("-P", "--papi"), "hardware counters are not read: run perf stat around the program"),
    Other(("-r", "--cuda-target"), "there is no computing beside the calls: leave it out", "(?i)cpu"),
    Other(("-t", "--num_test_calls"), "non-blocking calls are not measured: leave it out"),
    Other(("-b", "--buffer-num"), "one buffer is used: leave it out", "single"),
    Other(("--buffer",), "arrays are NumPy's, or lie on a device with -d cuda", "numpy|bytearray"),
    Other(("--device",), "buffers lie on a device with -d cuda", "cpu"),
    Other(("--pickle",), "lower-case methods are not measured: leave it out"),
)


def parser(collective: str, nccl: bool = False) -> Parser:
    """The parser of all flags, with OSU's or nccl-tests' letters."""
    made = Parser(prog=f"hpccomm bench {collective}", add_help=False, allow_abbrev=False)
    made.add_argument("-h", "--help", action="store_true", help="show this text")
    made.add_argument("placement", nargs="*", metavar="H H", help="OSU's words for the memory at both ends: H H or D D")
    add_own_flags(made, nccl)
    if nccl:
        nccl_flags.add_flags(made, bytes_of, natural, positive)
    else:
        add_osu_flags(made)
    missing = {"minbytes", "maxbytes", "stepbytes", "min_busbw", "message_size", "mem_limit", "window_size", "tail_lat"}
    flags = {"full", "in_place", "version", "new_arrays"}
    made.set_defaults(validation_warmup=None, type=None, root_rank=None)
    made.set_defaults(**{name: None for name in missing}, **{name: False for name in flags})
    return made


def add_own_flags(made: Parser, nccl: bool) -> None:
    """Declare the flags that OSU's and nccl-tests' lines can both have."""
    add = made.add_argument_group("of hpccomm").add_argument
    add("--algorithm", default="auto", metavar="A,B,…", help="medians in columns: native,auto,… or all (default auto)")
    add("--format", choices=("osu", "nccl"), help="the format of the table (default: that of the flags, or osu)")
    add(
        *(() if nccl else ("-d",)),
        "--accelerator",
        choices=("cuda", "managed", "openacc", "rocm"),
        help="put the buffers on a device; cuda is the only one measured",
    )
    add("--cold", action="store_true", help="time the first call of the process and of a communicator: native, auto")
    add("--json", metavar="FILE", help="write the rows, the machine and this command into FILE")


def add_osu_flags(made: Parser) -> None:
    """Declare OSU's flags, and those of hpccomm for OSU's table."""
    add = made.add_argument_group("as the OSU Micro-Benchmarks").add_argument
    add("-v", "--version", action="store_true", help="show the version of OSU's tables")
    add(
        "-m",
        "--message-size",
        metavar="[MIN:]MAX",
        help="sizes in bytes, each twice the one before ; 64K is 65536 (default 1:1M)",
    )
    add("-i", "--iterations", type=positive, metavar="N", help="timed calls (default 1000; above 8 KiB 100)")
    add(
        "-x",
        "--warmup",
        "--skip",
        type=natural,
        metavar="N",
        help="untimed calls before them (default 100; above 8 KiB 10)",
    )
    add("--min", type=bytes_of, dest="low", metavar="BYTES", help="as OMB-Py: the smallest size")
    add("--max", type=bytes_of, dest="high", metavar="BYTES", help="as OMB-Py: the largest size")
    add("-f", "--full", action="store_true", help="show minimum and maximum over the ranks, and the number of calls")
    add("-c", "--validation", action="store_true", help="check every element of as many calls again, exactly")
    add("-u", "--validation-warmup", type=natural, metavar="N", help="unchecked calls before a checked one (default 5)")
    add("-z", "--tail-lat", metavar="P,P,…", help="percentiles; write -z50,99 without a space (-z alone: 50,90,99)")
    add("-M", "--mem-limit", type=bytes_of, metavar="BYTES", help="memory limit of a rank (default 512M)")
    add("-W", "--window-size", type=positive, metavar="N", help="messages in flight of bw and bibw (default 64)")
    add(
        "-T",
        "--type",
        action="append",
        metavar="TYPE",
        help=f"{', '.join(DATATYPES)} or all; repeat for several (default mpi_float; latency, bw, bibw: mpi_char)",
    )
    add("-l", "--in-place", action="store_true", help="call the collective with MPI_IN_PLACE")
    add("-k", "--root-rank", metavar="fixed:R|rotate", help="the root: R, or another with each call (default fixed:0)")
    for other in OTHERS:
        add(*other.names, nargs="?", const="", dest=other.dest, help=argparse.SUPPRESS)
    add = made.add_argument_group("of hpccomm, for this table").add_argument
    add("--stepfactor", "--step-factor", type=positive, metavar="F", help="ratio of successive sizes (default 2)")
    add("--registered", action="store_true", help="take buffers from comm.empty, which all ranks of a node can read")
    add("--new-arrays", action="store_true", help="time and check calls on new arrays too, their making counted or not")


def whole_number(text: str, least: int) -> int:
    """A whole number, ``least`` or more."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number: give {least} or more")
    return int(text)


natural, positive = partial(whole_number, least=0), partial(whole_number, least=1)


def bytes_of(text: str) -> int:
    """A size as benchmarks read it: 4096, and 64K, 64Ki, 64KB for 65,536."""
    try:
        return int(size_of(re.sub(r"(?i)([kmgt])i?b?$", r"\1i", text.strip())))
    except ArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def expand_tail_flag(word: str) -> str:
    """``-z50,99``, and ``-z`` and ``--tail-lat`` with their default value, as argparse needs them."""
    if word in ("-z", "--tail-lat"):
        return f"--tail-lat={DEFAULT_PERCENTILES}"
    return f"--tail-lat={word[2:]}" if re.fullmatch(r"-z[\d,]+", word) else word


def read_name(program: str, words: Sequence[str]) -> tuple[str, list[str], bool]:
    """The benchmark of a program, its flags, and whether it is of nccl-tests; OMB-Py names it by a flag."""
    short, words = program.rpartition("/")[2].removesuffix(".py"), list(words)
    if short == "run":
        named = Parser(prog="hpccomm bench run.py", add_help=False, allow_abbrev=False)
        named.add_argument("--benchmark", default="latency")
        args, words = named.parse_known_args(words)
        short = args.benchmark
    found = nccl_flags.find_program(short)
    return found or short.removeprefix("osu_"), words, bool(found)


def parse_flags(collective: str, words: Sequence[str], nccl: bool = False) -> BenchArguments:
    """Parse and check a command line, of nccl-tests where the name or the flags are its own; raises ArgumentError."""
    nccl = nccl or nccl_flags.is_meant(words)
    words = list(words) if nccl else [expand_tail_flag(word) for word in words]
    args = parser(collective, nccl).parse_intermixed_args(words)
    args.format = "nccl" if nccl else "osu"
    case = CASES[collective]
    if nccl:
        nccl_flags.translate(args)
    refuse_others(args)
    check_flags(collective, case, args)
    datatypes = datatypes_of(args, "mpi_char" if case.ends else "mpi_float")
    percentiles = percentiles_of(args.tail_lat)
    algorithms = tuple(args.algorithm.split(","))
    collected = percentiles or ((50,) if args.json or len(algorithms) > 1 or algorithms == ("all",) else ())
    return BenchArguments(
        collective,
        nccl_sizes(args) if nccl else sizes_of(collective, args, datatypes),
        datatypes,
        algorithms,
        options_of(args, nccl, collected),
        ColumnOptions(args.full, args.validation, percentiles, args.new_arrays),
        nccl,
        args.cold,
        args.stepfactor or (1 if nccl else 2),
        args.mem_limit or (max(MEMORY_LIMIT, args.maxbytes or 0) if nccl else MEMORY_LIMIT),
        args.min_busbw,
        args.json,
        args.version,
        placement_warning(args),
        args.stepbytes or nccl_flags.STEP_BYTES,
    )


def refuse_others(args: argparse.Namespace) -> None:
    """Raise for flags of OSU's that have no counterpart here."""
    for other in OTHERS:
        value = getattr(args, other.dest, None)
        if args.format == "osu" and value is not None and not (other.same and re.fullmatch(other.same, value)):
            raise ArgumentError(f"{other.names[0]} {value}".rstrip() + f": {other.instead}")


def check_flags(collective: str, case: Case, args: argparse.Namespace) -> None:
    """Raise for flags that a benchmark does not have, as OSU does."""
    nccl = args.format == "nccl"
    refused = {
        "-d": args.accelerator and device_error(args.accelerator, case),
        "-f": args.full and case.ends and "is for collectives: leave it out",
        "-l": args.in_place and not case.in_place and "does not apply, MPI has no such call: leave it out",
        "-r" if nccl else "-k": args.root_rank
        and not case.has_root
        and "does not apply, there is no root: leave it out",
        "-W": args.window_size and case.ends >= 0 and "is for bw and bibw: leave it out",
        "-c": args.validation and collective == "barrier" and "does not apply, there is no data to check: leave it out",
        "--registered": args.registered
        and (case.ends or args.accelerator)
        and "is for collectives of host memory: leave it out",
        "--new-arrays": args.new_arrays
        and (case.ends or collective == "barrier" or args.registered or args.accelerator)
        and "is for collectives of ordinary arrays in OSU's table: leave it out",
        "--cold": args.cold
        and (args.accelerator or not {"native", "auto", "all"} & set(args.algorithm.split(",")))
        and "is for native and auto in host memory: leave it out",
        "--format nccl": nccl
        and (case.ends or collective == "barrier")
        and "is for collectives that move data: use --format osu",
        " ".join(args.placement): placement_error(args.placement, case),
    }
    for flag, reason in refused.items():
        if reason:
            raise ArgumentError(f"{collective}: {flag} {reason}".rstrip())


def device_error(kind: str, case: Case) -> str:
    """Why a benchmark cannot have its buffers on a device, on any machine; empty if it can."""
    rest = "leave -d out to measure host memory"
    if kind != "cuda":
        return f"{kind}: only cuda buffers are measured: use -d cuda, or {rest}"
    if not case.ends and not case.algorithms:
        return f"cuda: this collective takes no arrays on a device: {rest}"
    return ""


def placement_warning(args: argparse.Namespace) -> str:
    """A sentence for a placement that differs from where the buffers are; empty if there is none."""
    words = " ".join(args.placement)
    if "D" in args.placement and not args.accelerator:
        return f"{words} without -d: the buffers are in host memory"
    if "H" in args.placement and args.accelerator:
        return f"{words} with -d {args.accelerator}: the buffers are on the device"
    return ""


def placement_error(words: Sequence[str], case: Case) -> str:
    """Why OSU's words for the placement of buffers cannot be used; empty if they can."""
    if not words or (case.ends and len(words) == 2 and set(words) <= {"H", "D"}):
        return ""
    return "is no placement of buffers here: write H H or D D after latency, bw or bibw only"


def sizes_of(collective: str, args: argparse.Namespace, datatypes: Sequence[str]) -> tuple[int, ...]:
    """OSU's sizes: a number alone is the largest, ``MIN:`` is the smallest, and one element is the least."""
    if collective == "barrier":
        return (0,)
    case = CASES[collective]
    text = args.message_size or f"{args.low or ''}:{args.high or ''}".removesuffix(":")
    low, colon, high = text.partition(":")
    low, high = (low, high) if colon else ("", low)
    smallest = 0 if case.ends > 0 else 1
    element = min(np.dtype(DATATYPES[name]).itemsize for name in datatypes)
    try:
        first = bytes_of(low) if low else smallest
        last = bytes_of(high) if high else LARGEST_MESSAGE if case.ends else LARGEST
    except argparse.ArgumentTypeError as error:
        raise ArgumentError(f"-m {text}: {error}") from None
    if first > last or (colon and not (low or high)):
        raise ArgumentError(f"-m {text}: there is no size from {first} to {last} bytes: give -m MIN:MAX")
    if 0 < last < element:
        raise ArgumentError(
            f"-m {text}: an element has {format_count(element, 'byte')}: give a maximum of that or more"
        )
    if low and first:
        first = max(first, element)
    return steps(first, last, args.stepfactor or 2)


def steps(first: int, last: int, factor: int) -> tuple[int, ...]:
    """The sizes from the first to the last, each ``factor`` times the one before; 1 follows 0."""
    found = []
    while first <= last:
        found.append(first)
        first = max(1, first * factor)
        if factor == 1:
            break
    return tuple(found)


def nccl_sizes(args: argparse.Namespace) -> tuple[int, ...]:
    """nccl-tests' sizes: one, or those from the smallest to the largest."""
    first = NCCL_BYTES if args.minbytes is None else args.minbytes
    last = max(first, NCCL_BYTES) if args.maxbytes is None else args.maxbytes
    if not 0 < first <= last:
        raise ArgumentError(
            f"--minbytes {first} --maxbytes {last}: there is no size in between: give a minimum up to the maximum"
        )
    return nccl_flags.list_sizes(first, last, args.stepfactor, args.stepbytes)


def datatypes_of(args: argparse.Namespace, usual: str) -> tuple[str, ...]:
    """OSU's datatypes; the default of collectives is MPI_FLOAT, not MPI_CHAR, for which MPI defines no sum."""
    words = [word.lower() for word in args.type or [usual]]
    unknown = [word for word in words if word not in (*DATATYPES, "all")]
    if unknown:
        raise ArgumentError(f"-T {unknown[0]}: use one of {', '.join(DATATYPES)}, all")
    every = ("mpi_char", "mpi_int", "mpi_float")
    return tuple(name for word in words for name in (every if word == "all" else (word,)))


def percentiles_of(text: str | None) -> tuple[int, ...]:
    """The percentiles of ``-z``: at most five numbers from 0 to 100."""
    if text is None:
        return ()
    words = text.split(",")
    if len(words) > MAX_PERCENTILES or not all(word.isdigit() and int(word) <= 100 for word in words):
        raise ArgumentError(f"-z{text}: give up to five percentiles from 0 to 100, such as -z50,90,99")
    return tuple(int(word) for word in words)


def root_of(text: str | None) -> int | None:
    """The root; ``None`` for one that rotates."""
    if text is None:
        return 0
    if text == "rotate":
        return None
    match = re.fullmatch(r"fixed:(\d+)", text)
    if not match:
        raise ArgumentError(f"-k {text}: use fixed:R or rotate")
    return int(match[1])


def options_of(args: argparse.Namespace, nccl: bool, percentiles: tuple[int, ...]) -> Options:
    """The options of the measuring loop."""
    timed, untimed = NCCL_CALLS if nccl else (None, None)
    more: dict[str, Any] = {} if args.validation_warmup is None else {"check_warmup": args.validation_warmup}
    return Options(
        iterations=args.iterations or timed,
        warmup=untimed if args.warmup is None else args.warmup,
        seconds=None,
        whole=nccl,
        check=args.validation,
        in_place=args.in_place,
        root=root_of(args.root_rank),
        registered=args.registered,
        on_device=bool(args.accelerator),
        bare_native=not args.accelerator,
        streaming=nccl,
        new_arrays=args.new_arrays,
        percentiles=percentiles,
        window=args.window_size or 64,
        **more,
    )
