"""Ranks that make different calls raise an error that names the ranks, their calls and a remedy."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest import mock

import pytest
from mpi4py import MPI

from hpccomm.calls import between_nodes, consistency
from hpccomm.calls.between_nodes import BetweenNodes
from hpccomm.calls.blocks import Amounts
from hpccomm.calls.consistency import ConsistencyTable, Gone
from hpccomm.calls.departures import Wire
from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint, decode, first_difference, mismatch_message
from hpccomm.calls.reports import Reports
from hpccomm.errors import MismatchError, TransportError
from hpccomm.kernels.entry.records import AMOUNT_CALLS, COUNTS, NOT_COMPARED
from hpccomm.transports.polling import await_request

SUM = Fingerprint("Allreduce", "sum", "8", "float32", "", "C", "")


@pytest.fixture
def node() -> Iterator[Callable[[int], list[ConsistencyTable]]]:
    """The tables of p ranks; closed afterwards, or the watchdog would abort a rank that is still in a call."""
    made: list[ConsistencyTable] = []

    def make_tables(p: int) -> list[ConsistencyTable]:
        memory = bytearray(consistency.bytes_needed(p))
        made.extend(ConsistencyTable(memory, tuple(range(p)), me) for me in range(p))
        return made

    yield make_tables
    for table in made:
        table.close()


MakeTables = Callable[[int], list[ConsistencyTable]]


def test_equal_calls_pass_in_any_order(node: MakeTables) -> None:
    tables = node(3)
    digests = [table.announce(SUM) for table in tables]
    for _ in range(200):
        for table, digest in zip(tables, digests, strict=True):
            table.enter(digest)
        for table in tables:
            table.leave()


def test_a_rank_that_is_on_its_way_to_the_barrier_of_the_same_call_is_not_elsewhere(node: MakeTables) -> None:
    """It has entered the call in the table, and a busy machine lets it wait for a core for seconds."""
    first, second = node(2)
    for table in (first, second):
        table.enter(table.announce(SUM))
    first.check_stall(SUM.word, 5.0, lambda: [1])
    first.leave()
    second.leave()
    first.enter(first.announce(SUM))
    second.begin(second.announce(SUM._replace(op="max")))
    with pytest.raises(MismatchError, match=r"rank 0 called Allreduce.sum, 8 float32., rank 1 called Allreduce.max"):
        first.check_stall(SUM.word, 5.0, lambda: [1])


def test_a_rank_on_its_way_to_the_barrier_may_spell_the_call_differently(node: MakeTables) -> None:
    """A derived datatype has no count that others could compare."""
    first, second = node(2)
    spelt = SUM._replace(count=UNKNOWN, order=UNKNOWN)
    first.enter(first.announce(SUM))
    second.begin(second.announce(spelt))
    first.check_stall(SUM.word, 5.0, lambda: [1])
    second.check_stall(spelt.word, 5.0, lambda: [0])


@pytest.mark.parametrize("calls", [1, 2 * consistency.CALLS])
def test_a_rank_that_has_made_other_calls_before_one_in_shared_memory_is_out_of_step(
    node: MakeTables, calls: int
) -> None:
    """It has left them, and comes to the call in which others wait: their order is different."""
    here, there = node(2)
    for _ in range(calls):
        there.begin(there.announce(SUM._replace(collective="Gather")))
        there.leave()
    here.announce(SUM)
    here.check_stall(SUM.word, 0.5, lambda: [1])
    other = r"Gather\(sum, 8 float32\)" if calls == 1 else "something else"
    with pytest.raises(MismatchError, match=rf"rank 0 called Allreduce\(sum, 8 float32\), rank 1 called {other}"):
        here.check_stall(SUM.word, 5.0, lambda: [1])
    here.check_stall(SUM.word, 5.0, lambda: [])  # it has come meanwhile


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
def test_a_later_rank_raises_with_the_ranks_the_calls_and_the_remedy(
    node: MakeTables, changed: dict[str, str], remedy: str
) -> None:
    tables = node(3)
    for table in tables[:2]:
        table.enter(table.announce(SUM))
    odd = tables[2].announce(SUM._replace(**changed))
    with pytest.raises(MismatchError, match=remedy) as error:
        tables[2].enter(odd)
    assert "ranks 0, 1 called Allreduce(sum, 8 float32" in str(error.value)
    assert "rank 2 called" in str(error.value)


def test_an_earlier_rank_raises_when_it_leaves(node: MakeTables) -> None:
    early, late = node(2)
    digest = early.announce(SUM)
    early.enter(digest)
    with pytest.raises(MismatchError):
        late.enter(late.announce(SUM._replace(count="4")))
    with pytest.raises(MismatchError, match="rank 1 called"):
        early.leave()


ROOT_0, ROOT_1 = (Fingerprint("Bcast", "", "8", "float64", root, "C") for root in "01")


def make_call(table: ConsistencyTable, call: Fingerprint, body: Callable[[], object] = lambda: None) -> str:
    """A call that waits for nobody; returns the error's sentence, if there is one."""
    try:
        with table.entered:
            table.enter(table.announce(call))
            body()
    except MismatchError as error:
        return str(error)
    return ""


