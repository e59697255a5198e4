"""The test runner gives one result for each test and world size, whatever fails on the ranks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from hpccomm.testing.jobs import RankLog, describe_exit, run_under_mpi, trim_stack

CONFTEST = 'pytest_plugins = ["hpccomm.testing.lockstep"]\n'

HEALTHY = """
import os
import pytest

def test_serial():
    assert "OMPI_COMM_WORLD_SIZE" not in os.environ and "PMI_SIZE" not in os.environ

@pytest.mark.mpi
@pytest.mark.parametrize("letter", ["a", "b"])
def test_everybody(comm, letter, ranks):
    assert comm.allgather((comm.rank, letter)) == [(r, letter) for r in range(ranks)]

@pytest.mark.mpi(sizes=(2, 5))
def test_pairs(comm):
    assert comm.size in (2, 5)

@pytest.mark.mpi(min_size=3)
def test_three(comm):
    assert comm.size >= 3

def test_serial_after_mpi_in_the_file():
    pass
"""

SICK = """
import ctypes, os, sys
import numpy as np
import pytest
from mpi4py import MPI

pytestmark = pytest.mark.mpi(sizes=(3,))
stalls = pytest.mark.mpi(sizes=(3,), timeout=2)

def agree(comm):
    assert comm.allgather(comm.rank) == [0, 1, 2]

@pytest.fixture
def broken_on_rank_2(comm):
    assert comm.rank != 2, "no tools here"

@pytest.fixture
def broken_afterwards(comm):
    yield
    assert comm.rank != 0, "cannot tidy up"

def test_first(comm):
    agree(comm)

def test_one_rank_asserts(comm):
    print("a word from", comm.rank)
    assert comm.rank != 1, "odd one out"

def test_after_assert(comm):
    agree(comm)

def test_two_ranks_assert_with_equal_tracebacks(comm):
    if comm.rank != 1:
        raise ValueError(f"{object()} is broken")

@stalls
def test_fails_before_a_collective(comm):
    assert comm.rank != 1, "too early"
    comm.Allreduce(MPI.IN_PLACE, np.full(4, 100.0))

def test_receives_no_message_of_the_test_before(comm):
    x = np.full(4, 1.0)
    comm.Allreduce(MPI.IN_PLACE, x)
    assert x.tolist() == [3.0] * 4

def waits_forever(comm):
    comm.recv(source=2, tag=77)

@stalls
def test_hangs(comm):
    if comm.rank == 0:
        waits_forever(comm)

def test_after_hang(comm):
    agree(comm)

def reads_address_zero():
    ctypes.string_at(0)

def test_segfault(comm):
    if comm.rank == 1:
        reads_address_zero()
    comm.Barrier()

def test_after_segfault(comm):
    agree(comm)

def test_abort(comm):
    if comm.rank == 0:
        comm.Abort(3)
    comm.Barrier()

def test_after_abort(comm):
    agree(comm)

def test_skips(comm):
    pytest.skip("not today")

@pytest.mark.xfail(reason="known")
def test_expected_to_fail_on_one_rank(comm):
    assert comm.rank != 1

def test_setup_fails(broken_on_rank_2, comm):
    pass

def test_teardown_fails(broken_afterwards, comm):
    agree(comm)

def test_leaves(comm):
    sys.exit(comm.rank)

def test_last(comm):
    agree(comm)
"""

OUTCOMES = {
    "test_first": "passed",
    "test_one_rank_asserts": "failed",
    "test_after_assert": "passed",
    "test_two_ranks_assert_with_equal_tracebacks": "failed",
    "test_fails_before_a_collective": "failed",
    "test_receives_no_message_of_the_test_before": "passed",
    "test_hangs": "failed",
    "test_after_hang": "passed",
    "test_segfault": "failed",
    "test_after_segfault": "passed",
    "test_abort": "failed",
    "test_after_abort": "passed",
    "test_skips": "skipped",
    "test_expected_to_fail_on_one_rank": "skipped",
    "test_setup_fails": "error",
    "test_teardown_fails": "error",
    "test_leaves": "failed",
    "test_last": "passed",
}

TAGS = {"failure": "failed", "error": "error", "skipped": "skipped"}


class Session(NamedTuple):
    """The results of one pytest session: terminal output, counts of its last line, and outcomes and texts by test."""

    terminal: str
    counts: dict[str, int]
    outcomes: dict[str, list[str]]
    texts: dict[str, str]


def read(folder: Path, terminal: str) -> Session:
    """Read the results of a finished session."""
    summary = terminal.strip().rsplit("\n", 1)[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summary) if word != "seconds"}
    outcomes: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for case in ElementTree.parse(folder / "junit.xml").iter("testcase"):
        name = case.attrib["name"]
        found = next((child for child in case if child.tag in TAGS), None)
        outcomes.setdefault(name, []).append("passed" if found is None else TAGS[found.tag])
        texts[name] = "".join((child.get("message") or "") + (child.text or "") for child in case)
    return Session(terminal, counts, outcomes, texts)


def project(folder: Path, tests: str) -> Path:
    """A small project that uses the plug-in."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_it.py").write_text(tests)
    return folder


