"""The end of a process, seen by the others: a rank that leaves the program, and a launcher that is gone.

Ranks of one node see in shared memory who has left.  Where all ranks of a node leave, no rank there can notice that
others wait: a rank that leaves tells the next node, whose ranks then do.  For each communicator that it has not freed
it sends one message at most, and none where another rank of its node has left after fewer calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.observe.processes import find_launchers, read_process


class Departure:
    """Tells the other ranks, when Python or MPI ends, that this process makes no more calls, and waits for theirs.

    Python clears modules after the last exit handler, so collectives in exit handlers still work.  A process that has
    left reaches MPI_Finalize with the others: Open MPI's launcher hangs in up to a third of the launches in which a
    rank dies while others are there (its PMIx 5 uses the memory of their barrier after it has freed it), and MPICH's
    ranks do not wait there, while a message to one that has ended never ends.
    """

    SHORT_SECONDS, LONG_SECONDS = 1e-3, 20e-3
    """How long this process sleeps at first between two looks for the others, and at most."""

    def __init__(self, tables: Iterable[Any], served: bool | None = None) -> None:
        """``served``: whether the others of this node are waited for if there is no other node; by default with Open
        MPI."""
        self._tables, self._process, self._pid = tables, os.getpid(), os.getpid
        self._served = MPI.get_vendor()[0] == "Open MPI" if served is None else served
        self._is_over, self._progress = MPI.Is_finalized, MPI.COMM_WORLD.Iprobe  # modules may be cleared before use
        self._sleep, self._signal = time.sleep, os.kill

    def __del__(self) -> None:
        if self._pid() == self._process:  # a child of fork is no rank
            self.leave()

    def leave(self) -> None:
        """Mark in all tables that this process has left, tell other nodes, and wait for the other ranks."""
        tables = [] if self._is_over() else list(self._tables)
        for table in tables:
            table.mark_left()
        farewells = [table.tell_departure for table in tables if table.tell_departure]
        for table in tables:
            table.tell_left()
        for each in farewells:
            each.meet()
        if not (self._served or farewells):
            return
        seconds = self.SHORT_SECONDS
        while not self._is_over() and self._is_awaited(tables, farewells):
            self._progress()
            self._sleep(seconds)
            seconds = min(1.1 * seconds, self.LONG_SECONDS)

    def _is_awaited(self, tables: list[Any], farewells: list[Farewell]) -> bool:
        """Whether some rank has not left: one of this node that lives, or one of another node while all here live."""
        met = [each.has_met() for each in farewells]  # makes progress with all
        opened, left = set[int](), set[int]()
        for table in tables:
            for pid, has_left in table.list_processes():
                (left if has_left else opened).add(pid)
        here = opened - left - {self._process}
        return any(map(self._is_alive, here)) if here else not all(met)

    def _is_alive(self, pid: int) -> bool:
        """Whether there is such a process."""
        try:
            self._signal(pid, 0)
        except OSError:
            return False
        return True


class Farewell:
    """Tells the first rank of the next node, without waiting, which rank has left with the fewest calls.

    ``receiver`` is that rank, ``tag`` that of such messages on ``wire``; ``counts`` of shape ``(2, p)`` are the
    messages sent to each rank there and received from it.  Python may have cleared modules by then, so what it takes is
    kept here, and what MPI still sends as long as the consistency table.
    """

    def __init__(self, wire: MPI.Intracomm, receiver: int, tag: int, counts: npt.NDArray[np.int64]) -> None:
        self.receiver, self._tag, self._wire, self._counts = receiver, tag, wire, counts
        self._status, self._type, self._is_over = MPI.Status(), MPI.BYTE, MPI.Is_finalized
        self._due = np.empty_like(counts[0])
        self._sent: Any = None
        self._meeting: Any = None

    def __call__(self, rank: int, calls: int) -> None:
        """Send once, as JSON, which rank has left and after how many calls."""
        if self._sent is None:
            content = f"[{rank}, {calls}]".encode()
            self._counts[0, self.receiver] += 1
            self._sent = self._wire.Isend([content, self._type], self.receiver, self._tag), content

    def receive(self) -> list[tuple[int, int]]:
        """Receive what has arrived; returns who has left, and after how many calls."""
        found = []
        while self._wire.Iprobe(status=self._status):
            octets = bytearray(self._status.Get_count(self._type))
            self._wire.Recv([octets, self._type], self._status.source, self._status.tag)
            self._counts[1, self._status.source] += 1
            if self._status.tag == self._tag:
                rank, calls = octets.decode().strip("[]").split(",")
                found.append((int(rank), int(calls)))
        return found

    def meet(self) -> None:
        """Begin to meet the ranks of all nodes, none of which sends more."""
        if self._meeting is None:
            self._told = self._counts[0].copy()
            self._meeting = self._wire.Ialltoall(self._told, self._due)

    def has_met(self) -> bool:
        """Whether all ranks are here and all messages to this one received, as MPI wants before it ends."""
        self.receive()
        return bool(self._meeting.Test() and (self._due <= self._counts[1]).all())


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
