"""The price of a schedule equals the textbook's formula where there is one, and a slow simulation elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest

from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.collectives.schedule import power_of_two
from hpccomm.collectives.verify import layouts
from hpccomm.layout import Link
from hpccomm.performance import cost
from hpccomm.performance.cost import Price, candidates, predict, price, segment_counts, wire_limit
from hpccomm.performance.machine import Machine

ALPHA, BETA, GAMMA = 3.0, 7e-4, 1.1e-4
FLAT = Machine(Link(ALPHA, BETA), Link(50.0, 1e-2), GAMMA, "test")
TWO_LEVEL = Machine(Link(1.0, 1e-4), Link(20.0, 1e-3), 5e-5, "test")
EVERY = [(collective, name) for collective, names in ALGORITHMS.items() for name in names]

Formula = Callable[[int, float], float]


def lg(p: int) -> int:
    return (p - 1).bit_length()


def share(p: int, n: float) -> float:
    return (p - 1) / p * n


def exchange_us(rounds: float, nbytes: float, summed: float) -> float:
    return rounds * ALPHA + nbytes * BETA + summed * GAMMA


ANY_SIZE: dict[tuple[str, str], Formula] = {
    ("reduce_scatter", "ring"): lambda p, n: exchange_us(p - 1, share(p, n), share(p, n)),
    ("reduce_scatter", "direct"): lambda p, n: exchange_us(p - 1, share(p, n), share(p, n)),
    ("allgather", "ring"): lambda p, n: exchange_us(p - 1, share(p, n), 0),
    ("allgather", "direct"): lambda p, n: exchange_us(p - 1, share(p, n), 0),
    ("allgather", "bruck"): lambda p, n: exchange_us(lg(p), share(p, n), 0),
    ("allreduce", "ring"): lambda p, n: exchange_us(2 * (p - 1), 2 * share(p, n), share(p, n)),
    ("bcast", "tree"): lambda p, n: exchange_us(lg(p), lg(p) * n, 0),
    ("bcast", "chain"): lambda p, n: exchange_us(p - 1, (p - 1) * n, 0),
    ("reduce", "tree"): lambda p, n: exchange_us(lg(p), lg(p) * n, lg(p) * n),
    ("reduce", "chain"): lambda p, n: exchange_us(p - 1, (p - 1) * n, (p - 1) * n),
    ("allreduce", "tree"): lambda p, n: exchange_us(2 * lg(p), 2 * lg(p) * n, lg(p) * n),
}
POWER_OF_TWO: dict[tuple[str, str], Formula] = {
    ("allreduce", "doubling"): lambda p, n: exchange_us(lg(p), lg(p) * n, lg(p) * n),
    ("allreduce", "butterfly"): lambda p, n: exchange_us(2 * lg(p), 2 * share(p, n), share(p, n)),
    ("reduce_scatter", "butterfly"): lambda p, n: exchange_us(lg(p), share(p, n), share(p, n)),
    ("allgather", "butterfly"): lambda p, n: exchange_us(lg(p), share(p, n), 0),
    ("bcast", "ring"): lambda p, n: exchange_us(lg(p) + p - 1, 2 * share(p, n), 0),
}


def one_node_price(key: tuple[str, str], p: int, n: float, segments: int | None = 1) -> Price:
    return price(ALGORITHMS[key[0]][key[1]], [0] * p, n, FLAT, segments=segments)


@pytest.mark.parametrize("key", ANY_SIZE)
@pytest.mark.parametrize("p", [1, 2, 3, 7, 8, 16, 61])
@pytest.mark.parametrize("n", [8.0, 1e8])
def test_price_is_the_formula_for_any_size(key: tuple[str, str], p: int, n: float) -> None:
    assert one_node_price(key, p, n).us == pytest.approx(ANY_SIZE[key](p, n), rel=1e-9)


@pytest.mark.parametrize("key", POWER_OF_TWO)
@pytest.mark.parametrize("p", [2, 4, 8, 64, 1024])
@pytest.mark.parametrize("n", [8.0, 1e8])
def test_price_is_the_formula_for_powers_of_two(key: tuple[str, str], p: int, n: float) -> None:
    assert one_node_price(key, p, n).us == pytest.approx(POWER_OF_TWO[key](p, n), rel=1e-9)


@pytest.mark.parametrize("p", [3, 5, 7, 12, 63])
def test_a_folded_butterfly_pays_the_whole_vector_twice_more(p: int) -> None:
    s, n = power_of_two(p), 1e6
    folded = exchange_us(2 * lg(s) + 2, 2 * share(s, n) + 2 * n, share(s, n) + n)
    assert one_node_price(("allreduce", "butterfly"), p, n).us == pytest.approx(folded, rel=1e-9)


@pytest.mark.parametrize("p", [3, 8, 33])
@pytest.mark.parametrize("segments", [1, 2, 64])
def test_a_chain_in_s_segments_takes_p_minus_2_plus_s_steps(p: int, segments: int) -> None:
    n = 1e7
    formula = (p - 2 + segments) * (ALPHA + n / segments * BETA)
    assert one_node_price(("bcast", "chain"), p, n, segments).us == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize("p", [4, 16, 100])
def test_the_number_of_segments_is_near_the_best(p: int) -> None:
    n = 1e7
    best = (math.sqrt((p - 2) * ALPHA) + math.sqrt(n * BETA)) ** 2
    found = one_node_price(("bcast", "chain"), p, n, None)
    assert found.segments > 1
    assert best <= found.us < 1.07 * best


def test_a_double_tree_in_segments_costs_two_vectors() -> None:
    n = 1e9
    found = one_node_price(("allreduce", "double_tree"), 64, n, None)
    assert found.us == pytest.approx(2 * n * (BETA + GAMMA / 2), rel=0.15)
    assert found.us < one_node_price(("allreduce", "tree"), 64, n, None).us / 2


def test_ranks_of_a_node_share_its_link() -> None:
    """Recursive doubling on 2 x 4 ranks: two rounds inside, then all four send at once."""
    n, inside, between = 1e6, TWO_LEVEL.intra, TWO_LEVEL.inter
    found = price(ALGORITHMS["allreduce"]["doubling"], [0] * 4 + [1] * 4, n, TWO_LEVEL)
    formula = 2 * (inside.alpha + n * inside.beta) + between.alpha + 4 * n * between.beta + 3 * n * TWO_LEVEL.gamma
    assert found.us == pytest.approx(formula, rel=1e-9)


@pytest.mark.parametrize(("nodes", "channels"), [(2, 2), (4, 8), (5, 3)])
def test_hierarchical_costs_two_meetings_inside_and_one_ring_between_on_all_channels(nodes: int, channels: int) -> None:
    n, m = 1e8, TWO_LEVEL
    home = np.repeat(np.arange(nodes), channels)
    inside = 2 * (m.intra.alpha + share(channels, n) * m.intra.beta) + share(channels, n) * m.gamma
    between = 2 * ((nodes - 1) * m.inter.alpha + share(nodes, n) * m.inter.beta)
    between += share(nodes, n / channels) * m.gamma
    assert price(hierarchical.build_allreduce(home), home, n, m).us == pytest.approx(inside + between, rel=1e-9)


@pytest.mark.parametrize(("collective", "name"), EVERY)
@pytest.mark.parametrize("layout", ["one node", "a node each", "block", "cyclic", "uneven"])
def test_simulating_one_period_equals_simulating_all_ranks(
    collective: str, name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = (1, 2, 4, 9, 12, 16)
    short = [price(ALGORITHMS[collective][name], layouts(p)[layout], 1e6, TWO_LEVEL) for p in sizes]
    monkeypatch.setattr(cost, "periods", lambda home: [home.size])
    for p, found in zip(sizes, short, strict=True):
        slow = price(ALGORITHMS[collective][name], layouts(p)[layout], 1e6, TWO_LEVEL)
        assert found.us == pytest.approx(slow.us, rel=1e-12)
        assert found[1:] == slow[1:]


def test_periods_are_found_for_block_and_cyclic_layouts() -> None:
    block, cyclic = np.repeat(np.arange(5), 3), np.tile(np.arange(5), 3)
    assert cost.periods(block) == [3, 15]
    assert cost.periods(cyclic) == [1, 15]
    assert cost.periods(np.zeros(8, dtype=np.int32)) == [1, 8]
    assert cost.periods(np.array([0, 1, 1, 1])) == [4]


@pytest.mark.parametrize(("collective", "name"), EVERY)
def test_the_price_equals_a_simulation_message_by_message(collective: str, name: str) -> None:
    """The oracle keeps a list of ready times and handles one message after the other."""
    for p in (3, 8, 11):
        for home in (layouts(p)["block"], layouts(p)["random"]):
            found = price(ALGORITHMS[collective][name], home, 1e5, TWO_LEVEL, segments=1)
            assert found.us == pytest.approx(simulate_us(collective, name, home, 1e5), rel=1e-9)


def simulate_us(collective: str, name: str, home: list[int], n: float) -> float:
    p, algorithm = len(home), ALGORITHMS[collective][name]
    block, ready = n / algorithm.blocks(p), [0.0] * p
    for steps in zip(*(algorithm.steps(r, p) for r in range(p)), strict=True):
        crossing = [(r, int(s.to)) for r, s in enumerate(steps) if s.to >= 0 and home[r] != home[int(s.to)]]
        before = list(ready)
        for r, s in enumerate(steps):
            if s.to < 0:
                continue
            d, nbytes = int(s.to), (s.send[1] - s.send[0]) * block
            link, sharers = TWO_LEVEL.intra, 1
            if home[r] != home[d]:
                link = TWO_LEVEL.inter
                sharers = max(
                    sum(home[a] == home[r] for a, _ in crossing), sum(home[b] == home[d] for _, b in crossing)
                )
            done = max(before[r], before[d]) + link.alpha + nbytes * link.beta * sharers
            ready[r] = max(ready[r], done)
            ready[d] = max(ready[d], done + nbytes * TWO_LEVEL.gamma * bool(s.reduce))
    return max(ready)


@pytest.mark.parametrize("collective", ALGORITHMS)
def test_no_prediction_is_below_the_least_time_of_the_link(collective: str) -> None:
    for nodes, per_node in ((1, 8), (8, 1), (4, 4)):
        for each in predict(collective, nodes, per_node, 1e8, TWO_LEVEL):
            assert 0 < each.wire <= 1 + 1e-9
            assert each.us >= wire_limit(collective, nodes, per_node, 1e8, TWO_LEVEL) * (1 - 1e-9)


def test_predictions_are_sorted_and_complete() -> None:
    found = predict("allreduce", 4, 4, 1e8, TWO_LEVEL)
    assert [each.us for each in found] == sorted(each.us for each in found)
    assert {each.algorithm for each in found} == {*ALGORITHMS["allreduce"], "hierarchical"}
    assert "hierarchical" not in candidates("allreduce", 1, 4)
    best = found[0]
    assert best.algbw == pytest.approx(1e8 / best.us / 1e3)
    assert best.busbw == pytest.approx(best.algbw * 2 * 15 / 16)


def test_only_chains_and_trees_are_cut_into_segments() -> None:
    assert segment_counts(ALGORITHMS["allreduce"]["ring"], 1e8) == [1]
    assert segment_counts(ALGORITHMS["bcast"]["chain"], 100) == [1]
    assert segment_counts(ALGORITHMS["bcast"]["chain"], 8192) == [1, 2, 4, 8]


@pytest.mark.slow
def test_pricing_ten_thousand_ranks_takes_under_20_seconds() -> None:
    limit = 20
    home, began = np.repeat(np.arange(1250), 8), time.process_time()
    for name in ("ring", "butterfly", "double_tree"):
        price(ALGORITHMS["allreduce"][name], home, 1e8)
    price(hierarchical.build_allreduce(home), home, 1e8)
    price(ALGORITHMS["bcast"]["chain"], home, 1e8)
    assert time.process_time() - began < limit
