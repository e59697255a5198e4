#!/usr/bin/env python3
"""GTC, BMUF and both in two tiers at 1 … 128 workers: accuracy trained, time measured or priced, published beside.

Usage: python scripts/reproduce_two_tier --json FILE [--workers 1,8,32,64,128] [--seeds 0,1,2] [--plot FILE]

What is what:
  tuned       each method at each number of workers on the same budget: so many trainings of one pass over four fifths
              of the samples, scored on the last fifth; a step up or down a ladder of factors of two for the rate, the
              threshold, the block's length and the block momentum, kept where it helps
  error       trained: every worker is a rank (a thread), with its own share of Python's library as text; the next
              character from 16, errors on other files, relative to one worker of plain SGD with the same seed after as
              many passes through the data; mean and standard deviation over the seeds
  priced      one worker: measured.  More: a step's arithmetic, encoding and decoding measured here on one thread, and
              the messages priced by the cost model (8 ranks a node, 25 us and 10 Gbit/s between nodes); nobody waits
              for stragglers
  fitted      GTC and BMUF: curves through their published speed-ups.  Hybrid: predicted from those two curves alone;
              the first number lets the time of a block's exchange follow all workers, the second the groups
  published   Ladkat et al., Interspeech 2019: an LSTM acoustic model on 2000 h of speech.  Another task, another
              cluster: the order of the methods can be compared, the figures cannot.

What the file holds is not trained again: with --minutes a run of any length is done in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from hpccomm.algorithms.blockwise_filtering import block_filter, bmuf
from hpccomm.algorithms.compressors import threshold
from hpccomm.algorithms.two_tier import hybrid
from hpccomm.algorithms.transforms import Transform, chain, scale
from hpccomm.buckets import Bucket
from hpccomm.performance.cost import predict
from hpccomm.testing.ranks import run_on_ranks
from hpccomm.train.datasets import Dataset, stdlib
from hpccomm.train.networks import Characters, initial_weights

METHODS = ("bmuf", "gtc", "hybrid")
SPEED = {
    "gtc": {32: 26.0, 64: 17.0, 128: 11.0},
    "bmuf": {32: 36.6, 64: 57.0, 128: 80.0},
    "hybrid": {32: 31.0, 64: 42.0, 128: 97.0},
}
"""Published speed-ups by workers."""
ERROR = {
    "gtc": {32: "+1.4 %", 64: "+2.8 %", 128: "+15.6 %"},
    "bmuf": {32: "+3.5 %", 64: "+8.9 %", 128: "+9.6 %"},
    "hybrid": {32: "reduced", 64: "+3.1 %", 128: "+4.7 %"},
}
"""Published changes of the error rate."""
JOB = ("samples", "epochs", "batch", "tries")
"""Arguments that decide what is trained."""
GROUP = 8
"""Workers of a group of the hybrid, and of a node."""
TUNING_SEED = 100
TAU = 0.1


class Settings(NamedTuple):
    """What is tuned."""

    rate: float
    """Of steps on the mean gradient of the ranks that exchange every step."""
    tau: float = TAU
    """Threshold, in the units of one rank's mean gradient."""
    period: int = 5
    """Steps of a block."""
    clear_buffers: float = 1.0
    """1 − block momentum."""


LADDERS: dict[str, Callable[[Settings, float], Settings]] = {
    "rate": lambda it, by: it._replace(rate=it.rate * by),
    "rest": lambda it, by: it._replace(rest=min(it.rest * by, 1.0)),
    "period": lambda it, by: it._replace(period=max(round(it.period * by), 5)),
    "tau": lambda it, by: it._replace(tau=it.tau * by),
}
KNOBS = {"bmuf": ("rate", "rest", "period"), "gtc": ("rate", "tau"), "hybrid": ("rate", "rest", "period", "tau")}


class Sent(NamedTuple):
    """The exchange's state: what is not sent yet, and how many bytes were."""

    residual: Any
    nbytes: int