def run_pytest(folder: Path, *words: str) -> Session:
    """Run pytest in a folder as a user does."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=junit.xml", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    return read(folder, done.stdout + done.stderr)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project(tmp_path_factory.mktemp("healthy"), HEALTHY)


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return run_pytest(project(tmp_path_factory.mktemp("sick"), SICK))


pytestmark = [pytest.mark.slow(keep=1), pytest.mark.mpi_skip]  # these tests start ranks of their own


@pytest.mark.slow
def test_a_test_is_one_result_a_size_and_serial_tests_come_first(healthy: Path) -> None:
    session = run_pytest(healthy, "-v", "-k", "not (p4 or p5 or p7)")
    everybody = [f"test_everybody[p{n}-{x}]" for n in (1, 2, 3) for x in "ab"]
    others = ["test_pairs[p2]", "test_three[p3]", "test_serial", "test_serial_after_mpi_in_the_file"]
    assert session.outcomes == {name: ["passed"] for name in [*everybody, *others]}
    assert session.counts["passed"] == len(session.outcomes)
    sizes = [int(size or 0) for size in re.findall(r"test_it.py::\w+(?:\[p(\d).*?\])? PASSED", session.terminal)]
    assert sizes == sorted(sizes)
    assert len(sizes) == len(session.outcomes)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (
            ["--mpi-sizes=2", "-q"],
            ["serial", "everybody[p2-a]", "everybody[p2-b]", "pairs[p2]", "serial_after_mpi_in_the_file"],
        ),
        (["test_it.py::test_pairs", "--mpi-sizes=2,3"], ["pairs[p2]"]),
        (["test_it.py::test_everybody[p3-b]"], ["everybody[p3-b]"]),
        (["-k", "p2 and (pairs or p2-a)", "-q"], ["everybody[p2-a]", "pairs[p2]"]),
        (["-m", "not mpi"], ["serial", "serial_after_mpi_in_the_file"]),
    ],
)
def test_only_selected_tests_run(healthy: Path, words: list[str], names: list[str]) -> None:
    session = run_pytest(healthy, *words)
    assert session.outcomes == {f"test_{name}": ["passed"] for name in names}
    assert session.counts["passed"] == len(names)


def test_every_test_of_a_failing_project_has_exactly_one_result(sick: Session) -> None:
    assert {name: outcomes for name, outcomes in sick.outcomes.items() if name != "test_teardown_fails[p3]"} == {
        f"{name}[p3]": [outcome] for name, outcome in OUTCOMES.items() if name != "test_teardown_fails"
    }
    expected = Counter(OUTCOMES.values())
    assert sick.counts == {
        "failed": expected["failed"],
        "passed": expected["passed"] + 1,  # as with any pytest, the test whose teardown fails has passed before
        "skipped": expected["skipped"] - 1,
        "xfailed": 1,
        "errors": expected["error"],
    }, sick.terminal


def test_an_assert_on_one_rank_is_reported_once_with_that_ranks_number(sick: Session) -> None:
    text = sick.texts["test_one_rank_asserts[p3]"]
    assert re.search(r"--- rank 1 of 3 ---\n.*assert comm.rank != 1", text, re.S)
    assert text.count("E       AssertionError: odd one out") == 1
    assert re.search(r"FAILED test_it.py::test_one_rank_asserts\[p3\] - rank 1 of 3: Asse", sick.terminal)
    assert "rank 0: Captured stdout call" in sick.terminal
    assert "a word from 0" in sick.terminal


def test_equal_failures_of_several_ranks_are_reported_once(sick: Session) -> None:
    text = sick.texts["test_two_ranks_assert_with_equal_tracebacks[p3]"]
    assert "--- ranks 0, 2 of 3 ---" in text
    assert text.count("def test_two_ranks_assert_with_equal_tracebacks") == 1


def test_a_rank_that_fails_before_a_collective_is_named_and_the_others_stacks_are_shown(sick: Session) -> None:
    text = sick.texts["test_fails_before_a_collective[p3]"]
    assert re.search(r"--- rank 1 of 3 ---\n.*too early", text, re.S)
    assert "rank 1 of 3 ---\nfinished this test, waits for the other ranks" in text
    assert "in test_fails_before_a_collective" in text
    assert re.search(r"made no progress for [\d.]+ s", text)


def test_a_hang_ends_with_the_stack_of_each_rank(sick: Session) -> None:
    text = sick.texts["test_hangs[p3]"]
    assert re.search(r"made no progress for [\d.]+ s", text)
    assert re.search(r"--- rank 0 of 3 ---\n.*in waits_forever.*in test_hangs", text, re.S)
    assert "--- ranks 1, 2 of 3 ---\nfinished this test, waits for the other ranks" in text
    assert "/_pytest/" not in text


def test_a_segfault_shows_where_the_rank_was(sick: Session) -> None:
    text = sick.texts["test_segfault[p3]"]
    assert re.search(r"the job of 3 ranks (was ended by SIGSEGV|ended with status \d+) in this test", text)
    assert re.search(r"--- rank 1 of 3 ---\n.*Segmentation fault.*in reads_address_zero", text, re.S)


def test_an_abort_is_reported_with_its_exit_status(sick: Session) -> None:
    assert "the job of 3 ranks ended with status 3 in this test" in sick.texts["test_abort[p3]"]


def test_errors_of_fixtures_name_the_rank(sick: Session) -> None:
    assert "no tools here" in sick.texts["test_setup_fails[p3]"]
    assert "rank 2 of 3" in sick.texts["test_setup_fails[p3]"]
    assert "rank 0 of 3" in sick.texts["test_teardown_fails[p3]"]
    assert "SystemExit: 2" in sick.texts["test_leaves[p3]"]


def test_the_first_failure_ends_the_session_when_asked(tmp_path: Path) -> None:
    session = run_pytest(project(tmp_path, SICK), "-x", "-q", "-k", "first or assert")
    assert session.counts == {"failed": 1, "passed": 1, "deselected": 14}


def test_a_job_that_cannot_start_fails_all_tests_of_its_size_at_once(tmp_path: Path) -> None:
    tests = "import os\nif 'PMIX_RANK' in os.environ or 'PMI_RANK' in os.environ:\n    raise OSError('no disk')\n"
    session = run_pytest(project(tmp_path, tests + HEALTHY), "--mpi-sizes=2")
    assert session.counts == {"failed": 3, "passed": 2, "deselected": 2}
    assert "no disk" in session.texts["test_everybody[p2-a]"]
    assert "the job of 2 ranks" in session.texts["test_pairs[p2]"]


def test_a_rank_that_dies_after_the_last_test_is_an_error_of_its_own(tmp_path: Path) -> None:
    lines = (
        "import atexit, os, pytest",
        "@pytest.mark.mpi(sizes=(2,))",
        "def test_only(comm):",
        "    atexit.register(os._exit, 7)",
    )
    session = run_pytest(project(tmp_path, "\n".join(lines)))
    assert session.counts == {"passed": 1, "error": 1}
    assert "the job of 2 ranks ended with status 7 after its last test" in session.terminal


def test_a_test_that_takes_comm_needs_the_mpi_mark(tmp_path: Path) -> None:
    session = run_pytest(project(tmp_path, "def test_unmarked(comm): pass\n"))
    assert session.outcomes == {"test_unmarked": ["error"]}
    assert "needs @pytest.mark.mpi" in session.texts["test_unmarked"]


def test_ranks_that_the_user_started_report_once_and_together(tmp_path: Path) -> None:
    names = "first or assert or skips or expected or setup"
    done = run_together(project(tmp_path, SICK), 3, "-k", names, "--junitxml=junit.xml")
    assert done.returncode != 0
    assert done.stdout.count("test session starts") == 1
    assert "2 failed, 2 passed, 1 skipped, 11 deselected, 1 xfailed, 1 error" in done.stdout, done.stdout
    outcomes = read(tmp_path, done.stdout).outcomes
    assert outcomes["test_one_rank_asserts[p3]"] == ["failed"]
    assert outcomes["test_setup_fails[p3]"] == ["error"]
    assert re.search(r"--- rank 1 of 3 ---\n.*odd one out", done.stdout, re.S)


def test_ranks_that_the_user_started_all_stop_at_the_first_failure(tmp_path: Path) -> None:
    done = run_together(project(tmp_path, SICK), 3, "-x", "-k", "first or assert")
    assert "1 failed, 1 passed" in done.stdout


def test_ranks_that_the_user_started_end_a_hang_with_their_stacks(tmp_path: Path) -> None:
    done = run_together(project(tmp_path, SICK.replace("timeout=2", "timeout=8")), 3, "-k", "hangs")
    assert done.returncode != 0
    assert "in waits_forever" in done.stderr


def run_together(folder: Path, size: int, *words: str) -> subprocess.CompletedProcess[str]:
    """``mpirun -n size python -m pytest --with-mpi`` in a folder."""
    options = ["--with-mpi", "--color=no", "-p", "no:cacheprovider", f"--rootdir={folder}", *words]
    return run_under_mpi(size, "-m", "pytest", *options, str(folder / "test_it.py"), cwd=folder)


def test_another_launcher_can_be_chosen(healthy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = healthy / "record"
    wrapper = healthy / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho "$@" > {record}\nshift 2\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("HPCCOMM_TEST_LAUNCHER", f"{wrapper} --ranks {{n}}")
    session = run_pytest(healthy, "--mpi-sizes=1", "-k", "everybody")
    assert session.counts["passed"] == 2
    assert record.read_text().startswith("--ranks 1 ")


# Parts of the test runner


def test_a_log_line_is_read_after_it_is_complete(tmp_path: Path) -> None:
    log = RankLog(tmp_path, 0)
    assert not log.listen()
    line = json.dumps({"end": "tëst"}) + "\n"
    for part in (line[:5], line[5:] + "{"):
        with log.path.open("a") as file:
            file.write(part)
        log.listen()
    assert log.finished_tests == {"tëst"}
    assert not log.listen()


def test_a_stack_ends_where_the_test_runner_begins() -> None:
    own, runner = '  File "a.py", line 1 in f\n', '  File "/x/_pytest/p.py", line 2 in g\n'
    dumped = f"Current thread 0x00007f (most recent call first):\n{own}{runner}"
    assert trim_stack(dumped) == 'Current thread (most recent call first):\n  File "a.py", line 1 in f'


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (-11, "was ended by SIGSEGV"),
        (139, "was ended by SIGSEGV"),
        (1, "ended with status 1"),
        (255, "ended with status 255"),
    ],
)
def test_an_exit_status_is_described_in_words(status: int, words: str) -> None:
    assert describe_exit(status) == words


def test_a_job_that_takes_too_long_is_ended_with_its_ranks() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_under_mpi(2, "-c", "import time; time.sleep(100)", timeout=4)


REFUSES = """
import sys
from pathlib import Path
file, times = Path(sys.argv[1]), int(sys.argv[2])
launches = file.read_text() if file.exists() else ""
file.write_text(launches + "x")
if len(launches) < times:
    sys.exit("The PMIx server's listener thread failed to start. We cannot\\ncontinue.")
