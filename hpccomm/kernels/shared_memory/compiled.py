"""The functions of :mod:`hpccomm.kernels.shared_memory.collectives`, compiled with intrinsics as memory operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

from hpccomm.kernels import intrinsics
from hpccomm.kernels.compiler import jit
from hpccomm.kernels.shared_memory import collectives, records


def compile_globals(instead: Mapping[str, Callable[..., Any]] = MappingProxyType({})) -> dict[str, Any]:
    """The globals of :mod:`hpccomm.kernels.shared_memory.collectives` with every function compiled.

    ``instead`` replaces functions by others of the same name, for measurements.
    """
    scope = dict(vars(collectives))
    for name, function in vars(collectives).items():
        if not isinstance(function, FunctionType) or function is records.offset_of:
            continue
        if function.__module__ != collectives.__name__:
            scope[name] = getattr(intrinsics, name)
        else:
            here = FunctionType(instead.get(name, function).__code__, scope, name)
            scope[name] = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(here)
    return scope


globals().update({name: compiled for name, compiled in compile_globals().items() if name in collectives.COLLECTIVES})
