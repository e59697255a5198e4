"""GTC, DGC and the 1-bit methods: worked examples bit for bit, nothing lost, the same bits on all ranks.

The worked examples are those of the kernels: two ranks, three steps, eight elements, every number dyadic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from test_sparse import CountingProxy

import hpccomm
from hpccomm.algorithms.checkpoints import load_state_dict, state_dict
from hpccomm.algorithms.deep_gradient_compression import dgc
from hpccomm.algorithms.error_feedback import exchange_messages, feedback
from hpccomm.algorithms.exchange import synchronous_sgd
from hpccomm.algorithms.onebit import ef_signsgd, onebit_adam, onebit_lamb, onebit_sgd
from hpccomm.algorithms.power_sgd import powersgd
from hpccomm.algorithms.reports import report
from hpccomm.algorithms.states import for_ranks
from hpccomm.algorithms.threshold_compression import gtc
from hpccomm.algorithms.transforms import Transform, chain, scale
from hpccomm.buckets import Bucket
from hpccomm.collectives.compressed.messages import MessageGather
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks

F32 = np.float32
GRADIENTS = np.array(
    [
        [[0.5, -0.25, 0.125, 1, -0.875, 0, 0.375, -0.125], [-0.25, 0.75, 0.25, 0.5, -0.25, -0.125, 0.125, 0.375]],
        [[0.25, -0.5, 0.125, -0.25, -0.5, 0.125, 0.25, 0], [0.5, 0.125, -0.125, 0.25, 0.375, -0.625, 0, 0.25]],
        [
            [-0.125, -0.25, 0.25, 0.5, 0.25, -0.25, 0.125, -0.375],
            [0.25, 0.125, 0.375, -0.75, -0.125, 0.25, -0.5, 0.125],
        ],
    ],
    F32,
)
"""[step, rank, element]"""
MATRIX = Bucket({"w": (2, 4)})

METHODS: dict[str, Callable[[Any], Transform]] = {
    "gtc": lambda comm: gtc(comm, 0.5),
    "gtc, auto": gtc,
    "gtc, density": lambda comm: gtc(comm, density=0.05, code="rice", reduce="sum"),
    "topk": lambda comm: feedback(hpccomm.topk(0.1), comm),
    "topk, 16 bits": lambda comm: feedback(hpccomm.topk(0.1, values="fp16"), comm),
    "momentum": lambda comm: feedback(hpccomm.topk(0.1), comm, 0.5),
    "Nesterov, exact": lambda comm: feedback(hpccomm.topk(0.1, exact=True), comm, 0.5, nesterov=True),
    "threshold with momentum": lambda comm: feedback(hpccomm.threshold(1.0), comm, 0.5),
    "randomk": lambda comm: feedback(hpccomm.randomk(0.1), comm),
    "onebit": onebit_sgd,
    "ef_signsgd": lambda comm: ef_signsgd(comm, 0.1),
    "vote": lambda comm: feedback(hpccomm.sign_majority(), comm),
    "qsgd": lambda comm: feedback(hpccomm.qsgd(), comm),
    "natural": lambda comm: feedback(hpccomm.natural(), comm),
    "ternary": lambda comm: feedback(hpccomm.ternary(), comm),
    "fp16": lambda comm: feedback(hpccomm.cast("fp16"), comm),
    "int8": lambda comm: feedback(hpccomm.cast("int8"), comm),
    "powersgd": lambda comm: feedback(hpccomm.low_rank(2), comm),
    "onebit_adam": lambda comm: onebit_adam(comm, 0.01, 3),
}


def vector(text: str) -> np.ndarray:
    return np.array(text.split(), F32)


def bucket_of(n: int) -> Bucket:
    """Two tensors that are compressed and one that is not."""
    return Bucket({"a": (n // 2, 1), "bias": (n - n // 2 - n // 3,), "b": (n // 3, 1)})


def steps_of(method: Transform, comm: Any, gradients: Any, weights: np.ndarray) -> tuple[np.ndarray, Any, list[Any]]:
    """Run recorded gradients; the weights, the state and every step."""
    state, steps = method.init(weights), []
    for each in gradients:
        step, state = method.update(np.array(each), state, weights)
        weights = weights + step
        steps.append(step)
    return weights, state, steps


def long_runs(bucket: Bucket) -> dict[str, Callable[[Any], Transform]]:
    """Methods, as they are used for a long time."""
    return {
        "gtc": lambda comm: chain(gtc(comm, density=0.05), scale(-0.01)),
        "dgc": lambda comm: chain(
            dgc(comm, bucket, 0.05, warmup=40, smallest=0, nesterov=True, weight_decay=1e-3, clip=9.0), scale(-0.01)
        ),
        "onebit_sgd": lambda comm: chain(onebit_sgd(comm, bucket), scale(-0.01)),
        "ef_signsgd": lambda comm: ef_signsgd(comm, 0.01, bucket),
        "onebit_adam": lambda comm: onebit_adam(comm, 0.01, 100),
        "onebit_adam of tensors": lambda comm: onebit_adam(comm, 0.01, 100, bucket=bucket, weight_decay=0.01),
        "onebit_lamb": lambda comm: onebit_lamb(comm, bucket, 0.01, 100),
        "powersgd": lambda comm: chain(powersgd(comm, bucket, 2), scale(-0.01)),
    }


# Worked examples


def test_gtc_sends_half_quanta_of_the_worked_example() -> None:
    sums = [".5 .5 0 1 -.5 0 0 0", "0 -.5 0 0 -.5 -.5 .5 .5", ".5 0 1 0 0 0 0 -.5"]
    rest = [".125 0 0 .25 -.125 -.125 .25 0", "0 0 0 0 0 0 -.375 .25"]

    def body(comm: Any) -> None:
        for reduce in ("sum", "mean"):
            method = gtc(comm, 0.5, reduce=reduce)
            _, state, steps = steps_of(method, comm, GRADIENTS[:, comm.rank], np.zeros(8, F32))
            for step, total in zip(steps, sums, strict=True):
                assert np.array_equal(step, vector(total) / (1 if reduce == "sum" else 2))
            assert np.array_equal(state.residual, vector(rest[comm.rank]))
            assert report(state).messages[:3] == (32 + 4, 4, 0.5)  # eight elements take two bits each

    run_on_ranks(2, body)


def test_dgc_corrects_and_masks_momentum_as_in_the_worked_example() -> None:
    thetas = [
        "0 -.375 0 -.75 .4375 0 0 0",
        "-.5 .0625 0 -.75 .4375 .40625 0 -.40625",
        "-.78125 .0625 -.640625 -.75 .4375 .40625 -.578125 -.40625",
    ]
    moved = ["-.125 -.25 0 .375 0 -.1875 0 -.40625", "0 .1875 0 -.625 0 .25 -.46875 .125"]
    kept = ["-.125 -.25 0 .125 -.5 -.0625 0 -.59375", "0 .3125 0 -.375 0 .25 -.28125 .125"]

    def body(comm: Any) -> None:
        method = chain(dgc(comm, MATRIX, 0.25, momentum=0.5, smallest=0, exact=True), scale(-1))
        weights, state = np.zeros(8, F32), method.init(np.zeros(8, F32))
        for gradients, theta in zip(GRADIENTS, thetas, strict=True):
            step, state = method.update(gradients[comm.rank].copy(), state, weights)
            weights += step
            assert np.array_equal(weights, vector(theta))
        sparse = state[0].sparse
        assert np.array_equal(sparse.momentum, vector(moved[comm.rank]))
        assert np.array_equal(sparse.residual, vector(kept[comm.rank]))

    run_on_ranks(2, body)


def test_dgc_that_sends_everything_is_momentum_descent() -> None:
    theta = vector("-.84375 -.09375 -.640625 -1.1875 1.015625 .484375 -.4375 -.28125")

    def body(comm: Any) -> None:
        everything = feedback(hpccomm.topk(1.0), comm, 0.5, mask=False)
        for method in (
            chain(dgc(comm, MATRIX, 1.0, momentum=0.5, mask=False, smallest=0), scale(-1)),
            chain(everything, scale(-1)),
            synchronous_sgd(comm, 1.0, momentum=0.5),
        ):
            assert np.array_equal(steps_of(method, comm, GRADIENTS[:, comm.rank], np.zeros(8, F32))[0], theta)

    run_on_ranks(2, body)


def test_dgc_clips_each_rank_so_that_the_mean_keeps_the_norm() -> None:
    """The first rank's norm is 1.5, so with C = 1 and two ranks √2/1.5 of it is left."""

    def body(comm: Any) -> None:
        method = dgc(comm, MATRIX, 1.0, momentum=0.0, clip=1.0, smallest=0)
        _, _, (step,) = steps_of(method, comm, GRADIENTS[:1, 0], np.zeros(8, F32))
        assert np.array_equal(step, GRADIENTS[0, 0] * F32(math.sqrt(2) / 1.5))

    run_on_ranks(2, body)


