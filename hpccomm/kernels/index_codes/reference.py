"""Codes for the indices of selected elements in NumPy, which defines every bit.

=================  ==========================================================================
words              uint32 ``2i + s``, s = 1 for minus (Strom, Interspeech 2015)
pairs              two bits an element, 11 plus, 10 minus, 00 nothing, first element highest
gaps               ``i - previous - 1``, beginning with i of the first element
=================  ==========================================================================
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.vectors.reference import (
    Indices,
    Octets,
)

LONGEST_QUOTIENT = 48
"""So many ones announce a 32-bit gap instead of a quotient in Rice codes."""


def is_ascending(index: Indices, n: int) -> bool:
    """Whether indices are distinct, ascending and below n."""
    return bool((index[1:] > index[:-1]).all() and (index.size == 0 or index[-1] < n))


def pack_pairs(words: Indices, n: int) -> Octets:
    """Words as pairs, padded with 0 to whole groups of 16 elements."""
    index, minus = words >> 1, words & 1
    pairs = np.zeros(16 * -(-n // 16), "u1")
    pairs[index] = 3 - minus
    four = pairs.reshape(-1, 4)
    return (four[:, 0] << 6 | four[:, 1] << 4 | four[:, 2] << 2 | four[:, 3]).astype("u1")


def unpack_pairs(octets: Octets, n: int) -> Indices | None:
    """The words of pairs; None if there is a pair 01 or one beyond the end."""
    pairs = (octets[:, None] >> np.array([6, 4, 2, 0], "u1") & 3).reshape(-1)
    if (pairs == 1).any() or pairs[n:].any():
        return None
    index = np.flatnonzero(pairs).astype("u4")
    return (index << 1 | (3 - pairs[index])).astype("u4")


def gaps_of(index: Indices) -> npt.NDArray[np.uint32]:
    """The number of elements between one index and the next."""
    return np.diff(index.astype("i8"), prepend=-1).astype("u4") - np.uint32(1)


def from_gaps(gaps: npt.NDArray[Any], n: int) -> Indices | None:
    """The indices of gaps; None if one reaches n."""
    index = np.cumsum(gaps.astype("i8") + 1) - 1
    return None if index.size and index[-1] >= n else index.astype("u4")


def rice_parameter(n: int, count: int) -> int:
    """The k of nearly the shortest Rice codes of ``count`` indices: log2(0.69 n/count), rounded."""
    return max(0, min(31, round(math.log2(0.69 * n / count)))) if count else 0


def rice_encode(index: Indices, k: int, signs: npt.NDArray[Any] | None = None) -> Octets:
    """Golomb-Rice codes of the gaps: quotient in ones, a zero, k bits of remainder, and the sign bit if given.

    Bits fill bytes from the highest; the last byte ends in zeros.  A quotient of 48 or more is written as 48 ones and
    the gap in 32 bits.
    """
    gaps = gaps_of(index).astype("u8")
    quotient = gaps >> np.uint64(k)
    long = quotient >= LONGEST_QUOTIENT
    ones = np.minimum(quotient, LONGEST_QUOTIENT).astype("i8")
    tail = np.where(long, 32, 1 + k)
    field = np.where(long, gaps, gaps & np.uint64((1 << k) - 1)).astype("u8")
    if signs is not None:
        tail, field = tail + 1, field << np.uint64(1) | signs.astype("u8")
    ends = np.cumsum(ones + tail)
    bits = np.zeros(int(ends[-1]) if ends.size else 0, "u1")
    place = np.arange(bits.size)
    code = np.searchsorted(ends, place, side="right")
    back = ends[code] - 1 - place  # distance from the last bit of the code
    bits[...] = (back >= tail[code]) | (field[code] >> np.minimum(back, 63).astype("u8") & np.uint64(1))
    return np.packbits(bits)


def rice_decode(octets: Octets, count: int, k: int, n: int, signed: bool = False) -> Indices | None:
    """The indices, or words if ``signed``; None unless the codes are complete, in range and nothing follows."""
    bits = np.unpackbits(octets)
    values = []
    at, i = 0, -1
    for _ in range(count):
        rest = bits[at : at + LONGEST_QUOTIENT]
        stop = int(np.argmin(rest)) if rest.size and not rest.all() else rest.size
        long = stop == LONGEST_QUOTIENT
        at += stop + (0 if long else 1)
        width = (32 if long else k) + signed
        if at + width > bits.size:
            return None
        field = 0
        for bit in bits[at : at + width]:
            field = field << 1 | int(bit)
        at += width
        sign, field = (field & 1, field >> 1) if signed else (0, field)
        i += 1 + (field if long else stop << k | field)
        if i >= n:
            return None
        values.append(i << 1 | sign if signed else i)
    if bits.size - at >= 8 or bits[at:].any():
        return None
    return np.array(values, "u4")


def leb128_encode(index: Indices) -> Octets:
    """Gaps as seven bits a byte, lowest first; the highest bit is set if another byte follows."""
    gaps = gaps_of(index).astype("u8")
    parts = gaps[:, None] >> np.arange(0, 35, 7, dtype="u8")
    used = parts > 0
    used[:, 0] = True
    more = np.zeros_like(used)
    more[:, :-1] = used[:, 1:]
    return ((parts & np.uint64(127)) | more.astype("u8") << np.uint64(7))[used].astype("u1")


def leb128_decode(octets: Octets, count: int, n: int) -> Indices | None:
    """The indices; None unless the codes are complete, shortest, in range and nothing follows."""
    ends = np.flatnonzero(octets < 128)
    lengths = np.diff(ends, prepend=-1)
    whole = ends.size == count and (octets.size == 0 if count == 0 else ends[-1] == octets.size - 1)
    if not whole or (lengths > 5).any() or (octets[ends[lengths > 1]] == 0).any():
        return None
    gaps = np.zeros(count, "u8")
    begins = ends - lengths + 1
    for j in range(int(lengths.max(initial=0))):
        longer = lengths > j
        gaps[longer] |= (octets[begins[longer] + j] & 127).astype("u8") << np.uint64(7 * j)
    return from_gaps(gaps, n)


def bitmap_encode(index: Indices, n: int) -> Octets:
    """One bit an element, 1 where it is selected."""
    chosen = np.zeros(n, bool)
    chosen[index] = True
    return np.packbits(chosen)


def bitmap_decode(octets: Octets, count: int, n: int) -> Indices | None:
    """The indices; None unless there are ``count`` of them, all below n."""
    index = np.flatnonzero(np.unpackbits(octets))
    if index.size != count or octets.size != -(-n // 8) or (count and index[-1] >= n):
        return None
    return index.astype("u4")
