"""MPI's operations on NumPy vectors, and which datatypes each is defined for (MPI-4.1, 6.9.2)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.errors import ArgumentError
from hpccomm.kernels import objects
from hpccomm.kernels.reductions.reference import UFUNCS, code_of, reduce, storage

HALVES = ("float16", "bfloat16")
NUMBERS, ORDERED, LOGICAL, BITS, PAIR = "iufc", "iuf", "iub", "iu", "V"


class Operation(NamedTuple):
    """A predefined operation."""

    name: str
    ufunc: Callable[..., Any]
    kinds: str
    """The kinds of NumPy dtypes (``dtype.kind``) for which MPI defines it."""
    remedy: str
    """The advice in the error for other dtypes."""


PREDEFINED: dict[int, Operation] = {
    MPI.SUM.handle: Operation("sum", np.add, NUMBERS, "cast to an integer dtype, or use MPI.LOR"),
    MPI.PROD.handle: Operation("prod", np.multiply, NUMBERS, "cast to an integer dtype, or use MPI.LAND"),
    MPI.MIN.handle: Operation("min", np.minimum, ORDERED, "reduce real and imaginary parts, or use MPI.LAND"),
    MPI.MAX.handle: Operation("max", np.maximum, ORDERED, "reduce real and imaginary parts, or use MPI.LOR"),
    MPI.LAND.handle: Operation("land", np.logical_and, LOGICAL, "compare with zero first"),
    MPI.LOR.handle: Operation("lor", np.logical_or, LOGICAL, "compare with zero first"),
    MPI.LXOR.handle: Operation("lxor", np.logical_xor, LOGICAL, "compare with zero first"),
    MPI.BAND.handle: Operation("band", np.bitwise_and, BITS, "use an integer dtype, or MPI.LAND for bool"),
    MPI.BOR.handle: Operation("bor", np.bitwise_or, BITS, "use an integer dtype, or MPI.LOR for bool"),
    MPI.BXOR.handle: Operation("bxor", np.bitwise_xor, BITS, "use an integer dtype, or MPI.LXOR for bool"),
    MPI.MINLOC.handle: Operation("minloc", UFUNCS["minloc"], PAIR, "pass pairs, as [x, MPI.DOUBLE_INT]"),
    MPI.MAXLOC.handle: Operation("maxloc", UFUNCS["maxloc"], PAIR, "pass pairs, as [x, MPI.DOUBLE_INT]"),
}


class ByIdentity:
    """An object of MPI as part of a key; the key keeps it alive, as another object may get a freed handle."""

    __slots__ = ("_it",)

    def __init__(self, it: Any) -> None:
        self._it = it

    def __hash__(self) -> int:
        return id(self._it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self._it is other._it


def key_of(op: MPI.Op) -> Hashable:
    """The operation as part of a key."""
    handle = op.handle
    return SUMS.get(id(op)) or (handle if handle in PREDEFINED else ByIdentity(op))


class Reduction(NamedTuple):
    """The meaning of an ``op`` argument."""

    op: MPI.Op
    divides: bool = False
    """Whether the result is divided by the number of ranks."""


NAMED: dict[str, MPI.Op] = {known.name: getattr(MPI, known.name.upper()) for known in PREDEFINED.values()}
ON_BOOLS: dict[str, MPI.Op] = {"min": MPI.LAND, "max": MPI.LOR}
"""The meaning of names on bools: *all* and *any*."""
AVERAGES = ("avg", "mean")
SUM_OF_AVERAGE, SUM_OF_SCALED = MPI.Op(MPI.SUM), MPI.Op(MPI.SUM)
"""The sum of an average, and that of scaled summands: MPI's sum as objects of their own."""
SUMS = {id(SUM_OF_AVERAGE): AVERAGES[0], id(SUM_OF_SCALED): "premul_sum"}
"""Their names by identity: ranks that call another sum are named."""


