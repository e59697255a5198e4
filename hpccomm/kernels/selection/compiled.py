"""The functions of :mod:`hpccomm.kernels.selection.reference` compiled: same arguments, same bits, one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.compiler import address_of, call
from hpccomm.kernels.selection import loops, reference


def collect(
    loop: Callable[..., Any], arguments: Sequence[Any], n: int, *dtypes: npt.DTypeLike
) -> tuple[list[npt.NDArray[Any]], bool]:
    """The results of a selecting loop, one array for each dtype, and whether all elements were finite."""
    buffers = [np.empty(loops.CAPACITY, dtype) for dtype in dtypes]
    state = np.zeros(2, np.int64)
    chunks: list[list[npt.NDArray[Any]]] = []
    while not chunks or state[0] < n:
        count = call(loop, *arguments, *buffers, n, state)
        chunks.append([buffer[:count].copy() for buffer in buffers])
    whole = chunks[0] if len(chunks) == 1 else [np.concatenate(each) for each in zip(*chunks, strict=True)]
    return whole, not state[1]


def threshold_words(residual, gradient, out, tau):
    (words,), finite = collect(loops.threshold_words, (residual, gradient, out, tau), residual.size, np.uint32)
    return words, finite


def add_words(words, tau, out):
    call(loops.add_words, words, words.size, tau, out)


def kth_magnitude(values, rank):
    values = np.ascontiguousarray(values)
    return call(loops.kth_magnitude, values, values.size, rank)


density_threshold = partial(reference.density_threshold, ranked=kth_magnitude)
keep_largest = partial(reference.keep_largest, ranked=kth_magnitude)


def sample(x, plan):
    found = np.empty(plan.lines * reference.LINE, np.float32)
    call(loops.sample, address_of(x) + plan.start * x.itemsize, plan.stride, plan.lines, found)
    return found


def select_threshold(x, threshold):
    (index,), finite = collect(loops.select_threshold, (x, threshold), x.size, np.uint32)
    return index, finite


def select_largest(x, k, step=0, least=1.0):
    plan = reference.sample_plan(x.size, k, step)
    threshold = 0.0 if plan is None else kth_magnitude(sample(x, plan), plan.rank)
    index, finite = select_threshold(x, threshold)
    if not finite:
        return index[:0], False
    index = reference.widen_selection(x, index, threshold, least * k, select_threshold)
    if index.size > k:
        call(loops.keep_largest_at, x, index, index.size, k)
    return index[:k], True


def momentum_select(gradient, momentum, velocity, m, k, *, nesterov=False, mask=True, step=0, least=1.0):
    """In one pass, unless the threshold was too high."""
    vectors = gradient, momentum, velocity
    threshold = estimate_velocity_threshold(vectors, m, k, nesterov, step)
    kinds = np.uint32, np.float32, np.float32
    arguments = *vectors, m, threshold, nesterov, mask
    (index, values, kept), finite = collect(loops.momentum_select, arguments, gradient.size, *kinds)
    if not finite:
        return index[:0], values[:0], False
    if index.size < least * k and threshold > 0:
        velocity[index], momentum[index] = values, kept
        index = reference.widen_selection(velocity, index, threshold, least * k, select_threshold)
        index = index[keep_largest(velocity[index], k)]
        return index, reference.take(index, momentum, velocity, mask), True
    if index.size > k:
        call(loops.keep_largest_taken, index, values, kept, index.size, k, momentum, velocity)
    return index[:k], values[:k], True


def estimate_velocity_threshold(vectors, m, k, nesterov, step):
    """:func:`reference.estimate_threshold` of the next velocity; the vectors are gradient, momentum and velocity."""
    plan = reference.sample_plan(vectors[0].size, k, step)
    if plan is None:
        return 0.0
    v = np.empty(plan.lines * reference.LINE, np.float32)
    starts = [address_of(each) + plan.start * each.itemsize for each in vectors]
    call(loops.sample_velocity, *starts, m, nesterov, plan.stride, plan.lines, v)
    return kth_magnitude(v, plan.rank)


def scatter_add(messages, out):
    for index, values in messages:
        call(loops.scatter_add, index, values, index.size, out)
