"""A pytest plug-in: ``pytest`` alone runs every MPI test at several world sizes, all ranks in lock-step.

Put ``pytest_plugins = ["hpccomm.testing.lockstep"]`` into ``conftest.py``, mark a test and let it take ``comm``::

    @pytest.mark.mpi                                     # on 1, 2, 3, 4 and 7 ranks: one test result each
    def test_everybody_counts(comm): ...

    @pytest.mark.mpi(sizes=(2, 4), timeout=300)          # or: min_size=2
    def test_pairs(comm): ...

Three kinds of pytest use this file.  The *outer* one, which people start, runs the serial tests itself and then
starts one job a world size.  Each rank of that job is a *worker*: it runs the same tests in the same order, waits for
the others after each test, and writes its reports to a file which the outer one reads (:mod:`hpccomm.testing.jobs`).
A test that hangs, or takes a rank down, fails with the stack of every rank, and a new job runs the tests that are
left.  Under ``mpirun -n 4 python -m pytest --with-mpi`` the ranks go *together*, and rank 0 reports for all.

``HPCCOMM_TEST_LAUNCHER="srun -n {n}"`` starts the jobs another way; ranks on several nodes need a ``TMPDIR`` that all
nodes see.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal

import pytest
from _pytest.runner import runtestprotocol

from hpccomm.errors import LaunchError
from hpccomm.launcher import check_world
from hpccomm.testing.agree import use_mpi_profile
from hpccomm.testing.jobs import Job, strip_addresses

DEFAULT_SIZES = (1, 2, 3, 4, 7)
PHASES = ("setup", "call", "teardown")
SEVERITY = {"skipped": 0, "passed": 1, "xfailed": 2, "failed": 3}

RESTRICTED = pytest.StashKey[bool]()
SIZES = pytest.StashKey[tuple[int, ...]]()
TEST_COMMS = pytest.StashKey[list[Any]]()


# Options, marks, the fixture


def pytest_addoption(parser: pytest.Parser) -> None:
    """The flags."""
    group = parser.getgroup("lockstep", "MPI tests in lock-step")
    group.addoption("--mpi-sizes", metavar="2,4", default="", help="run MPI tests at these world sizes only")
    group.addoption("--mpi-timeout", metavar="SECONDS", type=float, default=90.0, help="for one MPI test (90)")
    group.addoption("--mpi-worker", metavar="FOLDER", default="", help="(used by this plug-in to start its ranks)")
    if find_spec("pytest_mpi") is None:  # which brings this one
        group.addoption("--with-mpi", action="store_true", default=False, help="Run MPI tests, under mpirun.")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Find out which kind of pytest this is."""
    config.addinivalue_line(
        "markers", "mpi(sizes, min_size, timeout): runs on 1, 2, 3, 4 and 7 ranks, or on the sizes named"
    )
    config.addinivalue_line("markers", "mpi_skip: not to be run under MPI")
    asked = tuple(int(size) for size in config.getoption("--mpi-sizes").split(",") if size)
    config.stash[TEST_COMMS] = []
    folder = config.getoption("--mpi-worker")
    inside = is_under_mpi(config)
    config.stash[SIZES] = (world().size,) if inside else asked or DEFAULT_SIZES
    config.stash[RESTRICTED] = bool(inside or asked)
    if not inside:
        config.pluginmanager.register(Coordinator(config), "lockstep-outer")
        return
    use_mpi_profile()
    config.pluginmanager.register(Worker(config, Path(folder)) if folder else StandaloneRank(config), "lockstep-ranks")


def is_under_mpi(config: pytest.Config) -> bool:
    """Whether this pytest is one of several ranks."""
    return bool(config.getoption("--with-mpi", False) or config.getoption("--mpi-worker"))


