"""Synchronous training: every rank computes on its share of each global batch, and all ranks take the same step.

*p ranks; B samples in a global batch.*  A rank's gradient is the sum over its share times p/B, so that the mean over
the ranks is the mean over the batch, even where p does not divide B.  The batches depend on the seed only: any number
of ranks trains the same model, up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.algorithms.exchange import allreduce_bytes, check_replicas
from hpccomm.algorithms.local_steps import PeriodicTransform
from hpccomm.algorithms.reports import ExchangeReport, report
from hpccomm.algorithms.transforms import Transform, Vector
from hpccomm.arrays import to_device_like
from hpccomm.buckets import Bucket
from hpccomm.train.datasets import Dataset
from hpccomm.train.networks import Network

EVALUATION_BATCH = 1024
"""Test samples that a network evaluates at once."""


OnStep = Callable[[int], object]
"""Called after each step of a rank with the number of steps that the run has made, those before a resume included."""


def ignore_step(done: int) -> None:
    """An :data:`OnStep`."""


class Epoch(NamedTuple):
    """One pass through the data; times are means over the ranks, without evaluation."""

    epoch: int
    loss: float
    """Mean over the training samples, each with the weights before its step."""
    accuracy: float
    """Share of the test samples predicted right."""
    compute_s: float
    """Time for gradients."""
    communication_s: float
    """Time for exchanges, waiting for slower ranks included."""
    step_s: float
    """Time for the rest of the method, compression included, and for adding the step."""
    wire_bytes: int
    """Bytes that rank 0 sends in a step, the mean over the epoch."""
    ratio: float | None
    """Bytes of a dense allreduce over those; None where nothing is sent."""


class Settings(NamedTuple):
    """Parameters of a run beside data, network and method."""

    epochs: int
    batch_size: int
    """Samples of a step over all ranks."""
    seed: int
    local_mean: bool = False
    """Each rank divides its gradient by the number of its own samples, as methods with local steps require."""
    library: Any = np
    """NumPy, or CuPy: then samples, weights and gradients are on its current device."""


class EpochProgress(NamedTuple):
    """The part of an epoch that is done, on this rank."""

    steps: int = 0
    loss: float = 0.0
    compute_s: float = 0.0
    step_s: float = 0.0
    """Time of the steps, exchanges included."""
    start_report: ExchangeReport = ExchangeReport()
    """The report at the start of the epoch."""


class Training:
    """A model in training: its weights, the method's state, and the buffers of a step."""

    def __init__(
        self, comm: MPI.Intracomm, data: Dataset, network: Network, method: Transform, settings: Settings
    ) -> None:
        self.comm, self.network, self.method, self.settings = comm, network, method, settings
        self.data, xp = data, settings.library
        tensors = network.initial_weights(settings.seed)
        self.bucket = bucket = Bucket(tensors)
        self.weights = bucket.flatten(tensors)
        comm.Bcast(self.weights, 0)
        if xp is not np:
            self.weights = xp.asarray(self.weights)
            self.data = data._replace(
                **{name: xp.asarray(each) for name, each in data._asdict().items() if isinstance(each, np.ndarray)}
            )
        self.gradient = xp.empty_like(self.weights)
        self.tensors, self.gradients = bucket.views(self.weights), bucket.views(self.gradient)
        self.state, self.progress = method.init(self.weights), EpochProgress()

    def step(self, batch: npt.NDArray[np.int64]) -> None:
        """One step of all ranks on a global batch."""
        mine, began = np.array_split(batch, self.comm.size)[self.comm.rank], time.perf_counter()
        loss, places = 0.0, self.settings.library.asarray(mine)
        if len(mine):
            inputs, targets = self.data.inputs[places], self.data.targets[places]
            loss = self.network.learn(self.tensors, inputs, targets, self.gradients)
        else:  # CuPy has no maximum of an empty array
            self.gradient[...] = 0
        self.gradient *= 1 / max(1, len(mine)) if self.settings.local_mean else self.comm.size / len(batch)
        learnt = time.perf_counter()
        step, self.state = self.method.update(self.gradient, self.state, self.weights)
        self.weights += step
        so_far = self.progress
        self.progress = so_far._replace(
            steps=so_far.steps + 1,
            loss=so_far.loss + loss,
            compute_s=so_far.compute_s + learnt - began,
            step_s=so_far.step_s + time.perf_counter() - learnt,
        )

    def epoch(self, number: int, on_step: OnStep, should_stop: Callable[[], bool]) -> Epoch | None:
        """Train on the remaining batches, then test; None where all ranks are told to stop before the last batch."""
        if not self.progress.steps:
            self.progress = EpochProgress(start_report=report(self.state).cost)
        if not train_batches(self, number, on_step, should_stop):
            return None
        done, self.progress = self.progress, EpochProgress()
        after = report(self.state).cost
        exchange_s, sent = after.seconds - done.start_report.seconds, after.wire_bytes - done.start_report.wire_bytes
        right = count_right(self.comm, self.data, self.network, self.model)
        per_step = sent // max(1, done.steps) if self.comm.rank == 0 else 0
        totals = np.array([done.loss, right, done.compute_s, exchange_s, done.step_s - exchange_s, per_step])
        self.comm.Allreduce(MPI.IN_PLACE, totals)
        return epoch_of(number, totals[:5], self.comm.size, self.data, int(totals[5]), self.dense_bytes)

    @property
    def dense_bytes(self) -> int:
        """Bytes that a dense allreduce of the gradient sends."""
        return allreduce_bytes(self.gradient.nbytes, self.comm.size)

    @property
    def model(self) -> dict[str, npt.NDArray[Any]]:
        """The tensors to test: of a method with local steps, those of the last exchange."""
        if not isinstance(self.method, PeriodicTransform) or self.comm.size == 1:
            return self.tensors
        return self.bucket.views(np.ascontiguousarray(self.method.export(self.state), self.weights.dtype))

    def finish(self) -> None:
        """After a method with local steps: exchange once more, so that all ranks have the same weights."""
        if isinstance(self.method, PeriodicTransform):
            step, self.state = self.method.finish(self.state, self.weights)
            self.weights += step
            if self.comm.size > 1:
                self.weights[...] = self.method.export(self.state)


