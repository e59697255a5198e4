"""The probe for a CUDA-aware MPI: subprocesses pass device pointers to MPI and check the results.

What the MPI library says about itself is not used: an MPI built without CUDA may use a UCX that has it, and an MPI
built with CUDA may find no driver.  The probe, a subprocess with a world of one, makes every kind of call that hpccomm
would make and compares the results with the host's.  Then two processes make the calls between them on the same device,
because a message to another process takes another path than one to the process itself.  An MPI that is not CUDA-aware
reads device memory with the processor, and the operating system kills the subprocess; the job continues.  Two processes
need MPI's launcher; if there is none, the result is that of one process, and says so.  The result is cached on disk
until the library, the driver or the settings change.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.errors import LaunchError
from hpccomm.files import write_text
from hpccomm.launcher import clean_environment, launch_command
from hpccomm.transports import cuda

PATIENCE = 60.0
"""Seconds that a probe may take."""
LAST_SECONDS = 5.0
"""Seconds that a terminated probe may take to exit."""
SINGLE_PROBE, PAIR_PROBE = "the probe", "the probe between two processes"
SUCCESS = "this MPI accepts device pointers"
LENGTHS = (3, 1 << 18)
"""Elements of four bytes: one length for the eager, one for the rendezvous protocol."""
SETTINGS = (
    "OMPI_",
    "PRTE_",
    "UCX_",
    "MPICH_",
    "MPIR_",
    "I_MPI_",
    "FI_",
    "PSM",
    "CUDA_",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
)
"""Prefixes of the environment variables on which the result may depend."""


class Verdict(NamedTuple):
    """The result of the probe."""

    trouble: str
    """Empty if MPI is CUDA-aware, else the reason why not."""
    when: str
    """Date and time of the probe, UTC."""
    alone: str = ""
    """Why the probe used one process only; empty if it used two."""


# In the probe


def exercise(device: cuda.Device, comm: Any) -> str:
    """Make all calls on device memory; the first wrong result, or an empty string (collective)."""
    p = comm.size
    stream = device.create_stream()
    for n in LENGTHS:
        send, recv = device.allocate(4 * n * p), device.allocate(4 * n * p)
        for name, call in make_calls(comm, n).items():
            given = (np.arange(n * p, dtype=np.int32) + 7 * comm.rank) % 1009
            write(device, send, given, stream)
            write(device, recv, np.full(n * p, -1, np.int32), stream)
            call(mpi_buffer(send, n * p), mpi_buffer(recv, n * p))
            found, want = np.empty_like(given), np.full_like(given, -1)
            device.to_host(found.view(np.uint8), recv, stream)
            device.synchronize(stream)
            call(given, want)
            wrong = [rank for rank, differs in enumerate(comm.allgather(not np.array_equal(found, want))) if differs]
            if wrong:
                where = f" on rank {wrong[0]}" if p > 1 else ""
                return f"{name} of {n} elements gave another result than on the host{where}"
    return ""


def make_calls(comm: Any, n: int) -> dict[str, Callable[[Any, Any], None]]:
    """``call(send, recv)`` on buffers of n elements for each rank."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return {
        "Sendrecv": lambda a, b: comm.Sendrecv(a, after, 1, b, before, 1),
        "Allreduce": comm.Allreduce,
        "Reduce": lambda a, b: comm.Reduce(a, b if comm.rank == 0 else None),
        "Bcast": lambda a, b: comm.Bcast(a if comm.rank == 0 else b),
        "Allgather": lambda a, b: comm.Allgather(first_elements(a, n), b),
        "Alltoall": comm.Alltoall,
        "Reduce_scatter_block": lambda a, b: comm.Reduce_scatter_block(a, first_elements(b, n)),
    }


def mpi_buffer(address: int, n: int) -> list[Any]:
    """A form of mpi4py without a count, which would be per rank in some calls and in all in others."""
    return [MPI.memory.fromaddress(address, 4 * n), MPI.INT32_T]


