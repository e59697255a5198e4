"""The compiled reductions give the bits of the reference; many processes may compile at the same time."""

from __future__ import annotations

import itertools
import operator
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm.kernels.dispatch import FAMILIES
from hpccomm.kernels.reductions.reference import (
    DTYPES,
    HALVES,
    INDEX,
    PAIRS,
    VALUE,
    code_of,
    has_kernel,
    narrow,
    reduce,
    storage,
    widen,
)
from hpccomm.kernels.shared_memory import memory

CASES = [(op, code) for op, codes in DTYPES.items() for code in codes]


def numbers(code: str, n: int, seed: int) -> np.ndarray:
    """Any bits for integers; small and large numbers, infinities and NaNs for floats."""
    rng = np.random.default_rng(seed)
    dtype = storage(code)
    if code in PAIRS:
        made = rng.integers(0, 256, n * dtype.itemsize, np.uint8).view(dtype)  # the gaps differ as well
        made[VALUE], made[INDEX] = rng.integers(-2, 3, n), rng.integers(-2, 3, n)
        if dtype[VALUE].kind == "f":
            made[VALUE][rng.random(n) < 0.1] = np.nan
        return made
    if dtype.kind in "iu" and code != "bf16":
        return rng.integers(0, 256, n * dtype.itemsize, np.uint8).view(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, n).astype(bool)
    if dtype.kind == "c":
        return (rng.integers(-9, 9, n) + 1j * rng.integers(-9, 9, n)).astype(dtype)
    values = rng.normal(size=n) * 10.0 ** rng.integers(-6, 5, n)
    values[rng.random(n) < 0.01] = np.nan
    values[rng.random(n) < 0.01] = np.inf
    with np.errstate(over="ignore"):
        return narrow(values.astype("f4"), code) if code == "bf16" else values.astype(dtype)


def call_fold(op: str, code: str, vectors: list[np.ndarray], out: np.ndarray, first: int = 0) -> None:
    """Call the C function as the collectives do."""
    import ctypes

    from hpccomm.kernels import objects

    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(objects.fold(op, code))
    table = np.array([vector.ctypes.data for vector in vectors])
    function(table.ctypes.data, len(vectors), first, out.ctypes.data, out.size)


def has_same_bits(a: np.ndarray, b: np.ndarray, code: str) -> bool:
    """Equal bits, where all NaNs count as equal."""
    if code == "bf16":
        a, b = widen(a, code), widen(b, code)
    if code in PAIRS:
        return np.array_equal(a[INDEX], b[INDEX]) and np.array_equal(a[VALUE], b[VALUE], equal_nan=True)
    return np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")


@pytest.mark.parametrize(("op", "code"), CASES)
def test_compiled_reductions_equal_numpy(op: str, code: str) -> None:
    for k, n in ((2, 1), (2, 5000), (3, 2049), (5, 333)):
        vectors = [numbers(code, n, seed) for seed in range(k)]
        expected, out = np.empty(n, storage(code)), np.empty(n, storage(code))
        with np.errstate(all="ignore"):
            reduce(op, "bfloat16" if code == "bf16" else code, vectors, expected)
        call_fold(op, code, vectors, out)
        assert has_same_bits(out, expected, code), (k, n)


NAN = float("nan")


@pytest.mark.parametrize(
    ("op", "given", "expected"),
    [
        ("minloc", [(3, 2), (1, 9), (1, 4), (2, 0)], (1, 4)),
        ("maxloc", [(3, 2), (1, 9), (3, -7), (2, 0)], (3, -7)),
        ("minloc", [(-1, 0), (NAN, 5), (NAN, 3), (0, 1)], (NAN, 3)),
        ("maxloc", [(NAN, 5), (9, 0), (NAN, 7), (9, 1)], (NAN, 5)),
    ],
)
def test_equal_values_and_nan_give_the_lowest_index_in_any_order(op: str, given: Any, expected: Any) -> None:
    for order in itertools.permutations(given):
        vectors = [np.array([pair], PAIRS["DOUBLE_INT"]) for pair in order]
        compiled, numpy = (np.empty(1, PAIRS["DOUBLE_INT"]) for _ in range(2))
        call_fold(op, "DOUBLE_INT", vectors, compiled)
        reduce(op, "DOUBLE_INT", vectors, numpy)
        for found in (compiled, numpy):
            assert np.array_equal([*found[0].item()], expected, equal_nan=True)


