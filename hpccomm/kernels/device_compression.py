"""Compression of vectors on a device: vectors stay on the device, messages are on the host.

Indices, words, values, bits and scales are small beside the vectors.  They are copied to the host after they are made,
and to the device before they are added.
"""

from __future__ import annotations

import numpy as np

from hpccomm.kernels import cuda
from hpccomm.kernels.cuda import Kernels, to_host
from hpccomm.kernels.selection import reference


class DeviceCompression:
    """The functions of the references that compressors call on a device, same bits."""

    def __init__(self, kernels: Kernels) -> None:
        self.kernels, self.xp = kernels, kernels.xp
        self.moments, self.sum_by_sign = kernels.moments, kernels.sum_by_sign
        self.sum_magnitudes = kernels.sum_magnitudes

    def all_finite(self, x):
        return bool(self.xp.isfinite(x).all())

    # Threshold and selection

    def density_threshold(self, residual, gradient, density, step):
        """Only one magnitude is copied to the host."""
        functions = self.kernels.kth_magnitude, self.kernels.sample
        return reference.density_threshold(residual, gradient, density, step, *functions)

    def threshold_words(self, residual, gradient, out, tau):
        """The words are on the host."""
        words, finite = self.kernels.threshold_words(residual, gradient, out, tau)
        return to_host(words), finite

    def add_words(self, words, tau, out):
        self.kernels.add_words(self.xp.asarray(words), tau, out)

    def select_largest(self, x, k, step=0, least=1.0):
        """The indices are on the host."""
        index, finite = self.kernels.select_largest(x, k, step, least)
        return to_host(index), finite

    def momentum_select(self, gradient, momentum, velocity, m, k, **named):
        """Indices and values are on the host."""
        index, values, finite = self.kernels.momentum_select(gradient, momentum, velocity, m, k, **named)
        return to_host(index), to_host(values), finite

    def scatter_add(self, messages, out):
        to_device = self.xp.asarray
        self.kernels.scatter_add([(to_device(index), to_device(values)) for index, values in messages], out)

    # One bit an element

    def pack_signs(self, x):
        """The bits are on the host."""
        return to_host(self.kernels.pack_signs(x))

    def pack_signs_feedback(self, residual, gradient, out, plus, minus, bits):
        """The bits are on the host."""
        made = self.xp.empty(bits.size, np.uint8)
        self.kernels.pack_signs_feedback(residual, gradient, out, plus, minus, made)
        bits[...] = to_host(made)

    def add_signs(self, messages, out, fresh=False):
        if fresh:
            out[...] = 0
        self.kernels.add_signs([(self.xp.asarray(bits), plus, minus) for bits, plus, minus in messages], out)


def device_kernels() -> DeviceCompression:
    """The functions for the current device."""
    return DeviceCompression(cuda.kernels())
