"""Optimizer steps on flat vectors in NumPy, which define every bit of :mod:`hpccomm.kernels.optimizers.loops`.

*w weights, g gradient, m and v moments, u or ``out`` the direction; a table of k tensors: ``bounds`` (k, 2) with start
and end of each, rates (k,) of the vectors' dtype.*  Vectors are float32 or float64, contiguous; every scalar is of
their dtype, and every operation is rounded to it, in the order written here.  Sums of squares are float64 beyond eight
elements: see :func:`sum_of_squares`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[Any]
Sums = npt.NDArray[np.float64]
Bounds = npt.NDArray[np.int64]

BLOCK, LANES = 1024, 128

LOW, HIGH = 2.0**-100, float(np.finfo(np.float32).max)
"""Between these a float32 sum of eight squares is accurate."""

GRADIENT, DECAYED_GRADIENT, UPDATE = 0, 1, 2
"""The second norm of :func:`lars_sums`, besides that of the weights: of g, g + λw, or the momentum's output."""


def sum_of_squares(x: Vector) -> float:
    """Σ x²: 128 lanes; a block adds eight squares to each in x's own precision, the blocks are added in float64.

    The sum of eight float32 squares has a relative error of at most 2⁻²¹, whatever the length of x.  A lane of a block
    below 2⁻¹⁰⁰ or beyond float32 is summed in float64 instead, so nothing over- or underflows.  The last block is
    padded with zeros; at the end the lanes are folded in halves.
    """
    blocks = np.zeros((-(-x.size // BLOCK), BLOCK // LANES, LANES), x.dtype)
    blocks.reshape(-1)[: x.size] = x
    lanes = np.zeros(LANES)
    with np.errstate(over="ignore", under="ignore"):
        sums = add_rows(np.square(blocks)).astype(np.float64)
        doubtful = ~((sums >= LOW) & (sums <= HIGH))
        again = doubtful.any(axis=1)
        wide = add_rows(np.square(blocks[again], dtype=np.float64))
    sums[again] = np.where(doubtful[again], wide, sums[again])
    for block in sums:
        lanes += block
    while lanes.size > 1:
        half = lanes.size // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])


def add_rows(blocks: Vector) -> Vector:
    """Add the rows of each block, in order."""
    total = blocks[:, 0].copy()
    for row in range(1, blocks.shape[1]):
        total += blocks[:, row]
    return total


def lars_direction(
    w: Vector, g: Vector, v: Vector, scale: Any, decay: Any, first: Any, second: Any, mu: Any, nesterov: bool
) -> tuple[Vector, Vector]:
    """(v, o): s = ((g·scale + λw)·first)·second, v ← s + μv, o = v or s + μv."""
    s = ((g * scale + decay * w) * first) * second
    v = s + mu * v
    return v, (s + mu * v if nesterov else v)


def lars_sums(
    w: Vector, g: Vector, v: Vector, bounds: Bounds, decay: Vector, scale: Any, mu: Any, nesterov: bool, whose: int
) -> Sums:
    """(k, 2) sums of the squares of w, and of g·scale, of g·scale + λw, or of o with both factors 1."""
    sums, one = np.empty((len(bounds), 2)), w.dtype.type(1)
    for row, (lo, hi) in enumerate(bounds):
        part = slice(lo, hi)
        if whose == GRADIENT:
            other = g[part] * scale
        elif whose == DECAYED_GRADIENT:
            other = g[part] * scale + decay[row] * w[part]
        else:
            _, other = lars_direction(w[part], g[part], v[part], scale, decay[row], one, one, mu, nesterov)
        sums[row] = sum_of_squares(w[part]), sum_of_squares(other)
    return sums


def lars_step(
    w: Vector,
    g: Vector,
    v: Vector,
    out: Vector,
    bounds: Bounds,
    decay: Vector,
    first: Vector,
    last: Vector,
    scale: Any,
    second: Any,
    mu: Any,
    nesterov: bool,
) -> None:
    """Write v, and o·last into ``out``; first and last are factors of each tensor."""
    for row, (lo, hi) in enumerate(bounds):
        part = slice(lo, hi)
        v[part], direction = lars_direction(
            w[part], g[part], v[part], scale, decay[row], first[row], second, mu, nesterov
        )
        out[part] = direction * last[row]


def lars_apply(
    w: Vector, g: Vector, v: Vector, bounds: Bounds, decay: Vector, first: Vector, last: Vector, *numbers: Any
) -> None:
    """As :func:`lars_step`, added to the weights."""
    out = np.empty_like(w)
    lars_step(w, g, v, out, bounds, decay, first, last, *numbers)
    for lo, hi in bounds:
        w[lo:hi] += out[lo:hi]


def adam_direction(w: Vector, g: Vector, m: Vector, v: Vector, decay: Any, *numbers: Any) -> Vector:
    """Write m ← b1·m + c1·g and v ← b2·v + c2·g²; (m/k1)/(√(v/k2) + eps) + λw."""
    scale, b1, c1, b2, c2, k1, k2, eps = numbers
    scaled = g * scale
    m[...] = b1 * m + c1 * scaled
    v[...] = b2 * v + c2 * (scaled * scaled)
    return (m / k1) / (np.sqrt(v / k2) + eps) + decay * w


def lamb_moments(
    w: Vector, g: Vector, m: Vector, v: Vector, out: Vector, bounds: Bounds, decay: Vector, *numbers: Any
) -> Sums:
    """:func:`adam_direction` of every tensor into ``out``; (k, 2) sums of the squares of w and out."""
    sums = np.empty((len(bounds), 2))
    for row, (lo, hi) in enumerate(bounds):
        part = slice(lo, hi)
        out[part] = adam_direction(w[part], g[part], m[part], v[part], decay[row], *numbers)
        sums[row] = sum_of_squares(w[part]), sum_of_squares(out[part])
    return sums


def adam_step(w: Vector, g: Vector, m: Vector, v: Vector, bounds: Bounds, decay: Vector, *numbers: Any) -> None:
    """w ← w + :func:`adam_direction` · last, the last of the numbers."""
    for row, (lo, hi) in enumerate(bounds):
        part = slice(lo, hi)
        w[part] += adam_direction(w[part], g[part], m[part], v[part], decay[row], *numbers[:-1]) * numbers[-1]


def scale_tensors(out: Vector, bounds: Bounds, factor: Vector, last: Any) -> None:
    """out ← (out·factor)·last, a factor for each tensor."""
    for row, (lo, hi) in enumerate(bounds):
        out[lo:hi] = (out[lo:hi] * factor[row]) * last


def add_scaled(w: Vector, out: Vector, bounds: Bounds, factor: Vector, last: Any) -> None:
    """w ← w + (out·factor)·last, a factor for each tensor."""
    for row, (lo, hi) in enumerate(bounds):
        w[lo:hi] += (out[lo:hi] * factor[row]) * last
