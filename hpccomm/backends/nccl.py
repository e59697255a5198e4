"""NVIDIA's NCCL for dense collectives between devices, through ``cupy.cuda.nccl``.

NCCL reduces integers, and computes sums and products of float32 and float64.  It is not used for 16-bit floats, whose
sums it rounds at every step, nor for minima and maxima of floats, which may lose a NaN.  Data movement is in bytes.
All calls run on one private stream; a call returns when its result is complete.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from hpccomm.backends.device import DeviceBackend, extent, own_block, streams_of
from hpccomm.calls.call import Call
from hpccomm.calls.plans import Plan
from hpccomm.errors import TransportError
from hpccomm.kernels.reductions.reference import FLOATS, code_of
from hpccomm.transports.cuda import TRANSPORT, Device, Ranks, wait

TYPES = {
    "i1": "NCCL_INT8",
    "u1": "NCCL_UINT8",
    "i4": "NCCL_INT32",
    "u4": "NCCL_UINT32",
    "i8": "NCCL_INT64",
    "u8": "NCCL_UINT64",
    "f4": "NCCL_FLOAT32",
    "f8": "NCCL_FLOAT64",
}
OPERATIONS = {"sum": "NCCL_SUM", "prod": "NCCL_PROD", "min": "NCCL_MIN", "max": "NCCL_MAX"}

SHARING, SHARED_SINCE = "NCCL_MULTI_RANK_GPU_ENABLE", 23000
"""The variable that lets ranks share a device, and the first NCCL version that supports it, 2.30."""


def library() -> Any:
    """CuPy's NCCL module; raises TransportError if there is no NCCL."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise TransportError(f"CuPy has no NCCL: {error}") from None
    if not getattr(nccl, "available", False):
        raise TransportError("CuPy finds no NCCL: pip install nvidia-nccl-cu12 or nvidia-nccl-cu13")
    return nccl


def can_share_device(nccl: Any) -> bool:
    """Whether ranks may share a device."""
    return bool(nccl.get_version() >= SHARED_SINCE and os.environ.get(SHARING) == "1")


def reduces(op: str, code: str) -> bool:
    """Whether NCCL's reduction matches our definition."""
    return code in TYPES and op in OPERATIONS and (op in ("sum", "prod") or code not in FLOATS)


class Nccl:
    """An NCCL communicator; creating it is collective and raises TransportError on all ranks or none."""

    def __init__(self, device: Device, ranks: Ranks, nccl: Any) -> None:
        self.device, self.rank, self.size, self.nccl = device, ranks.rank, ranks.size, nccl
        self.stream, trouble = device.create_stream(), ""
        unique_id = ranks.bcast(nccl.get_unique_id() if ranks.rank == 0 else None)
        device.use(device.number)
        try:
            self.comm = nccl.NcclCommunicator(ranks.size, unique_id, ranks.rank)
        except RuntimeError as error:
            trouble = f"rank {ranks.rank}: {error}"
        troubles = [words for words in ranks.allgather(trouble) if words]
        if troubles:
            raise TransportError(f"NCCL does not work between these ranks: {troubles[0]}")

    def run(self, body: Callable[[Nccl], None], streams: Iterable[int]) -> None:
        """Run a collective; ``streams`` have pending work on the arrays."""
        wait(self.device, streams)
        body(self)
        self.device.synchronize(self.stream)

    def free(self) -> None:
        """Destroy the NCCL communicator (collective)."""
        self.comm.destroy()

    def _nccl_types(self, code: str, op: str) -> tuple[int, int]:
        """NCCL's constants for a dtype and an operation."""
        return getattr(self.nccl, TYPES[code]), getattr(self.nccl, OPERATIONS[op])

    @property
    def _octet(self) -> int:
        return int(self.nccl.NCCL_UINT8)

    # Collectives on addresses

    def allreduce(self, send: int, recv: int, n: int, code: str, op: str) -> None:
        """Allreduce of n elements."""
        self.comm.allReduce(send, recv, n, *self._nccl_types(code, op), self.stream)

    def reduce(self, send: int, recv: int, n: int, code: str, op: str, root: int) -> None:
        """Reduce of n elements; only the root writes ``recv``."""
        self.comm.reduce(send, recv, n, *self._nccl_types(code, op), root, self.stream)

    def reduce_scatter(self, send: int, recv: int, n: int, code: str, op: str) -> None:
        """Reduce-scatter of n elements per rank."""
        self.comm.reduceScatter(send, recv, n, *self._nccl_types(code, op), self.stream)

    def bcast(self, address: int, nbytes: int, root: int) -> None:
        """Broadcast of the root's bytes."""
        self.comm.broadcast(address, address, nbytes, self._octet, root, self.stream)

    def allgather(self, send: int, recv: int, nbytes: int) -> None:
        """Allgather of ``nbytes`` bytes per rank."""
        self.comm.allGather(send, recv, nbytes, self._octet, self.stream)

    def alltoall(self, send: int, recv: int, nbytes: int) -> None:
        """All-to-all of ``nbytes`` bytes per pair of ranks, by sends and receives in one group."""
        self.nccl.groupStart()
        try:
            for peer in range(self.size):
                self.comm.send(send + peer * nbytes, nbytes, self._octet, peer, self.stream)
                self.comm.recv(recv + peer * nbytes, nbytes, self._octet, peer, self.stream)
        finally:
            self.nccl.groupEnd()


