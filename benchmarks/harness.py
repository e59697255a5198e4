"""The harness of all programs here: launch ranks, take turns, summarise, keep a record, print tables, draw.

A program is a table of what to measure, a function that measures one row of it, and the columns that it prints.
Contenders take turns within a round, so that all of them see the same machine.  Figures are medians over rounds or
launches, ratios are taken round by round, and the least and the largest value stand beside each median.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

from hpccomm.bench.report import versions
from hpccomm.cluster.nodes import Cluster
from hpccomm.performance.probe import processor_name

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

RESULTS = Path("bench-results")
"""Where results go unless ``--json`` names a file; the committed ones are in docs/measurements."""
T = TypeVar("T")
Row = dict[str, Any]


# Turns


def take_turns(
    runs: Mapping[str, Callable[[], T]], rounds: int, warmup: int = 1, shuffle: bool = False
) -> dict[str, list[T]]:
    """What each run returned in each round; every run has one turn a round, and warm-up rounds are dropped.

    ``shuffle`` gives every round another order, so that no run always follows the same one.
    """
    found: dict[str, list[T]] = {name: [] for name in runs}
    order, generator = list(runs), random.Random(0)
    for number in range(warmup + rounds):
        if shuffle:
            generator.shuffle(order)
        for name in order:
            value = runs[name]()
            if number >= warmup:
                found[name].append(value)
    return found


def time_local(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds a call, on this rank."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def time_collective(comm: Any, call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds a call, on the slowest rank (collective)."""
    comm.Barrier()
    return max_over_ranks(comm, time_local(call, repeats))


def busy_seconds() -> float:
    """Seconds for which the cores of this machine have worked, programs and system together, since it was started."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _wait, interrupts, soft = map(int, file.readline().split()[1:8])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def take_roots(elements: int, times: int) -> None:
    """Work of the processor on an array of so many elements, during which other threads may run Python."""
    import numpy as np

    x = np.linspace(1, 2, elements)
    for _ in range(times):
        np.sqrt(x, out=x)


def max_over_ranks(comm: Any, mine: float) -> float:
    """The largest value of any rank (collective)."""
    from mpi4py import MPI

    return float(MPI.Intracomm(comm).allreduce(mine, MPI.MAX))


# Launches


class LaunchError(Exception):
    """A launch failed; the text is the end of what it printed."""


Runner = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Starts a program (``-m hpccomm bench …``) on ranks and waits for its end."""


class Shape(NamedTuple):
    """Virtual nodes and the ranks on them."""

    nodes: int
    per_node: tuple[int, ...]
    placement: str
    rate: str

    @property
    def title(self) -> str:
        """In words."""
        each = set(self.per_node)
        ranks = str(*each) if len(each) == 1 else "+".join(map(str, self.per_node))
        order = "" if self.placement == "block" else f", {self.placement}"
        return f"{self.nodes} x {ranks}{order}, {self.rate}"


def shape_of(text: str) -> Shape:
    """A shape as on the command line: ``4x2``, ``4x2,100mbit``, ``3x2+1+3,1gbit,cyclic``."""
    where, rate, placement = [*text.split(","), *("", "1gbit", "block")[text.count(",") + 1 :]]
    nodes, _, ranks = where.partition("x")
    per_node = tuple(map(int, ranks.split("+")))
    return Shape(int(nodes), per_node * int(nodes) if len(per_node) == 1 else per_node, placement, rate)


def on_node(ranks: int, environment: str | Path = "", env: Mapping[str, str] | None = None) -> Runner:
    """Launches on this node, in the virtual environment of that name or in the one that runs this."""
    launcher = Path(environment, "bin") if environment else Path(sys.executable).parent
    return lambda program: subprocess.run(
        [str(launcher / "hpccomm-run"), "-n", str(ranks), *program],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )


def on_cluster(
    cluster: Cluster,
    shape: Shape,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
    tree: Path | None = None,
) -> Runner:
    """Launches on the nodes of a virtual cluster; with the package of another ``tree``, which is the working folder.

    ``python -m`` imports from there before it looks anywhere else.
    """
    more: dict[str, Any] = {"capture_output": True, "text": True, "timeout": timeout, "cwd": tree}
    settings = {"OMP_NUM_THREADS": "1", **(env or {})}
    return lambda program: cluster.run(program, shape.per_node, shape.placement, env=settings, **more)


