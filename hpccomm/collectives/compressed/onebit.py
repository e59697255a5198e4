"""One bit an element: signs and what they stand for, from all ranks to all.

*p ranks; n elements.*  :func:`onebit_allgather` sends n/8 bytes to each of the p - 1 others, :func:`onebit_allreduce`
2(p-1)/p · n/8 in all.  Bits are packed from the most significant on (``np.packbits``), 1 where the
element is at least 0.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hpccomm.arrays import is_on_device
from hpccomm.collectives.compressed.sparse import (
    BAD_STATE,
    NOT_FINITE,
    NOT_FLAT,
    OK,
    CountingComm,
    allgatherv,
    check_arguments,
)
from hpccomm.collectives.engine import even_cuts
from hpccomm.kernels.compression.reference import Octets, Vector
from hpccomm.kernels.dispatch import compression as kernels


class OneBitMean(NamedTuple):
    """What came of a 1-bit allreduce."""

    mean: Vector
    """Float32 of shape (n,), the same bits on all ranks: ± one scale for each rank's part."""
    scale: float
    """What this rank's signs stood for in the first phase."""
    bytes_sent: int
    """By this rank."""


def server_elements(n: int, rank: int, size: int) -> int:
    """How many elements a rank's server error has: n/p, one more on the first n mod p ranks."""
    cuts = even_cuts(n, size)
    return int(cuts[rank + 1] - cuts[rank])


def onebit_allgather(comm: Any, bits: Octets, plus: float, minus: float, n: int) -> Vector:
    """The sum of the 1-bit vectors of all ranks, added in rank order, on every rank with the same bits (collective).

    ``bits``: uint8 of shape (⌈n/8⌉,); a 1 stands for ``plus``, a 0 for ``minus`` (scale and -scale, or Seide's two
    means).  Returns float32 of shape (n,).  A rank sends 24 bytes of what is compared and ⌈n/8⌉ + 8 to each other, as
    :func:`~hpccomm.collectives.compressed.sparse.gather_messages`.  One rank's error feedback: p = x + error, bits and
    scales of
    p, error = p - what they mean.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves, where a rank's ``bits`` are not
    such, ``plus`` or ``minus`` is not finite, or ``n`` differs.
    """
    wire = CountingComm(comm)
    scales = np.array([plus, minus], np.float32)
    problem = OK if np.isfinite(scales).all() else NOT_FINITE
    if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8 or bits.shape != (-(-n // 8),):
        problem = NOT_FLAT
    check_arguments(wire, "onebit_allgather", problem, 0, n=n)
    letters = wire.gather(np.concatenate([scales.view(np.uint8), bits]))
    total: Vector = np.empty(n, np.float32)
    meanings = [each[:8].copy().view(np.float32) for each in letters]
    kernels().add_signs([(each[8:], *two) for each, two in zip(letters, meanings, strict=True)], total, fresh=True)
    return total


def onebit_allreduce(comm: Any, x: Vector, worker_error: Vector, server_error: Vector) -> OneBitMean:
    """The mean of all ranks' vectors, one bit an element each way, on every rank with the same bits (collective).

    Rank k: p = x + ``worker_error``, s = mean \\|p\\|, ``worker_error`` = p - s·sign(p); part j of the signs goes to
    rank j.  Rank j: b = the mean of what it received, in rank order, + ``server_error``; s' = mean \\|b\\|,
    ``server_error`` = b - s'·sign(b); its signs go to everyone.  sign(0) is 1.  Over any number of steps the means add
    up to the mean of all x, less the mean of the worker errors, less the server errors (Tang et al., ICML 2021,
    algorithm 1; Seide et al., Interspeech 2014, with the mean magnitude in place of two means a column).

    ``x``, ``worker_error``: float32 of shape (n,); ``server_error``: float32 of :func:`server_elements`.  Both errors
    are zeros at first, are written, and belong to this rank.  A rank sends ⌈part/8⌉ + 4 bytes to each other rank in
    each phase, and 40 of what is compared.
    Arrays of CuPy's, all three, stay on the device; bits pass through the host.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves and the errors untouched, where an
    array is not such, holds a NaN or an infinity or sums that exceed float32, or n differs.
    """
    wire = CountingComm(comm)
    problem, scale = check_inputs(x, worker_error, server_error, wire)
    check_arguments(wire, "onebit_allreduce", problem, 0, n=np.size(x))
    cuts = even_cuts(x.size, wire.size)
    parts = [slice(int(lo), int(hi)) for lo, hi in pairwise(cuts)]
    letters = [encode_signs(worker_error[part], x[part], scale) for part in parts]
    mine = np.empty_like(server_error)
    kernels(mine).add_signs([decode_signs(each) for each in wire.alltoall(letters)], mine, fresh=True)
    mine /= np.float32(wire.size)
    answer = encode_signs(server_error, mine, mean_magnitude(server_error, mine))
    lengths = np.array([letter.size for letter in letters], np.int64)
    mean = np.empty_like(x)
    for part, letter in zip(parts, allgatherv(wire, answer, lengths), strict=True):
        kernels(mean).add_signs([decode_signs(letter)], mean[part], fresh=True)
    return OneBitMean(mean, scale, wire.bytes_sent)


def check_inputs(x: Any, worker_error: Any, server_error: Any, wire: CountingComm) -> tuple[int, float]:
    """Which problem the arrays have, and the scale of the first phase."""
    kind = type(x) if is_on_device(x) else np.ndarray
    for array in (x, worker_error, server_error):
        if not isinstance(array, kind) or array.dtype != np.float32 or array.ndim != 1:
            return NOT_FLAT, 0.0
        if not array.flags.c_contiguous:
            return NOT_FLAT, 0.0
    lengths = x.size, server_elements(x.size, wire.rank, wire.size)
    fit = [
        error.size == length and getattr(error.flags, "writeable", True)
        for error, length in zip((worker_error, server_error), lengths, strict=True)
    ]
    scale = mean_magnitude(worker_error, x) if fit[0] else math.nan
    if not math.isfinite(scale) and not kernels(x).all_finite(x):
        return NOT_FINITE, scale
    if not all(fit) or not kernels(x).all_finite(server_error):
        return BAD_STATE, scale
    if math.isfinite(scale):  # so is every element of both
        return OK, scale
    return (NOT_FINITE if kernels(x).all_finite(worker_error) else BAD_STATE), scale


def mean_magnitude(error: Vector, x: Vector) -> float:
    """Of error + x; 0 where there are no elements, not finite where the sum of them is not."""
    if not x.size:
        return 0.0
    return float(np.float32(kernels(x).sum_magnitudes(error, x) / x.size))


def encode_signs(error: Vector, x: Vector, scale: float) -> Octets:
    """The scale and the signs of error + x; the error becomes what they do not say."""
    letter = np.empty(4 + -(-x.size // 8), np.uint8)
    letter[:4] = np.array([scale], np.float32).view(np.uint8)
    kernels(x).pack_signs_feedback(error, x, error, scale, -scale, letter[4:])
    return letter


def decode_signs(letter: Octets) -> tuple[Octets, float, float]:
    """Bits and what they stand for."""
    scale = float(letter[:4].copy().view(np.float32)[0])
    return letter[4:], scale, -scale
