"""The paths of compressed messages: the same bits on all ranks, nothing lost, dense where that is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm.algorithms import message_paths
from hpccomm.algorithms.message_paths import EXCHANGES, choose_path
from hpccomm.algorithms.transforms import Transform, flush
from hpccomm.collectives.compressed import prices
from hpccomm.collectives.compressed.messages import MessageGather, NodeGather
from hpccomm.errors import ArgumentError
from hpccomm.layout import Layout
from hpccomm.performance import sparse_cost
from hpccomm.performance.machine import Machine
from hpccomm.testing import run_on_ranks

F32 = np.float32
NODES = [[0], [0, 0, 0], [0, 1, 2], [0, 0, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 1]]
METHODS: dict[str, Callable[[Any, str], Transform]] = {
    "gtc": lambda comm, path: hpccomm.gtc(comm, 0.5, exchange=path),
    "gtc, sum": lambda comm, path: hpccomm.gtc(comm, 0.5, reduce="sum", exchange=path),
    "topk": lambda comm, path: hpccomm.feedback(hpccomm.topk(0.1), comm, exchange=path),
    "parts": lambda comm, path: hpccomm.feedback(
        hpccomm.topk(0.1), comm, parts=[slice(0, 100), slice(100, 300)], exchange=path
    ),
    "qsgd": lambda comm, path: hpccomm.feedback(hpccomm.qsgd(), comm, exchange=path),
    "onebit": lambda comm, path: hpccomm.feedback(hpccomm.onebit(), comm, exchange=path),
}


def gradient_of(n: int, rank: int, number: int) -> Any:
    """Halves, so that sums of thresholds are exact."""
    return np.random.default_rng([n, rank, number]).integers(-4, 5, n).astype(F32) / 2


def run(comm: Any, name: str, path: str, n: int = 300, steps: int = 5) -> tuple[list[Any], Any]:
    method, weights = METHODS[name](comm, path), np.zeros(n, F32)
    state, found = method.init(weights), []
    for number in range(steps):
        step, state = method.update(gradient_of(n, comm.rank, number), state, weights)
        found.append(step)
    found.append(flush(method, state, weights)[0])
    return found, state


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("path", EXCHANGES)
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_paths_apply_all_gradients_and_ranks_step_alike(name: str, path: str, nodes: list[int]) -> None:
    def body(comm: Any) -> Any:
        found, state = run(comm, name, path)
        wanted, _ = run(comm, name, "allgather")
        if path not in ("dense", "ok_topk", "leaders"):
            for step, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(step, other, atol=1e-5)
        if comm.size > 1:
            has_nodes = 1 < len(set(nodes)) < len(nodes)
            expected = path if path != "auto" else "node" if has_nodes else "allgather"
            assert hpccomm.report(state).messages.path == expected
        return [step.tobytes() for step in found], sum(step.astype("f8") for step in found)

    found = run_on_ranks(len(nodes), body, nodes=nodes)
    assert all(each[0] == found[0][0] for each in found)
    given = sum(gradient_of(300, rank, number).astype("f8") for rank in range(len(nodes)) for number in range(5))
    np.testing.assert_allclose(found[0][1], given / (1 if "sum" in name else len(nodes)), atol=1e-4)


@pytest.mark.parametrize("path", EXCHANGES)
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_short_and_still_vectors_take_every_path(path: str, n: int, momentum: float) -> None:
    def body(comm: Any) -> None:
        method, weights = hpccomm.feedback(hpccomm.topk(0.5), comm, momentum, exchange=path), np.zeros(n, F32)
        state = method.init(weights)
        for gradient in (np.zeros(n, F32), np.ones(n, F32)):
            step, state = method.update(gradient, state, weights)
            assert step.shape == (n,)
        assert step.any() == (n > 0)

    run_on_ranks(4, body, nodes=[0, 0, 1, 1])


@pytest.mark.parametrize("path", EXCHANGES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_every_path_skips_a_gradient_that_is_not_finite(path: str, momentum: float, bad: float) -> None:
    def body(comm: Any) -> None:
        method, weights = hpccomm.feedback(hpccomm.topk(0.5), comm, momentum, exchange=path), np.zeros(6, F32)
        _, state = method.update(gradient_of(6, comm.rank, 0), method.init(weights), weights)
        kept = hpccomm.snapshot(state)
        gradient = np.full(6, bad if comm.rank == 2 else 1, F32)
        step, state = method.update(gradient, state, weights)
        assert not step.any()
        assert state.skipped == 1
        assert np.array_equal(state.residual, kept.residual)

    run_on_ranks(4, body, nodes=[0, 0, 1, 1])


@pytest.mark.parametrize("path", EXCHANGES)
def test_ranks_with_different_compressors_are_named_on_every_path(path: str) -> None:
    def body(comm: Any) -> None:
        made = hpccomm.threshold(0.5) if comm.rank else hpccomm.topk(0.5)
        method, weights = hpccomm.feedback(made, comm, exchange=path), np.zeros(8, F32)
        with pytest.raises(ArgumentError, match="different compressors"):
            method.update(np.ones(8, F32), method.init(weights), weights)

    run_on_ranks(2, body)


@pytest.mark.parametrize("path", EXCHANGES)
def test_dgc_takes_every_path(path: str) -> None:
    bucket = hpccomm.Bucket({"w": (20, 20), "bias": (4,)})

    def body(comm: Any) -> Any:
        method = hpccomm.dgc(comm, bucket, 0.05, smallest=1, mask=False, exchange=path)
        weights = np.zeros(bucket.size, F32)
        state, total = method.init(weights), 0.0
        for number in range(4):
            step, state = method.update(gradient_of(bucket.size, comm.rank, number), state, weights)
            total = total + step.astype("f8")
        return total + flush(method, state, weights)[0]

    found = run_on_ranks(4, body, nodes=[0, 0, 1, 1])
    velocity, wanted = 0.0, 0.0
    for number in range(4):
        velocity = 0.9 * velocity + sum(gradient_of(bucket.size, rank, number) for rank in range(4)) / 4
        wanted = wanted + velocity
    assert all(np.array_equal(each, found[0]) for each in found)
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)


@pytest.mark.parametrize("path", ["auto", "leaders"])
def test_a_run_continues_from_its_state_on_the_node_path(path: str) -> None:
    def body(comm: Any) -> None:
        method, weights = METHODS["topk"](comm, path), np.zeros(50, F32)
        state = method.init(weights)
        for number in range(3):
            _, state = method.update(gradient_of(50, comm.rank, number), state, weights)
        again = hpccomm.load_state_dict(method.init(weights), hpccomm.state_dict(state))
        steps = [method.update(gradient_of(50, comm.rank, 3), each, weights)[0] for each in (state, again)]
        assert np.array_equal(*steps)

    run_on_ranks(4, body, nodes=[0, 1, 0, 1])


# Messages that nodes pass on

EVEN = [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 1, 1, 1], [2, 1, 0, 0, 1, 2]]


class CountingComm:
    """Counts the bytes that a rank sends to each other rank of its channel."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.bytes = comm, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Allgather(self, mine: Any, room: Any) -> None:
        self.bytes += mine.nbytes
        self.comm.Allgather(mine, room)

    def Allgatherv(self, mine: Any, room: Any) -> None:
        self.bytes += mine.nbytes
        self.comm.Allgatherv(mine, room)


