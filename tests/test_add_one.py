"""The "Add …" pages can be followed to the letter: their code runs and passes the tests of its table."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import test_compressors
import test_transforms
import test_verify

from hpccomm.collectives import ALGORITHMS
from hpccomm.train.methods import METHODS

DOCS = Path(__file__).parent.parent / "docs"
SCREENS = 130
"""Lines of two screens, about."""


@pytest.fixture
def tables() -> Iterator[None]:
    """The tables as they were before a page added its row."""
    algorithms, methods = dict(ALGORITHMS["allreduce"]), dict(METHODS)
    yield
    for table, rows in ((ALGORITHMS["allreduce"], algorithms), (METHODS, methods)):
        table.clear()
        table.update(rows)


def run_page(name: str) -> ModuleType:
    """All Python blocks of a page, one after the other, in a module of their own."""
    page = (DOCS / name).read_text()
    assert len(page.splitlines()) <= SCREENS
    module = ModuleType(name.replace("-", "_").removesuffix(".md"))
    for match in re.finditer(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        lines = "\n" * page[: match.start(1)].count("\n")  # so that a traceback names the page's line
        exec(compile(lines + match[1], DOCS / name, "exec"), module.__dict__)
    return module


def test_an_algorithm_added_by_its_page_is_verified_priced_drawn_and_run(
    tables: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page("add-an-algorithm.md")
    printed = capsys.readouterr().out
    assert "linear" in printed
    assert "round" in printed
    test_verify.test_every_algorithm_is_right_for_1_to_64_ranks("allreduce", "linear")
    test_verify.test_whoever_keeps_order_for_all_sizes_and_roots_says_so("allreduce", "linear")


@pytest.mark.parametrize("p", [1, 2, 5])
def test_an_added_algorithm_passes_the_tests_of_the_engine(tables: None, p: int) -> None:
    import test_engine

    run_page("add-an-algorithm.md")
    test_engine.test_allreduce_sums_every_rank_once_at_every_length("linear", p)


COMPRESSOR_TESTS: list[Callable[..., None]] = [
    test_compressors.test_after_a_thousand_steps_nothing_is_lost,
    test_compressors.test_encoding_depends_on_its_arguments_and_writes_none_of_them,
    test_compressors.test_decoding_adds_in_order,
    test_compressors.test_messages_of_another_compressor_are_refused,
]


def test_a_compressor_added_by_its_page_passes_the_tests_of_all_compressors() -> None:
    compressor = run_page("add-a-compressor.md").topk_blocks(0.25)
    for n in test_compressors.LENGTHS:
        test_compressors.test_what_is_kept_is_what_the_message_does_not_say(compressor, n)
    for check in COMPRESSOR_TESTS:
        check(compressor)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_an_optimizer_added_by_its_page_passes_the_tests_of_all_transforms(
    tables: None, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    module = run_page("add-an-optimizer.md")
    monkeypatch.setitem(test_transforms.ALL, "lion", module.scale_by_lion())
    test_transforms.test_neither_gradient_nor_weights_nor_state_is_written("lion")
    test_transforms.test_steps_have_the_dtype_and_shape_of_the_weights("lion", dtype)
    assert "lion" in METHODS
