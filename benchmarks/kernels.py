"""The kernels of compressed exchange beside NumPy and PyTorch, on one thread, in turns.

*n float32; in every round each contender of a task has one turn, and so has a plain add of two vectors into a third.*
A turn is one run if the vectors do not fit into caches; of shorter vectors it is five runs, the first of which loads
the caches, and the median of the others.  Ratios are taken within a round, and their median is printed with the least
and the largest.  "Of an add" is the bandwidth over the bytes that a task must at least move, divided by that of the add
over its 12n bytes.  Before the timing, the compiled kernel must give the bits of the NumPy reference.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from hpccomm.bench.plot import COLOURS
from hpccomm.errors import HpccommError
from hpccomm.kernels import dispatch

SIZES = (25_000_000, 1_000_000)
DENSITY, MOMENTUM, MESSAGES, BUCKET = 0.001, 0.9, 8, 512
THRESHOLD = 3.29
"""Standard deviations that 0.1 % of Gaussian elements reach."""
TAU = 400.0
"""GTC's threshold in standard deviations of the gradient: 0.1 % of uniform residuals below it reach it in a step."""
OURS, NUMPY, TORCH, ADD = "ours", "NumPy", "PyTorch", "add"
REFERENCE = dispatch.load_kernels("reference")
F32 = np.float32
CACHE_ELEMENTS = 1 << 22
"""Elements up to which the vectors of a task stay in caches."""

Step = Callable[[], Any]


class Task(NamedTuple):
    """One kernel, and the same work by NumPy and PyTorch."""

    title: str
    bytes: float
    """Bytes an element that must be read or written."""
    ours: Callable[[SimpleNamespace, int], Step]
    """By the compiled kernels, or by their reference."""
    numpy: Callable[[int], Step] | None = None
    torch: Callable[[int], Step] | None = None
    goals: dict[str, float] = {}  # noqa: RUF012  # not written
    """Aims: how many times as fast as another contender."""


def numbers(n: int, seed: int) -> Any:
    """Gaussian float32 numbers."""
    return np.random.default_rng(seed).standard_normal(n, F32)


def tensor(n: int, seed: int) -> Any:
    """The same numbers as a PyTorch tensor."""
    import torch

    return torch.from_numpy(numbers(n, seed))


def selection_size(n: int) -> int:
    """The number of elements that are sent."""
    return max(1, round(DENSITY * n))


def with_numpy(call: Callable[[Any], Any]) -> Callable[[int], Step]:
    """NumPy's way: a function of one vector."""
    return lambda n: partial(call, numbers(n, 0))


def with_torch(call: Callable[[Any], Any]) -> Callable[[int], Step]:
    """PyTorch's way: a function of one tensor."""
    return lambda n: partial(call, tensor(n, 0))


# DGC: u <- mu + g, v <- v + u, the largest of v, which become 0 in v and u


def dgc(kernels: SimpleNamespace, n: int) -> Step:
    """The kernel: one pass."""
    g, u, v = (numbers(n, seed) for seed in range(3))
    steps = iter(range(1 << 30))
    return lambda: kernels.momentum_select(g, u, v, MOMENTUM, selection_size(n), step=next(steps), least=0.8)


def dgc_pass(kernels: SimpleNamespace, n: int) -> Step:
    """Momentum and velocity alone: an infinite threshold that no element reaches."""
    g, u, v = (numbers(n, seed) for seed in range(3))

    def step() -> Any:
        if kernels is REFERENCE:
            REFERENCE.accumulate(g, u, v, MOMENTUM, nesterov=False)
        else:
            from hpccomm.kernels.selection import loops

            kernels.collect(loops.momentum_select, (g, u, v, MOMENTUM, F32(np.inf), False, True), n, *[F32] * 3)
        return u, v

    return step


def dgc_numpy(n: int) -> Step:
    """NumPy's: the threshold from one element in a hundred, as published."""
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
    """PyTorch's, with the same threshold."""
    return momentum_torch(*(tensor(n, seed) for seed in range(3)))


