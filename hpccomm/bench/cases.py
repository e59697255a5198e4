"""The table of what can be measured: how each is called, what each rank holds before, and what must come out.

*p ranks, r this one, n elements: the whole vector of a reduction or a broadcast, one rank's part of everything else
(OSU's Size).*  To measure one more collective is to add a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.bench.inputs import EVERYBODY, NOBODY, Array, Piece, Pieces

Call = Callable[[], object]

APART = 7919
"""Distance of what one rank sends to one rank from what it sends to the next."""


@dataclass(frozen=True)
class Shape:
    """One call as one rank sees it."""

    ranks: int
    rank: int
    root: int
    count: int
    dtype: np.dtype[Any]
    in_place: bool = False
    window: int = 64
    """Messages in flight in the bandwidth tests."""

    @property
    def here(self) -> bool:
        """Whether this rank is the root."""
        return self.rank == self.root

    @property
    def cuts(self) -> list[int]:
        """Elements of a vector for each rank; the first ranks take what is left over."""
        return [self.count // self.ranks + (rank < self.count % self.ranks) for rank in range(self.ranks)]

    def parts(self, buffer: Array) -> list[Any]:
        """A buffer of equal parts, as the calls for unequal parts want it."""
        counts, displs = [self.count] * self.ranks, [self.count * rank for rank in range(self.ranks)]
        return [buffer, counts, displs, MPI.Datatype.fromcode(self.dtype.char)]


class Layout(NamedTuple):
    """Numbers in a rank's buffers."""

    send: Pieces = ()
    before: Pieces = ()
    """In the buffer that is received into, from its beginning; the rest is spoilt."""
    after: Pieces = ()
    """There after the call."""

    def lengths(self) -> tuple[int, int]:
        """Elements to send from and to receive into."""
        send, before, after = (sum(piece.length for piece in pieces) for pieces in self)
        return send, max(before, after)


def allreduce(s: Shape) -> Layout:
    """Everybody's vectors become the sum."""
    mine = (Piece(s.rank, 0, s.count),)
    total = (Piece(EVERYBODY, 0, s.count),)
    return Layout(before=mine, after=total) if s.in_place else Layout(send=mine, after=total)


def reduce(s: Shape) -> Layout:
    """The sum, on the root."""
    return allreduce(s) if s.here else Layout(send=(Piece(s.rank, 0, s.count),))


def bcast(s: Shape) -> Layout:
    """The root's vector, everywhere."""
    vector = (Piece(s.root, 0, s.count),)
    return Layout(before=vector if s.here else (), after=vector)


def scattered(s: Shape, cuts: Sequence[int]) -> Layout:
    """A part of the sum each."""
    mine = (Piece(s.rank, 0, sum(cuts)),)
    part = (Piece(EVERYBODY, sum(cuts[: s.rank]), cuts[s.rank]),)
    return Layout(before=mine, after=part) if s.in_place else Layout(send=mine, after=part)


def reduce_scatter(s: Shape) -> Layout:
    """Parts that differ by one where they must."""
    return scattered(s, s.cuts)


