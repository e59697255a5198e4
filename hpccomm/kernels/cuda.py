"""The kernels on a CUDA device: same functions, same bits as in NumPy, on vectors in device memory.

The sources are the ``.cu`` files beside this one, compiled by NVRTC at the first request and cached on disk by CuPy.
:class:`Kernels` allocates, launches and reads counts through a :class:`Library`, so the same sources and the same code
also run without a device.  Vectors are contiguous and on one device; launches go to the current stream.  A function
that returns a number of elements, a sum or a boolean waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.optimizers.reference import BLOCK, GRADIENT, LANES
from hpccomm.kernels.reductions.reference import DTYPES, code_of, itemsize
from hpccomm.kernels.selection import reference
from hpccomm.kernels.vectors.reference import SUM_LANES

Vector = Any
"""A vector on the device."""

THREADS = 256
TILE = 4096
"""Elements of one block of a selecting kernel."""
BLOCKS_EACH = 32
"""Blocks per multiprocessor in kernels that loop over the elements."""
HEADER_WORDS = 3
"""Words of a selecting kernel's state before those of its tiles."""
OPTIONS = ("--std=c++17", "--fmad=false")
"""Every operation is rounded separately, as in NumPy."""
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""Architectures for which the tests compile every source without a device."""

COMBINE = {
    "sum": "add",
    "prod": "multiply",
    "min": "smaller",
    "max": "larger",
    "land": "logical_and",
    "lor": "logical_or",
    "lxor": "logical_xor",
    "band": "bitwise_and",
    "bor": "bitwise_or",
    "bxor": "bitwise_xor",
}
ELEMENT = {
    "i1": "signed char",
    "i2": "short",
    "i4": "int",
    "i8": "i64",
    "u1": "u8",
    "u2": "u16",
    "u4": "u32",
    "u8": "u64",
    "f4": "float",
    "f8": "double",
    "f2": "half",
    "bf16": "brain",
    "c8": "pair<float>",
    "c16": "pair<double>",
    "b1": "u8",
}
"""Names of operations and dtypes in ``reductions.cu``."""


class Library(Protocol):
    """A library that allocates arrays and launches kernels: CuPy on a device."""

    @property
    def xp(self) -> Any:
        """The array functions: CuPy's, or NumPy's."""

    @property
    def processors(self) -> int:
        """Multiprocessors of the device."""

    def launch(self, source: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """Launch a kernel of a source; arrays are passed as addresses, NumPy scalars by value."""


class CupyLibrary:
    """Kernels compiled by CuPy for the current device."""

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.module = cache(lambda source: cupy.RawModule(code=source, options=OPTIONS))

    @property
    def processors(self) -> int:
        """Multiprocessors of the current device."""
        return int(self.xp.cuda.Device().attributes["MultiProcessorCount"])

    def launch(self, source: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        """Launch a kernel on the current stream."""
        self.module(source).get_function(kernel)((blocks,), (threads,), tuple(arguments))


@cache
def source(name: str) -> str:
    """The text of ``reductions``, ``compression`` or ``optimizers`` for NVRTC; line numbers are those of the file."""
    folder = Path(__file__).parent
    return f'{(folder / "common.cu").read_text()}\n#line 1 "{name}.cu"\n{(folder / f"{name}.cu").read_text()}'


@cache
def reduction_source(*pairs: tuple[str, str]) -> str:
    """The text of ``reductions`` with the kernels of some operations and dtypes, ``("sum", "f4")``."""
    kernels = (f"REDUCTION({op}, {COMBINE[op]}, {code}, {ELEMENT[code]})" for op, code in pairs)
    return "\n".join([source("reductions"), *kernels])


def every_reduction() -> list[tuple[str, str]]:
    """All operations and dtypes that have a kernel."""
    return [(op, code) for op, codes in DTYPES.items() for code in codes if op in COMBINE]


@cache
def kernels() -> Kernels:
    """The kernels of the current device, by CuPy."""
    return Kernels(CupyLibrary())


class Kernels:
    """The functions of the NumPy references on a device: same arguments, vectors on the device."""

    def __init__(self, library: Library) -> None:
        self.library, self.xp = library, library.xp

    def _launch_loop(self, kernel: str, n: int, *arguments: Any, text: str = "") -> None:
        """Launch a kernel, of ``compression`` or of another source text, whose threads loop over n items."""
        if n:
            blocks = min(-(-n // THREADS), BLOCKS_EACH * self.library.processors)
            self.library.launch(text or source("compression"), kernel, blocks, THREADS, arguments)

    # Reductions

    def reduce(self, op, dtype, vectors, out):
        """``out`` may be one of the vectors."""
        self.reduce_at(op, code_of(dtype), [address_of(each) for each in vectors], address_of(out), int(out.size))

    def reduce_at(self, op: str, code: str, vectors: Sequence[int], out: int, n: int) -> None:
        """:meth:`reduce` of vectors given by their addresses, ``n`` elements each."""
        width = 16 // itemsize("bfloat16" if code == "bf16" else code)
        packs = n // width if all(each % 16 == 0 for each in (*vectors, out)) else 0
        self._launch_loop(
            f"{op}_{code}",
            max(packs, n - packs * width),
            self.xp.asarray(np.array(vectors, np.uint64)),
            np.int32(len(vectors)),
            np.uint64(out),
            np.int64(n),
            np.int64(packs),
            text=reduction_source((op, code)),
        )

    # Threshold and selection

    def _select(self, kernel: str, n: int, arguments: Sequence[Any], *dtypes: npt.DTypeLike) -> tuple[list[Any], bool]:
        """The results of a selecting kernel, one array for each dtype, and whether all elements were finite."""
        tiles = -(-n // TILE)
        buffers = [self.xp.empty(n, dtype) for dtype in dtypes]
        state = self.xp.zeros(HEADER_WORDS + tiles, np.uint64)
        if n:
            self.library.launch(
                source("compression"), kernel, tiles, THREADS, (*arguments, *buffers, np.int64(n), state)
            )
        _, count, odd = to_host(state[:HEADER_WORDS]).tolist()
        return [buffer[:count].copy() for buffer in buffers], not odd

    def threshold_words(self, residual, gradient, out, tau):
        """In one pass over the vectors."""
        arguments = residual, null_if_none(gradient), out, np.float32(tau)
        (words,), finite = self._select("threshold_words", residual.size, arguments, np.uint32)
        return words, finite

    def add_words(self, words, tau, out):
        self._launch_loop("add_words", words.size, words, np.int64(words.size), np.float32(tau), out)

    def select_threshold(self, x, threshold):
        (index,), finite = self._select("select_threshold", x.size, (x, np.float32(threshold)), np.uint32)
        return index, finite

    def kth_magnitude(self, values, rank):
        return float(self.xp.sort(self.xp.abs(values))[values.size - rank])

    def sample(self, x, plan):
        found = self.xp.empty(plan.lines * reference.LINE, np.float32)
        places = np.int64(plan.start), np.int64(plan.stride), np.int64(reference.LINE)
        self._launch_loop("sample", found.size, x, *places, found, np.int64(found.size))
        return found

    def keep_largest(self, values, k):
        xp = self.xp
        if values.size <= k:
            return xp.ones(values.size, bool)
        magnitudes = xp.abs(values)
        least = np.float32(self.kth_magnitude(values, k)) if k else np.float32(np.inf)
        kept = magnitudes > least
        kept[xp.flatnonzero(magnitudes == least)[: k - int(xp.count_nonzero(kept))]] = True
        return kept

    def select_largest(self, x, k, step=0, least=1.0):
        plan = reference.sample_plan(x.size, k, step)
        threshold = 0.0 if plan is None else self.kth_magnitude(self.sample(x, plan), plan.rank)
        index, finite = self.select_threshold(x, threshold)
        if not finite:
            return index[:0], False
        index = reference.widen_selection(x, index, threshold, least * k, self.select_threshold)
        return index[self.keep_largest(x[index], k)], True

    def _launch_momentum(self, gradient, momentum, velocity, m, threshold, nesterov, mask):
        numbers = np.float32(m), np.float32(threshold), np.int32(nesterov), np.int32(mask)
        arguments = gradient, momentum, velocity, *numbers
        return self._select("momentum_select", gradient.size, arguments, np.uint32, np.float32, np.float32)

    def momentum_select(self, gradient, momentum, velocity, m, k, *, nesterov=False, mask=True, step=0, least=1.0):
        """In one pass unless the threshold was too high."""
        plan = reference.sample_plan(gradient.size, k, step)
        threshold = 0.0
        if plan is not None:
            g, u, v = (self.sample(each, plan) for each in (gradient, momentum, velocity))
            self._launch_momentum(g, u, v, m, math.nan, nesterov, mask)  # only accumulates: no velocity reaches NaN
            threshold = self.kth_magnitude(v, plan.rank)
        (index, values, kept), finite = self._launch_momentum(
            gradient, momentum, velocity, m, threshold, nesterov, mask
        )
        if not finite:
            velocity[index], momentum[index] = values, kept
            return index[:0], values[:0], False
        if index.size < least * k and threshold > 0:
            velocity[index], momentum[index] = values, kept
            index = reference.widen_selection(velocity, index, threshold, least * k, self.select_threshold)
            index = index[self.keep_largest(velocity[index], k)]
            return index, reference.take(index, momentum, velocity, mask), True
        if index.size > k:
            chosen = self.keep_largest(values, k)
            back = index[~chosen]
            velocity[back], momentum[back] = values[~chosen], kept[~chosen]
            index, values = index[chosen], values[chosen]
        return index, values, True

    def scatter_add(self, messages, out):
        """One launch a message, which keeps the order of the messages."""
        for index, values in messages:
            self._launch_loop("scatter_add", index.size, index, values, np.int64(index.size), out)

    # One bit an element

    def sum_magnitudes(self, residual, gradient):
        rows = self._rows(residual.size)
        numbers = np.int64(rows.size), np.int64(residual.size)
        self._launch_loop("magnitude_rows", rows.size, residual, null_if_none(gradient), rows, *numbers)
        return self._lane_total(rows)

    def sum_by_sign(self, residual, gradient):
        above, below = self._rows(residual.size), self._rows(residual.size)
        count = self.xp.zeros(1, np.uint64)
        arguments = residual, null_if_none(gradient), above, below, count, np.int64(above.size), np.int64(residual.size)
        self._launch_loop("sign_rows", above.size, *arguments)
        return self._lane_total(above), self._lane_total(below), int(count[0])

    def _rows(self, n):
        return self.xp.empty(SUM_LANES * -(-n // (4 * SUM_LANES)), np.float32)

    def _lane_total(self, rows):
        total = self.xp.empty(1, np.float64)
        count = np.int64(rows.size // SUM_LANES)
        self.library.launch(source("compression"), "lane_total", 1, SUM_LANES, (rows, count, total))
        return float(total[0])

    def moments(self, x):
        """One block, because each lane adds its elements in order."""
        totals = self.xp.empty(2, np.float64)
        arguments = x, np.int64(x.size), totals
        self.library.launch(source("compression"), "moment_totals", 1, SUM_LANES, arguments)
        total, squares = to_host(totals).tolist()
        return total, squares

    def pack_signs(self, x):
        bits = self.xp.empty(-(-x.size // 8), np.uint8)
        self._launch_loop("pack_signs", bits.size, x, bits, np.int64(x.size))
        return bits

    def pack_signs_feedback(self, residual, gradient, out, plus, minus, bits):
        """In one pass."""
        scales = np.float32(plus), np.float32(minus)
        arguments = residual, null_if_none(gradient), out, *scales, bits, np.int64(residual.size)
        self._launch_loop("pack_signs_feedback", bits.size, *arguments)

    def add_signs(self, messages, out):
        """All messages in one pass."""
        plus = self.xp.asarray(np.array([high for _, high, _ in messages], np.float32))
        minus = self.xp.asarray(np.array([low for _, _, low in messages], np.float32))
        arguments = self._addresses([bits for bits, _, _ in messages]), plus, minus, np.int32(len(messages))
        self._launch_loop("add_signs", out.size, *arguments, out, np.int64(out.size))

    def majority(self, messages, n):
        bits = self.xp.empty(-(-n // 8), np.uint8)
        arguments = self._addresses(messages), np.int32(len(messages)), bits, np.int64(n)
        self._launch_loop("majority", bits.size, *arguments)
        return bits

    def _addresses(self, vectors):
        return self.xp.asarray(np.array([address_of(each) for each in vectors], np.uint64))

    # Optimizers, as in hpccomm.kernels.optimizers.reference; bounds are on the host, rates on host or device

    def _tiles(self, bounds: npt.NDArray[np.int64]) -> Tiles:
        return tiles_on(self.xp, bounds.tobytes())

    def _launch_tiles(self, kernel: str, w: Vector, bounds: npt.NDArray[np.int64], *arguments: Any) -> Tiles:
        """Launch a kernel with one block a tile."""
        tiles = self._tiles(bounds)
        if tiles.count:
            name = f"{kernel}_{code_of(w.dtype)}"
            self.library.launch(source("optimizers"), name, tiles.count, LANES, (*tiles.table, *arguments))
        return tiles

    def _row_sums(self, partial, tiles, rows):
        sums = self.xp.zeros((rows, 2), np.float64)
        if rows:
            arguments = partial, tiles.first_tiles, sums, np.int64(tiles.count)
            self.library.launch(source("optimizers"), "row_totals", 2 * rows, LANES, arguments)
        return to_host(sums)

    def _partial_sums(self, bounds):
        return self.xp.empty(2 * LANES * self._tiles(bounds).count, np.float64)

    def sum_of_squares(self, x):
        return float(self.lars_sums(x, x, x, np.array([[0, x.size]], np.int64), [0], 1, 0, False, GRADIENT)[0, 0])

    def lars_sums(self, w, g, v, bounds, decay, scale, mu, nesterov, whose):
        """The sums are copied to the host."""
        partial = self._partial_sums(bounds)
        numbers = *scalars(w, scale, mu), np.int32(nesterov), np.int32(whose)
        tiles = self._launch_tiles("lars_sums", w, bounds, w, g, v, self._rates(decay, w), *numbers, partial)
        return self._row_sums(partial, tiles, len(bounds))

    def lars_step(self, w, g, v, out, bounds, decay, first, last, scale, second, mu, nesterov):
        rates = (self._rates(each, w) for each in (decay, first, last))
        numbers = *scalars(w, scale, second, mu), np.int32(nesterov)
        self._launch_tiles("lars_step", w, bounds, w, g, v, out, *rates, *numbers)

    def lars_apply(self, w, g, v, bounds, decay, first, last, scale, second, mu, nesterov):
        rates = (self._rates(each, w) for each in (decay, first, last))
        numbers = *scalars(w, scale, second, mu), np.int32(nesterov)
        self._launch_tiles("lars_apply", w, bounds, w, g, v, *rates, *numbers)

    def lamb_moments(self, w, g, m, v, out, bounds, decay, *numbers):
        """The sums are copied to the host."""
        partial = self._partial_sums(bounds)
        rates = self._rates(decay, w)
        tiles = self._launch_tiles("lamb_moments", w, bounds, w, g, m, v, out, rates, *scalars(w, *numbers), partial)
        return self._row_sums(partial, tiles, len(bounds))

    def adam_step(self, w, g, m, v, bounds, decay, *numbers):
        self._launch_tiles("adam_step", w, bounds, w, g, m, v, self._rates(decay, w), *scalars(w, *numbers))

    def scale_tensors(self, out, bounds, factor, last):
        self._launch_tiles("scale_tensors", out, bounds, out, self._rates(factor, out), *scalars(out, last))

    def add_scaled(self, w, out, bounds, factor, last):
        self._launch_tiles("add_scaled", w, bounds, w, out, self._rates(factor, w), *scalars(w, last))

    def _rates(self, rates, w):
        """One number for each tensor, on the device."""
        return self.xp.asarray(rates, dtype=w.dtype)


class Tiles:
    """A table of tensors cut into tiles, on the device."""

    def __init__(self, xp: Any, bounds: npt.NDArray[np.int64]) -> None:
        each = -(-(bounds[:, 1] - bounds[:, 0]) // BLOCK)
        first = np.cumsum([0, *each])
        rows = np.repeat(np.arange(len(bounds)), each)
        starts = bounds[rows, 0] + BLOCK * (np.arange(len(rows)) - first[rows])
        self.count = len(rows)
        self.first_tiles = xp.asarray(first.astype(np.int64))
        self.table = (
            xp.asarray(rows.astype(np.int32)),
            xp.asarray(starts.astype(np.int64)),
            xp.asarray(np.ascontiguousarray(bounds[:, 1])),
        )
        """Tensor and first element of each tile, end of each tensor."""


@cache
def tiles_on(xp: Any, bounds: bytes) -> Tiles:
    """The tiles of a table; a training run has one or two tables."""
    return Tiles(xp, np.frombuffer(bounds, np.int64).reshape(-1, 2))


def scalars(w: Vector, *numbers: Any) -> tuple[Any, ...]:
    """Numbers in the dtype of a vector."""
    kind: Callable[[Any], Any] = np.dtype(w.dtype).type
    return tuple(kind(each) for each in numbers)


def null_if_none(vector: Vector | None) -> Any:
    """A vector, or a null address."""
    return np.uint64(0) if vector is None else vector


def address_of(vector: Vector) -> int:
    """The address of a vector, on a device or the host."""
    known = getattr(vector, "__cuda_array_interface__", None) or vector.__array_interface__
    return int(known["data"][0])


def to_host(vector: Vector) -> npt.NDArray[Any]:
    """A vector as NumPy array; waits for the device."""
    copied: npt.NDArray[Any] = vector.get() if hasattr(vector, "get") else np.asarray(vector)
    return copied
