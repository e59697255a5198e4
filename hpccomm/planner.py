"""The planner checks a call, selects an algorithm for it, and binds it to a plan that can run many times.

Each public method is one collective in four steps: read the buffers, check them, choose the algorithm, and bind the
call to native MPI, to shared memory, or to one of our schedules on messages.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.arrays import StreamBuffer, array_of
from hpccomm.backends.interpreter import CompiledSchedule
from hpccomm.backends.schedules import Reduction
from hpccomm.calls import operations
from hpccomm.calls.blocks import (
    EQUAL,
    FORMS,
    ONE,
    PARTS,
    TYPED,
    Amounts,
    BlockForm,
    amounts_of,
    block_bytes,
    find_blocks,
    overlap_within,
    share_bytes,
)
from hpccomm.calls.buffers import Buffer, address_of, apply_displacement, as_pairs, read, view_at
from hpccomm.calls.consistency import MEETING_SECONDS
from hpccomm.calls.entry import Entry, class_lengths, why_no_entry
from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint
from hpccomm.calls.plans import NativeCall, Plan, Run, call_key
from hpccomm.collectives.engine import BoundSchedule
from hpccomm.collectives.hierarchical import Form
from hpccomm.collectives.lowering import Layout, Pipeline, lower
from hpccomm.collectives.schedule import Algorithm, without_node_steps
from hpccomm.context import Context, algorithm_setting, unknown_algorithm_error
from hpccomm.errors import ArgumentError
from hpccomm.first_use import FirstUse
from hpccomm.kernels import objects, reproducible
from hpccomm.kernels.entry.records import NOT_COMPARED
from hpccomm.kernels.reductions.reference import code_of, narrow, widen
from hpccomm.observe.flight_recorder import recorder
from hpccomm.performance.tuning import BLOCKWISE, Choice
from hpccomm.performance.units import format_count
from hpccomm.settings import DEVICE_SETTING, ON_HOST

IN_PLACE = MPI.IN_PLACE
Counts = tuple[int, ...]

SYNCHRONISING = ("Allreduce", "Allgather", "Allgatherv", "Reduce_scatter", "Reduce_scatter_block", "Barrier")
"""Collectives that no rank leaves before all ranks have entered."""

ALL_LENGTHS = (0, 1 << 62)
ALWAYS = Choice("", None, "", ALL_LENGTHS)
EQUAL_BLOCKS = ("Allgather", "Alltoall", "Reduce_scatter_block")
"""Calls that are counted in bytes of one block."""

LOCKSTEP_BYTES = 1 << 23
"""From this size on, our algorithms on messages compare the calls of all ranks before the first message.  Below it the
extra barrier costs too much (measured: 40-60 µs on four ranks that share two cores, a sixth of the time of a 1 MiB
ring), and mismatched tags reveal the error anyway."""

FALLBACKS = ("shared", "butterfly", "tree", "ring")
"""Algorithms for calls that native MPI cannot take, in order of preference."""

INT_MAX, LARGE_COUNTS = (1 << 31) - 1, 4
"""Most elements that MPI before version 4 can count, and the first version without that limit."""

SEGMENT_BYTES = 1 << 17
"""Length of a segment in chains and trees when the tuning table names none."""


class Planner:
    """Plans the calls of one communicator."""

    in_lockstep = False
    """Whether no rank begins any call before all have been compared; a progress thread waits for the others anyway."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.first_use = FirstUse(self)

    @property
    def rank(self) -> int:
        """This rank."""
        return int(self.comm.rank)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return int(self.comm.size)

    @property
    def context(self) -> Context:
        """The communicator's context."""
        made: Context = self.comm.context
        return made

    def uses_device(self, given: Any) -> bool:
        """Whether a buffer lies on a device, and rank 0's setting does not declare it as host memory (collective)."""
        return array_of(given) is not None and self.context.settings[DEVICE_SETTING] != ON_HOST

    def attach_stream(self, stream: Any, *buffers: Any) -> tuple[Any, ...]:
        """The buffers; those on a device with their stream (collective)."""
        return tuple(StreamBuffer(each, stream) if self.uses_device(each) else each for each in buffers)

    def open_doors(self) -> None:
        """Let the compiled entry take calls, where there is one."""
        context, memory, plans = self.context, self.shared_memory, self.comm.plans
        plans.stage = context.stage
        context.users.add(plans)
        if context.awaits_code or why_no_entry(self.size) or (memory and not memory.compiled):
            return
        if memory is None and context.settings["HPCCOMM_COMPILE"] != "wait" and not objects.complete():
            return  # nothing else needs the compiler now
        meeting = self.bind_shared(Fingerprint("Barrier"), memory.bind_entry_barrier) if memory else None
        recorded = context.recorded.place
        plans.entry = Entry(plans.doors, self.rank, self.size, memory, context.consistency, meeting, recorded)

    def use_code(self) -> None:
        """Take shared memory into use from the next call on; the same call on all ranks."""
        if self.context.awaits_code:
            self.context.use_code()
            self.open_doors()

    def allreduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None) -> Plan:
        """Allreduce."""
        who = self.call_label("Allreduce")
        send, recv = self.reduction_buffers(sendbuf, recvbuf, op, who)
        choice = self.choose("allreduce", recv, op, algorithm, who)
        fingerprint = self.fingerprint("Allreduce", recv, choice, algorithm, op)
        if choice.algorithm == "native":
            native = operations.on_halves(op, recv.kind)
            return self.bind_native(key, fingerprint, "Allreduce", (send, recv), (native,), choice)
        vector, source = recv.vector(), None if send is recv else send.vector()
        if choice.algorithm == "shared":
            ends = send.address, recv.address
            shared = partial(self.shared_memory.bind_allreduce, *ends, recv.elements, recv.kind, operations.name_of(op))
            return self.keep_shared(key, fingerprint, shared, choice)
        plan = self.bind_schedule("allreduce", choice, vector, source, recv.kind, op, fingerprint)
        return self.keep(key, fingerprint, choice, [plan], plan.free, vector.nbytes)

    def view_key(self, buf: Any, op: MPI.Op) -> Hashable:
        """The key of an Allreduce_view: by the registered array, as its address may come back on some ranks only."""
        key, memory = call_key("Allreduce_view", buf, IN_PLACE, operations.key_of(op)), self.shared_memory
        if key is None or memory is None or type(buf) is not np.ndarray:
            return key
        return key, memory.allocation_number(address_of(buf), buf.nbytes)

    def allreduce_view(self, key: Hashable, buf: Any, op: MPI.Op) -> Plan:
        """Allreduce into one result per node, or into one result per rank where ranks share no memory."""
        who = self.call_label("Allreduce_view")
        if self.uses_device(buf):
            raise ArgumentError(f"{who}: the array lies on a device: use Allreduce")
        send, shared, op_name = self.read_operand(buf, op, who), self.shared_memory, operations.name_of(op)
        if send.dtype is None:
            raise ArgumentError(f"{who}: the buffer is not an array: pass one from comm.empty(shape, dtype)")
        if shared is None or not shared.reduces(op_name, send.kind):
            result = np.empty(np.shape(buf), buf.dtype)
            inner = self.allreduce(None, buf, result, op, None)
            return self.comm.plans.keep(key, Plan(inner.run, inner.free, read_only_view(result)))
        view = shared.view(send.address, send.nbytes)
        if view is None:
            raise ArgumentError(
                f"{who}: the array is not registered: allocate it with comm.empty, comm.zeros or comm.register"
            )
        segment, place, plans = view
        result = np.frombuffer(segment.buffer, buf.dtype, send.elements, place).reshape(np.shape(buf))
        fingerprint = Fingerprint("Allreduce_view", op_name, str(send.elements), send.kind)
        ends = send.address, segment.address + place
        into_segment = partial(shared.bind_allreduce, *ends, send.elements, send.kind, op_name, once=True)
        plan = self.keep_shared(key, fingerprint, into_segment, None)
        plan.result = read_only_view(result)
        plans.append(plan)
        return plan

    def reduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str | None) -> Plan:
        """Reduce; ranks other than the root reduce into private work space."""
        who = self.call_label("Reduce")
        self.check_root(root, who)
        if self.rank == root:
            send, recv = self.reduction_buffers(sendbuf, recvbuf, op, who)
        else:
            send = recv = self.read_operand(sendbuf, op, who)
        choice = self.choose("reduce", send, op, algorithm, who)
        fingerprint = self.fingerprint("Reduce", send, choice, algorithm, op, root)
        if choice.algorithm == "native":
            into = recv if self.rank == root else Buffer(None)
            native = operations.on_halves(op, send.kind)
            return self.bind_native(key, fingerprint, "Reduce", (send, into), (native, root), choice)
        source = send.vector()
        if choice.algorithm == "shared":
            ends = send.address, recv.address if self.rank == root else 0
            method = self.shared_memory.bind_reduce
            shared = partial(method, *ends, send.elements, send.kind, operations.name_of(op), root)
            return self.keep_shared(key, fingerprint, shared, choice)
        work = recv.vector() if self.rank == root else np.empty_like(source)
        operand = None if self.rank == root and send is recv else source
        due = None if self.rank == root else (0, 0)
        plan = self.bind_schedule("reduce", choice, work, operand, send.kind, op, fingerprint, root, due=due)
        return self.keep(key, fingerprint, choice, [plan], plan.free, 0)

    def reduce_scatter_block(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None
    ) -> Plan:
        """Reduce_scatter_block."""
        who = self.call_label("Reduce_scatter_block")
        recv = self.read_operand(recvbuf, op, who, writable=True)
        in_place = is_in_place(sendbuf) or sendbuf is recvbuf
        send = self.join_blocks(recv if in_place else self.read_operand(sendbuf, op, who), who)
        recv = send if in_place else recv
        if send.opaque or recv.opaque:
            counts = (0,) * self.size
        else:
            counts = ((recv.block_length(self.size) if in_place else recv.elements),) * self.size
            self.check_blocks(send, recv, counts, who)
        return self.bind_reduce_scatter(key, "Reduce_scatter_block", (send, recv), counts, (op,), algorithm)

    def reduce_scatter(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, recvcounts: Counts | None, op: MPI.Op, algorithm: str | None
    ) -> Plan:
        """Reduce_scatter; without ``recvcounts`` the ranks exchange their receive counts."""
        who = self.call_label("Reduce_scatter")
        recv = self.read_operand(recvbuf, op, who, writable=True)
        in_place = is_in_place(sendbuf) or sendbuf is recvbuf
        send = recv if in_place else self.read_operand(sendbuf, op, who)
        counts = self.scatter_counts(recvcounts, recv, in_place, who)
        if not (send.opaque or recv.opaque):
            self.check_blocks(send, recv, counts, who)
        arguments = (recvcounts if recv.opaque else counts, op)
        return self.bind_reduce_scatter(key, "Reduce_scatter", (send, recv), counts, arguments, algorithm)

    def scatter_counts(self, recvcounts: Counts | None, recv: Buffer, in_place: bool, who: str) -> Counts:
        """The number of elements for each rank; without ``recvcounts`` the ranks exchange theirs."""
        if recvcounts is None and in_place:
            raise ArgumentError(f"{who}: in place, the number of elements for each rank is unknown: pass recvcounts")
        return self.context.exchange_counts(recv.elements) if recvcounts is None else recvcounts

    def bind_reduce_scatter(
        self,
        key: Hashable,
        name: str,
        buffers: tuple[Buffer, Buffer],
        counts: Counts,
        arguments: tuple[Any, ...],
        algorithm: str | None,
    ) -> Plan:
        """Plan either reduce-scatter once the counts are known."""
        send, recv = buffers
        op = arguments[-1]
        choice = self.choose("reduce_scatter", send, op, algorithm, self.call_label(name))
        count = str(counts[0]) if name == "Reduce_scatter_block" else describe_counts(counts)
        fingerprint = self.fingerprint(name, send, choice, algorithm, op, count=count)
        if choice.algorithm == "native":
            native = operations.on_halves(op, send.kind)
            return self.bind_native(key, fingerprint, name, (send, recv), (*arguments[:-1], native), choice)
        into, source = recv.vector(counts[self.rank]), send.vector(sum(counts))
        if choice.algorithm == "shared":
            method = self.shared_memory.bind_reduce_scatter
            shared = partial(method, send.address, recv.address, counts, send.kind, operations.name_of(op))
            return self.keep_shared(key, fingerprint, shared, choice)
        order = block_order(self.context.algorithms("reduce_scatter")[choice.algorithm], self.size)
        cuts, me = cuts_of(counts, order), order.index(self.rank)
        work = np.empty_like(source)
        copy_in = None if order == sorted(order) else sorter(work, source, counts, order)
        operand, due = None if copy_in else source, (cuts[me], cuts[me + 1])
        kind = send.kind
        plan = self.bind_schedule("reduce_scatter", choice, work, operand, kind, op, fingerprint, None, cuts, due)
        block = work[slice(*due)]
        moves: list[Run | None] = [copy_in, plan, lambda: np.copyto(into, block)]
        return self.keep(key, fingerprint, choice, moves, plan.free, work.nbytes)

    def bind_reproducible(
        self, key: Hashable, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op
    ) -> Plan | None:
        """Bind a reduction whose bits do not depend on order; ``None`` if every order gives the same bits.

        ``arguments`` are the arguments after the buffers: counts, operation, root.
        """
        who, (sendbuf, recvbuf) = self.call_label(name), buffers
        buffer = self.read_operand(recvbuf if is_in_place(sendbuf) else sendbuf, op, who)
        if buffer.dtype is None or buffer.dtype.char in "gG":
            raise ArgumentError(
                f"{who}: reproducible=True sums floats of up to 64 bits: pass a contiguous array of such a dtype"
            )
        if not buffer.half and buffer.dtype.kind not in "fc":
            return None
        if op != MPI.SUM:
            if op in (MPI.MIN, MPI.MAX):
                return None
            raise ArgumentError(f"{who}: reproducible=True is for sums, minima and maxima: leave reproducible out")
        width = 2 if buffer.dtype.kind == "c" else 1
        here = name != "Reduce" or self.rank == arguments[-1]
        result = self.read_buffer(recvbuf, who, writable=True) if here else buffer
        first = 0
        if name == "Reduce_scatter":
            counts = arguments[0]
            if counts is None:
                counts = self.context.exchange_counts(result.elements)
            first, result = sum(counts[: self.rank]), replace(result, count=counts[self.rank])
            arguments = (tuple(width * each for each in counts), *arguments[1:])
        elif name == "Reduce_scatter_block":
            each = buffer.elements // self.size
            first, result = self.rank * each, replace(result, count=each)
        whole, total = ExactSum(buffer), ExactSum(result)
        with self.first_use.pause():
            inner = [self.allreduce(None, IN_PLACE, whole.as_buffer(whole.exponents), MPI.MAX, None)]
            for part, sums in zip(whole.parts, total.totals, strict=True):
                into = total.as_buffer(sums) if here else None
                inner.append(getattr(self, name.lower())(None, whole.as_buffer(part), into, *arguments, None))
        exponents = whole.exponents[width * first : width * first + total.elements]
        store = partial(total.store, exponents) if here else None
        steps = [whole.find_exponents, inner[0].run, whole.split, *(each.run for each in inner[1:]), store]

        def free() -> None:
            for each in inner:
                each.free()

        plan = Plan(compose(steps), free)
        return self.comm.plans.keep(key, plan)

    def allgather(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Allgather."""
        who = self.call_label("Allgather")
        recv = self.read_buffer(recvbuf, who, writable=True)
        send = recv if is_in_place(sendbuf) else self.read_buffer(sendbuf, who)
        find_blocks(recv, EQUAL, self.size, who)
        counts = (0 if recv.opaque else recv.block_length(self.size),) * self.size
        return self.bind_allgather(key, "Allgather", send, recv, counts, algorithm)

    def allgatherv(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Allgatherv."""
        who = self.call_label("Allgatherv")
        recv = self.read_buffer(recvbuf, who, writable=True, parts=True)
        send = recv if is_in_place(sendbuf) else self.read_buffer(sendbuf, who)
        counts = (0,) * self.size if recv.opaque else recv.blocks(self.size)[0]
        if len(counts) != self.size:
            ranks = format_count(self.size, "rank")
            raise ArgumentError(f"{who}: {len(counts)} counts for {ranks}: pass one count per rank")
        return self.bind_allgather(key, "Allgatherv", send, recv, counts, algorithm)

    def bind_allgather(
        self, key: Hashable, name: str, send: Buffer, recv: Buffer, counts: Counts, algorithm: str | None
    ) -> Plan:
        """Plan either allgather once the counts are known."""
        who, me, in_place = self.call_label(name), self.rank, send is recv
        octets = gather_bytes(recv, self.size) if recv.dtype is None else sum(counts) * recv.dtype.itemsize
        choice = self.choose("allgather", recv, None, algorithm, who, octets)
        opaque = recv.opaque or send.opaque
        fingerprint = self.fingerprint(name, recv, choice, algorithm, count=gather_count(recv, counts, octets))
        displs = recv.blocks(self.size)[1] if name == "Allgatherv" else tuple(k * counts[0] for k in range(self.size))
        if not opaque:
            self.check_allgather(send, recv, PARTS if name == "Allgatherv" else EQUAL, who)
        if opaque and choice.algorithm != "native":
            return self.bind_packed_allgather(key, send, recv, algorithm)
        if choice.algorithm == "native":
            return self.bind_native(key, fingerprint, name, (send, recv), (), choice)
        assert recv.dtype is not None
        if choice.algorithm == "shared":
            width = recv.dtype.itemsize
            own = recv.address + displs[me] * width if in_place else send.address
            sizes, offsets = [each * width for each in counts], [each * width for each in displs]
            shared = partial(self.shared_memory.bind_allgather, own, recv.address, sizes, offsets)
            return self.keep_shared(key, fingerprint, shared, choice)
        order = block_order(self.context.algorithms("allgather")[choice.algorithm], self.size)
        cuts, block = cuts_of(counts, order), order.index(me)
        in_order = [displs[rank] for rank in order] == cuts[:-1]
        work = recv.vector(cuts[-1]) if in_order else np.empty(cuts[-1], recv.dtype)
        mine = work[cuts[block] : cuts[block + 1]]
        source = recv.vector(counts[me], displs[me]) if in_place else send.vector(send.elements)
        copy_in = None if in_place and in_order else lambda: np.copyto(mine.view("u1"), source.view("u1"))
        places = [(counts[rank], displs[rank]) for rank in order]
        copy_out = None if in_order else block_copier(work, cuts, recv, places)
        plan = self.bind_schedule("allgather", choice, work, None, "", None, fingerprint, cuts=cuts)
        return self.keep(key, fingerprint, choice, [copy_in, plan, copy_out], plan.free, octets)

    def bind_packed_allgather(self, key: Hashable, send: Buffer, recv: Buffer, algorithm: str | None) -> Plan:
        """Pack a derived datatype, so that this rank runs the same algorithm as ranks with contiguous memory."""
        total = gather_bytes(recv, self.size)
        into = PackedBuffer(recv, self.comm, total)
        dtype = recv.dtype or recv.base or np.dtype("u1")
        whole = into.octets.view(dtype)
        out = into if send is recv else PackedBuffer(send, self.comm, total // self.size)
        counts = (whole.size // self.size,) * self.size
        gathered = read(whole, "")
        mine = gathered if send is recv else read(out.octets.view(dtype), "")
        inner = self.bind_allgather(None, "Allgather", mine, gathered, counts, algorithm)
        return self.comm.plans.keep(key, Plan(compose([out.pack, inner.run, into.unpack]), inner.free))

    def bcast(self, key: Hashable, sendbuf: None, buf: Any, root: int, algorithm: str | None) -> Plan:
        """Bcast."""
        who = self.call_label("Bcast")
        self.check_root(root, who)
        data = self.read_buffer(buf, who, writable=self.rank != root)
        choice = self.choose("bcast", data, None, algorithm, who, data.nbytes)
        fingerprint = self.fingerprint("Bcast", data, choice, algorithm, None, root)
        if choice.algorithm == "native":
            return self.bind_native(key, fingerprint, "Bcast", (data,), (root,), choice)
        packed = PackedBuffer(data, self.comm, data.nbytes) if data.opaque else None
        vector = packed.octets if packed else data.vector()
        before = packed.pack if packed and self.rank == root else None
        after = packed.unpack if packed and self.rank != root else None
        if choice.algorithm == "shared":
            start = address_of(vector) if packed else data.address
            shared = partial(self.shared_memory.bind_bcast, start, data.nbytes, root)
            return self.keep_shared(key, fingerprint, shared, choice, before, after)
        plan = self.bind_schedule("bcast", choice, vector.view("u1"), None, "", None, fingerprint, root)
        return self.keep(key, fingerprint, choice, [before, plan, after], plan.free, 0)

    def alltoall(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Alltoall; in place, the data is copied first."""
        who, in_place = self.call_label("Alltoall"), is_in_place(sendbuf)
        recv = self.read_buffer(recvbuf, who, writable=True)
        send = recv if in_place else self.read_buffer(sendbuf, who)
        sent, received = gather_bytes(send, self.size), gather_bytes(recv, self.size)
        if sent != received or sent % self.size:
            raise ArgumentError(
                f"{who}: sends {sent} bytes, receives {received}: pass buffers of equal size, a multiple of the ranks"
            )
        self.check_places(send, recv, who, EQUAL, EQUAL)
        choice = self.choose("alltoall", recv, None, algorithm, who, received)
        counts = (0,) if recv.dtype is None else (recv.block_length(self.size),) * self.size
        count = gather_count(recv, counts, received)
        fingerprint = self.fingerprint("Alltoall", recv, choice, algorithm, count=count)
        if choice.algorithm == "native":
            return self.bind_native(key, fingerprint, "Alltoall", (send, recv), (), choice)
        sent_bytes = PackedBuffer(send, self.comm, sent, in_place) if send.opaque else None
        received_bytes = PackedBuffer(recv, self.comm, received) if recv.opaque else None
        copied = np.empty(sent, "u1") if in_place and sent_bytes is None else None
        source = sent_bytes.octets if sent_bytes else copied
        start = send.address if source is None else address_of(source)
        into = address_of(received_bytes.octets) if received_bytes else recv.address
        before: Run | None = sent_bytes.pack if sent_bytes else None
        if copied is not None:
            octets = recv.vector(recv.block_length(self.size) * self.size).view("u1")
            before = lambda: np.copyto(copied, octets)  # noqa: E731
        each = sent // self.size
        sizes, places = [each] * self.size, [each * k for k in range(self.size)]
        shared = partial(self.shared_memory.bind_alltoall, start, into, sizes, places, sizes, places)
        after = received_bytes.unpack if received_bytes else None
        return self.keep_shared(key, fingerprint, shared, choice, before, after)

    def barrier(self, key: Hashable, sendbuf: None, recvbuf: None, algorithm: None) -> Plan:
        """Barrier; in shared memory the barrier itself compares the calls of all ranks."""
        comm, fingerprint = self.comm, Fingerprint("Barrier")
        setting = algorithm_setting(self.context.settings["HPCCOMM_ALGORITHM"], "barrier")
        if self.shared_memory and "native" not in (comm.algorithm, setting):
            return self.keep_shared(key, fingerprint, self.shared_memory.bind_barrier, ALWAYS)
        run = self.guard(fingerprint, lambda: MPI.Intracomm.Barrier(comm), lockstep=False)
        row = NativeCall(fingerprint.word, ALL_LENGTHS, self.in_lockstep)
        return self.comm.plans.keep(key, Plan(run, row=row, text=text_of(fingerprint, "native")))

    def bind_inherited(
        self, key: Hashable, name: str, buffers: tuple[Any, ...], root: int | None = None, op: Any = None
    ) -> Plan:
        """Bind one of MPI's own collectives; the calls of all ranks are compared."""
        who = self.call_label(name)
        if op is not None:
            first, into = self.reduction_buffers(buffers[0], buffers[1], op, who)
            if into.half:
                raise ArgumentError(f"{who}: MPI cannot reduce {into.kind}: cast to float32 before the call")
            fingerprint = self.fingerprint(name, into, ALWAYS, None, op)
            return self.bind_native(key, fingerprint, name, (first, into), (op,), ALWAYS)
        send, recv = self.read_blocks(name, buffers, root, who)
        fingerprint = self.describe_blocks(name, send, recv, root)
        shown = [Buffer(None) if each is None else each for each in (send, recv)]
        if TYPED in FORMS[name]:
            shown = [Buffer(each) for each in buffers]
        arguments = () if root is None else (root,)
        amounts = amounts_of(FORMS[name], send, recv, self.rank, self.size, root) if FORMS[name].varies else None
        return self.bind_native(key, fingerprint, name, (shown[0], shown[1]), arguments, ALWAYS, amounts)

    def significant(self, name: str, sendbuf: Any, recvbuf: Any, root: int | None) -> tuple[Any, Any]:
        """The buffers of a collective, without the one that only the root has."""
        form = FORMS.get(name)
        if form is None or root is None or self.rank == root:
            return sendbuf, recvbuf
        return None if form.send_at_root else sendbuf, None if form.recv_at_root else recvbuf

    def read_blocks(
        self, name: str, buffers: tuple[Any, ...], root: int | None, who: str
    ) -> tuple[Buffer | None, Buffer | None]:
        """Read and check the buffers of a collective that moves blocks; ``None`` for one that this rank does not have.

        Of a call in place both are the same buffer, but the receive buffer of a Scatter(v) in place is ``IN_PLACE``.
        """
        form, here = FORMS[name], root is None or self.rank == root
        sends, receives = here or not form.send_at_root, here or not form.recv_at_root
        send = recv = None
        if TYPED in form:
            return Buffer(buffers[0]) if not is_in_place(buffers[0]) else Buffer(buffers[1]), Buffer(buffers[1])
        if receives:
            keeps = form.send_at_root and here and is_in_place(buffers[1])
            recv = Buffer(IN_PLACE) if keeps else self.read_buffer(buffers[1], who, True, form.recv in (PARTS, TYPED))
        if sends:
            within = not form.send_at_root and here and is_in_place(buffers[0])
            send = recv if within else self.read_buffer(buffers[0], who, parts=form.send in (PARTS, TYPED))
        found = [
            find_blocks(each, kind, self.size, who) if each else None
            for each, kind in ((send, form.send), (recv, form.recv))
        ]
        if send is not recv and None not in found:
            self.check_moved(form, send, recv, found, who)
        return send, recv

    def check_moved(self, form: BlockForm, send: Any, recv: Any, blocks: list[Any], who: str) -> None:
        """Refuse buffers that overlap, that differ in type or memory order, or whose own block has two lengths."""
        if share_bytes(*blocks):
            raise ArgumentError(f"{who}: the buffers overlap: pass MPI.IN_PLACE, or a copy")
        if overlap_within(blocks[1]):
            raise ArgumentError(f"{who}: blocks of the receive buffer overlap: pass other displacements")
        self.check_order(send, recv, who)
        sent, received = (each[0 if len(each) == 1 else self.rank][1] for each in blocks)
        if send.kind != recv.kind or sent != received:
            raise ArgumentError(
                f"{who}: sends {sent // send.dtype.itemsize} {send.kind} to itself, has room for "
                f"{received // recv.dtype.itemsize} {recv.kind} from itself: make both the same"
            )

    def describe_blocks(self, name: str, send: Buffer | None, recv: Buffer | None, root: int | None) -> Fingerprint:
        """The fingerprint of a collective that moves blocks; counts that may differ between ranks are not in it."""
        form = FORMS[name]
        both = (recv, send) if form.send_at_root else (send, recv)
        data = next((each for each in both if each and each.known), Buffer(None))
        dtype, of = data.dtype or data.base, "" if root is None else str(root)
        if dtype is None or TYPED in form:
            return Fingerprint(name, "", "" if form.varies else UNKNOWN, UNKNOWN, of, UNKNOWN)
        count = ""
        if not form.varies:
            amount = block_bytes(data, form.recv if data is recv else form.send, self.size)[0]
            count = UNKNOWN if amount == NOT_COMPARED else str(amount // dtype.itemsize)
        return Fingerprint(name, "", count, str(dtype) if data.opaque else data.kind, of, data.order)

    def call_label(self, name: str) -> str:
        """The rank and the call, with which every error begins."""
        return f"rank {self.rank}: {name}"

    def read_buffer(self, given: Any, who: str, writable: bool = False, parts: bool = False) -> Buffer:
        """Read and check a buffer to send, or with ``writable`` to receive into.

        ``parts``: it has one block per rank, so its displacements belong to the blocks.
        """
        buffer = read(given, who) if parts else apply_displacement(read(given, who), who)
        if writable and not buffer.writable:
            raise ArgumentError(f"{who}: the receive buffer is read-only: pass a writable array")
        return self.check_room(buffer, who)

    def check_room(self, buffer: Buffer, who: str) -> Buffer:
        """Refuse a count larger than the buffer."""
        if buffer.dtype is not None and buffer.count is not None and buffer.count > buffer.size:
            raise ArgumentError(
                f"{who}: the buffer holds {buffer.size} elements of {buffer.kind}, the count is {buffer.count}: "
                "pass a longer buffer or a smaller count"
            )
        return buffer

    def read_operand(self, given: Any, op: MPI.Op, who: str, writable: bool = False) -> Buffer:
        """Read and check a buffer of a reduction."""
        buffer = self.check_room(as_pairs(self.read_buffer(given, who, writable)), who)
        if given is None:
            raise ArgumentError(f"{who}: the buffer is None: pass an array")
        if buffer.dtype is not None:
            operations.check_defined(op, np.dtype("f4") if buffer.half else buffer.dtype, who, buffer.pair)
        if buffer.half and not op.is_predefined:
            raise ArgumentError(f"{who}: a user-defined operation cannot reduce {buffer.kind}: cast to float32")
        return buffer

    def join_blocks(self, buffer: Buffer, who: str) -> Buffer:
        """The buffer of a block for each rank as one vector; a count in its form is that of one block."""
        if buffer.dtype is None or buffer.count is None:
            return buffer
        whole = self.check_room(replace(buffer, count=buffer.count * self.size), who)
        return replace(whole, count=None, size=whole.elements)

    def reduction_buffers(self, sendbuf: Any, recvbuf: Any, op: MPI.Op, who: str) -> tuple[Buffer, Buffer]:
        """The send and the receive buffer of a reduction; the same buffer twice when in place."""
        recv = self.read_operand(recvbuf, op, who, writable=True)
        if is_in_place(sendbuf) or sendbuf is recvbuf:
            return recv, recv
        send = self.read_operand(sendbuf, op, who)
        if send.opaque or recv.opaque:
            return send, recv
        if send.kind != recv.kind or send.elements != recv.elements:
            raise ArgumentError(
                f"{who}: sends {send.elements} {send.kind}, receives {recv.elements} {recv.kind}: make both the same"
            )
        self.check_order(send, recv, who)
        if send.address == recv.address:
            return recv, recv
        self.check_overlap(send, recv, who)
        return send, recv

    def check_order(self, send: Buffer, recv: Buffer, who: str) -> None:
        """Refuse arrays of different memory orders; an array of one dimension is in C order."""
        if send.order != recv.order:
            raise ArgumentError(
                f"{who}: one array is in C order, the other in Fortran order: pass np.ascontiguousarray(x)"
            )

    def check_overlap(self, send: Buffer, recv: Buffer, who: str, sends: str = ONE, receives: str = ONE) -> None:
        """Refuse buffers that have these blocks and overlap."""
        sent, received = find_blocks(send, sends, self.size, who), find_blocks(recv, receives, self.size, who)
        if send is not recv and sent and received and share_bytes(sent, received):
            raise ArgumentError(f"{who}: the buffers overlap: pass MPI.IN_PLACE, or a copy")

    def check_places(self, send: Buffer, recv: Buffer, who: str, sends: str, receives: str) -> None:
        """Refuse buffers that have these blocks and overlap, or of different memory orders."""
        self.check_overlap(send, recv, who, sends, receives)
        if not (send.opaque or recv.opaque):
            self.check_order(send, recv, who)

    def check_root(self, root: int, who: str) -> int:
        """Refuse a root that is not a rank; returns it as an integer of Python."""
        if not (isinstance(root, int | np.integer) and 0 <= root < self.size):
            raise ArgumentError(f"{who}: root {root} is not a rank: pass one of 0 … {self.size - 1}")
        return int(root)

    def check_blocks(self, send: Buffer, recv: Buffer, counts: Counts, who: str) -> None:
        """Refuse counts of a reduce-scatter that do not fit the buffers."""
        if len(counts) != self.size or min(counts) < 0:
            ranks = format_count(self.size, "rank")
            raise ArgumentError(f"{who}: recvcounts {counts} for {ranks}: pass one count per rank")
        total, in_place = sum(counts), send is recv
        if send.kind != recv.kind or send.elements != total or (not in_place and recv.elements < counts[self.rank]):
            raise ArgumentError(
                f"{who}: sends {send.elements} {send.kind}, receives {recv.elements} {recv.kind}, but the counts "
                f"are {total} in all and {counts[self.rank]} for this rank: make buffers and counts agree"
            )
        if not in_place:
            self.check_places(send, recv, who, ONE, ONE)

    def check_allgather(self, send: Buffer, recv: Buffer, kind: str, who: str) -> None:
        """Refuse counts and displacements of an allgather that do not fit the buffers."""
        blocks = find_blocks(recv, kind, self.size, who)
        if send is recv or blocks is None:
            return
        _, room = blocks[self.rank]
        if send.nbytes != room:
            raise ArgumentError(
                f"{who}: sends {send.nbytes} bytes, the receive buffer has room for {room} from this rank: "
                "make both the same"
            )
        self.check_order(send, recv, who)
        if share_bytes([(send.address, send.nbytes)], blocks):
            raise ArgumentError(f"{who}: the buffers overlap: pass MPI.IN_PLACE, or a copy")

    @property
    def shared_memory(self) -> Any:
        """Shared memory of all ranks; ``None`` across nodes or where it is not available."""
        return self.context.shared_memory

    def choose(
        self,
        collective: str,
        data: Buffer,
        op: MPI.Op | None,
        algorithm: str | None,
        who: str,
        nbytes: int | None = None,
    ) -> Choice:
        """The algorithm of this call, named by the caller, by the communicator, or selected from the tuning table."""
        if self.context.awaits_code:
            setting = algorithm_setting(self.context.settings["HPCCOMM_ALGORITHM"], collective)
            if "shared" in (algorithm, self.comm.algorithm, setting):
                self.use_code()
        names = self.context.names(collective)
        if algorithm is not None and algorithm not in names:
            raise unknown_algorithm_error(who, algorithm, names)
        fits = self.candidates(collective, data, op)
        if algorithm is not None and algorithm not in ("auto", "native", *fits):
            raise ArgumentError(self.why_unfit(who, algorithm, data, fits))
        wanted = algorithm or self.comm.algorithm
        if algorithm == "native" and self.why_too_many(data, op):
            reason = self.why_too_many(data, op)
            raise ArgumentError(f"{who}: {reason}: leave the algorithm out, or use one of {', '.join(fits)}")
        if wanted in ("native", *fits):
            return Choice(wanted, None, "named by the caller", ALL_LENGTHS)
        dtype = ("e" if data.half else data.dtype.char) if data.dtype is not None and op is not None else "B"
        allowed = ("native", *(name for name in names if name in fits))
        if self.size == 1 or not fits:
            choice = Choice("native", None, "no other algorithm can take the call", ALL_LENGTHS)
        else:
            length = data.nbytes if nbytes is None else nbytes
            choice = self.decide(collective, length, dtype, allowed, who)
            if choice.candidate and self.first_use.compare(collective, length, choice.candidate):
                choice = self.decide(collective, length, dtype, allowed, who)
        reason = self.why_not_native(data, op) if choice.algorithm == "native" else ""
        return Choice(next(name for name in FALLBACKS if name in fits), None, reason) if reason and fits else choice

    def decide(self, collective: str, nbytes: int, dtype: str, allowed: tuple[str, ...], who: str) -> Choice:
        """The selected algorithm; one that is selected at both ends of a range of lengths takes the whole range."""
        parts = self.size if collective in BLOCKWISE else 1
        least, most = self.lengths(collective, nbytes // parts)
        lengths = (parts * least, parts * most)
        first, last = (self.context.decide(collective, each, dtype, allowed, who) for each in lengths)
        if first.algorithm == last.algorithm and first.algorithm in ("native", "shared"):
            return first._replace(lengths=lengths)
        return self.context.decide(collective, nbytes, dtype, allowed, who)._replace(lengths=(nbytes, nbytes))

    def lengths(self, collective: str, nbytes: int) -> tuple[int, int]:
        """The lengths around ``nbytes`` whose calls in shared memory have the same record; without it, a size class."""
        if self.shared_memory:
            found: tuple[int, int] = self.shared_memory.lengths(collective, nbytes)
            return found
        return class_lengths(nbytes)

    def why_not_native(self, data: Buffer, op: MPI.Op | None) -> str:
        """The reason to avoid MPI's own algorithm; empty if there is none."""
        if self.size > 1 and self.loses_nan(data, op):
            return "MPI's own min and max may lose a NaN"
        return self.why_too_many(data, op)

    def why_too_many(self, data: Buffer, op: MPI.Op | None) -> str:
        """Why MPI's own reduction cannot take so many elements; mpi4py handles large counts of data movement."""
        if op is not None and MPI.VERSION < LARGE_COUNTS and data.elements > INT_MAX:
            return f"reductions of MPI {MPI.VERSION} count up to {INT_MAX} elements"
        return ""

    def loses_nan(self, data: Buffer, op: MPI.Op | None) -> bool:
        """Whether MPI's own algorithm may drop a NaN."""
        extreme = op is not None and operations.name_of(op) in ("min", "max", "minloc", "maxloc")
        value = data.dtype[0] if data.dtype is not None and data.pair else data.dtype
        return extreme and value is not None and value.kind == "f"

    def candidates(self, collective: str, data: Buffer, op: MPI.Op | None) -> tuple[str, ...]:
        """The algorithms of hpccomm, ``shared`` included, that can take this call."""
        ours = self.context.algorithms(collective)
        if op is None:
            movable = data.dtype is not None or data.datatype is not None
            return (*ours, *(["shared"] if self.shared_memory else [])) if movable else ()
        if data.dtype is None:
            return ()
        fits = tuple(name for name, each in ours.items() if each.ordered or op.Is_commutative())
        shared = self.shared_memory
        if shared and op.is_predefined and shared.reduces(operations.name_of(op), data.kind):
            return (*fits, "shared")
        return fits

    def why_unfit(self, who: str, wanted: str, data: Buffer, fits: tuple[str, ...]) -> str:
        """Why a named algorithm cannot take a call."""
        if data.opaque:
            return f"{who}: algorithm={wanted!r} cannot reduce a derived datatype: leave the algorithm out"
        problem = f"cannot apply this operation in rank order to {data.dtype}"
        return f"{who}: algorithm={wanted!r} {problem}: use one of {', '.join(map(repr, fits))}"

    def fingerprint(
        self,
        name: str,
        data: Buffer,
        choice: Choice,
        algorithm: str | None,
        op: MPI.Op | None = None,
        root: int | None = None,
        count: str | None = None,
    ) -> Fingerprint:
        """The call's fingerprint, which other ranks compare with theirs."""
        dtype = data.dtype or data.base
        if count is None:
            count = UNKNOWN if dtype is None else str(data.nbytes // dtype.itemsize)
        return Fingerprint(
            name,
            operations.name_in_fingerprint(op) if op is not None else "",
            count,
            UNKNOWN if dtype is None else data.element_name or data.kind if data.dtype is not None else dtype.name,
            "" if root is None else str(root),
            UNKNOWN if dtype is None else data.order,
            choice.algorithm if algorithm else "",
        )

    def bind_schedule(
        self,
        collective: str,
        choice: Choice,
        vector: npt.NDArray[Any],
        source: npt.NDArray[Any] | None,
        kind: str,
        op: MPI.Op | None,
        fingerprint: Fingerprint,
        root: int | None = None,
        cuts: list[int] | None = None,
        due: tuple[int, int] | None = None,
    ) -> BoundSchedule | CompiledSchedule:
        """Bind a schedule to a vector and, if it reduces, to the operand, which may be in ``source``.

        ``cuts`` are the offsets of blocks, ``due`` the elements of the vector that are read afterwards, by default all.
        """
        op_name = None if op is None else operations.name_of(op)
        memory = self.context.schedules.memory
        if memory:
            memory.stall_handler = self.progress_driver()
        shared = (op is None or op.is_predefined) and self.context.schedules.serves(op_name, kind)
        form = self.form_of(collective, choice, vector.nbytes, shared)
        steps = form.algorithm.steps(self.rank, self.size, *(() if root is None else (int(root),)))
        steps = steps if shared else without_node_steps(steps, self.rank)
        layout = Layout(vector.size, vector.itemsize, form.algorithm.blocks(self.size), cuts)
        program = lower(steps, self.rank, layout, form.pipeline, source is not None, due)
        reduction = None if op is None else Reduction(operations.combiner(op, kind), kind, op_name or "")
        return self.context.schedules.bind(program, vector, source, reduction, fingerprint.digest)

    def form_of(self, collective: str, choice: Choice, nbytes: int, shared: bool) -> Form:
        """What runs for a choice: its algorithm, in segments where they make it faster."""
        if choice.algorithm == "hierarchical":
            return self.context.hierarchical_form(collective, nbytes, shared)
        ours = self.context.algorithms(collective)[choice.algorithm]
        segment = choice.segment_bytes or (SEGMENT_BYTES if ours.segmented else 0)
        return Form(ours, Pipeline(-(-nbytes // segment) if segment and nbytes else 1))

    def bind_native(
        self,
        key: Hashable,
        fingerprint: Fingerprint,
        name: str,
        buffers: tuple[Buffer, ...],
        arguments: tuple[Any, ...],
        choice: Choice,
        amounts: Amounts | None = None,
    ) -> Plan:
        """Bind MPI's own algorithm; a plan with contiguous buffers is cached and does not keep the user's array alive.

        The calls of collectives that synchronise all ranks are compared first: with counts that differ, MPI returns
        wrong sums, leaves messages behind, or (MPICH) ends the process without an exception.
        """
        method, comm = getattr(MPI.Intracomm, name), self.comm
        first = buffers[0]
        same = len(buffers) == 2 and buffers[1] is first
        forms = [IN_PLACE if same else first.raw, *(each.raw for each in buffers[1:])]
        reusable = key is not None and all(self.has_weak_form(each) for each in buffers)
        if reusable:
            forms = [self.make_form(name, k, each, same) for k, each in enumerate(buffers)]
            forms[:1] = [IN_PLACE] if same else forms[:1]
        run = self.guard(fingerprint, lambda: method(comm, *forms, *arguments), name in SYNCHRONISING, amounts)
        plain = reusable and not any(each.half for each in buffers)
        lengths = self.unit_lengths(name, choice)
        row = NativeCall(fingerprint.word, lengths, self.in_lockstep or name in SYNCHRONISING) if plain else None
        plan = Plan(run, row=row, text=text_of(fingerprint, "native"))
        return self.comm.plans.keep(key, plan) if reusable else plan

    def has_weak_form(self, buffer: Buffer) -> bool:
        """Whether a buffer has a form that holds no reference to the user's array."""
        return buffer.dtype is not None or buffer.weak or buffer.raw is None or buffer.raw is IN_PLACE

    def make_form(self, name: str, number: int, buffer: Buffer, in_place: bool = False) -> Any:
        """The form for mpi4py of buffer ``number`` that holds no reference to the user's array."""
        if buffer.dtype is None or buffer.pair:
            return buffer.raw
        if number in VARIABLE_BLOCKS.get(name, ()):
            return weak_form(buffer, buffer.blocks(self.size))
        one = apply_displacement(buffer, self.call_label(name))
        return weak_form(one, one.block_length(self.size) if number in equal_blocks(name, in_place) else one.elements)

    def unit_lengths(self, name: str, choice: Choice) -> tuple[int, int]:
        """The lengths of one block, or of a vector, for which a choice holds."""
        parts = self.size if name in EQUAL_BLOCKS else 1
        first, last = choice.lengths
        return -(-first // parts), last // parts

    def keep(
        self,
        key: Hashable,
        fingerprint: Fingerprint,
        choice: Choice,
        moves: list[Run | None],
        free: Run,
        lockstep_bytes: int,
    ) -> Plan:
        """A plan on messages, cached under its key."""
        run = self.guard(fingerprint, compose(moves), lockstep_bytes >= LOCKSTEP_BYTES)
        return self.comm.plans.keep(key, Plan(run, free, text=text_of(fingerprint, choice.algorithm)))

    def keep_shared(
        self,
        key: Hashable,
        fingerprint: Fingerprint,
        bind: Callable[[int], Run],
        choice: Choice | None,
        before: Run | None = None,
        after: Run | None = None,
    ) -> Plan:
        """A plan in shared memory, cached under its key; shared memory compares the calls itself.

        Its row takes the lengths for which ``choice`` holds, too; without a choice it has none.
        """
        call: Any = self.bind_shared(fingerprint, bind)
        row = call if choice and not before and not after and getattr(call, "lengths", None) else None
        if row and choice:
            row.lengths = intersect(row.lengths, self.unit_lengths(fingerprint.collective, choice))
        text = text_of(fingerprint, "shared")
        return self.comm.plans.keep(key, Plan(compose([before, call, after]), row=row, text=text))

    def bind_shared(self, fingerprint: Fingerprint, bind: Callable[[int], Run]) -> Run:
        """Bind a call in shared memory.

        While ranks are missing, the call drives MPI: they may wait for the end of a message that this rank has sent.
        """
        table, memory = self.context.consistency, self.shared_memory
        if table:
            table.announce(fingerprint)
        progress = self.progress_driver()

        def handle_stall(seconds: float, positions: list[int]) -> None:
            if table:
                table.check_stall(memory.own_fingerprint(), seconds, memory.missing_ranks)
            progress(seconds, positions)

        memory.stall_handler = handle_stall
        return bind(fingerprint.word)

    def progress_driver(self) -> Callable[[float, list[int]], None]:
        """A stall handler that drives MPI while ranks of this node are missing, and raises if they can never enter."""
        table, progress = self.context.consistency, self.context.private_comm.Iprobe

        def drive(seconds: float, positions: list[int]) -> None:
            if table and table.active_seq and seconds > MEETING_SECONDS:
                table.raise_if_deadlocked()
            progress()

        return drive

    def guard(self, fingerprint: Fingerprint, body: Run, lockstep: bool, amounts: Amounts | None = None) -> Run:
        """Run ``body`` between two comparisons with the other ranks' calls.

        In lockstep no rank begins before all calls have been compared.  Ranks that share memory first pass a barrier
        there: if another rank has entered a call in shared memory, all ranks detect the mismatch together.
        """
        table = self.context.consistency
        if table is None:
            return body
        lockstep = lockstep or self.in_lockstep
        digest = table.announce(fingerprint)
        context, synchronises = self.context, fingerprint.collective in SYNCHRONISING
        meet: Run = table.wait
        if lockstep and self.shared_memory:
            meet = self.bind_shared(fingerprint, self.shared_memory.bind_entry_barrier)

        def run() -> None:
            with table.entered:
                table.begin(digest, amounts)
                table.compare_nodes(amounts)
                if not (synchronises or lockstep):
                    table.compare_entries()
                context.announce_code()
                if lockstep:
                    meet()
                    table.compare_entries()
                body()
                if synchronises and context.awaits_code:
                    table.wait()  # a call without elements may have left early
            if synchronises and context.awaits_code and table.all_had_code():
                self.use_code()

        return run


def text_of(fingerprint: Fingerprint, algorithm: str) -> int:
    """The number of the text by which the flight recorder names calls of a kind."""
    return recorder().intern(f"{fingerprint.uncounted._replace(algorithm='')} by {algorithm}")


def intersect(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """What two ranges have in common."""
    return max(a[0], b[0]), min(a[1], b[1])


def is_in_place(sendbuf: Any) -> bool:
    """Whether a send buffer means in place; mpi4py accepts ``None`` as well."""
    return sendbuf is None or sendbuf is IN_PLACE


def read_only_view(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only view."""
    view = array.view()
    view.flags.writeable = False
    return view


class ExactSum:
    """Floats split into integers whose sum does not depend on order (:mod:`hpccomm.kernels.reproducible`)."""

    def __init__(self, buffer: Buffer) -> None:
        assert buffer.dtype is not None
        stored = buffer.vector()
        self._half = code_of(buffer.half) if buffer.half else ""
        if buffer.dtype.kind == "c":
            stored = stored.view(f"f{buffer.dtype.itemsize // 2}")
        self._stored = stored.view(buffer.half) if buffer.half == "float16" else stored
        self.elements = len(stored)
        self.exponents = np.empty(self.elements, np.int16)
        """The exponents, to be reduced by max."""
        self.parts = np.empty((reproducible.limbs("f2" if self._half else stored.dtype), self.elements), np.int64)
        """The integer parts, each to be summed."""
        self.totals = np.empty_like(self.parts)
        """Room for the sums of the parts."""
        self._name, self._order = f"{buffer.kind} reproducibly", buffer.order

    def as_buffer(self, array: npt.NDArray[Any]) -> Buffer:
        """An array of exponents or parts as the buffer of a call."""
        return replace(read(array, ""), order=self._order, element_name=self._name)

    def _values(self) -> npt.NDArray[np.float64]:
        wide = widen(self._stored, self._half) if self._half else self._stored
        return wide.astype(np.float64)

    def find_exponents(self) -> None:
        """Compute this rank's exponents."""
        self.exponents[...] = reproducible.exponents(self._values())

    def split(self) -> None:
        """Split this rank's values by the common exponents."""
        self.parts[...] = reproducible.split(self._values(), self.exponents, len(self.parts))

    def store(self, exponents: npt.NDArray[np.int16]) -> None:
        """Join the sums and store them in the user's memory."""
        value = reproducible.join(self.totals, exponents)
        with np.errstate(over="ignore"):
            self._stored[...] = narrow(value.astype("f4"), self._half) if self._half else value


class PackedBuffer:
    """Data of any datatype, packed to contiguous bytes; without ``copy`` contiguous data is not copied."""

    def __init__(self, data: Buffer, comm: MPI.Intracomm, nbytes: int, copy: bool = False) -> None:
        self._datatype = data.datatype or MPI.BYTE
        self._comm = comm
        size, (_, extent) = self._datatype.Get_size(), self._datatype.Get_extent()
        self._memory = MPI.memory.fromaddress(data.address, nbytes // max(1, size) * extent)
        dense = size == extent and self._datatype.is_predefined and not copy
        self.octets = view_at(data.address, nbytes, np.dtype("u1")) if dense else np.empty(nbytes, "u1")
        self.pack: Run | None = None if dense else self._pack
        self.unpack: Run | None = None if dense else self._unpack

    def _pack(self) -> None:
        """Pack the user's memory."""
        self._datatype.Pack(self._memory, self.octets, 0, self._comm)

    def _unpack(self) -> None:
        """Unpack into the user's memory."""
        self._datatype.Unpack(self.octets, 0, self._memory, self._comm)


def gather_count(recv: Buffer, counts: tuple[int, ...], octets: int) -> str:
    """The elements that an allgather collects, for its fingerprint."""
    if recv.dtype is not None:
        return describe_counts(counts)
    return UNKNOWN if recv.base is None else str(octets // recv.base.itemsize)


def gather_bytes(recv: Buffer, p: int) -> int:
    """Bytes that an allgather collects; a count in the buffer's form is per rank."""
    if recv.dtype is not None:
        return recv.block_length(p) * p * recv.dtype.itemsize
    octets = recv.octets or 0
    return octets * p if recv.count is not None else octets


VARIABLE_BLOCKS = {"Allgatherv": (1,), "Alltoallv": (0, 1), "Gatherv": (1,), "Scatterv": (0,)}
"""Which buffers (0: send, 1: receive) of an MPI call have a block of any length for each rank."""


def equal_blocks(name: str, in_place: bool) -> tuple[int, ...]:
    """Which buffers (0: send, 1: receive) of an MPI call are counted in elements per rank."""
    whole = {
        "Allgather": (1,),
        "Alltoall": (0, 1),
        "Gather": (1,),
        "Reduce_scatter_block": (int(in_place),),
        "Scatter": (0,),
    }
    return whole.get(name, ())


def weak_form(buffer: Buffer, amount: Any) -> Any:
    """A form for mpi4py that holds no reference to the user's array."""
    assert buffer.dtype is not None
    try:
        datatype = MPI.Datatype.fromcode(buffer.dtype.char)
    except (KeyError, ValueError):
        return buffer.raw
    nbytes = buffer.size * buffer.dtype.itemsize
    return [MPI.memory.fromaddress(buffer.address, nbytes, not buffer.writable), amount, datatype]


def compose(moves: list[Run | None]) -> Run:
    """One function that runs all moves in order."""
    acts = [move for move in moves if move is not None]
    if len(acts) == 1:
        return acts[0]

    def run() -> None:
        for act in acts:
            act()

    return run


def block_copier(work: npt.NDArray[Any], cuts: list[int], recv: Buffer, parts: list[tuple[int, int]]) -> Run:
    """A function that copies gathered blocks to the user's displacements; ``parts`` are (count, displacement)."""
    pairs = [
        (recv.vector(count, displ), work[lo:hi])
        for (count, displ), (lo, hi) in zip(parts, pairwise(cuts), strict=True)
        if count
    ]

    def copy_out() -> None:
        for block, gathered in pairs:
            block[...] = gathered

    return copy_out


def block_order(algorithm: Algorithm, p: int) -> list[int]:
    """The rank of each block."""
    return list(range(p)) if algorithm.own_blocks is None else np.argsort(algorithm.own_blocks(p)).tolist()


def cuts_of(counts: tuple[int, ...], order: list[int]) -> list[int]:
    """Offsets of the blocks of these ranks, one after another."""
    return [0, *np.cumsum([counts[rank] for rank in order]).tolist()]


def sorter(work: npt.NDArray[Any], source: npt.NDArray[Any], counts: tuple[int, ...], order: list[int]) -> Run:
    """A function that copies the ranks' blocks of a vector in another order."""
    if order == sorted(order):
        return lambda: np.copyto(work, source)
    blocks = list(pairwise([0, *np.cumsum(counts).tolist()]))
    pairs = [
        (slice(*to), slice(*blocks[rank])) for to, rank in zip(pairwise(cuts_of(counts, order)), order, strict=True)
    ]

    def sort() -> None:
        for to, block in pairs:
            work[to] = source[block]

    return sort


def describe_counts(counts: tuple[int, ...]) -> str:
    """The counts of all ranks for a fingerprint: their sum where they are alike, else at most eight, and a hash."""
    if min(counts) == max(counts):
        return str(sum(counts))
    known = counts if len(counts) <= 8 else (*counts[:8], f"and {len(counts) - 8} more", hash(counts))
    return "+".join(map(str, known))
