"""Allgather and reduce-scatter in two levels: shared memory inside each node, messages between the nodes.

*p ranks on N nodes, L channels: as many as the smallest node has ranks.*  Blocks lie in the order of nodes, so that
the blocks of a node are one interval.  Each channel has a part of it: its rank's block or, where nodes differ in size,
an equal share.

For a short vector the first rank of each node alone exchanges messages, in lg N rounds::

    allgather          gather inside, Bruck's gather between the first ranks, broadcast inside
    reduce-scatter     reduce inside to the first rank, halving between the first ranks, broadcast inside

For a long vector all channels run a ring over the nodes, in short messages of which a few are pending at a time: above
64 KB Open MPI's TCP uses one direction of a link at a time.  Meanwhile the ranks of a node gather the blocks that have
arrived, or reduce the blocks of the next round::

    allgather          N−1 rounds; (N−1)/N of the vector enters a node
    reduce-scatter     the same backwards

Nodes may have any number of ranks in any order; blocks may have any length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hpccomm.backends.hierarchical import Operands, delay_stall_handler
from hpccomm.calls.buffers import address_of
from hpccomm.collectives import ALGORITHMS, ring
from hpccomm.collectives.engine import (
    Action,
    BoundSchedule,
    Combine,
    Exchange,
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
"""Up to this size one rank of each node exchanges the vector."""
WINDOW = 4
"""Pending messages of a channel in each direction."""
SHARED_BYTES = 1 << 19
"""Bytes that the ranks of a node gather at a time while messages are pending."""

Interval = tuple[int, int]
"""[lo, hi): the first element and the one after the last."""


class BlockOffsets(NamedTuple):
    """Offsets of blocks in the order of nodes."""

    blocks: Sequence[int]
    """``p + 1`` offsets."""
    nodes: Sequence[int]
    """``N + 1`` offsets."""
    channels: Sequence[Sequence[int]]
    """For each node ``L + 1`` offsets."""

    @property
    def longest_block(self) -> int:
        """Elements of the longest part of a channel."""
        return max(hi - lo for cuts in self.channels for lo, hi in pairwise(cuts))


class TwoLevelGathers:
    """Binds allgathers and reduce-scatters of ranks on several nodes; ``memory`` is shared by the ranks of this node.

    ``memory.stall_handler`` must drive messages while ranks of the node are missing.
    """

    def __init__(self, memory: Any, transport: Transport, channels: Channels) -> None:
        self.memory, self.transport, self.channels = memory, transport, channels
        self.rank = transport.rank
        self.nodes, self.width = channels.rank.shape
        self.node, self.local_rank = int(channels.node[self.rank]), int(channels.local_rank[self.rank])
        self.members = int(memory.size)
        self.order: list[int] = np.lexsort((channels.local_rank, channels.node)).tolist()
        """The rank of each block."""
        self.firsts = [0, *np.cumsum(np.bincount(channels.node)).tolist()]

    def block_offsets(self, blocks: Sequence[int]) -> BlockOffsets:
        """Offsets of nodes and channels for these offsets of blocks."""
        nodes = [blocks[first] for first in self.firsts]
        channels = [blocks[first : last + 1] for first, last in pairwise(self.firsts)]
        if self.channels.surplus:
            channels = [(lo + even_cuts(hi - lo, self.width)).tolist() for lo, hi in pairwise(nodes)]
        return BlockOffsets(blocks, nodes, channels)

    # Allgather

    def bind_allgather(self, vector: Vector, blocks: Sequence[int], digest: int) -> BoundSchedule:
        """Bind an allgather in place; ``blocks`` are the offsets of blocks in the order of nodes."""
        offsets = self.block_offsets(blocks)
        if vector.nbytes <= SHORT_BYTES:
            return self.short_allgather(vector, offsets, digest)
        return self.long_allgather(vector, offsets, digest)

    def short_allgather(self, vector: Vector, offsets: BlockOffsets, digest: int) -> BoundSchedule:
        """The first rank of each node exchanges the whole vector."""
        rounds = self.leader_rounds(ALGORITHMS["allgather"]["bruck"].steps, vector, offsets, None, digest)
        broadcast = self.bind_broadcast(vector, digest)
        gather = self.bind_own_gather(vector, offsets, digest)
        return interleave([[RoundActions([], [gather]), *rounds, RoundActions([], [broadcast])]])

    def bind_broadcast(self, vector: Vector, digest: int) -> Action:
        """The first rank of a node sends the others the result of its messages."""
        patient = delay_stall_handler(self.memory.stall_handler)
        bound: Action = self.memory.bind_bcast(address_of(vector), vector.nbytes, 0, digest, patient)
        return bound

    def long_allgather(self, vector: Vector, offsets: BlockOffsets, digest: int) -> BoundSchedule:
        """All channels run a ring over the nodes; arrived blocks are gathered while messages are pending."""
        chunks = message_count(offsets.longest_block * vector.itemsize, 1)
        intervals = [(cuts[self.channel], cuts[self.channel + 1]) for cuts in offsets.channels]
        rounds = list(self.ring_rounds(ring.allgather, vector, intervals, chunks, None, digest))
        shared = segments(chunks, -(-chunks * MESSAGE_BYTES * self.width // SHARED_BYTES))
        own = self.bind_own_gather(vector, offsets, digest)
        first, meanwhile = ([own], {}) if self.channels.surplus else ([], {0: own})
        for number, step in enumerate(ring.allgather(self.node, self.nodes)):
            parts = [chunk_offsets(*part, chunks) for part in pairwise(offsets.channels[int(step.recv[0])])]
            for some in shared:
                arrived = [(part[some.start], part[some.stop]) for part in parts]
                meanwhile[number * chunks + some.stop] = self.bind_node_gather(vector, arrived, digest)
        return pipeline(first, rounds, min(WINDOW, chunks), meanwhile)

    def bind_own_gather(self, vector: Vector, offsets: BlockOffsets, digest: int) -> Action:
        """The ranks of a node gather their own blocks."""
        first = self.firsts[self.node]
        return self.bind_node_gather(vector, list(pairwise(offsets.blocks[first : first + self.members + 1])), digest)

    def bind_node_gather(self, vector: Vector, blocks: Sequence[Interval], digest: int) -> Action:
        """The ranks of a node gather in place; block k of ``blocks`` comes from local rank k."""
        base, width = address_of(vector), vector.itemsize
        sizes = [(hi - lo) * width for lo, hi in blocks] + [0] * (self.members - len(blocks))
        places = [lo * width for lo, _ in blocks] + [0] * (self.members - len(blocks))
        bound: Action = self.memory.bind_allgather(base + places[self.local_rank], base, sizes, places, digest)
        return bound

    # Reduce-scatter

    def bind_reduce_scatter(self, data: Operands, blocks: Sequence[int], digest: int) -> BoundSchedule:
        """Bind a reduce-scatter of the blocks at ``data.send``, in the order of nodes, with these offsets.

        ``data.vector`` receives this rank's block of the result.
        """
        offsets = self.block_offsets(blocks)
        if blocks[-1] * data.vector.itemsize <= SHORT_BYTES:
            return self.short_reduce_scatter(data, offsets, digest)
        return self.long_reduce_scatter(data, offsets, digest)

    def short_reduce_scatter(self, data: Operands, offsets: BlockOffsets, digest: int) -> BoundSchedule:
        """The first rank of each node reduces the whole vector."""
        total = np.empty(offsets.blocks[-1], data.vector.dtype)
        reduce = self.memory.bind_reduce(data.send, address_of(total), total.size, data.kind, data.op, 0, digest)
        steps = ALGORITHMS["reduce_scatter"]["butterfly"].steps
        rounds = self.leader_rounds(steps, total, offsets, data.combine, digest)
        node_blocks = total[offsets.nodes[self.node] : offsets.nodes[self.node + 1]]
        broadcast = self.bind_broadcast(node_blocks, digest)
        copy_out = self.copy_own_block(data.vector, node_blocks, offsets)
        return interleave([[RoundActions([], [reduce]), *rounds, RoundActions([], [broadcast, copy_out])]])

    def long_reduce_scatter(self, data: Operands, offsets: BlockOffsets, digest: int) -> BoundSchedule:
        """All channels run a ring over the nodes; each node reduces the next blocks while messages are pending."""
        chunks = message_count(offsets.longest_block * data.vector.itemsize, 1)
        lengths = [cuts[self.channel + 1] - cuts[self.channel] if self.has_channel else 0 for cuts in offsets.channels]
        intervals = list(pairwise([0, *np.cumsum(lengths).tolist()]))
        sums = np.empty(sum(lengths), data.vector.dtype)
        rounds = list(self.ring_rounds(ring.reduce_scatter, sums, intervals, chunks, data.combine, digest))
        node_sums = [
            self.bind_node_reduce(data, cuts, sums[slice(*at)], digest)
            for cuts, at in zip(offsets.channels, intervals, strict=True)
        ]
        first: list[Action] = []
        meanwhile = {}
        for number, step in enumerate(ring.reduce_scatter(self.node, self.nodes)):
            first = first or [node_sums[int(step.send[0])]]
            meanwhile[number * chunks] = node_sums[int(step.recv[0])]
        last = self.distribute_sums(data, sums, intervals, offsets, digest)
        return pipeline(first, rounds, min(WINDOW, chunks), meanwhile, last)

    def bind_node_reduce(self, data: Operands, cuts: Sequence[int], into: Vector, digest: int) -> Action:
        """The ranks of this node reduce-scatter the blocks of one node over the channels."""
        counts = np.diff(cuts).tolist() + [0] * (self.members - self.width)
        send = data.send + cuts[0] * into.itemsize
        bound: Action = self.memory.bind_reduce_scatter(send, address_of(into), counts, data.kind, data.op, digest)
        return bound

    def distribute_sums(
        self, data: Operands, sums: Vector, intervals: Sequence[Interval], offsets: BlockOffsets, digest: int
    ) -> list[Action]:
        """Distribute the sums of a node's channels to the ranks that receive them."""
        found = sums[slice(*intervals[self.node])]
        if not self.channels.surplus:
            return [lambda: np.copyto(data.vector, found)]
        low, high = offsets.nodes[self.node : self.node + 2]
        blocks = [(lo - low, hi - low) for lo, hi in pairwise(offsets.channels[self.node])]
        node_blocks = np.empty(high - low, sums.dtype)
        acts: list[Action] = [
            self.bind_node_gather(node_blocks, blocks, digest),
            self.copy_own_block(data.vector, node_blocks, offsets),
        ]
        if self.has_channel:
            acts.insert(0, lambda: np.copyto(node_blocks[slice(*blocks[self.local_rank])], found))
        return acts

    def copy_own_block(self, into: Vector, node_blocks: Vector, offsets: BlockOffsets) -> Action:
        """Copy this rank's block from the blocks of its node."""
        number = self.firsts[self.node] + self.local_rank
        begin = offsets.nodes[self.node]
        block = node_blocks[offsets.blocks[number] - begin : offsets.blocks[number + 1] - begin]
        return lambda: np.copyto(into, block)

    # Between the nodes

    @property
    def has_channel(self) -> bool:
        """Whether this rank has a channel."""
        return self.local_rank < self.width

    @property
    def channel(self) -> int:
        """This rank's channel, or any channel if it has none."""
        return self.local_rank % self.width

    def leader_rounds(
        self, steps: Steps, vector: Vector, offsets: BlockOffsets, combine: Combine | None, digest: int
    ) -> Iterator[RoundActions]:
        """The rounds of a schedule between the first ranks of the nodes; no rounds on other ranks."""
        segment = VectorSegment(vector, offsets.nodes, SegmentingTransport(self.transport), combine, digest)
        for step in channel_steps(steps, self.rank, self.channels) if self.local_rank == 0 else ():
            if not segment.is_idle(step):
                yield segment.bind_step(step)

    def ring_rounds(
        self, steps: Steps, vector: Vector, parts: Sequence[Interval], chunks: int, combine: Combine | None, digest: int
    ) -> Iterator[RoundActions]:
        """The rounds of one channel's ring over the nodes, in chunks.

        WINDOW consecutive rounds may be pending, so each has a receive buffer of its own.
        """
        cuts = [cut for part in parts for cut in chunk_offsets(*part, chunks)]
        buffers = [VectorSegment(vector, cuts, self.transport, combine, digest) for _ in range(min(WINDOW, chunks))]
        walk = [(step, chunk) for step in channel_steps(steps, self.rank, self.channels) for chunk in range(chunks)]
        for number, (step, chunk) in enumerate(walk):
            send, recv = (int(each[0]) * (chunks + 1) + chunk for each in (step.send, step.recv))
            yield buffers[number % len(buffers)].bind_step(step._replace(send=(send, send + 1), recv=(recv, recv + 1)))


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
) -> BoundSchedule:
    """A plan with ``window`` rounds pending at a time; ``meanwhile[k]`` runs after k rounds have finished."""
    actions = [*first, *(act for each in rounds[:window] for act in each.starts)]
    for number in range(len(rounds) + 1):
        if number in meanwhile:
            actions.append(meanwhile[number])
        if number < len(rounds):
            actions += rounds[number].finishes
        if number + window < len(rounds):
            actions += rounds[number + window].starts
    return BoundSchedule([*actions, *last], [exchange for each in rounds for exchange in each.exchanges])


class SegmentingTransport:
    """A transport that splits long messages into several, short enough to use both directions of a link."""

    def __init__(self, transport: Transport) -> None:
        self.transport, self.rank, self.size = transport, transport.rank, transport.size

    def exchange(self, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int) -> Exchange:
        """As :class:`~hpccomm.collectives.engine.Transport`."""
        pairs = pair_messages(split_messages(send), split_messages(recv))
        return ExchangeGroup([self.transport.exchange(out, to, into, source, tag) for out, into in pairs])


class ExchangeGroup:
    """Exchanges that are pending together."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.starts = [act for each in exchanges for act in each.starts]
        self.waits = [act for each in exchanges for act in each.waits]
        self._exchanges = exchanges

    def free(self) -> None:
        """As :class:`~hpccomm.collectives.engine.Exchange`."""
        for each in self._exchanges:
            each.free()


def split_messages(vector: Vector | None) -> list[Vector]:
    """A vector as messages that are short enough."""
    if vector is None:
        return []
    return [vector[message] for message in segments(vector.size, message_count(vector.nbytes, 1))]
