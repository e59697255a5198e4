"""Collectives of messages that differ in length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpccomm.collectives import sparse
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks

SIZES = (1, 2, 3, 5, 7, 8)


def letter(rank: int) -> np.ndarray:
    """Bytes that differ per rank and position; rank 1 has nothing to say."""
    return ((np.arange(0 if rank == 1 else 5 * rank + 3) + 17 * rank) % 256).astype(np.uint8)


def assert_letters(got: list[np.ndarray], size: int) -> None:
    assert len(got) == size
    for rank, each in enumerate(got):
        assert each.dtype == np.uint8
        np.testing.assert_array_equal(each, letter(rank))


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_gets_every_message_in_rank_order(size: int) -> None:
    for got in run_on_ranks(size, lambda comm: sparse.gather_messages(comm, letter(comm.rank))):
        assert_letters(got, size)


def test_messages_of_nothing_are_gathered() -> None:
    for got in run_on_ranks(3, lambda comm: sparse.gather_messages(comm, np.empty(0, np.uint8))):
        assert [each.size for each in got] == [0, 0, 0]


def test_messages_longer_together_than_one_call_takes_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "LONGEST", 10)
    for got in run_on_ranks(3, lambda comm: sparse.gather_messages(comm, letter(comm.rank))):
        assert_letters(got, 3)


def test_a_message_that_is_none_is_refused_on_every_rank() -> None:
    def bring(comm: Any) -> str:
        with pytest.raises(ArgumentError) as refused:
            sparse.gather_messages(comm, np.zeros(4, np.float32 if comm.rank == 2 else np.uint8))
        return str(refused.value)

    assert all("rank 2 brings no flat uint8" in text for text in run_on_ranks(3, bring))


def test_messages_are_gathered_over_mpi(comm: Any) -> None:
    assert_letters(sparse.gather_messages(comm, letter(comm.rank)), comm.size)
