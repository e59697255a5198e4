"""Blockwise model-update filtering (BMUF): average the models once a block, and filter the update of their mean.

*N participants, τ (``period``) steps a block, η block momentum, ζ block rate* (Chen & Huo, ICASSP 2016)::

    G(t) = mean_i w_i − W_g(t−1)          the update of the mean model
    Δ(t) = η Δ(t−1) + ζ G(t)
    W(t) = W(t−1) + Δ(t)                  the global model, to be tested and exported
    W_g(t) = W(t)                         classical block momentum
    W_g(t) = W(t) + η Δ(t)                Nesterov's: the next block starts ahead

Averaging divides every rank's progress by N, the filter multiplies it by ζ/(1−η): so η = 1 − 1/N, and the inner
learning rate stays that of one rank.  One allreduce of the model a block.

Implementations of BMUF differ (*mean G; the gain is the total movement of the model by one unit of G*)::

    nesterov=False                                        Δ = ηΔ + ζG,  W_g += Δ            ζ/(1−η)
    nesterov="paper"                                      W_g = W + ηΔ                      ζ/(1−η)
    nesterov="lookahead"                                  W_g += (1+η)Δ, no W (fairseq)     (1+η)ζ/(1−η)
    nesterov="lookahead", lr=(1−η)·N·ζ                    the same (CNTK, sums of updates)  (1+η)Nζ
    nesterov="lookahead", lr=(1−η)·ζ                      the same (PIKA)                   (1+η)ζ
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args

import numpy as np

from hpccomm.algorithms import local_steps
from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.exact_steps import exact_step
from hpccomm.algorithms.exchange import allreduce_bytes, mean
from hpccomm.algorithms.local_steps import LocalStatePolicy, PeriodicState, PeriodicTransform, Weighting
from hpccomm.algorithms.reports import ExchangeReport
from hpccomm.algorithms.states import RankChange
from hpccomm.algorithms.transforms import (
    AdamState,
    Schedule,
    Transform,
    Vector,
    adam,
    chain,
    check_choice,
    check_decay,
    check_number,
    check_transform,
    descend,
    require,
)

if TYPE_CHECKING:
    from mpi4py import MPI

Nesterov = Literal[False, "paper", "lookahead"]


class FilterState(NamedTuple):
    """The global model W and the velocity Δ."""

    model: Vector
    velocity: Vector


def block_filter(momentum: float, lr: float = 1.0, nesterov: Nesterov = False) -> Transform:
    """The filter as an outer transform: it receives −G and steps from W_g(t−1) to W_g(t); see the formulas above."""
    check_decay("bmuf: momentum", momentum)
    check_number("bmuf: lr", lr)
    require(lr > 0, f"bmuf: lr is {lr}: pass a positive block rate; 1 is usual")
    require(nesterov in get_args(Nesterov), f"bmuf: nesterov is {nesterov!r}: pass False, 'paper' or 'lookahead'")

    def init(weights: Vector) -> FilterState:
        return FilterState(weights.copy(), np.zeros_like(weights))

    def update(behind: Vector, state: FilterState, start: Vector) -> tuple[Vector, FilterState]:
        velocity = momentum * state.velocity - lr * behind
        if nesterov == "lookahead":
            ahead = start + (1 + momentum) * velocity
            return exact_step(start, ahead), FilterState(ahead, velocity)
        model = state.model + velocity
        ahead = model + momentum * velocity if nesterov else model
        return exact_step(start, ahead), FilterState(model, velocity)

    return Transform(init, update)


def bmuf(
    comm: MPI.Intracomm,
    inner: Transform,
    period: int = 50,
    *,
    momentum: float | None = None,
    lr: float = 1.0,
    nesterov: Nesterov = False,
    weight_by: Weighting = "workers",
    local_state: Literal["keep", "reset", "average"] | LocalStatePolicy = "keep",
    shard_state: bool = False,
    warmup: int = 0,
    check: bool = False,
) -> PeriodicTransform:
    """Blockwise model-update filtering around ``inner``, an optimizer that knows nothing of other ranks.

    ``momentum`` η, by default 1 − 1/p; ``lr`` ζ; ``nesterov`` and the rates of other implementations: see above.
    ``weight_by``, ``warmup``, ``check`` as in :func:`~hpccomm.algorithms.local_steps.periodic_transform`.
    ``local_state``: at the end of a block the inner state is kept, reset, averaged over the ranks, or set by a policy.
    ``shard_state`` divides W and Δ over the ranks: the bytes sent are the same, each rank holds 1/p of W and Δ.

    End a run with ``step, state = method.finish(state, weights)`` and ``model = method.export(state)``.  A single rank
    steps with ``inner`` only.

    >>> from mpi4py import MPI
    >>> from hpccomm.algorithms.transforms import scale
    >>> method = bmuf(MPI.COMM_SELF, scale(-0.5), period=2)
    >>> state = method.init(np.ones(1))
    >>> step, state = method.update(np.ones(1), state, np.ones(1))
    >>> step.tolist()
    [-0.5]

    Chen & Huo, *Scalable training of deep learning machines by incremental block training with intra-block
    parallel optimization and blockwise model-update filtering*, ICASSP 2016.
    """
    comm = as_communicator("bmuf", comm)
    eta = 1 - 1 / comm.size if momentum is None else momentum
    block = block_filter(eta, lr, nesterov)
    outer = shard_filter(comm, block) if shard_state else chain(mean(comm), block)
    return local_steps.periodic_transform(
        comm,
        period,
        inner,
        outer,
        local_state=policy(local_state, comm, inner),
        weight_by=weight_by,
        warmup=warmup,
        export=lambda state: global_model(state, comm),
        check=check,
    )


def global_model(state: PeriodicState, comm: MPI.Intracomm) -> Vector:
    """W of the filter (collective where it is sharded); a single rank has no filter."""
    if comm.size == 1:
        return state.start
    found = state.outer[-1]
    assert isinstance(found, FilterState)
    return gather_shards(found.model, state.start.size, comm) if isinstance(state.outer, ShardState) else found.model


class ShardState(NamedTuple):
    """The cost of the exchanges, and the filter's state for this rank's shard."""

    report: ExchangeReport
    filter_state: Annotated[FilterState, RankChange.SHARDED]


def shard_filter(comm: MPI.Intracomm, block: Transform) -> Transform:
    """Reduce-scatter −G, filter this rank's shard, allgather W_g."""

    def init(weights: Vector) -> ShardState:
        return ShardState(ExchangeReport(), block.init(weights[shard(weights.size, comm.size, comm.rank)]))

    def update(behind: Vector, state: ShardState, start: Vector) -> tuple[Vector, ShardState]:
        began, mine = time.perf_counter(), shard(start.size, comm.size, comm.rank)
        part = np.empty(mine.stop - mine.start, behind.dtype)
        comm.Reduce_scatter(behind, part, lengths(start.size, comm.size))
        step, after = block.update(part / comm.size, state.filter_state, start[mine])
        ahead = gather_shards(start[mine] + step, start.size, comm)
        cost = ExchangeReport(1, time.perf_counter() - began, allreduce_bytes(behind.nbytes, comm.size))
        return exact_step(start, ahead), ShardState(state.report.add(cost), after)

    return Transform(init, update)


