"""The wire format of compressed gradients: what a message holds, how it is checked, and the class of all compressors.

*n elements; all numbers little-endian.*  A message is a uint8 array: a header of 32 bytes (:class:`Header`), then the
payload.  :data:`READERS` maps each kind of message to the function that checks its payload and names the kernel that
adds it; :data:`ENCODERS` and :data:`DECODERS` hold the codes of ascending indices.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.arrays import is_on_device, to_device_like
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels
from hpccomm.kernels.index_codes.reference import rice_parameter
from hpccomm.kernels.selection.reference import accumulate, cell_indices
from hpccomm.kernels.vectors.reference import Indices, Octets, Vector, backlog_of

Message = npt.NDArray[np.uint8]

MAGIC = b"GCM1"
HEADER_FORMAT = struct.Struct("<4s4BQQfI")
HEADER_BYTES = HEADER_FORMAT.size
MAX_ELEMENTS = 1 << 31
"""Elements that the 31-bit indices of words can name."""
LARGEST_PAYLOAD = (1 << 32) - 1

NO_MESSAGE: Message = np.zeros(HEADER_BYTES, np.uint8)
"""The value of ``last`` before the first message."""
NO_MESSAGE.flags.writeable = False


class Kind(IntEnum):
    """The kind of payload; its number is in the header."""

    DENSE = 0
    WORDS = 1
    RICE_WORDS = 2
    PAIRS = 3
    SPARSE = 4
    SIGNS = 5
    LEVELS = 6
    NATURAL = 7
    RANGE = 8
    CELLS = 9
    LOW_RANK = 10


class Values(IntEnum):
    """The type of stored elements; its number is in the header."""

    NONE = 0
    F32 = 1
    F16 = 2
    BF16 = 3
    I8 = 4


class Code(IntEnum):
    """The code of indices; its number is in the header."""

    U32 = 0
    BITMAP = 1
    LEB128 = 2
    RICE = 3


VALUE_DTYPES: dict[Values, np.dtype[Any]] = {
    Values.F32: np.dtype("<f4"),
    Values.F16: np.dtype("<u2"),
    Values.BF16: np.dtype("<u2"),
    Values.I8: np.dtype("i1"),
}


class Header(NamedTuple):
    """The first 32 bytes of a message, little-endian: ``GCM1``, four bytes, n and count in 64 bits, scale, length."""

    kind: int
    values: int
    code: int
    parameter: int
    """Of the code: Rice's k, QSGD's levels, PowerSGD's rank."""
    n: int
    """Elements of the vector."""
    elements: int
    """Elements that the message names."""
    scale: float
    """The threshold τ, or the scale of the values."""
    nbytes: int
    """Bytes of payload."""


