"""The consistency table: each rank writes the fingerprint of its next call into memory that its node shares.

*seq counts the collective calls of one communicator; an entry is seq and a fingerprint's digest in one 64-bit integer*,
so a reader never sees half an entry.  Reading an entry costs no message.  A rank that enters a call compares its entry
with those of the ranks that have entered before.  A watchdog thread ends a call that can never complete, and names the
ranks that are missing from a slow one.
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
from hpccomm.transports.polling import pause

CALLS = 64
"""Entries of each rank: how many calls back a peer can still be compared."""
TEXTS = 32
TEXT_BYTES = 248
STATUS, LEFT, GAVE_UP = CALLS, CALLS + 1, CALLS + 2
ROW_WORDS = CALLS + 16 + TEXTS * (TEXT_BYTES // 8 + 1)
"""64-bit words per rank."""

PERIOD = 0.25
"""Seconds between two checks by the watchdog."""

EAGER_POLLS, EAGER_SECONDS = 20, 1e-4
"""How long a rank waits for another one to enter a call before it yields its core, and then before it sleeps."""
POLLS_PER_CHECK = 200
"""Polls between two checks whether that rank can still enter it."""

FLUSH_SECONDS = 0.5
"""Seconds between the last log line and the abort: launchers drop output that they have not read (seen with hydra)."""


def bytes_needed(members: int) -> int:
    """Shared bytes for the ranks of one node."""
    return members * ROW_WORDS * 8


class ConsistencyTable:
    """One rank's view of its node's table.

    ``memory`` is zeroed memory that all members share, ``members`` are their ranks in the communicator, ``me`` is this
    rank.
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
        """Lets MPI make progress with pending messages."""
        self._seq = 0
        self.active_seq = 0
        """The number of the call that this rank is executing; 0 between calls."""
        watch(self)

    def announce(self, fingerprint: Fingerprint) -> int:
        """Write the fingerprint of a future call; returns its digest for :meth:`enter`."""
        digest = fingerprint.digest
        self._fingerprints[digest] = fingerprint
        start = 8 * (self._base + CALLS + 16 + (digest % TEXTS) * (TEXT_BYTES // 8 + 1))
        if self._words[start // 8] != digest:  # never written, or overwritten by another call
            text = fingerprint.encode()[:TEXT_BYTES].ljust(TEXT_BYTES)
            self._octets[start + 8 : start + 8 + TEXT_BYTES] = text
            self._words[start // 8] = digest
        return digest

    def enter(self, digest: int) -> None:
        """Enter a call; raise if a rank that has entered before called something else."""
        words = self._words
        self._seq = seq = self._seq + 1
        slot, mine = seq % CALLS, (seq << 31) | digest
        words[self._base + slot] = mine
        words[self._base + STATUS] = self.active_seq = seq
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs != mine and theirs >> 31 == seq:
                self.compare(digest, theirs, peer)

    def begin(self, digest: int) -> None:
        """Enter a call that no rank leaves before all have entered: comparing in :meth:`leave` is early enough."""
        words = self._words
        self._seq = seq = self._seq + 1
        words[self._base + seq % CALLS] = (seq << 31) | digest
        words[self._base + STATUS] = self.active_seq = seq

    def leave(self, digest: int) -> None:
        """Leave a call; raise if another rank called something else."""
        words, seq = self._words, self._seq
        slot, mine = seq % CALLS, (seq << 31) | digest
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs != mine and theirs >> 31 == seq:
                self.compare(digest, theirs, peer)
        self.active_seq = 0
        words[self._base + STATUS] = -seq

    def wait(self) -> None:
        """Wait until every member has entered this call, then compare; all members raise if one differs.

        The waiting rank drives MPI: a member may still wait for the end of a message that this rank has sent before.
        """
        words, seq = self._words, self._seq
        slot = seq % CALLS
        mine = words[self._base + slot]
        for peer in self._peers:
            polls, began = 0, 0.0
            while words[peer + slot] >> 31 < seq:
                polls += 1
                if polls > EAGER_POLLS:
                    began = began or time.monotonic()
                    pause(began, EAGER_SECONDS, 8)
                    self.progress()
                if polls % POLLS_PER_CHECK == 0:
                    self.raise_if_deadlocked()
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs != mine and theirs >> 31 == seq:
                self.compare(mine & 0x7FFFFFFF, theirs, peer)

    def raise_mismatch(self, digest: int, failure: Exception) -> None:
        """After an MPI error, raise a MismatchError if the ranks' calls differ, else MPI's own error."""
        for peer in self._peers:
            theirs = self._words[peer + self._seq % CALLS]
            if theirs >> 31 == self._seq:
                self.compare(digest, theirs, peer)
        raise failure

    def compare(self, digest: int, theirs: int, peer: int) -> None:
        """Compare the fingerprints of two different digests; raise if they contradict each other."""
        other = theirs & 0x7FFFFFFF
        if digest == other or (digest, other) in self._compatible:
            return
        a, b = self._fingerprints.get(digest), self.read_fingerprint(peer, other)
        if a is not None and b is not None and first_difference(a, b) is None:
            self._compatible.add((digest, other))
            return
        raise MismatchError(self.explain())

    def read_fingerprint(self, row: int, digest: int) -> Fingerprint | None:
        """A rank's fingerprint for a digest, unless it has been overwritten."""
        start = 8 * (row + CALLS + 16 + (digest % TEXTS) * (TEXT_BYTES // 8 + 1))
        if self._words[start // 8] != digest:
            return None
        return decode(bytes(self._octets[start + 8 : start + 8 + TEXT_BYTES]).rstrip())

    def look_up_call(self, rank: int, digest: int) -> Fingerprint | None:
        """The call of a rank of this node with a digest."""
        if rank not in self._members:
            return self._fingerprints.get(digest)
        return self.read_fingerprint(self._members.index(rank) * ROW_WORDS, digest)

    def explain(self) -> str:
        """The error sentence for the current call."""
        slot = self._seq % CALLS
        calls: dict[int, Fingerprint | None] = {}
        for k, rank in enumerate(self._members):
            entry = self._words[k * ROW_WORDS + slot]
            if entry >> 31 == self._seq:
                calls[rank] = self.read_fingerprint(k * ROW_WORDS, entry & 0x7FFFFFFF)
        return mismatch_message(calls, self._me)

    def raise_if_deadlocked(self) -> None:
        """Raise if the current call can never complete."""
        reason = self.deadlock_reason()
        if reason:
            raise MismatchError(reason)

    def deadlock_reason(self) -> str | None:
        """The reason why the current call can never complete, if that is certain."""
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
                    rank: self.read_fingerprint(peer, gave_up & 0x7FFFFFFF),
                }
                return mismatch_message(calls, self._me)
            if self._words[peer + LEFT] and abs(self._words[peer + STATUS]) < seq:
                call = self._fingerprints.get(mine & 0x7FFFFFFF)
                return f"rank {rank} has left the program, rank {self._me} waits in {call}: make all ranks call it"
        return None

    def check_stall(self, digest: int, seconds: float, positions: list[int]) -> None:
        """Check a call in shared memory that waits for some members: raise if they can never enter it, warn if slow."""
        words, seq = self._words, self._seq
        call = self._fingerprints.get(digest)
        for position in positions:
            rank, row = self._members[position], position * ROW_WORDS
            entered = words[row + STATUS] == seq + 1
            other = self.read_fingerprint(row, words[row + (seq + 1) % CALLS] & 0x7FFFFFFF) if entered else None
            if other or words[row + LEFT]:
                words[self._base + GAVE_UP] = (seq << 31) | digest
                raise MismatchError(
                    mismatch_message({self._me: call, rank: other}, self._me)
                    if other
                    else f"rank {rank} has left the program, rank {self._me} waits in {call}: make all ranks call it"
                )
        if positions and seconds > stall_seconds() and self._warned != (seq, digest):
            self._warned = (seq, digest)
            absent = format_ranks([self._members[position] for position in positions])
            log_line(f"rank {self._me}: {call} not complete after {seconds:.0f} s; missing: {absent}")

    def missing_ranks(self) -> list[int]:
        """The members that have not entered the current call."""
        reached = [abs(self._words[k * ROW_WORDS + STATUS]) for k in range(len(self._members))]
        return [rank for rank, seq in zip(self._members, reached, strict=True) if seq < self._seq]

    def describe_call(self) -> str:
        """The current call, for log lines."""
        call = self._fingerprints.get(self._words[self._base + self._seq % CALLS] & 0x7FFFFFFF)
        return f"{call} (call {self._seq})"

    def close(self) -> None:
        """Release the views of the memory, whose owner frees it, and leave the watchdog."""
        _tables.discard(self)
        self._words.release()
        self._octets.release()

    def mark_left(self) -> None:
        """Tell the other ranks that this rank makes no more calls."""
        with contextlib.suppress(ValueError):
            self._words[self._base + LEFT] = 1


_tables: weakref.WeakSet[ConsistencyTable] = weakref.WeakSet()
_watchdog: list[threading.Thread] = []


def watch(table: ConsistencyTable) -> None:
    """Add a table to those that the watchdog checks; the first one starts the watchdog."""
    _tables.add(table)
    if not _watchdog:
        _watchdog.append(threading.Thread(target=run_watchdog, name="hpccomm-watchdog", daemon=True))
        _watchdog[0].start()
        atexit.register(mark_all_left)


def mark_all_left() -> None:
    """At exit, tell the other ranks of all communicators."""
    for table in list(_tables):
        table.mark_left()


def stall_seconds() -> float:
    """Seconds after which the watchdog names the ranks that are missing (``HPCCOMM_STALL_SECONDS``, 60)."""
    return float(os.environ.get("HPCCOMM_STALL_SECONDS", "60"))


def run_watchdog() -> None:
    """Abort calls that can never complete, with the reason; log calls that take long."""
    since: weakref.WeakKeyDictionary[ConsistencyTable, tuple[int, float]] = weakref.WeakKeyDictionary()
    warned: weakref.WeakKeyDictionary[ConsistencyTable, int] = weakref.WeakKeyDictionary()
    while True:
        time.sleep(PERIOD)
        for table in list(_tables):
            seq = table.active_seq
            before, began = since.get(table, (0, 0.0))
            if not seq or seq != before:
                since[table] = (seq, time.monotonic())
                continue
            with contextlib.suppress(ValueError):
                check_progress(table, seq, time.monotonic() - began, warned)


def check_progress(table: ConsistencyTable, seq: int, waited: float, warned: Any) -> None:
    """Check a call in which this rank has been for at least one period."""
    reason = table.deadlock_reason()
    if reason and waited > 2 * PERIOD and table.active_seq == seq:
        abort_all(reason)
    if waited > stall_seconds() and warned.get(table) != seq:
        warned[table] = seq
        names = format_ranks(table.missing_ranks()) if table.missing_ranks() else "no rank of this node"
        log_line(f"rank {table._me}: {table.describe_call()} not complete after {waited:.0f} s; missing: {names}")


def log_line(sentence: str) -> None:
    """Write one line to stderr with a single call, so that lines of different ranks do not mix."""
    sys.stderr.write(f"[hpccomm] {sentence}\n")
    sys.stderr.flush()


def abort_all(reason: str) -> None:
    """Log the reason and abort all ranks."""
    from mpi4py import MPI

    log_line(reason)
    time.sleep(FLUSH_SECONDS)
    MPI.COMM_WORLD.Abort(1)