class NcclRanks(DeviceBackend):
    """NCCL, if every rank has a device of its own, or all ranks are configured to share devices."""

    needs_barriers = True

    def __init__(self, planner: Any) -> None:
        super().__init__(planner)
        context, found, trouble = self.context, None, ""
        comm = context.private_comm
        try:
            found = library()
        except TransportError as error:
            trouble = str(error)
        place = (int(context.layout.nodes[comm.rank]), self.device.identity)
        shared = found is not None and context.settings[TRANSPORT] == "nccl" and can_share_device(found)
        everyone = comm.allgather((trouble, place, shared))
        for each, _, _ in everyone:
            if each:
                raise TransportError(each)
        places = [each for _, each, _ in everyone]
        if len(set(places)) < len(places) and not all(each for _, _, each in everyone):
            raise TransportError(
                f"ranks share a device: that requires NCCL 2.30, {SHARING}=1 and {TRANSPORT}=nccl on all ranks"
            )
        self.ranks = Nccl(self.device, comm, found)

    def takes(self, call: Call, algorithm: str) -> bool:
        """Integers, sums and products of floats, and data movement; blocks of one length."""
        if algorithm or call.name not in CALLS or (call.in_place and call.name in APART):
            return False
        return call.op is None or reduces(call.op_name, code_of(call.data.kind))

    def bind(self, call: Call) -> Plan:
        """Bind NCCL's function."""
        return Plan(partial(self.ranks.run, partial(CALLS[call.name], call=call), streams_of(call)))

    def free(self) -> None:
        """Destroy the NCCL communicator (collective)."""
        self.ranks.free()


def call_reduction(method: Callable[..., None], call: Call, count: int, *root: int | None) -> None:
    """Make a reduction; ranks that receive nothing pass any address."""
    into = (call.recv if call.here else call.send).address
    method(call.send.address, into, count, code_of(call.send.kind), call.op_name, *root)


def call_allgather(nccl: Nccl, call: Call) -> None:
    """Make an allgather."""
    mine = extent(call.send, own_block(call), call.blocks()[0][call.rank])
    nccl.allgather(mine.address, call.recv.address, mine.nbytes)


CALLS: dict[str, Callable[..., None]] = {
    "Allreduce": lambda nccl, call: call_reduction(nccl.allreduce, call, call.send.elements),
    "Reduce": lambda nccl, call: call_reduction(nccl.reduce, call, call.send.elements, call.root),
    "Bcast": lambda nccl, call: nccl.bcast(call.recv.address, call.recv.nbytes, call.root),
    "Allgather": call_allgather,
    "Alltoall": lambda nccl, call: nccl.alltoall(call.send.address, call.recv.address, call.nbytes // call.size),
    "Reduce_scatter_block": lambda nccl, call: call_reduction(nccl.reduce_scatter, call, call.counts[0]),
}
"""How each collective is called."""
APART = ("Alltoall", "Reduce_scatter_block")
"""Those that NCCL does not make in place."""
