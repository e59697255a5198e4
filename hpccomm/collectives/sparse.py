"""Collectives whose messages differ in length: byte messages of all ranks.

*p ranks.*  :func:`gather_messages`: two collectives, first the p lengths (8 bytes each), then the messages.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.errors import ArgumentError

Octets = npt.NDArray[np.uint8]

LONGEST = (1 << 31) - 1
"""Bytes that one call of MPI 3 gathers."""


def gather_messages(comm: Any, message: Octets) -> list[Octets]:
    """The messages of all ranks in rank order, on every rank (collective).

    ``message``: flat uint8, of any length, which may differ between ranks and be 0.  ``comm``: anything with mpi4py's
    ``Allgather`` and ``Allgatherv``.  A rank's message goes to p - 1 others: 8 + its length bytes to each.  What is
    returned may be written; all parts lie in one block of memory.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before a message moves, where a rank's is not flat
    uint8.
    """
    fits = isinstance(message, np.ndarray) and message.dtype == np.uint8 and message.ndim == 1
    lengths = np.empty(comm.size, np.int64)
    comm.Allgather(np.array([message.size if fits else -1], np.int64), lengths)
    if (lengths < 0).any():
        raise ArgumentError(
            f"gather_messages: rank {int(np.argmin(lengths))} brings no flat uint8 array: pass message.view(np.uint8)"
        )
    if int(lengths.sum()) <= LONGEST:
        return gathered(comm, np.ascontiguousarray(message), lengths)
    return gathered_in_pieces(comm, message, lengths)


def gathered(comm: Any, message: Octets, lengths: npt.NDArray[np.int64]) -> list[Octets]:
    """Messages of known lengths in one call."""
    room = np.empty(int(lengths.sum()), np.uint8)
    comm.Allgatherv(message, [room, [int(each) for each in lengths]])
    return np.split(room, np.cumsum(lengths)[:-1])


def gathered_in_pieces(comm: Any, message: Octets, lengths: npt.NDArray[np.int64]) -> list[Octets]:
    """Messages of known lengths in as many calls as their sum needs."""
    piece = max(1, LONGEST // comm.size)
    found: list[list[Octets]] = [[] for _ in range(comm.size)]
    for start in range(0, int(lengths.max()), piece):
        now = np.clip(lengths - start, 0, piece)
        mine = np.ascontiguousarray(message[start : start + piece])
        for parts, part in zip(found, gathered(comm, mine, now), strict=True):
            parts.append(part)
    return [np.concatenate(parts) for parts in found]
