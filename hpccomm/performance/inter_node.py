"""Selects the schedule and the message sizes between the nodes for a hierarchical allreduce.

The backend (:mod:`hpccomm.backends.hierarchical`) and its cost model (:mod:`hpccomm.performance.measured`) both use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.schedule import Algorithm

if TYPE_CHECKING:
    from hpccomm.layout import Link

MESSAGE_BYTES = 57_344
"""The longest message between nodes: below 64 KB, Open MPI's TCP uses both directions of a link at once."""
SEGMENT_BYTES, MOST_SEGMENTS = 1 << 20, 16
"""Bytes of a segment, and the most segments: one is reduced inside a node while another is between the nodes."""


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


def segment_count(nbytes: float) -> int:
    """The number of segments of a long vector."""
    return max(1, min(MOST_SEGMENTS, int(-(-nbytes // SEGMENT_BYTES))))


def message_count(channel_bytes: float, blocks: int) -> int:
    """The number of concurrent messages for a channel's bytes of a segment, by a schedule with this many blocks."""
    return max(1, int(-(-channel_bytes // (MESSAGE_BYTES * blocks))))
