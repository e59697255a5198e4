"""Reductions whose operation is a name, ``comm.Allreduce(x, y, op="avg")``, as calls with an ``MPI.Op``.

An average is a sum that each rank divides by the number of ranks: 16-bit floats in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.calls import operations
from hpccomm.calls.buffers import Buffer
from hpccomm.calls.reader import IN_PLACE, is_in_place
from hpccomm.errors import ArgumentError
from hpccomm.kernels.reductions.reference import code_of, narrow, storage, widen


def run_named(comm: Any, name: str, op: MPI.Op | str, sendbuf: Any, recvbuf: Any, **rest: Any) -> None:
    """Run ``comm.<name>(sendbuf, recvbuf, **rest)`` with the operation that ``op`` means."""
    who, planner = f"rank {comm.rank}: {name}", comm._planner
    data = recvbuf if is_in_place(sendbuf) else sendbuf
    on_device = planner.uses_device(data)
    buffer = comm._device_planner.describe(data, who) if on_device else planner.reader.read_buffer(data, who)
    meaning = operations.resolve(op, who, np.dtype("f4") if buffer.half else buffer.dtype)
    call = partial(getattr(comm, name), op=meaning.op, **rest)
    if not meaning.divides:
        call(sendbuf, recvbuf)
        return
    if buffer.opaque:
        raise ArgumentError(f"{who}: a derived datatype cannot be averaged: use op='sum' and divide")
    receives = rest.get("root", comm.rank) == comm.rank
    counts = rest.get("recvcounts")
    if on_device:
        if buffer.dtype is None or buffer.half:
            raise ArgumentError(f"{who}: {buffer.kind} on a device: use hpccomm.allreduce(x, 'avg')")
        call(sendbuf, recvbuf)
        if receives:
            comm._device_planner.divide(recvbuf)
    elif buffer.half:
        average_halves(call, buffer, None if is_in_place(sendbuf) else recvbuf, receives, planner, who, counts)
    else:
        call(sendbuf, recvbuf)
        if receives:
            result = planner.reader.read_buffer(recvbuf, who).vector()
            divide(result[: counts[comm.rank]] if counts else result, comm.size)


def average_halves(
    call: Any, data: Buffer, recvbuf: Any, receives: bool, planner: Any, who: str, counts: Sequence[int] | None
) -> None:
    """Average 16-bit floats in float32, as their sum may overflow; in place if ``recvbuf`` is ``None``."""
    in_place = receives and recvbuf is None
    wide = values_of(data)
    into = data if in_place else planner.reader.read_buffer(recvbuf, who, writable=True) if receives else None
    result = wide if in_place or not into else values_of(into)
    call(IN_PLACE if in_place else wide, result if into else None)
    if into:
        (stored, code), own = view_halves(into), slice(counts[planner.rank] if counts else None)
        divide(result[own], planner.size)
        stored[own] = narrow(result[own], code)


def view_halves(buffer: Buffer) -> tuple[npt.NDArray[Any], str]:
    """The elements of 16-bit floats as they are stored, and the code of their dtype."""
    code = code_of(buffer.half)
    return buffer.vector().view(storage(code)), code


def values_of(buffer: Buffer) -> npt.NDArray[np.float32]:
    """A float32 copy of 16-bit floats."""
    return widen(*view_halves(buffer))


def divide(result: Any, size: int) -> None:
    """Divide a result by the number of ranks; in place this also reaches input that the call has left behind it."""
    with np.errstate(all="ignore"):
        np.true_divide(result, size, out=result)