print("ran")
"""


@pytest.mark.parametrize(("times", "found"), [(0, (0, 1)), (1, (0, 2)), (2, (0, 3)), (9, (1, 3))])
def test_a_launch_that_mpi_refuses_is_tried_again(
    times: int, found: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, count = tmp_path / "launcher.py", tmp_path / "count"
    launcher.write_text(REFUSES)
    monkeypatch.setenv("HPCCOMM_TEST_LAUNCHER", f"{sys.executable} {launcher} {count} {times}")
    done = run_under_mpi(2, "-c", "")
    assert (done.returncode, len(count.read_text())) == found
    assert ("ran" in done.stdout) == (found[0] == 0)


@pytest.mark.parametrize(("times", "failed"), [(2, False), (9, True)])
def test_a_job_of_tests_that_mpi_refuses_is_launched_again(
    times: int, failed: bool, healthy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher, count = healthy / "launcher.py", healthy / "count"
    launcher.write_text(REFUSES.replace('print("ran")', "import os; os.execvp(sys.argv[3], sys.argv[3:])"))
    monkeypatch.setenv("HPCCOMM_TEST_LAUNCHER", f"{sys.executable} {launcher} {count} {times}")
    session = run_pytest(healthy, "--mpi-sizes=1", "-k", "everybody")
    assert set(session.counts) & {"passed", "failed"} == {"failed" if failed else "passed"}
    assert len(count.read_text()) == (6 if failed else 3), "two tests, of which each is launched three times"
