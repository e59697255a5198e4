"""Measures single rounds on several nodes by the length of their messages, for :mod:`hpccomm.collectives.curves`.

All ranks take part.  Each length is timed twice: one round alone, after barriers that last as long as a link needs to
save up all that it lets pass at once; and many rounds, one after the other, of which the first ones do not count.  A
time is the mean over the ranks, then the median over the repetitions.  No collective is run, only rounds of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm import operations
from hpccomm.collectives import ALGORITHMS, between
from hpccomm.collectives.curves import ITEM, Curve, Kind, Point, Round, rounds
from hpccomm.collectives.engine import Plan, bind, interleaved, segments
from hpccomm.collectives.hierarchical import lanes_of
from hpccomm.collectives.schedule import Algorithm, Step
from hpccomm.errors import ArgumentError
from hpccomm.two_levels import MESSAGE_BYTES, SHORT_BYTES, Operands, TwoLevels

LENGTHS = (4, 64, 1024, 4096, 8192, 16384, 32768, MESSAGE_BYTES, 1 << 16, 1 << 17, 1 << 18, 1 << 20, 1 << 22)
"""Bytes of the messages that are measured; close together where transports change their ways."""
FLIGHTS = (4096, 16384, 32768, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21)
"""Bytes that are on their way from a rank at the same time, in pieces."""
SEGMENTS = (16384, 1 << 16, 1 << 18, 1 << 20)
"""Bytes that are reduced and gathered inside a node."""
SHORT = (4, 64, 512, SHORT_BYTES // 4, SHORT_BYTES)
ADDED = 8
"""Rounds by which a short vector's call is made longer."""
COPIES = (4, 4096, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)

REST_US = 4000.0
"""How long a link rests before a single round."""
SECONDS = 0.06
"""For many rounds of one length, each time."""
TIMES, SINGLES = 5, 11
"""How often many rounds, and one, are timed; less where that takes long."""
LONG = 0.5
"""Seconds that one length may take either way."""
BATCH = 4
"""Rounds that are bound together."""
MOST = 400
"""Batches that follow one another at most."""
WORD = 1
"""The tag, and the word in shared memory, of all that is measured here."""

Call = Callable[[], object]
Vector = npt.NDArray[np.float32]


class Task(NamedTuple):
    """A kind, a round of it, and how long its messages become."""

    kind: Kind
    like: Round | None
    lengths: tuple[int, ...]


def measured_curves(comm: Any, algorithms: Sequence[str], most: int) -> tuple[Curve, ...]:
    """The rounds of these allreduces of up to ``most`` bytes, on the nodes at hand (collective).

    ``comm`` is a Communicator on several nodes with equally many ranks, one node after the other; elsewhere there are
    none.  The same on all ranks.
    """
    topology = comm.topology
    if topology.count == 1 or not (topology.even and topology.contiguous):
        return ()
    bench = Rounds(comm)
    tasks = list(wanted(topology.nodes, algorithms, most, bench.levels is not None))
    found = [bench.curve(task) for task in tasks]
    agreed: tuple[Curve, ...] = comm.bcast(tuple(found))
    return agreed


