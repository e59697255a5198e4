"""A process that becomes a rank by a placeholder: ``placeholder_rank.py RANK SIZE FOLDER END``, see the tests."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from hpccomm.torch import placeholders


class FolderStore:
    """A store like torch's, with a file for each key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "-")

    def set(self, key: str, value: str) -> None:
        """Set a value."""
        part = self._folder / f"part {os.getpid()}"
        part.write_text(value)
        part.rename(self._path(key))

    def get(self, key: str) -> bytes:
        """Wait for a value."""
        while not self.check([key]):
            time.sleep(0.01)
        return self._path(key).read_bytes()

    def check(self, keys: list[str]) -> bool:
        """Whether all these keys have values."""
        return all(self._path(key).exists() for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """Set a value if there is none; returns what is there."""
        part = self._folder / f"part {os.getpid()}"
        part.write_text(value)
        with suppress(FileExistsError):
            os.link(part, self._path(key))
        return self.get(key)


def main(rank: int, size: int, folder: Path, end: str) -> None:
    """Become a rank, add up, and end."""
    if end == "started" and rank == size - 1:
        from mpi4py import MPI
    if end == "broken":
        broken = ["/bin/sh", "-c", "echo no slots >&2; exit 7"]
        placeholders.launcher.launch_command = lambda *_: (broken, {})  # type: ignore[assignment]
    placeholders.join(FolderStore(folder), rank, size)
    placeholders.join(FolderStore(folder), rank, size)  # it is a rank already
    import numpy as np
    from mpi4py import MPI

    import hpccomm

    assert (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) == (rank, size)
    comm = hpccomm.Communicator(MPI.COMM_WORLD)
    assert comm.intra_node.size == size
    total = np.empty(1)
    comm.Allreduce(np.array([rank + 1.0]), total)
    assert total[0] == size * (size + 1) / 2
    with open("/proc/self/maps", encoding="utf-8") as file:
        files = {line.split()[-1] for line in file if "/dev/shm/" in line and "deleted" not in line}
    sys.stdout.write(json.dumps(sorted(files)) + "\n")
    sys.stdout.flush()
    if end == "killed" and rank == size - 1:
        os.kill(os.getpid(), 9)
    if end == "aborted" and rank == size - 1:
        MPI.COMM_WORLD.Abort(3)
    if end != "finished":
        time.sleep(60)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
