"""A pytest plug-in: ``pytest`` without a launcher runs every MPI test at several world sizes, all ranks in lock-step.

Put ``pytest_plugins = ["hpccomm.testing.lockstep"]`` into ``conftest.py``, mark a test and request ``comm``::

    @pytest.mark.mpi                                     # on 1, 2, 3, 4 and 7 ranks: one test result each
    def test_everybody_counts(comm): ...

    @pytest.mark.mpi(sizes=(2, 4), timeout=300)          # or: min_size=2
    def test_pairs(comm): ...

Three kinds of pytest process use this file.  The *coordinator*, which the user starts, runs the serial tests and then
starts one job for each world size.  Each rank of that job is a *worker*: it runs the same tests in the same order,
waits for the other ranks after each test, and writes its reports to a log file that the coordinator reads
(:mod:`hpccomm.testing.jobs`).  A test that hangs or kills a rank fails with the stack of every rank, and a new job
runs the remaining tests.  Under ``mpirun -n 4 python -m pytest --with-mpi`` each rank is a *standalone rank*, and
rank 0 reports for all ranks.

``HPCCOMM_TEST_LAUNCHER="srun -n {n}"`` replaces the launcher; ranks on several nodes need a ``TMPDIR`` that all nodes
share.
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
from types import FunctionType, SimpleNamespace
from typing import IO, Any, Literal

import pytest
from _pytest.runner import runtestprotocol

from hpccomm.errors import LaunchError
from hpccomm.launcher import check_world
from hpccomm.testing.jobs import Job, strip_addresses

DEFAULT_SIZES = (1, 2, 3, 4, 7)
PHASES = ("setup", "call", "teardown")
SEVERITY = {"skipped": 0, "passed": 1, "xfailed": 2, "failed": 3}

RESTRICTED = pytest.StashKey[bool]()
SIZES = pytest.StashKey[tuple[int, ...]]()
TEST_COMMS = pytest.StashKey[list[Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the command-line flags."""
    group = parser.getgroup("lockstep", "MPI tests in lock-step")
    group.addoption("--mpi-sizes", metavar="2,4", default="", help="run MPI tests at these world sizes only")
    group.addoption("--mpi-timeout", metavar="SECONDS", type=float, default=90.0, help="for one MPI test (90)")
    group.addoption("--mpi-worker", metavar="FOLDER", default="", help="(used by this plug-in to start its ranks)")
    if find_spec("pytest_mpi") is None:  # which brings this one
        group.addoption("--with-mpi", action="store_true", default=False, help="Run MPI tests, under mpirun.")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the part of the plug-in that this kind of pytest process needs."""
    config.addinivalue_line(
        "markers", "mpi(sizes, min_size, timeout): runs on 1, 2, 3, 4 and 7 ranks, or on the given sizes"
    )
    config.addinivalue_line("markers", "mpi_skip: does not run under MPI")
    requested = tuple(int(size) for size in config.getoption("--mpi-sizes").split(",") if size)
    config.stash[TEST_COMMS] = []
    folder = config.getoption("--mpi-worker")
    inside = is_under_mpi(config)
    config.stash[SIZES] = (world().size,) if inside else requested or DEFAULT_SIZES
    config.stash[RESTRICTED] = bool(inside or requested)
    if not inside:
        config.pluginmanager.register(Coordinator(config), "lockstep-coordinator")
        return
    use_mpi_profile()
    config.pluginmanager.register(Worker(config, Path(folder)) if folder else StandaloneRank(config), "lockstep-ranks")


def is_under_mpi(config: pytest.Config) -> bool:
    """Whether this pytest is one of several ranks."""
    return bool(config.getoption("--with-mpi", False) or config.getoption("--mpi-worker"))


def world() -> Any:
    """COMM_WORLD, after a check that it is as large as the launcher was told."""
    from mpi4py import MPI

    try:
        check_world(MPI.COMM_WORLD.size, os.environ)
    except LaunchError as error:
        raise pytest.UsageError(str(error)) from error
    return MPI.COMM_WORLD


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make an MPI test one item for each world size: ``test_pairs[p2]``."""
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
    """Order serial tests first, then one world size after another; deselect sizes that were not requested."""
    kept = [item for item in items if not is_excluded(item, config)]
    config.hook.pytest_deselected(items=[item for item in items if is_excluded(item, config)])
    items[:] = sorted(kept, key=size_of)


