"""Hierarchical: collectives in two levels, in shared memory inside each node and by messages between the nodes.

*p ranks on N nodes; a channel is a path between the nodes, driven on each by one rank, its driver; L channels; n bytes
in the vector.*  The ranks of a node do one collective among themselves (a *node step*), the drivers of each channel run
a flat schedule between the nodes (the *inter* schedule), and the ranks of a node meet again::

    allreduce         reduce-scatter over the channels, allreduce on each, allgather
    reduce            reduce-scatter over the channels, reduce on each, allgather on the root's node
    broadcast         broadcast on the root's node, broadcast on each channel, allgather on the other nodes
    allgather         allgather of the node's blocks; N-1 rounds on each channel, each followed by an allgather
    reduce-scatter    the same backwards: a reduce-scatter of the next blocks before each round

Long vectors use one channel for each rank of the smallest node, so that every rank drives the network, and every
channel carries 1/L of what enters a node.  Short ones use one channel, which needs the fewest messages: its node steps
are then a reduce and a broadcast.  Nodes may have any number of ranks, in any placement.  The ranks of a node are
divided among its channels in order, the first of each channel drives it, and blocks are numbered by node, then rank, so
that the blocks of a channel of a node are one interval; ``own_blocks`` has each rank's block.

Where ranks share no memory, :func:`~hpccomm.collectives.schedule.without_node_steps` puts messages in place of the node
steps.  Zhang et al., *MiCS: near-linear scaling for training gigantic model on public cloud*, VLDB 2022, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives import ALGORITHMS, recursive, ring
from hpccomm.collectives.lowering import Pipeline
from hpccomm.collectives.schedule import (
    NOBODY,
    Algorithm,
    NodeStep,
    Rank,
    Step,
    Steps,
    block_per_rank,
    members_of_nodes,
    select_peer,
)
from hpccomm.collectives.volume import FULL_VOLUME, HALF_VOLUME, Volume, divide, ring_fraction

if TYPE_CHECKING:
    from hpccomm.layout import Link

Ints = npt.NDArray[np.int64]

MESSAGE_BYTES = 57_344
"""The longest message between nodes: below 64 KB, Open MPI's TCP uses both directions of a link at once."""
SEGMENT_BYTES, MOST_SEGMENTS = 1 << 20, 16
"""Bytes of a segment, and the most segments: one is reduced inside a node while another is between the nodes."""
SHORT_BYTES = {"allreduce": 8192, "reduce": 8192, "bcast": 8192, "allgather": 1 << 17, "reduce_scatter": 1 << 17}
"""Up to this size one rank of each node exchanges the vector."""
WINDOW = 4
"""Pending messages of a channel in each direction where every round is followed by a node step."""
SHARED_BYTES = 1 << 19
"""Bytes that the ranks of a node gather at a time while messages are pending."""
MANY = 1 << 30
"""More messages than are ever pending: each starts when its data is there."""


class Channels(NamedTuple):
    """Which rank drives which channel of which node."""

    node: Any
    """``(p,)`` the node of each rank, 0 … N-1."""
    channel: Any
    """``(p,)`` the channel to which each rank belongs."""
    rank: Any
    """``(N, L)`` the driver of each channel of each node."""

    @property
    def drives(self) -> Any:
        """``(p,)`` whether each rank is a driver."""
        return self.rank[self.node, self.channel] == np.arange(self.node.size)

    @property
    def even(self) -> bool:
        """Whether every rank is a driver."""
        return bool(self.rank.size == self.node.size)


def channels_of(nodes: Any, width: int | None = None) -> Channels:
    """The channels of ranks on ``nodes`` (any integers, one a rank, in any order), by default as many as possible."""
    return find_channels(tuple(nodes), width)


