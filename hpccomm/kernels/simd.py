"""SIMD vectors of sixteen float32 or uint32 and of eight float64 as types of Numba, for loops over addresses.

A comparison returns a mask, a uint64 whose bit j belongs to lane j.  LLVM lowers it to instructions of the
processor: one with AVX-512, several elsewhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.datamodel import models, register_default
from numba.extending import intrinsic, overload, register_jitable

from hpccomm.kernels.intrinsics import I8, I32, I64, external, instruction, pointer

LANES = 16
SINGLES = ir.VectorType(ir.FloatType(), LANES)
DOUBLES = ir.VectorType(ir.DoubleType(), LANES // 2)
INTEGERS = ir.VectorType(I32, LANES)
OCTETS = ir.VectorType(I8, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)
BITS = ir.IntType(LANES)
LINE = ir.VectorType(I8, 4 * LANES)


class Vector(types.Type):  # type: ignore[misc]
    """Several numbers in a register."""

    def __init__(self, name: str, stored: Any) -> None:
        super().__init__(name=name)
        self.llvm_type = stored


float32x16 = Vector("float32x16", SINGLES)
float64x8 = Vector("float64x8", DOUBLES)
uint32x16 = Vector("uint32x16", INTEGERS)


@register_default(Vector)
class VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    """The representation of a vector in a register."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.llvm_type)


@instruction(float32x16, types.int64)
def load(builder, address):
    """Sixteen elements from an address that need not be aligned."""
    return builder.load(pointer(builder, address, SINGLES), align=4)


@instruction(types.void, types.int64, float32x16)
def store(builder, address, value):
    """Write sixteen elements."""
    builder.store(value, pointer(builder, address, SINGLES), align=4)


@instruction(float64x8, types.int64)
def load_doubles(builder, address):
    """Eight float64."""
    return builder.load(pointer(builder, address, DOUBLES), align=8)


@instruction(types.void, types.int64, float64x8)
def store_doubles(builder, address, value):
    """Write eight float64."""
    builder.store(value, pointer(builder, address, DOUBLES), align=8)


@instruction(types.void)
def compiler_fence(builder):
    """Keep the compiler, but not the processor, from moving loads and stores across.

    A compiler that unrolls a loop over cache lines interleaves their loads, and the hardware prefetcher misses lines
    that are not read in order: measured on Zen 4, this halves the bandwidth from memory.
    """
    builder.fence("seq_cst", targetscope="singlethread")


@instruction(float32x16, types.float32)
def splat(builder, value):
    """One number in all sixteen lanes."""
    return repeat(builder, value, SINGLES)


@instruction(uint32x16, types.uint32)
def splat_word(builder, value):
    """One integer in all sixteen lanes."""
    return repeat(builder, value, INTEGERS)


def repeat(builder: Any, value: Any, kind: Any) -> Any:
    """A vector with one value in all lanes."""
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I64, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(INTEGERS, [0] * LANES))


def binary_intrinsic(kind: Vector, instruction: str) -> Any:
    """An intrinsic of two vectors."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(args[0], args[1])

    @intrinsic
    def both(context, a, b):  # type: ignore[no-untyped-def]
        return kind(kind, kind), emit

    return both


def make_overload(instructions: dict[Vector, str]) -> Callable[..., Any]:
    """The function that Numba calls to find the implementation of an operator for two types."""
    intrinsics = {kind: binary_intrinsic(kind, instruction) for kind, instruction in instructions.items()}

    def find_operator(a, b):  # type: ignore[no-untyped-def]
        both = intrinsics.get(a)

        def result(a, b):  # type: ignore[no-untyped-def]
            return both(a, b)

        return result if both and a is b else None

    return find_operator


for _operator, _instruction in ((operator.add, "add"), (operator.sub, "sub"), (operator.mul, "mul")):
    _floats = dict.fromkeys((float32x16, float64x8), f"f{_instruction}")
    overload(_operator)(make_overload({**_floats, uint32x16: _instruction}))
overload(operator.truediv)(make_overload({float32x16: "fdiv"}))
overload(operator.xor)(make_overload({uint32x16: "xor"}))


@instruction(float64x8)
def zero_doubles(builder):
    """Eight zeros."""
    return ir.Constant(DOUBLES, [0.0] * (LANES // 2))


@instruction(float64x8, float64x8, float64x8)
def add_square(builder, total, x):
    """total + x², rounded once; where x was float32 the square is exact anyway."""
    return builder.call(external(builder, "llvm.fma.v8f64", DOUBLES, [DOUBLES] * 3), [x, x, total])


def half_intrinsic(first: int) -> Any:
    """An intrinsic that takes eight of sixteen float32 as float64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES // 2), list(range(first, first + LANES // 2)))
        return builder.fpext(builder.shuffle_vector(args[0], args[0], order), DOUBLES)

    @intrinsic
    def take_half(context, value):  # type: ignore[no-untyped-def]
        return float64x8(float32x16), emit

    return take_half


