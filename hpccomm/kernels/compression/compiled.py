"""The kernels of :mod:`hpccomm.kernels.compression.reference` compiled: same functions, same bits, one thread.

Each function allocates its result and passes addresses to :mod:`hpccomm.kernels.compression.loops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.compression import reference
from hpccomm.kernels.compression.loops import CAPACITY, machine_code
from hpccomm.kernels.compression.reference import Indices, Octets, Vector


def address_of(x: npt.NDArray[Any] | None) -> int:
    """The address of an array; 0 for None."""
    return 0 if x is None else int(x.__array_interface__["data"][0])


def collect(
    loop: str, arguments: Sequence[float], n: int, *dtypes: npt.DTypeLike
) -> tuple[list[npt.NDArray[Any]], bool]:
    """The results of a selecting loop, one array for each dtype, and whether all elements were finite."""
    buffers = [np.empty(CAPACITY, dtype) for dtype in dtypes]
    state = np.zeros(2, np.int64)
    chunks: list[list[npt.NDArray[Any]]] = []
    while not chunks or state[0] < n:
        count = machine_code(loop)(*arguments, *map(address_of, buffers), n, address_of(state))
        chunks.append([buffer[:count].copy() for buffer in buffers])
    whole = chunks[0] if len(chunks) == 1 else [np.concatenate(each) for each in zip(*chunks, strict=True)]
    return whole, not state[1]


# Sums


def all_finite(x: Vector) -> bool:
    """:func:`reference.all_finite`."""
    return bool(machine_code("all_finite")(address_of(x), x.size))


def largest_magnitude(x: Vector) -> float:
    """:func:`reference.largest_magnitude`."""
    return float(machine_code("largest_magnitude")(address_of(x), x.size))


def moments(x: Vector) -> tuple[float, float]:
    """:func:`reference.moments`."""
    sums = np.empty(2)
    machine_code("moments")(address_of(x), address_of(sums), x.size)
    return float(sums[0]), float(sums[1])


def sum_magnitudes(residual: Vector, gradient: Vector | None) -> float:
    """:func:`reference.sum_magnitudes`."""
    return float(machine_code("sum_magnitudes")(address_of(residual), address_of(gradient), residual.size))


def sum_by_sign(residual: Vector, gradient: Vector | None) -> tuple[float, float, int]:
    """:func:`reference.sum_by_sign`."""
    sums = np.empty(2)
    count = machine_code("sum_by_sign")(address_of(residual), address_of(gradient), address_of(sums), residual.size)
    return float(sums[0]), float(sums[1]), int(count)


# Threshold and selection


def threshold_words(residual: Vector, gradient: Vector | None, out: Vector, tau: float) -> tuple[Indices, bool]:
    """:func:`reference.threshold_words`."""
    arguments = address_of(residual), address_of(gradient), address_of(out), tau
    (words,), finite = collect("threshold_words", arguments, residual.size, np.uint32)
    return words, finite


def add_words(words: Indices, tau: float, out: Vector) -> None:
    """:func:`reference.add_words`."""
    machine_code("add_words")(address_of(words), words.size, tau, address_of(out))


def kth_magnitude(values: Vector, rank: int) -> float:
    """:func:`reference.kth_magnitude`."""
    values = np.ascontiguousarray(values)
    return float(machine_code("kth_magnitude")(address_of(values), values.size, rank))


def density_threshold(residual: Vector, gradient: Vector | None, density: float, step: int) -> float:
    """:func:`reference.density_threshold`."""
    return reference.density_threshold(residual, gradient, density, step, kth_magnitude)


def sample(x: Vector, plan: reference.SamplePlan) -> Vector:
    """:func:`reference.sample`."""
    found = np.empty(plan.lines * reference.LINE, np.float32)
    machine_code("sample")(address_of(x) + plan.start * x.itemsize, plan.stride, plan.lines, address_of(found))
    return found


def select_threshold(x: Vector, threshold: float) -> tuple[Indices, bool]:
    """:func:`reference.select_threshold`."""
    (index,), finite = collect("select_threshold", (address_of(x), threshold), x.size, np.uint32)
    return index, finite


def keep_largest(values: Vector, k: int) -> npt.NDArray[np.bool_]:
    """:func:`reference.keep_largest`."""
    return reference.keep_largest(values, k, kth_magnitude)


def select_largest(x: Vector, k: int, step: int = 0, least: float = 1.0) -> tuple[Indices, bool]:
    """:func:`reference.select_largest`."""
    plan = reference.sample_plan(x.size, k, step)
    threshold = 0.0 if plan is None else kth_magnitude(sample(x, plan), plan.rank)
    index, finite = select_threshold(x, threshold)
    if not finite:
        return index[:0], False
    index = reference.widen_selection(x, index, threshold, least * k, select_threshold)
    if index.size > k:
        machine_code("keep_largest_at")(address_of(x), address_of(index), index.size, k)
    return index[:k], True


def momentum_select(
    gradient: Vector,
    momentum: Vector,
    velocity: Vector,
    m: float,
    k: int,
    *,
    nesterov: bool = False,
    mask: bool = True,
    step: int = 0,
    least: float = 1.0,
) -> tuple[Indices, Vector, bool]:
    """:func:`reference.momentum_select`, in one pass unless the threshold was too high."""
    n = gradient.size
    threshold = estimate_velocity_threshold(gradient, momentum, velocity, m, k, nesterov, step)
    arguments = address_of(gradient), address_of(momentum), address_of(velocity), m, threshold, nesterov, mask
    (index, values, kept), finite = collect("momentum_select", arguments, n, np.uint32, np.float32, np.float32)
    if not finite:
        return index[:0], values[:0], False
    if index.size < least * k and threshold > 0:
        velocity[index], momentum[index] = values, kept
        index = reference.widen_selection(velocity, index, threshold, least * k, select_threshold)
        index = index[keep_largest(velocity[index], k)]
        return index, reference.take(index, momentum, velocity, mask), True
    if index.size > k:
        taken = address_of(index), address_of(values), address_of(kept), index.size, k
        machine_code("keep_largest_taken")(*taken, address_of(momentum), address_of(velocity))
    return index[:k], values[:k], True


def estimate_velocity_threshold(
    gradient: Vector, momentum: Vector, velocity: Vector, m: float, k: int, nesterov: bool, step: int
) -> float:
    """:func:`reference.estimate_threshold` of the next velocity."""
    plan = reference.sample_plan(gradient.size, k, step)
    if plan is None:
        return 0.0
    v = np.empty(plan.lines * reference.LINE, np.float32)
    starts = [address_of(each) + plan.start * each.itemsize for each in (gradient, momentum, velocity)]
    machine_code("sample_velocity")(*starts, m, nesterov, plan.stride, plan.lines, address_of(v))
    return kth_magnitude(v, plan.rank)


def scatter_add(messages: Sequence[tuple[Indices, Vector]], out: Vector) -> None:
    """:func:`reference.scatter_add`."""
    for index, values in messages:
        machine_code("scatter_add")(address_of(index), address_of(values), index.size, address_of(out))


def is_ascending(index: Indices, n: int) -> bool:
    """:func:`reference.is_ascending`."""
    return bool(machine_code("is_ascending")(address_of(index), n, index.size))


# One bit an element


def pack_signs(x: Vector) -> Octets:
    """:func:`reference.pack_signs`."""
    bits = np.empty(-(-x.size // 8), np.uint8)
    machine_code("pack_signs")(address_of(x), address_of(bits), x.size)
    return bits


def pack_signs_feedback(
    residual: Vector, gradient: Vector | None, out: Vector, plus: float, minus: float, bits: Octets
) -> None:
    """:func:`reference.pack_signs_feedback`."""
    loop = machine_code("pack_signs_feedback")
    loop(address_of(residual), address_of(gradient), address_of(out), plus, minus, address_of(bits), residual.size)


def add_signs(messages: Sequence[tuple[Octets, float, float]], out: Vector, fresh: bool = False) -> None:
    """:func:`reference.add_signs`, all messages in one pass."""
    addresses = np.array([address_of(bits) for bits, _, _ in messages], np.int64)
    plus = np.array([high for _, high, _ in messages], np.float32)
    minus = np.array([low for _, _, low in messages], np.float32)
    machine_code("add_signs")(
        address_of(addresses), address_of(plus), address_of(minus), len(messages), fresh, address_of(out), out.size
    )


def majority(messages: Sequence[Octets], n: int) -> Octets:
    """:func:`reference.majority`."""
    bits = np.empty(-(-n // 8), np.uint8)
    addresses = np.array([address_of(each) for each in messages], np.int64)
    machine_code("majority")(address_of(addresses), len(messages), address_of(bits), bits.size)
    if n % 8:
        bits[-1] &= 256 - (1 << -n % 8)
    return bits


# Two bits an element


def pack_pairs(words: Indices, n: int) -> Octets:
    """:func:`reference.pack_pairs`."""
    octets = np.zeros(4 * -(-n // 16), np.uint8)
    machine_code("pack_pairs")(address_of(words), words.size, address_of(octets))
    return octets


def unpack_pairs(octets: Octets, n: int) -> Indices | None:
    """:func:`reference.unpack_pairs`."""
    words = np.empty(n, np.uint32)
    count = machine_code("unpack_pairs")(address_of(octets), octets.size, address_of(words), n)
    return None if count < 0 else words[:count].copy()


# Index codes


def rice_encode(index: Indices, k: int, signs: npt.NDArray[Any] | None = None) -> Octets:
    """:func:`reference.rice_encode`."""
    index = np.ascontiguousarray(index, np.uint32)
    minus = None if signs is None else np.ascontiguousarray(signs, np.uint32)
    octets = np.zeros(
        -(-machine_code("rice_length")(address_of(index), address_of(minus), index.size, k) // 8), np.uint8
    )
    machine_code("rice_encode")(address_of(index), address_of(minus), index.size, k, address_of(octets))
    return octets


def rice_decode(octets: Octets, count: int, k: int, n: int, signed: bool = False) -> Indices | None:
    """:func:`reference.rice_decode`."""
    found = np.empty(count, np.uint32)
    return (
        found
        if machine_code("rice_decode")(address_of(octets), octets.size, count, k, n, signed, address_of(found))
        else None
    )


def leb128_encode(index: Indices) -> Octets:
    """:func:`reference.leb128_encode`."""
    octets = np.empty(5 * index.size, np.uint8)
    return octets[: machine_code("leb128_encode")(address_of(index), index.size, address_of(octets))].copy()


def leb128_decode(octets: Octets, count: int, n: int) -> Indices | None:
    """:func:`reference.leb128_decode`."""
    found = np.empty(count, np.uint32)
    return (
        found if machine_code("leb128_decode")(address_of(octets), octets.size, count, n, address_of(found)) else None
    )


def bitmap_encode(index: Indices, n: int) -> Octets:
    """:func:`reference.bitmap_encode`."""
    octets = np.zeros(-(-n // 8), np.uint8)
    machine_code("bitmap_encode")(address_of(index), index.size, address_of(octets))
    return octets


def bitmap_decode(octets: Octets, count: int, n: int) -> Indices | None:
    """:func:`reference.bitmap_decode`."""
    found = np.empty(count, np.uint32)
    whole = octets.size == -(-n // 8)
    return (
        found
        if whole and machine_code("bitmap_decode")(address_of(octets), octets.size, count, n, address_of(found))
        else None
    )


# Narrow elements


def to_half(x: Vector, finite: bool = False) -> npt.NDArray[np.uint16]:
    """:func:`reference.to_half`."""
    return convert("to_half", x, np.uint16, finite)


def to_bfloat16(x: Vector, finite: bool = False) -> npt.NDArray[np.uint16]:
    """:func:`reference.to_bfloat16`."""
    return convert("to_bfloat16", x, np.uint16, finite)


def to_int8(x: Vector, unit: float) -> npt.NDArray[np.int8]:
    """:func:`reference.to_int8`."""
    return convert("to_int8", x, np.int8, unit) if unit else np.zeros(x.size, np.int8)


def convert(
    loop: str, x: Vector, dtype: npt.DTypeLike, *numbers: float, out: npt.NDArray[Any] | None = None
) -> npt.NDArray[Any]:
    """Convert each element with a loop, into ``out`` or new memory."""
    out = np.empty(x.size, dtype) if out is None else out
    machine_code(loop)(address_of(x), *numbers, address_of(out), x.size)
    return out


def add_half(words: npt.NDArray[np.uint16], out: Vector) -> None:
    """:func:`reference.add_half`."""
    machine_code("add_half")(address_of(words), address_of(out), out.size)


def add_bfloat16(words: npt.NDArray[np.uint16], out: Vector) -> None:
    """:func:`reference.add_bfloat16`."""
    machine_code("add_bfloat16")(address_of(words), address_of(out), out.size)


def add_int8(codes: npt.NDArray[np.int8], unit: float, out: Vector) -> None:
    """:func:`reference.add_int8`."""
    machine_code("add_int8")(address_of(codes), unit, address_of(out), out.size)


def extremes(x: Vector) -> tuple[float, float]:
    """:func:`reference.extremes`."""
    found = np.empty(2, np.float32)
    machine_code("extremes")(address_of(x), address_of(found), x.size)
    return float(found[0]), float(found[1])


def range_codes(x: Vector) -> tuple[Octets, float, int]:
    """:func:`reference.range_codes`."""
    scale, upper = reference.range_of(*extremes(x)) if x.size else (0.0, 0.0)
    return convert("range_codes", x, np.uint8, scale, upper), scale, int(upper) - 255


def add_range(codes: Octets, scale: float, lower: int, out: Vector) -> None:
    """:func:`reference.add_range`."""
    machine_code("add_range")(address_of(codes), scale, lower, address_of(out), out.size)


# Randomised rounding


def bucket_norms(x: Vector, bucket: int) -> Vector:
    """:func:`reference.bucket_norms`."""
    norms = np.empty(-(-x.size // bucket), np.float32)
    machine_code("bucket_norms")(address_of(x), bucket, address_of(norms), x.size)
    return norms


def qsgd(x: Vector, norms: Vector, bucket: int, levels: int, key: int) -> npt.NDArray[np.int8]:
    """:func:`reference.qsgd`."""
    codes = np.empty(x.size, np.int8)
    machine_code("qsgd")(address_of(x), address_of(norms), bucket, levels, key, address_of(codes), x.size)
    return codes


def add_levels(codes: npt.NDArray[np.int8], norms: Vector, bucket: int, levels: int, out: Vector) -> None:
    """:func:`reference.add_levels`."""
    machine_code("add_levels")(address_of(codes), address_of(norms), bucket, levels, address_of(out), out.size)


def natural(x: Vector, key: int) -> Octets:
    """:func:`reference.natural`."""
    return convert("natural", x, np.uint8, key)


def add_natural(exponents: Octets, bits: Octets, out: Vector) -> None:
    """:func:`reference.add_natural`."""
    machine_code("add_natural")(address_of(exponents), address_of(bits), address_of(out), out.size)


def ternary(x: Vector, clip: float, scale: float, key: int) -> tuple[Octets, int]:
    """:func:`reference.ternary`."""
    pairs = np.empty(4 * -(-x.size // 16), np.uint8)
    return pairs, int(machine_code("ternary")(address_of(x), clip, scale, key, address_of(pairs), x.size))
