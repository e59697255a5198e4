"""Plans: calls that are ready to run, how they are found again, and what makes two calls the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls.buffers import numpy_dtype, read
from hpccomm.errors import ArgumentError

IN_PLACE = MPI.IN_PLACE

address = MPI.Get_address

Run = Callable[[], None]


class Plan:
    """A call that is ready to run."""

    __slots__ = ("free", "result", "run")

    def __init__(self, run: Run, free: Run | None = None, result: Any = None) -> None:
        self.run = run
        self.free = free or (lambda: None)
        self.result = result
        """What the call returns, where it returns something."""


CachedCall = tuple[Run, int, MPI.Op | None, str | None, "np.dtype[Any]", tuple[Any, ...]]
"""A call that was made before with the very same objects: what runs it; the identity of what is sent, the operation and
the algorithm; the dtype of what is received (else sent: arrays can be given another one in place); and what keeps the
identities true, since an entry goes when its arrays go.  A plain tuple: it is taken apart in half the time."""


IDENTITY_TYPES = (np.ndarray, type(MPI.IN_PLACE), type(None))
"""What is told by its identity: a form is a new list at every call, and may say something else."""


class PlanCache(dict[Hashable, CachedCall]):
    """Calls found by the identity of their arguments, the quickest way there is; keeps no array alive."""

    def store(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op | None, algorithm: str | None, run: Run
    ) -> None:
        """Find this call by its arguments from now on; ``key`` names the collective and ``recvbuf``'s identity."""
        if type(sendbuf) not in IDENTITY_TYPES or type(recvbuf) not in IDENTITY_TYPES:
            return
        if op is not None and not op.is_predefined:
            return
        arrays = [each for each in (sendbuf, recvbuf) if isinstance(each, np.ndarray)]
        watches = tuple(weakref.ref(each, lambda _: self.pop(key, None)) for each in arrays)
        dtype = (sendbuf if recvbuf is None else recvbuf).dtype
        self[key] = (run, id(sendbuf), op, algorithm, dtype, watches)


def call_key(name: str, sendbuf: Any, recvbuf: Any, *rest: Any) -> Hashable:
    """What makes two calls of one communicator the same; ``None`` for what is to be bound each time, or refused.

    That is what is not contiguous, of a derived datatype or of none, or on a device.
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
    """mpi4py's forms and other libraries' arrays: where they lie, and what they say.  Raises where that is not all."""
    data = buffer[0] if isinstance(buffer, list | tuple) and buffer else buffer
    if type(data) is np.ndarray and data is not buffer:
        return (address(data), data.size, data.dtype, data.flags.num, *map(member_key, buffer[1:]))
    known = read(buffer, "")
    if known.opaque or isinstance(data, np.generic):  # a number of NumPy's is copied to be read
        raise ValueError
    form = (known.count, known.counts, known.displs)
    return (known.address, known.size, known.dtype, known.half, known.writable, known.order, *form)


def member_key(member: Any) -> Hashable:
    """What follows the data in one of mpi4py's forms; raises for a datatype that NumPy does not know."""
    if isinstance(member, MPI.Datatype):
        return DTYPES.get(member.handle) or find_dtype(member)
    if isinstance(member, list | tuple | np.ndarray):
        return tuple(map(member_key, member))
    return member  # type: ignore[no-any-return]


DTYPES: dict[int, np.dtype[Any]] = {}
"""Of MPI's own datatypes, which are never freed, by their handles."""


def find_dtype(datatype: MPI.Datatype) -> np.dtype[Any]:
    """NumPy's name of a datatype, from now on at hand; raises for one that it does not know."""
    dtype = numpy_dtype(datatype)
    if dtype is None:
        raise ValueError
    DTYPES[datatype.handle] = dtype
    return dtype
