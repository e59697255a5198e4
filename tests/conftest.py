"""MPI tests run in lock-step, at several world sizes; ``--quick`` runs a cut through all tables."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _pytest.runner import runtestprotocol

pytest_plugins = ["hpccomm.testing.lockstep"]

os.environ.setdefault("HPCCOMM_COMPILE", "wait")  # what runs must not depend on what was compiled before
os.environ.setdefault("HPCCOMM_GUARD", "off")  # nor on what was fast before

with suppress(ImportError):  # a bare machine with a device runs the tests that need no examples
    from hypothesis import settings

    settings.register_profile("no deadline", deadline=None)  # an example may take long on a loaded machine
    settings.load_profile("no deadline")

SERIAL_ROWS, MPI_ROWS = 3, 1
"""Rows of one parametrised test that ``--quick`` runs: of a serial test, and of an MPI test at each world size."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line flag."""
    parser.addoption("--quick", action="store_true", help="a few rows of each table and of a file's slow tests")
    parser.addoption("--share", metavar="FOLDER", help="leave out what another pytest with this folder has taken")
    parser.addoption("--backwards", action="store_true", help="begin with the last file or world size")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Reduce every table, after ``-k`` and ``-m``, to a few rows; share the rest with other processes."""
    if config.getoption("--quick"):
        reduce_tables(config, items)
    if config.getoption("--backwards"):
        order = {group: place for place, group in enumerate(dict.fromkeys(map(group_of, items)))}
        items.sort(key=lambda item: -order[group_of(item)])
    if config.getoption("--share"):
        config.pluginmanager.register(Share(Path(config.getoption("--share"))))


def reduce_tables(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a few rows of every table."""
    tables: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        tables.setdefault(table_of(item), []).append(item)
    chosen = {item for (_, size), rows in tables.items() for item in choose_rows(rows, size)}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


class Share:
    """Leaves a group of tests to another process that has taken it: the file of a serial test, or a world size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mine: dict[str, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Say that a test of another process is done."""
        group = group_of(item)
        if group not in self.mine:
            self.mine[group] = self.take(group)
        return None if self.mine[group] else True

    def take(self, group: str) -> bool:
        """Take a group; whether no other process has taken it before."""
        with suppress(FileExistsError):
            (self.folder / group).touch(exist_ok=False)
            return True
        return False


def group_of(item: pytest.Item) -> str:
    """The tests that one process runs together."""
    from hpccomm.testing.lockstep import size_of  # pytest must load a plug-in before anybody imports it

    return f"{size_of(item)} ranks" if size_of(item) else item.path.name


def pytest_collection_finish() -> None:
    """What was imported for the tests is no garbage: collections need not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a serial test again if Open MPI has refused one of its launches, before any rank ran."""
    from hpccomm.testing.jobs import REFUSED
    from hpccomm.testing.lockstep import size_of  # pytest must load a plug-in before anybody imports it

    if size_of(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    texts = [report.longreprtext + "".join(text for _, text in report.sections) for report in reports if report.failed]
    if any(REFUSED in text for text in texts):
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


THREAD_SECONDS = 10.0
"""How long threads of a test may take to complete their calls after it."""
_left_running: set[tuple[int, int]] = set()
"""The communicator and the begin of calls that a test before has left running."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A serial test leaves no call running: the watchdog would report it in later tests."""
    from hpccomm.testing.lockstep import size_of  # pytest must load a plug-in before anybody imports it

    recorders = sys.modules.get("hpccomm.observe.flight_recorder")
    if recorders is None or size_of(item):
        return
    ring = recorders.recorder().ring
    until = time.monotonic() + THREAD_SECONDS
    while ((ring.table["end"] == 0) & (ring.table["comm"] != 0)).any():  # a hundredth of the time of running()
        left = {(each.comm, each.begin): each for each in ring.running()}
        new = [str(each) for key, each in left.items() if key not in _left_running]
        if not new or time.monotonic() > until:
            _left_running.update(left)
            assert not new, f"calls that this test has left running: {new}"
            return
        time.sleep(0.01)


def table_of(item: pytest.Item) -> tuple[str, int]:
    """The test with its world size; all tests of a file that are marked slow are one table."""
    from hpccomm.testing.lockstep import size_of  # pytest must load a plug-in before anybody imports it

    slow = item.get_closest_marker("slow")
    return (str(item.path) if slow else item.nodeid.partition("[")[0]), size_of(item)


def choose_rows(rows: list[pytest.Item], size: int) -> list[pytest.Item]:
    """Rows at equal distances, others at another world size."""
    if rows[0].get_closest_marker("slow"):
        return choose_slow(rows)
    step = -(-len(rows) // (MPI_ROWS if size else SERIAL_ROWS))
    return rows[size % step :: step]


def choose_slow(rows: list[pytest.Item]) -> list[pytest.Item]:
    """The slow rows of a file that ``--quick`` runs: the largest ``keep``, one of each test before a second of any."""
    keeps = {row: row.get_closest_marker("slow").kwargs.get("keep", 0) for row in rows}
    seen: Counter[str] = Counter()
    turns: dict[pytest.Item, int] = {}
    for row in (each for each in rows if keeps[each]):
        name = row.nodeid.partition("[")[0]
        seen[name] += 1
        turns[row] = seen[name]
    return sorted(turns, key=turns.__getitem__)[: max(keeps.values())]


@pytest.fixture
def empty_arrays_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's uninitialised arrays of floating point hold NaN, so that reading one before writing it shows."""

    def fill(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_filled(*args: Any, **named: Any) -> Any:
            made = make(*args, **named)
            if made.dtype.kind == "f":
                made.fill(np.nan)
            return made

        return make_filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(np, name, fill(getattr(np, name)))
