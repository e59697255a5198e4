"""The end of a process, seen by the others: a rank that leaves the program, and a launcher that is gone.

Ranks of one node see in shared memory who has left.  Where all ranks of a node leave, no rank there can notice that
others wait: a rank that leaves tells the next node, whose ranks then do.  For each communicator that it has not freed
it sends one message at most, and none where another rank of its node has left after fewer calls.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterable
from typing import Any

from mpi4py import MPI

from hpccomm.observe.processes import find_launchers, read_process


class Departure:
    """Tells the other ranks, when Python or MPI ends, that this process makes no more calls.

    Python clears modules after the last exit handler, so collectives in exit handlers still work.  What this takes of
    modules is kept here.
    """

    SHORT_MS, LONG_MS, SHORT_WAITS = 1, 5, 20
    """How long this process sleeps while it waits for others to leave: at first, then, and how often at first."""

    def __init__(self, tables: Iterable[Any], served: bool = "PMIX_RANK" in os.environ) -> None:
        """``served``: whether a PMIx server has started this process."""
        self._tables, self._process, self._pid, self._served = tables, os.getpid(), os.getpid, served
        self._is_over, self._progress = MPI.Is_finalized, MPI.COMM_WORLD.Iprobe
        self._open: Any = getattr(os, "pidfd_open", None)
        self._poll, self._ignore = select.poll, contextlib.suppress

    def __del__(self) -> None:
        if self._pid() == self._process:  # a child of fork is no rank
            self.leave()

    def leave(self) -> None:
        """Mark in all tables that this process has left; then wait for the others of its node, where that is needed.

        Open MPI's launcher hangs in up to a third of the launches in which a rank dies while others wait in
        MPI_Finalize: its PMIx server then uses the memory of their barrier, which it has freed (PMIx 5).  A rank that
        waits here is in no such barrier.
        """
        tables = list(self._tables)
        for table in tables:
            table.mark_left()
        if self._served and self._open:
            self._await_others(tables)

    def _await_others(self, tables: list[Any]) -> None:
        """Wait until each process that has a table with this one has left or ended, while MPI makes progress."""
        files: dict[int, int]
        ended, poll, files, waits = {self._process}, self._poll(), {}, 0
        while not self._is_over():
            here = {pid for table in tables for pid in table.find_present()} - ended
            if not here:
                break
            for pid in here - set(files.values()):
                ended.add(pid)
                with self._ignore(OSError):  # it has ended, or this process cannot see it
                    file = self._open(pid)
                    poll.register(file, 1)  # readable once the process has ended
                    files[file] = pid
                    ended.discard(pid)
            self._progress()
            for file, _ in poll.poll(self.SHORT_MS if waits < self.SHORT_WAITS else self.LONG_MS):
                ended.add(files[file])
                poll.unregister(file)
            waits += 1


class Farewell:
    """Tells the first rank of the next node, without waiting, which rank has left with the fewest calls.

    ``receiver`` is that rank, ``tag`` that of such messages on ``wire``.  Python may have cleared modules by then, so
    what it takes is kept here, and what MPI still sends as long as the consistency table.
    """

    def __init__(self, wire: MPI.Intracomm, receiver: int, tag: int) -> None:
        self.receiver, self._tag, self._wire = receiver, tag, wire
        self._status, self._type, self._is_over = MPI.Status(), MPI.BYTE, MPI.Is_finalized
        self._sent: Any = None

    def __call__(self, rank: int, calls: int) -> None:
        """Send once, as JSON, which rank has left and after how many calls."""
        if self._sent is None and not self._is_over():
            content = f"[{rank}, {calls}]".encode()
            self._sent = self._wire.Isend([content, self._type], self.receiver, self._tag), content

    def receive(self) -> list[tuple[int, int]]:
        """Receive what has arrived, as MPI wants before it ends; returns who has left, and after how many calls."""
        found = []
        while not self._is_over() and self._wire.Iprobe(status=self._status):
            octets = bytearray(self._status.Get_count(self._type))
            self._wire.Recv([octets, self._type], self._status.source, self._status.tag)
            if self._status.tag == self._tag:
                rank, calls = octets.decode().strip("[]").split(",")
                found.append((int(rank), int(calls)))
        return found


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