def test_a_reduction_of_pairs_leaves_the_bytes_between_them() -> None:
    pair = PAIRS["DOUBLE_INT"]
    out = np.full(3 * pair.itemsize, 0xEE, "u1")
    call_fold("minloc", "DOUBLE_INT", [numbers("DOUBLE_INT", 3, seed) for seed in range(2)], out.view(pair))
    assert (out.reshape(3, -1)[:, 12:] == 0xEE).all()


def test_pairs_are_laid_out_as_mpi_lays_them_out() -> None:
    for name, pair in PAIRS.items():
        datatype = getattr(MPI, name)
        assert (pair.itemsize, sum(pair[k].itemsize for k in range(2))) == (datatype.extent, datatype.size), name


@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_result_may_replace_any_source(position: int) -> None:
    vectors = [numbers("f8", 5000, seed) for seed in range(3)]
    expected = (vectors[0] + vectors[1]) + vectors[2]
    call_fold("sum", "f8", vectors, vectors[position])
    assert np.array_equal(vectors[position], expected, equal_nan=True)


def test_a_reduction_may_begin_at_any_element_and_be_empty() -> None:
    a, b, out = np.arange(10.0), np.arange(10.0), np.zeros(3)
    call_fold("sum", "f8", [a, b], out, first=4)
    assert out.tolist() == [8, 10, 12]
    call_fold("sum", "f8", [a, b], out[:0])
    assert out.tolist() == [8, 10, 12]


@pytest.mark.parametrize("code", HALVES)
def test_every_16_bit_float_is_read_and_written_exactly(code: str) -> None:
    words = np.arange(1 << 16, dtype="u2")
    nothing = np.full(1 << 16, 0x8000, "u2")  # -0 + x is x, also for x = -0
    out = np.empty_like(words)
    call_fold("sum", code, [words.view(storage(code)), nothing.view(storage(code))], out.view(storage(code)))
    assert has_same_bits(out.view(storage(code)), words.view(storage(code)), code)


def test_float16_without_hardware_conversion_gives_the_same_bits() -> None:
    """Processors without such an instruction convert by arithmetic."""
    import ctypes

    from numba import cfunc, types

    from hpccomm.kernels.reductions import loops

    loop = loops.reduction(operator.add, loops.from_half, loops.to_half)
    function = cfunc(loops.signature_of(types.uint16))(loop)
    with np.errstate(all="ignore"):
        vectors = [numbers("f2", 100_000, seed) * np.float16(1000 if seed else 1e-3) for seed in range(2)]
    vectors[0][: 1 << 16] = np.arange(1 << 16, dtype="u2").view("f2")
    expected, out = np.empty(100_000, "f2"), np.empty(100_000, "f2")
    with np.errstate(all="ignore"):
        reduce("sum", "f2", vectors, expected)
    table = np.array([vector.ctypes.data for vector in vectors])
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(function.address)(table.ctypes.data, 2, 0, out.ctypes.data, out.size)
    assert has_same_bits(out, expected, "f2")


@pytest.mark.parametrize("code", HALVES)
def test_16_bit_sums_are_rounded_once(code: str) -> None:
    one, tiny = (1.0, 2.0**-12) if code == "f2" else (1.0, 2.0**-9)
    values = [one, tiny, tiny, tiny, tiny, tiny]  # each alone is rounded away
    vectors = [narrow(np.full(4, v, "f4"), code) for v in values]
    out = np.empty(4, storage(code))
    call_fold("sum", code, vectors, out)
    assert (widen(out, code) > 1).all()
    reference = np.empty_like(out)
    reduce("sum", "bfloat16" if code == "bf16" else code, vectors, reference)
    assert np.array_equal(out, reference)