def compressed_sum(tau: float) -> Callable[[Any], Transform]:
    """Every rank sends what its backlog has at or beyond the threshold; all add all messages, in rank order."""
    compressor = threshold(tau)

    def exchange(group: Any) -> Transform:
        def update(gradient: Any, state: Sent, weights: Any) -> tuple[Any, Sent]:
            residual = np.empty_like(gradient)
            message = compressor.encode_feedback(state.residual, gradient, out=residual)
            letters, total = group.allgather(message), np.zeros_like(gradient)
            if group.rank == 0:  # what each would make of the letters, bit for bit, made once
                compressor.decode_all(letters, total)
            group.Bcast(total)
            return total, Sent(residual, state.nbytes + message.size)

        return Transform(lambda weights: Sent(np.zeros_like(weights), 0), update)

    return exchange


def method(name: str, comm: Any, settings: Settings) -> Any:
    """One of the three."""
    exchange = compressed_sum(settings.tau)
    if name == "gtc":
        return chain(exchange(comm), scale(-settings.rate / comm.size))
    block = {"period": settings.period, "momentum": 1 - settings.rest, "nesterov": "paper"}
    if name == "bmuf":
        return bmuf(comm, scale(-settings.rate), **block)
    size = min(GROUP, comm.size)
    return hybrid(comm, exchange, scale(-settings.rate / size), size, **block)


class Run(NamedTuple):
    """One training."""

    method: str
    workers: int
    seed: int
    settings: Settings
    error: float
    """Share of the samples held out that are predicted wrong."""
    message_bytes: float
    """Sent by a worker in a step inside its group."""


