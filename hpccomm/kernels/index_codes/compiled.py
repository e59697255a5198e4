"""The functions of :mod:`hpccomm.kernels.index_codes.reference` compiled: same arguments, same bits, one thread."""

from __future__ import annotations

import numpy as np

from hpccomm.kernels.compiler import call
from hpccomm.kernels.index_codes import loops


def is_ascending(index, n):
    return bool(call(loops.is_ascending, index, n, index.size))


def pack_pairs(words, n):
    octets = np.zeros(4 * -(-n // 16), np.uint8)
    call(loops.pack_pairs, words, words.size, octets)
    return octets


def unpack_pairs(octets, n):
    words = np.empty(n, np.uint32)
    count = call(loops.unpack_pairs, octets, octets.size, words, n)
    return None if count < 0 else words[:count].copy()


def rice_encode(index, k, signs=None):
    index = np.ascontiguousarray(index, np.uint32)
    minus = None if signs is None else np.ascontiguousarray(signs, np.uint32)
    octets = np.zeros(-(-call(loops.rice_length, index, minus, index.size, k) // 8), np.uint8)
    call(loops.rice_encode, index, minus, index.size, k, octets)
    return octets


def rice_decode(octets, count, k, n, signed=False):
    return decode(loops.rice_decode, octets, count, k, n, signed)


def leb128_encode(index):
    octets = np.empty(5 * index.size, np.uint8)
    return octets[: call(loops.leb128_encode, index, index.size, octets)].copy()


def leb128_decode(octets, count, n):
    return decode(loops.leb128_decode, octets, count, n)


def bitmap_encode(index, n):
    octets = np.zeros(-(-n // 8), np.uint8)
    call(loops.bitmap_encode, index, index.size, octets)
    return octets


def bitmap_decode(octets, count, n):
    return decode(loops.bitmap_decode, octets, count, n) if octets.size == -(-n // 8) else None


def decode(loop, octets, count, *numbers):
    """The ``count`` indices that a loop decodes, or None if it finds an error."""
    found = np.empty(count, np.uint32)
    return found if call(loop, octets, octets.size, count, *numbers, found) else None