def test_dgc_is_dense_while_an_allreduce_is_cheaper() -> None:
    bucket = Bucket({"w": (100, 10), "b": (10,)})

    def body(comm: Any) -> list[int]:
        method = dgc(comm, bucket, 0.001, warmup=8, smallest=100)
        state, named = method.init(np.zeros(1010, F32)), []
        for step in range(10):
            _, state = method.update(numbers(1010, step, comm.rank), state, np.zeros(1010, F32))
            named.append(report(state.sparse).messages.elements)
        assert state.report.exchanges == 10
        return named

    assert run_on_ranks(5, body)[0] == [0, 0, 63, 63, 16, 16, 4, 4, 1, 1]


def test_decay_has_a_momentum_of_its_own() -> None:
    """Without gradients: w ← m w + λ·weights for matrices, nothing for biases, whatever is compressed."""
    bucket = Bucket({"w": (2, 2), "b": (2,)})

    def body(comm: Any) -> None:
        method = dgc(comm, bucket, 0.5, momentum=0.5, weight_decay=0.25, smallest=0)
        weights, zero = np.array([4, 8, -4, 0, 4, 4], F32), np.zeros(6, F32)
        first, state = method.update(zero, method.init(weights), weights)
        second, _ = method.update(zero, state, weights)
        assert first.tolist() == [1, 2, -1, 0, 0, 0]
        assert second.tolist() == [1.5, 3, -1.5, 0, 0, 0]

    run_on_ranks(2, body)


