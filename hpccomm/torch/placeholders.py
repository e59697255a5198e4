"""Processes that ``torchrun`` or ``torch.multiprocessing`` has started become the ranks of one MPI job.

*p processes on one node, r this one.*  MPI learns its rank and its server from variables that MPI's launcher sets.

1. Every process listens on a socket, whose name it writes into torch's store.
2. Rank 0 starts the launcher over p placeholders (:mod:`hpccomm.torch.placeholder`), which do not start MPI.
3. Placeholder r sends its environment to process r, which takes the variables over and starts MPI.

A placeholder ends when its process ends, however that happens, and the launcher with the placeholders: nothing is left.
If the launcher ends the job before, because of ``MPI_Abort`` or a rank that was killed, the other processes end too.
"""

from __future__ import annotations

import atexit
import itertools
import json
import multiprocessing
import os
import secrets
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn, Protocol

from hpccomm import launcher
from hpccomm.calls.fingerprint import format_ranks
from hpccomm.errors import LaunchError
from hpccomm.layout import LOCAL_SIZES
from hpccomm.torch import placeholder
from hpccomm.torch.decisions import COMPLETE, decide

START_SECONDS = 60.0
"""Time limit for the launcher to start the placeholders."""
POLL_SECONDS = 0.2
"""Time between two looks for an error of the launcher."""
END_SECONDS = 3.0
"""Time for torchrun to end this process, after the launcher has ended the job."""

FLAGS: dict[str, tuple[str, ...]] = {"Open MPI": ("--bind-to", "none"), "MPICH": ("-pmi-port", "-launcher", "fork")}
"""Arguments of the launcher by the family of MPI: torchrun binds no process, and servers must be reached by name."""

SCHEDULERS = ("SLURM_", "PBS_", "LSB_", "PE_HOSTFILE", "SGE_")
"""Prefixes of variables that the launcher must not see: it starts placeholders on this node only."""
VARIABLES = (*launcher.RANK_PREFIXES, "OMPI_", "PRTE_", "HYDRA_")
"""Prefixes of the variables that tell a process of its MPI job."""

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""A variable that torchrun sets."""

LAST = -100
"""Behind the finalizers of multiprocessing itself, of which that of a queue has the lowest priority, -5."""

_tries = itertools.count()
"""Processes that could not become ranks may try again: with new keys, as the store keeps the old ones."""


class Store(Protocol):
    """What is used of torch's store."""

    def set(self, key: str, value: str) -> Any:
        """Set a value."""

    def get(self, key: str) -> bytes:
        """Wait for a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether all these keys have values."""

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """Set a value if there is none yet and ``expected`` is empty; returns what is there."""


def is_rank(size: int, environ: Mapping[str, str]) -> bool:
    """Whether this process is a rank of an MPI job of this size, or will be when MPI starts."""
    if size == 1:
        return True
    module = find_mpi()
    if module is not None:
        return bool(module.Is_finalized() or module.COMM_WORLD.size == size)
    processes_of_torchrun = int(environ.get("LOCAL_WORLD_SIZE", "1")) if TORCHRUN in environ else 1
    return processes_of_torchrun == 1 and launcher.read_launch_size(environ)[0] == size


def find_mpi() -> Any:
    """``mpi4py.MPI`` if it is imported and MPI has started."""
    module = sys.modules.get("mpi4py.MPI")
    return module if module is not None and module.Is_initialized() else None


def postpone_mpi() -> None:
    """In a process of torchrun, let MPI start in ``init_process_group`` and not when ``mpi4py.MPI`` is imported."""
    size = os.environ.get("WORLD_SIZE", "1")
    if "mpi4py.MPI" not in sys.modules and TORCHRUN in os.environ and not is_rank(int(size), os.environ):
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True


def join(store: Store, rank: int, size: int) -> None:
    """Make this process a rank of an MPI job and start MPI, unless it is one (collective over the store's processes).

    Raises LaunchError on all of them if they are on several nodes, if MPI has started on one, or if its launcher fails.
    """
    if is_rank(size, os.environ):
        return
    prefix = f"hpccomm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_tries)}"
    failure = f"{prefix}/failure"
    listener = socket.socket(socket.AF_UNIX)
    name = f"hpccomm-{os.getpid()}-{secrets.token_hex(8)}"
    listener.bind("\0" + name)
    listener.listen()
    described = {"name": name, "node": describe_node(), "started": find_mpi() is not None}
    store.set(f"{prefix}/{rank}", json.dumps(described))
    try:
        everyone = [json.loads(each) for each in await_processes(store, prefix, rank, size)]
        check_processes(everyone)
        names = [each["name"] for each in everyone]
        explain = start_launcher(names) if rank == 0 else partial(read, store, failure)
        connection, given = await_placeholder(listener, explain)
    except Exception as error:
        if rank == 0:
            store.set(failure, str(error) if isinstance(error, LaunchError) else f"{type(error).__name__}: {error}")
        listener.close()
        raise
    own = take_over(os.environ, given)
    hold(connection, listener, rank)
    start_mpi()
    give_back(os.environ, own)


