"""Row-sparse gradients: exact sums by every path, duplicates and empty ranks, bytes, the dense fallback, servers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm import Bucket, Communicator, ParameterServer, chain, context, momentum, scale
from hpccomm.algorithms.parameter_server import HEADER
from hpccomm.algorithms.row_sparse import RowCode
from hpccomm.arrays import narrow
from hpccomm.collectives.compressed.rows import PATHS, allreduce_rows
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks

DTYPES = [np.dtype("f4"), np.dtype("f8"), np.dtype("f2"), np.dtype(ml_dtypes.bfloat16)]
NODES = [[0], [0, 0], [0, 0, 1], [0, 1, 0, 1, 2]]
COUNT, WIDTH = 11, 3


def few(rank: int) -> Any:
    """Rows of a rank, some twice; none on rank 1."""
    return np.random.default_rng(rank).integers(0, COUNT, 0 if rank == 1 else 6)


CASES = {
    "few, with duplicates, none on rank 1": few,
    "none on any rank": lambda rank: np.empty(0, int),
    "all rows, in descending order": lambda rank: np.arange(COUNT)[::-1],
    "one row, often": lambda rank: np.full(9, COUNT - 1),
}


def values_of(rows: Any, rank: int, dtype: Any) -> Any:
    """Eighths, which every dtype here adds exactly in any order."""
    return (np.random.default_rng((rank, 7)).integers(-16, 17, (len(rows), WIDTH)) / 8).astype(dtype)


def dense_sum(case: str, size: int, dtype: Any) -> Any:
    total = np.zeros((COUNT, WIDTH), np.float64)
    for rank in range(size):
        rows = CASES[case](rank)
        np.add.at(total, rows, values_of(rows, rank, dtype).astype("f8"))
    return total


@pytest.mark.parametrize("nodes", NODES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("exchange", PATHS)
def test_the_sum_is_that_of_the_dense_matrices(nodes: list[int], case: str, exchange: str) -> None:
    for dtype, reduce in zip(DTYPES, ("sum", "mean", "mean", "sum"), strict=True):

        def body(comm: Any, dtype: Any = dtype, reduce: Any = reduce) -> Any:
            rows = CASES[case](comm.rank)
            return allreduce_rows(
                comm, rows, values_of(rows, comm.rank, dtype), COUNT, reduce=reduce, exchange=exchange
            )

        wanted = dense_sum(case, len(nodes), dtype)
        wanted = wanted if reduce == "sum" else wanted.astype("f4" if dtype.itemsize == 2 else dtype) / len(nodes)
        named = sorted({int(row) for rank in range(len(nodes)) for row in CASES[case](rank)})
        for found in run_on_ranks(len(nodes), body, nodes):
            whole = np.zeros((COUNT, WIDTH), dtype)
            whole[found.rows] = found.values
            assert found.values.dtype == dtype
            assert whole.tobytes() == narrow(wanted, dtype).tobytes()
            assert found.rows.tolist() == (list(range(COUNT)) if found.path == "dense" else named)


def test_additions_are_in_rank_order_and_a_rank_adds_its_own_duplicates_first() -> None:
    """((1e8 − 1e8) + 1) is 1 in float32, (1e8 + (1 − 1e8)) is 0."""
    given = [([2, 2], [[1e8], [-1e8]]), ([2], [[1.0]]), ([0], [[0.5]])]

    def body(comm: Any) -> Any:
        rows, values = given[comm.rank]
        return allreduce_rows(comm, rows, np.array(values, "f4"), 4, exchange="allgather")

    for found in run_on_ranks(3, body):
        assert (found.rows.tolist(), found.values.tolist()) == ([0, 2], [[0.5], [1.0]])


def test_a_sum_of_halves_beyond_their_range_is_averaged() -> None:
    def body(comm: Any) -> float:
        found = allreduce_rows(comm, [1, 1], np.full((2, 1), 40000, "f2"), 3, reduce="mean", exchange="allgather")
        return float(found.values[0, 0])

    assert run_on_ranks(2, body) == [np.inf] * 2  # 80000 from each rank: its own sum travels in 16 bits
    single = lambda comm: allreduce_rows(comm, [1], np.full((1, 1), 40000, "f2"), 3, reduce="mean").values  # noqa: E731
    assert [float(each[0, 0]) for each in run_on_ranks(3, single)] == [40000] * 3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_travels(bad: float) -> None:
    def body(comm: Any) -> Any:
        return allreduce_rows(comm, [comm.rank], np.full((1, 2), bad if comm.rank else 1, "f4"), 2)

    for found in run_on_ranks(2, body):
        assert np.isfinite(found.values).tolist() == [[True, True], [False, False]]


def test_bytes_are_those_of_the_rows_until_the_whole_matrix_is_shorter() -> None:
    """A rank of 4 sends k(4 + 4w) bytes to three others, or 2 · 3/4 · mw · 4."""
    count, width = 4096, 64

    def body(comm: Any, k: int) -> Any:
        rows = np.arange(k) * (count // max(k, 1))
        return allreduce_rows(comm, rows, np.ones((k, width), "f4"), count)

    overhead = 3 * (8 * 7 + 8)  # of the arguments, and of the length
    for k, path in ((1, "allgather"), (40, "allgather"), (1500, "allgather"), (2300, "dense"), (count, "dense")):
        for found in run_on_ranks(4, lambda comm, k=k: body(comm, k)):
            assert found.path == path
            sent = 3 * k * (4 + 4 * width) if path == "allgather" else 2 * 3 * count * width
            assert sent <= found.bytes_sent <= sent + overhead


def test_nodes_send_each_of_their_rows_once() -> None:
    """Two nodes of two ranks, which name the same rows: one message between them, by the first rank of each."""

    def body(comm: Any, exchange: str) -> Any:
        return allreduce_rows(comm, np.arange(50), np.ones((50, 16), "f4"), 5000, exchange=exchange)

    found = run_on_ranks(4, lambda comm: body(comm, "auto"), [0, 0, 1, 1])
    assert [each.path for each in found] == ["node"] * 4
    message = 50 * (4 + 64)
    assert [each.bytes_sent // message for each in found] == [
        3,
        1,
        3,
        1,
    ]  # to the neighbour, the node, and the sum back
    flat = run_on_ranks(4, lambda comm: body(comm, "allgather"), [0, 0, 1, 1])
    assert all(a.values.tobytes() == b.values.tobytes() for a, b in zip(found, flat, strict=True))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": [0, COUNT]}, "rank 1 passes rows that are no whole numbers from 0 to below count"),
        ({"rows": [-1, 0]}, "rank 1 passes rows that are no whole"),
        ({"rows": [0.5, 1.0]}, "rank 1 passes rows that are no whole"),
        ({"count": 2**33}, "rank 1 passes rows that are no whole"),
        ({"count": "11"}, "rank 1 passes rows that are no whole"),
        ({"rows": np.array([True, False])}, "rank 1 passes rows that are no whole"),
        ({"rows": [1]}, "rank 1 passes arrays of another dtype, shape or length"),
        ({"values": np.ones((2, WIDTH), int)}, "rank 1 passes arrays of another dtype"),
        ({"values": np.ones(2, "f4")}, "rank 1 passes arrays of another dtype"),
        ({"values": np.ones((2, WIDTH + 1), "f4")}, "rank 1 has another number of columns than rank 0"),
        ({"values": np.ones((2, WIDTH), "f8")}, "rank 1 has another dtype than rank 0"),
        ({"count": COUNT + 1}, "rank 1 has another count than rank 0"),
        ({"reduce": "mean"}, "rank 1 has another reduce than rank 0"),
        ({"reduce": "max"}, "rank 1 passes an unknown algorithm"),
        ({"exchange": "ring"}, "rank 1 passes an unknown algorithm"),
    ],
)
def test_a_mistake_on_one_rank_is_told_on_all(change: dict[str, Any], why: str) -> None:
    right: dict[str, Any] = {"rows": [3, 4], "values": np.ones((2, WIDTH), "f4"), "count": COUNT}

    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=why):
            allreduce_rows(comm, **{**right, **(change if comm.rank == 1 else {})})

    run_on_ranks(3, body)


# In training

BUCKET = Bucket({"first": (5,), "embedding": (40, 6), "w": (3, 4), "positions": (7, 2), "empty": (0, 3)})
TABLES = ["embedding", "positions", "empty"]


def gradient_of(rank: int, step: int, dtype: Any = "f4") -> Any:
    """Whole numbers; few rows of the embedding, none of its rows on rank 1, all positions."""
    rng = np.random.default_rng((rank, step))
    vector = rng.integers(-8, 9, BUCKET.size).astype(dtype)
    table = BUCKET.views(vector)["embedding"] if np.dtype(dtype) == BUCKET.dtype else vector[5:245].reshape(40, 6)
    keep = np.zeros(40, bool)
    keep[[] if rank == 1 else rng.integers(0, 40, 5)] = True
    table[~keep] = 0
    return vector


@pytest.mark.parametrize("exchange", PATHS)
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_the_mean_with_rows_is_the_mean(exchange: str, nodes: list[int]) -> None:
    def body(comm: Any) -> None:
        for dtype in ("f4", "f2"):
            weights = np.zeros(BUCKET.size, dtype)
            ours, plain = hpccomm.mean_rows(comm, BUCKET, TABLES, exchange=exchange), hpccomm.mean(comm)
            state, other = ours.init(weights), plain.init(weights)
            for step in range(2):
                gradient = gradient_of(comm.rank, step, dtype)
                gradient.flags.writeable = False
                found, state = ours.update(gradient, state, weights)
                wanted, other = plain.update(gradient, other, weights)
                assert np.array_equal(found, wanted)
            assert hpccomm.report(state).cost.wire_bytes > 0 or comm.size == 1

    run_on_ranks(len(nodes), body, nodes)


def test_training_with_rows_skips_what_is_not_finite_and_sends_less() -> None:
    bucket = Bucket({"embedding": (2000, 32), "w": (10,)})

    def body(comm: Any) -> Any:
        method = chain(hpccomm.mean_rows(comm, bucket, ["embedding"]), hpccomm.apply_if_finite(momentum(0.5)))
        weights, gradient = np.zeros(bucket.size, "f4"), np.zeros(bucket.size, "f4")
        state = method.init(weights)
        gradient[32 * comm.rank + 1] = np.nan
        step, state = method.update(gradient, state, weights)
        assert not step.any()
        gradient[32 * comm.rank + 1] = 1
        step, state = method.update(gradient, state, weights)
        found = hpccomm.report(state)
        assert found.messages.elements == 10 + 1  # those of w, and a row
        assert found.cost.wire_bytes < 0.02 * 2 * bucket.size * 4
        return step

    for step in run_on_ranks(3, body):
        assert np.flatnonzero(step).tolist() == [1, 33, 65]
        assert np.allclose(step[[1, 33, 65]], 1 / 3)


def test_tensors_that_are_not_there_are_named() -> None:
    for tensors, why in (
        (["table"], "no tensor is called table: pass names of first, embedding"),
        ("w", "pass a list"),
    ):
        with pytest.raises(ArgumentError, match=why):
            hpccomm.mean_rows(MPI.COMM_SELF, BUCKET, tensors)


@pytest.mark.parametrize("exchange", PATHS)
@pytest.mark.parametrize(("count", "width", "k"), [(0, 3, 0), (3, 0, 2), (1, 1, 5)])
def test_tables_without_rows_or_columns_and_of_one_element(exchange: str, count: int, width: int, k: int) -> None:
    def body(comm: Any) -> Any:
        return allreduce_rows(comm, np.zeros(k, np.uint64), np.ones((k, width), "f4"), count, exchange=exchange)

    for found in run_on_ranks(3, body, [0, 0, 1]):
        assert found.values.shape == (len(found.rows), width)
        assert (found.values == 3 * k).all()


# Through a parameter server


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", [(0, 5, 266), (0, 8, 20, 257), (0, 0, 100), (11, 12)])
def test_any_slice_of_the_vector_survives_its_message(dtype: Any, cuts: tuple[int, ...]) -> None:
    """Also where it begins or ends inside a row; few rows are shorter, all at most 8 bytes longer."""
    vector = narrow(gradient_of(0, 0), dtype)
    for lo, hi in zip(cuts, (*cuts[1:], BUCKET.size), strict=True):
        code, part = RowCode(BUCKET, TABLES, slice(lo, hi)), vector[lo:hi]
        message = code.encode(part)
        assert code.decode(message, dtype).tobytes() == (part + part.dtype.type(0)).tobytes()
        assert message.size <= part.nbytes + 8 * len(code.regions)
        dense = np.ones_like(part)
        assert code.decode(code.encode(dense), dtype).tobytes() == dense.tobytes()


@pytest.mark.parametrize("servers", [1, 2, 3])
@pytest.mark.parametrize("mode", ["bsp", ("ssp", 1)])
def test_servers_step_on_rows_as_on_whole_gradients(servers: int, mode: Any) -> None:
    def body(comm: Any, rows: Any) -> Any:
        sent = []
        ps = ParameterServer(comm, np.zeros(BUCKET.size, "f4"), scale(-0.5), servers=servers, mode=mode, rows=rows)
        if ps.serves:
            return ps.serve()
        plain = ps.comm.Send
        ps.comm.Send = lambda message, *to: (sent.append(message.size), plain(message, *to))  # type: ignore[method-assign]
        for step in range(4):
            ps.pull()
            ps.push(gradient_of(comm.rank - servers, step))
        return ps.leave(), sum(sent)

    whole = run_on_ranks(servers + 2, lambda comm: body(comm, None))[servers:]
    short = run_on_ranks(servers + 2, lambda comm: body(comm, (BUCKET, TABLES)))[servers:]
    for (wanted, all_bytes), (found, some) in zip(whole, short, strict=True):
        assert np.array_equal(found, wanted)
        assert some - 9 * servers * HEADER.size < 0.6 * (all_bytes - 9 * servers * HEADER.size)


def test_a_codec_or_another_bucket_beside_rows_is_refused() -> None:
    def body(comm: Any) -> None:
        for more, why in (({"codec": hpccomm.none()}, "pass one of them"), ({}, "a bucket of 271 elements for 3")):
            with pytest.raises(ArgumentError, match=why):
                ParameterServer(comm, np.zeros(3 if not more else 271, "f4"), scale(-1), rows=(BUCKET, TABLES), **more)

    run_on_ranks(2, body)


@pytest.mark.mpi(sizes=(2, 3, 4, 5, 7))
def test_rows_over_mpi(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "ranks_of_this_node", lambda channel: channel.Split(channel.rank // 2, channel.rank))
    nodes = Communicator(comm.Dup())
    for dtype in DTYPES:
        for case, draw in CASES.items():
            rows = draw(comm.rank)
            for exchange in PATHS:
                found = allreduce_rows(nodes, rows, values_of(rows, comm.rank, dtype), COUNT, exchange=exchange)
                whole = np.zeros((COUNT, WIDTH), dtype)
                whole[found.rows] = found.values
                assert whole.tobytes() == narrow(dense_sum(case, comm.size, dtype), dtype).tobytes()
    nodes.Free()
