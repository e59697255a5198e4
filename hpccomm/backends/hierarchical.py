"""Allreduce in two levels: shared memory inside each node, messages between the nodes.

*N nodes, n bytes, L channels: as many as the smallest node has ranks.*  A long vector is cut into segments.  The ranks
of a node reduce-scatter a segment, one block per channel.  The ranks of one channel on all nodes allreduce their blocks
by messages, so that every local rank drives the network.  Then the ranks of a node allgather.  While one segment is
exchanged between the nodes, the next one is reduced inside: a rank that waits for one message drives all pending
messages.  Messages are short, so that many are pending in both directions: above 64 KB Open MPI's TCP sends in one
direction at a time.

For a short vector the first rank of each node alone exchanges messages, which needs the fewest of them; the other ranks
wait for the result in shared memory.  Nodes may have any number of ranks, and ranks may be placed in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives.engine import (
    BoundSchedule,
    Combine,
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
"""Up to this size one rank of each node exchanges the vector."""
IDLE_SECONDS = 2e-3
"""Seconds for which a rank without pending messages waits in shared memory before it drives MPI."""

StallHandler = Callable[[float, list[int]], None]
"""``handler(seconds, missing)`` is called while ranks of the node are missing from a call in shared memory."""


class Operands(NamedTuple):
    """A reduction's addresses to read and to write, the result also as a vector, and its operation."""

    send: int
    recv: int
    vector: Any
    kind: str
    op: str
    combine: Combine


class TwoLevels:
    """Binds allreduces of ranks on several nodes; ``memory`` is shared by the ranks of this node.

    ``memory.stall_handler`` must drive messages while ranks of the node are missing.
    """

    def __init__(self, memory: Any, transport: Transport, channels: Channels, link: Link) -> None:
        self.memory, self.transport, self.channels, self.link = memory, transport, channels, link
        self.rank = transport.rank
        self.nodes, self.width = channels.rank.shape
        self.local_rank, self.members = int(channels.local_rank[self.rank]), int(memory.size)

    def bind(self, data: Operands, digest: int) -> BoundSchedule:
        """Bind an allreduce; ``digest`` is that of its fingerprint."""
        nbytes = data.vector.nbytes
        inter = select_inter_node(self.nodes, nbytes, self.width, self.link)
        if nbytes <= SHORT_BYTES:
            return self.bind_short(data, digest, inter)
        cut = segments(data.vector.size, segment_count(nbytes))
        found = [list(self.bind_long(data, digest, inter, each)) for each in cut]
        numbers = [number for number, segment in enumerate(found) for _ in segment]
        return interleave([rounds for segment in found for rounds in segment], numbers)

    def bind_short(self, data: Operands, digest: int, inter: Algorithm) -> BoundSchedule:
        """One rank of each node exchanges the whole vector."""
        memory, size = self.memory, data.vector.size
        reduce = memory.bind_reduce(data.send, data.recv, size, data.kind, data.op, 0, digest)
        leads = self.local_rank == 0
        rounds = self.inter_node_rounds(inter, data.vector, data.combine, digest) if leads else ()
        patient = delay_stall_handler(memory.stall_handler)
        broadcast = memory.bind_bcast(data.recv, data.vector.nbytes, 0, digest, patient)
        return interleave([[RoundActions([], [reduce]), *rounds, RoundActions([], [broadcast])]])

    def bind_long(self, data: Operands, digest: int, inter: Algorithm, segment: slice) -> Iterator[list[RoundActions]]:
        """One segment: reduce inside the node, exchange in several messages at a time, gather inside the node."""
        vector, width = data.vector[segment], data.vector.itemsize
        start, cuts = segment.start * width, even_cuts(vector.size, self.width).tolist()
        cuts += [cuts[-1]] * (self.members - self.width)
        counts = np.diff(cuts).tolist()
        mine = data.recv + start + cuts[self.local_rank] * width
        reduce = self.memory.bind_reduce_scatter(data.send + start, mine, counts, data.kind, data.op, digest)
        sizes, places = [each * width for each in counts], [each * width for each in cuts[:-1]]
        gather = self.memory.bind_allgather(mine, data.recv + start, sizes, places, digest)
        first, last = RoundActions([], [reduce]), RoundActions([], [gather])
        block = vector[cuts[self.local_rank] : cuts[self.local_rank + 1]]
        if not self.has_channel:
            yield [first, *finish_with([RoundActions([], []) for _ in range(self.rounds(inter))], last)]
            return
        count = message_count(block.nbytes, inter.blocks(self.nodes))
        for number, message in enumerate(messages := segments(block.size, count)):
            rounds = list(self.inter_node_rounds(inter, block[message], data.combine, digest))
            if number == len(messages) - 1:
                rounds = finish_with(rounds, last)
            yield [first if number == 0 else RoundActions([], []), *rounds]

    @property
    def has_channel(self) -> bool:
        """Whether this rank has a channel."""
        return self.local_rank < self.width

    def rounds(self, inter: Algorithm) -> int:
        """Rounds of a channel of this node; a rank without a channel runs as many empty rounds."""
        driver = int(self.channels.rank[self.channels.node[self.rank], 0])
        steps = channel_steps(inter.steps, driver, self.channels)
        return sum(int(step.to) >= 0 or int(step.source) >= 0 for step in steps)

    def inter_node_rounds(self, inter: Algorithm, block: Any, combine: Combine, digest: int) -> Iterator[RoundActions]:
        """The rounds of one message of this rank's channel."""
        segment = VectorSegment(block, even_cuts(block.size, inter.blocks(self.nodes)), self.transport, combine, digest)
        for step in channel_steps(inter.steps, self.rank, self.channels):
            if not segment.is_idle(step):
                yield segment.bind_step(step)


def delay_stall_handler(handler: StallHandler) -> StallHandler:
    """The handler, called only after IDLE_SECONDS."""
    return lambda seconds, missing: handler(seconds, missing) if seconds > IDLE_SECONDS else None


def finish_with(rounds: list[RoundActions], last: RoundActions) -> list[RoundActions]:
    """Append ``last`` to the last of ``rounds``, before any other sequence of rounds continues."""
    if rounds:
        rounds[-1].finishes += last.finishes
        return rounds
    return [last]
