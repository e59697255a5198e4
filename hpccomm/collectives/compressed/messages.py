"""An allgather of byte messages whose lengths differ between ranks, and the communicator that exchanges need.

*p ranks; a message is a flat uint8 array of any length.*  :class:`MessageGather` takes one call where messages are
about as long as in the previous call, else two.  Before data moves, all ranks compare their arguments (8 bytes each).
"Bytes sent" counts a rank's message once for each of the p - 1 other ranks in an allgather or broadcast, and 2(p-1)/p
of the vector in an allreduce.

The exchanges of this folder know no MPI.  They need a :class:`Comm`: rank, size, three dense collectives, a broadcast
and point-to-point messages, spelled as in mpi4py.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpccomm.errors import ArgumentError
from hpccomm.kernels.vectors.reference import Octets

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]

MAX_GATHER_BYTES = (1 << 31) - 1
"""The most bytes that one call of MPI 3 gathers."""

TAG = 23463
"""The tag of all messages between two ranks, on the communicator itself: receive no ``ANY_TAG`` during an exchange."""

OK, NOT_FLAT, NOT_ASCENDING, NOT_FINITE, NO_K, UNKNOWN, BAD_PLAN, BAD_STATE, BAD_ROWS = range(9)
PROBLEMS = (
    "",
    "arrays of another dtype, shape or length: pass flat contiguous arrays as documented",
    "indices that do not ascend or reach n: sort them, name each element once",
    "a NaN or an infinity: skip this step on all ranks",
    "no k: pass the number of elements to keep, at least 1",
    "an unknown algorithm: pass one of those in the documentation",
    "a plan for another n or number of ranks: leave it out, and pass the plan that this call returns",
    "an error state of another length or with a NaN: pass float32 zeros at first, then the state of the previous call",
    "rows that are no whole numbers from 0 to below count, or a count above 2**32: pass the rows of one table",
)
CALLS = ("sparse_allgather", "sparse_allreduce", "onebit_allgather", "onebit_allreduce", "allreduce_rows")
"""The calls that compare their arguments by :func:`check_arguments`."""


class Comm(Protocol):
    """The communicator that the exchanges need; those of mpi4py and hpccomm satisfy it.

    More attributes are used if present: ``layout`` and ``machine``, the nodes of the ranks and their links, by which
    ``auto`` prices algorithms (:func:`~hpccomm.collectives.compressed.prices.place_of`), and ``message_gather``, a
    :class:`MessageGather` that is kept from call to call.
    """

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def Allgather(self, sendbuf: Any, recvbuf: Any, /) -> Any:
        """Gather blocks of equal length."""

    def Allgatherv(self, sendbuf: Any, recvbuf: Any, /) -> Any:
        """Gather blocks of different lengths; ``recvbuf`` is ``[array, counts]``."""

    def Allreduce(self, sendbuf: Any, recvbuf: Any, /) -> Any:
        """Sum on all ranks."""

    def Bcast(self, buf: Any, root: int = 0, /) -> Any:
        """Broadcast from ``root``."""

    def Isend(self, buf: Any, dest: int, tag: int = 0, /) -> Any:
        """Start to send; returns a request with ``Wait``."""

    def Recv(self, buf: Any, source: int = 0, tag: int = 0, /) -> Any:
        """Receive a message."""

    def Probe(self, source: int = 0, tag: int = 0, status: Any = None, /) -> Any:
        """Wait for a message, whose length is then in ``status``."""


class CountingComm:
    """A communicator that counts the bytes that this rank sends."""

    def __init__(self, comm: Comm) -> None:
        if not (comm and hasattr(comm, "size")):  # a null communicator is false
            raise ArgumentError(f"{comm!r} is no communicator: pass hpccomm.Communicator(MPI.COMM_WORLD)")
        self.comm, self.rank, self.size, self.bytes_sent = comm, comm.rank, comm.size, 0
        self._private: Comm = getattr(comm, "private_comm", comm)

    def gather(self, message: Octets) -> list[Octets]:
        """The messages of all ranks, in rank order."""
        found, nbytes = message_gather_of(self.comm).gather(message)
        self.bytes_sent += nbytes
        return found

    def Allgather(self, mine: Array, buffer: Array) -> None:
        """Send the local block to each other rank."""
        self.bytes_sent += mine.nbytes * (self.size - 1)
        self.comm.Allgather(mine, buffer)

    def Allgatherv(self, mine: Array, buffer: Any) -> None:
        """Send the local block to each other rank."""
        self.bytes_sent += mine.nbytes * (self.size - 1)
        self.comm.Allgatherv(mine, buffer)

    def Allreduce(self, mine: Array, buffer: Array) -> None:
        """Count the fewest bytes that an allreduce sends."""
        self.bytes_sent += round(2 * (self.size - 1) * mine.nbytes / self.size)
        self.comm.Allreduce(mine, buffer)

    def Bcast(self, buffer: Array) -> None:
        """Send rank 0's buffer to each other rank."""
        self.bytes_sent += buffer.nbytes * (self.size - 1) if self.rank == 0 else 0
        self.comm.Bcast(buffer, 0)

    def post(self, message: Octets, to: int) -> Any:
        """Start to send a message."""
        self.bytes_sent += message.nbytes
        return self._private.Isend(message, to, TAG)

    def fetch(self, source: int) -> Octets:
        """Receive the next message of a rank."""
        from hpccomm.transports.mpi import probe_bytes

        message = np.empty(probe_bytes(self._private, source, TAG), np.uint8)
        self._private.Recv(message, source, TAG)
        return message

    def sendrecv(self, message: Octets, to: int, source: int) -> Octets:
        """Send one message and receive another."""
        request = self.post(message, to)
        received = self.fetch(source)
        request.Wait()
        return received

    def alltoall(self, messages: list[Octets]) -> list[Octets]:
        """Send message j to rank j; returns the received messages in rank order."""
        distances = range(1, self.size)
        requests = [self.post(messages[to], to) for to in ((self.rank + each) % self.size for each in distances)]
        received = list(messages)
        for distance in distances:
            source = (self.rank - distance) % self.size
            received[source] = self.fetch(source)
        for request in requests:
            request.Wait()
        return received


