"""The body of the entry, compiled with intrinsics as memory operations."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from hpccomm.kernels import intrinsics
from hpccomm.kernels.compiler import jit
from hpccomm.kernels.entry import body


def compile_globals() -> dict[str, Any]:
    """The globals of :mod:`hpccomm.kernels.entry.body` with every function compiled."""
    scope = dict(vars(body))
    for name, function in vars(body).items():
        if not isinstance(function, FunctionType) or name == "offset_of":
            continue
        if function.__module__ != body.__name__:
            scope[name] = getattr(intrinsics, name)
        else:
            here = FunctionType(function.__code__, scope, name)
            scope[name] = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(here)
    return scope


_scope = compile_globals()
enter, leave = _scope["enter"], _scope["leave"]
