"""Does this MPI understand pointers of a device?  Asked of a process that may die of the answer.

What an MPI says of itself is not believed: one built without CUDA may stand on a UCX that has it, and one built with it
may find no driver.  A child, a world of one, hands every kind of call that we would make to MPI and looks at what came
out.  One that does not understand copies with the processor and is ended by the kernel; the job lives.  The answer is
kept on disk until the library, the driver or the settings change.
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

from hpccomm.launcher import fresh
from hpccomm.transports import cuda

PATIENCE = 60.0
"""Seconds that a child may take."""
UNDERSTOOD = "this MPI understands pointers of a device"
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


# In the child


def exercise(device: cuda.Device, comm: Any) -> str:
    """All calls that we make, on memory of the device; what is wrong with the first that goes wrong."""
    p = comm.size
    stream = device.stream()
    for n in LENGTHS:
        send, recv = device.allocate(4 * n * p), device.allocate(4 * n * p)
        for name, call in calls(comm, n).items():
            given = (np.arange(n * p, dtype=np.int32) + 7 * comm.rank) % 1009
            put(device, send, given, stream)
            put(device, recv, np.full(n * p, -1, np.int32), stream)
            call(form(send, n * p), form(recv, n * p))
            found, want = np.empty_like(given), np.full_like(given, -1)
            device.to_host(found.view(np.uint8), recv, stream)
            device.synchronize(stream)
            call(given, want)
            if not np.array_equal(found, want):
                return f"{name} of {n} elements gave something else than on the host"
    return ""


def calls(comm: Any, n: int) -> dict[str, Callable[[Any, Any], None]]:
    """``call(send, recv)`` on buffers of n elements for each rank."""
    after, before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    return {
        "Sendrecv": lambda a, b: comm.Sendrecv(a, after, 1, b, before, 1),
        "Allreduce": comm.Allreduce,
        "Reduce": lambda a, b: comm.Reduce(a, b if comm.rank == 0 else None),
        "Bcast": lambda a, b: comm.Bcast(a if comm.rank == 0 else b),
        "Allgather": lambda a, b: comm.Allgather(part(a, n), b),
        "Alltoall": comm.Alltoall,
        "Reduce_scatter_block": lambda a, b: comm.Reduce_scatter_block(a, part(b, n)),
    }


def form(address: int, n: int) -> list[Any]:
    """Memory as mpi4py takes it."""
    return [MPI.memory.fromaddress(address, 4 * n), n, MPI.INT32_T]


def part(buffer: Any, n: int) -> Any:
    """The first n elements."""
    return buffer[:n] if isinstance(buffer, np.ndarray) else [buffer[0], n, buffer[2]]


def put(device: cuda.Device, address: int, values: Any, stream: int) -> None:
    """Write to the device."""
    device.to_device(address, values.view(np.uint8), stream)
    device.synchronize(stream)


def answer(device: cuda.Device) -> None:
    """Say what came out; no core file if this is the end."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.stdout.write(exercise(device, MPI.COMM_SELF) or UNDERSTOOD)


# In the parent


def command(number: int) -> list[str]:
    """What asks on a device."""
    return [sys.executable, "-m", "hpccomm.transports.cuda_probe", str(number)]


def asked(command: Sequence[str], environ: Mapping[str, str], patience: float = PATIENCE) -> str:
    """Nothing where a child finds that MPI understands; why not, otherwise."""
    try:
        child = subprocess.run(
            command, env=fresh(environ), capture_output=True, text=True, check=False, timeout=patience
        )
    except subprocess.TimeoutExpired:
        return f"a child that tried was still waiting after {patience:g} s"
    except OSError as error:
        return f"no child could try: {error}"
    if child.stdout.endswith(UNDERSTOOD) and child.returncode == 0:
        return ""
    if child.returncode < 0:
        return f"a child that tried was ended by {signal.Signals(-child.returncode).name}"
    said = (child.stdout.strip() or child.stderr.strip() or "without a word").rsplit("\n", 1)[-1]
    return f"a child that tried ended with status {child.returncode}: {said}"


def verdict(number: int, driver: str, ask: Callable[[], str] | None = None) -> Verdict:
    """The answer for a device of this process, from disk if nothing has changed since."""
    file = kept_in(os.environ, MPI.Get_library_version(), driver, number)
    try:
        return Verdict(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        pass
    trouble = (ask or (lambda: asked(command(number), os.environ)))()
    found = Verdict(trouble, time.strftime("%Y-%m-%d %H:%M", time.gmtime()))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(found._asdict()), encoding="utf-8")
        unfinished.replace(file)
    except OSError:
        pass  # asked again the next time
    return found


def kept_in(environ: Mapping[str, str], library: str, driver: str, number: int) -> Path:
    """The file for this library, driver, device and environment."""
    home = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    settings = sorted(f"{name}={value}" for name, value in fresh(environ).items() if name.startswith(SETTINGS))
    words = "\n".join([library, driver, str(number), os.uname().nodename, sys.executable, *settings])
    return home / "hpccomm" / f"device-pointers-{hashlib.blake2b(words.encode(), digest_size=8).hexdigest()}.json"


def main(number: str) -> None:
    """The child."""
    import cupy

    cupy.cuda.Device(int(number)).use()
    answer(cuda.device())


if __name__ == "__main__":
    main(sys.argv[1])
