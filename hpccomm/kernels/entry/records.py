"""Layouts of the records of the compiled entry, and of the CPython and NumPy objects that it reads.

*One entry a communicator, one door a collective of it, one row a kind of call.*  All fields are words.
"""

from __future__ import annotations

import numpy as np

from hpccomm.kernels.shared_memory.records import record, words

SCRATCH_BYTES = 1024
MOST_ARGUMENTS = 9
"""Of one of MPI's functions."""
INT_MAX = (1 << 31) - 1
"""The largest count that they take."""

ENTRY_RECORD = record(
    [
        *words("rows", "mask"),  # the table of rows; its length is mask + 1
        *words("types", "types_mask"),  # the table of TYPE_RECORDs
        *words("array_type", "list_type", "tuple_type", "int_type", "int64_type", "int32_type", "string_type"),
        *words("none", "in_place", "answers", "counts_references"),  # answers: addresses of the small integers
        *words("as_integer", "hold", "let_go", "intern", "save_thread", "restore_thread"),  # functions of CPython
        *words("item_size", "tuple_items"),  # their offsets in a dtype object and in a tuple
        *words("rank", "rank_object", "size"),
        *words("state", "patience"),  # of shared memory: its state record, and how long a call waits for ranks
        *words("registered", "registrations"),  # addresses of ALLOCATION_RECORDs and of their number
        *words("entries", "row_bytes", "members", "member"),  # the consistency table; 0 without one
        *words("member_ranks", "amounts_at"),  # address of its ranks; bytes from the start of a row to its amounts
        *words("meeting", "meet"),  # call record and kernel of the barrier before synchronising calls on messages
        *words("kind", "op", "root", "algorithm", "layout"),  # the key of the running call
        *words("nbytes", "send", "recv", "row"),  # its length, its addresses and its row
        *words("blocks"),  # address of the lengths and places of its blocks, sent and received; 4 x size words
        *words("counts"),  # address of the same in elements, 4 x size integers for MPI
        *words("failure", "left"),  # what MPI has returned; what the interpreter has answered
        *words("held_send", "held_recv"),  # the call's buffers, which are kept while records are unfinished
        *words("name"),  # the string that is interned
        *words("pending"),  # whether a call awaits Python, which goes on with it
        *words("sends", "receives", "within", "call_token"),  # its blocks; whether it is in place; its dtype
        *words("ring", "events", "last_event"),  # of the flight recorder: its number of calls, and its EVENT_RECORDs
        *words(
            "label", "comm", "comm_calls"
        ),  # what names the communicator in them; its calls, and those inside others
        *words("event", "between"),  # the event of the running call; which calls are compared between nodes: a mask
        *words("address", "octets", "extent", "element", "token", "writable", "overflow"),  # the buffer read last
        *words("short", "short_bytes"),  # a receive buffer that ends before the padding of its last pair; 0 if none
        ("scratch", np.uint8, (2, SCRATCH_BYTES)),  # copies of such buffers, sent and received
    ]
)
"""What the entry of one communicator knows; the fields from ``kind`` on describe the call that runs."""

DOOR_RECORD = record(
    words(
        *("entry", "collective"),
        *("send_blocks", "recv_blocks"),  # the length of a buffer as a multiple of the call's length; 0: not used
        *("in_place_blocks",),  # the same of a receive buffer in place; 0: in place is not taken
        *("send_counted", "recv_counted"),  # what a count in the buffer's form is multiplied by
        *("rooted", "own_block", "same_is_in_place"),  # rooted: RECEIVES_AT_ROOT and so on; 0: no root
        *("uneven",),  # SENT_UNEVEN and so on: which buffers have a block of any length for each rank; 0: none
    )
)
"""What is different between collectives."""

RECEIVES_AT_ROOT, IS_SENT_AT_ROOT, SENDS_AT_ROOT = 1, 2, 3
"""How a collective is rooted: only the root receives; the one buffer is sent by the root; only the root sends."""

SENT_UNEVEN, RECEIVED_UNEVEN, COUNTS_GIVEN, ANY_LAYOUT = 1, 2, 4, 8
"""Which buffers of a collective have a block of any length for each rank; whether the counts are passed where others
pass the root; whether a row takes blocks of any lengths."""

