"""The consistency table: each rank writes the fingerprint of its next call into memory that its node shares.

*seq counts the collective calls of one communicator; an entry is seq and a fingerprint's digest in one 64-bit integer*,
so a reader never sees half an entry.  Reading an entry costs no message.  A rank that enters a call compares its entry
with those of the ranks that have entered before.  The watchdog ends a call that can never complete.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.calls.blocks import OBJECT_SIGNATURES, Amounts
from hpccomm.calls.departures import Departure, Wire
from hpccomm.calls.fingerprint import (
    REMEDIES,
    TEXT_BYTES,
    UNKNOWN,
    Fingerprint,
    decode,
    find_difference,
    first_difference,
    mismatch_message,
)
from hpccomm.calls.reports import Reports
from hpccomm.errors import HpccommError, MismatchError, TransportError
from hpccomm.kernels.entry.records import (
    AMOUNT_CALLS,
    CALLS,
    COUNT_MASK,
    COUNT_PRIME,
    COUNT_SHIFT,
    COUNTS,
    DIGEST_BITS,
    DIGEST_MASK,
    NOT_COMPARED,
    STATUS,
)
from hpccomm.observe.processes import find_process
from hpccomm.transports.polling import CHECK_SECONDS, LONGEST_SECONDS, pause

TEXTS = 64
LEFT, GAVE_UP, HAS_CODE, PROCESS, REFUSED, FAILED, FAILED_BEFORE, CLOSED = (STATUS + k for k in range(1, 9))
TEXT_WORDS = TEXT_BYTES // 8 + 1
FIRST_TEXT = COUNTS + CALLS
ISSUED = FIRST_TEXT + TEXTS * TEXT_WORDS
OUT_OF_STEP, WANTED, ELSEWHERE, ISSUED_ELSEWHERE, FIRST_ISSUE = (ISSUED + k for k in range(1, 6))
FIRST_CLAIM, CLAIMS = FIRST_ISSUE + 2 * CALLS, 8
FIRST_AMOUNTS = FIRST_CLAIM + CLAIMS

TEXT_SECONDS = 5.0
"""How long a rank that compares waits for the text of another rank's call, whose watchdog writes it as soon as the
program's own C code lets go of Python's lock."""

LEAVE_SECONDS = 5.0
"""How long a rank that an exception has ended waits for another one that is still in the same call."""

MEETING_SECONDS = 1.0
"""Seconds after which a rank that is in a call of MPI counts as one that will not come to this rank's barrier."""

EAGER_POLLS, EAGER_SECONDS = 20, 1e-4
"""How long a rank waits for another one to enter a call before it yields its core, and then before it sleeps."""
COUNTED = 1024
"""Fingerprints with a count that a rank knows by their digests alone."""

REASON_BYTES = 512
MOST_RANKS = 1 << 24
"""A number of calls and a rank are one word."""


def row_words(members: int) -> int:
    """64-bit words per rank: entries of the last calls, the status, counts of the last calls, fingerprints as text.

    Then the number of non-blocking calls, the digest of a text that this rank wants to read, who has gone on other
    nodes after the fewest blocking and non-blocking calls, and of the last non-blocking calls the entry and the number
    of blocking calls before it; claims to errors; amounts of blocks; a reason.
    """
    return FIRST_AMOUNTS + AMOUNT_CALLS * (1 + 2 * members) + REASON_BYTES // 8


def bytes_needed(members: int) -> int:
    """Shared bytes for the ranks of one node."""
    return 8 * members * row_words(members)


class Gone(NamedTuple):
    """A rank that makes no more calls of a communicator."""

    calls: int
    """How many it has made."""
    rank: int
    freed: bool
    """Whether it has freed the communicator, and not left the program."""

    def encode(self) -> int:
        """One word, not 0, of which that with fewer calls is less."""
        return (self.calls * MOST_RANKS + self.rank) * 2 + self.freed + 1

    @classmethod
    def decode(cls, word: int) -> Gone:
        """The rank of a word."""
        calls, rank = divmod(word - 1 >> 1, MOST_RANKS)
        return cls(calls, rank, bool(word - 1 & 1))


