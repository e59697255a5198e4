"""One bit an element: 1-bit SGD, EF-signSGD, 1-bit Adam.

*p ranks, n elements; e what was not sent yet, s a scale.*

=====================  =====================================================  =======================================
method                 what is sent                                           source
=====================  =====================================================  =======================================
:func:`onebit_sgd`     signs of g + e and a mean for each sign, tensor by     Seide, Fu, Droppo, Li & Yu,
                       tensor                                                 Interspeech 2014
:func:`ef_signsgd`     signs of γg + e and their mean magnitude               Karimireddy, Rebjock, Stich & Jaggi,
                                                                              ICML 2019
:func:`onebit_adam`    Adam's momentum, in two phases, once its variance      Tang et al., ICML 2021
                       has settled
=====================  =====================================================  =======================================

In two phases (:func:`two_phases`) a rank sends 2(p−1)/p · n/8 bytes, as many as a ring of bits would; an allgather of
all messages, which the first two use, sends (p−1) · n/8: less for two ranks, more from four on.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.compressors import flat, kernels, onebit
from hpccomm.algorithms.exchange import ExchangeReport, allreduce_bytes
from hpccomm.algorithms.feedback import everywhere, feedback
from hpccomm.algorithms.transforms import Schedule, Transform, Vector, chain, check_alike, check_decay, require, scale
from hpccomm.buckets import Bucket
from hpccomm.collectives.engine import even_cuts
from hpccomm.errors import ArgumentError

if TYPE_CHECKING:
    from mpi4py import MPI


def onebit_sgd(comm: MPI.Intracomm, bucket: Bucket | None = None) -> Transform:
    """The mean of the ranks' signs, each tensor of ``bucket`` with two scales of its own, or the vector with two."""
    return feedback(onebit("per-sign"), comm, parts=tensors(bucket))


def ef_signsgd(comm: MPI.Intracomm, lr: float, bucket: Bucket | None = None) -> Transform:
    """Steps −mean of s·sign(lr·g + e): the rate stands before the feedback, so that a new one spares the backlog."""
    return chain(scale(lr), feedback(onebit("l1"), comm, parts=tensors(bucket)), scale(-1))


def tensors(bucket: Bucket | None) -> list[slice] | None:
    """Where each tensor lies."""
    return None if bucket is None else [slice(slot.offset, slot.offset + slot.length) for slot in bucket.table]


class TwoPhases(NamedTuple):
    """What :func:`two_phases` returns."""

    mean: Vector
    nbytes: int
    """Sent by this rank."""


