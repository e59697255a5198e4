"""End a rank inside every collective in every way: the job is over soon, its status is not 0, and nothing is left.

``python tests/fault_matrix.py --every 10 --ranks 2,3`` runs every tenth cell of the matrix, each of which is a job.  A
cell is a collective and the path on which it runs, a fault, the rank that has it, and when: in place of its third call,
or inside it, while the others are late.  Each job has a /dev/shm of its own where this user may mount one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import mistake_matrix

from hpccomm.launcher import launch_command
from hpccomm.observe.processes import find_process

STATUSES = {"kill": (137, 9), "raise": (1,), "memory": (1,), "exit": (1, 9), "leave": (1,), "launcher": (-9,)}
"""The faults, and the exit statuses that say what has happened; those of dead ranks differ between
launchers: MPICH's may tell that of a rank that it has killed itself."""
WHEN = ("at", "inside")
FROM_A_THREAD = ("kill", "exit")
LATE_SECONDS, SOON_SECONDS = 0.4, 0.2
"""Where a fault comes inside the call: how long after it, or after its time if it is an exception, the other ranks
come, and when it comes."""
HANG_SECONDS, ORPHAN_SECONDS = 60.0, 10.0


def gather_unit(comm: Any) -> Callable[[], Any]:
    """The gather of a unit of MiCS over all ranks."""
    import numpy as np

    from hpccomm import mics, scale

    states = mics(comm, {"a": {"w": np.ones(4000, "f4")}}, scale(-0.1), comm.size)

    def call() -> None:
        states.gather("a")
        states.release("a")

    return call


OTHERS: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "MiCS gather": gather_unit,
}


class Cell(NamedTuple):
    """One job."""

    collective: str
    path: str
    fault: str
    when: str
    ranks: int
    victim: int
    per_node: int = 0


def all_cells(sizes: tuple[int, ...], per_node: int = 0) -> list[Cell]:
    """The whole matrix; ``per_node`` ranks share a node."""
    calls = [*((name, path) for name, paths in mistake_matrix.COLLECTIVES.items() for path in paths)]
    calls += [(name, "auto") for name in OTHERS]
    return [
        Cell(*call, fault, when, ranks, victim, per_node)
        for ranks in sizes
        for call, (fault, when, victim) in product(calls, product(STATUSES, WHEN, range(ranks)))
        if (fault != "launcher" or (when == "at" and victim == 0)) and not (per_node and call[1] == "shared")
    ]


# One rank


