"""The functions of :mod:`hpccomm.kernels.quantized.reference` compiled: same arguments, same bits, one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hpccomm.kernels.compiler import call
from hpccomm.kernels.quantized import loops, reference


def convert(loop, x, dtype, *numbers, out=None):
    """Convert each element with a loop, into ``out`` or new memory."""
    out = np.empty(x.size, dtype) if out is None else out
    call(loop, x, *numbers, out, x.size)
    return out


def to_half(x, finite=False):
    return convert(loops.to_half, x, np.uint16, finite)


def to_bfloat16(x, finite=False):
    return convert(loops.to_bfloat16, x, np.uint16, finite)


def to_int8(x, unit):
    return convert(loops.to_int8, x, np.int8, unit) if unit else np.zeros(x.size, np.int8)


def extremes(x):
    found = np.empty(2, np.float32)
    call(loops.extremes, x, found, x.size)
    return float(found[0]), float(found[1])


def range_codes(x):
    scale, upper = reference.range_of(*extremes(x)) if x.size else (0.0, 0.0)
    return convert(loops.range_codes, x, np.uint8, scale, upper), scale, int(upper) - 255


def block_codes(x, residual, block, top, lost=None):
    scales, codes = np.empty(-(-x.size // block), np.float32), np.empty(x.size, np.int8)
    most = reference.largest_scale(top)
    if not call(loops.block_codes, x, residual, block, top, most, scales, codes, lost, x.size):
        return reference.codes_of_nan(scales, codes, lost)
    return scales, codes


def largest_of_sum(x, residual):
    return call(loops.largest_of_sum, x, residual, x.size)


def bucket_norms(x, bucket):
    norms = np.empty(-(-x.size // bucket), np.float32)
    call(loops.bucket_norms, x, bucket, norms, x.size)
    return norms


def qsgd(x, norms, bucket, levels, key):
    return convert(loops.qsgd, x, np.int8, norms, bucket, levels, key)


def natural(x, key):
    return convert(loops.natural, x, np.uint8, key)


def ternary(x, clip, scale, key):
    pairs = np.empty(4 * -(-x.size // 16), np.uint8)
    return pairs, call(loops.ternary, x, clip, scale, key, pairs, x.size)


def adder(loop: Callable[..., Any]) -> Callable[..., None]:
    """A function that passes its arguments to a loop, and the length of the last one, to which the loop adds."""

    def add(*arguments):
        call(loop, *arguments, arguments[-1].size)

    return add


add_half, add_bfloat16, add_int8 = map(adder, (loops.add_half, loops.add_bfloat16, loops.add_int8))
add_range, add_levels, add_natural = map(adder, (loops.add_range, loops.add_levels, loops.add_natural))
