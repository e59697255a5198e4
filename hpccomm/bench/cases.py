"""The table of collectives that can be measured: what each moves, how it is called, and what must come out.

*p ranks, r this one, n elements as OSU counts them: the whole vector of a reduction or a broadcast, one part of
everything else.*  Every input is distinct per rank and position and a small integer, so that every order of summation
is exact, a rank that is counted twice while another is dropped shows, and so do parts that changed places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

Array = npt.NDArray[Any]
Allocate = Callable[[int, Any], Array]


class Exercise(NamedTuple):
    """One collective at one size, ready to be called."""

    call: Callable[..., None]
    """``call(communicator, root, **algorithm)``."""
    fill: Callable[[], None]
    """Lay out the inputs and spoil the outputs."""
    wrong: Callable[[int], int]
    """Elements of this rank's result that are wrong after a call with this root."""


class Setting(NamedTuple):
    """What an exercise is made for."""

    comm: Any
    count: int  # type: ignore[assignment]
    dtype: Any
    in_place: bool
    allocate: Allocate


class Case(NamedTuple):
    """A collective."""

    title: str
    """OSU's name of the test."""
    make: Callable[[Setting], Exercise]
    parts: bool
    """Whether Size is one part of p."""
    bus: Callable[[int], float]
    """busbw = algbw times this (nccl-tests' PERFORMANCE.md)."""
    rooted: bool = False
    reduces: bool = False
    chosen: bool = True
    """Whether ``algorithm=`` can be named."""

    def whole(self, size: int, p: int) -> int:
        """Bytes of the whole vector."""
        return size * p if self.parts else size


