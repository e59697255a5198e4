"""Schedules on messages, with the collectives inside each node in shared memory: binds records to memory.

Steps are lowered to records (:mod:`hpccomm.collectives.lowering`); what is proved and checked is what runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hpccomm.backends.base import Backend
from hpccomm.backends.interpreter import CompiledSchedule
from hpccomm.calls import operations
from hpccomm.calls.buffers import address_of
from hpccomm.calls.call import Call
from hpccomm.calls.plans import Plan, RecordCall, Run, compose
from hpccomm.collectives.engine import Action, BoundSchedule, Combine, Vector, bind_program
from hpccomm.collectives.hierarchical import Form
from hpccomm.collectives.lowering import Layout, Pipeline, lower
from hpccomm.collectives.records import Meeting, Program
from hpccomm.collectives.schedule import Algorithm, without_node_steps
from hpccomm.kernels import objects
from hpccomm.kernels.interpreter.records import SOURCE
from hpccomm.kernels.reductions.reference import code_of, has_kernel
from hpccomm.transports.mpi import MessageTransport, message_functions

IDLE_SECONDS = 2e-3
"""Seconds for which a rank without pending messages waits in shared memory before it drives MPI."""

StallHandler = Callable[[float, list[int]], None]
"""``handler(seconds, missing)`` is called while ranks of the node are missing from a call in shared memory."""


LONGEST_ROW = 1 << 16
"""Longer calls take the Python path, which costs less than their times vary."""

SEGMENT_BYTES = 1 << 17
"""Length of a segment in chains and trees when the tuning table names none."""


class OnMessages(Backend):
    """All schedules of :data:`hpccomm.collectives.ALGORITHMS`, and the hierarchical ones for the ranks' layout.

    Below ``meets_from`` bytes the extra barrier costs too much (measured: 40-60 µs on four ranks that share two cores,
    a sixth of the time of a 1 MiB ring), and mismatched tags reveal the error anyway.
    """

    name = "schedules"
    meets_from = 1 << 23

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """The names of the schedules."""
        return tuple(self.context.algorithms(collective))

    def takes(self, call: Call, algorithm: str) -> bool:
        """Whether the schedule keeps the order of the ranks, if the operation asks for that."""
        op = call.op
        ordered = op is None or op.Is_commutative() or self.context.algorithms(call.collective)[algorithm].ordered
        return call.readable and ordered

    def bind(self, call: Call) -> Plan:
        """Bind the schedule to its vector and, if it reduces, to the operand, which may be elsewhere."""
        work = WORKSPACES[call.collective](call, self.context.algorithms(call.collective)[call.choice.algorithm])
        schedules, kind, op = self.context.schedules, call.data.kind, call.op
        if schedules.memory:
            schedules.memory.stall_handler = self.planner.progress_driver()
        shared = (op is None or op.is_predefined) and schedules.serves(call.op_name or None, kind)
        form = self.form_of(call, work.vector.nbytes, shared)
        steps = form.algorithm.steps(call.rank, call.size, *(() if call.root is None else (call.root,)))
        steps = steps if shared else without_node_steps(steps, call.rank)
        layout = Layout(work.vector.size, work.vector.itemsize, form.algorithm.blocks(call.size), work.cuts)
        program = lower(steps, call.rank, layout, form.pipeline, work.source is not None and not work.enters, work.due)
        if work.enters:
            program = program.after_copy(*work.enters)
        reduction = None if op is None else Reduction(operations.combiner(op, kind), kind, call.op_name)
        bound = schedules.bind(program, work.vector, work.source, reduction, call.fingerprint.digest)
        acts = [act for act in (call.before, work.before, bound, work.after, call.after) if act]
        plain = acts == [bound] and call.nbytes <= LONGEST_ROW and not self.planner.in_lockstep
        row = None
        if plain and isinstance(bound, CompiledSchedule) and not bound.needs_python:
            row = RecordCall(call.fingerprint.word, bound, call.signature.synchronises)
        return Plan(compose(acts), bound.free, row=row, pends=True)

    def form_of(self, call: Call, nbytes: int, shared: bool) -> Form:
        """What runs for a choice: its algorithm, in segments where they make it faster."""
        name, segment_bytes = call.choice[:2]
        if name == "hierarchical":
            return self.context.hierarchical_form(call.collective, nbytes, shared)
        ours = self.context.algorithms(call.collective)[name]
        segment = segment_bytes or (SEGMENT_BYTES if ours.segmented else 0)
        return Form(ours, Pipeline(-(-nbytes // segment) if segment and nbytes else 1))


class Workspace(NamedTuple):
    """The memory on which a schedule runs."""

    vector: Vector
    source: Vector | None = None
    """The operand of a reduction, where it is not in the vector; or what is copied into it first."""
    cuts: list[int] | None = None
    """The offsets of blocks."""
    due: tuple[int, int] | None = None
    """The elements of the vector that are read afterwards; by default all."""
    enters: tuple[int, int] | None = None
    """The byte of the vector to which the source is copied first, and how many bytes."""
    before: Run | None = None
    after: Run | None = None
    """Copies to the vector and from it."""


def reduce_whole(call: Call, algorithm: Algorithm) -> Workspace:
    """The workspace of an allreduce."""
    return Workspace(call.recv.vector(), None if call.in_place else call.send.vector())


def reduce_to_root(call: Call, algorithm: Algorithm) -> Workspace:
    """The workspace of a reduce; ranks other than the root reduce into private work space."""
    if call.here:
        return reduce_whole(call, algorithm)
    source = call.send.vector()
    return Workspace(np.empty_like(source), source, due=(0, 0))


def reduce_blocks(call: Call, algorithm: Algorithm) -> Workspace:
    """The workspace of a reduce-scatter."""
    counts, order = call.counts, block_order(algorithm, call.size)
    into, source = call.recv.vector(counts[call.rank]), call.send.vector(sum(counts))
    cuts, me = cuts_of(counts, order), order.index(call.rank)
    work, due = np.empty_like(source), (cuts[me], cuts[me + 1])
    parts = [work[lo:hi] for lo, hi in pairwise(cuts)]
    blocks = list(pairwise([0, *np.cumsum(counts).tolist()]))
    sorts = order != sorted(order)
    copy_in = copier(zip(parts, (source[slice(*blocks[rank])] for rank in order), strict=True)) if sorts else None
    block = work[slice(*due)]
    copy_out = partial(np.copyto, into, block)
    return Workspace(work, None if copy_in else source, cuts, due, before=copy_in, after=copy_out)


def gather_blocks(call: Call, algorithm: Algorithm) -> Workspace:
    """The workspace of an allgather: the receive buffer, or work space if its blocks lie in another order there."""
    send, recv, (counts, displs) = call.send, call.recv, call.blocks()
    order = block_order(algorithm, call.size)
    cuts, block = cuts_of(counts, order), order.index(call.rank)
    in_order = [displs[rank] for rank in order] == cuts[:-1]
    work = recv.vector(cuts[-1]) if in_order else np.empty(cuts[-1], recv.dtype)
    source = recv.vector(counts[call.rank], displs[call.rank]) if call.in_place else send.vector(send.elements)
    first, end = cuts[block] * work.itemsize, cuts[block + 1] * work.itemsize
    enters = None if (call.in_place and in_order) or first == end else (first, end - first)
    places = [recv.vector(counts[rank], displs[rank]) for rank in order]
    copy_out = None if in_order else copier(zip(places, (work[lo:hi] for lo, hi in pairwise(cuts)), strict=True))
    return Workspace(work, source.view("u1").view(work.dtype) if enters else None, cuts, None, enters, after=copy_out)


WORKSPACES: dict[str, Callable[[Call, Algorithm], Workspace]] = {
    "allreduce": reduce_whole,
    "reduce": reduce_to_root,
    "reduce_scatter": reduce_blocks,
    "allgather": gather_blocks,
    "bcast": lambda call, algorithm: Workspace(call.recv.vector().view("u1")),
}
"""On which memory the schedules of each collective run."""


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


def block_order(algorithm: Algorithm, p: int) -> list[int]:
    """The rank of each block."""
    return list(range(p)) if algorithm.own_blocks is None else np.argsort(algorithm.own_blocks(p)).tolist()


def cuts_of(counts: tuple[int, ...], order: list[int]) -> list[int]:
    """Offsets of the blocks of these ranks, one after another."""
    return [0, *np.cumsum([counts[rank] for rank in order]).tolist()]


def copier(pairs: Iterable[tuple[Vector, Vector]]) -> Run:
    """A function that copies the second vector of each pair to the first."""
    known = [(to, source) for to, source in pairs if to.size]

    def copy() -> None:
        for to, source in known:
            to[...] = source

    return copy
