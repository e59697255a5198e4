"""``hpccomm stacks PID``: what every rank of a running job does; PID is a rank's or the launcher's."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from hpccomm.errors import ArgumentError
from hpccomm.observe.flight_recorder import INQUIRED, Inquiry, State, describe_calls, find_ranks, open_ring
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
