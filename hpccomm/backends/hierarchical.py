"""An allreduce in two levels: shared memory inside each node, messages between the nodes.

*N nodes, L lanes: the ranks of the smallest node; n bytes.*  A long vector goes in segments: the ranks of a node reduce
a segment together, each lane a part of it; the ranks with the same lane on all nodes reduce their parts by messages,
so that every local rank drives the network; then the ranks of a node gather.  While one segment is between the nodes
the next is reduced inside, a turn later: whoever waits for messages drives all that are on their way.  Messages are
short, so that many are on their way in both directions: Open MPI's TCP sends one way at a time above 64 KB.

A short vector goes by the first rank of each node alone: fewest messages.  The others wait for the result in shared
memory, and have nothing to drive.  Any number of ranks on any node, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives.engine import Combine, Lane, Plan, Round, Transport, even_cuts, interleaved, segments
from hpccomm.collectives.hierarchical import Lanes, twins
from hpccomm.collectives.schedule import Algorithm
from hpccomm.layout import Link
from hpccomm.performance.inter_node import inter_node, message_count, segment_count

SHORT_BYTES = 8192
"""Up to here one rank of each node carries the vector."""
IDLE = 2e-3
"""Seconds for which a rank with no message on its way waits in shared memory before it looks after MPI."""


Late = Callable[[float, list[int]], None]


class Operands(NamedTuple):
    """A reduction's memory: addresses of what goes in and of what comes out, the latter also as a vector."""

    send: int
    recv: int
    vector: Any
    kind: str
    op: str
    combine: Combine


class TwoLevels:
    """Binds allreduces of ranks on several nodes; ``memory`` is shared by the ranks of this one's node.

    While ranks of the node are missing, ``memory.late`` has to drive messages.
    """

    def __init__(self, memory: Any, transport: Transport, lanes: Lanes, link: Link) -> None:
        self.memory, self.transport, self.lanes, self.link = memory, transport, lanes, link
        self.rank = transport.rank
        self.nodes, self.width = lanes.rank.shape
        self.place, self.members = int(lanes.place[self.rank]), int(memory.size)

    def bind(self, data: Operands, word: int) -> Plan:
        """Bind an allreduce; ``word`` is its signature."""
        nbytes = data.vector.nbytes
        inter = inter_node(self.nodes, nbytes, self.width, self.link)
        if nbytes <= SHORT_BYTES:
            return self.short(data, word, inter)
        cut = segments(data.vector.size, segment_count(nbytes))
        found = [list(self.long(data, word, inter, each)) for each in cut]
        turns = [turn for turn, lanes in enumerate(found) for _ in lanes]
        return interleaved([lane for lanes in found for lane in lanes], turns)

    def short(self, data: Operands, word: int, inter: Algorithm) -> Plan:
        """One rank of each node carries the whole vector."""
        memory, size = self.memory, data.vector.size
        meet = memory.bind_reduce(data.send, data.recv, size, data.kind, data.op, 0, word)
        lane = [Round([], [meet]), *(self.between(inter, data.vector, data.combine, word) if self.place == 0 else [])]
        share = memory.bind_bcast(data.recv, data.vector.nbytes, 0, word, idle(memory.late))
        return interleaved([[*lane, Round([], [share])]])

    def long(self, data: Operands, word: int, inter: Algorithm, segment: slice) -> Iterator[list[Round]]:
        """One segment: reduced inside, exchanged in several messages at a time, gathered inside."""
        vector, width = data.vector[segment], data.vector.itemsize
        start, cuts = segment.start * width, even_cuts(vector.size, self.width).tolist()
        cuts += [cuts[-1]] * (self.members - self.width)
        counts = np.diff(cuts).tolist()
        mine = data.recv + start + cuts[self.place] * width
        reduce = self.memory.bind_reduce_scatter(data.send + start, mine, counts, data.kind, data.op, word)
        sizes, places = [each * width for each in counts], [each * width for each in cuts[:-1]]
        gather = self.memory.bind_allgather(mine, data.recv + start, sizes, places, word)
        first, last = Round([], [reduce]), Round([], [gather])
        part = vector[cuts[self.place] : cuts[self.place + 1]]
        if not self.drives:
            yield [first, *finished([Round([], []) for _ in range(self.rounds(inter))], last)]
            return
        messages = message_count(part.nbytes, inter.blocks(self.nodes))
        for number, piece in enumerate(pieces := segments(part.size, messages)):
            rounds = list(self.between(inter, part[piece], data.combine, word))
            if number == len(pieces) - 1:
                rounds = finished(rounds, last)
            yield [first if number == 0 else Round([], []), *rounds]

    @property
    def drives(self) -> bool:
        """Whether this rank has a lane."""
        return self.place < self.width

    def rounds(self, inter: Algorithm) -> int:
        """How many rounds a lane of this node has: a rank without one takes its turns as the others do."""
        driver = int(self.lanes.rank[self.lanes.node[self.rank], 0])
        return sum(int(step.to) >= 0 or int(step.source) >= 0 for step in twins(inter.steps, driver, self.lanes))

    def between(self, inter: Algorithm, part: Any, combine: Combine, word: int) -> Iterator[Round]:
        """The messages of one lane."""
        lane = Lane(part, even_cuts(part.size, inter.blocks(self.nodes)), self.transport, combine, word)
        for step in twins(inter.steps, self.rank, self.lanes):
            if not lane.skips(step):
                yield lane.bound(step)


def idle(late: Late) -> Late:
    """Look after MPI less soon."""
    return lambda seconds, missing: late(seconds, missing) if seconds > IDLE else None


def finished(rounds: list[Round], last: Round) -> list[Round]:
    """``last`` as soon as the last of ``rounds`` is over, before any other lane goes on."""
    if rounds:
        rounds[-1].finishes += last.finishes
        return rounds
    return [last]
