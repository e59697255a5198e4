"""The body of the compiled entry: read the buffers of a call, find the row of its kind, aim its record and run it.

The entry only shortens: a call that it cannot read, or whose kind has no row yet, it answers with a code, and the
Python path takes the call.  It raises nothing, keeps nothing of the user's, and holds the GIL only in short calls.
"""

from __future__ import annotations

from hpccomm.kernels.entry.records import (
    ALIGNED,
    ALLOCATION_RECORD,
    AMOUNT_CALLS,
    ANY_LAYOUT,
    ARRAY_DATA,
    ARRAY_DIMENSIONS,
    ARRAY_DTYPE,
    ARRAY_FLAGS,
    ARRAY_SHAPE,
    BEFORE_NATIVE,
    BY_RECORDS,
    C_CONTIGUOUS,
    CALLS,
    CHECK_MASK,
    CHECK_PRIME,
    CLASS_BITS,
    COMPARED_AFTERWARDS,
    COMPARED_TOGETHER,
    COUNT_CHECK,
    COUNT_MASK,
    COUNT_PRIME,
    COUNT_SHIFT,
    COUNTS,
    COUNTS_GIVEN,
    DIFFER,
    DIGEST_BITS,
    DIGEST_MASK,
    DOOR_RECORD,
    DTYPE_KIND,
    ENTRY_RECORD,
    EVENT_RECORD,
    FAILED,
    FROM_RECEIVED,
    FROM_SENT,
    IN_PLACE_BIT,
    IN_SHARED_MEMORY,
    INT_MAX,
    INTEGER_KIND,
    INTERRUPTED,
    IS_SENT_AT_ROOT,
    LATE,
    LEAVING,
    LIST_ITEMS,
    LOW_HALF,
    MISS,
    NATIVE,
    NATIVE_IN_PLACE,
    NOT_COMPARED,
    NOT_MINE,
    OBJECT_TYPE,
    RECEIVED_UNEVEN,
    RECEIVES_AT_ROOT,
    ROW_RECORD,
    SCALAR_VALUE,
    SCRATCH_BYTES,
    SENDS_AT_ROOT,
    SENT_UNEVEN,
    SEQUENCE_LENGTH,
    STATUS,
    TABLES,
    TOKEN_BITS,
    TUPLE_ITEMS,
    TYPE_RECORD,
    UNFINISHED,
    VOID_KIND,
    WRITEABLE,
)
from hpccomm.kernels.interpreter.records import EAGER_POLLS, RUN_RECORD
from hpccomm.kernels.shared_memory.collectives import DONE, MAX_WAIT, RETRY, TABLE
from hpccomm.kernels.shared_memory.memory import (
    call_0,
    call_1,
    call_2,
    call_9,
    copy,
    load,
    load_acquire,
    nanoseconds,
    store,
    store_release,
    yield_cpu,
)
from hpccomm.kernels.shared_memory.records import CALL_RECORD, W, offset_of

# The entry
ROWS = offset_of(ENTRY_RECORD, "rows")
MASK = offset_of(ENTRY_RECORD, "mask")
TYPES = offset_of(ENTRY_RECORD, "types")
TYPES_MASK = offset_of(ENTRY_RECORD, "types_mask")
ARRAY_TYPE = offset_of(ENTRY_RECORD, "array_type")
LIST_TYPE = offset_of(ENTRY_RECORD, "list_type")
TUPLE_TYPE = offset_of(ENTRY_RECORD, "tuple_type")
INT_TYPE = offset_of(ENTRY_RECORD, "int_type")
INT64_TYPE = offset_of(ENTRY_RECORD, "int64_type")
INT32_TYPE = offset_of(ENTRY_RECORD, "int32_type")
NONE = offset_of(ENTRY_RECORD, "none")
IN_PLACE = offset_of(ENTRY_RECORD, "in_place")
ANSWERS = offset_of(ENTRY_RECORD, "answers")
COUNTS_REFERENCES = offset_of(ENTRY_RECORD, "counts_references")
AS_INTEGER = offset_of(ENTRY_RECORD, "as_integer")
HOLD = offset_of(ENTRY_RECORD, "hold")
SAVE_THREAD = offset_of(ENTRY_RECORD, "save_thread")
RESTORE_THREAD = offset_of(ENTRY_RECORD, "restore_thread")
ITEM_SIZE = offset_of(ENTRY_RECORD, "item_size")
RANK = offset_of(ENTRY_RECORD, "rank")
RANK_OBJECT = offset_of(ENTRY_RECORD, "rank_object")
SIZE = offset_of(ENTRY_RECORD, "size")
STATE = offset_of(ENTRY_RECORD, "state")
PATIENCE = offset_of(ENTRY_RECORD, "patience")
REGISTERED = offset_of(ENTRY_RECORD, "registered")
REGISTRATIONS = offset_of(ENTRY_RECORD, "registrations")
ENTRIES = offset_of(ENTRY_RECORD, "entries")
ROW_STRIDE = offset_of(ENTRY_RECORD, "row_bytes")
MEMBERS = offset_of(ENTRY_RECORD, "members")
MEMBER = offset_of(ENTRY_RECORD, "member")
MEMBER_RANKS = offset_of(ENTRY_RECORD, "member_ranks")
AMOUNTS_AT = offset_of(ENTRY_RECORD, "amounts_at")
MEETING = offset_of(ENTRY_RECORD, "meeting")
MEET = offset_of(ENTRY_RECORD, "meet")
KIND = offset_of(ENTRY_RECORD, "kind")
OP = offset_of(ENTRY_RECORD, "op")
ROOT = offset_of(ENTRY_RECORD, "root")
ALGORITHM = offset_of(ENTRY_RECORD, "algorithm")
LAYOUT = offset_of(ENTRY_RECORD, "layout")
BLOCKS = offset_of(ENTRY_RECORD, "blocks")
COUNTS_AT = offset_of(ENTRY_RECORD, "counts")
FAILURE = offset_of(ENTRY_RECORD, "failure")
LEFT = offset_of(ENTRY_RECORD, "left")
HELD = offset_of(ENTRY_RECORD, "held_send")
NBYTES = offset_of(ENTRY_RECORD, "nbytes")
SEND = offset_of(ENTRY_RECORD, "send")
RECV = offset_of(ENTRY_RECORD, "recv")
ROW = offset_of(ENTRY_RECORD, "row")
PENDING = offset_of(ENTRY_RECORD, "pending")
SENDS = offset_of(ENTRY_RECORD, "sends")
RECEIVES = offset_of(ENTRY_RECORD, "receives")
WITHIN = offset_of(ENTRY_RECORD, "within")
CALL_TOKEN = offset_of(ENTRY_RECORD, "call_token")
RING = offset_of(ENTRY_RECORD, "ring")
EVENTS = offset_of(ENTRY_RECORD, "events")
LAST_EVENT = offset_of(ENTRY_RECORD, "last_event")
LABEL = offset_of(ENTRY_RECORD, "label")
COMM = offset_of(ENTRY_RECORD, "comm")
COMM_CALLS = offset_of(ENTRY_RECORD, "comm_calls")
EVENT = offset_of(ENTRY_RECORD, "event")
BETWEEN = offset_of(ENTRY_RECORD, "between")
ADDRESS = offset_of(ENTRY_RECORD, "address")
OCTETS = offset_of(ENTRY_RECORD, "octets")
EXTENT = offset_of(ENTRY_RECORD, "extent")
ELEMENT = offset_of(ENTRY_RECORD, "element")
TOKEN = offset_of(ENTRY_RECORD, "token")
WRITABLE = offset_of(ENTRY_RECORD, "writable")
OVERFLOW = offset_of(ENTRY_RECORD, "overflow")
SHORT = offset_of(ENTRY_RECORD, "short")
SHORT_BYTES = offset_of(ENTRY_RECORD, "short_bytes")
SCRATCH = offset_of(ENTRY_RECORD, "scratch")

