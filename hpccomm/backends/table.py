"""The backends.  To add one is to write a :class:`~hpccomm.backends.base.Backend` and to add a row here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from hpccomm.backends.base import Backend
from hpccomm.backends.native import Native
from hpccomm.backends.pairwise import Pairwise
from hpccomm.backends.schedules import OnMessages
from hpccomm.backends.shared import Shared


class Row(NamedTuple):
    """How to make a backend for a planner; on a device that is collective, and may raise TransportError."""

    make: Callable[[Any], Backend]
    on_device: bool = False
    """Whether it takes calls on a device's arrays, and no others."""


def later(module: str, name: str) -> Callable[[Any], Backend]:
    """How to make a backend of a module that is imported when it is first used."""

    def make(planner: Any) -> Backend:
        made: Backend = getattr(import_module(f"hpccomm.backends.{module}"), name)(planner)
        return made

    return make


BACKENDS = {
    "native": Row(Native),
    "shared": Row(Shared),
    "schedules": Row(OnMessages),
    "pairwise": Row(Pairwise),
    "nccl": Row(later("nccl", "NcclRanks"), on_device=True),
    "ipc": Row(later("cuda_ipc", "CudaIpc"), on_device=True),
    "aware": Row(later("mpi_device", "CudaAwareMpi"), on_device=True),
    "staged": Row(later("staged", "Staged"), on_device=True),
}
"""A communicator makes its objects of the rows for the host at once, those for a device at the first use of one.

On the host the tuning table chooses between the algorithms of all that take a call; on a device the order is that of
preference for long calls, and names are those of ``HPCCOMM_GPU_TRANSPORT``.
"""
