"""SIMD vectors of sixteen float32 and of eight float64 as types of Numba, for loops over addresses.

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

from hpccomm.kernels.intrinsics import I8, I64, external, instruction, pointer

LANES = 16
SINGLES = ir.VectorType(ir.FloatType(), LANES)
DOUBLES = ir.VectorType(ir.DoubleType(), LANES // 2)
MASK = ir.VectorType(ir.IntType(1), LANES)
BITS = ir.IntType(LANES)
LINE = ir.VectorType(I8, 64)


class Vector(types.Type):  # type: ignore[misc]
    """Several numbers in a register."""

    def __init__(self, name: str, stored: Any) -> None:
        super().__init__(name=name)
        self.llvm_type = stored


float32x16 = Vector("float32x16", SINGLES)
float64x8 = Vector("float64x8", DOUBLES)


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
    one = builder.insert_element(ir.Constant(SINGLES, ir.Undefined), value, ir.Constant(I64, 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(SINGLES, ir.Undefined), order)


def binary_intrinsic(kind: Vector, instruction: str) -> Any:
    """An intrinsic of two vectors."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return getattr(builder, instruction)(args[0], args[1])

    @intrinsic
    def both(context, a, b):  # type: ignore[no-untyped-def]
        return kind(kind, kind), emit

    return both


def make_overload(instruction: str) -> Callable[..., Any]:
    """The function that Numba calls to find the implementation of an operator for two types."""
    single, double = binary_intrinsic(float32x16, instruction), binary_intrinsic(float64x8, instruction)

    def find_operator(a, b):  # type: ignore[no-untyped-def]
        both = single if a is float32x16 else double

        def result(a, b):  # type: ignore[no-untyped-def]
            return both(a, b)

        return result if isinstance(a, Vector) and a is b else None

    return find_operator


for _operator, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    overload(_operator)(make_overload(_instruction))


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
