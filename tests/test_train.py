"""Training on any number of ranks trains the model of one, to rounding, with the same bits on all ranks."""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm.algorithms.exchange import allreduce_bytes, synchronous_adam, synchronous_sgd
from hpccomm.algorithms.transforms import Transform
from hpccomm.buckets import Bucket
from hpccomm.commands import progress
from hpccomm.commands import train as command
from hpccomm.errors import ArgumentError
from hpccomm.testing.ranks import run_on_ranks
from hpccomm.train.checkpointing import Folder
from hpccomm.train.datasets import CHARACTERS, CONTEXT, Dataset, digits, encode, stdlib
from hpccomm.train.figure import Curve, curve
from hpccomm.train.loop import Epoch, Servers, Settings, batches, count_steps, train, train_by_servers
from hpccomm.train.methods import Method, MethodSetup, find_methods
from hpccomm.train.networks import Characters, Network, Perceptron, initial_weights, network_for

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
    tensors = {key: each.astype(np.float64) for key, each in initial_weights(network.shapes, 1).items()}
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


def train_briefly(comm: MPI.Intracomm, name: str, method: str) -> tuple[Any, Any]:
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
    weights, epochs = train_briefly(comm, name, method)
    alone, epochs_alone = train_briefly(MPI.COMM_SELF, name, method)
    steps = SETTINGS.epochs * math.ceil(53 / SETTINGS.batch_size)
    tolerance = steps * SETTINGS.batch_size * float(np.finfo(np.float32).eps)
    assert np.abs(weights - alone).max() <= tolerance * np.abs(alone).max()
    for left, right in zip(epochs, epochs_alone, strict=True):
        assert left.loss == pytest.approx(right.loss, rel=tolerance)
        assert left.accuracy == right.accuracy


@pytest.mark.mpi
@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_end_with_the_same_bits(comm: MPI.Intracomm, method: str) -> None:
    weights, _ = train_briefly(comm, "characters", method)
    assert len(set(comm.allgather(weights.tobytes()))) == 1


@pytest.mark.mpi
def test_the_same_run_gives_the_same_bits_again(comm: MPI.Intracomm) -> None:
    assert np.array_equal(train_briefly(comm, "perceptron", "adam")[0], train_briefly(comm, "perceptron", "adam")[0])


@pytest.mark.mpi
def test_another_seed_gives_another_model(comm: MPI.Intracomm) -> None:
    data, network = SMALL["perceptron"]
    one, two = (train(comm, data, network, METHODS["sgd"](comm), SETTINGS._replace(seed=seed))[0] for seed in (1, 2))
    assert not np.array_equal(one, two)


@pytest.mark.mpi
def test_epochs_report_time_and_bytes(comm: MPI.Intracomm) -> None:
    _, epochs = train_briefly(comm, "perceptron", "sgd")
    nbytes = 4 * Bucket(SMALL["perceptron"][1].shapes).size
    for epoch in epochs:
        assert epoch.compute_s > 0
        assert (epoch.communication_s > 0) == (comm.size > 1)
        assert epoch.step_s > 0
        assert epoch.wire_bytes == allreduce_bytes(nbytes, comm.size)
        assert epoch.ratio == (1 if comm.size > 1 else None)


@pytest.mark.mpi(sizes=(3,))
def test_servers_report_every_epoch_and_the_last_one_is_the_model(comm: MPI.Intracomm) -> None:
    data, network = SMALL["perceptron"]
    plan = MethodSetup(comm, Bucket(network.shapes), 0.1, 0)
    weights, epochs = train_by_servers(
        comm, data, network, command.METHODS["ps"].make(plan), SETTINGS._replace(epochs=3), Servers()
    )
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert epochs[2].loss < epochs[0].loss
    one = train_by_servers(
        comm, data, network, command.METHODS["ps"].make(plan), SETTINGS._replace(epochs=1), Servers()
    )
    assert one[1][0].loss == pytest.approx(epochs[0].loss, rel=1e-12)  # sums over ranks in any order
    assert one[1][0].accuracy == epochs[0].accuracy
    right = network.scores(Bucket(network.shapes).views(weights), data.test_inputs).argmax(axis=1) == data.test_targets
    assert epochs[2].accuracy == right.mean()