class CountingChannel:
    """A communicator that counts what passes between the nodes."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.inter_node = comm, CountingComm(comm.inter_node)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)


@pytest.mark.parametrize("nodes", EVEN, ids=str)
@pytest.mark.parametrize("lengths", [(0,), (5,), (3, 0, 40, 7), (20_000, 1)], ids=str)
def test_messages_gathered_by_nodes_are_those_of_all_ranks_in_their_order(
    nodes: list[int], lengths: tuple[int, ...]
) -> None:
    def body(comm: Any) -> None:
        gather, flat = NodeGather(comm), MessageGather(comm)
        for number in range(4):
            size = lengths[(comm.rank + number) % len(lengths)]
            message = np.random.default_rng([comm.rank, number]).integers(0, 256, size).astype(np.uint8)
            found, wanted = gather.gather(message)[0], flat.gather(message)[0]
            assert [each.tobytes() for each in found] == [each.tobytes() for each in wanted]
            assert gather.room == flat.room

    run_on_ranks(len(nodes), body, nodes=nodes)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("nodes", [[0, 1, 2], [0, 0, 0]], ids=str)
def test_on_nodes_of_one_rank_and_on_one_node_the_node_path_is_an_allgather(name: str, nodes: list[int]) -> None:
    def body(comm: Any) -> None:
        found, wanted = (run(comm, name, path)[0] for path in ("node", "allgather"))
        assert all(each.tobytes() == other.tobytes() for each, other in zip(found, wanted, strict=True))

    run_on_ranks(len(nodes), body, nodes=nodes)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("nodes", EVEN, ids=str)
def test_on_even_nodes_the_node_path_takes_the_steps_of_an_allgather_and_sends_their_messages(
    name: str, nodes: list[int]
) -> None:
    """The same bits, and no more bytes between the nodes; before lengths are known, nodes add."""

    def body(comm: Any) -> None:
        counting, weights = CountingChannel(comm), np.zeros(300, F32)
        flat, node = METHODS[name](comm, "allgather"), METHODS[name](counting, "node")
        _, state = flat.update(gradient_of(300, comm.rank, 0), flat.init(weights), weights)
        states = [state, hpccomm.snapshot(state)]
        for number in range(1, 4):
            counting.inter_node.bytes, gradient = 0, gradient_of(300, comm.rank, number)
            wanted, states[0] = flat.update(gradient, states[0], weights)
            found, states[1] = node.update(gradient, states[1], weights)
            assert found.tobytes() == wanted.tobytes()
            assert states[0].residual.tobytes() == states[1].residual.tobytes()
            sent = 16 + states[1].longest + 32 * states[1].headers.shape[0] + 8 * states[1].headers.shape[0]
            assert counting.inter_node.bytes <= max(sent, 8 + states[1].room)
            assert counting.inter_node.bytes > 8, "each rank sends its own message"
        assert hpccomm.report(states[1]).messages.path == "node"

    run_on_ranks(len(nodes), body, nodes=nodes)


# One message a node


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("nodes", [[0, 1, 2], [0, 1]], ids=str)
def test_on_nodes_of_one_rank_leaders_take_the_steps_of_an_allgather(name: str, nodes: list[int]) -> None:
    def body(comm: Any) -> None:
        found, wanted = (run(comm, name, path)[0] for path in ("leaders", "allgather"))
        assert all(np.array_equal(*pair) for pair in zip(found, wanted, strict=True))

    run_on_ranks(len(nodes), body, nodes=nodes)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 0, 1]], ids=str)
def test_a_node_takes_the_steps_of_one_rank_with_the_mean_of_its_gradients(momentum: float, nodes: list[int]) -> None:
    """Top-k with momentum correction on two ranks, whose gradients are halves: sums and halves of them are exact."""

    def steps(comm: Any, path: str, gradients: Any) -> list[Any]:
        method, weights = hpccomm.feedback(hpccomm.topk(0.2), comm, momentum, exchange=path), np.zeros(60, F32)
        state, found = method.init(weights), []
        for number in range(6):
            step, state = method.update(gradients(number), state, weights)
            found.append(step)
        return found

    def mean_of(node: int, number: int) -> Any:
        return sum(gradient_of(60, rank, number) for rank in range(4) if nodes[rank] == node) / F32(2)

    four = run_on_ranks(4, lambda comm: steps(comm, "leaders", lambda t: gradient_of(60, comm.rank, t)), nodes=nodes)
    two = run_on_ranks(2, lambda comm: steps(comm, "allgather", lambda t: mean_of(comm.rank, t)), nodes=[0, 1])
    for found in four:
        assert all(np.array_equal(*pair) for pair in zip(found, two[0], strict=True))


def test_only_the_first_rank_of_a_node_keeps_a_residual_and_all_report_its_message() -> None:
    def body(comm: Any) -> Any:
        _, state = run(comm, "topk", "leaders", n=100)
        assert state.residual.any() == (comm.intra_node.rank == 0)
        report = hpccomm.report(state)
        assert report.messages.elements == 10
        return report.messages.nbytes, report.messages.path, state.longest

    found = run_on_ranks(5, body, nodes=[0, 0, 1, 1, 1])
    assert len(set(found)) == 1
    nbytes, path, longest = found[0]
    assert (path, longest) == ("leaders", nbytes - 32)


def test_a_run_may_change_between_leaders_and_other_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the paths, all that was given is applied once, and all ranks step alike."""

    def body(comm: Any) -> Any:
        weights, total, state = np.zeros(80, F32), np.zeros(80), None
        for number, path in enumerate(["allgather", "leaders", "node", "leaders", "dense", "leaders", "split"]):
            method = hpccomm.feedback(hpccomm.topk(0.1), comm, exchange=path)
            state = method.init(weights) if state is None else state
            step, state = method.update(gradient_of(80, comm.rank, number), state, weights)
            total += step
        return total + flush(method, state, weights)[0]

    found = run_on_ranks(4, body, nodes=[0, 0, 0, 1])
    given = sum(gradient_of(80, rank, number).astype("f8") for rank in range(4) for number in range(7)) / 4
    assert all(np.array_equal(each, found[0]) for each in found)
    np.testing.assert_allclose(found[0], given, atol=1e-5)