def world() -> Any:
    """COMM_WORLD, as large as the launcher meant it."""
    from mpi4py import MPI

    try:
        check_world(MPI.COMM_WORLD.size, os.environ)
    except LaunchError as error:
        raise pytest.UsageError(str(error)) from error
    return MPI.COMM_WORLD


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """An MPI test is one item a world size: ``test_pairs[p2]``."""
    mark = metafunc.definition.get_closest_marker("mpi")
    if mark is None:
        return
    least = mark.kwargs.get("min_size", 1)
    sizes = mark.kwargs.get("sizes", metafunc.config.stash[SIZES])
    sizes = [size for size in sizes if size >= least] or [least]
    if "ranks" not in metafunc.fixturenames:
        metafunc.fixturenames.append("ranks")
    metafunc.parametrize("ranks", sizes, ids=[f"p{size}" for size in sizes])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Serial tests first, then one world size after the other, without the sizes that were not asked for."""
    kept = [item for item in items if not is_excluded(item, config)]
    config.hook.pytest_deselected(items=[item for item in items if is_excluded(item, config)])
    items[:] = sorted(kept, key=size_of)


def is_excluded(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether an MPI test is for another world size than those asked for."""
    return config.stash[RESTRICTED] and size_of(item) not in (0, *config.stash[SIZES])


def size_of(item: pytest.Item) -> int:
    """How many ranks a test runs on; 0 for a serial test."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return int(params["ranks"]) if "ranks" in params and item.get_closest_marker("mpi") else 0


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Any:
    """A communicator of all ranks that no other test uses; freed when all ranks are through with the test."""
    if not (is_under_mpi(request.config) or size_of(request.node)):
        pytest.fail("a test that takes comm needs @pytest.mark.mpi, or it would only ever see one rank", pytrace=False)
    from hpccomm import Communicator

    made = Communicator(world()).Dup()
    request.config.stash[TEST_COMMS].append(made)
    return made


# On the ranks


class Ranks:
    """What the two kinds of pytest on ranks share: nobody begins a test before all have finished the one before."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.private = world().Dup()

    def any_flag(self, flag: bool) -> bool:
        """Wait for the others without burning their cores; whether anybody came with a flag."""
        from mpi4py import MPI

        mine, any_of_all = array("i", [flag]), array("i", [0])
        request = self.private.Iallreduce(mine, any_of_all, MPI.MAX)
        while not request.Test():
            time.sleep(0.0005)
        return bool(any_of_all[0])

    def settle(self, failed: bool) -> None:
        """All ranks are through: free what they used, unless somebody failed and may have left messages behind."""
        fresh = self.config.stash[TEST_COMMS]
        if not self.any_flag(failed):
            for communicator in fresh:
                communicator.Free()
        fresh.clear()


class Worker(Ranks):
    """A rank of a job that an outer pytest started and watches."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        super().__init__(config)
        self.tests: list[str] = json.loads((folder / "tests.json").read_text())
        self.lines = os.open(folder / f"rank-{self.private.rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.stack: IO[str] = (folder / f"rank-{self.private.rank}.stack").open("w")
        faulthandler.enable(self.stack)
        faulthandler.register(signal.SIGUSR1, self.stack, all_threads=True)
        self.failed = False

    def write(self, **words: Any) -> None:
        """Tell the outer pytest."""
        os.write(self.lines, (json.dumps(words, default=str) + "\n").encode())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """The tests of the list, in its order."""
        if session.testsfailed:  # pytest is about to say what it could not collect
            return
        named = {item.nodeid: item for item in items}
        items[:] = [named[test] for test in self.tests]
        self.write(ready=len(items))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run a test, then wait for the others."""
        self.failed = False
        self.write(begin=item.nodeid)
        result = yield
        self.settle(self.failed)
        self.write(end=item.nodeid)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Pass on what happened, at once: this rank may not come much further."""
        self.failed |= report.failed
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.write(test=report.nodeid, report=data)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Failed tests are reported: the job itself has done well."""
        if exitstatus == pytest.ExitCode.TESTS_FAILED:
            session.exitstatus = pytest.ExitCode.OK


