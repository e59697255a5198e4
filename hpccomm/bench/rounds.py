"""Measures the cost of single rounds on several nodes, by message length, for :mod:`hpccomm.performance.measured`.

All ranks take part.  At each length, calls of one round (cold) and of a few rounds are timed, with a barrier before
each call as in all benchmarks; the difference is the time of a further round (warm).  A time is the mean over the
ranks, or the maximum where only some ranks take part, then the median over all calls.  Every length is visited several
times, so that a disturbance does not spoil a single one.  No collective runs, only rounds of its types.

Work of a rank alone or inside its node is timed again with a round between the nodes after it: where ranks share cores,
the others wait in that round for longer than the work itself takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from statistics import fmean as mean
from statistics import median
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.backends.interpreter import CompiledSchedule
from hpccomm.backends.schedules import Reduction
from hpccomm.calls import operations
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.engine import BoundSchedule
from hpccomm.collectives.hierarchical import (
    MANY,
    MESSAGE_BYTES,
    SHORT_BYTES,
    Channels,
    channel_parts,
    channel_steps,
    channels_of,
)
from hpccomm.collectives.lowering import Layout, Pipeline, lower
from hpccomm.collectives.schedule import Algorithm, NodeStep, Step
from hpccomm.errors import ArgumentError
from hpccomm.performance.measured import CONCURRENT, ITEM, CostCurve, Point, Round, RoundType, per_channel, rounds

LENGTHS = (4, 64, 1024, 4096, 8192, 16384, 32768, MESSAGE_BYTES, 1 << 16, 1 << 17, 1 << 18, 1 << 20, 1 << 22)
"""Bytes of the measured messages; close together where transports change their protocol."""
FLIGHTS = (4096, 16384, 32768, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21)
"""Bytes of a rank in flight at the same time, in concurrent messages."""
SEGMENTS = (16384, 1 << 16, 1 << 18, 1 << 20)
"""Bytes of a reduce-scatter or allgather inside a node."""
SHORT_MOST = SHORT_BYTES["allreduce"]
SHORT = (4, 64, 512, SHORT_MOST // 4, SHORT_MOST)
COPIES = (4, 4096, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)

SECONDS = 0.03
"""The time for the calls of one length in a visit."""
REPETITIONS, MOST = 3, 150
"""The number of visits to each length, and the most calls of a visit."""
FEW = 4
"""The number of rounds of the longer calls."""
WORD = 1
"""The tag and the fingerprint word in shared memory of all measured rounds."""

Call = Callable[[], object]
Times = tuple[list[float], ...]
"""Microseconds of calls of one round and of a few; for work inside a node also with a round between the nodes after
each, and of those rounds alone."""
Aggregate = Callable[[Sequence[float]], float]
"""Combines the times of the ranks."""
Vector = npt.NDArray[np.float32]


class Task(NamedTuple):
    """A round type, successive rounds of it, and the message lengths to measure."""

    kind: RoundType
    turns: tuple[Round, ...]
    lengths: tuple[int, ...]

    @property
    def local(self) -> bool:
        """Whether the work stays inside a node while other rounds of a call leave it."""
        return self.kind.what in ("call", "copy") or (self.kind.what == "round" and not self.kind.crossing)

    @property
    def partial(self) -> bool:
        """Whether only some ranks take part."""
        return any((each.to < 0).any() for each in self.turns)


def measure_round_costs(comm: Any, algorithms: Sequence[str], most: int) -> tuple[CostCurve, ...]:
    """Measure the rounds of these allreduces of up to ``most`` bytes on the nodes of ``comm`` (collective).

    ``comm`` is a Communicator on several nodes with equally many ranks, numbered by node; for other layouts the result
    is empty.  The result is the same on all ranks.
    """
    layout = comm.layout
    if layout.count == 1 or not (layout.even and layout.contiguous):
        return ()
    bench = Rounds(comm)
    tasks = list(cost_tasks(layout.nodes, algorithms, most, bench.shares_memory))
    visits = [[bench.visit(task) for task in tasks] for _ in range(REPETITIONS)]
    shape = layout.count, layout.per_node[0]
    found = [
        CostCurve(*shape, task.kind, merge_visits(task, times)) for task, *times in zip(tasks, *visits, strict=True)
    ]
    agreed: tuple[CostCurve, ...] = comm.bcast(tuple(found))
    return agreed


def merge_visits(task: Task, visits: Sequence[Sequence[Times]]) -> tuple[Point, ...]:
    """The points of a round type: medians over all calls of all visits."""
    points = []
    for nbytes, *found in zip(task.lengths, *visits, strict=True):
        one, few, *more = (median(chain.from_iterable(each)) for each in zip(*found, strict=True))
        cold, warm = one, max((few - one) / (FEW - 1), few / FEW**2)
        if more:
            one_and_across, few_and_across, across, few_across = more
            cold = max(cold, one_and_across - across)
            warm = max(warm, (few_and_across - few_across) / FEW)
        points.append(Point(nbytes, cold, warm))
    return tuple(points)


def cost_tasks(nodes: npt.NDArray[np.int64], algorithms: Sequence[str], most: int, levels: bool) -> Iterator[Task]:
    """The tasks for pricing: call and copy, the rounds of flat schedules, the parts of the hierarchical allreduce."""
    yield Task(RoundType("call"), (), (0,))
    yield Task(RoundType("copy"), (), lengths_up_to(COPIES, most))
    flat = [ALGORITHMS["allreduce"][name] for name in algorithms if name in ALGORITHMS["allreduce"]]
    yield from round_tasks([each for each in flat if not each.segmented], nodes, most, "round", LENGTHS)
    if not levels or "hierarchical" not in algorithms:
        return
    leaders, channels = np.arange(int(nodes.max()) + 1), channels_of(nodes).rank.shape[1]
    inter = ALGORITHMS["allreduce"]
    yield from round_tasks([inter["doubling"], inter["butterfly"]], leaders, SHORT_MOST, "short", SHORT)
    if most > SHORT_MOST:
        yield Task(RoundType("scatter"), (), lengths_up_to(SEGMENTS, most))
        yield Task(RoundType("gather"), (), lengths_up_to(SEGMENTS, most))
        in_one = most if leaders.size == 2 else min(most, 2 * MESSAGE_BYTES * channels)
        concurrent = {
            task.kind: task
            for name, nbytes in (("doubling", in_one), ("butterfly", in_one), ("ring", most))
            for task in round_tasks([inter[name]], leaders, nbytes // channels, CONCURRENT, FLIGHTS)
        }
        for kind, task in concurrent.items():
            if kind.messages >= leaders.size:
                yield task._replace(kind=per_channel(kind, channels))


def round_tasks(
    schedules: Sequence[Algorithm], nodes: npt.NDArray[np.int64], most: int, what: str, lengths: Sequence[int]
) -> Iterator[Task]:
    """A task for every round type of some schedules, with the peers and the lengths that occur."""
    longest: dict[RoundType, float] = {}
    partners: dict[RoundType, dict[bytes, Round]] = {}
    for schedule in schedules:
        for nbytes in (2 * ITEM, most):
            for each in rounds(schedule, nodes, nbytes, what):
                longest[each.kind] = max(each.bytes, longest.get(each.kind, 0.0))
                partners.setdefault(each.kind, {}).setdefault(each.to.tobytes(), each)
    for kind, above in longest.items():
        yield Task(kind, tuple(partners[kind].values()), lengths_up_to(lengths, above))


def lengths_up_to(lengths: Sequence[int], most: float) -> tuple[int, ...]:
    """The lengths not above ``most``, and the next one."""
    above = [each for each in lengths if each >= most][:1]
    return (*(each for each in lengths if each < most), *above)


class Rounds:
    """Runs and times rounds on one communicator."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.plain = comm, MPI.Intracomm(comm)
        comm.context.prepare("Allreduce")
        self.shares_memory = comm.context.schedules.memory is not None
        self.buffers: list[Vector] = []
        self.combine = operations.combiner(MPI.SUM)
        few = np.zeros(1, np.float32)
        if self.shares_memory:
            comm.Allreduce(few, few.copy(), algorithm="hierarchical")  # from here on waiting ranks progress messages

    def visit(self, task: Task) -> list[Times]:
        """Time one round type at all its lengths (collective)."""
        found = [self.times_of(task, nbytes) for nbytes in task.lengths]
        self.buffers.clear()
        return found

    def times_of(self, task: Task, nbytes: int) -> Times:
        """Time one round type at one length (collective)."""
        over: Aggregate = max if task.partial else mean
        one, few = self.measure(*self.call(task, nbytes, 1), over), self.measure(*self.call(task, nbytes, FEW), over)
        if not task.local:
            return one, few
        across = self.rounds(self.inter_node_round, ITEM, 1)
        call, free = self.call(task, nbytes, 1)

        def both() -> None:
            call()
            across()

        more = [self.measure(repeat(n, what), no_op, mean) for what in (both, across) for n in (1, FEW)]
        free()
        across.free()
        return one, few, *more

    @property
    def inter_node_round(self) -> Task:
        """A round in which every rank sends to the next node."""
        p, width = self.comm.size, self.comm.layout.per_node[0]
        to, source = (np.arange(p) + width) % p, (np.arange(p) - width) % p
        kind = RoundType("round", width, 0, p, self.comm.layout.count == 2)
        return Task(kind, (Round(kind, ITEM, to, source),), (ITEM,))

    def call(self, task: Task, nbytes: int, count: int) -> tuple[Call, Call]:
        """A call of ``count`` rounds of a type, and the function that frees it."""
        what = task.kind.what
        if what in ("round", CONCURRENT, "short"):
            plan = {"round": self.rounds, CONCURRENT: self.channel_rounds, "short": self.short_call}[what](
                task, nbytes, count
            )
            return plan, plan.free
        return repeat(count, self.local_call(what, nbytes)), no_op

    def local_call(self, what: str, nbytes: int) -> Call:
        """A call without rounds between ranks, or with rounds inside nodes only."""
        if what == "call":
            none = np.empty(0, np.float32)
            return lambda: self.comm.Allreduce(none, none, algorithm="ring")
        if what == "copy":
            a, b = zeros(nbytes), zeros(nbytes)
            return lambda: np.copyto(a, b)
        return self.intra_node_call(what, nbytes)

    def rounds(self, task: Task, nbytes: int, count: int) -> BoundSchedule | CompiledSchedule:
        """Rounds of a flat schedule."""
        return self.bind(self.pattern(task, count).steps(self.comm.rank, self.comm.size), 2 * nbytes, 2, Pipeline())

    def bind(
        self, steps: Iterable[Step | NodeStep], nbytes: int, blocks: int, how: Pipeline, reads_source: bool = False
    ) -> BoundSchedule | CompiledSchedule:
        """Steps on a vector of zeros; the operand of a first reduction inside a node may be in another vector."""
        vector, source = zeros(nbytes), zeros(nbytes)
        self.buffers += [vector, source]
        layout = Layout(vector.size, ITEM, blocks)
        program = lower(steps, self.comm.rank, layout, how, reads_source, due=(0, 0))
        reduction = Reduction(self.combine, "float32", "sum")
        made: BoundSchedule | CompiledSchedule = self.comm.context.schedules.bind(
            program, vector, source, reduction, WORD
        )
        return made

    def pattern(self, task: Task, count: int) -> Algorithm:
        """Rounds of one type with the peers of a schedule in turn, so that a late rank delays others as it would there.

        A single round in which some ranks only send or only receive alternates with its reverse.
        """
        turns = [(each.to, each.source) for each in task.turns]
        if len(turns) == 1:
            [(there, back)] = turns
            turns = [(there, back), (back, there)] if ((there < 0) != (back < 0)).any() else turns

        def steps(r: int, p: int) -> Iterator[Step]:
            for k in range(count):
                to, source = turns[k % len(turns)]
                out, into = k % 2, 1 - k % 2  # a round sends what the one before has received
                yield Step(to[r], (out, out + 1), source[r], (into, into + 1), task.kind.reduce)

        return Algorithm(steps, lambda p: 2)

    def channel_rounds(self, task: Task, nbytes: int, count: int) -> BoundSchedule | CompiledSchedule:
        """Rounds between the nodes on all channels, each with several concurrent messages."""
        steps = channel_steps(self.pattern(task, count).steps, self.comm.rank, self.channels)
        return self.bind(steps, 2 * nbytes, 2, Pipeline(pending=MANY, message_bytes=MESSAGE_BYTES))

    def short_call(self, task: Task, nbytes: int, count: int) -> BoundSchedule | CompiledSchedule:
        """A call for a short vector with ``count`` rounds between the nodes."""
        channels = channels_of(self.comm.layout.nodes, 1)
        steps = channel_steps(self.pattern(task, count).steps, self.comm.rank, channels)
        inside = [channel_parts(each, channels, 2) for each in ("reduce_scatter", "allgather")]
        return self.bind([inside[0], *steps, inside[1]], 2 * nbytes, 2, Pipeline(), True)

    def intra_node_call(self, what: str, nbytes: int) -> Call:
        """A reduce-scatter or an allgather inside each node."""
        channels = self.channels
        step = channel_parts("reduce_scatter" if what == "scatter" else "allgather", channels, 1)
        return self.bind([step], nbytes, channels.rank.shape[1], Pipeline(), what == "scatter")

    @property
    def channels(self) -> Channels:
        """The channels of the communicator."""
        if not self.shares_memory:
            raise ArgumentError("the ranks of a node share no memory: measure without hierarchical")
        return channels_of(self.comm.layout.nodes)

    def measure(self, call: Call, free: Call, over: Aggregate) -> list[float]:
        """Microseconds of some calls, each combined over the ranks by ``over``."""
        [first] = self.times(call, 1, over)
        found = self.times(call, int(min(MOST, max(1, SECONDS * 1e6 / first))), over)
        free()
        return found

    def times(self, call: Call, count: int, over: Aggregate) -> list[float]:
        """Microseconds of ``count`` calls, a barrier before each; the same on all ranks."""
        mine = []
        for _ in range(count):
            self.plain.Barrier()
            began = perf_counter_ns()
            call()
            mine.append((perf_counter_ns() - began) / 1e3)
        return [max(over(each), 1e-3) for each in zip(*self.plain.allgather(mine), strict=True)]


def repeat(count: int, call: Call) -> Call:
    """A call that runs another one ``count`` times."""

    def run() -> None:
        for _ in range(count):
            call()

    return run


def zeros(nbytes: int) -> Vector:
    """A vector to send and to sum."""
    return np.zeros(max(1, nbytes // ITEM), np.float32)


def no_op() -> None:
    """Free nothing."""