def test_onebit_adam_of_the_worked_example() -> None:
    """m after two steps, with v = 1/4 as it was found."""
    theta = vector(
        "-.47119140625 -.06494140625 .06494140625 -.47119140625 .5634765625 .1572265625 -.5634765625 -.1572265625"
    )

    def body(comm: Any) -> None:
        method = onebit_adam(comm, 1.0, 1, b1=0.5, eps=0.0)
        weights = np.zeros(8, F32)
        state = method.init(weights)._replace(steps=1, variance=np.full(8, 0.25, F32))
        for gradients in GRADIENTS[:2]:
            step, state = method.update(gradients[comm.rank].copy(), state, weights)
            weights = weights + step
        assert np.array_equal(weights, theta)

    run_on_ranks(2, body)


# What holds for all


def numbers(n: int, step: int, rank: int) -> np.ndarray:
    return np.random.default_rng([n, step, rank]).normal(size=n).astype(F32)


@pytest.mark.parametrize("n", [0, 1, 8, 9, 300])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_dgc_steps_alike_on_any_number_of_ranks(n: int, size: int) -> None:
    def body(comm: Any) -> bytes:
        method = dgc(comm, bucket_of(n), 0.1, warmup=4, smallest=0)
        gradients = [numbers(n, step, comm.rank) if comm.rank != 1 else np.zeros(n, F32) for step in range(8)]
        return steps_of(method, comm, gradients, np.zeros(n, F32))[0].tobytes()

    assert len(set(run_on_ranks(size, body))) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 300])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_ranks_step_alike_and_count_their_bytes(name: str, n: int, size: int) -> None:
    def body(comm: Any) -> tuple[bytes, int]:
        method = METHODS[name](comm)
        gradients = [numbers(n, step, comm.rank) if comm.rank != 1 else np.zeros(n, F32) for step in range(6)]
        weights, state, _ = steps_of(method, comm, gradients, np.zeros(n, F32))
        state = state[1] if name == "ef_signsgd" else state
        assert state.report.exchanges == 6
        return weights.tobytes(), state.report.wire_bytes

    found = run_on_ranks(size, body)
    assert len({weights for weights, _ in found}) == 1
    assert (found[0][1] == 0) == (size == 1)


