"""Native MPI: every collective by MPI's own algorithm."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from hpccomm.backends.base import Backend
from hpccomm.calls import operations
from hpccomm.calls.blocks import NONE, ONE, PARTS
from hpccomm.calls.buffers import Buffer, apply_displacement
from hpccomm.calls.call import Call
from hpccomm.calls.plans import COUNT_ARGUMENTS, NativeCall, Plan
from hpccomm.kernels.entry.records import INT_MAX
from hpccomm.transports.mpi import as_word, function_address

IN_PLACE = MPI.IN_PLACE
EXTREMES = ("min", "max", "minloc", "maxloc")

LARGE_COUNTS = 4
"""The first version of MPI that can count more than ``INT_MAX`` elements."""


IN_PLACE_WORD = int(MPI.IN_PLACE)
ONE_VECTOR, TWO_VECTORS = (
    ("send", "recv", "count", "type", "op"),
    ("send", "count", "type", "recv", "recv_count", "type"),
)
SENT_BLOCKS, RECEIVED_BLOCKS = COUNT_ARGUMENTS[:2], COUNT_ARGUMENTS[2:]
C_ARGUMENTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("Allreduce", "Reduce_scatter_block", "Scan", "Exscan"), ONE_VECTOR),
    **dict.fromkeys(("Allgather", "Alltoall"), TWO_VECTORS),
    **dict.fromkeys(("Gather", "Scatter"), (*TWO_VECTORS, "root")),
    "Reduce": (*ONE_VECTOR, "root"),
    "Reduce_scatter": ("send", "recv", RECEIVED_BLOCKS[0], "type", "op"),
    "Bcast": ("recv", "count", "type", "root"),
    "Barrier": (),
    "Allgatherv": ("send", "count", "type", "recv", *RECEIVED_BLOCKS, "type"),
    "Alltoallv": ("send", *SENT_BLOCKS, "type", "recv", *RECEIVED_BLOCKS, "type"),
    "Gatherv": ("send", "count", "type", "recv", *RECEIVED_BLOCKS, "type", "root"),
    "Scatterv": ("send", *SENT_BLOCKS, "type", "recv", "recv_count", "type", "root"),
}
"""The arguments of MPI's functions; the communicator comes last."""


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
        row = None
        if plain:
            c_call = self.c_call(call, IN_PLACE_WORD if in_place else "send", op)
            row = NativeCall(call.fingerprint.word, self.planner.unit_lengths(call), meets, *c_call)
        return Plan(lambda: method(comm, *forms, *arguments), row=row, lasts=lasts)

    def c_call(self, call: Call, send: int | str, op: Any) -> tuple[int, tuple[int | str, ...]]:
        """MPI's function and its arguments; 0 if only mpi4py can make the call."""
        data, none = call.data, (0, ())
        known: dict[str, Any] = {"send": send, "root": call.root, "comm": as_word(self.planner.comm.handle)}
        known["op"] = as_word(op.handle) if op is not None else 0
        if call.name not in C_ARGUMENTS or (data is not None and (data.dtype is None or data.pair)):
            return none
        if data is not None:
            try:
                known["type"] = as_word(MPI.Datatype.fromcode(data.dtype.char).handle)
            except (KeyError, ValueError):
                return none
        arguments = tuple(known.get(each, each) for each in (*C_ARGUMENTS[call.name], "comm"))
        return function_address(f"MPI_{call.name}"), arguments

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
