"""Allgather and reduce-scatter in two levels: shared memory inside each node, messages between the nodes.

*p ranks on N nodes, L lanes: the ranks of the smallest node.*  Blocks lie in the order of nodes, so that those of a
node are one interval.  Each lane has a part of it: its own rank's block, or where nodes differ an equal share.

A short vector goes by the first rank of each node alone, in lg N rounds::

    allgather          gather inside, Bruck's gather between the first ranks, broadcast inside
    reduce-scatter     reduce inside to the first rank, halving between the first ranks, broadcast inside

A long one goes by all lanes around a ring of nodes, in short messages of which a few are under way at a time: above
64 KB Open MPI's TCP uses one direction of a link at a time.  Meanwhile the ranks of a node gather what has arrived, or
reduce what will be sent next::

    allgather          N−1 rounds; (N−1)/N of the vector enters a node
    reduce-scatter     the same backwards

Any number of ranks on any node, in any order, and blocks of any length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hpccomm.backends.hierarchical import Operands, delay_watchdog
from hpccomm.calls.buffers import address_of
from hpccomm.collectives import ALGORITHMS, ring
from hpccomm.collectives.engine import (
    Action,
    Combine,
    Exchange,
    Plan,
    RoundActions,
    Transport,
    Vector,
    VectorSegment,
    even_cuts,
    interleave,
    pair_messages,
    segments,
)
from hpccomm.collectives.hierarchical import Channels, channel_steps
from hpccomm.collectives.schedule import Steps
from hpccomm.performance.inter_node import MESSAGE_BYTES, message_count

SHORT_BYTES = 1 << 17
"""Up to here one rank of each node carries the vector."""
WINDOW = 4
"""Messages that a lane has under way in each direction."""
SHARED_BYTES = 1 << 19
"""What the ranks of a node gather at a time while more is on its way."""

Interval = tuple[int, int]
"""The first element, and the one behind the last."""


class BlockOffsets(NamedTuple):
    """Where blocks in the order of nodes begin and end."""

    blocks: Sequence[int]
    """``p + 1`` offsets."""
    nodes: Sequence[int]
    """``N + 1`` offsets."""
    channels: Sequence[Sequence[int]]
    """For each node ``L + 1`` offsets."""

    @property
    def longest_block(self) -> int:
        """Elements of a lane's longest part."""
        return max(hi - lo for cuts in self.channels for lo, hi in pairwise(cuts))


