"""Blocks of local steps: the published recursions to the last bit, identities between methods, and uneven ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm.algorithms.blockwise_filtering import bmuf, bmuf_adam, extrapolation
from hpccomm.algorithms.exact_steps import ExactStep, exact_step, exact_tensor
from hpccomm.algorithms.exchange import check_replicas, mean, synchronous_sgd
from hpccomm.algorithms.local_steps import (
    PeriodicTransform,
    diloco,
    local_sgd,
    periodic_transform,
    post_local_sgd,
    slowmo,
)
from hpccomm.algorithms.reports import report
from hpccomm.algorithms.states import for_ranks, snapshot
from hpccomm.algorithms.transforms import AdamState, Transform, adam, chain, momentum, scale
from hpccomm.algorithms.two_tier import hybrid
from hpccomm.arrays import bfloat16, borrow
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.testing.ranks import run_on_ranks

Vector = Any
CENTRES = np.array([[1, 2, 3, -1, 0, 4], [3, 0, 1, 1, -2, 2]], "f8")
MIDDLE = np.array([2, 1, 2, 0, -1, 3], "f8")
HALF = scale(-0.5)
METHODS: dict[str, Callable[[Any], PeriodicTransform]] = {
    "local_sgd": lambda comm: local_sgd(comm, HALF, 2),
    "post_local_sgd": lambda comm: post_local_sgd(comm, chain(momentum(0.5), HALF), 2, after=3),
    "slowmo": lambda comm: slowmo(comm, HALF, 0.5, 2, beta=0.25),
    "diloco": lambda comm: diloco(comm, chain(adam(), scale(-0.01)), 3),
    "bmuf": lambda comm: bmuf(comm, chain(momentum(0.5), HALF), 3),
    "bmuf nesterov": lambda comm: bmuf(comm, chain(momentum(0.5), HALF), 3, nesterov="paper"),
    "bmuf lookahead": lambda comm: bmuf(comm, HALF, 2, nesterov="lookahead"),
    "bmuf sharded": lambda comm: bmuf(comm, HALF, 2, nesterov="paper", shard_state=True),
    "bmuf reset": lambda comm: bmuf(comm, chain(momentum(0.5), HALF), 2, local_state="reset", warmup=1),
    "bmuf average": lambda comm: bmuf(comm, chain(momentum(0.5), HALF), 2, local_state="average"),
    "bmuf_adam": lambda comm: bmuf_adam(comm, 0.01, 2),
}


def quadratic(method: PeriodicTransform, comm: Any, steps: int, centres: Vector = CENTRES, dtype: str = "f8") -> Any:
    """Minimise ½‖w − c_r‖²; the weights and the exported model after each step, and the last state."""
    centre = centres[comm.rank % len(centres)].astype(dtype)
    weights = np.zeros(centre.size, dtype)
    state, seen, models = method.init(weights), [], []
    for _ in range(steps):
        step, state = method.update(weights - centre, state, weights)
        weights += step
        seen.append(weights.copy())
        models.append(method.export(state).copy())
    return seen, models, state


def draw_centres(comm: Any, seed: int = 0) -> Vector:
    """Centres with many bits that are not shared by the ranks."""
    return np.random.default_rng(seed).standard_normal((comm.size, 37))


# The golden table: two workers, ½‖w − c‖², rate ½, τ = 2, η = ½, ζ = 1; everything is a multiple of the middle

GOLDEN: dict[str, tuple[Callable[[Any], PeriodicTransform], list[float], list[float]]] = {
    "averaging": (lambda comm: local_sgd(comm, HALF, 2), [0.75, 0.9375, 0.984375], [0.75, 0.9375, 0.984375]),
    "averaging is momentum 0": (
        lambda comm: bmuf(comm, HALF, 2, momentum=0),
        [0.75, 0.9375, 0.984375],
        [0.75, 0.9375, 0.984375],
    ),
    "classical": (lambda comm: bmuf(comm, HALF, 2), [0.75, 1.3125, 1.359375], [0.75, 1.3125, 1.359375]),
    "nesterov": (
        lambda comm: bmuf(comm, HALF, 2, nesterov="paper"),
        [1.125, 1.171875, 1.048828125],
        [0.75, 1.03125, 1.04296875],
    ),
    "lookahead": (
        lambda comm: bmuf(comm, HALF, 2, nesterov="lookahead"),
        [1.125, 1.546875, 1.142578125],
        [1.125, 1.546875, 1.142578125],
    ),
    "lookahead, small rate": (
        lambda comm: bmuf(comm, HALF, 2, nesterov="lookahead", lr=0.5),
        [0.5625, 1.08984375, 1.302978515625],
        [0.5625, 1.08984375, 1.302978515625],
    ),
    "slow momentum": (
        lambda comm: slowmo(comm, HALF, 0.5, 2, beta=0.5),
        [0.75, 1.3125, 1.359375],
        [0.75, 1.3125, 1.359375],
    ),
    "nesterov outside": (
        lambda comm: diloco(comm, HALF, 2, lr=1, beta=0.5),
        [1.125, 1.171875, 1.048828125],
        [1.125, 1.171875, 1.048828125],
    ),
    "sharded": (
        lambda comm: bmuf(comm, HALF, 2, nesterov="paper", shard_state=True),
        [1.125, 1.171875, 1.048828125],
        [0.75, 1.03125, 1.04296875],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_golden_models_after_each_block(name: str, dtype: str) -> None:
    make, begins, models = GOLDEN[name]
    for seen, exported, _ in run_on_ranks(2, lambda comm: quadratic(make(comm), comm, 6, dtype=dtype)):
        assert [each.tolist() for each in seen[1::2]] == [(MIDDLE * factor).tolist() for factor in begins]
        assert [each.tolist() for each in exported[1::2]] == [(MIDDLE * factor).tolist() for factor in models]


def test_golden_local_models_before_the_first_exchange() -> None:
    found = run_on_ranks(2, lambda comm: quadratic(local_sgd(comm, HALF, 3), comm, 2)[0][1])
    assert [each.tolist() for each in found] == [[0.75, 1.5, 2.25, -0.75, 0, 3], [2.25, 0, 0.75, 0.75, -1.5, 1.5]]


def test_golden_extrapolation_of_adams_means() -> None:
    """β = (.9, .999), τ = 2, η = ½; the same (m₀, m̄) = (.2, .3) and (v₀, v̄) = (.04, .05) in both blocks."""
    policy = extrapolation(MPI.COMM_SELF, 0.5, 0.9, 0.999)
    began = (AdamState(0, np.array([0.2]), np.array([0.04])), ())
    ended = (AdamState(2, np.array([0.3]), np.array([0.05])), ())
    memory, found = policy.init(np.zeros(1)), []
    for _ in range(2):
        (state, _), memory = policy.settle(began, ended, np.zeros(1), memory, 2)
        found.append((state.updates - 2, state.mean[0], state.square[0]))
    expected = [(1, 0.34263157894737, 0.05499250125063), (1.5, 0.36232098722167, 0.05748687937582)]
    np.testing.assert_allclose(found, expected, rtol=2e-13)  # printed with 14 digits


# Identities


@pytest.mark.parametrize("size", [1, 2, 4])
def test_one_step_blocks_without_momentum_are_synchronous_sgd(size: int) -> None:
    """Small integers and powers of two: no rounding anywhere."""

    def body(comm: Any) -> bool:
        centres = np.arange(6.0 * size).reshape(size, 6) % 5 * 8
        weights, dense = np.zeros(6), synchronous_sgd(comm, 0.5)
        state, expected = dense.init(weights), []
        for _ in range(4):
            step, state = dense.update(weights - centres[comm.rank], state, weights)
            weights += step
            expected.append(weights.copy())
        found, _, _ = quadratic(bmuf(comm, HALF, 1, momentum=0), comm, 4, centres)
        return np.array_equal(found, expected)

    assert all(run_on_ranks(size, body))


def test_default_momentum_is_one_minus_one_over_the_ranks() -> None:
    def body(comm: Any) -> bool:
        centres = np.arange(24.0).reshape(4, 6)
        left_out, said = (quadratic(bmuf(comm, HALF, 2, momentum=eta), comm, 8, centres)[0] for eta in (None, 0.75))
        other = quadratic(bmuf(comm, HALF, 2, momentum=0.5), comm, 8, centres)[0]
        return np.array_equal(left_out, said) and not np.array_equal(left_out, other)

    assert all(run_on_ranks(4, body))


def test_nesterov_variants_agree_in_the_first_block_and_not_in_the_second() -> None:
    def body(comm: Any) -> list[list[bool]]:
        paper, lookahead = (quadratic(bmuf(comm, HALF, 2, nesterov=n), comm, 4)[0] for n in ("paper", "lookahead"))
        return [np.array_equal(paper[k], lookahead[k]) for k in (1, 3)]

    assert run_on_ranks(2, body) == [[True, False]] * 2


def test_nesterov_without_momentum_is_averaging() -> None:
    def body(comm: Any) -> bool:
        centres = draw_centres(comm)
        ahead, plain = (
            quadratic(bmuf(comm, HALF, 2, momentum=0, nesterov=n), comm, 6, centres)[0] for n in ("paper", False)
        )
        return np.array_equal(ahead, plain)

    assert all(run_on_ranks(3, body))


def test_slow_momentum_rescales_old_momentum_when_the_rate_changes() -> None:
    """Algorithm 1 of the paper, written out for one weight: γ = ½ in the first block, ¼ from then on."""
    rates = [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]

    def body(comm: Any) -> float:
        centre, weights, count = CENTRES[comm.rank][:1], np.zeros(1), iter(rates)
        method = slowmo(comm, scale_by_rates(count), lambda update: rates[update], 2, beta=0.5)
        state = method.init(weights)
        for _ in range(6):
            step, state = method.update(weights - centre, state, weights)
            weights += step
        return float(weights[0])

    x = u = 0.0
    for gamma in rates[::2]:
        local = [x, x]
        for _ in range(2):
            local = [w - gamma * (w - c) for w, c in zip(local, CENTRES[:, 0], strict=True)]
        u = 0.5 * u + (x - sum(local) / 2) / gamma
        x -= gamma * u
    assert run_on_ranks(2, body) == [x, x]


def scale_by_rates(rates: Any) -> Transform:
    """SGD whose rate is the next of some."""
    return Transform(lambda weights: (), lambda gradient, state, weights: (-next(rates) * gradient, state))


def test_a_single_rank_steps_with_the_inner_optimizer_only() -> None:
    inner = chain(momentum(0.5), scale(-0.3))
    centre, weights, expected = draw_centres(MPI.COMM_SELF), np.zeros(37), np.zeros(37)
    method = bmuf(MPI.COMM_SELF, inner, 2, momentum=0.9)
    state, plain = method.init(weights), inner.init(expected)
    for _ in range(5):
        step, state = method.update(weights - centre[0], state, weights)
        weights += step
        step, plain = inner.update(expected - centre[0], plain, expected)
        expected += step
    assert np.array_equal(weights, expected)
    step, state = method.finish(state, weights)
    weights += step
    assert np.array_equal(weights, expected)
    assert np.array_equal(method.export(state), expected)


def test_a_run_that_goes_on_alone_keeps_its_cost() -> None:
    weights = np.zeros(4)

    def run(comm: Any, state: Any = None) -> Any:
        method = bmuf(comm, scale(-1.0), 2)
        state = method.init(weights) if state is None else state
        for _ in range(2):
            _, state = method.update(np.ones(4), state, weights)
        return state

    alone = for_ranks(run_on_ranks(2, run), 0, 1)
    before = report(alone).cost
    assert before.wire_bytes > 0
    assert report(run(MPI.COMM_SELF, alone)).cost == before


# What every method keeps


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_all_ranks_hold_the_same_bits_after_every_exchange(name: str, size: int, dtype: str) -> None:
    def body(comm: Any) -> None:
        method, centres = METHODS[name](comm), draw_centres(comm)
        weights = np.zeros(37, dtype)
        state, exchanges = method.init(weights), 0
        for _ in range(13):
            step, state = method.update((weights - centres[comm.rank]).astype(dtype), state, weights)
            weights += step
            assert weights.dtype == dtype
            if state.steps == 0:
                check_replicas(comm, weights)
                exchanges += 1
        assert exchanges >= 4
        step, state = method.finish(state, weights)
        weights += step
        check_replicas(comm, weights)
        check_replicas(comm, method.export(state))

    run_on_ranks(size, body)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_models_smaller_than_the_number_of_ranks(n: int) -> None:
    def body(comm: Any) -> list[float]:
        method = bmuf(comm, HALF, 1, shard_state=True)
        seen, models, _ = quadratic(method, comm, 3, np.arange(4.0 * n).reshape(4, n))
        assert np.array_equal(seen[-1], models[-1])
        return list(seen[-1].tolist())

    found = run_on_ranks(4, body)
    assert found == [found[0]] * 4
    assert len(found[0]) == n


@pytest.mark.parametrize("name", METHODS)
def test_gradient_weights_and_state_are_not_written(name: str) -> None:
    def body(comm: Any) -> None:
        method, centres = METHODS[name](comm), draw_centres(comm)
        weights, gradient = np.zeros(37), -centres[comm.rank]
        weights.flags.writeable = gradient.flags.writeable = False
        state = method.init(weights)
        for _ in range(4):
            first, after = method.update(gradient, state, weights)
            again, _ = method.update(gradient, state, weights)
            assert np.array_equal(first, again)
            state = after

    run_on_ranks(2, body)


def test_exchanges_and_bytes_are_counted() -> None:
    """n = 6 float64, τ = 2: an allreduce every second step, 40 bytes to each other rank to agree."""

    def body(comm: Any) -> tuple[int, int]:
        cost = report(quadratic(bmuf(comm, HALF, 2), comm, 6)[2]).cost
        return cost.exchanges, cost.wire_bytes

    assert run_on_ranks(2, body) == [(3 + 3, 3 * 6 * 8 + 3 * 40)] * 2


def test_half_precision_moves_in_float32() -> None:
    """The mean of 2049 and 2050 in float16's 2048 and 2050 is 2049.5 in the float32 master."""

    def body(comm: Any) -> Any:
        weights = np.full(1, 2048, "f2")
        method = local_sgd(comm, scale(1.0), 1)
        step, state = method.update(np.array([2 * comm.rank], "f2"), method.init(weights), weights)
        weights += step
        return weights.dtype, float(method.export(state)[0]), float(weights[0])

    assert run_on_ranks(4, body) == [(np.dtype("f2"), 2051.0, 2052.0)] * 4


