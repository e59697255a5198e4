"""Collectives of ranks that share memory: each rank copies into its own region, signals, and reads the other regions.

*p ranks, r this one, q another; k a block of this call, g the number of blocks of all earlier calls.*

Every function works on words at addresses (:mod:`hpccomm.kernels.shared_memory.memory`).  The same source runs in
Python and, with the intrinsics of :mod:`hpccomm.kernels.intrinsics` in place of those functions, compiled.
:mod:`hpccomm.kernels.shared_memory.records` declares the records.  The region of a rank holds

* two *lines* that alternate between calls: the number of the call, written last, and the arguments of the call;
* two counters, blocks *published* and blocks *finished*, which only grow and which only their owner writes;
* two small *buffers* that alternate between calls, and a ring of four *slots* that continues across calls.  A call
  whose blocks fill only part of a slot uses another part on each visit to the slot: a rank then writes where no other
  rank has just read, and no cache line has to be fetched back from another core first.

A call begins with a barrier: every rank writes its line and waits for the lines of all others, or where there are many
for those of its neighbours in a tree, along which small data goes too (:func:`meet_in_tree`).  Passing the barrier of
call n+1 proves that every rank has left call n, so lines and buffers of call n may be written again in call n+2.  When
a rank leaves a call, the others still read at most the last three blocks.  The fourth slot is therefore free for the
first block of the next call, which is published before the barrier; each collective below gives its reason.
"""

from __future__ import annotations

from hpccomm.kernels.shared_memory.memory import (
    copy,
    copy_nontemporal,
    fetch,
    fold,
    load,
    load_acquire,
    nanoseconds,
    pause,
    pull,
    push,
    sleep,
    store,
    store_release,
    wake,
    yield_cpu,
)
from hpccomm.kernels.shared_memory.records import (
    BUFFER,
    CALL_RECORD,
    LINE_BYTES,
    LINE_RECORD,
    PAYLOAD_BYTES,
    REGION_RECORD,
    RING,
    SAMPLES,
    STATE_RECORD,
    TUNING_RECORD,
    W,
    offsets,
)

REGION, LINE, STATE = map(offsets, (REGION_RECORD, LINE_RECORD, STATE_RECORD))
CALL, TUNING = map(offsets, (CALL_RECORD, TUNING_RECORD))
SLOTS, TABLE = REGION_RECORD.itemsize, CALL_RECORD.itemsize
"""Where the slots of a region begin, and the table of a call."""

COLLECTIVES = ("allreduce", "reduce", "reduce_scatter", "allgather", "bcast", "alltoall", "barrier")
INLINE, DIRECT, PIPELINE, BUFFERED, SINGLE_COPY, IN_TREE = range(6)
"""The protocol of a vector: in the line; in the buffer, or in place if registered; in blocks; always in the buffer;
single-copy (CMA); along the tree."""
NOTHING, BLOCKS_TO_ALL, SUM_TO_ALL, SUM_TO_ROOT, SUM_IN_BLOCKS, VECTOR_OF_ROOT = range(6)
"""What a barrier carries along the tree."""
DIFFERENT = -1
"""The check of a packet if ranks make different calls; others are not negative."""
OWN_BLOCKS, RECEIVED_BLOCKS = 1, 3
"""Rows of a call's table, of one word a rank: the first of every collective; those of what an all-to-all receives."""
DONE, RETRY, MISMATCH, STUCK, SHUT = 0, 1, 2, 3, 4
"""Return codes of a call.  RETRY: a rank has not arrived yet, call again."""

MAX_WAIT_NS = 50_000_000
"""Default and longest time in nanoseconds after which a wait for a missing rank returns to Python."""
FOREVER = 1 << 62
YIELDS, AWAKE_NS, CROWDED_AWAKE_NS = 8, 3_000_000, 50_000
"""A rank yields its core at least so often, and for so long, before it sleeps; the last where ranks share cores.

To wake a sleeper takes tens of microseconds: a loop in which one rank is 100 µs late took 24 µs more a call than with
native MPI when ranks slept after 50 µs, and no more when they slept after 1 ms (measured)."""
SHORTEST_SLEEP_NS, LONGEST_SLEEP_NS = 1_000_000, 5_000_000
"""A sleep ends after a quarter of the time waited so far, within these limits, even if no rank ends it; for a rank that
is late, after the longest."""
ALIGNMENT = 64
"""Slices begin at multiples of this, so that two ranks never write one cache line."""
SHORT_TRIAL, LONG_TRIAL = 12, 4 * SAMPLES
"""Calls of a trial.  A long one ends like a short one where the ways differ by half."""
MAX_SINGLE_COPY = 1 << 30
"""Most bytes of one single-copy system call (Linux allows a little less than 2 GiB)."""
CACHE_BLOCK = 16384
"""Bytes reduced at a time: the result is still in the first-level cache when it is copied to its next place."""


def region(state, q):
    return load(state + STATE.memory) + q * load(state + STATE.region)


def line_of(state, q):
    return region(state, q) + LINE_BYTES * (load(state + STATE.calls) & 1)


def buffer_of(state, q):
    return region(state, q) + REGION.buffers + BUFFER * (load(state + STATE.calls) & 1)


