"""One bit an element in NumPy, which defines every bit: signs, their scales and the majority vote.

A bit is 1 for x ≥ 0, so sign(0) is +1; eight bits fill a byte, the first element highest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpccomm.kernels.vectors.reference import (
    F32,
    Octets,
    Vector,
    backlog_of,
    lane_sum,
)


def sum_magnitudes(residual: Vector, gradient: Vector | None) -> float:
    """Σ \\|residual + gradient\\|; NaN or infinite if an element is, or if four of them exceed float32."""
    with np.errstate(all="ignore"):
        return lane_sum(np.abs(backlog_of(residual, gradient)))


def sum_by_sign(residual: Vector, gradient: Vector | None) -> tuple[float, float, int]:
    """Of residual + gradient: the sum of the elements ≥ 0, of all others, and the number of elements ≥ 0."""
    with np.errstate(all="ignore"):
        p = backlog_of(residual, gradient)
        above = p >= 0
        zero = F32(0)
        return (
            lane_sum(np.where(above, p, zero)),
            lane_sum(np.where(above, zero, p)),
            int(np.count_nonzero(above)),
        )


def pack_signs(x: Vector) -> Octets:
    """The bits of a vector."""
    return np.packbits(x >= 0)


def pack_signs_feedback(
    residual: Vector, gradient: Vector | None, out: Vector, plus: float, minus: float, bits: Octets
) -> None:
    """Write the bits of p = residual + gradient to ``bits``, p − ``plus`` to ``out`` where p ≥ 0, else p − ``minus``.

    ``out`` may be ``residual``.
    """
    p = backlog_of(residual, gradient)
    above = p >= 0
    bits[...] = np.packbits(above)
    out[...] = p - np.where(above, F32(plus), F32(minus))


def add_signs(messages: Sequence[tuple[Octets, float, float]], out: Vector, fresh: bool = False) -> None:
    """Add 1-bit messages (bits, plus, minus) one after the other; ``fresh`` memory is treated as zeros."""
    if fresh:
        out[...] = 0
    for bits, plus, minus in messages:
        out += np.where(np.unpackbits(bits, count=out.size).view(bool), F32(plus), F32(minus))


def majority(messages: Sequence[Octets], n: int) -> Octets:
    """The majority vote of each bit; 1 for a tie."""
    votes = np.zeros(n, "i4")
    for bits in messages:
        votes += np.unpackbits(bits, count=n)
    return np.packbits(2 * votes >= len(messages))
