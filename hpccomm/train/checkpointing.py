"""Save and resume a training run: the states of all ranks are one set of files.

A folder holds one set for each run, see :mod:`hpccomm.algorithms.checkpoint_sets`.  Any number of ranks may resume.
Every :data:`STOP_CHECK_STEPS` steps the ranks exchange whether one of them has been told to stop, so that all stop
after the same step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpi4py import MPI

from hpccomm.algorithms.agreement import run_collectively
from hpccomm.algorithms.checkpoint_sets import (
    Manifest,
    read_manifest,
    restore_set,
    take_own,
    write_set,
)
from hpccomm.algorithms.reports import ExchangeReport
from hpccomm.algorithms.sharded.checkpoints import load_shards, save_shards
from hpccomm.algorithms.sharded.units import Hops
from hpccomm.errors import ArgumentError
from hpccomm.train import sharded
from hpccomm.train.loop import Epoch, Training

STOP_CHECK_STEPS = 16
"""Steps between two of these exchanges."""


def describe(key: str, value: Any) -> str:
    """An argument and its value: ``lr 0.1``, ``no samples`` where it is not given."""
    return f"no {key}" if value is None else f"{key} {value}"


def read_epochs(note: Path, wanted: int) -> int:
    """The epochs for which a saved run was planned, and ``wanted`` where there is none.

    Learning-rate schedules and warm-ups are those of the planned run, also where more epochs are wanted now.  Raises
    ArgumentError where more epochs are done than wanted; :meth:`Folder.read` refuses a note that cannot be read.
    """
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        planned, done = int(found["run"]["epochs"]), len(found["epochs"])
    except (OSError, ValueError, KeyError, TypeError):
        return wanted
    if done > wanted:
        raise ArgumentError(f"{note} describes a run with {done} finished epochs: pass --epochs {done} or more")
    return planned


class Folder:
    """The folder that one run is saved in (collective).

    ``run`` holds, by name, the values that must be the same when the run is resumed; ``name`` distinguishes runs in one
    folder.  Another number of ranks may resume.  Raises on all ranks where the folder cannot be created.
    """

    def __init__(self, comm: MPI.Intracomm, path: Path, name: str, run: dict[str, Any]) -> None:
        self.comm, self.path, self.name, self.run = comm, path, name, run
        self.stop_requested = False
        """Whether this rank has been told to stop; a signal handler may set it."""
        self.steps = 0
        self.note = path / f"{name}.json"
        self.run_collectively(lambda: path.mkdir(parents=True, exist_ok=True))

    def request_stop(self, *_: object) -> None:
        """Stop after one of the next steps; can be used as a signal handler."""
        self.stop_requested = True

    def should_stop(self) -> bool:
        """As :meth:`~hpccomm.train.loop.Keeper.should_stop`."""
        self.steps += 1
        return self.steps % STOP_CHECK_STEPS == 0 and any(self.comm.allgather(self.stop_requested))

    def load(self, training: Training) -> list[Epoch]:
        """As :meth:`~hpccomm.train.loop.Keeper.load`; raises on all ranks for the files of another run."""
        manifest = self.find()
        if manifest is None:
            return []
        like, rank = self.contents(training), self.comm.rank
        olds = self.run_collectively(lambda: restore_set(self.path, manifest, self.comm, like))
        weights, training.state, training.progress = self.run_collectively(
            lambda: take_own(olds, manifest, self.comm, like)
        )
        if manifest.places(self.comm.size) != self.comm.size:  # the sum over the ranks stays
            loss = float(sum(progress.loss for _, _, progress in olds))
            training.progress = training.progress._replace(loss=loss if rank == 0 else 0.0)
        training.weights[...] = weights
        return [Epoch(**each) for each in manifest.note["epochs"]]

    def save(self, training: Training, epochs: list[Epoch]) -> None:
        """As :meth:`~hpccomm.train.loop.Keeper.save`."""
        each = -(-len(training.data.targets) // training.settings.batch_size)
        step = len(epochs) * each + training.progress.steps
        note = {"run": self.run, "step": step, "epochs": [epoch._asdict() for epoch in epochs]}
        states = self.contents(training)
        write_set(self.comm, self.path, self.name, self.what, note, states, self.comm.rank, self.comm.size)

    @staticmethod
    def contents(training: Training) -> dict[str, Any]:
        """What a file holds."""
        return {"weights": training.weights, "method": training.state, "partial": training.progress}

    def find(self) -> Manifest | None:
        """The manifest of this run, None where there is none; raises on all ranks for that of another run."""
        found = self.run_collectively(lambda: self.read() if self.comm.rank == 0 else None)
        told = self.comm.bcast(found)
        return None if told is None else Manifest(*told)

    def read(self) -> Manifest | None:
        """The manifest of this run; raises for that of another run."""
        manifest = read_manifest(self.path, self.name)
        try:
            saved = manifest.note["run"].items() if manifest else ()
        except (KeyError, TypeError, AttributeError):
            raise ArgumentError(f"{self.note} does not describe a saved run: name another folder") from None
        for key, then in saved:
            now = self.run.get(key)
            if then != now and key != "ranks":  # of format 1
                raise ArgumentError(
                    f"{self.note} describes a run with {describe(key, then)}, this command has "
                    f"{describe(key, now)}: repeat the command, or name another folder"
                )
        return manifest

    @property
    def what(self) -> str:
        """How errors begin."""
        return f"--checkpoint {self.path}"

    def run_collectively(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on every rank and return its result; raises on all ranks if it raises on one."""
        return run_collectively(self.comm, self.what, action)


class ShardFolder(Folder):
    """The folder of a run with sharded model states."""

    def load(self, training: sharded.Training) -> list[Epoch]:  # type: ignore[override]
        """As :meth:`~hpccomm.train.loop.Keeper.load`."""
        manifest = self.find()
        if manifest is None:
            return []
        note = load_shards(self.path, self.name, training.states)
        steps, loss, step_s, boundary_s = note["epoch_so_far"]
        hops = [ExchangeReport(*each) for each in note["hops"]]
        training.progress = sharded.EpochProgress(
            steps, loss if self.comm.rank == 0 else 0.0, step_s, boundary_s, Hops(*hops)
        )
        return [Epoch(**each) for each in note["epochs"]]

    def save(self, training: sharded.Training, epochs: list[Epoch]) -> None:  # type: ignore[override]
        """As :meth:`~hpccomm.train.loop.Keeper.save`; the costs of the unfinished epoch are those of rank 0."""
        spent = training.progress
        so_far = [spent.steps, float(sum(self.comm.allgather(spent.loss))), spent.step_s, spent.boundary_s]
        epochs_so_far = [epoch._asdict() for epoch in epochs]
        note = {"run": self.run, "epochs": epochs_so_far, "epoch_so_far": so_far, "hops": list(spent.hops)}
        save_shards(self.path, self.name, training.states, **note)
