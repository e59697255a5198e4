"""CUDA IPC: the ranks of a node read each other's device memory, and no data passes through the host.

*p ranks, on one device or several; n bytes.*  Every rank has a buffer that all ranks have opened.  In a phase each rank
copies into its buffer, passes a barrier, and reads from the buffers of all ranks.  Consecutive phases use alternate
halves of the buffers, so that one barrier per phase is enough: a rank that enters the next barrier has completed its
reads of this phase.

Reductions are made in rank order, so every rank computes the same bits.  If all ranks need the whole result, up to
DIRECT_RANKS ranks each compute all of it, which moves (p + 3) n bytes per rank; more ranks divide the work and pass
a second barrier, which moves (5 + 1/p) n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hpccomm.backends.device import DeviceBackend, extent, own_block, sides, streams_of, take_columns
from hpccomm.calls.call import Call
from hpccomm.calls.plans import Plan
from hpccomm.errors import TransportError
from hpccomm.kernels.reductions.reference import code_of, has_kernel, itemsize
from hpccomm.transports.cuda import Device, Extent, Ranks, wait

BUFFER_BYTES = 64 << 20
"""Bytes of a rank's buffer, both halves."""
DIRECT_RANKS = 3
ALIGNMENT = 16
"""Bytes that the kernels read at once."""
MARK_BYTES = 64
"""Bytes that each rank writes and all ranks read to verify that memory is shared."""


class PeerCopy(NamedTuple):
    """A copy of bytes [first, first + nbytes) of a rank's buffer to an address."""

    rank: int
    first: int
    nbytes: int
    address: int


class PeerReduce(NamedTuple):
    """A reduction of bytes [first, first + nbytes) of all buffers."""

    op: str
    code: str
    """The element type, a code of :func:`hpccomm.kernels.reductions.reference.code_of`."""
    first: int
    nbytes: int
    address: int
    """The address of the result; 0 if this rank does not need it."""
    shared: bool = True
    """Whether other ranks reduce the same bytes, so that the work can be divided."""


class Phase(NamedTuple):
    """What a rank copies into its buffer, and what it then reads from all buffers."""

    reads: Sequence[Extent]
    reductions: Sequence[PeerReduce] = ()
    copies: Sequence[PeerCopy] = ()


