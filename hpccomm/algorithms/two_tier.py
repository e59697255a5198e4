"""Compressed gradients inside groups, block filtering between groups: GTC + BMUF (Ladkat et al., Interspeech 2019).

*p ranks in N groups of g; τ (``period``) steps a block.*  Every step a group exchanges compressed gradients and its
replicas stay equal.  Every τ steps the N group models pass the block filter of
:mod:`hpccomm.algorithms.blockwise_filtering`, with momentum 1 − 1/N: its participants are the groups, not the ranks.

At the end of a block member j of every group reduces slice j of the model with its peers, and the group gathers the
slices: the links between groups carry 2(N−1)/N · n/g elements for each rank, where one leader would carry
2(N−1)/N · n alone.  ``sliced_leaders=False`` is that published form; both give the same bits where the sums are exact.

A rank's residual (gradients not sent yet) belongs to weights that the filter then moves.  ``residual`` selects what
happens to it at the end of a block: ``"keep"`` (nothing is lost or counted twice), ``"flush"`` (exchanged densely
before the block ends), ``"zero"``, or ``("decay", c)``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpccomm.algorithms import local_steps
from hpccomm.algorithms.agreement import as_communicator, check_same_arguments
from hpccomm.algorithms.blockwise_filtering import FilterState, Nesterov, block_filter, lengths
from hpccomm.algorithms.exchange import allreduce_bytes
from hpccomm.algorithms.local_steps import LocalStatePolicy, PeriodicState, PeriodicTransform, Weighting
from hpccomm.algorithms.reports import ExchangeReport, norm_of
from hpccomm.algorithms.states import scale_unsent, unsent_leaves
from hpccomm.algorithms.transforms import Transform, Vector, can_flush, chain, flush_terms, require
from hpccomm.performance.units import format_count

if TYPE_CHECKING:
    from mpi4py import MPI

Residual = Literal["keep", "flush", "zero"] | tuple[Literal["decay"], float]


def hybrid(
    comm: MPI.Intracomm,
    exchange: Callable[[MPI.Intracomm], Transform],
    descent: Transform,
    group_size: int | None = None,
    *,
    period: int = 50,
    residual: Residual = "keep",
    sliced_leaders: bool = True,
    momentum: float | None = None,
    lr: float = 1.0,
    nesterov: Nesterov = False,
    weight_by: Weighting = "workers",
    local_state: Literal["keep", "reset"] = "keep",
    warmup: int = 0,
    check: bool = False,
) -> PeriodicTransform:
    """``exchange(group)`` and ``descent`` in every step, the block filter between the groups every ``period`` steps.

    ``exchange`` makes the transform by which the ranks of a group exchange gradients, ``descent`` turns its result into
    a step: ``hybrid(comm, lambda group: …, scale(-0.1))``.  Groups are ``group_size`` consecutive ranks, by default
    the nodes.  ``residual`` as above; a flush sums or averages as the exchange does.  ``momentum`` η (by default
    1 − 1/N), ``lr`` ζ and ``nesterov`` are :func:`~hpccomm.algorithms.blockwise_filtering.bmuf`'s, ``weight_by``,
    ``warmup`` and ``check`` those of :func:`~hpccomm.algorithms.local_steps.periodic_transform`; the weight of a group
    is the sum of its ranks' weights.  In the warm-up every group's exchange receives the mean gradient of all ranks;
    where groups differ in size their models may differ, and after its last step all go on from rank 0's.
    ``local_state="reset"`` starts every block with a new state of ``descent``.

    A single group takes no outer step.  End a run with ``finish`` and ``export`` of the returned transform; residuals
    that remain then are lost, see :func:`residual_norm`.
    """
    check_residual(residual)
    require(local_state in ("keep", "reset"), f"hybrid: local_state is {local_state!r}: pass 'keep' or 'reset'")
    comm = as_communicator("hybrid", comm)
    same: dict[str, Any] = {"group_size": group_size, "sliced_leaders": sliced_leaders, "period": period}
    check_same_arguments(comm, f"rank {comm.rank}: hybrid", **same, warmup=warmup, residual=residual)
    group = find_group(comm, group_size)
    groups = len(set(comm.allgather(group.allgather(comm.rank)[0])))
    require(
        callable(exchange),
        "hybrid: the exchange is no function: pass hpccomm.gtc, or lambda group: …, which is called with the group",
    )
    inside = exchange(group)
    require(
        residual != "flush" or can_flush(inside),
        "hybrid: residual is 'flush', but the exchange has no flush_state: pass one with error feedback, or 'keep'",
    )
    block = block_filter(1 - 1 / groups if momentum is None else momentum, lr, nesterov)
    inner = chain(inside, descent)
    return local_steps.periodic_transform(
        comm,
        period,
        Transform(lambda weights: check_state(residual, inner.init(weights)), inner.update, parts=[inner]),
        chain(mean_of_groups(comm, group, sliced_leaders), block),
        local_state=policy(residual, local_state, descent),
        weight_by=weight_by,
        warmup=warmup,
        group=group,
        closing=make_flush(inside, descent) if residual == "flush" else None,
        export=lambda state: global_model(state, groups),
        check=check,
    )


def global_model(state: PeriodicState, groups: int) -> Vector:
    """W of the filter; one group has none."""
    found = state.outer[-1]
    assert isinstance(found, FilterState)
    return found.model if groups > 1 else state.start


def find_group(comm: MPI.Intracomm, group_size: int | None) -> MPI.Intracomm:
    """This rank's group: its node, or ``group_size`` consecutive ranks (collective)."""
    if group_size is None:
        return comm.intra_node  # type: ignore[attr-defined,no-any-return]
    require(
        isinstance(group_size, int) and group_size >= 1 and comm.size % group_size == 0,
        f"rank {comm.rank}: hybrid: group_size {group_size} does not divide {format_count(comm.size, 'rank')}: pass a "
        "divisor, or None for the nodes",
    )
    part: Any = comm.Split(comm.rank // group_size, comm.rank)
    return part


def check_state(residual: Residual, inner: tuple[Any, Any]) -> tuple[Any, Any]:
    """The state of exchange and descent; raises where a policy finds no residual to act on."""
    require(
        residual == "keep" or bool(unsent_leaves(inner[0])),
        f"hybrid: residual is {residual!r}, but no field of the exchange's state is declared as Unsent: pass 'keep', "
        "or declare its type as hpccomm.algorithms.states.Unsent",
    )
    return inner


def residual_norm(state: PeriodicState) -> float:
    """The Euclidean norm of this rank's residual, in the exchange's units."""
    return math.hypot(*map(norm_of, unsent_leaves(state.inner[0])))


def make_flush(inside: Transform, descent: Transform) -> Callable[[Vector, Any], tuple[Vector, Any]]:
    """Let the exchange send all that it has not sent, and step on it."""

    def closing(local: Vector, inner: tuple[Any, Any]) -> tuple[Vector, tuple[Any, Any]]:
        gradient, exchanged = flush_terms(inside, inner[0], local)
        step, after = descent.update(gradient.astype(local.dtype, copy=False), inner[1], local)
        return local + step, (exchanged, after)

    return closing


def policy(residual: Residual, local_state: str, descent: Transform) -> LocalStatePolicy:
    """The policy for residuals and for the state of ``descent`` at the end of a block."""
    factor = {"keep": 1.0, "flush": 1.0, "zero": 0.0}[residual] if isinstance(residual, str) else residual[1]

    def settle(began: Any, ended: Any, start: Vector, memory: Any, steps: int) -> tuple[Any, Any]:
        inside = ended[0] if factor == 1 else scale_unsent(ended[0], factor)
        return (inside, descent.init(start) if local_state == "reset" else ended[1]), memory

    return LocalStatePolicy(lambda weights: (), settle)


def check_residual(residual: Residual) -> None:
    """Raise for an unknown policy."""
    decays = isinstance(residual, tuple) and len(residual) == 2 and residual[0] == "decay" and 0 <= residual[1] <= 1
    require(
        decays or residual in ("keep", "flush", "zero"),
        f"hybrid: residual is {residual!r}: pass 'keep', 'flush', 'zero', or ('decay', c) with c from 0 to 1",
    )


def mean_of_groups(comm: MPI.Intracomm, group: MPI.Intracomm, sliced: bool) -> Transform:
    """The mean over the groups of a vector that is the same on all ranks of each group (collective).

    The first s ranks of every group reduce a slice each, s being the size of the smallest group; the other ranks only
    receive.
    """
    slices = min(comm.allgather(group.size)) if sliced else 1
    peers = comm.Split(group.rank if group.rank < slices else slices, comm.rank)

    def update(behind: Vector, report: ExchangeReport, start: Vector) -> tuple[Vector, ExchangeReport]:
        began = time.perf_counter()
        counts = lengths(behind.size, slices) + [0] * (group.size - slices)
        first = sum(counts[: group.rank])
        mine = behind[first : first + counts[group.rank]]
        total = np.empty_like(mine)
        if group.rank < slices:
            peers.Allreduce(np.ascontiguousarray(mine), total)
            total /= peers.size
        whole = allgather_slices(group, total, behind, counts, slices)
        sent = allreduce_bytes(total.nbytes, peers.size) + total.nbytes * (group.size - 1)
        return whole, report.add(ExchangeReport(1, time.perf_counter() - began, sent))

    return Transform(lambda weights: ExchangeReport(), update)


def allgather_slices(group: MPI.Intracomm, mine: Vector, like: Vector, counts: list[int], slices: int) -> Vector:
    """All slices on all members of a group."""
    whole = np.empty_like(like)
    if slices == 1:
        if group.rank == 0:
            whole[...] = mine
        group.Bcast(whole, 0)
    else:
        group.Allgatherv(mine, [whole, counts])
    return whole
