"""Runs records: sends, receives and waits by MPI's functions at addresses, reductions and node steps by kernels.

The same source runs in Python and compiled, as that of :mod:`hpccomm.kernels.shared_memory.collectives`.
"""

from __future__ import annotations

from hpccomm.kernels.interpreter.records import (
    COMBINE,
    COPY,
    DONE,
    EAGER_POLLS,
    FAILED,
    MEETING,
    MEETING_RECORD,
    NODE,
    PAUSED,
    RECEIVE,
    RECORD,
    REDUCE,
    RUN_RECORD,
    SEND,
    STRAY,
)
from hpccomm.kernels.shared_memory.collectives import RETRY
from hpccomm.kernels.shared_memory.memory import (
    call_1,
    call_3,
    call_5,
    call_7,
    copy,
    fold,
    load,
    nanoseconds,
    sleep,
    store,
    yield_cpu,
)
from hpccomm.kernels.shared_memory.records import CALL_RECORD, W, offsets

FIELD, RUN, MEETING_FIELD, CALL = map(offsets, (RECORD, RUN_RECORD, MEETING_RECORD, CALL_RECORD))
RECORD_BYTES, MEETING_BYTES = RECORD.itemsize, MEETING_RECORD.itemsize
BUFFERS = RUN.vector
"""Where a run has the addresses of its buffers, the vector's at first."""

LOW_HALF = 0xFFFFFFFF
SHORT_BYTES = 1 << 16
"""Up to so many bytes a rank may sleep while it waits: MPI libraries move a part of a longer message in each poll."""
EAGER_NS = 5_000_000
"""How long a rank yields its core between two polls, before it sleeps."""
SHORTEST_NS, LONGEST_NS = 50_000, 1_000_000
"""A sleep lasts a part of the time waited so far, within these limits: this rank's other messages need it, too."""
ALONE_NS, NAP_AFTER_NS, NAP_NS = 20_000, 200_000, 100_000
"""A yield that is shorter has let no thread compute; after how long a wait a progress thread then naps, at most."""
PATIENCE_NS = 50_000_000
"""After so long a wait returns to Python, which handles signals, and looks for ranks that never come to a node step."""


def interpret(run):
    """Run records from the current one on; the last one leaves the run at its beginning."""
    count = load(run + RUN.count)
    while load(run + RUN.next) < count:
        record = load(run + RUN.records) + RECORD_BYTES * load(run + RUN.next)
        code = execute(run, record, load(record + FIELD.kind))
        if code != DONE:
            return code
        store(run + RUN.next, load(run + RUN.next) + 1)
    store(run + RUN.next, 0)
    store(run + RUN.pauses, 0)
    return DONE


def execute(run, record, kind):
    if kind == SEND:
        return start(run, record, load(run + RUN.isend), load(run + RUN.tag))
    if kind == RECEIVE:  # with any tag: a rank in another call shows by its own
        return start(run, record, load(run + RUN.irecv), load(run + RUN.any_tag))
    if kind == REDUCE:
        return reduce(run, record)
    if kind == NODE:
        return meet(run, load(run + RUN.meetings) + MEETING_BYTES * load(record + FIELD.request))
    if kind == COPY:
        copy(
            memory(run, record, FIELD.buffer, FIELD.at),
            memory(run, record, FIELD.operand, FIELD.operand_at),
            load(record + FIELD.nbytes),
        )
        return DONE
    return wait(run, record)


def memory(run, record, buffer, at):
    """The address that a record names."""
    return load(run + BUFFERS + W * load(record + buffer)) + load(record + at)


def request_of(run, record):
    return load(run + RUN.requests) + W * load(record + FIELD.request)


def check(run, answer):
    """DONE, or FAILED with MPI's error code."""
    error = answer & LOW_HALF
    if error == 0:
        return DONE
    store(run + RUN.error, error)
    return FAILED


