"""Collectives of more than 2^31 elements, on every path."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator
from hpccomm.backends import native as backend
from hpccomm.backends.native import LARGE_COUNTS
from hpccomm.performance.tuning import Choice
from hpccomm.planner import Planner
from hpccomm.transports.segment import free_bytes

N = 2**31 + 8
NEEDED = 5 * N
"""Two arrays on two ranks, and the buffers of MPI."""


def count(array: np.ndarray, value: int) -> int:
    """Count elements equal to ``value`` block by block: one comparison of all would allocate 2 GiB."""
    return sum(np.count_nonzero(array[k : k + 2**22] == value) for k in range(0, N, 2**22))


@pytest.mark.slow
@pytest.mark.mpi(sizes=(2,), timeout=300)
def test_collectives_of_more_than_2_to_the_31_bytes_are_exact(comm: Communicator) -> None:
    free = comm.allreduce(free_bytes(), MPI.MIN)
    if free < NEEDED:
        pytest.skip(f"{free:,} bytes are free, {NEEDED:,} needed")
    mine = np.full(N, 1 << comm.rank, np.uint8)
    if MPI.VERSION < LARGE_COUNTS:
        with pytest.raises(ArgumentError, match="count up to 2147483647 elements: leave the algorithm out"):
            comm.Allreduce(MPI.IN_PLACE, mine, MPI.BOR, algorithm="native")
    for algorithm in ("shared", "ring", *(["native"] if MPI.VERSION >= LARGE_COUNTS else [])):
        mine[...] = 1 << comm.rank
        mine[[0, N // 2, 2**31 - 1, 2**31, N - 1]] = 4 << comm.rank
        comm.Allreduce(MPI.IN_PLACE, mine, MPI.BOR, algorithm=algorithm)
        assert (mine[[0, N // 2, 2**31 - 1, 2**31, N - 1]] == 12).all(), algorithm
        assert count(mine, 3) == N - 5, algorithm
    if comm.rank:
        mine[...] = 0
    comm.Bcast(mine, 0, algorithm="shared")
    assert count(mine, 3) == N - 5
    counts, displs = [N - 2**20, 2**20], [0, N - 2**20]
    mine[...] = 9
    mine[displs[comm.rank] :][: counts[comm.rank]] = comm.rank
    comm.Allgatherv(MPI.IN_PLACE, [mine, counts, displs, MPI.UINT8_T], algorithm="shared")
    assert count(mine, 1) == 2**20
    assert count(mine, 0) == N - 2**20


@pytest.mark.mpi
def test_native_mpi_with_int_counts_gets_no_larger_counts(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MPI of version 3 that counts up to 1000."""
    monkeypatch.setattr(backend, "INT_MAX", 1000)
    monkeypatch.setattr(backend, "LARGE_COUNTS", MPI.VERSION + 1)
    monkeypatch.setattr(comm.context, "decide", lambda *_: Choice("native", None, "the table says so"))
    ours = Planner(comm)
    for n, native in ((1000, True), (1001, False)):
        a = np.ones(n)
        call = ours.reader.read("Allreduce", MPI.IN_PLACE, a, MPI.SUM, None)
        choice = ours.choose(call, ours.candidates(call))
        assert (choice.algorithm == "native") == native
        comm.Allreduce(MPI.IN_PLACE, a)
        assert (a == comm.size).all()


@pytest.mark.mpi
def test_reductions_of_mpi_alone_refuse_larger_counts(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INT_MAX", 1000)
    monkeypatch.setattr(backend, "LARGE_COUNTS", MPI.VERSION + 1)
    for call in (comm.Scan, comm.Exscan):
        call(np.ones(500), np.empty(500))
        with pytest.raises(ArgumentError, match="count up to 1000 elements: make a call for each part of the vector"):
            call(np.ones(1001), np.empty(1001))