def await_processes(store: Store, prefix: str, rank: int, size: int) -> list[bytes]:
    """What all processes have written, which each of them has seen: if the time of one is over, all raise."""
    keys, decision = [f"{prefix}/{each}" for each in range(size)], f"{prefix}/decision"
    try:
        written = [store.get(each) for each in keys]
    except Exception:
        if decide(store, decision, str(rank)) != COMPLETE:
            raise
        written = [store.get(each) for each in keys]
    first = decide(store, decision, COMPLETE)
    if first != COMPLETE:
        raise LaunchError(
            f"rank {rank}: init_process_group timed out on rank {first} before all ranks had come: make all ranks "
            "call it"
        )
    return written


def read(store: Store, key: str) -> str:
    """A value, or an empty string if there is none."""
    return store.get(key).decode() if store.check([key]) else ""


def describe_node() -> str:
    """What processes have in common that can share memory."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    memory = os.stat("/dev/shm").st_dev if os.path.isdir("/dev/shm") else 0
    return f"{socket.gethostname()} {boot} {memory}"


def check_processes(everyone: Sequence[Mapping[str, Any]]) -> None:
    """Raise LaunchError if these processes cannot become ranks."""
    size, nodes = len(everyone), {each["node"] for each in everyone}
    if len(nodes) > 1:
        raise LaunchError(
            f"the {size} processes are on {len(nodes)} nodes, and processes that torch has started become ranks of MPI "
            f"on one node only: start the program with hpccomm-run -n {size}, mpirun or srun instead of torchrun"
        )
    started = [rank for rank, each in enumerate(everyone) if each["started"]]
    if started:
        raise LaunchError(
            f"MPI has started on {format_ranks(started)} before init_process_group, as a world of one rank: import "
            "mpi4py.MPI, and names of hpccomm, after init_process_group, or start the program with "
            f"hpccomm-run -n {size}"
        )


def start_launcher(names: Sequence[str]) -> Callable[[], str]:
    """Start the launcher over one placeholder for each name; returns a function that tells why it has ended."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(SCHEDULERS)}
    family = launcher.library().family.name
    if family not in FLAGS:
        raise LaunchError(
            f"processes that torch has started cannot become ranks of {family}: start the program with "
            f"hpccomm-run -n {len(names)}"
        )
    program = [sys.executable, "-I", "-S", placeholder.__file__, *names]
    command, env = launcher.launch_command(len(names), program, FLAGS[family], environ)
    output = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the launcher
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        *((os.POSIX_SPAWN_DUP2, output.fileno(), each) for each in (1, 2)),
    ]
    process = os.posix_spawn(command[0], command, env, file_actions=files, setsid=True)

    def explain() -> str:
        ended, status = os.waitpid(process, os.WNOHANG)
        if not ended:
            return ""
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
        return f"MPI's launcher ended with status {os.waitstatus_to_exitcode(status)} and started no ranks: {text}"

    return explain


def await_placeholder(listener: socket.socket, explain: Callable[[], str]) -> tuple[socket.socket, dict[str, str]]:
    """The connection to this rank's placeholder, and its environment; ``explain`` tells why there will be none."""
    until = time.monotonic() + START_SECONDS
    listener.settimeout(POLL_SECONDS)
    while time.monotonic() < until:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            why_none = explain()
            if why_none:
                raise LaunchError(why_none) from None
            continue
        if placeholder.is_same_user(connection):
            connection.settimeout(max(POLL_SECONDS, until - time.monotonic()))
            return connection, read_environment(connection)
        connection.close()
    raise LaunchError(f"MPI's launcher started no ranks within {START_SECONDS:g} s: use hpccomm-run")


def read_environment(connection: socket.socket) -> dict[str, str]:
    """What a placeholder sends; one whose process has died calls all others and sends nothing."""
    with connection.makefile("rb") as file, suppress(TimeoutError):
        line = file.readline()
        if line:
            found: dict[str, str] = json.loads(line)
            return found
        raise LaunchError("another process has ended before MPI started: its output says why")
    raise LaunchError(f"MPI's launcher started no ranks within {START_SECONDS:g} s: use hpccomm-run")