def momentum_torch(g: Any, u: Any, v: Any) -> Step:
    """DGC's step on tensors."""
    k = selection_size(len(g))

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
    """A residual after many steps: uniform between the thresholds."""
    return np.random.default_rng(2).uniform(-TAU, TAU, n).astype(F32)


def gtc(kernels: SimpleNamespace, n: int) -> Step:
    """The kernel: one pass."""
    r, g = backlog(n), numbers(n, 1)
    return lambda: kernels.threshold_words(r, g, r, TAU)


def gtc_numpy(n: int) -> Step:
    """NumPy's: only selected elements are read again."""
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
    """PyTorch's."""
    import torch

    return threshold_torch(torch.from_numpy(backlog(n)), tensor(n, 1))


def threshold_torch(r: Any, g: Any) -> Step:
    """GTC's step on tensors."""

    def step() -> Any:
        r.add_(g)
        index = (r.abs() >= TAU).nonzero().flatten()
        values = r[index]
        words = ((index << 1) | (values < 0)).int()
        r[index] = values - TAU * values.sign()
        return words

    return step


# One bit with error feedback: the mean magnitude of r + g, the signs, what they do not say


def onebit(kernels: SimpleNamespace, n: int) -> Step:
    """The kernel: two passes."""
    r, g, bits = numbers(n, 0), numbers(n, 1), np.empty(n // 8, np.uint8)

    def step() -> Any:
        scale = float(F32(kernels.sum_magnitudes(r, g) / n))
        kernels.pack_signs_feedback(r, g, r, scale, -scale, bits)
        return scale, bits

    return step


def onebit_numpy(n: int) -> Step:
    """NumPy's: one pass an operation."""
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
    """PyTorch's; NumPy packs the bits, which is faster than PyTorch's operations."""
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


def largest(kernels: SimpleNamespace, n: int) -> Step:
    """The kernel: by a sampled threshold."""
    x, steps = numbers(n, 0), iter(range(1 << 30))
    return lambda: kernels.select_largest(x, selection_size(n), next(steps), 0.8)


def select(kernels: SimpleNamespace, n: int) -> Step:
    """The kernel: the elements that reach a threshold."""
    x = numbers(n, 0)
    return lambda: kernels.select_threshold(x, THRESHOLD)


largest_numpy = with_numpy(lambda x: np.argpartition(np.abs(x), -selection_size(x.size))[-selection_size(x.size) :])
largest_torch = with_torch(lambda x: x.abs().topk(selection_size(len(x)), sorted=False).indices)
select_numpy = with_numpy(lambda x: np.flatnonzero(np.abs(x) >= F32(THRESHOLD)).astype(np.uint32))
select_torch = with_torch(lambda x: (x.abs() >= THRESHOLD).nonzero().flatten())


# Sums of messages


def signs_messages(n: int) -> list[tuple[Any, float, float]]:
    """Messages of bits and two values."""
    return [(np.packbits(numbers(n, seed) >= 0), 0.5 + seed, -0.5 - seed) for seed in range(MESSAGES)]


def add_signs(kernels: SimpleNamespace, n: int) -> Step:
    """The kernel: one pass."""
    messages, out = signs_messages(n), np.zeros(n, F32)

    def step() -> Any:
        kernels.add_signs(messages, out)
        return out

    return step


def add_signs_numpy(n: int) -> Step:
    """NumPy's: one message after the other."""
    messages, out = signs_messages(n), np.zeros(n, F32)

    def step() -> Any:
        for bits, plus, minus in messages:
            np.add(out, np.where(np.unpackbits(bits).view(bool), F32(plus), F32(minus)), out=out)
        return out

    return step


def sparse_messages(n: int) -> list[tuple[Any, Any]]:
    """Messages of 0.1 % of the elements each."""
    found = []
    for seed in range(MESSAGES):
        index = REFERENCE.cell_indices(n, selection_size(n), seed)
        found.append((index, numbers(index.size, seed)))
    return found


def scatter(kernels: SimpleNamespace, n: int) -> Step:
    """The kernel: in rank order."""
    messages, out = sparse_messages(n), np.zeros(n, F32)

    def step() -> Any:
        kernels.scatter_add(messages, out)
        return out

    return step


def scatter_numpy(n: int) -> Step:
    """NumPy's: the indices of a message are distinct."""
    messages, out = sparse_messages(n), np.zeros(n, F32)

    def step() -> Any:
        for index, values in messages:
            out[index] += values
        return out

    return step


def scatter_torch(n: int) -> Step:
    """PyTorch's."""
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


def read_kernel(name: str) -> Callable[[SimpleNamespace, int], Step]:
    """A kernel that reads a vector."""

    def make(kernels: SimpleNamespace, n: int) -> Step:
        x = numbers(n, 0)
        return lambda: getattr(kernels, name)(x)

    return make


def encode_kernel(name: str, *arguments: Any) -> Callable[[SimpleNamespace, int], Step]:
    """A kernel that makes a narrower vector, in new memory."""

    def make(kernels: SimpleNamespace, n: int) -> Step:
        x = numbers(n, 0)
        return lambda: getattr(kernels, name)(x, *arguments)

    return make


def encode_into_kernel(name: str, dtype: Any, *arguments: Any) -> Callable[[SimpleNamespace, int], Step]:
    """Such a kernel with memory that was written before: the first write to a new page costs more than the kernel."""

    def make(kernels: SimpleNamespace, n: int) -> Step:
        if kernels is REFERENCE:
            return encode_kernel(name, *arguments)(kernels, n)
        from hpccomm.kernels.quantized import loops

        x, room, loop = numbers(n, 0), np.zeros(n, dtype), getattr(loops, name)
        return lambda: kernels.convert(loop, x, dtype, *arguments, out=room)

    return make


def add_kernel(name: str, dtype: Any, *arguments: Any) -> Callable[[SimpleNamespace, int], Step]:
    """A kernel that adds a narrower vector."""

    def make(kernels: SimpleNamespace, n: int) -> Step:
        codes, out = np.random.default_rng(0).integers(0, 100, n).astype(dtype), np.zeros(n, F32)

        def step() -> Any:
            getattr(kernels, name)(codes, *arguments, out)
            return out

        return step

    return make


def range_codes(kernels: SimpleNamespace, n: int) -> Step:
    """The extremes, and codes between them, into memory that was written before."""
    if kernels is REFERENCE:
        return encode_kernel("range_codes")(kernels, n)
    from hpccomm.kernels.quantized import loops

    x, room = numbers(n, 0), np.zeros(n, np.uint8)

    def step() -> Any:
        scale, upper = REFERENCE.range_of(*kernels.extremes(x))
        return kernels.convert(loops.range_codes, x, np.uint8, scale, upper, out=room), scale, int(upper) - 255

    return step


def qsgd(kernels: SimpleNamespace, n: int) -> Step:
    """Norms, and randomly rounded levels."""
    x = numbers(n, 0)
    return lambda: kernels.qsgd(x, kernels.bucket_norms(x, BUCKET), BUCKET, 127, 5)


def half_numpy(n: int) -> Step:
    """NumPy's conversion to float16."""
    x, room = numbers(n, 0), np.zeros(n, np.float16)
    return lambda: np.copyto(room, x, casting="same_kind")


def add_half_numpy(n: int) -> Step:
    """NumPy's sum with a float16 vector."""
    x, out = numbers(n, 0).astype(np.float16), np.zeros(n, F32)
    return lambda: np.add(out, x, out=out)


def encode_torch(dtype: str) -> Callable[[int], Step]:
    """PyTorch's conversion to a narrower type."""

    def make(n: int) -> Step:
        x = tensor(n, 0)
        out = getattr(x, dtype)()
        return lambda: out.copy_(x)

    return make


def add_torch(dtype: str) -> Callable[[int], Step]:
    """PyTorch's sum with a vector of a narrower type."""

    def make(n: int) -> Step:
        x, out = getattr(tensor(n, 0), dtype)(), tensor(n, 1)
        return lambda: out.add_(x)

    return make


finite_numpy = with_numpy(lambda x: np.isfinite(x).all())
finite_torch = with_torch(lambda x: x.isfinite().all())
pack_numpy = with_numpy(lambda x: np.packbits(x >= 0))

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
    Task("to float16", 6, encode_into_kernel("to_half", np.uint16, False), half_numpy, encode_torch("half")),
    Task("to bfloat16", 6, encode_into_kernel("to_bfloat16", np.uint16, False), None, encode_torch("bfloat16")),
    Task("to int8", 5, encode_into_kernel("to_int8", np.int8, 0.04)),
    Task("256 values over the range", 9, range_codes),
    Task("add float16", 10, add_kernel("add_half", np.uint16), add_half_numpy, add_torch("half")),
    Task("add bfloat16", 10, add_kernel("add_bfloat16", np.uint16), None, add_torch("bfloat16")),
    Task("add int8", 9, add_kernel("add_int8", np.int8, 0.25)),
    Task("QSGD, 127 levels", 9, qsgd),
    Task("natural compression", 5, encode_into_kernel("natural", np.uint8, 5)),
    Task("ternary", 4.25, encode_kernel("ternary", 2.5, 4.0, 5)),
)


