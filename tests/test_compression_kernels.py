"""The compression kernels: worked examples bit for bit; the compiled kernels give the bits of the reference.

The worked examples share one input: two ranks, three steps, eight elements, every number dyadic so that float32 is
exact.  They were computed with rational numbers.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpccomm.kernels.compiler import machine_code
from hpccomm.kernels.dispatch import load_kernels
from hpccomm.kernels.index_codes import loops

REFERENCE, COMPILED = load_kernels("reference"), load_kernels("compiled")
F32 = np.float32

GRADIENTS = np.array(
    [
        [[0.5, -0.25, 0.125, 1, -0.875, 0, 0.375, -0.125], [-0.25, 0.75, 0.25, 0.5, -0.25, -0.125, 0.125, 0.375]],
        [[0.25, -0.5, 0.125, -0.25, -0.5, 0.125, 0.25, 0], [0.5, 0.125, -0.125, 0.25, 0.375, -0.625, 0, 0.25]],
        [
            [-0.125, -0.25, 0.25, 0.5, 0.25, -0.25, 0.125, -0.375],
            [0.25, 0.125, 0.375, -0.75, -0.125, 0.25, -0.5, 0.125],
        ],
    ],
    F32,
)
"""[step, rank, element]"""
W0 = GRADIENTS[0, 0]

LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 1023, 1024, 1025, 5000)


@pytest.fixture(params=[REFERENCE, COMPILED], ids=["numpy", "compiled"])
def kernels(request: pytest.FixtureRequest) -> SimpleNamespace:
    return request.param


def vector(text: str) -> np.ndarray:
    return np.array(text.split(), F32)


def signs(text: str) -> np.ndarray:
    return np.array([1 if each == "+" else -1 for each in text if each in "+-"], F32)


def octets(text: str) -> list[int]:
    return list(bytes.fromhex(text))


def numbers(n: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Gaussians, among them zeros of both signs, equal magnitudes and very small ones."""
    rng = np.random.default_rng([n, seed])
    x = (rng.normal(size=n) * scale).astype(F32)
    x[rng.random(n) < 0.05] = 0
    x[rng.random(n) < 0.02] = -0.0
    x[rng.random(n) < 0.05] = F32(scale)
    x[rng.random(n) < 0.05] = F32(-scale)
    x[rng.random(n) < 0.02] = F32(1e-42)
    return x


def has_same_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def call_both(name: str, *args: Any, **named: Any) -> tuple[Any, Any]:
    """The results of both modules for one call on copies of the same arrays, with the written arrays appended."""
    results = []
    for module in (REFERENCE, COMPILED):
        mine = [each.copy() if isinstance(each, np.ndarray) else each for each in args]
        answer = getattr(module, name)(*mine, **named)
        results.append([answer, *[each for each in mine if isinstance(each, np.ndarray)]])
    return results[0], results[1]


def agree(name: str, *args: Any, **named: Any) -> Any:
    """Assert that all results have equal bits; returns one."""

    def compare(a: Any, b: Any) -> None:
        if isinstance(a, tuple | list):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                compare(x, y)
        elif isinstance(a, np.ndarray):
            assert has_same_bits(a, b), name
        elif isinstance(a, float):
            assert a.hex() == b.hex(), name
        else:
            assert a == b, name

    first, second = call_both(name, *args, **named)
    compare(first, second)
    return first[0]


# Threshold compression, τ = 1/2


GTC = [
    [
        ([0, 6, 9], "0 -.25 .125 .5 -.375 0 .375 -.125"),
        ([2, 6], "-.25 .25 .25 0 -.25 -.125 .125 .375"),
    ],
    [
        ([3, 9, 12], ".25 -.25 .25 .25 -.375 .125 .125 -.125"),
        ([11, 14], ".25 .375 .125 .25 .125 -.25 .125 .125"),
    ],
    [
        ([3, 4, 6, 15], ".125 0 0 .25 -.125 -.125 .25 0"),
        ([0, 2, 4, 7], "0 0 0 0 0 0 -.375 .25"),
    ],
]
GTC_SUMS = [".5 .5 0 1 -.5 0 0 0", "0 -.5 0 0 -.5 -.5 .5 .5", ".5 0 1 0 0 0 0 -.5"]


