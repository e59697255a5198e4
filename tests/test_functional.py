"""Any kind of array in, the same kind out, the right numbers on every rank, and the input as it was."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

from hpccomm.arrays import reduction_dtype
from hpccomm.communicator import Communicator
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.functional import allgather, allreduce, broadcast, communicator, reduce_scatter

pytestmark = pytest.mark.mpi

BFLOAT16 = ml_dtypes.bfloat16
FLOATS = ["f2", BFLOAT16, "f4", "f8", "g"]
OPS: dict[str, Any] = {"sum": np.sum, "mean": None, "avg": None, "min": np.min, "max": np.max, "prod": np.prod}
LENGTHS = (0, 1, 2, 3, 4, 7, 8, 1000)


def numbers(rank: int, n: int, dtype: Any = "f8") -> Any:
    """Small integers, other ones at every rank and position: 1 to 3, so that even products are exact."""
    return ((np.arange(n) * 5 + rank * 3) % 7 % 3 + 1).astype(dtype)


def rank_reduction(op: str, size: int, n: int, dtype: Any) -> Any:
    """What the collective should give: exact, and a mean divided and rounded as it is documented."""
    everyone = np.stack([numbers(rank, n, "i8") for rank in range(size)])
    if op in ("mean", "avg"):
        return (everyone.sum(axis=0).astype(reduction_dtype(np.dtype(dtype))) / size).astype(dtype)
    return np.asarray(OPS[op](everyone, axis=0)).astype(dtype)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        *((op, dtype) for op in OPS for dtype in FLOATS),
        *((op, dtype) for op in ("sum", "min", "max", "prod") for dtype in ("i2", "u4", "i8")),
        *((op, dtype) for op in ("sum", "mean", "avg", "prod") for dtype in ("F", "D")),
    ],
)
def test_allreduce_gives_the_exact_result(comm: MPI.Intracomm, op: str, dtype: Any) -> None:
    for n in LENGTHS:
        x = numbers(comm.rank, n, dtype)
        x.flags.writeable = False
        y = allreduce(x, op, comm)
        expected = rank_reduction(op, comm.size, n, x.dtype)
        assert y.dtype == x.dtype
        assert np.array_equal(y, expected)
        assert y is not x


@pytest.mark.parametrize("dtype", ["f2", BFLOAT16])
def test_16_bit_floats_are_rounded_by_half_an_ulp_a_hop(comm: MPI.Intracomm, dtype: Any) -> None:
    step = 2048 if dtype == "f2" else 256  # from here on the dtype knows even numbers only, so half an ulp is 1
    x = np.full(3, step if comm.rank == 0 else 1, dtype)
    total = allreduce(x, "sum", comm)
    assert total.dtype == x.dtype
    assert (abs(total.astype("f4") - (step + comm.size - 1)) <= comm.size - 1).all()
    assert len(set(comm.allgather(total.tobytes()))) == 1


def test_an_operation_of_mpi_is_taken_as_well_as_its_name(comm: MPI.Intracomm) -> None:
    x = numbers(comm.rank, 9, "i4")
    for op, name in ((MPI.SUM, "sum"), (MPI.MAX, "max"), (MPI.BOR, "bor")):
        assert np.array_equal(allreduce(x, op, comm), allreduce(x, name, comm))
        assert np.array_equal(reduce_scatter(x, op, comm), reduce_scatter(x, name, comm))


def test_the_mean_of_large_float16_does_not_overflow(comm: MPI.Intracomm) -> None:
    assert allreduce(np.float16(60000), "mean", comm) == np.float16(60000)


@pytest.mark.parametrize("scalar", [2, 2.5, 1 + 2j, np.float32(2), np.int8(2)])
def test_the_sum_of_a_scalar_is_a_scalar(comm: MPI.Intracomm, scalar: Any) -> None:
    total = allreduce(scalar, comm=comm)
    assert type(total) is type(scalar)
    assert total == scalar * comm.size


def test_min_and_max_of_bools_are_all_and_any(comm: MPI.Intracomm) -> None:
    x = np.array([True, False, comm.rank == 0, comm.rank != 0])
    alone = comm.size == 1
    assert allreduce(x, "min", comm).tolist() == [True, False, alone, False]
    assert allreduce(x, "max", comm).tolist() == [True, False, True, not alone]
    assert allreduce(comm.rank == 0, "max", comm) is True


def test_ranks_with_other_memory_orders_add_the_same_elements(comm: MPI.Intracomm) -> None:
    x = numbers(comm.rank, 12).reshape(3, 4)
    mine = [x, np.asfortranarray(x), x.repeat(2, axis=1)[:, ::2], x[::-1][::-1]][comm.rank % 4]
    assert np.array_equal(allreduce(mine, comm=comm), rank_reduction("sum", comm.size, 12, "f8").reshape(3, 4))


@pytest.mark.parametrize(
    ("x", "op", "remedy"),
    [
        (np.ones(2, "i4"), "mean", "the mean of int32 is not defined: cast it to float64, or use op='sum'"),
        (np.ones(2, "?"), "sum", "MPI does not define sum for bool: cast to an integer dtype, or use MPI.LOR"),
        (np.ones(2, "F"), "max", "MPI does not define max for complex64: reduce real"),
        (
            np.ones(2),
            "average",
            "op='average' is not an operation: pass an MPI.Op or one of 'avg', 'mean', 'sum', 'prod'",
        ),
        ([1.0], "sum", r"a list is not an array: pass np\.asarray"),
    ],
)
def test_undefined_reductions_are_refused_before_the_first_message(
    comm: MPI.Intracomm, x: Any, op: str, remedy: str
) -> None:
    with pytest.raises(ArgumentError, match=f"rank {comm.rank}: allreduce: {remedy}"):
        allreduce(x, op, comm)


@pytest.mark.parametrize("dtype", [*FLOATS, "i1", "?", "D"])
@pytest.mark.parametrize("shape", [(), (3,), (3, 2), (3, 0)])
def test_allgather_concatenates_uneven_arrays(comm: MPI.Intracomm, dtype: Any, shape: tuple[int, ...]) -> None:
    def part(rank: int) -> Any:
        rows = (rank * 2 + 1) % 4  # none on some ranks
        return numbers(rank, rows * int(np.prod(shape[1:])), dtype).reshape(rows, *shape[1:])

    gathered = allgather(part(comm.rank), comm)
    expected = np.concatenate([part(rank) for rank in range(comm.size)])
    assert gathered.dtype == expected.dtype
    assert np.array_equal(gathered, expected)


def test_allgather_of_scalars_has_one_row_for_each_rank(comm: MPI.Intracomm) -> None:
    assert allgather(comm.rank, comm).tolist() == list(range(comm.size))
    assert allgather(np.float32(comm.rank), comm).dtype == np.float32


def test_allgather_names_the_rank_with_a_different_row_shape(comm: MPI.Intracomm) -> None:
    if comm.size == 1:
        return
    odd = comm.rank == comm.size - 1
    for x in (np.ones((2, 3 if odd else 4)), np.ones(2, "f4" if odd else "f8")):
        with pytest.raises(MismatchError, match=f"allgather: rank {comm.size - 1} passed rows of float"):
            allgather(x, comm)


@pytest.mark.parametrize("op", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_reduce_scatter_is_this_ranks_part_of_allreduce(comm: MPI.Intracomm, op: str, dtype: Any) -> None:
    for rows in (0, 1, comm.size - 1, comm.size, comm.size + 1, 50):
        for width in ((), (3,)):
            n = rows * int(np.prod(width))
            x = numbers(comm.rank, n, dtype).reshape(rows, *width)
            whole = rank_reduction(op, comm.size, n, x.dtype).reshape(x.shape)
            assert np.array_equal(reduce_scatter(x, op, comm), np.array_split(whole, comm.size)[comm.rank])


def test_reduce_scatter_refuses_a_scalar(comm: MPI.Intracomm) -> None:
    with pytest.raises(ArgumentError, match="use allreduce"):
        reduce_scatter(1.0, comm=comm)


def test_allgather_of_reduce_scatter_is_allreduce(comm: MPI.Intracomm) -> None:
    x = numbers(comm.rank, 23)
    assert np.array_equal(allgather(reduce_scatter(x, comm=comm), comm), allreduce(x, comm=comm))


@pytest.mark.parametrize("dtype", [*FLOATS, "i1", "?", "D"])
def test_broadcast_copies_the_roots_array_to_all_ranks(comm: MPI.Intracomm, dtype: Any) -> None:
    for root in (0, comm.size - 1):
        for shape in ((), (0,), (3, 2)):
            x = np.full(shape, comm.rank + 1, dtype)
            x.flags.writeable = False
            y = broadcast(x, root, comm)
            assert y.dtype == x.dtype
            assert np.array_equal(y, np.full(shape, root + 1, dtype))
            y[...] = 0  # a copy, on the root too
            assert np.array_equal(x, np.full(shape, comm.rank + 1, dtype))


def test_broadcast_to_none_gives_a_numpy_array(comm: MPI.Intracomm) -> None:
    x = np.asfortranarray(numbers(3, 6).reshape(2, 3)) if comm.rank == 0 else None
    assert np.array_equal(broadcast(x, comm=comm), numbers(3, 6).reshape(2, 3))


def test_broadcast_refuses_an_array_of_another_shape_or_dtype(comm: MPI.Intracomm) -> None:
    x = np.ones(2 if comm.rank == 0 else 3)
    if comm.rank == 0:
        assert broadcast(x, 0, comm).tolist() == [1, 1]
    else:
        with pytest.raises(MismatchError, match=r"float64\[3\], the root, rank 0, one of float64\[2\]"):
            broadcast(x, 0, comm)


def test_broadcast_refuses_a_root_that_is_not_a_rank(comm: MPI.Intracomm) -> None:
    with pytest.raises(ArgumentError, match="is not a rank: pass one of 0"):
        broadcast(np.ones(2), comm.size, comm)


def test_a_named_algorithm_gives_the_same(comm: MPI.Intracomm) -> None:
    x = numbers(comm.rank, 100)
    for name in communicator(comm).algorithms("allreduce"):
        assert np.array_equal(allreduce(x, "sum", comm, name), rank_reduction("sum", comm.size, 100, "f8"))


def test_a_plain_communicator_is_wrapped_once(comm: MPI.Intracomm) -> None:
    plain = MPI.Intracomm(comm).Dup()
    assert communicator(plain) is communicator(plain)
    assert communicator(None) is communicator(MPI.COMM_WORLD)
    assert allreduce(1, comm=plain) == comm.size
    communicator(plain).Free()


def test_a_communicator_of_hpccomm_is_used_as_it_is(comm: MPI.Intracomm) -> None:
    ours = Communicator(comm)
    assert communicator(ours) is ours


def test_other_objects_are_refused_as_communicators() -> None:
    for wrong in (MPI.COMM_NULL, "world", 3):
        with pytest.raises(ArgumentError, match=r"pass an MPI\.Intracomm"):
            communicator(wrong)  # type: ignore[arg-type]


def test_torch_tensors_come_back_as_tensors(comm: MPI.Intracomm) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((2, 3), comm.rank + 1, dtype=dtype).t()
        expected = torch.full((3, 2), sum(range(1, comm.size + 1)), dtype=dtype)
        assert torch.equal(allreduce(x, comm=comm), expected)
        assert torch.equal(broadcast(x, 0, comm), torch.ones((3, 2), dtype=dtype))


def test_jax_arrays_come_back_as_jax_arrays(comm: MPI.Intracomm) -> None:
    jax = pytest.importorskip("jax")
    for dtype in ("float32", "bfloat16"):
        y = allgather(jax.numpy.full((1, 2), comm.rank, dtype), comm)
        assert isinstance(y, jax.Array)
        assert y.tolist() == [[rank, rank] for rank in range(comm.size)]