def plain_add(n: int) -> Step:
    """The reference of all bandwidths: an add of two vectors into a third."""
    a, b, c = numbers(n, 0), numbers(n, 1), np.zeros(n, F32)
    return lambda: np.add(a, b, out=c)


class Row(NamedTuple):
    """One task of one length."""

    task: Task
    n: int
    ms: dict[str, list[float]]
    """Milliseconds of each contender, a number a round."""

    def ratios(self, other: str) -> list[float]:
        """How many times as fast as another, round by round, in order of size; nothing if that did not run."""
        return harness.ratios(self.ms[other], self.ms[OURS]) if other in self.ms else []

    @property
    def shares(self) -> list[float]:
        """Of an add's bandwidth, round by round, in order of size."""
        return [self.task.bytes / 12 * each for each in self.ratios(ADD)]

    def record(self) -> dict[str, Any]:
        """For the file."""
        found: dict[str, Any] = {"kernel": self.task.title, "elements": self.n, "bytes": self.task.bytes * self.n}
        found["wanted"] = self.task.goals
        return {**found, "ms": {name: [round(each, 4) for each in times] for name, times in self.ms.items()}}


def row_of(record: dict[str, Any]) -> Row:
    """A row of the file."""
    task = next(task for task in TASKS if task.title == record["kernel"])
    return Row(task, record["elements"], record["ms"])


