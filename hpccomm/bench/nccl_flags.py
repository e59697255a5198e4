"""The command lines of nccl-tests: all of its flags, and a reason for each that cannot mean here what it means there.

``all_reduce_perf -b 8 -e 128M -f 2 -g 1`` is read as nccl-tests reads it: ``-f`` is the factor between sizes, ``-i``
the bytes between them, ``-n`` the number of timed calls, ``-d`` the datatype.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hpccomm.errors import ArgumentError

PROGRAMS = {
    "all_reduce": "allreduce",
    "all_gather": "allgather",
    "reduce_scatter": "reduce_scatter_block",
    "broadcast": "bcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "alltoall",
}
"""The programs of nccl-tests, without ``_perf``, and what they measure."""

TYPES = {"int8": "mpi_char", "int32": "mpi_int", "float": "mpi_float", "double": "mpi_double", "half": "half"}
"""Its datatypes that are measured here, by the names of the OSU benchmarks."""


class Fixed(NamedTuple):
    """A flag that has one meaning here, whatever its value; other values than ``same`` get ``difference``."""

    letter: str
    word: str
    same: str
    """A pattern of the values that change nothing; ``.*``: all."""
    difference: str = ""


FIXED = (
    Fixed("-t", "nthreads", "1", "a rank is one process with one buffer: start more ranks with hpccomm-run -n"),
    Fixed("-g", "ngpus", "1", "a rank is one process with one buffer: start more ranks with hpccomm-run -n"),
    Fixed("-o", "op", "sum", "only sums are measured: leave it out"),
    Fixed("-m", "agg_iters", "1", "calls are timed one by one: leave it out"),
    Fixed("-N", "run_cycles", "1", "one cycle is run: repeat the command"),
    Fixed("-a", "average", "1", "times are means over the ranks; -f of --format osu shows minimum and maximum"),
    Fixed("-p", "parallel_init", ".*"),
    Fixed("-z", "blocking", ".*"),  # MPI's calls block
    Fixed("-y", "stream_null", ".*"),
    Fixed("-C", "report_cputime", ".*"),  # times are the host's
    Fixed("-T", "timeout", ".*"),  # the watchdog ends a call that is stuck
    Fixed("-G", "cudagraph", "0", "CUDA graphs are not captured: leave it out"),
    Fixed("-u", "unalign", "0", "buffers are aligned: leave it out"),
    Fixed("-D", "device_implementation", "0", "collectives are called from the host: leave it out"),
    Fixed("-V", "device_cta_count", ".*"),
    Fixed("-x", "cta_policy", ".*"),
    Fixed("-I", "per_iter_timing", "0", "use -z50,99 of --format osu for percentiles"),
    Fixed("-K", "per_iter_skip", ".*"),
    Fixed("-S", "report_timestamps", "0", "rows have no time stamps; --json writes the date: leave it out"),
    Fixed("-M", "memory", "0", "memory is not reported: leave it out"),
)

Reader = Callable[[str], int]

MARKS = re.compile(r"-[be]\d.*|--(min|max)-?bytes(=.*)?|-g\d+|--ngpus(=.*)?|--step-?bytes(=.*)?|--min-busbw(=.*)?")
"""Words that OSU's benchmarks do not have."""


def is_meant(words: Sequence[str]) -> bool:
    """Whether a command line is one of nccl-tests: ``--format`` says so, or words that only nccl-tests has."""
    named = re.search(r"--format[= ](\w+)", " ".join(words))
    if named:
        return named[1] == "nccl"
    pairs = zip(words, [*words, ""][1:], strict=True)
    return any(MARKS.fullmatch(a) or (a in ("-b", "-e", "-g") and b[:1].isdigit()) for a, b in pairs)


def find_program(name: str) -> str:
    """What a program of nccl-tests measures; empty for another name, raises for one without a counterpart."""
    short = name.rpartition("/")[2].removesuffix("_mpi")
    if not short.endswith("_perf"):
        return ""
    if short[:-5] not in PROGRAMS:
        known = ", ".join(f"{each}_perf" for each in PROGRAMS)
        raise ArgumentError(f"{short} has no counterpart here: use one of {known}, or latency, bw, bibw for messages")
    return PROGRAMS[short[:-5]]


