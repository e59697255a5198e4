"""LARS and LAMB: golden tables, formulas written out for one tensor at a time, shards, and kernels to the last bit."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

from hpccomm.algorithms.fused import InPlaceTransform, fuse
from hpccomm.algorithms.large_batch import Variant, lamb, lars
from hpccomm.algorithms.lr_schedules import constant, join_schedules, linear_scaling, polynomial, sqrt_scaling, warm_up
from hpccomm.algorithms.transforms import Transform, adam, chain, descend, momentum, scale, weight_decay
from hpccomm.algorithms.trust_ratio import (
    CACHE_ELEMENTS,
    add_decayed_weights,
    layers,
    scale_by_global_norm,
    scale_by_trust_ratio,
)
from hpccomm.buckets import Bucket
from hpccomm.errors import ArgumentError
from hpccomm.kernels.optimizers import loops, reference
from hpccomm.kernels.optimizers.reference import DECAYED_GRADIENT, GRADIENT, UPDATE
from hpccomm.testing.ranks import run_on_ranks

Vector = Any

A = np.array([0.5, -0.25, 1, 2, -1.5, 0.75])
B = np.array([0.125, -0.25])
GRADIENTS_A = np.array(
    [[0.1, -0.2, 0.3, 0.05, -0.4, 0.2], [-0.05, 0.1, 0.2, 0.15, -0.1, 0.3], [0.2, 0, -0.1, 0.1, -0.3, 0.05]]
)
GRADIENTS_B = np.array([[0.5, -0.25], [0.1, 0.2], [-0.3, 0.4]])
BUCKET = Bucket({"a": (2, 3), "b": (2,)}, np.float64)
ONLY_A = Bucket({"a": (2, 3)}, np.float64)
RATES = [1, 2, 1.5]
VARIANTS = get_args(Variant)
DIGITS = 5.001e-13
"""The tables are printed with twelve digits after the point."""


def run(method: Transform, gradients: Vector, weights: Vector) -> tuple[list[Vector], Vector]:
    """Steps and the weights after them."""
    weights, steps = weights.copy(), []
    state = method.init(weights)
    for gradient in gradients:
        step, state = method.update(gradient.astype(weights.dtype), state, weights)
        weights += step
        steps.append(step)
    return steps, weights


# Golden tables

LARS_GOLDEN: dict[str, tuple[dict[str, Any], list[float]]] = {
    "paper": (
        {"variant": "paper"},
        [0.455498443719, -0.245252874784, 0.839345255397, 1.878064158909, -1.280044962593, 0.539994749406],
    ),
    "optax": (
        {"variant": "optax"},
        [0.454703622521, -0.245535437435, 0.837005304954, 1.875835052504, -1.276477358183, 0.536433620389],
    ),
    "optax nesterov": (
        {"variant": "optax", "nesterov": True},
        [0.422876671399, -0.250753501749, 0.789552802879, 1.817915040669, -1.174228185382, 0.452426358963],
    ),
    "mlperf": (
        {"variant": "mlperf"},
        [0.430708195580, -0.195136604195, 0.782430292694, 1.872717723690, -1.196393913431, 0.511801402682],
    ),
}


@pytest.mark.parametrize("name", LARS_GOLDEN)
def test_golden_lars(name: str) -> None:
    options, expected = LARS_GOLDEN[name]
    method = lars(ONLY_A, lambda t: RATES[t], momentum=0.9, weight_decay=0.01, trust=0.02, **options)
    np.testing.assert_allclose(run(method, GRADIENTS_A, A)[1], expected, rtol=0, atol=DIGITS)


@pytest.mark.parametrize("variant", ["paper", "torch", "mlperf"])
def test_golden_first_lars_step_is_the_same(variant: Any) -> None:
    method = lars(ONLY_A, 1.0, momentum=0.9, weight_decay=0.01, trust=0.02, variant=variant)
    expected = [0.490246803178, -0.231190263272, 0.971204847479, 1.993497868785, -1.461451650657, 0.730725825328]
    np.testing.assert_allclose(run(method, GRADIENTS_A[:1], A)[1], expected, rtol=0, atol=DIGITS)


LAMB_GOLDEN: dict[str, tuple[dict[str, Any], list[float], list[float]]] = {
    "standard": (
        {},
        [0.474183087672, -0.231280405441, 0.965271837159, 1.959609390260, -1.461810097325, 0.710520762656],
        [0.119136968300, -0.250338022821],
    ),
    "gradient clipped": (
        {"grad_norm": "clip", "max_norm": 0.5},
        [0.478089121854, -0.236942075605, 0.964013621840, 1.960539500496, -1.459274004853, 0.711243815095],
        [0.119562725793, -0.251243420995],
    ),
    "no bias correction": (
        {"bias_correction": False},
        [0.474098547246, -0.231197452395, 0.965249482526, 1.959846241749, -1.461902981468, 0.710363630662],
        [0.119136899557, -0.250338087339],
    ),
    "in the step": (
        {"bias_correction": "in_step"},
        [0.493275606427, -0.244729434282, 0.991126513747, 1.990041326464, -1.490505584098, 0.740118285133],
        [0.123491248778, -0.249840897481],
    ),
    "ratio at most 1": (
        {"ratio_clip": (0, 1)},
        [0.480607978241, -0.235205193093, 0.974480656944, 1.970814608699, -1.472296194590, 0.721405751722],
        [0.119136968300, -0.250338022821],
    ),
}


@pytest.mark.parametrize("name", LAMB_GOLDEN)
def test_golden_lamb(name: str) -> None:
    options, a, b = LAMB_GOLDEN[name]
    method = lamb(BUCKET, 0.01, **options)
    gradients = np.concatenate([GRADIENTS_A, GRADIENTS_B], axis=1)
    np.testing.assert_allclose(run(method, gradients, np.concatenate([A, B]))[1], a + b, rtol=0, atol=DIGITS)


def test_golden_partial_sums_of_shards() -> None:
    """The flat vector a|b|padding on three ranks of three: sums of squares by rank, their total, the ratio."""
    padded, gradient = np.zeros(9), np.zeros(9)
    padded[:8], gradient[:8] = np.concatenate([A, B]), np.concatenate([GRADIENTS_A[0], GRADIENTS_B[0]])
    tables: list[Vector] = []

    def record(table: Vector) -> Vector:
        tables.append(table.copy())
        return table

    for rank in range(3):
        part = slice(3 * rank, 3 * rank + 3)
        method = lamb(BUCKET, 0.01, part=(part.start, part.stop), norm_reduce=record)
        method.update(gradient[part], method.init(padded[part]), padded[part])
    expected = [
        [[1.3125, 3.035094392076], [0, 0]],
        [[6.8125, 3.085625301310], [0, 0]],
        [[0, 0], [0.078125, 1.999988000060]],
    ]
    np.testing.assert_allclose(tables, expected, rtol=0, atol=DIGITS)
    total = np.sqrt(sum(tables))
    np.testing.assert_allclose(total[:, 0] / total[:, 1], [1.152153754509, 0.197642946687], rtol=0, atol=DIGITS)


# Formulas written out, one tensor at a time

SHAPES = {"embedding": (7, 5), "weight": (3, 4, 2), "bias": (4,), "zero": (3, 3), "scale": (5,), "one": (1, 1)}
MANY = Bucket(SHAPES, np.float64)


def problem(seed: int = 0, steps: int = 4) -> tuple[Vector, Vector]:
    """Gradients and weights; one tensor starts from zero, one has no gradient in the second step."""
    rng = np.random.default_rng(seed)
    weights, gradients = rng.standard_normal(MANY.size), rng.standard_normal((steps, MANY.size))
    MANY.views(weights)["zero"][...] = 0
    MANY.views(gradients[1 % steps])["weight"][...] *= steps == 1
    return gradients, weights


def norm(x: Vector) -> float:
    return math.sqrt(math.fsum(float(each) ** 2 for each in x.ravel()))


def slow_lars(w: Vector, gradients: Any, variant: str, flag: bool, nesterov: bool, clip: bool) -> Vector:
    """λ = .01, c = .02, μ = .9, γ = 1/(1+t)."""
    v = np.zeros_like(w)
    for t, g in enumerate(gradients):
        gamma, rate = 1 / (1 + t), 0.01 if flag else 0.0
        d = g + rate * w
        phi = 1.0
        moved = d + 0.9 * (d + 0.9 * v) if nesterov else d + 0.9 * v
        other = {"paper": norm(g) + rate * norm(w), "optax": norm(d), "simclr": norm(moved)}
        bottom = other.get(variant, other["paper"])
        seen = bottom if variant in ("optax", "simclr") else norm(g)
        if flag and norm(w) and seen:
            phi = 0.02 * norm(w) / bottom
            phi = min(phi / gamma, 1) if clip else phi
        if variant in ("paper", "optax"):
            s, factor = gamma * phi * d, 1.0
        elif variant == "torch":
            s, factor = phi * d, gamma
        else:
            s, factor = d, gamma * phi
        v = 0.9 * v + s
        w = w - factor * (s + 0.9 * v if nesterov else v)
    return w


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_lars_is_its_formula_in_every_tensor(variant: Any, nesterov: bool, clip: bool) -> None:
    gradients, weights = problem()
    method = lars(
        MANY, lambda t: 1 / (1 + t), weight_decay=0.01, trust=0.02, variant=variant, nesterov=nesterov, clip=clip
    )
    found = MANY.views(run(method, gradients, weights)[1])
    views = [MANY.views(each) for each in gradients]
    for name, w in MANY.views(weights).items():
        expected = slow_lars(w, [each[name] for each in views], variant, len(SHAPES[name]) > 1, nesterov, clip)
        np.testing.assert_allclose(found[name], expected, rtol=1e-13, atol=1e-15)  # a few roundings each step


def slow_lamb(w: Vector, gradients: Any, correct: Any, decays: bool, adapts: bool) -> Vector:
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        top, bottom = (m / (1 - 0.9**t), v / (1 - 0.999**t)) if correct is True else (m, v)
        u = top / (np.sqrt(bottom) + 1e-6) + (0.01 * w if decays else 0)
        phi = norm(w) / norm(u) if adapts and norm(w) and norm(u) else 1.0
        w = w - 0.01 * phi * u * (math.sqrt(1 - 0.999**t) / (1 - 0.9**t) if correct == "in_step" else 1)
    return w


@pytest.mark.parametrize("correct", [True, False, "in_step"])
@pytest.mark.parametrize("adapt", ["all", "flags", "decayed", ["bias", "weight"]])
def test_lamb_is_its_formula_in_every_tensor(correct: Any, adapt: Any) -> None:
    gradients, weights = problem()
    found = MANY.views(run(lamb(MANY, 0.01, bias_correction=correct, adapt=adapt), gradients, weights)[1])
    views = [MANY.views(each) for each in gradients]
    for name, w in MANY.views(weights).items():
        flag = len(SHAPES[name]) > 1
        adapts = flag if adapt in ("flags", "decayed") else adapt == "all" or name in adapt
        expected = slow_lamb(w, [each[name] for each in views], correct, flag, adapts)
        np.testing.assert_allclose(found[name], expected, rtol=1e-12, atol=1e-15)


def test_lamb_that_adapts_nothing_is_adamw() -> None:
    gradients, weights = problem()
    expected = chain(adam(eps=1e-6), weight_decay(0.01, MANY.mask("decay")), scale(-0.01))
    state, w = expected.init(weights), weights.copy()
    for gradient in gradients:
        step, state = expected.update(gradient, state, w)
        w += step
    assert np.array_equal(run(lamb(MANY, 0.01, adapt=()), gradients, weights)[1], w)


@pytest.mark.skipif(importlib.util.find_spec("optax") is None, reason="optax is not installed here")
@pytest.mark.parametrize("name", ["lars", "lars nesterov", "lamb"])
def test_equal_to_optax_in_float64(name: str) -> None:
    """Numbers whose squares have a sum that is exact in any order; all else is the same operations."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    mask = {"a": True, "b": False}
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": name == "lars nesterov"}
    theirs, ours = {
        "lars": (
            optax.lars(0.3, 0.25, weight_decay_mask=mask, trust_coefficient=0.02, trust_ratio_mask=mask, **options),
            lars(BUCKET, 0.3, weight_decay=0.25, trust=0.02, variant="optax", **options),
        ),
        "lamb": (
            optax.lamb(0.3, b1=0.5, b2=0.5, eps=1, weight_decay=0.25, mask=mask),
            lamb(BUCKET, 0.3, b1=0.5, b2=0.5, eps=1, weight_decay=0.25),
        ),
    }[name.split(maxsplit=1)[0]]
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = rng.integers(-8, 9, BUCKET.size) / 8
        gradient = rng.choice([-7.0, -3, -1, 0, 1, 3, 7], BUCKET.size)  # |g| + 1 is a power of two
        step, _ = ours.update(gradient, ours.init(weights), weights)
        tree = {key: np.array(view) for key, view in BUCKET.views(weights).items()}
        grads = {key: np.array(view) for key, view in BUCKET.views(gradient).items()}
        found, _ = theirs.update(grads, theirs.init(tree), tree)
        assert all(np.array_equal(np.asarray(found[key]), view) for key, view in BUCKET.views(step).items())