# Local state at the end of a block


def test_local_momentum_is_kept_reset_or_averaged() -> None:
    def body(comm: Any, policy: Any) -> float:
        method = bmuf(comm, chain(momentum(0.5), HALF), 2, local_state=policy)
        weights = np.zeros(1)
        state = method.init(weights)
        for _ in range(2):
            _, state = method.update(np.full(1, 4.0 * comm.rank + 2), state, weights)
        return float(state.inner[0][0])

    for policy, expected in {"keep": [3, 9, 15], "reset": [0, 0, 0], "average": [9, 9, 9]}.items():
        assert run_on_ranks(3, lambda comm, policy=policy: body(comm, policy)) == expected


def test_bmuf_adam_counts_virtual_steps() -> None:
    def body(comm: Any) -> list[float]:
        method = bmuf_adam(comm, 0.5, 2)
        weights = np.zeros(2)
        state, found = method.init(weights), []
        for _ in range(4):
            step, state = method.update(np.ones(2) * (comm.rank + 1), state, weights)
            weights += step
            found.append(state.inner[0].updates)
        return found

    assert run_on_ranks(2, body) == [[1, 2 + 1, 4, 5 + 1.5]] * 2


# Warm-up


def test_warm_up_is_synchronous_and_blocks_are_counted_from_its_end() -> None:
    def body(comm: Any) -> list[int]:
        method = bmuf(comm, chain(momentum(0.5), HALF), 3, warmup=2)
        dense = synchronous_sgd(comm, 0.5, momentum=0.5)
        weights, state = np.zeros(6), method.init(np.zeros(6))
        expected, plain, places = np.zeros(6), dense.init(np.zeros(6)), []
        for number in range(8):
            step, state = method.update(weights - CENTRES[comm.rank], state, weights)
            weights += step
            places.append(state.steps)
            if number < 2:
                step, plain = dense.update(expected - CENTRES[comm.rank], plain, expected)
                expected += step
                assert np.array_equal(weights, expected)
        return places

    assert run_on_ranks(2, body) == [[0, 0, 1, 2, 0, 1, 2, 0]] * 2


