"""Prices a collective by rounds that were measured: how long one takes, by the length of its messages.

*A round is what all ranks do between two of their waits; its kind says how many messages leave a node in it, how many
stay inside one, whether ranks meet in pairs, and whether they sum what arrives.*  No straight line tells what a round
takes: TCP changes its protocol with a message's length, links let short bursts pass, ranks share cores.  So each kind
is measured as a curve, with all ranks taking part (parametrised LogP: Kielmann, Bal & Verstoep, IPDPS workshops 2000).
A point has two times: of a single round after a rest, and of one among many that follow one another.

What a link saved up while it rested passes at once: a bucket of tokens, which rounds empty and time fills.  The share
of a round's bytes that finds tokens takes the time of a single round, the rest that of many.  Calls are priced as they
are measured: one after the other, a barrier between them.

Never is a collective itself a point: a price is a sum over its rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import exp, log, log2
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import between
from hpccomm.collectives.schedule import Algorithm

if TYPE_CHECKING:
    from hpccomm.collectives.cost import Link

Shape = tuple[int, int]
"""Nodes, and ranks a node."""

REACH = 2.0
"""How far away, in powers of two, a measured shape may lie and still count."""
ITEM = 4
"""Bytes of an element: blocks are cut between elements."""
LOADED = 1 << 17
"""Bytes of a node from which a round shows what its link carries."""
FULL = 1.25
"""How much more than the link's least time a round may take and still count as limited by it alone."""


class Kind(NamedTuple):
    """What was measured.

    ``what`` is ``"round"``: one message a rank at most; ``"pieces"``: as many messages of at most
    ``between.MESSAGE_BYTES`` as the bytes need, between the nodes; ``"meeting"``: all that an allreduce of a short
    vector in two levels does inside the nodes; ``"short"``: what a round between them adds to it; ``"scatter"`` and
    ``"gather"``: a reduce-scatter and an allgather inside the nodes; ``"copy"``; ``"call"``: of no elements;
    ``"barrier"``.
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
    first: float
    """A single one after a rest, from a barrier on."""
    next: float
    """One of many that follow one another."""


class Curve(NamedTuple):
    """One kind, measured on nodes x per_node ranks."""

    nodes: int
    per_node: int
    kind: Kind
    points: tuple[Point, ...]
    """The shortest first."""

    def first(self, nbytes: float) -> float:
        """Microseconds of a single one."""
        return interpolated([(point.bytes, point.first) for point in self.points], nbytes)

    def next(self, nbytes: float) -> float:
        """Microseconds of one among many."""
        return interpolated([(point.bytes, point.next) for point in self.points], nbytes)

    @property
    def start(self) -> float:
        """What beginning costs beyond the round itself: ranks leave a barrier one after the other."""
        shortest = self.points[0]
        return max(0.0, shortest.first - shortest.next)


class Round(NamedTuple):
    """A round of a schedule, and where its messages go."""

    kind: Kind
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


def interpolated(points: Sequence[tuple[int, float]], nbytes: float) -> float:
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
    ends = ends_of(max(1, round(nbytes / ITEM)), blocks)
    for step in algorithm.steps(ranks, p):
        source, first = np.broadcast_to(step.source, p), np.broadcast_to(step.recv[0], p) % blocks
        length = np.broadcast_to(np.subtract(step.recv[1], step.recv[0]), p)
        sizes = ITEM * np.where(source >= 0, ends[first + length] - ends[first], 0)
        into = np.flatnonzero(sizes)
        if into.size:
            yield round_of(what, home, source[into], into, float(sizes.max()), bool(np.any(step.reduce)))


def ends_of(count: int, blocks: int) -> npt.NDArray[np.int64]:
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
    kind = Kind(what, crossing, int(inside.max()), into.size, bool((to == origin).all()), reduce)
    return Round(kind, nbytes, to, origin)


# --- prices ----------------------------------------------------------------------------------------


class Act(NamedTuple):
    """Something that takes time on the way of a call."""

    single: float
    """Microseconds where the link has tokens."""
    among: float
    """Microseconds where it has none."""
    load: float = 0.0
    """Bytes through a node's link."""