# A door
ENTRY = offset_of(DOOR_RECORD, "entry")
COLLECTIVE = offset_of(DOOR_RECORD, "collective")
SEND_BLOCKS = offset_of(DOOR_RECORD, "send_blocks")
RECV_BLOCKS = offset_of(DOOR_RECORD, "recv_blocks")
IN_PLACE_BLOCKS = offset_of(DOOR_RECORD, "in_place_blocks")
SEND_COUNTED = offset_of(DOOR_RECORD, "send_counted")
RECV_COUNTED = offset_of(DOOR_RECORD, "recv_counted")
ROOTED = offset_of(DOOR_RECORD, "rooted")
OWN_BLOCK = offset_of(DOOR_RECORD, "own_block")
SAME_IS_IN_PLACE = offset_of(DOOR_RECORD, "same_is_in_place")
UNEVEN = offset_of(DOOR_RECORD, "uneven")

# A row
ROW_KIND = offset_of(ROW_RECORD, "kind")
ROW_OP = offset_of(ROW_RECORD, "op")
ROW_ROOT = offset_of(ROW_RECORD, "root")
ROW_ALGORITHM = offset_of(ROW_RECORD, "algorithm")
ROW_LAYOUT = offset_of(ROW_RECORD, "layout")
PLACES = offset_of(ROW_RECORD, "places")
LEAST = offset_of(ROW_RECORD, "least")
MOST = offset_of(ROW_RECORD, "most")
CALL = offset_of(ROW_RECORD, "call")
KERNEL = offset_of(ROW_RECORD, "kernel")
LAST = offset_of(ROW_RECORD, "last")
ITEM = offset_of(ROW_RECORD, "item")
ROW_BLOCKS = offset_of(ROW_RECORD, "blocks")
TEMPLATE = offset_of(ROW_RECORD, "template")
SALT = offset_of(ROW_RECORD, "salt")
BACKEND = offset_of(ROW_RECORD, "backend")
COMPARES = offset_of(ROW_RECORD, "compares")
ROW_VECTOR = offset_of(ROW_RECORD, "vector")
ROW_SOURCE = offset_of(ROW_RECORD, "source")
ROW_UNEVEN = offset_of(ROW_RECORD, "uneven")
ROOT_RANK = offset_of(ROW_RECORD, "root_rank")
CHECKED = offset_of(ROW_RECORD, "checked")
ROW_TABLE = offset_of(ROW_RECORD, "table")
SIZED = offset_of(ROW_RECORD, "sized")
REGISTERS = offset_of(ROW_RECORD, "registers")
RELEASES = offset_of(ROW_RECORD, "releases")
ROW_TEXT = offset_of(ROW_RECORD, "text")
FUNCTION = offset_of(ROW_RECORD, "function")
UNIT = offset_of(ROW_RECORD, "unit")
SPLITS = offset_of(ROW_RECORD, "splits")
SEND_ARGUMENT = offset_of(ROW_RECORD, "send_argument")
RECV_ARGUMENT = offset_of(ROW_RECORD, "recv_argument")
COUNT_ARGUMENT = offset_of(ROW_RECORD, "count_argument")
RECV_COUNT_ARGUMENT = offset_of(ROW_RECORD, "recv_count_argument")
ARGUMENTS = offset_of(ROW_RECORD, "arguments")
ROW_BYTES = ROW_RECORD.itemsize

# An event
EVENT_NUMBER = offset_of(EVENT_RECORD, "number")
EVENT_BEGIN = offset_of(EVENT_RECORD, "begin")
EVENT_END = offset_of(EVENT_RECORD, "end")
EVENT_NBYTES = offset_of(EVENT_RECORD, "nbytes")
EVENT_TEXT = offset_of(EVENT_RECORD, "text")
EVENT_LABEL = offset_of(EVENT_RECORD, "label")
EVENT_COMM = offset_of(EVENT_RECORD, "comm")
EVENT_CALL = offset_of(EVENT_RECORD, "call")
EVENT_BYTES = EVENT_RECORD.itemsize

