"""GTC, BMUF and both in two tiers at 1 … 128 workers: errors are trained, times measured or priced.

The columns, beside the published figures:

  tuned       each method at each number of workers on the same budget: so many trainings of one pass over four fifths
              of the samples, scored on the last fifth; a step up or down a ladder of factors of two for the rate, the
              threshold, the block's length and the block momentum, kept where it helps
  error       trained: every worker is a rank (a thread) with its own part of Python's library as text; it predicts the
              next character from 16, on other files, relative to one worker of plain SGD with the same seed after as
              many passes through the data; mean and standard deviation over the seeds
  priced      one worker: measured.  More: a step's arithmetic, encoding and decoding measured here on one thread, and
              the messages priced by the model of ``hpccomm predict`` (8 ranks a node, 25 us and 10 Gbit/s between
              nodes); without stragglers
  an LSTM     (--lstm) the same prices for a model whose step outweighs its messages: 30 million weights, a step of
              2,560 frames at 5 TFLOPS, encoding, decoding and the filter at 500 GB/s of memory; nothing is measured
  fitted      GTC and BMUF: curves through their published speed-ups.  Hybrid: predicted from those two curves alone;
              the first number lets the time of a block's exchange follow all workers, the second the groups
  published   Ladkat et al., Interspeech 2019: an LSTM acoustic model on 2000 h of speech.  Another task, another
              cluster: the order of the methods can be compared, the figures cannot.

A training that the file holds is not repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from benchmarks.batch_sizes import hold_out
from hpccomm import threshold
from hpccomm.algorithms.blockwise_filtering import block_filter, bmuf
from hpccomm.algorithms.transforms import Transform, chain, scale
from hpccomm.algorithms.two_tier import hybrid
from hpccomm.bench.plot import COLOURS
from hpccomm.buckets import Bucket
from hpccomm.collectives.compressed.prices import Phase, Place, price_phases
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
JOB = ("samples", "epochs", "batch", "tries", "warmup")
"""Arguments that define the job."""
GROUP = 8
"""Workers of a group of the hybrid, and of a node."""
TUNING_SEED = 100
TAU = 0.1
PERIODS = (5, 10, 25, 50)
"""The ladder of the block's length; the last one is the published length."""
DENSITIES = (0.001, 0.01)
"""Shares of the elements in a message of GTC, for the LSTM: the published range."""


class Settings(NamedTuple):
    """The settings that are tuned."""

    rate: float
    """Rate of steps on the mean gradient of the ranks that exchange every step."""
    tau: float = TAU
    """Threshold, in the units of one rank's mean gradient."""
    period: int = 5
    """Steps of a block."""
    rest: float = 1.0
    """1 − block momentum."""


def next_period(period: int, by: float) -> int:
    """The next period on the ladder, up or down; the same at its ends."""
    at = PERIODS.index(period) + (1 if by > 1 else -1)
    return PERIODS[min(max(at, 0), len(PERIODS) - 1)]


LADDERS: dict[str, Callable[[Settings, float], Settings]] = {
    "rate": lambda it, by: it._replace(rate=it.rate * by),
    "rest": lambda it, by: it._replace(rest=min(it.rest * by, 1.0)),
    "period": lambda it, by: it._replace(period=next_period(it.period, by)),
    "tau": lambda it, by: it._replace(tau=it.tau * by),
}
KNOBS = {"bmuf": ("rate", "rest", "period"), "gtc": ("rate", "tau"), "hybrid": ("rate", "rest", "period", "tau")}


class Sent(NamedTuple):
    """The exchange's state: the residual, and the bytes that were sent."""

    residual: Any
    nbytes: int