class VoteCountingProxy(CountingProxy):
    """Counts votes, too."""

    def Allreduce(self, mine: np.ndarray, room: np.ndarray, op: MPI.Op = MPI.SUM) -> None:
        self.sent += round(2 * mine.nbytes * (self.size - 1) / self.size)
        self.comm.Allreduce(mine, room, op)


@pytest.mark.parametrize("name", [*METHODS, *(f"long: {name}" for name in long_runs(MATRIX))])
@pytest.mark.parametrize("size", [2, 3])
def test_reported_bytes_are_those_on_the_transport(name: str, size: int) -> None:
    n = 301
    bucket = Bucket({"a": (20, 10), "bias": (5,), "b": (8, 12)})

    def body(comm: Any) -> None:
        counting = VoteCountingProxy(comm)
        method = long_runs(bucket)[name[6:]](counting) if name.startswith("long: ") else METHODS[name](counting)
        gradients = [numbers(n, step, comm.rank) for step in range(50)]
        gradients[7][3] = np.nan if comm.rank == 1 else 0
        method.init(np.ones(n, F32))
        compared, counting.sent = counting.sent, 0
        assert compared in (0, 8 * (size - 1)), "the digest of the tensors of a bucket"
        _, state, _ = steps_of(method, counting, gradients, np.ones(n, F32))
        assert report(state).cost.wire_bytes == counting.sent > 0

    run_on_ranks(size, body)


def test_reports_name_the_exchange() -> None:
    def body(comm: Any) -> None:
        bucket, weights = Bucket({"a": (10, 10), "bias": (4,)}), np.ones(104, F32)
        method, paths = dgc(comm, bucket, 0.02, warmup=4, smallest=0), []
        state = method.init(weights)
        for step in range(6):
            paths.append(report(state).messages.path)
            _, state = method.update(numbers(104, step, comm.rank), state, weights)
        assert paths == ["", "dense", "allgather", "allgather", "allgather", "allgather"]
        last = report(state).messages
        assert (last.elements, last.nbytes) == (2 + 4, 32 + 2 * 8 + 16)
        assert last.residual_norm > 0
        method, paths = onebit_adam(comm, 0.1, 2), []
        state = method.init(weights)
        for step in range(4):
            _, state = method.update(numbers(104, step, comm.rank), state, weights)
            paths.append((report(state).messages.path, report(state).messages.nbytes))
        assert paths == [("dense", 416)] * 2 + [("two phases", 4 + 13)] * 2
        assert report(gtc(comm, 0.5).init(weights)).messages.path == ""

    run_on_ranks(5, body)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("onebit_adam", "vote", "ef_signsgd")])