# A type, an allocation
TYPE_OBJECT = offset_of(TYPE_RECORD, "object")
TYPE_TOKEN = offset_of(TYPE_RECORD, "token")
TYPE_ITEM = offset_of(TYPE_RECORD, "item")
TYPE_PADDING = offset_of(TYPE_RECORD, "padding")
TYPE_BYTES = TYPE_RECORD.itemsize
FIRST = offset_of(ALLOCATION_RECORD, "first")
END = offset_of(ALLOCATION_RECORD, "end")
ALLOCATION_NUMBER = offset_of(ALLOCATION_RECORD, "number")
ALLOCATION_ALIVE = offset_of(ALLOCATION_RECORD, "alive")
ALLOCATION_COPIES = offset_of(ALLOCATION_RECORD, "copies")
ALLOCATION_STRIDE = offset_of(ALLOCATION_RECORD, "stride")
ALLOCATION_BYTES = ALLOCATION_RECORD.itemsize

# A call
CALL_SEND = offset_of(CALL_RECORD, "send")
CALL_RECV = offset_of(CALL_RECORD, "recv")
CALL_NBYTES = offset_of(CALL_RECORD, "nbytes")
CALL_CHECK = offset_of(CALL_RECORD, "check")
CALL_FINGERPRINT = offset_of(CALL_RECORD, "fingerprint")
CALL_LONGEST = offset_of(CALL_RECORD, "longest")
CALL_ALLOCATION = offset_of(CALL_RECORD, "allocation")
CALL_ALIVE = offset_of(CALL_RECORD, "alive")
CALL_COPIES = offset_of(CALL_RECORD, "copies")
CALL_COPY_STRIDE = offset_of(CALL_RECORD, "copy_stride")
CALL_SEND_AT = offset_of(CALL_RECORD, "send_at")
CALL_RECV_AT = offset_of(CALL_RECORD, "recv_at")

# Records that run
VECTOR = offset_of(RUN_RECORD, "vector")
SOURCE = offset_of(RUN_RECORD, "source")

BLOCK_TABLE, ALLGATHER_TABLE = TABLES.index("blocks"), TABLES.index("allgather")
SHORT_WAIT_NS = 20_000
"""Nanoseconds for which a short call waits before it releases the GIL."""
SENT, RECEIVED = 0, 1
BOTH_UNEVEN = SENT_UNEVEN | RECEIVED_UNEVEN


def enter(self, arguments, count):
    """``entry(sendbuf, recvbuf, op, root, algorithm, rest)``: None when the call is done, else a code."""
    door = load(self + ARRAY_DATA)
    entry = load(door + ENTRY)
    if load(entry + PENDING) != 0:
        return answer(entry, INTERRUPTED)
    code = read_call(entry, door, arguments) if count == 6 else NOT_MINE
    if code == DONE:
        code = find_row(entry)
    if code == DONE:
        row = load(entry + ROW)
        begin_event(entry, row)
        if load(row + BACKEND) != IN_SHARED_MEMORY:
            code = start_messages(entry, row)
            if code == NATIVE and load(row + FUNCTION) != 0:
                code = call_mpi(entry, row)
            elif code == NATIVE and load(row + BACKEND) == BY_RECORDS:
                code = run_records(entry, row, arguments)
            if code != DONE:
                store(entry + PENDING, code if load(entry + ENTRIES) != 0 or code == UNFINISHED else 0)
                code += NATIVE_IN_PLACE * load(entry + WITHIN)
        else:
            aim(entry, row)
            code = run(entry, load(row + CALL), load(row + KERNEL), load(row + RELEASES))
            store(entry + PENDING, code)
        if code == DONE:
            if load(entry + SHORT) != 0:
                copy(load(entry + SHORT), load(entry + RECV), load(entry + SHORT_BYTES))
            end_event(entry)
    return answer(entry, code)


def leave(self, arguments, count):
    """``leave()`` after a call on messages by Python: None, or DIFFER if another rank called something else."""
    entry = load(load(self + ARRAY_DATA) + ENTRY)
    end_event(entry)
    return answer(entry, leave_table(entry))


def answer(entry, code):
    """None for a call that is done, else the code as an integer object; its reference belongs to the caller."""
    thing = load(entry + NONE) if code == DONE else load(load(entry + ANSWERS) + W * code)
    if load(entry + COUNTS_REFERENCES) != 0:
        store(thing, load(thing) + 1)
    return thing


# The flight recorder


def begin_event(entry, row):
    """Record that a call begins."""
    ring, calls = load(entry + RING), load(entry + COMM_CALLS)
    if ring == 0:
        return
    number, call = load(ring) + 1, -1
    if load(calls + W) == 0:
        call = load(calls) + 1
        store(calls, call)
    event = load(entry + EVENTS) + EVENT_BYTES * (number & load(entry + LAST_EVENT))
    blocks = load(entry + SENDS)
    store_release(event + EVENT_NUMBER, 0)
    store(event + EVENT_BEGIN, nanoseconds())
    store(event + EVENT_END, 0)
    store(event + EVENT_NBYTES, load(entry + NBYTES) * (blocks if blocks != 0 else load(entry + RECEIVES)))
    store(event + EVENT_TEXT, load(row + ROW_TEXT))
    store(event + EVENT_LABEL, load(entry + LABEL))
    store(event + EVENT_COMM, load(entry + COMM))
    store(event + EVENT_CALL, call)
    store_release(event + EVENT_NUMBER, number)
    store(ring, number)
    store(entry + EVENT, number)


def end_event(entry):
    """Record that the call has ended."""
    number = load(entry + EVENT)
    event = load(entry + EVENTS) + EVENT_BYTES * (number & load(entry + LAST_EVENT))
    if number != 0 and load(event + EVENT_NUMBER) == number:
        store(event + EVENT_END, nanoseconds())
    store(entry + EVENT, 0)


# Reading


def read_call(entry, door, arguments):
    """Read and check the buffers, and write the key of the call; NOT_MINE for what the Python path must see."""
    store(entry + ROOT, find_root(entry, door, load(arguments + 3 * W)))
    mine = names_permanent_objects(entry, door, arguments) and choose_buffers(entry, door, arguments)
    if mine and load(door + UNEVEN) != 0:
        mine = read_uneven(entry, door, arguments)
    elif mine:
        mine = read_receiver(entry, door, load(arguments + W))
        mine = mine and read_sender(entry, door, load(arguments))
    nbytes = load(entry + NBYTES)
    if not mine or (nbytes == 0 and load(entry + SENDS) + load(entry + RECEIVES) != 0):
        return NOT_MINE
    kind = load(door + COLLECTIVE) | load(entry + WITHIN) << IN_PLACE_BIT
    store(entry + KIND, kind | size_class(nbytes) << CLASS_BITS | load(entry + CALL_TOKEN) << TOKEN_BITS)
    store(entry + OP, load(arguments + 2 * W))
    store(entry + ALGORITHM, load(arguments + 4 * W))
    return DONE


