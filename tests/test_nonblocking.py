"""Non-blocking collectives: results, requests beside those of MPI, errors, and order among blocking calls."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from functools import partial
from typing import Any

import numpy as np
import pytest
from collective_arguments import N, arguments, numbers
from mpi4py import MPI
from nonblocking_rounds import run_rounds
from processor_time import measure_least

import hpccomm
from hpccomm import ArgumentError, Communicator, MismatchError, context
from hpccomm.errors import TransportError
from hpccomm.requests import COMPARED

pytestmark = pytest.mark.mpi(sizes=(1, 2, 3))


def start(comm: Communicator, name: str, *args: Any, **named: Any) -> Any:
    return getattr(comm, f"I{name.lower()}")(*args, **named)


COMPLETIONS: dict[str, Any] = {
    "Wait": lambda requests: [each.Wait() for each in requests],
    "reversed": lambda requests: [each.Wait() for each in reversed(requests)],
    "Test": lambda requests: [test_until_complete(each) for each in requests],
    "lower case": lambda requests: [each.wait() for each in requests],
    "Waitall": MPI.Request.Waitall,
    "Waitany": lambda requests: [MPI.Request.Waitany(requests) for _ in list(requests)],
    "Waitsome": lambda requests: repeat_until_null(requests, MPI.Request.Waitsome),
    "Testall": lambda requests: repeat_until_null(requests, MPI.Request.Testall),
    "Testany": lambda requests: repeat_until_null(requests, MPI.Request.Testany),
    "Testsome": lambda requests: repeat_until_null(requests, MPI.Request.Testsome),
}
"""Every way to complete requests."""


def test_until_complete(request: Any) -> None:
    while not request.Test():
        pass


test_until_complete.__test__ = False  # type: ignore[attr-defined]


def repeat_until_null(requests: list[Any], function: Any) -> None:
    until = time.monotonic() + 60
    while any(requests) and time.monotonic() < until:
        function(requests)
        time.sleep(1e-4)


@pytest.mark.parametrize("name", COMPARED)
def test_a_non_blocking_call_gives_what_the_call_gives(comm: Communicator, name: str) -> None:
    p, me = comm.size, comm.rank
    send, recv, want = numbers(me, p * N), np.zeros(p * N), np.zeros(p * N)
    for step in range(3):
        send += step
        recv[...] = want[...] = 7 * me
        request = start(comm, name, *arguments(name, p, me, send, recv))
        request.Wait()
        assert request == MPI.REQUEST_NULL
        getattr(comm, name)(*arguments(name, p, me, send, want))
        assert np.array_equal(recv, want)


@pytest.mark.parametrize("way", COMPLETIONS)
def test_requests_are_completed_in_every_way_beside_those_of_messages(comm: Communicator, way: str) -> None:
    p, me = comm.size, comm.rank
    a, b, c, d = numbers(me), np.zeros(N), np.full(N, float(me)), np.zeros(N)
    requests = [
        comm.Iallreduce(a, b),
        comm.Irecv(d, (me - 1) % p, 3),
        comm.Ibcast(c, p - 1),
        comm.Isend(a, (me + 1) % p, 3),
        comm.Ibarrier(),
    ]
    COMPLETIONS[way](requests)
    assert not any(requests)
    assert np.array_equal(b, sum(numbers(rank) for rank in range(p)))
    assert (c == p - 1).all()
    assert np.array_equal(d, numbers((me - 1) % p))


@pytest.mark.parametrize(
    ("change", "send"),
    [
        ("halves", np.arange(6, dtype="f2")),
        ("in place", MPI.IN_PLACE),
        ("average", np.arange(6.0)),
        ("reproducible", np.arange(6.0) / 3),
        ("algorithm", np.arange(6.0)),
        ("scalar", np.float64(4.0)),
        ("empty", np.zeros(0)),
        ("pairs", np.array([(2.0, 1)] * 2, np.dtype([("v", "f8"), ("i", "i4")], align=True))),
    ],
)
def test_arguments_and_buffers_of_our_own_work(comm: Communicator, change: str, send: Any) -> None:
    named: dict[str, Any] = {
        "average": {"op": "avg"},
        "reproducible": {"reproducible": True},
        "algorithm": {"algorithm": "ring"},
    }.get(change, {})
    got, want = (np.full_like(np.arange(6.0) if send is MPI.IN_PLACE else send, 3) for _ in range(2))
    form = (lambda x: [x, 2, MPI.DOUBLE_INT]) if change == "pairs" else (lambda x: x)
    operation = (MPI.MINLOC,) if change == "pairs" else ()
    comm.Iallreduce(form(send), form(got), *operation, **named).Wait()
    comm.Allreduce(form(send), form(want), *operation, **named)
    assert (got == want).all()


def test_buffers_lists_and_datatypes_may_be_dropped_and_changed_after_the_issue(comm: Communicator) -> None:
    """Data is kept alive until completion; counts and derived datatypes are read at the issue."""
    p, me = comm.size, comm.rank
    gate = comm.Ibarrier() if me else None  # rank 0 issues it last, so all calls are still waiting
    counts, displs, into = [N] * p, np.arange(p) * N, np.zeros(p * N)
    vector = MPI.DOUBLE.Create_vector(3, 1, 2).Commit()
    strided = np.zeros(6)
    gate = gate or comm.Ibarrier()
    source = numbers(me)
    alive = weakref.ref(source)
    requests = [
        comm.Iallgatherv(source, [into, counts, displs, MPI.DOUBLE]),
        comm.Ibcast([np.arange(6.0) if me == 0 else strided, 1, vector]),
        comm.Iallreduce(numbers(me), np.zeros(N)),
    ]
    del source
    counts[0], displs[0] = 0, 99
    vector.Free()
    gate.Wait()
    MPI.Request.Waitall(requests)
    assert np.array_equal(into, np.concatenate([numbers(rank) for rank in range(p)]))
    assert np.array_equal(strided, [0, 0, 2, 0, 4, 0] if me else np.zeros(6))
    comm.Ibarrier().Wait()
    gc.collect()
    assert alive() is None, "a complete call keeps its buffers"


def test_a_request_that_is_dropped_completes_all_the_same(comm: Communicator) -> None:
    y = np.zeros(3)
    for _ in range(20):
        comm.Iallreduce(np.ones(3), y)
    comm.Barrier()
    assert (y == comm.size).all()


def test_a_copy_of_a_request_completes_the_call(comm: Communicator) -> None:
    """MPI.Request(request) shares the handle, and may outlive the request."""
    for _ in range(4):
        y = np.zeros(3)
        copy = MPI.Request(comm.Iallreduce(np.ones(3), y))
        comm.Barrier()
        gc.collect()
        copy.Wait()
        assert (y == comm.size).all()


def test_a_communicator_is_freed_after_its_calls(comm: Communicator) -> None:
    new = Communicator(comm.Dup())
    y = np.zeros(3)
    request = new.Iallreduce(np.ones(3), y)
    new.Free()
    assert (y == comm.size).all()
    request.Wait()
    assert new == MPI.COMM_NULL


def test_derived_communicators_have_queues_of_their_own(comm: Communicator) -> None:
    half = comm.Split(comm.rank % 2, comm.rank)
    y, z = np.zeros(3), np.zeros(3)
    order = [(half, y), (comm, z)]
    requests = [each.Iallreduce(np.ones(3), into) for each, into in (order if comm.rank else order[::-1])]
    MPI.Request.Waitall(requests)
    assert (y == half.size).all()
    assert (z == comm.size).all()
    half.Free()


def test_requests_cannot_be_cancelled_or_freed_early(comm: Communicator) -> None:
    request = comm.Ibarrier()
    with pytest.raises(ArgumentError, match=rf"rank {comm.rank}: Ibarrier.*cannot be cancelled: complete it"):
        request.Cancel()
    request.Wait()
    request.Wait()
    assert request.Test()
    assert request == MPI.REQUEST_NULL


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c, x: c.Iallreduce(x[::2], x[::2].copy()), "Iallreduce: the array is not contiguous"),
        (lambda c, x: c.Ibcast(x, c.size), "Ibcast: root .* is not a rank"),
        (lambda c, x: c.Iallreduce(x, x.copy(), MPI.BAND), "does not define band for float64"),
        (lambda c, x: c.Iallreduce(x, x.copy(), "some"), "op='some' is not an operation"),
        (lambda c, x: c.Iallreduce(x, x.astype("i8")), "sends 8 float64, receives 8 int64"),
        (lambda c, x: c.Iallreduce(x, x), ""),
        (lambda c, x: c.Iallreduce(x[:6], x[2:]), "Iallreduce: the buffers overlap"),
        (lambda c, x: c.Iallreduce(x, x.copy(), algorithm="rinq"), "algorithm='rinq' is not available here"),
        (lambda c, x: c.Ireduce_scatter(x, x.copy(), [3] * c.size), "Ireduce_scatter: .*make buffers and counts agree"),
        (lambda c, x: c.Iallgather(x, x[:1]), "Iallgather: "),
    ],
)
def test_a_wrong_argument_is_refused_at_the_issue_or_by_wait(comm: Communicator, call: Any, message: str) -> None:
    if not message:
        call(comm, np.ones(8)).Wait()
        return
    with pytest.raises(ArgumentError, match=rf"rank {comm.rank}: .*{message}"):
        call(comm, np.arange(8.0)).Wait()


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize(
    ("usual", "unusual", "remedy"),
    [
        (("Allreduce", np.ones(8), np.ones(8)), ("Allreduce", np.ones(4), np.ones(4)), "counts the same"),
        (("Allreduce", np.ones(8), np.ones(8)), ("Allreduce", np.ones(8, "i8"), np.ones(8, "i8")), "cast before"),
        (("Allreduce", np.ones(8), np.ones(8)), ("Allreduce", np.ones(8), np.ones(8), "max"), "same operation"),
        (("Bcast", np.ones(8), 0), ("Bcast", np.ones(8), 1), "same root"),
        (("Allgather", np.ones(8), np.ones(24)), ("Allgather", np.ones(4), np.ones(12)), "counts the same"),
        (("Barrier",), ("Allreduce", np.ones(8), np.ones(8)), "same collective in the same order"),
        (("Reduce", np.ones(8), np.ones(8)), ("Bcast", np.ones(8)), "same collective in the same order"),
        (("Gather", np.ones(8), np.ones(24)), ("Barrier",), "same collective in the same order"),
        (("Scatterv", np.ones(24), np.ones(8)), ("Gatherv", np.ones(8), np.ones(24)), "same collective in the same"),
    ],
)
def test_calls_that_differ_are_named(comm: Communicator, usual: Any, unusual: Any, remedy: str) -> None:
    """Every request raises, also by MPI's own functions; the next call works."""
    name, *args = (
        [each[: 8 * comm.size] if isinstance(each, np.ndarray) and each.size == 24 else each for each in usual]
        if comm.rank != 1
        else [each[: 4 * comm.size] if isinstance(each, np.ndarray) and each.size == 12 else each for each in unusual]
    )
    request = start(comm, name, *args)
    with pytest.raises(MismatchError, match=rf"rank 1 called I{unusual[0].lower()}\b.*{remedy}"):
        request.Wait()
    with pytest.raises(MPI.Exception):
        MPI.Request.Waitall([start(comm, name, *args)])
    y = np.zeros(2)
    comm.Iallreduce(np.ones(2), y).Wait()
    comm.Allreduce(np.ones(2), y)
    assert (y == comm.size).all()


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize(
    ("blocking", "used"),
    [
        ("Allreduce", "new"),
        ("Allreduce", "blocking"),
        ("Bcast", "non-blocking"),
        ("Reduce_scatter_block", "both"),
        ("Allgatherv", "both"),
        ("Barrier", "non-blocking"),
    ],
)
def test_a_blocking_call_before_a_non_blocking_one_is_named_on_all_ranks(
    comm: Communicator, blocking: str, used: str
) -> None:
    new, x = Communicator(comm.Dup()), np.ones(4)
    if used in ("blocking", "both"):
        new.Allreduce(x, x.copy())
        new.Scan(x, x.copy())
    if used in ("non-blocking", "both"):
        new.Ibarrier().Wait()
    args = {"Bcast": (x, comm.size - 1), "Allgatherv": (x, np.zeros(4 * comm.size)), "Barrier": ()}
    args["Reduce_scatter_block"] = np.ones(4 * comm.size), x
    call = partial(getattr(new, blocking), *args.get(blocking, (x, x.copy())))
    with pytest.raises(MismatchError, match=r"called Ibarrier.*make all ranks call the same"):
        call() if comm.rank == 1 else new.Ibarrier().Wait()
    with pytest.raises((MismatchError, TransportError)):  # the communicator is out of step
        new.Ibarrier().Wait()
    comm.Barrier()


