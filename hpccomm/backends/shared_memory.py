"""Collectives of ranks that share memory: faster than messages, checked before the first byte is reduced.

*p ranks on one node, r this one.*  ``node`` is a plain communicator whose ranks all share memory; creating, ``empty``
and ``close`` are collective.  Binding and running are not: what differs between ranks is found when they meet.

::

    shared = SharedMemory(node)                        # TransportError on all ranks where memory is not to be had
    shared.reduces("sum", dtype)                       # is there a kernel for it?  else take another way
    plan = shared.bind_allreduce(send, recv, count, dtype, "sum", signature)
    plan()                                             # as often as you like; keeps no reference to the arrays

    SharedMemory.collectives                           # names of what can be bound
    bind_allreduce(send, recv, count, dtype, op, signature, past_cache=None)
    bind_reduce(send, recv, count, dtype, op, root, signature)          recv is read on the root only
    bind_reduce_scatter(send, recv, counts, dtype, op, signature)       counts: elements of each rank
    bind_allgather(send, recv, counts, places, signature)               bytes of each rank, and where they belong
    bind_bcast(address, nbytes, root, signature, late=None)
    bind_alltoall(send, recv, send_counts, send_places, recv_counts, recv_places, signature)       bytes
    bind_barrier(signature)
    bind_meeting(signature)                            before a call that goes elsewhere: meets its like, whatever it is

    shared.empty(shape, dtype)                         # registered: visible to all ranks, reduced without a copy
    shared.view(address, nbytes)                       # memory where all ranks see one result of a registered array
    shared.late = hook(seconds, missing)               # plans bound from now on call it every 50 ms while ranks are
                                                       # missing; may raise
    shared.mismatch = make(signatures)                 # makes the error for calls that differ
    shared.peers_signatures()                          # what each rank passed to the current or last call
    shared.close()

Addresses and counts are integers, ``op`` is one of sum prod min max land lor lxor band bor bxor, dtypes are NumPy's
or ``"bfloat16"``.  In place means equal addresses (for reduce-scatter: ``recv`` inside ``send``; for allgather:
``send`` at its own place in ``recv``).  Signatures are integers below 2^63 that stand for a call; a call whose
signatures, counts or dtypes differ raises on every rank, writes no user memory, and the next call is fine.  A call left
by an exception while it waits makes all later calls raise TransportError.

An allreduce of S bytes reads and writes about 5 S in each rank, 2 S where the array is registered.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import math
import os
import platform
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.errors import MismatchError, TransportError
from hpccomm.kernels import memory, records, reductions
from hpccomm.kernels import shared as kernels
from hpccomm.kernels.shared import MAX_WAIT_NS
from hpccomm.transports.segment import PAGE, SharedSegment

Plan = Callable[[], None]
StallHandler = Callable[[float, list[int]], None]

WORD_MASK = (1 << 63) - 1

MAX_SPIN = 2000
"""Looks at a flag before the core is given away, at most, where every rank has a core.

