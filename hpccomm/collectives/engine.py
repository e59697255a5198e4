"""The engine binds a schedule to a vector once; what is left to run is a flat list of actions.

*p ranks, r this one; the vector is cut into blocks by a table of offsets; a lane is one of several contiguous segments
of the vector, each of which goes through the whole schedule by itself.*  Lanes are interleaved: while one is summed the
next is on its way, so any schedule is pipelined without knowing it.  Bound once, a step costs a start, a wait and a
reduction; nothing is looked up, sliced or checked any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpccomm.collectives.schedule import Step

Vector = npt.NDArray[Any]
Action = Callable[[], Any]
Combine = Callable[[Vector, Vector, Vector], Any]
"""``combine(lower, upper, out)``: ``out = lower op upper``, ``out`` being one of the two."""


class Exchange(Protocol):
    """A send and a receive bound to memory: start both, then wait for both."""

    @property
    def starts(self) -> Sequence[Action]:
        """What begins it."""

    @property
    def waits(self) -> Sequence[Action]:
        """What ends it."""

    def free(self) -> None:
        """Give back what the transport holds for it."""


class Transport(Protocol):
    """How bytes move between ranks."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def exchange(self, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int) -> Exchange:
        """Bind one message out and one in; ``None`` for no message."""


class Plan:
    """A schedule bound to memory: call it as often as you like, then free it."""

    def __init__(self, actions: list[Action], exchanges: list[Exchange]) -> None:
        self._actions = actions
        self._exchanges = exchanges

    def __call__(self) -> None:
        """Run it once."""
        for act in self._actions:
            act()

    def free(self) -> None:
        """Give back the transport's requests; the plan cannot run any more."""
        for exchange in self._exchanges:
            exchange.free()
        self._actions, self._exchanges = [], []


def even_cuts(count: int, blocks: int) -> npt.NDArray[np.int64]:
    """Offsets that cut ``count`` elements into ``blocks`` whose lengths differ by one at most, longer ones first."""
    base, longer = divmod(count, blocks)
    block = np.arange(blocks + 1, dtype=np.int64)
    return block * base + np.minimum(block, longer)


def segments(count: int, lanes: int) -> list[slice]:
    """The vector's contiguous segments, one a lane."""
    cuts = even_cuts(count, max(1, min(lanes, count)))
    return [slice(lo, hi) for lo, hi in pairwise(cuts.tolist())]


def bind(
    steps: Iterable[Step],
    vector: Vector,
    cuts: Sequence[int] | npt.NDArray[np.int64],
    transport: Transport,
    combine: Combine | None = None,
    tag: int = 0,
) -> Plan:
    """Bind one lane: ``cuts`` are the offsets of the blocks in ``vector``, one more than there are blocks."""
    lane = VectorSegment(vector, cuts, transport, combine, tag)
    return interleave([[lane.bind_step(step) for step in steps if not lane.is_idle(step)]])


def bind_segments(
    steps: Iterable[Step],
    vector: Vector,
    blocks: int,
    lanes: int,
    transport: Transport,
    combine: Combine | None = None,
    tag: int = 0,
) -> Plan:
    """Bind a schedule whose blocks may lie anywhere (allreduce, bcast, reduce) to a vector in ``lanes`` segments."""
    script = list(steps)
    bound = []
    for segment in segments(vector.size, lanes):
        part = vector[segment]
        lane = VectorSegment(part, even_cuts(part.size, blocks), transport, combine, tag)
        bound.append([lane.bind_step(step) for step in script if not lane.is_idle(step)])
    return interleave(bound)


class RoundActions:
    """One step of one lane, bound: what starts it, what finishes it, what must be given back."""

    def __init__(self, exchanges: list[Exchange], reductions: list[Action]) -> None:
        self.exchanges = exchanges
        self.starts = [act for exchange in exchanges for act in exchange.starts]
        self.finishes = [act for exchange in exchanges for act in exchange.waits] + reductions


def interleave(lanes: Sequence[list[RoundActions]], begins: Sequence[int] | None = None) -> Plan:
    """Round k+1 of a lane starts as soon as its round k is finished; meanwhile the other lanes are on their way.

    ``begins`` are the turns in which lanes begin, not decreasing; all in the first if not said.
    """
    begins = begins or [0] * len(lanes)
    actions: list[Action] = []
    for turn in range(-1, max((first + len(lane) for first, lane in zip(begins, lanes, strict=True)), default=0)):
        for first, lane in zip(begins, lanes, strict=True):
            k = turn - first
            if 0 <= k < len(lane):
                actions += lane[k].finishes
            if 0 <= k + 1 < len(lane):
                actions += lane[k + 1].starts
    return Plan(actions, [exchange for lane in lanes for each in lane for exchange in each.exchanges])


class VectorSegment:
    """One segment of the vector on its way through a schedule."""

    def __init__(self, vector: Vector, cuts: Any, transport: Transport, combine: Combine | None, tag: int) -> None:
        self.vector, self.transport, self.combine, self.tag = vector, transport, combine, tag
        self.cuts = [int(cut) for cut in cuts]
        self._spare = np.empty(0, vector.dtype)

    def block_views(self, blocks: tuple[Any, Any]) -> list[Vector]:
        """The parts of the vector that blocks [lo, hi) cover: none, one, or two where the interval wraps around."""
        count = len(self.cuts) - 1
        first, length = int(blocks[0]) % count, int(blocks[1]) - int(blocks[0])
        spans = [(first, min(first + length, count)), (0, max(0, first + length - count))]
        return [self.vector[self.cuts[lo] : self.cuts[hi]] for lo, hi in spans if lo < hi]

    def is_idle(self, step: Step) -> bool:
        """Whether this rank moves nothing in this round."""
        return int(step.to) < 0 and int(step.source) < 0

    def bind_step(self, step: Step) -> RoundActions:
        """The step with its slices cut, its messages bound and its reduction ready."""
        to, source = int(step.to), int(step.source)
        out = [piece for piece in self.block_views(step.send) if to >= 0 and piece.size]
        into = [piece for piece in self.block_views(step.recv) if source >= 0 and piece.size]
        landing = self.receive_buffers(into) if step.reduce else into
        exchanges = [
            self.transport.exchange(send, to, recv, source, self.tag) for send, recv in pair_messages(out, landing)
        ]
        operands = zip(landing, into, strict=True) if step.reduce else ()
        return RoundActions(exchanges, [self.reduction(new, mine, source) for new, mine in operands])

    def receive_buffers(self, into: list[Vector]) -> list[Vector]:
        """Where operands arrive; the same memory in every round, so it stays in cache."""
        need = sum(piece.size for piece in into)
        if self._spare.size < need:
            self._spare = np.empty(need, self.vector.dtype)
        ends = np.cumsum([0, *(piece.size for piece in into)]).tolist()
        return [self._spare[lo:hi] for lo, hi in pairwise(ends)]

    def reduction(self, new: Vector, mine: Vector, source: int) -> Action:
        """Join what arrived with what is here, the lower rank's part on the left."""
        combine = self.combine
        assert combine is not None, "a schedule that reduces was bound without an operation"
        if source < self.transport.rank:
            return lambda: combine(new, mine, mine)
        return lambda: combine(mine, new, mine)


def pair_messages(out: list[Vector], into: list[Vector]) -> Iterable[tuple[Vector | None, Vector | None]]:
    """Messages out and in, side by side."""
    for k in range(max(len(out), len(into))):
        yield (out[k] if k < len(out) else None), (into[k] if k < len(into) else None)
