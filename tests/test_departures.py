"""A node whose ranks leave while others wait is named at once; ranks that end at their own pace are no mistake."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from hpccomm.calls import consistency
from hpccomm.calls.departures import Departure
from hpccomm.testing.jobs import run_under_mpi

pytestmark = pytest.mark.slow(keep=2)

SETUP = """
import atexit, sys, time
import numpy as np
from mpi4py import MPI
import hpccomm
from hpccomm import context
context.ranks_of_this_node = lambda each: MPI.Intracomm(each).Split(each.rank // 2, each.rank)
comm = hpccomm.Communicator(MPI.COMM_WORLD)
last = comm.rank // 2 == (comm.size - 1) // 2
x, y = np.ones(4), np.empty(4)
"""
STALL_SECONDS, SOON_SECONDS = 500.0, 120.0
"""A rank that is missing is reported after so long; one that has left is named much sooner, on a busy machine too."""


def run_job(ranks: int, body: str) -> tuple[int, str]:
    """Exit status and output of a job on nodes of two ranks; ``last``: the rank is on the last node."""
    program = f"import os; os.environ['HPCCOMM_STALL_SECONDS'] = '{STALL_SECONDS}'" + SETUP + textwrap.dedent(body)
    done = run_under_mpi(ranks, "-c", program, timeout=SOON_SECONDS)
    return done.returncode, done.stdout + done.stderr


def check_end(ranks: int, body: str, sentence: str = "has left the program, rank") -> str:
    """Run a job that must end by an error with this sentence; returns its output."""
    status, said = run_job(ranks, body)
    assert status != 0, said
    assert sentence in said, said
    return said


WAITS = {
    "Allreduce": "comm.Allreduce(x, y)",
    "native Allreduce": 'comm.Allreduce(x, y, algorithm="native")',
    "Barrier": "comm.Barrier()",
    "allgather": "comm.allgather(1)",
    "Dup": "comm.Dup()",
    "a derived communicator": "other.Allreduce(x, y)",
}


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize("name", WAITS)
def test_a_node_that_leaves_is_named_at_once(name: str, ranks: int) -> None:
    """As the first call, and after others."""
    for before in ("", "comm.Allreduce(x, y); comm.Barrier(); comm.allreduce(1)"):
        said = check_end(ranks, f"other = comm.Dup(); {before}\nif last: sys.exit()\n{WAITS[name]}")
        assert "not complete after" not in said, said


def test_of_several_nodes_that_leave_each_tells_the_next() -> None:
    """The ranks of the last node wait in a call that those of both other nodes do not make."""
    check_end(6, "comm.Barrier()\nif comm.rank < 4: sys.exit()\ncomm.Allreduce(x, y)")


def test_a_node_tells_the_next_one_of_ranks_that_have_left_before_it_leaves_itself() -> None:
    """Its own ranks wait for the last node in another call."""
    body = """
        comm.Barrier()
        if comm.rank < 2: sys.exit()
        if comm.rank < 4: MPI.COMM_WORLD.recv(source=4)
        comm.Allreduce(x, y)
    """
    check_end(6, body)


REFUSED = {
    "two ranks of a node contradict each other": "made.Allreduce(np.ones(4, kind), np.empty(4, kind))",
    "a root refuses what a rank of its node sends": "made.Gatherv(np.ones(n + odd), [whole, sizes] if first else None)",
}


@pytest.mark.parametrize("then", ["pass", "made.Free()"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_node_is_told_that_another_one_refuses_the_call_in_which_it_waits(name: str, then: str) -> None:
    """The call is not one of those that are compared between nodes, and the program goes on after the error."""
    body = f"""
        made = comm.Dup()
        made.Barrier(); made.Barrier()
        first, odd, n = comm.rank == 0, comm.rank == 1, 1 << 20
        kind, whole, sizes = "f4" if odd else "f8", np.empty(4 * n), [n] * 4
        time.sleep(first)
        try:
            {REFUSED[name]}
        except hpccomm.MismatchError:
            {then}
        time.sleep(1000)
    """
    check_end(4, body, "(noticed by rank")


NON_BLOCKING = {"the first": "", "a later one": "comm.Iallreduce(x, y).Wait(); comm.Barrier()"}


@pytest.mark.parametrize("name", NON_BLOCKING)
def test_a_node_that_leaves_without_a_non_blocking_call_is_named_at_once(name: str) -> None:
    check_end(4, f"{NON_BLOCKING[name]}\nif last: sys.exit()\ncomm.Iallreduce(x, y).Wait()")


FREES = {
    "a rank of this node": "if comm.rank == 1: other.Free()",
    "a rank of this node, after calls": "other.Barrier(); other.allreduce(1)\nif comm.rank == 1: other.Free()",
    "another node": "other.Barrier()\nif last: other.Free()",
}


@pytest.mark.parametrize("name", FREES)
@pytest.mark.parametrize("call", ["Barrier()", "Allreduce(x, y)", "allgather(1)", "Iallreduce(x, y).Wait()"])
def test_a_rank_that_has_freed_the_communicator_is_named_at_once(name: str, call: str) -> None:
    """It waits in the program for the others, which wait in their call."""
    body = f"other = comm.Dup()\n{FREES[name]}\nelse: other.{call}\ncomm.Barrier()"
    check_end(4 if "another" in name else 2, body, "has freed this communicator, rank")


def test_a_node_that_ends_mpi_is_named_at_once() -> None:
    body = "comm.Barrier()\nif last:\n    MPI.Finalize()\n    time.sleep(1000)\ncomm.Allreduce(x, y)"
    check_end(4, body)


ENDS = {
    "the last node first": "comm.Barrier(); time.sleep(0 if last else 1)",
    "the last node last": "comm.Barrier(); time.sleep(1 if last else 0)",
    "a root that does not wait": "comm.Bcast(x, comm.size - 1); time.sleep(0 if last else 1); comm.bcast(1, 0)",
    "a root whose node has left": "comm.Barrier(); time.sleep(0 if last else 2); comm.Bcast(x, comm.size - 1)",
    "a root of objects whose node has left": "comm.Barrier(); time.sleep(0 if last else 2); comm.bcast(1, 3)",
    "communicators of parts": "part = comm.Split(int(last)); time.sleep(0 if last else 1); part.Allreduce(x, y)",
    "a communicator that was freed": "other = comm.Dup(); other.Barrier(); other.Free(); time.sleep(0 if last else 1)",
    "exit handlers": "atexit.register(comm.Barrier); time.sleep(0 if last else 1)",
    "a call under way": "comm.Iallreduce(x, y).Wait(); time.sleep(0 if last else 1)",
    "MPI ends first": "comm.Barrier(); time.sleep(0 if last else 1); MPI.Finalize()",
}


@pytest.mark.parametrize("name", ENDS)
def test_ranks_may_end_at_their_own_pace(name: str) -> None:
    status, said = run_job(4, ENDS[name])
    assert status == 0, said
    assert "has left" not in said, said


def test_what_nodes_free_at_different_times_is_freed_with_the_next_communicator() -> None:
    body = """
        from hpccomm.calls import consistency
        made = [comm.Dup() for _ in range(4)]
        comm.Barrier()
        if last: MPI.COMM_WORLD.recv(source=comm.rank - 2)  # of a rank that has freed three of them
        for each in made[:3]: each.Free()
        if not last: MPI.COMM_WORLD.send(0, comm.rank + 2)
        MPI.COMM_WORLD.Barrier()
        until = time.monotonic() + 60
        while consistency._departure.unmet and time.monotonic() < until: consistency.free_met()
        made[3].Free()
        assert not [each for each in consistency._departure.unmet if not each.has_met()]
    """
    status, said = run_job(4, body)
    assert status == 0, said


def test_no_node_leaves_before_the_last_one() -> None:
    """A message of a rank that is late could not reach one that has ended."""
    body = """
        from hpccomm.calls import watchdog
        comm.Barrier(); time.sleep(0.5 * comm.rank)
        print("leaves", time.monotonic(), flush=True)
        watchdog._watchdog.end(leaves=True)
        print("has left", time.monotonic(), flush=True)
    """
    status, said = run_job(6, body)
    assert status == 0, said
    times = [line.rsplit(" ", 1) for line in said.splitlines()]
    began, ended = ([float(each) for word, each in times if word == name] for name in ("leaves", "has left"))
    assert len(began) == len(ended) == 6, said
    assert max(began) < min(ended)


ONE_NODE = """
import os, sys, time
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
comm.Barrier()
"""
LEAVES = {"Python ends": "sys.exit()", "MPI ends": "MPI.Finalize(); time.sleep(1000)"}
DIES = {"by an error": "raise RuntimeError", "by a signal": "os.kill(os.getpid(), 9)"}


@pytest.mark.parametrize("dies", DIES)
@pytest.mark.parametrize("leaves", LEAVES)
def test_a_rank_that_dies_after_others_have_left_ends_the_job(leaves: str, dies: str) -> None:
    """Four ranks of a node have left, one dies, one computes: the launcher hung in a third of such launches."""
    program = ONE_NODE + f"if comm.rank < 4: {LEAVES[leaves]}\n"
    program += f"if comm.rank == 4: time.sleep(1000)\ntime.sleep(0.2)\n{DIES[dies]}"
    for _ in range(3):
        done = run_under_mpi(6, "-c", program, timeout=SOON_SECONDS)
        assert done.returncode != 0, done.stderr


def test_a_rank_that_leaves_waits_until_the_others_have_left_or_died() -> None:
    """One process leaves after a while, one dies, one has closed the table, one has not opened it."""
    words = consistency.row_words(5)
    memory = np.zeros(5 * words, np.int64)
    table = consistency.ConsistencyTable(memory.view(np.uint8), tuple(range(5)), 0)
    memory[3 * words + consistency.PROCESS], memory[3 * words + consistency.CLOSED] = os.getppid(), 1
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        memory[words + consistency.PROCESS] = other.pid
        memory[2 * words + consistency.PROCESS] = os.getppid()
        departure, times = Departure([table], served=True), []

        def leave_later() -> None:
            time.sleep(0.3)
            memory[2 * words + consistency.LEFT] = 1
            times.append(time.monotonic())
            time.sleep(0.3)
            times.append(time.monotonic())
            other.communicate(b"\n")

        thread = threading.Thread(target=leave_later)
        thread.start()
        departure.leave()
        returned = time.monotonic()
        thread.join()
    assert returned > times[1], "it waits for both"
    table.close()
    departure.leave()  # no table is left
