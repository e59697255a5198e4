"""Steps whose length follows each tensor's norms: what LARS and LAMB share.

*L tensors of a bucket; this rank holds elements [lo, hi) of its vector, all of them unless said.*  A trust
ratio needs the norms of a whole tensor.  Where a vector is divided over ranks, each sums its squares into its
rows of an (L, 2) table and one allreduce of 16 L bytes completes it: ``norm_reduce``.  A shard is never a
layer of its own.  Where nothing is divided the tensors go through the cache one after the other, so that their
elements come from memory once.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.transforms import Transform, Vector, check_alike, require
from hpccomm.arrays import is_on_device
from hpccomm.buckets import Bucket, TensorEntry

NormReduce = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""Sums of squares of this rank's part → those of the whole, the same bits on all ranks that hold parts."""

CACHE_ELEMENTS = 1 << 18
"""Elements of small tensors that go through the cache together."""


class Rows(NamedTuple):
    """Some tensors, as far as this rank holds them, one after the other in the vector."""

    first: int
    stop: int
    """Where they lie in this rank's vector."""
    bounds: npt.NDArray[np.int64]
    """(k, 2), counted from ``first``."""
    tensors: npt.NDArray[np.int64]
    """(k,) rows of the bucket's table."""
    decay: npt.NDArray[np.bool_]
    adapt: npt.NDArray[np.bool_]


class Layers(NamedTuple):
    """The layout of this rank's vector."""

    size: int
    """Elements of this rank's vector."""
    tensors: int
    """In the bucket."""
    rows: Rows

    def groups(self) -> Iterator[Rows]:
        """Tensors that fit into the host's cache together, and large ones alone."""
        rows, begin = self.rows, 0
        for end in range(1, len(rows.tensors) + 1):
            full = end == len(rows.tensors) or rows.bounds[end, 1] - rows.bounds[begin, 0] > CACHE_ELEMENTS
            if full:
                first, stop = int(rows.bounds[begin, 0]), int(rows.bounds[end - 1, 1])
                part = slice(begin, end)
                yield Rows(
                    first, stop, rows.bounds[part] - first, rows.tensors[part], rows.decay[part], rows.adapt[part]
                )
                begin = end


class InPlaceTransform(Transform):
    """A transform that can also step in place.

    ``apply(gradient, state, weights) -> state`` writes the weights and over the arrays of the state, which is
    used up; the same numbers as ``weights += step``, nothing large is allocated.
    """

    apply: Callable[[Vector, Any, Vector], Any]

    def __new__(
        cls,
        init: Callable[[Vector], Any],
        update: Callable[[Vector, Any, Vector], tuple[Vector, Any]],
        apply: Callable[[Vector, Any, Vector], Any],
    ) -> InPlaceTransform:
        made = super().__new__(cls, init, update)
        made.apply = apply
        return made


def layers(
    who: str,
    bucket: Bucket,
    part: tuple[int, int] | None,
    decay: Collection[str] | str,
    adapt: Collection[str] | str,
) -> Layers:
    """The layout of elements [lo, hi) of the bucket's vector; what lies beyond its end is padding."""
    lo, hi = part or (0, bucket.size)
    require(0 <= lo <= hi, f"{who}: part is {part}: pass (lo, hi) with 0 <= lo <= hi")
    decays = select_tensors(who, "decay", bucket, decay, [slot.decay for slot in bucket.table])
    adapts = select_tensors(
        who, "adapt", bucket, adapt, decays if adapt == "decayed" else [s.adapt for s in bucket.table]
    )
    here = [row for row, slot in enumerate(bucket.table) if max(lo, slot.offset) < min(hi, slot.offset + slot.length)]
    bounds = np.array([clip_bounds(bucket.table[row], lo, hi) for row in here], np.int64).reshape(-1, 2)
    stop = int(bounds[-1, 1]) if here else 0
    rows = Rows(0, stop, bounds, np.array(here, np.int64), np.array(decays, bool)[here], np.array(adapts, bool)[here])
    return Layers(hi - lo, len(bucket.table), rows)


def clip_bounds(slot: TensorEntry, lo: int, hi: int) -> tuple[int, int]:
    """Where the part of a tensor inside [lo, hi) lies, counted from lo."""
    return max(lo, slot.offset) - lo, min(hi, slot.offset + slot.length) - lo


