"""On a device: every collective gives the host's bits with every transport, with kernels in flight on other streams."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI
from test_device_arrays import CASES, operand
from test_device_methods import BUCKET, METHODS, has_same_bits, leaves, run_steps

import hpccomm
from hpccomm import ArgumentError, TransportError
from hpccomm.algorithms.large_batch import lamb, lars
from hpccomm.kernels.reductions.reference import reduce
from hpccomm.transports import cuda

if cuda.unavailable_reason():
    pytest.skip(cuda.unavailable_reason(), allow_module_level=True)

RANKS = pytest.mark.mpi(sizes=(1, 2, 4), timeout=120)
RUNS = {2: 1000}
"""Calls with kernels in flight, by the number of ranks; 100 with other numbers."""
DELAY = """
extern "C" __global__ void delay(long long ticks) {
    long long begin = clock64();
    while (clock64() - begin < ticks) {}
}
"""


class Array:
    """An array that a kernel on a side stream is still writing; its interface names that stream, as Numba's does."""

    def __init__(self, values: np.ndarray) -> None:
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.delay = cupy.RawKernel(DELAY, "delay")
        self.x = cupy.asarray(np.ascontiguousarray(values))
        cupy.cuda.get_current_stream().synchronize()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.x.__cuda_array_interface__, "stream": self.stream.ptr}

    def fill(self, values: np.ndarray, ticks: int = 100_000) -> None:
        import cupy

        source = cupy.asarray(np.ascontiguousarray(values))
        cupy.cuda.get_current_stream().synchronize()
        with self.stream:
            self.delay((1,), (1,), (np.int64(ticks),))
            self.x[...] = source

    def get(self) -> np.ndarray:
        return self.x.get(stream=self.stream)


class Arrays:
    """The array library of the cases."""

    def array(self, values: Any, stream: int = 1, number: int | None = None) -> Array:
        return Array(np.array(values))


@pytest.fixture(params=["staged", "ipc", "nccl", "aware", "auto"])
def ours(comm: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[hpccomm.Communicator]:
    """A communicator that moves device arrays by one transport."""
    monkeypatch.setenv(cuda.TRANSPORT, request.param)
    made = hpccomm.Communicator(comm.Dup())
    try:
        made.device_transports()
    except TransportError as error:
        made.Free()
        pytest.skip(str(error))
    yield made
    made.Free()


@RANKS
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_collective_is_right_with_every_transport(ours: hpccomm.Communicator, case: Any) -> None:
    planner: Any = ours._device_planner
    for n in (0, 1, 1000, 300_001):
        bound, written, want = case(planner, Arrays(), n)
        bound.run()
        assert np.array_equal(written.get().ravel(), np.ravel(want)), n


@RANKS
@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16, "f8", "c8", "i1", "u8", "?"])
def test_every_dtype_has_the_bits_of_the_reference(ours: hpccomm.Communicator, dtype: Any) -> None:
    import cupy

    if dtype is ml_dtypes.bfloat16:
        pytest.skip("CuPy has no bfloat16: PyTorch's tensors are tested below")
    values = [(operand(k, 5001, "f4") / 8).astype(dtype) for k in range(ours.size)]
    op, word = (MPI.LOR, "lor") if dtype == "?" else (MPI.SUM, "sum")
    x, want = cupy.asarray(values[ours.rank]), np.empty_like(values[0])
    reduce(word, dtype, values, want)
    ours.Allreduce(MPI.IN_PLACE, x, op)
    assert np.array_equal(x.get(), want)


@RANKS
def test_pytorch_tensors_keep_their_device_and_dtype(ours: hpccomm.Communicator) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = (torch.arange(1001, device="cuda") % 50 + ours.rank).to(dtype)
        got = hpccomm.allreduce(x, comm=ours)
        assert (got.device, got.dtype) == (x.device, dtype)
        want = sum((torch.arange(1001) % 50 + rank).float() for rank in range(ours.size))
        assert torch.equal(got.float().cpu(), want)


