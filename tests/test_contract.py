"""What every method promises, in each of its phases: resume, snapshots, ranks, gradients of zero or not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import hpccomm
from hpccomm.algorithms.checkpoints import group_sizes, load_state_dict, state_dict
from hpccomm.algorithms.local_steps import PeriodicTransform
from hpccomm.algorithms.loss_scaling import LossScale
from hpccomm.algorithms.sharded.units import Outcome, ShardedModel, adamw
from hpccomm.algorithms.states import RankChange, leaves, leaves_with_changes, snapshot
from hpccomm.algorithms.transforms import Transform, chain, descend, momentum
from hpccomm.errors import ArgumentError
from hpccomm.testing import run_on_ranks

F32 = np.float32
BUCKET = hpccomm.Bucket({"w": (12, 10), "bias": (5,)})
N = BUCKET.size
HEAVY = chain(momentum(0.5), descend(0.05))


class Row(NamedTuple):
    """A method, and the steps after which its phases have been visited."""

    make: Callable[[Any], Transform]
    phases: tuple[int, ...]
    """Steps in the middle of each phase."""
    repeats: int = 1
    """Steps of a block, at whose end all ranks agree; 1 where they always do."""


def after(exchange: Callable[[Any], Transform]) -> Callable[[Any], Transform]:
    """The exchange, then descent with momentum."""
    return lambda comm: chain(exchange(comm), HEAVY)


METHODS: dict[str, Row] = {
    "synchronous_sgd": Row(lambda comm: hpccomm.synchronous_sgd(comm, 0.05, momentum=0.5, weight_decay=0.1), (2,)),
    "synchronous_adam": Row(lambda comm: hpccomm.synchronous_adam(comm, 0.05, weight_decay=0.1), (2,)),
    "lars": Row(lambda comm: chain(hpccomm.mean(comm), hpccomm.apply_if_finite(hpccomm.lars(BUCKET, 0.1))), (2,)),
    "lamb": Row(lambda comm: chain(hpccomm.mean(comm), hpccomm.apply_if_finite(hpccomm.lamb(BUCKET, 0.1))), (2,)),
    "scale_loss": Row(
        lambda comm: hpccomm.scale_loss(comm, after(hpccomm.mean)(comm), hpccomm.LossScale(4.0, 2)), (2,)
    ),
    "scale_loss topk": Row(
        lambda comm: hpccomm.scale_loss(
            comm, after(lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm))(comm), hpccomm.LossScale(4.0, 2)
        ),
        (2,),
    ),
    "mean_rows": Row(lambda comm: chain(hpccomm.mean_rows(comm, BUCKET, ["w"]), hpccomm.apply_if_finite(HEAVY)), (2,)),
    "gtc": Row(after(lambda comm: hpccomm.gtc(comm, 0.5)), (2,)),
    "gtc auto": Row(after(hpccomm.gtc), (2,)),
    "gtc density": Row(after(lambda comm: hpccomm.gtc(comm, density=0.05)), (2,)),
    "topk": Row(after(lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm)), (2,)),
    "randomk": Row(after(lambda comm: hpccomm.feedback(hpccomm.randomk(0.1), comm)), (2,)),
    "topk momentum": Row(lambda comm: chain(hpccomm.feedback(hpccomm.topk(0.1), comm, 0.5), descend(0.05)), (2,)),
    "topk dense": Row(after(lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm, exchange="dense")), (2,)),
    "topk node": Row(after(lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm, exchange="node")), (2,)),
    "ok_topk": Row(after(lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm, exchange="ok_topk")), (2,)),
    "topk split": Row(after(lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm, exchange="split")), (2,)),
    "topk doubling": Row(
        after(lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm, exchange="recursive_doubling")), (2,)
    ),
    "topk leaders": Row(after(lambda comm: hpccomm.feedback(hpccomm.topk(0.1), comm, exchange="leaders")), (2,)),
    "gtc leaders": Row(after(lambda comm: hpccomm.gtc(comm, density=0.05, exchange="leaders")), (2,)),
    "leaders momentum": Row(
        lambda comm: chain(hpccomm.feedback(hpccomm.topk(0.1), comm, 0.5, exchange="leaders"), descend(0.05)), (2,)
    ),
    "gtc rice": Row(after(lambda comm: hpccomm.gtc(comm, 0.5, code="rice")), (2,)),
    "sum": Row(after(lambda comm: hpccomm.gtc(comm, 0.5, reduce="sum")), (2,)),
    "natural": Row(after(lambda comm: hpccomm.without_feedback(hpccomm.natural(), comm)), (2,)),
    "majority": Row(after(lambda comm: hpccomm.feedback(hpccomm.sign_majority(), comm)), (2,)),
    "every": Row(lambda comm: hpccomm.every(2, after(hpccomm.gtc)(comm)), (2, 3)),
    "clip": Row(lambda comm: chain(hpccomm.mean(comm), hpccomm.apply_if_finite(chain(hpccomm.clip(1.0), HEAVY))), (2,)),
    "qsgd": Row(after(lambda comm: hpccomm.feedback(hpccomm.qsgd(4, 32), comm)), (2,)),
    "ternary": Row(after(lambda comm: hpccomm.without_feedback(hpccomm.ternary(), comm)), (2,)),
    "low rank": Row(after(lambda comm: hpccomm.feedback(hpccomm.low_rank(2), comm)), (2,)),
    "onebit_sgd": Row(after(lambda comm: hpccomm.onebit_sgd(comm, BUCKET)), (2,)),
    "ef_signsgd": Row(lambda comm: hpccomm.ef_signsgd(comm, lambda t: 0.05 / (t + 1), BUCKET), (2,)),
    "block_mean": Row(after(hpccomm.block_mean), (2,)),
    "block_mean int4": Row(after(lambda comm: hpccomm.block_mean(comm, "int4", feedback=False)), (2,)),
    "block_mean mx": Row(after(lambda comm: hpccomm.block_mean(comm, "mx")), (2,)),
    "dgc": Row(
        lambda comm: chain(
            hpccomm.dgc(comm, BUCKET, 0.05, warmup=4, stages=(1.0, 0.1), smallest=1, momentum=0.5, clip=5.0),
            descend(0.05),
        ),
        (1, 3, 6),
    ),
    "powersgd": Row(after(lambda comm: hpccomm.powersgd(comm, BUCKET, 2, start_dense_steps=2)), (1, 4)),
    "onebit_adam": Row(lambda comm: hpccomm.onebit_adam(comm, 0.05, 3, bucket=BUCKET, eps=1e-3), (2, 5)),
    "onebit_adam whole": Row(lambda comm: hpccomm.onebit_adam(comm, 0.05, 3, eps=1e-3), (2, 5)),
    "dgc leaders": Row(
        lambda comm: chain(hpccomm.dgc(comm, BUCKET, 0.05, smallest=1, exchange="leaders"), descend(0.05)), (2,)
    ),
    "onebit_lamb": Row(lambda comm: hpccomm.onebit_lamb(comm, BUCKET, 0.05, 3), (2, 5)),
    "local_sgd": Row(lambda comm: hpccomm.local_sgd(comm, HEAVY, 3), (1, 3, 4), 3),
    "post_local_sgd": Row(lambda comm: hpccomm.post_local_sgd(comm, HEAVY, 3, 3), (2, 3, 4, 6), 3),
    "bmuf": Row(lambda comm: hpccomm.bmuf(comm, HEAVY, 3, warmup=3, nesterov="paper"), (2, 3, 4, 6), 3),
    "bmuf sharded": Row(lambda comm: hpccomm.bmuf(comm, HEAVY, 3, warmup=3, shard_state=True), (2, 3, 4, 6), 3),
    "bmuf_adam": Row(lambda comm: hpccomm.bmuf_adam(comm, 0.05, 3, warmup=3), (2, 3, 4, 6), 3),
    "slowmo": Row(lambda comm: hpccomm.slowmo(comm, HEAVY, 0.05, 3, warmup=3), (2, 3, 4, 6), 3),
    "diloco": Row(lambda comm: hpccomm.diloco(comm, HEAVY, 3), (1, 3, 4), 3),
    "hybrid": Row(
        lambda comm: hpccomm.hybrid(comm, lambda group: hpccomm.gtc(group, 0.5), HEAVY, 2, period=3, warmup=3),
        (2, 3, 4, 6),
        3,
    ),
    "hybrid flush": Row(
        lambda comm: hpccomm.hybrid(
            comm, lambda group: hpccomm.powersgd(group, BUCKET, 2), HEAVY, 2, period=3, residual="flush"
        ),
        (1, 3, 4),
        3,
    ),
}
CASES = [(name, at) for name, row in METHODS.items() for at in row.phases]
SIZES, NODES = [1, 2, 4], {1: [0], 2: [0, 1], 4: [0, 0, 1, 1]}


def gradient_of(rank: int, number: int) -> Any:
    return np.random.default_rng([rank, number]).normal(size=N).astype(F32)


def is_possible(name: str, size: int) -> bool:
    """A hybrid of groups of two needs an even number of ranks."""
    return size % 2 == 0 or not name.startswith("hybrid")


def advance(method: Transform, state: Any, weights: Any, rank: int, first: int, last: int) -> tuple[Any, Any]:
    """Steps from ``first`` up to ``last``."""
    for number in range(first, last):
        step, state = method.update(gradient_of(rank, number), state, weights)
        weights = weights + step
    return weights, state


def is_equal(left: Any, right: Any) -> bool:
    """The same numbers at every path, times and scratch apart."""
    scratch = ("seconds", "spare")
    pairs = zip(leaves(left), leaves(right), strict=True)
    return all(a == b and (a.endswith(scratch) or np.array_equal(x, y)) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(("name", "at"), CASES)
@pytest.mark.parametrize("size", SIZES)
def test_a_loaded_run_and_a_snapshot_take_the_same_steps(name: str, at: int, size: int, tmp_path: Path) -> None:
    """From each phase, into the next ones; the gradient and the weights are not written."""

    def body(comm: Any) -> None:
        method = METHODS[name].make(comm)
        weights, state = advance(method, method.init(np.ones(N, F32)), np.ones(N, F32), comm.rank, 0, at)
        file = tmp_path / f"{size}.{comm.rank}.npz"
        hpccomm.save(file, weights=weights, state=state)
        kept, wanted = snapshot(state), None
        for start in ("live", "snapshot", "loaded"):
            if start == "loaded":
                again = METHODS[name].make(comm)
                weights, state = hpccomm.load(file, weights=weights, state=again.init(np.ones(N, F32)))
            else:
                again, state = method, state if start == "live" else snapshot(kept)
            assert is_equal(state, kept)
            reached, _ = advance(again, state, weights.copy(), comm.rank, at, at + 7)
            wanted = reached if wanted is None else wanted
            assert np.array_equal(reached, wanted), start
        assert np.isfinite(wanted).all()

    if is_possible(name, size):
        run_on_ranks(size, body, nodes=NODES[size])


@pytest.mark.parametrize("name", METHODS)
def test_neither_gradient_nor_weights_are_written(name: str) -> None:
    def body(comm: Any) -> None:
        method, weights = METHODS[name].make(comm), np.ones(N, F32)
        weights.flags.writeable = False
        state = method.init(weights)
        for number in range(8):
            gradient = gradient_of(comm.rank, number)
            gradient.flags.writeable = False
            _, state = method.update(gradient, state, weights)

    run_on_ranks(4, body, nodes=NODES[4])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_hold_the_same_weights_when_they_have_agreed(name: str, size: int) -> None:
    row = METHODS[name]

    def body(comm: Any) -> list[bytes]:
        method, weights, seen = row.make(comm), np.ones(N, F32), []
        state = method.init(weights)
        for number in range(12):
            weights, state = advance(method, state, weights, comm.rank, number, number + 1)
            if (number + 1) % row.repeats == 0:
                seen.append(weights.tobytes())
        return seen

    if is_possible(name, size):
        found = run_on_ranks(size, body, nodes=NODES[size])
        assert all(each == found[0] for each in found)


@pytest.mark.parametrize(("name", "at"), CASES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("size", SIZES)
def test_one_gradient_that_is_not_finite_harms_no_rank(name: str, at: int, bad: float, size: int) -> None:
    """Exchanges skip it, methods of local steps return to the start of the block: all stays finite, ranks agree."""
    row = METHODS[name]

    def body(comm: Any) -> bytes:
        method = row.make(comm)
        weights, state = advance(method, method.init(np.ones(N, F32)), np.ones(N, F32), comm.rank, 0, at)
        gradient = gradient_of(comm.rank, at)
        gradient[7] = bad if comm.rank == size - 1 else gradient[7]
        with np.errstate(invalid="ignore", over="ignore"):
            step, state = method.update(gradient, state, weights)
            weights = weights + step
            weights, state = advance(method, state, weights, comm.rank, at + 1, at + 12)
            if isinstance(method, PeriodicTransform):
                step, state = method.finish(state, weights)
                weights = weights + step
        if size > 1 or row.repeats == 1:
            assert np.isfinite(weights).all()
            for path, leaf in leaves(state):
                buffer = path.endswith(("total", "spare")) or "inner_start" in path
                assert buffer or np.isfinite(leaf).all(), path
        return weights.tobytes()

    if is_possible(name, size):
        assert len(set(run_on_ranks(size, body, nodes=NODES[size]))) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("zeros", ["first", "every other", "always"])
def test_gradients_of_zero_stop_nothing(name: str, zeros: str) -> None:
    """Zero gradients give finite steps, and a gradient that comes after them is followed."""

    def body(comm: Any) -> None:
        method, start = METHODS[name].make(comm), np.ones(N, F32)
        weights, state = start.copy(), method.init(start)
        for number in range(40):
            none = {"first": number == 0, "every other": number % 2 == 0, "always": True}[zeros]
            step, state = method.update(np.full(N, 0 if none else 1, F32), state, weights)
            weights = weights + step
            assert np.isfinite(weights).all()
        if zeros != "always":
            assert (weights < start).mean() > 0.8

    run_on_ranks(2, body, nodes=NODES[2])


@pytest.mark.parametrize(("name", "at"), CASES)
@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2)])
def test_another_number_of_ranks_goes_on_from_each_phase(name: str, at: int, old: int, new: int) -> None:
    """States are divided anew outside of blocks, refused inside; all new ranks step alike and stay finite."""
    row = METHODS[name]

    def first(comm: Any) -> Any:
        method = row.make(comm)
        return advance(method, method.init(np.ones(N, F32)), np.ones(N, F32), comm.rank, 0, at)

    found = run_on_ranks(old, first, nodes=NODES[old])
    states = [each[1] for each in found]
    if any(getattr(state, "steps", 0) for state in states) and row.repeats > 1:
        with pytest.raises(ArgumentError, match="into a block"):
            hpccomm.for_ranks(states, 0, new)
        return

    def then(comm: Any) -> bytes:
        method = row.make(comm)
        state = hpccomm.for_ranks(states, comm.rank, comm.size)
        blank = method.init(np.ones(N, F32))
        for (path, left), (_, right) in zip(leaves(state), leaves(blank), strict=True):
            assert np.shape(left) == np.shape(right), path
        weights, state = advance(method, state, found[0][0].copy(), comm.rank, at, at + 9)
        if isinstance(method, PeriodicTransform):
            step, state = method.finish(state, weights)
            weights = weights + step
        assert np.isfinite(weights).all()
        return weights.tobytes()

    assert len(set(run_on_ranks(new, then, nodes=NODES[new]))) == 1


OWN = (RankChange.UNSENT, RankChange.LOCAL, RankChange.SHARDED, RankChange.BLOCK)
"""What makes a state that of one rank."""


@pytest.mark.parametrize("name", METHODS)
def test_a_file_of_another_number_of_ranks_is_refused_where_states_are_a_rank_s_own(name: str, tmp_path: Path) -> None:
    """Their files, loaded with ``other_ranks``, are for ``for_ranks``; older files, which count no ranks, are read."""
    row, vector = METHODS[name], np.ones(N, F32)

    def first(comm: Any) -> Any:
        method = row.make(comm)
        state = advance(method, method.init(vector), vector, comm.rank, 0, 4 * row.repeats)[1]
        hpccomm.save(tmp_path / f"{comm.rank}.npz", method=state)
        return snapshot(state)

    def then(comm: Any) -> None:
        like = row.make(comm).init(vector)
        if not any(change in OWN for _, _, change in leaves_with_changes(like)):
            hpccomm.load(tmp_path / f"{comm.rank}.npz", method=like)
            return
        with pytest.raises(ArgumentError, match=r"by one of 4 ranks, .* between 2 ranks \(.*\): save with save_set"):
            hpccomm.load(tmp_path / f"{comm.rank}.npz", method=like)
        olds = [hpccomm.load(tmp_path / f"{k}.npz", other_ranks=True, method=like)[0] for k in range(4)]
        wanted = dict(leaves(hpccomm.for_ranks(states, comm.rank, 2)))
        for path, leaf in leaves(hpccomm.for_ranks(olds, comm.rank, 2)):
            assert np.array_equal(leaf, wanted[path]), path
        found = hpccomm.for_ranks(olds, comm.rank, 2, like)
        assert [leaf for path, leaf in group_sizes(found)] == [leaf for path, leaf in group_sizes(like)]
        hpccomm.save(tmp_path / f"new{comm.rank}.npz", method=found)
        hpccomm.load(tmp_path / f"new{comm.rank}.npz", method=like)
        counted = [path for path, _, change in leaves_with_changes(like) if change is RankChange.GROUP]
        older = {path: leaf for path, leaf in state_dict(like).items() if path not in counted}
        assert list(leaves(load_state_dict(like, older)))

    states = run_on_ranks(4, first, nodes=NODES[4])
    run_on_ranks(2, then, nodes=NODES[2])


@pytest.mark.parametrize("name", METHODS)
def test_every_state_can_be_reported_and_takes_trees(name: str) -> None:
    def body(comm: Any) -> None:
        method, vector = METHODS[name].make(comm), np.ones(N, F32)
        tree = {key: each.copy() for key, each in BUCKET.views(vector).items()}
        states = method.init(vector), method.init(tree)
        for number in range(4):
            gradient = gradient_of(comm.rank, number)
            step, one = method.update(gradient, states[0], vector)
            steps, other = method.update(BUCKET.views(gradient), states[1], tree)
            states = one, other
            assert np.array_equal(BUCKET.flatten(steps), np.asarray(step))
        found = [hpccomm.report(each) for each in states]
        assert found[0].messages == found[1].messages
        assert found[0].cost.wire_bytes == found[1].cost.wire_bytes > 0
        assert found[0].messages.residual_norm >= 0

    run_on_ranks(2, body, nodes=NODES[2])


# Models whose states are sharded over the ranks


class ShardedRow(NamedTuple):
    """A sharded model, and how many ranks may take which steps."""

    make: Callable[[Any], ShardedModel]
    same_steps: bool = True
    """Whether any number of ranks takes the same steps, to the bit; else norms or codes depend on the division."""


SIXTEEN: dict[str, Any] = {"dtype": "f2", "loss_scale": LossScale(4.0, 3)}
TRIO: dict[str, Any] = {"weight_code": "int8", "gradient_code": "int8", "secondary_shard": True}
SHARDED_MODELS: dict[str, ShardedRow] = {
    "mics": ShardedRow(lambda comm: hpccomm.mics(comm, units(), adamw(0.05), 2)),
    "mics of one": ShardedRow(lambda comm: hpccomm.mics(comm, units(), adamw(0.05), 1)),
    "mics momentum": ShardedRow(lambda comm: hpccomm.mics(comm, units(), HEAVY, 2)),
    "mics 16 bits": ShardedRow(lambda comm: hpccomm.mics(comm, units(), adamw(0.05), 2, **SIXTEEN)),
    "mics lamb": ShardedRow(lambda comm: hpccomm.mics(comm, units(), lamb_of, 2), False),
    "mics clipped": ShardedRow(lambda comm: hpccomm.mics(comm, units(), HEAVY, 2, max_norm=1.0), False),
    "zero 1": ShardedRow(lambda comm: hpccomm.zero(comm, units(), adamw(0.05), stage=1)),
    "zero 2": ShardedRow(lambda comm: hpccomm.zero(comm, units(), adamw(0.05), stage=2, **SIXTEEN)),
    "zero 3": ShardedRow(lambda comm: hpccomm.zero(comm, units(), adamw(0.05), offload=True)),
    "zero++": ShardedRow(lambda comm: hpccomm.zero(comm, units(), adamw(0.05), **SIXTEEN, **TRIO), False),
    "data parallel": ShardedRow(lambda comm: hpccomm.data_parallel(comm, units(), adamw(0.05))),
}
SHARDED_NODES = {2: [0, 0], 4: [0, 0, 1, 1], 8: [0, 0, 0, 0, 1, 1, 1, 1]}


def units() -> dict[str, dict[str, Any]]:
    return {"first": {"w": np.ones((12, 10), F32), "bias": np.ones(5, F32)}, "last": {"w": np.ones((5, 3), F32)}}


def lamb_of(bucket: Any, reduce: Any) -> Transform:
    return hpccomm.lamb(bucket, 0.05, norm_reduce=reduce)


def shard_steps(model: ShardedModel, rank: int, first: int, last: int, fill: float | None = None) -> list[Outcome]:
    """Steps of two micro-steps, whose sums are exact and whose means are the same on 2, 4 and 8 ranks."""
    found = []
    for number in range(first, last):
        for micro in range(2):
            for unit, tensors in units().items():
                rng = np.random.default_rng([number, micro, len(unit)])
                values = {name: rng.integers(-8, 9, w.shape) / 4 + rank % 2 / 2 for name, w in tensors.items()}
                given = {name: each if fill is None else np.full_like(each, fill) for name, each in values.items()}
                scaled = {name: (each * model.loss_scale.value).astype(model.dtype) for name, each in given.items()}
                model.reduce_accumulate(unit, scaled)
        found.append(model.boundary())
    return found


def whole_of(model: ShardedModel) -> bytes:
    """All weights."""
    return b"".join(each.tobytes() for _, tensors in model.consolidate() for each in tensors.values())


@pytest.mark.parametrize("name", SHARDED_MODELS)
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("new", [2, 4, 8])
def test_a_sharded_model_goes_on_from_its_files_on_any_number_of_ranks(
    name: str, at: int, new: int, tmp_path: Path
) -> None:
    row = SHARDED_MODELS[name]

    def body(comm: Any, goes_on: bool) -> tuple[bytes, bytes, LossScale]:
        model = row.make(comm)
        if goes_on:
            assert hpccomm.load_shards(tmp_path, "run", model) == {}
        else:
            shard_steps(model, comm.rank, 0, at)
            hpccomm.save_shards(tmp_path, "run", model)
        kept = whole_of(model)
        shard_steps(model, comm.rank, at, at + 3)
        found = kept, whole_of(model), model.loss_scale
        model.close()
        return found

    wanted = run_on_ranks(4, lambda comm: body(comm, False), nodes=SHARDED_NODES[4])
    found = run_on_ranks(new, lambda comm: body(comm, True), nodes=SHARDED_NODES[new])
    assert all(each == wanted[0] for each in wanted)
    assert all(each == found[0] for each in found)
    assert (found[0][0], found[0][2]) == (wanted[0][0], wanted[0][2])
    if row.same_steps or new == 4:
        assert found[0][1] == wanted[0][1]
    assert np.isfinite(np.frombuffer(found[0][1], F32)).all()


@pytest.mark.parametrize("name", SHARDED_MODELS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sharded_model_skips_a_gradient_that_is_not_finite(name: str, bad: float) -> None:
    def body(comm: Any) -> bytes:
        model = SHARDED_MODELS[name].make(comm)
        shard_steps(model, comm.rank, 0, 2)
        before, factor = whole_of(model), model.loss_scale.value
        with np.errstate(invalid="ignore"):
            (outcome,) = shard_steps(model, comm.rank, 2, 3, bad if comm.rank == comm.size - 1 else None)
        assert outcome.overflow
        assert model.loss_scale.value == (factor / 2 if model.loss_scale.interval else factor)
        assert whole_of(model) == before
        assert not any(each.overflow for each in shard_steps(model, comm.rank, 3, 6))
        found = whole_of(model)
        model.close()
        assert np.isfinite(np.frombuffer(found, F32)).all()
        assert found != before
        return found

    assert len(set(run_on_ranks(4, body, nodes=SHARDED_NODES[4]))) == 1


@pytest.mark.parametrize("name", SHARDED_MODELS)
@pytest.mark.parametrize("zeros", ["first", "every other", "always"])
def test_gradients_of_zero_stop_no_sharded_model(name: str, zeros: str) -> None:
    def body(comm: Any) -> None:
        model = SHARDED_MODELS[name].make(comm)
        for number in range(12):
            none = {"first": number == 0, "every other": number % 2 == 0, "always": True}[zeros]
            shard_steps(model, comm.rank, number, number + 1, 0.0 if none else 1.0)
        weights = np.frombuffer(whole_of(model), F32)
        model.close()
        assert np.isfinite(weights).all()
        if zeros != "always":
            assert (weights < 1).all()

    run_on_ranks(2, body, nodes=SHARDED_NODES[2])


def test_the_table_has_every_method() -> None:
    """A public name that takes a communicator and makes a transform is used by a row, or is a part of others."""
    source = Path(__file__).read_text()
    makers = [name for name in hpccomm.__all__ if "comm: MPI.Intracomm" in signature_of(name)]
    assert {"gtc", "bmuf", "mean"} <= set(makers)
    missing = [name for name in (*makers, *SHARDED[:-1]) if f"hpccomm.{name}" not in source]
    assert missing == []


SHARDED = ("mics", "zero", "data_parallel", "ParameterServer")
"""Names whose states live in objects: sharded models have a table of their own, the parameter server has own tests."""


def signature_of(name: str) -> str:
    import inspect

    made = getattr(hpccomm, name)
    if name in SHARDED or not inspect.isfunction(made) or not made.__module__.startswith("hpccomm.algorithms"):
        return ""
    return ", ".join(f"{each.name}: {each.annotation}" for each in inspect.signature(made).parameters.values())
