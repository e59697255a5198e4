"""The roll call: every rank writes what it is about to call where the other ranks of its node can read it.

*seq counts the collective calls of one communicator; a word is seq and signature in one 64-bit integer*, so a reader
never sees half of it.  Reading costs no message.  Whoever comes late sees at once that it calls something else; whoever
is stuck is told by a watchdog thread, which also names the ranks that are missing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from hpccomm.calls.fingerprint import Fingerprint, decode, first_difference, format_ranks, mismatch_message
from hpccomm.errors import MismatchError

CALLS = 64
"""How many calls back a peer can still be compared."""
TEXTS = 32
TEXT_BYTES = 248
STATUS, LEFT, GAVE_UP = CALLS, CALLS + 1, CALLS + 2
ROW_WORDS = CALLS + 16 + TEXTS * (TEXT_BYTES // 8 + 1)
"""64-bit words a rank."""

PERIOD = 0.25
"""Seconds between two looks of the watchdog."""

FLUSH_SECONDS = 0.5
"""Seconds between a last sentence and the end: launchers drop what they have not read by then (seen with hydra)."""


def bytes_needed(members: int) -> int:
    """Shared bytes for the ranks of one node."""
    return members * ROW_WORDS * 8


class ConsistencyTable:
    """One rank's view of its node's table.

    ``memory`` is zeroed memory that all members share, ``members`` their ranks in the communicator, ``me`` this one.
    """

    def __init__(self, memory: Any, members: tuple[int, ...], me: int) -> None:
        self._octets = memoryview(memory)
        self._words = self._octets.cast("q")
        self._members, self._me = members, me
        self._base = members.index(me) * ROW_WORDS
        self._peers = [k * ROW_WORDS for k, rank in enumerate(members) if rank != me]
        self._fingerprints: dict[int, Fingerprint] = {}
        self._compatible: set[tuple[int, int]] = set()
        self._warned = (0, 0)
        self.progress: Callable[[], Any] = lambda: None
        """Lets MPI move what is under way."""
        self._seq = 0
        self.active_seq = 0
        """The number of the call that this rank is in; 0 outside."""
        watch(self)

    def announce(self, signature: Fingerprint) -> int:
        """Write the words of a call that will be made; returns its number for :meth:`enter`."""
        word = signature.digest
        if self._fingerprints.get(word) != signature:
            self._fingerprints[word] = signature
            start = 8 * (self._base + CALLS + 16 + (word % TEXTS) * (TEXT_BYTES // 8 + 1))
            text = signature.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
            self._octets[start + 8 : start + 8 + TEXT_BYTES] = text
            self._words[start // 8] = word
        return word

    def enter(self, word: int) -> None:
        """About to make the call ``word``: raise if somebody who is already there calls something else."""
        words = self._words
        self._seq = seq = self._seq + 1
        slot, mine = seq % CALLS, (seq << 31) | word
        words[self._base + slot] = mine
        words[self._base + STATUS] = self.active_seq = seq
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs != mine and theirs >> 31 == seq:
                self.compare(word, theirs, peer)

    def begin(self, word: int) -> None:
        """About to make a call that nobody leaves before all have come: comparing on leaving is early enough."""
        words = self._words
        self._seq = seq = self._seq + 1
        words[self._base + seq % CALLS] = (seq << 31) | word
        words[self._base + STATUS] = self.active_seq = seq

    def leave(self, word: int) -> None:
        """The call is over: raise if it was not what the others called."""
        words, seq = self._words, self._seq
        slot, mine = seq % CALLS, (seq << 31) | word
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs != mine and theirs >> 31 == seq:
                self.compare(word, theirs, peer)
        self.active_seq = 0
        words[self._base + STATUS] = -seq

    def wait(self) -> None:
        """Wait until every member has come to this call, then compare; all of them raise if one differs.

        Drives MPI meanwhile: a member may still be waiting for the end of a message that this rank has sent before.
        """
        words, seq = self._words, self._seq
        slot = seq % CALLS
        mine = words[self._base + slot]
        for peer in self._peers:
            spins = 0
            while words[peer + slot] >> 31 < seq:
                spins += 1
                if spins > 20:
                    os.sched_yield()
                    self.progress()
                if spins % 2000 == 0:
                    self.raise_if_deadlocked()
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs != mine and theirs >> 31 == seq:
                self.compare(mine & 0x7FFFFFFF, theirs, peer)

    def blame(self, word: int, failure: Exception) -> None:
        """MPI failed: raise what the ranks called where they differ, else MPI's own error."""
        for peer in self._peers:
            theirs = self._words[peer + self._seq % CALLS]
            if theirs >> 31 == self._seq:
                self.compare(word, theirs, peer)
        raise failure

    def compare(self, word: int, theirs: int, peer: int) -> None:
        """The numbers differ: do the words contradict each other?"""
        other = theirs & 0x7FFFFFFF
        if word == other or (word, other) in self._compatible:
            return
        a, b = self._fingerprints.get(word), self.text(peer, other)
        if a is not None and b is not None and first_difference(a, b) is None:
            self._compatible.add((word, other))
            return
        raise MismatchError(self.explain())

    def text(self, line: int, word: int) -> Fingerprint | None:
        """The words a rank wrote for its call, unless they have been overwritten."""
        start = 8 * (line + CALLS + 16 + (word % TEXTS) * (TEXT_BYTES // 8 + 1))
        if self._words[start // 8] != word:
            return None
        return decode(bytes(self._octets[start + 8 : start + 8 + TEXT_BYTES]).rstrip())

    def look_up_call(self, rank: int, word: int) -> Fingerprint | None:
        """What a rank of this node wrote for a signature."""
        if rank not in self._members:
            return self._fingerprints.get(word)
        return self.text(self._members.index(rank) * ROW_WORDS, word)

    def explain(self) -> str:
        """Who called what as the current call."""
        slot = self._seq % CALLS
        calls: dict[int, Fingerprint | None] = {}
        for k, rank in enumerate(self._members):
            entry = self._words[k * ROW_WORDS + slot]
            if entry >> 31 == self._seq:
                calls[rank] = self.text(k * ROW_WORDS, entry & 0x7FFFFFFF)
        return mismatch_message(calls, self._me)

    def raise_if_deadlocked(self) -> None:
        """Raise when the current call can never be completed."""
        reason = self.deadlock_reason()
        if reason:
            raise MismatchError(reason)

    def deadlock_reason(self) -> str | None:
        """Why the current call can never be completed, if that is certain."""
        seq = self._seq
        slot = seq % CALLS
        mine = self._words[self._base + slot]
        for peer, rank in zip(self._peers, (r for r in self._members if r != self._me), strict=True):
            theirs = self._words[peer + slot]
            if theirs >> 31 == seq and theirs != mine:
                try:
                    self.compare(mine & 0x7FFFFFFF, theirs, peer)
                except MismatchError as error:
                    return str(error)
            gave_up = self._words[peer + GAVE_UP]
            if gave_up and gave_up >> 31 == seq - 1:
                calls = {
                    self._me: self._fingerprints.get(mine & 0x7FFFFFFF),
                    rank: self.text(peer, gave_up & 0x7FFFFFFF),
                }
                return mismatch_message(calls, self._me)
            if self._words[peer + LEFT] and abs(self._words[peer + STATUS]) < seq:
                call = self._fingerprints.get(mine & 0x7FFFFFFF)
                return f"rank {rank} has left the program, rank {self._me} waits in {call}: make all ranks call it"
        return None

    def check_stall(self, word: int, seconds: float, positions: list[int]) -> None:
        """Some members have not come to a call in shared memory: raise when they never will."""
        words, seq = self._words, self._seq
        call = self._fingerprints.get(word)
        for position in positions:
            rank, line = self._members[position], position * ROW_WORDS
            status = words[line + STATUS]
            elsewhere = self.text(line, words[line + (seq + 1) % CALLS] & 0x7FFFFFFF) if status == seq + 1 else None
            if elsewhere or words[line + LEFT]:
                words[self._base + GAVE_UP] = (seq << 31) | word
                raise MismatchError(
                    mismatch_message({self._me: call, rank: elsewhere}, self._me)
                    if elsewhere
                    else f"rank {rank} has left the program, rank {self._me} waits in {call}: make all ranks call it"
                )
        if positions and seconds > stall_seconds() and self._warned != (seq, word):
            self._warned = (seq, word)
            absent = format_ranks([self._members[position] for position in positions])
            log_line(f"rank {self._me}: {call} not complete after {seconds:.0f} s; missing: {absent}")

    def missing_ranks(self) -> list[int]:
        """The members that have not come to the current call."""
        reached = [abs(self._words[k * ROW_WORDS + STATUS]) for k in range(len(self._members))]
        return [rank for rank, seq in zip(self._members, reached, strict=True) if seq < self._seq]

    def describe_call(self) -> str:
        """The current call in words."""
        call = self._fingerprints.get(self._words[self._base + self._seq % CALLS] & 0x7FFFFFFF)
        return f"{call} (call {self._seq})"

    def close(self) -> None:
        """Stop watching; the memory belongs to somebody else."""
        _tables.discard(self)
        self._words.release()
        self._octets.release()

    def mark_left(self) -> None:
        """Tell the others that this rank makes no more calls."""
        with contextlib.suppress(ValueError):
            self._words[self._base + LEFT] = 1


_tables: weakref.WeakSet[ConsistencyTable] = weakref.WeakSet()
_watchdog: list[threading.Thread] = []


def watch(roll: ConsistencyTable) -> None:
    """Let the watchdog look after a roll call; it starts with the first one."""
    _tables.add(roll)
    if not _watchdog:
        _watchdog.append(threading.Thread(target=run_watchdog, name="hpccomm-watchdog", daemon=True))
        _watchdog[0].start()
        atexit.register(mark_all_left)


def mark_all_left() -> None:
    """At exit: the others shall know."""
    for roll in list(_tables):
        roll.mark_left()


def stall_seconds() -> float:
    """Seconds after which the watchdog names the ranks that are missing (``HPCCOMM_STALL_SECONDS``, 60)."""
    return float(os.environ.get("HPCCOMM_STALL_SECONDS", "60"))


def run_watchdog() -> None:
    """The watchdog: end what cannot end by itself, and say why; warn of what lasts."""
    since: weakref.WeakKeyDictionary[ConsistencyTable, tuple[int, float]] = weakref.WeakKeyDictionary()
    warned: weakref.WeakKeyDictionary[ConsistencyTable, int] = weakref.WeakKeyDictionary()
    while True:
        time.sleep(PERIOD)
        for roll in list(_tables):
            seq = roll.active_seq
            before, began = since.get(roll, (0, 0.0))
            if not seq or seq != before:
                since[roll] = (seq, time.monotonic())
                continue
            with contextlib.suppress(ValueError):
                check_progress(roll, seq, time.monotonic() - began, warned)


def check_progress(roll: ConsistencyTable, seq: int, waited: float, warned: Any) -> None:
    """This rank has been in one call for at least one period."""
    reason = roll.deadlock_reason()
    if reason and waited > 2 * PERIOD and roll.active_seq == seq:
        abort_all(reason)
    if waited > stall_seconds() and warned.get(roll) != seq:
        warned[roll] = seq
        names = format_ranks(roll.missing_ranks()) if roll.missing_ranks() else "no rank of this node"
        log_line(f"rank {roll._me}: {roll.describe_call()} not complete after {waited:.0f} s; missing: {names}")


def log_line(sentence: str) -> None:
    """One line on stderr, in one piece."""
    sys.stderr.write(f"[hpccomm] {sentence}\n")
    sys.stderr.flush()


def abort_all(reason: str) -> None:
    """Nobody can go on: say why, and end all ranks."""
    from mpi4py import MPI

    log_line(reason)
    time.sleep(FLUSH_SECONDS)
    MPI.COMM_WORLD.Abort(1)
