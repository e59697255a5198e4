"""Hierarchical allgather and reduce-scatter: proved on every layout, equal to flat ones, priced by the formula."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from thread_ranks import ThreadTransport, run_on_threads

from hpccomm.__main__ import main
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.engine import bind
from hpccomm.collectives.hierarchical import (
    HIERARCHICAL,
    build_allgather,
    build_reduce_scatter,
)
from hpccomm.collectives.schedule import Algorithm, without_node_steps
from hpccomm.collectives.verify import verify_algorithm
from hpccomm.errors import ScheduleError
from hpccomm.layout import Link
from hpccomm.performance.cost import predict, price
from hpccomm.performance.machine import Machine

HALVES = ("allgather", "reduce_scatter")
SHAPES = [(4, 2), (6, 3), (6, 2), (8, 4), (5, 1), (3, 3), (1, 1)]
"""(p, k): ranks in all and on a node."""
LAYOUTS = [[r // k for r in range(p)] for p, k in SHAPES] + [[r % (p // k) for r in range(p)] for p, k in SHAPES[:4]]
LAYOUTS += [[0, 1, 1], [1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 2, 2]]


def even_layouts(p: int) -> Iterator[list[int]]:
    """Layouts with as many ranks on every node: by block, cyclic, and shuffled."""
    for k in (k for k in range(1, p + 1) if p % k == 0):
        yield [r // k for r in range(p)]
        yield [r % (p // k) for r in range(p)]
        yield np.random.default_rng(p + k).permutation([r // k for r in range(p)]).tolist()


def pad(vector: Any, p: int) -> Any:
    """A vector as p equal rows, padded with zeros."""
    rows = np.zeros((p, -(-vector.size // p)), vector.dtype)
    rows.reshape(-1)[: vector.size] = vector
    return rows


@pytest.mark.parametrize("collective", HALVES)
def test_gathers_in_two_levels_are_right_for_1_to_64_ranks(collective: str) -> None:
    for p in (*range(1, 17), 30, 63, 64):
        for nodes in even_layouts(p):
            algorithm = HIERARCHICAL[collective](nodes)
            assert algorithm.volume is not None
            verify_algorithm(algorithm, collective, p)


@pytest.mark.parametrize("collective", HALVES)
def test_a_wrong_own_block_is_refused(collective: str) -> None:
    wrong = HIERARCHICAL[collective]([0, 1, 0, 1])._replace(own_blocks=None)
    with pytest.raises(ScheduleError, match=f"{collective}, p=4: "):
        verify_algorithm(wrong, collective, 4)


def run_one(transport: ThreadTransport, algorithm: Algorithm, vector: Any) -> None:
    """Run a schedule on equal blocks."""
    cuts = np.arange(transport.size + 1) * (vector.size // transport.size)
    bind(algorithm.steps(transport.rank, transport.size), vector, cuts, transport, np.add)()


@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
def test_a_gather_in_two_levels_is_a_flat_gather(nodes: list[int]) -> None:
    p, algorithm = len(nodes), build_allgather(nodes)
    for length in (0, 1, p - 1, p, p + 1, 1000):
        want = pad(np.arange(length, dtype="i8") + 1, p)

        def gather(transport: ThreadTransport, want: Any = want) -> Any:
            blocks = np.full_like(want, -1)
            blocks[algorithm.own_blocks(p)[transport.rank]] = want[transport.rank]
            run_one(transport, algorithm, blocks.reshape(-1))
            return blocks[algorithm.own_blocks(p)]

        assert all(np.array_equal(found, want) for found in run_on_threads(p, gather))


@pytest.mark.parametrize("nodes", LAYOUTS, ids=str)
def test_a_reduce_scatter_in_two_levels_is_a_flat_one(nodes: list[int]) -> None:
    p, algorithm = len(nodes), build_reduce_scatter(nodes)
    for length in (0, 1, p - 1, p, p + 1, 1000):
        mine = [pad((rank + 1) * 100 + np.arange(length) % 97, p) for rank in range(p)]

        def reduce(transport: ThreadTransport, mine: Any = mine) -> Any:
            blocks = np.empty_like(mine[transport.rank])
            blocks[algorithm.own_blocks(p)] = mine[transport.rank]
            run_one(transport, algorithm, blocks.reshape(-1))
            return blocks[algorithm.own_blocks(p)[transport.rank]]

        found = run_on_threads(p, reduce)
        assert np.array_equal(np.array(found), sum(mine))


@pytest.mark.parametrize(("p", "k"), [(4, 2), (6, 3), (6, 2), (8, 4), (16, 8)])
@pytest.mark.parametrize("collective", HALVES)
def test_a_node_receives_only_the_blocks_of_other_nodes(collective: str, p: int, k: int) -> None:
    """(p-k)/p of the vector enters a node, counted by message; with a flat ring (p-1)/p."""
    home = np.arange(p) // k

    def entering(algorithm: Algorithm) -> list[int]:
        found = np.zeros(p // k, dtype=int)
        for step in without_node_steps(algorithm.steps(np.arange(p), p), np.arange(p)):
            crosses = (np.asarray(step.source) >= 0) & (home[np.asarray(step.source)] != home)
            np.add.at(found, home, np.where(crosses, step.recv[1] - step.recv[0], 0))
        return found.tolist()

    assert entering(HIERARCHICAL[collective](home)) == [p - k] * (p // k)
    assert entering(ALGORITHMS[collective]["ring"]) == [p - 1] * (p // k)


P3DN = Machine(Link(5.0, 1e-3 / 120), Link(20.0, 1e-3 / 10), 0.0, "p3dn.24xlarge: 8 V100, 100 Gbit/s")
P4D = Machine(Link(5.0, 1e-3 / 230), Link(20.0, 1e-3 / 40), 0.0, "p4d.24xlarge: 8 A100, 400 Gbit/s")


@pytest.mark.parametrize("machine", [P3DN, P4D], ids=["p3dn", "p4d"])
@pytest.mark.parametrize("nbytes", [32e6, 1e9])
@pytest.mark.parametrize("nodes", [2, 8, 64])
def test_the_price_is_the_formula(machine: Machine, nbytes: float, nodes: int) -> None:
    """(m-1) α_e + (m-1)/m n/B_node + m α_i + (k-1)/k n/B_i; the flat ring (p-1) α_e + (p-1)/p n/B_node."""
    k, home = 8, np.arange(8 * nodes) // 8
    inter, intra = machine.inter, machine.intra
    wanted = (nodes - 1) * (inter.alpha + nbytes / nodes * inter.beta)
    wanted += nodes * intra.alpha + (k - 1) / k * nbytes * intra.beta
    flat = (8 * nodes - 1) * (inter.alpha + nbytes / (8 * nodes) * inter.beta)
    assert price(build_allgather(home), home, nbytes, machine).us == pytest.approx(wanted, rel=1e-9)
    assert price(build_reduce_scatter(home), home, nbytes, machine).us == pytest.approx(wanted, rel=1e-9)
    assert price(ALGORITHMS["allgather"]["ring"], home, nbytes, machine).us == pytest.approx(flat, rel=1e-9)


def test_hierarchical_is_predicted_on_several_nodes() -> None:
    """On Ethernet links it is cheaper than the flat ring at every size."""
    for collective in HALVES:
        assert "hierarchical" not in {each.algorithm for each in predict(collective, 1, 4, 1e6)}
        for nbytes in (8, 1e4, 1e6, 1e9):
            found = {each.algorithm: each.us for each in predict(collective, 4, 2, nbytes)}
            assert found["hierarchical"] < found["ring"]


def uneven_layouts(p: int) -> Iterator[list[int]]:
    """Layouts with one rank alone on a node, with one node that has most ranks, and random ones."""
    yield [0] + [1] * (p - 1)
    yield [1 if r == p // 2 else 0 for r in range(p)]
    yield [r % 3 if r < p - 2 else 0 for r in range(p)]
    yield np.random.default_rng(p).integers(0, 3, p).tolist()


@pytest.mark.parametrize("collective", HALVES)
def test_nodes_may_have_different_numbers_of_ranks(collective: str) -> None:
    for p in (*range(2, 14), 30, 63):
        for nodes in uneven_layouts(p):
            verify_algorithm(HIERARCHICAL[collective](nodes), collective, p)


@pytest.mark.slow
def test_verify_plot_and_predict_accept_hierarchical(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "hierarchical", "--size", "1:9"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == list(HIERARCHICAL)
    assert main(["plot", "hierarchical", "--collective", "allgather", "--size", "4"]) == 0
    assert "allgather, hierarchical, 4 ranks, 4 blocks" in capsys.readouterr().out
    assert main(["predict", "allgather", "--nodes", "4", "--per-node", "2"]) == 0
    assert "hierarchical" in capsys.readouterr().out