def check_arguments(wire: CountingComm, who: str, problem: int, own: int, **common: int) -> Ints:
    """``own`` of all ranks; raises on all ranks where one has a problem or differs from rank 0 in ``common``.

    ``who`` is the call, one of :data:`CALLS`, which must be the same, too.
    """
    mine = np.array([CALLS.index(who) * len(PROBLEMS) + problem, own, *common.values()], np.int64)
    table = np.empty(wire.size * mine.size, np.int64)
    wire.Allgather(mine, table)
    rows = table.reshape(wire.size, mine.size)
    calls, problems = np.divmod(rows[:, 0], len(PROBLEMS))
    for rank in np.flatnonzero(calls != calls[0]):
        first, other = CALLS[calls[0]], CALLS[calls[rank]]
        raise ArgumentError(f"{who}: rank {rank} called {other}, rank 0 {first}: make all ranks call the same")
    for rank in np.flatnonzero(problems):
        raise ArgumentError(f"{who}: rank {rank} passes {PROBLEMS[problems[rank]]}")
    for name, column in zip(common, rows.T[2:], strict=True):
        for rank in np.flatnonzero(column != column[0]):
            raise ArgumentError(
                f"{who}: rank {rank} has another {name} than rank 0 ({column[rank]}, not {column[0]}): "
                "make the calls the same"
            )
    return rows[:, 1]


def demand_whole(holds: bool, what: str) -> None:
    """Raise for a received message that no rank sends."""
    if not holds:
        raise ArgumentError(f"a received message is damaged ({what}): check the transport, and go on from a checkpoint")


def number_of(argument: Any) -> int:
    """A hash by which ranks compare an argument."""
    return zlib.crc32(repr(argument).encode())