def resolve(op: MPI.Op | str, who: str, dtype: np.dtype[Any] | None = None) -> Reduction:
    """The meaning of ``op``: an operation of MPI, or a name of one (``"sum"``, ``"max"``), ``"avg"`` or ``"mean"``.

    Raises if it is neither, or if it is not defined for ``dtype``, where that is given.
    """
    if isinstance(op, str) and op in AVERAGES:
        if dtype is not None and dtype.kind not in "fc":
            raise ArgumentError(f"{who}: the {op} of {dtype} is not defined: cast it to float64, or use op='sum'")
        return Reduction(SUM_OF_AVERAGE, True)
    if isinstance(op, str) and op in NAMED:
        named = (ON_BOOLS.get(op) if dtype == np.bool_ else None) or NAMED[op]
    elif isinstance(op, MPI.Op):
        named = op if type(op) is MPI.Op else MPI.Op(op)
    else:
        names = ", ".join(map(repr, (*AVERAGES, *NAMED)))
        raise ArgumentError(f"{who}: op={op!r} is not an operation: pass an MPI.Op or one of {names}")
    if dtype is not None:
        check_defined(named, dtype, who)
    return Reduction(named)


def read_op(op: MPI.Op | str, who: str) -> MPI.Op:
    """The operation of a call that cannot divide."""
    meaning = resolve(op, who)
    if meaning.divides:
        raise ArgumentError(f"{who}: op={op!r} is for reductions to whole results: use op='sum' and divide")
    return meaning.op


def name_in_fingerprint(op: MPI.Op) -> str:
    """The name that the ranks compare: that of :func:`name_of`, or of one of our own sums."""
    return SUMS.get(id(op)) or name_of(op)


def name_of(op: MPI.Op) -> str:
    """The name in errors; all user-defined operations share one name."""
    known = PREDEFINED.get(op.handle)
    return known.name if known else "other predefined" if op.is_predefined else "user-defined"


def check_defined(op: MPI.Op, dtype: np.dtype[Any], who: str, pair: str = "") -> None:
    """Raise if MPI does not define a predefined operation for a dtype, or for the elements of a pair type."""
    known = PREDEFINED.get(op.handle)
    if known and dtype.kind not in known.kinds:
        remedy = "use MPI.MINLOC or MPI.MAXLOC" if pair else known.remedy
        raise ArgumentError(f"{who}: MPI does not define {known.name} for {pair or dtype}: {remedy}")


def on_halves(op: MPI.Op, kind: str) -> MPI.Op:
    """The operation for MPI's own algorithms, which know no 16-bit floats; any other ``kind`` keeps its own."""
    known = PREDEFINED.get(op.handle) if kind in HALVES else None
    return half_operation(known.name, kind) if known else op


@cache
def half_operation(name: str, kind: str) -> MPI.Op:
    """An operation on 16-bit floats, which MPI moves as integers: in float32, and rounded."""
    code = code_of(kind)
    fold = FOLD(objects.fold(name, code)) if objects.complete() else None

    def apply(lower: Any, upper: Any, _: MPI.Datatype) -> None:
        if fold:
            fold((ctypes.c_int64 * 2)(lower.address, upper.address), 2, 0, upper.address, upper.nbytes // 2)
        else:
            a, b = (np.asarray(each).view(storage(code)) for each in (lower, upper))
            reduce(name, kind, [a, b], b)

    return MPI.Op.Create(apply, commute=True)


FOLD = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
"""The type of compiled reductions."""


def combiner(op: MPI.Op, kind: str = "") -> Callable[[Any, Any, Any], Any]:
    """The function ``combine(lower, upper, out)`` of the engine; ``kind`` names 16-bit floats, added in float32."""
    known = PREDEFINED.get(op.handle)
    if kind in HALVES:
        name, stored = name_of(op), storage(code_of(kind))
        return lambda lower, upper, out: reduce(name, kind, [lower.view(stored), upper.view(stored)], out.view(stored))
    if known and known.ufunc in (np.minimum, np.maximum):  # the result must be passed as out=
        return lambda lower, upper, out: known.ufunc(lower, upper, out=out)
    if known:
        return known.ufunc

    def reduce_local(lower: Any, upper: Any, out: Any) -> None:
        op.Reduce_local(lower, upper)
        if out is not upper:
            out[...] = upper

    return reduce_local
