"""Training on any number of ranks trains the model of one, to rounding, with the same bits on all ranks."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm.algorithms.exchange import allreduce_bytes, synchronous_adam, synchronous_sgd
from hpccomm.algorithms.transforms import Transform
from hpccomm.buckets import Bucket
from hpccomm.commands import train as command
from hpccomm.train.datasets import CHARACTERS, CONTEXT, Dataset, digits, encode, stdlib
from hpccomm.train.loop import Servers, Settings, batches, steps_in, train, train_by_servers
from hpccomm.train.methods import Plan
from hpccomm.train.networks import Characters, Network, Perceptron, initial, network_for

SETTINGS = Settings(epochs=2, batch_size=10, seed=3)

METHODS: dict[str, Callable[[MPI.Intracomm], Transform]] = {
    "sgd": lambda comm: synchronous_sgd(comm, 0.5),
    "momentum": lambda comm: synchronous_sgd(comm, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda comm: synchronous_adam(comm, 0.01, eps=0.1),
}


def images(samples: int = 53) -> Dataset:
    """Two clouds of points; 53 samples leave a last batch of 3."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, samples + 20)
    inputs = (rng.standard_normal((samples + 20, 6)) + 2 * targets[:, None]).astype(np.float32)
    return Dataset(inputs[:samples], targets[:samples], inputs[samples:], targets[samples:], 2)


