"""The hot loops of :mod:`hpccomm.kernels.signs.compiled`."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from hpccomm.kernels.compiler import loop
from hpccomm.kernels.simd import (
    LANES,
    address_of,
    choose,
    compiler_fence,
    copy_reversed,
    doubles,
    floats,
    greater_equal,
    hold,
    load,
    load_mask,
    longs,
    lower_half,
    magnitude,
    octets,
    popcount,
    splat,
    store,
    store_bits,
    upper_half,
    zero_doubles,
)
from hpccomm.kernels.vectors.loops import GROUP, advance, pad_tail, round_down, sum_at, sum_from, sum_lanes

F32, U64 = np.float32, np.uint64

LINE = 512
"""Elements of 64 bytes of bits."""


# Sums


@register_jitable
def four_lines(x, y):
    """Four lines of residual + gradient, one after the other."""
    compiler_fence()
    return sum_from(x, y, 0), sum_from(x, y, 16), sum_from(x, y, 32), sum_from(x, y, 48)


@register_jitable
def four_columns(x, y):
    """Four rows of 64 elements, read in the order of memory: the four lines of each column."""
    a, b = four_lines(x, y), four_lines(x + 256, advance(y, 64))
    c, d = four_lines(x + 512, advance(y, 128)), four_lines(x + 768, advance(y, 192))
    return (a[0], b[0], c[0], d[0]), (a[1], b[1], c[1], d[1]), (a[2], b[2], c[2], d[2]), (a[3], b[3], c[3], d[3])


@register_jitable
def four_magnitudes(a, b, c, d):
    """(a + b) + (c + d)."""
    return (magnitude(a) + magnitude(b)) + (magnitude(c) + magnitude(d))


@loop("float64(int64, int64, int64)")
def sum_magnitudes(residual, gradient, n):
    tail = np.empty(4 * GROUP, np.float32)
    a = b = c = d = e = f = g = h = zero_doubles()
    for i in range(0, n, 4 * GROUP):
        x, y = residual + 4 * i, advance(gradient, i)
        if i + 4 * GROUP > n:
            x, y = pad_tail(residual, gradient, i, n, tail), 0
        first, second, third, fourth = four_columns(x, y)
        p, q = four_magnitudes(*first), four_magnitudes(*second)
        r, s = four_magnitudes(*third), four_magnitudes(*fourth)
        a, b, c, d = a + lower_half(p), b + upper_half(p), c + lower_half(q), d + upper_half(q)
        e, f, g, h = e + lower_half(r), f + upper_half(r), g + lower_half(s), h + upper_half(s)
    return sum_lanes(a, b, c, d, e, f, g, h)


@register_jitable
def four_by_sign(a, b, c, d):
    """(a + b) + (c + d) of the elements ≥ 0 and of all others; and the number of elements ≥ 0."""
    zero = splat(F32(0))
    ma, mb, mc, md = greater_equal(a, zero), greater_equal(b, zero), greater_equal(c, zero), greater_equal(d, zero)
    plus = (choose(ma, a, zero) + choose(mb, b, zero)) + (choose(mc, c, zero) + choose(md, d, zero))
    minus = (choose(ma, zero, a) + choose(mb, zero, b)) + (choose(mc, zero, c) + choose(md, zero, d))
    return plus, minus, popcount(ma | mb << U64(16) | mc << U64(32) | md << U64(48))


@loop("int64(int64, int64, int64, int64)")
def sum_by_sign(residual, gradient, sums, n):
    tail = np.empty(4 * GROUP, np.float32)
    count = 0
    a = b = c = d = e = f = g = h = zero_doubles()
    k = l = m = o = t = u = v = w = zero_doubles()  # noqa: E741
    for i in range(0, n, 4 * GROUP):
        x, y = residual + 4 * i, advance(gradient, i)
        if i + 4 * GROUP > n:
            x, y = pad_tail(residual, gradient, i, n, tail), 0
            count -= i + 4 * GROUP - n
        first, second, third, fourth = four_columns(x, y)
        (pp, pm, pn), (qp, qm, qn) = four_by_sign(*first), four_by_sign(*second)
        (rp, rm, rn), (sp, sm, sn) = four_by_sign(*third), four_by_sign(*fourth)
        count += pn + qn + rn + sn
        a, b, c, d = a + lower_half(pp), b + upper_half(pp), c + lower_half(qp), d + upper_half(qp)
        e, f, g, h = e + lower_half(rp), f + upper_half(rp), g + lower_half(sp), h + upper_half(sp)
        k, l, m, o = k + lower_half(pm), l + upper_half(pm), m + lower_half(qm), o + upper_half(qm)  # noqa: E741
        t, u, v, w = t + lower_half(rm), u + upper_half(rm), v + lower_half(sm), w + upper_half(sm)
    doubles(sums)[0], doubles(sums)[1] = sum_lanes(a, b, c, d, e, f, g, h), sum_lanes(k, l, m, o, t, u, v, w)
    return count


# Bits


@register_jitable
def set_bit(to, i, yes):
    """Set bit i of bytes that were 0 at first."""
    if i % 8 == 0:
        to[i // 8] = 0
    if yes:
        to[i // 8] |= np.uint8(128 >> (i % 8))


@loop("void(int64, int64, int64)")
def pack_signs(x, to, n):
    end = round_down(n)
    zero = splat(F32(0))
    for i in range(0, end, GROUP):
        mask = U64(0)
        for j in range(0, GROUP, 16):
            mask |= greater_equal(load(x + 4 * (i + j)), zero) << U64(j)
        store_bits(to + i // 8, mask)
    for i in range(end, n):
        set_bit(octets(to), i, floats(x)[i] >= 0)


@loop("void(int64, int64, int64, float32, float32, int64, int64)")
def pack_signs_feedback(residual, gradient, out, plus, minus, to, n):
    end = round_down(n)
    zero, high, low = splat(F32(0)), splat(plus), splat(minus)
    for i in range(0, end, GROUP):
        mask = U64(0)
        for j in range(0, GROUP, LANES):
            p = sum_from(residual, gradient, i + j)
            above = greater_equal(p, zero)
            mask |= above << U64(j)
            store(out + 4 * (i + j), p - choose(above, high, low))
        store_bits(to + i // 8, mask)
    for i in range(end, n):
        p = sum_at(residual, gradient, i)
        set_bit(octets(to), i, p >= 0)
        floats(out)[i] = p - (plus if p >= 0 else minus)


@loop("void(int64, int64, int64, int64, int64, int64, int64)")
def add_signs(addresses, plus, minus, k, fresh, out, n):
    nothing = splat(F32(0))
    turned = np.empty(64 * k, np.uint8)
    masks = address_of(turned)
    end = n - n % LINE
    for begin in range(0, end, LINE):
        for j in range(k):
            copy_reversed(longs(addresses)[j] + begin // 8, masks + 64 * j)
        for part in range(0, LINE, 128):
            at = out + 4 * (begin + part)
            a = b = c = d = e = f = g = h = nothing
            if not fresh:
                a, b, c, d = load(at), load(at + 64), load(at + 128), load(at + 192)
                e, f, g, h = load(at + 256), load(at + 320), load(at + 384), load(at + 448)
            for j in range(k):
                mask = masks + 64 * j + part // 8
                high, low = splat(floats(plus)[j]), splat(floats(minus)[j])
                a = a + choose(load_mask(mask), high, low)
                b = b + choose(load_mask(mask + 2), high, low)
                c = c + choose(load_mask(mask + 4), high, low)
                d = d + choose(load_mask(mask + 6), high, low)
                e = e + choose(load_mask(mask + 8), high, low)
                f = f + choose(load_mask(mask + 10), high, low)
                g = g + choose(load_mask(mask + 12), high, low)
                h = h + choose(load_mask(mask + 14), high, low)
            store(at, a)
            store(at + 64, b)
            store(at + 128, c)
            store(at + 192, d)
            store(at + 256, e)
            store(at + 320, f)
            store(at + 384, g)
            store(at + 448, h)
    hold(turned)
    for i in range(end, n):
        total = F32(0) if fresh else floats(out)[i]
        for j in range(k):
            yes = octets(longs(addresses)[j])[i // 8] >> (7 - i % 8) & 1
            total += floats(plus)[j] if yes else floats(minus)[j]
        floats(out)[i] = total


@loop("void(int64, int64, int64, int64)")
def majority(addresses, k, to, nbytes):
    for i in range(nbytes):
        result = 0
        for bit in range(8):
            votes = 0
            for j in range(k):
                votes += octets(longs(addresses)[j])[i] >> bit & 1
            result |= (1 if 2 * votes >= k else 0) << bit
        octets(to)[i] = result
