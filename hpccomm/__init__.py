"""Faster, safer collectives and gradient synchronisation for training on MPI clusters.

Importing this starts no MPI and loads no CuPy, PyTorch or Numba: every name is fetched from its home when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hpccomm.errors import (
    ArgumentError,
    HpccommError,
    LaunchError,
    MismatchError,
    ScheduleError,
    TransportError,
)

if TYPE_CHECKING:
    from hpccomm.algorithms.exchange import mean, synchronous_adam, synchronous_sgd
    from hpccomm.algorithms.transforms import (
        Transform,
        adam,
        chain,
        clip,
        every,
        momentum,
        scale,
        scale_by_schedule,
        weight_decay,
    )
    from hpccomm.buckets import Bucket
    from hpccomm.communicator import Communicator
    from hpccomm.functional import allgather, allreduce, broadcast, reduce_scatter
    from hpccomm.topology import Topology

__version__ = "0.1.0"

_HOMES = {
    "hpccomm.communicator": ("Communicator",),
    "hpccomm.topology": ("Topology",),
    "hpccomm.functional": ("allgather", "allreduce", "broadcast", "reduce_scatter"),
    "hpccomm.buckets": ("Bucket",),
    "hpccomm.algorithms.transforms": (
        "Transform",
        "adam",
        "chain",
        "clip",
        "every",
        "momentum",
        "scale",
        "scale_by_schedule",
        "weight_decay",
    ),
    "hpccomm.algorithms.exchange": ("mean", "synchronous_adam", "synchronous_sgd"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ArgumentError",
    "Bucket",
    "Communicator",
    "HpccommError",
    "LaunchError",
    "MismatchError",
    "ScheduleError",
    "Topology",
    "Transform",
    "TransportError",
    "adam",
    "allgather",
    "allreduce",
    "broadcast",
    "chain",
    "clip",
    "every",
    "mean",
    "momentum",
    "reduce_scatter",
    "scale",
    "scale_by_schedule",
    "synchronous_adam",
    "synchronous_sgd",
    "weight_decay",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hpccomm' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
