"""A schedule is printed as one line a round, or drawn."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from hpccomm.collectives import ALGORITHMS, draw
from hpccomm.collectives.verify import verify_algorithm
from hpccomm.commands import plot
from hpccomm.errors import ArgumentError


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    plot.add_arguments(parser)
    return plot.run(parser.parse_args(words))


def test_the_ring_is_printed_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ring", "--size", "3") == 0
    assert capsys.readouterr().out.splitlines() == [
        "allreduce, ring, 3 ranks, 3 blocks",
        "round   0  sum   0-[2]->1  1-[0]->2  2-[1]->0",
        "round   1  sum   0-[1]->1  1-[2]->2  2-[0]->0",
        "round   2  copy  0-[0]->1  1-[1]->2  2-[2]->0",
        "round   3  copy  0-[2]->1  1-[0]->2  2-[1]->0",
    ]


def test_intervals_that_wrap_around_and_whole_vectors_have_labels(capsys: pytest.CaptureFixture[str]) -> None:
    run("bruck", "--size", "6")
    assert "5-[5..0]->3" in capsys.readouterr().out
    run("butterfly", "--size", "7")
    assert "0-[all]->1" in capsys.readouterr().out


def test_the_root_and_the_collective_can_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    run("chain", "--size", "3", "--collective", "bcast", "--root", "1")
    assert capsys.readouterr().out.splitlines() == [
        "bcast, chain, 3 ranks, root 1, 1 block",
        "round   0  copy  1-[0]->2",
        "round   1  copy  2-[0]->0",
    ]


@pytest.mark.parametrize("name", ALGORITHMS["allreduce"])
def test_every_message_is_printed_once(name: str) -> None:
    lines = list(draw.text(ALGORITHMS["allreduce"][name], 7))
    assert sum(line.count("->") for line in lines) == verify_algorithm(name, "allreduce", 7).messages


@pytest.mark.parametrize(("name", "kind"), [("ring", b"\x89PNG"), ("hierarchical", b"<?xml"), ("ring", b"%PDF")])
def test_the_suffix_selects_the_format_of_a_drawing(
    name: str, kind: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / {b"\x89PNG": "x.png", b"<?xml": "x.svg", b"%PDF": "x.pdf"}[kind]
    assert run(name, "--size", "4", "--out", str(out)) == 0
    assert out.read_bytes().startswith(kind)


def test_a_drawing_has_an_arrow_and_a_label_a_message(tmp_path: Path) -> None:
    out = tmp_path / "tree.svg"
    draw.draw_schedule(ALGORITHMS["bcast"]["tree"], 5, out, "a title", 2)
    drawing = out.read_text(encoding="utf-8")
    assert drawing.count('id="patch_') >= verify_algorithm("tree", "bcast", 5, 2).messages
    assert "<!-- a title -->" in drawing
    assert drawing.count("<!-- rank ") == 5


def test_without_matplotlib_the_error_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'hpccomm\[plot\]'"):
        draw.draw_schedule(ALGORITHMS["allreduce"]["ring"], 4, tmp_path / "x.png", "ring")


def test_importing_draw_does_not_import_matplotlib() -> None:
    import subprocess

    code = "import sys, hpccomm.collectives.draw, hpccomm.commands.plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plot_draws_measurements_from_json_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    fake = argparse.Namespace(draw=lambda paths, out: drawn.append((paths, out)))
    monkeypatch.setitem(sys.modules, "hpccomm.bench.plot", fake)
    monkeypatch.setattr("hpccomm.bench.plot", fake, raising=False)
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text("{}")
    b.write_text("{}")
    assert run(str(a), str(b), "--out", "x.png") == 0
    assert drawn == [([str(a), str(b)], "x.png")]
    with pytest.raises(ArgumentError, match="add --out"):
        run(str(a))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["rnig"], "neither a file nor an algorithm: use one of"),
        (["ring", "no.json"], "no such file: ring, no.json"),
        (["ring", "--size", "4", "--root", "4"], "use a root from 0 to size - 1"),
        (["bruck", "--collective", "bcast"], "use one of chain, ring, tree, hierarchical"),
    ],
)
def test_wrong_arguments_of_plot_are_named(words: list[str], error: str) -> None:
    with pytest.raises(ArgumentError, match=error):
        run(*words)
