"""Optimizer steps on one vector and one thread: compiled, NumPy, and PyTorch where it is installed.

All steps take turns within a round, and each round has another order, so that no step always follows the same one.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from benchmarks import harness
from hpccomm.algorithms import trust_ratio
from hpccomm.algorithms.large_batch import lamb, lars
from hpccomm.buckets import Bucket
from hpccomm.kernels.optimizers import reference

GRADIENT = 1e-3
LATE = 20_000
"""Updates after which float32 bias corrections are 1, and cost nothing."""
LAMB = {"lr": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-6, "decay": 0.01}
LARS = {"lr": 0.1, "momentum": 0.9, "decay": 1e-4, "trust": 1e-3}


def ours(method: Any, bucket: Bucket, in_place: bool, updates: int = 0) -> Callable[[], None]:
    """A transform on its own weights, so many updates after its first."""
    weights, gradient = vectors(bucket.size)
    held = [method.init(weights)._replace(updates=updates)]

    def place() -> None:
        held[0] = method.apply(gradient, held[0], weights)

    def pure() -> None:
        step, held[0] = method.update(gradient, held[0], weights)
        weights.__iadd__(step)

    return place if in_place else pure


def with_numpy(step: Callable[[], None]) -> Callable[[], None]:
    """The same with the reference's kernels."""

    def run() -> None:
        compiled = trust_ratio.host_kernel
        trust_ratio.host_kernel = lambda name, code: getattr(reference, name)
        try:
            step()
        finally:
            trust_ratio.host_kernel = compiled

    return run


def vectors(n: int) -> tuple[Any, Any]:
    """Weights and a gradient."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(n, dtype="f4"), GRADIENT * rng.standard_normal(n, dtype="f4")


def torch_steps(n: int, layers: int, compile: bool) -> dict[str, Callable[[], None]]:
    """PyTorch's optimizers, and LAMB and LARS written with its multi-tensor operations."""
    import torch

    torch.set_num_threads(1)

    def tensors() -> tuple[list[Any], list[Any]]:
        weights, gradient = vectors(n)
        return [list(torch.from_numpy(each).tensor_split(layers)) for each in (weights, gradient)]

    def optimizer(make: Callable[[list[Any]], Any]) -> Callable[[], None]:
        weights, gradients = tensors()
        parameters = [torch.nn.Parameter(each) for each in weights]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return make(parameters).step

    def foreach(step: Callable[..., None], moments: int) -> Callable[[], None]:
        weights, gradients = tensors()
        state = [[torch.zeros_like(each) for each in weights] for _ in range(moments)]
        return torch.no_grad()(lambda: step(torch, weights, gradients, *state))

    def each(step: Callable[..., None], moments: int) -> Callable[[], None]:
        weights, gradients = tensors()
        state = [[torch.zeros_like(each) for each in weights] for _ in range(moments)]
        compiled = torch.compile(step)

        def run() -> None:
            for parts in zip(weights, gradients, *state, strict=True):
                compiled(*parts)

        return torch.no_grad()(run)

    options = {"lr": 1e-3, "weight_decay": 0.01}
    found = {
        "SGD with momentum, PyTorch foreach": optimizer(
            lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4, foreach=True)
        ),
        "SGD with momentum, PyTorch fused": optimizer(
            lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
        ),
        "AdamW, PyTorch foreach": optimizer(lambda p: torch.optim.AdamW(p, foreach=True, **options)),
        "AdamW, PyTorch fused": optimizer(lambda p: torch.optim.AdamW(p, fused=True, **options)),
        "LAMB, PyTorch foreach": foreach(foreach_lamb, 2),
        "LARS, PyTorch foreach": foreach(foreach_lars, 1),
    }
    if compile:
        found["LAMB, PyTorch compiled"] = each(tensor_lamb, 2)
        found["LARS, PyTorch compiled"] = each(tensor_lars, 1)
    return found


def foreach_lamb(torch: Any, w: Any, g: Any, m: Any, v: Any) -> None:
    """One LAMB step on lists of tensors (bias corrections of the first update)."""
    torch._foreach_lerp_(m, g, 1 - LAMB["b1"])
    torch._foreach_mul_(v, LAMB["b2"])
    torch._foreach_addcmul_(v, g, g, 1 - LAMB["b2"])
    below = torch._foreach_div(v, 1 - LAMB["b2"])
    torch._foreach_sqrt_(below)
    torch._foreach_add_(below, LAMB["eps"])
    u = torch._foreach_div(m, 1 - LAMB["b1"])
    torch._foreach_div_(u, below)
    torch._foreach_add_(u, w, alpha=LAMB["decay"])
    ratios = torch._foreach_div(torch._foreach_norm(w), torch._foreach_norm(u))
    torch._foreach_mul_(u, ratios)
    torch._foreach_add_(w, u, alpha=-LAMB["lr"])


