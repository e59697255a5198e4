"""Trust ratios: the step of each tensor becomes a fixed fraction of its weights' norm, as in LARS and LAMB.

*w weights, x the vector that comes in, c the trust coefficient; L tensors of a bucket; this rank holds elements
[lo, hi) of the bucket's vector, by default all.*  :func:`scale_by_trust_ratio` multiplies each tensor by its ratio φ::

    φ = c‖w‖ / (‖x‖ + ε);   1 where either norm is zero, and in tensors that do not adapt

The other terms of LARS and LAMB that depend on tensors stand here, too.  Momentum, Adam's direction and the learning
rate are those of :mod:`hpccomm.algorithms.transforms`; :mod:`hpccomm.algorithms.large_batch` composes all of them.

A trust ratio needs the norms of a whole tensor.  Where ranks hold shards of a vector, each rank adds its sums of
squares to its rows of an (L, 2) table, and one allreduce of 16 L bytes completes the table: ``norm_reduce``.  A shard
is never treated as a tensor of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.transforms import (
    Chain,
    Schedule,
    Term,
    Transform,
    Vector,
    check_limit,
    check_not_negative,
    check_positive,
    is_number,
    require,
)
from hpccomm.algorithms.trees import check_alike
from hpccomm.arrays import is_on_device
from hpccomm.buckets import Bucket, TensorEntry
from hpccomm.errors import ArgumentError
from hpccomm.kernels.numba_check import why_no_numba
from hpccomm.kernels.optimizers.reference import GRADIENT

NormReduce = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""Sums of squares of this rank's shards → those of the whole tensors, the same bits on all ranks with shards."""

LARGEST_RATIO = float(np.finfo(np.float32).max)
"""The norm of a gradient may be too small for its inverse in float32."""
CACHE_ELEMENTS = 1 << 18
"""Elements of small tensors that pass through the cache as one group."""


class Rows(NamedTuple):
    """This rank's shards of some tensors, one after the other in the vector."""

    first: int
    stop: int
    """Their slice of this rank's vector."""
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
    adapts: bool
    """Whether a tensor of the bucket adapts, also one without elements here: the same on all ranks."""

    def groups(self) -> Iterator[Rows]:
        """Groups of tensors that fit into the host's cache together; large tensors alone."""
        rows, begin = self.rows, 0
        for end in range(1, len(rows.tensors) + 1):
            full = end == len(rows.tensors) or rows.bounds[end, 1] - rows.bounds[begin, 0] > CACHE_ELEMENTS
            if full:
                first, stop = int(rows.bounds[begin, 0]), int(rows.bounds[end - 1, 1])
                part = slice(begin, end)
                others: Any = (each[part] for each in rows[3:])
                yield Rows(first, stop, rows.bounds[part] - first, *others)
                begin = end


def scale_by_global_norm(
    grad_norm: Literal["none", "clip", "normalise"], max_norm: float = 1.0, norm_reduce: NormReduce | None = None
) -> Term:
    """Multiply the whole gradient so that its norm is at most ``max_norm`` ("clip") or is 1 ("normalise")."""

    require(
        grad_norm in ("none", "clip", "normalise"),
        f"scale_by_global_norm: grad_norm is {grad_norm!r}: pass 'none', 'clip' or 'normalise'",
    )
    check_limit("scale_by_global_norm: max_norm", max_norm)

    def update(gradient: Vector, state: tuple[()], weights: Vector) -> tuple[Vector, tuple[()]]:
        return gradient * gradient.dtype.type(shrink(grad_norm, max_norm, gradient, norm_reduce)), state

    numbers: dict[str, Any] = {"grad_norm": grad_norm, "max_norm": max_norm}
    name = "scale_by_global_norm"
    alone = norm_reduce is None and grad_norm != "none"
    return Term.of(Transform(lambda weights: (), update, needs_whole=name if alone else ""), name, **numbers)


def add_decayed_weights(rate: float, tensors: Bucket | Layers) -> Term:
    """Add ``rate * weights`` in the tensors that decay; :func:`~hpccomm.weight_decay` takes a mask of elements."""
    check_not_negative("add_decayed_weights: rate", rate)
    here = tensors if isinstance(tensors, Layers) else layers("add_decayed_weights", tensors)

    def update(gradient: Vector, state: tuple[()], weights: Vector) -> tuple[Vector, tuple[()]]:
        check_vectors("add_decayed_weights", here, gradient, weights)
        step, rates = gradient.copy(), (rate * here.rows.decay).astype(weights.dtype)
        for (lo, hi), each in zip(here.rows.bounds, rates, strict=True):
            step[lo:hi] += each * weights[lo:hi]
        return step, state

    bucket = tensors if isinstance(tensors, Bucket) else None
    return Term.of(Transform(lambda weights: (), update, bucket), "add_decayed_weights", rate=rate)


class TrustRatioState(NamedTuple):
    """How many updates there were, and the state of the inner transform."""

    updates: int
    inner: Any


