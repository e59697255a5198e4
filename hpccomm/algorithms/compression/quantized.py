"""Compressors that send every element in fewer bits: as it is, rounded to nearest, or rounded at random.

*n elements, s levels.*  Bytes: :func:`none` 4n, :func:`cast` 2n or n, :func:`ternary` n/4, :func:`qsgd` n + 4n/bucket,
:func:`natural` 9n/8.  Random rounding keeps the mean of an element; ranks that encode different
steps round independently, as :func:`~hpccomm.feedback` and :func:`~hpccomm.without_feedback` make them.

With few levels the error of random rounding exceeds the vector, E‖C(x) − x‖² = ω‖x‖² with ω > 1, and error feedback
would add it up without bound.  Feedback therefore uses the damped form: a message's magnitudes are multiplied by
⟨x, C(x)⟩/‖C(x)‖², about 1/(1+ω), so that the error is never longer than x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from hpccomm.algorithms.compression.format import (
    HEADER_BYTES,
    MAX_ELEMENTS,
    Compressor,
    Kind,
    Message,
    NotFiniteError,
    Values,
    demand_finite,
    header_of,
    message_of,
    narrow_values,
)
from hpccomm.algorithms.transforms import check_choice, check_count, check_positive, check_seed, require
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels
from hpccomm.kernels.vectors.reference import Vector, key_of


def none() -> Compressor:
    """Every element unchanged, NaN and infinity too."""
    return Compressor(
        "none()", frozenset({Kind.DENSE}), lambda vector, step, last: message_of(Kind.DENSE, vector.size, [vector])
    )


def cast(dtype: Literal["fp16", "bf16", "int8", "uint8"]) -> Compressor:
    """Every element in 16 or 8 bits, to nearest even.

    ``fp16`` and ``bf16``: elements beyond the range are clipped to it (±65504, ±3.39e38).  ``int8``: multiples of
    max\\|x\\|/127.  ``uint8``: 256 values from the least to the largest element (Bagua's MinMaxUInt8).
    """
    name = f"cast({dtype!r})"
    check_choice("cast: dtype", dtype, tuple(CASTS))
    narrow, kind = CASTS[dtype]

    def write(vector: Vector, step: int, last: Message) -> Message:
        demand_finite(kernels().all_finite(vector), name)
        return narrow(vector)

    return Compressor(name, frozenset({kind}), write)


def write_int8(vector: Vector) -> Message:
    """Multiples of max|x|/127."""
    unit = float(np.float32(kernels().largest_magnitude(vector)) / np.float32(127))
    codes = kernels().to_int8(vector, unit)
    return message_of(Kind.DENSE, vector.size, [codes], values=Values.I8, scale=unit)


def write_range(vector: Vector) -> Message:
    """256 values from least to largest."""
    codes, scale, lower = kernels().range_codes(vector)
    if not math.isfinite(scale) or (vector.size and scale == 0):
        raise NotFiniteError("cast('uint8'): the elements span more than float32 holds: scale them down")
    return message_of(Kind.RANGE, vector.size, [np.array([lower], "<i8"), codes], scale=scale)


def write_half(values: Values) -> Callable[[Vector], Message]:
    """Dense in 16 bits."""
    return lambda vector: message_of(Kind.DENSE, vector.size, [narrow_values(vector, values)], values=values)


CASTS: dict[str, tuple[Callable[[Vector], Message], Kind]] = {
    "fp16": (write_half(Values.F16), Kind.DENSE),
    "bf16": (write_half(Values.BF16), Kind.DENSE),
    "int8": (write_int8, Kind.DENSE),
    "uint8": (write_range, Kind.RANGE),
}


def ternary(clip: float | None = 2.5, seed: int = 0, scale: float | None = None) -> Compressor:
    """±scale or 0 for each element, with the element as its mean: TernGrad (Wen et al., NIPS 2017).

    Magnitudes are first clipped at ``clip`` standard deviations, or means where these are larger (None: no clipping).
    ``scale`` is the largest magnitude, or a number at least as large that ranks agreed on, so that sums are multiples
    of it.  Ranks round independently.
    """
    name = "ternary()"
    for what, value in (("clip", clip), ("scale", scale)):
        if value is not None:
            check_positive(f"{name}: {what}", value, "pass a positive number or None")
    check_seed(name, seed)

    def write(vector: Vector, step: int, last: Message) -> Message:
        n = vector.size
        if n >= MAX_ELEMENTS:
            raise ArgumentError(f"{name}: {n} elements: split them into buckets below 2**31")
        demand_finite(kernels().all_finite(vector), name)
        largest = kernels().largest_magnitude(vector)
        limit = largest if clip is None else min(largest, clip_limit(vector, clip))
        unit = float(np.float32(limit if scale is None else scale))
        if unit < limit:
            raise ArgumentError(f"{name}: scale {unit} is below the largest magnitude {limit}: agree on the maximum")
        pairs, named = kernels().ternary(vector, limit, unit, key_of(seed, step))
        return message_of(Kind.PAIRS, n, [pairs], count=named, scale=unit)

    def write_damped(vector: Vector, step: int, last: Message) -> Message:
        message = write(vector, step, last)
        header = header_of(message)
        if not header.elements:
            return message
        pairs = message[HEADER_BYTES:]
        decoded = plain.decode_vector(message, vector.size)
        unit = max(header.scale * shrinkage(vector, decoded), SMALLEST)
        return message_of(Kind.PAIRS, header.n, [pairs], count=header.elements, scale=unit)

    kinds = frozenset({Kind.PAIRS})
    plain = Compressor(name, kinds, write, is_random=True, unbiased=True)
    return replace(plain, contraction=Compressor(name, kinds, write_damped, is_random=True))


SMALLEST = 2.0**-126
"""A scale above 0 that float32 holds."""


def shrinkage(vector: Vector, decoded: Vector) -> float:
    """⟨x, C(x)⟩/‖C(x)‖², by which a decoded vector comes closest to the vector; 1 for zeros."""
    length = float(np.dot(decoded.astype("f8"), decoded))
    return float(np.dot(decoded.astype("f8"), vector)) / length if length else 1.0


def clip_limit(vector: Vector, clip: float) -> float:
    """``clip`` standard deviations, or as many means where the elements differ by less than their mean."""
    total, squares = kernels().moments(vector)
    n = max(1, vector.size)
    mean = total / n
    return float(np.float32(clip * math.sqrt(max(mean * mean, squares / n - mean * mean))))


def qsgd(levels: int = 127, bucket: int = 512, seed: int = 0) -> Compressor:
    """Each element as one of ``levels`` parts of its bucket's norm, rounded at random so that the mean is the element.

    QSGD (Alistarh et al., NIPS 2017) with the Euclidean norm; a byte an element and a float32 for each ``bucket``
    elements.  Ranks round independently.
    """
    name = f"qsgd({levels}, bucket={bucket})"
    check_count(f"{name}: levels", levels, 1)
    require(levels <= 127, f"{name}: pass 1 to 127 levels")
    check_count(f"{name}: bucket", bucket, 1)
    check_seed(name, seed)

    def write(vector: Vector, step: int, last: Message) -> Message:
        demand_finite(kernels().all_finite(vector), name)
        norms, codes = draw(vector, step)
        return message_of(Kind.LEVELS, vector.size, [bucket_size, norms, codes], values=Values.I8, parameter=levels)

    def write_damped(vector: Vector, step: int, last: Message) -> Message:
        demand_finite(kernels().all_finite(vector), name)
        norms, codes = draw(vector, step)
        starts = np.arange(0, vector.size, bucket)
        whole = codes.astype("f8")
        lengths = np.add.reduceat(whole * whole, starts) if vector.size else starts
        along = np.add.reduceat(whole * vector, starts) if vector.size else starts
        damped = np.where(lengths > 0, levels * along / np.where(lengths > 0, lengths, 1), norms).astype(np.float32)
        return message_of(Kind.LEVELS, vector.size, [bucket_size, damped, codes], values=Values.I8, parameter=levels)

    def draw(vector: Vector, step: int) -> tuple[Vector, Any]:
        norms = kernels().bucket_norms(vector, bucket)
        demand_finite(bool(np.isfinite(norms).all()), f"{name}: the norm of a bucket")
        return norms, kernels().qsgd(vector, norms, bucket, levels, key_of(seed, step))

    bucket_size, kinds = np.array([bucket], "<u8"), frozenset({Kind.LEVELS})
    plain = Compressor(name, kinds, write, is_random=True, unbiased=True)
    if min(bucket / levels**2, math.sqrt(bucket) / levels) < 1:
        return plain
    return replace(plain, contraction=Compressor(name, kinds, write_damped, is_random=True))


def natural(seed: int = 0) -> Compressor:
    """The sign and a power of two, up or down at random so that the mean is the element: nine bits.

    Natural compression (Horváth et al., 2019).  Elements above 2^127 become 2^127.  Ranks round independently.
    """
    name = "natural()"

    check_seed("natural()", seed)

    def write(vector: Vector, step: int, last: Message) -> Message:
        demand_finite(kernels().all_finite(vector), name)
        exponents = kernels().natural(vector, key_of(seed, step))
        return message_of(Kind.NATURAL, vector.size, [exponents, kernels().pack_signs(vector)])

    return Compressor(name, frozenset({Kind.NATURAL}), write, is_random=True, unbiased=True)
