"""How an allreduce in two levels goes between the nodes: by which schedule, and in which messages.

What runs it (:mod:`hpccomm.backends.hierarchical`) and what prices it (:mod:`hpccomm.performance.measured`) read this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.schedule import Algorithm

if TYPE_CHECKING:
    from hpccomm.layout import Link

MESSAGE_BYTES = 57_344
"""Longest message between nodes: below 64 KB Open MPI's TCP uses both directions of a link at once."""
SEGMENT_BYTES, MOST_SEGMENTS = 1 << 20, 16
"""What is reduced inside a node while the segment before it is between the nodes."""


def select_inter_node(nodes: int, nbytes: float, lanes: int, link: Link) -> Algorithm:
    """The allreduce of ``nbytes`` bytes between ``nodes`` nodes whose ``lanes`` share a ``link``, by Hockney's model.

    Recursive doubling has fewest messages, a ring carries fewest bytes; halving and doubling has both for a power of
    two, but its first messages are long: what goes in several messages at a time goes by a ring.
    """
    dancing = nodes.bit_length() - 1
    whole, parts = link.alpha + nbytes * link.beta, 2 * (nodes - 1) / nodes * nbytes * link.beta
    folding = 0.0 if nodes == 1 << dancing else 2 * whole
    costs = {
        "doubling": dancing * whole + folding,
        "butterfly": 2 * dancing * link.alpha + parts + folding,
        "ring": 2 * (nodes - 1) * link.alpha + parts,
    }
    if nodes > 2 and nbytes > 2 * MESSAGE_BYTES * lanes:
        costs = {"ring": 0.0}
    return ALGORITHMS["allreduce"][min(costs, key=costs.__getitem__)]


def segment_count(nbytes: float) -> int:
    """Into how many segments a long vector is cut."""
    return max(1, min(MOST_SEGMENTS, int(-(-nbytes // SEGMENT_BYTES))))


def message_count(part_bytes: float, blocks: int) -> int:
    """In how many messages at a time a lane's part of a segment goes, by a schedule of so many blocks."""
    return max(1, int(-(-part_bytes // (MESSAGE_BYTES * blocks))))