def two_phases(comm: MPI.Intracomm, x: Vector, worker: Vector, server: Vector) -> TwoPhases:
    """A mean over the ranks in one bit an element, twice compressed with feedback (collective).

    ``x`` is float32 of shape (n,); ``worker``, of the same shape, is what this rank has not sent yet, ``server``, of
    shape (length of this rank's chunk,), what it has not passed on: both are written.  The vector is cut into p chunks
    whose lengths differ by one at most, longer ones first; rank j averages chunk j.  Every chunk's scale is the mean
    magnitude of its (n,) vector, the result's that of the chunk.  All ranks get the same bits (Tang et al., ICML 2021,
    section 4).
    """
    size, rank = comm.size, comm.rank
    cuts = even_cuts(flat(x, "two_phases").size, size).tolist()
    if worker.shape != x.shape or server.size != cuts[rank + 1] - cuts[rank]:
        raise ArgumentError(
            f"two_phases: errors of {worker.size} and {server.size} elements: pass {x.size} and "
            f"{cuts[rank + 1] - cuts[rank]}, zeros at first"
        )
    chunks = [slice(lo, hi) for lo, hi in pairwise(cuts)]
    widths = [-(-(each.stop - each.start) // 8) for each in chunks]
    level = np.float32(kernels().sum_magnitudes(worker, x) / max(1, x.size))
    bits = np.empty(sum(widths), np.uint8)
    ends = np.cumsum([0, *widths]).tolist()
    for k, each in enumerate(chunks):
        out = bits[ends[k] : ends[k + 1]]
        kernels().pack_signs_feedback(worker[each], x[each], worker[each], float(level), -float(level), out)
    levels = np.empty(size, np.float32)
    received = np.empty(size * widths[rank], np.uint8)
    comm.Allgather(np.array([level]), levels)
    comm.Alltoallv([bits, widths], [received, [widths[rank]] * size])
    mean = np.zeros(server.size, np.float32)
    signs = received.reshape(size, widths[rank])
    kernels().add_signs([(signs[k], float(levels[k]), -float(levels[k])) for k in range(size)], mean)
    mean /= np.float32(size)
    again = np.float32(kernels().sum_magnitudes(server, mean) / max(1, mean.size))
    mine = np.empty(widths[rank], np.uint8)
    kernels().pack_signs_feedback(server, mean, server, float(again), -float(again), mine)
    comm.Allgather(np.array([again]), levels)
    comm.Allgatherv(mine, [bits, widths])
    result = np.zeros_like(x)
    for k, each in enumerate(chunks):
        kernels().add_signs([(bits[ends[k] : ends[k + 1]], float(levels[k]), -float(levels[k]))], result[each])
    nbytes = 8 * (size - 1) + sum(widths) - widths[rank] + (size - 1) * widths[rank]
    return TwoPhases(result, nbytes)


class OneBitAdamState(NamedTuple):
    """Where a rank stands; moments and weights are the same on all ranks, errors are not."""

    steps: int
    mean: Vector
    """m: Adam's first moment, the same on all ranks."""
    variance: Vector
    """v: frozen after the warm-up."""
    worker: Vector
    server: Vector
    skipped: int
    """Steps that all ranks left out because a gradient was not finite."""
    report: ExchangeReport


def onebit_adam(
    comm: MPI.Intracomm,
    lr: float | Schedule,
    freeze_step: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Transform:
    """Adam whose momentum travels in one bit an element after ``freeze_step`` dense steps (Tang et al., ICML 2021).

    *m, v Adam's moments, k the rank, λ weight decay.*  Until then m and v are those of the mean gradient; after::

        m_k = b1·m + (1 − b1)·g_k;   m = two_phases(m_k);   step = −γ (m / (√v + ε) + λw)

    with v as it stands.  There is no bias correction, as in the published code.  Freeze after 15 to 25 % of the steps
    and not before 1/(1 − b2).  An element whose gradient is always 0 keeps v = 0 while bits cannot say 0: such elements
    do not move.  Steps have their sign: add them to the weights.
    """
    check_decay("onebit_adam: b1", b1)
    check_decay("onebit_adam: b2", b2)
    require(freeze_step >= 0, f"onebit_adam: freeze_step is {freeze_step}: pass the number of dense steps")
    require(weight_decay >= 0, f"onebit_adam: weight_decay is {weight_decay}: pass 0 or more")

    def init(weights: Vector) -> OneBitAdamState:
        zeros = np.zeros_like(flat(weights, "onebit_adam"))
        cuts = even_cuts(weights.size, comm.size)
        server = np.zeros(int(cuts[comm.rank + 1] - cuts[comm.rank]), np.float32)
        return OneBitAdamState(0, zeros, zeros.copy(), zeros.copy(), server, 0, ExchangeReport())

    def update(gradient: Vector, state: OneBitAdamState, weights: Vector) -> tuple[Vector, OneBitAdamState]:
        check_alike(gradient, weights)
        began = time.perf_counter()
        fine = kernels().all_finite(flat(gradient, "onebit_adam"))
        if not (everywhere(comm, fine) if comm.size > 1 else fine):
            return np.zeros_like(gradient), state._replace(skipped=state.skipped + 1)
        one, two = np.float32(1 - b1), np.float32(1 - b2)
        if state.steps < freeze_step:
            mean, nbytes = averaged(comm, gradient)
            moment = np.float32(b1) * state.mean + one * mean
            variance = np.float32(b2) * state.variance + two * mean * mean
        else:
            own = np.float32(b1) * state.mean + one * gradient
            moment, nbytes = two_phases(comm, own, state.worker, state.server)
            variance = state.variance
        rate = lr(state.steps) if callable(lr) else lr
        still = variance == 0
        step = np.where(still, np.float32(0), moment / np.where(still, 1, np.sqrt(variance) + np.float32(eps)))
        if weight_decay:
            step += np.float32(weight_decay) * weights
        report = state.report.plus(ExchangeReport(1, time.perf_counter() - began, nbytes))
        after = state._replace(steps=state.steps + 1, mean=moment, variance=variance, report=report)
        return (step * np.float32(-rate)).astype(weights.dtype, copy=False), after

    return Transform(init, update)


def averaged(comm: MPI.Intracomm, gradient: Vector) -> tuple[Vector, int]:
    """The mean over the ranks, and the bytes that this one sends."""
    if comm.size == 1:
        return gradient, 0
    total: npt.NDArray[np.float32] = np.empty_like(gradient)
    comm.Allreduce(gradient, total)
    total /= np.float32(comm.size)
    return total, allreduce_bytes(total.nbytes, comm.size)
