"""``scripts/bench_slow_links``: one gradient over slow links, dense and compressed, on the nodes of a virtual cluster.

*n float32, from each rank's gradient to the mean, or what stands for it, on every rank.*  All ways run in every round,
in turns, the compressed ones several times back to back, as a link's first burst is free.  A time is the slowest
rank's.  Three times of a way:

- *all*: the whole call, while the processors of one machine compute for all nodes;
- *messages*: as many and as long ones, ready made, that nobody looks at;
- *computing*: the same work with an :class:`Echo` in place of the others, by the ranks of one node while the other
  nodes rest, as on a machine of their own; the slowest node's.

``--even`` looks for the density at which a sparse allgather takes as long as a dense allreduce.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.kernels import describe_run
from hpccomm.cluster.nodes import Cluster, rate_of
from hpccomm.layout import Link
from hpccomm.performance import sparse_cost
from hpccomm.performance.machine import Machine

NODES, PER_NODE, ELEMENTS, DENSITY = 4, 2, 1 << 24, 0.001
RANKS = NODES * PER_NODE
RATES = ("1gbit", "100mbit")
BREAK_EVEN_SHAPES, BREAK_EVEN_ELEMENTS = ((2, 1), (4, 1), (8, 1), (4, 2)), 1 << 20
BREAK_EVEN_DENSITIES = (0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6)
TUNED, TUNED_SIZES = "native,ring,butterfly,bruck", "1Ki,64Ki,1Mi"
"""Allgathers that are measured first, and the bytes of their results."""
MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""For glibc: memory that was given back stays with the process, as new pages cost a virtual machine most of all."""
GOODPUT = 0.95
"""Of a link's rate, what is not headers."""
ALPHA_US = 25.0
BACK_TO_BACK = 4
ROUNDS = 3

Call = Callable[[], Any]
Make = Callable[[Any, Any], Call]
"""(communicator, gradient) -> a call that exchanges once."""


class ExchangeMethod(NamedTuple):
    """One way to exchange a gradient."""

    title: str
    make: Make
    talk: Callable[[Any], Call] | None = None
    """(communicator) -> a call that sends messages as long; None for dense ones."""
    price_name: str = ""
    """By which name :mod:`hpccomm.performance.sparse_cost` prices the messages."""
    levels: bool = False
    """Dense in the node; the nodes' first ranks compress and exchange."""


class Echo:
    """A communicator whose other ranks bring what this one brings: an exchange's work without its messages."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.letters = rank, size, list[Any]()

    def Allgather(self, mine: Any, room: Any) -> None:
        """Copies of mine."""
        room.reshape(self.size, -1)[...] = mine

    def Allgatherv(self, mine: Any, room: Any) -> None:
        """Copies of mine, as they are equally long."""
        self.Allgather(mine, room[0])

    def Allreduce(self, mine: Any, room: Any, op: Any = None) -> None:
        """As a maximum would be."""
        room[...] = mine

    def Isend(self, letter: Any, to: int, tag: int) -> Echo:
        """What :meth:`Recv` returns."""
        self.letters.append(letter)
        return self

    def Wait(self) -> None:
        """It was sent."""

    def Probe(self, source: int, tag: int, status: Any) -> None:
        """How long it is."""
        from mpi4py import MPI

        status.Set_elements(MPI.BYTE, self.letters[0].size)

    def Recv(self, room: Any, source: int, tag: int) -> None:
        """What was sent."""
        room[...] = self.letters.pop(0)


# Ways


def native(comm: Any, gradient: Any) -> Call:
    """The MPI underneath."""
    import numpy as np
    from mpi4py import MPI

    plain, out = MPI.Intracomm(comm), np.empty_like(gradient)
    return lambda: plain.Allreduce(gradient, out)


def dense(comm: Any, gradient: Any) -> Call:
    """Ours, by the algorithm that is fastest here."""
    import numpy as np

    out = np.empty_like(gradient)
    return lambda: comm.Allreduce(gradient, out)


def feedback_exchange(compressor: Callable[[], Any], momentum: float = 0.0) -> Make:
    """Every rank compresses its own gradient."""

    def make(comm: Any, gradient: Any) -> Call:
        from hpccomm.algorithms.error_feedback import feedback

        method = feedback(compressor(), comm, momentum)
        state = [method.init(gradient)]

        def call() -> Any:
            mean, state[0] = method.update(gradient, state[0], gradient)
            return mean

        return call

    return make


def topk() -> Any:
    """The largest 0.1 %."""
    from hpccomm.algorithms.compressors import topk as made

    return made(DENSITY)


def threshold() -> Any:
    """GTC's threshold that 0.1 % reach."""
    from hpccomm.algorithms.compressors import threshold as made

    return made(density=DENSITY)


