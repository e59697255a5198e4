"""Programs with calls under way that end, fork, fail, or start MPI without threads."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from hpccomm.launcher import launch_command

pytestmark = pytest.mark.slow(keep=3)

HEAD = """
import os, sys, time
import numpy as np
{before}
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
me, x, y = comm.rank, np.ones(4), np.zeros(4)
def say(text): os.write(1, f"{{me}}: {{text}}\\n".encode())
def await_file(name, seconds=40):
    until = time.monotonic() + seconds
    while not os.path.exists(name):
        assert time.monotonic() < until, "the other rank did not come through"
        time.sleep(0.01)
"""


def run(size: int, program: str, before: str = "", **environment: str) -> Any:
    """Run a program; it must end within a minute."""
    command, env = launch_command(size, ["-c", HEAD.format(before=before) + program])
    env |= {"HPCCOMM_COMPILE": "wait", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)


WITHOUT_THREADS = "import mpi4py\nmpi4py.rc.thread_level = 'funneled'"

USED, NEW = "comm.Allreduce(x, y)\n", ""


@pytest.mark.parametrize("before", [USED, NEW])
def test_a_program_that_ends_with_calls_under_way_says_so(before: str, tmp_path: Any) -> None:
    """Rank 1 makes the call while rank 0 ends, so it completes."""
    ends = str(tmp_path / "ends")
    program = f"""
import atexit
if me: await_file({ends!r})
comm.Iallreduce(np.ones(3_000_000), np.zeros(3_000_000))
if me == 0: atexit.register(lambda: open({ends!r}, "w").close())
"""
    done = run(2, before + program)
    assert done.returncode == 0, done.stderr
    assert (
        "the program ends while calls are under way (Iallreduce(sum, 3000000 float64)): wait for every" in done.stderr
    )


def test_a_thread_that_makes_its_channel_while_handlers_run_is_waited_for() -> None:
    """Also where a handler of the program's sleeps meanwhile."""
    slow = "import atexit\nif me == 0:\n    atexit.register(time.sleep, 1)\nelse:\n    time.sleep(0.7)\n"
    done = run(2, slow + "comm.Iallreduce(np.ones(3_000_000), np.zeros(3_000_000))\nif me: time.sleep(2)")
    assert done.returncode == 0, done.stderr
    assert "has left the program" not in done.stderr


def test_a_first_call_that_an_exit_handler_makes_is_waited_for() -> None:
    make = "import atexit\natexit.register(lambda: comm.Iallreduce(np.ones(3_000_000), np.zeros(3_000_000)))"
    done = run(2, make)
    assert done.returncode == 0, done.stderr
    assert "rank 0: the program ends while calls are under way" in done.stderr


def test_a_thread_that_waits_for_messages_takes_no_core_of_the_program() -> None:
    """Rank 1 comes two seconds late; rank 0 does something else, here nothing, for one, and then waits."""
    program = """
if me:
    time.sleep(2)
began = time.process_time()
request = comm.Iallreduce(np.ones(1 << 20), z := np.zeros(1 << 20), algorithm="ring")
time.sleep(1)
say(f"used {time.process_time() - began < 0.3}")
request.Wait()
assert (z == 2).all()
"""
    first = "comm.Iallreduce(np.ones(1 << 20), np.zeros(1 << 20), algorithm='ring').Wait()\n"
    done = run(2, first + program, HPCCOMM_SHARED_MEMORY="off", HPCCOMM_CONSISTENCY="off")
    assert "0: used True" in done.stdout, done.stdout + done.stderr


def test_a_rank_that_ends_without_the_call_is_named() -> None:
    done = run(2, USED + "if me == 0:\n    comm.Iallreduce(x, y).Wait()")
    assert done.returncode != 0
    assert "rank 1 has left the program, rank 0 waits in Iallreduce(sum, 4 float64)" in done.stderr


def test_a_call_that_no_other_rank_makes_does_not_keep_the_program_from_ending() -> None:
    done = run(2, "if me == 0:\n    comm.Iallreduce(x, y)")
    assert "rank 0: the program ends while calls are under way" in done.stderr
    assert "rank 1 has left the program, rank 0 waits in Iallreduce(sum, 4 float64)" in done.stderr


def test_finalize_waits_for_calls_under_way() -> None:
    done = run(
        2, USED + "if me: time.sleep(0.3)\ncomm.Iallreduce(x, y)\nMPI.Finalize()\nassert (y == 2).all()\nsay('ok')"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "0: ok", "1: ok"]


