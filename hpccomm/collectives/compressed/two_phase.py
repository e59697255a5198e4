"""Means in two phases: shards travel in fewer bytes by all-to-all, are added in float32, and travel back by allgather.

*p ranks, n elements, B elements of a block, m = ⌈n/p⌉ rounded up to whole blocks.*  A rank sends 2(p-1) shards of m
elements.  16-bit floats travel as they are (:func:`mean_of_halves`) and are rounded once, after the last addition.
Coded shards (:func:`mean_of_codes`) have a scale for each block; what rounding loses stays with the rank, and is added
to its next vector.

========  ===  ==============================  =============================================================
code      B    bytes of a block                an element
========  ===  ==============================  =============================================================
int8      256  B + 4                           multiples of max/127
e4m3      256  B + 4                           8-bit floats with 3 bits of mantissa, max becomes 448
e5m2      256  B + 4                           with 2 bits of mantissa, max becomes 57344
mx        32   B + 1                           e4m3 times a power of two (OCP Microscaling, MXFP8)
========  ===  ==============================  =============================================================
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.arrays import narrow, view_for_mpi, widen
from hpccomm.collectives.engine import even_cuts
from hpccomm.errors import ArgumentError

Vector = npt.NDArray[Any]
Octets = npt.NDArray[np.uint8]


class Code(NamedTuple):
    """How a block of float32 is stored."""

    block: int
    """B: elements that share a scale."""
    scale_bytes: int
    encode: Callable[[Vector], tuple[Vector, Vector]]
    """(k, B) finite elements -> (k, 1) scales and (k, B) elements, as stored."""
    decode: Callable[[Vector, Vector], Vector]
    """The inverse, float32."""
    scale_type: Any
    element_type: Callable[[], Any]


def peaks_of(blocks: Vector) -> Vector:
    """(k, 1) largest magnitudes."""
    found: Vector = np.abs(blocks).max(axis=1, keepdims=True, initial=0)
    return found


def scale_to(top: float, element_type: Callable[[], Any]) -> Callable[[Vector], tuple[Vector, Vector]]:
    """Divide each block so that its largest magnitude becomes ``top``, and round to the nearest element."""

    def encode(blocks: Vector) -> tuple[Vector, Vector]:
        scales = peaks_of(blocks) / np.float32(top)
        scaled = np.clip(blocks / np.where(scales > 0, scales, 1), -top, top)
        kind = element_type()
        return scales, (np.rint(scaled) if kind == np.int8 else scaled).astype(kind)

    return encode


def encode_microscaled(blocks: Vector) -> tuple[Vector, Vector]:
    """A power of two for each block, stored as its exponent plus 127; elements above 448 saturate."""
    exponents = np.frexp(peaks_of(blocks))[1] - 1 - 8
    exponents = np.clip(exponents, -127, 127)
    scaled = np.clip(np.ldexp(blocks, -exponents), -448, 448)
    return (exponents + 127).astype(np.uint8), scaled.astype(small_float("float8_e4m3fn"))


def decode_microscaled(scales: Vector, elements: Vector) -> Vector:
    """The inverse of :func:`encode_microscaled`."""
    return np.ldexp(elements.astype(np.float32), scales.astype(np.int32) - 127)


def multiply_back(scales: Vector, elements: Vector) -> Vector:
    """Elements times the scale of their block."""
    return elements.astype(np.float32) * scales


def small_float(name: str) -> Any:
    """An 8-bit dtype of ``ml_dtypes``."""
    try:
        import ml_dtypes
    except ImportError:
        raise ArgumentError(f"{name} needs a package: pip install ml_dtypes, or use the code int8") from None
    return np.dtype(getattr(ml_dtypes, name))


def e4m3() -> Any:
    """8-bit floats with 3 bits of mantissa."""
    return small_float("float8_e4m3fn")


def e5m2() -> Any:
    """8-bit floats with 2 bits of mantissa."""
    return small_float("float8_e5m2")


def int8() -> Any:
    """8-bit integers."""
    return np.dtype(np.int8)


CODES = {
    "int8": Code(256, 4, scale_to(127, int8), multiply_back, np.float32, int8),
    "e4m3": Code(256, 4, scale_to(448, e4m3), multiply_back, np.float32, e4m3),
    "e5m2": Code(256, 4, scale_to(57344, e5m2), multiply_back, np.float32, e5m2),
    "mx": Code(32, 1, encode_microscaled, decode_microscaled, np.uint8, e4m3),
}
"""To add a code is to add a row."""


def encode_blocks(vector: Vector, code: Code) -> Octets:
    """The scales and then the elements of whole blocks, padded with zeros."""
    blocks = np.zeros((-(-vector.size // code.block), code.block), np.float32)
    blocks.reshape(-1)[: vector.size] = vector
    scales, elements = code.encode(blocks)
    return np.concatenate([scales.reshape(-1).view(np.uint8), elements.reshape(-1).view(np.uint8)])


def decode_blocks(octets: Octets, n: int, code: Code) -> Vector:
    """The first n elements, float32."""
    count = octets.size // (code.block + code.scale_bytes)
    first = count * code.scale_bytes
    scales = octets[:first].copy().view(code.scale_type).reshape(count, 1)
    elements = octets[first:].copy().view(code.element_type()).reshape(count, code.block)
    return code.decode(scales, elements).reshape(-1)[:n]


class CodedMean(NamedTuple):
    """The result of :func:`mean_of_codes`."""

    mean: Vector
    """Float32 of shape (n,), the same bits on all ranks."""
    bytes_sent: int


def mean_of_codes(
    comm: Any, x: Vector, code: str, worker_error: Vector | None = None, server_error: Vector | None = None
) -> CodedMean:
    """The mean of the ranks' finite float32 vectors of shape (n,), coded in both phases (collective).

    ``worker_error`` of shape (n,) is added to x before it is coded and becomes what coding lost; ``server_error``, this
    rank's shard cut as by ``numpy.array_split``, likewise for the mean of the shard.  Both are written.
    """
    kind, cuts = CODES[code], even_cuts(x.size, comm.size)
    places = [slice(int(lo), int(hi)) for lo, hi in pairwise(cuts)]
    longest = -(-max((place.stop - place.start for place in places), default=0) // kind.block)
    room = np.zeros((comm.size, longest * (kind.block + kind.scale_bytes)), np.uint8)
    total = x if worker_error is None else x + worker_error
    for row, place in zip(room, places, strict=True):
        coded = encode_blocks(pad(total[place], longest * kind.block), kind)
        row[...] = coded
        if worker_error is not None:
            worker_error[place] = total[place] - decode_blocks(coded, place.stop - place.start, kind)
    arrived, mine = np.empty_like(room), places[comm.rank]
    comm.Alltoall(room.reshape(-1), arrived.reshape(-1))
    shard = np.zeros(mine.stop - mine.start, np.float32)
    for row in arrived:
        shard += decode_blocks(row, shard.size, kind)
    shard /= np.float32(comm.size)
    if server_error is not None:
        shard += server_error
    coded = encode_blocks(pad(shard, longest * kind.block), kind)
    if server_error is not None:
        server_error[...] = shard - decode_blocks(coded, shard.size, kind)
    comm.Allgather(coded, arrived.reshape(-1))
    mean = [decode_blocks(row, place.stop - place.start, kind) for row, place in zip(arrived, places, strict=True)]
    return CodedMean(np.concatenate(mean), 2 * (comm.size - 1) * coded.size)


def pad(vector: Vector, length: int) -> Vector:
    """The vector and zeros."""
    return np.concatenate([vector, np.zeros(length - vector.size, vector.dtype)])


def shard_elements(n: int, size: int) -> int:
    """Elements of a shard of 16-bit floats, the same on all ranks."""
    return -(-n // size)


def mean_of_halves(comm: Any, x: Vector, arrived: Vector) -> tuple[Vector, int]:
    """The mean of 16-bit floats, and the bytes that this rank sends (collective).

    Shards of ``shard_elements(n, p)`` are added in rank order in float32, divided by p, and rounded once.  ``arrived``
    is a buffer of p shards.
    """
    m = shard_elements(x.size, comm.size)
    room = np.zeros(m * comm.size, x.dtype)
    room[: x.size] = x.reshape(-1)
    comm.Alltoall(view_for_mpi(room), view_for_mpi(arrived))
    total = np.zeros(m, np.float32)
    for shard in arrived.reshape(comm.size, m):
        total += widen(shard)
    shard = narrow(total / np.float32(comm.size), x.dtype)
    comm.Allgather(view_for_mpi(shard), view_for_mpi(room))
    return room[: x.size].reshape(x.shape), 2 * (comm.size - 1) * shard.nbytes
