"""Communicators of ranks that are threads of one process: mpi4py's spelling, for tests and for runs without a launcher.

*p ranks.*  In a collective every rank contributes its buffers, the last rank to arrive combines the contributions in
rank order, each rank copies its part of the result, and a barrier keeps all ranks until the last one has done so.  So
every sum is ((x0 + x1) + x2) + …, bit for bit.  Point-to-point messages are copies in the receiver's mailbox, in the
order of sending.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls.operations import combiner, name_of
from hpccomm.errors import MismatchError
from hpccomm.layout import Layout
from hpccomm.performance.machine import Machine

IN_PLACE = MPI.IN_PLACE
SWITCH_SECONDS = 5e-4
"""Interval after which a thread releases the interpreter: with Python's 5 ms, small steps take three times as long."""


class RankGroup:
    """The state that the ranks of one communicator share: contributions, barriers and mailboxes."""

    def __init__(self, size: int, nodes: Sequence[int], patience: float) -> None:
        self.size, self.nodes, self.patience = size, list(nodes), patience
        self.contributions: list[Any] = [None] * size
        self.result: Any = None
        self.combine: Callable[[list[Any]], Any] = list
        self.barrier = threading.Barrier(size, self.run_combine, timeout=patience)
        self.exit_barrier = threading.Barrier(size, timeout=patience)
        self.mail_arrives = threading.Condition()
        self.mailboxes: list[list[tuple[int, int, bytes]]] = [[] for _ in range(size)]
        self.subgroups: list[RankGroup] = []

    def run_combine(self) -> None:
        """Combine the contributions; the last rank to arrive runs this."""
        names = [name for name, _ in self.contributions]
        different = next((rank for rank, name in enumerate(names) if name != names[0]), None)
        if different is not None:
            found = f"rank {different} called {names[different]}, rank 0 {names[0]}"
            self.result = MismatchError(f"{found}: make the calls the same")
            return
        try:
            self.result = self.combine([part for _, part in self.contributions])
        except Exception as error:  # every rank raises it
            self.result = error

    def abort(self) -> None:
        """Release ranks that wait for a rank that has ended with an error."""
        self.barrier.abort()
        self.exit_barrier.abort()
        for group in self.subgroups:
            group.abort()