def check(task: Task, n: int) -> None:
    """Raise HpccommError unless the compiled kernel gives the reference's bits, twice."""
    ours, theirs = task.ours(dispatch.kernels(), n), task.ours(REFERENCE, n)
    for _ in range(2):
        if not has_same_bits(ours(), theirs()):
            raise HpccommError(f"{task.title}: the compiled kernel differs from its reference at {n} elements")


def has_same_bits(a: Any, b: Any) -> bool:
    """Whether two answers have the same bits."""
    if isinstance(a, tuple):
        return all(has_same_bits(x, y) for x, y in zip(a, b, strict=True))
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


def measure_task(task: Task, n: int, rounds: int) -> Row:
    """Measure all contenders in turns, after one round to warm up."""
    steps: dict[str, Step] = {ADD: plain_add(n), OURS: task.ours(dispatch.kernels(), n)}
    if task.numpy:
        steps[NUMPY] = task.numpy(n)
    if task.torch and importlib.util.find_spec("torch"):
        steps[TORCH] = task.torch(n)
    runs = {name: partial(time_run, step, 1 if n > CACHE_ELEMENTS else 5) for name, step in steps.items()}
    return Row(task, n, harness.take_turns(runs, rounds))


def time_run(step: Step, runs: int) -> float:
    """Milliseconds of a run; of several runs the median without the first."""
    found = [1e3 * harness.time_local(step) for _ in range(runs)]
    return median(found[1:] or found)