# Ranks with different numbers of batches


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batches", [[0, 0], [5, 0], [0, 7], [4, 4], [1, 9], [3, 8, 5], [10, 2, 0, 7, 1, 6, 3]])
def test_ranks_with_different_numbers_of_batches_end_with_the_same_model(name: str, batches: list[int]) -> None:
    def body(comm: Any) -> bytes:
        method, centres = METHODS[name](comm), draw_centres(comm)
        weights = np.zeros(37)
        state = method.init(weights)
        for _ in range(batches[comm.rank]):
            step, state = method.update(weights - centres[comm.rank], state, weights)
            weights += step
        step, state = method.finish(state, weights)
        weights += step
        assert np.isfinite(weights).all()
        assert (sum(batches) > 0) == weights.any()
        return weights.tobytes() + method.export(state).tobytes()

    assert len(set(run_on_ranks(len(batches), body, patience=20))) == 1


@pytest.mark.parametrize(
    ("weight_by", "expected"),
    [("workers", (8 + 1) / 2), ("batches", (3 * 8 + 1) / 4), (lambda rank: [10, 30][rank], (10 * 8 + 30 * 1) / 40)],
)
def test_updates_are_weighted_by_workers_batches_or_samples(weight_by: Any, expected: float) -> None:
    """Rank 0 moves by 8 in three batches, rank 1 by 1 in one; both end the block early."""

    def body(comm: Any) -> float:
        seen = [0]
        weigh = weight_by if isinstance(weight_by, str) else lambda: seen[0]
        method = bmuf(comm, scale(1.0), 50, momentum=0, weight_by=weigh)
        weights = np.zeros(1)
        state = method.init(weights)
        for batch in [[2.0, 2.0, 4.0], [1.0]][comm.rank]:
            step, state = method.update(np.array([batch]), state, weights)
            weights += step
        if callable(weight_by):
            seen[0] = weight_by(comm.rank)
        step, state = method.finish(state, weights)
        return float((weights + step)[0])

    assert run_on_ranks(2, body) == [expected] * 2


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("skipped", [False, True])
def test_the_first_block_is_weighted_by_its_own_samples(warmup: int, skipped: bool) -> None:
    def body(comm: Any) -> float:
        seen = [0.0]
        outer = chain(mean(comm), scale(-1))
        method = periodic_transform(comm, 2, scale(-1), outer, warmup=warmup, weight_by=lambda: seen[0])
        weights = np.zeros(1)
        state = method.init(weights)
        for number in range(warmup + 2):
            warm = number < warmup
            seen[0] += [97, 1][comm.rank] if warm else 1
            gradient = np.full(1, np.nan if warm and skipped else 0.0 if warm else float(comm.rank))
            step, state = method.update(gradient, state, weights)
            weights += step
        return float(weights[0])

    assert run_on_ranks(2, body) == [-1.0] * 2