ROW_RECORD = record(
    [
        *words("kind", "op", "root", "algorithm", "layout"),  # the key
        *words("least", "most", "places"),  # the lengths that the row takes; its uneven blocks: an address, or 0
        *words("number", "call", "kernel", "last"),  # last: the length for which the call record is filled
        *words("item", "blocks", "template", "salt"),  # what the fingerprint is made of
        *words("backend", "compares"),  # backend: 0 for an empty row, IN_SHARED_MEMORY, BY_MPI, or BY_RECORDS
        *words("uneven", "root_rank"),  # the buffers of whose blocks every two ranks compare the lengths; the root
        *words("vector", "source"),  # BY_RECORDS: the call's buffers that these are: FROM_SENT, FROM_RECEIVED, or 0
        *words("checked", "table", "sized", "registers"),
        *words("releases"),  # the call may wait long, and releases the GIL
        *words("text"),  # the number of its text in the flight recorder
        *words("function", "unit", "splits"),  # MPI's function, 0: Python calls it; bytes of an element; as ``uneven``
        *words("send_argument", "recv_argument", "count_argument", "recv_count_argument"),  # where its arguments vary
        ("arguments", np.int64, MOST_ARGUMENTS + 1),  # those of MPI's function, and a place for those it does not have
    ]
)
"""One kind of call, and the call record that runs it."""

EVENT_RECORD = record(words("number", "begin", "end", "nbytes", "text", "label", "comm", "call"))
"""One call in the flight recorder: its number in this process, begin and end (0: not yet) in nanoseconds, bytes, the
texts of call and communicator, the communicator and the number of the call on it; -1 inside another call."""

TYPE_RECORD = record(words("object", "token", "item", "padding"))
"""A dtype or datatype object, its number, the bytes of one element, and those of its padding at the end."""

ALLOCATION_RECORD = record(words("first", "end", "number", "alive", "copies", "stride"))
"""Registered memory of this rank."""

TABLES = ("none", "blocks", "allgather", "alltoall")
"""What follows a call record: nothing, first bytes of blocks, lengths and places, or both of each side."""

IN_SHARED_MEMORY, BY_MPI, BY_RECORDS = 1, 2, 3
COMPARED_AT_ENTRY, COMPARED_TOGETHER, COMPARED_AFTERWARDS = 0, 1, 2
"""When a row's calls on messages are compared: with the ranks that have entered; with all, which must meet before; when
they are complete, as two ranks whose calls are different get messages that are not theirs."""
FROM_SENT, FROM_RECEIVED = 1, 2
NOT_MINE, MISS, NATIVE, DIFFER, LATE, INTERRUPTED, FAILED, LEAVING, UNFINISHED = 5, 6, 7, 8, 9, 10, 11, 12, 13
"""Answers of the entry beyond those of the kernels: not readable here; readable, but no row; a call on messages, which
Python makes; the same, but ranks differ; the same, but ranks have not entered; the call before was left half done; MPI
has returned an error; the call is complete, but ranks differ; records have left something to Python."""
NATIVE_IN_PLACE = 16
"""Added to an answer for a call on messages in place."""
BEFORE_NATIVE = 32
"""Added to what the kernel of the barrier before MPI's own collective answers."""

TOKEN_BITS, CLASS_BITS, IN_PLACE_BIT = 24, 16, 8

# CPython and NumPy on 64-bit machines

OBJECT_TYPE, SEQUENCE_LENGTH, LIST_ITEMS = 8, 16, 24
SCALAR_VALUE = 16
ARRAY_DATA, ARRAY_DIMENSIONS, ARRAY_SHAPE, ARRAY_DTYPE, ARRAY_FLAGS = 16, 24, 32, 56, 64
DTYPE_KIND = 24
C_CONTIGUOUS, ALIGNED, WRITEABLE = 0x1, 0x100, 0x400
LOW_HALF = 0xFFFFFFFF
VOID_KIND, INTEGER_KIND = ord("V"), ord("i")

# Fingerprints: the same arithmetic as in hpccomm.calls.fingerprint

DIGEST_MASK = 0xFFFFFFF
DIGEST_BITS = 28
"""Bits of an entry of the consistency table below the number of the call."""
CALLS = 64
"""Entries of each rank: how many calls back a peer can still be compared."""
AMOUNT_CALLS = 8
"""Calls whose amounts a rank keeps: what it sends to each rank of its node, and what it receives from each."""
NOT_COMPARED = -1
"""The bytes of a block whose length a rank cannot determine, or that does not exist."""
STATUS, COUNTS = CALLS, CALLS + 16
"""Words of a rank's row: its number of calls, negative between calls, and the counts of the last calls."""
COUNT_SHIFT = 28
COUNT_MASK = (1 << 35) - 1
COUNT_PRIME = 0x5BD1E995
CHECK_PRIME = 0x9E3779B97F4A7C15 - (1 << 64)
COUNT_CHECK = 0x2545F4914F6CDD1D
CHECK_MASK = (1 << 63) - 1
