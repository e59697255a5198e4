"""Inputs that differ by rank and position, with reductions that are exact in any order: the tolerance is 0.

Notation: *p ranks, r this one, i the position*.  Operands are small integers, ``r + s·i`` modulo m, with a stride
s > p that shares no factor with m: neighbouring ranks and positions differ, and all m values occur.  m is as large as
the dtype allows for a sum of p values; for minima and maxima m is small, so that each rank holds the result at some
positions.  Products consist of 1 and -1 (and i), with at most three other factors: 2, 3 and 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from math import gcd
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.reductions import reference
from hpccomm.kernels.reductions.reference import UFUNCS as FOLDS

Array = npt.NDArray[Any]
Values = Callable[[int, int, Array, "np.dtype[Any]"], Array]
"""(rank, size, positions, dtype) -> the values that this rank contributes."""

KINDS = {
    "b": "land lor lxor",
    "iu": " ".join(op for op in FOLDS if reference.has_kernel(op, "i4")),
    "f": "sum prod min max",
    "c": "sum prod",
}
DTYPES = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", "c8", "c16", "?")


def operations(dtype: npt.DTypeLike) -> tuple[str, ...]:
    """The operations that MPI defines for a dtype."""
    kind = np.dtype(dtype).kind
    return tuple(next(names for kinds, names in KINDS.items() if kind in kinds).split())


def operand(rank: int, size: int, n: int, dtype: npt.DTypeLike, op: str = "sum") -> Array:
    """The contribution of rank ``rank`` of ``size`` (at most 64 for exact results): shape (n,), of ``dtype``."""
    values = VALUES.get(op, sum_values)(rank, size, np.arange(n), np.dtype(dtype))
    return np.asarray(values).astype(dtype)


def reduction(size: int, n: int, dtype: npt.DTypeLike, op: str = "sum") -> Array:
    """The reduction of all operands: shape (n,), of ``dtype``."""
    result = operand(0, size, n, dtype, op)
    for rank in range(1, size):
        result = FOLDS[op](result, operand(rank, size, n, dtype, op)).astype(dtype)
    return result


def max_exact_integer(dtype: np.dtype[Any]) -> int:
    """The largest integer up to which the dtype represents every integer."""
    if dtype.kind in "iu":
        return int(np.iinfo(dtype).max)
    return 1 << (np.finfo(dtype).nmant + 1)


def counter(rank: int, size: int, i: Array, values: int) -> Array:
    """``r + s·i`` modulo ``values``."""
    stride = next(s for s in count(size + 1) if gcd(s, values) == 1)
    return np.asarray((rank + stride * i) % values)


def sum_values(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """Values for sums: both signs where the dtype has them; the imaginary part is shifted by one position."""
    values = min(max_exact_integer(dtype) // size + 1, 1 << 24)
    shift = 0 if dtype.kind == "u" else values // 2
    real = counter(rank, size, i, values) - shift
    return np.asarray(real + 1j * np.roll(real, 1) if dtype.kind == "c" else real)


def minmax_values(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """Values for minima and maxima."""
    return counter(rank, size, i, 127) - (0 if dtype.kind == "u" else 63)


def factors(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """Values for products: at each position one rank has 2, one 3, one 1/2 (for fractions); all have signs."""
    others = np.array([2, 3, 1 if dtype.kind in "iu" else 0.5, *[1] * size])
    turns = counter(rank, size, i, 5) % 4
    units = {"u": [1] * 4, "c": [1, 1j, -1, -1j]}.get(dtype.kind, [1, -1, 1, -1])
    return np.asarray(others[(rank + i) % (size + 1)] * np.array(units)[turns])


def truth_values(default: bool) -> Values:
    """Truth values, as various integers: at most positions exactly one rank differs from ``default``."""

    def values(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
        truths = np.asarray((i % (size + 1) == rank) != default)
        return truths if dtype.kind == "b" else truths * (1 + counter(rank, size, i, 7))

    return values


def parity(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """Truth values in all combinations over the ranks."""
    return counter(rank, size, i, 7) * (counter(rank, size, i, 11) % 2)


def bit_patterns(default: bool) -> Values:
    """All bits equal ``default`` except one, whose place depends on rank and position."""

    def values(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
        width = 8 * dtype.itemsize
        unsigned = np.dtype(f"u{dtype.itemsize}")
        one = np.left_shift(unsigned.type(1), ((rank + i) % width).astype(unsigned))
        return np.asarray((~one if default else one).view(dtype))

    return values


def any_bits(rank: int, size: int, i: Array, dtype: np.dtype[Any]) -> Array:
    """Integers with arbitrary bits."""
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


def collective_assert(comm: Any, condition: object, message: str = "") -> None:
    """Raise AssertionError on all ranks of ``comm`` where ``condition`` is false on any; collective.

    The error names the ranks with their messages.
    """
    messages = comm.allgather(None if condition else message or "assertion failed")
    failures = [f"rank {rank} of {comm.size}: {text}" for rank, text in enumerate(messages) if text is not None]
    if failures:
        raise AssertionError("\n".join(failures))
