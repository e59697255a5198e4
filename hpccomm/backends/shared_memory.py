"""Collectives of ranks that share memory: faster than messages, checked before the first byte is reduced.

*p ranks on one node, r this one.*  ``node`` is a plain communicator whose ranks all share memory.  Construction,
``empty`` and ``close`` are collective.  Binding and running are not: the barrier of each call detects differences
between ranks.

::

    shared = SharedMemory(node)                        # TransportError on all ranks if the memory is not available
    shared.reduces("sum", dtype)                       # whether a kernel exists; if not, use another backend
    plan = shared.bind_allreduce(send, recv, count, dtype, "sum", fingerprint)
    plan()                                             # as often as you like; keeps no reference to the arrays

    shared.bind_reduce(…), shared.bind_bcast(…), …     # the other collectives
    shared.bind_entry_barrier(fingerprint)             # before a call on another backend; matches only its own kind

    shared.empty(shape, dtype)                         # registered: visible to all ranks, reduced without a copy
    shared.view(address, nbytes)                       # memory for one result of a registered array
    shared.stall_handler = hook(seconds, missing)      # plans bound from now on call it while ranks are missing; it
                                                       # may raise
    shared.mismatch = make(fingerprints)               # makes the error for calls that differ
    shared.peer_fingerprints()                         # the fingerprint of each rank's current or last call
    shared.close()

Addresses and counts are integers, ``op`` is one of sum prod min max land lor lxor band bor bxor, dtypes are NumPy's
or ``"bfloat16"``.  In place means equal addresses (for reduce-scatter: ``recv`` inside ``send``; for allgather:
``send`` at its own place in ``recv``).  Fingerprints are integers below 2^63 that identify a call.  A call whose
fingerprints, counts or dtypes differ raises on every rank and writes no user memory; the next call works normally.  If
an exception ends a call while it waits, all later calls raise TransportError.

An allreduce of S bytes reads and writes about 5 S in each rank, 2 S where the array is registered.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.backends.live import LiveTable
from hpccomm.errors import HpccommError, MismatchError, TransportError
from hpccomm.kernels import objects
from hpccomm.kernels.entry.records import ALLOCATION_RECORD, CHECK_MASK, CHECK_PRIME, COUNT_CHECK, TABLES
from hpccomm.kernels.reductions.reference import code_of, has_kernel, itemsize
from hpccomm.kernels.shared_memory import collectives as kernels
from hpccomm.kernels.shared_memory import memory, records
from hpccomm.kernels.shared_memory.collectives import MAX_WAIT_NS
from hpccomm.kernels.shared_memory.records import fill
from hpccomm.layout import LOCAL_SIZES
from hpccomm.performance.machine import DEFAULTS, Parameters, derive_parameters, floor_power
from hpccomm.performance.probe import Found, Place, common_place, load_once
from hpccomm.transports.segment import PAGE, SharedSegment

Plan = Callable[[], None]
StallHandler = Callable[[float, list[int]], None]

TSO_MACHINES = ("x86_64", "amd64", "i686", "s390x")
"""Machines whose processors keep stores, and loads, in order."""


class SharedMemory:
    """The collectives of the ranks of ``node`` (collective); the module docstring lists the methods.

    ``code`` is ``"auto"``, ``"compiled"`` (Numba) or ``"numpy"``; rank 0's choice holds.  A rank takes about 1 MB, less
    where there are many.  ``parameters`` are those of the machine; without them rank 0 looks for a probe of the cores
    of all ranks.  A call runs ``stall_handler`` after waiting ``patience_ns`` nanoseconds for a rank, then less and
    less often.
    """

    collectives = kernels.COLLECTIVES

    def __init__(
        self, node: Any, code: str = "auto", patience_ns: int = MAX_WAIT_NS, parameters: Parameters | None = None
    ) -> None:
        self.rank, self.size = node.Get_rank(), node.Get_size()
        self.stall_handler: StallHandler | None = None
        self.mismatch: Callable[[list[int]], Exception] = fingerprint_mismatch
        self.miss_call: Callable[[], None] = lambda: None
        """Runs where other ranks were about to begin a call on another backend, which this rank does not make."""
        self.give_reason: Callable[[BaseException], None] = lambda error: None
        """Tells the other ranks why this rank leaves a call half done."""
        self.find_reason: Callable[[int], str] = lambda rank: ""
        """Why a rank of this node has left a call half done, if it has told."""
        self._node, self.patience_ns = node, patience_ns
        secret = np.frombuffer(os.urandom(8), np.int64)
        facts = node.allgather(RankFacts.find(code, secret))
        self._compiled = agree_on_code(facts)
        cores = [each.cores for each in facts]
        self.parameters, self.trouble = find_parameters(node, cores, parameters)
        """How bytes move on this machine, the same on all ranks; and why its probe could not be used."""
        self._slot = slot_bytes(self.size, self.parameters.slot)
        self._direct = max(records.PAYLOAD_BYTES, min(records.BUFFER, self.parameters.direct // self.size))
        if self.size == 2:
            self._direct_sum = min(records.BUFFER, self.parameters.direct_of_two)
        else:
            self._direct_sum = self._direct
        self._region = records.region_record(self._slot).itemsize
        self._segment = SharedSegment(node, self.size * self._region)
        self._segment.prefault()
        self._crowded = share_cores(facts)  # ranks that share a core also share its cache
        least = self.parameters.crowded_spin
        spin = least if self._crowded else max(least, self.parameters.spin)
        self._state = np.zeros((), records.STATE_RECORD)
        fill(self._state, memory=self._segment.address, region=self._region, ranks=self.size, rank=self.rank)
        awake = kernels.CROWDED_AWAKE_NS if self._crowded else kernels.AWAKE_NS
        fill(self._state, spin=spin, spin_limit=spin, spin_least=least, awake=awake)
        fill(self._state, slot=self._slot, max_wait=patience_ns, way=self.parameters.fills_nontemporal)
        self._tree = self._plant_tree(cores)
        rows = new_tuning_table(self._slot, self.parameters, self._direct_sum)
        self._live = LiveTable(rows, self.describe()) if self.rank == 0 else None
        self._tuning = self._live.rows if self._live else rows
        self._registered: dict[int, Allocation] = {}
        self.allocations = np.zeros(MAX_ALLOCATIONS, ALLOCATION_RECORD)
        """The registered arrays, for compiled code; beyond MAX_ALLOCATIONS they are copied like others."""
        self.allocation_count = np.zeros(1, np.int64)
        self._allocations = 0
        self._first: dict[str, list[int]] = {}
        self.reaches = self._can_reach(facts)
        """Whether ranks may copy from each other's memory."""

    def _plant_tree(self, cores: Sequence[Sequence[int]]) -> npt.NDArray[np.int64]:
        """Let many ranks meet along a tree; returns the words that the state record points to."""
        if self.size <= self.parameters.flat_ranks:
            return np.zeros(0, np.int64)
        places = self._node.allgather(common_place(cores[self.rank]))
        return plant_tree(self._state, parents_of(places, self.parameters.tree_arity))

    def _can_reach(self, facts: Sequence[RankFacts]) -> bool:
        """Whether all ranks may copy from each other's memory, which a system can forbid (collective).

        Every rank looks for the secret of the next one, which that rank must keep until all have looked.
        """
        memory.store(self._segment.address + self.rank * self._region + kernels.REGION.pid, os.getpid())
        peer, seen = facts[(self.rank + 1) % self.size], np.zeros(1, np.int64)
        moved = memory.pull(peer.pid, seen.ctypes.data, peer.address, seen.nbytes)
        may: list[bool] = self._node.allgather(bool(moved == seen.nbytes and seen[0] == peer.secret))
        return all(may)

    def close(self) -> None:
        """Free the memory; plans raise from now on."""
        self._state["closed"] = 1
        if self._live:
            self._live.close()
        self._registered.clear()
        self.allocation_count[0] = 0
        self._segment.close()

    # Queries

    def describe(self) -> dict[str, Any]:
        """What holds for all calls: ranks, code, and the parameters of the machine."""
        return {"ranks": self.size, "compiled": self._compiled, "parameters": self.parameters._asdict()}

    @property
    def state_address(self) -> int:
        """The address of this rank's state record."""
        return int(self._state.ctypes.data)

    @property
    def compiled(self) -> bool:
        """Whether the kernels are machine code."""
        return self._compiled

    def reduces(self, op: str, dtype: npt.DTypeLike) -> bool:
        """Whether there is a kernel for an operation on a dtype."""
        return has_kernel(op, dtype)

    def peer_fingerprints(self) -> list[int]:
        """The fingerprint that each rank passed to the running or last call."""
        return [self._word(q, kernels.LINE.fingerprint) for q in range(self.size)]

    def own_fingerprint(self) -> int:
        """The fingerprint that this rank passed to the running or last call."""
        return self._word(self.rank, kernels.LINE.fingerprint)

    def missing_ranks(self) -> list[int]:
        """The ranks that have not arrived at the running call."""
        number = self._call_number()
        return [q for q in range(self.size) if self._word(q, kernels.LINE.number) < number]

    def last_call(self, q: int) -> tuple[int, int]:
        """The number and the fingerprint of the last call at whose barrier rank ``q`` has arrived."""
        self._check_open()
        lines = [self._segment.address + q * self._region + records.LINE_BYTES * parity for parity in (0, 1)]
        last = max(lines, key=lambda line: memory.load_acquire(line + kernels.LINE.number))
        return memory.load_acquire(last + kernels.LINE.number), memory.load_acquire(last + kernels.LINE.fingerprint)

    def _call_number(self) -> int:
        return int(self._state["calls"])

    def _word(self, q: int, offset: int) -> int:
        self._check_open()
        line = self._segment.address + q * self._region + records.LINE_BYTES * (self._call_number() & 1)
        return memory.load_acquire(line + offset)

    def _check_open(self) -> None:
        if self._state["closed"]:
            raise TransportError(f"rank {self.rank}: this shared memory is closed: make a new one")

    # Registered memory

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike = "f8") -> npt.NDArray[Any]:
        """An array in memory that all ranks can access (collective; the same shape and dtype on all ranks).

        Calls on it or on any part of it need no copies.  Its memory is freed with its last view.
        """
        self._check_open()
        kind = np.dtype(dtype)
        extent = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(extent)
        requests = self._node.allgather((extent, kind.str))
        if len(set(requests)) > 1:
            wants = "; ".join(f"local rank {rank}: {list(each[0])} {each[1]}" for rank, each in enumerate(requests))
            raise MismatchError(f"registered memory of different shapes ({wants}): ask for the same on all ranks")
        stride = -(-max(1, count * kind.itemsize) // PAGE) * PAGE
        segment = SharedSegment(self._node, stride * self.size)
        self._allocations += 1
        allocation = Allocation(self._allocations, segment.address, stride, self.rank)
        self._registered[allocation.number] = allocation
        self._list_allocations()
        weakref.finalize(segment.buffer, self.forget, allocation)
        return np.frombuffer(segment.buffer, kind, count, stride * self.rank).reshape(extent)

    def forget(self, allocation: Allocation) -> None:
        """Free the memory of an allocation whose last view is gone."""
        allocation.alive[0] = 0
        allocation.result = None
        for each in allocation.plans:
            each.result = None
        allocation.plans.clear()
        self._registered.pop(allocation.number, None)
        self._list_allocations()

    def _list_allocations(self) -> None:
        """Write the registered arrays where compiled code reads them."""
        known = list(self._registered.values())[:MAX_ALLOCATIONS]
        self.allocation_count[0] = 0
        for place, each in enumerate(known):
            ends = (each.mine, each.mine + each.stride)
            self.allocations[place] = (*ends, each.number, each.alive.ctypes.data, each.copies, each.stride)
        self.allocation_count[0] = len(known)

    def view(
        self, address: int, nbytes: int, run_together: Callable[[Callable[[], None]], None] = lambda body: body()
    ) -> tuple[SharedSegment, int, list[Any]] | None:
        """Memory for one result that all ranks share, of calls on a registered array (collective); else ``None``.

        Returns the segment, the offset in it for the result of this part of the array, and the list of plans whose
        ``result`` ends with the array.  ``run_together`` runs what sends messages, at the first call on the array.
        """
        allocation = self._allocation((address, nbytes))
        if allocation is None:
            return None
        if allocation.result is None:
            run_together(partial(allocation.make_result, self._node))
        assert allocation.result is not None
        return allocation.result, address - allocation.mine, allocation.plans

    def allocation_number(self, address: int, nbytes: int) -> int:
        """The number of the allocation that contains this rank's bytes from an address on; 0 if there is none."""
        allocation = self._allocation((address, nbytes))
        return allocation.number if allocation else 0

    def _allocation(self, *ranges: tuple[int, int]) -> Allocation | None:
        """The allocation whose copy of this rank contains all these ranges (address, bytes)."""
        for allocation in self._registered.values():
            lo, hi = allocation.mine, allocation.mine + allocation.stride
            if all(lo <= address and address + nbytes <= hi for address, nbytes in ranges):
                return allocation
        return None

    # Binding

    def bind_allreduce(
        self,
        send: int,
        recv: int,
        count: int,
        dtype: npt.DTypeLike,
        op: str,
        fingerprint: int,
        nontemporal: bool | None = None,
        once: bool = False,
    ) -> Plan:
        """``nontemporal`` writes the result with non-temporal stores: faster only if it exceeds the cache.

        ``once``: ``recv`` is the same memory on all ranks, see :meth:`view`.
        """
        nbytes = count * itemsize(dtype)
        if self.size == 1:
            return copy_plan(recv, send, nbytes)
        if nontemporal is None:
            nontemporal = send != recv and nbytes * self.size >= self.parameters.nontemporal
        call = self._reduction(("allreduce", once), dtype, op, fingerprint, nbytes)
        fill(call, once=once, nontemporal_out=nontemporal)
        self._vector(call, "allreduce", send, recv, nbytes, self._direct_sum)
        ranges = [(send, nbytes)] if once else [(send, nbytes), (recv, nbytes)]
        allocation = self._allocation(*ranges) if nbytes >= self.parameters.registered else None
        if nbytes >= self.parameters.registered and call["protocol"] == kernels.BUFFERED:
            call["protocol"] = kernels.DIRECT
        if allocation:
            fill(call, allocation=allocation.number, alive=allocation.alive.ctypes.data, copies=allocation.copies)
            recv_at = 0 if once else recv - allocation.mine
            fill(call, copy_stride=allocation.stride, send_at=send - allocation.mine, recv_at=recv_at)
        plan = self._plan("allreduce", call, nbytes, allocation)
        return plan if once else self._generalise(plan, nbytes)

    def bind_reduce(
        self, send: int, recv: int, count: int, dtype: npt.DTypeLike, op: str, root: int, fingerprint: int
    ) -> Plan:
        """Reduce to ``root``."""
        nbytes = count * itemsize(dtype)
        if self.size == 1:
            return copy_plan(recv, send, nbytes)
        call = self._reduction(("reduce", root), dtype, op, fingerprint, nbytes)
        call["root"] = root
        self._vector(call, "reduce", send, recv, nbytes, self._direct)
        return self._generalise(self._plan("reduce", call, nbytes), nbytes)

    def bind_reduce_scatter(
        self, send: int, recv: int, counts: Sequence[int], dtype: npt.DTypeLike, op: str, fingerprint: int
    ) -> Plan:
        """Reduce ``sum(counts)`` elements; rank r gets its ``counts[r]``."""
        item = itemsize(dtype)
        cuts = [item * int(each) for each in np.cumsum([0, *counts])]
        mine = cuts[self.rank + 1] - cuts[self.rank]
        if self.size == 1:
            return copy_plan(recv, send, mine)
        even = are_even(counts)
        key = ("reduce_scatter", *(() if even else counts))
        call = self._reduction(key, dtype, op, fingerprint, mine if even else 0, cuts)
        protocol = kernels.DIRECT if cuts[-1] <= records.BUFFER else kernels.PIPELINE
        fill(call, send=send, nbytes=cuts[-1], protocol=protocol, block=self._rank_slot_bytes())
        self._send_in_tree(call, "reduce_scatter", cuts[-1])
        disjoint = recv + mine <= send or send + cuts[-1] <= recv or recv == send + cuts[self.rank]
        if disjoint:
            call["recv"] = recv
            plan = self._plan("reduce_scatter", call, cuts[-1])
            return self._generalise(plan, mine) if even else self._release_addresses(plan)
        part = np.empty(mine, np.uint8)  # recv overlaps bytes that the others still read
        call["recv"] = part.ctypes.data
        run, copy_back = self._plan("reduce_scatter", call, cuts[-1]), copy_plan(recv, part.ctypes.data, mine, part)

        def both() -> None:
            run()
            copy_back()

        return both

    def bind_allgather(
        self, send: int, recv: int, counts: Sequence[int], places: Sequence[int], fingerprint: int
    ) -> Plan:
        """``counts[q]`` bytes of rank q to byte ``places[q]`` of ``recv``; ``places`` may differ between ranks."""
        if self.size == 1:
            return copy_plan(recv + places[0], send, counts[0])
        even = are_even(counts)
        key = ("allgather", *(() if even else counts))
        call = self._call(key, fingerprint, counts[0] if even else 0, [*counts, *places])
        protocol = kernels.DIRECT if max(counts) <= records.BUFFER else kernels.PIPELINE
        fill(call, send=send, recv=recv, protocol=protocol, block=self._slot)
        segment = self.parameters.allgather_segment if self.size > 2 else kernels.MAX_SINGLE_COPY
        fill(call, slot_stride=self._slot_stride(max(counts)), segment=segment)
        if self._uses_single_copy("allgather", sum(counts)):
            call["protocol"] = kernels.SINGLE_COPY
        else:
            self._send_in_tree(call, "allgather", max(counts))
        plan = self._plan("allgather", call, max(counts))
        in_order = even and list(places) == [counts[0] * q for q in range(self.size)]
        return self._generalise(plan, counts[0]) if in_order else self._release_addresses(plan)

    def bind_bcast(
        self, address: int, nbytes: int, root: int, fingerprint: int, stall_handler: StallHandler | None = None
    ) -> Plan:
        """``nbytes`` bytes of ``root`` to all ranks; ``stall_handler`` replaces the one of this object."""
        if self.size == 1:
            return copy_plan(address, address, 0)
        call = self._call(("bcast", root), fingerprint, nbytes)
        call["root"] = root
        self._vector(call, "bcast", address, address, nbytes, records.BUFFER)
        if self._uses_single_copy("bcast", nbytes):
            fill(call, protocol=kernels.SINGLE_COPY, carries=kernels.NOTHING)
        plan = self._plan("bcast", call, nbytes, stall_handler=stall_handler)
        return self._generalise(plan, nbytes)

    def bind_alltoall(
        self,
        send: int,
        recv: int,
        send_counts: Sequence[int],
        send_places: Sequence[int],
        recv_counts: Sequence[int],
        recv_places: Sequence[int],
        fingerprint: int,
    ) -> Plan:
        """``send_counts[q]`` bytes at ``send_places[q]`` go to rank q; counts match, buffers do not overlap."""
        if self.size == 1:
            return copy_plan(recv + recv_places[0], send + send_places[0], send_counts[0])
        even = [send_counts[0] * q for q in range(self.size)]
        alike = list(send_places) == even and len({*send_counts, *recv_counts}) == 1
        single_copy = alike and self._uses_single_copy("alltoall", sum(send_counts))
        rows = [*send_counts, *send_places, *recv_counts, *recv_places]
        call = self._call(("alltoall", single_copy), fingerprint, 0, rows)
        fill(call, send=send, recv=recv, block=self._rank_slot_bytes(), longest=max(*send_counts, *recv_counts))
        call["protocol"] = kernels.SINGLE_COPY if single_copy else kernels.PIPELINE
        plan = self._plan("alltoall", call, sum(send_counts))
        in_order = alike and list(recv_places) == even
        return self._generalise(plan, send_counts[0]) if in_order else plan

    def bind_barrier(self, fingerprint: int) -> Plan:
        """Wait for all ranks."""
        if self.size == 1:
            return copy_plan(0, 0, 0)
        plan = self._plan("barrier", self._call(("barrier",), fingerprint))
        return self._generalise(plan, 0)

    def bind_entry_barrier(self, fingerprint: int) -> Plan:
        """Wait for all ranks before a call on another backend; any other call here is a mismatch."""
        call = self._call(("meeting",), fingerprint)
        call["check"] = MEETING
        return self._plan("barrier", call)

    def _uses_single_copy(self, name: str, nbytes: int) -> bool:
        """Whether a call copies from process to process."""
        return self.reaches and nbytes >= self._single_copy_bytes(name)

    def _single_copy_bytes(self, name: str) -> int:
        """From how many bytes of all ranks together on a collective copies from process to process."""
        least: int = getattr(self.parameters, f"{name}_single_copy" + ("_of_two" if self.size == 2 else ""))
        return least

    def _most_in_tree(self, name: str) -> int:
        """Up to how many bytes a rank a collective goes along the tree; -1 if it never does.

        The root of the tree has the blocks of all ranks in its buffer.
        """
        if not len(self._tree) or SERVES.get(name, Serves()).carries == kernels.NOTHING:
            return -1
        return min(self.parameters.in_tree, records.BUFFER // (1 if name == "bcast" else self.size))

    def _send_in_tree(self, call: npt.NDArray[Any], name: str, nbytes: int) -> None:
        """Let a small call go along the tree."""
        if nbytes <= self._most_in_tree(name):
            fill(call, protocol=kernels.IN_TREE, carries=SERVES[name].carries)

    def _slot_stride(self, nbytes: int) -> int:
        """Bytes of the parts of a slot that consecutive calls use in turn, 0 for none."""
        return 0 if self._crowded else slot_stride(nbytes, self._slot)

    def _rank_slot_bytes(self) -> int:
        """Bytes of a slot for each rank's block."""
        return self._slot // self.size // kernels.ALIGNMENT * kernels.ALIGNMENT

    def _call(
        self, key: tuple[Any, ...], fingerprint: int, nbytes: int = 0, rows: Sequence[int] = ()
    ) -> npt.NDArray[Any]:
        """The record of a call, with its table; ``key`` and ``nbytes`` must be the same on all ranks."""
        words = np.zeros(kernels.TABLE // records.W + self.size + len(rows), np.int64)
        words[len(words) - len(rows) :] = rows
        call = words[: kernels.TABLE // records.W].view(records.CALL_RECORD).reshape(())
        check = check_word(fingerprint, zlib.crc32(repr(key).encode()), nbytes)
        fill(call, state=self._state.ctypes.data, fingerprint=fingerprint, check=check)
        return call

    def _reduction(
        self,
        key: tuple[Any, ...],
        dtype: npt.DTypeLike,
        op: str,
        fingerprint: int,
        nbytes: int,
        rows: Sequence[int] = (),
    ) -> npt.NDArray[Any]:
        code = code_of(dtype)
        call = self._call((*key, code, op), fingerprint, nbytes, rows)
        fill(call, item=itemsize(dtype), fold=self._fold(op, code))
        return call

    def _vector(self, call: npt.NDArray[Any], name: str, send: int, recv: int, nbytes: int, most: int) -> None:
        """Complete the record for a call on a whole vector; up to ``most`` bytes need one barrier."""
        fill(call, send=send, recv=recv, nbytes=nbytes, block=self._slot, slot_stride=self._slot_stride(nbytes))
        small = kernels.INLINE if nbytes <= records.PAYLOAD_BYTES else kernels.BUFFERED
        call["protocol"] = small if nbytes <= most else kernels.PIPELINE
        self._send_in_tree(call, name, nbytes)

    # Code

    def _fold(self, op: str, code: str) -> int:
        return objects.fold(op, code) if self._compiled else memory.fold_handle(op, code)

    def kernel(self, name: str) -> Callable[[int], int]:
        """The function that runs a collective's call record."""
        function: Callable[[int], int] = objects.kernel(name) if self._compiled else getattr(kernels, name)
        return function

    def _tuning_row(self, name: str, nbytes: int) -> int:
        """Address of the tuning record for such calls."""
        row = self.collectives.index(name) * SIZE_CLASSES + min(SIZE_CLASSES - 1, nbytes.bit_length())
        return int(self._tuning[row:].ctypes.data)

    def _plan(
        self,
        name: str,
        call: npt.NDArray[Any],
        nbytes: int = 0,
        allocation: Allocation | None = None,
        stall_handler: StallHandler | None = None,
    ) -> SharedCall:
        """The plan of a call; ``nbytes`` is its size for the autotuner."""
        if call["protocol"] not in UNTUNED and nbytes >= AUTOTUNE_BYTES:
            call["tuning"] = self._tuning_row(name, nbytes)
        return SharedCall(self, name, call, stall_handler or self.stall_handler, allocation)

    def _generalise(self, plan: SharedCall, nbytes: int) -> SharedCall:
        """Let a plan take other addresses, and all lengths whose records are like that of ``nbytes`` bytes."""
        serves = SERVES[plan.name]
        plan.lengths, plan.checked, plan.table = self.lengths(plan.name, nbytes), serves.checked, serves.table
        plan.sized = serves.sized * (self.size if serves.blockwise else 1)
        plan.registers = int(serves.registers and nbytes >= self.parameters.registered)
        return self._set_release(plan)

    def _release_addresses(self, plan: SharedCall) -> SharedCall:
        """Let a plan take other addresses with the same lengths and places of blocks."""
        plan.lengths, plan.checked, plan.table, plan.sized, plan.registers = ALL_LENGTHS, 0, 0, 0, 0
        return self._set_release(plan)

    def _set_release(self, plan: SharedCall) -> SharedCall:
        """Note whether a plan may wait so long that it releases the GIL."""
        plan.releases = int(plan.call["protocol"] not in (kernels.IN_TREE, *SERVES[plan.name].short))
        return plan

    def lengths(self, name: str, nbytes: int) -> tuple[int, int]:
        """The first and last length around ``nbytes`` whose calls have the same record; lengths of blocks if any."""
        if name not in self._first:
            self._first[name] = self._first_lengths(name)
        starts = self._first[name]
        place = bisect_right(starts, nbytes)
        return starts[place - 1], starts[place] - 1

    def _first_lengths(self, name: str) -> list[int]:
        """The lengths at which the record of a collective's calls changes."""
        serves = SERVES.get(name, Serves())
        at = [*CLASS_STARTS, *serves.starts(self)]
        at.append(self._most_in_tree(name) // (self.size if serves.blockwise else 1) + 1)
        if name in SINGLE_COPIES:
            at.append(-(-self._single_copy_bytes(name) // (1 if serves.sized else self.size)))
        if serves.blockwise:
            at += [-(-each // self.size) for each in (AUTOTUNE_BYTES, *POWERS)]
        return sorted({*at, 1 << 62})

    # Return codes

    def resolve(self, code: int, plan: SharedCall) -> None:
        """Continue a call that a kernel has left with a code."""
        began = time.monotonic()
        while code == kernels.RETRY:
            if plan.stall_handler:
                plan.stall_handler(time.monotonic() - began, self.missing_ranks())
            code = plan.kernel(plan.address)
        if code == kernels.MISMATCH:
            if plan.call["check"] != MEETING and MEETING in [
                self._word(q, kernels.LINE.check) for q in range(self.size)
            ]:
                self.miss_call()
            raise self.mismatch(self.peer_fingerprints())
        if code == kernels.SHUT:
            raise TransportError(f"rank {self.rank}: a plan outlived its shared memory: bind it again on a new one")
        if code == kernels.STUCK:
            raise self._stuck_error()

    def handle_exception(self, call: npt.NDArray[Any], error: BaseException) -> None:
        """Handle an exception, such as Ctrl-C, in a call; if a rank was still missing, no rank can continue."""
        if call["waiting"]:
            call["waiting"] = 0
            self.give_reason(error)
            self.abandon()

    def abandon(self) -> None:
        """Make all later calls of all ranks raise: this rank has left one half done."""
        flag = self._segment.address + kernels.REGION.abandoned
        if not memory.load(flag):
            memory.store(flag, 1 + self.rank)

    def _stuck_error(self) -> HpccommError:
        culprit = memory.load(self._segment.address + kernels.REGION.abandoned) - 1
        reason = self.find_reason(culprit)
        if reason:
            return MismatchError(f"{reason}; after it free the communicator and make a new one")
        return TransportError(
            f"rank {self.rank}: local rank {culprit} left a collective half done after an error, so this shared memory "
            "is out of step: free the communicator and make a new one"
        )


MEETING = zlib.crc32(b"meeting")
"""The check word of barriers before calls on other backends."""
GENERAL = ("lengths", "checked", "table", "sized", "registers", "releases")
"""What a call knows of the other calls that its record can serve."""


ALL_LENGTHS = (0, 1 << 62)


class Serves(NamedTuple):
    """Which other calls the record of one collective's call can serve."""

    table: int = TABLES.index("none")
    """The kind of its table of blocks."""
    sized: int = 0
    """Whether the record contains the length."""
    checked: int = 1
    """Whether the ranks compare the length."""
    blockwise: bool = False
    """Whether the length is that of one block, and the record depends on the sum of all."""
    registers: bool = False
    """Whether the record depends on registered memory."""
    short: tuple[int, ...] = (kernels.INLINE, kernels.BUFFERED, kernels.DIRECT)
    """The protocols in which a call does not wait for long."""
    starts: Callable[[SharedMemory], Sequence[int]] = lambda memory: ()
    """First lengths with another record than shorter calls; those of all collectives are not among them."""
    carries: int = kernels.NOTHING
    """What small calls of many ranks send along the tree."""


PAYLOAD_END, BUFFER_END = records.PAYLOAD_BYTES + 1, records.BUFFER + 1
SERVES = {
    "allreduce": Serves(
        sized=1,
        registers=True,
        short=(kernels.INLINE, kernels.BUFFERED),
        starts=lambda memory: (
            *(PAYLOAD_END, memory._direct_sum + 1, memory.parameters.registered),
            -(-memory.parameters.nontemporal // memory.size),
        ),
        carries=kernels.SUM_TO_ALL,
    ),
    "reduce": Serves(sized=1, starts=lambda memory: (PAYLOAD_END, memory._direct + 1), carries=kernels.SUM_TO_ROOT),
    "bcast": Serves(sized=1, starts=lambda memory: (PAYLOAD_END, BUFFER_END), carries=kernels.VECTOR_OF_ROOT),
    "allgather": Serves(TABLES.index("allgather"), starts=lambda memory: (BUFFER_END,), carries=kernels.BLOCKS_TO_ALL),
    "alltoall": Serves(TABLES.index("alltoall"), checked=0, blockwise=True),
    "reduce_scatter": Serves(
        TABLES.index("blocks"),
        sized=1,
        blockwise=True,
        starts=lambda memory: (records.BUFFER // memory.size + 1,),
        carries=kernels.SUM_IN_BLOCKS,
    ),
    "barrier": Serves(),
}


class SharedCall:
    """A call in shared memory: its record and kernel, and which other calls the record can serve."""

    __slots__ = ("address", "allocation", "call", "kernel", "memory", "name", "stall_handler", *GENERAL)
    checked: int
    table: int
    sized: int
    registers: int
    releases: int

    def __init__(
        self,
        memory: SharedMemory,
        name: str,
        call: npt.NDArray[Any],
        stall_handler: StallHandler | None,
        allocation: Allocation | None,
    ) -> None:
        self.memory, self.name, self.call, self.address = memory, name, call, call.ctypes.data
        self.kernel = memory.kernel(name)
        self.stall_handler, self.allocation = stall_handler, allocation
        self.lengths: tuple[int, int] | None = None
        """The lengths that the record can serve, if it can serve any call but one."""

    def copy(self) -> SharedCall:
        """The same call with a record of its own."""
        words = np.array(self.call.base)
        call = words[: kernels.TABLE // records.W].view(records.CALL_RECORD).reshape(())
        made = SharedCall(self.memory, self.name, call, self.stall_handler, None)
        for name in GENERAL:
            setattr(made, name, getattr(self, name))
        return made

    @property
    def kernel_address(self) -> int:
        """The address of the kernel's machine code."""
        return objects.address(self.name)

    def __call__(self) -> None:
        """Run the call."""
        try:
            code = self.kernel(self.address)
            if code:
                self.memory.resolve(code, self)
        except BaseException as error:
            self.memory.handle_exception(self.call, error)
            raise

    def resume(self, code: int) -> None:
        """Continue the call after its kernel has returned a code."""
        try:
            self.memory.resolve(code, self)
        except BaseException as error:
            self.memory.handle_exception(self.call, error)
            raise


def check_word(fingerprint: int, salt: int, nbytes: int) -> int:
    """The word that ranks compare at the barrier of a call."""
    return (fingerprint * CHECK_PRIME + salt + nbytes * COUNT_CHECK) & CHECK_MASK


def are_even(counts: Sequence[int]) -> bool:
    """Whether all ranks have blocks of one length."""
    return len(set(counts)) == 1


def call_of(plan: Plan) -> int:
    """The address of a plan's call record, for measurements."""
    return int(plan.address)  # type: ignore[attr-defined]


MAX_ALLOCATIONS = 64
SIZE_CLASSES = 40
"""Size classes, powers of two, that the autotuner keeps apart."""
AUTOTUNE_BYTES = 2048
"""From here on the autotuner chooses how calls fill slots and buffers; below, stores are ordinary."""
POWERS = tuple(1 << k for k in range(63))
CLASS_STARTS = (0, AUTOTUNE_BYTES, *POWERS, *(each + 1 for each in POWERS))
"""Where the size classes of all collectives begin."""
PERIODS = (4096, 256)
"""Calls between the first trials of how slots are filled: of short calls, and of long ones."""
LONGEST_PERIODS = 16
"""A trial that changes nothing doubles the time to the next one, up to so many of the shortest."""
WARM_UP = 8
"""Calls before the first trial, except where calls use the parts of slots in turn: first touches of pages are slow."""
SHORT_TRIAL_BYTES = 1 << 24
"""From here on a trial is short, since every call in it takes milliseconds."""
SINGLE_COPIES = ("bcast", "alltoall", "allgather")
"""Collectives that can copy from process to process."""
UNTUNED = (kernels.INLINE, kernels.SINGLE_COPY, kernels.IN_TREE)
"""Protocols in which the way to fill slots makes no difference."""


def find_parameters(node: Any, cores: Sequence[Sequence[int]], given: Parameters | None) -> tuple[Parameters, str]:
    """The parameters that rank 0 has for the cores of all ranks, or was given, and why a probe could not be used."""
    mine: tuple[Parameters, str] | None = None
    if node.Get_rank() == 0:
        found = Found() if given else load_once(tuple(sorted(set().union(*cores))))
        mine = given or derive_parameters(found.probe), found.trouble
    agreed: tuple[Parameters, str] = node.bcast(mine)
    return agreed


def parents_of(places: Sequence[Place], arity: int) -> list[int]:
    """The parent of each rank in a tree that crosses packages, domains and caches as seldom as it can; -1 for the root.

    On each level a rank has at most ``arity`` children, and the lowest rank of a group is its root.
    """
    parents = [-1] * len(places)

    def join(roots: list[int]) -> int:
        for i in range(1, len(roots)):
            parents[roots[i]] = roots[(i - 1) // arity]
        return roots[0]

    def plant(ranks: list[int], level: int) -> int:
        if level == len(Place._fields):
            return join(ranks)
        groups: dict[str, list[int]] = {}
        for rank in ranks:
            groups.setdefault(places[rank][level], []).append(rank)
        return join([plant(each, level + 1) for each in groups.values()])

    plant(list(range(len(places))), 0)
    return parents


def plant_tree(state: npt.NDArray[Any], parents: Sequence[int]) -> npt.NDArray[np.int64]:
    """Write a rank's part of a tree into its state record; returns the words that the record points to.

    The *place* of a rank: first itself, then the ranks below each of its children, one child after the other.
    """
    rank, sizes = int(state["rank"]), [1] * len(parents)
    for q in range(len(parents) - 1, 0, -1):
        sizes[parents[q]] += sizes[q]
    places, after = [0] * len(parents), [1] * len(parents)
    for q in range(1, len(parents)):
        places[q] = after[parents[q]]
        after[parents[q]], after[q] = places[q] + sizes[q], places[q] + 1
    children = [(q, places[q] + sizes[q]) for q, parent in enumerate(parents) if parent == rank]
    words = np.array([*np.argsort(places), *(word for child in children for word in child)], np.int64)
    rows = words.ctypes.data + records.W * len(parents)
    fill(state, tree=1, parent=parents[rank], child_count=len(children), child=rows)
    fill(state, order=words.ctypes.data, first=places[rank], end=places[rank] + sizes[rank])
    return words


def new_tuning_table(slot: int, parameters: Parameters = DEFAULTS, direct_sum: int = 12288) -> npt.NDArray[Any]:
    """A tuning record for each collective and size class, before any trial.

    A trial is meaningful only in the steady state, in which the other ranks have read the slots before.  So the first
    one waits until all parts of the ring have been used.  ``direct_sum``: up to so many bytes an allreduce is direct.
    """
    return first_tuning_table(slot, parameters, direct_sum).copy()


@lru_cache(8)
def first_tuning_table(slot: int, parameters: Parameters, direct_sum: int) -> npt.NDArray[Any]:
    """The same, made once for all communicators with as many ranks."""
    table = np.zeros((len(kernels.COLLECTIVES), SIZE_CLASSES), records.TUNING_RECORD)
    for name, rows in zip(kernels.COLLECTIVES, table, strict=True):
        buffered = direct_sum if name == "allreduce" else records.BUFFER
        for size in range(1, SIZE_CLASSES):
            least = 1 << (size - 1)
            long = least >= parameters.long
            period = PERIODS[long]
            warm_up = 2 + records.RING * slot // slot_stride(least, slot) if least > buffered else WARM_UP
            trial = kernels.SHORT_TRIAL if least >= SHORT_TRIAL_BYTES else kernels.LONG_TRIAL
            rows["trial"][size], rows["longest"][size] = trial, LONGEST_PERIODS * period
            rows["period"][size] = rows["shortest"][size] = period
            rows["count"][size] = period - warm_up
            rows["long"][size], rows["choice"][size] = long, long and parameters.fills_nontemporal
    return table.reshape(-1)


def slot_stride(nbytes: int, slot: int) -> int:
    """Bytes of the parts of a slot that short vectors use in turn: a power of two, as slots are."""
    return min(slot, max(PAGE, 1 << (nbytes - 1).bit_length()))


def slot_bytes(ranks: int, most: int = DEFAULTS.slot) -> int:
    """Bytes of a slot, a power of two: less for many ranks, but always a cache line for each of them."""
    bounded = min(most, floor_power(ALL_SLOTS // (records.RING * ranks)))
    return max(bounded, 1 << (kernels.ALIGNMENT * ranks - 1).bit_length())


ALL_SLOTS = 1 << 25
"""Bytes of the slots of all ranks of a node, unless each has less than 64 a rank."""


class Allocation:
    """Registered memory: a copy of ``stride`` bytes for each rank, one after the other."""

    def __init__(self, number: int, copies: int, stride: int, rank: int) -> None:
        self.number, self.copies, self.stride = number, copies, stride
        self.mine = copies + rank * stride
        self.result: SharedSegment | None = None
        """Memory for one shared result, made at the first request."""
        self.plans: list[Any] = []
        """The plans that keep views of it."""
        self.alive = np.ones(1, np.int64)
        """Zero when the arrays are gone: another array may then have their address."""

    def make_result(self, node: Any) -> None:
        """Make the memory for one shared result (collective)."""
        self.result = SharedSegment(node, self.stride)


def copy_plan(to: int, source: int, nbytes: int, *held: Any) -> Plan:
    """A plan that copies."""

    def move() -> None:
        if nbytes and to != source:
            ctypes.memmove(to, source, nbytes)
        _ = held

    return move


class RankFacts(NamedTuple):
    """What a rank tells the others before they share memory."""

    code: str
    """The code that it asks for."""
    trouble: str
    """Why it has no compiled code; empty if it has."""
    cores: tuple[int, ...]
    crowded: bool
    """Whether more ranks were started on this node than it has cores."""
    pid: int
    secret: int
    address: int
    """Where the secret is."""

    @classmethod
    def find(cls, code: str, secret: npt.NDArray[np.int64]) -> RankFacts:
        """The facts of this rank."""
        cores = tuple(sorted(os.sched_getaffinity(0)))
        started = max(int(os.environ.get(name, "0")) for name in LOCAL_SIZES)
        crowded = (os.cpu_count() or 1) < started
        return cls(code, objects.why_none(), cores, crowded, os.getpid(), int(secret[0]), secret.ctypes.data)


def share_cores(facts: Sequence[RankFacts]) -> bool:
    """Whether ranks share cores with each other."""
    cores: set[int] = set().union(*(each.cores for each in facts))
    return len(cores) < len(facts) or any(each.crowded for each in facts)


def agree_on_code(facts: Sequence[RankFacts]) -> bool:
    """Whether the kernels are compiled, as rank 0 asks for."""
    wanted = facts[0].code
    troubles = [each.trouble for each in facts if each.trouble]
    if wanted != "numpy" and not troubles:
        return True
    if wanted == "compiled" or platform.machine().lower() not in TSO_MACHINES:
        # without Numba there is no acquire and release: a rank could see a flag before the data that it announces
        raise TransportError(
            f"shared memory needs Numba on {platform.machine()} ({(troubles or ['not requested'])[0]}): "
            "pip install numba, or use algorithm='native'"
        )
    return False


def fingerprint_mismatch(fingerprints: list[int]) -> MismatchError:
    """The error that names the fingerprint of each group of ranks."""
    groups: dict[int, list[int]] = {}
    for rank, fingerprint in enumerate(fingerprints):
        groups.setdefault(fingerprint, []).append(rank)
    groups_text = "; ".join(
        f"local ranks {', '.join(map(str, each))}: {fingerprint:#x}" for fingerprint, each in groups.items()
    )
    return MismatchError(
        f"the ranks of this node make different calls (fingerprints: {groups_text}): make the calls the same"
    )