@dataclass(frozen=True)
class Compressor:
    """One encoding of vectors as messages; the functions of the family modules make it.

    All methods raise :class:`~hpccomm.errors.ArgumentError` for a vector that is not flat, contiguous float32, and
    every encoding but that of :func:`none` for one with a NaN or an infinity.
    """

    name: str
    """The call that made it, for tables and errors."""
    kinds: frozenset[Kind]
    """The kinds of messages that it writes and reads."""
    write: Callable[[Vector, int, Message], Message]
    """(vector, step, last) -> message."""
    feed: Callable[[Vector, Vector | None, Vector, int, Message], Message] | None = None
    """(backlog, gradient or None, out, step, last) -> message, for compressors with a fused pass."""
    feed_momentum: Callable[..., Message] | None = None
    """(gradient, momentum, velocity, m, nesterov, mask, step) -> message, likewise."""
    agree: Callable[[Vector, int], None] | None = None
    """``(total, size)``: turns the sum into the ranks' result, in place of the mean."""
    on_device: bool = False
    """It also takes CuPy vectors, which stay on the device; messages are on the host."""
    is_random: bool = False
    """It rounds at random: ranks encode different steps, so that their errors are independent."""
    unbiased: bool = False
    """The mean of the decoded message, over its random numbers, is the vector (TernGrad's: after clipping)."""
    contraction: Compressor | None = None
    """The form for error feedback, where the decoded message itself may be longer than the vector."""

    def encode(self, vector: Vector, step: int = 0, last: Message = NO_MESSAGE) -> Message:
        """The message for a vector of shape (n,), which is not written.

        ``step`` counts the messages of a sequence: random numbers and sampled positions depend on it (and on the
        compressor's seed).  ``last`` is this rank's previous message, or its first 32 bytes: an adaptive threshold
        continues from it, all others ignore it.
        """
        return self.write(check_flat(vector, self.name, self.on_device), step, last)

    def encode_feedback(
        self,
        backlog: Vector,
        gradient: Vector | None = None,
        *,
        step: int = 0,
        last: Message = NO_MESSAGE,
        out: Vector | None = None,
    ) -> Message:
        """The message for p = ``backlog`` + ``gradient``; the new backlog is p less the decoded message.

        The new backlog is written to ``out``, by default onto ``backlog``; each element is rounded once after the sum
        and once after the difference.  An error leaves ``backlog`` unchanged.
        """
        n = check_flat(backlog, self.name, self.on_device).size
        target = check_writable(backlog if out is None else out, n, self.name, self.on_device)
        if gradient is not None and check_flat(gradient, self.name, self.on_device).size != n:
            raise ArgumentError(
                f"{self.name}: the gradient has {gradient.size} elements, the backlog {backlog.size}: "
                "pass equal lengths"
            )
        if self.feed is not None:
            return self.feed(backlog, gradient, target, step, last)
        p = backlog_of(backlog, gradient)
        message = self.write(p, step, last)
        np.subtract(p, self.decode_vector(message, p.size), out=target)
        return message

    def encode_momentum(
        self,
        gradient: Vector,
        momentum: Vector,
        velocity: Vector,
        m: float,
        *,
        nesterov: bool = False,
        mask: bool = True,
        step: int = 0,
        last: Message = NO_MESSAGE,
        finite: bool = False,
    ) -> Message:
        """DGC's momentum correction: u ← m·u + g, v ← v + u, the message for v; the rest stays in v.

        With ``nesterov`` u ← m·(u + g), v ← v + u + g.  With ``mask`` u becomes 0 where the message names elements
        (momentum factor masking); a message that names all of them leaves u alone.  ``momentum`` is u, ``velocity``
        v: both are written (Lin et al., ICLR 2018, section 3).  A gradient that is not finite leaves them
        unchanged; pass ``finite`` if the caller has checked it.
        """
        n = check_flat(gradient, self.name, self.on_device).size
        for vector in (momentum, velocity):
            check_writable(vector, n, self.name, self.on_device)
        demand_finite(finite or kernels(gradient).all_finite(gradient), self.name)
        if self.feed_momentum is not None:
            return self.feed_momentum(gradient, momentum, velocity, m, nesterov, mask, step)
        accumulate(gradient, momentum, velocity, m, nesterov)
        message = self.encode_feedback(velocity, step=step, last=last)
        if mask:
            momentum[to_device_like(read_indices(message), momentum)] = 0
        return message

    def decode(self, message: Message, out: Vector) -> None:
        """Add the decoded message to ``out``, of shape (n,).

        Raises :class:`~hpccomm.errors.ArgumentError`, ``out`` untouched, for a message that is truncated or
        altered, of another length, or of a kind that this compressor does not write.
        """
        self.decode_all([message], out)

    def decode_all(self, messages: Sequence[Message], out: Vector) -> None:
        """Add messages one after the other: the bits of ``decode`` in this order, in one pass where that is faster."""
        check_writable(out, None, self.name, self.on_device)
        parts = [read(message, out.size, self.kinds, self.name) for message in messages]
        for add, group in groupby(parts, key=lambda part: part.add):
            add([part.content for part in group], out)

    def decode_vector(self, message: Message, n: int) -> Vector:
        """The decoded message, as a new vector."""
        out = np.zeros(n, np.float32)
        self.decode(message, out)
        return out

    def conclude(self, total: Vector, size: int) -> None:
        """Turn the sum of the messages of ``size`` ranks into the result, in place: their mean, or the majority."""
        if self.agree is not None:
            self.agree(total, size)
        else:
            total /= np.float32(size)


