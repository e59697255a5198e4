"""The hot loops of :mod:`hpccomm.kernels.index_codes.compiled`."""

from __future__ import annotations

import numpy as np
from numba import carray
from numba.extending import register_jitable

from hpccomm.kernels.compiler import loop
from hpccomm.kernels.index_codes.reference import LONGEST_QUOTIENT
from hpccomm.kernels.simd import (
    load_bits,
    lowest_bit,
    octets,
    words,
)

I64, U32, U64 = np.int64, np.uint32, np.uint64


@loop("int64(int64, int64, int64)")
def is_ascending(index, n, count):
    a = carray(words(index), count)
    wrong = False
    for i in range(1, count):
        wrong |= a[i] <= a[i - 1]
    return 0 if wrong or (count and a[count - 1] >= n) else 1


@loop("void(int64, int64, int64)")
def pack_pairs(found, count, to):
    for j in range(count):
        word = words(found)[j]
        i = I64(word >> U32(1))
        octets(to)[i >> 2] |= np.uint8((3 - (word & U32(1))) << U32(6 - 2 * (i & 3)))


@loop("int64(int64, int64, int64, int64)")
def unpack_pairs(source, nbytes, found, n):
    count = 0
    for j in range(nbytes):
        octet = octets(source)[j]
        if octet == 0:
            continue
        for part in range(4):
            pair = octet >> (6 - 2 * part) & 3
            i = 4 * j + part
            if pair == 1 or (pair and i >= n):
                return -1
            if pair:
                words(found)[count] = U32(i << 1 | (3 - pair))
                count += 1
    return count


@register_jitable
def put_bits(to, at, value, width):
    """Write the ``width`` (at most 32) lowest bits of a number at bit ``at``, where the bytes are still 0."""
    while width:
        room = 8 - (at & 7)
        part = min(room, width)
        field = value >> U64(width - part) & U64((1 << part) - 1)
        to[at >> 3] |= np.uint8(field << U64(room - part))
        at += part
        width -= part
    return at


@loop("int64(int64, int64, int64, int64)")
def rice_length(index, signs, count, k):
    total, before = 0, -1
    for j in range(count):
        i = I64(words(index)[j])
        quotient = (i - before - 1) >> k
        total += quotient + 1 + k if quotient < LONGEST_QUOTIENT else LONGEST_QUOTIENT + 32
        before = i
    return total + (count if signs else 0)


@loop("void(int64, int64, int64, int64, int64)")
def rice_encode(index, signs, count, k, to):
    at, before = 0, -1
    out = octets(to)
    for j in range(count):
        i = I64(words(index)[j])
        gap = U64(i - before - 1)
        before = i
        quotient = I64(gap >> U64(k))
        long = quotient >= LONGEST_QUOTIENT
        rest = min(quotient, LONGEST_QUOTIENT)
        while rest:
            part = min(rest, 32)
            at = put_bits(out, at, U64((1 << part) - 1), part)
            rest -= part
        if long:
            at = put_bits(out, at, gap, 32)
        else:
            at += 1
            at = put_bits(out, at, gap, k)
        if signs:
            at = put_bits(out, at, U64(words(signs)[j]), 1)


@register_jitable
def bit_at(source, at):
    return I64(source[at >> 3] >> (7 - (at & 7)) & 1)


@register_jitable
def bits_at(source, at, width):
    """Read ``width`` (at most 33) bits."""
    value = 0
    while width:
        room = 8 - (at & 7)
        part = min(room, width)
        value = value << part | (I64(source[at >> 3]) >> (room - part) & ((1 << part) - 1))
        at += part
        width -= part
    return value


@loop("int64(int64, int64, int64, int64, int64, int64, int64)")
def rice_decode(source, nbytes, count, k, n, signed, found):
    out, a = words(found), octets(source)
    at, i, end = 0, -1, 8 * nbytes
    for j in range(count):
        quotient = 0
        while quotient < LONGEST_QUOTIENT and at < end and bit_at(a, at):
            quotient += 1
            at += 1
        long = quotient == LONGEST_QUOTIENT
        at += 0 if long else 1
        width = 32 if long else k
        if at + width + signed > end:
            return 0
        field = bits_at(a, at, width)
        at += width
        i += 1 + (field if long else quotient << k | field)
        if i >= n:
            return 0
        if signed:
            out[j] = U32(i << 1 | bit_at(a, at))
            at += 1
        else:
            out[j] = U32(i)
    if end - at >= 8:
        return 0
    while at < end:
        if bit_at(a, at):
            return 0
        at += 1
    return 1


@loop("int64(int64, int64, int64)")
def leb128_encode(index, count, to):
    at, before = 0, -1
    out = octets(to)
    for j in range(count):
        i = I64(words(index)[j])
        gap = i - before - 1
        before = i
        while gap > 127:
            out[at] = np.uint8(gap & 127 | 128)
            gap >>= 7
            at += 1
        out[at] = np.uint8(gap)
        at += 1
    return at


@loop("int64(int64, int64, int64, int64, int64)")
def leb128_decode(source, nbytes, count, n, found):
    a = octets(source)
    at, i = 0, -1
    for j in range(count):
        gap, shift = 0, 0
        while True:
            if at >= nbytes or shift > 28:
                return 0
            octet = I64(a[at])
            at += 1
            gap |= (octet & 127) << shift
            if octet < 128:
                if octet == 0 and shift:
                    return 0
                break
            shift += 7
        i += gap + 1
        if i >= n:
            return 0
        words(found)[j] = U32(i)
    return 1 if at == nbytes else 0


@loop("void(int64, int64, int64)")
def bitmap_encode(index, count, to):
    for j in range(count):
        i = words(index)[j]
        octets(to)[i >> U32(3)] |= np.uint8(U32(128) >> (i & U32(7)))


@loop("int64(int64, int64, int64, int64, int64)")
def bitmap_decode(source, nbytes, count, n, found):
    seen = 0
    for j in range(0, nbytes, 8):
        mask = U64(0)
        if j + 8 <= nbytes:
            mask = load_bits(source + j)
        else:
            for i in range(8 * j, 8 * nbytes):
                mask |= U64(bit_at(octets(source), i)) << U64(i - 8 * j)
        while mask:
            i = 8 * j + lowest_bit(mask)
            if i >= n or seen == count:
                return 0
            words(found)[seen] = U32(i)
            seen += 1
            mask &= mask - U64(1)
    return 1 if seen == count else 0
