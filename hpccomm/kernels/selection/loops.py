"""The hot loops of :mod:`hpccomm.kernels.selection.compiled`.

A selecting loop stops when its buffer of ``CAPACITY`` indices is nearly full and returns their number; ``state`` holds
the position at which to continue, and whether there was a NaN or an infinity.  A buffer for as many indices as there
are elements would be new memory in every call: the first write to a page of 2 MB costs more than a pass over a million
elements.
"""

from __future__ import annotations

import numpy as np
from numba import carray
from numba.extending import register_jitable

from hpccomm.kernels.compiler import loop
from hpccomm.kernels.intrinsics import bits, float_of
from hpccomm.kernels.simd import (
    LANES,
    address_of,
    choose,
    floats,
    greater_equal,
    hold,
    load,
    longs,
    lowest_bit,
    magnitude,
    not_less,
    popcount,
    splat,
    store,
    words,
)
from hpccomm.kernels.vectors.loops import GROUP, INFINITY, is_finite, maximum, round_down, sum_at, sum_from

F32, F64, I64, U32, U64 = np.float32, np.float64, np.int64, np.uint32, np.uint64

CAPACITY = 1 << 14
"""Most indices that a loop returns."""

SMALLEST_SUBNORMAL = F32(2.0**-149)
"""The smallest magnitude that is not 0."""

BISECTION_SIZE = 1 << 12
"""Up to so many elements bisection finds the rank."""

INFINITY_BITS = U32(0x7F800000)
"""The bits of infinity."""

MAX_RANK = 112
"""Up to this rank the search is among the elements that reach a bound: the magnitude of this rank of 128 maxima."""


@register_jitable
def write_state(state, position, odd):
    """Record the position at which to continue, and whether an element was not finite."""
    longs(state)[0] = position
    if odd:
        longs(state)[1] = 1


@loop("int64(int64, int64, int64, float32, int64, int64, int64)")
def threshold_words(residual, gradient, out, tau, found, n, state):
    to = words(found)
    i, end = longs(state)[0], round_down(n)
    count = 0
    odd = False
    high, low, zero = splat(tau), splat(-tau), splat(F32(0))
    while i < end and count <= CAPACITY - GROUP:
        a, b = sum_from(residual, gradient, i), sum_from(residual, gradient, i + 16)
        c, d = sum_from(residual, gradient, i + 32), sum_from(residual, gradient, i + 48)
        pa, pb, pc, pd = greater_equal(a, high), greater_equal(b, high), greater_equal(c, high), greater_equal(d, high)
        ma, mb, mc, md = not_less(low, a), not_less(low, b), not_less(low, c), not_less(low, d)
        store(out + 4 * i, a - choose(pa, high, choose(ma, low, zero)))
        store(out + 4 * (i + 16), b - choose(pb, high, choose(mb, low, zero)))
        store(out + 4 * (i + 32), c - choose(pc, high, choose(mc, low, zero)))
        store(out + 4 * (i + 48), d - choose(pd, high, choose(md, low, zero)))
        minus = ma | mb << U64(16) | mc << U64(32) | md << U64(48)
        mask = minus | pa | pb << U64(16) | pc << U64(32) | pd << U64(48)
        while mask:
            j = lowest_bit(mask)
            rest = floats(out)[i + j]
            if not is_finite(rest):
                odd = True
            to[count] = U32((i + j) << 1) | U32(minus >> U64(j) & U64(1))
            count += 0 if np.isnan(rest) else 1
            mask &= mask - U64(1)
        i += GROUP
    while end <= i < n and count < CAPACITY:
        p = sum_at(residual, gradient, i)
        if not is_finite(p):
            odd = True
        rest = p
        if p >= tau:
            to[count] = U32(i << 1)
            count += 1
            rest = p - tau
        elif p <= -tau:
            to[count] = U32(i << 1 | 1)
            count += 1
            rest = p + tau
        floats(out)[i] = rest
        i += 1
    write_state(state, i, odd)
    return count


