"""Prices a collective by the measured costs of its rounds, as functions of the message length.

*A round is the work of all ranks between two waits; its type has the number of messages that leave a node and that stay
inside one, whether ranks exchange in pairs, and whether they reduce.*  The time of a round is not linear in the message
length: TCP changes its protocol, links pass short bursts at full speed, ranks share cores.  So the cost of each round
type is measured at several lengths with all ranks taking part (parametrised LogP: Kielmann, Bal & Verstoep, IPDPS
workshops 2000).  A point has two times: a cold round, which is a whole call, and a warm round, which follows another
one in the same call.  So effects that occur only at the start of a call count once: ranks leave a barrier one after the
other, an idle link passes a first burst for free, and both directions of a link are in use until its two ends drift
apart.

A collective itself is never a point: its price is a sum over its rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from math import exp, log, log2
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives.hierarchical import Form
from hpccomm.collectives.lowering import order_turns
from hpccomm.collectives.schedule import Algorithm, NodeStep, Step, even_cuts, members_of_nodes

Shape = tuple[int, int]
"""Nodes, and ranks a node."""

REACH = 2.0
"""The largest distance, in powers of two, at which a measured shape is used."""
ITEM = 4
"""Bytes of an element: blocks are cut between elements."""
LOADED_LINK_BYTES = 1 << 17
"""Bytes that leave a node from which a round reveals the bandwidth of the link."""
LINK_BOUND_RATIO = 1.15
"""Up to this ratio to the least time of the link, a round leaves the cores free for other work."""
CONCURRENT = "pieces"
"""The ``what`` of rounds of concurrent messages, as tuning files spell it."""


class RoundType(NamedTuple):
    """The type of a measured round.

    ``what`` is ``"round"``: at most one message a rank; ``CONCURRENT``: between the nodes, as many concurrent messages
    of at most ``hierarchical.MESSAGE_BYTES`` as the bytes need; ``"short"``: a round of the hierarchical allreduce of a
    short vector, with its work inside the nodes; ``"scatter"`` and ``"gather"``: a reduce-scatter and an allgather
    inside the nodes; ``"copy"``: a local copy; ``"call"``: a call without elements.
    """

    what: str
    crossing: int = 0
    """Messages that leave or enter a node: the largest number of any node."""
    inside: int = 0
    """Messages inside a node: the largest number of any node."""
    messages: int = 0
    """Messages of all ranks."""
    paired: bool = False
    """Whether every sender receives from the same rank."""
    reduce: bool = False
    """Whether receivers reduce."""


class Point(NamedTuple):
    """The times of a round at one length, in microseconds."""

    bytes: int
    """Bytes of a message; of all messages of a rank for concurrent ones; of the vector for other types."""
    cold: float
    """The round as a whole call, after a barrier."""
    warm: float
    """Each further round of the same call."""


class CostCurve(NamedTuple):
    """The measured costs of one round type on nodes x per_node ranks."""

    nodes: int
    per_node: int
    kind: RoundType
    points: tuple[Point, ...]
    """In ascending order of bytes."""

    def cold_us(self, nbytes: float) -> float:
        """Microseconds of a cold round."""
        return interpolate([(point.bytes, point.cold) for point in self.points], nbytes)

    def warm_us(self, nbytes: float) -> float:
        """Microseconds of a warm round."""
        return interpolate([(point.bytes, point.warm) for point in self.points], nbytes)


class Round(NamedTuple):
    """A round of a schedule, with its type and its messages."""

    kind: RoundType
    bytes: float
    """Bytes of its longest message."""
    to: npt.NDArray[np.int64]
    """``(p,)``: the rank to which each rank sends, -1 for none."""
    source: npt.NDArray[np.int64]
    """``(p,)``: the rank from which each rank receives, -1 for none."""


@cache
def distance(known: Shape, asked: Shape) -> float:
    """The distance of two shapes in powers of two: the larger of that in nodes and that in ranks a node."""
    if (known[0] == 1) != (asked[0] == 1):
        return float("inf")
    return max(abs(log2(a / b)) for a, b in zip(known, asked, strict=True))


@cache
def distance_key(known: Shape, asked: Shape) -> tuple[float, float]:
    """The distance, and the sum of both distances to break ties."""
    both = sum(abs(log2(a / b)) for a, b in zip(known, asked, strict=True))
    return distance(known, asked), both


def interpolate(points: Sequence[tuple[int, float]], nbytes: float) -> float:
    """The time for ``nbytes``, interpolated between measured (bytes, time) in ascending order."""
    low = max((point for point in points if point[0] <= nbytes), default=points[0])
    high = min((point for point in points if point[0] >= nbytes), default=points[-1])
    if low[0] >= high[0]:
        return low[1] * max(1.0, nbytes / max(low[0], 1))
    fraction = (log(nbytes) - log(max(low[0], 0.5))) / (log(high[0]) - log(max(low[0], 0.5)))
    return exp(log(low[1]) + fraction * (log(high[1]) - log(low[1])))


# --- rounds of a schedule --------------------------------------------------------------------------


def rounds(algorithm: Algorithm, nodes: Iterable[int], nbytes: float, what: str = "round") -> Iterator[Round]:
    """The rounds in which ranks on ``nodes``, one a rank, move ``nbytes`` bytes; without rounds of empty messages."""
    home = np.unique(np.asarray(list(nodes)), return_inverse=True)[1]
    blocks = algorithm.blocks(home.size)
    ends = block_ends(max(1, round(nbytes / ITEM)), blocks)
    for step in algorithm.steps(np.arange(home.size), home.size):
        found = round_inside(step, ends) if isinstance(step, NodeStep) else round_of(step, home, ends, what)
        if found:
            yield found


def block_ends(count: int, blocks: int) -> npt.NDArray[np.int64]:
    """The offsets of blocks as the engine cuts them, listed twice because intervals may wrap around."""
    once = even_cuts(count, blocks)
    return np.concatenate([once, once[1:] + count])


def round_of(step: Step, home: Any, ends: Any, what: str) -> Round | None:
    """The round of a step; None where its messages are empty."""
    p, blocks = home.size, ends.size // 2
    source, first = np.broadcast_to(step.source, p), np.broadcast_to(step.recv[0], p) % blocks
    length = np.broadcast_to(np.subtract(step.recv[1], step.recv[0]), p)
    sizes = ITEM * np.where(source >= 0, ends[first + length] - ends[first], 0)
    into = np.flatnonzero(sizes)
    if not into.size:
        return None
    return round_between(what, home, source[into], into, float(sizes.max()), bool(np.any(step.reduce)))


def round_inside(step: NodeStep, ends: Any) -> Round | None:
    """The work of a node step, with the bytes of the parts of a node; None where no node has several ranks."""
    ranks = members_of_nodes(step.node)[1]
    sizes = ITEM * (ends[step.end] - ends[step.first])
    whole = np.where(ranks >= 0, sizes[ranks], 0).sum(axis=1)
    kind = RoundType("gather" if step.collective == "allgather" else "scatter")
    nobody = np.full(step.node.size, -1)
    return Round(kind, float(whole.max()), nobody, nobody) if ranks.shape[1] > 1 and whole.max() else None


def round_between(what: str, home: Any, source: Any, into: Any, nbytes: float, reduce: bool) -> Round:
    """The round in which ranks ``into`` receive from ranks ``source``."""
    to, origin = np.full(home.size, -1), np.full(home.size, -1)
    to[source], origin[into] = into, source
    crosses = home[source] != home[into]
    leaving, entering = np.bincount(home[source[crosses]], minlength=1), np.bincount(home[into[crosses]], minlength=1)
    inside = np.bincount(home[into[~crosses]], minlength=1)
    crossing = max(int(leaving.max()), int(entering.max()))
    kind = RoundType(what, crossing, int(inside.max()), into.size, bool((to == origin).all()), reduce)
    return Round(kind, nbytes, to, origin)


# --- prices ----------------------------------------------------------------------------------------


class RoundCosts:
    """The measured costs of rounds at one shape, and prices by them."""

    def __init__(self, curves: Sequence[CostCurve], nodes: int, channels: int) -> None:
        self.curves, self.nodes, self.channels = curves, nodes, channels
        loads = [(curve.kind.crossing * point.bytes, point) for curve in curves for point in curve.points]
        self.beta = min((point.warm / load for load, point in loads if load >= LOADED_LINK_BYTES), default=0.0)

    def find_curve(self, kind: RoundType) -> CostCurve | None:
        """The costs of the most similar round type."""
        known = [each for each in self.curves if each.kind.what == kind.what]
        return min(known, key=lambda curve: dissimilarity(curve.kind, kind), default=None)

    def local_cost(self, what: str, nbytes: float = 0.0) -> float:
        """Microseconds of work without messages, cold."""
        curve = self.find_curve(RoundType(what))
        return 0.0 if curve is None else curve.cold_us(nbytes)

    def intra_node_cost(self, what: str, nbytes: float) -> float:
        """Microseconds of work inside a node, warm."""
        curve = self.find_curve(RoundType(what))
        return 0.0 if curve is None else curve.warm_us(nbytes)

    def price(self, algorithm: Algorithm, nodes: Iterable[int], nbytes: float, copy_bytes: float) -> float | None:
        """Microseconds of a flat schedule, after a copy of ``copy_bytes`` bytes."""
        us = self.price_rounds(list(rounds(algorithm, nodes, nbytes)))
        copying = self.local_cost("copy", copy_bytes) if copy_bytes else 0.0
        return None if us is None else self.local_cost("call") + copying + us

    def price_rounds(self, found: Sequence[Round]) -> float | None:
        """Microseconds of rounds, one after the other; None where no similar round type was measured.

        The first round that leaves a node counts as cold: its link was idle until then.
        """
        cold = next((k for k, each in enumerate(found) if each.kind.crossing), 0)
        us = 0.0
        for k, each in enumerate(found):
            curve = self.find_curve(each.kind)
            if curve is None:
                return None
            us += curve.cold_us(each.bytes) if k == cold else curve.warm_us(each.bytes)
        return us

    def price_form(self, form: Form, nodes: Any, nbytes: float) -> float | None:
        """Microseconds of a hierarchical algorithm in a form, on even nodes; None where a round was not measured."""
        short = not form.pipeline.pending
        found = [*rounds(form.algorithm, nodes, nbytes / form.pipeline.segments, "short" if short else CONCURRENT)]
        if short:
            us = self.price_rounds([each for each in found if each.kind.what == "short"])
        else:
            us = self.price_turns(found, form)
        return None if us is None else self.local_cost("call") + us

    def price_turns(self, found: Sequence[Round], form: Form) -> float | None:
        """Microseconds of a long vector, in segments that overlap in the order of :mod:`hpccomm.collectives.lowering`.

        Work inside the nodes overlaps with messages that wait for the link, not with messages that keep the cores busy.
        """
        how, us, first = form.pipeline, 0.0, True
        script = [(turn, found[k]) for turn, k in turns_of(found)]
        for now in order_turns(script, how.segments, how.lag):
            sent = [each for _, each in now if each.kind.what not in INSIDE]
            work = sum(self.intra_node_cost(each.kind.what, each.bytes) for _, each in now if each.kind.what in INSIDE)
            gathering = {segment for segment, each in now if each.kind.what == "gather"}
            others = any(segment not in gathering for segment, each in now if each.kind.what not in INSIDE)
            in_flight = self.price_in_flight(sent, cold=first)
            if in_flight is None:
                return None
            wire = self.beta * sum(each.bytes * each.kind.crossing for each in sent)
            hidden = others and not first and in_flight < LINK_BOUND_RATIO * wire
            us += max(in_flight, work) if hidden else in_flight + work
            first = first and not sent
        return us

    def price_in_flight(self, sent: Sequence[Round], cold: bool) -> float | None:
        """Microseconds of concurrent rounds: the mean of their types' costs, weighted by bytes."""
        total = sum(each.bytes for each in sent)
        us = 0.0
        for each in sent:
            curve = self.find_curve(each.kind)
            if curve is None:
                return None
            us += (curve.cold_us if cold else curve.warm_us)(total) * each.bytes / total
        return us


