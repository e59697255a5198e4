"""Synchronous training: every rank takes its share of every global batch, and all ranks take the same step.

*p ranks; B samples in a global batch.*  A rank's gradient is the sum over its share times p/B, so that the
mean over the ranks is the mean over the batch, however unevenly p divides it.  The batches follow from the
seed alone: any number of ranks trains the same model, to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.algorithms.exchange import check_replicas, spent
from hpccomm.algorithms.transforms import Transform, Vector
from hpccomm.buckets import Bucket
from hpccomm.train.datasets import Dataset
from hpccomm.train.networks import Network, initial

EVALUATE = 1024
"""Test samples that go through a network at once."""


class Epoch(NamedTuple):
    """One pass through the data."""

    epoch: int
    loss: float
    """Mean over the training samples, each as its step found it."""
    accuracy: float
    """Share of the test samples predicted right."""
    compute_s: float
    """Mean over the ranks, without evaluation."""
    communication_s: float
    """Mean over the ranks: the exchanges, waiting for slower ranks included."""
    wire_bytes: int
    """Sent by rank 0 in one step, the mean over the epoch."""


class Settings(NamedTuple):
    """What a run depends on beside data, network and method."""

    epochs: int
    batch_size: int
    """Over all ranks."""
    seed: int


class Training:
    """One model in training: its weights, the method's state, and what a step needs."""

    def __init__(
        self, comm: MPI.Intracomm, data: Dataset, network: Network, method: Transform, settings: Settings
    ) -> None:
        self.comm, self.data, self.network, self.method, self.settings = comm, data, network, method, settings
        tensors = initial(network.shapes, settings.seed)
        bucket = Bucket(tensors)
        self.weights = bucket.flatten(tensors)
        comm.Bcast(self.weights, 0)
        self.gradient = np.empty_like(self.weights)
        self.tensors, self.gradients = bucket.views(self.weights), bucket.views(self.gradient)
        self.state = method.init(self.weights)

    def step(self, batch: npt.NDArray[np.int64]) -> float:
        """One step of all ranks on a global batch; returns the sum of the losses of this rank's share."""
        mine = np.array_split(batch, self.comm.size)[self.comm.rank]
        loss = self.network.learn(self.tensors, self.data.inputs[mine], self.data.targets[mine], self.gradients)
        self.gradient *= self.comm.size / len(batch)
        step, self.state = self.method.update(self.gradient, self.state, self.weights)
        self.weights += step
        return loss

    def epoch(self, number: int, on_step: Callable[[], object]) -> Epoch:
        """All batches once, then the test samples."""
        before, began, loss, steps = spent(self.state), time.perf_counter(), 0.0, 0
        for batch in batches(len(self.data.targets), number, self.settings):
            loss += self.step(batch)
            steps += 1
            on_step()
        seconds, after = time.perf_counter() - began, spent(self.state)
        talking, sent = after.seconds - before.seconds, after.wire_bytes - before.wire_bytes
        totals = np.array([loss, self.count_right(), seconds - talking, talking])
        self.comm.Allreduce(MPI.IN_PLACE, totals)
        shares = [len(self.data.targets), max(1, len(self.data.test_targets)), self.comm.size, self.comm.size]
        loss, accuracy, compute_s, communication_s = map(float, totals / shares)
        return Epoch(number, loss, accuracy, compute_s, communication_s, sent // max(1, steps))

    def count_right(self) -> int:
        """Right predictions in this rank's share of the test samples."""
        inputs, targets = (
            np.array_split(each, self.comm.size)[self.comm.rank]
            for each in (self.data.test_inputs, self.data.test_targets)
        )
        right = 0
        for first in range(0, len(targets), EVALUATE):
            scores = self.network.scores(self.tensors, inputs[first : first + EVALUATE])
            right += int((scores.argmax(axis=1) == targets[first : first + EVALUATE]).sum())
        return right


def batches(samples: int, epoch: int, settings: Settings) -> Iterator[npt.NDArray[np.int64]]:
    """The global batches of an epoch, the same on all ranks; the last one may be shorter."""
    order = np.random.default_rng((settings.seed, epoch)).permutation(samples)
    for first in range(0, samples, settings.batch_size):
        yield order[first : first + settings.batch_size]


def train(
    comm: MPI.Intracomm,
    data: Dataset,
    network: Network,
    method: Transform,
    settings: Settings,
    *,
    on_step: Callable[[], object] = lambda: None,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
) -> tuple[Vector, list[Epoch]]:
    """Train, and return the weights as one vector, the same bits on all ranks, and what each epoch gave."""
    training, epochs = Training(comm, data, network, method, settings), []
    for number in range(1, settings.epochs + 1):
        epochs.append(training.epoch(number, on_step))
        on_epoch(epochs[-1])
    check_replicas(comm, training.weights)
    return training.weights, epochs


def steps_in(samples: int, settings: Settings) -> int:
    """Steps of a whole run."""
    return settings.epochs * -(-samples // settings.batch_size)