def narrow_values(vector: Vector, values: Values) -> npt.NDArray[Any]:
    """Finite elements in their stored type; values that would round to infinity become the largest finite value."""
    if values is Values.F32:
        return vector
    return (kernels().to_half if values is Values.F16 else kernels().to_bfloat16)(vector, True)


def add_stored(stored: npt.NDArray[Any], values: int, scale: float, out: Vector) -> None:
    """Add stored elements."""
    if values == Values.F16:
        kernels().add_half(stored, out)
    elif values == Values.BF16:
        kernels().add_bfloat16(stored, out)
    elif values == Values.I8:
        kernels().add_int8(stored, scale, out)
    else:
        np.add(out, stored, out=out)


def widen_values(stored: npt.NDArray[Any], values: int) -> Vector:
    """Stored elements as float32; those of -0 as 0."""
    if values == Values.F32:
        return stored
    out = np.zeros(stored.size, np.float32)
    add_stored(stored, values, 0.0, out)
    return out


def message_of(
    kind: Kind,
    n: int,
    parts: Sequence[npt.NDArray[Any]],
    *,
    values: Values = Values.F32,
    code: Code = Code.U32,
    parameter: int = 0,
    count: int | None = None,
    scale: float = 0.0,
) -> Message:
    """A header and the parts of the payload one after the other."""
    nbytes = sum(part.nbytes for part in parts)
    if nbytes > LARGEST_PAYLOAD:
        raise ArgumentError(f"encode: a message of {nbytes} bytes: split the vector into buckets below 4 GiB")
    message = np.empty(HEADER_BYTES + nbytes, np.uint8)
    HEADER_FORMAT.pack_into(
        message.data, 0, MAGIC, kind, values, code, parameter, n, n if count is None else count, scale, nbytes
    )
    at = HEADER_BYTES
    for part in parts:
        message[at : at + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        at += part.nbytes
    return message


def header_of(message: Message, who: str = "decode") -> Header:
    """The header of a message (or of its first 32 bytes); raises where it is none."""
    if not isinstance(message, np.ndarray) or message.dtype != np.uint8 or message.ndim != 1:
        raise ArgumentError(f"{who}: a message is a flat uint8 array, this is {describe(message)}")
    if message.size < HEADER_BYTES:
        raise ArgumentError(f"{who}: the message is cut short: {message.size} bytes, a header alone has {HEADER_BYTES}")
    magic, *fields = HEADER_FORMAT.unpack(message[:HEADER_BYTES].tobytes())
    if magic != MAGIC:
        raise ArgumentError(
            f"{who}: the message begins with {bytes(magic)!r}, not {MAGIC!r}: it is damaged, or none of ours"
        )
    return Header(*fields)


class DecodedMessage(NamedTuple):
    """The contents of a message, and the function that adds such contents."""

    add: Callable[[list[Any], Vector], None]
    content: Any


def read(message: Message, n: int, kinds: frozenset[Kind], who: str) -> DecodedMessage:
    """Check a message for ``n`` elements and take it apart."""
    header = header_of(message, who)
    if header.n != n:
        raise ArgumentError(f"{who}: the message is for {header.n} elements, out has {n}: buckets differ between ranks")
    if header.kind not in kinds:
        named = Kind(header.kind).name if header.kind in list(Kind) else header.kind
        raise ArgumentError(f"{who}: a message of kind {named}: the ranks use different compressors")
    if message.size != HEADER_BYTES + header.nbytes:
        raise ArgumentError(
            f"{who}: the message has {message.size} bytes, its header says {HEADER_BYTES + header.nbytes}: "
            "cut short, or displacements do not fit"
        )
    payload = Payload(np.ascontiguousarray(message[HEADER_BYTES:]), who)
    payload.demand(
        header.elements <= n and math.isfinite(header.scale), f"{header.elements} of {n} elements, scale {header.scale}"
    )
    found = READERS[Kind(header.kind)](payload, header)
    payload.demand(payload.at == header.nbytes, f"{header.nbytes} bytes of payload, {payload.at} expected")
    return found


class Payload:
    """The payload of a message, which its reader takes from front to back, all of it; errors name ``who``."""

    def __init__(self, octets: Octets, who: str) -> None:
        self.octets, self.who, self.at = octets, who, 0

    def demand(self, holds: bool, what: str) -> None:
        """Raise for contents that no encoder produces."""
        if not holds:
            raise ArgumentError(f"{self.who}: the message is damaged ({what}): send it again, and check the transport")

    def take(self, count: int, dtype: npt.DTypeLike = np.uint8) -> npt.NDArray[Any]:
        """The next ``count`` elements."""
        kind = np.dtype(dtype)
        end = self.at + count * kind.itemsize
        self.demand(self.at <= end <= self.octets.size, f"{self.octets.size} bytes of payload, {end} needed")
        octets, self.at = self.octets[self.at : end], end
        return view_as(octets, kind)


def view_as(octets: Octets, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """Octets as elements, copied where they are not aligned."""
    return octets.view(kind) if octets.ctypes.data % kind.itemsize == 0 else octets.copy().view(kind)


def read_dense(payload: Payload, header: Header) -> DecodedMessage:
    """All elements."""
    payload.demand(header.values in list(Values)[1:], f"element type {header.values}")
    stored = payload.take(header.n, VALUE_DTYPES[Values(header.values)])
    return DecodedMessage(add_dense, (add_stored, (stored, header.values, header.scale)))


def read_range(payload: Payload, header: Header) -> DecodedMessage:
    """Codes over a range."""
    payload.demand(not header.n or header.scale > 0, f"scale {header.scale}")
    lower = int(payload.take(1, "<i8")[0])
    return DecodedMessage(add_dense, (kernels().add_range, (payload.take(header.n), header.scale or 1.0, lower)))


def read_words(payload: Payload, header: Header) -> DecodedMessage:
    """Words."""
    payload.demand(header.scale > 0, f"threshold {header.scale}")
    words = payload.take(header.elements, "<u4")
    payload.demand(kernels().is_ascending(words >> 1, header.n), "indices out of range or order")
    return DecodedMessage(add_words, (words, header.scale))


def read_coded_words(payload: Payload, header: Header) -> DecodedMessage:
    """Words as Rice codes, or as pairs of bits; a ternary vector of zeros has scale 0."""
    rice = header.kind == Kind.RICE_WORDS
    payload.demand(header.scale > 0 or not (rice or header.scale or header.elements), f"threshold {header.scale}")
    octets, decoded = payload.take(header.nbytes if rice else 4 * -(-header.n // 16)), None
    if not rice:
        decoded = kernels().unpack_pairs(octets, header.n)
    elif header.parameter < 32:
        decoded = kernels().rice_decode(octets, header.elements, header.parameter, header.n, True)
    fits = decoded is not None and decoded.size == header.elements
    payload.demand(fits, f"no codes of {header.elements} elements below {header.n}")
    return DecodedMessage(add_words, (decoded, header.scale or 1.0))


def read_sparse(payload: Payload, header: Header) -> DecodedMessage:
    """Indices and values."""
    payload.demand(
        header.values in (Values.F32, Values.F16, Values.BF16) and header.code in list(Code),
        f"element type {header.values}, index code {header.code}",
    )
    dtype = VALUE_DTYPES[Values(header.values)]
    octets = payload.take(header.nbytes - header.elements * dtype.itemsize)
    index = DECODERS[Code(header.code)](octets, header)
    payload.demand(index is not None, f"indices out of range or order, or not codes of {header.elements} elements")
    return DecodedMessage(add_sparse, (index, widen_values(payload.take(header.elements, dtype), header.values)))


def read_cells(payload: Payload, header: Header) -> DecodedMessage:
    """Values at random positions, which the receiver computes from a key."""
    key, values = int(payload.take(1, "<u8")[0]), payload.take(header.elements, "<f4")
    payload.demand(not key >> 32, f"key {key}")
    return DecodedMessage(add_sparse, (cell_indices(header.n, header.elements, key), values))


def read_signs(payload: Payload, header: Header) -> DecodedMessage:
    """Sign bits and the two values."""
    minus = float(payload.take(1, "<f4")[0])
    payload.demand(math.isfinite(minus), f"scale {minus}")
    return DecodedMessage(add_signs, (payload.take(-(-header.n // 8)), header.scale, minus))


def read_levels(payload: Payload, header: Header) -> DecodedMessage:
    """Levels and the norms of their buckets."""
    bucket, levels = int(payload.take(1, "<u8")[0]), header.parameter
    payload.demand(0 < bucket < 1 << 63 and 1 <= levels <= 127, f"buckets of {bucket}, {levels} levels")
    norms, codes = payload.take(-(-header.n // bucket), "<f4"), payload.take(header.n, "i1")
    in_range = max(codes.max(initial=0), -int(codes.min(initial=0))) <= levels
    payload.demand(bool(np.isfinite(norms).all()) and in_range, "a norm or a level out of range")
    return DecodedMessage(add_dense, (kernels().add_levels, (codes, norms, bucket, levels)))


def read_natural(payload: Payload, header: Header) -> DecodedMessage:
    """Exponents and signs."""
    exponents, signs = payload.take(header.n), payload.take(-(-header.n // 8))
    payload.demand(not (exponents == 255).any(), "an exponent of infinity")
    return DecodedMessage(add_dense, (kernels().add_natural, (exponents, signs)))


def read_low_rank(payload: Payload, header: Header) -> DecodedMessage:
    """The product of two factors."""
    rows, columns, rank = (int(each) for each in payload.take(3, "<u8"))
    fits = header.n <= rows * columns <= 4 * header.n and rank <= min(rows, columns)
    payload.demand(fits, f"a matrix of {rows} times {columns}, rank {rank}")
    left, right = (payload.take(each * rank, "<f4").reshape(each, rank) for each in (rows, columns))
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.ascontiguousarray(left @ right.T).reshape(-1)[: header.n]
    return DecodedMessage(add_dense, (add_stored, (product, Values.F32, 0.0)))


def add_dense(contents: list[tuple[Callable[..., None], tuple[Any, ...]]], out: Vector) -> None:
    """Add messages of all elements, each by its own function."""
    for add, content in contents:
        add(*content, out)


def add_words(contents: list[tuple[Indices, float]], out: Vector) -> None:
    """Add words."""
    for words, tau in contents:
        kernels(out).add_words(words, tau, out)


def add_sparse(contents: list[tuple[Indices, Vector]], out: Vector) -> None:
    """Add sparse vectors."""
    kernels(out).scatter_add(contents, out)


def add_signs(contents: list[tuple[Octets, float, float]], out: Vector) -> None:
    """Add signs."""
    kernels(out).add_signs(contents, out)


READERS: dict[Kind, Callable[[Payload, Header], DecodedMessage]] = {
    Kind.DENSE: read_dense,
    Kind.WORDS: read_words,
    Kind.RICE_WORDS: read_coded_words,
    Kind.PAIRS: read_coded_words,
    Kind.SPARSE: read_sparse,
    Kind.SIGNS: read_signs,
    Kind.LEVELS: read_levels,
    Kind.NATURAL: read_natural,
    Kind.RANGE: read_range,
    Kind.CELLS: read_cells,
    Kind.LOW_RANK: read_low_rank,
}

VALUES_BY_NAME = {"fp32": Values.F32, "fp16": Values.F16, "bf16": Values.BF16}
CODES_BY_NAME = {"u32": Code.U32, "bitmap": Code.BITMAP, "leb128": Code.LEB128, "rice": Code.RICE}


def encode_rice(index: Indices, n: int) -> tuple[Octets, int]:
    """Rice codes and their parameter."""
    k = rice_parameter(n, index.size)
    return kernels().rice_encode(index, k), k


def decode_u32(octets: Octets, header: Header) -> Indices | None:
    """Plain indices, checked."""
    if octets.size != 4 * header.elements:
        return None
    index = view_as(octets, np.dtype("<u4"))
    return index if kernels().is_ascending(index, header.n) else None


ENCODERS: dict[Code, Callable[[Indices, int], tuple[npt.NDArray[Any], int]]] = {
    Code.U32: lambda index, n: (index.astype("<u4", copy=False), 0),
    Code.BITMAP: lambda index, n: (kernels().bitmap_encode(index, n), 0),
    Code.LEB128: lambda index, n: (kernels().leb128_encode(index), 0),
    Code.RICE: encode_rice,
}
"""Indices to bytes and the code's parameter."""

DECODERS: dict[Code, Callable[[Octets, Header], Indices | None]] = {
    Code.U32: decode_u32,
    Code.BITMAP: lambda octets, header: kernels().bitmap_decode(octets, header.elements, header.n),
    Code.LEB128: lambda octets, header: kernels().leb128_decode(octets, header.elements, header.n),
    Code.RICE: lambda octets, header: (
        kernels().rice_decode(octets, header.elements, header.parameter, header.n) if header.parameter < 32 else None
    ),
}
"""Bytes to indices; None for bytes that no encoder writes."""


def read_indices(message: Message) -> Indices:
    """The indices that a message names; empty for a message of all elements."""
    header = header_of(message, "named_indices")
    part = read(message, header.n, frozenset(Kind), "named_indices")
    if part.add is add_sparse:
        return part.content[0]
    if part.add is add_words:
        return part.content[0] >> 1
    return np.empty(0, np.uint32)


def check_flat(vector: Any, who: str, on_device: bool = False) -> Vector:
    """The vector itself, if it is flat float32 in C order, on the host or, where allowed, on a device."""
    there = is_on_device(vector)
    if there and not on_device:
        raise ArgumentError(
            f"{who}: this {type(vector).__name__} lies on a device, which {who} does not take: "
            "wrap the transform with hpccomm.algorithms.device.run_on_host"
        )
    if there and not hasattr(vector, "flags"):
        raise ArgumentError(f"{who}: this {type(vector).__name__} is not CuPy's: pass cupy.from_dlpack(x)")
    if (
        not (there or isinstance(vector, np.ndarray))
        or vector.dtype != np.float32
        or vector.ndim != 1
        or not vector.flags.c_contiguous
    ):
        raise ArgumentError(
            f"{who}: pass a flat contiguous float32 array, this is {describe(vector)}: "
            "np.ascontiguousarray(x, np.float32).reshape(-1), or hpccomm.Bucket"
        )
    return vector


def check_writable(vector: Any, n: int | None, who: str, on_device: bool = False) -> Vector:
    """The vector itself, if it may be written and has the length."""
    if not getattr(check_flat(vector, who, on_device).flags, "writeable", True):  # CuPy's always are
        raise ArgumentError(f"{who}: the vector is read-only: pass a copy")
    if n is not None and vector.size != n:
        raise ArgumentError(f"{who}: a vector has {vector.size} elements, another {n}: pass equal lengths")
    return vector


def describe(x: Any) -> str:
    """A description for an error."""
    if not (isinstance(x, np.ndarray) or is_on_device(x)):
        return type(x).__name__
    return f"{x.dtype} of shape {x.shape}{'' if x.flags.c_contiguous else ', not contiguous'}"


class NotFiniteError(ArgumentError):
    """A vector that cannot be sent because an element, or a sum, is not finite."""


def demand_finite(finite: bool, who: str) -> None:
    """Raise for a NaN or an infinity."""
    if not finite:
        raise NotFiniteError(
            f"{who}: there is a NaN or an infinity: it would stay in the residual for ever; skip this step on all ranks"
        )


def check_density(density: float, who: str) -> None:
    """Raise for a density outside (0, 1]."""
    if not isinstance(density, int | float | np.number) or not 0 < density <= 1:
        raise ArgumentError(f"{who}: the density is {density!r}: pass a number above 0, at most 1")
