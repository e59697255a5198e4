"""A transport between ranks that are threads of one process.

A message is a copy in a queue; there is one queue for each pair of sender and receiver.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import numpy.typing as npt

from hpccomm.errors import MismatchError
from hpccomm.testing.ranks import run_on_ranks

Vector = npt.NDArray[Any]


class Mailboxes:
    """One queue for each pair of ranks."""

    def __init__(self, size: int, patience: float = 60.0) -> None:
        self.size, self.patience = size, patience
        self.boxes: dict[tuple[int, int], SimpleQueue[tuple[int, Vector]]] = {
            (source, to): SimpleQueue() for source in range(size) for to in range(size)
        }
        self.bytes_sent = [0] * size
        """Bytes that each rank has sent."""


class ThreadTransport:
    """One rank's end of the mailboxes."""

    def __init__(self, mail: Mailboxes, rank: int) -> None:
        self.mail, self.rank, self.size = mail, rank, mail.size

    def exchange(self, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int) -> ThreadExchange:
        """Bind one outgoing and one incoming message."""
        return ThreadExchange(self, send, to, recv, source, tag)


class ThreadExchange:
    """A send and a receive through the mailboxes."""

    def __init__(
        self, via: ThreadTransport, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int
    ) -> None:
        mail, rank = via.mail, via.rank

        def post() -> None:
            assert send is not None
            mail.bytes_sent[rank] += send.nbytes
            mail.boxes[rank, to].put((tag, send.copy()))

        def fetch() -> None:
            assert recv is not None
            try:
                their_tag, message = mail.boxes[source, rank].get(timeout=mail.patience)
            except Empty:
                raise TimeoutError(f"rank {rank} waited {mail.patience} s for rank {source}") from None
            if their_tag != tag or message.nbytes != recv.nbytes:
                raise MismatchError(
                    f"rank {source} sent {message.nbytes} bytes of call {their_tag}, "
                    f"rank {rank} expects {recv.nbytes} bytes of call {tag}: make the calls the same"
                )
            recv[...] = message.view(recv.dtype)

        self.starts = [post] if send is not None else []
        self.waits = [fetch] if recv is not None else []

    def free(self) -> None:
        """Free nothing: the mailboxes hold no resources."""


def run_on_threads(size: int, function: Callable[[ThreadTransport], Any], patience: float = 60.0) -> list[Any]:
    """Run ``function(transport)`` on ``size`` ranks and return the results; raises the first error."""
    mail = Mailboxes(size, patience)
    return run_on_ranks(size, lambda comm: function(ThreadTransport(mail, comm.rank)))
