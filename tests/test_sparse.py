"""Gathers of byte messages and sums of sparse vectors: exact, the same bits everywhere, bytes as counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpccomm import Communicator
from hpccomm.collectives.compressed import messages, sparse
from hpccomm.collectives.compressed.prices import Place, exact_phases, price_phases
from hpccomm.errors import ArgumentError
from hpccomm.layout import Link
from hpccomm.testing.ranks import run_on_ranks

SIZES = (1, 2, 3, 5, 7, 8)


def message_of(rank: int) -> np.ndarray:
    """Bytes that differ by rank and index; the message of rank 1 is empty."""
    return ((np.arange(0 if rank == 1 else 5 * rank + 3) + 17 * rank) % 256).astype(np.uint8)


def assert_messages(got: list[np.ndarray], size: int) -> None:
    assert len(got) == size
    for rank, each in enumerate(got):
        assert each.dtype == np.uint8
        np.testing.assert_array_equal(each, message_of(rank))


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_every_message_in_rank_order(size: int) -> None:
    for got in run_on_ranks(size, lambda comm: messages.gather_messages(comm, message_of(comm.rank))):
        assert_messages(got, size)


def test_empty_messages_are_gathered() -> None:
    for got in run_on_ranks(3, lambda comm: messages.gather_messages(comm, np.empty(0, np.uint8))):
        assert [each.size for each in got] == [0, 0, 0]


def test_messages_beyond_the_limit_of_one_call_take_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_GATHER_BYTES", 10)
    for got in run_on_ranks(3, lambda comm: messages.gather_messages(comm, message_of(comm.rank))):
        assert_messages(got, 3)


def test_a_message_that_is_not_flat_uint8_is_refused_on_every_rank() -> None:
    def call(comm: Any) -> str:
        with pytest.raises(ArgumentError) as refused:
            messages.gather_messages(comm, np.zeros(4, np.float32 if comm.rank == 2 else np.uint8))
        return str(refused.value)

    assert all("rank 2 passes no flat uint8" in text for text in run_on_ranks(3, call))


@pytest.mark.mpi(sizes=(3,))
def test_messages_are_gathered_over_mpi(comm: Any) -> None:
    assert_messages(messages.gather_messages(comm, message_of(comm.rank)), comm.size)


def lengths_over_time(rank: int) -> list[int]:
    """Equal, growing, longer on one rank, beyond ``SHORT_ROOM``, short again, empty."""
    lengths = [40, 40, 41, 60, 60, 5000 if rank == 1 else 60, 60, messages.SHORT_ROOM + 1, 100, 100]
    return [*lengths, 8 * rank, 0 if rank == 1 else 90, 0, 0, 3]


def gather_over_time(comm: Any) -> None:
    counting = CountingProxy(comm)
    gather = messages.MessageGather(counting)
    for step, length in enumerate(lengths_over_time(comm.rank)):
        found, nbytes = gather.gather(((np.arange(length) + step + 31 * comm.rank) % 251).astype(np.uint8))
        assert nbytes == counting.sent
        counting.sent = 0
        for rank, each in enumerate(found):
            expected = (np.arange(lengths_over_time(rank)[step]) + step + 31 * rank) % 251
            assert each.dtype == np.uint8
            assert each.flags.writeable
            np.testing.assert_array_equal(each, expected)
            each[...] = 255  # belongs to the caller


@pytest.mark.parametrize("size", SIZES)
def test_messages_whose_lengths_change_from_call_to_call_arrive_complete(size: int) -> None:
    run_on_ranks(size, gather_over_time)


@pytest.mark.mpi(sizes=(2, 3))
def test_messages_whose_lengths_change_arrive_complete_over_mpi(comm: Any) -> None:
    gather_over_time(Communicator(comm))


def test_messages_as_long_as_the_previous_ones_take_one_call() -> None:
    def calls(comm: Any) -> list[list[str]]:
        counting = CountingProxy(comm)
        gather = messages.MessageGather(counting)
        found = []
        for length in (100, 100, 105, 90, 200, 200):
            counting.calls = []
            gather.gather(np.zeros(length - comm.rank, np.uint8))
            found.append(counting.calls)
        return found

    both, one = ["Allgather", "Allgatherv"], ["Allgather"]
    assert run_on_ranks(3, calls)[0] == [both, one, one, one, both, one]


def test_a_message_that_is_not_flat_uint8_is_refused_after_a_good_one() -> None:
    def call(comm: Any) -> None:
        gather = messages.MessageGather(comm)
        gather.gather(np.zeros(64, np.uint8))
        with pytest.raises(ArgumentError, match="rank 2 passes no flat uint8"):
            gather.gather(np.zeros(4, np.float32 if comm.rank == 2 else np.uint8))
        assert [each.size for each in gather.gather(np.zeros(64, np.uint8))[0]] == [64, 64, 64]

    run_on_ranks(3, call)


@pytest.mark.parametrize("longest", [0, 1, 7, 8, 100, 1000, messages.SHORT_ROOM])
def test_the_room_holds_the_longest_message_and_at_most_a_quarter_more(longest: int) -> None:
    room = messages.room_after(longest, 0)
    assert longest <= room <= max(1.25 * longest, longest + 8)
    assert room % 8 == 0
    assert messages.room_after(longest, room) == room
    assert messages.room_after(messages.SHORT_ROOM + 1, room) == 0


class CountingProxy:
    """A communicator that counts calls and bytes."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.sent = comm, 0
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Allgather(self, mine: np.ndarray, room: np.ndarray) -> None:
        self.calls.append("Allgather")
        self.sent += mine.nbytes * (self.size - 1)
        self.comm.Allgather(mine, room)

    def Allgatherv(self, mine: np.ndarray, room: Any) -> None:
        self.calls.append("Allgatherv")
        self.sent += mine.nbytes * (self.size - 1)
        self.comm.Allgatherv(mine, room)

    def Allreduce(self, mine: np.ndarray, room: np.ndarray) -> None:
        self.sent += round(2 * mine.nbytes * (self.size - 1) / self.size)
        self.comm.Allreduce(mine, room)

    def Bcast(self, buffer: np.ndarray, root: int) -> None:
        self.sent += buffer.nbytes * (self.size - 1) * (self.rank == root)
        self.comm.Bcast(buffer, root)

    def Isend(self, buffer: np.ndarray, to: int, tag: int) -> Any:
        self.sent += buffer.nbytes
        return self.comm.Isend(buffer, to, tag)


