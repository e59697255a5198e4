"""What one phase of a method leaves behind, the next one finds: warm-ups, freezes, dense steps, ends of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpccomm
from hpccomm.algorithms.states import for_ranks, leaves, scale_unsent, snapshot, unsent_leaves
from hpccomm.algorithms.transforms import Transform, chain, descend, flush, momentum, scale
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError
from hpccomm.testing import run_on_ranks

F32 = np.float32
STEP = scale(-0.3)
BLOCKS: dict[str, Callable[..., Any]] = {
    "bmuf": lambda comm, warmup: hpccomm.bmuf(comm, STEP, 4, momentum=0.5, warmup=warmup),
    "bmuf, ahead": lambda comm, warmup: hpccomm.bmuf(comm, STEP, 4, momentum=0.5, warmup=warmup, nesterov="lookahead"),
    "bmuf, paper": lambda comm, warmup: hpccomm.bmuf(comm, STEP, 4, momentum=0.5, warmup=warmup, nesterov="paper"),
    "bmuf, sharded": lambda comm, warmup: hpccomm.bmuf(comm, STEP, 4, momentum=0.5, warmup=warmup, shard_state=True),
    "bmuf_adam": lambda comm, warmup: hpccomm.bmuf_adam(comm, 20.0, 4, momentum=0.25, block_lr=0.5, warmup=warmup),
    "post-local": lambda comm, warmup: hpccomm.post_local_sgd(comm, STEP, 4, warmup),
    "slowmo": lambda comm, warmup: hpccomm.slowmo(comm, STEP, 0.3, 4, warmup=warmup),
    "hybrid": lambda comm, warmup: hpccomm.hybrid(comm, hpccomm.mean, STEP, 1, period=4, momentum=0.5, warmup=warmup),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("size", [2, 3])
def test_blocks_begin_from_the_model_of_the_warm_up(name: str, n: int, size: int) -> None:
    """A quadratic from far away, the optimum of rank r at r: 10 synchronous steps, then three blocks."""

    def body(comm: Any) -> None:
        method, weights = BLOCKS[name](comm, 10), np.full(n, 100.0)
        state, farthest = method.init(weights), np.inf
        for number in range(1, 23):
            step, state = method.update(weights - comm.rank, state, weights)
            weights += step
            distance = float(np.abs(weights - (size - 1) / 2).max())
            if number <= 10:
                assert np.array_equal(method.export(state), weights), "inside the warm-up the model is the weights"
            if number == 10:
                farthest = distance
            elif number in (14, 18, 22):
                assert distance <= farthest + 1e-9
                assert float(np.abs(method.export(state) - (size - 1) / 2).max()) <= farthest + 1e-9

    run_on_ranks(size, body)


def test_the_reported_run() -> None:
    """Two ranks from 100: 4.77 after the warm-up, and the first block goes on from there."""

    def body(comm: Any) -> list[float]:
        method, weights, seen = BLOCKS["bmuf"](comm, 10), np.full(1, 100.0), []
        state = method.init(weights)
        for _ in range(14):
            step, state = method.update(weights - 2 * comm.rank - 1, state, weights)
            weights += step
            seen.append(float(weights[0]))
        return seen

    for seen in run_on_ranks(2, body):
        assert seen[9] == pytest.approx(2 + 98 * 0.7**10)
        assert seen[13] == pytest.approx(2 + 98 * 0.7**14)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("steps", [[2, 2], [0, 3], [1, 0], [4, 2]])
def test_a_run_that_ends_in_the_warm_up_keeps_its_model(name: str, steps: list[int]) -> None:
    def body(comm: Any) -> bytes:
        method, weights = BLOCKS[name](comm, 6), np.full(3, 8.0)
        state = method.init(weights)
        for _ in range(steps[comm.rank]):
            step, state = method.update(weights - comm.rank, state, weights)
            weights += step
        step, state = method.finish(state, weights)
        weights += step
        assert np.array_equal(method.export(state), weights)
        assert (weights != 8).all()
        return weights.tobytes()

    assert len(set(run_on_ranks(2, body))) == 1


# PowerSGD: nothing dies of a zero


BUCKET = Bucket({"w": (64, 64), "bias": (4,)})


def gradients_of(kind: str, comm: Any, n: int) -> list[Any]:
    """Fifty gradients of a tensor that is zero, or of rank 1, at first or every other time; the biases' are ones."""
    draw = np.random.default_rng(5 + comm.rank)
    found = []
    for number in range(n):
        dense = draw.normal(size=(64, 64)).astype(F32) / 64 + np.eye(64, dtype=F32)
        once = number == 0 if kind != "every other" else number % 2 == 0
        if once:
            dense = np.zeros_like(dense) if kind != "rank one" else np.outer(np.ones(64), dense[0]).astype(F32)
        found.append(np.concatenate([dense.reshape(-1), np.ones(4, F32)]))
    return found


