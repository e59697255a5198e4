"""The end of a process, seen by the others: a rank that leaves the program, and a launcher that is gone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "prte", "orted", "hydra_", "srun", "slurmstepd", "pmi_proxy")
"""How the programs begin whose end leaves ranks behind."""


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


def stat_of(pid: int) -> tuple[str, int, int]:
    """Name, parent and start time of a process; empty and zeros if there is none, or this process cannot see it."""
    try:
        return read_stat(pid)
    except OSError:
        return "", 0, 0


def read_stat(pid: int) -> tuple[str, int, int]:
    """The same; raises OSError where it cannot be read."""
    text = Path(f"/proc/{pid}/stat").read_text()
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return ("", 0, 0) if fields[0] == "Z" else (name, int(fields[1]), int(fields[19]))


def find_launchers(pid: int) -> dict[int, int]:
    """The launchers from which a process descends: start times by process number."""
    found: dict[int, int] = {}
    while pid > 1:
        name, parent, started = stat_of(pid)
        if name.startswith(LAUNCHERS):
            found[pid] = started
        pid = parent
    return found


class Launchers:
    """The launchers of this process; their end leaves it an orphan."""

    def __init__(self) -> None:
        self._found = find_launchers(os.getppid())

    def describe_loss(self) -> str:
        """The sentence for a launcher that is gone; empty while all are there."""
        for pid, started in self._found.items():
            try:
                now = read_stat(pid)[2]
            except (FileNotFoundError, ProcessLookupError):
                now = 0
            except OSError:  # no file descriptor is free, which says nothing of the launcher
                continue
            if now != started:
                return f"the launcher (process {pid}) is gone: this rank ends"
        return ""
