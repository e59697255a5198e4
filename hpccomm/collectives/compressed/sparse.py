"""Collectives of messages that differ in length: sparse vectors, and byte messages of any kind.

*p ranks; n elements; k elements that a rank names; words of 4 bytes.*  A sparse vector is two flat arrays of the same
length: indices (uint32, ascending, below n) and values (float32).  On the wire the indices come first, then the values.

==========================  =====================  ====================================================================
:func:`sparse_allreduce`    messages a rank        words a rank sends
==========================  =====================  ====================================================================
``allgather``               p - 1                  2k(p-1)
``recursive_doubling``      log₂p                  2k in the first round, at most n in each
``split``                   2(p-1)                 2k(p-1)/p, then p-1 times what its part of the sum holds, at most n/p
``dense``                   2(p-1)                 2n(p-1)/p
``ok_topk``                 2(p-1)                 about 4k(p-1)/p
``gtopk``                   2 log₂p                2k to its parent; rank 0 then 2k to each other rank
==========================  =====================  ====================================================================

The first four are exact.  The last two keep the k largest elements of the sum and tell each rank what it has to keep:
see :class:`SparseSum`.  Before data moves, all ranks compare what they were asked for (8 bytes a question).  "Bytes
sent" counts what a rank hands over: its part once for each of the p - 1 others in an allgather or broadcast, 2(p-1)/p
of the vector in an allreduce.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives.engine import even_cuts
from hpccomm.errors import ArgumentError
from hpccomm.kernels.compression_reference import Indices, Octets, Vector
from hpccomm.kernels.dispatch import compression as kernels
from hpccomm.layout import ETHERNET, Link

Ints = npt.NDArray[np.int64]

MAX_GATHER_BYTES = (1 << 31) - 1
"""Bytes that one call of MPI 3 gathers."""

DENSE_FROM = 4
"""A vector is sent with all its elements once n/4 of them are named: merging costs more than adding."""

TAG = 23463
"""Of all messages from one rank to another, on the communicator itself: do not receive ``ANY_TAG`` meanwhile."""

OK, NOT_FLAT, NOT_ASCENDING, NOT_FINITE, NO_K, UNKNOWN, BAD_PLAN, BAD_STATE = range(8)
PROBLEMS = (
    "",
    "arrays of another dtype, shape or length: pass flat contiguous arrays as documented",
    "indices that do not ascend or reach n: sort them, name each element once",
    "a NaN or an infinity: skip this step on all ranks",
    "no k: pass how many elements to keep, at least 1",
    "an algorithm that is not there: pass one of those in the documentation",
    "a plan for another n or number of ranks: leave it out, and pass on what this call returns",
    "an error state of another length or with a NaN: pass float32 zeros at first, then what the last call left",
)


class SparsePlan(NamedTuple):
    """What Ok-Topk found out and may use again: where the ranks' parts begin and end, and from which size it keeps."""

    cuts: tuple[int, ...]
    threshold: float


class SparseSum(NamedTuple):
    """What came of a sparse allreduce."""

    total: Vector
    """Float32 of shape (n,), the same bits on all ranks."""
    remainder: tuple[Indices, Vector]
    """What was brought here and is not in ``total``: add it to the residual.  Over all ranks ``total`` and the
    returned are all that was brought.  Empty after an exact algorithm."""
    path: str
    """The algorithm that ran."""
    bytes_sent: int
    """By this rank."""
    plan: SparsePlan | None = None
    """Of Ok-Topk, for the next call."""


