"""What ranks that share torch's store decide once for all of them, and how they wait in it."""

from __future__ import annotations

import time
from typing import Any

from mpi4py import MPI

from hpccomm.transports.polling import LONGEST_SECONDS

COMPLETE = "complete"
"""What the first rank that has seen all ranks decides; one whose time is over decides its own number."""


def decide(store: Any, key: str, choice: str) -> str:
    """What the ranks have decided: the choice of the first one that calls this."""
    return str(store.compare_set(key, "", choice).decode())


def drive(seconds: float) -> None:
    """Drive MPI between two looks in the store: another rank may wait for a message of this one."""
    until = time.monotonic() + seconds
    while True:
        MPI.COMM_SELF.Iprobe()
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(LONGEST_SECONDS, left))