# Messages of any length


SHORT_ROOM = 1 << 14
"""Bytes up to which padding messages to one length costs less than a second call."""
UNIT = 8
"""Lengths travel as 8 bytes, and messages begin at multiples of 8."""


class MessageGather:
    """An allgather of messages of any length, in one call where they are about as long as the previous ones.

    All ranks know the lengths of the previous messages, so they agree without communication on the room for the next,
    a number of bytes: the first call carries each message's length and as much of the message as fits, always between
    the same two arrays, so that its plan is cached; the rest follows in a second call.
    """

    def __init__(self, comm: Comm) -> None:
        self.comm, self.room = comm, 0
        self.arrays: tuple[Octets, Octets] | None = None

    def gather(self, message: Octets) -> tuple[list[Octets], int]:
        """The messages of all ranks in rank order, and the bytes that this rank sent (collective)."""
        valid = isinstance(message, np.ndarray) and message.dtype == np.uint8 and message.ndim == 1
        mine, everyone = self.arrays or self.allocate()
        mine[:UNIT].view(np.int64)[0] = message.size if valid else -1
        first = message[: self.room] if valid else mine[:0]
        mine[UNIT : UNIT + first.size] = first
        self.comm.Allgather(mine, everyone)
        rows = everyone.reshape(self.comm.size, mine.size)
        lengths = rows[:, :UNIT].copy().view(np.int64)[:, 0]
        if (lengths < 0).any():
            raise ArgumentError(
                f"gather_messages: rank {int(np.argmin(lengths))} passes no flat uint8 array: "
                "pass message.view(np.uint8)"
            )
        nbytes, longest, room = (self.comm.size - 1) * mine.size, int(lengths.max()), self.room
        if longest <= room:
            block = rows[:, UNIT:].copy()
            found = [block[rank, :length] for rank, length in enumerate(lengths.tolist())]
        else:
            firsts = [row[UNIT : UNIT + min(room, size)].copy() for row, size in zip(rows, lengths, strict=True)]
            rest = gather_rest(self.comm, np.ascontiguousarray(message[room:]), np.maximum(lengths - room, 0))
            found = [np.concatenate(each) for each in zip(firsts, rest, strict=True)] if room else rest
            nbytes += (self.comm.size - 1) * max(0, message.size - room)
        self.set_room(room_after(longest, room))
        return found, nbytes

    @property
    def size(self) -> int:
        """The number of messages."""
        return self.comm.size

    def allocate(self) -> tuple[Octets, Octets]:
        """Allocate the arrays of the first call."""
        size = UNIT + self.room
        self.arrays = np.zeros(size, np.uint8), np.empty(self.comm.size * size, np.uint8)
        return self.arrays

    def set_room(self, room: int) -> None:
        """Set how many bytes of a message the next first call carries; the same on all ranks."""
        if room != self.room:
            self.room, self.arrays = room, None


