"""Bounce buffers: short calls on a new array at every step reuse one plan, at the price of a copy in and a copy out.

Binding a call takes up to a millisecond between nodes, copying 64 KB a few microseconds.  A call whose arrays recur is
bound to these arrays.  After PATIENCE calls of one kind on different arrays, one plan is bound to bounce buffers of the
same lengths, and later calls of that kind copy their data through them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from mpi4py import MPI

SHORT_BYTES = 1 << 16
"""Up to this size copying an array takes less time than binding a plan."""
PATIENCE = 2
"""Calls of one kind that are bound to the user's arrays before bounce buffers are used."""
KINDS = 128
"""Kinds of calls that are counted at a time."""


class BounceBuffers:
    """The bounce buffers of one communicator, by kind of call: its name, lengths, dtypes and arguments."""

    def __init__(self) -> None:
        self._calls: dict[Hashable, int] = {}
        self._arrays: dict[Hashable, tuple[Any, Any]] = {}
        self._own: set[int] = set()

    def run(self, kind: Hashable, call: Callable[..., None], sendbuf: Any, recvbuf: Any, rest: tuple[Any, ...]) -> bool:
        """Make a call on bounce buffers with the arguments ``rest``; ``False`` if the call must be bound instead.

        Buffers are plain arrays, ``IN_PLACE`` or ``None``.  ``recvbuf`` is copied in as well as out.
        """
        if (
            np.ndarray not in (type(sendbuf), type(recvbuf))
            or not (fits(sendbuf) and fits(recvbuf))
            or id(recvbuf) in self._own
            or id(sendbuf) in self._own
        ):
            return False
        if isinstance(recvbuf, np.ndarray) and not recvbuf.flags.writeable:
            return False  # an error, or the root of a broadcast
        in_place = sendbuf is recvbuf
        if not in_place and np.ndarray is type(sendbuf) is type(recvbuf) and np.may_share_memory(sendbuf, recvbuf):
            return False  # an error, or in place by other names
        kind = (kind, None if in_place else lengths(sendbuf), lengths(recvbuf))
        known = self._arrays.get(kind)
        if known is None:
            if not self.count_call(kind):
                return False
            into = empty_like(recvbuf)
            known = self._arrays[kind] = (into if in_place else empty_like(sendbuf), into)
            self._own.update(id(each) for each in known if type(each) is np.ndarray)
        source, into = known
        if source is not into:
            copy_array(source, sendbuf)
        copy_array(into, recvbuf)
        call(source, into, *rest)
        copy_array(recvbuf, into)
        return True

    def count_call(self, kind: Hashable) -> bool:
        """Count a call; whether bounce buffers should serve its kind from now on."""
        if len(self._calls) >= KINDS:
            self._calls.clear()
            self._arrays.clear()
            self._own.clear()
        self._calls[kind] = calls = self._calls.get(kind, 0) + 1
        return calls > PATIENCE


def fits(buffer: Any) -> bool:
    """Whether a buffer is a short contiguous array, or no array."""
    if type(buffer) is np.ndarray:
        return bool(buffer.nbytes <= SHORT_BYTES and buffer.flags.c_contiguous)
    return buffer is None or buffer is MPI.IN_PLACE


def lengths(buffer: Any) -> Hashable:
    """Length and dtype, which a bounce buffer must share with the user's array."""
    return (buffer.size, buffer.dtype) if type(buffer) is np.ndarray else buffer is None


def empty_like(buffer: Any) -> Any:
    """An array of the same length and dtype; ``IN_PLACE`` and ``None`` are returned as they are."""
    return np.empty(buffer.size, buffer.dtype) if type(buffer) is np.ndarray else buffer


def copy_array(to: Any, source: Any) -> None:
    """Copy an array; ``IN_PLACE`` and ``None`` are ignored."""
    if type(to) is np.ndarray:
        to.reshape(-1)[...] = source.reshape(-1)
