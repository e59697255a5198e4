"""A transform is a pair of functions: it turns a gradient into a step, and its state is data, in and out.

``init(weights) -> state``, ``update(gradient, state, weights) -> (step, state)``; then ``weights +=
step``.  Vectors are flat and of one floating-point dtype.  ``update`` writes neither the gradient nor the weights; it
consumes the state, whose arrays it may overwrite: keep :func:`hpccomm.snapshot` of a state to return to it.  A step may
be the same array as the gradient or as one of the new state: add it before the next update.  Transforms after
``scale(-lr)`` or ``descend(lr)`` receive updates, those before it gradients.  The form is that of optax (DeepMind,
2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.reports import MessageReport, message_reports
from hpccomm.algorithms.states import LocalVector
from hpccomm.algorithms.trees import Layouts, StateKind, finish_for_trees, init_for_trees, update_for_trees
from hpccomm.arrays import narrow, reduction_dtype, widen
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
    of a method that treats them one by one, ``comm`` are the ranks with which it exchanges tensors, ``flag_comm`` those
    with which it agrees on flags alone.  ``needs_whole`` names what gives another step on a shard of the vector than on
    the whole.  All of these are also taken from ``parts``, the transforms inside this one.
    """

    bucket: Bucket | None = None
    comms: tuple[Any, ...] = ()
    needs_whole: str = ""
    layouts: Layouts

    def __new__(
        cls: type[AnyTransform],
        init: Callable[[Vector], Any],
        update: Callable[[Vector, Any, Vector], tuple[Vector, Any]],
        bucket: Bucket | None = None,
        *,
        comm: Any = None,
        flag_comm: Any = None,
        needs_whole: str = "",
        parts: Sequence[Any] = (),
    ) -> AnyTransform:
        """The pair, whose functions take trees."""
        inside = [each for each in parts if isinstance(each, Transform)]
        bucket = bucket or next((each.bucket for each in inside if each.bucket), None)
        exchange = unique([comm, *(each for part in inside for each in part.layouts.comms)])
        kind, layouts = StateKind(), Layouts(bucket, exchange, [each.layouts for each in inside])
        made = Pair.__new__(cls, init_for_trees(init, layouts, kind), update_for_trees(update, layouts, kind))
        made.bucket, made.layouts = bucket, layouts
        made.comms = unique([*exchange, flag_comm, *(each for part in inside for each in part.comms)])
        made.needs_whole = needs_whole or next((each.needs_whole for each in inside if each.needs_whole), "")
        return made


def unique(comms: Sequence[Any]) -> tuple[Any, ...]:
    """The communicators, each once."""
    return tuple({id(each): each for each in comms if each is not None}.values())


class Term(Transform):
    """A transform that carries its name and its numbers, by which a chain of terms is matched to a fused kernel."""

    name: str
    numbers: SimpleNamespace

    @classmethod
    def of(cls, transform: Transform, name: str, **numbers: Any) -> Term:
        """The transform under this name."""
        term = cls(*transform, parts=[transform])
        term.name, term.numbers = name, SimpleNamespace(**numbers)
        return term


class Chain(Transform):
    """A chain of transforms, which ``terms`` lists in order."""

    terms: tuple[Transform, ...]


class ResidualTransform(Transform):
    """A transform whose state holds gradients that no step has applied yet.

    ``flush_state(state) -> (gradient, state)`` (collective): exchange all of them densely.
    """

    flush_state: Callable[[Any], tuple[Vector, Any]]

    @classmethod
    def of(
        cls,
        init: Callable[[Vector], Any],
        update: Callable[[Vector, Any, Vector], tuple[Vector, Any]],
        flush_state: Callable[[Any], tuple[Vector, Any]],
        bucket: Bucket | None,
        **named: Any,
    ) -> ResidualTransform:
        """The transform of these functions; ``named`` as of :class:`Transform`."""
        made = cls(init, update, bucket, **named)
        made.flush_state = flush_state
        return made


def can_flush(method: Any) -> bool:
    """Whether a method, or a part of a chain, keeps what it has not sent."""
    return isinstance(method, ResidualTransform) or any(map(can_flush, getattr(method, "terms", ())))


