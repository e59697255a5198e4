"""Gradients in buckets: the same bits as without overlap, in any order, of any size; states by tensor; mistakes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hpccomm
from hpccomm import ArgumentError, BucketedExchange, Communicator, MismatchError, context, progress
from hpccomm.algorithms.states import leaves
from hpccomm.algorithms.tensor_states import join_states, split_state
from hpccomm.buckets import Bucket, group_by_size
from hpccomm.testing.ranks import run_on_ranks

PAGE = Path(__file__).parent.parent / "docs" / "buckets.md"
pytestmark = pytest.mark.mpi(sizes=(1, 2, 3, 5))

SHAPES: dict[str, tuple[int, ...]] = {
    "embedding": (40, 30),
    "bias": (7,),
    "empty": (0, 4),
    "scalar": (),
    "giant": (64, 50),
    "head": (30, 20),
}
"""4,800, 28, 0, 4, 12,800 and 2,400 bytes."""
SIZES = (1, 4000, 5000, 1 << 20)
"""A bucket for each tensor; some of several; all in one."""

METHODS: dict[str, Callable[..., Any]] = {
    "mean": hpccomm.mean,
    "gtc": partial(hpccomm.gtc, density=0.05),
    "gtc auto": hpccomm.gtc,
    "dgc": lambda comm, bucket: hpccomm.dgc(comm, bucket, 0.05, smallest=100, weight_decay=0.01),
    "onebit": lambda comm, bucket: hpccomm.onebit_sgd(comm, bucket),  # noqa: PLW0108 (by tensor)
    "ef_signsgd": lambda comm, bucket: hpccomm.ef_signsgd(comm, 0.1, bucket),
    "onebit_adam": lambda comm, bucket: hpccomm.onebit_adam(comm, 0.1, 2, bucket=bucket),
    "onebit_lamb": lambda comm, bucket: hpccomm.onebit_lamb(comm, bucket, 0.1, 2),
    "powersgd": lambda comm, bucket: hpccomm.powersgd(comm, bucket, 2),
    "int8": hpccomm.block_mean,
    "qsgd": lambda comm: hpccomm.feedback(hpccomm.qsgd(), comm),
    "topk": lambda comm: hpccomm.feedback(hpccomm.topk(0.05), comm, momentum=0.9),
    "sgd": lambda comm: hpccomm.synchronous_sgd(comm, 0.1, momentum=0.5, weight_decay=0.01),
    "adam": lambda comm: hpccomm.synchronous_adam(comm, 0.1, weight_decay=0.01),
    "lamb": lambda comm, bucket: hpccomm.chain(hpccomm.mean(comm), hpccomm.apply_if_finite(hpccomm.lamb(bucket, 0.1))),
    "rows": lambda comm, bucket: hpccomm.chain(
        hpccomm.mean_rows(comm, bucket, [each.name for each in bucket.table if each.shape]), hpccomm.momentum(0.5)
    ),
    "ternary": lambda comm: hpccomm.without_feedback(hpccomm.ternary(), comm),
    "scaled": lambda comm: hpccomm.scale_loss(comm, hpccomm.mean(comm), hpccomm.LossScale(1.0, 0)),
    "accumulated": lambda comm: hpccomm.every(2, hpccomm.chain(hpccomm.mean(comm), hpccomm.scale(-1))),
}
BY_TENSOR = ("mean", "dgc", "onebit", "powersgd", "sgd", "accumulated")
"""Methods whose steps do not depend on the buckets, on as many ranks as add in one order."""


def make_weights() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return {name: np.asarray(rng.integers(-8, 9, shape) / 4, "f4") for name, shape in SHAPES.items()}


def gradient(name: str, step: int, rank: int) -> Any:
    rng = np.random.default_rng((list(SHAPES).index(name), step, rank))
    return np.asarray(rng.integers(-64, 65, SHAPES[name]) / 16, "f4")


def run_steps(exchange: BucketedExchange, weights: dict[str, Any], first: int, last: int) -> list[bytes]:
    """The steps of all tensors; gradients come in another order on every rank and in every step."""
    found = []
    for step in range(first, last):
        names = list(np.random.default_rng((step, exchange.comm.rank)).permutation(list(SHAPES)))
        for name in map(str, names):
            exchange.add({name: gradient(name, step, exchange.comm.rank)})
        steps = exchange.finish()
        assert list(steps) == list(SHAPES)
        found.append(b"".join(each.tobytes() for each in steps.values()))
        for name, each in steps.items():
            weights[name] += each
    return found


def run_in_turn(comm: Any, make: Any, groups: list[list[str]], steps: int) -> list[bytes]:
    """The same method, on one bucket after the other, without a thread."""
    from hpccomm.algorithms.bucketed import make_method

    weights, found = make_weights(), []
    buckets = [Bucket({name: weights[name] for name in names}) for names in groups]
    methods = [make_method(make, comm, each) for each in buckets]
    states = [method.init(each.flatten(of(weights, each))) for method, each in zip(methods, buckets, strict=True)]
    for step in range(steps):
        every: dict[str, Any] = {}
        for k, (method, bucket) in enumerate(zip(methods, buckets, strict=True)):
            whole = bucket.flatten({name: gradient(name, step, comm.rank) for name in groups[k]})
            moved, states[k] = method.update(whole, states[k], bucket.flatten(of(weights, bucket)))
            every |= {name: each.copy() for name, each in bucket.views(np.ascontiguousarray(moved)).items()}
        found.append(b"".join(every[name].tobytes() for name in SHAPES))
        for name, each in every.items():
            weights[name] += each
    return found


def of(weights: dict[str, Any], bucket: Bucket) -> dict[str, Any]:
    return {entry.name: weights[entry.name] for entry in bucket.table}


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", METHODS)
def test_overlapped_buckets_take_the_steps_of_buckets_in_turn(comm: Communicator, name: str) -> None:
    weights = make_weights()
    exchange = BucketedExchange(comm, weights, METHODS[name], 5000)
    groups = [list(each.weights) for each in exchange.buckets]
    assert groups == [["head"], ["giant"], ["scalar", "empty", "bias", "embedding"]]
    assert run_steps(exchange, weights, 0, 4) == run_in_turn(comm, METHODS[name], groups, 4)


@pytest.mark.mpi(sizes=(1, 2, 3, 5))
@pytest.mark.parametrize("name", METHODS)
def test_a_state_by_tensor_continues_with_the_same_bits(comm: Communicator, name: str) -> None:
    """Where a tensor's steps do not depend on the bucket, with buckets of every size."""
    for size in SIZES if name in BY_TENSOR and comm.size < 3 else (4000, 1 << 20):
        weights = make_weights()
        exchange = BucketedExchange(comm, weights, METHODS[name], 4000)
        run_steps(exchange, weights, 0, 3)
        kept, then = exchange.collect_state(), {name: each.copy() for name, each in weights.items()}
        wanted = run_steps(exchange, weights, 3, 6)
        resumed = BucketedExchange(comm, then, METHODS[name], size)
        resumed.restore_state(kept)
        again = resumed.collect_state()
        for tensor, mine, other in zip(SHAPES, kept, again, strict=True):
            for (path, leaf), (_, copy) in zip(leaves(mine), leaves(other), strict=True):
                if "report" not in path and "headers" not in path and SHAPES[tensor] != (0, 4) and size == 4000:
                    assert np.array_equal(leaf, copy), (name, size, tensor, path)
        found = run_steps(resumed, then, 3, 6)
        if size == 4000 or (name in BY_TENSOR and comm.size < 3):
            assert found == wanted, (name, size)
        assert hpccomm.report(resumed.state).cost.exchanges >= 3 * (comm.size > 1)