@RANKS
def test_jax_arrays_keep_their_device(ours: hpccomm.Communicator) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no device")
    x = jax.numpy.arange(1001, dtype="float32") + ours.rank
    got = hpccomm.allreduce(x, comm=ours)
    assert isinstance(got, jax.Array)
    assert got.devices() == x.devices()
    assert np.array_equal(np.asarray(got), sum(np.arange(1001, dtype="f4") + rank for rank in range(ours.size)))


@RANKS
def test_a_call_waits_for_kernels_in_flight_on_a_side_stream(ours: hpccomm.Communicator) -> None:
    n = 2000
    x, y = Array(np.zeros(n, "f4")), Array(np.zeros(n, "f4"))
    for step in range(RUNS.get(ours.size, 100)):
        x.fill(operand(ours.rank + step % 7, n))
        y.fill(np.full(n, -1, "f4"))
        ours.Allreduce(x, y)
        x.fill(np.full(n, np.nan, "f4"), 0)  # on the side stream again: what was sent must have been read
        want = np.sum([operand(k + step % 7, n) for k in range(ours.size)], axis=0)
        assert np.array_equal(y.get(), want), step


@RANKS
@pytest.mark.parametrize("name", METHODS)
def test_methods_keep_their_state_on_the_device_and_give_the_hosts_bits(
    comm: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cupy

    monkeypatch.setenv(cuda.TRANSPORT, "staged")  # sums of floats round as the host's do
    ours = hpccomm.Communicator(comm.Dup())
    (steps, state, _), (found, kept, _) = (run_steps(ours, METHODS[name](ours), xp, odd=4) for xp in (np, cupy))
    assert all(isinstance(each, cupy.ndarray) for each in found)
    assert all(has_same_bits(a, b) for a, b in zip(found, steps, strict=True))
    assert all(has_same_bits(a, b) for a, b in zip(leaves(kept), leaves(state), strict=True))
    ours.Free()


@pytest.mark.parametrize("make", [lambda: lars(BUCKET, 0.1, weight_decay=0.1), lambda: lamb(BUCKET, 0.1)])
def test_trust_ratio_steps_stay_on_the_device_and_give_the_hosts_bits(make: Any) -> None:
    import cupy

    made = make()
    (steps, state, _), (found, kept, _) = (
        run_steps(SimpleNamespace(rank=0, size=1), made, xp, odd=None) for xp in (np, cupy)
    )
    assert all(isinstance(each, cupy.ndarray) for each in [*found, *leaves(kept)])
    assert all(has_same_bits(a, b) for a, b in zip([*found, *leaves(kept)], [*steps, *leaves(state)], strict=True))


@pytest.mark.mpi(sizes=(2,), timeout=60)
def test_bad_arrays_are_refused_and_the_next_call_succeeds(comm: Any) -> None:
    import cupy

    ours, x = hpccomm.Communicator(comm.Dup()), cupy.ones((4, 6), "f4")
    with pytest.raises(ArgumentError, match="not contiguous"):
        ours.Allreduce(MPI.IN_PLACE, x[:, ::2])
    with pytest.raises(ArgumentError, match="on the host"):
        ours.Allreduce(np.ones(24, "f4"), x)
    address = cupy.cuda.runtime.malloc(1 << 20)
    cupy.cuda.runtime.free(address)
    lost = cupy.ndarray((4,), "f4", cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, 16, None), 0))
    with pytest.raises(ArgumentError, match="not on a device, or was freed"):
        ours.Allreduce(MPI.IN_PLACE, lost)
    if cuda.device().count > 1:
        with cupy.cuda.Device(1):
            elsewhere = cupy.ones(4, "f4")
        with pytest.raises(ArgumentError, match="lies on device 1, this rank uses device 0"):
            ours.Allreduce(MPI.IN_PLACE, elsewhere)
    ours.Allreduce(MPI.IN_PLACE, x)
    assert (x.get() == ours.size).all()
    ours.Free()
