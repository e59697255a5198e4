"""Sharded states of arrays of any library: PyTorch's tensors and a device's arrays take NumPy's steps, bit for bit.

The device is NumPy behind a wall (``fake_library.py``), its kernels run by ``emulated.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import Emulated
from fake_library import LIBRARY, Array

import hpccomm
from hpccomm import ArgumentError
from hpccomm.algorithms.sharded.checkpoints import export, load_shards, save_shards
from hpccomm.algorithms.sharded.units import adamw
from hpccomm.algorithms.states import leaves
from hpccomm.algorithms.transforms import chain, momentum, scale
from hpccomm.arrays import to_host, view_array
from hpccomm.kernels import cuda
from hpccomm.testing.ranks import run_on_ranks

SHAPES = {"embedding": {"table": (7, 3)}, "one": {"w": (5, 4), "b": (5,), "gain": ()}, "none": {"empty": (0, 2)},
          "out": {"w": (3, 5), "table": (7, 3)}}  # fmt: skip
"""The last table is the first unit's."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ZeRO-3": {},
    "16 bits": {"dtype": "f2"},
    "ZeRO-2": {"stage": 2, "dtype": "f2"},
    "ZeRO-1": {"stage": 1},
    "MiCS": {"partition_size": 2},
    "data parallel": {"partition_size": 1},
    "data parallel, 16 bits": {"partition_size": 1, "dtype": "f2"},
    "two levels": {"partition_size": 4},
    "ZeRO++": {"partition_size": 4, "weight_code": "int8", "gradient_code": "int4", "secondary_shard": True},
}
OPTIMIZERS: dict[str, Any] = {"momentum": chain(momentum(0.5), scale(-0.1)), "adamw": adamw(0.1, weight_decay=0.1)}


