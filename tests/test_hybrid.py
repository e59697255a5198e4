"""Compressed exchange inside groups, blocks between them: the golden run, identities, policies and uneven groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import none, ternary, topk
from hpccomm.algorithms.blockwise_filtering import bmuf
from hpccomm.algorithms.error_feedback import feedback
from hpccomm.algorithms.exchange import check_replicas, mean
from hpccomm.algorithms.local_steps import PeriodicTransform
from hpccomm.algorithms.reports import report
from hpccomm.algorithms.states import Unsent
from hpccomm.algorithms.threshold_compression import gtc
from hpccomm.algorithms.transforms import ResidualTransform, Transform, chain, momentum, scale
from hpccomm.algorithms.two_tier import hybrid, residual_norm
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.testing.ranks import run_on_ranks

Vector = Any
CENTRES = (
    np.array([[11, -3, 23, -17, 25, -9], [17, -1, -25, 17, -3, 25], [5, 3, -3, -27, 13, 3], [29, -3, -15, 3, -15, 7]])
    / 16
)


class SlowState(NamedTuple):
    """The state of the slow exchange below."""

    residual: Unsent
    sent: int


def slow_gtc(theta: float) -> Callable[[Any], Transform]:
    """Threshold compression as its paper says it, dense on the wire: ±θ where the backlog lies beyond, summed."""

    def exchange(group: Any) -> Transform:
        def update(gradient: Vector, state: SlowState, weights: Vector) -> tuple[Vector, SlowState]:
            backlog = state.residual + gradient
            quanta = theta * (np.sign(backlog) * (np.abs(backlog) > theta)).astype(weights.dtype)
            everyone = np.empty((group.size, weights.size), weights.dtype)
            group.Allgather(quanta, everyone)
            total = everyone[0].copy()
            for each in everyone[1:]:
                total += each
            return total, SlowState(backlog - quanta, state.sent + int(np.count_nonzero(quanta)))

        def flush(state: SlowState) -> tuple[Vector, SlowState]:
            total = np.empty_like(state.residual)
            group.Allreduce(state.residual, total)
            return total, state._replace(residual=np.zeros_like(total))

        return ResidualTransform.of(lambda weights: SlowState(np.zeros_like(weights), 0), update, flush, None)

    return exchange


def run(
    method: PeriodicTransform, comm: Any, steps: int, centres: Vector = CENTRES, dtype: str = "f8"
) -> tuple[list[Vector], Any]:
    """Minimise ½‖w − c_r‖²; the weights after each step, and the last state."""
    centre = centres[comm.rank].astype(dtype)
    weights, seen = np.zeros(centre.size, dtype), []
    state = method.init(weights)
    for _ in range(steps):
        step, state = method.update(weights - centre, state, weights)
        weights += step
        seen.append(weights.copy())
    return seen, state


def centres_of(size: int, n: int = 37) -> Vector:
    return np.random.default_rng(size).standard_normal((size, n)) * 4


# The golden run: four workers in two groups, θ = 1, rate ¼, sums, τ = 2, η = ½, ζ = 1


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize(
    ("exchange", "dtype"),
    [(slow_gtc(1.0), "f4"), (slow_gtc(1.0), "f8"), (lambda group: gtc(group, 1.0, reduce="sum"), "f4")],
    ids=["slow f4", "slow f8", "gtc"],
)
def test_golden_run(sliced: bool, exchange: Any, dtype: str) -> None:
    def body(comm: Any) -> Any:
        method = hybrid(comm, exchange, scale(-0.25), 2, period=2, sliced_leaders=sliced)
        seen, state = run(method, comm, 4, dtype=dtype)
        return [each.tolist() for each in seen], state.inner[0].residual.tolist(), method.export(state).tolist()

    sync1 = [0.5, 0, -0.125, -0.25, 0.25, 0.125]
    final = [1.125, 0, -0.4375, -0.375, 0.375, 0.4375]
    steps = {
        0: [[0.25, 0, 0, 0, 0.25, 0.25], sync1, [0.75, 0, -0.125, 0, 0.25, 0.125], final],
        1: [[0.25, 0, 0, -0.25, 0, 0], sync1, [0.75, 0, -0.375, -0.25, 0.25, 0.375], final],
    }
    residuals = [
        [-0.25, 0.75, -2, 1, -1.5, 0.75],
        [-0.75, 0.25, 2, -0.5, 0.5, -1.75],
        [0.25, -0.75, 0.25, 2, -0.75, -0.25],
        [-1.75, 0.75, 0.25, -0.5, 1.25, -0.25],
    ]
    for rank, (seen, residual, model) in enumerate(run_on_ranks(4, body)):
        assert seen == steps[rank // 2]
        assert residual == residuals[rank]
        assert model == final


def test_golden_elements_sent() -> None:
    def body(comm: Any) -> list[int]:
        method = hybrid(comm, slow_gtc(1.0), scale(-0.25), 2, period=2)
        weights, before, counts = np.zeros(6), 0, []
        state = method.init(weights)
        for _ in range(4):
            step, state = method.update(weights - CENTRES[comm.rank], state, weights)
            weights += step
            counts.append(state.inner[0].sent - before)
            before = state.inner[0].sent
        return counts

    sent = np.array(run_on_ranks(4, body)).T
    assert sent.tolist() == [[3, 4, 1, 1], [5, 3, 2, 3], [3, 5, 2, 5], [3, 3, 1, 3]]


def test_golden_nesterov() -> None:
    def body(comm: Any) -> list[float]:
        method = hybrid(comm, slow_gtc(1.0), scale(-0.25), 2, period=2, nesterov="paper")
        return list(run(method, comm, 4)[0][-1].tolist())

    assert run_on_ranks(4, body) == [[1.4375, 0, -0.59375, -0.4375, 0.4375, 0.59375]] * 4


# Identities


@pytest.mark.parametrize("size", [1, 3, 4])
def test_groups_of_one_are_bmuf(size: int) -> None:
    def body(comm: Any) -> bool:
        centres = centres_of(size)
        ours = run(hybrid(comm, slow_gtc(0.5), scale(-0.25), 1, period=3), comm, 7, centres)[0]
        inner = chain(slow_gtc(0.5)(comm.Split(comm.rank)), scale(-0.25))
        return np.array_equal(ours, run(bmuf(comm, inner, 3), comm, 7, centres)[0])

    assert all(run_on_ranks(size, body))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_one_group_is_its_exchange(size: int) -> None:
    def body(comm: Any) -> bool:
        centres = centres_of(size)
        ours = run(hybrid(comm, slow_gtc(0.5), scale(-0.25), size, period=2, momentum=0), comm, 7, centres)[0]
        plain = chain(slow_gtc(0.5)(comm), scale(-0.25))
        weights, seen = np.zeros(37), []
        state = plain.init(weights)
        for _ in range(7):
            step, state = plain.update(weights - centres[comm.rank], state, weights)
            weights += step
            seen.append(weights.copy())
        return np.array_equal(ours, seen)

    assert all(run_on_ranks(size, body))


def test_a_compressor_of_all_elements_is_a_dense_exchange() -> None:
    def body(comm: Any) -> bool:
        everything = hybrid(comm, lambda group: feedback(none(), group), scale(-0.25), 2, period=3)
        dense = hybrid(comm, mean, scale(-0.25), 2, period=3)
        one, other = (run(method, comm, 7, dtype="f4")[0] for method in (everything, dense))
        return all(np.array_equal(*pair) for pair in zip(one, other, strict=True))

    assert all(run_on_ranks(4, body))


def test_a_threshold_near_zero_sends_signs() -> None:
    """Not dense descent: τ times the votes of the ranks, wherever a gradient is not zero."""
    tau, gradients = 2.0**-20, np.array([[1, -2, 0, 0.5], [3, 2, 0, -0.25], [-1, -7, 0, 9]], "f4")

    def body(comm: Any) -> list[float]:
        exchange = gtc(comm, tau, reduce="sum")
        weights = np.zeros(4, "f4")
        return list((exchange.update(gradients[comm.rank], exchange.init(weights), weights)[0] / tau).tolist())

    assert run_on_ranks(3, body) == [[1, -1, 0, 1]] * 3


def test_dense_groups_with_one_step_blocks_average_the_group_models() -> None:
    """τ = 1, η = 0: the same as the mean gradient of all, on numbers that need no rounding."""
    centres = np.arange(24.0).reshape(4, 6) * 8

    def body(comm: Any) -> bool:
        ours = run(hybrid(comm, mean, scale(-0.5), 2, period=1, momentum=0), comm, 4, centres)[0]
        weights = np.zeros(6)
        for each in ours:
            weights = weights - 0.5 * (weights - centres.mean(axis=0))
            if not np.array_equal(each, weights):
                return False
        return True

    assert all(run_on_ranks(4, body))


def test_momentum_follows_the_number_of_groups() -> None:
    def body(comm: Any) -> list[bool]:
        left_out = run(hybrid(comm, slow_gtc(1.0), scale(-0.25), 2, period=1), comm, 4, centres_of(6))[0]
        return [
            np.array_equal(
                left_out,
                run(hybrid(comm, slow_gtc(1.0), scale(-0.25), 2, period=1, momentum=eta), comm, 4, centres_of(6))[0],
            )
            for eta in (1 - 1 / 3, 1 - 1 / 6)
        ]

    assert run_on_ranks(6, body) == [[True, False]] * 6


@pytest.mark.parametrize(("size", "group"), [(4, 2), (6, 3), (6, 2), (8, 4)])
def test_slices_and_one_leader_give_the_same_bits(size: int, group: int) -> None:
    def body(comm: Any) -> bool:
        ours, theirs = (
            run(
                hybrid(comm, slow_gtc(0.5), scale(-0.25), group, period=2, sliced_leaders=sliced),
                comm,
                6,
                centres_of(size),
            )[0]
            for sliced in (True, False)
        )
        return np.array_equal(ours, theirs)

    assert all(run_on_ranks(size, body))


def test_the_residual_of_a_group_is_its_difference_from_dense_descent() -> None:
    """For recorded gradients, after every step: W_dense = W − lr · Σ residuals; quarters need no rounding."""
    gradients = np.random.default_rng(0).integers(-9, 10, (12, 3, 20)) / 4

    def body(comm: Any) -> None:
        method = hybrid(comm, slow_gtc(1.0), scale(-0.25), 3, period=5)
        weights, dense = np.zeros(20), np.zeros(20)
        state = method.init(weights)
        for each in gradients:
            step, state = method.update(each[comm.rank], state, weights)
            weights += step
            dense -= 0.25 * each.sum(axis=0)
            pending = np.empty(20)
            comm.Allreduce(state.inner[0].residual, pending)
            assert np.array_equal(dense, weights - 0.25 * pending)
            assert pending.any()

    run_on_ranks(3, body)


def test_exchanges_inside_groups_are_counted_once() -> None:
    def body(comm: Any) -> None:
        method = hybrid(comm, lambda group: gtc(group, 0.5), scale(-0.25), 2, period=3)
        weights = np.zeros(8, "f4")
        state = method.init(weights)
        for step in range(7):
            change, state = method.update(np.full(8, step, "f4"), state, weights)
            weights += change
        assert report(state.inner).cost.exchanges == 7
        outside = state._replace(inner=())
        assert report(state).cost.exchanges == 7 + report(outside).cost.exchanges
        assert (
            report(outside).cost.exchanges == 7 + 2 * 2
        )  # who has a batch; at a block's end who has moved, and how far

    run_on_ranks(4, body)


# What holds after every step


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 1, 1], [0, 1, 1, 2, 2, 2, 2], [0, 0, 0]])
@pytest.mark.parametrize("policy", ["keep", "flush", "zero", ("decay", 0.5)])
def test_groups_are_nodes_and_replicas_stay_equal(nodes: list[int], policy: Any) -> None:
    def body(comm: Any) -> None:
        group = comm.intra_node
        method = hybrid(comm, slow_gtc(0.5), chain(momentum(0.5), scale(-0.1)), period=3, residual=policy, check=True)
        weights, centre = np.zeros(37), centres_of(len(nodes))[comm.rank]
        state = method.init(weights)
        for _ in range(10):
            step, state = method.update(weights - centre, state, weights)
            weights += step
            check_replicas(group, weights)
            if state.steps == 0 and group.size < comm.size:
                check_replicas(comm, weights)
                check_replicas(comm, method.export(state))

    run_on_ranks(len(nodes), body, nodes=nodes)


def test_uneven_groups_are_weighted_by_their_ranks() -> None:
    """Groups of three and one move by 1 and by 9: (3·1 + 9) / 4."""

    def body(comm: Any) -> float:
        method = hybrid(comm, mean, scale(1.0), period=1, momentum=0)
        weights = np.zeros(1)
        step, _ = method.update(np.array([[1.0, 1.0, 1.0, 9.0][comm.rank]]), method.init(weights), weights)
        return float((weights + step)[0])

    assert run_on_ranks(4, body, nodes=[0, 0, 0, 1]) == [3.0] * 4


GROUP_EXCHANGES: dict[str, Callable[[Any], Transform]] = {
    "mean": mean,
    "topk": lambda group: feedback(topk(0.5), group),
    "topk, sums": lambda group: feedback(topk(0.5), group, reduce="sum"),
    "ternary": lambda group: feedback(ternary(), group),
    "gtc": lambda group: gtc(group, tau=0.1),
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, "f4") for name in GROUP_EXCHANGES), ("mean", "f2")])
@pytest.mark.parametrize(("steps", "bad"), [(7, None), (4, 2), (2, None), (0, None)])
def test_groups_of_different_sizes_leave_the_warm_up_with_one_model(
    name: str, dtype: str, steps: int, bad: int | None
) -> None:
    """Also where the last synchronous step is skipped, and where the run ends before it."""

    def body(comm: Any) -> tuple[bytes, bytes]:
        rng = np.random.default_rng(comm.rank)
        method = hybrid(comm, GROUP_EXCHANGES[name], scale(-0.1), None, period=2, warmup=3, check=True)
        weights = np.zeros(6, dtype)
        state = method.init(weights)
        for number in range(steps):
            gradient = rng.normal(size=6).astype(dtype)
            gradient[0] = np.nan if number == bad and comm.rank == 1 else gradient[0]
            step, state = method.update(gradient, state, weights)
            weights += step
        step, state = method.finish(state, weights)
        assert np.isfinite(weights + step).all()
        return method.export(state).tobytes(), (weights + step).tobytes()

    assert len(set(run_on_ranks(5, body, nodes=[0, 0, 1, 1, 1]))) == 1


@pytest.mark.parametrize("batches", [[3, 3, 3, 3], [5, 2, 0, 0], [0, 0, 4, 1], [1, 7, 2, 3]])
def test_ranks_with_different_numbers_of_batches_end_with_the_same_model(batches: list[int]) -> None:
    def body(comm: Any) -> bytes:
        method = hybrid(comm, slow_gtc(0.5), scale(-0.25), 2, period=3)
        weights, centre = np.zeros(37), centres_of(4)[comm.rank]
        state = method.init(weights)
        for _ in range(batches[comm.rank]):
            step, state = method.update(weights - centre, state, weights)
            weights += step
        step, state = method.finish(state, weights)
        weights += step
        assert weights.any()
        return bytes(weights.tobytes())

    assert len(set(run_on_ranks(4, body, patience=20))) == 1


# Residuals when a block ends


def test_residuals_are_kept_flushed_zeroed_or_decayed() -> None:
    def body(comm: Any, policy: Any) -> list[float]:
        method = hybrid(comm, slow_gtc(4.0), scale(-0.25), 2, period=1, residual=policy)
        weights = np.zeros(2)
        step, state = method.update(np.array([1.0, -2]) * (comm.rank + 1), method.init(weights), weights)
        assert residual_norm(state) == np.linalg.norm(state.inner[0].residual)
        return [*state.inner[0].residual.tolist(), *(weights + step).tolist()]

    kept = [[1.0, -2, 0, 1], [2, -4, 0, 1], [3, -2, 0, 1], [4, -4, 0, 1]]
    assert run_on_ranks(4, lambda comm: body(comm, "keep")) == kept
    assert run_on_ranks(4, lambda comm: body(comm, "zero")) == [[0, 0, *row[2:]] for row in kept]
    assert run_on_ranks(4, lambda comm: body(comm, ("decay", 0.5))) == [
        [row[0] / 2, row[1] / 2, *row[2:]] for row in kept
    ]
    # all gradients arrive: groups move by -¼ of (3, -6) and (7, -14), the mean is -(1.25, -2.5)
    assert run_on_ranks(4, lambda comm: body(comm, "flush")) == [[0, 0, -1.25, 2.5]] * 4


def test_with_flush_every_block_is_a_dense_one_for_a_constant_gradient() -> None:
    """What was not sent is added before the block is measured, so a block moves by all of its gradients."""

    def body(comm: Any, exchange: Any, **options: Any) -> list[Any]:
        method = hybrid(comm, exchange, scale(-0.25), 2, period=3, **options)
        weights, seen = np.zeros(2), []
        state = method.init(weights)
        for _ in range(6):
            step, state = method.update(np.array([3.0, -5]) * (comm.rank + 1), state, weights)
            weights += step
            seen.append(weights.tolist())
        return seen[2::3]

    def dense(group: Any) -> Transform:
        return chain(mean(group), scale(group.size))

    flushed = run_on_ranks(4, lambda comm: body(comm, slow_gtc(4.0), residual="flush"))
    assert flushed == run_on_ranks(4, lambda comm: body(comm, dense))


# Cost


def test_slices_send_less_through_a_leaders_link() -> None:
    """n = 120 float64, groups of 2: a slice is 60; 40 bytes to all others and 8 to the group to agree."""

    def body(comm: Any, sliced: bool) -> int:
        method = hybrid(comm, lambda group: scale(1.0), scale(-0.25), 2, period=1, sliced_leaders=sliced)
        return report(run(method, comm, 1, np.ones((4, 120)))[1]).cost.wire_bytes - 3 * 40 - 8

    assert run_on_ranks(4, lambda comm: body(comm, True)) == [60 * 8 + 60 * 8] * 4
    assert run_on_ranks(4, lambda comm: body(comm, False)) == [120 * 8 + 120 * 8, 0] * 2


# A gradient that is not finite


def run_with_nan(comm: Any, exchange: Any) -> tuple[Vector, int, Vector]:
    """Rank 1 of two groups of two computes a NaN in the fourth of eight steps; blocks of two."""
    method = hybrid(comm, exchange, scale(-0.25), 2, period=2)
    weights = np.zeros(6, "f4")
    state = method.init(weights)
    for number in range(8):
        gradient = weights - np.float32(comm.rank + 1)
        if comm.rank == 1 and number == 3:
            gradient[2] = np.nan
        step, state = method.update(gradient, state, weights)
        weights += step
        if number == 1:
            model = weights.copy()
        if number == 3:
            back = np.array_equal(weights, model)
    check_replicas(comm, weights)
    assert np.isfinite(weights).all()
    return weights, state.abandoned, np.array(back)


def test_a_nan_in_one_rank_abandons_the_block_in_all_groups() -> None:
    for _, abandoned, back in run_on_ranks(4, lambda comm: run_with_nan(comm, mean)):
        assert (abandoned, bool(back)) == (1, True)


def test_a_compressed_exchange_skips_a_nan_before_it_reaches_a_model() -> None:
    for _, abandoned, back in run_on_ranks(4, lambda comm: run_with_nan(comm, lambda group: gtc(group, 0.5))):
        assert (abandoned, bool(back)) == (0, False)


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda comm: hybrid(comm, mean, scale(1.0), 3), "group_size 3 does not divide 4 ranks: pass a divisor"),
        (lambda comm: hybrid(comm, mean, scale(1.0), 0), "group_size 0 does not divide"),
        (lambda comm: hybrid(comm, mean, scale(1.0), 2, period=0), "period is 0"),
        (lambda comm: hybrid(comm, mean, scale(1.0), 2, residual="drop"), "residual is 'drop': pass 'keep'"),  # type: ignore[arg-type]
        (lambda comm: hybrid(comm, mean, scale(1.0), 2, residual=("decay", 2.0)), "residual is .'decay', 2.0.: pass"),
        (lambda comm: hybrid(comm, mean, scale(1.0), 2, residual="flush"), "the exchange has no flush_state"),
        (lambda comm: hybrid(comm, mean, scale(1.0), 2, residual="zero").init(np.ones(2)), "declared as Unsent"),
    ],
)
def test_impossible_arguments_are_refused_on_every_rank(make: Callable[[Any], Any], message: str) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(ArgumentError, match=message):
            make(comm)

    run_on_ranks(4, body, nodes=[0, 0, 1, 1])


@pytest.mark.parametrize("name", ["group_size", "sliced_leaders", "period", "warmup"])
def test_ranks_that_pass_other_arguments_are_told_on_all_ranks(name: str) -> None:
    """One with another group size would wait in a communicator that the others do not share."""

    def body(comm: Any) -> None:
        values = {"group_size": (2, 1), "sliced_leaders": (True, False), "period": (4, 5), "warmup": (0, 2)}[name]
        with pytest.raises(MismatchError, match=f"hybrid: {name} is .* on rank 0, .* on rank 3: pass the same"):
            hybrid(comm, mean, scale(1.0), **{"group_size": 2, name: values[comm.rank == 3]})

    run_on_ranks(4, body)


# On MPI


@pytest.mark.mpi(sizes=(2, 4))
def test_hybrid_over_mpi(comm: MPI.Intracomm) -> None:
    import hpccomm

    ours = hpccomm.Communicator(comm)
    for sliced in (True, False):
        method = hybrid(ours, slow_gtc(0.5), scale(-0.25), comm.size // 2, period=2, sliced_leaders=sliced)
        seen, state = run(method, ours, 5, centres_of(comm.size))
        check_replicas(comm, seen[3])
        step, state = method.finish(state, seen[-1])
        check_replicas(comm, seen[-1] + step)
        check_replicas(comm, method.export(state))
