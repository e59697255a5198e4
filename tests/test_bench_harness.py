"""The harness of the measuring programs: turns, summaries, and a record from which an interrupted run continues."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from benchmarks import harness
from benchmarks.launches import medians, ratios_to_native, report


def run_with_calls(names: str, **how: Any) -> tuple[dict[str, list[int]], list[str]]:
    """Turns of runs that return how often any run was called before."""
    calls: list[str] = []

    def call(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = harness.take_turns({name: lambda name=name: call(name) for name in names}, **how)  # type: ignore[misc]
    return found, calls


def test_runs_take_turns_and_the_warm_up_round_is_dropped() -> None:
    found, calls = run_with_calls("abc", rounds=2)
    assert calls == ["a", "b", "c"] * 3
    assert found == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}


def test_shuffled_rounds_still_have_one_turn_for_each_run() -> None:
    _, calls = run_with_calls("abcdef", rounds=5, shuffle=True)
    rounds = [calls[at : at + 6] for at in range(0, 36, 6)]
    assert all(sorted(each) == list("abcdef") for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert run_with_calls("abcdef", rounds=5, shuffle=True)[1] == calls


def test_a_spread_shows_the_median_the_least_and_the_largest_value() -> None:
    assert harness.spread([3.0, 1.0, 9.0], ".2f") == "**3.00** (1.00–9.00)"
    assert harness.spread([0.001, 0.003], unit=1e3) == "**2** (1–3)"
    assert harness.spread([]) == ""


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(24_233.0, ".4g", "24,230"), (9_999.4, ".4g", "9999"), (123_456.0, ".3g", "123,000"), (0.5, ".2f", "0.50")],
)
def test_numbers_have_no_exponent(value: float, form: str, text: str) -> None:
    assert harness.number(value, form) == text


def test_ratios_are_taken_round_by_round() -> None:
    assert harness.ratios([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]) == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="shorter"):
        harness.ratios([1.0, 2.0], [1.0])


def test_a_table_is_markdown_with_words_left_and_numbers_right() -> None:
    assert harness.table(["way", "ms"], [["ring", "1"]], words=1) == "| way | ms |\n|---|---:|\n| ring | 1 |\n"


def test_an_interrupted_run_continues_from_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, measured = tmp_path / "new" / "record.json", []
    monkeypatch.setattr(sys, "argv", ["benchmarks/slow_links.py", "--rounds", "2"])

    def measure(key: int) -> dict[str, int]:
        if key == 3 and len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(key)
        return {"key": key, "square": key * key}

    with pytest.raises(KeyboardInterrupt):
        harness.Record(file, lambda row: row["key"]).recall_all([1, 2, 3], measure)
    record = harness.Record(file, lambda row: row["key"])
    assert record.lacks([1, 2, 3])
    assert not record.lacks([1, 2])
    measured.append(0)
    record.recall_all([1, 2, 3, 4], measure)
    assert measured == [1, 2, 0, 3, 4]
    found = json.loads(file.read_text())
    assert [row["square"] for row in found["records"]] == [1, 4, 9, 16]
    assert found["command"] == "scripts/bench slow-links --rounds 2"
    assert {"machine", "versions", "date"} <= set(found)
    assert list(file.parent.iterdir()) == [file]


def test_no_measurement_begins_after_the_time_is_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = harness.Record(tmp_path / "record.json", seconds=-1)
    record.rows.append("a")
    assert record.recall("a", lambda: "b") == "a"
    with pytest.raises(harness.OutOfTimeError):
        record.recall("b", lambda: "b")
    record.recall_all(["a", "b"], lambda key: key)
    assert record.rows == ["a"]
    assert "the same command measures the rest" in capsys.readouterr().err


def test_there_is_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(harness.show_bar(["a", "b"])) == ["a", "b"]
    harness.progress("measured a")
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d\] measured a\n", capsys.readouterr().err)


def test_a_record_reads_older_files_and_refuses_another_job(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text('[{"shape": "4 x 2"}]')
    assert harness.Record(file).rows == [{"shape": "4 x 2"}]
    file.write_text('{"job": {"epochs": 4}, "runs": [["sgd", 64]], "tuning": []}')
    record = harness.Record(file, lists=["runs", "tuning"])
    record.require("job", {"epochs": 4})
    with pytest.raises(SystemExit, match="name another file"):
        record.require("job", {"epochs": 5})
    assert (record.rows, record.lists["tuning"]) == ([["sgd", 64]], [])


def launch_of(status: int) -> Any:
    """A runner whose program writes one row, or fails."""

    def run(program: Any) -> CompletedProcess[str]:
        if status == 0:
            Path(program[-1]).write_text(json.dumps({"command": f"hpccomm bench --json {program[-1]}", "rows": [1]}))
        return CompletedProcess(program, status, "", "rank 1 failed\n")

    return run


def test_a_launch_gives_what_it_wrote_or_the_end_of_what_it_printed() -> None:
    assert harness.launch(launch_of(0), ["bench"]) == {"command": "hpccomm bench --json found.json", "rows": [1]}
    with pytest.raises(harness.LaunchError, match="rank 1 failed"):
        harness.launch(launch_of(1), ["bench"])


def launches() -> list[dict[str, Any]]:
    """Three launches; the second is slow."""
    times = [(10.0, 5.0), (40.0, 10.0), (12.0, 8.0)]
    return [{"rows": [time_row("native", native), time_row("ring", ring)]} for native, ring in times]


def time_row(algorithm: str, us: float) -> dict[str, Any]:
    """A row of ``hpccomm bench``."""
    return {"algorithm": algorithm, "bytes": 4, "p50_us": us}


def test_launches_are_joined_by_medians_and_the_worst_launch_stands_beside_them() -> None:
    assert [row["p50_us"] for row in medians(launches())] == [12.0, 8.0]
    assert ratios_to_native(launches(), "ring", 4) == [2.0, 4.0, 1.5]
    assert "| 4 | 12 | 8 | **2.00** (1.50–4.00) |" in report(launches())


def test_ratios_on_new_arrays_stand_beside_those_on_the_same_arrays() -> None:
    new = [
        {
            "rows": [
                {**row, "new_p50_us": 2 * row["p50_us"] if row["algorithm"] == "ring" else 20.0} for row in each["rows"]
            ]
        }
        for each in launches()
    ]
    assert ratios_to_native(new, "ring", 4, "new_p50_us") == [2.0, 1.0, 1.25]
    assert ratios_to_native(launches(), "ring", 4, "new_p50_us") == []
    head, _, line = report(new).splitlines()
    assert head.endswith("| native / ring (range) | native / ring, new arrays (range) |")
    assert line.endswith("| **2.00** (1.50–4.00) | **1.25** (1.00–2.00) |")


def test_shapes_on_the_command_line_replace_the_default_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    made = harness.parser("cluster", "", file="cluster-{mpi}.json")
    harness.add_shapes(made, ["2x1", "4x2,100mbit"])
    assert [each.title for each in made.parse_args([]).shape] == ["2 x 1, 1gbit", "4 x 2, 100mbit"]
    words = ["--shape", "3x2+1+3,1gbit,cyclic", "--shape", "2x1"]
    assert [each.title for each in made.parse_args(words).shape] == ["3 x 2+1+3, cyclic, 1gbit", "2 x 1, 1gbit"]
    monkeypatch.setattr(sys, "argv", ["cluster", "--seconds", "5"])
    args = harness.parse(made)
    assert harness.results_file(args, mpi="Open MPI") == harness.RESULTS / "cluster-open-mpi.json"


def test_names_of_points_lie_inside_the_frame_and_none_over_another() -> None:
    pytest.importorskip("matplotlib")
    figure, [[axes]] = harness.panels(5, 3)
    points = [(k // 4, k % 2, f"name {k}") for k in range(12)]
    axes.scatter([x for x, _, _ in points], [y for _, y, _ in points])
    harness.label_points(axes, points)
    figure.draw_without_rendering()
    frame, boxes = axes.get_window_extent(), [each.get_window_extent() for each in axes.texts]
    assert len(boxes) == len(points)
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    assert not [(a, b) for k, a in enumerate(boxes) for b in boxes[:k] if a.overlaps(b)]


@pytest.mark.parametrize("rotation", [0, 60])
def test_a_legend_below_covers_neither_bars_nor_labels(rotation: int) -> None:
    pytest.importorskip("matplotlib")
    figure, [[axes]] = harness.panels(5, 3)
    axes.bar(range(3), [1, 2, 3], label="bars")
    axes.set_xticks(range(3), ["a long name of a bar"] * 3, rotation=rotation, ha="right")
    harness.put_legend_below(axes)
    figure.draw_without_rendering()
    labels = [each.get_window_extent() for each in axes.get_xticklabels()]
    top = axes.get_legend().get_window_extent().y1
    assert all(top <= box.y0 + 1 for box in [*labels, axes.get_window_extent()])