Too many cost twentyfold where ranks share cores with each other, or with other jobs: so this adapts, see there.
"""
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
"""Where launchers say how many ranks they started on this node."""

TSO_MACHINES = ("x86_64", "amd64", "i686", "s390x")
"""Machines whose processors keep stores, and loads, in order."""


class SharedMemory:
    """The collectives of the ranks of ``node`` (collective); what it offers stands at the top of this module.

    ``code`` is ``"auto"``, ``"compiled"`` (Numba) or ``"numpy"``; rank 0's choice holds.  Takes about 1 MB a rank.
    ``late`` is called after ``patience_ns`` nanoseconds without somebody.
    """

    collectives = kernels.COLLECTIVES

    def __init__(self, node: Any, code: str = "auto", patience_ns: int = MAX_WAIT_NS) -> None:
        self.rank, self.size = node.Get_rank(), node.Get_size()
        self.stall_handler: StallHandler | None = None
        self.mismatch: Callable[[list[int]], Exception] = fingerprint_mismatch
        self._node = node
        self._compiled = agree_on_code(node, code)
        self._slot = slot_bytes(self.size)
        self._direct = max(records.PAYLOAD_BYTES, min(records.BUFFER, DIRECT_BYTES // self.size))
        self._region = records.region_record(self._slot).itemsize
        self._segment = SharedSegment(node, self.size * self._region)
        self._segment.prefault()
        spin = spin_count(node)
        self._crowded = spin == kernels.MIN_SPIN  # who shares a core finds in its cache what the others have read
        self._state = self._new_state(spin)
        self._state["max_wait"] = patience_ns
        self._tuning = new_tuning_table(self._slot)
        self._registered: dict[int, Allocation] = {}
        self._allocations = 0
        self._reaches = self._can_reach()

    def _new_state(self, spin: int) -> npt.NDArray[Any]:
        state = np.zeros((), records.STATE_RECORD)
        state["memory"] = self._segment.address
        state["region"] = self._region
        state["ranks"] = self.size
        state["rank"] = self.rank
        state["spin"] = spin
        state["spin_limit"] = spin
        state["slot"] = self._slot
        return state

    def _can_reach(self) -> bool:
        """Whether all ranks may copy from each other's memory, which a system can forbid (collective)."""
        secret = np.random.default_rng().integers(1, 1 << 62, 1)
        memory.store(self._segment.address + self.rank * self._region + kernels.PID, os.getpid())
        told = self._node.allgather((int(secret[0]), secret.ctypes.data, os.getpid()))
        wanted, address, pid = told[(self.rank + 1) % self.size]
        seen = np.zeros(1, np.int64)
        moved = memory.pull(pid, seen.ctypes.data, address, seen.nbytes)
        may: list[bool] = self._node.allgather(bool(moved == seen.nbytes and seen[0] == wanted))
        return all(may)

    def close(self) -> None:
        """Give everything back; plans raise from now on."""
        self._state["closed"] = 1
        self._registered.clear()
        self._segment.close()

    # What can be asked

    def reduces(self, op: str, dtype: npt.DTypeLike) -> bool:
        """Whether there is a kernel for an operation on a dtype."""
        return reductions.has_kernel(op, dtype)

    def peer_fingerprints(self) -> list[int]:
        """The signature that each rank passed to the call that is running or was the last to run."""
        return [self._word(q, kernels.FINGERPRINT) for q in range(self.size)]

    def missing_ranks(self) -> list[int]:
        """The ranks that have not come to the call that is running."""
        number = self._call_number()
        return [q for q in range(self.size) if self._word(q, kernels.NUMBER) < number]

    def _call_number(self) -> int:
        return int(self._state["calls"])

    def _word(self, q: int, offset: int) -> int:
        self._check_open()
        line = self._segment.address + q * self._region + records.LINE * (self._call_number() & 1)
        return memory.load_acquire(line + offset)

    def _check_open(self) -> None:
        if self._state["closed"]:
            raise TransportError(f"rank {self.rank}: this shared memory is closed: make a new one")

    # Registered memory

    def empty(self, shape: int | Sequence[int], dtype: npt.DTypeLike = "f8") -> npt.NDArray[Any]:
        """An array whose elements all ranks can see (collective; the same shape and dtype on all ranks).

        Calls on it, or on parts of it, that start at any offset need no copies.  Freed with its last view.
        """
        self._check_open()
        kind = np.dtype(dtype)
        extent = (shape,) if isinstance(shape, int) else tuple(shape)
        count = math.prod(extent)
        asked = self._node.allgather((extent, kind.str))
        if len(set(asked)) > 1:
            wants = "; ".join(f"local rank {rank}: {list(each[0])} {each[1]}" for rank, each in enumerate(asked))
            raise MismatchError(f"registered memory of different shapes ({wants}): ask for the same on all ranks")
        stride = -(-max(1, count * kind.itemsize) // PAGE) * PAGE
        segment = SharedSegment(self._node, stride * self.size)
        self._allocations += 1
        allocation = Allocation(self._allocations, segment.address, stride, self.rank)
        self._registered[allocation.number] = allocation
        weakref.finalize(segment.buffer, forget, self._registered, allocation)
        return np.frombuffer(segment.buffer, kind, count, stride * self.rank).reshape(extent)

    def view(self, address: int, nbytes: int) -> tuple[SharedSegment, int] | None:
        """One result that all ranks see, of calls on a registered array (collective); ``None`` for any other array.

        The segment, and how far into it the result of this part of the array belongs.
        """
        allocation = self._allocation((address, nbytes))
        if allocation is None:
            return None
        if allocation.result is None:
            allocation.result = SharedSegment(self._node, allocation.stride)
        return allocation.result, address - allocation.mine

    def _allocation(self, *spans: tuple[int, int]) -> Allocation | None:
        """The allocation in whose part of this rank all spans (address, bytes) lie."""
        for allocation in self._registered.values():
            lo, hi = allocation.mine, allocation.mine + allocation.stride
            if all(lo <= address and address + nbytes <= hi for address, nbytes in spans):
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
        signature: int,
        past_cache: bool | None = None,
        once: bool = False,
    ) -> Plan:
        """``past_cache`` writes the result around the cache: for results that do not fit there, else it costs.

        ``once``: ``recv`` is the same memory on all ranks, see :meth:`view`.
        """
        nbytes = count * reductions.itemsize(dtype)
        if self.size == 1:
            return copy_plan(recv, send, nbytes)
        call = self._reduction(("allreduce", count, once), dtype, op, signature)
        call["once"] = once
        around = send != recv and nbytes * self.size >= NONTEMPORAL_BYTES if past_cache is None else past_cache
        call["nontemporal_out"] = around
        self._vector(call, send, recv, nbytes, DIRECT_BYTES_OF_TWO if self.size == 2 else self._direct)
        spans = [(send, nbytes)] if once else [(send, nbytes), (recv, nbytes)]
        allocation = self._allocation(*spans) if nbytes >= REGISTERED_BYTES else None
        if nbytes >= REGISTERED_BYTES and call["protocol"] == kernels.BUFFERED:
            call["protocol"] = kernels.DIRECT
        if allocation:
            call["allocation"] = allocation.number
            call["alive"] = allocation.alive.ctypes.data
            call["copies"] = allocation.copies
            call["copy_stride"] = allocation.stride
            call["send_at"] = send - allocation.mine
            call["recv_at"] = 0 if once else recv - allocation.mine
        return self._plan("allreduce", call, nbytes, allocation)

    def bind_reduce(
        self, send: int, recv: int, count: int, dtype: npt.DTypeLike, op: str, root: int, signature: int
    ) -> Plan:
        """Reduce to ``root``."""
        nbytes = count * reductions.itemsize(dtype)
        if self.size == 1:
            return copy_plan(recv, send, nbytes)
        call = self._reduction(("reduce", count, root), dtype, op, signature)
        call["root"] = root
        self._vector(call, send, recv, nbytes, self._direct)
        return self._plan("reduce", call, nbytes)

    def bind_reduce_scatter(
        self, send: int, recv: int, counts: Sequence[int], dtype: npt.DTypeLike, op: str, signature: int
    ) -> Plan:
        """Reduce ``sum(counts)`` elements; rank r gets its ``counts[r]``."""
        item = reductions.itemsize(dtype)
        cuts = [item * int(each) for each in np.cumsum([0, *counts])]
        mine = cuts[self.rank + 1] - cuts[self.rank]
        if self.size == 1:
            return copy_plan(recv, send, mine)
        call = self._reduction(("reduce_scatter", tuple(counts)), dtype, op, signature, cuts)
        call["send"] = send
        call["nbytes"] = cuts[-1]
        call["protocol"] = kernels.DIRECT if cuts[-1] <= records.BUFFER else kernels.PIPELINE
        call["block"] = self._rank_slot_bytes()
        apart = recv + mine <= send or send + cuts[-1] <= recv or recv == send + cuts[self.rank]
        if apart:
            call["recv"] = recv
            return self._plan("reduce_scatter", call, cuts[-1])
        part = np.empty(mine, np.uint8)  # recv lies over what the others have still to read
        call["recv"] = part.ctypes.data
        run, copy_back = self._plan("reduce_scatter", call, cuts[-1]), copy_plan(recv, part.ctypes.data, mine, part)

        def both() -> None:
            run()
            copy_back()

        return both

    def bind_allgather(
        self, send: int, recv: int, counts: Sequence[int], places: Sequence[int], signature: int
    ) -> Plan:
        """``counts[q]`` bytes of rank q to byte ``places[q]`` of ``recv``; ``places`` may differ between ranks."""
        if self.size == 1:
            return copy_plan(recv + places[0], send, counts[0])
        call = self._call(("allgather", tuple(counts)), signature, [*counts, *places])
        call["send"] = send
        call["recv"] = recv
        call["protocol"] = kernels.DIRECT if max(counts) <= records.BUFFER else kernels.PIPELINE
        call["block"] = self._slot
        call["slot_stride"] = self._slot_stride(max(counts))
        call["segment"] = ALLGATHER_SEGMENT_BYTES if self.size > 2 else max(1, *counts)
        if self._uses_single_copy("allgather", sum(counts)):
            call["protocol"] = kernels.SINGLE_COPY
        return self._plan("allgather", call, max(counts))

    def bind_bcast(
        self, address: int, nbytes: int, root: int, signature: int, late: StallHandler | None = None
    ) -> Plan:
        """``nbytes`` bytes of ``root`` to everybody; ``late`` is called instead of the transport's."""
        if self.size == 1:
            return copy_plan(address, address, 0)
        call = self._call(("bcast", nbytes, root), signature)
        call["root"] = root
        self._vector(call, address, address, nbytes, records.BUFFER)
        if self._uses_single_copy("bcast", nbytes):
            call["protocol"] = kernels.SINGLE_COPY
        return self._plan("bcast", call, nbytes, late=late)

    def bind_alltoall(
        self,
        send: int,
        recv: int,
        send_counts: Sequence[int],
        send_places: Sequence[int],
        recv_counts: Sequence[int],
        recv_places: Sequence[int],
        signature: int,
    ) -> Plan:
        """``send_counts[q]`` bytes at ``send_places[q]`` to rank q, which expects as many; buffers do not overlap."""
        if self.size == 1:
            return copy_plan(recv + recv_places[0], send + send_places[0], send_counts[0])
        even = [send_counts[0] * q for q in range(self.size)]
        alike = list(send_places) == even and len({*send_counts, *recv_counts}) == 1
        across = alike and self._uses_single_copy("alltoall", sum(send_counts))
        what = ("alltoall", across)
        call = self._call(what, signature, [*send_counts, *send_places, *recv_counts, *recv_places])
        call["send"] = send
        call["recv"] = recv
        call["block"] = self._rank_slot_bytes()
        call["longest"] = max(*send_counts, *recv_counts)
        call["protocol"] = kernels.SINGLE_COPY if across else kernels.PIPELINE
        return self._plan("alltoall", call, sum(send_counts))

    def bind_barrier(self, signature: int) -> Plan:
        """Wait for everybody."""
        if self.size == 1:
            return copy_plan(0, 0, 0)
        return self._plan("barrier", self._call(("barrier",), signature))

    def bind_entry_barrier(self, signature: int) -> Plan:
        """Wait for everybody who is about to make calls elsewhere, whatever they are; other calls here differ."""
        call = self._call(("meeting",), signature)
        call["check"] = zlib.crc32(b"meeting")
        return self._plan("barrier", call)

    def _uses_single_copy(self, name: str, nbytes: int) -> bool:
        """Whether a call goes from process to process."""
        return self._reaches and nbytes >= (SINGLE_COPY_BYTES if self.size > 2 else SINGLE_COPY_BYTES_OF_TWO)[name]

    def _slot_stride(self, nbytes: int) -> int:
        """Length of the parts of a slot that a vector takes in turn, 0 for none."""
        return 0 if self._crowded else slot_stride(nbytes, self._slot)

    def _rank_slot_bytes(self) -> int:
        """Bytes of a slot for each rank."""
        return self._slot // self.size // kernels.ALIGNMENT * kernels.ALIGNMENT

    def _call(self, what: tuple[Any, ...], signature: int, rows: Sequence[int] = ()) -> npt.NDArray[Any]:
        """The words of a call; ``what`` must be the same on all ranks."""
        words = np.zeros(kernels.TABLE // records.W + self.size + len(rows), np.int64)
        words[len(words) - len(rows) :] = rows
        call = words[: kernels.TABLE // records.W].view(records.CALL_RECORD).reshape(())
        call["state"] = self._state.ctypes.data
        call["fingerprint"] = signature
        call["check"] = (signature * 0x9E3779B97F4A7C15 + zlib.crc32(repr(what).encode())) & WORD_MASK
        return call

    def _reduction(
        self, what: tuple[Any, ...], dtype: npt.DTypeLike, op: str, signature: int, rows: Sequence[int] = ()
    ) -> npt.NDArray[Any]:
        code = reductions.code_of(dtype)
        call = self._call((*what, code, op), signature, rows)
        call["item"] = reductions.itemsize(dtype)
        call["fold"] = self._fold(op, code)
        return call

    def _vector(self, call: npt.NDArray[Any], send: int, recv: int, nbytes: int, most: int) -> None:
        """A call on a whole vector; up to ``most`` bytes in one go."""
        call["send"] = send
        call["recv"] = recv
        call["nbytes"] = nbytes
        call["block"] = self._slot
        call["slot_stride"] = self._slot_stride(nbytes)
        small = kernels.INLINE if nbytes <= records.PAYLOAD_BYTES else kernels.BUFFERED
        call["protocol"] = small if nbytes <= most else kernels.PIPELINE

    # Code

    def _fold(self, op: str, code: str) -> int:
        if not self._compiled:
            return reductions.numpy_handle(op, code)
        from hpccomm.kernels import compiled

        with self._compile_lock():
            return int(compiled.fold_kernel(op, code).address)

    def _kernel(self, name: str) -> Callable[[int], int]:
        if not self._compiled:
            function: Callable[[int], int] = getattr(kernels, name)
            return function
        from hpccomm.kernels import compiled

        with self._compile_lock():
            return compiled.kernel(name)

    def _compile_lock(self) -> FileLock:
        return FileLock(self._segment.file)

    def _tuning_row(self, name: str, nbytes: int) -> int:
        """Where it stands what was learned of such calls."""
        row = self.collectives.index(name) * SIZE_CLASSES + min(SIZE_CLASSES - 1, nbytes.bit_length())
        return int(self._tuning[row:].ctypes.data)

    def _plan(
        self,
        name: str,
        call: npt.NDArray[Any],
        nbytes: int = 0,
        allocation: Allocation | None = None,
        late: StallHandler | None = None,
    ) -> Plan:
        """What runs a call; ``nbytes`` says how large it is, for learning."""
        if call["protocol"] not in (kernels.INLINE, kernels.SINGLE_COPY) and nbytes >= AUTOTUNE_BYTES:
            call["tuning"] = self._tuning_row(name, nbytes)
        kernel, address, resolve = self._kernel(name), call.ctypes.data, self._resolve
        late, held = late or self.stall_handler, (self._segment, call, allocation)

        def run() -> None:
            try:
                code = kernel(address)
                if code:
                    resolve(code, kernel, address, late)
            except BaseException:
                self._handle_exception(held[1])
                raise

        run.call = address  # type: ignore[attr-defined]
        return run

    # What a call returned

    def _resolve(self, code: int, kernel: Callable[[int], int], address: int, late: StallHandler | None) -> None:
        began = time.monotonic()
        while code == kernels.RETRY:
            if late:
                late(time.monotonic() - began, self.missing_ranks())
            code = kernel(address)
        if code == kernels.MISMATCH:
            raise self.mismatch(self.peer_fingerprints())
        if code == kernels.SHUT:
            raise TransportError(f"rank {self.rank}: a plan outlived its shared memory: bind it again on a new one")
        if code == kernels.STUCK:
            raise self._stuck_error()

    def _handle_exception(self, call: npt.NDArray[Any]) -> None:
        """An exception, such as Ctrl-C, ended a call; if that was before all had come, nobody can go on."""
        if call["waiting"]:
            call["waiting"] = 0
            self._abandon()

    def _abandon(self) -> None:
        flag = self._segment.address + kernels.ABANDONED
        if not memory.load(flag):
            memory.store(flag, 1 + self.rank)

    def _stuck_error(self) -> TransportError:
        culprit = memory.load(self._segment.address + kernels.ABANDONED) - 1
        return TransportError(
            f"rank {self.rank}: local rank {culprit} left a collective half done after an error, so this shared memory "
            "is out of step: free the communicator and make a new one"
        )


def call_of(plan: Plan) -> int:
    """The address that a plan passes to its kernel, for measurements."""
    return int(plan.call)  # type: ignore[attr-defined]


SIZE_CLASSES = 40
"""Classes of sizes, powers of two, that learn apart."""
AUTOTUNE_BYTES = 2048
"""From here on calls learn how to fill slots and buffers; below, lines go through the cache."""
LONG_CALLS, PROBE_PERIODS = 17, (4096, 256)
"""After how many calls it is tried again: below the class of 64 KB, and from there on."""
WARM_UP = 8
"""Calls before the first trial, but for those that take the parts of slots in turn: pages are touched for the first
time."""
SINGLE_COPY_BYTES = {"bcast": 1 << 23, "alltoall": 1 << 23, "allgather": 1 << 25}
"""From so many bytes on what is only copied goes from process to process: one copy, not two, for a system call."""
SINGLE_COPY_BYTES_OF_TWO = {"bcast": 1 << 18, "alltoall": 1 << 20, "allgather": 1 << 22}
"""The same between two ranks, whose slots would keep both of them busy all the time."""
ALLGATHER_SEGMENT_BYTES = 1 << 20
"""Bytes of each rank that an allgather among more than two copies across before anybody goes on: whole parts would no
longer be in a cache when the last rank comes for them (16 MB of each of four ranks: 14.8 ms so, 18.8 without)."""
REGISTERED_BYTES = 8192
"""From here on registered arrays are reduced where they are; below, one meeting instead of two is worth a copy."""
DIRECT_BYTES = 98304
"""Up to so many bytes of all ranks together, every rank reduces everything: one meeting instead of two."""
DIRECT_BYTES_OF_TWO = 12288
"""For an allreduce of two ranks: from 16 KB on half of it copied twice is faster, by half where cores share a cache."""
NONTEMPORAL_BYTES = 1 << 25
"""From so many bytes of all ranks together on, results out of place are written around the cache: they exceed it."""


def new_tuning_table(slot: int) -> npt.NDArray[Any]:
    """A row for each collective and class of sizes, where nothing was learned yet.

    A trial is worth something when slots are as they stay: read by the others before.  So the first one waits until all
    parts of the ring were used.  Until then long calls fill slots around the cache: where that is wrong it costs up to
    twice the time, the other way four to six times (measured; two cores, when they share a cache and when not).
    """
    table = np.zeros((len(kernels.COLLECTIVES), SIZE_CLASSES), records.TUNING_RECORD)
    for name, rows in zip(kernels.COLLECTIVES, table, strict=True):
        buffered = DIRECT_BYTES_OF_TWO if name == "allreduce" else records.BUFFER
        for size in range(1, SIZE_CLASSES):
            least, long = 1 << (size - 1), size >= LONG_CALLS
            period = PROBE_PERIODS[long]
            warm_up = 2 + records.RING * slot // slot_stride(least, slot) if least > buffered else WARM_UP
            rows["period"][size] = period
            rows["count"][size] = period - warm_up
            rows["choice"][size] = long
    return table.reshape(-1)


def slot_stride(nbytes: int, slot: int) -> int:
    """Length of the parts of a slot that short vectors take in turn; slots are a power of two long, so parts are."""
    return min(slot, max(PAGE, 1 << (nbytes - 1).bit_length()))


def slot_bytes(ranks: int) -> int:
    """Length of a slot, a power of two (measured with 2 and 4 ranks); with many, slices are long in less memory."""
    return 1 << 18 if ranks <= 32 else 1 << 17


class Allocation:
    """Registered memory: a copy of ``stride`` bytes for each rank, one after the other."""

    def __init__(self, number: int, copies: int, stride: int, rank: int) -> None:
        self.number, self.copies, self.stride = number, copies, stride
        self.mine = copies + rank * stride
        self.result: SharedSegment | None = None
        """Room for one result, once it was asked for."""
        self.alive = np.ones(1, np.int64)
        """Zero when the arrays are gone: another array may come to lie at their address."""


def forget(registered: dict[int, Allocation], allocation: Allocation) -> None:
    """The memory is given back."""
    allocation.alive[0] = 0
    allocation.result = None
    registered.pop(allocation.number, None)


class FileLock:
    """One process at a time, by a lock on a file that all have open: the first compiles, the others load."""

    def __init__(self, file: int) -> None:
        self._file = file

    def __enter__(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *exception: object) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)


def copy_plan(to: int, source: int, nbytes: int, *held: Any) -> Plan:
    """A plan that copies."""

    def move() -> None:
        if nbytes and to != source:
            ctypes.memmove(to, source, nbytes)
        _ = held

    return move


def spin_count(node: Any) -> int:
    """How often to look at a flag before giving way; the same on all ranks."""
    masks = node.allgather(os.sched_getaffinity(0))
    started = max(int(os.environ.get(name, "0")) for name in LOCAL_RANKS)
    shared = len(set().union(*masks)) < node.Get_size() or (os.cpu_count() or 1) < started
    return kernels.MIN_SPIN if any(node.allgather(shared)) else MAX_SPIN


def agree_on_code(node: Any, code: str) -> bool:
    """Whether the kernels are compiled; all ranks do the same."""
    wanted = node.bcast(code)
    found = "Numba is not installed" if importlib.util.find_spec("numba") is None else ""
    if wanted != "numpy" and not found:
        try:
            import numba  # noqa: F401
        except ImportError as error:
            found = str(error)
    troubles = [each for each in node.allgather(found) if each]
    if wanted != "numpy" and not troubles:
        return True
    if wanted == "compiled" or platform.machine().lower() not in TSO_MACHINES:
        # without Numba there is no acquire and release, so a flag could be seen before the data it speaks of
        raise TransportError(
            f"shared memory needs Numba on {platform.machine()} ({(troubles or ['not wanted'])[0]}): "
            "pip install numba, or use algorithm='native'"
        )
    return False


def fingerprint_mismatch(signatures: list[int]) -> MismatchError:
    """Who passed what."""
    groups: dict[int, list[int]] = {}
    for rank, signature in enumerate(signatures):
        groups.setdefault(signature, []).append(rank)
    said = "; ".join(f"local ranks {', '.join(map(str, each))}: {signature:#x}" for signature, each in groups.items())
    return MismatchError(f"the ranks of this node make different calls (signatures: {said}): make the calls the same")
