"""Dense methods: 16-bit weights, gradients that are not finite, biases that do not decay, schedules, states by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm.algorithms import lr_schedules
from hpccomm.algorithms.states import leaves, snapshot
from hpccomm.algorithms.transforms import (
    Transform,
    adam,
    apply_if_finite,
    chain,
    clip,
    descend,
    every,
    momentum,
    scale,
    scale_by_schedule,
    weight_decay,
)
from hpccomm.errors import ArgumentError
from hpccomm.testing import run_on_ranks

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
WEIGHTS = np.array([1, -2, 4, 0.5, 0.25, 3])
TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "scale": lambda: scale(-0.3),
    "descend": lambda: descend(lambda t: 0.3 / (t + 1)),
    "schedule": lambda: scale_by_schedule(lambda t: 0.3),
    "clip": lambda: clip(0.7),
    "weight_decay": lambda: weight_decay(0.3),
    "masked decay": lambda: weight_decay(0.3, np.arange(6) > 2),
    "momentum": lambda: momentum(0.9),
    "nesterov": lambda: momentum(0.9, nesterov=True),
    "adam": adam,
    "adam, eps 0": lambda: adam(eps=0),
    "adam, uncorrected": lambda: adam(bias_correction=False),
    "every": lambda: every(2, momentum(0.9)),
    "finite": lambda: apply_if_finite(adam()),
    "sgd": lambda: hpccomm.synchronous_sgd(MPI.COMM_SELF, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda: hpccomm.synchronous_adam(MPI.COMM_SELF, 0.1, weight_decay=0.1),
    "bmuf": lambda: hpccomm.bmuf(MPI.COMM_SELF, momentum(0.9), 2, momentum=0.5),
}


def run(method: Transform, dtype: Any, size: float, steps: int = 4) -> tuple[list[Any], Any]:
    """Steps of gradients of about this size, one of whose elements is always 0."""
    weights = WEIGHTS.astype(dtype)
    state, found = method.init(weights), []
    for number in range(steps):
        gradient = np.random.default_rng(number).normal(size=6) * size
        gradient[2] = 0
        step, state = method.update(gradient.astype(dtype), state, weights)
        found.append(step.copy())
    return found, state


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [np.dtype("f2"), BFLOAT16, np.dtype("f4"), np.dtype("f8")], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_steps_keep_their_dtype_and_follow_float64(name: str, dtype: Any, size: float, tmp_path: Path) -> None:
    """Squares of 1e-4 underflow in float16; the rounding of a few operations in the weights' dtype is allowed."""
    method = TRANSFORMS[name]()
    found, state = run(method, dtype, size)
    wanted, _ = run(method, np.dtype("f8"), size)
    precision = float(ml_dtypes.finfo(dtype).eps)
    for step, exact in zip(found, wanted, strict=True):
        assert step.dtype == dtype
        assert np.isfinite(step.astype("f8")).all()
        tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal) * 4
        atol = tiny + 8 * precision * (4 if name == "bmuf" else size)  # its step is a difference of weights up to 4
        np.testing.assert_allclose(step.astype("f8"), exact, rtol=40 * precision, atol=atol)
    hpccomm.save(tmp_path / "state.npz", state=state)
    (loaded,) = hpccomm.load(tmp_path / "state.npz", state=method.init(WEIGHTS.astype(dtype)))
    for (path, left), (_, right) in zip(leaves(state), leaves(loaded), strict=True):
        assert np.array_equal(left, right), path


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("size", [0.0, 1.0, 1e-20, 1e-30])
def test_an_eps_of_zero_leaves_still_elements_alone(dtype: str, size: float) -> None:
    """One element has no gradient, the others any: no NaN, no infinity, and the fused kernel has the chain's bits."""
    bucket = hpccomm.Bucket({"w": (3, 2)}, dtype)
    method = hpccomm.lamb(bucket, 0.5, eps=0, weight_decay=0)
    for each in (method, method.formula, adam(eps=0)):
        found, state = run(each, np.dtype(dtype), size)
        assert all(np.isfinite(step).all() and step[2] == 0 for step in found)
    weights, gradient = WEIGHTS.astype(dtype), np.array([size, 0, 0, size, 0, 0], dtype)
    state = method.init(weights)
    placed = weights.copy()
    step, _ = method.update(gradient, snapshot(state), weights)
    method.apply(gradient, state, placed)
    assert np.array_equal(placed, weights + step)
    if size == 1:
        assert np.array_equal(run(method, np.dtype(dtype), 1)[0], run(method.formula, np.dtype(dtype), 1)[0])


