"""The table of benchmarks: how each collective is called, what each rank holds before the call and must hold after it.

*p ranks, r this one, n elements: the whole vector of a reduction or a broadcast, one rank's block of any other
collective (OSU's Size).*  To measure one more collective is to add a row.
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
"""Distance between the numbers that a rank sends to one peer and those that it sends to the next peer."""


@dataclass(frozen=True)
class Shape:
    """The size, root and datatype of a call, and the rank that makes it."""

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
        """Elements of a vector for each rank; the first ranks take one more where p does not divide n."""
        return [self.count // self.ranks + (rank < self.count % self.ranks) for rank in range(self.ranks)]

    def blocks(self, buffer: Array) -> list[Any]:
        """A buffer of equal blocks, with counts and displacements as the ``v`` collectives need them."""
        counts, displs = [self.count] * self.ranks, [self.count * rank for rank in range(self.ranks)]
        return [buffer, counts, displs, MPI.Datatype.fromcode(self.dtype.char)]


class Contents(NamedTuple):
    """The blocks of numbers in a rank's buffers."""

    send: Blocks = ()
    before: Blocks = ()
    """At the start of the receive buffer before the call; the rest is filled with poison."""
    after: Blocks = ()
    """At the start of the receive buffer after the call."""

    def lengths(self) -> tuple[int, int]:
        """Elements of the send and of the receive buffer."""
        send, before, after = (sum(block.length for block in blocks) for blocks in self)
        return send, max(before, after)


def allreduce(s: Shape) -> Contents:
    """Every rank receives the sum of all vectors."""
    mine = (Block(s.rank, 0, s.count),)
    total = (Block(ALL_RANKS, 0, s.count),)
    return Contents(before=mine, after=total) if s.in_place else Contents(send=mine, after=total)


def reduce(s: Shape) -> Contents:
    """The root receives the sum."""
    return allreduce(s) if s.is_root else Contents(send=(Block(s.rank, 0, s.count),))


def bcast(s: Shape) -> Contents:
    """Every rank receives the root's vector."""
    vector = (Block(s.root, 0, s.count),)
    return Contents(before=vector if s.is_root else (), after=vector)


def scatter_sum(s: Shape, counts: Sequence[int]) -> Contents:
    """Every rank receives its block of the sum."""
    mine = (Block(s.rank, 0, sum(counts)),)
    block = (Block(ALL_RANKS, sum(counts[: s.rank]), counts[s.rank]),)
    return Contents(before=mine, after=block) if s.in_place else Contents(send=mine, after=block)


def reduce_scatter(s: Shape) -> Contents:
    """Blocks that differ by one element where p does not divide n."""
    return scatter_sum(s, s.counts)