@lru_cache(64)
def find_channels(nodes: tuple[int, ...], width: int | None) -> Channels:
    """The same, once for the schedules of one communicator."""
    _, node, counts = np.unique(np.asarray(nodes), return_inverse=True, return_counts=True)
    local_rank, members = members_of_nodes(node)
    width = width or int(counts.min())
    channel = local_rank * width // counts[node]
    first = -(-np.arange(width) * counts[:, None] // width)
    return Channels(node, channel, members[np.arange(counts.size)[:, None], first])


def drive_from(channels: Channels, root: int) -> Channels:
    """The same single channel, but driven by the root on its node."""
    rank = channels.rank.copy()
    rank[channels.node[root]] = root
    return channels._replace(rank=rank)


# --- the five collectives -------------------------------------------------------------------------


def build_allreduce(nodes: Any, inter: Algorithm | None = None, width: int | None = None) -> Algorithm:
    """The allreduce of ranks on ``nodes``; ``inter`` is the allreduce between drivers, a ring by default."""
    inter = inter or ALGORITHMS["allreduce"]["ring"]
    channels = channels_of(nodes, width)
    per_channel = inter.blocks(len(channels.rank))
    blocks = per_channel * channels.rank.shape[1]

    def steps(r: Rank, p: int) -> Iterator[Step | NodeStep]:
        yield channel_parts("reduce_scatter", channels, per_channel)
        yield from inter_node_steps(inter.steps, r, channels, per_channel)
        yield channel_parts("allgather", channels, per_channel)

    return Algorithm(
        steps, lambda p: blocks, volume=allreduce_volume(channels) if inter.volume is FULL_VOLUME else None
    )


def build_reduce(nodes: Any, inter: Algorithm | None = None, width: int | None = None) -> Algorithm:
    """The reduce of ranks on ``nodes``; ``inter`` is the reduce between drivers, a binomial tree by default."""
    inter = inter or ALGORITHMS["reduce"]["tree"]
    common = channels_of(nodes, width)

    def steps(r: Rank, p: int, root: int = 0) -> Iterator[Step | NodeStep]:
        channels = drive_from(common, root) if width == 1 else common
        here = int(channels.node[root])
        yield channel_parts("reduce_scatter", channels, 1)
        yield from inter_node_steps(inter.steps, r, channels, 1, here)
        if width != 1:
            yield on_nodes(channel_parts("allgather", channels, 1), channels.node == here)

    return Algorithm(steps, lambda p: common.rank.shape[1])


def build_bcast(nodes: Any, inter: Algorithm | None = None, width: int | None = None) -> Algorithm:
    """The broadcast to ranks on ``nodes``; ``inter`` is the broadcast between drivers, a binomial tree by default."""
    inter = inter or ALGORITHMS["bcast"]["tree"]
    common = channels_of(nodes, width)
    blocks = common.rank.shape[1]

    def steps(r: Rank, p: int, root: int = 0) -> Iterator[Step | NodeStep]:
        channels = drive_from(common, root) if width == 1 else common
        here = channels.node == channels.node[root]
        if width != 1:
            own = np.where(np.arange(here.size) == root, blocks, 0)
            yield NodeStep("allgather", np.where(here, channels.node, NOBODY), 0 * own, own)
        yield from inter_node_steps(inter.steps, r, channels, 1, int(channels.node[root]))
        gather = channel_parts("allgather", channels, 1)
        yield gather if width == 1 else on_nodes(gather, ~here)

    return Algorithm(steps, lambda p: blocks)


def build_allgather(nodes: Any, width: int | None = None) -> Algorithm:
    """The allgather of ranks on ``nodes``: with one channel by Bruck's schedule between the nodes, else by a ring."""
    channels = channels_of(nodes, width)
    order, drivers = block_order(channels), channels.rank.shape[0]

    def steps(r: Rank, p: int) -> Iterator[Step | NodeStep]:
        own = order.own_block
        yield NodeStep("allgather", channels.node, own, own + 1)
        if width == 1:
            yield from map_blocks(channel_steps(recursive.bruck, r, channels), order, p)
            yield parts_of("allgather", channels, 0 * own, 0 * own + p)
            return
        rounds = ring.allgather(np.arange(drivers), drivers)
        for step, all_nodes in zip(block_steps(ring.allgather, r, channels, order), rounds, strict=True):
            yield step
            yield node_parts("allgather", channels, order, all_nodes.recv[0])

    return Algorithm(steps, block_per_rank, own_blocks=lambda p: order.own_block, volume=gather_volume(channels, width))


def build_reduce_scatter(nodes: Any, width: int | None = None) -> Algorithm:
    """The reduce-scatter of ranks on ``nodes``: with one channel by halving between the nodes, else by a ring."""
    channels = channels_of(nodes, width)
    order, drivers = block_order(channels), channels.rank.shape[0]
    everybody = np.arange(drivers)

    def steps(r: Rank, p: int) -> Iterator[Step | NodeStep]:
        own = order.own_block
        if width == 1:
            yield parts_of("reduce_scatter", channels, 0 * own, 0 * own + p)
            yield from map_blocks(channel_steps(recursive.reduce_scatter, r, channels), order, p)
        else:
            rounds = list(ring.reduce_scatter(everybody, drivers))
            yield node_parts("reduce_scatter", channels, order, rounds[0].send[0] if rounds else everybody)
            for step, all_nodes in zip(block_steps(ring.reduce_scatter, r, channels, order), rounds, strict=True):
                yield node_parts("reduce_scatter", channels, order, all_nodes.recv[0])
                yield step
        if not channels.even:
            yield node_parts("allgather", channels, order, everybody)

    return Algorithm(steps, block_per_rank, own_blocks=lambda p: order.own_block, volume=gather_volume(channels, width))


HIERARCHICAL: dict[str, Callable[..., Algorithm]] = {
    "allreduce": build_allreduce,
    "reduce_scatter": build_reduce_scatter,
    "allgather": build_allgather,
    "bcast": build_bcast,
    "reduce": build_reduce,
}
"""The algorithms whose steps depend on the nodes of the ranks: ``build(nodes)``, ``build(nodes, width=1)`` for short
vectors."""


# --- forms: what runs for a length ----------------------------------------------------------------


class Form(NamedTuple):
    """What runs: an algorithm, and how it is pipelined."""

    algorithm: Algorithm
    pipeline: Pipeline


def select_form(collective: str, nodes: Any, nbytes: float, link: Link, shared: bool = True) -> Form:
    """What runs for a vector of ``nbytes`` bytes on nodes between which there is such a link.

    ``shared``: the ranks of each node share memory.  Otherwise there is one form, without segments.
    """
    short = shared and nbytes <= SHORT_BYTES[collective]
    channels = channels_of(nodes, 1 if short else None)
    count = len(channels.rank)
    how: dict[str, Any] = {"width": 1} if short else {}
    if collective == "allreduce":
        how["inter"] = select_inter_node(count, nbytes, channels_of(nodes).rank.shape[1], link) if shared else None
    algorithm = HIERARCHICAL[collective](nodes, **how)
    if not shared:
        return Form(algorithm, Pipeline())
    if collective in ("allgather", "reduce_scatter"):
        return Form(algorithm, gather_pipeline(collective, nbytes, channels, short))
    if short:
        return Form(algorithm, Pipeline())
    return Form(algorithm, Pipeline(segment_count(nbytes), 1, MANY, MESSAGE_BYTES))


def gather_pipeline(collective: str, nbytes: float, channels: Channels, short: bool) -> Pipeline:
    """How an allgather or reduce-scatter of ``nbytes`` bytes is pipelined."""
    if short:
        return Pipeline(message_bytes=MESSAGE_BYTES)
    part = nbytes / channels.rank.size
    segments = max(1, int(-(-part * channels.rank.shape[1] // SHARED_BYTES))) if collective == "allgather" else 1
    return Pipeline(segments, 0, WINDOW, MESSAGE_BYTES)


def segment_count(nbytes: float) -> int:
    """The number of segments of a long vector."""
    return max(1, min(MOST_SEGMENTS, int(-(-nbytes // SEGMENT_BYTES))))


def select_inter_node(nodes: int, nbytes: float, channels: int, link: Link) -> Algorithm:
    """The allreduce of ``nbytes`` bytes between nodes whose ``channels`` share a ``link``, by Hockney's model.

    Recursive doubling sends the fewest messages, a ring the fewest bytes; halving and doubling is near both for a power
    of two, but its first messages are long, so vectors that need several messages at a time take the ring.
    """
    rounds = nodes.bit_length() - 1
    whole, blocks = link.alpha + nbytes * link.beta, 2 * (nodes - 1) / nodes * nbytes * link.beta
    folding = 0.0 if nodes == 1 << rounds else 2 * whole
    costs = {
        "doubling": rounds * whole + folding,
        "butterfly": 2 * rounds * link.alpha + blocks + folding,
        "ring": 2 * (nodes - 1) * link.alpha + blocks,
    }
    if nodes > 2 and nbytes > 2 * MESSAGE_BYTES * channels:
        costs = {"ring": 0.0}
    return ALGORITHMS["allreduce"][min(costs, key=costs.__getitem__)]


# --- node steps -----------------------------------------------------------------------------------


def parts_of(collective: str, channels: Channels, first: Any, end: Any) -> NodeStep:
    """A node step in which the drivers have these parts and the other ranks have none."""
    return NodeStep(collective, channels.node, first, np.where(channels.drives, end, first))


def channel_parts(collective: str, channels: Channels, per_channel: int) -> NodeStep:
    """A node step in which each driver has the blocks of its channel."""
    first = channels.channel * per_channel
    return parts_of(collective, channels, np.where(channels.drives, first, first + per_channel), first + per_channel)


def node_parts(collective: str, channels: Channels, order: BlockOrder, whose: Any) -> NodeStep:
    """A node step on the blocks of another node, ``(N,)`` one for each node; drivers have those of their channel."""
    ends = order.ends[np.asarray(whose)[channels.node]]
    rank = np.arange(channels.node.size)
    first, end = ends[rank, channels.channel], ends[rank, channels.channel + 1]
    return parts_of(collective, channels, np.where(channels.drives, first, end), end)


def on_nodes(step: NodeStep, where: Any) -> NodeStep:
    """A node step on some nodes only."""
    return step._replace(node=np.where(where, step.node, NOBODY))


# --- steps between the nodes ----------------------------------------------------------------------


def channel_steps(steps: Steps, r: Rank, channels: Channels, *root: int) -> Iterator[Step]:
    """A schedule among the drivers of each channel, its blocks counted from 0; other ranks idle."""
    node, channel = channels.node[r], channels.channel[r]
    drives = channels.drives[r]
    for step in steps(node, len(channels.rank), *root):
        assert isinstance(step, Step)
        to = select_peer(drives & (np.asarray(step.to) >= 0), channels.rank[step.to, channel])
        source = select_peer(drives & (np.asarray(step.source) >= 0), channels.rank[step.source, channel])
        yield Step(to, step.send, source, step.recv, step.reduce)


def inter_node_steps(steps: Steps, r: Rank, channels: Channels, per_channel: int, *root: int) -> Iterator[Step]:
    """A schedule among the drivers of each channel, whose ``per_channel`` blocks are those of the channel."""
    first = channels.channel[r] * per_channel
    for step in channel_steps(steps, r, channels, *root):
        send, recv = (step.send[0] + first, step.send[1] + first), (step.recv[0] + first, step.recv[1] + first)
        yield step._replace(send=send, recv=recv)


def block_steps(steps: Steps, r: Rank, channels: Channels, order: BlockOrder) -> Iterator[Step]:
    """A schedule among the drivers of each channel with one block a node: the blocks of the channel on that node."""
    channel = channels.channel[r]
    for step in channel_steps(steps, r, channels):
        sent, received = order.ends[step.send[0]], order.ends[step.recv[0]]
        yield step._replace(send=interval(sent, channel), recv=interval(received, channel))


def interval(ends: Any, channel: Any) -> tuple[Rank, Rank]:
    """The blocks of a channel on a node, given the ends of its channels; or for each rank, with one row a rank."""
    row = () if np.ndim(channel) == 0 else (np.arange(len(ends)),)
    return ends[(*row, channel)], ends[(*row, channel + 1)]


def map_blocks(steps: Iterator[Step], order: BlockOrder, p: int) -> Iterator[Step]:
    """Steps whose blocks are nodes, with the blocks of these nodes; intervals may wrap around."""
    count, starts = len(order.ends), order.ends[:, 0]

    def first(node: Any) -> Any:
        return starts[np.asarray(node) % count] + p * (np.asarray(node) // count)

    for step in steps:
        send, recv = (first(step.send[0]), first(step.send[1])), (first(step.recv[0]), first(step.recv[1]))
        yield step._replace(send=send, recv=recv)


class BlockOrder(NamedTuple):
    """The numbers of blocks in an allgather or reduce-scatter: by node, then local rank."""

    own_block: Ints
    """``(p,)`` the block that each rank owns."""
    ends: Ints
    """``(N, L+1)`` the first block of each channel of a node, and the end of the last one's."""


def block_order(channels: Channels) -> BlockOrder:
    """Number the blocks."""
    count, width = channels.rank.shape
    own_block = np.empty(channels.node.size, dtype=np.int64)
    own_block[np.argsort(channels.node, kind="stable")] = np.arange(own_block.size)
    sizes = np.bincount(channels.node * width + channels.channel, minlength=count * width)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return BlockOrder(own_block, ends[np.arange(count)[:, None] * width + np.arange(width + 1)])


# --- volumes --------------------------------------------------------------------------------------


def allreduce_volume(channels: Channels) -> Volume:
    """The volume of an allreduce with a ring between the nodes."""
    count, width = channels.rank.shape
    return Volume(
        "2(N-1)/N n/L",
        lambda p, _: 2 * (count - 1),
        lambda p, _: 2 * ring_fraction(count) / width,
        lambda p, _: 2 * (count - 1),
    )


def gather_volume(channels: Channels, width: int | None) -> Volume | None:
    """The volume of an allgather or reduce-scatter by a ring; none for nodes with different numbers of ranks."""
    count = len(channels.rank)
    if width == 1 or not channels.even:
        return None
    return HALF_VOLUME._replace(
        text="(N-1)/p n",
        rounds=lambda p, _: count - 1,
        busiest=lambda p, _: divide(count - 1, p),
        total=lambda p, _: count - 1,
    )
