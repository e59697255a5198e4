"""``hpccomm bench compare`` launches every MPI in turns and prints medians, the worst round and the null."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hpccomm.__main__ import main
from hpccomm.bench import compare
from hpccomm.bench.compare import Contender, Times
from hpccomm.errors import ArgumentError
from hpccomm.performance.machine import REFERENCE

OPEN_MPI, MPICH = "Open MPI 5.0.11", "MPICH 5.0.2"


def test_a_round_has_every_library_with_its_settings_and_a_second_launch() -> None:
    found = compare.list_contenders({"python": OPEN_MPI, "other/python": MPICH})
    titles = [each.title for each in found]
    assert titles == [
        OPEN_MPI,
        f"{OPEN_MPI}, again",
        f"{OPEN_MPI}, han",
        f"{OPEN_MPI}, coll_sm",
        MPICH,
        f"{MPICH}, again",
    ]
    assert [each.algorithms for each in found if "auto" in each.algorithms] == [("native", "auto")] * 2
    assert found[2].environ == {"OMPI_MCA_coll_han_priority": "100"}
    assert found[4].environ == {}


@pytest.mark.parametrize(
    ("sizes", "factor", "ranges"),
    [
        ("4:64Mi", 4, ["4:65536", "262144:16777216", "67108864:67108864"]),
        ("8", 2, ["8:8"]),
        ("1Ki:5000", 2, ["1024:4096"]),
        ("1Mi:1Mi", 3, ["1048576:1048576"]),
    ],
)
def test_sizes_are_launched_in_ranges_with_a_number_of_calls_each(sizes: str, factor: int, ranges: list[str]) -> None:
    found = compare.read_sizes(sizes, factor)
    assert [words[1] for words in found] == ranges
    assert all(int(words[words.index("-x") + 1]) >= 20 for words in found)  # a trial of the slots is over


@pytest.mark.parametrize(("sizes", "factor"), [("0:8", 2), ("8:4", 2), ("4:8", 1)])
def test_wrong_sizes_are_named(sizes: str, factor: int) -> None:
    with pytest.raises(ArgumentError, match="FIRST:LAST"):
        compare.read_sizes(sizes, factor)


def fake_times(native: float, again: float, auto: float, other: float) -> Times:
    names = (OPEN_MPI, f"{OPEN_MPI}, again", f"auto on {OPEN_MPI}", MPICH)
    return {(name, 1024): us for name, us in zip(names, (native, again, auto, other), strict=True)}


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [fake_times(10, 11, 5, 4), fake_times(20, 16, 20, 40), fake_times(30, 30, 10, 50)]
    (line,) = compare.summarise(rounds, OPEN_MPI, "allreduce", 2, None)
    assert line.us == {OPEN_MPI: 20, f"{OPEN_MPI}, again": 16, f"auto on {OPEN_MPI}": 10, MPICH: 40}
    assert (line.ratio, line.worst) == (2, 1)
    assert line.null == pytest.approx(0.8)
    assert line.best == pytest.approx(0.8)  # of 4 / 5, 16 / 20 and 30 / 10
    assert line.limit_us is None


def test_times_that_are_missing_leave_their_cells_empty() -> None:
    (line,) = compare.summarise([{(MPICH, 8): 3.0}], OPEN_MPI, "allreduce", 2, None)
    assert line[1:] == ({MPICH: 3.0}, None, None, None, None, None)
    assert compare.format_table([line], OPEN_MPI).splitlines()[1].split() == ["8", "3"]


def test_the_limit_is_the_time_of_the_bytes_that_must_cross() -> None:
    known = REFERENCE._replace(line_ns=100, handover=10, handover_nontemporal=8, single_copy=5, memory_copy=4)
    assert compare.estimate_limit("allreduce", 2, 0, known) == pytest.approx(0.2)
    assert compare.estimate_limit("allreduce", 2, 100_000, known) == pytest.approx(0.2 + 10)
    assert compare.estimate_limit("bcast", 2, 100_000, known) == pytest.approx(0.2 + 10)
    assert compare.estimate_limit("allreduce", 2, 1 << 28, known) == pytest.approx(0.2 + (1 << 28) / 4e3)
    assert compare.estimate_limit("allreduce", 4, 8, known) is None  # more ranks than the cores of the probe
    assert compare.estimate_limit("allreduce", 2, 8, None) is None


def test_interpreters_that_do_not_exist_are_named() -> None:
    with pytest.raises(ArgumentError, match="/nowhere/python"):
        compare.find_interpreters(["/nowhere/python"])
    assert compare.find_interpreters([sys.executable]) == [sys.executable]


def test_of_several_environments_with_one_library_the_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "find_interpreters", lambda named: ["a", "b", "c", "d"])
    monkeypatch.setattr(compare, "name_mpi", {"a": OPEN_MPI, "b": OPEN_MPI, "c": "", "d": MPICH}.get)
    assert compare.find_libraries([]) == {"a": OPEN_MPI, "d": MPICH}


def test_the_command_prints_one_table_and_writes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "find_libraries", lambda named: {sys.executable: OPEN_MPI, "other": MPICH})
    launched: list[str] = []

    def launch(contender: Contender, flags: Sequence[str]) -> list[dict[str, Any]]:
        launched.append(contender.title)
        if contender.setting == "coll_sm":
            return []
        us = {"native": 8.0, "auto": 4.0}
        return [{"algorithm": name, "bytes": 64, "p50_us": us[name]} for name in contender.algorithms]

    monkeypatch.setattr(compare, "make_launch", lambda *arguments: launch)
    out, plot = tmp_path / "rounds.json", tmp_path / "plot.svg"
    words = ["bench", "compare", "allreduce", "--sizes", "64", "--rounds", "2", "--json", str(out), "--plot", str(plot)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"# {OPEN_MPI}, coll_sm does not run here" in text
    assert "native/auto" in text
    assert launched[:6] == launched[6:][::-1]
    data = json.loads(out.read_text())
    assert {row["contender"] for row in data["rows"]} >= {OPEN_MPI, f"auto on {MPICH}"}
    assert plot.read_text().startswith("<?xml")


def test_it_is_not_started_by_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    assert main(["bench", "compare"]) == 2
    assert "without mpirun" in capsys.readouterr().err


@pytest.mark.slow
def test_launches_of_this_environment_have_times() -> None:
    mpi = compare.name_mpi(sys.executable)
    assert mpi
    launch = compare.make_launch("bcast", 2)
    flags = ["-m", "8:16", "--step-factor", "2", "-i", "5", "-x", "2"]
    rows = launch(Contender(sys.executable, mpi, algorithms=("native", "auto")), flags)
    assert {(row["algorithm"], row["bytes"]) for row in rows} == {(a, n) for a in ("native", "auto") for n in (8, 16)}
    assert launch(Contender("/nowhere/python", mpi), flags) == []