@register_jitable
def mask_of_large(a, b, c, d, limit):
    """The mask of 64 magnitudes that reach a limit, NaN included: few elements are then checked for being finite."""
    return (
        not_less(magnitude(a), limit)
        | not_less(magnitude(b), limit) << U64(16)
        | not_less(magnitude(c), limit) << U64(32)
        | not_less(magnitude(d), limit) << U64(48)
    )


@loop("int64(int64, float32, int64, int64, int64)")
def select_threshold(x, threshold, found, n, state):
    to = words(found)
    i, end = longs(state)[0], round_down(n)
    count = 0
    odd = False
    least = max(threshold, SMALLEST_SUBNORMAL)
    limit = splat(least)
    while i < end and count <= CAPACITY - GROUP:
        at = x + 4 * i
        a, b, c, d = load(at), load(at + 64), load(at + 128), load(at + 192)
        mask = mask_of_large(a, b, c, d, limit)
        while mask:
            j = i + lowest_bit(mask)
            value = floats(x)[j]
            if not is_finite(value):
                odd = True
            to[count] = U32(j)
            count += 0 if np.isnan(value) else 1
            mask &= mask - U64(1)
        i += GROUP
    while end <= i < n and count < CAPACITY:
        value = floats(x)[i]
        if not is_finite(value):
            odd = True
        if abs(value) >= least:
            to[count] = U32(i)
            count += 1
        i += 1
    write_state(state, i, odd)
    return count


@register_jitable
def accumulate_group(gradient, momentum, velocity, factor, nesterov, limit):
    """Update momentum and velocity; returns the mask of velocities that reach the limit or are NaN."""
    mask = U64(0)
    for j in range(0, GROUP, LANES):
        g, u, v = load(gradient + 4 * j), load(momentum + 4 * j), load(velocity + 4 * j)
        if nesterov:
            u = (u + g) * factor
            v = (v + u) + g
        else:
            u = u * factor + g
            v = v + u
        mask |= not_less(magnitude(v), limit) << U64(j)
        store(momentum + 4 * j, u)
        store(velocity + 4 * j, v)
    return mask


@register_jitable
def take_element(i, count, momentum, velocity, clear, index, values, kept_momentum):
    """Record element i and clear it."""
    words(index)[count] = U32(i)
    floats(values)[count] = floats(velocity)[i]
    floats(kept_momentum)[count] = floats(momentum)[i]
    floats(velocity)[i] = F32(0)
    if clear:
        floats(momentum)[i] = F32(0)


@loop("int64(int64, int64, int64, float32, float32, int64, int64, int64, int64, int64, int64, int64)")
def momentum_select(
    gradient, momentum, velocity, m, threshold, nesterov, clear, index, values, kept_momentum, n, state
):
    i, end = longs(state)[0], round_down(n)
    count = 0
    odd = False
    least = max(threshold, SMALLEST_SUBNORMAL)
    limit, factor = splat(least), splat(m)
    while i < end and count <= CAPACITY - GROUP:
        mask = accumulate_group(gradient + 4 * i, momentum + 4 * i, velocity + 4 * i, factor, nesterov, limit)
        while mask:
            j = i + lowest_bit(mask)
            if is_finite(floats(velocity)[j]):
                take_element(j, count, momentum, velocity, clear, index, values, kept_momentum)
                count += 1
            else:
                odd = True
            mask &= mask - U64(1)
        i += GROUP
    g, u, v = floats(gradient), floats(momentum), floats(velocity)
    while end <= i < n and count < CAPACITY:
        if nesterov:
            u[i] = (u[i] + g[i]) * m
            v[i] = (v[i] + u[i]) + g[i]
        else:
            u[i] = u[i] * m + g[i]
            v[i] = v[i] + u[i]
        if not is_finite(v[i]):
            odd = True
        elif abs(v[i]) >= least:
            take_element(i, count, momentum, velocity, clear, index, values, kept_momentum)
            count += 1
        i += 1
    write_state(state, i, odd)
    return count


@loop("void(int64, int64, int64, int64)")
def sample(x, stride, lines, to):
    for j in range(lines):
        store(to + 64 * j, load(x + 4 * j * stride))