@pytest.mark.parametrize("name", ["gtc", "int8", "onebit_adam", "powersgd", "dgc"])
def test_what_was_not_sent_survives_other_buckets_and_ranks(comm: Communicator, name: str) -> None:
    """Residuals go with their tensors, the shards of errors with their elements."""
    weights = make_weights()
    exchange = BucketedExchange(comm, weights, METHODS[name], 4000)
    run_steps(exchange, weights, 0, 3)
    kept = exchange.collect_state()
    other = BucketedExchange(comm, weights, METHODS[name], 1 << 20)
    other.restore_state(kept)
    back = BucketedExchange(comm, weights, METHODS[name], 4000)
    back.restore_state(other.collect_state())
    for mine, again in zip(exchange.state, back.state, strict=True):
        for (path, leaf), (_, copy) in zip(leaves(mine), leaves(again), strict=True):
            vector = path.rpartition(".")[2] in ("residual", "server", "worker", "momentum", "factors", "dense", "mean")
            assert not vector or np.array_equal(leaf, copy), path
    everyone = comm.allgather(kept)
    moved = hpccomm.for_ranks(everyone, comm.rank, comm.size)
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(moved), leaves(kept), strict=True))
    if name in ("gtc", "int8", "powersgd"):
        assert set(other.flush()) == set(SHAPES)


