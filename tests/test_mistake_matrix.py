"""Every mistake of the matrix is named, on a first call and a later one; its legal cousins pass."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from hpccomm.testing.jobs import start, stop

sys.path.insert(0, str(Path(__file__).parent))
from mistake_matrix import COLLECTIVES, all_cells

RANKS = 3
SILENT_SECONDS = 40.0
"""How long a job may make no progress, on a loaded machine, before it counts as hanging."""

WAITS_FOR_NOBODY = (
    "Bcast",
    "Scatter",
    "Scatterv",
    "bcast",
    "scatter",
    "Scan",
    "Exscan",
    "Bcast_init",
    "Reduce",
    "reduce",
)
"""Collectives in which a rank that waits for the odd one may not exist, or may leave before it is late."""


class Outcome(NamedTuple):
    """What a cell has given."""

    results: tuple[str, ...]
    """Of each rank that has ended it: an error, or ``"silent"``."""
    said: str
    """What the ranks have printed."""
    hung: bool = False


def run_job(folder: Path, numbers: list[int]) -> dict[int, Outcome]:
    """Run cells until one of them ends the job; returns those that were run."""
    program = [str(Path(__file__).with_name("mistake_matrix.py")), str(folder), ",".join(map(str, numbers))]
    logs = [folder / f"{rank}.jsonl" for rank in range(RANKS)]
    for each in logs:
        each.unlink(missing_ok=True)
    with start(RANKS, program, os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        moved, length, hung = time.monotonic(), 0, False
        while process.poll() is None and not hung:
            time.sleep(0.1)
            now = sum(each.stat().st_size for each in logs if each.exists())
            moved, length = (time.monotonic(), now) if now != length else (moved, length)
            hung = time.monotonic() - moved > SILENT_SECONDS
        stop(process)
    lines = [[json.loads(line) for line in each.read_text().splitlines()] if each.exists() else [] for each in logs]
    done = min(map(len, lines))
    found = {
        numbers[k]: Outcome(tuple(each[k][1] for each in lines), "".join(each[k][2] for each in lines))
        for k in range(done)
    }
    if done < len(numbers):
        texts = [folder / f"{rank}.stderr" for rank in range(RANKS)]
        said = "".join(each.read_text().rpartition(f"cell {numbers[done]}\n")[2] for each in texts if each.exists())
        found[numbers[done]] = Outcome((), said, hung)
    return found


def is_named(said: str) -> bool:
    """Whether a text names the odd rank."""
    return bool(re.search(r"\brank 1\b|\branks (\d+, )*1\b", said))


def judge(number: int, outcome: Outcome) -> str:
    """What is wrong with a cell; empty if nothing is."""
    cell, told = all_cells()[number], " ".join((*outcome.results, outcome.said))
    silent = set(outcome.results) == {"silent"}
    if cell.legal:  # where others keep the machine busy, a rank may be named as late
        return "" if silent and not outcome.hung else f"false alarm in {cell}: {told}"
    if cell.mistake == "missing" and cell.collective in WAITS_FOR_NOBODY and silent:
        return ""
    return "" if is_named(told) else f"{'hangs' if outcome.hung else 'not named'}: {cell}: {told}"


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_mistake_is_named_and_legal_calls_pass(tmp_path: Path, collective: str) -> None:
    left = [k for k, cell in enumerate(all_cells()) if cell.collective == collective]
    wrong = []
    while left:
        found = run_job(tmp_path, left)
        wrong += [judge(number, outcome) for number, outcome in found.items()]
        left = left[len(found) :]
    assert not list(filter(None, wrong))