WITHIN_WARM_UP = {
    "bmuf": lambda comm, seen: bmuf(comm, scale(-1), 4, warmup=5, weight_by=lambda: seen[0]),
    "bmuf, sharded": lambda comm, seen: bmuf(comm, scale(-1), 4, warmup=5, weight_by=lambda: seen[0], shard_state=True),
    "hybrid": lambda comm, seen: hybrid(comm, mean, scale(-1), 1, period=4, warmup=5, weight_by=lambda: seen[0]),
}


@pytest.mark.parametrize("name", WITHIN_WARM_UP)
def test_a_run_that_ends_within_the_warm_up_keeps_its_weights(name: str) -> None:
    def body(comm: Any) -> list[float]:
        seen = [0.0]
        method = WITHIN_WARM_UP[name](comm, seen)
        weights = np.zeros(3)
        state = method.init(weights)
        for _ in range(2):
            seen[0] += 10
            step, state = method.update(np.ones(3), state, weights)
            weights += step
        step, state = method.finish(state, weights)
        return [*(weights + step).tolist(), *np.asarray(method.export(state)).tolist()]

    assert run_on_ranks(2, body) == [[-2.0] * 6] * 2


@pytest.mark.parametrize(
    ("totals", "message"),
    [
        ([[10, 20, 5, 15], [10, 20, 5, 15]], "weight_by counts -15 samples in this block on rank 0"),
        ([[10, 20, 28, 30], [10, 20, 5, 30]], "weight_by counts -15 samples in this block on rank 1"),
        ([[10, 20, 30, 40], [10, np.nan, 30, 40]], "weight_by counts nan samples in this block on rank 1"),
        ([[10, np.inf, 30, 40], [10, 20, 30, 40]], "weight_by counts inf samples in this block on rank 0"),
    ],
)
def test_a_total_of_samples_that_falls_is_refused_on_every_rank(totals: Any, message: str) -> None:
    blocks = 2 if "-15" in message else 1

    def body(comm: Any) -> float:
        seen = [0.0]
        method = local_sgd(comm, scale(-1), 1, weight_by=lambda: seen[0])
        weights = np.zeros(1)
        state = method.init(weights)
        for seen[0] in totals[comm.rank][:blocks]:
            step, state = method.update(np.ones(1), state, weights)
            weights += step
        seen[0] = totals[comm.rank][blocks]
        with pytest.raises(MismatchError, match=message):
            method.update(np.ones(1), state, weights)
        return float(weights[0])

    assert run_on_ranks(2, body) == [-blocks] * 2


