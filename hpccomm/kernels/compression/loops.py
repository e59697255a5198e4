"""The hot loops of :mod:`hpccomm.kernels.compression.compiled`, compiled by Numba at the first call.

Arguments are addresses, lengths and numbers; address 0 means no vector.  Most loops process 64 elements at a time: four
SIMD vectors, and a mask of 64 bits for the comparison.  A pass then costs no more than its memory traffic while few
elements are selected.

A selecting loop stops when its buffer of ``CAPACITY`` indices is nearly full and returns their number; ``state`` holds
the position at which to continue, and whether there was a NaN or an infinity.  A buffer for as many indices as there
are elements would be new memory in every call: the first write to a page of 2 MB costs more than a pass over a million
elements.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import carray
from numba.extending import register_jitable

from hpccomm.kernels.compiler import compile_cached, jit
from hpccomm.kernels.compression.reference import LEAST_NORM, LONGEST_QUOTIENT
from hpccomm.kernels.intrinsics import bits, element, float_of, set_element
from hpccomm.kernels.reductions import loops as folds
from hpccomm.kernels.simd import (
    add_square,
    address_of,
    choose,
    compiler_fence,
    copy_reversed,
    doubles,
    floats,
    fma,
    greater_equal,
    halves,
    hold,
    load,
    load_bits,
    load_mask,
    longs,
    lower_half,
    lowest_bit,
    magnitude,
    not_less,
    octets,
    popcount,
    reduce_add,
    rint,
    signed_octets,
    splat,
    store,
    store_bits,
    upper_half,
    words,
    zero_doubles,
)

F32, F64, U32, U64, I64 = np.float32, np.float64, np.uint32, np.uint64, np.int64
GROUP = 64
"""Elements of one mask."""
CHECK_INTERVAL = 1 << 13
"""Elements between two checks that all were finite."""
CAPACITY = 1 << 14
"""Most indices that a loop returns."""
PAIR_HIGH_BITS = U64(0xAAAAAAAAAAAAAAAA)
"""The higher bit of each pair of bits."""
INFINITY = F32(np.inf)
SMALLEST_SUBNORMAL = F32(2.0**-149)
"""The smallest magnitude that is not 0."""
LANES = 16
"""Elements of a vector."""

SOURCES: dict[str, tuple[str, Callable[..., Any]]] = {}


def loop(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function; :func:`machine_code` compiles it for these types."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        SOURCES[function.__name__] = signature, function
        return function

    return note


@cache
def machine_code(name: str) -> Any:
    """A loop, compiled at the first request."""
    signature, function = SOURCES[name]
    dispatcher = compile_cached(jit, function, name)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    (only,) = dispatcher.overloads.values()
    return only.entry_point


# Elements one by one


@register_jitable
def round_down(n):
    """The elements of all whole groups."""
    return n - n % GROUP


@register_jitable
def sum_at(a, b, i):
    """Element i of a + b, or of a if there is no b."""
    return floats(a)[i] + floats(b)[i] if b else floats(a)[i]


@register_jitable
def sum_from(a, b, i):
    """Sixteen elements of a + b, or of a if there is no b."""
    return load(a + 4 * i) + load(b + 4 * i) if b else load(a + 4 * i)


@register_jitable
def is_finite(x):
    return abs(x) < INFINITY


@register_jitable
def zero_or_nan(x):
    """0 in each lane, NaN in lanes of a NaN or an infinity."""
    return x - x


@loop("int64(int64, int64)")
def all_finite(x, n):
    end = round_down(n)
    zero = splat(F32(0))
    for begin in range(0, end, CHECK_INTERVAL):
        a = b = c = d = zero
        for i in range(begin, min(end, begin + CHECK_INTERVAL), GROUP):
            at = x + 4 * i
            a, b = a + zero_or_nan(load(at)), b + zero_or_nan(load(at + 64))
            c, d = c + zero_or_nan(load(at + 128)), d + zero_or_nan(load(at + 192))
        if greater_equal((a + b) + (c + d), zero) != U64(0xFFFF):
            return 0
    for i in range(end, n):
        if not is_finite(floats(x)[i]):
            return 0
    return 1


@loop("float64(int64, int64)")
def largest_magnitude(x, n):
    a = carray(floats(x), n)
    top = U32(0)
    for i in range(n):
        top = max(top, U32(bits(a[i]) & U32(0x7FFFFFFF)))
    return F64(float_of(top))


# Threshold and selection


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


BISECTION_SIZE = 1 << 12
"""Up to so many elements bisection finds the rank."""
INFINITY_BITS = U32(0x7F800000)
"""The bits of infinity."""
MAX_RANK = 112
"""Up to this rank the search is among the elements that reach a bound: the magnitude of this rank of 128 maxima."""


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


@loop("int64(int64, int64, int64)")
def is_ascending(index, n, count):
    a = carray(words(index), count)
    wrong = False
    for i in range(1, count):
        wrong |= a[i] <= a[i - 1]
    return 0 if wrong or (count and a[count - 1] >= n) else 1


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


# Sums: 64 lanes of float64 in eight vectors


@register_jitable
def sum_lanes(a, b, c, d, e, f, g, h):
    """The sum of all lanes, by halves."""
    return reduce_add(((a + e) + (c + g)) + ((b + f) + (d + h)))


@register_jitable
def pad_tail(residual, gradient, begin, n, to):
    """Copy the last, incomplete block of residual + gradient, padded with zeros; returns its address."""
    for j in range(to.size):
        to[j] = sum_at(residual, gradient, begin + j) if begin + j < n else F32(0)
    return address_of(to)


@register_jitable
def four_lines(x, y):
    """Four lines of residual + gradient, one after the other."""
    compiler_fence()
    return sum_from(x, y, 0), sum_from(x, y, 16), sum_from(x, y, 32), sum_from(x, y, 48)


@register_jitable
def four_columns(x, y):
    """Four rows of 64 elements, read in the order of memory: the four lines of each column."""
    a, b = four_lines(x, y), four_lines(x + 256, advance(y, 64))
    c, d = four_lines(x + 512, advance(y, 128)), four_lines(x + 768, advance(y, 192))
    return (a[0], b[0], c[0], d[0]), (a[1], b[1], c[1], d[1]), (a[2], b[2], c[2], d[2]), (a[3], b[3], c[3], d[3])


@register_jitable
def four_magnitudes(a, b, c, d):
    """(a + b) + (c + d)."""
    return (magnitude(a) + magnitude(b)) + (magnitude(c) + magnitude(d))


@register_jitable
def advance(address, elements):
    """Advance an address by a number of elements; 0 stays 0."""
    return address + 4 * elements if address else 0


@loop("float64(int64, int64, int64)")
def sum_magnitudes(residual, gradient, n):
    tail = np.empty(4 * GROUP, np.float32)
    a = b = c = d = e = f = g = h = zero_doubles()
    for i in range(0, n, 4 * GROUP):
        x, y = residual + 4 * i, advance(gradient, i)
        if i + 4 * GROUP > n:
            x, y = pad_tail(residual, gradient, i, n, tail), 0
        first, second, third, fourth = four_columns(x, y)
        p, q = four_magnitudes(*first), four_magnitudes(*second)
        r, s = four_magnitudes(*third), four_magnitudes(*fourth)
        a, b, c, d = a + lower_half(p), b + upper_half(p), c + lower_half(q), d + upper_half(q)
        e, f, g, h = e + lower_half(r), f + upper_half(r), g + lower_half(s), h + upper_half(s)
    return sum_lanes(a, b, c, d, e, f, g, h)


@register_jitable
def four_by_sign(a, b, c, d):
    """(a + b) + (c + d) of the elements ≥ 0 and of all others; and the number of elements ≥ 0."""
    zero = splat(F32(0))
    ma, mb, mc, md = greater_equal(a, zero), greater_equal(b, zero), greater_equal(c, zero), greater_equal(d, zero)
    plus = (choose(ma, a, zero) + choose(mb, b, zero)) + (choose(mc, c, zero) + choose(md, d, zero))
    minus = (choose(ma, zero, a) + choose(mb, zero, b)) + (choose(mc, zero, c) + choose(md, zero, d))
    return plus, minus, popcount(ma | mb << U64(16) | mc << U64(32) | md << U64(48))


@loop("int64(int64, int64, int64, int64)")
def sum_by_sign(residual, gradient, sums, n):
    tail = np.empty(4 * GROUP, np.float32)
    count = 0
    a = b = c = d = e = f = g = h = zero_doubles()
    k = l = m = o = t = u = v = w = zero_doubles()  # noqa: E741
    for i in range(0, n, 4 * GROUP):
        x, y = residual + 4 * i, advance(gradient, i)
        if i + 4 * GROUP > n:
            x, y = pad_tail(residual, gradient, i, n, tail), 0
            count -= i + 4 * GROUP - n
        first, second, third, fourth = four_columns(x, y)
        (pp, pm, pn), (qp, qm, qn) = four_by_sign(*first), four_by_sign(*second)
        (rp, rm, rn), (sp, sm, sn) = four_by_sign(*third), four_by_sign(*fourth)
        count += pn + qn + rn + sn
        a, b, c, d = a + lower_half(pp), b + upper_half(pp), c + lower_half(qp), d + upper_half(qp)
        e, f, g, h = e + lower_half(rp), f + upper_half(rp), g + lower_half(sp), h + upper_half(sp)
        k, l, m, o = k + lower_half(pm), l + upper_half(pm), m + lower_half(qm), o + upper_half(qm)  # noqa: E741
        t, u, v, w = t + lower_half(rm), u + upper_half(rm), v + lower_half(sm), w + upper_half(sm)
    doubles(sums)[0], doubles(sums)[1] = sum_lanes(a, b, c, d, e, f, g, h), sum_lanes(k, l, m, o, t, u, v, w)
    return count


@register_jitable
def sums_of(x, n, tail):
    """Σ x and Σ x²."""
    a = b = c = d = e = f = g = h = zero_doubles()
    k = l = m = o = t = u = v = w = zero_doubles()  # noqa: E741
    for i in range(0, n, GROUP):
        at = x + 4 * i
        if i + GROUP > n:
            at = pad_tail(x, 0, i, n, tail)
        p, q, r, s = load(at), load(at + 64), load(at + 128), load(at + 192)
        pl, pu, ql, qu = lower_half(p), upper_half(p), lower_half(q), upper_half(q)
        rl, ru, sl, su = lower_half(r), upper_half(r), lower_half(s), upper_half(s)
        a, b, c, d, e, f, g, h = a + pl, b + pu, c + ql, d + qu, e + rl, f + ru, g + sl, h + su
        k, l, m, o = add_square(k, pl), add_square(l, pu), add_square(m, ql), add_square(o, qu)  # noqa: E741
        t, u, v, w = add_square(t, rl), add_square(u, ru), add_square(v, sl), add_square(w, su)
    return sum_lanes(a, b, c, d, e, f, g, h), sum_lanes(k, l, m, o, t, u, v, w)


@loop("void(int64, int64, int64)")
def moments(x, sums, n):
    doubles(sums)[0], doubles(sums)[1] = sums_of(x, n, np.empty(GROUP, np.float32))


@loop("void(int64, int64, int64, int64)")
def bucket_norms(x, bucket, to, n):
    tail = np.empty(GROUP, np.float32)
    for number in range((n + bucket - 1) // bucket):
        begin = number * bucket
        floats(to)[number] = F32(np.sqrt(sums_of(x + 4 * begin, min(bucket, n - begin), tail)[1]))


# One bit


@register_jitable
def set_bit(to, i, yes):
    """Set bit i of bytes that were 0 at first."""
    if i % 8 == 0:
        to[i // 8] = 0
    if yes:
        to[i // 8] |= np.uint8(128 >> (i % 8))


@loop("void(int64, int64, int64)")
def pack_signs(x, to, n):
    end = round_down(n)
    zero = splat(F32(0))
    for i in range(0, end, GROUP):
        mask = U64(0)
        for j in range(0, GROUP, 16):
            mask |= greater_equal(load(x + 4 * (i + j)), zero) << U64(j)
        store_bits(to + i // 8, mask)
    for i in range(end, n):
        set_bit(octets(to), i, floats(x)[i] >= 0)


@loop("void(int64, int64, int64, float32, float32, int64, int64)")
def pack_signs_feedback(residual, gradient, out, plus, minus, to, n):
    end = round_down(n)
    zero, high, low = splat(F32(0)), splat(plus), splat(minus)
    for i in range(0, end, GROUP):
        mask = U64(0)
        for j in range(0, GROUP, LANES):
            p = sum_from(residual, gradient, i + j)
            above = greater_equal(p, zero)
            mask |= above << U64(j)
            store(out + 4 * (i + j), p - choose(above, high, low))
        store_bits(to + i // 8, mask)
    for i in range(end, n):
        p = sum_at(residual, gradient, i)
        set_bit(octets(to), i, p >= 0)
        floats(out)[i] = p - (plus if p >= 0 else minus)


LINE = 512
"""Elements of 64 bytes of bits."""


@loop("void(int64, int64, int64, int64, int64, int64, int64)")
def add_signs(addresses, plus, minus, k, fresh, out, n):
    nothing = splat(F32(0))
    turned = np.empty(64 * k, np.uint8)
    masks = address_of(turned)
    end = n - n % LINE
    for begin in range(0, end, LINE):
        for j in range(k):
            copy_reversed(longs(addresses)[j] + begin // 8, masks + 64 * j)
        for part in range(0, LINE, 128):
            at = out + 4 * (begin + part)
            a = b = c = d = e = f = g = h = nothing
            if not fresh:
                a, b, c, d = load(at), load(at + 64), load(at + 128), load(at + 192)
                e, f, g, h = load(at + 256), load(at + 320), load(at + 384), load(at + 448)
            for j in range(k):
                mask = masks + 64 * j + part // 8
                high, low = splat(floats(plus)[j]), splat(floats(minus)[j])
                a = a + choose(load_mask(mask), high, low)
                b = b + choose(load_mask(mask + 2), high, low)
                c = c + choose(load_mask(mask + 4), high, low)
                d = d + choose(load_mask(mask + 6), high, low)
                e = e + choose(load_mask(mask + 8), high, low)
                f = f + choose(load_mask(mask + 10), high, low)
                g = g + choose(load_mask(mask + 12), high, low)
                h = h + choose(load_mask(mask + 14), high, low)
            store(at, a)
            store(at + 64, b)
            store(at + 128, c)
            store(at + 192, d)
            store(at + 256, e)
            store(at + 320, f)
            store(at + 384, g)
            store(at + 448, h)
    hold(turned)
    for i in range(end, n):
        total = F32(0) if fresh else floats(out)[i]
        for j in range(k):
            yes = octets(longs(addresses)[j])[i // 8] >> (7 - i % 8) & 1
            total += floats(plus)[j] if yes else floats(minus)[j]
        floats(out)[i] = total


@loop("void(int64, int64, int64, int64)")
def majority(addresses, k, to, nbytes):
    for i in range(nbytes):
        result = 0
        for bit in range(8):
            votes = 0
            for j in range(k):
                votes += octets(longs(addresses)[j])[i] >> bit & 1
            result |= (1 if 2 * votes >= k else 0) << bit
        octets(to)[i] = result


# Two bits


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


# Index codes


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


# Narrow elements

_half_read, _half_write = folds.STORAGE["f2"][1:]
_bfloat16_read, _bfloat16_write = folds.STORAGE["bf16"][1:]


@register_jitable
def saturate(word, infinity):
    """Replace infinity by the largest finite value."""
    magnitude = np.uint16(word & np.uint16(0x7FFF))
    return np.uint16(word - np.uint16(1)) if magnitude == infinity else np.uint16(word)


@loop("void(int64, int64, int64, int64)")
def to_half(x, finite, to, n):
    a, b = floats(x), halves(to)
    if finite:
        for i in range(n):
            set_element(b, i, saturate(np.uint16(_half_write(element(a, i))), np.uint16(0x7C00)))
        return
    for i in range(n):
        set_element(b, i, np.uint16(_half_write(element(a, i))))


@loop("void(int64, int64, int64, int64)")
def to_bfloat16(x, finite, to, n):
    a, b = floats(x), halves(to)
    if finite:
        for i in range(n):
            set_element(b, i, saturate(np.uint16(_bfloat16_write(element(a, i))), np.uint16(0x7F80)))
        return
    for i in range(n):
        set_element(b, i, np.uint16(_bfloat16_write(element(a, i))))


@loop("void(int64, int64, int64)")
def add_half(x, out, n):
    a, b = halves(x), floats(out)
    for i in range(n):
        set_element(b, i, b[i] + _half_read(element(a, i)))


@loop("void(int64, int64, int64)")
def add_bfloat16(x, out, n):
    a, b = halves(x), floats(out)
    for i in range(n):
        set_element(b, i, b[i] + _bfloat16_read(element(a, i)))


@loop("void(int64, float32, int64, int64)")
def to_int8(x, unit, to, n):
    """Quotients with the rounding of a division, but without its cost, which exceeds all the rest.

    1/unit in two terms gives a quotient next to the true one, and with its exact remainder (Markstein, IBM Journal of
    Research and Development 34, 1990) the true one rounded; where neither can over- or underflow.
    """
    a, b = floats(x), signed_octets(to)
    if not F32(2.0**-60) <= unit <= F32(2.0**60):
        for i in range(n):
            set_element(b, i, np.int8(np.int32(max(F32(-127), min(F32(127), rint(element(a, i) / unit))))))
        return
    inverse, most = F32(1) / unit, F32(127) * unit
    rest = fma(-inverse, unit, F32(1)) * inverse
    for i in range(n):
        value = max(-most, min(most, element(a, i)))
        quotient = fma(value, inverse, value * rest)
        exact = fma(fma(-quotient, unit, value), inverse, quotient)
        set_element(b, i, np.int8(np.int32(rint(exact))))


@loop("void(int64, float32, int64, int64)")
def add_int8(codes, unit, out, n):
    a, b = signed_octets(codes), floats(out)
    for i in range(n):
        set_element(b, i, b[i] + F32(element(a, i)) * unit)


@loop("void(int64, int64, int64)")
def extremes(x, found, n):
    low = high = floats(x)[0]
    end = round_down(n)
    if end:
        a = b = c = d = e = f = g = h = splat(low)
        for i in range(0, end, GROUP):
            at = x + 4 * i
            p, q, r, s = load(at), load(at + 64), load(at + 128), load(at + 192)
            a, b, c, d = minimum(a, p), minimum(b, q), minimum(c, r), minimum(d, s)
            e, f, g, h = maximum(e, p), maximum(f, q), maximum(g, r), maximum(h, s)
        least, most = minimum(minimum(a, b), minimum(c, d)), maximum(maximum(e, f), maximum(g, h))
        lanes = np.empty(32, np.float32)
        store(address_of(lanes), least)
        store(address_of(lanes) + 64, most)
        low, high = lanes[:16].min(), lanes[16:].max()
    for i in range(end, n):
        low, high = min(low, floats(x)[i]), max(high, floats(x)[i])
    floats(found)[0], floats(found)[1] = low, high


@register_jitable
def minimum(a, b):
    return choose(greater_equal(b, a), a, b)


@register_jitable
def maximum(a, b):
    return choose(greater_equal(a, b), a, b)


@loop("void(int64, float32, float32, int64, int64)")
def range_codes(x, scale, most, to, n):
    a, b = floats(x), octets(to)
    least = most - F32(255)
    for i in range(n):
        code = min(rint(element(a, i) * scale), most) - least
        set_element(b, i, np.uint8(np.int32(max(F32(0), min(F32(255), code)))))


@loop("void(int64, float64, float64, int64, int64)")
def add_range(codes, scale, least, out, n):
    a, b = octets(codes), floats(out)
    for i in range(n):
        set_element(b, i, b[i] + F32((F64(element(a, i)) + least) / scale))


# Randomised rounding


@register_jitable
def uniform(i, key):
    """Element i of :func:`hpccomm.kernels.compression.reference.uniforms`."""
    return F32(uniform_word(i, key)) * F32(2.0**-24)


@register_jitable
def uniform_word(i, key):
    """Element i of ``uniforms``, times 2²⁴."""
    word = U32(U32(i) ^ key)
    word = U32(U32(word ^ (word >> U32(16))) * U32(0x7FEB352D))
    word = U32(U32(word ^ (word >> U32(15))) * U32(0x846CA68B))
    word = U32(word ^ (word >> U32(16)))
    return U32(word >> U32(8))


@loop("void(int64, int64, int64, int64, uint32, int64, int64)")
def qsgd(x, norms, bucket, levels, key, to, n):
    a, b = floats(x), signed_octets(to)
    most = F32(levels)
    for number in range((n + bucket - 1) // bucket):
        norm = floats(norms)[number]
        factor = most / norm if norm > LEAST_NORM else F32(0)
        for i in range(number * bucket, min(n, (number + 1) * bucket)):
            value = element(a, i)
            exact = abs(value) * factor
            level = np.int32(exact)
            level = np.int32(level + np.int32(uniform(i, key) < exact - F32(level)))
            level = min(level, np.int32(levels))
            set_element(b, i, np.int8(np.int32(-level) if value < 0 else level))


@loop("void(int64, uint32, int64, int64)")
def natural(x, key, to, n):
    """Compare u/2²⁴ < m/2²³ as u < 2m, in integers."""
    a, b = floats(x), octets(to)
    for i in range(n):
        word = bits(element(a, i))
        exponent = U32(U32(word >> U32(23)) & U32(255))
        exponent = U32(exponent + U32(uniform_word(i, key) < U32(U32(word & U32(0x7FFFFF)) << U32(1))))
        set_element(b, i, np.uint8(min(exponent, U32(254))))


@loop("void(int64, int64, int64, int64, int64, int64)")
def add_levels(codes, norms, bucket, levels, out, n):
    a, b = signed_octets(codes), floats(out)
    for number in range((n + bucket - 1) // bucket):
        unit = floats(norms)[number] / F32(levels)
        for i in range(number * bucket, min(n, (number + 1) * bucket)):
            set_element(b, i, b[i] + F32(element(a, i)) * unit)


@loop("void(int64, int64, int64, int64)")
def add_natural(exponents, signs, out, n):
    minus = np.empty(GROUP, np.uint32)
    b = floats(out)
    for begin in range(0, n, GROUP):
        end = min(GROUP, n - begin)
        for j in range(end):
            octet = octets(signs)[(begin + j) >> 3]
            minus[j] = U32(U32(~octet >> (7 - (j & 7))) & U32(1)) << U32(31)
        for j in range(end):
            power = U32(U32(octets(exponents)[begin + j]) << U32(23))
            b[begin + j] += float_of(U32(power | minus[j]))


@register_jitable(forceinline=True)
def ternary_codes(x, first, count, clip, scale, key, codes):
    """Codes: 2 minus, 3 plus, 0 not kept."""
    a, b = floats(x), octets(codes)
    for j in range(count):
        value = element(a, j)
        kept = uniform(U32(first + U32(j)), key) * scale < min(abs(value), clip)
        set_element(b, j, np.uint8(np.uint8(np.uint8(3) - np.uint8(value < 0)) * np.uint8(kept)))


@loop("int64(int64, float32, float32, uint32, int64, int64)")
def ternary(x, clip, scale, key, to, n):
    codes, packed = np.zeros(GROUP, np.uint8), np.zeros(GROUP // 4, np.uint8)
    at, four, high = address_of(codes), codes.view(np.uint32), packed.view(np.uint64)
    count = 0
    for begin in range(0, n, GROUP):
        if begin + GROUP <= n:
            ternary_codes(x + 4 * begin, U32(begin), GROUP, clip, scale, key, at)
        else:
            codes[:] = 0
            ternary_codes(x + 4 * begin, U32(begin), n - begin, clip, scale, key, at)
        for j in range(four.size):
            packed[j] = np.uint8(U32(four[j] * U32(0x40100401)) >> U32(24))
        count += popcount(high[0] & PAIR_HIGH_BITS) + popcount(high[1] & PAIR_HIGH_BITS)
        for j in range(min(GROUP, (n - begin + 15) // 16 * 16) // 4):
            octets(to)[begin // 4 + j] = packed[j]
    return count
