"""``hpccomm stacks PID``: what every rank of a running job does; PID is a rank's or the launcher's."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from hpccomm.errors import ArgumentError
from hpccomm.observe.flight_recorder import INQUIRED, Inquiry, State, describe_calls, open_ring
from hpccomm.observe.processes import find_process
from hpccomm.performance.units import format_count

SECONDS, NODES_SECONDS = 2.0, 10.0
"""How long ranks of this node, and those of other nodes, may take to answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("pid", type=int, metavar="PID", help="the process of a rank, or of the job's launcher")
    parser.add_argument("--calls", type=int, default=5, metavar="N", help="last calls of each rank (5)")


def run(args: argparse.Namespace) -> int:
    """Ask the ranks and print what they answer."""
    processes, size = find_ranks(args.pid)
    if not processes:
        raise ArgumentError(f"process {args.pid} belongs to no job of yours that uses hpccomm: pass that of a rank")
    inquiry, until = Inquiry(processes, 0), time.monotonic() + SECONDS
    while not inquiry.collect(time.monotonic() > until):
        time.sleep(0.05)
    for rank, state in sorted(inquiry.states.items()):
        print("\n".join(show(state, f"process {processes[rank]}", describe_calls(processes[rank], args.calls))))
    elsewhere = ask_other_nodes(processes) if size > len(processes) else []
    for state in elsewhere:
        print("\n".join(show(state, "another node", [])))
    missing = size - len(processes) - len(elsewhere)
    if missing > 0:
        print(f"{format_count(missing, 'rank')} on other nodes: run hpccomm stacks there as well")
    return 0


def show(state: State, where: str, calls: list[str]) -> Iterator[str]:
    """The lines of one rank."""
    yield f"rank {state.rank} ({where}): {state.text}" + (f" ({state.condition})" if state.condition else "")
    yield from (f"  call   {each}" for each in calls)
    for stack in state.stacks or ():
        yield f"  thread {stack.thread}"
        yield from (f"    {each}" + (f": {each.source}" if each.source else "") for each in stack.frames)


def ask_other_nodes(processes: dict[int, int]) -> list[State]:
    """Where the ranks of other nodes stand, by the first rank of this node that answers."""
    for pid in processes.values():
        with open_ring(pid) as ring:
            if ring is None or not ring.is_awake(SECONDS):
                continue
            ring.words[INQUIRED] += 1
            number, until = ring.words[INQUIRED], time.monotonic() + NODES_SECONDS
            while time.monotonic() < until:
                found = ring.report(number)
                if found is not None:
                    return found
                time.sleep(0.05)
    return []


def find_ranks(pid: int) -> tuple[dict[int, int], int]:
    """The processes of this node's ranks of the job to which a process belongs, and the ranks of the job."""
    from hpccomm.calls.departures import find_launchers

    parents = {int(each.name): find_process(int(each.name)).parent for each in Path("/proc").glob("[0-9]*")}
    root = (list(find_launchers(pid)) or [pid])[-1]
    found, size = dict[int, int](), 0
    for each in parents:
        above = each
        while above != root and above in parents and above > 1:
            above = parents[above]
        if above == root:
            with open_ring(each) as ring:
                if ring is not None and ring.head["rank"][0] >= 0:
                    found[int(ring.head["rank"][0])], size = each, int(ring.head["size"][0])
    return found, size
