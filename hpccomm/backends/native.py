"""Native MPI: every collective by MPI's own algorithm."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from hpccomm.backends.base import Backend
from hpccomm.calls import operations
from hpccomm.calls.blocks import NONE, ONE, PARTS
from hpccomm.calls.buffers import Buffer, apply_displacement
from hpccomm.calls.call import Call
from hpccomm.calls.plans import NativeCall, Plan

IN_PLACE = MPI.IN_PLACE
EXTREMES = ("min", "max", "minloc", "maxloc")

INT_MAX, LARGE_COUNTS = (1 << 31) - 1, 4
"""Most elements that MPI before version 4 can count, and the first version without that limit."""


class Native(Backend):
    """MPI's own algorithms; a plan on contiguous buffers does not keep the user's array alive.

    The calls of collectives that synchronise all ranks are compared first: with counts that differ, MPI returns wrong
    sums, leaves messages behind, or (MPICH) ends the process without an exception.
    """

    name = "native"
    rewrites = False

    def algorithms(self, collective: str) -> tuple[str, ...]:
        """MPI takes every collective."""
        return (self.name,)

    def takes(self, call: Call, algorithm: str) -> bool:
        """MPI takes every call."""
        return True

    def bind(self, call: Call) -> Plan:
        """Bind MPI's method."""
        method, comm, form = getattr(MPI.Intracomm, call.name), self.planner.comm, call.signature
        buffers = {k: each for k, each in enumerate((call.send, call.recv)) if form[k] != NONE}
        lasts = all(map(has_weak_form, buffers.values()))
        in_place = call.in_place and len(buffers) == 2
        forms = [self.weak_form(call, k, in_place) if lasts else each.raw for k, each in buffers.items()]
        if in_place:
            forms[0] = IN_PLACE
        op = None if call.op is None or call.data is None else operations.on_halves(call.op, call.data.kind)
        arguments = [op if each == "op" else getattr(call, each) for each in form.arguments]
        plain = lasts and not any(each.half for each in buffers.values())
        meets = self.planner.in_lockstep or (form.synchronises and call.data is not None)
        row = NativeCall(call.fingerprint.word, self.planner.unit_lengths(call), meets) if plain else None
        return Plan(lambda: method(comm, *forms, *arguments), row=row, lasts=lasts)

    def weak_form(self, call: Call, number: int, in_place: bool) -> Any:
        """The form for mpi4py of buffer ``number`` that holds no reference to the user's array."""
        buffer = (call.send, call.recv)[number]
        if buffer.dtype is None or buffer.pair:
            return buffer.raw
        kind = call.signature.blocks_of(number, in_place)
        if kind == PARTS:
            return weak_form(buffer, buffer.blocks(call.size))
        one = apply_displacement(buffer, call.who)
        return weak_form(one, one.elements if kind == ONE else one.block_length(call.size))


def why_not_native(call: Call) -> str:
    """The reason to avoid MPI's own algorithm; empty if there is none."""
    data = call.data
    value = data.dtype[0] if data is not None and data.pair else data and data.dtype
    if call.size > 1 and call.op_name in EXTREMES and value is not None and value.kind == "f":
        return "MPI's own min and max may lose a NaN"
    return why_too_many(call)


def why_too_many(call: Call) -> str:
    """Why MPI's own reduction cannot take so many elements; mpi4py handles large counts of data movement."""
    if call.op is not None and MPI.VERSION < LARGE_COUNTS and call.data.elements > INT_MAX:
        return f"reductions of MPI {MPI.VERSION} count up to {INT_MAX} elements"
    return ""


def has_weak_form(buffer: Buffer) -> bool:
    """Whether a buffer has a form that holds no reference to the user's array."""
    return buffer.dtype is not None or buffer.weak or buffer.raw is None or buffer.raw is IN_PLACE


def weak_form(buffer: Buffer, amount: Any) -> Any:
    """A form for mpi4py that holds no reference to the user's array."""
    assert buffer.dtype is not None
    try:
        datatype = MPI.Datatype.fromcode(buffer.dtype.char)
    except (KeyError, ValueError):
        return buffer.raw
    nbytes = buffer.size * buffer.dtype.itemsize
    return [MPI.memory.fromaddress(buffer.address, nbytes, not buffer.writable), amount, datatype]
