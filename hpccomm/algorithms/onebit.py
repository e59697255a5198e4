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

In two phases (:func:`~hpccomm.collectives.onebit.onebit_allreduce`) a rank sends 2(p−1)/p · n/8 bytes, as many as a
ring of bits would; an allgather of all messages, which the first two use, sends (p−1) · n/8: less for two ranks, more
from four on.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.compressors import flat, onebit
from hpccomm.algorithms.exchange import ExchangeReport, allreduce_bytes
from hpccomm.algorithms.feedback import everywhere, feedback
from hpccomm.algorithms.transforms import Schedule, Transform, Vector, chain, check_alike, check_decay, require, scale
from hpccomm.buckets import Bucket
from hpccomm.collectives.onebit import onebit_allreduce, server_elements
from hpccomm.kernels.fastest import compression as kernels

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

        m_k = b1·m + (1 − b1)·g_k;   m = onebit_allreduce(m_k);   step = −γ (m / (√v + ε) + λw)

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
        server = np.zeros(server_elements(weights.size, comm.rank, comm.size), np.float32)
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
            moment: Vector = np.float32(b1) * state.mean + one * mean
            variance = np.float32(b2) * state.variance + two * mean * mean
        else:
            own: Vector = np.float32(b1) * state.mean + one * gradient
            found = onebit_allreduce(comm, own, state.worker, state.server)
            moment, nbytes = found.mean, found.bytes_sent
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
