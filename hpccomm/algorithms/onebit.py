"""Methods that send one bit an element: 1-bit SGD, EF-signSGD, 1-bit Adam, 1-bit LAMB.

*p ranks, n elements; e residual (not sent yet), s a scale.*

=====================  =====================================================  =======================================
method                 what is sent                                           source
=====================  =====================================================  =======================================
:func:`onebit_sgd`     signs of g + e and a mean for each sign, tensor by     Seide, Fu, Droppo, Li & Yu,
                       tensor                                                 Interspeech 2014
:func:`ef_signsgd`     signs of γg + e and their mean magnitude               Karimireddy, Rebjock, Stich & Jaggi,
                                                                              ICML 2019
:func:`onebit_adam`    Adam's momentum, in two phases, once its variance      Tang et al., ICML 2021
                       has settled
:func:`onebit_lamb`    LAMB's momentum likewise, its tensors made equally     Li, Awan, Tang, Rajbhandari & He,
                       long                                                   HiPC 2022
=====================  =====================================================  =======================================

In two phases (:func:`~hpccomm.collectives.compressed.onebit.onebit_allreduce`) a rank sends 2(p−1)/p · n/8 bytes, as
many as a ring of bits would.  The allgather of all messages, which the first two methods use, sends (p−1) · n/8: less
for two ranks, more from four on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.compression.format import check_flat
from hpccomm.algorithms.compression.signs import onebit
from hpccomm.algorithms.error_feedback import FeedbackTransform, all_ranks_true, feedback, largest
from hpccomm.algorithms.exchange import allreduce_bytes, allreduce_mean
from hpccomm.algorithms.reports import ExchangeReport, MessageReport, norm_of
from hpccomm.algorithms.states import GroupSize, ShardedVector, Unsent
from hpccomm.algorithms.transforms import (
    Schedule,
    Transform,
    Vector,
    chain,
    check_count,
    check_decay,
    check_not_negative,
    check_rate,
    check_shape,
    scale,
    scale_by_schedule,
)
from hpccomm.arrays import to_device_like
from hpccomm.buckets import Bucket
from hpccomm.collectives.compressed.onebit import onebit_allreduce, server_elements
from hpccomm.kernels.dispatch import kernels

if TYPE_CHECKING:
    from mpi4py import MPI

S = TypeVar("S", "OneBitAdamState", "OneBitLambState")


def onebit_sgd(comm: MPI.Intracomm, bucket: Bucket | None = None) -> Transform:
    """The mean of the ranks' signs, each tensor of ``bucket`` with two scales of its own, or the vector with two."""
    return with_bucket(feedback(onebit("per-sign"), comm, parts=tensor_slices(bucket)), bucket)


def ef_signsgd(comm: MPI.Intracomm, lr: float | Schedule, bucket: Bucket | None = None) -> Transform:
    """Steps −mean of s·sign(lr·g + e): the rate is applied before the feedback, so it does not rescale the residual."""
    check_rate("ef_signsgd: lr", lr)
    rate = scale_by_schedule(lr) if callable(lr) else scale(lr)
    return chain(rate, with_bucket(feedback(onebit("l1"), comm, parts=tensor_slices(bucket)), bucket), scale(-1))


def with_bucket(exchange: FeedbackTransform, bucket: Bucket | None) -> FeedbackTransform:
    """The exchange, whose tensors are those of the bucket."""
    made = FeedbackTransform(*exchange, bucket, parts=[exchange])
    made.exchange, made.flush_state = exchange.exchange, exchange.flush_state
    return made


def begin_step(who: str, comm: Any, gradient: Vector, state: S, weights: Vector) -> tuple[bool, S]:
    """Check a step and ask all ranks whether they can make it: whether they can, and the state with its report."""
    check_shape(who, state.mean, weights)
    fine = largest(check_flat(gradient, who, True)) < LARGEST_ROOT
    state = state._replace(report=state.report.add(ExchangeReport(0, 0.0, allreduce_bytes(1, comm.size))))
    made = all_ranks_true(comm, fine)
    return made, state if made else state._replace(skipped=state.skipped + 1)


