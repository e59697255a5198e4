"""Arrays on a fake device, whose streams run their work when they are synchronised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_device import SIDE, FakeArray, FakeDevice
from mpi4py import MPI
from thread_ranks import ThreadTransport, run_on_threads

import hpccomm
from hpccomm import ArgumentError, MismatchError, arrays
from hpccomm.arrays import StreamBuffer
from hpccomm.backends.staged import columns
from hpccomm.calls.plans import Plan
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.engine import bind_segments
from hpccomm.device_planner import DevicePlanner
from hpccomm.settings import ON_HOST
from hpccomm.testing.ranks import run_on_ranks
from hpccomm.transports import cuda
from hpccomm.transports.cuda import Chunk, Extent, Staging

SIZES = (1, 2, 3, 5, 7)
F4 = np.dtype("f4")


def operand(rank: int, n: int, dtype: Any = "f4") -> np.ndarray:
    """Distinct per rank and position, small enough that every order of summation is exact."""
    return ((rank + 1) * 10 + np.arange(n) % 97).astype(dtype)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few elements per chunk, so that a few hundred make many chunks."""
    monkeypatch.setattr(cuda, "LEAST_CHUNK", 16)
    monkeypatch.setattr(cuda, "MOST_CHUNK", 160)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    made = FakeDevice()
    monkeypatch.setattr(cuda, "device", lambda: made)
    return made


# Staging through the host


def double(incoming: np.ndarray, outgoing: np.ndarray) -> None:
    outgoing.view(F4)[...] = 2 * incoming.view(F4)