def count_right(comm: MPI.Intracomm, data: Dataset, network: Network, tensors: dict[str, npt.NDArray[Any]]) -> int:
    """The number of correct predictions in this rank's share of the test samples."""
    inputs, targets = (np.array_split(each, comm.size)[comm.rank] for each in (data.test_inputs, data.test_targets))
    return count_matches(partial(network.scores, tensors), inputs, targets, len(targets))


def count_matches(scores: Callable[[Any], Any], inputs: Any, targets: Any, samples: int) -> int:
    """The number of correct predictions; as many calls as for ``samples``, which may be more than there are."""
    right = 0
    for first in range(0, samples, EVALUATION_BATCH):
        some = slice(first, first + EVALUATION_BATCH)
        right += int((scores(inputs[some]).argmax(axis=1) == targets[some]).sum())
    return right


def batches(samples: int, epoch: int, settings: Settings) -> Iterator[npt.NDArray[np.int64]]:
    """The global batches of an epoch, the same on all ranks; the last one may be shorter."""
    order = np.random.default_rng((settings.seed, epoch)).permutation(samples)
    for first in range(0, samples, settings.batch_size):
        yield order[first : first + settings.batch_size]


def train_batches(training: Any, number: int, on_step: OnStep, should_stop: Callable[[], bool]) -> bool:
    """Train on the remaining batches of an epoch; False where all ranks are told to stop before the last one."""
    samples, settings = len(training.data.targets), training.settings
    each = count_steps(samples, settings._replace(epochs=1))
    for batch in islice(batches(samples, number, settings), training.progress.steps, None):
        training.step(batch)
        on_step((number - 1) * each + training.progress.steps)
        if should_stop() and training.progress.steps < each:
            return False
    return True


def epoch_of(number: int, totals: npt.NDArray[np.float64], ranks: int, data: Dataset, sent: int, dense: int) -> Epoch:
    """The epoch from sums over the ranks: loss, right predictions, and seconds computing, exchanging and stepping."""
    shares = [len(data.targets), max(1, len(data.test_targets)), ranks, ranks, ranks]
    loss, accuracy, compute_s, communication_s, step_s = map(float, totals / shares)
    ratio = dense / sent if sent else None
    return Epoch(number, loss, accuracy, compute_s, communication_s, step_s, sent, ratio)


class Keeper(Protocol):
    """Saves a run that may be interrupted, see :mod:`hpccomm.train.checkpointing`."""

    def load(self, training: Any) -> list[Epoch]:
        """Resume a saved run, if there is one; returns its finished epochs (collective)."""

    def save(self, training: Any, epochs: list[Epoch]) -> None:
        """Save what is needed to resume (collective)."""

    def should_stop(self) -> bool:
        """Called after each step: whether any rank was told to stop; the same on all ranks (collective)."""


def train_epochs(
    training: Any, on_step: OnStep, on_epoch: Callable[[Epoch], object], keeper: Keeper | None
) -> list[Epoch]:
    """Train and save epoch by epoch, from where a saved run ended; fewer epochs where a rank was told to stop."""
    epochs = keeper.load(training) if keeper else []
    for each in epochs:
        on_epoch(each)
    while len(epochs) < training.settings.epochs:
        epoch = training.epoch(len(epochs) + 1, on_step, keeper.should_stop if keeper else lambda: False)
        if epoch is not None:
            epochs.append(epoch)
            on_epoch(epoch)
        if keeper:
            keeper.save(training, epochs)
        if epoch is None:
            break
    return epochs


