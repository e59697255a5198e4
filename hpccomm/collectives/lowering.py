"""Lowers the steps of one rank to records: segments, messages, windows and node steps.

*A segment is a part of the vector that runs through the whole schedule on its own; a turn is a step and the node steps
that follow it.*  The steps of all segments are finished in one order, which is the same on all ranks: turn by turn,
within a turn segment by segment; ``lag`` delays each segment by so many turns against the one before.  A message starts
before its step is finished, as early as

- everything that it depends on is finished: the contents that it sends, the room that it receives into;
- at most ``pending`` messages are unfinished;
- all messages of earlier steps have started, so both ends start their messages in one order.

So a schedule is pipelined without code of its own, and no rank waits for ever: whatever a rank needs to finish step k,
its peers start once they have finished the steps before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise, zip_longest
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives.records import Meeting, Program
from hpccomm.collectives.schedule import NOBODY, NodeStep, Step, even_cuts
from hpccomm.kernels.interpreter.records import COPY, NODE, RECEIVE, RECORD, REDUCE, SEND, SOURCE, SPARE, VECTOR, WAIT

Interval = tuple[int, int]
"""[first, end) in bytes."""
NOTHING: Interval = (0, 0)


class Pipeline(NamedTuple):
    """How a schedule is pipelined."""

    segments: int = 1
    lag: int = 0
    pending: int = 0
    """The most messages in flight in each direction; 0: those of one step of each segment."""
    message_bytes: int = 1 << 30
    """The longest message.  MPI before version 4 counts bytes up to 2^31."""


class Layout(NamedTuple):
    """Where the blocks of a vector lie."""

    elements: int
    """Elements of the vector."""
    item: int
    """Bytes of an element."""
    blocks: int
    offsets: Sequence[int] | None = None
    """The first element of each block, and the end of the last; ``None``: each segment is a part of the vector, cut
    into blocks of equal lengths.  Where offsets are given, a segment is a part of every block."""

    def segments(self, number: int) -> Iterator[Segment]:
        """The segments; fewer than ``number`` where elements are fewer."""
        if self.offsets is None:
            for lo, hi in pairwise(even_cuts(self.elements, max(1, min(number, self.elements))).tolist()):
                cuts = (self.item * (lo + even_cuts(hi - lo, self.blocks))).tolist()
                yield Segment(cuts, 0, 1, self.item)
        else:
            for each in range(number):
                yield Segment([self.item * int(cut) for cut in self.offsets], each, number, self.item)


class Segment(NamedTuple):
    """A part of the vector: part ``number`` of ``of`` of every block."""

    cuts: list[int]
    """The first byte of each block, and the end of the last."""
    number: int
    of: int
    item: int

    def parts(self, first: int, end: int) -> list[Interval]:
        """The bytes of blocks [first, end), which do not wrap around: one interval, or one of each block."""
        if self.of == 1:
            return [(self.cuts[first], self.cuts[end])]
        found = []
        for lo, hi in pairwise(self.cuts[first : end + 1]):
            cuts = even_cuts((hi - lo) // self.item, self.of)
            found.append((lo + self.item * int(cuts[self.number]), lo + self.item * int(cuts[self.number + 1])))
        return found

    def intervals(self, first: int, end: int) -> list[Interval]:
        """The bytes of blocks [first, end), which may wrap around, without empty intervals."""
        count = len(self.cuts) - 1
        first, length = first % count, end - first
        if first + length <= count:
            found = self.parts(first, first + length)
        else:
            found = self.parts(first, count) + self.parts(0, first + length - count)
        return [each for each in found if each[0] < each[1]]

    def messages(self, first: int, end: int, most: int) -> list[Interval]:
        """The same in messages of at most ``most`` bytes."""
        count = len(self.cuts) - 1
        if self.of == 1 and first % count + end - first <= count:  # most steps: one interval, and short enough
            lo, hi = self.cuts[first % count], self.cuts[first % count + end - first]
            if hi - lo <= most:
                return [(lo, hi)] if lo < hi else []
        found = self.intervals(first, end)
        if all(hi - lo <= most for lo, hi in found):
            return found
        most = max(1, most // self.item) * self.item
        return [
            (lo + self.item * a, lo + self.item * b)
            for lo, hi in found
            for a, b in pairwise(even_cuts((hi - lo) // self.item, -(-(hi - lo) // most)).tolist())
        ]


class Exchange(NamedTuple):
    """A message out, a message in, or both."""

    to: int
    out: Interval
    source: int
    into: Interval
    reduce: bool


Item = Exchange | Meeting
"""What is finished at one place of the order."""


def lower(
    steps: Iterable[Step | NodeStep],
    rank: int,
    layout: Layout,
    pipeline: Pipeline | None = None,
    from_source: bool = False,
    due: Interval | None = None,
) -> Program:
    """The records of one rank for a vector of this layout.

    ``from_source``: the operand of the reduction is in another buffer, which is not written; else it is in the vector.
    ``due`` are the elements that the caller reads afterwards, by default all.
    """
    how = pipeline or Pipeline()
    script = list(turns(steps))
    if not any(isinstance(each, NodeStep) for _, each in script) and how.segments == 1 and not how.lag:
        script = [(k, each) for k, each in script if is_active(each)]
    segments = list(layout.segments(how.segments))
    items, owners = order_items(script, rank, segments, how)
    starts = early_starts(items, how.pending) if how.pending else starts_step_by_step(items, owners)
    writer = Writer(rank, layout.item)
    if from_source:
        items = read_source(items, layout, due, writer)
    emit(items, starts, writer)
    return writer.program()


def turns(steps: Iterable[Step | NodeStep]) -> Iterator[tuple[int, Step | NodeStep]]:
    """Every step with its turn; a node step belongs to the turn of the step before."""
    turn = 0
    for step in steps:
        turn += not isinstance(step, NodeStep)
        yield turn, step


def order_turns(script: Sequence[tuple[int, Any]], segments: int, lag: int) -> Iterator[list[tuple[int, Any]]]:
    """For every turn, the segments in order, each with the steps that it takes.

    A segment that begins goes first: its node step runs, and its messages start, while those of the others are pending.
    """
    steps: dict[int, list[Any]] = {}
    for turn, step in script:
        steps.setdefault(turn, []).append(step)
    last = max(steps, default=-1)
    for now in range(last + 1 + lag * max(0, segments - 1)):
        numbers = sorted(range(segments), key=lambda segment: now - lag * segment != 0)
        yield [(segment, step) for segment in numbers for step in steps.get(now - lag * segment, ())]


def is_active(step: Any) -> bool:
    """Whether this rank sends or receives in a step."""
    return bool(step.to >= 0 or step.source >= 0)


def order_items(
    script: Sequence[tuple[int, Step | NodeStep]], rank: int, segments: list[Segment], how: Pipeline
) -> tuple[list[Item], list[tuple[int, int]]]:
    """The items of this rank in the order in which they are finished, and the segment and step of each."""
    items: list[Item] = []
    owners: list[tuple[int, int]] = []
    order = order_turns(script, len(segments), how.lag) if len(segments) > 1 else [[(0, step) for _, step in script]]
    for segment, step in chain.from_iterable(order):
        if isinstance(step, NodeStep):
            found = meetings(step, rank, segments[segment])
        elif is_active(step):
            found = exchanges(step, segments[segment], how.message_bytes)
        else:
            continue
        owners += [(segment, len(items))] * len(found)
        items += found
    return items, owners


def exchanges(step: Step, segment: Segment, most: int) -> list[Item]:
    """The messages of a step."""
    to, source = int(step.to), int(step.source)
    out = segment.messages(int(step.send[0]), int(step.send[1]), most) if to >= 0 else []
    into = segment.messages(int(step.recv[0]), int(step.recv[1]), most) if source >= 0 else []
    reduce = bool(step.reduce)
    if len(out) == len(into) == 1:
        return [Exchange(to, out[0], source, into[0], reduce)]
    if not out and not into:  # it keeps its place, so that messages start in the same order in all segments
        return [Exchange(NOBODY, NOTHING, NOBODY, NOTHING, reduce)]
    return [
        Exchange(
            to if k < len(out) else NOBODY,
            out[k] if k < len(out) else NOTHING,
            source if k < len(into) else NOBODY,
            into[k] if k < len(into) else NOTHING,
            reduce,
        )
        for k in range(max(len(out), len(into)))
    ]


def meetings(step: NodeStep, rank: int, segment: Segment) -> list[Item]:
    """A node step on one segment; none for a rank that takes no part, or for an empty segment.

    That of a rank alone on its node keeps its place, so that later segments do not start too early.
    The parts of a reduce-scatter in shared memory are one interval, so the first segment reduces those of all.
    """
    members = step.members(rank)
    if step.collective == "reduce_scatter" and segment.of > 1:
        if segment.number:
            return []
        segment = segment._replace(of=1)
    if not members:
        return []
    bounds = [(int(step.first[each]), int(step.end[each])) for each in members]
    having = [k for k, (first, end) in enumerate(bounds) if first < end]
    only = having[0] if len(having) == 1 else -1
    parts = [segment.parts(first, end) if first < end else [] for first, end in bounds]
    found: list[Item] = []
    for each in zip_longest(*parts, fillvalue=NOTHING):
        at = min((first for first, end in each if first < end), default=-1)
        if at < 0:
            continue
        ends = []
        for first, end in each:
            ends.append((first, end) if first < end else (at, at))
            at = max(at, end)
        nbytes = tuple(end - first for first, end in ends)
        found.append(Meeting(step.collective, tuple(members), tuple(first for first, _ in ends), nbytes, only))
    return found


# --- when messages start --------------------------------------------------------------------------


def starts_step_by_step(items: list[Item], owners: list[tuple[int, int]]) -> list[int]:
    """After which item each starts, where a step of a segment starts when the one before is finished; -1: at once.

    All wait for the node steps before, which may be of another segment.
    """
    starts, last = [0] * len(items), dict[int, tuple[int, int]]()
    before, met = dict[int, int](), -1
    for number, (segment, step) in enumerate(owners):
        if segment in last and last[segment][0] != step:
            before[segment] = last[segment][1]
        starts[number] = max(met, before.get(segment, -1))
        last[segment] = (step, number)
        met = number if isinstance(items[number], Meeting) else met
    return starts


def early_starts(items: list[Item], pending: int) -> list[int]:
    """After which item each starts, where messages start as early as their data and the window allow."""
    touched = Touched(items)
    starts: list[int] = []
    finished: list[int] = []
    latest = -1
    for number, item in enumerate(items):
        if isinstance(item, Meeting):
            starts.append(number - 1)
            touched.meet(number, item)
            continue
        latest = max(latest, touched.exchange(number, item))
        if len(finished) >= pending:
            latest = max(latest, finished[-pending])
        starts.append(latest)
        if item.to >= 0 or item.source >= 0:
            finished.append(number)
    return starts


class Touched:
    """Which item last read and last wrote each range of bytes between two ends of intervals."""

    def __init__(self, items: list[Item], *more: Interval) -> None:
        ends = {end for item in items for interval in intervals_of(item) for end in interval}
        ends.update(end for interval in more for end in interval)
        self.place = {end: k for k, end in enumerate(sorted(ends))}
        self.read = np.full(len(ends), -1)
        self.written = np.full(len(ends), -1)

    def where(self, interval: Interval) -> slice:
        """The ranges of an interval."""
        return slice(self.place[interval[0]], self.place[interval[1]])

    def exchange(self, number: int, item: Exchange) -> int:
        """Note a message; returns the last item that it depends on."""
        out, into = self.where(item.out), self.where(item.into)
        after = int(self.written[out].max(initial=-1))
        if not item.reduce:
            after = max(after, int(self.written[into].max(initial=-1)), int(self.read[into].max(initial=-1)))
        self.read[out] = number
        self.written[into] = number
        return after

    def meet(self, number: int, item: Meeting) -> None:
        """Note a node step, which runs at its place."""
        for interval in intervals_of(item):
            where = self.where(interval)
            self.read[where] = self.written[where] = number


def intervals_of(item: Item) -> list[Interval]:
    """The parts of the vector that an item reads or writes."""
    if isinstance(item, Exchange):
        return [item.out, item.into]
    return [(at, at + nbytes) for at, nbytes in zip(item.first, item.nbytes, strict=True)]


# --- operands in another buffer -------------------------------------------------------------------


def read_source(items: list[Item], layout: Layout, due: Interval | None, writer: Writer) -> list[Item]:
    """Let the first node steps read the operand where it is; copy what messages use before they have written it."""
    end = layout.elements * layout.item
    if end and not any(isinstance(item, Meeting) for item in items):
        writer.rows.append((COPY, -1, VECTOR, 0, end, 0, SOURCE, 0, 0))
        return items
    result = (0, end) if due is None else (layout.item * due[0], layout.item * due[1])
    touched = Touched(items, (0, end), result)
    copied, found = np.zeros(touched.written.size, bool), []
    for number, each in enumerate(items):
        item = each
        if isinstance(item, Exchange):
            reads, writes = [item.out, *([item.into] if item.reduce else [])], [item.into]
        elif item.collective == "reduce_scatter":
            region = (min(item.first), max(at + nbytes for at, nbytes in zip(item.first, item.nbytes, strict=True)))
            fresh = (touched.written[touched.where(region)] < 0).all()
            item = item._replace(operand=SOURCE if fresh else VECTOR)
            mine = item.members.index(writer.rank)
            reads, writes = [] if fresh else [region], [(item.first[mine], item.first[mine] + item.nbytes[mine])]
        else:
            mine = item.members.index(writer.rank)
            reads, writes = [(item.first[mine], item.first[mine] + item.nbytes[mine])], intervals_of(item)
        for place in map(touched.where, reads):
            copied[place] |= touched.written[place] < 0
        for place in map(touched.where, [*reads, *writes]):
            touched.written[place] = number
        found.append(item)
    where = touched.where(result)
    copied[where] |= touched.written[where] < 0
    ends = sorted(touched.place)
    for first, last in runs(copied.tolist()):
        at = ends[first]
        writer.rows.append((COPY, -1, VECTOR, at, ends[last] - at, 0, SOURCE, at, 0))
    return found


def runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """[first, end) of each run of true flags."""
    edges = np.flatnonzero(np.diff([False, *flags, False])).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


# --- records --------------------------------------------------------------------------------------


class Writer:
    """The records of one rank written so far, and the memory and requests in use."""

    def __init__(self, rank: int, item: int) -> None:
        self.rank, self.alignment = rank, lcm(ALIGNMENT, item)
        self.rows: list[tuple[int, ...]] = []
        self.meetings: list[Meeting] = []
        self.free: list[Interval] = []
        self.spare_bytes = 0
        self.requests = 0
        self.free_requests: list[int] = []

    def request(self) -> int:
        """A request that is not pending."""
        if self.free_requests:
            return self.free_requests.pop()
        self.requests += 1
        return self.requests - 1

    def room(self, nbytes: int) -> Interval:
        """Room for an operand: the memory used last, which is in the cache."""
        for k in reversed(range(len(self.free))):
            if self.free[k][1] - self.free[k][0] >= nbytes:
                return self.free.pop(k)
        self.spare_bytes = -(-self.spare_bytes // self.alignment) * self.alignment + nbytes
        return self.spare_bytes - nbytes, self.spare_bytes

    def program(self) -> Program:
        """The program."""
        return Program(np.array(self.rows, RECORD), tuple(self.meetings), self.spare_bytes, self.requests)


ALIGNMENT = 64
"""Operands begin at multiples of this, and of an element."""


class Pending(NamedTuple):
    """A started exchange."""

    receive: int
    send: int
    room: Interval | None


def emit(items: list[Item], starts: list[int], writer: Writer) -> None:
    """Write the records: each item's end in order, and after it the beginnings of those that may start then."""
    begin: list[list[int]] = [[] for _ in range(len(items) + 1)]
    for number, item in enumerate(items):
        if isinstance(item, Exchange):
            begin[starts[number] + 1].append(number)
    pending = dict[int, Pending]()
    for number in range(-1, len(items)):
        if number >= 0:
            finish(items[number], pending.pop(number, None), writer)
        for each in begin[number + 1]:
            exchange = items[each]
            assert isinstance(exchange, Exchange)
            pending[each] = start(exchange, writer)


