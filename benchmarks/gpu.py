"""``scripts/test_gpu``: every measurement and test that needs a CUDA device, as one page of ``docs/measurements``.

It measures the kernels on 100 MB of float32 as a share of the device's copy bandwidth, beside PyTorch's composition of
the same step; then an allreduce by every transport; then it runs the tests on 1, 2 and 4 ranks that share the device,
in the time that is left.  A kernel's bandwidth counts the bytes that its step must at least read and write.  Kernels
run in a subprocess and ranks in jobs of their own, and the page is written after each part, so that a part that fails
leaves the results of the others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.kernels import momentum_torch, threshold_torch
from hpccomm.bench.report import versions
from hpccomm.errors import HpccommError
from hpccomm.kernels.cuda import kernels
from hpccomm.testing.jobs import run_under_mpi
from hpccomm.transports import cuda
from hpccomm.transports.cuda import TRANSPORT

OUT = Path("docs/measurements")
ELEMENTS = 25_000_000
LAUNCHES, ROUNDS, WARMUP = 10, 7, 3
DENSITY, MESSAGES, VECTORS = 0.001, 8, 4
TESTS = ("tests/test_gpu.py", "tests/test_cuda_kernels.py")
SECONDS, BENCH_SECONDS, KERNEL_SECONDS = 570.0, 40.0, 150.0
"""Seconds: the whole run, the allreduces of one transport at most, all kernels at most."""
TRANSPORTS = ("staged", "ipc", "nccl", "aware")
SHARE_GOAL, TORCH_GOAL, IPC_GOAL, IPC_BYTES = 0.8, 5.0, 4.0, 64 << 20

Step = Callable[[], Any]


class Task(NamedTuple):
    """One step of a method, as a kernel and as PyTorch's operations."""

    title: str
    bytes: float
    """Bytes an element that the step must at least read and write."""
    ours: Callable[[Any, Any], Step]
    """``ours(cupy, kernels)``."""
    torch: Callable[[Any], Step] | None = None
    """``torch(library)``: the step by PyTorch's operations."""


class Speed(NamedTuple):
    """The measurement of one task."""

    title: str
    us: float
    share: float
    """Share of the copy's bandwidth."""
    torch_us: float | None
    trouble: str = ""
    """The error, if there was one; the other numbers are then meaningless."""


# Steps


def gaussians(xp: Any, count: int, dtype: str = "f4") -> list[Any]:
    """Vectors on the device, the same in every run."""
    rng = xp.random.RandomState(1)
    return [rng.standard_normal(ELEMENTS).astype(dtype) for _ in range(count)]


def tensors(torch: Any, count: int, dtype: str = "float32") -> list[Any]:
    """The same numbers as PyTorch tensors."""
    made = torch.Generator("cuda").manual_seed(1)
    return [torch.randn(ELEMENTS, device="cuda", generator=made).to(getattr(torch, dtype)) for _ in range(count)]


def sum_vectors(dtype: str) -> Callable[[Any, Any], Step]:
    """The kernel that sums several vectors in one pass."""

    def ours(xp: Any, k: Any) -> Step:
        vectors, out = gaussians(xp, VECTORS, dtype), xp.empty(ELEMENTS, dtype)
        return lambda: k.reduce("sum", dtype, vectors, out)

    return ours


def sum_vectors_by_torch(dtype: str) -> Callable[[Any], Step]:
    """PyTorch's sum: one addition after the other, in float32."""

    def step(torch: Any) -> Step:
        first, *rest = tensors(torch, VECTORS, dtype)

        def run() -> Any:
            total = first.float()
            for each in rest:
                total = total + each.float()
            return total.to(first.dtype)

        return run

    return step


def threshold(xp: Any, k: Any) -> Step:
    """GTC's kernel: one element in a thousand reaches the threshold in the first step, none later."""
    residual, gradient = gaussians(xp, 2)
    return lambda: k.threshold_words(residual, gradient, residual, 400.0)


def momentum(xp: Any, k: Any) -> Step:
    """DGC's kernel."""
    g, u, v = gaussians(xp, 3)
    return lambda: k.momentum_select(g, u, v, 0.9, round(DENSITY * ELEMENTS), least=0.8)


