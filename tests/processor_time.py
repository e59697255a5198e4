"""Processor time of ranks that wait: other programs on the machine only make it longer, so the least of some counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpi4py import MPI

TRIES = 5


def measure_least(comm: Any, measure: Callable[[], float], enough: float) -> float:
    """The least of at most :data:`TRIES` measurements, each the most of all ranks; the first below ``enough`` ends."""
    least = float("inf")
    for _ in range(TRIES):
        least = min(least, MPI.Intracomm(comm).allreduce(measure(), MPI.MAX))
        if least < enough:
            break
    return least