class StandaloneRank(Ranks):
    """A rank that the user started: all ranks know every result, and rank 0 prints it."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config)
        self.stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        if self.private.rank:
            config.option.xmlpath = None
            config.pluginmanager.set_blocked("terminalreporter")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run a test, wait for the others, and report what happened to all."""
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        end = self.start_timeout(item)
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        self.settle(any(report.failed for report in reports))
        everyone = self.private.allgather(
            [hook.pytest_report_to_serializable(config=self.config, report=report) for report in reports]
        )
        end()
        for report in merge_reports(restore_reports(self.config, everyone)):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self) -> None:
        """Nobody leaves before rank 0 has printed: a rank that leaves with an error takes the others along."""
        self.any_flag(False)

    def start_timeout(self, item: pytest.Item) -> Callable[[], None]:
        """After the time-out dump this rank's stack, and soon after it end the job; returns what calls that off."""
        seconds = timeout_of(item)
        faulthandler.dump_traceback_later(seconds, file=self.stderr)
        timer = threading.Timer(seconds + 2, os._exit, [1])
        timer.daemon = True
        timer.start()

        def call_off() -> None:
            faulthandler.cancel_dump_traceback_later()
            timer.cancel()

        return call_off


def timeout_of(item: pytest.Item) -> float:
    """How long a test may take, in seconds."""
    mark = item.get_closest_marker("mpi")
    seconds = mark.kwargs.get("timeout") if mark else None
    return float(item.config.getoption("--mpi-timeout") if seconds is None else seconds)


# Outside


class Coordinator:
    """The pytest that people start."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.job: Job | None = None
        self.start_failures: dict[int, str] = {}
        """World sizes of which no job begins, and why."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """A serial test is pytest's business; an MPI test's result comes from its job."""
        if not size_of(item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """One report a phase, for all ranks."""
        if size_of(item) in self.start_failures:
            return [failure_report(item, [(self.start_failures[size_of(item)], "")])]
        job = self.job = self.job or self.start(item)
        wrong = job.wait(item.nodeid, timeout_of(item))
        if wrong:
            return self.give_up(item, job, wrong)
        reports = merge_reports(self.reports_of(job, item.nodeid))
        if item.nodeid == job.tests[-1]:
            self.job = None
            wrong = job.finish()  # the next one has the cores for itself
            reports += [failure_report(item, [(wrong, job.output_tail())], "teardown")] if wrong else []
            job.close()
        return reports

    def start(self, item: pytest.Item) -> Job:
        """A job for this test and all later ones of its size."""
        items = item.session.items[item.session.items.index(item) :]
        items = [later for later in items if size_of(later) == size_of(item)]
        files = list(dict.fromkeys(str(later.path) for later in items))
        program = ["-m", "pytest", *files, *inner_options(self.config), "--mpi-worker"]
        show = self.config.getoption("capture") == "no"
        tests = [later.nodeid for later in items]
        return Job(size_of(item), tests, program, self.config.invocation_params.dir, show)

    def give_up(self, item: pytest.Item, job: Job, wrong: str) -> list[pytest.TestReport]:
        """End a job that gets no further and say all that is known; the next test starts another job."""
        self.job = None
        ready = job.all_ready()
        parts = [*tracebacks(self.reports_of(job, item.nodeid)), (wrong, "")]
        parts += group_texts(job.dump_stacks(item.nodeid), job.size) if ready else []
        parts.append(("end of the output", job.output_tail()))
        if not ready:
            self.start_failures[job.size] = f"{wrong}, as told above"
        job.close()
        return [failure_report(item, parts)]

    def reports_of(self, job: Job, test: str) -> list[list[pytest.TestReport]]:
        """What each rank has reported about a test."""
        return restore_reports(self.config, [log.reports.get(test, []) for log in job.logs])

    def pytest_sessionfinish(self) -> None:
        """End what still runs (after ``-x`` or Ctrl-C)."""
        if self.job:
            self.job.close()


def inner_options(config: pytest.Config) -> list[str]:
    """The flags with which a worker's pytest sees the same tests as this one."""
    option = config.option
    words = ["--with-mpi"] if "with_mpi" in option else []
    words += ["-q", "--no-header", "--color=no", "-p", "hpccomm.testing.lockstep", "-p", "no:cacheprovider"]
    words += ["-p", "no:faulthandler", "-o", "addopts=", f"--rootdir={config.rootpath}", f"--tb={option.tbstyle}"]
    words += [f"--import-mode={option.importmode}", f"--capture={option.capture}"]
    words += ["-c", str(config.inipath)] if config.inipath else []
    for flag, values in (("-p", option.plugins), ("-W", option.pythonwarnings), ("-o", option.override_ini)):
        for value in values or ():
            words += [flag, value]
    return words + ["-v"] * max(0, option.verbose) + ["--showlocals"] * option.showlocals