def first_elements(buffer: Any, n: int) -> Any:
    """The first n elements."""
    return buffer[:n] if isinstance(buffer, np.ndarray) else [buffer[0][: 4 * n], buffer[1]]


def write(device: cuda.Device, address: int, values: Any, stream: int) -> None:
    """Write values to the device."""
    device.to_device(address, values.view(np.uint8), stream)
    device.synchronize(stream)


def report(device: cuda.Device) -> None:
    """Print the result of all processes of the probe; a crash must not leave a core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    result = exercise(device, MPI.COMM_WORLD) or SUCCESS
    if MPI.COMM_WORLD.rank == 0:
        sys.stdout.write(result)


# In the process that starts the probe


def probe_program(number: int) -> list[str]:
    """The program of the probe on a device."""
    return ["-m", "hpccomm.transports.cuda_probe", str(number)]


def run_probe(
    command: Sequence[str], environ: Mapping[str, str], patience: float = PATIENCE, who: str = SINGLE_PROBE
) -> str:
    """Run a probe; an empty string if MPI is CUDA-aware, else the reason why not."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        child = subprocess.Popen(command, env=clean_environment(environ), text=True, **pipes)
    except OSError as error:
        return f"the probe could not start: {error}"
    with child:
        try:
            out, err = child.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            stop(child)
            return f"{who} had not finished after {patience:g} s"
    status = child.returncode
    if out.strip().endswith(SUCCESS) and status == 0:
        return ""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"{who} was killed by {signal.Signals(number).name}"
    output = (out.strip() or err.strip() or "no output").rsplit("\n", 1)[-1]
    return f"{who} ended with status {status}: {output}"


def stop(child: subprocess.Popen[str]) -> None:
    """Terminate a probe, then kill it: a launcher that is terminated ends its ranks."""
    for act in (child.terminate, child.kill):
        act()
        try:
            child.communicate(timeout=LAST_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


def run_pair_probe(program: Sequence[str], environ: Mapping[str, str], patience: float = PATIENCE) -> tuple[str, str]:
    """Run the probe between two processes; the reason why MPI is not CUDA-aware, and why two were not possible."""
    try:
        command, env = launch_command(2, program, environ=environ)
    except LaunchError as error:
        return "", str(error)
    return run_probe(command, env, patience, PAIR_PROBE), ""


def run_probes(number: int) -> tuple[str, str]:
    """Run the probe with one process and, if it succeeds, with two; returns as :func:`run_pair_probe`."""
    alone = run_probe([sys.executable, *probe_program(number)], os.environ)
    return (alone, "") if alone else run_pair_probe(probe_program(number), os.environ)


def verdict(number: int, driver: str, ask: Callable[[], tuple[str, str]] | None = None) -> Verdict:
    """The result for a device of this process, from disk if nothing has changed since."""
    file = cache_file(os.environ, MPI.Get_library_version(), driver, number)
    try:
        return Verdict(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    trouble, alone = ask() if ask else run_probes(number)
    found = Verdict(trouble, time.strftime("%Y-%m-%d %H:%M", time.gmtime()), alone)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(found._asdict()))
    except OSError:
        pass  # the next run probes again
    return found


def cache_file(environ: Mapping[str, str], library: str, driver: str, number: int) -> Path:
    """The cache file for this library, driver, device and environment."""
    home = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    settings = sorted(
        f"{name}={value}" for name, value in clean_environment(environ).items() if name.startswith(SETTINGS)
    )
    key = "\n".join(["between two", library, driver, str(number), os.uname().nodename, sys.executable, *settings])
    return home / "hpccomm" / f"device-pointers-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.json"


def main(number: str) -> None:
    """The probe."""
    import cupy

    cupy.cuda.Device(int(number)).use()
    report(cuda.device())


if __name__ == "__main__":
    main(sys.argv[1])
