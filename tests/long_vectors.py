"""Collectives on more elements than 31 bits count: every byte is right, and a path that cannot take them says so.

``hpccomm-run -n 2 tests/long_vectors.py`` needs 16 GiB of free memory; ``--elements`` shortens the vectors, ``--calls``
names some of the calls.  A rank's int8 at place k of a vector that it sends is (k + 7 rank) mod 11, so sums are exact
and shifts show.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator

CHUNK = 11 * (1 << 20)
"""Elements that are compared at a time; the pattern repeats in it."""


@lru_cache(maxsize=64)
def make_chunk(rank: int, shift: int) -> Any:
    """The numbers of a rank from a place on that leaves ``shift``."""
    return ((np.arange(shift, shift + CHUNK, dtype=np.int32) + 7 * rank) % 11).astype(np.int8)


def pattern(rank: int, first: int, count: int) -> Any:
    """The numbers of a rank from a place on, at most a chunk."""
    return make_chunk(rank, first % 11)[:count]


def fill(vector: Any, rank: int) -> Any:
    """Write the numbers of a rank."""
    for first in range(0, vector.size, CHUNK):
        part = vector[first : first + CHUNK]
        part[...] = pattern(rank, first, part.size)
    return vector


def check(vector: Any, want: Callable[[int, int], Any], first: int = 0) -> None:
    """Raise unless the vector, whose first element has place ``first``, is ``want(first, count)`` everywhere."""
    for at in range(0, vector.size, CHUNK):
        part = vector[at : at + CHUNK]
        assert np.array_equal(part, want(first + at, part.size)), f"wrong after element {at}"


class Vectors:
    """The vectors of one call: n elements in all, or as many blocks as ranks of equal or unequal lengths."""

    def __init__(self, comm: Communicator, n: int) -> None:
        self.comm, self.p, self.rank, self.n = comm, comm.size, comm.rank, n
        self.each = n // comm.size
        self.counts = [self.each + 5 * (q - comm.size // 2) for q in range(comm.size)]
        self.seconds = 0.0

    def make(self, n: int) -> Any:
        """A vector to send."""
        return fill(np.empty(n, np.int8), self.rank)

    def room(self, n: int) -> Any:
        """A vector to receive into."""
        return np.zeros(n, np.int8)

    def time(self, call: Callable[..., None], *given: Any, **named: Any) -> None:
        """Make the call."""
        self.comm.Barrier()
        began = time.monotonic()
        call(*given, **named)
        self.seconds = time.monotonic() - began

    def sum_of(self, ranks: int) -> Callable[[int, int], Any]:
        """The sum of the vectors of the first ranks."""
        return lambda first, count: np.sum([pattern(rank, first, count) for rank in range(ranks)], 0, np.int8)

    def check_blocks(self, got: Any, counts: list[int], places: list[int]) -> None:
        """Raise unless block q of what was received is of rank q, from this place of its vector on."""
        ends = np.cumsum([0, *counts]).tolist()
        for rank, first in enumerate(places):
            part = got[ends[rank] : ends[rank + 1]]
            check(part, lambda at, count, rank=rank: pattern(rank, at, count), first)


def allreduce(on: Vectors, **named: Any) -> None:
    """The sum, in place."""
    x = on.make(on.n)
    on.time(on.comm.Allreduce, MPI.IN_PLACE, x, **named)
    check(x, on.sum_of(on.p))


def reduce(on: Vectors, **named: Any) -> None:
    """The sum on the last rank."""
    x, y = on.make(on.n), on.room(on.n) if on.rank == on.p - 1 else None
    on.time(on.comm.Reduce, x, y, root=on.p - 1, **named)
    if y is not None:
        check(y, on.sum_of(on.p))


def reduce_scatter_block(on: Vectors, **named: Any) -> None:
    """A block of the sum."""
    x, y = on.make(on.each * on.p), on.room(on.each)
    on.time(on.comm.Reduce_scatter_block, x, y, **named)
    check(y, on.sum_of(on.p), on.rank * on.each)


def reduce_scatter(on: Vectors, **named: Any) -> None:
    """A block of any length of the sum."""
    x, y = on.make(sum(on.counts)), on.room(on.counts[on.rank])
    on.time(on.comm.Reduce_scatter, x, y, on.counts, **named)
    check(y, on.sum_of(on.p), sum(on.counts[: on.rank]))


def scan(on: Vectors) -> None:
    """The sum up to this rank."""
    x, y = on.make(on.n), on.room(on.n)
    on.time(on.comm.Scan, x, y)
    check(y, on.sum_of(on.rank + 1))


def exscan(on: Vectors) -> None:
    """The sum below this rank."""
    x, y = on.make(on.n), on.room(on.n)
    on.time(on.comm.Exscan, x, y)
    if on.rank:
        check(y, on.sum_of(on.rank))


def bcast(on: Vectors, **named: Any) -> None:
    """From the last rank."""
    root = on.p - 1
    x = on.make(on.n) if on.rank == root else on.room(on.n)
    on.time(on.comm.Bcast, x, root, **named)
    check(x, lambda first, count: pattern(root, first, count))


def allgather(on: Vectors, **named: Any) -> None:
    """n elements of all ranks together."""
    x, y = on.make(on.each), on.room(on.each * on.p)
    on.time(on.comm.Allgather, x, y, **named)
    on.check_blocks(y, [on.each] * on.p, [0] * on.p)


def allgatherv(on: Vectors, **named: Any) -> None:
    """Blocks of any length."""
    x, y = on.make(on.counts[on.rank]), on.room(sum(on.counts))
    on.time(on.comm.Allgatherv, x, [y, on.counts], **named)
    on.check_blocks(y, on.counts, [0] * on.p)


def gather(on: Vectors) -> None:
    """On the last rank."""
    x, y = on.make(on.each), on.room(on.each * on.p) if on.rank == on.p - 1 else None
    on.time(on.comm.Gather, x, y, on.p - 1)
    if y is not None:
        on.check_blocks(y, [on.each] * on.p, [0] * on.p)


def gatherv(on: Vectors) -> None:
    """On the last rank, of any length."""
    x, y = on.make(on.counts[on.rank]), on.room(sum(on.counts)) if on.rank == on.p - 1 else None
    on.time(on.comm.Gatherv, x, None if y is None else [y, on.counts], on.p - 1)
    if y is not None:
        on.check_blocks(y, on.counts, [0] * on.p)


def scatter(on: Vectors) -> None:
    """From the last rank."""
    root = on.p - 1
    x, y = on.make(on.each * on.p) if on.rank == root else None, on.room(on.each)
    on.time(on.comm.Scatter, x, y, root)
    check(y, lambda first, count: pattern(root, first, count), on.rank * on.each)


def scatterv(on: Vectors) -> None:
    """From the last rank, of any length."""
    root = on.p - 1
    x, y = [on.make(sum(on.counts)), on.counts] if on.rank == root else None, on.room(on.counts[on.rank])
    on.time(on.comm.Scatterv, x, y, root)
    check(y, lambda first, count: pattern(root, first, count), sum(on.counts[: on.rank]))


def alltoall(on: Vectors, **named: Any) -> None:
    """n elements from every rank."""
    x, y = on.make(on.each * on.p), on.room(on.each * on.p)
    on.time(on.comm.Alltoall, x, y, **named)
    on.check_blocks(y, [on.each] * on.p, [on.rank * on.each] * on.p)


def alltoallv(on: Vectors) -> None:
    """n elements from every rank, of which each gets another number."""
    mine = on.counts[on.rank]
    x, y = on.make(sum(on.counts)), on.room(mine * on.p)
    on.time(on.comm.Alltoallv, [x, on.counts], [y, [mine] * on.p])
    on.check_blocks(y, [mine] * on.p, [sum(on.counts[: on.rank])] * on.p)


OURS: tuple[Callable[..., None], ...] = (
    *(allreduce, reduce, reduce_scatter_block, reduce_scatter, bcast, allgather, allgatherv, alltoall),
)
INHERITED: tuple[Callable[..., None], ...] = (scan, exscan, gather, gatherv, scatter, scatterv, alltoallv)


def run(comm: Communicator, call: Callable[..., None], n: int, **named: Any) -> None:
    """Make one call and say what has come of it."""
    on, began, said = Vectors(comm, n), time.monotonic(), f"{n} int8 are right"
    try:
        call(on, **named)
    except ArgumentError as error:
        said = f"refused: {error}"
    slowest = comm.allreduce(on.seconds, MPI.MAX)
    if comm.rank == 0:
        rate = f", the call {slowest:.1f} s, {n / slowest / 1e9:.2f} GB/s" if slowest else ""
        path = named.get("algorithm", "native")
        print(f"{call.__name__} by {path}: {said} ({time.monotonic() - began:.0f} s{rate})", flush=True)


def main() -> int:
    """Run every call on every path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=(1 << 31) + 22, help="of a vector (2^31 + 22)")
    parser.add_argument("--paths", default="auto,native", help="algorithms of the calls that have any (auto,native)")
    parser.add_argument("--calls", default="", help="names of calls (all)")
    args = parser.parse_args()
    comm, names = Communicator(MPI.COMM_WORLD), args.calls.split(",") if args.calls else []
    for path in args.paths.split(","):
        for call in (each for each in OURS if each.__name__ in names or not names):
            run(comm, call, args.elements, algorithm=path)
    for call in (each for each in INHERITED if each.__name__ in names or not names):
        run(comm, call, args.elements)
    return 0


if __name__ == "__main__":
    sys.exit(main())
