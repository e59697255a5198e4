"""A wrong ``HPCCOMM_*`` variable, and other wrong arguments, are one clear error."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm import ArgumentError, launcher
from hpccomm.calls.watchdog import stall_seconds
from hpccomm.settings import check_environment


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HPCCOMM_SHARED_MEMORY", "off"),
        ("HPCCOMM_CONSISTENCY", "on"),
        ("HPCCOMM_EXCEPTHOOK", ""),
        ("HPCCOMM_STALL_SECONDS", "0.5"),
        ("HPCCOMM_STALL_SECONDS", "inf"),
        ("HPCCOMM_STALL_SECONDS", ""),
        ("HPCCOMM_TUNING", "/anywhere"),
        ("HPC", "anything"),
    ],
)
def test_known_settings_pass(name: str, value: str) -> None:
    check_environment({name: value})


@pytest.mark.parametrize(
    ("value", "seconds"), [("", 60.0), ("abc", 60.0), ("-1", 60.0), ("nan", 60.0), ("0.5", 0.5), ("inf", math.inf)]
)
def test_the_watchdog_takes_a_wrong_number_of_seconds_for_none(
    value: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCCOMM_STALL_SECONDS", value)
    assert stall_seconds() == seconds


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("HPCCOMM_SHARED_MEMORY", "no", "HPCCOMM_SHARED_MEMORY='no' is not known: use on or off"),
        ("HPCCOMM_CONSISTENCY", "OFF", "use on or off"),
        ("HPCCOMM_EXCEPTHOOK", "0", "use on or off"),
        ("HPCCOMM_STALL_SECONDS", "1m", "HPCCOMM_STALL_SECONDS='1m' is not known: use a number of seconds"),
        ("HPCCOMM_STALL_SECONDS", "-1", "use a number of seconds"),
        ("HPCCOMM_STALL_SECONDS", "nan", "use a number of seconds"),
        ("HPCCOMM_ALGORITM", "ring", "HPCCOMM_ALGORITM is not a setting of hpccomm: use HPCCOMM_ALGORITHM"),
        ("HPCCOMM_NEW_FEATURE", "1", "use HPCCOMM_ALGORITHM or HPCCOMM_CACHE or"),
    ],
)
def test_wrong_settings_are_refused_with_the_allowed_values(name: str, value: str, remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy):
        check_environment({name: value})


def calls(comm: hpccomm.Communicator) -> dict[str, Any]:
    """A call of each family, by its name in ``HPCCOMM_ALGORITHM``."""
    x, y = np.ones(4 * comm.size), np.empty(4 * comm.size)
    return {
        "allreduce": lambda: comm.Allreduce(x, y),
        "reduce": lambda: comm.Reduce(x, y),
        "reduce_scatter": lambda: comm.Reduce_scatter_block(x, y[:4]),
        "allgather": lambda: comm.Allgather(x[:4], y),
        "bcast": lambda: comm.Bcast(x),
        "alltoall": lambda: comm.Alltoall(x, y),
        "barrier": comm.Barrier,
    }


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", ["ring", "tree", "pairwise", "shared", "native", "auto"])
def test_a_name_for_all_collectives_holds_for_those_that_have_it(
    name: str, comm: hpccomm.Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCCOMM_ALGORITHM", name)
    made = hpccomm.Communicator(MPI.Intracomm(comm).Dup())
    for call in calls(made).values():
        call()
    made.Free()


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("wrong", ["rng", "bcast=doubling", "alltoall=ring", "allreduce=pairwise"])
def test_a_name_that_no_collective_has_or_not_the_one_that_is_named_is_refused(
    wrong: str, comm: hpccomm.Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCCOMM_ALGORITHM", wrong)
    made, (collective, _, name) = hpccomm.Communicator(MPI.Intracomm(comm).Dup()), wrong.rpartition("=")
    with pytest.raises(ArgumentError, match=f"HPCCOMM_ALGORITHM='{name}' is not available here"):
        calls(made)[collective or "allreduce"]()
    made.Free()


def test_a_new_communicator_checks_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCCOMM_SHARED_MEMORY", "yes")
    comm = MPI.COMM_SELF.Dup()
    with pytest.raises(ArgumentError, match="use on or off"):
        hpccomm.Communicator(comm)
    monkeypatch.delenv("HPCCOMM_SHARED_MEMORY")
    hpccomm.Communicator(comm).Barrier()


X = np.ones(4)
SELF = hpccomm.Communicator(MPI.COMM_SELF)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SELF.Bcast(X, 1.5), r"Bcast: root 1.5 is not a rank: pass one of 0"),
        (lambda: SELF.Bcast(X, None), r"Bcast: root None is not a rank"),
        (lambda: hpccomm.broadcast(X, 1.5, SELF), r"broadcast: root 1.5 is not a rank"),
        (lambda: SELF.Allreduce(X, X.copy(), op="nonsense"), r"op='nonsense' is not an operation: .* 'avg', 'mean'"),
        (lambda: SELF.Allreduce(X, X.copy(), op=3), r"op=3 is not an operation: pass an MPI.Op"),
        (lambda: hpccomm.allreduce(X, op="nonsense", comm=SELF), r"op='nonsense' is not an operation"),
        (lambda: SELF.Scan(X, X.copy(), op="avg"), r"Scan: op='avg' is for reductions to whole results"),
        (lambda: hpccomm.adam(eps=-1), r"adam: eps is -1: pass 0 or more"),
        (lambda: hpccomm.chain(3), r"chain: 3 is no transform"),
        (lambda: hpccomm.feedback(3, None), r"feedback: 3 is no compressor"),
        (lambda: hpccomm.feedback(hpccomm.topk(0.1), None), r"feedback: None is no communicator"),
    ],
)
def test_wrong_arguments_are_one_clear_error(call: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_the_launcher_says_in_one_sentence_that_a_script_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launcher.main(["-n", "2", "nosuch.py"]) == 2
    said = capsys.readouterr()
    assert said.err == f"hpccomm-run: nosuch.py does not exist in {tmp_path}: pass the path of a script\n"
    assert said.out == ""


HOOK = """
import sys
from mpi4py import MPI
sys.excepthook = lambda kind, error, trace: print("the program's own hook", error, flush=True)
own = sys.excepthook
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
print("kept" if sys.excepthook is own else "replaced", flush=True)
if {redirect}:
    import io
    sys.stderr = io.StringIO()
