"""Shared memory of the ranks of one node (:mod:`hpccomm.backends.shared_memory`), whose barriers compare the calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from hpccomm.backends.base import Backend
from hpccomm.calls.call import Call
from hpccomm.calls.plans import Plan, Run, compose

Bind = Callable[[int], Run]
"""Binds a call with the word of its fingerprint."""


class Shared(Backend):
    """The collectives of :class:`~hpccomm.backends.shared_memory.SharedMemory`."""

    name = "shared"
    compares_itself = True

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """One, where the ranks share memory whose functions are compiled; before any is used, where they will."""
        context = self.context
        expected = context.wants_memory and context.layout.count == 1 and not context.awaits_code
        offered = context.shared_memory if context.stage else expected
        return (self.name,) if offered and collective in BINDERS else ()

    def takes(self, call: Call, algorithm: str) -> bool:
        """Whether there is a kernel for the operation; any data can be moved."""
        memory, op = self.context.shared_memory, call.op
        if memory is None or not call.readable:
            return False
        return op is None or (op.is_predefined and memory.reduces(call.op_name, call.data.kind))

    def bind(self, call: Call) -> Plan:
        """Bind a call; its row takes the lengths for which the choice holds, too."""
        bind = BINDERS[call.collective](self.context.shared_memory, call)
        shared: Any = self.planner.bind_shared(call.fingerprint, bind)
        row = shared if not (call.before or call.after) and getattr(shared, "lengths", None) else None
        if row:
            row.lengths = intersect(row.lengths, self.planner.unit_lengths(call))
        return Plan(compose([call.before, shared, call.after]), row=row)


def bind_allgather(memory: Any, call: Call) -> Bind:
    """Bind either allgather."""
    sizes, places = ([each * call.recv.width for each in amounts] for amounts in call.blocks())
    own = call.recv.address + places[call.rank] if call.in_place else call.send.address
    return partial(memory.bind_allgather, own, call.recv.address, sizes, places)


def bind_alltoall(memory: Any, call: Call) -> Bind:
    """Bind an all-to-all."""
    each = call.nbytes // call.size
    blocks = [each] * call.size, [each * k for k in range(call.size)]
    return partial(memory.bind_alltoall, call.send.address, call.recv.address, *blocks, *blocks)


def bind_reduction(method: Callable[..., Run], call: Call, count: Any, *root: int | None) -> Bind:
    """Bind a reduction."""
    return partial(method, call.send.address, call.recv.address, count, call.send.kind, call.op_name, *root)


BINDERS: dict[str, Callable[[Any, Call], Bind]] = {
    "allreduce": lambda memory, call: bind_reduction(memory.bind_allreduce, call, call.send.elements),
    "reduce": lambda memory, call: bind_reduction(memory.bind_reduce, call, call.send.elements, call.root),
    "reduce_scatter": lambda memory, call: bind_reduction(memory.bind_reduce_scatter, call, call.counts),
    "allgather": bind_allgather,
    "bcast": lambda memory, call: partial(memory.bind_bcast, call.recv.address, call.recv.nbytes, call.root),
    "alltoall": bind_alltoall,
    "barrier": lambda memory, call: memory.bind_barrier,
}
"""How :class:`~hpccomm.backends.shared_memory.SharedMemory` binds each collective."""


def intersect(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """What two ranges have in common."""
    return max(a[0], b[0]), min(a[1], b[1])
