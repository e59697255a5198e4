"""The kernels of :mod:`hpccomm.kernels.compression_reference` compiled: same functions, same bits."""

from __future__ import annotations

from hpccomm.kernels.compression_reference import *  # noqa: F403
