"""Prices a collective by rounds that were measured: how long one takes, by the length of its messages.

*A round is what all ranks do between two of their waits; its kind says how many messages leave a node in it, how many
stay inside one, whether ranks meet in pairs, and whether they sum what arrives.*  No straight line tells what a round
takes: TCP changes its protocol with a message's length, links let short bursts pass, ranks share cores.  So each kind
is measured as a curve, with all ranks taking part (parametrised LogP: Kielmann, Bal & Verstoep, IPDPS workshops 2000).
A
point has two times: of a call that is one such round, and of each further one when a few follow one another.  So what
begins a call counts once: ranks that leave a barrier one after the other, bytes that a rested link lets pass for free,
both directions of a link in use as long as its ends keep step.

Never is a collective itself a point: a price is a sum over its rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import exp, log, log2
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives.schedule import Algorithm
from hpccomm.performance import inter_node

if TYPE_CHECKING:
    from hpccomm.layout import Link

Shape = tuple[int, int]
"""Nodes, and ranks a node."""

REACH = 2.0
"""How far away, in powers of two, a measured shape may lie and still count."""
ITEM = 4
"""Bytes of an element: blocks are cut between elements."""
LOADED_LINK_BYTES = 1 << 17
"""Bytes of a node from which a round shows what its link carries."""
LINK_BOUND_RATIO = 1.15
"""How much more than the link's least time a round may take and still leave the cores to other work."""


class RoundType(NamedTuple):
    """What was measured.

    ``what`` is ``"round"``: one message a rank at most; ``"pieces"``: as many messages of at most
    ``between.MESSAGE_BYTES`` as the bytes need, between the nodes; ``"short"``: such a round in the two-level allreduce
    of a short vector, with what that does inside the nodes; ``"scatter"`` and ``"gather"``: a reduce-scatter and an
    allgather inside the nodes; ``"copy"``; ``"call"``: of no elements.
    """

    what: str
    crossing: int = 0
    """Messages that leave a node, or enter it: the most of any."""
    inside: int = 0
    """Messages inside a node: the most of any."""
    messages: int = 0
    """In all."""
    paired: bool = False
    """Whether who sends also receives from the same rank."""
    reduce: bool = False
    """Whether what arrives is summed."""


class Point(NamedTuple):
    """Microseconds by length."""

    bytes: int
    """Of a message; of a rank in all for pieces; of the vector elsewhere."""
    cold: float
    """A call of one, from a barrier on."""
    warm: float
    """Each further one of the same call."""


class CostCurve(NamedTuple):
    """One kind, measured on nodes x per_node ranks."""

    nodes: int
    per_node: int
    kind: RoundType
    points: tuple[Point, ...]
    """The shortest first."""

    def cold_us(self, nbytes: float) -> float:
        """Microseconds of a call of one."""
        return interpolate([(point.bytes, point.cold) for point in self.points], nbytes)

    def warm_us(self, nbytes: float) -> float:
        """Microseconds of each further one."""
        return interpolate([(point.bytes, point.warm) for point in self.points], nbytes)


class Round(NamedTuple):
    """A round of a schedule, and where its messages go."""

    kind: RoundType
    bytes: float
    """Of its longest message."""
    to: npt.NDArray[np.int64]
    """``(p,)``: to whom each rank sends, -1 for nobody."""
    source: npt.NDArray[np.int64]
    """``(p,)``: from whom each rank receives, -1 for nobody."""


def distance(known: Shape, asked: Shape) -> float:
    """How far apart shapes are, in powers of two: the worse of nodes and ranks a node."""
    if (known[0] == 1) != (asked[0] == 1):
        return float("inf")
    return max(abs(log2(a / b)) for a, b in zip(known, asked, strict=True))


def distance_key(known: Shape, asked: Shape) -> tuple[float, float]:
    """The same, and where that is alike, both together."""
    both = sum(abs(log2(a / b)) for a, b in zip(known, asked, strict=True))
    return distance(known, asked), both


