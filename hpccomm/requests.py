"""Persistent collectives are MPI's own requests; the ranks compare their calls when they make one.

MPI matches persistent calls at ``*_init``, so the requests may be started in any order, also by
``MPI.Prequest.Startall``.  A start compares nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from mpi4py import MPI

from hpccomm.calls import operations
from hpccomm.calls.buffers import Buffer
from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint
from hpccomm.errors import ArgumentError

SEND, RECV, BUF = "sendbuf", "recvbuf", "buf"

COMPARED: dict[str, tuple[str, ...]] = {
    "Allgather": (RECV,),
    "Allgatherv": (RECV,),
    "Allreduce": (SEND, RECV),
    "Alltoall": (RECV,),
    "Alltoallv": (),
    "Alltoallw": (),
    "Barrier": (),
    "Bcast": (BUF,),
    "Exscan": (SEND, RECV),
    "Gather": (SEND,),
    "Gatherv": (),
    "Reduce": (SEND, RECV),
    "Reduce_scatter": (SEND, RECV),
    "Reduce_scatter_block": (SEND, RECV),
    "Scan": (SEND, RECV),
    "Scatter": (RECV,),
    "Scatterv": (),
}
"""MPI's persistent collectives: the first of these buffers that is an array has the same length on all ranks."""

PER_RANK = ("Allgather", "Alltoall")
"""Collectives in which the count of a buffer's form is that of one rank."""


def compare_at_init(name: str) -> Callable[..., MPI.Prequest]:
    """The method ``<name>_init`` of a communicator."""
    native = getattr(MPI.Intracomm, f"{name}_init")
    form = inspect.signature(native)

    @wraps(native)
    def method(self: Any, *args: Any, algorithm: str | None = None, **named: Any) -> MPI.Prequest:
        given = form.bind(self, *args, **named)
        given.apply_defaults()
        return make_request(self, name, native, dict(given.arguments), algorithm)

    return method


def make_request(comm: Any, name: str, native: Callable[..., Any], given: dict[str, Any], algorithm: Any) -> Any:
    """Check the call, compare it with those of the other ranks, and let MPI make the request."""
    planner, who = comm._planner, f"rank {comm.rank}: {name}_init"
    if algorithm not in (None, "auto", "native"):
        raise ArgumentError(
            f"{who}: a persistent call is MPI's own request and cannot run algorithm={algorithm!r}: leave the "
            f"algorithm out, or call {name} in the loop"
        )
    op, root, buffers = given.get("op"), given.get("root"), {}
    if op is not None:
        given["op"] = op = operations.read_op(op, who)
    if root is not None:
        planner.check_root(root, who)
    for key in (SEND, RECV, BUF):
        if key in given and name != "Alltoallw":
            buffers[key] = read_buffer(planner, given[key], op, who)
            given[key] = buffers[key].raw
    fingerprint = describe(name, [buffers[key] for key in COMPARED[name]], comm.size, op, root)
    made: list[MPI.Prequest] = []
    planner.guard(fingerprint, lambda: made.append(native(*given.values())), True)()
    return made[0]


def read_buffer(planner: Any, given: Any, op: MPI.Op | None, who: str) -> Buffer:
    """Read and check a buffer, which belongs to MPI's library while the call runs."""
    if planner.uses_device(given):
        raise ArgumentError(f"{who}: MPI's persistent calls cannot take an array on a device: pass a copy on the host")
    buffer: Buffer = planner.read_buffer(given, who, parts=True)
    if op is not None and buffer.half:
        raise ArgumentError(f"{who}: MPI cannot reduce {buffer.kind}: cast to float32 before the call")
    if op is not None and buffer.dtype is not None:
        operations.check_defined(op, buffer.dtype, who)
    return buffer


def describe(name: str, buffers: list[Buffer], size: int, op: MPI.Op | None, root: int | None) -> Fingerprint:
    """The call as the other ranks see it."""
    data = next((each for each in buffers if each.raw is not None and each.raw is not MPI.IN_PLACE), Buffer(None))
    dtype, unknown = data.dtype or data.base, UNKNOWN if buffers else ""
    return Fingerprint(
        f"{name}_init",
        "" if op is None else operations.name_of(op),
        unknown if dtype is None else str(count_bytes(name, data, size) // dtype.itemsize),
        unknown if dtype is None else data.half or str(dtype),
        "" if root is None else str(root),
        unknown if dtype is None else data.order,
    )


def count_bytes(name: str, data: Buffer, size: int) -> int:
    """Bytes in a buffer; a count in the form of some collectives is that of one rank."""
    if name == "Allgatherv" and data.dtype is not None:
        return sum(data.blocks(size)[0]) * data.dtype.itemsize
    return data.nbytes * (size if name in PER_RANK and data.count is not None else 1)
