"""The functions of :mod:`hpccomm.kernels.shared_memory.collectives`, compiled with intrinsics as memory operations."""

from __future__ import annotations

from hpccomm.kernels.compiler import compile_module
from hpccomm.kernels.shared_memory import collectives

globals().update({name: each for name, each in compile_module(collectives).items() if name in collectives.COLLECTIVES})
