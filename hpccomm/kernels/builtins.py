"""Built-in functions of Python whose bodies are machine code at an address: called in 30 ns, made without a C compiler.

A body has the signature of ``METH_FASTCALL``: addresses of an object ``itself`` and of a vector of arguments, and their
number; it returns the address of a new reference, or 0 with an exception set.  It is called with the GIL held.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

METH_FASTCALL = 0x80


class MethodDefinition(ctypes.Structure):
    """``PyMethodDef``, which Python reads as long as a function made of it lives."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


@cache
def definition(name: str, address: int) -> MethodDefinition:
    """The definition of a function; never freed, as functions made of it may outlive everything else."""
    return MethodDefinition(name.encode(), address, METH_FASTCALL, None)


new_function = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.POINTER(MethodDefinition), ctypes.py_object, ctypes.c_void_p)(
    ("PyCFunction_NewEx", ctypes.pythonapi)
)


def make_builtin(name: str, address: int, itself: Any = None) -> Callable[..., Any]:
    """The built-in function with the body at ``address``; it keeps a reference to ``itself``, the body's first word."""
    function: Callable[..., Any] = new_function(definition(name, address), itself, None)
    return function
