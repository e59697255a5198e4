"""``hpccomm doctor``: check what a job needs on this machine; run it on one node, without a launcher."""

from __future__ import annotations

import argparse
import json
import os
import sys

from hpccomm.errors import ArgumentError

MARKS = {"ok": ("✓", 32), "note": ("!", 33), "fault": ("✗", 31), "none": ("-", 90)}
"""The mark of a state, and its colour on a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.epilog = "exit status: 0 without faults, 1 with faults; notes (!) are advice"


def run(args: argparse.Namespace) -> int:
    """Print one line for each check, and the cure below it."""
    from hpccomm.launcher import read_launch_size
    from hpccomm.observe.doctor import Host, examine

    if read_launch_size(os.environ)[0] > 1:
        raise ArgumentError("doctor launches ranks itself: run it without a launcher, on one node of the job")
    found = {}
    for name, finding in examine(Host()):
        found[name] = finding
        if not args.json:
            print(line(name, *finding), flush=True)
    if args.json:
        print(json.dumps({name: finding._asdict() for name, finding in found.items()}, indent=1))
    return int(any(finding.state == "fault" for finding in found.values()))


def line(name: str, state: str, text: str, cure: str) -> str:
    """The line of a check, and the cure."""
    mark, colour = MARKS[state]
    mark, arrow = (mark, "→") if can_show("✓→") else (f"{state:<5}", "->")
    shown = f"\033[{colour}m{mark}\033[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else mark
    return f"{shown} {name:<20}{text}" + (f"\n{'':<{len(mark) + 21}}{arrow} {cure}" if cure else "")


def can_show(text: str) -> bool:
    """Whether the output has these characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