def lengths(n: int, parts: int) -> list[int]:
    """The lengths of n elements divided into parts; the first parts get one more where they do not divide evenly."""
    return [n // parts + (part < n % parts) for part in range(parts)]


def shard(n: int, parts: int, place: int) -> slice:
    """The elements of the part at a place."""
    counts = lengths(n, parts)
    return slice(sum(counts[:place]), sum(counts[: place + 1]))


def gather_shards(part: Vector, n: int, comm: MPI.Intracomm) -> Vector:
    """All shards, on every rank."""
    whole = np.empty(n, part.dtype)
    comm.Allgatherv(part, [whole, lengths(n, comm.size)])
    return whole


def policy(local_state: str | LocalStatePolicy, comm: MPI.Intracomm, inner: Transform) -> LocalStatePolicy:
    """The policy by its name."""
    if isinstance(local_state, LocalStatePolicy):
        return local_state
    known: dict[str, Callable[[], LocalStatePolicy]] = {
        "keep": local_steps.keep,
        "reset": lambda: local_steps.reset(inner),
        "average": lambda: local_steps.average(comm),
    }
    check_transform("bmuf: inner", inner)
    check_choice("bmuf: local_state", local_state, tuple(known))
    return known[local_state]()


def bmuf_adam(
    comm: MPI.Intracomm,
    lr: float | Schedule,
    period: int = 50,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float | None = None,
    block_lr: float = 1.0,
    nesterov: Nesterov = False,
    warmup: int = 0,
    check: bool = False,
) -> PeriodicTransform:
    """BMUF around Adam, whose moments are extrapolated over the steps that the filter adds; ``lr`` is Adam's.

    Each block ends with an exchange of three vectors instead of one (Chen, Ding & Huo, ICASSP 2020).
    """
    comm = as_communicator("bmuf_adam", comm)
    eta = 1 - 1 / comm.size if momentum is None else momentum
    inner = chain(adam(b1, b2, eps), descend(lr))
    return bmuf(
        comm,
        inner,
        period,
        momentum=eta,
        lr=block_lr,
        nesterov=nesterov,
        local_state=extrapolation(comm, eta, b1, b2),
        warmup=warmup,
        check=check,
    )


def extrapolation(comm: MPI.Intracomm, eta: float, b1: float, b2: float) -> LocalStatePolicy:
    """Extrapolate Adam's moments; the memory is ρ(n) = η ρ(n−1) + τ, and the filter adds ηρ(n) virtual steps."""

    def settle(began: Any, ended: Any, start: Vector, rho: float, steps: int) -> tuple[Any, float]:
        rho = eta * rho + steps
        first, then = began[0], ended[0]
        mean_now, square_now = local_steps.average_leaf(then.mean, comm), local_steps.average_leaf(then.square, comm)
        extrapolated = AdamState(
            first.updates + steps + eta * rho,
            extrapolate(first.mean, mean_now, b1, steps, eta * rho),
            np.maximum(extrapolate(first.square, square_now, b2, steps, eta * rho), 0),
        )
        return (extrapolated, *ended[1:]), rho

    return LocalStatePolicy(lambda weights: 0.0, settle)


def extrapolate(began: Vector, ended: Vector, beta: float, steps: int, virtual: float) -> Vector:
    """A running mean that changed from ``began`` to ``ended`` in ``steps`` steps, after ``virtual`` more steps.

    The mean input of the steps follows from the two values; the virtual steps take the same mean input.
    """
    whole = 1 - beta**steps
    return began * (beta**steps * (beta**virtual - 1) / whole) + ended * ((1 - beta ** (steps + virtual)) / whole)
