"""What README and the first page say of speed is what the files of measurements say."""

from __future__ import annotations

import re

import pytest

from benchmarks import readme


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_figures_of_a_page_are_those_of_the_measurements(page: str) -> None:
    text = (readme.ROOT / page).read_text(encoding="utf-8")
    assert readme.rewrite(text) == text


def test_a_figure_that_was_changed_by_hand_is_found() -> None:
    text = (readme.ROOT / "README.md").read_text(encoding="utf-8")
    cell = readme.table().split("|")[2].strip()
    for before, after in ((f"| 2, 4 | {cell} |", "| 2, 4 | 99 |"), (f"{readme.ranges()[1].split()[0]} to", "0.99 to")):
        assert before in text
        assert readme.rewrite(text.replace(before, after)) == text


@pytest.mark.parametrize(
    ("us", "text"),
    [(0.7863, "0.786"), (17.02, "17"), (999.4, "999"), (999.6, "1,000"), (7120.4, "7,120"), (100_140.0, "100,100")],
)
def test_times_have_three_or_four_digits(us: float, text: str) -> None:
    assert readme.digits(us) == text


def test_the_worst_program_is_named() -> None:
    """No result is left out because it is bad."""
    least = float(readme.ranges()[1].split()[0])
    assert re.search(rf"\b{least:.2f} to", (readme.ROOT / "README.md").read_text(encoding="utf-8"))
