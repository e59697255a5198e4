"""Inputs that collectives are checked with: sums are exact in any order; ranks, calls and positions differ."""

from __future__ import annotations

import numpy as np
import pytest

from hpccomm.bench.inputs import ALL_RANKS, MODULI, NO_RANK, PERIOD, POISON, VARIANTS, Block, Inputs

DENSE = [("f4", 2), ("f4", 7), ("f4", 256), ("f4", 1000), ("f8", 3), ("i4", 64), ("i1", 2), ("i1", 4), ("i1", 10)]
"""Datatypes and numbers of ranks where every rank holds a number at every position."""
SPARSE = [("i1", 11), ("i1", 64), ("i1", 300)]


def all_ranks(inputs: Inputs, first: int, length: int) -> np.ndarray:
    return np.array([inputs.block(Block(rank, first, length), 0) for rank in range(inputs.ranks)])


@pytest.mark.parametrize(("modulus", "root"), MODULI)
def test_the_roots_are_primitive(modulus: int, root: int) -> None:
    assert len({pow(root, k, modulus) for k in range(1, modulus)}) == modulus - 1


@pytest.mark.parametrize(("dtype", "ranks"), DENSE)
def test_at_every_position_all_ranks_hold_different_numbers(dtype: str, ranks: int) -> None:
    inputs = Inputs(ranks, np.dtype(dtype))
    assert inputs.sparsity == 1
    for first in (0, 12345, PERIOD - 8):
        table = all_ranks(inputs, first, 16)
        assert (np.diff(np.sort(table, axis=0), axis=0) > 0).all()
        assert (table > 0).all()


@pytest.mark.parametrize(("dtype", "ranks"), DENSE + SPARSE)
def test_sums_are_exact_in_every_order(dtype: str, ranks: int) -> None:
    inputs = Inputs(ranks, np.dtype(dtype))
    table = all_ranks(inputs, 99, 300)
    want = inputs.block(Block(ALL_RANKS, 99, 300), 0)
    exact = table.astype("f8").sum(axis=0)
    assert want.dtype == table.dtype == np.dtype(dtype)
    assert (exact <= inputs.max_exact_integer).all()
    for order in (slice(None), slice(None, None, -1), np.random.default_rng(1).permutation(ranks)):
        total = np.zeros(300, dtype)
        for row in table[order]:
            total += row
        np.testing.assert_array_equal(total, want)
    np.testing.assert_array_equal(exact, want.astype("f8"))


@pytest.mark.parametrize(("dtype", "ranks"), SPARSE)
def test_where_bytes_are_too_small_every_rank_holds_a_number_at_every_kth_position(dtype: str, ranks: int) -> None:
    inputs = Inputs(ranks, np.dtype(dtype))
    table = all_ranks(inputs, 0, 3 * inputs.sparsity)
    assert ((table > 0).sum(axis=1) == 3).all()
    assert len({row.tobytes() for row in table}) == ranks


def test_no_two_ranks_are_alike_beyond_the_powers_of_a_root() -> None:
    inputs = Inputs(5000, np.dtype("f4"))
    assert inputs.modulus[0] < inputs.ranks
    assert len({inputs.block(Block(rank, 0, 8), 0).tobytes() for rank in range(5000)}) == 5000


def test_errors_of_several_ranks_do_not_cancel() -> None:
    table = all_ranks(Inputs(4, np.dtype("f4")), 0, 1000)
    assert (2 * table[0] + 2 * table[3] != table.sum(axis=0)).mean() > 0.99


def test_consecutive_calls_have_different_inputs() -> None:
    inputs = Inputs(3, np.dtype("i4"))
    block = Block(1, 5, 100)
    turns = [inputs.block(block, variant) for variant in range(VARIANTS)]
    for k in range(VARIANTS):
        assert (turns[k] != turns[(k + 1) % VARIANTS]).mean() > 0.95


@pytest.mark.parametrize("origin", [0, 2, ALL_RANKS])
def test_a_block_continues_where_the_one_before_it_ends(origin: int) -> None:
    inputs = Inputs(3, np.dtype("f4"))
    whole = inputs.block(Block(origin, 7, 2 * PERIOD), 1)
    for first in (1, 1000, PERIOD - 1, PERIOD + 5):
        part = inputs.block(Block(origin, 7 + first, 50), 1)
        np.testing.assert_array_equal(part, whole[first : first + 50])


def test_blocks_are_concatenated_and_those_without_a_rank_are_poison() -> None:
    inputs = Inputs(2, np.dtype("f4"))
    made = inputs.content((Block(NO_RANK, 0, 2), Block(1, 0, 3), Block(0, 4, 0)), 0)
    np.testing.assert_array_equal(made[:2], [POISON, POISON])
    np.testing.assert_array_equal(made[2:], inputs.block(Block(1, 0, 3), 0))
    assert inputs.content((), 0).size == 0