def gtc_words(kernels: SimpleNamespace) -> list[list[np.ndarray]]:
    """All messages of the worked example; checks words, residuals and sums on the way."""
    residuals = np.zeros((2, 8), F32)
    sent = []
    for step in range(3):
        total = np.zeros(8, F32)
        sent.append([])
        for rank in range(2):
            words, finite = kernels.threshold_words(residuals[rank], GRADIENTS[step, rank], residuals[rank], 0.5)
            expected, rest = GTC[step][rank]
            assert finite
            assert words.tolist() == expected
            assert has_same_bits(residuals[rank] + 0, vector(rest))
            kernels.add_words(words, 0.5, total)
            sent[-1].append(words)
        assert np.array_equal(total, vector(GTC_SUMS[step]))
    return sent


def test_threshold_words_residuals_and_sums_on_the_worked_example(kernels: SimpleNamespace) -> None:
    words = gtc_words(kernels)
    assert list(words[0][0].tobytes()) == octets("00000000 06000000 09000000")


def test_threshold_codes_of_the_same_words(kernels: SimpleNamespace) -> None:
    words = gtc_words(kernels)
    for step, rank, expected in ((0, 0, "1040"), (0, 1, "48"), (1, 0, "7280"), (2, 1, "0010")):
        sent = words[step][rank]
        assert kernels.rice_encode(sent >> 1, 1, sent & 1).tolist() == octets(expected)
        assert has_same_bits(kernels.rice_decode(np.array(octets(expected), "u1"), sent.size, 1, 8, True), sent)
    for rank, expected in enumerate(("c3800000", "33000000")):
        assert kernels.pack_pairs(words[0][rank], 8).tolist() == octets(expected)
        assert has_same_bits(kernels.unpack_pairs(np.array(octets(expected), "u1"), 8), words[0][rank])


# The largest with momentum, m = 1/2, two a rank


DGC = [
    [
        ({3: 1, 4: -0.875}, ".5 -.25 .125 0 0 0 .375 -.125", ".5 -.25 .125 0 0 0 .375 -.125"),
        ({1: 0.75, 3: 0.5}, "-.25 0 .25 0 -.25 -.125 .125 .375", "-.25 0 .25 0 -.25 -.125 .125 .375"),
    ],
    [
        ({0: 1, 1: -0.875}, "0 0 .1875 -.25 -.5 .125 .4375 -.0625", "0 0 .3125 -.25 -.5 .125 .8125 -.1875"),
        ({5: -0.8125, 7: 0.8125}, ".375 .125 0 .25 .25 0 .0625 0", ".125 .125 .25 .25 0 0 .1875 0"),
    ],
    [
        ({2: 0.65625, 6: 1.15625}, "-.125 -.25 0 .375 0 -.1875 0 -.40625", "-.125 -.25 0 .125 -.5 -.0625 0 -.59375"),
        ({0: 0.5625, 2: 0.625}, "0 .1875 0 -.625 0 .25 -.46875 .125", "0 .3125 0 -.375 0 .25 -.28125 .125"),
    ],
]
DGC_WEIGHTS = [
    "0 -.375 0 -.75 .4375 0 0 0",
    "-.5 .0625 0 -.75 .4375 .40625 0 -.40625",
    "-.78125 .0625 -.640625 -.75 .4375 .40625 -.578125 -.40625",
]


def test_selection_with_momentum_correction_and_masking_on_the_worked_example(kernels: SimpleNamespace) -> None:
    momenta, velocities = np.zeros((2, 8), F32), np.zeros((2, 8), F32)
    weights = np.zeros(8, F32)
    for step in range(3):
        messages = []
        for rank in range(2):
            u, v = momenta[rank], velocities[rank]
            index, values, finite = kernels.momentum_select(GRADIENTS[step, rank], u, v, 0.5, 2)
            sent, after_u, after_v = DGC[step][rank]
            assert finite
            assert dict(zip(index.tolist(), values.tolist(), strict=True)) == sent
            assert np.array_equal(u, vector(after_u))
            assert np.array_equal(v, vector(after_v))
            messages.append((index, values))
        total = np.zeros(8, F32)
        kernels.scatter_add(messages, total)
        weights -= total / 2
        assert np.array_equal(weights, vector(DGC_WEIGHTS[step]))