def room_after(longest: int, room: int) -> int:
    """The room after a call whose longest message had this many bytes.

    A sixteenth more than that, rounded up to an eighth of a power of two; 0 for long messages.  The room stays while
    it holds the longest message and is at most twice what is needed.
    """
    wanted = longest + longest // 16
    step = max(UNIT, 1 << max(0, wanted.bit_length() - 4))
    needed = -(-wanted // step) * step if longest <= SHORT_ROOM else 0
    return needed if longest > room or needed < room // 2 else room


class NodeGather:
    """As :class:`MessageGather` on nodes of k ranks each: N messages between the nodes, then all of them in the nodes.

    A rank exchanges with the ranks of its local rank on other nodes.  All messages enter a node once, in N - 1 or
    log₂N rounds instead of p - 1 or log₂p.
    """

    def __init__(self, comm: Any) -> None:
        self.size, layout = comm.size, comm.layout
        self.between, self.inside = MessageGather(comm.inter_node), MessageGather(comm.intra_node)
        self.order = [rank for first in layout.members(0) for rank in layout.channel(first)]
        self.room = 0

    def set_room(self, room: int) -> None:
        """As for :class:`MessageGather`; inside a node as much as N such messages need."""
        nodes, self.room = self.between.comm.size, room
        self.between.set_room(room)
        self.inside.set_room(UNIT * (nodes + 1) + nodes * room if room else 0)

    def gather(self, message: Octets) -> tuple[list[Octets], int]:
        """The messages of all ranks in rank order, and the bytes that this rank sent (collective)."""
        channel, nbytes = self.between.gather(message)
        bundles, more = self.inside.gather(join_messages(channel))
        found = [each for bundle in bundles for each in split_messages(bundle)]
        by_rank = sorted(zip(self.order, found, strict=True), key=lambda pair: pair[0])
        self.set_room(room_after(max(each.size for each in found), self.room))  # the same in all channels
        return [each for _, each in by_rank], nbytes + more


def join_messages(messages: Sequence[Octets]) -> Octets:
    """The number of messages, their lengths, and then the messages, as one message."""
    lengths = np.array([len(messages), *(each.size for each in messages)], "<u8")
    return np.concatenate([lengths.view(np.uint8), *messages])


def split_messages(joined: Octets) -> list[Octets]:
    """The inverse of :func:`join_messages`; raises for bytes that it does not return."""
    number = int(joined[:8].view("<u8")[0]) if joined.size >= 8 else joined.size
    first = 8 * (number + 1)
    demand_whole(first <= joined.size, f"{joined.size} bytes for {number} messages")
    ends = list(accumulate(joined[8:first].view("<u8").tolist(), initial=first))
    demand_whole(ends[-1] == joined.size, f"{joined.size} bytes for messages of {ends[-1]}")
    return [joined[lo:hi] for lo, hi in pairwise(ends)]


def gather_messages(comm: Comm, message: Octets) -> list[Octets]:
    """The messages of all ranks in rank order, on every rank (collective).

    ``message``: flat uint8 of any length, which may differ between ranks and be 0.  A rank sends its message to p - 1
    ranks: 8 + its length bytes to each, or 8 + the room of a :class:`MessageGather` that ``comm`` keeps as
    ``message_gather``.  The returned arrays are writable.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before a message moves, where a rank's is not flat
    uint8.
    """
    return message_gather_of(comm).gather(message)[0]


def message_gather_of(comm: Comm) -> MessageGather:
    """The :class:`MessageGather` that a communicator keeps, else a new one."""
    kept = getattr(comm, "message_gather", None)
    return kept if isinstance(kept, MessageGather) else MessageGather(comm)


def gather_rest(comm: Comm, message: Octets, lengths: Ints) -> list[Octets]:
    """Gather messages of known lengths."""
    whole = int(lengths.sum()) <= MAX_GATHER_BYTES
    return (allgatherv if whole else allgatherv_chunked)(comm, message, lengths)


def allgatherv(comm: Comm | CountingComm, message: Octets, lengths: Ints) -> list[Octets]:
    """Gather messages of known lengths in one call."""
    buffer, counts = np.empty(int(lengths.sum()), np.uint8), lengths.tolist()
    comm.Allgatherv(message, [buffer, counts])
    return [buffer[lo:hi] for lo, hi in pairwise(accumulate(counts, initial=0))]


def allgatherv_chunked(comm: Comm, message: Octets, lengths: Ints) -> list[Octets]:
    """Gather messages of known lengths in as many calls as their sum needs."""
    chunk = max(1, MAX_GATHER_BYTES // comm.size)
    found: list[list[Octets]] = [[] for _ in range(comm.size)]
    for start in range(0, int(lengths.max()), chunk):
        sizes = np.clip(lengths - start, 0, chunk)
        mine = np.ascontiguousarray(message[start : start + chunk])
        for chunks, each in zip(found, allgatherv(comm, mine, sizes), strict=True):
            chunks.append(each)
    return [np.concatenate(chunks) for chunks in found]
