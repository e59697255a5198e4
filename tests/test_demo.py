"""The summary of the demo: training and benchmark results, taken from the files that the commands write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo

EPOCHS = [
    {"epoch": k, "accuracy": 0.5 + 0.1 * k, "compute_s": 0.25, "communication_s": 0.0125, "wire_bytes": 28860}
    for k in (1, 2, 3)
]
TRAINED = {"method": "dense", "dataset": "digits", "ranks": 4, "epochs": EPOCHS}


def row(algorithm: str, nbytes: int, microseconds: float) -> dict[str, Any]:
    return {"algorithm": algorithm, "bytes": nbytes, "p50_us": microseconds}


ROWS = [row("native", 4, 10.0), row("auto", 4, 12.5), row("native", 4096, 30.0), row("auto", 4096, 15.0)]
MEASURED = {"machine": {"ranks": "4 ranks on one node"}, "mpi": "Open MPI 5.0.11", "rows": ROWS}


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    files = tmp_path / "train.json", tmp_path / "bench.json"
    for file, content in zip(files, (TRAINED, MEASURED), strict=True):
        file.write_text(json.dumps(content))
    monkeypatch.setattr("sys.argv", ["demo", *map(str, files)])
    assert demo.main() == 0
    return capsys.readouterr().out.splitlines()


def test_the_summary_shows_the_last_epoch(lines: list[str]) -> None:
    assert "Trained: digits, 4 ranks, gradients averaged by hpccomm (dense)" in lines
    said = [line.split("  ")[-1].strip() for line in lines]
    assert {"80.0 %", "250 ms computing, 12 ms communicating", "28.9 kB a step"} <= set(said)


def test_every_size_is_compared_with_the_mpi_underneath(lines: list[str]) -> None:
    table = [line.replace("µs", "").split() for line in lines if "µs" in line]
    assert table == [["4", "10.0", "12.5", "0.80"], ["4096", "30.0", "15.0", "2.00"]]