def run_doubling(device: FakeDevice, n: int, each: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """The result of doubling, in chunks, a vector that a kernel is still writing; and the right result."""
    x, y = device.array(np.zeros(n, F4), SIDE), device.array(np.zeros(n, F4), SIDE)
    x.fill(operand(0, n))
    a, b = (arrays.read_device(side, "test") for side in (x, y))
    chunks = []
    for lo in range(0, n, each):
        nbytes = 4 * (min(lo + each, n) - lo)
        chunks.append(Chunk([Extent(a.address + 4 * lo, 0, nbytes)], double, [Extent(b.address + 4 * lo, 0, nbytes)]))
    Staging(device).run(chunks, a.streams)
    return y.get(), 2 * operand(0, n)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("n", [0, 1, 9, 10, 11, 21, 205])
def test_every_chunk_is_written_to_its_own_place(n: int, eager: bool) -> None:
    got, want = run_doubling(FakeDevice(eager=eager), n)
    assert np.array_equal(got, want)


class ImpatientDevice(FakeDevice):
    """Never synchronises one of the streams."""

    def __init__(self, never: int) -> None:
        super().__init__()
        self.never = never

    def synchronize(self, stream: int) -> None:
        if stream != self.never:
            super().synchronize(stream)


@pytest.mark.parametrize("never", [SIDE, 102, 103], ids=["the user's stream", "down", "up"])
def test_the_fake_device_detects_a_missing_synchronisation(never: int) -> None:
    device = ImpatientDevice(never)
    x = device.array(np.zeros(50, F4), SIDE)
    y = device.array(np.zeros(50, F4))
    x.fill(operand(0, 50))
    a, b = (arrays.read_device(side, "test") for side in (x, y))
    staging = Staging(device)
    assert (staging.down, staging.up) == (102, 103)
    staging.run([Chunk([Extent(a.address, 0, 200)], double, [Extent(b.address, 0, 200)])], a.streams)
    assert not np.array_equal(y.memory, 2 * operand(0, 50))


def test_the_fake_device_detects_a_missing_second_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    def single(self: Staging, which: str, nbytes: int) -> list[np.ndarray]:
        return [self._buffers.setdefault(which, [np.empty(4096, np.uint8)])[0]] * 2

    monkeypatch.setattr(Staging, "bounce_buffers", single)
    got, want = run_doubling(FakeDevice(eager=True), 205)
    assert not np.array_equal(got, want)


def test_copies_overlap_the_collective() -> None:
    device = FakeDevice()
    staging = Staging(device)
    x = device.array(np.zeros(40, F4))
    begun: list[tuple[int, int]] = []

    def body(incoming: np.ndarray, outgoing: np.ndarray) -> None:
        begun.append((len(device.queues[staging.down]), len(device.queues[staging.up])))
        outgoing[...] = incoming

    address = arrays.read_device(x, "test").address
    extents = [Extent(address + 40 * k, 0, 40) for k in range(4)]
    staging.run([Chunk([extent], body, [extent]) for extent in extents])
    assert begun == [(1, 0), (1, 1), (1, 1), (0, 1)]


def test_a_failing_collective_leaves_no_copy_behind() -> None:
    device = FakeDevice()
    staging = Staging(device)
    x = device.array(np.zeros(40, F4))

    def body(incoming: np.ndarray, outgoing: np.ndarray) -> None:
        raise RuntimeError("a rank is gone")

    extent = Extent(arrays.read_device(x, "test").address, 0, 80)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        staging.run([Chunk([extent], body, [extent])] * 3)
    assert not any(device.queues.values())


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_every_schedule_runs_on_chunks_of_device_arrays(name: str, p: int) -> None:
    algorithm = ALGORITHMS["allreduce"][name]

    def body(transport: ThreadTransport) -> np.ndarray:
        device, n = FakeDevice(eager=transport.rank % 2 == 1), 100
        x = device.array(np.zeros(n, "i8"), SIDE)
        x.fill(operand(transport.rank, n, "i8"))

        def host(incoming: np.ndarray, outgoing: np.ndarray) -> None:
            outgoing[...] = incoming
            steps = algorithm.steps(transport.rank, p)
            bind_segments(steps, outgoing.view("i8"), algorithm.blocks(p), 1, transport, np.add)()

        known = arrays.read_device(x, "test")
        extents = [Extent(known.address + 8 * lo, 0, 8 * (hi - lo)) for lo, hi in columns(n, 8)]
        assert len(extents) > 3
        Staging(device).run([Chunk([extent], host, [extent]) for extent in extents], known.streams)
        return x.get()

    for got in run_on_threads(p, body):
        assert np.array_equal(got, sum(operand(rank, 100, "i8") for rank in range(p)))


# Every collective, ranks as threads


class ThreadPlanner(DevicePlanner):
    """A planner for thread-ranks, whose communicator has no other algorithm and compares calls itself."""

    def __init__(self, comm: Any, device: FakeDevice, transport: str = "staged") -> None:
        host = {
            "Allreduce": lambda a, b, op, *_: comm.Allreduce(a, b, op),
            "Reduce": lambda a, b, op, root, *_: comm.Reduce(a, b, op, root),
            "Reduce_scatter": lambda a, b, counts, op, *_: comm.Reduce_scatter(a, b, counts, op),
            "Reduce_scatter_block": lambda a, b, op, *_: comm.Reduce_scatter_block(a, b, op),
            "Bcast": lambda a, root, _: comm.Bcast(a, root),
            "Allgather": lambda a, b, _: comm.Allgather(a, b),
            "Allgatherv": lambda a, b, _: comm.Allgatherv(a, b),
            "Alltoall": lambda a, b, _: comm.Alltoall(a, b),
        }
        found = SimpleNamespace(
            settings={cuda.TRANSPORT: transport, "HPCCOMM_ALGORITHM": ""},
            layout=comm.layout,
            node=comm,
            private_comm=comm,
        )
        made = SimpleNamespace(rank=comm.rank, size=comm.size, algorithm="auto", context=found, **host)
        made._own_context = found
        super().__init__(made)
        self.__dict__["staging"] = Staging(device)

    def bind_check(self, *_: Any, **__: Any) -> Callable[[], None]:  # type: ignore[override]
        return lambda: None


Case = Callable[[ThreadPlanner, FakeDevice, int], tuple[Plan, FakeArray | None, Any]]
"""``case(planner, device, n)``: a call, the array it writes on this rank, and what it should write."""


def pending_array(device: FakeDevice, values: np.ndarray) -> FakeArray:
    """An array whose contents a kernel is still writing."""
    x = device.array(np.zeros_like(values), SIDE)
    x.fill(values)
    return x


def operand_sum(p: int, n: int) -> np.ndarray:
    return np.sum([operand(rank, n) for rank in range(p)], axis=0, dtype="f4")


def allreduce(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    x, y = pending_array(device, operand(planner.rank, n)), device.array(np.zeros(n, F4))
    return planner.bind(None, "Allreduce", x, y, MPI.SUM, None), y, operand_sum(planner.size, n)


def allreduce_in_place(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    x = pending_array(device, operand(planner.rank, n))
    return planner.bind(None, "Allreduce", MPI.IN_PLACE, x, MPI.SUM, None), x, operand_sum(planner.size, n)


def reduce(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    root = planner.size - 1
    x, y = pending_array(device, operand(planner.rank, n)), device.array(np.zeros(n, F4))
    here = planner.rank == root
    bound = planner.bind(None, "Reduce", x, y if here else None, MPI.SUM, root, None)
    return bound, y if here else x, operand_sum(planner.size, n) if here else operand(planner.rank, n)


def bcast(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    x = pending_array(device, operand(planner.rank, n))
    return planner.bind(None, "Bcast", None, x, planner.size // 2, None), x, operand(planner.size // 2, n)


def allgather(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    x, y = pending_array(device, operand(planner.rank, n)), device.array(np.zeros(n * planner.size, F4))
    return planner.bind(None, "Allgather", x, y, None), y, np.concatenate([operand(k, n) for k in range(planner.size)])


def allgather_in_place(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    whole = np.zeros((planner.size, n), F4)
    whole[planner.rank] = operand(planner.rank, n)
    x = pending_array(device, whole)
    return (
        planner.bind(None, "Allgather", MPI.IN_PLACE, x, None),
        x,
        np.stack([operand(k, n) for k in range(planner.size)]),
    )


def allgatherv(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    counts = [(n + k) % 9 for k in range(planner.size)]
    displs = [10 * k + 1 for k in range(planner.size)]
    x, y = (
        pending_array(device, operand(planner.rank, counts[planner.rank])),
        pending_array(device, np.full(10 * planner.size, -1, F4)),
    )
    want = np.full(10 * planner.size, -1, F4)
    for k, (count, displ) in enumerate(zip(counts, displs, strict=True)):
        want[displ : displ + count] = operand(k, count)
    return planner.bind(None, "Allgatherv", x, [y, counts, displs, MPI.FLOAT], None), y, want


def reduce_scatter_block(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    p, r = planner.size, planner.rank
    x, y = pending_array(device, operand(r, n * p)), device.array(np.zeros(n, F4))
    return (
        planner.bind(None, "Reduce_scatter_block", x, y, MPI.SUM, None),
        y,
        operand_sum(p, n * p)[r * n : (r + 1) * n],
    )


def reduce_scatter(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    counts = tuple((n + k) % 9 for k in range(planner.size))
    first, total = sum(counts[: planner.rank]), sum(counts)
    x, y = pending_array(device, operand(planner.rank, total)), device.array(np.zeros(counts[planner.rank], F4))
    bound = planner.bind(None, "Reduce_scatter", x, y, counts, MPI.SUM, None)
    return bound, y, operand_sum(planner.size, total)[first : first + counts[planner.rank]]


def alltoall(planner: ThreadPlanner, device: FakeDevice, n: int) -> Any:
    p, r = planner.size, planner.rank
    x, y = pending_array(device, operand(r, n * p)), device.array(np.zeros(n * p, F4))
    return (
        planner.bind(None, "Alltoall", x, y, None),
        y,
        np.concatenate([operand(k, n * p)[r * n : (r + 1) * n] for k in range(p)]),
    )


CASES: list[Case] = [
    allreduce,
    allreduce_in_place,
    reduce,
    bcast,
    allgather,
    allgather_in_place,
    allgatherv,
    reduce_scatter_block,
    reduce_scatter,
    alltoall,
]


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_collective_runs_through_the_host(case: Case, p: int) -> None:
    for n, eager in itertools.product((0, 1, 7, 100), (False, True)):

        def body(comm: Any, n: int = n, eager: bool = eager) -> None:
            device = FakeDevice(eager=eager)
            bound, written, want = case(ThreadPlanner(comm, device), device, n)
            for _ in range(1 if "in_place" in case.__name__ else 2):
                bound.run()
            assert written is not None
            assert np.array_equal(written.get().ravel(), np.ravel(want)), (comm.rank, n)

        run_on_ranks(p, body)


# Reading arrays on a device


def test_streams_come_from_the_array_the_caller_or_the_default(device: FakeDevice) -> None:
    x = device.array(np.zeros(3), SIDE)
    assert arrays.read_device(x, "test").streams == (SIDE,)
    assert arrays.read_device(x, "test", 77).streams == (77, SIDE)
    assert arrays.read_device(x, "test", SimpleNamespace(ptr=78)).streams == (78, SIDE)
    assert arrays.read_device(x, "test", SimpleNamespace(cuda_stream=79)).streams == (79, SIDE)
    x.stream = None  # type: ignore[assignment]
    assert arrays.read_device(x, "test").streams == (arrays.DEFAULT_STREAM,)


@pytest.mark.parametrize(
    ("strides", "order"),
    [(None, "C"), ((48, 16, 4), "C"), ((4, 8, 24), "F"), ((48, 16, 8), ""), ((-48, 16, 4), "")],
)
def test_memory_order_is_read_from_the_strides(strides: tuple[int, ...] | None, order: str) -> None:
    assert arrays.memory_order((2, 3, 4), strides, 4) == order
    assert arrays.memory_order((1, 3, 4), (999, 16, 4), 4) == "C"
    assert arrays.memory_order((0, 3, 4), (8, 8, 8), 4) == "C"


class DeletedArray:
    """A JAX array whose buffer was donated."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise RuntimeError("Array has been deleted")


def test_unreadable_arrays_are_refused_with_a_remedy(device: FakeDevice) -> None:
    assert arrays.is_on_device(DeletedArray())
    with pytest.raises(ArgumentError, match=r"test: DeletedArray cannot be read .*deleted.* is alive"):
        arrays.read_device(DeletedArray(), "test")
    x = device.array(np.zeros((4, 4)))
    x.memory = x.memory[:, ::2]
    with pytest.raises(ArgumentError, match=r"test: the array is not contiguous \(shape \(4, 2\).*ascontiguousarray"):
        arrays.read_device(x, "test")


@pytest.mark.parametrize("given", [None, 3, np.zeros(3), [1, 2], MPI.IN_PLACE, bytearray(3), MPI.memory()])
def test_host_memory_is_not_mistaken_for_a_device_array(given: Any) -> None:
    assert not arrays.is_on_device(given)


# The communicator


@pytest.fixture
def ours(comm: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[hpccomm.Communicator, FakeDevice]]:
    made = FakeDevice()
    monkeypatch.setattr(cuda, "device", lambda: made)
    monkeypatch.setenv(cuda.TRANSPORT, "staged")
    duplicate = hpccomm.Communicator(comm.Dup())
    yield duplicate, made
    duplicate.Free()


FEW = pytest.mark.mpi(sizes=(1, 3), timeout=120)


@FEW
def test_allreduce_with_every_algorithm_in_and_out_of_place(ours: Any) -> None:
    comm, device = ours
    for algorithm, n in itertools.product(comm.algorithms("allreduce"), (0, 1, 50)):
        x, y = pending_array(device, operand(comm.rank, n)), device.array(np.zeros(n, F4), SIDE)
        comm.Allreduce(x, y, algorithm=algorithm)
        comm.Allreduce(MPI.IN_PLACE, x, MPI.SUM, algorithm)
        assert np.array_equal(y.get(), operand_sum(comm.size, n)), algorithm
        assert np.array_equal(x.get(), operand_sum(comm.size, n)), algorithm


@FEW
@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16, "c8", "i4"])
def test_other_dtypes_are_reduced_as_on_the_host(ours: Any, dtype: Any) -> None:
    comm, device = ours
    values = (operand(comm.rank, 50, "f4") / 8).astype(dtype)
    want = np.empty_like(values)
    comm.Allreduce(values, want)
    assert np.array_equal(hpccomm.allreduce(pending_array(device, values), comm=comm).get(), want)


@FEW
def test_all_the_other_collectives_and_their_algorithms(ours: Any) -> None:
    comm, device = ours
    p, r, n = comm.size, comm.rank, 23
    for algorithm in comm.algorithms("allgather"):
        x, y = pending_array(device, operand(r, n)), device.array(np.zeros(n * p, F4))
        comm.Allgather(x, y, algorithm)
        assert np.array_equal(y.get(), np.concatenate([operand(k, n) for k in range(p)])), algorithm
        y.fill(np.zeros(n * p))
        comm.Allgatherv(x, [y, [n] * p], algorithm)
        assert np.array_equal(y.get(), np.concatenate([operand(k, n) for k in range(p)])), algorithm
    for algorithm in comm.algorithms("reduce_scatter"):
        x, y = pending_array(device, operand(r, n * p)), device.array(np.zeros(n, F4))
        comm.Reduce_scatter_block(x, y, algorithm=algorithm)
        assert np.array_equal(y.get(), operand_sum(p, n * p)[r * n : (r + 1) * n]), algorithm
        comm.Reduce_scatter(x, y, [n] * p, MPI.SUM, algorithm)
        assert np.array_equal(y.get(), operand_sum(p, n * p)[r * n : (r + 1) * n]), algorithm
    for algorithm in comm.algorithms("reduce"):
        x, y = pending_array(device, operand(r, n)), device.array(np.zeros(n, F4))
        comm.Reduce(x, y if r == 0 else None, MPI.SUM, 0, algorithm)
        assert r or np.array_equal(y.get(), operand_sum(p, n)), algorithm
    for algorithm in comm.algorithms("bcast"):
        x = pending_array(device, operand(r, n))
        comm.Bcast(x, p - 1, algorithm)
        assert np.array_equal(x.get(), operand(p - 1, n)), algorithm
    for algorithm in comm.algorithms("alltoall"):
        x, y = pending_array(device, operand(r, n * p)), device.array(np.zeros(n * p, F4))
        comm.Alltoall(x, y, algorithm)
        assert np.array_equal(y.get(), np.concatenate([operand(k, n * p)[r * n : (r + 1) * n] for k in range(p)]))


@FEW
def test_mpis_own_collectives_run_on_host_copies(ours: Any) -> None:
    comm, device = ours
    p, r, n = comm.size, comm.rank, 6
    parts, total = [operand(k, n) for k in range(p)], operand(r, n * p)
    counts, displs = [n] * p, [n * k for k in range(p)]

    def array(values: Any) -> FakeArray:
        return pending_array(device, np.asarray(values, F4))

    x, y = array(parts[r]), array(np.full(n * p, -1))
    comm.Gather(x, y if r == 0 else None, 0)
    comm.Gatherv(x, [y, counts, displs, MPI.FLOAT] if r == 0 else None, 0)
    assert np.array_equal(y.get(), np.concatenate(parts) if r == 0 else np.full(n * p, -1))
    comm.Scatter(array(operand(7, n * p)) if r == 0 else None, x, 0)
    assert np.array_equal(x.get(), operand(7, n * p)[r * n : (r + 1) * n])
    comm.Scatterv([array(operand(8, n * p)), counts, displs, MPI.FLOAT] if r == 0 else None, x, 0)
    assert np.array_equal(x.get(), operand(8, n * p)[r * n : (r + 1) * n])
    comm.Alltoallv([array(total), counts], [y, counts])
    assert np.array_equal(y.get(), np.concatenate([operand(k, n * p)[r * n : (r + 1) * n] for k in range(p)]))
    x = array(parts[r])
    comm.Scan(MPI.IN_PLACE, x)
    assert np.array_equal(x.get(), np.sum(parts[: r + 1], axis=0))
    x = array(np.zeros(n))
    comm.Exscan(parts[r], x)  # one array on the host, the other on the device
    assert np.array_equal(x.get(), np.sum(parts[:r], axis=0) if r else np.zeros(n))


@FEW
def test_compressed_collectives_of_device_arrays_return_device_arrays(ours: Any) -> None:
    comm, device = ours
    n, r = 40, comm.rank
    index, values = np.arange(r, n, 5 + r, dtype=np.uint32), operand(r, len(range(r, n, 5 + r)))
    there = pending_array(device, index), pending_array(device, values)
    for want, got in zip(comm.sparse_allgather(index, values, n), comm.sparse_allgather(*there, n), strict=True):
        for a, b in zip(want, got, strict=True):
            assert isinstance(b, FakeArray)
            assert np.array_equal(a, b.get())
    for algorithm, k in (("split", None), ("ok_topk", 7)):
        comm.message_gather.set_room(0)  # the initial size: bytes depend on the length of the last messages
        want = comm.sparse_allreduce(index, values, n, k=k, algorithm=algorithm)
        comm.message_gather.set_room(0)
        got = comm.sparse_allreduce(*there, n, k=k, algorithm=algorithm)
        assert np.array_equal(want.total, got.total.get())
        assert [np.array_equal(a, b.get()) for a, b in zip(want.remainder, got.remainder, strict=True)] == [True] * 2
        assert (want.path, want.bytes_sent) == (got.path, got.bytes_sent)
        again = comm.sparse_allreduce(*there, n, k=k, algorithm=algorithm, plan=got.plan)
        assert np.array_equal(want.total, again.total.get()) or k
    bits = np.packbits(operand(r, n) % 2 == 0)
    want = comm.onebit_allgather(bits, 1.0, -2.0, n)
    assert np.array_equal(want, comm.onebit_allgather(pending_array(device, bits), 1.0, -2.0, n).get())
    errors = np.zeros(n, "f4"), np.zeros(n // comm.size + (r < n % comm.size), "f4")
    here = [pending_array(device, each) for each in (operand(r, n), *errors)]
    want, got = comm.onebit_allreduce(operand(r, n), *errors), comm.onebit_allreduce(*here)
    assert np.array_equal(want.mean, got.mean.get())
    assert (want.scale, want.bytes_sent) == (got.scale, got.bytes_sent)
    for a, b in zip(errors, here[1:], strict=True):
        assert np.array_equal(a, b.get())


@FEW
def test_a_stream_passed_by_the_caller_is_synchronised(ours: Any) -> None:
    comm, device = ours
    x, y = device.array(np.zeros(9, F4), SIDE), device.array(np.zeros(9, F4))
    x.fill(operand(comm.rank, 9))
    x.stream = 1
    comm.Allreduce(x, y, stream=SIDE)
    assert np.array_equal(y.get(), operand_sum(comm.size, 9))
    x.stream = SIDE
    x.fill(operand(comm.rank, 9))
    x.stream = 1
    assert np.array_equal(hpccomm.allreduce(x, comm=comm, stream=SIDE).get(), operand_sum(comm.size, 9))


@FEW
def test_functions_return_the_type_of_their_input(ours: Any) -> None:
    comm, device = ours
    p, r = comm.size, comm.rank
    x = pending_array(device, operand(r, 12).reshape(4, 3))
    for op, reproducible in (("sum", False), ("mean", False), ("max", False), ("sum", True)):
        got = hpccomm.allreduce(x, op, comm, reproducible=reproducible)
        assert isinstance(got, FakeArray)
        want = hpccomm.allreduce(operand(r, 12).reshape(4, 3), op, comm, reproducible=reproducible)
        assert got.shape == (4, 3)
        assert np.array_equal(got.get(), want)
    host = operand(r, 12).reshape(4, 3)
    half, fortran = pending_array(device, host.astype("f2")), pending_array(device, np.asfortranarray(host))
    want = hpccomm.allreduce(host.astype("f2"), "mean", comm)
    assert np.array_equal(hpccomm.allreduce(half, "mean", comm).get(), want)
    assert np.array_equal(hpccomm.allreduce(fortran, "mean", comm).get(), hpccomm.allreduce(host, "mean", comm))
    assert np.array_equal(hpccomm.allgather(fortran, comm).get(), hpccomm.allgather(host, comm))
    for op in ("mean", "max"):
        want = hpccomm.reduce_scatter(host, op, comm)
        assert np.array_equal(hpccomm.reduce_scatter(fortran, op, comm).get(), want)
    want = hpccomm.reduce_scatter(host.astype("f2"), "mean", comm)
    assert np.array_equal(hpccomm.reduce_scatter(half, "mean", comm).get(), want)
    scalar = hpccomm.allgather(pending_array(device, np.float32(r + 1)), comm)
    assert scalar.get().tolist() == [k + 1 for k in range(p)]
    with pytest.raises(ArgumentError, match="reduce_scatter: a scalar cannot be divided"):
        hpccomm.reduce_scatter(pending_array(device, np.float32(1)), "sum", comm)
    uneven = pending_array(device, operand(r, 3 * r).reshape(r, 3))
    assert np.array_equal(
        hpccomm.allgather(uneven, comm).get(), hpccomm.allgather(operand(r, 3 * r).reshape(r, 3), comm)
    )
    assert np.array_equal(hpccomm.allgather(x, comm).get(), hpccomm.allgather(host, comm))
    assert np.array_equal(hpccomm.reduce_scatter(x, "sum", comm).get(), hpccomm.reduce_scatter(host, "sum", comm))
    assert np.array_equal(hpccomm.broadcast(x, p - 1, comm).get(), operand(p - 1, 12).reshape(4, 3))
    other = hpccomm.broadcast(x if r == 0 else None, 0, comm)
    assert isinstance(other, np.ndarray if r else FakeArray)


@FEW
def test_persistent_calls_refuse_arrays_on_a_device(ours: Any) -> None:
    comm, device = ours
    x, y = device.array(np.zeros(9, F4)), device.array(np.zeros(9, F4))
    with pytest.raises(ArgumentError, match="Allreduce_init: MPI's own requests cannot take an array on a device"):
        comm.Allreduce_init(x, y)


@FEW
def test_an_average_on_a_device_is_divided_there(ours: Any) -> None:
    comm, device = ours
    x, y = device.array(operand(comm.rank, 9)), device.array(np.zeros(9, F4))
    comm.Allreduce(x, y, "avg")
    assert np.array_equal(y.get(), np.sum([operand(k, 9) for k in range(comm.size)], axis=0) / F4.type(comm.size))


@FEW
def test_bad_arrays_are_refused_before_the_first_message(ours: Any) -> None:
    comm, device = ours
    fine, freed = device.array(np.zeros(4, F4)), device.array(np.ones(4, F4))
    elsewhere = device.array(np.zeros(4, F4), number=1)
    device.free(freed)
    locked = device.array(np.zeros(4, F4))
    locked.memory.flags.writeable = False
    for bad, message in (
        ((freed, fine), "not on a device, or was freed"),
        ((elsewhere, fine), r"lies on device 1, this rank uses device 0: copy it, .*Device\(1\)\.use\(\)"),
        ((np.zeros(4, F4), fine), "one buffer lies on a device, the other, ndarray, on the host"),
        ((fine, np.zeros(4, F4)), "one buffer lies on a device, the other, ndarray, on the host"),
        ((fine, device.array(np.zeros(5, F4))), "sends 4 float32, receives 5 float32"),
        ((fine, locked), "read-only"),
        ((fine, device.array(np.zeros(4, "f8"))), "sends 4 float32, receives 4 float64"),
    ):
        with pytest.raises(ArgumentError, match=f"rank {comm.rank}: Allreduce: .*{message}"):
            comm.Allreduce(*bad)
    with pytest.raises(ArgumentError, match="algorithm='nonsense' is not available"):
        comm.Allreduce(fine, device.array(np.zeros(4, F4)), algorithm="nonsense")
    with pytest.raises(ArgumentError, match=r"Scan: the receive array is read-only"):
        comm.Scan(fine, locked)
    with pytest.raises(ArgumentError, match=r"Gather: the array's memory is not on a device, or was freed"):
        comm.Gather(freed, fine)
    assert np.array_equal(fine.get(), np.zeros(4))


@pytest.mark.mpi(sizes=(3,), timeout=120)
@pytest.mark.parametrize("algorithm", [None, "native"])
def test_all_ranks_raise_if_their_arrays_lie_in_different_memory(ours: Any, algorithm: str | None) -> None:
    comm, device = ours
    x = np.ones(50, F4) if comm.rank == 1 else device.array(np.ones(50, F4))
    y = np.empty(50, F4) if comm.rank == 1 else device.array(np.zeros(50, F4))
    with pytest.raises(MismatchError, match=r"float32 on a device.*same memory on all ranks"):
        comm.Allreduce(x, y, algorithm=algorithm)


@FEW
def test_kernels_in_flight_on_a_side_stream_are_never_overtaken(ours: Any) -> None:
    comm, device = ours
    x, y = device.array(np.zeros(30, F4), SIDE), device.array(np.zeros(30, F4), SIDE)
    for step in range(100):
        x.fill(operand(comm.rank + step, 30))
        y.fill(np.full(30, -1))
        comm.Allreduce(x, y)
        assert np.array_equal(y.memory, np.sum([operand(k + step, 30) for k in range(comm.size)], axis=0))


# Without CuPy, and without a driver


def test_an_error_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> Any:
        raise hpccomm.TransportError("CuPy is not installed: pip install cupy-cuda12x")

    monkeypatch.setattr(cuda, "device", nothing)
    x = FakeDevice().array(np.zeros(3))
    with pytest.raises(ArgumentError, match=r"Allreduce: the array lies on a device: CuPy is not installed: pip"):
        hpccomm.Communicator(MPI.COMM_SELF.Dup()).Allreduce(MPI.IN_PLACE, x)


def test_memory_that_the_host_can_address_needs_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.TRANSPORT, ON_HOST)
    x, y = FakeDevice().array(operand(0, 5)), FakeDevice().array(np.zeros(5, F4))
    comm = hpccomm.Communicator(MPI.COMM_SELF.Dup())
    comm.Allreduce(x, y)
    assert y.memory.tolist() == operand(0, 5).tolist()
    comm.Gather(y, x, 0)
    assert x.memory.tolist() == operand(0, 5).tolist()


@pytest.mark.parametrize("name", ["Allgather", "Alltoall"])
def test_arrays_of_different_dtypes_are_refused(name: str) -> None:
    def body(comm: Any) -> None:
        device = FakeDevice()
        planner = ThreadPlanner(comm, device)
        send, recv = (
            device.array(np.zeros(4 * (comm.size if name == "Alltoall" else 1), "f4")),
            device.array(np.zeros(2 * comm.size, "f8")),
        )
        with pytest.raises(ArgumentError, match=f"{name}: sends float32, receives float64: make both the same"):
            planner.bind(None, name, send, recv, None)

    run_on_ranks(2, body)


def test_a_wrapped_stream_reaches_only_arrays_on_a_device(device: FakeDevice) -> None:
    host, there = np.zeros(3), device.array(np.zeros(3))
    a, b, c = hpccomm.Communicator(MPI.COMM_SELF.Dup())._planner.attach_stream(5, host, there, MPI.IN_PLACE)
    assert a is host
    assert c is MPI.IN_PLACE
    assert isinstance(b, StreamBuffer)
    assert (b.buffer, b.stream) == (there, 5)
