"""A reproducible sum has the same bits whatever the order, the algorithm, the placement and the number of ranks."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

import hpccomm
from hpccomm import ArgumentError, Communicator
from hpccomm.kernels.reproducible import exponents, join, limbs, split

FLOATS = (np.dtype("f2"), np.dtype(ml_dtypes.bfloat16), np.dtype("f4"), np.dtype("f8"))
ADDENDS = 12
"""Number of vectors, distributed over the ranks."""
N = 501


def addend(k: int, dtype: Any) -> Any:
    """A vector of mixed magnitudes, so that an ordinary sum depends on the order."""
    drawn = np.random.default_rng(k)
    return (drawn.standard_normal(N) * np.exp2(drawn.integers(-9, 9, N))).astype(dtype)


def exact_sum(values: list[float]) -> Fraction:
    return sum((Fraction(value) for value in values), Fraction(0))


def reproducible_sum(values: list[float], dtype: Any = "f8") -> float:
    """By the module's functions, one vector of one element a value."""
    vectors = [np.array([value], "f8") for value in values]
    e = np.max([exponents(each) for each in vectors], axis=0)
    return float(join(sum(split(each, e, limbs(dtype)) for each in vectors), e)[0])


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30), st.randoms())
def test_single_precision_is_added_nearly_exactly_and_in_any_order(values: list[float], random: Any) -> None:
    """Every operand is rounded once to 46 bits below the largest, and the sum once: so much may be missing."""
    total = reproducible_sum(values, "f4")
    random.shuffle(values)
    assert reproducible_sum(values, "f4") == total
    largest = max(abs(value) for value in values)
    assert (
        abs(Fraction(total) - exact_sum(values))
        <= Fraction(largest) * len(values) / 2**46 + abs(Fraction(total)) / 2**52
    )


@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=30), st.randoms())
def test_double_precision_is_added_nearly_exactly_and_in_any_order(values: list[float], random: Any) -> None:
    total = reproducible_sum(values)
    random.shuffle(values)
    assert reproducible_sum(values) == total
    largest = max(abs(value) for value in values)
    slack = Fraction(largest) * len(values) / 2**91 + abs(Fraction(total)) / 2**51 + Fraction(5e-324)
    assert abs(Fraction(total) - exact_sum(values)) <= slack


def test_cancellation_is_exact_and_special_values_are_kept() -> None:
    assert reproducible_sum([1e20, 1.0, -1e20]) == 1.0
    assert reproducible_sum([0.0, -0.0]) == 0.0
    assert reproducible_sum([5e-324, 5e-324]) == 1e-323
    assert reproducible_sum([1.5]) == 1.5
    assert reproducible_sum([1e300, -1.5e273, -1e300]) == -reproducible_sum([-1e300, 1.5e273, 1e300]) < -1e273
    assert reproducible_sum([math.inf, 1.0]) == math.inf
    assert reproducible_sum([-math.inf] * 3) == -math.inf
    assert math.isnan(reproducible_sum([math.inf, -math.inf]))
    assert math.isnan(reproducible_sum([math.nan, 1.0]))
    assert reproducible_sum([1.7e308, 1.7e308]) == math.inf


def own_addend(comm: Communicator, dtype: Any, seed: int) -> Any:
    """This rank's addend in one random order; zeros if it has none."""
    order = np.random.default_rng(seed).permutation(comm.size)
    return addend(int(order[comm.rank]), dtype) if order[comm.rank] < ADDENDS else np.zeros(N, dtype)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_depend_on_neither_the_order_nor_the_algorithm(comm: Communicator, dtype: Any) -> None:
    parts = [addend(k, dtype).astype("f8") for k in range(comm.size)]
    e = np.max([exponents(each) for each in parts], axis=0)
    want = join(sum(split(each, e, limbs(dtype)) for each in parts), e)
    want = want.astype("f4").astype(dtype) if dtype.itemsize == 2 else want.astype(dtype)
    for seed, algorithm in enumerate(comm.algorithms("allreduce")):
        a, ranks = own_addend(comm, dtype, seed), Communicator(comm, algorithm)
        ranks.Allreduce(a, b := np.empty(N, dtype), reproducible=True)
        assert b.tobytes() == want.tobytes(), algorithm
        assert a.tobytes() == own_addend(comm, dtype, seed).tobytes()
        for _ in range(2):
            a = own_addend(comm, dtype, seed)
            ranks.Allreduce(MPI.IN_PLACE, a, reproducible=True)
            assert a.tobytes() == want.tobytes(), algorithm
        ranks.plans.close()


@pytest.mark.mpi(min_size=2)
def test_ranks_with_zeros_do_not_change_the_bits(comm: Communicator) -> None:
    """The sum over two ranks, and over all."""
    pair = comm.Split(0 if comm.rank < 2 else MPI.UNDEFINED)
    a = addend(comm.rank, "f4") if comm.rank < 2 else np.zeros(N, "f4")
    comm.Allreduce(a, whole := np.empty(N, "f4"), reproducible=True)
    if pair != MPI.COMM_NULL:
        pair.Allreduce(a, two := np.empty(N, "f4"), reproducible=True)
        assert two.tobytes() == whole.tobytes()
        pair.Free()


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["f4", "c16"])
def test_the_other_reductions_give_the_same_bits(comm: Communicator, dtype: str) -> None:
    p, me, n = comm.size, comm.rank, N // comm.size * comm.size
    a = addend(me, "f8").astype(dtype)[:n]
    if dtype == "c16":
        a += 1j * addend(me + 50, "f8")[:n]
    comm.Allreduce(a, want := np.empty(n, dtype), reproducible=True)
    for root in (0, p - 1):
        comm.Reduce(a, b := np.zeros(n, dtype) if me == root else None, root=root, reproducible=True)
        assert b is None or b.tobytes() == want.tobytes()
    mine = want[n // p * me : n // p * (me + 1)]
    comm.Reduce_scatter_block(a, b := np.empty(n // p, dtype), reproducible=True)
    assert b.tobytes() == mine.tobytes()
    counts = [n // p + (k == 0) - (k == p - 1) for k in range(p)] if p > 1 else [n]
    first = sum(counts[:me])
    for given_counts in (counts, None):
        comm.Reduce_scatter(a, b := np.empty(counts[me], dtype), given_counts, reproducible=True)
        assert b.tobytes() == want[first : first + counts[me]].tobytes()
    whole = a.copy()
    comm.Reduce_scatter_block(MPI.IN_PLACE, whole, reproducible=True)
    assert whole[: n // p].tobytes() == mine.tobytes()
    total = hpccomm.allreduce(a.real.astype("f4"), comm=comm, reproducible=True)
    comm.Allreduce(a.real.astype("f4"), again := np.empty(n, "f4"), reproducible=True)
    assert total.tobytes() == again.tobytes()


@pytest.mark.mpi
def test_exact_operations_are_unchanged_and_unsupported_ones_are_refused(comm: Communicator) -> None:
    a = np.arange(10)
    comm.Allreduce(a, b := np.empty_like(a), reproducible=True)
    assert np.array_equal(b, a * comm.size)
    comm.Allreduce(a / 4, c := np.empty(10), MPI.MAX, reproducible=True)
    assert np.array_equal(c, a / 4)
    with pytest.raises(ArgumentError, match="for sums, minima and maxima"):
        comm.Allreduce(a / 4, c, MPI.PROD, reproducible=True)
    with pytest.raises(ArgumentError, match="floats of up to 64 bits"):
        comm.Allreduce(a.astype("g"), np.empty(10, "g"), reproducible=True)
