"""Measures single rounds on several nodes by the length of their messages, for :mod:`hpccomm.collectives.curves`.

All ranks take part.  Each length is timed in calls of one round and of a few, a barrier before each as in all our
benchmarks; the difference is what a further round takes.  A time is the mean over the ranks, then the median over all
calls; everything is visited several times, so that a disturbance does not spoil one length alone.  No collective is
run, only rounds of its kind.
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
from hpccomm.two_levels import SHORT_BYTES, Operands, TwoLevels

LENGTHS = (4, 64, 1024, 4096, 8192, 16384, 32768, between.MESSAGE_BYTES, 1 << 16, 1 << 17, 1 << 18, 1 << 20, 1 << 22)
"""Bytes of the messages that are measured; close together where transports change their ways."""
FLIGHTS = (4096, 16384, 32768, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21)
"""Bytes that are on their way from a rank at the same time, in pieces."""
SEGMENTS = (16384, 1 << 16, 1 << 18, 1 << 20)
"""Bytes that are reduced and gathered inside a node."""
SHORT = (4, 64, 512, SHORT_BYTES // 4, SHORT_BYTES)
COPIES = (4, 4096, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)

SECONDS = 0.03
"""For calls of one length, each visit."""
VISITS, MOST = 3, 60
"""How often each length is visited, and the most calls of a visit."""
FEW = 4
"""Rounds of the longer calls."""
WORD = 1
"""The tag, and the word in shared memory, of all that is measured here."""

Call = Callable[[], object]
Times = tuple[list[float], list[float]]
"""Microseconds of calls of one round, and of a few."""
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
    visits = [[bench.visit(task) for task in tasks] for _ in range(VISITS)]
    shape = topology.count, topology.per_node[0]
    found = [Curve(*shape, task.kind, joined(task, times)) for task, *times in zip(tasks, *visits, strict=True)]
    agreed: tuple[Curve, ...] = comm.bcast(tuple(found))
    return agreed


def joined(task: Task, visits: Sequence[Sequence[Times]]) -> tuple[Point, ...]:
    """The points of a kind: medians over all calls of all visits."""
    points = []
    for nbytes, *found in zip(task.lengths, *visits, strict=True):
        one, few = (median([us for times in found for us in times[k]]) for k in (0, 1))
        points.append(Point(nbytes, one, max((few - one) / (FEW - 1), few / FEW**2)))
    return tuple(points)


def wanted(nodes: npt.NDArray[np.int64], algorithms: Sequence[str], most: int, levels: bool) -> Iterator[Task]:
    """Everything whose price is needed: the fixed ones, the rounds of the schedules, what two levels are made of."""
    yield Task(Kind("call"), None, (0,))
    yield Task(Kind("copy"), None, up_to(COPIES, most))
    flat = [ALGORITHMS["allreduce"][name] for name in algorithms if name in ALGORITHMS["allreduce"]]
    yield from of_rounds([each for each in flat if not each.lanes], nodes, most, "round", LENGTHS)
    if not levels or "hierarchical" not in algorithms:
        return
    ends, lanes = np.arange(int(nodes.max()) + 1), lanes_of(nodes).rank.shape[1]
    inter = ALGORITHMS["allreduce"]
    yield from of_rounds([inter["doubling"], inter["butterfly"]], ends, SHORT_BYTES, "short", SHORT)
    if most > SHORT_BYTES:
        yield Task(Kind("scatter"), None, up_to(SEGMENTS, most))
        yield Task(Kind("gather"), None, up_to(SEGMENTS, most))
        in_one = most if ends.size == 2 else min(most, 2 * between.MESSAGE_BYTES * lanes)
        pieces = {
            task.kind: task
            for name, nbytes in (("doubling", in_one), ("butterfly", in_one), ("ring", most))
            for task in of_rounds([inter[name]], ends, nbytes // lanes, "pieces", FLIGHTS)
        }
        for kind, task in pieces.items():
            if kind.messages >= ends.size:
                on_all = kind._replace(crossing=lanes * kind.crossing, messages=lanes * kind.messages)
                yield task._replace(kind=on_all)


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
        self.levels: TwoLevels | None = comm.resources.two_levels
        self.held: list[Vector] = []
        self.combine = operations.combiner(MPI.SUM)
        few = np.zeros(1, np.float32)
        if self.levels:
            comm.Allreduce(few, few.copy(), algorithm="hierarchical")  # from now on waiting ranks drive messages

    def visit(self, task: Task) -> list[Times]:
        """One kind at all its lengths (collective)."""
        found = [(self.timed(*self.call(task, n, 1)), self.timed(*self.call(task, n, FEW))) for n in task.lengths]
        self.held.clear()
        return found

    # What is run

    def call(self, task: Task, nbytes: int, count: int) -> tuple[Call, Call]:
        """A call of ``count`` rounds of a kind, and what gives back what it holds."""
        what = task.kind.what
        if what in ("round", "pieces", "short"):
            plan = {"round": self.rounds, "pieces": self.pieces, "short": self.short}[what](task, nbytes, count)
            return plan, plan.free
        once = self.other(what, nbytes)
        return (lambda: [once() for _ in range(count)]), nothing

    def other(self, what: str, nbytes: int) -> Call:
        """What is no round between ranks."""
        if what == "call":
            none = np.empty(0, np.float32)
            return lambda: self.comm.Allreduce(none, none, algorithm="ring")
        if what == "copy":
            a, b = zeros(nbytes), zeros(nbytes)
            return lambda: np.copyto(a, b)
        return self.inside(what, nbytes)

    def rounds(self, task: Task, nbytes: int, count: int) -> Plan:
        """Rounds of a schedule that runs as it stands."""
        vector = zeros(2 * nbytes)
        steps = self.pattern(task, count).steps(self.comm.rank, self.comm.size)
        half = vector.size // 2
        return bind(steps, vector, [0, half, 2 * half], self.comm.resources.messages, self.combine, WORD)

    def pattern(self, task: Task, count: int) -> Algorithm:
        """The same round again and again; where not everybody sends and receives it goes to and fro."""
        assert task.like is not None
        there, back = task.like.to, task.like.source
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

    def short(self, task: Task, nbytes: int, count: int) -> Plan:
        """A short vector's call, with any number of rounds between the nodes."""
        vector, source = zeros(2 * nbytes), zeros(2 * nbytes)
        data = Operands(address_of(source), address_of(vector), vector, "float32", "sum", self.combine)
        self.held += [vector, source]
        return self.two_levels.short(data, WORD, self.pattern(task, count))

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

    def timed(self, call: Call, free: Call) -> list[float]:
        """Microseconds of some calls, each the mean over the ranks."""
        [first] = self.times(call, 1)
        found = self.times(call, int(min(MOST, max(1, SECONDS * 1e6 / first))))
        free()
        return found

    def times(self, call: Call, count: int) -> list[float]:
        """Microseconds of ``count`` calls, a barrier before each; the same on all ranks."""
        mine = []
        for _ in range(count):
            self.plain.Barrier()
            began = perf_counter_ns()
            call()
            mine.append((perf_counter_ns() - began) / 1e3)
        return [max(sum(each) / len(each), 1e-3) for each in zip(*self.plain.allgather(mine), strict=True)]


def zeros(nbytes: int) -> Vector:
    """Numbers to move and to sum."""
    return np.zeros(max(1, nbytes // ITEM), np.float32)


def address_of(vector: Vector) -> int:
    """Where it begins."""
    return int(vector.ctypes.data)


def nothing() -> None:
    """There is nothing to give back."""
