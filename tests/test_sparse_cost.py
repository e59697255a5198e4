"""Prices of compressed exchanges: the formulas on unshared links, and the effect of sharing a link."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpccomm.__main__ import main
from hpccomm.algorithms.message_paths import choose_path, elements_in, is_worth_messages
from hpccomm.collectives.compressed.prices import COLLECTIVES, Place, node_phases, path_phases, place_of, price_phases
from hpccomm.layout import SHARED_MEMORY, Layout, Link
from hpccomm.performance import sparse_cost
from hpccomm.performance.cost import predict
from hpccomm.performance.machine import Machine

NBYTES = 64 * 2**20
BANDWIDTH_ONLY = Machine(Link(0, 0), Link(0, 1e-3), 0, "a test")


def price_by_name(nodes: int, per_node: int, density: float, machine: Machine = BANDWIDTH_ONLY) -> dict[str, float]:
    return {each.algorithm: each.us for each in sparse_cost.predictions(nodes, per_node, NBYTES, density, machine)}


@pytest.mark.parametrize("p", [2, 3, 5, 8])
@pytest.mark.parametrize("density", [0.001, 0.1])
def test_on_nodes_of_one_rank_prices_equal_the_formulas(p: int, density: float) -> None:
    n, found, header = NBYTES / 4, price_by_name(p, 1, density), sparse_cost.HEADERS
    assert found["sparse"] == pytest.approx((p - 1) * (header + 8 * density * n) * 1e-3)
    assert found["words"] == pytest.approx((p - 1) * (header + 4 * density * n) * 1e-3)
    assert found["onebit"] == pytest.approx((p - 1) * (header + n / 8) * 1e-3)
    assert found["onebit_phases"] == pytest.approx(2 * (p - 1) * (header + n / 8 / p) * 1e-3)


def test_ranks_of_a_node_share_its_link() -> None:
    found = price_by_name(4, 2, 0.001)
    n, header = NBYTES / 4, sparse_cost.HEADERS
    # each of two ranks sends six blocks to other nodes; then six blocks of other nodes enter a node
    assert found["onebit_phases"] == pytest.approx((12 + 6) * (header + n / 64) * 1e-3)
    assert found["onebit_phases + node"] < found["onebit_phases"]


@pytest.mark.parametrize("p", [2, 3, 5, 8, 32])
def test_sparse_pays_below_a_density_of_1_over_p(p: int) -> None:
    assert sparse_cost.break_even(p, 1, NBYTES, BANDWIDTH_ONLY) == pytest.approx(1 / p, rel=0.02)


def test_sparse_always_pays_where_bytes_cost_nothing() -> None:
    assert sparse_cost.break_even(1, 1, NBYTES, BANDWIDTH_ONLY) == 1.0
    slow_to_start = Machine(Link(0, 0), Link(1e6, 0), 0, "a test")
    assert sparse_cost.break_even(4, 1, NBYTES, slow_to_start) == 1.0


def test_predict_prints_compressed_exchanges(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--nodes", "4", "--per-node", "2", "--bytes", "64Mi", "--rate", "1gbit"]
    assert main(["predict", "allreduce", *place, "--density", "0.001"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [each.split()[0] for each in lines]
    assert {"hierarchical", "sparse", "words", "split", "onebit", "onebit_phases"} <= set(names)
    assert "at density 0.1" in lines[-1]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("predict bcast --density 0.1", "priced for allreduce only"),
        ("predict allreduce --density 0", "pass a number above 0"),
    ],
)
def test_impossible_densities_are_refused(words: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert remedy in capsys.readouterr().err


# One model: what is predicted is what is chosen


class Ranks:
    """What a choice at run time knows of its communicator."""

    def __init__(self, nodes: int, per_node: int, machine: Machine) -> None:
        home = np.repeat(np.arange(nodes), per_node)
        self.size, self.machine = home.size, machine
        self.layout = Layout(home, tuple(map(str, range(nodes))))


SHAPES = [(1, 2), (1, 8), (2, 1), (4, 2), (16, 1), (8, 4), (128, 8), (1000, 1)]
MACHINES = [
    Machine(),
    BANDWIDTH_ONLY,
    Machine(inter=Link(25.0, 8.4e-2)),
    Machine(Link(0.5, 1e-5), Link(2.0, 4e-5), 1e-5, "400 Gbit/s"),
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_methods_choose_by_the_prices_that_are_predicted(shape: tuple[int, int], machine: Machine) -> None:
    comm = Ranks(*shape, machine)
    assert place_of(comm) == sparse_cost.place_on(*shape, machine)
    n = 25_000_000
    for density in (1e-4, 0.001, 0.01, 0.1, 0.5):
        for width in (4, 8):
            nbytes = sparse_cost.HEADERS + width * density * n
            predicted = sparse_cost.choose_row(*shape, 4 * n, density, width, machine)
            assert choose_path(comm, n, nbytes, density * n) == predicted.algorithm
            paths = path_phases(n, density * n, nbytes, place_of(comm))
            least = min(price_phases(each, place_of(comm)).us for each in paths.values())
            assert predicted.us <= 1.1 * least
        dense = sparse_cost.choose_row(*shape, 4 * n, density, 8, machine).algorithm == "dense"
        assert is_worth_messages(comm, n, density, "auto") != dense


@pytest.mark.parametrize(("method", "row", "width"), [("DGC", "sparse", 8), ("GTC", "words", 4)])
def test_on_128_nodes_the_methods_own_exchange_is_within_a_tenth_of_the_best(method: str, row: str, width: int) -> None:
    """100 MB, density 0.1 %, 8 ranks a node: the best exchange of such messages is dense inside the nodes."""
    found = {each.algorithm: each.us for each in sparse_cost.predictions(128, 8, 1e8, 0.001)}
    best = min(found[name] for name in (row, f"{row} + node", "split", "split + node", "recursive_doubling", "node"))
    own = sparse_cost.choose_row(128, 8, 1e8, 0.001, width, Machine())
    assert own.us <= 1.1 * best
    assert own.algorithm == "leaders"
    assert sparse_cost.MESSAGES[method] == (row, width)
    assert own.us < 0.5 * sparse_cost.dense_cost(128, 8, 1e8, Machine())


@pytest.mark.parametrize("collective", ["allreduce", "allgather"])
@pytest.mark.parametrize("shape", [(2, 1), (4, 1), (16, 1), (4, 2), (16, 8), (128, 8), (1, 4), (1, 16)], ids=str)
def test_closed_forms_follow_the_simulated_schedules(collective: str, shape: tuple[int, int]) -> None:
    """From 1 MB a rank on, where bytes decide: never more than 15 % above the best schedule, a third below."""
    for nbytes in (2**20, 2**26):
        whole = nbytes * (shape[0] * shape[1] if collective == "allgather" else 1)
        closed = COLLECTIVES[collective](Place(*shape), nbytes).us
        assert 0.66 < closed / predict(collective, *shape, whole)[0].us < 1.15


def test_quantised_exchanges_are_predicted() -> None:
    """Two phases of blocks: 8 bits and a scale for 256 elements, 4 bits and one for 128."""
    found, n = price_by_name(4, 1, 0.001), NBYTES / 4
    for name, octets in (("int8", 1 + 4 / 256), ("mx", 1 + 1 / 32), ("int4", 0.5 + 4 / 128)):
        assert found[name] == pytest.approx(2 * 3 * (sparse_cost.HEADERS + octets * n / 4) * 1e-3)
    assert found["int8"] < 0.3 * sparse_cost.dense_cost(4, 1, NBYTES, BANDWIDTH_ONLY)


CHOSEN = [
    (4, 1, 1 << 24, 4, "allgather"),
    (4, 1, 1 << 24, 8, "allgather"),
    (4, 2, 1 << 24, 4, "node"),
    (4, 2, 1 << 24, 8, "node"),
    (8, 2, 1 << 22, 4, "node"),
    (16, 8, 1 << 22, 8, "leaders"),
]
"""Nodes, ranks on each, elements, bytes of an element in a message of 0.1 %, path."""


@pytest.mark.parametrize(
    ("intra", "inter"),
    [(SHARED_MEMORY, Link(25.0, 0.084)), (SHARED_MEMORY, Link(25.0, 0.112)), (Link(0.0, 0.0), Link(3000.0, 0.1))],
    ids=["nominal", "fitted on a busy machine", "fitted without shared memory"],
)
@pytest.mark.parametrize(("nodes", "per_node", "n", "width", "path"), CHOSEN)
def test_at_100_mbit_whole_vectors_are_added_in_nodes_only_where_that_saves_more_than_it_costs(
    nodes: int, per_node: int, n: int, width: int, path: str, intra: Link, inter: Link
) -> None:
    comm = Ranks(nodes, per_node, Machine(intra, inter))
    assert choose_path(comm, n, round(width * 0.001 * n), round(0.001 * n)) == path


def test_on_uneven_nodes_no_messages_are_passed_on() -> None:
    assert "forward" in node_phases(1e6, 1e3, 8e3, Place(4, 2))
    assert "forward" not in node_phases(1e6, 1e3, 8e3, Place(4, 2, counted=7))


def test_a_message_says_about_how_many_elements_it_names() -> None:
    from hpccomm import onebit, randomk, threshold, topk

    kinds: dict[Any, int] = {topk(0.1): 8, threshold(0.1): 4, randomk(0.1): 4}
    for compressor, width in kinds.items():
        assert elements_in(800, compressor.kinds, 10_000) == 800 // width
        assert elements_in(800, compressor.kinds, 50) == 50
    assert elements_in(800, onebit().kinds, 6400) == 6400


def test_predict_prints_what_the_methods_choose(capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--nodes", "128", "--per-node", "8", "--bytes", "100M"]
    assert main(["predict", "allreduce", *place, "--density", "0.001"]) == 0
    lines = capsys.readouterr().out
    assert '# DGC, exchange="auto": leaders, ' in lines
    assert '# GTC, exchange="auto": leaders, ' in lines
    assert {"int8", "mx", "node", "sparse"} <= {each.split()[0] for each in lines.splitlines()}
