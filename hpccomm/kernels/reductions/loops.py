"""The compiled reductions: one source for all operations and dtypes, specialised at the first request."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import register_jitable

from hpccomm.kernels.intrinsics import (
    HALF_INSTRUCTIONS,
    STACK_ELEMENTS,
    bits,
    element,
    field,
    float_of,
    float_to_half,
    half_to_float,
    set_element,
    set_field,
    stack_buffer,
)
from hpccomm.kernels.reductions.reference import INDEX, PAIRS, VALUE


@register_jitable
def minimum(a, b):
    return a if a <= b or a != a else b  # noqa: PLR0124


@register_jitable
def maximum(a, b):
    return a if a >= b or a != a else b  # noqa: PLR0124


@register_jitable
def logical_and(a, b):
    return (a != 0) & (b != 0)


@register_jitable
def logical_or(a, b):
    return (a != 0) | (b != 0)


@register_jitable
def logical_xor(a, b):
    return (a != 0) ^ (b != 0)


COMBINE = {
    "sum": operator.add,
    "prod": operator.mul,
    "min": minimum,
    "max": maximum,
    "land": logical_and,
    "lor": logical_or,
    "lxor": logical_xor,
    "band": operator.and_,
    "bor": operator.or_,
    "bxor": operator.xor,
}


@register_jitable
def pass_through(a):
    return a


U32, F32 = np.uint32, np.float32


@register_jitable
def from_bfloat16(word):
    return float_of(U32(U32(word) << U32(16)))


@register_jitable
def to_bfloat16(value):
    word = bits(value)
    high = U32(word >> U32(16))
    rounded = U32(U32(word + U32(0x7FFF)) + (high & U32(1))) >> U32(16)
    return high | U32(0x40) if value != value else rounded  # noqa: PLR0124


@register_jitable
def from_half(word):
    magnitude = U32(U32(word) & U32(0x7FFF)) << U32(13)
    scaled = bits(float_of(U32(magnitude)) * F32(2.0**112))
    special = U32(0x7F800000) if magnitude >= U32(0x0F800000) else U32(0)
    return float_of(U32(scaled | special | U32(U32(U32(word) & U32(0x8000)) << U32(16))))


@register_jitable
def to_half(value):
    word = bits(value)
    sign = U32(word & U32(0x80000000))
    magnitude = U32(word ^ sign)
    # 0.5 has the ulp of the smallest half: adding 0.5 rounds a subnormal at the right bit
    tiny = U32(bits(float_of(magnitude) + F32(0.5)) - U32(0x3F000000))
    odd = U32(U32(magnitude >> U32(13)) & U32(1))
    normal = U32(U32(magnitude - U32(0x38000000)) + U32(0xFFF) + odd) >> U32(13)
    finite = tiny if magnitude < U32(0x38800000) else normal
    huge = U32(0x7E00) if magnitude > U32(0x7F800000) else U32(0x7C00)
    return U32(huge if magnitude >= U32(0x47800000) else finite) | U32(sign >> U32(16))


@register_jitable
def widen(word):
    return half_to_float(word)


@register_jitable
def narrow(value):
    return float_to_half(value)


STORAGE: dict[str, tuple[Any, Callable[..., Any], Callable[..., Any]]] = {
    "f2": (types.uint16, widen, narrow) if HALF_INSTRUCTIONS else (types.uint16, from_half, to_half),
    "bf16": (types.uint16, from_bfloat16, to_bfloat16),
    "b1": (types.uint8, pass_through, pass_through),
}
"""Element type in memory and the functions that read and write it, for dtypes that need a conversion."""


def __getattr__(name: str) -> Callable[..., None]:
    """The loop ``sum_f8`` and so on, for :func:`hpccomm.kernels.intrinsics.fold`, with its signature."""
    op, _, code = name.partition("_")
    if op in PRECEDES:
        return pair_reduction(PRECEDES[op], PAIRS[code])
    if op not in COMBINE:
        raise AttributeError(name)
    kind, read, write = STORAGE.get(code) or (numba.from_dtype(np.dtype(code)), pass_through, pass_through)
    loop: Any = reduction(COMBINE[op], read, write)
    loop.signature = signature_of(kind)
    return loop  # type: ignore[no-any-return]


def signature_of(kind: Any) -> Any:
    """The signature of reductions of elements of one kind."""
    vectors = types.CPointer(types.CPointer(kind))
    return types.void(vectors, types.int64, types.int64, types.CPointer(kind), types.int64)


def reduction(combine: Callable[..., Any], read: Callable[..., Any], write: Callable[..., Any]) -> Callable[..., None]:
    """The loop: two or four vectors at once, else through the stack, so that ``out`` may be one of the sources."""

    def reduce(sources, k, first, out, n):  # type: ignore[no-untyped-def]
        if n <= 0:
            return
        if k == 2:
            a, b = sources[0], sources[1]
            for i in range(n):
                set_element(out, i, write(combine(read(element(a, first + i)), read(element(b, first + i)))))
            return
        if k == 4:
            a, b, c, d = sources[0], sources[1], sources[2], sources[3]
            for i in range(n):
                j = first + i
                three = combine(combine(read(element(a, j)), read(element(b, j))), read(element(c, j)))
                set_element(out, i, write(combine(three, read(element(d, j)))))
            return
        part = stack_buffer(read(sources[0][first]))
        for lo in range(0, n, STACK_ELEMENTS):
            m = min(STACK_ELEMENTS, n - lo)
            begin = first + lo
            a, b = sources[0], sources[1]
            for i in range(m):
                part[i] = combine(read(a[begin + i]), read(b[begin + i]))
            for j in range(2, k):
                c = sources[j]
                for i in range(m):
                    part[i] = combine(part[i], read(c[begin + i]))
            for i in range(m):
                out[lo + i] = write(part[i])

    return reduce


PRECEDES = {"minloc": register_jitable(operator.lt), "maxloc": register_jitable(operator.gt)}


def pair_reduction(precedes: Callable[..., Any], pair: np.dtype[Any]) -> Callable[..., None]:
    """The loop over pairs of a value and an index; bytes between their fields are neither read nor written."""
    size, at, kind = pair.itemsize, pair.fields[INDEX][1], numba.from_dtype(pair.fields[VALUE][0])  # type: ignore[index]

    def reduce(sources, k, first, out, n):  # type: ignore[no-untyped-def]
        for i in range(n):
            here = (first + i) * size
            value, index = field(sources[0] + here, kind), field(sources[0] + here + at, types.intc)
            for j in range(1, k):
                other, place = field(sources[j] + here, kind), field(sources[j] + here + at, types.intc)
                nan = (value != value) & (other == other)  # noqa: PLR0124
                better = precedes(other, value) | ((other != other) & (value == value))  # noqa: PLR0124
                before = better | (~(precedes(value, other) | nan) & (place < index))
                value, index = (other, place) if before else (value, index)
            set_field(out + i * size, value)
            set_field(out + i * size + at, index)

    loop: Any = reduce
    loop.signature = types.void(types.CPointer(types.int64), *[types.int64] * 4)
    return loop  # type: ignore[no-any-return]
