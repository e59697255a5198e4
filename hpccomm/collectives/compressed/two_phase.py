"""Means in two phases: shards travel in fewer bytes by all-to-all, are added in float32, and travel back by allgather.

*p ranks, n elements, B elements of a block, m = ⌈n/p⌉.*  A rank sends 2(p-1) shards of m elements.  16-bit floats
travel as they are (:func:`mean_of_halves`) and are rounded once, after the last addition.
Coded shards (:func:`mean_of_codes`) have a scale for each block; what rounding loses stays with the rank, and is added
to its next vector.  Where several nodes have k ranks each, these add their vectors in float32 first, and rank j of each
node exchanges a part of n/k elements with its peers (:func:`mean_by_nodes`): 1/k of the bytes pass through a node's
link.  :func:`sum_of_codes` is the first phase alone, a reduce-scatter.

========  ===  ==============================  =============================================================
code      B    bytes of a block                an element
========  ===  ==============================  =============================================================
int8      256  B + 4                           multiples of max/127
e4m3      256  B + 4                           8-bit floats with 3 bits of mantissa, max becomes 448
e5m2      256  B + 4                           with 2 bits of mantissa, max becomes 57344
mx        32   B + 1                           e4m3 times a power of two (OCP Microscaling, MXFP8)
int4      128  B/2 + 4                         multiples of max/7, two in a byte
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
from hpccomm.kernels.dispatch import kernels
from hpccomm.kernels.quantized.reference import largest_scale

Vector = npt.NDArray[Any]
Octets = npt.NDArray[np.uint8]


Stored = tuple[Vector, Vector]
"""The scales of the blocks and their elements, as stored."""


class Code(NamedTuple):
    """How a block of float32 is stored."""

    block: int
    """B: elements that share a scale."""
    scale_bytes: int
    encode: Callable[[Vector, Vector | None, Vector | None], Stored]
    """(x, residual, lost) of shape (n,) -> what is stored of x + residual; ``lost`` becomes what that loses."""
    add: Callable[[Vector, Vector, Vector], None]
    """(scales, elements, out): add the n elements of ``out`` that are stored to it."""
    scale_type: Any
    element_type: Callable[[], Any]
    bits: int = 8
    """Of an element as stored."""

    def nbytes(self, n: int) -> int:
        """Bytes of n elements with the scales of their blocks."""
        return self.nbytes_of_scales(n) + -(-n * self.bits // 8)

    def nbytes_of_scales(self, n: int) -> int:
        """Bytes of the scales of n elements."""
        return -(-n // self.block) * self.scale_bytes


def whole_numbers(block: int, top: int) -> Code:
    """Multiples of max/``top``; of up to 7, two in a byte, the first in its lower half."""
    pairs = top < 8

    def encode(x: Vector, residual: Vector | None, lost: Vector | None) -> Stored:
        scales, codes = kernels().block_codes(x, residual, block, top, lost)
        if not pairs:
            return scales, codes
        codes = np.append(codes, np.int8(0)) if codes.size % 2 else codes
        return scales, (codes[0::2] & 15) | (codes[1::2] << 4)

    def add(scales: Vector, stored: Vector, out: Vector) -> None:
        if pairs:
            stored = np.stack([stored << 4 >> 4, stored >> 4], axis=1).reshape(-1)[: out.size]
        kernels().add_levels(stored, scales, block, 1, out)

    return Code(block, 4, encode, add, np.float32, int8, bits=4 if pairs else 8)


def small_floats(
    block: int,
    scale_type: Any,
    element_type: Callable[[], Any],
    scale: Callable[[Vector], Vector],
    shrink: Callable[[Vector, Vector], Vector],
    grow: Callable[[Vector, Vector], Vector],
) -> Code:
    """Elements of ``element_type``: ``scale`` of (k, 1) peaks, ``shrink`` of (k, B) blocks by scales, its inverse."""

    def encode(x: Vector, residual: Vector | None, lost: Vector | None) -> Stored:
        with np.errstate(over="ignore", invalid="ignore"):
            total = x if residual is None else x + residual
            blocks = np.zeros((-(-x.size // block), block), np.float32)
            blocks.reshape(-1)[: x.size] = total if kernels().all_finite(total) else np.nan
            scales = scale(np.abs(blocks).max(axis=1, keepdims=True, initial=0))
            elements = shrink(blocks, scales).astype(element_type())
        if lost is not None:
            np.subtract(total, grow(elements, scales).reshape(-1)[: x.size], out=lost)
        return scales.reshape(-1), elements.reshape(-1)[: x.size]

    def add(scales: Vector, stored: Vector, out: Vector) -> None:
        blocks = np.zeros((scales.size, block), stored.dtype)
        blocks.reshape(-1)[: stored.size] = stored
        out += grow(blocks, scales[:, None]).reshape(-1)[: out.size]

    return Code(block, np.dtype(scale_type).itemsize, encode, add, scale_type, element_type)


def scale_to(top: float, element_type: Callable[[], Any]) -> Code:
    """Each block divided so that its largest magnitude becomes ``top``."""
    return small_floats(
        256,
        np.float32,
        element_type,
        lambda peaks: np.minimum(peaks / np.float32(top), largest_scale(top)),
        lambda blocks, scales: np.clip(blocks / np.where(scales > 0, scales, 1), -top, top),
        lambda elements, scales: elements.astype(np.float32) * scales,
    )


def scale_by_powers_of_two() -> Code:
    """A power of two for each block, stored as its exponent plus 127; elements above 448 saturate."""
    return small_floats(
        32,
        np.uint8,
        e4m3,
        lambda peaks: (np.clip(np.frexp(peaks)[1] - 1 - 8, -127, 127) + 127).astype(np.uint8),
        lambda blocks, scales: np.clip(np.ldexp(blocks, 127 - scales.astype(np.int32)), -448, 448),
        lambda elements, scales: np.ldexp(elements.astype(np.float32), scales.astype(np.int32) - 127),
    )


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
    "int8": whole_numbers(256, 127),
    "e4m3": scale_to(448, e4m3),
    "e5m2": scale_to(57344, e5m2),
    "mx": scale_by_powers_of_two(),
    "int4": whole_numbers(128, 7),
}
"""To add a code is to add a row."""


def encode_blocks(vector: Vector, code: Code) -> Octets:
    """The scales of the blocks, the last of which may be short, and then the elements: ``code.nbytes(n)`` bytes.

    A vector with a NaN or an infinity becomes one of NaNs.
    """
    octets = np.empty(code.nbytes(vector.size), np.uint8)
    write_blocks(octets, vector.size, code, vector)
    return octets


def write_blocks(
    octets: Octets, n: int, code: Code, x: Vector, residual: Vector | None = None, lost: Vector | None = None
) -> None:
    """Write x + residual and zeros, n elements; ``lost``, which may be ``residual``, becomes what rounding loses."""
    first = code.nbytes_of_scales(n)
    scales, elements = (each.view(np.uint8) for each in code.encode(x, residual, lost))
    for part, stored in ((octets[:first], scales), (octets[first:], elements)):
        part[: stored.size] = stored
        part[stored.size :] = 0


def decode_blocks(octets: Octets, n: int, code: Code) -> Vector:
    """The n elements, float32."""
    out = np.zeros(n, np.float32)
    add_blocks(octets, n, code, out)
    return out


def add_blocks(octets: Octets, n: int, code: Code, out: Vector) -> None:
    """Add the first of the n elements to ``out``."""
    first, count = code.nbytes_of_scales(n), -(-out.size // code.block)
    scales = octets[:first].copy().view(code.scale_type)[:count]
    stored = octets[first:][: -(-out.size * code.bits // 8)].view(code.element_type())
    code.add(scales, stored, out)


def sum_of_codes(comm: Any, rows: Vector, code: str) -> tuple[Vector, int]:
    """The sum over the ranks of the row that each has for this rank, and the bytes that this rank sends (collective).

    ``rows``: float32 of shape (p, m), row r for rank r.  The sum is float32 of shape (m,), added in rank order; it is
    NaN where a rank's row is not finite.  A single rank codes nothing.
    """
    if comm.size == 1:
        return rows[0], 0
    kind, m = CODES[code], rows.shape[1]
    coded = np.stack([encode_blocks(row, kind) for row in rows])
    return add_coded(comm, coded, m, kind, m), (comm.size - 1) * kind.nbytes(m)


def add_coded(comm: Any, coded: Octets, m: int, kind: Code, size: int) -> Vector:
    """The sum of the first ``size`` of m elements that each rank has coded for this one in its row (collective)."""
    arrived, total = np.empty_like(coded), np.zeros(size, np.float32)
    if m:
        comm.Alltoall(coded.reshape(-1), arrived.reshape(-1))
    for row in arrived:
        add_blocks(row, m, kind, total)
    return total


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
    longest = max((place.stop - place.start for place in places), default=0)
    room = np.empty((comm.size, kind.nbytes(longest)), np.uint8)
    for row, place in zip(room, places, strict=True):
        error = None if worker_error is None else worker_error[place]
        write_blocks(row, longest, kind, x[place], error, error)
    mine = places[comm.rank]
    shard = add_coded(comm, room, longest, kind, mine.stop - mine.start)
    shard /= np.float32(comm.size)
    coded = np.empty(kind.nbytes(longest), np.uint8)
    write_blocks(coded, longest, kind, shard, server_error, server_error)
    comm.Allgather(coded, room.reshape(-1))
    mean = np.zeros(x.size, np.float32)
    for row, place in zip(room, places, strict=True):
        add_blocks(row, longest, kind, mean[place])
    return CodedMean(mean, 2 * (comm.size - 1) * coded.size)


def mean_by_nodes(
    comm: Any, x: Vector, code: str, worker_error: Vector | None = None, server_error: Vector | None = None
) -> CodedMean:
    """As :func:`mean_of_codes`, with a dense sum inside the nodes where that saves bytes between them (collective).

    Then ``worker_error`` is that of the elements that this rank codes for its node, and 0 elsewhere; the errors of all
    ranks still add up to what no mean holds.
    """
    layout = getattr(comm, "layout", None)
    if layout is None or not (layout.even and 1 < layout.count < layout.size):
        return mean_of_codes(comm, x, code, worker_error, server_error)
    node, cuts = comm.intra_node, even_cuts(x.size, comm.size)
    total = np.ascontiguousarray(x if worker_error is None else x + worker_error)
    summed = np.empty_like(total)
    node.Allreduce(total, summed)
    parts = [[slice(int(cuts[r]), int(cuts[r + 1])) for r in layout.channel(first)] for first in layout.members(0)]
    own, k = parts[node.rank], np.float32(node.size)
    mine = np.concatenate([summed[place] for place in own]) / k
    lost = None if worker_error is None else np.zeros_like(mine)
    mean, sent = mean_of_codes(comm.inter_node, mine, code, lost, server_error)
    if worker_error is not None and lost is not None:
        worker_error[...] = 0
        put_blocks(worker_error, own, lost * k)
    lengths = [sum(place.stop - place.start for place in part) for part in parts]
    gathered, whole = np.empty_like(total), np.empty_like(total)
    node.Allgatherv(mean, [gathered, lengths])
    put_blocks(whole, [place for part in parts for place in part], gathered)
    inside = (node.size - 1) * (2 * x.nbytes // node.size + mean.nbytes)
    return CodedMean(whole, sent + inside)


def put_blocks(vector: Vector, places: list[slice], values: Vector) -> None:
    """Write values into some places of a vector, one after the other."""
    first = 0
    for place in places:
        vector[place] = values[first : first + place.stop - place.start]
        first += place.stop - place.start


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