class DeviceComm:
    """Ranks whose collectives take the fake's arrays, both buffers of a call, as :class:`hpccomm.Communicator` does."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.comm, name)
        if name in ("intra_node", "inter_node"):
            return DeviceComm(found)
        if name in ("Split", "Dup"):
            return lambda *given: DeviceComm(found(*given))
        if name not in ("Allgather", "Alltoall", "Allreduce", "Reduce_scatter_block", "Bcast"):
            return found

        def call(*buffers: Any, **named: Any) -> Any:
            arrays = [each for each in buffers if isinstance(each, np.ndarray | Array)]
            assert len({type(each) for each in arrays}) == 1, "one buffer on the device, one on the host"
            return found(*(getattr(each, "host", each) for each in buffers), **named)

        return call


def to_torch(array: Any) -> Any:
    torch = pytest.importorskip("torch")
    return torch.nn.Parameter(torch.from_numpy(array.copy()))


LIBRARIES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], str]] = {
    "numpy": (np.copy, lambda comm: comm, "numpy"),
    "torch": (to_torch, lambda comm: comm, "torch"),
    "device": (LIBRARY.asarray, DeviceComm, "fake_library"),
}
"""The arrays of a library, the communicator that takes them, and their module."""


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "kernels", lambda: cuda.Kernels(Emulated(LIBRARY)))


def make(comm: Any, library: str, optimizer: str = "adamw", partition_size: int | None = None, **how: Any) -> Any:
    rng, (convert, wrap, _) = np.random.default_rng(5), LIBRARIES[library]
    weights = {
        unit: {name: convert(np.asarray(rng.normal(size=shape), "f4")) for name, shape in tensors.items()}
        for unit, tensors in SHAPES.items()
    }
    weights["out"]["table"] = weights["embedding"]["table"]
    if partition_size is None:
        return hpccomm.zero(wrap(comm), weights, OPTIMIZERS[optimizer], **how)
    return hpccomm.mics(wrap(comm), weights, OPTIMIZERS[optimizer], partition_size, **how)


def gradient_of(unit: str, step: int, rank: int, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng((list(SHAPES).index(unit), step, rank))
    return {name: np.asarray(rng.integers(-32, 33, shape) / 16, dtype) for name, shape in SHAPES[unit].items()}


def fill(there: Any, values: Any, library: str) -> None:
    """Write a gradient in place, as a program of this library would."""
    if library == "torch":
        there.copy_(to_torch(values).detach())
    else:
        there[...] = LIBRARIES[library][0](values)


def run(states: Any, rank: int, library: str, first: int = 0, last: int = 3) -> dict[str, bytes]:
    """The master weights after some steps; gathered parameters and buffers are of the library."""
    order, (convert, _, module) = list(SHAPES), LIBRARIES[library]
    for step in range(first, last):
        for at, unit in enumerate(walk := [*order, *reversed(order)]):
            gathered = states.gather(unit, ahead=walk[at + 1] if at + 1 < len(walk) else None)
            assert {type(each).__module__.partition(".")[0] for each in gathered.values()} == {module}
            states.release(unit)
            if at < len(order):
                continue
            given, room = gradient_of(unit, step, rank, states.dtype), states.gradient(unit)
            for name, each in given.items():
                fill(room[name], each, library)
            values = {name: convert(each) for name, each in given.items()}
            states.reduce_accumulate(unit, values if (at + step) % 2 else room, last=step % 2 == 0)
        assert not states.boundary().overflow
    return {
        f"{unit}.{name}": to_host(view_array(each)[0]).tobytes()
        for unit, tensors in states.consolidate()
        for name, each in tensors.items()
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("library", ["torch", "device"])
def test_every_library_takes_the_steps_of_numpy(library: str, setting: str) -> None:
    for optimizer in OPTIMIZERS:
        wanted, found = (
            run_on_ranks(
                4,
                lambda comm, kind=kind: run(make(comm, kind, optimizer, **SETTINGS[setting]), comm.rank, kind),
                [0, 0, 1, 1],
            )
            for kind in ("numpy", library)
        )
        assert found == wanted, optimizer
        assert all(each == found[0] for each in found)


@pytest.mark.parametrize("setting", ["ZeRO-3", "16 bits", "ZeRO-1", "data parallel", "ZeRO++"])
@pytest.mark.parametrize("library", ["numpy", "torch", "device"])
def test_an_offloaded_optimizer_takes_the_same_steps_and_lies_on_the_host(library: str, setting: str) -> None:
    def body(comm: Any, offload: bool) -> Any:
        states = make(comm, library, offload=offload, **SETTINGS[setting])
        found = run(states, comm.rank, library)
        vectors = [states.master, *(leaf for _, leaf in leaves(states.state) if getattr(leaf, "ndim", 0))]
        where = {type(each) for each in vectors}
        assert where == {np.ndarray if offload or library != "device" else Array}
        assert states.offloads == (offload and library == "device")
        assert type(states.total) is (Array if library == "device" else np.ndarray)
        return found, states.memory.states

    kept, moved = (run_on_ranks(4, lambda comm, o=o: body(comm, o), [0, 0, 1, 1]) for o in (False, True))
    assert kept == moved


@pytest.mark.parametrize("library", ["torch", "device"])
@pytest.mark.parametrize("offload", [False, True])
def test_saved_shards_continue_in_every_library(library: str, offload: bool, tmp_path: Path) -> None:
    def body(comm: Any, kind: str, folder: Path) -> Any:
        states = make(comm, kind, offload=offload)
        run(states, comm.rank, kind, 0, 2)
        save_shards(folder, "run", states)
        export(folder / "weights.npz", states)
        again = make(comm, kind, offload=offload)
        load_shards(folder, "run", again)
        return run(again, comm.rank, kind, 2, 4), run(states, comm.rank, kind, 2, 4)

    for kind in ("numpy", library):
        (tmp_path / kind).mkdir()
        found = run_on_ranks(2, lambda comm, kind=kind: body(comm, kind, tmp_path / kind))
        assert all(continued == live for continued, live in found)
    one, other = (np.load(tmp_path / kind / "weights.npz") for kind in ("numpy", library))
    assert all(np.array_equal(one[name], other[name]) for name in one.files if name.endswith(("w", "table")))


def test_an_overflow_on_a_device_skips_the_step() -> None:
    def body(comm: Any) -> None:
        states = make(comm, "device")
        before = {unit: {n: to_host(w) for n, w in tensors.items()} for unit, tensors in states.consolidate()}
        for unit in SHAPES:
            given = gradient_of(unit, 0, comm.rank, "f4")
            if unit == "one" and comm.rank:
                given["w"][0, 0] = np.inf
            states.reduce_accumulate(unit, {name: LIBRARY.asarray(each) for name, each in given.items()})
        assert states.boundary().overflow
        for unit, tensors in states.consolidate():
            assert all(np.array_equal(to_host(w), before[unit][name]) for name, w in tensors.items())

    run_on_ranks(2, body)


def test_mistakes_with_places_and_dtypes_are_named() -> None:
    def body(comm: Any) -> None:
        device = make(comm, "device")
        with pytest.raises(ArgumentError, match=r"gradient of one.w lies on the host, the weights on a device"):
            device.reduce_accumulate("one", {"w": np.zeros((5, 4), "f4")})
        host = make(comm, "numpy")
        with pytest.raises(ArgumentError, match=r"gradient of out lies on a device, the weights on the host"):
            host.reduce_accumulate("out", LIBRARY.zeros(15, np.float32))
        with pytest.raises(ArgumentError, match=r"gradient of out: a list is not an array: pass np.asarray"):
            host.reduce_accumulate("out", [0.0] * 15)
        units = {"a": {"w": LIBRARY.ones(3, np.float32)}, "b": {"w": np.ones(3, "f4")}}
        with pytest.raises(ArgumentError, match="some units lie on a device, others on the host"):
            hpccomm.zero(DeviceComm(comm), units, scale(-1.0))
        with pytest.raises(ArgumentError, match="bfloat16, which CuPy does not have"):
            make(comm, "device", dtype="bfloat16")
        with pytest.raises(ArgumentError, match=r"dtype is 'half of it': pass float32"):
            make(comm, "numpy", dtype="half of it")

    run_on_ranks(1, body)


def test_a_dtype_of_torch_is_understood() -> None:
    torch = pytest.importorskip("torch")

    def body(comm: Any) -> None:
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            states = make(comm, "torch", dtype=kind)
            assert {each.dtype for each in states.gather("one").values()} == {kind}
            states.release("one")

    run_on_ranks(2, body)
