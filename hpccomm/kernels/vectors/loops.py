"""The hot loops of :mod:`hpccomm.kernels.vectors.compiled`, and the functions that the loops of other families share.

Arguments of loops are addresses, lengths and numbers; address 0 means no vector.  Most loops process 64 elements at a
time: four SIMD vectors, and a mask of 64 bits for the comparison.  A pass then costs no more than its memory traffic
while few elements are selected.
"""

from __future__ import annotations

import numpy as np
from numba import carray
from numba.extending import register_jitable

from hpccomm.kernels.compiler import loop
from hpccomm.kernels.intrinsics import bits, float_of
from hpccomm.kernels.simd import (
    add_square,
    address_of,
    choose,
    doubles,
    floats,
    greater_equal,
    load,
    lower_half,
    reduce_add,
    splat,
    upper_half,
    zero_doubles,
)

F32, F64, U32, U64, I64 = np.float32, np.float64, np.uint32, np.uint64, np.int64

GROUP = 64
"""Elements of one mask."""

CHECK_INTERVAL = 1 << 13
"""Elements between two checks that all were finite."""

INFINITY = F32(np.inf)


# Elements


@register_jitable
def round_down(n):
    """The elements of all whole groups."""
    return n - n % GROUP


@register_jitable
def sum_at(a, b, i):
    """Element i of a + b, or of a if there is no b."""
    return floats(a)[i] + floats(b)[i] if b else floats(a)[i]


@register_jitable
def sum_from(a, b, i):
    """Sixteen elements of a + b, or of a if there is no b."""
    return load(a + 4 * i) + load(b + 4 * i) if b else load(a + 4 * i)


@register_jitable
def advance(address, elements):
    """Advance an address by a number of elements; 0 stays 0."""
    return address + 4 * elements if address else 0


@register_jitable
def is_finite(x):
    return abs(x) < INFINITY


@register_jitable
def zero_or_nan(x):
    """0 in each lane, NaN in lanes of a NaN or an infinity."""
    return x - x


@register_jitable
def minimum(a, b):
    return choose(greater_equal(b, a), a, b)


@register_jitable
def maximum(a, b):
    return choose(greater_equal(a, b), a, b)


@loop("int64(int64, int64)")
def all_finite(x, n):
    end = round_down(n)
    zero = splat(F32(0))
    for begin in range(0, end, CHECK_INTERVAL):
        a = b = c = d = zero
        for i in range(begin, min(end, begin + CHECK_INTERVAL), GROUP):
            at = x + 4 * i
            a, b = a + zero_or_nan(load(at)), b + zero_or_nan(load(at + 64))
            c, d = c + zero_or_nan(load(at + 128)), d + zero_or_nan(load(at + 192))
        if greater_equal((a + b) + (c + d), zero) != U64(0xFFFF):
            return 0
    for i in range(end, n):
        if not is_finite(floats(x)[i]):
            return 0
    return 1


@loop("float64(int64, int64)")
def largest_magnitude(x, n):
    a = carray(floats(x), n)
    top = U32(0)
    for i in range(n):
        top = max(top, U32(bits(a[i]) & U32(0x7FFFFFFF)))
    return F64(float_of(top))


# Sums: 64 lanes of float64 in eight vectors


@register_jitable
def sum_lanes(a, b, c, d, e, f, g, h):
    """The sum of all lanes, by halves."""
    return reduce_add(((a + e) + (c + g)) + ((b + f) + (d + h)))


@register_jitable
def pad_tail(residual, gradient, begin, n, to):
    """Copy the last, incomplete block of residual + gradient, padded with zeros; returns its address."""
    for j in range(to.size):
        to[j] = sum_at(residual, gradient, begin + j) if begin + j < n else F32(0)
    return address_of(to)


@register_jitable
def sums_of(x, n, tail):
    """Σ x and Σ x²."""
    a = b = c = d = e = f = g = h = zero_doubles()
    k = l = m = o = t = u = v = w = zero_doubles()  # noqa: E741
    for i in range(0, n, GROUP):
        at = x + 4 * i
        if i + GROUP > n:
            at = pad_tail(x, 0, i, n, tail)
        p, q, r, s = load(at), load(at + 64), load(at + 128), load(at + 192)
        pl, pu, ql, qu = lower_half(p), upper_half(p), lower_half(q), upper_half(q)
        rl, ru, sl, su = lower_half(r), upper_half(r), lower_half(s), upper_half(s)
        a, b, c, d, e, f, g, h = a + pl, b + pu, c + ql, d + qu, e + rl, f + ru, g + sl, h + su
        k, l, m, o = add_square(k, pl), add_square(l, pu), add_square(m, ql), add_square(o, qu)  # noqa: E741
        t, u, v, w = add_square(t, rl), add_square(u, ru), add_square(v, sl), add_square(w, su)
    return sum_lanes(a, b, c, d, e, f, g, h), sum_lanes(k, l, m, o, t, u, v, w)


@loop("void(int64, int64, int64)")
def moments(x, sums, n):
    doubles(sums)[0], doubles(sums)[1] = sums_of(x, n, np.empty(GROUP, np.float32))
