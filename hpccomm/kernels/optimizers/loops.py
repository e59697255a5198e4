"""The functions of :mod:`hpccomm.kernels.optimizers.reference`, compiled: each vector is read and written once.

A function is compiled for a dtype at the first request and cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from hpccomm.kernels.compiler import compile_cached
from hpccomm.kernels.optimizers.reference import BLOCK, DECAYED_GRADIENT, GRADIENT, HIGH, LANES, LOW
from hpccomm.kernels.simd import (
    address_of,
    compiler_fence,
    floats,
    greater_equal,
    load,
    load_doubles,
    lower_half,
    splat,
    store_doubles,
    upper_half,
    zero_doubles,
)

# Loops run over slices: LLVM vectorises a loop over a whole array, but not one whose index might be negative


@register_jitable(forceinline=True)
def fold(x, lo, hi, scratch, lanes):
    """Add the squares of [lo, hi), at most one block, to the lanes; ``scratch`` has room for one block."""
    at, to = address_of(x) + x.itemsize * lo, address_of(lanes)
    if hi - lo < BLOCK:
        at = pad_block(x[lo:hi], scratch)
    if x.itemsize == 8:
        fold_doubles(at, to)
        fold_doubles(at + 4 * LANES, to + 4 * LANES)
    elif not fold_floats(at, to):
        fold_doubtful(at, lanes)


@register_jitable
def pad_block(x, scratch):
    """Copy an incomplete block, padded with zeros; returns the address."""
    for i in range(x.size):
        scratch[i] = x[i]
    scratch[x.size :] = 0
    return address_of(scratch)


@register_jitable
def fold_floats(x, lanes):
    """Add a block of float32, in registers; if a sum is too small, too large or NaN, add nothing and return false."""
    a = b = c = d = e = f = g = h = splat(np.float32(0))
    for row in range(BLOCK // LANES):
        at = x + 4 * LANES * row
        compiler_fence()
        p, q, r, s = load(at), load(at + 64), load(at + 128), load(at + 192)
        t, u, v, w = load(at + 256), load(at + 320), load(at + 384), load(at + 448)
        a, b, c, d = a + p * p, b + q * q, c + r * r, d + s * s
        e, f, g, h = e + t * t, f + u * u, g + v * v, h + w * w
    lower = is_in_range(a) & is_in_range(b) & is_in_range(c) & is_in_range(d)
    if not (lower & is_in_range(e) & is_in_range(f) & is_in_range(g) & is_in_range(h)):
        return False
    for number, each in enumerate((a, b, c, d, e, f, g, h)):
        add_doubles(lanes + 128 * number, lower_half(each))
        add_doubles(lanes + 128 * number + 64, upper_half(each))
    return True


@register_jitable
def is_in_range(sums):
    """Whether sixteen float32 sums of squares are accurate."""
    return greater_equal(sums, splat(np.float32(LOW))) & greater_equal(splat(np.float32(HIGH)), sums) == np.uint64(
        0xFFFF
    )


@register_jitable
def fold_doubles(x, lanes):
    """Add half the lanes of a block of float64."""
    a = b = c = d = e = f = g = h = zero_doubles()
    for row in range(BLOCK // LANES):
        at = x + 8 * LANES * row
        compiler_fence()
        p, q, r, s = load_doubles(at), load_doubles(at + 64), load_doubles(at + 128), load_doubles(at + 192)
        t, u, v, w = load_doubles(at + 256), load_doubles(at + 320), load_doubles(at + 384), load_doubles(at + 448)
        a, b, c, d = a + p * p, b + q * q, c + r * r, d + s * s
        e, f, g, h = e + t * t, f + u * u, g + v * v, h + w * w
    for number, each in enumerate((a, b, c, d, e, f, g, h)):
        add_doubles(lanes + 64 * number, each)


@register_jitable
def add_doubles(to, x):
    """Add eight float64."""
    store_doubles(to, load_doubles(to) + x)


@register_jitable
def fold_doubtful(x, lanes):
    """Add a block of float32 again, with the inaccurate sums in float64."""
    sums, wide = np.zeros(LANES, np.float32), np.zeros(LANES)
    for row in range(BLOCK // LANES):
        a = floats(x + 4 * LANES * row)
        for i in range(sums.size):
            sums[i] += a[i] * a[i]
            wide[i] += np.float64(a[i]) * np.float64(a[i])
    for i in range(sums.size):
        lanes[i] += np.float64(sums[i]) if LOW <= sums[i] <= HIGH else wide[i]


@register_jitable
def drain(lanes):
    """Return the sum of the lanes, folded in halves, and set them to zero."""
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
def fold_all(x, first, stop, scratch, lanes):
    """Add the squares of [first, stop) to the lanes."""
    for lo in range(first, stop, BLOCK):
        fold(x, lo, min(lo + BLOCK, stop), scratch, lanes)


def sum_of_squares(x):
    scratch, lanes = np.empty(BLOCK, x.dtype), np.zeros(LANES)
    fold_all(x, 0, x.size, scratch, lanes)
    return drain(lanes)


@register_jitable
def output(s, velocity, mu, nesterov):
    return s + mu * velocity if nesterov else velocity


def lars_sums(w, g, v, bounds, decay, scale, mu, nesterov, whose):
    sums = np.zeros((bounds.shape[0], 2))
    ours, others = np.zeros(LANES), np.zeros(LANES)
    scratch, other = np.empty(BLOCK, w.dtype), np.empty(BLOCK, w.dtype)
    for k in range(bounds.shape[0]):
        if whose == GRADIENT and scale == 1:
            fold_all(w, bounds[k, 0], bounds[k, 1], scratch, ours)
            fold_all(g, bounds[k, 0], bounds[k, 1], scratch, others)
            sums[k, 0], sums[k, 1] = drain(ours), drain(others)
            continue
        for lo in range(bounds[k, 0], bounds[k, 1], BLOCK):
            hi = min(lo + BLOCK, bounds[k, 1])
            ww, gg, vv, oo, rate = w[lo:hi], g[lo:hi], v[lo:hi], other[: hi - lo], decay[k]
            fold(w, lo, hi, scratch, ours)
            if whose == GRADIENT:
                for i in range(oo.size):
                    oo[i] = gg[i] * scale
            elif whose == DECAYED_GRADIENT:
                for i in range(oo.size):
                    oo[i] = gg[i] * scale + rate * ww[i]
            else:
                for i in range(oo.size):
                    s = gg[i] * scale + rate * ww[i]
                    oo[i] = output(s, s + mu * vv[i], mu, nesterov)
            fold(other, 0, hi - lo, scratch, others)
        sums[k, 0], sums[k, 1] = drain(ours), drain(others)
    return sums


def lars_step(w, g, v, out, bounds, decay, first, last, scale, second, mu, nesterov):
    for row in range(bounds.shape[0]):
        lo, hi = bounds[row, 0], bounds[row, 1]
        ww, gg, vv, oo = w[lo:hi], g[lo:hi], v[lo:hi], out[lo:hi]
        rate, one, end = decay[row], first[row], last[row]
        for i in range(ww.size):
            s = ((gg[i] * scale + rate * ww[i]) * one) * second
            velocity = s + mu * vv[i]
            vv[i] = velocity
            oo[i] = output(s, velocity, mu, nesterov) * end


def lars_apply(w, g, v, bounds, decay, first, last, scale, second, mu, nesterov):
    for row in range(bounds.shape[0]):
        lo, hi = bounds[row, 0], bounds[row, 1]
        ww, gg, vv = w[lo:hi], g[lo:hi], v[lo:hi]
        rate, one, end = decay[row], first[row], last[row]
        for i in range(ww.size):
            s = ((gg[i] * scale + rate * ww[i]) * one) * second
            velocity = s + mu * vv[i]
            vv[i] = velocity
            ww[i] += output(s, velocity, mu, nesterov) * end


@register_jitable
def correct_bias(x, k, needed):
    """x / k; the loops are compiled with and without the division, because dividing by 1 takes as long as by others."""
    return x / k if needed else x


def lamb_moments(w, g, m, v, out, bounds, decay, scale, b1, c1, b2, c2, k1, k2, eps):
    sums = np.zeros((bounds.shape[0], 2))
    ours, others, scratch = np.zeros(LANES), np.zeros(LANES), np.empty(BLOCK, w.dtype)
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
                below = np.sqrt(correct_bias(mean_square, k2, early)) + eps
                oo[i] = correct_bias(mean, k1, early) / below + rate * ww[i]
            fold(w, lo, hi, scratch, ours)
            fold(out, lo, hi, scratch, others)
        sums[k, 0], sums[k, 1] = drain(ours), drain(others)
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
            below = np.sqrt(correct_bias(mean_square, k2, early)) + eps
            ww[i] += (correct_bias(mean, k1, early) / below + rate * ww[i]) * last


def scale_tensors(out, bounds, factor, last):
    for row in range(bounds.shape[0]):
        oo, each = out[bounds[row, 0] : bounds[row, 1]], factor[row]
        for i in range(oo.size):
            oo[i] = (oo[i] * each) * last


def add_scaled(w, out, bounds, factor, last):
    for row in range(bounds.shape[0]):
        ww, oo = w[bounds[row, 0] : bounds[row, 1]], out[bounds[row, 0] : bounds[row, 1]]
        each = factor[row]
        for i in range(ww.size):
            ww[i] += (oo[i] * each) * last


ARGUMENTS = {
    "sum_of_squares": "r",
    "lars_sums": "rrrbrssti",
    "lars_step": "rrwwbrrrssst",
    "lars_apply": "wrwbrrrssst",
    "lamb_moments": "rrwwwbrssssssss",
    "adam_step": "wrwwbrsssssssss",
    "scale_tensors": "wbrs",
    "add_scaled": "wrbrs",
}
"""Argument types of each: r a vector to read, w one to write, b bounds, s a scalar, t a boolean, i an integer."""


@cache
def compile_kernel(name: str, code: str) -> Callable[..., Any]:
    """One of the functions above for ``"f4"`` or ``"f8"``."""
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
    signature = tuple(kinds[letter] for letter in ARGUMENTS[name])
    return compile_cached(globals()[name], f"{name}_{code}", signature)  # type: ignore[no-any-return]