def add_flags(made: argparse.ArgumentParser, size: Reader, natural: Reader, positive: Reader) -> None:
    """Declare nccl-tests' flags; the arguments read a size, a number from 0, and one from 1."""
    add = made.add_argument_group("as nccl-tests").add_argument
    add("-b", "--minbytes", "--min-bytes", type=size, metavar="BYTES", help="smallest size of the whole vector (32M)")
    add("-e", "--maxbytes", "--max-bytes", type=size, metavar="BYTES", help="largest size; 32M is 2^25 (32M)")
    add("-i", "--stepbytes", "--step-bytes", type=size, metavar="BYTES", help="bytes between sizes (default 1M)")
    add("-f", "--stepfactor", "--step-factor", type=positive, metavar="F", help="factor between sizes, instead of -i")
    add("-n", "--iters", dest="iterations", type=positive, metavar="N", help="timed calls (default 20)")
    add("-w", "--warmup_iters", dest="warmup", type=natural, metavar="N", help="untimed calls before them (default 5)")
    add("-c", "--check", dest="validation", type=natural, default=1, metavar="N", help="0: do not check the results")
    add("-d", "--datatype", dest="nccl_type", default="float", metavar="TYPE", help=f"{', '.join(TYPES)} or all")
    add("-r", "--root", dest="nccl_root", default="0", metavar="R", help="the root, or all: another with each call")
    add("-R", "--local_register", dest="registered", type=natural, default=0, metavar="0|1", help="use comm.empty")
    add("-J", "--output_file", dest="json", metavar="FILE", help="write the rows as JSON, as --json")
    add("--min-busbw", type=float, metavar="GBPS", help="fail if the mean bus bandwidth is below 0.9 times this")
    for flag in FIXED:
        help_text = "accepted, changes nothing" if flag.same == ".*" else f"{flag.same} only"
        add(flag.letter, f"--{flag.word}", metavar="X", help=help_text)


def translate(args: argparse.Namespace) -> None:
    """Fill in what OSU's flags would have said; raises for values that are not measured here."""
    for flag in FIXED:
        value = getattr(args, flag.word)
        if value is not None and not re.fullmatch(flag.same, value):
            raise ArgumentError(f"{flag.letter} {value}: {flag.difference}")
    names = list(TYPES) if args.nccl_type == "all" else [args.nccl_type]
    unknown = [name for name in names if name not in TYPES]
    if unknown:
        raise ArgumentError(f"-d {unknown[0]}: use one of {', '.join(TYPES)}, all")
    args.type = [TYPES[name] for name in names]
    if not re.fullmatch(r"\d+|all", args.nccl_root):
        raise ArgumentError(f"-r {args.nccl_root}: use the number of a rank, or all")
    has_root = args.nccl_root != "0"
    args.root_rank = None if not has_root else "rotate" if args.nccl_root == "all" else f"fixed:{args.nccl_root}"
    args.validation, args.registered = bool(args.validation), bool(args.registered)


STEP_BYTES = 1 << 20
"""The default distance between sizes."""
MOST_SIZES = 10_000
"""More sizes are a mistake, and would take days."""


def list_sizes(first: int, last: int, factor: int | None, step: int | None) -> tuple[int, ...]:
    """The sizes from the first to the last, by a factor or by a number of bytes."""
    if not (factor and factor > 1) and (last - first) // (step or STEP_BYTES) >= MOST_SIZES:
        count = (last - first) // (step or STEP_BYTES) + 1
        raise ArgumentError(f"-i {step or STEP_BYTES} gives {count:,} sizes: give a larger step, or a factor with -f")
    found = []
    while first <= last:
        found.append(first)
        first = first * factor if factor and factor > 1 else first + (step or STEP_BYTES)
    return tuple(found)