@pytest.mark.skipif(importlib.util.find_spec("optax") is None, reason="optax is not installed here")
@pytest.mark.parametrize("name", ["lars", "lars nesterov", "lamb"])
def test_runs_equal_to_optax_in_float64(name: str) -> None:
    """Any numbers, ten updates: tensors of one element, whose norms have one order of summation."""
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)
    ones = Bucket({f"w{number}": (1, 1) for number in range(16)} | {"bias": (1,)}, np.float64)
    mask = {slot.name: slot.decay for slot in ones.table}
    options: dict[str, Any] = {"momentum": 0.9, "nesterov": name == "lars nesterov"}
    theirs, ours = {
        "lars": (
            optax.lars(0.3, 0.25, weight_decay_mask=mask, trust_coefficient=0.02, trust_ratio_mask=mask, **options),
            lars(ones, 0.3, weight_decay=0.25, trust=0.02, variant="optax", **options),
        ),
        "lamb": (optax.lamb(0.3, weight_decay=0.01, mask=mask), lamb(ones, 0.3, weight_decay=0.01)),
    }[name.split(maxsplit=1)[0]]

    def tree(vector: Vector) -> dict[str, Vector]:
        return {key: np.array(view) for key, view in ones.views(vector).items()}

    rng = np.random.default_rng(1)
    weights = rng.standard_normal(ones.size)
    state, their_state = ours.init(weights), theirs.init(tree(weights))
    for gradient in rng.standard_normal((10, ones.size)):
        step, state = ours.update(gradient, state, weights)
        found, their_state = theirs.update(tree(gradient), their_state, tree(weights))
        assert all(np.array_equal(np.asarray(found[key]), view) for key, view in ones.views(step).items())
        weights += step


