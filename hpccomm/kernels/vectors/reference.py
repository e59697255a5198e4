"""What the kernels of all families share, in NumPy: sums, checks and random numbers, which define every bit.

Vectors are float32, flat and in C order; *n elements, i their index*.  Sums run in float64 in one fixed order
(:func:`lane_sum`), so every machine gets the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

Indices = npt.NDArray[np.uint32]

Octets = npt.NDArray[np.uint8]

F32 = np.float32

SUM_LANES = 64
"""Partial sums of :func:`lane_sum`; a power of two."""


def lane_sum(terms: Vector) -> float:
    """Sum of float32: 256 at a time, four rows of lanes, (a + b) + (c + d) in float32, then :func:`lane_total`."""
    rows = np.zeros((-(-terms.size // (4 * SUM_LANES)), 4, SUM_LANES), "f4")
    rows.reshape(-1)[: terms.size] = terms
    return lane_total((rows[:, 0] + rows[:, 1]) + (rows[:, 2] + rows[:, 3]))


def lane_total(rows: Iterable[npt.NDArray[Any]]) -> float:
    """Sum in float64: rows of ``SUM_LANES`` elements are added in order, then halves of the lanes until one is left."""
    lanes = np.zeros(SUM_LANES)
    for row in rows:
        lanes[: row.size] += row
    while lanes.size > 1:
        half = lanes.size // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])


def rows_of(x: Vector) -> Iterable[npt.NDArray[np.float64]]:
    """``SUM_LANES`` elements at a time; the last row may be shorter."""
    return (x[at : at + SUM_LANES].astype("f8") for at in range(0, x.size, SUM_LANES))


def all_finite(x: Vector) -> bool:
    """Whether there is neither NaN nor infinity."""
    return bool(np.isfinite(x).all())


def largest_magnitude(x: Vector) -> float:
    """max |x|; 0 for an empty vector.  Defined for finite elements."""
    return float(np.abs(x).max(initial=F32(0)))


def moments(x: Vector) -> tuple[float, float]:
    """Σ x and Σ x², as by :func:`lane_total`."""
    return lane_total(rows_of(x)), lane_total(row * row for row in rows_of(x))


def backlog_of(residual: Vector, gradient: Vector | None) -> Vector:
    """The vector to compress: residual plus gradient, if there is a gradient."""
    return residual if gradient is None else residual + gradient


def uniforms(key: int, n: int) -> Vector:
    """Numbers in [0, 1), multiples of 2^-24; element i is a hash of i and a 32-bit key.

    The hash is a 32-bit finaliser of two multiplications and three shifts (Wellons, "hash prospector", 2018).
    """
    word = np.arange(n, dtype="u4") ^ np.uint32(key)
    with np.errstate(over="ignore"):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word ^= word >> np.uint32(shift)
            word *= np.uint32(factor)
    word ^= word >> np.uint32(16)
    return (word >> np.uint32(8)).astype("f4") * F32(2.0**-24)


def key_of(seed: int, step: int) -> int:
    """A 32-bit key."""
    return (seed * 0x9E3779B1 + step * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
