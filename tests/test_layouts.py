"""A vector has no names: where ranks hold other tensors, or in another order, no gradient is added to another one's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import hpccomm
from hpccomm.algorithms import agreement, trees
from hpccomm.algorithms.parameter_server import ParameterServer
from hpccomm.algorithms.sharded.groups import mics
from hpccomm.algorithms.sharded.units import data_parallel, zero
from hpccomm.algorithms.transforms import Transform, can_flush, chain, descend, momentum, scale
from hpccomm.errors import MismatchError
from hpccomm.testing import run_on_ranks

Tree = dict[str, Any]
TENSORS: Tree = {"a": np.zeros((2, 3), "f4"), "b": np.zeros((3, 2), "f4")}
OTHERS: dict[str, tuple[Tree, str]] = {
    "order": (dict(reversed(TENSORS.items())), r"'b' float32\[3, 2\] on rank 1, 'a' float32\[2, 3\] on rank 0"),
    "name": ({**{"c": TENSORS["a"]}, "b": TENSORS["b"]}, r"'c' float32\[2, 3\] on rank 1, 'a'"),
    "shape": (
        {**TENSORS, "b": np.zeros((2, 3), "f4")},
        r"'b' float32\[2, 3\] on rank 1, 'b' float32\[3, 2\] on rank 0",
    ),
    "dtype": (
        {name: each.astype("f8") for name, each in TENSORS.items()},
        r"'a' float64\[2, 3\] on rank 1, 'a' float32",
    ),
    "one more": ({**TENSORS, "c": np.zeros(1, "f4")}, r"'c' float32\[1\] on rank 1, (nothing|rows \['b'\]) on rank 0"),
}
"""The tensors of rank 1, and the first difference."""


def begin(method: Callable[[Any], Transform]) -> Callable[[Any, Tree], Any]:
    """The method's state for a tree."""
    return lambda comm, tree: method(comm).init(tree)


def begin_flat(
    method: Callable[[Any, hpccomm.Bucket], Transform], make: Callable[[Any], Any] = np.asarray
) -> Callable[[Any, Tree], Any]:
    """The method's state for the vector of a bucket, which ``make`` converts to a library."""

    def init(comm: Any, tree: Tree) -> Any:
        bucket = hpccomm.Bucket(tree)
        return method(comm, bucket).init(make(bucket.flatten(tree)))

    return init


def update_first(comm: Any, tree: Tree) -> Any:
    """The first call of a method is an update, with a state of another one."""
    method = hpccomm.mean(comm)
    return method.update(tree, method.init(np.zeros(12, "f4")), tree)


def torch_tensor(vector: Any) -> Any:
    """The vector as PyTorch's tensor."""
    return pytest.importorskip("torch").from_numpy(vector)


