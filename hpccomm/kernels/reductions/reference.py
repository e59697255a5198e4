"""Reduce k vectors, ((v0 + v1) + v2) + …, each read once: for every operation and dtype, in NumPy and compiled.

The order is always that of the ranks, so all ranks get the same bits.  16-bit floats are summed in float32 and rounded
once, to nearest even.  ``min`` and ``max`` return NaN if any operand is NaN; those of MPI may not.

``minloc`` and ``maxloc`` reduce pairs of a value and an index (MPI-4.1, 6.9.4): equal values give the lower index, and
a NaN comes before every number, so the result is the NaN with the lowest index, in any order of the operands.  MPI does
not define it: Open MPI and MPICH keep one of the two operands by their position in the order of reduction, so that with
MPICH two ranks got different results (verified).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
FLOATS = ("f4", "f8")
HALVES = ("f2", "bf16")
COMPLEX = ("c8", "c16")
VALUE, INDEX = "value", "index"
PAIRS = {
    name: np.dtype([(VALUE, value), (INDEX, np.intc)], align=True)
    for name, value in {
        "FLOAT_INT": np.single,
        "DOUBLE_INT": np.double,
        "LONG_INT": "l",
        "TWOINT": np.intc,
        "SHORT_INT": np.short,
        "LONG_DOUBLE_INT": np.longdouble,
    }.items()
}
"""The pairs of MPI with the alignment of C; bytes between their fields have no meaning."""

DTYPES = {
    "sum": (*INTEGERS, *FLOATS, *HALVES, *COMPLEX),
    "prod": (*INTEGERS, *FLOATS, *HALVES, *COMPLEX),
    "min": (*INTEGERS, *FLOATS, *HALVES),
    "max": (*INTEGERS, *FLOATS, *HALVES),
    **dict.fromkeys(("land", "lor", "lxor"), (*INTEGERS, "b1")),
    **dict.fromkeys(("band", "bor", "bxor"), INTEGERS),
    **dict.fromkeys(("minloc", "maxloc"), ("FLOAT_INT", "DOUBLE_INT", "LONG_INT", "TWOINT", "SHORT_INT")),
}
"""The dtypes of each operation, by :func:`code_of`."""


def first_pairs(precedes: Callable[..., Any]) -> Callable[..., Any]:
    """A function that selects from two vectors of pairs; ``precedes`` compares values."""

    def select(lower: Any, upper: Any, out: Any = None) -> Any:
        a, b = lower[VALUE], upper[VALUE]
        nan_a, nan_b = a != a, b != b  # noqa: PLR0124
        equal = (a == b) | (nan_a & nan_b)
        before = np.where(equal, upper[INDEX] < lower[INDEX], (nan_b & ~nan_a) | precedes(b, a))
        found = np.where(before, upper, lower)
        if out is None:
            return found
        out[...] = found
        return out

    return select


UFUNCS: dict[str, Callable[..., Any]] = {
    "sum": np.add,
    "prod": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "land": np.logical_and,
    "lor": np.logical_or,
    "lxor": np.logical_xor,
    "band": np.bitwise_and,
    "bor": np.bitwise_or,
    "bxor": np.bitwise_xor,
    "minloc": first_pairs(np.less),
    "maxloc": first_pairs(np.greater),
}


def code_of(dtype: npt.DTypeLike) -> str:
    """``"f4"`` for float32 and so on; ``"bf16"`` for bfloat16 (its name, or ``ml_dtypes``' dtype); names of pairs."""
    if isinstance(dtype, str) and dtype in PAIRS:
        return dtype
    if "bfloat16" in (dtype, getattr(dtype, "name", "")):
        return "bf16"
    native = np.dtype(dtype)
    return native.str[1:] if native.isnative else native.str


def has_kernel(op: str, dtype: npt.DTypeLike) -> bool:
    """Whether there is a kernel for an operation on a dtype."""
    return code_of(dtype) in DTYPES.get(op, ())


def storage(code: str) -> np.dtype[Any]:
    """The NumPy dtype of elements in memory."""
    return np.dtype("u2") if code == "bf16" else PAIRS.get(code) or np.dtype(code)


def itemsize(dtype: npt.DTypeLike) -> int:
    """Bytes of one element."""
    return storage(code_of(dtype)).itemsize


# The NumPy reference, which defines every bit


def reduce(op: str, dtype: npt.DTypeLike, vectors: list[npt.NDArray[Any]], out: npt.NDArray[Any]) -> None:
    """Reduce vectors into ``out``, which may be one of them; bfloat16 as its bits in uint16."""
    code = code_of(dtype)
    if code in HALVES:
        wide = [widen(vector, code) for vector in vectors]
        reduce(op, "f4", wide, wide[0])
        out[...] = narrow(wide[0], code)
        return
    result = vectors[0].copy()
    for vector in vectors[1:]:
        result = UFUNCS[op](result, vector)
    out[...] = result


def widen(vector: npt.NDArray[Any], code: str) -> npt.NDArray[np.float32]:
    """16-bit floats as a new float32 vector."""
    if code == "f2":
        return vector.astype("f4")
    return (vector.astype("u4") << 16).view("f4")


def narrow(vector: npt.NDArray[np.float32], code: str) -> npt.NDArray[Any]:
    """float32 as 16-bit floats, to nearest even."""
    if code == "f2":
        with np.errstate(over="ignore"):
            return vector.astype("f2")
    word = vector.view("u4")
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.where(np.isnan(vector), (word >> 16) | 0x40, rounded).astype("u2")
