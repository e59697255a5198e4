"""The engine binds a schedule to a vector once; the plan that results is a flat list of actions.

It is the interpreter of records (:mod:`hpccomm.collectives.lowering`) in Python: it runs on any transport, with any
operation, and where nothing is compiled; the compiled interpreter is tested against it.  A running plan looks up,
slices and checks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpccomm.collectives.lowering import Layout, Pipeline, lower
from hpccomm.collectives.records import Meeting, Program
from hpccomm.collectives.schedule import NodeStep, Step, even_cuts, without_node_steps
from hpccomm.kernels.interpreter.records import COPY, NODE, RECEIVE, REDUCE, SEND

__all__ = ["BoundSchedule", "Exchange", "Transport", "bind", "bind_program", "bind_segments", "even_cuts"]

Vector = npt.NDArray[Any]
Action = Callable[[], Any]
Combine = Callable[[Vector, Vector, Vector], Any]
"""``combine(lower, upper, out)``: ``out = lower op upper``; ``out`` is one of the two operands."""
Meet = Callable[[Meeting], Action]
"""Binds a node step to the memory of this rank."""


class Exchange(Protocol):
    """A message bound to memory: start it, then wait for it."""

    @property
    def starts(self) -> Sequence[Action]:
        """The actions that start it."""

    @property
    def waits(self) -> Sequence[Action]:
        """The actions that complete it."""

    def free(self) -> None:
        """Free the resources that the transport holds for it."""


class Transport(Protocol):
    """Moves bytes between ranks."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def exchange(self, send: Vector | None, to: int, recv: Vector | None, source: int, tag: int) -> Exchange:
        """Bind one outgoing and one incoming message; ``None`` for no message."""


class BoundSchedule:
    """A schedule bound to memory: call it any number of times, then free it."""

    def __init__(self, actions: list[Action], exchanges: list[Exchange], buffers: Sequence[Vector | None] = ()) -> None:
        self._actions = actions
        self._exchanges = exchanges
        self._buffers = buffers  # node steps know addresses only

    def __call__(self) -> None:
        """Run it once."""
        for act in self._actions:
            act()

    def free(self) -> None:
        """Free the transport's requests; the plan cannot run afterwards."""
        for exchange in self._exchanges:
            exchange.free()
        self._actions, self._exchanges = [], []


def bind(
    steps: Iterable[Step | NodeStep],
    vector: Vector,
    cuts: Sequence[int] | npt.NDArray[np.int64],
    transport: Transport,
    combine: Combine | None = None,
    tag: int = 0,
) -> BoundSchedule:
    """Bind a schedule to a vector in one segment; ``cuts`` are the b + 1 offsets of its b blocks.

    Node steps are bound as messages.
    """
    layout = Layout(vector.size, vector.itemsize, len(cuts) - 1, [int(cut) for cut in cuts])
    program = lower(without_node_steps(steps, transport.rank), transport.rank, layout)
    return bind_program(program, vector, None, transport, combine, tag)


def bind_segments(
    steps: Iterable[Step | NodeStep],
    vector: Vector,
    blocks: int,
    number: int,
    transport: Transport,
    combine: Combine | None = None,
    tag: int = 0,
) -> BoundSchedule:
    """Bind a schedule with blocks of any offsets (allreduce, bcast, reduce) to a vector in ``number`` segments."""
    layout = Layout(vector.size, vector.itemsize, blocks)
    steps = without_node_steps(steps, transport.rank)
    return bind_program(lower(steps, transport.rank, layout, Pipeline(number)), vector, None, transport, combine, tag)


def bind_program(
    program: Program,
    vector: Vector,
    source: Vector | None,
    transport: Transport,
    combine: Combine | None = None,
    tag: int = 0,
    meet: Meet | None = None,
) -> BoundSchedule:
    """Bind records to a vector, and to a source if they read one; ``meet`` binds node steps."""
    spare = np.empty(-(-program.spare_bytes // vector.itemsize), vector.dtype)
    buffers = [vector, source, spare]

    def view(buffer: int, at: int, nbytes: int) -> Vector:
        whole = buffers[buffer]
        assert whole is not None
        return whole[at // whole.itemsize : (at + nbytes) // whole.itemsize]

    actions: list[Action] = []
    exchanges: list[Exchange] = []
    pending: dict[int, Exchange] = {}
    for record in program.records.tolist():
        kind, peer, buffer, at, nbytes, request, operand, operand_at, lower_first = record
        if kind in (SEND, RECEIVE):
            memory = view(buffer, at, nbytes)
            sends = kind == SEND
            out, into = (memory, None) if sends else (None, memory)
            pending[request] = exchange = transport.exchange(
                out, peer if sends else -1, into, -1 if sends else peer, tag
            )
            exchanges.append(exchange)
            actions += exchange.starts
        elif kind == NODE:
            assert meet is not None, "a program with node steps was bound without shared memory"
            actions.append(meet(program.meetings[request]))
        elif kind == REDUCE:
            actions.append(reduction(combine, view(operand, operand_at, nbytes), view(buffer, at, nbytes), lower_first))
        elif kind == COPY:
            actions.append(copying(view(buffer, at, nbytes), view(operand, operand_at, nbytes)))
        else:
            actions += pending.pop(request).waits
    return BoundSchedule(actions, exchanges, buffers)


def reduction(combine: Combine | None, new: Vector, mine: Vector, lower: int) -> Action:
    """The action that reduces a received operand into the local one, the lower rank's on the left."""
    assert combine is not None, "a schedule that reduces was bound without an operation"
    if lower:
        return lambda: combine(new, mine, mine)
    return lambda: combine(mine, new, mine)


def copying(to: Vector, source: Vector) -> Action:
    """The action that copies."""
    return lambda: np.copyto(to, source)
