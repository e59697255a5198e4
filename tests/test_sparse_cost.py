"""Prices of compressed exchanges: the formulas on unshared links, and the effect of sharing a link."""

from __future__ import annotations

import pytest

from hpccomm.__main__ import main
from hpccomm.layout import Link
from hpccomm.performance import sparse_cost
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
    assert main(words.split()) == 1
    assert remedy in capsys.readouterr().err
