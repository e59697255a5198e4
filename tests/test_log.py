"""What hpccomm says goes through logging: into a program's own handlers, or else to stderr."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from hpccomm.calls.watchdog import log_line


@pytest.mark.parametrize(
    ("setting", "stdout", "stderr"),
    [
        ("", "", "[hpccomm] rank 1: late\n"),
        (
            "logging.basicConfig(stream=sys.stdout, format='mine %(name)s %(message)s')",
            "mine hpccomm rank 1: late\n",
            "",
        ),
        (
            "logging.getLogger('hpccomm').addHandler(logging.StreamHandler(sys.stdout))",
            "rank 1: late\n",
            "",
        ),
        ("logging.getLogger('hpccomm').setLevel(logging.CRITICAL)", "", ""),
    ],
)
def test_a_sentence_goes_where_the_program_wants_it(setting: str, stdout: str, stderr: str) -> None:
    code = f"import logging, sys\n{setting}\nfrom hpccomm.calls.watchdog import log_line\nlog_line('rank 1: late')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (stdout, stderr)


def test_records_are_the_packages(caplog: pytest.LogCaptureFixture) -> None:
    log_line("rank 0: 100% of it")
    assert [(each.name, each.levelno, each.getMessage()) for each in caplog.records] == [
        ("hpccomm", logging.ERROR, "rank 0: 100% of it")
    ]