def start(run, record, function, tag):
    """Start a message by one of MPI's functions."""
    address, request = memory(run, record, FIELD.buffer, FIELD.at), request_of(run, record)
    answer = call_7(
        function,
        address,
        load(record + FIELD.nbytes),
        load(run + RUN.datatype),
        load(record + FIELD.peer),
        tag,
        load(run + RUN.comm),
        request,
    )
    return check(run, answer)


def wait(run, record):
    """Wait for a message; PAUSED after a while."""
    request, polls, began = request_of(run, record), 0, 0
    long = load(run + RUN.pauses) == load(run + RUN.next) + 1  # this wait has been paused before
    while True:
        code = check(run, call_3(load(run + RUN.test), request, run + RUN.flag, load(run + RUN.status)))
        if code != DONE:
            return code
        if load(run + RUN.flag) & LOW_HALF != 0:
            return check_tag(run) if load(record + FIELD.peer) >= 0 else DONE
        polls += 1
        if polls > EAGER_POLLS:
            now = nanoseconds()
            began = now if began == 0 else began
            if now - began > PATIENCE_NS:
                store(run + RUN.pauses, load(run + RUN.next) + 1)
                return PAUSED
            rest(run, now, PATIENCE_NS if long else now - began, load(record + FIELD.nbytes))


def rest(run, now, waited, nbytes):
    """Yield the core, or sleep for a part of the time waited so far.

    A progress thread that yields a core to nobody, while no thread of the program waits for it, also naps: the system
    can then give that core to one of the computations that share another core.
    """
    if waited >= EAGER_NS and nbytes <= SHORT_BYTES:
        sleep(run + RUN.sleeping, 0, min(LONGEST_NS, max(SHORTEST_NS, waited >> 5)))
        return
    yield_cpu()
    waiters = load(run + RUN.waiters)
    if waiters != 0 and load(waiters) == 0 and waited > NAP_AFTER_NS and nanoseconds() - now < ALONE_NS:
        sleep(run + RUN.sleeping, 0, min(NAP_NS, waited >> 3))


def check_tag(run):
    """Whether the message that has arrived is of this call."""
    tag = (load(load(run + RUN.tag_word)) >> load(run + RUN.tag_half)) & LOW_HALF
    if tag == load(run + RUN.tag):
        return DONE
    store(run + RUN.error, tag)
    return STRAY


def reduce(run, record):
    """Reduce the operand into the vector, the lower rank's on the left."""
    if load(run + RUN.fold) == 0:
        return COMBINE
    mine, new = memory(run, record, FIELD.buffer, FIELD.at), memory(run, record, FIELD.operand, FIELD.operand_at)
    lower = load(record + FIELD.lower)
    store(run + RUN.left, new if lower != 0 else mine)
    store(run + RUN.right, mine if lower != 0 else new)
    fold(load(run + RUN.fold), run + RUN.left, 2, 0, mine, load(record + FIELD.nbytes) // load(run + RUN.item))
    return DONE


def meet(run, meeting):
    """Run a node step; while ranks of the node are missing drive messages, for which they may wait."""
    began, call = nanoseconds(), load(meeting + MEETING_FIELD.call)
    store(
        call + CALL.send,
        load(run + BUFFERS + W * load(meeting + MEETING_FIELD.operand)) + load(meeting + MEETING_FIELD.send_at),
    )
    store(call + CALL.recv, load(run + BUFFERS) + load(meeting + MEETING_FIELD.recv_at))
    while True:
        code = call_1(load(meeting + MEETING_FIELD.kernel), call)
        if code == DONE:
            return DONE
        if code != RETRY or nanoseconds() - began > PATIENCE_NS:
            store(run + RUN.error, code)
            return MEETING
        source, tag, comm = load(run + RUN.any_source), load(run + RUN.any_tag), load(run + RUN.comm)
        code = check(run, call_5(load(run + RUN.probe), source, tag, comm, run + RUN.flag, load(run + RUN.status)))
        if code != DONE:
            return code