def train_as_command(comm: MPI.Intracomm, data: Any, name: str, settings: Settings) -> tuple[Any, Any]:
    """A run as the command makes it; one rank has nobody to serve."""
    method, network = command.METHODS[name], network_for(data)
    if name == "ps" and comm.size > 1:
        plan = MethodSetup(comm, Bucket(network.shapes), method.lr, 0)
        return train_by_servers(comm, data, network, method.make(plan), settings, Servers())
    steps = count_steps(len(data.targets), settings)
    made = method.make(
        MethodSetup(comm, Bucket(network.shapes), method.lr, steps, group_size=2 if comm.size > 1 else 1)
    )
    return train(comm, data, network, made, settings)


@pytest.mark.mpi(sizes=(4,))
@pytest.mark.parametrize("name", find_methods("replicas", "servers"))
def test_digits_are_learnt(comm: MPI.Intracomm, name: str) -> None:
    data, method = digits(), command.METHODS[name]
    _, epochs = train_as_command(comm, data, name, Settings(20, 64, 0, method.steps_locally))
    assert epochs[-1].accuracy >= 0.93


@pytest.mark.mpi(sizes=(1, 4))
@pytest.mark.parametrize("name", ["dense", "lamb", "dgc", "onebit-adam", "bmuf", "hybrid"])
def test_text_is_learnt_beyond_the_frequency_of_characters(comm: MPI.Intracomm, name: str) -> None:
    data, method = stdlib(20_000), command.METHODS[name]
    _, epochs = train_as_command(comm, data, name, Settings(1, 64, 0, method.steps_locally))
    shares = np.bincount(data.targets) / len(data.targets)
    assert epochs[-1].loss < -float((shares[shares > 0] * np.log(shares[shares > 0])).sum())
    assert epochs[-1].accuracy > np.mean(data.test_targets == shares.argmax())


# A run that is interrupted


class ImpatientFolder(Folder):
    """One rank is told to stop before a step."""

    at = -1

    def should_stop(self) -> bool:
        if self.steps == self.at and self.comm.rank == self.comm.size - 1:
            self.request_stop()
        return super().should_stop()


SAVED = ["adam", "dgc", "onebit-adam", "powersgd", "bmuf-adam", "hybrid"]


def train_interrupted(comm: MPI.Intracomm, name: str, path: Path, at: int) -> tuple[Any, Any]:
    """12 epochs of 6 steps: told to stop before step ``at``, if that is not negative."""
    data, network = SMALL["characters"]
    settings = SETTINGS._replace(epochs=12, local_mean=command.METHODS[name].steps_locally)
    plan = MethodSetup(comm, Bucket(network.shapes), 0.01, 12 * 6, period=5, group_size=1)
    keeper = ImpatientFolder(comm, path, name, {"method": name})
    keeper.at = at
    return train(comm, data, network, command.METHODS[name].make(plan), settings, keeper=keeper)


def strip_times(epochs: Any) -> Any:
    """What does not depend on the clock."""
    return [(each.epoch, each.loss, each.accuracy, each.wire_bytes, each.ratio) for each in epochs]


@pytest.mark.mpi(sizes=(1, 3))
@pytest.mark.parametrize("name", SAVED)
def test_an_interrupted_run_is_resumed_bit_for_bit(comm: MPI.Intracomm, name: str, tmp_path: Path) -> None:
    path = Path(comm.bcast(str(tmp_path)))
    weights, epochs = train_interrupted(comm, name, path / "whole", -1)
    half = train_interrupted(comm, name, path / "halves", 20)[1]
    assert len(half) == 5  # of 6 steps; asked after 32
    assert strip_times(half) == strip_times(epochs[:5])
    comm.Barrier()  # all have removed what was older
    assert len(list((path / "halves").iterdir())) == comm.size + 1
    again, all_of_them = train_interrupted(comm, name, path / "halves", -1)
    assert np.array_equal(again, weights)
    assert strip_times(all_of_them) == strip_times(epochs)
    finished, _ = train_interrupted(comm, name, path / "halves", -1)
    assert np.array_equal(finished, weights)


