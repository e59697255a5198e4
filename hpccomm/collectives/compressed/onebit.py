"""Allgather and allreduce of sign vectors with one bit an element and two decoded values.

*p ranks; n elements.*  :func:`onebit_allgather` sends n/8 bytes to each of the p - 1 other ranks,
:func:`onebit_allreduce` 2(p-1)/p · n/8 in all.  Bits are packed from the most significant on (``np.packbits``); a bit
is 1 where the element is at least 0.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hpccomm.arrays import is_on_device
from hpccomm.collectives.compressed.messages import (
    BAD_STATE,
    NOT_FINITE,
    NOT_FLAT,
    OK,
    Comm,
    CountingComm,
    allgatherv,
    check_arguments,
    demand_whole,
)
from hpccomm.collectives.engine import even_cuts
from hpccomm.kernels.dispatch import kernels
from hpccomm.kernels.vectors.reference import Octets, Vector


class OneBitMean(NamedTuple):
    """The result of a 1-bit allreduce."""

    mean: Vector
    """Float32 of shape (n,), the same bits on all ranks: ± one scale for each rank's block."""
    scale: float
    """The decoded magnitude of this rank's signs in the first phase."""
    bytes_sent: int
    """Bytes sent by this rank."""


def server_elements(n: int, rank: int, size: int) -> int:
    """The number of elements of a rank's server error: n/p, one more on the first n mod p ranks."""
    cuts = even_cuts(n, size)
    return int(cuts[rank + 1] - cuts[rank])


def onebit_allgather(comm: Comm, bits: Octets, plus: float, minus: float, n: int) -> Vector:
    """The sum of the 1-bit vectors of all ranks, added in rank order, on every rank with the same bits (collective).

    ``bits``: uint8 of shape (⌈n/8⌉,); a 1 stands for ``plus``, a 0 for ``minus`` (scale and -scale, or Seide's two
    means).  Returns float32 of shape (n,).  A rank sends 24 bytes of arguments to each other rank, and ⌈n/8⌉ + 8 bytes
    by :func:`~hpccomm.collectives.compressed.messages.gather_messages`.  Error feedback of a rank: p = x + error; it
    sends bits and scales of p; error = p - their decoded values.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves, where a rank passes other ``bits``,
    ``plus`` or ``minus`` is not finite, or ``n`` differs.
    """
    wire = CountingComm(comm)
    scales = np.array([plus, minus], np.float32)
    problem = OK if np.isfinite(scales).all() else NOT_FINITE
    if not isinstance(bits, np.ndarray) or bits.dtype != np.uint8 or bits.shape != (-(-n // 8),):
        problem = NOT_FLAT
    check_arguments(wire, "onebit_allgather", problem, 0, n=n)
    messages = wire.gather(np.concatenate([scales.view(np.uint8), bits]))
    for each in messages:
        demand_whole(each.size == 8 + bits.size, f"{each.size} bytes for {n} signs")
    total: Vector = np.empty(n, np.float32)
    decoded = [each[:8].copy().view(np.float32) for each in messages]
    kernels().add_signs([(each[8:], *two) for each, two in zip(messages, decoded, strict=True)], total, fresh=True)
    return total


def onebit_allreduce(comm: Comm, x: Vector, worker_error: Vector, server_error: Vector) -> OneBitMean:
    """The mean of all ranks' vectors, one bit an element each way, on every rank with the same bits (collective).

    Rank k: p = x + ``worker_error``, s = mean \\|p\\|, ``worker_error`` = p - s·sign(p); it sends block j of the signs
    to rank j.  Rank j: b = the mean of the received blocks, in rank order, + ``server_error``; s' = mean \\|b\\|,
    ``server_error`` = b - s'·sign(b); it sends its signs to all ranks.  sign(0) is 1.  Over any number of steps the
    means add up to the mean of all x, less the mean of the worker errors, less the server errors (Tang et al., ICML
    2021, algorithm 1; Seide et al., Interspeech 2014, with the mean magnitude in place of two means a column).

    ``x``, ``worker_error``: float32 of shape (n,); ``server_error``: float32 of :func:`server_elements`.  Both errors
    are zeros at first, are updated, and belong to this rank.  A rank sends ⌈block/8⌉ + 4 bytes to each other rank in
    each phase, and 40 bytes of arguments.  If all three arrays are CuPy's, they stay on the device; bits pass through
    the host.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves and with the errors unchanged, where
    a rank passes other arrays, a NaN, an infinity or sums that exceed float32, or n differs.
    """
    wire = CountingComm(comm)
    problem, scale = check_inputs(x, worker_error, server_error, wire)
    check_arguments(wire, "onebit_allreduce", problem, 0, n=np.size(x))
    cuts = even_cuts(x.size, wire.size)
    blocks = [slice(int(lo), int(hi)) for lo, hi in pairwise(cuts)]
    messages = [encode_signs(worker_error[block], x[block], scale) for block in blocks]
    mine = np.empty_like(server_error)
    kernels(mine).add_signs([decode_signs(each, mine.size) for each in wire.alltoall(messages)], mine, fresh=True)
    mine /= np.float32(wire.size)
    answer = encode_signs(server_error, mine, mean_magnitude(server_error, mine))
    lengths = np.array([message.size for message in messages], np.int64)
    mean = np.empty_like(x)
    for block, message in zip(blocks, allgatherv(wire, answer, lengths), strict=True):
        kernels(mean).add_signs([decode_signs(message, block.stop - block.start)], mean[block], fresh=True)
    return OneBitMean(mean, scale, wire.bytes_sent)


def check_inputs(x: Any, worker_error: Any, server_error: Any, wire: CountingComm) -> tuple[int, float]:
    """The problem of the arrays, as an index of ``PROBLEMS``, and the scale of the first phase."""
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
    """The mean magnitude of error + x; 0 without elements, not finite where the sum is not."""
    if not x.size:
        return 0.0
    return float(np.float32(kernels(x).sum_magnitudes(error, x) / x.size))


def encode_signs(error: Vector, x: Vector, scale: float) -> Octets:
    """The message with scale and signs of error + x; the error becomes error + x minus the decoded values."""
    message = np.empty(4 + -(-x.size // 8), np.uint8)
    message[:4] = np.array([scale], np.float32).view(np.uint8)
    kernels(x).pack_signs_feedback(error, x, error, scale, -scale, message[4:])
    return message


def decode_signs(message: Octets, n: int) -> tuple[Octets, float, float]:
    """The bits and the two decoded values of a message of n signs; raises for one of another length."""
    demand_whole(message.size == 4 + -(-n // 8), f"{message.size} bytes for {n} signs")
    scale = float(message[:4].copy().view(np.float32)[0])
    return message[4:], scale, -scale
