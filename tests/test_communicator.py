"""The communicator keeps MPI's semantics with every algorithm at every size, with equal bits on all ranks."""

from __future__ import annotations

import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import verifiable
from mpi4py import MPI

import hpccomm
from hpccomm import ArgumentError, Communicator

pytestmark = pytest.mark.mpi

EVERY_SIZE = pytest.mark.mpi(sizes=(1, 2, 3, 4, 5, 7, 8), timeout=400)

OPERATIONS = {name: getattr(MPI, name.upper()) for name in verifiable.FOLDS}


def lengths(p: int) -> list[int]:
    return sorted({0, 1, p - 1, p, p + 1, 1000})


def long_length(dtype: str) -> int:
    """A million elements of three sizes; the other types, whose reductions alone differ, get 65,537."""
    return 2**20 + 1 if dtype in ("i1", "f4", "f8") else 2**16 + 1


def operand(rank: int, n: int, dtype: Any) -> Any:
    """Distinct per rank and position."""
    return verifiable.operand(rank, 16, n, dtype)


def total(p: int, n: int, dtype: Any) -> Any:
    """The sum of all operands."""
    return sum((operand(rank, n, dtype) for rank in range(1, p)), operand(0, n, dtype)).astype(dtype)


def have_same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays hold the same bytes."""
    return np.array_equal(a.view("u1"), b.view("u1"))


def check_allreduce(comm: Communicator, n: int, dtype: Any, op: str) -> None:
    """Every algorithm, out of place and in place (twice), against numbers that are exact in any order."""
    mine, want = (
        verifiable.operand(comm.rank, comm.size, n, dtype, op),
        verifiable.reduction(comm.size, n, dtype, op),
    )
    for algorithm in comm.algorithms("allreduce"):
        a, b = mine.copy(), np.empty(n, dtype)
        comm.Allreduce(a, b, OPERATIONS[op], algorithm=algorithm)
        assert np.array_equal(a, mine), "the input was touched"
        assert have_same_bits(b, want), (algorithm, n, dtype, op)
        for _ in range(2):
            a[...] = mine
            comm.Allreduce(MPI.IN_PLACE, a, OPERATIONS[op], algorithm=algorithm)
            assert np.array_equal(a, want), (algorithm, n, dtype, op)


@EVERY_SIZE
def test_allreduce_is_exact_for_every_algorithm_length_and_dtype(comm: Communicator) -> None:
    for n in lengths(comm.size):
        for dtype in verifiable.DTYPES if n in (comm.size + 1, 1000) else ("i1", "f4", "c16"):
            check_allreduce(comm, n, dtype, "lxor" if dtype == "?" else "sum")


@EVERY_SIZE
def test_allreduce_of_a_million_elements_is_exact(comm: Communicator) -> None:
    for dtype in verifiable.DTYPES:
        check_allreduce(comm, long_length(dtype), dtype, "lxor" if dtype == "?" else "sum")


@EVERY_SIZE
def test_every_operation_is_exact(comm: Communicator) -> None:
    for dtype in ("i4", "f8", "?"):
        for op in verifiable.operations(dtype):
            check_allreduce(comm, 100, dtype, op)


def test_reduce_gives_the_root_the_result_and_touches_nothing_else(comm: Communicator) -> None:
    for algorithm in comm.algorithms("reduce"):
        for root in range(comm.size):
            for n in lengths(comm.size):
                a = operand(comm.rank, n, "f4")
                b = np.full(n, -1, "f4")
                comm.Reduce(a, b, root=root, algorithm=algorithm)
                assert np.array_equal(a, operand(comm.rank, n, "f4"))
                want = total(comm.size, n, "f4") if comm.rank == root else np.full(n, -1, "f4")
                assert np.array_equal(b, want)
                here = comm.rank == root
                comm.Reduce(MPI.IN_PLACE if here else a, a if here else None, root=root, algorithm=algorithm)
                if here:
                    assert np.array_equal(a, want)


def test_bcast_copies_the_root_everywhere(comm: Communicator) -> None:
    for algorithm in comm.algorithms("bcast"):
        for root in range(comm.size):
            for n in (*lengths(comm.size), 70000):
                a = operand(comm.rank, n, "f8")
                comm.Bcast(a, root, algorithm=algorithm)
                assert np.array_equal(a, operand(root, n, "f8"))


@pytest.mark.mpi(sizes=(2, 3, 5), timeout=400)
def test_the_other_collectives_are_exact_with_a_million_elements(comm: Communicator) -> None:
    p, me = comm.size, comm.rank
    for dtype in verifiable.DTYPES:
        n = long_length(dtype)
        ends = [0, *(n * (k + 1) // p for k in range(p))]
        mine = slice(ends[me], ends[me + 1])
        op = "lxor" if dtype == "?" else "sum"
        a, want = verifiable.operand(me, p, n, dtype, op), verifiable.reduction(p, n, dtype, op)
        for algorithm in comm.algorithms("reduce"):
            b = np.zeros(n, dtype)
            comm.Reduce(a, b, OPERATIONS[op], p - 1, algorithm=algorithm)
            assert np.array_equal(b, want if me == p - 1 else np.zeros(n, dtype)), ("reduce", algorithm, dtype)
        for algorithm in comm.algorithms("reduce_scatter"):
            b = np.zeros(ends[me + 1] - ends[me], dtype)
            comm.Reduce_scatter(a, b, np.diff(ends).tolist(), OPERATIONS[op], algorithm=algorithm)
            assert np.array_equal(b, want[mine]), ("reduce_scatter", algorithm, dtype)
        for algorithm in comm.algorithms("allgather"):
            b = np.zeros(n, dtype)
            places = [b, np.diff(ends).tolist(), ends[:-1], MPI.Datatype.fromcode(np.dtype(dtype).char)]
            comm.Allgatherv(want[mine], places, algorithm=algorithm)
            assert np.array_equal(b, want), ("allgather", algorithm, dtype)
        for algorithm in comm.algorithms("bcast"):
            b = want.copy() if me == p - 1 else np.zeros(n, dtype)
            comm.Bcast(b, p - 1, algorithm=algorithm)
            assert np.array_equal(b, want), ("bcast", algorithm, dtype)
        assert np.array_equal(a, verifiable.operand(me, p, n, dtype, op)), "the input was touched"


def test_bcast_of_a_derived_datatype_works_with_every_algorithm(comm: Communicator) -> None:
    datatype = MPI.DOUBLE.Create_vector(5, 1, 2).Commit()
    for algorithm in comm.algorithms("bcast"):
        a = operand(comm.rank, 10, "f8")
        comm.Bcast([a, 1, datatype], 0, algorithm=algorithm)
        want = operand(comm.rank, 10, "f8")
        want[::2] = operand(0, 10, "f8")[::2]
        assert np.array_equal(a, want), algorithm
    datatype.Free()


def test_allgather_collects_in_rank_order(comm: Communicator) -> None:
    for algorithm in comm.algorithms("allgather"):
        for n in (0, 1, 7, 1000):
            want = np.concatenate([operand(rank, n, "i4") for rank in range(comm.size)])
            b = np.full(n * comm.size, -1, "i4")
            comm.Allgather(operand(comm.rank, n, "i4"), b, algorithm=algorithm)
            assert np.array_equal(b, want)
            b[...] = -1
            b[n * comm.rank : n * (comm.rank + 1)] = operand(comm.rank, n, "i4")
            comm.Allgather(MPI.IN_PLACE, b, algorithm=algorithm)
            assert np.array_equal(b, want)


def test_allgather_of_a_derived_datatype_meets_plain_memory_on_other_ranks(comm: Communicator) -> None:
    datatype = MPI.INT32_T.Create_vector(3, 1, 2).Commit()
    want = np.concatenate([operand(rank, 3, "i4") for rank in range(comm.size)])
    for algorithm in comm.algorithms("allgather"):
        b = np.full(3 * comm.size, -1, "i4")
        spread = np.repeat(operand(comm.rank, 3, "i4"), 2)
        mine = [spread, 1, datatype] if comm.rank % 2 else operand(comm.rank, 3, "i4")
        comm.Allgather(mine, b, algorithm=algorithm)
        assert np.array_equal(b, want), algorithm
    datatype.Free()


def test_allgatherv_puts_uneven_parts_where_they_are_wanted(comm: Communicator) -> None:
    counts = [(5 * rank) % 4 for rank in range(comm.size)]
    displs = [10 * (comm.size - 1 - rank) for rank in range(comm.size)]
    for algorithm in comm.algorithms("allgather"):
        b = np.full(10 * comm.size, -1, "f4")
        comm.Allgatherv(
            operand(comm.rank, counts[comm.rank], "f4"), [b, counts, displs, MPI.FLOAT], algorithm=algorithm
        )
        want = np.full(10 * comm.size, -1, "f4")
        for rank, (count, displ) in enumerate(zip(counts, displs, strict=True)):
            want[displ : displ + count] = operand(rank, count, "f4")
        assert np.array_equal(b, want)


def test_reduce_scatter_gives_every_rank_its_part(comm: Communicator) -> None:
    comm.Barrier()  # the first call opens the doors
    for algorithm in comm.algorithms("reduce_scatter"):
        counts = [(5 * rank) % 4 for rank in range(comm.size)]
        ends = np.cumsum([0, *counts])
        a = operand(comm.rank, int(ends[-1]), "f8")
        b = np.empty(counts[comm.rank])
        want = total(comm.size, int(ends[-1]), "f8")[ends[comm.rank] : ends[comm.rank + 1]]
        comm.Reduce_scatter(a, b, counts, algorithm=algorithm)
        assert np.array_equal(b, want)
        bound = set(comm.plans.plans)
        for buffer in (b, [b, MPI.DOUBLE] if comm.rank == 0 else b):
            b[...] = 0
            comm.Reduce_scatter(a, buffer, algorithm=algorithm)
            assert np.array_equal(b, want)
        assert set(comm.plans.plans) == bound  # what was bound with the counts said
        assert np.array_equal(a, operand(comm.rank, int(ends[-1]), "f8"))


def test_reduce_scatter_block_gives_equal_parts(comm: Communicator) -> None:
    for algorithm in comm.algorithms("reduce_scatter"):
        for n in (0, 1, 1000):
            a, b = operand(comm.rank, n * comm.size, "i8"), np.empty(n, "i8")
            want = total(comm.size, n * comm.size, "i8")[n * comm.rank : n * (comm.rank + 1)]
            comm.Reduce_scatter_block(a, b, algorithm=algorithm)
            assert np.array_equal(b, want)
            comm.Reduce_scatter_block(MPI.IN_PLACE, a, algorithm=algorithm)
            assert np.array_equal(a[:n], want)


def test_a_view_is_one_result_for_all_ranks_of_a_node(comm: Communicator) -> None:
    p, me = comm.size, comm.rank
    for n in (1, 5, 3000, 70_001):
        y = comm.register(operand(me, n, "f4").reshape(1, n))
        view = comm.Allreduce_view(y)
        assert view.shape == y.shape
        assert not view.flags.writeable
        assert np.array_equal(view[0], total(p, n, "f4"))
        assert np.array_equal(y[0], operand(me, n, "f4")), "the input was touched"
        comm.Barrier()  # a rank may still read what the next call writes
        y += 1
        assert comm.Allreduce_view(y) is view
        assert np.array_equal(view[0], total(p, n, "f4") + p)
        half = y[0, n // 2 :]
        assert np.array_equal(
            comm.Allreduce_view(half, MPI.MAX), np.max([operand(k, n, "f4") for k in range(p)], 0)[n // 2 :] + 1
        )
        comm.Barrier()
    if "shared" in comm.algorithms("allreduce"):
        with pytest.raises(ArgumentError, match="the array is not registered: allocate it with"):
            comm.Allreduce_view(np.ones(5))


@pytest.mark.mpi(min_size=2)
def test_registered_memory_is_of_one_shape(comm: Communicator) -> None:
    if comm.context.shared_memory is None:
        pytest.skip("these ranks share no memory")
    with pytest.raises(hpccomm.MismatchError, match=r"local rank 0: \[4\] .f4; local rank 1: \[5\] .f4"):
        comm.empty(4 + comm.rank)
    assert comm.zeros((2, 3), "f8").shape == (2, 3)


HALVES = (np.dtype("f2"), np.dtype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("op", ["sum", "prod", "max"])
def test_16_bit_floats_are_reduced_in_float32_at_every_hop(comm: Communicator, dtype: Any, op: str) -> None:
    """Every algorithm rounds p - 1 times at most, by half an ulp; shared memory rounds once."""
    p, me, n, name = comm.size, comm.rank, 1003, op
    wide = [np.random.default_rng(rank).uniform(1, 2, n).astype(dtype) for rank in range(p)]
    exact = getattr(np, op)(np.array([each.astype("f8") for each in wide]), axis=0)
    rounded = exact.astype("f4").astype(dtype)
    rounding = 2.0 ** (-11 if dtype == "f2" else -8)  # half an ulp of a number just above a power of two
    most = exact * ((1 + rounding) ** (0 if op == "max" else p - 1) - 1)

    def check(found: Any, algorithm: str, where: slice = slice(0, n)) -> None:
        if algorithm == "shared":
            assert found.tobytes() == rounded[where].tobytes(), algorithm
        assert (abs(found.astype("f8") - exact[where]) <= most[where]).all(), algorithm

    for algorithm in comm.algorithms("allreduce"):
        a, b = wide[me].copy(), np.zeros(n, dtype)
        for _ in range(2):
            comm.Allreduce(a, b, name, algorithm=algorithm)
            check(b, algorithm)
        assert a.tobytes() == wide[me].tobytes()
        assert len(set(comm.allgather(b.tobytes()))) == 1, algorithm
        comm.Allreduce(MPI.IN_PLACE, a, name, algorithm=algorithm)
        check(a, algorithm)
    for algorithm in comm.algorithms("reduce"):
        b = np.zeros(n, dtype)
        comm.Reduce(wide[me], b, name, root=p - 1, algorithm=algorithm)
        check(b, algorithm) if me == p - 1 else check_equal(b, np.zeros(n, dtype))
        b[...] = wide[me]
        comm.Reduce(MPI.IN_PLACE if me == 0 else b, b if me == 0 else None, name, root=0, algorithm=algorithm)
        check(b, algorithm) if me == 0 else check_equal(b, wide[me])
    counts = [n * (k + 1) // p - n * k // p for k in range(p)]
    first = sum(counts[:me])
    for algorithm in comm.algorithms("reduce_scatter"):
        comm.Reduce_scatter(wide[me], b := np.zeros(counts[me], dtype), counts, name, algorithm=algorithm)
        check(b, algorithm, slice(first, first + counts[me]))


def check_equal(found: Any, want: Any) -> None:
    assert found.tobytes() == want.tobytes()


@pytest.mark.parametrize("dtype", [*HALVES, "f4", "f8"], ids=str)
def test_a_nan_of_any_rank_stays_in_minimum_and_maximum(comm: Communicator, dtype: Any) -> None:
    """With every algorithm but MPI's own of wider floats; whoever names none gets one that keeps it."""
    a = (np.arange(comm.size + 1) % 3).astype(dtype)
    a[comm.rank] = np.nan
    want = np.arange(comm.size + 1) < comm.size
    keep = [each for each in comm.algorithms("allreduce") if each != "native" or dtype in HALVES]
    for op in (MPI.MIN, MPI.MAX):
        for algorithm in (None, *keep):
            comm.Allreduce(a, b := np.zeros_like(a), op, algorithm=algorithm)
            assert np.array_equal(np.isnan(b), want), algorithm
        comm.Reduce(a, b := np.zeros_like(a), op)
        assert comm.rank or np.array_equal(np.isnan(b), want)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_floats_move(comm: Communicator, dtype: Any) -> None:
    p, me = comm.size, comm.rank
    mine = (np.arange(7) + 10 * me).astype(dtype)
    whole = np.concatenate([(np.arange(7) + 10 * rank).astype(dtype) for rank in range(p)])
    for algorithm in comm.algorithms("allgather"):
        comm.Allgather(mine, out := np.zeros(7 * p, dtype), algorithm=algorithm)
        assert np.array_equal(out, whole)
        comm.Allgatherv(mine, [out := np.zeros(7 * p, dtype), [7] * p], algorithm=algorithm)
        assert np.array_equal(out, whole)
    for algorithm in comm.algorithms("bcast"):
        comm.Bcast(out := mine.copy(), p - 1, algorithm=algorithm)
        assert np.array_equal(out, whole[-7:])
    comm.Gather(mine, out := np.zeros(7 * p, dtype) if me == 0 else None)
    assert me or np.array_equal(out, whole)
    with pytest.raises(ArgumentError, match=f"cannot reduce {dtype}: cast to float32"):
        comm.Scan(mine, mine.copy())
    with pytest.raises(ArgumentError, match="user-defined operation cannot reduce"):
        comm.Allreduce(mine, mine.copy(), MPI.Op.Create(lambda a, b, t: None))