# Properties


@pytest.mark.parametrize("correct", [True, False])
def test_lamb_without_eps_is_independent_of_the_gradients_scale(correct: bool) -> None:
    """Powers of two are exact; v underflows nowhere."""
    gradients, weights = problem()
    one, other = (
        run(lamb(MANY, 0.01, eps=0, bias_correction=correct), factor * gradients, weights)[1] for factor in (1, 2.0**20)
    )
    assert np.array_equal(one, other)


def test_lars_without_decay_is_independent_of_the_gradients_scale() -> None:
    gradients, weights = problem(steps=1)
    ones, others = (
        run(lars(MANY, 0.5, variant="optax", adapt="all"), factor * gradients, weights)[0][0] for factor in (1, 4.0)
    )
    zero = MANY.table[3]
    for slot in MANY.table:
        part = slice(slot.offset, slot.offset + slot.length)
        assert np.array_equal(ones[part] * (4 if slot == zero else 1), others[part]), (
            "a tensor of zeros is stepped as by SGD"
        )


@pytest.mark.parametrize("make", [lambda b: lars(b, 0.5, momentum=0.0), lambda b: lamb(b, 0.5, weight_decay=0)])
def test_a_tensor_of_zeros_trains(make: Callable[[Bucket], InPlaceTransform]) -> None:
    bucket = Bucket({"w": (2, 2)}, np.float64)
    (step,), _ = run(make(bucket), np.ones((1, 4)), np.zeros(4))
    np.testing.assert_allclose(step, -0.5, rtol=1e-5)  # LAMB's eps


