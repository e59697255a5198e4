"""Start ranks from a test and monitor their progress from outside.

A monitored job runs a list of tests in the same order on every rank.  Each rank appends lines of JSON to its own log
file: when it is ready, when it begins a test, the report of each phase, and when all ranks have finished the test.
After a rank has hung or died, the log files show how far each rank came.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpccomm.launcher import clean_environment, launch_command, python_command

START_SECONDS = 120.0
"""Time limit for all ranks of a job to start."""
FAILED_SECONDS = 10.0
"""Time limit for the other ranks after one rank has failed a test: they may wait for a message from it."""
END_SECONDS = 20.0
"""Time limit for a job to end after its last test."""
LAUNCHES, REFUSED = 3, "listener thread failed to start"
"""How often a job is launched, and what Open MPI says if it cannot launch one, which a second launch can (about one
launch in some thousands)."""
OUTPUT_LINES = 50
DUMP_SECONDS = 5.0
"""Time limit for ranks to dump their stacks."""


def start(ranks: int, program: Sequence[str], environ: Mapping[str, str] | None = None, **popen: Any) -> Any:
    """Start a job; ``HPCCOMM_TEST_LAUNCHER="srun -n {n}"`` replaces MPI's own launcher."""
    environ = os.environ if environ is None else environ
    launcher = environ.get("HPCCOMM_TEST_LAUNCHER")
    if launcher:
        command = [*shlex.split(launcher.format(n=ranks)), *python_command(program)]
        env = clean_environment(environ)
    else:
        command, env = launch_command(ranks, program, environ=environ)
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, **popen)


def stop(process: subprocess.Popen[Any]) -> None:
    """Terminate a job; its launcher terminates the ranks."""
    for signal_process in (process.terminate, process.kill):
        if process.poll() is None:
            signal_process()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue


def run_under_mpi(
    ranks: int, *program: str, timeout: float = 120.0, cwd: Path | None = None, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``program`` (``"-c", code`` or ``"-m", module, …`` or a script) on some ranks; return its output as text.

    A launch that Open MPI refuses, before any rank runs, is tried again.  Raises subprocess.TimeoutExpired after
    ``timeout`` seconds, after the ranks were terminated.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for _ in range(LAUNCHES):
        with start(ranks, program, environ, cwd=cwd, **pipes) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout)
            finally:
                stop(process)
        if not (process.returncode and REFUSED in stderr):
            break
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