def pairs(rank: int, n: int, density: float, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers (times ``scale``) at random indices; the vector of rank 1 is empty."""
    rng = np.random.default_rng([rank, n])
    index = np.flatnonzero(rng.random(n) < (0 if rank == 1 else density)).astype(np.uint32)
    return index, (rng.integers(1, 1000, index.size) * rng.choice([-1, 1], index.size) * scale).astype(np.float32)


def sum_in_order(size: int, n: int, density: float, scale: float = 1.0) -> np.ndarray:
    total = np.zeros(n, np.float32)
    for rank in range(size):
        index, values = pairs(rank, n, density, scale)
        total[index] += values
    return total


def to_dense(n: int, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
    found = np.zeros(n, np.float32)
    found[indices] = values
    return found


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", [*sparse.EXACT_ALGORITHMS, "auto"])
def test_the_sum_is_exact_and_the_bytes_sent_are_counted_right(size: int, algorithm: str) -> None:
    def check(comm: Any) -> None:
        for n in (0, 1, 7, 9, 1000):
            for density in (0.02, 0.2, 1.0):
                counting = CountingProxy(comm)
                got = sparse.sparse_allreduce(counting, *pairs(comm.rank, n, density), n, algorithm=algorithm)
                np.testing.assert_array_equal(got.total, sum_in_order(size, n, density))
                assert got.remainder[0].size == 0
                assert got.bytes_sent == counting.sent

    run_on_ranks(size, check)


@pytest.mark.parametrize("algorithm", ["allgather", "split"])
def test_floats_are_added_in_rank_order(algorithm: str) -> None:
    """With 0.1 every sum rounds, so another order would give other bits."""
    want = sum_in_order(7, 500, 0.5, 0.1)
    for got in run_on_ranks(
        7, lambda comm: sparse.sparse_allreduce(comm, *pairs(comm.rank, 500, 0.5, 0.1), 500, algorithm=algorithm)
    ):
        np.testing.assert_array_equal(got.total, want)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", [*sparse.EXACT_ALGORITHMS, *sparse.LOSSY_ALGORITHMS])
def test_all_ranks_have_the_same_bits(size: int, algorithm: str) -> None:
    k = 9 if algorithm in sparse.LOSSY_ALGORITHMS else None
    totals = run_on_ranks(
        size,
        lambda comm: sparse.sparse_allreduce(comm, *pairs(comm.rank, 300, 0.1, 0.1), 300, k=k, algorithm=algorithm),
    )
    assert len({each.total.tobytes() for each in totals}) == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("algorithm", sparse.LOSSY_ALGORITHMS)
def test_total_and_remainders_add_up_to_all_contributions(size: int, algorithm: str) -> None:
    """No element is lost by the algorithms that keep k, and bytes are counted on the rank that sends them."""

    def check(comm: Any) -> list[sparse.SparseSum]:
        found = []
        for n, k in ((0, 1), (1, 1), (9, 2), (1000, 25), (1000, 5000)):
            counting = CountingProxy(comm)
            got = sparse.sparse_allreduce(counting, *pairs(comm.rank, n, 0.1), n, k=k, algorithm=algorithm)
            assert got.bytes_sent == counting.sent
            assert np.count_nonzero(got.total) <= k
            found.append(got)
        return found

    ranks = run_on_ranks(size, check)
    for case, n in enumerate((0, 1, 9, 1000, 1000)):
        together = ranks[0][case].total + sum(to_dense(n, *rank[case].remainder) for rank in ranks)
        np.testing.assert_array_equal(together, sum_in_order(size, n, 0.1))


@pytest.mark.parametrize("size", SIZES)
def test_ok_topk_keeps_the_k_largest_of_the_sum_and_of_equal_ones_the_first(size: int) -> None:
    def vector_of(rank: int) -> tuple[np.ndarray, np.ndarray]:
        index, values = pairs(rank, 400, 0.2)
        return index, np.sign(values)  # many are equal

    total = sum(to_dense(400, *vector_of(rank)) for rank in range(size))
    order = np.lexsort([np.arange(400), -np.abs(total)])[:30]
    want = np.zeros(400, np.float32)
    want[order] = total[order]
    for got in run_on_ranks(
        size, lambda comm: sparse.sparse_allreduce(comm, *vector_of(comm.rank), 400, k=30, algorithm="ok_topk")
    ):
        np.testing.assert_array_equal(got.total, want)


def test_a_plan_keeps_all_that_reach_its_threshold() -> None:
    def twice(comm: Any) -> tuple[sparse.SparseSum, sparse.SparseSum]:
        mine = pairs(comm.rank, 400, 0.2)
        first = sparse.sparse_allreduce(comm, *mine, 400, k=30, algorithm="ok_topk")
        return first, sparse.sparse_allreduce(comm, *mine, 400, k=30, algorithm="ok_topk", plan=first.plan)

    total = sum_in_order(3, 400, 0.2)
    for first, second in run_on_ranks(3, twice):
        assert first.plan is not None
        np.testing.assert_array_equal(second.total, np.where(np.abs(total) >= first.plan.threshold, total, 0))
        assert second.bytes_sent < first.bytes_sent


WORKED = [([3, 4], [1, -0.875]), ([1, 3], [0.75, 0.5])]


def arrays(pair: tuple[list[int], list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(pair[0], np.uint32), np.array(pair[1], np.float32)


def remainder_of(got: sparse.SparseSum) -> dict[int, float]:
    return dict(zip(got.remainder[0].tolist(), got.remainder[1].tolist(), strict=True))


@pytest.mark.parametrize("algorithm", sparse.LOSSY_ALGORITHMS)
def test_the_worked_example_of_the_two_largest(algorithm: str) -> None:
    ranks = run_on_ranks(
        2, lambda comm: sparse.sparse_allreduce(comm, *arrays(WORKED[comm.rank]), 8, k=2, algorithm=algorithm)
    )
    np.testing.assert_array_equal(ranks[0].total, to_dense(8, np.array([3, 4]), np.array([1.5, -0.875])))
    assert [remainder_of(each) for each in ranks] == [{}, {1: 0.75}]


def test_gtopk_returns_an_element_to_the_rank_that_pruned_it() -> None:
    vectors = [([0], [1.0]), ([1], [1.25]), ([0], [1.5]), ([2], [0.25])]
    ranks = run_on_ranks(
        4, lambda comm: sparse.sparse_allreduce(comm, *arrays(vectors[comm.rank]), 3, k=1, algorithm="gtopk")
    )
    np.testing.assert_array_equal(ranks[0].total, np.array([1.5, 0, 0], np.float32))
    assert [remainder_of(each) for each in ranks] == [{0: 1.0}, {1: 1.25}, {}, {2: 0.25}]


@pytest.mark.parametrize("size", SIZES)
def test_sparse_vectors_are_gathered_in_rank_order(size: int) -> None:
    for got in run_on_ranks(size, lambda comm: sparse.sparse_allgather(comm, *pairs(comm.rank, 50, 0.3), 50)):
        for rank, (index, values) in enumerate(got):
            np.testing.assert_array_equal(index, pairs(rank, 50, 0.3)[0])
            np.testing.assert_array_equal(values, pairs(rank, 50, 0.3)[1])


def bad_arguments(**change: Any) -> dict[str, Any]:
    good = {"indices": np.array([1, 4], np.uint32), "values": np.ones(2, np.float32), "n": 8, "algorithm": "split"}
    return good | change


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"indices": np.array([4, 1], np.uint32)}, "ascend"),
        ({"indices": np.array([4, 4], np.uint32)}, "ascend"),
        ({"indices": np.array([1, 8], np.uint32)}, "ascend"),
        ({"indices": np.array([1, 4], np.int64)}, "dtype"),
        ({"indices": np.array([1], np.uint32)}, "length"),
        ({"values": np.ones(2)}, "dtype"),
        ({"values": np.array([1, np.nan], np.float32)}, "NaN"),
        ({"values": np.array([1, np.inf], np.float32)}, "NaN"),
        ({"n": 9}, "another n than rank 0"),
        ({"algorithm": "allgather"}, "another algorithm than rank 0"),
        ({"algorithm": "magic"}, "unknown algorithm"),
        ({"algorithm": "gtopk"}, "no k"),
        ({"k": 0}, "no k"),
        ({"k": 3}, "another k than rank 0"),
        ({"plan": sparse.SparsePlan((0, 8), 1.0)}, "a plan for another"),
    ],
)
def test_a_wrong_argument_of_one_rank_is_refused_on_all_ranks_before_data_moves(
    change: dict[str, Any], remedy: str
) -> None:
    def call(comm: Any) -> tuple[str, int]:
        counting = CountingProxy(comm)
        with pytest.raises(ArgumentError) as refused:
            sparse.sparse_allreduce(counting, **bad_arguments(**(change if comm.rank == 2 else {})))
        return str(refused.value), counting.sent

    for text, sent in run_on_ranks(3, call):
        assert "rank 2" in text
        assert remedy in text
        assert sent == 2 * 6 * 8


def test_auto_takes_the_cheapest_algorithm_by_the_formulas() -> None:
    place = Place(8, 1, inter=Link(25.0, 8.4e-4))
    assert sparse.select_algorithm(1 << 24, 1 << 24, None, place) == "dense"
    assert sparse.select_algorithm(1 << 24, 100, None, place) in ("allgather", "recursive_doubling")
    assert price_phases(exact_phases(1 << 24, 1000, Place(1, 1))["dense"], Place(1, 1)) == (0, 0)
    # from density d = 8/(b p) on, a dense ring sends less than an allgather of b = 8 bytes an element
    wire = Place(8, 1, inter=Link(0.0, 1.0), gamma=0.0)
    for count, dense in ((999, False), (1001, True)):
        phases = exact_phases(8000, count, wire)
        assert (price_phases(phases["dense"], wire) < price_phases(phases["allgather"], wire)) == dense


def test_auto_goes_dense_when_that_is_cheaper() -> None:
    n = 1 << 16
    for density, path in ((1.0, "dense"), (1e-4, "allgather")):
        for got in run_on_ranks(4, lambda comm, d=density: sparse.sparse_allreduce(comm, *pairs(comm.rank, n, d), n)):
            np.testing.assert_array_equal(got.total, sum_in_order(4, n, density))
            assert got.path == path


@pytest.mark.parametrize("algorithm", ["allgather", "split"])
def test_indices_beyond_2_to_the_24_keep_their_elements(algorithm: str) -> None:
    n = (1 << 24) + 2

    def call(comm: Any) -> np.ndarray:
        index = np.array([comm.rank, n - 1], np.uint32)
        return sparse.sparse_allreduce(comm, index, np.array([3, 4], np.float32), n, algorithm=algorithm).total

    for total in run_on_ranks(2, call):
        np.testing.assert_array_equal(np.flatnonzero(total), [0, 1, n - 1])
        assert total[-1] == 8


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 1, 1, 2]])
def test_a_hierarchical_sum_is_dense_inside_nodes_and_sparse_between_them(nodes: list[int]) -> None:
    def between(leaders: Any, x: np.ndarray) -> np.ndarray:
        index = np.flatnonzero(x).astype(np.uint32)
        return sparse.sparse_allreduce(leaders, index, x[index], x.size).total

    def call(comm: Any) -> np.ndarray:
        return sparse.hierarchical_allreduce(comm, to_dense(60, *pairs(comm.rank, 60, 0.2)), between)

    for got in run_on_ranks(len(nodes), call, nodes):
        np.testing.assert_array_equal(got, sum_in_order(len(nodes), 60, 0.2))


def test_an_error_of_the_leaders_is_raised_on_all_ranks() -> None:
    def between(leaders: Any, x: np.ndarray) -> np.ndarray:
        return sparse.sparse_allreduce(leaders, np.arange(2, dtype=np.uint32), x, 2).total

    def call(comm: Any) -> None:
        with pytest.raises(ArgumentError):
            sparse.hierarchical_allreduce(comm, np.full(2, np.inf if comm.rank == 3 else 1, np.float32), between)

    run_on_ranks(4, call, [0, 0, 1, 1])


@pytest.mark.mpi(sizes=(1, 4, 7))
def test_sparse_sums_are_exact_over_mpi(comm: Any) -> None:
    want = sum_in_order(comm.size, 200, 0.1)
    ours = Communicator(comm)
    for algorithm in [*sparse.EXACT_ALGORITHMS, *sparse.LOSSY_ALGORITHMS]:
        k = 200 if algorithm in sparse.LOSSY_ALGORITHMS else None
        got = ours.sparse_allreduce(*pairs(comm.rank, 200, 0.1), 200, k=k, algorithm=algorithm)
        np.testing.assert_array_equal(got.total, want)
    parts = ours.sparse_allgather(*pairs(comm.rank, 200, 0.1), 200)
    np.testing.assert_array_equal(parts[-1][0], pairs(comm.size - 1, 200, 0.1)[0])