def test_a_forked_process_does_not_wait_for_its_parents_calls() -> None:
    done = run(
        2,
        USED
        + """
comm.Ibarrier().Wait()
request = None
if me == 0:
    request = comm.Ibarrier()
    child = os.fork()
    if child == 0:
        try:
            request.Wait()
        except hpccomm.TransportError as error:
            say(error)
        os._exit(0)
    os.waitpid(child, 0)
MPI.COMM_WORLD.Barrier()
(request or comm.Ibarrier()).Wait()
say("ok")
""",
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0: Ibarrier: this process was forked while the call was under way" in done.stdout
    assert done.stdout.count("ok") == 2


def test_an_exception_after_finalize_is_printed() -> None:
    done = run(2, USED + "MPI.Finalize()\nraise KeyError('lost')")
    assert "KeyError: 'lost'" in done.stderr


def test_an_uncaught_error_of_a_call_ends_all_ranks() -> None:
    done = run(2, "comm.Iallreduce(np.ones(3 + me), np.ones(3 + me)).Wait()\ntime.sleep(30)")
    assert done.returncode != 0
    assert "rank 1 called Iallreduce(sum, 4 float64): make the counts the same" in done.stderr


# Without a progress thread


def test_without_threads_the_requests_are_mpis_own() -> None:
    program = """
requests = [comm.Iallreduce(x, y), comm.Ibcast(x), comm.Ibarrier(), comm.Igather(x, np.zeros(8) if me == 0 else None)]
assert not any(isinstance(each, MPI.Grequest) for each in requests)
requests[0].Wait()
MPI.Request.Waitall(requests)
assert (y == 2).all()
future = hpccomm.allreduce(x, comm=comm, wait=False)
assert future.done() and (future.wait() == 2).all()
say("ok")
"""
    for before, environment in ((WITHOUT_THREADS, {}), ("", {"HPCCOMM_PROGRESS": "off"})):
        done = run(2, program, before, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ok") == 2


@pytest.mark.parametrize(
    ("usual", "unusual", "named"),
    [
        (
            "comm.Iallreduce(x, y).Wait()",
            "comm.Iallreduce(x[:2], y[:2]).Wait()",
            "rank 1 called Iallreduce(sum, 2 float64",
        ),
        ("comm.Ibarrier().Wait()", "comm.Ibcast(x).Wait()", "rank 1 called Ibcast(4 float64, root=0"),
        ("comm.Ibarrier().Wait()", "comm.Allreduce(x, y)", "rank 1 called Allreduce(sum, 4 float64"),
    ],
)
def test_without_threads_calls_that_differ_are_named(usual: str, unusual: str, named: str) -> None:
    program = USED + f"if me == 0:\n    {usual}\nelse:\n    time.sleep(0.3)\n    {unusual}\n"
    done = run(2, program, WITHOUT_THREADS)
    assert done.returncode != 0
    assert named in done.stderr


def test_without_threads_what_mpi_cannot_do_is_refused() -> None:
    program = """
for named in ({"algorithm": "ring"}, {"reproducible": True}, {"op": "avg"}):
    try:
        comm.Iallreduce(x, y, **named)
    except hpccomm.ArgumentError as error:
        say(error)
"""
    done = run(1, program, WITHOUT_THREADS)
    assert "cannot run algorithm='ring'" in done.stdout
    assert "takes no reproducible" in done.stdout
    assert "op='avg' is for reductions to whole results" in done.stdout


# Overlap


def test_a_call_completes_while_the_program_does_not_call_mpi(tmp_path: Any) -> None:
    """Rank 0 issues a call and looks at nothing but a file, which the others write once they have the result."""
    program = f"""
z = np.zeros(200_000)
request = comm.Iallreduce(np.ones(200_000), z)
if me == 0:
    await_file({str(tmp_path / "done")!r})
    assert (z == comm.size).all()
    request.Wait()
else:
    request.Wait()
    open({str(tmp_path / "done")!r}, "w").close()
say("ok")
"""
    done = run(3, program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == 3


def test_progress_all_drives_mpis_own_requests(tmp_path: Any) -> None:
    program = f"""
z, ones = np.zeros(200_000), np.ones(200_000)
request = MPI.Intracomm.Iallreduce(comm, ones, z)
if me == 0:
    await_file({str(tmp_path / "done")!r})
    request.Wait()
else:
    request.Wait()
    open({str(tmp_path / "done")!r}, "w").close()
assert (z == comm.size).all()
say("ok")
"""
    done = run(3, program, HPCCOMM_PROGRESS="all")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok") == 3


def test_a_wrong_value_of_the_setting_is_refused() -> None:
    done = run(1, "comm.Barrier()", HPCCOMM_PROGRESS="some")
    assert "HPCCOMM_PROGRESS='some' is not known: use on, off or all" in done.stderr
