"""How well models train with compressed gradients, beside dense ones; ranks are threads.

*One run for each job (a dataset and its passes), number of ranks, method and seed.*  All methods of a seed begin with
the same weights and see the same batches, so differences are taken seed by seed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from benchmarks import harness
from hpccomm.bench.plot import COLOURS

RANKS, DENSITY = (4, 8), 0.001
BASELINES = {
    "dgc": ("dense",),
    "onebit-adam": ("adam", "dense"),
    "gtc": ("dense",),
    "onebit-sgd": ("dense",),
    "ef-signsgd": ("dense",),
    "powersgd": ("dense",),
    "onebit-lamb": ("lamb",),
    "int8": ("dense",),
    "bmuf": ("dense",),
    "hybrid": ("dense",),
}
"""Methods, and the dense methods that each is compared with."""
FIRST = ("dense", "dgc", "adam", "onebit-adam")
"""Methods that are trained first, in all jobs."""
NAMES = (*FIRST, "gtc", "onebit-sgd", "ef-signsgd", "powersgd", "lamb", "onebit-lamb")
TORCH_NAMES = (*FIRST, "gtc", "powersgd", "int8", "bmuf", "hybrid", "lars", "lamb")
"""The methods of a job with PyTorch's networks."""
ORDER = tuple(dict.fromkeys((*NAMES, *TORCH_NAMES)))
"""The order of rows in the tables."""

Run = dict[str, Any]


class Job(NamedTuple):
    """A dataset and its passes."""

    dataset: str
    epochs: int
    batch_size: int
    samples: int | None
    seeds: int
    """Ten on digits: one image is a quarter of a point there, and five seeds do not tell methods apart."""
    ranks: tuple[int, ...] = RANKS
    methods: tuple[str, ...] = NAMES
    density: float = DENSITY
    framework: str = "numpy"
    """``"torch"``: ResNet-20 or a GPT of six layers, at the constant rates of ``hpccomm train``."""


JOBS = {
    "digits": Job("digits", 100, 64, None, 10),
    "stdlib": Job("stdlib", 5, 256, 200_000, 5),
    "digits, 40 passes": Job("digits", 40, 64, None, 10),
    "stdlib, 3 passes": Job("stdlib", 3, 256, 200_000, 5),
    "ResNet-20": Job("digits", 5, 64, None, 3, (4,), TORCH_NAMES, 0.01, "torch"),
    "GPT": Job("stdlib", 1, 256, 20_000, 3, (4,), TORCH_NAMES, 0.01, "torch"),
}


RATES: dict[tuple[str, str], float] = {
    ("stdlib", "dense"): 0.3,
    ("stdlib", "dgc"): 0.3,
    ("stdlib", "adam"): 0.005,
    ("stdlib", "onebit-adam"): 0.005,
}
"""Rates found by tuning that differ from the method's own, by dataset and method."""
TUNING_SEEDS = (100,)
"""Seeds of the runs that chose the rates; these runs are not reported."""


def list_runs() -> Iterator[tuple[str, int, str, int]]:
    """Job, ranks, method, seed; first DGC and 1-bit Adam with their baselines for all jobs, then the others."""
    for first in (True, False):
        for name, job in JOBS.items():
            if job.framework == "torch" and not find_spec("torch"):
                continue
            methods = [method for method in job.methods if (method in FIRST) == first]
            for ranks in job.ranks:
                yield from ((name, ranks, method, seed) for seed in range(job.seeds) for method in methods)