STEP = chain(momentum(0.5), scale(-0.1))
FLAT: dict[str, Callable[[Any, hpccomm.Bucket], Transform]] = {
    "dgc": hpccomm.dgc,
    "powersgd": hpccomm.powersgd,
    "onebit_sgd": hpccomm.onebit_sgd,
    "onebit_lamb": lambda comm, bucket: hpccomm.onebit_lamb(comm, bucket, 0.1, 3),
    "mean_rows": lambda comm, bucket: hpccomm.mean_rows(comm, bucket, ["b"]),
    "mean of a bucket": lambda comm, bucket: chain(hpccomm.mean(comm), bucket=bucket),
    "gtc of a bucket": lambda comm, bucket: chain(hpccomm.gtc(comm), STEP, bucket=bucket),
    "bmuf of a bucket": lambda comm, bucket: hpccomm.bmuf(comm, chain(STEP, bucket=bucket), 4),
    "synchronous_sgd": lambda comm, bucket: hpccomm.synchronous_sgd(comm, 0.1, bucket=bucket),
    "lars": lambda comm, bucket: chain(hpccomm.mean(comm), hpccomm.lars(bucket, 0.1)),
    "bmuf of lamb": lambda comm, bucket: hpccomm.bmuf(comm, hpccomm.lamb(bucket, 0.1), 4),
}
BEGINNINGS: dict[str, Callable[[Any, Tree], Any]] = {
    "mean": begin(hpccomm.mean),
    "chain": begin(lambda comm: chain(hpccomm.mean(comm), STEP)),
    "synchronous_adam": begin(lambda comm: hpccomm.synchronous_adam(comm, 0.1)),
    "every": begin(lambda comm: hpccomm.every(2, hpccomm.mean(comm))),
    "apply_if_finite": begin(lambda comm: chain(hpccomm.mean(comm), hpccomm.apply_if_finite(STEP))),
    "scale_loss": begin(lambda comm: hpccomm.scale_loss(comm, hpccomm.mean(comm))),
    "gtc": begin(hpccomm.gtc),
    "block_mean": begin(hpccomm.block_mean),
    "block_mean without feedback": begin(lambda comm: hpccomm.block_mean(comm, feedback=False)),
    "without_feedback": begin(lambda comm: hpccomm.without_feedback(hpccomm.qsgd(), comm)),
    "onebit_adam": begin(lambda comm: hpccomm.onebit_adam(comm, 0.1, 3)),
    "ef_signsgd": begin(lambda comm: hpccomm.ef_signsgd(comm, 0.1)),
    "local_sgd": begin(lambda comm: hpccomm.local_sgd(comm, STEP, 4)),
    "bmuf": begin(lambda comm: hpccomm.bmuf(comm, STEP, 4)),
    "diloco": begin(lambda comm: hpccomm.diloco(comm, STEP, 4)),
    "hybrid": begin(lambda comm: hpccomm.hybrid(comm, hpccomm.gtc, STEP, 1)),
    **{name: begin_flat(method) for name, method in FLAT.items()},
    **{f"{name}, PyTorch": begin_flat(method, torch_tensor) for name, method in FLAT.items()},
    "the first update": update_first,
    "data_parallel": lambda comm, tree: data_parallel(comm, {"unit": tree}, STEP),
    "zero": lambda comm, tree: zero(comm, {"unit": tree}, STEP),
    "mics": lambda comm, tree: mics(comm, {"unit": tree}, STEP, 1),
    "a parameter server": lambda comm, tree: ParameterServer(
        comm, (bucket := hpccomm.Bucket(tree)).flatten(tree), STEP, rows=(bucket, ["b"])
    ),
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("name", BEGINNINGS)
def test_other_tensors_on_a_rank_are_named_before_the_first_gradient_travels(name: str, what: str) -> None:
    other, why = OTHERS[what]

    def body(comm: Any) -> None:
        with pytest.raises(
            MismatchError, match=rf"rank {comm.rank}: .*the tensors of rank 1 differ.*{why}.*: pass the"
        ):
            BEGINNINGS[name](comm, other if comm.rank == 1 else TENSORS)

    run_on_ranks(3, body)


@pytest.mark.parametrize("name", FLAT)
def test_vectors_on_a_device_are_compared_by_their_bucket(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the host that are taken to lie on a device."""
    vectors: list[Any] = []
    monkeypatch.setattr(trees, "is_on_device", lambda x: any(x is each for each in vectors))
    monkeypatch.setattr(trees, "as_cupy", lambda tensor: tensor.numpy())

    def make(vector: Any) -> Any:
        vectors.append(torch_tensor(vector))
        return vectors[-1]

    def body(comm: Any) -> None:
        with pytest.raises(MismatchError, match="the tensors of rank 1 differ"):
            begin_flat(FLAT[name], make)(comm, OTHERS["order"][0] if comm.rank == 1 else TENSORS)

    run_on_ranks(2, body)


@pytest.mark.parametrize("make", [data_parallel, zero])
@pytest.mark.parametrize(
    ("units", "why"),
    [
        (["two", "one"], "number 1 is unit 'two' on rank 1, unit 'one' on rank 0"),
        (["one"], "unit 1: .* number 1 is unit nothing on rank 1, unit 'two' on rank 0"),
    ],
)
def test_units_in_another_order_or_number_are_named(make: Any, units: list[str], why: str) -> None:
    def body(comm: Any) -> None:
        mine = units if comm.rank == 1 else ["one", "two"]
        with pytest.raises(MismatchError, match=why):
            make(comm, {name: {"w": np.zeros(3, "f4")} for name in mine}, STEP)

    run_on_ranks(2, body)


def test_tied_weights_must_be_tied_on_all_ranks() -> None:
    def body(comm: Any) -> None:
        table = np.zeros((3, 2), "f4")
        units = {"one": {"w": table}, "two": {"w": table if comm.rank else table.copy()}}
        with pytest.raises(MismatchError, match=r"'w' tied to one.w on rank 1, 'w' float32"):
            zero(comm, units, STEP)

    run_on_ranks(2, body)


Grid = Callable[[Any, Any], list[Any]]
"""The communicators of a method on four ranks: two nodes of two."""
GRIDS: dict[str, tuple[Grid, int, list[int]]] = {
    "nodes, then their first ranks": (lambda node, across: [node, across] if node.rank == 0 else [node], 2, [0, 2, 3]),
    "rows, then columns": (lambda node, across: [node, across], 3, [1, 2, 3]),
}
"""The odd rank, and the ranks that raise: those of each communicator that the odd rank is in."""


@pytest.mark.parametrize("name", GRIDS)
def test_ranks_of_every_communicator_hear_of_other_tensors(name: str) -> None:
    grid, odd, told = GRIDS[name]

    def body(comm: Any) -> str:
        node, across = (comm.Split(color, comm.rank) for color in (comm.rank // 2, comm.rank % 2))
        method = chain(*map(hpccomm.mean, grid(node, across)))
        try:
            method.init(OTHERS["name"][0] if comm.rank == odd else TENSORS)
        except MismatchError as error:
            return str(error)
        return ""

    assert [rank for rank, problem in enumerate(run_on_ranks(4, body)) if problem] == told


def test_ranks_that_agree_on_one_flag_may_hold_other_tensors() -> None:
    """Stages of a pipeline: each exchanges its own tensors, all skip a step together."""

    def body(comm: Any) -> tuple[list[float], float]:
        stage = comm.Split(comm.rank // 2, comm.rank)
        weights = {f"stage {comm.rank // 2}": np.zeros(1 + comm.rank // 2, "f4")}
        inner = chain(hpccomm.mean(stage), scale(-1.0))
        method = hpccomm.scale_loss(comm, hpccomm.every(1, inner), hpccomm.LossScale(2.0, 4))
        state = method.init(weights)
        for bad in (1.0, np.inf):
            gradient = {name: each + (bad if comm.rank == 3 else 1.0) for name, each in weights.items()}
            step, state = method.update(gradient, state, weights)
            weights = {name: each + step[name] for name, each in weights.items()}
        return next(iter(weights.values())).tolist(), hpccomm.loss_scale(state)

    assert run_on_ranks(4, body) == [([-0.5], 1.0)] * 2 + [([-0.5, -0.5], 1.0)] * 2


def test_stages_whose_parts_exchange_are_still_compared_inside_a_loss_scale() -> None:
    def body(comm: Any) -> None:
        stage = comm.Split(comm.rank // 2, comm.rank)
        method = hpccomm.scale_loss(comm, hpccomm.mean(stage))
        with pytest.raises(MismatchError, match="the tensors of rank 1 differ"):
            method.init({f"tensor {comm.rank}": np.zeros(1, "f4")})

    run_on_ranks(4, body)


METHODS: dict[str, Callable[[Any], Transform]] = {
    "momentum": lambda comm: chain(hpccomm.mean(comm), STEP),
    "gtc": lambda comm: chain(hpccomm.gtc(comm, 0.5), STEP),
    "dgc": lambda comm: chain(hpccomm.dgc(comm, hpccomm.Bucket(TENSORS), 0.5, smallest=1), descend(0.1)),
    "bmuf": lambda comm: hpccomm.bmuf(comm, STEP, 2),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("turned", ["gradient", "weights", "gradient and weights"])
def test_trees_in_another_order_on_one_rank_are_matched_by_name(name: str, turned: str) -> None:
    """In any update, also a flush and the end of a block: the state has the order of the first tree."""

    def body(comm: Any, turns: bool) -> dict[str, Any]:
        method, weights = METHODS[name](comm), {key: each + 1 for key, each in TENSORS.items()}
        state = method.init(weights)

        def order(tree: Tree, what: str) -> Tree:
            return dict(reversed(tree.items())) if turns and what in turned else tree

        for number in range(4):
            draw = np.random.default_rng((comm.rank, number))
            gradient = {key: draw.integers(-8, 8, each.shape).astype("f4") for key, each in TENSORS.items()}
            weights = order(weights, "weights")
            step, state = method.update(order(gradient, "gradient"), state, weights)
            assert list(step) == list(weights)
            weights = {key: weights[key] + step[key] for key in TENSORS}
        if can_flush(method):
            step, state = hpccomm.flush(method, state, order(weights, "weights"))
            weights = {key: weights[key] + step[key] for key in TENSORS}
        return weights

    found, wanted = (run_on_ranks(2, lambda comm, turns=turns: body(comm, turns)) for turns in (True, False))
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(np.array_equal(ours[key], theirs[key]) for key in TENSORS)


def test_tensors_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps cost nothing; a second state of the same tensors neither, also where one rank alone makes it."""
    calls: list[int] = []

    def count(comm: Any, *rest: Any) -> str:
        calls.append(comm.rank)
        return agreement.find_difference(comm, *rest)

    monkeypatch.setattr(trees, "find_difference", count)

    def body(comm: Any) -> None:
        method = chain(hpccomm.mean(comm), STEP)
        state = method.init(TENSORS)
        for _ in range(3):
            _, state = method.update(TENSORS, state, TENSORS)
        if comm.rank == 0:
            method.init(TENSORS)

    run_on_ranks(3, body)
    assert sorted(calls) == [0, 1, 2]
