"""A rank that waits leaves its core to others, and is woken when the rank for which it waits arrives."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from processor_time import measure_least

from hpccomm import Communicator
from hpccomm.backends.shared_memory import SharedMemory
from hpccomm.errors import TransportError
from hpccomm.kernels.shared_memory import collectives as kernels
from hpccomm.kernels.shared_memory import memory

CODES = ("compiled", "numpy")
SHARE, POLLING = 0.05, 0.01
"""Most processor time of a waiting rank, as a part of its wait, and the seconds in which it may poll at first."""


class InterruptError(Exception):
    """Raised by a signal handler."""


def sum_in(shared: SharedMemory) -> tuple[np.ndarray, Callable[[], None]]:
    """An array, which the caller must keep, and a bound allreduce of it in place."""
    x = np.full(20_000, shared.rank + 1.0)
    return x, shared.bind_allreduce(x.ctypes.data, x.ctypes.data, x.size, "f8", "sum", 1)


def word(shared: SharedMemory, offset: int) -> int:
    """A word of this rank's region."""
    return memory.load_acquire(shared._segment.address + shared.rank * shared._region + offset)


def share_of_a_core(comm: Any, call: Callable[[], Any]) -> float:
    """The processor time that rank 1 takes in a call, as a part of the time that it waits there for rank 0."""
    call()
    return measure_least(comm, lambda: measure_share(comm, call), SHARE)


def measure_share(comm: Any, call: Callable[[], Any]) -> float:
    """The same of one call; 0 on rank 0."""
    MPI.Intracomm(comm).Barrier()
    if comm.rank == 0:
        time.sleep(0.6)
    before, began = getrusage(RUSAGE_SELF), time.monotonic()
    call()
    waited, after = time.monotonic() - began, getrusage(RUSAGE_SELF)
    if comm.rank and waited < 0.3:  # this rank came late itself
        return float("inf")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (used - POLLING) / (waited - POLLING) if comm.rank else 0.0


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("code", CODES)
def test_a_waiting_rank_leaves_its_core_to_others(comm: Communicator, code: str) -> None:
    shared = SharedMemory(MPI.Intracomm(comm), code)
    _kept, run = sum_in(shared)
    assert share_of_a_core(comm, run) < SHARE
    shared.close()


CALLS: dict[str, Callable[[Communicator, np.ndarray], object]] = {
    "in shared memory": lambda comm, x: comm.Allreduce(MPI.IN_PLACE, x, algorithm="shared"),
    "for a short message": lambda comm, x: comm.Allreduce(MPI.IN_PLACE, x, algorithm="ring"),
    "for the comparison of calls": lambda comm, x: compare_calls(comm),
}


def compare_calls(comm: Communicator) -> None:
    """What precedes a call in lockstep."""
    table = comm.context.consistency
    assert table is not None
    table.begin(1)
    table.wait()
    table.leave()


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("where", CALLS)
def test_a_rank_that_waits_in_a_call_leaves_its_core_to_others(comm: Communicator, where: str) -> None:
    x = np.ones(1000)
    assert share_of_a_core(comm, lambda: CALLS[where](comm, x)) < SHARE


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("code", CODES)
def test_only_a_rank_for_which_others_sleep_wakes_them(comm: Communicator, code: str) -> None:
    shared = SharedMemory(MPI.Intracomm(comm), code)
    _kept, run = sum_in(shared)
    late = comm.rank == comm.size - 1
    for _ in range(5):
        MPI.Intracomm(comm).Barrier()
        before = word(shared, kernels.REGION.wakes)
        while late and not word(shared, kernels.REGION.sleepers):
            time.sleep(0.001)
        run()
        assert not late or word(shared, kernels.REGION.wakes) > before
    shared.close()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("lost", [(kernels, "wake", lambda address: None), (memory, "FUTEX", 0)], ids=("wake", "futex"))
def test_a_lost_wake_only_delays_a_call(comm: Communicator, lost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*lost)
    shared = SharedMemory(MPI.Intracomm(comm), "numpy")
    x, run = sum_in(shared)
    if comm.rank == 0:
        time.sleep(0.05)
    run()
    assert (x == sum(range(1, comm.size + 1))).all()
    shared.close()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("code", CODES)
def test_a_signal_handler_runs_while_a_rank_sleeps(comm: Communicator, code: str) -> None:
    running: list[bool] = []

    def interrupt(number: int, frame: object) -> None:
        if running:  # a busy machine may hold the rank for longer than a period of the timer before the call
            running.clear()
            raise InterruptError

    shared = SharedMemory(MPI.Intracomm(comm), code)
    _kept, run = sum_in(shared)
    usual = signal.signal(signal.SIGALRM, interrupt)
    if comm.rank == 0:
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    if comm.rank == comm.size - 1:
        while not memory.load_acquire(shared._segment.address + kernels.REGION.abandoned):
            time.sleep(0.001)
    with pytest.raises(InterruptError if comm.rank == 0 else TransportError):  # noqa: PT012 (the alarm may come at once)
        running.append(True)
        run()
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, usual)
    shared.close()
