"""One gradient over slow links, dense and compressed, on the nodes of a virtual cluster.

*n float32, from each rank's gradient to the mean, or its approximation, on every rank.*  All ways take turns in every
round.  Compressed ways run several times back to back, as an idle link lets a first burst through at once.  A time is
that of the slowest rank.  Compressed ways have three times:

- *all*: the whole call, while the processors of one machine compute for all nodes;
- *messages*: as many messages of the same lengths, prepared before and not decoded;
- *computing*: the same work with an :class:`Echo` in place of the communicator, by the ranks of one node while the
  other nodes are idle, as on separate machines; the time of the slowest node.

``--even`` searches for the density at which a sparse allgather takes as long as a dense allreduce.  ``--paths``
compares messages that all ranks gather with messages that are added inside the nodes first, and a mean in blocks of
int8 with a dense one.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks import harness
from hpccomm.bench.plot import COLOURS
from hpccomm.cluster.nodes import Cluster, rate_of
from hpccomm.layout import Link
from hpccomm.performance import sparse_cost
from hpccomm.performance.machine import Machine

NODES, PER_NODE, ELEMENTS, DENSITY = 4, 2, 1 << 24, 0.001
RANKS = NODES * PER_NODE
RATES = ("1gbit", "100mbit")
BREAK_EVEN_SHAPES, BREAK_EVEN_ELEMENTS = ((2, 1), (4, 1), (8, 1), (4, 2)), 1 << 20
BREAK_EVEN_DENSITIES = (0.001, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6)
PATH_SHAPES = {(4, 1): 1 << 24, (4, 2): 1 << 24, (8, 2): 1 << 23}
"""The elements by nodes and ranks on each; sixteen ranks share the memory of one machine."""
PATHS = ("allgather", "node", "auto")
"""Arguments of ``feedback``: flat, node-aware, and what it chooses."""
MALLOC_ENV = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
"""glibc keeps freed memory in the process, as new pages are expensive on a virtual machine."""
GOODPUT = 0.95
"""Share of a link's rate that is not headers."""
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
    """(communicator) -> a call that sends messages of the same lengths; None for dense methods."""
    price_name: str = ""
    """The row of :mod:`hpccomm.performance.sparse_cost` that prices the messages."""
    levels: bool = False
    """Dense in the node; the first rank of each node compresses and exchanges."""


class Echo:
    """A communicator whose other ranks send what this rank sends: the work of an exchange without its messages."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.messages = rank, size, list[Any]()

    def Allgather(self, mine: Any, room: Any) -> None:
        """Copies of ``mine``."""
        room.reshape(self.size, -1)[...] = mine

    def Allgatherv(self, mine: Any, room: Any) -> None:
        """Copies of ``mine``, as all messages have its length."""
        self.Allgather(mine, room[0])

    def Allreduce(self, mine: Any, room: Any, op: Any = None) -> None:
        """The maximum of equal vectors."""
        room[...] = mine

    def Isend(self, message: Any, to: int, tag: int) -> Echo:
        """Keep a message for :meth:`Recv`."""
        self.messages.append(message)
        return self

    def Wait(self) -> None:
        """The message was kept."""

    def Probe(self, source: int, tag: int, status: Any) -> None:
        """The length of the next message."""
        from mpi4py import MPI

        status.Set_elements(MPI.BYTE, self.messages[0].size)

    def Recv(self, room: Any, source: int, tag: int) -> None:
        """The next message."""
        room[...] = self.messages.pop(0)


# Ways


def native(comm: Any, gradient: Any) -> Call:
    """The MPI underneath."""
    import numpy as np
    from mpi4py import MPI

    plain, out = MPI.Intracomm(comm), np.empty_like(gradient)
    return lambda: plain.Allreduce(gradient, out)


def dense(comm: Any, gradient: Any) -> Call:
    """Our allreduce, by the algorithm of the tuning table."""
    import numpy as np

    out = np.empty_like(gradient)
    return lambda: comm.Allreduce(gradient, out)


def feedback_exchange(compressor: Callable[[], Any], momentum: float = 0.0, path: str = "auto") -> Make:
    """Every rank compresses its own gradient."""

    def make(comm: Any, gradient: Any) -> Call:
        from hpccomm.algorithms.error_feedback import feedback

        return update_of(feedback(compressor(), comm, momentum, exchange=path), gradient)

    return make


def blocks(comm: Any, gradient: Any) -> Call:
    """A mean in blocks of int8, in two phases."""
    from hpccomm import block_mean

    return update_of(block_mean(comm, "int8"), gradient)


def update_of(method: Any, gradient: Any) -> Call:
    """Updates of a method, one after the other."""
    state = [method.init(gradient)]

    def call() -> Any:
        mean, state[0] = method.update(gradient, state[0], gradient)
        return mean

    return call


def topk() -> Any:
    """The largest 0.1 %."""
    from hpccomm import topk as made

    return made(DENSITY)


def threshold() -> Any:
    """GTC's threshold, which 0.1 % of the elements reach."""
    from hpccomm import threshold as made

    return made(density=DENSITY)


