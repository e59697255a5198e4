"""Numba's compiler for the kernels, with a cache on disk that processes share.

Only the modules ``loops`` and ``compiled`` of the families, and the intrinsics, import Numba.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import llvmlite.binding  # type: ignore[import-untyped]
import numba

SOURCES = ("intrinsics.py", "simd.py", "shared_memory/records.py")
_text = b"".join((Path(__file__).parent / each).read_bytes() for each in SOURCES)
CACHE_TAG = f"{llvmlite.binding.get_host_cpu_name()}_{zlib.crc32(_text):08x}"
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
