"""The CUDA kernels: NVRTC compiles every source, and the same sources, compiled for this processor (``cuda_on_cpu.h``),
give the NumPy references' bits; where there is a device, there too.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import Emulated
from test_compression_kernels import LENGTHS, has_same_bits, numbers

from benchmarks import gpu
from hpccomm.kernels import cuda
from hpccomm.kernels.cuda import ARCHITECTURES, OPTIONS, Kernels, every_reduction, reduction_source, source
from hpccomm.kernels.dispatch import load_kernels
from hpccomm.kernels.optimizers import reference
from hpccomm.kernels.reductions.reference import DTYPES, HALVES, reduce, widen
from hpccomm.transports.cuda import unavailable_reason

F32 = np.float32

COMPRESSION = load_kernels("reference")
SOURCES = ("reductions", "compression", "optimizers")


# NVRTC


def nvrtc_library() -> Path | None:
    """The path of NVRTC in an installed NVIDIA wheel."""
    spec = importlib.util.find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [each for folder in folders for each in Path(folder).glob("*/lib/libnvrtc.so.*")]
    return max(found, default=None)


class Nvrtc:
    """The functions of NVRTC that compile a source."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))

    def call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.library, name)(*arguments))

    def compile(self, text: str, architecture: str) -> tuple[bytes, str]:
        """Machine code (empty after an error), and the compiler log."""
        program = ctypes.c_void_p()
        assert not self.call("nvrtcCreateProgram", ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
        options = [f"--gpu-architecture={architecture}".encode(), *(each.encode() for each in OPTIONS)]
        failed = self.call("nvrtcCompileProgram", program, len(options), (ctypes.c_char_p * len(options))(*options))
        said = self.read(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
        code = b"" if failed else self.read(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return code, said

    def read(self, program: ctypes.c_void_p, size_of: str, read: str) -> bytes:
        size = ctypes.c_size_t()
        assert not self.call(size_of, program, ctypes.byref(size))
        octets = ctypes.create_string_buffer(size.value)
        assert not self.call(read, program, octets)
        return octets.raw


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    path = nvrtc_library()
    if path is None:
        pytest.skip("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    return Nvrtc(path)


EVERY_TYPE = [(op, code) for op, code in every_reduction() if op == "sum" or code in ("i4", "f4", "b1", "c8")]
"""Each operation and each dtype at least once: all pairs take half a minute."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SOURCES)
def test_every_source_compiles(nvrtc: Nvrtc, name: str, architecture: str) -> None:
    text = reduction_source(*EVERY_TYPE) if name == "reductions" else source(name)
    code, said = nvrtc.compile(text, architecture)
    assert code[:4] == b"\x7fELF", said
    assert "warning" not in said, said


def test_compile_errors_name_file_and_line(nvrtc: Nvrtc) -> None:
    code, said = nvrtc.compile(source("compression").replace("float tau;", "flaot tau;", 1), "sm_90")
    assert not code
    line = (
        source.__wrapped__("compression").split('#line 1 "compression.cu"\n')[1].split("float tau;")[0].count("\n") + 1
    )
    assert f"compression.cu({line})" in said


def test_every_operation_and_dtype_has_a_name_in_the_source() -> None:
    assert set(cuda.COMBINE) == {op for op in DTYPES if not op.endswith("loc")}
    assert set(cuda.ELEMENT) == {code for op in cuda.COMBINE for code in DTYPES[op]}


# The same sources on this processor


class DeviceKernels:
    """The kernels on the device, for NumPy arrays: copied to the device before a call and back after it."""

    def __init__(self) -> None:
        self.kernels = cuda.kernels()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            there: dict[int, tuple[np.ndarray, Any]] = {}
            answer = getattr(self.kernels, name)(*self.moved(list(given), there), **named)
            for here, copy in there.values():
                here[...] = copy.get()
            return self.brought(answer)

        return call

    def to_device(self, x: Any, there: dict[int, tuple[np.ndarray, Any]]) -> Any:
        """Copy all vectors in lists and tuples, each once; tables of bounds stay on the host."""
        if isinstance(x, list | tuple):
            return type(x)(self.moved(each, there) for each in x)
        if isinstance(x, np.ndarray) and x.ndim == 1:
            return there.setdefault(id(x), (x, self.kernels.xp.asarray(x)))[1]
        return x

    def to_host(self, x: Any) -> Any:
        """Copy all vectors in tuples to the host."""
        if isinstance(x, tuple):
            return tuple(self.brought(each) for each in x)
        return x.get() if hasattr(x, "get") else x


PLACES = ["processor"] if unavailable_reason() else ["processor", "device"]


@pytest.fixture(scope="module", params=PLACES)
def kernels(request: pytest.FixtureRequest) -> Any:
    if request.param == "device":
        return DeviceKernels()
    return Kernels(Emulated())


def copy_arrays(arguments: Sequence[Any]) -> list[Any]:
    return [each.copy() if isinstance(each, np.ndarray) else each for each in arguments]


def agree(kernels: Kernels, reference: Any, name: str, *arguments: Any, **named: Any) -> Any:
    """Assert that results and written arrays equal the reference bit for bit; returns the result."""
    mine, theirs = copy_arrays(arguments), copy_arrays(arguments)
    answer, expected = getattr(kernels, name)(*mine, **named), getattr(reference, name)(*theirs, **named)
    compare(answer, expected, name)
    for ours, wanted in zip(mine, theirs, strict=True):
        if isinstance(ours, np.ndarray):
            compare(ours, wanted, name)
    return answer


def compare(ours: Any, wanted: Any, name: str) -> None:
    if isinstance(wanted, tuple):
        assert len(ours) == len(wanted)
        for a, b in zip(ours, wanted, strict=True):
            compare(a, b, name)
    elif isinstance(wanted, np.ndarray):
        assert has_same_bits(ours, wanted), name
    elif isinstance(wanted, float):
        assert float(ours).hex() == wanted.hex(), name
    else:
        assert ours == wanted, name


# Reductions


def elements(code: str, n: int, seed: int) -> np.ndarray:
    """Arbitrary bits with one NaN pattern; small integers for complex numbers."""
    rng = np.random.default_rng([seed, n])
    dtype = np.dtype("u2" if code == "bf16" else code)
    octets = rng.integers(0, 256, n * dtype.itemsize, np.uint8)
    if code == "b1":
        return (octets & 1).view("b1")
    if code == "bf16":
        return np.where((octets.view(dtype) & 0x7F80) == 0x7F80, 0x7FC0, octets.view(dtype)).astype("u2")
    x = octets.view(dtype).copy()
    if dtype.kind == "c":  # NumPy fuses some products of complex numbers, so they have to be exact
        return (rng.integers(-9, 9, n) + 1j * rng.integers(-9, 9, n)).astype(dtype)
    if dtype.kind == "f":
        x[~np.isfinite(x)] = 3
        x[1::7] = np.inf
        x[::5] = rng.normal(size=len(x[::5]))
        x[2::11] = np.nan
    return x


def unify_nans(x: np.ndarray, code: str) -> np.ndarray:
    """Replace every NaN by the same one."""
    wide = widen(x, code) if code in HALVES else x
    return np.where(np.isnan(wide), np.nan, wide).astype(wide.dtype) if wide.dtype.kind == "f" else x


@pytest.mark.parametrize(("op", "code"), every_reduction())
def test_reductions_equal_numpy(kernels: Kernels, op: str, code: str) -> None:
    dtype = "bfloat16" if code == "bf16" else code
    for n, k, shift in ((0, 2, 0), (1, 3, 0), (37, 1, 0), (301, 2, 0), (300, 5, 1)):
        vectors = [elements(code, n + shift, seed)[shift:] for seed in range(k)]
        expected, out = np.empty_like(vectors[0]), np.empty_like(vectors[0])
        with np.errstate(all="ignore"):
            reduce(op, dtype, vectors, expected)
        kernels.reduce(op, dtype, vectors, out)
        assert has_same_bits(unify_nans(out, code), unify_nans(expected, code)), (n, k)
        kernels.reduce(op, dtype, vectors, vectors[-1])
        assert has_same_bits(unify_nans(vectors[-1], code), unify_nans(expected, code)), (n, k)


@pytest.mark.parametrize("code", HALVES)
def test_every_16_bit_float_is_read_and_written_exactly(kernels: Kernels, code: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view("f2" if code == "f2" else "u2")
    other = np.roll(every, 12345)
    dtype, out, expected = "bfloat16" if code == "bf16" else code, np.empty_like(every), np.empty_like(every)
    with np.errstate(all="ignore"):
        reduce("sum", dtype, [every, other], expected)
    kernels.reduce("sum", dtype, [every, other], out)
    assert has_same_bits(unify_nans(out, code), unify_nans(expected, code))


@pytest.mark.parametrize("task", gpu.TASKS, ids=lambda task: task.title)
def test_every_step_of_the_device_benchmark_runs(kernels: Any, task: gpu.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ELEMENTS", 4104)
    if isinstance(kernels, DeviceKernels):
        task.ours(kernels.kernels.xp, kernels.kernels)()
    else:
        task.ours(np, kernels)()


# Compression


ODD = np.nan, np.inf, -np.inf


@pytest.mark.parametrize("n", [*LENGTHS, 4095, 4096, 4097, 9000])
@pytest.mark.parametrize("pending", [False, True])
def test_threshold_compaction_equals_the_reference(kernels: Kernels, n: int, pending: bool) -> None:
    residual, gradient = numbers(n, 1), numbers(n, 2) if pending else None
    for tau in (0.5, 1e-45, 30.0):
        words, finite = agree(kernels, COMPRESSION, "threshold_words", residual, gradient, np.zeros(n, F32), tau)
        assert finite
        agree(kernels, COMPRESSION, "add_words", words, tau, numbers(n, 3))
    in_place = residual.copy()
    kernels.threshold_words(in_place, gradient, in_place, 0.5)
    out = np.empty_like(residual)
    COMPRESSION.threshold_words(residual, gradient, out, 0.5)
    assert has_same_bits(in_place, out)


@pytest.mark.parametrize("bad", ODD)
def test_elements_that_are_not_finite_are_reported(kernels: Kernels, bad: float) -> None:
    for place in (0, 4095, 4096, 8999):
        x = numbers(9000, 4)
        x[place] = bad
        assert not kernels.threshold_words(x, None, np.empty_like(x), 0.5)[1]
        agree(kernels, COMPRESSION, "select_threshold", x, 0.5)
        u, v = numbers(9000, 5), numbers(9000, 6)
        agree(kernels, COMPRESSION, "momentum_select", x, u, v, 0.9, 90)


@pytest.mark.parametrize("n", [0, 1, 9, 4097, 70001])
def test_selection_equals_the_reference(kernels: Kernels, n: int) -> None:
    for k in (1, n // 100 + 1, n // 10 + 1, n + 1):
        for least in (1.0, 0.5):
            agree(kernels, COMPRESSION, "select_largest", numbers(n, 7), k, 3, least)


@pytest.mark.parametrize("n", [1, 9, 4097, 70001])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_momentum_selection_equals_the_reference(kernels: Kernels, n: int, nesterov: bool, mask: bool) -> None:
    vectors = numbers(n, 8), numbers(n, 9, 0.5), numbers(n, 10, 2)
    for k in (1, n // 1000 + 1, n // 4 + 1):
        agree(kernels, COMPRESSION, "momentum_select", *vectors, 0.9, k, nesterov=nesterov, mask=mask, step=k)


def test_a_sampled_threshold_that_is_too_high_is_lowered(kernels: Kernels) -> None:
    n, k = 1 << 16, 300
    plan = COMPRESSION.sample_plan(n, k, 0)
    assert plan is not None
    gradient = np.full(n, 1e-3, F32) * np.arange(n, 0, -1, dtype=F32)
    at = plan.start + np.arange(plan.lines) * plan.stride
    gradient[(at[:, None] + np.arange(16)).ravel()] = 1e6
    zeros = np.zeros(n, F32)
    agree(kernels, COMPRESSION, "momentum_select", gradient, zeros, zeros.copy(), 0.9, k)


@pytest.mark.parametrize("n", LENGTHS)
def test_adding_sparse_vectors_equals_the_reference(kernels: Kernels, n: int) -> None:
    rng = np.random.default_rng(n)
    messages = []
    for _ in range(3):
        index = np.flatnonzero(rng.random(n) < 0.3).astype("u4")
        messages.append((index, rng.normal(size=index.size).astype(F32)))
    ours, wanted = numbers(n, 11), numbers(n, 11)
    kernels.scatter_add(messages, ours)
    COMPRESSION.scatter_add(messages, wanted)
    assert has_same_bits(ours, wanted)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("pending", [False, True])
def test_one_bit_equals_the_reference(kernels: Kernels, n: int, pending: bool) -> None:
    residual, gradient = numbers(n, 12), numbers(n, 13) if pending else None
    agree(kernels, COMPRESSION, "pack_signs", residual)
    bits = np.full(-(-n // 8), 255, np.uint8)
    out = np.zeros(n, F32)
    agree(kernels, COMPRESSION, "pack_signs_feedback", residual, gradient, out, 0.75, -1.25, bits)
    agree(kernels, COMPRESSION, "sum_magnitudes", residual, gradient)
    agree(kernels, COMPRESSION, "sum_by_sign", residual, gradient)
    agree(kernels, COMPRESSION, "moments", residual)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_adding_one_bit_messages_equals_the_reference(kernels: Kernels, n: int, count: int) -> None:
    messages = [(COMPRESSION.pack_signs(numbers(n, k)), 0.1 * k, -0.3 / (k + 1)) for k in range(count)]
    ours, wanted = numbers(n, 14), numbers(n, 14)
    kernels.add_signs(messages, ours)
    COMPRESSION.add_signs(messages, wanted)
    assert has_same_bits(ours, wanted)
    bits = [each for each, _, _ in messages]
    assert has_same_bits(kernels.majority(bits, n), COMPRESSION.majority(bits, n))


def test_compaction_is_right_however_blocks_are_delayed(kernels: Kernels) -> None:
    x = numbers(24 * 4096, 15)
    wanted, _ = COMPRESSION.select_threshold(x, 0.5)
    for _ in range(3):
        assert has_same_bits(kernels.select_threshold(x, 0.5)[0], wanted)


# Optimizers


Numbers = Callable[[int, int], np.ndarray]


@cache
def table(lengths: tuple[int, ...]) -> np.ndarray:
    """Bounds of consecutive tensors, with a gap after each."""
    ends = np.cumsum([each + 3 for each in lengths]) - 3
    return np.array([[end - each, end] for each, end in zip(lengths, ends, strict=True)], np.int64).reshape(-1, 2)


TABLES = [(), (1,), (0, 5), (1023, 1, 1024, 1025, 3000)]


@pytest.fixture(params=["f4", "f8"])
def vectors(request: pytest.FixtureRequest) -> Numbers:
    def make(n: int, seed: int) -> np.ndarray:
        return np.random.default_rng([n, seed]).normal(size=n).astype(request.param)

    return make


@pytest.mark.parametrize("lengths", TABLES, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_equals_the_reference(
    kernels: Kernels, vectors: Numbers, lengths: tuple[int, ...], nesterov: bool
) -> None:
    bounds, k = table(lengths), len(lengths)
    n = int(bounds.max(initial=0)) + 2
    w, g, v = (vectors(n, seed) for seed in range(3))
    kind = w.dtype.type
    rates = [np.abs(vectors(k, seed)) for seed in (3, 4, 5)]
    for whose in (reference.GRADIENT, reference.DECAYED_GRADIENT, reference.UPDATE):
        numbers = kind(0.7), kind(0.9), nesterov, whose
        agree(kernels, reference, "lars_sums", w, g, v, bounds, rates[0], *numbers)
    agree(kernels, reference, "sum_of_squares", g)
    numbers = kind(0.7), kind(0.3), kind(0.9), nesterov
    agree(kernels, reference, "lars_step", w, g, v, vectors(n, 6), bounds, *rates, *numbers)
    agree(kernels, reference, "lars_apply", w, g, v, bounds, *rates, *numbers)


@pytest.mark.parametrize("lengths", TABLES, ids=str)
def test_lamb_equals_the_reference(kernels: Kernels, vectors: Numbers, lengths: tuple[int, ...]) -> None:
    bounds, k = table(lengths), len(lengths)
    n = int(bounds.max(initial=0)) + 2
    w, g, m, out = (vectors(n, seed) for seed in (0, 1, 2, 4))
    v, rates, kind = np.abs(vectors(n, 3)), np.abs(vectors(k, 5)), w.dtype.type
    numbers = [kind(each) for each in (0.7, 0.9, 0.1, 0.999, 0.001, 0.19, 0.0019, 1e-6)]
    agree(kernels, reference, "lamb_moments", w, g, m, v, out, bounds, rates, *numbers)
    agree(kernels, reference, "adam_step", w, g, m, v, bounds, rates, *numbers, kind(-0.01))
    agree(kernels, reference, "scale_tensors", out, bounds, rates, kind(-0.1))
    agree(kernels, reference, "add_scaled", w, out, bounds, rates, kind(-0.1))