def phases(comm: Any, gradient: Any) -> Call:
    """1-bit reduce-scatter and allgather."""
    import numpy as np

    from hpccomm.collectives.compressed.onebit import onebit_allreduce, server_elements

    worker = np.zeros_like(gradient)
    server = np.zeros(server_elements(gradient.size, comm.rank, comm.size), np.float32)
    return lambda: onebit_allreduce(comm, gradient, worker, server).mean


def leader_exchange(make: Make) -> Make:
    """A dense reduction in the node, then ``make`` between the nodes."""

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
    """Messages as long as 0.1 % of the elements, to all ranks."""

    def talk(comm: Any) -> Call:
        import numpy as np

        from hpccomm.collectives.compressed.messages import gather_messages

        message = np.zeros(sparse_cost.HEADERS + round(element_bytes * DENSITY * ELEMENTS), np.uint8)
        return lambda: gather_messages(comm, message)

    return talk


def alltoall_messages(comm: Any) -> Call:
    """A block of bits to each rank, and back."""
    import numpy as np

    from hpccomm.collectives.compressed.messages import CountingComm, allgatherv

    wire = CountingComm(comm)
    message = np.zeros(4 + ELEMENTS // 8 // comm.size, np.uint8)
    lengths = np.full(comm.size, message.size)
    return lambda: (wire.alltoall([message] * comm.size), allgatherv(wire, message, lengths))


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


PATH_METHODS = {
    "dense": dense,
    "int8": blocks,
    **{f"DGC 0.1 %, {path}": feedback_exchange(topk, 0.9, path) for path in PATHS},
    **{f"GTC 0.1 %, {path}": feedback_exchange(threshold, 0.0, path) for path in PATHS},
}


# What each rank does


def wait_idle(comm: Any) -> None:
    """A barrier that sleeps, so that other ranks have the processor."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


def work(rounds: int, only: str) -> dict[str, dict[str, list[float]]]:
    """On every rank: seconds of each way, a number a round."""
    import numpy as np
    from mpi4py import MPI

    from hpccomm.communicator import Communicator

    world = Communicator(MPI.COMM_WORLD)
    node, nodes = world.intra_node, world.inter_node
    gradient = np.random.default_rng(world.rank).standard_normal(ELEMENTS, np.float32)
    echo = Echo(world.rank, world.size)
    levels = SimpleNamespace(intra_node=node, inter_node=Echo(nodes.rank, nodes.size))

    def compute(call: Call) -> float:
        mine = 0.0
        for turn in range(nodes.size):
            wait_idle(world)
            if nodes.rank == turn:
                mine = harness.time_local(call, BACK_TO_BACK)
        wait_idle(world)
        return harness.max_over_ranks(world, mine)

    def turns_of(way: ExchangeMethod) -> Callable[[], tuple[float, ...]]:
        call = way.make(world, gradient)
        if way.talk is None:
            return lambda: (harness.time_collective(world, call),)
        own = way.make(levels if way.levels else echo, gradient)

        def turn() -> tuple[float, ...]:
            whole = harness.time_collective(world, call, BACK_TO_BACK)
            talk = way.talk(nodes if way.levels else world) if node.rank == 0 or not way.levels else int  # type: ignore[misc]
            return whole, harness.time_collective(world, talk, 2 * BACK_TO_BACK), compute(own)

        return turn

    turns = harness.take_turns({way.title: turns_of(way) for way in EXCHANGE_METHODS if only in way.title}, rounds)
    found: dict[str, dict[str, list[float]]] = {"all": {}, "messages": {}, "computing": {}}
    for title, rows in turns.items():
        for name, values in zip(found, zip(*rows, strict=True), strict=False):
            found[name][title] = list(values)
    return found


def work_break_even(rounds: int) -> dict[str, list[float]]:
    """On every rank: seconds of a dense allreduce, and of sparse ones of rising density."""
    import numpy as np
    from mpi4py import MPI

    from hpccomm.collectives.compressed.sparse import sparse_allreduce
    from hpccomm.communicator import Communicator
    from hpccomm.kernels.selection.reference import cell_indices

    world = Communicator(MPI.COMM_WORLD)
    n = BREAK_EVEN_ELEMENTS
    gradient = np.random.default_rng(world.rank).standard_normal(n, np.float32)
    calls: dict[str, Call] = {"dense": dense(world, gradient)}
    for density in BREAK_EVEN_DENSITIES:
        index = cell_indices(n, round(density * n), world.rank)
        calls[str(density)] = partial(sparse_allreduce, world, index, gradient[index], n, algorithm="allgather")
    turns = {name: partial(harness.time_collective, world, call) for name, call in calls.items()}
    return harness.take_turns(turns, rounds, warmup=0)


def work_paths(rounds: int, elements: int) -> dict[str, list[float]]:
    """On every rank: seconds of the ways in :data:`PATH_METHODS`, which take turns in an order that changes."""
    import numpy as np
    from mpi4py import MPI

    from hpccomm.communicator import Communicator

    world = Communicator(MPI.COMM_WORLD)
    gradient = np.random.default_rng(world.rank).standard_normal(elements, np.float32)
    turns = {
        title: partial(harness.time_collective, world, make(world, gradient), BACK_TO_BACK if "%" in title else 1)
        for title, make in PATH_METHODS.items()
    }
    return harness.take_turns(turns, rounds, shuffle=True)


# What is measured


def launch_work(shape: tuple[int, int], rate: str, words: Sequence[str]) -> Any:
    """The result of this module's ``--work`` on a cluster made for it."""
    nodes, per_node = shape
    where = harness.Shape(nodes, (per_node,) * nodes, "block", rate)
    with Cluster(nodes, rate, "slow") as cluster:
        run = harness.on_cluster(cluster, where, MALLOC_ENV, 3600)
        return harness.launch(run, ["-m", "benchmarks.slow_links", *words], "--work")


def machine_of(rate: str) -> Machine:
    """The machine model of a link rate."""
    return Machine(inter=Link(ALPHA_US, 8e6 / rate_of(rate) / GOODPUT))


def messages_of(way: ExchangeMethod, rate: str) -> float:
    """Predicted seconds of the messages of a way, or of the best dense allreduce."""
    machine = machine_of(rate)
    if way.talk is None:
        return 1e-6 * sparse_cost.dense_cost(NODES, PER_NODE, 4 * ELEMENTS, machine)
    rows = sparse_cost.flat_predictions(NODES, 1 if way.levels else PER_NODE, 4 * ELEMENTS, DENSITY, machine)
    return next(1e-6 * each.us for each in rows if each.algorithm == way.price_name)


TIMES = ("all, ms", "messages, ms", "predicted", "computing, ms", "both, ms")


def table(record: dict[str, Any]) -> str:
    """Times, and ratios to our dense allreduce and to native."""
    rows = []
    for way in (way for way in EXCHANGE_METHODS if way.title in record["all"]):
        whole = record["all"][way.title]
        predicted, both, cells = f"{1e3 * messages_of(way, record['rate']):.4g}", math.nan, ["", "", "", ""]
        if way.talk:
            messages, computing = (record[each][way.title] for each in ("messages", "computing"))
            both = median(messages) + median(computing)
            spreads = [harness.spread(each, unit=1e3) for each in (messages, computing)]
            cells = [spreads[0], predicted, spreads[1], f"{1e3 * both:.4g}"]
        elif way.title == "dense":
            cells[1] = predicted
        cells += [f"{median_seconds(record, other) / median(whole):.1f}" for other in ("dense", "native")]
        gain = f"{median_seconds(record, 'dense') / both:.1f}" if way.talk else ""
        rows.append([way.title, harness.spread(whole, unit=1e3), *cells, gain])
    head = ("way", *TIMES, "dense / all", "native / all", "dense / both")
    title = f"### {NODES} x {PER_NODE} ranks, {record['rate']}, {4 * ELEMENTS:,} bytes"
    return f"{title}\n\n{harness.table(head, rows, words=1)}"


def median_seconds(record: dict[str, Any], title: str) -> float:
    """A way's seconds, NaN if it did not run."""
    return median(record["all"].get(title, [math.nan]))


def break_even_density(ratios: dict[float, float]) -> float:
    """The density at which the ratio is 1, interpolated on logarithmic scales; NaN if there is none."""
    for (low, a), (high, b) in pairwise(sorted(ratios.items())):
        if a <= 1 <= b:
            share = math.log(1 / a) / math.log(b / a) if b > a else 0.0
            return low * (high / low) ** share
    return math.nan


def format_density(density: float) -> str:
    """A density in words."""
    return f"above {BREAK_EVEN_DENSITIES[-1]:g}" if math.isnan(density) else f"{density:.2g}"


def density_ratios(record: dict[str, Any]) -> tuple[dict[float, float], dict[float, float]]:
    """Time of sparse divided by that of dense at each density: measured and predicted."""
    (nodes, per_node), found = record["shape"], record["seconds"]
    machine, nbytes = machine_of(record["rate"]), 4 * BREAK_EVEN_ELEMENTS
    limit = sparse_cost.dense_cost(nodes, per_node, nbytes, machine)
    measured, predicted = {}, {}
    for density in BREAK_EVEN_DENSITIES:
        measured[density] = median(found[str(density)]) / median(found["dense"])
        predicted[density] = sparse_cost.price_sparse(nodes, per_node, nbytes, density, machine) / limit
    return measured, predicted


def break_even_table(records: Sequence[dict[str, Any]]) -> str:
    """Sparse by dense, measured and predicted, and the densities at which they are equal."""
    rows = []
    for record in records:
        measured, predicted = density_ratios(record)
        nodes, per_node = record["shape"]
        limit = sparse_cost.dense_cost(nodes, per_node, 4 * BREAK_EVEN_ELEMENTS, machine_of(record["rate"]))
        even = [format_density(break_even_density(each)) for each in (measured, predicted)]
        cells = [record["rate"], f"{nodes} x {per_node}"]
        cells.append(f"{1e3 * median(record['seconds']['dense']):.4g} ({1e-3 * limit:.4g})")
        cells += [f"{measured[each]:.2g} ({predicted[each]:.2g})" for each in BREAK_EVEN_DENSITIES]
        rows.append([*cells, f"**{even[0]}** ({even[1]})"])
    head = ("link", "nodes x ranks", "dense, ms", *(f"d = {density:g}" for density in BREAK_EVEN_DENSITIES), "even at")
    title = f"### Sparse by dense, {4 * BREAK_EVEN_ELEMENTS:,} bytes: measured (predicted)"
    return f"{title}\n\n{harness.table(head, rows, words=2)}"


def path_table(records: Sequence[dict[str, Any]]) -> str:
    """Times, int8 by dense, and flat by node-aware, round by round."""
    rows = []
    for record in records:
        (nodes, per_node), found = record["shape"], record["seconds"]
        cells = [record["rate"], f"{nodes} x {per_node}", str(4 * PATH_SHAPES[nodes, per_node] >> 20)]
        cells += [harness.spread(found[title], unit=1e3) for title in PATH_METHODS]
        cells.append(harness.spread(harness.ratios(found["int8"], found["dense"]), ".2f"))
        for name in ("DGC 0.1 %", "GTC 0.1 %"):
            cells.append(harness.spread(harness.ratios(found[f"{name}, allgather"], found[f"{name}, node"]), ".2f"))
        rows.append(cells)
    ways = (f"{title}, ms" for title in PATH_METHODS)
    head = ("link", "nodes x ranks", "MB", *ways, "int8 / dense", "DGC, allgather / node", "GTC, allgather / node")
    return harness.table(head, rows, words=2)


# Pictures


def draw(found: dict[str, Any], out: Path) -> None:
    """Upper row: times of each way; lower row: dense / sparse against density; a column a rate."""
    figure, [above, below] = harness.panels(11, 9, 2, len(RATES))
    for axes, record in zip(above, found.get("records", []), strict=False):
        draw_bars(axes, record)
    for axes, rate in zip(below, RATES, strict=True):
        draw_lines(axes, [each for each in found.get("even", []) if each["rate"] == rate], rate)
    harness.save(figure, out)


def draw_bars(axes: Any, record: dict[str, Any]) -> None:
    """The whole call; below it messages and computing on separate machines."""
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
    harness.put_legend_below(axes)


def draw_lines(axes: Any, records: Sequence[dict[str, Any]], rate: str) -> None:
    """Dense / sparse: points measured, lines predicted."""
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
    """Dense / compressed against the links' rate: messages predicted, computing measured; nodes of one rank."""
    import numpy as np

    figure, [grid] = harness.panels(11, 4, 1, 3, sharey=True)
    rates = np.geomspace(0.1, 100, 31)
    for axes, nodes in zip(grid, (2, 8, 32), strict=True):
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
    harness.save(figure, out)


def identify(record: dict[str, Any]) -> tuple[Any, ...]:
    """The rate, and with ``--even`` and ``--paths`` the shape."""
    return record["rate"], *record.get("shape", ())


def main() -> int:
    """Measure what the file lacks, print, draw; inside a launch, measure."""
    parser = harness.parser("slow-links", __doc__, rounds=ROUNDS, file="slow-links.json")
    parser.add_argument(
        "--rate", action="append", help=f"of the links (default: {' and '.join(RATES)}, with --paths the latter)"
    )
    parser.add_argument("--only", default="", help="ways with this in their title")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--even", action="store_true", help="densities at which sparse and dense are even, instead")
    kinds.add_argument("--paths", action="store_true", help="flat and node-aware messages, int8 and dense, instead")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--elements", type=int, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    if args.work:
        found: Any = (
            work_paths(args.rounds, args.elements)
            if args.paths
            else work_break_even(args.rounds)
            if args.even
            else work(args.rounds, args.only)
        )
        harness.write_on_rank0(args.work, found)
        return 0
    record = harness.Record(args.file, identify, ["records", "even", "paths"], args.seconds)
    words = ["--rounds", str(args.rounds), *(["--even"] if args.even else ["--only", args.only])]

    def measure(rate: str, *shape: int) -> dict[str, Any]:
        if args.paths:
            words[2:] = ["--paths", "--elements", str(PATH_SHAPES[shape[0], shape[1]])]
        if shape:
            return {"rate": rate, "shape": shape, "seconds": launch_work((shape[0], shape[1]), rate, words)}
        return {"rate": rate, **launch_work((NODES, PER_NODE), rate, words)}

    shapes: Sequence[Any] = list(PATH_SHAPES) if args.paths else BREAK_EVEN_SHAPES if args.even else [()]
    rates = args.rate or (RATES[1:] if args.paths else RATES)
    keys = [(rate, *shape) for rate in rates for shape in shapes]
    record.recall_all(keys, lambda key: measure(*key), "paths" if args.paths else "even" if args.even else "records")
    for rows in record.lists.values():
        rows.sort(key=lambda each: -rate_of(each["rate"]))
    harness.emit(*map(table, record.rows))
    harness.emit(*([break_even_table(record.lists["even"])] if record.lists["even"] else []))
    harness.emit(*([path_table(record.lists["paths"])] if record.lists["paths"] else []))
    plot = harness.plot_file(args, args.file)
    draw(record.data, plot)
    if record.rows:
        draw_by_rate(record.rows[0], plot.with_name(f"{plot.stem}-when.svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
