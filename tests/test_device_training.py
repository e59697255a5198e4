"""Training on a fake device gives the same bits as on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import Emulated
from fake_device import FakeDevice
from fake_library import LIBRARY, Array

import hpccomm
from hpccomm.algorithms.device import run_on_host
from hpccomm.algorithms.states import leaves
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


BUCKETED: dict[str, Any] = {
    "mean": hpccomm.mean,
    "sgd": lambda comm: hpccomm.synchronous_sgd(comm, 0.1, momentum=0.5),
    "gtc": hpccomm.gtc,
    "dgc": lambda comm, bucket: hpccomm.dgc(comm, bucket, 0.2, smallest=1, momentum=0.5),
    "onebit_adam": lambda comm, bucket: hpccomm.onebit_adam(comm, 0.1, 2, bucket=bucket),
}


@pytest.mark.mpi(sizes=(1, 2), timeout=60)
@pytest.mark.parametrize("method", BUCKETED)
def test_buckets_on_the_device_take_the_steps_of_buckets_on_the_host(
    comm: Any, monkeypatch: pytest.MonkeyPatch, method: str, tmp_path: Path
) -> None:
    """Also after a step that is not finite, and with new buckets after their states were saved and restored."""
    monkeypatch.setattr(cuda, "device", DeviceEverywhere)
    monkeypatch.setattr(cuda_kernels, "kernels", lambda: cuda_kernels.Kernels(Emulated(LIBRARY)))
    ours, found = hpccomm.Communicator(comm.Dup()), []
    shapes = {"first": (12, 5), "bias": (7,), "number": (), "last": (3, 4, 2)}
    for library in (np, LIBRARY):
        weights = {name: library.asarray(np.ones(shape, "f4")) for name, shape in shapes.items()}
        exchange = hpccomm.BucketedExchange(ours, weights, BUCKETED[method], 150)
        assert len(exchange.buckets) == 2
        steps = []
        for number in range(5):
            for k, (name, shape) in enumerate(reversed(shapes.items())):
                values = np.random.default_rng([ours.rank, number, k]).normal(size=shape).astype("f4")
                values[...] = np.inf if number == 2 and name == "first" and ours.rank == ours.size - 1 else values
                exchange.add({name: library.asarray(values)})
            for name, step in exchange.finish().items():
                assert type(step) is type(weights[name])
                steps.append(step.get() if library is LIBRARY else step.copy())
                weights[name] += step
            if number == 3:
                file, before = tmp_path / f"{library.__name__}.{ours.rank}.npz", exchange
                hpccomm.save(file, method=before.collect_state())
                exchange = hpccomm.BucketedExchange(ours, weights, BUCKETED[method], 150)
                exchange.restore_state(hpccomm.load(file, method=exchange.collect_state())[0])
                for (path, old), (_, new) in zip(leaves(before.state), leaves(exchange.state), strict=True):
                    assert is_on_device(old) == is_on_device(new), path
        assert before.skipped == 1
        found.append(steps)
        if library is LIBRARY:
            for name, array, why in (
                ("last", np.ones(shapes["last"], "f4"), "one of the gradient of last and the weight lies on a device"),
                ("bias", LIBRARY.asarray(np.ones(7)), "the gradient of bias is float64"),
            ):
                with pytest.raises(hpccomm.ArgumentError, match=why):
                    exchange.add({name: array})
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))
    ours.Free()


def test_the_fake_library_refuses_host_arrays() -> None:
    x = LIBRARY.asarray(np.arange(3.0))
    assert is_on_device(x)
    with pytest.raises(TypeError, match="Implicit conversion"):
        np.asarray(x)
    with pytest.raises(AssertionError, match="NumPy's array among the device's"):
        x + np.arange(3.0)
