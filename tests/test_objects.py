"""Machine code that is emitted once and loaded without a compiler, and the built-in functions made of it."""

from __future__ import annotations

import ctypes
import sys

import pytest

from hpccomm.kernels.builtins import make_builtin

FASTCALL = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.POINTER(ctypes.py_object), ctypes.c_ssize_t)


@FASTCALL
def add_up(itself, arguments, n):
    return itself + sum(arguments[:n])


def address_of(body: ctypes._CFuncPtr) -> int:
    return ctypes.cast(body, ctypes.c_void_p).value or 0


def test_a_builtin_passes_its_own_object_and_its_arguments() -> None:
    add = make_builtin("add", address_of(add_up), 1000)
    assert (add.__name__, add(), add(20, 3)) == ("add", 1000, 1023)
    with pytest.raises(TypeError, match="keyword"):
        add(x=1)


def test_a_builtin_holds_one_reference_to_its_object() -> None:
    body = make_builtin("add", address_of(add_up), itself := 10**6)
    held = sys.getrefcount(itself)
    for _ in range(1000):
        body(1)
    assert sys.getrefcount(itself) == held
    del body
    assert sys.getrefcount(itself) == held - 1