def test_a_zero_gradient_leaves_weights_without_decay_alone() -> None:
    for method in (lars(MANY, 0.5), lamb(MANY, 0.5, weight_decay=0)):
        weights = problem()[1]
        assert np.array_equal(run(method, np.zeros((2, MANY.size)), weights)[1], weights)


def test_excluded_tensors_neither_decay_nor_adapt() -> None:
    gradients, weights = problem(steps=1)
    (step,), _ = run(lars(MANY, 0.5, weight_decay=0.25, trust=0.02, momentum=0), gradients, weights)
    for name, flag in {"bias": False, "scale": False, "weight": True}.items():
        assert np.array_equal(MANY.views(step)[name], -0.5 * MANY.views(gradients[0])[name]) != flag


def test_normalising_divides_by_the_global_norm_always_and_clipping_only_beyond_it() -> None:
    gradients, weights = problem(steps=2)
    size = [norm(each) for each in gradients]
    by_hand = np.array([each / n for each, n in zip(gradients, size, strict=True)])
    options: dict[str, Any] = {"eps": 1e-3}
    expected = run(lamb(MANY, 0.01, **options), by_hand, weights)[1]
    np.testing.assert_allclose(
        run(lamb(MANY, 0.01, grad_norm="normalise", **options), gradients, weights)[1], expected, rtol=1e-13
    )
    large = run(lamb(MANY, 0.01, grad_norm="clip", max_norm=2 * max(size), **options), gradients, weights)[1]
    assert np.array_equal(large, run(lamb(MANY, 0.01, **options), gradients, weights)[1])


