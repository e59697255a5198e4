"""A pytest plug-in: ``pytest`` alone runs every MPI test under one launcher call a world size, in lock-step.

Put ``pytest_plugins = ["hpccomm.testing.lockstep"]`` into ``conftest.py``, mark tests with ``@pytest.mark.mpi`` (or
``@pytest.mark.mpi(sizes=(2, 4))``) and let them take the fixture ``comm``.  A test becomes one item a size.  The outer
pytest starts the ranks; each is a pytest of its own that runs the same tests in the same order, waits for the others
after each, and writes its reports to a file.  A test that makes no progress, or that takes a rank down, fails with the
stack of every rank, and the tests after it run in a new launch.  ``mpirun -n 4 python -m pytest --with-mpi`` works too.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SIZES = (1, 2, 3, 4, 7)
START_SECONDS = 120.0
"""Grace for a launch to begin its first test."""
AFTER_FAILURE_SECONDS = 10.0
"""How long the others may take once a rank has failed a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The plug-in's flags."""
    group = parser.getgroup("mpi in lock-step")
    group.addoption("--mpi-sizes", default="", help="world sizes to run, e.g. 2,4 (default: what each test says)")
    group.addoption("--mpi-timeout", type=float, default=90.0, help="seconds an MPI test may take (90)")
    group.addoption("--mpi-worker", default="", help="for the plug-in's own use: the folder of this rank's reports")


def pytest_configure(config: pytest.Config) -> None:
    """Decide which of the three we are: outer, worker, or started by the user under a launcher."""
    config.addinivalue_line("markers", "mpi(sizes=(1, 2, 3, 4, 7), min_size=1): runs on that many ranks")
    if config.getoption("--mpi-worker"):
        config.pluginmanager.register(Worker(Path(config.getoption("--mpi-worker"))), "lockstep-worker")
    elif not config.getoption("--with-mpi", False):
        config.pluginmanager.register(Outer(config), "lockstep-outer")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item a world size."""
    mark = metafunc.definition.get_closest_marker("mpi")
    if mark is None:
        return
    sizes = mark.kwargs.get("sizes", SIZES)
    wanted = [int(n) for n in metafunc.config.getoption("--mpi-sizes").split(",") if n]
    if wanted:
        sizes = [n for n in wanted if "sizes" not in mark.kwargs or n in sizes]
    here = world_size(metafunc.config)
    if here:
        sizes = [here] if "sizes" not in mark.kwargs or here in sizes else []
    sizes = [n for n in sizes if n >= mark.kwargs.get("min_size", 1)]
    metafunc.fixturenames.append("ranks")
    metafunc.parametrize("ranks", sizes, ids=[f"p{n}" for n in sizes])


def world_size(config: pytest.Config) -> int:
    """How many ranks run this pytest in lock-step; 0 for the outer one."""
    if not config.getoption("--with-mpi", False):
        return 0
    from mpi4py import MPI

    return int(MPI.COMM_WORLD.size)


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A communicator of all ranks for this test alone."""
    from mpi4py import MPI

    import hpccomm

    made = hpccomm.Communicator(MPI.COMM_WORLD).Dup()
    yield made
    report = getattr(request.node, "lockstep_call", None)
    if MPI.COMM_WORLD.allreduce(report is not None and report.failed, MPI.LOR):
        return  # a rank that failed may have left messages behind: this communicator is not safe to free
    made.Free()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    """Let the fixture see how the test went."""
    outcome = yield
    if call.when == "call":
        item.lockstep_call = outcome.get_result()  # type: ignore[attr-defined]


class Worker:
    """One rank of a launch."""

    def __init__(self, folder: Path) -> None:
        from mpi4py import MPI

        self.agree = MPI.COMM_WORLD.Dup()
        self.lines = (folder / f"rank{self.agree.rank}").open("a", buffering=1)
        self.stacks = (folder / f"stack{self.agree.rank}").open("w")
        faulthandler.register(signal.SIGUSR1, file=self.stacks, all_threads=True)
        faulthandler.enable(file=self.stacks)
        self.write(pid=os.getpid())

    def write(self, **words: Any) -> None:
        """A line for the outer pytest."""
        self.lines.write(json.dumps(words) + "\n")

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Run the test, then wait for the others."""
        self.write(begin=item.nodeid)
        yield
        self.write(end=item.nodeid)
        self.agree.Barrier()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """What happened in one phase."""
        skip = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
        text = skip or (report.longreprtext if report.failed else "")
        self.write(node=report.nodeid, when=report.when, outcome=report.outcome, text=text, seconds=report.duration)


class Outer:
    """The pytest that people start."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.launches: dict[int, Launch] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Serial tests first, then one world size after the other."""
        items.sort(key=lambda item: ranks_of(item) or 0)

    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Know all tests of each size before the first one runs."""
        for item in session.items:
            size = ranks_of(item)
            if size:
                self.launches.setdefault(size, Launch(size, self.config)).nodes.append(item.nodeid)

    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """An MPI test's result comes from its launch."""
        size = ranks_of(item)
        if not size:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        outcome, text, seconds = self.launches[size].result(item.nodeid)
        longrepr: Any = text or None
        if outcome == "skipped":
            longrepr = (str(item.path), (item.location[1] or 0) + 1, text)
        report = pytest.TestReport(
            item.nodeid, item.location, {name: 1 for name in item.keywords}, outcome, longrepr, "call", duration=seconds
        )
        item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        """End what still runs (after ``-x``)."""
        for launch in self.launches.values():
            launch.end()


def ranks_of(item: pytest.Item) -> int | None:
    """The world size of an MPI test."""
    callspec = getattr(item, "callspec", None)
    if item.get_closest_marker("mpi") is None or callspec is None:
        return None
    size: int | None = callspec.params.get("ranks")
    return size