def trained(
    name: str, workers: int, seed: int, settings: Settings, data: Dataset, batch: int, epochs: int
) -> tuple[float, float]:
    """Train with a thread for each worker; error and bytes of a message."""
    network = network_of(data)

    def body(comm: Any) -> tuple[Any, float]:
        tensors = initial_weights(network.shapes, seed)
        bucket = Bucket(tensors)
        weights = bucket.flatten(tensors)
        gradient = np.empty_like(weights)
        transform = method(name, comm, settings)
        state, steps = transform.init(weights), 0
        for epoch in range(epochs):
            order = np.random.default_rng((seed, epoch)).permutation(len(data.targets))
            mine = np.array_split(order, comm.size)[comm.rank]
            for first in range(0, len(order) // comm.size - batch + 1, batch):
                part = mine[first : first + batch]
                network.learn(bucket.views(weights), data.inputs[part], data.targets[part], bucket.views(gradient))
                step, state = transform.update(gradient / np.float32(len(part)), state, weights)
                weights += step
                steps += 1
        if hasattr(transform, "finish"):
            step, state = transform.finish(state, weights)
            weights = transform.export(state)
        exchanged = {"gtc": lambda: state[0], "hybrid": lambda: state.inner[0]}.get(name, lambda: Sent(None, 0))()
        return weights, exchanged.nbytes / max(1, steps)

    found = run_on_ranks(workers, body, patience=240)
    scores = network.scores(Bucket(initial_weights(network.shapes, 0)).views(found[0][0]), data.test_inputs)
    wrong = float((scores.argmax(axis=1) != data.test_targets).mean())
    return wrong, statistics.fmean(nbytes for _, nbytes in found)


def network_of(data: Dataset) -> Characters:
    """15,337 weights."""
    return Characters(data.classes, width=8, hidden=64)


# Tuning


def tuned(first: Settings, knobs: tuple[str, ...], tries: int, error: Callable[[Settings], float]) -> Settings:
    """The best of ``tries`` settings: from ``first`` along the ladders, on in a direction while it helps."""
    best, least, seen = first, error(first), {first}
    moves = [(knob, by) for knob in knobs for by in (2.0, 0.5)]
    while len(seen) < tries:
        fresh = [(knob, by) for knob, by in moves if LADDERS[knob](best, by) not in seen]
        if not fresh:
            break
        move = fresh[0]
        candidate = LADDERS[move[0]](best, move[1])
        seen.add(candidate)
        found = error(candidate)
        if found < least:
            best, least = candidate, found
        else:
            moves = [each for each in moves if each != move] + [move]
    return best


def first_settings(name: str, workers: int, alone: Settings) -> Settings:
    """Where tuning begins: one worker's best, the rate times the ranks that step together, momentum by the rule."""
    if name == "bmuf":
        return alone._replace(rest=1 / workers)
    together = workers if name == "gtc" else min(workers, GROUP)
    return Settings(alone.rate * together, rest=together / workers if name == "hybrid" else 1.0)


def kept_for_tuning(data: Dataset) -> Dataset:
    """The last fifth of the samples scores what the others train."""
    count = len(data.targets) // 5
    return Dataset(
        data.inputs[:-count], data.targets[:-count], data.inputs[-count:], data.targets[-count:], data.classes
    )


# The file


class OutOfTimeError(Exception):
    """What is missing is trained by the next run."""


class Record:
    """All trainings and where they are written."""

    def __init__(self, file: Path, args: argparse.Namespace, data: Dataset) -> None:
        self.file, self.args, self.data = file, args, data
        self.until = time.monotonic() + 60 * args.minutes
        job = {key: getattr(args, key) for key in JOB}
        kept = json.loads(file.read_text()) if file.exists() else {"job": job, "tuning": [], "runs": []}
        if kept["job"] != job:
            raise SystemExit(f"{file} is of {kept['job']}, not {job}: name another file")
        self.job = job
        self.costs = Costs(**kept["costs"]) if "costs" in kept else measured(data, args.batch)
        self.tuning, self.runs = ([run_from(each) for each in kept[key]] for key in ("tuning", "runs"))
        self.write()

    def write(self) -> None:
        """All of it."""
        written: dict[str, Any] = {"job": self.job, "costs": self.costs._asdict()}
        lists = {"tuning": self.tuning, "runs": self.runs}
        written |= {key: [as_dict(run) for run in lists[key]] for key in lists}
        part = self.file.with_name(self.file.name + ".part")
        part.write_text(json.dumps(written) + "\n")
        part.replace(self.file)

    def run(self, name: str, workers: int, seed: int, settings: Settings) -> Run:
        """Trained before, or now."""
        tuning = seed == TUNING_SEED
        runs = self.tuning if tuning else self.runs
        for each in runs:
            if each[:4] == (name, workers, seed, settings):
                return each
        if time.monotonic() > self.until:
            raise OutOfTimeError
        data, epochs = (kept_for_tuning(self.data), 1) if tuning else (self.data, self.args.epochs)
        found = Run(
            name, workers, seed, settings, *trained(name, workers, seed, settings, data, self.args.batch, epochs)
        )
        runs.append(found)
        self.write()
        print(f"# {'tuning' if tuning else 'trained'}: {found}", flush=True)
        return found

    def tuned(self, name: str, workers: int) -> Settings:
        """The best settings found, for one worker of plain SGD or a method at a number of workers."""
        if name == "hybrid" and workers <= GROUP:
            return self.tuned("gtc", workers)  # one group: nothing else happens
        start = Settings(0.05)
        knobs = ("rate",)
        if (name, workers) != ("bmuf", 1):
            start, knobs = first_settings(name, workers, self.tuned("bmuf", 1)), KNOBS[name]
        return tuned(
            start, knobs, self.args.tries, lambda settings: self.run(name, workers, TUNING_SEED, settings).error
        )


def run_from(kept: dict[str, Any]) -> Run:
    """As it was written."""
    return Run(**kept | {"settings": Settings(**kept["settings"])})


def as_dict(run: Run) -> dict[str, Any]:
    """For the file."""
    return run._asdict() | {"settings": run.settings._asdict()}


# Time


def median_time(run: Callable[[], Any], times: int = 30) -> float:
    """Seconds."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


class Costs(NamedTuple):
    """Measured on this machine, seconds."""

    step: float
    """Gradient and update of one batch."""
    encode: float
    decode: float
    """One message."""
    block: float
    """The block filter."""


def measured(data: Dataset, batch: int) -> Costs:
    """What a step consists of beside messages."""
    network = network_of(data)
    tensors = initial_weights(network.shapes, 0)
    bucket = Bucket(tensors)
    weights = bucket.flatten(tensors)
    gradient, part = np.empty_like(weights), slice(0, batch)

    def step() -> None:
        network.learn(bucket.views(weights), data.inputs[part], data.targets[part], bucket.views(gradient))
        weights.__iadd__(gradient * np.float32(-1e-9))

    once = median_time(step)
    compressor, backlog = threshold(TAU), np.zeros_like(weights)
    mean_gradient = gradient / np.float32(batch)
    encode = median_time(lambda: compressor.encode_feedback(backlog, mean_gradient))
    message, total = compressor.encode(mean_gradient), np.zeros_like(weights)
    decode = median_time(lambda: compressor.decode_all([message] * 8, total)) / 8
    kept = block_filter(0.5)
    state = kept.init(weights)
    return Costs(once, encode, decode, median_time(lambda: kept.update(gradient, state, weights)))


def quickest(collective: str, nodes: int, per_node: int, nbytes: float) -> float:
    """Seconds, by the cost model."""
    return predict(collective, nodes, per_node, nbytes)[0].us / 1e6 if nodes * per_node > 1 else 0.0


def priced(name: str, workers: int, cost: Costs, message: float, model: int, period: int) -> float:
    """Seconds of one step."""
    nodes, per_node = -(-workers // GROUP), min(workers, GROUP)
    if workers == 1:
        return cost.step + (cost.encode + cost.decode if name != "bmuf" else 0)
    if name == "bmuf":
        return cost.step + (quickest("allreduce", nodes, per_node, model) + cost.block) / period
    group = workers if name == "gtc" else per_node
    inside = quickest("allgather", nodes if name == "gtc" else 1, per_node, group * message)
    step = cost.step + cost.encode + group * cost.decode + inside
    if name == "gtc" or nodes == 1:
        return step
    between = quickest("allreduce", nodes, 1, model) + quickest("allgather", 1, per_node, model) + cost.block
    return step + between / period


# Step times that follow the published ones: T(GTC) = 1 + c g², T(BMUF) = a + b N, in units of one worker's step


def fitted(name: str, workers: int) -> list[float]:
    """Speed-ups by curves through those published of GTC and BMUF; of the hybrid the least and the most."""
    squares = np.array([each**2.0 for each in SPEED["gtc"]])
    overhead = np.array([each / speed - 1 for each, speed in SPEED["gtc"].items()])
    c = float(squares @ overhead / (squares @ squares))
    b, a = np.polyfit(list(SPEED["bmuf"]), [each / speed for each, speed in SPEED["bmuf"].items()], 1)
    group = min(GROUP, workers)
    steps = {
        "gtc": [1 + c * workers**2],
        "bmuf": [a + b * workers],
        "hybrid": [1 + c * group**2 + b * workers, 1 + c * group**2 + b * workers / group],
    }
    return [float(workers / each) for each in steps[name]]


# The table


class Row(NamedTuple):
    """One line of the table."""

    method: str
    workers: int
    settings: Settings
    error: float
    relative: float
    """To one worker with the same seed, in percent."""
    spread: float
    """Standard deviation over the seeds."""
    message_bytes: float
    step_us: float
    speed_up: float
    """With that step."""
    fitted: list[float]
    published: float | None
    published_error: str


def rows(runs: list[Run], cost: Costs, model: int) -> list[Row]:
    """Runs of the same method and number of workers are one line."""
    alone = {run.seed: run.error for run in runs if (run.workers, run.method) == (1, "bmuf")}
    found = []
    for workers, name in sorted({(run.workers, run.method) for run in runs}):
        mine = [run for run in runs if (run.workers, run.method) == (workers, name)]
        relative = [100 * (run.error / alone[run.seed] - 1) for run in mine]
        message, settings = statistics.fmean(run.message_bytes for run in mine), mine[0].settings
        seconds = priced(name, workers, cost, message, model, settings.period)
        found.append(
            Row(
                name,
                workers,
                settings,
                statistics.fmean(run.error for run in mine),
                statistics.fmean(relative),
                statistics.stdev(relative) if len(relative) > 1 else 0.0,
                message,
                1e6 * seconds,
                workers * cost.step / seconds,
                fitted(name, workers) if workers > GROUP else [],
                SPEED[name].get(workers),
                ERROR[name].get(workers, "-"),
            )
        )
    return found


HEADER = (
    f"# {'method':<8}{'workers':>8}{'rate':>7}{'tau':>6}{'period':>7}{'momentum':>9}{'error':>8}{'relative':>16}"
    f"{'published':>10}{'bytes':>7}{'us/step':>8}{'time is':>9}{'speed-up':>9}{'fitted':>9}{'published':>10}"
)


def line(row: Row) -> str:
    """For people."""
    curve = "-".join(f"{each:.0f}" for each in row.fitted) + "x" if row.fitted else "-"
    theirs = f"{row.published:g}x" if row.published else "-"
    blocks = row.method != "gtc" and row.workers > (1 if row.method == "bmuf" else GROUP)
    it = row.settings
    return (
        f"  {row.method:<8}{row.workers:>8}{it.rate:>7.3g}{f'{it.tau:g}' if row.method != 'bmuf' else '-':>6}"
        f"{it.period if blocks else '-':>7}{f'{1 - it.rest:.3f}' if blocks else '-':>9}"
        f"{row.error:>8.4f}{row.relative:>+8.1f} ±{row.spread:>4.1f} %{row.published_error:>10}"
        f"{row.message_bytes:>7.0f}{row.step_us:>8.0f}{'measured' if row.workers == 1 else 'priced':>9}"
        f"{row.speed_up:>8.1f}x{curve:>9}{theirs:>10}"
    )


def draw(found: list[Row], file: Path) -> None:
    """Speed-up and error against workers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    speed, error = figure.subplots(1, 2)
    for name, colour in zip(METHODS, ("#0072B2", "#D55E00", "#009E73"), strict=True):
        mine = [row for row in found if row.method == name]
        workers = [row.workers for row in mine]
        speed.plot(workers, [row.speed_up for row in mine], "o-", color=colour, label=f"{name}, priced")
        large = [row for row in mine if row.fitted]
        label = f"{name}, {'predicted from the fits' if name == 'hybrid' else 'fitted to published'}"
        for number in range(len(large[0].fitted) if large else 0):
            values = [row.fitted[number] for row in large]
            speed.plot([row.workers for row in large], values, "--", color=colour, label=None if number else label)
        speed.plot(list(SPEED[name]), list(SPEED[name].values()), "x", color=colour, label=f"{name}, published")
        error.errorbar(
            workers, [row.relative for row in mine], [row.spread for row in mine], fmt="o-", color=colour, label=name
        )
        theirs = {each: float(said.split()[0]) for each, said in ERROR[name].items() if said != "reduced"}
        error.plot(list(theirs), list(theirs.values()), "x", color=colour, label=f"{name}, published")
    speed.set_yscale("log", base=2)
    speed.set_ylabel("speed-up")
    error.set_ylabel("error beside one worker's, %")
    for axes in (speed, error):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("workers")
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(file)


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="what was trained, and goes on from")
    parser.add_argument("--workers", default="1,8,32,64,128")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=80_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="samples of a worker's step")
    parser.add_argument("--tries", type=int, default=10, help="trainings to tune a method at a number of workers")
    parser.add_argument("--minutes", type=float, default=60, help="start no training after so long")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    record = Record(args.json, args, stdlib(args.samples))
    everything = [(int(workers), name) for workers in args.workers.split(",") for name in METHODS]
    wanted: list[Run] = []
    try:
        best = {each: record.tuned(each[1], each[0]) for each in everything}
        for seed in map(int, args.seeds.split(",")):
            wanted += [record.run(name, workers, seed, best[workers, name]) for workers, name in everything]
    except OutOfTimeError:
        print("# out of time: run the same command again for the rest")
        return
    model = 4 * Bucket(network_of(record.data).shapes).size
    found = rows(wanted, record.costs, model)
    print("# " + ", ".join(f"{key} {value}" for key, value in record.job.items()) + f", seeds {args.seeds}")
    costs = ", ".join(f"{key} {1e6 * value:.0f}" for key, value in record.costs._asdict().items())
    print(f"# model {model} bytes; measured, us: {costs}", HEADER, *map(line, found), sep="\n")
    if args.plot:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