HEAD = ("kernel", "ms", "GB/s", "of an add", "NumPy / ours", "PyTorch / ours")


def table(rows: Sequence[Row]) -> str:
    """All tasks of one length."""
    cells = []
    for row in rows:
        moved = row.task.bytes * row.n
        bandwidth = [f"{moved / median(row.ms[OURS]) / 1e6:.1f}", harness.spread(row.shares, ".0%")]
        cells.append([row.task.title, harness.spread(row.ms[OURS], ".3g"), *(bandwidth if moved else ["", ""])])
        for other in (NUMPY, TORCH):
            goal = f", wanted {row.task.goals[other]:g}" if other in row.ms and other in row.task.goals else ""
            cells[-1].append(harness.spread(row.ratios(other), ".1f") + goal)
    title = f"## {rows[0].n:,} elements, {len(rows[0].ms[OURS])} rounds"
    return f"{title}\n\n{harness.table(HEAD, cells, words=1)}"


def draw(rows: Sequence[Row], out: Path) -> None:
    """Bandwidth by that of an add, and how many times as fast as the others, a bar a length."""
    titles = [task.title for task in TASKS][::-1]
    figure, [[left, *others]] = harness.panels(13, 7, 1, 3, sharey=True)
    sizes = sorted({row.n for row in rows}, reverse=True)
    for number, n in enumerate(sizes):
        here = [row for row in rows if row.n == n]
        places = [titles.index(row.task.title) + 0.2 - 0.4 * number for row in here]
        colour = COLOURS[number]
        left.barh(places, [median(row.shares) for row in here], 0.36, color=colour, label=f"{n:,} float32")
        for axes, other in zip(others, (NUMPY, TORCH), strict=True):
            heights = [median(row.ratios(other) or [0]) for row in here]
            axes.barh(places, heights, 0.36, color=colour)
            axes.plot([row.task.goals.get(other, float("nan")) for row in here], places, "k|", markersize=9)
    left.axvline(0.9, color="black", linewidth=0.8)
    left.set_title("bandwidth by that of an add (line: 0.9)", fontsize=10, loc="left")
    for axes, other in zip(others, (NUMPY, TORCH), strict=True):
        axes.set_title(f"times as fast as {other} (mark: wanted)", fontsize=10, loc="left")
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
    left.set_yticks(range(len(titles)), titles, fontsize=8)
    harness.put_legend_below(left)
    harness.save(figure, out)


def main() -> int:
    """Measure the tasks that the file lacks, print a table for each length, draw."""
    parser = harness.parser("kernels", __doc__, rounds=9, file="kernels.json")
    parser.add_argument("--elements", type=int, action="append", help="of 8 each (default: 25,000,000 and 1,000,000)")
    parser.add_argument("--only", default="", help="tasks with this in their title")
    args = harness.parse(parser)
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)
    record = harness.Record(args.file, lambda row: (row["kernel"], row["elements"]), ["rows"], args.seconds)

    def measure(key: tuple[str, int]) -> dict[str, Any]:
        task, n = next(task for task in TASKS if task.title == key[0]), key[1]
        check(task, min(n, 1 << 20))
        return measure_task(task, n, args.rounds if n > CACHE_ELEMENTS else 2 * args.rounds).record()

    for n in args.elements or SIZES:
        record.recall_all([(task.title, n) for task in TASKS if args.only in task.title], measure)
        here = [row_of(row) for row in record.rows if row["elements"] == n]
        if here:
            harness.emit(table(here))
    draw([row_of(row) for row in record.rows], harness.plot_file(args, args.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