def phases(comm: Any, gradient: Any) -> Call:
    """One bit an element there and back."""
    import numpy as np

    from hpccomm.collectives.compressed.onebit import onebit_allreduce, server_elements

    worker = np.zeros_like(gradient)
    server = np.zeros(server_elements(gradient.size, comm.rank, comm.size), np.float32)
    return lambda: onebit_allreduce(comm, gradient, worker, server).mean


def leader_exchange(make: Make) -> Make:
    """Dense in the node, between the nodes as ``make`` says."""

    def levels(comm: Any, gradient: Any) -> Call:
        import numpy as np

        from hpccomm.collectives.compressed.sparse import hierarchical_allreduce

        total, node, nodes = np.empty_like(gradient), comm.intra_node, comm.inter_node
        leaders = make(nodes, total) if node.rank == 0 else None

        def between(_: Any, here: Any) -> Any:
            total[...] = here
            assert leaders is not None
            return leaders()

        return lambda: hierarchical_allreduce(comm, gradient, between)

    return levels


def allgather_messages(element_bytes: float) -> Callable[[Any], Call]:
    """Messages of 0.1 % of the elements to all."""

    def talk(comm: Any) -> Call:
        import numpy as np

        from hpccomm.collectives.compressed.sparse import gather_messages

        letter = np.zeros(sparse_cost.HEADERS + round(element_bytes * DENSITY * ELEMENTS), np.uint8)
        return lambda: gather_messages(comm, letter)

    return talk