def wanted(nodes: npt.NDArray[np.int64], algorithms: Sequence[str], most: int, levels: bool) -> Iterator[Task]:
    """Everything whose price is needed: the fixed ones, the rounds of the schedules, what two levels are made of."""
    yield Task(Kind("barrier"), None, (0,))
    yield Task(Kind("call"), None, (0,))
    yield Task(Kind("copy"), None, up_to(COPIES, most))
    flat = [ALGORITHMS["allreduce"][name] for name in algorithms if name in ALGORITHMS["allreduce"]]
    yield from of_rounds([each for each in flat if not each.lanes], nodes, most, "round", LENGTHS)
    if not levels or "hierarchical" not in algorithms:
        return
    ends, lanes = np.arange(int(nodes.max()) + 1), lanes_of(nodes).rank.shape[1]
    inter = [ALGORITHMS["allreduce"][name] for name in ("doubling", "ring", "butterfly")]
    yield Task(Kind("meeting"), None, SHORT)
    yield from of_rounds(inter, ends, SHORT_BYTES, "short", SHORT)
    if most > SHORT_BYTES:
        yield Task(Kind("scatter"), None, up_to(SEGMENTS, most))
        yield Task(Kind("gather"), None, up_to(SEGMENTS, most))
        for task in of_rounds(inter, ends, most // lanes, "pieces", FLIGHTS):
            kind = task.kind._replace(crossing=lanes * task.kind.crossing, messages=lanes * task.kind.messages)
            yield task._replace(kind=kind)


def of_rounds(
    schedules: Sequence[Algorithm], nodes: npt.NDArray[np.int64], most: int, what: str, lengths: Sequence[int]
) -> Iterator[Task]:
    """Every kind of round of some schedules, at lengths that occur."""
    longest: dict[Kind, Round] = {}
    for schedule in schedules:
        for nbytes in (2 * ITEM, most):
            for each in rounds(schedule, nodes, nbytes, what):
                known = longest.get(each.kind)
                longest[each.kind] = each._replace(bytes=max(each.bytes, known.bytes if known else 0.0))
    for kind, like in longest.items():
        yield Task(kind, like, up_to(lengths, like.bytes))


def up_to(lengths: Sequence[int], most: float) -> tuple[int, ...]:
    """The lengths not above ``most``, and the next one."""
    above = [each for each in lengths if each >= most][:1]
    return (*(each for each in lengths if each < most), *above)


class Rounds:
    """Rounds on one communicator."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.plain = comm, MPI.Intracomm(comm)
        self.shape = comm.topology.count, max(comm.topology.per_node)
        self.levels: TwoLevels | None = comm.resources.two_levels
        self.held: list[Vector] = []
        self.combine = operations.combiner(MPI.SUM)
        few = np.zeros(1, np.float32)
        if self.levels:
            comm.Allreduce(few, few.copy(), algorithm="hierarchical")  # from now on waiting ranks drive messages
        self.rest = 1
        self.rest = max(1, int(REST_US / self.single(self.plain.Barrier)))

    def curve(self, task: Task) -> Curve:
        """One kind at all its lengths (collective)."""
        measure = self.added if task.kind.what == "short" else self.point
        found = Curve(*self.shape, task.kind, tuple(measure(task, nbytes) for nbytes in task.lengths))
        self.held.clear()
        return found

    def point(self, task: Task, nbytes: int) -> Point:
        """One length: a single round, and many."""
        if task.kind.what in ("round", "pieces"):
            one, many = (self.rounds(task, nbytes, count) for count in (1, BATCH))
            first, among = self.single(one), self.many(many) / BATCH
            one.free()
            many.free()
            return Point(nbytes, first, among)
        call = self.other(task, nbytes)
        return Point(nbytes, self.single(call), self.many(call))

    def added(self, task: Task, nbytes: int) -> Point:
        """What a round between the nodes adds to a short vector's call, some ranks of which may only wait."""
        without, longer = (self.short(2 * nbytes, self.pattern(task, count)) for count in (0, ADDED))
        each = max((self.single(longer) - self.single(without)) / ADDED, 1e-3)
        without.free()
        longer.free()
        return Point(nbytes, each, each)

    # What is run

    def other(self, task: Task, nbytes: int) -> Call:
        """What is no round between ranks."""
        what = task.kind.what
        if what == "barrier":
            return self.plain.Barrier
        if what == "call":
            none = np.empty(0, np.float32)
            return lambda: self.comm.Allreduce(none, none, algorithm="ring")
        if what == "meeting":
            return self.short(nbytes, self.pattern(task, 0))
        if what == "copy":
            a, b = zeros(nbytes), zeros(nbytes)
            return lambda: np.copyto(a, b)
        return self.inside(what, nbytes)

    def rounds(self, task: Task, nbytes: int, count: int) -> Plan:
        """``count`` rounds of one kind."""
        if task.kind.what == "pieces":
            return self.pieces(task, nbytes, count)
        vector = zeros(2 * nbytes)
        steps = self.pattern(task, count).steps(self.comm.rank, self.comm.size)
        half = vector.size // 2
        return bind(steps, vector, [0, half, 2 * half], self.comm.resources.messages, self.combine, WORD)

    def pattern(self, task: Task, count: int) -> Algorithm:
        """The same round again and again; where not everybody sends and receives it goes to and fro."""
        nobody = np.full(self.comm.size, -1)
        there, back = (task.like.to, task.like.source) if task.like else (nobody, nobody)
        to_and_fro = bool(((there < 0) != (back < 0)).any())

        def steps(r: int, p: int) -> Iterator[Step]:
            for k in range(count):
                to, source = (back, there) if to_and_fro and k % 2 else (there, back)
                yield Step(to[r], (0, 1), source[r], (1, 2), task.kind.reduce)

        return Algorithm(steps, lambda p: 2)

    def pieces(self, task: Task, nbytes: int, count: int) -> Plan:
        """Rounds between the nodes of all lanes, each in several messages at a time."""
        levels = self.two_levels
        schedule, lanes = self.pattern(task, count), []
        vector = zeros(2 * nbytes)
        for piece in segments(vector.size // 2, between.message_count(nbytes, 1)):
            part = vector[2 * piece.start : 2 * piece.stop]
            lanes.append(list(levels.between(schedule, part, self.combine, WORD)) if levels.drives else [])
        return interleaved(lanes)

    def short(self, nbytes: int, inter: Algorithm) -> Plan:
        """A short vector's call, with any rounds between the nodes."""
        vector, source = zeros(nbytes), zeros(nbytes)
        data = Operands(address_of(source), address_of(vector), vector, "float32", "sum", self.combine)
        plan = self.two_levels.short(data, WORD, inter)
        self.held += [vector, source]
        return plan

    def inside(self, what: str, nbytes: int) -> Call:
        """A reduce-scatter or an allgather inside each node."""
        levels, vector, source = self.two_levels, zeros(nbytes), zeros(nbytes)
        memory, width = levels.memory, levels.members
        cuts = [vector.size * k // width for k in range(width + 1)]
        counts = np.diff(cuts).tolist()
        mine = address_of(vector) + ITEM * cuts[levels.place]
        if what == "scatter":
            run = memory.bind_reduce_scatter(address_of(source), mine, counts, "float32", "sum", WORD)
        else:
            sizes, places = [ITEM * each for each in counts], [ITEM * each for each in cuts[:-1]]
            run = memory.bind_allgather(mine, address_of(vector), sizes, places, WORD)
        self.held += [vector, source]
        return run

    @property
    def two_levels(self) -> TwoLevels:
        """Shared memory inside the nodes, messages between them."""
        if self.levels is None:
            raise ArgumentError("the ranks of the nodes share no memory: measure without hierarchical")
        return self.levels

    # How it is timed

    def single(self, call: Call) -> float:
        """Microseconds of one call after a rest."""
        call()
        took, times = 0.0, list[float]()
        while len(times) < SINGLES and not (len(times) > 2 and took > LONG):
            for _ in range(self.rest):
                self.plain.Barrier()
            times.append(self.agreed(call, 1))
            took += times[-1] / 1e6
        return median(times)

    def many(self, call: Call) -> float:
        """Microseconds of one call among many."""
        self.plain.Barrier()
        count = int(min(MOST, max(1, SECONDS * 1e6 / self.agreed(call, 2))))
        took, times = 0.0, list[float]()
        while len(times) < TIMES and not (len(times) > 1 and took > LONG):
            times.append(self.agreed(call, count))
            took += count * times[-1] / 1e6
        return median(times[1:])

    def agreed(self, call: Call, count: int) -> float:
        """Microseconds of each of some calls, the mean over the ranks."""
        began = perf_counter_ns()
        for _ in range(count):
            call()
        mine = (perf_counter_ns() - began) / 1e3 / count
        return max(sum(self.plain.allgather(mine)) / self.comm.size, 1e-3)


def zeros(nbytes: int) -> Vector:
    """Numbers to move and to sum."""
    return np.zeros(max(1, nbytes // ITEM), np.float32)


def address_of(vector: Vector) -> int:
    """Where it begins."""
    return int(vector.ctypes.data)
