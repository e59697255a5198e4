"""Divided model states in training and on disk: any division trains the same model, any ranks go on with it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_mics import OPTIMIZERS, first_weights, gradient, nodes_of

from hpccomm.algorithms import checkpoint_sets
from hpccomm.algorithms.loss_scaling import LossScale
from hpccomm.algorithms.sharded.checkpoints import export, load_shards, save_shards
from hpccomm.algorithms.sharded.groups import mics
from hpccomm.algorithms.sharded.units import ShardedModel, data_parallel, zero
from hpccomm.algorithms.transforms import scale
from hpccomm.commands import train as command
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.testing.ranks import run_on_ranks
from hpccomm.train.checkpointing import ShardFolder
from hpccomm.train.datasets import CONTEXT, Dataset
from hpccomm.train.layered import deep_network_for
from hpccomm.train.loop import Epoch, Settings
from hpccomm.train.methods import find_methods
from hpccomm.train.sharded import Job, Training, account, states_for, train

Make = Callable[[Any], ShardedModel]


def text(samples: int = 53) -> Dataset:
    """Random characters out of five; the one to predict is the last seen."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 5, (samples + 20, CONTEXT)).astype(np.uint8)
    targets = inputs[:, -1].astype(np.int64)
    return Dataset(inputs[:samples], targets[:samples], inputs[samples:], targets[samples:], 5)


# Training


def test_backpropagation_agrees_with_differences_of_the_loss() -> None:
    data, network = text(7), deep_network_for(text(), 3, 2)

    def body(comm: Any) -> None:
        units = {unit: {k: t.astype("f8") for k, t in tensors.items()} for unit, tensors in network.initial_weights(1)}
        states = zero(comm, units, scale(-1.0))

        def loss() -> float:
            found = network.learn(states, data.inputs, data.targets, 1.0)
            states.total[...] = 0
            return found

        network.learn(states, data.inputs, data.targets, 1.0)
        found, weights, h = states.total.copy(), states.master, 6e-6  # the cube root of float64's epsilon
        for i in range(0, weights.size, 7):
            at = weights[i]
            weights[i] = at + h
            above = loss()
            weights[i] = at - h
            slope = (above - loss()) / (2 * h)
            weights[i] = at
            assert abs(slope - found[i]) < 1e-7 * len(data.targets)

    run_on_ranks(1, body)


def run(comm: Any, job: Job, epochs: int = 2) -> tuple[list[Epoch], dict[str, Any], bytes]:
    """Train a small deep network."""
    data, settings = text(), Settings(epochs, 20, 3)
    network = deep_network_for(data, 8, 2)
    training = Training(comm, data, network, states_for(comm, network, settings, job), settings, job.micro_steps)
    found = (
        train(training),
        account(training),
        b"".join(tensor.tobytes() for _, tensors in training.states.consolidate() for tensor in tensors.values()),
    )
    training.states.close()
    return found


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_every_division_trains_the_model_of_one_rank(micro_steps: int) -> None:
    """To rounding: a batch of 53 ends with one of 13, which four ranks and their parts share unevenly."""
    ((wanted, _, _),) = run_on_ranks(1, lambda comm: run(comm, Job("ddp", 0.01, None, 1, "float32")))
    for name in find_methods("shards"):
        job = Job(name, 0.01, 2, micro_steps, "float32")
        found = run_on_ranks(4, lambda comm, job=job: run(comm, job), [0, 0, 1, 1])
        assert len({weights for _, _, weights in found}) == 1
        for ours, one in zip(found[0][0], wanted, strict=True):
            assert ours.loss == pytest.approx(one.loss, rel=1e-4)  # float32 sums of a few steps in another order
            assert ours.accuracy == one.accuracy


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_16_bits_learn_as_well(dtype: str) -> None:
    """The masters are float32; losses agree to the 8 or 11 bits of what is gathered."""
    wide, narrow = (
        run_on_ranks(4, lambda comm, d=d: run(comm, Job("mics", 0.01, 2, 2, d), 4), [0, 0, 1, 1])[0][0]
        for d in ("float32", dtype)
    )
    assert narrow[-1].loss == pytest.approx(wide[-1].loss, rel=0.02)
    assert narrow[-1].loss < narrow[0].loss