def text(samples: int = 53) -> Dataset:
    """Random characters out of five."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 5, (samples + 20, CONTEXT)).astype(np.uint8)
    targets = inputs[:, -1].astype(np.int64)
    return Dataset(inputs[:samples], targets[:samples], inputs[samples:], targets[samples:], 5)


SMALL: dict[str, tuple[Dataset, Network]] = {
    "perceptron": (images(), Perceptron(6, 8, 2)),
    "characters": (text(), Characters(5, 3, 8)),
}


# One rank


@pytest.mark.parametrize("name", SMALL)
def test_backpropagation_agrees_with_differences_of_the_loss(name: str) -> None:
    data, network = SMALL[name]
    tensors = {key: each.astype(np.float64) for key, each in initial(network.shapes, 1).items()}
    bucket = Bucket(tensors)
    weights, gradient = bucket.flatten(tensors), np.empty(bucket.size)
    inputs = data.inputs if data.inputs.dtype == np.uint8 else data.inputs.astype(np.float64)

    def loss() -> float:
        return network.learn(bucket.views(weights), inputs, data.targets, bucket.views(np.empty(bucket.size)))

    network.learn(bucket.views(weights), inputs, data.targets, bucket.views(gradient))
    h = 6e-6  # the cube root of float64's epsilon: error of h² · third derivative + epsilon · loss / h
    for i in range(bucket.size):
        at = weights[i]
        weights[i] = at + h
        above = loss()
        weights[i] = at - h
        slope = (above - loss()) / (2 * h)
        weights[i] = at
        assert abs(slope - gradient[i]) < 1e-7 * len(data.targets)


def test_a_share_without_samples_has_no_loss_and_no_gradient() -> None:
    for data, network in SMALL.values():
        bucket = Bucket(network.shapes)
        gradient = np.full(bucket.size, np.nan, np.float32)
        weights = bucket.views(np.ones(bucket.size, np.float32))
        assert network.learn(weights, data.inputs[:0], data.targets[:0], bucket.views(gradient)) == 0
        assert not gradient.any()


def test_batches_are_every_sample_once_and_follow_from_the_seed() -> None:
    order = np.concatenate(list(batches(53, 1, SETTINGS)))
    assert sorted(order) == list(range(53))
    assert np.array_equal(order, np.concatenate(list(batches(53, 1, SETTINGS))))
    assert not np.array_equal(order, np.concatenate(list(batches(53, 2, SETTINGS))))
    assert not np.array_equal(order, np.concatenate(list(batches(53, 1, SETTINGS._replace(seed=4)))))


def test_digits_are_all_there_and_no_test_sample_is_trained_on() -> None:
    data = digits()
    assert (len(data.inputs), len(data.test_inputs)) == (1438, 359)
    assert (data.inputs.dtype, data.inputs.min(), data.inputs.max()) == (np.float32, 0, 1)
    assert set(data.targets) == set(data.test_targets) == set(range(10))
    trained = {each.tobytes() for each in data.inputs}
    assert not any(each.tobytes() in trained for each in data.test_inputs)


def test_text_is_encoded_without_loss_but_for_unknown_characters() -> None:
    codes = encode("def f(x):\n\treturn 'é→'\n")
    assert "".join((CHARACTERS + "?")[code] for code in codes) == "def f(x):\n?return '??'\n"


def test_the_target_is_the_character_after_the_context() -> None:
    data = stdlib(2000)
    assert (data.inputs.shape, len(data.test_inputs)) == ((2000, CONTEXT), 400)
    assert np.array_equal(data.targets[:-1], data.inputs[1:, -1])
    assert data.targets.max() < data.classes


# All ranks


def trained(comm: MPI.Intracomm, name: str, method: str) -> tuple[Any, Any]:
    """Weights and epochs of a short run."""
    data, network = SMALL[name]
    return train(comm, data, network, METHODS[method](comm), SETTINGS)


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SMALL)
def test_any_number_of_ranks_trains_the_model_of_one(comm: MPI.Intracomm, name: str, method: str) -> None:
    """Adding B samples in another order moves a mean gradient by B rounding errors of its terms at most.

    Terms are below 1 here, a step is lr times the gradient and momentum 0.9 adds up ten of them at most,
    Adam divides by eps = 0.1 at most: in all below B · epsilon a step, which training carries on.
    """
    weights, epochs = trained(comm, name, method)
    alone, epochs_alone = trained(MPI.COMM_SELF, name, method)
    steps = SETTINGS.epochs * math.ceil(53 / SETTINGS.batch_size)
    tolerance = steps * SETTINGS.batch_size * float(np.finfo(np.float32).eps)
    assert np.abs(weights - alone).max() <= tolerance * np.abs(alone).max()
    for left, right in zip(epochs, epochs_alone, strict=True):
        assert left.loss == pytest.approx(right.loss, rel=tolerance)
        assert left.accuracy == right.accuracy


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_end_with_the_same_bits(comm: MPI.Intracomm, method: str) -> None:
    weights, _ = trained(comm, "characters", method)
    assert len(set(comm.allgather(weights.tobytes()))) == 1


@pytest.mark.mpi
def test_the_same_run_gives_the_same_bits_again(comm: MPI.Intracomm) -> None:
    assert np.array_equal(trained(comm, "perceptron", "adam")[0], trained(comm, "perceptron", "adam")[0])


@pytest.mark.mpi
def test_the_seed_decides(comm: MPI.Intracomm) -> None:
    data, network = SMALL["perceptron"]
    one, two = (train(comm, data, network, METHODS["sgd"](comm), SETTINGS._replace(seed=seed))[0] for seed in (1, 2))
    assert not np.array_equal(one, two)


@pytest.mark.mpi
def test_epochs_report_time_and_bytes(comm: MPI.Intracomm) -> None:
    _, epochs = trained(comm, "perceptron", "sgd")
    nbytes = 4 * Bucket(SMALL["perceptron"][1].shapes).size
    for epoch in epochs:
        assert epoch.compute_s > 0
        assert (epoch.communication_s > 0) == (comm.size > 1)
        assert epoch.wire_bytes == allreduce_bytes(nbytes, comm.size)


def learnt(comm: MPI.Intracomm, data: Any, name: str, settings: Settings) -> tuple[Any, Any]:
    """A run as the command makes it; one rank has nobody to serve."""
    method, network = command.METHODS[name], network_for(data)
    if name == "ps" and comm.size > 1:
        plan = Plan(comm, Bucket(network.shapes), method.lr, 0)
        return train_by_servers(comm, data, network, method.make(plan), settings, Servers())
    steps = steps_in(len(data.targets), settings)
    made = method.make(Plan(comm, Bucket(network.shapes), method.lr, steps, group_size=2 if comm.size > 1 else 1))
    return train(comm, data, network, made, settings)


@pytest.mark.mpi(sizes=(4,))
@pytest.mark.parametrize("name", command.METHODS)
def test_digits_are_learnt(comm: MPI.Intracomm, name: str) -> None:
    data, method = digits(), command.METHODS[name]
    _, epochs = learnt(comm, data, name, Settings(20, 64, 0, method.alone))
    assert epochs[-1].accuracy >= 0.93


@pytest.mark.mpi(sizes=(1, 4))
@pytest.mark.parametrize("name", ["dense", "lamb", "dgc", "onebit-adam", "bmuf", "hybrid"])
def test_text_is_learnt_beyond_the_frequency_of_characters(comm: MPI.Intracomm, name: str) -> None:
    data, method = stdlib(20_000), command.METHODS[name]
    _, epochs = learnt(comm, data, name, Settings(1, 64, 0, method.alone))
    shares = np.bincount(data.targets) / len(data.targets)
    assert epochs[-1].loss < -float((shares[shares > 0] * np.log(shares[shares > 0])).sum())
    assert epochs[-1].accuracy > np.mean(data.test_targets == shares.argmax())


# The command


def run(*arguments: str) -> int:
    """``hpccomm train`` with these arguments."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