@pytest.mark.parametrize("kind", ["zero", "rank one", "every other"])
@pytest.mark.parametrize("size", [1, 2])
def test_powersgd_survives_gradients_that_say_nothing(kind: str, size: int) -> None:
    """A backlog of 50 mean gradients would have norm 400 (25 and more every other time); it stays far below."""

    def body(comm: Any) -> Any:
        method, weights = hpccomm.powersgd(comm, BUCKET, 4), np.zeros(BUCKET.size, F32)
        state, applied, given = method.init(weights), np.zeros(4096), np.zeros(4096)
        for gradient in gradients_of(kind, comm, 50):
            step, state = method.update(gradient, state, weights)
            applied += step[:4096]
            given += gradient[:4096]
        columns = state.factors.reshape(64, 4)
        assert columns.any(axis=0).all()
        return applied, given, state.residual.astype("f8")

    found = run_on_ranks(size, body)
    mean = sum(each[1] for each in found) / size
    left = sum(each[2] for each in found) / size
    np.testing.assert_allclose(found[0][0] + left, mean, atol=1e-3)
    cosine = found[0][0] @ mean / np.linalg.norm(found[0][0]) / np.linalg.norm(mean)
    assert cosine > 0.9
    assert np.linalg.norm(left) < 0.6 * np.linalg.norm(mean)


def test_powersgd_begins_with_dense_steps() -> None:
    def body(comm: Any) -> None:
        method, weights = hpccomm.powersgd(comm, BUCKET, 2, start_dense_steps=3), np.zeros(BUCKET.size, F32)
        dense, state = hpccomm.mean(comm), method.init(weights)
        for number, gradient in enumerate(gradients_of("rank one", comm, 5)):
            step, state = method.update(gradient, state, weights)
            expected, _ = dense.update(gradient, dense.init(weights), weights)
            assert np.array_equal(step, expected) == (number < 3)
            assert bool(state.residual.any()) == (number >= 3)

    run_on_ranks(2, body)


# What was not sent is sent at the end, and the exchange says how


def exchanges(bucket: Bucket) -> dict[str, Callable[[Any], Transform]]:
    """Every exchange that keeps a residual; the second ones sum."""
    return {
        "gtc": lambda comm: hpccomm.gtc(comm, 2.0),
        "gtc, sum": lambda comm: hpccomm.gtc(comm, 2.0, reduce="sum"),
        "topk": lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm),
        "dgc": lambda comm: hpccomm.dgc(comm, bucket, 0.02, momentum=0.0, smallest=1),
        "powersgd": lambda comm: hpccomm.powersgd(comm, bucket, 1),
        "chain": lambda comm: chain(scale(1.0), hpccomm.gtc(comm, 2.0)),
    }


NAMES = list(exchanges(Bucket({"w": (2, 2)})))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_flush_applies_all_that_was_not_sent(name: str, size: int) -> None:
    bucket = Bucket({"w": (16, 16), "bias": (3,)})

    def body(comm: Any) -> None:
        method, weights = chain(exchanges(bucket)[name](comm), scale(-1.0)), np.zeros(bucket.size, F32)
        state, total = method.init(weights), np.zeros(bucket.size)
        for number in range(6):
            draw = np.random.default_rng([number, comm.rank]).integers(-8, 8, bucket.size)
            step, state = method.update(draw.astype(F32), state, weights)
            total += step
        step, state = flush(method, state, weights)
        total += step
        wanted = sum(
            np.random.default_rng([number, rank]).integers(-8, 8, bucket.size)
            for number in range(6)
            for rank in range(size)
        ) / (1 if "sum" in name else size)
        np.testing.assert_allclose(total, -wanted, atol=1e-3 if name == "powersgd" else 1e-5)
        assert not any(each.any() for each in unsent_leaves(state))

    run_on_ranks(size, body)