lower_half, upper_half = half_intrinsic(0), half_intrinsic(LANES // 2)


@instruction(types.float64, float64x8)
def reduce_add(builder, rest):
    """The sum of eight lanes: halves are added until one is left."""
    for width in (4, 2, 1):
        order = [ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(at, at + width))) for at in (0, width)]
        rest = builder.fadd(*[builder.shuffle_vector(rest, rest, each) for each in order])
    return builder.extract_element(rest, ir.Constant(I64, 0))


@instruction(float32x16, float32x16)
def magnitude(builder, value):
    """Without the sign."""
    return builder.call(external(builder, "llvm.fabs.v16f32", SINGLES, [SINGLES]), [value])


@instruction(float32x16, float32x16, float32x16)
def lesser(builder, a, b):
    """a where a < b, else b, also where either is NaN."""
    return builder.select(builder.fcmp_ordered("<", a, b), a, b)


@instruction(types.uint64, float32x16, float32x16)
def less(builder, a, b):
    """The mask of a < b; false for NaN."""
    return builder.zext(builder.bitcast(builder.fcmp_ordered("<", a, b), BITS), I64)


@instruction(types.uint64, float32x16, float32x16)
def greater_equal(builder, a, b):
    """The mask of a ≥ b; false for NaN."""
    return builder.zext(builder.bitcast(builder.fcmp_ordered(">=", a, b), BITS), I64)


@instruction(types.uint64, float32x16, float32x16)
def not_less(builder, a, b):
    """The mask of a ≥ b; true for NaN in either."""
    return builder.zext(builder.bitcast(builder.fcmp_unordered(">=", a, b), BITS), I64)


@instruction(float32x16, types.uint64, float32x16, float32x16)
def choose(builder, mask, a, b):
    """Lanes of a where the mask has ones, else of b."""
    lanes = builder.bitcast(builder.trunc(mask, BITS), MASK)
    return builder.select(lanes, a, b)


# Sixteen integers


@instruction(uint32x16)
def lane_numbers(builder):
    """0, 1, … 15."""
    return ir.Constant(INTEGERS, list(range(LANES)))


@instruction(uint32x16, float32x16)
def words_of(builder, value):
    """The bits of floats."""
    return builder.bitcast(value, INTEGERS)


@instruction(uint32x16, uint32x16, types.uint32)
def shift_left(builder, value, places):
    """Each lane times a power of two."""
    return builder.shl(value, repeat(builder, places, INTEGERS))


@instruction(uint32x16, uint32x16, types.uint32)
def shift_right(builder, value, places):
    """Each lane over a power of two."""
    return builder.lshr(value, repeat(builder, places, INTEGERS))


@instruction(uint32x16, uint32x16, uint32x16)
def one_below(builder, a, b):
    """1 where a < b, else 0."""
    return builder.zext(builder.icmp_unsigned("<", a, b), INTEGERS)


@instruction(uint32x16, uint32x16, uint32x16)
def least_word(builder, a, b):
    """The lesser of two integers in each lane."""
    return builder.select(builder.icmp_unsigned("<", a, b), a, b)


@instruction(uint32x16, uint32x16, uint32x16)
def greatest_word(builder, a, b):
    """The greater of two integers in each lane."""
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


@instruction(types.uint32, uint32x16)
def reduce_greatest(builder, value):
    """The greatest integer of all lanes."""
    return builder.call(external(builder, "llvm.vector.reduce.umax.v16i32", I32, [INTEGERS]), [value])


@instruction(float32x16, uint32x16)
def to_floats(builder, value):
    """Integers from -2³¹ to 2³¹ - 1 as floats."""
    return builder.sitofp(value, SINGLES)


@instruction(uint32x16, float32x16)
def round_nearest(builder, value):
    """Floats above -2³¹ and below 2³¹ as integers, ties to even."""
    whole = builder.call(external(builder, "llvm.rint.v16f32", SINGLES, [SINGLES]), [value])
    return builder.fptosi(whole, INTEGERS)


@instruction(uint32x16, float32x16)
def round_up(builder, value):
    """Floats from 0 to 2³¹ - 1 as integers, rounded up."""
    whole = builder.call(external(builder, "llvm.ceil.v16f32", SINGLES, [SINGLES]), [value])
    return builder.fptosi(whole, INTEGERS)


@instruction(uint32x16, uint32x16, uint32x16)
def negate_like(builder, value, other):
    """Integers, negated where the highest bit of the other is set."""
    zero = ir.Constant(INTEGERS, [0] * LANES)
    return builder.select(builder.icmp_signed("<", other, zero), builder.sub(zero, value), value)


@instruction(uint32x16, types.uint64, uint32x16)
def keep_words(builder, mask, value):
    """Lanes where the mask has ones, else 0."""
    lanes = builder.bitcast(builder.trunc(mask, BITS), MASK)
    return builder.select(lanes, value, ir.Constant(INTEGERS, [0] * LANES))


