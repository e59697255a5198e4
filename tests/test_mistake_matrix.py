"""Every mistake of the matrix is named, on a first call and a later one; its legal cousins pass."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from hpccomm.testing.jobs import LAUNCHES, start, stop

sys.path.insert(0, str(Path(__file__).parent))
from mistake_matrix import COLLECTIVES, Cell, all_cells, is_missed, is_named

SILENT_SECONDS = 180.0
"""How long a job may make no progress before it counts as hanging: all ranks may compile on a loaded machine."""
JOBS = 4
"""How many jobs run at a time."""

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


REPORT = re.compile(r"^.* not complete after .*\n(?:  .*\n)*", re.MULTILINE)
"""A watchdog's report, which has a line for each rank, also for those that make no mistake."""


class Outcome(NamedTuple):
    """What a cell has given."""

    results: tuple[str, ...]
    """Of each rank that has ended it: an error, or ``"silent"``."""
    said: str
    """What the ranks have printed."""
    hung: bool = False


def run_job(
    folder: Path, numbers: list[int], ranks: int, per_node: int, launches: int = LAUNCHES
) -> dict[int, Outcome]:
    """Run cells that no other job has taken until one of them ends the job; returns those that were run.

    A launch that MPI itself refuses, before a rank runs the program, is tried again.
    """
    program = [str(Path(__file__).with_name("mistake_matrix.py")), str(folder), ",".join(map(str, numbers))]
    program += [str(per_node)] if per_node else []
    logs, texts = ([folder / f"{rank}.{kind}" for rank in range(ranks)] for kind in ("jsonl", "stderr"))
    environ = os.environ | {"HPCCOMM_DEBUG": "detail" if per_node else ""}
    for each in (*logs, *texts):
        each.unlink(missing_ok=True)
    output = folder / "output"
    with output.open("wb") as launcher, start(ranks, program, environ, stdout=launcher, stderr=launcher) as process:
        moved, length, hung = time.monotonic(), 0, False
        while process.poll() is None and not hung:
            time.sleep(0.1)
            now = sum(each.stat().st_size for each in logs if each.exists())
            moved, length = (time.monotonic(), now) if now != length else (moved, length)
            hung = time.monotonic() - moved > SILENT_SECONDS
        stop(process)
    lines = [read_lines(each) for each in logs]
    done = min(map(len, lines))
    found = {
        lines[0][k][0]: Outcome(tuple(each[k][1] for each in lines), "".join(each[k][2] for each in lines))
        for k in range(done)
    }
    if hung or process.returncode:
        parts = [read_last_cells(each, done) for each in texts]
        begun = [number for number, _ in filter(None, parts)]
        if not begun:
            print(f"no rank began cell {done} of the job, exit {process.returncode}: {output.read_text()}")
            assert not any(each.exists() for each in texts), "the job ended between two cells"
            assert launches > 1, "no job can be launched"
            return run_job(folder, numbers, ranks, per_node, launches - 1)
        print(f"cell {begun[0]} ended the job, {len(begun)} ranks had begun it: {output.read_text()}")
        found[begun[0]] = Outcome((), "".join(text for _, text in filter(None, parts)), hung)
    return found


def read_last_cells(text: Path, done: int) -> tuple[int, str] | None:
    """The number of the cell that a rank began after those that are done, and what it has printed since then."""
    cells = re.split(r"^cell (\d+)\n", text.read_text() if text.exists() else "", flags=re.MULTILINE)[1:]
    return (int(cells[2 * done]), "".join(cells[2 * done + 1 :])) if len(cells) > 2 * done else None


def read_lines(log: Path) -> list[Any]:
    """The lines of a rank's log; the last one may be cut, of a rank that was ended while it wrote."""
    complete = log.read_text().rpartition("\n")[0] if log.exists() else ""
    return [json.loads(line) for line in complete.splitlines()]