class RankLog:
    """The log file of one rank, read as it grows."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"rank-{rank}.jsonl"
        self.stack = folder / f"rank-{rank}.stack"
        self.ready = False
        self.finished_tests: set[str] = set()
        self.reports: dict[str, list[dict[str, Any]]] = {}
        self._read = 0

    def listen(self) -> bool:
        """Read the new complete lines; return whether there were any."""
        if not self.path.exists() or self.path.stat().st_size == self._read:
            return False
        with self.path.open("rb") as file:
            file.seek(self._read)
            complete = file.read().rpartition(b"\n")[0]
        for line in complete.splitlines():
            self._apply_line(json.loads(line))
        self._read += len(complete) + 1 if complete else 0
        return bool(complete)

    def _apply_line(self, line: dict[str, Any]) -> None:
        self.ready = True
        if "end" in line:
            self.finished_tests.add(line["end"])
        elif "report" in line:
            self.reports.setdefault(line["test"], []).append(line["report"])

    def has_failed(self, test: str) -> bool:
        """Whether a phase of a test has failed on this rank."""
        return any(report["outcome"] == "failed" for report in self.reports.get(test, []))

    def has_finished(self, test: str) -> bool:
        """Whether this rank has reported the last phase of a test."""
        return any(report["when"] == "teardown" for report in self.reports.get(test, []))

    def read_stacks(self) -> str:
        """The stacks that this rank has dumped, without frames of the test runner."""
        text = self.stack.read_text(errors="replace") if self.stack.exists() else ""
        threads = re.split(r"\n\n|\n(?=Thread |Current thread )", text.strip())
        return "\n".join(trim_stack(each) for each in threads if not each.startswith("Extension modules"))


def trim_stack(thread: str) -> str:
    """A dumped stack up to the frame in which the test runner called the test, without addresses."""
    lines = strip_addresses(thread).split("\n")
    runner = (k for k, line in enumerate(lines) if "/_pytest/" in line or "/pluggy/" in line)
    return "\n".join(lines[: next(runner, len(lines))])


def strip_addresses(text: str) -> str:
    """Remove addresses, so that ranks in the same state give the same text."""
    return re.sub(r" ?(at )?0x[0-9a-f]+", "", text)


class Job:
    """One launch that runs ``tests`` on ``size`` ranks; the log folder is the last argument of ``program``."""

    def __init__(self, size: int, tests: Sequence[str], program: Sequence[str], cwd: Path, show: bool) -> None:
        self.size, self.tests = size, list(tests)
        self.folder = Path(tempfile.mkdtemp(prefix="hpccomm-tests-"))
        (self.folder / "tests.json").write_text(json.dumps(self.tests))
        self.logs = [RankLog(self.folder, rank) for rank in range(size)]
        self.output = self.folder / "output"
        self._program, self._cwd, self._show, self._launches = [*program, str(self.folder)], cwd, show, 0
        self.process = self._launch()
        self.start_time = self.last_progress = time.monotonic()
        self.start_seconds = 0.0

    def _launch(self) -> Any:
        """Start the launcher."""
        self._launches += 1
        with self.output.open("wb") as output:
            stream = None if self._show else output
            errors = stream and subprocess.STDOUT
            return start(self.size, self._program, cwd=self._cwd, stdout=stream, stderr=errors)

    def wait(self, test: str, patience: float) -> str:
        """Wait until every rank has finished a test; return the empty string, or a sentence that names the problem."""
        while True:
            alive = self.process.poll() is None
            if any([log.listen() for log in self.logs]):
                self.last_progress = time.monotonic()
                if not self.start_seconds and self.all_ready():
                    self.start_seconds = self.last_progress - self.start_time
            if all(test in log.finished_tests for log in self.logs):
                return ""
            problem = self._find_problem(test, patience, alive)
            if problem:
                return problem
            time.sleep(0.005)

    def _find_problem(self, test: str, patience: float, alive: bool) -> str:
        now = time.monotonic()
        name = f"the job of {self.size} ranks"
        if not alive and self._launches < LAUNCHES and not self.all_ready() and REFUSED in self.output_tail():
            self.process = self._launch()
            return ""
        if not alive:
            when = "in this" if self.all_ready() else "before its first"
            return f"{name} {describe_exit(self.process.returncode)} {when} test"
        if not self.all_ready():
            return f"{name} did not start within {START_SECONDS:g} s" if now - self.start_time > START_SECONDS else ""
        if any(log.has_failed(test) for log in self.logs):
            patience = min(patience, FAILED_SECONDS)
        patience = self.scale(patience)
        return f"{name} made no progress for {patience:g} s" if now - self.last_progress > patience else ""

    def scale(self, seconds: float) -> float:
        """A time limit, extended on a loaded machine: at least twice the time that this job took to start."""
        return max(seconds, 2 * self.start_seconds)

    def all_ready(self) -> bool:
        """Whether every rank has started."""
        return all(log.ready for log in self.logs)

    def dump_stacks(self, test: str) -> list[str]:
        """Terminate the job; return the stack of each rank in a test."""
        unfinished = [log for log in self.logs if not log.has_finished(test)]
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)  # launchers pass it on to the ranks
            until = time.monotonic() + self.scale(DUMP_SECONDS)
            while time.monotonic() < until and not all(log.read_stacks() for log in unfinished):
                time.sleep(0.1)
        stop(self.process)
        done = "finished this test, waits for the other ranks"
        return [(log.read_stacks() or "(no stack)") if log in unfinished else done for log in self.logs]

    def output_tail(self) -> str:
        """The last lines of output of the launcher and the ranks."""
        lines = self.output.read_text(errors="replace").replace("\0", "").strip().split("\n")
        return "\n".join(lines[-OUTPUT_LINES:])

    def finish(self) -> str:
        """Wait for the job to end; return the empty string, or a sentence that names the problem."""
        try:
            status = self.process.wait(self.scale(END_SECONDS))
        except subprocess.TimeoutExpired:
            return f"the job of {self.size} ranks did not end within {END_SECONDS:g} s after its last test"
        return f"the job of {self.size} ranks {describe_exit(status)} after its last test" if status else ""

    def close(self) -> None:
        """Terminate the job and remove its folder."""
        stop(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)


def describe_exit(status: int) -> str:
    """A phrase for an exit status: the signal, or the number."""
    number = -status if status < 0 else status - 128
    if number in set(signal.Signals):
        return f"was ended by {signal.Signals(number).name}"
    return f"ended with status {status}"
