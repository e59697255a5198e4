"""Local steps: every rank steps alone for a block, then all ranks take one outer step along the mean update.

*p ranks; a block is τ (``period``) inner steps; W_g is the model at the start of a block, the same bits on all ranks;
rank i holds w_i at the end of the block and has the weight a_i.*  The *outer* transform receives Σ a_i (W_g − w_i) as a
gradient and begins with an exchange; its step from W_g gives the start of the next block.  A rank sends
2(p−1)/p · n/τ elements a step, and 40 bytes a block to agree on weights and on finite values.

=================  ===========================================  =======================================
method             outer                                        source
=================  ===========================================  =======================================
local SGD          mean                                         Stich, ICLR 2019
post-local SGD     mean, after synchronous steps                Lin, Stich, Patel & Jaggi, ICLR 2020
SlowMo             mean, momentum in units of the inner rate    Wang, Tantia, Ballas & Rabbat, ICLR 2020
DiLoCo             mean, Nesterov's momentum                    Douillard et al., 2023
BMUF               mean, block momentum                         :mod:`hpccomm.algorithms.blockwise_filtering`
=================  ===========================================  =======================================

Inside a block divide a gradient by this rank's own samples, not by those of all ranks.  Running statistics of
normalisations are not exchanged: average them with ``hpccomm.allreduce(x, "mean")``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.exact_steps import exact_step
from hpccomm.algorithms.exchange import check_replicas, mean
from hpccomm.algorithms.reports import ExchangeReport, report
from hpccomm.algorithms.states import GroupSize, InBlock, RankChange, map_leaves, skip_step, snapshot
from hpccomm.algorithms.transforms import (
    Schedule,
    Transform,
    Vector,
    chain,
    check_decay,
    check_positive,
    check_rate,
    check_transform,
    descend,
    momentum,
    require,
    restart,
    scale,
    scale_by_schedule,
)
from hpccomm.algorithms.trees import export_for_trees, finish_for_trees
from hpccomm.arrays import narrow, widen
from hpccomm.errors import MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI

Weighting = Literal["workers", "batches"] | Callable[[], float]
"""The weight of a rank's update: equal, its batches in the block, or the increase of a running total of samples."""


class LocalStatePolicy(NamedTuple):
    """A policy: ``settle(began, ended, start, memory, steps) -> (inner, memory)``; the memory is its own state.

    ``steps`` is the largest number of steps that a rank took in the block, the same on all ranks.
    """

    init: Callable[[Vector], Any]
    settle: Callable[[Any, Any, Vector, Any, int], tuple[Any, Any]]


def keep() -> LocalStatePolicy:
    """Every rank keeps its own state (DiLoCo)."""
    return LocalStatePolicy(lambda weights: (), lambda began, ended, start, memory, steps: (ended, memory))


def reset(inner: Transform) -> LocalStatePolicy:
    """Every rank starts with a new state, with zero momentum."""
    return LocalStatePolicy(lambda weights: (), lambda began, ended, start, memory, steps: (inner.init(start), memory))


def average(comm: MPI.Intracomm) -> LocalStatePolicy:
    """All floating vectors in the state become their means over the ranks; counters stay."""

    def settle(began: Any, ended: Any, start: Vector, memory: Any, steps: int) -> tuple[Any, Any]:
        return map_leaves(lambda path, leaf: average_leaf(leaf, comm), ended), memory

    return LocalStatePolicy(lambda weights: (), settle)


def average_leaf(leaf: Any, comm: MPI.Intracomm) -> Any:
    """The mean of a floating array over the ranks; anything else as it is."""
    if not isinstance(leaf, np.ndarray) or leaf.dtype.kind != "f" or comm.size == 1:
        return leaf
    send = widen(leaf)
    total = np.empty_like(send)
    comm.Allreduce(send, total)
    return narrow(total / comm.size, leaf.dtype)


