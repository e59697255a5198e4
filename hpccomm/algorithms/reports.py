"""What a method has sent and what it waits to send: one function for the states of all methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from hpccomm.algorithms.states import parts_now
from hpccomm.errors import ArgumentError


class ExchangeReport(NamedTuple):
    """The cost of this rank's exchanges since ``init``."""

    exchanges: int = 0
    seconds: float = 0.0
    """Wall time of the exchanges, waiting for slower ranks included."""
    wire_bytes: int = 0
    """Bytes sent by this rank, from the formula of the exchange."""

    def add(self, other: ExchangeReport) -> ExchangeReport:
        """The sum of both costs."""
        return ExchangeReport(
            self.exchanges + other.exchanges, self.seconds + other.seconds, self.wire_bytes + other.wire_bytes
        )


class MessageReport(NamedTuple):
    """The messages of a rank's last step that was not skipped."""

    nbytes: int = 0
    """Bytes of the messages, or of the vector of a dense exchange."""
    elements: int = 0
    """Elements that the messages name."""
    scale: float = 0.0
    """The largest threshold or scale of the messages."""
    residual_norm: float = 0.0
    """Norm of what this rank has not sent yet."""
    skipped: int = 0
    """Steps skipped so far because a gradient was not finite."""
    path: str = ""
    """The exchange: "allgather" of messages, "two phases" of bits, "dense" allreduce, "" before the first step."""

    def add(self, other: MessageReport) -> MessageReport:
        """Both as one: the exchanges of one step."""
        paths = [each for each in (self.path, other.path) if each]
        return MessageReport(
            self.nbytes + other.nbytes,
            self.elements + other.elements,
            max(self.scale, other.scale),
            math.hypot(self.residual_norm, other.residual_norm),
            self.skipped + other.skipped,
            ", ".join(dict.fromkeys(paths)),
        )


class Report(NamedTuple):
    """What :func:`report` returns: the cost since ``init``, and the messages of the last step."""

    cost: ExchangeReport
    messages: MessageReport


def report(state: Any) -> Report:
    """The cost and the last messages of the state of any method, at any depth of chains.

    A state's type says what it sent by a method ``messages()``; costs are its fields of :class:`ExchangeReport`.  The
    copy of a state that a block of local steps began from (``inner_start``) does not count.

    >>> from mpi4py import MPI
    >>> from hpccomm import chain, mean, momentum
    >>> report(chain(mean(MPI.COMM_SELF), momentum(0.9)).init(np.zeros(3))).cost.wire_bytes
    0
    """
    if not isinstance(state, tuple | np.ndarray | int | float) and not hasattr(state, "dtype"):
        raise ArgumentError(
            f"report: this {type(state).__name__} is no state: pass what a method's init or update returns"
        )
    cost, messages = ExchangeReport(), MessageReport()
    for each in costs(state):
        cost = cost.add(each)
    for found in message_reports(state):
        messages = messages.add(found)
    return Report(cost, messages)


def costs(state: Any) -> Iterator[ExchangeReport]:
    """Every cost inside a state."""
    if isinstance(state, ExchangeReport):
        yield state
    elif isinstance(state, tuple):
        for each in parts_now(state):
            yield from costs(each)


def message_reports(state: Any) -> Iterator[MessageReport]:
    """The messages of every exchange inside a state, the outermost that knows."""
    if hasattr(state, "messages"):
        yield state.messages()
    elif isinstance(state, tuple):
        for each in parts_now(state):
            yield from message_reports(each)


def norm_of(vector: Any) -> float:
    """The Euclidean norm, added in float64."""
    return float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