def test_messages_and_residuals_add_up_to_all_gradients(name: str) -> None:
    """After a thousand steps: the sum of all steps times p, and all residuals, against the sum of all gradients.

    In float32 each step rounds each element a few times; values stay below 2^9.
    """
    size, n, steps = 2, 40, 1000
    momentum = 0.5 if "momentum" in name or "Nesterov" in name else 0.0

    def body(comm: Any) -> Any:
        method = METHODS[name](comm)
        state = method.init(np.zeros(n, F32))
        total, given = np.zeros(n), np.zeros(n)
        for step in range(steps):
            gradient = numbers(n, step, comm.rank) / 8
            moved = None if state.momentum is None else state.momentum.astype("f8")
            given += (
                gradient
                if moved is None
                else momentum * (moved + gradient) + gradient
                if "N" in name
                else (momentum * moved + gradient)
            )
            agreed, state = method.update(gradient, state, np.zeros(n, F32))
            total += agreed * (1.0 if "density" in name else size)
        return total, given, state.residual.astype("f8"), state.steps

    found = run_on_ranks(size, body)
    assert np.array_equal(found[0][0], found[1][0])
    sent_in_all, given = found[0][0], sum(each[1] for each in found)
    kept = sum(each[2] for each in found)
    assert np.abs(sent_in_all + kept - given).max() < steps * 4 * 2.0**-15
    assert np.abs(given).max() > 1


@pytest.mark.parametrize("name", long_runs(MATRIX))
def test_after_a_thousand_steps_all_ranks_have_the_same_bits(name: str) -> None:
    size, bucket = 3, Bucket({"a": (5, 4), "bias": (3,), "b": (3, 4)})

    def body(comm: Any) -> bytes:
        method = long_runs(bucket)[name](comm)
        weights = numbers(bucket.size, 0, 0)
        state = method.init(weights)
        for noise in np.random.default_rng(comm.rank).normal(size=(1000, bucket.size)).astype(F32):
            step, state = method.update(weights + noise, state, weights)
            weights = weights + step
        assert np.isfinite(weights).all()
        return weights.tobytes()

    assert len(set(run_on_ranks(size, body))) == 1


@pytest.mark.parametrize("name", ["gtc", "momentum", "onebit", "onebit_adam"])
@pytest.mark.parametrize(("old", "new"), [(3, 2), (2, 5), (4, 1), (3, 3)])
def test_another_number_of_ranks_keeps_the_pending_update(name: str, old: int, new: int) -> None:
    """Mean residuals, mean momenta and all server errors, before and after; one rounding of an element each."""

    def pending(states: list[dict[str, Any]]) -> dict[str, np.ndarray]:
        found = {}
        for path in states[0]:
            field = path.rpartition(".")[2]
            if field in ("residual", "momentum", "worker"):
                found[path] = np.mean([each[path].astype("f8") for each in states], axis=0)
            elif field == "server":
                found[path] = np.concatenate([each[path] for each in states])
        return found

    def first(comm: Any) -> tuple[np.ndarray, Any]:
        gradients = [numbers(61, step, comm.rank) for step in range(6)]
        weights, state, _ = steps_of(METHODS[name](comm), comm, gradients, np.zeros(61, F32))
        return weights, state

    found = run_on_ranks(old, first)

    def then(comm: Any) -> tuple[dict[str, Any], bytes]:
        method, weights = METHODS[name](comm), found[0][0].copy()
        state = for_ranks([each[1] for each in found], comm.rank, comm.size)
        kept = state_dict(state)
        for number in range(6, 9):
            step, state = method.update(numbers(61, number, comm.rank), state, weights)
            weights = weights + step
        return kept, weights.tobytes()

    after = run_on_ranks(new, then)
    assert len({weights for _, weights in after}) == 1
    owed, left = pending([state_dict(each[1]) for each in found]), pending([kept for kept, _ in after])
    assert owed.keys() == left.keys() != set()
    for path, values in owed.items():
        assert values.any()
        np.testing.assert_allclose(left[path], values, rtol=2.0**-23, atol=2.0**-30)
    if old == new:
        for rank, (kept, _) in enumerate(after):
            assert all(np.array_equal(value, state_dict(found[rank][1])[path]) for path, value in kept.items())


@pytest.mark.parametrize("name", METHODS)
def test_a_state_holds_no_uninitialised_memory(name: str, empty_arrays_are_nan: None) -> None:
    """Such memory differs from run to run, and where it holds a NaN a state does not equal its copy."""

    def body(comm: Any) -> list[dict[str, Any]]:
        method, weights = METHODS[name](comm), np.zeros(61, F32)
        state = method.init(weights)
        return [state_dict(state), state_dict(method.update(numbers(61, 0, comm.rank), state, weights)[1])]

    for states in run_on_ranks(3, body):
        assert all(np.isfinite(leaf).all() for state in states for leaf in state.values())