@pytest.mark.mpi
def test_the_command_prints_one_line_an_epoch_on_rank_0(comm: MPI.Intracomm, capsys: Any) -> None:
    assert run("digits", "--epochs", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    if comm.rank:
        assert not lines
    else:
        assert [line.split()[0] for line in lines] == ["#", "#", "1", "2", "3"]


@pytest.mark.mpi
def test_the_command_writes_what_it_measured(comm: MPI.Intracomm, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    assert run("digits", "--epochs", "2", "--method", "adam", "--seed", "5", "--json", str(file)) == 0
    if comm.rank == 0:
        found = json.loads(file.read_text())
        assert list(found) == ["dataset", "method", "ranks", "seed", "command", "epochs"]
        assert (found["dataset"], found["method"], found["ranks"], found["seed"]) == (
            "digits",
            "adam",
            comm.size,
            5,
        )
        keys = ["epoch", "loss", "accuracy", "compute_s", "communication_s", "wire_bytes"]
        assert [list(epoch) for epoch in found["epochs"]] == [keys, keys]


@pytest.mark.mpi(sizes=(1, 3))
def test_all_methods_stand_in_one_table(comm: MPI.Intracomm, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "out.json"
    arguments = ("stdlib", "--method", "all", "--epochs", "1", "--samples", "2000", "--json", str(file))
    assert run(*arguments) == 0
    table = capsys.readouterr().out.rpartition("# Method")[2].splitlines()[1:]
    if comm.rank == 0:
        known = [name for name in command.METHODS if name != "ps" or comm.size > 1]
        assert [row.split()[0] for row in table] == known
        assert [each["method"] for each in json.loads(file.read_text())["runs"]] == known


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("mnist",), "dataset 'mnist' is not known: use one of digits, stdlib"),
        (("digits", "--method", "sdg"), "--method 'sdg' is not known: use one of dense, sgd, adam, lars, lamb, gtc,"),
        (("digits", "--algorithm", "rign"), "--algorithm 'rign' is not known: use one of auto, native"),
        (("digits", "--epochs", "0"), "--epochs 0: give 1 or more"),
        (("digits", "--batch-size", "-1"), "--batch-size -1: give 1 or more"),
        (("digits", "--lr", "nan"), "--lr nan: give a positive number"),
        (("digits", "--density", "2"), "--density 2.0: give a share above 0, at most 1"),
        (("digits", "--period", "0"), "--period 0: give 1 or more"),
        (("digits", "--mode", "sync"), "--mode sync: use bsp, asp, or ssp:3"),
        (("digits", "--method", "ps", "--servers", "9"), "--servers 9 of "),
        (("digits", "--json", "no/such/folder/out.json"), "--json no/such/folder/out.json: No such file"),
    ],
)
def test_mistakes_are_told_by_rank_0_alone(
    comm: MPI.Intracomm, capsys: Any, arguments: tuple[str, ...], complaint: str
) -> None:
    assert run(*arguments) == 2
    told = capsys.readouterr()
    assert not told.out
    if comm.rank == 0:
        assert told.err.startswith(f"hpccomm train: {complaint}")
    else:
        assert not told.err