def pack_signs(xp: Any, k: Any) -> Step:
    """1-bit SGD's kernel: scales, bits and the residual."""
    (residual, gradient), bits = gaussians(xp, 2), xp.empty(-(-ELEMENTS // 8), np.uint8)
    return lambda: k.pack_signs_feedback(residual, gradient, residual, 0.8, -0.8, bits)


def pack_signs_by_torch(torch: Any) -> Step:
    """1-bit SGD's step by PyTorch."""
    residual, gradient = tensors(torch, 2)
    places = 2 ** torch.arange(8, device="cuda", dtype=torch.uint8)

    def run() -> Any:
        residual.add_(gradient)
        above = residual >= 0
        residual.sub_(torch.where(above, 0.8, -0.8))
        return (above.view(-1, 8) * places).sum(1, dtype=torch.uint8)

    return run


def add_messages(xp: Any, k: Any) -> Step:
    """The kernel that adds several 1-bit messages in one pass."""
    (out,), messages = gaussians(xp, 1), [(k.pack_signs(each), 0.8, -0.8) for each in gaussians(xp, MESSAGES)]
    return lambda: k.add_signs(messages, out)


def add_messages_by_torch(torch: Any) -> Step:
    """PyTorch's sum of 1-bit messages, one after the other."""
    (out,) = tensors(torch, 1)
    octets = [torch.randint(256, (ELEMENTS // 8,), device="cuda", dtype=torch.uint8) for _ in range(MESSAGES)]
    places = torch.arange(8, device="cuda", dtype=torch.uint8)

    def run() -> None:
        for each in octets:
            bits = (each[:, None] >> places) & 1
            out.add_(torch.where(bits.bool(), 0.8, -0.8).view(-1))

    return run


def lars(xp: Any, k: Any) -> Step:
    """The kernel of LARS's update, with known norms."""
    w, g, v = gaussians(xp, 3)
    bounds, rate = np.array([[0, ELEMENTS]], np.int64), xp.full(1, 1e-4, "f4")
    return lambda: k.lars_apply(w, g, v, bounds, rate, rate, rate, 1e-3, 1e-3, 0.9, False)


def lars_by_torch(torch: Any) -> Step:
    """LARS's update by PyTorch."""
    w, g, v = tensors(torch, 3)

    def run() -> None:
        v.mul_(0.9).add_(g, alpha=1e-3).add_(w, alpha=1e-4)
        w.sub_(v)

    return run


def adam(xp: Any, k: Any) -> Step:
    """The kernel of Adam's update in place."""
    w, g, m, v = gaussians(xp, 4)
    xp.abs(v, out=v)
    bounds, rate = np.array([[0, ELEMENTS]], np.int64), xp.zeros(1, "f4")
    return lambda: k.adam_step(w, g, m, v, bounds, rate, 1.0, 0.9, 0.1, 0.999, 0.001, 0.1, 0.001, 1e-6, -1e-3)


def adam_by_torch(torch: Any) -> Step:
    """Adam's update by PyTorch, in place."""
    w, g, m, v = tensors(torch, 4)
    v.abs_()

    def run() -> None:
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        w.addcdiv_(m / 0.1, (v / 0.001).sqrt_().add_(1e-6), value=-1e-3)

    return run


TASKS = (
    Task(f"sum of {VECTORS} vectors, float32", 4 * (VECTORS + 1), sum_vectors("f4"), sum_vectors_by_torch("float32")),
    Task(
        f"sum of {VECTORS} vectors, float16 by float32",
        2 * (VECTORS + 1),
        sum_vectors("f2"),
        sum_vectors_by_torch("float16"),
    ),
    Task("GTC: add, compare, compact, keep the rest", 12, threshold, lambda torch: threshold_torch(*tensors(torch, 2))),
    Task("DGC: momentum, threshold, compact, mask", 20, momentum, lambda torch: momentum_torch(*tensors(torch, 3))),
    Task("1 bit: add, pack, keep the rest", 12 + 1 / 8, pack_signs, pack_signs_by_torch),
    Task(f"1 bit: add {MESSAGES} messages", 8 + MESSAGES / 8, add_messages, add_messages_by_torch),
    Task("LARS: update in place", 20, lars, lars_by_torch),
    Task("Adam, LAMB: update in place", 28, adam, adam_by_torch),
)


# Measuring


def microseconds(event: Callable[[], Any], elapsed: Callable[[Any, Any], float], step: Step) -> float:
    """Microseconds of a step: the median round by the device's clock; ``elapsed`` is in milliseconds."""
    for _ in range(WARMUP):
        step()
    times = []
    for _ in range(ROUNDS):
        begin, end = event(), event()
        begin.record()
        for _ in range(LAUNCHES):
            step()
        end.record()
        end.synchronize()
        times.append(1e3 * elapsed(begin, end) / LAUNCHES)
    return median(times)


def cupy_microseconds(xp: Any, step: Step) -> float:
    """Microseconds of a step on CuPy's stream."""
    return microseconds(xp.cuda.Event, xp.cuda.get_elapsed_time, step)


def torch_microseconds(torch: Any, step: Step) -> float:
    """Microseconds of a step on PyTorch's stream."""
    event = partial(torch.cuda.Event, enable_timing=True)
    return microseconds(event, lambda begin, end: begin.elapsed_time(end), step)


def copy_microseconds(xp: Any) -> float:
    """Microseconds of a copy on the device, 8 bytes an element."""
    source, to = gaussians(xp, 2)
    size = source.nbytes
    return cupy_microseconds(
        xp, lambda: to.data.copy_from_device_async(source.data, size, xp.cuda.get_current_stream())
    )


def measure_speeds() -> Iterator[Speed]:
    """Measure the copy, then all tasks."""
    import cupy

    try:
        import torch
    except ImportError:
        torch = None
    copy = copy_microseconds(cupy)
    yield Speed("copy", copy, 1.0, None)
    for task in TASKS:
        us, by_torch, trouble = math.inf, None, ""
        try:
            us = cupy_microseconds(cupy, task.ours(cupy, kernels()))
            by_torch = torch_microseconds(torch, task.torch(torch)) if torch and task.torch else None
        except Exception as error:  # CuPy's, PyTorch's or the compiler's: the next task may be fine
            trouble = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        yield Speed(task.title, us, task.bytes / us / (8 / copy), by_torch, trouble)
        cupy.get_default_memory_pool().free_all_blocks()


def measure_in_subprocess(
    command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu", "--kernels"),
) -> list[Speed]:
    """The rows of :func:`measure_speeds` from a subprocess; the last row says how it ended if it failed."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        clock = threading.Timer(KERNEL_SECONDS, child.kill)
        clock.start()
        assert child.stdout is not None
        found = [Speed(*json.loads(line)) for line in child.stdout if line.startswith("[")]
        clock.cancel()
    if child.returncode:
        found.append(Speed("the next", math.inf, 0.0, None, f"the child ended with status {child.returncode}"))
    return found


def print_speeds() -> int:
    """In the subprocess: print a line of JSON for each task."""
    for each in measure_speeds():
        harness.emit(json.dumps(each))
    return 0


def run_tests(seconds: float) -> str:
    """Run the tests; return their summary line and print the failures."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as tests:
        try:
            said = tests.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            tests.send_signal(signal.SIGINT)  # so that it ends its ranks
            sys.stdout.write(tests.communicate()[0][-4000:])
            return f"not through after {seconds:.0f} s"
    sys.stdout.write(said[-4000:])
    lines = [line for line in said.splitlines() if line]
    return re.sub(r" in [\d.]+s.*", "", lines[-1]).strip("= ") if lines else f"ended with status {tests.returncode}"


def bench_allreduce(ranks: int, way: str) -> tuple[list[dict[str, Any]], str]:
    """Rows of ``hpccomm bench allreduce -d cuda`` by one transport, or the reason why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        flags = ["-m", "1Ki:64Mi", "--stepfactor", "16", "-i", "20", "-x", "5", "-c", "-u", "1", "--json", str(file)]
        command, environ = ["-m", "hpccomm", "bench", "allreduce", "-d", "cuda", *flags], {**os.environ, TRANSPORT: way}
        try:
            done = run_under_mpi(ranks, *command, timeout=BENCH_SECONDS, environ=environ)
        except subprocess.TimeoutExpired:
            return [], f"not through after {BENCH_SECONDS:g} s"
        sys.stdout.write(done.stdout)
        if done.returncode or not file.exists():
            said = [line for line in done.stderr.splitlines() if line.startswith("hpccomm")]
            return [], said[0] if said else f"ended with status {done.returncode}"
        return json.loads(file.read_text(encoding="utf-8"))["rows"], ""


# The page


class Results(NamedTuple):
    """The results of one run."""

    device: str
    driver: str
    tests: str
    kernels: Sequence[Speed]
    collectives: dict[tuple[int, str], tuple[list[dict[str, Any]], str]]
    """By ranks and transport."""
    seconds: float
    date: str


def page(found: Results) -> str:
    """The page in Markdown."""
    software = ", ".join(f"{name} {version}" for name, version in versions("cupy-cuda13x", "mpi4py", "numpy").items())
    lines = [
        f"# {found.device}",
        "",
        f"`scripts/test_gpu`, {found.date}, {found.seconds:.0f} s; {found.driver}; {software}.",
        "",
        f"Tests (kernels; collectives with every transport; 1, 2 and 4 ranks that share the device): {found.tests}.",
        "",
        f"## Kernels, {ELEMENTS * 4 // 1_000_000} MB of float32",
        "",
        "| step | µs | of the copy's bandwidth | PyTorch's operations, µs | as fast as that |",
        "|---|---:|---:|---:|---:|",
        *(kernel_line(each) for each in found.kernels),
        "",
        f"Meant: {SHARE_GOAL:.0%} of the copy's bandwidth, {TORCH_GOAL:g} times PyTorch.",
        "",
        "## Allreduce (float32, µs, median of 20)",
        "",
    ]
    for ranks in dict.fromkeys(ranks for ranks, _ in found.collectives):
        lines += [f"{ranks} ranks on the device:", "", *collective_table(found, ranks), ""]
    ratio = ipc_ratio(found)
    if ratio is not None:
        lines += [
            f"At 64 MiB on 2 ranks IPC or NCCL is {ratio:.1f} times as fast as staging; meant: {IPC_GOAL:g}.",
            "",
        ]
    return "\n".join(lines)


def kernel_line(speed: Speed) -> str:
    """A task's row of the table."""
    if speed.trouble:
        return f"| {speed.title} | {speed.trouble} | - | - | - |"
    by_torch = ("-", "-") if speed.torch_us is None else (f"{speed.torch_us:.0f}", f"{speed.torch_us / speed.us:.1f}×")
    return f"| {speed.title} | {speed.us:.0f} | {speed.share:.0%} | {by_torch[0]} | {by_torch[1]} |"


def collective_table(found: Results, ranks: int) -> list[str]:
    """A row a size, a column a transport; below, the reason for each missing transport."""
    ways = {way: each for (count, way), each in found.collectives.items() if count == ranks}
    there = [way for way, (rows, _) in ways.items() if rows]
    sizes = sorted({row["bytes"] for rows, _ in ways.values() for row in rows})
    table = [f"| bytes | {' | '.join(there)} |", "|---:|" + "---:|" * len(there)] if there else []
    for size in sizes:
        cells = [next((row for row in ways[way][0] if row["bytes"] == size), None) for way in there]
        table.append(f"| {size} | " + " | ".join("-" if row is None else cell(row) for row in cells) + " |")
    return [*table, *(f"\n{way}: {why}" for way, (_, why) in ways.items() if why)]


def cell(row: dict[str, Any]) -> str:
    """A time, with a mark if the result was wrong."""
    return f"{row['p50_us']:.0f}" + ("" if row["validated"] else " (wrong)")


def ipc_ratio(found: Results) -> float | None:
    """Time of staging divided by that of the faster direct transport, 2 ranks, 64 MiB."""
    times = {
        way: row["p50_us"]
        for (ranks, way), (rows, _) in found.collectives.items()
        for row in rows
        if ranks == 2 and row["bytes"] == IPC_BYTES
    }
    direct = [times[way] for way in ("ipc", "nccl") if way in times]
    return times["staged"] / min(direct) if direct and "staged" in times else None


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything and write the page."""
    parser = argparse.ArgumentParser(prog="scripts/test_gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the page (docs/measurements)")
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if cuda.unavailable_reason():
        sys.stderr.write(f"scripts/test_gpu needs a device: {cuda.unavailable_reason()}\n")
        return 1
    if args.kernels:
        return print_speeds()
    began, device = time.monotonic(), cuda.device()
    file, date = args.out / f"gpu-{slug(device.name)}.md", time.strftime("%Y-%m-%d", time.gmtime())
    results = Results(device.name, device.driver, "not begun", [], {}, 0.0, date)

    def keep(**more: Any) -> Results:
        now = results._replace(seconds=time.monotonic() - began, **more)
        file.write_text(page(now) + "\n", encoding="utf-8")
        return now

    results = keep(kernels=measure_in_subprocess())
    for ranks in (2, 4):
        for way in TRANSPORTS:
            results = keep(collectives={**results.collectives, (ranks, way): try_bench_allreduce(ranks, way)})
    results = keep(tests=run_tests(SECONDS - (time.monotonic() - began)))
    sys.stdout.write(f"{page(results)}\nwritten to {file}\n")
    return int(any(word in results.tests for word in ("failed", "error", "not through")))


def try_bench_allreduce(ranks: int, way: str) -> tuple[list[dict[str, Any]], str]:
    """Call :func:`bench_allreduce`; return the error as a reason if there is no launcher."""
    try:
        return bench_allreduce(ranks, way)
    except HpccommError as error:
        return [], str(error)


if __name__ == "__main__":
    sys.exit(main())