class ConsistencyTable:
    """One rank's view of its node's table.

    ``memory`` is zeroed memory that all members share, ``members`` are their ranks in the communicator, ``me`` is this
    rank.
    """

    def __init__(self, memory: Any, members: tuple[int, ...], me: int) -> None:
        self._octets = memoryview(memory)
        self._words = self._octets.cast("q")
        self.members, self._me = members, me
        self._stride = row_words(len(members))
        self._base = members.index(me) * self._stride
        self._peers = [k * self._stride for k, rank in enumerate(members) if rank != me]
        self._others = [rank for rank in members if rank != me]
        self._fingerprints: dict[int, Fingerprint] = {}
        """By digest: those of calls without a count, and the templates of all others."""
        self._counted: OrderedDict[int, Fingerprint] = OrderedDict()
        """The last :data:`COUNTED` with a count, of which a program may use any number."""
        self._compatible: set[tuple[int, int] | frozenset[int]] = set()
        self.progress: Callable[[], Any] = lambda: None
        """Lets MPI make progress with pending messages."""
        self.last_shared_call: Callable[[int], tuple[int, int]] = lambda k: (0, 0)
        """Number and fingerprint of member k's last call in shared memory, which has no entry here."""
        self.between: Any = None
        """Compares calls between nodes (:class:`hpccomm.calls.between_nodes.BetweenNodes`), if there are several."""
        self.wire: Wire | None = None
        """To other nodes, if there are several."""
        self.entered = EnteredCall(self, self.leave, lambda: None)
        """Around the calls that are entered and left by :meth:`enter` or :meth:`begin` and :meth:`leave`."""
        self.met = 0
        """The last call of objects in which all ranks have met, while compiled functions are awaited."""
        self._told = 0
        """The last call of which this rank has said that another one refuses it."""
        self._raised: deque[int] = deque(maxlen=CALLS)
        """Calls that this rank has left by an error, which it has raised."""
        self._told_elsewhere = 0
        """The last call of which other nodes know that this rank refuses it."""
        self.awaited = 0
        """The call of a non-blocking request of MPI, while this rank waits for it."""
        self._doubt: tuple[int, bool] | None = None
        """The call that :meth:`doubt` has noted."""
        self._writing = threading.Lock()
        """Held while a text is written, by a call or by the watchdog."""
        self._words[self._base + PROCESS] = os.getpid()
        _tables.add(self)

    @property
    def processes(self) -> dict[int, int]:
        """The number of the process of each member that has opened the table."""
        found = {rank: self._words[k * self._stride + PROCESS] for k, rank in enumerate(self.members)}
        return {rank: pid for rank, pid in found.items() if pid}

    @property
    def _seq(self) -> int:
        """The number of the call that this rank is executing, or has executed last."""
        return abs(self._words[self._base + STATUS])

    @property
    def calls(self) -> int:
        """How many calls this rank has entered: the same number on all ranks on entering one."""
        return self._seq

    @property
    def active_seq(self) -> int:
        """The number of the call that this rank is executing; 0 between calls."""
        return max(0, self._words[self._base + STATUS])

    def abandon(self) -> None:
        """Leave a call that has failed."""
        words, seq = self._words, self._seq
        self._raised.append(seq)
        if words[self._base + FAILED] != seq:
            words[self._base + FAILED_BEFORE] = words[self._base + FAILED]
            words[self._base + FAILED] = seq
        words[self._base + STATUS] = -seq

    @property
    def place(self) -> dict[str, int]:
        """Where compiled code finds the table: its address, bytes of a row, its rows, this rank's row, and amounts."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._octets))
        rows = {"members": len(self.members), "member": self._base // self._stride}
        return {"entries": address, "row_bytes": 8 * self._stride, "amounts_at": 8 * FIRST_AMOUNTS, **rows}

    def announce(self, fingerprint: Fingerprint) -> int:
        """Write the fingerprint of a future call; returns its word for :meth:`enter`."""
        digest = fingerprint.digest
        if fingerprint.count not in ("", "0", UNKNOWN):
            if fingerprint.number:
                self.announce(fingerprint.template)
            self._counted[digest] = fingerprint
            if len(self._counted) > COUNTED:
                self._counted.popitem(last=False)
        else:
            self._fingerprints[digest] = fingerprint
        start = 8 * (self._base + FIRST_TEXT + (digest % TEXTS) * TEXT_WORDS)
        if self._words[start // 8] != digest:  # never written, or overwritten by another call
            with self._writing:
                self._words[start // 8] = 0
                self._octets[start + 8 : start + 8 + TEXT_BYTES] = fingerprint.encode()
                self._words[start // 8] = digest
        return fingerprint.word

    def write_wanted_texts(self) -> None:
        """Write again what other calls of this rank have overwritten, and a member wants to read."""
        for peer in self._peers:
            wanted = self.find_fingerprint(self._base, self._words[peer + WANTED])
            if wanted:
                self.announce(wanted)

    def enter(self, word: int, amounts: Amounts | None = None) -> None:
        """Enter the call whose fingerprint has this word; raise if a rank that has entered before made another one."""
        self.begin(word, amounts)
        self.compare_nodes(amounts)
        self.stay_in_reach(amounts)
        self.compare_entries()

    def compare_nodes(self, amounts: Amounts | None = None, always: bool = False) -> None:
        """Compare this call with those of other nodes' ranks, if it is one that is compared (collective then)."""
        seq = self._seq
        if self.between and self.between.takes(seq, always):
            entry, call = self._words[self._base + seq % CALLS], self.find_call(self._base)
            self.between.compare(entry, call, amounts)

    def stay_in_reach(self, amounts: Amounts | None = None) -> None:
        """Wait for members that are so far behind that this rank would overwrite what they have to compare."""
        if self._is_out_of_reach(self._seq, amounts):
            self.wait(amounts)

    def _is_out_of_reach(self, seq: int, amounts: Amounts | None) -> bool:
        """Whether a member is that far behind call ``seq``.

        A call with amounts overwrites those of an older one.  Entries are many: every 32nd call looks, and so speaks
        for all up to the next that does.
        """
        reach, last = (AMOUNT_CALLS - 1, seq) if amounts else (CALLS // 2, seq + 1)
        asks = amounts or last % reach == 0
        return bool(asks) and any(abs(self._words[peer + STATUS]) + reach < last for peer in self._peers)

    def begin(self, word: int, amounts: Amounts | None = None, settles: bool = True) -> None:
        """Enter a call without comparing it; one that moves nothing of its own need not :meth:`settle`."""
        if settles:
            self.settle()
        words, seq = self._words, self._seq + 1
        if amounts and not self._is_out_of_reach(seq, amounts):
            self._write_amounts(seq, amounts)
        words[self._base + COUNTS + seq % CALLS] = word >> COUNT_SHIFT
        words[self._base + seq % CALLS] = (seq << DIGEST_BITS) | (word & DIGEST_MASK)
        words[self._base + STATUS] = seq

    def leave(self) -> None:
        """Leave a call; raise if another rank called something else."""
        self.compare_entries()
        self._words[self._base + STATUS] = -self._seq

    def doubt(self, one_way: bool) -> None:
        """Note that an exception of the program's own code has ended the last call of this rank.

        ``one_way``: another rank may have completed it and sent what this one has not received.
        """
        self._doubt = self._seq, one_way

    def settle(self) -> None:
        """Raise if the ranks are out of step after a call that :meth:`doubt` has noted; wait until they have left it.

        They are in step if all have failed in it, as by an object that cannot be pickled; of ranks of other nodes this
        one does not know that.  Also if this rank has failed after all messages of a call that no other rank can
        complete without them.
        """
        if self._doubt is None:
            return
        (seq, one_way), began = self._doubt, time.monotonic()
        for peer, rank in zip(self._peers, self._others, strict=True):
            entered = 0.0
            while self.count_left(peer) < seq:
                pause(began, EAGER_SECONDS, 8)
                self.progress()
                if self.is_gone(peer):
                    raise MismatchError(self.explain_departure(rank, self.find_call(self._base, seq)))
                if self._words[peer + STATUS] == seq:
                    now = time.monotonic()
                    entered = entered or now
                    if now - entered > LEAVE_SECONDS:
                        break
        left = all(self.count_left(peer) >= seq for peer in self._peers)
        failed = [{self._words[peer + FAILED], self._words[peer + FAILED_BEFORE]} for peer in self._peers]
        if not left or (one_way and (self.between or not all(seq in each for each in failed))):
            raise TransportError(
                f"rank {self._me}: an exception has ended the last call before it was complete, so this communicator "
                "is out of step: free it and make a new one"
            )
        self._doubt = None

    def miss_call(self) -> None:
        """Count a call that other members have entered, and that has failed because this one made another."""
        self._raised.append(self._seq + 1)
        self._words[self._base + STATUS] = -self._raised[-1]

    def compare_entries(self) -> None:
        """Raise if a rank that has entered this call, too, called something else."""
        words, seq = self._words, self._seq
        slot = seq % CALLS
        mine = words[self._base + slot]
        for peer in self._peers:
            theirs = words[peer + slot]
            if theirs >> DIGEST_BITS == seq:
                if theirs != mine:
                    self.compare(mine, theirs, peer)
                self.compare_amounts(peer)

    def _find_amounts(self, row: int, seq: int) -> int:
        """Where the amounts of a rank's call are: its number, what it sends to each member, what it receives."""
        return row + FIRST_AMOUNTS + seq % AMOUNT_CALLS * (1 + 2 * len(self.members))

    def _write_amounts(self, seq: int, amounts: Amounts) -> None:
        """Write what this rank sends to each rank of this node in call ``seq``, and receives from each."""
        start, number = self._find_amounts(self._base, seq), len(self.members)
        self._words[start] = 0
        for k, rank in enumerate(self.members):
            self._words[start + 1 + k] = amounts.sends[rank]
            self._words[start + 1 + number + k] = amounts.receives[rank]
        self._words[start] = seq

    def compare_amounts(self, peer: int) -> None:
        """Raise if a rank of this node sends another amount than this one receives from it, or the other way round."""
        words, seq, number = self._words, self._seq, len(self.members)
        mine, theirs = self._find_amounts(self._base, seq), self._find_amounts(peer, seq)
        if words[mine] != seq or words[theirs] != seq:
            return
        me, member = self._base // self._stride, peer // self._stride
        own, others = ((words[at + 1 + k], words[at + 1 + number + k]) for at, k in ((mine, member), (theirs, me)))
        difference = self.explain_amounts(self.members[member], own, others)
        if difference:
            raise MismatchError(difference)

    def explain_amounts(self, rank: int, mine: Sequence[int], theirs: Sequence[int]) -> str:
        """The error sentence if this rank and another one do not send each other what they receive; else empty.

        ``mine`` are the bytes that this rank sends to that one and receives from it, ``theirs`` are the other one's.
        """
        me = self._me
        for sender, sent, receiver, room in ((me, mine[0], rank, theirs[1]), (rank, theirs[0], me, mine[1])):
            if sent != room and NOT_COMPARED not in (sent, room):
                call = self.find_call(self._base)
                item = np.dtype(call.dtype).itemsize if call and call.dtype in np.sctypeDict else 1
                unit = call.dtype if call and item > 1 else "bytes"
                return (
                    f"rank {sender} called {call} and sends {sent // item} {unit} to rank {receiver}, which receives "
                    f"{room // item} from it: {REMEDIES['amounts']} (noticed by rank {me})"
                )
        return ""

    def wait(self, amounts: Amounts | None = None) -> None:
        """Wait until every member has entered this call, then compare; all members raise if one differs.

        ``amounts`` that :meth:`begin` has not written are written when all members are in reach, which is before they
        enter.  The waiting rank drives MPI: a member may still wait for the end of a message that it has sent before.
        """
        words, seq = self._words, self._seq
        slot = seq % CALLS
        for peer, rank in zip(self._peers, self._others, strict=True):
            polls, began, checked = 0, 0.0, 0.0
            while words[peer + slot] >> DIGEST_BITS < seq:
                polls += 1
                self._complete(amounts)
                if polls <= EAGER_POLLS:
                    continue
                now = time.monotonic()
                began, checked = began or now, checked or now
                pause(began, EAGER_SECONDS, 8)
                self.progress()
                if now - checked > CHECK_SECONDS:
                    checked = now
                    self.raise_if_deadlocked()
                    if now - began > MEETING_SECONDS:
                        self.raise_if_refused(peer, rank)
        self._complete(amounts)
        self.compare_entries()
        self.compare_others()

    def compare_others(self) -> None:
        """Raise if two members have entered calls that contradict each other, though neither contradicts this one's."""
        slot = self._seq % CALLS
        digests = frozenset(self._words[k * self._stride + slot] & DIGEST_MASK for k in range(len(self.members)))
        if len(digests) <= 2 or digests in self._compatible:
            return
        calls = self.list_calls(self._seq).values()
        if find_difference(calls):
            raise MismatchError(self.explain())
        if None not in calls:
            self._compatible.add(digests)

    def _complete(self, amounts: Amounts | None) -> None:
        """Write the amounts of this call, if all members are in reach and :meth:`begin` has not."""
        if amounts is None:
            return
        seq = self._seq
        if self._words[self._find_amounts(self._base, seq)] != seq and not self._is_out_of_reach(seq, amounts):
            self._write_amounts(seq, amounts)

    def announce_code(self) -> None:
        """Write the number of the first call at whose entry this rank had the compiled functions."""
        if not self._words[self._base + HAS_CODE]:
            self._words[self._base + HAS_CODE] = self._seq

    def all_had_code(self) -> bool:
        """Whether all members had them on entering this call, which all have entered: the same answer on all.

        False in a call of objects, which may have failed on this rank alone: :meth:`all_had_code_in_objects` tells it
        before the next one.
        """
        call = self.find_call(self._base)
        return self._all_had_code_in(self._seq) and not (call and call.collective in OBJECT_SIGNATURES)

    def all_had_code_in_objects(self) -> bool:
        """Whether all members had them on entering the last call of objects in which all have met.

        All have left it when this returns; raises as :meth:`settle` does.
        """
        self.settle()
        return self._all_had_code_in(self.met)

    def _all_had_code_in(self, seq: int) -> bool:
        return all(0 < self._words[k * self._stride + HAS_CODE] <= seq for k in range(len(self.members)))

    def compare(self, mine: int, theirs: int, peer: int) -> None:
        """Compare the fingerprints of two different entries of this call; raise if they contradict each other."""
        digest, other = mine & DIGEST_MASK, theirs & DIGEST_MASK
        if (digest, other) in self._compatible:
            return
        a, b = self.find_call(self._base), self.find_call(peer)
        if b is None:  # its watchdog will write it, and this one looks again
            return
        if a is not None and first_difference(a, b) is None:
            self._compatible.add((digest, other))
            return
        raise MismatchError(self.explain())

    def find_call(self, row: int, seq: int = 0) -> Fingerprint | None:
        """The call that a rank has entered under number ``seq``, by default that of this rank's call."""
        seq = seq or self._seq
        entry, count = self._words[row + seq % CALLS], self._words[row + COUNTS + seq % CALLS]
        if entry >> DIGEST_BITS != seq:
            return None
        return self.find_text(row, entry & DIGEST_MASK, count)

    def find_text(self, row: int, digest: int, count: int) -> Fingerprint | None:
        """A rank's fingerprint for a digest, which may be that of a template and a count.

        This rank's own text is written again.  If other calls have overwritten that of another rank, this rank says
        that it wants it, and waits: a rank that compares writes its own, and so does the watchdog of one that has gone
        on.
        """
        until, template_of = time.monotonic() + TEXT_SECONDS, (digest - count * COUNT_PRIME) & DIGEST_MASK
        try:
            while True:
                found = self.find_fingerprint(row, digest)
                if found is None and count:
                    template = self.find_fingerprint(row, template_of)
                    found = template and template._replace(count=str(count))
                if found and row == self._base:
                    self.announce(found)
                if found or row == self._base or time.monotonic() > until:
                    return found
                self._words[self._base + WANTED] = template_of
                time.sleep(LONGEST_SECONDS)
                self.write_wanted_texts()  # of this rank, for one that waits as well
        finally:
            self._words[self._base + WANTED] = 0

    def find_fingerprint(self, row: int, digest: int) -> Fingerprint | None:
        """A rank's fingerprint for a digest; that of this rank is never overwritten."""
        if row != self._base:
            return self.read_fingerprint(row, digest)
        return self._fingerprints.get(digest) or self._counted.get(digest)

    def read_fingerprint(self, row: int, digest: int) -> Fingerprint | None:
        """A rank's fingerprint for a digest, unless it has been overwritten."""
        start = 8 * (row + FIRST_TEXT + (digest % TEXTS) * TEXT_WORDS)
        if self._words[start // 8] != digest:
            return None
        text = bytes(self._octets[start + 8 : start + 8 + TEXT_BYTES])
        return decode(text) if self._words[start // 8] == digest else None

    def look_up_call(self, rank: int, word: int) -> Fingerprint | None:
        """The call of a rank of this node whose fingerprint has this word, or this digest."""
        row = self.members.index(rank) * self._stride if rank in self.members else self._base
        return self.find_text(row, word & DIGEST_MASK, word >> COUNT_SHIFT & COUNT_MASK)

    def explain(self) -> str:
        """The error sentence for the current call."""
        return mismatch_message(self.list_calls(self._seq), self._me)

    def list_calls(self, seq: int) -> dict[int, Fingerprint | None]:
        """What the members have entered under number ``seq``; those that have not, or long ago, are left out."""
        rows = {rank: k * self._stride for k, rank in enumerate(self.members)}
        entered = [rank for rank, row in rows.items() if self._words[row + seq % CALLS] >> DIGEST_BITS == seq]
        return {rank: self.find_call(rows[rank], seq) for rank in entered}

    # A call that one rank has completed before another one refuses it, because theirs differ

    def refuse(self, error: BaseException) -> None:
        """Tell the members that have completed this call that this rank has not."""
        self._raised.append(self._seq)
        self.write_reason(error)
        self._words[self._base + REFUSED] = self._seq

    def take_own_refusal(self) -> tuple[int, str] | None:
        """The last call that this rank refuses, once, and why, unless a lower rank of this node refuses it, too."""
        seq, lower = self._words[self._base + REFUSED], range(0, self._base, self._stride)
        if seq <= self._told_elsewhere or any(self._words[row + REFUSED] == seq for row in lower):
            return None
        self._told_elsewhere = seq
        return seq, f"rank {self._me} has left: {self.read_reason(self._me)}"

    def describe_waiting(self, seq: int) -> str:
        """Which rank of this node waits in which call, if that is call ``seq`` and none has to enter it."""
        rows = {rank: k * self._stride for k, rank in enumerate(self.members)}
        waiting = [rank for rank, row in rows.items() if self._words[row + STATUS] == seq]
        if not waiting or any(self.count_entered(row) < seq for row in rows.values()):
            return ""
        return f"rank {waiting[0]} waits in {self.find_call(rows[waiting[0]], seq)}"

    def count_left(self, row: int) -> int:
        """How many calls a rank has left."""
        status = self._words[row + STATUS]
        return max(-status, status - 1)

    def count_completed(self, row: int) -> int:
        """The same, without a last one that it has left by an error."""
        last = self.count_left(row)
        return last - (last > 0 and self._words[row + FAILED] == last)

    def count_entered(self, row: int) -> int:
        """How many calls a rank has entered."""
        return abs(self._words[row + STATUS])

    def is_ahead(self) -> bool:
        """Whether a member that runs has not left the last call of this rank yet."""
        last, words = self.count_completed(self._base), self._words
        behind = (peer for peer in self._peers if self.count_left(peer) < last and not self.is_gone(peer))
        return any(find_process(words[peer + PROCESS]).started for peer in behind)

    def take_refusal(self) -> str:
        """The sentence for a call that this rank has completed and another one refuses, once; empty if none is new."""
        last, members = self.count_completed(self._base), zip(self._peers, self._others, strict=True)
        found = {self._words[peer + REFUSED]: rank for peer, rank in members}
        new = [seq for seq in found if self._told < seq <= last and seq not in self._raised]
        if not new:
            return ""
        self._told = min(new)
        return self.explain_refusal(self._told, found[self._told])

    def raise_if_refused(self, peer: int, rank: int) -> None:
        """Raise if a rank has made no call since one that it refuses and this rank has completed."""
        refused = self._words[peer + REFUSED]
        alone = 0 < refused <= self.count_completed(self._base) and refused not in self._raised
        if alone and refused == -self._words[peer + STATUS]:
            raise MismatchError(self.explain_refusal(refused, rank))

    def explain_refusal(self, seq: int, rank: int) -> str:
        """The error sentence for a call that this rank has completed and another one refuses."""
        calls, reason = self.list_calls(seq), self.read_reason(rank)
        if self._me in calls and find_difference(calls.values()):
            reason = mismatch_message(calls, self._me)
        return f"rank {self._me}: the ranks' calls were different in one that this rank has completed: {reason}"

    def explain_departure(self, rank: int, call: Fingerprint | None) -> str:
        """The error sentence for a call that waits for a rank which makes no more calls."""
        gone = "freed this communicator" if self.has_freed(rank) else "left the program"
        return f"rank {rank} has {gone}, rank {self._me} waits in {call}: make all ranks call it"

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
        for peer, rank in zip(self._peers, self._others, strict=True):
            theirs = self._words[peer + slot]
            if theirs >> DIGEST_BITS == seq:
                try:
                    if theirs != mine:
                        self.compare(mine, theirs, peer)
                    self.compare_amounts(peer)
                except MismatchError as error:
                    return str(error)
            gave_up = self._words[peer + GAVE_UP]
            if gave_up and gave_up >> DIGEST_BITS == seq - 1:
                calls = {
                    self._me: self.find_call(self._base),
                    rank: self.read_fingerprint(peer, gave_up & DIGEST_MASK),
                }
                return mismatch_message(calls, self._me)
        call = self.find_call(self._base)
        gone = self.find_departure()
        if gone is not None:
            return self.explain_departure(gone, call)
        return self.explain_issue_after(call) or self.explain_waiting(call)

    def explain_waiting(self, call: Fingerprint | None) -> str | None:
        """The error sentence if another rank refuses this call, and none is to come that could complete it.

        Calls of other ranks can contradict each other, and none of them this rank's: one of them sends another one too
        much, and the rest get nothing.
        """
        members = zip(self._peers, self._others, strict=True)
        refusing = [rank for peer, rank in members if self._words[peer + REFUSED] == self._seq]
        if not refusing or self.missing_ranks():
            return None
        return f"rank {self._me} waits in {call}, which rank {refusing[0]} has left: {self.read_reason(refusing[0])}"

    # Ranks that are gone: they have left the program, or freed the communicator

    def is_gone(self, row: int) -> bool:
        """Whether a rank of this node makes no more calls."""
        return bool(self._words[row + LEFT] or self._words[row + CLOSED])

    def has_freed(self, rank: int) -> bool:
        """Whether a rank that is gone has freed the communicator, and not left the program."""
        if rank in self.members:
            return not self._words[self.members.index(rank) * self._stride + LEFT]
        return any(
            each.rank == rank and each.freed for at in (ELSEWHERE, ISSUED_ELSEWHERE) for each in self._list_gone(at)
        )

    def find_departure(self, entered: bool = False, seq: int = 0) -> int | None:
        """A rank that is gone without call ``seq``, by default the current one, as far as this node knows.

        It has not completed it; with ``entered`` one of this node has not even entered it.
        """
        seq = seq or self._seq
        gone = [each for each in (*self._list_gone_here(entered), *self._list_gone(ELSEWHERE)) if each.calls < seq]
        return min(gone).rank if gone else None

    def explain_awaited(self) -> str | None:
        """The error sentence if a rank is gone without the call for whose request this one waits."""
        rank = self.find_departure(seq=self.awaited) if self.awaited else None
        return None if rank is None else self.explain_departure(rank, self.find_call(self._base, self.awaited))

    def _list_gone_here(self, entered: bool = False) -> list[Gone]:
        """Those of this node, with the calls that they have completed, or entered: one that frees may wait in one."""
        found = []
        for k, rank in enumerate(self.members):
            row, freed = k * self._stride, self.has_freed(rank)
            if self.is_gone(row):
                count = self.count_entered if freed or entered else self.count_completed
                found.append(Gone(count(row), rank, freed))
        return found

    def _list_gone(self, at: int) -> list[Gone]:
        """Those of other nodes, by the messages of those, with the calls that a word of this node counts."""
        words = [self._words[k * self._stride + at] for k in range(len(self.members))]
        return [Gone.decode(each) for each in words if each]

    def note_departure(self, *departure: int) -> bool:
        """Note who is gone on other nodes after the fewest blocking and non-blocking calls; whether that is new."""
        found = False
        with contextlib.suppress(ValueError):  # the table is closed
            for at, word in zip((ELSEWHERE, ISSUED_ELSEWHERE), departure, strict=True):
                known = self._words[self._base + at]
                if Gone.decode(word).rank not in self.members and (word < known or not known):
                    self._words[self._base + at], found = word, True
        return found

    def tell_gone(self) -> None:
        """Tell the next node which ranks are gone after the fewest calls, if this one is among those of its node.

        Not if the rank that would receive it is the only one to be named.
        """
        wire = self.wire
        if wire is None:
            return
        wire.receive()
        here = self._list_gone_here()
        rows = {rank: k * self._stride for k, rank in enumerate(self.members)}
        issued = [each._replace(calls=self._words[rows[each.rank] + ISSUED]) for each in here]
        first = [min([*each, *self._list_gone(at)]) for each, at in ((here, ELSEWHERE), (issued, ISSUED_ELSEWHERE))]
        if self._me in (min(here).rank, min(issued).rank) and any(each.rank != wire.receiver for each in first):
            wire.tell([each.encode() for each in first])

    def check_issued(self, number: int, call: Fingerprint) -> None:
        """Raise if a rank of another node is gone before its non-blocking call of this number."""
        gone = min(self._list_gone(ISSUED_ELSEWHERE), default=None)
        if gone and gone.calls < number:
            raise MismatchError(self.explain_departure(gone.rank, call))

    def check_stall(self, word: int, seconds: float, find_missing: Callable[[], list[int]]) -> None:
        """Check a call in shared memory that waits for some members: raise if they can never enter it.

        ``word`` is that of the call's fingerprint.  A member that is found elsewhere may have entered and left this
        call since it was missing, so ``find_missing`` is asked again.  One that has entered the same call in the table
        is on its way to the barrier there, which takes long on a busy machine.  One that has already left a call in the
        table that this rank has not made is out of step.  The call may be made inside one of the table, by its object.
        """
        positions = find_missing()
        words, digest, active = self._words, word & DIGEST_MASK, self.active_seq
        inner = active and words[self._base + active % CALLS] & DIGEST_MASK != digest
        behind = inner or not active
        number = self._seq + 1 if behind else active
        call = self.look_up_call(self._me, word)
        for position in positions:
            rank, row = self.members[position], position * self._stride
            ahead = behind and abs(words[row + STATUS]) >= number
            entered = (ahead or words[row + STATUS] == number) and seconds > MEETING_SECONDS
            other = self.find_call(row, number) if entered else None
            if other is not None and call is not None and first_difference(call, other) is None:
                continue
            if (other or (ahead and entered) or self.is_gone(row)) and position in find_missing():
                if call:
                    self.announce(call)
                words[self._base + GAVE_UP] = (number - 1 << DIGEST_BITS) | digest
                different = mismatch_message({self._me: call, rank: other}, self._me) if entered else ""
                raise MismatchError(different or self.explain_departure(rank, call))
        reason = self.explain_issue_after(call) if seconds > MEETING_SECONDS else None
        if reason:
            raise MismatchError(reason)

    def write_reason(self, error: BaseException) -> None:
        """Tell the other ranks why this rank has left a call half done."""
        text = (
            str(error) if isinstance(error, HpccommError) else f"rank {self._me} raised {type(error).__name__}: {error}"
        )
        end = 8 * (self._base + self._stride)
        self._octets[end - REASON_BYTES : end] = text.encode()[:REASON_BYTES].ljust(REASON_BYTES)

    def read_reason(self, rank: int) -> str:
        """Why a rank has left a call half done; empty if it has not said."""
        end = 8 * (self.members.index(rank) + 1) * self._stride
        return bytes(self._octets[end - REASON_BYTES : end]).rstrip(b" \0").decode(errors="replace")

    def list_claims(self) -> list[int]:
        """What the other members have said of the last errors that they report (:mod:`hpccomm.calls.reports`)."""
        return [self._words[peer + FIRST_CLAIM + k] for peer in self._peers for k in range(CLAIMS)]

    def write_claim(self, number: int, claim: int) -> None:
        """Say that this rank reports its error of this number, or has done so."""
        self._words[self._base + FIRST_CLAIM + number % CLAIMS] = claim

    def watch_request(self, number: int, waits: bool) -> None:
        """Compare call ``number``, which MPI makes without blocking, unless this rank has made another one since.

        While this rank ``waits`` for the last call, it is in it, so other ranks and the watchdog see that; while it
        waits for an earlier one, the watchdog looks only for ranks that are gone without that.
        """
        self.awaited = number if waits else 0
        if self._seq == number:
            self._words[self._base + STATUS] = number if waits else -number
            try:
                self.compare_entries()
            except MismatchError as error:
                self.refuse(error)
                raise

    # Non-blocking calls, which are made on another communicator: here the ranks only compare their order

    def blocking_calls(self, k: int) -> int:
        """How many blocking calls member k has entered: the same number on all members before the same call."""
        return abs(self._words[k * self._stride + STATUS]) + self.last_shared_call(k)[0]

    def blocking_calls_here(self) -> int:
        """How many blocking calls this rank has entered."""
        return self.blocking_calls(self._base // self._stride)

    def issue(self, fingerprint: Fingerprint, blocking_calls: int) -> int:
        """Write a non-blocking call that this rank issues, after so many blocking ones; returns its number."""
        number = self._words[self._base + ISSUED] + 1
        at = self._base + FIRST_ISSUE + 2 * (number % CALLS)
        self._words[at] = number << DIGEST_BITS | (self.announce(fingerprint) & DIGEST_MASK)
        self._words[at + 1] = blocking_calls
        self._words[self._base + ISSUED] = number
        return number

    def await_issue(self, number: int, blocking_calls: int, call: Fingerprint) -> None:
        """Sleep until all members have issued their non-blocking call of this number; raise if one never can.

        Members issue it after equally many blocking calls.
        """
        began = checked = time.monotonic()
        for position in range(len(self.members)):
            while not self.has_issued(position, number, call):
                pause(began, EAGER_SECONDS, 32)
                self.progress()
                now = time.monotonic()
                if now - began > MEETING_SECONDS and now - checked > CHECK_SECONDS:
                    checked = now
                    self.check_order(position, number, blocking_calls, call)

    def has_issued(self, k: int, number: int, call: Fingerprint) -> bool:
        """Whether member k has issued its non-blocking call of this number; raises if a member is out of step."""
        row = k * self._stride
        if self._words[self._base + OUT_OF_STEP]:
            raise TransportError(
                f"rank {self._me}: the ranks have made blocking and non-blocking calls in different orders, so this "
                "communicator is out of step: free it and make a new one"
            )
        if self._words[row + OUT_OF_STEP]:
            self.leave_step(call)
            other = self.read_fingerprint(row, self._words[row + OUT_OF_STEP] & DIGEST_MASK)
            raise MismatchError(mismatch_message({self._me: call, self.members[k]: other}, self._me))
        return bool(self._words[row + ISSUED] >= number)

    @property
    def is_out_of_step(self) -> bool:
        """Whether a member has found that non-blocking calls were made in another order."""
        return any(self._words[k * self._stride + OUT_OF_STEP] for k in range(len(self.members)))

    def leave_step(self, call: Fingerprint | None) -> None:
        """Tell the other members that this call was made in another order."""
        digest = self.announce(call) & DIGEST_MASK if call else 0
        self._words[self._base + OUT_OF_STEP] = 1 << DIGEST_BITS | digest

    def check_order(self, k: int, number: int, blocking_calls: int, call: Fingerprint) -> None:
        """Raise if member k has left, or has entered the next blocking call before this non-blocking one."""
        row, rank, (_, word) = k * self._stride, self.members[k], self.last_shared_call(k)
        ahead, gone = self.blocking_calls(k) > blocking_calls, self.is_gone(row)
        if self._words[row + ISSUED] >= number or not (ahead or gone):
            return
        self.leave_step(call)
        if not ahead:
            raise MismatchError(self.explain_departure(rank, call))
        active = self._words[row + STATUS]
        other = self.find_call(row, active) if active > 0 else self.look_up_call(rank, word)
        raise MismatchError(mismatch_message({self._me: call, rank: other}, self._me))

    def explain_issue_after(self, call: Fingerprint | None) -> str | None:
        """The error sentence if a member has issued a non-blocking call before this blocking one, and this rank not."""
        mine = self.blocking_calls_here()  # before the number: the program goes on while its watchdog looks
        number = self._words[self._base + ISSUED] + 1
        for peer, rank in zip(self._peers, self._others, strict=True):
            if self._words[peer + ISSUED] < number:  # the last of the words that it writes
                continue
            at = peer + FIRST_ISSUE + 2 * (number % CALLS)
            entry, before = self._words[at], self._words[at + 1]
            if entry >> DIGEST_BITS == number and before < mine:
                self.leave_step(call)
                calls = {self._me: call, rank: self.find_text(peer, entry & DIGEST_MASK, 0)}
                return mismatch_message(calls, self._me)
        return None

    def missing_ranks(self) -> list[int]:
        """The members that have not entered the current call."""
        reached = [abs(self._words[k * self._stride + STATUS]) for k in range(len(self.members))]
        return [rank for rank, seq in zip(self.members, reached, strict=True) if seq < self._seq]

    def left_ranks(self) -> list[int]:
        """The members that have left the program."""
        return [rank for k, rank in enumerate(self.members) if self._words[k * self._stride + LEFT]]

    def list_processes(self) -> list[tuple[int, bool]]:
        """The processes of the members that have the table open, and whether each has left the program."""
        rows = (k * self._stride for k in range(len(self.members)))
        with contextlib.suppress(ValueError):  # this rank has closed it
            words = self._words
            opened = [row for row in rows if words[row + PROCESS] and not words[row + CLOSED]]
            return [(words[row + PROCESS], bool(words[row + LEFT])) for row in opened]
        return []

    def close(self) -> None:
        """Release the views of the memory, whose owner frees it."""
        _tables.discard(self)
        self.mark_gone(freed=True)
        self._words.release()
        self._octets.release()

    def mark_gone(self, freed: bool = False) -> None:
        """Mark for the ranks of this node that this rank makes no more calls."""
        with contextlib.suppress(ValueError):
            self._words[self._base + (CLOSED if freed else LEFT)] = 1


class EnteredCall:
    """``with entered: …`` enters a call, makes it and leaves it, in which the ranks' calls are compared.

    ``leave`` ends a call that has succeeded, ``clear`` one that has failed with an error of MPI or ours.  An error of
    MPI or of the memory that ranks share becomes a MismatchError if the ranks' calls differ.
    """

    __slots__ = ("_clear", "_leave", "_table")

    def __init__(self, table: ConsistencyTable, leave: Callable[[], None], clear: Callable[[], None]) -> None:
        self._table, self._leave, self._clear = table, leave, clear

    def __enter__(self) -> None:
        """Nothing: the body enters, because entering can fail."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                self._leave()
            except BaseException as later:
                self._fail(later)
                raise
            return
        self._fail(error)
        if isinstance(error, MPI.Exception | HpccommError):
            self._clear()
        if isinstance(error, MPI.Exception | TransportError):
            try:
                self._table.compare_entries()
                self._table.raise_if_deadlocked()
            except MismatchError as reason:
                self._fail(reason)
                raise

    def _fail(self, error: BaseException) -> None:
        """Leave the call by an error; ranks that have completed it are told of a mismatch."""
        if isinstance(error, MismatchError):
            self._table.refuse(error)
        self._table.abandon()


_tables: weakref.WeakSet[ConsistencyTable] = weakref.WeakSet()
# Python sets names with an underscore to None first, so what this uses of this module exists when it is deleted.
_departure = Departure(_tables)
error_reports = Reports(_tables)
os.register_at_fork(after_in_child=_tables.clear)


def leave_program() -> None:
    """Tell the other ranks that this one makes no more calls, as MPI ends."""
    _departure.leave()


def meet_later(wire: Wire) -> None:
    """Let the next communicator that is freed, or the end of this process, wait for ranks that have not come."""
    _departure.unmet.append(wire)


def free_met() -> None:
    """Free what waited for ranks that have come since."""
    for _ in range(len(_departure.unmet)):
        with contextlib.suppress(IndexError):  # another thread frees, too
            wire = _departure.unmet.pop(0)
            if wire.has_met():
                wire.comm.Free()
            else:
                meet_later(wire)
