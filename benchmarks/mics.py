"""Steps of MiCS and ZeRO-3 on the nodes of a virtual cluster, and gathers and reduce-scatters in two levels.

*N nodes of k = 2 ranks, p = k, s = 4 micro-steps, M bytes of parameters in float32, layers of one size.*  All ways take
turns in every round; a time is that of the slowest rank.  Gradients are constants, and the computing of a layer is a
wait of a given length, as on a device: sixteen ranks share the machine's cores, which could not compute for all of
them.  Settings without computing do not prefetch.  After its steps every way has the same weights, bit for bit.
"Alone" is MiCS without a second hop: the time of the machine where nothing is sent between nodes.  Bytes are those that
the first node's link has sent.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import harness
from hpccomm.algorithms.sharded.cost import Job, Shape, fit_latency, link_volume, second_us, step_cost
from hpccomm.bench.plot import COLOURS
from hpccomm.cluster.nodes import Cluster, rate_of
from hpccomm.layout import Link
from hpccomm.performance.machine import Machine

PER_NODE, MICRO_STEPS = 2, 4
NODES = (2, 4, 8)
GATHER_BYTES = (16384, 131072, 1048576, 8388608)
"""Bytes of a gathered vector."""
ROUNDS = 5
LR = 2.0**-10
GOODPUT = 0.95
"""Share of a link's rate that is not headers."""
ALPHA_US = {2: 14.0, 4: 27.0, 8: 61.0}
"""Latency of a ring's round with four bytes, by nodes of two ranks (docs/measurements/cluster.md)."""
P4D = Machine(Link(5.0, 1e-3 / 230), Link(20.0, 1e-3 / 40), 0.0, "p4d.24xlarge: 8 A100, 400 Gbit/s, assumed rates")
LARGE = Job(100e9, 80, MICRO_STEPS, 2e6 * 100e9 / 80 * 2048 / 170e12, shard_word=2)
"""100 billion parameters in 80 layers, 2048 tokens a micro-step at the published 170 TFLOPS; the layers are assumed."""
ZERO_SCALING = 0.72
"""Share of its throughput that ZeRO-3 keeps from 128 to 512 GPUs, as published."""


class Setting(NamedTuple):
    """One training job on the cluster."""

    name: str
    layers: int
    elements: int
    """Elements of a layer."""
    wait_ms: float
    """Forward computing of a layer; the backward pass takes twice as long."""
    rate: str
    rounds: int
    methods: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters, M."""
        return 4 * self.layers * self.elements

    @property
    def compute_s(self) -> float:
        """Seconds of computing in a step."""
        return 3e-3 * self.wait_ms * self.layers * MICRO_STEPS


MICS, ALONE, ZERO = "MiCS", "alone", "ZeRO-3"
AUTO, NATIVE_MPI, RINGS, LEVELS = (f"{ZERO}, {how}" for how in ("auto", "native", "rings", "two levels"))
SETTINGS = (
    Setting("links", 8, 1 << 18, 0.0, "1gbit", 5, (MICS, AUTO, NATIVE_MPI, RINGS, LEVELS, ALONE)),
    Setting("slow-links", 8, 1 << 16, 0.0, "250mbit", 5, (MICS, AUTO, NATIVE_MPI, RINGS, LEVELS, ALONE)),
    Setting("device", 8, 1 << 13, 40.0, "125mbit", 3, (MICS, AUTO, RINGS, ALONE)),
)
"""All nodes share this machine's cores, and a cluster has cores on every node.  With slower links and layers shorter by
the same factor the links take as long as before, and the cores a part of that time.  The device computes for so long
that communication is a small part of a step, as with large models."""
SECOND_HOP = "allreduce=hierarchical"
"""The second hop's algorithm is fixed: a tuning table made at one rate does not hold at another."""
UNPREDICTED = (AUTO, NATIVE_MPI, ALONE)
"""Ways without a prediction: their algorithm changes, or is MPI's own, or predictions start from them."""

