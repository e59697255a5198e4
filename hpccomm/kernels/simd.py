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

from hpccomm.kernels.intrinsics import I8, I64, external, pointer

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


@intrinsic
def load(context: Any, address: Any) -> Any:
    """Sixteen elements from an address that need not be aligned."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], SINGLES), align=4)

    return float32x16(types.int64), emit


@intrinsic
def store(context: Any, address: Any, value: Any) -> Any:
    """Write sixteen elements."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], pointer(builder, args[0], SINGLES), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, float32x16), emit


@intrinsic
def load_doubles(context: Any, address: Any) -> Any:
    """Eight float64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], DOUBLES), align=8)

    return float64x8(types.int64), emit


@intrinsic
def store_doubles(context: Any, address: Any, value: Any) -> Any:
    """Write eight float64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], pointer(builder, args[0], DOUBLES), align=8)
        return context.get_dummy_value()

    return types.void(types.int64, float64x8), emit


@intrinsic
def compiler_fence(context: Any) -> Any:
    """Keep the compiler, but not the processor, from moving loads and stores across.

    A compiler that unrolls a loop over cache lines interleaves their loads, and the hardware prefetcher misses lines
    that are not read in order: measured on Zen 4, this halves the bandwidth from memory.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst", targetscope="singlethread")
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def splat(context: Any, value: Any) -> Any:
    """One number in all sixteen lanes."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(SINGLES, ir.Undefined), args[0], ir.Constant(I64, 0))
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(one, ir.Constant(SINGLES, ir.Undefined), order)

    return float32x16(types.float32), emit


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


@intrinsic
def zero_doubles(context: Any) -> Any:
    """Eight zeros."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(DOUBLES, [0.0] * (LANES // 2))

    return float64x8(), emit


@intrinsic
def add_square(context: Any, total: Any, x: Any) -> Any:
    """total + x², rounded once; where x was float32 the square is exact anyway."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total, x = args
        return builder.call(external(builder, "llvm.fma.v8f64", DOUBLES, [DOUBLES] * 3), [x, x, total])

    return float64x8(float64x8, float64x8), emit


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


@intrinsic
def reduce_add(context: Any, value: Any) -> Any:
    """The sum of eight lanes: halves are added until one is left."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rest = args[0]
        for width in (4, 2, 1):
            order = [
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(at, at + width))) for at in (0, width)
            ]
            rest = builder.fadd(*[builder.shuffle_vector(rest, rest, each) for each in order])
        return builder.extract_element(rest, ir.Constant(I64, 0))

    return types.float64(float64x8), emit


@intrinsic
def magnitude(context: Any, value: Any) -> Any:
    """Without the sign."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(external(builder, "llvm.fabs.v16f32", SINGLES, [SINGLES]), [args[0]])

    return float32x16(float32x16), emit


@intrinsic
def greater_equal(context: Any, a: Any, b: Any) -> Any:
    """The mask of a ≥ b; false for NaN."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        holds = builder.fcmp_ordered(">=", args[0], args[1])
        return builder.zext(builder.bitcast(holds, BITS), I64)

    return types.uint64(float32x16, float32x16), emit


@intrinsic
def not_less(context: Any, a: Any, b: Any) -> Any:
    """The mask of a ≥ b; true for NaN in either."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        holds = builder.fcmp_unordered(">=", args[0], args[1])
        return builder.zext(builder.bitcast(holds, BITS), I64)

    return types.uint64(float32x16, float32x16), emit


@intrinsic
def choose(context: Any, mask: Any, a: Any, b: Any) -> Any:
    """Lanes of a where the mask has ones, else of b."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = builder.bitcast(builder.trunc(args[0], BITS), MASK)
        return builder.select(lanes, args[1], args[2])

    return float32x16(types.uint64, float32x16, float32x16), emit


@intrinsic
def load_bits(context: Any, address: Any) -> Any:
    """Eight bytes of bits, the highest of each byte first, as a mask of 64."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = builder.load(pointer(builder, args[0], I64), align=1)
        return reverse_bits(builder, word)

    return types.uint64(types.int64), emit


@intrinsic
def store_bits(context: Any, address: Any, mask: Any) -> Any:
    """Write a mask of 64 as eight bytes, the highest bit of each first."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(reverse_bits(builder, args[1]), pointer(builder, args[0], I64), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.uint64), emit


def reverse_bits(builder: Any, word: Any) -> Any:
    """The bits of each byte in reverse order."""
    eight = ir.VectorType(I8, 8)
    turned = builder.call(external(builder, "llvm.bitreverse.v8i8", eight, [eight]), [builder.bitcast(word, eight)])
    return builder.bitcast(turned, I64)


@intrinsic
def copy_reversed(context: Any, source: Any, to: Any) -> Any:
    """Copy 64 bytes, the bits of each in reverse order."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = builder.load(pointer(builder, args[0], LINE), align=1)
        turned = builder.call(external(builder, "llvm.bitreverse.v64i8", LINE, [LINE]), [line])
        builder.store(turned, pointer(builder, args[1], LINE), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def load_mask(context: Any, address: Any) -> Any:
    """Two bytes of bits, the lowest first, as a mask of 16."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(pointer(builder, args[0], BITS), align=1), I64)

    return types.uint64(types.int64), emit


@intrinsic
def popcount(context: Any, mask: Any) -> Any:
    """The number of ones in a mask."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(external(builder, "llvm.ctpop.i64", I64, [I64]), [args[0]])

    return types.int64(types.uint64), emit


@intrinsic
def lowest_bit(context: Any, mask: Any) -> Any:
    """The position of the lowest one in a mask that is not 0."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        count = external(builder, "llvm.cttz.i64", I64, [I64, ir.IntType(1)])
        return builder.call(count, [args[0], ir.Constant(ir.IntType(1), 1)])

    return types.int64(types.uint64), emit


@intrinsic
def fma(context: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c of float32, rounded once."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        single = ir.FloatType()
        return builder.call(external(builder, "llvm.fma.f32", single, [single] * 3), args)

    return types.float32(types.float32, types.float32, types.float32), emit


@intrinsic
def rint(context: Any, value: Any) -> Any:
    """A float32 rounded to an integer, ties to even."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        single = ir.FloatType()
        return builder.call(external(builder, "llvm.rint.f32", single, [single]), [args[0]])

    return types.float32(types.float32), emit


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

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_dummy_value()

    return types.void(array), emit


floats = pointer_to(types.float32)
doubles = pointer_to(types.float64)
octets = pointer_to(types.uint8)
signed_octets = pointer_to(types.int8)
halves = pointer_to(types.uint16)
words = pointer_to(types.uint32)
longs = pointer_to(types.int64)
