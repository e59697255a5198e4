"""The hot loops of :mod:`hpccomm.kernels.quantized.compiled`."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from hpccomm.kernels.compiler import loop
from hpccomm.kernels.intrinsics import bits, element, float_of, set_element
from hpccomm.kernels.quantized.reference import LEAST_NORM
from hpccomm.kernels.reductions.loops import STORAGE
from hpccomm.kernels.simd import (
    LANES,
    address_of,
    floats,
    fma,
    greatest_word,
    halves,
    hold,
    keep_words,
    lane_numbers,
    least_word,
    less,
    lesser,
    load,
    magnitude,
    negate_like,
    octets,
    one_below,
    reduce_greatest,
    rint,
    round_nearest,
    round_up,
    shift_left,
    shift_right,
    signed_octets,
    splat,
    splat_word,
    store,
    store_octets,
    store_pairs,
    to_floats,
    words_of,
)
from hpccomm.kernels.vectors.loops import (
    GROUP,
    advance,
    maximum,
    minimum,
    pad_tail,
    round_down,
    sum_at,
    sum_from,
    sums_of,
)

F32, F64, U32 = np.float32, np.float64, np.uint32

_half_read, _half_write = STORAGE["f2"][1:]

_bfloat16_read, _bfloat16_write = STORAGE["bf16"][1:]


# Narrow elements


@register_jitable
def saturate(word, infinity):
    """Replace infinity by the largest finite value."""
    magnitude = np.uint16(word & np.uint16(0x7FFF))
    return np.uint16(word - np.uint16(1)) if magnitude == infinity else np.uint16(word)


@loop("void(int64, int64, int64, int64)")
def to_half(x, finite, to, n):
    a, b = floats(x), halves(to)
    if finite:
        for i in range(n):
            set_element(b, i, saturate(np.uint16(_half_write(element(a, i))), np.uint16(0x7C00)))
        return
    for i in range(n):
        set_element(b, i, np.uint16(_half_write(element(a, i))))


@loop("void(int64, int64, int64, int64)")
def to_bfloat16(x, finite, to, n):
    a, b = floats(x), halves(to)
    if finite:
        for i in range(n):
            set_element(b, i, saturate(np.uint16(_bfloat16_write(element(a, i))), np.uint16(0x7F80)))
        return
    for i in range(n):
        set_element(b, i, np.uint16(_bfloat16_write(element(a, i))))


@loop("void(int64, int64, int64)")
def add_half(x, out, n):
    a, b = halves(x), floats(out)
    for i in range(n):
        set_element(b, i, b[i] + _half_read(element(a, i)))


@loop("void(int64, int64, int64)")
def add_bfloat16(x, out, n):
    a, b = halves(x), floats(out)
    for i in range(n):
        set_element(b, i, b[i] + _bfloat16_read(element(a, i)))


@loop("void(int64, float32, int64, int64)")
def to_int8(x, unit, to, n):
    """Quotients with the rounding of a division, but without its cost, which exceeds all the rest.

    1/unit in two terms gives a quotient next to the true one, and with its exact remainder (Markstein, IBM Journal of
    Research and Development 34, 1990) the true one rounded; where neither can over- or underflow.
    """
    a, b = floats(x), signed_octets(to)
    if not F32(2.0**-60) <= unit <= F32(2.0**60):
        for i in range(n):
            set_element(b, i, np.int8(np.int32(max(F32(-127), min(F32(127), rint(element(a, i) / unit))))))
        return
    inverse, most = F32(1) / unit, F32(127) * unit
    rest = fma(-inverse, unit, F32(1)) * inverse
    for i in range(n):
        value = max(-most, min(most, element(a, i)))
        quotient = fma(value, inverse, value * rest)
        exact = fma(fma(-quotient, unit, value), inverse, quotient)
        set_element(b, i, np.int8(np.int32(rint(exact))))


@loop("void(int64, float32, int64, int64)")
def add_int8(codes, unit, out, n):
    a, b = signed_octets(codes), floats(out)
    for i in range(n):
        set_element(b, i, b[i] + F32(element(a, i)) * unit)


@loop("void(int64, int64, int64)")
def extremes(x, found, n):
    low = high = floats(x)[0]
    end = round_down(n)
    if end:
        a = b = c = d = e = f = g = h = splat(low)
        for i in range(0, end, GROUP):
            at = x + 4 * i
            p, q, r, s = load(at), load(at + 64), load(at + 128), load(at + 192)
            a, b, c, d = minimum(a, p), minimum(b, q), minimum(c, r), minimum(d, s)
            e, f, g, h = maximum(e, p), maximum(f, q), maximum(g, r), maximum(h, s)
        least, most = minimum(minimum(a, b), minimum(c, d)), maximum(maximum(e, f), maximum(g, h))
        lanes = np.empty(32, np.float32)
        store(address_of(lanes), least)
        store(address_of(lanes) + 64, most)
        low, high = lanes[:16].min(), lanes[16:].max()
    for i in range(end, n):
        low, high = min(low, floats(x)[i]), max(high, floats(x)[i])
    floats(found)[0], floats(found)[1] = low, high


@loop("void(int64, float32, float32, int64, int64)")
def range_codes(x, scale, most, to, n):
    a, b = floats(x), octets(to)
    least = most - F32(255)
    for i in range(n):
        code = min(rint(element(a, i) * scale), most) - least
        set_element(b, i, np.uint8(np.int32(max(F32(0), min(F32(255), code)))))


@loop("void(int64, float64, float64, int64, int64)")
def add_range(codes, scale, least, out, n):
    a, b = octets(codes), floats(out)
    for i in range(n):
        set_element(b, i, b[i] + F32((F64(element(a, i)) + least) / scale))


# Blocks with a scale


@register_jitable
def peak_bits(x, residual, n):
    """The bits of the largest magnitude; at least those of infinity where an element is not finite."""
    end, lanes = n - n % LANES, splat_word(U32(0))
    for i in range(0, end, LANES):
        lanes = greatest_word(lanes, words_of(magnitude(sum_from(x, residual, i))))
    top = reduce_greatest(lanes)
    for i in range(end, n):
        top = max(top, U32(bits(sum_at(x, residual, i)) & U32(0x7FFFFFFF)))
    return top


@register_jitable
def code_block(x, residual, scale, top, codes, lost, n):
    """The codes of a block, and what they lose."""
    end, least, divisor = n - n % LANES, splat(-top), splat(scale if scale > 0 else F32(1))
    for i in range(0, end, LANES):
        value = sum_from(x, residual, i)
        code = round_nearest(maximum(minimum(value / divisor, splat(top)), least))
        store_octets(codes + i, code)
        if lost:
            store(lost + 4 * i, value - to_floats(code) * splat(scale))
    for i in range(end, n):
        value = sum_at(x, residual, i)
        whole = np.int32(rint(max(-top, min(top, value / (scale if scale > 0 else F32(1))))))
        signed_octets(codes)[i] = np.int8(whole)
        if lost:
            floats(lost)[i] = value - F32(whole) * scale


@loop("int64(int64, int64, int64, float32, float32, int64, int64, int64, int64)")
def block_codes(x, residual, block, top, most, scales, codes, lost, n):
    """Two passes over each block, the second in the cache; 0 where an element is not finite."""
    for number in range((n + block - 1) // block):
        begin = number * block
        count, at, rest = min(block, n - begin), x + 4 * begin, advance(residual, begin)
        peak = peak_bits(at, rest, count)
        if peak >= U32(0x7F800000):
            return 0
        scale = min(float_of(peak) / top, most)
        floats(scales)[number] = scale
        code_block(at, rest, scale, top, codes + begin, advance(lost, begin), count)
    return 1


@loop("float64(int64, int64, int64)")
def largest_of_sum(x, residual, n):
    return F64(float_of(peak_bits(x, residual, n)))


# Randomised rounding


@register_jitable
def hash_lanes(first, key):
    """The hashes of sixteen elements, the first a multiple of 16, whose higher 24 bits are the ``uniforms`` times 2²⁴.

    The numbers of the lanes do not reach the bits that the first shift moves, so that one is made once for all.
    """
    base = U32(U32(first) ^ key)
    word = (splat_word(U32(base ^ (base >> U32(16)))) ^ lane_numbers()) * splat_word(U32(0x7FEB352D))
    word = (word ^ shift_right(word, U32(15))) * splat_word(U32(0x846CA68B))
    return word ^ shift_right(word, U32(16))


@loop("void(int64, int64, int64, int64)")
def bucket_norms(x, bucket, to, n):
    tail = np.empty(GROUP, np.float32)
    for number in range((n + bucket - 1) // bucket):
        begin = number * bucket
        floats(to)[number] = F32(np.sqrt(sums_of(x + 4 * begin, min(bucket, n - begin), tail)[1]))


@loop("void(int64, int64, int64, int64, uint32, int64, int64)")
def qsgd(x, norms, bucket, levels, key, to, n):
    """Sixteen elements at a time, of one bucket or, where buckets begin elsewhere, of several."""
    tail, codes, lanes = np.zeros(LANES, F32), np.zeros(LANES, np.uint8), np.zeros(LANES, F32)
    step = bucket if bucket % LANES == 0 else LANES
    for first in range(0, n, step):
        factors = splat(level_factor(norms, first // bucket, levels))
        if step != bucket:
            for j in range(min(LANES, n - first)):
                lanes[j] = level_factor(norms, (first + j) // bucket, levels)
            factors = load(address_of(lanes))
        for i in range(first, min(n, first + step), LANES):
            if i + LANES <= n:
                store_octets(to + i, levels_of(x + 4 * i, i, factors, F32(levels), key))
            else:
                store_octets(address_of(codes), levels_of(pad_tail(x, 0, i, n, tail), i, factors, F32(levels), key))
                for j in range(i, n):
                    octets(to)[j] = codes[j - i]
    hold(tail)
    hold(lanes)


@register_jitable
def level_factor(norms, number, levels):
    """What elements of a bucket are multiplied by."""
    norm = floats(norms)[number]
    return F32(levels) / norm if norm > LEAST_NORM else F32(0)


@register_jitable
def levels_of(x, first, factors, most, key):
    """Sixteen levels with their signs.

    With v = ⌈exact·2²⁴⌉ and the uniform u/2²⁴, the fraction of exact exceeds the uniform where the lower 24 bits of
    v + (2²⁴ - 1 - u) have a carry.
    """
    value = load(x)
    exact = magnitude(value) * factors
    scaled = round_up(lesser(exact * splat(F32(2.0**24)), splat(most * F32(2.0**24))))
    rest = shift_right(hash_lanes(first, key) ^ splat_word(U32(0xFFFFFFFF)), U32(8))
    return negate_like(shift_right(scaled + rest, U32(24)), words_of(value))


@loop("void(int64, uint32, int64, int64)")
def natural(x, key, to, n):
    end = n - n % LANES
    for i in range(0, end, LANES):
        store_octets(to + i, natural_codes(x + 4 * i, i, key))
    if end < n:
        tail, codes = np.zeros(LANES, F32), np.zeros(LANES, np.uint8)
        store_octets(address_of(codes), natural_codes(pad_tail(x, 0, end, n, tail), end, key))
        hold(tail)
        for i in range(end, n):
            octets(to)[i] = codes[i - end]


@register_jitable
def natural_codes(x, first, key):
    """Compare u/2²⁴ < m/2²³ for the mantissa m in integers: the hash, whose higher 24 bits are u, with 2⁹·m."""
    word = words_of(load(x))
    exponent = shift_right(shift_left(word, U32(1)), U32(24))
    rounded = exponent + one_below(hash_lanes(first, key), shift_left(word, U32(9)))
    return least_word(rounded, splat_word(U32(254)))


@loop("void(int64, int64, int64, int64, int64, int64)")
def add_levels(codes, norms, bucket, levels, out, n):
    a, b = signed_octets(codes), floats(out)
    for number in range((n + bucket - 1) // bucket):
        unit = floats(norms)[number] / F32(levels)
        for i in range(number * bucket, min(n, (number + 1) * bucket)):
            set_element(b, i, b[i] + F32(element(a, i)) * unit)


@loop("void(int64, int64, int64, int64)")
def add_natural(exponents, signs, out, n):
    minus = np.empty(GROUP, np.uint32)
    b = floats(out)
    for begin in range(0, n, GROUP):
        end = min(GROUP, n - begin)
        for j in range(end):
            octet = octets(signs)[(begin + j) >> 3]
            minus[j] = U32(U32(~octet >> (7 - (j & 7))) & U32(1)) << U32(31)
        for j in range(end):
            power = U32(U32(octets(exponents)[begin + j]) << U32(23))
            b[begin + j] += float_of(U32(power | minus[j]))


@register_jitable
def ternary_codes(x, first, clip, scale, key):
    """Sixteen codes: 2 minus, 3 plus, 0 not kept."""
    value = load(x)
    uniform = to_floats(shift_right(hash_lanes(first, key), U32(8))) * splat(F32(2.0**-24))
    kept = less(uniform * splat(scale), lesser(splat(clip), magnitude(value)))
    return keep_words(kept, splat_word(U32(3)) - shift_right(words_of(value), U32(31)))


@loop("int64(int64, float32, float32, uint32, int64, int64)")
def ternary(x, clip, scale, key, to, n):
    tail, pairs = np.zeros(GROUP, F32), np.zeros(GROUP // 4, np.uint8)
    count = 0
    for i in range(0, n, GROUP):
        at, place = x + 4 * i, to + i // 4
        if i + GROUP > n:
            at, place = pad_tail(x, 0, i, n, tail), address_of(pairs)
        a, b = ternary_codes(at, i, clip, scale, key), ternary_codes(at + 64, i + 16, clip, scale, key)
        c, d = ternary_codes(at + 128, i + 32, clip, scale, key), ternary_codes(at + 192, i + 48, clip, scale, key)
        count += store_pairs(place, a, b, c, d)
    hold(tail)
    for j in range(round_down(n) // 4, (n + 15) // 16 * 4):
        octets(to)[j] = pairs[j - round_down(n) // 4]
    return count
