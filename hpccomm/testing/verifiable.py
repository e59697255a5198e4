"""Inputs that differ by rank and position and whose reduction is exact in any order, so that tolerance is 0.

Notation: *p ranks, r this one, i the position*.  Every operand is made of small integers counted as ``r + s·i`` modulo
m with a stride s > p that shares no factor with m: neighbouring ranks and positions differ, and all m values come up.
m is as large as the sum of p of them allows in the type; for minima and maxima it is small, so that every rank wins
somewhere.  Products are made of 1 and -1 (and i), with at most three other factors: 2, 3 and 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Values = Callable[[int, int, Array, "np.dtype[Any]"], Array]
"""What a rank of so many brings at positions i in a type."""

FOLDS: dict[str, Callable[..., Any]] = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "land": np.logical_and,
    "lor": np.logical_or,
    "lxor": np.logical_xor,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
}
"""The operations by name, and what each means."""

KINDS = {"b": "land lor lxor", "iu": " ".join(FOLDS), "f": "sum prod min max", "c": "sum prod"}
DTYPES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", "c8", "c16", "?")


def operations(dtype: npt.DTypeLike) -> tuple[str, ...]:
    """The operations that MPI defines for a type."""
    kind = np.dtype(dtype).kind
    return tuple(next(names for kinds, names in KINDS.items() if kind in kinds).split())


def operand(rank: int, size: int, n: int, dtype: npt.DTypeLike, op: str = "sum") -> Array:
    """What rank ``rank`` of ``size`` (at most 64 for exact results) brings: shape (n,), of ``dtype``."""
    made = VALUES.get(op, sum_values)(rank, size, np.arange(n), np.dtype(dtype))
    return np.asarray(made).astype(dtype)


def reduction(size: int, n: int, dtype: npt.DTypeLike, op: str = "sum") -> Array:
    """The reduction of all operands: shape (n,), of ``dtype``."""
    result = operand(0, size, n, dtype, op)
    for rank in range(1, size):
        result = FOLDS[op](result, operand(rank, size, n, dtype, op)).astype(dtype)
    return result


def max_exact_integer(dtype: np.dtype[Any]) -> int:
    """Up to here the type holds every integer."""
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).max)
    return 1 << (np.finfo(dtype).nmant + 1)


def counter(rank: int, size: int, i: Array, values: int) -> Array:
    """``r + s·i`` modulo the number of values."""
    stride = next(s for s in count(size + 1) if gcd(s, values) == 1)
    return np.asarray((rank + stride * i) % values)


def sum_values(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """For sums: both signs where the type has them; the imaginary part counts elsewhere."""
    values = min(max_exact_integer(dtype) // size + 1, 1 << 24)
    shift = 0 if dtype.kind == "u" else values // 2
    real = counter(rank, size, i, values) - shift
    return np.asarray(real + 1j * np.roll(real, 1) if dtype.kind == "c" else real)


def minmax_values(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """For minima and maxima."""
    return counter(rank, size, i, 127) - (0 if dtype.kind == "u" else 63)


def factors(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """For products: in turn one rank brings 2, the next 3, the next 1/2 where there are fractions; all bring signs."""
    others = np.array([2, 3, 1 if dtype.kind in "iu" else 0.5, *[1] * size])
    turns = counter(rank, size, i, 5) % 4
    units = {"u": [1] * 4, "c": [1, 1j, -1, -1j]}.get(dtype.kind, [1, -1, 1, -1])
    return np.asarray(others[(rank + i) % (size + 1)] * np.array(units)[turns])


def truth_values(default: bool) -> Values:
    """Truth values (integers of several sizes) that are ``default`` but for one rank at most positions."""

    def values(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
        truths = np.asarray((i % (size + 1) == rank) != default)
        return truths if dtype.kind == "b" else truths * (1 + counter(rank, size, i, 7))

    return values


def parity(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """Truth values that are mixed in every way."""
    return counter(rank, size, i, 7) * (counter(rank, size, i, 11) % 2)


def bit_patterns(default: bool) -> Values:
    """All bits ``default`` but for one, another one at every rank and position."""

    def values(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
        width = 8 * dtype.itemsize
        unsigned = np.dtype(f"u{dtype.itemsize}")
        one = np.left_shift(unsigned.type(1), ((rank + i) % width).astype(unsigned))
        return np.asarray((~one if default else one).view(dtype))

    return values


def any_bits(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """Any bits."""
    return counter(rank, size, i, min(max_exact_integer(dtype), 1 << 24))


VALUES: dict[str, Values] = {
    "prod": factors,
    "min": minmax_values,
    "max": minmax_values,
    "land": truth_values(True),
    "lor": truth_values(False),
    "lxor": parity,
    "band": bit_patterns(True),
    "bor": bit_patterns(False),
    "bxor": any_bits,
}
