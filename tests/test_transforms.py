"""What each transform is: identities and formulas, and that nothing that is handed in is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm.algorithms.exchange import (
    MeanState,
    allreduce_bytes,
    check_replicas,
    mean,
    synchronous_adam,
    synchronous_sgd,
)
from hpccomm.algorithms.reports import ExchangeReport, report
from hpccomm.algorithms.transforms import (
    Transform,
    adam,
    chain,
    clip,
    every,
    momentum,
    scale,
    scale_by_schedule,
    weight_decay,
)
from hpccomm.errors import ArgumentError, MismatchError

Vector = Any
WEIGHTS = np.array([1, -2, 4, 0.5])
GRADIENTS = [np.array([1, 2, -2, 4.0]), np.array([0, 8, -16, 2.0]), np.array([4, -1, 2, 0.0]), np.ones(4)]

ALL: dict[str, Transform] = {
    "chain": chain(scale(2), momentum(0.5)),
    "empty chain": chain(),
    "scale": scale(-0.5),
    "schedule": scale_by_schedule(lambda count: 1 / (1 + count)),
    "clip": clip(1.0),
    "weight_decay": weight_decay(0.5),
    "momentum": momentum(0.5),
    "nesterov": momentum(0.5, nesterov=True),
    "adam": adam(),
    "every": every(2, momentum(0.5)),
    "mean": mean(MPI.COMM_SELF),
    "synchronous_sgd": synchronous_sgd(MPI.COMM_SELF, 0.5, momentum=0.5, weight_decay=0.25),
    "synchronous_adam": synchronous_adam(MPI.COMM_SELF, lambda count: 0.5**count, weight_decay=0.25),
}


def steps(transform: Transform, weights: Vector = WEIGHTS) -> list[Vector]:
    """The steps that four gradients give, the weights standing still."""
    state, found = transform.init(weights), []
    for gradient in GRADIENTS:
        step, state = transform.update(gradient.astype(weights.dtype), state, weights)
        found.append(step.copy())
    return found


def has_same_steps(left: Transform, right: Transform) -> bool:
    """Whether two transforms give the same bits."""
    return all(np.array_equal(a, b) for a, b in zip(steps(left), steps(right), strict=True))


@pytest.mark.parametrize("name", ALL)
def test_neither_gradient_nor_weights_nor_state_is_written(name: str) -> None:
    transform = ALL[name]
    weights, gradient = WEIGHTS.copy(), GRADIENTS[0].copy()
    weights.flags.writeable = gradient.flags.writeable = False
    _, state = transform.update(gradient, transform.init(weights), weights)
    first, _ = transform.update(gradient, state, weights)
    again, _ = transform.update(gradient, state, weights)
    assert np.array_equal(first, again)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_steps_have_the_dtype_and_shape_of_the_weights(name: str, dtype: str) -> None:
    for step in steps(ALL[name], WEIGHTS.astype(dtype)):
        assert (step.dtype, step.shape) == (np.dtype(dtype), WEIGHTS.shape)


def test_an_empty_chain_is_the_identity() -> None:
    assert has_same_steps(chain(), scale(1))


def test_a_chain_of_chains_is_one_chain() -> None:
    parts = scale(2), momentum(0.5), scale(-0.25)
    assert has_same_steps(chain(*parts), chain(parts[0], chain(*parts[1:])))


def test_a_constant_schedule_is_scale() -> None:
    assert has_same_steps(scale_by_schedule(lambda count: -0.5), scale(-0.5))


def test_a_schedule_counts_updates_from_zero() -> None:
    counts: list[int] = []
    steps(scale_by_schedule(lambda count: counts.append(count) or 1.0))  # type: ignore[func-returns-value]
    assert counts == [0, 1, 2, 3]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_zero_is_the_identity(nesterov: bool) -> None:
    assert has_same_steps(momentum(0, nesterov), scale(1))


def test_momentum_is_a_geometric_sum_of_gradients() -> None:
    for t, step in enumerate(steps(momentum(0.5))):
        assert np.array_equal(step, sum(0.5 ** (t - s) * GRADIENTS[s] for s in range(t + 1)))


def test_nesterov_looks_one_step_ahead() -> None:
    plain, ahead = steps(momentum(0.5)), steps(momentum(0.5, nesterov=True))
    for gradient, moment, step in zip(GRADIENTS, plain, ahead, strict=True):
        assert np.array_equal(step, gradient + 0.5 * moment)


def test_clip_shortens_to_the_norm_and_keeps_the_direction() -> None:
    gradient = np.array([3.0, 4.0])
    step, _ = clip(2.5).update(gradient, (), gradient)
    assert step.tolist() == [1.5, 2]


def test_clip_leaves_short_and_zero_gradients_alone() -> None:
    for gradient in (np.array([3.0, 4.0]), np.zeros(2), np.zeros(0)):
        step, _ = clip(5.0).update(gradient, (), gradient)
        assert np.array_equal(step, gradient)


def test_clip_measures_beyond_the_range_of_float32() -> None:
    gradient = np.array([3e30, 4e30], "f4")
    step, _ = clip(5.0).update(gradient, (), gradient)
    np.testing.assert_allclose(step, [3, 4], rtol=1e-6)


def test_clip_passes_a_nan_on() -> None:
    step, _ = clip(1.0).update(np.array([np.nan, 2.0]), (), np.zeros(2))
    assert np.isnan(step[0])


def test_weight_decay_applies_where_the_mask_is_set() -> None:
    where = np.array([True, False, True, False])
    step, _ = weight_decay(0.5, where).update(np.zeros(4), (), WEIGHTS)
    assert step.tolist() == [0.5, 0, 2, 0]


def test_weight_decay_is_the_gradient_of_half_the_square() -> None:
    for gradient, step in zip(GRADIENTS, steps(weight_decay(0.5)), strict=True):
        assert np.array_equal(step, gradient + 0.5 * WEIGHTS)


def test_adam_starts_with_the_sign_of_the_gradient() -> None:
    step = steps(adam(eps=0.0))[0]
    np.testing.assert_allclose(step, np.sign(GRADIENTS[0]), rtol=4 * np.finfo(float).eps)


def test_adam_follows_algorithm_1() -> None:
    b1, b2, eps = 0.75, 0.875, 2.0**-20
    first = second = np.zeros(4)
    for t, (gradient, step) in enumerate(zip(GRADIENTS, steps(adam(b1, b2, eps)), strict=True), 1):
        first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
        expected = (first / (1 - b1**t)) / (np.sqrt(second / (1 - b2**t)) + eps)
        np.testing.assert_allclose(step, expected, rtol=8 * np.finfo(float).eps)


def test_every_1_is_its_inner_transform() -> None:
    assert has_same_steps(every(1, momentum(0.5)), momentum(0.5))


def test_every_two_steps_on_the_sum_of_two_gradients() -> None:
    inner = momentum(0.5)
    state, expected = inner.init(WEIGHTS), []
    for pair in (GRADIENTS[:2], GRADIENTS[2:]):
        step, state = inner.update(pair[0] + pair[1], state, WEIGHTS)
        expected += [np.zeros(4), step]
    assert all(np.array_equal(a, b) for a, b in zip(steps(every(2, inner)), expected, strict=True))


def test_sgd_is_minus_lr_times_the_gradient() -> None:
    assert has_same_steps(synchronous_sgd(MPI.COMM_SELF, 0.5), scale(-0.5))


def test_adam_with_decay_is_adamw() -> None:
    assert has_same_steps(
        synchronous_adam(MPI.COMM_SELF, 0.5, weight_decay=0.25),
        chain(adam(), weight_decay(0.25), scale(-0.5)),
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: momentum(1.0),
        lambda: momentum(-0.1),
        lambda: clip(0.0),
        lambda: clip(float("nan")),
        lambda: adam(b2=1.0),
        lambda: every(0, scale(1)),
        lambda: weight_decay(-1.0),
    ],
)
def test_impossible_arguments_are_refused(make: Callable[[], Transform]) -> None:
    with pytest.raises(ArgumentError, match="pass"):
        make()


def test_a_gradient_unlike_the_weights_is_refused() -> None:
    transform = chain(scale(1))
    for gradient in (np.ones(4, "f4"), np.ones(1), np.ones((4, 1))):
        with pytest.raises(ArgumentError, match="make them alike"):
            transform.update(gradient, transform.init(WEIGHTS), WEIGHTS)


def test_one_rank_sends_nothing() -> None:
    transform = mean(MPI.COMM_SELF)
    _, state = transform.update(WEIGHTS, transform.init(WEIGHTS), WEIGHTS)
    assert report(state).cost == ExchangeReport(0, 0.0, 0)


def test_allreduce_bytes_are_those_of_a_ring() -> None:
    assert [allreduce_bytes(4 * 12, p) for p in (1, 2, 3, 4)] == [0, 48, 64, 72]


def test_reports_are_found_at_any_depth() -> None:
    cost = ExchangeReport(1, 0.5, 100)
    state = (MeanState(np.ones(1), cost), (0, (MeanState(np.ones(1), cost), np.ones(2))))
    assert report(state).cost == ExchangeReport(2, 1.0, 200)


# On several ranks: rank r brings r + 1 times a vector of small integers, so every order of addition is exact


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_the_mean_is_exact_and_the_gradient_is_kept(comm: MPI.Intracomm, dtype: str) -> None:
    for n in (0, 1, 7, 1000):
        gradient = (np.arange(n) % 5 * (comm.rank + 1)).astype(dtype)
        gradient.flags.writeable = False
        transform = mean(comm)
        state = transform.init(np.zeros(n, dtype))
        for _ in range(2):
            step, state = transform.update(gradient, state, np.zeros(n, dtype))
            expected = (np.arange(n) % 5 * (comm.size + 1) / 2).astype(dtype)
            assert step.dtype == gradient.dtype
            assert np.array_equal(step, expected)


@pytest.mark.mpi
def test_a_step_outlives_the_next_exchange(comm: MPI.Intracomm) -> None:
    transform = mean(comm)
    state = transform.init(np.zeros(3))
    first, state = transform.update(np.ones(3), state, np.zeros(3))
    transform.update(np.full(3, 9.0), state, np.zeros(3))
    assert first.tolist() == [1, 1, 1]


@pytest.mark.mpi
def test_the_report_counts_the_least_bytes(comm: MPI.Intracomm) -> None:
    transform = chain(mean(comm), scale(-1))
    state = transform.init(np.zeros(comm.size * 10))
    for _ in range(3):
        _, state = transform.update(np.ones(comm.size * 10), state, np.zeros(comm.size * 10))
    cost = report(state).cost
    assert cost.exchanges == (3 if comm.size > 1 else 0)
    assert cost.wire_bytes == 3 * 2 * (comm.size - 1) * 10 * 8
    assert (cost.seconds > 0) == (comm.size > 1)


@pytest.mark.mpi
def test_an_exchange_inside_every_communicates_once_in_k_updates(comm: MPI.Intracomm) -> None:
    transform = every(3, mean(comm))
    state = transform.init(np.zeros(2))
    for _ in range(7):
        _, state = transform.update(np.ones(2), state, np.zeros(2))
    assert report(state).cost.exchanges == (2 if comm.size > 1 else 0)


@pytest.mark.mpi
def test_replicas_that_differ_in_one_bit_are_named(comm: MPI.Intracomm) -> None:
    weights = np.ones(5, "f4")
    check_replicas(comm, weights)
    if comm.size > 1:
        weights.view("u4")[3] ^= comm.rank == comm.size - 1
        with pytest.raises(MismatchError, match=f"ranks {comm.size - 1} differ from those of rank 0"):
            check_replicas(comm, weights)