def train_run(name: str, ranks: int, method: str, seed: int, lr: float | None = None) -> Run:
    """One run: accuracy on test samples, loss, bytes.  ``lr`` replaces the method's own rate."""
    from hpccomm.algorithms.lr_schedules import polynomial
    from hpccomm.algorithms.transforms import chain, scale_by_schedule
    from hpccomm.buckets import Bucket
    from hpccomm.commands.train import FRAMEWORKS
    from hpccomm.testing.ranks import run_on_ranks
    from hpccomm.train.datasets import DATASETS
    from hpccomm.train.loop import Settings, count_steps, train
    from hpccomm.train.methods import METHODS, MethodSetup

    job, way, began = JOBS[name], METHODS[method], time.monotonic()
    data, framework = DATASETS[job.dataset](job.samples), FRAMEWORKS[job.framework]
    settings = Settings(job.epochs, job.batch_size, seed, way.steps_locally)
    usual = RATES.get((job.dataset, method), way.lr) if job.framework == "numpy" else framework.rate * way.lr
    rate = usual if lr is None else lr

    def body(comm: Any) -> Any:
        network, steps = import_module(framework.module).network_for(data), count_steps(len(data.targets), settings)
        plan = MethodSetup(comm, Bucket(network.shapes), rate, steps, density=job.density, group_size=2)
        made = way.make(plan)
        if job.framework == "numpy":
            made = chain(made, scale_by_schedule(polynomial(1.0, steps)))
        return train(comm, data, network, made, settings)[1]

    epochs = run_on_ranks(ranks, body, patience=600)[0]
    return {
        "job": name,
        "ranks": ranks,
        "method": method,
        "seed": seed,
        "lr": rate,
        "accuracy": epochs[-1].accuracy,
        "loss": epochs[-1].loss,
        "bytes_a_step": mean(each.wire_bytes for each in epochs),
        "bytes_of_the_last_epoch": epochs[-1].wire_bytes,
        "seconds": round(time.monotonic() - began, 1),
    }


def tuning_runs(rates: str, methods: Sequence[str]) -> list[tuple[Any, ...]]:
    """Job, ranks, method, seed, rate."""
    numbers = [float(each) for each in rates.split(",")]
    return [
        (name, RANKS[0], method, seed, rate)
        for name, job in JOBS.items()
        if job.framework == "numpy"
        for method in methods
        for rate in numbers
        for seed in TUNING_SEEDS
    ]


def key(run: Run) -> tuple[Any, ...]:
    """A run's key; runs that tune the rate have it in their key."""
    rate = run["lr"] if run["seed"] in TUNING_SEEDS else None
    return run["job"], run["ranks"], run["method"], run["seed"], rate