def test_states_are_divided_on_any_number_of_ranks() -> None:
    """A shard of a bucket's vector becomes the shards of its tensors, cut as by array_split, and back."""
    lengths = (5, 0, 1, 9)

    def body(comm: Any) -> None:
        def state(n: int, first: float) -> Any:
            made = hpccomm.block_mean(comm).init(np.zeros(n, "f4"))
            values = np.arange(first, first + n, dtype="f4")
            return made._replace(
                residual=values + comm.rank, server=np.array_split(values, comm.size)[comm.rank].copy(), steps=3
            )

        firsts = np.cumsum((0, *lengths)).tolist()
        whole, parts = state(15, 0), [state(n, first) for n, first in zip(lengths, firsts, strict=False)]
        for found, wanted in zip(
            [*split_state(whole, parts, comm), join_states(parts, whole, comm)], [*parts, whole], strict=True
        ):
            assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(leaves(found), leaves(wanted), strict=True))

    for ranks in (1, 2, 3, 5):
        run_on_ranks(ranks, body)


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("dtype", ["f2", "bfloat16"])
def test_a_run_with_16_bit_gradients_continues_on_fewer_ranks(comm: Communicator, dtype: str) -> None:
    """The buffers of the mean have lengths that depend on the bucket and on the number of ranks."""
    pytest.importorskip("ml_dtypes")
    kind = np.dtype(dtype)

    def exchange_on(ranks: Communicator) -> BucketedExchange:
        weights = {name: np.zeros(3, kind) for name in "abc"}
        return BucketedExchange(ranks, weights, lambda comm: hpccomm.synchronous_sgd(comm, 1, momentum=0.5))

    def step(exchange: BucketedExchange) -> list[float]:
        exchange.add({name: np.ones(3, kind) for name in "abc"})
        return [float(each[0]) for each in exchange.finish().values()]

    exchange = exchange_on(comm)
    assert step(exchange) == [-1] * 3
    saved = comm.allgather(exchange.collect_state())
    again = exchange_on(comm)
    again.restore_state(saved[comm.rank])
    assert step(exchange) == step(again) == [-1.5] * 3
    fewer = comm.Split(int(comm.rank == comm.size - 1), comm.rank)
    if comm.rank < comm.size - 1:
        resumed = exchange_on(fewer)
        resumed.restore_state(hpccomm.for_ranks(saved, fewer.rank, fewer.size))
        assert step(resumed) == [-1.5] * 3
    fewer.Free()