def select_tensors(who: str, what: str, bucket: Bucket, names: Collection[str] | str, flags: list[bool]) -> list[bool]:
    """For each tensor whether it is meant: by the bucket's flags, all of them, or those named."""
    if isinstance(names, str):
        require(
            names in ("flags", "all", "decayed"),
            f"{who}: {what} is {names!r}: pass 'flags', 'all', 'decayed', or a list of tensors' names",
        )
        return [True] * len(flags) if names == "all" else flags
    unknown = sorted(set(names) - {slot.name for slot in bucket.table})
    require(not unknown, f"{who}: {what} names {', '.join(unknown)}, which are not in the bucket: use its names")
    return [slot.name in names for slot in bucket.table]


def check_vectors(who: str, here: Layers, gradient: Vector, weights: Vector) -> None:
    """Raise unless both are float32 or float64 vectors of the layout's length."""
    check_alike(gradient, weights)
    require(
        weights.dtype in (np.float32, np.float64),
        f"{who}: the weights are {weights.dtype}: keep a float32 master copy and step on that",
    )
    require(
        weights.shape == (here.size,),
        f"{who}: the weights have shape {weights.shape}, the bucket's part ({here.size},): pass the bucket's vector",
    )


def to_contiguous(vector: Vector) -> Vector:
    """The vector itself, or an aligned copy in C order."""
    if is_on_device(vector):
        return vector if vector.flags.c_contiguous else vector.copy()
    return np.require(vector, requirements=("C", "A"))


def walk_order(here: Layers, divided: bool) -> Callable[[Vector], list[Rows]]:
    """Which tensors to go through together, by where a vector lies: all, on a device or where ranks divide it."""
    whole = [here.rows]
    cached = whole if divided else list(here.groups())
    return lambda vector: whole if is_on_device(vector) else cached


def kernel(name: str, vector: Vector) -> Callable[..., Any]:
    """A function of :mod:`hpccomm.kernels.optimizers.reference`, with its bits, for a vector where it lies."""
    if not is_on_device(vector):
        return host_kernel(name, vector.dtype.str[1:])
    from hpccomm.kernels.cuda import kernels

    return getattr(kernels(), name)  # type: ignore[no-any-return]


@cache
def host_kernel(name: str, code: str) -> Callable[..., Any]:
    """A function of :mod:`hpccomm.kernels.optimizers.loops`, or NumPy's where Numba is not installed."""
    from hpccomm.kernels.optimizers import reference as optimizers_reference

    if importlib.util.find_spec("numba") is None:
        return getattr(optimizers_reference, name)  # type: ignore[no-any-return]
    from hpccomm.kernels.optimizers import loops as optimizers

    return optimizers.compile_kernel(name, code)


def norms(sums: npt.NDArray[np.float64], here: Rows, count: int, reduce: NormReduce | None) -> npt.NDArray[np.float64]:
    """(k, 2) norms of whole tensors from this rank's sums of squares (collective where they are divided)."""
    if reduce is None:
        return np.sqrt(sums)
    table = np.zeros((count, 2))
    table[here.tensors] = sums
    return np.sqrt(reduce(table)[here.tensors])


def guard_zero_norms(norm: npt.NDArray[np.float64], ratio: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """1 where either norm is zero: a tensor of zeros steps like one that does not adapt."""
    return np.where((norm[:, 0] == 0) | (norm[:, 1] == 0), 1.0, ratio)


def global_norm(gradient: Vector, reduce: NormReduce | None) -> float:
    """‖g‖ of the whole vector (collective where it is divided)."""
    squares = np.array([kernel("sum_of_squares", gradient)(gradient)])
    return math.sqrt(float((squares if reduce is None else reduce(squares))[0]))


def shrink(grad_norm: str, max_norm: float, gradient: Vector, reduce: NormReduce | None) -> float:
    """By what the gradient is multiplied: at most to ``max_norm`` ("clip"), to norm 1 ("normalise"), or 1."""
    if grad_norm == "none":
        return 1.0
    norm = global_norm(gradient, reduce)
    if grad_norm == "clip":
        return 1 / max(1.0, norm / max_norm)
    return 1 / norm if norm > 0 else 1.0
