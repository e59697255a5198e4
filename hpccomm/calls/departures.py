"""The end of a process, seen by the others: a rank that leaves the program, and a launcher that is gone.

Ranks of one node see in shared memory who has left.  Where all ranks of a node leave, no rank there can notice that
others wait: a rank that leaves tells the next node, whose ranks then do.  For each communicator that it has not freed
it sends one message at most, and none where another rank of its node has left after fewer calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.observe.processes import find_launchers, read_process


class Departure:
    """Tells the other ranks, when Python or MPI ends, that this process makes no more calls, and waits for theirs.

    Python clears modules after the last exit handler, so collectives in exit handlers still work.  A process that has
    left reaches MPI_Finalize with the others: Open MPI's launcher hangs in up to a third of the launches in which a
    rank dies while others are there (its PMIx 5 uses the memory of their barrier after it has freed it), and MPICH's
    ranks do not wait there, while a message to one that has ended never ends.
    """

    SHORT_SECONDS, LONG_SECONDS, LOOKS = 1e-3, 20e-3, 16
    """How long this process sleeps at first between two looks for the others, and at most; every so many looks it finds
    out which of them live."""

    def __init__(self, tables: Iterable[Any], served: bool | None = None) -> None:
        """``served``: whether the others of this node are waited for if there is no other node; by default with Open
        MPI."""
        self._tables, self._process, self._pid = tables, os.getpid(), os.getpid
        self._served = MPI.get_vendor()[0] == "Open MPI" if served is None else served
        self.unmet = list[Wire]()
        """Those of communicators that this rank has freed and others had not."""
        # modules may be cleared before this is used
        self._is_over, self._progress, self._sleep = MPI.Is_finalized, MPI.COMM_WORLD.Iprobe, time.sleep
        self._open, self._read, self._close, self._parent = os.open, os.read, os.close, os.getppid
        self._launcher = os.getppid()

    def __del__(self) -> None:
        if self._pid() == self._process:  # a child of fork is no rank
            self.leave()

    def leave(self) -> None:
        """Mark in all tables that this process has left, tell other nodes, and wait for the other ranks."""
        tables = [] if self._is_over() else list(self._tables)
        for table in tables:
            table.mark_gone()
        wires = [table.wire for table in tables if table.wire]
        try:
            for table in tables:
                table.tell_gone()
        finally:
            for each in wires:
                each.meet()
        wires += self.unmet
        looks, seconds = 0, self.SHORT_SECONDS
        while (self._served or wires) and not self._is_over() and self._is_awaited(tables, wires, looks):
            self._progress()
            self._sleep(seconds)
            looks, seconds = looks + 1, min(1.1 * seconds, self.LONG_SECONDS)

    def _is_awaited(self, tables: list[Any], wires: list[Wire], looks: int) -> bool:
        """Whether some rank has not left: one of this node that lives, or one of another node while all here live."""
        met = [each.has_met() for each in wires]  # makes progress with all
        if self._parent() != self._launcher:  # nobody waits for this process any more
            return False
        opened, left = set[int](), {self._process}
        for table in tables:
            for pid, has_left in table.list_processes():
                (left if has_left else opened).add(pid)
        here = opened - left
        return (looks % self.LOOKS > 0 or any(map(self._is_alive, here))) if here else not all(met)

    def _is_alive(self, pid: int) -> bool:
        """Whether a process runs."""
        try:
            file = self._open(f"/proc/{pid}/stat", 0)
        except FileNotFoundError:
            return False
        except OSError:  # no file can be opened, which says nothing of it
            return True
        try:
            return self._read(file, 512).rpartition(b")")[2][1:2] not in b"ZX"
        except OSError:
            return False
        finally:
            self._close(file)


class Wire:
    """Messages between the watchdogs of a communicator with several nodes, and its ranks' meeting at the end.

    ``comm`` is a communicator of the same ranks for this alone, ``receiver`` the first rank of the next node.  Python
    may have cleared modules when this is used for the last time, so what it takes is kept here.
    """

    REQUEST, ANSWER, DEPARTURE, REFUSAL = 1, 2, 3, 4
    """Tags: where the ranks of a node stand is asked, and answered; a rank is gone; a rank refuses a call."""

    def __init__(self, comm: MPI.Intracomm, receiver: int, note: Callable[..., bool]) -> None:
        """``note(*departure)`` is called for what another node says of ranks that are gone: whether that is new."""
        self.comm, self.receiver, self._note = comm, receiver, note
        self._status, self._type = MPI.Status(), MPI.BYTE
        self._sent = list[tuple[MPI.Request, bytes]]()
        self._counts, self._received, self._has_told = np.zeros(comm.size, np.int64), 0, False
        """Messages sent to each rank, and received."""
        self._due = np.zeros(1, np.int64)
        self._meeting: Any = None

    def send(self, content: bytes, rank: int, tag: int) -> None:
        """Send without waiting."""
        self._sent = [each for each in self._sent if not each[0].Test()]
        self._counts[rank] += 1
        self._sent.append((self.comm.Isend([content, self._type], rank, tag), content))

    def receive(self) -> list[tuple[int, int, bytes]]:
        """Receive what has arrived: rank, tag and content, but for what says that a rank has left."""
        found = []
        while self.comm.Iprobe(status=self._status):
            octets = bytearray(self._status.Get_count(self._type))
            self.comm.Recv([octets, self._type], self._status.source, self._status.tag)
            self._received += 1
            if self._status.tag == self.DEPARTURE:
                departure = [int(each) for each in octets.decode().strip("[]").split(",")]
                if self._note(*departure) and departure[0] & 1 and self._meeting is None:  # no rank has freed
                    self.send(bytes(octets), self.receiver, self.DEPARTURE)
            else:
                found.append((self._status.source, self._status.tag, bytes(octets)))
        return found

    def tell(self, departure: Sequence[int]) -> None:
        """Tell the next node once, as JSON, which ranks are gone, which tells the one after it."""
        if not self._has_told:
            self._has_told = True
            self.send(f"[{', '.join(map(str, departure))}]".encode(), self.receiver, self.DEPARTURE)

    def meet(self) -> None:
        """Begin to meet the other ranks, after which this one sends no more."""
        if self._meeting is None:
            self._meeting = self.comm.Ireduce_scatter_block(self._counts, self._due)

    def has_met(self) -> bool:
        """Whether all ranks have come, and no message is under way to this one or from it, as MPI wants at its end."""
        self.receive()
        sent = all([each.Test() for each, _ in self._sent])
        return bool(self._meeting.Test()) and sent and self._received >= int(self._due[0])


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
