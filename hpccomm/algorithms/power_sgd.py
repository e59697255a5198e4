"""PowerSGD: each matrix of the gradient travels as two thin factors (Vogels, Karimireddy & Jaggi, NeurIPS 2019).

*M a rank's gradient of one tensor plus its residual e, a × b; Q the right factor of the previous step, b × r.*
Algorithm 1 of the publication, for all tensors at once, in two allreduces::

    P = mean(M Q),   P̂ = orthonormal(P),   Q ← mean(Mᵀ P̂),   step = P̂ Qᵀ,   e ← M − step

A sum of factors is a factor of the sum, so factors travel in ordinary allreduces of 4r(a + b) bytes a tensor,
independent of the number of ranks.  Tensors of one dimension, and those that would not shrink enough, are averaged
dense, in one message with the left factors.  The optimizer that follows has the momentum::

    method = chain(powersgd(comm, bucket, rank=4), momentum(0.9), scale(-0.1))
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.compression.format import check_flat
from hpccomm.algorithms.compression.matrix_factors import orthonormalise, start_factor
from hpccomm.algorithms.deep_gradient_compression import check_bucket_vectors, pack_slices, unpack_slices
from hpccomm.algorithms.exchange import allreduce_mean, exchange_unsent
from hpccomm.algorithms.reports import ExchangeReport, MessageReport, norm_of
from hpccomm.algorithms.states import GroupSize, Unsent
from hpccomm.algorithms.transforms import ResidualTransform, Vector, check_count, check_seed
from hpccomm.buckets import Bucket
from hpccomm.kernels.dispatch import kernels

if TYPE_CHECKING:
    from mpi4py import MPI

LEAST_SAVING = 2.0
"""A tensor is compressed where its factors have this many times fewer elements."""

Matrix = npt.NDArray[np.float32]


class PowerSgdState(NamedTuple):
    """The state of one rank."""

    residual: Unsent
    """e of each compressed tensor, one after the other: the part of this rank's gradients that no step has applied."""
    factors: Vector
    """Q of each compressed tensor, the same on all ranks."""
    steps: int
    skipped: int
    """Steps that all ranks skipped because a gradient was not finite."""
    report: ExchangeReport
    ranks: GroupSize
    """How many ranks exchange."""

    def messages(self) -> MessageReport:
        """The residual, and the steps skipped."""
        path = "factors" if self.steps else ""
        return MessageReport(4 * self.factors.size, 0, 0.0, norm_of(self.residual), self.skipped, path)


class MatrixSlices(NamedTuple):
    """One compressed tensor."""

    inside: slice
    """Of the bucket's vector."""
    error: slice
    """Of the residual."""
    left: slice
    """Of all left factors."""
    right: slice
    """Of all right factors."""
    shape: tuple[int, int]
    rank: int


class MatrixSplit(NamedTuple):
    """The compressed tensors, the slices of the others, and the lengths of the packed vectors."""

    matrices: list[MatrixSlices]
    dense: list[slice]
    errors: int
    lefts: int
    rights: int


def split_matrices(bucket: Bucket, rank: int) -> MatrixSplit:
    """Compress the matrices whose factors have :data:`LEAST_SAVING` times fewer elements."""
    matrices, dense, error, left, right = [], [], 0, 0, 0
    for slot in bucket.table:
        inside = slice(slot.offset, slot.offset + slot.length)
        rows = slot.shape[0] if len(slot.shape) > 1 else 0
        columns = slot.length // rows if rows else 0
        r = min(rank, rows, columns)
        if not rows or (rows + columns) * r * LEAST_SAVING >= slot.length:
            dense.append(inside)
            continue
        ends = error + slot.length, left + rows * r, right + columns * r
        own, p, q = slice(error, ends[0]), slice(left, ends[1]), slice(right, ends[2])
        matrices.append(MatrixSlices(inside, own, p, q, (rows, columns), r))
        error, left, right = ends
    return MatrixSplit(matrices, dense, error, left, right)