def test_the_report_holds_memory_and_bytes_of_each_hop() -> None:
    """Adam: 16 bytes a parameter over p ranks; gathers 2s(p-1)/p, first hop s(p-1)/p, second 2(R-1)/(R p)."""
    ours, division = run_on_ranks(4, lambda comm: run(comm, Job("mics", 0.01, 2, 2, "float32"))[1], [0, 0, 1, 1]), 2
    assert all(each == ours[0] for each in ours)
    nbytes, padding = 4 * ours[0]["parameters"], 1.02  # units of up to two elements more
    for hop, share in (("gather", 2 * 2 / 2), ("first", 2 / 2), ("second", 1 / 2)):
        assert nbytes * share <= ours[0]["hops"][hop] <= nbytes * share * padding
    assert 16 * ours[0]["parameters"] / division <= ours[0]["memory"]["states"] <= 8 * ours[0]["parameters"] * padding


class InterruptedFolder(ShardFolder):
    """Is told to stop after the fourth step."""

    def should_stop(self) -> bool:
        """As :meth:`ShardFolder.should_stop`."""
        self.steps += 1
        return self.steps == 4


@pytest.mark.parametrize("partition", [2, 4])
def test_an_interrupted_run_continues_from_its_checkpoint(partition: int, tmp_path: Path) -> None:
    """Bit for bit with the same groups; with others float32 is summed in another order: rtol 1e-3 after six steps."""

    def body(comm: Any, kind: Any, size: int, settings: Settings) -> Any:
        data, job = text(), Job("mics", 0.01, size, 2, "float32")
        network = deep_network_for(data, 8, 1)
        training = Training(comm, data, network, states_for(comm, network, settings, job), settings, 2)
        keeper = kind and kind(comm, tmp_path, "run", {"lr": 0.01})
        epochs = train(training, keeper=keeper)
        found = epochs, np.concatenate([t.ravel() for _, u in training.states.consolidate() for t in u.values()])
        training.states.close()
        return found

    settings = Settings(2, 20, 3)
    whole = run_on_ranks(4, lambda comm: body(comm, None, 2, settings), [0, 0, 1, 1])[0]
    halves = [
        run_on_ranks(4, lambda comm, k=k, p=p: body(comm, k, p, settings), nodes_of(4, p))[0]
        for k, p in ((InterruptedFolder, 2), (ShardFolder, partition))
    ]
    assert [len(epochs) for epochs, _ in halves] == [1, 2]
    if partition == 2:
        assert halves[1][1].tobytes() == whole[1].tobytes()
    assert np.allclose(halves[1][1], whole[1], rtol=1e-3, atol=1e-5)
    assert [each.loss for each in halves[1][0]] == pytest.approx([each.loss for each in whole[0]], rel=1e-3)
    if partition == 2:
        assert [each.wire_bytes for each in halves[1][0]] == [each.wire_bytes for each in whole[0]]


# On disk


def run_steps(states: ShardedModel, rank: int, first: int, count: int) -> None:
    """Some steps of two micro-steps with gradients that depend on all of these; sums are exact."""
    for step in range(first, first + count):
        for micro in range(2):
            for unit in states.units:
                states.reduce_accumulate(unit, gradient(unit, step, micro, rank % 2))
        states.boundary()


def weights_of(states: ShardedModel) -> dict[str, Any]:
    """By name."""
    return {f"{unit}.{name}": w.copy() for unit, tensors in states.consolidate() for name, w in tensors.items()}


READERS: dict[str, tuple[int, int, Callable[..., ShardedModel]]] = {
    "the same": (4, 2, mics),
    "other partitions": (4, 4, mics),
    "partitions of one": (4, 1, mics),
    "more ranks": (6, 3, mics),
    "fewer ranks": (2, 2, mics),
    "data parallel": (2, 1, lambda comm, units, optimizer, _: data_parallel(comm, units, optimizer)),
    "stage 1": (2, 2, lambda comm, units, optimizer, _: zero(comm, units, optimizer, stage=1)),
    "stage 2": (4, 4, lambda comm, units, optimizer, _: zero(comm, units, optimizer, stage=2)),
}


def names_of(folder: Path) -> list[str]:
    """The names of a folder's files, without those of the run and of the set."""
    return sorted(re.sub(r"^run\.([0-9a-f]{16}\.)?", "", file.name) for file in folder.iterdir())


def shard(folder: Path, place: int) -> Path:
    """The file of one of two places."""
    (found,) = folder.glob(f"run.*.{place}of2.npz")
    return found


