"""``scripts/bench_limits``: what this node permits, beside what an allreduce takes.

In one launch, size by size and in turns: native MPI and ours as they are called from Python; the kernel of ours called
from a compiled loop, so that no Python is in it; and that kernel with nobody waiting for anybody, so that nothing is
left but the bytes that it must move between the cores' caches and memory.  For few bytes: a call of native MPI that
has nobody to talk to, which is what its arguments cost, and a meeting of all ranks with nothing to reduce.

Native MPI's time by that floor is how many times as fast as native MPI an allreduce can be here.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.node import row

OUT = Path("docs/measurements")
SIZES = [4 << 2 * k for k in range(14)]
SECONDS, MOST_CALLS = 4e-3, 2000
"""For how long something is timed in one turn, and how many calls at most; one call at least."""
TURNS = 9
SMALL = 4096
"""Bytes up to which a call's arguments and a meeting are most of it."""
OURS = ("auto", "registered")
RATIOS = ("times native", "at most", "of that reached")

Times = dict[str, float]


def kernel_loops() -> dict[str, Callable[[int, int], None]]:
    """Loops that call a kernel: as it is, with nobody waiting, and a meeting."""
    from hpccomm.kernels.shared_memory import compiled

    def on(kernel: Any) -> Any:
        def loop(call: int, n: int) -> None:
            for _ in range(n):
                kernel(call)

        return compiled.jit("void(int64, int64)")(loop)

    here: dict[str, Callable[..., Any]] = {
        "await_rank": skip_rank_wait,
        "await_count": skip_count_wait,
        "await_all": skip_all_wait,
    }
    waiting, hasty = compiled.compile_globals(), compiled.compile_globals(here)
    return {"no Python": on(waiting["allreduce"]), "no waiting": on(hasty["allreduce"]), "meet": on(waiting["barrier"])}


def skip_rank_wait(state, q, number):  # type: ignore[no-untyped-def]
    """In place of waiting for a rank at the beginning."""
    return 0


def skip_count_wait(state, q, counter, count):  # type: ignore[no-untyped-def]
    """In place of waiting for a block of a rank."""
    return True


def skip_all_wait(state, counter, count):  # type: ignore[no-untyped-def]
    """In place of waiting for a block of all ranks."""
    return True


def time_call(comm: Any, run: Callable[[int], None], calls: int) -> float:
    """Microseconds a call, on the slowest rank (collective)."""
    comm.Barrier()
    began = time.perf_counter()
    run(calls)
    return float(comm.allreduce((time.perf_counter() - began) / calls * 1e6, op=max))


def measure_sizes(sizes: list[int]) -> list[dict[str, Any]]:
    """One launch: medians over the turns, for each size (collective)."""
    from mpi4py import MPI

    from hpccomm import Communicator
    from hpccomm.backends.shared_memory import SharedMemory, call_of

    comm, loop = Communicator(MPI.COMM_WORLD), kernel_loops()
    shared = comm.context.shared_memory
    assert shared is not None, "this needs memory that the ranks share"
    meeting, alone = call_of(shared.bind_barrier(0)), MPI.COMM_SELF
    rows = []
    for nbytes in sizes:
        n, hasty = nbytes // 4, SharedMemory(comm.context.node)  # in which ranks that do not wait lose count
        a, b, r, h = np.ones(n, "f4"), np.empty(n, "f4"), comm.zeros(n, "f4"), hasty.empty(n, "f4")
        runs: dict[str, Callable[[int], None]] = {
            "native": repeat(partial(MPI.COMM_WORLD.Allreduce, a, b)),
            "auto": repeat(partial(comm.Allreduce, a, b)),
            "registered": repeat(partial(comm.Allreduce, MPI.IN_PLACE, r)),
        }
        plans = []
        for how, memory, x in (("no Python", shared, r), ("no waiting", hasty, h)):
            for name, send, recv in (("auto", a, b), ("registered", x, x)):
                plans.append(memory.bind_allreduce(send.ctypes.data, recv.ctypes.data, n, "f4", "sum", 0))
                runs[f"{name}, {how}"] = partial(loop[how], call_of(plans[-1]))
        if nbytes <= SMALL:
            runs["a meeting"] = partial(loop["meet"], meeting)
            runs["native, one rank"] = repeat(partial(alone.Allreduce, a, b))
        rows.append({"bytes": nbytes, **take_turns(comm, runs)})
        hasty.close()
    return rows


def repeat(call: Callable[[], Any]) -> Callable[[int], None]:
    """A call, as often as is said."""

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    return run


def take_turns(comm: Any, runs: dict[str, Callable[[int], None]]) -> Times:
    """Medians over the turns; what was never called before is called first (collective)."""
    calls = {name: max(time_call(comm, run, 3), 0.1) for name, run in runs.items()}
    calls = {name: max(1, min(MOST_CALLS, int(SECONDS * 1e6 / us))) for name, us in calls.items()}
    calls = comm.bcast(calls)
    found = [{name: time_call(comm, run, calls[name]) for name, run in runs.items()} for _ in range(TURNS)]
    return {name: median(each[name] for each in found) for name in runs}


def lower_bound(times: Times, ours: str) -> float:
    """What stays however ours is built: the bytes moved; for few bytes, arguments read and ranks that meet."""
    return max(times[f"{ours}, no waiting"], times.get("a meeting", 0.0) + times.get("native, one rank", 0.0))


def table(rounds: list[list[dict[str, Any]]]) -> str:
    """Medians over the rounds; ratios are taken round by round."""
    columns = [name for name in rounds[0][0] if name != "bytes"]
    lines = [row("bytes", *(f"{name}, µs" for name in columns)), "|" + "---:|" * (len(columns) + 1)]
    for at in zip(*rounds, strict=True):
        cells = [f"{median(each[name] for each in at):.4g}" if name in at[0] else "" for name in columns]
        lines.append(row(str(at[0]["bytes"]), *cells))
    lines += ["", row("bytes", *(f"{what}, {name}" for name in OURS for what in RATIOS)), "|" + "---:|" * 7]
    for at in zip(*rounds, strict=True):
        cells = []
        for ours in OURS:
            reached = median(each["native"] / each[ours] for each in at)
            possible = median(each["native"] / lower_bound(each, ours) for each in at)
            part = median(lower_bound(each, ours) / each[ours] for each in at)
            cells += [f"{reached:.2f}", f"{possible:.2f}", f"{part:.0%}"]
        lines.append(row(str(at[0]["bytes"]), *cells))
    return "\n".join(lines) + "\n"


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = argparse.ArgumentParser(prog="scripts/bench_limits", description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("ranks", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--inside", metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        from mpi4py import MPI

        rows = measure_sizes(SIZES)
        if MPI.COMM_WORLD.rank == 0:
            Path(args.inside).write_text(json.dumps(rows), encoding="utf-8")
        return 0
    for ranks in args.ranks:
        rounds = []
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "rows.json")
                command = [f"{Path(sys.executable).parent}/hpccomm-run", "-n", str(ranks)]
                subprocess.run([*command, "-m", "benchmarks.limits", "--inside", str(file)], check=True)
                rounds.append(json.loads(file.read_text(encoding="utf-8")))
        out = OUT / f"limits-p{ranks}.json"
        out.write_text(json.dumps(rounds).replace("}, {", "},\n{") + "\n", encoding="utf-8")
        sys.stdout.write(f"\n## {ranks} ranks\n\n{table(rounds)}")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