def train(
    comm: MPI.Intracomm,
    data: Dataset,
    network: Network,
    method: Transform,
    settings: Settings,
    *,
    on_step: OnStep = ignore_step,
    on_epoch: Callable[[Epoch], object] = lambda epoch: None,
    keeper: Keeper | None = None,
) -> tuple[Vector, list[Epoch]]:
    """Train; returns the weights as one vector, the same bits on all ranks, and the epochs.

    A ``keeper`` saves after every epoch, and when a rank is told to stop: then epochs are missing, and the weights are
    this rank's own.
    """
    training = Training(comm, data, network, method, settings)
    epochs = train_epochs(training, on_step, on_epoch, keeper)
    if len(epochs) < settings.epochs:
        return training.weights, epochs
    training.finish()
    weights: Any = training.weights
    weights = weights if settings.library is np else weights.get()
    check_replicas(comm, weights)
    return weights, epochs


TRIAL_STEPS = 12
"""Steps after which a method planned for :data:`TRIAL_STEPS` steps has been in each of its phases."""


def compile_kernels(method: Transform, weights: Vector) -> None:
    """Let a method planned for :data:`TRIAL_STEPS` steps take them on random gradients (collective).

    What it compiles and plans is kept by the process: a training that follows measures its own steps.
    """
    state, draw = method.init(weights), np.random.default_rng(0)
    for _ in range(TRIAL_STEPS):
        gradient = convert_library(draw.standard_normal(weights.size).astype(weights.dtype), weights)
        _, state = method.update(gradient, state, weights)


def convert_library(array: Vector, like: Any) -> Any:
    """A host array in the library of another."""
    return array if isinstance(like, np.ndarray) else to_device_like(array, like)


class Servers(NamedTuple):
    """How a parameter server runs: the first ranks are servers, the others workers."""

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
    on_step: OnStep = ignore_step,
) -> tuple[Vector, list[Epoch]]:
    """As :func:`train`, with a parameter server.

    The model of an epoch is the one that the first worker pulls next; the bytes are those that a worker pushes.
    """
    from hpccomm.algorithms.parameter_server import ParameterServer

    bucket = Bucket(network.shapes)
    weights = bucket.flatten(network.initial_weights(settings.seed))
    server = ParameterServer(comm, weights, optimizer, servers=servers.ranks, mode=servers.mode)
    place, workers = comm.rank - servers.ranks, comm.size - servers.ranks
    sums, models = np.zeros((settings.epochs, 5)), [weights] * settings.epochs
    if server.serves:
        server.serve()
    else:
        models = run_worker(server, data, network, settings, (place, workers), sums, on_step)
    found = []
    for number, (model, totals) in enumerate(zip(models, sums, strict=True), 1):
        weights = model.copy()
        comm.Bcast(weights, servers.ranks)
        totals[1] = count_right(comm, data, network, bucket.views(weights))
        comm.Allreduce(MPI.IN_PLACE, totals)
        dense = allreduce_bytes(weights.nbytes, comm.size)
        found.append(epoch_of(number, totals, workers, data, weights.nbytes, dense))
    return weights, found


def run_worker(
    server: Any,
    data: Dataset,
    network: Network,
    settings: Settings,
    share: tuple[int, int],
    sums: npt.NDArray[np.float64],
    on_step: OnStep,
) -> list[Vector]:
    """Train as a worker: returns the model pulled after each epoch, and adds loss and times to ``sums``."""
    models: list[Vector] = []
    bucket = Bucket(network.shapes)
    gradient = np.empty_like(server.weights)
    gradients, done = bucket.views(gradient), 0
    for number, totals in enumerate(sums, 1):
        for first, batch in enumerate(batches(len(data.targets), number, settings)):
            mine, began = np.array_split(batch, share[1])[share[0]], time.perf_counter()
            weights = server.pull()
            pulled = time.perf_counter()
            totals[0] += network.learn(bucket.views(weights), data.inputs[mine], data.targets[mine], gradients)
            gradient *= share[1] / len(batch)
            learnt = time.perf_counter()
            server.push(gradient)
            totals[3] += pulled - began + time.perf_counter() - learnt
            totals[2] += learnt - pulled
            if number > 1 and not first:
                models.append(weights)
            done += 1
            if not share[0]:
                on_step(done)
    return [*models, server.leave()]


def count_steps(samples: int, settings: Settings) -> int:
    """The number of steps of a run."""
    return settings.epochs * -(-samples // settings.batch_size)