def flush(method: Transform, state: Any, weights: Any) -> tuple[Any, Any]:
    """The step of all gradients that compressed exchanges have not applied yet, and the state without them.

    Collective.  Call it at the end of a run, and add the step to the weights: what ranks have not sent is averaged, or
    summed, densely, and passes the transforms that follow the exchange.

    >>> from mpi4py import MPI
    >>> from hpccomm import gtc
    >>> method, weights = chain(gtc(MPI.COMM_SELF, tau=1.0), scale(-1)), np.zeros(2, "f4")
    >>> step, state = method.update(np.float32([0.75, 1.5]), method.init(weights), weights)
    >>> step.tolist()
    [-0.0, -1.0]
    >>> flush(method, state, weights)[0].tolist()
    [-0.75, -0.5]
    """
    require(
        can_flush(method),
        "flush: nothing to flush: neither this method nor a part of its chain is feedback, gtc, dgc, onebit_sgd, "
        "ef_signsgd, powersgd or block_mean; inside hybrid, every or another wrapper it is out of reach",
    )
    return finish_for_trees(partial(flush_terms, method), method.layouts)(state, weights)


def flush_terms(method: Any, state: Any, weights: Vector, gradient: Vector | None = None) -> tuple[Any, Any]:
    """What a method makes of a gradient, and of what it has not sent; None where there is neither."""
    if isinstance(method, Chain):
        after = []
        for each, before in zip(method.terms, state, strict=True):
            gradient, one = flush_terms(each, before, weights, gradient)
            after.append(one)
        return gradient, tuple(after)
    if not isinstance(method, ResidualTransform):
        return (None, state) if gradient is None else method.update(gradient, state, weights)
    require(gradient is None, "flush: two exchanges in one chain keep what they have not sent: flush them one by one")
    return method.flush_state(state)


def chain(*transforms: Transform, bucket: Bucket | None = None) -> Chain:
    """Apply the transforms one after the other; the state is the tuple of their states.

    ``bucket`` names the tensors of flat vectors, by default that of one of the transforms: where one of them exchanges,
    ranks compare these tensors in ``init``, as they do for trees.
    """
    for each in transforms:
        check_transform("chain", each)

    def init(weights: Vector) -> tuple[Any, ...]:
        return tuple(each.init(weights) for each in transforms)

    def update(gradient: Vector, state: tuple[Any, ...], weights: Vector) -> tuple[Vector, tuple[Any, ...]]:
        if not isinstance(state, tuple) or len(state) != len(transforms):
            given = f"{len(state)} states" if isinstance(state, tuple) else f"a {type(state).__name__}"
            raise ArgumentError(f"chain: {given} for {len(transforms)} transforms: {OWN_STATE}")
        states = []
        for each, before in zip(transforms, state, strict=True):
            gradient, after = each.update(gradient, before, weights)
            states.append(after)
        return gradient, tuple(states)

    joined = Chain(init, update, bucket, parts=transforms)
    joined.terms = transforms
    return joined


def restart(transform: Any, state: Any, weights: Vector, updates: int) -> Any:
    """The state of ``init(weights)``, but that schedules go on: states that are a number, of updates, count more.

    So do those of the terms of a chain, and of a transform within another one, which is its state's ``inner``.
    """

    def go_on(fresh: Any, before: Any) -> Any:
        if isinstance(before, int):
            return before + updates
        if type(before) is tuple:
            return tuple(map(go_on, fresh, before))
        return fresh._replace(inner=go_on(fresh.inner, before.inner)) if hasattr(before, "inner") else fresh

    return go_on(transform.init(weights), state)


def stateless(step: Callable[[Vector, Vector], Vector], needs_whole: str = "") -> Transform:
    """A transform without state: ``step(gradient, weights)``."""

    def update(gradient: Vector, state: Any, weights: Vector) -> tuple[Vector, Any]:
        return step(gradient, weights), state

    return Transform(lambda weights: (), update, needs_whole=needs_whole)


