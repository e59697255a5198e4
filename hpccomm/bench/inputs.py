"""Inputs that check a collective: they differ between ranks, positions and calls, and every sum of them is exact.

*p ranks, r one of them, i a position, v the variant (one call's numbers differ from the last call's), m a prime with
the primitive root g.*  Rank r holds h(i, v) · g^(r+1) mod m, where h is a fixed hash between 1 and m − 1.  Powers of g
differ, so at every position up to m − 1 ranks hold different numbers: a sum that counts one rank twice and another not
at all is wrong, and so are blocks that changed places.  The datatype holds all sums exactly, so the order of summation
does not matter and the tolerance is zero.  Where a datatype is too small for that (bytes), only every k-th rank holds a
number, other ranks at the next position (Open MPI's sums of bytes saturate, others wrap).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PERIOD = 65537
"""Positions after which the numbers repeat; a prime, so that no two blocks of a vector begin at the same number."""
MODULI = ((65521, 17), (4093, 2), (251, 6), (31, 3), (13, 2))
"""Primes, each with a primitive root."""
SPARSE = (31, 3)
"""The prime and its root where only every k-th rank holds a number."""
VARIANTS = 3
"""Three sets of numbers, for consecutive calls in turn: stale data in two or four rotating buffers is noticed."""

ALL_RANKS, NO_RANK = -1, -2
"""Origins of a block that is the sum over all ranks, and of one whose content does not matter."""
POISON = -1
"""The content of a block that does not matter: a number that no rank sends."""


class Block(NamedTuple):
    """Consecutive numbers of one rank."""

    origin: int
    first: int
    length: int


Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class Inputs:
    """The inputs of p ranks, and their sums."""

    ranks: int
    dtype: np.dtype[Any]

    @cached_property
    def modulus(self) -> tuple[int, int]:
        """The largest prime that keeps all sums exact, and its root."""
        return next((each for each in MODULI if self.ranks * (each[0] - 1) <= self.max_exact_integer), SPARSE)

    @cached_property
    def sparsity(self) -> int:
        """k, where at each position every k-th rank holds a number."""
        return max(1, -(-self.ranks // (self.max_exact_integer // (self.modulus[0] - 1))))

    @property
    def max_exact_integer(self) -> int:
        """The datatype holds every integer up to this one."""
        if self.dtype.kind == "f":
            return int(2 ** (np.finfo(self.dtype).nmant + 1))
        return int(np.iinfo(self.dtype).max)

    def numbers(self, rank: int, first: int, count: int) -> npt.NDArray[np.int64]:
        """``count`` numbers of a rank from position ``first`` on, at most a period."""
        m, g = self.modulus
        shift = rank // (m - 1)  # above m - 1 ranks the powers repeat: shift the positions
        position = (np.arange(count) + first) % PERIOD
        made = hash_positions((position + shift) % PERIOD, m) * pow(g, rank + 1, m) % m
        return np.where((position + rank) % self.sparsity, 0, made) if self.sparsity > 1 else made

    @cached_property
    def sums(self) -> npt.NDArray[np.int64]:
        """The sum over all ranks at every position of a period."""
        total = np.zeros(PERIOD, np.int64)
        for rank in range(self.ranks):
            total += self.numbers(rank, 0, PERIOD)
        return total

    def block(self, block: Block, variant: int) -> Array:
        """The numbers of a block."""
        first = (block.first + variant * (PERIOD // VARIANTS)) % PERIOD
        short = min(block.length, PERIOD)
        if block.origin == NO_RANK:
            return np.full(block.length, POISON, self.dtype)
        if block.origin == ALL_RANKS:
            found = self.sums[(np.arange(short) + first) % PERIOD]
        else:
            found = self.numbers(block.origin, first, short)
        return np.resize(found.astype(self.dtype), block.length)

    def content(self, blocks: Blocks, variant: int) -> Array:
        """The numbers of consecutive blocks."""
        return np.concatenate([np.empty(0, self.dtype), *(self.block(each, variant) for each in blocks)])


def hash_positions(positions: npt.NDArray[np.int64], modulus: int) -> npt.NDArray[np.int64]:
    """A number between 1 and modulus − 1 for each position (the finaliser of SplitMix64; Steele, Lea & Flood 2014)."""
    x = (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(modulus - 1)).astype(np.int64) + 1
