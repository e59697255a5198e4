"""``scripts/bench_kernels``: the kernels of compressed exchange beside NumPy and PyTorch, one thread, in turns.

*n float32; in every round each contender of a task has its turn, and so has a plain add of two vectors into a third.*
A turn is one run of what does not fit into caches; of shorter vectors five runs, the first to bring them in, and the
median of the others.  Ratios are of the same round, their median is printed with the least and the largest.  "Of an
add" is the bandwidth over the bytes that a task must at least move, by that of the add over its 12n bytes.  Before
anything is timed, the compiled kernel gives the bits of the NumPy reference on the same vectors.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from hpccomm.bench.report import processor, versions
from hpccomm.errors import HpccommError
from hpccomm.kernels import compression_reference as reference
from hpccomm.kernels.dispatch import compression

OUT = Path("docs/measurements/kernels.json")
SIZES = (25_000_000, 1_000_000)
DENSITY, MOMENTUM, MESSAGES, BUCKET = 0.001, 0.9, 8, 512
THRESHOLD = 3.29
"""Standard deviations that 0.1 % of Gaussians reach."""
TAU = 400.0
"""Of threshold compression, in standard deviations of the gradient: of backlogs anywhere below it 0.1 % get there."""
OURS, NUMPY, TORCH, ADD = "ours", "NumPy", "PyTorch", "add"
F32 = np.float32
CACHE_ELEMENTS = 1 << 22
"""Elements up to which the vectors of a task stay in caches."""

Step = Callable[[], Any]


class Task(NamedTuple):
    """What is measured."""

    title: str
    bytes: float
    """An element, that must be read or written."""
    ours: Callable[[ModuleType, int], Step]
    """By the compiled kernels, or by their reference."""
    numpy: Callable[[int], Step] | None = None
    torch: Callable[[int], Step] | None = None
    goals: dict[str, float] = {}  # noqa: RUF012  # not written
    """How many times as fast it is meant to be."""


def numbers(n: int, seed: int) -> Any:
    """Gaussians, float32."""
    return np.random.default_rng(seed).standard_normal(n, F32)


def tensor(n: int, seed: int) -> Any:
    """The same as a tensor of PyTorch."""
    import torch

    return torch.from_numpy(numbers(n, seed))


def selection_size(n: int) -> int:
    """Elements that are sent."""
    return max(1, round(DENSITY * n))


# DGC: u <- mu + g, v <- v + u, the largest of v, which become 0 in v and u


def dgc(kernels: ModuleType, n: int) -> Step:
    """In one pass."""
    g, u, v = (numbers(n, seed) for seed in range(3))
    steps = iter(range(1 << 30))
    return lambda: kernels.momentum_select(g, u, v, MOMENTUM, selection_size(n), step=next(steps), least=0.8)


def dgc_pass(kernels: ModuleType, n: int) -> Step:
    """Momentum and velocity alone: no threshold, nothing that reaches it."""
    g, u, v = (numbers(n, seed) for seed in range(3))

    def step() -> Any:
        if kernels is reference:
            reference.accumulate(g, u, v, MOMENTUM, nesterov=False)
        else:
            addresses = [kernels.address_of(each) for each in (g, u, v)]
            kernels.collect("momentum_select", (*addresses, MOMENTUM, F32(np.inf), False, True), n, *[F32] * 3)
        return u, v

    return step


def dgc_numpy(n: int) -> Step:
    """The threshold from one element in a hundred, as in the publication."""
    (g, u, v), k, magnitude = (numbers(n, seed) for seed in range(3)), selection_size(n), np.empty(n, F32)

    def step() -> Any:
        np.multiply(u, F32(MOMENTUM), out=u)
        np.add(u, g, out=u)
        np.add(v, u, out=v)
        np.abs(v, out=magnitude)
        sample = magnitude[::100]
        threshold = np.partition(sample, sample.size - k // 100)[sample.size - k // 100]
        index = np.flatnonzero(magnitude >= threshold).astype(np.uint32)
        values = v[index]
        v[index] = u[index] = 0
        return index, values

    return step


def dgc_torch(n: int) -> Step:
    """Likewise."""
    (g, u, v), k = (tensor(n, seed) for seed in range(3)), selection_size(n)

    def step() -> Any:
        u.mul_(MOMENTUM).add_(g)
        v.add_(u)
        magnitude = v.abs()
        threshold = magnitude[::100].topk(k // 100).values[-1]
        index = (magnitude >= threshold).nonzero().flatten()
        values = v[index]
        v[index] = u[index] = 0
        return index, values

    return step


# GTC: a quantum of what has reached the threshold


def backlog(n: int) -> Any:
    """As it is after many steps: anywhere between the thresholds."""
    return np.random.default_rng(2).uniform(-TAU, TAU, n).astype(F32)


def gtc(kernels: ModuleType, n: int) -> Step:
    """In one pass."""
    r, g = backlog(n), numbers(n, 1)
    return lambda: kernels.threshold_words(r, g, r, TAU)


def gtc_numpy(n: int) -> Step:
    """Only what was selected is looked at again."""
    r, g, magnitude = backlog(n), numbers(n, 1), np.empty(n, F32)

    def step() -> Any:
        np.add(r, g, out=r)
        np.abs(r, out=magnitude)
        index = np.flatnonzero(magnitude >= F32(TAU))
        values = r[index]
        words = (index << 1 | (values < 0)).astype(np.uint32)
        r[index] = values - np.copysign(F32(TAU), values)
        return words

    return step


def gtc_torch(n: int) -> Step:
    """Likewise."""
    import torch

    r, g = torch.from_numpy(backlog(n)), tensor(n, 1)

    def step() -> Any:
        r.add_(g)
        index = (r.abs() >= TAU).nonzero().flatten()
        values = r[index]
        words = ((index << 1) | (values < 0)).int()
        r[index] = values - TAU * values.sign()
        return words

    return step


# One bit with error feedback: the mean magnitude of r + g, the signs, what they do not say


def onebit(kernels: ModuleType, n: int) -> Step:
    """In two passes."""
    r, g, bits = numbers(n, 0), numbers(n, 1), np.empty(n // 8, np.uint8)

    def step() -> Any:
        scale = float(F32(kernels.sum_magnitudes(r, g) / n))
        kernels.pack_signs_feedback(r, g, r, scale, -scale, bits)
        return scale, bits

    return step


def onebit_numpy(n: int) -> Step:
    """In as many passes as there are operations."""
    r, g, magnitude = numbers(n, 0), numbers(n, 1), np.empty(n, F32)

    def step() -> Any:
        np.add(r, g, out=r)
        scale = np.abs(r, out=magnitude).mean()
        above = r >= 0
        bits = np.packbits(above)
        np.subtract(r, np.where(above, scale, -scale), out=r)
        return scale, bits

    return step


def onebit_torch(n: int) -> Step:
    """Likewise; bits are packed by NumPy, which is faster than what PyTorch offers."""
    import torch

    r, g = tensor(n, 0), tensor(n, 1)

    def step() -> Any:
        r.add_(g)
        scale = r.abs().mean()
        above = r >= 0
        bits = np.packbits(above.numpy())
        r.sub_(torch.where(above, scale, -scale))
        return scale, bits

    return step


# Selection


def largest(kernels: ModuleType, n: int) -> Step:
    """By a sampled threshold."""
    x, steps = numbers(n, 0), iter(range(1 << 30))
    return lambda: kernels.select_largest(x, selection_size(n), next(steps), 0.8)


def largest_numpy(n: int) -> Step:
    """Exactly."""
    x = numbers(n, 0)
    return lambda: np.argpartition(np.abs(x), n - selection_size(n))[n - selection_size(n) :]


def largest_torch(n: int) -> Step:
    """Exactly."""
    x = tensor(n, 0)
    return lambda: x.abs().topk(selection_size(n), sorted=False).indices


def select(kernels: ModuleType, n: int) -> Step:
    """Where elements reach a threshold."""
    x = numbers(n, 0)
    return lambda: kernels.select_threshold(x, THRESHOLD)


def select_numpy(n: int) -> Step:
    """Likewise."""
    x = numbers(n, 0)
    return lambda: np.flatnonzero(np.abs(x) >= F32(THRESHOLD)).astype(np.uint32)


def select_torch(n: int) -> Step:
    """Likewise."""
    x = tensor(n, 0)
    return lambda: (x.abs() >= THRESHOLD).nonzero().flatten()


# Sums of messages


def signs_messages(n: int) -> list[tuple[Any, float, float]]:
    """Bits and what they stand for."""
    return [(np.packbits(numbers(n, seed) >= 0), 0.5 + seed, -0.5 - seed) for seed in range(MESSAGES)]


def add_signs(kernels: ModuleType, n: int) -> Step:
    """In one pass."""
    messages, out = signs_messages(n), np.zeros(n, F32)

    def step() -> Any:
        kernels.add_signs(messages, out)
        return out

    return step


def add_signs_numpy(n: int) -> Step:
    """One message after the other."""
    messages, out = signs_messages(n), np.zeros(n, F32)

    def step() -> Any:
        for bits, plus, minus in messages:
            np.add(out, np.where(np.unpackbits(bits).view(bool), F32(plus), F32(minus)), out=out)
        return out

    return step


def sparse_messages(n: int) -> list[tuple[Any, Any]]:
    """0.1 % of the elements each."""
    found = []
    for seed in range(MESSAGES):
        index = reference.cell_indices(n, selection_size(n), seed)
        found.append((index, numbers(index.size, seed)))
    return found


def scatter(kernels: ModuleType, n: int) -> Step:
    """In rank order."""
    messages, out = sparse_messages(n), np.zeros(n, F32)

    def step() -> Any:
        kernels.scatter_add(messages, out)
        return out

    return step


def scatter_numpy(n: int) -> Step:
    """The indices of a message are distinct."""
    messages, out = sparse_messages(n), np.zeros(n, F32)

    def step() -> Any:
        for index, values in messages:
            out[index] += values
        return out

    return step


def scatter_torch(n: int) -> Step:
    """Likewise."""
    import torch

    found = sparse_messages(n)
    messages = [(torch.from_numpy(i.astype(np.int64)), torch.from_numpy(values)) for i, values in found]
    out = torch.zeros(n)

    def step() -> Any:
        for index, values in messages:
            out.index_add_(0, index, values)
        return out

    return step


# One kernel on one vector


def read_kernel(name: str) -> Callable[[ModuleType, int], Step]:
    """A kernel that reads a vector."""

    def make(kernels: ModuleType, n: int) -> Step:
        x = numbers(n, 0)
        return lambda: getattr(kernels, name)(x)

    return make


def encode_kernel(name: str, *arguments: Any) -> Callable[[ModuleType, int], Step]:
    """A kernel that makes a narrower vector, in new memory."""

    def make(kernels: ModuleType, n: int) -> Step:
        x = numbers(n, 0)
        return lambda: getattr(kernels, name)(x, *arguments)

    return make


def encode_into_kernel(name: str, dtype: Any, *arguments: Any) -> Callable[[ModuleType, int], Step]:
    """Likewise, in memory that was written before: the first write to a page of new memory costs more than the rest."""

    def make(kernels: ModuleType, n: int) -> Step:
        if kernels is reference:
            return encode_kernel(name, *arguments)(kernels, n)
        x, room = numbers(n, 0), np.zeros(n, dtype)
        return lambda: kernels.convert(name, x, dtype, *arguments, out=room)

    return make


def add_kernel(name: str, dtype: Any, *arguments: Any) -> Callable[[ModuleType, int], Step]:
    """A kernel that adds a narrower vector."""

    def make(kernels: ModuleType, n: int) -> Step:
        codes, out = np.random.default_rng(0).integers(0, 100, n).astype(dtype), np.zeros(n, F32)

        def step() -> Any:
            getattr(kernels, name)(codes, *arguments, out)
            return out

        return step

    return make


def range_codes(kernels: ModuleType, n: int) -> Step:
    """The extremes, and codes between them, likewise."""
    if kernels is reference:
        return encode_kernel("range_codes")(kernels, n)
    x, room = numbers(n, 0), np.zeros(n, np.uint8)

    def step() -> Any:
        scale, upper = reference.range_of(*kernels.extremes(x))
        return kernels.convert("range_codes", x, np.uint8, scale, upper, out=room), scale, int(upper) - 255

    return step


def qsgd(kernels: ModuleType, n: int) -> Step:
    """Norms, and levels at random."""
    x = numbers(n, 0)
    return lambda: kernels.qsgd(x, kernels.bucket_norms(x, BUCKET), BUCKET, 127, 5)


def half_numpy(n: int) -> Step:
    """To float16."""
    x, room = numbers(n, 0), np.zeros(n, np.float16)
    return lambda: np.copyto(room, x, casting="same_kind")


def half_torch(n: int) -> Step:
    """To float16."""
    x = tensor(n, 0)
    room = x.half()
    return lambda: room.copy_(x)


def bfloat16_torch(n: int) -> Step:
    """To bfloat16."""
    x = tensor(n, 0)
    room = x.bfloat16()
    return lambda: room.copy_(x)


def add_half_numpy(n: int) -> Step:
    """From float16."""
    x, out = numbers(n, 0).astype(np.float16), np.zeros(n, F32)
    return lambda: np.add(out, x, out=out)


def add_half_torch(n: int) -> Step:
    """From float16."""
    x, out = tensor(n, 0).half(), tensor(n, 1)
    return lambda: out.add_(x)


def add_bfloat16_torch(n: int) -> Step:
    """From bfloat16."""
    x, out = tensor(n, 0).bfloat16(), tensor(n, 1)
    return lambda: out.add_(x)


def finite_numpy(n: int) -> Step:
    """One pass to look, one to conclude."""
    x = numbers(n, 0)
    return lambda: np.isfinite(x).all()


def finite_torch(n: int) -> Step:
    """Likewise."""
    x = tensor(n, 0)
    return lambda: x.isfinite().all()


def pack_numpy(n: int) -> Step:
    """Signs."""
    x = numbers(n, 0)
    return lambda: np.packbits(x >= 0)


TASKS = (
    Task("DGC: momentum, velocity, threshold, selection, masking", 20, dgc, dgc_numpy, dgc_torch, {NUMPY: 3, TORCH: 6}),
    Task("DGC: momentum and velocity alone", 20, dgc_pass),
    Task("GTC: residual, threshold, words", 12, gtc, gtc_numpy, gtc_torch, {NUMPY: 3, TORCH: 6}),
    Task("1-bit with error feedback", 20.125, onebit, onebit_numpy, onebit_torch, {NUMPY: 10, TORCH: 10}),
    Task("the largest 0.1 %, sampled", 4, largest, largest_numpy, largest_torch, {NUMPY: 20, TORCH: 50}),
    Task("threshold selection", 4, select, select_numpy, select_torch),
    Task("unpack and add 8 1-bit messages", 9, add_signs, add_signs_numpy, None, {NUMPY: 20}),
    Task("scatter-add 8 × 0.1 %", 0, scatter, scatter_numpy, scatter_torch),
    Task("pack signs", 4.125, encode_kernel("pack_signs"), pack_numpy),
    Task("all finite?", 4, read_kernel("all_finite"), finite_numpy, finite_torch),
    Task("largest magnitude", 4, read_kernel("largest_magnitude")),
    Task("sums of elements and squares", 4, read_kernel("moments")),
    Task("to float16", 6, encode_into_kernel("to_half", np.uint16, False), half_numpy, half_torch),
    Task("to bfloat16", 6, encode_into_kernel("to_bfloat16", np.uint16, False), None, bfloat16_torch),
    Task("to int8", 5, encode_into_kernel("to_int8", np.int8, 0.04)),
    Task("256 values over the range", 9, range_codes),
    Task("add float16", 10, add_kernel("add_half", np.uint16), add_half_numpy, add_half_torch),
    Task("add bfloat16", 10, add_kernel("add_bfloat16", np.uint16), None, add_bfloat16_torch),
    Task("add int8", 9, add_kernel("add_int8", np.int8, 0.25)),
    Task("QSGD, 127 levels", 9, qsgd),
    Task("natural compression", 5, encode_into_kernel("natural", np.uint8, 5)),
    Task("ternary", 4.25, encode_kernel("ternary", 2.5, 4.0, 5)),
)


def plain_add(n: int) -> Step:
    """The yardstick."""
    a, b, c = numbers(n, 0), numbers(n, 1), np.zeros(n, F32)
    return lambda: np.add(a, b, out=c)


class Row(NamedTuple):
    """One task of one length."""

    task: Task
    n: int
    ms: dict[str, list[float]]
    """Of each contender, a number a round."""

    def ratios(self, other: str) -> list[float]:
        """How many times as fast as another, round by round, in order."""
        return sorted(theirs / ours for theirs, ours in zip(self.ms[other], self.ms[OURS], strict=True))

    @property
    def shares(self) -> list[float]:
        """Of an add's bandwidth, round by round, in order."""
        return [self.task.bytes / 12 * each for each in self.ratios(ADD)]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        found: dict[str, Any] = {"kernel": self.task.title, "elements": self.n, "bytes": self.task.bytes * self.n}
        found["wanted"] = self.task.goals
        return {**found, "ms": {name: [round(each, 4) for each in times] for name, times in self.ms.items()}}