def test_a_rank_that_has_completed_a_call_is_told_once_that_another_one_refuses_it(node: MakeTables) -> None:
    tables = node(3)
    assert make_call(tables[0], ROOT_0) == ""
    assert tables[0].is_ahead()
    assert tables[0].take_refusal() == ""
    assert "rank 1 called Bcast(8 float64, root=1)" in make_call(tables[1], ROOT_1)
    assert tables[0].take_refusal() == (
        "rank 0: the ranks' calls were different in one that this rank has completed: rank 0 called "
        "Bcast(8 float64, root=0), rank 1 called Bcast(8 float64, root=1): name the same root on all ranks "
        "(noticed by rank 0)"
    )
    assert tables[0].is_ahead(), "rank 2 has not called it yet"
    assert "ranks 0, 2 called Bcast(8 float64, root=0)" in make_call(tables[2], ROOT_0)
    assert not tables[0].is_ahead()
    assert [table.take_refusal() for table in tables] == [""] * 3, "those that raised have said it"
    assert [make_call(table, ROOT_1) for table in tables] == [""] * 3
    assert [table.take_refusal() for table in tables] == [""] * 3


def test_every_call_that_another_rank_refuses_is_told_but_none_that_this_rank_refuses_too(node: MakeTables) -> None:
    tables = node(2)
    assert [make_call(tables[0], each) for each in (ROOT_0, ROOT_0, ROOT_1)] == [""] * 3
    assert make_call(tables[1], ROOT_1)
    tables[1].refuse(MismatchError("first"))
    assert "in one that this rank has completed" in tables[0].take_refusal()
    assert make_call(tables[1], ROOT_1)
    tables[1].refuse(MismatchError("second"))
    assert "in one that this rank has completed" in tables[0].take_refusal()
    assert make_call(tables[1], ROOT_1) == ""
    assert make_call(tables[1], ROOT_0) == ""
    tables[1].refuse(MismatchError("third"))
    assert make_call(tables[0], ROOT_1)
    assert make_call(tables[0], ROOT_0) == ""
    assert tables[0].take_refusal() == "", "it has raised an error in that call"


def test_a_rank_is_not_ahead_of_one_that_has_left_or_that_makes_the_same_calls(node: MakeTables) -> None:
    early, late = node(2)
    make_call(early, ROOT_0)
    late.begin(late.announce(ROOT_0))
    assert early.is_ahead(), "it has not left the call"
    late.leave()
    assert not early.is_ahead()
    make_call(early, ROOT_0)
    late.mark_gone()
    assert not early.is_ahead()


def test_a_rank_that_has_failed_in_a_call_and_left_has_not_completed_it(node: MakeTables) -> None:
    gone, here = node(2)
    with pytest.raises(SystemExit):
        make_call(gone, SUM, lambda: sys.exit(0))
    assert not gone.is_ahead()
    here.enter(here.announce(SUM))
    assert here.deadlock_reason() is None
    gone.mark_gone()
    assert "rank 0 has left the program, rank 1 waits in Allreduce" in str(here.deadlock_reason())


class ObjectError(Exception):
    pass


def fail_in_call(table: ConsistencyTable, one_way: bool = False) -> None:
    """A call that an exception of the program ends."""
    with suppress(ObjectError), table.entered:
        table.enter(table.announce(SUM))
        raise ObjectError
    table.doubt(one_way)


@pytest.mark.parametrize("one_way", [False, True])
def test_ranks_that_an_exception_has_ended_in_one_call_are_in_step(node: MakeTables, one_way: bool) -> None:
    tables = node(3)
    for table in tables:
        fail_in_call(table, one_way)
    assert [make_call(table, SUM) for table in tables] == [""] * 3


def test_a_rank_that_an_exception_has_ended_is_in_step_if_the_others_could_not_have_gone_on_without_it(
    node: MakeTables,
) -> None:
    failed, other = node(2)
    fail_in_call(failed)
    make_call(other, SUM)
    assert make_call(failed, SUM) == ""


