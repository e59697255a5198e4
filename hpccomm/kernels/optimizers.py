"""The functions of :mod:`hpccomm.kernels.optimizers_reference`, compiled: each vector is read and written once.

A function is compiled for a dtype when it is first asked for and kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from hpccomm.kernels.compiled import jit, kept
from hpccomm.kernels.optimizers_reference import BLOCK, DECAYED, GRADIENT, HIGH, LANES, LOW

# Slices, because LLVM vectorises a loop over a whole array, but not one whose index might be negative


@register_jitable
def copied(x, out):
    for i in range(x.size):
        out[i] = x[i]


@register_jitable
def fold(x, row, lanes):
    """Add the squares of a block, or of what is left of it, to the lanes; ``row`` is room for as many.

    A block should be in the cache: two streams, and stores between them, halve what comes from memory.
    """
    row[:] = 0
    pairs = x.size - x.size % (2 * LANES)
    for lo in range(0, pairs, 2 * LANES):
        one, two = x[lo : lo + LANES], x[lo + LANES : lo + 2 * LANES]
        for i in range(row.size):
            row[i] = (row[i] + one[i] * one[i]) + two[i] * two[i]
    for lo in range(pairs, x.size, LANES):
        part = x[lo : min(lo + LANES, x.size)]
        for i in range(part.size):
            row[i] += part[i] * part[i]
    low, high, sure = row.dtype.type(LOW), row.dtype.type(HIGH), 0
    for i in range(row.size):
        sure += (row[i] >= low) & (row[i] <= high)
    if sure < row.size:
        fold_doubtful(x, row, lanes)
        return
    for i in range(row.size):
        lanes[i] += np.float64(row[i])


@register_jitable
def fold_doubtful(x, row, lanes):
    """The end of :func:`fold` where a sum is too small or too large, or not a number: that is done in float64."""
    for i in range(row.size):
        total = np.float64(row[i])
        if not LOW <= total <= HIGH:
            total = 0.0
            for j in range(i, x.size, LANES):
                total += np.float64(x[j]) * np.float64(x[j])
        lanes[i] += total


@register_jitable
def drained(lanes):
    """The sum of the lanes, folded in halves; they are zero afterwards."""
    n = lanes.size
    while n > 1:
        n //= 2
        low, high = lanes[:n], lanes[n : 2 * n]
        for i in range(low.size):
            low[i] += high[i]
    total = lanes[0]
    lanes[:] = 0
    return total


@register_jitable
def swept(x, here, row, lanes):
    """Σ x²: blocks are brought into the cache one after the other."""
    for lo in range(0, x.size, BLOCK):
        part = x[lo : min(lo + BLOCK, x.size)]
        copied(part, here[: part.size])
        fold(here[: part.size], row, lanes)
    return drained(lanes)


def sum_of_squares(x):
    return swept(x, np.empty(BLOCK, x.dtype), np.empty(LANES, x.dtype), np.zeros(LANES))


@register_jitable
def output(s, moved, mu, nesterov):
    return s + mu * moved if nesterov else moved


def lars_sums(w, g, v, bounds, decay, scale, mu, nesterov, whose):
    sums = np.zeros((bounds.shape[0], 2))
    ours, others = np.zeros(LANES), np.zeros(LANES)
    row, other = np.empty(LANES, w.dtype), np.empty(BLOCK, w.dtype)
    for k in range(bounds.shape[0]):
        if whose == GRADIENT and scale == 1:  # measured: one vector after the other is quicker than both at once
            sums[k, 0] = swept(w[bounds[k, 0] : bounds[k, 1]], other, row, ours)
            sums[k, 1] = swept(g[bounds[k, 0] : bounds[k, 1]], other, row, ours)
            continue
        for lo in range(bounds[k, 0], bounds[k, 1], BLOCK):
            hi = min(lo + BLOCK, bounds[k, 1])
            ww, gg, vv, oo, rate = w[lo:hi], g[lo:hi], v[lo:hi], other[: hi - lo], decay[k]
            if whose == GRADIENT:
                for i in range(oo.size):
                    oo[i] = gg[i] * scale
            elif whose == DECAYED:
                for i in range(oo.size):
                    oo[i] = gg[i] * scale + rate * ww[i]
            else:
                for i in range(oo.size):
                    s = gg[i] * scale + rate * ww[i]
                    oo[i] = output(s, s + mu * vv[i], mu, nesterov)
            fold(ww, row, ours)
            fold(oo, row, others)
        sums[k, 0], sums[k, 1] = drained(ours), drained(others)
    return sums


def lars_step(w, g, v, out, bounds, decay, first, last, scale, second, mu, nesterov):
    for row in range(bounds.shape[0]):
        lo, hi = bounds[row, 0], bounds[row, 1]
        ww, gg, vv, oo = w[lo:hi], g[lo:hi], v[lo:hi], out[lo:hi]
        rate, one, end = decay[row], first[row], last[row]
        for i in range(ww.size):
            s = ((gg[i] * scale + rate * ww[i]) * one) * second
            moved = s + mu * vv[i]
            vv[i] = moved
            oo[i] = output(s, moved, mu, nesterov) * end


def lars_place(w, g, v, bounds, decay, first, last, scale, second, mu, nesterov):
    for row in range(bounds.shape[0]):
        lo, hi = bounds[row, 0], bounds[row, 1]
        ww, gg, vv = w[lo:hi], g[lo:hi], v[lo:hi]
        rate, one, end = decay[row], first[row], last[row]
        for i in range(ww.size):
            s = ((gg[i] * scale + rate * ww[i]) * one) * second
            moved = s + mu * vv[i]
            vv[i] = moved
            ww[i] += output(s, moved, mu, nesterov) * end


@register_jitable
def corrected(x, k, needed):
    """x / k; the loops are compiled twice, as divisions by 1 take as long as others."""
    return x / k if needed else x


def lamb_moments(w, g, m, v, out, bounds, decay, scale, b1, c1, b2, c2, k1, k2, eps):
    sums = np.zeros((bounds.shape[0], 2))
    ours, others, row = np.zeros(LANES), np.zeros(LANES), np.empty(LANES, w.dtype)
    early = (k1 != 1) | (k2 != 1)
    for k in range(bounds.shape[0]):
        rate = decay[k]
        for lo in range(bounds[k, 0], bounds[k, 1], BLOCK):
            hi = min(lo + BLOCK, bounds[k, 1])
            ww, gg, mm, vv, oo = w[lo:hi], g[lo:hi], m[lo:hi], v[lo:hi], out[lo:hi]
            for i in range(ww.size):
                x = gg[i] * scale
                mean, mean_square = b1 * mm[i] + c1 * x, b2 * vv[i] + c2 * (x * x)
                mm[i] = mean
                vv[i] = mean_square
                below = np.sqrt(corrected(mean_square, k2, early)) + eps
                oo[i] = corrected(mean, k1, early) / below + rate * ww[i]
            fold(ww, row, ours)
            fold(oo, row, others)
        sums[k, 0], sums[k, 1] = drained(ours), drained(others)
    return sums


def adam_step(w, g, m, v, bounds, decay, scale, b1, c1, b2, c2, k1, k2, eps, last):
    early = (k1 != 1) | (k2 != 1)
    for row in range(bounds.shape[0]):
        lo, hi, rate = bounds[row, 0], bounds[row, 1], decay[row]
        ww, gg, mm, vv = w[lo:hi], g[lo:hi], m[lo:hi], v[lo:hi]
        for i in range(ww.size):
            x = gg[i] * scale
            mean, mean_square = b1 * mm[i] + c1 * x, b2 * vv[i] + c2 * (x * x)
            mm[i] = mean
            vv[i] = mean_square
            below = np.sqrt(corrected(mean_square, k2, early)) + eps
            ww[i] += (corrected(mean, k1, early) / below + rate * ww[i]) * last


def scaled(out, bounds, factor, last):
    for row in range(bounds.shape[0]):
        oo, each = out[bounds[row, 0] : bounds[row, 1]], factor[row]
        for i in range(oo.size):
            oo[i] = (oo[i] * each) * last


def added(w, out, bounds, factor, last):
    for row in range(bounds.shape[0]):
        ww, oo = w[bounds[row, 0] : bounds[row, 1]], out[bounds[row, 0] : bounds[row, 1]]
        each = factor[row]
        for i in range(ww.size):
            ww[i] += (oo[i] * each) * last


ARGUMENTS = {
    "sum_of_squares": "r",
    "lars_sums": "rrrbrssti",
    "lars_step": "rrwwbrrrssst",
    "lars_place": "wrwbrrrssst",
    "lamb_moments": "rrwwwbrssssssss",
    "adam_step": "wrwwbrsssssssss",
    "scaled": "wbrs",
    "added": "wrbrs",
}
"""What each takes: a vector that is read, one that is written, bounds, a scalar, a truth value, an integer."""


@cache
def compiled(name: str, code: str) -> Callable[..., Any]:
    """One of the functions above for ``"f4"`` or ``"f8"``."""
    function: Any = kept(jit, globals()[name], f"{name}_{code}")
    number = numba.from_dtype(np.dtype(code))
    read = types.Array(number, 1, "C", readonly=True)
    kinds = {
        "r": read,
        "w": types.Array(number, 1, "C"),
        "b": types.Array(types.int64, 2, "C", readonly=True),
        "s": number,
        "t": types.boolean,
        "i": types.int64,
    }
    function.compile(tuple(kinds[letter] for letter in ARGUMENTS[name]))
    function.disable_compile()
    return function  # type: ignore[no-any-return]