@pytest.mark.parametrize("dtype", ["f2", "bfloat16", "f4", "f8"])
@pytest.mark.parametrize("name", ["local_sgd", "diloco", "bmuf", "sharded bmuf", "hybrid"])
def test_movement_below_the_dtype_of_the_weights_adds_up_over_blocks(name: str, dtype: str) -> None:
    """One of four ranks moves by one ulp a block: the mean, a quarter of it, is kept in the master of the reduction."""
    kind = bfloat16("test") if dtype == "bfloat16" else np.dtype(dtype)
    ulp = 2.0**-7 if dtype == "bfloat16" else 2.0**-10
    methods: dict[str, Callable[[Any], PeriodicTransform]] = {
        "local_sgd": lambda comm: local_sgd(comm, scale(-1), 1),
        "diloco": lambda comm: diloco(comm, scale(-1), 1, lr=1.0, beta=0.0),
        "bmuf": lambda comm: bmuf(comm, scale(-1), 1, momentum=0.0),
        "sharded bmuf": lambda comm: bmuf(comm, scale(-1), 1, momentum=0.0, shard_state=True),
        "hybrid": lambda comm: hybrid(comm, mean, scale(-1), 1, period=1, momentum=0.0),
    }

    def body(comm: Any) -> tuple[float, float]:
        method, weights = methods[name](comm), np.ones(1, kind)
        state = method.init(weights)
        for _ in range(16):
            step, state = method.update(np.full(1, 0 if comm.rank else -ulp, kind), state, weights)
            weights += step
        return (float(weights[0]) - 1) / ulp, (float(method.export(state)[0]) - 1) / ulp

    assert run_on_ranks(4, body) == [(4.0, 4.0)] * 4


