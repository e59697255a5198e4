"""The five complete programs of the documentation run and reach what they print."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hpccomm.testing.jobs import run_under_mpi

pytestmark = pytest.mark.slow(keep=1)

FOLDER = Path(__file__).parent.parent / "examples/complete"
PAGE = Path(__file__).parent.parent / "docs/complete-programs.md"


def run(name: str, cwd: Path, *words: str, ranks: int = 2) -> str:
    done = run_under_mpi(ranks, str(FOLDER / name), *words, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1].replace(",", ""))


def test_the_calls_of_mpi4py(tmp_path: Path) -> None:
    said = run("mpi4py_calls.py", tmp_path)
    assert abs(number(r"mean ([\d.]+)", said) - 3) < 0.05  # the standard error is 0.0045
    assert abs(number(r"([\d.]+)% lie", said) - 68.3) < 1


def test_compressed_sgd_resumes_with_the_same_weights(tmp_path: Path) -> None:
    run("compressed_sgd.py", tmp_path, "--steps", "60")
    run("compressed_sgd.py", tmp_path, "--steps", "120")
    said = run("compressed_sgd.py", tmp_path, "--steps", "120", "--folder", "straight")
    assert "step 120" in said
    assert number(r"sent ([\d,]+) bytes", said) < 0.2 * number(r"themselves have ([\d,]+)", said)
    for rank in range(2):
        resumed, straight = (
            np.load(next((tmp_path / folder).glob(f"run.*.{rank}of2.npz"))) for folder in ("saved", "straight")
        )
        np.testing.assert_array_equal(resumed["weights"], straight["weights"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_block_momentum_finds_the_truth(ranks: int, tmp_path: Path) -> None:
    said = run("block_momentum.py", tmp_path, ranks=ranks)
    assert number(r"largest error ([\d.]+)", said) < 0.2  # all start 1 away from it


@pytest.mark.parametrize("ranks", [2, 4])
def test_two_groups_of_ranks_learn_together(ranks: int, tmp_path: Path) -> None:
    said = run("sharded_groups.py", tmp_path, ranks=ranks)
    assert f"2 groups of {ranks // 2}" in said
    assert number(r"after 60 steps ([\d.]+)", said) < 0.5 * number(r": loss ([\d.]+)", said)


def test_lamb_leaves_biases_alone(tmp_path: Path) -> None:
    said = run("large_batches.py", tmp_path)
    assert "w: decays True, adapts True" in said
    assert "b: decays False, adapts False" in said
    assert number(r"of b ([\d.]+)", said) < 0.2


def test_the_page_shows_every_program() -> None:
    shown = set(re.findall(r"literalinclude} \.\./examples/complete/(\w+\.py)", PAGE.read_text()))
    assert shown == {file.name for file in FOLDER.glob("*.py")}
