"""The functions of :mod:`hpccomm.kernels.signs.reference` compiled: same arguments, same bits, one thread."""

from __future__ import annotations

import numpy as np

from hpccomm.kernels.compiler import address_of, call
from hpccomm.kernels.signs import loops


def sum_magnitudes(residual, gradient):
    return call(loops.sum_magnitudes, residual, gradient, residual.size)


def sum_by_sign(residual, gradient):
    sums = np.empty(2)
    count = call(loops.sum_by_sign, residual, gradient, sums, residual.size)
    return float(sums[0]), float(sums[1]), count


def pack_signs(x):
    bits = np.empty(-(-x.size // 8), np.uint8)
    call(loops.pack_signs, x, bits, x.size)
    return bits


def pack_signs_feedback(residual, gradient, out, plus, minus, bits):
    call(loops.pack_signs_feedback, residual, gradient, out, plus, minus, bits, residual.size)


def add_signs(messages, out, fresh=False):
    """All messages in one pass."""
    addresses = np.array([address_of(bits) for bits, _, _ in messages], np.int64)
    plus = np.array([high for _, high, _ in messages], np.float32)
    minus = np.array([low for _, _, low in messages], np.float32)
    call(loops.add_signs, addresses, plus, minus, len(messages), fresh, out, out.size)


def majority(messages, n):
    bits = np.empty(-(-n // 8), np.uint8)
    addresses = np.array([address_of(each) for each in messages], np.int64)
    call(loops.majority, addresses, len(messages), bits, bits.size)
    if n % 8:
        bits[-1] &= 256 - (1 << -n % 8)
    return bits
