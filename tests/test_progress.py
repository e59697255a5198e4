"""Calls beside the program: order, results, errors, and the ends of programs."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from processor_time import measure_least

from hpccomm import Communicator, progress
from hpccomm.errors import MismatchError

pytestmark = pytest.mark.mpi(sizes=(1, 2, 3))


def sum_on(n: int) -> Any:
    """A function that sums n numbers over the ranks."""

    def function(channel: Any) -> Any:
        total = np.empty(n)
        channel.Allreduce(np.full(n, channel.rank + 1.0), total)
        return total

    return function


def test_a_submitted_function_gives_its_result(comm: Communicator) -> None:
    calls = [progress.submit(comm, sum_on(n)) for n in (1, 1000, 0, 100_000)]
    for call, n in reversed(list(zip(calls, (1, 1000, 0, 100_000), strict=True))):
        assert np.array_equal(call.wait(), np.full(n, comm.size * (comm.size + 1) / 2))
        assert call.done()


@pytest.mark.mpi(sizes=(2, 3))
def test_the_first_call_of_a_communicator_waits_for_no_rank(comm: Communicator) -> None:
    """Rank 0 issues its call before it sends the message for which the others wait."""
    new = Communicator(comm.Dup())
    if comm.rank:
        comm.recv(source=0)
    call = progress.submit(new, sum_on(4))
    if comm.rank == 0:
        for rank in range(1, comm.size):
            comm.send(None, rank)
    assert call.wait()[0] == comm.size * (comm.size + 1) / 2
    new.Free()


def test_a_blocking_call_follows_the_calls_before_it(comm: Communicator) -> None:
    x = np.zeros(3)

    def slow(channel: Any) -> None:
        time.sleep(0.05)
        channel.Allreduce(np.ones(3), x)

    for k in range(4):
        x[...] = 0
        call = progress.submit(comm, slow)
        total = np.empty(3)
        blocking = (comm.Allreduce, lambda *a: comm.Reduce_scatter(a[0].repeat(comm.size), a[1]))[k % 2]
        blocking(np.ones(3), total)
        assert call.done()
        assert (x == comm.size).all()
        assert (total == comm.size).all()


@pytest.mark.mpi(sizes=(2, 3))
def test_communicators_that_share_a_handle_share_the_order(comm: Communicator) -> None:
    """A blocking call on one follows the calls of the other, also while both make their first one."""
    base = comm.Dup()
    first, second = Communicator(base), Communicator(base, "ring")
    calls = [progress.submit(each, sum_on(8)) for each in (first, second, first)]
    total = np.zeros(3)
    second.Allreduce(np.ones(3), total)
    assert all(each.done() for each in calls)
    assert (total == comm.size).all()
    calls = [progress.submit(first, sum_on(50_000))]
    first.Allreduce(np.ones(3), total)
    second.Barrier()
    assert calls[0].done()
    base.Free()


def test_an_error_is_raised_by_every_wait_and_printed(comm: Communicator, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(channel: Any) -> None:
        raise KeyError("an unknown name")

    call = progress.submit(comm, fail, "a test's function")
    for _ in range(2):
        with pytest.raises(KeyError, match="an unknown name"):
            call.wait()
    assert f"rank {comm.rank}: a test's function has failed" in capfd.readouterr().err
    assert progress.submit(comm, sum_on(2)).wait()[0] == comm.size * (comm.size + 1) / 2


@pytest.mark.mpi(sizes=(2, 3))
def test_calls_that_differ_are_named(comm: Communicator) -> None:
    def function(channel: Any) -> None:
        channel.Allreduce(np.ones(4 + channel.rank), np.ones(4 + channel.rank))

    with pytest.raises(MismatchError, match="counts the same"):
        progress.submit(comm, function).wait()


@pytest.mark.mpi(sizes=(2, 3))
def test_first_calls_of_different_kinds_are_named(comm: Communicator) -> None:
    new = Communicator(comm.Dup())
    with pytest.raises(MismatchError, match=r"rank 0 called a submitted function, ranks? [12].* called Barrier"):
        progress.submit(new, sum_on(2)).wait() if comm.rank == 0 else new.Barrier()
    comm.Barrier()


@pytest.mark.mpi(sizes=(2, 3))
def test_calls_of_two_communicators_may_be_issued_in_different_orders(comm: Communicator) -> None:
    other = Communicator(comm.Dup())
    for _ in range(20):
        order = [comm, other] if comm.rank == 0 else [other, comm]
        if comm.rank:
            progress.submit(order[0], sum_on(8))
            progress.submit(order[1], sum_on(8)).wait()
        else:
            first = progress.submit(order[0], sum_on(8))
            first.wait()
            progress.submit(order[1], sum_on(8)).wait()
    other.Free()


@pytest.mark.mpi(sizes=(2, 3))
def test_first_calls_of_two_communicators_may_be_issued_in_different_orders(comm: Communicator) -> None:
    """Each makes its context in a thread of its own."""
    for _ in range(5):
        new = [Communicator(comm.Dup()) for _ in range(3)]
        order = new if comm.rank == 0 else new[::-1]
        for call in [progress.submit(each, sum_on(8)) for each in order]:
            call.wait()
        for each in new:
            each.Free()


def test_threads_sleep_and_are_used_again(comm: Communicator) -> None:
    for _ in range(10):
        progress.submit(comm, sum_on(8)).wait()
    comm.Barrier()
    assert sum(thread.name == "hpccomm-progress" for thread in threading.enumerate()) <= 4

    def sleep() -> float:
        began = time.process_time()
        time.sleep(0.3)
        return time.process_time() - began

    assert measure_least(comm, sleep, 0.015) < 0.015, "a thread without a call takes a core"


@pytest.mark.mpi(sizes=(2,))
def test_a_rank_that_waits_sleeps(comm: Communicator) -> None:
    """After the first 10 ms, in which it may poll, it takes at most 5 % of its core while another rank is late."""
    progress.submit(comm, sum_on(8)).wait()

    def measure_share(function: Any) -> float:
        comm.Barrier()
        if comm.rank:
            time.sleep(1.0)
        began, cpu = time.monotonic(), time.process_time()
        progress.submit(comm, function).wait()
        used, waited = time.process_time() - cpu - 0.01, time.monotonic() - began - 0.01
        return 0.0 if comm.rank else used / waited

    for function in (sum_on(8), sum_on(300_000)):
        assert measure_least(comm, partial(measure_share, function), 0.05) < 0.05