@instruction(types.void, types.int64, uint32x16)
def store_octets(builder, address, value):
    """Write the lowest byte of each lane."""
    builder.store(builder.trunc(value, OCTETS), pointer(builder, address, OCTETS), align=1)


@instruction(types.int64, types.int64, *[uint32x16] * 4)
def store_pairs(builder, address, a, b, c, d):
    """Write two bits of each lane as 16 bytes, the highest bits first; returns how many of the higher bits are set."""
    parts = [builder.trunc(each, OCTETS) for each in (a, b, c, d)]
    for width in (LANES, 2 * LANES):
        order = ir.Constant(ir.VectorType(I32, 2 * width), list(range(2 * width)))
        parts = [builder.shuffle_vector(parts[k], parts[k + 1], order) for k in range(0, len(parts), 2)]
    four = builder.bitcast(parts[0], INTEGERS)
    gathered = builder.mul(four, ir.Constant(INTEGERS, [0x40100401] * LANES))
    packed = builder.trunc(builder.lshr(gathered, ir.Constant(INTEGERS, [24] * LANES)), OCTETS)
    builder.store(packed, pointer(builder, address, OCTETS), align=1)
    halves = builder.and_(builder.bitcast(packed, PAIR), ir.Constant(PAIR, [0xAAAAAAAAAAAAAAAA] * 2))
    counts = builder.call(external(builder, "llvm.ctpop.v2i64", PAIR, [PAIR]), [halves])
    return builder.add(*[builder.extract_element(counts, ir.Constant(I64, k)) for k in range(2)])


PAIR = ir.VectorType(I64, 2)

# Bits


@instruction(types.uint64, types.int64)
def load_bits(builder, address):
    """Eight bytes of bits, the highest of each byte first, as a mask of 64."""
    return reverse_bits(builder, builder.load(pointer(builder, address, I64), align=1))


@instruction(types.void, types.int64, types.uint64)
def store_bits(builder, address, mask):
    """Write a mask of 64 as eight bytes, the highest bit of each first."""
    builder.store(reverse_bits(builder, mask), pointer(builder, address, I64), align=1)


def reverse_bits(builder: Any, word: Any) -> Any:
    """The bits of each byte in reverse order."""
    eight = ir.VectorType(I8, 8)
    turned = builder.call(external(builder, "llvm.bitreverse.v8i8", eight, [eight]), [builder.bitcast(word, eight)])
    return builder.bitcast(turned, I64)


@instruction(types.void, types.int64, types.int64)
def copy_reversed(builder, source, to):
    """Copy 64 bytes, the bits of each in reverse order."""
    line = builder.load(pointer(builder, source, LINE), align=1)
    turned = builder.call(external(builder, "llvm.bitreverse.v64i8", LINE, [LINE]), [line])
    builder.store(turned, pointer(builder, to, LINE), align=1)


@instruction(types.uint64, types.int64)
def load_mask(builder, address):
    """Two bytes of bits, the lowest first, as a mask of 16."""
    return builder.zext(builder.load(pointer(builder, address, BITS), align=1), I64)


@instruction(types.int64, types.uint64)
def popcount(builder, mask):
    """The number of ones in a mask."""
    return builder.call(external(builder, "llvm.ctpop.i64", I64, [I64]), [mask])


@instruction(types.int64, types.uint64)
def lowest_bit(builder, mask):
    """The position of the lowest one in a mask that is not 0."""
    count = external(builder, "llvm.cttz.i64", I64, [I64, ir.IntType(1)])
    return builder.call(count, [mask, ir.Constant(ir.IntType(1), 1)])


@instruction(types.float32, types.float32, types.float32, types.float32)
def fma(builder, a, b, c):
    """a·b + c of float32, rounded once."""
    single = ir.FloatType()
    return builder.call(external(builder, "llvm.fma.f32", single, [single] * 3), [a, b, c])


@instruction(types.float32, types.float32)
def rint(builder, value):
    """A float32 rounded to an integer, ties to even."""
    single = ir.FloatType()
    return builder.call(external(builder, "llvm.rint.f32", single, [single]), [value])


def pointer_to(kind: Any) -> Any:
    """An intrinsic that turns an address into a pointer to elements of a type."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    @intrinsic
    def pointer_at(context, address):  # type: ignore[no-untyped-def]
        return types.CPointer(kind)(types.int64), emit

    return pointer_at


@register_jitable
def address_of(x):  # type: ignore[no-untyped-def]
    """The address of an array.  Signed as all addresses here: with an unsigned one Numba would add in float64.

    An address does not keep its array: see :func:`hold`.
    """
    return np.int64(x.ctypes.data)


@intrinsic
def hold(context: Any, array: Any) -> Any:
    """Keep the memory of an array alive up to here."""
    return types.void(array), lambda context, *code: context.get_dummy_value()


floats = pointer_to(types.float32)
doubles = pointer_to(types.float64)
octets = pointer_to(types.uint8)
signed_octets = pointer_to(types.int8)
halves = pointer_to(types.uint16)
words = pointer_to(types.uint32)
longs = pointer_to(types.int64)
