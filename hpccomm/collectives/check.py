"""Checks the records of all ranks: they are run on symbolic contents, as late as MPI may complete them.

*p ranks; a cell is one element on one rank and holds its place in the vector and the set of contributing ranks.*  A
message is complete when both its ends have started; a send is not buffered; ranks of a node go on when all have come.
It shows that

- every send has its receive, of the same bytes, in the same order; every request is awaited, once;
- no rank waits for ever, with windows and node steps as they are;
- nothing is read or written while a message still uses it, and the source is never written;
- operands stand on the side of their rank, no contribution counts twice, and in the end each rank holds what the
  collective promises, each element at its place.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from hpccomm.collectives.lowering import Layout, Pipeline, lower
from hpccomm.collectives.records import KINDS, Meeting, Program
from hpccomm.collectives.schedule import Algorithm, NodeStep, Step, without_node_steps
from hpccomm.collectives.verify import (
    BLOCK_IS_RANK,
    REDUCING_COLLECTIVES,
    ROOTED_COLLECTIVES,
    ScheduleTable,
    find_algorithm,
    root_argument,
    tabulate,
)
from hpccomm.errors import ScheduleError
from hpccomm.kernels.interpreter.records import COPY, NODE, RECEIVE, REDUCE, SEND, SOURCE, SPARE, VECTOR, WAIT

EMPTY = -1
"""A cell without contents."""


def check_algorithm(
    algorithm: Algorithm | str,
    collective: str,
    p: int,
    root: int = 0,
    pipeline: Pipeline | None = None,
    shared: bool = True,
    length: int = 0,
) -> int:
    """Lower an algorithm for every rank and check the records; returns their number.

    ``shared``: node steps stay, else they are messages.  ``length`` are the elements of a vector, by default one for
    each block and segment; block b of an allgather or a reduce-scatter has ``length + b % 2`` elements.
    """
    name, algorithm = find_algorithm(algorithm, collective)
    how = pipeline or Pipeline()
    blocks = algorithm.blocks(p)
    if collective in BLOCK_IS_RANK:
        sizes = [length + b % 2 if length else how.segments for b in range(p)]
        layout = Layout(sum(sizes), 1, p, [0, *np.cumsum(sizes).tolist()])
    else:
        layout = Layout(length or blocks * how.segments, 1, blocks)
    ranks = np.arange(p)
    steps = algorithm.steps(ranks, p, *root_argument(collective, root))
    table = tabulate(steps if shared else without_node_steps(steps, ranks), p)
    own = ranks if algorithm.own_blocks is None else np.asarray(algorithm.own_blocks(p))
    duty = Duty(collective, layout, root, own.tolist())
    programs = [
        lower(column, r, layout, how, collective in REDUCING_COLLECTIVES, duty.due(r))
        for r, column in enumerate(columns(table))
    ]
    title = f"{name} {collective}, p={p}" + (f", root={root}" if collective in ROOTED_COLLECTIVES else "")
    return check_programs(programs, duty, title)


def columns(table: ScheduleTable) -> Iterator[list[Step | NodeStep]]:
    """The steps of each rank."""
    ends = table.send_first + table.send_count, table.recv_first + table.recv_count
    rows = (table.to, table.send_first, ends[0], table.source, table.recv_first, ends[1])
    meetings, rounds = table.meetings, len(table.reduce)
    reduce = table.reduce.tolist()
    for fields in zip(*(row.T.tolist() for row in rows), strict=True):
        steps: list[Step | NodeStep] = []
        for k, (to, send, send_end, source, recv, recv_end) in enumerate(zip(*fields, strict=True)):
            steps += meetings.get(k, ())
            steps.append(Step(to, (send, send_end), source, (recv, recv_end), reduce[k]))
        yield [*steps, *meetings.get(rounds, ())]


class Duty(NamedTuple):
    """What a collective starts from and promises, on elements."""

    collective: str
    layout: Layout
    root: int
    own: Sequence[int]
    """The block of each rank in an allgather or reduce-scatter."""

    def block(self, r: int) -> tuple[int, int]:
        """The elements of the block of a rank."""
        offsets = self.layout.offsets
        assert offsets is not None
        return offsets[self.own[r]], offsets[self.own[r] + 1]

    def due(self, r: int) -> tuple[int, int]:
        """The elements that rank r must hold in the end."""
        if self.collective == "reduce" and r != self.root:
            return 0, 0
        return self.block(r) if self.collective == "reduce_scatter" else (0, self.layout.elements)

    def before(self, r: int, p: int) -> list[int]:
        """The operand of rank r, or its vector where nothing is reduced."""
        lo, hi = 0, self.layout.elements
        if self.collective == "allgather":
            lo, hi = self.block(r)
        elif self.collective == "bcast" and r != self.root:
            hi = 0
        return [(k << p) | (1 << r) if lo <= k < hi else EMPTY for k in range(self.layout.elements)]

    def after(self, p: int) -> list[int]:
        """What every cell that is due must hold."""
        if self.collective in REDUCING_COLLECTIVES:
            return [(k << p) | ((1 << p) - 1) for k in range(self.layout.elements)]
        if self.collective == "bcast":
            return [(k << p) | (1 << self.root) for k in range(self.layout.elements)]
        found = [EMPTY] * self.layout.elements
        for r in range(p):
            for k in range(*self.block(r)):
                found[k] = (k << p) | (1 << r)
        return found


def check_programs(programs: Sequence[Program], duty: Duty, title: str) -> int:
    """Check the programs of all ranks; returns the number of records.

    Raises :class:`ScheduleError` with rank, record and what is wrong.
    """
    world = World(programs, duty, title)
    world.run()
    world.check_result()
    return sum(len(each.records) for each in programs)


class Use(NamedTuple):
    """Memory that a started message uses."""

    peer: int
    number: int
    """The number of the message among those of the two ranks."""
    buffer: int
    first: int
    end: int
    receives: bool


class Machine:
    """One rank: its records, memory and pending messages."""

    def __init__(self, rank: int, program: Program, operand: list[int], reduces: bool) -> None:
        self.rank, self.records, self.meetings = rank, program.records.tolist(), program.meetings
        count = len(operand)
        vector = [EMPTY] * count if reduces else operand
        self.buffers = [vector, operand if reduces else [], [EMPTY] * program.spare_bytes]
        self.senders = [EMPTY] * program.spare_bytes
        self.uses: dict[int, Use] = {}
        self.at = 0
        self.met = 0


class World:
    """All ranks and the messages between them."""

    def __init__(self, programs: Sequence[Program], duty: Duty, title: str) -> None:
        self.p, self.duty, self.title = len(programs), duty, title
        self.mask = (1 << self.p) - 1
        reduces = duty.collective in REDUCING_COLLECTIVES
        self.machines = [Machine(r, program, duty.before(r, self.p), reduces) for r, program in enumerate(programs)]
        self.sent: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
        self.received: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.came: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self.waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.ready: deque[int] = deque(range(self.p))

    def refuse(self, machine: Machine, why: str) -> NoReturn:
        """Raise the error, with rank and record."""
        if machine.at < len(machine.records):
            kind = machine.records[machine.at][0]
            name = KINDS[kind] if 0 < kind < len(KINDS) else f"record of kind {kind}"
            raise ScheduleError(f"{self.title}: rank {machine.rank}, record {machine.at} ({name}): {why}")
        raise ScheduleError(f"{self.title}: rank {machine.rank}, after the last record: {why}")

    def run(self) -> None:
        """Run all ranks until none can go on."""
        while self.ready:
            machine = self.machines[self.ready.popleft()]
            records, acts = machine.records, ACTS
            while machine.at < len(records):
                record = records[machine.at]
                if not acts.get(record[0], World.unknown)(self, machine, record):
                    break
                machine.at += 1
        for machine in self.machines:
            if machine.at < len(machine.records):
                self.refuse(machine, self.describe_wait(machine))
        self.check_ends()

    def describe_wait(self, machine: Machine) -> str:
        """What a rank waits for in vain."""
        kind, _, _, _, _, request, *_ = machine.records[machine.at]
        if kind == NODE:
            members = machine.meetings[request].members
            missing = [q for q in members if q not in self.came[members]]
            return f"waits for ever for ranks {missing} of its node"
        use = machine.uses[request]
        return f"waits for ever for a message {'from' if use.receives else 'to'} rank {use.peer}"

    def check_ends(self) -> None:
        """Every request was awaited, and there are as many receives as sends."""
        for machine in self.machines:
            for use in machine.uses.values():
                what = f"{'from' if use.receives else 'to'} rank {use.peer}"
                self.refuse(machine, f"the message {what} was never awaited")
        for (source, to), messages in self.sent.items():
            if len(messages) != len(self.received[source, to]):
                self.refuse(
                    self.machines[to], f"rank {source} sends {len(messages)} messages, not as many are received"
                )

    # Memory

    def cells(self, machine: Machine, buffer: int, first: int, nbytes: int, writes: bool) -> list[int]:
        """A buffer, after a check that these bytes lie in it and that no pending message uses them."""
        if not 0 <= buffer < len(machine.buffers):
            self.refuse(machine, f"there is no buffer {buffer}")
        memory = machine.buffers[buffer]
        if nbytes <= 0 or first < 0 or first + nbytes > len(memory):
            self.refuse(machine, f"bytes {first} to {first + nbytes} do not lie in a buffer of {len(memory)}")
        if writes and buffer == SOURCE:
            self.refuse(machine, "writes the source")
        end = first + nbytes
        for _, _, used, at, use_end, receives in machine.uses.values():
            if used == buffer and at < end and first < use_end and (writes or receives):
                self.refuse(machine, f"uses bytes {first} to {end} while a pending message does")
        return memory

    def read(self, machine: Machine, buffer: int, first: int, nbytes: int) -> list[int]:
        """Contents, all of which must be initialised."""
        found = self.cells(machine, buffer, first, nbytes, writes=False)[first : first + nbytes]
        if EMPTY in found:
            self.refuse(machine, f"reads byte {first + found.index(EMPTY)} before it is initialised")
        return found

    def join(self, machine: Machine, mine: list[int], new: list[int]) -> list[int]:
        """The sums of two operands."""
        p, mask = self.p, self.mask
        for a, b in zip(mine, new, strict=True):
            if a >> p != b >> p:
                self.refuse(machine, f"adds element {b >> p} to element {a >> p}")
            if a & b & mask:
                twice = (a & b & self.mask).bit_length() - 1
                self.refuse(machine, f"counts the contribution of rank {twice} to element {a >> self.p} twice")
        return [a | b for a, b in zip(mine, new, strict=True)]

    # Records; each returns whether the rank goes on

    def unknown(self, machine: Machine, record: Any) -> NoReturn:
        self.refuse(machine, "no such record")

    def send(self, machine: Machine, record: Any) -> bool:
        _, peer, buffer, at, nbytes, request, *_ = record
        contents = self.read(machine, buffer, at, nbytes)
        pair = (machine.rank, peer)
        self.begin(machine, peer, request, Use(peer, len(self.sent[pair]), buffer, at, at + nbytes, False))
        self.sent[pair].append(contents)
        self.wake(pair)
        return True

    def receive(self, machine: Machine, record: Any) -> bool:
        _, peer, buffer, at, nbytes, request, *_ = record
        self.cells(machine, buffer, at, nbytes, True)
        pair = (peer, machine.rank)
        self.begin(machine, peer, request, Use(peer, len(self.received[pair]), buffer, at, at + nbytes, True))
        self.received[pair].append(nbytes)
        self.wake(pair)
        return True

    def begin(self, machine: Machine, peer: int, request: int, use: Use) -> None:
        """Start a message."""
        if not 0 <= peer < self.p or peer == machine.rank:
            self.refuse(machine, f"there is no other rank {peer}")
        if request in machine.uses:
            self.refuse(machine, f"request {request} is still pending")
        machine.uses[request] = use

    def wake(self, pair: tuple[int, int]) -> None:
        """Let the ranks go on that wait for a message of a pair."""
        self.ready.extend(self.waiting.pop(pair, ()))

    def wait(self, machine: Machine, record: Any) -> bool:
        _, peer, _, _, nbytes, request, *_ = record
        use = machine.uses.get(request)
        if use is None:
            self.refuse(machine, f"request {request} is not pending")
        if peer != (use.peer if use.receives else EMPTY) or nbytes != use.end - use.first:
            self.refuse(machine, f"is not for the message that request {request} has started")
        pair = (use.peer, machine.rank) if use.receives else (machine.rank, use.peer)
        here, there, number = self.sent[pair], self.received[pair], use.number
        if len(here) <= number or len(there) <= number:
            self.waiting[pair].append(machine.rank)
            return False
        contents, room = here[number], there[number]
        if len(contents) != room:
            self.refuse(machine, f"rank {pair[0]} sends {len(contents)} bytes, rank {pair[1]} receives {room}")
        del machine.uses[request]
        if use.receives:
            machine.buffers[use.buffer][use.first : use.end] = contents
            if use.buffer == SPARE:
                machine.senders[use.first : use.end] = [use.peer] * (use.end - use.first)
        return True

    def reduce(self, machine: Machine, record: Any) -> bool:
        _, _, buffer, at, nbytes, _, operand, operand_at, lower_first = record
        new, mine = self.read(machine, operand, operand_at, nbytes), self.read(machine, buffer, at, nbytes)
        if operand != SPARE or any(
            (sender < machine.rank) != lower_first for sender in machine.senders[operand_at : operand_at + nbytes]
        ):
            self.refuse(machine, "the operand stands on the wrong side")
        self.cells(machine, buffer, at, nbytes, True)[at : at + nbytes] = self.join(machine, mine, new)
        return True

    def copy(self, machine: Machine, record: Any) -> bool:
        _, _, buffer, at, nbytes, _, operand, operand_at, _ = record
        contents = self.read(machine, operand, operand_at, nbytes)
        self.cells(machine, buffer, at, nbytes, True)[at : at + nbytes] = contents
        return True

    def node(self, machine: Machine, record: Any) -> bool:
        if not 0 <= record[5] < len(machine.meetings):
            self.refuse(machine, f"there is no meeting {record[5]}")
        meeting = machine.meetings[record[5]]
        came = self.came[meeting.members]
        if machine.rank in came:
            return False
        came.append(machine.rank)
        if len(came) < len(meeting.members):
            return False
        del self.came[meeting.members]
        self.meet([self.machines[q] for q in meeting.members])
        for q in meeting.members:
            if q != machine.rank:
                self.machines[q].at += 1
                self.ready.append(q)
        return True

    def meet(self, machines: list[Machine]) -> None:
        """Run a node step whose ranks have all come."""
        found = [machine.meetings[machine.records[machine.at][5]] for machine in machines]
        first = found[0]
        for machine, each in zip(machines, found, strict=True):
            if each._replace(operand=0) != first._replace(operand=0):
                self.refuse(machine, f"runs another node step than rank {machines[0].rank}")
        self.check_parts(machines[0], first)
        parts = list(zip(first.first, first.nbytes, strict=True))
        if first.collective == "allgather":
            contents = [
                self.read(machine, VECTOR, at, n) if n else [] for machine, (at, n) in zip(machines, parts, strict=True)
            ]
        else:
            contents = [self.reduce_part(machines, found, at, n) if n else [] for at, n in parts]
        for k, machine in enumerate(machines):
            for j, (at, n) in enumerate(parts):
                if n and (j == k or first.collective == "allgather"):
                    self.cells(machine, VECTOR, at, n, j != k or first.collective != "allgather")
                    machine.buffers[VECTOR][at : at + n] = contents[j]

    def reduce_part(self, machines: list[Machine], found: list[Meeting], at: int, n: int) -> list[int]:
        """What all ranks of a node hold, reduced."""
        total: list[int] = []
        for machine, each in zip(machines, found, strict=True):
            new = self.read(machine, each.operand, at, n)
            total = self.join(machine, total, new) if total else new
        return total

    def check_parts(self, machine: Machine, meeting: Meeting) -> None:
        """The parts are as the collectives in shared memory need them."""
        having = [k for k, n in enumerate(meeting.nbytes) if n]
        ends = [at + n for at, n in zip(meeting.first, meeting.nbytes, strict=True)]
        if meeting.only >= 0 and having not in ([], [meeting.only]):
            self.refuse(machine, f"local rank {meeting.only} is not the only one that has a part")
        apart = any(end != at for end, at in zip(ends, meeting.first[1:], strict=False))
        if meeting.collective == "reduce_scatter" and meeting.only < 0 and apart:
            self.refuse(machine, "the parts of a reduction inside a node are not one interval")

    def check_result(self) -> None:
        """Each rank holds what the collective promises."""
        after = self.duty.after(self.p)
        for machine in self.machines:
            lo, hi = self.duty.due(machine.rank)
            vector = machine.buffers[VECTOR]
            if vector[lo:hi] != after[lo:hi]:
                wrong = next(k for k in range(lo, hi) if vector[k] != after[k])
                self.refuse(machine, f"element {wrong} is {self.describe(vector[wrong])}")

    def describe(self, cell: int) -> str:
        """The contents of a cell, for error messages."""
        if cell == EMPTY:
            return "not initialised"
        ranks = [r for r in range(self.p) if cell >> r & 1]
        return f"the sum of element {cell >> self.p} of ranks {ranks}"


ACTS = {
    SEND: World.send,
    RECEIVE: World.receive,
    WAIT: World.wait,
    REDUCE: World.reduce,
    COPY: World.copy,
    NODE: World.node,
}
"""What runs each kind of record."""
