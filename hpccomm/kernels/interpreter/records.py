"""Layouts of the records that the interpreter reads: what a rank runs, and the state of one run."""

from __future__ import annotations

from hpccomm.kernels.shared_memory.records import record, words

RECORD = record(
    words(
        "kind",  # SEND, RECEIVE, WAIT, REDUCE, COPY or NODE
        "peer",  # SEND, RECEIVE: the other rank; WAIT: that of a receive, else -1
        "buffer",  # the memory that is sent, written or reduced into: VECTOR, SOURCE or SPARE
        "at",  # bytes from its beginning
        "nbytes",
        "request",  # SEND, RECEIVE, WAIT: the number of the request; NODE: the number of the meeting
        "operand",  # REDUCE, COPY: the buffer of the other operand
        "operand_at",  # bytes from its beginning
        "lower",  # REDUCE: 1 if the other operand is of a lower rank, and so stands on the left
    )
)
SEND, RECEIVE, WAIT, REDUCE, COPY, NODE = range(1, 7)
VECTOR, SOURCE, SPARE = range(3)
"""The buffers: the vector in which the result is made; the operand of a reduction that is not in place; room for what
was received and is not reduced yet."""

RUN_RECORD = record(
    [
        *words("records", "count", "next"),  # next: the number of the record that runs
        *words("vector", "source", "spare"),  # addresses of the buffers
        *words("requests", "meetings"),  # addresses of a word a request; of a MEETING_RECORD a meeting
        *words("fold", "item"),  # of the reduction; fold: 0 where Python reduces
        *words("comm", "datatype", "tag", "any_source", "any_tag"),  # handles and numbers of MPI
        *words("isend", "irecv", "test", "probe"),  # addresses of MPI's functions
        *words("status", "tag_word", "tag_half"),  # where MPI_Test writes the tag: a word, and 32 if its upper half
        *words("flag", "sleeping", "error"),  # error: of MPI, a tag, or what a kernel has answered
        *words("left", "right"),  # the two operands of a reduction
        *words("pauses"),  # 1 + the number of the record whose wait has been paused; 0: none
        *words("waiters"),  # in a progress thread, the address of the number of threads that wait for calls
    ]
)
"""A program with its memory, and how far it is."""

MEETING_RECORD = record(words("kernel", "call", "operand", "send_at", "recv_at"))
"""The kernel of a node step, its call record, and where that reads and writes: bytes from the beginning of the operand,
which is VECTOR or SOURCE, and of the vector."""

EAGER_POLLS = 50
"""Polls of a wait before the rank yields its core."""
DONE, PAUSED, FAILED, STRAY, COMBINE, MEETING = range(6)
"""What a run returns: it is done; a message is late, call again; MPI has returned an error; a message of another call
has arrived; Python must reduce; a kernel has not finished, or refuses."""
