"""Reduce k vectors, ((v0 + v1) + v2) + …, each read once: for every operation and dtype, in NumPy and compiled.

The order is always that of the ranks, so all ranks get the same bits.  16-bit floats are summed in float32 and rounded
once, to nearest even.  ``min`` and ``max`` return NaN if any operand is NaN; those of MPI may not.
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

DTYPES = {
    "sum": (*INTEGERS, *FLOATS, *HALVES, *COMPLEX),
    "prod": (*INTEGERS, *FLOATS, *HALVES, *COMPLEX),
    "min": (*INTEGERS, *FLOATS, *HALVES),
    "max": (*INTEGERS, *FLOATS, *HALVES),
    **dict.fromkeys(("land", "lor", "lxor"), (*INTEGERS, "b1")),
    **dict.fromkeys(("band", "bor", "bxor"), INTEGERS),
}
"""The dtypes of each operation, by :func:`code_of`."""

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
}


def code_of(dtype: npt.DTypeLike) -> str:
    """``"f4"`` for float32 and so on; ``"bf16"`` for bfloat16 (its name, or ``ml_dtypes``' dtype)."""
    if "bfloat16" in (dtype, getattr(dtype, "name", "")):
        return "bf16"
    native = np.dtype(dtype)
    return native.str[1:] if native.isnative else native.str


def has_kernel(op: str, dtype: npt.DTypeLike) -> bool:
    """Whether there is a kernel for an operation on a dtype."""
    return code_of(dtype) in DTYPES.get(op, ())


def itemsize(dtype: npt.DTypeLike) -> int:
    """Bytes of one element."""
    return 2 if code_of(dtype) == "bf16" else np.dtype(dtype).itemsize


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
