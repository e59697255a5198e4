"""Runs records by compiled code, which calls MPI's functions and the kernels of shared memory without the GIL.

What compiled code cannot do itself it leaves to Python: reductions without a kernel, ranks of a node that are late, and
errors.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls.buffers import address_of
from hpccomm.calls.plans import KEPT
from hpccomm.collectives.engine import Combine, Vector
from hpccomm.collectives.records import Meeting, Program
from hpccomm.kernels import objects
from hpccomm.kernels.interpreter.records import (
    COMBINE,
    DONE,
    FAILED,
    MEETING,
    MEETING_RECORD,
    NODE,
    REDUCE,
    RUN_RECORD,
    SPARE,
    STRAY,
    VECTOR,
)
from hpccomm.kernels.shared_memory.collectives import RETRY
from hpccomm.kernels.shared_memory.records import fill
from hpccomm.transports.mpi import MessageTransport, as_word, message_functions, tag_place


class CompiledSchedule:
    """A program bound to memory: call it any number of times.

    ``fold`` is the address of the reduction of two vectors, 0 where ``combine`` must do it; ``meetings`` are the calls
    in shared memory of the node steps.
    """

    def __init__(
        self,
        program: Program,
        vector: Vector,
        source: Vector | None,
        transport: MessageTransport,
        digest: int,
        fold: int,
        combine: Combine | None,
        meetings: Sequence[Any],
    ) -> None:
        self.program, self.transport, self.combine, self.meetings = program, transport, combine, meetings
        self.kernel = objects.kernel("interpret")
        self.spare = np.empty(-(-program.spare_bytes // vector.itemsize), vector.dtype)
        self.buffers = [vector, source, self.spare]
        self.requests = np.zeros(program.requests, np.int64)
        self.status = MPI.Status()
        places = zip(meetings, program.meetings, strict=True)
        self.calls = np.array([self.place(*each) for each in places], MEETING_RECORD)
        self.run = np.zeros((), RUN_RECORD)
        self.address = int(self.run.ctypes.data)
        self.fill(fold, digest % transport.tags)

    def place(self, call: Any, meeting: Meeting) -> tuple[int, ...]:
        """The record of a node step whose call was bound to the buffers of this schedule."""
        operand = meeting.operand if meeting.collective == "reduce_scatter" else VECTOR
        read, written = self.buffers[operand], self.buffers[VECTOR]
        assert read is not None
        assert written is not None
        at = int(call.call["send"]) - address_of(read), int(call.call["recv"]) - address_of(written)
        return (call.kernel_address, call.address, operand, *at)

    def fill(self, fold: int, tag: int) -> None:
        """Write what the compiled code reads."""
        run, comm, program = self.run, self.transport.comm, self.program
        vector, source, spare = self.buffers
        assert vector is not None
        assert spare is not None
        fill(run, records=program.records.ctypes.data, count=len(program.records), fold=fold, item=vector.itemsize)
        fill(
            run, vector=address_of(vector), spare=address_of(spare), source=0 if source is None else address_of(source)
        )
        fill(run, requests=self.requests.ctypes.data, meetings=self.calls.ctypes.data)
        fill(run, comm=as_word(comm.handle), datatype=as_word(MPI.BYTE.handle), tag=tag)
        fill(run, waiters=self.transport.waiters)
        fill(run, any_source=MPI.ANY_SOURCE, any_tag=MPI.ANY_TAG, **message_functions())
        status, (offset, shift) = MPI._addressof(self.status), tag_place()
        fill(run, status=status, tag_word=status + offset, tag_half=shift)

    @property
    def needs_python(self) -> bool:
        """Whether Python reduces."""
        return not self.run["fold"] and bool((self.program.records["kind"] == REDUCE).any())

    @property
    def kernel_address(self) -> int:
        """The address of the interpreter's machine code."""
        return objects.address("interpret")

    def copy(self, *given: int) -> CompiledSchedule:
        """The same with memory of its own, but for buffers at the addresses ``given``.

        The caller writes the addresses of those into ``run`` before each run.
        """
        vector, source = (
            each if each is None else each[:0] if address_of(each) in given else np.empty_like(each)
            for each in self.buffers[:2]
        )
        assert vector is not None
        meetings, fold, tag = [each.copy() for each in self.meetings], int(self.run["fold"]), int(self.run["tag"])
        made = CompiledSchedule(self.program, vector, source, self.transport, tag, fold, self.combine, meetings)
        for name in ("operand", "send_at", "recv_at"):
            made.calls[name] = self.calls[name]
        return made

    def __call__(self) -> None:
        """Run it once."""
        self.resume()

    def resume(self, code: int | None = None, *given: Any) -> None:
        """Go on with it after compiled code has answered ``code``; ``given`` is kept while messages are pending."""
        try:
            code, began, number = self.kernel(self.address) if code is None else code, 0.0, -1
            while code != DONE:
                if number != self.run["next"]:
                    began, number = time.monotonic(), int(self.run["next"])
                self.go_on(code, time.monotonic() - began)
                code = self.kernel(self.address)
        except BaseException as error:
            self.abandon(error)
            KEPT.extend(given)
            raise

    def go_on(self, code: int, seconds: float) -> None:
        """Do what compiled code has left to Python, or raise its error; the record has run for some seconds."""
        record = self.program.records[int(self.run["next"])]
        if code == COMBINE:
            self.reduce(record)
        elif code == MEETING:
            self.await_node(self.meetings[int(record["request"])], int(self.run["error"]), seconds)
        elif code in (FAILED, STRAY):
            raise self.error_of(code, int(record["peer"]))

    def reduce(self, record: Any) -> None:
        """Reduce where there is no kernel."""
        assert self.combine is not None, "a schedule that reduces was bound without an operation"
        mine, new = (self.view(record[a], record[b], record["nbytes"]) for a, b in OPERANDS)
        lower, upper = (new, mine) if record["lower"] else (mine, new)
        self.combine(lower, upper, mine)
        self.run["next"] += 1

    def view(self, buffer: int, at: int, nbytes: int) -> Vector:
        """What a record names."""
        whole = self.buffers[buffer]
        assert whole is not None
        return whole[at // whole.itemsize : (at + nbytes) // whole.itemsize]

    def await_node(self, call: Any, code: int, seconds: float) -> None:
        """Look after ranks of this node that are late; raise the error of a call that no rank can continue."""
        if code != RETRY:
            call.memory.resolve(code, call)
        elif call.stall_handler:
            call.stall_handler(seconds, call.memory.missing_ranks())

    def error_of(self, code: int, peer: int) -> Exception:
        """The error of MPI, or that for a message of another call."""
        number, tag = int(self.run["error"]), int(self.run["tag"])
        if code == STRAY:
            return self.transport.stray_message_error(peer, number, tag)
        failure = MPI.Exception(number)
        if peer >= 0 and failure.Get_error_class() == MPI.ERR_TRUNCATE:
            return self.transport.stray_message_error(peer, self.status.tag, tag)
        return failure

    def abandon(self, error: BaseException) -> None:
        """After an error keep the memory of messages that are still pending; the next run begins anew."""
        number = min(int(self.run["next"]), len(self.program.records) - 1)
        record = self.program.records[number]
        if record["kind"] == NODE:
            call = self.meetings[int(record["request"])]
            call.memory.handle_exception(call.call, error)
        KEPT.append((self.buffers, self.requests, self.spare))
        self.spare, self.requests = np.empty_like(self.spare), np.zeros_like(self.requests)
        self.buffers[SPARE] = self.spare
        fill(self.run, next=0, pauses=0, spare=address_of(self.spare), requests=self.requests.ctypes.data)

    def free(self) -> None:
        """Nothing is held between two runs."""


OPERANDS = (("buffer", "at"), ("operand", "operand_at"))
