"""Allgather and allreduce of one bit an element: worked example, error feedback, bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_compression_kernels import GRADIENTS, signs, vector
from test_sparse import SIZES, CountingProxy

from hpccomm import Communicator
from hpccomm.collectives.compressed import onebit
from hpccomm.collectives.compressed.sparse import hierarchical_allreduce
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks

F32 = np.float32


def errors(n: int, comm: Any) -> tuple[np.ndarray, np.ndarray]:
    """The errors before the first step."""
    return np.zeros(n, F32), np.zeros(onebit.server_elements(n, comm.rank, comm.size), F32)


def test_the_worked_example_in_two_phases() -> None:
    def steps(comm: Any) -> tuple[list[onebit.OneBitMean], np.ndarray, np.ndarray]:
        worker, server = errors(8, comm)
        return [onebit.onebit_allreduce(comm, each[comm.rank], worker, server) for each in GRADIENTS], worker, server

    (first, e0, s0), (second, e1, s1) = run_on_ranks(2, steps)
    assert [each.scale for each in first] == [0.40625, 0.3671875, 0.2890625]
    assert [each.scale for each in second] == [0.328125, 0.390625, 0.328125]
    np.testing.assert_array_equal(first[0].mean, F32(0.203125) * signs("+ - + + - + + -"))
    for got, low, high, pattern in (
        (first[1], 0.287109375, 0.34765625, "+ + - + - - + +"),
        (first[2], 0.1904296875, 0.251953125, "- - + + - - - +"),
    ):
        np.testing.assert_array_equal(got.mean, np.repeat(F32([low, high]), 4) * signs(pattern))
    np.testing.assert_array_equal(e0, vector(".140625 .0625 .171875 .1875 -.0625 .125 .265625 -.171875"))
    np.testing.assert_array_equal(e1, vector(".109375 -.046875 .234375 -.390625 .265625 -.109375 .015625 -.296875"))
    np.testing.assert_array_equal(s0, vector(".1376953125 .0986328125 .1904296875 .0458984375"))
    np.testing.assert_array_equal(s1, vector(".138671875 .076171875 -.251953125 -.037109375"))


def contribution(rank: int, n: int, step: int = 0) -> np.ndarray:
    """Gaussian values; zeros on rank 1."""
    return (np.random.default_rng([rank, n, step]).normal(size=n) * (rank != 1)).astype(F32)


@pytest.mark.parametrize("size", SIZES)
def test_means_and_errors_add_up_to_all_contributions(size: int) -> None:
    """Worker and server errors hold the rest; 2e-5 allows 40 roundings of numbers of about 10."""

    def steps(comm: Any) -> dict[int, tuple[np.ndarray, ...]]:
        found = {}
        for n in (0, 1, 7, 8, 9, 100):
            worker, server = errors(n, comm)
            total = np.zeros(n, np.float64)
            for step in range(20):
                counting = CountingProxy(comm)
                got = onebit.onebit_allreduce(counting, contribution(comm.rank, n, step), worker, server)
                assert got.bytes_sent == counting.sent
                total += got.mean
            found[n] = total, worker, server
        return found

    ranks = run_on_ranks(size, steps)
    for n in (0, 1, 7, 8, 9, 100):
        assert len({rank[n][0].tobytes() for rank in ranks}) == 1
        given = sum(contribution(rank, n, step) for rank in range(size) for step in range(20)) / size
        left = sum(rank[n][1] for rank in ranks) / size + np.concatenate([rank[n][2] for rank in ranks])
        np.testing.assert_allclose(ranks[0][n][0] + left, given, atol=2e-5)


def test_a_rank_sends_one_bit_an_element_in_each_of_two_phases() -> None:
    n, size = 8000, 4
    sent = run_on_ranks(
        size, lambda comm: onebit.onebit_allreduce(comm, contribution(comm.rank, n), *errors(n, comm)).bytes_sent
    )
    assert sent == [2 * 3 * (2000 // 8 + 4) + 3 * 24] * size


@pytest.mark.parametrize("size", SIZES)
def test_signs_of_all_ranks_are_added_in_rank_order(size: int) -> None:
    n = 77

    def mine(rank: int) -> tuple[np.ndarray, float, float]:
        return np.packbits(contribution(rank, n) >= 0), 0.1 * (rank + 1), -0.3 / (rank + 1)

    want = np.zeros(n, F32)
    for rank in range(size):
        want += np.where(contribution(rank, n) >= 0, F32(mine(rank)[1]), F32(mine(rank)[2]))
    for got in run_on_ranks(size, lambda comm: onebit.onebit_allgather(comm, *mine(comm.rank), n)):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda x, w, s: (x.astype(np.float64), w, s), "dtype"),
        (lambda x, w, s: (np.append(x[:-1], F32(np.nan)), w, s), "NaN"),
        (lambda x, w, s: (np.append(x[:-1], F32(np.inf)), w, s), "NaN"),
        (lambda x, w, s: (np.full_like(x, 3e38), np.full_like(x, 3e38), s), "NaN"),
        (lambda x, w, s: (x, w[:-1], s), "error state"),
        (lambda x, w, s: (x, w, np.append(s, F32(0))), "error state"),
        (lambda x, w, s: (x[:8], w[:8], s[:2]), "another n than rank 0"),
    ],
)
def test_a_wrong_argument_of_one_rank_is_refused_on_all_ranks_and_leaves_the_errors_unchanged(
    change: Any, remedy: str
) -> None:
    def call(comm: Any) -> int:
        worker, server = (each + F32(1) for each in errors(9, comm))
        arguments = np.ones(9, F32), worker, server
        counting = CountingProxy(comm)
        with pytest.raises(ArgumentError, match=remedy) as refused:
            onebit.onebit_allreduce(counting, *(change(*arguments) if comm.rank == 2 else arguments))
        assert "rank 2" in str(refused.value)
        np.testing.assert_array_equal(worker, 1)
        np.testing.assert_array_equal(server, 1)
        return counting.sent

    assert run_on_ranks(3, call) == [2 * 24] * 3


def test_bits_of_another_length_are_refused_on_every_rank() -> None:
    def call(comm: Any) -> None:
        bits = np.zeros(1 if comm.rank == 1 else 2, np.uint8)
        with pytest.raises(ArgumentError, match="rank 1 passes"):
            onebit.onebit_allgather(comm, bits, 1.0, -1.0, 9)

    run_on_ranks(3, call)


def test_a_hierarchical_mean_is_dense_inside_nodes_and_one_bit_between_them() -> None:
    """Three ranks on one node and two on the other equal two ranks that pass the sums of the nodes."""
    n = 33
    nodes = [0, 0, 0, 1, 1]
    sums = [sum(contribution(rank, n) for rank in range(5) if nodes[rank] == node) for node in (0, 1)]

    def flat(comm: Any) -> np.ndarray:
        return onebit.onebit_allreduce(comm, sums[comm.rank], *errors(n, comm)).mean

    def levels(comm: Any) -> np.ndarray:
        return hierarchical_allreduce(
            comm,
            contribution(comm.rank, n),
            lambda leaders, x: onebit.onebit_allreduce(leaders, x, *errors(n, leaders)).mean,
        )

    want = run_on_ranks(2, flat)[0]
    for got in run_on_ranks(5, levels, nodes):
        np.testing.assert_array_equal(got, want)


@pytest.mark.mpi(sizes=(2, 7))
def test_two_phases_over_mpi(comm: Any) -> None:
    ours, x, total = Communicator(comm), np.full(20, comm.rank + 1, F32), sum(range(1, comm.size + 1))
    got = ours.onebit_allreduce(x, *errors(20, comm))
    np.testing.assert_array_equal(got.mean, np.full(20, F32(total) / F32(comm.size)))
    np.testing.assert_array_equal(ours.onebit_allgather(np.packbits(x > 0), comm.rank + 1, 0, 20), np.full(20, total))


def test_two_phases_of_2_to_the_24_and_one_elements() -> None:
    """The last element, at an index beyond the integers of float32, is the only negative one."""
    n = (1 << 24) + 1

    def exchange(comm: Any) -> tuple[np.ndarray, float]:
        x = np.ones(n, np.float32)
        x[-1] = -1
        found = onebit.onebit_allreduce(comm, x, np.zeros(n, np.float32), errors(n, comm)[1])
        return np.flatnonzero(found.mean != 1), float(found.mean[-1])

    for other, last in run_on_ranks(2, exchange):
        assert (other.tolist(), last) == ([n - 1], -1.0)
