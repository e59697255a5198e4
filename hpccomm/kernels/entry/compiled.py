"""The body of the entry, compiled with intrinsics as memory operations."""

from __future__ import annotations

from hpccomm.kernels.compiler import compile_module
from hpccomm.kernels.entry import body

_scope = compile_module(body)
enter, leave = _scope["enter"], _scope["leave"]