def check(task: Task, n: int) -> None:
    """Raise unless the compiled kernel gives the reference's bits, twice."""
    ours, theirs = task.ours(compression(), n), task.ours(reference, n)
    for _ in range(2):
        if not has_same_bits(ours(), theirs()):
            raise HpccommError(f"{task.title}: the compiled kernel differs from its reference at {n} elements")


def has_same_bits(a: Any, b: Any) -> bool:
    """Whether two answers have the same bits."""
    if isinstance(a, tuple):
        return all(has_same_bits(x, y) for x, y in zip(a, b, strict=True))
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def measure_task(task: Task, n: int, rounds: int) -> Row:
    """All contenders in turns; one round warms up."""
    steps: dict[str, Step] = {ADD: plain_add(n), OURS: task.ours(compression(), n)}
    if task.numpy:
        steps[NUMPY] = task.numpy(n)
    if task.torch and importlib.util.find_spec("torch"):
        steps[TORCH] = task.torch(n)
    ms: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            ms[name].append(time_run(step, 1 if n > CACHE_ELEMENTS else 5))
    return Row(task, n, {name: times[1:] for name, times in ms.items()})


def time_run(step: Step, runs: int) -> float:
    """Milliseconds of a run; of several the median without the first."""
    found = []
    for _ in range(runs):
        began = time.perf_counter()
        step()
        found.append(1e3 * (time.perf_counter() - began))
    return median(found[1:] or found)


