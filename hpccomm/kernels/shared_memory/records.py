"""Layouts of the records that shared-memory collectives read and write: every offset in compiled code comes from here.

*W: bytes of a word; one region a rank, all regions side by side in one segment.*

A region holds what the other ranks read: two lines that alternate from call to call, words and packets that each keep a
line of their own, two buffers and the ring of slots.  The state, the call and the tuning record are private to a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

W = 8
"""Bytes of a word."""
LINE_BYTES = 128
"""Bytes that a counter has to itself: processors fetch cache lines of 64 bytes in pairs."""
PAGE = 4096
"""Buffers and slots begin at multiples of this."""
BUFFER = 32768
"""Bytes of one buffer for calls of one barrier."""
RING = 4
"""Slots of a rank."""
PAYLOAD_BYTES = 48
"""Bytes of a vector that travels in the line itself."""

Field = tuple[str, Any] | tuple[str, Any, int | tuple[int, ...]]


def words(*names: str) -> list[Field]:
    """Fields of one word each."""
    return [(name, np.int64) for name in names]


def record(fields: Sequence[Field]) -> np.dtype[Any]:
    """Fields one after the other, without gaps."""
    return np.dtype(list(fields))


_PACKET: list[Field] = [
    *words("number", "check"),  # number: of the call, written last; check: hash of what all ranks must agree on
    ("payload", np.uint8, PAYLOAD_BYTES),
]
"""64 bytes: all that a small call reads."""

LINE_RECORD = record(
    [
        *_PACKET,
        *words("fingerprint", "array", "send_at", "recv_at", "longest"),
        *words("time_cached", "time_nontemporal"),  # middle times of this rank's trial
        *words("refusals"),  # single copies that the system refused
    ]
)

PACKET_LINE = record([*_PACKET, ("unused", np.void, LINE_BYTES - record(_PACKET).itemsize)])
"""What goes along a tree of ranks; the check is -1 if ranks make different calls."""
OWN_LINE = np.dtype({"names": ["value"], "formats": [np.int64], "itemsize": LINE_BYTES})
"""A word that shares its line with no other."""

_SHARED_WORDS: list[Field] = [
    ("lines", LINE_RECORD, 2),
    ("published", OWN_LINE),  # blocks that this rank has published, over all calls
    ("finished", OWN_LINE),  # blocks that it has finished
    ("abandoned", OWN_LINE),  # in rank 0's region: 1 + a rank that left a call half done, after which none can go on
    ("pid", OWN_LINE),  # the rank's process number
    ("sleepers", OWN_LINE),  # not zero: some rank may sleep until this one signals; the only word that others write
    ("gathered", PACKET_LINE),  # in a tree: the call that this rank and all below it have reached
    ("released", PACKET_LINE),  # the call that all ranks have reached
    ("wakes", OWN_LINE),  # how often this rank has woken sleepers: the futex on which they sleep
]

REGION_RECORD = record(
    [
        *_SHARED_WORDS,
        ("unused", np.void, PAGE - record(_SHARED_WORDS).itemsize),
        ("buffers", np.uint8, (2, BUFFER)),
    ]
)
"""A region up to its slots, whose length depends on the number of ranks."""


def region_record(slot: int) -> np.dtype[Any]:
    """A whole region with slots of ``slot`` bytes."""
    return record([("head", REGION_RECORD), ("slots", np.uint8, (RING, slot))])


STATE_RECORD = record(
    [
        *words("memory", "region", "ranks", "rank"),  # address of rank 0's region, bytes of a region
        *words("calls", "blocks"),  # made so far
        *words("spin", "spin_limit", "closed", "slot"),  # slot: bytes of one
        *words("nontemporal_fill", "probe"),  # of the running call; probe: 1 + number of the trial, 0 for none
        *words("clock", "elapsed", "max_wait", "slot_stride"),
        *words("spin_least"),  # spin is between this and spin_limit
        *words("awake"),  # nanoseconds for which a wait yields the core before it sleeps
        *words("way"),  # how the last trial of a long vector has decided to fill slots
        *words("tree", "parent", "child_count"),  # tree: 1 if ranks meet along a tree
        *words("child"),  # address of the ranks below this one, and for each the place after those below it
        *words("order", "first", "end"),  # address of all ranks in order of the tree; the places of this rank's subtree
    ]
)
"""What a rank knows of the transport."""

CALL_RECORD = record(
    [
        *words("state", "check", "fingerprint", "waiting"),  # waiting: not 0 while ranks are missing at the barrier
        *words("fold", "send", "recv", "nbytes", "item", "root", "block", "protocol", "nontemporal_out"),
        *words("allocation", "alive", "copies", "copy_stride", "send_at", "recv_at"),  # of a registered array
        *words("longest", "tuning", "once", "slot_stride", "segment"),
        *words("carries"),  # what goes along the tree with the barrier
    ]
)
"""What a rank knows of a call; a table follows: p addresses to reduce, then what the collective needs for each rank."""

SAMPLES = 5
"""Times that a trial keeps of each way."""
TUNING_RECORD = record(
    [
        *words("count", "period", "choice"),  # calls since the last trial began, and until the next one begins
        *words("long"),  # 1: until the first trial, slots are filled as the last one of another such class has decided
        *words("trial", "shortest", "longest"),  # calls of a trial; limits of the period
        *words("decisions", "changes"),  # how many trials have ended, and how many have changed the choice
        *words("time_cached", "time_nontemporal"),  # of the slowest rank, in the last trial
        ("samples", np.int64, (2, SAMPLES)),  # of this rank, in the running trial
    ]
)
"""What the autotuner knows of the calls of one collective and size class."""

PROBE_RECORD = record(
    words(
        *("task", "mine", "theirs", "first"),  # flags of this thread and of the other; whether this one begins
        *("to", "source", "slot", "their_slot", "nbytes", "repeats", "fold", "pid"),
    )
)
"""One measurement by one thread; two words for the sources of an addition follow."""


def offset_of(layout: np.dtype[Any], name: str) -> int:
    """Bytes from the beginning of a record to a field."""
    fields: Any = layout.fields
    return int(fields[name][1])


def offsets(layout: np.dtype[Any]) -> ModuleType:
    """The offsets of all fields of a record, by name; a module, as compiled code reads its attributes as constants."""
    found, fields = ModuleType("offsets"), dict(layout.fields or {})
    vars(found).update({name: at for name, (_, at, *_) in fields.items()})
    return found


def fill(target: npt.NDArray[Any], **fields: Any) -> None:
    """Write some fields of a record."""
    for name, value in fields.items():
        target[name] = value
