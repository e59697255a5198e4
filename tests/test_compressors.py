"""Compressors: what they send and what they keep is what they were given; what is damaged is refused, out untouched."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

import hpccomm
from hpccomm.algorithms.compression.format import HEADER_BYTES, NO_MESSAGE, Compressor, header_of
from hpccomm.errors import ArgumentError

F32 = np.float32

ALL = [
    hpccomm.none(),
    hpccomm.cast("fp16"),
    hpccomm.cast("bf16"),
    hpccomm.cast("int8"),
    hpccomm.cast("uint8"),
    hpccomm.threshold(0.5),
    hpccomm.threshold(0.5, code="rice"),
    hpccomm.threshold("auto"),
    hpccomm.topk(0.1),
    hpccomm.topk(0.1, exact=True, values="fp16", code="rice"),
    hpccomm.topk(0.1, code="bitmap"),
    hpccomm.topk(0.1, code="leb128"),
    hpccomm.randomk(0.1),
    hpccomm.onebit(),
    hpccomm.onebit("per-sign"),
    hpccomm.sign_majority(),
    hpccomm.ternary(),
    hpccomm.qsgd(),
    hpccomm.natural(),
    hpccomm.low_rank(2),
]
SPARSIFIERS = [each for each in ALL if each.name.startswith(("none", "randomk", "topk"))]
LENGTHS = (0, 1, 7, 8, 9, 1000)


def id_of(each: Compressor) -> str:
    return each.name


def numbers(n: int, seed: int = 0) -> np.ndarray:
    """Multiples of 1/8 below 8 in magnitude: float16 and sums of them are exact."""
    return (np.random.default_rng([n, seed]).integers(-63, 64, n) / 8).astype(F32)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("compressor", ALL, ids=id_of)
def test_the_new_backlog_is_the_sum_less_the_decoded_message(compressor: Compressor, n: int) -> None:
    backlog, gradient = numbers(n), numbers(n, 1)
    p = backlog + gradient
    message = compressor.encode_feedback(backlog, gradient, step=3)
    np.testing.assert_array_equal(backlog, p - compressor.decode_vector(message, n))
    header = header_of(message)
    assert (header.n, header.nbytes) == (n, message.size - HEADER_BYTES)


@pytest.mark.parametrize("compressor", SPARSIFIERS, ids=id_of)
def test_what_sparsifiers_send_and_keep_adds_up_exactly(compressor: Compressor) -> None:
    """Over 50 steps the meanings and the last backlog are the sum of the gradients, bit for bit."""
    backlog, sent, given = (np.zeros(1000, F32) for _ in range(3))
    for step in range(50):
        gradient = numbers(1000, step)
        given += gradient
        compressor.decode(compressor.encode_feedback(backlog, gradient, step=step), sent)
    np.testing.assert_array_equal(sent + backlog, given)


@pytest.mark.parametrize("compressor", [each for each in ALL if each.name != "sign_majority()"], ids=id_of)
def test_after_a_thousand_steps_nothing_is_lost(compressor: Compressor) -> None:
    """What was sent and the backlog against all gradients: each step rounds a backlog below 2^7 at most twice."""
    n, steps = 40, 1000
    backlog, said, given, last = np.zeros(n, F32), np.zeros(n), np.zeros(n), NO_MESSAGE
    for step, gradient in enumerate(np.random.default_rng(7).normal(size=(steps, n)).astype(F32)):
        last = compressor.encode_feedback(backlog, gradient, step=step, last=last)
        said += compressor.decode_vector(last, n)
        given += gradient
    assert np.abs(backlog).max() < 2**7
    assert np.abs(said + backlog - given).max() < steps * 2 * 2.0**-18
    assert np.abs(said).max() > 1


@pytest.mark.parametrize("compressor", ALL, ids=id_of)
def test_encoding_depends_on_its_arguments_and_writes_none_of_them(compressor: Compressor) -> None:
    vector = numbers(1000)
    before = vector.copy()
    message = compressor.encode(vector, step=2)
    np.testing.assert_array_equal(vector, before)
    np.testing.assert_array_equal(message, compressor.encode(vector, step=2))


@pytest.mark.parametrize("compressor", ALL, ids=id_of)
def test_decoding_adds_in_order(compressor: Compressor) -> None:
    messages = [compressor.encode(numbers(1000, seed), step=seed) for seed in range(3)]
    one_by_one, together = numbers(1000, 9), numbers(1000, 9)
    for message in messages:
        compressor.decode(message, one_by_one)
    compressor.decode_all(messages, together)
    np.testing.assert_array_equal(one_by_one, together)


@pytest.mark.parametrize("compressor", [each for each in ALL if each.name != "none()"], ids=id_of)
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_the_backlog_untouched(compressor: Compressor, odd: float) -> None:
    backlog, gradient = numbers(100), numbers(100, 1)
    gradient[57] = odd
    with pytest.raises(ArgumentError, match=r"NaN|infinity"):
        compressor.encode_feedback(backlog, gradient)
    np.testing.assert_array_equal(backlog, numbers(100))


def put(offset: int, form: str, value: float | bytes) -> Callable[[np.ndarray], np.ndarray]:
    """Write into a copy of a message."""

    def change(message: np.ndarray) -> np.ndarray:
        altered = message.copy()
        struct.pack_into(form, altered.data, offset, value)
        return altered

    return change


def check_refused(compressor: Compressor, message: np.ndarray, says: str, n: int = 1000) -> None:
    out = numbers(n, 5)
    with pytest.raises(ArgumentError, match=says):
        compressor.decode(message, out)
    np.testing.assert_array_equal(out, numbers(n, 5))


@pytest.mark.parametrize("compressor", ALL, ids=id_of)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda message: message[:-1], "cut short|shorter|has .* bytes"),
        (lambda message: message[:HEADER_BYTES], "cut short|has .* bytes"),
        (lambda message: message[: HEADER_BYTES - 1], "cut short"),
        (lambda message: message[:0], "cut short"),
        (lambda message: np.append(message, np.uint8(0)), "has .* bytes"),
        (lambda message: message.astype(np.int16), "flat uint8"),
        (put(0, "4s", b"GCM2"), "begins with"),
        (put(4, "<B", 99), "kind 99"),
        (put(8, "<Q", 999), "999 elements"),
        (put(16, "<Q", 1001), "damaged"),
        (put(24, "<f", np.nan), "damaged"),
    ],
)
def test_damaged_messages_are_refused_and_nothing_is_added(
    compressor: Compressor, change: Callable[[np.ndarray], np.ndarray], says: str
) -> None:
    check_refused(compressor, change(compressor.encode(numbers(1000))), says)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (put(HEADER_BYTES, "<I", 1000), "out of range"),
        (put(HEADER_BYTES + 4, "<I", 0), "unsorted or twice"),
        (put(16, "<Q", 3), "fewer than there are"),
        (put(6, "<B", 77), "a code that is not there"),
        (put(5, "<B", 4), "values that it cannot have"),
    ],
)
def test_altered_indices_are_refused(change: Callable[[np.ndarray], np.ndarray], what: str) -> None:
    compressor = hpccomm.topk(0.1, code="u32")
    check_refused(compressor, change(compressor.encode(numbers(1000))), "damaged")


@pytest.mark.parametrize("compressor", ALL, ids=id_of)
def test_messages_of_another_compressor_are_refused(compressor: Compressor) -> None:
    others = [each for each in ALL if not each.kinds & compressor.kinds]
    assert others
    for other in others:
        check_refused(compressor, other.encode(numbers(1000)), "different compressors")


@pytest.mark.parametrize("density", [0, -0.1, 1.001, float("nan")])
@pytest.mark.parametrize("make", [hpccomm.topk, hpccomm.randomk, lambda d: hpccomm.threshold(density=d)])
def test_densities_outside_zero_to_one_are_refused(make: Callable[[float], Compressor], density: float) -> None:
    with pytest.raises(ArgumentError, match="density"):
        make(density)


@pytest.mark.parametrize("tau", [0, -1.0, float("nan"), float("inf")])
def test_thresholds_that_are_not_positive_are_refused(tau: float) -> None:
    with pytest.raises(ArgumentError):
        hpccomm.threshold(tau)


@pytest.mark.parametrize("compressor", ALL, ids=id_of)
@pytest.mark.parametrize("vector", [np.zeros(8), np.zeros((2, 4), F32), np.zeros(16, F32)[::2], [0.0]])
def test_vectors_that_are_not_flat_float32_are_refused(compressor: Compressor, vector: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match="flat contiguous float32"):
        compressor.encode(vector)


@pytest.mark.parametrize("compressor", [hpccomm.topk(1e-6, exact=True), hpccomm.threshold(3.5)], ids=id_of)
def test_indices_beyond_what_float32_counts_survive(compressor: Compressor) -> None:
    """2**24 + 1 is no float32: an index that passed through one would move."""
    n = (1 << 24) + 2
    vector = np.zeros(n, F32)
    vector[-1] = 4
    got = np.flatnonzero(compressor.decode_vector(compressor.encode(vector), n))
    np.testing.assert_array_equal(got, [n - 1])


def test_onebit_of_2_to_the_24_and_one_elements() -> None:
    n = (1 << 24) + 1
    vector = np.ones(n, F32)
    vector[-1] = -1
    message = hpccomm.onebit().encode(vector)
    assert message.size == HEADER_BYTES + 4 + (1 << 21) + 1
    np.testing.assert_array_equal(hpccomm.onebit().decode_vector(message, n), vector)
