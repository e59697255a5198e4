"""A fault strikes the chosen call of the chosen rank, and no other."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator
from hpccomm.testing import faults
from hpccomm.testing.jobs import run_under_mpi

SETUP = """
import numpy as np
from mpi4py import MPI
import hpccomm
from hpccomm.testing import faults
comm = hpccomm.Communicator(MPI.COMM_WORLD)
x = np.ones(4)
"""


def run_job(body: str, ranks: int = 2) -> tuple[int, str]:
    """Exit status and output of a job."""
    done = run_under_mpi(ranks, "-c", SETUP + textwrap.dedent(body), timeout=90)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.mpi(sizes=(2, 3))
def test_a_slow_rank_is_late_by_the_chosen_time(comm: Communicator) -> None:
    comm.Barrier()
    with faults.inject(comm, "slow", rank=1, call=2, seconds=0.4):
        comm.allgather(1)
        began = time.monotonic()
        comm.Barrier()
        ended = time.monotonic()
    assert ended - comm.bcast(began, root=1) >= 0.35
    assert "Barrier" not in vars(comm)


@pytest.mark.mpi(sizes=(2,))
def test_a_stopped_rank_goes_on(comm: Communicator) -> None:
    with faults.inject(comm, "stop", rank=1, call=1, seconds=0.5):
        x = np.ones(3)
        comm.Allreduce(MPI.IN_PLACE, x)
    assert (x == 2).all()


@pytest.mark.mpi(sizes=(2,))
def test_a_corrupted_array_differs_in_one_bit(comm: Communicator) -> None:
    x, y = np.zeros(4, "u1"), np.empty(4, "u1")
    with faults.inject(comm, "corrupt", rank=1, call=1):
        comm.Allreduce(x, y)
        comm.Allreduce(np.zeros(4, "u1"), z := np.empty(4, "u1"))
    assert y.tolist() == [1, 0, 0, 0]
    assert z.tolist() == [0, 0, 0, 0]


@pytest.mark.mpi(sizes=(1, 2))
@pytest.mark.parametrize(("fault", "rank", "call"), [("melt", 0, 1), ("kill", 9, 1), ("kill", -1, 1), ("kill", 0, 0)])
def test_an_impossible_fault_is_refused(comm: Communicator, fault: str, rank: int, call: int) -> None:
    with pytest.raises(ArgumentError, match=r"faults\.inject"), faults.inject(comm, fault, rank, call):
        comm.Barrier()


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("fault", ["kill", "exit", "raise"])
def test_a_rank_that_ends_in_a_collective_ends_the_job(fault: str, tmp_path: Path) -> None:
    """The ranks write to files: a launcher may drop what a job that it ends has printed."""
    status, said = run_job(
        f"""
        with open(f"{tmp_path}/{{comm.rank}}", "w", buffering=1) as file:
            with faults.inject(comm, {fault!r}, rank=1, call=3):
                for step in range(5):
                    comm.Allreduce(x, np.empty(4))
                    file.write(f"step {{step}}\\n")
        """
    )
    assert status != 0, said
    assert (tmp_path / "1").read_text() == "step 0\nstep 1\n"
    assert "step 2" not in (tmp_path / "0").read_text()


@pytest.mark.slow(keep=2)
def test_a_dropped_call_is_named() -> None:
    status, said = run_job(
        """
        with faults.inject(comm, "drop", rank=1, call=2):
            comm.Allreduce(x, np.empty(4))
            comm.Allreduce(x, np.empty(4))
            comm.Gather(x, np.empty(8), 0)
        """
    )
    assert status != 0
    assert "rank 1 called Gather" in said or "rank 1 has left the program" in said
