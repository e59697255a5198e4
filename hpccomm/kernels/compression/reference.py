"""The kernels of compressed gradient exchange in NumPy, which define every bit of the result.

:mod:`hpccomm.kernels.compression.compiled` has the same functions compiled.  Vectors are float32, flat and in C order;
*n elements, i their index*.  Sums run in float64 in one fixed order (:func:`lane_sum`), so every machine gets the same
bits.  sign(0) is +1; of equal magnitudes the lower index ranks first; indices are ascending.

=================  ==========================================================================
words              uint32 ``2i + s``, s = 1 for minus (Strom, Interspeech 2015)
bits               one bit an element, 1 for x ≥ 0, eight to a byte, first element highest
pairs              two bits an element, 11 plus, 10 minus, 00 nothing, first element highest
gaps               ``i - previous - 1``, beginning with i of the first element
=================  ==========================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]
Indices = npt.NDArray[np.uint32]
Octets = npt.NDArray[np.uint8]
F32 = np.float32

LANES = 64
"""Partial sums of :func:`lane_sum`; a power of two."""
LINE = 16
"""Elements sampled together: one cache line."""
LEAST_NORM = F32(2.0**-110)
"""A bucket with a norm up to this is sent as zeros."""
LONGEST_QUOTIENT = 48
"""So many ones announce a 32-bit gap instead of a quotient in Rice codes."""


# Sums


def lane_sum(terms: Vector) -> float:
    """Sum of float32: 256 at a time, four rows of ``LANES``, (a + b) + (c + d) in float32, then :func:`lane_total`."""
    rows = np.zeros((-(-terms.size // (4 * LANES)), 4, LANES), "f4")
    rows.reshape(-1)[: terms.size] = terms
    return lane_total((rows[:, 0] + rows[:, 1]) + (rows[:, 2] + rows[:, 3]))


def lane_total(rows: Iterable[npt.NDArray[Any]]) -> float:
    """Sum in float64: rows of ``LANES`` elements are added in order, then halves of the lanes until one is left."""
    lanes = np.zeros(LANES)
    for row in rows:
        lanes[: row.size] += row
    while lanes.size > 1:
        half = lanes.size // 2
        lanes = lanes[:half] + lanes[half:]
    return float(lanes[0])


def rows_of(x: Vector) -> Iterable[npt.NDArray[np.float64]]:
    """``LANES`` elements at a time; the last row may be shorter."""
    return (x[at : at + LANES].astype("f8") for at in range(0, x.size, LANES))


def all_finite(x: Vector) -> bool:
    """Whether there is neither NaN nor infinity."""
    return bool(np.isfinite(x).all())


def largest_magnitude(x: Vector) -> float:
    """max |x|; 0 for an empty vector.  Defined for finite elements."""
    return float(np.abs(x).max(initial=F32(0)))


def moments(x: Vector) -> tuple[float, float]:
    """Σ x and Σ x², as by :func:`lane_total`."""
    return lane_total(rows_of(x)), lane_total(row * row for row in rows_of(x))


def backlog_of(residual: Vector, gradient: Vector | None) -> Vector:
    """The vector to compress: residual plus gradient, if there is a gradient."""
    return residual if gradient is None else residual + gradient


# Threshold: one quantum an element (GTC)


def threshold_words(residual: Vector, gradient: Vector | None, out: Vector, tau: float) -> tuple[Indices, bool]:
    """Words of the elements with \\|p\\| ≥ τ of p = residual + gradient; ``out`` gets p minus the decoded words.

    One quantum an element, whatever its size (Strom 2015).  ``out`` may be ``residual``.  Also returns whether p was
    finite.
    """
    with np.errstate(all="ignore"):
        p = backlog_of(residual, gradient)
        finite = all_finite(p)
        plus, minus = p >= F32(tau), p <= -F32(tau)
        rest = np.where(plus, p - F32(tau), np.where(minus, p + F32(tau), p))
    index = np.flatnonzero(plus | minus)
    words = (index << 1 | minus[index]).astype("u4")
    out[...] = rest
    return words, finite


def add_words(words: Indices, tau: float, out: Vector) -> None:
    """Add the decoded words."""
    out[words >> 1] += np.where(words & 1, -F32(tau), F32(tau))


# Selection: the k largest


class SamplePlan(NamedTuple):
    """The elements that estimate a threshold: ``lines`` runs of ``LINE`` elements, ``stride`` apart."""

    start: int
    stride: int
    lines: int
    rank: int
    """The threshold is the magnitude of this rank in the sample, counted from 1."""


def sample_plan(n: int, k: int, step: int) -> SamplePlan | None:
    """About 0.25 % of the elements, at least 2^14; None if the whole vector is as quick (n < 2^16 or k > n/8).

    The rank is three standard deviations above the expected number, as if the sampled elements were independent, so
    that very probably more than k elements reach the threshold.  ``step`` moves the start.
    """
    if n < 1 << 16 or k > n // 8:
        return None
    lines = max(1 << 10, n // (400 * LINE))
    stride = n // lines
    expected = k * lines * LINE / n
    rank = math.ceil(expected + 3 * math.sqrt(expected) + 3)
    return SamplePlan(step * 7919 % (stride - LINE + 1), stride, lines, rank)


def sample(x: npt.NDArray[Any], plan: SamplePlan) -> npt.NDArray[Any]:
    """The sampled elements of a vector, in order."""
    runs = np.lib.stride_tricks.as_strided(
        x[plan.start :], (plan.lines, LINE), (plan.stride * x.itemsize, x.itemsize), writeable=False
    )
    return runs.reshape(-1)


def kth_magnitude(values: Vector, rank: int) -> float:
    """The magnitude of this rank; the largest has rank 1."""
    magnitudes = np.abs(values)
    return float(np.partition(magnitudes, values.size - rank)[values.size - rank])


KthMagnitude = Callable[[Vector, int], float]
Select = Callable[[Vector, float], tuple[Indices, bool]]


def estimate_threshold(x: Vector, k: int, step: int) -> float:
    """A threshold that very probably more than k elements reach; 0 where sampling does not pay."""
    plan = sample_plan(x.size, k, step)
    return 0.0 if plan is None else kth_magnitude(sample(x, plan), plan.rank)


def select_threshold(x: Vector, threshold: float) -> tuple[Indices, bool]:
    """Indices of the elements other than 0 with \\|x\\| ≥ threshold, and whether all elements are finite."""
    magnitude = np.abs(x)
    index = np.flatnonzero((magnitude >= F32(threshold)) & (magnitude > 0)).astype("u4")
    return index, all_finite(x)


def keep_largest(values: Vector, k: int, ranked: KthMagnitude = kth_magnitude) -> npt.NDArray[np.bool_]:
    """The mask of the k largest values in magnitude; of equal ones the first."""
    if values.size <= k:
        return np.ones(values.size, bool)
    magnitudes = np.abs(values)
    least = F32(ranked(values, k)) if k else F32(np.inf)
    kept = magnitudes > least
    kept[np.flatnonzero(magnitudes == least)[: k - int(np.count_nonzero(kept))]] = True
    return kept


def select_largest(x: Vector, k: int, step: int = 0, least: float = 1.0) -> tuple[Indices, bool]:
    """Indices of the k largest magnitudes other than 0, by a sampled threshold; fewer if fewer are not 0.

    A threshold that fewer than ``least * k`` elements reach is halved, up to four times, then set to 0.  The result is
    exact with ``least`` 1; with less it may be the largest ``least * k`` elements or a few more.  Also returns whether
    all elements are finite; if not, no index is returned.
    """
    threshold = estimate_threshold(x, k, step)
    index, finite = select_threshold(x, threshold)
    index = widen_selection(x, index, threshold, least * k) if finite else index[:0]
    return index[keep_largest(x[index], k)], finite


def widen_selection(
    x: Vector, index: Indices, threshold: float, enough: float, select: Select = select_threshold
) -> Indices:
    """Select by the largest of threshold, threshold/2, threshold/4, …, 0 that ``enough`` elements reach."""
    for divisor in (2, 4, 8, 16, 0):
        if index.size >= enough or not threshold:
            break
        index, _ = select(x, threshold / divisor if divisor else 0.0)
    return index


def accumulate(gradient: Vector, momentum: Vector, velocity: Vector, m: float, nesterov: bool) -> None:
    """u ← m·u + g, v ← v + u; with ``nesterov`` u ← m·(u + g), v ← (v + u) + g.  ``momentum`` is u, ``velocity`` v."""
    with np.errstate(all="ignore"):
        if nesterov:
            momentum += gradient
            momentum *= F32(m)
            velocity += momentum
            velocity += gradient
        else:
            momentum *= F32(m)
            momentum += gradient
            velocity += momentum


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
    """DGC's local step (Lin et al., ICLR 2018, algorithm 1 with momentum correction and factor masking).

    After :func:`accumulate` the k largest of v are selected as by :func:`select_largest`: their indices and values are
    returned, v becomes 0 there and with ``mask`` u too.  Also returns whether v was finite.
    """
    accumulate(gradient, momentum, velocity, m, nesterov)
    index, finite = select_largest(velocity, k, step, least)
    return index, take(index, momentum, velocity, mask), finite


def take(index: Indices, momentum: Vector, velocity: Vector, mask: bool) -> Vector:
    """Return the velocity at ``index`` and set it to 0 there, with ``mask`` the momentum too."""
    values = velocity[index]
    velocity[index] = 0
    if mask:
        momentum[index] = 0
    return values


def density_threshold(
    residual: Vector, gradient: Vector | None, density: float, step: int, ranked: KthMagnitude = kth_magnitude
) -> float:
    """The magnitude that about ``density`` of the elements of residual + gradient reach; 0 if all are 0.

    Of a large vector about 0.25 % is sampled, at least 2^14 elements.
    """
    n = residual.size
    plan = sample_plan(n, max(1, math.ceil(density * n)), step)
    if plan is not None:
        residual, gradient = sample(residual, plan), None if gradient is None else sample(gradient, plan)
    p = backlog_of(residual, gradient)
    return ranked(p, max(1, math.ceil(density * p.size))) if n else 0.0


def scatter_add(messages: Sequence[tuple[Indices, Vector]], out: Vector) -> None:
    """Add sparse vectors one after the other; the indices of each are distinct."""
    for index, values in messages:
        out[index] += values


def is_ascending(index: Indices, n: int) -> bool:
    """Whether indices are distinct, ascending and below n."""
    return bool((index[1:] > index[:-1]).all() and (index.size == 0 or index[-1] < n))


# One bit an element


def sum_magnitudes(residual: Vector, gradient: Vector | None) -> float:
    """Σ \\|residual + gradient\\|; NaN or infinite if an element is, or if four of them exceed float32."""
    with np.errstate(all="ignore"):
        return lane_sum(np.abs(backlog_of(residual, gradient)))


def sum_by_sign(residual: Vector, gradient: Vector | None) -> tuple[float, float, int]:
    """Of residual + gradient: the sum of the elements ≥ 0, of all others, and the number of elements ≥ 0."""
    with np.errstate(all="ignore"):
        p = backlog_of(residual, gradient)
        above = p >= 0
        zero = F32(0)
        return (
            lane_sum(np.where(above, p, zero)),
            lane_sum(np.where(above, zero, p)),
            int(np.count_nonzero(above)),
        )


def pack_signs(x: Vector) -> Octets:
    """The bits of a vector."""
    return np.packbits(x >= 0)


def pack_signs_feedback(
    residual: Vector, gradient: Vector | None, out: Vector, plus: float, minus: float, bits: Octets
) -> None:
    """Write the bits of p = residual + gradient to ``bits``, p − ``plus`` to ``out`` where p ≥ 0, else p − ``minus``.

    ``out`` may be ``residual``.
    """
    p = backlog_of(residual, gradient)
    above = p >= 0
    bits[...] = np.packbits(above)
    out[...] = p - np.where(above, F32(plus), F32(minus))


def add_signs(messages: Sequence[tuple[Octets, float, float]], out: Vector, fresh: bool = False) -> None:
    """Add 1-bit messages (bits, plus, minus) one after the other; ``fresh`` memory is treated as zeros."""
    if fresh:
        out[...] = 0
    for bits, plus, minus in messages:
        out += np.where(np.unpackbits(bits, count=out.size).view(bool), F32(plus), F32(minus))


def majority(messages: Sequence[Octets], n: int) -> Octets:
    """The majority vote of each bit; 1 for a tie."""
    votes = np.zeros(n, "i4")
    for bits in messages:
        votes += np.unpackbits(bits, count=n)
    return np.packbits(2 * votes >= len(messages))


# Two bits an element


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


# Index codes


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


# Randomised rounding


def uniforms(key: int, n: int) -> Vector:
    """Numbers in [0, 1), multiples of 2^-24; element i is a hash of i and a 32-bit key.

    The hash is a 32-bit finaliser of two multiplications and three shifts (Wellons, "hash prospector", 2018).
    """
    word = np.arange(n, dtype="u4") ^ np.uint32(key)
    with np.errstate(over="ignore"):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            word ^= word >> np.uint32(shift)
            word *= np.uint32(factor)
    word ^= word >> np.uint32(16)
    return (word >> np.uint32(8)).astype("f4") * F32(2.0**-24)


def key_of(seed: int, step: int) -> int:
    """A 32-bit key."""
    return (seed * 0x9E3779B1 + step * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF


def cell_indices(n: int, k: int, key: int) -> Indices:
    """k of n indices at random: one in each of k cells of almost equal length."""
    begin = np.arange(k + 1, dtype="u8") * np.uint64(n) // np.uint64(max(k, 1))
    within = (uniforms(key, k) * F32(2.0**24)).astype("u8") * np.diff(begin) >> np.uint64(24)
    return (begin[:-1] + within).astype("u4")


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
