"""``hpccomm <command>``: one table of commands; the chosen one is imported, the others are not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from hpccomm import HpccommError, __version__

COMMANDS = {
    "bench": "measure collectives and messages, in OSU's or nccl-tests' format",
    "train": "train a small network on real data and show what the exchange costs",
    "tune": "measure which algorithm is fastest on this machine, and remember it",
    "info": "what was found here, what is in force, and why",
    "verify": "prove schedules correct for a range of sizes",
    "predict": "price every algorithm of a collective on a cluster of your choice",
    "plot": "print or draw a schedule, or draw benchmark results",
}


def parser(chosen: str | None) -> argparse.ArgumentParser:
    """All commands in the help, the flags of the chosen one."""
    made = argparse.ArgumentParser(
        prog="hpccomm", description="Collectives on MPI: measured, proved, priced, drawn, and training that uses them."
    )
    made.add_argument("--version", action="version", version=f"hpccomm {__version__}")
    commands = made.add_subparsers(dest="command", required=True, metavar="command")
    for name, summary in COMMANDS.items():
        added = commands.add_parser(name, help=summary, description=summary, add_help=name != "bench")
        if name == chosen:
            module = import_module(f"hpccomm.commands.{name}")
            module.add_arguments(added)
            added.set_defaults(run=module.run)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in words if not word.startswith("-")), None)
    args = parser(chosen).parse_args(words)
    try:
        return int(args.run(args))
    except (HpccommError, ImportError) as error:
        sys.stderr.write(f"hpccomm {args.command}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