def judge(number: int, outcome: Outcome) -> str:
    """What is wrong with a cell; empty if nothing is."""
    cell, told = all_cells()[number], " ".join((*outcome.results, outcome.said))
    silent = set(outcome.results) == {"silent"}
    if cell.legal:  # where others keep the machine busy, a rank may be named as late
        return "" if silent and not outcome.hung else f"false alarm in {cell}: {told}"
    absent = cell.mistake in ("missing", "unstarted")
    if absent and cell.collective in WAITS_FOR_NOBODY and silent:
        return ""
    if absent and is_missed(outcome.said):
        return ""
    if outcome.hung or silent:
        return f"{'hangs' if outcome.hung else 'silent'}: {cell}: {told}"
    errors = " ".join((*outcome.results, REPORT.sub("", outcome.said)))
    return "" if is_named(errors) else f"not named: {cell}: {told}"


def check(found: dict[int, Outcome]) -> None:
    """Fail with all that is wrong with some cells."""
    fail_if_any([judge(number, outcome) for number, outcome in found.items()])


def fail_if_any(wrong: list[str]) -> None:
    """Fail with these sentences in full, which ``assert`` would cut."""
    if any(wrong):
        pytest.fail("\n".join(filter(None, wrong)), pytrace=False)


def run_cells(folder: Path, numbers: list[int], ranks: int, per_node: int = 0) -> dict[int, Outcome]:
    """Run cells in as many jobs as they need, several at a time, as ranks mostly wait."""
    found: dict[int, Outcome] = {}

    def run_jobs(folder: Path) -> None:
        folder.mkdir()
        while len(list(folder.parent.glob("*.taken"))) < len(numbers):
            found.update(run_job(folder, numbers, ranks, per_node))

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(run_jobs, [folder / f"job {k}" for k in range(JOBS)]))
    return {number: found[number] for number in numbers}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Outcome]:
    """The cells of all chosen collectives on three ranks."""
    items = [each for each in request.session.items if each.path == request.path]
    chosen = {each.callspec.params.get("collective") for each in items if hasattr(each, "callspec")}
    numbers = [k for k, cell in enumerate(all_cells()) if cell.collective in chosen]
    return run_cells(tmp_path_factory.mktemp("cells"), numbers, 3)


@pytest.mark.slow
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_every_mistake_is_named_and_legal_calls_pass(outcomes: dict[int, Outcome], collective: str) -> None:
    numbers = [k for k, cell in enumerate(all_cells()) if cell.collective == collective]
    check({number: outcomes[number] for number in numbers})


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "step"), [(2, 23), (4, 29)])
def test_the_same_on_other_numbers_of_ranks(tmp_path: Path, ranks: int, step: int) -> None:
    found = run_cells(tmp_path, list(range(0, len(all_cells()), step)), ranks)
    check(found)


def is_compared_between_nodes(cell: Cell) -> bool:
    """Whether a call sends messages there, as registered memory does not, and all ranks can know of the mistake."""
    return cell.path != "shared" and cell.mistake not in ("missing", "unstarted") and cell.collective != "empty"


def must_raise_everywhere(cell: Cell) -> bool:
    """Whether every rank raises; a blocking call in place of a non-blocking one is seen on its own node only."""
    return not cell.legal and not (cell.collective.startswith("I") and cell.mistake == "collective")


@pytest.mark.slow
def test_on_two_nodes_every_rank_raises_the_error_if_all_calls_are_compared(tmp_path: Path) -> None:
    cells = all_cells()
    numbers = [k for k, cell in enumerate(cells) if is_compared_between_nodes(cell)][::7]
    found = run_cells(tmp_path, numbers, 4, 2)
    wrong = [judge(number, outcome) for number, outcome in found.items()]
    wrong += [
        f"not on all ranks: {cells[number]}: {outcome.results}"
        for number, outcome in found.items()
        if must_raise_everywhere(cells[number]) and not (outcome.results and all(map(is_named, outcome.results)))
    ]
    fail_if_any(wrong)