def format_spread(values: Sequence[float], form: str) -> str:
    """Median, least and largest."""
    return f"**{median(values):{form}}** ({min(values):{form}}–{max(values):{form}})"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown for one length."""
    yield f"## {rows[0].n:,} elements, {len(rows[0].ms[OURS])} rounds"
    yield ""
    yield "| kernel | ms | GB/s | of an add | NumPy / ours | PyTorch / ours |"
    yield "|---|---:|---:|---:|---:|---:|"
    for row in rows:
        cells = [row.task.title, format_spread(row.ms[OURS], ".3g")]
        moved = row.task.bytes * row.n
        cells.append(f"{moved / median(row.ms[OURS]) / 1e6:.1f}" if moved else "")
        cells.append(format_spread(row.shares, ".0%") if moved else "")
        for other in (NUMPY, TORCH):
            if other not in row.ms:
                cells.append("")
                continue
            wanted = row.task.goals.get(other)
            cells.append(format_spread(row.ratios(other), ".1f") + (f", wanted {wanted:g}" if wanted else ""))
        yield "| " + " | ".join(cells) + " |"
    yield ""


def draw(rows: Sequence[Row], out: Path) -> None:
    """Bandwidth by that of an add, and how many times as fast as the others, a bar a length."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from hpccomm.bench.plot import COLOURS

    titles = [task.title for task in TASKS][::-1]
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasSVG(figure)
    sizes = sorted({row.n for row in rows}, reverse=True)
    left, *others = figure.subplots(1, 3, sharey=True)
    for number, n in enumerate(sizes):
        here = [row for row in rows if row.n == n]
        places = [titles.index(row.task.title) + 0.2 - 0.4 * number for row in here]
        colour = COLOURS[number]
        left.barh(places, [median(row.shares) for row in here], 0.36, color=colour, label=f"{n:,} float32")
        for axes, other in zip(others, (NUMPY, TORCH), strict=True):
            heights = [median(row.ratios(other)) if other in row.ms else 0 for row in here]
            axes.barh(places, heights, 0.36, color=colour)
            axes.plot([row.task.goals.get(other, float("nan")) for row in here], places, "k|", markersize=9)
    left.axvline(0.9, color="black", linewidth=0.8)
    left.set_title("bandwidth by that of an add (line: 0.9)", fontsize=10, loc="left")
    for axes, other in zip(others, (NUMPY, TORCH), strict=True):
        axes.set_title(f"times as fast as {other} (mark: wanted)", fontsize=10, loc="left")
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(range(len(titles)), titles, fontsize=8)
    left.legend(fontsize=8, loc="lower right")
    figure.savefig(out, metadata={"Date": None})


