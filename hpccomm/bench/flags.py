"""The flags of ``hpccomm bench``: OSU's flags, nccl-tests' flags for ``--format nccl``, and long flags of hpccomm."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from hpccomm.bench.cases import CASES, Case
from hpccomm.bench.loop import Options
from hpccomm.bench.osu import DATATYPES, ColumnOptions
from hpccomm.errors import ArgumentError
from hpccomm.performance.units import size_of

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

    @property
    def case(self) -> Case:
        """The row of the collective in the table of benchmarks."""
        return CASES[self.collective]


class Parser(argparse.ArgumentParser):
    """A parser that raises ArgumentError instead of ending the process, so that only rank 0 reports a mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise the error."""
        raise ArgumentError(f"{message} (see {self.prog} -h)")


def parser(collective: str) -> Parser:
    """The parser of all flags."""
    made = Parser(prog=f"hpccomm bench {collective}", add_help=False, allow_abbrev=False)
    add = made.add_argument_group("as the OSU Micro-Benchmarks").add_argument
    add("-h", "--help", action="store_true", help="show this text")
    add("-v", "--version", action="store_true", help="show the version of OSU's tables")
    add("-m", "--message-size", metavar="[MIN:]MAX", help="sizes in bytes, each twice the one before (default 1:1Mi)")
    add("-i", "--iterations", type=positive, metavar="N", help="timed calls (default 1000; above 8 KiB 100)")
    add("-x", "--warmup", type=natural, metavar="N", help="untimed calls before them (default 100; above 8 KiB 10)")
    add("-f", "--full", action="store_true", help="show minimum and maximum over the ranks, and the number of calls")
    add("-c", "--validation", action="store_true", help="check every element of as many calls again, exactly")
    add("-u", "--validation-warmup", type=natural, metavar="N", help="unchecked calls before a checked one (default 5)")
    add("-z", "--tail-lat", metavar="P,P,…", help="percentiles; write -z50,99 without a space (-z alone: 50,90,99)")
    add("-M", "--mem-limit", type=bytes_of, metavar="BYTES", help="memory limit of a rank (default 512Mi)")
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
    add(
        "-d",
        "--accelerator",
        choices=("cuda", "managed", "openacc", "rocm"),
        help="put the buffers on a device; cuda is the only one measured",
    )
    add("placement", nargs="*", metavar="H H", help="memory at both ends: D D (device) with -d, else H H (host)")
    add = made.add_argument_group("of hpccomm").add_argument
    add("--algorithm", default="auto", metavar="A,B,…", help="medians in columns: native,auto,… or all (default auto)")
    add("--stepfactor", "--step-factor", type=positive, metavar="F", help="ratio of successive sizes (default 2)")
    add("--registered", action="store_true", help="take buffers from comm.empty, which all ranks of a node can read")
    add("--new-arrays", action="store_true", help="time and check calls on new arrays too, their making counted or not")
    add("--cold", action="store_true", help="time the first call of the process and of a communicator: native, auto")
    add("--json", metavar="FILE", help="write the rows, the machine and this command into FILE")
    add = made.add_argument_group("as nccl-tests").add_argument
    add("--format", choices=("osu", "nccl"), default="osu", help="the format of the table (default osu)")
    for letter, word in (("-b", "min"), ("-e", "max")):
        add(
            letter,
            f"--{word}bytes",
            f"--{word}-bytes",
            type=binary_bytes_of,
            metavar="BYTES",
            help=f"{word}imum size of the whole vector; 32M is 2^25 (default 32M)",
        )
    add("--min-busbw", type=float, metavar="GBPS", help="fail if the mean bus bandwidth is below 0.9 times this")
    return made


def whole_number(text: str, least: int) -> int:
    """A whole number, ``least`` or more."""
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number: give {least} or more")
    return int(text)


natural, positive = partial(whole_number, least=0), partial(whole_number, least=1)


def bytes_of(text: str) -> int:
    """A size: 4096, 64Ki, 100M."""
    return int(size_of(text))


def binary_bytes_of(text: str) -> int:
    """A size as nccl-tests reads it: 128M is 2^27."""
    return bytes_of(re.sub(r"(?i)([kmg])b?$", r"\1i", text))


def expand_tail_flag(word: str) -> str:
    """``-z50,99``, and ``-z`` and ``--tail-lat`` with their default value, as argparse needs them."""
    if word in ("-z", "--tail-lat"):
        return f"--tail-lat={DEFAULT_PERCENTILES}"
    return f"--tail-lat={word[2:]}" if re.fullmatch(r"-z[\d,]+", word) else word


def parse_flags(collective: str, words: Sequence[str]) -> BenchArguments:
    """Parse and check a command line; raises ArgumentError."""
    args = parser(collective).parse_intermixed_args([expand_tail_flag(word) for word in words])
    case = CASES[collective]
    check_flags(collective, case, args)
    nccl = args.format == "nccl"
    percentiles = percentiles_of(args.tail_lat)
    algorithms = tuple(args.algorithm.split(","))
    collected = percentiles or ((50,) if args.json or len(algorithms) > 1 or algorithms == ("all",) else ())
    return BenchArguments(
        collective,
        nccl_sizes(args) if nccl else sizes_of(collective, args),
        datatypes_of(args, "mpi_char" if case.ends else "mpi_float"),
        algorithms,
        options_of(args, nccl, collected),
        ColumnOptions(args.full, args.validation, percentiles, args.new_arrays),
        nccl,
        args.cold,
        args.stepfactor or 2,
        args.mem_limit or MEMORY_LIMIT,
        args.min_busbw,
        args.json,
        args.version,
        placement_warning(args),
    )


def check_flags(collective: str, case: Case, args: argparse.Namespace) -> None:
    """Raise for flags that a benchmark does not have, as OSU does."""
    nccl = args.format == "nccl"
    refused = {
        "-d": args.accelerator and device_error(args.accelerator, case),
        "-f": args.full and case.ends and "is for collectives: leave it out",
        "-l": args.in_place
        and (not case.in_place or nccl)
        and f"does not apply, {'both are measured' if nccl else 'MPI has no such call'}: leave it out",
        "-k": args.root_rank and not case.has_root and "does not apply, there is no root: leave it out",
        "-W": args.window_size and case.ends >= 0 and "is for bw and bibw: leave it out",
        "-c": args.validation and collective == "barrier" and "does not apply, there is no data to check: leave it out",
        "--registered": args.registered
        and (case.ends or args.accelerator)
        and "is for collectives of host memory: leave it out",
        "--new-arrays": args.new_arrays
        and (case.ends or nccl or collective == "barrier" or args.registered or args.accelerator)
        and "is for collectives of ordinary arrays in OSU's table: leave it out",
        "--cold": args.cold
        and (args.accelerator or not {"native", "auto", "all"} & set(args.algorithm.split(",")))
        and "is for native and auto in host memory: leave it out",
        "--format nccl": nccl
        and (case.ends or collective == "barrier")
        and "is for collectives that move data: use --format osu",
        "-m": args.message_size and nccl and "is for --format osu: use --minbytes and --maxbytes",
        "-b, -e": (args.minbytes or args.maxbytes) and not nccl and "is for --format nccl: use -m MIN:MAX",
        "--min-busbw": args.min_busbw and not nccl and "is for --format nccl: leave it out",
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


def sizes_of(collective: str, args: argparse.Namespace) -> tuple[int, ...]:
    """OSU's sizes: a number alone is the largest, ``MIN:`` is the smallest."""
    if collective == "barrier":
        return (0,)
    case = CASES[collective]
    text = args.message_size or ""
    low, colon, high = text.partition(":")
    low, high = (low, high) if colon else ("", low)
    smallest = 0 if case.ends > 0 else 1
    first = bytes_of(low) if low else smallest
    last = bytes_of(high) if high else LARGEST_MESSAGE if case.ends else LARGEST
    if first > last or (colon and not (low or high)):
        raise ArgumentError(f"-m {text}: there is no size from {first} to {last} bytes: give -m MIN:MAX")
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
    return steps(first, last, args.stepfactor or 2)


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
        check=args.validation or nccl,
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