def powersgd(
    comm: MPI.Intracomm,
    bucket: Bucket,
    rank: int = 4,
    *,
    start_dense_steps: int = 0,
    local_error: bool = False,
    seed: int = 0,
) -> ResidualTransform:
    """Exchange gradients of a bucket, float32, as matrices of ``rank``; the step is the mean of the decoded matrices.

    A tensor is a matrix of its first dimension times all others.  The first Q follows from ``seed``, the same on all
    ranks; so does a new column of Q wherever the last step left one without meaning: a tensor whose gradients were
    zero, or of low rank, is approximated in full again from the next step.  The first ``start_dense_steps`` steps are
    dense.  With ``local_error`` a rank keeps M − P̂ (Mᵀ P̂)ᵀ, the error of its own factors, as the authors' package
    does: the sum over the ranks is the same.  If the gradient of any rank is not finite, no rank steps, and only
    ``skipped`` changes in the state.  All ranks multiply the same factors, so their steps have the same bits where
    their processors and BLAS are alike.

    When a run continues with another number of ranks, :func:`~hpccomm.for_ranks` redistributes the residuals.
    """
    check_count("powersgd: rank", rank, 1)
    check_seed("powersgd", seed)
    check_count("powersgd: start_dense_steps", start_dense_steps, 0)
    comm, (matrices, dense, errors, lefts, rights) = as_communicator("powersgd", comm), split_matrices(bucket, rank)

    def init(weights: Vector) -> PowerSgdState:
        check_flat(weights, "powersgd")
        factors = np.empty(rights, np.float32)
        for number, place in enumerate(matrices):
            factors[place.right] = start_factor(place.shape[1], place.rank, seed + number).reshape(-1)
        return PowerSgdState(np.zeros(errors, np.float32), factors, 0, 0, ExchangeReport(), comm.size)

    def update(gradient: Vector, state: PowerSgdState, weights: Vector) -> tuple[Vector, PowerSgdState]:
        check_bucket_vectors("powersgd", bucket, gradient, weights)
        began = time.perf_counter()
        fine = kernels().all_finite(check_flat(gradient, "powersgd"))
        backlog = state.residual + pack_slices(gradient, [place.inside for place in matrices])
        compress = state.steps >= start_dense_steps
        large = np.empty(lefts, np.float32) if compress else backlog
        first = np.concatenate([np.array([not fine], np.float32), large, pack_slices(gradient, dense)])
        if fine and compress:
            for place in matrices:
                np.matmul(matrix(backlog, place), right_factor(state.factors, place), out=left_factor(first[1:], place))
        elif not fine:
            first[1:] = 0
        first, nbytes = allreduce_mean(comm, first)
        if first[0] > 0 or not kernels().all_finite(first):
            cost = ExchangeReport(1, time.perf_counter() - began, nbytes)
            return np.zeros_like(gradient), state._replace(skipped=state.skipped + 1, report=state.report.add(cost))
        large, small = first[1 : 1 + large.size], first[1 + large.size :]
        step = np.empty_like(gradient)
        if compress:
            factors, more = apply_factors(large, backlog, step, state)
        else:
            factors, more = state.factors, 0
            unpack_slices(large, step, [place.inside for place in matrices])
            backlog = np.zeros_like(backlog)
        unpack_slices(small, step, dense)
        report = state.report.add(ExchangeReport(1, time.perf_counter() - began, nbytes + more))
        return step, state._replace(residual=backlog, factors=factors, steps=state.steps + 1, report=report)

    def apply_factors(first: Vector, backlog: Vector, step: Vector, state: PowerSgdState) -> tuple[Vector, int]:
        """The step of the matrices, what it leaves of the backlog, the next Q, and the bytes sent."""
        own = np.empty(rights, np.float32)
        for place in matrices:
            basis = left_factor(first, place)
            basis[...] = orthonormalise(basis)
            np.matmul(matrix(backlog, place).T, basis, out=right_factor(own, place))
        factors, nbytes = allreduce_mean(comm, own)
        for place in matrices:
            left, right = left_factor(first, place), right_factor(factors, place)
            applied = step[place.inside].reshape(place.shape)
            np.matmul(left, right.T, out=applied)
            matrix(backlog, place)[...] -= left @ right_factor(own, place).T if local_error else applied
        for number, place in enumerate(matrices):
            replace_dead_columns(right_factor(factors, place), seed + number + len(matrices) * (state.steps + 1))
        return factors, nbytes

    def flush_state(state: PowerSgdState) -> tuple[Vector, PowerSgdState]:
        total, cost = exchange_unsent(comm, state.residual, "mean")
        whole = np.zeros(bucket.size, np.float32)
        unpack_slices(total, whole, [place.inside for place in matrices])
        return whole, state._replace(residual=np.zeros_like(total), report=state.report.add(cost))

    return ResidualTransform.of(init, update, flush_state, bucket, comm=comm, needs_whole="powersgd")


def replace_dead_columns(factor: Matrix, seed: int) -> None:
    """Replace the columns of Q that are zero, by which no gradient would be seen again, with random ones, in place."""
    dead = ~factor.any(axis=0)
    if dead.any():
        columns, rank = factor.shape
        factor[:, dead] = start_factor(columns, rank, seed)[:, dead]


def matrix(vector: Vector, place: MatrixSlices) -> Matrix:
    """One tensor's backlog, a view."""
    return vector[place.error].reshape(place.shape)


def left_factor(vector: Vector, place: MatrixSlices) -> Matrix:
    """One tensor's P, a view."""
    return vector[place.left].reshape(place.shape[0], place.rank)


def right_factor(vector: Vector, place: MatrixSlices) -> Matrix:
    """One tensor's Q, a view."""
    return vector[place.right].reshape(place.shape[1], place.rank)
