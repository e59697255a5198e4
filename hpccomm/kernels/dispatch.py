"""Selects the kernels for a vector: CUDA's where a device holds it, else compiled loops, else the NumPy reference."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

from hpccomm.arrays import is_on_device
from hpccomm.kernels.compression import reference
from hpccomm.kernels.numba_check import why_no_numba


def compression(vector: Any = None) -> Any:
    """The functions of :mod:`hpccomm.kernels.compression.reference`, with the same bits, for the memory of ``vector``.

    On a device they are those of :class:`~hpccomm.kernels.device_compression.DeviceCompression`.
    """
    if not is_on_device(vector):
        return host_kernels()
    from hpccomm.kernels.device_compression import device_kernels

    return device_kernels()


@cache
def host_kernels() -> ModuleType:
    """:mod:`hpccomm.kernels.compression.compiled`, or its reference where Numba cannot be imported."""
    if why_no_numba():
        return reference
    from hpccomm.kernels.compression import compiled

    return compiled