def is_excluded(item: pytest.Item, config: pytest.Config) -> bool:
    """Whether an MPI test needs a world size that was not requested."""
    return config.stash[RESTRICTED] and size_of(item) not in (0, *config.stash[SIZES])


def size_of(item: pytest.Item) -> int:
    """How many ranks a test runs on; 0 for a serial test."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return int(params["ranks"]) if "ranks" in params and item.get_closest_marker("mpi") else 0


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Any:
    """A communicator of all ranks that no other test uses; freed after all ranks have finished the test."""
    if not (is_under_mpi(request.config) or size_of(request.node)):
        pytest.fail("a test that takes comm needs @pytest.mark.mpi: without it there is only one rank", pytrace=False)
    from hpccomm import Communicator

    made = Communicator(world()).Dup()
    request.config.stash[TEST_COMMS].append(made)
    return made


class Ranks:
    """Common base of workers and standalone ranks: no rank begins a test before all have finished the previous one."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.private = world().Dup()

    def any_flag(self, flag: bool) -> bool:
        """Reduce a flag over all ranks by logical or; waiting ranks sleep and leave their cores to others."""
        from mpi4py import MPI

        mine, total = array("i", [flag]), array("i", [0])
        request = self.private.Iallreduce(mine, total, MPI.MAX)
        while not request.Test():
            time.sleep(0.0005)
        return bool(total[0])

    def settle(self, failed: bool) -> None:
        """Wait for all ranks and free their communicators, unless a rank failed: then messages may still be pending."""
        comms = self.config.stash[TEST_COMMS]
        if not self.any_flag(failed):
            for communicator in comms:
                communicator.Free()
        comms.clear()


class Worker(Ranks):
    """A rank of a job that the coordinator has started and monitors."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        super().__init__(config)
        self.tests: list[str] = json.loads((folder / "tests.json").read_text())
        self.functions = {test.partition("[")[0].rpartition("::")[2] for test in self.tests}
        self.log = os.open(folder / f"rank-{self.private.rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.stack: IO[str] = (folder / f"rank-{self.private.rank}.stack").open("w")
        faulthandler.enable(self.stack)
        faulthandler.register(signal.SIGUSR1, self.stack, all_threads=True)
        self.failed = False

    def write(self, **entry: Any) -> None:
        """Append a line to the log file."""
        os.write(self.log, (json.dumps(entry, default=str) + "\n").encode())

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, name: str, obj: object) -> list[pytest.Item] | None:
        """Make no items of functions that are not in the job: most files have more rows than a size needs."""
        is_test = name.startswith("test") and isinstance(obj, FunctionType)
        return [] if is_test and name not in self.functions else None

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Select the tests of the job, in its order."""
        if session.testsfailed:  # pytest will report the file that it could not collect
            return
        by_name = {item.nodeid: item for item in items}
        items[:] = [by_name[test] for test in self.tests]
        self.write(ready=len(items))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run a test, then wait for the other ranks."""
        self.failed = False
        self.write(begin=item.nodeid)
        result = yield
        self.settle(self.failed)
        self.write(end=item.nodeid)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the report at once: this rank may die in the next phase."""
        self.failed |= report.failed
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.write(test=report.nodeid, report=data)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Exit with 0 after failed tests: they are reported, and the job itself has succeeded."""
        if exitstatus == pytest.ExitCode.TESTS_FAILED:
            session.exitstatus = pytest.ExitCode.OK


class StandaloneRank(Ranks):
    """A rank that the user started: every rank receives all results, and rank 0 prints them."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config)
        self.stderr = os.fdopen(os.dup(sys.stderr.fileno()), "w")
        if self.private.rank:
            config.option.xmlpath = None
            config.pluginmanager.set_blocked("terminalreporter")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run a test, wait for the other ranks, and report the merged result."""
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        cancel = self.start_timeout(item)
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        self.settle(any(report.failed for report in reports))
        everyone = self.private.allgather(
            [hook.pytest_report_to_serializable(config=self.config, report=report) for report in reports]
        )
        cancel()
        for report in merge_reports(restore_reports(self.config, everyone)):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self) -> None:
        """Wait until rank 0 has printed: the launcher ends all ranks when one exits with an error."""
        self.any_flag(False)

    def start_timeout(self, item: pytest.Item) -> Callable[[], None]:
        """After the time-out dump this rank's stack; 2 s later end the job.  Returns a function that cancels both."""
        seconds = timeout_of(item)
        faulthandler.dump_traceback_later(seconds, file=self.stderr)
        timer = threading.Timer(seconds + 2, os._exit, [1])
        timer.daemon = True
        timer.start()

        def cancel() -> None:
            faulthandler.cancel_dump_traceback_later()
            timer.cancel()

        return cancel