def test_alltoall_gives_every_rank_its_part(comm: Communicator) -> None:
    p, me = comm.size, comm.rank
    datatype = MPI.INT64_T.Create_vector(2, 1, 2).Commit()
    for algorithm in comm.algorithms("alltoall"):
        for n in (0, 1, 7, 70_001):
            want = np.concatenate([operand(rank, n * p, "i8")[n * me : n * (me + 1)] for rank in range(p)])
            a, b = operand(me, n * p, "i8"), np.full(n * p, -1, "i8")
            for _ in range(3):
                comm.Alltoall(a, b, algorithm=algorithm)
                assert np.array_equal(b, want), (algorithm, n)
            assert np.array_equal(a, operand(me, n * p, "i8"))
            comm.Alltoall(MPI.IN_PLACE, a, algorithm=algorithm)
            assert np.array_equal(a, want), (algorithm, n)
        b = np.full(2 * p, -1, "i8")
        spread = [np.repeat(operand(me, 2 * p, "i8"), 2), 1, datatype.Create_resized(0, 32).Commit()]
        comm.Alltoall(spread if me % 2 else operand(me, 2 * p, "i8"), b, algorithm=algorithm)
        assert np.array_equal(b, np.concatenate([operand(rank, 2 * p, "i8")[2 * me : 2 * me + 2] for rank in range(p)]))
    datatype.Free()


