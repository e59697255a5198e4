"""Values that must be the same on all ranks, compared by a digest of 8 bytes from each rank."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from hpccomm.buckets import Bucket
from hpccomm.calls.fingerprint import format_ranks
from hpccomm.errors import ArgumentError, MismatchError

REMEDY = "pass the same names, shapes and dtypes in the same order on all ranks, e.g. dict(sorted(tensors.items()))"


def as_communicator(who: str, comm: Any) -> Any:
    """``comm`` with layout and levels: of mpi4py's own the one that :func:`hpccomm.allreduce` makes, once (collective).

    Others that have a rank and a size are taken as they are; raises for anything else.
    """
    mpi: Any = sys.modules.get("mpi4py.MPI")
    mpis = mpi is not None and isinstance(comm, mpi.Comm)
    if mpis and isinstance(comm, mpi.Intracomm) and comm != mpi.COMM_NULL:
        from hpccomm.functional import communicator

        return communicator(comm)
    if mpis or not (hasattr(comm, "rank") and hasattr(comm, "size")):
        raise ArgumentError(f"{who}: {comm!r} is no communicator: pass hpccomm.Communicator(MPI.COMM_WORLD)")
    return comm


def check_same_arguments(comm: Any, who: str, **mine: Any) -> None:
    """Raise on all ranks unless all passed the same (collective)."""
    everyone = comm.allgather(mine)
    for rank, theirs in enumerate(everyone):
        if theirs.keys() != everyone[0].keys():
            passed, first = (", ".join(each) for each in (theirs, everyone[0]))
            raise MismatchError(f"{who}: rank {rank} passes {passed}, rank 0 {first}: make all ranks call the same")
        for name, one in everyone[0].items():
            same = theirs[name] == one or repr(theirs[name]) == repr(one)  # NaN, which all ranks refuse later
            if not same:
                raise MismatchError(
                    f"{who}: {name} is {one!r} on rank 0, {theirs[name]!r} on rank {rank}: pass the same on all ranks"
                )


def find_odd_ranks(comm: Any, content: Any) -> list[int]:
    """The ranks whose bytes differ from those of rank 0 (collective)."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    digests = np.empty((comm.size, 8), np.uint8)
    comm.Allgather(np.frombuffer(digest, np.uint8), digests)
    odd: list[int] = np.flatnonzero((digests != digests[0]).any(axis=1)).tolist()
    return odd


def check_same_tensors(comm: Any, who: str, rows: Sequence[str], remedy: str = REMEDY) -> None:
    """Raise on all ranks unless they hold the same tensors, one row of text each, in the same order (collective)."""
    if problem := find_difference(comm, who, rows, remedy):
        raise MismatchError(problem)


def find_difference(comm: Any, who: str, rows: Sequence[str], remedy: str = REMEDY) -> str:
    """Where the ranks hold other tensors, the text of the error; empty where they hold the same (collective)."""
    if comm.size == 1:
        return ""
    odd = find_odd_ranks(comm, "\n".join(rows).encode())
    if not odd:
        return ""
    lists = comm.allgather(list(rows))
    pairs = zip_longest(lists[0], lists[odd[0]], fillvalue="nothing")
    at, (first, other) = next((at, pair) for at, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    return (
        f"rank {comm.rank}: {who}: the tensors of {format_ranks(odd)} differ from those of rank 0: number {at} is "
        f"{other} on rank {odd[0]}, {first} on rank 0: {remedy}"
    )


def rows_of(bucket: Bucket) -> list[str]:
    """The tensors of a bucket as rows for :func:`check_same_tensors`."""
    return [f"{entry.name!r} {bucket.dtype}{list(entry.shape)}" for entry in bucket.table]


def run_collectively(comm: Any, what: str, action: Callable[[], Any]) -> Any:
    """Run ``action`` on this rank; raises on all ranks if it raises on one (collective)."""
    found, problem, cause = None, "", None
    try:
        found = action()
    except Exception as error:
        problem, cause = str(error) or type(error).__name__, error
    for rank, each in enumerate(comm.allgather(problem)):
        if each:
            raise ArgumentError(f"{what}: rank {rank}: {each}") from cause
    return found
