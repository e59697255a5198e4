"""A training step whose gradients travel in buckets while the backward pass computes, on nodes of a virtual cluster.

*One rank on each node; L layers, a bucket each; the computation of a layer is a matrix product of NumPy, or a sleep in
the place of a device or of processors that the virtual nodes do not have.  Both release Python's lock.*  The
computation of a step takes as long as its exchange alone, where overlapping counts most.  In every round take turns:
the computation alone, the exchange alone, one after the other, and both at once.  A time is that of the slowest rank.
The last column is the claim: at most 1.15.  The least possible is 1 + 1/L, as the first bucket waits for its layer.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import harness
from hpccomm.cluster.nodes import Cluster

LAYERS, ROUNDS, SIZE = 16, 5, 128
"""Layers of the model, rounds of a launch, rows of the matrices."""


class Setting(NamedTuple):
    """Nodes, the rate of their links, the bytes of the model, and what computes."""

    nodes: int
    rate: str
    megabytes: int
    compute: str

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.nodes} x 1, {self.rate}, {self.megabytes} MB, {self.compute}"


SETTINGS = tuple(
    Setting(*shape, compute) for shape in ((2, "1gbit", 64), (4, "100mbit", 8)) for compute in ("products", "sleep")
)
WAYS = ("computation", "exchange", "in turn", "overlapped")


def measure(setting: Setting, rounds: int) -> dict[str, list[float]]:
    """On every rank: seconds of each way, a number a round."""
    import numpy as np
    from mpi4py import MPI

    import hpccomm

    world = hpccomm.Communicator(MPI.COMM_WORLD)
    elements = (setting.megabytes << 20) // 4 // LAYERS
    weights = {f"layer{k}": np.zeros(elements, np.float32) for k in range(LAYERS)}
    exchange = hpccomm.BucketedExchange(world, weights, hpccomm.mean, 4 * elements)
    for each in exchange.gradients.values():
        each[...] = world.rank + 1

    def step(compute: Callable[[], object] | None, begin: bool, early: bool) -> None:
        for k in range(LAYERS):
            if compute:
                compute()
            if begin and early:
                exchange.begin(k)
        for k in range(LAYERS if begin and not early else 0):
            exchange.begin(k)
        if begin:
            means = exchange.finish()
            assert all((each == (world.size + 1) / 2).all() for each in means.values())

    alone = partial(step, None, True, False)
    alone()
    seconds = median([harness.time_collective(world, alone) for _ in range(3)])
    compute = partial(COMPUTE[setting.compute], seconds / LAYERS)()
    runs = {
        "computation": partial(step, compute, False, False),
        "exchange": alone,
        "in turn": partial(step, compute, True, False),
        "overlapped": partial(step, compute, True, True),
    }
    turns = {way: partial(harness.time_collective, world, run) for way, run in runs.items()}
    return harness.take_turns(turns, rounds)


def products(seconds: float) -> Callable[[], object]:
    """As many matrix products as take so much processor time."""
    import numpy as np

    a, out = np.full((SIZE, SIZE), 0.5, np.float32), np.empty((SIZE, SIZE), np.float32)
    began, count = time.process_time(), 0
    while time.process_time() - began < 0.2:
        np.matmul(a, a, out=out)
        count += 1
    repeats = max(1, round(count * seconds / 0.2))

    def run() -> None:
        for _ in range(repeats):
            np.matmul(a, a, out=out)

    return run


COMPUTE: dict[str, Callable[[float], Callable[[], object]]] = {
    "products": products,
    "sleep": lambda seconds: partial(time.sleep, seconds),
}


def launch(setting: Setting, rounds: int) -> dict[str, Any]:
    """One launch on a cluster made for it."""
    shape = harness.Shape(setting.nodes, (1,) * setting.nodes, "block", setting.rate)
    words = ["-m", "benchmarks.buckets", "--rounds", str(rounds), "--setting", ",".join(map(str, setting))]
    with Cluster(setting.nodes, setting.rate, "buckets") as cluster:
        found = harness.launch(harness.on_cluster(cluster, shape), words, "--work")
    return {"title": setting.title, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over the rounds, and the ratios round by round."""
    lines = []
    for row in rows:
        longest = [max(pair) for pair in zip(row["computation"], row["exchange"], strict=True)]
        cells = [harness.spread(row[way], ".0f", 1e3) for way in WAYS]
        gain = harness.spread(harness.ratios(row["in turn"], row["overlapped"]), ".2f")
        lines.append([row["title"], *cells, gain, harness.spread(harness.ratios(row["overlapped"], longest), ".2f")])
    heads = [f"{way}, ms" for way in WAYS]
    return harness.table(["step", *heads, "in turn / overlapped", "overlapped / the longer"], lines, words=1)


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = harness.parser("buckets", __doc__, rounds=ROUNDS, file="buckets.json")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="settings whose title has these words: '2 x 1', 'sleep'")
    args = harness.parse(parser)
    if args.work:
        nodes, rate, megabytes, compute = args.setting.split(",")
        harness.write_on_rank0(args.work, measure(Setting(int(nodes), rate, int(megabytes), compute), args.rounds))
        return 0
    record = harness.Record(args.file, lambda row: row["title"], seconds=args.seconds)
    settings = {each.title: each for each in SETTINGS if args.only in each.title}
    record.recall_all(settings, lambda title: launch(settings[title], args.rounds))
    harness.emit(table(record.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
