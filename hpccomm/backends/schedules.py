"""Schedules on messages, with the collectives inside each node in shared memory: binds records to memory.

Steps are lowered to records (:mod:`hpccomm.collectives.lowering`); what is proved and checked is what runs here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from hpccomm.backends.interpreter import CompiledSchedule
from hpccomm.calls.buffers import address_of
from hpccomm.collectives.engine import Action, BoundSchedule, Combine, Vector, bind_program
from hpccomm.collectives.records import Meeting, Program
from hpccomm.kernels import objects
from hpccomm.kernels.interpreter.records import SOURCE
from hpccomm.kernels.reductions.reference import code_of, has_kernel
from hpccomm.transports.mpi import MessageTransport, message_functions

IDLE_SECONDS = 2e-3
"""Seconds for which a rank without pending messages waits in shared memory before it drives MPI."""

StallHandler = Callable[[float, list[int]], None]
"""``handler(seconds, missing)`` is called while ranks of the node are missing from a call in shared memory."""


class Reduction(NamedTuple):
    """What a reduction applies to two vectors."""

    combine: Combine
    kind: str
    """The elements."""
    op: str
    """The operation's name."""

    @property
    def fold(self) -> int:
        """The address of its kernel; 0 if it has none."""
        return objects.fold(self.op, code_of(self.kind)) if has_kernel(self.op, self.kind) else 0


class Schedules:
    """Binds records; ``memory`` is shared by the ranks of this node, ``None`` where node steps are messages.

    ``memory.stall_handler`` must drive messages while ranks of the node are missing.
    """

    def __init__(self, memory: Any, transport: MessageTransport) -> None:
        self.memory, self.transport = memory, transport

    def serves(self, op: str | None, kind: str) -> bool:
        """Whether the ranks of a node can reduce in shared memory; without ``op``, whether they share any."""
        return self.memory is not None and (op is None or bool(self.memory.reduces(op, kind)))

    def bind(
        self, program: Program, vector: Vector, source: Vector | None, reduction: Reduction | None, digest: int
    ) -> BoundSchedule | CompiledSchedule:
        """Bind a program to a vector and the operand of a reduction, where it is not in the vector.

        ``digest`` is that of the call's fingerprint.
        """
        node_steps = NodeSteps(self.memory, self.transport.rank, vector, source, reduction, digest)
        combine = reduction.combine if reduction else None
        if not self.runs_compiled(program):
            return bind_program(program, vector, source, self.transport, combine, digest, node_steps.bind)
        meetings = [node_steps.bind(meeting) for meeting in program.meetings]
        fold = reduction.fold if reduction else 0
        return CompiledSchedule(program, vector, source, self.transport, digest, fold, combine, meetings)

    def runs_compiled(self, program: Program) -> bool:
        """Whether there is compiled code for everything in a program; each rank may answer for itself."""
        if program.meetings and not self.memory.compiled:
            return False
        return bool(message_functions()) and objects.complete()


class NodeSteps(NamedTuple):
    """Binds the node steps of one program."""

    memory: Any
    rank: int
    vector: Vector
    source: Vector | None
    reduction: Reduction | None
    digest: int

    def bind(self, meeting: Meeting) -> Action:
        """Bind a collective inside the node; with one part a reduce or a broadcast."""
        bind = self.bind_gather if meeting.collective == "allgather" else self.bind_reduction
        return bind(meeting, address_of(self.vector), meeting.members.index(self.rank))

    def bind_gather(self, meeting: Meeting, base: int, mine: int) -> Action:
        """Give every part to all ranks."""
        memory, root = self.memory, meeting.only
        if root < 0:
            at = base + meeting.first[mine]
            bound: Action = memory.bind_allgather(at, base, meeting.nbytes, meeting.first, self.digest)
            return bound
        patient = delay_stall_handler(memory.stall_handler)
        bound = memory.bind_bcast(base + meeting.first[root], meeting.nbytes[root], root, self.digest, patient)
        return bound

    def bind_reduction(self, meeting: Meeting, base: int, mine: int) -> Action:
        """Reduce every part to its rank."""
        assert self.reduction is not None, "a schedule that reduces was bound without an operation"
        operand = self.source if meeting.operand == SOURCE else self.vector
        assert operand is not None
        memory, root, kind, op = self.memory, meeting.only, self.reduction.kind, self.reduction.op
        counts = [nbytes // self.vector.itemsize for nbytes in meeting.nbytes]
        first = meeting.first[root] if root >= 0 else min(meeting.first)
        send, recv = address_of(operand) + first, base + meeting.first[mine]
        if root < 0:
            bound: Action = memory.bind_reduce_scatter(send, recv, counts, kind, op, self.digest)
        else:
            bound = memory.bind_reduce(send, base + first, counts[root], kind, op, root, self.digest)
        return bound


def delay_stall_handler(handler: StallHandler) -> StallHandler:
    """The handler, called only after IDLE_SECONDS."""
    return lambda seconds, missing: handler(seconds, missing) if seconds > IDLE_SECONDS else None