def reduce_scatter_block(s: Shape) -> Layout:
    """Equal parts; what is left over takes no part."""
    return scattered(s, [s.count // s.ranks] * s.ranks)


def allgather(s: Shape) -> Layout:
    """Everybody's part, everywhere."""
    mine, gap = Piece(s.rank, 0, s.count), Piece(NOBODY, 0, s.count * s.rank)
    after = tuple(Piece(rank, 0, s.count) for rank in range(s.ranks))
    return Layout(before=(gap, mine), after=after) if s.in_place else Layout(send=(mine,), after=after)


def gather(s: Shape) -> Layout:
    """Everybody's part, on the root."""
    return allgather(s) if s.here else Layout(send=(Piece(s.rank, 0, s.count),))


def alltoall(s: Shape) -> Layout:
    """A part from everybody for everybody."""
    mine = tuple(Piece(s.rank, APART * peer, s.count) for peer in range(s.ranks))
    after = tuple(Piece(peer, APART * s.rank, s.count) for peer in range(s.ranks))
    return Layout(before=mine, after=after) if s.in_place else Layout(send=mine, after=after)


def scatter(s: Shape) -> Layout:
    """A part of the root's for everybody."""
    send = tuple(Piece(s.root, APART * peer, s.count) for peer in range(s.ranks)) if s.here else ()
    kept = s.here and s.in_place
    return Layout(send=send, after=() if kept else (Piece(s.root, APART * s.rank, s.count),))


def barrier(s: Shape) -> Layout:
    """Nothing."""
    return Layout()


def one_way(s: Shape) -> Layout:
    """Rank 0's message, on rank 1."""
    message = (Piece(0, 0, s.count),)
    return Layout(send=message) if s.rank == 0 else Layout(after=message)


def both_ways(s: Shape) -> Layout:
    """Each rank's message, on the other."""
    return Layout(send=(Piece(s.rank, 0, s.count),), after=(Piece(1 - s.rank, 0, s.count),))


# --- calls -----------------------------------------------------------------------------------------

Arguments = Callable[[Shape, Any, Any], tuple[Any, ...]]
Bind = Callable[[Any, Shape, Array, Array, tuple[str, ...]], Call]


@dataclass(frozen=True)
class Calling:
    """A method of a communicator and what it is called with; everything is prepared, nothing but the call is timed."""

    method: str
    arguments: Arguments

    def __call__(self, comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
        return partial(getattr(comm, self.method), *self.arguments(s, send, recv), *named)


def from_either(s: Shape, send: Any) -> Any:
    """What is sent."""
    return MPI.IN_PLACE if s.in_place else send


def from_rank(s: Shape, send: Any) -> Any:
    """What is sent to the root; only there it can be in place."""
    return MPI.IN_PLACE if s.in_place and s.here else send


def at_root(s: Shape, buffer: Any) -> Any:
    """What only the root has."""
    return buffer if s.here else None


def ping_pong(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
    """There and back."""

    def serve() -> None:
        comm.Send(send, 1, 1)
        comm.Recv(recv, 1, 1)

    def answer() -> None:
        comm.Recv(recv, 0, 1)
        comm.Send(send, 0, 1)

    return serve if s.rank == 0 else answer


def window_one_way(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
    """A window of messages to rank 1, a short answer back."""
    window, wait_all, answer = range(s.window), MPI.Request.Waitall, bytearray(1)

    def send_all() -> None:
        wait_all([comm.Isend(send, 1, 2) for _ in window])
        comm.Recv(answer, 1, 3)

    def receive_all() -> None:
        wait_all([comm.Irecv(recv, 0, 2) for _ in window])
        comm.Send(answer, 0, 3)

    return send_all if s.rank == 0 else receive_all


def window_both_ways(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
    """A window of messages each way, a short answer to rank 0."""
    window, wait_all, answer, peer = range(s.window), MPI.Request.Waitall, bytearray(1), 1 - s.rank

    def exchange() -> None:
        requests = [comm.Irecv(recv, peer, 2) for _ in window]
        requests += [comm.Isend(send, peer, 2) for _ in window]
        wait_all(requests)
        if peer:
            comm.Recv(answer, 1, 3)
        else:
            comm.Send(answer, 0, 3)

    return exchange


# --- the table -------------------------------------------------------------------------------------


class Repeats(NamedTuple):
    """Calls a size, up to LARGE bytes and above."""

    timed: int
    untimed: int
    timed_large: int
    untimed_large: int

    def at(self, size: int) -> tuple[int, int]:
        """Timed and untimed calls."""
        return self[:2] if size <= LARGE else self[2:]


LARGE = 8192
"""OSU takes fewer calls above."""
COLLECTIVE, LATENCY, BANDWIDTH = Repeats(1000, 100, 100, 10), Repeats(10000, 100, 1000, 10), Repeats(100, 10, 20, 2)


def once(p: int) -> float:
    """The vector crosses the busiest link once."""
    return 1.0


def without_own(p: int) -> float:
    """Every rank keeps a p-th."""
    return (p - 1) / p


def there_and_back(p: int) -> float:
    """Reduced, then gathered."""
    return 2 * (p - 1) / p


@dataclass(frozen=True)
class Case:
    """One row."""

    title: str
    """In OSU's header."""
    layout: Callable[[Shape], Layout]
    bind: Bind
    bus: Callable[[int], float] = once
    """Bus bandwidth is algbw times this (nccl-tests, PERFORMANCE.md)."""
    parts: bool = False
    """Whether Size is one rank's part."""
    rooted: bool = False
    reduces: bool = False
    in_place: bool = True
    """Whether MPI has it in place."""
    algorithms: str = ""
    """The collective under whose name its algorithms are listed, if they can be named."""
    ends: int = 0
    """Of a test between two ranks: messages whose time one call takes (-1: the window)."""
    ways: int = 1
    repeats: Repeats = COLLECTIVE

    def count(self, size: int, itemsize: int, ranks: int, whole: bool) -> int:
        """Elements of a size, which is that of the ``whole`` vector, or OSU's."""
        return size // itemsize // (ranks if self.parts and whole else 1)

    def nbytes(self, count: int, itemsize: int, ranks: int) -> int:
        """Bytes of the whole vector: what bandwidth is counted on."""
        return count * itemsize * self.ways * (ranks if self.parts else 1)

    def messages(self, window: int) -> int:
        """Parts of a call's time that are reported."""
        return 1 if not self.ends else window if self.ends < 0 else self.ends


EXCHANGE = "{} Personalized Exchange Latency Test"

CASES: dict[str, Case] = {
    "allreduce": Case(
        "Allreduce Latency Test",
        allreduce,
        Calling("Allreduce", lambda s, send, recv: (from_either(s, send), recv, MPI.SUM)),
        there_and_back,
        reduces=True,
        algorithms="allreduce",
    ),
    "reduce": Case(
        "Reduce Latency Test",
        reduce,
        Calling("Reduce", lambda s, send, recv: (from_rank(s, send), at_root(s, recv), MPI.SUM, s.root)),
        rooted=True,
        reduces=True,
        algorithms="reduce",
    ),
    "bcast": Case(
        "Broadcast Latency Test",
        bcast,
        Calling("Bcast", lambda s, send, recv: (recv, s.root)),
        rooted=True,
        in_place=False,
        algorithms="bcast",
    ),
    "reduce_scatter": Case(
        "Reduce_scatter Latency Test",
        reduce_scatter,
        Calling("Reduce_scatter", lambda s, send, recv: (from_either(s, send), recv, s.cuts, MPI.SUM)),
        without_own,
        reduces=True,
        algorithms="reduce_scatter",
    ),
    "reduce_scatter_block": Case(
        "Reduce_scatter_block Latency Test",
        reduce_scatter_block,
        Calling("Reduce_scatter_block", lambda s, send, recv: (from_either(s, send), recv, MPI.SUM)),
        without_own,
        reduces=True,
        algorithms="reduce_scatter",
    ),
    "allgather": Case(
        "Allgather Latency Test",
        allgather,
        Calling("Allgather", lambda s, send, recv: (from_either(s, send), recv)),
        without_own,
        parts=True,
        algorithms="allgather",
    ),
    "allgatherv": Case(
        "Allgatherv Latency Test",
        allgather,
        Calling("Allgatherv", lambda s, send, recv: (from_either(s, send), s.parts(recv))),
        without_own,
        parts=True,
        algorithms="allgather",
    ),
    "alltoall": Case(
        EXCHANGE.format("All-to-All"),
        alltoall,
        Calling("Alltoall", lambda s, send, recv: (from_either(s, send), recv)),
        without_own,
        parts=True,
        algorithms="alltoall",
    ),
    "alltoallv": Case(
        EXCHANGE.format("All-to-Allv"),
        alltoall,
        Calling("Alltoallv", lambda s, send, recv: (from_either(s, s.parts(send)), s.parts(recv))),
        without_own,
        parts=True,
    ),
    "gather": Case(
        "Gather Latency Test",
        gather,
        Calling("Gather", lambda s, send, recv: (from_rank(s, send), at_root(s, recv), s.root)),
        without_own,
        parts=True,
        rooted=True,
    ),
    "gatherv": Case(
        "Gatherv Latency Test",
        gather,
        Calling("Gatherv", lambda s, send, recv: (from_rank(s, send), at_root(s, s.parts(recv)), s.root)),
        without_own,
        parts=True,
        rooted=True,
    ),
    "scatter": Case(
        "Scatter Latency Test",
        scatter,
        Calling("Scatter", lambda s, send, recv: (at_root(s, send), from_rank(s, recv), s.root)),
        without_own,
        parts=True,
        rooted=True,
    ),
    "scatterv": Case(
        "Scatterv Latency Test",
        scatter,
        Calling("Scatterv", lambda s, send, recv: (at_root(s, s.parts(send)), from_rank(s, recv), s.root)),
        without_own,
        parts=True,
        rooted=True,
    ),
    "barrier": Case("Barrier Latency Test", barrier, Calling("Barrier", lambda s, send, recv: ()), in_place=False),
    "latency": Case("Latency Test", both_ways, ping_pong, in_place=False, ends=2, repeats=LATENCY),
    "bw": Case("Bandwidth Test", one_way, window_one_way, in_place=False, ends=-1, repeats=BANDWIDTH),
    "bibw": Case(
        "Bi-Directional Bandwidth Test",
        both_ways,
        window_both_ways,
        in_place=False,
        ends=-1,
        ways=2,
        repeats=BANDWIDTH,
    ),
}
