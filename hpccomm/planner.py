"""A call is understood, checked, decided and bound here, once; what comes out is ready to run as often as one likes.

Each method below is one collective and goes the same way: read the buffers, check them, choose who takes the call, and
bind it to native MPI, to shared memory, or to one of our schedules on messages.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.backends.hierarchical import Operands
from hpccomm.backends.hierarchical_gathers import TwoLevelGathers
from hpccomm.calls import operations
from hpccomm.calls.buffers import Message, address_of, apply_displacement, read
from hpccomm.calls.fingerprint import UNKNOWN, Fingerprint
from hpccomm.calls.plans import Plan
from hpccomm.collectives.engine import bind, bind_segments
from hpccomm.collectives.schedule import Algorithm
from hpccomm.context import Context, algorithm_setting, unknown_algorithm_error
from hpccomm.errors import ArgumentError
from hpccomm.kernels import reproducible
from hpccomm.kernels.reductions import reference as reductions
from hpccomm.performance.tuning import Choice

IN_PLACE = MPI.IN_PLACE
Run = Callable[[], None]

SYNCHRONISING = ("Allreduce", "Allgather", "Allgatherv", "Reduce_scatter", "Reduce_scatter_block", "Barrier")
"""Collectives that nobody leaves before all have come."""

LOCKSTEP_BYTES = 1 << 23
"""From here on our algorithms on messages compare all calls before the first message; below, the waiting would show
(measured: 40-60 µs on four ranks that share two cores, a sixth of 1 MiB by a ring), and the tags tell as well."""

FALLBACKS = ("shared", "butterfly", "tree", "ring")
"""What takes a call that native MPI cannot; the first that can."""

INT_MAX, LARGE_COUNTS = (1 << 31) - 1, 4
"""Elements that MPI counts before its version 4."""

SEGMENT_BYTES = 1 << 17
"""Length of a segment in chains and trees where the table does not say."""


PROGRESS_SECONDS = 0.05
"""Seconds for which a rank that waits in shared memory drives MPI before it looks at who is missing."""


class Binder:
    """Binds the calls of one communicator."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    @property
    def rank(self) -> int:
        """This rank."""
        return int(self.comm.rank)

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return int(self.comm.size)

    @property
    def context(self) -> Context:
        """What lies behind the communicator (the first use is collective)."""
        made: Context = self.comm.context
        return made

    def allreduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None) -> Plan:
        """Allreduce."""
        who = self.call_label("Allreduce")
        send, recv = self.reduction_buffers(sendbuf, recvbuf, op, who)
        choice = self.choose("allreduce", recv, op, algorithm, who)
        if recv.half and choice.algorithm != "shared":
            a, b = Float32Copy(send), Float32Copy(recv)
            inner = self.allreduce(None, IN_PLACE if send is recv else a.message, b.message, op, choice.algorithm)
            return self.keep_widened(key, b if send is recv else a, inner, b)
        signature = self.fingerprint("Allreduce", recv, choice, algorithm, op)
        if choice.algorithm == "native":
            return self.bind_native(key, signature, "Allreduce", (send, recv), (op,))
        vector, source = recv.vector(), None if send is recv else send.vector()
        if choice.algorithm == "shared":
            return self.keep_shared(
                key,
                signature,
                lambda word: self.shared_memory.bind_allreduce(
                    send.address, recv.address, recv.elements, recv.kind, operations.name_of(op), word
                ),
            )
        levels = self.context.two_levels if choice.algorithm == "hierarchical" else None
        if levels and op.is_predefined and levels.memory.reduces(operations.name_of(op), recv.kind):
            data = Operands(
                send.address, recv.address, vector, recv.kind, operations.name_of(op), operations.combiner(op)
            )
            levels.memory.stall_handler = self.progress_driver(levels.memory)
            plan = levels.bind(data, signature.digest)
            return self.keep(key, signature, [plan], plan.free, vector.nbytes)
        ours = self.context.algorithms("allreduce")[choice.algorithm]
        plan = self.bind_schedule(ours, vector, ours.steps(self.rank, self.size), choice, op, signature)
        copy_in = None if source is None else lambda: np.copyto(vector, source)
        return self.keep(key, signature, [copy_in, plan], plan.free, vector.nbytes)

    def allreduce_view(self, key: Hashable, buf: Any, op: MPI.Op) -> Plan:
        """Allreduce into one result for all ranks of a node, or into one's own where they share no memory."""
        who = self.call_label("Allreduce_view")
        send, shared = self.operand(buf, op, who), self.shared_memory
        if send.dtype is None:
            raise ArgumentError(f"{who}: it needs an array: pass comm.empty(shape, dtype)")
        if shared is None or not shared.reduces(operations.name_of(op), send.kind):
            result = np.empty(np.shape(buf), buf.dtype)
            inner = self.allreduce(None, buf, result, op, None)
            return self.context.keep(key, Plan(inner.run, inner.free, read_only_view(result)))
        view = shared.view(send.address, send.nbytes)
        if view is None:
            raise ArgumentError(f"{who}: the array is not registered: get it from comm.empty, zeros or register")
        segment, place = view
        result = np.frombuffer(segment.buffer, buf.dtype, send.elements, place).reshape(np.shape(buf))
        signature = Fingerprint("Allreduce_view", operations.name_of(op), str(send.elements), send.kind)
        bound = self.keep_shared(
            key,
            signature,
            lambda word: shared.bind_allreduce(
                send.address,
                segment.address + place,
                send.elements,
                send.kind,
                operations.name_of(op),
                word,
                once=True,
            ),
        )
        bound.result = read_only_view(result)
        return bound

    def reduce(self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str | None) -> Plan:
        """Reduce; ranks other than the root work in memory of their own."""
        who = self.call_label("Reduce")
        self.check_root(root, who)
        if self.rank == root:
            send, recv = self.reduction_buffers(sendbuf, recvbuf, op, who)
        else:
            send = recv = self.operand(sendbuf, op, who)
        choice = self.choose("reduce", send, op, algorithm, who)
        if send.half and choice.algorithm != "shared":
            here, a = self.rank == root, Float32Copy(send)
            b = a if send is recv else Float32Copy(recv)
            result = b.message if here else None
            inner = self.reduce(None, IN_PLACE if here and b is a else a.message, result, op, root, choice.algorithm)
            return self.keep_widened(key, a, inner, b if here else None)
        signature = self.fingerprint("Reduce", send, choice, algorithm, op, root)
        if choice.algorithm == "native":
            arrives = recv if self.rank == root else Message(recvbuf)
            return self.bind_native(key, signature, "Reduce", (send, arrives), (op, root))
        source = send.vector()
        if choice.algorithm == "shared":
            into = recv.address if self.rank == root else 0
            return self.keep_shared(
                key,
                signature,
                lambda word: self.shared_memory.bind_reduce(
                    send.address, into, send.elements, send.kind, operations.name_of(op), root, word
                ),
            )
        work = recv.vector() if self.rank == root else np.empty_like(source)
        ours = self.context.algorithms("reduce")[choice.algorithm]
        plan = self.bind_schedule(ours, work, ours.steps(self.rank, self.size, root), choice, op, signature)
        in_place = self.rank == root and send is recv
        copy_in = None if in_place else lambda: np.copyto(work, source)
        return self.keep(key, signature, [copy_in, plan], plan.free, 0)

    def reduce_scatter_block(
        self, key: Hashable, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str | None
    ) -> Plan:
        """Reduce_scatter_block."""
        who = self.call_label("Reduce_scatter_block")
        recv = self.operand(recvbuf, op, who, writable=True)
        in_place = is_in_place(sendbuf) or sendbuf is recvbuf
        send = recv if in_place else self.operand(sendbuf, op, who)
        if send.opaque or recv.opaque:
            counts = (0,) * self.size
        else:
            counts = ((recv.block_length(self.size) if in_place else recv.elements),) * self.size
            self.check_blocks(send, recv, counts, in_place, who)
        return self.reduce_scatter(key, "Reduce_scatter_block", (send, recv), counts, (op,), algorithm, in_place)

    def reduce_scatter_v(
        self,
        key: Hashable,
        sendbuf: Any,
        recvbuf: Any,
        told: tuple[int, ...] | None,
        op: MPI.Op,
        algorithm: str | None,
    ) -> Plan:
        """Reduce_scatter; ``told`` are the counts, where the user said them."""
        who = self.call_label("Reduce_scatter")
        recv = self.operand(recvbuf, op, who, writable=True)
        in_place = is_in_place(sendbuf) or sendbuf is recvbuf
        send = recv if in_place else self.operand(sendbuf, op, who)
        if told is None and in_place:
            raise ArgumentError(f"{who}: in place it cannot know who gets how much: pass recvcounts")
        counts = told
        if counts is None:
            counts = self.context.counts(recv.elements)
        if not (send.opaque or recv.opaque):
            self.check_blocks(send, recv, counts, in_place, who)
        return self.reduce_scatter(
            key, "Reduce_scatter", (send, recv), counts, (told if recv.opaque else counts, op), algorithm, in_place
        )

    def reduce_scatter(
        self,
        key: Hashable,
        name: str,
        buffers: tuple[Message, Message],
        counts: tuple[int, ...],
        arguments: tuple[Any, ...],
        algorithm: str | None,
        in_place: bool,
    ) -> Plan:
        """Both reduce-scatters, once the parts are known."""
        send, recv = buffers
        op = arguments[-1]
        choice = self.choose("reduce_scatter", send, op, algorithm, self.call_label(name))
        if send.half and choice.algorithm != "shared":
            a = Float32Copy(send)
            b = Float32Copy(recv) if recv is not send else a
            inner = self.reduce_scatter(
                None, name, (a.message, b.message), counts, arguments, choice.algorithm, in_place
            )
            return self.keep_widened(key, a, inner, b)
        signature = self.fingerprint(name, send, choice, algorithm, op, count="+".join(map(str, shorten(counts))))
        if choice.algorithm == "native":
            return self.bind_native(key, signature, name, (send, recv), arguments)
        into, source = recv.vector(counts[self.rank]), send.vector(sum(counts))
        if choice.algorithm == "shared":
            return self.keep_shared(
                key,
                signature,
                lambda word: self.shared_memory.bind_reduce_scatter(
                    send.address, recv.address, counts, send.kind, operations.name_of(op), word
                ),
            )
        ours, levels = self.context.algorithms("reduce_scatter")[choice.algorithm], self.levels(choice, op, send.kind)
        order = levels.order if levels else block_order(ours, self.size)
        cuts = cuts_of(counts, order)
        work = source if levels and order == sorted(order) else np.empty_like(source)
        copy_in = None if work is source else sorter(work, source, counts, order)
        if levels:
            data = Operands(
                address_of(work),
                recv.address,
                into,
                send.kind,
                operations.name_of(op),
                operations.combiner(op),
            )
            plan = levels.bind_reduce_scatter(data, cuts, signature.digest)
            return self.keep(key, signature, [copy_in, plan], plan.free, work.nbytes)
        steps, me = ours.steps(self.rank, self.size), order.index(self.rank)
        plan = bind(steps, work, cuts, self.context.messages, operations.combiner(op), signature.digest)
        part = work[cuts[me] : cuts[me + 1]]
        moves: list[Run | None] = [copy_in, plan, lambda: np.copyto(into, part)]
        return self.keep(key, signature, moves, plan.free, work.nbytes)

    def bind_reproducible(
        self, key: Hashable, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op
    ) -> Plan | None:
        """A reduction whose bits do not depend on order; ``None`` where any order gives the same bits.

        ``arguments`` are those that follow the buffers: counts, the operation, a root.
        """
        who, (sendbuf, recvbuf) = self.call_label(name), buffers
        message = self.operand(recvbuf if is_in_place(sendbuf) else sendbuf, op, who)
        if message.dtype is None or message.dtype.char in "gG":
            raise ArgumentError(f"{who}: reproducible=True adds floats of up to 64 bits: pass them as a plain array")
        if not message.half and message.dtype.kind not in "fc":
            return None
        if op != MPI.SUM:
            if op in (MPI.MIN, MPI.MAX):
                return None
            raise ArgumentError(f"{who}: reproducible=True is for sums, minima and maxima: leave it out")
        width = 2 if message.dtype.kind == "c" else 1
        here = name != "Reduce" or self.rank == arguments[-1]
        result = self.buffer(recvbuf, who, writable=True) if here else message
        first, method = 0, name.lower()
        if name == "Reduce_scatter":
            counts, method = arguments[0], "reduce_scatter_v"
            if counts is None:
                counts = self.context.counts(result.elements)
            first, result = sum(counts[: self.rank]), replace(result, count=counts[self.rank])
            arguments = (tuple(width * each for each in counts), *arguments[1:])
        elif name == "Reduce_scatter_block":
            each = message.elements // self.size
            first, result = self.rank * each, replace(result, count=each)
        whole, total = ExactSum(message), ExactSum(result)
        inner = [self.allreduce(None, IN_PLACE, whole.exponents, MPI.MAX, None)]
        for part, into in zip(whole.parts, total.totals, strict=True):
            inner.append(getattr(self, method)(None, part, into if here else None, *arguments, None))
        place = slice(width * first, width * first + total.elements)
        store = (lambda: total.store(whole.exponents_of(place))) if here else None
        steps = [whole.find_exponents, inner[0].run, whole.split, *(each.run for each in inner[1:]), store]

        def free() -> None:
            for each in inner:
                each.free()

        bound = Plan(compose(steps), free)
        return bound if key is None else self.context.keep(key, bound)

    def allgather(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Allgather."""
        who = self.call_label("Allgather")
        recv = self.buffer(recvbuf, who, writable=True)
        send = recv if is_in_place(sendbuf) else self.buffer(sendbuf, who)
        each = 0 if recv.opaque else recv.block_length(self.size)
        counts = (each,) * self.size
        return self.bind_allgather(key, "Allgather", send, recv, counts, algorithm, is_in_place(sendbuf))

    def allgatherv(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Allgatherv."""
        who = self.call_label("Allgatherv")
        recv = self.buffer(recvbuf, who, writable=True, parts=True)
        send = recv if is_in_place(sendbuf) else self.buffer(sendbuf, who)
        counts = (0,) * self.size if recv.opaque else recv.blocks(self.size)[0]
        if len(counts) != self.size:
            raise ArgumentError(f"{who}: {len(counts)} counts for {self.size} ranks: pass one a rank")
        return self.bind_allgather(key, "Allgatherv", send, recv, counts, algorithm, is_in_place(sendbuf))

    def bind_allgather(
        self,
        key: Hashable,
        name: str,
        send: Message,
        recv: Message,
        counts: tuple[int, ...],
        algorithm: str | None,
        in_place: bool,
    ) -> Plan:
        """Both allgathers, once the parts are known."""
        who, me = self.call_label(name), self.rank
        octets = gather_bytes(recv, self.size) if recv.dtype is None else sum(counts) * recv.dtype.itemsize
        choice = self.choose("allgather", recv, None, algorithm, who, octets)
        opaque = recv.opaque or send.opaque
        signature = self.fingerprint(name, recv, choice, algorithm, count=gather_count(recv, counts, octets))
        displs = recv.blocks(self.size)[1] if name == "Allgatherv" else tuple(k * counts[0] for k in range(self.size))
        if not opaque:
            self.check_allgather(send, recv, counts, displs, in_place, who)
        if opaque and choice.algorithm != "native":
            return self.bind_packed_allgather(send, recv, algorithm, in_place)
        if choice.algorithm == "native":
            return self.bind_native(key, signature, name, (recv if in_place else send, recv), ())
        assert recv.dtype is not None
        if choice.algorithm == "shared":
            width = recv.dtype.itemsize
            own = recv.address + displs[me] * width if in_place else send.address
            sizes, places = [each * width for each in counts], [each * width for each in displs]
            return self.keep_shared(
                key, signature, lambda word: self.shared_memory.bind_allgather(own, recv.address, sizes, places, word)
            )
        ours, levels = self.context.algorithms("allgather")[choice.algorithm], self.levels(choice)
        order = levels.order if levels else block_order(ours, self.size)
        cuts, block = cuts_of(counts, order), order.index(me)
        straight = [displs[rank] for rank in order] == cuts[:-1]
        work = recv.vector(cuts[-1]) if straight else np.empty(cuts[-1], recv.dtype)
        mine = work[cuts[block] : cuts[block + 1]]
        source = recv.vector(counts[me], displs[me]) if in_place else send.vector(send.elements)
        copy_in = None if in_place and straight else lambda: np.copyto(mine.view("u1"), source.view("u1"))
        spread = None if straight else block_copier(work, cuts, recv, [(counts[rank], displs[rank]) for rank in order])
        if levels:
            plan = levels.bind_allgather(work, cuts, signature.digest)
        else:
            plan = bind(ours.steps(me, self.size), work, cuts, self.context.messages, None, signature.digest)
        return self.keep(key, signature, [copy_in, plan, spread], plan.free, octets)

    def bind_packed_allgather(self, send: Message, recv: Message, algorithm: str | None, in_place: bool) -> Plan:
        """Allgather of a derived datatype: as bytes, so that it goes the way of ranks that have plain memory."""
        total = gather_bytes(recv, self.size)
        into = PackedBuffer(recv, self.comm, total)
        dtype = recv.dtype or recv.base or np.dtype("u1")
        whole = into.octets.view(dtype)
        out = into if in_place else PackedBuffer(send, self.comm, total // self.size)
        parts = (whole.size // self.size,) * self.size
        mine, all_of_it = read(out.octets.view(dtype), ""), read(whole, "")
        inner = self.bind_allgather(None, "Allgather", mine, all_of_it, parts, algorithm, in_place)
        return Plan(compose([out.pack, inner.run, into.unpack]), inner.free)

    def bcast(self, key: Hashable, buf: Any, root: int, algorithm: str | None) -> Plan:
        """Bcast."""
        who = self.call_label("Bcast")
        self.check_root(root, who)
        data = self.buffer(buf, who, writable=self.rank != root)
        choice = self.choose("bcast", data, None, algorithm, who, data.nbytes)
        signature = self.fingerprint("Bcast", data, choice, algorithm, None, root)
        if choice.algorithm == "native":
            return self.bind_native(key, signature, "Bcast", (data,), (root,))
        packed = PackedBuffer(data, self.comm, data.nbytes) if data.opaque else None
        vector = packed.octets if packed else data.vector()
        before = packed.pack if packed and self.rank == root else None
        after = packed.unpack if packed and self.rank != root else None
        if choice.algorithm == "shared":
            start = address_of(vector) if packed else data.address
            return self.keep_shared(
                key,
                signature,
                lambda word: self.shared_memory.bind_bcast(start, data.nbytes, root, word),
                before,
                after,
            )
        ours = self.context.algorithms("bcast")[choice.algorithm]
        steps = ours.steps(self.rank, self.size, root)
        plan = self.bind_schedule(ours, vector.view("u1"), steps, choice, None, signature)
        return self.keep(key, signature, [before, plan, after], plan.free, 0)

    def alltoall(self, key: Hashable, sendbuf: Any, recvbuf: Any, algorithm: str | None) -> Plan:
        """Alltoall; in place it goes through a copy."""
        who, in_place = self.call_label("Alltoall"), is_in_place(sendbuf)
        recv = self.buffer(recvbuf, who, writable=True)
        send = recv if in_place else self.buffer(sendbuf, who)
        sent, received = gather_bytes(send, self.size), gather_bytes(recv, self.size)
        choice = self.choose("alltoall", recv, None, algorithm, who, received)
        count = gather_count(
            recv, (0,) if recv.dtype is None else (recv.block_length(self.size),) * self.size, received
        )
        signature = self.fingerprint("Alltoall", recv, choice, algorithm, count=count)
        if choice.algorithm == "native":
            return self.bind_native(key, signature, "Alltoall", (send, recv), ())
        if sent != received or sent % self.size:
            raise ArgumentError(f"{who}: sends {sent} bytes, receives {received}: make them agree")
        if not in_place:
            self.check_overlap(send, recv, who)
        letters = PackedBuffer(send, self.comm, sent) if send.opaque else None
        answers = PackedBuffer(recv, self.comm, received) if recv.opaque else None
        copied = np.empty(sent, "u1") if in_place and letters is None else None
        source = letters.octets if letters else copied
        start = send.address if source is None else address_of(source)
        into = address_of(answers.octets) if answers else recv.address
        before: Run | None = letters.pack if letters else None
        if copied is not None:
            octets = recv.vector(recv.block_length(self.size) * self.size).view("u1")
            before = lambda: np.copyto(copied, octets)  # noqa: E731
        each = sent // self.size
        sizes, places = [each] * self.size, [each * k for k in range(self.size)]
        return self.keep_shared(
            key,
            signature,
            lambda word: self.shared_memory.bind_alltoall(start, into, sizes, places, sizes, places, word),
            before,
            answers.unpack if answers else None,
        )

    def barrier(self, key: Hashable) -> Plan:
        """Barrier: wherever all ranks share memory a meeting there, which compares the calls at the same time."""
        comm, signature = self.comm, Fingerprint("Barrier")
        setting = algorithm_setting(self.context.settings["HPCCOMM_ALGORITHM"], "barrier")
        if self.shared_memory and "native" not in (comm.algorithm, setting):
            return self.keep_shared(key, signature, self.shared_memory.bind_barrier)
        return self.context.keep(key, Plan(self.guard(signature, lambda: MPI.Intracomm.Barrier(comm), lockstep=False)))

    def bind_inherited(
        self, key: Hashable, name: str, buffers: tuple[Any, ...], root: int | None = None, op: Any = None
    ) -> Plan:
        """A collective that is MPI's own, with the calls compared."""
        who = self.call_label(name)
        if root is not None:
            self.check_root(root, who)
        dtype, count, known = "", "", []
        if name != "Alltoallw":
            known = [read(each, who) for each in buffers]
            buffers = tuple(each.raw for each in known)
        if op is not None:
            first = known[1]
            dtype = UNKNOWN if first.dtype is None else first.kind
            count = UNKNOWN if first.dtype is None else str(first.elements)
            if first.half:
                raise ArgumentError(f"{who}: MPI adds no {first.kind}: cast to float32 before the call")
            if first.dtype is not None:
                operations.check_defined(op, first.dtype, who)
        op_name = "" if op is None else operations.name_of(op)
        signature = Fingerprint(name, op_name, count, dtype, "" if root is None else str(root))
        arguments = [each for each in (op, root) if each is not None]
        reusable = key is not None and all(self.has_weak_form(name, k, each) for k, each in enumerate(known))
        if reusable:
            buffers = tuple(self.form(name, k, each) for k, each in enumerate(known))
        call, comm = getattr(MPI.Intracomm, name), self.comm
        bound = Plan(self.guard(signature, lambda: call(comm, *buffers, *arguments), False))
        return self.context.keep(key, bound) if reusable else bound

    def has_weak_form(self, name: str, number: int, buffer: Message) -> bool:
        """Whether a form without the user's array can stand for a buffer of a call, the first or the second."""
        if buffer.dtype is None:
            return buffer.raw is None or buffer.raw is IN_PLACE
        return buffer.count is not None or number not in equal_blocks(name, False) or buffer.size % self.size == 0

    def form(self, name: str, number: int, buffer: Message, in_place: bool = False) -> Any:
        """That form."""
        if buffer.dtype is None:
            return buffer.raw
        if number in VARIABLE_BLOCKS.get(name, ()):
            return weak_form(buffer, buffer.blocks(self.size))
        one = apply_displacement(buffer, self.call_label(name))
        return weak_form(one, one.block_length(self.size) if number in equal_blocks(name, in_place) else one.elements)

    def call_label(self, name: str) -> str:
        """How errors of this call begin."""
        return f"rank {self.rank}: {name}"

    def buffer(self, given: Any, who: str, writable: bool = False, parts: bool = False) -> Message:
        """A buffer that can be sent, or received into; with a part for each rank, that lie where its form says."""
        message = read(given, who) if parts else apply_displacement(read(given, who), who)
        if writable and not message.writable:
            raise ArgumentError(f"{who}: the buffer to receive into is read-only: pass a writable copy")
        if message.dtype is not None and message.count is not None and message.count > message.size:
            raise ArgumentError(
                f"{who}: the buffer holds {message.size} elements of {message.dtype}, count says {message.count}: "
                "pass a longer buffer or a smaller count"
            )
        return message

    def operand(self, given: Any, op: MPI.Op, who: str, writable: bool = False) -> Message:
        """A buffer of a reduction."""
        message = self.buffer(given, who, writable)
        if given is None:
            raise ArgumentError(f"{who}: the buffer is None: pass an array")
        if message.dtype is not None:
            operations.check_defined(op, np.dtype("f4") if message.half else message.dtype, who)
        if message.half and not op.is_predefined:
            raise ArgumentError(f"{who}: a user-defined operation cannot see {message.kind}: cast to float32")
        return message

    def reduction_buffers(self, sendbuf: Any, recvbuf: Any, op: MPI.Op, who: str) -> tuple[Message, Message]:
        """What goes in and what comes out; the same message twice when in place."""
        recv = self.operand(recvbuf, op, who, writable=True)
        if is_in_place(sendbuf) or sendbuf is recvbuf:
            return recv, recv
        send = self.operand(sendbuf, op, who)
        if send.opaque or recv.opaque:
            return send, recv
        if send.kind != recv.kind or send.elements != recv.elements:
            raise ArgumentError(
                f"{who}: sends {send.elements} {send.kind}, receives {recv.elements} {recv.kind}: make them alike"
            )
        if send.order != recv.order:
            raise ArgumentError(
                f"{who}: one array is in C order, the other in Fortran order: pass np.ascontiguousarray(x)"
            )
        if send.address == recv.address:
            return recv, recv
        self.check_overlap(send, recv, who)
        return send, recv

    def check_overlap(self, send: Message, recv: Message, who: str) -> None:
        """Refuse buffers that share bytes."""
        if send.overlaps(recv):
            raise ArgumentError(f"{who}: the buffers overlap: pass MPI.IN_PLACE, or a copy")

    def check_root(self, root: int, who: str) -> None:
        """Refuse a root that is no rank."""
        if not 0 <= root < self.size:
            raise ArgumentError(f"{who}: root {root} is not one of the ranks 0 … {self.size - 1}")

    def check_blocks(self, send: Message, recv: Message, counts: tuple[int, ...], in_place: bool, who: str) -> None:
        """Refuse parts of a reduce-scatter that do not fit the buffers."""
        if len(counts) != self.size or min(counts) < 0:
            raise ArgumentError(f"{who}: recvcounts {counts} for {self.size} ranks: pass one count a rank")
        total = sum(counts)
        if send.kind != recv.kind or send.elements != total or (not in_place and recv.elements < counts[self.rank]):
            raise ArgumentError(
                f"{who}: sends {send.elements} {send.kind}, receives {recv.elements} {recv.kind}, the parts "
                f"are {total} in all and {counts[self.rank]} here: make them agree"
            )
        if not in_place:
            self.check_overlap(send, recv, who)

    def check_allgather(
        self,
        send: Message,
        recv: Message,
        counts: tuple[int, ...],
        displs: tuple[int, ...],
        in_place: bool,
        who: str,
    ) -> None:
        """Refuse parts of an allgather that do not fit the buffers."""
        assert recv.dtype is not None
        end = max((d + c for d, c in zip(displs, counts, strict=True)), default=0)
        if end > recv.size:
            raise ArgumentError(f"{who}: the parts end at element {end}, the buffer to receive into has {recv.size}")
        if in_place:
            return
        if send.nbytes != counts[self.rank] * recv.dtype.itemsize:
            raise ArgumentError(
                f"{who}: sends {send.nbytes} bytes, the buffer to receive into has "
                f"{counts[self.rank] * recv.dtype.itemsize} for this rank: make them agree"
            )
        self.check_overlap(send, recv, who)

    def levels(self, choice: Choice, op: MPI.Op | None = None, kind: str = "") -> TwoLevelGathers | None:
        """What takes an allgather or a reduce-scatter in two levels; ``None`` where our schedule has to."""
        found = self.context.two_level_gathers if choice.algorithm == "hierarchical" else None
        if found is None:
            return None
        if op is not None and not (op.is_predefined and found.memory.reduces(operations.name_of(op), kind)):
            return None
        found.memory.stall_handler = self.progress_driver(found.memory)
        return found

    @property
    def shared_memory(self) -> Any:
        """Shared memory of all ranks, where there is any."""
        return self.context.shared_memory

    def choose(
        self,
        collective: str,
        data: Message,
        op: MPI.Op | None,
        algorithm: str | None,
        who: str,
        nbytes: int | None = None,
    ) -> Choice:
        """Who takes this call: as the caller says, as the communicator says, or as the table says."""
        names = self.context.names(collective)
        if algorithm is not None and algorithm not in names:
            raise unknown_algorithm_error(who, algorithm, names)
        fits = self.candidates(collective, data, op)
        if algorithm is not None and algorithm not in ("auto", "native", *fits):
            raise ArgumentError(self.why_unfit(who, algorithm, data, fits))
        wanted = algorithm or self.comm.algorithm
        if algorithm == "native" and self.why_too_many(data, op):
            raise ArgumentError(
                f"{who}: {self.why_too_many(data, op)}: leave the algorithm out, or use one of {', '.join(fits)}"
            )
        if wanted in ("native", *fits):
            return Choice(wanted, None, "named by the caller")
        dtype = ("e" if data.half else data.dtype.char) if data.dtype is not None and op is not None else "B"
        allowed = ("native", *(name for name in names if name in fits))
        if self.size == 1 or not fits:
            choice = Choice("native", None, "nothing to choose")
        else:
            choice = self.context.decide(collective, data.nbytes if nbytes is None else nbytes, dtype, allowed, who)
        reason = self.why_not_native(data, op) if choice.algorithm == "native" else ""
        return Choice(next(name for name in FALLBACKS if name in fits), None, reason) if reason and fits else choice

    def why_not_native(self, data: Message, op: MPI.Op | None) -> str:
        """Why MPI's own algorithm shall not take a call, if there is a reason."""
        if self.size > 1 and self.loses_nan(data, op):
            return "MPI's own min and max may lose a NaN"
        return self.why_too_many(data, op)

    def why_too_many(self, data: Message, op: MPI.Op | None) -> str:
        """Why MPI's own reductions cannot take so many elements; mpi4py helps where they only move."""
        if op is not None and MPI.VERSION < LARGE_COUNTS and data.elements > INT_MAX:
            return f"reductions of MPI {MPI.VERSION} count up to {INT_MAX} elements"
        return ""

    def loses_nan(self, data: Message, op: MPI.Op | None) -> bool:
        """Whether MPI's own algorithm may drop a NaN."""
        extreme = op is not None and operations.name_of(op) in ("min", "max")
        return extreme and bool(data.half or (data.dtype is not None and data.dtype.kind == "f"))

    def candidates(self, collective: str, data: Message, op: MPI.Op | None) -> tuple[str, ...]:
        """Our algorithms that can do this call."""
        ours = self.context.algorithms(collective)
        if op is None:
            movable = data.dtype is not None or data.datatype is not None
            return (*ours, *(["shared"] if self.shared_memory else [])) if movable else ()
        if data.dtype is None or data.dtype.kind not in "biufc":
            return ()
        fits = tuple(name for name, each in ours.items() if each.ordered or op.Is_commutative())
        shared = self.shared_memory
        if shared and op.is_predefined and shared.reduces(operations.name_of(op), data.kind):
            return (*fits, "shared")
        return fits

    def why_unfit(self, who: str, wanted: str, data: Message, fits: tuple[str, ...]) -> str:
        """Why a named algorithm cannot take a call."""
        if data.opaque:
            return f"{who}: algorithm={wanted!r} cannot reduce a derived datatype: leave the algorithm out"
        others = ", ".join(repr(name) for name in fits)
        return (
            f"{who}: algorithm={wanted!r} cannot do this operation in rank order on {data.dtype}: use one of {others}"
        )

    def fingerprint(
        self,
        name: str,
        data: Message,
        choice: Choice,
        algorithm: str | None,
        op: MPI.Op | None = None,
        root: int | None = None,
        count: str | None = None,
    ) -> Fingerprint:
        """The call in words that the other ranks' can be compared with."""
        dtype = data.dtype or data.base
        if count is None:
            count = UNKNOWN if dtype is None else str(data.nbytes // dtype.itemsize)
        return Fingerprint(
            name,
            operations.name_of(op) if op is not None else "",
            count,
            UNKNOWN if dtype is None else data.element_name or data.kind if data.dtype is not None else dtype.name,
            "" if root is None else str(root),
            UNKNOWN if dtype is None else data.order,
            choice.algorithm if algorithm else "",
        )

    def bind_schedule(
        self,
        ours: Algorithm,
        vector: npt.NDArray[Any],
        steps: Any,
        choice: Choice,
        op: MPI.Op | None,
        signature: Fingerprint,
    ) -> Any:
        """Bind one of ours whose blocks may lie anywhere, in segments where it gains from them."""
        segment = choice.segment_bytes or (SEGMENT_BYTES if ours.segmented else 0)
        lanes = -(-vector.nbytes // segment) if segment and vector.nbytes else 1
        combine = None if op is None else operations.combiner(op)
        blocks = ours.blocks(self.size)
        return bind_segments(steps, vector, blocks, lanes, self.context.messages, combine, signature.digest)

    def bind_native(
        self,
        key: Hashable,
        signature: Fingerprint,
        name: str,
        buffers: tuple[Message, ...],
        arguments: tuple[Any, ...],
    ) -> Plan:
        """Bind MPI's own algorithm; forms of plain memory can be kept, they do not keep the user's array alive.

        Where nobody may leave before all have come, the calls are compared first: of counts that differ MPI makes wrong
        sums, left-over messages or (MPICH) an end without a word to Python.
        """
        method, comm = getattr(MPI.Intracomm, name), self.comm
        first = buffers[0]
        same = len(buffers) == 2 and buffers[1] is first
        forms = [IN_PLACE if same else first.raw, *(each.raw for each in buffers[1:])]
        reusable = key is not None and all(each.dtype is not None for each in buffers)
        if reusable:
            forms = [IN_PLACE if same and k == 0 else self.form(name, k, each, same) for k, each in enumerate(buffers)]
        run = self.guard(signature, lambda: method(comm, *forms, *arguments), name in SYNCHRONISING)
        return self.context.keep(key, Plan(run)) if reusable else Plan(run)

    def keep(
        self,
        key: Hashable,
        signature: Fingerprint,
        moves: list[Run | None],
        free: Run,
        lockstep_bytes: int,
    ) -> Plan:
        """A bound call of ours on messages, kept under its key."""
        bound = Plan(self.guard(signature, compose(moves), lockstep_bytes >= LOCKSTEP_BYTES), free)
        return bound if key is None else self.context.keep(key, bound)

    def keep_shared(
        self,
        key: Hashable,
        signature: Fingerprint,
        bind: Callable[[int], Run],
        before: Run | None = None,
        after: Run | None = None,
    ) -> Plan:
        """A bound call in shared memory, kept under its key; it compares the calls itself."""
        bound = Plan(compose([before, self.bind_shared(signature, bind), after]))
        return bound if key is None else self.context.keep(key, bound)

    def bind_shared(self, signature: Fingerprint, bind: Callable[[int], Run]) -> Run:
        """Bind a call in shared memory.

        While ranks are missing it drives MPI: they may be waiting for the end of a message that this rank has sent.
        """
        roll = self.context.consistency
        word = roll.announce(signature) if roll else 0
        progress = self.progress_driver(self.shared_memory)

        def late(seconds: float, positions: list[int]) -> None:
            if roll:
                roll.check_stall(word, seconds, positions)
            progress(seconds, positions)

        self.shared_memory.stall_handler = late
        return bind(signature.digest)

    def progress_driver(self, memory: Any) -> Callable[[float, list[int]], None]:
        """Drive MPI for a while, as long as ranks of this node are missing; raise if they will never come."""
        roll, progress = self.context.consistency, self.context.private_comm.Iprobe

        def drive(seconds: float, positions: list[int]) -> None:
            if roll and roll.active_seq:
                roll.raise_if_deadlocked()
            until = time.monotonic() + PROGRESS_SECONDS
            while memory.missing_ranks() and time.monotonic() < until:
                progress()
                os.sched_yield()

        return drive

    def keep_widened(self, key: Hashable, first: Float32Copy, inner: Plan, last: Float32Copy | None) -> Plan:
        """16-bit floats, reduced in float32 and rounded once."""
        bound = Plan(compose([first.widen, inner.run, last.narrow if last else None]), inner.free)
        return bound if key is None else self.context.keep(key, bound)

    def guard(self, signature: Fingerprint, body: Run, lockstep: bool) -> Run:
        """``body`` between the two looks at what the other ranks call.

        In lockstep nobody begins before all calls have been compared.  Where the ranks share memory they meet there
        first: others may have brought a call that takes place there, and then all of them learn of it together.
        """
        roll = self.context.consistency
        if roll is None:
            return body
        word = roll.announce(signature)
        enter = roll.begin if signature.collective in SYNCHRONISING else roll.enter
        leave, wait = roll.leave, roll.wait
        meet = (
            self.bind_shared(signature, self.shared_memory.bind_entry_barrier)
            if lockstep and self.shared_memory
            else None
        )

        def run() -> None:
            if meet:
                meet()
            try:
                enter(word)
                if lockstep:
                    wait()
                body()
                leave(word)
            except MPI.Exception as failure:
                roll.active_seq = 0
                roll.blame(word, failure)
            except BaseException:
                roll.active_seq = 0
                raise

        return run


def is_in_place(sendbuf: Any) -> bool:
    """mpi4py takes ``None`` for in place, too."""
    return sendbuf is None or sendbuf is IN_PLACE


def read_only_view(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A view that cannot be written."""
    view = array.view()
    view.flags.writeable = False
    return view


class Float32Copy:
    """16-bit floats as float32."""

    def __init__(self, message: Message) -> None:
        self._code = reductions.code_of(message.half)
        stored = message.vector()
        self._stored = stored if self._code == "bf16" else stored.view(message.half)
        self._values = np.empty(stored.size, "f4")
        self.message = replace(read(self._values, ""), order=message.order, element_name=f"{message.half} in float32")

    def widen(self) -> None:
        """From the user's memory."""
        self._values[...] = reductions.widen(self._stored, self._code)

    def narrow(self) -> None:
        """Into the user's memory, to nearest even."""
        self._stored[...] = reductions.narrow(self._values, self._code)


class ExactSum:
    """Floats as integers whose sum does not depend on order (:mod:`hpccomm.kernels.reproducible`)."""

    def __init__(self, message: Message) -> None:
        assert message.dtype is not None
        stored = message.vector()
        self._half = reductions.code_of(message.half) if message.half else ""
        if message.dtype.kind == "c":
            stored = stored.view(f"f{message.dtype.itemsize // 2}")
        self._stored = stored.view(message.half) if message.half == "float16" else stored
        self.elements = len(stored)
        self._exponents = np.empty(self.elements, np.int16)
        self._parts = np.empty((reproducible.limbs("f2" if self._half else stored.dtype), self.elements), np.int64)
        self._totals = np.empty_like(self._parts)
        self._words, self._order = f"{message.kind} reproducibly", message.order

    def _message(self, array: npt.NDArray[Any]) -> Message:
        return replace(read(array, ""), order=self._order, element_name=self._words)

    @property
    def exponents(self) -> Message:
        """The exponents."""
        return self._message(self._exponents)

    @property
    def parts(self) -> list[Message]:
        """The integers."""
        return [self._message(part) for part in self._parts]

    @property
    def totals(self) -> list[Message]:
        """Room for their sums."""
        return [self._message(part) for part in self._totals]

    def _values(self) -> npt.NDArray[np.float64]:
        wide = reductions.widen(self._stored, self._half) if self._half else self._stored
        return wide.astype(np.float64)

    def find_exponents(self) -> None:
        """This rank's."""
        self._exponents[...] = reproducible.exponents(self._values())

    def split(self) -> None:
        """By the exponents that all agreed on."""
        self._parts[...] = reproducible.split(self._values(), self._exponents, len(self._parts))

    def exponents_of(self, place: slice) -> npt.NDArray[np.int16]:
        """What all agreed on, of a part."""
        return self._exponents[place]

    def store(self, exponents: npt.NDArray[np.int16]) -> None:
        """The sums, into the user's memory."""
        value = reproducible.join(self._totals, exponents)
        with np.errstate(over="ignore"):
            narrow = reductions.narrow(value.astype("f4"), self._half) if self._half else value
            self._stored[...] = narrow


class PackedBuffer:
    """Data as plain bytes, whatever its datatype."""

    def __init__(self, data: Message, comm: MPI.Intracomm, nbytes: int) -> None:
        self._datatype = data.datatype or MPI.BYTE
        self._comm = comm
        items = nbytes // max(1, self._datatype.Get_size())
        self._memory = MPI.memory.fromaddress(data.address, items * self._datatype.Get_extent()[1])
        self.octets = np.empty(nbytes, np.uint8)

    def pack(self) -> None:
        """From the user's memory."""
        self._datatype.Pack(self._memory, self.octets, 0, self._comm)

    def unpack(self) -> None:
        """Into the user's memory."""
        self._datatype.Unpack(self.octets, 0, self._memory, self._comm)


def gather_count(recv: Message, counts: tuple[int, ...], octets: int) -> str:
    """How many elements an allgather collects, in words."""
    if recv.dtype is not None:
        return str(sum(counts))
    return UNKNOWN if recv.base is None else str(octets // recv.base.itemsize)


def gather_bytes(recv: Message, p: int) -> int:
    """Bytes that an allgather collects: the user says how much from each rank, or nothing."""
    if recv.dtype is not None:
        return recv.block_length(p) * p * recv.dtype.itemsize
    octets = recv.octets or 0
    return octets * p if recv.count is not None else octets


VARIABLE_BLOCKS = {"Allgatherv": (1,), "Alltoallv": (0, 1), "Gatherv": (1,), "Scatterv": (0,)}
"""Which buffers of an MPI call have a part of any length for each rank."""


def equal_blocks(name: str, in_place: bool) -> tuple[int, ...]:
    """Which buffers of an MPI call are counted in elements a rank."""
    whole = {
        "Allgather": (1,),
        "Alltoall": (0, 1),
        "Gather": (1,),
        "Reduce_scatter_block": (int(in_place),),
        "Scatter": (0,),
    }
    return whole.get(name, ())


def weak_form(message: Message, amount: Any) -> Any:
    """A form for mpi4py that does not keep the user's array alive."""
    assert message.dtype is not None
    try:
        datatype = MPI.Datatype.fromcode(message.dtype.char)
    except (KeyError, ValueError):
        return message.raw
    return [MPI.memory.fromaddress(message.address, message.size * message.dtype.itemsize), amount, datatype]


def compose(moves: list[Run | None]) -> Run:
    """One after the other."""
    acts = [move for move in moves if move is not None]
    if len(acts) == 1:
        return acts[0]

    def run() -> None:
        for act in acts:
            act()

    return run


def block_copier(work: npt.NDArray[Any], cuts: list[int], recv: Message, parts: list[tuple[int, int]]) -> Run:
    """Copy what was gathered side by side to where the user wants each part, (count, displacement)."""
    pairs = [
        (recv.vector(count, displ), work[lo:hi])
        for (count, displ), (lo, hi) in zip(parts, pairwise(cuts), strict=True)
        if count
    ]

    def spread() -> None:
        for part, gathered in pairs:
            part[...] = gathered

    return spread


def block_order(algorithm: Algorithm, p: int) -> list[int]:
    """The rank of each block."""
    return list(range(p)) if algorithm.own_blocks is None else np.argsort(algorithm.own_blocks(p)).tolist()


def cuts_of(counts: tuple[int, ...], order: list[int]) -> list[int]:
    """Offsets of blocks of these ranks, side by side."""
    return [0, *np.cumsum([counts[rank] for rank in order]).tolist()]


def sorter(work: npt.NDArray[Any], source: npt.NDArray[Any], counts: tuple[int, ...], order: list[int]) -> Run:
    """Copy the ranks' parts of a vector side by side in another order."""
    if order == sorted(order):
        return lambda: np.copyto(work, source)
    parts = list(pairwise([0, *np.cumsum(counts).tolist()]))
    pairs = [
        (slice(*to), slice(*parts[rank])) for to, rank in zip(pairwise(cuts_of(counts, order)), order, strict=True)
    ]

    def sort() -> None:
        for to, part in pairs:
            work[to] = source[part]

    return sort


def shorten(counts: tuple[int, ...]) -> tuple[Any, ...]:
    """Counts for a signature: all of them where they are few."""
    return counts if len(counts) <= 8 else (*counts[:8], f"and {len(counts) - 8} more", hash(counts))