Shardings = dict[str, Callable[[Any, Any, Any, bool], Any]]


def shardings() -> Shardings:
    """Ways to shard the same states: functions of (communicator, units, optimizer, whether to prefetch on a thread)."""
    from mpi4py import MPI

    from hpccomm.algorithms.sharded.groups import mics, partition_groups
    from hpccomm.algorithms.sharded.units import ShardedModel, zero
    from hpccomm.communicator import Communicator

    def alone(comm: Any, units: Any, optimizer: Any, overlap: bool) -> Any:
        groups = partition_groups(comm, PER_NODE)
        return ShardedModel(groups._replace(replication=MPI.COMM_SELF), units, optimizer, overlap=overlap)

    def in_groups(size: int | None) -> Callable[[Any, Any, Any, bool], Any]:
        return lambda comm, units, by, overlap: mics(comm, units, by, size or comm.size, overlap=overlap)

    def with_all(algorithm: str) -> Callable[[Any, Any, Any, bool], Any]:
        return lambda comm, units, by, overlap: zero(Communicator(comm, algorithm), units, by, overlap=overlap)

    return {
        MICS: in_groups(PER_NODE),
        AUTO: with_all("auto"),
        NATIVE_MPI: with_all("native"),
        RINGS: with_all("ring"),
        LEVELS: in_groups(None),
        ALONE: alone,
    }


def step(states: Any, names: Sequence[str], wait: float) -> None:
    """One step: four micro-steps and the boundary."""
    for _ in range(MICRO_STEPS):
        walk = [*names, *reversed(names)]
        for at, name in enumerate(walk):
            backward = at >= len(names)
            states.gather(name, ahead=walk[at + 1] if at + 1 < len(walk) else None)
            time.sleep(wait * (2 if backward else 1)) if wait else None
            states.release(name)
            if backward:
                states.reduce_accumulate(name, states.gradient(name))
    states.boundary()


