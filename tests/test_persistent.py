"""Persistent collectives are MPI's own requests, whose calls are compared when they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from collective_arguments import N, arguments, numbers
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator, MismatchError
from hpccomm.requests import COMPARED

pytestmark = pytest.mark.mpi(sizes=(1, 2, 3))


@pytest.mark.parametrize("name", COMPARED)
def test_a_persistent_call_gives_what_the_call_gives(comm: Communicator, name: str) -> None:
    p, me = comm.size, comm.rank
    send, recv, want = numbers(me, p * N), np.zeros(p * N), np.zeros(p * N)
    request = getattr(comm, f"{name}_init")(*arguments(name, p, me, send, recv))
    assert isinstance(request, MPI.Prequest)
    for step in range(3):
        send += step
        recv[...] = want[...] = 7 * me
        request.Start()
        request.Wait()
        reference = arguments(name, p, me, send, want)
        getattr(comm, name)(*reference)
        assert np.array_equal(recv, want)
    request.Free()


def test_startall_starts_requests_of_several_collectives(comm: Communicator) -> None:
    a, b, c = numbers(comm.rank), np.zeros(N), np.full(N, float(comm.rank))
    requests = [comm.Allreduce_init(a, b), comm.Bcast_init(c, comm.size - 1), comm.Barrier_init()]
    for _ in range(3):
        MPI.Prequest.Startall(requests)
        MPI.Request.Waitall(requests)
        assert np.array_equal(b, sum(numbers(rank) for rank in range(comm.size)))
        assert (c == comm.size - 1).all()
    for each in requests:
        each.Free()


@pytest.mark.mpi(sizes=(2,))
def test_two_allreduces_started_in_opposite_orders_give_2_and_20(comm: Communicator) -> None:
    ones, tens, a, b = np.ones(1), np.full(1, 10.0), np.zeros(1), np.zeros(1)
    requests = [comm.Allreduce_init(ones, a), comm.Allreduce_init(tens, b)]
    for each in requests if comm.rank == 0 else requests[::-1]:
        each.Start()
    MPI.Request.Waitall(requests)
    assert (a[0], b[0]) == (2, 20)
    for each in requests:
        each.Free()


def test_requests_may_be_started_in_any_order(comm: Communicator) -> None:
    """Rank 0 starts the first one first, the others start it last."""
    p = comm.size
    inputs = [numbers(comm.rank) * k for k in (1, 10)]
    outputs = [np.zeros(N), np.zeros(N)]
    requests = [comm.Allreduce_init(x, y) for x, y in zip(inputs, outputs, strict=True)]
    total = sum(numbers(rank) for rank in range(p))
    for _ in range(20):
        for y in outputs:
            y[...] = 0
        order = requests if comm.rank == 0 else requests[::-1]
        for each in order:
            each.Start()
        MPI.Request.Waitall(order)
        assert np.array_equal(outputs[0], total)
        assert np.array_equal(outputs[1], total * 10)
    for each in requests:
        each.Free()


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize(
    ("name", "usual", "unusual", "remedy"),
    [
        ("Allreduce_init", (np.ones(8), np.ones(8)), (np.ones(4), np.ones(4)), "counts the same"),
        ("Allreduce_init", (np.ones(8), np.ones(8)), (np.ones(8, "i8"), np.ones(8, "i8")), "cast before the call"),
        ("Allreduce_init", (np.ones(8), np.ones(8)), (np.ones(8), np.ones(8), "max"), "same operation"),
        ("Bcast_init", (np.ones(8), 0), (np.ones(8), 1), "same root"),
        ("Bcast_init", (np.ones(8), 0), (np.ones(7), 0), "counts the same"),
        ("Gather_init", (np.ones(8), [np.ones(24), 8]), (np.ones(9), [np.ones(27), 9]), "counts the same"),
    ],
)
def test_ranks_that_make_different_requests_are_named(
    comm: Communicator, name: str, usual: Any, unusual: Any, remedy: str
) -> None:
    call = unusual if comm.rank == 1 else usual
    with pytest.raises(MismatchError, match=rf"rank 1 called {name}.*{remedy}"):
        getattr(comm, name)(*call)


@pytest.mark.mpi(sizes=(2,))
def test_a_request_does_not_meet_a_blocking_call(comm: Communicator) -> None:
    x, y = np.ones(8), np.ones(8)
    with pytest.raises(MismatchError, match="rank 1 called Allreduce_init"):
        (comm.Allreduce_init if comm.rank else comm.Allreduce)(x, y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x: c.Allreduce_init(x, x.copy(), algorithm="ring"), "MPI's own request and cannot run .*'ring'"),
        (lambda c, x: c.Allreduce_init(x, x.copy(), "avg"), "op='avg' is for reductions to whole results"),
        (lambda c, x: c.Allreduce_init(x.astype("f2"), x.astype("f2")), "cannot reduce float16: cast to float32"),
        (lambda c, x: c.Allreduce_init(x, x.copy(), MPI.BAND), "does not define band for float64"),
        (lambda c, x: c.Bcast_init(x, c.size), "is not a rank: pass one of 0"),
        (lambda c, x: c.Bcast_init(x[::2]), "the array is not contiguous"),
    ],
)
def test_wrong_persistent_calls_are_refused(comm: Communicator, call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=rf"rank {comm.rank}: \w+_init: .*{message}"):
        call(comm, np.ones(8))


def test_the_default_algorithm_of_a_communicator_does_not_reach_requests(comm: Communicator) -> None:
    comm.algorithm = "ring"
    x, y = numbers(comm.rank), np.zeros(N)
    for named in ({}, {"algorithm": "native"}, {"algorithm": "auto"}):
        request = comm.Allreduce_init(x, y, **named)  # type: ignore[arg-type]
        request.Start()
        request.Wait()
        assert np.array_equal(y, sum(numbers(rank) for rank in range(comm.size)))
        request.Free()


def overlapping(n: int) -> tuple[Any, Any]:
    """Two arrays that share all but one element."""
    whole = np.ones(n + 1)
    return whole[:-1], whole[1:]


def read_only(n: int) -> Any:
    made = np.ones(n)
    made.flags.writeable = False
    return made


REFUSED: dict[str, tuple[str, Callable[[Communicator], tuple[Any, ...]], str]] = {
    "two dtypes": ("Allreduce", lambda c: (np.ones(4, "f4"), np.ones(4)), "make both the same"),
    "two lengths": ("Allreduce", lambda c: (np.ones(4), np.ones(3)), "make both the same"),
    "buffers that overlap": ("Allreduce", lambda c: overlapping(4), "overlap"),
    "a read-only array": ("Allreduce", lambda c: (np.ones(4), read_only(4)), "read-only"),
    "a short Allgather": ("Allgather", lambda c: (np.ones(4), np.ones(3 * c.size)), "make|receives|room"),
    "two memory orders": ("Allgather", lambda c: (np.ones(2), np.asfortranarray(np.ones((2, c.size)))), "Fortran"),
    "an uneven Gather": ("Gather", lambda c: (np.ones(4), np.ones(4 * c.size + 1), c.rank), "multiple"),
    "a short Gather": ("Gather", lambda c: (np.ones(4), np.ones(3 * c.size), c.rank), "make both the same"),
    "blocks beyond the buffer": (
        "Alltoallv",
        lambda c: ([np.ones(c.size), [2] * c.size], [np.ones(c.size), [2] * c.size]),
        "pass a longer buffer",
    ),
    "blocks that overlap": (
        "Alltoallv",
        lambda c: (
            [np.ones(2 * c.size), [2] * c.size],
            [np.ones(2 * c.size), [2] * c.size, [0] * c.size, MPI.DOUBLE],
        ),
        "overlap",
    ),
    "counts that do not fit": ("Reduce_scatter", lambda c: (np.ones(2 * c.size), np.ones(2), [3] * c.size), "agree"),
    "a generator of counts": (
        "Reduce_scatter",
        lambda c: (np.ones(2 * c.size), np.ones(2), (2 for _ in range(c.size))),
        "a list of one for each rank",
    ),
    "a root that is no number": ("Bcast", lambda c: (np.ones(1), float("nan")), "not a rank"),
    "no root": ("Bcast", lambda c: (np.ones(1), None), "not a rank"),
    "no operation": ("Scan", lambda c: (np.ones(1), np.ones(1), None), "not an operation"),
    "a count beyond the buffer": ("Bcast", lambda c: ([np.ones(4), 2**40, MPI.DOUBLE],), "pass a longer buffer"),
    "a maximum of complex numbers": (
        "Allreduce",
        lambda c: (np.ones(2, "c16"), np.ones(2, "c16"), MPI.MAX),
        "not define max",
    ),
}
"""Wrong arguments, which MPI answers with errors of its own, or reads and writes beyond short buffers."""


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("mistake", REFUSED)
def test_what_the_blocking_call_refuses_is_refused(comm: Communicator, mistake: str) -> None:
    name, make, remedy = REFUSED[mistake]
    with pytest.raises(ArgumentError, match=remedy) as error:
        getattr(comm, f"{name}_init")(*make(comm))
    assert str(error.value).startswith(f"rank {comm.rank}: {name}_init")
    comm.Barrier()