class Peers:
    """The ranks of a node and their buffers; creating it is collective.

    Raises :class:`~hpccomm.errors.TransportError` on all ranks if it does not work on one: every rank verifies that it
    can read the marks of all others.
    """

    def __init__(self, device: Device, ranks: Ranks, nbytes: int | None = None) -> None:
        self.device, self.ranks = device, ranks
        self.room = (BUFFER_BYTES if nbytes is None else nbytes) // 2
        """Most bytes of a phase."""
        self.stream, self._phases_run = device.create_stream(), 0
        self._mine, self._buffers = 0, list[int]()
        handle, trouble = self._offer()
        offers = ranks.allgather((handle, trouble))
        trouble = next((words for _, words in offers if words), "") or self._open_peers([each for each, _ in offers])
        troubles = [words for words in ranks.allgather(trouble) if words]
        if troubles:
            self.free()
            raise TransportError(f"CUDA IPC does not work between these ranks: {troubles[0]}")

    def _offer(self) -> tuple[bytes, str]:
        """The handle of this rank's buffer, marked with its rank, or the reason why there is none."""
        try:
            self._mine = self.device.allocate(2 * self.room)
            mark = np.full(MARK_BYTES, mark_of(self.ranks.rank), np.uint8)
            self.device.to_device(self._mine, mark, self.stream)
            self.device.synchronize(self.stream)
            return (self.device.handle(self._mine) if self.ranks.size > 1 else b""), ""
        except (RuntimeError, MemoryError) as error:
            return b"", f"rank {self.ranks.rank}: {error}"

    def _open_peers(self, handles: Sequence[bytes]) -> str:
        """Open all ranks' buffers and check their marks; the reason if they cannot be read."""
        try:
            for rank, handle in enumerate(handles):
                self._buffers.append(self._mine if rank == self.ranks.rank else self.device.open(handle))
                seen = np.zeros(MARK_BYTES, np.uint8)
                self.device.to_host(seen, self._buffers[rank], self.stream)
                self.device.synchronize(self.stream)
                if (seen != mark_of(rank)).any():
                    return f"rank {self.ranks.rank} does not see what rank {rank} wrote"
        except RuntimeError as error:
            return f"rank {self.ranks.rank}: {error}"
        return ""

    def run(self, phases: Sequence[Phase], streams: Iterable[int] = ()) -> None:
        """Run all phases; ``streams`` have pending work on the arrays."""
        wait(self.device, streams)
        for phase in phases:
            self._run_phase(phase, self.room * (self._phases_run % 2))
            self._phases_run += 1
        self.device.synchronize(self.stream)

    def _run_phase(self, phase: Phase, half: int) -> None:
        """Run one phase in one half of the buffers."""
        device, buffers = self.device, [each + half for each in self._buffers]
        for address, first, nbytes in phase.reads:
            device.copy(buffers[self.ranks.rank] + first, address, nbytes, self.stream)
        self.barrier()
        for reduction in phase.reductions:
            self._reduce_all(reduction, buffers)
        for rank, first, nbytes, address in phase.copies:
            device.copy(address, buffers[rank] + first, nbytes, self.stream)

    def _reduce_all(self, reduction: PeerReduce, buffers: Sequence[int]) -> None:
        """Reduce the buffers of all ranks."""
        if not reduction.shared or len(buffers) <= DIRECT_RANKS:
            if reduction.address:
                self._reduce(reduction, buffers, 0, reduction.nbytes, reduction.address)
            return
        shares = divide_bytes(reduction.nbytes, len(buffers))
        lo, hi = shares[self.ranks.rank]
        own = buffers[self.ranks.rank] + reduction.first + lo  # no other rank reads these bytes before the barrier
        self._reduce(reduction, buffers, lo, hi, own)
        self.barrier()
        if reduction.address:
            for buffer, (lo, hi) in zip(buffers, shares, strict=True):
                self.device.copy(reduction.address + lo, buffer + reduction.first + lo, hi - lo, self.stream)

    def _reduce(self, reduction: PeerReduce, buffers: Sequence[int], lo: int, hi: int, out: int) -> None:
        """Reduce bytes [lo, hi) of a reduction."""
        n = (hi - lo) // itemsize("bfloat16" if reduction.code == "bf16" else reduction.code)
        if n:
            vectors = [buffer + reduction.first + lo for buffer in buffers]
            self.device.reduce(reduction.op, reduction.code, vectors, out, n, self.stream)

    def barrier(self) -> None:
        """Complete the pending work of all ranks."""
        self.device.synchronize(self.stream)
        self.ranks.Barrier()

    def free(self) -> None:
        """Free the buffers (collective)."""
        for rank, address in enumerate(self._buffers):
            if rank != self.ranks.rank:
                self.device.close(address)
        self.ranks.Barrier()
        if self._mine:
            self.device.release(self._mine)
        self._buffers, self._mine = [], 0


def mark_of(rank: int) -> int:
    """The byte that a rank writes into its buffer; new memory holds zeros."""
    return rank % 255 + 1