class TwoLevelGathers:
    """Binds allgathers and reduce-scatters of ranks on several nodes; ``memory`` is shared by those of this one's node.

    While ranks of the node are missing, ``memory.late`` has to drive messages.
    """

    def __init__(self, memory: Any, transport: Transport, lanes: Channels) -> None:
        self.memory, self.transport, self.channels = memory, transport, lanes
        self.rank = transport.rank
        self.nodes, self.width = lanes.rank.shape
        self.node, self.local_rank, self.members = (
            int(lanes.node[self.rank]),
            int(lanes.local_rank[self.rank]),
            int(memory.size),
        )
        self.order: list[int] = np.lexsort((lanes.local_rank, lanes.node)).tolist()
        """The rank of each block."""
        self.firsts = [0, *np.cumsum(np.bincount(lanes.node)).tolist()]

    def block_offsets(self, blocks: Sequence[int]) -> BlockOffsets:
        """Where nodes and lanes begin, if blocks begin there."""
        nodes = [blocks[first] for first in self.firsts]
        lanes = [blocks[first : last + 1] for first, last in pairwise(self.firsts)]
        if self.channels.surplus:
            lanes = [(lo + even_cuts(hi - lo, self.width)).tolist() for lo, hi in pairwise(nodes)]
        return BlockOffsets(blocks, nodes, lanes)

    # Allgather

    def bind_allgather(self, vector: Vector, blocks: Sequence[int], word: int) -> Plan:
        """Bind an allgather in place; ``blocks`` are the offsets of blocks in the order of nodes, ``word`` is its
        signature."""
        lie = self.block_offsets(blocks)
        if vector.nbytes <= SHORT_BYTES:
            return self.short_allgather(vector, lie, word)
        return self.long_allgather(vector, lie, word)

    def short_allgather(self, vector: Vector, lie: BlockOffsets, word: int) -> Plan:
        """The first rank of each node exchanges everything."""
        between = self.leader_rounds(ALGORITHMS["allgather"]["bruck"].steps, vector, lie, None, word)
        share = self.memory.bind_bcast(
            address_of(vector), vector.nbytes, 0, word, delay_watchdog(self.memory.stall_handler)
        )
        return interleave(
            [[RoundActions([], [self.bind_own_gather(vector, lie, word)]), *between, RoundActions([], [share])]]
        )

    def long_allgather(self, vector: Vector, lie: BlockOffsets, word: int) -> Plan:
        """All lanes, around a ring of nodes; what has arrived is gathered while more is on its way."""
        chunks = message_count(lie.longest_block * vector.itemsize, 1)
        mine = [(cuts[self.channel], cuts[self.channel + 1]) for cuts in lie.channels]
        rounds = list(self.ring_rounds(ring.allgather, vector, mine, chunks, None, word))
        shared = segments(chunks, -(-chunks * MESSAGE_BYTES * self.width // SHARED_BYTES))
        own = self.bind_own_gather(vector, lie, word)
        first, meanwhile = ([own], {}) if self.channels.surplus else ([], {0: own})
        for turn, step in enumerate(ring.allgather(self.node, self.nodes)):
            parts = [chunk_offsets(*part, chunks) for part in pairwise(lie.channels[int(step.recv[0])])]
            for some in shared:
                arrived = [(part[some.start], part[some.stop]) for part in parts]
                meanwhile[turn * chunks + some.stop] = self.bind_node_gather(vector, arrived, word)
        return pipeline(first, rounds, min(WINDOW, chunks), meanwhile)

    def bind_own_gather(self, vector: Vector, lie: BlockOffsets, word: int) -> Action:
        """The ranks of a node gather their own blocks."""
        first = self.firsts[self.node]
        return self.bind_node_gather(vector, list(pairwise(lie.blocks[first : first + self.members + 1])), word)

    def bind_node_gather(self, vector: Vector, spans: Sequence[Interval], word: int) -> Action:
        """The ranks of a node gather in place, each of the first ones a span of the vector."""
        base, width = address_of(vector), vector.itemsize
        sizes = [(hi - lo) * width for lo, hi in spans] + [0] * (self.members - len(spans))
        places = [lo * width for lo, _ in spans] + [0] * (self.members - len(spans))
        bound: Action = self.memory.bind_allgather(base + places[self.local_rank], base, sizes, places, word)
        return bound

    # Reduce-scatter

    def bind_reduce_scatter(self, data: Operands, blocks: Sequence[int], word: int) -> Plan:
        """Bind a reduce-scatter; at ``data.send`` lie blocks in the order of nodes, with these offsets, and
        ``data.vector`` is for this rank's block of the sum."""
        lie = self.block_offsets(blocks)
        if blocks[-1] * data.vector.itemsize <= SHORT_BYTES:
            return self.short_reduce_scatter(data, lie, word)
        return self.long_reduce_scatter(data, lie, word)

    def short_reduce_scatter(self, data: Operands, lie: BlockOffsets, word: int) -> Plan:
        """The first rank of each node sums everything."""
        total = np.empty(lie.blocks[-1], data.vector.dtype)
        reduce = self.memory.bind_reduce(data.send, address_of(total), total.size, data.kind, data.op, 0, word)
        between = self.leader_rounds(ALGORITHMS["reduce_scatter"]["butterfly"].steps, total, lie, data.combine, word)
        ours = total[lie.nodes[self.node] : lie.nodes[self.node + 1]]
        share = self.memory.bind_bcast(
            address_of(ours), ours.nbytes, 0, word, delay_watchdog(self.memory.stall_handler)
        )
        keep = self.copy_own_block(data.vector, ours, lie)
        return interleave([[RoundActions([], [reduce]), *between, RoundActions([], [share, keep])]])

    def long_reduce_scatter(self, data: Operands, lie: BlockOffsets, word: int) -> Plan:
        """All lanes, around a ring of nodes; what is summed next is reduced inside while messages are on their way."""
        chunks = message_count(lie.longest_block * data.vector.itemsize, 1)
        lengths = [cuts[self.channel + 1] - cuts[self.channel] if self.has_channel else 0 for cuts in lie.channels]
        mine = list(pairwise([0, *np.cumsum(lengths).tolist()]))
        sums = np.empty(sum(lengths), data.vector.dtype)
        rounds = list(self.ring_rounds(ring.reduce_scatter, sums, mine, chunks, data.combine, word))
        inside = [
            self.bind_node_reduce(data, cuts, sums[slice(*at)], word)
            for cuts, at in zip(lie.channels, mine, strict=True)
        ]
        first: list[Action] = []
        meanwhile = {}
        for turn, step in enumerate(ring.reduce_scatter(self.node, self.nodes)):
            first = first or [inside[int(step.send[0])]]
            meanwhile[turn * chunks] = inside[int(step.recv[0])]
        return pipeline(
            first, rounds, min(WINDOW, chunks), meanwhile, self.distribute_sums(data, sums, mine, lie, word)
        )

    def bind_node_reduce(self, data: Operands, cuts: Sequence[int], into: Vector, word: int) -> Action:
        """The ranks of a node reduce the part of one node, each lane its share of it."""
        counts = np.diff(cuts).tolist() + [0] * (self.members - self.width)
        send = data.send + cuts[0] * into.itemsize
        bound: Action = self.memory.bind_reduce_scatter(send, address_of(into), counts, data.kind, data.op, word)
        return bound

    def distribute_sums(
        self, data: Operands, sums: Vector, mine: Sequence[Interval], lie: BlockOffsets, word: int
    ) -> list[Action]:
        """What the lanes of a node have summed, to the ranks whose it is."""
        found = sums[slice(*mine[self.node])]
        if not self.channels.surplus:
            return [lambda: np.copyto(data.vector, found)]
        low, high = lie.nodes[self.node : self.node + 2]
        spans = [(lo - low, hi - low) for lo, hi in pairwise(lie.channels[self.node])]
        ours = np.empty(high - low, sums.dtype)
        acts: list[Action] = [self.bind_node_gather(ours, spans, word), self.copy_own_block(data.vector, ours, lie)]
        if self.has_channel:
            acts.insert(0, lambda: np.copyto(ours[slice(*spans[self.local_rank])], found))
        return acts

    def copy_own_block(self, into: Vector, ours: Vector, lie: BlockOffsets) -> Action:
        """Copy this rank's block from those of its node."""
        number = self.firsts[self.node] + self.local_rank
        begin = lie.nodes[self.node]
        block = ours[lie.blocks[number] - begin : lie.blocks[number + 1] - begin]
        return lambda: np.copyto(into, block)

    # Between the nodes

    @property
    def has_channel(self) -> bool:
        """Whether this rank has a lane."""
        return self.local_rank < self.width

    @property
    def channel(self) -> int:
        """This rank's lane, or some lane."""
        return self.local_rank % self.width

    def leader_rounds(
        self, steps: Steps, vector: Vector, lie: BlockOffsets, combine: Combine | None, word: int
    ) -> Iterator[RoundActions]:
        """A schedule of the first ranks, whose blocks are the nodes'; nothing for others."""
        lane = VectorSegment(vector, lie.nodes, SegmentingTransport(self.transport), combine, word)
        for step in channel_steps(steps, self.rank, self.channels) if self.local_rank == 0 else ():
            if not lane.is_idle(step):
                yield lane.bind_step(step)

    def ring_rounds(
        self, steps: Steps, vector: Vector, parts: Sequence[Interval], chunks: int, combine: Combine | None, word: int
    ) -> Iterator[RoundActions]:
        """A ring of one lane, of which each node has a part of the vector, chunk by chunk.

        As many rounds follow one another as may be under way, each with room of its own for what arrives.
        """
        cuts = [cut for part in parts for cut in chunk_offsets(*part, chunks)]
        lanes = [VectorSegment(vector, cuts, self.transport, combine, word) for _ in range(min(WINDOW, chunks))]
        walk = [(step, chunk) for step in channel_steps(steps, self.rank, self.channels) for chunk in range(chunks)]
        for number, (step, chunk) in enumerate(walk):
            send, recv = (int(each[0]) * (chunks + 1) + chunk for each in (step.send, step.recv))
            yield lanes[number % len(lanes)].bind_step(step._replace(send=(send, send + 1), recv=(recv, recv + 1)))


def chunk_offsets(lo: int, hi: int, chunks: int) -> list[int]:
    """Offsets that cut an interval."""
    cuts: list[int] = (lo + even_cuts(hi - lo, chunks)).tolist()
    return cuts


def pipeline(
    first: list[Action],
    rounds: Sequence[RoundActions],
    window: int,
    meanwhile: dict[int, Action],
    last: Sequence[Action] = (),
) -> Plan:
    """``window`` rounds are under way at a time; ``meanwhile[k]`` is what to do once k of them are finished."""
    actions = [*first, *(act for each in rounds[:window] for act in each.starts)]
    for number in range(len(rounds) + 1):
        if number in meanwhile:
            actions.append(meanwhile[number])
        if number < len(rounds):
            actions += rounds[number].finishes
        if number + window < len(rounds):
            actions += rounds[number + window].starts
    return Plan([*actions, *last], [exchange for each in rounds for exchange in each.exchanges])


class SegmentingTransport:
    """A transport whose messages go in several at a time, each short enough for both directions of a link."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.rank, self.size = transport, transport.rank, transport.size

    def exchange(self, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int) -> Exchange:
        """As :class:`~hpccomm.collectives.engine.Transport`."""
        pairs = pair_messages(split_messages(send), split_messages(recv))
        return ExchangeGroup([self.transport.exchange(out, to, into, source, tag) for out, into in pairs])


class ExchangeGroup:
    """Exchanges that are under way together."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.starts = [act for each in exchanges for act in each.starts]
        self.waits = [act for each in exchanges for act in each.waits]
        self._exchanges = exchanges

    def free(self) -> None:
        """As :class:`~hpccomm.collectives.engine.Exchange`."""
        for each in self._exchanges:
            each.free()


def split_messages(vector: Vector | None) -> list[Vector]:
    """A vector in messages that are short enough."""
    if vector is None:
        return []
    return [vector[piece] for piece in segments(vector.size, message_count(vector.nbytes, 1))]