def reduce_scatter_block(s: Shape) -> Contents:
    """Equal blocks; the n mod p last elements are not sent."""
    return scatter_sum(s, [s.count // s.ranks] * s.ranks)


def allgather(s: Shape) -> Contents:
    """Every rank receives the blocks of all ranks."""
    mine, gap = Block(s.rank, 0, s.count), Block(NO_RANK, 0, s.count * s.rank)
    after = tuple(Block(rank, 0, s.count) for rank in range(s.ranks))
    return Contents(before=(gap, mine), after=after) if s.in_place else Contents(send=(mine,), after=after)


def gather(s: Shape) -> Contents:
    """The root receives the blocks of all ranks."""
    return allgather(s) if s.is_root else Contents(send=(Block(s.rank, 0, s.count),))


def alltoall(s: Shape) -> Contents:
    """Every rank sends every rank a block."""
    mine = tuple(Block(s.rank, PEER_STRIDE * peer, s.count) for peer in range(s.ranks))
    after = tuple(Block(peer, PEER_STRIDE * s.rank, s.count) for peer in range(s.ranks))
    return Contents(before=mine, after=after) if s.in_place else Contents(send=mine, after=after)


def scatter(s: Shape) -> Contents:
    """Every rank receives a block of the root's."""
    send = tuple(Block(s.root, PEER_STRIDE * peer, s.count) for peer in range(s.ranks)) if s.is_root else ()
    stays = s.is_root and s.in_place
    return Contents(send=send, after=() if stays else (Block(s.root, PEER_STRIDE * s.rank, s.count),))


def barrier(s: Shape) -> Contents:
    """No data."""
    return Contents()


def unidirectional(s: Shape) -> Contents:
    """Rank 1 receives rank 0's message."""
    message = (Block(0, 0, s.count),)
    return Contents(send=message) if s.rank == 0 else Contents(after=message)


def bidirectional(s: Shape) -> Contents:
    """Each rank receives the other's message."""
    return Contents(send=(Block(s.rank, 0, s.count),), after=(Block(1 - s.rank, 0, s.count),))


Arguments = Callable[[Shape, Any, Any], tuple[Any, ...]]
Bind = Callable[[Any, Shape, Array, Array, tuple[str, ...]], Call]


@dataclass(frozen=True)
class MethodCall:
    """A communicator's method and its arguments, which are built beforehand, so that only the call is timed."""

    method: str
    arguments: Arguments

    def __call__(self, comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
        return partial(getattr(comm, self.method), *self.arguments(s, send, recv), *named)


def send_buffer(s: Shape, send: Any) -> Any:
    """The send argument."""
    return MPI.IN_PLACE if s.in_place else send


def send_to_root(s: Shape, send: Any) -> Any:
    """The send argument of a rooted collective, which only the root can give as MPI_IN_PLACE."""
    return MPI.IN_PLACE if s.in_place and s.is_root else send


def root_buffer(s: Shape, buffer: Any) -> Any:
    """An argument that only the root gives."""
    return buffer if s.is_root else None


def ping_pong(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
    """A message to rank 1 and one back."""

    def serve() -> None:
        comm.Send(send, 1, 1)
        comm.Recv(recv, 1, 1)

    def answer() -> None:
        comm.Recv(recv, 0, 1)
        comm.Send(send, 0, 1)

    return serve if s.rank == 0 else answer


def send_window(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
    """A window of messages to rank 1, then a short answer from it."""
    window, wait_all, answer = range(s.window), MPI.Request.Waitall, bytearray(1)

    def send_all() -> None:
        wait_all([comm.Isend(send, 1, 2) for _ in window])
        comm.Recv(answer, 1, 3)

    def receive_all() -> None:
        wait_all([comm.Irecv(recv, 0, 2) for _ in window])
        comm.Send(answer, 0, 3)

    return send_all if s.rank == 0 else receive_all


def exchange_windows(comm: Any, s: Shape, send: Array, recv: Array, named: tuple[str, ...]) -> Call:
    """A window of messages in each direction, without an answer, as in osu_bibw."""
    window, wait_all, peer = range(s.window), MPI.Request.Waitall, 1 - s.rank

    def exchange() -> None:
        requests = [comm.Irecv(recv, peer, 2) for _ in window]
        requests += [comm.Isend(send, peer, 2) for _ in window]
        wait_all(requests)

    return exchange


class Repeats(NamedTuple):
    """Calls for each size: up to LARGE bytes, and above."""

    timed: int
    untimed: int
    timed_large: int
    untimed_large: int

    def counts(self, size: int) -> tuple[int, int]:
        """Timed and untimed calls."""
        return self[:2] if size <= LARGE else self[2:]


LARGE = 8192
"""OSU makes fewer calls above this size, bytes."""
COLLECTIVE, LATENCY, BANDWIDTH = Repeats(1000, 100, 100, 10), Repeats(10000, 100, 1000, 10), Repeats(100, 10, 20, 2)


def unit_factor(p: int) -> float:
    """The whole vector crosses the busiest link once."""
    return 1.0


def allgather_factor(p: int) -> float:
    """All but a rank's own p-th of the vector crosses its link."""
    return (p - 1) / p


def allreduce_factor(p: int) -> float:
    """A reduce-scatter, then an allgather."""
    return 2 * (p - 1) / p


@dataclass(frozen=True)
class Case:
    """One benchmark."""

    title: str
    """OSU's title."""
    contents: Callable[[Shape], Contents]
    bind: Bind
    bus: Callable[[int], float] = unit_factor
    """Bus bandwidth is the algorithm bandwidth times this factor (nccl-tests, PERFORMANCE.md)."""
    size_per_rank: bool = False
    """Whether OSU's Size is that of one rank's block."""
    has_root: bool = False
    reduces: bool = False
    in_place: bool = True
    """Whether MPI defines the collective in place."""
    algorithms: str = ""
    """The collective whose algorithms it can be measured with; empty if it takes none by name."""
    ends: int = 0
    """Of a test between two ranks: messages in one call (-1: the window)."""
    directions: int = 1
    repeats: Repeats = COLLECTIVE

    def count(self, size: int, itemsize: int, ranks: int, whole: bool) -> int:
        """Elements of a size in bytes: that of the ``whole`` vector, or OSU's Size."""
        return size // itemsize // (ranks if self.size_per_rank and whole else 1)

    def nbytes(self, count: int, itemsize: int, ranks: int) -> int:
        """Bytes of the whole vector, from which bandwidth is computed."""
        return count * itemsize * self.directions * (ranks if self.size_per_rank else 1)

    def messages(self, window: int) -> int:
        """Messages in a call, by whose number its time is divided."""
        return 1 if not self.ends else window if self.ends < 0 else self.ends


def collective(
    method: str,
    contents: Callable[[Shape], Contents],
    arguments: Arguments,
    algorithms: str = "",
    bus: Callable[[int], float] = allgather_factor,
    **more: Any,
) -> Case:
    """The row of a communicator's method; OSU's title follows from its name unless it is given."""
    more.setdefault("title", f"{method} Latency Test")
    return Case(contents=contents, bind=MethodCall(method, arguments), algorithms=algorithms, bus=bus, **more)


reduction = partial(collective, reduces=True)
gathers = partial(collective, size_per_rank=True)
rooted = partial(gathers, has_root=True)

CASES: dict[str, Case] = {
    "allreduce": reduction(
        "Allreduce", allreduce, lambda s, x, y: (send_buffer(s, x), y, MPI.SUM), "allreduce", allreduce_factor
    ),
    "reduce": reduction(
        "Reduce",
        reduce,
        lambda s, x, y: (send_to_root(s, x), root_buffer(s, y), MPI.SUM, s.root),
        "reduce",
        unit_factor,
        has_root=True,
    ),
    "bcast": collective(
        "Bcast",
        bcast,
        lambda s, x, y: (y, s.root),
        "bcast",
        unit_factor,
        title="Broadcast Latency Test",
        has_root=True,
        in_place=False,
    ),
    "reduce_scatter": reduction(
        "Reduce_scatter", reduce_scatter, lambda s, x, y: (send_buffer(s, x), y, s.counts, MPI.SUM), "reduce_scatter"
    ),
    "reduce_scatter_block": reduction(
        "Reduce_scatter_block", reduce_scatter_block, lambda s, x, y: (send_buffer(s, x), y, MPI.SUM), "reduce_scatter"
    ),
    "allgather": gathers("Allgather", allgather, lambda s, x, y: (send_buffer(s, x), y), "allgather"),
    "allgatherv": gathers("Allgatherv", allgather, lambda s, x, y: (send_buffer(s, x), s.blocks(y)), "allgather"),
    "alltoall": gathers(
        "Alltoall",
        alltoall,
        lambda s, x, y: (send_buffer(s, x), y),
        "alltoall",
        title="All-to-All Personalized Exchange Latency Test",
    ),
    "alltoallv": gathers(
        "Alltoallv",
        alltoall,
        lambda s, x, y: (send_buffer(s, s.blocks(x)), s.blocks(y)),
        title="All-to-Allv Personalized Exchange Latency Test",
    ),
    "gather": rooted("Gather", gather, lambda s, x, y: (send_to_root(s, x), root_buffer(s, y), s.root)),
    "gatherv": rooted("Gatherv", gather, lambda s, x, y: (send_to_root(s, x), root_buffer(s, s.blocks(y)), s.root)),
    "scatter": rooted("Scatter", scatter, lambda s, x, y: (root_buffer(s, x), send_to_root(s, y), s.root)),
    "scatterv": rooted("Scatterv", scatter, lambda s, x, y: (root_buffer(s, s.blocks(x)), send_to_root(s, y), s.root)),
    "barrier": collective("Barrier", barrier, lambda s, x, y: (), bus=unit_factor, in_place=False),
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
"""In the arguments of a method, s is the shape, x the send buffer and y the receive buffer."""
