"""Every buffer form is read as mpi4py reads it, and unusable buffers are refused with a remedy."""

from __future__ import annotations

import array
import ctypes
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm.calls.blocks import ONE, find_blocks, share_bytes
from hpccomm.calls.buffers import DLPACK_BFLOAT, DLTensor, as_pairs, datatype_table, read
from hpccomm.calls.plans import call_key
from hpccomm.errors import ArgumentError

X = np.arange(8, dtype="f4")


@pytest.mark.parametrize(
    ("form", "elements", "dtype"),
    [
        (X, 8, "f4"),
        (X.reshape(2, 4), 8, "f4"),
        (X.reshape(2, 4).T, 8, "f4"),
        (np.float64(3), 1, "f8"),
        (np.array(3), 1, "i8"),
        ([X, MPI.FLOAT], 8, "f4"),
        ([X, "f"], 8, "f4"),
        ([X, 3, MPI.FLOAT], 3, "f4"),
        ((X, 3), 3, "f4"),
        ([X, (3, 2), MPI.FLOAT], 3, "f4"),
        ([X, 3, 2, MPI.FLOAT], 3, "f4"),
        ([X, MPI.BYTE], 32, "u1"),
        (array.array("d", [1, 2]), 2, "f8"),
        (bytearray(8), 8, "u1"),
        ([bytearray(8), MPI.INT], 2, "i4"),
        (np.zeros(0), 0, "f8"),
        (np.array([b"a", b"b"]), 2, "u1"),
        ([bytearray(8), MPI.CHAR], 8, "u1"),
    ],
)
def test_forms_with_one_block_have_elements_and_dtype(form: Any, elements: int, dtype: str) -> None:
    buffer = read(form, "rank 0: call")
    assert (buffer.elements, buffer.dtype) == (elements, np.dtype(dtype))


@pytest.mark.parametrize(
    ("form", "parts"),
    [
        (X, ((3, 3, 2), (0, 3, 6))),
        ([X, [1, 2, 5], MPI.FLOAT], ((1, 2, 5), (0, 1, 3))),
        ([X, ([1, 2, 1], [0, 3, 7]), MPI.FLOAT], ((1, 2, 1), (0, 3, 7))),
        ([X, [1, 2, 1], [0, 3, 7], MPI.FLOAT], ((1, 2, 1), (0, 3, 7))),
        ([X, ([1, 2, 1], None), MPI.FLOAT], ((1, 2, 1), (0, 1, 3))),
        ([X, (2, 3), MPI.FLOAT], ((2, 2, 2), (0, 3, 6))),
    ],
)
def test_vector_forms_are_completed_as_mpi4py_does(form: Any, parts: Any) -> None:
    assert read(form, "rank 0: call").blocks(3) == parts


def test_a_derived_datatype_is_opaque_but_its_bytes_are_counted() -> None:
    datatype = MPI.FLOAT.Create_vector(2, 1, 3).Commit()
    buffer = read([X, 1, datatype], "rank 0: call")
    datatype.Free()
    assert buffer.opaque
    assert buffer.octets == 8


@pytest.mark.parametrize(
    ("form", "first", "elements"),
    [
        ([np.zeros(32, "u1"), MPI.DOUBLE_INT], 0, 2),
        ([np.zeros(3, np.dtype("f8, i4", align=True)), 2, MPI.DOUBLE_INT], 0, 2),
        ((np.zeros(5, "c16"), 3, 2, MPI.LONG_INT), 32, 3),
        ([np.zeros((4, 2), "i4"), MPI.TWOINT], 0, 4),
        ([bytearray(24), np.int64(1), MPI.INT_INT], 0, 1),
    ],
)
def test_pairs_are_read_for_reductions(form: Any, first: int, elements: int) -> None:
    buffer = as_pairs(read(form, "rank 0: call"))
    assert (buffer.elements, buffer.address) == (elements, MPI.Get_address(form[0]) + first)
    assert buffer.dtype is not None
    assert buffer.dtype.itemsize == form[-1].extent


def test_datatypes_of_one_layout_have_one_code() -> None:
    table = datatype_table()
    for code, datatypes in {
        "i4": (MPI.INT, MPI.INT32_T, MPI.INTEGER),
        "f8": (MPI.DOUBLE, MPI.REAL8, MPI.DOUBLE_PRECISION),
        "u1": (MPI.BYTE, MPI.CHAR, MPI.UINT8_T),
        "c16": (MPI.C_DOUBLE_COMPLEX, MPI.DOUBLE_COMPLEX),
        "b1": (MPI.C_BOOL, MPI.CXX_BOOL),
        "TWOINT": (MPI.TWOINT, MPI.INT_INT),
    }.items():
        assert {table[each.handle].code for each in datatypes} == {code}