class ThreadCommunicator:
    """The communicator of one rank, created by :func:`run_on_ranks`.

    Buffers are C-contiguous arrays, or ``[array, counts]`` where MPI takes counts.
    """

    def __init__(self, group: RankGroup, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size
        self._levels: dict[str, ThreadCommunicator] = {}

    def enter(self, name: str, mine: Any, combine: Callable[[list[Any]], Any] = list) -> Any:
        """Return ``combine`` of all contributions; the contributions stay valid until :meth:`leave`."""
        group = self.group
        group.contributions[self.rank] = (name, mine)
        group.combine = combine
        try:
            group.barrier.wait()
        except threading.BrokenBarrierError:
            raise TimeoutError(
                f"rank {self.rank} waited in {name} for ranks that did not come: let every rank make the call"
            ) from None
        return group.result

    def leave(self) -> None:
        """Wait until all ranks have copied their part."""
        self.group.exit_barrier.wait()

    def run_collective(
        self, name: str, mine: Any, combine: Callable[[list[Any]], Any], take: Callable[[Any], Any] = lambda it: it
    ) -> Any:
        """Run one collective; return ``take`` of the combined result."""
        result = self.enter(name, mine, combine)
        try:
            if isinstance(result, Exception):
                raise result
            return take(result)
        finally:
            self.leave()

    def Get_rank(self) -> int:
        """This rank."""
        return self.rank

    def Get_size(self) -> int:
        """The number of ranks."""
        return self.size

    @property
    def layout(self) -> Layout:
        """Which ranks share a node."""
        known = sorted(set(self.group.nodes))
        return Layout(np.array([known.index(each) for each in self.group.nodes]), tuple(f"node{n}" for n in known))

    machine = Machine()
    """The links whose costs messages between these ranks have."""

    @property
    def intra_node(self) -> ThreadCommunicator:
        """The ranks of this node (the first use is collective)."""
        return self._level("intra", int(self.layout.nodes[self.rank]))

    @property
    def inter_node(self) -> ThreadCommunicator:
        """The ranks with the same local rank on their nodes (the first use is collective)."""
        return self._level("inter", self.layout.local_rank(self.rank))

    def _level(self, name: str, color: int) -> ThreadCommunicator:
        if name not in self._levels:
            self._levels[name] = self.Split(color, self.rank)
        return self._levels[name]

    def Split(self, color: int = 0, key: int = 0) -> Any:
        """Create one communicator for each color; ``MPI.COMM_NULL`` for ``MPI.UNDEFINED``."""
        groups = self.run_collective("Split", (color, key), self._divide)
        if color == MPI.UNDEFINED:
            return MPI.COMM_NULL
        group, members = groups[color]
        return ThreadCommunicator(group, members.index(self.rank))

    def _divide(self, requests: list[tuple[int, int]]) -> dict[int, tuple[RankGroup, list[int]]]:
        found = {}
        for color in {color for color, _ in requests} - {MPI.UNDEFINED}:
            members = sorted((key, rank) for rank, (wanted, key) in enumerate(requests) if wanted == color)
            ranks = [rank for _, rank in members]
            nodes = [self.group.nodes[rank] for rank in ranks]
            found[color] = (RankGroup(len(ranks), nodes, self.group.patience), ranks)
            self.group.subgroups.append(found[color][0])
        return found

    def Dup(self) -> ThreadCommunicator:
        """Create a communicator of the same ranks."""
        made: ThreadCommunicator = self.Split(0, self.rank)
        return made

    def Free(self) -> None:
        """Do nothing: a thread communicator holds no resources."""

    def Barrier(self) -> None:
        """Wait for all ranks."""
        self.run_collective("Barrier", None, list)

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, algorithm: str | None = None) -> None:
        """Reduce over all ranks, the result on all."""
        receive = vector(recvbuf)
        send = receive if sendbuf is IN_PLACE else vector(sendbuf)
        form = f"Allreduce({send.size} {send.dtype}, {name_of(op)})"
        self.run_collective(form, send, lambda parts: fold_in_order(parts, op), lambda total: np.copyto(receive, total))

    def Reduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, root: int = 0) -> None:
        """Reduce over all ranks, the result on ``root``."""
        send = vector(recvbuf if sendbuf is IN_PLACE else sendbuf)

        def take(total: Any) -> None:
            if self.rank == root:
                vector(recvbuf)[...] = total

        self.run_collective(
            f"Reduce({send.size} {send.dtype}, root {root})", send, lambda parts: fold_in_order(parts, op), take
        )

    def Reduce_scatter(
        self, sendbuf: Any, recvbuf: Any, recvcounts: Sequence[int] | None = None, op: MPI.Op = MPI.SUM
    ) -> None:
        """Reduce over all ranks, ``recvcounts[r]`` elements of the result on rank r."""
        send, receive = vector(sendbuf), vector(recvbuf)
        counts = [receive.size] * self.size if recvcounts is None else list(recvcounts)
        first = sum(counts[: self.rank])
        self.run_collective(
            f"Reduce_scatter({counts} {send.dtype})",
            send,
            lambda parts: fold_in_order(parts, op),
            lambda total: np.copyto(receive, total[first : first + counts[self.rank]]),
        )

    def Reduce_scatter_block(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, algorithm: str | None = None
    ) -> None:
        """Reduce over all ranks, an equal block of the result on each."""
        self.Reduce_scatter(sendbuf, recvbuf, op=op)

    def Allgather(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None) -> None:
        """Collect an equal block from every rank, in rank order, on all."""
        send, receive = vector(sendbuf), vector(recvbuf)
        form = f"Allgather({send.nbytes} bytes)"
        self.run_collective(
            form, send, list, lambda parts: np.copyto(receive, np.concatenate(parts).view(receive.dtype))
        )

    def Allgatherv(self, sendbuf: Any, recvbuf: Any, algorithm: str | None = None) -> None:
        """Collect a block of any length from every rank, in rank order, on all."""
        receive, counts = vector(recvbuf), list(recvbuf[1])
        send = vector(sendbuf)

        def take(parts: list[Any]) -> None:
            sizes = [part.size for part in parts]
            if sizes != counts:
                raise MismatchError(f"rank {self.rank}: Allgatherv expects {counts} elements, the ranks send {sizes}")
            receive[: sum(counts)] = np.concatenate(parts)

        self.run_collective(f"Allgatherv({send.dtype})", send, list, take)

    def Alltoall(self, sendbuf: Any, recvbuf: Any) -> None:
        """Send an equal block to every rank and receive one from each, in rank order."""
        each = [vector(sendbuf).size // self.size] * self.size
        self.Alltoallv([sendbuf, each], [recvbuf, each])

    def Alltoallv(self, sendbuf: Any, recvbuf: Any) -> None:
        """Send a block of any length to every rank and receive one from each, in rank order."""
        send, receive = vector(sendbuf), vector(recvbuf)
        ends = np.cumsum([0, *sendbuf[1]]).tolist()
        mine = [send[lo:hi] for lo, hi in pairwise(ends)]

        def take(parts: list[Any]) -> None:
            blocks = [part[self.rank] for part in parts]
            if [each.size for each in blocks] != list(recvbuf[1]):
                raise MismatchError(f"rank {self.rank}: Alltoallv expects {list(recvbuf[1])} elements, others are sent")
            receive[: sum(recvbuf[1])] = np.concatenate(blocks)

        self.run_collective(f"Alltoallv({send.dtype})", mine, list, take)

    def Bcast(self, buf: Any, root: int = 0, algorithm: str | None = None) -> None:
        """Copy ``root``'s buffer to all ranks."""
        array = vector(buf)
        form = f"Bcast({array.size} {array.dtype}, root {root})"
        self.run_collective(form, array, lambda parts: parts[root].copy(), lambda given: np.copyto(array, given))

    def allgather(self, obj: Any) -> list[Any]:
        """The objects of all ranks."""
        found: list[Any] = self.run_collective("allgather", obj, list, list)
        return found

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """``root``'s object."""
        return self.run_collective(f"bcast(root {root})", obj, lambda parts: parts[root])

    def Send(self, buf: Any, dest: int, tag: int = 0) -> None:
        """Put a copy into the receiver's mailbox; never waits."""
        with self.group.mail_arrives:
            self.group.mailboxes[dest].append((self.rank, tag, vector(buf).tobytes()))
            self.group.mail_arrives.notify_all()

    def Isend(self, buf: Any, dest: int, tag: int = 0) -> MPI.Request:
        """As :meth:`Send`; the request is complete."""
        self.Send(buf, dest, tag)
        return MPI.REQUEST_NULL

    def Iprobe(self, source: int = MPI.ANY_SOURCE, tag: int = MPI.ANY_TAG, status: MPI.Status | None = None) -> bool:
        """Whether a matching message is available; ``status`` describes it."""
        with self.group.mail_arrives:
            found = self._find(source, tag)
        if found is not None and status is not None:
            fill_status(status, found)
        return found is not None

    def Probe(self, source: int = MPI.ANY_SOURCE, tag: int = MPI.ANY_TAG, status: MPI.Status | None = None) -> bool:
        """Wait for a matching message; ``status`` describes it."""
        until = time.monotonic() + self.group.patience
        with self.group.mail_arrives:
            while (found := self._find(source, tag)) is None:
                left = until - time.monotonic()
                self.group.mail_arrives.wait(min(max(left, 0), 1.0))
                if self.group.exit_barrier.broken or left <= 0:
                    raise TimeoutError(f"rank {self.rank} waited for a message from {source} with tag {tag}")
        if status is not None:
            fill_status(status, found)
        return True

    def Recv(
        self, buf: Any, source: int = MPI.ANY_SOURCE, tag: int = MPI.ANY_TAG, status: MPI.Status | None = None
    ) -> None:
        """Wait for a matching message and receive it."""
        self.Probe(source, tag)
        with self.group.mail_arrives:
            found = self._find(source, tag)
            assert found is not None
            self.group.mailboxes[self.rank].remove(found)
        byte_view(buf)[: len(found[2])] = np.frombuffer(found[2], np.uint8)
        if status is not None:
            fill_status(status, found)

    def _find(self, source: int, tag: int) -> tuple[int, int, bytes] | None:
        for message in self.group.mailboxes[self.rank]:
            if source in (MPI.ANY_SOURCE, message[0]) and tag in (MPI.ANY_TAG, message[1]):
                return message
        return None


def vector(buffer: Any) -> Any:
    """A buffer as a flat array on the same memory."""
    array = buffer[0] if isinstance(buffer, list | tuple) else buffer
    return np.asarray(array).reshape(-1)


def byte_view(buffer: Any) -> Any:
    """A buffer as a flat array of bytes on the same memory."""
    return vector(buffer).view(np.uint8)


def fill_status(status: MPI.Status, message: tuple[int, int, bytes]) -> None:
    """Describe a message in a status."""
    status.source, status.tag = message[0], message[1]
    status.Set_elements(MPI.BYTE, len(message[2]))


def fold_in_order(parts: list[Any], op: MPI.Op) -> Any:
    """The reduction ((x0 op x1) op x2) … in rank order."""
    total, combine = parts[0].copy(), combiner(op)
    for part in parts[1:]:
        combine(total, part, total)
    return total


def run_on_ranks(
    size: int, function: Callable[[Any], Any], nodes: Sequence[int] | None = None, patience: float = 60.0
) -> list[Any]:
    """Run ``function(comm)`` on ``size`` ranks and return the results; ``nodes`` names the node of each (default: one).

    Raises the exception of the first rank that fails; ranks that wait for it end, too.
    """
    group = RankGroup(size, [0] * size if nodes is None else nodes, patience)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = function(ThreadCommunicator(group, rank))
        except BaseException as error:
            errors.append(error)
            group.abort()

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    if errors:
        raise errors[0]
    return results