def value(rank: int, n: int, dtype: Any, p: int) -> Array:
    """A rank's operand; the sum over p ranks fits into a signed byte up to p = 32."""
    top = max(2, min(61, 127 // max(1, p)))
    return ((rank * 5 + np.arange(n) * 3 + rank * (np.arange(n) // 7)) % top).astype(dtype)


def total(p: int, n: int, dtype: Any) -> Array:
    """The sum of all operands."""
    result = value(0, n, dtype, p)
    for rank in range(1, p):
        result += value(rank, n, dtype, p)
    return result


def parts(p: int, n: int, dtype: Any, to: int = 0) -> Array:
    """All ranks' parts for one rank, side by side."""
    return np.concatenate([value(rank + 3 * to, n, dtype, 1) for rank in range(p)])


def differing(got: Array, want: Array) -> int:
    """How many elements are not what they must be."""
    return int(np.count_nonzero(got != want))


def allreduce(s: Setting) -> Exercise:
    """The whole vector, everywhere."""
    p, r = s.comm.size, s.comm.rank
    send, recv = s.allocate(s.count, s.dtype), s.allocate(s.count, s.dtype)
    mine, want = value(r, s.count, s.dtype, p), total(p, s.count, s.dtype)

    def fill() -> None:
        send[...] = mine
        recv[...] = mine if s.in_place else 0

    def call(comm: Any, root: int, **how: Any) -> None:
        comm.Allreduce(MPI.IN_PLACE if s.in_place else send, recv, **how)

    return Exercise(call, fill, lambda root: differing(recv, want))


def reduce(s: Setting) -> Exercise:
    """The whole vector, on the root."""
    p, r = s.comm.size, s.comm.rank
    send, recv = s.allocate(s.count, s.dtype), s.allocate(s.count, s.dtype)
    mine, want = value(r, s.count, s.dtype, p), total(p, s.count, s.dtype)

    def fill() -> None:
        send[...] = mine
        recv[...] = mine if s.in_place else 0

    def call(comm: Any, root: int, **how: Any) -> None:
        here = r == root
        comm.Reduce(MPI.IN_PLACE if here and s.in_place else send, recv if here else None, root=root, **how)

    return Exercise(call, fill, lambda root: differing(recv, want) if r == root else 0)


def bcast(s: Setting) -> Exercise:
    """The root's vector, everywhere."""
    buffer = s.allocate(s.count, s.dtype)

    def fill() -> None:
        buffer[...] = value(s.comm.rank, s.count, s.dtype, 1)

    def call(comm: Any, root: int, **how: Any) -> None:
        comm.Bcast(buffer, root=root, **how)

    return Exercise(call, fill, lambda root: differing(buffer, value(root, s.count, s.dtype, 1)))


def reduce_scatter(s: Setting) -> Exercise:
    """A part of the sum each; the first ranks take what is left over."""
    p, r = s.comm.size, s.comm.rank
    counts = [s.count // p + (rank < s.count % p) for rank in range(p)]
    first = sum(counts[:r])
    send = s.allocate(s.count, s.dtype)
    recv = send if s.in_place else s.allocate(counts[r], s.dtype)
    mine, want = value(r, s.count, s.dtype, p), total(p, s.count, s.dtype)[first : first + counts[r]]

    def fill() -> None:
        send[...] = mine
        if not s.in_place:
            recv[...] = 0

    def call(comm: Any, root: int, **how: Any) -> None:
        comm.Reduce_scatter(MPI.IN_PLACE if s.in_place else send, recv, counts, **how)

    return Exercise(call, fill, lambda root: differing(recv[: counts[r]], want))


def reduce_scatter_block(s: Setting) -> Exercise:
    """An equal part of the sum each."""
    p, r = s.comm.size, s.comm.rank
    part = s.count // p
    send = s.allocate(part * p, s.dtype)
    recv = send if s.in_place else s.allocate(part, s.dtype)
    mine, want = value(r, part * p, s.dtype, p), total(p, part * p, s.dtype)[part * r : part * (r + 1)]

    def fill() -> None:
        send[...] = mine
        if not s.in_place:
            recv[...] = 0

    def call(comm: Any, root: int, **how: Any) -> None:
        comm.Reduce_scatter_block(MPI.IN_PLACE if s.in_place else send, recv, **how)

    return Exercise(call, fill, lambda root: differing(recv[:part], want))


def gathering(name: str, uneven: bool) -> Callable[[Setting], Exercise]:
    """Allgather and Allgatherv."""

    def make(s: Setting) -> Exercise:
        p, r, n = s.comm.size, s.comm.rank, s.count
        send, recv = s.allocate(n, s.dtype), s.allocate(n * p, s.dtype)
        into = [recv, [n] * p, MPI.Datatype.fromcode(np.dtype(s.dtype).char)] if uneven else recv
        want = parts(p, n, s.dtype)

        def fill() -> None:
            send[...] = value(r, n, s.dtype, 1)
            recv[...] = 0
            recv[n * r : n * (r + 1)] = send if s.in_place else 0

        def call(comm: Any, root: int, **how: Any) -> None:
            getattr(comm, name)(MPI.IN_PLACE if s.in_place else send, into, **how)

        return Exercise(call, fill, lambda root: differing(recv, want))

    return make


def exchanging(name: str, uneven: bool) -> Callable[[Setting], Exercise]:
    """Alltoall and Alltoallv."""

    def make(s: Setting) -> Exercise:
        p, r, n = s.comm.size, s.comm.rank, s.count
        send, recv = s.allocate(n * p, s.dtype), s.allocate(n * p, s.dtype)
        letter = MPI.Datatype.fromcode(np.dtype(s.dtype).char)
        out, into = ([send, [n] * p, letter], [recv, [n] * p, letter]) if uneven else (send, recv)
        mine = np.concatenate([value(r + 3 * to, n, s.dtype, 1) for to in range(p)])
        want = parts(p, n, s.dtype, r)

        def fill() -> None:
            send[...] = mine
            recv[...] = mine if s.in_place else 0

        def call(comm: Any, root: int, **how: Any) -> None:
            getattr(comm, name)(MPI.IN_PLACE if s.in_place else out, into, **how)

        return Exercise(call, fill, lambda root: differing(recv, want))

    return make


def collecting(name: str, uneven: bool) -> Callable[[Setting], Exercise]:
    """Gather and Gatherv."""

    def make(s: Setting) -> Exercise:
        p, r, n = s.comm.size, s.comm.rank, s.count
        send, recv = s.allocate(n, s.dtype), s.allocate(n * p, s.dtype)
        into = [recv, [n] * p, MPI.Datatype.fromcode(np.dtype(s.dtype).char)] if uneven else recv
        want = parts(p, n, s.dtype)

        def fill() -> None:
            send[...] = value(r, n, s.dtype, 1)
            recv[...] = 0
            recv[n * r : n * (r + 1)] = send if s.in_place else 0

        def call(comm: Any, root: int, **how: Any) -> None:
            here = r == root
            getattr(comm, name)(MPI.IN_PLACE if here and s.in_place else send, into if here else None, root)

        return Exercise(call, fill, lambda root: differing(recv, want) if r == root else 0)

    return make


def dealing(name: str, uneven: bool) -> Callable[[Setting], Exercise]:
    """Scatter and Scatterv."""

    def make(s: Setting) -> Exercise:
        p, r, n = s.comm.size, s.comm.rank, s.count
        send, recv = s.allocate(n * p, s.dtype), s.allocate(n, s.dtype)
        out = [send, [n] * p, MPI.Datatype.fromcode(np.dtype(s.dtype).char)] if uneven else send
        want = value(r, n, s.dtype, 1)

        def fill() -> None:
            send[...] = parts(p, n, s.dtype)
            recv[...] = want if s.in_place else 0

        def call(comm: Any, root: int, **how: Any) -> None:
            here = r == root
            getattr(comm, name)(out if here else None, MPI.IN_PLACE if here and s.in_place else recv, root)

        return Exercise(call, fill, lambda root: differing(recv, want))

    return make


def barrier(s: Setting) -> Exercise:
    """Nothing to move, nothing to check."""
    return Exercise(lambda comm, root, **how: comm.Barrier(), lambda: None, lambda root: 0)


def shared_out(p: int) -> float:
    """Every rank keeps a p-th."""
    return (p - 1) / p


def one(p: int) -> float:
    """The vector crosses each link once."""
    return 1.0


def twice(p: int) -> float:
    """Reduced, then gathered."""
    return 2 * (p - 1) / p


CASES: dict[str, Case] = {
    "allreduce": Case("Allreduce", allreduce, False, twice, reduces=True),
    "reduce": Case("Reduce", reduce, False, one, rooted=True, reduces=True),
    "bcast": Case("Broadcast", bcast, False, one, rooted=True),
    "reduce_scatter": Case("Reduce_scatter", reduce_scatter, False, shared_out, reduces=True),
    "reduce_scatter_block": Case("Reduce_scatter_block", reduce_scatter_block, False, shared_out, reduces=True),
    "allgather": Case("Allgather", gathering("Allgather", False), True, shared_out),
    "allgatherv": Case("Allgatherv", gathering("Allgatherv", True), True, shared_out),
    "alltoall": Case("All-to-All Personalized Exchange", exchanging("Alltoall", False), True, shared_out, chosen=False),
    "alltoallv": Case(
        "All-to-Allv Personalized Exchange", exchanging("Alltoallv", True), True, shared_out, chosen=False
    ),
    "gather": Case("Gather", collecting("Gather", False), True, shared_out, rooted=True, chosen=False),
    "gatherv": Case("Gatherv", collecting("Gatherv", True), True, shared_out, rooted=True, chosen=False),
    "scatter": Case("Scatter", dealing("Scatter", False), True, shared_out, rooted=True, chosen=False),
    "scatterv": Case("Scatterv", dealing("Scatterv", True), True, shared_out, rooted=True, chosen=False),
    "barrier": Case("Barrier", barrier, False, one, chosen=False),
}
"""By name.  To measure one more collective is to add a row."""