def test_pending_calls_precede_blocking_and_pickled_calls(comm: Communicator) -> None:
    for blocking in (
        comm.Barrier,
        lambda: comm.Scan(np.ones(2), np.ones(2)),
        lambda: comm.Alltoallv(np.ones(comm.size), np.ones(comm.size)),
        lambda: comm.Allreduce(np.ones(2), np.ones(2), algorithm="native"),
        lambda: comm.Allreduce(np.ones(2), np.ones(2), reproducible=True),
        lambda: hpccomm.allreduce(np.ones(2), comm=comm),
        lambda: comm.empty(3),
        lambda: comm.Barrier_init().Free(),
    ):
        y = np.zeros(100_000)
        request = comm.Iallreduce(np.ones(100_000), y)
        blocking()
        assert request.call.done()
        assert (y == comm.size).all()
        request.Wait()


ROUNDS = 40


def test_many_mixed_calls_on_two_communicators_complete_in_any_order(comm: Communicator) -> None:
    """The longer form of this test is ``python tests/nonblocking_rounds.py``."""
    run_rounds(comm, ROUNDS, seed=comm.size)


@pytest.mark.mpi(sizes=(4,))
@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 1, 0, 2)])
def test_mixed_calls_between_nodes(comm: Communicator, nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = nodes[comm.rank]
    monkeypatch.setattr(context, "ranks_of_this_node", lambda channel: channel.Split(here, channel.rank))
    placed = Communicator(comm.Dup())
    run_rounds(placed, 20, seed=comm.size)
    assert placed.layout.count == len(set(nodes))

    def wait_for_rank_0() -> float:
        placed.Barrier()
        used = time.process_time()
        if comm.rank == 0:
            time.sleep(1.0)
        placed.Ibcast(np.zeros(300_000)).Wait()
        return time.process_time() - used

    used = measure_least(placed, wait_for_rank_0, 0.1)
    assert used < 0.1, "a rank that waits for one on another node takes its core"
    placed.Free()


def test_a_program_may_use_requests_in_its_own_threads(comm: Communicator) -> None:
    """One thread issues calls, another one completes them."""
    y = np.zeros(1000)
    requests = [comm.Iallreduce(np.ones(1000), y), comm.Ibarrier()]
    other = threading.Thread(target=lambda: [each.Wait() for each in requests])
    other.start()
    other.join()
    assert (y == comm.size).all()


@pytest.mark.mpi(sizes=(2,))
def test_communicators_of_every_class_have_non_blocking_calls(comm: Communicator) -> None:
    class Mine(Communicator):
        pass

    made = [Mine(comm.Dup()), comm.Create_cart([comm.size]), Communicator(comm.Dup(), pickle="auto")]
    for each in (*made, Communicator(MPI.COMM_SELF), Communicator(comm, "ring")):
        y, z = np.zeros(3), np.zeros(3)
        requests = [each.Iallreduce(np.ones(3), y), each.Iallreduce(np.ones(3), z)]
        assert each.allreduce(1) == each.size
        MPI.Request.Waitall(requests)
        each.algorithm = "native"
        each.Iallreduce(np.ones(3), z).Wait()
        assert (y == each.size).all()
        assert (z == each.size).all()
    for each in made:
        each.Free()


@pytest.mark.mpi(sizes=(2,))
def test_many_calls_may_be_under_way(comm: Communicator) -> None:
    results = [np.zeros(1) for _ in range(500)]
    requests = [comm.Iallreduce(np.full(1, float(k)), into) for k, into in enumerate(results)]
    requests[-1].Wait()
    MPI.Request.Waitall(requests)
    assert [each[0] for each in results] == [k * comm.size for k in range(500)]


# Futures


def test_functions_give_futures(comm: Communicator) -> None:
    p, me, x = comm.size, comm.rank, numbers(comm.rank)
    total = sum(numbers(rank) for rank in range(p))
    futures = {
        "sum": hpccomm.allreduce(x, comm=comm, wait=False),
        "mean": hpccomm.allreduce(x.astype("f2"), "mean", comm, wait=False),
        "rows": hpccomm.reduce_scatter(x, comm=comm, wait=False),
        "all": hpccomm.allgather(x[: me + 1], comm, wait=False),
        "root's": hpccomm.broadcast(x if me == p - 1 else None, p - 1, comm, wait=False),
    }
    want = {
        "sum": total,
        "mean": (total / p).astype("f2"),
        "rows": np.array_split(total, p)[me],
        "all": np.concatenate([numbers(rank)[: rank + 1] for rank in range(p)]),
        "root's": numbers(p - 1),
    }
    for name in reversed(futures):
        assert np.array_equal(futures[name].wait(), want[name]), name
        assert futures[name].done()
    failing = hpccomm.allreduce(x, "some", comm, wait=False)
    with pytest.raises(ArgumentError, match=f"rank {me}: allreduce: op='some' is not an operation"):
        failing.wait()