def scale(factor: float) -> Transform:
    """Multiply by a number; ``scale(-lr)`` ends most chains."""
    require(not callable(factor), "scale: the factor is a function: pass descend(lr), or scale_by_schedule(factor)")
    check_number("scale: factor", factor)
    number = float(factor)
    return stateless(lambda gradient, weights: round_like(gradient * number, gradient.dtype))


def scale_by_schedule(schedule: Schedule) -> Transform:
    """Multiply by ``schedule(count)``; the state is the number of updates."""
    require(callable(schedule), f"scale_by_schedule: schedule is {schedule!r}: pass a function of the update's count")

    def update(gradient: Vector, count: int, weights: Vector) -> tuple[Vector, int]:
        return round_like(gradient * float(schedule(count)), gradient.dtype), count + 1

    return Transform(lambda weights: 0, update)


def descend(lr: float | Schedule) -> Term:
    """Multiply by minus the learning rate, a number or a function of the update's count."""
    check_rate("descend: lr", lr)
    step = scale_by_schedule(lambda count: -lr(count)) if callable(lr) else scale(-lr)
    return Term.of(step, "descend", lr=lr)


def clip(max_norm: float) -> Transform:
    """Scale a gradient whose Euclidean norm exceeds ``max_norm`` down to that norm (Pascanu et al., ICML 2013).

    Squares are added in float64 in a fixed order, so equal gradients give equal bits on all ranks.  Place ``clip``
    after the exchange to bound the global gradient.  A gradient with a NaN is returned unchanged.
    """
    check_limit("clip: max_norm", max_norm)

    def clip_gradient(gradient: Vector, weights: Vector) -> Vector:
        wide = widen(gradient)
        squares = np.square(abs(wide) if wide.dtype.kind == "c" else wide, dtype=np.float64)
        norm = math.sqrt(np.add.reduce(squares, axis=None))
        return round_like(gradient * (max_norm / norm), gradient.dtype) if norm > max_norm else gradient

    return stateless(clip_gradient, needs_whole="clip")


def weight_decay(rate: float, where: npt.NDArray[np.bool_] | None = None) -> Transform:
    """Add ``rate * weights``; the mask ``where`` selects the elements that decay (``bucket.mask("decay")``).

    Before ``momentum`` this is L2 regularisation; between ``adam`` and ``scale(-lr)`` it is the decoupled weight decay
    of AdamW (Loshchilov & Hutter, ICLR 2019).
    """
    check_not_negative("weight_decay: rate", rate)

    def init(weights: Vector) -> tuple[()]:
        shape = weights.shape if where is None else np.shape(where)
        require(
            shape == weights.shape,
            f"weight_decay: the mask has shape {shape}, the weights {weights.shape}: pass the mask of their "
            "bucket; the optimizer of sharded states makes one of lambda bucket, reduce: … bucket.mask('decay')",
        )
        return ()

    def update(gradient: Vector, state: tuple[()], weights: Vector) -> tuple[Vector, tuple[()]]:
        pull = float(rate) * widen(weights)
        pull = pull if where is None else np.where(where, pull, pull.dtype.type(0))
        return round_like(gradient + pull, gradient.dtype), state

    return Transform(init, update)


def momentum(beta: float, nesterov: bool = False) -> Term:
    """m ← βm + g; the step is m, or g + βm when ``nesterov``.  The state is m, in float32 for 16-bit gradients."""
    check_decay("momentum: beta", beta)

    def update(gradient: Vector, moment: Vector, weights: Vector) -> tuple[Vector, Vector]:
        check_shape("momentum", moment, weights)
        moment = float(beta) * moment + gradient
        return round_like(gradient + float(beta) * moment if nesterov else moment, gradient.dtype), moment

    return Term.of(Transform(zeros_to_add, update), "momentum", beta=beta, nesterov=bool(nesterov))