def test_no_rank_leaves_a_barrier_before_all_have_entered(comm: Communicator) -> None:
    """The ranks of one machine share a clock."""
    for algorithm in comm.algorithms("barrier"):
        other = Communicator(comm, algorithm)
        for late in range(comm.size):
            if comm.rank == late:
                time.sleep(0.01)
            came = time.monotonic()
            other.Barrier()
            times = comm.allgather((came, time.monotonic()))
            assert max(came for came, _ in times) <= min(left for _, left in times), algorithm
        other.plans.close()


def test_a_non_commutative_operation_is_applied_in_rank_order(comm: Communicator) -> None:
    """2x2 matrix products do not commute."""

    def product(a: Any, b: Any, _: MPI.Datatype) -> None:
        lower, upper = np.frombuffer(a, "i8").reshape(-1, 2, 2), np.frombuffer(b, "i8").reshape(-1, 2, 2)
        upper[...] = lower @ upper

    def matrix(rank: int) -> Any:
        return np.array([1, rank + 1, rank % 3, 1 - rank], "i8")

    want = matrix(0).reshape(2, 2)
    for rank in range(1, comm.size):
        want = want @ matrix(rank).reshape(2, 2)
    datatype = MPI.INT64_T.Create_contiguous(4).Commit()
    op = MPI.Op.Create(product, commute=False)
    b = np.empty(4, "i8")
    comm.Allreduce([matrix(comm.rank), 1, datatype], [b, 1, datatype], op)
    assert np.array_equal(b.reshape(2, 2), want)
    for algorithm in ("auto", "native", "doubling", "tree"):
        comm.Allreduce(matrix(comm.rank), b, op, algorithm=algorithm)
        assert np.array_equal(b.reshape(2, 2), want), algorithm
    for root in range(comm.size):
        comm.Reduce(matrix(comm.rank), b, op, root=root, algorithm="tree_in_order")
        assert comm.rank != root or np.array_equal(b.reshape(2, 2), want)
    with pytest.raises(ArgumentError, match="rank order"):
        comm.Allreduce(matrix(comm.rank), b, op, algorithm="ring")
    op.Free()
    datatype.Free()