@pytest.mark.parametrize(("name", "old", "new"), [("adam", 2, 3), ("dgc", 4, 2), ("bmuf-adam", 1, 4)])
def test_another_number_of_ranks_resumes_a_run(name: str, old: int, new: int, tmp_path: Path) -> None:
    """Stopped after two steps of the sixth epoch: its loss is that of all steps, once, to the rounding of sums."""
    assert len(run_on_ranks(old, lambda comm: train_interrupted(comm, name, tmp_path, 20))[0][1]) == 5
    found = run_on_ranks(new, lambda comm: train_interrupted(comm, name, tmp_path, -1))
    ((_, whole),) = run_on_ranks(1, lambda comm: train_interrupted(comm, "adam", tmp_path / "whole", -1))
    assert all(np.array_equal(weights, found[0][0]) for weights, _ in found)
    assert len(found[0][1]) == 12
    if name == "adam":
        assert [each.loss for each in found[0][1]] == pytest.approx([each.loss for each in whole], rel=1e-5)
    assert found[0][1][-1].loss < found[0][1][4].loss


@pytest.mark.mpi(sizes=(3,))
def test_a_rank_that_cannot_save_is_named_on_all_ranks(comm: MPI.Intracomm, tmp_path: Path) -> None:
    path = Path(comm.bcast(str(tmp_path)))
    if comm.rank == 0:
        (path / "file").touch()
    comm.Barrier()
    with pytest.raises(ArgumentError, match=r"--checkpoint .*: rank 1: "):
        Folder(comm, path / ("file" if comm.rank == 1 else "folder"), "run", {})


@pytest.mark.mpi(sizes=(1, 3))
@pytest.mark.parametrize(
    ("note", "complaint"),
    [
        ("{", "does not describe a saved run"),
        ('{"run": {"lr": 1}, "step": 3}', "describes a run with lr 1, this command has lr 2"),
    ],
)
def test_notes_of_other_runs_are_refused_on_all_ranks(
    comm: MPI.Intracomm, tmp_path: Path, note: str, complaint: str
) -> None:
    path = Path(comm.bcast(str(tmp_path)))
    folder = Folder(comm, path, "run", {"lr": 2})
    if comm.rank == 0:
        folder.note.write_text(note)
    data, network = SMALL["perceptron"]
    with pytest.raises(ArgumentError, match=complaint):
        train(comm, data, network, METHODS["sgd"](comm), SETTINGS, keeper=folder)


