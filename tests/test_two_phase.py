"""Means in two phases: 16-bit floats in 16 bits, blocks in 8 bits, the bytes on the wire, and what rounding loses."""

from __future__ import annotations

import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm.algorithms.states import for_ranks, snapshot, unsent_leaves
from hpccomm.algorithms.transforms import flush
from hpccomm.collectives.compressed.two_phase import (
    CODES,
    add_blocks,
    decode_blocks,
    encode_blocks,
    sum_of_codes,
    write_blocks,
)
from hpccomm.errors import ArgumentError
from hpccomm.testing import run_on_ranks

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = [np.dtype("f2"), BFLOAT16]
LENGTHS = [0, 1, 2, 7, 300]
F32 = np.float32


class CountingComm:
    """A communicator that counts the bytes that this rank sends to others."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.sent = comm, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Alltoall(self, mine: np.ndarray, arrived: np.ndarray) -> None:
        self.sent += mine.nbytes * (self.size - 1) // self.size
        self.comm.Alltoall(mine, arrived)

    def Allgather(self, mine: np.ndarray, arrived: np.ndarray) -> None:
        self.sent += mine.nbytes * (self.size - 1)
        self.comm.Allgather(mine, arrived)

    def Allreduce(self, mine: np.ndarray, total: np.ndarray, op: MPI.Op = MPI.SUM) -> None:
        self.sent += round(2 * mine.nbytes * (self.size - 1) / self.size)
        self.comm.Allreduce(mine, total, op)


def values(n: int, rank: int, number: int = 0) -> Any:
    return np.random.default_rng([n, rank, number]).normal(size=n).astype(F32)


# 16-bit floats


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_mean_of_halves_is_that_of_float32_rounded_once(dtype: Any, n: int, size: int) -> None:
    def body(comm: Any) -> Any:
        method = hpccomm.mean(comm)
        gradient = values(n, comm.rank).astype(dtype)
        weights = np.zeros(n, dtype)
        gradient.flags.writeable = False
        state = method.init(weights)
        for _ in range(2):
            step, state = method.update(gradient, state, weights)
        return step

    total = np.zeros(n, F32)
    for rank in range(size):
        total += values(n, rank).astype(dtype).astype(F32)
    for step in run_on_ranks(size, body):
        assert step.dtype == dtype
        assert np.array_equal(step, (total / F32(size)).astype(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_halves_send_half_the_bytes_of_float32(dtype: Any, size: int) -> None:
    n = 1200

    def body(comm: Any) -> tuple[int, int]:
        sent = []
        for kind in (dtype, np.dtype("f4")):
            counting = CountingComm(comm)
            method, weights = hpccomm.mean(counting), np.ones(n, kind)
            _, state = method.update(weights, method.init(weights), weights)
            assert hpccomm.report(state).cost.wire_bytes == counting.sent
            sent.append(counting.sent)
        return sent[0], sent[1]

    for half, single in run_on_ranks(size, body):
        assert 2 * half == single == 2 * 4 * n * (size - 1) // size


def test_sums_of_halves_that_exceed_their_range_are_averaged() -> None:
    def body(comm: Any) -> float:
        method, weights = hpccomm.mean(comm), np.full(3, 60000, "f2")
        return float(method.update(weights, method.init(weights), weights)[0][0])

    assert run_on_ranks(3, body) == [float(np.float16(60000))] * 3


def test_halves_of_any_shape_keep_it() -> None:
    def body(comm: Any) -> None:
        method, weights = hpccomm.mean(comm), np.full((3, 5), comm.rank, "f2")
        step, _ = method.update(weights, method.init(weights), weights)
        assert step.shape == (3, 5)
        assert (step == 1).all()

    run_on_ranks(3, body)


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_over_mpi(comm: hpccomm.Communicator, dtype: Any) -> None:
    for each in (comm, MPI.COMM_WORLD):
        method, weights = hpccomm.mean(each), (np.arange(11) % 4 * (comm.rank + 1)).astype(dtype)
        step, _ = method.update(weights, method.init(weights), weights)
        assert np.array_equal(step, (np.arange(11) % 4 * (comm.size + 1) / 2).astype(dtype))


# Blocks in 8 bits


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("n", [*LENGTHS, 256, 257])
def test_a_code_is_right_to_half_a_unit_of_its_block(code: str, n: int) -> None:
    x = values(n, 3) * 1000
    kind = CODES[code]
    coded = encode_blocks(x, kind)
    assert (
        coded.size == kind.nbytes(n) == -(-n // kind.block) * kind.scale_bytes + (-(-n // 2) if code == "int4" else n)
    )
    error = np.abs(decode_blocks(coded, n, kind) - x)
    for first in range(0, n, kind.block):
        block = slice(first, first + kind.block)
        top = np.abs(x[block]).max()
        unit = {"int8": top / 254, "e4m3": top / 28, "e5m2": top / 14, "mx": top / 7, "int4": top / 14}[code]
        assert error[block].max() <= unit * 1.0001


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("peak", [0.0, 1e-45, 1e-38, 3.4e38, float(np.finfo(F32).max)])
def test_a_code_holds_the_ends_of_float32(code: str, peak: float) -> None:
    x = np.array([peak, -peak, peak / 2, 0], F32)
    decoded = decode_blocks(encode_blocks(x, CODES[code]), 4, CODES[code])
    assert np.isfinite(decoded).all()
    assert np.abs(decoded - x).max() <= max(peak / 7, 1e-42)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_becomes_nan(code: str, bad: float) -> None:
    x = values(300, 0)
    x[7] = bad
    assert np.isnan(decode_blocks(encode_blocks(x, CODES[code]), 300, CODES[code])).all()


@pytest.mark.parametrize(("code", "octets"), [("int8", 2.2), ("int4", 4.2)])
def test_whole_numbers_are_coded_and_added_without_copies_of_the_vector(code: str, octets: float) -> None:
    """In bytes an element, of which a float32 takes four: the codes, and those in the message."""
    n, kind = 1 << 20, CODES[code]
    x, residual, total = values(n, 0), values(n, 1), np.zeros(n, F32)
    message = np.empty(kind.nbytes(n), np.uint8)

    def once() -> None:
        write_blocks(message, n, kind, x, residual, residual)
        add_blocks(message, n, kind, total)

    once()
    tracemalloc.start()
    once()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < octets * n


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("m", LENGTHS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_sum_of_codes_is_that_of_the_decoded_rows(code: str, m: int, size: int) -> None:
    kind = CODES[code]

    def body(comm: Any) -> Any:
        counting = CountingComm(comm)
        rows = np.stack([values(m, comm.rank, other) for other in range(size)])
        total, sent = sum_of_codes(counting, rows, code)
        assert sent == counting.sent == (size - 1) * kind.nbytes(m)
        return total

    for rank, total in enumerate(run_on_ranks(size, body)):
        wanted = np.zeros(m, F32)
        for other in range(size):
            row = values(m, other, rank)
            wanted += row if size == 1 else decode_blocks(encode_blocks(row, kind), m, kind)
        assert total.dtype == F32
        assert np.array_equal(total, wanted)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("feedback", [True, False])
def test_the_mean_in_blocks_is_near_and_the_same_on_all_ranks(code: Any, n: int, size: int, feedback: bool) -> None:
    def body(comm: Any) -> Any:
        method, weights = hpccomm.block_mean(comm, code, feedback=feedback), np.zeros(n, F32)
        state, steps = method.init(weights), []
        for number in range(3):
            step, state = method.update(values(n, comm.rank, number), state, weights)
            steps.append(step)
        return steps

    found = run_on_ranks(size, body)
    for number in range(3):
        assert len({steps[number].tobytes() for steps in found}) == 1
        mean = sum(values(n, rank, number) for rank in range(size)) / size
        assert np.abs(found[0][number] - mean).max(initial=0) < {"int8": 0.1}.get(code, 1.0)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_steps_and_errors_add_up_to_all_gradients(code: Any, size: int) -> None:
    n, steps = 300, 50

    def body(comm: Any) -> Any:
        method, weights = hpccomm.block_mean(comm, code), np.zeros(n, F32)
        state, total, given = method.init(weights), np.zeros(n), np.zeros(n)
        for number in range(steps):
            gradient = values(n, comm.rank, number)
            given += gradient
            step, state = method.update(gradient, state, weights)
            total += step
        kept = snapshot(state)
        step, state = flush(method, state, weights)
        assert not any(each.any() for each in unsent_leaves(state))
        return total + step, given, kept, step

    found = run_on_ranks(size, body)
    np.testing.assert_allclose(found[0][0], sum(each[1] for each in found) / size, atol=1e-4)
    for new in (1, 2, 5):
        states = [for_ranks([each[2] for each in found], rank, new) for rank in range(new)]

        def pending(comm: Any, states: Any = states) -> Any:
            method = hpccomm.block_mean(comm, code)
            return flush(method, states[comm.rank], np.zeros(n, F32))[0]

        for step in run_on_ranks(new, pending):
            np.testing.assert_allclose(step, found[0][3], atol=1e-5)


PLACED = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1], [0, 1, 2, 1, 2, 0]]
"""The node of each rank; the fourth is uneven, and stays flat."""


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("nodes", PLACED, ids=str)
@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_ranks_of_a_node_add_their_vectors_before_they_are_coded(code: Any, nodes: list[int], n: int) -> None:
    """The mean is near, the same on all ranks, and steps and errors add up to all gradients, also on other ranks."""
    size = len(nodes)

    def body(comm: Any) -> Any:
        method, weights = hpccomm.block_mean(comm, code), np.zeros(n, F32)
        state, steps, given = method.init(weights), [], np.zeros(n)
        for number in range(20):
            gradient = values(n, comm.rank, number)
            given += gradient
            step, state = method.update(gradient, state, weights)
            steps.append(step)
        kept = snapshot(state)
        return steps, given, kept, flush(method, state, weights)[0]

    found = run_on_ranks(size, body, nodes)
    assert len({b"".join(step.tobytes() for step in steps) for steps, *_ in found}) == 1
    mean = sum(values(n, rank) for rank in range(size)) / size
    assert np.abs(found[0][0][0] - mean).max(initial=0) < {"int8": 0.1}.get(code, 1.0)
    total, given = sum(found[0][0]) + found[0][3], sum(each[1] for each in found) / size
    np.testing.assert_allclose(total, given, atol=1e-4)
    for new in (1, 3):
        states = [for_ranks([each[2] for each in found], rank, new) for rank in range(new)]

        def pending(comm: Any, states: Any = states) -> Any:
            return flush(hpccomm.block_mean(comm, code), states[comm.rank], np.zeros(n, F32))[0]

        for step in run_on_ranks(new, pending):
            np.testing.assert_allclose(step, found[0][3], atol=1e-5)


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (4, 2), (2, 4), (3, 3)])
def test_through_the_link_of_a_node_travels_a_quarter_of_a_dense_mean(nodes: int, per_node: int) -> None:
    """A dense one in two levels: 2(N-1)/N vectors of float32."""
    n = 144 * 256

    def body(comm: Any) -> int:
        sent = []

        class Counting(CountingComm):
            @property
            def inter_node(self) -> Any:
                sent.append(CountingComm(self.comm.inter_node))
                return sent[-1]

        method, weights = hpccomm.block_mean(Counting(comm)), np.ones(n, F32)
        method.update(weights, method.init(weights), weights)
        return sum(each.sent for each in sent)

    home = [rank // per_node for rank in range(nodes * per_node)]
    through = sum(run_on_ranks(nodes * per_node, body, home)[:per_node])
    assert 0 < through <= 0.26 * 2 * (nodes - 1) / nodes * 4 * n


def test_a_mean_that_keeps_nothing_has_nothing_to_flush() -> None:
    method, weights = hpccomm.block_mean(MPI.COMM_SELF, feedback=False), np.zeros(5, F32)
    with pytest.raises(ArgumentError, match="nothing to flush"):
        flush(method, method.init(weights), weights)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("size", [2, 4])
def test_blocks_send_at_most_three_tenths_of_float32(code: Any, size: int) -> None:
    n = 1 << 16

    def body(comm: Any) -> float:
        counting = CountingComm(comm)
        method, weights = hpccomm.block_mean(counting, code), np.ones(n, F32)
        _, state = method.update(weights, method.init(weights), weights)
        assert hpccomm.report(state).cost.wire_bytes == counting.sent
        return counting.sent / (2 * 4 * n * (size - 1) / size)

    assert all(each < 0.26 for each in run_on_ranks(size, body))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_block_that_is_not_finite_is_skipped_on_all_ranks(bad: float, feedback: bool) -> None:
    def body(comm: Any) -> None:
        method, weights = hpccomm.block_mean(comm, feedback=feedback), np.ones(5, F32)
        gradient = np.full(5, bad if comm.rank else 1, F32)
        step, state = method.update(gradient, method.init(weights), weights)
        assert not step.any()
        assert hpccomm.report(state).messages.skipped == 1
        assert np.isfinite(state.residual).all()

    run_on_ranks(2, body)


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(ArgumentError, match="pass one of 'int8', 'e4m3', 'e5m2', 'mx', 'int4'"):
        hpccomm.block_mean(MPI.COMM_SELF, "int2")  # type: ignore[arg-type]


def read_only(vector: Any) -> Any:
    vector = vector.copy()
    vector.flags.writeable = False
    return vector


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: {"residual": read_only(state.residual)}, "the residual: the vector is read-only"),
        (lambda state: {"residual": state.residual.astype("f8")}, "the residual: pass a flat contiguous float32"),
        (lambda state: {"residual": np.zeros(20, "f4")[::2]}, "the residual: pass a flat contiguous float32"),
        (lambda state: {"server": read_only(state.server)}, "the residual of the shard: the vector is read-only"),
        (lambda state: {"server": state.server.astype("f2")}, "the residual of the shard: pass a flat contiguous"),
        (lambda state: {"server": np.zeros(2, "f4"), "ranks": 4}, r"of 4 ranks, 3 exchange: .*for_ranks\(states"),
    ],
)
def test_a_state_that_a_program_has_made_itself_is_read_before_it_is_written(change: Any, why: str) -> None:
    def body(comm: Any) -> None:
        method, weights = hpccomm.block_mean(comm), np.zeros(10, "f4")
        state = method.init(weights)
        with pytest.raises(ArgumentError, match=f"block_mean.*{why}"):
            method.update(np.ones(10, "f4"), state._replace(**change(state)), weights)

    run_on_ranks(3, body)
