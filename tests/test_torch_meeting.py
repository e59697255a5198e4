"""Rank 0 before a group of torch is made: which messages it sends for which it gets, in any order."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from hpccomm.torch import meeting
from hpccomm.torch.meeting import ABSENT, ASK, BACK, COME, GONE, HAS_GONE, HERE, NEVER_CAME, SURE, Arrivals, Place


class Ranks:
    """Three ranks, of which rank 0 is here; messages are only noted."""

    size = 3


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rank and the kind of each message."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(meeting, "post", lambda place, rank, kind, *_: found.append((rank, kind)))
    return found


ROUNDS = [
    ("all come", [(1, COME, 0), (2, COME, 0), (1, SURE, 1), (2, SURE, 1)], [(1, ASK), (2, ASK)], True),
    ("one is missing", [(1, COME, 0)], [], False),
    ("one goes and comes again", [(1, COME, 0), (1, GONE, 0), (2, COME, 0), (1, COME, 0)], [(2, ASK), (1, ASK)], False),
    (
        "one goes after the question",
        [(1, COME, 0), (2, COME, 0), (1, SURE, 1), (2, GONE, 0)],
        [(1, ASK), (2, ASK), (1, BACK)],
        False,
    ),
    (
        "an old answer counts for nothing",
        [(1, COME, 0), (2, COME, 0), (2, GONE, 0), (2, COME, 0), (1, SURE, 1), (2, SURE, 2)],
        [(1, ASK), (2, ASK), (1, BACK), (1, ASK), (2, ASK)],
        False,
    ),
]


@pytest.mark.parametrize(("what", "messages", "answers", "complete"), ROUNDS)
def test_rank_0_asks_when_all_are_here_and_takes_it_back_when_one_goes(
    sent: list[tuple[int, int]], what: str, messages: Any, answers: Any, complete: bool
) -> None:
    arrivals, first = Arrivals(Place(Ranks, 0)), 0
    for rank, kind, round_ in messages:
        asked = arrivals.take(rank, kind, 1, round_ + first - 1 if round_ else 0)
        first = first or (asked and arrivals.round) or 0
    assert sent == answers
    assert arrivals.is_complete == complete


def test_the_missing_ranks_are_those_that_have_gone_and_those_that_never_came(sent: list[tuple[int, int]]) -> None:
    arrivals = Arrivals(Place(Ranks, 0))
    arrivals.take(1, COME, 1, 0)
    assert arrivals.marks().tolist() == [HERE, HERE, NEVER_CAME]
    arrivals.take(2, COME, 1, 0)
    arrivals.take(2, GONE, 1, 0)
    assert arrivals.give_up().tolist() == [HERE, HERE, HAS_GONE]
    assert sent[-1] == (1, ABSENT)