# Gradients that are not finite


DENSE: dict[str, Callable[[Any], Transform]] = {
    "sgd": lambda comm: hpccomm.synchronous_sgd(comm, 0.1, momentum=0.9),
    "adam": lambda comm: hpccomm.synchronous_adam(comm, 0.1, weight_decay=0.1),
    "lamb": lambda comm: chain(hpccomm.mean(comm), apply_if_finite(hpccomm.lamb(hpccomm.Bucket({"w": (3, 2)}), 0.1))),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(name: str, bad: float, size: int) -> None:
    def body(comm: Any) -> None:
        method, weights = DENSE[name](comm), WEIGHTS.astype("f4")
        state = method.init(weights)
        _, state = method.update(np.ones(6, "f4"), state, weights)
        kept = snapshot(state)
        gradient = np.ones(6, "f4")
        gradient[3] = bad if comm.rank == size - 1 else 1
        step, state = method.update(gradient, state, weights)
        assert not step.any()
        assert hpccomm.report(state).messages.skipped == 1
        for (path, left), (_, right) in zip(leaves(state[1]), leaves(kept[1]), strict=True):
            assert path == "skipped" or np.array_equal(left, right), path
        expected, _ = method.update(np.ones(6, "f4"), kept, weights)
        step, state = method.update(np.ones(6, "f4"), state, weights)
        assert np.array_equal(step, expected)

    run_on_ranks(size, body)


EXCHANGES: dict[str, Callable[[Any], Transform]] = {
    "mean": hpccomm.mean,
    "chain": lambda comm: chain(hpccomm.mean(comm), momentum(0.5), scale(-1)),
    "every": lambda comm: every(2, chain(hpccomm.mean(comm), scale(-1))),
    "finite": lambda comm: chain(hpccomm.mean(comm), apply_if_finite(scale(-1))),
    "scale_loss": lambda comm: hpccomm.scale_loss(comm, scale(-1)),
    "gtc": hpccomm.gtc,
    "onebit_adam": lambda comm: hpccomm.onebit_adam(comm, 0.1, 2),
    "dgc": lambda comm: hpccomm.dgc(comm, hpccomm.Bucket({"w": (3, 2)})),
    "powersgd": lambda comm: hpccomm.powersgd(comm, hpccomm.Bucket({"w": (3, 2)})),
    "bmuf": lambda comm: hpccomm.bmuf(comm, scale(-1), 2),
    "hybrid": lambda comm: hpccomm.hybrid(comm, hpccomm.gtc, scale(-1), 1, period=2),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_exchange_that_a_rank_would_skip_alone_is_refused(name: str) -> None:
    def body(comm: Any) -> None:
        inside = EXCHANGES[name](comm)
        with pytest.raises(ArgumentError, match=r"apply_if_finite: the transform inside exchanges, .*: place apply_if"):
            apply_if_finite(inside)

    run_on_ranks(2, body)
    apply_if_finite(EXCHANGES[name](MPI.COMM_SELF))


@pytest.mark.parametrize("make", [hpccomm.synchronous_sgd, hpccomm.synchronous_adam])
def test_with_a_bucket_biases_do_not_decay(make: Any) -> None:
    tensors = {"w": np.ones((2, 2), "f4"), "b": np.ones(2, "f4")}
    bucket = hpccomm.Bucket(tensors)
    for given, still in ((bucket, True), (None, False)):
        method = make(MPI.COMM_SELF, 0.5, weight_decay=0.5, bucket=given)
        step, _ = method.update({"b": np.zeros(2, "f4"), "w": np.zeros((2, 2), "f4")}, method.init(tensors), tensors)
        assert (step["w"] == -0.25).all()
        assert (step["b"] == 0).all() == still


# States and units that are none of the method's


STATES: dict[str, Callable[[], Transform]] = {
    "momentum": lambda: momentum(0.9),
    "adam": adam,
    "every": lambda: every(2, scale(1)),
    "chain": lambda: chain(momentum(0.9), scale(-1)),
    "longer chain": lambda: chain(momentum(0.9), scale(-1), clip(1)),
    "finite": lambda: apply_if_finite(scale(1)),
    "gtc": lambda: hpccomm.gtc(MPI.COMM_SELF),
    "mean": lambda: hpccomm.mean(MPI.COMM_SELF),
    "bmuf": lambda: hpccomm.bmuf(MPI.COMM_SELF, scale(1)),
    "onebit_adam": lambda: hpccomm.onebit_adam(MPI.COMM_SELF, 0.1, 1),
    "lamb": lambda: hpccomm.lamb(hpccomm.Bucket({"w": (2, 3)}), 0.1),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("other", STATES)
def test_the_state_of_another_method_is_refused_in_a_sentence(name: str, other: str) -> None:
    method, weights = STATES[name](), np.ones(6, "f4")
    method.init(weights)
    wrong = STATES[other]().init(weights)
    if name == other or {name, other} <= {"adam", "lamb"}:
        method.update(np.ones(6, "f4"), wrong, weights)
    else:
        with pytest.raises(ArgumentError, match="of this method returned"):
            method.update(np.ones(6, "f4"), wrong, weights)


def test_the_state_of_other_weights_is_refused() -> None:
    for make in (momentum(0.9), adam(), every(2, scale(1))):
        with pytest.raises(ArgumentError, match="the state has shape"):
            make.update(np.ones(6), make.init(np.ones(1)), np.ones(6))


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([{"w": np.ones(2)}], "a list of dict"),
        ("layer", "a str"),
        (3, "a int"),
        ({"a": np.ones(2)}, "a dict that has a ndarray of tensors"),
        ([("a", [np.ones(2)])], "a list that has a list of tensors"),
        ([(1, {"w": np.ones(2)})], "a list of tuple"),
    ],
)
def test_units_of_another_form_are_refused_in_a_sentence(units: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=f"the units are {message}: pass"):
        hpccomm.data_parallel(MPI.COMM_SELF, units, scale(-1))


# Learning rates


def test_schedules_of_the_field() -> None:
    value = lr_schedules.cosine(2.0, 4, end=1.0)
    np.testing.assert_allclose([value(t) for t in (0, 2, 4, 9)], [2, 1.5, 1, 1])
    value = lr_schedules.step_decay(1.0, [3, 5], 0.5)
    assert [value(t) for t in range(7)] == [1, 1, 1, 0.5, 0.5, 0.25, 0.25]
    value = lr_schedules.warm_up_stable_decay(1.0, 2, 3, 4, end=0.2)
    np.testing.assert_allclose([value(t) for t in range(11)], [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])
    value = lr_schedules.one_cycle(1.0, 10, rise=0.3, start=10, end=100)
    assert value(0) == pytest.approx(0.1)
    assert value(2) == pytest.approx(1)
    assert value(9) == value(50) == pytest.approx(0.001)
    assert all(a > b for a, b in zip([value(t) for t in range(2, 9)], [value(t) for t in range(3, 10)], strict=True))


def test_one_cycle_is_pytorchs() -> None:
    torch = pytest.importorskip("torch")
    for steps, rise in ((10, 0.3), (7, 0.5), (100, 0.25)):
        parameter = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps, pct_start=rise)
        mine = lr_schedules.one_cycle(1.0, steps, rise=rise)
        for t in range(steps):
            assert mine(t) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
            optimizer.step()
            if t < steps - 1:
                schedule.step()


