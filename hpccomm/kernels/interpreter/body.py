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
    call_address,
    copy,
    fold,
    load,
    nanoseconds,
    sleep,
    store,
    yield_cpu,
)
from hpccomm.kernels.shared_memory.records import CALL_RECORD, W, offset_of

call_3 = call_5 = call_7 = call_address

KIND = offset_of(RECORD, "kind")
PEER = offset_of(RECORD, "peer")
BUFFER = offset_of(RECORD, "buffer")
AT = offset_of(RECORD, "at")
NBYTES = offset_of(RECORD, "nbytes")
REQUEST = offset_of(RECORD, "request")
OPERAND = offset_of(RECORD, "operand")
OPERAND_AT = offset_of(RECORD, "operand_at")
LOWER = offset_of(RECORD, "lower")
RECORD_BYTES = RECORD.itemsize

RECORDS = offset_of(RUN_RECORD, "records")
COUNT = offset_of(RUN_RECORD, "count")
NEXT = offset_of(RUN_RECORD, "next")
BUFFERS = offset_of(RUN_RECORD, "vector")
REQUESTS = offset_of(RUN_RECORD, "requests")
MEETINGS = offset_of(RUN_RECORD, "meetings")
FOLD = offset_of(RUN_RECORD, "fold")
ITEM = offset_of(RUN_RECORD, "item")
COMM = offset_of(RUN_RECORD, "comm")
DATATYPE = offset_of(RUN_RECORD, "datatype")
TAG = offset_of(RUN_RECORD, "tag")
ANY_SOURCE = offset_of(RUN_RECORD, "any_source")
ANY_TAG = offset_of(RUN_RECORD, "any_tag")
ISEND = offset_of(RUN_RECORD, "isend")
IRECV = offset_of(RUN_RECORD, "irecv")
TEST = offset_of(RUN_RECORD, "test")
PROBE = offset_of(RUN_RECORD, "probe")
STATUS = offset_of(RUN_RECORD, "status")
TAG_WORD = offset_of(RUN_RECORD, "tag_word")
TAG_HALF = offset_of(RUN_RECORD, "tag_half")
FLAG = offset_of(RUN_RECORD, "flag")
SLEEPING = offset_of(RUN_RECORD, "sleeping")
ERROR = offset_of(RUN_RECORD, "error")
PAUSES = offset_of(RUN_RECORD, "pauses")
WAITERS = offset_of(RUN_RECORD, "waiters")
LEFT = offset_of(RUN_RECORD, "left")
RIGHT = offset_of(RUN_RECORD, "right")

KERNEL = offset_of(MEETING_RECORD, "kernel")
CALL = offset_of(MEETING_RECORD, "call")
MEETING_OPERAND = offset_of(MEETING_RECORD, "operand")
SEND_AT = offset_of(MEETING_RECORD, "send_at")
RECV_AT = offset_of(MEETING_RECORD, "recv_at")
MEETING_BYTES = MEETING_RECORD.itemsize
CALL_SEND = offset_of(CALL_RECORD, "send")
CALL_RECV = offset_of(CALL_RECORD, "recv")

LOW_HALF = 0xFFFFFFFF
SHORT_BYTES = 1 << 16
"""Up to so many bytes a rank may sleep while it waits: MPI libraries move a part of a longer message in each poll."""
EAGER_NS = 5_000_000
"""How long a rank yields its core between two polls, before it sleeps."""
SHORTEST_NS, LONGEST_NS = 50_000, 1_000_000
"""A sleep lasts a part of the time waited so far, within these limits: this rank's other messages need it, too."""
PATIENCE_NS = 50_000_000
"""After so long a wait returns to Python, which handles signals, and looks for ranks that never come to a node step."""


def interpret(run):
    """Run records from the current one on; the last one leaves the run at its beginning."""
    count = load(run + COUNT)
    while load(run + NEXT) < count:
        record = load(run + RECORDS) + RECORD_BYTES * load(run + NEXT)
        code = execute(run, record, load(record + KIND))
        if code != DONE:
            return code
        store(run + NEXT, load(run + NEXT) + 1)
    store(run + NEXT, 0)
    store(run + PAUSES, 0)
    return DONE