@pytest.mark.parametrize("form", [None, MPI.BOTTOM, MPI.IN_PLACE, [X, MPI.FLOAT_INT], [MPI.BOTTOM, 1, MPI.INT]])
def test_forms_without_contiguous_numpy_elements_are_opaque(form: Any) -> None:
    assert read(form, "rank 0: call").opaque


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        (X[::2], "ascontiguousarray"),
        (X[::-1], "ascontiguousarray"),
        (np.broadcast_to(X[:1], (3,)), "ascontiguousarray"),
        (X.astype(">f4"), "newbyteorder"),
        (X.astype(object), "lower-case"),
        (np.array(["ab"]), "numeric"),
        (np.zeros(2, "M8[s]"), "numeric"),
        (np.zeros(2, [("a", "i4")]), "numeric"),
        (np.zeros(3, "f8, i4, i4"), "numeric"),
        (np.zeros(3, "i4, f8"), "numeric"),
        (np.zeros(3, "f8, i4"), r"with align=True and name the pair type: \[x, 3, MPI\.DOUBLE_INT\]"),
        (np.zeros(3, np.dtype("f8, i4", align=True)), r"for .*: name the pair type: \[x, 3, MPI\.DOUBLE_INT\]"),
        (np.zeros(1, "f4, i4"), r"\[x, 1, MPI\.FLOAT_INT\]"),
        (np.zeros(1, "i4, i4"), r"\[x, 1, MPI\.TWOINT\]"),
        (np.ma.masked_array(X), "filled"),
        (memoryview(X)[::2], "contiguous"),
        ([X, -1, MPI.FLOAT], "how many"),
        ([np.zeros(40, "u1"), MPI.DOUBLE_INT], "40 bytes is no whole number of MPI_DOUBLE_INT, each of 16 bytes"),
        ([np.zeros(3, "f8, i4"), MPI.DOUBLE_INT], "pass a count"),
        ([X.astype(">f4"), MPI.FLOAT], "newbyteorder"),
        ([1.0, 2.0], "lower-case"),
    ],
)
def test_unusable_buffers_are_refused_with_a_remedy(given: Any, remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy) as refused:
        read(given, "rank 3: Allreduce")
    assert str(refused.value).startswith("rank 3: Allreduce")


@pytest.mark.parametrize("dtype", [">f8", "<f8", ">i2", "M8[s]", "f8, i4"])
@pytest.mark.parametrize("datatype", [MPI.BYTE, MPI.CHAR, MPI.UINT8_T])
def test_an_array_of_any_dtype_moves_as_bytes(dtype: str, datatype: MPI.Datatype) -> None:
    array = np.zeros(3, dtype)
    for form in ([array, datatype], [array, array.nbytes, datatype]):
        buffer = read(form, "rank 0: call")
        assert (buffer.elements, buffer.address) == (array.nbytes, MPI.Get_address(array))
        assert buffer.dtype is not None
        assert buffer.dtype.itemsize == 1


def test_the_vector_of_a_buffer_is_the_users_memory() -> None:
    x = np.zeros(4, "i4")
    read(x, "rank 0: call").vector()[2] = 7
    assert x.tolist() == [0, 0, 7, 0]


def test_fortran_order_is_detected() -> None:
    assert read(np.zeros((2, 3), order="F"), "rank 0: call").order == "F"
    assert read(np.zeros((2, 3)), "rank 0: call").order == "C"


@pytest.mark.parametrize(("lo", "hi", "shared"), [(0, 4, True), (3, 7, True), (4, 8, False), (4, 4, False)])
def test_buffers_overlap_if_they_share_bytes(lo: int, hi: int, shared: bool) -> None:
    who = "rank 0: call"
    a, b = (find_blocks(read(each, who), ONE, 2, who) for each in (X[:4], X[lo:hi]))
    assert share_bytes(a, b) == shared


class BfloatTensor:
    """A tensor of bfloat16, which NumPy's own DLPack cannot express."""

    def __init__(self, words: np.ndarray) -> None:
        self.words = words

    def __dlpack__(self) -> Any:
        capsule = self.words.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        DLTensor.from_address(pointer(capsule, b"dltensor")).code = DLPACK_BFLOAT
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.words.__dlpack_device__()


def test_displacements_in_a_range_are_those_in_a_list() -> None:
    x = np.ones(8)
    keys = [call_key("Alltoallv", [x, [1, 1], each, MPI.DOUBLE], x) for each in ([0, 2], range(0, 4, 2), [0, 3])]
    assert keys[0] is not None
    assert keys[0] == keys[1] != keys[2]


def test_a_tensor_that_numpy_cannot_read_is_recognised() -> None:
    words = np.zeros(4, "u2")
    tensor, same, other = BfloatTensor(words), BfloatTensor(words), BfloatTensor(np.zeros(4, "u2"))
    assert read(tensor, "rank 0: call").half == "bfloat16"
    keys = [call_key("Bcast", each, MPI.IN_PLACE) for each in (tensor, same, other, words)]
    assert keys[0] is not None
    assert keys[0] == keys[1]
    assert keys[0] not in keys[2:]


@pytest.mark.parametrize("members", [[MPI.DOUBLE], [MPI.DOUBLE] * 2, [MPI.DOUBLE, MPI.INT]], ids=len)
def test_a_structure_of_one_datatype_has_its_elements(members: list[MPI.Datatype]) -> None:
    """So ranks that pass it are not told of a mismatch with those that pass that datatype."""
    made = MPI.Datatype.Create_struct([1] * len(members), [8 * k for k in range(len(members))], members).Commit()
    base = read([np.zeros(4), 1, made], "").base
    made.Free()
    assert base == (None if MPI.INT in members else np.dtype("f8"))