class CountingComm:
    """A communicator that counts the bytes that this rank sends."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size, self.bytes_sent = comm, comm.rank, comm.size, 0

    def gather(self, message: Octets) -> list[Octets]:
        """The messages of all ranks, in rank order."""
        found, nbytes = message_gather_of(self.comm).gather(message)
        self.bytes_sent += nbytes
        return found

    def Allgather(self, mine: npt.NDArray[Any], room: npt.NDArray[Any]) -> None:
        """Mine goes to each other rank."""
        self.bytes_sent += mine.nbytes * (self.size - 1)
        self.comm.Allgather(mine, room)

    def Allgatherv(self, mine: npt.NDArray[Any], room: Any) -> None:
        """Mine goes to each other rank."""
        self.bytes_sent += mine.nbytes * (self.size - 1)
        self.comm.Allgatherv(mine, room)

    def Allreduce(self, mine: npt.NDArray[Any], room: npt.NDArray[Any]) -> None:
        """The least bytes that an allreduce sends."""
        self.bytes_sent += round(2 * (self.size - 1) * mine.nbytes / self.size)
        self.comm.Allreduce(mine, room)

    def Bcast(self, buffer: npt.NDArray[Any]) -> None:
        """Rank 0's goes to each other rank."""
        self.bytes_sent += buffer.nbytes * (self.size - 1) if self.rank == 0 else 0
        self.comm.Bcast(buffer, 0)

    def post(self, message: Octets, to: int) -> Any:
        """Begin to send."""
        self.bytes_sent += message.nbytes
        return self.comm.Isend(message, to, TAG)

    def fetch(self, source: int) -> Octets:
        """The next message from a rank."""
        from hpccomm.transports.mpi import probe_bytes

        message = np.empty(probe_bytes(self.comm, source, TAG), np.uint8)
        self.comm.Recv(message, source, TAG)
        return message

    def sendrecv(self, message: Octets, to: int, source: int) -> Octets:
        """Send one message, receive another."""
        request = self.post(message, to)
        received = self.fetch(source)
        request.Wait()
        return received

    def alltoall(self, messages: list[Octets]) -> list[Octets]:
        """Message j goes to rank j; returns what came from each rank, in rank order."""
        turns = range(1, self.size)
        ahead = [(self.rank + turn) % self.size for turn in turns]
        requests = [self.post(messages[to], to) for to in ahead]
        received = list(messages)
        for turn in turns:
            source = (self.rank - turn) % self.size
            received[source] = self.fetch(source)
        for request in requests:
            request.Wait()
        return received


def check_arguments(wire: CountingComm, who: str, problem: int, own: int, **alike: int) -> Ints:
    """``own`` of all ranks; raises on all where one has a problem or brings other arguments than rank 0."""
    mine = np.array([problem, own, *alike.values()], np.int64)
    table = np.empty(wire.size * mine.size, np.int64)
    wire.Allgather(mine, table)
    rows = table.reshape(wire.size, mine.size)
    for rank in np.flatnonzero(rows[:, 0]):
        raise ArgumentError(f"{who}: rank {rank} brings {PROBLEMS[rows[rank, 0]]}")
    for name, column in zip(alike, rows.T[2:], strict=True):
        for rank in np.flatnonzero(column != column[0]):
            raise ArgumentError(
                f"{who}: rank {rank} has another {name} than rank 0 ({column[rank]}, not {column[0]}): "
                "make the calls the same"
            )
    return rows[:, 1]


def number_of(name: Any) -> int:
    """A number for what ranks have to have alike."""
    return zlib.crc32(repr(name).encode())


# Messages of any length


SHORT_ROOM = 1 << 14
"""Bytes of a message up to which filling messages up to one length costs less than a second call."""
UNIT = 8
"""Lengths travel as 8 bytes, and parts begin at multiples of that."""


class MessageGather:
    """Messages of any length from every rank to all, by one call where they are about as long as the last ones.

    All ranks know how long the last messages were, so they agree, without asking, on a room for the next: in the first
    call travel each message's length and as much of it as the room holds, always between the same two arrays, so that
    the call is bound once; what does not fit follows in a second.
    """

    def __init__(self, comm: Any) -> None:
        self.comm, self.room = comm, 0
        self.arrays: tuple[Octets, Octets] | None = None

    def gather(self, message: Octets) -> tuple[list[Octets], int]:
        """The messages of all ranks in rank order, and the bytes that this rank sent (collective)."""
        fits = isinstance(message, np.ndarray) and message.dtype == np.uint8 and message.ndim == 1
        mine, everyone = self.arrays or self.allocate()
        mine[:UNIT].view(np.int64)[0] = message.size if fits else -1
        first = message[: self.room] if fits else mine[:0]
        mine[UNIT : UNIT + first.size] = first
        self.comm.Allgather(mine, everyone)
        rows = everyone.reshape(self.comm.size, mine.size)
        lengths = rows[:, :UNIT].copy().view(np.int64)[:, 0]
        if (lengths < 0).any():
            raise ArgumentError(
                f"gather_messages: rank {int(np.argmin(lengths))} brings no flat uint8 array: "
                "pass message.view(np.uint8)"
            )
        nbytes, longest, room = (self.comm.size - 1) * mine.size, int(lengths.max()), self.room
        if longest <= room:
            block = rows[:, UNIT:].copy()
            found = [block[rank, :length] for rank, length in enumerate(lengths.tolist())]
        else:
            firsts = [row[UNIT : UNIT + min(room, length)].copy() for row, length in zip(rows, lengths, strict=True)]
            rest = gather_rest(self.comm, np.ascontiguousarray(message[room:]), np.maximum(lengths - room, 0))
            found = [np.concatenate(each) for each in zip(firsts, rest, strict=True)] if room else rest
            nbytes += (self.comm.size - 1) * max(0, message.size - room)
        self.set_room(room_after(longest, room))
        return found, nbytes

    def allocate(self) -> tuple[Octets, Octets]:
        """Arrays for the room that there is."""
        size = UNIT + self.room
        self.arrays = np.zeros(size, np.uint8), np.empty(self.comm.size * size, np.uint8)
        return self.arrays

    def set_room(self, room: int) -> None:
        """This many bytes of a message travel in the next first call: the same on all ranks."""
        if room != self.room:
            self.room, self.arrays = room, None


