"""Any array on the host is read as it is and given back as its kind; the rest is refused with a remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from hpccomm.arrays import borrow, narrow, reduction_dtype, view_for_mpi, widen
from hpccomm.errors import ArgumentError

DTYPES = ["?", "i1", "u8", "f2", "f4", "f8", "g", "F", "D", ml_dtypes.bfloat16]


class Foreign:
    """An array of another library: DLPack, and a namespace to go back to."""

    def __init__(self, array: np.ndarray[Any, Any], device: int = 1) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __array_namespace__(self) -> Any:
        return SimpleNamespace(asarray=Foreign)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (0, 3)])
def test_a_numpy_array_is_borrowed_without_a_copy(dtype: Any, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, dtype)
    view, give_back = borrow(x)
    assert view is x
    assert give_back(view) is x


def test_a_read_only_and_a_strided_array_are_borrowed_as_they_are() -> None:
    x = np.arange(12.0).reshape(3, 4)[::2, ::-1]
    x.flags.writeable = False
    assert borrow(x)[0] is x


@pytest.mark.parametrize("scalar", [True, 3, 2.5, 1j, np.float32(2), np.int8(3), ml_dtypes.bfloat16(2)])
def test_the_result_of_a_scalar_is_a_scalar_of_its_type(scalar: Any) -> None:
    view, give_back = borrow(scalar)
    back = give_back(view.copy())
    assert view.shape == ()
    assert type(back) is type(scalar)
    assert back == scalar


def test_gathered_scalars_are_an_array() -> None:
    _, give_back = borrow(2.5)
    assert isinstance(give_back(np.ones(3)), np.ndarray)


def test_a_dlpack_array_is_read_without_a_copy_and_converted_back() -> None:
    x = Foreign(np.arange(4.0))
    view, give_back = borrow(x)
    assert np.shares_memory(view, x.array)
    back = give_back(view + 1)
    assert isinstance(back, Foreign)
    assert back.array.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("x", [Foreign(np.ones(2), device=2), SimpleNamespace(__cuda_array_interface__={})])
def test_an_array_on_a_device_is_refused(x: Any) -> None:
    with pytest.raises(ArgumentError, match=r"rank 3: call: .* lies on a device: copy it to the host first"):
        borrow(x, "rank 3: call")


@pytest.mark.parametrize(
    ("x", "remedy"),
    [
        ([1.0, 2.0], r"pass np\.asarray\(x\)"),
        ((1, 2), r"pass np\.asarray\(x\)"),
        ({}, r"dict is not an array"),
        (bytearray(4), r"bytearray is not an array"),
        (np.array([object()]), r"x\.astype\('f8'\)"),
        (np.array(["text"]), r"lower-case comm\.bcast"),
        (np.array([b"text"]), r"x\.view\('u1'\)"),
        (np.zeros(2, "M8[s]"), r"x\.view\('i8'\)"),
        (np.zeros(2, "m8[s]"), r"x\.view\('i8'\)"),
        (np.zeros(2, [("a", "f4")]), r"one field"),
        (np.zeros(2, ">f8"), r"newbyteorder"),
        (np.ma.masked_array([1.0], [True]), r"x\.filled"),
        (np.zeros(2, ml_dtypes.float8_e4m3fn), r"cast it to float32"),
        (1 << 70, r"does not fit into 64 bits"),
    ],
)
def test_unusable_arrays_are_refused_with_a_remedy(x: Any, remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy):
        borrow(x)


def test_the_remedies_in_errors_work() -> None:
    assert borrow(np.zeros(2, "M8[s]").view("i8"))[0].dtype == np.int64
    swapped = np.arange(3, dtype=">f8")
    assert borrow(swapped.astype(swapped.dtype.newbyteorder("=")))[0].tolist() == [0, 1, 2]
    assert borrow(np.ma.masked_array([1.0, 2.0], [True, False]).filled(7))[0].tolist() == [7, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_16_bit_floats_are_widened(dtype: Any) -> None:
    x = np.ones((2, 3), dtype)
    if x.dtype in (np.float16, ml_dtypes.bfloat16):
        assert widen(x).dtype == reduction_dtype(x.dtype) == np.float32
    else:
        assert widen(x) is x


def test_widening_puts_any_strides_in_c_order() -> None:
    x = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert widen(x).flags.c_contiguous
    assert np.array_equal(widen(x), x)


def test_every_16_bit_float_survives_widening_and_narrowing() -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        numbers = words.view(dtype)
        numbers = numbers[~np.isnan(numbers.astype("f4"))]
        assert narrow(widen(numbers), dtype).view(np.uint16).tolist() == numbers.view(np.uint16).tolist()


def test_narrowing_rounds_to_nearest_even_and_overflows_to_infinity() -> None:
    assert narrow(np.array([2049, 2051, 1e6], "f4"), np.dtype("f2")).tolist() == [2048, 2052, np.inf]


def test_16_bit_floats_are_viewed_as_uint16_without_a_copy() -> None:
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x = np.ones((2, 3), dtype)
        assert view_for_mpi(x).dtype == np.uint16
        assert np.shares_memory(view_for_mpi(x), x)


def test_torch_tensors_come_back_as_tensors() -> None:
    torch = pytest.importorskip("torch")
    for x in (
        torch.arange(4.0),
        torch.arange(4.0, requires_grad=True),
        torch.ones(2, 3).t(),
        torch.ones(4, 2, dtype=torch.bfloat16)[:, 0],
        torch.tensor(2.5, dtype=torch.float16),
        torch.conj(torch.full((2,), 1j)),
    ):
        view, give_back = borrow(x)
        back = give_back(view.copy())
        assert type(back) is torch.Tensor
        assert back.dtype == x.dtype
        assert torch.equal(back, x.detach())


def test_sparse_torch_tensors_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ArgumentError, match="pass a dense copy on the host"):
        borrow(torch.ones(2, 2).to_sparse())


def test_jax_arrays_come_back_as_jax_arrays() -> None:
    jax = pytest.importorskip("jax")
    for dtype in ("float32", "bfloat16", "bool", "int32"):
        x = jax.numpy.ones((2, 3), dtype)
        view, give_back = borrow(x)
        back = give_back(view.copy())
        assert isinstance(back, jax.Array)
        assert back.dtype == x.dtype
        assert bool((back == x).all())
