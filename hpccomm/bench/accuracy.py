"""``scripts/bench_accuracy``: how well models train with compressed gradients, beside dense ones; ranks are threads.

*One run for each dataset, number of ranks, method and seed.*  All methods of a seed begin with the same weights and see
the same batches, so differences are taken seed by seed.  What was run stands in a file and is not run again:
``--seconds`` ends one part of the whole, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

OUT = Path("docs/measurements/accuracy.json")
RANKS, DENSITY = (4, 8), 0.001
SEEDS = {"digits": range(10), "stdlib": range(5)}
"""Where one image more or less is a quarter of a point, five seeds do not tell methods apart."""
YARDSTICKS = {
    "dgc": "dense",
    "onebit-adam": "adam",
    "gtc": "dense",
    "onebit-sgd": "dense",
    "ef-signsgd": "dense",
    "powersgd": "dense",
    "onebit-lamb": "lamb",
}
"""Methods, and the dense one that each is compared with."""

Run = dict[str, Any]


class Job(NamedTuple):
    """What is trained."""

    epochs: int
    batch_size: int
    samples: int | None


JOBS = {"digits": Job(40, 64, None), "stdlib": Job(3, 256, 200_000)}


RATES: dict[tuple[str, str], float] = {
    ("stdlib", "dense"): 0.3,
    ("stdlib", "dgc"): 0.3,
    ("stdlib", "adam"): 0.005,
    ("stdlib", "onebit-adam"): 0.005,
}
"""Dataset and method: where tuning found another rate than the method's own."""
TUNING_SEEDS = (100,)
"""Runs that rates were chosen by, apart from those that are reported."""


def wanted() -> Iterator[tuple[str, int, str, int]]:
    """Dataset, ranks, method, seed: DGC and 1-bit Adam with their yardsticks everywhere before the others."""
    names = list(dict.fromkeys(name for pair in YARDSTICKS.items() for name in reversed(pair)))
    for methods in (names[:4], names[4:]):
        for dataset in JOBS:
            for ranks in RANKS:
                yield from ((dataset, ranks, method, seed) for seed in SEEDS[dataset] for method in methods)


