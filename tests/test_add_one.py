"""The "Add …" pages can be followed to the letter: their code runs and passes the tests of its table."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_communicator
import test_compressors
import test_engine
import test_transforms
import test_verify

from hpccomm import Communicator, MismatchError
from hpccomm.backends.table import BACKENDS
from hpccomm.collectives import ALGORITHMS
from hpccomm.train.methods import METHODS

DOCS = Path(__file__).parent.parent / "docs"
TWO_SCREENS = 130
"""Lines."""


@pytest.fixture
def tables() -> Iterator[None]:
    """The tables as they were before a page added its row."""
    known: list[dict[str, Any]] = [ALGORITHMS["allreduce"], METHODS, BACKENDS]
    copies = [dict(each) for each in known]
    yield
    for table, rows in zip(known, copies, strict=True):
        table.clear()
        table.update(rows)


def run_page(name: str) -> ModuleType:
    """All Python blocks of a page, one after the other, in a module of their own."""
    page = (DOCS / name).read_text()
    module = ModuleType(name.replace("-", "_").removesuffix(".md"))
    for match in re.finditer(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        lines = "\n" * page[: match.start(1)].count("\n")  # so that a traceback names the page's line
        exec(compile(lines + match[1], DOCS / name, "exec"), module.__dict__)
    return module


def run_table_tests(module: ModuleType, table: Any, **row: Any) -> int:
    """Call every test of a module that is parametrized by ``table`` with one more row; how many tests there are."""
    count = 0
    for name, function in vars(module).items():
        marks = [each for each in getattr(function, "pytestmark", []) if each.name == "parametrize"]
        others = [each for each in marks if each.args[1] is not table]
        known = {*row, *(each.args[0] for each in others if isinstance(each.args[0], str))}
        if (
            not name.startswith("test_")
            or len(marks) == len(others)
            or not known >= {*inspect.signature(function).parameters}
        ):
            continue
        count += 1
        for values in itertools.product(*(each.args[1] for each in others)):
            function(**row, **dict(zip((each.args[0] for each in others), values, strict=True)))
    return count


@pytest.mark.parametrize("page", sorted(each.name for each in DOCS.glob("add-*.md")))
def test_a_page_has_two_screens(page: str) -> None:
    assert len((DOCS / page).read_text().splitlines()) <= TWO_SCREENS


def test_an_algorithm_added_by_its_page_is_verified_priced_drawn_and_run(
    tables: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_page("add-an-algorithm.md")
    printed = capsys.readouterr().out
    assert "linear" in printed
    assert "round" in printed


def test_an_algorithm_added_by_its_page_passes_the_tests_of_all_algorithms(tables: None) -> None:
    run_page("add-an-algorithm.md")
    assert run_table_tests(test_verify, test_verify.EVERY, collective="allreduce", name="linear") > 1
    assert run_table_tests(test_engine, ALGORITHMS["allreduce"], name="linear") > 0


def test_a_compressor_added_by_its_page_passes_the_tests_of_all_compressors() -> None:
    compressor = run_page("add-a-compressor.md").topk_blocks(0.25)
    assert run_table_tests(test_compressors, test_compressors.ALL, compressor=compressor) > 3


def test_an_optimizer_added_by_its_page_passes_the_tests_of_all_transforms(
    tables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = run_page("add-an-optimizer.md")
    monkeypatch.setitem(test_transforms.ALL, "lion", module.scale_by_lion())
    assert run_table_tests(test_transforms, test_transforms.ALL, name="lion") > 1
    assert "lion" in METHODS


@pytest.mark.mpi(sizes=(1, 2, 3, 5), timeout=120)
def test_a_backend_added_by_its_page_passes_the_tests_of_all_algorithms(tables: None, comm: Any) -> None:
    run_page("add-a-backend.md")
    ours = Communicator(comm.Dup())
    assert "rank_order" in ours.algorithms("allreduce")
    for n, dtype, op in ((0, "f8", "sum"), (7, "i1", "bxor"), (7, "c16", "sum"), (1000, "f4", "max")):
        test_communicator.check_allreduce(ours, n, dtype, op)
    for name in ("test_a_user_defined_operation_works_with_every_algorithm",):
        getattr(test_communicator, name)(ours)
    for dtype in test_communicator.HALVES:
        test_communicator.test_a_nan_of_any_rank_stays_in_minimum_and_maximum(ours, dtype)
    ours.Free()


@pytest.mark.mpi(sizes=(2, 3))
def test_a_backend_added_by_its_page_compares_the_calls_of_all_ranks(tables: None, comm: Any) -> None:
    run_page("add-a-backend.md")
    ours = Communicator(comm.Dup(), algorithm="rank_order")
    with pytest.raises(MismatchError, match="make the counts the same on all ranks"):
        ours.Allreduce(test_communicator.np.ones(3 + ours.rank), test_communicator.np.ones(3 + ours.rank))
    x = test_communicator.np.ones(3)
    ours.Allreduce(x, y := x * 0)
    assert y.tolist() == [ours.size] * 3
    ours.Free()