def test_a_rank_beyond_the_new_size_is_refused() -> None:
    with pytest.raises(ArgumentError, match="rank 2 of 2"):
        for_ranks([(np.zeros(3, F32),)], 2, 2)


def test_onebit_adam_says_tensors_of_any_size_when_it_knows_them() -> None:
    """The second tensor's gradients are 1024 times the first's: so are its means, to the rounding of two scales."""
    bucket = Bucket({"a": (40,), "b": (40,)})

    def body(comm: Any) -> None:
        for knows in (True, False):
            method = onebit_adam(comm, 0.01, 2, bucket=bucket if knows else None)
            weights = np.zeros(80, F32)
            state = method.init(weights)
            for step in range(4):
                small = numbers(40, step, comm.rank)
                _, state = method.update(np.concatenate([small, 1024 * small]), state, weights)
            a, b = state.mean[:40], state.mean[40:]
            assert a.any()
            assert np.allclose(1024 * a, b, rtol=1e-5) == knows

    run_on_ranks(1, body)


def test_feedback_of_everything_is_the_mean() -> None:
    def body(comm: Any) -> None:
        exchanged, dense = feedback(hpccomm.none(), comm), synchronous_sgd(comm, 1.0)
        for step in range(3):
            gradient = numbers(50, step, comm.rank)
            zero = np.zeros(50, F32)
            a, state = exchanged.update(gradient, exchanged.init(zero), zero)
            b, _ = dense.update(gradient, dense.init(zero), zero)
            assert np.array_equal(a, -b)
            assert not state.residual.any()

    run_on_ranks(3, body)


@pytest.mark.parametrize("name", [*METHODS, *(f"long: {name}" for name in long_runs(MATRIX))])
def test_a_run_goes_on_from_its_state(name: str) -> None:
    every = METHODS | {f"long: {key}": make for key, make in long_runs(bucket_of(60)).items()}

    def body(comm: Any) -> None:
        method = every[name](comm)
        gradients = [numbers(60, step, comm.rank) for step in range(8)]
        whole, _, _ = steps_of(method, comm, gradients, np.ones(60, F32))
        weights, state, _ = steps_of(method, comm, gradients[:5], np.ones(60, F32))
        again = every[name](comm)
        state = load_state_dict(again.init(weights), state_dict(state))
        for each in gradients[5:]:
            step, state = again.update(each, state, weights)
            weights = weights + step
        assert np.array_equal(weights, whole)

    run_on_ranks(3, body)


@pytest.mark.parametrize("name", [*METHODS, "dgc"])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_one_gradient_that_is_not_finite_stops_no_rank_and_changes_nothing(name: str, odd: float) -> None:
    def body(comm: Any) -> None:
        bucket = bucket_of(60)
        method = dgc(comm, bucket, 0.1, smallest=0, exact=True) if name == "dgc" else METHODS[name](comm)
        weights = np.zeros(60, F32)
        _, state = method.update(numbers(60, 0, comm.rank), method.init(weights), weights)
        before = state_dict(state)
        gradient = numbers(60, 1, comm.rank)
        gradient[7] = odd if comm.rank == 1 else gradient[7]
        step, state = method.update(gradient, state, weights)
        assert not step.any()
        after = state_dict(state)
        changed = {path for path in before if not np.array_equal(before[path], after[path])}
        assert {path.rpartition(".")[2] for path in changed} <= {
            "skipped",
            "exchanges",
            "seconds",
            "wire_bytes",
            "spare",
            *(["steps"] if name == "dgc" else []),
        }
        assert any(path.endswith("skipped") for path in changed)

    run_on_ranks(3, body)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_ranks_with_different_compressors_all_raise(momentum: float) -> None:
    def body(comm: Any) -> None:
        compressor = hpccomm.threshold(0.5) if comm.rank else hpccomm.topk(0.5)
        method = feedback(compressor, comm, momentum)
        weights = np.zeros(8, F32)
        state = method.init(weights)
        with pytest.raises(ArgumentError, match="use different compressors"):
            method.update(GRADIENTS[0, comm.rank].copy(), state, weights)
        assert not state.residual.any()
        assert state.momentum is None or not state.momentum.any()

    run_on_ranks(2, body)


