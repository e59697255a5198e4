"""The hot loops of :mod:`hpccomm.kernels.quantized.compiled`."""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from hpccomm.kernels.compiler import loop
from hpccomm.kernels.intrinsics import bits, element, float_of, set_element
from hpccomm.kernels.quantized.reference import LEAST_NORM
from hpccomm.kernels.reductions.loops import STORAGE
from hpccomm.kernels.simd import (
    address_of,
    floats,
    fma,
    halves,
    load,
    octets,
    popcount,
    rint,
    signed_octets,
    splat,
    store,
)
from hpccomm.kernels.vectors.loops import GROUP, maximum, minimum, round_down, sums_of

F32, F64, U32, U64 = np.float32, np.float64, np.uint32, np.uint64

PAIR_HIGH_BITS = U64(0xAAAAAAAAAAAAAAAA)
"""The higher bit of each pair of bits."""

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


# Randomised rounding


@register_jitable
def uniform(i, key):
    """Element i of :func:`hpccomm.kernels.vectors.reference.uniforms`."""
    return F32(uniform_word(i, key)) * F32(2.0**-24)


@register_jitable
def uniform_word(i, key):
    """Element i of ``uniforms``, times 2²⁴."""
    word = U32(U32(i) ^ key)
    word = U32(U32(word ^ (word >> U32(16))) * U32(0x7FEB352D))
    word = U32(U32(word ^ (word >> U32(15))) * U32(0x846CA68B))
    word = U32(word ^ (word >> U32(16)))
    return U32(word >> U32(8))


@loop("void(int64, int64, int64, int64)")
def bucket_norms(x, bucket, to, n):
    tail = np.empty(GROUP, np.float32)
    for number in range((n + bucket - 1) // bucket):
        begin = number * bucket
        floats(to)[number] = F32(np.sqrt(sums_of(x + 4 * begin, min(bucket, n - begin), tail)[1]))


@loop("void(int64, int64, int64, int64, uint32, int64, int64)")
def qsgd(x, norms, bucket, levels, key, to, n):
    a, b = floats(x), signed_octets(to)
    most = F32(levels)
    for number in range((n + bucket - 1) // bucket):
        norm = floats(norms)[number]
        factor = most / norm if norm > LEAST_NORM else F32(0)
        for i in range(number * bucket, min(n, (number + 1) * bucket)):
            value = element(a, i)
            exact = abs(value) * factor
            level = np.int32(exact)
            level = np.int32(level + np.int32(uniform(i, key) < exact - F32(level)))
            level = min(level, np.int32(levels))
            set_element(b, i, np.int8(np.int32(-level) if value < 0 else level))


@loop("void(int64, uint32, int64, int64)")
def natural(x, key, to, n):
    """Compare u/2²⁴ < m/2²³ as u < 2m, in integers."""
    a, b = floats(x), octets(to)
    for i in range(n):
        word = bits(element(a, i))
        exponent = U32(U32(word >> U32(23)) & U32(255))
        exponent = U32(exponent + U32(uniform_word(i, key) < U32(U32(word & U32(0x7FFFFF)) << U32(1))))
        set_element(b, i, np.uint8(min(exponent, U32(254))))


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


@register_jitable(forceinline=True)
def ternary_codes(x, first, count, clip, scale, key, codes):
    """Codes: 2 minus, 3 plus, 0 not kept."""
    a, b = floats(x), octets(codes)
    for j in range(count):
        value = element(a, j)
        kept = uniform(U32(first + U32(j)), key) * scale < min(abs(value), clip)
        set_element(b, j, np.uint8(np.uint8(np.uint8(3) - np.uint8(value < 0)) * np.uint8(kept)))


@loop("int64(int64, float32, float32, uint32, int64, int64)")
def ternary(x, clip, scale, key, to, n):
    codes, packed = np.zeros(GROUP, np.uint8), np.zeros(GROUP // 4, np.uint8)
    at, four, high = address_of(codes), codes.view(np.uint32), packed.view(np.uint64)
    count = 0
    for begin in range(0, n, GROUP):
        if begin + GROUP <= n:
            ternary_codes(x + 4 * begin, U32(begin), GROUP, clip, scale, key, at)
        else:
            codes[:] = 0
            ternary_codes(x + 4 * begin, U32(begin), n - begin, clip, scale, key, at)
        for j in range(four.size):
            packed[j] = np.uint8(U32(four[j] * U32(0x40100401)) >> U32(24))
        count += popcount(high[0] & PAIR_HIGH_BITS) + popcount(high[1] & PAIR_HIGH_BITS)
        for j in range(min(GROUP, (n - begin + 15) // 16 * 16) // 4):
            octets(to)[begin // 4 + j] = packed[j]
    return count
