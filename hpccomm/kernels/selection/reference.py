"""Selected elements of a vector in NumPy, which defines every bit: by a threshold, the k largest, or at random.

*n elements, i their index.*  Of equal magnitudes the lower index ranks first; indices are ascending.  A word is a
uint32 ``2i + s``, s = 1 for minus (Strom, Interspeech 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.vectors.reference import (
    F32,
    Indices,
    Vector,
    all_finite,
    backlog_of,
    uniforms,
)

LINE = 16
"""Elements sampled together: one cache line."""


# Threshold: one quantum an element (GTC)


def threshold_words(residual: Vector, gradient: Vector | None, out: Vector, tau: float) -> tuple[Indices, bool]:
    """Words of the elements with \\|p\\| ≥ τ of p = residual + gradient; ``out`` gets p minus the decoded words.

    One quantum an element, whatever its size (Strom 2015).  ``out`` may be ``residual``.  Also returns whether p was
    finite.
    """
    with np.errstate(all="ignore"):
        p = backlog_of(residual, gradient)
        finite = all_finite(p)
        plus, minus = p >= F32(tau), p <= -F32(tau)
        rest = np.where(plus, p - F32(tau), np.where(minus, p + F32(tau), p))
    index = np.flatnonzero(plus | minus)
    words = (index << 1 | minus[index]).astype("u4")
    out[...] = rest
    return words, finite


def add_words(words: Indices, tau: float, out: Vector) -> None:
    """Add the decoded words."""
    out[words >> 1] += np.where(words & 1, -F32(tau), F32(tau))


# The k largest


class SamplePlan(NamedTuple):
    """The elements that estimate a threshold: ``lines`` runs of ``LINE`` elements, ``stride`` apart."""

    start: int
    stride: int
    lines: int
    rank: int
    """The threshold is the magnitude of this rank in the sample, counted from 1."""


def sample_plan(n: int, k: int, step: int) -> SamplePlan | None:
    """About 0.25 % of the elements, at least 2^14; None if the whole vector is as quick (n < 2^16 or k > n/8).

    The rank is three standard deviations above the expected number, as if the sampled elements were independent, so
    that very probably more than k elements reach the threshold.  ``step`` moves the start.
    """
    if n < 1 << 16 or k > n // 8:
        return None
    lines = max(1 << 10, n // (400 * LINE))
    stride = n // lines
    expected = k * lines * LINE / n
    rank = math.ceil(expected + 3 * math.sqrt(expected) + 3)
    return SamplePlan(step * 7919 % (stride - LINE + 1), stride, lines, rank)


def sample(x: npt.NDArray[Any], plan: SamplePlan) -> npt.NDArray[Any]:
    """The sampled elements of a vector, in order."""
    runs = np.lib.stride_tricks.as_strided(
        x[plan.start :], (plan.lines, LINE), (plan.stride * x.itemsize, x.itemsize), writeable=False
    )
    return runs.reshape(-1)


def kth_magnitude(values: Vector, rank: int) -> float:
    """The magnitude of this rank; the largest has rank 1."""
    magnitudes = np.abs(values)
    return float(np.partition(magnitudes, values.size - rank)[values.size - rank])


KthMagnitude = Callable[[Vector, int], float]

Select = Callable[[Vector, float], tuple[Indices, bool]]


def estimate_threshold(x: Vector, k: int, step: int) -> float:
    """A threshold that very probably more than k elements reach; 0 where sampling does not pay."""
    plan = sample_plan(x.size, k, step)
    return 0.0 if plan is None else kth_magnitude(sample(x, plan), plan.rank)


def select_threshold(x: Vector, threshold: float) -> tuple[Indices, bool]:
    """Indices of the elements other than 0 with \\|x\\| ≥ threshold, and whether all elements are finite."""
    magnitude = np.abs(x)
    index = np.flatnonzero((magnitude >= F32(threshold)) & (magnitude > 0)).astype("u4")
    return index, all_finite(x)


def keep_largest(values: Vector, k: int, ranked: KthMagnitude = kth_magnitude) -> npt.NDArray[np.bool_]:
    """The mask of the k largest values in magnitude; of equal ones the first."""
    if values.size <= k:
        return np.ones(values.size, bool)
    magnitudes = np.abs(values)
    least = F32(ranked(values, k)) if k else F32(np.inf)
    kept = magnitudes > least
    kept[np.flatnonzero(magnitudes == least)[: k - int(np.count_nonzero(kept))]] = True
    return kept


def select_largest(x: Vector, k: int, step: int = 0, least: float = 1.0) -> tuple[Indices, bool]:
    """Indices of the k largest magnitudes other than 0, by a sampled threshold; fewer if fewer are not 0.

    A threshold that fewer than ``least * k`` elements reach is halved, up to four times, then set to 0.  The result is
    exact with ``least`` 1; with less it may be the largest ``least * k`` elements or a few more.  Also returns whether
    all elements are finite; if not, no index is returned.
    """
    threshold = estimate_threshold(x, k, step)
    index, finite = select_threshold(x, threshold)
    index = widen_selection(x, index, threshold, least * k) if finite else index[:0]
    return index[keep_largest(x[index], k)], finite


def widen_selection(
    x: Vector, index: Indices, threshold: float, enough: float, select: Select = select_threshold
) -> Indices:
    """Select by the largest of threshold, threshold/2, threshold/4, …, 0 that ``enough`` elements reach."""
    for divisor in (2, 4, 8, 16, 0):
        if index.size >= enough or not threshold:
            break
        index, _ = select(x, threshold / divisor if divisor else 0.0)
    return index


def accumulate(gradient: Vector, momentum: Vector, velocity: Vector, m: float, nesterov: bool) -> None:
    """u ← m·u + g, v ← v + u; with ``nesterov`` u ← m·(u + g), v ← (v + u) + g.  ``momentum`` is u, ``velocity`` v."""
    with np.errstate(all="ignore"):
        if nesterov:
            momentum += gradient
            momentum *= F32(m)
            velocity += momentum
            velocity += gradient
        else:
            momentum *= F32(m)
            momentum += gradient
            velocity += momentum


def momentum_select(
    gradient: Vector,
    momentum: Vector,
    velocity: Vector,
    m: float,
    k: int,
    *,
    nesterov: bool = False,
    mask: bool = True,
    step: int = 0,
    least: float = 1.0,
) -> tuple[Indices, Vector, bool]:
    """DGC's local step (Lin et al., ICLR 2018, algorithm 1 with momentum correction and factor masking).

    After :func:`accumulate` the k largest of v are selected as by :func:`select_largest`: their indices and values are
    returned, v becomes 0 there and with ``mask`` u too.  Also returns whether v was finite.
    """
    accumulate(gradient, momentum, velocity, m, nesterov)
    index, finite = select_largest(velocity, k, step, least)
    return index, take(index, momentum, velocity, mask), finite


def take(index: Indices, momentum: Vector, velocity: Vector, mask: bool) -> Vector:
    """Return the velocity at ``index`` and set it to 0 there, with ``mask`` the momentum too."""
    values = velocity[index]
    velocity[index] = 0
    if mask:
        momentum[index] = 0
    return values


def density_threshold(
    residual: Vector,
    gradient: Vector | None,
    density: float,
    step: int,
    ranked: KthMagnitude = kth_magnitude,
    sampled: Callable[[Vector, SamplePlan], Vector] = sample,
) -> float:
    """The magnitude that about ``density`` of the elements of residual + gradient reach; 0 if all are 0.

    Where most of the elements that are not 0 would reach it, it is at least their mean: fewer are sent, each in a
    quantum of their size.  Of a large vector about 0.25 % is sampled, at least 2^14 elements.
    """
    n = residual.size
    plan = sample_plan(n, max(1, math.ceil(density * n)), step)
    whole = residual, gradient
    if plan is not None:
        residual, gradient = sampled(residual, plan), None if gradient is None else sampled(gradient, plan)
    p = backlog_of(residual, gradient)
    if not (p != 0).any():
        p = backlog_of(*whole)
    k, nonzero = max(1, math.ceil(density * p.size)), int((p != 0).sum())
    if not nonzero:
        return 0.0
    found = ranked(p, k)
    if MOST * k <= nonzero:
        return found
    return max(found, float(np.float32(float(abs(p).sum(dtype="f8")) / nonzero)))


MOST = 4 / 3
"""A threshold that more than the inverse of this of all non-zero elements reach says nothing of their size."""


# Indices


def cell_indices(n: int, k: int, key: int) -> Indices:
    """k of n indices at random: one in each of k cells of almost equal length."""
    begin = np.arange(k + 1, dtype="u8") * np.uint64(n) // np.uint64(max(k, 1))
    within = (uniforms(key, k) * F32(2.0**24)).astype("u8") * np.diff(begin) >> np.uint64(24)
    return (begin[:-1] + within).astype("u4")


def scatter_add(messages: Sequence[tuple[Indices, Vector]], out: Vector) -> None:
    """Add sparse vectors one after the other; the indices of each are distinct."""
    for index, values in messages:
        out[index] += values