def trained(dataset: str, ranks: int, method: str, seed: int, lr: float | None = None) -> Run:
    """One run: accuracy on what was not trained on, loss, bytes.  ``lr`` stands for the method's own."""
    from hpccomm.algorithms.schedules import polynomial
    from hpccomm.algorithms.transforms import chain, scale_by_schedule
    from hpccomm.buckets import Bucket
    from hpccomm.testing.ranks import run_on_ranks
    from hpccomm.train.datasets import DATASETS
    from hpccomm.train.loop import Settings, steps_in, train
    from hpccomm.train.methods import METHODS, Plan
    from hpccomm.train.networks import network_for

    job, way = JOBS[dataset], METHODS[method]
    data = DATASETS[dataset](job.samples)
    network, settings = network_for(data), Settings(job.epochs, job.batch_size, seed, way.alone)
    rate, began = RATES.get((dataset, method), way.lr) if lr is None else lr, time.monotonic()

    def body(comm: Any) -> Any:
        steps = steps_in(len(data.targets), settings)
        plan = Plan(comm, Bucket(network.shapes), rate, steps, density=DENSITY)
        falling = chain(way.make(plan), scale_by_schedule(polynomial(1.0, steps)))
        return train(comm, data, network, falling, settings)[1]

    epochs = run_on_ranks(ranks, body, patience=600)[0]
    return {
        "dataset": dataset,
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


def tuning(rates: str, methods: Sequence[str]) -> list[tuple[Any, ...]]:
    """Dataset, ranks, method, seed, rate."""
    numbers = [float(each) for each in rates.split(",")]
    return [
        (dataset, RANKS[0], method, seed, rate)
        for dataset in JOBS
        for method in methods
        for rate in numbers
        for seed in TUNING_SEEDS
    ]


def key(run: Run) -> tuple[Any, ...]:
    """What tells runs apart; the rate, of those that are to find it."""
    rate = run["lr"] if run["seed"] in TUNING_SEEDS else None
    return run["dataset"], run["ranks"], run["method"], run["seed"], rate


def uncertainty(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(runs: Sequence[Run], dataset: str, ranks: int) -> Iterator[str]:
    """Lines of Markdown: means with their standard errors, in percent; bytes of a step.

    Whether a method is within one standard error of its yardstick is said of the differences seed by seed, and of the
    difference of the two means as if the seeds had nothing to do with each other.
    """
    here = {key(run)[2:4]: run for run in runs if key(run)[:2] == (dataset, ranks)}
    yield f"### {dataset}, {ranks} ranks"
    yield ""
    yield "| method | seeds | accuracy, % | less than dense, points | within one standard error | loss | bytes a step |"
    yield "|---|---:|---:|---:|---|---:|---:|"
    for name in dict.fromkeys(name for pair in YARDSTICKS.items() for name in reversed(pair)):
        seeds = [seed for seed in SEEDS[dataset] if (name, seed) in here]
        if not seeds:
            continue
        rows = [here[name, seed] for seed in seeds]
        scores = [100 * row["accuracy"] for row in rows]
        cells = [name, str(len(seeds)), f"{mean(scores):.2f} ± {uncertainty(scores):.2f}"]
        base = YARDSTICKS.get(name, "")
        paired = [
            100 * here[base, seed]["accuracy"] - scores[k] for k, seed in enumerate(seeds) if (base, seed) in here
        ]
        if paired:
            apart = math.hypot(
                uncertainty(scores),
                uncertainty([100 * here[base, seed]["accuracy"] for seed in seeds if (base, seed) in here]),
            )
            fine = ["yes" if mean(paired) <= error else "**no**" for error in (uncertainty(paired), apart)]
            cells += [
                f"{mean(paired):.2f} ± {uncertainty(paired):.2f} ({base})",
                f"{fine[0]}, {fine[1]} (± {apart:.2f})",
            ]
        else:
            cells += ["", ""]
        cells += [f"{mean(row['loss'] for row in rows):.4f}", f"{mean(row['bytes_a_step'] for row in rows):,.0f}"]
        yield "| " + " | ".join(cells) + " |"
    yield ""


def tuning_table(runs: Sequence[Run], dataset: str) -> Iterator[str]:
    """Lines of Markdown: mean accuracy and loss by method and rate, on the seeds for tuning."""
    here = [run for run in runs if run["dataset"] == dataset and run["seed"] in TUNING_SEEDS]
    if not here:
        return
    yield f"### Rates, {dataset}, {RANKS[0]} ranks, seeds {' and '.join(map(str, TUNING_SEEDS))}"
    yield ""
    yield "| method | rate | accuracy, % | loss |"
    yield "|---|---:|---:|---:|"
    for method, rate in sorted({(run["method"], run["lr"]) for run in here}):
        rows = [run for run in here if (run["method"], run["lr"]) == (method, rate)]
        score = 100 * mean(row["accuracy"] for row in rows)
        yield f"| {method} | {rate:g} | {score:.2f} | {mean(row['loss'] for row in rows):.4f} |"
    yield ""


def draw(runs: Sequence[Run], out: Path) -> None:
    """Accuracy with its standard error against bytes a step, a panel for each dataset and number of ranks."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from hpccomm.bench.plot import COLOURS

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasSVG(figure)
    names = list(dict.fromkeys(name for pair in YARDSTICKS.items() for name in reversed(pair)))
    for row, dataset in zip(figure.subplots(len(JOBS), len(RANKS), squeeze=False), JOBS, strict=True):
        for axes, ranks in zip(row, RANKS, strict=True):
            for number, name in enumerate(names):
                here = [run for run in runs if key(run)[:3] == (dataset, ranks, name) and run["seed"] in SEEDS[dataset]]
                if not here:
                    continue
                scores = [100 * run["accuracy"] for run in here]
                shape = "s" if name in YARDSTICKS.values() else "o"
                colour = COLOURS[number % len(COLOURS)]
                place, error = mean(run["bytes_a_step"] for run in here), uncertainty(scores)
                axes.errorbar(place, mean(scores), error, fmt=shape, color=colour, capsize=3)
                axes.annotate(name, (place, mean(scores)), (5, 4), textcoords="offset points", fontsize=8)
            axes.set_xscale("log")
            axes.set_xlabel("bytes a rank sends in a step")
            axes.set_ylabel("accuracy, %")
            axes.set_title(f"{dataset}, {ranks} ranks", fontsize=10, loc="left")
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    """Run what is missing, for a time; print what there is."""
    parser = argparse.ArgumentParser(prog="scripts/bench_accuracy", description=__doc__)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run after so many")
    parser.add_argument("--json", type=Path, default=OUT)
    parser.add_argument("--dataset", choices=JOBS, help="only this one")
    parser.add_argument("--method", action="append", help="only these")
    parser.add_argument("--tune", metavar="RATES", help="instead: these rates, 0.1,0.2, on seeds that are not reported")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs: list[Run] = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else []
    done, began = {key(run) for run in runs}, time.monotonic()
    for each in tuning(args.tune, args.method) if args.tune else [(*job, None) for job in wanted()]:
        asked = args.dataset in (None, each[0]) and (not args.method or each[2] in args.method)
        if each in done or not asked or time.monotonic() - began > args.seconds:
            continue
        runs.append(trained(*each))
        args.json.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n", encoding="utf-8")
    for dataset in JOBS:
        for ranks in RANKS:
            sys.stdout.write("\n".join(table(runs, dataset, ranks)) + "\n")
        sys.stdout.write("\n".join(tuning_table(runs, dataset)) + "\n")
    if runs:
        draw(runs, args.json.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
