"""Methods take tensors of any library, alone or in dicts, lists and tuples, and give steps of the same form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm.algorithms.transforms import Transform, chain, descend, momentum, scale
from hpccomm.errors import ArgumentError
from hpccomm.testing import run_on_ranks

SHAPES = {"w": (3, 2), "b": (2,), "s": ()}


class Layer(NamedTuple):
    w: Any
    b: Any
    s: Any


def numpy_array(x: Any) -> Any:
    return np.array(x)


def torch_tensor(x: Any) -> Any:
    return pytest.importorskip("torch").from_numpy(np.array(x))


def torch_parameter(x: Any) -> Any:
    return torch_tensor(x).requires_grad_()


def jax_array(x: Any) -> Any:
    return pytest.importorskip("jax.numpy").asarray(x)


LIBRARIES = {"numpy": numpy_array, "torch": torch_tensor, "parameter": torch_parameter, "jax": jax_array}
FORMS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dict": lambda tensors: tensors,
    "list": lambda tensors: list(tensors.values()),
    "tuple": lambda tensors: tuple(tensors.values()),
    "named tuple": lambda tensors: Layer(**tensors),
    "nested": lambda tensors: {"layer": [tensors["w"], {"b": tensors["b"]}], "s": tensors["s"]},
}


def tensors_of(seed: int, make: Callable[[Any], Any]) -> dict[str, Any]:
    """Tensors with a few bits each, so that sums are exact."""
    draw = np.random.default_rng(seed)
    return {name: make(draw.integers(-8, 8, shape).astype("f4")) for name, shape in SHAPES.items()}


def vector_of(tree: Any) -> Any:
    """All elements in the order of the leaves."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return np.concatenate([vector_of(each) for each in tree])
    return np.asarray(tree.detach() if hasattr(tree, "detach") else tree).reshape(-1)


METHODS: dict[str, Callable[[Any], Transform]] = {
    "mean": hpccomm.mean,
    "momentum": lambda comm: chain(momentum(0.5), descend(0.5)),
    "topk": lambda comm: chain(hpccomm.feedback(hpccomm.topk(0.5), comm), scale(-0.5)),
    "bmuf": lambda comm: hpccomm.bmuf(comm, scale(-0.5), 2, momentum=0.5),
    "bmuf, warm-up": lambda comm: hpccomm.bmuf(comm, scale(-0.5), 2, momentum=0.5, warmup=1),
}


def steps_of(method: Transform, given: Callable[[dict[str, Any]], Any], make: Callable[[Any], Any], rank: int) -> Any:
    """Three steps, the weights standing still."""
    weights, found = given(tensors_of(9, make)), []
    state = method.init(weights)
    for number in range(3):
        step, state = method.update(given(tensors_of(10 * rank + number, make)), state, weights)
        found.append(step)
    return found


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", METHODS)
def test_steps_of_trees_are_those_of_their_vector(name: str, form: str, library: str) -> None:
    def steps(comm: Any) -> None:
        found = steps_of(METHODS[name](comm), FORMS[form], LIBRARIES[library], comm.rank)
        wanted = steps_of(METHODS[name](comm), vector_of, numpy_array, comm.rank)
        like = FORMS[form](tensors_of(0, LIBRARIES[library]))
        for step, vector in zip(found, wanted, strict=True):
            assert np.array_equal(vector_of(step), np.asarray(vector))
            assert type(step) is type(like)
            check_alike(step, like)

    run_on_ranks(2, steps)


def check_alike(step: Any, like: Any) -> None:
    """The same form, shapes and libraries, without a history of gradients."""
    if isinstance(like, dict):
        assert list(step) == list(like)
        step, like = list(step.values()), list(like.values())
    if isinstance(like, list | tuple):
        for each, other in zip(step, like, strict=True):
            check_alike(each, other)
    else:
        libraries = {each.__module__.split(".")[0] for each in type(step).__mro__}
        assert type(like).__module__.split(".")[0] in libraries
        assert (step.shape, step.dtype) == (like.shape, like.dtype)
        assert not getattr(step, "requires_grad", False)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (2, 0)])
