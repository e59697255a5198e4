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
    TYPE_RECORD,
    UNFINISHED,
    VOID_KIND,
    WRITEABLE,
)
from hpccomm.kernels.interpreter.records import EAGER_POLLS, RUN_RECORD
from hpccomm.kernels.shared_memory.collectives import DONE, RETRY, STATE, TABLE
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
from hpccomm.kernels.shared_memory.records import CALL_RECORD, W, offsets

ENTRY, DOOR, ROW, EVENT = map(offsets, (ENTRY_RECORD, DOOR_RECORD, ROW_RECORD, EVENT_RECORD))
TYPE, ALLOCATION, CALL, RUN = map(offsets, (TYPE_RECORD, ALLOCATION_RECORD, CALL_RECORD, RUN_RECORD))
ROW_BYTES, EVENT_BYTES = ROW_RECORD.itemsize, EVENT_RECORD.itemsize
TYPE_BYTES, ALLOCATION_BYTES = TYPE_RECORD.itemsize, ALLOCATION_RECORD.itemsize
BLOCK_TABLE, ALLGATHER_TABLE = TABLES.index("blocks"), TABLES.index("allgather")
SHORT_WAIT_NS = 20_000
"""Nanoseconds for which a short call waits before it releases the GIL."""
SENT, RECEIVED = 0, 1
BOTH_UNEVEN = SENT_UNEVEN | RECEIVED_UNEVEN


def enter(self, arguments, count):
    """``entry(sendbuf, recvbuf, op, root, algorithm, rest)``: None when the call is done, else a code."""
    door = load(self + ARRAY_DATA)
    entry = load(door + DOOR.entry)
    if load(entry + ENTRY.pending) != 0:
        return answer(entry, INTERRUPTED)
    code = read_call(entry, door, arguments) if count == 6 else NOT_MINE
    if code == DONE:
        code = find_row(entry)
    if code == DONE:
        row = load(entry + ENTRY.row)
        begin_event(entry, row)
        if load(row + ROW.backend) != IN_SHARED_MEMORY:
            code = start_messages(entry, row)
            if code == NATIVE and load(row + ROW.function) != 0:
                code = call_mpi(entry, row)
            elif code == NATIVE and load(row + ROW.backend) == BY_RECORDS:
                code = run_records(entry, row, arguments)
            if code != DONE:
                store(entry + ENTRY.pending, code if load(entry + ENTRY.entries) != 0 or code == UNFINISHED else 0)
                code += NATIVE_IN_PLACE * load(entry + ENTRY.within)
        else:
            aim(entry, row)
            code = run(entry, load(row + ROW.call), load(row + ROW.kernel), load(row + ROW.releases))
            store(entry + ENTRY.pending, code)
        if code == DONE:
            if load(entry + ENTRY.short) != 0:
                copy(load(entry + ENTRY.short), load(entry + ENTRY.recv), load(entry + ENTRY.short_bytes))
            end_event(entry)
    return answer(entry, code)


def leave(self, arguments, count):
    """``leave()`` after a call on messages by Python: None, or DIFFER if another rank called something else."""
    entry = load(load(self + ARRAY_DATA) + DOOR.entry)
    end_event(entry)
    return answer(entry, leave_table(entry))


def answer(entry, code):
    """None for a call that is done, else the code as an integer object; its reference belongs to the caller."""
    thing = load(entry + ENTRY.none) if code == DONE else load(load(entry + ENTRY.answers) + W * code)
    if load(entry + ENTRY.counts_references) != 0:
        store(thing, load(thing) + 1)
    return thing


# The flight recorder


def begin_event(entry, row):
    """Record that a call begins."""
    ring, calls = load(entry + ENTRY.ring), load(entry + ENTRY.comm_calls)
    if ring == 0:
        return
    number, call = load(ring) + 1, -1
    if load(calls + W) == 0:
        call = load(calls) + 1
        store(calls, call)
    event = load(entry + ENTRY.events) + EVENT_BYTES * (number & load(entry + ENTRY.last_event))
    blocks = load(entry + ENTRY.sends)
    store_release(event + EVENT.number, 0)
    store(event + EVENT.begin, nanoseconds())
    store(event + EVENT.end, 0)
    store(event + EVENT.nbytes, load(entry + ENTRY.nbytes) * (blocks if blocks != 0 else load(entry + ENTRY.receives)))
    store(event + EVENT.text, load(row + ROW.text))
    store(event + EVENT.label, load(entry + ENTRY.label))
    store(event + EVENT.comm, load(entry + ENTRY.comm))
    store(event + EVENT.call, call)
    store_release(event + EVENT.number, number)
    store(ring, number)
    store(entry + ENTRY.event, number)


