"""A transport on the point-to-point messages of an MPI library, bound as persistent requests.

The tag of every message is the fingerprint of its call, and every receive takes any tag, so a peer in another call is
detected at the first message.  Vectors travel as bytes, in messages of at most 1 GiB, so that lengths beyond 2^31 work
on every MPI.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.transports.polling import pause

MAX_MESSAGE_BYTES = 1 << 30
"""Bytes of the longest message."""

SHORT_BYTES = 1 << 16
"""Up to so many bytes a rank may sleep while it waits: MPI libraries move a part of a longer message in each poll."""
EAGER_POLLS, EAGER_SECONDS = 50, 5e-3
"""How long a rank waits for a short message before it yields its core, and then before it sleeps."""

Vector = npt.NDArray[Any]
StrayMessageFactory = Callable[[int, int, int], Exception]
"""``stray_message_error(rank, tag, expected)``: the error for a message of ``rank`` that belongs to another call."""


class MessageTransport:
    """Messages over a private communicator; ``stray_message_error`` makes the error for a message of another call.

    ``waiters``: in a progress thread, the address of a word, the number of threads that wait for its calls.
    """

    def __init__(self, comm: MPI.Intracomm, stray_message_error: StrayMessageFactory, waiters: int = 0) -> None:
        self.comm, self.stray_message_error, self.waiters = comm, stray_message_error, waiters
        self.rank, self.size = comm.rank, comm.size
        self.tags = int(MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767)  # only this communicator must have it

    def exchange(self, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int) -> Messages:
        """Bind one outgoing and one incoming message."""
        return Messages(self, send, to, recv, source, tag % self.tags)


@cache
def message_functions() -> dict[str, int]:
    """The addresses of MPI's functions for messages; empty where they are not found."""
    names = {"isend": "MPI_Isend", "irecv": "MPI_Irecv", "test": "MPI_Test", "probe": "MPI_Iprobe"}
    found = {name: function_address(each) for name, each in names.items()}
    return found if all(found.values()) else {}


@cache
def function_address(name: str) -> int:
    """The address of one of MPI's functions; 0 if it is not found.

    It is looked for where the linker has looked for mpi4py: first in libraries for all, such as a preloaded profiler,
    then in those that mpi4py is linked with.
    """
    for library in (None, MPI.__file__):
        with contextlib.suppress(AttributeError, OSError):
            return ctypes.cast(ctypes.CDLL(library)[name], ctypes.c_void_p).value or 0
    return 0


def as_word(handle: int) -> int:
    """A handle as a word; an integer handle of MPICH may have its highest bit set."""
    return ctypes.c_int64(handle).value


@cache
def tag_place() -> tuple[int, int]:
    """Where the tag is in a status: the offset of a word, and 32 if its upper half has it."""
    status, mark = MPI.Status(), 0x1234567
    status.Set_tag(mark)
    halves = np.frombuffer(ctypes.string_at(MPI._addressof(status), MPI._sizeof(MPI.Status)), np.uint32)
    place = int(np.flatnonzero(halves == mark)[0])
    return place // 2 * 8, place % 2 * 32


class Messages:
    """A send and a receive as persistent requests."""

    def __init__(
        self, via: MessageTransport, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int
    ) -> None:
        self._via, self._source, self._tag = via, source, tag
        incoming = [via.comm.Recv_init([chunk, MPI.BYTE], source, MPI.ANY_TAG) for chunk in chunks(recv)]
        outgoing = [via.comm.Send_init([chunk, MPI.BYTE], to, tag) for chunk in chunks(send)]
        self._requests = [*incoming, *outgoing]
        self._status = MPI.Status()
        self.starts = [request.Start for request in self._requests]
        nbytes = recv.nbytes if recv is not None else 0
        self.waits = [self.arrival(request, nbytes) for request in incoming] + [each.Wait for each in outgoing]

    def arrival(self, request: MPI.Prequest, nbytes: int) -> Callable[[], None]:
        """The action that waits for a message and checks that it belongs to this call."""
        wait, status, tag = await_short if nbytes <= SHORT_BYTES else MPI.Request.Wait, self._status, self._tag

        def arrive() -> None:
            try:
                wait(request, status)
            except MPI.Exception as failure:
                if failure.Get_error_class() != MPI.ERR_TRUNCATE:
                    raise
                raise self._via.stray_message_error(self._source, status.tag, tag) from None
            if status.tag != tag:
                raise self._via.stray_message_error(self._source, status.tag, tag)

        return arrive

    def free(self) -> None:
        """Free the requests."""
        for request in self._requests:
            request.Free()
        self._requests = []


def await_short(request: MPI.Request, status: MPI.Status) -> None:
    """Wait for a short message, and leave the core to others if it is late."""
    test, polls, began = request.Test, 0, 0.0
    while not test(status):
        polls += 1
        if polls > EAGER_POLLS:
            began = began or time.monotonic()
            pause(began, EAGER_SECONDS, 32)


def chunks(vector: Vector | None) -> Iterator[Any]:
    """The vector's bytes, one chunk a message."""
    if vector is None:
        return
    octets = np.ascontiguousarray(vector).view(np.uint8) if vector.size else vector[:0].view(np.uint8)
    for first in range(0, octets.size, MAX_MESSAGE_BYTES):
        yield octets[first : first + MAX_MESSAGE_BYTES]


def mpi_name() -> str:
    """Name and version of the MPI library."""
    return " ".join((MPI.get_vendor()[0], ".".join(map(str, MPI.get_vendor()[1]))))


def probe_bytes(comm: Any, source: int, tag: int) -> int:
    """Wait for the next message of a rank and return its number of bytes."""
    status = MPI.Status()
    comm.Probe(source, tag, status)
    return status.Get_elements(MPI.BYTE)
