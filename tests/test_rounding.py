"""Thresholds that follow their vectors, and compressors that round at random: with feedback, and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpccomm
from hpccomm.algorithms.compression.format import Compressor
from hpccomm.algorithms.transforms import Transform, chain, scale
from hpccomm.errors import ArgumentError
from hpccomm.testing import run_on_ranks

F32 = np.float32


def run(make: Callable[[Any], Transform], gradients: Callable[[Any, int], Any], steps: int, size: int = 2) -> Any:
    """The sums of all steps and of all mean gradients, and the residuals' largest element, on each rank."""

    def body(comm: Any) -> Any:
        method = make(comm)
        first = gradients(comm, 0)
        weights = np.zeros(first.size, F32)
        state, total, given, moved = method.init(weights), np.zeros(first.size), np.zeros(first.size), []
        for number in range(steps):
            gradient = gradients(comm, number)
            step, state = method.update(gradient.copy(), state, weights)
            total += step
            given += gradient
            moved.append(float(np.abs(step).max()))
        return total, given, float(np.abs(state.residual).max(initial=0)), moved

    found = run_on_ranks(size, body)
    assert len({each[0].tobytes() for each in found}) == 1
    return found[0][0], sum(each[1] for each in found) / size, max(each[2] for each in found), found[0][3]


# GTC on vectors that are zero in most places, or almost zero at first


