"""LAMB: Adam's direction, its length in each tensor a share of the weights' norm (You et al., ICLR 2020).

*w weights, g gradient, m and v running means of g and g², λ weight decay, γ rate, t the update from 1*::

    m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²
    u = m̂ / (√v̂ + ε) + λw      m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ)
    w ← w − γ φ u              φ = ‖w‖/‖u‖ in each tensor, 1 where either is zero

As φ takes u's length out, leaving the bias correction out changes little but the weight of λw.  DeepSpeed's
form, ``bias_correction="in_step"``, instead multiplies the finished step by √(1−β₂ᵗ)/(1−β₁ᵗ): a warm-up of some
3000 updates that recipes for the other forms do not expect.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from hpccomm.algorithms.transforms import AdamState, Schedule, Vector, check_decay, require
from hpccomm.algorithms.trust_ratio import (
    InPlaceTransform,
    NormReduce,
    Rows,
    check_vectors,
    guard_zero_norms,
    kernel,
    layers,
    norms,
    shrink,
    to_contiguous,
    walk_order,
)
from hpccomm.buckets import Bucket


def lamb(
    bucket: Bucket,
    lr: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool | Literal["in_step"] = True,
    ratio_clip: tuple[float, float] | None = None,
    weight_clip: tuple[float, float] | None = None,
    grad_norm: Literal["none", "clip", "normalise"] = "none",
    max_norm: float = 1.0,
    decay: Collection[str] | str = "flags",
    adapt: Collection[str] | str = "all",
    part: tuple[int, int] | None = None,
    norm_reduce: NormReduce | None = None,
) -> InPlaceTransform:
    """LAMB on a bucket's vector, float32 or float64: the step with sign, to be added to the weights.

    ``lr`` γ, a number or a function of the update's count.  ``ratio_clip`` bounds φ (DeepSpeed (0.01, 10),
    LAMBC (0, 1)), ``weight_clip`` bounds ‖w‖ in it (the paper's ψ).  ``grad_norm``: the gradient is first
    clipped to ``max_norm`` (apex) or divided by its norm (NVLAMB).  ``decay`` and ``adapt`` say which tensors:
    ``"flags"`` of the bucket, ``"all"`` (as optax adapts), ``"decayed"`` (apex, timm), or a list of names; with
    ``adapt=()`` it is AdamW.  ``part=(lo, hi)`` and ``norm_reduce`` are for a rank that holds these elements
    only: see :mod:`hpccomm.algorithms.trust_ratio`.

    >>> bucket = Bucket({"w": (2, 2)})
    >>> method = lamb(bucket, 0.5, weight_decay=0, eps=0)
    >>> step, _ = method.update(np.full(4, 9, "f4"), method.init(np.ones(4, "f4")), np.ones(4, "f4"))
    >>> step.tolist()
    [-0.5, -0.5, -0.5, -0.5]

    You et al., *Large batch optimization for deep learning: training BERT in 76 minutes*, ICLR 2020, algorithm 2.
    """
    check_numbers(b1, b2, eps, weight_decay, bias_correction, grad_norm, max_norm)
    check_range("ratio_clip", ratio_clip)
    check_range("weight_clip", weight_clip)
    here = layers("lamb", bucket, part, decay, adapt)
    order = walk_order(here, norm_reduce is not None)

    def ratios(rows: Rows, sums: Any) -> Any:
        norm = norms(sums, rows, here.tensors, norm_reduce)
        size = norm[:, 0] if weight_clip is None else np.clip(norm[:, 0], *weight_clip)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = size / norm[:, 1]
        ratio = guard_zero_norms(norm, ratio)
        return np.where(rows.adapt, ratio if ratio_clip is None else np.clip(ratio, *ratio_clip), 1.0)

    def walk(gradient: Vector, state: AdamState, weights: Vector, step: Vector | None) -> None:
        """All tensors: into ``step``, or, without one, onto the weights; the moments are written."""
        check_vectors("lamb", here, gradient, weights)
        g, w, real = to_contiguous(gradient), to_contiguous(weights), weights.dtype.type
        groups = order(w)
        t = state.updates + 1
        seen = (1 - b1**t, 1 - b2**t)
        k1, k2 = seen if bias_correction is True else (1.0, 1.0)
        gamma = float(lr(int(state.updates)) if callable(lr) else lr)
        last = real(-gamma * math.sqrt(seen[1]) / seen[0] if bias_correction == "in_step" else -gamma)
        scale = shrink(grad_norm, max_norm, g, norm_reduce)
        numbers = [real(each) for each in (scale, b1, 1 - b1, b2, 1 - b2, k1, k2, eps)]
        placed = [each.stop - each.first for each in groups if norm_reduce is not None or each.adapt.any()]
        room = np.empty_like(w, shape=(max(placed, default=0),)) if step is None else step
        for rows in groups if placed or step is not None else [here.rows]:
            part, rates = slice(rows.first, rows.stop), (weight_decay * rows.decay).astype(w.dtype)
            if step is None and norm_reduce is None and not rows.adapt.any():
                kernel("adam_step", w)(
                    w[part], g[part], state.mean[part], state.square[part], rows.bounds, rates, *numbers, last
                )
                continue
            out = room[: rows.stop - rows.first] if step is None else step[part]
            sums = kernel("lamb_moments", w)(
                w[part], g[part], state.mean[part], state.square[part], out, rows.bounds, rates, *numbers
            )
            phi = ratios(rows, sums).astype(w.dtype)
            if step is None:
                kernel("add_scaled", w)(w[part], out, rows.bounds, phi, last)
            else:
                kernel("scale_tensors", w)(out, rows.bounds, phi, last)
        if step is not None:
            step[here.rows.stop :] = 0
        elif w is not weights:
            weights[...] = w

    def update(gradient: Vector, state: AdamState, weights: Vector) -> tuple[Vector, AdamState]:
        after = AdamState(state.updates, state.mean.copy(), state.square.copy())
        step = np.empty_like(weights)
        walk(gradient, after, weights, step)
        return step, after._replace(updates=state.updates + 1)

    def apply(gradient: Vector, state: AdamState, weights: Vector) -> AdamState:
        walk(gradient, state, weights, None)
        return state._replace(updates=state.updates + 1)

    def init(weights: Vector) -> AdamState:
        return AdamState(0, np.zeros_like(weights), np.zeros_like(weights))

    return InPlaceTransform(init, update, apply)


def check_numbers(
    b1: float, b2: float, eps: float, weight_decay: float, bias_correction: Any, grad_norm: str, max_norm: float
) -> None:
    """Raise for what cannot be meant."""
    check_decay("lamb: b1", b1)
    check_decay("lamb: b2", b2)
    require(eps >= 0, f"lamb: eps is {eps}: pass 0 or more")
    require(weight_decay >= 0, f"lamb: weight_decay is {weight_decay}: pass 0 or more")
    require(
        bias_correction in (True, False, "in_step"),
        f"lamb: bias_correction is {bias_correction!r}: pass True, False or 'in_step'",
    )
    require(
        grad_norm in ("none", "clip", "normalise"),
        f"lamb: grad_norm is {grad_norm!r}: pass 'none', 'clip' or 'normalise'",
    )
    require(max_norm > 0, f"lamb: max_norm is {max_norm}: pass a positive number")


def check_range(name: str, given: tuple[float, float] | None) -> None:
    """Raise unless it is None or (low, high)."""
    require(given is None or 0 <= given[0] <= given[1], f"lamb: {name} is {given}: pass (low, high), 0 <= low <= high")