def tensor_slices(bucket: Bucket | None) -> list[slice] | None:
    """The slice of each tensor."""
    return None if bucket is None else [slice(slot.offset, slot.offset + slot.length) for slot in bucket.table]


class OneBitAdamState(NamedTuple):
    """The state of one rank; moments and weights are the same on all ranks, errors are not."""

    steps: int
    mean: Vector
    """m: Adam's first moment, the same on all ranks."""
    variance: Vector
    """v: frozen after the warm-up."""
    scales: npt.NDArray[np.float32]
    """(L,) the factor of each tensor's momentum before it is sent; none without a bucket."""
    worker: Unsent
    server: ShardedVector
    scale: float
    """The decoded magnitude of this rank's last signs, 0 while steps are dense."""
    skipped: int
    """Steps that all ranks skipped because a gradient was not finite."""
    report: ExchangeReport
    ranks: GroupSize
    """How many ranks exchange."""

    def messages(self) -> MessageReport:
        """The messages of the last step."""
        return bit_messages(self)


def onebit_adam(
    comm: MPI.Intracomm,
    lr: float | Schedule,
    freeze_step: int,
    *,
    bucket: Bucket | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Transform:
    """Adam whose momentum travels in one bit an element after ``freeze_step`` dense steps (Tang et al., ICML 2021).

    *m, v Adam's moments, k the rank, λ weight decay.*  Until then m and v are those of the mean gradient; after::

        m_k = b1·m + (1 − b1)·g_k;   m = onebit_allreduce(m_k);   step = −γ (m / (√v + ε) + λw)

    with v frozen.  There is no bias correction, as in the published code.  Freeze after 15 to 25 % of the steps and not
    before 1/(1 − b2).  An element whose gradient is always 0 keeps v = 0, but a sign bit cannot represent 0: such
    elements do not move.  Steps are signed: add them to the weights.

    One scale serves all elements; with a ``bucket`` each tensor's momentum is multiplied by σ, the mean over the
    tensors of m's root mean square at the freeze divided by its own, and divided by σ at the receiver, as in
    :func:`onebit_lamb`.  Use it where the gradients of tensors differ in magnitude.  σ is bounded: m's root mean square
    counts as at least a tenth of that of noise with the same v, and σ lies between 1e-4 and 1e4, so that a tensor whose
    gradients pause at the freeze, for up to about 1/(1 − b2) steps, does not have the largest scale afterwards.
    """
    comm = as_communicator("onebit_adam", comm)
    check_decay("onebit_adam: b1", b1)
    check_decay("onebit_adam: b2", b2)
    check_count("onebit_adam: freeze_step", freeze_step, 1)  # an element without a variance never moves
    check_rate("onebit_adam: lr", lr)
    check_not_negative("onebit_adam: eps", eps)
    check_not_negative("onebit_adam: weight_decay", weight_decay)
    places = tensor_slices(bucket) or []

    def init(weights: Vector) -> OneBitAdamState:
        check_flat(weights, "onebit_adam", True)
        zeros = np.zeros_like(weights)
        server = np.zeros_like(weights, shape=(server_elements(weights.size, comm.rank, comm.size),))
        scales = np.ones(len(places), np.float32)
        return OneBitAdamState(
            0, zeros, zeros.copy(), scales, zeros.copy(), server, 0.0, 0, ExchangeReport(), comm.size
        )

    def update(gradient: Vector, state: OneBitAdamState, weights: Vector) -> tuple[Vector, OneBitAdamState]:
        began = time.perf_counter()
        made, state = begin_step("onebit_adam", comm, gradient, state, weights)
        if not made:
            return np.zeros_like(gradient), state
        one, two = np.float32(1 - b1), np.float32(1 - b2)
        if state.steps < freeze_step:
            mean, nbytes = allreduce_mean(comm, gradient)
            moment: Vector = np.float32(b1) * state.mean + one * mean
            variance = np.float32(b2) * state.variance + two * mean * mean
            if state.steps + 1 == freeze_step:
                state = state._replace(scales=momentum_scales(moment, variance, places, b1))
        else:
            own: Vector = np.float32(b1) * state.mean + one * gradient
            factors = expand_scales(to_device_like(state.scales, own), places)
            own *= factors
            found = onebit_allreduce(comm, own, state.worker, state.server)
            moment, nbytes = found.mean, found.bytes_sent
            moment /= factors
            variance = state.variance
            state = state._replace(scale=found.scale)
        rate = lr(state.steps) if callable(lr) else lr
        step = divide_by_root(moment, variance, eps)
        if weight_decay:
            step += np.float32(weight_decay) * weights
        report = state.report.add(ExchangeReport(1, time.perf_counter() - began, nbytes))
        after = state._replace(steps=state.steps + 1, mean=moment, variance=variance, report=report)
        return (step * np.float32(-rate)).astype(weights.dtype, copy=False), after

    return Transform(init, update, bucket, comm=comm, needs_whole="onebit_adam")


def bit_messages(state: OneBitAdamState | OneBitLambState) -> MessageReport:
    """The messages of the last step that was not skipped: dense 4n bytes, afterwards n/8 and a scale."""
    n, compressed = state.worker.size if state.steps else 0, state.scale > 0
    nbytes = 4 + -(-n // 8) if compressed else 4 * n
    path = "two phases" if compressed else "dense" if state.steps else ""
    return MessageReport(nbytes, n, state.scale, norm_of(state.worker), state.skipped, path)


LARGEST_ROOT = 1e19
"""Gradients whose squares float32 holds: a step with a larger element is skipped."""
COEFFICIENTS = (0.01, 10.0)
"""Bounds of a tensor's trust ratio during the warm-up."""
FACTORS = (0.5, 4.0)
"""Bounds of the factor of a frozen trust ratio."""
LEAST_MOMENTUM = 0.1
"""A tensor's root mean square momentum at the freeze counts as at least this part of √v·√((1 − b1)/(1 + b1)), which is
that of independent gradients with the same v."""
MOMENTUM_FACTORS = (1e-4, 1e4)
"""Bounds of the factor of a tensor's momentum."""
FACTOR_CHANGE = 0.1
"""The largest relative change of that factor in a step."""


class OneBitLambState(NamedTuple):
    """The state of one rank; all but the errors and ``scale`` is the same on all ranks."""

    steps: int
    mean: Vector
    """m: Adam's first moment."""
    variance: Vector
    """v: frozen after the warm-up."""
    fresh_variance: Vector
    """v updated after the freeze, from the gradients recovered from the momentum."""
    ratios: npt.NDArray[np.float64]
    """(L,) running means of the trust ratios, frozen after the warm-up."""
    factors: npt.NDArray[np.float64]
    """(L,) the factors of the ratios in the last step."""
    scales: npt.NDArray[np.float32]
    """(L,) the factor of each tensor's momentum before it is sent."""
    worker: Unsent
    server: ShardedVector
    scale: float
    """The decoded magnitude of this rank's last signs, 0 while steps are dense."""
    skipped: int
    """Steps that all ranks skipped because a gradient was not finite."""
    report: ExchangeReport
    ranks: GroupSize
    """How many ranks exchange."""

    def messages(self) -> MessageReport:
        """The messages of the last step."""
        return bit_messages(self)


def onebit_lamb(
    comm: MPI.Intracomm,
    bucket: Bucket,
    lr: float | Schedule,
    freeze_step: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    ratio_decay: float = 0.9,
) -> Transform:
    """LAMB whose momentum travels in one bit an element after ``freeze_step`` dense steps (Li et al., HiPC 2022).

    *L tensors; m, v Adam's moments, k the rank, λ weight decay where a tensor's flag says so, c a trust ratio.*  Until
    then it is LAMB on the mean gradient, c = ‖w‖/‖u‖ kept within 0.01 and 10, without bias correction::

        u = m/(√v + ε) + λw;   step = −γ c u;   c̄ ← β c̄ + (1 − β) c,   the first c̄ is c

    After it v and c̄ stand.  Each tensor's momentum is multiplied by σ, the mean over the tensors of m's root mean
    square at the freeze by its own, bounded as in :func:`onebit_adam`, so that one scale serves all of them, and::

        m_k = b1·m + (1 − b1)·g_k;   m' = onebit_allreduce(σ m_k)/σ;   ĝ = (m' − b1·m)/(1 − b1)
        ṽ ← b2·ṽ + (1 − b2)·ĝ²;   f = max (√v + ε)/(√ṽ + ε) in each tensor
        step = −γ c̄ f (m'/(√v + ε) + λw)

    with f between 0.5 and 4 and within 10 % of the last.  Elements whose v is 0 move by their decay only.  Steps are
    signed: add them to the weights.  Gradients of a bucket, float32.
    """
    for name, rate in (("b1", b1), ("b2", b2), ("ratio_decay", ratio_decay)):
        check_decay(f"onebit_lamb: {name}", rate)
    check_count("onebit_lamb: freeze_step", freeze_step, 1)
    check_rate("onebit_lamb: lr", lr)
    for name, number in (("eps", eps), ("weight_decay", weight_decay)):
        check_not_negative(f"onebit_lamb: {name}", number)
    comm, places = as_communicator("onebit_lamb", comm), tensor_slices(bucket) or []
    decays = np.array([weight_decay * slot.decay for slot in bucket.table], np.float32)

    def init(weights: Vector) -> OneBitLambState:
        check_flat(weights, "onebit_lamb", True)
        m, v, fresh, worker = (np.zeros_like(weights) for _ in range(4))
        server = np.zeros_like(weights, shape=(server_elements(weights.size, comm.rank, comm.size),))
        ones, scales = np.ones(len(places)), np.ones(len(places), np.float32)
        return OneBitLambState(0, m, v, fresh, ones, ones, scales, worker, server, 0.0, 0, ExchangeReport(), comm.size)

    def update(gradient: Vector, state: OneBitLambState, weights: Vector) -> tuple[Vector, OneBitLambState]:
        began = time.perf_counter()
        made, state = begin_step("onebit_lamb", comm, gradient, state, weights)
        if not made:
            return np.zeros_like(gradient), state
        state, direction, rates, nbytes = (step_dense if state.steps < freeze_step else step_onebit)(
            gradient, state, weights
        )
        rate = lr(state.steps) if callable(lr) else lr
        for place, each in zip(places, rates, strict=True):
            direction[place] *= np.float32(-rate * each)
        report = state.report.add(ExchangeReport(1, time.perf_counter() - began, nbytes))
        return direction, state._replace(steps=state.steps + 1, report=report)

    def step_dense(gradient: Vector, state: OneBitLambState, weights: Vector) -> LambParts:
        mean, nbytes = allreduce_mean(comm, gradient)
        moment: Vector = np.float32(b1) * state.mean + np.float32(1 - b1) * mean
        variance: Vector = np.float32(b2) * state.variance + np.float32(1 - b2) * mean * mean
        direction = direction_of(moment, variance, weights)
        found = np.array([trust_ratio(weights[place], direction[place]) for place in places])
        ratios = found if state.steps == 0 else ratio_decay * state.ratios + (1 - ratio_decay) * found
        scales = state.scales if state.steps + 1 < freeze_step else momentum_scales(moment, variance, places, b1)
        state = state._replace(mean=moment, variance=variance, fresh_variance=variance, ratios=ratios, scales=scales)
        return state, direction, found, nbytes

    def step_onebit(gradient: Vector, state: OneBitLambState, weights: Vector) -> LambParts:
        own: Vector = np.float32(b1) * state.mean + np.float32(1 - b1) * gradient
        scales = expand_scales(to_device_like(state.scales, own), places)
        found = onebit_allreduce(comm, own * scales, state.worker, state.server)
        moment: Vector = found.mean / scales
        recovered = (moment - np.float32(b1) * state.mean) / np.float32(1 - b1)
        fresh: Vector = np.float32(b2) * state.fresh_variance + np.float32(1 - b2) * recovered * recovered
        growth = (np.sqrt(state.variance) + np.float32(eps)) / (np.sqrt(fresh) + np.float32(eps))
        most = np.array([float(growth[place].max()) if growth[place].size else 0.0 for place in places])
        last = state.factors
        factors = np.clip(np.clip(most, *FACTORS), last * (1 - FACTOR_CHANGE), last * (1 + FACTOR_CHANGE))
        direction = direction_of(moment, state.variance, weights)
        state = state._replace(mean=moment, fresh_variance=fresh, factors=factors, scale=found.scale)
        return state, direction, state.ratios * factors, found.bytes_sent

    def direction_of(moment: Vector, variance: Vector, weights: Vector) -> Vector:
        """u, without the first term where the variance is 0."""
        u = divide_by_root(moment, variance, eps)
        for place, decay in zip(places, decays, strict=True):
            u[place] += decay * weights[place]
        return u

    return Transform(init, update, bucket, comm=comm, needs_whole="onebit_lamb")


def divide_by_root(moment: Vector, variance: Vector, eps: float) -> Vector:
    """m/(√v + ε); 0 where the variance is 0."""
    still = variance == 0
    quotient: Vector = np.where(still, np.float32(0), moment / np.where(still, 1, np.sqrt(variance) + np.float32(eps)))
    return quotient


LambParts = tuple[OneBitLambState, Vector, npt.NDArray[np.float64], int]
"""The new state, u, the factor of each tensor of u, the bytes sent."""


def trust_ratio(weights: Vector, step: Vector) -> float:
    """‖w‖/‖u‖ within :data:`COEFFICIENTS`, 1 where either is 0; squares are summed in a fixed order."""
    size, length = (math.sqrt(kernels(each).moments(each)[1]) for each in (weights, step))
    return min(max(size / length, COEFFICIENTS[0]), COEFFICIENTS[1]) if size and length else 1.0


def expand_scales(scales: npt.NDArray[np.float32], places: Sequence[slice]) -> Vector:
    """The factor of each element; one 1 for all where there are no tensors."""
    if not places:
        return np.ones_like(scales, shape=(1,))
    return np.repeat(scales, [place.stop - place.start for place in places])


def momentum_scales(moment: Vector, variance: Vector, places: Sequence[slice], b1: float) -> npt.NDArray[np.float32]:
    """The factors that give each tensor's momentum the mean of their root mean squares; 1 for zeros.

    A tensor whose gradients pause at the freeze has next to no momentum: the variance bounds its factor.
    """
    sizes = [max(1, place.stop - place.start) for place in places]
    momenta = np.array([kernels(moment).moments(moment[place])[1] for place in places]) / sizes
    gradients = np.array([kernels(variance).moments(variance[place])[0] for place in places]) / sizes
    lengths = np.sqrt(np.maximum(momenta, LEAST_MOMENTUM**2 * (1 - b1) / (1 + b1) * gradients))
    mean = lengths.mean() if lengths.size else 0.0
    factors = np.clip(mean / np.where(lengths > 0, lengths, 1), *MOMENTUM_FACTORS)
    return np.where(lengths > 0, factors, 1).astype(np.float32)
