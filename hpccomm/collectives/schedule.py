"""A schedule lists, round by round, which blocks a rank sends to which peer and which blocks it receives from which.

*p ranks, r this one, k the round; a vector is cut into b blocks numbered 0 … b-1.*

One algorithm is one pure generator of :class:`Step`.  Step k of a rank matches step k of its peers: all ranks yield the
same number of steps, and a rank with nothing to do in a round yields ``idle_step``.  A rank sends the contents that its
blocks had before the round began.  ``r`` is an integer or ``np.arange(p)``; with an array, one step describes a whole
round and its fields are arrays, so that thousands of ranks are verified and priced at once.  Blocks ``[lo, hi)`` count
modulo b, so an interval may wrap around the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives.volume import Volume

NOBODY = -1
"""The peer of a rank that sends (or receives) nothing in a round."""

Rank = Any
"""An ``int``, or an integer array with one entry a rank."""


class Step(NamedTuple):
    """One round of one rank: send blocks ``send`` to ``to`` while receiving blocks ``recv`` from ``source``."""

    to: Rank
    send: tuple[Rank, Rank]
    source: Rank
    recv: tuple[Rank, Rank]
    reduce: bool
    """Reduce the received blocks into the local ones (else replace these)."""


Steps = Callable[..., Iterator[Step]]
"""``steps(r, p)``, or ``steps(r, p, root)`` for a collective with a root."""


class Algorithm(NamedTuple):
    """One algorithm of one collective."""

    steps: Steps
    blocks: Callable[[int], int]
    """The number of blocks into which p ranks cut the vector."""
    ordered: bool = False
    """Every reduction joins adjacent ranges of ranks, the lower on the left, for every root: correct for
    non-commutative operations."""
    segmented: bool = False
    """Faster for long vectors when pipelined in segments (chains and trees)."""
    own_blocks: Callable[[int], Any] | None = None
    """``(p,)`` the block that each rank of a reduce-scatter or allgather owns; ``None``: rank r owns block r."""
    volume: Volume | None = None
    """The rounds and bytes that the algorithm declares; ``verify`` checks them."""


def block_per_rank(p: int) -> int:
    """One block for each rank."""
    return p


def one_block(p: int) -> int:
    """The whole vector in one block."""
    return 1


def power_of_two(p: int) -> int:
    """The largest power of two not above p."""
    return 1 << (p.bit_length() - 1)


def select_peer(active: Any, peer: Rank) -> Rank:
    """``peer`` where ``active`` holds, nobody elsewhere."""
    return np.where(active, peer, NOBODY)


def idle_step(r: Rank) -> Step:
    """A round without messages."""
    nobody = np.full(np.shape(r), NOBODY)
    return Step(nobody, (0, 0), nobody, (0, 0), False)