class AdamState(NamedTuple):
    """The number of updates, and the running means of the gradient and of its square."""

    updates: float
    mean: Vector
    square: Vector


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, bias_correction: bool = True) -> Term:
    """Adam's direction m̂ / (√v̂ + eps), or m / (√v + eps) without bias correction (Kingma & Ba, ICLR 2015).

    The moments of 16-bit gradients are float32.  An ``eps`` of 0 means the least one that keeps 0/0 at 0.
    """
    check_decay("adam: b1", b1)
    check_decay("adam: b2", b2)
    check_not_negative("adam: eps", eps)

    def init(weights: Vector) -> AdamState:
        return AdamState(0, zeros_to_add(weights), zeros_to_add(weights))

    def update(gradient: Vector, state: AdamState, weights: Vector) -> tuple[Vector, AdamState]:
        check_shape("adam", state.mean, weights)
        updates, wide = state.updates + 1, widen(gradient)
        mean = b1 * state.mean + (1 - b1) * wide
        square = b2 * state.square + (1 - b2) * (wide * wide)
        k1, k2 = (1 - b1**updates, 1 - b2**updates) if bias_correction else (1.0, 1.0)
        direction = (mean / k1) / (np.sqrt(square / k2) + least_eps(eps, wide.dtype))
        return round_like(direction, gradient.dtype), AdamState(updates, mean, square)

    return Term.of(Transform(init, update), "adam", b1=b1, b2=b2, eps=eps, bias_correction=bias_correction)


class SkipState(NamedTuple):
    """The number of updates that were skipped, and the inner state."""

    skipped: int
    inner: Any

    def messages(self) -> MessageReport:
        """The messages of the inner state, and what was skipped before it."""
        found = MessageReport(skipped=self.skipped)
        for each in message_reports(self.inner):
            found = found.add(each)
        return found


def apply_if_finite(inner: Transform) -> Transform:
    """Step by zero, and leave the inner state alone, where the gradient has a NaN or an infinity.

    Place it after the exchange: the mean is the same on all ranks, so that all of them skip the same steps.  Around an
    exchange one rank would skip alone while the others wait: it is refused, and :func:`~hpccomm.scale_loss` asks all
    ranks first.

    >>> method, weights = apply_if_finite(scale(-1)), np.zeros(2)
    >>> step, state = method.update(np.array([1.0, np.nan]), method.init(weights), weights)
    >>> step.tolist(), state.skipped
    ([0.0, 0.0], 1)
    """

    check_transform("apply_if_finite", inner)
    require(
        all(comm.size == 1 for comm in getattr(inner, "comms", ())),
        "apply_if_finite: the transform inside exchanges, and a rank would skip it alone: place apply_if_finite after "
        "the exchange, chain(mean(comm), apply_if_finite(…)), or use scale_loss around it",
    )

    def update(gradient: Vector, state: SkipState, weights: Vector) -> tuple[Vector, SkipState]:
        if not np.isfinite(gradient).all():
            return np.zeros_like(weights), state._replace(skipped=state.skipped + 1)
        step, after = inner.update(gradient, state.inner, weights)
        return step, SkipState(state.skipped, after)

    return Transform(lambda weights: SkipState(0, inner.init(weights)), update, parts=[inner])


class EveryState(NamedTuple):
    """The number of gradients since the last step, their sum, and the inner state."""

    micro_steps: int
    total: LocalVector
    inner: Any


def every(k: int, inner: Transform) -> Transform:
    """Pass the sum of k gradients to ``inner``; the k-1 updates before it step by zero (gradient accumulation).

    To step on the mean, begin ``inner`` with ``scale(1 / k)``.  An exchange inside ``inner`` communicates once in k
    updates.
    """
    check_count("every: k", k, 1)
    check_transform("every", inner)

    def init(weights: Vector) -> EveryState:
        return EveryState(0, zeros_to_add(weights), inner.init(weights))

    def update(gradient: Vector, state: EveryState, weights: Vector) -> tuple[Vector, EveryState]:
        check_shape("every", state.total, weights)
        total = state.total + gradient
        if state.micro_steps + 1 < k:
            return np.zeros_like(weights), EveryState(state.micro_steps + 1, total, state.inner)
        step, after = inner.update(round_like(total, gradient.dtype), state.inner, weights)
        return step, EveryState(0, zeros_to_add(weights), after)

    return Transform(init, update, parts=[inner])


