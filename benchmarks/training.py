"""How long each method trains to the same accuracy, on the nodes of a virtual cluster.

Every method trains the same network on the same text with as many passes, in turns over the seeds.  A time is the mean
over the ranks of computing, exchanging and stepping, from the beginning to the end of the first pass that reaches the
goal on the test samples; the goal is the dense method's last accuracy less one point.  In the first pass every rank
loads compiled code, which takes seconds where ranks share cores, so that pass counts as long as the second.  Methods
with sharded model states train a network of their own, and are compared with ``ddp``, which shards nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness
from hpccomm.arguments import flag_of
from hpccomm.cluster.nodes import Cluster
from hpccomm.train.figure import seconds_of

METHODS = "dense,gtc,dgc,onebit-adam,powersgd,bmuf,hybrid,ddp,mics"
BASELINES = {"ddp": "ddp", "mics": "ddp"}
"""Baselines other than ``dense``."""
NETWORK_FLAGS = ["--width", "128", "--layers", "2"]
"""A network for these methods whose layers the links can carry: some 80,000 weights."""
POINT = 0.01
"""The goal is the dense method's last accuracy less this."""

Run = dict[str, Any]


def train_on_cluster(cluster: Cluster, shape: harness.Shape, method: str, seed: int, more: Sequence[str]) -> Run:
    """One training on the cluster: the results of ``hpccomm train --json``."""
    train = ["hpccomm", "train", "stdlib", "--method", method, "--seed", str(seed)]
    train += [*more, *(NETWORK_FLAGS if method in BASELINES else [])]
    return {"shape": shape.title, **harness.launch(harness.on_cluster(cluster, shape), train)}


def epoch_times(run: Run) -> list[float]:
    """Seconds of each pass; the first pass counts as long as the second."""
    times = [seconds_of(each) for each in run["epochs"]]
    return [*times[1:2], *times[1:]] or times


def end_times(run: Run) -> list[float]:
    """Seconds from the beginning to the end of each pass."""
    return list(accumulate(epoch_times(run)))


def time_to_accuracy(run: Run, goal: float) -> float | None:
    """Seconds to the end of the first pass that reaches ``goal``; None if there is none."""
    times = end_times(run)
    return next((spent for each, spent in zip(run["epochs"], times, strict=True) if each["accuracy"] >= goal), None)


HEAD = ("method", "accuracy at the end", "bytes a step", "exchange, ms a step of the last pass", "all of it, ms")


def table(runs: Sequence[Run], shape: str) -> str:
    """A line a method: medians over the seeds."""
    here = [run for run in runs if run["shape"] == shape]
    rows = [table_row(here, name) for name in dict.fromkeys(run["method"] for run in here)]
    return f"### {shape}\n\n" + harness.table([*HEAD, "s to the goal", "dense's time by it"], rows, words=1)


def table_row(runs: Sequence[Run], name: str) -> list[str]:
    """One method."""
    mine = [run for run in runs if run["method"] == name]
    dense = {run["seed"]: run for run in runs if run["method"] == BASELINES.get(name, "dense")}
    last = [run["epochs"][-1] for run in mine]
    exchange = [run["epochs"][-1]["communication_s"] / run["steps_an_epoch"] for run in mine]
    whole = [epoch_times(run)[-1] / run["steps_an_epoch"] for run in mine]
    goals = [dense[run["seed"]]["epochs"][-1]["accuracy"] - POINT for run in mine]
    times = [time_to_accuracy(run, goal) for run, goal in zip(mine, goals, strict=True)]
    beside = [time_to_accuracy(dense[run["seed"]], goal) for run, goal in zip(mine, goals, strict=True)]
    ratios = [theirs / own for theirs, own in zip(beside, times, strict=True) if theirs and own]
    found = [each for each in times if each is not None]
    cells = [name, f"{median(each['accuracy'] for each in last):.2%}", f"{median(e['wire_bytes'] for e in last):,.0f}"]
    cells += [f"{1e3 * median(exchange):.2f}", f"{1e3 * median(whole):.2f}"]
    missed = f" ({len(found)} of {len(times)} seeds)" if len(found) < len(times) else ""
    return [*cells, *([f"{median(found):.2f}{missed}", f"{median(ratios):.2f}"] if found else ["not reached", ""])]


def draw(runs: Sequence[Run], out: Path) -> None:
    """Accuracy against time, a panel a shape, the first seed."""
    titles = list(dict.fromkeys(run["shape"] for run in runs))
    figure, [grid] = harness.panels(5.5 * len(titles), 4.6, 1, len(titles))
    for axes, shape in zip(grid, titles, strict=True):
        here = [run for run in runs if run["shape"] == shape]
        for run in (each for each in here if each["seed"] == here[0]["seed"]):
            points = [100 * each["accuracy"] for each in run["epochs"]]
            axes.plot(end_times(run), points, ".-", label=run["method"])
        axes.set(title=shape, xlabel="seconds", ylabel="accuracy, %", xscale="log")
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.legend(fontsize=7, frameon=False)
    harness.save(figure, out)


def main() -> int:
    """Train what the file lacks, write, print."""
    parser = harness.parser("training", __doc__, file="training.json")
    harness.add_shapes(parser, ["4x2,100mbit", "4x2,1gbit"])
    parser.add_argument("--methods", default=METHODS, help=f"default {METHODS}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=256, help="samples of a step over all ranks, default 256")
    parser.add_argument("--framework", default="numpy", help="torch: a GPT of six layers, default numpy")
    args = harness.parse(parser)
    record = harness.Record(args.file, lambda run: (run["shape"], run["method"], run["seed"]), seconds=args.seconds)
    for name, first in (("framework", "numpy"), ("batch_size", 256)):
        if record.rows:  # a file from before there were others
            record.data.setdefault(name, first)
        record.require(name, getattr(args, name))
    flags = {name: getattr(args, name) for name in ("epochs", "samples", "batch_size", "framework")}
    more = [word for name, value in flags.items() for word in (flag_of(name), str(value))]
    for shape in args.shape:
        keys = [(shape.title, name, seed) for seed in harness.integers(args.seeds) for name in args.methods.split(",")]
        if record.lacks(keys):
            with Cluster(shape.nodes, shape.rate) as cluster:
                record.recall_all(keys, lambda key: train_on_cluster(cluster, shape, *key[1:], more))  # noqa: B023
    for title in dict.fromkeys(run["shape"] for run in record.rows):
        harness.emit("\n" + table(record.rows, title))
    draw(record.rows, harness.plot_file(args, args.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
