"""Optimizer steps on flat vectors, in NumPy: this defines the answer of :mod:`hpccomm.kernels.optimizers`, bit for bit.

*w weights, g gradient, m and v moments, u or ``out`` the direction; a table of k tensors: ``bounds`` (k, 2) where each
begins and ends, rates (k,) of the vectors' dtype.*  Vectors are float32 or float64, contiguous; every scalar is of
their dtype, and every operation is rounded to it, in the order written here.  Sums of squares are float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[Any]
Sums = npt.NDArray[np.float64]

BLOCK, LANES = 1024, 128

GRADIENT, DECAYED, MOVED = 0, 1, 2
"""Whose norm :func:`lars_sums` takes besides the weights': g, g + λw, or the momentum's output."""


def sum_of_squares(x: Vector) -> float:
    """Σ x² in float64: blocks folded in halves to lanes, the lanes of all blocks added, and folded to one number.

    The last block is filled up with zeros.
    """
    blocks = -(-x.size // BLOCK)
    squares = np.zeros(blocks * BLOCK)
    np.square(x, dtype=np.float64, out=squares[: x.size])
    lanes = np.zeros(LANES)
    for block in folded(squares.reshape(blocks, BLOCK), LANES):
        lanes += block
    return float(folded(lanes[None], 1)[0, 0])


def folded(rows: Sums, width: int) -> Sums:
    """Rows folded in halves until they are so wide."""
    while rows.shape[1] > width:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return rows


def lars_direction(
    w: Vector, g: Vector, v: Vector, scale: Any, decay: Any, first: Any, second: Any, mu: Any, nesterov: bool
) -> tuple[Vector, Vector]:
    """(v, o): s = ((g·scale + λw)·first)·second, v ← s + μv, o = v or s + μv."""
    s = ((g * scale + decay * w) * first) * second
    v = s + mu * v
    return v, (s + mu * v if nesterov else v)


def lars_sums(
    w: Vector,
    g: Vector,
    v: Vector,
    bounds: npt.NDArray[np.int64],
    decay: Vector,
    scale: Any,
    mu: Any,
    nesterov: bool,
    whose: int,
) -> Sums:
    """(k, 2) sums of the squares of w, and of g·scale, of g·scale + λw, or of o with both factors 1."""
    sums, one = np.empty((len(bounds), 2)), w.dtype.type(1)
    for row, (lo, hi) in enumerate(bounds):
        part = slice(lo, hi)
        if whose == GRADIENT:
            other = g[part] * scale
        elif whose == DECAYED:
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
    bounds: npt.NDArray[np.int64],
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


def lars_place(
    w: Vector,
    g: Vector,
    v: Vector,
    bounds: npt.NDArray[np.int64],
    decay: Vector,
    first: Vector,
    last: Vector,
    *numbers: Any,
) -> None:
    """As :func:`lars_step`, onto the weights."""
    out = np.empty_like(w)
    lars_step(w, g, v, out, bounds, decay, first, last, *numbers)
    for lo, hi in bounds:
        w[lo:hi] += out[lo:hi]


def adam_direction(
    w: Vector,
    g: Vector,
    m: Vector,
    v: Vector,
    decay: Any,
    scale: Any,
    b1: Any,
    c1: Any,
    b2: Any,
    c2: Any,
    k1: Any,
    k2: Any,
    eps: Any,
) -> Vector:
    """Write m ← b1·m + c1·g and v ← b2·v + c2·g²; (m/k1)/(√(v/k2) + eps) + λw."""
    scaled = g * scale
    m[...] = b1 * m + c1 * scaled
    v[...] = b2 * v + c2 * (scaled * scaled)
    return (m / k1) / (np.sqrt(v / k2) + eps) + decay * w


def lamb_moments(
    w: Vector,
    g: Vector,
    m: Vector,
    v: Vector,
    out: Vector,
    bounds: npt.NDArray[np.int64],
    decay: Vector,
    *numbers: Any,
) -> Sums:
    """:func:`adam_direction` of every tensor into ``out``; (k, 2) sums of the squares of w and out."""
    sums = np.empty((len(bounds), 2))
    for row, (lo, hi) in enumerate(bounds):
        part = slice(lo, hi)
        out[part] = adam_direction(w[part], g[part], m[part], v[part], decay[row], *numbers)
        sums[row] = sum_of_squares(w[part]), sum_of_squares(out[part])
    return sums


def adam_step(
    w: Vector, g: Vector, m: Vector, v: Vector, bounds: npt.NDArray[np.int64], decay: Vector, *numbers: Any
) -> None:
    """w ← w + :func:`adam_direction` · last, the last of the numbers."""
    for row, (lo, hi) in enumerate(bounds):
        part = slice(lo, hi)
        w[part] += adam_direction(w[part], g[part], m[part], v[part], decay[row], *numbers[:-1]) * numbers[-1]


def scaled(out: Vector, bounds: npt.NDArray[np.int64], factor: Vector, last: Any) -> None:
    """out ← (out·factor)·last, a factor for each tensor."""
    for row, (lo, hi) in enumerate(bounds):
        out[lo:hi] = (out[lo:hi] * factor[row]) * last


def added(w: Vector, out: Vector, bounds: npt.NDArray[np.int64], factor: Vector, last: Any) -> None:
    """w ← w + (out·factor)·last, a factor for each tensor."""
    for row, (lo, hi) in enumerate(bounds):
        w[lo:hi] += (out[lo:hi] * factor[row]) * last
