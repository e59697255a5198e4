"""The compiled kernels, or their NumPy reference where Numba is not installed."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

from hpccomm.kernels import compression_reference


@cache
def compression() -> ModuleType:
    """:mod:`hpccomm.kernels.compression` or :mod:`hpccomm.kernels.compression_reference`: same functions, same bits."""
    if importlib.util.find_spec("numba") is None:
        return compression_reference
    from hpccomm.kernels import compression as compiled

    return compiled