@pytest.mark.parametrize("path", ["leaders", "dense"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_sums_of_ranks_that_would_overflow_are_skipped(path: str, momentum: float) -> None:
    """Each gradient is finite, the sum over the ranks is not."""

    def body(comm: Any) -> None:
        method, weights = hpccomm.feedback(hpccomm.topk(0.5), comm, momentum, exchange=path), np.zeros(8, F32)
        state = method.init(weights)
        step, state = method.update(np.full(8, 1.5e38, F32), state, weights)
        assert not step.any()
        assert (state.skipped, state.steps) == (1, 0)
        step, state = method.update(np.ones(8, F32), state, weights)
        assert step.any()

    run_on_ranks(4, body, nodes=[0, 0, 1, 1])


# Dense where that is cheaper


@pytest.mark.parametrize(("density", "ranks", "dense"), [(0.001, 8, False), (0.001, 4000, True), (0.5, 8, True)])
def test_long_vectors_are_sent_densely_where_their_messages_would_take_longer(
    density: float, ranks: int, dense: bool
) -> None:
    class Comm:
        size = ranks

    n = 25_000_000
    found = choose_path(Comm(), n, round(8 * density * n), round(density * n))
    assert (found == "dense") == dense
    assert choose_path(Comm(), n, 0, 0) == "allgather"


def test_a_compressor_that_sends_most_elements_becomes_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "LONG", 100)

    def body(comm: Any) -> None:
        method, weights = hpccomm.feedback(hpccomm.topk(0.9), comm), np.zeros(30_000, F32)
        state, paths = method.init(weights), []
        for number in range(3):
            _, state = method.update(gradient_of(30_000, comm.rank, number), state, weights)
            paths.append(hpccomm.report(state).messages.path)
        assert paths == ["allgather", "dense", "dense"]
        assert not state.residual.any()

    def tries_again(comm: Any) -> None:
        method, weights = hpccomm.feedback(hpccomm.topk(0.9), comm), np.zeros(30_000, F32)
        state = method.init(weights)
        for number in range(message_paths.TRY_AGAIN + 2):
            _, state = method.update(gradient_of(30_000, comm.rank, number % 3), state, weights)
            if number == message_paths.TRY_AGAIN:
                assert hpccomm.report(state).messages.path == "allgather"
        assert hpccomm.report(state).messages.path == "dense"

    run_on_ranks(5, body)
    run_on_ranks(5, tries_again)


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: hpccomm.gtc(MPI.COMM_SELF, exchange="ring"),
        "exchange is 'ring': pass one of 'auto', 'allgather'",
    ),
    (lambda: hpccomm.feedback(hpccomm.sign_majority(), MPI.COMM_SELF, exchange="dense"), "counts votes"),
    (
        lambda: hpccomm.feedback(
            hpccomm.sign_majority(), hpccomm.Communicator(MPI.COMM_SELF.Dup()), exchange="leaders"
        ),
        "counts votes",
    ),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES)
