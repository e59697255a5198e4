"""Numba's compiler for the kernels, with a cache on disk that processes share, and calls of what it compiled.

Only the modules ``loops`` and ``compiled`` of the families, and the intrinsics, import Numba.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import FunctionType, MappingProxyType, ModuleType
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba
from numpy import ndarray

from hpccomm.kernels import intrinsics

SOURCES = ("intrinsics.py", "simd.py", "reductions/loops.py", "vectors/loops.py")
_text = b"".join((Path(__file__).parent / each).read_bytes() for each in SOURCES)
CACHE_TAG = f"{llvmlite.binding.get_host_cpu_name()}_{zlib.crc32(_text):08x}"
"""What machine code depends on besides its own source: the processor, intrinsics, shared loops."""

jit = partial(numba.njit, nogil=True, error_model="numpy")


def compile_module(
    module: ModuleType, instead: Mapping[str, Callable[..., Any]] = MappingProxyType({})
) -> dict[str, Any]:
    """The globals of a module whose functions are compiled, with intrinsics as its memory operations.

    ``instead`` replaces functions of the module by others of the same name, for measurements.
    """
    scope = dict(vars(module))
    for name in instead:
        assert isinstance(scope[name], FunctionType), name
    for name, function in vars(module).items():
        if not isinstance(function, FunctionType):
            continue
        if function.__module__ == module.__name__:
            here = FunctionType(instead.get(name, function).__code__, scope, name)
            scope[name] = jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)(here)
        elif hasattr(intrinsics, name):
            scope[name] = getattr(intrinsics, name)
    return scope


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


def loop(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the types for which :func:`machine_code` compiles a function."""

    def declare(function: Any) -> Callable[..., Any]:
        function.signature = signature
        return function  # type: ignore[no-any-return]

    return declare


@cache
def machine_code(function: Any) -> Any:
    """A loop, compiled at the first request."""
    dispatcher = compile_cached(jit, function, function.__name__)
    dispatcher.compile(function.signature)
    dispatcher.disable_compile()
    (only,) = dispatcher.overloads.values()
    return only.entry_point


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a loop; an array is passed as its address, None as 0."""
    return machine_code(function)(
        *[0 if x is None else x.__array_interface__["data"][0] if isinstance(x, ndarray) else x for x in arguments]
    )


def address_of(x: Any) -> int:
    """The address of an array; 0 for None."""
    return 0 if x is None else int(x.__array_interface__["data"][0])
