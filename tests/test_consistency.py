"""Ranks that call different things find out, name each other, and say what to do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hpccomm.calls import consistency
from hpccomm.calls.consistency import ConsistencyTable
from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint, decode, first_difference, mismatch_message
from hpccomm.errors import MismatchError

SUM = Fingerprint("Allreduce", "sum", "8", "float32", "", "C", "")


@pytest.fixture
def node() -> Iterator[Callable[[int], list[ConsistencyTable]]]:
    """A table of p ranks; closed afterwards, or the watchdog would end a rank that is left inside a call."""
    made: list[ConsistencyTable] = []

    def table(p: int) -> list[ConsistencyTable]:
        memory = bytearray(consistency.bytes_needed(p))
        made.extend(ConsistencyTable(memory, tuple(range(p)), me) for me in range(p))
        return made

    yield table
    for roll in made:
        roll.close()


Table = Callable[[int], list[ConsistencyTable]]


def test_equal_calls_pass_in_any_order(node: Table) -> None:
    rolls = node(3)
    words = [roll.announce(SUM) for roll in rolls]
    for _ in range(200):
        for roll, word in zip(rolls, words, strict=True):
            roll.enter(word)
        for roll, word in zip(rolls, words, strict=True):
            roll.leave(word)


@pytest.mark.parametrize(
    ("changed", "remedy"),
    [
        ({"dtype": "float64"}, "cast before the call"),
        ({"count": "9"}, "counts the same"),
        ({"op": "max"}, "same operation"),
        ({"order": "F"}, "ascontiguousarray"),
        ({"algorithm": "ring"}, "same algorithm"),
        ({"collective": "Bcast", "root": "0"}, "same collective"),
    ],
)
def test_whoever_comes_late_names_the_ranks_the_calls_and_the_remedy(
    node: Table, changed: dict[str, str], remedy: str
) -> None:
    rolls = node(3)
    for roll in rolls[:2]:
        roll.enter(roll.announce(SUM))
    odd = rolls[2].announce(SUM._replace(**changed))
    with pytest.raises(MismatchError, match=remedy) as error:
        rolls[2].enter(odd)
    assert "ranks 0, 1 called Allreduce(sum, 8 float32" in str(error.value)
    assert "rank 2 called" in str(error.value)


def test_whoever_came_early_finds_out_on_leaving(node: Table) -> None:
    early, late = node(2)
    word = early.announce(SUM)
    early.enter(word)
    with pytest.raises(MismatchError):
        late.enter(late.announce(SUM._replace(count="4")))
    with pytest.raises(MismatchError, match="rank 1 called"):
        early.leave(word)


def test_all_ranks_raise_when_they_wait_for_each_other(node: Table) -> None:
    rolls = node(4)
    errors: list[Any] = [None] * 4

    def body(me: int) -> None:
        roll = rolls[me]
        word = roll.announce(SUM if me != 1 else SUM._replace(dtype="int32"))
        try:
            roll.enter(word)
            roll.wait()
        except MismatchError as error:
            errors[me] = str(error)

    threads = [threading.Thread(target=body, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all("rank 1" in error for error in errors)


def test_words_that_nobody_can_compare_are_no_mismatch(node: Table) -> None:
    one, two = node(2)
    one.enter(one.announce(SUM))
    two.enter(two.announce(SUM._replace(count=UNKNOWN, dtype=UNKNOWN, order=UNKNOWN)))


def test_a_rank_that_has_left_makes_a_call_hopeless(node: Table) -> None:
    here, gone = node(2)
    here.enter(here.announce(SUM))
    assert here.deadlock_reason() is None
    gone.mark_left()
    assert "rank 1 has left the program" in str(here.deadlock_reason())


def test_missing_ranks_are_those_that_have_not_come(node: Table) -> None:
    rolls = node(3)
    for me in (0, 2):
        rolls[me].enter(rolls[me].announce(SUM))
    assert rolls[0].missing_ranks() == [1]
    assert rolls[0].describe_call() == "Allreduce(sum, 8 float32) (call 1)"


def test_a_rank_far_ahead_is_not_compared(node: Table) -> None:
    ahead, behind = node(2)
    word = ahead.announce(SUM)
    for _ in range(consistency.CALLS + 3):
        ahead.enter(word)
    behind.enter(behind.announce(SUM._replace(count="4")))


def test_a_signature_survives_the_table() -> None:
    assert decode(SUM.encode()) == SUM
    assert 0 <= SUM.digest < 2**28


def test_signatures_differ_in_one_named_word() -> None:
    assert first_difference(SUM, SUM) is None
    assert first_difference(SUM, SUM._replace(op="max")) == "op"


def test_a_complaint_groups_ranks_by_call() -> None:
    text = mismatch_message({0: SUM, 1: SUM, 2: SUM._replace(dtype="int32"), 3: None}, 0)
    assert text == (
        "ranks 0, 1 called Allreduce(sum, 8 float32), rank 2 called Allreduce(sum, 8 int32), "
        "rank 3 called something else: cast before the call (noticed by rank 0)"
    )
