"""The planner turns a call into a plan that can run many times: it reads and checks the call, chooses, and binds.

The candidates are the algorithms of all backends of the table that take the call; the tuning table chooses one, and its
backend binds the call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.arrays import StreamBuffer, array_of
from hpccomm.backends.base import Backend
from hpccomm.backends.native import why_not_native, why_too_many
from hpccomm.backends.table import BACKENDS
from hpccomm.calls import operations
from hpccomm.calls.blocks import OBJECT_SIGNATURES, SIGNATURES, Amounts
from hpccomm.calls.buffers import address_of
from hpccomm.calls.call import Call
from hpccomm.calls.consistency import MEETING_SECONDS
from hpccomm.calls.entry import Entry, class_lengths, why_no_entry
from hpccomm.calls.fingerprint import Fingerprint
from hpccomm.calls.plans import Plan, Run, call_key, compose
from hpccomm.calls.reader import IN_PLACE, Member, Reader, is_in_place
from hpccomm.calls.rewrites import ExactSum, make_contiguous
from hpccomm.context import Context, algorithm_setting, unknown_algorithm_error
from hpccomm.errors import ArgumentError
from hpccomm.first_use import FirstUse
from hpccomm.kernels import objects
from hpccomm.observe.flight_recorder import recorder
from hpccomm.performance.tuning import BLOCKWISE, COLLECTIVES, Choice
from hpccomm.settings import DEVICE_SETTING, ON_HOST

SYNCHRONISING = frozenset(name for name, each in (SIGNATURES | OBJECT_SIGNATURES).items() if each.synchronises)
"""Collectives that no rank leaves before all ranks have entered."""

ALL_LENGTHS = (0, 1 << 62)

FALLBACKS = ("shared", "butterfly", "tree", "ring")
"""Algorithms for calls that native MPI cannot take, in order of preference."""


class Planner(Member):
    """Plans the calls of one communicator."""

    in_lockstep = False
    """Whether no rank begins any call before all have been compared; a progress thread waits for the others anyway."""

    def __init__(self, comm: Any) -> None:
        super().__init__(comm)
        self.reader = Reader(comm)
        self.backends = {name: row.make(self) for name, row in BACKENDS.items() if not row.on_device}
        self.first_use = FirstUse(self)
        self._meeting: Any = None
        """The barrier in shared memory before calls on other backends."""

    @property
    def context(self) -> Context:
        """The communicator's context, also while calls are under way."""
        made: Context = self.comm._own_context
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
        if context.consistency:
            context.consistency.settle()
        plans.stage = context.stage
        context.users.add(plans)
        if memory is None and context.settings["HPCCOMM_COMPILE"] != "wait" and not objects.complete():
            return  # nothing else needs the compiler now
        if context.awaits_code or why_no_entry(self.size) or (memory and not memory.compiled):
            return
        meeting = self.bind_shared(Fingerprint("Barrier"), memory.bind_entry_barrier) if memory else None
        recorded = context.recorded.place
        plans.entry = Entry(plans.doors, self.rank, self.size, memory, context.consistency, meeting, recorded)

    def use_code(self) -> None:
        """Take shared memory into use from the next call on; the same call on all ranks."""
        if self.context.awaits_code:
            self.context.use_code()
            self.open_doors()

    def bind(self, key: Hashable, name: str, sendbuf: Any, recvbuf: Any, *arguments: Any) -> Plan:
        """A plan for a collective, kept under its key; ``arguments`` follow the buffers, at last the algorithm."""
        return self.keep(key, self.plan(self.reader.read(name, sendbuf, recvbuf, *arguments)))

    def keep(self, key: Hashable, plan: Plan) -> Plan:
        """Cache a plan under its key."""
        return self.comm.plans.keep(key if plan.lasts else None, plan)  # type: ignore[no-any-return]

    def plan(self, call: Call) -> Plan:
        """A plan for a call: rewrite, candidates of the table, tuning, bind."""
        fits = self.candidates(call)
        call.choice = self.choose(call, fits)
        name, backend = call.choice.algorithm, fits[call.choice.algorithm]
        call.fingerprint = call.describe(name if call.algorithm else "")
        plan = backend.bind(make_contiguous(call, self.reader) if backend.rewrites else call)
        if not backend.compares_itself:
            meets = call.signature.synchronises and call.data is not None and call.nbytes >= backend.meets_from
            plan.run = self.guard(call.fingerprint, plan.run, meets, call.amounts)
        plan.text = text_of(call.fingerprint, name)
        return plan

    def names(self, collective: str) -> tuple[str, ...]:
        """Valid values of ``algorithm=`` for a collective."""
        return ("auto", *(name for each in self.backends.values() for name in each.algorithms(collective)))

    def candidates(self, call: Call) -> dict[str, Backend]:
        """The algorithms that can take a call, and their backends; native MPI's takes every one.

        Shared memory that awaits its code is taken into use for a call that names it.
        """
        named = call.algorithm, self.comm.algorithm
        if self.context.awaits_code and ("shared" in named or self.setting(call.collective) == "shared"):
            self.use_code()
        return {
            name: backend
            for backend in self.backends.values()
            for name in backend.algorithms(call.collective)
            if backend.takes(call, name)
        }

    def view_key(self, buf: Any, op: MPI.Op) -> Hashable:
        """The key of an Allreduce_view: by the registered array, as its address may come back on some ranks only."""
        key, memory = call_key("Allreduce_view", buf, IN_PLACE, operations.key_of(op)), self.shared_memory
        if key is None or type(buf) is not np.ndarray:
            return None
        number = memory.allocation_number(address_of(buf), buf.nbytes) if memory else None
        return key, buf.shape, number

    def allreduce_view(self, key: Hashable, buf: Any, op: MPI.Op) -> Plan:
        """Allreduce into one result per node, or into one result per rank where ranks share no memory."""
        who = self.reader.call_label("Allreduce_view")
        if self.uses_device(buf):
            raise ArgumentError(f"{who}: the array lies on a device: use Allreduce")
        send, shared, op_name = self.reader.read_operand(buf, op, who), self.shared_memory, operations.name_of(op)
        if send.dtype is None or not isinstance(buf, np.ndarray):
            raise ArgumentError(f"{who}: the buffer is not an array: pass one from comm.empty(shape, dtype)")
        if shared is None or not shared.reduces(op_name, send.kind):
            result = np.empty_like(buf, subok=False)
            inner = self.bind(None, "Allreduce", buf, result, op, None)
            result.flags.writeable = False  # which the plan does not ask
            return self.keep(key, Plan(inner.run, inner.free, result))
        fingerprint = Fingerprint("Allreduce_view", op_name, str(send.elements), send.kind)
        view = shared.view(send.address, send.nbytes, partial(self.context.run_together, fingerprint))
        if view is None:
            raise ArgumentError(
                f"{who}: the array is not registered: allocate it with comm.empty, comm.zeros or comm.register"
            )
        segment, place, plans = view
        flat = np.frombuffer(segment.buffer, buf.dtype, send.elements, place)
        result = flat.reshape(buf.shape, order=send.order)  # type: ignore[call-overload]
        result.flags.writeable = False
        ends = send.address, segment.address + place
        into_segment = partial(shared.bind_allreduce, *ends, send.elements, send.kind, op_name, once=True)
        run, text = self.bind_shared(fingerprint, into_segment), text_of(fingerprint, "shared")
        plan = self.keep(key, Plan(run, result=result, text=text))
        plans.append(plan)
        return plan

    def bind_reproducible(
        self, key: Hashable, name: str, buffers: tuple[Any, Any], arguments: tuple[Any, ...], op: MPI.Op
    ) -> Plan | None:
        """Bind a reduction whose bits do not depend on order; ``None`` if every order gives the same bits.

        ``arguments`` are the arguments after the buffers: counts, operation, root.
        """
        who, (sendbuf, recvbuf) = self.reader.call_label(name), buffers
        buffer = self.reader.read_operand(recvbuf if is_in_place(sendbuf) else sendbuf, op, who)
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
        call = self.reader.read(name, sendbuf, recvbuf, *arguments, None)
        buffer, here, first = call.send, call.here, 0
        assert buffer.dtype is not None
        width, result = 2 if buffer.dtype.kind == "c" else 1, call.recv if here else buffer
        if call.counts:
            first, result = sum(call.counts[: self.rank]), replace(result, count=call.counts[self.rank])
        if call.recvcounts is not None:
            arguments = (tuple(width * each for each in call.counts), *arguments[1:])
        whole, total = ExactSum(buffer), ExactSum(result)
        with self.first_use.pause():
            inner = [self.bind(None, "Allreduce", IN_PLACE, whole.as_buffer(whole.exponents), MPI.MAX, None)]
            for part, sums in zip(whole.parts, total.totals, strict=True):
                into = total.as_buffer(sums) if here else None
                inner.append(self.bind(None, name, whole.as_buffer(part), into, *arguments, None))
        exponents = whole.exponents[width * first : width * first + total.elements]
        store = partial(total.store, exponents) if here else None
        steps = [whole.find_exponents, inner[0].run, whole.split, *(each.run for each in inner[1:]), store]

        def free() -> None:
            for each in inner:
                each.free()

        return self.keep(key, Plan(compose(steps), free))

    @property
    def shared_memory(self) -> Any:
        """Shared memory of all ranks; ``None`` across nodes or where it is not available."""
        return self.context.shared_memory

    def choose(self, call: Call, fits: Mapping[str, Backend]) -> Choice:
        """The algorithm of this call, named by the caller, by the communicator, or selected from the tuning table."""
        who, algorithm, ours = call.who, call.algorithm, [name for name in fits if name != "native"]
        collective = call.collective
        if algorithm is not None and algorithm not in ("auto", *fits):
            names = self.names(collective)
            raise (
                ArgumentError(why_unfit(call, ours))
                if algorithm in names
                else unknown_algorithm_error(who, algorithm, names)
            )
        if algorithm == "native" and why_too_many(call):
            remedy = f"leave the algorithm out, or use one of {', '.join(ours)}"
            raise ArgumentError(f"{who}: {why_too_many(call)}: {remedy}")
        wanted = algorithm or self.comm.algorithm
        if wanted in fits:
            return Choice(wanted, None, "named by the caller", ALL_LENGTHS)
        if not ours and why_too_many(call):
            raise ArgumentError(f"{who}: {why_too_many(call)}: make a call for each part of the vector")
        if self.size == 1 or not ours:
            choice = Choice("native", None, "no other algorithm can take the call", ALL_LENGTHS)
        elif call.data is None:  # there is nothing to measure
            return Choice(
                "native" if self.setting(collective) == "native" else ours[0], None, "it takes no data", ALL_LENGTHS
            )
        else:
            reduced = call.data.dtype if call.op is not None else None
            dtype = "B" if reduced is None else "e" if call.data.half else reduced.char
            choice = self.decide(collective, call.nbytes, dtype, tuple(fits), who)
            if choice.candidate and self.first_use.compare(collective, call.nbytes, choice.candidate):
                choice = self.decide(collective, call.nbytes, dtype, tuple(fits), who)
        reason = why_not_native(call) if choice.algorithm == "native" else ""
        if not (reason and ours):
            return choice
        return Choice(next(name for name in (*FALLBACKS, *ours) if name in fits), None, reason)

    def decide(self, collective: str, nbytes: int, dtype: str, allowed: tuple[str, ...], who: str) -> Choice:
        """The selected algorithm; one that is selected at both ends of a range of lengths takes the whole range."""
        setting = self.setting(collective)
        if setting and setting not in self.names(collective):
            raise unknown_algorithm_error(who, setting, self.names(collective), "HPCCOMM_ALGORITHM")
        parts = self.size if collective in BLOCKWISE else 1
        least, most = self.lengths(collective, nbytes // parts)
        lengths = (parts * least, parts * most)
        first, last = (self.context.decide(collective, each, dtype, allowed) for each in lengths)
        if first.algorithm == last.algorithm and first.algorithm in ("native", "shared"):
            return first._replace(lengths=lengths)
        return self.context.decide(collective, nbytes, dtype, allowed)._replace(lengths=(nbytes, nbytes))

    def setting(self, collective: str) -> str:
        """What ``HPCCOMM_ALGORITHM`` says of a collective; empty also for a name for all that only others have."""
        text = self.context.settings["HPCCOMM_ALGORITHM"].replace(" ", "")
        found = algorithm_setting(text, collective)
        others = COLLECTIVES if found and found in text.split(",") and found not in self.names(collective) else ()
        return "" if any(found in self.names(each) for each in others) else found

    def lengths(self, collective: str, nbytes: int) -> tuple[int, int]:
        """The lengths around ``nbytes`` whose calls in shared memory have the same record; without it, a size class."""
        if self.shared_memory:
            found: tuple[int, int] = self.shared_memory.lengths(collective, nbytes)
            return found
        return class_lengths(nbytes)

    def unit_lengths(self, call: Call) -> tuple[int, int]:
        """The lengths of one block, or of a vector, for which the choice of a call holds."""
        parts, (first, last) = self.size if call.signature.blockwise else 1, call.choice.lengths
        return -(-first // parts), last // parts

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

    def _meet(self, word: int) -> None:
        """Wait in shared memory for all ranks before a call on another backend, whose fingerprint has this word."""
        memory = self.shared_memory
        if self._meeting is None or self._meeting.memory is not memory:
            self._meeting = self.bind_shared(Fingerprint("Barrier"), memory.bind_entry_barrier)
        self._meeting.call["fingerprint"] = word
        self._meeting()

    def guard(self, fingerprint: Fingerprint, body: Run, lockstep: bool, amounts: Amounts | None = None) -> Run:
        """Run ``body`` between two comparisons with the other ranks' calls.

        In lockstep no rank begins before all calls have been compared.  Ranks that share memory first pass a barrier
        there: if another rank has entered a call in shared memory, all ranks detect the mismatch together.
        """
        table = self.context.consistency
        if table is None:
            return body
        lockstep = lockstep or self.in_lockstep
        word = table.announce(fingerprint)
        context, synchronises = self.context, fingerprint.collective in SYNCHRONISING
        meet: Run = table.wait
        if lockstep and self.shared_memory:
            meet = partial(self._meet, word)

        def run() -> None:
            with table.entered:
                table.begin(word, amounts)
                table.compare_nodes(amounts)
                if not lockstep:
                    table.stay_in_reach(amounts)
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


def why_unfit(call: Call, fits: list[str]) -> str:
    """Why a named algorithm cannot take a call."""
    start = f"{call.who}: algorithm={call.algorithm!r} cannot"
    if call.data.opaque:
        return f"{start} reduce a derived datatype: leave the algorithm out"
    names = ", ".join(map(repr, fits))
    return f"{start} apply this operation in rank order to {call.data.dtype}: use one of {names}"


def text_of(fingerprint: Fingerprint, algorithm: str) -> int:
    """The number of the text by which the flight recorder names calls of a kind."""
    return recorder().intern(f"{fingerprint.uncounted._replace(algorithm='')} by {algorithm}")