def test_a_user_defined_operation_works_with_every_algorithm(comm: Communicator) -> None:
    def biggest_absolute(a: Any, b: Any, _: MPI.Datatype) -> None:
        new, mine = np.frombuffer(a, "f8"), np.frombuffer(b, "f8")
        mine[...] = np.where(abs(new) > abs(mine), new, mine)

    op = MPI.Op.Create(biggest_absolute, commute=True)
    for algorithm in comm.algorithms("allreduce"):
        if algorithm != "shared":
            a = np.arange(9.0) * (-1) ** comm.rank * (comm.rank + 1)
            comm.Allreduce(MPI.IN_PLACE, a, op, algorithm=algorithm)
            assert np.array_equal(a, np.arange(9.0) * (-1) ** (comm.size - 1) * comm.size), algorithm
    op.Free()


def reduce_by_name(comm: Communicator, name: str, dtype: str) -> Any:
    """The reduction of ``operand`` over all ranks by a named operation, computed by NumPy."""
    everyone = np.stack([operand(rank, 2 * comm.size, dtype) for rank in range(comm.size)])
    if name in ("avg", "mean"):
        return everyone.sum(axis=0) / everyone.dtype.type(comm.size)
    return {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum}[name].reduce(everyone)


@pytest.mark.mpi(sizes=(1, 2, 3))
@pytest.mark.parametrize("dtype", ["f4", "f8", "c16", "i8"])
@pytest.mark.parametrize("name", ["sum", "avg", "mean", "min", "max", "prod"])
def test_an_operation_may_be_a_name(comm: Communicator, name: str, dtype: str) -> None:
    p, me = comm.size, comm.rank
    a, b = operand(me, 2 * p, dtype), np.zeros(2 * p, dtype)
    if (dtype == "c16" and name in ("min", "max")) or (dtype == "i8" and name in ("avg", "mean")):
        with pytest.raises(
            ArgumentError, match=f"Allreduce: .*{name}.* for complex|the {name} of int64 is not defined"
        ):
            comm.Allreduce(a, b, name)
        return
    want, mine = reduce_by_name(comm, name, dtype), slice(2 * me, 2 * me + 2)
    for _ in range(2):
        comm.Allreduce(a, b, op=name)
        assert have_same_bits(b, want)
    comm.Reduce(a, c := np.zeros_like(b), name, p - 1)
    assert np.array_equal(c, want if me == p - 1 else np.zeros_like(b))
    comm.Reduce_scatter_block(a, d := np.zeros(2, dtype), name)
    assert have_same_bits(d, want[mine])
    comm.Reduce_scatter(a, d := np.zeros(2, dtype), [2] * p, name)
    assert have_same_bits(d, want[mine])
    comm.Allreduce(MPI.IN_PLACE, b := a.copy(), name)
    assert have_same_bits(b, want)
    comm.Reduce_scatter_block(MPI.IN_PLACE, b := a.copy(), name)
    assert have_same_bits(b[:2], want[mine])
    if name != "prod":
        comm.Allreduce(a, b, name, reproducible=True)
        assert np.array_equal(b, want)


