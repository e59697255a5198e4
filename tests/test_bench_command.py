"""``hpccomm bench`` under a launcher: what it prints is what OSU's and nccl-tests' readers expect."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from hpccomm.testing.jobs import run_under_mpi

pytestmark = pytest.mark.slow(keep=1)


def bench(ranks: int, line: str) -> subprocess.CompletedProcess[str]:
    return run_under_mpi(ranks, "-m", "hpccomm", "bench", *line.split(), timeout=120)


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.replace("\r\n", "\n").split("\n")


def test_osus_table_from_the_empty_line_to_the_last_row() -> None:
    lines = lines_of(bench(3, "allreduce -m 1:64 -i 10 -x 2"))
    assert lines[:4] == [
        "",
        "# OSU MPI Allreduce Latency Test v7.4",
        "# Datatype: MPI_FLOAT.",
        "# Size         Avg Latency(us)",
    ]
    rows = lines[4:-1]
    assert [row.split()[0] for row in rows] == ["4", "8", "16", "32", "64"]
    assert all(re.fullmatch(r"[0-9 ]{10} +\d+\.\d\d", row) and len(row) == 30 for row in rows)
    assert lines[-1] == ""


def test_reframes_command_and_its_regular_expressions() -> None:
    done = bench(2, "osu_latency -m 8 -x 10 -i 20 -c D D")
    text = "\n".join(lines_of(done))
    assert float(re.search(r"^8\s+(\S+)", text, re.MULTILINE)[1]) > 0  # type: ignore[index]
    assert re.search(r"^8.*Pass", text, re.MULTILINE)
    assert "host memory" in done.stderr


def test_omb_pys_line_runs_unchanged() -> None:
    lines = lines_of(bench(2, "run.py --benchmark allgather --buffer numpy --min 4 --max 16 --iterations 5 --skip 1"))
    assert [line.split()[0] for line in lines[4:-1]] == ["4", "8", "16"]


def test_a_barrier_is_one_number() -> None:
    lines = lines_of(bench(3, "osu_barrier -i 10 -x 2"))
    assert lines[:3] == ["", "# OSU MPI Barrier Latency Test v7.4", "# Avg Latency(us)"]
    assert re.fullmatch(r" *\d+\.\d\d", lines[3])
    assert len(lines[3]) == 17
    assert lines[4:] == [""]


def test_every_datatype_has_its_table() -> None:
    lines = lines_of(bench(2, "reduce -m 4:8 -i 5 -x 1 -c -T all -k rotate"))
    assert [line for line in lines if line.startswith("# Data")] == [
        "# Datatype: MPI_CHAR.",
        "# Datatype: MPI_INT.",
        "# Datatype: MPI_FLOAT.",
    ]
    assert sum(line.endswith("Pass") for line in lines) == 6


def test_several_algorithms_are_compared_with_native_and_written_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    lines = lines_of(bench(3, f"allreduce --algorithm native,ring,auto -m 4:1024 -i 10 -x 2 -c --json {out}"))
    titles = re.split(r"\s{2,}", lines[3])
    assert titles[1:] == [
        *(f"{name} P50(us)" for name in ("native", "ring", "auto")),
        "native/ring",
        "native/auto",
        "Validation",
    ]
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "mpi", "versions", "command", "date", "rows"}
    assert found["command"].startswith("hpccomm bench allreduce --algorithm native,ring,auto")
    assert [(row["bytes"], row["algorithm"]) for row in found["rows"][:4]] == [
        (4, "native"),
        (4, "ring"),
        (4, "auto"),
        (8, "native"),
    ]
    for row, words in zip(found["rows"][::3], (line.split() for line in lines[4:-1]), strict=True):
        assert row["validated"] is True
        assert words[1] == f"{row['p50_us']:.2f}"


def test_new_arrays_add_columns_and_first_calls_add_comments(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    lines = lines_of(bench(2, f"bcast --algorithm native,auto --new-arrays --cold -m 4:8 -i 5 -x 1 -c --json {out}"))
    for line, what in zip(lines[2:4], ("the process", "a new communicator"), strict=True):
        assert re.fullmatch(rf"# First call of {what}, 4 bytes \(us\): native \d+\.\d\d, auto \d+\.\d\d", line)
    assert [len(line.split()) for line in lines[6:-1]] == [1 + 2 * 3 + 3 + 1] * 2
    found = json.loads(out.read_text())
    assert [set(each) for each in found["cold"]] == [{"algorithm", "bytes", "process_us", "communicator_us"}] * 2
    assert all(row["new_call_p50_us"] <= row["new_p50_us"] for row in found["rows"])


def test_nccl_tests_table_and_its_readers() -> None:
    lines = lines_of(bench(2, "./build/all_reduce_perf -b 1K -e 4K -f 2 -g 1 -n 3"))
    start = next(k for k, line in enumerate(lines) if "out-of-place" in line)
    end = next(k for k, line in enumerate(lines) if "Out of bounds values" in line)
    rows = [line.split() for line in lines[start + 3 : end]]
    assert [words[0] for words in rows] == ["1024", "2048", "4096"]
    assert all(len(words) == 13 and float(words[-6]) >= 0 for words in rows)
    assert {words[8] for words in rows} == {words[12] for words in rows} == {"0"}
    assert lines[end] == "# Out of bounds values : 0 OK"
    assert float(lines[end + 1].split()[-1]) > 0
    assert lines[end + 3].startswith("# Collective test concluded: ")


def test_a_bandwidth_below_the_required_one_is_a_failure() -> None:
    done = bench(2, "allreduce --format nccl -b 8 -e 8 -n 3 --min-busbw 1e9")
    assert done.returncode == 1
    assert re.search(r"# Avg bus bandwidth    : \S+ FAILED", done.stdout)


@pytest.mark.parametrize(
    ("ranks", "line", "words"),
    [
        (1, "allreduce", "This test requires at least two processes: hpccomm-run -n 2 -m hpccomm bench allreduce"),
        (3, "osu_bw", "This test requires exactly two processes: hpccomm-run -n 2 -m hpccomm bench bw"),
        (2, "allreduce --algorithm fastest", "allreduce has no algorithm 'fastest': use auto, native"),
        (2, "bcast -k fixed:2", "-k fixed:2: with 2 ranks use a root from 0 to 1"),
        (2, "allreduc", "there is no benchmark 'allreduc': use one of allreduce"),
        (3, "allgather -b 8 -e 8", "no size is left that gives 3 ranks an element each"),
        (2, "allreduce -M 2", "no size is left"),
        (2, "mumble", "there is no benchmark 'mumble': use one of allreduce"),
    ],
)
def test_only_rank_0_reports_a_mistake(ranks: int, line: str, words: str) -> None:
    done = bench(ranks, line)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count(words) == 1


def test_sizes_beyond_the_memory_limit_are_left_out() -> None:
    done = bench(2, "allgather -m 65536: -M 262144 -i 2 -x 1")
    assert [line.split()[0] for line in lines_of(done)[4:-1]] == ["65536", "131072"]
    assert "Warning! Limiting max message size to: 131072. Increase -M, --mem-limit" in done.stderr


BROKEN = """
import sys
from mpi4py import MPI
import hpccomm
from hpccomm.__main__ import main