def run_rank(cell: Cell, folder: Path) -> None:
    """Make the calls, and have the fault."""
    from mpi4py import MPI

    import hpccomm
    from hpccomm import context

    if cell.per_node:
        context.ranks_of_this_node = lambda comm: comm.Split(comm.rank // cell.per_node, comm.rank)
    comm, odd = hpccomm.Communicator(MPI.COMM_WORLD.Dup()), MPI.COMM_WORLD.rank == cell.victim
    call = make_call(comm, cell)
    for _ in range(2):
        call()
    (folder / f"{comm.rank}.pid").write_text(str(os.getpid()))
    comm.Barrier()  # no rank ends before all have written their number
    if cell.fault == "launcher":
        time.sleep(100 if odd else 0)
    elif cell.when == "inside":
        arm(cell, folder) if odd else wait_until_struck(cell, folder)
    elif odd:
        strike(cell, folder)
    call()
    if odd:  # of a call that waits for nobody
        wait_until_struck(cell, folder)
    comm.Barrier()


def make_call(comm: Any, cell: Cell) -> Callable[[], Any]:
    """The collective of a cell."""
    if cell.collective in OTHERS:
        return OTHERS[cell.collective](comm)
    known = mistake_matrix.Cell(cell.collective, "same", cell.path, "later")
    return mistake_matrix.make_call(comm, known, False)


def strike(cell: Cell, folder: Path) -> None:
    """Have the fault."""
    from hpccomm.testing.faults import FAULTS

    (folder / "struck").write_text(str(time.time()))
    FAULTS[cell.fault](lambda: None, (), 0.0)


def wait_until_struck(cell: Cell, folder: Path) -> None:
    """Wait until the fault has come, and a moment longer; an exception comes only after a call of MPI's is complete."""
    until = time.monotonic() + (HANG_SECONDS if cell.fault in FROM_A_THREAD else LATE_SECONDS)
    while not (folder / "struck").exists() and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(LATE_SECONDS)


def arm(cell: Cell, folder: Path) -> None:
    """Have the fault soon: an exception in the main thread, an end from another one."""
    if cell.fault in FROM_A_THREAD:
        threading.Timer(SOON_SECONDS, strike, (cell, folder)).start()
    else:
        signal.signal(signal.SIGALRM, lambda *_: strike(cell, folder))
        signal.setitimer(signal.ITIMER_REAL, SOON_SECONDS)


# The job, seen from outside


class Outcome(NamedTuple):
    """What a job has given."""

    problem: str
    seconds: float
    """From the fault to the end of the job."""
    status: int


@cache
def private_folder() -> list[str]:
    """The command that gives a job a /dev/shm of its own, whose content it lists at the end; empty if it cannot be."""
    script = 'mount -t tmpfs tmpfs /dev/shm && "$@"; status=$?; ls -A /dev/shm >"$0"; exit $status'
    command = ["unshare", "--mount", "--", "/bin/sh", "-c", script]
    if not shutil.which("unshare"):
        return []
    done = subprocess.run([*command, "/dev/null", "true"], capture_output=True, check=False)
    return command if done.returncode == 0 else []


def run_cell(cell: Cell, limit: float) -> Outcome:
    """Run the job of a cell."""
    with tempfile.TemporaryDirectory(prefix="hpccomm-faults-") as name:
        folder = Path(name)
        command, env = launch_command(cell.ranks, [__file__, "--cell", json.dumps(cell), name])
        if cell.fault != "launcher" and private_folder():
            command = [*private_folder(), str(folder / "left"), *command]
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        hung = not wait_for_end(process, cell, folder)
        ended = time.time()
        pids = [int(each.read_text()) for each in folder.glob("*.pid")]
        seconds = ended - float((folder / "struck").read_text()) if (folder / "struck").exists() else 0.0
        problem = judge(cell, process.returncode, seconds, limit, folder, pids, hung)
        return Outcome(problem, seconds, process.returncode)


def wait_for_end(process: subprocess.Popen[bytes], cell: Cell, folder: Path) -> bool:
    """Wait for the end of a job, or kill its launcher; False if it hangs, and is killed."""
    until = time.monotonic() + HANG_SECONDS
    if cell.fault == "launcher":
        while len(list(folder.glob("*.pid"))) < cell.ranks and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(LATE_SECONDS)
        process.kill()
        (folder / "struck").write_text(str(time.time()))
    try:
        process.wait(until - time.monotonic())
        return True
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False


def judge(cell: Cell, status: int, seconds: float, limit: float, folder: Path, pids: list[int], hung: bool) -> str:
    """What is wrong with a job; empty if nothing is."""
    until = time.monotonic() + (ORPHAN_SECONDS if cell.fault == "launcher" else limit)
    while (alive := [pid for pid in pids if find_process(pid).started]) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    left = (folder / "left").read_text().split() if (folder / "left").exists() else []
    found = {
        "it hangs": hung,
        "the fault did not come": not (folder / "struck").exists() or len(pids) < cell.ranks,
        f"status {status}": status not in STATUSES[cell.fault],
        f"{seconds:.1f} s": seconds > limit,
        f"{len(alive)} ranks are alive": bool(alive),
        f"/dev/shm has {', '.join(left)}": bool(left),
    }
    problems = [text for text, holds in found.items() if holds]
    return f"{', '.join(problems)}: {cell}: {(folder / 'said').read_text(errors='replace')[-3000:]}" if problems else ""


def run_all(cells: list[Cell], limit: float, seconds: float) -> int:
    """Run cells for at most so many seconds; print what is wrong, and how long the jobs took to end."""
    until, times, statuses = time.monotonic() + seconds, dict[str, list[float]](), Counter[tuple[str, int]]()
    wrong = 0
    for cell in cells:
        if time.monotonic() > until:
            break
        found = run_cell(cell, limit)
        times.setdefault(cell.fault, []).append(found.seconds)
        statuses[cell.fault, found.status] += 1
        if found.problem:
            wrong += 1
            print(found.problem, flush=True)
    for fault, each in times.items():
        codes = {status: count for (name, status), count in statuses.items() if name == fault}
        median, most = statistics.median(each), max(each)
        print(f"{fault}: {len(each)} jobs, over after {median:.2f} s (median), {most:.2f} s (most); status {codes}")
    print(f"{sum(map(len, times.values()))} of {len(cells)} chosen cells, {wrong} wrong")
    return wrong


def main() -> int:
    """Run one rank, or the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run every N-th cell (1)")
    parser.add_argument("--first", type=int, default=0, metavar="K", help="from the K-th on (0)")
    parser.add_argument("--ranks", default="2,3", help="world sizes (2,3)")
    parser.add_argument("--per-node", type=int, default=0, help="ranks of a node (all)")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds from the fault to the end of the job (1)")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no job after so many")
    args = parser.parse_args()
    if args.cell:
        run_rank(Cell(*json.loads(args.cell[0])), Path(args.cell[1]))
        return 0
    cells = all_cells(tuple(map(int, args.ranks.split(","))), args.per_node)
    return min(1, run_all(cells[args.first :: args.every], args.limit, args.seconds))


if __name__ == "__main__":
    sys.exit(main())
