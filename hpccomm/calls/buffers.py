"""The buffer of a call: address, number of elements, dtype and whether it is writable, read from any form of mpi4py.

A form without contiguous elements of a NumPy dtype (a derived datatype, ``BOTTOM``) is *opaque*: mpi4py handles it.
"""

from __future__ import annotations

import ctypes
import operator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.arrays import is_masked
from hpccomm.errors import ArgumentError
from hpccomm.kernels.reductions.reference import INDEX, PAIRS, VALUE, code_of

MPI_KINDS = "biufc"
"""Kinds of NumPy dtypes (``dtype.kind``) for which MPI has a datatype."""
CHARACTERS = {np.dtype("S1").str: "u1", np.dtype("U1").str: "u4"}
"""The integers as which characters are moved."""


@dataclass
class Buffer:
    """One buffer of one call."""

    raw: Any
    """The user's argument, for mpi4py."""
    address: int = 0
    size: int = 0
    """Elements that the memory holds; of an opaque form, items of its datatype."""
    dtype: np.dtype[Any] | None = None
    """``None`` if opaque; uint16 for 16-bit floats, whose type is :attr:`half`."""
    half: str = ""
    """``"float16"`` or ``"bfloat16"``: moved as uint16, reduced in float32."""
    pair: str = ""
    """The pair type that MINLOC and MAXLOC reduce, ``"DOUBLE_INT"`` and so on, see :func:`as_pairs`."""
    element_name: str = ""
    """Name of the elements in errors and fingerprints, if the dtype does not name them."""
    writable: bool = True
    order: str = "C"
    count: int | None = None
    """Elements, in collectives with one block per rank elements per rank, if the form has a count."""
    counts: tuple[int, ...] | None = None
    """Elements of each rank's block, if the form has counts."""
    displs: tuple[int, ...] | int | None = None
    """Offset of each rank's block in elements, if the form has displacements."""
    octets: int | None = None
    """Bytes of data in an opaque form, if known."""
    datatype: MPI.Datatype | None = None
    """The derived datatype of an opaque form, if known."""
    base: np.dtype[Any] | None = None
    """The one NumPy dtype of which that datatype consists, if there is only one."""
    owner: Any = None
    """The object that keeps the memory alive."""
    weak: bool = False
    """Whether :attr:`raw` of an opaque form holds no reference to the user's array."""

    @property
    def kind(self) -> str:
        """The name of the elements' dtype."""
        return self.half or self.pair or name_of(self.dtype)

    @property
    def width(self) -> int:
        """Bytes of an element."""
        assert self.dtype is not None
        return self.dtype.itemsize

    @property
    def opaque(self) -> bool:
        """Whether mpi4py must handle the form."""
        return self.dtype is None

    @property
    def known(self) -> bool:
        """Whether the dtype of the elements is known."""
        return self.dtype is not None or self.base is not None

    @property
    def elements(self) -> int:
        """Elements that a call with one block moves."""
        return self.size if self.count is None else self.count

    @property
    def nbytes(self) -> int:
        """Bytes that a call with one block moves."""
        if self.dtype is None:
            return self.octets or 0
        return self.elements * self.dtype.itemsize

    def block_length(self, ranks: int) -> int:
        """Elements of each block if all of ``ranks`` ranks have equal blocks."""
        return self.size // ranks if self.count is None else self.count

    def blocks(self, ranks: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Counts and displacements of all ranks; mpi4py's defaults where the form has none."""
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

    def vector(self, count: int | None = None, first: int = 0) -> npt.NDArray[Any]:
        """The elements as a view that holds no reference to the user's array."""
        assert self.dtype is not None
        count = self.elements if count is None else count
        return view_at(self.address + first * self.width, count, self.dtype)


def hold(given: Any) -> Any:
    """A NumPy scalar, which is copied whenever it is read, also in a form, as a read-only array; else what is given."""
    if isinstance(given, list | tuple) and given and isinstance(given[0], np.generic):
        return [hold(given[0]), *given[1:]]
    if not isinstance(given, np.generic):
        return given
    array = np.asarray(given)
    array.flags.writeable = False
    return array


def pad_last(given: Any) -> tuple[Any, npt.NDArray[Any], npt.NDArray[Any]] | None:
    """A form of pairs with a copy of its data, where the array ends before the padding of the last pair; else None.

    MPI accepts such an array: one of ``np.dtype([("v", "f8"), ("i", "i4")])`` has 12 bytes for a DOUBLE_INT of 16.
    Returns the form, the user's bytes, and those of the copy that take their place.
    """
    if not isinstance(given, list | tuple) or len(given) != 3 or not isinstance(given[2], MPI.Datatype):
        return None
    data, count, datatype = given
    element = element_of(datatype)
    if element is None or element.code not in PAIRS or not isinstance(data, np.ndarray) or not data.flags.c_contiguous:
        return None
    if not isinstance(count, int | np.integer):
        return None
    _, used = datatype.Get_true_extent()
    end = int(count) * element.extent
    if not end - element.extent + used <= data.nbytes < end:
        return None
    copy, own = np.zeros(end, np.uint8), data.reshape(-1).view(np.uint8)
    return [copy, count, datatype], own, copy[: data.nbytes]


def view_at(address: int, count: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A view of ``count`` elements at an address."""
    if not count:
        return np.empty(0, dtype)
    memory: Any = MPI.memory.fromaddress(address, count * dtype.itemsize)
    return np.frombuffer(memory, dtype)


def read(given: Any, who: str) -> Buffer:
    """Read a buffer in any form; every error begins with ``who``, the rank and the call."""
    if isinstance(given, Buffer):
        return given
    if isinstance(given, np.ndarray | np.generic):
        return read_array(np.asarray(given), given, who)
    if isinstance(given, list | tuple):
        return read_form(given, who)
    if given is None or given is MPI.BOTTOM or given is MPI.IN_PLACE:
        return Buffer(given)
    return read_provider(given, who)


def apply_displacement(buffer: Buffer, who: str) -> Buffer:
    """Move the address of a buffer with one block by the displacement of ``[data, count, displacement, datatype]``."""
    if buffer.dtype is None or not isinstance(buffer.displs, int):
        return buffer
    first = buffer.displs
    if not 0 <= first <= buffer.size:
        raise ArgumentError(
            f"{who}: displacement {first} is outside the buffer of {buffer.size} elements: pass one inside it"
        )
    return replace(
        buffer, address=buffer.address + first * buffer.dtype.itemsize, size=buffer.size - first, displs=None
    )


def read_array(array: npt.NDArray[Any], raw: Any, who: str) -> Buffer:
    """Read and check a NumPy array."""
    if is_masked(raw):
        raise ArgumentError(f"{who}: a masked array would lose its mask: pass x.filled(value)")
    half = half_of(array.dtype)
    if array.dtype.str in CHARACTERS:
        array = array.view(CHARACTERS[array.dtype.str])
    if array.dtype.kind not in MPI_KINDS and not half:
        raise ArgumentError(f"{who}: MPI has no datatype for {array.dtype}: {remedy_for(array)}")
    check_byte_order(array.dtype, who)
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        raise ArgumentError(
            f"{who}: the array is not contiguous (shape {array.shape}, strides {array.strides}): "
            "pass np.ascontiguousarray(x), or receive into a new array and copy"
        )
    order = "C" if array.flags.c_contiguous else "F"
    buffer = Buffer(
        raw, address_of(array), array.size, array.dtype, writable=array.flags.writeable, order=order, owner=array
    )
    return to_uint16(buffer, half) if half else buffer


def check_byte_order(dtype: np.dtype[Any], who: str) -> None:
    """Refuse elements in another byte order than this machine's."""
    if not dtype.isnative:
        raise ArgumentError(
            f"{who}: {dtype.str} has another byte order than this machine: pass x.astype(x.dtype.newbyteorder('='))"
        )


name_of = lru_cache(str)
"""The name of a dtype, for which NumPy makes a dozen calls."""


@lru_cache
def half_of(dtype: np.dtype[Any]) -> str:
    """The name of a 16-bit float dtype; empty for all others."""
    return dtype.name if dtype == np.float16 or dtype.name == "bfloat16" else ""


def to_uint16(buffer: Buffer, half: str) -> Buffer:
    """Declare 16-bit floats as uint16, which every MPI can move."""
    buffer.half, buffer.dtype = half, np.dtype("u2")
    buffer.raw = [MPI.memory.fromaddress(buffer.address, 2 * buffer.size), MPI.UINT16_T]
    return buffer


def remedy_for(array: npt.NDArray[Any]) -> str:
    """The remedy for an array whose dtype has no MPI datatype."""
    if array.dtype.kind == "O":
        return "use the lower-case method, which pickles, or a numeric dtype"
    fields = [array.dtype[name] for name in array.dtype.names or ()]
    pair = next((name for name, each in PAIRS.items() if fields == [each[VALUE], each[INDEX]]), "")
    if pair:
        aligned = array.dtype.itemsize == PAIRS[pair].itemsize
        make = "" if aligned else "make the array's dtype with align=True and "
        return f"{make}name the pair type: [x, {array.size}, MPI.{pair}]"
    return "view or cast it as a numeric dtype, or name an MPI datatype: [x, count, datatype]"


def address_of(array: npt.NDArray[Any]) -> int:
    """The address of an array's first byte."""
    return int(array.__array_interface__["data"][0])


def read_provider(given: Any, who: str) -> Buffer:
    """Read an object with the buffer protocol or DLPack; opaque if it has neither."""
    try:
        view = memoryview(given)
    except TypeError:
        return read_dlpack(given, who)
    if not view.contiguous:
        raise ArgumentError(f"{who}: the buffer is not contiguous: pass a contiguous copy")
    try:
        array = np.frombuffer(view, "u1") if view.format == "B" and view.c_contiguous else np.asarray(view)
    except ValueError:  # NumPy does not know the format of the elements
        return Buffer(given)
    array = array.view(CHARACTERS.get(array.dtype.str, array.dtype))
    if array.dtype.kind not in MPI_KINDS:
        return Buffer(given)
    check_byte_order(array.dtype, who)
    order = "C" if view.c_contiguous else "F"
    return Buffer(
        given, address_of(array), array.size, array.dtype, writable=not view.readonly, order=order, owner=array
    )


def read_dlpack(given: Any, who: str) -> Buffer:
    """Read a tensor of another library on the host; opaque on a device."""
    if not hasattr(given, "__dlpack__"):
        if hasattr(given, "__cuda_array_interface__"):
            return Buffer(given)
        raise ArgumentError(f"{who}: {type(given).__name__} has no memory that MPI can read: {NO_MEMORY}")
    if given.__dlpack_device__()[0] != DLPACK_HOST:
        return Buffer(given)
    try:
        dtype, half = dlpack_dtype(given.__dlpack__())
        memory = MPI.memory(given)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"{who}: {type(given).__name__} cannot be read ({error}): detach it and make it contiguous first"
        ) from None
    if dtype is None:
        return Buffer(given)
    if dtype.kind == "V":
        raise ArgumentError(
            f"{who}: MPI has no datatype for {type(given).__name__} of {getattr(given, 'dtype', 'this dtype')}: "
            "cast it to float32"
        )
    buffer = Buffer(given, memory.address, memory.nbytes // dtype.itemsize, dtype, owner=given)
    return to_uint16(buffer, half) if half else buffer


NO_MEMORY = "pass an array, np.array(x), or use the lower-case method, which pickles"

DLPACK_HOST, DLPACK_FLOAT, DLPACK_BFLOAT = 1, 2, 4
DLPACK_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}


class DLTensor(ctypes.Structure):
    """The first fields of the ``DLTensor`` in a DLPack capsule."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
    )


def dlpack_dtype(capsule: Any) -> tuple[np.dtype[Any] | None, str]:
    """The dtype in a DLPack capsule and the name of a 16-bit float.

    Void if MPI has no such datatype, ``None`` for vector types.
    """
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


def read_form(form: list[Any] | tuple[Any, ...], who: str) -> Buffer:
    """Read mpi4py's ``[data, count(s), displacement(s), datatype]`` and its shorter forms."""
    if not form or (
        isinstance(form[0], int | float | complex | str) and not isinstance(form[0], np.generic | type(MPI.BOTTOM))
    ):
        raise ArgumentError(f"{who}: a {type(form).__name__} of {len(form)} values is no buffer: {NO_MEMORY}")
    if not 2 <= len(form) <= 4 or form[0] is None or form[0] is MPI.BOTTOM:
        return Buffer(form)
    check_pair(form, who)
    data, count, displs, datatype = split_form(form)
    check_datatype(datatype, who)
    base = read_data(data, datatype, who)
    if base.opaque:
        return Buffer(form)
    dtype = numpy_dtype(datatype) if datatype is not None else base.dtype
    if dtype is None:
        return read_derived(form, base, who)
    nbytes = base.size * base.width
    buffer = Buffer(
        form, base.address, nbytes // dtype.itemsize, dtype, writable=base.writable, order=base.order, owner=base.owner
    )
    if datatype is None and base.half:
        buffer.half, buffer.raw = base.half, [base.raw[0], *form[1:], MPI.UINT16_T]
    if count is not None:
        buffer.count = index_of(count)
        buffer.counts = read_integers(count, "count", who) if buffer.count is None else None
    elif nbytes % dtype.itemsize:
        raise ArgumentError(not_whole(nbytes, str(dtype), dtype.itemsize, who))
    if displs is not None:
        single = index_of(displs)
        buffer.displs = read_integers(displs, "displacement", who) if single is None else single
    if min(buffer.count or 0, *(buffer.counts or (0,))) < 0:
        raise ArgumentError(f"{who}: the count {count} is negative: pass how many elements to move")
    return buffer


def check_pair(form: list[Any] | tuple[Any, ...], who: str) -> None:
    """Refuse a tuple in the place of the counts that does not have two members."""
    pair = form[1]
    if len(form) < 4 and isinstance(pair, tuple) and len(pair) != 2:
        raise ArgumentError(
            f"{who}: {pair} has {len(pair)} members: pass (count or counts, displacement or displacements)"
        )


def index_of(given: Any) -> int | None:
    """A whole number of any type as one of Python's; None for anything else."""
    try:
        return operator.index(given)
    except TypeError:
        return None


def not_whole(nbytes: int, name: str, extent: int, who: str) -> str:
    """The error for a buffer from whose length no count follows."""
    return (
        f"{who}: the buffer of {nbytes} bytes is no whole number of {name}, each of {extent} bytes: "
        "pass a count, [x, count, datatype], or a longer buffer"
    )


def read_one_block(form: Any, who: str) -> Buffer:
    """Read a buffer with one block, in whose form a list of a count and a displacement is what a tuple is."""
    if isinstance(form, list | tuple) and 2 <= len(form) < 4 and isinstance(form[1], list):
        form = [form[0], tuple(form[1]), *form[2:]]
    buffer = read(form, who)
    if buffer.counts is not None or isinstance(buffer.displs, tuple):
        raise ArgumentError(
            f"{who}: {str(form[1])[:80]} is not one count, and the buffer has one block: pass a whole number, or "
            "(count, displacement)"
        )
    return apply_displacement(buffer, who)


def check_datatype(datatype: MPI.Datatype | str | None, who: str) -> None:
    """Refuse the null datatype, which a freed one is, and a code that MPI does not know."""
    if datatype is None or (isinstance(datatype, MPI.Datatype) and datatype != MPI.DATATYPE_NULL):
        return
    if not isinstance(datatype, str):
        raise ArgumentError(f"{who}: the datatype is null or freed: pass one that is committed")
    try:
        MPI.Datatype.fromcode(datatype)
    except (KeyError, ValueError):
        raise ArgumentError(
            f"{who}: MPI has no datatype {datatype!r}: pass an MPI.Datatype, or a code such as 'd'"
        ) from None


def read_integers(given: Any, what: str, who: str) -> tuple[int, ...]:
    """The counts or displacements of all ranks; raises unless they are a sequence of whole numbers."""
    try:
        if isinstance(given, dict):
            raise TypeError
        return tuple(operator.index(given[k]) for k in range(len(given)))
    except (LookupError, TypeError):
        raise ArgumentError(
            f"{who}: the {what} is {str(given)[:80]}: pass a whole number, or a list of one for each rank"
        ) from None


def read_derived(form: Any, base: Buffer, who: str) -> Buffer:
    """Read a form with a derived datatype or a pair type: opaque, but its number of bytes is known."""
    _, count, displs, datatype = split_form(form)
    if not isinstance(datatype, MPI.Datatype) or base.dtype is None:
        return Buffer(form)
    _, extent = datatype.Get_extent()
    nbytes = base.size * base.dtype.itemsize
    raw = [MPI.memory.fromaddress(base.address, nbytes, not base.writable), *form[1:]]
    single = [None if each is None else index_of(each) for each in (count, displs)]
    if [each is None for each in single] != [count is None, displs is None] or extent < 1:
        counts, places = (
            read_integers(each, what, who) if each is not None and index is None else None
            for each, what, index in zip((count, displs), ("count", "displacement"), single, strict=True)
        )
        return Buffer(
            raw, base.address, nbytes, counts=counts, displs=places, writable=base.writable, weak=True
        )  # a block for each rank
    first, room = single[1] or 0, nbytes // extent
    if count is None and nbytes % extent:
        raise ArgumentError(not_whole(nbytes, datatype.Get_name() or "elements", extent, who))
    items = room - first if single[0] is None else single[0]
    if first < 0 or items < 0:
        raise ArgumentError(f"{who}: count {count} and displacement {displs}: pass numbers that are not negative")
    return Buffer(
        raw,
        base.address + first * extent,
        room - first,
        octets=items * datatype.Get_size(),
        datatype=datatype,
        count=None if count is None else items,
        base=base_dtype(datatype),
        writable=base.writable,
        owner=base.owner,
        weak=True,
    )


def check_reach(buffer: Buffer, blocks: int, who: str) -> None:
    """Refuse items of a derived datatype, in so many blocks, beyond the memory of the array that has been given.

    A view may be continued in the array of which it is one, as a column is; memory that is no array's has no known end.
    """
    items = buffer.size if buffer.count is None else buffer.count * blocks
    owner = buffer.owner
    while isinstance(owner, np.ndarray) and isinstance(owner.base, np.ndarray):
        owner = owner.base
    if buffer.datatype is None or not items or not isinstance(owner, np.ndarray) or not owner.flags.owndata:
        return
    (_, extent), (low, used) = buffer.datatype.Get_extent(), buffer.datatype.Get_true_extent()
    first = buffer.address + low - address_of(owner)
    last = first + (items - 1) * extent + used
    if first < 0 or last > owner.nbytes:
        element = element_of(buffer.datatype)
        name = element.code if element else buffer.datatype.Get_name() or "a derived datatype"
        raise ArgumentError(
            f"{who}: the buffer holds {buffer.size} elements of {name}, the count is {items}, from byte {first} to "
            f"{last} of {owner.nbytes}: pass a longer buffer or a smaller count"
        )


def as_pairs(buffer: Buffer) -> Buffer:
    """A buffer to reduce: elements of a pair type, which are otherwise only moved, become pairs of value and index."""
    element = None if buffer.datatype is None else element_of(buffer.datatype)
    if element is None or element.code not in PAIRS:
        return buffer
    return replace(buffer, dtype=PAIRS[element.code], pair=element.code)


def base_dtype(datatype: MPI.Datatype) -> np.dtype[Any] | None:
    """The dtype of which a datatype consists; ``None`` if there are several."""
    while not datatype.is_predefined:
        datatype, combiner, given = datatype.decode()
        if combiner == "STRUCT":
            bases = {base_dtype(each) for each in given["datatypes"]}
            return bases.pop() if len(bases) == 1 else None
    element = element_of(datatype)
    pair = PAIRS.get(element.code) if element else None
    if pair is not None:
        return pair[0] if pair[0] == pair[1] else None
    return numpy_dtype(datatype)


def read_data(data: Any, datatype: Any, who: str) -> Buffer:
    """Read the memory of a form.

    A datatype in the form overrides a dtype that MPI does not know, and one of single bytes an order of bytes; Python's
    objects are addresses, which mean nothing on another rank.
    """
    if not isinstance(data, np.ndarray) or not data.flags.c_contiguous or datatype is None or data.dtype.hasobject:
        return read(data, who)
    unknown = data.dtype.kind not in MPI_KINDS and not half_of(data.dtype)
    if not unknown and not data.dtype.isnative:
        element = numpy_dtype(datatype)
        unknown = element is not None and element.itemsize == 1
    if unknown:
        return Buffer(data, address_of(data), data.nbytes, np.dtype("u1"), writable=data.flags.writeable, owner=data)
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


class Element(NamedTuple):
    """What a predefined datatype of MPI describes."""

    code: str
    """``"f8"`` and so on, see :func:`hpccomm.kernels.reductions.reference.code_of`; the name of a pair type."""
    extent: int
    """Bytes from one element to the next."""


@cache
def datatype_table() -> dict[int, Element]:
    """All predefined datatypes, which are never freed, by handle; those of one layout have one code."""
    named = [each for each in vars(MPI).values() if isinstance(each, MPI.Datatype)]
    return {each.handle: element for each in named if (element := describe(each))}


def describe(datatype: MPI.Datatype) -> Element | None:
    """Describe a predefined datatype; ``None`` if the MPI library or NumPy lacks it."""
    if datatype == MPI.DATATYPE_NULL:
        return None
    _, extent = datatype.Get_extent()
    pair = next((name for name in PAIRS if datatype == getattr(MPI, name)), "")
    if pair:
        return Element(pair, extent) if extent == PAIRS[pair].itemsize else None
    try:
        dtype = np.dtype(datatype.tocode())
    except (TypeError, ValueError):
        return None
    if dtype.kind in "SU":  # a character
        dtype = np.dtype(f"u{extent}")
    return Element(code_of(dtype), extent) if dtype.kind in MPI_KINDS and dtype.itemsize == extent else None


def element_of(datatype: MPI.Datatype) -> Element | None:
    """The element that a datatype describes; ``None`` for a derived datatype."""
    known = datatype_table().get(datatype.handle)
    return known or (describe(datatype) if datatype.is_predefined else None)


def numpy_dtype(datatype: MPI.Datatype | str) -> np.dtype[Any] | None:
    """The NumPy dtype of a predefined datatype; ``None`` if there is none."""
    if isinstance(datatype, str):
        try:
            datatype = MPI.Datatype.fromcode(datatype)
        except (KeyError, ValueError):
            return None
    element = element_of(datatype)
    return np.dtype(element.code) if element and element.code not in PAIRS else None