def timeout_of(item: pytest.Item) -> float:
    """The time limit of a test, in seconds."""
    mark = item.get_closest_marker("mpi")
    seconds = mark.kwargs.get("timeout") if mark else None
    return float(item.config.getoption("--mpi-timeout") if seconds is None else seconds)


class Coordinator:
    """The pytest process that the user starts."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.job: Job | None = None
        self.start_failures: dict[int, str] = {}
        """World sizes whose jobs do not start, with the reason."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Leave a serial test to pytest; take the result of an MPI test from its job."""
        if not size_of(item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.reports(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of a test: one for each phase, merged over all ranks."""
        if size_of(item) in self.start_failures:
            return [failure_report(item, [(self.start_failures[size_of(item)], "")])]
        job = self.job = self.job or self.start(item)
        problem = job.wait(item.nodeid, timeout_of(item))
        if problem:
            return self.give_up(item, job, problem)
        reports = merge_reports(self.reports_of(job, item.nodeid))
        if item.nodeid == job.tests[-1]:
            self.job = None
            problem = job.finish()  # before the next job starts, so that jobs do not compete for cores
            reports += [failure_report(item, [(problem, job.output_tail())], "teardown")] if problem else []
            job.close()
        return reports

    def start(self, item: pytest.Item) -> Job:
        """Start a job for this test and all later tests of its size."""
        items = item.session.items[item.session.items.index(item) :]
        items = [later for later in items if size_of(later) == size_of(item)]
        files = list(dict.fromkeys(str(later.path) for later in items))
        program = ["-m", "pytest", *files, *inner_options(self.config), "--mpi-worker"]
        show = self.config.getoption("capture") == "no"
        tests = [later.nodeid for later in items]
        return Job(size_of(item), tests, program, self.config.invocation_params.dir, show)

    def give_up(self, item: pytest.Item, job: Job, problem: str) -> list[pytest.TestReport]:
        """Terminate a job without progress and report its state; the next test starts a new job."""
        self.job = None
        ready = job.all_ready()
        parts = [*tracebacks(self.reports_of(job, item.nodeid)), (problem, "")]
        parts += group_texts(job.dump_stacks(item.nodeid), job.size) if ready else []
        parts.append(("end of the output", job.output_tail()))
        if not ready:
            self.start_failures[job.size] = f"{problem}, as reported above"
        job.close()
        return [failure_report(item, parts)]

    def reports_of(self, job: Job, test: str) -> list[list[pytest.TestReport]]:
        """The reports of each rank for a test."""
        return restore_reports(self.config, [log.reports.get(test, []) for log in job.logs])

    def pytest_sessionfinish(self) -> None:
        """Terminate a job that still runs (after ``-x`` or Ctrl-C)."""
        if self.job:
            self.job.close()


def inner_options(config: pytest.Config) -> list[str]:
    """The flags with which a worker collects the same tests as the coordinator."""
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


Part = tuple[str, Any]
"""A title with a text or pytest's representation of a failure."""


class Tracebacks:
    """The text that pytest prints for a failed test: one part for each group of ranks."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        title, first = parts[0]
        crash = getattr(first, "reprcrash", None)
        self.reprcrash = SimpleNamespace(message=f"{title}: {crash.message}" if crash else title)

    def toterminal(self, tw: Any) -> None:
        """Print all parts."""
        for title, part in self.parts:
            tw.line(f"--- {title} ---", bold=True, red=True)
            if hasattr(part, "toterminal"):
                part.toterminal(tw)
            elif part:
                tw.line(part)

    def __str__(self) -> str:
        return "\n".join(f"--- {title} ---\n{part}" for title, part in self.parts)


def restore_reports(config: pytest.Config, ranks: Sequence[Sequence[dict[str, Any]]]) -> list[list[pytest.TestReport]]:
    """Restore the reports of each rank from their serial form."""
    restore = config.hook.pytest_report_from_serializable
    restored = [[restore(config=config, data=data) for data in reports] for reports in ranks]
    for report in chain(*restored):
        if isinstance(report.longrepr, list):  # JSON knows no tuples: where and why a test was skipped
            report.longrepr = tuple(report.longrepr)
    return restored


def merge_reports(everyone: list[list[pytest.TestReport]]) -> list[pytest.TestReport]:
    """One report for each phase; no call where the setup of any rank failed or was skipped."""
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
    """A phase fails if it fails on any rank, and passes if it fails on none and passes on any."""
    worst = max(reports.values(), key=severity)
    worst.duration = max(report.duration for report in reports.values())
    if size > 1:
        worst.sections = [(f"rank {r}: {title}", text) for r in reports for title, text in reports[r].sections]
        if worst.failed:
            longrepr: Any = Tracebacks(tracebacks([[reports[r]] if r in reports else [] for r in range(size)]))
            worst.longrepr = longrepr
    return worst


def severity(report: pytest.TestReport) -> int:
    """The severity of an outcome: the most severe one over all ranks is the outcome of the test."""
    return SEVERITY["xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome]


def tracebacks(everyone: list[list[pytest.TestReport]]) -> list[Part]:
    """The failures, one part for each group of ranks with equal ones."""
    failures = [(rank, report) for rank, reports in enumerate(everyone) for report in reports if report.failed]
    return [
        (name_ranks([failures[k][0] for k in group], len(everyone)), failures[group[0]][1].longrepr)
        for group in equal_groups([strip_addresses(report.longreprtext) for _, report in failures])
    ]


def group_texts(texts: list[str], size: int) -> list[Part]:
    """The texts of the ranks, one part for each group of ranks with equal ones."""
    return [(name_ranks(group, size), texts[group[0]]) for group in equal_groups(texts)]


def equal_groups(texts: Sequence[str]) -> list[list[int]]:
    """The indices of equal texts, grouped, in order of first appearance."""
    return [[k for k, each in enumerate(texts) if each == text] for text in dict.fromkeys(texts)]


def name_ranks(ranks: Sequence[int], size: int) -> str:
    """``rank 1 of 4``, ``ranks 0, 2 of 4``, ``all 4 ranks``."""
    if len(ranks) == size > 1:
        return f"all {size} ranks"
    return f"rank{'s'[: len(ranks) > 1]} {', '.join(map(str, ranks))} of {size}"


def failure_report(
    item: pytest.Item, parts: list[Part], when: Literal["call", "teardown"] = "call"
) -> pytest.TestReport:
    """A failure report for a test, or for a job after its last test, that produced none itself."""
    longrepr: Any = Tracebacks(parts)
    keywords: dict[str, Any] = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, keywords, "failed", longrepr, when)


def use_mpi_profile() -> None:
    """Make hypothesis draw the same examples on all ranks: no randomness, no example database, no deadline."""
    if find_spec("hypothesis") is None:
        return
    from hypothesis import HealthCheck, settings

    suppressed = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
    settings.register_profile(
        "mpi", derandomize=True, database=None, deadline=None, print_blob=False, suppress_health_check=suppressed
    )
    settings.load_profile("mpi")
