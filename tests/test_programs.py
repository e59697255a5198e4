"""The programs of examples/programs give the same results with plain mpi4py and with hpccomm."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

import hpccomm
from benchmarks import programs

SMALL = {
    "conjugate_gradient": (24, 200),
    "heat": (24, 10),
    "fft_transpose": (24, 3),
    "kmeans": (600, 30),
    "random_search": (50, 60),
    "sample_sort": (500, 3),
    "matrix_vector": (60, 500),
    "particles": (200, 10),
    "pagerank": (500, 100),
    "data_parallel_sgd": (16, 30),
}
"""The size and the number of iterations of a short run."""
TOLERANCES = {"conjugate_gradient": 1e-2, "pagerank": 1e-9, "data_parallel_sgd": 1e-3}
"""The programs that add floating-point numbers of several ranks: three ranks may add them in another order, and the
programs pass the difference on from step to step.  Two ranks cannot, and the other programs only move numbers, compare
them, or add whole ones."""
THE_LINE = "comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)"


def test_every_program_is_run_and_measured() -> None:
    files = {file.stem for file in programs.FOLDER.glob("*.py")} - {"shared"}
    assert files == set(SMALL) == set(programs.PROGRAMS)


@pytest.mark.parametrize("name", SMALL)
def test_a_program_is_short_and_one_line_chooses_hpccomm(name: str) -> None:
    lines = (programs.FOLDER / f"{name}.py").read_text().splitlines()
    assert 40 <= len(lines) <= 90
    assert [line for line in lines if re.search(r"\bhpccomm\b|\.mpi4py", line)] == ["import hpccomm", THE_LINE]


@pytest.mark.mpi(sizes=(1, 2, 3))
@pytest.mark.parametrize("name", SMALL)
def test_the_results_are_those_of_plain_mpi4py(
    comm: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(programs.FOLDER)
    results = []
    for kind, flags in ((MPI.Intracomm, ["--mpi4py"]), (hpccomm.Communicator, [])):
        size, iterations = SMALL[name]
        words = [f"{name}.py", f"--size={size}", f"--iterations={iterations}", *flags]
        monkeypatch.setattr(sys, "argv", words)
        assert type(runpy.run_path(str(programs.FOLDER / words[0]))["comm"]) is kind
        results.append(capsys.readouterr().out)
    if comm.rank:
        assert results == ["", ""]
        return
    (_, plain), (_, ours) = map(programs.read_output, results)
    if comm.size > 2 and name in TOLERANCES:
        assert parse_result(ours) == pytest.approx(parse_result(plain), rel=TOLERANCES[name])
    else:
        assert ours == plain


def parse_result(line: str) -> dict[str, float]:
    return {name: float(value) for name, _, value in (word.partition("=") for word in line.split())}


# --- the measuring program -------------------------------------------------------------------------


@pytest.mark.slow(keep=0)
def test_a_round_launches_native_ours_and_native_again(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = []
    launch = programs.launch_program

    def launch_small(ranks: int, name: str, more: Sequence[str]) -> dict[str, float]:
        flags.append(list(more))
        return launch(ranks, name, ["--size", "60", "--iterations", "20", *more])

    monkeypatch.setattr(programs, "launch_program", launch_small)
    row = programs.measure_round((2, "matrix_vector", 1))
    assert flags == [[], ["--mpi4py"], ["--mpi4py"]]  # the second round begins with ours
    for name in ("native", "ours", "null"):
        assert 0 < row[name]["loop"] < row[name]["wall"]


def test_a_program_that_fails_is_an_error_with_its_output() -> None:
    with pytest.raises(programs.harness.LaunchError, match=r"heat on 1 ranks:(.|\n)*unrecognized arguments: --fast"):
        programs.launch_program(1, "heat", ["--fast"])


def rounds_of(ours: Sequence[float], null: Sequence[float]) -> list[dict[str, Any]]:
    """Rounds in which native takes 12 seconds."""
    return [
        {
            "ranks": 2,
            "program": "heat",
            "round": k,
            "load": 0.5,
            "native": {"loop": 12.0, "wall": 12.0},
            "ours": {"loop": 12 / a, "wall": 12 / a},
            "null": {"loop": 12 / b, "wall": 12 / b},
        }
        for k, (a, b) in enumerate(zip(ours, null, strict=True))
    ]


@pytest.mark.parametrize(
    ("ours", "null", "word"),
    [
        ([1.0, 2.0, 3.0], [0.8, 1.0, 1.2], "faster"),
        ([0.8, 1.1, 3.0], [0.8, 1.0, 1.2], "yes"),
        ([0.7, 2.0, 3.0], [0.8, 1.0, 1.2], "no"),  # the worst round is below the null's
        ([0.9, 0.95, 3.0], [0.8, 1.0, 1.2], "no"),  # the median is below 1
    ],
)
def test_never_slower_compares_the_worst_rounds_and_faster_the_best(
    ours: list[float], null: list[float], word: str
) -> None:
    assert programs.verdict(rounds_of(ours, null), "loop") == word


def test_the_page_shows_both_times_and_every_file_that_exists(tmp_path: Path) -> None:
    rows = rounds_of([2.0, 2.0, 4.0], [1.0, 0.8, 1.0])
    machine = {"processor": "Abacus 3", "cores": 2, "system": "Linux"}
    data = {
        "mpi": "MPICH 5.0.2",
        "machine": machine,
        "versions": {"python": "3.11", "mpi4py": "4.1", "numpy": "2.4"},
        "command": "scripts/bench programs",
        "date": "2026-11-29T15:00:00",
        "records": rows,
    }
    file, page = tmp_path / "found.json", tmp_path / "page.md"
    file.write_text(json.dumps(data))
    programs.write_page(page, [tmp_path / "missing.json", file])
    text = page.read_text()
    assert "MPICH 5.0.2: Abacus 3, 2 cores; Linux, Python 3.11, mpi4py 4.1, NumPy 2.4; rounds: 3, 2026-11-29." in text
    assert "Load average before a round: **0.5** (0.5–0.5)." in text
    assert "| heat | `Sendrecv` and `Allreduce` on a `Cartcomm` | 2.00, 2.00 |" in text
    assert "| heat | 1.2e+04 | **2.00** (2.00–4.00) | **1.00** (0.80–1.00) | faster |" in text
    assert "| heat | 12 | **2.00** (2.00–4.00) | **1.00** (0.80–1.00) | faster |" in text
    assert "loop: never slower 1 of 1, faster 1; wall: never slower 1 of 1, faster 1." in text
