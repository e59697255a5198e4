"""``hpccomm report trace.json``: one page of HTML on who waited for whom and where the time of the calls went."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("trace", help="the file of hpccomm-run --timeline, or of HPCCOMM_TIMELINE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: beside the trace)")


def run(args: argparse.Namespace) -> int:
    """Write the page and print its name."""
    from hpccomm.commands.files import check_file
    from hpccomm.observe import report

    slices = report.read(args.trace)
    out = args.out or Path(args.trace).with_suffix(".html")
    check_file("--out", out)
    out.write_text(report.render(slices, Path(args.trace).name), encoding="utf-8")
    print(out)
    return 0
