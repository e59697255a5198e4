"""Loss scaling around every kind of exchange: what it divides out, what it skips, how the factor moves; masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm import Bucket, LossScale, chain, descend, momentum, scale, scale_loss
from hpccomm.algorithms.local_steps import periodic_transform
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks

N = 24
EXCHANGES: dict[str, Callable[[Any], Any]] = {
    "dense": hpccomm.mean,
    "gtc": lambda comm: hpccomm.gtc(comm, 0.5),
    "dgc": lambda comm: hpccomm.dgc(comm, Bucket({"w": (4, 6)}), 0.25, smallest=1),
    "onebit": lambda comm: hpccomm.onebit_sgd(comm, Bucket({"w": (4, 6)})),
    "powersgd": lambda comm: hpccomm.powersgd(comm, Bucket({"w": (4, 6)}), 2),
    "block_mean": hpccomm.block_mean,
}


def gradient_of(rank: int, step: int) -> Any:
    return np.random.default_rng((rank, step)).normal(size=N).astype("f4")


@pytest.mark.parametrize("name", EXCHANGES)
def test_powers_of_two_divide_out_and_a_skipped_step_leaves_no_trace(name: str) -> None:
    """Steps of a run whose factor moves, and in which rank 1 has an infinity now and then, are those of one without."""

    def body(comm: Any) -> None:
        inner = chain(EXCHANGES[name](comm), momentum(0.5), descend(0.1))
        plain = chain(EXCHANGES[name](comm), momentum(0.5), descend(0.1))
        method, weights = scale_loss(comm, inner, LossScale(8.0, 2)), np.zeros(N, "f4")
        state, other, values = method.init(weights), plain.init(weights), []
        for number in range(9):
            factor = hpccomm.loss_scale(state)
            values.append(factor)
            scaled = gradient_of(comm.rank, number) * np.float32(factor)
            if number in (3, 4, 8):
                scaled[7] = np.inf if comm.rank == comm.size - 1 else scaled[7]
                step, state = method.update(scaled, state, weights)
                assert not step.any()
                continue
            step, state = method.update(scaled, state, weights)
            wanted, other = plain.update(gradient_of(comm.rank, number), other, weights)
            assert step.tobytes() == wanted.tobytes()
        assert values == [8, 8, 16, 16, 8, 4, 4, 8, 8]
        assert hpccomm.loss_scale(state) == 4
        assert hpccomm.report(state).messages.skipped == 3

    for size in (1, 2, 3):
        run_on_ranks(size, body)


def test_a_factor_that_float16_cannot_hold_divides_its_gradients() -> None:
    method, weights = scale_loss(MPI.COMM_SELF, scale(-1)), np.zeros(3, "f2")
    step, state = method.update(np.array([65504, -1024, 1], "f2"), method.init(weights), weights)
    assert hpccomm.loss_scale(state) == 65536
    assert step.dtype == np.float16
    assert step.tolist() == [-0.99951171875, 2.0**-6, -(2.0**-16)]


def test_a_constant_factor_stays_and_the_bounds_hold() -> None:
    for first, bad, wanted in (
        (LossScale(4.0), True, 4.0),
        (LossScale(1.0, 1), True, 1.0),
        (LossScale(2.0**24, 1), False, 2.0**24),
    ):
        method, weights = scale_loss(MPI.COMM_SELF, scale(-1), first), np.zeros(1)
        _, state = method.update(np.array([np.nan if bad else 1.0]), method.init(weights), weights)
        assert hpccomm.loss_scale(state) == wanted


def test_local_methods_scale_each_rank_alone() -> None:
    """Inside a block a rank skips its own step; the ranks end with the same bits."""

    def body(comm: Any) -> bytes:
        inner = scale_loss(MPI.COMM_SELF, chain(momentum(0.5), descend(0.1)), LossScale(4.0, 3))
        method, weights = hpccomm.bmuf(comm, inner, 4), np.zeros(N, "f4")
        state = method.init(weights)
        for number in range(8):
            gradient = gradient_of(comm.rank, number) * np.float32(hpccomm.loss_scale(state.inner))
            gradient[0] = np.nan if number == 2 and comm.rank else gradient[0]
            step, state = method.update(gradient, state, weights)
            weights = weights + step
        assert np.isfinite(weights).all()
        return weights.tobytes()

    assert len(set(run_on_ranks(3, body))) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda comm, inner: periodic_transform(comm, 4, inner, chain(hpccomm.mean(comm), scale(-1)), warmup=6),
        lambda comm, inner: hpccomm.bmuf(comm, inner, 4, warmup=6),
        lambda comm, inner: hpccomm.hybrid(comm, hpccomm.mean, inner, 1, period=4, warmup=6),
    ],
    ids=["local steps", "bmuf", "hybrid"],
)
def test_the_factor_halves_in_synchronous_steps_of_local_methods(make: Any) -> None:
    """4 · 65536 is infinite in float16, as is 4 · 16384; the first factor that fits is 8192."""

    def body(comm: Any) -> list[float]:
        method = make(comm, scale_loss(MPI.COMM_SELF, descend(0.1), LossScale(65536.0, 2000)))
        weights, factors = np.ones(2, "f2"), []
        state = method.init(weights)
        for _ in range(6):
            factors.append(hpccomm.loss_scale(state.inner))
            with np.errstate(over="ignore"):
                gradient = (np.full(2, 4.0, "f4") * factors[-1]).astype("f2")
            step, state = method.update(gradient, state, weights)
            weights = weights + step
        assert state.abandoned == 3
        assert (weights < 1).all()
        return factors

    assert run_on_ranks(2, body) == [[65536, 32768, 16384, 8192, 8192, 8192]] * 2


def test_the_factor_of_a_state_without_one_is_1() -> None:
    assert hpccomm.loss_scale(momentum(0.9).init(np.zeros(3))) == 1
    with pytest.raises(ArgumentError, match=r"scale_loss: the scale is 0.0: pass a positive number"):
        scale_loss(MPI.COMM_SELF, scale(-1), LossScale(0.0))
    with pytest.raises(ArgumentError, match=r"scale_loss: first is 8.0: pass hpccomm.LossScale"):
        scale_loss(MPI.COMM_SELF, scale(-1), 8.0)  # type: ignore[arg-type]


def test_masks_are_chosen_by_name_or_by_dimensions() -> None:
    bucket = Bucket({"layer.w": (2, 2), "layer.b": (2,), "norm.w": (1, 2)})
    by_name = bucket.mask(lambda entry: "norm" not in entry.name)
    by_both = bucket.mask(lambda entry: len(entry.shape) > 1 and "norm" not in entry.name)
    assert by_name.tolist() == [True] * 6 + [False] * 2
    assert by_both.tolist() == [True] * 4 + [False] * 4
    method, weights = hpccomm.weight_decay(0.5, by_both), np.full(8, 2.0)
    assert method.update(np.zeros(8), method.init(weights), weights)[0].tolist() == [1.0] * 4 + [0.0] * 4
