"""The collectives of :mod:`hpccomm.kernels.shared`, compiled with machine instructions as memory operations."""

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
"""What the machine code depends on besides its own source: the processor, the intrinsics and the record layouts."""

jit = partial(numba.njit, nogil=True, error_model="numpy")


def compile_cached(compiler: Callable[..., Any], function: Callable[..., Any], name: str) -> Any:
    """Compile, with a cache on disk if a folder is writable.

    Numba numbers the cache entries of one function name.  Two processes that compile a function for different
    operations or processors at the same time would write the same file, so each variant gets its own name.
    """
    function.__qualname__ = f"{name}_{CACHE_TAG}"
    try:
        return compiler(cache=True)(function)
    except RuntimeError:  # no folder to write to
        return compiler()(function)


def compile_globals(instead: Mapping[str, Callable[..., Any]] = MappingProxyType({})) -> dict[str, Any]:
    """The globals of :mod:`hpccomm.kernels.shared` with every function compiled.

    ``instead`` replaces functions by others of the same name, for measurements; nothing is then cached on disk.
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
    """The machine code of a collective, compiled at the first request."""
    function: Any = _scope[name]
    function.compile("int64(int64)")
    function.disable_compile()
    (only,) = function.overloads.values()
    return only.entry_point  # type: ignore[no-any-return]  # spares the dispatcher: half of 0.11 µs


@cache
def fold_kernel(op: str, code: str) -> Any:
    """A reduction as a C function, compiled at the first request; the kernels call its ``address``."""
    return folds.compile_fold(op, code, compile_cached)