def find_root(entry, door, root):
    """The root as one of Python's own integers, also of an integer of NumPy; None for a call without a root."""
    kind, value = load(root + OBJECT_TYPE), -1
    if load(door + UNEVEN) & COUNTS_GIVEN:
        return load(entry + NONE)
    if kind == load(entry + INT64_TYPE):
        value = load(root + SCALAR_VALUE)
    elif kind == load(entry + INT32_TYPE):
        value = (load(root + SCALAR_VALUE) << 32) >> 32
    return load(load(entry + ANSWERS) + W * value) if 0 <= value < load(entry + SIZE) else root


def names_permanent_objects(entry, door, arguments):
    """Whether operation, root and algorithm are objects that are never freed, and no other argument is given.

    Of a root only the type is checked: Python never frees the integers that are ranks (``MAX_RANKS``).
    """
    none, root = load(entry + NONE), load(entry + ROOT)
    return (
        load(arguments + 5 * W) == none
        and is_permanent(entry, load(arguments + 2 * W))
        and is_permanent(entry, load(arguments + 4 * W))
        and (root == none or load(root + OBJECT_TYPE) == load(entry + INT_TYPE))
    )


def choose_buffers(entry, door, arguments):
    """Write how many blocks are sent and received, 0 for a buffer that is not read; false for what is not taken."""
    sendbuf, sends, receives = load(arguments), load(door + SEND_BLOCKS), load(door + RECV_BLOCKS)
    if load(entry + ROOT) != load(entry + RANK_OBJECT):
        receives = 0 if load(door + ROOTED) == RECEIVES_AT_ROOT else receives
        sends = 0 if load(door + ROOTED) == SENDS_AT_ROOT else sends
    within = sends != 0 and (
        sendbuf == load(entry + NONE)
        or sendbuf == load(entry + IN_PLACE)
        or (sendbuf == load(arguments + W) and load(door + SAME_IS_IN_PLACE) != 0)
    )
    if within:
        sends, receives = 0, load(door + IN_PLACE_BLOCKS) if receives != 0 else 0
    store(entry + SENDS, sends)
    store(entry + RECEIVES, receives)
    store(entry + WITHIN, 1 if within else 0)
    store(entry + NBYTES, 0)
    store(entry + CALL_TOKEN, 0)
    store(entry + SEND, 0)
    store(entry + RECV, 0)
    store(entry + SHORT, 0)
    store(entry + LAYOUT, 0)
    return receives != 0 or not within


def read_receiver(entry, door, recvbuf):
    """Read the receive buffer; false if it must be left to the Python path."""
    blocks = load(entry + RECEIVES)
    if blocks == 0:
        return True
    if read_buffer(entry, recvbuf, load(door + RECV_COUNTED), RECEIVED) == 0:
        return False
    address, octets = load(entry + ADDRESS), load(entry + OCTETS)
    nbytes = octets // blocks
    store(entry + RECV, address)
    store(entry + SEND, address + nbytes * load(entry + RANK) * load(entry + WITHIN) * load(door + OWN_BLOCK))
    store(entry + NBYTES, nbytes)
    store(entry + CALL_TOKEN, load(entry + TOKEN))
    read_only = load(door + ROOTED) == IS_SENT_AT_ROOT and load(entry + ROOT) == load(entry + RANK_OBJECT)
    return nbytes * blocks == octets and (read_only or load(entry + WRITABLE) != 0)


