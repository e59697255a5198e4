"""The engine binds a schedule to a vector once; the plan that results is a flat list of actions.

*p ranks, r this one; a table of offsets cuts the vector into blocks; a segment is a contiguous part of the vector that
runs through the whole schedule on its own.*  The engine interleaves the segments: while a rank reduces one, the
messages of the next are in flight, so every schedule is pipelined without code of its own.  A bound step costs a start,
a wait and a reduction; a running plan looks up, slices and checks nothing.
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
"""``combine(lower, upper, out)``: ``out = lower op upper``; ``out`` is one of the two operands."""


class Exchange(Protocol):
    """A send and a receive bound to memory: start both, then wait for both."""

    @property
    def starts(self) -> Sequence[Action]:
        """The actions that start it."""

    @property
    def waits(self) -> Sequence[Action]:
        """The actions that complete it."""

    def free(self) -> None:
        """Free the resources that the transport holds for it."""


class Transport(Protocol):
    """Moves bytes between ranks."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def exchange(self, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int) -> Exchange:
        """Bind one outgoing and one incoming message; ``None`` for no message."""


class BoundSchedule:
    """A schedule bound to memory: call it any number of times, then free it."""

    def __init__(self, actions: list[Action], exchanges: list[Exchange]) -> None:
        self._actions = actions
        self._exchanges = exchanges

    def __call__(self) -> None:
        """Run it once."""
        for act in self._actions:
            act()

    def free(self) -> None:
        """Free the transport's requests; the plan cannot run afterwards."""
        for exchange in self._exchanges:
            exchange.free()
        self._actions, self._exchanges = [], []


def even_cuts(count: int, blocks: int) -> npt.NDArray[np.int64]:
    """Offsets of ``blocks`` blocks of ``count`` elements; lengths differ by at most one, the longer blocks first."""
    base, longer = divmod(count, blocks)
    block = np.arange(blocks + 1, dtype=np.int64)
    return block * base + np.minimum(block, longer)


def segments(count: int, number: int) -> list[slice]:
    """The slices of ``number`` segments of a vector of ``count`` elements; fewer where elements are fewer."""
    cuts = even_cuts(count, max(1, min(number, count)))
    return [slice(lo, hi) for lo, hi in pairwise(cuts.tolist())]


def bind(
    steps: Iterable[Step],
    vector: Vector,
    cuts: Sequence[int] | npt.NDArray[np.int64],
    transport: Transport,
    combine: Combine | None = None,
    tag: int = 0,
) -> BoundSchedule:
    """Bind a schedule to a vector in one segment; ``cuts`` are the b + 1 offsets of its b blocks."""
    segment = VectorSegment(vector, cuts, transport, combine, tag)
    return interleave([[segment.bind_step(step) for step in steps if not segment.is_idle(step)]])


def bind_segments(
    steps: Iterable[Step],
    vector: Vector,
    blocks: int,
    number: int,
    transport: Transport,
    combine: Combine | None = None,
    tag: int = 0,
) -> BoundSchedule:
    """Bind a schedule with blocks of any offsets (allreduce, bcast, reduce) to a vector in ``number`` segments."""
    script = list(steps)
    bound = []
    for where in segments(vector.size, number):
        part = vector[where]
        segment = VectorSegment(part, even_cuts(part.size, blocks), transport, combine, tag)
        bound.append([segment.bind_step(step) for step in script if not segment.is_idle(step)])
    return interleave(bound)


class RoundActions:
    """One bound step of one segment: the actions that start and finish it, and its exchanges, which must be freed."""

    def __init__(self, exchanges: list[Exchange], reductions: list[Action]) -> None:
        self.exchanges = exchanges
        self.starts = [act for exchange in exchanges for act in exchange.starts]
        self.finishes = [act for exchange in exchanges for act in exchange.waits] + reductions


def interleave(rounds: Sequence[list[RoundActions]], begins: Sequence[int] | None = None) -> BoundSchedule:
    """Start round k+1 of a segment when its round k is finished, while the other segments are in flight.

    ``rounds`` has one list a segment.  ``begins`` are the turns in which the segments begin, in ascending order; by
    default all begin in the first turn.
    """
    begins = begins or [0] * len(rounds)
    actions: list[Action] = []
    for turn in range(-1, max((first + len(each) for first, each in zip(begins, rounds, strict=True)), default=0)):
        for first, segment in zip(begins, rounds, strict=True):
            k = turn - first
            if 0 <= k < len(segment):
                actions += segment[k].finishes
            if 0 <= k + 1 < len(segment):
                actions += segment[k + 1].starts
    return BoundSchedule(actions, [exchange for segment in rounds for each in segment for exchange in each.exchanges])


class VectorSegment:
    """One segment of the vector, to which steps are bound."""

    def __init__(self, vector: Vector, cuts: Any, transport: Transport, combine: Combine | None, tag: int) -> None:
        self.vector, self.transport, self.combine, self.tag = vector, transport, combine, tag
        self.cuts = [int(cut) for cut in cuts]
        self._spare = np.empty(0, vector.dtype)

    def block_views(self, blocks: tuple[Any, Any]) -> list[Vector]:
        """Views of blocks [lo, hi): none, one, or two where the interval wraps around."""
        count = len(self.cuts) - 1
        first, length = int(blocks[0]) % count, int(blocks[1]) - int(blocks[0])
        intervals = [(first, min(first + length, count)), (0, max(0, first + length - count))]
        return [self.vector[self.cuts[lo] : self.cuts[hi]] for lo, hi in intervals if lo < hi]

    def is_idle(self, step: Step) -> bool:
        """Whether this rank neither sends nor receives in the step."""
        return int(step.to) < 0 and int(step.source) < 0

    def bind_step(self, step: Step) -> RoundActions:
        """Cut the views, bind the messages and prepare the reductions of a step."""
        to, source = int(step.to), int(step.source)
        out = [view for view in self.block_views(step.send) if to >= 0 and view.size]
        into = [view for view in self.block_views(step.recv) if source >= 0 and view.size]
        received = self.receive_buffers(into) if step.reduce else into
        exchanges = [
            self.transport.exchange(send, to, recv, source, self.tag) for send, recv in pair_messages(out, received)
        ]
        operands = zip(received, into, strict=True) if step.reduce else ()
        return RoundActions(exchanges, [self.reduction(new, mine, source) for new, mine in operands])

    def receive_buffers(self, into: list[Vector]) -> list[Vector]:
        """Buffers for received operands; the same memory in every round, so it stays in cache."""
        need = sum(view.size for view in into)
        if self._spare.size < need:
            self._spare = np.empty(need, self.vector.dtype)
        ends = np.cumsum([0, *(view.size for view in into)]).tolist()
        return [self._spare[lo:hi] for lo, hi in pairwise(ends)]

    def reduction(self, new: Vector, mine: Vector, source: int) -> Action:
        """The action that reduces a received operand into the local one, the lower rank's on the left."""
        combine = self.combine
        assert combine is not None, "a schedule that reduces was bound without an operation"
        if source < self.transport.rank:
            return lambda: combine(new, mine, mine)
        return lambda: combine(mine, new, mine)


def pair_messages(out: list[Vector], into: list[Vector]) -> Iterable[tuple[Vector | None, Vector | None]]:
    """Pairs of an outgoing and an incoming message; ``None`` where one list is shorter."""
    for k in range(max(len(out), len(into))):
        yield (out[k] if k < len(out) else None), (into[k] if k < len(into) else None)
