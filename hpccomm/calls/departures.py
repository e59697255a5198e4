"""The end of a process, seen by the others: a rank that leaves the program, and a launcher that is gone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from hpccomm.observe.processes import find_launchers, read_process


class Departure:
    """Tells the other ranks, when Python ends, that this process makes no more calls.

    Python clears modules after the last exit handler, so collectives in exit handlers still work.
    """

    def __init__(self, tables: Iterable[Any]) -> None:
        self._tables, self._process, self._pid = tables, os.getpid(), os.getpid

    def __del__(self) -> None:
        if self._pid() == self._process:  # a child of fork is no rank
            for table in list(self._tables):
                table.mark_left()


class Launchers:
    """The launchers of this process; their end leaves it an orphan."""

    def __init__(self) -> None:
        self._found = find_launchers(os.getppid())

    def describe_loss(self) -> str:
        """The sentence for a launcher that is gone; empty while all are there."""
        for pid, started in self._found.items():
            try:
                now = read_process(pid).started
            except OSError:  # no file descriptor is free, which says nothing of the launcher
                continue
            if now != started:
                return f"the launcher (process {pid}) is gone: this rank ends"
        return ""