def test_minimum_and_maximum_return_nan_for_a_nan_in_any_source() -> None:
    for op in ("min", "max"):
        for position in range(3):
            vectors = [np.full(8, float(k)) for k in range(3)]
            vectors[position][5] = np.nan
            out = np.empty(8)
            call_fold(op, "f8", vectors, out)
            assert np.isnan(out).tolist() == [k == 5 for k in range(8)]


def test_bfloat16_is_accepted_by_name_and_by_dtype() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert code_of("bfloat16") == code_of(np.dtype(ml_dtypes.bfloat16)) == "bf16"
    values = np.linspace(-3, 3, 1001).astype("f4")
    expected = values.astype(ml_dtypes.bfloat16).view("u2")
    assert np.array_equal(narrow(values, "bf16"), expected)


def test_operations_without_a_kernel_are_reported() -> None:
    assert has_kernel("sum", np.float32)
    assert not has_kernel("sum", np.longdouble)
    assert not has_kernel("sum", ">f4")
    assert not has_kernel("min", np.complex128)
    assert not has_kernel("band", np.float32)
    assert not has_kernel("user-defined", np.float32)


def test_python_and_compiled_code_agree_on_words_and_clocks() -> None:
    import numba

    from hpccomm.kernels import intrinsics

    words = np.zeros(16, np.int64)
    address = words.ctypes.data

    @numba.njit
    def write(address: int) -> int:
        intrinsics.store(address, 7)
        intrinsics.store_release(address + 8, intrinsics.load(address) + 1)
        intrinsics.copy(address + 16, address, 16)
        intrinsics.copy_nontemporal(address + 32, address, 32)
        return intrinsics.load_acquire(address + 8) + 0 * intrinsics.nanoseconds()

    assert write(address) == memory.load_acquire(address + 8) == 8
    assert words.tolist() == [7, 8, 7, 8, 7, 8, 7, 8] + 8 * [0]


def test_nontemporal_copies_are_exact_at_any_alignment() -> None:
    import numba

    from hpccomm.kernels import intrinsics

    @numba.njit
    def move(to: int, source: int, nbytes: int) -> None:
        intrinsics.copy_nontemporal(to, source, nbytes)

    source = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    for shift in (0, 1, 7, 63):
        for n in (0, 1, 63, 64, 65, 200, 900):
            to = np.zeros(1000, np.uint8)
            move(to.ctypes.data + shift, source.ctypes.data + 3, n)
            assert np.array_equal(to[shift : shift + n], source[3 : 3 + n])
            assert not to[:shift].any()
            assert not to[shift + n :].any()


@pytest.mark.parametrize(
    "module",
    [
        *[f"{family}.reference" for family in (*FAMILIES, "optimizers", "reductions")],
        "shared_memory.collectives",
        "dispatch",
    ],
)
def test_references_load_without_numba(module: str) -> None:
    code = f"import hpccomm.kernels.{module}, sys; assert not {{'numba', 'llvmlite'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("how", ["absent", "refuses NumPy"])
def test_methods_work_where_numba_cannot_be_imported(how: str) -> None:
    code = f"""
import importlib.abc, importlib.machinery, sys
class Numba(importlib.abc.Loader, importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "numba" else None
    def exec_module(self, module):
        raise ImportError("Numba needs NumPy 2.3 or less")
if {how == "absent"}:
    sys.modules["numba"] = None
else:
    sys.meta_path.insert(0, Numba())
import hpccomm, numpy as np
from hpccomm.testing.ranks import run_on_ranks
bucket = hpccomm.Bucket({{"w": (40, 50)}})
def step(comm):
    for method in (hpccomm.lars(bucket, 0.1), hpccomm.lamb(bucket, 0.1), hpccomm.gtc(comm), hpccomm.dgc(comm, bucket),
                   hpccomm.onebit_sgd(comm, bucket), hpccomm.feedback(hpccomm.qsgd(4), comm)):
        weights = np.ones(2000, "f4")
        method.update(weights, method.init(weights), weights)
run_on_ranks(2, step)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