@loop("void(int64, int64, int64, float32, int64, int64, int64, int64)")
def sample_velocity(gradient, momentum, velocity, m, nesterov, stride, lines, to):
    factor = splat(m)
    for j in range(lines):
        at = 4 * j * stride
        g, u, v = load(gradient + at), load(momentum + at), load(velocity + at)
        store(to + 64 * j, (v + (u + g) * factor) + g if nesterov else v + (u * factor + g))


@register_jitable
def word_of(x):
    """The bits of a magnitude, which sort as the magnitudes do."""
    return U32(bits(x) & U32(0x7FFFFFFF))


@register_jitable
def find_bin(counts, part, rank):
    """The bin, from the given one down, that contains the rank, and the rank within the bin."""
    while counts[part] < rank:
        rank -= I64(counts[part])
        part -= 1
    return part, rank


@loop("float64(int64, int64, int64)")
@register_jitable
def kth_magnitude(x, n, rank):
    if n <= BISECTION_SIZE:
        return bisect_magnitude(x, n, rank)
    few = np.empty(BISECTION_SIZE, np.float32)
    count = find_candidates(x, n, rank, few) if rank <= MAX_RANK else n
    found = bisect_magnitude(address_of(few), count, rank) if count <= BISECTION_SIZE else radix_select(x, n, rank)
    hold(few)
    return found


@register_jitable
def find_candidates(x, n, rank, found):
    """Collect all elements of this rank and above, with some others, at most ``found.size``; returns their number.

    As many of the maxima of 128 disjoint subsets as the rank reach the maximum of that rank, so an element that does
    not reach it ranks lower.
    """
    a = b = c = d = e = f = g = h = splat(F32(0))
    for i in range(0, n - n % 128, 128):
        at = x + 4 * i
        a, b = maximum(a, magnitude(load(at))), maximum(b, magnitude(load(at + 64)))
        c, d = maximum(c, magnitude(load(at + 128))), maximum(d, magnitude(load(at + 192)))
        e, f = maximum(e, magnitude(load(at + 256))), maximum(f, magnitude(load(at + 320)))
        g, h = maximum(g, magnitude(load(at + 384))), maximum(h, magnitude(load(at + 448)))
    to = address_of(found)
    for at, each in ((0, a), (64, b), (128, c), (192, d), (256, e), (320, f), (384, g), (448, h)):
        store(to + at, each)
    least = F32(bisect_magnitude(to, 128, rank))
    limit, count = splat(least), 0
    end = n - n % LANES
    for i in range(0, end, LANES):
        mask = not_less(magnitude(load(x + 4 * i)), limit)
        while mask:
            if count < found.size:
                found[count] = floats(x)[i + lowest_bit(mask)]
            count += 1
            mask &= mask - U64(1)
    for i in range(end, n):
        if not abs(floats(x)[i]) < least:
            if count < found.size:
                found[count] = floats(x)[i]
            count += 1
    return count


@register_jitable
def bisect_magnitude(x, n, rank):
    """The largest magnitude that at least ``rank`` elements reach, found bit by bit; NaN reaches every magnitude."""
    top = U32(0)
    for bit in range(30, -1, -1):
        trial = U32(top | U32(1 << bit))
        if trial <= INFINITY_BITS and count_reaching(x, n, float_of(trial)) >= rank:
            top = trial
    if top == INFINITY_BITS:
        numbers = 0
        for i in range(n):
            numbers += abs(floats(x)[i]) <= INFINITY
        if n - numbers >= rank:
            return F64(np.nan)
    return F64(float_of(top))


@register_jitable
def count_reaching(x, n, least):
    """The number of magnitudes that reach this one or are NaN."""
    limit, count = splat(least), 0
    end = n - n % LANES
    for i in range(0, end, LANES):
        count += popcount(not_less(magnitude(load(x + 4 * i)), limit))
    for i in range(end, n):
        count += 0 if abs(floats(x)[i]) < least else 1
    return count


