"""The collectives of :mod:`hpccomm.kernels.shared` compiled: the same functions, memory operations as instructions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import FunctionType, MappingProxyType
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba

from hpccomm.kernels import folds, intrinsics, records, shared

_sources = b"".join(Path(__file__).with_name(each).read_bytes() for each in ("intrinsics.py", "records.py", "simd.py"))
CACHE_TAG = f"{llvmlite.binding.get_host_cpu_name()}_{zlib.crc32(_sources):08x}"
"""What the machine code depends on besides its own source: the processor and the instructions it is made of."""

jit = partial(numba.njit, nogil=True, error_model="numpy")


def compile_cached(compiler: Callable[..., Any], function: Callable[..., Any], name: str) -> Any:
    """Compile, keeping the machine code on disk where there is a place for it.

    Numba numbers what it keeps of one function, so two processes that compile it for different operations or processors
    at the same time would write one file: they need different names.
    """
    function.__qualname__ = f"{name}_{CACHE_TAG}"
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # no folder to write to
        return compiler()(function)


def compile_globals(instead: Mapping[str, Callable[..., Any]] = MappingProxyType({})) -> dict[str, Any]:
    """The globals of :mod:`hpccomm.kernels.shared` with everything that runs there compiled.

    ``instead``: functions that stand for those of the same name, for measurements; then nothing is kept on disk.
    """
    scope = dict(vars(shared))
    for name, function in vars(shared).items():
        if not isinstance(function, FunctionType) or function is records.offset_of:
            continue
        here = FunctionType(instead.get(name, function).__code__, scope, name)
        if function.__module__ != shared.__name__:
            scope[name] = getattr(intrinsics, name)
        elif name in shared.COLLECTIVES:
            scope[name] = jit()(here) if instead else compile_cached(jit, here, name)
        else:
            scope[name] = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(here)
    return scope


_scope = compile_globals()


@cache
def kernel(name: str) -> Callable[[int], int]:
    """A collective; compiled now unless that was done before."""
    function: Any = _scope[name]
    function.compile("int64(int64)")
    function.disable_compile()
    (only,) = function.overloads.values()
    return only.entry_point  # type: ignore[no-any-return]  # spares the dispatcher: half of 0.11 µs


@cache
def fold_kernel(op: str, code: str) -> Any:
    """A reduction as a C function, whose ``address`` the kernels call; compiled now unless that was done before."""
    return folds.compile_fold(op, code, compile_cached)
