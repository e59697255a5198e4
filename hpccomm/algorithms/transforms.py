"""A transform is a pair of functions: it turns a gradient into a step, and its state is data, in and out.

``init(weights) -> state``, ``update(gradient, state, weights) -> (step, state)``; then ``weights +=
step``.  Vectors are flat and of one floating-point dtype.  The functions of this module write neither the gradient nor
the weights nor the state that they receive, so a caller can keep a state, compare it and return to it; a step may be
the same array as the gradient.  Transforms after ``scale(-lr)`` receive updates, those before it gradients.  The form
is that of optax (DeepMind, 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.trees import init_for_trees, update_for_trees
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError

Vector = npt.NDArray[Any]
Schedule = Callable[[int], float]
"""A value for each update, counted from 0."""


AnyTransform = TypeVar("AnyTransform", bound="Transform")


class Pair(NamedTuple):
    """The two functions of a transform."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]


class Transform(Pair):
    """A pair of functions that turns a gradient into a step.

    Written for vectors; made into a transform, both also take PyTorch's tensors, JAX's arrays, and dicts, lists and
    tuples of arrays, and give steps of the same form (:mod:`hpccomm.algorithms.trees`).  ``bucket`` names the tensors
    of a method that treats them one by one.
    """

    bucket: Bucket | None = None

    def __new__(
        cls: type[AnyTransform],
        init: Callable[[Vector], Any],
        update: Callable[[Vector, Any, Vector], tuple[Vector, Any]],
        bucket: Bucket | None = None,
    ) -> AnyTransform:
        """The pair, whose functions take trees."""
        made = Pair.__new__(cls, init_for_trees(init, bucket), update_for_trees(update, bucket))
        made.bucket = bucket
        return made


class Term(Transform):
    """A transform that carries its name and its numbers, by which a chain of terms is matched to a fused kernel."""

    name: str
    numbers: SimpleNamespace

    @classmethod
    def of(cls, transform: Transform, name: str, **numbers: Any) -> Term:
        """The transform under this name."""
        term = cls(*transform, transform.bucket)
        term.name, term.numbers = name, SimpleNamespace(**numbers)
        return term


class Chain(Transform):
    """A chain of transforms, which ``terms`` lists in order."""

    terms: tuple[Transform, ...]


def chain(*transforms: Transform) -> Chain:
    """Apply the transforms one after the other; the state is the tuple of their states."""
    for each in transforms:
        fits = callable(getattr(each, "init", None)) and callable(getattr(each, "update", None))
        require(fits, f"chain: {each!r} is no transform: pass momentum(0.9), scale(-lr) or another pair (init, update)")

    def init(weights: Vector) -> tuple[Any, ...]:
        return tuple(each.init(weights) for each in transforms)

    def update(gradient: Vector, state: tuple[Any, ...], weights: Vector) -> tuple[Vector, tuple[Any, ...]]:
        check_alike(gradient, weights)
        states = []
        for each, before in zip(transforms, state, strict=True):
            gradient, after = each.update(gradient, before, weights)
            states.append(after)
        return gradient, tuple(states)

    joined = Chain(init, update, next((each.bucket for each in transforms if getattr(each, "bucket", None)), None))
    joined.terms = transforms
    return joined


def stateless(step: Callable[[Vector, Vector], Vector]) -> Transform:
    """A transform without state: ``step(gradient, weights)``."""
    return Transform(lambda weights: (), lambda gradient, state, weights: (step(gradient, weights), state))


def scale(factor: float) -> Transform:
    """Multiply by a number; ``scale(-lr)`` ends most chains."""
    number = float(factor)
    return stateless(lambda gradient, weights: gradient * number)


def scale_by_schedule(schedule: Schedule) -> Transform:
    """Multiply by ``schedule(count)``; the state is the number of updates."""

    def update(gradient: Vector, count: int, weights: Vector) -> tuple[Vector, int]:
        return gradient * float(schedule(count)), count + 1

    return Transform(lambda weights: 0, update)


def descend(lr: float | Schedule) -> Term:
    """Multiply by minus the learning rate, a number or a function of the update's count."""
    step = scale_by_schedule(lambda count: -lr(count)) if callable(lr) else scale(-lr)
    return Term.of(step, "descend", lr=lr)


def clip(max_norm: float) -> Transform:
    """Scale a gradient whose Euclidean norm exceeds ``max_norm`` down to that norm (Pascanu et al., ICML 2013).

    Squares are added in float64 in a fixed order, so equal gradients give equal bits on all ranks.  Place ``clip``
    after the exchange to bound the global gradient.  A gradient with a NaN is returned unchanged.
    """
    require(max_norm > 0, f"clip: max_norm is {max_norm}: pass a positive number")

    def clip_gradient(gradient: Vector, weights: Vector) -> Vector:
        norm = math.sqrt(np.add.reduce(np.square(gradient, dtype=np.float64)))
        return gradient * (max_norm / norm) if norm > max_norm else gradient

    return stateless(clip_gradient)