def save_run(tmp_path: Path, optimizer: Any = OPTIMIZERS["adamw"], at: int = 2) -> None:
    """Steps of four ranks in groups of two, then files."""

    def body(comm: Any) -> None:
        states = mics(comm, first_weights(), optimizer, 2, loss_scale=LossScale(4.0, 9))
        run_steps(states, comm.rank, 0, at)
        save_shards(tmp_path, "run", states, told={"epoch": at})

    run_on_ranks(4, body, [0, 0, 1, 1])


@pytest.mark.parametrize("reader", READERS)
def test_any_number_of_ranks_continues_bit_for_bit(reader: str, tmp_path: Path) -> None:
    ranks, size, make = READERS[reader]

    def body(comm: Any, load: bool) -> Any:
        states = make(comm, first_weights(), OPTIMIZERS["adamw"], size)
        states.loss_scale = LossScale(1.0 if load else 4.0)
        if load:
            assert load_shards(tmp_path, "run", states)["told"] == {"epoch": 2}
            assert (states.steps, states.loss_scale) == (2, LossScale(4.0, 9, 2))
        else:
            run_steps(states, comm.rank, 0, 2)
        states.loss_scale = LossScale()
        gathered = states.gather("one")["w"].tobytes()
        states.release("one")
        assert gathered == weights_of(states)["one.w"].tobytes()
        run_steps(states, comm.rank, 2, 2)
        return weights_of(states)

    save_run(tmp_path, at=2)
    assert names_of(tmp_path) == ["0of2.npz", "1of2.npz", "json"]
    nodes = nodes_of(ranks, size)
    found, wanted = (run_on_ranks(ranks, lambda comm, load=load: body(comm, load), nodes) for load in (True, False))
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


NOTES: dict[str, Any] = {
    "units": 3,
    "ranks": 4,
    "dtype": "x",
    "loss_scale": 1.0,
    "steps": 100,
    "step": 7,
    "name": "me",
    "folder": "there",
    "states": [1],
    "note": {"a": None},
    "shards": {},
    "set": "0",
    "bytes": [],
    "format": 9,
    "run": {"ranks": 9},
}
"""Words that describe a set, or are names of arguments, as keys of a note."""


@pytest.mark.parametrize("keys", [*([key] for key in NOTES), list(NOTES)], ids=lambda keys: "+".join(keys)[:20])
def test_a_note_may_have_any_keys_and_comes_back_alone(keys: list[str], tmp_path: Path) -> None:
    note = {key: NOTES[key] for key in keys}

    def save(comm: Any) -> dict[str, Any]:
        states = mics(comm, first_weights(), OPTIMIZERS["adam"], 2, loss_scale=LossScale(4.0, 3))
        run_steps(states, comm.rank, 0, 2)
        save_shards(tmp_path, "run", states, **note)
        checkpoint_sets.save_set(comm, tmp_path, "other", note, weights=np.full(2, comm.rank))
        return weights_of(states)

    def load(comm: Any) -> dict[str, Any]:
        states = zero(comm, first_weights(), OPTIMIZERS["adam"])
        assert load_shards(tmp_path, "run", states) == note
        assert (states.steps, states.loss_scale) == (2, LossScale(4.0, 3, 2))
        (found,) = checkpoint_sets.load_set(comm, tmp_path, "other", weights=np.zeros(2, int))
        assert found.tolist() == [comm.rank] * 2
        manifest = checkpoint_sets.read_manifest(tmp_path, "other")
        assert manifest
        assert manifest.note == note
        return weights_of(states)

    saved = run_on_ranks(2, save)
    for found, wanted in zip(run_on_ranks(2, load), saved, strict=True):
        assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "lars", "lamb", "sgd"])
def test_the_state_of_every_optimizer_is_kept(optimizer: str, tmp_path: Path) -> None:
    """Where norms are summed in another order: rtol 1e-6."""

    def body(comm: Any, load: bool) -> Any:
        states = mics(comm, first_weights(), OPTIMIZERS[optimizer], 4)
        if load:
            load_shards(tmp_path, "run", states)
        else:
            run_steps(states, comm.rank, 0, 2)
        states.loss_scale = LossScale()
        run_steps(states, comm.rank, 2, 2)
        return weights_of(states)

    def save_and_train(comm: Any) -> None:
        states = mics(comm, first_weights(), OPTIMIZERS[optimizer], 2)
        run_steps(states, comm.rank, 0, 2)
        save_shards(tmp_path, "run", states)

    run_on_ranks(4, save_and_train, [0, 0, 1, 1])
    found, wanted = (run_on_ranks(4, lambda comm, load=load: body(comm, load))[0] for load in (True, False))
    assert all(np.allclose(found[name], wanted[name], rtol=1e-6, atol=1e-7) for name in wanted)