class PeriodicState(NamedTuple):
    """The state of one rank; it shares no memory with the model."""

    updates: int
    """Steps since ``init``, those of the warm-up included."""
    steps: InBlock
    """Steps since the block began."""
    batches: int
    """As ``steps``, without those that this rank took with a zero gradient because others had batches left."""
    weight_at_start: float
    """The running total that ``weight_by`` returned when the block began."""
    start: Vector
    """W_g: the model that the block began from."""
    inner_start: Annotated[Any, RankChange.LOCAL]
    """A copy of the inner state that the block began from; between blocks, of the last one."""
    inner: Annotated[Any, RankChange.LOCAL]
    outer: Any
    memory: Any
    """The memory of the policy for the inner state."""
    mean_state: Any
    """State of the exchange of synchronous steps."""
    abandoned: int
    """Blocks, and synchronous steps, that were discarded because a rank's model, or gradient, was not finite."""
    report: ExchangeReport
    ranks: GroupSize
    """How many ranks average their models."""


class PeriodicTransform(Transform):
    """A transform whose ranks end their blocks together; it has two more functions.

    ``finish(state, weights) -> (step, state)`` (collective): call it once, when this rank has no more batches.  It
    takes part in the remaining steps of the other ranks and in the last exchange.
    ``export(state) -> vector``: the global model after the last exchange, in the dtype of the reduction;
    ``export(state, weights)`` gives it in the form and dtype of the weights.
    """

    finish: Callable[[Any, Any], tuple[Any, Any]]
    export: Callable[..., Any]


def periodic_transform(
    comm: MPI.Intracomm,
    period: int,
    inner: Transform,
    outer: Transform,
    *,
    local_state: LocalStatePolicy | None = None,
    weight_by: Weighting = "workers",
    warmup: int = 0,
    group: MPI.Intracomm | None = None,
    closing: Callable[[Vector, Any], tuple[Vector, Any]] | None = None,
    export: Callable[[PeriodicState], Vector] = lambda state: state.start,
    check: bool = False,
) -> PeriodicTransform:
    """``period`` inner steps on every rank alone, then one outer step of all ranks of ``comm``.

    ``outer`` receives W_g − w_i times a factor that makes its mean over the ranks the weighted mean: 1 where all
    weights are equal.  The first ``warmup`` steps are synchronous: ``inner`` receives the mean gradient over all ranks;
    after them ``outer`` and the first block begin from the model that they reached.  ``group`` are the ranks that
    exchange gradients in every inner step and hold the same model; each rank of ``comm`` is in one group.  Where
    members of a group have run out of batches, the gradients of the others are scaled up to the length of the whole
    group's.  ``closing(weights, inner)`` applies pending updates before the block
    ends.  ``check`` compares the ranks' bits after every outer step.  A single rank or group takes no outer step.

    Ranks may have different numbers of batches, if each calls ``finish`` when it has none left.  A rank without a batch
    in a block has weight 0.  If any rank's model is not finite at the end of a block, all ranks return to the start of
    the block (``abandoned`` counts it).

    Start all ranks from the same weights.  Adding the step that ends a block to the weights gives the same bits on all
    ranks, see :mod:`hpccomm.algorithms.exact_steps`; copy ``state.start`` if another transform follows, or in JAX.
    Where a run goes on with one rank, or one group, ``outer`` begins anew after each block, and its schedules go on.
    """
    comm = as_communicator("periodic", comm)
    require(isinstance(period, int) and period >= 1, f"periodic: period is {period}: pass an integer, 1 or more")
    whole = isinstance(warmup, int | np.integer)
    require(whole and warmup >= 0, f"periodic: warmup is {warmup}: pass 0 or more synchronous steps")
    check_transform("periodic: inner", inner)
    require(
        callable(weight_by) or weight_by in ("workers", "batches"),
        f"periodic: weight_by is {weight_by!r}: pass 'workers', 'batches', or a function that returns this rank's "
        "samples so far",
    )
    policy = local_state or keep()
    blocks = PeriodicSteps(comm, period, inner, outer, policy, weight_by, warmup, group, closing, check)
    made = PeriodicTransform(blocks.init, blocks.update, comm=comm, parts=[inner])
    made.finish = finish_for_trees(blocks.finish, made.layouts)
    made.export = export_for_trees(lambda state: state.start if state.updates < warmup else export(state), made.layouts)
    return made


class Agreement(NamedTuple):
    """The outcome of the exchange at the end of a block."""

    weight: float
    """The factor of this group's update; 0 where no rank moved."""
    has_movement: bool
    finite: bool
    is_finished: bool
    """Whether no rank has a batch left."""
    steps: int
    """The largest number of steps of a rank."""


