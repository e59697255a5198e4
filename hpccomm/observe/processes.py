"""What the system says of a process: its name, whether it runs, its parent, and when it was started."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "prte", "orted", "hydra_", "srun", "slurmstepd", "pmi_proxy")
"""How the programs begin whose end leaves ranks behind."""


class Process(NamedTuple):
    """One process."""

    name: str = ""
    state: str = ""
    """One letter: ``T`` for a stopped one; empty for one that has ended."""
    parent: int = 0
    started: int = 0
    """The time of its start, which tells it from a later one of the same number."""


def read_process(pid: int) -> Process:
    """The process of a number; of one that has ended all fields are empty.  Raises OSError if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1")  # a name may be cut inside a character
    except (FileNotFoundError, ProcessLookupError):
        return Process()
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return Process() if not fields or fields[0] == "Z" else Process(name, fields[0], int(fields[1]), int(fields[19]))


def find_process(pid: int) -> Process:
    """The same; all fields are empty, too, where this process cannot see it."""
    try:
        return read_process(pid)
    except OSError:
        return Process()


def find_launchers(pid: int) -> dict[int, int]:
    """The launchers from which a process descends: start times by process number."""
    found: dict[int, int] = {}
    while pid > 1:
        process = find_process(pid)
        if process.name.startswith(LAUNCHERS):
            found[pid] = process.started
        pid = process.parent
    return found
