"""The functions of :mod:`hpccomm.kernels.shared_memory.collectives`, compiled with intrinsics as memory operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType, MappingProxyType
from typing import Any

from hpccomm.kernels import intrinsics
from hpccomm.kernels.compiler import compile_cached, jit
from hpccomm.kernels.reductions import loops
from hpccomm.kernels.shared_memory import collectives, records


def compile_globals(instead: Mapping[str, Callable[..., Any]] = MappingProxyType({})) -> dict[str, Any]:
    """The globals of :mod:`hpccomm.kernels.shared_memory.collectives` with every function compiled.

    ``instead`` replaces functions by others of the same name, for measurements; nothing is then cached on disk.
    """
    scope = dict(vars(collectives))
    for name, function in vars(collectives).items():
        if not isinstance(function, FunctionType) or function is records.offset_of:
            continue
        here = FunctionType(instead.get(name, function).__code__, scope, name)
        if function.__module__ != collectives.__name__:
            scope[name] = getattr(intrinsics, name)
        elif name in collectives.COLLECTIVES:
            scope[name] = jit()(here) if instead else compile_cached(jit, here, name)
        else:
            scope[name] = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(here)
    return scope


_scope = compile_globals()


@cache
def kernel(name: str) -> Callable[[int], int]:
    """The machine code of a collective, compiled at the first request."""
    function: Any = _scope[name]
    function.compile("int64(int64)")
    function.disable_compile()
    (only,) = function.overloads.values()
    return only.entry_point  # type: ignore[no-any-return]  # spares the dispatcher: half of 0.11 µs


@cache
def fold_kernel(op: str, code: str) -> Any:
    """A reduction as a C function, compiled at the first request; the kernels call its ``address``."""
    return loops.compile_fold(op, code, compile_cached)