def slot_of(state, q, block):
    size, part = load(state + STATE.slot), load(state + STATE.slot_stride)
    return region(state, q) + SLOTS + size * (block & (RING - 1)) + (part * (block // RING) & (size - 1))


def slice_start(nbytes, p, q):
    """First byte of slice q of p."""
    return min(nbytes, q * (((nbytes + p - 1) // p + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT))


# Waiting


def begin(call, state):
    """Number a new call: DONE; RETRY if it has begun before, and waits for ranks; SHUT or STUCK if it may not begin.

    Data that the others read at the barrier is written between this and :func:`arrive`.
    """
    if load(call + CALL.waiting) != 0:
        return RETRY
    if load(state + STATE.closed) != 0:
        return SHUT
    if load_acquire(load(state + STATE.memory) + REGION.abandoned) != 0:
        return STUCK
    store(state + STATE.calls, load(state + STATE.calls) + 1)
    store(state + STATE.slot_stride, load(call + CALL.slot_stride))
    mine = line_of(state, load(state + STATE.rank))
    store(mine + LINE.check, load(call + CALL.check))
    if load(mine + LINE.fingerprint) != load(call + CALL.fingerprint):
        store(mine + LINE.fingerprint, load(call + CALL.fingerprint))
    row = load(call + CALL.tuning)
    if row != 0:
        begin_probe(row, mine, state)
    else:
        store(state + STATE.nontemporal_fill, 0)
        store(state + STATE.probe, 0)
    return DONE


def arrive(state):
    """Write the number of the call into the line, after everything else."""
    announce(state, line_of(state, load(state + STATE.rank)), load(state + STATE.calls))


def announce(state, flag, value):
    """Set a flag of this rank, and wake the ranks that sleep until it does so.

    The count of wakes changes before they are woken: a rank that read it before, and does not sleep yet, will not fall
    asleep, because the kernel compares.  The word of sleepers is cleared before that.  A rank whose word is cleared has
    thus read the old count, or reads the new one and then writes the word again.
    """
    store_release(flag, value)
    mine = region(state, load(state + STATE.rank))
    if load_acquire(mine + REGION.sleepers) != 0:
        store(mine + REGION.sleepers, 0)
        store_release(mine + REGION.wakes, load(mine + REGION.wakes) + 1)
        wake(mine + REGION.wakes)


def await_barrier(call, state, begun):
    """Wait until every rank is in this call, then compare: no rank continues unless all ranks make the same call.

    ``begun`` is the answer of :func:`begin`.
    """
    if begun not in (DONE, RETRY):
        return begun
    if load(state + STATE.probe) != 0 and load(call + CALL.waiting) == 0:
        store(state + STATE.elapsed, nanoseconds() - load(state + STATE.clock))
    since = load(call + CALL.waiting)
    late = since != 0 and nanoseconds() - since > load(state + STATE.awake)
    in_tree = load(state + STATE.tree) != 0
    code = meet_in_tree(call, state, since, late) if in_tree else meet_all(call, state, since, late)
    if code in (RETRY, STUCK):
        store(call + CALL.waiting, nanoseconds() if since == 0 else since)
        return code
    store(call + CALL.waiting, 0)
    if code == MISMATCH:
        store(state + STATE.blocks, load(state + STATE.blocks) + 1)
        return MISMATCH
    if load(call + CALL.tuning) != 0:
        decide(load(call + CALL.tuning), state)
    if load(state + STATE.probe) != 0:
        store(state + STATE.clock, nanoseconds())
    return DONE


def meet_all(call, state, since, late):
    """Wait for the line of every rank, and compare it."""
    p, r, number = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.calls)
    for i in range(1, p):
        q = (r + i) % p
        code = await_flag(state, q, line_of(state, q), number, patience(state, since), late)
        if code != DONE:
            return code
    mine = load(call + CALL.check)
    for q in range(p):
        if load(line_of(state, q) + LINE.check) != mine:
            return MISMATCH
    return DONE


def meet_in_tree(call, state, since, late):
    """Wait for the ranks below this one, tell the rank above, wait for its answer, and pass it on.

    A rank reads the packets of its children and its parent, whatever the number of ranks, and with them the data of a
    small call: blocks go up, the root of the tree joins them or adds them up in rank order, and its answer comes down.
    The root of a reduce reads the answer from the tree's root, which reads the vector of the root of a broadcast.  A
    packet is written again only in the next call, which no rank reaches before all of its children, and that root,
    have read this one; for the buffers of both directions that holds as well.
    """
    number, check, above = load(state + STATE.calls), load(call + CALL.check), load(state + STATE.parent)
    mine = region(state, load(state + STATE.rank))
    if load(mine + REGION.gathered) != number:
        code = gather_in_tree(call, state, since, late)
        if code != DONE:
            return code
        announce(state, mine + REGION.gathered, number)
    packet = mine + REGION.gathered
    if above >= 0:
        packet = region(state, above) + REGION.released
        code = await_flag(state, above, packet, number, patience(state, since), late)
        if code != DONE:
            return code
    answer = load(packet + LINE.check)
    carries = load(call + CALL.carries) if answer == check else NOTHING
    if carries != NOTHING:
        pass_on(call, state, carries)
    if load(state + STATE.child_count) != 0:
        store(mine + REGION.released + LINE.check, answer)
        announce(state, mine + REGION.released, number)
    if carries != NOTHING:
        take_answer(call, state, carries)
    return DONE if answer == check else MISMATCH


def gather_in_tree(call, state, since, late):
    """Wait for the ranks below this one, and put their blocks behind the own one, in the packet or in the buffer."""
    r, number, check = load(state + STATE.rank), load(state + STATE.calls), load(call + CALL.check)
    place, carries, answer, to = load(state + STATE.first), load(call + CALL.carries), check, 0
    upwards = carries not in (NOTHING, VECTOR_OF_ROOT)
    if upwards:
        own = bytes_between(call, state, place, place + 1)
        nbytes = bytes_between(call, state, place, load(state + STATE.end))
        to = data_of(state, r, region(state, r) + REGION.gathered, nbytes)
        copy(to, load(call + CALL.send), own)
        to += own
    place += 1
    for i in range(load(state + STATE.child_count)):
        q, end = load(load(state + STATE.child) + 2 * W * i), load(load(state + STATE.child) + 2 * W * i + W)
        packet = region(state, q) + REGION.gathered
        code = await_flag(state, q, packet, number, patience(state, since), late)
        if code != DONE:
            return code
        if load(packet + LINE.check) != check:
            answer = DIFFERENT
        elif upwards:
            nbytes = bytes_between(call, state, place, end)
            fetch(to, data_of(state, q, packet, nbytes), nbytes)
            to += nbytes
        place = end
    store(region(state, r) + REGION.gathered + LINE.check, answer)
    return DONE


def data_of(state, q, packet, nbytes):
    """Where the data of a packet of rank q is: in the packet if it fits, else in the buffer."""
    return packet + LINE.payload if nbytes <= PAYLOAD_BYTES else buffer_of(state, q)


def bytes_between(call, state, first, end):
    """The bytes of the blocks of the ranks from one place of the tree to another."""
    if load(call + CALL.carries) != BLOCKS_TO_ALL:
        return (end - first) * load(call + CALL.nbytes)
    total = 0
    for k in range(first, end):
        total += block_bytes(call, state, load(load(state + STATE.order) + W * k))
    return total


def answer_bytes(call, state, carries):
    """The bytes that come down the tree."""
    if carries == BLOCKS_TO_ALL:
        return bytes_between(call, state, 0, load(state + STATE.ranks))
    return load(call + CALL.nbytes)


def pass_on(call, state, carries):
    """Put the answer to where the children of this rank read it."""
    r, above, nbytes = load(state + STATE.rank), load(state + STATE.parent), answer_bytes(call, state, carries)
    to = data_of(state, r, region(state, r) + REGION.released, nbytes)
    if above < 0:
        answer_in_tree(call, state, carries, to, nbytes)
    elif load(state + STATE.child_count) != 0 and carries != SUM_TO_ROOT:
        fetch(to, data_of(state, above, region(state, above) + REGION.released, nbytes), nbytes)


def answer_in_tree(call, state, carries, to, nbytes):
    """At the root of the tree: make the answer of what has come up."""
    p, table, root = load(state + STATE.ranks), call + TABLE, load(call + CALL.root)
    if carries == VECTOR_OF_ROOT:
        fetch(to, data_of(state, root, line_of(state, root), nbytes), nbytes)
        return
    whole = bytes_between(call, state, 0, p)
    blocks = data_of(state, load(state + STATE.rank), region(state, load(state + STATE.rank)) + REGION.gathered, whole)
    if carries == BLOCKS_TO_ALL:
        copy(to, blocks, nbytes)
        return
    for k in range(p):
        store(table + W * load(load(state + STATE.order) + W * k), blocks + k * nbytes)
    fold(load(call + CALL.fold), table, p, 0, to, nbytes // load(call + CALL.item))


def take_answer(call, state, carries):
    """Copy the answer to the receive buffer, if this rank receives one."""
    r, q, nbytes = load(state + STATE.rank), load(state + STATE.rank), answer_bytes(call, state, carries)
    if carries == SUM_TO_ROOT:
        q = load(load(state + STATE.order))
    elif load(state + STATE.child_count) == 0:
        q = load(state + STATE.parent)
    source = data_of(state, q, region(state, q) + REGION.released, nbytes)
    if carries == BLOCKS_TO_ALL:
        for k in range(load(state + STATE.ranks)):
            q = load(load(state + STATE.order) + W * k)
            fetch(load(call + CALL.recv) + displacement(call, state, q), source, block_bytes(call, state, q))
            source += block_bytes(call, state, q)
    elif carries == SUM_IN_BLOCKS:
        lo, hi = block_start(call, state, r), block_start(call, state, r + 1)
        fetch(load(call + CALL.recv), source + lo, hi - lo)
    elif carries == VECTOR_OF_ROOT and r != load(call + CALL.root):
        fetch(load(call + CALL.send), source, nbytes)
    elif carries == SUM_TO_ALL or (carries == SUM_TO_ROOT and r == load(call + CALL.root)):
        fetch(load(call + CALL.recv), source, nbytes)


def patience(state, since):
    """Nanoseconds after which a wait returns to Python: an eighth of the time it has lasted, within limits."""
    least = load(state + STATE.max_wait)
    if since == 0:
        return least
    return min(max(least, (nanoseconds() - since) >> 3), max(least, min(10 * least, MAX_WAIT_NS)))


def await_flag(state, q, flag, count, limit, late):
    """Wait until a flag of rank q reaches ``count``; RETRY after ``limit`` nanoseconds, STUCK if a rank gave up.

    ``late``: this call has returned to Python before, not just now; the wait then neither polls nor yields.
    """
    spin, polls = load(state + STATE.spin), 0
    while polls < spin and not late:
        if load_acquire(flag) >= count:
            if polls > 0:
                store(state + STATE.spin, min(load(state + STATE.spin_limit), spin + (spin >> 3) + 1))
            return DONE
        polls += 1
        pause()
    if load_acquire(flag) >= count:
        return DONE
    if not late:  # spinning did not end the wait, which means that ranks share cores: spin less
        store(state + STATE.spin, max(load(state + STATE.spin_least), spin >> 1))
    return sleep_until(state, q, flag, count, limit, late)


def sleep_until(state, q, flag, count, limit, late):
    """Wait for a rank that is late: yield the core some times, then sleep until rank q signals.

    Rank q writes the flag and then reads the word of sleepers, this one writes that word and then reads the flag.  Each
    write may still be in a store buffer when the read is done, on x86 and on ARM.  A fence between the two would cost
    rank q 20 ns in every call (measured).  Instead this rank, which is about to sleep anyway, gives both buffers time
    to drain.  A wake that is lost nevertheless delays a call until the sleep ends by itself.
    """
    abandoned, them = load(state + STATE.memory) + REGION.abandoned, region(state, q)
    began, waited, yields = nanoseconds(), 0, 0
    while load_acquire(flag) < count:
        if load_acquire(abandoned) != 0:
            return STUCK
        if waited > limit:
            return RETRY
        if not late and (yields < YIELDS or waited < load(state + STATE.awake)):
            yields += 1
            yield_cpu()
        else:
            wakes = load_acquire(them + REGION.wakes)
            store_release(them + REGION.sleepers, 1)
            yield_cpu()
            if load_acquire(flag) < count:
                shortest = LONGEST_SLEEP_NS if late else SHORTEST_SLEEP_NS
                longest = min(LONGEST_SLEEP_NS, max(shortest, waited >> 2))
                sleep(them + REGION.wakes, wakes, min(longest, max(1, limit - waited)))
        waited = nanoseconds() - began
    return DONE


def await_count(state, q, counter, count):
    """Wait until a counter of a rank that is in this call reaches ``count``; false if the call was abandoned."""
    return await_flag(state, q, region(state, q) + counter, count, FOREVER, False) == DONE


def await_all(state, counter, count):
    """Wait until a counter of all other ranks reaches ``count``."""
    p, r, reached = load(state + STATE.ranks), load(state + STATE.rank), True
    for i in range(1, p):
        reached = reached and await_count(state, (r + i) % p, counter, count)
    return reached


def signal(state, counter, count):
    """Set a counter of this rank."""
    announce(state, region(state, load(state + STATE.rank)) + counter, count)


# Autotuning of how slots are filled


def fill(state, slot, source, nbytes):
    """Copy into a slot of this rank, with ordinary or non-temporal stores.

    Which is faster depends on the placement of the cores: either way wins by up to a factor of five, on one virtual
    machine within minutes (measured).  So the calls probe it.
    """
    if load(state + STATE.nontemporal_fill) != 0:
        copy_nontemporal(slot, source, nbytes)
    else:
        fetch(slot, source, nbytes)


def begin_probe(row, mine, state):
    """Choose how this call fills slots: both ways in turn during a trial, else the way chosen; publish middle times.

    Which way is better depends on where the cores lie, so until its own trial a class does as the last one of another.
    """
    trial, last = load(row + TUNING.count), load(row + TUNING.trial)
    store(row + TUNING.count, trial + 1 if trial + 1 < load(row + TUNING.period) else 0)
    if load(row + TUNING.long) != 0 and load(row + TUNING.decisions) == 0:
        store(row + TUNING.choice, load(state + STATE.way))
    if is_over(trial, last):
        rounds = trial >> 2
        store(mine + LINE.time_cached, middle(row + TUNING.samples, rounds))
        store(mine + LINE.time_nontemporal, middle(row + TUNING.samples + W * SAMPLES, rounds))
    if trial < last:
        store(state + STATE.probe, 1 + trial)
        store(state + STATE.nontemporal_fill, way_of(trial))
        store(state + STATE.clock, nanoseconds())
    else:
        store(state + STATE.probe, 0)
        store(state + STATE.nontemporal_fill, load(row + TUNING.choice))


def way_of(trial):
    """How call ``trial`` of a trial fills slots: c c n n n n c c c c n n …

    The first call of a pair finds the caches as the other way has left them, and does not count.
    """
    return ((trial + 2) >> 2) & 1


def is_over(trial, last):
    """Whether a trial may end with this call."""
    return trial in (SHORT_TRIAL, last)


def middle(times, n):
    """The median of n words, or of n - 1 if n is even; n is at most SAMPLES."""
    for i in range(n):
        rank = 0
        for j in range(n):
            a, b = load(times + W * j), load(times + W * i)
            if a < b or (a == b and j < i):
                rank += 1
        if rank == (n - 1) >> 1:
            return load(times + W * i)
    return 0


def decide(row, state):
    """At the end of a trial, take the way that is clearly faster for the slowest rank, else keep the one in use.

    All ranks read the same times in the same call, so they decide alike.
    """
    last, choice = load(row + TUNING.trial), load(row + TUNING.choice)
    # the call that runs has been counted already
    trial = load(row + TUNING.count) - 1
    if not is_over(trial, last):
        return
    cached, nontemporal = 0, 0
    for q in range(load(state + STATE.ranks)):
        cached = max(cached, load(line_of(state, q) + LINE.time_cached))
        nontemporal = max(nontemporal, load(line_of(state, q) + LINE.time_nontemporal))
    short, long = min(cached, nontemporal), max(cached, nontemporal)
    if trial < last and 2 * long < 3 * short:
        return
    better = 1 if nontemporal < cached else 0
    changes = 1 if better != choice and 10 * long > 11 * short else 0
    store(row + TUNING.time_cached, cached)
    store(row + TUNING.time_nontemporal, nontemporal)
    store(row + TUNING.decisions, load(row + TUNING.decisions) + 1)
    store(row + TUNING.changes, load(row + TUNING.changes) + changes)
    choice = better if changes != 0 else choice
    store(row + TUNING.choice, choice)
    if load(row + TUNING.long) != 0:
        store(state + STATE.way, choice)
    later = min(load(row + TUNING.longest), 2 * load(row + TUNING.period))
    store(row + TUNING.period, load(row + TUNING.shortest) if changes != 0 else later)
    store(row + TUNING.count, last + 1)


def end_probe(call, state):
    """Keep the time of every second call of a trial; waiting for late ranks does not count."""
    trial = load(state + STATE.probe) - 1
    if trial < 0 or trial & 1 == 0:
        return
    spent = load(state + STATE.elapsed) + nanoseconds() - load(state + STATE.clock)
    store(load(call + CALL.tuning) + TUNING.samples + W * (SAMPLES * way_of(trial) + (trial >> 2)), spent)


def finish(call, state, blocks):
    """Add the blocks of this call to the total."""
    store(state + STATE.blocks, load(state + STATE.blocks) + max(1, blocks))
    end_probe(call, state)


# Allreduce


def allreduce(call):
    """Reduce on all ranks: in the lines, from the buffers, in a pipeline of blocks, or in registered arrays."""
    state = load(call + CALL.state)
    code = begin(call, state)
    if code == DONE:
        publish(call, state)
        arrive(state)
    code = await_barrier(call, state, code)
    if code != DONE:
        return code
    protocol = load(call + CALL.protocol)
    if protocol in (INLINE, BUFFERED):
        return fold_lines(call, state) if protocol == INLINE else fold_buffers(call, state)
    # one more case of the protocol would cost the others a comparison
    return DONE if load(call + CALL.carries) != NOTHING else allreduce_in_slots(call, state, protocol)


def allreduce_in_slots(call, state, protocol):
    """Reduce a vector that may be registered."""
    registered = registration(state)
    if registered > 0:
        return allreduce_registered(call, state)
    if protocol == DIRECT and registered == 0:
        return fold_buffers(call, state)
    mine = load(line_of(state, load(state + STATE.rank)) + LINE.array)
    return allreduce_pipelined(call, state, protocol == PIPELINE and mine == 0)


def publish(call, state):
    """Copy the vector or its first block to where the others read it; a registered array stays in place."""
    r, protocol = load(state + STATE.rank), load(call + CALL.protocol)
    send, nbytes = load(call + CALL.send), load(call + CALL.nbytes)
    mine = line_of(state, r)
    if protocol == INLINE:
        copy(mine + LINE.payload, send, nbytes)
        return
    if protocol == BUFFERED:
        fill(state, buffer_of(state, r), send, nbytes)
        return
    allocation = 0
    if load(call + CALL.allocation) != 0:
        allocation = load(call + CALL.allocation) * load(load(call + CALL.alive))
    store(mine + LINE.array, allocation)
    store(mine + LINE.send_at, load(call + CALL.send_at))
    store(mine + LINE.recv_at, load(call + CALL.recv_at))
    if allocation != 0:
        return
    if protocol == DIRECT:
        fill(state, buffer_of(state, r), send, nbytes)
    elif protocol == PIPELINE:
        publish_rest(call, state, 0)


def registration(state):
    """1: all ranks passed arrays of one allocation; 0: no rank passed a registered array; -1: neither."""
    p, first = load(state + STATE.ranks), load(line_of(state, 0) + LINE.array)
    for q in range(1, p):
        if load(line_of(state, q) + LINE.array) != first:
            return -1
    return 1 if first != 0 else 0


def fold_whole(call, table, p):
    """Reduce whole vectors, whose addresses are in a table."""
    n = load(call + CALL.nbytes) // load(call + CALL.item)
    fold(load(call + CALL.fold), table, p, 0, load(call + CALL.recv), n)


def fold_lines(call, state):
    """Reduce the payloads of the lines."""
    p, table = load(state + STATE.ranks), call + TABLE
    for q in range(p):
        store(table + W * q, line_of(state, q) + LINE.payload)
    fold_whole(call, table, p)
    return DONE


def fold_buffers(call, state):
    """Reduce the buffers."""
    p, table = load(state + STATE.ranks), call + TABLE
    for q in range(p):
        store(table + W * q, buffer_of(state, q))
    store(table + W * load(state + STATE.rank), load(call + CALL.send))
    fold_whole(call, table, p)
    end_probe(call, state)
    return DONE


def allreduce_pipelined(call, state, first_is_out):
    """Copy block k in, reduce this rank's slice of block k-1, copy block k-2 out.

    Copying out comes first: a rank that publishes block k has left block k-2, and the counters it waited for prove that
    all others have left block k-3.
    """
    nbytes, block, g = load(call + CALL.nbytes), load(call + CALL.block), load(state + STATE.blocks)
    blocks = (nbytes + block - 1) // block
    for k in range(blocks + 2):
        if k >= 2:
            if not await_all(state, REGION.finished, g + k - 1):
                return STUCK
            copy_out(call, state, k - 2)
        if k < blocks and (k > 0 or not first_is_out):
            publish_rest(call, state, k)
        if 1 <= k <= blocks:
            if not await_all(state, REGION.published, g + k):
                return STUCK
            fold_slice(call, state, k - 1)
    finish(call, state, blocks)
    return DONE


def publish_rest(call, state, k):
    """Publish block k without the slice of this rank, which no other rank reads."""
    r, g, block = load(state + STATE.rank), load(state + STATE.blocks), load(call + CALL.block)
    n = min(block, load(call + CALL.nbytes) - k * block)
    lo, hi = slice_start(n, load(state + STATE.ranks), r), slice_start(n, load(state + STATE.ranks), r + 1)
    source, slot = load(call + CALL.send) + k * block, slot_of(state, r, g + k)
    fill(state, slot, source, lo)
    fill(state, slot + hi, source + hi, n - hi)
    signal(state, REGION.published, g + k + 1)


def fold_slice(call, state, k):
    """Reduce the slice of this rank of block k, and copy it into the slot for the others."""
    p, r, g = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.blocks)
    block, item, table = load(call + CALL.block), load(call + CALL.item), call + TABLE
    n = min(block, load(call + CALL.nbytes) - k * block)
    for q in range(p):
        store(table + W * q, slot_of(state, q, g + k))
    store(table + W * r, load(call + CALL.send) + k * block)
    hi, slot = slice_start(n, p, r + 1), slot_of(state, r, g + k)
    for lo in range(slice_start(n, p, r), hi, CACHE_BLOCK):
        size, out = min(CACHE_BLOCK, hi - lo), load(call + CALL.recv) + k * block + lo
        fold(load(call + CALL.fold), table, p, lo // item, out, size // item)
        fill(state, slot + lo, out, size)
    signal(state, REGION.finished, g + k + 1)


def copy_out(call, state, k):
    """Copy the slices that the other ranks reduced of block k."""
    p, r, g = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.blocks)
    block = load(call + CALL.block)
    n = min(block, load(call + CALL.nbytes) - k * block)
    for i in range(1, p):
        q = (r + i) % p
        lo, hi = slice_start(n, p, q), slice_start(n, p, q + 1)
        if load(call + CALL.nontemporal_out) != 0:
            copy_nontemporal(load(call + CALL.recv) + k * block + lo, slot_of(state, q, g + k) + lo, hi - lo)
        else:
            fetch(load(call + CALL.recv) + k * block + lo, slot_of(state, q, g + k) + lo, hi - lo)


def allreduce_registered(call, state):
    """Reduce the slice of this rank from all arrays and write it into all arrays, or once if they share a result."""
    p, r, g = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.blocks)
    copies, stride, table = load(call + CALL.copies), load(call + CALL.copy_stride), call + TABLE
    nbytes, item, recv = load(call + CALL.nbytes), load(call + CALL.item), load(call + CALL.recv)
    for q in range(p):
        store(table + W * q, copies + q * stride + load(line_of(state, q) + LINE.send_at))
    hi = slice_start(nbytes, p, r + 1)
    for lo in range(slice_start(nbytes, p, r), hi, CACHE_BLOCK):
        size = min(CACHE_BLOCK, hi - lo)
        fold(load(call + CALL.fold), table, p, lo // item, recv + lo, size // item)
        for i in range(1, p if load(call + CALL.once) == 0 else 1):
            q = (r + i) % p
            copy(copies + q * stride + load(line_of(state, q) + LINE.recv_at) + lo, recv + lo, size)
    signal(state, REGION.finished, g + 1)
    if not await_all(state, REGION.finished, g + 1):
        return STUCK
    store(state + STATE.blocks, g + 1)
    return DONE


# Reduce


def reduce(call):
    """Reduce to one rank."""
    state = load(call + CALL.state)
    code = begin(call, state)
    if code == DONE:
        if load(call + CALL.protocol) != PIPELINE:
            publish(call, state)
        elif load(call + CALL.root) != load(state + STATE.rank):
            publish_block(call, state, 0)
        arrive(state)
    code = await_barrier(call, state, code)
    if code != DONE:
        return code
    root = load(call + CALL.root) == load(state + STATE.rank)
    if load(call + CALL.protocol) == PIPELINE:
        return fold_blocks(call, state) if root else publish_blocks(call, state)
    if not root:
        end_probe(call, state)
        return DONE
    if load(call + CALL.protocol) == INLINE:
        return fold_lines(call, state)
    return DONE if load(call + CALL.carries) != NOTHING else fold_buffers(call, state)


def publish_blocks(call, state):
    """Publish block k when the root has finished block k-3."""
    nbytes, block, g = load(call + CALL.nbytes), load(call + CALL.block), load(state + STATE.blocks)
    blocks, root = (nbytes + block - 1) // block, load(call + CALL.root)
    for k in range(1, blocks):
        if k >= RING - 1 and not await_count(state, root, REGION.finished, g + k - 2):
            return STUCK
        publish_block(call, state, k)
    finish(call, state, blocks)
    return DONE


def fold_blocks(call, state):
    """Only the root reduces: slices reduced by the others would have to be written to slots and read once more."""
    p, r, g = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.blocks)
    nbytes, block, item, table = load(call + CALL.nbytes), load(call + CALL.block), load(call + CALL.item), call + TABLE
    blocks = (nbytes + block - 1) // block
    for k in range(blocks):
        if not await_all(state, REGION.published, g + k + 1):
            return STUCK
        for q in range(p):
            store(table + W * q, slot_of(state, q, g + k))
        store(table + W * r, load(call + CALL.send) + k * block)
        n = min(block, nbytes - k * block)
        fold(load(call + CALL.fold), table, p, 0, load(call + CALL.recv) + k * block, n // item)
        signal(state, REGION.finished, g + k + 1)
    finish(call, state, blocks)
    return DONE


# Reduce-scatter; the table continues with the first byte of each rank's block, p+1 words


def reduce_scatter(call):
    """Reduce, and give each rank its block."""
    state, protocol = load(call + CALL.state), load(call + CALL.protocol)
    code = begin(call, state)
    if code == DONE:
        if protocol == DIRECT:
            fill(state, buffer_of(state, load(state + STATE.rank)), load(call + CALL.send), load(call + CALL.nbytes))
        elif protocol == PIPELINE:
            publish_scatter(call, state, 0)
        arrive(state)
    code = await_barrier(call, state, code)
    if code != DONE:
        return code
    if protocol == IN_TREE:
        return DONE
    return fold_own_block(call, state) if protocol == DIRECT else reduce_scatter_pipelined(call, state)


def block_start(call, state, q):
    """First byte of the block of rank q."""
    return table_word(call, state, OWN_BLOCKS, q)


def fold_own_block(call, state):
    """Reduce the block of this rank from the buffers."""
    p, r, table, item = load(state + STATE.ranks), load(state + STATE.rank), call + TABLE, load(call + CALL.item)
    for q in range(p):
        store(table + W * q, buffer_of(state, q))
    store(table + W * r, load(call + CALL.send))
    lo, hi = block_start(call, state, r), block_start(call, state, r + 1)
    fold(load(call + CALL.fold), table, p, lo // item, load(call + CALL.recv), (hi - lo) // item)
    end_probe(call, state)
    return DONE


def publish_scatter(call, state, k):
    """Publish segment k of every other rank's block, side by side."""
    p, r, g = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.blocks)
    size = load(call + CALL.block)
    slot, send = slot_of(state, r, g + k), load(call + CALL.send)
    for i in range(1, p):
        q = (r + i) % p
        lo, hi = block_start(call, state, q) + k * size, block_start(call, state, q + 1)
        if lo < hi:
            fill(state, slot + q * size, send + lo, min(size, hi - lo))
    signal(state, REGION.published, g + k + 1)


def reduce_scatter_pipelined(call, state):
    """Publish segment k, reduce segment k-1.

    Once all ranks have published segment k-2, all of them have reduced segment k-4.
    """
    p, r, g = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.blocks)
    size = load(call + CALL.block)
    item, table, blocks = load(call + CALL.item), call + TABLE, 0
    for q in range(p):
        blocks = max(blocks, (block_start(call, state, q + 1) - block_start(call, state, q) + size - 1) // size)
    for k in range(blocks + 1):
        if 0 < k < blocks:
            publish_scatter(call, state, k)
        if k == 0:
            continue
        if not await_all(state, REGION.published, g + k):
            return STUCK
        lo, hi = block_start(call, state, r) + (k - 1) * size, block_start(call, state, r + 1)
        for q in range(p):
            store(table + W * q, slot_of(state, q, g + k - 1) + r * size)
        store(table + W * r, load(call + CALL.send) + lo)
        if lo < hi:
            to = load(call + CALL.recv) + (k - 1) * size
            fold(load(call + CALL.fold), table, p, 0, to, min(size, hi - lo) // item)
    finish(call, state, blocks)
    return DONE


# Allgather; the table continues with the bytes of each rank and their displacements, 2p words


def allgather(call):
    """Give the block of every rank to all ranks."""
    state = load(call + CALL.state)
    r, protocol = load(state + STATE.rank), load(call + CALL.protocol)
    code = begin(call, state)
    if code == DONE:
        if protocol == DIRECT:
            fill(state, buffer_of(state, r), load(call + CALL.send), block_bytes(call, state, r))
        elif protocol == PIPELINE:
            publish_segment(call, state, 0)
        store(line_of(state, r) + LINE.send_at, load(call + CALL.send))
        arrive(state)
    code = await_barrier(call, state, code)
    if code != DONE:
        return code
    if protocol == IN_TREE:
        return DONE
    if protocol == SINGLE_COPY:
        return allgather_single_copy(call, state)
    copy_own(load(call + CALL.recv) + displacement(call, state, r), load(call + CALL.send), block_bytes(call, state, r))
    if protocol == PIPELINE:
        return allgather_pipelined(call, state)
    for i in range(1, load(state + STATE.ranks)):
        q = (r + i) % load(state + STATE.ranks)
        fetch(load(call + CALL.recv) + displacement(call, state, q), buffer_of(state, q), block_bytes(call, state, q))
    end_probe(call, state)
    return DONE


def block_bytes(call, state, q):
    """Bytes of the block of rank q."""
    return table_word(call, state, OWN_BLOCKS, q)


def displacement(call, state, q):
    """Where the block of rank q belongs in the receive buffer."""
    return table_word(call, state, OWN_BLOCKS + 1, q)


def copy_own(to, source, nbytes):
    """Copy the block that stays on this rank; an in-place call needs no copy."""
    if to != source:
        copy(to, source, nbytes)


def publish_segment(call, state, k):
    """Publish segment k of the block of this rank."""
    r, g, size = load(state + STATE.rank), load(state + STATE.blocks), load(call + CALL.block)
    n = block_bytes(call, state, r) - k * size
    if n > 0:
        fill(state, slot_of(state, r, g + k), load(call + CALL.send) + k * size, min(size, n))
    signal(state, REGION.published, g + k + 1)


def allgather_pipelined(call, state):
    """Copy the block of every rank through the slots."""
    blocks, size = 0, load(call + CALL.block)
    for q in range(load(state + STATE.ranks)):
        blocks = max(blocks, (block_bytes(call, state, q) + size - 1) // size)
    return copy_pipelined(call, state, blocks, OWN_BLOCKS)


def copy_pipelined(call, state, blocks, row):
    """Publish segment k, copy segment k-1 that each rank has for this one; slots are safe as in reduce-scatter.

    ``row`` of the table has the lengths of what the ranks have, the row after it where that belongs.
    """
    p, r, g = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.blocks)
    size = load(call + CALL.block)
    part = r * size if row == RECEIVED_BLOCKS else 0
    for k in range(blocks + 1):
        if 0 < k < blocks and row == RECEIVED_BLOCKS:
            publish_messages(call, state, k)
        elif 0 < k < blocks:
            publish_segment(call, state, k)
        for i in range(1, p if k > 0 else 1):
            q = (r + i) % p
            if not await_count(state, q, REGION.published, g + k):
                return STUCK
            n = table_word(call, state, row, q) - (k - 1) * size
            if n > 0:
                to = load(call + CALL.recv) + table_word(call, state, row + 1, q) + (k - 1) * size
                fetch(to, slot_of(state, q, g + k - 1) + part, min(size, n))
    finish(call, state, blocks)
    return DONE


def allgather_single_copy(call, state):
    """Copy every block directly from its owner's memory; through the slots where the system refuses.

    All ranks go through the blocks in step, one segment at a time: a segment that its owner has just copied is still in
    the cache that the ranks share, so it is read from memory once.
    """
    p, r, segment = load(state + STATE.ranks), load(state + STATE.rank), load(call + CALL.segment)
    longest, refused, k = 0, 0, 0
    for q in range(p):
        longest = max(longest, block_bytes(call, state, q))
    for lo in range(0, longest, segment):
        if k > 0 and not await_step(state, k):
            return STUCK
        for i in range(p):
            q = (r + i) % p
            n, to = (
                min(segment, block_bytes(call, state, q) - lo),
                load(call + CALL.recv) + displacement(call, state, q) + lo,
            )
            if n > 0 and i == 0:
                copy_own(to, load(call + CALL.send) + lo, n)
            elif n > 0:
                refused += 1 - copy_single(state, q, to, load(line_of(state, q) + LINE.send_at) + lo, n, 0)
        k += 1
    code = finish_single_copy(state, refused, k)
    if code != RETRY:
        return code
    publish_segment(call, state, 0)
    return allgather_pipelined(call, state)


# Broadcast


def bcast(call):
    """Give the bytes of the root to all ranks."""
    state = load(call + CALL.state)
    r, root, protocol = load(state + STATE.rank), load(call + CALL.root), load(call + CALL.protocol)
    nbytes, mine = load(call + CALL.nbytes), load(call + CALL.send)
    code = begin(call, state)
    if code == DONE:
        if r == root:
            if protocol == INLINE:
                copy(line_of(state, r) + LINE.payload, mine, nbytes)
            elif protocol == BUFFERED:
                fill(state, buffer_of(state, r), mine, nbytes)
            elif protocol == IN_TREE:
                copy(data_of(state, r, line_of(state, r), nbytes), mine, nbytes)
            elif protocol == PIPELINE:
                publish_block(call, state, 0)
        store(line_of(state, r) + LINE.send_at, mine)
        arrive(state)
    code = await_barrier(call, state, code)
    if code != DONE:
        return code
    if protocol == SINGLE_COPY:
        return bcast_single_copy(call, state, root)
    if protocol == PIPELINE:
        return bcast_pipelined(call, state, root)
    if protocol == IN_TREE:
        return DONE
    if r != root:
        fetch(mine, line_of(state, root) + LINE.payload if protocol == INLINE else buffer_of(state, root), nbytes)
    end_probe(call, state)
    return DONE


def publish_block(call, state, k):
    """Publish the whole block k."""
    r, g, block = load(state + STATE.rank), load(state + STATE.blocks), load(call + CALL.block)
    n = min(block, load(call + CALL.nbytes) - k * block)
    fill(state, slot_of(state, r, g + k), load(call + CALL.send) + k * block, n)
    signal(state, REGION.published, g + k + 1)


def bcast_pipelined(call, state, root):
    """The root publishes block k when all have finished block k-3."""
    nbytes, block, g = load(call + CALL.nbytes), load(call + CALL.block), load(state + STATE.blocks)
    blocks = (nbytes + block - 1) // block
    for k in range(blocks):
        if load(state + STATE.rank) != root:
            if not await_count(state, root, REGION.published, g + k + 1):
                return STUCK
            n = min(block, nbytes - k * block)
            fetch(load(call + CALL.send) + k * block, slot_of(state, root, g + k), n)
            signal(state, REGION.finished, g + k + 1)
        elif k > 0:
            if k >= RING - 1 and not await_all(state, REGION.finished, g + k - 2):
                return STUCK
            publish_block(call, state, k)
    finish(call, state, blocks)
    return DONE


def bcast_single_copy(call, state, root):
    """Copy from the root's memory: each rank copies the same number of bytes, the root into the others' memory.

    Where the system refuses, all ranks learn it and the vector goes through the slots.
    """
    p, r, nbytes = load(state + STATE.ranks), load(state + STATE.rank), load(call + CALL.nbytes)
    lo = nbytes - nbytes // p // 4096 * 4096
    refused = 0
    if r != root:
        source = load(line_of(state, root) + LINE.send_at)
        refused = 1 - copy_single(state, root, load(call + CALL.send), source, lo, 0)
    else:
        for i in range(1, p):
            q = (r + i) % p
            to = load(line_of(state, q) + LINE.send_at) + lo
            refused += 1 - copy_single(state, q, load(call + CALL.send) + lo, to, nbytes - lo, 1)
    code = finish_single_copy(state, refused, 1)
    if code != RETRY:
        return code
    if r == root:
        publish_block(call, state, 0)
    return bcast_pipelined(call, state, root)


def await_step(state, k):
    """Wait until every rank has copied k segments of this call."""
    signal(state, REGION.finished, load(state + STATE.blocks) + k)
    return await_all(state, REGION.finished, load(state + STATE.blocks) + k)


def finish_single_copy(state, refused, k):
    """After the last of k segments wait until every rank has copied its own; RETRY if the system refused a copy."""
    store(line_of(state, load(state + STATE.rank)) + LINE.refusals, refused)
    if not await_step(state, k):
        return STUCK
    store(state + STATE.blocks, load(state + STATE.blocks) + k)
    for q in range(load(state + STATE.ranks)):
        if load(line_of(state, q) + LINE.refusals) != 0:
            return RETRY
    return DONE


def copy_single(state, q, here, there, nbytes, outward):
    """Copy between this process and that of rank q; 1 if every byte was copied."""
    pid = load(region(state, q) + REGION.pid)
    for lo in range(0, nbytes, MAX_SINGLE_COPY):
        size = min(MAX_SINGLE_COPY, nbytes - lo)
        copied = push(pid, there + lo, here + lo, size) if outward != 0 else pull(pid, here + lo, there + lo, size)
        if copied != size:
            return 0
    return 1


# Alltoall; the table continues with bytes and displacement of each block sent, then of each block received, 4p words


def alltoall(call):
    """Give each rank its block of every rank; only sender and receiver know its length."""
    state = load(call + CALL.state)
    code = begin(call, state)
    if code == DONE:
        store(line_of(state, load(state + STATE.rank)) + LINE.longest, load(call + CALL.longest))
        store(line_of(state, load(state + STATE.rank)) + LINE.send_at, load(call + CALL.send))
        if load(call + CALL.protocol) != SINGLE_COPY:
            publish_messages(call, state, 0)
        arrive(state)
    code = await_barrier(call, state, code)
    if code != DONE:
        return code
    r = load(state + STATE.rank)
    to = load(call + CALL.recv) + table_word(call, state, 4, r)
    source = load(call + CALL.send) + table_word(call, state, 2, r)
    copy_own(to, source, min(table_word(call, state, 1, r), table_word(call, state, 3, r)))
    single_copy = load(call + CALL.protocol) == SINGLE_COPY
    return alltoall_single_copy(call, state) if single_copy else alltoall_pipelined(call, state)


def alltoall_single_copy(call, state):
    """Copy blocks of one length directly from their owners' memory; through the slots where the system refuses."""
    p, r, refused = load(state + STATE.ranks), load(state + STATE.rank), 0
    for i in range(1, p):
        q = (r + i) % p
        n = table_word(call, state, 3, q)
        source = load(line_of(state, q) + LINE.send_at) + r * n
        refused += 1 - copy_single(state, q, load(call + CALL.recv) + table_word(call, state, 4, q), source, n, 0)
    code = finish_single_copy(state, refused, 1)
    if code != RETRY:
        return code
    publish_messages(call, state, 0)
    return alltoall_pipelined(call, state)


def table_word(call, state, row, q):
    """Word q of a row of the table."""
    return load(call + TABLE + W * (row * load(state + STATE.ranks) + q))


def publish_messages(call, state, k):
    """Publish segment k of the block for each other rank, side by side."""
    p, r, g = load(state + STATE.ranks), load(state + STATE.rank), load(state + STATE.blocks)
    size = load(call + CALL.block)
    slot = slot_of(state, r, g + k)
    for i in range(1, p):
        q = (r + i) % p
        n = table_word(call, state, 1, q) - k * size
        if n > 0:
            source = load(call + CALL.send) + table_word(call, state, 2, q) + k * size
            fill(state, slot + q * size, source, min(size, n))
    signal(state, REGION.published, g + k + 1)


def alltoall_pipelined(call, state):
    """Copy the blocks that all ranks have for this one through the slots."""
    blocks, size = 0, load(call + CALL.block)
    for q in range(load(state + STATE.ranks)):
        blocks = max(blocks, (load(line_of(state, q) + LINE.longest) + size - 1) // size)
    return copy_pipelined(call, state, blocks, RECEIVED_BLOCKS)


# Barrier


def barrier(call):
    """Wait for all ranks."""
    state = load(call + CALL.state)
    code = begin(call, state)
    if code == DONE:
        arrive(state)
    return await_barrier(call, state, code)