# Compiled before the clock starts


def test_a_trial_visits_the_phases_of_every_method() -> None:
    from hpccomm.train.loop import TRIAL_STEPS, compile_kernels
    from hpccomm.train.methods import METHODS, MethodSetup, find_methods

    def body(comm: Any) -> None:
        bucket = hpccomm.Bucket({"w": (64, 48), "b": (8,)})
        for name in find_methods("replicas"):
            setup = MethodSetup(comm, bucket, 0.1, TRIAL_STEPS, group_size=1)
            made, paths = METHODS[name].make(setup), set()

            def update(gradient: Any, state: Any, weights: Any, made: Any = made, paths: Any = paths) -> Any:
                step, state = made.update(gradient, state, weights)
                paths.add(hpccomm.report(state).messages.path)
                return step, state

            compile_kernels(Transform(made.init, update), np.zeros(bucket.size, "f4"))
            if name in ("onebit-adam", "onebit-lamb"):
                assert len(paths) == 2, (name, paths)

    run_on_ranks(2, body)


def test_compiling_is_said_while_it_happens(capsys: pytest.CaptureFixture[str]) -> None:
    from hpccomm.commands.train import compile_first

    def slow(gradient: Any, state: Any, weights: Any) -> Any:
        time.sleep(0.15)
        return gradient, state

    for update, said in ((slow, True), (lambda gradient, state, weights: (gradient, state), False)):
        compile_first(MPI.COMM_SELF, Transform(lambda weights: (), update), np.zeros(2, "f4"))  # type: ignore[arg-type]
        assert ("compiling" in capsys.readouterr().out) == said