def check_refused(tmp_path: Path, why: str, make: Make | None = None) -> None:
    """Loading raises on all ranks, and changes nothing."""
    make = make or (lambda comm: mics(comm, first_weights(), OPTIMIZERS["adamw"], 2))
    told = []

    def body(comm: Any) -> None:
        states = make(comm)
        before = states.master.copy()
        with pytest.raises(ArgumentError, match=why):
            load_shards(tmp_path, "run", states)
        told.append(comm.rank)
        assert states.master.tobytes() == before.tobytes()
        assert (states.steps, states.state.updates) == (0, 0)

    run_on_ranks(4, body, [0, 0, 1, 1])
    assert len(told) == 4


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("place", [0, 1])
def test_a_file_that_was_cut_short_is_named(share: float, place: int, tmp_path: Path) -> None:
    save_run(tmp_path)
    file = shard(tmp_path, place)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    check_refused(
        tmp_path,
        rf"load_shards .*rank [0-3]: .*\.{place}of2.npz is (no checkpoint, or is damaged|not the file .*cut short)",
    )


def test_a_file_with_a_wrong_byte_is_named(tmp_path: Path) -> None:
    """The archive's checksums tell."""
    save_run(tmp_path)
    file = shard(tmp_path, 0)
    with np.load(file) as entries:
        place = file.read_bytes().find(entries["weights.1"].tobytes())
    content = bytearray(file.read_bytes())
    content[place + 5] ^= 1
    file.write_bytes(content)
    check_refused(tmp_path, r"\.0of2.npz is no checkpoint, or is damaged .*CRC.*weights.1")


def test_a_missing_file_or_note_and_other_models_are_named(tmp_path: Path) -> None:
    save_run(tmp_path)
    other = {"embedding": {"table": np.ones((7, 4), "f4")}}
    saved = "saved were units of float32 embedding 21, one 25, gain 1, out 22, this model has float"
    check_refused(tmp_path, saved, lambda comm: mics(comm, other, OPTIMIZERS["adamw"], 2))
    momentum = lambda comm: mics(comm, first_weights(), OPTIMIZERS["lars"], 2)  # noqa: E731
    check_refused(tmp_path, "state:velocity.0.*name a whole file that save wrote", momentum)
    shard(tmp_path, 1).unlink()
    check_refused(
        tmp_path, r"\.1of2.npz cannot be read .No such file.*, but run.json names it: copy all files of the set"
    )
    note = tmp_path / "run.json"
    note.write_text(note.read_text()[:40])
    check_refused(tmp_path, "run.json does not describe a saved run")
    note.write_text("{}")
    check_refused(tmp_path, "run.json does not describe a saved run .it names no step")
    note.unlink()
    check_refused(tmp_path, "there is no run.json: name the folder")
    run_on_ranks(4, lambda comm: checkpoint_sets.save_set(comm, tmp_path, "run", weights=np.zeros(3)))
    check_refused(tmp_path, "it names no sharded states: load a set of save_set with load_set")


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failed_write_leaves_the_older_checkpoint_complete(
    culprit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path)

    def full(path: Any, *states: Any, **label: Any) -> int:
        if label["place"] == culprit:
            raise OSError("No space left on device")
        return keep(path, *states, **label)

    keep = checkpoint_sets.write_file

    def body(comm: Any) -> None:
        states = mics(comm, first_weights(), OPTIMIZERS["adamw"], 2)
        load_shards(tmp_path, "run", states)
        run_steps(states, comm.rank, 2, 1)
        with pytest.raises(ArgumentError, match=f"save_shards .*: rank {culprit}: No space left"):
            save_shards(tmp_path, "run", states)
        load_shards(tmp_path, "run", states)
        assert states.steps == 2

    monkeypatch.setattr(checkpoint_sets, "write_file", full)
    before = sorted(tmp_path.iterdir())
    run_on_ranks(4, body, [0, 0, 1, 1])
    assert sorted(tmp_path.iterdir()) == before


