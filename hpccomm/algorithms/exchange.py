"""Dense exchanges: every rank passes in its gradient and receives the mean over all ranks.

*p ranks; n elements of b bytes.*  Every rank sends 2(p-1)/p · n · b bytes, the lower bound (Patarasuk & Yuan 2009),
which a ring attains.  The mean is the arithmetic mean over the ranks of the communicator: where ranks hold different
numbers of samples, each rank weights its gradient before the exchange.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpccomm.algorithms import transforms
from hpccomm.algorithms.agreement import as_communicator, find_odd_ranks
from hpccomm.algorithms.reports import ExchangeReport, MessageReport
from hpccomm.algorithms.states import Scratch
from hpccomm.algorithms.transforms import Schedule, Transform, Vector, apply_if_finite, chain, descend
from hpccomm.arrays import narrow, reduction_dtype, widen
from hpccomm.buckets import Bucket
from hpccomm.collectives.compressed.two_phase import mean_of_halves, shard_elements
from hpccomm.errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI


class MeanState(NamedTuple):
    """A buffer for the sum, or for the shards of 16-bit floats that arrive, and the cost so far."""

    total: Scratch
    report: ExchangeReport

    def messages(self) -> MessageReport:
        """The vector of the last exchange."""
        sent = bool(self.report.exchanges)
        return MessageReport(self.total.nbytes * sent, self.total.size * sent, path="dense" if sent else "")


def mean(comm: MPI.Intracomm, algorithm: str = "auto") -> Transform:
    """The arithmetic mean of the gradients of all ranks, on all of them with the same bits.

    float16 and bfloat16 on the host travel in 16 bits, are added in float32 in rank order, and rounded once; on a
    device, and by a named algorithm, they are widened to float32.  A single rank sends nothing.
    """
    comm = as_communicator("mean", comm)
    named: dict[str, Any] = {} if algorithm == "auto" else {"algorithm": algorithm}

    def travels_in_halves(vector: Vector) -> bool:
        return not named and reduction_dtype(vector.dtype) != vector.dtype and isinstance(vector, np.ndarray)

    def init(weights: Vector) -> MeanState:
        if travels_in_halves(weights):
            return MeanState(np.zeros(elements_of_shards(weights.size, comm.size), weights.dtype), ExchangeReport())
        return MeanState(np.zeros_like(weights, dtype=reduction_dtype(weights.dtype)), ExchangeReport())

    def update(gradient: Vector, state: MeanState, weights: Vector) -> tuple[Vector, MeanState]:
        if comm.size == 1:
            return gradient, state
        began = time.perf_counter()
        if travels_in_halves(gradient):
            fits = state.total.size == elements_of_shards(gradient.size, comm.size)
            room = state.total if fits else init(gradient).total  # it was of another number of ranks
            average, nbytes = mean_of_halves(comm, gradient, room)
            cost = ExchangeReport(1, time.perf_counter() - began, nbytes)
            return average, MeanState(room, state.report.add(cost))
        comm.Allreduce(widen(gradient), state.total, **named)
        cost = ExchangeReport(1, time.perf_counter() - began, allreduce_bytes(state.total.nbytes, comm.size))
        return narrow(state.total / comm.size, gradient.dtype), MeanState(state.total, state.report.add(cost))

    return Transform(init, update, comm=comm)


def elements_of_shards(n: int, ranks: int) -> int:
    """The elements of as many shards of one length as there are ranks."""
    return ranks * shard_elements(n, ranks)


def allreduce_bytes(nbytes: int, size: int) -> int:
    """The least bytes that each of ``size`` ranks sends in an allreduce of ``nbytes``: 2(p-1)/p of them."""
    return round(2 * (size - 1) * nbytes / size)


def allreduce_mean(comm: MPI.Intracomm, vector: Vector) -> tuple[Vector, int]:
    """The float32 mean over the ranks (``vector`` itself for one rank), and the bytes that this rank sends."""
    if comm.size == 1 or not vector.size:
        return vector, 0
    total: Vector = np.empty_like(vector)
    comm.Allreduce(vector, total)
    total /= np.float32(comm.size)
    return total, allreduce_bytes(total.nbytes, comm.size)


def exchange_unsent(comm: MPI.Intracomm, residual: Vector, reduce: str) -> tuple[Vector, ExchangeReport]:
    """The mean, or sum, of the ranks' residuals, and the cost (collective)."""
    began = time.perf_counter()
    total, nbytes = allreduce_mean(comm, residual)
    if reduce == "sum":
        total = total * np.float32(comm.size)
    elif total is residual:
        total = residual.copy()
    return total, ExchangeReport(1, time.perf_counter() - began, nbytes)


def synchronous_sgd(
    comm: MPI.Intracomm,
    lr: float | Schedule,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    bucket: Bucket | None = None,
    algorithm: str = "auto",
) -> Transform:
    """Stochastic gradient descent on the mean gradient: equivalent to one rank with the whole batch.

    ``lr`` is a number or a function of the update's count.  ``weight_decay`` is L2 regularisation: it is added before
    the momentum, with a ``bucket`` only in tensors that decay by its flags, which exempt biases, else everywhere.  A
    mean that is not finite is skipped on all ranks (:func:`~hpccomm.apply_if_finite`).
    """
    parts = [decay_by(weight_decay, bucket), transforms.momentum(momentum, nesterov) if momentum else None, descend(lr)]
    return chain(mean(comm, algorithm), apply_if_finite(chain(*(each for each in parts if each))), bucket=bucket)


def synchronous_adam(
    comm: MPI.Intracomm,
    lr: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bucket: Bucket | None = None,
    algorithm: str = "auto",
) -> Transform:
    """Adam on the mean gradient; with ``weight_decay`` it is AdamW.

    ``bucket`` as in :func:`synchronous_sgd`; a mean that is not finite is skipped on all ranks.
    """
    parts = [transforms.adam(b1, b2, eps), decay_by(weight_decay, bucket), descend(lr)]
    return chain(mean(comm, algorithm), apply_if_finite(chain(*(each for each in parts if each))), bucket=bucket)


def decay_by(rate: float, bucket: Bucket | None) -> Transform | None:
    """Weight decay in the tensors that decay, or everywhere without a bucket; None for a rate of 0."""
    decays = transforms.weight_decay(rate, None if bucket is None else bucket.mask("decay"))
    return Transform(*decays, bucket) if rate else None


def check_replicas(comm: MPI.Intracomm, vector: Vector) -> None:
    """Raise on all ranks unless every rank holds the same bits; 8 bytes from each rank are compared."""
    odd = find_odd_ranks(comm, np.ascontiguousarray(vector).view(np.uint8).data)
    if odd:
        raise MismatchError(
            f"rank {comm.rank}: the weights of ranks {', '.join(map(str, odd))} differ from those of rank 0: "
            "start all ranks from hpccomm.broadcast(weights), and let every rank take every step"
        )
