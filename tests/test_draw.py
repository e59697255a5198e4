"""A schedule is printed as one line a round, or drawn."""

from __future__ import annotations

import argparse
import itertools
import math
import re
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
    with pytest.raises(ImportError, match="drawing needs matplotlib: pip install matplotlib"):
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
        (["ring", "--size", "0"], "use 1 or more, and up to 256 ranks"),
        (["hierarchical", "--per-node", "0"], "use 1 or more, and up to 256 ranks"),
        (["bruck", "--collective", "bcast"], "use one of chain, ring, tree, hierarchical"),
    ],
)
def test_wrong_arguments_of_plot_are_named(words: list[str], error: str) -> None:
    with pytest.raises(ArgumentError, match=error):
        run(*words)


def lightness_and_colour(code: str) -> tuple[float, float, float]:
    """CIE L*a*b* of a colour ``#rrggbb``, in which distances are as large as people see them."""
    rgb = [int(code[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in rgb]
    rows = ((0.4124, 0.3576, 0.1805, 0.9505), (0.2126, 0.7152, 0.0722, 1.0), (0.0193, 0.1192, 0.9505, 1.089))
    x, y, z = (sum(a * b for a, b in zip(row[:3], linear, strict=True)) / row[3] for row in rows)
    x, y, z = (each ** (1 / 3) if each > 0.008856 else 7.787 * each + 16 / 116 for each in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def test_no_two_algorithms_have_colours_that_look_alike() -> None:
    """A distance of 20 is seen at a glance; the two greens of before were 9 apart."""
    from hpccomm.bench.plot import COLOURS

    for a, b in itertools.combinations(COLOURS, 2):
        assert math.dist(lightness_and_colour(a), lightness_and_colour(b)) > 20, (a, b)


@pytest.mark.parametrize(("p", "most"), [(2, 1000), (12, 2200)])
def test_a_drawing_is_no_wider_than_a_screen(p: int, most: int, tmp_path: Path) -> None:
    out = tmp_path / "ring.png"
    draw.draw_schedule(ALGORITHMS["allreduce"]["ring"], p, out, "ring")
    header = out.read_bytes()[16:24]
    assert 200 < int.from_bytes(header[:4], "big") <= most


def test_a_hierarchical_drawing_marks_the_nodes(tmp_path: Path) -> None:
    out = tmp_path / "x.svg"
    assert run("hierarchical", "--size", "6", "--per-node", "3", "--out", str(out)) == 0
    drawing = out.read_text(encoding="utf-8")
    assert [drawing.count(f"<!-- node {node}, rank") for node in (0, 1)] == [3 * k for k in (1, 1)]


ROOT = Path(__file__).parent.parent
DRAWN = re.findall(r"`hpccomm plot ([^`]*--out [\w.-]+\.svg)`", (ROOT / "docs/schedules.md").read_text())


def texts_of(drawing: str) -> list[str]:
    """What an SVG says, text by text."""
    return re.findall(r"<!-- (.*?) -->", drawing)


@pytest.mark.parametrize("line", DRAWN)
def test_the_drawings_of_the_documentation_are_those_of_their_commands(line: str, tmp_path: Path) -> None:
    *words, name = line.split()
    assert run(*words, str(tmp_path / name)) == 0
    found, kept = ((folder / name).read_text() for folder in (tmp_path, ROOT / "docs/figures"))
    assert texts_of(found) == texts_of(kept)
    assert found.count("<path") == kept.count("<path")


def test_the_page_of_schedules_draws_a_ring_a_butterfly_a_tree_and_nodes() -> None:
    assert [line.split()[0] for line in DRAWN] == ["ring", "butterfly", "tree", "hierarchical"]


def test_a_drawing_is_readable_on_white_and_on_black(tmp_path: Path) -> None:
    """Text has a contrast of 3 or more to both, and there is no slab behind it."""
    luminance = ((int(draw.INK[1:3], 16) / 255 + 0.055) / 1.055) ** 2.4  # of a grey
    assert min(1.05 / (luminance + 0.05), (luminance + 0.05) / 0.05) > 3
    out = tmp_path / "x.svg"
    draw.draw_schedule(ALGORITHMS["allreduce"]["ring"], 3, out, "ring")
    behind = re.search(r'<g id="patch_1">.*?style="([^"]*)"', out.read_text(), re.DOTALL)
    assert behind
    assert behind[1] == "fill: none"


def test_a_schedule_gives_the_same_file_again(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        assert run("ring", "--size", "3", "--out", str(tmp_path / name)) == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_labels_of_a_drawing_stay_inside_its_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    outside: list[str] = []

    def check(self: Any, *_: Any, **__: Any) -> None:
        self.canvas.draw()
        for axes in self.axes:
            for text in axes.texts:
                box, frame = text.get_window_extent(), axes.get_window_extent()
                if box.x0 < frame.x0 or box.x1 > frame.x1:
                    outside.append(text.get_text())

    monkeypatch.setattr(Figure, "savefig", check)
    for name, p in (("ring", 7), ("butterfly", 12)):
        draw.draw_schedule(ALGORITHMS["allreduce"][name], p, tmp_path / "x.png", name)
    assert not outside


@pytest.mark.parametrize(("times", "setup"), [([16.0, 0.5, 0.5], 15.5), ([0.6, 0.5, 0.5], 0.0), ([3.0], 0.0)])
def test_a_slow_first_epoch_does_not_push_the_others_to_the_end_of_the_time_axis(
    times: list[float], setup: float
) -> None:
    from hpccomm.train.figure import curve

    epochs = [
        {"loss": 1.0, "wire_bytes": 1, "compute_s": each, "communication_s": 0.0, "step_s": 0.0} for each in times
    ]
    found = curve({"method": "dense", "steps_an_epoch": 1, "epochs": epochs})
    assert found.setup == setup
    assert found.seconds[-1] == sum(times) - setup
