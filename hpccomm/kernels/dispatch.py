"""Selects the kernels for a vector: CUDA's where a device holds it, else compiled loops, else the NumPy reference."""

from __future__ import annotations

import importlib
from functools import cache
from types import SimpleNamespace
from typing import Any

from hpccomm.arrays import is_on_device
from hpccomm.kernels.numba_check import why_no_numba

FAMILIES = ("vectors", "selection", "index_codes", "signs", "quantized")
"""The folders with the kernels of compressed exchange."""


def kernels(vector: Any = None) -> Any:
    """The functions of all families, with the bits of their references, for the memory of ``vector``.

    On a device they are those of :class:`~hpccomm.kernels.device_compression.DeviceCompression`.
    """
    if not is_on_device(vector):
        return host_kernels()
    from hpccomm.kernels.device_compression import device_kernels

    return device_kernels()


@cache
def host_kernels() -> SimpleNamespace:
    """The compiled functions, or the references where Numba cannot be imported."""
    return load_kernels("reference" if why_no_numba() else "compiled")


@cache
def load_kernels(module: str) -> SimpleNamespace:
    """The functions of one module of all families: ``"reference"`` or ``"compiled"``."""
    modules = [importlib.import_module(f"{__package__}.{family}.{module}") for family in FAMILIES]
    return SimpleNamespace(**{name: each for one in modules for name, each in vars(one).items() if callable(each)})