def interpolate(points: Sequence[tuple[int, float]], nbytes: float) -> float:
    """The time for ``nbytes`` between measured (bytes, time), smallest first."""
    low = max((point for point in points if point[0] <= nbytes), default=points[0])
    high = min((point for point in points if point[0] >= nbytes), default=points[-1])
    if low[0] >= high[0]:
        return low[1] * max(1.0, nbytes / max(low[0], 1))
    part = (log(nbytes) - log(max(low[0], 0.5))) / (log(high[0]) - log(max(low[0], 0.5)))
    return exp(log(low[1]) + part * (log(high[1]) - log(low[1])))


# --- rounds of a schedule --------------------------------------------------------------------------


def rounds(algorithm: Algorithm, nodes: Iterable[int], nbytes: float, what: str = "round") -> Iterator[Round]:
    """The rounds in which ranks that live on ``nodes``, one a rank, move ``nbytes`` bytes; none where all is empty."""
    home = np.unique(np.asarray(list(nodes)), return_inverse=True)[1]
    p = home.size
    ranks, blocks = np.arange(p), algorithm.blocks(p)
    ends = block_ends(max(1, round(nbytes / ITEM)), blocks)
    for step in algorithm.steps(ranks, p):
        source, first = np.broadcast_to(step.source, p), np.broadcast_to(step.recv[0], p) % blocks
        length = np.broadcast_to(np.subtract(step.recv[1], step.recv[0]), p)
        sizes = ITEM * np.where(source >= 0, ends[first + length] - ends[first], 0)
        into = np.flatnonzero(sizes)
        if into.size:
            yield round_of(what, home, source[into], into, float(sizes.max()), bool(np.any(step.reduce)))


def block_ends(count: int, blocks: int) -> npt.NDArray[np.int64]:
    """Where blocks begin and end, as the engine cuts them; twice round the circle, since intervals may wrap."""
    base, longer = divmod(count, blocks)
    block = np.arange(blocks + 1, dtype=np.int64)
    once = block * base + np.minimum(block, longer)
    return np.concatenate([once, once[1:] + count])


