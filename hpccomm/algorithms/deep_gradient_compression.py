"""DGC, deep gradient compression: the largest 0.1 % with momentum correction (Lin, Han, Mao, Wang & Dally, ICLR 2018).

*p ranks; u momentum, v residual (not sent yet), m the momentum's factor, d the density, C the clipping norm, λ weight
decay.*  For every tensor, on every rank, every step::

    g ← g · min(1, C √p / ‖g‖)                    local clipping, over all tensors; in units of a mean over the ranks
    u ← m u + g,   v ← v + u                      or Nesterov's: u ← m (u + g),  v ← v + u + g
    send the d n largest elements of v;  there  v ← 0,  u ← 0
    step = mean over the ranks + w,   w ← m w + λ · weights

Tensors of one dimension and those below ``smallest`` elements stay dense: their mean is computed first, their momentum
afterwards.  While messages would take longer than an allreduce (below 65,536 elements: while the density is above
1/p), every tensor is dense: ranks average all of v, and keep their own u; the warm-up 25, 6.25, 1.5625, 0.4 %
therefore begins dense on many ranks.  The optimizer that follows is plain descent, without momentum or decay::

    method = chain(dgc(comm, bucket, warmup=400), scale(-0.1))
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.compression.format import check_density, check_flat
from hpccomm.algorithms.compression.selection import topk
from hpccomm.algorithms.error_feedback import (
    FeedbackState,
    FeedbackTransform,
    accumulate_all,
    all_ranks_true,
    feedback,
    heavy_ball,
)
from hpccomm.algorithms.exchange import allreduce_bytes, allreduce_mean
from hpccomm.algorithms.message_paths import ALLGATHER, is_worth_messages
from hpccomm.algorithms.reports import ExchangeReport, MessageReport
from hpccomm.algorithms.transforms import (
    ResidualTransform,
    Vector,
    check_count,
    check_decay,
    check_limit,
    check_not_negative,
    require,
)
from hpccomm.algorithms.trust_ratio import global_norm
from hpccomm.buckets import Bucket

if TYPE_CHECKING:
    from mpi4py import MPI

STAGES = (0.25, 0.0625, 0.015625, 0.004)
"""Densities of the warm-up, of equal length (section 3.3)."""
MIN_ELEMENTS = 16384
"""Tensors of fewer elements stay dense: a message that names their elements costs as much as they do."""


class DgcState(NamedTuple):
    """The state of one rank."""

    sparse: FeedbackState
    """Of the compressed tensors, one after the other: u is ``momentum``, v is ``residual``."""
    dense: Vector
    """Momentum of the dense tensors."""
    decay: Vector | None
    """w: the momentum of weight decay."""
    steps: int
    skipped: int
    """Steps that all ranks skipped because a gradient was not finite."""
    report: ExchangeReport
    """Cost of the dense exchanges."""
    dense_step: bool
    """Whether the last step was dense in all tensors."""

    def messages(self) -> MessageReport:
        """The messages of the last step that was not skipped; of a dense one all elements, 4 bytes each."""
        found = self.sparse.messages()._replace(skipped=self.skipped)
        n, steps = self.sparse.residual.size + self.dense.size, self.steps - self.skipped
        if self.dense_step:
            return found._replace(nbytes=4 * n * bool(steps), elements=n * bool(steps), path="dense" if steps else "")
        return found._replace(nbytes=found.nbytes + 4 * self.dense.size, elements=found.elements + self.dense.size)

    def skip(self) -> DgcState:
        """After a step that all ranks skip."""
        return self._replace(steps=self.steps + 1, skipped=self.skipped + 1)


class TensorSplit(NamedTuple):
    """The compressed and the dense slices of a bucket's vector, tensor by tensor."""

    sparse: list[slice]
    dense: list[slice]
    packed_slices: list[slice]
    """The compressed tensors in a vector that holds nothing else."""


def split_tensors(bucket: Bucket, smallest: int) -> TensorSplit:
    """Tensors of several dimensions and at least ``smallest`` elements are compressed."""
    sparse, dense, packed, end = [], [], [], 0
    for slot in bucket.table:
        place = slice(slot.offset, slot.offset + slot.length)
        if len(slot.shape) < 2 or slot.length < max(1, smallest):
            dense.append(place)
            continue
        sparse.append(place)
        packed.append(slice(end, end + slot.length))
        end += slot.length
    return TensorSplit(sparse, dense, packed)