@register_jitable
def radix_select(x, n, rank):
    """Find the magnitude of a rank by its bits: the highest 11 of all, then twice 10 of those equal in the higher bits.

    Four tables count in turn, because the increments of one table would wait for each other.
    """
    a = carray(floats(x), n)
    tables = np.zeros((4, 2048), np.int64)
    end = n - n % 16
    for i in range(0, end, 4):
        tables[0, word_of(a[i]) >> U32(20)] += 1
        tables[1, word_of(a[i + 1]) >> U32(20)] += 1
        tables[2, word_of(a[i + 2]) >> U32(20)] += 1
        tables[3, word_of(a[i + 3]) >> U32(20)] += 1
    for i in range(end, n):
        tables[0, word_of(a[i]) >> U32(20)] += 1
    counts = tables[0]
    for part in range(2048):
        counts[part] += tables[1, part] + tables[2, part] + tables[3, part]
    part, rank = find_bin(counts, 2047, rank)
    alike, count = np.empty(counts[part], np.uint32), 0
    limit = splat(float_of(U32(part << 20)))
    for i in range(0, end, 16):
        mask = not_less(magnitude(load(x + 4 * i)), limit)
        while mask:
            word = word_of(a[i + lowest_bit(mask)])
            if word >> U32(20) == part:
                alike[count] = word
                count += 1
            mask &= mask - U64(1)
    for i in range(end, n):
        word = word_of(a[i])
        if word >> U32(20) == part:
            alike[count] = word
            count += 1
    prefix = U32(part)
    for shift in (10, 0):
        counts[:1024] = 0
        for word in alike:
            if word >> U32(shift + 10) == prefix:
                counts[word >> U32(shift) & U32(1023)] += 1
        part, rank = find_bin(counts, 1023, rank)
        prefix = U32(prefix << U32(10)) | U32(part)
    return F64(float_of(prefix))


@register_jitable
def split_by_rank(values, count, k, chosen, dropped):
    """The positions of the k largest values, of equal ones the first, and the positions of the others.

    The loop has no branches, because half of them would be mispredicted.
    """
    least = F32(kth_magnitude(values, count, k)) if k else INFINITY
    above = 0
    for i in range(count):
        above += abs(floats(values)[i]) > least
    alike, c, d = k - above, 0, 0
    for i in range(count):
        size = abs(floats(values)[i])
        first = (size == least) & (alike > 0)
        alike -= first
        chosen[c] = dropped[d] = i
        c += (size > least) | first
        d = i + 1 - c


@loop("void(int64, int64, int64, int64)")
def keep_largest_at(x, index, count, k):
    """Move the indices of the k largest elements to the front."""
    values = np.empty(count, np.float32)
    for i in range(count):
        values[i] = floats(x)[words(index)[i]]
    chosen, dropped = np.empty(count + 1, np.int64), np.empty(count + 1, np.int64)
    split_by_rank(address_of(values), count, k, chosen, dropped)
    hold(values)
    for i in range(k):
        words(index)[i] = words(index)[chosen[i]]


@loop("void(int64, int64, int64, int64, int64, int64, int64)")
def keep_largest_taken(index, values, kept_momentum, count, k, momentum, velocity):
    """Move the k largest selected elements to the front and put the others back."""
    chosen, dropped = np.empty(count + 1, np.int64), np.empty(count + 1, np.int64)
    split_by_rank(values, count, k, chosen, dropped)
    for i in range(count - k):
        place = words(index)[dropped[i]]
        floats(velocity)[place] = floats(values)[dropped[i]]
        floats(momentum)[place] = floats(kept_momentum)[dropped[i]]
    for i in range(k):
        words(index)[i], floats(values)[i] = words(index)[chosen[i]], floats(values)[chosen[i]]


@loop("void(int64, int64, int64, int64)")
def scatter_add(index, values, count, out):
    to = floats(out)
    for j in range(count):
        to[words(index)[j]] += floats(values)[j]


@loop("void(int64, int64, float32, int64)")
def add_words(found, count, tau, out):
    to = floats(out)
    for j in range(count):
        word = words(found)[j]
        to[word >> U32(1)] += -tau if word & U32(1) else tau
