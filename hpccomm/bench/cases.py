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

from hpccomm.bench.inputs import ALL_RANKS, NO_RANK, Array, Block, Blocks

Call = Callable[[], object]

PEER_STRIDE = 7919
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
    def is_root(self) -> bool:
        """Whether this rank is the root."""
        return self.rank == self.root

    @property
    def counts(self) -> list[int]:
        """Elements of a vector for each rank; the first ranks take what is left over."""
        return [self.count // self.ranks + (rank < self.count % self.ranks) for rank in range(self.ranks)]

    def vector_buffer(self, buffer: Array) -> list[Any]:
        """A buffer of equal parts, as the calls for unequal parts want it."""
        counts, displs = [self.count] * self.ranks, [self.count * rank for rank in range(self.ranks)]
        return [buffer, counts, displs, MPI.Datatype.fromcode(self.dtype.char)]


class Contents(NamedTuple):
    """Numbers in a rank's buffers."""

    send: Blocks = ()
    before: Blocks = ()
    """In the buffer that is received into, from its beginning; the rest is spoilt."""
    after: Blocks = ()
    """There after the call."""

    def lengths(self) -> tuple[int, int]:
        """Elements to send from and to receive into."""
        send, before, after = (sum(piece.length for piece in pieces) for pieces in self)
        return send, max(before, after)


def allreduce(s: Shape) -> Contents:
    """Everybody's vectors become the sum."""
    mine = (Block(s.rank, 0, s.count),)
    total = (Block(ALL_RANKS, 0, s.count),)
    return Contents(before=mine, after=total) if s.in_place else Contents(send=mine, after=total)


def reduce(s: Shape) -> Contents:
    """The sum, on the root."""
    return allreduce(s) if s.is_root else Contents(send=(Block(s.rank, 0, s.count),))


def bcast(s: Shape) -> Contents:
    """The root's vector, everywhere."""
    vector = (Block(s.root, 0, s.count),)
    return Contents(before=vector if s.is_root else (), after=vector)


def scatter_sum(s: Shape, cuts: Sequence[int]) -> Contents:
    """A part of the sum each."""
    mine = (Block(s.rank, 0, sum(cuts)),)
    part = (Block(ALL_RANKS, sum(cuts[: s.rank]), cuts[s.rank]),)
    return Contents(before=mine, after=part) if s.in_place else Contents(send=mine, after=part)


def reduce_scatter(s: Shape) -> Contents:
    """Parts that differ by one where they must."""
    return scatter_sum(s, s.counts)


def reduce_scatter_block(s: Shape) -> Contents:
    """Equal parts; what is left over takes no part."""
    return scatter_sum(s, [s.count // s.ranks] * s.ranks)


def allgather(s: Shape) -> Contents:
    """Everybody's part, everywhere."""
    mine, gap = Block(s.rank, 0, s.count), Block(NO_RANK, 0, s.count * s.rank)
    after = tuple(Block(rank, 0, s.count) for rank in range(s.ranks))
    return Contents(before=(gap, mine), after=after) if s.in_place else Contents(send=(mine,), after=after)


def gather(s: Shape) -> Contents:
    """Everybody's part, on the root."""
    return allgather(s) if s.is_root else Contents(send=(Block(s.rank, 0, s.count),))


def alltoall(s: Shape) -> Contents:
    """A part from everybody for everybody."""
    mine = tuple(Block(s.rank, PEER_STRIDE * peer, s.count) for peer in range(s.ranks))
    after = tuple(Block(peer, PEER_STRIDE * s.rank, s.count) for peer in range(s.ranks))
    return Contents(before=mine, after=after) if s.in_place else Contents(send=mine, after=after)


def scatter(s: Shape) -> Contents:
    """A part of the root's for everybody."""
    send = tuple(Block(s.root, PEER_STRIDE * peer, s.count) for peer in range(s.ranks)) if s.is_root else ()
    kept = s.is_root and s.in_place
    return Contents(send=send, after=() if kept else (Block(s.root, PEER_STRIDE * s.rank, s.count),))


def barrier(s: Shape) -> Contents:
    """Nothing."""
    return Contents()


def unidirectional(s: Shape) -> Contents:
    """Rank 0's message, on rank 1."""
    message = (Block(0, 0, s.count),)
    return Contents(send=message) if s.rank == 0 else Contents(after=message)


def bidirectional(s: Shape) -> Contents:
    """Each rank's message, on the other."""
    return Contents(send=(Block(s.rank, 0, s.count),), after=(Block(1 - s.rank, 0, s.count),))


# --- calls -----------------------------------------------------------------------------------------

Arguments = Callable[[Shape, Any, Any], tuple[Any, ...]]
Bind = Callable[[Any, Shape, Array, Array, tuple[str, ...]], Call]


@dataclass(frozen=True)
class MethodCall:
    """A method of a communicator and what it is called with; everything is prepared, nothing but the call is timed."""

    method: str
    arguments: Arguments

    def __call__(self, comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
        return partial(getattr(comm, self.method), *self.arguments(s, send, recv), *named)


def send_buffer(s: Shape, send: Any) -> Any:
    """What is sent."""
    return MPI.IN_PLACE if s.in_place else send


def rooted_buffer(s: Shape, send: Any) -> Any:
    """What is sent to the root; only there it can be in place."""
    return MPI.IN_PLACE if s.in_place and s.is_root else send


def root_buffer(s: Shape, buffer: Any) -> Any:
    """What only the root has."""
    return buffer if s.is_root else None


def ping_pong(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
    """There and back."""

    def serve() -> None:
        comm.Send(send, 1, 1)
        comm.Recv(recv, 1, 1)

    def answer() -> None:
        comm.Recv(recv, 0, 1)
        comm.Send(send, 0, 1)

    return serve if s.rank == 0 else answer


def send_window(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
    """A window of messages to rank 1, a short answer back."""
    window, wait_all, answer = range(s.window), MPI.Request.Waitall, bytearray(1)

    def send_all() -> None:
        wait_all([comm.Isend(send, 1, 2) for _ in window])
        comm.Recv(answer, 1, 3)

    def receive_all() -> None:
        wait_all([comm.Irecv(recv, 0, 2) for _ in window])
        comm.Send(answer, 0, 3)

    return send_all if s.rank == 0 else receive_all


def exchange_windows(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
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

    def counts(self, size: int) -> tuple[int, int]:
        """Timed and untimed calls."""
        return self[:2] if size <= LARGE else self[2:]


LARGE = 8192
"""OSU takes fewer calls above."""
COLLECTIVE, LATENCY, BANDWIDTH = Repeats(1000, 100, 100, 10), Repeats(10000, 100, 1000, 10), Repeats(100, 10, 20, 2)


def unit_factor(p: int) -> float:
    """The vector crosses the busiest link once."""
    return 1.0


def allgather_factor(p: int) -> float:
    """Every rank keeps a p-th."""
    return (p - 1) / p


def allreduce_factor(p: int) -> float:
    """Reduced, then gathered."""
    return 2 * (p - 1) / p


@dataclass(frozen=True)
class Case:
    """One row."""

    title: str
    """In OSU's header."""
    contents: Callable[[Shape], Contents]
    bind: Bind
    bus: Callable[[int], float] = unit_factor
    """Bus bandwidth is algbw times this (nccl-tests, PERFORMANCE.md)."""
    size_per_rank: bool = False
    """Whether Size is one rank's part."""
    has_root: bool = False
    reduces: bool = False
    in_place: bool = True
    """Whether MPI has it in place."""
    algorithms: str = ""
    """The collective under whose name its algorithms are listed, if they can be named."""
    ends: int = 0
    """Of a test between two ranks: messages whose time one call takes (-1: the window)."""
    directions: int = 1
    repeats: Repeats = COLLECTIVE

    def count(self, size: int, itemsize: int, ranks: int, whole: bool) -> int:
        """Elements of a size, which is that of the ``whole`` vector, or OSU's."""
        return size // itemsize // (ranks if self.size_per_rank and whole else 1)

    def nbytes(self, count: int, itemsize: int, ranks: int) -> int:
        """Bytes of the whole vector: what bandwidth is counted on."""
        return count * itemsize * self.directions * (ranks if self.size_per_rank else 1)

    def messages(self, window: int) -> int:
        """Parts of a call's time that are reported."""
        return 1 if not self.ends else window if self.ends < 0 else self.ends


EXCHANGE = "{} Personalized Exchange Latency Test"

CASES: dict[str, Case] = {
    "allreduce": Case(
        "Allreduce Latency Test",
        allreduce,
        MethodCall("Allreduce", lambda s, send, recv: (send_buffer(s, send), recv, MPI.SUM)),
        allreduce_factor,
        reduces=True,
        algorithms="allreduce",
    ),
    "reduce": Case(
        "Reduce Latency Test",
        reduce,
        MethodCall("Reduce", lambda s, send, recv: (rooted_buffer(s, send), root_buffer(s, recv), MPI.SUM, s.root)),
        has_root=True,
        reduces=True,
        algorithms="reduce",
    ),
    "bcast": Case(
        "Broadcast Latency Test",
        bcast,
        MethodCall("Bcast", lambda s, send, recv: (recv, s.root)),
        has_root=True,
        in_place=False,
        algorithms="bcast",
    ),
    "reduce_scatter": Case(
        "Reduce_scatter Latency Test",
        reduce_scatter,
        MethodCall("Reduce_scatter", lambda s, send, recv: (send_buffer(s, send), recv, s.counts, MPI.SUM)),
        allgather_factor,
        reduces=True,
        algorithms="reduce_scatter",
    ),
    "reduce_scatter_block": Case(
        "Reduce_scatter_block Latency Test",
        reduce_scatter_block,
        MethodCall("Reduce_scatter_block", lambda s, send, recv: (send_buffer(s, send), recv, MPI.SUM)),
        allgather_factor,
        reduces=True,
        algorithms="reduce_scatter",
    ),
    "allgather": Case(
        "Allgather Latency Test",
        allgather,
        MethodCall("Allgather", lambda s, send, recv: (send_buffer(s, send), recv)),
        allgather_factor,
        size_per_rank=True,
        algorithms="allgather",
    ),
    "allgatherv": Case(
        "Allgatherv Latency Test",
        allgather,
        MethodCall("Allgatherv", lambda s, send, recv: (send_buffer(s, send), s.vector_buffer(recv))),
        allgather_factor,
        size_per_rank=True,
        algorithms="allgather",
    ),
    "alltoall": Case(
        EXCHANGE.format("All-to-All"),
        alltoall,
        MethodCall("Alltoall", lambda s, send, recv: (send_buffer(s, send), recv)),
        allgather_factor,
        size_per_rank=True,
        algorithms="alltoall",
    ),
    "alltoallv": Case(
        EXCHANGE.format("All-to-Allv"),
        alltoall,
        MethodCall("Alltoallv", lambda s, send, recv: (send_buffer(s, s.vector_buffer(send)), s.vector_buffer(recv))),
        allgather_factor,
        size_per_rank=True,
    ),
    "gather": Case(
        "Gather Latency Test",
        gather,
        MethodCall("Gather", lambda s, send, recv: (rooted_buffer(s, send), root_buffer(s, recv), s.root)),
        allgather_factor,
        size_per_rank=True,
        has_root=True,
    ),
    "gatherv": Case(
        "Gatherv Latency Test",
        gather,
        MethodCall(
            "Gatherv", lambda s, send, recv: (rooted_buffer(s, send), root_buffer(s, s.vector_buffer(recv)), s.root)
        ),
        allgather_factor,
        size_per_rank=True,
        has_root=True,
    ),
    "scatter": Case(
        "Scatter Latency Test",
        scatter,
        MethodCall("Scatter", lambda s, send, recv: (root_buffer(s, send), rooted_buffer(s, recv), s.root)),
        allgather_factor,
        size_per_rank=True,
        has_root=True,
    ),
    "scatterv": Case(
        "Scatterv Latency Test",
        scatter,
        MethodCall(
            "Scatterv", lambda s, send, recv: (root_buffer(s, s.vector_buffer(send)), rooted_buffer(s, recv), s.root)
        ),
        allgather_factor,
        size_per_rank=True,
        has_root=True,
    ),
    "barrier": Case("Barrier Latency Test", barrier, MethodCall("Barrier", lambda s, send, recv: ()), in_place=False),
    "latency": Case("Latency Test", bidirectional, ping_pong, in_place=False, ends=2, repeats=LATENCY),
    "bw": Case("Bandwidth Test", unidirectional, send_window, in_place=False, ends=-1, repeats=BANDWIDTH),
    "bibw": Case(
        "Bi-Directional Bandwidth Test",
        bidirectional,
        exchange_windows,
        in_place=False,
        ends=-1,
        directions=2,
        repeats=BANDWIDTH,
    ),
}
