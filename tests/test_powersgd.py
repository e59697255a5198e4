"""PowerSGD in two allreduces: the worked example, nothing lost, low-rank gradients exactly, small tensors whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_compressed_methods import GRADIENTS, numbers, steps_of

from hpccomm.algorithms.checkpoints import load_state_dict, state_dict
from hpccomm.algorithms.exchange import allreduce_bytes, synchronous_sgd
from hpccomm.algorithms.power_sgd import LEAST_SAVING, powersgd, split_matrices
from hpccomm.algorithms.transforms import chain, descend
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks

F32 = np.float32
BUCKET = Bucket({"w": (16, 12), "bias": (12,), "conv": (8, 2, 8), "small": (3, 3)})
THIN = 16 * 12 + 8 * 16


def test_the_worked_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 from Q = [1, 0]: figures of six digits, so half of the last one is allowed."""
    monkeypatch.setattr("hpccomm.algorithms.power_sgd.LEAST_SAVING", 1.0)
    bucket = Bucket({"w": (4, 2)})
    out = [0.125, 0.069318, 0.1875, 0.103977, -0.5625, -0.311932, 0.25, 0.138636]
    kept = [0.375, -0.319318, -0.0625, 0.896023, -0.3125, 0.311932, 0.125, -0.263636]

    def body(comm: Any) -> tuple[np.ndarray, Any]:
        method, weights = powersgd(comm, bucket, 1), np.zeros(8, F32)
        state = method.init(weights)._replace(factors=F32([1, 0]))
        return method.update(GRADIENTS[0, comm.rank].copy(), state, weights)

    (step, first), (other, _) = run_on_ranks(2, body)
    assert step.tobytes() == other.tobytes()
    np.testing.assert_allclose(step, out, atol=5e-7)
    np.testing.assert_allclose(first.residual, kept, atol=5e-7)
    np.testing.assert_allclose(first.factors, [0.655506, 0.363508], atol=5e-7)


def test_the_worked_example_with_local_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpccomm.algorithms.power_sgd.LEAST_SAVING", 1.0)

    def body(comm: Any) -> np.ndarray:
        method, weights = powersgd(comm, Bucket({"w": (4, 2)}), 1, local_error=True), np.zeros(8, F32)
        state = method.init(weights)._replace(factors=F32([1, 0]))
        return method.update(GRADIENTS[0, comm.rank].copy(), state, weights)[1].residual

    np.testing.assert_allclose(run_on_ranks(2, body)[0][:2], [0.304545, -0.286364], atol=5e-7)


def test_tensors_that_would_not_shrink_stay_whole() -> None:
    found = split_matrices(BUCKET, 2)
    assert [place.shape for place in found.matrices] == [(16, 12), (8, 16)]
    assert [BUCKET.table[k].offset for k in (1, 3)] == [place.start for place in found.dense]
    assert all(2 * sum(place.shape) * LEAST_SAVING < place.shape[0] * place.shape[1] for place in found.matrices)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("local", [False, True])
def test_steps_and_residuals_add_up_to_all_gradients(size: int, local: bool) -> None:
    """Over 200 steps, on all ranks the same bits; numbers stay below 2^6, each step rounds a few times."""
    steps = 200

    def body(comm: Any) -> Any:
        method, zero = powersgd(comm, BUCKET, 2, local_error=local), np.zeros(BUCKET.size, F32)
        gradients = [numbers(BUCKET.size, step, comm.rank) / 8 for step in range(steps)]
        _, state, applied = steps_of(method, comm, gradients, zero)
        first = 4 * (1 + 2 * (16 + 8) + 12 + 9), 4 * 2 * (12 + 16)
        assert state.report.wire_bytes == steps * sum(allreduce_bytes(each, size) for each in first)
        return sum(each.astype("f8") for each in applied), sum(each.astype("f8") for each in gradients), state

    found = run_on_ranks(size, body)
    assert len({each[0].tobytes() for each in found}) == 1
    assert len({each[2].factors.tobytes() for each in found}) == 1
    given = sum(each[1] for each in found) / size
    left = sum(each[2].residual.astype("f8") for each in found) / size
    places = split_matrices(BUCKET, 2)
    for place in places.matrices:
        np.testing.assert_allclose(
            found[0][0][place.inside] + left[place.error], given[place.inside], atol=steps * 4 * 2.0**-18
        )
    for place in places.dense:
        np.testing.assert_allclose(found[0][0][place], given[place], atol=steps * 2.0**-18)
    assert np.abs(left).max() > 0.1


