"""The least time of an allreduce that this node permits, beside the time that an allreduce takes.

One launch measures, size by size and in turns: native MPI and ours, called from Python; our kernel, called from a
compiled loop without Python; and that kernel without its waits for other ranks, which leaves only the bytes that it
must move between the cores' caches and memory.  For few bytes it also measures native MPI on one rank, which is the
cost of a call's arguments, and a barrier of all ranks.

Native MPI's time divided by the least time is the largest ratio to native that an allreduce can reach here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import harness

SIZES = [4 << 2 * k for k in range(14)]
SECONDS, MOST_CALLS = 4e-3, 2000
"""Seconds of one turn, and the most calls in it; at least one call."""
TURNS = 9
SMALL = 4096
"""Bytes up to which a call's arguments and the barrier take most of the time."""
OURS = ("auto", "registered")
RATIOS = ("times native", "at most", "of that reached")

Times = dict[str, float]


def kernel_loops() -> dict[str, Callable[[int, int], None]]:
    """Compiled loops that call the kernel as it is, the kernel without waits, and the barrier."""
    from hpccomm.kernels import compiler
    from hpccomm.kernels.shared_memory import collectives

    def on(kernel: Any) -> Any:
        def loop(call: int, n: int) -> None:
            for _ in range(n):
                kernel(call)

        return compiler.jit("void(int64, int64)")(loop)

    waiting = compiler.compile_module(collectives)
    hasty = compiler.compile_module(collectives, {"await_flag": skip_wait})
    return {
        "no Python": on(waiting["allreduce"]),
        "no waiting": on(hasty["allreduce"]),
        "barrier": on(waiting["barrier"]),
    }


def skip_wait(state, q, flag, count, limit, late):  # type: ignore[no-untyped-def]
    """Replaces every wait for a rank."""
    return 0


def measure_sizes(sizes: list[int]) -> list[dict[str, Any]]:
    """The rows of one launch: medians over the turns, for each size (collective)."""
    from mpi4py import MPI

    from hpccomm import Communicator
    from hpccomm.backends.shared_memory import SharedMemory, call_of

    comm, loop = Communicator(MPI.COMM_WORLD), kernel_loops()
    shared = comm.context.shared_memory
    assert shared is not None, "this needs memory that the ranks share"
    barrier, alone = call_of(shared.bind_barrier(0)), MPI.COMM_SELF
    rows = []
    for nbytes in sizes:
        n, hasty = nbytes // 4, SharedMemory(comm.context.node)  # kernels without waits corrupt its counters
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
            runs["a barrier"] = partial(loop["barrier"], barrier)
            runs["native, one rank"] = repeat(partial(alone.Allreduce, a, b))
        rows.append({"bytes": nbytes, **time_in_turns(comm, runs)})
        hasty.close()
    return rows


def repeat(call: Callable[[], Any]) -> Callable[[int], None]:
    """A loop over a call."""

    def run(calls: int) -> None:
        for _ in range(calls):
            call()

    return run


def time_in_turns(comm: Any, runs: dict[str, Callable[[int], None]]) -> Times:
    """Median microseconds of a call; three calls before the first turn prepare each run (collective)."""
    us = {name: 1e6 / 3 * harness.time_collective(comm, partial(run, 3)) for name, run in runs.items()}
    calls = {name: max(1, min(MOST_CALLS, int(SECONDS * 1e6 / max(each, 0.1)))) for name, each in us.items()}
    turns = {name: partial(harness.time_collective, comm, partial(run, calls[name])) for name, run in runs.items()}
    found = harness.take_turns(turns, TURNS, warmup=0)
    return {name: 1e6 * median(each) / calls[name] for name, each in found.items()}


def lower_bound(times: Times, ours: str) -> float:
    """The least time of any implementation: the bytes moved; for few bytes, the arguments and a barrier."""
    return max(times[f"{ours}, no waiting"], times.get("a barrier", 0.0) + times.get("native, one rank", 0.0))


def tables(rounds: list[list[dict[str, Any]]]) -> str:
    """Medians over the rounds; ratios are taken round by round."""
    columns = [name for name in rounds[0][0] if name != "bytes"]
    times, shares = [], []
    for at in zip(*rounds, strict=True):
        size = str(at[0]["bytes"])
        times.append(
            [size, *(harness.number(median(r[name] for r in at)) if name in at[0] else "" for name in columns)]
        )
        shares.append([size])
        for ours in OURS:
            reached = median(each["native"] / each[ours] for each in at)
            possible = median(each["native"] / lower_bound(each, ours) for each in at)
            part = median(lower_bound(each, ours) / each[ours] for each in at)
            shares[-1] += [f"{reached:.2f}", f"{possible:.2f}", f"{part:.0%}"]
    head = ["bytes", *(f"{ratio}, {name}" for name in OURS for ratio in RATIOS)]
    return harness.table(["bytes", *(f"{name}, µs" for name in columns)], times) + "\n" + harness.table(head, shares)


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = harness.parser("limits", __doc__, rounds=5, ranks="2,4", file="limits-p{ranks}.json")
    parser.add_argument("--sizes", default=SIZES, type=harness.integers, help="bytes, default 4 to 2^28, 4 times apart")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    if args.work:
        harness.write_on_rank0(args.work, measure_sizes(args.sizes))
        return 0
    program = ["-m", "benchmarks.limits", "--sizes", ",".join(map(str, args.sizes))]
    for ranks in args.ranks:
        run, file = harness.on_node(ranks), harness.results_file(args, ranks=ranks)
        record = harness.Record(file, lambda row: row["round"], seconds=args.seconds)
        if record.rows and isinstance(record.rows[0], list):  # an older file
            record.rows[:] = [{"round": number, "sizes": rows} for number, rows in enumerate(record.rows)]
        record.recall_all(range(args.rounds), lambda k: {"round": k, "sizes": harness.launch(run, program, "--work")})  # noqa: B023
        harness.emit(f"\n## {ranks} ranks\n", tables([row["sizes"] for row in record.rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