def test_paths_that_cannot_be_taken_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_backlog_of_messages_is_not_lost_in_a_dense_sum_that_overflows() -> None:
    """A residual that a rank can hold may be too large for the sum of all ranks': then the step is skipped."""

    def body(comm: Any) -> None:
        weights, large = np.zeros(64, F32), np.full(64, 1.5e38, F32)
        messages = hpccomm.feedback(hpccomm.randomk(0.25), comm, exchange="allgather")
        _, state = messages.update(large, messages.init(weights), weights)
        before = state.residual.copy()
        dense = hpccomm.feedback(hpccomm.randomk(0.25), comm, exchange="dense")
        step, state = dense.update(np.ones(64, F32), state, weights)
        assert state.skipped == 1
        assert not step.any()
        assert np.array_equal(state.residual, before)

    run_on_ranks(4, body)


@pytest.mark.parametrize("p", range(1, 18))
def test_sums_by_doubling_are_priced_with_the_messages_that_they_send(p: int) -> None:
    """Ranks beyond the last power of two send a message before the rounds, and get one after them."""
    inner = 1 << (p.bit_length() - 1)
    phases = prices.exact_phases(1e6, 1e3, prices.Place(p, 1))["recursive_doubling"]
    assert len(phases) == inner.bit_length() - 1 + 2 * (p > inner)
    sizes = [each.nbytes for each in phases]
    assert sizes == sorted(sizes)


def test_uneven_nodes_have_as_many_ranks_as_they_have() -> None:
    class Comm:
        size = 8
        layout = Layout(np.array([0] * 7 + [1]), ("a", "b"))

    place = prices.place_of(Comm())
    assert (place.nodes, place.per_node, place.ranks) == (2, 7, 8)
    assert place.level(prices.BETWEEN_NODES).ranks == 2


def test_short_vectors_are_predicted_on_the_path_that_they_take() -> None:
    found = sparse_cost.choose_row(4, 2, 1 << 16, 0.01, 4, Machine())
    assert found.algorithm == "node"