def test_a_gradient_of_low_rank_is_applied_at_once() -> None:
    """A sum of two outer products of small whole numbers by rank 2: exact but for the rounding of the factors."""
    rng = np.random.default_rng(3)
    low = sum(np.outer(rng.integers(-4, 5, 16), rng.integers(-4, 5, 12)) for _ in range(2)).astype(F32)
    bucket = Bucket({"w": (16, 12)})

    def body(comm: Any) -> tuple[np.ndarray, np.ndarray]:
        method, zero = powersgd(comm, bucket, 2), np.zeros(192, F32)
        step, state = method.update((low * (1 + comm.rank)).reshape(-1), method.init(zero), zero)
        return step, state.residual

    for rank, (step, kept) in enumerate(run_on_ranks(3, body)):
        np.testing.assert_allclose(step, 2 * low.reshape(-1), atol=2e-4)
        np.testing.assert_allclose(kept, (rank - 1) * low.reshape(-1), atol=2e-4)


def test_gradients_without_matrices_are_averaged() -> None:
    bucket = Bucket({"a": (7,), "b": (2, 2), "none": (0, 3)})

    def body(comm: Any) -> None:
        zero = np.zeros(11, F32)
        both = chain(powersgd(comm, bucket), descend(1.0)), synchronous_sgd(comm, 1.0)
        for step in range(3):
            steps = [each.update(numbers(11, step, comm.rank), each.init(zero), zero)[0] for each in both]
            np.testing.assert_array_equal(*steps)

    run_on_ranks(3, body)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 195])
def test_one_gradient_that_is_not_finite_changes_nothing(odd: float, place: int) -> None:
    """In a matrix and in a vector that travels whole."""

    def body(comm: Any) -> None:
        method, zero = powersgd(comm, BUCKET, 2), np.zeros(BUCKET.size, F32)
        _, before = method.update(numbers(BUCKET.size, 0, comm.rank), method.init(zero), zero)
        gradient = numbers(BUCKET.size, 1, comm.rank)
        gradient[place] = odd if comm.rank == 2 else gradient[place]
        step, after = method.update(gradient, before, zero)
        assert not step.any()
        assert after.skipped == 1
        assert after.residual.tobytes() == before.residual.tobytes()
        assert after.factors.tobytes() == before.factors.tobytes()
        assert after.steps == before.steps

    run_on_ranks(3, body)


def test_a_run_continues_from_its_state() -> None:
    def body(comm: Any) -> None:
        method, zero = powersgd(comm, BUCKET, 2), np.zeros(BUCKET.size, F32)
        gradients = [numbers(BUCKET.size, step, comm.rank) for step in range(8)]
        whole, _, _ = steps_of(method, comm, gradients, zero)
        weights, state, _ = steps_of(method, comm, gradients[:5], zero)
        state = load_state_dict(method.init(zero), state_dict(state))
        for each in gradients[5:]:
            step, state = method.update(each, state, weights)
            weights = weights + step
        np.testing.assert_array_equal(weights, whole)

    run_on_ranks(3, body)


def test_ranks_below_one_are_refused() -> None:
    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match="1 or more"):
            powersgd(comm, BUCKET, 0)
        with pytest.raises(ArgumentError, match="bucket's size"):
            powersgd(comm, BUCKET).init(np.zeros(3, F32))

    run_on_ranks(1, body)