@pytest.mark.mpi(sizes=(1, 2, 3))
@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16], ids=str)
def test_the_average_of_16_bit_floats_is_rounded_once_and_does_not_overflow(comm: Communicator, dtype: Any) -> None:
    p, me = comm.size, comm.rank
    a = np.array([60000, me, 1 + me / 128, -3], "f4").astype(dtype)
    want = (
        sum(np.array([60000, k, 1 + k / 128, -3], "f4").astype(dtype).astype("f4") for k in range(p)) / np.float32(p)
    ).astype(dtype)
    comm.Allreduce(a, b := np.zeros_like(a), "avg")
    assert b.tobytes() == want.tobytes()
    comm.Reduce(a, b := np.zeros_like(a), "avg", p - 1)
    assert me < p - 1 or b.tobytes() == want.tobytes()
    comm.Allreduce(MPI.IN_PLACE, a, "avg")
    assert a.tobytes() == want.tobytes()


@pytest.mark.mpi(sizes=(1, 2, 3))
def test_names_on_bools_are_all_and_any(comm: Communicator) -> None:
    a = np.array([True, comm.rank == 0, False])
    comm.Allreduce(a, b := np.zeros_like(a), "min")
    assert b.tolist() == [True, comm.size == 1, False]
    comm.Allreduce(a, b, "max")
    assert b.tolist() == [True, True, False]
    comm.Scan(np.array([2]), c := np.zeros(1, "i8"), "prod")
    assert c.tolist() == [2 ** (comm.rank + 1)]