def launch(run: Runner, program: Sequence[str], flag: str = "--json") -> Any:
    """What one launch wrote into the file that ``flag`` names, without that file's folder in its command."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        done = run([*program, flag, str(file)])
        if done.returncode or not file.exists():
            raise LaunchError(f"{done.stdout[-2000:]}{done.stderr[-4000:]}".strip() or f"status {done.returncode}")
        found = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(found, dict) and "command" in found:
        found["command"] = found["command"].replace(f"{folder}/", "")
    return found


def write_on_rank0(file: Path, found: Any) -> None:
    """In a launch: rank 0 writes what :func:`launch` returns."""
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 0:
        file.write_text(json.dumps(found), encoding="utf-8")


# The record


class OutOfTimeError(Exception):
    """The time is over; the same command continues from its record."""


class Record:
    """The results of a program, in a file from which an interrupted run continues.

    ``identify`` gives a row's key.  A row whose key is in the file is not measured again.  The file holds the machine,
    the versions, the command and the date of the last run, and a list ``records`` (or the lists that are named).
    """

    def __init__(
        self,
        file: Path | None,
        identify: Callable[[Any], Hashable] = str,
        lists: Sequence[str] = ("records",),
        seconds: float = math.inf,
    ) -> None:
        self.file, self.identify, self.end = file, identify, time.monotonic() + seconds
        found = json.loads(file.read_text(encoding="utf-8")) if file and file.exists() else {}
        self.data: dict[str, Any] = {lists[0]: found} if isinstance(found, list) else found
        self.lists = {name: self.data.setdefault(name, []) for name in lists}

    @property
    def rows(self) -> list[Any]:
        """All rows of the first list."""
        return next(iter(self.lists.values()))

    def require(self, name: str, value: Any) -> None:
        """Refuse to continue from a file whose results are of another job."""
        if self.data.setdefault(name, value) != value:
            raise SystemExit(f"{self.file} is of {name} {self.data[name]}, not {value}: name another file")

    def recall(self, key: Hashable, measure: Callable[[], Any], into: str = "") -> Any:
        """The row of a key: from the file, or measured now and written at once; OutOfTimeError if the time is over."""
        rows = self.lists[into] if into else self.rows
        row = next((row for row in rows if self.identify(row) == key), None)
        if row is None:
            if time.monotonic() > self.end:
                raise OutOfTimeError
            row = measure()
            rows.append(row)
            self.write()
            progress(f"measured {key}")
        return row

    def recall_all(self, keys: Iterable[Hashable], measure: Callable[[Any], Any], into: str = "") -> None:
        """Measure the keys that the file lacks, until the time is over."""
        try:
            for key in show_bar(keys):
                self.recall(key, partial(measure, key), into)
        except OutOfTimeError:
            progress("out of time: the same command measures the rest")

    def lacks(self, keys: Iterable[Hashable]) -> bool:
        """Whether some key has no row yet."""
        there = {self.identify(row) for rows in self.lists.values() for row in rows}
        return not there.issuperset(keys)

    def write(self) -> None:
        """Write the file at once or not at all, a row a line."""
        if self.file is None:
            return
        self.data = {**describe_run(), **{k: v for k, v in self.data.items() if k not in DESCRIPTION}}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(self.file.name + ".part")
        part.write_text(json.dumps(self.data).replace("}, {", "},\n{") + "\n", encoding="utf-8")
        part.replace(self.file)


DESCRIPTION = ("machine", "versions", "command", "date")


def describe_run() -> dict[str, Any]:
    """Machine, versions, the command that repeats this run, and the date."""
    name = Path(sys.argv[0]).stem.replace("_", "-")
    return {
        "machine": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **versions("hpccomm", "mpi4py", "numpy", "numba", "torch")},
        "command": shlex.join(["scripts/bench", name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


# Tables and pictures


def spread(values: Sequence[float], form: str = ".4g", unit: float = 1.0) -> str:
    """The median, and in brackets the least and the largest value; nothing of no values."""
    if not values:
        return ""
    middle, least, most = (number(unit * each, form) for each in (median(values), min(values), max(values)))
    return f"**{middle}** ({least}–{most})"


def number(value: float, form: str = ".4g") -> str:
    """A number for a reader: 24,230 and not 2.423e+04."""
    text = f"{value:{form}}"
    return f"{float(text):,.0f}" if "e+" in text else text


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as fast ours are, round by round, in order of size."""
    return sorted(a / b for a, b in zip(theirs, ours, strict=True))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 0) -> str:
    """A table in Markdown, whose first ``words`` columns hold words and the others numbers."""
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    """A figure and a grid of its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def put_legend_below(axes: Any) -> None:
    """A legend that covers no bar and no label of the axis."""
    axes.figure.draw_without_rendering()  # which places the labels
    frame, lowest = axes.get_window_extent(), axes.get_tightbbox().y0
    below = (lowest - frame.y0) / frame.height - 0.01
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, below), frameon=False)


def label_points(axes: Any, points: Iterable[tuple[float, float, str]], size: float = 8.0) -> None:
    """Names beside points, on the side that is inside the frame, and none over another."""
    axes.figure.draw_without_rendering()  # which places the axes
    points, frame, scale = list(points), axes.get_window_extent(), axes.figure.dpi / 72
    height, taken = 1.3 * size * scale, list[tuple[float, float, float]]()
    for x, y, name in sorted(points, key=lambda each: each[1]):
        at, up = axes.transData.transform((x, y))
        width, lifted = 0.65 * size * len(name) * scale, up
        side = -1 if at + width > frame.x1 else 1
        left = at - width if side < 0 else at
        while any(
            left < end and begin < left + width and lifted < top + height for begin, end, top in taken if top <= lifted
        ):
            lifted += 1
        taken.append((left, left + width, lifted))
        axes.annotate(
            name,
            (x, y),
            (5 * side, (lifted - up) / scale),
            textcoords="offset points",
            fontsize=size,
            ha="right" if side < 0 else "left",
            va="center",
        )


def save(figure: Any, out: Path) -> None:
    """Write a figure; the same results give the same file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


