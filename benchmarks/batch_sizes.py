#!/usr/bin/env python3
"""Test accuracy against the batch, from 64 to all samples at once: SGD with linear scaling, LARS and LAMB.

Usage: python scripts/bench_batch_sizes --json FILE [--data digits,stdlib] [--seeds 0,1,2] [--plot FILE]

Every batch has the same number of passes through the data, so the largest takes one step a pass.  All methods have
momentum 0.9 (LAMB: Adam's moments), no weight decay, a warm-up of a tenth of the steps and a quadratic fall to zero
behind it.  How each is tuned, with four fifths of the training samples, scored on the last fifth, mean of other seeds
(--tuning 100,101,102):

  base    the rate at batch 64: eleven rates a factor of two apart
  rule    that rate scaled to the batch, linearly (SGD, LARS) or with its root (LAMB): not tuned again
  tuned   the best of the rule's rate times 1/32, 1/16, … 2 and 4, for each batch

Accuracies are those of other samples, after training with all training samples: mean and standard deviation over the
seeds.  What the file holds is not trained again: with --minutes a run of any length is done in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from hpccomm.algorithms.lamb import lamb
from hpccomm.algorithms.lars import lars
from hpccomm.algorithms.lr_schedules import linear_scaling, polynomial, sqrt_scaling, warm_up
from hpccomm.algorithms.transforms import Schedule, Transform, chain, momentum, scale_by_schedule
from hpccomm.buckets import Bucket
from hpccomm.train.datasets import Dataset, digits, stdlib
from hpccomm.train.networks import Characters, Network, Perceptron, initial_weights

SMALLEST = 64
TUNING = 100
"""Seeds from here on tune."""
FACTORS = tuple(2.0**power for power in range(-5, 3))


class Method(NamedTuple):
    """One line of the picture."""

    make: Callable[[Bucket, Schedule], Transform]
    scale_tensors: Callable[[float, int, int], float]
    """The rule: (rate, batch, the batch it is for) -> rate."""
    rates: tuple[float, ...]
    """At the smallest batch."""


def sgd(bucket: Bucket, rate: Schedule) -> Transform:
    """Momentum, then a step."""
    return chain(momentum(0.9), scale_by_schedule(lambda count: -rate(count)))


def rates(middle: float) -> tuple[float, ...]:
    """Eleven."""
    return tuple(middle * 2.0**power for power in range(-5, 6))


METHODS = {
    "SGD": Method(sgd, linear_scaling, rates(0.04)),
    "LARS": Method(lambda bucket, rate: lars(bucket, rate, trust=0.02), linear_scaling, rates(0.32)),
    "LAMB": Method(lambda bucket, rate: lamb(bucket, rate, weight_decay=0.0), sqrt_scaling, rates(0.01)),
}


class Task(NamedTuple):
    """Data, a network and how long to train."""

    data: Dataset
    network: Network
    epochs: int
    batches: tuple[int, ...]


def tasks(names: list[str]) -> dict[str, Task]:
    """By name; the last batch is everything."""
    made: dict[str, Callable[[], Task]] = {"digits": of_digits, "stdlib": of_text}
    return {name: made[name]() for name in names}


def of_digits() -> Task:
    """1438 images, 4,810 weights."""
    data = digits()
    return Task(data, Perceptron(64, 64, data.classes), 30, (64, 128, 256, 512, 1024, len(data.targets)))


def of_text() -> Task:
    """40,000 characters of Python's library, 15,337 weights."""
    data = stdlib(40_000)
    return Task(data, Characters(data.classes, 8, 64), 6, (64, 256, 1024, 4096, 16_384, len(data.targets)))


class Run(NamedTuple):
    """One training."""

    data: str
    method: str
    batch: int
    rate: float
    seed: int
    accuracy: float
    """Share of the samples held out that are predicted right; 0 where the weights are no numbers any more."""


# Training


