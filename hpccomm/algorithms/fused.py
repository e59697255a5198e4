"""Chains of terms in one pass over memory: the kernels of LARS and LAMB, chosen by the terms of a chain.

:func:`fuse` reads the names and numbers of the terms and returns a transform that computes the same step.  The bits are
those of the chain, with one exception: where the trust ratio φ and the rate γ are the last two terms, the LARS kernel
multiplies by the product −φγ, rounded once for each tensor, and the chain multiplies by φ and by −γ.  The steps then
differ by four roundings at most, a relative 2 eps of the dtype; the velocities do not differ.

On the host, small tensors are processed in groups that fit into the cache, so that each element is read from memory
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from hpccomm.algorithms.transforms import AdamState, Chain, Term, Transform, Vector, adam, least_eps, require
from hpccomm.algorithms.trees import apply_for_trees
from hpccomm.algorithms.trust_ratio import (
    Layers,
    Rows,
    check_vectors,
    kernel,
    learning_rate,
    shrink,
    to_contiguous,
    walk_order,
)
from hpccomm.buckets import Bucket
from hpccomm.kernels.optimizers.reference import DECAYED_GRADIENT, GRADIENT, UPDATE

Terms = dict[str, SimpleNamespace]
"""The numbers of the terms by their names, in the order of the chain."""
Walk = Callable[[Vector, Any, Vector, Vector | None], None]
"""``walk(gradient, state, weights, step)``: into ``step``, or, without one, onto the weights; the state is written."""


class InPlaceTransform(Transform):
    """A transform that can also step in place.

    ``apply(gradient, state, weights) -> state`` writes the weights and consumes the state, whose arrays it overwrites;
    the same numbers as ``weights += step``, no vector is allocated.  ``formula`` is the chain of terms.
    """

    apply: Callable[[Vector, Any, Vector], Any]
    formula: Chain


class LarsState(NamedTuple):
    """The number of updates, and the velocity (with the sign and units of the variant's step)."""

    updates: int
    velocity: Vector


def fuse(who: str, formula: Chain, here: Layers, bucket: Bucket | None = None) -> InPlaceTransform:
    """The step of the chain by one kernel; raises where no kernel computes these terms in this order."""
    terms: Terms = {term.name: term.numbers for term in each_term(formula)}
    require(tuple(terms) in FUSED, f"{who}: no kernel for the terms {', '.join(terms)}: use the chain as it is")
    init, make_walk = FUSED[tuple(terms)]
    walk = make_walk(who, terms, here)

    def update(gradient: Vector, state: Any, weights: Vector) -> tuple[Vector, Any]:
        after = type(state)(state.updates, *(each.copy() for each in state[1:]))
        step = np.empty_like(weights)
        walk(gradient, after, weights, step)
        return step, after._replace(updates=state.updates + 1)

    def apply(gradient: Vector, state: Any, weights: Vector) -> Any:
        walk(gradient, state, weights, None)
        return state._replace(updates=state.updates + 1)

    made = InPlaceTransform(init, update, bucket, parts=[formula])
    made.apply, made.formula = apply_for_trees(apply, made.layouts), formula
    return made


def each_term(transform: Transform) -> Iterator[Term]:
    """The terms of a chain in order; those inside a trust ratio before it."""
    for each in transform.terms if isinstance(transform, Chain) else ():
        if isinstance(each, Term):
            if (inner := getattr(each.numbers, "inner", None)) is not None:
                yield from each_term(inner)
            yield each


def lars_walk(who: str, terms: Terms, here: Layers) -> Walk:
    """LARS in any order of trust ratio, momentum and rate."""
    before = list(terms)[: list(terms).index("momentum")]
    clip, trust, trace = terms["scale_by_global_norm"], terms["scale_by_trust_ratio"], terms["momentum"]
    ratio, rate, lr = trust.ratio, terms["add_decayed_weights"].rate, terms["descend"].lr
    ratio_first, rate_first = "scale_by_trust_ratio" in before, "descend" in before
    norm_of = GRADIENT if trust.inner is not None else DECAYED_GRADIENT if ratio_first else UPDATE
    order = walk_order(here, ratio.norm_reduce is not None)

    def group(rows: Rows, g: Vector, v: Vector, w: Vector, out: Vector | None, gamma: float, scale: float) -> None:
        """One step of some tensors: v is written, and the step into out, or, without one, onto w."""
        real, rates = w.dtype.type, (rate * rows.decay).astype(w.dtype)
        beta = real(trace.beta)
        sums = kernel("lars_sums", w)(w, g, v, rows.bounds, rates, real(scale), beta, trace.nesterov, norm_of)
        phi = ratio.of(here, rows, sums, gamma).astype(w.dtype)
        first, last = (phi, np.ones_like(phi)) if ratio_first else (np.ones_like(phi), phi)
        second = -gamma if rate_first else 1.0
        last = last if rate_first else last * real(-gamma)
        where = ("lars_apply", (w, g, v)) if out is None else ("lars_step", (w, g, v, out))
        kernel(where[0], w)(*where[1], rows.bounds, rates, first, last, real(scale), real(second), beta, trace.nesterov)

    def walk(gradient: Vector, state: LarsState, weights: Vector, step: Vector | None) -> None:
        check_vectors(who, here, gradient, weights)
        g, w = to_contiguous(gradient), to_contiguous(weights)
        gamma = learning_rate(lr, state.updates)
        scale = shrink(clip.grad_norm, clip.max_norm, g, ratio.norm_reduce)
        with np.errstate(divide="ignore", invalid="ignore"):
            for rows in order(w):
                part = slice(rows.first, rows.stop)
                group(rows, g[part], state.velocity[part], w[part], None if step is None else step[part], gamma, scale)
        end_walk(here, w, weights, step)

    return walk


def lamb_walk(who: str, terms: Terms, here: Layers) -> Walk:
    """LAMB; tensors that do not adapt take AdamW's step."""
    clip, moments, ratio = terms["scale_by_global_norm"], terms["adam"], terms["scale_by_trust_ratio"].ratio
    rate, lr, b1, b2 = terms["add_decayed_weights"].rate, terms["descend"].lr, moments.b1, moments.b2
    divided = ratio.norm_reduce is not None
    order = walk_order(here, divided)

    def walk(gradient: Vector, state: AdamState, weights: Vector, step: Vector | None) -> None:
        check_vectors(who, here, gradient, weights)
        g, w, real = to_contiguous(gradient), to_contiguous(weights), weights.dtype.type
        groups = order(w)
        t = state.updates + 1
        k1, k2 = (1 - b1**t, 1 - b2**t) if moments.bias_correction else (1.0, 1.0)
        last = real(-learning_rate(lr, state.updates))
        scale = shrink(clip.grad_norm, clip.max_norm, g, ratio.norm_reduce)
        numbers = [real(each) for each in (scale, b1, 1 - b1, b2, 1 - b2, k1, k2, least_eps(moments.eps, w.dtype))]
        placed = [each.stop - each.first for each in groups if divided or each.adapt.any()]
        room = np.empty_like(w, shape=(max(placed, default=0),)) if step is None else step
        for rows in groups if placed or step is not None else [here.rows]:
            part, rates = slice(rows.first, rows.stop), (rate * rows.decay).astype(w.dtype)
            if step is None and not divided and not rows.adapt.any():
                kernel("adam_step", w)(
                    w[part], g[part], state.mean[part], state.square[part], rows.bounds, rates, *numbers, last
                )
                continue
            out = room[: rows.stop - rows.first] if step is None else step[part]
            sums = kernel("lamb_moments", w)(
                w[part], g[part], state.mean[part], state.square[part], out, rows.bounds, rates, *numbers
            )
            phi = ratio.of(here, rows, sums).astype(w.dtype)
            if step is None:
                kernel("add_scaled", w)(w[part], out, rows.bounds, phi, last)
            else:
                kernel("scale_tensors", w)(out, rows.bounds, phi, last)
        end_walk(here, w, weights, step)

    return walk


def end_walk(here: Layers, w: Vector, weights: Vector, step: Vector | None) -> None:
    """Padding steps by zero; weights that were copied go back to their place."""
    if step is not None:
        step[here.rows.stop :] = 0
    elif w is not weights:
        weights[...] = w


LARS = (lambda weights: LarsState(0, np.zeros_like(weights)), lars_walk)
LAMB = (adam().init, lamb_walk)
FUSED: dict[tuple[str, ...], tuple[Callable[[Vector], Any], Callable[[str, Terms, Layers], Walk]]] = {
    ("scale_by_global_norm", "add_decayed_weights", "scale_by_trust_ratio", "descend", "momentum"): LARS,
    ("scale_by_global_norm", "add_decayed_weights", "scale_by_trust_ratio", "momentum", "descend"): LARS,
    ("scale_by_global_norm", "add_decayed_weights", "momentum", "scale_by_trust_ratio", "descend"): LARS,
    ("scale_by_global_norm", "adam", "add_decayed_weights", "scale_by_trust_ratio", "descend"): LAMB,
}
"""The terms of a chain, and the state and step of the kernel that computes them."""