def room_after(longest: int, room: int) -> int:
    """The room for the messages after those of which the longest had this many bytes.

    A sixteenth more than that, in steps of an eighth; none for long ones.  It stays while it holds the longest and is
    not twice what is needed.
    """
    wanted = longest + longest // 16
    step = max(UNIT, 1 << max(0, wanted.bit_length() - 4))
    needed = -(-wanted // step) * step if longest <= SHORT_ROOM else 0
    return needed if longest > room or needed < room // 2 else room


def gather_messages(comm: Any, message: Octets) -> list[Octets]:
    """The messages of all ranks in rank order, on every rank (collective).

    ``message``: flat uint8, of any length, which may differ between ranks and be 0.  ``comm``: anything with mpi4py's
    ``Allgather`` and ``Allgatherv``.  A rank's message goes to p - 1 others: 8 + its length bytes to each, or 8 + the
    room of a :class:`MessageGather` that ``comm`` keeps as ``message_gather``.  What is returned may be written.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before a message moves, where a rank's is not flat
    uint8.
    """
    return message_gather_of(comm).gather(message)[0]


def message_gather_of(comm: Any) -> MessageGather:
    """What a communicator gathers messages with."""
    kept = getattr(comm, "message_gather", None)
    return kept if isinstance(kept, MessageGather) else MessageGather(comm)


def gather_rest(comm: Any, message: Octets, lengths: npt.NDArray[np.int64]) -> list[Octets]:
    """Messages of known lengths."""
    whole = int(lengths.sum()) <= MAX_GATHER_BYTES
    return (allgatherv if whole else allgatherv_chunked)(comm, message, lengths)


def allgatherv(comm: Any, message: Octets, lengths: npt.NDArray[np.int64]) -> list[Octets]:
    """Messages of known lengths in one call."""
    room, counts = np.empty(int(lengths.sum()), np.uint8), lengths.tolist()
    comm.Allgatherv(message, [room, counts])
    return [room[lo:hi] for lo, hi in pairwise(accumulate(counts, initial=0))]


def allgatherv_chunked(comm: Any, message: Octets, lengths: npt.NDArray[np.int64]) -> list[Octets]:
    """Messages of known lengths in as many calls as their sum needs."""
    piece = max(1, MAX_GATHER_BYTES // comm.size)
    found: list[list[Octets]] = [[] for _ in range(comm.size)]
    for start in range(0, int(lengths.max()), piece):
        now = np.clip(lengths - start, 0, piece)
        mine = np.ascontiguousarray(message[start : start + piece])
        for parts, part in zip(found, allgatherv(comm, mine, now), strict=True):
            parts.append(part)
    return [np.concatenate(parts) for parts in found]


# Sparse vectors


def sparse_allgather(comm: Any, indices: Indices, values: Vector, n: int) -> list[tuple[Indices, Vector]]:
    """The sparse vectors of all ranks in rank order, on every rank (collective).

    ``indices``: uint32, ascending, below ``n``; ``values``: float32; both flat, of any length, 0 too.  NaN and infinity
    travel as they are.  A rank sends 24 bytes of what is compared to each other, and 8k as :func:`gather_messages`.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves, where a rank's arrays are not such
    or ``n`` differs.
    """
    wire = CountingComm(comm)
    check_arguments(wire, "sparse_allgather", find_vector_problem(indices, values, n, finite=False), 0, n=n)
    return [pairs_in(each) for each in wire.gather(octets_of(indices, values))]


def sparse_allreduce(
    comm: Any,
    indices: Indices,
    values: Vector,
    n: int,
    *,
    k: int | None = None,
    algorithm: str = "auto",
    plan: SparsePlan | None = None,
) -> SparseSum:
    """The sum of the sparse vectors of all ranks, dense, on every rank with the same bits (collective).

    ``indices``: uint32, ascending, below ``n``; ``values``: float32; both flat, of any length, 0 too.  ``algorithm``:

    - ``"allgather"``: everything to everyone; added in rank order.
    - ``"recursive_doubling"``: sums of 2, 4, … ranks; dense from n/4 elements (SparCML, Renggli et al., SC 2019).
      Added in pairs of ranks, so rounded in another order.
    - ``"split"``: each rank sums its part of the indices, in rank order; parts travel on sparse or dense, whichever is
      shorter (SparCML).
    - ``"dense"``: an ``Allreduce`` of n elements, in its order.
    - ``"ok_topk"``: as split, the parts cut so that they hold equally much; the ``k`` largest of the sum are kept (Li &
      Hoefler, PPoPP 2022).  Of equal magnitudes the lower index.  ``plan``, from an earlier call and the same on all
      ranks, saves finding the cuts and the threshold: then all that reach the threshold are kept, not k.
    - ``"gtopk"``: sums of two keep the ``k`` largest, up a tree (Shi et al., ICDCS 2019).  What is pruned on the way
      although its index gets through elsewhere is returned where it was pruned, so nothing is lost.
    - ``"auto"``: the least time by :func:`times`; of the exact ones without ``k``, of the other two with it.

    -0.0 becomes 0.0.  Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves, where a rank's
    arrays are not such, hold a NaN or an infinity, or ``n``, ``k``, ``algorithm`` or ``plan`` differ.
    """
    wire = CountingComm(comm)
    counts = check_arguments(
        wire,
        "sparse_allreduce",
        find_vector_problem(indices, values, n)
        or find_argument_problem(algorithm, k)
        or find_plan_problem(plan, n, wire.size),
        np.size(indices),
        n=n,
        k=k or 0,
        algorithm=number_of(algorithm),
        plan=number_of(plan),
    )
    path = (
        algorithm
        if algorithm != "auto"
        else select_algorithm(n, int(counts.max()), k, wire.size, getattr(comm, "link", ETHERNET))
    )
    values = values + np.float32(0)
    if path in LOSSY_ALGORITHMS:
        assert k is not None
        total, returned, found = LOSSY_ALGORITHMS[path](wire, indices, values, n, k, plan)
        return SparseSum(total, returned, path, wire.bytes_sent, found)
    total = EXACT_ALGORITHMS[path](wire, indices, values, n)
    return SparseSum(total, (indices[:0], values[:0]), path, wire.bytes_sent)


def hierarchical_allreduce(comm: Any, vector: Vector, between: Callable[[Any, Vector], Vector]) -> Vector:
    """Dense in the node, compressed between nodes: one result for all ranks (collective).

    The ranks of a node sum ``vector`` (float32 of shape (n,)); the first rank of each node calls ``between(leaders,
    sum)``, which returns float32 of shape (n,), the same on all leaders; all ranks get it.  ``comm`` has ``intra_node``
    and ``inter_node``.  What ``between`` keeps from step to step lives on the leaders.

    Where ``between`` raises on the leaders, all ranks raise :class:`~hpccomm.errors.ArgumentError`.
    """
    node, leaders = comm.intra_node, comm.inter_node
    total = np.empty_like(vector)
    node.Reduce(vector, total, root=0)
    failed = np.zeros(1, np.int64)
    error: Exception | None = None
    if node.rank == 0:
        try:
            total = between(leaders, total)
        except ArgumentError as refused:
            failed[0], error = 1, refused
    node.Bcast(failed, 0)
    if failed[0]:
        raise error or ArgumentError("hierarchical: the exchange between nodes was refused, see this node's first rank")
    node.Bcast(total, 0)
    return total


def find_vector_problem(indices: Any, values: Any, n: int, finite: bool = True) -> int:
    """Which problem a sparse vector has."""
    for array, dtype in ((indices, np.uint32), (values, np.float32)):
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            return NOT_FLAT
    if indices.size != values.size:
        return NOT_FLAT
    if not kernels().is_ascending(indices, n):
        return NOT_ASCENDING
    return NOT_FINITE if finite and not kernels().all_finite(values) else OK


def find_argument_problem(algorithm: str, k: int | None) -> int:
    """Which problem the other arguments have."""
    if algorithm not in (*EXACT_ALGORITHMS, *LOSSY_ALGORITHMS, "auto"):
        return UNKNOWN
    return NO_K if (algorithm in LOSSY_ALGORITHMS and k is None) or (k is not None and k < 1) else OK


def find_plan_problem(plan: SparsePlan | None, n: int, p: int) -> int:
    """Which problem a plan has."""
    fits = plan is None or (len(plan.cuts) == p + 1 and list(plan.cuts) == sorted(plan.cuts) and plan.cuts[-1] == n)
    return OK if fits and (plan is None or plan.cuts[0] == 0) else BAD_PLAN


def octets_of(indices: Indices, values: Vector) -> Octets:
    """Indices, then values."""
    return np.concatenate([indices.view(np.uint8), values.view(np.uint8)])


def pairs_in(octets: Octets) -> tuple[Indices, Vector]:
    """Indices and values."""
    half = octets.size // 2
    return octets[:half].view(np.uint32), octets[half:].view(np.float32)


def pack_vector(indices: Indices, values: Vector, n: int) -> Octets:
    """A vector of n elements, sparse while that is well below the 4n bytes by which a dense one is known."""
    if indices.size * DENSE_FROM < n:
        return octets_of(indices, values)
    dense = np.zeros(n, np.float32)
    dense[indices] = values
    return dense.view(np.uint8)


def add_vector(octets: Octets, out: Vector) -> None:
    """Add a vector as :func:`pack_vector` wrote it."""
    if octets.size == out.nbytes:
        out += octets.view(np.float32)
    else:
        kernels().scatter_add([pairs_in(octets)], out)


def merge_sparse(a: tuple[Indices, Vector], b: tuple[Indices, Vector]) -> tuple[Indices, Vector]:
    """The sum of two sparse vectors."""
    indices, places = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    values = np.zeros(indices.size, np.float32)
    values[places[: a[0].size]] += a[1]
    values[places[a[0].size :]] += b[1]
    return indices, values


# Exact sums


def sum_by_allgather(wire: CountingComm, indices: Indices, values: Vector, n: int) -> Vector:
    """Everything to everyone."""
    total = np.zeros(n, np.float32)
    kernels().scatter_add([pairs_in(each) for each in wire.gather(octets_of(indices, values))], total)
    return total


def sum_by_allreduce(wire: CountingComm, indices: Indices, values: Vector, n: int) -> Vector:
    """All elements."""
    mine, total = np.zeros(n, np.float32), np.zeros(n, np.float32)
    mine[indices] = values
    wire.Allreduce(mine, total)
    return total


def sum_by_doubling(wire: CountingComm, indices: Indices, values: Vector, n: int) -> Vector:
    """Sums of two ranks, of four, …; ranks beyond the last power of two give theirs to one below and get the result."""
    rank, inner = wire.rank, 1 << (wire.size.bit_length() - 1)
    piece = pack_vector(indices, values, n)
    if rank >= inner:
        piece = wire.sendrecv(piece, rank - inner, rank - inner)
    else:
        if rank + inner < wire.size:
            piece = sum_of(piece, wire.fetch(rank + inner), n)
        distance = 1
        while distance < inner:
            theirs = wire.sendrecv(piece, rank ^ distance, rank ^ distance)
            piece = sum_of(*((piece, theirs) if rank & distance == 0 else (theirs, piece)), n)
            distance *= 2
        if rank + inner < wire.size:
            wire.post(piece, rank + inner).Wait()
    total = np.zeros(n, np.float32)
    add_vector(piece, total)
    return total


def sum_of(a: Octets, b: Octets, n: int) -> Octets:
    """The sum of two packed vectors, packed."""
    if 4 * n not in (a.size, b.size):
        return pack_vector(*merge_sparse(pairs_in(a), pairs_in(b)), n)
    total = np.zeros(n, np.float32)
    add_vector(a, total)
    add_vector(b, total)
    return total.view(np.uint8)


def sum_by_split(wire: CountingComm, indices: Indices, values: Vector, n: int) -> Vector:
    """Each rank sums a part, then the parts go to everyone."""
    cuts = even_cuts(n, wire.size)
    mine = reduce_block(wire, indices, values, cuts)
    named = np.flatnonzero(mine).astype(np.uint32)
    parts = wire.gather(pack_vector(named, mine[named], mine.size))
    total = np.zeros(n, np.float32)
    for rank, part in enumerate(parts):
        add_vector(part, total[cuts[rank] : cuts[rank + 1]])
    return total


def reduce_block(wire: CountingComm, indices: Indices, values: Vector, cuts: Ints) -> Vector:
    """This rank's part of the sum, added in rank order."""
    at = np.searchsorted(indices, cuts)
    letters = [
        octets_of(indices[lo:hi] - np.uint32(first), values[lo:hi])
        for lo, hi, first in zip(at[:-1], at[1:], cuts[:-1], strict=True)
    ]
    mine = np.zeros(int(cuts[wire.rank + 1] - cuts[wire.rank]), np.float32)
    kernels().scatter_add([pairs_in(each) for each in wire.alltoall(letters)], mine)
    return mine


# The k largest


LossyResult = tuple[Vector, tuple[Indices, Vector], SparsePlan | None]
"""The sum, what this rank gets back, what Ok-Topk found out."""


def sum_by_ok_topk(
    wire: CountingComm, indices: Indices, values: Vector, n: int, k: int, plan: SparsePlan | None
) -> LossyResult:
    """Each rank sums a part; of the parts the k largest elements go to everyone."""
    cuts = balanced_cuts(wire, indices, n) if plan is None else np.array(plan.cuts, np.int64)
    mine = reduce_block(wire, indices, values, cuts)
    named = np.flatnonzero(mine).astype(np.uint32)
    magnitudes = np.abs(mine[named])
    threshold = kth_largest(wire, magnitudes, k) if plan is None else plan.threshold
    keep = magnitudes >= threshold if plan is not None else select_k(wire, magnitudes, threshold, k)
    named = named[keep]
    letter = octets_of(named + np.uint32(cuts[wire.rank]), mine[named])
    parts = [pairs_in(each) for each in wire.gather(letter)]
    total = np.zeros(n, np.float32)
    kernels().scatter_add(parts, total)
    back = ~np.isin(indices, np.concatenate([part[0] for part in parts]))
    return total, (indices[back], values[back]), SparsePlan(tuple(int(each) for each in cuts), threshold)


def balanced_cuts(wire: CountingComm, indices: Indices, n: int) -> Ints:
    """Cuts at the mean of where the ranks would cut their own indices into equal parts."""
    mine = even_cuts(n, wire.size)
    if indices.size:
        mine[1:-1] = indices[np.arange(1, wire.size) * indices.size // wire.size]
    table = np.empty(wire.size * mine.size, np.int64)
    wire.Allgather(mine, table)
    return table.reshape(wire.size, mine.size).sum(axis=0) // wire.size


def kth_largest(wire: CountingComm, magnitudes: Vector, k: int) -> float:
    """The k-th largest magnitude of all ranks, 0 where there are fewer: a byte a round, counted together."""
    bits = magnitudes.view(np.uint32)
    prefix, left = 0, k
    for shift in (24, 16, 8, 0):
        alike = bits[(bits.astype(np.uint64) >> np.uint64(shift + 8)) == prefix]
        counts = np.bincount((alike >> np.uint32(shift)) & np.uint32(255), minlength=256).astype(np.int64)
        together = np.empty_like(counts)
        wire.Allreduce(counts, together)
        above = np.cumsum(together[::-1])
        if above[-1] < left:
            return 0.0
        place = int(np.searchsorted(above, left))
        left -= int(above[place - 1]) if place else 0
        prefix = prefix << 8 | (255 - place)
    return float(np.uint32(prefix).view(np.float32))


def select_k(wire: CountingComm, magnitudes: Vector, threshold: float, k: int) -> npt.NDArray[np.bool_]:
    """Which elements of this part are among the k largest; of those equal to the threshold the first."""
    keep, equal = magnitudes > threshold, np.flatnonzero(magnitudes == threshold)
    table = np.empty(2 * wire.size, np.int64)
    wire.Allgather(np.array([np.count_nonzero(keep), equal.size], np.int64), table)
    above, ties = table.reshape(wire.size, 2).T
    room = k - int(above.sum()) - int(ties[: wire.rank].sum())
    keep[equal[: max(room, 0)]] = True
    return keep


def sum_by_gtopk(
    wire: CountingComm, indices: Indices, values: Vector, n: int, k: int, plan: SparsePlan | None
) -> LossyResult:
    """Sums of two prune to k, up a binomial tree; rank 0's goes to everyone."""
    rank, distance = wire.rank, 1
    held, lost = prune((indices, values), k)
    while distance < wire.size:
        if rank & distance:
            wire.post(octets_of(*held), rank - distance).Wait()
            break
        if rank + distance < wire.size:
            held, more = prune(merge_sparse(held, pairs_in(wire.fetch(rank + distance))), k)
            lost = merge_sparse(lost, more)
        distance *= 2
    length = np.array([8 * held[0].size], np.int64)
    wire.Bcast(length)
    letter = octets_of(*held) if rank == 0 else np.empty(int(length[0]), np.uint8)
    wire.Bcast(letter)
    final, sums = pairs_in(letter)
    total = np.zeros(n, np.float32)
    total[final] = sums
    mine, through = ~np.isin(indices, final), np.isin(lost[0], final)
    return total, merge_sparse((indices[mine], values[mine]), (lost[0][through], lost[1][through])), None


def prune(pairs: tuple[Indices, Vector], k: int) -> tuple[tuple[Indices, Vector], tuple[Indices, Vector]]:
    """The k largest, and the others."""
    indices, values = pairs
    keep = kernels().keep_largest(values, k)
    return (indices[keep], values[keep]), (indices[~keep], values[~keep])


EXACT_ALGORITHMS: dict[str, Callable[[CountingComm, Indices, Vector, int], Vector]] = {
    "allgather": sum_by_allgather,
    "recursive_doubling": sum_by_doubling,
    "split": sum_by_split,
    "dense": sum_by_allreduce,
}
LOSSY_ALGORITHMS: dict[str, Callable[[CountingComm, Indices, Vector, int, int, SparsePlan | None], LossyResult]] = {
    "ok_topk": sum_by_ok_topk,
    "gtopk": sum_by_gtopk,
}


# Which is cheapest


def times(n: int, count: int, k: int | None, p: int, link: Link) -> dict[str, float]:
    """Microseconds that the algorithms take with ``count`` elements a rank at random places of n, by alpha and beta.

    Without ``k`` of the exact ones, with it of those that keep k.  What d = count/n fills up to over p ranks is
    1 - (1-d)^p of n.
    """
    if p == 1:
        return dict.fromkeys(EXACT_ALGORITHMS if k is None else LOSSY_ALGORITHMS, 0.0)
    rounds, others, density = math.ceil(math.log2(p)), p - 1, min(1.0, count / max(n, 1))

    def nbytes(ranks: int, elements: float = n) -> float:
        filled = 1 - (1 - density) ** ranks
        return 4 * elements * (2 * filled if filled * DENSE_FROM < 1 else 1)

    def time(messages: float, sent: float) -> float:
        return messages * link.alpha + sent * link.beta

    if k is None:
        return {
            "allgather": time(rounds, 8 * count * others),
            "recursive_doubling": time(rounds, sum(nbytes(1 << each) for each in range(rounds))),
            "split": time(others + rounds, 8 * count * others / p + others * nbytes(p, n / p)),
            "dense": time(2 * others, 8 * n * others / p),
        }
    return {
        "ok_topk": time(2 * p + 2 * rounds, 24 * k * others / p),
        "gtopk": time(2 * rounds, 16 * k * rounds),
    }


def select_algorithm(n: int, count: int, k: int | None, p: int, link: Link) -> str:
    """The algorithm that takes the least time; of those within a tenth of it the first, which adds in rank order."""
    found = times(n, count, k, p, link)
    return next(name for name, time in found.items() if time <= 1.1 * min(found.values()))