@pytest.mark.parametrize("library", ["torch", "parameter", "jax"])
def test_a_tensor_gives_a_tensor_of_its_shape(library: str, shape: tuple[int, ...]) -> None:
    def average(comm: Any) -> None:
        tensor = LIBRARIES[library](np.full(shape, 2.0 * comm.rank, "f4"))
        method = hpccomm.mean(comm)
        step, _ = method.update(tensor, method.init(tensor), tensor)
        assert step.shape == shape
        assert np.array_equal(vector_of(step), np.ones(int(np.prod(shape)), "f4"))
        check_alike(step, tensor)

    run_on_ranks(2, average)


def test_bfloat16_tensors_are_averaged_in_float32() -> None:
    torch = pytest.importorskip("torch")

    def average(comm: Any) -> None:
        tensor = torch.full((3,), 1 + comm.rank / 128, dtype=torch.bfloat16)
        method = hpccomm.mean(comm)
        step, _ = method.update(tensor, method.init(tensor), tensor)
        assert step.dtype == torch.bfloat16
        assert step.tolist() == [1.0] * 3  # 1 + 1/256, to nearest even

    run_on_ranks(2, average)


def test_a_bucket_decides_the_order_of_a_dict() -> None:
    """The rows of the bucket, not of the dict, say which elements are whose."""
    bucket = hpccomm.Bucket({"a": (2, 2), "b": (3,)})
    method = hpccomm.lars(bucket, 1.0, trust=0.5)
    weights = {"b": np.full(3, 2.0, "f4"), "a": np.full((2, 2), 3.0, "f4")}
    gradient = {"a": np.ones((2, 2), "f4"), "b": np.ones(3, "f4")}
    step, _ = method.update(gradient, method.init(weights), weights)
    assert list(step) == ["b", "a"]
    assert step["b"].tolist() == [-1.0] * 3  # biases do not adapt
    assert step["a"].tolist() == [[-1.5, -1.5]] * 2  # 0.5 · ‖w‖/‖g‖ = 1.5


def bucket_methods(comm: Any, bucket: hpccomm.Bucket) -> dict[str, Transform]:
    """Every method that knows tensors by name."""
    return {
        "lars": hpccomm.lars(bucket, 0.5),
        "lamb": hpccomm.lamb(bucket, 0.5),
        "dgc": hpccomm.dgc(comm, bucket, 0.5, smallest=1),
        "powersgd": hpccomm.powersgd(comm, bucket, 1),
        "onebit_sgd": hpccomm.onebit_sgd(comm, bucket),
        "ef_signsgd": hpccomm.ef_signsgd(comm, 0.5, bucket),
        "onebit_adam": hpccomm.onebit_adam(comm, 0.5, 1, bucket=bucket),
        "onebit_lamb": hpccomm.onebit_lamb(comm, bucket, 0.5, 1),
        "add_decayed_weights": hpccomm.add_decayed_weights(0.5, bucket),
        "scale_by_trust_ratio": hpccomm.scale_by_trust_ratio(bucket),
        "chain": chain(hpccomm.mean(comm), hpccomm.lars(bucket, 0.5)),
        "bmuf": hpccomm.bmuf(comm, hpccomm.lars(bucket, 0.5), 1),
        "hybrid": hpccomm.hybrid(comm, hpccomm.gtc, hpccomm.lars(bucket, 0.5), 1),
    }


@pytest.mark.parametrize("name", bucket_methods(MPI.COMM_SELF, hpccomm.Bucket({"w": (2, 2)})))
def test_methods_with_a_bucket_take_its_dict_in_any_order(name: str) -> None:
    tensors = tensors_of(1, numpy_array)
    method = bucket_methods(MPI.COMM_SELF, bucket := hpccomm.Bucket(tensors))[name]
    backwards = {key: tensors[key] for key in reversed(tensors)}
    vector = bucket.flatten(tensors)
    wanted, _ = method.update(vector, method.init(vector), vector)
    step, _ = method.update(tensors, method.init(backwards), backwards)
    assert list(step) == list(backwards)
    assert np.array_equal(bucket.flatten(step), wanted)
    with pytest.raises(ArgumentError, match="the weights: missing 'b', 's': pass"):
        method.init({"w": tensors["w"]})


def test_finish_and_export_give_trees() -> None:
    def train(comm: Any) -> None:
        tree = tensors_of(9, torch_tensor)
        method = hpccomm.bmuf(comm, scale(-0.5), 4, momentum=0.5)
        step, state = method.update(tensors_of(comm.rank, torch_tensor), method.init(tree), tree)
        tree = {name: tree[name] + step[name] for name in tree}
        step, state = method.finish(state, tree)
        model = method.export(state, tree)
        check_alike(step, tree)
        check_alike(model, tree)
        assert np.array_equal(vector_of(model), method.export(state))
        for name in tree:
            assert np.allclose(model[name], tree[name] + step[name])

    run_on_ranks(2, train)