Result = tuple[Any, str, float]


class Launch:
    """All tests of one world size, started again after a test that ended the ranks."""

    def __init__(self, size: int, config: pytest.Config) -> None:
        self.size, self.config = size, config
        self.nodes: list[str] = []
        self.patience: float = config.getoption("--mpi-timeout")
        self.process: subprocess.Popen[bytes] | None = None
        self.folder = Path()
        self.log = Path()

    def start(self, first: str) -> None:
        """Launch the tests from ``first`` on."""
        self.folder = Path(tempfile.mkdtemp(prefix="hpccomm-tests-"))
        self.log = self.folder / "log"
        remaining = self.nodes[self.nodes.index(first) :]
        (self.folder / "nodes").write_text("\n".join(remaining))
        options = ["--with-mpi", "-p", "no:cacheprovider", "-q", "--no-header", "--tb=short", "--color=no"]
        worker = ["-m", "pytest", *options, f"--mpi-worker={self.folder}", f"@{self.folder / 'nodes'}"]
        command, env = self.command(worker)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env,
                cwd=self.config.invocation_params.dir, start_new_session=True,
            )

    def command(self, worker: list[str]) -> tuple[list[str], dict[str, str]]:
        """How ranks are started here: ``HPCCOMM_TEST_LAUNCHER="srun -n {n}"`` or the right launcher."""
        from hpccomm.launcher import launch_command, python_command

        chosen = os.environ.get("HPCCOMM_TEST_LAUNCHER")
        if chosen:
            return [*shlex.split(chosen.format(n=self.size)), *python_command(worker)], dict(os.environ)
        return launch_command(self.size, worker)

    def result(self, node: str) -> Result:
        """Wait until every rank has run a test, or something ended it."""
        if self.process is None:
            self.start(node)
        began = self.touched = time.monotonic()
        seen = -1
        while True:
            ranks = self.read()
            lines = sum(len(rank) for rank in ranks)
            if lines != seen:
                seen, self.touched = lines, time.monotonic()
            ended = [self.ended(rank, node) for rank in ranks]
            if len(ranks) == self.size and all(ended):
                return self.merged(node, ranks)
            reason = self.hopeless(node, ranks, ended, began)
            if reason:
                return self.give_up(node, ranks, reason)
            time.sleep(0.01)

    def hopeless(self, node: str, ranks: list[Any], ended: list[bool], began: float) -> str:
        """Why this test will not end by itself."""
        assert self.process is not None
        begun = any(line.get("begin") for rank in ranks for line in rank)
        quiet = time.monotonic() - self.touched
        failed = any(line.get("node") == node and line.get("outcome") == "failed" for rank in ranks for line in rank)
        if self.process.poll() is not None:
            return f"the ranks ended with status {self.process.returncode}"
        if failed and quiet > AFTER_FAILURE_SECONDS:
            return "a rank failed and the others wait for it"
        if begun and quiet > self.patience:
            return f"no progress for {self.patience:.0f} s"
        if not begun and time.monotonic() - began > START_SECONDS:
            return f"the ranks did not start within {START_SECONDS:.0f} s"
        return ""

    def give_up(self, node: str, ranks: list[Any], reason: str) -> Result:
        """End this launch and say where every rank stood; the next test starts another one."""
        pids = [line["pid"] for rank in ranks for line in rank if "pid" in line]
        if self.process is not None and self.process.poll() is None:
            for pid in pids:
                try_signal(pid, signal.SIGUSR1)
            time.sleep(1.0)
        self.end()
        parts = [f"{reason}"]
        for rank, lines in enumerate(self.read()):
            parts += [f"--- rank {rank} ---", *(line["text"] for line in lines if line.get("node") == node and line["text"])]
            stack = self.folder / f"stack{rank}"
            parts.append(stack.read_text() if stack.exists() else "")
        log = self.log.read_text(errors="replace")
        parts += ["--- output ---", log[-4000:]]
        self.process = None
        return "failed", "\n".join(parts), time.monotonic() - self.touched

    def end(self) -> None:
        """End the processes of this launch."""
        if self.process is not None and self.process.poll() is None:
            try_signal(-self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                try_signal(-self.process.pid, signal.SIGKILL)
                self.process.wait()

    def read(self) -> list[list[dict[str, Any]]]:
        """The lines that each rank has written so far."""
        found = []
        for rank in range(self.size):
            path = self.folder / f"rank{rank}"
            lines = path.read_text().split("\n")[:-1] if path.exists() else []
            found.append([json.loads(line) for line in lines])
        return found

    def ended(self, rank: list[dict[str, Any]], node: str) -> bool:
        """Whether a rank is through with a test."""
        return any(line.get("end") == node for line in rank)

    def merged(self, node: str, ranks: list[list[dict[str, Any]]]) -> Result:
        """One result of all ranks' reports."""
        reports = [(k, line) for k, rank in enumerate(ranks) for line in rank if line.get("node") == node]
        seconds = max((line["seconds"] for _, line in reports), default=0.0)
        failed = [f"--- rank {k} of {self.size} ({line['when']}) ---\n{line['text']}" for k, line in reports if line["outcome"] == "failed"]
        if failed:
            return "failed", "\n".join(failed), seconds
        skipped = [line["text"] for _, line in reports if line["outcome"] == "skipped"]
        return ("skipped", skipped[0], seconds) if skipped else ("passed", "", seconds)


def try_signal(pid: int, number: int) -> None:
    """Signal a process (or, negative, its group) that we started, if it is still there."""
    try:
        os.killpg(-pid, number) if pid < 0 else os.kill(pid, number)
    except ProcessLookupError:
        pass