class AlteringComm:
    """A communicator on which rank 1's message arrives altered, at the same place on all ranks."""

    def __init__(self, comm: Any, place: int, octet: int) -> None:
        self.comm, self.place, self.octet = comm, place, octet

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def Allgather(self, mine: np.ndarray, everyone: np.ndarray) -> None:
        self.comm.Allgather(mine, everyone)
        everyone[mine.size + 8 + self.place] = self.octet  # behind rank 1's length


@pytest.mark.parametrize(
    ("what", "place", "octet"),
    [
        ("cut short", 8, 40),
        ("magic", 16, 0),
        ("kind", 20, 6),
        ("n", 24, 59),
        ("count", 32, 5),
        ("length", 44, 44),
        ("an index out of range", 16 + 32 + 4 * 5, 60),
        ("unsorted indices", 16 + 32 + 4 * 5, 0),
    ],
)
def test_a_message_that_arrives_altered_is_an_error_on_all_ranks_and_no_state_changes(
    what: str, place: int, octet: int
) -> None:
    def body(comm: Any) -> None:
        made = hpccomm.topk(0.1, code="u32")
        method, weights = feedback(made, comm), np.zeros(60, F32)
        _, state = method.update(numbers(60, 0, comm.rank), method.init(weights), weights)
        before = state_dict(state)
        with pytest.raises(ArgumentError, match="message"):
            feedback(made, AlteringComm(comm, place, octet)).update(numbers(60, 1, comm.rank), state, weights)
        after = state_dict(state)
        assert all(np.array_equal(before[path], after[path]) for path in before if not path.endswith("spare"))
        step, _ = method.update(numbers(60, 1, comm.rank), state, weights)
        assert step.any()

    run_on_ranks(3, body)


