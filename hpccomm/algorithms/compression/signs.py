"""Compressors that send one bit for each element: its sign.

*n elements.*  A message holds n/8 bytes and the decoded values of the two signs.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from hpccomm.algorithms.compression.format import (
    HEADER_BYTES,
    Compressor,
    Kind,
    Message,
    demand_finite,
    message_of,
)
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels
from hpccomm.kernels.vectors.reference import Octets, Vector


def onebit(scale: Literal["l1", "per-sign"] = "l1") -> Compressor:
    """The sign of each element, 0 counting as plus, times a scale.

    ``"l1"``: the mean magnitude, which is a contraction for every vector (EF-signSGD, Karimireddy et al., ICML 2019).
    ``"per-sign"``: the mean of the elements ≥ 0 and the mean of the others (Seide et al., Interspeech 2014).
    """
    name = f"onebit({scale!r})"
    if scale not in ("l1", "per-sign"):
        raise ArgumentError(f"{name}: pass 'l1' or 'per-sign'")

    def scales(backlog: Vector, gradient: Vector | None) -> tuple[float, float]:
        if scale == "l1":
            total = kernels(backlog).sum_magnitudes(backlog, gradient)
            demand_finite(math.isfinite(total), name)
            mean = float(np.float32(total / max(1, backlog.size)))
            return mean, -mean
        above, below, count = kernels(backlog).sum_by_sign(backlog, gradient)
        demand_finite(math.isfinite(above) and math.isfinite(below), name)
        return float(np.float32(above / max(1, count))), float(np.float32(below / max(1, backlog.size - count)))

    def feed(backlog: Vector, gradient: Vector | None, out: Vector, step: int, last: Message) -> Message:
        plus, minus = scales(backlog, gradient)
        message, bits = signs_message(backlog.size, plus, minus)
        kernels(backlog).pack_signs_feedback(backlog, gradient, out, plus, minus, bits)
        return message

    def write(vector: Vector, step: int, last: Message) -> Message:
        message, bits = signs_message(vector.size, *scales(vector, None))
        bits[...] = kernels(vector).pack_signs(vector)
        return message

    return Compressor(name, frozenset({Kind.SIGNS}), write, feed, on_device=True)


def sign_majority() -> Compressor:
    """One vote ±1 an element, 0 counting as plus; the result is the majority of the ranks, plus in a tie.

    signSGD with majority vote (Bernstein et al., ICML 2018).  The method has no error feedback; with feedback the
    residual is p ∓ 1.
    """
    name = "sign_majority()"

    def write(vector: Vector, step: int, last: Message) -> Message:
        demand_finite(kernels().all_finite(vector), name)
        message, bits = signs_message(vector.size, 1.0, -1.0)
        bits[...] = kernels().pack_signs(vector)
        return message

    def agree(total: Vector, size: int) -> None:
        total[...] = np.where(total >= 0, np.float32(1), np.float32(-1))

    return Compressor(name, frozenset({Kind.SIGNS}), write, agree=agree)


def signs_message(n: int, plus: float, minus: float) -> tuple[Message, Octets]:
    """A message with room for its bits, and that room: n/8 bytes after the value for minus."""
    message = message_of(Kind.SIGNS, n, [np.array([minus], "<f4"), np.empty(-(-n // 8), np.uint8)], scale=plus, count=n)
    return message, message[HEADER_BYTES + 4 :]