# Mistakes


C = MPI.COMM_SELF
MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (lambda: scale("a"), "factor is 'a': pass a number"),  # type: ignore[arg-type]
    (lambda: scale(None), "factor is None: pass a number"),  # type: ignore[arg-type]
    (lambda: momentum("a"), "beta is 'a': pass a number"),  # type: ignore[arg-type]
    (lambda: every(2, None), "every: None is no transform"),  # type: ignore[arg-type]
    (lambda: apply_if_finite(None), "apply_if_finite: None is no transform"),  # type: ignore[arg-type]
    (lambda: hpccomm.bmuf(C, None), "inner: None is no transform"),  # type: ignore[arg-type]
    (lambda: hpccomm.local_sgd(C, None, 2), "inner: None is no transform"),  # type: ignore[arg-type]
    (lambda: hpccomm.bmuf(C, scale(-1), lr=lambda t: 1.0), "bmuf: lr is .*: pass a number"),  # type: ignore[arg-type]
    (lambda: hpccomm.bmuf(C, scale(-1), warmup=2.5), "warmup is 2.5"),  # type: ignore[arg-type]
    (lambda: hpccomm.hybrid(C, hpccomm.gtc(C), scale(-1), 1), "the exchange is no function"),  # type: ignore[arg-type]
    (lambda: hpccomm.dgc(C, hpccomm.Bucket({"w": (9, 9)}), warmup=3, stages=()), "stages is empty"),
    (lambda: hpccomm.powersgd(C, hpccomm.Bucket({"w": (9, 9)}), 2.5), "rank is 2.5: pass a whole number"),  # type: ignore[arg-type]
    (lambda: hpccomm.gtc(C, [1]), "tau is .1.: pass a positive number"),  # type: ignore[arg-type]
    (lambda: scale(1).init({"w": "b"}), "'b' is neither an array nor a shape"),
    (lambda: hpccomm.Bucket({"layer": {"w": np.ones(2)}}), "Bucket: a dict in a dict: pass one dict by full names"),
    (lambda: scale(1).init({1: np.ones(2), "1": np.ones(2)}), "two of the weights are called 1"),
    (lambda: scale(1).init({"a": {"b": np.ones(2)}, "a.b": np.ones(2)}), "two of the weights are called a.b"),
    (lambda: hpccomm.for_ranks([hpccomm.gtc(C).init(np.zeros(n, "f4")) for n in (3, 4)], 0, 3), "residual has shape"),
    (lambda: hpccomm.gtc(C).init(np.empty(1 << 31, "f4")), "2147483648 elements: split them into buckets"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES)
def test_arguments_that_cannot_be_meant_are_refused_in_a_sentence(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_integers_are_not_truncated() -> None:
    step, _ = scale(-0.25).update(np.arange(3), (), np.arange(3))
    assert step.tolist() == [0, -0.25, -0.5]