def test_messages_of_any_lengths_are_exchanged() -> None:
    def body(comm: Any) -> None:
        for lengths in ([0, 5, 2], [0, 0, 0], [3, 3, 3]):
            mine = [np.full(lengths[comm.rank], 10 * comm.rank + k, np.uint8) for k in range(2)]
            found, nbytes = exchange_messages(MessageGather(comm), mine)
            assert found is not None
            for rank in range(3):
                assert [each.tolist() for each in found[rank]] == [[10 * rank + k] * lengths[rank] for k in range(2)]
            assert nbytes == 2 * (8 + 3 * 8 + 2 * lengths[comm.rank])
        assert exchange_messages(MessageGather(comm), None if comm.rank == 2 else mine)[0] is None

    run_on_ranks(3, body)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda comm: dgc(comm, MATRIX, 0.0), "density"),
        (lambda comm: dgc(comm, MATRIX, 1.5), "density"),
        (lambda comm: dgc(comm, MATRIX, clip=0.0), "positive norm"),
        (lambda comm: dgc(comm, MATRIX, warmup=-1), "a whole number, 0 or more"),
        (lambda comm: gtc(comm, 0.0), "positive number"),
        (lambda comm: gtc(comm, -1.0), "positive number"),
        (lambda comm: feedback(hpccomm.none(), comm, 1.0), "momentum"),
        (lambda comm: feedback(hpccomm.none(), comm, nesterov=True), "nesterov needs momentum"),
        (lambda comm: feedback(hpccomm.none(), comm, reduce="max"), "one of 'mean', 'sum'"),
        (lambda comm: onebit_adam(comm, 0.1, 0), "a whole number, 1 or more"),
        (lambda comm: gtc(comm).init(np.zeros(3)), "float32"),
        (lambda comm: dgc(comm, MATRIX).init(np.zeros(8)), r"^dgc: pass a flat contiguous float32 .* \(8,\)"),
        (lambda comm: powersgd(comm, MATRIX).init(np.zeros(8)), r"^powersgd: pass a flat .* \(8,\)"),
        (lambda comm: gtc(comm).init(np.zeros((3, 3), "f4")), "flat contiguous"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(make: Callable[[Any], Any], remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy):
        run_on_ranks(1, make)


@pytest.mark.parametrize("compressor", [hpccomm.threshold(0.5), hpccomm.topk(0.1), hpccomm.qsgd(), hpccomm.ternary()])
def test_vectors_whose_indices_do_not_fit_are_refused_before_they_are_read(compressor: Any) -> None:
    """8 GB that nobody touches."""
    vector = np.empty(1 << 31, "f4")
    with pytest.raises(ArgumentError, match=r"2147483648 elements: split them into buckets below 2\*\*31"):
        run_on_ranks(1, lambda comm: hpccomm.feedback(compressor, comm).init(vector))


@pytest.mark.mpi(sizes=(3,))
def test_over_mpi_the_methods_give_the_bits_of_threads(comm: hpccomm.Communicator) -> None:
    for name, make in METHODS.items():
        if name == "onebit_adam":
            continue  # its dense steps are summed in another order

        def run(each: Any, make: Any = make) -> bytes:
            gradients = [numbers(100, step, each.rank) for step in range(4)]
            return steps_of(make(each), each, gradients, np.zeros(100, F32))[0].tobytes()

        assert run(comm) == run_on_ranks(comm.size, run)[0], name
    weights, _, _ = steps_of(
        onebit_adam(comm, 0.01, 2), comm, [numbers(100, k, comm.rank) for k in range(5)], np.zeros(100, F32)
    )
    assert len(set(comm.allgather(weights.tobytes()))) == 1
    with pytest.raises(hpccomm.MismatchError):
        comm.Allreduce(np.zeros(2), np.zeros(2), op=MPI.SUM if comm.rank else MPI.MAX)


SMALL = Bucket({"w": (3, 3), "b": (2,)})


@pytest.mark.parametrize(
    "make",
    [
        gtc,
        hpccomm.block_mean,
        lambda c: feedback(hpccomm.topk(0.3), c, 0.9),
        lambda c: onebit_adam(c, 0.1, 3),
        lambda c: onebit_lamb(c, SMALL, 0.1, 3),
        lambda c: powersgd(c, SMALL, 1),
        lambda c: dgc(c, SMALL, smallest=1),
    ],
)
def test_the_state_of_other_weights_is_refused(make: Callable[[Any], Transform]) -> None:
    method, few = make(MPI.COMM_SELF), np.ones(5, "f4")
    with pytest.raises(ArgumentError, match="shape"):
        method.update(few, method.init(np.ones(11, "f4")), few)


@pytest.mark.parametrize("given", [1.5, None, "a", -1, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: onebit_adam(MPI.COMM_SELF, 0.1, n),
        lambda n: onebit_lamb(MPI.COMM_SELF, SMALL, 0.1, n),
        lambda n: dgc(MPI.COMM_SELF, SMALL, warmup=n),
        lambda n: hpccomm.every(n, scale(-1)),
    ],
)
def test_numbers_of_steps_are_whole(make: Callable[[Any], Transform], given: Any) -> None:
    with pytest.raises(ArgumentError, match=f"is {given!r}: pass a whole number"):
        make(given)


@pytest.mark.parametrize("given", [0, -1, 1.5, math.nan, None, "a"])
@pytest.mark.parametrize("make", [hpccomm.topk, hpccomm.randomk, lambda d: dgc(MPI.COMM_SELF, SMALL, d)])
def test_a_density_is_above_0_and_at_most_1(make: Callable[[Any], Any], given: Any) -> None:
    with pytest.raises(ArgumentError, match=r"the density is .*: pass a number above 0, at most 1"):
        make(given)