def divide_bytes(nbytes: int, ranks: int) -> list[tuple[int, int]]:
    """[lo, hi) of each rank's share of ``nbytes`` bytes, in whole elements."""
    step = -(-nbytes // (ranks * ALIGNMENT)) * ALIGNMENT
    return [(min(k * step, nbytes), min((k + 1) * step, nbytes)) for k in range(ranks)]


class CudaIpc(DeviceBackend):
    """CUDA IPC, if all ranks share one node."""

    needs_barriers = True

    def __init__(self, planner: Any) -> None:
        super().__init__(planner)
        count = self.context.layout.count
        if count > 1:
            raise TransportError(f"the ranks are on {count} nodes")
        self.peers = Peers(self.device, self.context.node)

    def takes(self, call: Call, algorithm: str) -> bool:
        """Reductions that have a kernel, and all data movement."""
        return not algorithm and (call.op is None or has_kernel(call.op_name, call.data.kind))

    def bind(self, call: Call) -> Plan:
        """Bind the phases."""
        phases = PHASES[call.collective](call, self.peers.room)
        return Plan(partial(self.peers.run, phases, streams_of(call)))

    def free(self) -> None:
        """Free the buffers (collective)."""
        self.peers.free()


def phase_ranges(count: int, bytes_each: int, room: int) -> list[tuple[int, int]]:
    """[lo, hi) of the phases of ``count`` columns; one empty phase if there are none."""
    most = max(1, room // bytes_each)
    step = most - most % ALIGNMENT or most
    return list(pairwise([*range(0, count, step), count])) or [(0, 0)]


def plan_reduce(call: Call, room: int) -> list[Phase]:
    """Reduce all vectors, on the ranks that receive."""
    send, recv = call.send, sides(call)[1]
    code, phases = code_of(send.kind), []
    for lo, hi in phase_ranges(send.elements, send.width, room):
        read = extent(send, lo, hi - lo)
        into = extent(recv, lo, hi - lo).address if recv else 0
        phases.append(Phase([read], [PeerReduce(call.op_name, code, 0, read.nbytes, into)]))
    return phases


def plan_broadcast(call: Call, room: int) -> list[Phase]:
    """Copy the root's vector."""
    data, root = call.recv, call.root
    assert root is not None
    extents = [extent(data, lo, hi - lo) for lo, hi in phase_ranges(data.elements, data.width, room)]
    if call.here:
        return [Phase([each]) for each in extents]
    return [Phase([], copies=[PeerCopy(root, 0, each.nbytes, each.address)]) for each in extents]


def plan_allgather(call: Call, room: int) -> list[Phase]:
    """Copy the blocks of all ranks."""
    (counts, displs), begin, phases = call.blocks(), own_block(call), []
    for lo, hi in phase_ranges(max(counts), call.recv.width, room):
        ends = [(min(lo, count), min(hi, count)) for count in counts]
        extents = [extent(call.recv, displ + a, b - a) for displ, (a, b) in zip(displs, ends, strict=True)]
        copies = [PeerCopy(k, 0, each.nbytes, each.address) for k, each in enumerate(extents)]
        a, b = ends[call.rank]
        phases.append(Phase([extent(call.send, begin + a, b - a)], copies=copies))
    return phases


def plan_alltoall(call: Call, room: int) -> list[Phase]:
    """Copy this rank's block of every rank."""
    p, phases, row = call.size, [], call.size * call.recv.width
    each = call.nbytes // row
    for lo, hi in phase_ranges(each, row, room):
        reads, writes = (take_columns(side, each, p, lo, hi) for side in (call.send, call.recv))
        copies = [PeerCopy(k, reads[call.rank].first, write.nbytes, write.address) for k, write in enumerate(writes)]
        phases.append(Phase(reads, copies=copies))
    return phases


def plan_reduce_scatter(call: Call, room: int) -> list[Phase]:
    """Reduce this rank's block.  In place, the result overwrites columns that have been read already."""
    counts, code, phases = call.counts, code_of(call.recv.kind), []
    first = np.cumsum([0, *counts]).tolist()
    for lo, hi in phase_ranges(max(counts), len(counts) * call.recv.width, room):
        ends = [(min(lo, count), min(hi, count)) for count in counts]
        reads = [extent(call.send, first[k] + a, b - a, k * (hi - lo)) for k, (a, b) in enumerate(ends)]
        a, b = ends[call.rank]
        result = extent(call.recv, a, b - a)
        reduction = PeerReduce(call.op_name, code, reads[call.rank].first, result.nbytes, result.address, shared=False)
        phases.append(Phase(reads, [reduction]))
    return phases


PHASES: dict[str, Callable[[Call, int], list[Phase]]] = {
    "allreduce": plan_reduce,
    "reduce": plan_reduce,
    "bcast": plan_broadcast,
    "allgather": plan_allgather,
    "alltoall": plan_alltoall,
    "reduce_scatter": plan_reduce_scatter,
}
"""The phases of each collective, each of at most so many bytes."""
