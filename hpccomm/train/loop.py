"""Synchronous training: every rank takes its share of every global batch, and all ranks take the same step.

*p ranks; B samples in a global batch.*  A rank's gradient is the sum over its share times p/B, so that the
mean over the ranks is the mean over the batch, however unevenly p divides it.  The batches follow from the
seed alone: any number of ranks trains the same model, to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.algorithms.exchange import check_replicas, spent
from hpccomm.algorithms.periodic import Periodic
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
    alone: bool = False
    """Each rank divides its gradient by its own samples, as methods with blocks of local steps want it."""


class Training:
    """One model in training: its weights, the method's state, and what a step needs."""

    def __init__(
        self, comm: MPI.Intracomm, data: Dataset, network: Network, method: Transform, settings: Settings
    ) -> None:
        self.comm, self.data, self.network, self.method, self.settings = comm, data, network, method, settings
        tensors = initial(network.shapes, settings.seed)
        self.bucket = bucket = Bucket(tensors)
        self.weights = bucket.flatten(tensors)
        comm.Bcast(self.weights, 0)
        self.gradient = np.empty_like(self.weights)
        self.tensors, self.gradients = bucket.views(self.weights), bucket.views(self.gradient)
        self.state = method.init(self.weights)

    def step(self, batch: npt.NDArray[np.int64]) -> float:
        """One step of all ranks on a global batch; returns the sum of the losses of this rank's share."""
        mine = np.array_split(batch, self.comm.size)[self.comm.rank]
        loss = self.network.learn(self.tensors, self.data.inputs[mine], self.data.targets[mine], self.gradients)
        self.gradient *= 1 / max(1, len(mine)) if self.settings.alone else self.comm.size / len(batch)
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
        totals = np.array(
            [loss, count_right(self.comm, self.data, self.network, self.model), seconds - talking, talking]
        )
        self.comm.Allreduce(MPI.IN_PLACE, totals)
        shares = [len(self.data.targets), max(1, len(self.data.test_targets)), self.comm.size, self.comm.size]
        loss, accuracy, compute_s, communication_s = map(float, totals / shares)
        return Epoch(number, loss, accuracy, compute_s, communication_s, sent // max(1, steps))

    @property
    def model(self) -> dict[str, npt.NDArray[Any]]:
        """The tensors to test: where ranks step alone, those that they agreed on last."""
        if not isinstance(self.method, Periodic) or self.comm.size == 1:
            return self.tensors
        return self.bucket.views(np.ascontiguousarray(self.method.export(self.state), self.weights.dtype))

    def finish(self) -> None:
        """Where ranks have stepped alone: one last exchange; then all have the same weights."""
        if isinstance(self.method, Periodic):
            step, self.state = self.method.finish(self.state, self.weights)
            self.weights += step
            if self.comm.size > 1:
                self.weights[...] = self.method.export(self.state)


def count_right(comm: MPI.Intracomm, data: Dataset, network: Network, tensors: dict[str, npt.NDArray[Any]]) -> int:
    """Right predictions in this rank's share of the test samples."""
    inputs, targets = (np.array_split(each, comm.size)[comm.rank] for each in (data.test_inputs, data.test_targets))
    right = 0
    for first in range(0, len(targets), EVALUATE):
        scores = network.scores(tensors, inputs[first : first + EVALUATE])
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
    training.finish()
    check_replicas(comm, training.weights)
    return training.weights, epochs


class Servers(NamedTuple):
    """How a parameter server is run: the first ranks serve, the others work."""

    ranks: int = 1
    mode: Any = "bsp"
    """``"bsp"``, ``"asp"`` or ``("ssp", s)``."""


def train_by_servers(
    comm: MPI.Intracomm,
    data: Dataset,
    network: Network,
    optimizer: Transform,
    settings: Settings,
    servers: Servers,
    *,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[Vector, list[Epoch]]:
    """As :func:`train`, by a parameter server; of the epochs only the last one, with the whole run's times."""
    from hpccomm.algorithms.parameter_server import ParameterServer

    bucket = Bucket(network.shapes)
    weights = bucket.flatten(initial(network.shapes, settings.seed))
    server = ParameterServer(comm, weights, optimizer, servers=servers.ranks, mode=servers.mode)
    loss, seconds, talking, steps = 0.0, 0.0, 0.0, 0
    if server.serves:
        server.serve()
    else:
        gradient = np.empty_like(weights)
        place, workers = comm.rank - servers.ranks, comm.size - servers.ranks
        for number in range(1, settings.epochs + 1):
            loss = 0.0
            for batch in batches(len(data.targets), number, settings):
                mine = np.array_split(batch, workers)[place]
                began = time.perf_counter()
                tensors = bucket.views(server.pull())
                pulled = time.perf_counter()
                loss += network.learn(tensors, data.inputs[mine], data.targets[mine], bucket.views(gradient))
                gradient *= workers / len(batch)
                learnt = time.perf_counter()
                server.push(gradient)
                talking += pulled - began + time.perf_counter() - learnt
                seconds += learnt - pulled
                steps += 1
                if comm.rank == servers.ranks:
                    on_step()
        weights = server.leave()
    comm.Bcast(weights, servers.ranks)
    right = count_right(comm, data, network, bucket.views(weights))
    totals = np.array([loss, right, seconds, talking, weights.nbytes * (steps > 0)], np.float64)
    comm.Allreduce(MPI.IN_PLACE, totals)
    workers = comm.size - servers.ranks
    shares = [len(data.targets), max(1, len(data.test_targets)), workers, workers, workers]
    mean_loss, accuracy, compute_s, communication_s, sent = map(float, totals / shares)
    return weights, [Epoch(settings.epochs, mean_loss, accuracy, compute_s, communication_s, int(sent))]


def steps_in(samples: int, settings: Settings) -> int:
    """Steps of a whole run."""
    return settings.epochs * -(-samples // settings.batch_size)