def read_link_bytes() -> int:
    """Bytes that this node's link has sent."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text(encoding="ascii"))


def steps_of(comm: Any, setting: Setting) -> dict[str, Any]:
    """Measure all ways in turns: seconds of a step, bytes on the link, and the formula's bytes of each hop."""
    import numpy as np

    from hpccomm.algorithms.transforms import scale

    units = {f"layer{n}": {"w": np.full(setting.elements, n, "f4")} for n in range(setting.layers)}
    made = {title: shardings()[title](comm, units, scale(-LR), setting.wait_ms > 0) for title in setting.methods}
    for states in made.values():
        for buffer in states.gradients:
            buffer.room[...] = comm.rank + 1

    def run(states: Any) -> tuple[float, int]:
        comm.Barrier()
        before = read_link_bytes()
        seconds = harness.time_collective(comm, partial(step, states, list(units), 1e-3 * setting.wait_ms))
        comm.Barrier()
        return seconds, read_link_bytes() - before

    turns = harness.take_turns({title: partial(run, states) for title, states in made.items()}, setting.rounds)
    found: dict[str, Any] = {
        title: {"seconds": [each for each, _ in pairs], "sent": [each for _, each in pairs]}
        for title, pairs in turns.items()
    }
    first = (comm.size + 1) / 2
    for title, states in made.items():
        mean = first if title != ALONE else (comm.rank // PER_NODE * PER_NODE + 1.5) * PER_NODE / comm.size
        for n, (name, tensors) in enumerate(states.consolidate()):
            wanted = np.float32(n)
            for _ in range(setting.rounds + 1):
                wanted -= np.float32(LR) * np.float32(mean)
            assert (tensors["w"] == wanted).all(), (title, name, tensors["w"][0], wanted)
        found[title]["hops"] = {hop: each.wire_bytes / each.exchanges for hop, each in states.hops._asdict().items()
                                if each.exchanges}  # fmt: skip
        states.close()
    return found


TWO_LEVELS, FLAT, NATIVE = "two levels", "flat ring", "native"
ALGORITHM = {TWO_LEVELS: "hierarchical", FLAT: "ring", NATIVE: "native"}
HALVES = {"gathers": "Gathers", "scatters": "Reduce-scatters"}
ALL_MEASUREMENTS = (*(each.name for each in SETTINGS), *HALVES)


def halves_of(comm: Any, name: str, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of an allgather, or of a reduce-scatter, of all ranks by way and length."""
    import numpy as np

    found: dict[str, dict[int, list[float]]] = {title: {} for title in ALGORITHM}
    for nbytes in GATHER_BYTES:
        count = nbytes // 4 // comm.size
        parts = [np.arange(count * comm.size, dtype="f4") % 61 + rank for rank in range(comm.size)]
        total, lo = sum(parts), comm.rank * count
        if name == "gathers":
            given, want = parts[comm.rank][:count].copy(), np.concatenate([part[:count] for part in parts])
        else:
            given, want = parts[comm.rank], total[lo : lo + count]
        into = np.empty_like(want)
        run = comm.Allgather if name == "gathers" else comm.Reduce_scatter_block
        repeats = max(1, min(20, (1 << 22) // nbytes))

        def turn(title: str) -> float:
            into[...] = -1  # noqa: B023
            call = partial(run, given, into, algorithm=ALGORITHM[title])  # noqa: B023
            seconds = harness.time_collective(comm, call, repeats)  # noqa: B023
            assert np.array_equal(into, want), title  # noqa: B023
            return seconds

        turns = harness.take_turns({title: partial(turn, title) for title in ALGORITHM}, rounds)
        for title, seconds in turns.items():
            found[title][nbytes] = seconds
    return found


def work(name: str, rounds: int) -> Any:
    """The measurement of one setting, or of gathers or reduce-scatters, on every rank."""
    from mpi4py import MPI

    from hpccomm.communicator import Communicator

    world = Communicator(MPI.COMM_WORLD)
    setting = next((each for each in SETTINGS if each.name == name), None)
    return steps_of(world, setting) if setting else halves_of(world, name, rounds)


def measure_nodes(name: str, nodes: int, rounds: int) -> dict[str, Any]:
    """One setting, or gathers, or reduce-scatters, on so many nodes."""
    rate = next((each.rate for each in SETTINGS if each.name == name), "1gbit")
    shape = harness.Shape(nodes, (PER_NODE,) * nodes, "block", rate)
    program = ["-m", "benchmarks.mics", "--only", name, "--rounds", str(rounds)]
    with Cluster(nodes, rate, "mics") as cluster:
        found = harness.launch(harness.on_cluster(cluster, shape, {"HPCCOMM_ALGORITHM": SECOND_HOP}), program, "--work")
    return {"what": name, "nodes": nodes, "per_node": PER_NODE, "rate": rate, "found": found}


# What it says


def setting_of(record: dict[str, Any]) -> Setting:
    """The setting of a record of steps."""
    return next(each for each in SETTINGS if each.name == record["what"])


def shape_of(title: str, nodes: int) -> Shape:
    """The groups of a way."""
    ranks = nodes * PER_NODE
    if title in (MICS, ALONE):
        return Shape(ranks, PER_NODE, PER_NODE)
    return Shape(ranks, PER_NODE, ranks, two_levels=title == LEVELS)


def machine_of(nodes: int, rate: str) -> Machine:
    """The machine model: the links' nominal rate less headers, and the latency of a round on so many nodes."""
    beta = 8e6 / rate_of(rate) / GOODPUT
    return Machine(Link(0.0, 0.0), Link(ALPHA_US[nodes], beta), 0.0, "docs/measurements/cluster.md")


def predict_step(title: str, record: dict[str, Any]) -> float:
    """Seconds of a step: what the machine needs alone, and the links by :mod:`hpccomm.algorithms.sharded.cost`.

    Gathers in two levels copy inside the nodes while messages are on their way, so that the longer of both counts.
    """
    setting, nodes = setting_of(record), record["nodes"]
    alone = median(record["found"][ALONE]["seconds"])
    if title == ALONE:
        return alone
    machine, shape = machine_of(nodes, record["rate"]), shape_of(title, nodes)
    if title == MICS:
        return alone + 1e-6 * second_us(shape, setting.nbytes, machine)
    job = Job(setting.layers * setting.elements, setting.layers, MICRO_STEPS, 1e3 * setting.wait_ms, False, 4, 4)
    links = 1e-6 * step_cost(job, shape, machine).step
    return max(alone, links) if title == LEVELS else alone - setting.compute_s + links


def predict_bytes(title: str, record: dict[str, Any]) -> float:
    """Bytes that a step sends through a node's link by the formulas, without headers."""
    if title == ALONE:
        return 0.0
    return setting_of(record).nbytes * link_volume(shape_of(title, record["nodes"]), MICRO_STEPS).total


STEPS_HEAD = ("nodes", "way", "ms a step", "predicted, ms", "measured / predicted", "MB through a link", "by formula")


def steps_table(records: Sequence[dict[str, Any]]) -> str:
    """Times of one setting, beside each other and beside the formulas."""
    setting, rows = setting_of(records[0]), []
    for record in records:
        found = record["found"]
        for title, each in found.items():
            times, guess = each["seconds"], predict_step(title, record)
            cells = [str(record["nodes"]), title, harness.spread(times, unit=1e3)]
            cells += ["", ""] if title in UNPREDICTED else [harness.number(1e3 * guess), f"{median(times) / guess:.2f}"]
            cells += [f"{median(each['sent']) / 1e6:.2f}", f"{predict_bytes(title, record) / 1e6:.2f}"]
            ratios = harness.ratios(times, found[MICS]["seconds"])
            versus = f"**{median(ratios):.2f}×** ({ratios[0]:.2f}–{ratios[-1]:.2f})"
            first = next((r["found"].get(title) for r in records if r["nodes"] == NODES[0]), None)
            left = f"{median(first['seconds']) / median(times):.1%}" if first else ""
            rows.append([*cells, "" if title in (MICS, ALONE) else versus, left])
    lines = [
        f"### {setting.name}: {setting.layers} layers of {4 * setting.elements:,} bytes, {setting.rate}, "
        f"{1e3 * setting.compute_s:.0f} ms of waits in a step",
        "",
        harness.table([*STEPS_HEAD, "MiCS is", "left of 2 nodes"], rows, words=2),
        *(compare_fastest_zero(record) for record in records),
    ]
    return "\n".join(lines) + "\n"


def compare_fastest_zero(record: dict[str, Any]) -> str:
    """MiCS beside the fastest way of ZeRO-3."""
    found = record["found"]
    title = min((each for each in found if each.startswith(ZERO)), key=lambda each: median(found[each]["seconds"]))
    ratio = median(harness.ratios(found[title]["seconds"], found[MICS]["seconds"]))
    return f"{record['nodes']} nodes: MiCS is {ratio:.2f}× as fast as {title}, the fastest of them.  "


HALVES_HEAD = ("nodes", "bytes", "two levels, µs", "flat ring, µs", "native, µs", "ring / two levels")


def halves_table(name: str, records: Sequence[dict[str, Any]]) -> str:
    """Gathers of all ranks, or reduce-scatters, in two levels beside flat ones."""
    rows = []
    for record in records:
        found = record["found"]
        for nbytes, times in found[TWO_LEVELS].items():
            others = [found[title][nbytes] for title in (FLAT, NATIVE)]
            spreads = [harness.spread(each, unit=1e6) for each in (times, *others)]
            against = [f"{median(each) / median(times):.2f}" for each in others]
            rows.append([str(record["nodes"]), f"{int(nbytes):,}", *spreads, *against])
    return f"### {HALVES[name]} of all ranks, 1gbit\n\n" + harness.table([*HALVES_HEAD, "native / two levels"], rows)


def large_cluster() -> str:
    """The published points beside the model: latency is fitted to ZeRO-3's, the rest is predicted."""
    before, after = Shape(128, 8, 128, False), Shape(512, 8, 512, False)
    machine = fit_latency(LARGE, before, after, P4D, ZERO_SCALING)
    ways = [("ZeRO-3 (fitted)", before, after, "72 %")]
    ways += [(f"MiCS, p = {p}", Shape(128, 8, p), Shape(512, 8, p), "99.4 %") for p in (64, 128)]
    rows = []
    for title, small, large, published in ways:
        s, t = (1e-6 * step_cost(LARGE, shape, machine).step for shape in (small, large))
        rows.append([title, f"{s:.1f}", f"{t:.1f}", f"{s / t:.1%}", published])
    head = ("", "128 GPUs, s a step", "512 GPUs", "left", "published")
    intro = f"Latency between nodes that leaves ZeRO-3 {ZERO_SCALING:.0%}: {machine.inter.alpha:.1f} µs.\n\n"
    return intro + harness.table(head, rows, words=1)


def report(records: Sequence[dict[str, Any]]) -> str:
    """All tables."""

    def select(name: str) -> list[dict[str, Any]]:
        return sorted((each for each in records if each["what"] == name), key=lambda each: int(each["nodes"]))

    steps = [steps_table(select(each.name)) for each in SETTINGS if select(each.name)]
    halves = [halves_table(name, select(name)) for name in HALVES if select(name)]
    return "\n".join([*steps, *halves, large_cluster()])


def draw(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Steps against nodes, a panel a setting; marks are predictions."""
    shown = [each for each in SETTINGS if any(record["what"] == each.name for record in records)]
    if not shown:
        return
    figure, [grid] = harness.panels(4.2 * len(shown), 4, 1, len(shown))
    for axes, setting in zip(grid, shown, strict=True):
        here = sorted((each for each in records if each["what"] == setting.name), key=lambda each: int(each["nodes"]))
        nodes = [each["nodes"] for each in here]
        for number, title in enumerate(here[0]["found"]):
            seconds = [median(each["found"][title]["seconds"]) for each in here]
            axes.plot(nodes, seconds, "o-", color=COLOURS[number], markersize=4, label=title)
            if title not in UNPREDICTED:
                guesses = [predict_step(title, each) for each in here]
                axes.plot(nodes, guesses, "_", color=COLOURS[number], markersize=14)
        axes.set_xscale("log", base=2)
        axes.set_xticks(nodes, map(str, nodes))
        axes.set_ylim(bottom=0)
        axes.set(xlabel="nodes of two ranks", ylabel="seconds a step")
        axes.set_title(f"{setting.name}, {setting.rate}", fontsize=10, loc="left")
        axes.legend(fontsize=8)
    harness.save(figure, out)


def main() -> int:
    """Measure what the file lacks, print, write; inside a launch, measure."""
    parser = harness.parser("mics", __doc__, rounds=ROUNDS, file="mics.json")
    parser.add_argument("--nodes", type=int, action="append", help=f"default {', '.join(map(str, NODES))}")
    parser.add_argument("--only", action="append", help=f"some of {', '.join(ALL_MEASUREMENTS)}; none: only print")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    if args.work:
        harness.write_on_rank0(args.work, work(args.only[0], args.rounds))
        return 0
    record = harness.Record(args.file, lambda row: (row["what"], row["nodes"]), seconds=args.seconds)
    names = [each for each in args.only or ALL_MEASUREMENTS if each != "none"]
    keys = [(name, nodes) for name in names for nodes in args.nodes or NODES]
    record.recall_all(keys, lambda key: measure_nodes(*key, args.rounds))
    harness.emit(report(record.rows))
    draw(record.rows, harness.plot_file(args, args.file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
