"""A run that may be interrupted: every rank saves its part, and a note says which parts belong together.

A folder holds one file a rank for the last step that was saved, and a note in JSON that rank 0 writes when all
files lie there; only then are older ones removed.  Whatever ends a run, and whenever, the note names a whole set.
Ranks ask each other every :data:`TOGETHER` steps whether one of them has been told to stop, so that all stop
after the same step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpi4py import MPI

from hpccomm.algorithms.checkpoints import flush_folder, load, save
from hpccomm.errors import ArgumentError
from hpccomm.train.loop import Epoch, Training

TOGETHER = 16
"""Steps between two questions."""


class Folder:
    """Keeps one run (collective).

    ``run`` is what must not change between the two halves of a run, by name; ``name`` tells runs in one folder apart.
    Raises on all ranks where a folder cannot be made.
    """

    def __init__(self, comm: MPI.Intracomm, path: Path, name: str, run: dict[str, Any]) -> None:
        self.comm, self.path, self.name, self.run = comm, path, name, run
        self.told = False
        """Whether this rank has been told to stop; a signal's handler may set it."""
        self.steps = 0
        self.note = path / f"{name}.json"
        self.saved: Path | None = None
        self.everywhere(lambda: path.mkdir(parents=True, exist_ok=True))

    def tell(self, *_: object) -> None:
        """Stop after one of the next steps; serves as a signal's handler."""
        self.told = True

    def asked(self) -> bool:
        """As :meth:`~hpccomm.train.loop.Keeper.asked`."""
        self.steps += 1
        return self.steps % TOGETHER == 0 and any(self.comm.allgather(self.told))

    def load(self, training: Training) -> list[Epoch]:
        """As :meth:`~hpccomm.train.loop.Keeper.load`; raises on all ranks for the files of another run."""
        note = self.comm.bcast(self.everywhere(self.read))
        if note is None:
            return []
        self.saved = self.file(note["step"])
        like = {"weights": training.weights, "method": training.state, "partial": training.partial}
        weights, training.state, training.partial = self.everywhere(lambda: load(str(self.saved), **like))
        training.weights[...] = weights
        return [Epoch(**each) for each in note["epochs"]]

    def save(self, training: Training, epochs: list[Epoch]) -> None:
        """As :meth:`~hpccomm.train.loop.Keeper.save`."""
        each = -(-len(training.data.targets) // training.settings.batch_size)
        before = self.saved
        step = len(epochs) * each + training.partial.steps
        file = self.saved = self.file(step)
        self.everywhere(lambda: save(file, weights=training.weights, method=training.state, partial=training.partial))
        note = {"run": self.run, "step": step, "epochs": [epoch._asdict() for epoch in epochs]}
        self.everywhere(lambda: self.write(note) if self.comm.rank == 0 else None)
        if before and before != file:
            before.unlink(missing_ok=True)

    def file(self, step: int) -> Path:
        """This rank's part."""
        return self.path / f"{self.name}.step{step}.rank{self.comm.rank}.npz"

    def read(self) -> Any:
        """Rank 0's note, if there is one, for this run."""
        note = None
        if self.comm.rank == 0 and self.note.exists():
            try:
                note = json.loads(self.note.read_text(encoding="utf-8"))
                differ = {key: (value, self.run.get(key)) for key, value in note["run"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ArgumentError(f"{self.note} is no note of a saved run: name another folder") from None
            for key, (then, now) in differ.items():
                if then != now:
                    raise ArgumentError(f"{self.note} is of a run with {key} {then}, not {now}: name another folder")
        return note

    def write(self, note: dict[str, Any]) -> None:
        """The note, whole or not at all."""
        new = self.note.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump(note, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.note)
        flush_folder(self.path)

    def everywhere(self, action: Callable[[], Any]) -> Any:
        """What ``action`` returns on this rank; raises on all ranks if it raises on one."""
        found, problem = None, ""
        try:
            found = action()
        except (ArgumentError, OSError) as error:
            problem = str(error)
        for rank, each in enumerate(self.comm.allgather(problem)):
            if each:
                raise ArgumentError(f"--checkpoint {self.path}: rank {rank}: {each}")
        return found