def test_weights_norm_is_clamped_in_the_ratio() -> None:
    bucket = Bucket({"w": (1, 4)}, np.float64)
    (step,), _ = run(lamb(bucket, 1.0, weight_decay=0, eps=0, weight_clip=(0, 10)), np.ones((1, 4)), np.full(4, 50.0))
    np.testing.assert_allclose(step, -5.0, rtol=1e-15)  # ‖w‖ = 100 → 10, over ‖u‖ = 2


METHODS: dict[str, Callable[..., InPlaceTransform]] = {
    **{f"lars {v}": lambda b, v=v, **o: lars(b, 0.5, weight_decay=0.01, trust=0.02, variant=v, **o) for v in VARIANTS},
    "lars clipped": lambda b, **o: lars(b, 0.5, max_norm=1.0, nesterov=True, **o),
    "lamb": lambda b, **o: lamb(b, 0.01, **o),
    "adamw": lambda b, **o: lamb(b, 0.01, adapt=(), **o),
    "lamb clipped": lambda b, **o: lamb(b, 0.01, grad_norm="clip", bias_correction="in_step", **o),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_in_place_gives_the_same_bits_and_pure_writes_nothing(name: str, dtype: str) -> None:
    gradients, weights = (each.astype(dtype) for each in problem())
    gradients.flags.writeable = False
    bucket = Bucket(SHAPES, dtype)
    method = METHODS[name](bucket)
    pure, placed = weights.copy(), weights.copy()
    state, used = method.init(pure), method.init(placed)
    for gradient in gradients:
        pure.flags.writeable = False
        step, after = method.update(gradient, state, pure)
        again, _ = method.update(gradient, state, pure)
        assert step.dtype == dtype
        assert np.array_equal(step, again)
        pure = pure + step
        state, used = after, method.apply(gradient, used, placed)
        assert np.array_equal(pure, placed)
        assert all(np.array_equal(a, b) for a, b in zip(state, used, strict=True))


CHAINS = {**METHODS, "lamb uncorrected": lambda b, **o: lamb(b, 0.01, bias_correction=False, ratio_clip=(0.1, 5), **o)}
CHAINS["lars larc"] = lambda b, **o: lars(b, lambda t: 1 / (1 + t), weight_decay=0.01, trust=0.02, clip=True, **o)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("shard", [None, (9, 50)])
def test_the_fused_step_has_the_bits_of_the_chain_of_its_terms(name: str, dtype: str, shard: Any) -> None:
    """Tensors of 0 to 5000 elements, zero weights, zero gradients.

    Where the rate follows the trust ratio ("mlperf", "simclr") the kernel multiplies by −φγ, one rounding a tensor, and
    the chain by φ and then by −γ: the fused step has one rounding in the factor and one in the product, the chain two.
    """
    bucket = Bucket({**SHAPES, "none": (0, 3), "large": (50, 100)}, dtype)
    rng = np.random.default_rng(3)
    weights, *gradients = rng.standard_normal((5, bucket.size)).astype(dtype)
    bucket.views(weights)["zero"][...] = 0
    bucket.views(gradients[1])["weight"][...] = 0
    held = slice(*(shard or (0, bucket.size)))
    fused = CHAINS[name](bucket, part=shard)
    weights = weights[held]
    state, parts = fused.init(weights), fused.formula.init(weights)
    for gradient in gradients:
        step, state = fused.update(gradient[held], state, weights)
        unfused, parts = fused.formula.update(gradient[held], parts, weights)
        if name in ("lars mlperf", "lars simclr"):
            np.testing.assert_allclose(step, unfused, rtol=2 * np.finfo(dtype).eps, atol=np.finfo(dtype).tiny)
        else:
            assert np.array_equal(step, unfused)
        weights = weights + step


def test_a_chain_that_no_kernel_computes_is_refused() -> None:
    here = layers("mine", MANY)
    with pytest.raises(ArgumentError, match="mine: no kernel for the terms descend, momentum: use the chain as it is"):
        fuse("mine", chain(descend(0.1), momentum(0.9)), here)


def test_terms_compose_to_other_methods() -> None:
    """SGD whose steps are 2 % of the weights, tensor by tensor."""
    gradients, weights = problem(steps=1)
    method = chain(scale_by_trust_ratio(MANY, trust=0.02), descend(1.0))
    (step,), _ = run(method, gradients, weights)
    assert norm(MANY.views(step)["embedding"]) == pytest.approx(0.02 * norm(MANY.views(weights)["embedding"]))


def test_groups_of_tensors_for_the_cache_give_the_bits_of_one_pass() -> None:
    """Groups of tensors that pass through the cache together give what one pass over all gives."""
    bucket = Bucket(
        {
            f"w{i}": (n, 1)
            for i, n in enumerate([5, CACHE_ELEMENTS + 3, 7, CACHE_ELEMENTS // 2, CACHE_ELEMENTS // 2 + 1, 0, 2])
        },
        "f4",
    )
    rng = np.random.default_rng(0)
    weights, gradient = rng.standard_normal((2, bucket.size), dtype="f4")
    for name in ("lars paper", "lamb"):
        whole = METHODS[name](bucket, norm_reduce=lambda table: table)
        (step,), _ = run(METHODS[name](bucket), [gradient], weights)
        assert np.array_equal(step, run(whole, [gradient], weights)[0][0])


# Shards


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 97])
def test_shards_take_the_step_of_the_whole_vector(name: str, size: int) -> None:
    """Tensors over several ranks, several tensors on one, ranks of padding only, a tensor of zeros.

    Sums of squares are added in another order than on one rank: a rounding or two in each ratio.
    """
    gradients, weights = problem()
    length = -(-MANY.size // size)
    padded = np.zeros((len(gradients) + 1, length * size))
    padded[:-1, : MANY.size], padded[-1, : MANY.size] = gradients, weights
    expected = run(METHODS[name](MANY), gradients, weights)[1]

    def body(comm: Any) -> Vector:
        lo, hi = length * comm.rank, length * (comm.rank + 1)

        def reduce(table: Vector) -> Vector:
            total = np.empty_like(table)
            comm.Allreduce(table.ravel(), total.ravel())
            return total

        return run(METHODS[name](MANY, part=(lo, hi), norm_reduce=reduce), padded[:-1, lo:hi], padded[-1, lo:hi])[1]

    found = np.concatenate(run_on_ranks(size, body))
    np.testing.assert_allclose(found[: MANY.size], expected, rtol=1e-12, atol=1e-14)
    assert not found[MANY.size :].any()
    if size == 1:
        assert np.array_equal(found, expected)


def test_norms_of_a_shard_alone_give_another_step() -> None:
    gradients, weights = problem()
    alone = lamb(MANY, 0.01, part=(0, 20))
    whole = run(lamb(MANY, 0.01), gradients, weights)[1]
    assert not np.allclose(run(alone, gradients[:, :20], weights[:20])[1], whole[:20], rtol=1e-6)


# Kernels


@pytest.mark.parametrize("code", ["f4", "f8"])
@pytest.mark.parametrize("n", [0, 1, 7, 1023, 1024, 1025, 5000])
def test_compiled_kernels_give_the_references_bits(code: str, n: int) -> None:
    rng = np.random.default_rng(n)
    real = np.dtype(code).type
    w, g, m, out = rng.standard_normal((4, n)).astype(code)
    v = np.abs(m)
    cuts = [0, n // 5, n // 5, n // 2, n]
    bounds = np.array([cuts[:-1], cuts[1:]], np.int64).T.copy()
    decay, first, last = rng.random((3, 4)).astype(code)
    numbers = [real(each) for each in (0.7, 0.9, 0.1, 0.999, 0.001, 0.19, 0.002, 1e-6)]
    late = [*numbers[:5], real(1), real(1), numbers[-1]]
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("sum_of_squares", (w,)),
        *[
            ("lars_sums", (w, g, v, bounds, decay, real(scale), real(0.9), nesterov, norm_of))
            for norm_of in (GRADIENT, DECAYED_GRADIENT, UPDATE)
            for scale in (0.7, 1)
            for nesterov in (False, True)
        ],
        *[
            ("lars_step", (w, g, m, out, bounds, decay, first, last, real(0.7), real(-0.3), real(0.9), nesterov))
            for nesterov in (False, True)
        ],
        *[
            ("lars_apply", (w, g, m, bounds, decay, first, last, real(0.7), real(-0.3), real(0.9), nesterov))
            for nesterov in (False, True)
        ],
        *[("lamb_moments", (w, g, m, v, out, bounds, decay, *each)) for each in (numbers, late)],
        *[("adam_step", (w, g, m, v, bounds, decay, *each, real(-0.1))) for each in (numbers, late)],
        ("scale_tensors", (out, bounds, first, real(-0.1))),
        ("add_scaled", (w, out, bounds, first, real(-0.1))),
    ]
    assert {name for name, _ in calls} == loops.ARGUMENTS.keys()
    for name, arguments in calls:
        ours, theirs = ([each.copy() if isinstance(each, np.ndarray) else each for each in arguments] for _ in range(2))
        found = loops.compile_kernel(name, code)(*ours)
        expected = getattr(reference, name)(*theirs)
        assert np.array_equal(found, expected) or found is expected is None
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), name


def test_sums_of_squares_are_exact_where_float32_is_and_see_infinities_and_nans() -> None:
    integers = np.arange(-1400.0, 1400)
    for x in (integers, integers.astype("f4"), np.full(3, 1e30, "f4"), np.zeros(0)):
        exact = math.fsum(float(each) ** 2 for each in x)
        assert reference.sum_of_squares(x) == exact
    assert reference.sum_of_squares(np.array([np.inf, 1])) == np.inf
    assert math.isnan(reference.sum_of_squares(np.array([np.nan, 1])))


def extremes(kind: str) -> Vector:
    """5000 float32 numbers: whose squares under- or overflow, all of them or a few."""
    x = np.random.default_rng(5).standard_normal(5000, dtype="f4")
    few = np.arange(x.size) % 7 == 0
    return {
        "tiny": x * np.float32(1e-25),
        "subnormal": x * np.float32(1e-41),
        "huge": x * np.float32(1e30),
        "few huge": np.where(few, x * np.float32(1e25), x),
        "few only": np.where(few, x, 0).astype("f4"),
        "all sizes": x * np.float32(10) ** np.linspace(-38, 37, x.size).astype("f4"),
        "ordinary": x,
    }[kind]


@pytest.mark.parametrize("kind", ["tiny", "subnormal", "huge", "few huge", "few only", "all sizes", "ordinary"])
def test_sums_of_squares_of_float32_are_right_over_its_whole_range(kind: str) -> None:
    """At most eight roundings of 2⁻²⁴ in a partial sum, then float64: no worse than pairwise sums of float32."""
    x = extremes(kind)
    found = reference.sum_of_squares(x)
    exact = math.fsum(float(each) ** 2 for each in x)
    assert abs(found - exact) <= 2.0**-21 * exact
    assert loops.compile_kernel("sum_of_squares", "f4")(x) == found
    with np.errstate(over="ignore"):
        pairwise = float(np.square(x).sum(dtype="f4"))
    if kind in ("few only", "ordinary"):
        assert abs(found - exact) <= abs(pairwise - exact) + 2.0**-24 * exact


def test_a_nan_stays_in_its_tensor() -> None:
    gradients, weights = problem(steps=1)
    MANY.views(gradients[0])["weight"][0, 0, 0] = np.nan
    for method in (lars(MANY, 0.5, weight_decay=0.01), lamb(MANY, 0.5)):
        (step,), _ = run(method, gradients, weights)
        assert {name for name, view in MANY.views(step).items() if not np.isfinite(view).all()} == {"weight"}


# Schedules


def test_rates_grow_with_the_batch_linearly_or_with_its_root() -> None:
    assert [linear_scaling(0.5, batch, 256) for batch in (128, 256, 8192)] == [0.25, 0.5, 16]
    assert [sqrt_scaling(0.5, batch, 512) for batch in (128, 512, 2048, 32768)] == [0.25, 0.5, 1, 4]


def test_the_published_rates_of_bert_are_one_rule() -> None:
    """You et al. 2020: batch 512·2^i, rate 5e-3 · 2^-(3 − i/2), a share 2^i / 320 of the steps to warm up."""
    for i in range(7):
        batch = 512 * 2**i
        assert sqrt_scaling(6.25e-4, batch, 512) == pytest.approx(5e-3 * 2 ** -(3 - i / 2), rel=1e-15)
        assert linear_scaling(1 / 320, batch, 512) == 2**i / 320


def test_warm_up_reaches_the_rate_with_its_last_update() -> None:
    schedule = warm_up(4, 8.0)
    assert [schedule(t) for t in range(6)] == [2, 4, 6, 8, 8, 8]
    assert warm_up(0, 8.0)(0) == 8


def test_polynomials_fall_to_the_end_and_stay() -> None:
    assert [polynomial(8, 4)(t) for t in range(6)] == [8, 6, 4, 2, 0, 0]
    assert [polynomial(16, 4, power=2)(t) for t in range(6)] == [16, 9, 4, 1, 0, 0]
    assert [polynomial(8, 2, end=4)(t) for t in range(4)] == [8, 6, 4, 4]


def test_warm_up_then_polynomial_is_the_recipe() -> None:
    """γ(t+1)/T_w, then γ(1 − (t−T_w)/(T−T_w))^q, T = 6 and T_w = 2."""
    schedule = warm_up(2, polynomial(8, 4, power=2))
    assert [schedule(t) for t in range(7)] == [4, 8, 8, 4.5, 2, 0.5, 0]


def test_a_batch_that_changes_warms_up_again() -> None:
    schedule = join_schedules((3, warm_up(2, 4.0)), (2, warm_up(2, polynomial(8, 4))))
    assert [schedule(t) for t in range(8)] == [2, 4, 4, 4, 8, 8, 6, 4]
    assert constant(3)(10) == 3


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lars(MANY, 1.0, variant="apex"), "lars: variant is 'apex': pass one of 'paper'"),  # type: ignore[arg-type]
        (lambda: lars(MANY, 1.0, momentum=1), "lars: momentum is 1"),
        (lambda: lars(MANY, 1.0, trust=0), "lars: trust is 0"),
        (lambda: lars(MANY, 1.0, max_norm=-1), "lars: max_norm is -1"),
        (lambda: lars(MANY, 1.0, decay=["wieght"]), "lars: decay names wieght, which are not in the bucket"),
        (lambda: lamb(MANY, 1.0, adapt=["bias", "b"]), "lamb: adapt names b, which are not in the bucket"),
        (lambda: lamb(MANY, 1.0, adapt="none"), "lamb: adapt is 'none': pass 'flags', 'all', 'decayed', or a list"),
        (lambda: lamb(MANY, 1.0, bias_correction="step"), "lamb: bias_correction is 'step'"),  # type: ignore[arg-type]
        (lambda: lamb(MANY, 1.0, grad_norm="max"), "lamb: grad_norm is 'max'"),  # type: ignore[arg-type]
        (lambda: lamb(MANY, 1.0, ratio_clip=(2, 1)), "lamb: ratio_clip is .2, 1.: pass .low, high."),
        (lambda: lamb(MANY, 1.0, part=(5, 2)), "lamb: part is .5, 2.: pass .lo, hi."),
        (lambda: linear_scaling(1.0, 0, 256), "linear_scaling: batch 0"),
        (lambda: polynomial(1.0, 0), "polynomial: steps is 0"),
        (join_schedules, "join_schedules: no phases"),
    ],
)
def test_impossible_arguments_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize("method", [lars(MANY, 1.0), lamb(MANY, 1.0)])
def test_vectors_that_do_not_fit_are_refused(method: InPlaceTransform) -> None:
    for gradient, weights, message in (
        (np.ones(3), np.ones(3), "have shape .3,., the bucket's part"),
        (np.ones(MANY.size, "f2"), np.ones(MANY.size, "f2"), "keep a float32 master copy"),
        (np.ones(MANY.size), np.ones(MANY.size, "f4"), "make them alike"),
    ):
        with pytest.raises(ArgumentError, match=message):
            method.update(gradient, method.init(weights), weights)