def execute(run, record, kind):
    if kind == SEND:
        return start(run, record, load(run + ISEND), load(run + TAG))
    if kind == RECEIVE:  # with any tag: a rank in another call shows by its own
        return start(run, record, load(run + IRECV), load(run + ANY_TAG))
    if kind == REDUCE:
        return reduce(run, record)
    if kind == NODE:
        return meet(run, load(run + MEETINGS) + MEETING_BYTES * load(record + REQUEST))
    if kind == COPY:
        copy(memory(run, record, BUFFER, AT), memory(run, record, OPERAND, OPERAND_AT), load(record + NBYTES))
        return DONE
    return wait(run, record)


def memory(run, record, buffer, at):
    """The address that a record names."""
    return load(run + BUFFERS + W * load(record + buffer)) + load(record + at)


def request_of(run, record):
    return load(run + REQUESTS) + W * load(record + REQUEST)


def check(run, answer):
    """DONE, or FAILED with MPI's error code."""
    error = answer & LOW_HALF
    if error == 0:
        return DONE
    store(run + ERROR, error)
    return FAILED


def start(run, record, function, tag):
    """Start a message by one of MPI's functions."""
    address, request = memory(run, record, BUFFER, AT), request_of(run, record)
    answer = call_7(
        function,
        address,
        load(record + NBYTES),
        load(run + DATATYPE),
        load(record + PEER),
        tag,
        load(run + COMM),
        request,
    )
    return check(run, answer)


def wait(run, record):
    """Wait for a message; PAUSED after a while."""
    request, polls, began = request_of(run, record), 0, 0
    long = load(run + PAUSES) == load(run + NEXT) + 1  # this wait has been paused before
    while True:
        code = check(run, call_3(load(run + TEST), request, run + FLAG, load(run + STATUS)))
        if code != DONE:
            return code
        if load(run + FLAG) & LOW_HALF != 0:
            return check_tag(run) if load(record + PEER) >= 0 else DONE
        polls += 1
        if polls > EAGER_POLLS:
            now = nanoseconds()
            began = now if began == 0 else began
            if now - began > PATIENCE_NS:
                store(run + PAUSES, load(run + NEXT) + 1)
                return PAUSED
            rest(run, PATIENCE_NS if long else now - began, load(record + NBYTES))


def rest(run, waited, nbytes):
    """Yield the core, or sleep for a part of the time waited so far.

    A progress thread sleeps while no thread of the program waits for it: one that yields takes a core of those that
    compute, and gets its own back only after their time slice, where a sleeper gets it as soon as it wakes.
    """
    waiters = load(run + WAITERS)
    beside = waiters != 0 and load(waiters) == 0
    if not beside and (waited < EAGER_NS or nbytes > SHORT_BYTES):
        yield_cpu()
    else:
        longest = SHORTEST_NS if nbytes > SHORT_BYTES else LONGEST_NS
        sleep(run + SLEEPING, 0, min(longest, max(SHORTEST_NS, waited >> 5)))


def check_tag(run):
    """Whether the message that has arrived is of this call."""
    tag = (load(load(run + TAG_WORD)) >> load(run + TAG_HALF)) & LOW_HALF
    if tag == load(run + TAG):
        return DONE
    store(run + ERROR, tag)
    return STRAY


def reduce(run, record):
    """Reduce the operand into the vector, the lower rank's on the left."""
    if load(run + FOLD) == 0:
        return COMBINE
    mine, new = memory(run, record, BUFFER, AT), memory(run, record, OPERAND, OPERAND_AT)
    lower = load(record + LOWER)
    store(run + LEFT, new if lower != 0 else mine)
    store(run + RIGHT, mine if lower != 0 else new)
    fold(load(run + FOLD), run + LEFT, 2, 0, mine, load(record + NBYTES) // load(run + ITEM))
    return DONE


def meet(run, meeting):
    """Run a node step; while ranks of the node are missing drive messages, for which they may wait."""
    began, call = nanoseconds(), load(meeting + CALL)
    store(call + CALL_SEND, load(run + BUFFERS + W * load(meeting + MEETING_OPERAND)) + load(meeting + SEND_AT))
    store(call + CALL_RECV, load(run + BUFFERS) + load(meeting + RECV_AT))
    while True:
        code = call_1(load(meeting + KERNEL), call)
        if code == DONE:
            return DONE
        if code != RETRY or nanoseconds() - began > PATIENCE_NS:
            store(run + ERROR, code)
            return MEETING
        source, tag, comm = load(run + ANY_SOURCE), load(run + ANY_TAG), load(run + COMM)
        code = check(run, call_5(load(run + PROBE), source, tag, comm, run + FLAG, load(run + STATUS)))
        if code != DONE:
            return code