@dataclass
class PeriodicSteps:
    """The arguments of :func:`periodic_transform`, and the functions of its transform."""

    comm: MPI.Intracomm
    period: int
    inner: Transform
    outer: Transform
    local: LocalStatePolicy
    weight_by: Weighting
    warmup: int
    group: MPI.Intracomm | None
    finish_pending: Callable[[Vector, Any], tuple[Vector, Any]] | None
    check: bool

    def __post_init__(self) -> None:
        self.mean = mean(self.comm)
        self.group_id = self.comm.rank if self.group is None else self.group.allgather(self.comm.rank)[0]
        self.is_alone = self.comm.size == (1 if self.group is None else self.group.size)
        self.has_groups = self.group is not None and not self.is_alone

    def init(self, weights: Vector) -> PeriodicState:
        """A block begins."""
        start, inner = widen(weights).copy(), self.inner.init(weights)
        joint = self.mean.init(weights) if self.warmup else ()
        return PeriodicState(
            updates=0,
            steps=0,
            batches=0,
            weight_at_start=self.count_samples(),
            start=start,
            inner_start=snapshot(inner),
            inner=inner,
            outer=self.outer.init(start),
            memory=self.local.init(weights),
            mean_state=joint,
            abandoned=0,
            report=ExchangeReport(),
            ranks=self.comm.size,
        )

    def update(self, gradient: Vector, state: PeriodicState, weights: Vector) -> tuple[Vector, PeriodicState]:
        """One step; the last one of a block ends it."""
        company = self.step_comm(state)
        alive, state = self.count_active(company, True, state)
        return self.step(gradient, state, weights, company, alive, batches=1)

    def finish(self, state: PeriodicState, weights: Vector) -> tuple[Vector, PeriodicState]:
        """Step with zero gradients until no rank has a batch left, then end the last block."""
        local = weights.copy()
        while (company := self.step_comm(state)) is not None:
            alive, state = self.count_active(company, False, state)
            if not alive:
                break
            step, state = self.step(np.zeros_like(local), state, local, company, alive, batches=0)
            local += step
        if state.updates < self.warmup:  # no block has begun whose samples count
            state = self.join_groups(state)._replace(weight_at_start=self.count_samples())
            local = narrow(state.start, weights.dtype) if self.has_groups else local
        finished = False
        while not finished:
            target, state, finished = self.end_block(local, state, last=True)
            local = narrow(target, weights.dtype)
        return exact_step(weights, local), state

    def step_comm(self, state: PeriodicState) -> MPI.Intracomm | None:
        """The ranks that step together with this one."""
        if state.updates < self.warmup and self.comm.size > 1:
            return self.comm
        return self.group if self.group is not None and self.group.size > 1 else None

    def count_active(self, comm: MPI.Intracomm | None, here: bool, state: PeriodicState) -> tuple[int, PeriodicState]:
        """How many of the ranks that step together have a batch."""
        if comm is None:
            return 1, state
        found, state = self.allgather_rows(comm, np.array([float(here)]), state)
        return int(found.sum()), state

    def step(
        self,
        gradient: Vector,
        state: PeriodicState,
        weights: Vector,
        company: MPI.Intracomm | None,
        alive: int,
        batches: int,
    ) -> tuple[Vector, PeriodicState]:
        """An inner step, and the end of the block if it is one."""
        warm, joint = state.updates < self.warmup, state.mean_state
        if company is not None and alive != company.size:
            gradient = narrow(gradient * (company.size / alive), gradient.dtype)
        if warm and company is not None:
            gradient, joint = self.mean.update(gradient, joint, weights)
        if warm and not np.isfinite(gradient).all():  # of the mean: all ranks see it
            state = state._replace(abandoned=state.abandoned + 1, inner=skip_step(state.inner))
            return self.end_warm_step(np.zeros_like(weights), state, joint, weights)
        if not warm and not state.steps and not self.is_alone:
            state = state._replace(inner_start=snapshot(state.inner))
        step, inner = self.inner.update(gradient, state.inner, weights)
        state = state._replace(inner=inner)
        if warm:
            return self.end_warm_step(step, state, joint, weights)
        state = state._replace(updates=state.updates + 1, steps=state.steps + 1, batches=state.batches + batches)
        if state.steps < self.period:
            return step, state
        target, state, _ = self.end_block(weights + step, state, last=False)
        return exact_step(weights, target), state

    def end_warm_step(
        self, step: Vector, state: PeriodicState, joint: Any, weights: Vector
    ) -> tuple[Vector, PeriodicState]:
        """The step and the state of a synchronous step; after the last one the first block begins."""
        state = state._replace(updates=state.updates + 1, mean_state=joint, start=widen(weights + step))
        if state.updates < self.warmup:
            return step, state
        state = self.join_groups(state)
        after = state._replace(outer=self.outer.init(state.start), weight_at_start=self.count_samples())
        return (exact_step(weights, state.start) if self.has_groups else step), after

    def join_groups(self, state: PeriodicState) -> PeriodicState:
        """All ranks go on from rank 0's model: the exchanges of groups of different sizes give different models."""
        if not self.has_groups:
            return state
        began, start = time.perf_counter(), np.ascontiguousarray(state.start)
        self.comm.Bcast(start, 0)
        cost = ExchangeReport(1, time.perf_counter() - began, start.nbytes)
        return state._replace(start=start, report=state.report.add(cost))

    def end_block(self, local: Vector, state: PeriodicState, last: bool) -> tuple[Vector, PeriodicState, bool]:
        """The start of the next block, the state, and whether no rank has a batch left."""
        if self.finish_pending is not None and state.steps:
            local, inner = self.finish_pending(local, state.inner)
            state = state._replace(inner=inner)
        if self.is_alone:
            start = widen(local)
            # should more ranks go on, the outer transform begins from here; what it has cost so far counts
            spent = state.report.add(report(state.outer).cost)
            outer = restart(self.outer, state.outer, start, int(state.steps > 0))
            next_block = state._replace(steps=0, batches=0, weight_at_start=self.count_samples())
            return local, next_block._replace(start=start, outer=outer, report=spent), last
        with np.errstate(invalid="ignore", over="ignore"):
            behind = widen(narrow(state.start, local.dtype)) - widen(local)  # as the block began, in its dtype
        counted = self.count_samples()
        agreed, state = self.agree_on_block(behind, counted, state, last)
        next_block = state._replace(steps=0, batches=0, weight_at_start=counted)
        if not agreed.finite:
            began = state.inner_start if state.steps else state.inner
            back = next_block._replace(inner=began, abandoned=state.abandoned + 1)
            return state.start, back, agreed.is_finished
        if not agreed.has_movement:
            return state.start, next_block, agreed.is_finished
        if agreed.weight != 1:
            behind *= agreed.weight
        step, outer = self.outer.update(behind, state.outer, state.start)
        start = state.start + step
        began = state.inner_start if state.steps else state.inner
        inner, memory = self.local.settle(began, state.inner, narrow(start, local.dtype), state.memory, agreed.steps)
        if self.check:
            check_replicas(self.comm, start)
        next_block = next_block._replace(start=start, inner=inner, outer=outer, memory=memory)
        return start, next_block, agreed.is_finished

    def agree_on_block(
        self, behind: Vector, counted: float, state: PeriodicState, last: bool
    ) -> tuple[Agreement, PeriodicState]:
        """Agree on the weights, on whether all models are finite, and on whether any rank has a batch left."""
        finite = float(np.isfinite(behind).all())
        mine = [self.weight(counted, state), finite, float(last), float(self.group_id), float(state.steps)]
        rows, state = self.allgather_rows(self.comm, np.array(mine), state)
        self.check_weights(rows[:, 0])
        self.check_same_period(rows[:, 4], rows[:, 2] == 0)
        total, groups = rows[:, 0].sum(), np.unique(rows[:, 3]).size
        share = rows[rows[:, 3] == self.group_id, 0].sum() * groups / total if total > 0 else 0.0
        agreed = Agreement(
            float(share), bool(total > 0), bool(rows[:, 1].all()), bool(rows[:, 2].all()), int(rows[:, 4].max())
        )
        return agreed, state

    def check_same_period(self, steps: Vector, goes_on: npt.NDArray[np.bool_]) -> None:
        """Raise on all ranks unless those that go on have ended blocks of one length."""
        ranks = np.flatnonzero(goes_on)
        odd = ranks[steps[ranks] != steps[ranks[:1]]]
        if odd.size:
            first, other = ranks[0], odd[0]
            raise MismatchError(
                f"rank {self.comm.rank}: a block has {steps[first]:.0f} steps on rank {first}, {steps[other]:.0f} on "
                f"rank {other}: pass the same period on all ranks"
            )

    def check_weights(self, weights: Vector) -> None:
        """Raise on all ranks where a running total of samples fell, or is not finite."""
        odd = np.flatnonzero(~((weights >= 0) & (weights < np.inf)))
        if odd.size:
            raise MismatchError(
                f"rank {self.comm.rank}: weight_by counts {weights[odd[0]]:g} samples in this block on rank {odd[0]}: "
                "let it return a finite total of this rank's samples that never falls, and that goes on from "
                "state.weight_at_start after a restart"
            )

    def count_samples(self) -> float:
        """The running total of this rank's samples, where ``weight_by`` counts them."""
        return float(self.weight_by()) if callable(self.weight_by) else 0.0

    def weight(self, counted: float, state: PeriodicState) -> float:
        """The weight of this rank's update."""
        if callable(self.weight_by):
            return counted - state.weight_at_start
        return float(state.batches if self.weight_by == "batches" else state.batches > 0)

    def allgather_rows(
        self, comm: MPI.Intracomm, mine: npt.NDArray[np.float64], state: PeriodicState
    ) -> tuple[npt.NDArray[np.float64], PeriodicState]:
        """The numbers of all ranks, (p, k)."""
        began = time.perf_counter()
        rows = np.empty((comm.size, mine.size))
        comm.Allgather(mine, rows)
        cost = ExchangeReport(1, time.perf_counter() - began, mine.nbytes * (comm.size - 1))
        return rows, state._replace(report=state.report.add(cost))