def sum_compressed(tau: float) -> Callable[[Any], Transform]:
    """An exchange: every rank sends its elements at or beyond the threshold; all messages are added in rank order."""
    compressor = threshold(tau)

    def exchange(group: Any) -> Transform:
        def update(gradient: Any, state: Sent, weights: Any) -> tuple[Any, Sent]:
            residual = np.empty_like(gradient)
            message = compressor.encode_feedback(state.residual, gradient, out=residual)
            messages, total = group.allgather(message), np.zeros_like(gradient)
            if group.rank == 0:  # every rank would decode the same bits: decode once
                compressor.decode_all(messages, total)
            group.Bcast(total)
            return total, Sent(residual, state.nbytes + message.size)

        return Transform(lambda weights: Sent(np.zeros_like(weights), 0), update)

    return exchange


def method(name: str, comm: Any, settings: Settings, warmup: int) -> Any:
    """The transform of one of the three methods; ``warmup`` synchronous steps of the hybrid."""
    exchange = sum_compressed(settings.tau)
    if name == "gtc":
        return chain(exchange(comm), scale(-settings.rate / comm.size))
    block = {"period": settings.period, "momentum": 1 - settings.rest, "nesterov": "paper"}
    if name == "bmuf":
        return bmuf(comm, scale(-settings.rate), **block)
    size = min(GROUP, comm.size)
    return hybrid(comm, exchange, scale(-settings.rate / size), size, warmup=warmup, **block)


class Run(NamedTuple):
    """One training."""

    method: str
    workers: int
    seed: int
    settings: Settings
    error: float
    """Share of the test samples that are predicted wrong."""
    message_bytes: float
    """Bytes that a worker sends in a step inside its group."""


