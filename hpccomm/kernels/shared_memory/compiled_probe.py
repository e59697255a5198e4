"""The function of :mod:`hpccomm.kernels.shared_memory.probe`, compiled with intrinsics as memory operations."""

from __future__ import annotations

from hpccomm.kernels.compiler import compile_module
from hpccomm.kernels.shared_memory import probe

run_probe = compile_module(probe)["run_probe"]