def read_sender(entry, door, sendbuf):
    """Read the send buffer; false if it does not match the receive buffer, or overlaps it."""
    blocks, received = load(entry + SENDS), load(entry + RECEIVES)
    if blocks == 0:
        return True
    if read_buffer(entry, sendbuf, load(door + SEND_COUNTED), SENT) == 0:
        return False
    send, recv, octets = load(entry + ADDRESS), load(entry + RECV), load(entry + OCTETS)
    store(entry + SEND, send)
    if received == 0:
        store(entry + NBYTES, octets // blocks)
        store(entry + CALL_TOKEN, load(entry + TOKEN))
        return octets % blocks == 0
    nbytes = load(entry + NBYTES)
    if load(entry + TOKEN) != load(entry + CALL_TOKEN) or octets != nbytes * blocks:
        return False
    if send == recv and load(door + SAME_IS_IN_PLACE) != 0:
        store(entry + WITHIN, 1)
        return True
    return send >= recv + nbytes * received or recv >= send + octets


def read_uneven(entry, door, arguments):
    """Read buffers of which at least one has a block of any length for each rank; false for what Python must see."""
    uneven, sends, receives = load(door + UNEVEN), load(entry + SENDS), load(entry + RECEIVES)
    sent, received, token, room = 0, 0, 0, 0
    for k in range(4 * load(entry + SIZE)):
        store(load(entry + BLOCKS) + W * k, 0)
    if receives != 0:
        found = read_blocks(entry, load(arguments + W), uneven & RECEIVED_UNEVEN, RECEIVED)
        if found == 0 or load(entry + WRITABLE) == 0:
            return False
        received, room, token = load(entry + OCTETS), load(entry + EXTENT), load(entry + TOKEN)
        store(entry + RECV, load(entry + ADDRESS))
        own_place = load(block_of(entry, RECEIVED, 1))
        store(entry + SEND, load(entry + ADDRESS) + own_place * load(entry + WITHIN))
    if sends != 0:
        if read_blocks(entry, load(arguments), uneven & SENT_UNEVEN, SENT) == 0:
            return False
        sent, send, recv = load(entry + OCTETS), load(entry + ADDRESS), load(entry + RECV)
        overlap = recv < send + load(entry + EXTENT) and send < recv + room
        if receives != 0 and (token != load(entry + TOKEN) or overlap):
            return False
        store(entry + SEND, send)
        token = load(entry + TOKEN)
    store(entry + NBYTES, max(sent, received))
    store(entry + CALL_TOKEN, token)
    if uneven & COUNTS_GIVEN:
        return has_counts(entry, load(arguments + 3 * W), sent, received)
    if uneven & ANY_LAYOUT:
        store(entry + LAYOUT, 0)
    fits = sends == 0 or receives == 0 or uneven & BOTH_UNEVEN == BOTH_UNEVEN
    own = load(block_of(entry, RECEIVED if uneven & RECEIVED_UNEVEN else SENT, 0))
    return fits or own == (sent if uneven & RECEIVED_UNEVEN else received)


def block_of(entry, side, column):
    """Where the length (column 0) or the place (1) of this rank's block of one side is."""
    return load(entry + BLOCKS) + W * ((2 * side + column) * load(entry + SIZE) + load(entry + RANK))


def has_counts(entry, counts, sent, received):
    """Whether counts, given beside the buffers, add up to what is sent, and give this rank what it receives."""
    fits = write_blocks(entry, counts, load(entry + NONE), sent, RECEIVED)
    return fits and load(entry + OCTETS) == sent and received == load(block_of(entry, RECEIVED, 0))


def read_blocks(entry, thing, uneven, side):
    """Read an array, or the forms of one; with ``uneven`` its blocks too.  0 for anything else.

    Writes its address, the bytes of all blocks, and the bytes from its address to the end of the last block.
    """
    if uneven == 0:
        found = read_buffer(entry, thing, 1, side)
        store(entry + EXTENT, load(entry + OCTETS))
        return found
    length, none = sequence_length(entry, thing), load(entry + NONE)
    if length < 2 or length > 4:
        return 0
    items = sequence_items(entry, thing)
    array, counts, places, last = load(items), load(items + W), none, load(items + W * (length - 1))
    if load(array + OBJECT_TYPE) != load(entry + ARRAY_TYPE):
        return 0
    if length == 4:
        places = load(items + 2 * W)
    elif load(counts + OBJECT_TYPE) == load(entry + TUPLE_TYPE):  # mpi4py reads a tuple as counts and displacements
        if sequence_length(entry, counts) != 2:
            return 0
        pair = sequence_items(entry, counts)
        counts, places = load(pair), load(pair + W)
    datatype = find_type(entry, last if length > 2 else load(array + ARRAY_DTYPE))
    if read_array(entry, array, datatype) == 0:
        return 0
    return 1 if write_blocks(entry, counts, places, load(entry + OCTETS), side) else 0


def write_blocks(entry, counts, places, room, side):
    """Write length and place of each rank's block in bytes; false if they are not integers, or outside the buffer."""
    size, packed = load(entry + SIZE), places == load(entry + NONE)
    lengths = load(entry + BLOCKS) + W * 2 * side * size
    starts = lengths + W * size
    if not read_integers(entry, counts, lengths) or not (packed or read_integers(entry, places, starts)):
        return False
    total, extent, layout, item = 0, 0, load(entry + LAYOUT), load(entry + ELEMENT)
    most = room // item
    for q in range(size):
        count, start = load(lengths + W * q), total // item if packed else load(starts + W * q)
        if count < 0 or count > most or start < 0 or start > most - count:
            return False
        store(lengths + W * q, count * item)
        store(starts + W * q, start * item)
        total += count * item
        extent = max(extent, (start + count) * item)
        layout = hash_words(layout, count << 4, start << 3, q << 4)
    store(entry + OCTETS, total)
    store(entry + EXTENT, extent)
    store(entry + LAYOUT, layout | 1)
    return True


def read_integers(entry, thing, into):
    """Read one integer for each rank from a list, a tuple or an array of 4 or 8 bytes; false for anything else."""
    size = load(entry + SIZE)
    if load(thing + OBJECT_TYPE) == load(entry + ARRAY_TYPE):
        return read_integer_array(entry, thing, into)
    if sequence_length(entry, thing) != size:
        return False
    items = sequence_items(entry, thing)
    for q in range(size):
        if load(load(items + W * q) + OBJECT_TYPE) != load(entry + INT_TYPE):
            return False
        store(into + W * q, call_2(load(entry + AS_INTEGER), load(items + W * q), entry + OVERFLOW))
    return True


def read_integer_array(entry, array, into):
    """Read one integer for each rank from an array."""
    dtype = load(array + ARRAY_DTYPE)
    datatype, size, address = find_type(entry, dtype), load(entry + SIZE), load(array + ARRAY_DATA)
    one_row = load(array + ARRAY_DIMENSIONS) & LOW_HALF == 1 and load(array + ARRAY_FLAGS) & C_CONTIGUOUS != 0
    if datatype == 0 or not one_row or load(load(array + ARRAY_SHAPE)) != size or address & 3 != 0:
        return False
    item = load(datatype + TYPE_ITEM)
    if load(dtype + DTYPE_KIND) & 0xFF != INTEGER_KIND or item not in (4, 8) or address & (item - 1) != 0:
        return False
    for q in range(size):
        at = address + item * q
        word = load(at & -8)  # a word of the array, or the aligned one around half of it
        store(into + W * q, word if item == 8 else (word >> 8 * (at & 4)) << 32 >> 32)
    return True


def sequence_length(entry, thing):
    """The length of a list or tuple; 0 for other objects."""
    kind = load(thing + OBJECT_TYPE)
    return load(thing + SEQUENCE_LENGTH) if kind in (load(entry + LIST_TYPE), load(entry + TUPLE_TYPE)) else 0


def sequence_items(entry, thing):
    """The address of the first item of a list or tuple."""
    return load(thing + LIST_ITEMS) if load(thing + OBJECT_TYPE) == load(entry + LIST_TYPE) else thing + TUPLE_ITEMS


def is_permanent(entry, thing):
    """Whether an object is None, or one of those that are never freed: its address then identifies it."""
    return thing == load(entry + NONE) or find_type(entry, thing) != 0


def size_class(nbytes):
    """The bits of a length: a row takes lengths of one class only."""
    bits = 0
    while nbytes != 0:
        nbytes >>= 1
        bits += 1
    return bits


def read_buffer(entry, thing, per_count, side):
    """Read an array, or a list or tuple of an array, a count and a datatype; 0 if it is anything else."""
    kind = load(thing + OBJECT_TYPE)
    if kind == load(entry + ARRAY_TYPE):
        return read_array(entry, thing, find_type(entry, load(thing + ARRAY_DTYPE)))
    length = sequence_length(entry, thing)
    if length not in (2, 3):
        return 0
    items = sequence_items(entry, thing)
    return read_form(entry, load(items), load(items + W), load(items + W * (length - 1)), per_count, side)


def read_form(entry, array, count, last, per_count, side):
    """Read an array and a count, a datatype, or both; ``last`` is the last of them, and may be the count itself."""
    if load(array + OBJECT_TYPE) != load(entry + ARRAY_TYPE):
        return 0
    datatype = find_type(entry, last)
    if datatype == 0 and last == count:
        datatype = find_type(entry, load(array + ARRAY_DTYPE))
    elif last == count:
        count = 0
    if read_array(entry, array, datatype) == 0:
        return 0
    item = load(datatype + TYPE_ITEM)
    room = load(entry + OCTETS) // item
    if count == 0:
        store(entry + OCTETS, room * item)
        return 1
    if load(count + OBJECT_TYPE) != load(entry + INT_TYPE):
        return 0
    elements = call_2(load(entry + AS_INTEGER), count, entry + OVERFLOW)
    if 0 <= elements <= room // per_count:
        store(entry + OCTETS, elements * item * per_count)
        return 1
    fits = 0 < elements <= SCRATCH_BYTES // (item * per_count)
    return pad_last(entry, datatype, elements * item * per_count, side) if fits else 0


def pad_last(entry, datatype, octets, side):
    """Copy a buffer that lacks only the padding of its last element to where there is room for it; 0 for others."""
    there, scratch = load(entry + OCTETS), entry + SCRATCH + SCRATCH_BYTES * side
    if there >= octets or octets - there > load(datatype + TYPE_PADDING):
        return 0
    copy(scratch, load(entry + ADDRESS), there)
    if side == RECEIVED and load(entry + WRITABLE) != 0:
        store(entry + SHORT, load(entry + ADDRESS))
        store(entry + SHORT_BYTES, there)
    store(entry + ADDRESS, scratch)
    store(entry + OCTETS, octets)
    return 1


def read_array(entry, array, datatype):
    """Read a contiguous, aligned array whose elements are of the type at ``datatype``; 0 if it is another."""
    dtype, flags = load(array + ARRAY_DTYPE), load(array + ARRAY_FLAGS)
    octets = item_size(entry, dtype)
    if datatype == 0 or octets == 0 or flags & (C_CONTIGUOUS | ALIGNED) != C_CONTIGUOUS | ALIGNED:
        return 0
    shape = load(array + ARRAY_SHAPE)
    for k in range(load(array + ARRAY_DIMENSIONS) & LOW_HALF):
        octets *= load(shape + W * k)
    store(entry + ADDRESS, load(array + ARRAY_DATA))
    store(entry + OCTETS, octets)
    store(entry + ELEMENT, load(datatype + TYPE_ITEM))
    store(entry + TOKEN, load(datatype + TYPE_TOKEN))
    store(entry + WRITABLE, flags & WRITEABLE)
    return 1


def item_size(entry, dtype):
    """Bytes of the elements of a built-in or structured dtype; 0 for others."""
    known = find_type(entry, dtype)
    if known != 0:
        return load(known + TYPE_ITEM)
    return load(dtype + load(entry + ITEM_SIZE)) & LOW_HALF if load(dtype + DTYPE_KIND) & 0xFF == VOID_KIND else 0


def hash_words(a, b, c, d):
    """A hash of four words."""
    mixed = (a * CHECK_PRIME) ^ ((b >> 4) * COUNT_CHECK) ^ ((c >> 3) * COUNT_PRIME) ^ (d >> 4)
    return mixed ^ (mixed >> 29) & CHECK_MASK


def find_type(entry, thing):
    """The address of the record of a dtype or datatype object; 0 if there is none."""
    types, mask = load(entry + TYPES), load(entry + TYPES_MASK)
    at = hash_words(thing, 0, 0, 0) & mask
    while True:
        found = types + TYPE_BYTES * at
        known = load(found + TYPE_OBJECT)
        if known == thing and thing != 0:
            return found
        if known == 0:
            return 0
        at = (at + 1) & mask


# Rows


def find_row(entry):
    """Find the row of the call that was read: DONE, or MISS."""
    kind, op, root, algorithm = load(entry + KIND), load(entry + OP), load(entry + ROOT), load(entry + ALGORITHM)
    rows, mask, nbytes, layout = load(entry + ROWS), load(entry + MASK), load(entry + NBYTES), load(entry + LAYOUT)
    at = hash_words(kind, op, root ^ layout, algorithm) & mask
    while True:
        row = rows + ROW_BYTES * at
        if load(row + BACKEND) == 0:
            return MISS
        if (
            load(row + ROW_KIND) == kind
            and load(row + ROW_OP) == op
            and load(row + ROW_ROOT) == root
            and load(row + ROW_ALGORITHM) == algorithm
            and load(row + LEAST) <= nbytes <= load(row + MOST)
            and (load(row + ROW_LAYOUT) == layout and has_places(entry, row))
        ):
            store(entry + ROW, row)
            return DONE
        at = (at + 1) & mask


def has_places(entry, row):
    """Whether a row was made for the blocks of the call that was read."""
    words, places = load(entry + BLOCKS), load(row + PLACES)
    if places != 0:
        for k in range(4 * load(entry + SIZE)):
            if load(places + W * k) != load(words + W * k):
                return False
    return True


def fingerprint_word(row, nbytes):
    """The word of the fingerprint of a call: its digest and its count."""
    count = nbytes // load(row + ITEM) * load(row + ROW_BLOCKS)
    digest = (load(row + TEMPLATE) + count * COUNT_PRIME) & DIGEST_MASK
    return digest | (count & COUNT_MASK) << COUNT_SHIFT


def aim(entry, row):
    """Write addresses, length and fingerprint into the call record."""
    call, nbytes = load(row + CALL), load(entry + NBYTES)
    store(call + CALL_SEND, load(entry + SEND))
    store(call + CALL_RECV, load(entry + RECV))
    if load(row + LAST) != nbytes:
        store(row + LAST, nbytes)
        fingerprint, checked = fingerprint_word(row, nbytes), nbytes * load(row + CHECKED)
        store(call + CALL_FINGERPRINT, fingerprint)
        store(call + CALL_CHECK, (fingerprint * CHECK_PRIME + load(row + SALT) + checked * COUNT_CHECK) & CHECK_MASK)
        store(call + CALL_NBYTES, nbytes * load(row + SIZED))
        fill_table(call, load(row + ROW_TABLE), load(entry + SIZE), nbytes)
    if load(row + REGISTERS) != 0:
        find_allocation(entry, call, nbytes)


def fill_table(call, table, size, nbytes):
    """Write the lengths and places of equal blocks behind the call record."""
    words = call + TABLE + W * size
    if table == BLOCK_TABLE:
        for q in range(size + 1):
            store(words + W * q, q * nbytes)
    if table >= ALLGATHER_TABLE:
        store(call + CALL_LONGEST, nbytes)
        for side in range(table - 1):
            for q in range(size):
                store(words + W * (2 * side * size + q), nbytes)
                store(words + W * ((2 * side + 1) * size + q), q * nbytes)


def find_allocation(entry, call, nbytes):
    """Write which registered memory holds both vectors; 0 if none does."""
    send, recv = load(call + CALL_SEND), load(call + CALL_RECV)
    store(call + CALL_ALLOCATION, 0)
    for k in range(load(load(entry + REGISTRATIONS))):
        found = load(entry + REGISTERED) + ALLOCATION_BYTES * k
        first, end = load(found + FIRST), load(found + END)
        if first <= min(send, recv) and max(send, recv) + nbytes <= end:
            store(call + CALL_ALLOCATION, load(found + ALLOCATION_NUMBER))
            store(call + CALL_ALIVE, load(found + ALLOCATION_ALIVE))
            store(call + CALL_COPIES, load(found + ALLOCATION_COPIES))
            store(call + CALL_COPY_STRIDE, load(found + ALLOCATION_STRIDE))
            store(call + CALL_SEND_AT, send - first)
            store(call + CALL_RECV_AT, recv - first)
            return


def run(entry, call, kernel, releases):
    """Run a kernel; a call that waits long releases the GIL."""
    if releases == 0:
        patience = load(entry + STATE) + MAX_WAIT
        store(patience, SHORT_WAIT_NS)
        code = call_1(kernel, call)
        store(patience, load(entry + PATIENCE))
        if code != RETRY:
            return code
    thread = call_0(load(entry + SAVE_THREAD))
    code = call_1(kernel, call)
    call_1(load(entry + RESTORE_THREAD), thread)
    return code


# Calls on messages


def own_row(entry):
    """The row of this rank in the consistency table."""
    return load(entry + ENTRIES) + load(entry + ROW_STRIDE) * load(entry + MEMBER)


def start_messages(entry, row):
    """Enter a call on messages in the consistency table, and compare: NATIVE, DIFFER, LATE, or a wait."""
    if load(row + BACKEND) == BY_RECORDS:
        store(load(row + CALL) + VECTOR, buffer_from(entry, load(row + ROW_VECTOR), load(load(row + CALL) + VECTOR)))
        store(load(row + CALL) + SOURCE, buffer_from(entry, load(row + ROW_SOURCE), load(load(row + CALL) + SOURCE)))
    if load(entry + ENTRIES) == 0:
        return NATIVE
    fingerprint, own = fingerprint_word(row, load(entry + NBYTES)), own_row(entry)
    number = abs(load(own + W * STATUS)) + 1
    late = is_out_of_reach(entry, row, number)
    store(own + W * (COUNTS + number % CALLS), fingerprint >> COUNT_SHIFT)
    if load(row + ROW_UNEVEN) != 0 and not late:
        write_amounts(entry, row, number)
    store_release(own + W * (number % CALLS), number << DIGEST_BITS | (fingerprint & DIGEST_MASK))
    store_release(own + W * STATUS, number)
    if number & load(entry + BETWEEN) == 0:
        return LATE
    if load(row + COMPARES) == COMPARED_TOGETHER:
        code = meet(entry, number, fingerprint)
        if code != DONE:
            return code
    elif late:
        return LATE
    return NATIVE if load(row + COMPARES) == COMPARED_AFTERWARDS else compare_entries(entry)


def meet(entry, number, fingerprint):
    """Wait a short time until all ranks of the node have entered a call: DONE, LATE, or a wait in shared memory."""
    if load(entry + MEETING) != 0:
        store(load(entry + MEETING) + CALL_FINGERPRINT, fingerprint)
        code = run(entry, load(entry + MEETING), load(entry + MEET), 0)
        return DONE if code == DONE else BEFORE_NATIVE + code
    polls, began = 0, 0
    for k in range(load(entry + MEMBERS)):
        there = load(entry + ENTRIES) + load(entry + ROW_STRIDE) * k + W * (number % CALLS)
        while load_acquire(there) >> DIGEST_BITS < number:
            polls += 1
            if polls > EAGER_POLLS:
                now = nanoseconds()
                began = now if began == 0 else began
                if now - began > SHORT_WAIT_NS:
                    return LATE
                yield_cpu()
    return DONE


def buffer_from(entry, place, own):
    """The buffer of the call that records use, or their own."""
    if place == FROM_SENT:
        return load(entry + SEND)
    return load(entry + RECV) if place == FROM_RECEIVED else own


def run_records(entry, row, arguments):
    """Run records and compare: DONE, LEAVING, or UNFINISHED, after which Python goes on with them.

    The buffers are kept until then: an exception, such as Ctrl-C, may come first, while messages are pending.
    """
    thread = call_0(load(entry + SAVE_THREAD))
    code = call_1(load(row + KERNEL), load(row + CALL))
    call_1(load(entry + RESTORE_THREAD), thread)
    store(entry + FAILURE, 0)
    store(entry + LEFT, code)
    if code != DONE:
        for k in range(2):
            store(entry + HELD + W * k, load(arguments + W * k))
            call_1(load(entry + HOLD), load(arguments + W * k))
        return UNFINISHED
    return DONE if leave_table(entry) == DONE else LEAVING


def is_out_of_reach(entry, row, number):
    """Whether a rank is so far behind that this one would overwrite what it has to compare.

    A call with amounts overwrites those of an older one.  Entries are many: every 32nd call looks, and so speaks for
    all up to the next that does.
    """
    even = load(row + ROW_UNEVEN) == 0
    reach, last = (CALLS >> 1, number + 1) if even else (AMOUNT_CALLS - 1, number)
    if even and last & (reach - 1) != 0:
        return False
    for k in range(load(entry + MEMBERS)):
        status = load_acquire(load(entry + ENTRIES) + load(entry + ROW_STRIDE) * k + W * STATUS)
        if abs(status) + reach < last:
            return True
    return False


def call_mpi(entry, row):
    """Call MPI's function and compare again: DONE, FAILED, LEAVING, or NATIVE for counts of more than 32 bits."""
    unit, arguments = load(row + UNIT), row + ARGUMENTS
    count = load(entry + NBYTES) // unit
    if load(row + SPLITS) != 0:
        count = write_counts(entry, load(row + SPLITS), unit, count)
    if count > INT_MAX:
        return NATIVE
    store(arguments + W * load(row + SEND_ARGUMENT), load(entry + SEND))
    store(arguments + W * load(row + RECV_ARGUMENT), load(entry + RECV))
    store(arguments + W * load(row + COUNT_ARGUMENT), count)
    store(arguments + W * load(row + RECV_COUNT_ARGUMENT), count)
    thread = call_0(load(entry + SAVE_THREAD))
    failure = call_9(load(row + FUNCTION), arguments)
    call_1(load(entry + RESTORE_THREAD), thread)
    store(entry + FAILURE, failure)
    if failure != 0:
        return FAILED
    return DONE if leave_table(entry) == DONE else LEAVING


def write_counts(entry, splits, unit, count):
    """Write the blocks of the call as integers for MPI; returns the elements of this rank's own block.

    Where a block is too long or too far for them, the result is, too.
    """
    words, counts = load(entry + BLOCKS), load(entry + COUNTS_AT)
    if splits & RECEIVED_UNEVEN and load(entry + RECEIVES) != 0:
        count = load(block_of(entry, RECEIVED, 0)) // unit
    elif splits & SENT_UNEVEN and load(entry + SENDS) != 0:
        count = load(block_of(entry, SENT, 0)) // unit
    for k in range(2 * load(entry + SIZE)):
        low, high = load(words + 2 * W * k) // unit, load(words + 2 * W * k + W) // unit
        if max(low, high) > INT_MAX:
            count = INT_MAX + 1
        store(counts + W * k, low | high << 32)
    return count


def leave_table(entry):
    """Leave the consistency table: DONE, or DIFFER if another rank has called something else."""
    if load(entry + ENTRIES) == 0:
        return DONE
    status = own_row(entry) + W * STATUS
    if compare_entries(entry) == DIFFER:
        return DIFFER
    store(status, -abs(load(status)))  # a call inside this one has left as well
    return DONE


def compare_entries(entry):
    """NATIVE, or DIFFER if a rank that has entered this call, too, called something else."""
    own, code = own_row(entry), NATIVE
    number = abs(load(own + W * STATUS))
    place = W * (number % CALLS)
    mine = load(own + place)
    for k in range(load(entry + MEMBERS)):
        theirs = load_acquire(load(entry + ENTRIES) + load(entry + ROW_STRIDE) * k + place)
        if theirs >> DIGEST_BITS == number and (theirs != mine or amounts_differ(entry, k, number)):
            code = DIFFER
    return code


def amounts_of(entry, member, number):
    """Where the amounts of a rank's call are: its number, bytes sent to each rank, and bytes received from each."""
    place = load(entry + AMOUNTS_AT) + W * (number % AMOUNT_CALLS) * (1 + 2 * load(entry + MEMBERS))
    return load(entry + ENTRIES) + load(entry + ROW_STRIDE) * member + place


def write_amounts(entry, row, number):
    """Write what this rank sends to each rank of its node in a call, and what it receives from each."""
    members, amounts = load(entry + MEMBERS), amounts_of(entry, load(entry + MEMBER), number)
    store(amounts, 0)
    for k in range(members):
        rank = load(load(entry + MEMBER_RANKS) + W * k)
        store(amounts + W * (1 + k), amount(entry, row, SENT, rank))
        store(amounts + W * (1 + members + k), amount(entry, row, RECEIVED, rank))
    store_release(amounts, number)


def amount(entry, row, side, rank):
    """The bytes of the running call's block for one rank, or from it; NOT_COMPARED if there is none."""
    if load(entry + (SENDS if side == SENT else RECEIVES)) == 0:
        return NOT_COMPARED
    if load(row + ROW_UNEVEN) & (SENT_UNEVEN if side == SENT else RECEIVED_UNEVEN) != 0:
        return load(load(entry + BLOCKS) + W * (2 * side * load(entry + SIZE) + rank))
    here = rank == load(row + ROOT_RANK) and rank != load(entry + RANK)
    return load(entry + NBYTES) if here else NOT_COMPARED


def amounts_differ(entry, member, number):
    """Whether a rank sends this one another amount than it receives, or the other way round."""
    if load(load(entry + ROW) + ROW_UNEVEN) == 0:
        return False
    members, me = load(entry + MEMBERS), load(entry + MEMBER)
    mine, theirs = amounts_of(entry, me, number), amounts_of(entry, member, number)
    if load_acquire(theirs) != number:
        return False
    sent, room = load(mine + W * (1 + member)), load(theirs + W * (1 + members + me))
    received, amount_there = load(mine + W * (1 + members + member)), load(theirs + W * (1 + me))
    wrong = sent != room and min(sent, room) != NOT_COMPARED
    return wrong or (received != amount_there and min(received, amount_there) != NOT_COMPARED)
