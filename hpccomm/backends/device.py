"""What the backends of arrays on a device have in common.

Such a call has buffers that describe device memory as if it were the host's; their owners are the device's arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpccomm.arrays import bfloat16
from hpccomm.backends.base import Backend
from hpccomm.calls.blocks import NONE
from hpccomm.calls.buffers import Buffer
from hpccomm.calls.call import Call
from hpccomm.transports.cuda import Extent


class DeviceBackend(Backend):
    """A backend of arrays on a device; ``planner.staging.device`` is the device.

    Making one is collective; it raises :class:`~hpccomm.errors.TransportError` on all ranks if it does not work on one.
    ``takes(call, algorithm)``: ``algorithm`` is what the caller or a setting has named for the host; empty for none.
    """

    needs_barriers = False
    """Whether a call contains more than one barrier of all ranks, which is too slow for short calls."""
    remark = ""
    """What users should know of it."""

    def __init__(self, planner: Any) -> None:
        super().__init__(planner)
        self.staging, self.device = planner.staging, planner.staging.device

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """None: a setting names it."""
        return ()

    def free(self) -> None:
        """Free its resources (collective)."""


def streams_of(call: Call) -> list[int]:
    """The streams with pending work on a call's arrays."""
    owners = [each.owner for each in (call.send, call.recv) if each.owner is not None]
    return [stream for owner in owners for stream in owner.streams]


def sides(call: Call) -> tuple[Buffer | None, Buffer | None]:
    """What this rank reads and what it writes; ``None`` for nothing."""
    form, here = call.signature, call.here
    if form.send == NONE:
        return (call.send, None) if here else (None, call.recv)
    return call.send, None if form.recv_at_root and not here else call.recv


def own_block(call: Call) -> int:
    """The first element of this rank's block in the send buffer."""
    return call.blocks()[1][call.rank] if call.gathers and call.in_place else 0


def host_dtype(buffer: Buffer) -> np.dtype[Any]:
    """The dtype of copies on the host."""
    assert buffer.dtype is not None
    if buffer.half == "bfloat16":
        return bfloat16("a device's array")
    return np.dtype(buffer.half) if buffer.half else buffer.dtype


def extent(buffer: Buffer, first: int, count: int, at: int = 0) -> Extent:
    """Elements [first, first + count), at element ``at`` of a chunk."""
    width = buffer.width
    return Extent(buffer.address + first * width, at * width, count * width)


def take_columns(buffer: Buffer, each: int, ranks: int, lo: int, hi: int) -> list[Extent]:
    """Columns [lo, hi) of all ranks' blocks of ``each`` elements, one after the other in a chunk."""
    return [extent(buffer, k * each + lo, hi - lo, k * (hi - lo)) for k in range(ranks)]