def gradients_of_frozen(share: float) -> Callable[[Any, int], Any]:
    """A hundred thousand elements, of which a share moves, by 1 on the average."""

    def gradient(comm: Any, number: int) -> Any:
        found = np.zeros(100_000, F32)
        count = round(share * found.size)
        draw = np.random.default_rng([number, comm.rank])
        found[:: found.size // max(count, 1)][:count] = draw.exponential(size=count)
        return found

    return gradient


@pytest.mark.parametrize("share", [1e-5, 5e-4, 9e-4, 1e-3, 1.05e-3, 2e-3])
@pytest.mark.parametrize("make", [lambda comm: hpccomm.gtc(comm, density=0.001), hpccomm.gtc], ids=["density", "auto"])
def test_a_mostly_frozen_model_moves_from_the_first_step(share: float, make: Any) -> None:
    total, given, residual, moved = run(make, gradients_of_frozen(share), 60)
    assert moved[0] > 0
    assert max(moved) < 20 * np.mean(given[given > 0]) / 60 + 20
    assert residual < 40, "what waits is some steps' worth"
    moving = given > 0
    assert total[moving].sum() > 0.4 * given[moving].sum()


@pytest.mark.parametrize("size", [1e-12, 1e-6])
@pytest.mark.parametrize("first", ["tiny", "one element", "zero"])
def test_auto_finds_its_threshold_after_a_first_gradient_that_misleads(first: str, size: float) -> None:
    def gradient(comm: Any, number: int) -> Any:
        found = np.random.default_rng([number, comm.rank]).normal(size=20_000).astype(F32)
        if number == 0:
            found *= {"tiny": size, "one element": 0, "zero": 0}[first]
            found[:1] += size if first == "one element" else 0
        return found

    def count(comm: Any) -> list[float]:
        method = hpccomm.gtc(comm)
        weights, state, densities = np.zeros(20_000, F32), None, []
        for number in range(12):
            step, state = method.update(gradient(comm, number), state or method.init(weights), weights)
            densities.append(np.count_nonzero(step) / step.size)
        return densities

    for densities in run_on_ranks(1, count):
        assert all(0 < each < 0.1 for each in densities[3:]), densities


def test_a_density_is_reached_where_enough_elements_move() -> None:
    x = np.random.default_rng(1).normal(size=100_000).astype(F32)
    for density in (0.001, 0.01, 0.1, 0.5):
        named = hpccomm.report(message_state(hpccomm.threshold(density=density), x)).messages.elements
        assert named == pytest.approx(density * x.size, rel=0.2)


def message_state(compressor: Compressor, x: Any) -> Any:
    """The state after one step of one rank."""

    def body(comm: Any) -> Any:
        method = hpccomm.feedback(compressor, comm)
        return method.update(x, method.init(x), x)[1]

    return run_on_ranks(1, body)[0]


# Rounding at random

RANDOM: dict[str, Callable[[], Compressor]] = {
    "qsgd": hpccomm.qsgd,
    "qsgd, one level": lambda: hpccomm.qsgd(1, 64),
    "qsgd, four": lambda: hpccomm.qsgd(4),
    "ternary": hpccomm.ternary,
    "ternary, not clipped": lambda: hpccomm.ternary(None),
    "natural": hpccomm.natural,
}


def same_normals(comm: Any, number: int) -> Any:
    return np.random.default_rng(number).normal(size=512).astype(F32)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("exchange", ["feedback", "unbiased", "momentum"])
def test_ranks_round_independently(name: str, exchange: str) -> None:
    """Equal gradients on all ranks: the error of the mean of 8 is √8 times as small as one rank's, not as large."""

    def error(size: int) -> float:
        def body(comm: Any) -> float:
            made = RANDOM[name]()
            methods = {
                "feedback": lambda: hpccomm.feedback(made, comm),
                "unbiased": lambda: hpccomm.without_feedback(made, comm),
                "momentum": lambda: hpccomm.feedback(made, comm, 0.5),
            }
            squares = 0.0
            for number in range(8):
                gradient = same_normals(comm, number)
                method = methods[exchange]()
                step, _ = method.update(gradient.copy(), method.init(gradient), gradient)
                whole = gradient * (step @ gradient) / (gradient @ gradient)  # damped forms are shorter
                squares += float(np.square(step - whole).sum())
            return squares

        return run_on_ranks(size, body)[0]

    ratio = error(1) / error(8)
    assert 5 < ratio < 12


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_ranks_may_pass_seeds_of_their_own(name: str, momentum: float) -> None:
    makes = {"qsgd": hpccomm.qsgd, "ternary": hpccomm.ternary, "natural": hpccomm.natural}

    def body(comm: Any) -> None:
        made = makes[name.split(",", maxsplit=1)[0]](seed=comm.rank)
        method, weights = hpccomm.feedback(made, comm, momentum), np.ones(64, F32)
        step, state = method.update(weights.copy(), method.init(weights), weights)
        assert step.any()
        assert state.steps == 1

    run_on_ranks(3, body)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("n", [1, 5, 512, 1000])
def test_feedback_around_random_rounding_does_not_diverge(name: str, n: int) -> None:
    """A constant gradient of normals for 400 steps: what waits stays bounded, and almost all of it arrived."""

    def gradient(comm: Any, number: int) -> Any:
        return np.random.default_rng([7, comm.rank]).normal(size=n).astype(F32)

    total, given, residual, _ = run(lambda comm: hpccomm.feedback(RANDOM[name](), comm), gradient, 400)
    assert residual < 150
    assert np.linalg.norm(total - given) < 0.3 * np.linalg.norm(given)


@pytest.mark.parametrize("name", RANDOM)
def test_the_damped_form_is_never_further_away_than_zero(name: str) -> None:
    made = RANDOM[name]()
    made = made.contraction or made
    for number in range(20):
        x = np.random.default_rng(number).normal(size=200).astype(F32) ** 3
        x[: 10 * number] = 0
        decoded = made.decode_vector(made.encode(x, number), x.size)
        assert np.linalg.norm(decoded - x) <= np.linalg.norm(x) * (1 + 1e-6)
    assert not made.decode_vector(made.encode(np.zeros(7, F32)), 7).any()
    assert made.encode(np.zeros(0, F32)).size >= 32


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("name", ["qsgd", "qsgd, one level", "qsgd, four", "ternary, not clipped", "natural"])
def test_without_feedback_the_mean_of_many_steps_is_the_gradient(name: str) -> None:
    """4,000 steps of 2 ranks: the error of the mean is at most a few of its standard deviations."""

    def body(comm: Any) -> float:
        x = np.random.default_rng(3).normal(size=32).astype(F32)
        method = hpccomm.without_feedback(RANDOM[name](), comm)
        state, total = method.init(x), np.zeros(32)
        for _ in range(4000):
            step, state = method.update(x, state, x)
            total += step
        return float(np.abs(total / 4000 - x).max())

    assert run_on_ranks(2, body)[0] < 5 * 6 / np.sqrt(8000)


def test_descent_by_one_level_converges_with_both_exchanges() -> None:
    def body(comm: Any) -> list[float]:
        found = []
        for exchange in (hpccomm.feedback, hpccomm.without_feedback):
            method = chain(exchange(hpccomm.qsgd(1, 32), comm), scale(-0.02))
            weights = np.full(64, 5.0, F32)
            state = method.init(weights)
            for _ in range(1500):
                step, state = method.update(weights - comm.rank, state, weights)
                weights = weights + step
            found.append(float(np.abs(weights - 0.5).max()))
        return found

    assert all(each < 0.7 for each in run_on_ranks(2, body)[0])


@pytest.mark.parametrize("make", [lambda: hpccomm.topk(0.1), hpccomm.onebit, lambda: hpccomm.threshold(1.0)])
def test_a_compressor_whose_error_has_a_direction_needs_feedback(make: Any) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match="use feedback"):
            hpccomm.without_feedback(make(), comm)

    run_on_ranks(1, body)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_without_feedback_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(bad: float) -> None:
    def body(comm: Any) -> None:
        method, weights = hpccomm.without_feedback(hpccomm.qsgd(), comm), np.ones(5, F32)
        gradient = np.full(5, bad if comm.rank else 1, F32)
        step, state = method.update(gradient, method.init(weights), weights)
        assert not step.any()
        assert hpccomm.report(state).messages.skipped == 1

    run_on_ranks(2, body)