def scale_by_trust_ratio(
    tensors: Bucket | Layers,
    inner: Chain | None = None,
    *,
    trust: float = 1.0,
    eps: float = 0.0,
    lr: float | Schedule | None = None,
    ratio_clip: tuple[float, float] | None = None,
    weight_clip: tuple[float, float] | None = None,
    norm_reduce: NormReduce | None = None,
) -> Term:
    """Multiply each tensor by its trust ratio φ = c‖w‖/(‖x‖+ε); ``trust`` is c.

    With ``inner``, a chain that opens with :func:`add_decayed_weights`, the ratio is that of the gradient g that comes
    in, φ = c‖w‖/(‖g‖+λ‖w‖+ε), and multiplies the step that ``inner`` makes of g.  With ``lr`` γ, φ ← min(φ/γ, 1)
    (LARC). ``ratio_clip`` bounds φ, ``weight_clip`` bounds ‖w‖ in it.  Which tensors adapt is a flag of the bucket's
    table.

    >>> term = scale_by_trust_ratio(Bucket({"w": (2, 2)}), trust=0.5)
    >>> step, _ = term.update(np.full(4, 8, "f4"), term.init(np.ones(4, "f4")), np.ones(4, "f4"))
    >>> step.tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    here = tensors if isinstance(tensors, Layers) else layers("scale_by_trust_ratio", tensors)
    check_positive("scale_by_trust_ratio: trust", trust)
    check_not_negative("scale_by_trust_ratio: eps", eps)
    check_range("scale_by_trust_ratio: ratio_clip", ratio_clip)
    check_range("scale_by_trust_ratio: weight_clip", weight_clip)
    rate = None if inner is None else decay_rate(inner)
    ratio = TrustRatio(trust, eps, rate, lr, ratio_clip, weight_clip, norm_reduce)

    def init(weights: Vector) -> TrustRatioState:
        return TrustRatioState(0, () if inner is None else inner.init(weights))

    def update(gradient: Vector, state: TrustRatioState, weights: Vector) -> tuple[Vector, TrustRatioState]:
        check_vectors("scale_by_trust_ratio", here, gradient, weights)
        g, w, real = to_contiguous(gradient), to_contiguous(weights), weights.dtype.type
        still = np.zeros(len(here.rows.tensors), w.dtype)
        sums = kernel("lars_sums", w)(w, g, g, here.rows.bounds, still, real(1), real(0), False, GRADIENT)
        step, inside = (gradient, ()) if inner is None else inner.update(gradient, state.inner, weights)
        gamma = 1.0 if lr is None else learning_rate(lr, state.updates)
        out, phi = to_contiguous(step).copy(), ratio.of(here, here.rows, sums, gamma).astype(w.dtype)
        kernel("scale_tensors", w)(out, here.rows.bounds, phi, real(1))
        out[here.rows.stop :] = 0
        return out, TrustRatioState(state.updates + 1, inside)

    bucket = tensors if isinstance(tensors, Bucket) else None
    name = "scale_by_trust_ratio"
    alone = norm_reduce is None and here.adapts
    made = Transform(init, update, bucket, needs_whole=name if alone else "", parts=[inner])
    return Term.of(made, name, inner=inner, ratio=ratio)


def decay_rate(inner: Transform) -> float:
    """The rate of the ``add_decayed_weights`` that opens the inner chain of a trust ratio."""
    first = inner.terms[0] if isinstance(inner, Chain) and inner.terms else None
    if not isinstance(first, Term) or first.name != "add_decayed_weights":
        raise ArgumentError(
            "scale_by_trust_ratio: inner does not open with add_decayed_weights: "
            "pass chain(add_decayed_weights(rate, bucket), ...), with rate 0 for no decay"
        )
    return float(first.numbers.rate)


class TrustRatio(NamedTuple):
    """The numbers in a trust ratio, as :func:`scale_by_trust_ratio` takes them; ``rate`` is λ in its denominator."""

    trust: float
    eps: float
    rate: float | None
    lr: float | Schedule | None
    ratio_clip: tuple[float, float] | None
    weight_clip: tuple[float, float] | None
    norm_reduce: NormReduce | None

    def of(self, here: Layers, rows: Rows, sums: npt.NDArray[np.float64], gamma: float = 1.0) -> Any:
        """φ of these tensors from this rank's sums of squares of w and x (collective where ranks hold shards)."""
        norm = norms(sums, rows, here.tensors, self.norm_reduce)
        size = norm[:, 0] if self.weight_clip is None else np.clip(norm[:, 0], *self.weight_clip)
        decay = 0.0 if self.rate is None else self.rate * rows.decay * norm[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.trust * size / (norm[:, 1] + decay + self.eps)
            if self.lr is not None:
                ratio = np.minimum(ratio / gamma, 1)
        ratio = np.minimum(guard_zero_norms(norm, ratio), LARGEST_RATIO)
        return np.where(rows.adapt, ratio if self.ratio_clip is None else np.clip(ratio, *self.ratio_clip), 1.0)


def learning_rate(lr: float | Schedule, updates: float) -> float:
    """γ of the update after ``updates`` others."""
    return float(lr(int(updates)) if callable(lr) else lr)


def check_range(name: str, given: tuple[float, float] | None) -> None:
    """Raise unless it is None or (low, high)."""
    pair = isinstance(given, tuple | list) and len(given) == 2 and all(map(is_number, given))
    fits = given is None or (pair and 0 <= given[0] <= given[1])
    require(fits, f"{name} is {given}: pass (low, high), 0 <= low <= high")


def layers(
    who: str,
    bucket: Bucket,
    part: tuple[int, int] | None = None,
    decay: Collection[str] | str = "flags",
    adapt: Collection[str] | str = "flags",
) -> Layers:
    """The layout of elements [lo, hi) of the bucket's vector; elements beyond its end are padding."""
    require(isinstance(bucket, Bucket), f"{who}: the tensors are {bucket!r}: pass a hpccomm.Bucket")
    pair = part is None or (isinstance(part, tuple | list) and len(part) == 2)
    require(pair, f"{who}: part is {part!r}: pass (lo, hi) with 0 <= lo <= hi")
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
    return Layers(hi - lo, len(bucket.table), rows, any(adapts))


def clip_bounds(slot: TensorEntry, lo: int, hi: int) -> tuple[int, int]:
    """The bounds of a tensor inside [lo, hi), counted from lo."""
    return max(lo, slot.offset) - lo, min(hi, slot.offset + slot.length) - lo


def select_tensors(who: str, what: str, bucket: Bucket, names: Collection[str] | str, flags: list[bool]) -> list[bool]:
    """A flag for each tensor: from the bucket, True for all, or True for the named ones."""
    if isinstance(names, str):
        require(
            names in ("flags", "all", "decayed"),
            f"{who}: {what} is {names!r}: pass 'flags', 'all', 'decayed', or a list of tensors' names",
        )
        return [True] * len(flags) if names == "all" else flags
    require(
        isinstance(names, Collection) and all(isinstance(each, str) for each in names),
        f"{who}: {what} is {names!r}: pass 'flags', 'all', 'decayed', or a list of tensors' names",
    )
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
    """The groups of tensors for a vector: one group of all on a device or in a shard, else groups for the cache."""
    whole = [here.rows]
    cached = whole if divided else list(here.groups())
    return lambda vector: whole if is_on_device(vector) else cached


def kernel(name: str, vector: Vector) -> Callable[..., Any]:
    """A function of :mod:`hpccomm.kernels.optimizers.reference`, with its bits, on the vector's host or device."""
    if not is_on_device(vector):
        return host_kernel(name, vector.dtype.str[1:])
    from hpccomm.kernels.cuda import kernels

    return getattr(kernels(), name)  # type: ignore[no-any-return]


@cache
def host_kernel(name: str, code: str) -> Callable[..., Any]:
    """A function of :mod:`hpccomm.kernels.optimizers.loops`, or NumPy's where Numba cannot be imported."""
    from hpccomm.kernels.optimizers import reference

    if why_no_numba():
        return getattr(reference, name)  # type: ignore[no-any-return]
    from hpccomm.kernels.optimizers import loops

    return loops.compile_kernel(name, code)


def norms(sums: npt.NDArray[np.float64], here: Rows, count: int, reduce: NormReduce | None) -> npt.NDArray[np.float64]:
    """(k, 2) norms of whole tensors from this rank's sums of squares (collective where ranks hold shards)."""
    if reduce is None:
        return np.sqrt(sums)
    table = np.zeros((count, 2))
    table[here.tensors] = sums
    return np.sqrt(reduce(table)[here.tensors])


def guard_zero_norms(norm: npt.NDArray[np.float64], ratio: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The ratio, and 1 where either norm is zero: a tensor of zeros steps like one that does not adapt."""
    return np.where((norm[:, 0] == 0) | (norm[:, 1] == 0), 1.0, ratio)


def global_norm(gradient: Vector, reduce: NormReduce | None) -> float:
    """‖g‖ of the whole vector (collective where ranks hold shards)."""
    squares = np.array([kernel("sum_of_squares", gradient)(to_contiguous(gradient))])
    return math.sqrt(float((squares if reduce is None else reduce(squares))[0]))


def shrink(grad_norm: str, max_norm: float, gradient: Vector, reduce: NormReduce | None) -> float:
    """The factor of the gradient: to norm ``max_norm`` at most ("clip"), to norm 1 ("normalise"), or 1."""
    if grad_norm == "none":
        return 1.0
    norm = global_norm(gradient, reduce)
    if grad_norm == "clip":
        return 1 / max(1.0, norm / max_norm)
    return 1 / norm if norm > 0 else 1.0