def end_event(entry):
    """Record that the call has ended."""
    number = load(entry + ENTRY.event)
    event = load(entry + ENTRY.events) + EVENT_BYTES * (number & load(entry + ENTRY.last_event))
    if number != 0 and load(event + EVENT.number) == number:
        store(event + EVENT.end, nanoseconds())
    store(entry + ENTRY.event, 0)


# Reading


def read_call(entry, door, arguments):
    """Read and check the buffers, and write the key of the call; NOT_MINE for what the Python path must see."""
    store(entry + ENTRY.root, find_root(entry, door, load(arguments + 3 * W)))
    store(entry + ENTRY.algorithm, find_name(entry, load(arguments + 4 * W)))
    mine = names_permanent_objects(entry, arguments) and choose_buffers(entry, door, arguments)
    if mine and load(door + DOOR.uneven) != 0:
        mine = read_uneven(entry, door, arguments)
    elif mine:
        mine = read_receiver(entry, door, load(arguments + W))
        mine = mine and read_sender(entry, door, load(arguments))
    nbytes = load(entry + ENTRY.nbytes)
    if not mine or (nbytes == 0 and load(entry + ENTRY.sends) + load(entry + ENTRY.receives) != 0):
        return NOT_MINE
    kind = load(door + DOOR.collective) | load(entry + ENTRY.within) << IN_PLACE_BIT
    store(entry + ENTRY.kind, kind | size_class(nbytes) << CLASS_BITS | load(entry + ENTRY.call_token) << TOKEN_BITS)
    store(entry + ENTRY.op, load(arguments + 2 * W))
    return DONE


def find_root(entry, door, root):
    """The root as one of Python's own integers, also of an integer of NumPy; None for a call without a root."""
    kind, value = load(root + OBJECT_TYPE), -1
    if load(door + DOOR.uneven) & COUNTS_GIVEN:
        return load(entry + ENTRY.none)
    if kind == load(entry + ENTRY.int64_type):
        value = load(root + SCALAR_VALUE)
    elif kind == load(entry + ENTRY.int32_type):
        value = (load(root + SCALAR_VALUE) << 32) >> 32
    return load(load(entry + ENTRY.answers) + W * value) if 0 <= value < load(entry + ENTRY.size) else root


def find_name(entry, name):
    """The name of an algorithm as the one string that Python keeps of each interned text, also if it is another one."""
    if load(name + OBJECT_TYPE) != load(entry + ENTRY.string_type) or find_type(entry, name) != 0:
        return name
    store(entry + ENTRY.name, name)
    call_1(load(entry + ENTRY.hold), name)
    call_1(load(entry + ENTRY.intern), entry + ENTRY.name)
    call_1(load(entry + ENTRY.let_go), load(entry + ENTRY.name))
    return load(entry + ENTRY.name)


def names_permanent_objects(entry, arguments):
    """Whether operation, root and algorithm are objects that are never freed, and no other argument is given.

    Of a root only the type is checked: Python never frees the integers that are ranks (``MAX_RANKS``).
    """
    none, root = load(entry + ENTRY.none), load(entry + ENTRY.root)
    return (
        load(arguments + 5 * W) == none
        and is_permanent(entry, load(arguments + 2 * W))
        and is_permanent(entry, load(entry + ENTRY.algorithm))
        and (root == none or load(root + OBJECT_TYPE) == load(entry + ENTRY.int_type))
    )


def choose_buffers(entry, door, arguments):
    """Write how many blocks are sent and received, 0 for a buffer that is not read; false for what is not taken."""
    sendbuf, sends, receives = load(arguments), load(door + DOOR.send_blocks), load(door + DOOR.recv_blocks)
    if load(entry + ENTRY.root) != load(entry + ENTRY.rank_object):
        receives = 0 if load(door + DOOR.rooted) == RECEIVES_AT_ROOT else receives
        sends = 0 if load(door + DOOR.rooted) == SENDS_AT_ROOT else sends
    within = sends != 0 and (
        sendbuf == load(entry + ENTRY.none)
        or sendbuf == load(entry + ENTRY.in_place)
        or (sendbuf == load(arguments + W) and load(door + DOOR.same_is_in_place) != 0)
    )
    if within:
        sends, receives = 0, load(door + DOOR.in_place_blocks) if receives != 0 else 0
    store(entry + ENTRY.sends, sends)
    store(entry + ENTRY.receives, receives)
    store(entry + ENTRY.within, 1 if within else 0)
    store(entry + ENTRY.nbytes, 0)
    store(entry + ENTRY.call_token, 0)
    store(entry + ENTRY.send, 0)
    store(entry + ENTRY.recv, 0)
    store(entry + ENTRY.short, 0)
    store(entry + ENTRY.layout, 0)
    return receives != 0 or not within


