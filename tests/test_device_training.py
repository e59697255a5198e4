"""Training on a fake device gives the same bits as on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulated import Emulated
from fake_device import FakeDevice
from fake_library import LIBRARY, Array

import hpccomm
from hpccomm.algorithms.device import run_on_host
from hpccomm.arrays import is_on_device
from hpccomm.buckets import Bucket
from hpccomm.kernels import cuda as cuda_kernels
from hpccomm.train.datasets import Dataset
from hpccomm.train.loop import Settings, train
from hpccomm.train.methods import METHODS, MethodSetup
from hpccomm.train.networks import Characters, Perceptron
from hpccomm.transports import cuda


class DeviceEverywhere(FakeDevice):
    """All memory is the device's."""

    def find_device(self, address: int) -> int | None:
        return self.number

    def allocate_like(self, x: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return Array(np.empty(shape, dtype))


def images(samples: int) -> Dataset:
    rng = np.random.default_rng(3)
    inputs, targets = rng.standard_normal((samples, 9)).astype("f4"), rng.integers(0, 4, samples)
    return Dataset(inputs, targets, inputs[:7], targets[:7], 4)


def text(samples: int) -> Dataset:
    rng = np.random.default_rng(4)
    inputs, targets = rng.integers(0, 5, (samples, 16)).astype(np.uint8), rng.integers(0, 5, samples)
    return Dataset(inputs, targets, inputs[:7], targets[:7], 5)


@pytest.mark.mpi(sizes=(2,), timeout=60)
@pytest.mark.parametrize("method", ["dense", "adam", "lars", "gtc", "dgc", "onebit-adam", "powersgd"])
@pytest.mark.parametrize("make", [images, text])
def test_a_run_on_the_device_gives_the_bits_of_a_run_on_the_host(
    comm: Any, monkeypatch: pytest.MonkeyPatch, method: str, make: Any
) -> None:
    monkeypatch.setattr(cuda, "device", DeviceEverywhere)
    monkeypatch.setattr(cuda_kernels, "kernels", lambda: cuda_kernels.Kernels(Emulated(LIBRARY)))
    ours, data = hpccomm.Communicator(comm.Dup()), make(25)  # the last batch of 8 has one sample: a rank has none
    found = []
    for library in (np, LIBRARY):
        network = Perceptron(9, 3, 4) if make is images else Characters(5, 2, 3)
        made = METHODS[method].make(MethodSetup(ours, Bucket(network.shapes), 0.1, 8))
        if library is LIBRARY and not METHODS[method].on_device:
            made = run_on_host(made)
        weights, epochs = train(ours, data, network, made, Settings(2, 8, 1, library=library))
        assert isinstance(weights, np.ndarray)
        found.append((weights, [(epoch.loss, epoch.accuracy, epoch.wire_bytes) for epoch in epochs]))
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    ours.Free()


def test_the_fake_library_refuses_host_arrays() -> None:
    x = LIBRARY.asarray(np.arange(3.0))
    assert is_on_device(x)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(AssertionError, match="NumPy's array among the device's"):
        x + np.arange(3.0)
