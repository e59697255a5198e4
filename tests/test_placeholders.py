"""Processes that no MPI launcher has started become ranks of one MPI job, and nothing of it is left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hpccomm.errors import LaunchError
from hpccomm.launcher import clean_environment
from hpccomm.torch import placeholders

PROGRAM = Path(__file__).parent / "placeholder_rank.py"
SECONDS = 100


def start(size: int, folder: Path, end: str, **variables: str) -> list[subprocess.Popen[str]]:
    """Start the program once for each rank, without a launcher."""
    (folder / "store").mkdir()
    (folder / "tmp").mkdir()
    environ = clean_environment(os.environ) | {"TMPDIR": str(folder / "tmp"), **variables}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, str(PROGRAM)]
    return [
        subprocess.Popen([*command, str(rank), str(size), str(folder / "store"), end], env=environ, **pipes)
        for rank in range(size)
    ]


def finish(ranks: Iterable[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """The exit status, the output and the errors of each rank."""
    found = []
    for each in ranks:
        try:
            output, errors = each.communicate(timeout=SECONDS)
        finally:
            each.kill()
        found.append((each.returncode, output, errors))
    return found


def others_of(ranks: Iterable[subprocess.Popen[str]]) -> list[str]:
    """The commands of launchers and placeholders of these processes that still run."""
    names, found = [f"hpccomm-{each.pid}-".encode() for each in ranks], []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:
            continue
        if any(name in command for name in names):
            found.append(command.replace(b"\0", b" ").decode())
    return found


def check_nothing_is_left(ranks: list[subprocess.Popen[str]], folder: Path, files: Iterable[str]) -> None:
    """Neither processes nor files, of which the ranks have printed those in shared memory."""
    until = time.monotonic() + 20
    while others_of(ranks) and time.monotonic() < until:
        time.sleep(0.1)
    assert not others_of(ranks)
    assert not list((folder / "tmp").rglob("*"))
    names = [name for line in files for name in json.loads(line)]
    assert not [name for name in names if Path(name).exists()]


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("size", [3, 2, 5])
def test_processes_become_ranks(size: int, tmp_path: Path) -> None:
    ranks = start(size, tmp_path, "finished")
    found = finish(ranks)
    for status, _, errors in found:
        assert status == 0, errors
    check_nothing_is_left(ranks, tmp_path, [output for _, output, _ in found])


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "aborted"])
def test_a_rank_that_ends_early_ends_the_others(end: str, tmp_path: Path) -> None:
    ranks = start(3, tmp_path, end)
    began = time.monotonic()
    found = finish(ranks)
    assert time.monotonic() - began < SECONDS / 2
    assert all(status for status, _, _ in found)
    check_nothing_is_left(ranks, tmp_path, [output for _, output, _ in found])


@pytest.mark.slow
def test_rank_0_ends_everything_when_it_is_killed(tmp_path: Path) -> None:
    ranks = start(2, tmp_path, "waiting")
    files = [each.stdout.readline() for each in ranks if each.stdout]
    assert others_of(ranks)
    ranks[0].kill()
    assert all(status for status, _, _ in finish(ranks))
    check_nothing_is_left(ranks, tmp_path, files)


REFUSED = {
    "started": "MPI has started on rank 1 before init_process_group, as a world of one rank: import mpi4py.MPI",
    "broken": "MPI's launcher ended with status 7 and started no ranks: no slots",
}


@pytest.mark.parametrize("end", REFUSED)
def test_all_ranks_say_why_they_cannot_be_ranks(end: str, tmp_path: Path) -> None:
    ranks = start(2, tmp_path, end)
    for status, output, errors in finish(ranks):
        assert status
        assert not output
        assert f"LaunchError: {REFUSED[end]}" in errors


def describe(**other: Any) -> dict[str, Any]:
    return {"name": "a", "node": "one", "started": False, **other}


def test_several_nodes_are_refused() -> None:
    placeholders.check_processes([describe(), describe()])
    with pytest.raises(LaunchError, match=r"3 processes are on 2 nodes.*on one node only.*hpccomm-run -n 3"):
        placeholders.check_processes([describe(), describe(node="two"), describe()])


def test_an_mpi_whose_launcher_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = placeholders.launcher.library()
    other = found._replace(family=found.family._replace(name="Some MPI"))
    monkeypatch.setattr(placeholders.launcher, "library", lambda: other)
    with pytest.raises(LaunchError, match=r"torch has started cannot become ranks of Some MPI: .* hpccomm-run -n 2"):
        placeholders.start_launcher(["a", "b"])


@pytest.mark.parametrize(
    ("size", "environ", "expected"),
    [
        (1, {}, True),
        (2, {}, False),
        (2, {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        (2, {"PMI_SIZE": "2"}, True),
        (4, {"PMI_SIZE": "2"}, False),
        (2, {"OMPI_COMM_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}, False),
        (2, {"OMPI_COMM_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "1"}, True),
        (4, {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
    ],
)
def test_who_is_a_rank(size: int, environ: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    assert placeholders.is_rank(size, environ) is expected


def test_only_variables_of_mpi_are_taken_over() -> None:
    environ = {"HOME": "/a", "PMIX_RANK": "7", "OMPI_MCA_btl": "self"}
    before = dict(environ)
    own = placeholders.take_over(environ, {"HOME": "/b", "PMIX_RANK": "1", "PMI_PORT": "x:1"})
    assert environ == {"HOME": "/a", "PMIX_RANK": "1", "PMI_PORT": "x:1"}
    placeholders.give_back(environ, own)
    assert environ == before


def test_a_placeholder_without_a_process_is_no_rank() -> None:
    """It calls all others before it ends."""
    here, there = socket.socketpair()
    there.close()
    with here, pytest.raises(LaunchError, match="another process has ended before MPI started"):
        placeholders.read_environment(here)


def test_a_placeholder_that_is_silent_is_not_waited_for_for_ever() -> None:
    here, there = socket.socketpair()
    here.settimeout(0.01)
    with here, there, pytest.raises(LaunchError, match="started no ranks within"):
        placeholders.read_environment(here)
