"""Plans, and the keys by which a repeated call is recognised."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.calls.buffers import DLPACK_HOST, datatype_table, read
from hpccomm.calls.operations import ByIdentity

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
    function: int = 0
    """The address of MPI's function; 0 if only mpi4py can make the call."""
    arguments: tuple[int | str, ...] = ()
    """Its arguments as words; those that vary by their names in :data:`hpccomm.backends.native.C_ARGUMENTS`."""


class RecordCall(NamedTuple):
    """A kind of call that records run: what the compiled entry must know to run it on other memory."""

    word: int
    """The word of its fingerprint."""
    schedule: Any
    """The :class:`hpccomm.backends.interpreter.CompiledSchedule`."""
    synchronises: bool
    """Whether no rank completes the call before all have begun it."""


COUNT_ARGUMENTS = ("sent_counts", "sent_places", "received_counts", "received_places")
"""Arguments of MPI's functions: an integer for each rank, which the compiled entry writes at every call."""


@dataclass(slots=True, eq=False)
class Plan:
    """A call that is ready to run; on messages it runs a :class:`hpccomm.collectives.engine.BoundSchedule`."""

    run: Run
    free: Run = lambda: None
    result: Any = None
    """The return value of the call, if it has one."""
    row: Any = None
    """From which the compiled entry makes a row for other calls of the kind: a call in shared memory, a
    :class:`NativeCall` or a :class:`RecordCall`."""
    text: int = 0
    """The number of its text in the flight recorder; 0 without one."""
    lasts: bool = True
    """Whether it may be kept: it holds no reference to the user's arrays."""
    pends: bool = False
    """Whether an error may leave messages pending, which need the user's memory."""


KEPT: list[Any] = []
"""The memory of messages that were pending when a call ended with an error."""


def compose(moves: Sequence[Run | None]) -> Run:
    """One function that runs all moves in order."""
    acts = [move for move in moves if move is not None]
    if len(acts) == 1:
        return acts[0]

    def run() -> None:
        for act in acts:
            act()

    return run


def call_key(name: str, sendbuf: Any, recvbuf: Any, *rest: Any) -> Hashable:
    """The key of a call in its communicator's cache; ``None`` for a call that is bound each time, or refused.

    Such a call has a buffer that is not contiguous or lies on a device.
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
    except (AttributeError, BufferError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def form_key(buffer: Any) -> Hashable:
    """The key of mpi4py's forms and of other libraries' arrays; raises for buffers that a key cannot describe."""
    data = buffer[0] if isinstance(buffer, FORMS) and buffer else buffer
    if type(data) is np.ndarray and data is not buffer:
        members = member_key(buffer[1]) if len(buffer) == 2 else tuple([member_key(each) for each in buffer[1:]])
        return (address(data), data.size, data.dtype, data.flags.num, members)
    if isinstance(data, np.generic):  # it is copied whenever it is read
        raise ValueError
    return (*data_key(data), *(() if data is buffer else map(member_key, buffer[1:])))


def data_key(data: Any) -> tuple[Any, ...]:
    """The key of an object with the buffer protocol, or of a tensor on the host; raises for any other."""
    try:
        view = memoryview(data)
    except TypeError:
        if data.__dlpack_device__()[0] != DLPACK_HOST:
            raise
        return (type(data), *tensor_key(data))
    return (type(data), address(data), view.nbytes, view.format, view.readonly, view.c_contiguous)


def tensor_key(tensor: Any) -> tuple[Any, ...]:
    """The key of a tensor on the host; raises for one that a key cannot describe."""
    known = read(tensor, "")
    if known.opaque:
        raise ValueError
    return (known.address, known.size, known.dtype, known.half, known.order, known.writable)


def member_key(member: Any) -> Hashable:
    """The key of a member after the data of a form; a tuple of counts and displacements is no list of counts."""
    if isinstance(member, MPI.Datatype):
        return datatype_table().get(member.handle) or ByIdentity(member)
    if isinstance(member, SEQUENCES):
        members = tuple(member)
        plain = all(type(each) is int for each in members)
        return isinstance(member, tuple), members if plain else tuple(map(member_key, members))
    return member if member is None or isinstance(member, str) else operator.index(member)  # a float is no count


FORMS = (list, tuple)
SEQUENCES = (*FORMS, np.ndarray, range)