def test_apply_writes_the_tensors() -> None:
    bucket = hpccomm.Bucket(tensors_of(1, numpy_array))
    method = hpccomm.lamb(bucket, 0.5)
    weights, gradient = tensors_of(1, torch_parameter), tensors_of(2, torch_tensor)
    before = vector_of(weights)
    step, _ = method.update(gradient, method.init(weights), weights)
    wanted = before + vector_of(step)
    method.apply(gradient, method.init(weights), weights)
    assert np.array_equal(vector_of(weights), wanted)
    with pytest.raises(ArgumentError, match="read-only"):
        method.apply(tensors_of(2, jax_array), method.init(before), tensors_of(1, jax_array))


MISTAKES: dict[str, tuple[Any, str]] = {
    "missing": ({"w": np.zeros((3, 2), "f4"), "b": np.zeros(2, "f4")}, "the gradient: missing 's': pass"),
    "extra": (dict(tensors_of(0, numpy_array), x=np.zeros(1, "f4")), "the gradient: unknown 'x': pass"),
    "shape": (dict(tensors_of(0, numpy_array), b=np.zeros(3, "f4")), "b has shape"),
    "dtype": (dict(tensors_of(0, numpy_array), b=np.zeros(2)), "b is float64"),
    "none": (dict(tensors_of(0, numpy_array), b=None), "NoneType is not an array"),
    "vector": (np.zeros(9, "f4"), "the gradient: one array instead of a tree of 'w', 'b', 's'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_gradient_of_another_form_is_refused_by_name(name: str) -> None:
    gradient, message = MISTAKES[name]
    method, weights = scale(-1.0), tensors_of(0, numpy_array)
    with pytest.raises(ArgumentError, match=message):
        method.update(gradient, method.init(weights), weights)


def test_a_tree_of_gradients_for_a_vector_of_weights_is_refused() -> None:
    method, weights = hpccomm.mean(MPI.COMM_SELF), np.zeros(9, "f4")
    with pytest.raises(ArgumentError, match="the gradient is a dict, the weights one array"):
        method.update(tensors_of(0, numpy_array), method.init(weights), weights)


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="mixed dtypes"):
        momentum(0.5).init({"w": np.zeros(2, "f4"), "b": np.zeros(2)})


WITHOUT_DIMENSIONS: dict[str, Callable[[Any], Any]] = {
    "scale": lambda comm: scale(-1),
    "mean": hpccomm.mean,
    "synchronous_sgd": lambda comm: hpccomm.synchronous_sgd(comm, 0.1),
    "topk": lambda comm: hpccomm.feedback(hpccomm.topk(0.5), comm),
    "block_mean": hpccomm.block_mean,
    "local_sgd": lambda comm: hpccomm.local_sgd(comm, scale(-0.1), 2),
    "diloco": lambda comm: hpccomm.diloco(comm, scale(-0.1), 2),
    "bmuf": lambda comm: hpccomm.bmuf(comm, scale(-0.1), 2),
    "sharded bmuf": lambda comm: hpccomm.bmuf(comm, scale(-0.1), 2, shard_state=True),
    "bmuf_adam": lambda comm: hpccomm.bmuf_adam(comm, 0.1, 2),
    "hybrid": lambda comm: hpccomm.hybrid(comm, hpccomm.mean, scale(-0.1), 1, period=2),
}


@pytest.mark.parametrize("name", WITHOUT_DIMENSIONS)
def test_one_number_without_a_dimension_is_refused_alone_and_taken_in_a_tree(name: str) -> None:
    def body(comm: Any) -> tuple[Any, ...]:
        method = WITHOUT_DIMENSIONS[name](comm)
        with pytest.raises(ArgumentError, match=r"without a dimension: pass a vector, w.reshape\(1\)"):
            method.init(np.zeros((), "f4"))
        weights = {"s": np.zeros((), "f4")}
        state = method.init(weights)
        for _ in range(4):
            step, state = method.update({"s": np.array(comm.rank + 1, "f4")}, state, weights)
            weights = {"s": np.asarray(weights["s"] + step["s"])}
        assert np.isfinite(weights["s"])
        return weights["s"].shape

    assert run_on_ranks(2, body) == [()] * 2