@pytest.mark.parametrize("size", SIZES)
def test_the_mean_is_exact_for_mixed_dtypes_and_tied_weights(comm: Communicator, size: int) -> None:
    import ml_dtypes

    table = np.ones((6, 4), "f4")
    weights = {
        "embedding": {"table": table},
        "norm": np.ones(5, ml_dtypes.bfloat16),
        "half": np.ones(9, "f2"),
        "double": np.ones((2, 2)),
        "head": {"w": table, "b": np.ones(3, "f4")},
    }
    exchange = BucketedExchange(comm, weights, hpccomm.mean, size)
    assert [each.layout.bucket.dtype.name for each in exchange.buckets if len(each.weights) > 1] == ["float32"] * (
        size > 1
    )
    for step in range(2):
        exchange.add({"head": {"w": np.full((6, 4), comm.rank, "f4"), "b": np.full(3, 2, "f4")}})
        exchange.add({"double": np.full((2, 2), comm.rank + step, "f8"), "half": np.full(9, 4, "f2")})
        exchange.add({"norm": np.full(5, 8 * comm.rank, ml_dtypes.bfloat16)})
        exchange.add({"embedding": {"table": np.full((6, 4), 1, "f4")}})
        steps = exchange.finish()
        mean = (comm.size - 1) / 2
        assert {name: (each.dtype.name, set(each.ravel().tolist())) for name, each in steps.items()} == {
            "embedding.table": ("float32", {mean + 1}),
            "norm": ("bfloat16", {8 * mean}),
            "half": ("float16", {4}),
            "double": ("float64", {mean + step}),
            "head.b": ("float32", {2}),
        }


def test_gradients_written_in_place_and_buckets_begun_in_any_order(comm: Communicator) -> None:
    weights = make_weights()
    exchange = BucketedExchange(comm, weights, hpccomm.mean, 4000)
    for step in range(3):
        for name in SHAPES:
            exchange.gradients[name][...] = comm.rank + step
        for k in np.random.default_rng((comm.rank, step)).permutation(len(exchange.buckets)):
            exchange.begin(k)
        assert all((each == (comm.size - 1) / 2 + step).all() for each in exchange.finish().values())


@pytest.mark.mpi(sizes=(2,))
def test_a_bucket_is_exchanged_while_the_program_computes(comm: Communicator) -> None:
    if not progress.has_thread():
        pytest.skip("MPI without threads")
    done: list[int] = []
    weights = {"first": np.ones(1000, "f4"), "last": np.ones(1000, "f4")}
    exchange = BucketedExchange(comm, weights, hpccomm.mean, 4000, on_step=lambda bucket: done.append(bucket.number))
    exchange.add({"last": weights["last"]})
    until = time.monotonic() + 20
    while not done and time.monotonic() < until:
        time.sleep(0.001)
    assert done == [0]
    exchange.add({"first": weights["first"]})
    exchange.finish()
    assert done == [0, 1]