@pytest.mark.slow
def test_a_signal_saves_and_ends_a_run_that_the_same_command_resumes(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "hpccomm",
        "train",
        "stdlib",
        "--samples",
        "20000",
        "--epochs",
        "3",
        "--method",
        "adam",
    ]

    def read_epochs(name: str) -> Any:
        return [strip_times([Epoch(**each)]) for each in json.loads((tmp_path / name).read_text())["epochs"]]

    kept = ["--checkpoint", str(tmp_path / "kept"), "--json", str(tmp_path / "halves")]
    first = subprocess.Popen([*words, *kept], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("      1"):
            first.send_signal(signal.SIGUSR1)
            break
    said = first.stdout.read()
    first.stdout.close()
    assert first.wait(timeout=60) == 0
    assert "stopped in epoch 2 and saved: run the same command again to resume" in said
    subprocess.run([*words, *kept], check=True, timeout=60, capture_output=True)
    subprocess.run([*words, "--json", str(tmp_path / "whole")], check=True, timeout=60, capture_output=True)
    assert read_epochs("halves") == read_epochs("whole")


# Networks of PyTorch


@pytest.fixture(scope="module", params=["digits", "stdlib"])
def torch_network(request: pytest.FixtureRequest) -> tuple[Dataset, Any]:
    """A few random samples of the shape of a dataset, and its network."""
    networks = pytest.importorskip("hpccomm.train.torch_networks", reason="needs torch")
    rng, classes = np.random.default_rng(0), 10
    inputs = {"digits": rng.random((48, 64), "f4"), "stdlib": rng.integers(0, classes, (48, CONTEXT), "u1")}
    x, y = inputs[request.param], rng.integers(0, classes, 48)
    data = Dataset(x, y, x, y, classes)
    return data, networks.network_for(data)


def test_networks_of_torch_compute_the_gradient_of_their_loss(torch_network: tuple[Dataset, Any]) -> None:
    data, network = torch_network
    bucket = Bucket(network.shapes)
    weights, gradient = bucket.flatten(network.initial_weights(0)), bucket.flatten(network.initial_weights(1))
    x, y = data.inputs[:8], data.targets[:8]
    loss = network.learn(bucket.views(weights), x, y, bucket.views(gradient))
    assert network.scores(bucket.views(weights), x).shape == (8, 10)
    one = sum(network.learn(bucket.views(weights), x[[k]], y[[k]], bucket.views(gradient.copy())) for k in range(8))
    assert loss == pytest.approx(one, rel=1e-5)  # sums of float32 in another order
    rate = 1e-3 / float(gradient @ gradient)
    moved = network.learn(bucket.views(weights - np.float32(rate) * gradient), x, y, bucket.views(gradient.copy()))
    assert loss - moved == pytest.approx(1e-3, rel=0.2)  # of first order, in float32
    # a worker may have no sample of a short last batch
    assert network.learn(bucket.views(weights), x[:0], y[:0], bucket.views(gradient)) == 0
    assert not gradient.any()


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("method", ["dense", "gtc", "bmuf"])
def test_networks_of_torch_train_by_every_method(
    comm: MPI.Intracomm, torch_network: tuple[Dataset, Any], method: str
) -> None:
    data, network = torch_network
    way = command.METHODS[method]
    made = way.make(MethodSetup(hpccomm.Communicator(comm), Bucket(network.shapes), way.lr / 10, 6, period=2))
    weights, epochs = train(comm, data, network, made, Settings(2, 16, 0, way.steps_locally))
    assert all(np.array_equal(each, weights) for each in comm.allgather(weights))
    assert np.isfinite(weights).all()
    assert epochs[-1].loss < epochs[0].loss


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
        names = "dataset framework method ranks seed steps_an_epoch command epochs"
        assert list(found) == names.split()
        assert (found["dataset"], found["method"], found["ranks"], found["seed"]) == (
            "digits",
            "adam",
            comm.size,
            5,
        )
        keys = ["epoch", "loss", "accuracy", "compute_s", "communication_s", "step_s", "wire_bytes", "ratio"]
        assert [list(epoch) for epoch in found["epochs"]] == [keys, keys]


STEPS_SHOWN: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "dense": (0, 23, ("digits",)),
    "ps": (1, 23, ("digits", "--method", "ps")),
    "mics": (0, 4, ("stdlib", "--method", "mics", "--samples", "200", "--batch-size", "50", "--width", "8")),
}
"""The rank that shows how far a run is, the steps of an epoch, and the arguments."""


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("name", STEPS_SHOWN)
def test_progress_counts_the_steps_of_the_whole_run(
    comm: MPI.Intracomm, capsys: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first rank that steps, which is a worker beside servers; also those before a resume."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    rank, each, arguments = STEPS_SHOWN[name]
    folder = ("--checkpoint", comm.bcast(str(tmp_path / "kept"))) if name != "ps" else ()
    for before, epochs in ((0, 1), (each, 3)):
        assert run(*arguments, *folder, "--epochs", str(epochs), "--progress") == 0
        shown = capsys.readouterr().err.splitlines()
        first = before if folder else 0
        wanted = range(first + 1, epochs * each + 1) if comm.rank == rank else []
        assert [line.split(",")[0] for line in shown] == [
            f"hpccomm train: step {done} of {epochs * each}" for done in wanted
        ]
        assert ["left" in line for line in shown] == [done > first + 1 for done in wanted]


@pytest.mark.slow
@pytest.mark.mpi(sizes=(1, 3))
def test_all_methods_are_shown_in_one_table(comm: MPI.Intracomm, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "out.json"
    picture = tmp_path / "out.svg"
    arguments = ("stdlib", "--method", "all", "--epochs", "1", "--samples", "2000", "--json", str(file))
    assert run(*arguments, "--plot", str(picture)) == 0
    table = capsys.readouterr().out.rpartition("# Method")[2].splitlines()[1:]
    if comm.rank == 0:
        known = find_methods("replicas", *(["servers"] if comm.size > 1 else []))
        assert [row.split()[0] for row in table] == known
        assert [each["method"] for each in json.loads(file.read_text())["runs"]] == known
        assert picture.read_text().count("<svg ") == 1


@pytest.mark.mpi(sizes=(1, 2))
def test_a_method_is_one_row_in_the_table(comm: MPI.Intracomm, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(setup: MethodSetup) -> Transform:
        assert setup.density == 0.25
        return synchronous_sgd(setup.comm, setup.lr)

    monkeypatch.setitem(command.METHODS, "mine", Method("my own method", 0.75, make, flags=("density",)))
    assert run("digits", "--method", "mine", "--epochs", "1", "--density", "0.25") == 0
    assert comm.rank or "# hpccomm train digits: mine, lr 0.75, batch 64 over" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    shown = " ".join(parser.format_help().split())
    assert "mine: my own method" in shown
    assert "share of the elements that a rank sends; with gtc, dgc, hybrid, mine (default: 0.01)" in shown


def test_curves_add_up_the_epochs() -> None:
    epoch = Epoch(1, 2.0, 0.5, 1.0, 0.25, 0.25, 500_000, 2.0)
    run = {"method": "gtc", "steps_an_epoch": 4, "epochs": [epoch._asdict(), epoch._replace(loss=1.0)._asdict()]}
    assert curve(run) == Curve("gtc", [2.0, 1.0], [2.0, 4.0], [1.5, 3.0])


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
        (("digits", "--framework", "tf"), "--framework 'tf' is not known: use one of numpy, torch"),
        (("stdlib", "--framework", "torch", "--method", "mics"), "--framework torch with --method mics: leave one"),
        (("digits", "--mode", "sync"), "--mode sync: use bsp, asp, or ssp:3"),
        (("digits", "--method", "ps", "--servers", "9"), "--servers 9 of "),
        (("digits", "--json", "no/such/folder/out.json"), "--json no/such/folder/out.json: No such file"),
        (("digits", "--plot", "no/such/folder/out.svg"), "--plot no/such/folder/out.svg: No such file"),
        (("digits", "--plot", "out.doc"), "--plot out.doc: the file must end in .png, .svg or .pdf"),
        (("digits", "--method", "hybrid", "--group-size", "9"), "--group-size 9 does not divide "),
        (
            ("digits", "--method", "all", "--checkpoint", "kept"),
            "--checkpoint with --method all: a parameter server cannot be saved",
        ),
    ],
)
def test_only_rank_0_reports_a_mistake(
    comm: MPI.Intracomm, capsys: Any, arguments: tuple[str, ...], complaint: str
) -> None:
    assert run(*arguments) == 2
    told = capsys.readouterr()
    assert not told.out
    if comm.rank == 0:
        assert told.err.startswith(f"hpccomm train: {complaint}")
    else:
        assert not told.err