def round_of(what: str, home: Any, source: Any, into: Any, nbytes: float, reduce: bool) -> Round:
    """What kind of round it is in which ``into`` receive from ``source``."""
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
    """What was measured at one shape, ready to price."""

    def __init__(self, curves: Sequence[CostCurve], nodes: int, lanes: int) -> None:
        self.curves, self.nodes, self.channels = curves, nodes, lanes
        loads = [(crossing_bytes(curve.kind, point), point) for curve in curves for point in curve.points]
        self.beta = min((point.warm / load for load, point in loads if load >= LOADED_LINK_BYTES), default=0.0)
        self.short_bytes = max((each.points[-1].bytes for each in curves if each.kind.what == "short"), default=0)

    def find_curve(self, kind: RoundType) -> CostCurve | None:
        """The curve of the kind most like this one."""
        known = [each for each in self.curves if each.kind.what == kind.what]
        return min(known, key=lambda curve: dissimilarity(curve.kind, kind), default=None)

    def fixed_cost(self, what: str, nbytes: float = 0.0) -> float:
        """Microseconds of something between no ranks."""
        curve = self.find_curve(RoundType(what))
        return 0.0 if curve is None else curve.cold_us(nbytes)

    def intra_node_cost(self, what: str, nbytes: float) -> float:
        """Microseconds of something inside a node that follows other things."""
        curve = self.find_curve(RoundType(what))
        return 0.0 if curve is None else curve.warm_us(nbytes)

    def price(self, algorithm: Algorithm, nodes: Iterable[int], nbytes: float, copied: float) -> float | None:
        """Microseconds of a schedule that runs as it stands, after copying ``copied`` bytes."""
        us = self.price_rounds(list(rounds(algorithm, nodes, nbytes)))
        copying = self.fixed_cost("copy", copied) if copied else 0.0
        return None if us is None else self.fixed_cost("call") + copying + us

    def price_rounds(self, found: Sequence[Round]) -> float | None:
        """Microseconds of rounds, one after the other; None where nothing like them was measured.

        The first that leaves a node counts as one that begins a call: until then its link has rested.
        """
        opening = next((k for k, each in enumerate(found) if each.kind.crossing), 0)
        us = 0.0
        for k, each in enumerate(found):
            curve = self.find_curve(each.kind)
            if curve is None:
                return None
            us += curve.cold_us(each.bytes) if k == opening else curve.warm_us(each.bytes)
        return us

    def price_two_level(self, nbytes: float, link: Link) -> float | None:
        """Microseconds of the allreduce in two levels, as it runs; ``link`` decides between schedules as there."""
        inter = inter_node.select_inter_node(self.nodes, nbytes, self.channels, link)
        us = self.price_short(inter, nbytes) if nbytes <= self.short_bytes else self.price_long(inter, nbytes)
        return None if us is None else self.fixed_cost("call") + us

    def price_short(self, inter: Algorithm, nbytes: float) -> float | None:
        """A vector in one piece."""
        return self.price_rounds(list(rounds(inter, range(self.nodes), nbytes, "short")))

    def price_long(self, inter: Algorithm, nbytes: float) -> float | None:
        """Segments that overlap: each turn one more is reduced inside, and all on their way go one round on.

        Work inside the nodes hides behind messages that wait for the link, not behind those that keep the cores busy.
        """
        count = inter_node.segment_count(nbytes)
        segment = nbytes / count
        pieces = inter_node.message_count(segment / self.channels, inter.blocks(self.nodes))
        walk = list(rounds(inter, range(self.nodes), segment / self.channels / pieces, "pieces"))
        us = 0.0
        for turn in range(count + len(walk)):
            sent = [walk[turn - 1 - k] for k in range(count) if 0 <= turn - 1 - k < len(walk)]
            work = self.intra_node_cost("scatter", segment) if turn < count else 0.0
            work += self.intra_node_cost("gather", segment) if turn >= len(walk) else 0.0
            flown = self.price_in_flight(sent, pieces, opening=turn == 1)
            if flown is None:
                return None
            wire = self.beta * self.channels * pieces * sum(each.bytes for each in sent)
            us += max(flown, work) if 1 < turn < count and flown < LINK_BOUND_RATIO * wire else flown + work
        return us

    def price_in_flight(self, sent: Sequence[Round], pieces: int, opening: bool) -> float | None:
        """Microseconds of what is on its way at the same time: the mean of the kinds by their bytes."""
        total = sum(each.bytes for each in sent)
        us = 0.0
        for each in sent:
            lanes = self.channels
            kind = each.kind._replace(crossing=lanes * each.kind.crossing, messages=lanes * each.kind.messages)
            curve = self.find_curve(kind)
            if curve is None:
                return None
            took = curve.cold_us(total * pieces) if opening else curve.warm_us(total * pieces)
            us += took * each.bytes / total
        return us


def crossing_bytes(kind: RoundType, point: Point) -> float:
    """Bytes that leave a node in a round."""
    return float(kind.crossing * point.bytes)


def dissimilarity(known: RoundType, asked: RoundType) -> tuple[float, ...]:
    """How far a kind is from what is asked for, what matters most first."""

    def far(a: int, b: int) -> float:
        return abs(log2((a + 0.5) / (b + 0.5)))

    return (
        bool(known.crossing) != bool(asked.crossing),
        known.reduce != asked.reduce,
        far(known.crossing, asked.crossing) + far(known.messages, asked.messages),
        far(known.inside, asked.inside),
        known.paired != asked.paired,
    )


def costs_for_shape(curves: Sequence[CostCurve], shape: Shape) -> RoundCosts | None:
    """The curves of the measured shape nearest to one, if it lies within reach."""
    shapes = sorted({(curve.nodes, curve.per_node) for curve in curves})
    near = min(shapes, key=lambda known: distance_key(known, shape), default=None)
    if near is None or shape[0] == 1 or distance(near, shape) > REACH:
        return None
    return RoundCosts([curve for curve in curves if (curve.nodes, curve.per_node) == near], *shape)
