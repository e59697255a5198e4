"""How many files a process has open, and how many mappings it shares with others."""

from __future__ import annotations

import gc
import os
import time
from typing import NamedTuple

LOOKS, SECONDS = 10, 0.005
"""Looks at what is open, and seconds between two."""
PATIENCE = 20.0
"""Seconds in which what was freed must be gone on a loaded machine."""


def count_open_files(most: int = 0) -> int:
    """The least of some counts, as the watchdog opens files of other processes for a moment.

    Above ``most`` files it goes on looking for a while.
    """
    until, counts = time.monotonic() + PATIENCE, list[int]()
    while len(counts) < LOOKS or (most and min(counts) > most and time.monotonic() < until):
        counts.append(len(os.listdir("/proc/self/fd")))
        time.sleep(SECONDS)
    return min(counts)


class Holdings(NamedTuple):
    """Open files, and shared mappings of hpccomm."""

    files: int
    mappings: int


def count_holdings(before: Holdings | None = None) -> Holdings:
    """What this process holds now; with ``before``, raises if that is more."""
    gc.collect()
    files = count_open_files(before.files if before else 0)
    with open("/proc/self/maps") as maps:
        found = Holdings(files, sum("hpccomm" in line for line in maps))
    assert before is None or max(map(int.__sub__, found, before)) <= 0, (before, found)
    return found
