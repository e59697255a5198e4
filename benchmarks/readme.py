"""The figures of README and of the first page of the documentation, written from the measurements of this repository.

After ``scripts/bench node --rounds 5 --ranks 2,4`` and ``scripts/bench programs``, whose files lie in
``docs/measurements``, this writes the table under "Measured", the ranges that describe the picture, and the picture
(``scripts/bench glance``).  Nothing is measured here, and ``--check`` only says whether something would change.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from benchmarks import glance, node

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/index.md")
COLUMNS = {
    "Open MPI": "Open MPI",
    "MPICH": "MPICH",
    "Intel MPI": "Intel MPI",
    "hpccomm": "auto on Open MPI",
    "hpccomm, registered arrays": "registered on Open MPI",
}
"""The columns of the table, and what their measurements are called."""
SIZES = (4, 16 << 10, 64 << 20)
"""Bytes."""


def medians(ranks: int) -> dict[tuple[int, str], float]:
    """The median of the launches' medians in µs, by bytes and contender."""
    times: dict[tuple[int, str], list[float]] = defaultdict(list)
    for one in node.read_rounds(glance.FOLDER / "measurements" / glance.FILES[ranks]):
        for row in one["times"]:
            times[row["bytes"], row["contender"]].append(row["p50_us"])
    return {key: median(each) for key, each in times.items()}


def digits(us: float) -> str:
    """A time of three digits, with four from 10,000 on: ``0.786``, ``44,110``."""
    return f"{float(f'{us:.3g}'):,g}" if us < 1000 else f"{float(f'{us:.4g}'):,.0f}"


def table() -> str:
    """The rows of the table."""
    lines = []
    for ranks in glance.FILES:
        found = medians(ranks)
        for nbytes in SIZES:
            cells = [digits(found[nbytes, name]) for name in COLUMNS.values()]
            lines.append("| " + " | ".join([f"{ranks}, {nbytes:,}", *cells]) + " |\n")
    return "".join(lines)


def ranges() -> tuple[str, str]:
    """The least and the largest median of the picture's panels, as text."""
    folder = glance.FOLDER / "measurements"
    calls = [median(each) for name in glance.FILES.values() for each in glance.allreduce_ratios(folder / name).values()]
    programs = [median(each) for each in glance.program_ratios(folder / "programs-open-mpi.json").values()]
    return f"{min(calls):.2g} to {max(calls):.2g}", f"{min(programs):.2f} to {max(programs):.2f}"


def rewrite(text: str) -> str:
    """A page with the figures of the measurements."""
    calls, programs = ranges()
    text = re.sub(r"(an allreduce is )[\d.]+ to [\d.]+( times)", rf"\g<1>{calls}\g<2>", text)
    before, after = r"(whole\s+programs\s+on\s+two\s+ranks\s+)", r"( times\s+as\s+fast)"
    text = re.sub(rf"{before}\w+ [\d.]+ to [\d.]+{after}", rf"\g<1>are {programs}\g<2>", text)
    return re.sub(r"(^\|---:\|(?:---:\|)+\n)(?:\| \d+, [\d,]+ \|.*\n)+", rf"\g<1>{table()}", text, flags=re.MULTILINE)


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(prog="scripts/bench readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a figure would change")
    check, wrong = parser.parse_args().check, []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        if rewrite(text) != text:
            wrong.append(page)
        if not check:
            (ROOT / page).write_text(rewrite(text), encoding="utf-8")
    if not check:
        glance.draw(glance.FOLDER / "figures" / "at-a-glance.svg")
    sys.stdout.write("".join(f"{page}: {'differs from the measurements' if check else 'written'}\n" for page in wrong))
    return int(check and bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