def test_a_rank_without_a_batch_in_a_block_has_weight_zero() -> None:
    def body(comm: Any) -> float:
        method, weights = local_sgd(comm, scale(1.0), 2), np.zeros(1)
        state = method.init(weights)
        for _ in range(2 if comm.rank == 0 else 0):
            step, state = method.update(np.ones(1), state, weights)
            weights += step
        step, state = method.finish(state, weights)
        return float((weights + step)[0])

    assert run_on_ranks(3, body) == [2.0] * 3


# A model that is not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_block_with_a_model_that_is_not_finite_is_abandoned_on_all_ranks(bad: float) -> None:
    def body(comm: Any) -> None:
        method = bmuf(comm, chain(momentum(0.5), HALF), 2, momentum=0.5)
        weights = np.zeros(6)
        state = method.init(weights)
        for number in range(6):
            gradient = weights - CENTRES[comm.rank]
            if comm.rank == 1 and number == 3:
                gradient[3] = bad
            before = state
            step, state = method.update(gradient, state, weights)
            weights += step
            if number == 1:
                kept, model = before._replace(), method.export(state).copy()
                began, moved = snapshot(state.inner), state.outer[-1].velocity.copy()
            if number == 3:
                assert state.abandoned == 1
                assert np.array_equal(weights, model)
                assert np.array_equal(method.export(state), model)
                assert np.array_equal(state.outer[-1].velocity, moved)
                assert np.array_equal(state.inner[0], began[0])
                assert kept is not state
        assert state.abandoned == 1
        assert np.isfinite(weights).all()
        assert not np.array_equal(weights, model)
        check_replicas(comm, weights)

    run_on_ranks(2, body)


