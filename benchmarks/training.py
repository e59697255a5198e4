"""``scripts/bench_training``: how long each method trains to the same accuracy, on the nodes of a virtual cluster.

Every method trains the same network on the same text with as many passes, in turns over the seeds.  A time is the mean
over the ranks of computing, exchanging and stepping, from the beginning to the end of the first pass after which the
accuracy on the samples held out is reached; the goal is what the dense method has at its end, less one point.  In the
first pass every rank loads compiled code, for seconds where ranks share cores: it counts as long as the second.
Divided model states go with a network of their own, and are compared with ``ddp``, which divides nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cluster import OUT, Shape, check_exit, launch, shape_of
from benchmarks.node import row
from hpccomm.cluster.nodes import Cluster
from hpccomm.train.figure import seconds_of

METHODS = "dense,gtc,dgc,onebit-adam,powersgd,bmuf,hybrid,ddp,mics"
BASELINES = {"ddp": "ddp", "mics": "ddp"}
"""What else than ``dense`` a method is compared with."""
NETWORK_FLAGS = ["--width", "128", "--layers", "2"]
"""A network for these that the links carry: some 80,000 weights."""
POINT = 0.01
"""By how much less than the dense method's last accuracy is good enough."""

Run = dict[str, Any]


def train_on_cluster(cluster: Cluster, shape: Shape, method: str, seed: int, more: Sequence[str]) -> Run:
    """One training on the cluster: what ``hpccomm train --json`` keeps of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "run.json")
        train = ["hpccomm", "train", "stdlib", "--method", method, "--seed", str(seed), "--json", str(file)]
        train += [*more, *(NETWORK_FLAGS if method in BASELINES else [])]
        check_exit(launch(cluster, shape, train, {}))
        run: Run = json.loads(file.read_text(encoding="utf-8"))
    return {"shape": shape.title, **run, "command": run["command"].replace(f"{folder}/", "")}


def epoch_times(run: Run) -> list[float]:
    """Seconds of each pass, the first one as long as the second."""
    times = [seconds_of(each) for each in run["epochs"]]
    return [*times[1:2], *times[1:]] or times


def end_times(run: Run) -> list[float]:
    """From the beginning to the end of each pass."""
    return list(accumulate(epoch_times(run)))


def time_to_accuracy(run: Run, goal: float) -> float | None:
    """Seconds to the end of the first pass that comes to ``goal``."""
    times = end_times(run)
    return next((spent for each, spent in zip(run["epochs"], times, strict=True) if each["accuracy"] >= goal), None)


def table(runs: Sequence[Run], shape: str) -> str:
    """A line a method: medians over the seeds."""
    here = [run for run in runs if run["shape"] == shape]
    names = list(dict.fromkeys(run["method"] for run in here))
    titles = ("method", "accuracy at the end", "bytes a step", "exchange, ms a step of the last pass", "all of it, ms")
    lines = [f"### {shape}", "", row(*titles, "s to the goal", "dense's time by it"), "|---|" + "---:|" * 6]
    for name in names:
        mine = [run for run in here if run["method"] == name]
        dense = {run["seed"]: run for run in here if run["method"] == BASELINES.get(name, "dense")}
        last = [run["epochs"][-1] for run in mine]
        steps = [run["steps_an_epoch"] for run in mine]
        talking = [each["communication_s"] / n for each, n in zip(last, steps, strict=True)]
        whole = [epoch_times(run)[-1] / n for run, n in zip(mine, steps, strict=True)]
        goals = [dense[run["seed"]]["epochs"][-1]["accuracy"] - POINT for run in mine]
        times = [time_to_accuracy(run, goal) for run, goal in zip(mine, goals, strict=True)]
        beside = [time_to_accuracy(dense[run["seed"]], goal) for run, goal in zip(mine, goals, strict=True)]
        ratios = [theirs / own for theirs, own in zip(beside, times, strict=True) if theirs and own]
        found = [each for each in times if each is not None]
        cells = [f"{median(each['accuracy'] for each in last):.2%}", f"{median(e['wire_bytes'] for e in last):,.0f}"]
        cells += [f"{1e3 * median(talking):.2f}", f"{1e3 * median(whole):.2f}"]
        missed = f" ({len(found)} of {len(times)} seeds)" if len(found) < len(times) else ""
        cells += [f"{median(found):.2f}{missed}", f"{median(ratios):.2f}"] if found else ["not reached", ""]
        lines.append(row(name, *cells))
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], out: Path) -> None:
    """Accuracy against time, a picture a shape, the first seed."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    titles = list(dict.fromkeys(run["shape"] for run in runs))
    figure = Figure(figsize=(5.5 * len(titles), 4.6), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        here = [run for run in runs if run["shape"] == shape]
        for run in (each for each in here if each["seed"] == here[0]["seed"]):
            points = [100 * each["accuracy"] for each in run["epochs"]]
            axes.plot(end_times(run), points, ".-", label=run["method"])
        axes.set(title=shape, xlabel="seconds", ylabel="accuracy, %", xscale="log")
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.legend(fontsize=7, frameon=False)
    FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None})


def main() -> int:
    """Train what is missing, write, print."""
    parser = argparse.ArgumentParser(prog="scripts/bench_training", description=__doc__)
    parser.add_argument(
        "--shape", action="append", type=shape_of, metavar="NxK[,RATE]", help="default: 4x2,100mbit and 4x2,1gbit"
    )
    parser.add_argument("--methods", default=METHODS, help=f"what others are compared with first (default {METHODS})")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=OUT / "training.json", help="what it holds is not trained again")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken away
    runs: list[Run] = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(run["shape"], run["method"], run["seed"]) for run in runs}
    more = ["--epochs", str(args.epochs), "--samples", str(args.samples)]
    for shape in args.shape or [shape_of("4x2,100mbit"), shape_of("4x2,1gbit")]:
        with Cluster(shape.nodes, shape.rate) as cluster:
            for seed in map(int, args.seeds.split(",")):
                for method in args.methods.split(","):
                    if (shape.title, method, seed) not in done:
                        runs.append(train_on_cluster(cluster, shape, method, seed, more))
                        args.out.write_text(json.dumps(runs).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    for title in dict.fromkeys(run["shape"] for run in runs):
        sys.stdout.write("\n" + table(runs, title))
    draw(runs, args.out.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