def test_selecting_every_element_without_masking_is_momentum_sgd(kernels: SimpleNamespace) -> None:
    momenta, velocities = np.zeros((2, 8), F32), np.zeros((2, 8), F32)
    weights = np.zeros(8, F32)
    for step in range(3):
        total = np.zeros(8, F32)
        for rank in range(2):
            index, values, _ = kernels.momentum_select(
                GRADIENTS[step, rank], momenta[rank], velocities[rank], 0.5, 8, mask=False
            )
            kernels.scatter_add([(index, values)], total)
        weights -= total / 2
    assert np.array_equal(weights, vector("-.84375 -.09375 -.640625 -1.1875 1.015625 .484375 -.4375 -.28125"))


def test_sum_of_the_first_messages(kernels: SimpleNamespace) -> None:
    out = np.zeros(8, F32)
    first = np.array([3, 4], "u4"), vector("1 -.875")
    second = np.array([1, 3], "u4"), vector(".75 .5")
    kernels.scatter_add([first, second], out)
    assert np.array_equal(out, vector("0 .75 0 1.5 -.875 0 0 0"))


# One bit in two phases


TWO_PHASES = [
    ((0.40625, 0.328125), ("b0 60", "70 30"), (0.203125, 0.203125), "b0 60", "+-++ -++-"),
    ((0.3671875, 0.390625), ("90 30", "d0 90"), (0.287109375, 0.34765625), "d0 30", "++-+ --++"),
    ((0.2890625, 0.328125), ("30 00", "e0 50"), (0.1904296875, 0.251953125), "30 10", "--++ ---+"),
]
"""Scales of the ranks, their bits, the server scales, the server bits, signs of the result; chunks [0..3] [4..7]."""


def test_one_bit_in_two_phases(kernels: SimpleNamespace) -> None:
    residuals, server = np.zeros((2, 8), F32), np.zeros(8, F32)
    for step, (scales, packed, server_scales, server_packed, result) in enumerate(TWO_PHASES):
        chunks: list[list[tuple[np.ndarray, float, float]]] = [[], []]
        for rank in range(2):
            gradient = GRADIENTS[step, rank]
            scale = kernels.sum_magnitudes(residuals[rank], gradient) / 8
            assert scale == scales[rank]
            for chunk, half in enumerate((slice(0, 4), slice(4, 8))):
                bits = np.empty(1, "u1")
                rest = residuals[rank, half]
                kernels.pack_signs_feedback(rest, gradient[half], rest, scale, -scale, bits)
                assert bits.tolist() == [octets(packed[rank])[chunk]]
                chunks[chunk].append((bits, scale, -scale))
        out = np.zeros(8, F32)
        for chunk, half in enumerate((slice(0, 4), slice(4, 8))):
            mean = np.zeros(4, F32)
            kernels.add_signs(chunks[chunk], mean)
            mean /= 2
            scale = kernels.sum_magnitudes(server[half], mean) / 4
            assert scale == server_scales[chunk]
            bits = np.empty(1, "u1")
            kernels.pack_signs_feedback(server[half], mean, server[half], scale, -scale, bits)
            assert bits.tolist() == [octets(server_packed)[chunk]]
            kernels.add_signs([(bits, scale, -scale)], out[half])
        assert np.array_equal(out, np.repeat(np.array(server_scales, F32), 4) * signs(result))
    assert np.array_equal(residuals[0], vector(".140625 .0625 .171875 .1875 -.0625 .125 .265625 -.171875"))
    assert np.array_equal(residuals[1], vector(".109375 -.046875 .234375 -.390625 .265625 -.109375 .015625 -.296875"))
    assert np.array_equal(
        server, vector(".1376953125 .0986328125 .1904296875 .0458984375 .138671875 .076171875 -.251953125 -.037109375")
    )


def test_means_of_the_two_signs(kernels: SimpleNamespace) -> None:
    for rank, (plus, minus) in enumerate(((0.4, -0.4166667), (0.4, -0.2083333))):
        above, below, count = kernels.sum_by_sign(GRADIENTS[0, rank], None)
        assert count == 5
        assert F32(above / count) == F32(plus)
        assert math.isclose(below / (8 - count), minus, abs_tol=5e-8)  # printed with seven digits


def test_relative_error_of_the_mean_magnitude(kernels: SimpleNamespace) -> None:
    rest, bits = np.empty(8, F32), np.empty(1, "u1")
    kernels.pack_signs_feedback(W0, None, rest, 0.40625, -0.40625, bits)
    assert bits.tolist() == octets("b6")
    assert math.isclose(float(rest @ rest) / 2.25, 0.413194, abs_tol=5e-7)  # printed with six digits