# A step that lands


def test_weights_plus_an_exact_step_are_the_target_even_where_rounding_misses_it() -> None:
    weights, target = np.array([1, 1e10, -3, np.nan], "f4"), np.array([1e-9, 1e-5, 7, 2], "f4")
    plain = target - weights
    assert not np.array_equal(weights + plain, target)
    step = exact_step(weights, target)
    assert isinstance(step, ExactStep)
    assert np.array_equal(weights + step, target)
    assert np.array_equal(step + weights, target)
    assert np.array_equal(np.add(weights, np.zeros(4, "f4"), out=exact_step(weights, target))[:3], weights[:3])
    there = weights.copy()[None][0]
    there[3] = 0
    assert np.array_equal((there + step)[:3], there[:3] + plain[:3]), "other weights are stepped as by any array"
    weights += step
    assert np.array_equal(weights, target)


def test_an_exact_step_is_an_ordinary_array_in_other_expressions() -> None:
    weights, target = np.array([1, 2.5]), np.array([4, 0.5])
    step = exact_step(weights, target)
    assert type(step * 2) is np.ndarray
    assert (step * 2).tolist() == [6, -4]
    assert (step[:1] + weights[:1]).tolist() == [4]
    assert (step + weights).tolist() == [4, 0.5]
    out = np.zeros(2)
    np.subtract(step, weights, out=out)
    assert out.tolist() == [2, -4.5]
    step *= 0.5
    assert np.asarray(step).tolist() == [1.5, -1]
    assert (weights + step).tolist() == [2.5, 1.5], "a step that was changed does not land"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("way", ["weights += step", "weights + step", "step + weights", "step += weights"])
def test_a_step_of_a_tensor_is_exact_for_the_functions_that_add(dtype: str, way: str) -> None:
    torch = pytest.importorskip("torch")
    weights = torch.tensor([1, 1e10, -3, torch.nan], dtype=getattr(torch, dtype))
    target = torch.tensor([1e-9, 1e-5, 7, 2], dtype=weights.dtype)
    array = borrow(target)[0]
    step = exact_tensor(weights, array)
    assert torch.equal((weights.nan_to_num() + step)[:3], weights[:3] + (target - weights)[:3]), "other weights"
    assert type(step * 2) is torch.Tensor
    assert not torch.equal(weights + exact_tensor(weights, array).mul_(1), target), "a step that was changed"
    if way == "step += weights":
        step += weights
        weights = step.as_subclass(torch.Tensor)
    elif way == "weights += step":
        weights += step
    else:
        weights = weights + step if way == "weights + step" else step + weights
    assert type(weights) is torch.Tensor
    assert torch.equal(weights, target)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [False, True])
