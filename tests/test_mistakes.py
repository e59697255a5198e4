"""A mistake between ranks ends with a clear error within seconds, never with a hang or a wrong sum."""

from __future__ import annotations

import textwrap
import time

import pytest
from late_rank import LATE_RANK

from hpccomm.testing.jobs import run_under_mpi

PATIENCE = 60.0

pytestmark = pytest.mark.slow(keep=1)

SETUP = (
    """
import os, sys, time, numpy as np
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
odd = comm.rank == 1
x = np.ones(8, "f4")
comm.Allreduce(MPI.IN_PLACE, x)
"""
    + LATE_RANK
)


def outcome(ranks: int, body: str) -> tuple[int, str]:
    """Exit status and output of a job with a mistake."""
    began = time.monotonic()
    done = run_under_mpi(ranks, "-c", SETUP + textwrap.dedent(body), timeout=PATIENCE)
    assert time.monotonic() - began < PATIENCE
    return done.returncode, done.stdout + done.stderr


ALGORITHMS = ("auto", "native", "ring", "shared")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("usual", "unusual", "remedy"),
    [
        ("Allreduce(IN, f(8))", "Allreduce(IN, i(8))", "cast before the call"),
        ("Allreduce(IN, f(8))", "Allreduce(IN, f(4))", "counts the same"),
        ("Allreduce(IN, f(8))", "Allreduce(IN, f(8), MPI.MAX)", "same operation"),
        ("Allreduce(IN, np.ones((3, 4)))", "Allreduce(IN, np.ones((3, 4), order='F'))", "ascontiguousarray"),
    ],
)
def test_mismatched_reductions_are_reported(usual: str, unusual: str, remedy: str, algorithm: str) -> None:
    status, said = outcome(
        3,
        f"""
        f, i, IN = (lambda n: np.ones(n, "f4")), (lambda n: np.ones(n, "i4")), MPI.IN_PLACE
        comm.algorithm = {algorithm!r}
        comm.{unusual} if odd else comm.{usual}
        print("silent", flush=True)
        comm.Barrier()
        """,
    )
    assert status != 0
    assert "rank 1 called Allreduce" in said
    assert remedy in said


@pytest.mark.parametrize("algorithm", ["auto", "native", "shared"])
def test_different_collectives_are_reported(algorithm: str) -> None:
    status, said = outcome(
        3,
        f"""
        comm.algorithm = {algorithm!r}
        comm.Bcast(x, 0) if odd else comm.Allreduce(MPI.IN_PLACE, x)
        comm.Barrier()
        """,
    )
    assert status != 0
    assert "rank 1 called Bcast(" in said
    assert "make all ranks call the same collective" in said


@pytest.mark.parametrize("name", ["scan", "exscan"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("comm.Allreduce(MPI.IN_PLACE, x, algorithm='shared')", "rank 1 called Allreduce("),
        ("sys.exit()", "rank 1 has left the program"),
    ],
)
def test_a_scan_of_objects_does_not_wait_for_a_rank_that_never_comes(name: str, other: str, message: str) -> None:
    """mpi4py holds the interpreter in it, so nothing could be found there."""
    status, said = outcome(3, f"{other} if odd else comm.{name}(1)")
    assert status != 0
    assert message in said
    assert f"{name}(" in said


def test_shared_and_native_calls_at_the_same_time_are_reported() -> None:
    status, said = outcome(
        2,
        """
        if odd:
            comm.Alltoall(np.ones(2), np.ones(2))
        else:
            comm.Allreduce(MPI.IN_PLACE, x, algorithm="shared")
        """,
    )
    assert status != 0
    assert "rank 1 called Alltoall(" in said


def test_different_roots_are_reported() -> None:
    status, said = outcome(3, "comm.Bcast(x, 2 if odd else 0)\ncomm.Barrier()")
    assert status != 0
    assert "name the same root" in said


def test_different_algorithms_are_reported() -> None:
    """Of short messages: Open MPI itself may crash in a receive that is shorter than a long message."""
    status, said = outcome(
        3, "comm.Allreduce(MPI.IN_PLACE, np.ones(1 << 12), algorithm='ring' if odd else 'butterfly')"
    )
    assert status != 0
    assert "name the same algorithm" in said


def test_a_rank_is_told_that_others_refuse_of_each_other_what_it_waits_for() -> None:
    """The root refuses what rank 1 has sent, and rank 2, which made no mistake, waits for it to receive."""
    status, said = outcome(
        3,
        """
        counts = [1, 3, 1 << 20]
        comm.Barrier()
        if comm.rank == 0:
            time.sleep(0.5)
        try:
            comm.Gatherv(np.ones(counts[comm.rank] + odd), [np.zeros(sum(counts)), counts] if comm.rank == 0 else None)
        except hpccomm.MismatchError:
            pass
        MPI.COMM_WORLD.Barrier()
        """,
    )
    assert status != 0
    assert "rank 2 waits in Gatherv(float64, root=0), which rank 0 has left: rank 1 called Gatherv" in said


def test_an_uncaught_exception_on_one_rank_ends_the_job_with_its_traceback() -> None:
    status, said = outcome(
        3,
        """
        if odd:
            raise RuntimeError("the odd one")
        comm.Allreduce(MPI.IN_PLACE, x)
        """,
    )
    assert status != 0
    assert "RuntimeError: the odd one" in said


@pytest.mark.parametrize("algorithm", ["native", "shared"])
def test_a_rank_that_exits_early_is_named(algorithm: str) -> None:
    status, said = outcome(
        3,
        f"""
        if odd:
            sys.exit(0)
        comm.Allreduce(MPI.IN_PLACE, x, algorithm={algorithm!r})
        """,
    )
    assert status != 0
    assert "rank 1 has left the program" in said


@pytest.mark.parametrize("algorithm", ["native", "shared"])
def test_a_missing_rank_is_named_while_the_others_wait(algorithm: str) -> None:
    status, said = outcome(
        3,
        f"""
        os.environ["HPCCOMM_STALL_SECONDS"] = "1"
        if odd:
            sleep_until_asked()
        comm.Allreduce(MPI.IN_PLACE, x, algorithm={algorithm!r})
        assert (x == 9).all()
        """,
    )
    assert status == 0, said
    assert "missing: rank 1" in said


def test_a_caught_mismatch_leaves_the_communicator_usable() -> None:
    status, said = outcome(
        3,
        """
        try:
            comm.Allreduce(MPI.IN_PLACE, np.ones(8, "i4") if odd else x, algorithm="shared")
        except hpccomm.MismatchError as error:
            print("caught", error, flush=True)
        comm.Allreduce(MPI.IN_PLACE, x, algorithm="shared")
        assert (x == 9).all()
        """,
    )
    assert status == 0, said
    assert said.count("caught") == 3
