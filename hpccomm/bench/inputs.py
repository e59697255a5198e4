"""Numbers to check a collective with: ranks, positions and calls all look different, and every sum is exact.

*p ranks, r one of them, i a position, v the variant (one call's numbers differ from the last call's), m a prime with
the primitive root g.*  Rank r holds h(i, v) · g^(r+1) mod m, where h is a fixed hash between 1 and m − 1.  Powers of g
differ, so at every single position all ranks up to m − 1 hold different numbers, and a rank that is counted twice while
another is dropped shows, as do parts that changed places.  Sums stay below what the datatype holds exactly, so that the
order of summation does not matter and the tolerance is zero.  Where bytes are too small for a number of every rank,
only every k-th rank holds one, other ranks at the next position (Open MPI's sums of bytes saturate, others wrap).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PERIOD = 65537
"""Numbers repeat after so many positions; a prime, so that no block of a vector begins where another did."""
MODULI = ((65521, 17), (4093, 2), (251, 6), (31, 3), (13, 2))
"""Primes, each with a primitive root."""
SPARSE = (31, 3)
"""For a number of every k-th rank only."""
VARIANTS = 3
"""Numbers of three calls in turn: implementations with two or four buffers cannot meet their own leftovers unseen."""

ALL_RANKS, NO_RANK = -1, -2
"""Not the numbers of one rank but the sums over all of them; nothing in particular."""
POISON = -1
"""What stands where nothing in particular shall stand: no number of any rank."""


class Block(NamedTuple):
    """A run of one rank's numbers."""

    origin: int
    first: int
    length: int


Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class Inputs:
    """The numbers of p ranks."""

    ranks: int
    dtype: np.dtype[Any]

    @cached_property
    def modulus(self) -> tuple[int, int]:
        """The largest prime that keeps all sums exact, and its root."""
        return next((each for each in MODULI if self.ranks * (each[0] - 1) <= self.max_exact_integer), SPARSE)

    @cached_property
    def sparsity(self) -> int:
        """At each position, one rank in so many holds a number."""
        return max(1, -(-self.ranks // (self.max_exact_integer // (self.modulus[0] - 1))))

    @property
    def max_exact_integer(self) -> int:
        """Up to here the datatype holds every integer."""
        if self.dtype.kind == "f":
            return int(2 ** (np.finfo(self.dtype).nmant + 1))
        return int(np.iinfo(self.dtype).max)

    def numbers(self, rank: int, first: int, count: int) -> npt.NDArray[np.int64]:
        """One rank's, from a position on; at most a period of them."""
        m, g = self.modulus
        shift = rank // (m - 1)  # beyond m - 1 ranks powers repeat: other positions then
        position = (np.arange(count) + first) % PERIOD
        made = hash_positions((position + shift) % PERIOD, m) * pow(g, rank + 1, m) % m
        return np.where((position + rank) % self.sparsity, 0, made) if self.sparsity > 1 else made

    @cached_property
    def sums(self) -> npt.NDArray[np.int64]:
        """Over all ranks, at every position of a period."""
        total = np.zeros(PERIOD, np.int64)
        for rank in range(self.ranks):
            total += self.numbers(rank, 0, PERIOD)
        return total

    def block(self, piece: Block, variant: int) -> Array:
        """The numbers of a piece."""
        first = (piece.first + variant * (PERIOD // VARIANTS)) % PERIOD
        short = min(piece.length, PERIOD)
        if piece.origin == NO_RANK:
            return np.full(piece.length, POISON, self.dtype)
        if piece.origin == ALL_RANKS:
            found = self.sums[(np.arange(short) + first) % PERIOD]
        else:
            found = self.numbers(piece.origin, first, short)
        return np.resize(found.astype(self.dtype), piece.length)

    def content(self, pieces: Blocks, variant: int) -> Array:
        """Pieces side by side."""
        return np.concatenate([np.empty(0, self.dtype), *(self.block(each, variant) for each in pieces)])


def hash_positions(positions: npt.NDArray[np.int64], modulus: int) -> npt.NDArray[np.int64]:
    """A number between 1 and modulus − 1 for each position (the finaliser of SplitMix64; Steele, Lea & Flood 2014)."""
    x = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(modulus - 1)).astype(np.int64) + 1