def emit(*texts: str) -> None:
    """Print at once, as a later part of the run may fail."""
    for text in texts:
        sys.stdout.write(text + "\n")
    sys.stdout.flush()


def progress(text: str) -> None:
    """Say on stderr what was done, above the bar if there is one."""
    line = f"[{time.strftime('%H:%M:%S')}] {text}\n"
    if tqdm is None:
        sys.stderr.write(line)
    else:
        tqdm.write(line, file=sys.stderr, end="")


def show_bar(keys: Iterable[T]) -> Iterable[T]:
    """The keys, with a progress bar if stderr is a terminal and tqdm is installed."""
    return keys if tqdm is None else tqdm(keys, file=sys.stderr, disable=None, unit="row", leave=False)


# The command line


def integers(text: str) -> list[int]:
    """A list on the command line: ``2,4``."""
    return [int(each) for each in text.split(",")]


def parser(name: str, doc: str | None, rounds: int | None = None, ranks: str = "", file: str = "") -> Any:
    """The flags that programs share; ``file`` is where results go, in which {ranks} and {mpi} are filled in."""
    made = argparse.ArgumentParser(
        prog=f"scripts/bench {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None:
        made.add_argument("--rounds", type=int, default=rounds, help=f"rounds, or launches (default {rounds})")
    if ranks:
        made.add_argument("--ranks", type=integers, default=integers(ranks), help=f"default {ranks}")
    made.add_argument("--json", default=file and str(RESULTS / file), help="results; those of this file are kept")
    made.add_argument("--plot", type=Path, help="the picture (default: beside the results)")
    made.add_argument("--seconds", type=float, default=math.inf, help="begin no measurement after so long")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line."""
    args, unknown = parse_known(made)
    if unknown:
        made.error(f"unknown: {' '.join(unknown)}")
    return args


def parse_known(made: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """Likewise, and the words that are not ours."""
    args, unknown = made.parse_known_args()
    args.file = Path(args.json) if args.json else None
    return args, unknown


def add_shapes(made: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """``--shape``, several times, for programs on virtual clusters."""
    made.add_argument(
        "--shape",
        action=AppendShape,
        default=[shape_of(each) for each in default],
        metavar="NxK[,RATE[,PLACEMENT]]",
        help=f"nodes x ranks, may come several times (default {' '.join(default)})",
    )


class AppendShape(argparse.Action):
    """The first shape on the command line replaces the default ones."""

    def __call__(self, parser: Any, namespace: Any, text: Any, option: Any = None) -> None:
        """Add a shape."""
        old = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if old is self.default else old), shape_of(text)])


def plot_file(args: argparse.Namespace, file: Path) -> Path:
    """Where the picture goes."""
    return Path(args.plot or file.with_suffix(".svg"))


def results_file(args: argparse.Namespace, **names: Any) -> Path:
    """The results of these ranks or of this MPI."""
    return Path(args.json.format(**{key: str(name).replace(" ", "-").lower() for key, name in names.items()}))


def steps(sizes: str, factor: int) -> Iterator[int]:
    """The sizes of ``LEAST:MOST``, each ``factor`` times the one before."""
    least, most = map(int, sizes.split(":"))
    while least <= most:
        yield least
        least *= factor