sys.excepthook(ValueError, ValueError("the mistake"), None)
"""


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("setting", ["", "off"])
def test_the_excepthook_can_be_switched_off_and_calls_the_programs_own(setting: str) -> None:
    from hpccomm.testing.jobs import run_under_mpi

    environ = {**os.environ, "HPCCOMM_EXCEPTHOOK": setting}
    done = run_under_mpi(2, "-c", HOOK.format(redirect=True), timeout=60, environ=environ)
    assert "the program's own hook the mistake" in done.stdout + done.stderr
    aborted = "aborts all ranks: uncaught exception:\nValueError: the mistake" in done.stderr + done.stdout
    assert aborted == (setting != "off")
    assert (done.returncode != 0) == aborted
    assert ("kept" in done.stdout) == (setting == "off")


SINGLE = """
import sys
import numpy as np
from mpi4py import MPI
import hpccomm
{before}
comm = hpccomm.Communicator(MPI.COMM_WORLD)
{mistake}
"""


@pytest.mark.parametrize(
    ("mistake", "before", "setting", "lines"),
    [
        ("comm.Bcast(np.ones(1), 3)", "", "short", ["[hpccomm] rank 0: Bcast: root 3", "[hpccomm] ArgumentError in "]),
        (
            "comm.Ibcast(np.ones(1), 3)",
            "",
            "short",
            ["[hpccomm] rank 0: Ibcast: root 3", "[hpccomm] ArgumentError in "],
        ),
        ("comm.Bcast(np.ones(1), 3)", "", "full", ["Traceback"]),
        ("comm.Bcast(np.ones(1), 3)", "sys.excepthook = lambda *_: print('own', file=sys.stderr)", "short", ["own"]),
        ("1 / 0", "", "short", ["Traceback"]),
    ],
)
def test_a_single_process_prints_the_sentence_of_our_errors_alone(
    mistake: str, before: str, setting: str, lines: list[str], tmp_path: Path
) -> None:
    (tmp_path / "single.py").write_text(SINGLE.format(mistake=mistake, before=before))
    environ = {**os.environ, "HPCCOMM_TRACEBACK": setting}
    command = [sys.executable, str(tmp_path / "single.py")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=environ)
    said = done.stderr.splitlines()
    assert done.returncode == 1
    assert [line for line, begin in zip(said, lines, strict=False) if line.startswith(begin)] == said[: len(lines)]
    assert len(said) == len(lines) or lines == ["Traceback"]