def uncertainty(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


HEAD = (
    "method",
    "seeds",
    "accuracy, %",
    "less than dense, points",
    "within one standard error",
    "loss",
    "bytes a step",
)


def table(runs: Sequence[Run], job: str, ranks: int) -> str:
    """Means with their standard errors, in percent; bytes of a step.

    "Within one standard error" is said of the differences seed by seed, and of the difference of the two means as if
    the seeds were independent.
    """
    here = {key(run)[2:4]: run for run in runs if key(run)[:2] == (job, ranks)}
    rows = []
    for name in ORDER:
        scores = {k: 100 * here[name, k]["accuracy"] for k in range(JOBS[job].seeds) if (name, k) in here}
        if not scores:
            continue
        error = f" ± {uncertainty(list(scores.values())):.2f}" if len(scores) > 1 else ""
        found = [compare_to_baseline(here, scores, base) for base in BASELINES.get(name, ())]
        cells = [name, str(len(scores)), f"{mean(scores.values()):.2f}{error}"]
        cells += ["; ".join(each) for each in zip(*filter(None, found), strict=True)] or ["", ""]
        loss, sent = (mean(here[name, seed][what] for seed in scores) for what in ("loss", "bytes_a_step"))
        rows.append([*cells, f"{loss:.4f}", f"{sent:,.0f}"])
    return f"### {job}, {ranks} ranks\n\n{harness.table(HEAD, rows, words=1)}"


def compare_to_baseline(
    here: dict[tuple[str, int], Run], scores: dict[int, float], base: str
) -> tuple[str, str] | None:
    """How far these seeds are below ``base``, and whether that is within one standard error, by both measures."""
    theirs = {seed: 100 * here[base, seed]["accuracy"] for seed in scores if (base, seed) in here}
    if not theirs:
        return None
    less = [theirs[seed] - scores[seed] for seed in theirs]
    if len(less) == 1:
        return f"{less[0]:.2f} ({base})", "one seed"
    error = math.hypot(uncertainty(list(scores.values())), uncertainty(list(theirs.values())))
    fine = ["yes" if mean(less) <= each else "**no**" for each in (uncertainty(less), error)]
    return f"{mean(less):.2f} ± {uncertainty(less):.2f} ({base})", f"{fine[0]}, {fine[1]} (± {error:.2f})"


def tuning_table(runs: Sequence[Run], job: str) -> str:
    """Mean accuracy and loss by method and rate, on the seeds for tuning; nothing where nothing was tuned."""
    here = [run for run in runs if run["job"] == job and run["seed"] in TUNING_SEEDS]
    cells = []
    for method, rate in sorted({(run["method"], run["lr"]) for run in here}):
        rows = [run for run in here if (run["method"], run["lr"]) == (method, rate)]
        score, loss = 100 * mean(row["accuracy"] for row in rows), mean(row["loss"] for row in rows)
        cells.append([method, f"{rate:g}", f"{score:.2f}", f"{loss:.4f}"])
    title = f"### Rates, {job}, {RANKS[0]} ranks, seeds {' and '.join(map(str, TUNING_SEEDS))}"
    return f"{title}\n\n{harness.table(('method', 'rate', 'accuracy, %', 'loss'), cells, words=1)}" if here else ""


def draw(runs: Sequence[Run], out: Path) -> None:
    """Accuracy with its standard error against bytes a step, a panel for each job and number of ranks."""
    figure, grid = harness.panels(11, 4 * len(JOBS), len(JOBS), len(RANKS))
    for row, (job, its) in zip(grid, JOBS.items(), strict=True):
        for axes, ranks in zip(row, RANKS, strict=True):
            if ranks not in its.ranks:
                axes.set_axis_off()
                continue
            points = []
            for number, name in enumerate(ORDER):
                here = [run for run in runs if key(run)[:3] == (job, ranks, name) and run["seed"] not in TUNING_SEEDS]
                if not here:
                    continue
                scores = [100 * run["accuracy"] for run in here]
                shape = "o" if name in BASELINES else "s"
                colour = COLOURS[number % len(COLOURS)]
                place, error = mean(run["bytes_a_step"] for run in here), uncertainty(scores)
                axes.errorbar(place, mean(scores), error, fmt=shape, color=colour, capsize=3)
                points.append((place, mean(scores), name))
            axes.set_xscale("log")
            axes.set_xlabel("bytes a rank sends in a step")
            axes.set_ylabel("accuracy, %")
            axes.set_title(f"{job}, {ranks} ranks", fontsize=10, loc="left")
            harness.label_points(axes, points)
    harness.save(figure, out)


def main() -> int:
    """Train what the file lacks, print what it holds."""
    parser = harness.parser("accuracy", __doc__, file="accuracy.json")
    parser.add_argument("--job", choices=JOBS, help="only this one")
    parser.add_argument("--method", action="append", help="only these")
    parser.add_argument("--seeds", type=harness.integers, help="only these (default: all of the job)")
    parser.add_argument("--tune", metavar="RATES", help="instead: these rates, 0.1,0.2, on seeds that are not reported")
    args = harness.parse(parser)
    record = harness.Record(args.file, key, seconds=args.seconds)
    keys = tuning_runs(args.tune, args.method) if args.tune else [(*run, None) for run in list_runs()]
    asked = [
        each
        for each in keys
        if args.job in (None, each[0])
        and (not args.method or each[2] in args.method)
        and (args.tune or not args.seeds or each[3] in args.seeds)
    ]
    record.recall_all(asked, lambda run: train_run(*run))
    for name, job in JOBS.items():
        harness.emit(*(table(record.rows, name, ranks) for ranks in job.ranks), tuning_table(record.rows, name))
    if record.rows:
        draw(record.rows, harness.plot_file(args, args.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