def take_over(environ: MutableMapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """Replace the variables of an MPI job by those of ``given``; returns those that they were."""
    own = {name: environ.pop(name) for name in list(environ) if name.startswith(VARIABLES)}
    environ.update({name: value for name, value in given.items() if name.startswith(VARIABLES)})
    return own


def give_back(environ: MutableMapping[str, str], own: Mapping[str, str]) -> None:
    """Remove what makes a process a rank, once MPI has started: a child that starts MPI is not this rank.

    How many ranks share this node's cores stays known.
    """
    for name in list(environ):
        if name.startswith(launcher.RANK_PREFIXES) and name not in LOCAL_SIZES:
            del environ[name]
    environ.update(own)


def hold(connection: socket.socket, listener: socket.socket, rank: int) -> None:
    """Keep the placeholder until this process ends, and end with it if the launcher, or another rank, ends before."""
    last = os.dup(connection.fileno())  # Python closes its sockets when it ends, which is before MPI ends
    process, poll, open_ends = os.getpid(), select.poll(), [last]
    for each in (connection, listener):
        each.settimeout(None)
        poll.register(each, select.POLLIN)

    def close_all() -> None:
        while open_ends:  # once: later forks may have given the number to another file
            os.close(open_ends.pop())
        connection.close()
        listener.close()

    os.register_at_fork(after_in_child=close_all)

    @atexit.register
    def say_goodbye() -> None:
        if os.getpid() == process:
            with suppress(OSError):
                os.write(last, b".")

    def watch() -> None:
        while all(descriptor == listener.fileno() for descriptor, _ in poll.poll()):
            call, _ = listener.accept()
            with call:
                if placeholder.is_same_user(call):
                    break
        time.sleep(END_SECONDS)
        module = find_mpi()
        if module is None or not module.Is_finalized():
            os.write(2, f"rank {rank}: the MPI job has ended, because a rank has called MPI_Abort or died\n".encode())
            os._exit(1)

    end_on_exceptions(process)
    if multiprocessing.parent_process() is not None:
        end_with_multiprocessing(say_goodbye)
    threading.Thread(target=watch, name="hpccomm-placeholder", daemon=True).start()


class Exit(SystemExit):
    """What ``sys.exit`` raises in a rank: if it ends the program, it ends this process at once, by its status.

    The interpreter releases it then, outside of all functions, and runs the exit handlers afterwards.
    """

    process = 0
    """This process, but not those that it forks."""

    def __del__(self) -> None:
        in_main_thread = threading.get_ident() == threading.main_thread().ident
        if self.code and os.getpid() == self.process and in_main_thread and sys._getframe().f_back is None:
            atexit.register(end_at_once, self.code if isinstance(self.code, int) else 1)


def raise_exit(status: Any = None) -> NoReturn:
    """``sys.exit`` of a rank."""
    raise Exit(status)


def end_on_exceptions(process: int) -> None:
    """Let an exception that ends the program end this process at once: MPI's end would wait for all other ranks."""
    write_exception, Exit.process, sys.exit = sys.excepthook, process, raise_exit

    def end(*error: Any) -> None:
        write_exception(*error)
        if os.getpid() == process:
            atexit.register(end_at_once, 1)  # the first handler then, after torch has written the exception to stderr

    sys.excepthook = end


def end_at_once(status: int) -> None:
    """End this process without Python's and MPI's end, so that its placeholder ends the other ranks."""
    for each in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            each.flush()
    os._exit(status)


def end_with_multiprocessing(say_goodbye: Callable[[], None]) -> None:
    """Let multiprocessing end this rank: it prints exceptions itself, and ends forked processes without exit handlers.

    Its finalizers run while the exception that ends the process is raised.
    """
    from multiprocessing import util

    process = multiprocessing.current_process()
    forked = (getattr(process, "_start_method", None) or multiprocessing.get_start_method()) != "spawn"
    handled = sys.exc_info()[1]  # by the program that has forked this process

    def end() -> None:
        kind, error, trace = sys.exc_info()
        if isinstance(error, SystemExit) and error.code and error is not handled:
            number = error.code if isinstance(error.code, int) else 1
            sys.stderr.write("" if number == error.code else f"{error.code}\n")
            end_at_once(number)
        elif error is not None and not isinstance(error, SystemExit) and error is not handled:
            sys.excepthook(kind, error, trace)  # type: ignore[arg-type]
            end_at_once(1)
        module = find_mpi()
        if forked and module is not None and not module.Is_finalized():
            say_goodbye()
            module.Finalize()

    util.Finalize(None, end, exitpriority=LAST)


def start_mpi() -> None:
    """Start MPI if importing it does not, and remove the name of the memory that MPICH leaves if a rank is killed."""
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init_thread()
    MPI.COMM_WORLD.Barrier()  # all ranks have mapped the file
    if MPI.COMM_WORLD.rank == 0:
        from hpccomm.transports.segment import unlink_memory_of_mpi

        unlink_memory_of_mpi()
