"""LARS and LAMB for large batches: each tensor's step is a fixed fraction of its weights' norm.

LARS (You, Gitman & Ginsburg, 2017)
-----------------------------------

*w weights, g gradient, λ weight decay, c trust coefficient, γ rate, μ momentum, v velocity; d = g + λw.*
The trust ratio φ of a tensor is 1 where ‖w‖ or the other norm is zero, and for tensors that do not adapt
(biases, scales of normalisations, by the bucket's flags)::

    variant       trust ratio                    update                          as in
    "paper"       φ = c‖w‖/(‖g‖+λ‖w‖+ε)          v ← μv + γφd,    w ← w − v      You 2017
    "optax"       φ = c‖w‖/(‖d‖+ε)               v ← μv + γφd,    w ← w − v      optax.lars, SimCLR (classic)
    "torch"       φ of "paper"                   v ← μv + φd,     w ← w − γv     timm, apex LARC with torch's SGD
    "mlperf"      φ of "paper"                   v ← μv + d,      w ← w − γφv    TensorFlow's, MLPerf's
    "simclr"      φ = c‖w‖/(‖v‖+ε)               v ← μv + d,      w ← w − γφv    SimCLR (not classic)

Apart from the norm in φ, where "optax" and "simclr" differ, they agree in the first step, and as long as γ and φ do not
change. With "torch" a new γ also scales the velocity of earlier updates.  Algorithm 1 of the LAMB paper is "simclr"
without c: it keeps a running mean instead of a sum, a factor that cancels in φv.

LAMB (You et al., ICLR 2020)
----------------------------

*w weights, g gradient, m and v running means of g and g², λ weight decay, γ rate, t the update from 1*::

    m ← β₁m + (1−β₁)g,   v ← β₂v + (1−β₂)g²
    u = m̂ / (√v̂ + ε) + λw      m̂ = m/(1−β₁ᵗ), v̂ = v/(1−β₂ᵗ)
    w ← w − γ φ u              φ = ‖w‖/‖u‖ in each tensor, 1 where either is zero

As φ divides by the norm of u, omitting the bias correction changes little but the relative weight of λw.  DeepSpeed's
form, ``bias_correction="in_step"``, instead multiplies the finished step by √(1−β₂ᵗ)/(1−β₁ᵗ): a warm-up of some
3000 updates that recipes for the other forms do not expect.

Each method is a chain of its terms (:mod:`hpccomm.algorithms.trust_ratio`).  :func:`~hpccomm.algorithms.fused.fuse`
runs the chain by a kernel that reads and writes each vector once.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Literal, get_args

from hpccomm.algorithms.fused import InPlaceTransform, fuse
from hpccomm.algorithms.transforms import (
    Schedule,
    Term,
    adam,
    chain,
    check_choice,
    check_decay,
    check_limit,
    check_not_negative,
    check_positive,
    check_rate,
    descend,
)
from hpccomm.algorithms.transforms import momentum as momentum_trace
from hpccomm.algorithms.trust_ratio import (
    NormReduce,
    add_decayed_weights,
    check_range,
    layers,
    learning_rate,
    scale_by_global_norm,
    scale_by_trust_ratio,
)
from hpccomm.buckets import Bucket

Variant = Literal["paper", "optax", "torch", "mlperf", "simclr"]


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
    ``clip`` is LARC's: φ ← min(φ/γ, 1), so that no tensor's step exceeds that of γ alone.  ``max_norm``
    clips the whole gradient first.  ``decay`` and ``adapt`` select tensors: ``"flags"`` of the bucket (by default
    biases and scales of normalisations neither decay nor adapt), ``"all"``, ``"decayed"``, or a list of names.
    ``part=(lo, hi)`` and ``norm_reduce`` are for a rank that holds these elements of the vector only: see
    :mod:`hpccomm.algorithms.trust_ratio`.

    >>> bucket = Bucket({"w": (2, 2), "b": (2,)})
    >>> method = lars(bucket, 1.0, trust=0.5)
    >>> step, _ = method.update(np.ones(6, "f4"), method.init(np.ones(6, "f4")), np.ones(6, "f4"))
    >>> step.tolist()
    [-0.5, -0.5, -0.5, -0.5, -1.0, -1.0]

    You, Gitman & Ginsburg, *Large batch training of convolutional networks*, 2017, algorithm 1.
    """
    check_choice("lars: variant", variant, get_args(Variant))
    check_rate("lars: lr", lr)
    check_decay("lars: momentum", momentum)
    check_not_negative("lars: weight_decay", weight_decay)
    check_not_negative("lars: eps", eps)
    check_positive("lars: trust", trust, "pass a positive number; 0.001 is usual")
    if max_norm is not None:
        check_limit("lars: max_norm", max_norm, "pass a positive number, or None")
    here = layers("lars", bucket, part, decay, adapt)
    clip_gradient = scale_by_global_norm("none" if max_norm is None else "clip", max_norm or 1.0, norm_reduce)
    decayed, velocity, rate = add_decayed_weights(weight_decay, here), momentum_trace(momentum, nesterov), descend(lr)
    ratio = partial(scale_by_trust_ratio, here, trust=trust, eps=eps, lr=lr if clip else None, norm_reduce=norm_reduce)
    terms: dict[str, tuple[Term, ...]] = {
        "paper": (clip_gradient, ratio(chain(decayed)), rate, velocity),
        "optax": (clip_gradient, decayed, ratio(), rate, velocity),
        "torch": (clip_gradient, ratio(chain(decayed)), velocity, rate),
        "mlperf": (clip_gradient, ratio(chain(decayed, velocity)), rate),
        "simclr": (clip_gradient, decayed, velocity, ratio(), rate),
    }
    return fuse("lars", chain(*terms[variant]), here, bucket if part is None else None)


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
    clipped to ``max_norm`` (apex) or divided by its norm (NVLAMB).  ``decay`` and ``adapt`` select tensors:
    ``"flags"`` of the bucket, ``"all"`` (as optax adapts: by default biases and scales of normalisations adapt here,
    and do not in :func:`lars`), ``"decayed"`` (apex, timm), or a list of names; with ``adapt=()`` it is AdamW.
    ``part=(lo, hi)`` and ``norm_reduce`` are for a rank that holds these elements only: see
    :mod:`hpccomm.algorithms.trust_ratio`.

    >>> bucket = Bucket({"w": (2, 2)})
    >>> method = lamb(bucket, 0.5, weight_decay=0, eps=0)
    >>> step, _ = method.update(np.full(4, 9, "f4"), method.init(np.ones(4, "f4")), np.ones(4, "f4"))
    >>> step.tolist()
    [-0.5, -0.5, -0.5, -0.5]

    You et al., *Large batch optimization for deep learning: training BERT in 76 minutes*, ICLR 2020, algorithm 2.
    """
    check_rate("lamb: lr", lr)
    check_decay("lamb: b1", b1)
    check_decay("lamb: b2", b2)
    check_not_negative("lamb: eps", eps)
    check_not_negative("lamb: weight_decay", weight_decay)
    check_limit("lamb: max_norm", max_norm)
    check_choice("lamb: bias_correction", bias_correction, (True, False, "in_step"))
    check_choice("lamb: grad_norm", grad_norm, ("none", "clip", "normalise"))
    check_range("lamb: ratio_clip", ratio_clip)
    check_range("lamb: weight_clip", weight_clip)
    here = layers("lamb", bucket, part, decay, adapt)

    def rate_with_correction(count: int) -> float:
        return learning_rate(lr, count) * math.sqrt(1 - b2 ** (count + 1)) / (1 - b1 ** (count + 1))

    terms = (
        scale_by_global_norm(grad_norm, max_norm, norm_reduce),
        adam(b1, b2, eps, bias_correction is True),
        add_decayed_weights(weight_decay, here),
        scale_by_trust_ratio(here, ratio_clip=ratio_clip, weight_clip=weight_clip, norm_reduce=norm_reduce),
        descend(rate_with_correction if bias_correction == "in_step" else lr),
    )
    return fuse("lamb", chain(*terms), here, bucket if part is None else None)