def test_the_layout_counts_ranks_and_nodes(comm: Communicator) -> None:
    assert sum(comm.layout.per_node) == comm.size
    assert comm.intra_node.size == comm.layout.per_node[comm.layout.nodes[comm.rank]]
    assert comm.inter_node.size == comm.layout.count


def test_topology_is_mpi4pys_integer(comm: Communicator) -> None:
    assert comm.topology == MPI.Intracomm(comm).topology == MPI.UNDEFINED
    assert "topology" not in vars(Communicator)


def test_inherited_collectives_do_what_mpi4py_does(comm: Communicator) -> None:
    p, r = comm.size, comm.rank
    mine, all_of_them = np.full(2, r), np.empty(2 * p, int)
    comm.Barrier()
    comm.Gather(mine, all_of_them if r == 0 else None, 0)
    if r == 0:
        assert all_of_them.tolist() == [k // 2 for k in range(2 * p)]
    comm.Alltoall(np.arange(p) + 10 * r, out := np.empty(p, int))
    assert out.tolist() == [10 * k + r for k in range(p)]
    comm.Scatter(np.arange(2 * p) if r == 0 else None, mine, 0)
    assert mine.tolist() == [2 * r, 2 * r + 1]
    comm.Scan(np.array([r + 1]), total := np.empty(1, int))
    assert total[0] == (r + 1) * (r + 2) // 2


def calls_by_form(comm: Any, x: dict[str, Any]) -> Any:
    """Calls in mpi4py's other spellings, one after the other; ``x["wide"]`` has room between parts."""
    p, r, f, here = comm.size, comm.rank, MPI.FLOAT, MPI.IN_PLACE
    a, b, part, own, wide = x["a"], x["b"], x["part"], x["own"], x["wide"]
    counts = [5 + k for k in range(p)]
    apart = [sum(counts[:k]) + 2 * k for k in range(p)]
    few, spread = [3] * p, [4 * k for k in range(p)]
    yield comm.Allreduce([a, f], [b, f])
    yield comm.Allreduce((a, a.size - 1), (b, b.size - 1))
    yield comm.Allreduce([a, 5, 2, "f"], [b, 5, 3, f])
    yield comm.Allreduce(memoryview(a), memoryview(b), op=MPI.MAX)
    yield comm.Bcast([a, 3, 4, f], root=p - 1)
    yield comm.Bcast(memoryview(a).cast("B"))
    yield comm.Reduce([a, f], [b, f] if r == 0 else None)
    yield comm.Allgather([part, f], [b, f])
    yield comm.Allgather(here, [b, part.size, f])
    yield comm.Allgatherv(own, [wide, counts, apart, f])
    yield comm.Allgatherv(here, [wide, (counts, apart), f])
    yield comm.Allgatherv(part, b)
    yield comm.Reduce_scatter_block([a, f], [part, f])
    yield comm.Reduce_scatter([wide[: sum(counts)], f], [own, f])
    yield comm.Alltoall([a, f], [b, f])
    yield comm.Gather([part, 3, 2, f], [b, 3, f])
    yield comm.Gather(here if r == 0 else part, b)
    yield comm.Scatter([a, part.size, f] if r == p - 1 else None, [part, f], root=p - 1)
    yield comm.Gatherv(own, [wide, counts, apart, f] if r == 0 else None)
    yield comm.Scatterv([wide, counts, apart, f] if r == 0 else None, own)
    yield comm.Alltoallv([a, few, spread, f], [b, few, spread, f])
    yield comm.Scan(a, [b, f])
    yield comm.Exscan([a, f], b)


@pytest.mark.mpi(sizes=(1, 2, 3, 4))
def test_every_form_gives_mpi4pys_result_and_is_bound_once(comm: Communicator) -> None:
    def arrays() -> dict[str, Any]:
        p, lengths = comm.size, {"part": 12, "own": 5 + comm.rank}
        lengths |= {"a": 12 * p, "b": 12 * p, "wide": sum(7 + k for k in range(p))}
        return {name: np.zeros(length, "f4") for name, length in lengths.items()}

    ours, bound = arrays(), []
    for step in range(3):
        theirs = arrays()
        for k, name in enumerate(ours):
            ours[name][...] = theirs[name][...] = verifiable.operand(comm.rank, 16, ours[name].size, "f4") + step - k
        for _ in zip(calls_by_form(comm, ours), calls_by_form(MPI.Intracomm(comm), theirs), strict=True):
            assert {name: each.tolist() for name, each in ours.items()} == {n: e.tolist() for n, e in theirs.items()}
        bound.append(len(comm.plans.plans))
    assert bound[0] == bound[1] == bound[2] >= 20


@pytest.mark.mpi(sizes=(1, 2, 3))
def test_short_calls_on_new_arrays_use_bounce_buffers(comm: Communicator) -> None:
    p, r, held, bound = comm.size, comm.rank, [], []
    for step in range(6):
        a, b = operand(r, 5 * p, "f4") + step, np.full(5 * p, -1, "f4")
        want = total(p, 5 * p, "f4") + p * step
        mine = want[5 * r : 5 * r + 5]
        whole, part, own, other = a.copy(), np.zeros(5, "f4"), a[:5].copy(), np.full(5 * p, 7, "f4")
        table = np.asfortranarray(a.reshape(p, 5))
        comm.Allreduce(a, b)
        assert np.array_equal(b, want)
        comm.Allreduce(MPI.IN_PLACE, whole, op=MPI.MAX)
        assert np.array_equal(whole, np.max([operand(k, 5 * p, "f4") + step for k in range(p)], axis=0))
        comm.Allreduce(table, turned := np.empty_like(table))
        assert np.array_equal(turned, want.reshape(p, 5))
        comm.Reduce(a, other, root=p - 1)
        assert np.array_equal(other, want if r == p - 1 else np.full(5 * p, 7))
        comm.Reduce_scatter_block(a, part)
        assert np.array_equal(part, mine)
        comm.Reduce_scatter(a, part)
        assert np.array_equal(part, mine)
        comm.Allgather(own, b)
        assert np.array_equal(b, np.concatenate([operand(k, 5 * p, "f4")[:5] + step for k in range(p)]))
        comm.Alltoall(a, b)
        assert np.array_equal(b, np.concatenate([operand(k, 5 * p, "f4")[5 * r : 5 * r + 5] + step for k in range(p)]))
        root_data = a.copy()
        root_data.flags.writeable = r != 0
        comm.Bcast(root_data)
        assert np.array_equal(root_data, operand(0, 5 * p, "f4") + step)
        held += [a, b, whole, part, own, other, table, turned, root_data]  # so that each step's lie elsewhere
        bound.append(len(comm.plans.plans))
    kept = int(p > 1)  # a table in columns is bound each time; one of a single row is no such table
    assert bound[5] - bound[3] == 2 * kept < bound[1] - bound[0]


@pytest.mark.mpi(sizes=(2, 3))
def test_a_new_default_algorithm_applies_to_cached_calls(comm: Communicator) -> None:
    a, b = operand(comm.rank, 100, "f4"), np.empty(100, "f4")
    for name in ("auto", "ring", "native", "tree"):
        if comm.rank == 0:
            comm.plans.forget()  # a rank that binds anew does what those do that need not
        comm.algorithm = name
        for _ in range(2):
            comm.Allreduce(a, b)
            comm.Barrier()
            assert np.array_equal(b, total(comm.size, 100, "f4"))


def test_bad_arguments_are_refused_before_the_first_message(comm: Communicator) -> None:
    """Every rank makes the same mistake, so every rank is refused; the next call works."""
    x, y = np.ones(8, "f4"), np.ones(8, "f4")
    frozen = np.ones(8, "f4")
    frozen.flags.writeable = False
    mistakes = [
        (lambda: comm.Allreduce(x[::2], y[:4]), "ascontiguousarray"),
        (lambda: comm.Bcast([y, 1, 9, MPI.FLOAT]), "displacement 9"),
        (lambda: comm.Allreduce(x, frozen), "read-only"),
        (lambda: comm.Allreduce(y[:6], y[2:]), "overlap"),
        (lambda: comm.Allreduce(x.astype(">f4"), y), "byte order"),
        (lambda: comm.Allreduce(x.astype(object), y), "lower-case"),
        (lambda: comm.Allreduce(x, np.ones(8)), "make both the same"),
        (lambda: comm.Allreduce(x, y[:4]), "make both the same"),
        (lambda: comm.Allreduce(np.ones((2, 3)), np.ones((2, 3), order="F")), "Fortran order"),
        (lambda: comm.Allreduce(x, y, algorithm="rign"), "use one of auto, native"),
        (lambda: comm.Allreduce(np.ones(3, bool), np.ones(3, bool)), "MPI.LOR"),
        (lambda: comm.Allreduce(x.astype("c8"), x.astype("c8"), MPI.MAX), "does not define max"),
        (lambda: comm.Allreduce(x, None), "None"),
        (lambda: comm.Allreduce([x, 9, MPI.FLOAT], y), "the count is 9"),
        (lambda: comm.Bcast(x, root=comm.size), "is not a rank: pass one of"),
        (lambda: comm.Bcast(x, root=-1), "is not a rank: pass one of"),
        (lambda: comm.Reduce(x, y, root=comm.size), "is not a rank: pass one of"),
        (lambda: comm.Gather(x, None, root=99), "is not a rank: pass one of"),
        (lambda: comm.Reduce_scatter(x, y, [8] * (comm.size + 1)), "one count per rank"),
        (lambda: comm.Reduce_scatter(MPI.IN_PLACE, y), "recvcounts"),
        (lambda: comm.Allgather(np.ones(3), np.ones(2 * comm.size)), "make both the same"),
    ]
    if comm.size > 1:
        mistakes += [
            (lambda: comm.Allgather(np.ones(3), np.ones(3 * comm.size + 1)), "a multiple of the number of ranks"),
            (lambda: comm.Alltoall(np.ones(2 * comm.size + 1), np.ones(2 * comm.size + 1)), "a multiple of the number"),
        ]
    for call, remedy in mistakes:
        with pytest.raises(ArgumentError, match=remedy) as refused:
            call()
        assert str(refused.value).startswith(f"rank {comm.rank}: ")
    comm.Allreduce(x, y)
    assert (y == comm.size).all()


@pytest.mark.parametrize("algorithm", ["auto", "native"])
@pytest.mark.parametrize("n", [5, 1 << 18])
def test_all_ranks_raise_on_mismatched_calls_and_can_continue(comm: Communicator, algorithm: str, n: int) -> None:
    """The calls are compared before the first message."""
    odd = comm.rank == comm.size - 1
    unlike = [
        (np.ones(n, "f4"), MPI.SUM, np.ones(n, "i4"), MPI.SUM),
        (np.ones(n), MPI.SUM, np.ones(n), MPI.MAX),
        (np.ones(n), MPI.SUM, np.ones(n + 1), MPI.SUM),
    ]
    for usual, op, unusual, other_op in unlike if comm.size > 1 else []:
        with pytest.raises(hpccomm.MismatchError, match=f"rank {comm.size - 1} called"):
            comm.Allreduce(MPI.IN_PLACE, unusual if odd else usual, other_op if odd else op, algorithm=algorithm)
    a = np.ones(n)
    comm.Allreduce(MPI.IN_PLACE, a, algorithm=algorithm)
    assert (a == comm.size).all()


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("first", ["shared", "native"])
@pytest.mark.parametrize("second", ["shared", "native"])
def test_every_mismatch_after_another_one_is_noticed_by_all(comm: Communicator, first: str, second: str) -> None:
    """A rank that was in shared memory while the others began a call of MPI counts that call, too."""
    odd = comm.rank == comm.size - 1
    x = np.ones(10)
    for usual, unusual in ((first, second), (second, second), (second, first), ("native", "native")):
        algorithm = unusual if odd else usual
        with pytest.raises(hpccomm.MismatchError, match=f"rank {comm.size - 1} called"):
            comm.Allreduce(MPI.IN_PLACE, x, MPI.MAX if odd else MPI.SUM, algorithm=algorithm)
        assert (x == 1).all()
    for algorithm in ("native", "shared"):
        x[:] = 1
        comm.Allreduce(MPI.IN_PLACE, x, algorithm=algorithm)
        assert (x == comm.size).all()


@pytest.mark.mpi(sizes=(2, 3))
def test_all_ranks_raise_if_some_call_shared_memory_and_others_mpi(comm: Communicator) -> None:
    """Repeated, to show that no rank gets a call ahead of the others."""
    odd = comm.rank == comm.size - 1
    for _ in range(50):
        x = np.ones(10)
        with pytest.raises(hpccomm.MismatchError, match=f"rank {comm.size - 1} called"):
            comm.Allreduce(MPI.IN_PLACE, x, MPI.MAX if odd else MPI.SUM, algorithm="shared" if odd else "native")
        for algorithm in ("shared", "native"):
            x[:] = 1
            comm.Allreduce(MPI.IN_PLACE, x, algorithm=algorithm)
            assert (x == comm.size).all()


def test_the_number_of_cached_plans_is_bounded(comm: Communicator) -> None:
    for n in range(1, 300):
        comm.Allreduce(MPI.IN_PLACE, np.ones(n), algorithm="ring")
    assert len(comm.plans.plans) <= 128


def test_a_new_array_at_an_old_address_gets_its_own_result(comm: Communicator) -> None:
    for k in range(200):
        a = np.full(17, k + comm.rank)
        comm.Allreduce(MPI.IN_PLACE, a, algorithm="doubling")
        assert (a == comm.size * k + comm.size * (comm.size - 1) // 2).all()
        del a


def test_the_default_algorithm_takes_the_calls_that_it_can(comm: Communicator) -> None:
    preferring = Communicator(comm, algorithm="ring")
    a = np.ones(100)
    preferring.Allreduce(MPI.IN_PLACE, a)
    assert (a == comm.size).all()
    preferring.Bcast(a, 0)
    preferring.plans.close()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("n", [8, 1 << 18])
def test_a_collective_completes_messages_that_were_sent_before(comm: Communicator, n: int) -> None:
    """Rank 0 is in the collective while rank 1, which enters later, still receives its long message."""
    for algorithm in comm.algorithms("allreduce"):
        long, x = np.full(1 << 20, 3.0), np.ones(n)
        if comm.rank == 0:
            request = comm.Isend(long, 1)
            comm.Allreduce(MPI.IN_PLACE, x, algorithm=algorithm)
            request.Wait()
        else:
            if comm.rank == 1:
                comm.Recv(arrived := np.empty_like(long), 0)
                assert (arrived == 3).all()
            comm.Allreduce(MPI.IN_PLACE, x, algorithm=algorithm)
        assert (x == comm.size).all()


def test_none_means_in_place_as_in_mpi4py(comm: Communicator) -> None:
    for algorithm in comm.algorithms("allgather"):
        b = np.where(np.arange(comm.size) == comm.rank, comm.rank, -1)
        comm.Allgather(None, b, algorithm=algorithm)
        assert b.tolist() == list(range(comm.size))
    a = np.ones(3)
    comm.Allreduce(None, a)
    assert (a == comm.size).all()
