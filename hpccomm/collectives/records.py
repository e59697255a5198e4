"""Records: a schedule as one rank runs it, an array of sends, receives, waits, reductions, copies and node steps.

A record names its memory by a buffer and an offset in it, so the same records run on any addresses, and those of all
ranks can be checked without any memory (:mod:`hpccomm.collectives.check`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

RECORD = np.dtype(
    [
        (name, np.int64)
        for name in (
            "kind",  # SEND, RECEIVE, WAIT, REDUCE, COPY or NODE
            "peer",  # SEND, RECEIVE: the other rank; WAIT: that of a receive, else -1
            "buffer",  # the memory that is sent, written or reduced into: VECTOR, SOURCE or SPARE
            "at",  # bytes from its beginning
            "nbytes",
            "request",  # SEND, RECEIVE, WAIT: the number of the request; NODE: the number of the meeting
            "operand",  # REDUCE, COPY: the buffer of the other operand
            "operand_at",  # bytes from its beginning
            "lower",  # REDUCE: 1 if the other operand is of a lower rank, and so stands on the left
        )
    ]
)

SEND, RECEIVE, WAIT, REDUCE, COPY, NODE = range(1, 7)
KINDS = ("", "send", "receive", "wait", "reduce", "copy", "node step")
VECTOR, SOURCE, SPARE = range(3)
"""The buffers: the vector in which the result is made; the operand of a reduction that is not in place; room for what
was received and is not reduced yet."""

Records = npt.NDArray[Any]


class Meeting(NamedTuple):
    """A node step as one rank runs it, on memory."""

    collective: str
    """``"reduce_scatter"`` or ``"allgather"``."""
    members: tuple[int, ...]
    """The ranks that meet."""
    first: tuple[int, ...]
    """The first byte of the part of each member."""
    nbytes: tuple[int, ...]
    """The bytes of the part of each member."""
    only: int
    """The member that alone has a part, by its number among the members; -1 if several or none have one."""
    operand: int = VECTOR
    """The buffer that a reduction reads; it writes the rank's part of the vector."""


class Program(NamedTuple):
    """What one rank runs."""

    records: Records
    meetings: tuple[Meeting, ...]
    spare_bytes: int
    requests: int
    """Requests that are pending at the same time, at most."""
