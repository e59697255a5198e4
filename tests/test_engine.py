"""The engine runs every schedule on any transport and at every length."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np
import pytest
from thread_ranks import ThreadTransport, run_on_threads

from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.collectives.engine import bind, bind_program, bind_segments, even_cuts
from hpccomm.collectives.lowering import Layout, lower
from hpccomm.collectives.schedule import Algorithm, NodeStep
from hpccomm.errors import MismatchError

SIZES = (1, 2, 3, 4, 5, 7, 8)


def lengths(p: int) -> list[int]:
    return sorted({0, 1, p - 1, p, p + 1, 1000})


def operand(rank: int, n: int, dtype: str = "i8") -> Any:
    """Distinct values by rank and index, exact in every order of summation."""
    return ((rank + 1) * 100 + np.arange(n) % 97).astype(dtype)


def imperative_ring(transport: ThreadTransport, vector: Any) -> None:
    """An oracle written without a schedule: ring allreduce by explicit exchanges."""
    r, p = transport.rank, transport.size
    cuts = even_cuts(vector.size, p)
    block = [vector[cuts[b] : cuts[b + 1]] for b in range(p)]
    for k in range(2 * (p - 1)):
        out, into = block[(r - k) % p], block[(r - k - 1) % p]
        new = np.empty_like(into)
        exchange = transport.exchange(out, (r + 1) % p, new, (r - 1) % p, 7)
        for act in (*exchange.starts, *exchange.waits):
            act()
        into[...] = into + new if k < p - 1 else new


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_allreduce_sums_every_rank_once_at_every_length(name: str, p: int) -> None:
    algorithm = ALGORITHMS["allreduce"][name]
    for n, number in itertools.product(lengths(p), (1, 3)):
        got = run_on_threads(p, lambda t, n=n, number=number: run_allreduce(algorithm, t, operand(t.rank, n), number))
        want = sum(operand(rank, n) for rank in range(p))
        assert all(np.array_equal(vector, want) for vector in got), (n, number)


def run_allreduce(algorithm: Algorithm, transport: ThreadTransport, vector: Any, segments: int = 1) -> Any:
    p = transport.size
    steps = algorithm.steps(transport.rank, p)
    plan = bind_segments(steps, vector, algorithm.blocks(p), segments, transport, np.add)
    plan()
    plan.free()
    return vector


@pytest.mark.parametrize("p", SIZES)
def test_ring_equals_an_oracle_without_schedules(p: int) -> None:
    def both(transport: ThreadTransport) -> tuple[Any, Any]:
        a = operand(transport.rank, 1000, "f4")
        b = a.copy()
        imperative_ring(transport, a)
        return a, run_allreduce(ALGORITHMS["allreduce"]["ring"], transport, b)

    for oracle, ours in run_on_threads(p, both):
        assert oracle.tobytes() == ours.tobytes()


@pytest.mark.parametrize("nodes", [[0, 0], [0, 1], [0, 1, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0, 1], [2, 1, 0, 2, 1, 0, 1]])
@pytest.mark.parametrize("inter", ["ring", "butterfly", "doubling"])
def test_hierarchical_allreduce_is_right_for_any_mapping(nodes: list[int], inter: str) -> None:
    algorithm = hierarchical.build_allreduce(nodes, ALGORITHMS["allreduce"][inter])
    p = len(nodes)
    for n in lengths(p):
        got = run_on_threads(p, lambda t, n=n: run_allreduce(algorithm, t, operand(t.rank, n)))
        assert all(np.array_equal(vector, sum(operand(rank, n) for rank in range(p))) for vector in got)


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("name", [name for name, each in ALGORITHMS["allreduce"].items() if each.ordered])
def test_ordered_algorithms_keep_rank_order_for_a_non_commutative_operation(name: str, p: int) -> None:
    """The operation is the product of 2x2 matrices."""

    def matrix(rank: int) -> Any:
        return np.array([1, rank + 1, rank % 3, 1 - rank], dtype="i8")

    def product(lower: Any, upper: Any, out: Any) -> None:
        out[...] = (lower.reshape(2, 2) @ upper.reshape(2, 2)).ravel()

    def body(transport: ThreadTransport) -> Any:
        algorithm = ALGORITHMS["allreduce"][name]
        vector = matrix(transport.rank)
        blocks = algorithm.blocks(p)
        bind(algorithm.steps(transport.rank, p), vector, [0] * blocks + [4], transport, product)()
        return vector

    want = matrix(0).reshape(2, 2)
    for rank in range(1, p):
        want = want @ matrix(rank).reshape(2, 2)
    assert all(np.array_equal(vector.reshape(2, 2), want) for vector in run_on_threads(p, body))


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS["reduce_scatter"])
def test_reduce_scatter_leaves_each_rank_its_own_block_with_uneven_cuts(name: str, p: int) -> None:
    algorithm = ALGORITHMS["reduce_scatter"][name]
    cuts = np.cumsum([0, *((3 * b) % 5 for b in range(p))])

    def body(transport: ThreadTransport) -> Any:
        vector = operand(transport.rank, int(cuts[-1]))
        bind(algorithm.steps(transport.rank, p), vector, cuts, transport, np.add)()
        return vector[cuts[transport.rank] : cuts[transport.rank + 1]]

    want = sum(operand(rank, int(cuts[-1])) for rank in range(p))
    for rank, mine in enumerate(run_on_threads(p, body)):
        assert np.array_equal(mine, want[cuts[rank] : cuts[rank + 1]])


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS["allgather"])
def test_allgather_brings_every_block_everywhere_with_uneven_cuts(name: str, p: int) -> None:
    algorithm = ALGORITHMS["allgather"][name]
    cuts = np.cumsum([0, *((3 * b) % 5 for b in range(p))])
    want = np.concatenate([operand(b, int(cuts[b + 1] - cuts[b])) for b in range(p)])

    def body(transport: ThreadTransport) -> Any:
        r, vector = transport.rank, np.full(int(cuts[-1]), -1)
        vector[cuts[r] : cuts[r + 1]] = operand(r, int(cuts[r + 1] - cuts[r]))
        bind(algorithm.steps(r, p), vector, cuts, transport)()
        return vector

    assert all(np.array_equal(vector, want) for vector in run_on_threads(p, body))


@pytest.mark.parametrize("p", SIZES)
@pytest.mark.parametrize("collective", ["bcast", "reduce"])
def test_rooted_collectives_work_from_every_root(collective: str, p: int) -> None:
    for (name, algorithm), root in itertools.product(ALGORITHMS[collective].items(), range(p)):

        def body(transport: ThreadTransport, algorithm: Algorithm = algorithm, root: int = root) -> Any:
            vector = operand(transport.rank, 1000)
            steps = algorithm.steps(transport.rank, p, root)
            bind_segments(steps, vector, algorithm.blocks(p), 4, transport, np.add)()
            return vector

        got = run_on_threads(p, body)
        if collective == "bcast":
            assert all(np.array_equal(vector, operand(root, 1000)) for vector in got), (name, root)
        else:
            assert np.array_equal(got[root], sum(operand(rank, 1000) for rank in range(p))), (name, root)


def test_a_plan_may_run_many_times() -> None:
    def body(transport: ThreadTransport) -> Any:
        vector = np.ones(10, "i8")
        plan = bind_segments(ALGORITHMS["allreduce"]["ring"].steps(transport.rank, 3), vector, 3, 1, transport, np.add)
        for _ in range(4):
            plan()
        return vector

    assert all((vector == 81).all() for vector in run_on_threads(3, body))


def test_a_bound_schedule_keeps_the_memory_of_which_node_steps_know_the_address() -> None:
    step = NodeStep("reduce_scatter", np.zeros(2, dtype=np.int64), np.array([0, 1]), np.array([1, 2]))
    program = lower([step], 0, Layout(4, 8, 2), from_source=True)
    vector, source = np.ones(4), np.ones(4)
    kept = weakref.ref(vector), weakref.ref(source)
    plan = bind_program(program, vector, source, None, meet=lambda meeting: lambda: None)
    del vector, source
    assert all(each() is not None for each in kept)
    plan()


def test_a_message_of_another_call_is_refused() -> None:
    def body(transport: ThreadTransport) -> None:
        steps = ALGORITHMS["allreduce"]["ring"].steps(transport.rank, 2)
        bind(steps, np.ones(4), even_cuts(4, 2), transport, np.add, tag=transport.rank)()

    with pytest.raises(MismatchError, match="make the calls the same"):
        run_on_threads(2, body, patience=5.0)