class Rounds:
    """What was measured at one shape, ready to price."""

    def __init__(self, curves: Sequence[Curve], nodes: int, lanes: int) -> None:
        self.curves, self.nodes, self.lanes = curves, nodes, lanes
        loads = [(curve, point) for curve in curves for point in curve.points if through(curve.kind, point) >= LOADED]
        self.beta = min((point.next / through(curve.kind, point) for curve, point in loads), default=0.0)
        full = [each for each in loads if each[1].next < FULL * self.beta * through(each[0].kind, each[1])]
        saved = [(point.next - point.first + curve.start) / self.beta for curve, point in full]
        self.burst = max(0.0, float(np.median(saved))) if saved else 0.0

    def nearest(self, kind: Kind) -> Curve | None:
        """The curve of the kind most like this one."""
        known = [each for each in self.curves if each.kind.what == kind.what]
        return min(known, key=lambda curve: unlike(curve.kind, kind), default=None)

    def fixed(self, what: str, nbytes: float = 0.0) -> float:
        """Microseconds of something that uses no link."""
        curve = self.nearest(Kind(what))
        return 0.0 if curve is None else curve.next(nbytes)

    def act(self, kind: Kind, nbytes: float) -> Act | None:
        """A round of messages of ``nbytes`` bytes; None where nothing like it was measured."""
        curve = self.nearest(kind)
        if curve is None:
            return None
        among, load = curve.next(nbytes), kind.crossing * nbytes
        if not load:
            return Act(among, among)
        return Act(min(among, max(curve.first(nbytes) - curve.start, 0.0)), among, load)

    def total(self, acts: Sequence[Act]) -> float:
        """Microseconds of a call that is repeated, a barrier between each two."""
        full = self.burst if self.beta else 0.0
        tokens, us = full, 0.0
        for _ in range(SETTLED):
            us = 0.0
            for act in acts:
                share = min(1.0, tokens / act.load) if act.load else 0.0
                took = max(act.single, (1 - share) * act.among)
                tokens = self.filled(tokens - act.load, took)
                us += took
            tokens = self.filled(tokens, self.fixed("barrier"))
        return us

    def filled(self, tokens: float, us: float) -> float:
        """Tokens after so much time."""
        return min(self.burst, max(0.0, tokens + us / self.beta)) if self.beta else 0.0

    def price(self, algorithm: Algorithm, nodes: Iterable[int], nbytes: float, copied: float) -> float | None:
        """Microseconds of a schedule that runs as it stands, after copying ``copied`` bytes."""
        found = list(rounds(algorithm, nodes, nbytes))
        acts = [self.act(each.kind, each.bytes) for each in found]
        known = [act for act in acts if act is not None]
        if not found or len(known) < len(acts):
            return None
        opening = self.nearest(found[0].kind)
        start = opening.start if opening else 0.0
        begun = Act(*[self.fixed("call") + start + (self.fixed("copy", copied) if copied else 0.0)] * 2)
        return self.total([begun, *known])

    def two_levels(self, nbytes: float, link: Link) -> float | None:
        """Microseconds of the allreduce in two levels, as it runs; ``link`` decides between schedules as there."""
        inter, meeting = between.inter_node(self.nodes, nbytes, self.lanes, link), self.nearest(Kind("meeting"))
        if meeting is None:
            return None
        return self.short(meeting, inter, nbytes) if nbytes <= meeting.points[-1].bytes else self.long(inter, nbytes)

    def short(self, meeting: Curve, inter: Algorithm, nbytes: float) -> float | None:
        """A vector in one piece, not longer than any meeting that was measured."""
        acts = [self.act(each.kind, each.bytes) for each in rounds(inter, range(self.nodes), nbytes, "short")]
        known = [act for act in acts if act is not None]
        if len(known) < len(acts):
            return None
        begun = Act(*[self.fixed("call") + meeting.first(nbytes)] * 2)
        return self.total([begun, *known])

    def long(self, inter: Algorithm, nbytes: float) -> float | None:
        """Segments that overlap: each turn one more is reduced inside, and all on their way go one round on."""
        count = between.segment_count(nbytes)
        segment = nbytes / count
        part = segment / self.lanes
        pieces = between.message_count(part, inter.blocks(self.nodes))
        walk = list(rounds(inter, range(self.nodes), part / pieces, "pieces"))
        acts = []
        for turn in range(count + len(walk)):
            sent = [walk[turn - 1 - k] for k in range(count) if 0 <= turn - 1 - k < len(walk)]
            inside = self.fixed("scatter", segment) if turn < count else 0.0
            inside += self.fixed("gather", segment) if turn >= len(walk) else 0.0
            flown = self.flown(sent, pieces)
            if flown is None:
                return None
            acts.append(Act(flown.single + inside, max(flown.among, flown.single + inside), flown.load))
        first = self.nearest(self.on_all_lanes(walk[0].kind))
        opening = first.start if first else 0.0
        return self.total([Act(*[self.fixed("call") + opening] * 2), *acts])

    def on_all_lanes(self, kind: Kind) -> Kind:
        """A round between nodes, of which each lane has one."""
        return kind._replace(crossing=self.lanes * kind.crossing, messages=self.lanes * kind.messages)

    def flown(self, sent: Sequence[Round], pieces: int) -> Act | None:
        """What is on its way at the same time: the mean of the kinds by their bytes."""
        total = sum(each.bytes for each in sent) * pieces
        if not total:
            return Act(0.0, 0.0)
        single = among = 0.0
        for each in sent:
            act = self.act(self.on_all_lanes(each.kind), total)
            if act is None:
                return None
            share = each.bytes * pieces / total
            single, among = single + share * act.single, among + share * act.among
        return Act(single, among, self.lanes * total)


SETTLED = 8
"""Calls after which tokens begin each further one alike."""


def through(kind: Kind, point: Point) -> float:
    """Bytes that leave a node in a round."""
    return float(kind.crossing * point.bytes)


def unlike(known: Kind, asked: Kind) -> tuple[float, ...]:
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


def at_shape(curves: Sequence[Curve], shape: Shape) -> Rounds | None:
    """The curves of the measured shape nearest to one, if it lies within reach."""
    shapes = sorted({(curve.nodes, curve.per_node) for curve in curves})
    near = min(shapes, key=lambda known: distance(known, shape), default=None)
    if near is None or shape[0] == 1 or distance(near, shape) > REACH:
        return None
    return Rounds([curve for curve in curves if (curve.nodes, curve.per_node) == near], *shape)