def test_a_rank_that_is_late_has_as_long_to_fail_in_the_same_call(
    node: MakeTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consistency, "LEAVE_SECONDS", 1.0)
    failed, other = node(2)
    fail_in_call(failed, one_way=True)
    looks = 0

    def go_on() -> None:
        nonlocal looks
        looks += 1
        if time.monotonic() - began > 1.2 and not other.calls:
            other.begin(other.announce(SUM))
            looks = 0
        elif other.active_seq and looks > 5:
            other.abandon()

    began, failed.progress = time.monotonic(), go_on
    assert make_call(failed, SUM) == ""


@pytest.mark.parametrize("other_rank", ["has completed a call in one direction", "is still in the call"])
def test_a_rank_that_an_exception_has_ended_alone_is_out_of_step(
    node: MakeTables, other_rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consistency, "LEAVE_SECONDS", 0.1)
    failed, other = node(2)
    fail_in_call(failed, one_way=True)
    other.enter(other.announce(SUM))
    if other_rank != "is still in the call":
        other.leave()
    for _ in range(2):
        with pytest.raises(TransportError, match="out of step: free it and make a new one"):
            make_call(failed, SUM)


def test_a_rank_that_an_exception_has_ended_waits_for_the_others(node: MakeTables) -> None:
    failed, other = node(2)
    fail_in_call(failed)
    late = threading.Timer(0.1, make_call, (other, SUM))
    late.start()
    assert make_call(failed, SUM) == ""
    late.join()
    fail_in_call(failed)
    other.mark_gone()
    assert "rank 1 has left the program, rank 0 waits in Allreduce" in make_call(failed, SUM)


def test_what_one_rank_sends_is_compared_with_what_the_other_receives(node: MakeTables) -> None:
    here, there = node(2)
    call = Fingerprint("Gatherv", "", "", "float64", "0")
    here.begin(here.announce(call), Amounts((NOT_COMPARED, NOT_COMPARED), (NOT_COMPARED, 32)))
    there.begin(there.announce(call), Amounts((24, NOT_COMPARED), (NOT_COMPARED, NOT_COMPARED)))
    for table in (here, there):
        with pytest.raises(
            MismatchError, match=r"rank 1 called .* sends 3 float64 to rank 0, which receives 4 from it"
        ):
            table.leave()
    assert here.explain_amounts(1, (8, 16), (16, 8)) == ""
    assert "rank 0 called" in here.explain_amounts(1, (8, 16), (16, 0))


