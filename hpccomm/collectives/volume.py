"""A volume declares how many rounds an algorithm takes and how many bytes its ranks send; ``verify`` checks it.

*p ranks, n bytes in the vector, s the largest power of two not above p; bytes are counted in vectors.*  A
butterfly on p > s ranks first folds p-s pairs of ranks into one participant each ("if folded").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from fractions import Fraction

Vectors: TypeAlias = "Fraction | int"


class Volume(NamedTuple):
    """The rounds and bytes of an algorithm, as functions of (p, root)."""

    text: str
    """The formula of ``busiest``, as ``hpccomm verify`` prints it."""
    rounds: Callable[[int, int], int]
    busiest: Callable[[int, int], Vectors]
    """Vectors sent by the rank that sends most."""
    total: Callable[[int, int], Vectors]
    """Vectors sent by all ranks."""


def floor_lg(p: int) -> int:
    """⌊lg p⌋."""
    return p.bit_length() - 1


def ceil_lg(p: int) -> int:
    """⌈lg p⌉."""
    return (p - 1).bit_length()


def divide(blocks: int, count: int) -> Fraction:
    """Vectors of which each ``count`` blocks make one, exactly."""
    from fractions import Fraction  # only proofs count bytes

    return Fraction(blocks, count)


def ring_fraction(p: int) -> Fraction:
    """(p-1)/p."""
    return divide(p - 1, p)


def has_peers(p: int) -> int:
    """1 for more than one rank, else 0."""
    return int(p > 1)


FULL_VOLUME = Volume(
    "2(p-1)/p n", lambda p, _: 2 * (p - 1), lambda p, _: 2 * ring_fraction(p), lambda p, _: 2 * (p - 1)
)
"""An allreduce in 2(p-1) rounds of one block a rank."""
HALF_VOLUME = Volume("(p-1)/p n", lambda p, _: p - 1, lambda p, _: ring_fraction(p), lambda p, _: p - 1)
"""A reduce-scatter or allgather in p-1 rounds of one block a rank."""
