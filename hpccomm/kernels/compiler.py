"""Numba's compiler for the kernels, with a cache on disk that processes share, and calls of what it compiled.

Only the modules ``loops`` and ``compiled`` of the families, and the intrinsics, import Numba.
"""

from __future__ import annotations

import threading
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
from hpccomm.log import logger

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


_lock = threading.RLock()
"""Held while a thread compiles: a variant is named by its function's name, which other variants share."""


def compile_cached(function: Callable[..., Any], name: str, signature: Any) -> Any:
    """Compile for some types, with a cache on disk if that can be read and written.

    Numba numbers the cache entries of one function name.  Two processes that compile a function for different
    operations or processors at the same time would write the same file, so each variant gets its own name.  With a
    full disk or a damaged cache it is compiled in memory.
    """
    with _lock:
        function.__qualname__ = f"{name}_{CACHE_TAG}"
        try:
            dispatcher = jit(cache=True)(function)
            dispatcher.compile(signature)
        except Exception as error:  # what reading a damaged file raises depends on where it is damaged
            dispatcher = jit()(function)
            dispatcher.compile(signature)
            warn_once(str(error) or type(error).__name__)
        dispatcher.disable_compile()
        return dispatcher


def warn_once(trouble: str, told: list[str] = []) -> None:  # noqa: B006
    """Say once in a process that there is no cache."""
    if not told:
        told.append(trouble)
        logger().warning(f"compiled functions are not kept on disk ({trouble}): they are compiled in memory")


def loop(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the types for which :func:`machine_code` compiles a function."""

    def declare(function: Any) -> Callable[..., Any]:
        function.signature = signature
        return function  # type: ignore[no-any-return]

    return declare


@cache
def machine_code(function: Any) -> Any:
    """A loop, compiled at the first request."""
    (only,) = compile_cached(function, function.__name__, function.signature).overloads.values()
    return only.entry_point


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a loop; an array is passed as its address, None as 0."""
    return machine_code(function)(
        *[0 if x is None else x.__array_interface__["data"][0] if isinstance(x, ndarray) else x for x in arguments]
    )


def address_of(x: Any) -> int:
    """The address of an array; 0 for None."""
    return 0 if x is None else int(x.__array_interface__["data"][0])
