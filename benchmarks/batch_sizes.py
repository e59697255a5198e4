"""Test accuracy against the batch, from 64 to all samples at once: SGD with linear scaling, LARS and LAMB.

Every batch has the same number of passes through the data, so the largest takes one step a pass.  All methods have
momentum 0.9 (LAMB: Adam's moments), no weight decay, a warm-up of a tenth of the steps and then a quadratic fall to
zero.  Each is tuned with four fifths of the training samples and scored on the last fifth, as the mean over other seeds
(--tuning 100,101,102):

  base    the rate at batch 64: eleven rates a factor of two apart
  rule    that rate scaled to the batch, linearly (SGD, LARS) or with its root (LAMB): not tuned again
  tuned   the best of the rule's rate times 1/32, 1/16, … 2 and 4, for each batch

Accuracies are those of other samples, after training with all training samples: mean and standard deviation over the
seeds.  A training that the file holds is not repeated.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from hpccomm.algorithms.large_batch import lamb, lars
from hpccomm.algorithms.lr_schedules import linear_scaling, polynomial, sqrt_scaling, warm_up
from hpccomm.algorithms.transforms import Schedule, Transform, chain, momentum, scale_by_schedule
from hpccomm.bench.plot import COLOURS
from hpccomm.buckets import Bucket
from hpccomm.train.datasets import Dataset, digits, stdlib
from hpccomm.train.networks import Characters, Network, Perceptron, initial_weights

SMALLEST = 64
TUNING = 100
"""The least seed for tuning."""
FACTORS = tuple(2.0**power for power in range(-5, 3))


class Method(NamedTuple):
    """One line of the figure."""

    make: Callable[[Bucket, Schedule], Transform]
    scale: Callable[[float, int, int], float]
    """The rule: (rate, batch, the batch it is for) -> rate."""
    rates: tuple[float, ...]
    """Candidates at the smallest batch."""


def sgd(bucket: Bucket, rate: Schedule) -> Transform:
    """Momentum, then a step."""
    return chain(momentum(0.9), scale_by_schedule(lambda count: -rate(count)))


def rates(middle: float) -> tuple[float, ...]:
    """Eleven rates around the middle one, a factor of two apart."""
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
    """Tasks by name; the last batch is all samples."""
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


Key = tuple[str, str, int, float, int]
"""Data, method, batch, rate and seed of one training; a row of the file has the accuracy behind them."""


# Training


def train(task: Task, data: Dataset, method: Method, batch: int, rate: float, seed: int) -> float:
    """The accuracy of a model that has seen all samples ``task.epochs`` times; 0 if its weights are not finite."""
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


def hold_out(data: Dataset) -> Dataset:
    """The training samples, the last fifth of which becomes the test set."""
    count = len(data.targets) // 5
    return Dataset(
        data.inputs[:-count], data.targets[:-count], data.inputs[-count:], data.targets[-count:], data.classes
    )


class Trainings:
    """All trainings, made or read from the record."""

    def __init__(self, record: harness.Record, found: dict[str, Task], tuning: list[int]) -> None:
        self.record, self.tasks, self.tuning = record, found, tuning
        for name, task in found.items():
            job = {"epochs": task.epochs, "batches": list(task.batches)}
            if record.data.setdefault("job", {}).setdefault(name, job) != job:
                raise SystemExit(f"{record.file} is of {record.data['job']}, not {job}: name another file")

    def accuracy(self, *key: Any) -> float:
        """The accuracy of one :data:`Key`."""

        def run() -> list[Any]:
            data, method, batch, rate, seed = key
            task = self.tasks[data]
            samples = hold_out(task.data) if seed >= TUNING else task.data
            return [*key, train(task, samples, METHODS[method], batch, rate, seed)]

        return float(self.record.recall(key, run)[5])

    def best_rate(self, data: str, method: str, batch: int, candidates: tuple[float, ...]) -> float:
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
    """Tuned rate divided by the rule's."""
    tuned: list[float]


def row(trainings: Trainings, data: str, method: str, batch: int, seeds: list[int]) -> Row:
    """Tune, then train with every seed."""
    task, it = trainings.tasks[data], METHODS[method]
    rate = it.scale(trainings.best_rate(data, method, SMALLEST, it.rates), batch, SMALLEST)
    best = trainings.best_rate(data, method, batch, tuple(rate * factor for factor in FACTORS))
    rule, tuned = ([100 * trainings.accuracy(data, method, batch, r, seed) for seed in seeds] for r in (rate, best))
    steps = -(-len(task.data.targets) // batch) * task.epochs
    return Row(data, batch, steps, method, rate, rule, best / rate, tuned)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.2f}"


HEAD = ("data", "method", "batch", "steps", "rate", "by the rule", "tuned by", "tuned")


def cells(it: Row) -> list[str]:
    """One line of the table."""
    numbers = [str(it.batch), str(it.steps), f"{it.rate:.3g}", spread(it.rule), f"×{it.factor:g}", spread(it.tuned)]
    return [it.data, it.method, *numbers]


def draw(found: list[Row], file: Path) -> None:
    """Accuracy against batch; rates tuned for the batch solid, rates by the rule dashed."""
    names = list(dict.fromkeys(each.data for each in found))
    figure, [grid] = harness.panels(5.5 * len(names), 4.6, 1, len(names))
    for axes, name in zip(grid, names, strict=True):
        for method, colour in zip(METHODS, COLOURS, strict=False):
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
    harness.save(figure, file)


def main() -> int:
    """Train what the file lacks; print the table once it is complete."""
    parser = harness.parser("batch-sizes", __doc__, file="batch-sizes.json")
    parser.add_argument("--data", default="digits,stdlib")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tuning", default="100,101,102", help="seeds to tune with")
    args = harness.parse(parser)
    seeds, tuning = harness.integers(args.seeds), harness.integers(args.tuning)
    if max(seeds) >= TUNING or min(tuning) < TUNING:
        parser.error(f"seeds {args.seeds}, tuning {args.tuning}: those below {TUNING} train, the others tune")
    record = harness.Record(args.file, lambda run: tuple(run[:5]), ["runs"], args.seconds)
    trainings = Trainings(record, tasks(args.data.split(",")), tuning)
    wanted = [
        (data, method, batch) for data, it in trainings.tasks.items() for batch in it.batches for method in METHODS
    ]
    try:
        found = [row(trainings, *each, seeds) for each in wanted]
    except harness.OutOfTimeError:
        harness.progress(f"out of time after {len(record.rows)} trainings: the same command trains the rest")
        return 0
    job = json.dumps(record.data["job"])
    harness.emit(f"Accuracy in %, seeds {args.seeds}, tuned with {args.tuning}; {job}\n")
    harness.emit(harness.table(HEAD, map(cells, found), words=2))
    draw(found, harness.plot_file(args, args.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