def foreach_lars(torch: Any, w: Any, g: Any, v: Any) -> None:
    """One LARS step on lists of tensors."""
    size, slope = torch._foreach_norm(w), torch._foreach_norm(g)
    below = torch._foreach_add(slope, torch._foreach_mul(size, LARS["decay"]))
    ratios = torch._foreach_mul(torch._foreach_div(size, below), LARS["trust"] * LARS["lr"])
    d = torch._foreach_add(g, w, alpha=LARS["decay"])
    torch._foreach_mul_(d, ratios)
    torch._foreach_mul_(v, LARS["momentum"])
    torch._foreach_add_(v, d)
    torch._foreach_sub_(w, v)


def tensor_lamb(w: Any, g: Any, m: Any, v: Any) -> None:
    """One LAMB step on one tensor."""
    m.lerp_(g, 1 - LAMB["b1"])
    v.mul_(LAMB["b2"]).addcmul_(g, g, value=1 - LAMB["b2"])
    u = (m / (1 - LAMB["b1"])) / ((v / (1 - LAMB["b2"])).sqrt() + LAMB["eps"]) + LAMB["decay"] * w
    w.sub_(u * (LAMB["lr"] * w.norm() / u.norm()))


def tensor_lars(w: Any, g: Any, v: Any) -> None:
    """One LARS step on one tensor."""
    ratio = LARS["trust"] * LARS["lr"] * w.norm() / (g.norm() + LARS["decay"] * w.norm())
    v.mul_(LARS["momentum"]).add_((g + LARS["decay"] * w) * ratio)
    w.sub_(v)


def methods(args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """All that is measured."""
    sizes = [len(part) for part in np.array_split(np.empty(args.elements, "u1"), args.layers)]
    bucket = Bucket({f"layer{number}": (size, 1) for number, size in enumerate(sizes)}, np.float32)
    the_lamb = lamb(bucket, LAMB["lr"], weight_decay=LAMB["decay"])
    the_lars = lars(bucket, LARS["lr"], weight_decay=LARS["decay"], trust=LARS["trust"])
    the_adam = lamb(bucket, LAMB["lr"], weight_decay=LAMB["decay"], adapt=())
    found = {
        "LAMB, in place": ours(the_lamb, bucket, True),
        "LAMB, in place, late": ours(the_lamb, bucket, True, LATE),
        "LAMB, as a transform": ours(the_lamb, bucket, False),
        "LAMB, NumPy": with_numpy(ours(the_lamb, bucket, True)),
        "LARS, in place": ours(the_lars, bucket, True),
        "LARS, as a transform": ours(the_lars, bucket, False),
        "LARS, NumPy": with_numpy(ours(the_lars, bucket, True)),
        "AdamW, in place": ours(the_adam, bucket, True),
        "AdamW, in place, late": ours(the_adam, bucket, True, LATE),
        "AdamW, NumPy": with_numpy(ours(the_adam, bucket, True)),
    }
    if importlib.util.find_spec("torch"):
        found |= torch_steps(args.elements, args.layers, args.compile)
    return found


def main() -> int:
    """Measure the steps that the file lacks and print a table; milliseconds."""
    parser = harness.parser("optimizers", __doc__, rounds=7, file="optimizers.json")
    parser.add_argument("--elements", type=int, default=25_000_000)
    parser.add_argument("--layers", type=int, default=50)
    parser.add_argument("--compile", action="store_true", help="PyTorch's compiler too")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="words in the names of the steps to measure")
    args = harness.parse(parser)
    record = harness.Record(args.file, lambda row: row["step"])
    record.require("job", {"elements": args.elements, "layers": args.layers, "rounds": args.rounds})
    if not record.rows:
        steps = {name: step for name, step in methods(args).items() if any(word in name for word in args.only or [""])}
        if not steps:
            parser.error(f"--only: no step's name has {' or '.join(args.only)}")
        runs = {name: partial(harness.time_local, step) for name, step in steps.items()}
        times = harness.take_turns(runs, args.rounds, shuffle=True)  # the first round compiles and touches the memory
        record.rows.extend({"step": name, "ms": [1e3 * each for each in seconds]} for name, seconds in times.items())
        record.write()
    rows = [[row["step"], *(f"{summary(row['ms']):.1f}" for summary in (min, median, max))] for row in record.rows]
    harness.emit(f"{args.elements} float32 in {args.layers} layers, one thread, {args.rounds} rounds, ms\n")
    harness.emit(harness.table(("step", "min", "median", "max"), rows, words=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
