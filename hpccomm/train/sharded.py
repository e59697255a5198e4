"""Training with sharded model states: MiCS, ZeRO and data parallelism in the same loop, on a deep network.

*N ranks, s micro-steps; B samples in a global batch.*  Each rank divides its share of every batch into s micro-batches.
The gradient of a micro-batch is the sum over its samples times N·s/B, so that the mean over ranks and micro-batches is
the mean over the batch, even where they are unequal.  The batches depend on the seed only, as in the other loops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.algorithms.exchange import allreduce_bytes, check_replicas
from hpccomm.algorithms.loss_scaling import LossScale
from hpccomm.algorithms.sharded.units import Hops, ShardedModel, adamw
from hpccomm.train.datasets import Dataset
from hpccomm.train.layered import LayeredNetwork
from hpccomm.train.loop import (
    Epoch,
    Keeper,
    OnStep,
    Settings,
    count_matches,
    epoch_of,
    ignore_step,
    train_batches,
    train_epochs,
)
from hpccomm.train.methods import METHODS

MAX_NORM = 1.0
"""The norm to which gradients are clipped."""
FIRST_SCALE, STEADY_STEPS = 1024.0, 200
"""The initial loss scale of float16, and the number of finite steps after which it doubles."""


class Job(NamedTuple):
    """How the model is sharded and trained."""

    division: str
    lr: float
    partition_size: int | None
    micro_steps: int
    dtype: str
    weight_code: str | None = None
    gradient_code: str | None = None
    secondary_shard: bool = False


def states_for(comm: Any, network: LayeredNetwork, settings: Settings, job: Job) -> ShardedModel:
    """The network's initial weights, sharded, with AdamW as the optimizer (collective)."""
    scale = LossScale(FIRST_SCALE, STEADY_STEPS) if job.dtype == "float16" else None
    states: ShardedModel = METHODS[job.division].make(
        comm,
        network.initial_weights(settings.seed),
        adamw(job.lr),
        job.partition_size,
        dtype=dtype_of(job.dtype),
        max_norm=MAX_NORM,
        loss_scale=scale,
        weight_code=job.weight_code,
        gradient_code=job.gradient_code,
        secondary_shard=job.secondary_shard,
    )
    return states


def dtype_of(name: str) -> npt.DTypeLike:
    """A NumPy type by its name, or bfloat16."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


class EpochProgress(NamedTuple):
    """The part of an epoch that is done, on this rank."""

    steps: int = 0
    loss: float = 0.0
    step_s: float = 0.0
    """Time of the steps, exchanges included."""
    boundary_s: float = 0.0
    """Time of the optimizer within that, exchanges excluded."""
    hops: Hops = Hops()
    """The exchanges, those of the evaluation excluded."""


class Training:
    """A sharded model in training."""

    def __init__(
        self,
        comm: Any,
        data: Dataset,
        network: LayeredNetwork,
        states: ShardedModel,
        settings: Settings,
        micro_steps: int,
    ) -> None:
        self.comm, self.data, self.network, self.states = comm, data, network, states
        self.settings, self.micro_steps = settings, micro_steps
        self.progress, self.last_epoch = EpochProgress(), EpochProgress()

    def step(self, batch: npt.NDArray[np.int64]) -> None:
        """One optimizer step of all ranks on a global batch."""
        began, before, loss = time.perf_counter(), self.states.hops, 0.0
        factor = self.states.loss_scale.value * self.comm.size * self.micro_steps / len(batch)
        parts = np.array_split(np.array_split(batch, self.comm.size)[self.comm.rank], self.micro_steps)
        for number, part in enumerate(parts, 1):
            given = self.data.inputs[part], self.data.targets[part]
            loss += self.network.learn(self.states, *given, factor, last=number == self.micro_steps)
        learnt, exchanged = time.perf_counter(), exchange_seconds(self.states.hops)
        self.states.boundary()
        stepped = time.perf_counter() - learnt - (exchange_seconds(self.states.hops) - exchanged)
        so_far, taken = self.progress, time.perf_counter() - began
        hops = Hops(*(a.add(subtract(b, c)) for a, b, c in zip(so_far.hops, self.states.hops, before, strict=True)))
        seconds = so_far.step_s + taken, so_far.boundary_s + stepped
        self.progress = EpochProgress(so_far.steps + 1, so_far.loss + loss, *seconds, hops)

    def epoch(self, number: int, on_step: OnStep, should_stop: Callable[[], bool]) -> Epoch | None:
        """Train on the remaining batches, then test; None where all ranks are told to stop before the last batch."""
        if not train_batches(self, number, on_step, should_stop):
            return None
        done, self.progress = self.progress, EpochProgress()
        self.last_epoch = done
        exchange_s = exchange_seconds(done.hops)
        sent = sum(hop.wire_bytes for hop in done.hops) // max(1, done.steps) if self.comm.rank == 0 else 0
        compute_s = done.step_s - exchange_s - done.boundary_s
        totals = np.array([done.loss, self.count_right(), compute_s, exchange_s, done.boundary_s, sent])
        self.comm.Allreduce(MPI.IN_PLACE, totals)
        dense = allreduce_bytes(4 * self.network.parameters, self.comm.size)
        return epoch_of(number, totals[:5], self.comm.size, self.data, int(totals[5]), dense)

    def count_right(self) -> int:
        """The number of correct predictions in this rank's share of the test samples; all ranks make as many calls."""
        inputs, targets = self.data.test_inputs, self.data.test_targets
        each = -(-len(targets) // self.comm.size)
        mine = slice(self.comm.rank * each, (self.comm.rank + 1) * each)
        return count_matches(partial(self.network.scores, self.states), inputs[mine], targets[mine], each)


def exchange_seconds(hops: Hops) -> float:
    """Seconds of the exchanges of all hops."""
    return sum(hop.seconds for hop in hops)


def subtract(after: Any, before: Any) -> Any:
    """The difference between two reports of an exchange."""
    return type(after)(*(a - b for a, b in zip(after, before, strict=True)))


def train(
    training: Training,
    *,
    on_step: OnStep = ignore_step,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
    keeper: Keeper | None = None,
) -> list[Epoch]:
    """Train; returns the epochs.  Raises unless all copies of the model end with the same bits.

    A ``keeper`` saves after every epoch, and when a rank is told to stop: then epochs are missing.
    """
    epochs = train_epochs(training, on_step, on_epoch, keeper)
    if len(epochs) == training.settings.epochs:
        check_replicas(training.states.groups.replication, training.states.master)
    return epochs


def account(training: Training) -> dict[str, Any]:
    """Memory, and bytes by hop in a mean step of the last epoch: the maximum over the ranks (collective)."""
    steps = max(1, training.last_epoch.steps)
    mine = [*training.states.memory, *(hop.wire_bytes / steps for hop in training.last_epoch.hops)]
    most = np.empty(len(mine))
    training.comm.Allreduce(np.array(mine, np.float64), most, MPI.MAX)
    names = [*training.states.memory._fields, *training.last_epoch.hops._fields]
    found = dict(zip(names, map(int, most), strict=True))
    return {
        "parameters": training.network.parameters,
        "memory": {name: found[name] for name in names[:3]},
        "hops": {name: found[name] for name in names[3:]},
    }
