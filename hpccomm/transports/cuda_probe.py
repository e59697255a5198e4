"""Does this MPI understand pointers of a device?  Asked of a process that may die of the answer.

What an MPI says of itself is not believed: one built without CUDA may stand on a UCX that has it, and one built with it
may find no driver.  A child, a world of one, hands every kind of call that we would make to MPI and looks at what came
out; then two children do so between them, on the same device, since what one process copies to itself goes another way
than what goes to a neighbour.  One that does not understand copies with the processor and is ended by the kernel; the
job lives.  Two take MPI's launcher: where none is found, the answer is that of one, and says so.  The answer is kept on
disk until the library, the driver or the settings change.
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
from hpccomm.launcher import clean_environment, launch_command
from hpccomm.transports import cuda

PATIENCE = 60.0
"""Seconds that a child may take."""
LAST_SECONDS = 5.0
"""That it then has to end."""
SINGLE_PROBE, PAIR_PROBE = "a child that tried", "two children that tried between them"
SUCCESS = "this MPI understands pointers of a device"
LENGTHS = (3, 1 << 18)
"""Elements of four bytes: by the eager and by the rendezvous protocol."""
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
"""Beginnings of the variables that the answer may depend on."""


class Verdict(NamedTuple):
    """What came of asking."""

    trouble: str
    """Nothing where MPI understands; why not, otherwise."""
    when: str
    """Date and time of asking, UTC."""
    alone: str = ""
    """Why it was not asked between two processes; nothing where it was."""


# In the child


def exercise(device: cuda.Device, comm: Any) -> str:
    """All calls that we make, on memory of the device; what is wrong with the first that goes wrong (collective)."""
    p = comm.size
    stream = device.create_stream()
    for n in LENGTHS:
        send, recv = device.allocate(4 * n * p), device.allocate(4 * n * p)
        for name, call in calls(comm, n).items():
            given = (np.arange(n * p, dtype=np.int32) + 7 * comm.rank) % 1009
            put(device, send, given, stream)
            put(device, recv, np.full(n * p, -1, np.int32), stream)
            call(mpi_buffer(send, n * p), mpi_buffer(recv, n * p))
            found, want = np.empty_like(given), np.full_like(given, -1)
            device.to_host(found.view(np.uint8), recv, stream)
            device.synchronize(stream)
            call(given, want)
            odd = [rank for rank, wrong in enumerate(comm.allgather(not np.array_equal(found, want))) if wrong]
            if odd:
                where = f" on rank {odd[0]}" if p > 1 else ""
                return f"{name} of {n} elements gave something else than on the host{where}"
    return ""


def calls(comm: Any, n: int) -> dict[str, Callable[[Any, Any], None]]:
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
    """Memory as mpi4py takes it; a count would be that of one rank's part in some calls, of all in others."""
    return [MPI.memory.fromaddress(address, 4 * n), MPI.INT32_T]


def first_elements(buffer: Any, n: int) -> Any:
    """The first n elements."""
    return buffer[:n] if isinstance(buffer, np.ndarray) else [buffer[0][: 4 * n], buffer[1]]


def put(device: cuda.Device, address: int, values: Any, stream: int) -> None:
    """Write to the device."""
    device.to_device(address, values.view(np.uint8), stream)
    device.synchronize(stream)


def answer(device: cuda.Device) -> None:
    """Say what came out, of all children; no core file if this is the end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    said = exercise(device, MPI.COMM_WORLD) or SUCCESS
    if MPI.COMM_WORLD.rank == 0:
        sys.stdout.write(said)


# In the parent


def program(number: int) -> list[str]:
    """What asks on a device."""
    return ["-m", "hpccomm.transports.cuda_probe", str(number)]


def run_probe(
    command: Sequence[str], environ: Mapping[str, str], patience: float = PATIENCE, who: str = SINGLE_PROBE
) -> str:
    """Nothing where a child, or what it launches, finds that MPI understands; why not, otherwise."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        child = subprocess.Popen(command, env=clean_environment(environ), text=True, **pipes)
    except OSError as error:
        return f"no child could try: {error}"
    with child:
        try:
            out, err = child.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            end(child)
            return f"{who} was still waiting after {patience:g} s"
    status = child.returncode
    if out.strip().endswith(SUCCESS) and status == 0:
        return ""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"{who} was ended by {signal.Signals(number).name}"
    said = (out.strip() or err.strip() or "without a word").rsplit("\n", 1)[-1]
    return f"{who} ended with status {status}: {said}"


def end(child: subprocess.Popen[str]) -> None:
    """Gently first: a launcher that is told to ends its ranks."""
    for act in (child.terminate, child.kill):
        act()
        try:
            child.communicate(timeout=LAST_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


def run_pair_probe(program: Sequence[str], environ: Mapping[str, str], patience: float = PATIENCE) -> tuple[str, str]:
    """What is wrong between two processes, and why they were not asked where they were not."""
    try:
        command, env = launch_command(2, program, environ=environ)
    except LaunchError as error:
        return "", str(error)
    return run_probe(command, env, patience, PAIR_PROBE), ""


def run_probes(number: int) -> tuple[str, str]:
    """Of one process, and if it lived of two: as :func:`run_pair_probe`."""
    alone = run_probe([sys.executable, *program(number)], os.environ)
    return (alone, "") if alone else run_pair_probe(program(number), os.environ)


def verdict(number: int, driver: str, ask: Callable[[], tuple[str, str]] | None = None) -> Verdict:
    """The answer for a device of this process, from disk if nothing has changed since."""
    file = cache_file(os.environ, MPI.Get_library_version(), driver, number)
    try:
        return Verdict(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    trouble, alone = ask() if ask else run_probes(number)
    found = Verdict(trouble, time.strftime("%Y-%m-%d %H:%M", time.gmtime()), alone)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found._asdict()), encoding="utf-8")
        unfinished.replace(file)
    except OSError:
        pass  # asked again the next time
    return found


def cache_file(environ: Mapping[str, str], library: str, driver: str, number: int) -> Path:
    """The file for this library, driver, device and environment."""
    home = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    settings = sorted(
        f"{name}={value}" for name, value in clean_environment(environ).items() if name.startswith(SETTINGS)
    )
    words = "\n".join(["between two", library, driver, str(number), os.uname().nodename, sys.executable, *settings])
    return home / "hpccomm" / f"device-pointers-{hashlib.blake2b(words.encode(), digest_size=8).hexdigest()}.json"


def main(number: str) -> None:
    """The child."""
    import cupy

    cupy.cuda.Device(int(number)).use()
    answer(cuda.device())


if __name__ == "__main__":
    main(sys.argv[1])