def dgc(
    comm: MPI.Intracomm,
    bucket: Bucket,
    density: float = 0.001,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    mask: bool = True,
    clip: float | None = None,
    weight_decay: float = 0.0,
    warmup: int = 0,
    stages: Sequence[float] = STAGES,
    smallest: int = MIN_ELEMENTS,
    exact: bool = False,
    exchange: str = "auto",
) -> ResidualTransform:
    """Exchange gradients of a bucket, float32; the step is their mean, with momentum in it.

    ``warmup`` steps are divided over ``stages``.  ``clip`` is C, the bound of the norm of the mean gradient;
    ``weight_decay`` λ applies to tensors whose flag says so.  With ``exact`` a message names exactly the largest
    elements (:func:`~hpccomm.topk`).  ``exchange`` as in :func:`~hpccomm.feedback`.  ``density=1, mask=False`` is
    momentum SGD.  If any rank's gradient is not finite, no rank steps, and only ``steps`` and ``skipped`` change in the
    state.
    """
    comm = as_communicator("dgc", comm)
    check_arguments(density, stages, momentum, warmup, weight_decay, clip, smallest)
    places = split_tensors(bucket, smallest)
    limit = None if clip is None else clip * comm.size**0.5
    ball = partial(heavy_ball, momentum=momentum, nesterov=nesterov)

    @cache
    def messages_of(d: float) -> FeedbackTransform:
        how: Any = {"nesterov": nesterov, "mask": mask, "parts": places.packed_slices, "exchange": exchange}
        return feedback(topk(d, exact=exact), comm, momentum, **how)

    @cache
    def pays(d: float, on_host: bool) -> bool:
        n = places.packed_slices[-1].stop if places.packed_slices else 0
        return is_worth_messages(comm, n, d, exchange if on_host else ALLGATHER)

    def density_at(step: int) -> float:
        return stages[step * len(stages) // warmup] if step < warmup else density

    def init(weights: Vector) -> DgcState:
        check_bucket_vectors("dgc", bucket, weights, weights)
        check_flat(weights, "dgc", True)
        sparse = messages_of(density).init(pack_slices(weights, places.sparse))
        decay = np.zeros_like(weights) if weight_decay else None
        return DgcState(sparse, np.zeros_like(pack_slices(weights, places.dense)), decay, 0, 0, ExchangeReport(), True)

    def update(gradient: Vector, state: DgcState, weights: Vector) -> tuple[Vector, DgcState]:
        check_bucket_vectors("dgc", bucket, gradient, weights)
        norm = global_norm(gradient, None)
        fine = math.isfinite(norm)
        d = density_at(state.steps)
        dense_step = (d == 1 and not mask) or not pays(d, isinstance(gradient, np.ndarray))
        if fine and limit is not None and norm > limit:
            gradient = gradient * np.float32(limit / norm)
        large, small = pack_slices(gradient, places.sparse), pack_slices(gradient, places.dense)
        if dense_step:
            asked = ExchangeReport(0, 0.0, allreduce_bytes(1, comm.size))
            state = state._replace(report=state.report.add(asked))
            fine = all_ranks_true(comm, fine)
        else:
            large, sparse = messages_of(d).exchange(large, state.sparse, fine)
            fine = sparse.skipped == state.sparse.skipped
            state = state._replace(sparse=sparse if fine else state.sparse._replace(report=sparse.report))
        if not fine:
            return np.zeros_like(gradient), state.skip()
        state = state._replace(steps=state.steps + 1, dense_step=dense_step)
        if dense_step:
            large, sparse = accumulate_all(large, state.sparse, momentum, nesterov)
            large, small, state = average_dense(comm, ball, large, small, state._replace(sparse=sparse))
        else:
            _, small, state = average_dense(comm, ball, large[:0], small, state)
        step = np.empty_like(gradient)
        unpack_slices(large, step, places.sparse)
        unpack_slices(small, step, places.dense)
        if state.decay is None:
            return step, state
        decay, more = ball(decay_term(weights, weight_decay, bucket), state.decay)
        return step + more, state._replace(decay=decay)

    def flush_state(state: DgcState) -> tuple[Vector, DgcState]:
        total, sparse = messages_of(density).flush_state(state.sparse)
        whole = np.zeros_like(total, shape=(bucket.size,))
        unpack_slices(total, whole, places.sparse)
        return whole, state._replace(sparse=sparse)

    return ResidualTransform.of(init, update, flush_state, bucket, comm=comm, needs_whole="dgc")


def check_bucket_vectors(who: str, bucket: Bucket, gradient: Vector, weights: Vector) -> None:
    """Raise unless both are alike, and vectors of the bucket."""
    require(weights.shape == (bucket.size,), f"{who}: weights of shape {weights.shape}: pass the bucket's vector")


def check_arguments(
    density: float,
    stages: Sequence[float],
    momentum: float,
    warmup: int,
    weight_decay: float,
    clip: float | None,
    smallest: int,
) -> None:
    """Raise for numbers outside their ranges, and for a warm-up that has no densities."""
    require(isinstance(stages, Sequence), f"dgc: stages is {stages!r}: pass densities, such as (0.25, 0.0625)")
    for each in (density, *stages):
        check_density(each, "dgc")
    check_decay("dgc: momentum", momentum)
    check_count("dgc: warmup", warmup, 0)
    require(not warmup or len(stages) > 0, "dgc: stages is empty: pass the densities of the warm-up, or warmup=0")
    check_not_negative("dgc: weight_decay", weight_decay)
    check_not_negative("dgc: smallest", smallest)
    if clip is not None:
        check_limit("dgc: clip", clip, "pass a positive norm")


def average_dense(
    comm: MPI.Intracomm,
    ball: Callable[[Vector, Vector], tuple[Vector, Vector]],
    large: Vector,
    small: Vector,
    state: DgcState,
) -> tuple[Vector, Vector, DgcState]:
    """Average the tensors, then apply momentum to the small ones."""
    began = time.perf_counter()
    total, nbytes = allreduce_mean(comm, np.concatenate([large, small]))
    report = state.report.add(ExchangeReport(1, time.perf_counter() - began, nbytes))
    dense, small = ball(total[large.size :], state.dense)
    return total[: large.size], small, state._replace(dense=dense, report=report)


def decay_term(weights: Vector, rate: float, bucket: Bucket) -> Vector:
    """λ · weights; 0 in tensors that do not decay."""
    pull: Vector = weights * np.float32(rate)
    for slot in bucket.table:
        if not slot.decay:
            pull[slot.offset : slot.offset + slot.length] = 0
    return pull


def pack_slices(vector: Vector, places: Sequence[slice]) -> Vector:
    """These slices one after the other, as a new vector."""
    return np.concatenate([vector[:0], *(vector[place] for place in places)])


def unpack_slices(vector: Vector, out: Vector, places: Sequence[slice]) -> None:
    """Write the parts of ``vector`` back to their slices of ``out``."""
    first = 0
    for place in places:
        out[place] = vector[first : first + place.stop - place.start]
        first += place.stop - place.start
