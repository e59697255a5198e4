"""A bucket is the tensors, one after the other: nothing is lost, copied twice, or quietly cast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError

TENSORS = {
    "weight": np.arange(6, dtype="f4").reshape(2, 3),
    "empty": np.zeros((0, 4), "f4"),
    "bias": np.array([7, 8], "f4"),
    "scale": np.array(9, "f4"),
}


def test_the_table_says_where_each_tensor_lies() -> None:
    bucket = Bucket(TENSORS)
    assert [tuple(slot) for slot in bucket.table] == [
        ("weight", 0, 6, (2, 3), True, True),
        ("empty", 6, 0, (0, 4), True, True),
        ("bias", 6, 2, (2,), False, False),
        ("scale", 8, 1, (), False, False),
    ]
    assert bucket.size == 9
    assert bucket.flatten(TENSORS).tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]


@given(
    st.lists(arrays(np.float32, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)), max_size=8),
)
def test_round_trips_are_exact(tensors: list[Any]) -> None:
    named = {f"tensor {number}": tensor for number, tensor in enumerate(tensors)}
    bucket = Bucket(named, np.float32)
    back = bucket.views(bucket.flatten(named))
    assert list(back) == list(named)
    for name, tensor in named.items():
        assert back[name].shape == tensor.shape
        assert back[name].tobytes() == tensor.tobytes()


def test_views_share_memory_with_the_vector() -> None:
    bucket = Bucket(TENSORS)
    vector = bucket.flatten(TENSORS)
    bucket.views(vector)["weight"][1, 2] = 55
    assert vector[5] == 55


def test_flatten_writes_into_the_vector_it_is_given() -> None:
    bucket = Bucket(TENSORS)
    out = np.empty(9, "f4")
    assert bucket.flatten(TENSORS, out) is out
    assert out[-1] == 9


def test_memory_order_does_not_matter() -> None:
    bucket = Bucket(TENSORS)
    turned = {name: np.array(tensor, order="F") for name, tensor in TENSORS.items()}
    assert np.array_equal(bucket.flatten(turned), bucket.flatten(TENSORS))


def test_shapes_are_enough_to_make_a_bucket() -> None:
    assert Bucket({"a": (2, 3), "b": ()}).table == Bucket({"a": np.ones((2, 3)), "b": np.ones(())}).table
    assert Bucket({"a": (2, 3)}).dtype == np.float32


def test_a_large_tree_round_trips() -> None:
    named = {f"layer.{number}": np.full(number % 7, number, "f8") for number in range(5000)}
    bucket = Bucket(named)
    assert all(np.array_equal(view, named[name]) for name, view in bucket.views(bucket.flatten(named)).items())


def test_masks_follow_the_flags() -> None:
    assert Bucket(TENSORS).mask("decay").tolist() == [True] * 6 + [False] * 3
    assert Bucket(TENSORS, exempt=["weight"]).mask("adapt").tolist() == [False] * 6 + [True] * 3


@pytest.mark.parametrize(
    ("tensors", "remedy"),
    [
        ({"a": np.ones(2, "f4"), "b": np.ones(2, "f8")}, "mixed dtypes .* one bucket for each dtype"),
        ({"a": 3.0}, "neither an array nor a shape"),
        ({"a": np.array(["text"])}, "Bucket: a: MPI cannot move an array of"),
    ],
)
def test_a_bucket_of_mixed_dtypes_or_no_arrays_is_refused(tensors: Any, remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy):
        Bucket(tensors)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"bias": np.ones(2, "f8")}, "bias is float64, the bucket float32: cast it"),
        ({"bias": np.ones(3, "f4")}, r"bias has shape \(3,\), its place is \(2,\)"),
        ({"more": np.ones(3, "f4")}, r"not in the bucket \['more'\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy):
        Bucket(TENSORS).flatten(TENSORS | change)


def test_a_vector_that_does_not_fit_is_refused() -> None:
    for wrong in (np.ones(8, "f4"), np.ones(9, "f8"), np.ones(18, "f4")[::2]):
        with pytest.raises(ArgumentError, match=r"float32 of shape \(9,\)"):
            Bucket(TENSORS).views(wrong)


def test_an_exemption_of_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ArgumentError, match="exempt names wieght"):
        Bucket(TENSORS, exempt=["wieght"])
