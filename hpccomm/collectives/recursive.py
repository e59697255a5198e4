"""Butterfly: in every round ranks exchange in pairs, at a distance that doubles or halves, so p ranks need lg p rounds.

*p ranks, r this one; 2^⌊lg p⌋ ranks are participants, q this one's position among them, mask the distance.*  Where p is
no power of two, the first 2·(p − 2^⌊lg p⌋) ranks fold in pairs: the even rank sends its vector to the odd rank, idles,
and receives the result at the end.  In the allreduces neighbours exchange first, so every partial result covers
adjacent ranks and rank order can be kept.

=================  ============================  ===================================
algorithm          rounds (+2 when folded)       bytes sent by every participant
=================  ============================  ===================================
doubling           lg p                          n lg p
halving-doubling   2 lg p                        2 (p−1)/p n
reduce-scatter     lg p                          (p−1)/p n
allgather          lg p                          (p−1)/p n
Bruck allgather    ⌈lg p⌉, never folded          (p−1)/p n
=================  ============================  ===================================

Thakur, Rabenseifner & Gropp, Int. J. High Perform. Comput. Appl. 2005;
Bruck et al., IEEE Trans. Parallel Distrib. Syst. 1997.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives.schedule import Rank, Step, power_of_two, select_peer
from hpccomm.collectives.volume import Vectors, Volume, ceil_lg, divide, floor_lg, ring_fraction


class Participants(NamedTuple):
    """The participants: ``size`` ranks, a power of two; ``pairs`` of them are the odd ranks of folded pairs."""

    size: int
    pairs: int

    def position(self, r: Rank) -> Rank:
        """The position of rank r (of a folded even rank: its partner's)."""
        return np.where(np.asarray(r) < 2 * self.pairs, np.asarray(r) // 2, np.asarray(r) - self.pairs)

    def is_active(self, r: Rank) -> Any:
        """Whether rank r participates: all ranks but the even one of each pair."""
        return (np.asarray(r) >= 2 * self.pairs) | (np.asarray(r) % 2 == 1)

    def rank(self, q: Rank) -> Rank:
        """The rank at position q."""
        return np.where(np.asarray(q) < self.pairs, 2 * np.asarray(q) + 1, np.asarray(q) + self.pairs)

    def first_block(self, q: Rank) -> Rank:
        """The first block of position q where every rank owns one: its pair's, or its own."""
        return np.where(np.asarray(q) < self.pairs, 2 * np.asarray(q), np.asarray(q) + self.pairs)


def participants(p: int) -> Participants:
    """The participants among p ranks."""
    size = power_of_two(p)
    return Participants(size, p - size)


def masks(size: int) -> list[int]:
    """Distances 1, 2, 4 … below ``size``."""
    return [1 << k for k in range(size.bit_length() - 1)]


def fold(r: Rank, d: Participants, send: tuple[Rank, Rank], recv: tuple[Rank, Rank], reduce: bool) -> Iterator[Step]:
    """The even rank of each pair sends blocks ``send`` to its odd partner, which receives them as ``recv``."""
    if d.pairs:
        paired, even = np.asarray(r) < 2 * d.pairs, np.asarray(r) % 2 == 0
        yield Step(select_peer(paired & even, r + 1), send, select_peer(paired & ~even, r - 1), recv, reduce)


def unfold(r: Rank, d: Participants, send: tuple[Rank, Rank], recv: tuple[Rank, Rank]) -> Iterator[Step]:
    """The odd rank of each pair sends blocks ``send`` back; the even rank receives them as ``recv``."""
    if d.pairs:
        paired, even = np.asarray(r) < 2 * d.pairs, np.asarray(r) % 2 == 0
        yield Step(select_peer(paired & ~even, r - 1), send, select_peer(paired & even, r + 1), recv, reduce=False)


def doubling(r: Rank, p: int) -> Iterator[Step]:
    """Allreduce of short vectors: partners exchange the whole vector, one block."""
    d, whole = participants(p), (0, 1)
    yield from fold(r, d, whole, whole, reduce=True)
    for mask in masks(d.size):
        peer = select_peer(d.is_active(r), d.rank(d.position(r) ^ mask))
        yield Step(peer, whole, peer, whole, reduce=True)
    yield from unfold(r, d, whole, whole)


def halving_doubling(r: Rank, p: int) -> Iterator[Step]:
    """Allreduce of long vectors: a reduce-scatter by halving, then an allgather by doubling in the reverse order."""
    d = participants(p)
    q, lo, half = d.position(r), np.zeros_like(r), d.size
    yield from fold(r, d, (0, d.size), (0, d.size), reduce=True)
    for mask in masks(d.size):
        half //= 2
        upper = (q & mask) // mask
        keep, give = lo + upper * half, lo + (1 - upper) * half
        peer = select_peer(d.is_active(r), d.rank(q ^ mask))
        yield Step(peer, (give, give + half), peer, (keep, keep + half), reduce=True)
        lo = keep
    for mask in reversed(masks(d.size)):
        upper = (q & mask) // mask
        other = lo + (1 - 2 * upper) * half
        peer = select_peer(d.is_active(r), d.rank(q ^ mask))
        yield Step(peer, (lo, lo + half), peer, (other, other + half), reduce=False)
        lo, half = np.minimum(lo, other), 2 * half
    yield from unfold(r, d, (0, d.size), (0, d.size))


def reduce_scatter(r: Rank, p: int) -> Iterator[Step]:
    """Recursive halving: keep the blocks of the rank's half; far partners first, so rank order is not kept."""
    d = participants(p)
    q = d.position(r)
    yield from fold(r, d, (0, p), (0, p), reduce=True)
    for mask in reversed(masks(d.size)):
        keep, give = q & ~(mask - 1), (q ^ mask) & ~(mask - 1)
        peer = select_peer(d.is_active(r), d.rank(q ^ mask))
        yield Step(peer, block_range(d, give, mask), peer, block_range(d, keep, mask), reduce=True)
    yield from unfold(r, d, (r - 1, r), (r, r + 1))


def allgather(r: Rank, p: int) -> Iterator[Step]:
    """Recursive doubling: partners exchange all blocks that they have, neighbours first."""
    d = participants(p)
    q = d.position(r)
    yield from fold(r, d, (r, r + 1), (r - 1, r), reduce=False)
    for mask in masks(d.size):
        mine, theirs = q & ~(mask - 1), (q ^ mask) & ~(mask - 1)
        peer = select_peer(d.is_active(r), d.rank(q ^ mask))
        yield Step(peer, block_range(d, mine, mask), peer, block_range(d, theirs, mask), reduce=False)
    yield from unfold(r, d, (0, p), (0, p))


def block_range(d: Participants, q: Rank, count: int) -> tuple[Rank, Rank]:
    """The blocks of ``count`` participants from position q on."""
    return d.first_block(q), d.first_block(q + count)


def bruck(r: Rank, p: int) -> Iterator[Step]:
    """Allgather for any p: the interval of blocks from the rank's own on doubles every round (it may wrap around)."""
    have = 1
    while have < p:
        more = min(have, p - have)
        yield Step((r - have) % p, (r, r + more), (r + have) % p, (r + have, r + have + more), reduce=False)
        have += more


def pairs(p: int) -> int:
    """The number of pairs that fold."""
    return p - power_of_two(p)


def has_fold(p: int) -> int:
    """1 where any pair folds, else 0."""
    return int(pairs(p) > 0)


def gather_volume(p: int) -> Vectors:
    """The vectors that the first participant of an allgather sends while its blocks double, a pair's counting twice."""
    return divide(sum(mask + min(mask, pairs(p)) for mask in masks(power_of_two(p))), p)


HALVING_DOUBLING = Volume(
    "2(s-1)/s n, +n if folded",
    lambda p, _: 2 * floor_lg(p) + 2 * has_fold(p),
    lambda p, _: 2 * ring_fraction(power_of_two(p)) + has_fold(p),
    lambda p, _: 2 * (p - 1),
)
DOUBLING = Volume(
    "n lg s, +n if folded",
    lambda p, _: floor_lg(p) + 2 * has_fold(p),
    lambda p, _: floor_lg(p) + has_fold(p),
    lambda p, _: power_of_two(p) * floor_lg(p) + 2 * pairs(p),
)
REDUCE_SCATTER = Volume(
    "(p-1)/p n, n by those folded in",
    lambda p, _: floor_lg(p) + 2 * has_fold(p),
    lambda p, _: 1 if has_fold(p) else ring_fraction(p),
    lambda p, _: power_of_two(p) * ring_fraction(p) + pairs(p),
)
ALLGATHER = Volume(
    "(p-1)/p n, < 3n if folded",
    lambda p, _: floor_lg(p) + 2 * has_fold(p),
    lambda p, _: gather_volume(p) + has_fold(p),
    lambda p, _: divide(pairs(p), p) + power_of_two(p) - 1 + pairs(p),
)
BRUCK = Volume("(p-1)/p n", lambda p, _: ceil_lg(p), lambda p, _: ring_fraction(p), lambda p, _: p - 1)
