"""Programs whose caches are wrong, damaged, empty, or another user's: right results and at most one warning."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hpccomm.kernels import objects
from hpccomm.launcher import launch_command
from hpccomm.performance import probe
from hpccomm.performance.machine import REFERENCE
from hpccomm.testing.jobs import stop

PROGRAM = """
import numpy as np
from mpi4py import MPI
import hpccomm
from hpccomm.kernels import objects
objects.compile_in_background = lambda: print("compiles")
comm = hpccomm.Communicator(MPI.COMM_WORLD)
p, r = comm.size, comm.rank
for n in (1, 12, 1000, 70_001):
    mine = np.arange(n) * (r + 1)
    comm.Allreduce(mine, total := np.empty(n, int))
    comm.Allgather(mine, every := np.empty(n * p, int))
    comm.Reduce_scatter_block(np.tile(mine, p), part := np.empty(n, int))
    comm.Bcast(mine, p - 1)
    assert (total == np.arange(n) * (p * (p + 1) // 2)).all() and (part == total).all()
    assert (every.reshape(p, n) == np.outer(np.arange(1, p + 1), np.arange(n))).all()
    assert (mine == np.arange(n) * p).all()
print("right")
"""
NOBODY = 65534
WITHOUT_RIGHTS = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
CORES = tuple(sorted(os.sched_getaffinity(0)))


@pytest.fixture
def home() -> Iterator[Path]:
    """A folder that other users can read, with all compiled functions."""
    folder = Path(tempfile.mkdtemp(prefix="hpccomm-home-"))
    folder.chmod(0o755)
    for name in objects.EMITTED:
        objects.address(name)
        (folder / objects.file_name(name)).write_bytes(objects.checksum(found := objects.read(name) or b"") + found)
    yield folder
    shutil.rmtree(folder)


def run(folder: Path, ranks: int = 2, prefix: Sequence[str] = (), **variables: str) -> tuple[list[str], list[str]]:
    """What the ranks of the program print, and what it says on stderr."""
    (folder / "program.py").write_text(PROGRAM)
    environ = {name: value for name, value in os.environ.items() if name not in ("HPCCOMM_COMPILE", "HPCCOMM_GUARD")}
    command, environment = launch_command(
        ranks, [str(folder / "program.py")], environ={**environ, "HPCCOMM_CACHE": str(folder), **variables}
    )
    done = subprocess.run(
        [*prefix, *command], env=environment, capture_output=True, text=True, timeout=240, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.split()), [line for line in done.stderr.splitlines() if "hpccomm" in line.lower()]


def write_probe(folder: Path, text: str) -> None:
    """Put a text where the probe of these cores, and of all cores, is looked for."""
    for cores in (CORES, probe.all_cores()):
        (folder / probe.file_name(cores)).write_text(text)


def probe_text(of: dict[str, Any], **figures: Any) -> str:
    """The content of a probe's file."""
    return json.dumps({"of": of, "probe": REFERENCE._asdict() | figures})


MINE = probe.identify(CORES)
WILD = {"line_ns": 1e12, "handover": 1e-9, "l1": 1, "l2": 1, "l3": 1, "cache_groups": 10**9, "poll_ns": 1e12}
CONDITIONS: dict[str, Callable[[Path], Any]] = {
    "the probe of another machine": lambda folder: write_probe(folder, probe_text({**MINE, "processor": "other"})),
    "half a probe": lambda folder: write_probe(folder, probe_text(MINE)[:200]),
    "a probe of wild figures": lambda folder: write_probe(folder, probe_text(MINE, **WILD)),
    "a probe of zeros": lambda folder: write_probe(folder, probe_text(MINE, **dict.fromkeys(WILD, 0))),
    "a folder in place of the probe": lambda folder: (folder / probe.file_name(CORES)).mkdir(),
    "half a function": lambda folder: os.truncate(folder / objects.file_name("sum_i8"), 100),
}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_wrong_or_damaged_cache_costs_no_result(home: Path, condition: str) -> None:
    CONDITIONS[condition](home)
    printed, said = run(home)
    assert printed == ["right"] * 2
    assert len(said) <= 1


def test_a_home_that_cannot_be_written_to_is_enough(home: Path) -> None:
    printed, said = run(home, HPCCOMM_CACHE="", HOME="/proc/nowhere", XDG_CACHE_HOME="")
    assert printed[-2:] == ["right"] * 2
    assert len(said) <= 1


@pytest.mark.slow(keep=1)
def test_of_ranks_that_start_with_an_empty_cache_one_compiles(home: Path) -> None:
    """Native MPI takes the calls meanwhile."""
    (empty := home / "empty").mkdir()
    printed, said = run(home, 6, HPCCOMM_CACHE=str(empty))
    assert printed == ["compiles", *["right"] * 6]
    assert said == []


@pytest.mark.slow(keep=1)
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root can give files to another user")
@pytest.mark.parametrize("readable", [True, False])
def test_the_cache_of_another_user_is_read_but_not_changed(home: Path, readable: bool) -> None:
    """The program runs without the right to pass over permissions."""
    cache = home / ".cache" / "hpccomm" / "kernels"
    cache.mkdir(parents=True)
    for each in [each for each in home.iterdir() if each.is_file()]:
        each.chmod(0o644 if readable else 0o600)
        each.rename(cache / each.name)
    for each in (cache, *(before := sorted(cache.iterdir()))):
        os.chown(each, NOBODY, NOBODY)
    printed, said = run(home, 2, WITHOUT_RIGHTS, HPCCOMM_CACHE="", HOME=str(home), XDG_CACHE_HOME="")
    assert printed[-2:] == ["right"] * 2
    assert len(said) <= 1
    assert sorted(cache.iterdir()) == before


SHARES = """
import os, time
from pathlib import Path
import numpy as np
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
p, r, end = comm.size, comm.rank, Path(__file__).parent / "end"
def call(n):
    comm.Allreduce(np.arange(n) * (r + 1), total := np.empty(n, int), algorithm="shared")
    assert (total == np.arange(n) * (p * (p + 1) // 2)).all()
call(1000)
names = []
for number in os.listdir("/proc/self/fd"):
    try:
        if "hpccomm" in os.readlink(f"/proc/self/fd/{number}"):
            names.append(f"/proc/{os.getpid()}/fd/{number}")
    except OSError:  # another thread has closed it
        pass
files = sum(comm.allgather(names), [])
if r == 0: print(" ".join(["memory", *files]), flush=True)
while not comm.bcast(end.exists()):
    call(12)
    call(70_001)
    time.sleep(0.01)
if r == 0: print("right", flush=True)
"""
AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
READS = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
"""The right to read all files: Python itself may be in a folder of root's."""
ROOT, OTHER = "root", "another user"
MAY_OPEN = {ROOT: (), OTHER: (*AS_NOBODY, *READS)}
MAY_NOT = {ROOT: AS_NOBODY, OTHER: ("setpriv", "--bounding-set", "-dac_override,-dac_read_search,-sys_ptrace")}
"""By the owner of the memory: who may open it, and a user who is neither the owner nor may do what root may."""


@pytest.mark.slow(keep=1)
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root can start another user's job")
def test_jobs_of_two_users_share_a_cache_but_no_memory(home: Path) -> None:
    """Neither can open what the ranks of the other job share, to read or to write."""
    if not all(can_open(prefix, "/dev/null", "<") for prefix in (*MAY_OPEN.values(), *MAY_NOT.values())):
        pytest.skip("this machine does not let root give and take these rights")
    (program := home / "program.py").write_text(SHARES)
    (temporary := home / "tmp").mkdir()
    temporary.chmod(0o1777)
    environ = {**os.environ, "HPCCOMM_CACHE": str(home), "TMPDIR": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    through = ["/usr/bin/env", sys.executable, str(program)]  # a launcher asks whether it may execute its command
    command, environ = launch_command(2, through, environ=environ)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": home}
    jobs = {user: subprocess.Popen([*prefix, *command], env=environ, **pipes) for user, prefix in MAY_OPEN.items()}
    try:
        memory = {user: read_memory(job) for user, job in jobs.items()}
        for user, files in memory.items():
            assert len(files) >= 4, files
            assert all(can_open(MAY_OPEN[user], file, how) for file in files for how in ("<", "<>"))
            assert not any(can_open(MAY_NOT[user], file, how) for file in files for how in ("<", "<>", ">>"))
        (home / "end").touch()
        for job in jobs.values():
            printed, said = job.communicate(timeout=100)
            assert (job.returncode, printed.split()) == (0, ["right"]), said
    finally:
        for job in jobs.values():
            stop(job)


def read_memory(job: Any) -> list[str]:
    """The files that ranks share with others, as the first one has printed them; a job that prints none is ended."""
    timer = threading.Timer(100, stop, [job])
    timer.start()
    word, *files = job.stdout.readline().split() or ["", job.stderr.read()]
    timer.cancel()
    assert word == "memory", files
    return files


def can_open(prefix: Sequence[str], file: str, how: str) -> bool:
    """Whether a process that is started so can open a file; its first byte is not changed."""
    done = subprocess.run([*prefix, "/bin/sh", "-c", f": {how} {file}"], stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0