def test_majority_counts_a_tie_as_plus(kernels: SimpleNamespace) -> None:
    votes = [np.array([each], "u1") for each in (0b11001000, 0b10101000, 0b10011000)]
    assert kernels.majority(votes, 5).tolist() == [0b10001000]
    assert kernels.majority(votes[:2], 5).tolist() == [0b11101000]


# Index codes


INDEX = np.array([3, 4, 17, 300, 1000], "u4")


def test_index_codes(kernels: SimpleNamespace) -> None:
    assert kernels.leb128_encode(INDEX).tolist() == octets("03 00 0c 9a 02 bb 05")
    assert kernels.rice_encode(INDEX, 7).tolist() == octets("03 00 0c c6 be 76")
    bitmap = kernels.bitmap_encode(INDEX, 1024)
    assert bitmap.size == 128
    assert bitmap[0] == 0x18
    for k, bits in ((5, 59), (6, 49), (7, 47), (8, 48), (9, 51)):
        assert kernels.rice_encode(INDEX, k).size == -(-bits // 8)
        assert has_same_bits(kernels.rice_decode(kernels.rice_encode(INDEX, k), 5, k, 1024), INDEX)
    assert has_same_bits(kernels.leb128_decode(kernels.leb128_encode(INDEX), 5, 1024), INDEX)
    assert has_same_bits(kernels.bitmap_decode(bitmap, 5, 1024), INDEX)


def test_rice_sizes_in_bits() -> None:
    gaps = REFERENCE.gaps_of(INDEX).astype(int)
    assert gaps.tolist() == [3, 0, 12, 282, 699]  # the zero-runs of the paper's format, too
    assert [sum((gap >> k) + 1 + k for gap in gaps) for k in range(5, 10)] == [59, 49, 47, 48, 51]
    for k in range(5, 10):
        assert machine_code(loops.rice_length)(INDEX.ctypes.data, 0, 5, k) == [59, 49, 47, 48, 51][k - 5]


@pytest.mark.parametrize("name", ["rice", "leb128", "bitmap"])
def test_index_decoders_refuse_invalid_codes(kernels: SimpleNamespace, name: str) -> None:
    encode = {
        "rice": lambda index, n: kernels.rice_encode(index, 3),
        "leb128": lambda index, n: kernels.leb128_encode(index),
        "bitmap": kernels.bitmap_encode,
    }[name]
    decode = {
        "rice": lambda data, count, n: kernels.rice_decode(data, count, 3, n),
        "leb128": kernels.leb128_decode,
        "bitmap": kernels.bitmap_decode,
    }[name]
    index = np.array([3, 4, 17, 30, 36], "u4")
    whole = encode(index, 40)
    assert has_same_bits(decode(whole, 5, 40), index)
    assert decode(whole[:-1], 5, 40) is None
    assert decode(np.append(whole, np.uint8(1)), 5, 40) is None
    assert decode(whole, 6, 40) is None
    assert decode(whole, 4, 40) is None
    assert decode(whole, 5, 36) is None


def test_leb128_refuses_longer_codes_than_needed(kernels: SimpleNamespace) -> None:
    assert kernels.leb128_decode(np.array([0x83, 0x00], "u1"), 1, 100) is None
    assert kernels.leb128_decode(np.array([0x80] * 6 + [1], "u1"), 1, 1 << 31) is None


def test_rice_escapes_long_quotients(kernels: SimpleNamespace) -> None:
    index = np.array([47, 96, 200, (1 << 31) - 1], "u4")
    data = kernels.rice_encode(index, 0)
    assert data.size == -(-(48 + (48 + 32) + (48 + 32) + (48 + 32)) // 8)
    assert has_same_bits(kernels.rice_decode(data, 4, 0, 1 << 31), index)


# Narrow elements and quantisers


def test_float16(kernels: SimpleNamespace) -> None:
    words = kernels.to_half(np.array([70000, 65519, 1e-8, 0.1, -0.0], F32))
    back = np.zeros(5, F32)
    kernels.add_half(words, back)
    assert back[0] == np.inf
    assert back[1:3].tolist() == [65504, 0]
    assert f"{back[3]:.7f}" == "0.0999756"
    assert words[4] == 0x8000
    assert kernels.to_half(np.array([70000, -70000, 1], F32), True).tolist() == [0x7BFF, 0xFBFF, 0x3C00]


def test_bfloat16(kernels: SimpleNamespace) -> None:
    words = kernels.to_bfloat16(np.array([0.1, 1.00390625, 1.01171875, 3.4e38], F32))
    assert words.tolist() == [0x3DCD, 0x3F80, 0x3F82, 0x7F80]
    assert kernels.to_bfloat16(np.array([3.4e38, -3.4e38, 1], F32), True).tolist() == [0x7F7F, 0xFF7F, 0x3F80]
    out = np.ones(2, F32)
    kernels.add_bfloat16(kernels.to_bfloat16(np.array([np.nan, 1.01171875], F32)), out)
    assert np.isnan(out[0])
    assert out[1] == 2.015625


def test_eight_bits_over_a_range(kernels: SimpleNamespace) -> None:
    codes, scale, lower = kernels.range_codes(W0)
    assert codes.tolist() == [187, 85, 136, 255, 0, 119, 170, 102]
    decoded = np.zeros(8, F32)
    kernels.add_range(codes, scale, lower, decoded)
    assert np.allclose(decoded, W0, atol=5e-7)  # the example claims six digits


def half_rounding_key(fractions: np.ndarray) -> int:
    """A key whose uniforms round each fraction to the nearest integer."""
    asked = fractions > 0
    return next(
        key
        for key in range(10000)
        if np.array_equal((REFERENCE.uniforms(key, fractions.size) < fractions)[asked], (fractions > 0.5)[asked])
    )


def test_qsgd(kernels: SimpleNamespace) -> None:
    norms = kernels.bucket_norms(W0, 512)
    assert norms.tolist() == [1.5]
    exact = np.abs(W0) * 4 / 1.5
    key = half_rounding_key(exact - np.floor(exact))
    codes = kernels.qsgd(W0, norms, 512, 4, key)
    assert codes.tolist() == [1, -1, 0, 3, -2, 0, 1, 0]
    out = np.zeros(8, F32)
    kernels.add_levels(codes, norms, 512, 4, out)
    assert np.array_equal(out, vector(".375 -.375 0 1.125 -.75 0 .375 0"))


def test_natural(kernels: SimpleNamespace) -> None:
    mantissas = np.frexp(np.abs(W0))[0] * 2 - 1
    key = half_rounding_key(np.where(W0 == 0, 0, mantissas))
    out = np.zeros(8, F32)
    kernels.add_natural(kernels.natural(W0, key), kernels.pack_signs(W0), out)
    assert np.array_equal(out, vector(".5 -.25 .125 1 -1 0 .25 -.125"))


# The compiled kernels against the reference


@pytest.mark.parametrize("n", LENGTHS)
def test_compiled_streams_equal_the_reference(n: int) -> None:
    g, r = numbers(n, 1), numbers(n, 2)
    for residual, gradient in ((r, g), (r, None)):
        agree("threshold_words", residual, gradient, np.empty(n, F32), 0.75)
        agree("sum_magnitudes", residual, gradient)
        agree("sum_by_sign", residual, gradient)
        bits = np.zeros(-(-n // 8), "u1")
        agree("pack_signs_feedback", residual, gradient, np.empty(n, F32), 0.3, -0.7, bits)
        agree("density_threshold", residual, gradient, 0.01, 3)
    agree("moments", r)
    agree("pack_signs", r)
    agree("all_finite", r)
    agree("largest_magnitude", r)
    agree("select_threshold", r, 0.5)
    agree("select_threshold", r, 0.0)
    if n:
        agree("extremes", r)
    codes = agree("range_codes", numbers(n, 3, 1e4))
    agree("add_range", codes[0], codes[1] or 1.0, codes[2], r)
    for name in ("to_half", "to_bfloat16"):
        agree(name, numbers(n, 3, 1e4))
        agree(name, np.where(np.arange(n) % 7 == 0, F32(-3.4e38), numbers(n, 3, 1e36)), True)
    agree("to_int8", r, 0.01)
    agree("add_int8", np.arange(n).astype("i1"), 0.37, r)
    words = np.random.default_rng(n).integers(0, 1 << 16, n).astype("u2")
    agree("add_bfloat16", np.where((words & 0x7F80) == 0x7F80, 0, words).astype("u2"), r)
    agree("add_half", np.where((words & 0x7C00) == 0x7C00, 0, words).astype("u2"), r)


@pytest.mark.parametrize("n", LENGTHS)
def test_in_place_results_equal_out_of_place_results(kernels: SimpleNamespace, n: int) -> None:
    g, r = numbers(n, 1), numbers(n, 2)
    out, bits, again = np.empty(n, F32), np.empty(-(-n // 8), "u1"), np.empty(-(-n // 8), "u1")
    words, _ = kernels.threshold_words(r, g, out, 0.75)
    place = r.copy()
    assert has_same_bits(kernels.threshold_words(place, g, place, 0.75)[0], words)
    assert has_same_bits(place, out)
    kernels.pack_signs_feedback(r, g, out, 0.5, -0.5, bits)
    place = r.copy()
    kernels.pack_signs_feedback(place, g, place, 0.5, -0.5, again)
    assert has_same_bits(place, out)
    assert has_same_bits(bits, again)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("messages", [1, 3, 8])
def test_adding_messages_equals_the_reference(n: int, messages: int) -> None:
    rng = np.random.default_rng([n, messages])
    bits = [rng.integers(0, 256, -(-n // 8)).astype("u1") for _ in range(messages)]
    out = numbers(n, 5)
    signed = [(each, float(F32(0.1 * j + 0.3)), float(F32(-0.7 * j))) for j, each in enumerate(bits)]
    outs = []
    for module in (REFERENCE, COMPILED):
        mine = out.copy()
        module.add_signs(signed, mine)
        index = np.flatnonzero(rng.random(n) < 0) if n == 0 else np.arange(0, n, 3)
        module.scatter_add([(index.astype("u4"), numbers(index.size, j)) for j in range(messages)], mine)
        module.add_words((index << 1 | index & 1).astype("u4"), 0.3, mine)
        new = np.full(n, np.nan, F32)
        module.add_signs(signed, new, fresh=True)
        alone = np.zeros(n, F32)
        module.add_signs(signed, alone)
        assert has_same_bits(new, alone)
        outs.append(mine)
    assert has_same_bits(*outs)
    agree("majority", bits, n)


@pytest.mark.parametrize("n", LENGTHS)
def test_compiled_codes_equal_the_reference(n: int) -> None:
    rng = np.random.default_rng(n)
    for density in (0, 0.01, 0.3, 1):
        index = np.flatnonzero(rng.random(n) < density).astype("u4")
        words = (index << 1 | rng.integers(0, 2, index.size)).astype("u4")
        for k in (0, 1, 7, 31):
            data = agree("rice_encode", index, k)
            assert has_same_bits(agree("rice_decode", data, index.size, k, n), index)
            data = agree("rice_encode", index, k, words & 1)
            assert has_same_bits(agree("rice_decode", data, index.size, k, n, True), words)
        assert has_same_bits(agree("leb128_decode", agree("leb128_encode", index), index.size, n), index)
        assert has_same_bits(agree("bitmap_decode", agree("bitmap_encode", index, n), index.size, n), index)
        assert has_same_bits(agree("unpack_pairs", agree("pack_pairs", words, n), n), words)
        agree("is_ascending", index, n)
        agree("is_ascending", index, max(0, n - 1))
        agree("is_ascending", index[::-1].copy(), n)


@pytest.mark.parametrize("seed", range(5))
def test_compiled_decoders_equal_the_reference_on_random_bytes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        data = (rng.integers(0, 256, rng.integers(0, 12)) & rng.integers(0, 256)).astype("u1")
        count, n, k = int(rng.integers(0, 10)), int(rng.integers(0, 90)), int(rng.integers(0, 4))
        agree("rice_decode", data, count, k, n)
        agree("rice_decode", data, count, k, n, True)
        agree("leb128_decode", data, count, n)
        agree("bitmap_decode", data, count, n)
        agree("unpack_pairs", data[: data.size // 4 * 4], data.size // 4 * 16)


@pytest.mark.parametrize("n", LENGTHS)
def test_compiled_random_rounding_equals_the_reference(n: int) -> None:
    x = numbers(n, 7)
    for bucket in (1, 10, 512, 2000):
        norms = agree("bucket_norms", x, bucket)
        codes = agree("qsgd", x, norms, bucket, 127, 12345)
        agree("qsgd", x, norms, bucket, 1, 4294967295)
        agree("add_levels", codes, norms, bucket, 127, x)
    agree("add_natural", agree("natural", x, 99), REFERENCE.pack_signs(x), x)
    agree("ternary", x, 1.5, 2.0, 77)
    agree("ternary", np.zeros(n, F32), 0.0, 0.0, 77)


@pytest.mark.parametrize("n", [1, 9, 5000, 70001])
@pytest.mark.parametrize("part", ["one", "few", "tenth", "all"])
def test_compiled_selection_equals_the_reference(n: int, part: str) -> None:
    k = {"one": 1, "few": min(n, 20), "tenth": max(1, n // 10), "all": n}[part]
    for x in (numbers(n, 8), np.ones(n, F32), np.zeros(n, F32), np.repeat(numbers(1, 1), n)):
        for least in (0.8, 1.0):
            index, finite = agree("select_largest", x, k, 5, least)
            assert finite
            order = np.lexsort((np.arange(n), -np.abs(x)))[:k]
            if least == 1:
                assert np.array_equal(index, np.sort(order[x[order] != 0]))
        agree("keep_largest", x, k)
        agree("kth_magnitude", x, k)


@pytest.mark.parametrize("n", [15, 4096, 4097, 30001])
def test_compiled_rank_search_equals_the_reference_with_ties_infinities_and_nans(n: int) -> None:
    for x in (numbers(n, 3), numbers(n, 4).round(), np.zeros(n, F32), np.ones(n, F32), np.arange(n, 0, -1).astype(F32)):
        for odd, count in ((0, 0), (np.inf, 5), (np.nan, 3)):
            x[7 : 7 + count] = odd
            for k in {1, 3, 4, 5, 9, n // 100 + 1, 112, 113, n // 2, n} & set(range(n + 1)):
                agree("kth_magnitude", x, k)


def test_compiled_int8_rounds_as_division_does() -> None:
    rng = np.random.default_rng(7)
    halves = np.arange(-128, 129, 0.5)
    edges = (2.0**-61, 2.0**-60, 2.0**60, 2.0**61, 1e-42, 3e38, 1.0, 0.1, 16777215.0, 8388609.0)
    for unit in np.concatenate([edges, 10.0 ** rng.uniform(-18, 18, 200)]).astype(F32):
        near = halves * np.float64(unit)
        near = near[np.abs(near) < 3e38].astype(F32)
        near = np.concatenate([near, np.nextafter(near, F32(0)), np.nextafter(near, F32(np.inf))])
        agree("to_int8", np.concatenate([near, 1e-30 * near, np.array([0, -0.0, 1e-45, -1e-45], F32)]), unit)


@pytest.mark.parametrize("n", [*LENGTHS, 255, 256, 257])
@pytest.mark.parametrize(("block", "top"), [(256, 127), (128, 7), (24, 127)])
@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-20, 1.0, 1e37])
def test_compiled_block_codes_equal_the_reference(n: int, block: int, top: int, scale: float) -> None:
    x, residual = numbers(n, 1, scale), numbers(n, 2, scale)
    for rest in (None, residual):
        agree("block_codes", x, rest, block, top)
        agree("block_codes", x, rest, block, top, np.full(n, 7, F32))
        agree("largest_of_sum", x, rest)
    for odd in (np.nan, np.inf, -np.inf) if n else ():
        x[n // 2] = odd
        agree("block_codes", x, residual, block, top, np.full(n, 7, F32))
        assert not np.isfinite(COMPILED.largest_of_sum(x, residual))


@pytest.mark.parametrize("block", [256, 24])
def test_compiled_block_codes_equal_the_reference_at_the_ends_of_float32(block: int) -> None:
    largest = np.finfo(F32).max
    x, residual = numbers(1000, 1), numbers(1000, 2)
    x[300:600] = residual[300:600] = 0
    for at, with_it in ((F32(3e38), F32(3e38)), (largest, F32(0)), (-largest, F32(1)), (largest, -largest)):
        x[700], residual[700] = at, with_it
        for rest in (None, residual):
            agree("block_codes", x, rest, block, 127, np.full(1000, 7, F32))
            agree("largest_of_sum", x, rest)


def test_what_block_codes_lose_may_be_written_over_the_residual(kernels: SimpleNamespace) -> None:
    x, residual, apart = numbers(5000, 1), numbers(5000, 2), np.empty(5000, F32)
    wanted = kernels.block_codes(x, residual, 256, 127, apart)
    found = kernels.block_codes(x, residual, 256, 127, residual)
    assert all(has_same_bits(*pair) for pair in zip(found, wanted, strict=True))
    assert has_same_bits(residual, apart)


@pytest.mark.parametrize("n", [1, 9, 5000, 70001])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_compiled_momentum_equals_the_reference(n: int, nesterov: bool, mask: bool) -> None:
    for k in {1, max(1, n // 100), n}:
        for u in (numbers(n, 2), np.zeros(n, F32)):
            named = {"nesterov": nesterov, "mask": mask, "step": 3}
            agree("momentum_select", numbers(n, 1), u, numbers(n, 3), 0.9, k, **named)
            agree("momentum_select", np.ones(n, F32), u * 0, np.zeros(n, F32), 0.9, k, least=0.8, **named)


def test_a_sampled_threshold_that_is_too_high_is_lowered(kernels: SimpleNamespace) -> None:
    n, k = 1 << 17, 100
    plan = REFERENCE.sample_plan(n, k, 0)
    assert plan is not None
    x = np.zeros(n, F32)
    sampled = REFERENCE.sample(np.arange(n), plan)
    x[sampled] = 8  # all that the sample sees
    rest = np.setdiff1d(np.arange(n), sampled)
    x[rest[:1000]] = 3
    x[sampled[200:]] = 0
    x[sampled[50:200]] = 5
    index, _ = kernels.select_largest(x, 400)
    assert np.array_equal(index, np.sort(np.concatenate([sampled[:200], rest[:200]])))
    u, v = np.zeros(n, F32), np.zeros(n, F32)
    again, values, _ = kernels.momentum_select(x, u, v, 0.9, 400)
    assert np.array_equal(again, index)
    assert np.array_equal(values, x[index])
    assert np.array_equal(v, np.where(np.isin(np.arange(n), index), 0, x))
    assert np.array_equal(u, v)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 63, 64, 69])
def test_elements_that_are_not_finite_are_reported(kernels: SimpleNamespace, bad: float, place: int) -> None:
    x = numbers(70, 1)
    x[place] = bad
    assert not kernels.all_finite(x)
    assert not kernels.threshold_words(x, None, np.empty(70, F32), 0.5)[1]
    assert not kernels.threshold_words(np.zeros(70, F32), x, np.empty(70, F32), 0.5)[1]
    assert not kernels.select_threshold(x, 0.5)[1]
    assert not kernels.select_largest(x, 3)[1]
    assert not kernels.momentum_select(x, np.zeros(70, F32), np.zeros(70, F32), 0.5, 3)[2]
    assert not math.isfinite(kernels.sum_magnitudes(x, None))
    assert not all(map(math.isfinite, kernels.sum_by_sign(x, None)[:2]))


def test_uniforms_are_uniform() -> None:
    u = REFERENCE.uniforms(REFERENCE.key_of(7, 1), 1 << 16)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.bincount((u * 64).astype(int), minlength=64)
    assert abs(counts - 1024).max() < 6 * math.sqrt(1024)  # six standard deviations
    other = REFERENCE.uniforms(REFERENCE.key_of(7, 2), 1 << 16)
    assert abs(np.corrcoef(u, other)[0, 1]) < 6 / 256


@pytest.mark.parametrize(("n", "k"), [(1, 1), (10, 3), (10, 10), (1 << 24, 17), ((1 << 24) + 1, 100)])
def test_cells_hold_one_index_each(n: int, k: int) -> None:
    index = REFERENCE.cell_indices(n, k, 5)
    assert index.size == k
    assert REFERENCE.is_ascending(index, n)
    cells = [n * j // k for j in range(k + 1)]
    assert all(cells[j] <= i < cells[j + 1] for j, i in enumerate(index.tolist()))


def test_more_than_two_to_the_24_elements(kernels: SimpleNamespace) -> None:
    n = (1 << 24) + 1
    x = np.zeros(n, F32)
    x[[5, n - 2, n - 1]] = 1, -2, 3
    words, finite = kernels.threshold_words(x, None, np.empty(n, F32), 1.0)
    assert finite
    assert words.tolist() == [10, 2 * (n - 2) + 1, 2 * (n - 1)]
    index, _ = kernels.select_largest(x, 2)
    assert index.tolist() == [n - 2, n - 1]
    data = kernels.leb128_encode(index)
    assert has_same_bits(kernels.leb128_decode(data, 2, n), index)
    assert kernels.sum_magnitudes(x, None) == 6
    assert kernels.pack_signs(x).size == n // 8 + 1
    out = np.zeros(n, F32)
    kernels.add_signs([(kernels.pack_signs(x), 0.5, -0.25)], out)
    assert out[[0, n - 2, n - 1]].tolist() == [0.5, -0.25, 0.5]
