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

from hpccomm.calls.fingerprint import Signature, complaint, decode, differs, ranks
from hpccomm.errors import MismatchError

CALLS = 64
"""How many calls back a peer can still be compared."""
TEXTS = 32
TEXT_BYTES = 248
STATUS, LEFT, GAVE_UP = CALLS, CALLS + 1, CALLS + 2
LINE = CALLS + 16 + TEXTS * (TEXT_BYTES // 8 + 1)
"""64-bit words a rank."""

PERIOD = 0.25
"""Seconds between two looks of the watchdog."""

LAST_WORDS = 0.5
"""Seconds between a last sentence and the end: launchers drop what they have not read by then (seen with hydra)."""


def bytes_needed(members: int) -> int:
    """Shared bytes for the ranks of one node."""
    return members * LINE * 8


class RollCall:
    """One rank's view of its node's table.

    ``memory`` is zeroed memory that all members share, ``members`` their ranks in the communicator, ``me`` this one.
    """

    def __init__(self, memory: Any, members: tuple[int, ...], me: int) -> None:
        self._octets = memoryview(memory)
        self._words = self._octets.cast("q")
        self._members, self._me = members, me
        self._base = members.index(me) * LINE
        self._peers = [k * LINE for k, rank in enumerate(members) if rank != me]
        self._known: dict[int, Signature] = {}
        self._fine: set[tuple[int, int]] = set()
        self._warned = (0, 0)
        self.progress: Callable[[], Any] = lambda: None
        """Lets MPI move what is under way."""
        self._seq = 0
        self.inside = 0
        """The number of the call that this rank is in; 0 outside."""
        watch(self)

    def announce(self, signature: Signature) -> int:
        """Write the words of a call that will be made; returns its number for :meth:`enter`."""
        word = signature.word
        if self._known.get(word) != signature:
            self._known[word] = signature
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
        words[self._base + STATUS] = self.inside = seq
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs != mine and theirs >> 31 == seq:
                self.compare(word, theirs, peer)

    def begin(self, word: int) -> None:
        """About to make a call that nobody leaves before all have come: comparing on leaving is early enough."""
        words = self._words
        self._seq = seq = self._seq + 1
        words[self._base + seq % CALLS] = (seq << 31) | word
        words[self._base + STATUS] = self.inside = seq

    def leave(self, word: int) -> None:
        """The call is over: raise if it was not what the others called."""
        words, seq = self._words, self._seq
        slot, mine = seq % CALLS, (seq << 31) | word
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs != mine and theirs >> 31 == seq:
                self.compare(word, theirs, peer)
        self.inside = 0
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
                    self.raise_if_hopeless()
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
        if word == other or (word, other) in self._fine:
            return
        a, b = self._known.get(word), self.text(peer, other)
        if a is not None and b is not None and differs(a, b) is None:
            self._fine.add((word, other))
            return
        raise MismatchError(self.explain())

    def text(self, line: int, word: int) -> Signature | None:
        """The words a rank wrote for its call, unless they have been overwritten."""
        start = 8 * (line + CALLS + 16 + (word % TEXTS) * (TEXT_BYTES // 8 + 1))
        if self._words[start // 8] != word:
            return None
        return decode(bytes(self._octets[start + 8 : start + 8 + TEXT_BYTES]).rstrip())

    def called(self, rank: int, word: int) -> Signature | None:
        """What a rank of this node wrote for a signature."""
        if rank not in self._members:
            return self._known.get(word)
        return self.text(self._members.index(rank) * LINE, word)

    def explain(self) -> str:
        """Who called what as the current call."""
        slot = self._seq % CALLS
        calls: dict[int, Signature | None] = {}
        for k, rank in enumerate(self._members):
            entry = self._words[k * LINE + slot]
            if entry >> 31 == self._seq:
                calls[rank] = self.text(k * LINE, entry & 0x7FFFFFFF)
        return complaint(calls, self._me)

    def raise_if_hopeless(self) -> None:
        """Raise when the current call can never be completed."""
        reason = self.hopeless()
        if reason:
            raise MismatchError(reason)

    def hopeless(self) -> str | None:
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
                calls = {self._me: self._known.get(mine & 0x7FFFFFFF), rank: self.text(peer, gave_up & 0x7FFFFFFF)}
                return complaint(calls, self._me)
            if self._words[peer + LEFT] and abs(self._words[peer + STATUS]) < seq:
                call = self._known.get(mine & 0x7FFFFFFF)
                return f"rank {rank} has left the program, rank {self._me} waits in {call}: make all ranks call it"
        return None

    def late(self, word: int, seconds: float, positions: list[int]) -> None:
        """Some members have not come to a call in shared memory: raise when they never will."""
        words, seq = self._words, self._seq
        call = self._known.get(word)
        for position in positions:
            rank, line = self._members[position], position * LINE
            status = words[line + STATUS]
            elsewhere = self.text(line, words[line + (seq + 1) % CALLS] & 0x7FFFFFFF) if status == seq + 1 else None
            if elsewhere or words[line + LEFT]:
                words[self._base + GAVE_UP] = (seq << 31) | word
                raise MismatchError(
                    complaint({self._me: call, rank: elsewhere}, self._me)
                    if elsewhere
                    else f"rank {rank} has left the program, rank {self._me} waits in {call}: make all ranks call it"
                )
        if positions and seconds > patience() and self._warned != (seq, word):
            self._warned = (seq, word)
            absent = ranks([self._members[position] for position in positions])
            tell(f"rank {self._me}: {call} not complete after {seconds:.0f} s; missing: {absent}")

    def missing(self) -> list[int]:
        """The members that have not come to the current call."""
        reached = [abs(self._words[k * LINE + STATUS]) for k in range(len(self._members))]
        return [rank for rank, seq in zip(self._members, reached, strict=True) if seq < self._seq]

    def current(self) -> str:
        """The current call in words."""
        call = self._known.get(self._words[self._base + self._seq % CALLS] & 0x7FFFFFFF)
        return f"{call} (call {self._seq})"

    def close(self) -> None:
        """Stop watching; the memory belongs to somebody else."""
        _watched.discard(self)
        self._words.release()
        self._octets.release()

    def mark_left(self) -> None:
        """Tell the others that this rank makes no more calls."""
        with contextlib.suppress(ValueError):
            self._words[self._base + LEFT] = 1


_watched: weakref.WeakSet[RollCall] = weakref.WeakSet()
_dog: list[threading.Thread] = []


def watch(roll: RollCall) -> None:
    """Let the watchdog look after a roll call; it starts with the first one."""
    _watched.add(roll)
    if not _dog:
        _dog.append(threading.Thread(target=look, name="hpccomm-watchdog", daemon=True))
        _dog[0].start()
        atexit.register(say_goodbye)


def say_goodbye() -> None:
    """At exit: the others shall know."""
    for roll in list(_watched):
        roll.mark_left()


def patience() -> float:
    """Seconds after which the watchdog names the ranks that are missing (``HPCCOMM_STALL_SECONDS``, 60)."""
    return float(os.environ.get("HPCCOMM_STALL_SECONDS", "60"))


def look() -> None:
    """The watchdog: end what cannot end by itself, and say why; warn of what lasts."""
    since: weakref.WeakKeyDictionary[RollCall, tuple[int, float]] = weakref.WeakKeyDictionary()
    warned: weakref.WeakKeyDictionary[RollCall, int] = weakref.WeakKeyDictionary()
    while True:
        time.sleep(PERIOD)
        for roll in list(_watched):
            seq = roll.inside
            before, began = since.get(roll, (0, 0.0))
            if not seq or seq != before:
                since[roll] = (seq, time.monotonic())
                continue
            with contextlib.suppress(ValueError):
                judge(roll, seq, time.monotonic() - began, warned)


def judge(roll: RollCall, seq: int, waited: float, warned: Any) -> None:
    """This rank has been in one call for at least one period."""
    reason = roll.hopeless()
    if reason and waited > 2 * PERIOD and roll.inside == seq:
        end_all(reason)
    if waited > patience() and warned.get(roll) != seq:
        warned[roll] = seq
        names = ranks(roll.missing()) if roll.missing() else "no rank of this node"
        tell(f"rank {roll._me}: {roll.current()} not complete after {waited:.0f} s; missing: {names}")


def tell(sentence: str) -> None:
    """One line on stderr, in one piece."""
    sys.stderr.write(f"[hpccomm] {sentence}\n")
    sys.stderr.flush()


def end_all(reason: str) -> None:
    """Nobody can go on: say why, and end all ranks."""
    from mpi4py import MPI

    tell(reason)
    time.sleep(LAST_WORDS)
    MPI.COMM_WORLD.Abort(1)
