"""1-bit LAMB: LAMB at first, then its momentum in one bit an element, against the formulas written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from test_compressed_methods import numbers, steps_of

from hpccomm.algorithms.checkpoints import load_state_dict, state_dict
from hpccomm.algorithms.exchange import mean
from hpccomm.algorithms.large_batch import lamb
from hpccomm.algorithms.onebit import onebit_adam, onebit_lamb
from hpccomm.algorithms.transforms import chain
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks

F32 = np.float32
BUCKET = Bucket({"w": (6, 5), "bias": (7,), "none": (0,), "v": (4, 4)})
PLACES = [slice(0, 30), slice(30, 37), slice(53, 53), slice(37, 53)]
WEIGHTS = np.random.default_rng(8).normal(size=53).astype(F32)


def test_steps_before_the_freeze_are_lamb() -> None:
    """The kernels of LAMB round in another order; steps are about 0.1, 1e-6 are ten roundings of them."""

    def body(comm: Any) -> None:
        gradients = [numbers(53, step, comm.rank) for step in range(5)]
        ours = onebit_lamb(comm, BUCKET, 0.1, 5, weight_decay=0.1)
        theirs = chain(mean(comm), lamb(BUCKET, 0.1, weight_decay=0.1, bias_correction=False, ratio_clip=(0.01, 10.0)))
        a, b = (steps_of(each, comm, gradients, WEIGHTS)[0] for each in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-6)

    run_on_ranks(3, body)


def run_formulas(gradients: np.ndarray, freeze: int) -> np.ndarray:
    """The weights of one rank after all gradients, by the formulas: b1 = b2 = 0.5, ε = 0.125, λ = 0, γ = 0.1."""
    w, m, v, fresh = WEIGHTS.astype("f8"), *np.zeros((3, 53))
    ratio, factor, sigma = np.ones((3, 4))
    worker, server = np.zeros((2, 53))
    for step, g in enumerate(gradients.astype("f8")):
        if step < freeze:
            m, v = (m + g) / 2, (v + g * g) / 2
            u = m / (np.sqrt(v) + 0.125)
            fresh = v
            each = np.array(
                [np.clip(np.linalg.norm(w[p]) / np.linalg.norm(u[p]), 0.01, 10) if w[p].size else 1 for p in PLACES]
            )
            ratio = each if step == 0 else 0.9 * ratio + 0.1 * each
            length = np.array([np.sqrt((m[p] ** 2).mean()) if m[p].size else 0 for p in PLACES])
            sigma = np.where(length > 0, length.mean() / np.where(length > 0, length, 1), 1)
        else:
            scales = np.concatenate(
                [np.full(w[p].size, s) for p, s in zip((PLACES[k] for k in (0, 1, 3)), sigma[[0, 1, 3]], strict=True)]
            )
            p = (m + g) / 2 * scales + worker
            said = np.abs(p).mean() * np.where(p >= 0, 1, -1)
            worker = p - said
            b = said + server
            sent = np.abs(b).mean() * np.where(b >= 0, 1, -1)
            server = b - sent
            before, m = m, sent / scales
            fresh = (fresh + (2 * m - before) ** 2) / 2
            growth = (np.sqrt(v) + 0.125) / (np.sqrt(fresh) + 0.125)
            most = np.array([growth[p].max(initial=0) for p in PLACES])
            factor = np.clip(np.clip(most, 0.5, 4), 0.9 * factor, 1.1 * factor)
            u, each = m / (np.sqrt(v) + 0.125), ratio * factor
        for p, c in zip(PLACES, each, strict=True):
            w[p] -= 0.1 * c * u[p]
    return w


def test_steps_after_the_freeze_follow_the_formulas() -> None:
    """One rank, so both phases are signs of its own; weights of about 1 after twelve steps in float32."""
    gradients = np.array([numbers(53, step, 0) for step in range(12)])

    def body(comm: Any) -> tuple[np.ndarray, Any]:
        method = onebit_lamb(comm, BUCKET, 0.1, 4, b1=0.5, b2=0.5, eps=0.125, weight_decay=0)
        return steps_of(method, comm, gradients, WEIGHTS)[:2]

    weights, state = run_on_ranks(1, body)[0]
    np.testing.assert_allclose(weights, run_formulas(gradients, 4), atol=1e-4)
    assert np.abs(weights - WEIGHTS).max() > 0.1
    assert not np.array_equal(state.factors, np.ones(4))


@pytest.mark.parametrize("method", ["adam", "lamb"])
@pytest.mark.parametrize(("size", "limit"), [(0.0, 100), (1e-20, 1e5)])
def test_a_tensor_whose_gradients_pause_at_the_freeze_leaves_the_steps_of_others_bounded(
    method: str, size: float, limit: float
) -> None:
    """Without a bound its factor is 1e17: one sign's magnitude then spoils the other tensor's steps."""
    bucket, freeze, rng = Bucket({"steady": (8,), "pauses": (8,)}), 66, np.random.default_rng(0)
    comm = MPI.COMM_SELF
    transform = (
        onebit_adam(comm, 0.001, freeze, bucket=bucket, b1=0.5)
        if method == "adam"
        else onebit_lamb(comm, bucket, 0.001, freeze, b1=0.5)
    )
    weights = np.full(16, 0.1, F32)
    state, largest = transform.init(weights), []
    for number in range(freeze + 4):
        gradient = rng.normal(size=16).astype(F32) * F32(0.01)
        gradient[8:] *= F32(size if 5 <= number < freeze + 1 else 1)
        if size and number < 5:
            gradient[8:] *= F32(size)
        step, state = transform.update(gradient, state, weights)
        weights = weights + step
        largest.append(float(np.abs(step[:8]).max()))
    assert max(largest[freeze:]) <= limit * max(largest[:freeze])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_take_the_same_steps_and_send_one_bit_an_element_after_the_freeze(size: int) -> None:
    def body(comm: Any) -> tuple[bytes, list[int]]:
        method = onebit_lamb(comm, BUCKET, 0.01, 2)
        weights, state, sent = WEIGHTS, method.init(WEIGHTS), []
        for step in range(6):
            gradient = numbers(53, step, comm.rank) if comm.rank != 1 else np.zeros(53, F32)
            before = state.report.wire_bytes
            moved, state = method.update(gradient, state, weights)
            weights = weights + moved
            sent.append(state.report.wire_bytes - before)
        return weights.tobytes(), sent

    found = run_on_ranks(size, body)
    assert len({weights for weights, _ in found}) == 1
    for _, sent in found:
        vote = round(2 * (size - 1) / size)
        assert sent[:2] == [round(2 * (size - 1) * 53 * 4 / size) + vote] * 2
        assert all(each <= (size - 1) * (2 * (4 + 7) + 24) for each in sent[2:])


def test_a_run_continues_from_its_state_and_skips_gradients_that_are_not_finite() -> None:
    def body(comm: Any) -> None:
        gradients = [numbers(53, step, comm.rank) for step in range(8)]
        method = onebit_lamb(comm, BUCKET, 0.01, 3)
        whole, _, _ = steps_of(method, comm, gradients, WEIGHTS)
        weights, state, _ = steps_of(method, comm, gradients[:5], WEIGHTS)
        bad = np.full(53, np.nan if comm.rank == 1 else 1, F32)
        step, after = method.update(bad, state, weights)
        assert not step.any()
        assert after == state._replace(skipped=1, report=after.report)
        state = load_state_dict(method.init(weights), state_dict(state))
        for each in gradients[5:]:
            step, state = method.update(each, state, weights)
            weights = weights + step
        np.testing.assert_array_equal(weights, whole)

    run_on_ranks(3, body)


def test_arguments_out_of_range_are_refused() -> None:
    def body(comm: Any) -> None:
        for arguments, says in (((0.1, 0), "1 or more"), ((0.1, 5, 1.0), "b1")):
            with pytest.raises(ArgumentError, match=says):
                onebit_lamb(comm, BUCKET, *arguments[:2], **({"b1": arguments[2]} if len(arguments) > 2 else {}))
        with pytest.raises(ArgumentError, match="bucket's size"):
            onebit_lamb(comm, BUCKET, 0.1, 3).init(np.zeros(4, F32))

    run_on_ranks(1, body)
