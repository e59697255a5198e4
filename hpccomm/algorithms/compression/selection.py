"""Compressors that send some elements and leave out the others: by a threshold, the largest, or at random places.

*n elements, d density, τ threshold.*  Bytes: :func:`threshold` 4dn (n/4 at most), :func:`topk` 8dn, :func:`randomk`
4dn + 8.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from hpccomm.algorithms.compression.format import (
    CODES_BY_NAME,
    ENCODERS,
    HEADER_BYTES,
    MAX_ELEMENTS,
    NO_MESSAGE,
    VALUE_DTYPES,
    VALUES_BY_NAME,
    Code,
    Compressor,
    Kind,
    Message,
    check_density,
    demand_finite,
    header_of,
    message_of,
    narrow_values,
    read_indices,
    widen_values,
)
from hpccomm.algorithms.transforms import check_seed
from hpccomm.arrays import to_device_like, to_host
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels
from hpccomm.kernels.index_codes.reference import rice_parameter
from hpccomm.kernels.selection.reference import cell_indices
from hpccomm.kernels.vectors.reference import Indices, Vector, backlog_of, key_of

DECAY = 0.5 ** (1 / 20)
MIN_DENSITY, MAX_DENSITY, FIRST_DENSITY = 1e-4, 1e-2, 1e-3
FAR_TOO_MANY = 0.1
"""From this density on τ is so far off that steps of 3.5 % would not reach it in useful time."""


def adapt_tau(
    tau: float, density: float, fewest: float = MIN_DENSITY, most: float = MAX_DENSITY, decay: float = DECAY
) -> float:
    """The next τ after a message of this density: smaller below ``fewest``, larger above ``most`` (DL4J's rule)."""
    if density < fewest:
        return tau * decay
    return tau / decay if density > most else tau


def threshold(
    tau: float | Literal["auto"] = "auto", *, density: float | None = None, code: Literal["words", "rice"] = "words"
) -> Compressor:
    """±τ for each element of magnitude τ or more, one quantum whatever its magnitude (GTC: Strom, Interspeech 2015).

    ``tau`` is in the units of the vector.  ``"auto"`` starts with the τ that 0.1 % of the elements reach, and
    changes it by 3.5 % whenever the previous message (``last``) named fewer than 0.01 % or more than 1 % of the
    elements, but not below the mean of the elements other than 0 where these are few; without ``last``, and after a
    message of none or of more than 10 %, it starts anew.  ``density`` chooses τ
    for each vector so that this fraction of its elements reach it, estimated on a sample, or, where hardly more
    elements are other than 0, those above the mean of these.  τ is in the message, so ranks may differ.

    A message names an element in a 32-bit word, or with ``code="rice"`` in about 1.5 + log2(1/d) bits; from d = 1/16 on
    all elements take two bits.
    """
    name = f"threshold({tau if density is None else f'density={density}'})"
    if density is not None:
        if tau != "auto":
            raise ArgumentError(f"{name}: pass tau or density, not both")
        check_density(density, name)
    elif isinstance(tau, str):
        if tau != "auto":
            raise ArgumentError(f"threshold: tau is {tau!r}: pass a positive number or 'auto'")
    elif not (isinstance(tau, int | float | np.number) and tau > 0 and math.isfinite(tau) and np.float32(tau) > 0):
        raise ArgumentError(f"threshold: tau is {tau}: pass a positive number, in the units of the gradient, or 'auto'")
    if code not in ("words", "rice"):
        raise ArgumentError(f"{name}: code is {code!r}: pass 'words' or 'rice'")

    def choose(backlog: Vector, gradient: Vector | None, step: int, last: Message) -> float:
        if density is None and not isinstance(tau, str):
            return float(np.float32(tau))
        least = 0.0
        if density is None and last[:HEADER_BYTES].any():
            before = header_of(last, name)
            sent = before.elements / max(1, before.n)
            if before.elements and sent <= FAR_TOO_MANY:
                least = float(np.float32(adapt_tau(before.scale, sent)))
                if sent >= MIN_DENSITY:
                    return least
        found = kernels(backlog).density_threshold(backlog, gradient, density or FIRST_DENSITY, step)
        return max(least, found) or 1.0

    def feed(backlog: Vector, gradient: Vector | None, out: Vector, step: int, last: Message) -> Message:
        if backlog.size >= MAX_ELEMENTS:
            raise ArgumentError(f"{name}: {backlog.size} elements: split them into buckets below 2**31")
        if np.may_share_memory(out, backlog):
            demand_finite(kernels(backlog).all_finite(backlog if gradient is None else gradient), name)
        chosen = choose(backlog, gradient, step, last)
        demand_finite(math.isfinite(chosen), name)
        words, finite = kernels(backlog).threshold_words(backlog, gradient, out, chosen)
        demand_finite(finite, name)
        return words_message(words, backlog.size, chosen, code)

    def write(vector: Vector, step: int, last: Message) -> Message:
        return feed(vector, None, np.empty_like(vector), step, last)

    return Compressor(name, frozenset({Kind.WORDS, Kind.RICE_WORDS, Kind.PAIRS}), write, feed, on_device=True)


def words_message(words: Indices, n: int, tau: float, code: str) -> Message:
    """A message of words, of Rice codes if asked, or of two bits an element where that is shorter."""
    count = words.size
    if code == "rice":
        k = rice_parameter(n, count)
        octets = kernels().rice_encode(words >> 1, k, words & 1)
        return message_of(Kind.RICE_WORDS, n, [octets], count=count, scale=tau, code=Code.RICE, parameter=k)
    if 16 * count > n:
        return message_of(Kind.PAIRS, n, [kernels().pack_pairs(words, n)], count=count, scale=tau)
    return message_of(Kind.WORDS, n, [words], count=count, scale=tau)


def topk(
    density: float,
    *,
    exact: bool = False,
    values: Literal["fp32", "fp16", "bf16"] = "fp32",
    code: Literal["auto", "u32", "bitmap", "leb128", "rice"] = "auto",
) -> Compressor:
    """The k = max(1, ceil(density · n)) elements of largest magnitude, the first of equal ones; zeros are never sent.

    A threshold is estimated on about 1 % of the elements and the largest k of those that reach it are sent (Lin et al.,
    ICLR 2018, section 3, hierarchical).  If fewer than k reach it, 0.8 k are accepted, or with ``exact`` a lower
    threshold finds the rest, so that the message always names the k largest.

    ``values`` may be narrowed (feedback keeps the rounding error).  ``code="auto"`` is ``"u32"`` below one element
    in 32 and ``"bitmap"`` above.
    """
    name = f"topk({density})"
    check_density(density, name)
    if values not in tuple(VALUES_BY_NAME) or code not in ("auto", *CODES_BY_NAME):
        raise ArgumentError(
            f"{name}: values={values!r}, code={code!r}: pass one of {', '.join(VALUES_BY_NAME)} and one of auto, "
            f"{', '.join(CODES_BY_NAME)}"
        )
    stored, least = VALUES_BY_NAME[values], 1.0 if exact else 0.8

    def message(n: int, index: Indices, chosen: Vector) -> tuple[Message, Vector]:
        """The message, and the rounding error of the selected elements."""
        narrow = narrow_values(chosen, stored)
        which = CODES_BY_NAME[code] if code != "auto" else Code.U32 if 32 * index.size < n else Code.BITMAP
        octets, parameter = ENCODERS[which](index, n)
        parts = [octets, narrow.astype(VALUE_DTYPES[stored], copy=False)]
        rest = chosen - widen_values(narrow, stored)
        return message_of(Kind.SPARSE, n, parts, values=stored, code=which, parameter=parameter, count=index.size), rest

    def select(p: Vector, step: int) -> tuple[Indices, Vector]:
        if not p.size:
            return np.empty(0, np.uint32), to_host(p)
        index, finite = kernels(p).select_largest(p, count_of(density, p.size), step, least)
        demand_finite(finite, name)
        return index, to_host(p[to_device_like(index, p)])

    def write(vector: Vector, step: int, last: Message) -> Message:
        return message(vector.size, *select(vector, step))[0]

    def feed(backlog: Vector, gradient: Vector | None, out: Vector, step: int, last: Message) -> Message:
        in_place = np.may_share_memory(out, backlog)
        if gradient is not None:
            if in_place:
                demand_finite(kernels(gradient).all_finite(gradient), name)
            np.add(backlog, gradient, out=out)
        elif not in_place:
            out[...] = backlog
        index, chosen = select(out, step)
        written, rest = message(out.size, index, chosen)
        out[to_device_like(index, out)] = to_device_like(rest, out)
        return written

    def feed_momentum(
        gradient: Vector, momentum: Vector, velocity: Vector, m: float, nesterov: bool, mask: bool, step: int
    ) -> Message:
        n = gradient.size
        if not n:
            return write(gradient, step, NO_MESSAGE)
        index, chosen, finite = kernels(gradient).momentum_select(
            gradient, momentum, velocity, m, count_of(density, n), nesterov=nesterov, mask=mask, step=step, least=least
        )
        demand_finite(finite, name)
        written, rest = message(n, index, chosen)
        velocity[to_device_like(index, velocity)] = to_device_like(rest, velocity)
        return written

    return Compressor(name, frozenset({Kind.SPARSE}), write, feed, feed_momentum, on_device=True)


def randomk(density: float, seed: int = 0) -> Compressor:
    """k = max(1, ceil(density · n)) elements at random: one in each of k almost equal cells.

    The positions follow from ``seed`` and ``step``, so no index is sent, and ranks with the same seed select the same
    elements.
    """
    name = f"randomk({density})"
    check_density(density, name)
    check_seed(name, seed)

    def write(vector: Vector, step: int, last: Message) -> Message:
        demand_finite(kernels().all_finite(vector), name)
        n, key = vector.size, key_of(seed, step)
        index = cell_indices(n, count_of(density, n), key)
        parts = [np.array([key], "<u8"), vector[index]]
        return message_of(Kind.CELLS, n, parts, count=index.size)

    def feed(backlog: Vector, gradient: Vector | None, out: Vector, step: int, last: Message) -> Message:
        p = backlog_of(backlog, gradient)
        written = write(p, step, last)
        out[...] = p
        out[read_indices(written)] = 0
        return written

    return Compressor(name, frozenset({Kind.CELLS}), write, feed)


def count_of(density: float, n: int) -> int:
    """k = max(1, ceil(density · n)); 0 of an empty vector."""
    return min(n, max(1, math.ceil(density * n)))
