"""LARS: each tensor's step is a fixed share of its weights' norm (You, Gitman & Ginsburg, 2017).

*w weights, g gradient, λ weight decay, c trust coefficient, γ rate, μ momentum, v velocity; d = g + λw.*
The trust ratio φ of a tensor is 1 where ‖w‖ or the other norm is zero, and for tensors that do not adapt
(biases, scales of normalisations, by the bucket's flags)::

    variant       trust ratio                    update                          as in
    "paper"       φ = c‖w‖/(‖g‖+λ‖w‖+ε)          v ← μv + γφd,    w ← w − v      You 2017
    "optax"       φ = c‖w‖/(‖d‖+ε)               v ← μv + γφd,    w ← w − v      optax.lars, SimCLR (classic)
    "torch"       φ of "paper"                   v ← μv + φd,     w ← w − γv     timm, apex LARC with torch's SGD
    "mlperf"      φ of "paper"                   v ← μv + d,      w ← w − γφv    TensorFlow's, MLPerf's
    "simclr"      φ = c‖w‖/(‖v‖+ε)               v ← μv + d,      w ← w − γφv    SimCLR (not classic)

They agree in the first step, and in all while γ and φ do not change ("optax", "simclr" but for their norms).
With "torch" a new γ acts on old momentum at once.  Algorithm 1 of the LAMB paper is "simclr": its running mean
instead of a sum cancels in φ, up to c.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from hpccomm.algorithms.transforms import Schedule, Vector, check_decay, require
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
from hpccomm.kernels.optimizers.reference import DECAYED_GRADIENT, GRADIENT, UPDATE

Variant = Literal["paper", "optax", "torch", "mlperf", "simclr"]
NORM = {"paper": GRADIENT, "optax": DECAYED_GRADIENT, "torch": GRADIENT, "mlperf": GRADIENT, "simclr": UPDATE}


class LarsState(NamedTuple):
    """How many updates, and the velocity (with the sign and units of the variant's step)."""

    updates: int
    velocity: Vector


def lars(
    bucket: Bucket,
    lr: float | Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    trust: float = 0.001,
    eps: float = 0.0,
    variant: Variant = "paper",
    clip: bool = False,
    max_norm: float | None = None,
    decay: Collection[str] | str = "flags",
    adapt: Collection[str] | str = "flags",
    part: tuple[int, int] | None = None,
    norm_reduce: NormReduce | None = None,
) -> InPlaceTransform:
    """LARS on a bucket's vector, float32 or float64: the step with sign, to be added to the weights.

    ``lr`` γ, a number or a function of the update's count; ``momentum`` μ; ``weight_decay`` λ; ``trust`` c.
    ``clip`` is LARC's: φ ← min(φ/γ, 1), so that no tensor steps further than γ alone would.  ``max_norm``
    clips the whole gradient first.  ``decay`` and ``adapt`` say which tensors: ``"flags"`` of the bucket,
    ``"all"``, ``"decayed"``, or a list of names.  ``part=(lo, hi)`` and ``norm_reduce`` are for a rank that
    holds these elements of the vector only: see :mod:`hpccomm.algorithms.trust_ratio`.

    >>> bucket = Bucket({"w": (2, 2), "b": (2,)})
    >>> method = lars(bucket, 1.0, trust=0.5)
    >>> step, _ = method.update(np.ones(6, "f4"), method.init(np.ones(6, "f4")), np.ones(6, "f4"))
    >>> step.tolist()
    [-0.5, -0.5, -0.5, -0.5, -1.0, -1.0]

    You, Gitman & Ginsburg, *Large batch training of convolutional networks*, 2017, algorithm 1.
    """
    require(variant in NORM, f"lars: variant is {variant!r}: pass one of {', '.join(map(repr, get_args(Variant)))}")
    check_decay("lars: momentum", momentum)
    require(weight_decay >= 0, f"lars: weight_decay is {weight_decay}: pass 0 or more")
    require(trust > 0, f"lars: trust is {trust}: pass a positive number; 0.001 is usual")
    require(max_norm is None or max_norm > 0, f"lars: max_norm is {max_norm}: pass a positive number, or None")
    here = layers("lars", bucket, part, decay, adapt)
    order = walk_order(here, norm_reduce is not None)

    def ratios(rows: Rows, sums: Any, gamma: float) -> Any:
        norm = norms(sums, rows, here.tensors, norm_reduce)
        rate = weight_decay * rows.decay if NORM[variant] == GRADIENT else 0.0
        ratio = trust * norm[:, 0] / (norm[:, 1] + rate * norm[:, 0] + eps)
        ratio = np.minimum(ratio / gamma, 1) if clip else ratio
        return np.where(rows.adapt, guard_zero_norms(norm, ratio), 1.0)

    def group(rows: Rows, g: Vector, v: Vector, w: Vector, out: Vector | None, gamma: float, scale: float) -> None:
        """One step of some tensors: v is written, and the step into out, or, without one, onto w."""
        real = w.dtype.type
        rates = (weight_decay * rows.decay).astype(w.dtype)
        sums = kernel("lars_sums", w)(w, g, v, rows.bounds, rates, real(scale), real(momentum), nesterov, NORM[variant])
        phi = ratios(rows, sums, gamma).astype(w.dtype)
        first, second, last = np.ones_like(phi), 1.0, np.ones_like(phi)
        if variant in ("paper", "optax"):
            first, second = phi, -gamma
        elif variant == "torch":
            first, last = phi, last * real(-gamma)
        else:
            last = phi * real(-gamma)
        where = ("lars_apply", (w, g, v)) if out is None else ("lars_step", (w, g, v, out))
        kernel(where[0], w)(
            *where[1], rows.bounds, rates, first, last, real(scale), real(second), real(momentum), nesterov
        )

    def walk(gradient: Vector, state: LarsState, weights: Vector, step: Vector | None) -> None:
        """All tensors: into ``step``, or, without one, onto the weights; the velocity is written."""
        check_vectors("lars", here, gradient, weights)
        g, w = to_contiguous(gradient), to_contiguous(weights)
        gamma = float(lr(state.updates) if callable(lr) else lr)
        scale = shrink("none" if max_norm is None else "clip", max_norm or 1.0, g, norm_reduce)
        with np.errstate(divide="ignore", invalid="ignore"):
            for rows in order(w):
                part = slice(rows.first, rows.stop)
                group(rows, g[part], state.velocity[part], w[part], None if step is None else step[part], gamma, scale)
        if step is not None:
            step[here.rows.stop :] = 0
        elif w is not weights:
            weights[...] = w

    def update(gradient: Vector, state: LarsState, weights: Vector) -> tuple[Vector, LarsState]:
        after = LarsState(state.updates, state.velocity.copy())
        step = np.empty_like(weights)
        walk(gradient, after, weights, step)
        return step, after._replace(updates=state.updates + 1)

    def apply(gradient: Vector, state: LarsState, weights: Vector) -> LarsState:
        walk(gradient, state, weights, None)
        return state._replace(updates=state.updates + 1)

    return InPlaceTransform(lambda weights: LarsState(0, np.zeros_like(weights)), update, apply)