class Broken(hpccomm.Communicator):
    def Allreduce(self, send, recv, op=MPI.SUM, algorithm=None):
        weight = {0: 2, 1: 0}.get(self.rank, 1) if send.size > 2 else 1
        super().Allreduce(send * send.dtype.type(weight), recv, op, algorithm)

hpccomm.Communicator = Broken
sys.exit(main(["bench", "osu_allreduce", "-m", "4:64", "-i", "5", "-x", "1", "-c"]))
"""


def test_a_wrong_sum_ends_the_run_in_osus_words() -> None:
    done = run_under_mpi(3, "-c", BROKEN, timeout=120)
    lines = done.stdout.replace("\r\n", "\n").split("\n")
    assert done.returncode == 1
    assert [line.split()[0::2] for line in lines[4:7]] == [["4", "Pass"], ["8", "Pass"], ["16", "Fail"]]
    assert lines[7:] == ["DATA VALIDATION ERROR: osu_allreduce exited with status 1 on message size 16.", ""]
    assert re.search(r"allreduce of 16 bytes, auto: rank 0: element 0 is .* \(4 of 4 wrong in call 0", done.stderr)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("-h", "benchmarks: allreduce, reduce, bcast"),
        ("allreduce -h", "as the OSU Micro-Benchmarks"),
        ("osu_bcast -v", "# OSU MPI Broadcast Latency Test v7.4"),
    ],
)
def test_help_and_version_are_printed_once(line: str, words: str) -> None:
    done = bench(2, line)
    assert done.returncode == 0
    assert done.stdout.count(words) == 1


def test_a_result_file_that_cannot_be_written_is_an_error_before_the_first_measurement(tmp_path: Path) -> None:
    done = bench(2, f"allreduce -m 4:8 --json {tmp_path}/missing/out.json")
    assert done.returncode != 0
    assert "name a file that can be written" in done.stdout + done.stderr
    assert "OSU" not in done.stdout