def test_all_ranks_raise_in_lockstep(node: MakeTables) -> None:
    tables = node(4)
    errors: list[Any] = [None] * 4

    def body(me: int) -> None:
        table = tables[me]
        digest = table.announce(SUM if me != 1 else SUM._replace(dtype="int32"))
        try:
            table.enter(digest)
            table.wait()
        except MismatchError as error:
            errors[me] = str(error)

    threads = [threading.Thread(target=body, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all("rank 1" in error for error in errors)


def test_unknown_fields_are_not_compared(node: MakeTables) -> None:
    one, two = node(2)
    one.enter(one.announce(SUM))
    two.enter(two.announce(SUM._replace(count=UNKNOWN, dtype=UNKNOWN, order=UNKNOWN)))


def test_calls_that_may_differ_pass_after_their_text_was_overwritten(node: MakeTables) -> None:
    tables = node(2)
    for count in range(3 * consistency.TEXTS):
        for table in tables:
            table.announce(SUM._replace(count=str(count)))
    tables[0].enter(tables[0].announce(SUM._replace(count="0")))
    tables[1].enter(tables[1].announce(SUM._replace(count=UNKNOWN)))
    for table in tables:
        table.leave()


@pytest.mark.parametrize("by_template", [False, True])
def test_a_rank_that_has_gone_on_writes_an_overwritten_text_again(node: MakeTables, by_template: bool) -> None:
    """Its watchdog does, while the program computes; without one the other rank names the call *something else*."""
    here, gone = node(2)
    call = Fingerprint("Bcast", "", "8", "float32", "1", "C", "")
    gone.begin(gone.announce(call))
    if by_template:  # as compiled code enters a call of which only the template was announced
        gone._counted.pop(call.digest)
        gone._words[gone._base + COUNTS + 1] = 8
    gone.leave()
    for count in range(100, 100 + 20 * consistency.TEXTS):
        gone.announce(SUM._replace(count=str(count)))
    assert here.read_fingerprint(gone._base, call.digest) is None
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            gone.write_wanted_texts()

    watchdog = threading.Thread(target=watch)
    watchdog.start()
    try:
        with pytest.raises(MismatchError, match=r"rank 0 called Bcast\(8 float32, root=0\), rank 1 called .*root=1"):
            here.enter(here.announce(call._replace(root="0")))
    finally:
        over.set()
        watchdog.join()
    assert here._words[here._base + consistency.WANTED] == 0


def test_a_rank_that_has_exited_makes_a_call_a_deadlock(node: MakeTables) -> None:
    here, gone = node(2)
    here.enter(here.announce(SUM))
    assert here.deadlock_reason() is None
    gone.mark_gone()
    assert "rank 1 has left the program" in str(here.deadlock_reason())


@pytest.mark.parametrize("before", [0, 1])
def test_a_rank_that_has_freed_the_communicator_makes_a_call_a_deadlock(node: MakeTables, before: int) -> None:
    here, gone, right = node(3)
    for _ in range(before):
        for table in (here, gone, right):
            assert make_call(table, SUM) == ""
    right.begin(right.announce(SUM))
    here.begin(here.announce(SUM))
    right.leave()
    right.close()
    assert here.deadlock_reason() is None, "it has left the call before"
    gone.close()
    said = f"rank 1 has freed this communicator, rank 0 waits in {SUM}: make all ranks call it"
    assert here.deadlock_reason() == said
    assert not here.is_ahead()
    here.abandon()
    with pytest.raises(MismatchError, match="rank 1 has freed this communicator"):
        here.check_stall(SUM.word, 5.0, lambda: [1])
    number = here.issue(SUM, before + 1)
    with pytest.raises(MismatchError, match="rank 1 has freed this communicator"):
        here.check_order(1, number, before + 1, SUM)


def test_ranks_that_have_all_failed_in_a_call_may_free_the_communicator_at_their_own_pace(node: MakeTables) -> None:
    early, late = node(2)
    fail_in_call(early)
    early.close()
    late.begin(late.announce(SUM))
    assert late.deadlock_reason() is None


@pytest.mark.parametrize("end", [ConsistencyTable.leave, ConsistencyTable.abandon])
def test_ranks_of_several_nodes_wait_for_none_that_has_left_before_the_call(node: MakeTables, end: Any) -> None:
    """One may leave after the call, or by its error, while others of its node still receive what is compared."""
    here, after, before = node(3)
    between = BetweenNodes(MPI.COMM_SELF, here, 0)
    for table in (here, after):
        table.begin(table.announce(SUM))
    end(after)
    after.mark_gone()
    between.check_departures(SUM)
    before.mark_gone()
    with pytest.raises(MismatchError, match=r"rank 2 has left the program, rank 0 waits in Allreduce\(sum, 8 float32"):
        between.check_departures(SUM)


def test_what_has_been_compared_counts_more_than_a_rank_that_has_left_since(node: MakeTables) -> None:
    """This rank was without a core between the two looks."""

    class Gathered:
        tests = 0

        def Test(self) -> bool:
            self.tests += 1
            return self.tests > 1

    class Nodes:
        rank, size = 0, 1

        def Iallgather(self, send: Any, recv: Any) -> Gathered:
            recv[:] = send
            return Gathered()

    (here,) = node(1)
    between = BetweenNodes(Nodes(), here, 0)  # type: ignore[arg-type]
    here.begin(here.announce(SUM))
    here.note_departure(*departure(7, 0))
    with mock.patch("hpccomm.transports.polling.CHECK_SECONDS", -1.0):
        between.compare(5, SUM, None)
        with pytest.raises(MismatchError, match="rank 7 has left"):
            await_request(mock.Mock(Test=lambda: False), check=lambda: between.check_departures(SUM))


class Request:
    """A send that has not completed."""

    def Test(self) -> bool:
        return False


class Messages:
    """A communicator that keeps what is sent, and has messages of rank 2 to be received: tag and content."""

    size = 4

    def __init__(self) -> None:
        self.sent, self.under_way = list[tuple[tuple[int, int], ...]](), weakref.WeakSet[Request]()
        self.arrived: list[tuple[int, list[Any]]] = []

    def Isend(self, spec: list[Any], rank: int, tag: int) -> Request:
        self.sent.append(tuple((gone.rank, gone.calls) for gone in map(Gone.decode, json.loads(spec[0]))))
        self.under_way.add(request := Request())
        return request

    def Iprobe(self, status: MPI.Status) -> bool:
        for tag, content in self.arrived[:1]:
            status.source, status.tag = 2, tag
            status.Set_elements(MPI.BYTE, len(json.dumps(content)))
        return bool(self.arrived)

    def Recv(self, spec: list[Any], source: int, tag: int) -> None:
        spec[0][:] = json.dumps(self.arrived.pop(0)[1]).encode()


def departure(rank: int, calls: int, issued: int = 0, freed: bool = False) -> list[int]:
    """What a node tells of a rank that is gone."""
    return [Gone(each, rank, freed).encode() for each in (calls, issued)]


def leave(table: ConsistencyTable) -> None:
    """What a rank does for each of its communicators when it leaves the program."""
    table.mark_gone()
    table.tell_gone()


def test_a_node_that_leaves_tells_the_next_one_who_has_made_the_fewest_calls(node: MakeTables) -> None:
    first, second, third = node(3)
    comm = Messages()
    for each in (first, second, third):
        each.wire = Wire(comm, 3, each.note_departure)
    for each in (first, first, second, second, third):
        each.enter(each.announce(SUM))
        each.leave()
    for each in (second, first, first):
        leave(each)
    assert comm.sent == [((1, 2), (1, 0)), ((0, 2), (0, 0))], "the lowest rank of equal ones, and nobody twice"
    third.note_departure(*departure(7, 1))
    third.note_departure(*departure(9, 5))
    assert third.find_departure() is None, "both have left after the last call of this rank"
    third.enter(third.announce(SUM))
    assert third.deadlock_reason() == f"rank 7 has left the program, rank 2 waits in {SUM}: make all ranks call it"
    leave(third)
    assert comm.sent[2:] == [((2, 1), (0, 0))]


@pytest.mark.parametrize(
    ("arrived", "sent"),
    [
        ([], [((0, 1), (0, 0))]),
        ([(3, 1)], [((0, 1), (0, 0))]),
        ([(5, 0)], [((5, 0), (0, 0))]),
        ([(5, 0, 3), (4, 2, 0)], [((4, 2), (4, 0)), ((5, 0), (0, 0))]),
        ([(2, 1)], [((0, 1), (0, 0))]),
        ([(2, 1, 1)], [((0, 1), (0, 0))]),
    ],
)
def test_a_node_that_leaves_tells_what_it_has_been_told_unless_only_the_receiver_is_gone(
    node: MakeTables, arrived: list[tuple[int, ...]], sent: list[Any]
) -> None:
    """Also what has arrived without a watchdog that received it, as at the end of a program; other messages end."""
    tables, comm = node(2), Messages()
    for each in tables:
        each.enter(each.announce(SUM))
        each.leave()
    for each in arrived[:1]:
        tables[1].note_departure(*departure(*each))
    comm.arrived += [(Wire.DEPARTURE, departure(*each)) for each in arrived[1:]] + [(Wire.ANSWER, [9, [0]])]
    tables[0].wire = Wire(comm, 2, tables[0].note_departure)
    leave(tables[0])
    assert (comm.sent, comm.arrived) == (sent, [])


def test_a_node_tells_the_next_one_what_it_is_told_of_ranks_that_have_left(node: MakeTables) -> None:
    """Its own ranks may wait in other calls, and make no more of this communicator."""
    (table,), comm = node(1), Messages()
    table.wire = Wire(comm, 1, table.note_departure)  # type: ignore[arg-type]
    told = [departure(7, 3), departure(7, 3), departure(8, 2), departure(9, 1, freed=True), departure(0, 0)]
    comm.arrived += [(Wire.DEPARTURE, each) for each in told]
    assert table.wire.receive() == []
    assert comm.sent == [((7, 3), (7, 0)), ((8, 2), (8, 0))], "nothing twice, nor of ranks of this node or freed ones"


def test_a_watchdog_that_looks_while_its_rank_goes_on_finds_no_wrong_order(node: MakeTables) -> None:
    """This rank ends a blocking call, issues the non-blocking one, and begins the next blocking one meanwhile."""

    def go_on(k: int) -> tuple[int, int]:
        here.last_shared_call = lambda k: (0, 0)
        here.issue(SUM, 1)
        here.begin(here.announce(SUM))
        return 0, 0

    here, peer = node(2)
    for table in (here, peer):
        assert make_call(table, SUM) == ""
    peer.issue(SUM, 1)
    here.last_shared_call = go_on
    assert here.explain_issue_after(SUM) is None
    assert not here.is_out_of_step


class TornWords:
    """The words of a table, in which a peer goes on writing between two looks of this rank."""

    def __init__(self, words: Any, at: int, write: Callable[[], object]) -> None:
        self._words, self._at, self._write = words, at, write

    def __getitem__(self, at: int) -> int:
        found: int = self._words[at]
        if at == self._at:
            self._write()
        return found

    def __setitem__(self, at: int, value: int) -> None:
        self._words[at] = value

    def release(self) -> None:
        self._words.release()


def test_a_non_blocking_call_is_read_when_it_is_wholly_written(node: MakeTables) -> None:
    here, peer = node(2)
    for table in (here, peer):
        assert make_call(table, SUM) == ""
    at = peer._base + consistency.FIRST_ISSUE + 2 * 1
    here._words[at] = 1 << consistency.DIGEST_BITS | SUM.digest  # the entry, and not yet what was before it
    here._words = TornWords(here._words, at + 1, lambda: peer.issue(SUM, 1))  # type: ignore[assignment]
    assert here.explain_issue_after(SUM) is None
    peer.issue(SUM, 1)
    assert here.explain_issue_after(SUM) is None


def test_a_call_whose_text_is_not_there_contradicts_nothing_until_it_is(
    node: MakeTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank that has made it went on, and has not written the text again, as while it holds Python's lock."""
    monkeypatch.setattr(consistency, "TEXT_SECONDS", 0.02)
    here, ahead = node(2)
    ahead.begin(ahead.announce(SUM._replace(count=UNKNOWN, dtype="int64")))
    text = ahead._base + consistency.FIRST_TEXT
    lost = bytes(ahead._octets[8 * text :])
    ahead._octets[8 * text :] = bytes(len(lost))
    here.begin(here.announce(SUM))
    here.compare_entries()
    assert here.deadlock_reason() is None
    ahead._words[ahead._base + consistency.STATUS] = -1  # it has completed the call
    ahead.mark_gone()
    assert here.deadlock_reason() is None
    ahead._octets[8 * text :] = lost
    assert "rank 1 called Allreduce(sum, int64)" in str(here.deadlock_reason())


def test_a_rank_of_another_node_that_is_gone_misses_the_non_blocking_calls_after_its_last(node: MakeTables) -> None:
    (here,) = node(1)
    number = here.issue(SUM, 5)
    here.check_issued(number, SUM)
    here.note_departure(*departure(7, 5, issued=1))
    here.check_issued(number, SUM)
    number = here.issue(SUM, 5)
    with pytest.raises(MismatchError, match=r"rank 7 has left the program, rank 0 waits in Allreduce\(sum, 8 float32"):
        here.check_issued(number, SUM)


def test_a_rank_that_waits_for_one_of_mpis_requests_misses_those_that_are_gone_without_that_call(
    node: MakeTables,
) -> None:
    """Not those that have made it, whatever has become of their last call."""
    here, gone, failed = node(3)
    for table in (here, failed):
        for _ in range(2):
            table.begin(table.announce(SUM))
            table.leave()
    failed.begin(failed.announce(SUM))
    failed.abandon()
    failed.mark_gone()
    here.begin(here.announce(SUM))
    here.leave()
    here.watch_request(2, waits=True)
    assert (here.active_seq, here.awaited, here.explain_awaited()) == (0, 2, None)
    gone.mark_gone()
    assert here.explain_awaited() == f"rank 1 has left the program, rank 0 waits in {SUM}: make all ranks call it"
    here.watch_request(2, waits=False)
    assert here.explain_awaited() is None


def test_a_rank_that_frees_while_another_thread_waits_is_gone_after_that_call(node: MakeTables) -> None:
    here, gone = node(2)
    for table in (here, gone):
        table.begin(table.announce(SUM))
    gone.mark_gone(freed=True)
    assert here.find_departure() is None
    here.leave()
    here.begin(here.announce(SUM))
    assert here.find_departure() == 1


def test_what_mpi_still_sends_lives_as_long_as_the_table(node: MakeTables) -> None:
    (table,), comm = node(1), Messages()
    table.wire = Wire(comm, 1, table.note_departure)
    leave(table)
    gc.collect()
    assert len(comm.under_way) == 1, "the request, and so its buffer"


def test_missing_ranks_are_those_that_have_not_entered(node: MakeTables) -> None:
    tables = node(3)
    for me in (0, 2):
        tables[me].enter(tables[me].announce(SUM))
    assert tables[0].missing_ranks() == [1]


def test_a_rank_waits_for_nothing_in_a_call_that_others_refuse_of_each_other(node: MakeTables) -> None:
    """No call contradicts that of the last rank: the second one sends the first one too much."""
    root, odd, right, late = node(4)
    received = Amounts((0, 0, 0, 0), (8, 24, 8, 8))
    right.enter(right.announce(ROOT_0), Amounts((8, 0, 0, 0), (0, 0, 0, 0)))
    odd.enter(odd.announce(ROOT_0), Amounts((32, 0, 0, 0), (0, 0, 0, 0)))
    with pytest.raises(MismatchError, match="sends 4 float64 to rank 0") as refusal, root.entered:
        root.enter(root.announce(ROOT_0), received)
    assert right.deadlock_reason() is None, "a rank that is to come may complete it"
    late.enter(late.announce(ROOT_0), Amounts((8, 0, 0, 0), (0, 0, 0, 0)))
    assert right.deadlock_reason() == f"rank 2 waits in {ROOT_0}, which rank 0 has left: {refusal.value}"
    odd.abandon()
    right.abandon()
    late.leave()


def test_other_nodes_are_told_once_by_the_lowest_rank_that_refuses_a_call(node: MakeTables) -> None:
    first, second, third = node(3)
    assert make_call(third, ROOT_1) == ""
    assert make_call(second, ROOT_0) != ""
    assert make_call(first, ROOT_0) != ""
    seq, reason = first.take_own_refusal() or (0, "")
    assert (seq, reason.startswith("rank 0 has left: ranks 0, 1 called Bcast")) == (1, True)
    assert [table.take_own_refusal() for table in (first, second, third)] == [None] * 3
    first.begin(first.announce(ROOT_0))
    assert first.describe_waiting(2) == "", "others are to come"
    for table in (second, third):
        assert make_call(table, ROOT_0) == ""
    assert first.describe_waiting(2) == f"rank 0 waits in {ROOT_0}"
    assert first.describe_waiting(1) == ""


@pytest.mark.parametrize(("amounts", "reach"), [(None, consistency.CALLS - 1), (Amounts((1, 1), (1, 1)), AMOUNT_CALLS)])
def test_no_rank_leaves_the_reach_of_another_one(node: MakeTables, amounts: Amounts | None, reach: int) -> None:
    """In calls that wait for nobody it stops before it would overwrite what the other one has to compare."""
    ahead, behind = node(2)
    made: list[int] = []

    def run_ahead() -> None:
        for _ in range(3 * reach):
            with ahead.entered:
                ahead.enter(ahead.announce(ROOT_0), amounts)
            made.append(1)

    def follow(calls: int) -> None:
        for _ in range(calls):
            with behind.entered:
                behind.enter(behind.announce(ROOT_0), amounts)

    thread = threading.Thread(target=run_ahead)
    thread.start()
    until = time.monotonic() + 10
    while len(made) < reach - 1 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == reach - 1
    follow(reach - 2)
    with pytest.raises(MismatchError, match="rank 1 called Bcast"), behind.entered:
        behind.enter(behind.announce(ROOT_1), amounts)
    follow(2 * reach + 1)
    thread.join(10)
    assert len(made) == 3 * reach


def test_amounts_are_overwritten_only_when_they_have_been_compared(node: MakeTables) -> None:
    """A rank that is in a call reads what another one has sent in it, however far that one has gone on."""
    ahead, behind = node(2)
    fingerprint, amounts = ahead.announce(ROOT_0), [Amounts((k, k), (k, k)) for k in range(AMOUNT_CALLS + 2)]
    behind.begin(behind.announce(ROOT_0), amounts[1])
    for each in amounts[1:-1]:
        with ahead.entered:
            ahead.enter(fingerprint, each)
    ahead.begin(fingerprint, amounts[-1])
    assert ahead._words[ahead._find_amounts(ahead._base, 1)] == 1
    behind.compare_entries()
    behind.leave()
    for each in amounts[2:]:
        with behind.entered:
            behind.enter(fingerprint, each)
    ahead.stay_in_reach(amounts[-1])
    ahead.leave()


def test_a_fingerprint_can_be_decoded_and_its_digest_fits_a_tag() -> None:
    assert decode(SUM.encode()) == SUM
    assert 0 <= SUM.digest < 2**28


def test_the_first_differing_field_is_named() -> None:
    assert first_difference(SUM, SUM) is None
    assert first_difference(SUM, SUM._replace(op="max")) == "op"


def test_the_error_groups_ranks_by_call() -> None:
    text = mismatch_message({0: SUM, 1: SUM, 2: SUM._replace(dtype="int32"), 3: None}, 0)
    assert text == (
        "ranks 0, 1 called Allreduce(sum, 8 float32), rank 2 called Allreduce(sum, 8 int32), "
        "rank 3 called something else: cast before the call (noticed by rank 0)"
    )


SENTENCES = ("rank {}: Bcast: the root 7 is not a rank", "ranks 0, 1 called Barrier (noticed by rank {})")


def write_together(reports: list[Reports], sentence: str) -> None:
    """Let every rank write the error at the same time."""
    start = threading.Barrier(len(reports))

    def write(k: int) -> None:
        start.wait()
        reports[k].write(sentence.format(k))

    threads = [threading.Thread(target=write, args=(k,)) for k in range(len(reports))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()


@pytest.mark.parametrize("backwards", [(), (0,), (1,), (0, 2)])
def test_one_rank_of_those_with_the_same_error_writes_it(
    node: MakeTables, capfd: pytest.CaptureFixture[str], backwards: tuple[int, ...]
) -> None:
    """Also of ranks that come at the same time and look at their two tables in another order, and a later one."""
    pairs = list(zip(node(3), node(3), strict=True))
    reports = [Reports(pair[::-1] if k in backwards else pair, process=100 + k) for k, pair in enumerate(pairs)]
    for sentence in SENTENCES:
        write_together(reports[:2], sentence)
        assert capfd.readouterr().err.count(sentence[8:].partition("{")[0]) == 1
        reports[2].write(sentence.format(2))
        reports[0].write(sentence.format(0))
        assert capfd.readouterr().err == ""


def test_a_rank_that_comes_to_its_claim_late_finds_the_error_written(
    node: MakeTables, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at the claims of others and its own a busy machine may keep it from its core."""
    late, other = node(2)
    made, looks = Reports([late], process=100), list[int]()

    def look(mark: int) -> list[int]:
        looks.append(mark)
        return Reports._find_claims(made, mark) if len(looks) > 1 else []

    monkeypatch.setattr(made, "_find_claims", look)
    Reports([other], process=200).write(SENTENCES[0].format(1))
    made.write(SENTENCES[0].format(0))
    assert capfd.readouterr().err == "[hpccomm] rank 1: Bcast: the root 7 is not a rank\n"


def test_an_error_that_comes_soon_after_another_does_not_hide_it(
    node: MakeTables, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpccomm.calls.reports.WRITE_SECONDS", 0.2)
    first, second = (Reports([table]) for table in node(2))
    for sentence in SENTENCES:
        first.write(sentence.format(0))
    assert capfd.readouterr().err.count("[hpccomm]") == 2
    second.write(SENTENCES[0].format(1))
    assert capfd.readouterr().err == ""


def test_threads_with_the_same_error_wait_until_it_is_written(
    node: MakeTables, capfd: pytest.CaptureFixture[str]
) -> None:
    [table, _] = node(2)
    write_together([Reports([table])] * 2, "rank 0: the ranks are out of step")
    assert capfd.readouterr().err.count("[hpccomm]") == 1


def test_a_rank_writes_an_error_if_the_one_that_would_has_ended(
    node: MakeTables, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpccomm.calls.reports.WRITE_SECONDS", 0.2)
    ended, lives = node(2)
    with monkeypatch.context() as patch:
        patch.setattr("hpccomm.calls.reports.os.write", lambda *_: None)
        patch.setattr(Reports, "_claim", lambda self, number, claim: ended.write_claim(number, claim & ~1))
        Reports([ended]).write(SENTENCES[0].format(0))
    Reports([lives]).write(SENTENCES[0].format(1))
    assert capfd.readouterr().err == "[hpccomm] rank 1: Bcast: the root 7 is not a rank\n"


def test_a_call_inside_a_call_of_objects_is_no_other_call(node: MakeTables) -> None:
    """All ranks are in the outer one, and a late rank has not come to the inner one, which has no entry here."""
    here, there = node(2)
    for table in (here, there):
        table.enter(table.announce(Fingerprint("alltoall")))
    here.announce(SUM)
    here.check_stall(SUM.word, 5.0, lambda: [1])
    there.leave()
    here.check_stall(SUM.word, 5.0, lambda: [1])
    there.enter(there.announce(SUM._replace(collective="Gather")))
    with pytest.raises(MismatchError, match=r"rank 0 called Allreduce.sum, 8 float32., rank 1 called Gather"):
        here.check_stall(SUM.word, 5.0, lambda: [1])


def test_ranks_that_fail_in_the_same_calls_at_their_own_pace_are_in_step(node: MakeTables) -> None:
    """One of them may have failed in the next call before the other one looks."""
    here, there = node(2)

    def fail(table: ConsistencyTable) -> None:
        table.enter(table.announce(Fingerprint("gather", root="0")))
        table.abandon()
        table.doubt(True)

    for _ in range(4):
        fail(here)
        fail(there)
        there.settle()
        fail(there)
        here.settle()
        fail(here)
        there.settle()
        here.settle()


class NeverComplete:
    """The request of a gather that some rank never enters, on a communicator of two."""

    size, rank = 2, 0

    def Iallgather(self, send: Any, recv: Any) -> NeverComplete:
        self.buffers = send, recv
        return self

    def Test(self) -> bool:
        return False


@pytest.mark.parametrize("error", [MismatchError, KeyboardInterrupt])
def test_a_gather_that_an_error_ends_keeps_what_mpi_writes(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_departure(entered: bool) -> None:
        raise error

    monkeypatch.setattr(between_nodes, "_abandoned", kept := [])
    table: Any = type("Table", (), {"find_departure": staticmethod(find_departure)})
    comm: Any = NeverComplete()
    with pytest.raises(error):
        BetweenNodes(comm, table, 0).compare(1, None, None)
    assert kept == [comm]
