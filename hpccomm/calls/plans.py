"""Plans, and the keys by which a repeated call is recognised."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.calls.buffers import numpy_dtype, read
from hpccomm.errors import ArgumentError

IN_PLACE = MPI.IN_PLACE

address = MPI.Get_address

Run = Callable[[], None]


class NativeCall(NamedTuple):
    """A kind of call that MPI runs: what the compiled entry must know to compare it."""

    word: int
    """The word of its fingerprint."""
    lengths: tuple[int, int]
    """The lengths that MPI takes."""
    synchronises: bool
    """Whether ranks compare their calls before MPI moves data."""


class Plan:
    """A call that is ready to run; on messages it runs a :class:`hpccomm.collectives.engine.BoundSchedule`."""

    __slots__ = ("free", "result", "row", "run")

    def __init__(self, run: Run, free: Run | None = None, result: Any = None, row: Any = None) -> None:
        self.run = run
        self.free = free or (lambda: None)
        self.result = result
        """The return value of the call, if it has one."""
        self.row = row
        """What the compiled entry must know to make other calls of the kind: a call in shared memory or of MPI."""


def call_key(name: str, sendbuf: Any, recvbuf: Any, *rest: Any) -> Hashable:
    """The key of a call in its communicator's cache; ``None`` for a call that is bound each time, or refused.

    Such a call has a buffer that is not contiguous, has a derived or no datatype, or lies on a device.
    """
    try:
        recv: Hashable
        if type(recvbuf) is np.ndarray:
            recv = (address(recvbuf), recvbuf.size, recvbuf.dtype, recvbuf.flags.num)
        else:
            recv = None if recvbuf is IN_PLACE or recvbuf is None else form_key(recvbuf)
        if type(sendbuf) is np.ndarray:
            return (name, address(sendbuf), sendbuf.size, sendbuf.dtype, sendbuf.flags.num, recv, rest)
        send = None if sendbuf is IN_PLACE or sendbuf is None else form_key(sendbuf)
        return (name, send, recv, rest)
    except (ArgumentError, BufferError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def form_key(buffer: Any) -> Hashable:
    """The key of mpi4py's forms and of other libraries' arrays; raises for buffers that a key cannot describe."""
    data = buffer[0] if isinstance(buffer, list | tuple) and buffer else buffer
    if type(data) is np.ndarray and data is not buffer:
        return (address(data), data.size, data.dtype, data.flags.num, *map(member_key, buffer[1:]))
    known = read(buffer, "")
    if known.opaque or isinstance(data, np.generic):  # a NumPy scalar is copied when it is read
        raise ValueError
    form = (known.count, known.counts, known.displs)
    return (known.address, known.size, known.dtype, known.half, known.writable, known.order, *form)


def member_key(member: Any) -> Hashable:
    """The key of a member after the data of a form; raises for a datatype that NumPy does not know."""
    if isinstance(member, MPI.Datatype):
        return DTYPES.get(member.handle) or find_dtype(member)
    if isinstance(member, list | tuple | np.ndarray):
        return tuple(map(member_key, member))
    return member  # type: ignore[no-any-return]


DTYPES: dict[int, np.dtype[Any]] = {}
"""NumPy dtypes of MPI's predefined datatypes, which are never freed, by handle."""


def find_dtype(datatype: MPI.Datatype) -> np.dtype[Any]:
    """The NumPy dtype of a datatype, stored in :data:`DTYPES`; raises if there is none."""
    dtype = numpy_dtype(datatype)
    if dtype is None:
        raise ValueError
    DTYPES[datatype.handle] = dtype
    return dtype