def test_an_older_checkpoint_is_removed_when_the_newer_one_is_complete(tmp_path: Path) -> None:
    save_run(tmp_path)

    def body(comm: Any) -> None:
        states = mics(comm, first_weights(), OPTIMIZERS["adamw"], 4)
        load_shards(tmp_path, "run", states)
        save_shards(tmp_path, "run", states)

    run_on_ranks(4, body)
    assert names_of(tmp_path) == [*(f"{place}of4.npz" for place in range(4)), "json"]


def test_nothing_is_saved_between_micro_steps(tmp_path: Path) -> None:
    def body(comm: Any) -> None:
        states = mics(comm, first_weights(), OPTIMIZERS["adamw"], 2)
        states.reduce_accumulate("one", gradient("one", 0, 0, 0))
        with pytest.raises(ArgumentError, match="unit 'one' has seen gradients since the last step: save after"):
            save_shards(tmp_path, "run", states)

    run_on_ranks(2, body)


MODELS: dict[str, Callable[[Any, Any], ShardedModel]] = {
    "zero": lambda comm, units: zero(comm, units, scale(-1.0)),
    "zero without threads": lambda comm, units: zero(comm, units, scale(-1.0), overlap=False),
    "stage 1": lambda comm, units: zero(comm, units, scale(-1.0), stage=1),
    "stage 2": lambda comm, units: zero(comm, units, scale(-1.0), stage=2),
    "data_parallel": lambda comm, units: data_parallel(comm, units, scale(-1.0)),
    "mics": lambda comm, units: mics(comm, units, scale(-1.0), 2),
    "secondary shards": lambda comm, units: zero(comm, units, scale(-1.0), secondary_shard=True),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_loaded_within_a_step_leaves_nothing_of_the_step(
    name: str, last: bool, tied: bool, tmp_path: Path
) -> None:
    """Neither gradients, nor second hops that have begun, nor units gathered or gathered ahead."""

    def body(comm: Any) -> Any:
        shared = np.array([1, 2, 3, 4], "f4")
        units = {"l": {"w": shared}, "k": {"v": np.array([5, 6], "f4")} | ({"w": shared} if tied else {})}
        states = MODELS[name](comm, units)

        def learn(value: float, last: bool = False) -> None:
            for unit in states.units:
                weights = states.gather(unit)
                states.reduce_accumulate(unit, {k: np.full_like(w, value) for k, w in weights.items()}, last)
                states.release(unit)

        save_shards(tmp_path, "run", states)
        learn(1.0)
        states.boundary()
        learn(100.0, last)
        states.gradient("k")
        states.gather("l", ahead="k")
        load_shards(tmp_path, "run", states)
        seen = {unit: {k: w.tolist() for k, w in states.gather(unit).items()} for unit in states.units}
        for unit in states.units:
            states.release(unit)
        learn(1.0)
        outcome = states.boundary()
        return seen, {k: w.tolist() for k, w in weights_of(states).items()}, outcome.norm, states.steps

    start: dict[str, dict[str, list[float]]] = {"l": {"w": [1, 2, 3, 4]}, "k": {"v": [5, 6]}}
    start["k"] |= start["l"] if tied else {}
    moved = [0, 1, 2, 3] if not tied else [-1, 0, 1, 2]
    weights = {"l.w": moved, "k.v": [4, 5]} | ({"k.w": moved} if tied else {})
    norm = pytest.approx(18**0.5 if tied else 6**0.5)
    assert run_on_ranks(4, body, [0, 0, 1, 1]) == [(start, weights, norm, 1)] * 4


def test_a_checkpoint_is_not_loaded_within_a_step_whose_exchanges_cannot_end(tmp_path: Path) -> None:
    """One rank has had an error before a call that the other has made."""

    def body(comm: Any) -> str:
        states = zero(comm, {"l": {"w": np.ones(4, "f4")}, "k": {"v": np.ones(2, "f4")}}, scale(-1.0))
        save_shards(tmp_path, "run", states)
        weights = states.gather("l")
        if comm.rank == 0:
            states.calls.append("reduce l")  # as reduce_accumulate notes it, without what never ends
        with pytest.raises(MismatchError) as error:
            load_shards(tmp_path, "run", states)
        assert weights is not None
        return str(error.value)

    said = run_on_ranks(2, body)
    assert all("in this step rank 0 has made 2 calls, rank 1 1 or others: free the states" in each for each in said)


@pytest.mark.parametrize("states", ["run", (np.zeros(3),), {"w": np.zeros(3)}, None])
def test_what_is_no_sharded_model_is_refused_in_a_sentence(states: Any, tmp_path: Path) -> None:
    for call in (
        lambda: save_shards(str(tmp_path), "run", states),
        lambda: load_shards(str(tmp_path), "run", states),
        lambda: export(str(tmp_path / "model.npz"), states),
    ):
        with pytest.raises(ArgumentError, match=rf"the states are a {type(states).__name__}: pass what mics, zero or"):
            call()


def test_the_exported_model_is_arrays_by_name(tmp_path: Path) -> None:
    def body(comm: Any) -> Any:
        states = mics(comm, first_weights(), OPTIMIZERS["adamw"], 2)
        run_steps(states, comm.rank, 0, 1)
        export(tmp_path / "model.npz", states)
        return weights_of(states)

    wanted = run_on_ranks(4, body, [0, 0, 1, 1])[0]
    with np.load(tmp_path / "model.npz") as found:
        assert sorted(found.files) == sorted(wanted)
        assert all(found[name].tobytes() == wanted[name].tobytes() for name in wanted)
        assert all(found[name].shape == wanted[name].shape for name in wanted)


def test_a_failed_export_raises_on_all_ranks_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    told = []

    def body(comm: Any) -> None:
        states = mics(comm, first_weights(), OPTIMIZERS["adamw"], 2)
        with pytest.raises(ArgumentError, match=r"export .*model.npz: rank 0: No space left"):
            export(tmp_path / "model.npz", states)
        told.append(comm.rank)

    run_on_ranks(4, body, [0, 0, 1, 1])
    assert len(told) == 4
    assert not list(tmp_path.iterdir())


# The command


def call(*arguments: str) -> int:
    """``hpccomm train`` with these arguments."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(arguments))


SHORT = ("stdlib", "--samples", "400", "--batch-size", "64", "--width", "16", "--layers", "2")


@pytest.mark.mpi(sizes=(4,))
def test_the_command_reports_memory_and_hops_and_goes_on(comm: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = (*SHORT, "--method", "mics", "--partition-size", "2", "--micro-steps", "4", "--epochs", "2")
    tmp_path = comm.bcast(tmp_path)
    kept, file = tmp_path / "kept", tmp_path / "out.json"
    assert call(*arguments, "--checkpoint", str(kept), "--export", str(tmp_path / "m.npz"), "--json", str(file)) == 0
    first = capsys.readouterr().out
    assert call(*arguments[:-6], "--partition-size", "1", "--micro-steps", "4", "--epochs", "2",
                "--checkpoint", str(kept)) == 0  # fmt: skip
    again = capsys.readouterr().out
    if comm.rank:
        assert not first
        return
    found = json.loads(file.read_text())
    assert (found["deep"]["partition_size"], found["deep"]["micro_steps"]) == (2, 4)
    nbytes = 4 * found["parameters"]
    assert found["hops"]["gather"] == pytest.approx(8 * nbytes / 2, rel=0.02)
    assert found["memory"]["states"] == pytest.approx(4 * nbytes / 2, rel=0.02)
    assert "a copy on 2 ranks, stage 3" in first
    assert [line for line in first.splitlines() if line[0] == " "] == [
        line for line in again.splitlines() if line[0] == " "
    ]
    with np.load(tmp_path / "m.npz") as model:
        assert sum(model[name].size for name in model.files) == found["parameters"]


@pytest.mark.mpi(sizes=(4,))
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("digits", "--method", "mics"), "--method mics trains a deep network on text: use the dataset stdlib"),
        ((*SHORT, "--method", "mics", "--partition-size", "3"), "--partition-size: partition size 3 does not divide 4"),
        ((*SHORT, "--method", "zero3", "--micro-steps", "0"), "--micro-steps 0: give 1 or more"),
        (
            (*SHORT, "--method", "adam", "--export", "m.npz"),
            "--export with --method adam: only mics, zero1, zero2, zero3, ddp have",
        ),
        ((*SHORT, "--method", "ddp", "--export", "no/m.npz"), "--export no/m.npz: the folder no does not exist"),
    ],
)
def test_rank_0_alone_prints_an_error(comm: Any, capsys: Any, arguments: tuple[str, ...], complaint: str) -> None:
    assert call(*arguments) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"hpccomm train: {complaint}") if comm.rank == 0 else not told.err
