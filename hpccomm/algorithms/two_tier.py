"""Compressed gradients inside groups, filtered blocks between them: GTC + BMUF (Ladkat et al., Interspeech 2019).

*p ranks in N groups of g; τ (``period``) steps a block.*  Every step a group exchanges compressed gradients and its
replicas stay equal.  Every τ steps the N group models go through the block filter of
:mod:`hpccomm.algorithms.blockwise_filtering`, whose momentum is 1 − 1/N: the groups take part, not the ranks.

At the end of a block member j of every group reduces slice j of the model with its peers, and the group gathers the
slices: the links between groups carry 2(N−1)/N · n/g elements for each rank, where one leader would carry
2(N−1)/N · n alone.  ``sliced_leaders=False`` is that published form; both give the same bits where the sums are exact.

What a rank has not sent yet, its residual, was measured at weights that the filter then moves.  ``residual`` says what
becomes of it: ``"keep"`` (nothing is lost or counted twice), ``"flush"`` (exchanged densely before the block's end is
measured), ``"zero"``, or ``("decay", c)``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hpccomm.algorithms.blockwise_filtering import FilterState, Nesterov, block_filter, lengths
from hpccomm.algorithms.checkpoints import leaves, map_leaves
from hpccomm.algorithms.exchange import ExchangeReport, allreduce_bytes
from hpccomm.algorithms.local_steps import (
    LocalStatePolicy,
    PeriodicState,
    PeriodicTransform,
    Weighting,
    periodic_transform,
)
from hpccomm.algorithms.transforms import Transform, Vector, chain, require

if TYPE_CHECKING:
    from mpi4py import MPI

Residual = Literal["keep", "flush", "zero"] | tuple[Literal["decay"], float]

RESIDUALS = ("residual", "backlog")
"""What an exchange calls the vector of what it has not sent yet, in its state."""


def hybrid(
    comm: MPI.Intracomm,
    exchange: Callable[[MPI.Intracomm], Transform],
    descent: Transform,
    group_size: int | None = None,
    *,
    period: int = 50,
    residual: Residual = "keep",
    reduce: Literal["sum", "mean"] = "sum",
    sliced_leaders: bool = True,
    momentum: float | None = None,
    lr: float = 1.0,
    nesterov: Nesterov = False,
    weight_by: Weighting = "workers",
    local_state: Literal["keep", "reset"] = "keep",
    check: bool = False,
) -> PeriodicTransform:
    """``exchange(group)`` and ``descent`` in every step, the block filter between the groups every ``period`` steps.

    ``exchange`` makes the transform that a group's ranks exchange gradients with, ``descent`` turns what they agree
    on into a step: ``hybrid(comm, lambda group: …, scale(-0.1))``.  Groups of ``group_size`` ranks follow one
    another; left out, a group is a node.  ``residual`` as above; ``reduce`` says whether the exchange sums or
    averages over the group, and a flush does the same.  ``momentum`` η (left out 1 − 1/N), ``lr`` ζ and ``nesterov``
    are :func:`~hpccomm.algorithms.blockwise_filtering.bmuf`'s, ``weight_by`` and ``check`` those of
    :func:`~hpccomm.algorithms.local_steps.periodic_transform`; a group weighs what its ranks weigh.
    ``local_state="reset"`` begins every block with a fresh ``descent``.

    One group never takes an outer step.  End a run with ``finish`` and ``export`` of what is returned; what ranks have
    not sent by then is lost, see :func:`residual_norm`.
    """
    check_residual(residual)
    require(reduce in ("sum", "mean"), f"hybrid: reduce is {reduce!r}: pass 'sum' or 'mean'")
    require(local_state in ("keep", "reset"), f"hybrid: local_state is {local_state!r}: pass 'keep' or 'reset'")
    group = find_group(comm, group_size)
    teams = len(set(comm.allgather(group.allgather(comm.rank)[0])))
    inside = exchange(group)
    kept = block_filter(1 - 1 / teams if momentum is None else momentum, lr, nesterov)
    return periodic_transform(
        comm,
        period,
        Transform(
            lambda weights: check_state(residual, inside.init(weights), descent, weights), group_update(inside, descent)
        ),
        chain(mean_of_groups(comm, group, sliced_leaders), kept),
        local_state=policy(residual, local_state, descent),
        weight_by=weight_by,
        group=group,
        closing=make_flush(group, descent, reduce) if residual == "flush" else None,
        export=lambda state: global_model(state, teams),
        check=check,
    )


def global_model(state: PeriodicState, teams: int) -> Vector:
    """W of the filter; one group has none."""
    kept = state.outer[-1]
    assert isinstance(kept, FilterState)
    return kept.model if teams > 1 else state.start


def find_group(comm: MPI.Intracomm, group_size: int | None) -> MPI.Intracomm:
    """This rank's group: its node, or ``group_size`` ranks that follow one another (collective)."""
    if group_size is None:
        found: Any = getattr(comm, "intra_node", None)
        require(found is not None, "hybrid: this communicator does not know its nodes: pass an hpccomm.Communicator")
        return found
    require(
        isinstance(group_size, int) and group_size >= 1 and comm.size % group_size == 0,
        f"rank {comm.rank}: hybrid: group_size {group_size} does not divide {comm.size} ranks: pass a divisor, or None "
        "for the nodes",
    )
    part: Any = comm.Split(comm.rank // group_size, comm.rank)
    return part


# Inside a group


def check_state(residual: Residual, inside: Any, descent: Transform, weights: Vector) -> tuple[Any, Any]:
    """The state of exchange and descent; raises where a policy finds no residual to act on."""
    found = any(is_residual(path) for path, _ in leaves(inside))
    require(
        residual == "keep" or found,
        f"hybrid: residual is {residual!r}, but the exchange's state has no field named "
        f"{' or '.join(RESIDUALS)}: pass 'keep'",
    )
    return inside, descent.init(weights)


def group_update(inside: Transform, descent: Transform) -> Callable[[Vector, Any, Vector], tuple[Vector, Any]]:
    """Exchange, then descend."""
    return chain(inside, descent).update


def is_residual(path: str) -> bool:
    """Whether a leaf is what an exchange has not sent yet."""
    return path.rpartition(".")[2] in RESIDUALS


def residual_norm(state: PeriodicState) -> float:
    """The Euclidean norm of what this rank has not sent, in the exchange's units."""
    squares = (np.square(leaf, dtype=np.float64).sum() for path, leaf in leaves(state.inner[0]) if is_residual(path))
    return math.sqrt(sum(map(float, squares)))


def make_flush(group: MPI.Intracomm, descent: Transform, reduce: str) -> Callable[[Vector, Any], tuple[Vector, Any]]:
    """Exchange all residuals densely, step on them, and go on without any."""

    def closing(local: Vector, inner: tuple[Any, Any]) -> tuple[Vector, tuple[Any, Any]]:
        pending = [leaf for path, leaf in leaves(inner[0]) if is_residual(path)]
        total = np.zeros_like(local)
        for each in pending:
            everyone = np.empty_like(each)
            group.Allreduce(each, everyone)
            total += everyone if reduce == "sum" else everyone / group.size
        step, after = descent.update(total, inner[1], local)
        return local + step, (scale_residuals(inner[0], 0.0), after)

    return closing


def scale_residuals(inside: Any, factor: float) -> Any:
    """The exchange's state with its residuals multiplied by a number."""
    return map_leaves(lambda path, leaf: leaf * leaf.dtype.type(factor) if is_residual(path) else leaf, inside)


def policy(residual: Residual, local_state: str, descent: Transform) -> LocalStatePolicy:
    """What becomes of residuals and of the descent's state when a block ends."""
    factor = {"keep": 1.0, "flush": 1.0, "zero": 0.0}[residual] if isinstance(residual, str) else residual[1]

    def settle(began: Any, ended: Any, start: Vector, memory: Any, steps: int) -> tuple[Any, Any]:
        inside = ended[0] if factor == 1 else scale_residuals(ended[0], factor)
        return (inside, descent.init(start) if local_state == "reset" else ended[1]), memory

    return LocalStatePolicy(lambda weights: (), settle)


def check_residual(residual: Residual) -> None:
    """Raise for a policy that is not known."""
    decays = isinstance(residual, tuple) and len(residual) == 2 and residual[0] == "decay" and 0 <= residual[1] <= 1
    require(
        decays or residual in ("keep", "flush", "zero"),
        f"hybrid: residual is {residual!r}: pass 'keep', 'flush', 'zero', or ('decay', c) with c from 0 to 1",
    )


# Between groups


def mean_of_groups(comm: MPI.Intracomm, group: MPI.Intracomm, sliced: bool) -> Transform:
    """The mean over the groups of what is the same on all ranks of each (collective).

    As many members as the smallest group has take a slice each; the members beyond receive only.
    """
    lanes = min(comm.allgather(group.size)) if sliced else 1
    peers = comm.Split(group.rank if group.rank < lanes else lanes, comm.rank)

    def update(behind: Vector, report: ExchangeReport, start: Vector) -> tuple[Vector, ExchangeReport]:
        began = time.perf_counter()
        counts = lengths(behind.size, lanes) + [0] * (group.size - lanes)
        first = sum(counts[: group.rank])
        mine = behind[first : first + counts[group.rank]]
        total = np.empty_like(mine)
        if group.rank < lanes:
            peers.Allreduce(np.ascontiguousarray(mine), total)
            total /= peers.size
        whole = allgather_slices(group, total, behind, counts, lanes)
        sent = allreduce_bytes(total.nbytes, peers.size) + total.nbytes * (group.size - 1)
        return whole, report.add(ExchangeReport(1, time.perf_counter() - began, sent))

    return Transform(lambda weights: ExchangeReport(), update)


def allgather_slices(group: MPI.Intracomm, mine: Vector, like: Vector, counts: list[int], lanes: int) -> Vector:
    """All slices on all members of a group."""
    whole = np.empty_like(like)
    if lanes == 1:
        if group.rank == 0:
            whole[...] = mine
        group.Bcast(whole, 0)
    else:
        group.Allgatherv(mine, [whole, counts])
    return whole