def local_sgd(
    comm: MPI.Intracomm, inner: Transform, period: int, *, weight_by: Weighting = "workers", check: bool = False
) -> PeriodicTransform:
    """Average the models every ``period`` steps (Stich, ICLR 2019, algorithm 1; model averaging, FedAvg)."""
    return periodic_transform(comm, period, inner, chain(mean(comm), scale(-1)), weight_by=weight_by, check=check)


def post_local_sgd(
    comm: MPI.Intracomm, inner: Transform, period: int, after: int, *, check: bool = False
) -> PeriodicTransform:
    """Synchronous steps for ``after`` updates, then local SGD (Lin et al., ICLR 2020, section 3)."""
    return periodic_transform(comm, period, inner, chain(mean(comm), scale(-1)), warmup=after, check=check)


def slowmo(
    comm: MPI.Intracomm,
    inner: Transform,
    lr: float | Schedule,
    period: int = 48,
    *,
    beta: float = 0.5,
    slow_lr: float = 1.0,
    warmup: int = 0,
    check: bool = False,
) -> PeriodicTransform:
    """Slow momentum (Wang et al., ICLR 2020, algorithm 1): u ← βu + (W_g − w̄)/γ, W_g ← W_g − αγu.

    ``lr`` is γ, the rate of ``inner``: a number, or a function of the update's count, whose first value other than 0 in
    the block is used; a block in which it is 0 throughout only decays the momentum.  Where γ is constant this is BMUF
    with block momentum β and rate α.
    """
    check_decay("slowmo: beta", beta)
    check_rate("slowmo: lr", lr)
    require(callable(lr) or lr > 0, f"slowmo: lr is {lr}: pass the positive rate of inner")
    check_positive("slowmo: slow_lr", slow_lr)

    def gamma(block: int) -> float:
        first = warmup + block * period
        rates = (float(lr(first + step)) for step in range(period)) if callable(lr) else iter([float(lr)])
        return next((rate for rate in rates if rate), 0.0)

    outer = chain(
        mean(comm),
        scale_by_schedule(lambda block: 1 / gamma(block) if gamma(block) else 0.0),
        momentum(beta),
        scale_by_schedule(lambda block: -slow_lr * gamma(block)),
    )
    return periodic_transform(comm, period, inner, outer, warmup=warmup, check=check)


def diloco(
    comm: MPI.Intracomm,
    inner: Transform,
    period: int = 500,
    *,
    lr: float | Schedule = 0.7,
    beta: float = 0.9,
    check: bool = False,
) -> PeriodicTransform:
    """Nesterov's momentum on the updates of a block, around AdamW (Douillard et al., 2023, algorithm 1).

    ``lr`` is the rate of the blocks: a number, or a function of the block's count.
    """
    check_decay("diloco: beta", beta)
    outer = chain(mean(comm), momentum(beta, nesterov=True), descend(lr))
    return periodic_transform(comm, period, inner, outer, check=check)
