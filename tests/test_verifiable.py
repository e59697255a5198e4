"""What the tests use: inputs whose reductions are exact in any order, collective assertions, the choice of --quick."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Share, choose_slow
from verifiable import DTYPES, FOLDS, collective_assert, operand, operations, reduction

SIZES = (1, 2, 3, 4, 7, 47, 64)
CASES = [(dtype, op) for dtype in DTYPES for op in operations(dtype)]


def reduce_in_pairs(op: str, parts: list[Any]) -> Any:
    """Reduce neighbours, then neighbours of the results."""
    while len(parts) > 1:
        parts = [FOLDS[op](*parts[k : k + 2]) if k + 1 < len(parts) else parts[k] for k in range(0, len(parts), 2)]
    return parts[0]


@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_every_order_gives_the_same_bits_and_none_overflows(dtype: str, op: str) -> None:
    for size in SIZES:
        for n in (0, 1, 100):
            parts = [operand(rank, size, n, dtype, op) for rank in range(size)]
            want = reduction(size, n, dtype, op)
            assert want.dtype == np.dtype(dtype)
            assert want.shape == (n,)
            for arranged in (parts[::-1], parts[size // 2 :] + parts[: size // 2], parts[::2] + parts[1::2]):
                assert np.array_equal(reduce_in_pairs(op, arranged).astype(dtype), want)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "?"])
def test_sums_and_products_are_those_of_exact_arithmetic(dtype: str) -> None:
    for size in SIZES:
        for op, start in (("sum", 0), ("prod", 1)):
            exact = np.full(20, complex(start) if dtype[0] == "c" else Fraction(start), object)
            for rank in range(size):
                part = operand(rank, size, 20, dtype, op)
                as_exact = part.astype(complex) if dtype[0] == "c" else [Fraction(x) for x in part.tolist()]
                exact = FOLDS[op](exact, np.array(as_exact, object))
            assert reduction(size, 20, dtype, op).tolist() == exact.tolist()


@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_a_rank_that_is_left_out_or_counted_twice_changes_the_result(dtype: str, op: str) -> None:
    idempotent = op in ("min", "max", "land", "lor", "band", "bor")
    for size in (2, 3, 4, 7):
        parts = [operand(rank, size, 1000, dtype, op) for rank in range(size)]
        want = reduction(size, 1000, dtype, op)
        for rank in range(size):
            without = reduce_in_pairs(op, [*parts[:rank], *parts[rank + 1 :]]).astype(dtype)
            assert size == 1 or not np.array_equal(without, want), "left out"
            if not idempotent:
                assert not np.array_equal(FOLDS[op](want, parts[rank]).astype(dtype), want), "twice"


@pytest.mark.parametrize(("dtype", "op"), CASES)
def test_operands_differ_between_ranks_and_between_positions(dtype: str, op: str) -> None:
    for size in (2, 3, 4, 7):
        parts = [operand(rank, size, 1000, dtype, op) for rank in range(size)]
        assert len({part.tobytes() for part in parts}) == size
        assert not np.array_equal(parts[0][:-1], parts[0][1:])


@pytest.mark.parametrize("dtype", ["i4", "i8", "u4", "f4", "f8"])
def test_neighbouring_positions_and_ranks_always_differ_in_wide_dtypes(dtype: str) -> None:
    for size in SIZES:
        rows = [operand(rank, size, 1000, dtype) for rank in range(size)]
        assert all((a != b).all() for a, b in pairwise(rows))
        assert all((row[1:] != row[:-1]).all() for row in rows)


@pytest.mark.mpi
def test_mpi_gives_the_expected_reductions(comm: Any) -> None:
    from mpi4py import MPI

    for dtype, op in CASES:
        out = np.empty(33, dtype)
        MPI.Intracomm.Allreduce(comm, operand(comm.rank, comm.size, 33, dtype, op), out, getattr(MPI, op.upper()))
        collective_assert(comm, np.array_equal(out, reduction(comm.size, 33, dtype, op)), f"{op} of {dtype}: {out}")


@pytest.mark.mpi
def test_a_collective_assertion_fails_on_every_rank_and_names_the_failing_ranks(comm: Any) -> None:
    collective_assert(comm, True, "never seen")
    with pytest.raises(AssertionError) as caught:
        collective_assert(comm, comm.rank % 2, f"{comm.rank} is even")
    lines = [f"rank {rank} of {comm.size}: {rank} is even" for rank in range(0, comm.size, 2)]
    assert str(caught.value) == "\n".join(lines)


@pytest.mark.mpi
def test_hypothesis_shrinks_a_failure_on_all_ranks_together(comm: Any) -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    seen = []

    @given(st.integers(0, 1000))
    def fails_on_the_last_rank(n: int) -> None:
        seen.append(n)
        collective_assert(comm, not (n >= 38 and comm.rank == comm.size - 1), f"n = {n}")

    with pytest.raises(AssertionError, match="n = 38"):
        fails_on_the_last_rank()
    assert len(set(comm.allgather(tuple(seen)))) == 1


class Row:
    """A test that is marked slow."""

    def __init__(self, nodeid: str, **keep: int) -> None:
        self.nodeid, self.keep = nodeid, keep

    def get_closest_marker(self, name: str) -> Any:
        return SimpleNamespace(kwargs=self.keep)


@pytest.mark.parametrize(
    ("keeps", "kept"),
    [
        ({"a[1]": 0, "a[2]": 0}, []),
        ({"a[1]": 1, "a[2]": 1, "b": 1}, ["a[1]"]),
        ({"a[1]": 2, "a[2]": 2, "b": 2}, ["a[1]", "b"]),
        ({"a": 0, "b[1]": 2, "b[2]": 2}, ["b[1]", "b[2]"]),
        ({"a[1]": 3, "a[2]": 3, "b": 3}, ["a[1]", "b", "a[2]"]),
    ],
)
def test_quick_keeps_a_row_of_each_slow_test_before_a_second_one_of_any(keeps: dict[str, int], kept: list[str]) -> None:
    rows: Any = [Row(name, **({"keep": keep} if keep else {})) for name, keep in keeps.items()]
    assert [row.nodeid for row in choose_slow(rows)] == kept


def test_processes_share_tests_by_file_and_world_size(tmp_path: Path) -> None:
    """Each group is run by one of them, whole, whoever comes first."""

    def item(file: str, size: int = 0) -> Any:
        made = SimpleNamespace(path=Path(file), get_closest_marker=lambda name: name == "mpi" and size)
        made.callspec = SimpleNamespace(params={"ranks": size} if size else {})
        return made

    items = [item("test_a.py"), item("test_b.py"), item("test_b.py"), item("test_a.py", 2), item("test_b.py", 2)]
    first, second = Share(tmp_path), Share(tmp_path)
    pairs = zip(items, reversed(items), strict=True)
    taken = [(first.pytest_runtest_protocol(a), second.pytest_runtest_protocol(b)) for a, b in pairs]
    assert taken == [(None, None), (None, None), (None, True), (True, True), (True, True)]