def round_like(x: Vector, dtype: np.dtype[Any]) -> Vector:
    """What was computed in float32 for 16-bit floats, rounded to them; all else as it is."""
    return x if reduction_dtype(dtype) == dtype else narrow(x, dtype)


def zeros_to_add(weights: Vector) -> Vector:
    """Zeros of the shape of the weights in which many gradients are added: float32 for 16-bit floats."""
    return np.zeros_like(weights, dtype=reduction_dtype(weights.dtype))


SMALLEST_ROOT = {np.dtype(np.float32): 2.0**-75, np.dtype(np.float64): 2.0**-537}
"""Half the root of the smallest square above 0: an eps that no other square feels."""


def least_eps(eps: float, dtype: np.dtype[Any]) -> float:
    """Adam's eps, above 0: the direction of an element whose gradients were all 0 is 0, not 0/0."""
    return max(eps, SMALLEST_ROOT.get(dtype, 0.0))


def check_shape(who: str, vector: Vector, weights: Vector) -> None:
    """Raise for the state of other weights, which broadcasting would hide."""
    if vector.shape != weights.shape:
        raise ArgumentError(f"{who}: the state has shape {vector.shape}, the weights {weights.shape}: {OWN_STATE}")


OWN_STATE = "pass the state that init, or the last update, of this method returned"


def check_choice(name: str, value: Any, known: Collection[Any]) -> None:
    """Raise for a value that is none of the known ones."""
    fits = not isinstance(value, np.ndarray) and value in known
    require(fits, f"{name} is {value!r}: pass one of {', '.join(map(repr, known))}")


def check_transform(who: str, given: Any) -> None:
    """Raise for what is no transform."""
    fits = callable(getattr(given, "init", None)) and callable(getattr(given, "update", None))
    require(fits, f"{who}: {given!r} is no transform: pass momentum(0.9), scale(-lr) or another pair (init, update)")


def is_number(given: Any) -> bool:
    """Whether this is one real number."""
    return isinstance(given, int | float | np.floating | np.integer)


def check_number(name: str, given: Any) -> None:
    """Raise for what is no finite number."""
    require(is_number(given) and math.isfinite(given), f"{name} is {given!r}: pass a number")


def check_positive(name: str, given: Any, advice: str = "pass a positive number") -> None:
    """Raise for what is no number above 0."""
    require(is_number(given) and 0 < given < math.inf, f"{name} is {given!r}: {advice}")


def check_limit(name: str, given: Any, advice: str = "pass a positive number") -> None:
    """Raise for what is no number above 0, or infinity, a limit that never binds."""
    require(is_number(given) and given > 0, f"{name} is {given!r}: {advice}")


def check_not_negative(name: str, given: Any) -> None:
    """Raise for what is no number from 0 on."""
    require(is_number(given) and 0 <= given < math.inf, f"{name} is {given!r}: pass 0 or more")


def check_count(name: str, given: Any, least: int) -> None:
    """Raise for what is no whole number, or too small a one."""
    whole = isinstance(given, int | np.integer) and not isinstance(given, bool)
    require(whole and given >= least, f"{name} is {given!r}: pass a whole number, {least} or more")


def check_seed(name: str, given: Any) -> None:
    """Raise for a seed that is no whole number."""
    require(isinstance(given, int | np.integer), f"{name}: seed is {given!r}: pass a whole number")


def check_rate(name: str, rate: float | Schedule) -> None:
    """Raise for a learning rate below 0: every optimizer takes a positive rate, and its step descends."""
    require(
        callable(rate) or is_number(rate), f"{name} is {rate!r}: pass a number, or a function of the update's count"
    )
    if not callable(rate):
        fits = 0 <= rate < math.inf
        require(fits, f"{name} is {rate}: pass a positive rate, the step descends by itself")


def check_decay(name: str, value: float) -> None:
    """Raise for a decay rate outside [0, 1)."""
    check_number(name, value)
    require(0 <= value < 1, f"{name} is {value}: pass a number from 0 to below 1")


def require(holds: bool, message: str) -> None:
    """Raise an :class:`~hpccomm.errors.ArgumentError` unless the condition holds."""
    if not holds:
        raise ArgumentError(message)