def alltoall_messages(comm: Any) -> Call:
    """A part of the bits for each rank, and back."""
    import numpy as np

    from hpccomm.collectives.compressed.sparse import CountingComm, allgatherv

    wire = CountingComm(comm)
    letter = np.zeros(4 + ELEMENTS // 8 // comm.size, np.uint8)
    lengths = np.full(comm.size, letter.size)
    return lambda: (wire.alltoall([letter] * comm.size), allgatherv(wire, letter, lengths))


EXCHANGE_METHODS = (
    ExchangeMethod("native", native),
    ExchangeMethod("dense", dense),
    ExchangeMethod("DGC 0.1 %", feedback_exchange(topk, 0.9), allgather_messages(8), "sparse"),
    ExchangeMethod(
        "DGC 0.1 %, dense in the node",
        leader_exchange(feedback_exchange(topk, 0.9)),
        allgather_messages(8),
        "sparse",
        True,
    ),
    ExchangeMethod("GTC 0.1 %", feedback_exchange(threshold), allgather_messages(4), "words"),
    ExchangeMethod(
        "GTC 0.1 %, dense in the node",
        leader_exchange(feedback_exchange(threshold)),
        allgather_messages(4),
        "words",
        True,
    ),
    ExchangeMethod("1-bit, two phases", phases, alltoall_messages, "onebit_phases"),
    ExchangeMethod(
        "1-bit, two phases, dense in the node", leader_exchange(phases), alltoall_messages, "onebit_phases", True
    ),
)


# What each rank does


def time_call(comm: Any, call: Call, repeats: int) -> float:
    """Seconds a call on the slowest rank."""
    comm.Barrier()
    return max_over_ranks(comm, time_local(call, repeats))


def time_local(call: Call, repeats: int) -> float:
    """Seconds a call here."""
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def max_over_ranks(comm: Any, mine: float) -> float:
    """The largest of all ranks."""
    import numpy as np
    from mpi4py import MPI

    most = np.empty(1)
    MPI.Intracomm(comm).Allreduce(np.array([mine]), most, MPI.MAX)
    return float(most[0])


def wait_idle(comm: Any) -> None:
    """A barrier that leaves the processor to others."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


def work(out: Path, rounds: int, only: str) -> None:
    """What each rank does; rank 0 writes seconds, a number a round."""
    import numpy as np
    from mpi4py import MPI

    from hpccomm.communicator import Communicator

    world = Communicator(MPI.COMM_WORLD)
    node, nodes = world.intra_node, world.inter_node
    gradient = np.random.default_rng(world.rank).standard_normal(ELEMENTS, np.float32)
    here = [way for way in EXCHANGE_METHODS if only in way.title]
    calls = {way.title: way.make(world, gradient) for way in here}
    echo = Echo(world.rank, world.size)
    levels = SimpleNamespace(intra_node=node, inter_node=Echo(nodes.rank, nodes.size))
    works = {way.title: way.make(levels if way.levels else echo, gradient) for way in here if way.talk}
    found: dict[str, dict[str, list[float]]] = {"all": {}, "messages": {}, "computing": {}}

    def note(what: str, way: ExchangeMethod, seconds: float, number: int) -> None:
        if number:
            found[what].setdefault(way.title, []).append(seconds)

    for number in range(rounds + 1):
        for way in here:
            if way.talk is None:
                if number:
                    note("all", way, time_call(world, calls[way.title], 1), number)
                continue
            note("all", way, time_call(world, calls[way.title], BACK_TO_BACK), number)
            talks = way.talk(nodes if way.levels else world) if node.rank == 0 or not way.levels else int
            note("messages", way, time_call(world, talks, 2 * BACK_TO_BACK), number)
            mine = 0.0
            for turn in range(nodes.size):
                wait_idle(world)
                if nodes.rank == turn:
                    mine = time_local(works[way.title], BACK_TO_BACK)
            wait_idle(world)
            note("computing", way, max_over_ranks(world, mine), number)
    if world.rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")


def work_break_even(out: Path, rounds: int) -> None:
    """A dense allreduce, and sparse ones of rising density."""
    import numpy as np
    from mpi4py import MPI

    from hpccomm.collectives.compressed.sparse import sparse_allreduce
    from hpccomm.communicator import Communicator
    from hpccomm.kernels.compression_reference import cell_indices

    world = Communicator(MPI.COMM_WORLD)
    n = BREAK_EVEN_ELEMENTS
    gradient = np.random.default_rng(world.rank).standard_normal(n, np.float32)
    calls: dict[str, Call] = {"dense": dense(world, gradient)}
    for density in BREAK_EVEN_DENSITIES:
        index = cell_indices(n, round(density * n), world.rank)
        calls[str(density)] = partial(sparse_allreduce, world, index, gradient[index], n, algorithm="allgather")
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(time_call(world, call, 1))
    if world.rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")


# What is measured


def launch_work(shape: tuple[int, int], rate: str, words: Sequence[str]) -> Any:
    """What this module's ``--work`` finds on a cluster made for it, whose allgathers were tuned."""
    nodes, per_node = shape
    with Cluster(nodes, rate, "slow") as cluster, tempfile.TemporaryDirectory() as folder:
        file, tuned = Path(folder, "found.json"), Path(folder, "tuned.json")
        tune = ["hpccomm", "tune", "--collective", "allgather", "--algorithm", TUNED, "--sizes", TUNED_SIZES]
        program = ["-m", "benchmarks.slow_links", "--work", str(file), *words]
        for each in ([*tune, "--out", str(tuned)], program):
            env = {"OMP_NUM_THREADS": "1", **MALLOC_ENV, **({"HPCCOMM_TUNING": str(tuned)} if tuned.exists() else {})}
            done = cluster.run(each, per_node, env=env, capture_output=True, text=True, timeout=3600)
            if done.returncode:
                raise SystemExit(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return json.loads(file.read_text(encoding="utf-8"))


def machine_of(rate: str) -> Machine:
    """Links of a rate."""
    return Machine(inter=Link(ALPHA_US, 8e6 / rate_of(rate) / GOODPUT))


def messages_of(way: ExchangeMethod, rate: str) -> float:
    """Seconds that the messages of a way should take, or the best dense allreduce."""
    machine = machine_of(rate)
    if way.talk is None:
        return 1e-6 * sparse_cost.dense_cost(NODES, PER_NODE, 4 * ELEMENTS, machine)
    rows = sparse_cost.flat_predictions(NODES, 1 if way.levels else PER_NODE, 4 * ELEMENTS, DENSITY, machine)
    return next(1e-6 * each.us for each in rows if each.algorithm == way.price_name)


def table(record: dict[str, Any]) -> Iterator[str]:
    """Times, and how they stand to our dense one and to native."""
    whole, messages, computing = record["all"], record["messages"], record["computing"]
    yield f"### {NODES} x {PER_NODE} ranks, {record['rate']}, {4 * ELEMENTS:,} bytes"
    yield ""
    times = "all, ms | messages, ms | predicted | computing, ms | both, ms"
    yield f"| way | {times} | dense / all | native / all | dense / both |"
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    for way in EXCHANGE_METHODS:
        if way.title not in whole:
            continue
        cells = [way.title, format_spread(whole[way.title])]
        predicted = f"{1e3 * messages_of(way, record['rate']):.4g}"
        if way.talk:
            both = median(messages[way.title]) + median(computing[way.title])
            cells += [
                format_spread(messages[way.title]),
                predicted,
                format_spread(computing[way.title]),
                f"{1e3 * both:.4g}",
            ]
        else:
            both = math.nan
            cells += ["", predicted if way.title == "dense" else "", "", ""]
        cells += [f"{median_seconds(record, other) / median(whole[way.title]):.1f}" for other in ("dense", "native")]
        cells.append(f"{median_seconds(record, 'dense') / both:.1f}" if way.talk else "")
        yield "| " + " | ".join(cells) + " |"
    yield ""


def median_seconds(record: dict[str, Any], title: str) -> float:
    """A way's seconds, NaN where it did not run."""
    return median(record["all"].get(title, [math.nan]))


def format_spread(seconds: Sequence[float]) -> str:
    """Milliseconds: median, least, largest."""
    return f"**{1e3 * median(seconds):.4g}** ({1e3 * min(seconds):.4g}–{1e3 * max(seconds):.4g})"


def break_even_density(ratios: dict[float, float]) -> float:
    """The density at which the ratio becomes 1, between neighbours on logarithmic scales; NaN where it does not."""
    for (low, a), (high, b) in pairwise(sorted(ratios.items())):
        if a <= 1 <= b:
            share = math.log(1 / a) / math.log(b / a) if b > a else 0.0
            return low * (high / low) ** share
    return math.nan


def format_density(density: float) -> str:
    """For people."""
    return f"above {BREAK_EVEN_DENSITIES[-1]:g}" if math.isnan(density) else f"{density:.2g}"


def density_ratios(record: dict[str, Any]) -> tuple[dict[float, float], dict[float, float]]:
    """Sparse by dense at each density: measured and predicted."""
    (nodes, per_node), found = record["shape"], record["seconds"]
    machine, nbytes = machine_of(record["rate"]), 4 * BREAK_EVEN_ELEMENTS
    limit = sparse_cost.dense_cost(nodes, per_node, nbytes, machine)
    measured, predicted = {}, {}
    for density in BREAK_EVEN_DENSITIES:
        measured[density] = median(found[str(density)]) / median(found["dense"])
        each = sparse_cost.HEADERS + 2 * density * nbytes
        predicted[density] = sparse_cost.allgather_cost(nodes, per_node, each, machine)[0] / limit
    return measured, predicted


def break_even_table(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Sparse by dense, measured and predicted, and where they are even."""
    heads = " | ".join(f"d = {density:g}" for density in BREAK_EVEN_DENSITIES)
    yield f"### Sparse by dense, {4 * BREAK_EVEN_ELEMENTS:,} bytes: measured (predicted)"
    yield ""
    yield f"| link | nodes x ranks | dense, ms | {heads} | even at |"
    yield "|---|---:|---:|" + "---:|" * (len(BREAK_EVEN_DENSITIES) + 1)
    for record in records:
        measured, predicted = density_ratios(record)
        nodes, per_node = record["shape"]
        limit = sparse_cost.dense_cost(nodes, per_node, 4 * BREAK_EVEN_ELEMENTS, machine_of(record["rate"]))
        cells = [record["rate"], f"{nodes} x {per_node}"]
        cells.append(f"{1e3 * median(record['seconds']['dense']):.4g} ({1e-3 * limit:.4g})")
        cells += [f"{measured[each]:.2g} ({predicted[each]:.2g})" for each in BREAK_EVEN_DENSITIES]
        cells.append(
            "**{}** ({})".format(*(format_density(break_even_density(each)) for each in (measured, predicted)))
        )
        yield "| " + " | ".join(cells) + " |"
    yield ""


# Pictures


def draw(found: dict[str, Any], out: Path) -> None:
    """Above, times of each way; below, dense by sparse against density; a column a rate."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasSVG(figure)
    above, below = figure.subplots(2, len(RATES), squeeze=False)
    for axes, record in zip(above, found.get("records", []), strict=False):
        draw_bars(axes, record)
    for axes, rate in zip(below, RATES, strict=True):
        draw_lines(axes, [each for each in found.get("even", []) if each["rate"] == rate], rate)
    figure.savefig(out, metadata={"Date": None})


def draw_bars(axes: Any, record: dict[str, Any]) -> None:
    """All, and messages and computing on machines of their own."""
    from hpccomm.bench.plot import COLOURS

    ways = [way for way in EXCHANGE_METHODS if way.title in record["all"]][::-1]
    places = range(len(ways))
    axes.barh(
        [place + 0.2 for place in places],
        [median_seconds(record, way.title) for way in ways],
        0.38,
        color=COLOURS[0],
        label="all on one machine",
    )
    talking = [median(record["messages"].get(way.title, [0.0])) for way in ways]
    working = [median(record["computing"].get(way.title, [0.0])) for way in ways]
    axes.barh([place - 0.2 for place in places], talking, 0.38, color=COLOURS[1], label="messages")
    axes.barh([place - 0.2 for place in places], working, 0.38, talking, color=COLOURS[2], label="computing of a node")
    axes.plot(
        [messages_of(way, record["rate"]) for way in ways], places, "k|", markersize=14, label="messages, predicted"
    )
    axes.set_yticks(places, [way.title for way in ways], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("seconds")
    axes.set_title(f"{NODES} x {PER_NODE} ranks, {record['rate']}, {4 * ELEMENTS:,} bytes", fontsize=10, loc="left")
    axes.legend(fontsize=7)


def draw_lines(axes: Any, records: Sequence[dict[str, Any]], rate: str) -> None:
    """Dense by sparse: points measured, lines predicted."""
    from hpccomm.bench.plot import COLOURS

    for record, colour in zip(records, COLOURS, strict=False):
        measured, predicted = density_ratios(record)
        nodes, per_node = record["shape"]
        axes.plot(list(predicted), [1 / each for each in predicted.values()], color=colour)
        points = [1 / each for each in measured.values()]
        axes.plot(list(measured), points, "o", color=colour, label=f"{nodes} x {per_node}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("density")
    axes.set_title(f"dense / sparse, {rate}: points measured, lines predicted", fontsize=10, loc="left")
    if records:
        axes.legend(fontsize=8)


def draw_by_rate(record: dict[str, Any], out: Path) -> None:
    """Dense by compressed against the links' rate: messages predicted, computing as measured; nodes of one rank."""
    import numpy as np
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from hpccomm.bench.plot import COLOURS

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasSVG(figure)
    rates = np.geomspace(0.1, 100, 31)
    for axes, nodes in zip(figure.subplots(1, 3, sharey=True), (2, 8, 32), strict=True):
        ways = [way for way in EXCHANGE_METHODS if way.talk and not way.levels and way.title in record["computing"]]
        for way, colour in zip(ways, COLOURS, strict=False):
            working = 1e6 * median(record["computing"][way.title])
            gains = []
            for rate in rates:
                machine = Machine(inter=Link(ALPHA_US, 8e-3 / rate / GOODPUT))
                rows = sparse_cost.flat_predictions(nodes, 1, 4 * ELEMENTS, DENSITY, machine)
                us = next(each.us for each in rows if each.algorithm == way.price_name)
                gains.append(sparse_cost.dense_cost(nodes, 1, 4 * ELEMENTS, machine) / (us + working))
            axes.plot(rates, gains, color=colour, label=way.title)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("Gbit/s")
        axes.set_title(f"dense / compressed, {nodes} nodes", fontsize=10, loc="left")
        axes.legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="scripts/bench_slow_links", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--rate", action="append", help=f"of the links (default: {' and '.join(RATES)})")
    parser.add_argument("--only", default="", help="ways with this in their title")
    parser.add_argument("--even", action="store_true", help="densities at which sparse and dense are even, instead")
    parser.add_argument("--json", type=Path, help="where to add what was found, and beside it the picture")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.work:
        if args.even:
            work_break_even(args.work, args.rounds)
        else:
            work(args.work, args.rounds, args.only)
        return 0
    words = ["--rounds", str(args.rounds), *(["--even"] if args.even else ["--only", args.only])]
    records = []
    for rate in args.rate or RATES:
        if args.even:
            records += [{"rate": rate, "shape": s, "seconds": launch_work(s, rate, words)} for s in BREAK_EVEN_SHAPES]
        else:
            records.append({"rate": rate, **launch_work((NODES, PER_NODE), rate, words)})
            sys.stdout.write("\n".join(table(records[-1])) + "\n")
            sys.stdout.flush()
    if args.even:
        sys.stdout.write("\n".join(break_even_table(records)) + "\n")
    if args.json:
        keep(args.json, "even" if args.even else "records", records)
    return 0


def keep(file: Path, part: str, records: Sequence[dict[str, Any]]) -> None:
    """Write this part beside what the file has of the others, and draw."""
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    rates = {each["rate"] for each in records}
    old = [each for each in found.get(part, []) if each["rate"] not in rates]
    both = sorted([*old, *records], key=lambda each: -rate_of(each["rate"]))
    found = {**found, **describe_run(["scripts/bench_slow_links", *sys.argv[1:]]), part: both}
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found, file.with_suffix(".svg"))
    if found.get("records"):
        draw_by_rate(found["records"][0], file.with_name(f"{file.stem}-when.svg"))


if __name__ == "__main__":
    sys.exit(main())