def train(
    name: str, workers: int, seed: int, settings: Settings, data: Dataset, batch: int, epochs: int, warmup: int
) -> tuple[float, float]:
    """Train with a thread for each worker; return the error and the bytes of a message.

    One in ``warmup`` steps of the hybrid, the first ones, is synchronous; 0: none.
    """
    network = network_of(data)

    def body(comm: Any) -> tuple[Any, float]:
        tensors = initial_weights(network.shapes, seed)
        bucket = Bucket(tensors)
        weights = bucket.flatten(tensors)
        gradient = np.empty_like(weights)
        all_steps = epochs * (len(data.targets) // comm.size // batch)
        transform = method(name, comm, settings, all_steps // warmup if warmup else 0)
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
    """The network, 15,337 weights."""
    return Characters(data.classes, width=8, hidden=64)


# Tuning


def climb(first: Settings, knobs: tuple[str, ...], tries: int, error: Callable[[Settings], float]) -> Settings:
    """The best of ``tries`` settings: steps along the ladders from ``first``, in a direction while it helps."""
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
    """The first settings: one worker's best, the rate times the ranks that step together, momentum by the rule."""
    if name == "bmuf":
        return alone._replace(rest=1 / workers)
    together = workers if name == "gtc" else min(workers, GROUP)
    return Settings(alone.rate * together, rest=together / workers if name == "hybrid" else 1.0)


class Trainings:
    """All trainings, made or read from the record."""

    def __init__(self, record: harness.Record, args: argparse.Namespace, data: Dataset) -> None:
        self.record, self.args, self.data = record, args, data
        record.require("job", {key: getattr(args, key) for key in JOB})
        if "costs" not in record.data:
            record.data["costs"] = measure_costs(data, args.batch)._asdict()
        self.costs = Costs(**record.data["costs"])

    def run(self, name: str, workers: int, seed: int, settings: Settings) -> Run:
        """One training."""
        tuning = seed == TUNING_SEED
        data, epochs = (hold_out(self.data), 1) if tuning else (self.data, self.args.epochs)
        key = (name, workers, seed, settings)

        def measure() -> dict[str, Any]:
            found = Run(*key, *train(*key, data, self.args.batch, epochs, self.args.warmup))
            return found._asdict() | {"settings": settings._asdict()}

        return run_from(self.record.recall(key, measure, "tuning" if tuning else "runs"))

    def tune(self, name: str, workers: int) -> Settings:
        """The best settings found, for one worker of plain SGD or a method at a number of workers."""
        if name == "hybrid" and workers <= GROUP:
            return self.tune("gtc", workers)  # one group: nothing else happens
        start, knobs = Settings(0.05), ("rate",)
        if (name, workers) != ("bmuf", 1):
            start, knobs = first_settings(name, workers, self.tune("bmuf", 1)), KNOBS[name]
        return climb(start, knobs, self.args.tries, lambda it: self.run(name, workers, TUNING_SEED, it).error)


def run_from(row: dict[str, Any]) -> Run:
    """A row of the file."""
    return Run(**row | {"settings": Settings(**row["settings"])})


# Time


def median_time(run: Callable[[], Any], times: int = 30) -> float:
    """Median seconds of a run."""
    return statistics.median(harness.time_local(run) for _ in range(times))


class Costs(NamedTuple):
    """Measured costs, in seconds."""

    step: float
    """Gradient and update of one batch."""
    encode: float
    decode: float
    """Decoding of one message."""
    block: float
    """The block filter."""


def measure_costs(data: Dataset, batch: int) -> Costs:
    """Measure the parts of a step other than messages."""
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


def seconds_of(collective: str, nodes: int, per_node: int, nbytes: float) -> float:
    """The price of a collective; ``nbytes`` of a rank's block, or of the vector of an allreduce."""
    return price_phases([Phase(collective, nbytes)], Place(nodes, per_node)).us / 1e6


def price_step(name: str, workers: int, cost: Costs, message: float, model: int, period: int) -> float:
    """Seconds of one step, by measured costs and priced messages."""
    nodes, per_node = -(-workers // GROUP), min(workers, GROUP)
    if workers == 1:
        return cost.step + (cost.encode + cost.decode if name != "bmuf" else 0)
    if name == "bmuf":
        return cost.step + (seconds_of("allreduce", nodes, per_node, model) + cost.block) / period
    group = workers if name == "gtc" else per_node
    inside = seconds_of("allgather", nodes if name == "gtc" else 1, per_node, message)
    step = cost.step + cost.encode + group * cost.decode + inside
    if name == "gtc" or nodes == 1:
        return step
    slices = seconds_of("allgather", 1, per_node, model / per_node)
    between = seconds_of("allreduce", nodes, 1, model) + slices + cost.block
    return step + between / period


class Lstm(NamedTuple):
    """An acoustic model as large as the published one, on a GPU."""

    parameters: float = 30e6
    frames: int = 2560
    """Of a step: 128 sequences of 20."""
    flops: float = 5e12
    memory: float = 500e9
    """Bytes a second."""

    def costs(self, density: float) -> Costs:
        """Seconds of a step, of encoding and decoding a message, and of the filter: vectors through memory."""
        vector = 4 * self.parameters / self.memory
        step = 6 * self.parameters * self.frames / self.flops
        return Costs(step, encode=3 * vector, decode=3 * density * vector, block=5 * vector)


def large_rows() -> list[list[str]]:
    """The lines of the table of the LSTM: speed-ups by period and density."""
    it, lines = Lstm(), []
    for workers, name in ((workers, name) for workers in SPEED["gtc"] for name in METHODS):
        line = [name, str(workers)]
        for period, density in LARGE_COLUMNS:
            cost, message = it.costs(density), 4 * density * it.parameters
            seconds = price_step(name, workers, cost, message, round(4 * it.parameters), period)
            line.append(f"{workers * cost.step / seconds:.1f}×")
        lines.append([*line, f"{SPEED[name][workers]:g}×"])
    return lines


# Step times that follow the published ones: T(GTC) = 1 + c g², T(BMUF) = a + b N, in units of one worker's step


def fit_speed_ups(name: str, workers: int) -> list[float]:
    """Speed-ups by curves through the published ones of GTC and BMUF; for the hybrid the least and the most."""
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
    """Speed-up with that step."""
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
        seconds = price_step(name, workers, cost, message, model, settings.period)
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
                fit_speed_ups(name, workers) if workers > GROUP else [],
                SPEED[name].get(workers),
                ERROR[name].get(workers, "-"),
            )
        )
    return found


LARGE_COLUMNS = [(period, density) for period in (PERIODS[0], PERIODS[-1]) for density in DENSITIES]
LARGE_HEAD = ("method", "workers", *(f"period {p}, {100 * d:g} %" for p, d in LARGE_COLUMNS), "published")
HEAD = ("method", "workers", "rate", "tau", "period", "momentum", "error", "relative, %", "published")
MORE = ("bytes", "µs a step", "time is", "speed-up", "fitted", "published")


def cells(row: Row) -> list[str]:
    """One line of the table."""
    it, curve = row.settings, "-".join(f"{each:.0f}" for each in row.fitted) + "×" if row.fitted else "–"
    blocks = row.method != "gtc" and row.workers > (1 if row.method == "bmuf" else GROUP)
    return [
        row.method,
        str(row.workers),
        f"{it.rate:.3g}",
        f"{it.tau:g}" if row.method != "bmuf" else "–",
        *((str(it.period), f"{1 - it.rest:.3f}") if blocks else ("–", "–")),
        f"{row.error:.4f}",
        f"{row.relative:+.1f} ± {row.spread:.1f}",
        row.published_error,
        f"{row.message_bytes:.0f}",
        f"{row.step_us:.0f}",
        "measured" if row.workers == 1 else "priced",
        f"{row.speed_up:.1f}×",
        curve,
        f"{row.published:g}×" if row.published else "–",
    ]


def draw(found: list[Row], file: Path) -> None:
    """Speed-up and error against workers."""
    figure, [[speed, error]] = harness.panels(11, 4.6, 1, 2)
    for name, colour in zip(METHODS, COLOURS, strict=False):
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
    harness.save(figure, file)


def main() -> int:
    """Train what the file lacks; print the table once it is complete."""
    parser = harness.parser("two-tier", __doc__, file="two-tier.json")
    parser.add_argument("--workers", default="1,8,32,64,128")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=80_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="samples of a worker's step")
    parser.add_argument("--tries", type=int, default=10, help="trainings to tune a method at a number of workers")
    parser.add_argument("--warmup", type=int, default=0, metavar="K", help="a Kth of the hybrid steps is synchronous")
    parser.add_argument("--lstm", action="store_true", help="only price the three methods for an LSTM of 30 M weights")
    args = harness.parse(parser)
    if args.lstm:
        step = 1e3 * Lstm().costs(0.0).step
        harness.emit(f"speed-ups priced with an LSTM of 30 M weights, {step:.0f} ms a step of one worker\n")
        harness.emit(harness.table(LARGE_HEAD, large_rows(), words=1))
        return 0
    record = harness.Record(args.file, lambda row: run_from(row)[:4], ["runs", "tuning"], args.seconds)
    trainings = Trainings(record, args, stdlib(args.samples))
    everything = [(name, workers) for workers in harness.integers(args.workers) for name in METHODS]
    try:
        best = {each: trainings.tune(*each) for each in everything}
        wanted = [
            trainings.run(*each, seed, best[each]) for seed in harness.integers(args.seeds) for each in everything
        ]
    except harness.OutOfTimeError:
        harness.progress("out of time: the same command trains the rest")
        return 0
    model = 4 * Bucket(network_of(trainings.data).shapes).size
    found = rows(wanted, trainings.costs, model)
    job = ", ".join(f"{key} {value}" for key, value in record.data["job"].items())
    costs = ", ".join(f"{key} {1e6 * value:.0f}" for key, value in trainings.costs._asdict().items())
    harness.emit(f"{job}, seeds {args.seeds}; model {model} bytes; measured, µs: {costs}\n")
    harness.emit(harness.table([*HEAD, *MORE], map(cells, found), words=1))
    draw(found, harness.plot_file(args, args.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