def weight_decay(rate: float, where: npt.NDArray[np.bool_] | None = None) -> Transform:
    """Add ``rate * weights``; the mask ``where`` selects the elements that decay (``bucket.mask("decay")``).

    Before ``momentum`` this is L2 regularisation; between ``adam`` and ``scale(-lr)`` it is the decoupled weight decay
    of AdamW (Loshchilov & Hutter, ICLR 2019).
    """
    require(rate >= 0, f"weight_decay: rate is {rate}: pass 0 or more")

    def add_decay(gradient: Vector, weights: Vector) -> Vector:
        pull = float(rate) * weights
        return gradient + (pull if where is None else np.where(where, pull, weights.dtype.type(0)))

    return stateless(add_decay)


def momentum(beta: float, nesterov: bool = False) -> Term:
    """m ← βm + g; the step is m, or g + βm when ``nesterov``.  The state is m."""
    check_decay("momentum: beta", beta)

    def update(gradient: Vector, moment: Vector, weights: Vector) -> tuple[Vector, Vector]:
        moment = float(beta) * moment + gradient
        return (gradient + float(beta) * moment if nesterov else moment), moment

    return Term.of(Transform(np.zeros_like, update), "momentum", beta=beta, nesterov=nesterov)


class AdamState(NamedTuple):
    """The number of updates, and the running means of the gradient and of its square."""

    updates: float
    mean: Vector
    square: Vector


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, bias_correction: bool = True) -> Term:
    """Adam's direction m̂ / (√v̂ + eps), or m / (√v + eps) without bias correction (Kingma & Ba, ICLR 2015)."""
    check_decay("adam: b1", b1)
    check_decay("adam: b2", b2)
    require(eps >= 0, f"adam: eps is {eps}: pass 0 or more")

    def init(weights: Vector) -> AdamState:
        return AdamState(0, np.zeros_like(weights), np.zeros_like(weights))

    def update(gradient: Vector, state: AdamState, weights: Vector) -> tuple[Vector, AdamState]:
        updates = state.updates + 1
        mean = b1 * state.mean + (1 - b1) * gradient
        square = b2 * state.square + (1 - b2) * (gradient * gradient)
        k1, k2 = (1 - b1**updates, 1 - b2**updates) if bias_correction else (1.0, 1.0)
        return (mean / k1) / (np.sqrt(square / k2) + eps), AdamState(updates, mean, square)

    return Term.of(Transform(init, update), "adam", b1=b1, b2=b2, eps=eps, bias_correction=bias_correction)


class EveryState(NamedTuple):
    """The number of gradients since the last step, their sum, and the inner state."""

    micro_steps: int
    total: Vector
    inner: Any


def every(k: int, inner: Transform) -> Transform:
    """Pass the sum of k gradients to ``inner``; the k-1 updates before it step by zero (gradient accumulation).

    To step on the mean, begin ``inner`` with ``scale(1 / k)``.  An exchange inside ``inner`` communicates once in k
    updates.
    """
    require(k >= 1, f"every: k is {k}: pass 1 or more")

    def init(weights: Vector) -> EveryState:
        return EveryState(0, np.zeros_like(weights), inner.init(weights))

    def update(gradient: Vector, state: EveryState, weights: Vector) -> tuple[Vector, EveryState]:
        total = state.total + gradient
        if state.micro_steps + 1 < k:
            return np.zeros_like(weights), EveryState(state.micro_steps + 1, total, state.inner)
        step, after = inner.update(total, state.inner, weights)
        return step, EveryState(0, np.zeros_like(weights), after)

    return Transform(init, update)


def check_alike(gradient: Vector, weights: Vector) -> None:
    """Raise unless shapes and dtypes are equal: broadcasting or a cast would hide a mistake."""
    if gradient.shape != weights.shape or gradient.dtype != weights.dtype:
        raise ArgumentError(
            f"the gradient is {gradient.dtype} of shape {gradient.shape}, the weights {weights.dtype} "
            f"of shape {weights.shape}: make them alike, e.g. with hpccomm.Bucket and astype"
        )


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise for a value that is none of the known ones."""
    require(value in known, f"{name} is {value!r}: pass one of {', '.join(map(repr, known))}")


def check_decay(name: str, value: float) -> None:
    """Raise for a decay rate outside [0, 1)."""
    require(0 <= value < 1, f"{name} is {value}: pass a number from 0 to below 1")


def require(holds: bool, message: str) -> None:
    """Raise an :class:`~hpccomm.errors.ArgumentError` unless the condition holds."""
    if not holds:
        raise ArgumentError(message)
