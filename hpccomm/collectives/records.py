"""Records: a schedule as one rank runs it, an array of sends, receives, waits, reductions, copies and node steps.

A record names its memory by a buffer and an offset in it, so the same records run on any addresses, and those of all
ranks can be checked without any memory (:mod:`hpccomm.collectives.check`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.interpreter.records import COPY, SOURCE, VECTOR

KINDS = ("", "send", "receive", "wait", "reduce", "copy", "node step")
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

    def after_copy(self, at: int, nbytes: int) -> Program:
        """The same after a copy of the source to byte ``at`` of the vector."""
        copy = np.array([(COPY, -1, VECTOR, at, nbytes, 0, SOURCE, 0, 0)], self.records.dtype)
        return self._replace(records=np.concatenate([copy, self.records]))