ONE = Bucket({"w": (3,)})


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: scale_by_trust_ratio(ONE, chain(momentum(0.9))), "open with add_decayed_weights"),
        (lambda: scale_by_trust_ratio(ONE, chain(weight_decay(0.1))), "open with add_decayed_weights"),
        (lambda: scale_by_trust_ratio(ONE, chain(momentum(0.9), add_decayed_weights(0, ONE))), "open with"),
        (lambda: scale_by_trust_ratio(ONE, momentum(0.9)), "open with add_decayed_weights"),
        (lambda: scale_by_trust_ratio(ONE, chain()), "open with add_decayed_weights"),
        (lambda: scale_by_trust_ratio(ONE, trust=0), "positive number"),
        (lambda: scale_by_trust_ratio(ONE, eps=-1), "0 or more"),
        (lambda: scale_by_trust_ratio(ONE, ratio_clip=(3, 1)), "low, high"),
        (lambda: scale_by_trust_ratio(ONE, weight_clip=(3, 1)), "low, high"),
        (lambda: scale_by_global_norm("both"), "'normalise'"),  # type: ignore[arg-type]
        (lambda: scale_by_global_norm("clip", 0), "positive number"),
        (lambda: add_decayed_weights(-1, ONE), "0 or more"),
        (lambda: lars(ONE, 0.1, eps=-1), "0 or more"),
    ],
)
def test_terms_refuse_wrong_arguments_with_a_remedy(make: Callable[[], Any], remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy):
        make()


@pytest.mark.parametrize("method", [lars(ONE, 0.1), lamb(ONE, 0.1)], ids=["lars", "lamb"])
@pytest.mark.parametrize("copy_of", [copy.copy, copy.deepcopy])
def test_a_copied_optimizer_steps_as_the_original(method: Any, copy_of: Callable[[Any], Any]) -> None:
    same, weights, gradient = copy_of(method), np.ones(3, "f4"), np.full(3, 2, "f4")
    expected, _ = method.update(gradient, method.init(weights), weights)
    same.apply(gradient, same.init(weights), weights)
    assert np.array_equal(weights, np.ones(3, "f4") + expected)
