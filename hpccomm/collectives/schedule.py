"""A schedule says, for rank r of p, whom to send which blocks to and whom to receive which blocks from, round by round.

Notation: *p ranks, r this one, k the round; a vector is cut into b blocks numbered 0 … b-1.*

One algorithm is one pure generator of :class:`Step`.  Step k of a rank meets step k of its peers: all ranks yield the
same number of steps, and a rank that has nothing to do in a round yields ``idle``.  What is sent in a round is what
stood there before the round began.  ``r`` may be an integer or ``np.arange(p)``: then one step describes a whole round
and its members are arrays, which is how schedules are verified and priced for thousands of ranks at once.  Blocks
``[lo, hi)`` count modulo b, so an interval may wrap around the end.
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
    """Reduce what arrives into what is here (else replace it)."""


Steps = Callable[..., Iterator[Step]]
"""``steps(r, p)``, or ``steps(r, p, root)`` for a collective with a root."""


class Algorithm(NamedTuple):
    """A named way to do one collective."""

    steps: Steps
    blocks: Callable[[int], int]
    """Into how many blocks p ranks cut the vector."""
    ordered: bool = False
    """Every reduction joins neighbouring ranges of ranks, lower on the left, whatever the root: right for
    non-commutative operations."""
    segmented: bool = False
    """Gains from cutting every block into segments that flow one after the other (chains and trees)."""
    own_blocks: Callable[[int], Any] | None = None
    """``(p,)`` the block that is each rank's own, where it has not the rank's number (reduce-scatters, allgathers)."""
    volume: Volume | None = None
    """The rounds and bytes that it declares; ``verify`` checks them."""


def block_per_rank(p: int) -> int:
    """A block a rank."""
    return p


def one_block(p: int) -> int:
    """The vector in one piece."""
    return 1


def power_of_two(p: int) -> int:
    """The largest power of two that is not above p."""
    return 1 << (p.bit_length() - 1)


def select_peer(active: Any, peer: Rank) -> Rank:
    """``peer`` where ``active`` holds, nobody elsewhere."""
    return np.where(active, peer, NOBODY)


def idle_step(r: Rank) -> Step:
    """A round in which nobody moves anything."""
    nobody = np.full(np.shape(r), NOBODY)
    return Step(nobody, (0, 0), nobody, (0, 0), False)