# Reports of several ranks


Part = tuple[str, Any]
"""A title, and a text or what pytest made of a failure."""


class Tracebacks:
    """What pytest prints under a failed test: one part for each group of ranks."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        title, first = parts[0]
        crash = getattr(first, "reprcrash", None)
        self.reprcrash = SimpleNamespace(message=f"{title}: {crash.message}" if crash else title)

    def toterminal(self, tw: Any) -> None:
        """Print everything."""
        for title, part in self.parts:
            tw.line(f"--- {title} ---", bold=True, red=True)
            if hasattr(part, "toterminal"):
                part.toterminal(tw)
            elif part:
                tw.line(part)

    def __str__(self) -> str:
        return "\n".join(f"--- {title} ---\n{part}" for title, part in self.parts)


def restore_reports(
    config: pytest.Config, everyone: Sequence[Sequence[dict[str, Any]]]
) -> list[list[pytest.TestReport]]:
    """The reports that ranks have written."""
    back = config.hook.pytest_report_from_serializable
    everyones = [[back(config=config, data=data) for data in reports] for reports in everyone]
    for report in chain(*everyones):
        if isinstance(report.longrepr, list):  # JSON knows no tuples: where and why a test was skipped
            report.longrepr = tuple(report.longrepr)
    return everyones


def merge_reports(everyone: list[list[pytest.TestReport]]) -> list[pytest.TestReport]:
    """One report a phase for all ranks; no call where somebody's setup failed or skipped."""
    done: list[pytest.TestReport] = []
    for when in PHASES:
        if when == "call" and not all(report.passed for report in done):
            continue
        columns = [[report for report in reports if report.when == when] for reports in everyone]
        for k in range(max(map(len, columns), default=0)):
            done.append(
                merge_phase({rank: column[k] for rank, column in enumerate(columns) if k < len(column)}, len(columns))
            )
    return done


def merge_phase(reports: dict[int, pytest.TestReport], size: int) -> pytest.TestReport:
    """A phase fails where it fails on any rank, and passes where it fails on none and passes on any."""
    worst = max(reports.values(), key=severity)
    worst.duration = max(report.duration for report in reports.values())
    if size > 1:
        worst.sections = [(f"rank {r}: {title}", text) for r in reports for title, text in reports[r].sections]
        if worst.failed:
            longrepr: Any = Tracebacks(tracebacks([[reports[r]] if r in reports else [] for r in range(size)]))
            worst.longrepr = longrepr
    return worst


def severity(report: pytest.TestReport) -> int:
    """Which of two outcomes speaks for both."""
    return SEVERITY["xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome]


def tracebacks(everyone: list[list[pytest.TestReport]]) -> list[Part]:
    """The failures, told once where ranks fail alike."""
    failures = [(rank, report) for rank, reports in enumerate(everyone) for report in reports if report.failed]
    return [
        (name_ranks([failures[k][0] for k in alike], len(everyone)), failures[alike[0]][1].longrepr)
        for alike in equal_groups([strip_addresses(report.longreprtext) for _, report in failures])
    ]


def group_texts(texts: list[str], size: int) -> list[Part]:
    """A text of each rank, told once where they are alike."""
    return [(name_ranks(alike, size), texts[alike[0]]) for alike in equal_groups(texts)]


def equal_groups(texts: Sequence[str]) -> list[list[int]]:
    """Which of them are equal, in order of the first."""
    return [[k for k, each in enumerate(texts) if each == text] for text in dict.fromkeys(texts)]


def name_ranks(ranks: Sequence[int], size: int) -> str:
    """``rank 1 of 4``, ``ranks 0, 2 of 4``, ``all 4 ranks``."""
    if len(ranks) == size > 1:
        return f"all {size} ranks"
    return f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))} of {size}"


def failure_report(
    item: pytest.Item, parts: list[Part], when: Literal["call", "teardown"] = "call"
) -> pytest.TestReport:
    """The report of a test, or of a job after its last test, that could not end well by itself."""
    longrepr: Any = Tracebacks(parts)
    keywords: dict[str, Any] = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, "failed", longrepr, when)