INSIDE = ("scatter", "gather")
"""Rounds inside the nodes."""


def turns_of(found: Sequence[Round]) -> Iterator[tuple[int, int]]:
    """The turn of each round: work inside the nodes belongs to the turn of the round before."""
    turn = 0
    for k, each in enumerate(found):
        turn += each.kind.what not in INSIDE
        yield turn, k


def per_channel(kind: RoundType, channels: int) -> RoundType:
    """The type of a round of one channel when all channels of a node run it."""
    return kind._replace(crossing=channels * kind.crossing, messages=channels * kind.messages)


def dissimilarity(known: RoundType, asked: RoundType) -> tuple[float, ...]:
    """The distance of two round types, the most important difference first."""

    def octaves(a: int, b: int) -> float:
        return abs(log2((a + 0.5) / (b + 0.5)))

    return (
        bool(known.crossing) != bool(asked.crossing),
        known.reduce != asked.reduce,
        octaves(known.crossing, asked.crossing) + octaves(known.messages, asked.messages),
        octaves(known.inside, asked.inside),
        known.paired != asked.paired,
    )


def costs_for_shape(curves: Sequence[CostCurve], shape: Shape) -> RoundCosts | None:
    """The costs at the measured shape nearest to ``shape``, if it is within ``REACH``."""
    shapes = sorted({(curve.nodes, curve.per_node) for curve in curves})
    near = min(shapes, key=lambda known: distance_key(known, shape), default=None)
    if near is None or shape[0] == 1 or distance(near, shape) > REACH:
        return None
    return RoundCosts([curve for curve in curves if (curve.nodes, curve.per_node) == near], *shape)