def start(item: Exchange, writer: Writer) -> Pending:
    """Receive, then send."""
    receive, send, room, rows = -1, -1, None, writer.rows
    if item.source >= 0:
        receive, (at, end) = writer.request(), item.into
        buffer, nbytes = VECTOR, end - at
        if item.reduce:
            room = writer.room(nbytes)
            buffer, at = SPARE, room[0]
        rows.append((RECEIVE, item.source, buffer, at, nbytes, receive, 0, 0, 0))
    if item.to >= 0:
        send, (at, end) = writer.request(), item.out
        rows.append((SEND, item.to, VECTOR, at, end - at, send, 0, 0, 0))
    return Pending(receive, send, room)


def finish(item: Item, pending: Pending | None, writer: Writer) -> None:
    """Wait, then reduce; or meet."""
    rows = writer.rows
    if isinstance(item, Meeting):
        if len(item.members) > 1:
            rows.append((NODE, -1, 0, 0, 0, len(writer.meetings), 0, 0, 0))
            writer.meetings.append(item)
        elif item.operand == SOURCE:
            rows.append((COPY, -1, VECTOR, item.first[0], item.nbytes[0], 0, SOURCE, item.first[0], 0))
        return
    assert pending is not None
    if pending.receive >= 0:
        rows.append((WAIT, item.source, 0, 0, item.into[1] - item.into[0], pending.receive, 0, 0, 0))
        writer.free_requests.append(pending.receive)
    if pending.send >= 0:
        rows.append((WAIT, NOBODY, 0, 0, item.out[1] - item.out[0], pending.send, 0, 0, 0))
        writer.free_requests.append(pending.send)
    if pending.room is not None and item.source >= 0:
        at, end = item.into
        lower = int(item.source < writer.rank)
        rows.append((REDUCE, -1, VECTOR, at, end - at, 0, SPARE, pending.room[0], lower))
        writer.free.append(pending.room)
