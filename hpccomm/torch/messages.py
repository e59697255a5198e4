"""Messages between two ranks of a group, as bytes on its communicator."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch.distributed as dist
from mpi4py import MPI

from hpccomm.errors import MismatchError
from hpccomm.torch.members import find_left
from hpccomm.torch.tensors import Tensor, as_array, copy_back, find_room, read
from hpccomm.torch.works import NO_LIMIT, make_futures
from hpccomm.transports.polling import pause

EAGER_SECONDS = 1e-4
"""How long a rank that waits for a message only yields its core, before it sleeps."""
LEFT_SECONDS = 1.0
"""How long a message of a rank that has left the program may still take."""
REMEDY = "make shape and dtype the same on both ranks"
MOST_BYTES, UNIT_BYTES = (1 << 31) - 1, 1 << 20
"""The longest message whose bytes MPI counts one by one, and the unit of longer ones."""
VISITS = 2
"""How many messages under way a new message looks at."""
_under_way: dict[int, Message] = {}
"""The messages whose memory MPI uses, by their identity; their handles may be gone."""
_lock = threading.Lock()
"""Held while messages are added or taken out."""


class Message(dist.Work):
    """The handle of a message; ``finish`` is run once, after it has come or gone.

    ``limit`` is the time after which a wait raises that names none; 0 for none.
    """

    def __init__(
        self,
        request: MPI.Request,
        who: str,
        results: list[Any],
        finish: Callable[[MPI.Status], None],
        has_left: Callable[[], bool],
        limit: timedelta,
    ) -> None:
        super().__init__()
        self._request, self._who, self._results, self._finish = request, who, results, finish
        self._has_left, self._limit = has_left, limit
        self._status, self._complete = MPI.Status(), False
        self._error: Exception | None = None
        self._testing = threading.Lock()
        keep(self)

    def is_completed(self) -> bool:
        """Whether the message has come or gone."""
        if self._complete:
            return True
        with self._testing:  # a new message of another thread looks as well
            if self._complete:
                return True
            try:
                if not self._request.Test(self._status):
                    return False
                self._finish(self._status)
            except Exception as error:  # raised by wait
                self._error = self._explain(error)
            self._complete = True
        with _lock:
            _under_way.pop(id(self), None)
        return True

    def _explain(self, error: Exception) -> Exception:
        """A longer message than expected as our error."""
        if not isinstance(error, MPI.Exception) or error.Get_error_class() != MPI.ERR_TRUNCATE:
            return error
        return MismatchError(f"{self._who} got a longer message than expected: {REMEDY}")

    def is_success(self) -> bool:
        """Whether it has, without an error."""
        return self.is_completed() and self._error is None

    def exception(self) -> Exception | None:
        """The error of the message."""
        return self._error

    def result(self) -> list[Any]:
        """The tensor."""
        return self._results

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Wait until the message has come or gone; raise its error, or MismatchError after ``timeout`` or its limit."""
        began, seconds = time.monotonic(), (timeout or self._limit).total_seconds()
        while not self.is_completed():
            pause(began, EAGER_SECONDS, 8)
            if 0 < seconds < time.monotonic() - began:
                raise MismatchError(f"{self._who} timed out after {seconds:g} s: the other rank has not made its call")
            if time.monotonic() - began > LEFT_SECONDS and self._has_left() and not self.is_completed():
                raise MismatchError(f"{self._who}: the other rank has left the program without its call: make both")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """As :meth:`wait`."""
        self.wait()

    def get_future(self) -> Any:
        """A future of the tensor; asking for it waits for the message."""
        begin, future = make_futures(self._results)
        failure = None
        try:
            self.wait()
        except Exception as error:
            failure = error
        begin.set_result(failure)
        return future

    def source_rank(self) -> int:
        """The rank from which the message has come."""
        return int(self._status.source)

    _source_rank = source_rank


def keep(message: Message) -> None:
    """Keep a new message and its tensor until it has come or gone, and look whether the oldest ones have.

    Each look moves the next ones to the front, so those that nobody waits for any more are found as well.
    """
    with _lock:
        oldest = [_under_way.pop(each) for each in list(islice(_under_way, VISITS))]
        _under_way.update((id(each), each) for each in (*oldest, message))
    for each in oldest:
        each.is_completed()


def start(call: Callable[..., MPI.Request], dense: Tensor, rank: int, tag: int) -> MPI.Request:
    """Start to send or receive the bytes of a dense tensor."""
    octets = as_array(dense).view(np.uint8)
    if octets.size <= MOST_BYTES:
        return call([octets, MPI.BYTE], rank, tag)
    units, rest = divmod(octets.size, UNIT_BYTES)
    unit = MPI.BYTE.Create_contiguous(UNIT_BYTES)
    whole = MPI.Datatype.Create_struct([units, rest], [0, units * UNIT_BYTES], [unit, MPI.BYTE]).Commit()
    try:
        return call([octets, 1, whole], rank, tag)
    finally:
        whole.Free()
        unit.Free()


def send(comm: Any, tensor: Tensor, rank: int, tag: int, who: str, limit: timedelta) -> Message:
    """Start to send a tensor."""
    dense = read(tensor, who)
    request = start(comm.Isend, dense, rank, tag)
    return Message(
        request, f"{who} to rank {rank}", [tensor], lambda status: hold(dense), partial(has_left, comm, rank), limit
    )


def receive(comm: Any, tensor: Tensor, rank: int, tag: int, who: str, limit: timedelta) -> Message:
    """Start to receive a tensor."""
    dense = find_room(tensor, who)
    source = "any rank" if rank == MPI.ANY_SOURCE else f"rank {rank}"
    request = start(comm.Irecv, dense, rank, tag)

    def finish(status: MPI.Status) -> None:
        found, expected = status.Get_elements(MPI.BYTE), dense.numel() * dense.element_size()
        if found != expected:
            raise MismatchError(
                f"{who} of {expected} bytes ({dense.numel()} {dense.dtype}): rank {status.source} has sent "
                f"{found}: {REMEDY}"
            )
        copy_back(dense, tensor)

    nbytes = dense.numel() * dense.element_size()
    return Message(
        request,
        f"{who} of {nbytes} bytes ({dense.numel()} {dense.dtype}) from {source}",
        [tensor],
        finish,
        partial(has_left, comm, rank),
        limit,
    )


def has_left(comm: Any, rank: int) -> bool:
    """Whether a rank of this node, or all others for any rank, have left the program."""
    left = find_left(comm)
    return len(left) >= comm.size - 1 if rank == MPI.ANY_SOURCE else rank in left


def hold(tensor: Tensor) -> None:
    """Keep a tensor alive until here."""