def describe_run(command: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, command, date."""
    return {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **versions("hpccomm", "numpy", "numba", "torch")},
        "command": shlex.join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> int:
    """Measure, print a table for each length, write JSON and a picture."""
    parser = argparse.ArgumentParser(prog="scripts/bench_kernels", description=__doc__)
    parser.add_argument("--elements", type=int, action="append", help="of 8 each (default: 25,000,000 and 1,000,000)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help="tasks with this in their title")
    parser.add_argument("--json", type=Path, help=f"where to write, beside it the picture (such as {OUT})")
    args = parser.parse_args()
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
    rows: list[Row] = []
    for n in args.elements or SIZES:
        here = []
        for task in TASKS:
            if args.only in task.title:
                check(task, min(n, 1 << 20))
                here.append(measure_task(task, n, args.rounds if n > CACHE_ELEMENTS else 2 * args.rounds))
        rows += here
        sys.stdout.write("\n".join(table(here)) + "\n")
        sys.stdout.flush()
    if args.json:
        lines = ",\n".join("  " + json.dumps(row.record(), ensure_ascii=False) for row in rows)
        head = json.dumps(describe_run(["scripts/bench_kernels", *sys.argv[1:]]), indent=1).removesuffix("\n}")
        args.json.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
        draw(rows, args.json.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