def test_a_block_ends_at_the_same_bits_for_weights_in_trees(name: str, library: str, bad: bool) -> None:
    """Also where a rank had a gradient that is not finite, and all return to the start of the block."""
    convert: Callable[[Any], Any] = np.array if library == "numpy" else pytest.importorskip("torch").tensor

    def train(comm: Any) -> dict[str, Any]:
        weights = {"w": convert(np.linspace(1, 2, 6, dtype="f4").reshape(2, 3)), "b": convert(np.zeros(2, "f4"))}
        method = METHODS[name](comm)
        state = method.init(weights)
        for number in range(12):
            rng = np.random.default_rng((comm.rank, number))
            arrays = {key: rng.normal(size=tuple(each.shape)).astype("f4") for key, each in weights.items()}
            if bad and number == 4 and comm.rank == 0:
                arrays["b"][0] = np.nan
            step, state = method.update({key: convert(each) for key, each in arrays.items()}, state, weights)
            for key in weights:
                weights[key] += step[key]
        step, state = method.finish(state, weights)
        for key in weights:
            weights[key] += step[key]
        assert state.abandoned == int(bad)
        assert np.array_equal(np.concatenate([np.ravel(each) for each in weights.values()]), state.start)
        return {key: np.asarray(each) for key, each in weights.items()}

    first, *others = run_on_ranks(3, train)
    assert all(np.isfinite(each).all() for each in first.values())
    assert all(np.array_equal(other[key], first[key]) for other in others for key in first)


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bmuf(MPI.COMM_SELF, HALF, 0), "period is 0: pass an integer, 1 or more"),
        (lambda: local_sgd(MPI.COMM_SELF, HALF, 2.5), "period is 2.5"),  # type: ignore[arg-type]
        (lambda: bmuf(MPI.COMM_SELF, HALF, momentum=1), "momentum is 1: pass a number from 0 to below 1"),
        (lambda: bmuf(MPI.COMM_SELF, HALF, lr=0), "lr is 0: pass a positive block rate"),
        (lambda: bmuf(MPI.COMM_SELF, HALF, nesterov="fairseq"), "nesterov is 'fairseq': pass False"),  # type: ignore[arg-type]
        (lambda: bmuf(MPI.COMM_SELF, HALF, local_state="drop"), "local_state is 'drop': pass one of 'keep'"),  # type: ignore[arg-type]
        (lambda: bmuf(MPI.COMM_SELF, HALF, weight_by="samples"), "weight_by is 'samples': pass 'workers'"),  # type: ignore[arg-type]
        (lambda: bmuf(MPI.COMM_SELF, HALF, warmup=-1), "warmup is -1: pass 0 or more"),
        (lambda: slowmo(MPI.COMM_SELF, HALF, 0.5, slow_lr=0), "slow_lr is 0"),
        (lambda: diloco(MPI.COMM_SELF, HALF, beta=1.5), "beta is 1.5"),
    ],
)
def test_impossible_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_gradient_unlike_the_weights_is_refused_before_any_message() -> None:
    method = bmuf(MPI.COMM_SELF, HALF, 1)
    with pytest.raises(ArgumentError, match="make them alike"):
        method.update(np.ones(1), method.init(np.zeros(3)), np.zeros(3))


def test_check_names_a_rank_with_other_weights() -> None:
    """An outer step that differs between ranks is what ``check`` is there to see."""

    def body(comm: Any) -> None:
        astray = chain(mean(comm), scale(-1.0 - comm.rank // 2))
        quadratic(periodic_transform(comm, 1, HALF, astray, check=True), comm, 1)

    with pytest.raises(MismatchError, match="ranks 2 differ from those of rank 0"):
        run_on_ranks(3, body)


# On MPI


@pytest.mark.mpi
def test_blocks_over_mpi_give_the_same_bits_on_all_ranks(comm: MPI.Intracomm) -> None:
    centres = draw_centres(comm)
    for name in ("bmuf nesterov", "bmuf sharded", "bmuf average", "diloco"):
        method = METHODS[name](comm)
        weights = np.zeros(37)
        state = method.init(weights)
        for _ in range(5 + comm.rank % 3):
            step, state = method.update(weights - centres[comm.rank], state, weights)
            weights += step
        step, state = method.finish(state, weights)
        weights += step
        check_replicas(comm, weights)
        check_replicas(comm, method.export(state))
        assert math.isfinite(float(weights.sum()))


def test_ranks_whose_blocks_have_other_lengths_are_told() -> None:
    def body(comm: Any) -> None:
        period, weights = 3 if comm.rank == 1 else 2, np.zeros(4)
        method = local_sgd(comm, HALF, period)
        state = method.init(weights)
        for _ in range(period - 1):
            _, state = method.update(np.ones(4), state, weights)
        with pytest.raises(MismatchError, match="a block has 2 steps on rank 0, 3 on rank 1: pass the same period"):
            method.update(np.ones(4), state, weights)

    run_on_ranks(3, body)