def read_receiver(entry, door, recvbuf):
    """Read the receive buffer; false if it must be left to the Python path."""
    blocks = load(entry + ENTRY.receives)
    if blocks == 0:
        return True
    if read_buffer(entry, recvbuf, load(door + DOOR.recv_counted), RECEIVED) == 0:
        return False
    address, octets = load(entry + ENTRY.address), load(entry + ENTRY.octets)
    nbytes = octets // blocks
    store(entry + ENTRY.recv, address)
    own_block = load(entry + ENTRY.rank) * load(door + DOOR.own_block)
    store(entry + ENTRY.send, address + nbytes * own_block * load(entry + ENTRY.within))
    store(entry + ENTRY.nbytes, nbytes)
    store(entry + ENTRY.call_token, load(entry + ENTRY.token))
    here = load(entry + ENTRY.root) == load(entry + ENTRY.rank_object)
    read_only = here and load(door + DOOR.rooted) == IS_SENT_AT_ROOT
    return nbytes * blocks == octets and (read_only or load(entry + ENTRY.writable) != 0)


def read_sender(entry, door, sendbuf):
    """Read the send buffer; false if it does not match the receive buffer, or overlaps it."""
    blocks, received = load(entry + ENTRY.sends), load(entry + ENTRY.receives)
    if blocks == 0:
        return True
    if read_buffer(entry, sendbuf, load(door + DOOR.send_counted), SENT) == 0:
        return False
    send, recv, octets = load(entry + ENTRY.address), load(entry + ENTRY.recv), load(entry + ENTRY.octets)
    store(entry + ENTRY.send, send)
    if received == 0:
        store(entry + ENTRY.nbytes, octets // blocks)
        store(entry + ENTRY.call_token, load(entry + ENTRY.token))
        return octets % blocks == 0
    nbytes = load(entry + ENTRY.nbytes)
    if load(entry + ENTRY.token) != load(entry + ENTRY.call_token) or octets != nbytes * blocks:
        return False
    if send == recv and load(door + DOOR.same_is_in_place) != 0:
        store(entry + ENTRY.within, 1)
        return True
    return send >= recv + nbytes * received or recv >= send + octets


def read_uneven(entry, door, arguments):
    """Read buffers of which at least one has a block of any length for each rank; false for what Python must see."""
    uneven, sends, receives = load(door + DOOR.uneven), load(entry + ENTRY.sends), load(entry + ENTRY.receives)
    sent, received, token, room = 0, 0, 0, 0
    for k in range(4 * load(entry + ENTRY.size)):
        store(load(entry + ENTRY.blocks) + W * k, 0)
    if receives != 0:
        found = read_blocks(entry, load(arguments + W), uneven & RECEIVED_UNEVEN, RECEIVED)
        if found == 0 or load(entry + ENTRY.writable) == 0:
            return False
        received, room, token = load(entry + ENTRY.octets), load(entry + ENTRY.extent), load(entry + ENTRY.token)
        store(entry + ENTRY.recv, load(entry + ENTRY.address))
        own_place = load(block_of(entry, RECEIVED, 1))
        store(entry + ENTRY.send, load(entry + ENTRY.address) + own_place * load(entry + ENTRY.within))
    if sends != 0:
        if read_blocks(entry, load(arguments), uneven & SENT_UNEVEN, SENT) == 0:
            return False
        sent, send, recv = load(entry + ENTRY.octets), load(entry + ENTRY.address), load(entry + ENTRY.recv)
        overlap = recv < send + load(entry + ENTRY.extent) and send < recv + room
        if receives != 0 and (token != load(entry + ENTRY.token) or overlap):
            return False
        store(entry + ENTRY.send, send)
        token = load(entry + ENTRY.token)
    store(entry + ENTRY.nbytes, max(sent, received))
    store(entry + ENTRY.call_token, token)
    if uneven & COUNTS_GIVEN:
        return has_counts(entry, load(arguments + 3 * W), sent, received)
    if uneven & ANY_LAYOUT:
        store(entry + ENTRY.layout, 0)
    fits = sends == 0 or receives == 0 or uneven & BOTH_UNEVEN == BOTH_UNEVEN
    own = load(block_of(entry, RECEIVED if uneven & RECEIVED_UNEVEN else SENT, 0))
    return fits or own == (sent if uneven & RECEIVED_UNEVEN else received)


def block_of(entry, side, column):
    """Where the length (column 0) or the place (1) of this rank's block of one side is."""
    return load(entry + ENTRY.blocks) + W * ((2 * side + column) * load(entry + ENTRY.size) + load(entry + ENTRY.rank))


def has_counts(entry, counts, sent, received):
    """Whether counts, given beside the buffers, add up to what is sent, and give this rank what it receives."""
    fits = write_blocks(entry, counts, load(entry + ENTRY.none), sent, RECEIVED)
    return fits and load(entry + ENTRY.octets) == sent and received == load(block_of(entry, RECEIVED, 0))


def read_blocks(entry, thing, uneven, side):
    """Read an array, or the forms of one; with ``uneven`` its blocks too.  0 for anything else.

    Writes its address, the bytes of all blocks, and the bytes from its address to the end of the last block.
    """
    if uneven == 0:
        found = read_buffer(entry, thing, 1, side)
        store(entry + ENTRY.extent, load(entry + ENTRY.octets))
        return found
    length, none = sequence_length(entry, thing), load(entry + ENTRY.none)
    if length < 2 or length > 4:
        return 0
    items = sequence_items(entry, thing)
    array, counts, places, last = load(items), load(items + W), none, load(items + W * (length - 1))
    if load(array + OBJECT_TYPE) != load(entry + ENTRY.array_type):
        return 0
    if length == 4:
        places = load(items + 2 * W)
    elif load(counts + OBJECT_TYPE) == load(entry + ENTRY.tuple_type):  # counts and displacements, as mpi4py reads it
        if sequence_length(entry, counts) != 2:
            return 0
        pair = sequence_items(entry, counts)
        counts, places = load(pair), load(pair + W)
    datatype = find_type(entry, last if length > 2 else load(array + ARRAY_DTYPE))
    if read_array(entry, array, datatype) == 0:
        return 0
    return 1 if write_blocks(entry, counts, places, load(entry + ENTRY.octets), side) else 0


def write_blocks(entry, counts, places, room, side):
    """Write length and place of each rank's block in bytes; false if they are not integers, or outside the buffer."""
    size, packed = load(entry + ENTRY.size), places == load(entry + ENTRY.none)
    lengths = load(entry + ENTRY.blocks) + W * 2 * side * size
    starts = lengths + W * size
    if not read_integers(entry, counts, lengths) or not (packed or read_integers(entry, places, starts)):
        return False
    total, extent, layout, item = 0, 0, load(entry + ENTRY.layout), load(entry + ENTRY.element)
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
    store(entry + ENTRY.octets, total)
    store(entry + ENTRY.extent, extent)
    store(entry + ENTRY.layout, layout | 1)
    return True


def read_integers(entry, thing, into):
    """Read one integer for each rank from a list, a tuple or an array of 4 or 8 bytes; false for anything else."""
    size = load(entry + ENTRY.size)
    if load(thing + OBJECT_TYPE) == load(entry + ENTRY.array_type):
        return read_integer_array(entry, thing, into)
    if sequence_length(entry, thing) != size:
        return False
    items = sequence_items(entry, thing)
    for q in range(size):
        if load(load(items + W * q) + OBJECT_TYPE) != load(entry + ENTRY.int_type):
            return False
        store(into + W * q, call_2(load(entry + ENTRY.as_integer), load(items + W * q), entry + ENTRY.overflow))
    return True


def read_integer_array(entry, array, into):
    """Read one integer for each rank from an array."""
    dtype = load(array + ARRAY_DTYPE)
    datatype, size, address = find_type(entry, dtype), load(entry + ENTRY.size), load(array + ARRAY_DATA)
    one_row = load(array + ARRAY_DIMENSIONS) & LOW_HALF == 1 and load(array + ARRAY_FLAGS) & C_CONTIGUOUS != 0
    if datatype == 0 or not one_row or load(load(array + ARRAY_SHAPE)) != size or address & 3 != 0:
        return False
    item = load(datatype + TYPE.item)
    if load(dtype + DTYPE_KIND) & 0xFF != INTEGER_KIND or item not in (4, 8) or address & (item - 1) != 0:
        return False
    for q in range(size):
        at = address + item * q
        word = load(at & -8)  # a word of the array, or the aligned one around half of it
        store(into + W * q, word if item == 8 else (word >> 8 * (at & 4)) << 32 >> 32)
    return True


def sequence_length(entry, thing):
    """The length of a list or tuple; 0 for other objects."""
    kinds = load(entry + ENTRY.list_type), load(entry + ENTRY.tuple_type)
    return load(thing + SEQUENCE_LENGTH) if load(thing + OBJECT_TYPE) in kinds else 0


def sequence_items(entry, thing):
    """The address of the first item of a list or tuple."""
    is_list = load(thing + OBJECT_TYPE) == load(entry + ENTRY.list_type)
    return load(thing + LIST_ITEMS) if is_list else thing + load(entry + ENTRY.tuple_items)


def is_permanent(entry, thing):
    """Whether an object is None, or one of those that are never freed: its address then identifies it."""
    return thing == load(entry + ENTRY.none) or find_type(entry, thing) != 0


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
    if kind == load(entry + ENTRY.array_type):
        return read_array(entry, thing, find_type(entry, load(thing + ARRAY_DTYPE)))
    length = sequence_length(entry, thing)
    if length not in (2, 3):
        return 0
    items = sequence_items(entry, thing)
    return read_form(entry, load(items), load(items + W), load(items + W * (length - 1)), per_count, side)


def read_form(entry, array, count, last, per_count, side):
    """Read an array and a count, a datatype, or both; ``last`` is the last of them, and may be the count itself."""
    if load(array + OBJECT_TYPE) != load(entry + ENTRY.array_type):
        return 0
    datatype = find_type(entry, last)
    if datatype == 0 and last == count:
        datatype = find_type(entry, load(array + ARRAY_DTYPE))
    elif last == count:
        count = 0
    if read_array(entry, array, datatype) == 0:
        return 0
    item = load(datatype + TYPE.item)
    room = load(entry + ENTRY.octets) // item
    if count == 0:
        store(entry + ENTRY.octets, room * item)
        return 1
    if load(count + OBJECT_TYPE) != load(entry + ENTRY.int_type):
        return 0
    elements = call_2(load(entry + ENTRY.as_integer), count, entry + ENTRY.overflow)
    if 0 <= elements <= room // per_count:
        store(entry + ENTRY.octets, elements * item * per_count)
        return 1
    fits = 0 < elements <= SCRATCH_BYTES // (item * per_count)
    return pad_last(entry, datatype, elements * item * per_count, side) if fits else 0


def pad_last(entry, datatype, octets, side):
    """Copy a buffer that lacks only the padding of its last element to where there is room for it; 0 for others."""
    there, scratch = load(entry + ENTRY.octets), entry + ENTRY.scratch + SCRATCH_BYTES * side
    if there >= octets or octets - there > load(datatype + TYPE.padding):
        return 0
    copy(scratch, load(entry + ENTRY.address), there)
    if side == RECEIVED and load(entry + ENTRY.writable) != 0:
        store(entry + ENTRY.short, load(entry + ENTRY.address))
        store(entry + ENTRY.short_bytes, there)
    store(entry + ENTRY.address, scratch)
    store(entry + ENTRY.octets, octets)
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
    store(entry + ENTRY.address, load(array + ARRAY_DATA))
    store(entry + ENTRY.octets, octets)
    store(entry + ENTRY.element, load(datatype + TYPE.item))
    store(entry + ENTRY.token, load(datatype + TYPE.token))
    store(entry + ENTRY.writable, flags & WRITEABLE)
    return 1


def item_size(entry, dtype):
    """Bytes of the elements of a built-in or structured dtype; 0 for others."""
    known = find_type(entry, dtype)
    if known != 0:
        return load(known + TYPE.item)
    return load(dtype + load(entry + ENTRY.item_size)) & LOW_HALF if load(dtype + DTYPE_KIND) & 0xFF == VOID_KIND else 0


def hash_words(a, b, c, d):
    """A hash of four words."""
    mixed = (a * CHECK_PRIME) ^ ((b >> 4) * COUNT_CHECK) ^ ((c >> 3) * COUNT_PRIME) ^ (d >> 4)
    return mixed ^ (mixed >> 29) & CHECK_MASK


def find_type(entry, thing):
    """The address of the record of a dtype or datatype object; 0 if there is none."""
    types, mask = load(entry + ENTRY.types), load(entry + ENTRY.types_mask)
    at = hash_words(thing, 0, 0, 0) & mask
    while True:
        found = types + TYPE_BYTES * at
        known = load(found + TYPE.object)
        if known == thing and thing != 0:
            return found
        if known == 0:
            return 0
        at = (at + 1) & mask


# Rows


def find_row(entry):
    """Find the row of the call that was read: DONE, or MISS."""
    kind, op, root, algorithm = (
        load(entry + ENTRY.kind),
        load(entry + ENTRY.op),
        load(entry + ENTRY.root),
        load(entry + ENTRY.algorithm),
    )
    rows, mask, nbytes, layout = (
        load(entry + ENTRY.rows),
        load(entry + ENTRY.mask),
        load(entry + ENTRY.nbytes),
        load(entry + ENTRY.layout),
    )
    at = hash_words(kind, op, root ^ layout, algorithm) & mask
    while True:
        row = rows + ROW_BYTES * at
        if load(row + ROW.backend) == 0:
            return MISS
        if (
            load(row + ROW.kind) == kind
            and load(row + ROW.op) == op
            and load(row + ROW.root) == root
            and load(row + ROW.algorithm) == algorithm
            and load(row + ROW.least) <= nbytes <= load(row + ROW.most)
            and (load(row + ROW.layout) == layout and has_places(entry, row))
        ):
            store(entry + ENTRY.row, row)
            return DONE
        at = (at + 1) & mask


def has_places(entry, row):
    """Whether a row was made for the blocks of the call that was read."""
    words, places = load(entry + ENTRY.blocks), load(row + ROW.places)
    if places != 0:
        for k in range(4 * load(entry + ENTRY.size)):
            if load(places + W * k) != load(words + W * k):
                return False
    return True


def fingerprint_word(row, nbytes):
    """The word of the fingerprint of a call: its digest and its count."""
    count = nbytes // load(row + ROW.item) * load(row + ROW.blocks)
    digest = (load(row + ROW.template) + count * COUNT_PRIME) & DIGEST_MASK
    return digest | (count & COUNT_MASK) << COUNT_SHIFT


def aim(entry, row):
    """Write addresses, length and fingerprint into the call record."""
    call, nbytes = load(row + ROW.call), load(entry + ENTRY.nbytes)
    store(call + CALL.send, load(entry + ENTRY.send))
    store(call + CALL.recv, load(entry + ENTRY.recv))
    if load(row + ROW.last) != nbytes:
        store(row + ROW.last, nbytes)
        fingerprint, checked = fingerprint_word(row, nbytes), nbytes * load(row + ROW.checked)
        store(call + CALL.fingerprint, fingerprint)
        store(
            call + CALL.check, (fingerprint * CHECK_PRIME + load(row + ROW.salt) + checked * COUNT_CHECK) & CHECK_MASK
        )
        store(call + CALL.nbytes, nbytes * load(row + ROW.sized))
        fill_table(call, load(row + ROW.table), load(entry + ENTRY.size), nbytes)
    if load(row + ROW.registers) != 0:
        find_allocation(entry, call, nbytes)


def fill_table(call, table, size, nbytes):
    """Write the lengths and places of equal blocks behind the call record."""
    words = call + TABLE + W * size
    if table == BLOCK_TABLE:
        for q in range(size + 1):
            store(words + W * q, q * nbytes)
    if table >= ALLGATHER_TABLE:
        store(call + CALL.longest, nbytes)
        for side in range(table - 1):
            for q in range(size):
                store(words + W * (2 * side * size + q), nbytes)
                store(words + W * ((2 * side + 1) * size + q), q * nbytes)


def find_allocation(entry, call, nbytes):
    """Write which registered memory holds both vectors; 0 if none does."""
    send, recv = load(call + CALL.send), load(call + CALL.recv)
    store(call + CALL.allocation, 0)
    for k in range(load(load(entry + ENTRY.registrations))):
        found = load(entry + ENTRY.registered) + ALLOCATION_BYTES * k
        first, end = load(found + ALLOCATION.first), load(found + ALLOCATION.end)
        if first <= min(send, recv) and max(send, recv) + nbytes <= end:
            store(call + CALL.allocation, load(found + ALLOCATION.number))
            store(call + CALL.alive, load(found + ALLOCATION.alive))
            store(call + CALL.copies, load(found + ALLOCATION.copies))
            store(call + CALL.copy_stride, load(found + ALLOCATION.stride))
            store(call + CALL.send_at, send - first)
            store(call + CALL.recv_at, recv - first)
            return


def run(entry, call, kernel, releases):
    """Run a kernel; a call that waits long releases the GIL."""
    if releases == 0:
        patience = load(entry + ENTRY.state) + STATE.max_wait
        store(patience, SHORT_WAIT_NS)
        code = call_1(kernel, call)
        store(patience, load(entry + ENTRY.patience))
        if code != RETRY:
            return code
    thread = call_0(load(entry + ENTRY.save_thread))
    code = call_1(kernel, call)
    call_1(load(entry + ENTRY.restore_thread), thread)
    return code


# Calls on messages


def own_row(entry):
    """The row of this rank in the consistency table."""
    return load(entry + ENTRY.entries) + load(entry + ENTRY.row_bytes) * load(entry + ENTRY.member)


def start_messages(entry, row):
    """Enter a call on messages in the consistency table, and compare: NATIVE, DIFFER, LATE, or a wait."""
    if load(row + ROW.backend) == BY_RECORDS:
        store(
            load(row + ROW.call) + RUN.vector,
            buffer_from(entry, load(row + ROW.vector), load(load(row + ROW.call) + RUN.vector)),
        )
        store(
            load(row + ROW.call) + RUN.source,
            buffer_from(entry, load(row + ROW.source), load(load(row + ROW.call) + RUN.source)),
        )
    if load(entry + ENTRY.entries) == 0:
        return NATIVE
    fingerprint, own = fingerprint_word(row, load(entry + ENTRY.nbytes)), own_row(entry)
    number = abs(load(own + W * STATUS)) + 1
    late = is_out_of_reach(entry, row, number)
    store(own + W * (COUNTS + number % CALLS), fingerprint >> COUNT_SHIFT)
    if load(row + ROW.uneven) != 0 and not late:
        write_amounts(entry, row, number)
    store_release(own + W * (number % CALLS), number << DIGEST_BITS | (fingerprint & DIGEST_MASK))
    store_release(own + W * STATUS, number)
    if number & load(entry + ENTRY.between) == 0:
        return LATE
    if load(row + ROW.compares) == COMPARED_TOGETHER:
        code = meet(entry, number, fingerprint)
        if code != DONE:
            return code
    elif late:
        return LATE
    return NATIVE if load(row + ROW.compares) == COMPARED_AFTERWARDS else compare_entries(entry)


def meet(entry, number, fingerprint):
    """Wait a short time until all ranks of the node have entered a call: DONE, LATE, or a wait in shared memory."""
    if load(entry + ENTRY.meeting) != 0:
        store(load(entry + ENTRY.meeting) + CALL.fingerprint, fingerprint)
        code = run(entry, load(entry + ENTRY.meeting), load(entry + ENTRY.meet), 0)
        return DONE if code == DONE else BEFORE_NATIVE + code
    polls, began = 0, 0
    for k in range(load(entry + ENTRY.members)):
        there = load(entry + ENTRY.entries) + load(entry + ENTRY.row_bytes) * k + W * (number % CALLS)
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
        return load(entry + ENTRY.send)
    return load(entry + ENTRY.recv) if place == FROM_RECEIVED else own


def run_records(entry, row, arguments):
    """Run records and compare: DONE, LEAVING, or UNFINISHED, after which Python goes on with them.

    The buffers are kept until then: an exception, such as Ctrl-C, may come first, while messages are pending.
    """
    thread = call_0(load(entry + ENTRY.save_thread))
    code = call_1(load(row + ROW.kernel), load(row + ROW.call))
    call_1(load(entry + ENTRY.restore_thread), thread)
    store(entry + ENTRY.failure, 0)
    store(entry + ENTRY.left, code)
    if code != DONE:
        for k in range(2):
            store(entry + ENTRY.held_send + W * k, load(arguments + W * k))
            call_1(load(entry + ENTRY.hold), load(arguments + W * k))
        return UNFINISHED
    return DONE if leave_table(entry) == DONE else LEAVING


def is_out_of_reach(entry, row, number):
    """Whether a rank is so far behind that this one would overwrite what it has to compare.

    A call with amounts overwrites those of an older one.  Entries are many: every 32nd call looks, and so speaks for
    all up to the next that does.
    """
    even = load(row + ROW.uneven) == 0
    reach, last = (CALLS >> 1, number + 1) if even else (AMOUNT_CALLS - 1, number)
    if even and last & (reach - 1) != 0:
        return False
    for k in range(load(entry + ENTRY.members)):
        status = load_acquire(load(entry + ENTRY.entries) + load(entry + ENTRY.row_bytes) * k + W * STATUS)
        if abs(status) + reach < last:
            return True
    return False


def call_mpi(entry, row):
    """Call MPI's function and compare again: DONE, FAILED, LEAVING, or NATIVE for counts of more than 32 bits."""
    unit, arguments = load(row + ROW.unit), row + ROW.arguments
    count = load(entry + ENTRY.nbytes) // unit
    if load(row + ROW.splits) != 0:
        count = write_counts(entry, load(row + ROW.splits), unit, count)
    if count > INT_MAX:
        return NATIVE
    store(arguments + W * load(row + ROW.send_argument), load(entry + ENTRY.send))
    store(arguments + W * load(row + ROW.recv_argument), load(entry + ENTRY.recv))
    store(arguments + W * load(row + ROW.count_argument), count)
    store(arguments + W * load(row + ROW.recv_count_argument), count)
    thread = call_0(load(entry + ENTRY.save_thread))
    failure = call_9(load(row + ROW.function), arguments)
    call_1(load(entry + ENTRY.restore_thread), thread)
    store(entry + ENTRY.failure, failure)
    if failure != 0:
        return FAILED
    return DONE if leave_table(entry) == DONE else LEAVING


def write_counts(entry, splits, unit, count):
    """Write the blocks of the call as integers for MPI; returns the elements of this rank's own block.

    Where a block is too long or too far for them, the result is, too.
    """
    words, counts = load(entry + ENTRY.blocks), load(entry + ENTRY.counts)
    if splits & RECEIVED_UNEVEN and load(entry + ENTRY.receives) != 0:
        count = load(block_of(entry, RECEIVED, 0)) // unit
    elif splits & SENT_UNEVEN and load(entry + ENTRY.sends) != 0:
        count = load(block_of(entry, SENT, 0)) // unit
    for k in range(2 * load(entry + ENTRY.size)):
        low, high = load(words + 2 * W * k) // unit, load(words + 2 * W * k + W) // unit
        if max(low, high) > INT_MAX:
            count = INT_MAX + 1
        store(counts + W * k, low | high << 32)
    return count


def leave_table(entry):
    """Leave the consistency table: DONE, or DIFFER if another rank has called something else."""
    if load(entry + ENTRY.entries) == 0:
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
    for k in range(load(entry + ENTRY.members)):
        theirs = load_acquire(load(entry + ENTRY.entries) + load(entry + ENTRY.row_bytes) * k + place)
        if theirs >> DIGEST_BITS == number and (theirs != mine or amounts_differ(entry, k, number)):
            code = DIFFER
    return code


def amounts_of(entry, member, number):
    """Where the amounts of a rank's call are: its number, bytes sent to each rank, and bytes received from each."""
    place = load(entry + ENTRY.amounts_at) + W * (number % AMOUNT_CALLS) * (1 + 2 * load(entry + ENTRY.members))
    return load(entry + ENTRY.entries) + load(entry + ENTRY.row_bytes) * member + place


def write_amounts(entry, row, number):
    """Write what this rank sends to each rank of its node in a call, and what it receives from each."""
    members, amounts = load(entry + ENTRY.members), amounts_of(entry, load(entry + ENTRY.member), number)
    store(amounts, 0)
    for k in range(members):
        rank = load(load(entry + ENTRY.member_ranks) + W * k)
        store(amounts + W * (1 + k), amount(entry, row, SENT, rank))
        store(amounts + W * (1 + members + k), amount(entry, row, RECEIVED, rank))
    store_release(amounts, number)


def amount(entry, row, side, rank):
    """The bytes of the running call's block for one rank, or from it; NOT_COMPARED if there is none."""
    if load(entry + (ENTRY.sends if side == SENT else ENTRY.receives)) == 0:
        return NOT_COMPARED
    if load(row + ROW.uneven) & (SENT_UNEVEN if side == SENT else RECEIVED_UNEVEN) != 0:
        return load(load(entry + ENTRY.blocks) + W * (2 * side * load(entry + ENTRY.size) + rank))
    here = rank == load(row + ROW.root_rank) and rank != load(entry + ENTRY.rank)
    return load(entry + ENTRY.nbytes) if here else NOT_COMPARED


def amounts_differ(entry, member, number):
    """Whether a rank sends this one another amount than it receives, or the other way round."""
    if load(load(entry + ENTRY.row) + ROW.uneven) == 0:
        return False
    members, me = load(entry + ENTRY.members), load(entry + ENTRY.member)
    mine, theirs = amounts_of(entry, me, number), amounts_of(entry, member, number)
    if load_acquire(theirs) != number:
        return False
    sent, room = load(mine + W * (1 + member)), load(theirs + W * (1 + members + me))
    received, amount_there = load(mine + W * (1 + members + member)), load(theirs + W * (1 + me))
    wrong = sent != room and min(sent, room) != NOT_COMPARED
    return wrong or (received != amount_there and min(received, amount_there) != NOT_COMPARED)
