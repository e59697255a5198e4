"""What a user hands to a collective, understood once: where it lies, how many elements of what, may we write.

Takes every form mpi4py takes.  A form whose bytes do not simply follow one another (derived datatypes, ``BOTTOM``) is
*opaque*: it keeps mpi4py's own treatment.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.errors import ArgumentError

MPI_KINDS = "biufc"
"""NumPy's letters of the kinds of dtype that MPI knows."""


@dataclass
class Message:
    """One buffer of one call."""

    raw: Any
    """What the user gave, for mpi4py."""
    address: int = 0
    size: int = 0
    """Elements that the memory holds (of an opaque form: items of its datatype that it says)."""
    dtype: np.dtype[Any] | None = None
    """``None`` when opaque; unsigned for 16-bit floats, of which :attr:`half` tells the kind."""
    half: str = ""
    """``"float16"`` or ``"bfloat16"``: moved as integers of as many bits, added in float32."""
    element_name: str = ""
    """What to call its elements where they stand for others."""
    writable: bool = True
    order: str = "C"
    count: int | None = None
    """Elements (for each rank, where there is a part for each), when the user said it."""
    counts: tuple[int, ...] | None = None
    """Elements for each rank, when the user said it."""
    displs: tuple[int, ...] | int | None = None
    """Where each rank's part begins, when the user said it."""
    octets: int | None = None
    """Bytes of data in an opaque form, where that can be told."""
    datatype: MPI.Datatype | None = None
    """The datatype of such an opaque form."""
    base: np.dtype[Any] | None = None
    """What that datatype is made of, where it is one thing."""
    owner: Any = None
    """Whatever keeps the memory alive."""

    @property
    def kind(self) -> str:
        """The elements' dtype in words."""
        return self.half or str(self.dtype)

    @property
    def opaque(self) -> bool:
        """Whether its bytes do not simply follow one another."""
        return self.dtype is None

    @property
    def elements(self) -> int:
        """How many elements a call without parts moves."""
        return self.size if self.count is None else self.count

    @property
    def nbytes(self) -> int:
        """Bytes that a call without parts moves."""
        if self.dtype is None:
            return self.octets or 0
        return self.elements * self.dtype.itemsize

    def block_length(self, ranks: int) -> int:
        """Elements for each of ``ranks`` ranks."""
        return self.size // ranks if self.count is None else self.count

    def blocks(self, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Elements for each rank and where they begin, as mpi4py completes what was left out."""
        counts = self.counts
        if counts is None and self.count is not None:
            counts = (self.count,) * ranks
        if counts is None:
            counts = tuple(self.size // ranks + (self.size % ranks > k) for k in range(ranks))
        if isinstance(self.displs, int):
            return counts, tuple(self.displs * k for k in range(ranks))
        if self.displs is None:
            return counts, tuple(sum(counts[:k]) for k in range(ranks))
        return counts, self.displs

    def overlaps(self, other: Message) -> bool:
        """Whether the two memories share bytes."""
        if self.dtype is None or other.dtype is None:
            return False
        ends = [each.address + each.size * each.dtype.itemsize for each in (self, other) if each.dtype is not None]
        return bool(self.size and other.size) and self.address < ends[1] and other.address < ends[0]

    def vector(self, count: int | None = None, first: int = 0) -> npt.NDArray[Any]:
        """The elements, as a view that does not keep the user's array alive."""
        assert self.dtype is not None
        count = self.elements if count is None else count
        return view_at(self.address + first * self.dtype.itemsize, count, self.dtype)


def view_at(address: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """``count`` elements at an address."""
    if not count:
        return np.empty(0, dtype)
    memory: Any = MPI.memory.fromaddress(address, count * dtype.itemsize)
    return np.frombuffer(memory, dtype)


def read(given: Any, who: str) -> Message:
    """Understand a buffer; ``who`` begins every error: the rank and its call."""
    if isinstance(given, Message):
        return given
    if isinstance(given, np.ndarray | np.generic):
        return read_array(np.asarray(given), given, who)
    if isinstance(given, list | tuple):
        return read_form(given, who)
    if given is None or given is MPI.BOTTOM or given is MPI.IN_PLACE or isinstance(given, int):
        return Message(given)
    return read_provider(given, who)


def apply_displacement(message: Message, who: str) -> Message:
    """A buffer without parts for each rank, where ``[data, count, displacement, datatype]`` lets it begin."""
    if message.dtype is None or not isinstance(message.displs, int):
        return message
    first = message.displs
    if not 0 <= first <= message.size:
        raise ArgumentError(f"{who}: displacement {first} in a buffer of {message.size} elements: pass one inside it")
    return replace(
        message, address=message.address + first * message.dtype.itemsize, size=message.size - first, displs=None
    )


def read_array(array: npt.NDArray[Any], raw: Any, who: str) -> Message:
    """A NumPy array: checked, and taken as it lies in memory."""
    if isinstance(raw, np.ma.MaskedArray):
        raise ArgumentError(f"{who}: a masked array would lose its mask: pass x.filled(value)")
    half = half_of(array.dtype)
    if array.dtype.kind not in MPI_KINDS and not half:
        raise ArgumentError(f"{who}: MPI has no datatype for {array.dtype}: {remedy_for(array.dtype)}")
    if not array.dtype.isnative:
        raise ArgumentError(
            f"{who}: {array.dtype.str} has another byte order than this machine: "
            "pass x.astype(x.dtype.newbyteorder('='))"
        )
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ArgumentError(
            f"{who}: the array is not contiguous (shape {array.shape}, strides {array.strides}): "
            "pass np.ascontiguousarray(x), or receive into a new array and copy"
        )
    order = "C" if array.flags.c_contiguous else "F"
    message = Message(
        raw, address_of(array), array.size, array.dtype, writable=array.flags.writeable, order=order, owner=array
    )
    return to_uint16(message, half) if half else message


def half_of(dtype: np.dtype[Any]) -> str:
    """The name of a 16-bit float; nothing for all others."""
    return dtype.name if dtype == np.float16 or dtype.name == "bfloat16" else ""


def to_uint16(message: Message, half: str) -> Message:
    """16-bit floats as the integers that every MPI can move."""
    message.half, message.dtype = half, np.dtype("u2")
    message.raw = [MPI.memory.fromaddress(message.address, 2 * message.size), MPI.UINT16_T]
    return message


def remedy_for(dtype: np.dtype[Any]) -> str:
    """What to do with a dtype that MPI does not know."""
    if dtype.kind == "O":
        return "use the lower-case method, which pickles, or a numeric dtype"
    return "view or cast it as a numeric dtype, or name an MPI datatype: [x, count, datatype]"


def address_of(array: npt.NDArray[Any]) -> int:
    """Where an array's first byte lies."""
    return int(array.__array_interface__["data"][0])


def read_provider(given: Any, who: str) -> Message:
    """Anything with the buffer protocol or DLPack; opaque where it has neither."""
    try:
        view = memoryview(given)
    except TypeError:
        return read_dlpack(given, who)
    if not view.contiguous:
        raise ArgumentError(f"{who}: the buffer is not contiguous: pass a contiguous copy")
    array = np.asarray(view) if view.format != "B" or view.itemsize != 1 else np.frombuffer(view, "u1")
    if array.dtype.kind not in MPI_KINDS:
        return Message(given)
    order = "C" if view.c_contiguous else "F"
    return Message(
        given, address_of(array), array.size, array.dtype, writable=not view.readonly, order=order, owner=array
    )


def read_dlpack(given: Any, who: str) -> Message:
    """A tensor of another library on the host; opaque on a device."""
    if not hasattr(given, "__dlpack__") or given.__dlpack_device__()[0] != DLPACK_HOST:
        return Message(given)
    try:
        dtype, half = dlpack_dtype(given.__dlpack__())
        memory = MPI.memory(given)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"{who}: {type(given).__name__} cannot be read ({error}): detach it and make it contiguous"
        ) from None
    if dtype is None:
        return Message(given)
    if dtype.kind == "V":
        raise ArgumentError(
            f"{who}: MPI has no datatype for {type(given).__name__} of {getattr(given, 'dtype', 'this dtype')}: "
            "cast it to float32"
        )
    message = Message(given, memory.address, memory.nbytes // dtype.itemsize, dtype, owner=given)
    return to_uint16(message, half) if half else message


DLPACK_HOST, DLPACK_FLOAT, DLPACK_BFLOAT = 1, 2, 4
DLPACK_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}


class DLTensor(ctypes.Structure):
    """The beginning of what a DLPack capsule points to."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


def dlpack_dtype(capsule: Any) -> tuple[np.dtype[Any] | None, str]:
    """The dtype in a DLPack capsule (void where MPI has none, ``None`` for vectors of numbers), and a half's name."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = DLTensor.from_address(pointer(capsule, b"dltensor"))
    if tensor.lanes != 1:
        return None, ""
    if tensor.bits == 16 and tensor.code in (DLPACK_FLOAT, DLPACK_BFLOAT):
        return np.dtype("u2"), "float16" if tensor.code == DLPACK_FLOAT else "bfloat16"
    if tensor.code not in DLPACK_KINDS:
        return np.dtype(f"V{max(1, tensor.bits // 8)}"), ""
    return np.dtype(f"{DLPACK_KINDS[tensor.code]}{tensor.bits // 8}"), ""


def read_form(form: list[Any] | tuple[Any, ...], who: str) -> Message:
    """mpi4py's ``[data, count(s), displacement(s), datatype]`` and its shorter forms."""
    if not 2 <= len(form) <= 4 or form[0] is None or form[0] is MPI.BOTTOM:
        return Message(form)
    data, count, displs, datatype = split_form(form)
    base = read_data(data, who)
    if base.opaque:
        return Message(form)
    dtype = numpy_dtype(datatype) if datatype is not None else base.dtype
    if dtype is None:
        return read_derived(form, base, count, datatype)
    size = base.size * base.dtype.itemsize // dtype.itemsize if base.dtype is not None else 0
    message = Message(form, base.address, size, dtype, writable=base.writable, order=base.order, owner=base.owner)
    if datatype is None and base.half:
        message.half, message.raw = base.half, [base.raw[0], *form[1:], MPI.UINT16_T]
    if count is None or isinstance(count, int | np.integer):
        message.count = None if count is None else int(count)
    else:
        message.counts = tuple(int(each) for each in count)
    if displs is not None:
        single = isinstance(displs, int | np.integer)
        message.displs = int(displs) if single else tuple(int(each) for each in displs)
    if min(message.count or 0, *(message.counts or (0,))) < 0:
        raise ArgumentError(f"{who}: a negative count, {count}: pass how many elements to move")
    return message


def read_derived(form: Any, base: Message, count: Any, datatype: Any) -> Message:
    """An opaque form whose bytes can at least be counted."""
    if not isinstance(datatype, MPI.Datatype) or not (count is None or isinstance(count, int)):
        return Message(form)
    _, extent = datatype.Get_extent()
    nbytes = base.size * (base.dtype.itemsize if base.dtype is not None else 1)
    items = nbytes // max(extent, 1) if count is None else count
    return Message(
        form,
        base.address,
        items,
        octets=items * datatype.Get_size(),
        datatype=datatype,
        count=count,
        base=base_dtype(datatype),
    )


def base_dtype(datatype: MPI.Datatype) -> np.dtype[Any] | None:
    """The one predefined datatype that a derived one repeats."""
    while not datatype.is_predefined:
        datatype, combiner, _ = datatype.decode()
        if combiner == "STRUCT":
            return None
    return numpy_dtype(datatype)


def read_data(data: Any, who: str) -> Message:
    """The memory of a form; its own element type does not matter when a datatype is named."""
    strange = isinstance(data, np.ndarray) and data.dtype.kind not in MPI_KINDS and not half_of(data.dtype)
    if strange and data.flags.c_contiguous:
        return Message(data, address_of(data), data.nbytes, np.dtype("u1"), writable=data.flags.writeable, owner=data)
    return read(data, who)


def split_form(form: list[Any] | tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    """Data, count or counts, displacement or displacements, datatype."""
    data, *rest = form
    datatype = rest.pop() if isinstance(rest[-1], MPI.Datatype | str) else None
    if len(rest) == 2:
        return data, rest[0], rest[1], datatype
    if rest and isinstance(rest[0], tuple):
        return data, rest[0][0], rest[0][1], datatype
    return data, rest[0] if rest else None, None, datatype


def numpy_dtype(datatype: MPI.Datatype | str) -> np.dtype[Any] | None:
    """NumPy's name of a predefined datatype; ``None`` where it has none."""
    if isinstance(datatype, str):
        try:
            datatype = MPI.Datatype.fromcode(datatype)
        except (KeyError, ValueError):
            return None
    if datatype == MPI.DATATYPE_NULL or not datatype.is_predefined:
        return None
    if datatype == MPI.BYTE:
        return np.dtype("u1")
    try:
        dtype = np.dtype(datatype.tocode())
    except (TypeError, ValueError):
        return None
    return dtype if dtype.kind in MPI_KINDS and dtype.itemsize == datatype.Get_size() else None