def test_there_is_nothing_to_flush_in_a_dense_method() -> None:
    def body(comm: Any) -> None:
        method = chain(hpccomm.mean(comm), scale(-1.0))
        with pytest.raises(ArgumentError, match="nothing to flush"):
            flush(method, method.init(np.zeros(2)), np.zeros(2))

    run_on_ranks(1, body)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_hybrid_flushes_as_its_exchange_reduces(name: str, group: int) -> None:
    """A constant gradient of 2 in blocks of three steps: each block moves by 3 · 2, g-fold where the exchange sums."""
    bucket = Bucket({"w": (16, 16)})

    def body(comm: Any) -> None:
        method = hpccomm.hybrid(
            comm, exchanges(bucket)[name], scale(-1.0), group, period=3, residual="flush", momentum=0.0
        )
        weights = np.zeros(bucket.size, F32)
        state, gradient = method.init(weights), np.full(bucket.size, 2.0, F32)
        for _ in range(6):
            step, state = method.update(gradient, state, weights)
            weights += step
        np.testing.assert_allclose(weights, -12.0 * (group if "sum" in name else 1), rtol=1e-5)

    run_on_ranks(4, body)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_group_steps_in_full_when_a_member_has_no_batch(reduce: Any) -> None:
    """Gradients of 1: three steps by -1 (by -g for sums), although rank 1 leaves after the first."""

    def body(comm: Any) -> float:
        method = hpccomm.hybrid(
            comm, lambda group: hpccomm.feedback(hpccomm.none(), group, reduce=reduce), scale(-1.0), 2, period=9
        )
        weights = np.zeros(3, F32)
        state = method.init(weights)
        for _ in range(1 if comm.rank % 2 else 3):
            step, state = method.update(np.ones(3, F32), state, weights)
            weights += step
        step, state = method.finish(state, weights)
        return float((weights + step)[0])

    for size in (2, 4):
        assert run_on_ranks(size, body) == [-3.0 * (2 if reduce == "sum" else 1)] * size


# A state is consumed; a snapshot is not


@pytest.mark.parametrize("residual", ["keep", "flush", "zero"])
def test_an_abandoned_block_of_the_hybrid_returns_to_its_residuals(residual: Any) -> None:
    """A dense step of infinity inside a block: all that the block did is undone, the residuals too."""

    def body(comm: Any) -> None:
        burst = [0]
        wild = Transform(
            lambda weights: (), lambda g, s, w: (g * F32(np.inf) if burst[0] == 3 and comm.rank == 0 else g, s)
        )
        descent = chain(wild, scale(-1.0))
        method = hpccomm.hybrid(comm, lambda group: hpccomm.gtc(group, 4.0), descent, 2, period=2, residual=residual)
        weights = np.zeros(3, F32)
        state = method.init(weights)
        for number in range(4):
            burst[0] = number
            if number == 2:
                kept = snapshot(state)
            with np.errstate(invalid="ignore"):
                step, state = method.update(F32([1, 2, 3]) * (number + 1 + comm.rank), state, weights)
            weights = weights + step
        assert state.abandoned == 1
        for (path, left), (_, right) in zip(leaves(state.inner), leaves(kept.inner), strict=True):
            assert np.array_equal(left, right) or path.endswith("spare"), path

    run_on_ranks(4, body)


def test_what_is_scaled_is_declared_by_the_type() -> None:
    """An exchange whose residual has another name, and a dense state whose name is that of a residual."""

    def body(comm: Any) -> None:
        method = chain(hpccomm.gtc(comm, 8.0), hpccomm.bmuf(comm, momentum(0.5), 1, momentum=0.5))
        weights = np.zeros(2, F32)
        _, state = method.update(np.full(2, 3, F32), method.init(weights), weights)
        scaled = scale_unsent(state, 0.5)
        changed = {path for (path, a), (_, b) in zip(leaves(state), leaves(scaled), strict=True) if np.any(a != b)}
        assert changed == {"0.residual"}

    run_on_ranks(2, body)


