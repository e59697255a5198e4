"""Arguments for every collective of MPI, the same for its blocking, non-blocking and persistent form."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

N = 6
"""Elements of each rank's block."""


def numbers(rank: int, n: int = N) -> Any:
    return np.arange(n) * 5.0 + 100 * rank


def arguments(name: str, p: int, me: int, send: Any, recv: Any) -> tuple[Any, ...]:
    """The arguments of a call; ``send`` and ``recv`` hold a block for every rank."""
    spread = [N] * p, [N * k for k in range(p)]
    typed = ([N] * p, [8 * N * k for k in range(p)]), [MPI.DOUBLE] * p
    return {
        "Allgather": (send[:N], recv),
        "Allgatherv": (send[:N], [recv, *spread, MPI.DOUBLE]),
        "Allreduce": (send, recv, MPI.MAX),
        "Alltoall": (send, recv),
        "Alltoallv": ([send, *spread, MPI.DOUBLE], [recv, *spread, MPI.DOUBLE]),
        "Alltoallw": ((send, *typed), (recv, *typed)),
        "Barrier": (),
        "Bcast": (recv, p - 1),
        "Exscan": (send, recv),
        "Gather": (send[:N], recv if me == p - 1 else None, p - 1),
        "Gatherv": (send[:N], [recv, *spread, MPI.DOUBLE] if me == p - 1 else None, p - 1),
        "Reduce": (send, recv if me == p - 1 else None, "sum", p - 1),
        "Reduce_scatter": (send, recv[:N], [N] * p),
        "Reduce_scatter_block": (send, recv[:N]),
        "Scan": (send, recv),
        "Scatter": (send if me == p - 1 else None, recv[:N], p - 1),
        "Scatterv": ([send, *spread, MPI.DOUBLE] if me == p - 1 else None, recv[:N], p - 1),
    }[name]
