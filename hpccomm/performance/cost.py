"""Prices a schedule on a machine by latencies and bandwidths inside and between nodes, with links that ranks share.

*p ranks on N nodes, n bytes, k the round; alpha is the latency of a message, beta the time of one of its bytes, gamma
the time to sum a byte; all in microseconds.*  A message starts when both its ends are ready and takes alpha + bytes x
beta; ranks of a node that send between nodes in the same round share the link of the node; links carry both directions
at once.  The ranks of a node that meet in a node step wait for each other; then it takes one alpha inside the node and
beta for each byte that a rank lacks.  The receiver sums afterwards.  A rank starts its next round when its own
messages of this round are complete; there is no barrier between rounds, so the model includes late ranks and the delays
that they pass on.

A schedule that is the same for every node (or rank) is simulated for one node only and checked on three others, so a
ring of 10,000 ranks takes a second.  Chains and trees are cut into segments: the first segment pays the whole path,
each further one the time of the busiest link.  The model is Hockney's (Parallel Computing 1994) with the reduction term
of Thakur, Rabenseifner & Gropp (Int. J. High Perform. Comput. Appl. 2005).

On a machine with measured round costs (:mod:`hpccomm.performance.measured`), these price every algorithm that is not
cut into segments, on shapes near the measured ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.hierarchical import HIERARCHICAL, select_form
from hpccomm.collectives.schedule import NOBODY, Algorithm, NodeStep, Step, members_of_nodes
from hpccomm.performance.machine import Machine
from hpccomm.performance.measured import costs_for_shape

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

FACTORS = {"allreduce": 2, "reduce_scatter": 1, "allgather": 1}
"""Bus bandwidth is this times (p-1)/p times bytes per time; for other collectives bytes per time (nccl-tests)."""

INPUT_COPIES = {"allreduce": "vector", "reduce_scatter": "vector", "allgather": "block"}
"""The data that a call copies into its work buffer before the first message."""

MODEL, MEASURED = "alpha and beta", "measured rounds"
"""The sources of a prediction."""

MOST_SEGMENTS = 4096
SMALLEST_SEGMENT = 1024
"""Bytes of the smallest segment: shorter ones are not worth a message."""


class Price(NamedTuple):
    """The price of a collective."""

    us: float
    rounds: int
    segments: int
    """The best number of segments of every block (1 where segments do not help)."""


class Prediction(NamedTuple):
    """The prediction for one algorithm."""

    algorithm: str
    us: float
    rounds: int
    segments: int
    algbw: float
    """GB/s: bytes of the collective per time."""
    busbw: float
    """GB/s: the bandwidth of the busiest link in the best algorithm (nccl-tests)."""
    wire: float
    """The least time that the link of a node permits, as a fraction of ``us``."""
    source: str = MODEL
    """``MODEL`` or ``MEASURED``."""


def price(
    algorithm: Algorithm,
    nodes: Iterable[int],
    nbytes: float,
    machine: Machine | None = None,
    root: int | None = None,
    segments: int | None = None,
) -> Price:
    """Price ``nbytes`` bytes on ranks on ``nodes`` (any integers, one a rank).

    ``nbytes`` is the whole vector: the input of a reduce-scatter, the result of an allgather.  ``root`` (default 0) is
    for rooted collectives.  ``segments`` None searches for the best number.  The schedule must be correct: verify it
    first.
    """
    home = np.unique(np.asarray(list(nodes)), return_inverse=True)[1].astype(np.int32)
    rooted = () if root is None else (root,)
    choices = segment_counts(algorithm, nbytes) if segments is None else [segments]
    load = Load(nbytes, np.array(choices))
    simulation = simulate(algorithm, home, load, machine or Machine(), rooted)
    total = simulation.ready.max(axis=1) + (load.segments - 1) * simulation.busy_time()
    best = int(np.argmin(total))
    return Price(float(total[best]), simulation.rounds, choices[best])


def segment_counts(algorithm: Algorithm, nbytes: float) -> list[int]:
    """The numbers of segments to try."""
    most = max(1, min(MOST_SEGMENTS, int(nbytes) // SMALLEST_SEGMENT)) if algorithm.segmented else 1
    return [1 << k for k in range(most.bit_length())]


# --- simulation ------------------------------------------------------------------------------------


class AsymmetryError(Exception):
    """The schedule does not repeat from node to node, so all ranks must be simulated."""


class Load(NamedTuple):
    """The bytes to move."""

    nbytes: float
    segments: Ints
    """The numbers of segments to try."""


class RoundMessages(NamedTuple):
    """The messages of one round; times have a row for each number of segments."""

    into: Any
    """The receivers."""
    out: Any
    """Their senders."""
    wire: Floats
    """The time of each message beside the others of this round."""
    busy: Floats
    """The time of each message alone."""
    sums: Floats
    """The time that the receiver sums."""
    leaves: Floats
    """The blocks that leave and enter each node."""


class Simulation:
    """A simulation of all rounds for several numbers of segments at once.

    Ranks repeat with ``period``: rank r takes the steps of rank r mod period, with peers at the same distance.
    """

    def __init__(self, home: Ints, period: int, load: Load, blocks: int, machine: Machine) -> None:
        self.home, self.p, self.period, self.machine = home, home.size, period, machine
        self.block = load.nbytes / load.segments / blocks
        self.segmented = bool(load.segments.max() > 1)
        self.nodes = int(home.max()) + 1
        self.periods_per_node = max(1, self.p // (self.nodes * period))
        self.copies = np.unique([0, 1, self.p // period // 2, self.p // period - 1]) * period % self.p
        if period == self.p:
            self.copies = np.zeros(1, dtype=np.int64)
        self.rounds = 0
        self.ready = np.zeros((load.segments.size, period))
        self.sends, self.receives = np.zeros_like(self.ready), np.zeros_like(self.ready)
        self.leaves = np.zeros((2, self.nodes if period == self.p else 1))
        self.ranks = (self.copies[:, None] + np.arange(period)).astype(np.int32).ravel()
        self.last: tuple[Ints, Any, bool] | None = None

    def run_round(self, step: Step) -> None:
        """Simulate one round."""
        self.rounds += 1
        source, count = self.peers_of_period(step.source), self.counts_of_period(step.recv[1] - step.recv[0])
        if not self.is_repeat(source, count, step.reduce):
            self.wires = self.messages_of_round(source, count, step.reduce)
        if self.wires.out.size:
            self.advance_clocks(self.wires)

    def run_node_step(self, step: NodeStep) -> None:
        """Simulate a collective inside each node: its ranks wait for each other, then each receives what it lacks."""
        ranks = members_of_nodes(step.node)[1]
        own = step.end - step.first
        held = np.where(ranks >= 0, own[ranks], 0)
        whole = held.sum(axis=1)[step.node]
        gathers = step.collective == "allgather"
        others = (ranks >= 0).sum(axis=1)[step.node] - 1
        blocks = whole - own if gathers else own * others
        takes = (step.node != NOBODY) & (others > 0)
        counts = self.counts_of_period(np.where(takes, blocks, 0)[self.ranks])
        takes = self.counts_of_period(takes[self.ranks].astype(np.int64)) > 0
        per_block = self.machine.intra.beta + (0.0 if gathers else self.machine.gamma)
        done = np.where(takes, self.machine.intra.alpha, 0.0) + self.block[:, None] * counts * per_block
        node = self.home if self.period == self.p else np.zeros(self.period, dtype=np.int64)
        for each in range(int(node.max()) + 1):
            here = (node == each) & takes
            if here.any():
                self.ready[:, here] = (self.ready[:, here].max(axis=1) + done[:, here].max(axis=1))[:, None]

    def advance_clocks(self, ends: RoundMessages) -> None:
        """Advance the clocks of the two ends of every message."""
        senders = np.take(self.ready, ends.out, axis=1)
        done = np.maximum(senders, self.ready[:, ends.into]) + ends.wire
        self.ready[:, ends.into] = done + ends.sums
        self.ready[:, ends.out] = np.maximum(np.take(self.ready, ends.out, axis=1), done)
        if self.segmented:
            self.sends[:, ends.out] += ends.busy
            self.receives[:, ends.into] += ends.busy + ends.sums
            self.leaves += ends.leaves

    def is_repeat(self, source: Ints, count: Any, reduce: bool) -> bool:
        """Whether this round costs the same as the last: the same ranks exchange as many blocks."""
        last, self.last = self.last, (source, count, reduce)
        return (
            last is not None
            and last[2] == reduce
            and np.array_equal(last[0], source)
            and np.array_equal(last[1], count)
        )

    def messages_of_round(self, source: Ints, count: Any, reduce: bool) -> RoundMessages:
        """The messages of a round and their times."""
        into = np.flatnonzero(source >= 0)
        source, count = source[into], count[into] if np.ndim(count) else count
        crosses = self.home[source] != self.home[into]
        intra, inter = self.machine.intra, self.machine.inter
        alpha, beta = np.where(crosses, inter.alpha, intra.alpha), np.where(crosses, inter.beta, intra.beta)
        nbytes = self.block[:, None] * count
        link = self.count_link_sharers(source, into, crosses) if crosses.any() else 1
        sums = self.machine.gamma * nbytes if reduce else np.zeros((1, 1))
        leaves = self.count_crossing_blocks(source, into, np.where(crosses, count, 0))
        wire = alpha + nbytes * beta
        receivers = slice(None) if into.size == self.period else into
        return RoundMessages(receivers, source % self.period, wire + nbytes * beta * (link - 1), wire, sums, leaves)

    def peers_of_period(self, peer: Any) -> Any:
        """The peers of one period, after a check that those of its copies are at the same distances."""
        each = np.broadcast_to(peer, self.ranks.shape).reshape(self.copies.size, self.period)
        if self.copies.size > 1:
            relative = np.where(each < 0, each, (each - self.copies[:, None]) % self.p)
            if (relative != relative[0]).any():
                raise AsymmetryError
        return each[0]

    def counts_of_period(self, count: Any) -> Any:
        """The numbers of blocks of one period, after a check that its copies have the same."""
        if np.ndim(count) == 0:
            return count
        each = np.reshape(count, (self.copies.size, self.period))
        if self.copies.size > 1 and (each != each[0]).any():
            raise AsymmetryError
        return each[0]

    def count_link_sharers(self, source: Ints, into: Any, crosses: Any) -> Any:
        """The number of messages that share the busier of the two node links of each message."""
        if self.period < self.p:
            return np.where(crosses, self.periods_per_node * np.count_nonzero(crosses), 1)
        away, home = self.home[source], self.home[into]
        leaving = np.bincount(away[crosses], minlength=self.nodes)
        entering = np.bincount(home[crosses], minlength=self.nodes)
        return np.where(crosses, np.maximum(leaving[away], entering[home]), 1)

    def count_crossing_blocks(self, source: Ints, into: Any, crossing: Any) -> Floats:
        """The blocks that leave and the blocks that enter each node."""
        if self.period < self.p:
            return np.full((2, 1), self.periods_per_node * crossing.sum())
        away = np.bincount(self.home[source], weights=crossing, minlength=self.nodes)
        home = np.bincount(self.home[into], weights=crossing, minlength=self.nodes)
        return np.stack([away, home])

    def busy_time(self) -> Floats:
        """The time for which the busiest rank or node link is occupied by one segment."""
        ranks = np.maximum(self.sends, self.receives).max(axis=1)
        return np.maximum(ranks, self.leaves.max() * self.block * self.machine.inter.beta)


def simulate(algorithm: Algorithm, home: Ints, load: Load, machine: Machine, rooted: tuple[int, ...]) -> Simulation:
    """Simulate one period if the schedule repeats from node to node or rank to rank, else all ranks."""
    for period in periods(home):
        simulation = Simulation(home, period, load, algorithm.blocks(home.size), machine)
        try:
            for step in algorithm.steps(simulation.ranks, home.size, *rooted):
                simulation.run_node_step(step) if isinstance(step, NodeStep) else simulation.run_round(step)
        except AsymmetryError:
            continue
        return simulation
    raise AssertionError("the last period is all ranks")


def periods(home: Ints) -> list[int]:
    """Rotations of the ranks that map nodes to nodes, in ascending order; p, the identity, last."""
    p, nodes = home.size, int(home.max()) + 1
    found = [1] if p > 1 and preserves(home, 1) else []
    per_node = p // nodes
    if 1 < per_node < p and p % per_node == 0 and (home.reshape(-1, per_node) == home[::per_node, None]).all():
        found.append(per_node)
    return [*found, p]


def preserves(home: Ints, rotation: int) -> bool:
    """Whether a rotation of the ranks maps nodes to nodes."""
    pairs = home.astype(np.int64) * home.size + np.roll(home, -rotation)
    return bool(np.unique(pairs).size == int(home.max()) + 1)


# --- comparisons -----------------------------------------------------------------------------------


def predict(
    collective: str, nodes: int, per_node: int, nbytes: float, machine: Machine | None = None
) -> list[Prediction]:
    """The predictions for all algorithms of a collective on ``nodes`` x ``per_node`` ranks, the fastest first."""
    machine = machine or Machine()
    found = [
        prediction(name, collective, nodes, per_node, nbytes, machine)
        for name in candidates(collective, nodes, per_node)
    ]
    return sorted(found, key=lambda each: each.us)


def candidates(collective: str, nodes: int, per_node: int) -> Iterator[str]:
    """The algorithms that can be priced."""
    yield from ALGORITHMS.get(collective, {})
    if collective in HIERARCHICAL and nodes > 1 and per_node > 1:
        yield "hierarchical"


@lru_cache(maxsize=1024)
def prediction(name: str, collective: str, nodes: int, per_node: int, nbytes: float, machine: Machine) -> Prediction:
    """The prediction for one algorithm on nodes x per_node ranks, numbered by node."""
    home = np.repeat(np.arange(nodes), per_node)
    algorithm = HIERARCHICAL[collective](home) if name == "hierarchical" else ALGORITHMS[collective][name]
    cost, source = price(algorithm, home, nbytes, machine), MODEL
    measured = price_by_rounds(name, collective, (nodes, per_node), nbytes, machine)
    if measured is not None:
        cost, source = cost._replace(us=measured), MEASURED
    algbw = nbytes / cost.us / 1e3 if cost.us else 0.0
    limit = wire_limit(collective, nodes, per_node, nbytes, machine)
    wire = limit / cost.us if cost.us else 1.0
    return Prediction(name, *cost, algbw, algbw * bus_factor(collective, nodes * per_node), wire, source)


def price_by_rounds(
    name: str, collective: str, shape: tuple[int, int], nbytes: float, machine: Machine
) -> float | None:
    """Microseconds by the machine's measured round costs; None where they do not cover the algorithm."""
    known = costs_for_shape(machine.curves, shape)
    if known is None or not nbytes:
        return None
    if collective not in INPUT_COPIES:
        return None
    home = np.repeat(np.arange(shape[0]), shape[1])
    if name == "hierarchical":
        return known.price_form(select_form(collective, home, nbytes, machine.inter), home, nbytes)
    algorithm = ALGORITHMS[collective][name]
    if algorithm.segmented:
        return None
    return known.price(algorithm, home, nbytes, nbytes / (home.size if INPUT_COPIES[collective] == "block" else 1))


def bus_factor(collective: str, p: int) -> float:
    """The ratio of busbw to algbw."""
    return FACTORS[collective] * (p - 1) / p if collective in FACTORS else 1.0


def wire_limit(collective: str, nodes: int, per_node: int, nbytes: float, machine: Machine) -> float:
    """The least time, in microseconds, that the links between nodes (on one node: between ranks) permit."""
    ends, link = (nodes, machine.inter) if nodes > 1 else (per_node, machine.intra)
    return bus_factor(collective, ends) * nbytes * link.beta if ends > 1 else 0.0
