"""Compression of vectors on a device: vectors stay on the device, messages are on the host.

Indices, words, values, bits and scales are small beside the vectors.  They are copied to the host after they are made,
and to the device before they are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpccomm.kernels import cuda
from hpccomm.kernels.cuda import Kernels, Vector, to_host
from hpccomm.kernels.selection.reference import sample_plan
from hpccomm.kernels.vectors import reference
from hpccomm.kernels.vectors.reference import Indices, Octets


class DeviceCompression:
    """The functions of the references that compressors call on a device, same bits."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels, self.xp = kernels, kernels.xp

    def all_finite(self, x: Vector) -> bool:
        """:func:`reference.all_finite`."""
        return bool(self.xp.isfinite(x).all())

    def moments(self, x: Vector) -> tuple[float, float]:
        """:func:`reference.moments`."""
        return self.kernels.moments(x)

    # Threshold and selection

    def density_threshold(self, residual: Vector, gradient: Vector | None, density: float, step: int) -> float:
        """:func:`reference.density_threshold`; only one magnitude is copied to the host."""
        n = residual.size
        plan = sample_plan(n, max(1, math.ceil(density * n)), step)
        if plan is not None:
            residual = self.kernels.sample(residual, plan)
            gradient = None if gradient is None else self.kernels.sample(gradient, plan)
        p = reference.backlog_of(residual, gradient)
        return self.kernels.kth_magnitude(p, max(1, math.ceil(density * p.size))) if n else 0.0

    def threshold_words(
        self, residual: Vector, gradient: Vector | None, out: Vector, tau: float
    ) -> tuple[Indices, bool]:
        """:func:`reference.threshold_words`: the words are on the host."""
        words, finite = self.kernels.threshold_words(residual, gradient, out, tau)
        return to_host(words), finite

    def add_words(self, words: Indices, tau: float, out: Vector) -> None:
        """:func:`reference.add_words`."""
        self.kernels.add_words(self.xp.asarray(words), tau, out)

    def select_largest(self, x: Vector, k: int, step: int = 0, least: float = 1.0) -> tuple[Indices, bool]:
        """:func:`reference.select_largest`: the indices are on the host."""
        index, finite = self.kernels.select_largest(x, k, step, least)
        return to_host(index), finite

    def momentum_select(
        self, gradient: Vector, momentum: Vector, velocity: Vector, m: float, k: int, **named: Any
    ) -> tuple[Indices, reference.Vector, bool]:
        """:func:`reference.momentum_select`: indices and values are on the host."""
        index, values, finite = self.kernels.momentum_select(gradient, momentum, velocity, m, k, **named)
        return to_host(index), to_host(values), finite

    def scatter_add(self, messages: Sequence[tuple[Indices, reference.Vector]], out: Vector) -> None:
        """:func:`reference.scatter_add`."""
        to_device = self.xp.asarray
        self.kernels.scatter_add([(to_device(index), to_device(values)) for index, values in messages], out)

    # One bit an element

    def sum_magnitudes(self, residual: Vector, gradient: Vector | None) -> float:
        """:func:`reference.sum_magnitudes`."""
        return self.kernels.sum_magnitudes(residual, gradient)

    def sum_by_sign(self, residual: Vector, gradient: Vector | None) -> tuple[float, float, int]:
        """:func:`reference.sum_by_sign`."""
        return self.kernels.sum_by_sign(residual, gradient)

    def pack_signs(self, x: Vector) -> Octets:
        """:func:`reference.pack_signs`: the bits are on the host."""
        return to_host(self.kernels.pack_signs(x))

    def pack_signs_feedback(
        self, residual: Vector, gradient: Vector | None, out: Vector, plus: float, minus: float, bits: Octets
    ) -> None:
        """:func:`reference.pack_signs_feedback`: the bits are on the host."""
        made = self.xp.empty(bits.size, np.uint8)
        self.kernels.pack_signs_feedback(residual, gradient, out, plus, minus, made)
        bits[...] = to_host(made)

    def add_signs(self, messages: Sequence[tuple[Octets, float, float]], out: Vector, fresh: bool = False) -> None:
        """:func:`reference.add_signs`."""
        if fresh:
            out[...] = 0
        self.kernels.add_signs([(self.xp.asarray(bits), plus, minus) for bits, plus, minus in messages], out)


def device_kernels() -> DeviceCompression:
    """The functions for the current device."""
    return DeviceCompression(cuda.kernels())
