"""What a running program has decided about its shared memory, readable by its user from outside.

The table of the autotuner of a node's first rank lies in an anonymous file that is named ``hpccomm-live``.  Other
processes of the same user find it in ``/proc`` and read it; the program does nothing for that.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.shared_memory.collectives import COLLECTIVES
from hpccomm.kernels.shared_memory.records import TUNING_RECORD

NAME, HEAD, SCHEMA = "hpccomm-live", 4096, 2
"""The name of the file; bytes of the text that it begins with; the version of both."""
WAYS = ("ordinary stores", "non-temporal stores")


class LiveTable:
    """The autotuner's table of one communicator, in such a file if the system has anonymous files."""

    def __init__(self, rows: npt.NDArray[Any], facts: dict[str, Any]) -> None:
        self.rows = rows
        self._memory: mmap.mmap | None = None
        text = json.dumps({"schema": SCHEMA, **facts}).encode()
        if len(text) > HEAD or not hasattr(os, "memfd_create"):
            return
        with contextlib.suppress(OSError):
            file = os.memfd_create(NAME, os.MFD_CLOEXEC)
            try:
                os.ftruncate(file, HEAD + rows.nbytes)
                self._memory = mmap.mmap(file, HEAD + rows.nbytes)  # which keeps the file open
            finally:
                os.close(file)
            self._memory[: len(text)] = text
            self.rows = np.frombuffer(self._memory, rows.dtype, offset=HEAD)
            self.rows[:] = rows

    def close(self) -> None:
        """Let nobody else read it as a running communicator; the rows stay."""
        if self._memory:
            self._memory[:1] = b"\0"


class Decision(NamedTuple):
    """How calls of one collective and size class fill slots."""

    collective: str
    first: int
    """The shortest length in bytes."""
    way: str
    decisions: int
    changes: int
    """How many trials have ended, and how many have changed the way."""
    us_ordinary: float
    us_nontemporal: float
    """Medians of the last trial, on the slowest rank."""


class Running(NamedTuple):
    """A communicator of a running program."""

    pid: int
    facts: dict[str, Any]
    decisions: list[Decision]


def find_running() -> list[Running]:
    """The communicators of all programs of this user on this machine."""
    found: dict[int, Running] = {}
    for link in list_files():
        with contextlib.suppress(OSError, ValueError, KeyError):
            file = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
            try:
                number, data = os.fstat(file).st_ino, os.pread(file, 1 << 20, 0)
            finally:
                os.close(file)
            facts = json.loads(data[:HEAD].rstrip(b"\0"))
            if facts["schema"] == SCHEMA:
                rows = np.frombuffer(data, TUNING_RECORD, offset=HEAD)
                found[number] = Running(int(link.parts[2]), facts, read_decisions(rows))
    return sorted(found.values(), key=lambda each: each.pid)


def list_files() -> Iterator[Path]:
    """The open files of that name of all processes that this user may look at."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for link in folder.iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(link).startswith(f"/memfd:{NAME}"):
                        yield link


def read_decisions(rows: npt.NDArray[Any]) -> list[Decision]:
    """What the trials have decided; classes that were never tried are left out."""
    table = rows.reshape(len(COLLECTIVES), -1)
    return [
        Decision(
            name,
            1 << (size - 1),
            WAYS[int(row["choice"])],
            int(row["decisions"]),
            int(row["changes"]),
            int(row["time_cached"]) / 1e3,
            int(row["time_nontemporal"]) / 1e3,
        )
        for name, classes in zip(COLLECTIVES, table, strict=True)
        for size, row in enumerate(classes)
        if row["decisions"]
    ]
