"""Kill ranks while they save, again and again: what can be loaded is the old set or the new one, never a mixture.

``python tests/kill_saves.py --kills 1000`` forks two ranks that save set after set, kills one of them or both after a
random time, loads, and goes on in the same folder.  At the end one save leaves one set and nothing else.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from hpccomm.algorithms.checkpoint_sets import load_set, save_set
from hpccomm.testing.ranks import run_on_ranks


class PairComm:
    """A communicator of two processes over a socket."""

    size = 2

    def __init__(self, rank: int, end: socket.socket) -> None:
        self.rank, self.pipe = rank, Connection(end.detach())

    def allgather(self, mine: Any) -> list[Any]:
        """The objects of both."""
        self.pipe.send(mine)
        other = self.pipe.recv()
        return [mine, other] if self.rank == 0 else [other, mine]

    def bcast(self, mine: Any, root: int = 0) -> Any:
        """The object of one."""
        return self.allgather(mine)[root]


def save_for_ever(rank: int, ends: tuple[socket.socket, socket.socket], folder: Path, first: int) -> None:
    """One rank: sets of arrays that are full of the number of the set."""
    ends[1 - rank].close()
    comm, number = PairComm(rank, ends[rank]), first
    try:
        while True:
            save_set(comm, folder, "run", note={"number": number}, weights=np.full(5000, number), count=number)
            number += 1
    except (EOFError, OSError):  # the other rank is dead
        os._exit(0)


def start(folder: Path, first: int) -> list[int]:
    """Fork both ranks."""
    ends, pids = socket.socketpair(), []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                save_for_ever(rank, ends, folder, first)
            finally:
                os._exit(1)
        pids.append(pid)
    for end in ends:
        end.close()
    return pids


def load_number(folder: Path) -> int:
    """The number of the set; raises where it is not one set."""
    like = {"weights": np.zeros(5000, int), "count": 0}
    numbers = {
        int(each)
        for weights, count in run_on_ranks(2, lambda comm: load_set(comm, folder, "run", **like))
        for each in (*np.unique(weights), count)
    }
    (number,) = numbers
    return number


def run(kills: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Kill, load, go on; returns how often what was found."""
    draw, found, number = random.Random(seed), Counter[str](), 0
    run_on_ranks(2, lambda comm: save_set(comm, folder, "run", weights=np.zeros(5000, int), count=0))
    for _ in range(kills):
        pids = start(folder, number + 1)
        time.sleep(draw.uniform(0, 0.1))
        for pid in draw.choice([pids, pids[:1], pids[1:]]):
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
        after = load_number(folder)
        assert after >= number, f"set {after} after {number}"
        found["the old set" if after == number else "a newer set"] += 1
        found["leftovers"] += len(os.listdir(folder)) - 3
        found["most files at once"] = max(found["most files at once"], len(os.listdir(folder)))
        number = after
    run_on_ranks(2, lambda comm: save_set(comm, folder, "run", weights=np.zeros(5000, int), count=0))
    assert len(os.listdir(folder)) == 3, sorted(os.listdir(folder))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(dict(run(args.kills, Path(name), args.seed)))
    sys.exit(0)