# Other numbers of ranks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 2), (3, 1), (1, 4)])
def test_another_number_of_ranks_flushes_the_same(name: str, old: int, new: int) -> None:
    bucket = Bucket({"w": (16, 16), "bias": (3,)})

    def first(comm: Any) -> Any:
        method, weights = exchanges(bucket)[name](comm), np.zeros(bucket.size, F32)
        state = method.init(weights)
        for number in range(3):
            draw = np.random.default_rng([number, comm.rank]).integers(-8, 8, bucket.size)
            _, state = method.update(draw.astype(F32), state, weights)
        return snapshot(state), flush(method, state, weights)[0]

    found = run_on_ranks(old, first)

    def then(comm: Any) -> Any:
        method = exchanges(bucket)[name](comm)
        state = for_ranks([each[0] for each in found], comm.rank, comm.size)
        return flush(method, state, np.zeros(bucket.size, F32))[0]

    for step in run_on_ranks(new, then):
        np.testing.assert_allclose(step, found[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_hybrid_keeps_its_filter_and_its_pending_update(reduce: Any) -> None:
    """Two groups of two become three: Δ and W are untouched, every group owes the mean of what the groups owed."""

    def method(comm: Any) -> Any:
        return hpccomm.hybrid(
            comm, lambda group: hpccomm.gtc(group, 4.0, reduce=reduce), momentum(0.5), 2, period=2, momentum=0.5
        )

    def first(comm: Any) -> Any:
        made, weights = method(comm), np.zeros(3, F32)
        state = made.init(weights)
        for number in range(4):
            step, state = made.update(F32([1, 2, 3]) * (number + 1 + comm.rank), state, weights)
            weights = weights - 0.1 * step
        return state

    states = run_on_ranks(4, first)
    owed = sum(each.inner[0].residual.astype("f8") for each in states) / 2  # a group's sum
    for rank in range(6):
        state = for_ranks(states, rank, 6)
        assert np.array_equal(state.outer[-1].velocity, states[0].outer[-1].velocity)
        assert np.array_equal(state.outer[-1].model, states[0].outer[-1].model)
        np.testing.assert_allclose(2 * state.inner[0].residual, owed, rtol=1e-6)


def test_inside_a_block_the_number_of_ranks_stays() -> None:
    def body(comm: Any) -> Any:
        method, weights = hpccomm.bmuf(comm, STEP, 4), np.zeros(3)
        return method.update(np.ones(3), method.init(weights), weights)[1]

    states = run_on_ranks(2, body)
    with pytest.raises(ArgumentError, match=r"rank 0 saved 1 step into a block \(steps\)"):
        for_ranks(states, 0, 3)


def test_a_sharded_filter_is_divided_anew() -> None:
    def body(comm: Any) -> Any:
        method, weights = hpccomm.bmuf(comm, STEP, 1, momentum=0.5, shard_state=True), np.zeros(7)
        return method.update(np.arange(7.0), method.init(weights), weights)[1]

    states = run_on_ranks(3, body)
    whole = np.concatenate([each.outer.filter_state.velocity for each in states])
    again = [for_ranks(states, rank, 2) for rank in range(2)]
    assert [each.outer.filter_state.velocity.size for each in again] == [4, 3]
    assert np.array_equal(np.concatenate([each.outer.filter_state.velocity for each in again]), whole)


# DGC: a dense step applies what sparse ones left, whichever phase comes first


@pytest.mark.parametrize("stages", [(0.02,), (0.02, 1.0), (1.0, 0.02), (0.02, 1.0, 0.02)])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_phases_of_dgc_lose_nothing_and_ranks_step_alike(stages: Any, nesterov: bool, size: int) -> None:
    """Without masking, all steps and what is flushed are those of momentum SGD, whose momentum is the ranks' mean."""
    bucket = Bucket({"w": (10, 10), "bias": (3,)})

    def body(comm: Any) -> bytes:
        how = {"momentum": 0.5, "nesterov": nesterov, "smallest": 1, "mask": False}
        method = hpccomm.dgc(comm, bucket, 0.02, warmup=6, stages=stages, **how)
        dense = hpccomm.dgc(comm, bucket, 1.0, **how)
        weights = np.zeros(bucket.size, F32)
        state, whole, total, wanted = method.init(weights), dense.init(weights), weights.astype("f8"), 0.0
        for number in range(9):
            gradient = np.random.default_rng([number, comm.rank]).normal(size=bucket.size).astype(F32)
            step, state = method.update(gradient.copy(), state, weights)
            total += step
            step, whole = dense.update(gradient, whole, weights)
            wanted = wanted + step.astype("f8")
        step, state = flush(method, state, weights)
        np.testing.assert_allclose(total + step, wanted, atol=1e-4)
        return (total + step).tobytes()

    assert len(set(run_on_ranks(size, body))) == 1


# The rest of the kind


@pytest.mark.parametrize("schedule", [lambda t: 0.5, lambda t: 0.5 / (t + 1), lambda t: 0.0])
def test_ef_signsgd_takes_a_schedule(schedule: Any) -> None:
    def body(comm: Any) -> None:
        method, weights = hpccomm.ef_signsgd(comm, schedule), np.zeros(5, F32)
        state = method.init(weights)
        for number in range(3):
            step, state = method.update(np.full(5, 2, F32), state, weights)
            np.testing.assert_allclose(step, -2 * schedule(number), rtol=1e-6)

    run_on_ranks(2, body)


@pytest.mark.parametrize("warmup", [0, 3])
def test_slow_momentum_of_a_rate_that_begins_at_zero(warmup: int) -> None:
    """γ = 0 in the first block, 0, 0.5 in the second: nothing moves, then the block moves by its own steps."""

    def rate(t: int) -> float:
        return 0.0 if t < warmup + 3 else 0.5

    def body(comm: Any) -> None:
        method = hpccomm.slowmo(comm, descend(rate), rate, 2, warmup=warmup)
        weights, seen = np.zeros(2), []
        state = method.init(weights)
        for _ in range(warmup + 6):
            step, state = method.update(np.ones(2), state, weights)
            weights += step
            seen.append(weights.tolist())
        assert seen[warmup + 1] == [0, 0]
        assert seen[warmup + 3] == [-0.5, -0.5]
        assert seen[warmup + 5] == [-1.75, -1.75]  # u = 0.5 · 1 + 2, times 0.5

    run_on_ranks(2, body)


RATES: dict[str, Callable[[Any, Any], Any]] = {
    "descend": lambda comm, lr: descend(lr),
    "synchronous_sgd": hpccomm.synchronous_sgd,
    "synchronous_adam": hpccomm.synchronous_adam,
    "lars": lambda comm, lr: hpccomm.lars(BUCKET, lr),
    "lamb": lambda comm, lr: hpccomm.lamb(BUCKET, lr),
    "ef_signsgd": hpccomm.ef_signsgd,
    "onebit_adam": lambda comm, lr: hpccomm.onebit_adam(comm, lr, 1),
    "onebit_lamb": lambda comm, lr: hpccomm.onebit_lamb(comm, BUCKET, lr, 1),
    "bmuf_adam": hpccomm.bmuf_adam,
    "slowmo": lambda comm, lr: hpccomm.slowmo(comm, STEP, lr),
    "diloco": lambda comm, lr: hpccomm.diloco(comm, STEP, lr=lr),
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("lr", [-0.1, "0.1", None])
def test_a_rate_is_a_positive_number_or_a_schedule(name: str, lr: Any) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=r"positive rate|pass a number"):
            RATES[name](comm, lr)
        RATES[name](comm, 0.1)
        RATES[name](comm, lambda t: 0.1)

    run_on_ranks(1, body)


@pytest.mark.parametrize("freeze", [0, -1])
def test_onebit_methods_need_a_variance_before_they_freeze_it(freeze: int) -> None:
    def body(comm: Any) -> None:
        for make in (
            lambda: hpccomm.onebit_adam(comm, 0.1, freeze),
            lambda: hpccomm.onebit_lamb(comm, BUCKET, 0.1, freeze),
        ):
            with pytest.raises(ArgumentError, match="a whole number, 1 or more"):
                make()

    run_on_ranks(1, body)


# Sums that exceed float32: all ranks skip, nothing changes


@pytest.mark.parametrize("name", ["gtc", "topk", "momentum", "Nesterov", "onebit", "qsgd", "cast", "dgc", "powersgd"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_backlog_that_overflows_on_one_rank_is_skipped_on_all(name: str, size: int) -> None:
    bucket = Bucket({"w": (16, 16)})
    make: dict[str, Callable[[Any], Any]] = {
        "gtc": lambda comm: hpccomm.gtc(comm, 1.0),
        "topk": lambda comm: hpccomm.feedback(hpccomm.topk(0.01), comm),
        "momentum": lambda comm: hpccomm.feedback(hpccomm.topk(0.01), comm, 0.9),
        "Nesterov": lambda comm: hpccomm.feedback(hpccomm.topk(0.01), comm, 0.9, nesterov=True),
        "onebit": hpccomm.onebit_sgd,
        "qsgd": lambda comm: hpccomm.feedback(hpccomm.qsgd(bucket=16), comm),
        "cast": lambda comm: hpccomm.feedback(hpccomm.cast("uint8"), comm),
        "dgc": lambda comm: hpccomm.dgc(comm, bucket, 0.01, smallest=1),
        "powersgd": lambda comm: hpccomm.powersgd(comm, bucket, 1),
    }

    def body(comm: Any) -> None:
        method, weights = make[name](comm), np.zeros(bucket.size, F32)
        huge = np.full(bucket.size, 3e38 if comm.rank == size - 1 else 1, F32)
        huge[::2] *= -1
        with np.errstate(over="ignore", invalid="ignore"):
            state, skipped = method.init(weights), 0
            for _ in range(6):
                step, state = method.update(huge.copy(), state, weights)
                now = hpccomm.report(state).messages.skipped
                if now > skipped:
                    assert not step.any()
                skipped = now
            for each in unsent_leaves(state):
                assert np.isfinite(each).all()
        if name not in ("onebit", "qsgd", "cast"):
            assert skipped > 0

    run_on_ranks(size, body)


ALONE: dict[str, Callable[[Any], Any]] = {
    "local_sgd": lambda comm: hpccomm.local_sgd(comm, hpccomm.scale(-0.5), 2),
    "post_local_sgd": lambda comm: hpccomm.post_local_sgd(comm, hpccomm.scale(-0.5), 2, 2),
    "bmuf": lambda comm: hpccomm.bmuf(comm, hpccomm.scale(-0.5), 2),
    "bmuf paper": lambda comm: hpccomm.bmuf(comm, hpccomm.scale(-0.5), 2, nesterov="paper"),
    "bmuf lookahead": lambda comm: hpccomm.bmuf(comm, hpccomm.scale(-0.5), 2, nesterov="lookahead"),
    "bmuf sharded": lambda comm: hpccomm.bmuf(comm, hpccomm.scale(-0.5), 2, shard_state=True),
    "bmuf warm-up": lambda comm: hpccomm.bmuf(comm, hpccomm.scale(-0.5), 2, warmup=2),
    "slowmo": lambda comm: hpccomm.slowmo(comm, hpccomm.scale(-0.5), 0.5, 2),
    "diloco": lambda comm: hpccomm.diloco(comm, hpccomm.scale(-0.5), 2),
}


@pytest.mark.parametrize("name", ALONE)
def test_ranks_that_join_a_single_one_go_on_from_its_model(name: str) -> None:
    """A block without gradients does not move it: a rank alone has no filter, and leaves none that is out of date."""

    def first(comm: Any) -> Any:
        method, weights = ALONE[name](comm), np.ones(7)
        state = method.init(weights)
        for _ in range(4):
            step, state = method.update(np.ones(7), state, weights)
            weights = weights + step
        return weights, state

    def then(comm: Any) -> Any:
        method, state, moved = ALONE[name](comm), hpccomm.for_ranks([alone], comm.rank, comm.size), weights
        for _ in range(4):
            step, state = method.update(np.zeros(7), state, moved)
            moved = moved + step
        return moved.tolist()

    ((weights, alone),) = run_on_ranks(1, first)
    assert weights.tolist() == [-1.0] * 7
    assert run_on_ranks(3, then) == [weights.tolist()] * 3


@pytest.mark.parametrize("dtype", ["f2", "bfloat16"])
@pytest.mark.parametrize(("old", "new"), [(2, 3), (4, 2), (1, 4), (3, 1)])
def test_the_mean_of_16_bit_floats_goes_on_with_other_ranks(dtype: str, old: int, new: int) -> None:
    """Its buffer has a length that depends on the number of ranks."""
    pytest.importorskip("ml_dtypes")

    def first(comm: Any) -> Any:
        method, vector = hpccomm.mean(comm), np.ones(5, dtype)
        return method.update(vector, method.init(vector), vector)[1]

    def then(comm: Any) -> Any:
        method, vector = hpccomm.mean(comm), np.full(5, 1 + comm.rank, dtype)
        state = hpccomm.for_ranks(states, comm.rank, comm.size)
        return [method.update(vector, state, vector)[0].astype(float).tolist() for _ in range(2)]

    states = run_on_ranks(old, first)
    assert run_on_ranks(new, then) == [[[(1 + new) / 2] * 5] * 2] * new


# Blocks on other numbers of ranks


COUNTED: dict[str, Callable[[Any, Callable[[int], float]], Any]] = {
    "slowmo": lambda comm, lr: hpccomm.slowmo(comm, STEP, lr, 2, warmup=2),
    "diloco": lambda comm, lr: hpccomm.diloco(comm, STEP, 2, lr=lr),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("sizes", [(2, 1, 2), (1, 2, 1, 3), (3, 1)], ids=str)
def test_schedules_of_blocks_go_on_whatever_the_number_of_ranks(name: str, sizes: tuple[int, ...]) -> None:
    """Three blocks on each number of ranks: the schedule is asked for the blocks in order, none twice."""
    states: list[Any] = []
    weights, steps = np.full(3, 8.0), 2 if name == "slowmo" else 0
    for part, size in enumerate(sizes):

        def body(comm: Any, first: bool = part == 0) -> Any:
            asked: set[int] = set()

            def rate(count: int) -> float:
                asked.add(count)
                return 0.5

            method, vector = COUNTED[name](comm, rate), weights.copy()
            state = method.init(vector) if first else for_ranks(states, comm.rank, comm.size)
            for _ in range(6 + (2 if first and name == "slowmo" else 0)):
                step, state = method.update(vector - comm.rank, state, vector)
                vector = vector + step
            return state, vector, asked

        found = run_on_ranks(size, body)
        states, weights = [each[0] for each in found], found[0][1]
        if size > 1:
            blocks = range(3 * part, 3 * part + 3)
            if name == "diloco":
                assert found[0][2] == set(blocks)
            else:  # of each block its first step, counted from the warm-up's end
                assert found[0][2] == {steps + 2 * block for block in blocks}
    assert np.isfinite(weights).all()


def test_weights_by_samples_count_those_of_the_block_after_a_single_rank() -> None:
    """A running total of samples: what one rank alone has seen does not weigh in the first block of two."""

    def body(comm: Any) -> float:
        seen, method = [0.0], None
        for size in (1, comm.size):
            part = comm.Split(comm.rank if size == 1 else 0, comm.rank)
            method = hpccomm.bmuf(part, STEP, 1, momentum=0.0, weight_by=lambda: seen[0])
            if size == 1:
                state = method.init(np.zeros(1))
            for _ in range(4 - size):
                seen[0] += 100.0 if size == 1 and comm.rank else 1.0
                step, state = method.update(np.ones(1) * (comm.rank if size > 1 else 0), state, np.zeros(1))
        return float(step[0])

    assert run_on_ranks(2, body) == [-0.15, -0.15]