@pytest.mark.mpi(sizes=(2, 3))
def test_nodes_of_one_rank_and_no_thread(comm: Communicator, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """The same bits, and the same words about a bucket that never begins."""
    wanted = None
    for nodes, thread in ((False, True), (True, True), (False, False), (True, False)):
        with monkeypatch.context() as patch:
            if nodes:
                patch.setattr(context, "ranks_of_this_node", lambda channel: channel.Split(channel.rank, 0))
            if not thread:
                patch.setattr(progress, "has_thread", lambda: False)
            each = Communicator(comm.Dup())
            weights = make_weights()
            exchange = BucketedExchange(each, weights, METHODS["dgc"], 4000)
            found = run_steps(exchange, weights, 0, 3)
            wanted = wanted or found
            assert found == wanted, (nodes, thread)
            for name in SHAPES:
                if comm.rank != 1 or name != "giant":
                    exchange.add({name: gradient(name, 0, comm.rank)})
            with pytest.raises((ArgumentError, MismatchError), match=r"without bucket 1 \(giant\) on rank 1: give"):
                exchange.finish()
            each.Free()


@pytest.mark.mpi(sizes=(2,))
def test_torch_tensors_get_steps_of_torch(comm: Communicator) -> None:
    torch = pytest.importorskip("torch")
    weights = {"w": torch.ones(3, 2), "b": torch.ones(2, dtype=torch.bfloat16)}
    exchange = BucketedExchange(comm, weights, hpccomm.mean)
    exchange.add({"b": torch.full((2,), comm.rank, dtype=torch.bfloat16), "w": torch.full((3, 2), float(comm.rank))})
    steps = exchange.finish()
    assert {name: (type(each), each.dtype, each.mean().item()) for name, each in steps.items()} == {
        "w": (torch.Tensor, torch.float32, 0.5),
        "b": (torch.Tensor, torch.bfloat16, 0.5),
    }


def test_sizes_group_as_they_become_complete() -> None:
    sizes = [("e", "f4", 4), ("d", "f8", 8), ("z", "f4", 0), ("c", "f4", 8), ("b", "f8", 80), ("a", "f4", 4)]
    assert group_by_size(sizes, 8) == [["d"], ["e", "z"], ["c"], ["b"], ["a"]]
    assert group_by_size(sizes, 1000) == [["d", "b"], ["e", "z", "c", "a"]]
    assert group_by_size([], 8) == []
    assert group_by_size([("z", "f4", 0)], 1) == [["z"]]


def test_the_code_of_the_page_runs(comm: Communicator, capsys: Any) -> None:
    code = re.search(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert code
    exec(compile(code[1], PAGE, "exec"), {})
    said = re.fullmatch(rf"rank {comm.rank}: 3 buckets, error (0\.\d\d)\n", capsys.readouterr().out)
    assert said
    assert float(said[1]) < 0.8  # the mean square of the targets is 1


@pytest.mark.mpi(sizes=(2,))
def test_the_measuring_program_compares_four_ways(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import buckets

    monkeypatch.setattr(buckets, "LAYERS", 2)
    for compute in buckets.COMPUTE:
        setting = buckets.Setting(2, "1gbit", 1, compute)
        row = {"title": setting.title, **buckets.measure(setting, 2)}
        assert list(row) == ["title", *buckets.WAYS]
        assert all(len(row[way]) == 2 and min(row[way]) > 0 for way in buckets.WAYS)
        assert f"| 2 x 1, 1gbit, 1 MB, {compute} | **" in buckets.table([row])


# Steps that are not finite


def values_of(states: Any) -> list[tuple[str, Any]]:
    """What the next steps depend on: without counts of steps and costs, and buffers."""
    apart = ("skipped", "steps", "total", "spare", "room", "path", "longest", "dense_step")
    return [(path, leaf) for path, leaf in leaves(states) if "report" not in path and not path.endswith(apart)]


@pytest.mark.mpi(sizes=(1, 2, 3))
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_skips_the_whole_step_on_all_ranks(
    comm: Communicator, name: str, bad: float
) -> None:
    """In whichever bucket: all steps are zero, what was not sent is as before, and the run goes on as if without it."""
    for tensor in ("head", "giant", "embedding", "scalar"):
        weights, others = make_weights(), make_weights()
        exchange, wanted = (BucketedExchange(comm, each, METHODS[name], 5000) for each in (weights, others))
        assert run_steps(exchange, weights, 0, 2) == run_steps(wanted, others, 0, 2)
        before = values_of(hpccomm.snapshot(exchange.state))
        for each in SHAPES:
            given = gradient(each, 7, comm.rank)
            if each == tensor and comm.rank == comm.size - 1:
                given[...] = bad
            exchange.add({each: given})
        assert not any(each.any() for each in exchange.finish().values())
        assert exchange.skipped == 1
        for (path, leaf), (_, kept) in zip(values_of(exchange.state), before, strict=True):
            assert np.array_equal(leaf, kept), (tensor, path)
        if name != "dgc":  # whose skipped steps count for the warm-up
            assert run_steps(exchange, weights, 2, 4) == run_steps(wanted, others, 2, 4), tensor


def test_a_loss_scale_of_several_buckets_is_one(comm: Communicator) -> None:
    """It halves in all buckets, whichever was not finite, and doubles in all."""
    weights = {name: np.ones(5, "f4") for name in "abc"}
    make = lambda comm: hpccomm.scale_loss(comm, hpccomm.mean(comm), hpccomm.LossScale(8.0, 2))  # noqa: E731
    exchange, seen = BucketedExchange(comm, weights, make, 1), []
    assert len(exchange.buckets) == 3
    for bad in ("", "b", "a", "", "", "c", ""):
        for name in weights:
            value = np.inf if name == bad and comm.rank == 0 else hpccomm.loss_scale(exchange.state)
            exchange.add({name: np.full(5, value, "f4")})
        steps = exchange.finish()
        assert all((each == (0 if bad else 1)).all() for each in steps.values())
        assert len({hpccomm.loss_scale(each) for each in exchange.state}) == 1
        seen.append(hpccomm.loss_scale(exchange.state))
    assert seen == [8, 4, 2, 2, 4, 2, 2]
    assert exchange.skipped == 3
    assert {each.inner.skipped for each in exchange.state} == {3}


@pytest.mark.mpi(sizes=(2,))
def test_a_method_that_skips_by_itself_skips_the_whole_step(comm: Communicator) -> None:
    """Finite gradients whose sum is not: found only by the method of one bucket."""
    weights = {name: np.zeros(4, "f4") for name in ("first", "middle", "last")}

    def make(comm: Any) -> Any:
        guarded = hpccomm.apply_if_finite(hpccomm.momentum(0.5))
        return hpccomm.chain(hpccomm.mean(comm), guarded)

    for bad in weights:
        exchange = BucketedExchange(comm, weights, make, 1)
        for number in range(3):
            values = {name: 3e38 if name == bad and number == 1 else 0.5 for name in weights}
            exchange.add({name: np.full(4, value, "f4") for name, value in values.items()})
            steps, wanted = exchange.finish(), [0.5, 0, 0.75][number]
            assert all((each == wanted).all() for each in steps.values()), (bad, number)
        assert exchange.skipped == 1


@pytest.mark.mpi(sizes=(1, 2, 3))
def test_a_method_that_skips_on_one_rank_skips_the_step_on_all(comm: Communicator) -> None:
    """Sums of local steps overflow on rank 0 only: no rank may wait for it, or take another step than it does."""
    weights = {name: np.zeros(4, "f2") for name in "ab"}
    local = lambda comm: hpccomm.local_sgd(  # noqa: E731
        comm, hpccomm.every(2, hpccomm.apply_if_finite(hpccomm.scale(-1.0))), 4
    )
    exchange = BucketedExchange(comm, weights, local, bucket_bytes=8)
    large = 40000.0 if comm.rank == 0 else 1.0
    for _ in range(2):
        exchange.add({"a": np.ones(4, "f2"), "b": np.full(4, large, "f2")})
        steps = exchange.finish()
    assert exchange.skipped == 1
    assert not any(each.any() for each in steps.values())
    exchange.add({"a": np.ones(4, "f2"), "b": np.ones(4, "f2")})
    steps = exchange.finish()  # with the gradients of the first step, and without those of the second
    wanted = {"a": np.full(4, -2, "f2"), "b": -np.full(4, large + 1, "f2")}
    assert all(np.array_equal(steps[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("at", ["a", "b"])
def test_buckets_stay_in_phase_after_a_skipped_step(comm: Communicator, at: str) -> None:
    def make(comm: Any) -> Any:
        sums = hpccomm.every(2, hpccomm.chain(hpccomm.mean(comm), hpccomm.momentum(0.5)))
        return hpccomm.chain(sums, hpccomm.apply_if_finite(hpccomm.scale(-1.0)))

    exchange = BucketedExchange(comm, {name: np.zeros(4, "f2") for name in "ab"}, make, 8)
    for step in range(6):
        exchange.add({name: np.full(4, 40000.0 if name == at and step < 2 else 1.0, "f2") for name in "ab"})
        exchange.finish()
        assert len({micro_steps(state) for state in exchange.state}) == 1, step
    assert exchange.skipped > 0


def micro_steps(state: Any) -> int:
    """How many gradients ``every`` has added."""
    return int(state[0].micro_steps)


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_with_fewer_ranks(comm: Communicator, name: str, capfd: Any) -> None:
    """From the states of all ranks, by tensor: the remaining ranks step alike, and all stays finite."""
    weights = make_weights()
    exchange = BucketedExchange(comm, weights, METHODS[name], 5000)
    run_steps(exchange, weights, 0, 3)
    saved, stays = comm.allgather(exchange.collect_state()), comm.rank < comm.size - 1
    fewer = comm.Split(int(stays), comm.rank)
    if stays:
        resumed = BucketedExchange(fewer, weights, METHODS[name], 4000)
        resumed.restore_state(hpccomm.for_ranks(saved, fewer.rank, fewer.size))
        steps = run_steps(resumed, weights, 3, 6)
        assert fewer.allgather(steps) == [steps] * fewer.size
        assert all(np.isfinite(each).all() for each in weights.values())
    fewer.Free()


@pytest.mark.mpi(sizes=(1, 2))
@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_zero_stop_no_bucket(comm: Communicator, name: str) -> None:
    weights = make_weights()
    exchange = BucketedExchange(comm, weights, METHODS[name], 5000)
    for number in range(12):
        exchange.add({each: np.full(shape, number % 3 == 2, "f4") for each, shape in SHAPES.items()})
        assert all(np.isfinite(each).all() for each in exchange.finish().values())
    assert exchange.skipped == 0


@pytest.mark.mpi(sizes=(1, 2))
def test_states_by_tensor_make_no_methods(comm: Communicator) -> None:
    """A method for each bucket, and where it treats tensors one by one, once for each tensor."""
    made = []

    def by_vector(comm: Any) -> Any:
        made.append("vector")
        return hpccomm.gtc(comm, 0.5)

    def by_tensor(comm: Any, bucket: Any) -> Any:
        made.append("tensor")
        return hpccomm.onebit_sgd(comm, bucket)

    for make, most in ((by_vector, 3), (by_tensor, 3 + len(SHAPES))):
        made.clear()
        weights = make_weights()
        exchange = BucketedExchange(comm, weights, make, 5000)
        run_steps(exchange, weights, 0, 1)
        for _ in range(3):
            exchange.restore_state(exchange.collect_state())
        assert len(made) == most


# Mistakes


def test_a_wrong_call_is_named_and_changes_nothing(comm: Communicator) -> None:
    weights = {"first": np.ones((2, 3), "f4"), "last": np.ones(4, "f4")}
    exchange = BucketedExchange(comm, weights, hpccomm.mean, 1)
    exchange.add({"last": np.ones(4, "f4")})
    for body, why in (
        (lambda: exchange.add({"lost": weights["last"]}), "no weight is called 'lost'"),
        (lambda: exchange.add({"last": weights["last"]}), "the gradient of last has come in this step"),
        (lambda: exchange.add({"first": weights["last"]}), r"is float32 of shape \(4,\), the weight float32 of shape"),
        (lambda: exchange.add({"first": np.ones((2, 3))}), "is float64 of shape"),
        (lambda: exchange.begin(2), "there is no bucket 2: pass 0 to 1"),
        (lambda: exchange.begin(-1), "there is no bucket -1"),
        (lambda: exchange.begin(0), r"bucket 0 \(last\) has begun in this step"),
        (exchange.collect_state, "a step is under way: call finish first"),
        (exchange.flush, "a step is under way"),
        (lambda: exchange.restore_state(()), "a step is under way"),
        (lambda: BucketedExchange(comm, {}, hpccomm.mean), "there are no weights"),
        (lambda: BucketedExchange(comm, {"w": np.float32(1)}, hpccomm.mean), "w: a float32 that cannot be written"),
        (lambda: BucketedExchange(comm, weights, hpccomm.mean, 0), "bucket_bytes is 0"),
        (lambda: BucketedExchange("world", weights, hpccomm.mean), "comm is 'world'"),
    ):
        with pytest.raises(ArgumentError, match=why):
            body()
    exchange.add({"first": np.zeros((2, 3), "f4")})
    steps = exchange.finish()
    assert (steps["first"] == 0).all()
    assert (steps["last"] == 1).all()
    with pytest.raises(ArgumentError, match="pass the states of 2 tensors"):
        exchange.restore_state(exchange.collect_state()[:1])
    gtc = BucketedExchange(comm, weights, hpccomm.gtc)
    with pytest.raises(ArgumentError, match="on rank 0 the state of last, first is of another method"):
        gtc.restore_state(exchange.collect_state())
    last = gtc.collect_state() if comm.rank < comm.size - 1 else gtc.collect_state()[::-1]
    with pytest.raises(ArgumentError, match=f"on rank {comm.size - 1} the state of last, first is of another"):
        gtc.restore_state(last)
    both = BucketedExchange(comm, weights, hpccomm.mean)
    both.add({"last": weights["last"]})
    with pytest.raises(ArgumentError, match="some gradients were added, but not first"):
        both.begin(0)
    both.add({"first": weights["first"]})
    both.finish()


@pytest.mark.mpi(sizes=(1, 2, 3, 5))
def test_finish_without_a_bucket_is_named_on_all_ranks(comm: Communicator, capfd: Any) -> None:
    """And the next step is a whole one, from the states of before."""
    last, weights = comm.size - 1, make_weights()
    exchange = BucketedExchange(comm, weights, METHODS["sgd"], 1)
    run_steps(exchange, weights, 0, 1)
    before = values_of(hpccomm.snapshot(exchange.state))
    for absent in (["giant"], ["head", "embedding"], list(SHAPES)):
        for name in SHAPES:
            if comm.rank != last or name not in absent:
                exchange.add({name: gradient(name, 0, comm.rank)})
        first = exchange.bucket_of[max(absent, key=list(SHAPES).index)]
        kind = ArgumentError if comm.rank == last else MismatchError
        with pytest.raises(
            kind, match=rf"finish was called without bucket {first.number} \(\w+\) on rank {last}: give"
        ):
            exchange.finish()
        for (path, leaf), (_, kept) in zip(values_of(exchange.state), before, strict=True):
            assert np.array_equal(leaf, kept), path
    run_steps(exchange, weights, 0, 1)
    comm.Barrier()


@pytest.mark.mpi(sizes=(2, 3))
def test_ranks_with_other_tensors_are_named(comm: Communicator, capfd: Any) -> None:
    weights = {"first": np.ones(3, "f4"), "last": np.ones(4 + (comm.rank == 1), "f4")}
    with pytest.raises(
        MismatchError, match=r"BucketedExchange: the tensors of rank 1 .* bucket 0: 'last' float32\[5\] on rank 1"
    ):
        BucketedExchange(comm, weights, hpccomm.mean)
    with pytest.raises(MismatchError, match=r"ranks? 1.* differ from .* bucket 0: .* and the same bucket_bytes"):
        BucketedExchange(comm, {"a": np.ones(3), "b": np.ones(3)}, hpccomm.mean, 24 * (1 + comm.rank))


def test_an_exchange_that_failed_is_not_used_again(comm: Communicator, capfd: Any) -> None:
    def fails(comm: Any) -> Any:
        def update(gradient: Any, state: Any, weights: Any) -> Any:
            raise ValueError("no such device")

        return hpccomm.Transform(lambda weights: (), update)

    exchange = BucketedExchange(comm, {"w": np.ones(3)}, fails)
    exchange.add({"w": np.ones(3)})
    with pytest.raises(ValueError, match="no such device"):
        exchange.finish()
    for again in (lambda: exchange.add({"w": np.ones(3)}), lambda: exchange.begin(0), exchange.finish):
        with pytest.raises(ArgumentError, match=r"an exchange has failed \(no such device\): make a new one"):
            again()
    comm.Barrier()
