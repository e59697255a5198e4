"""Inputs that nobody planned: every method takes them for what they are, or refuses them in one sentence.

A gradient given in another way (strides, order, library, read-only, tied to the weights) has the steps of the same
numbers in a plain array; other dtypes and shapes give finite steps of the weights' dtype; all else is an ArgumentError.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import hpccomm
from hpccomm.algorithms.local_steps import PeriodicTransform
from hpccomm.algorithms.transforms import Transform, chain, descend, momentum
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError
from hpccomm.testing import run_on_ranks

HEAVY = chain(momentum(0.5), descend(0.05))
GUARDED = hpccomm.apply_if_finite(chain(hpccomm.clip(1.0), HEAVY))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def after(exchange: Callable[[Any], Transform]) -> Callable[[Any, Bucket], Transform]:
    return lambda comm, bucket: chain(exchange(comm), HEAVY)


def by_path(path: str) -> Callable[[Any, Bucket], Transform]:
    return after(lambda comm: hpccomm.feedback(hpccomm.topk(0.5), comm, exchange=path))


METHODS: dict[str, Callable[[Any, Bucket], Transform]] = {
    "sgd": lambda comm, bucket: hpccomm.synchronous_sgd(comm, 0.05, momentum=0.5, weight_decay=0.1, bucket=bucket),
    "adam": lambda comm, bucket: hpccomm.synchronous_adam(comm, 0.05, weight_decay=0.1),
    "lars": lambda comm, bucket: chain(hpccomm.mean(comm), hpccomm.apply_if_finite(hpccomm.lars(bucket, 0.1))),
    "lamb": lambda comm, bucket: chain(hpccomm.mean(comm), hpccomm.apply_if_finite(hpccomm.lamb(bucket, 0.1))),
    "scale_loss": lambda comm, bucket: hpccomm.scale_loss(
        comm, chain(hpccomm.mean(comm), HEAVY), hpccomm.LossScale(1.0, 0)
    ),
    "rows": lambda comm, bucket: chain(
        hpccomm.mean_rows(comm, bucket, [each.name for each in bucket.table if each.shape]),
        hpccomm.apply_if_finite(HEAVY),
    ),
    "gtc": after(lambda comm: hpccomm.gtc(comm, 0.5)),
    "gtc auto": after(hpccomm.gtc),
    "gtc rice": after(lambda comm: hpccomm.gtc(comm, density=1.0, code="rice")),
    "randomk": after(lambda comm: hpccomm.feedback(hpccomm.randomk(0.5), comm)),
    "topk momentum": lambda comm, bucket: chain(hpccomm.feedback(hpccomm.topk(0.5), comm, 0.5), descend(0.05)),
    **{
        path: by_path(path)
        for path in ("auto", "node", "leaders", "split", "recursive_doubling", "ok_topk", "dense", "allgather")
    },
    "qsgd": after(lambda comm: hpccomm.feedback(hpccomm.qsgd(4, 32), comm)),
    "cast": after(lambda comm: hpccomm.feedback(hpccomm.cast("fp16"), comm)),
    "natural": after(lambda comm: hpccomm.without_feedback(hpccomm.natural(), comm)),
    "majority": after(lambda comm: hpccomm.feedback(hpccomm.sign_majority(), comm)),
    "low rank": after(lambda comm: hpccomm.feedback(hpccomm.low_rank(2), comm)),
    "onebit_sgd": lambda comm, bucket: chain(hpccomm.onebit_sgd(comm, bucket), HEAVY),
    "ef_signsgd": lambda comm, bucket: hpccomm.ef_signsgd(comm, 0.05, bucket),
    "int8": after(hpccomm.block_mean),
    "mx": after(lambda comm: hpccomm.block_mean(comm, "mx", feedback=False)),
    "dgc": lambda comm, bucket: chain(
        hpccomm.dgc(comm, bucket, 0.5, warmup=4, stages=(1.0, 0.1), smallest=1, momentum=0.5, clip=5.0), descend(0.05)
    ),
    "powersgd": lambda comm, bucket: chain(hpccomm.powersgd(comm, bucket, 2, start_dense_steps=2), HEAVY),
    "onebit_adam": lambda comm, bucket: hpccomm.onebit_adam(comm, 0.05, 3, bucket=bucket, eps=1e-3),
    "onebit_lamb": lambda comm, bucket: hpccomm.onebit_lamb(comm, bucket, 0.05, 3),
    "local_sgd": lambda comm, bucket: hpccomm.local_sgd(comm, HEAVY, 1),
    "post_local_sgd": lambda comm, bucket: hpccomm.post_local_sgd(comm, HEAVY, 3, 3),
    "bmuf": lambda comm, bucket: hpccomm.bmuf(comm, HEAVY, 3, warmup=3, nesterov="paper", local_state="average"),
    "bmuf sharded": lambda comm, bucket: hpccomm.bmuf(comm, HEAVY, 1, shard_state=True),
    "bmuf_adam": lambda comm, bucket: hpccomm.bmuf_adam(comm, 0.05, 3, warmup=3),
    "slowmo": lambda comm, bucket: hpccomm.slowmo(comm, HEAVY, 0.05, 3),
    "diloco": lambda comm, bucket: hpccomm.diloco(comm, HEAVY, 1),
    "hybrid": lambda comm, bucket: hpccomm.hybrid(comm, lambda group: hpccomm.gtc(group, 0.5), HEAVY, 1, period=1),
    "every": lambda comm, bucket: hpccomm.every(2, chain(hpccomm.mean(comm), GUARDED)),
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "plain": {"w": (12, 10), "bias": (5,)},
    "mixed": {"w": (4, 3), "none": (0, 2), "number": (), "b": (1,)},
    "no elements": {"w": (0, 3)},
    "no tensors": {},
    "one element": {"w": (1,)},
    "a number": {"w": ()},
    "three elements": {"w": (3,)},
}


def numbers(size: int, rank: int, step: int) -> Any:
    return np.random.default_rng([rank, step]).normal(size=size).astype("f4")


def run(comm: Any, make: Callable[[Any, Bucket], Transform], shapes: str, dtype: Any, give: Any, hold: Any) -> Any:
    """The weights after some steps; gradients are ``give(array, weights, bucket)``, weights ``hold(array, bucket)``."""
    bucket = Bucket(SHAPES[shapes], np.dtype(dtype))
    plain = np.ones(bucket.size, dtype)
    weights = hold(plain, bucket)
    method = make(comm, bucket)
    state = method.init(weights)
    for number in range(7):
        gradient = give(numbers(bucket.size, comm.rank, number).astype(dtype), weights, bucket)
        step, state = method.update(gradient, state, weights)
        weights = add(weights, step)
    if isinstance(method, PeriodicTransform):
        step, state = method.finish(state, weights)
        weights = add(weights, step)
        method.export(state, weights)
    again = hpccomm.load_state_dict(method.init(weights), hpccomm.state_dict(hpccomm.snapshot(state)))
    assert hpccomm.report(again).cost.exchanges == hpccomm.report(state).cost.exchanges
    return to_vector(weights, bucket)


def add(weights: Any, step: Any) -> Any:
    """Weights and steps have one form and one dtype."""
    if isinstance(weights, dict):
        assert weights.keys() == step.keys()
        return {name: add(each, step[name]) for name, each in weights.items()}
    assert (tuple(step.shape), step.dtype) == (tuple(weights.shape), weights.dtype)
    return weights + step


def to_vector(weights: Any, bucket: Bucket) -> Any:
    return bucket.flatten(weights) if isinstance(weights, dict) else np.asarray(weights)


def plain(array: Any, *_: Any) -> Any:
    return array


def misalign(array: Any, *_: Any) -> Any:
    room = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype)
    room[...] = array
    return room


def read_only(array: Any, *_: Any) -> Any:
    array.flags.writeable = False
    return array


def as_torch(array: Any, *_: Any) -> Any:
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array.copy())


class Subclass(np.ndarray):
    """An array of another type."""


def tensors(order: str = "C") -> Callable[..., Any]:
    """The arrays of a bucket by name."""

    def give(array: Any, *rest: Any) -> Any:
        return {name: np.array(each, order=order) for name, each in rest[-1].views(array).items()}  # type: ignore[call-overload]

    return give


class Way(NamedTuple):
    """Another way to give the same numbers."""

    give: Callable[..., Any] = plain
    hold: Callable[..., Any] = plain
    same: Callable[..., Any] = plain
    """The same numbers as a plain array."""


WAYS = {
    "strides": Way(lambda x, *_: np.repeat(x, 2)[::2]),
    "reversed strides": Way(lambda x, *_: x[::-1].copy()[::-1]),
    "no strides": Way(
        lambda x, *_: np.broadcast_to(x.dtype.type(0.5), x.shape), same=lambda x, *_: np.full_like(x, 0.5)
    ),
    "read-only": Way(read_only),
    "read-only weights": Way(hold=read_only),
    "misaligned": Way(misalign),
    "misaligned weights": Way(hold=misalign),
    "strided weights": Way(hold=lambda x, *_: np.repeat(x, 2)[::2]),
    "subclass": Way(lambda x, *_: x.view(Subclass)),
    "the weights themselves": Way(lambda x, weights, *_: weights, same=lambda x, weights, *_: weights.copy()),
    "a view of the weights": Way(lambda x, weights, *_: weights[:], same=lambda x, weights, *_: weights.copy()),
    "torch gradient": Way(as_torch),
    "torch": Way(as_torch, as_torch),
    "tensors": Way(tensors(), tensors()),
    "Fortran's order": Way(tensors("F"), tensors("F")),
    "denormal numbers": Way(lambda x, *_: x * np.float32(1e-42), same=lambda x, *_: x * np.float32(1e-42)),
    "list": Way(lambda x, *_: x.tolist()),
    "other byte order": Way(lambda x, *_: x.astype(">f4")),
    "weights of the other byte order": Way(hold=lambda x, *_: x.astype(">f4")),
    "masked": Way(lambda x, *_: np.ma.masked_array(x, mask=False)),
    "two dimensions": Way(lambda x, *_: x.reshape(5, -1)),
    "both of two dimensions": Way(lambda x, *_: x.reshape(5, -1), lambda x, *_: x.reshape(5, -1)),
}


def outcome(size: int, make: Any, *how: Any) -> Any:
    """The weights of rank 0, or the error; any other error is raised."""
    try:
        return run_on_ranks(size, lambda comm: run(comm, make, *how), list(range(size)))[0]
    except ArgumentError as error:
        refusal = error
    assert ": " in str(refusal), f"no remedy: {refusal}"
    assert "\n" not in str(refusal)
    return refusal


@pytest.mark.parametrize("way", WAYS)
def test_numbers_given_in_another_way_have_the_same_steps_or_are_refused(way: str) -> None:
    it = WAYS[way]
    for name, make in METHODS.items():
        try:
            found = outcome(2, make, "plain", "f4", it.give, it.hold)
            if not isinstance(found, ArgumentError):
                wanted = outcome(2, make, "plain", "f4", it.same, plain)
                assert np.array_equal(found.reshape(-1), wanted)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("way", ["tensors", "torch", "read-only", "read-only weights", "the weights themselves"])
def test_these_ways_are_never_refused(way: str) -> None:
    it = WAYS[way]
    for name, make in METHODS.items():
        found = outcome(2, make, "plain", "f4", it.give, it.hold)
        assert not isinstance(found, ArgumentError), f"{name}: {found}"


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_tensors_of_any_size_on_more_ranks_than_elements(shapes: str, size: int) -> None:
    for name, make in METHODS.items():
        for give in (plain, tensors()):
            try:
                found = outcome(size, make, shapes, "f4", give, give)
            except Exception as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
            if not isinstance(found, ArgumentError):
                assert np.isfinite(found).all(), name
            assert not isinstance(found, ArgumentError) or not SHAPES[shapes], f"{name}: {found}"


@pytest.mark.parametrize(
    "dtype", ["f8", "f2", BFLOAT16, "i8", "u1", "?", "c8", "f2 gradient", "f8 gradient", "i4 gradient"]
)
def test_other_dtypes_give_finite_steps_of_that_dtype_or_are_refused(dtype: Any) -> None:
    kind, _, of_gradient = str(dtype).partition(" ")
    kind = "f4" if of_gradient else dtype
    give = plain if not of_gradient else lambda x, *_: x.astype(str(dtype)[:2])
    for name, make in METHODS.items():
        try:
            found = outcome(2, make, "plain", kind, give, plain)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        if not isinstance(found, ArgumentError):
            assert not of_gradient
            assert np.dtype(kind).kind not in "iu?", f"{name}: integers step"
            assert np.isfinite(found.astype("c16")).all(), name


NO_GRADIENTS: dict[str, Callable[..., Any]] = {
    "None": lambda x, *_: None,
    "text": lambda x, *_: "gradient",
    "a number": lambda x, *_: 0.5,
    "too short": lambda x, *_: x[:-1],
    "empty": lambda x, *_: x[:0],
    "objects": lambda x, *_: x.astype(object),
    "a dict": lambda x, *_: {"w": x},
}


@pytest.mark.parametrize("kind", NO_GRADIENTS)
def test_what_is_no_gradient_is_refused(kind: str) -> None:
    for name, make in METHODS.items():
        for give, hold in ((NO_GRADIENTS[kind], plain), (NO_GRADIENTS[kind], tensors())):
            try:
                found = outcome(2, make, "plain", "f4", give, hold)
            except Exception as error:
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
            assert isinstance(found, ArgumentError), name


def test_large_numbers_are_summed_or_skipped() -> None:
    """The largest float32, of one sign on all ranks: no step is NaN."""
    for name, make in METHODS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of an overflow
            found = outcome(2, make, "plain", "f4", lambda x, *_: np.full_like(x, np.finfo("f4").max), plain)
        assert not isinstance(found, ArgumentError), f"{name}: {found}"
        assert not np.isnan(found).any(), name


# Numbers of the methods themselves

ODD = [math.nan, math.inf, -math.inf, -1, -0.5, "x", None, [1], 1j, object()]
BASE: dict[str, Any] = {
    "lr": 0.05, "freeze_step": 3, "period": 3, "after": 3, "k": 2, "tensors": ["w"], "group_size": 1, "factor": 0.5,
    "rate": 0.1, "beta": 0.5, "density": 0.5, "grad_norm": "clip", "max_norm": 1.0, "inner": HEAVY, "descent": HEAVY,
    "exchange": lambda group: hpccomm.gtc(group, 0.5), "schedule": lambda step: 0.1, "compressor": hpccomm.ternary(),
    "trust": 0.1, "first": hpccomm.LossScale(1.0, 0), "levels": 4, "rank": 2, "dtype": "fp16", "kind": "fp16",
}  # fmt: skip
"""Values for arguments without defaults."""
APART = ("comm", "bucket", "inner", "descent", "compressor", "norm_reduce", "first", "parts", "check", "where")
"""Arguments that are no numbers."""


def makers() -> dict[str, Any]:
    """The public functions that make a transform or a compressor."""
    found = {}
    for name in hpccomm.__all__:
        made = getattr(hpccomm, name)
        if not inspect.isfunction(made) or not made.__module__.startswith("hpccomm.algorithms"):
            continue
        if str(inspect.signature(made).return_annotation).endswith(("Transform", "Term", "Compressor")):
            found[name] = made
    return found


def arguments_of(name: str, comm: Any, bucket: Bucket) -> dict[str, Any]:
    rest = inspect.signature(getattr(hpccomm, name)).parameters.values()
    known = BASE | {"comm": comm, "bucket": bucket}
    return {
        each.name: known[each.name]
        for each in rest
        if each.default is each.empty and each.kind is not each.VAR_POSITIONAL
    }


@pytest.mark.parametrize("name", makers())
def test_odd_numbers_of_a_method_are_refused_or_give_finite_steps(name: str) -> None:
    make, bucket = getattr(hpccomm, name), Bucket(SHAPES["plain"])
    for argument in inspect.signature(make).parameters.values():
        if argument.name in APART or argument.kind is argument.VAR_POSITIONAL:
            continue
        for odd in ODD:

            def body(comm: Any, odd: Any = odd, place: str = argument.name) -> Any:
                made = make(**arguments_of(name, comm, bucket) | {place: odd})
                if not hasattr(made, "update"):
                    return made.encode(numbers(bucket.size, 0, 0))
                weights = np.ones(bucket.size, "f4")
                state = made.init(weights)
                for number in range(4):
                    step, state = made.update(numbers(bucket.size, comm.rank, number), state, weights)
                    weights = weights + step
                assert np.isfinite(weights).all()
                return None

            try:
                run_on_ranks(2, body)
            except ArgumentError as error:
                refusal = str(error)
            except Exception as error:
                raise AssertionError(f"{argument.name}={odd!r}: {type(error).__name__}: {error}") from error
            else:
                continue
            assert ": " in refusal, f"no remedy: {refusal}"


# States


def test_states_of_another_dtype_are_refused() -> None:
    """Saved in one dtype, loaded into another, for every pair that a method takes."""
    kinds, tried = ("f4", "f8", "f2", BFLOAT16), 0

    def state_of(comm: Any, make: Any, kind: Any) -> Any:
        bucket = Bucket(SHAPES["plain"], np.dtype(kind))
        weights = np.ones(bucket.size, kind)
        method = make(comm, bucket)
        _, state = method.update(numbers(bucket.size, comm.rank, 0).astype(kind), method.init(weights), weights)
        return hpccomm.state_dict(state), method.init(weights)

    def body(comm: Any, make: Any) -> int:
        made: dict[Any, Any] = {}
        for kind in kinds:
            try:
                made[kind] = state_of(comm, make, kind)
            except ArgumentError:
                continue
        pairs = [(a, b) for a in made for b in made if a != b]
        for a, b in pairs:
            kept = [path for path in made[a][0] if not path.endswith(("total", "spare"))]  # buffers may differ
            alike = all(np.asarray(made[a][0][path]).dtype == np.asarray(made[b][0][path]).dtype for path in kept)
            if alike:  # a method's moments of all 16-bit floats are float32
                hpccomm.load_state_dict(made[b][1], made[a][0])
                continue
            with pytest.raises(ArgumentError, match="was saved as"):
                hpccomm.load_state_dict(made[b][1], made[a][0])
        return len(pairs)

    for make in METHODS.values():
        tried += sum(run_on_ranks(2, lambda comm, make=make: body(comm, make)))
    assert tried > 0