def trained(task: Task, data: Dataset, method: Method, batch: int, rate: float, seed: int) -> float:
    """The accuracy of a model that has seen all samples ``task.epochs`` times."""
    tensors = initial_weights(task.network.shapes, seed)
    bucket = Bucket(tensors)
    weights = bucket.flatten(tensors)
    gradient, count = np.empty_like(weights), len(data.targets)
    batches = -(-count // batch)
    steps = batches * task.epochs
    warm = max(1, steps // 10)
    transform = method.make(bucket, warm_up(warm, polynomial(rate, max(1, steps - warm), power=2)))
    state = transform.init(weights)
    with np.errstate(all="ignore"):
        for epoch in range(task.epochs):
            order = np.random.default_rng((seed, epoch)).permutation(count)
            for part in np.array_split(order, batches):
                task.network.learn(bucket.views(weights), data.inputs[part], data.targets[part], bucket.views(gradient))
                step, state = transform.update(gradient / np.float32(len(part)), state, weights)
                weights += step
        scores = task.network.scores(bucket.views(weights), data.test_inputs)
    right = (scores.argmax(axis=1) == data.test_targets) & np.isfinite(scores).all(axis=1)
    return float(right.mean())


def kept_for_tuning(data: Dataset) -> Dataset:
    """The last fifth of the training samples scores what the others train."""
    count = len(data.targets) // 5
    return Dataset(
        data.inputs[:-count], data.targets[:-count], data.inputs[-count:], data.targets[-count:], data.classes
    )


class OutOfTimeError(Exception):
    """What is missing is trained by the next run."""


class Record:
    """All trainings and where they are written."""

    def __init__(self, file: Path, found: dict[str, Task], tuning: list[int], minutes: float) -> None:
        self.file, self.tasks, self.tuning = file, found, tuning
        self.until = time.monotonic() + 60 * minutes
        job = {name: {"epochs": task.epochs, "batches": list(task.batches)} for name, task in found.items()}
        kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"job": job, "runs": []}
        self.job = kept["job"] | job
        if self.job != job | kept["job"]:
            raise SystemExit(f"{file} is of {kept['job']}, not {job}: name another file")
        self.runs = {run[:5]: run for run in (Run(*each) for each in kept["runs"])}

    def accuracy(self, data: str, method: str, batch: int, rate: float, seed: int) -> float:
        """Trained before, or now."""
        key = (data, method, batch, rate, seed)
        if key not in self.runs:
            if time.monotonic() > self.until:
                raise OutOfTimeError
            task = self.tasks[data]
            samples = kept_for_tuning(task.data) if seed >= TUNING else task.data
            self.runs[key] = Run(*key, trained(task, samples, METHODS[method], batch, rate, seed))
            part = self.file.with_name(self.file.name + ".part")
            part.write_text(json.dumps({"job": self.job, "runs": list(self.runs.values())}) + "\n")
            part.replace(self.file)
        return self.runs[key].accuracy

    def best(self, data: str, method: str, batch: int, candidates: tuple[float, ...]) -> float:
        """The rate that scores best on the samples kept for tuning; of equal ones the smallest."""
        return max(
            candidates,
            key=lambda rate: statistics.fmean(self.accuracy(data, method, batch, rate, seed) for seed in self.tuning),
        )


# The table


class Row(NamedTuple):
    """A method at a batch."""

    data: str
    batch: int
    steps: int
    method: str
    rate: float
    """By the rule."""
    rule: list[float]
    """Accuracies, a seed each, in percent."""
    factor: float
    """Tuned rate by the rule's."""
    tuned: list[float]


def row(record: Record, data: str, method: str, batch: int, seeds: list[int]) -> Row:
    """Tune, then train with every seed."""
    task, it = record.tasks[data], METHODS[method]
    rate = it.scaled(record.best(data, method, SMALLEST, it.rates), batch, SMALLEST)
    best = record.best(data, method, batch, tuple(rate * factor for factor in FACTORS))
    rule, tuned = ([100 * record.accuracy(data, method, batch, each, seed) for seed in seeds] for each in (rate, best))
    steps = -(-len(task.data.targets) // batch) * task.epochs
    return Row(data, batch, steps, method, rate, rule, best / rate, tuned)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):6.2f} ±{statistics.stdev(values) if len(values) > 1 else 0.0:5.2f}"


def line(it: Row) -> str:
    """For people."""
    return (
        f"  {it.data:<8}{it.batch:>7}{it.steps:>7}  {it.method:<6}{it.rate:>9.3g}{spread(it.rule):>16}"
        f"{f'x{it.factor:g}':>9}{spread(it.tuned):>16}"
    )


def draw(found: list[Row], file: Path) -> None:
    """Accuracy against batch; what is tuned for the batch solid, the rule dashed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(each.data for each in found))
    figure = Figure(figsize=(5.5 * len(names), 4.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for method, colour in zip(METHODS, ("#0072B2", "#D55E00", "#009E73"), strict=True):
            mine = [each for each in found if (each.data, each.method) == (name, method)]
            for label, style, values in (
                ("tuned for the batch", "o-", [each.tuned for each in mine]),
                ("by the rule", "x--", [each.rule for each in mine]),
            ):
                means = [statistics.fmean(each) for each in values]
                errors = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in values]
                axes.errorbar(
                    [each.batch for each in mine], means, errors, fmt=style, color=colour, label=f"{method}, {label}"
                )
        axes.set_xscale("log", base=2)
        axes.set_xlabel("batch")
        axes.set_ylabel("test accuracy, %")
        axes.set_title(name)
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(file)


def watched(things: list[Any]) -> Any:
    """With a progress bar if somebody watches and tqdm is there."""
    if not sys.stderr.isatty():
        return things
    try:
        from tqdm import tqdm
    except ImportError:
        return things
    return tqdm(things, unit="row", leave=False)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="what was trained, and goes on from")
    parser.add_argument("--data", default="digits,stdlib")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tuning", default="100,101,102", help="seeds to tune with")
    parser.add_argument("--minutes", type=float, default=60, help="start no training after so long")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    seeds, tuning = ([int(seed) for seed in each.split(",")] for each in (args.seeds, args.tuning))
    if max(seeds) >= TUNING or min(tuning) < TUNING:
        parser.error(f"seeds {args.seeds}, tuning {args.tuning}: those below {TUNING} train, the others tune")
    record = Record(args.json, tasks(args.data.split(",")), tuning, args.minutes)
    wanted = [
        (data, method, batch) for data, task in record.tasks.items() for batch in task.batches for method in METHODS
    ]
    try:
        found = [row(record, *each, seeds) for each in watched(wanted)]
    except OutOfTimeError:
        print(f"# out of time after {len(record.runs)} trainings: run the same command again for the rest")
        return
    print(f"# accuracy in %, seeds {args.seeds}, tuned with {args.tuning}; " + json.dumps(record.job))
    print(f"# {'data':<8}{'batch':>7}{'steps':>7}  {'method':<6}{'rate':>9}{'by the rule':>16}{'tuned':>9}{'':>16}")
    for each in found:
        print(line(each))
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
