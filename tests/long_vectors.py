"""Collectives on more elements than 31 bits count: every byte is right, and a path that cannot take them says so.

``hpccomm-run -n 2 tests/long_vectors.py`` needs 14 GiB of free memory; ``--elements`` shortens the vectors.  A rank's
int8 at place k of a vector that it sends is (k + 7 rank) mod 11, so sums are exact and shifts show.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator

CHUNK = 11 * (1 << 20)
"""Elements that are compared at a time; the pattern repeats in it."""


def pattern(rank: int, first: int, count: int) -> Any:
    """The numbers of a rank from a place on."""
    return ((np.arange(first % 11, first % 11 + count, dtype=np.int32) + 7 * rank) % 11).astype(np.int8)


def fill(vector: Any, rank: int) -> None:
    """Write the numbers of a rank."""
    for first in range(0, vector.size, CHUNK):
        part = vector[first : first + CHUNK]
        part[...] = pattern(rank, first, part.size)


def check(vector: Any, want: Callable[[int, int], Any], first: int = 0) -> None:
    """Raise unless the vector, whose first element has place ``first``, is ``want(first, count)`` everywhere."""
    for at in range(0, vector.size, CHUNK):
        part = vector[at : at + CHUNK]
        assert np.array_equal(part, want(first + at, part.size)), f"wrong after element {at}"


def allreduce(comm: Any, n: int, **named: Any) -> None:
    """The sum, in place."""
    x = np.empty(n, np.int8)
    fill(x, comm.rank)
    comm.Allreduce(MPI.IN_PLACE, x, **named)
    check(x, lambda first, count: sum(pattern(rank, first, count) for rank in range(comm.size)))


def bcast(comm: Any, n: int, **named: Any) -> None:
    """From the last rank."""
    x, root = np.zeros(n, np.int8), comm.size - 1
    if comm.rank == root:
        fill(x, root)
    comm.Bcast(x, root, **named)
    check(x, lambda first, count: pattern(root, first, count))


def allgather(comm: Any, n: int, **named: Any) -> None:
    """n elements of all ranks together."""
    each = n // comm.size
    x, y = np.empty(each, np.int8), np.zeros(each * comm.size, np.int8)
    fill(x, comm.rank)
    comm.Allgather(x, y, **named)
    for rank in range(comm.size):
        check(y[rank * each : (rank + 1) * each], lambda first, count, rank=rank: pattern(rank, first, count))


def alltoall(comm: Any, n: int, **named: Any) -> None:
    """n elements from every rank."""
    each = n // comm.size
    x, y = np.empty(each * comm.size, np.int8), np.zeros(each * comm.size, np.int8)
    fill(x, comm.rank)
    comm.Alltoall(x, y, **named)
    for rank in range(comm.size):
        part = y[rank * each : (rank + 1) * each]
        check(part, lambda first, count, rank=rank: pattern(rank, first, count), comm.rank * each)


CALLS = {"allreduce": allreduce, "bcast": bcast, "allgather": allgather, "alltoall": alltoall}


def main() -> int:
    """Run every call on every path."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=(1 << 31) + 22, help="of a vector (2^31 + 22)")
    parser.add_argument("--paths", default="auto,native", help="algorithms (auto,native)")
    args = parser.parse_args()
    comm = Communicator(MPI.COMM_WORLD)
    for path in args.paths.split(","):
        for name, call in CALLS.items():
            began, said = time.monotonic(), f"{args.elements} int8 are right"
            try:
                call(comm, args.elements, algorithm=path)
            except ArgumentError as error:
                said = f"refused: {error}"
            if comm.rank == 0:
                print(f"{name} by {path}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
            comm.Barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main())
