"""Sums of floats whose bits depend only on the operands, not on order, placement, algorithm or number of ranks.

*x one rank's element, e the largest exponent that any rank has at this position: |x| < 2^e.*

1. The ranks agree on e, by a maximum.
2. Each writes x as whole multiples of 2^(e-46), rounded to nearest even, and for float64 what that leaves as
   multiples of 2^(e-92).
3. These integers are added.  Integers may be added in any order, by anybody's algorithm; 2^16 ranks fit into 63 bits.
4. The sum becomes a float again, rounded the same way everywhere.

So an operand counts with 46 bits (float64: 92) below the largest one at its position, more than its own precision: the
result is nearer to the true sum than that of floats added one by one.  The idea is that of pre-rounding (Demmel &
Nguyen, "Parallel reproducible summation", IEEE Trans. Computers 64(7), 2015), with integers for the rounded parts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LIMB = 46
"""Bits of one integer that carry an operand."""
ZERO, SPECIAL = -(1 << 14), 1 << 14
"""In place of exponents: zero; infinite or no number."""
POSITIVE, NEGATIVE, NAN = 1, 1 << 20, 1 << 40
"""What stands for infinities and NaN in a sum where there is one."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[Any]


def limbs(dtype: npt.DTypeLike) -> int:
    """How many integers carry a float of this dtype."""
    return 2 if np.dtype(dtype).itemsize == np.dtype("f8").itemsize else 1


def exponents(x: Floats) -> npt.NDArray[np.int16]:
    """e with |x| < 2^e, smallest, for each element."""
    found = np.frexp(x)[1].astype(np.int16)
    found[x == 0] = ZERO
    found[~np.isfinite(x)] = SPECIAL
    return found


def split(x: Floats, e: npt.NDArray[np.int16], count: int) -> Integers:
    """The integers of each element: shape (count, n), int64."""
    special = e == SPECIAL
    rest = np.ldexp(np.where(special, 0, x), np.where(e == ZERO, 0, LIMB - e.astype(np.int32)))
    parts = np.empty((count, len(x)), np.int64)
    for part in parts:
        whole = np.rint(rest)
        part[...] = whole
        rest = np.ldexp(rest - whole, LIMB)  # exact: what is left of a float has fewer bits
    if special.any():
        parts[:, special] = 0
        words = np.select([np.isnan(x), x == np.inf, x == -np.inf], [NAN, POSITIVE, NEGATIVE], 0)
        parts[0, special] = words[special]
    return parts


def join(parts: Integers, e: npt.NDArray[np.int16]) -> Floats:
    """The floats that sums of integers stand for."""
    whole, scale = parts[0].copy(), np.where(e == ZERO, 0, e.astype(np.int32) - LIMB)
    rest = np.zeros_like(whole)
    if len(parts) > 1:
        whole += parts[1] >> LIMB
        rest = parts[1] & ((1 << LIMB) - 1)
    sign = np.where(whole < 0, -1.0, 1.0)  # of magnitudes no part cancels another, so the sum is rounded only once
    whole, rest = np.where(whole < 0, ~whole + (rest == 0), whole), np.where(whole < 0, -rest & ((1 << LIMB) - 1), rest)
    high, low = (whole >> 20) << 20, whole & ((1 << 20) - 1)  # both are floats, all of them together may not be one
    with np.errstate(over="ignore"):
        fraction = np.ldexp(rest.astype(np.float64), -LIMB)
        value = np.ldexp(sign * (high.astype(np.float64) + (low + fraction)), scale)
    special = e == SPECIAL
    if special.any():
        value[special] = special_values(parts[0, special])
    return value


def special_values(words: Integers) -> Floats:
    """Infinities and NaN."""
    value = np.where(words % NEGATIVE > 0, np.inf, -np.inf)
    mixed = (words % NEGATIVE > 0) & (words % NAN >= NEGATIVE)
    return np.where((words >= NAN) | mixed, np.nan, value)
