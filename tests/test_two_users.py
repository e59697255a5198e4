"""Jobs of two users on one machine do not meet: neither in files nor in memory, which is closed to the other user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hpccomm.launcher import launch_command

USERS = (65534, 65533)

PROGRAM = """
import glob, os, sys, time
import numpy as np
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
x = comm.zeros(1000)
comm.Allreduce(MPI.IN_PLACE, x)
print("pid", os.getpid(), flush=True)
for line in sys.stdin if comm.rank == 0 else ():
    break
comm.Barrier()
for k in range(500):
    comm.Allreduce(np.full(k, k), y := np.empty(k, int))
    assert (y == 2 * k).all()
    comm.Bcast(x, k % 2)
print("user", os.geteuid(), "is done", flush=True)
"""

LOOK = """
import glob, os, sys
seen = []
for pid in sys.argv[1:]:
    for link in [f"/proc/{pid}/mem", *glob.glob(f"/proc/{pid}/fd/*"), f"/proc/{pid}/fd"]:
        try:
            os.listdir(link) if link.endswith("fd") else open(link, "rb")
            seen.append(link)
        except OSError:
            pass
print(seen)
"""


def run_as(user: int, command: list[str]) -> list[str]:
    """The command that runs another one as a user without privileges."""
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--", *command]


@pytest.fixture
def homes() -> Iterator[dict[int, Path]]:
    """A folder of each user."""
    with ExitStack() as stack:
        found = {}
        for user in USERS:
            found[user] = Path(stack.enter_context(TemporaryDirectory(prefix="hpccomm-user-")))
            os.chown(found[user], user, user)
        yield found


def why_not() -> str:
    """Why jobs of two other users cannot be started here; empty if they can."""
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return "only root can start jobs of other users"
    done = subprocess.run(run_as(USERS[0], [sys.executable, "-c", "import mpi4py"]), capture_output=True, check=False)
    return "" if done.returncode == 0 else "other users may not run this Python"


def test_jobs_of_two_users_run_side_by_side_and_cannot_see_each_other(homes: dict[int, Path]) -> None:
    if why_not():
        pytest.skip(why_not())
    jobs: dict[int, subprocess.Popen[str]] = {}
    command, env = launch_command(2, ["-c", PROGRAM])
    root = Path(__file__).parents[1]
    for user, home in homes.items():
        own = {**env, "HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": str(root)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        jobs[user] = subprocess.Popen(run_as(user, command), env=own, cwd=home, **pipes)
    said = {user: [job.stdout.readline() for _ in range(2)] for user, job in jobs.items()}
    pids = {user: [line.split()[1] for line in lines if line.startswith("pid")] for user, lines in said.items()}
    first, second = USERS
    assert len(pids[first]) == len(pids[second]) == 2, {user: job.communicate("\n") for user, job in jobs.items()}
    look = run_as(second, [sys.executable, "-c", LOOK, *pids[first]])
    assert subprocess.run(look, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    shared = [each for each in Path("/dev/shm").glob("*hpccomm*") if each.stat().st_uid in USERS]
    assert not shared, "shared memory has no name"
    for user, job in jobs.items():
        rest, _ = job.communicate("go\n", timeout=60)
        assert (job.returncode, rest.count(f"user {user} is done")) == (0, 2), rest
