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

from hpccomm.collectives.engine import (
    Combine,
    Plan,
    RoundActions,
    Transport,
    VectorSegment,
    even_cuts,
    interleave,
    segments,
)
from hpccomm.collectives.hierarchical import Channels, channel_steps
from hpccomm.collectives.schedule import Algorithm
from hpccomm.layout import Link
from hpccomm.performance.inter_node import message_count, segment_count, select_inter_node

SHORT_BYTES = 8192
"""Up to here one rank of each node carries the vector."""
IDLE_SECONDS = 2e-3
"""Seconds for which a rank with no message on its way waits in shared memory before it looks after MPI."""


Watchdog = Callable[[float, list[int]], None]


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

    def __init__(self, memory: Any, transport: Transport, lanes: Channels, link: Link) -> None:
        self.memory, self.transport, self.channels, self.link = memory, transport, lanes, link
        self.rank = transport.rank
        self.nodes, self.width = lanes.rank.shape
        self.local_rank, self.members = int(lanes.local_rank[self.rank]), int(memory.size)

    def bind(self, data: Operands, word: int) -> Plan:
        """Bind an allreduce; ``word`` is its signature."""
        nbytes = data.vector.nbytes
        inter = select_inter_node(self.nodes, nbytes, self.width, self.link)
        if nbytes <= SHORT_BYTES:
            return self.bind_short(data, word, inter)
        cut = segments(data.vector.size, segment_count(nbytes))
        found = [list(self.bind_long(data, word, inter, each)) for each in cut]
        turns = [turn for turn, lanes in enumerate(found) for _ in lanes]
        return interleave([lane for lanes in found for lane in lanes], turns)

    def bind_short(self, data: Operands, word: int, inter: Algorithm) -> Plan:
        """One rank of each node carries the whole vector."""
        memory, size = self.memory, data.vector.size
        meet = memory.bind_reduce(data.send, data.recv, size, data.kind, data.op, 0, word)
        lane = [
            RoundActions([], [meet]),
            *(self.inter_node_rounds(inter, data.vector, data.combine, word) if self.local_rank == 0 else []),
        ]
        share = memory.bind_bcast(data.recv, data.vector.nbytes, 0, word, delay_watchdog(memory.stall_handler))
        return interleave([[*lane, RoundActions([], [share])]])

    def bind_long(self, data: Operands, word: int, inter: Algorithm, segment: slice) -> Iterator[list[RoundActions]]:
        """One segment: reduced inside, exchanged in several messages at a time, gathered inside."""
        vector, width = data.vector[segment], data.vector.itemsize
        start, cuts = segment.start * width, even_cuts(vector.size, self.width).tolist()
        cuts += [cuts[-1]] * (self.members - self.width)
        counts = np.diff(cuts).tolist()
        mine = data.recv + start + cuts[self.local_rank] * width
        reduce = self.memory.bind_reduce_scatter(data.send + start, mine, counts, data.kind, data.op, word)
        sizes, places = [each * width for each in counts], [each * width for each in cuts[:-1]]
        gather = self.memory.bind_allgather(mine, data.recv + start, sizes, places, word)
        first, last = RoundActions([], [reduce]), RoundActions([], [gather])
        part = vector[cuts[self.local_rank] : cuts[self.local_rank + 1]]
        if not self.has_channel:
            yield [first, *finish_with([RoundActions([], []) for _ in range(self.rounds(inter))], last)]
            return
        messages = message_count(part.nbytes, inter.blocks(self.nodes))
        for number, piece in enumerate(pieces := segments(part.size, messages)):
            rounds = list(self.inter_node_rounds(inter, part[piece], data.combine, word))
            if number == len(pieces) - 1:
                rounds = finish_with(rounds, last)
            yield [first if number == 0 else RoundActions([], []), *rounds]

    @property
    def has_channel(self) -> bool:
        """Whether this rank has a lane."""
        return self.local_rank < self.width

    def rounds(self, inter: Algorithm) -> int:
        """How many rounds a lane of this node has: a rank without one takes its turns as the others do."""
        driver = int(self.channels.rank[self.channels.node[self.rank], 0])
        return sum(
            int(step.to) >= 0 or int(step.source) >= 0 for step in channel_steps(inter.steps, driver, self.channels)
        )

    def inter_node_rounds(self, inter: Algorithm, part: Any, combine: Combine, word: int) -> Iterator[RoundActions]:
        """The messages of one lane."""
        lane = VectorSegment(part, even_cuts(part.size, inter.blocks(self.nodes)), self.transport, combine, word)
        for step in channel_steps(inter.steps, self.rank, self.channels):
            if not lane.is_idle(step):
                yield lane.bind_step(step)


def delay_watchdog(late: Watchdog) -> Watchdog:
    """Look after MPI less soon."""
    return lambda seconds, missing: late(seconds, missing) if seconds > IDLE_SECONDS else None


def finish_with(rounds: list[RoundActions], last: RoundActions) -> list[RoundActions]:
    """``last`` as soon as the last of ``rounds`` is over, before any other lane goes on."""
    if rounds:
        rounds[-1].finishes += last.finishes
        return rounds
    return [last]
