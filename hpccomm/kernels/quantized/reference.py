"""Elements of 16, 8 or 2 bits in NumPy, which defines every bit: casts, integer codes and randomised rounding."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.index_codes.reference import pack_pairs
from hpccomm.kernels.vectors.reference import (
    F32,
    Octets,
    Vector,
    all_finite,
    backlog_of,
    moments,
    uniforms,
)

LEAST_NORM = F32(2.0**-110)
"""A bucket with a norm up to this is sent as zeros."""


# Narrow elements


def to_half(x: Vector, finite: bool = False) -> npt.NDArray[np.uint16]:
    """float16, to nearest even, as its bits; beyond its range infinity, or with ``finite`` its largest value."""
    with np.errstate(all="ignore"):
        words = x.astype("f2").view("u2")
    return saturate(words, 0x7C00) if finite else words


def to_bfloat16(x: Vector, finite: bool = False) -> npt.NDArray[np.uint16]:
    """bfloat16, to nearest even, as its bits; a NaN stays one, quiet; ``finite`` as for :func:`to_half`."""
    word = x.view("u4")
    rounded = (word + np.uint32(0x7FFF) + ((word >> 16) & 1)) >> 16
    words = np.where(np.isnan(x), (word >> 16) | 0x40, rounded).astype("u2")
    return saturate(words, 0x7F80) if finite else words


def saturate(words: npt.NDArray[np.uint16], infinity: int) -> npt.NDArray[np.uint16]:
    """Replace infinity by the largest finite value; undefined for NaN."""
    return words - ((words & 0x7FFF) == infinity)


def add_half(words: npt.NDArray[np.uint16], out: Vector) -> None:
    """Add float16."""
    out += words.view("f2").astype("f4")


def add_bfloat16(words: npt.NDArray[np.uint16], out: Vector) -> None:
    """Add bfloat16."""
    out += (words.astype("u4") << 16).view("f4")


def to_int8(x: Vector, unit: float) -> npt.NDArray[np.int8]:
    """x/unit to the nearest integer, ties to even, within ±127; 0 if the unit is 0."""
    if not unit:
        return np.zeros(x.size, "i1")
    return np.clip(np.rint(x / F32(unit)), -127, 127).astype("i1")


def add_int8(codes: npt.NDArray[np.int8], unit: float, out: Vector) -> None:
    """Add code · unit."""
    out += codes.astype("f4") * F32(unit)


def extremes(x: Vector) -> tuple[float, float]:
    """The smallest and the largest element; undefined for NaN."""
    return float(x.min()), float(x.max())


def range_codes(x: Vector) -> tuple[Octets, float, int]:
    """Eight bits an element over [min, max] (Bagua's MinMaxUInt8): codes, scale and the integer of code 0.

    scale = 255/(max − min + 1e-7) in float32, code = min(round(x·scale), upper) − lower with upper = round(max·scale),
    lower = upper − 255.
    """
    scale, upper = range_of(*extremes(x)) if x.size else (0.0, 0.0)
    codes = np.minimum(np.rint(x * F32(scale)), F32(upper)) - (F32(upper) - F32(255))
    return np.clip(codes, 0, 255).astype("u1"), scale, int(upper) - 255


def range_of(least: float, most: float) -> tuple[float, float]:
    """Scale and upper of :func:`range_codes`; scale 0 if they overflow float32."""
    with np.errstate(all="ignore"):
        scale = F32(255) / (F32(most) - F32(least) + F32(1e-7))
        upper = np.rint(F32(most) * scale)
    return (float(scale), float(upper)) if np.isfinite(upper) else (0.0, 0.0)


def add_range(codes: Octets, scale: float, lower: int, out: Vector) -> None:
    """Add (code + lower)/scale, computed in float64."""
    out += ((codes + np.float64(lower)) / scale).astype("f4")


# Blocks with a scale


def block_codes(
    x: Vector, residual: Vector | None, block: int, top: int, lost: Vector | None = None
) -> tuple[Vector, npt.NDArray[np.int8]]:
    """The scales of ``block`` consecutive elements of x + residual, and the elements as multiples of them.

    scale = max/top, code = round((x + residual)/scale), ties to even; a scale of 0 divides by 1.  ``lost``, which may
    be ``residual``, becomes what the codes lose.  Where a sum is not finite, all scales and all that is lost are NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = backlog_of(x, residual)
    blocks = np.zeros((-(-total.size // block), block), "f4")
    scales, codes = np.empty(len(blocks), "f4"), np.empty(total.size, "i1")
    if not all_finite(total):
        return codes_of_nan(scales, codes, lost)
    blocks.reshape(-1)[: total.size] = total
    scales[...] = np.minimum(np.abs(blocks).max(axis=1, initial=0) / F32(top), largest_scale(top))
    quotient = blocks / np.where(scales > 0, scales, F32(1))[:, None]
    codes[...] = np.rint(np.clip(quotient, -top, top)).reshape(-1)[: total.size]
    if lost is not None:
        lost[...] = total - codes.astype("f4") * np.repeat(scales, block)[: total.size]
    return scales, codes


def largest_scale(top: float) -> np.float32:
    """The largest number whose product with ``top`` is finite."""
    return np.nextafter(np.finfo("f4").max / F32(top), F32(0))


def codes_of_nan(
    scales: Vector, codes: npt.NDArray[np.int8], lost: Vector | None
) -> tuple[Vector, npt.NDArray[np.int8]]:
    """The result of :func:`block_codes` where an element is not finite."""
    scales.fill(np.nan)
    codes.fill(0)
    if lost is not None:
        lost.fill(np.nan)
    return scales, codes


def largest_of_sum(x: Vector, residual: Vector | None) -> float:
    """max |x + residual|, not finite where a sum is not; 0 for an empty vector."""
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.abs(backlog_of(x, residual)).max(initial=F32(0)))


# Randomised rounding


def bucket_norms(x: Vector, bucket: int) -> Vector:
    """The Euclidean norm of each ``bucket`` consecutive elements, squares summed as by :func:`lane_total`."""
    parts = (x[at : at + bucket] for at in range(0, x.size, bucket))
    return np.array([math.sqrt(moments(part)[1]) for part in parts], "f4")


def qsgd_levels(x: Vector, norms: Vector, bucket: int, levels: int, uniform: Vector) -> npt.NDArray[np.int8]:
    """QSGD (Alistarh et al., NIPS 2017, eq. 4): \\|x\\|·(s/norm), rounded up where its fraction exceeds ``uniform``."""
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.where(norms > LEAST_NORM, F32(levels) / norms, F32(0)).astype("f4")
    exact = np.abs(x) * np.repeat(factor, bucket)[: x.size]
    floor = np.floor(exact)
    level = np.minimum(floor + (uniform < exact - floor), F32(levels))
    return np.where(x < 0, -level, level).astype("i1")


def qsgd(x: Vector, norms: Vector, bucket: int, levels: int, key: int) -> npt.NDArray[np.int8]:
    """:func:`qsgd_levels` with the uniforms of a key."""
    return qsgd_levels(x, norms, bucket, levels, uniforms(key, x.size))


def add_levels(codes: npt.NDArray[np.int8], norms: Vector, bucket: int, levels: int, out: Vector) -> None:
    """Add level · (norm/s)."""
    unit = norms / F32(levels)
    out += codes.astype("f4") * np.repeat(unit, bucket)[: codes.size]


def natural_exponents(x: Vector, uniform: Vector) -> Octets:
    """Natural compression (Horváth et al., 2019): the exponent, one more where ``uniform`` is below the mantissa.

    The biased exponent of float32, 0 for zero; at most 254, the largest finite.
    """
    word = x.view("u4")
    exponent = (word >> 23) & 255
    fraction = (word & 0x7FFFFF).astype("f4") * F32(2.0**-23)
    return np.minimum(exponent + (uniform < fraction), 254).astype("u1")


def natural(x: Vector, key: int) -> Octets:
    """:func:`natural_exponents` with the uniforms of a key."""
    return natural_exponents(x, uniforms(key, x.size))


def add_natural(exponents: Octets, bits: Octets, out: Vector) -> None:
    """Add ±2^(exponent − 127); the bits are those of :func:`pack_signs`."""
    above = np.unpackbits(bits, count=exponents.size).astype("u4")
    out += (exponents.astype("u4") << 23 | (1 - above) << 31).astype("u4").view("f4")


def ternary(x: Vector, clip: float, scale: float, key: int) -> tuple[Octets, int]:
    """TernGrad (Wen et al., NIPS 2017): pairs of the elements kept, each with probability min(\\|x\\|, clip)/scale.

    Also returns the number of kept elements.
    """
    magnitude = np.minimum(np.abs(x), F32(clip))
    kept = uniforms(key, x.size) * F32(scale) < magnitude
    index = np.flatnonzero(kept).astype("u4")
    return pack_pairs(index << np.uint32(1) | (x[index] < 0), x.size), index.size
