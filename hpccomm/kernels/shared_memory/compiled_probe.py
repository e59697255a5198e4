"""The function of :mod:`hpccomm.kernels.shared_memory.probe`, compiled with intrinsics as memory operations."""

from __future__ import annotations

from hpccomm.kernels.compiler import compile_module
from hpccomm.kernels.shared_memory import probe as measurement

probe = compile_module(measurement)["probe"]
