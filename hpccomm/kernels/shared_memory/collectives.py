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
    LINE,
    LINE_RECORD,
    PAYLOAD_BYTES,
    REGION_RECORD,
    RING,
    SAMPLES,
    STATE_RECORD,
    TUNING_RECORD,
    W,
    offset_of,
)

# A region
PUBLISHED = offset_of(REGION_RECORD, "published")
FINISHED = offset_of(REGION_RECORD, "finished")
ABANDONED = offset_of(REGION_RECORD, "abandoned")
PID = offset_of(REGION_RECORD, "pid")
SLEEPERS = offset_of(REGION_RECORD, "sleepers")
GATHERED = offset_of(REGION_RECORD, "gathered")
RELEASED = offset_of(REGION_RECORD, "released")
WAKES = offset_of(REGION_RECORD, "wakes")
BUFFERS = offset_of(REGION_RECORD, "buffers")
SLOTS = REGION_RECORD.itemsize

# A line
NUMBER = offset_of(LINE_RECORD, "number")
CHECK = offset_of(LINE_RECORD, "check")
PAYLOAD = offset_of(LINE_RECORD, "payload")
FINGERPRINT = offset_of(LINE_RECORD, "fingerprint")
ARRAY = offset_of(LINE_RECORD, "array")
SEND_AT = offset_of(LINE_RECORD, "send_at")
RECV_AT = offset_of(LINE_RECORD, "recv_at")
LONGEST = offset_of(LINE_RECORD, "longest")
LINE_TIME_CACHED = offset_of(LINE_RECORD, "time_cached")
LINE_TIME_NONTEMPORAL = offset_of(LINE_RECORD, "time_nontemporal")
REFUSALS = offset_of(LINE_RECORD, "refusals")

# The state
MEMORY = offset_of(STATE_RECORD, "memory")
REGION = offset_of(STATE_RECORD, "region")
RANKS = offset_of(STATE_RECORD, "ranks")
RANK = offset_of(STATE_RECORD, "rank")
CALLS = offset_of(STATE_RECORD, "calls")
BLOCKS = offset_of(STATE_RECORD, "blocks")
SPIN = offset_of(STATE_RECORD, "spin")
SPIN_LIMIT = offset_of(STATE_RECORD, "spin_limit")
CLOSED = offset_of(STATE_RECORD, "closed")
SLOT = offset_of(STATE_RECORD, "slot")
NONTEMPORAL_FILL = offset_of(STATE_RECORD, "nontemporal_fill")
PROBE = offset_of(STATE_RECORD, "probe")
CLOCK = offset_of(STATE_RECORD, "clock")
ELAPSED = offset_of(STATE_RECORD, "elapsed")
MAX_WAIT = offset_of(STATE_RECORD, "max_wait")
SLOT_STRIDE = offset_of(STATE_RECORD, "slot_stride")
SPIN_LEAST = offset_of(STATE_RECORD, "spin_least")
AWAKE = offset_of(STATE_RECORD, "awake")
WAY = offset_of(STATE_RECORD, "way")
TREE = offset_of(STATE_RECORD, "tree")
PARENT = offset_of(STATE_RECORD, "parent")
CHILD_COUNT = offset_of(STATE_RECORD, "child_count")
CHILD = offset_of(STATE_RECORD, "child")
ORDER = offset_of(STATE_RECORD, "order")
FIRST = offset_of(STATE_RECORD, "first")
END = offset_of(STATE_RECORD, "end")

# The call
STATE = offset_of(CALL_RECORD, "state")
CALL_CHECK = offset_of(CALL_RECORD, "check")
CALL_FINGERPRINT = offset_of(CALL_RECORD, "fingerprint")
WAITING = offset_of(CALL_RECORD, "waiting")
FOLD = offset_of(CALL_RECORD, "fold")
SEND = offset_of(CALL_RECORD, "send")
RECV = offset_of(CALL_RECORD, "recv")
NBYTES = offset_of(CALL_RECORD, "nbytes")
ITEM = offset_of(CALL_RECORD, "item")
ROOT = offset_of(CALL_RECORD, "root")
BLOCK = offset_of(CALL_RECORD, "block")
PROTOCOL = offset_of(CALL_RECORD, "protocol")
NONTEMPORAL_OUT = offset_of(CALL_RECORD, "nontemporal_out")
ALLOCATION = offset_of(CALL_RECORD, "allocation")
ALIVE = offset_of(CALL_RECORD, "alive")
COPIES = offset_of(CALL_RECORD, "copies")
COPY_STRIDE = offset_of(CALL_RECORD, "copy_stride")
CALL_SEND_AT = offset_of(CALL_RECORD, "send_at")
CALL_RECV_AT = offset_of(CALL_RECORD, "recv_at")
CALL_LONGEST = offset_of(CALL_RECORD, "longest")
TUNING = offset_of(CALL_RECORD, "tuning")
ONCE = offset_of(CALL_RECORD, "once")
CALL_SLOT_STRIDE = offset_of(CALL_RECORD, "slot_stride")
SEGMENT = offset_of(CALL_RECORD, "segment")
CARRIES = offset_of(CALL_RECORD, "carries")
TABLE = CALL_RECORD.itemsize

# The tuning record
COUNT = offset_of(TUNING_RECORD, "count")
PERIOD = offset_of(TUNING_RECORD, "period")
CHOICE = offset_of(TUNING_RECORD, "choice")
LONG = offset_of(TUNING_RECORD, "long")
TRIAL = offset_of(TUNING_RECORD, "trial")
SHORTEST = offset_of(TUNING_RECORD, "shortest")
TUNING_LONGEST = offset_of(TUNING_RECORD, "longest")
DECISIONS = offset_of(TUNING_RECORD, "decisions")
CHANGES = offset_of(TUNING_RECORD, "changes")
TUNING_SAMPLES = offset_of(TUNING_RECORD, "samples")
TIME_CACHED = offset_of(TUNING_RECORD, "time_cached")
TIME_NONTEMPORAL = offset_of(TUNING_RECORD, "time_nontemporal")

COLLECTIVES = ("allreduce", "reduce", "reduce_scatter", "allgather", "bcast", "alltoall", "barrier")
INLINE, DIRECT, PIPELINE, BUFFERED, SINGLE_COPY, IN_TREE = range(6)
"""The protocol of a vector: in the line; in the buffer, or in place if registered; in blocks; always in the buffer;
single-copy (CMA); along the tree."""
NOTHING, BLOCKS_TO_ALL, SUM_TO_ALL, SUM_TO_ROOT, SUM_IN_BLOCKS, VECTOR_OF_ROOT = range(6)
"""What a barrier carries along the tree."""
DIFFERENT = -1
"""The check of a packet if ranks make different calls; others are not negative."""
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
    return load(state + MEMORY) + q * load(state + REGION)


def line_of(state, q):
    return region(state, q) + LINE * (load(state + CALLS) & 1)


def buffer_of(state, q):
    return region(state, q) + BUFFERS + BUFFER * (load(state + CALLS) & 1)


def slot_of(state, q, block):
    size, part = load(state + SLOT), load(state + SLOT_STRIDE)
    return region(state, q) + SLOTS + size * (block & (RING - 1)) + (part * (block // RING) & (size - 1))


def slice_start(nbytes, p, q):
    """First byte of slice q of p."""
    return min(nbytes, q * (((nbytes + p - 1) // p + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT))


# Waiting


def begin(call, state):
    """Number the call.  Data that the others read at the barrier is written between this and :func:`arrive`."""
    store(state + CALLS, load(state + CALLS) + 1)
    store(state + SLOT_STRIDE, load(call + CALL_SLOT_STRIDE))
    mine = line_of(state, load(state + RANK))
    store(mine + CHECK, load(call + CALL_CHECK))
    if load(mine + FINGERPRINT) != load(call + CALL_FINGERPRINT):
        store(mine + FINGERPRINT, load(call + CALL_FINGERPRINT))
    row = load(call + TUNING)
    if row != 0:
        begin_probe(row, mine, state)
    else:
        store(state + NONTEMPORAL_FILL, 0)
        store(state + PROBE, 0)


def arrive(state):
    """Write the number of the call into the line, after everything else."""
    announce(state, line_of(state, load(state + RANK)), load(state + CALLS))


def announce(state, flag, value):
    """Set a flag of this rank, and wake the ranks that sleep until it does so.

    The count in WAKES changes before they are woken: a rank that read it before, and does not sleep yet, will not fall
    asleep, because the kernel compares.  SLEEPERS is cleared before that.  A rank whose word is cleared has thus read
    the old count, or reads the new one and then writes SLEEPERS again.
    """
    store_release(flag, value)
    mine = region(state, load(state + RANK))
    if load_acquire(mine + SLEEPERS) != 0:
        store(mine + SLEEPERS, 0)
        store_release(mine + WAKES, load(mine + WAKES) + 1)
        wake(mine + WAKES)


def await_barrier(call, state):
    """Wait until every rank is in this call, then compare: no rank continues unless all ranks make the same call."""
    if load(state + PROBE) != 0 and load(call + WAITING) == 0:
        store(state + ELAPSED, nanoseconds() - load(state + CLOCK))
    since = load(call + WAITING)
    late = since != 0 and nanoseconds() - since > load(state + AWAKE)
    code = meet_in_tree(call, state, since, late) if load(state + TREE) != 0 else meet_all(call, state, since, late)
    if code in (RETRY, STUCK):
        store(call + WAITING, nanoseconds() if since == 0 else since)
        return code
    store(call + WAITING, 0)
    if code == MISMATCH:
        store(state + BLOCKS, load(state + BLOCKS) + 1)
        return MISMATCH
    if load(call + TUNING) != 0:
        decide(load(call + TUNING), state)
    if load(state + PROBE) != 0:
        store(state + CLOCK, nanoseconds())
    return DONE


def meet_all(call, state, since, late):
    """Wait for the line of every rank, and compare it."""
    p, r, number = load(state + RANKS), load(state + RANK), load(state + CALLS)
    for i in range(1, p):
        q = (r + i) % p
        code = await_flag(state, q, line_of(state, q), number, patience(state, since), late)
        if code != DONE:
            return code
    mine = load(call + CALL_CHECK)
    for q in range(p):
        if load(line_of(state, q) + CHECK) != mine:
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
    number, check, above = load(state + CALLS), load(call + CALL_CHECK), load(state + PARENT)
    mine = region(state, load(state + RANK))
    if load(mine + GATHERED) != number:
        code = gather_in_tree(call, state, since, late)
        if code != DONE:
            return code
        announce(state, mine + GATHERED, number)
    packet = mine + GATHERED
    if above >= 0:
        packet = region(state, above) + RELEASED
        code = await_flag(state, above, packet, number, patience(state, since), late)
        if code != DONE:
            return code
    answer = load(packet + CHECK)
    carries = load(call + CARRIES) if answer == check else NOTHING
    if carries != NOTHING:
        pass_on(call, state, carries)
    if load(state + CHILD_COUNT) != 0:
        store(mine + RELEASED + CHECK, answer)
        announce(state, mine + RELEASED, number)
    if carries != NOTHING:
        take_answer(call, state, carries)
    return DONE if answer == check else MISMATCH


def gather_in_tree(call, state, since, late):
    """Wait for the ranks below this one, and put their blocks behind the own one, in the packet or in the buffer."""
    r, number, check = load(state + RANK), load(state + CALLS), load(call + CALL_CHECK)
    place, carries, answer, to = load(state + FIRST), load(call + CARRIES), check, 0
    upwards = carries not in (NOTHING, VECTOR_OF_ROOT)
    if upwards:
        own = bytes_between(call, state, place, place + 1)
        to = data_of(state, r, region(state, r) + GATHERED, bytes_between(call, state, place, load(state + END)))
        copy(to, load(call + SEND), own)
        to += own
    place += 1
    for i in range(load(state + CHILD_COUNT)):
        q, end = load(load(state + CHILD) + 2 * W * i), load(load(state + CHILD) + 2 * W * i + W)
        packet = region(state, q) + GATHERED
        code = await_flag(state, q, packet, number, patience(state, since), late)
        if code != DONE:
            return code
        if load(packet + CHECK) != check:
            answer = DIFFERENT
        elif upwards:
            nbytes = bytes_between(call, state, place, end)
            fetch(to, data_of(state, q, packet, nbytes), nbytes)
            to += nbytes
        place = end
    store(region(state, r) + GATHERED + CHECK, answer)
    return DONE


def data_of(state, q, packet, nbytes):
    """Where the data of a packet of rank q is: in the packet if it fits, else in the buffer."""
    return packet + PAYLOAD if nbytes <= PAYLOAD_BYTES else buffer_of(state, q)


def bytes_between(call, state, first, end):
    """The bytes of the blocks of the ranks from one place of the tree to another."""
    if load(call + CARRIES) != BLOCKS_TO_ALL:
        return (end - first) * load(call + NBYTES)
    total = 0
    for k in range(first, end):
        total += block_bytes(call, state, load(load(state + ORDER) + W * k))
    return total


def answer_bytes(call, state, carries):
    """The bytes that come down the tree."""
    if carries == BLOCKS_TO_ALL:
        return bytes_between(call, state, 0, load(state + RANKS))
    return load(call + NBYTES)


def pass_on(call, state, carries):
    """Put the answer to where the children of this rank read it."""
    r, above, nbytes = load(state + RANK), load(state + PARENT), answer_bytes(call, state, carries)
    to = data_of(state, r, region(state, r) + RELEASED, nbytes)
    if above < 0:
        answer_in_tree(call, state, carries, to, nbytes)
    elif load(state + CHILD_COUNT) != 0 and carries != SUM_TO_ROOT:
        fetch(to, data_of(state, above, region(state, above) + RELEASED, nbytes), nbytes)


def answer_in_tree(call, state, carries, to, nbytes):
    """At the root of the tree: make the answer of what has come up."""
    p, table, root = load(state + RANKS), call + TABLE, load(call + ROOT)
    if carries == VECTOR_OF_ROOT:
        fetch(to, data_of(state, root, line_of(state, root), nbytes), nbytes)
        return
    whole = bytes_between(call, state, 0, p)
    blocks = data_of(state, load(state + RANK), region(state, load(state + RANK)) + GATHERED, whole)
    if carries == BLOCKS_TO_ALL:
        copy(to, blocks, nbytes)
        return
    for k in range(p):
        store(table + W * load(load(state + ORDER) + W * k), blocks + k * nbytes)
    fold(load(call + FOLD), table, p, 0, to, nbytes // load(call + ITEM))


def take_answer(call, state, carries):
    """Copy the answer to the receive buffer, if this rank receives one."""
    r, q, nbytes = load(state + RANK), load(state + RANK), answer_bytes(call, state, carries)
    if carries == SUM_TO_ROOT:
        q = load(load(state + ORDER))
    elif load(state + CHILD_COUNT) == 0:
        q = load(state + PARENT)
    source = data_of(state, q, region(state, q) + RELEASED, nbytes)
    if carries == BLOCKS_TO_ALL:
        for k in range(load(state + RANKS)):
            q = load(load(state + ORDER) + W * k)
            fetch(load(call + RECV) + displacement(call, state, q), source, block_bytes(call, state, q))
            source += block_bytes(call, state, q)
    elif carries == SUM_IN_BLOCKS:
        lo, hi = block_start(call, state, r), block_start(call, state, r + 1)
        fetch(load(call + RECV), source + lo, hi - lo)
    elif carries == VECTOR_OF_ROOT and r != load(call + ROOT):
        fetch(load(call + SEND), source, nbytes)
    elif carries == SUM_TO_ALL or (carries == SUM_TO_ROOT and r == load(call + ROOT)):
        fetch(load(call + RECV), source, nbytes)


def patience(state, since):
    """Nanoseconds after which a wait returns to Python: an eighth of the time it has lasted, within limits."""
    least = load(state + MAX_WAIT)
    if since == 0:
        return least
    return min(max(least, (nanoseconds() - since) >> 3), max(least, min(10 * least, MAX_WAIT_NS)))


def await_flag(state, q, flag, count, limit, late):
    """Wait until a flag of rank q reaches ``count``; RETRY after ``limit`` nanoseconds, STUCK if a rank gave up.

    ``late``: this call has returned to Python before, not just now; the wait then neither polls nor yields.
    """
    spin, polls = load(state + SPIN), 0
    while polls < spin and not late:
        if load_acquire(flag) >= count:
            if polls > 0:
                store(state + SPIN, min(load(state + SPIN_LIMIT), spin + (spin >> 3) + 1))
            return DONE
        polls += 1
        pause()
    if load_acquire(flag) >= count:
        return DONE
    if not late:  # spinning did not end the wait, which means that ranks share cores: spin less
        store(state + SPIN, max(load(state + SPIN_LEAST), spin >> 1))
    return sleep_until(state, q, flag, count, limit, late)


def sleep_until(state, q, flag, count, limit, late):
    """Wait for a rank that is late: yield the core some times, then sleep until rank q signals.

    Rank q writes the flag and then reads SLEEPERS, this one writes SLEEPERS and then reads the flag.  Each write may
    still be in a store buffer when the read is done, on x86 and on ARM.  A fence between the two would cost rank q 20
    ns in every call (measured).  Instead this rank, which is about to sleep anyway, gives both buffers time to drain.
    A wake that is lost nevertheless delays a call until the sleep ends by itself.
    """
    abandoned, them = load(state + MEMORY) + ABANDONED, region(state, q)
    began, waited, yields = nanoseconds(), 0, 0
    while load_acquire(flag) < count:
        if load_acquire(abandoned) != 0:
            return STUCK
        if waited > limit:
            return RETRY
        if not late and (yields < YIELDS or waited < load(state + AWAKE)):
            yields += 1
            yield_cpu()
        else:
            wakes = load_acquire(them + WAKES)
            store_release(them + SLEEPERS, 1)
            yield_cpu()
            if load_acquire(flag) < count:
                shortest = LONGEST_SLEEP_NS if late else SHORTEST_SLEEP_NS
                longest = min(LONGEST_SLEEP_NS, max(shortest, waited >> 2))
                sleep(them + WAKES, wakes, min(longest, max(1, limit - waited)))
        waited = nanoseconds() - began
    return DONE


def await_count(state, q, counter, count):
    """Wait until a counter of a rank that is in this call reaches ``count``; false if the call was abandoned."""
    return await_flag(state, q, region(state, q) + counter, count, FOREVER, False) == DONE


def await_all(state, counter, count):
    """Wait until a counter of all other ranks reaches ``count``."""
    p, r, reached = load(state + RANKS), load(state + RANK), True
    for i in range(1, p):
        reached = reached and await_count(state, (r + i) % p, counter, count)
    return reached


def signal(state, counter, count):
    """Set a counter of this rank."""
    announce(state, region(state, load(state + RANK)) + counter, count)


# Autotuning of how slots are filled


def fill(state, slot, source, nbytes):
    """Copy into a slot of this rank, with ordinary or non-temporal stores.

    Which is faster depends on the placement of the cores: either way wins by up to a factor of five, on one virtual
    machine within minutes (measured).  So the calls probe it.
    """
    if load(state + NONTEMPORAL_FILL) != 0:
        copy_nontemporal(slot, source, nbytes)
    else:
        fetch(slot, source, nbytes)


def begin_probe(row, mine, state):
    """Choose how this call fills slots: both ways in turn during a trial, else the way chosen; publish middle times.

    Which way is better depends on where the cores lie, so until its own trial a class does as the last one of another.
    """
    trial, last = load(row + COUNT), load(row + TRIAL)
    store(row + COUNT, trial + 1 if trial + 1 < load(row + PERIOD) else 0)
    if load(row + LONG) != 0 and load(row + DECISIONS) == 0:
        store(row + CHOICE, load(state + WAY))
    if is_over(trial, last):
        rounds = trial >> 2
        store(mine + LINE_TIME_CACHED, middle(row + TUNING_SAMPLES, rounds))
        store(mine + LINE_TIME_NONTEMPORAL, middle(row + TUNING_SAMPLES + W * SAMPLES, rounds))
    if trial < last:
        store(state + PROBE, 1 + trial)
        store(state + NONTEMPORAL_FILL, way_of(trial))
        store(state + CLOCK, nanoseconds())
    else:
        store(state + PROBE, 0)
        store(state + NONTEMPORAL_FILL, load(row + CHOICE))


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
    last, choice = load(row + TRIAL), load(row + CHOICE)
    # the call that runs has been counted already
    trial = load(row + COUNT) - 1
    if not is_over(trial, last):
        return
    cached, nontemporal = 0, 0
    for q in range(load(state + RANKS)):
        cached = max(cached, load(line_of(state, q) + LINE_TIME_CACHED))
        nontemporal = max(nontemporal, load(line_of(state, q) + LINE_TIME_NONTEMPORAL))
    short, long = min(cached, nontemporal), max(cached, nontemporal)
    if trial < last and 2 * long < 3 * short:
        return
    better = 1 if nontemporal < cached else 0
    changes = 1 if better != choice and 10 * long > 11 * short else 0
    store(row + TIME_CACHED, cached)
    store(row + TIME_NONTEMPORAL, nontemporal)
    store(row + DECISIONS, load(row + DECISIONS) + 1)
    store(row + CHANGES, load(row + CHANGES) + changes)
    choice = better if changes != 0 else choice
    store(row + CHOICE, choice)
    if load(row + LONG) != 0:
        store(state + WAY, choice)
    period = load(row + SHORTEST) if changes != 0 else min(load(row + TUNING_LONGEST), 2 * load(row + PERIOD))
    store(row + PERIOD, period)
    store(row + COUNT, last + 1)


def end_probe(call, state):
    """Keep the time of every second call of a trial; waiting for late ranks does not count."""
    trial = load(state + PROBE) - 1
    if trial < 0 or trial & 1 == 0:
        return
    spent = load(state + ELAPSED) + nanoseconds() - load(state + CLOCK)
    store(load(call + TUNING) + TUNING_SAMPLES + W * (SAMPLES * way_of(trial) + (trial >> 2)), spent)


def finish(call, state, blocks):
    """Add the blocks of this call to the total."""
    store(state + BLOCKS, load(state + BLOCKS) + max(1, blocks))
    end_probe(call, state)


def enter(call, state):
    """DONE if a new call may begin."""
    if load(state + CLOSED) != 0:
        return SHUT
    if load_acquire(load(state + MEMORY) + ABANDONED) != 0:
        return STUCK
    return DONE


# Allreduce


def allreduce(call):
    """Reduce on all ranks: in the lines, from the buffers, in a pipeline of blocks, or in registered arrays."""
    state = load(call + STATE)
    if load(call + WAITING) == 0:
        code = enter(call, state)
        if code != DONE:
            return code
        begin(call, state)
        publish(call, state)
        arrive(state)
    code = await_barrier(call, state)
    if code != DONE:
        return code
    protocol = load(call + PROTOCOL)
    if protocol in (INLINE, BUFFERED):
        return fold_lines(call, state) if protocol == INLINE else fold_buffers(call, state)
    # one more case of the protocol would cost the others a comparison
    return DONE if load(call + CARRIES) != NOTHING else allreduce_in_slots(call, state, protocol)


def allreduce_in_slots(call, state, protocol):
    """Reduce a vector that may be registered."""
    registered = registration(state)
    if registered > 0:
        return allreduce_registered(call, state)
    if protocol == DIRECT and registered == 0:
        return fold_buffers(call, state)
    mine = load(line_of(state, load(state + RANK)) + ARRAY)
    return allreduce_pipelined(call, state, protocol == PIPELINE and mine == 0)


def publish(call, state):
    """Copy the vector or its first block to where the others read it; a registered array stays in place."""
    r, send, nbytes, protocol = load(state + RANK), load(call + SEND), load(call + NBYTES), load(call + PROTOCOL)
    mine = line_of(state, r)
    if protocol == INLINE:
        copy(mine + PAYLOAD, send, nbytes)
        return
    if protocol == BUFFERED:
        fill(state, buffer_of(state, r), send, nbytes)
        return
    allocation = 0
    if load(call + ALLOCATION) != 0:
        allocation = load(call + ALLOCATION) * load(load(call + ALIVE))
    store(mine + ARRAY, allocation)
    store(mine + SEND_AT, load(call + CALL_SEND_AT))
    store(mine + RECV_AT, load(call + CALL_RECV_AT))
    if allocation != 0:
        return
    if protocol == DIRECT:
        fill(state, buffer_of(state, r), send, nbytes)
    elif protocol == PIPELINE:
        publish_rest(call, state, 0)


def registration(state):
    """1: all ranks passed arrays of one allocation; 0: no rank passed a registered array; -1: neither."""
    p, first = load(state + RANKS), load(line_of(state, 0) + ARRAY)
    for q in range(1, p):
        if load(line_of(state, q) + ARRAY) != first:
            return -1
    return 1 if first != 0 else 0


def fold_lines(call, state):
    """Reduce the payloads of the lines."""
    p, table = load(state + RANKS), call + TABLE
    for q in range(p):
        store(table + W * q, line_of(state, q) + PAYLOAD)
    fold(load(call + FOLD), table, p, 0, load(call + RECV), load(call + NBYTES) // load(call + ITEM))
    return DONE


def fold_buffers(call, state):
    """Reduce the buffers."""
    p, table = load(state + RANKS), call + TABLE
    for q in range(p):
        store(table + W * q, buffer_of(state, q))
    store(table + W * load(state + RANK), load(call + SEND))
    fold(load(call + FOLD), table, p, 0, load(call + RECV), load(call + NBYTES) // load(call + ITEM))
    end_probe(call, state)
    return DONE


def allreduce_pipelined(call, state, first_is_out):
    """Copy block k in, reduce this rank's slice of block k-1, copy block k-2 out.

    Copying out comes first: a rank that publishes block k has left block k-2, and the counters it waited for prove that
    all others have left block k-3.
    """
    nbytes, block, g = load(call + NBYTES), load(call + BLOCK), load(state + BLOCKS)
    blocks = (nbytes + block - 1) // block
    for k in range(blocks + 2):
        if k >= 2:
            if not await_all(state, FINISHED, g + k - 1):
                return STUCK
            copy_out(call, state, k - 2)
        if k < blocks and (k > 0 or not first_is_out):
            publish_rest(call, state, k)
        if 1 <= k <= blocks:
            if not await_all(state, PUBLISHED, g + k):
                return STUCK
            fold_slice(call, state, k - 1)
    finish(call, state, blocks)
    return DONE


def publish_rest(call, state, k):
    """Publish block k without the slice of this rank, which no other rank reads."""
    r, g, block = load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    n = min(block, load(call + NBYTES) - k * block)
    lo, hi = slice_start(n, load(state + RANKS), r), slice_start(n, load(state + RANKS), r + 1)
    source, slot = load(call + SEND) + k * block, slot_of(state, r, g + k)
    fill(state, slot, source, lo)
    fill(state, slot + hi, source + hi, n - hi)
    signal(state, PUBLISHED, g + k + 1)


def fold_slice(call, state, k):
    """Reduce the slice of this rank of block k, and copy it into the slot for the others."""
    p, r, g = load(state + RANKS), load(state + RANK), load(state + BLOCKS)
    block, item, table = load(call + BLOCK), load(call + ITEM), call + TABLE
    n = min(block, load(call + NBYTES) - k * block)
    for q in range(p):
        store(table + W * q, slot_of(state, q, g + k))
    store(table + W * r, load(call + SEND) + k * block)
    hi, slot = slice_start(n, p, r + 1), slot_of(state, r, g + k)
    for lo in range(slice_start(n, p, r), hi, CACHE_BLOCK):
        size, out = min(CACHE_BLOCK, hi - lo), load(call + RECV) + k * block + lo
        fold(load(call + FOLD), table, p, lo // item, out, size // item)
        fill(state, slot + lo, out, size)
    signal(state, FINISHED, g + k + 1)


def copy_out(call, state, k):
    """Copy the slices that the other ranks reduced of block k."""
    p, r, g, block = load(state + RANKS), load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    n = min(block, load(call + NBYTES) - k * block)
    for i in range(1, p):
        q = (r + i) % p
        lo, hi = slice_start(n, p, q), slice_start(n, p, q + 1)
        if load(call + NONTEMPORAL_OUT) != 0:
            copy_nontemporal(load(call + RECV) + k * block + lo, slot_of(state, q, g + k) + lo, hi - lo)
        else:
            fetch(load(call + RECV) + k * block + lo, slot_of(state, q, g + k) + lo, hi - lo)


def allreduce_registered(call, state):
    """Reduce the slice of this rank from all arrays and write it into all arrays, or once if they share a result."""
    p, r, g = load(state + RANKS), load(state + RANK), load(state + BLOCKS)
    copies, stride, table = load(call + COPIES), load(call + COPY_STRIDE), call + TABLE
    nbytes, item, recv = load(call + NBYTES), load(call + ITEM), load(call + RECV)
    for q in range(p):
        store(table + W * q, copies + q * stride + load(line_of(state, q) + SEND_AT))
    hi = slice_start(nbytes, p, r + 1)
    for lo in range(slice_start(nbytes, p, r), hi, CACHE_BLOCK):
        size = min(CACHE_BLOCK, hi - lo)
        fold(load(call + FOLD), table, p, lo // item, recv + lo, size // item)
        for i in range(1, p if load(call + ONCE) == 0 else 1):
            q = (r + i) % p
            copy(copies + q * stride + load(line_of(state, q) + RECV_AT) + lo, recv + lo, size)
    signal(state, FINISHED, g + 1)
    if not await_all(state, FINISHED, g + 1):
        return STUCK
    store(state + BLOCKS, g + 1)
    return DONE


# Reduce


def reduce(call):
    """Reduce to one rank."""
    state = load(call + STATE)
    if load(call + WAITING) == 0:
        code = enter(call, state)
        if code != DONE:
            return code
        begin(call, state)
        if load(call + PROTOCOL) != PIPELINE:
            publish(call, state)
        elif load(call + ROOT) != load(state + RANK):
            publish_block(call, state, 0)
        arrive(state)
    code = await_barrier(call, state)
    if code != DONE:
        return code
    root = load(call + ROOT) == load(state + RANK)
    if load(call + PROTOCOL) == PIPELINE:
        return fold_blocks(call, state) if root else publish_blocks(call, state)
    if not root:
        end_probe(call, state)
        return DONE
    if load(call + PROTOCOL) == INLINE:
        return fold_lines(call, state)
    return DONE if load(call + CARRIES) != NOTHING else fold_buffers(call, state)


def publish_blocks(call, state):
    """Publish block k when the root has finished block k-3."""
    nbytes, block, g = load(call + NBYTES), load(call + BLOCK), load(state + BLOCKS)
    blocks, root = (nbytes + block - 1) // block, load(call + ROOT)
    for k in range(1, blocks):
        if k >= RING - 1 and not await_count(state, root, FINISHED, g + k - 2):
            return STUCK
        publish_block(call, state, k)
    finish(call, state, blocks)
    return DONE


def fold_blocks(call, state):
    """Only the root reduces: slices reduced by the others would have to be written to slots and read once more."""
    p, r, g = load(state + RANKS), load(state + RANK), load(state + BLOCKS)
    nbytes, block, item, table = load(call + NBYTES), load(call + BLOCK), load(call + ITEM), call + TABLE
    blocks = (nbytes + block - 1) // block
    for k in range(blocks):
        if not await_all(state, PUBLISHED, g + k + 1):
            return STUCK
        for q in range(p):
            store(table + W * q, slot_of(state, q, g + k))
        store(table + W * r, load(call + SEND) + k * block)
        n = min(block, nbytes - k * block)
        fold(load(call + FOLD), table, p, 0, load(call + RECV) + k * block, n // item)
        signal(state, FINISHED, g + k + 1)
    finish(call, state, blocks)
    return DONE


# Reduce-scatter; the table continues with the first byte of each rank's block, p+1 words


def reduce_scatter(call):
    """Reduce, and give each rank its block."""
    state, protocol = load(call + STATE), load(call + PROTOCOL)
    if load(call + WAITING) == 0:
        code = enter(call, state)
        if code != DONE:
            return code
        begin(call, state)
        if protocol == DIRECT:
            fill(state, buffer_of(state, load(state + RANK)), load(call + SEND), load(call + NBYTES))
        elif protocol == PIPELINE:
            publish_scatter(call, state, 0)
        arrive(state)
    code = await_barrier(call, state)
    if code != DONE:
        return code
    if protocol == IN_TREE:
        return DONE
    return fold_own_block(call, state) if protocol == DIRECT else reduce_scatter_pipelined(call, state)


def block_start(call, state, q):
    """First byte of the block of rank q."""
    return load(call + TABLE + W * (load(state + RANKS) + q))


def fold_own_block(call, state):
    """Reduce the block of this rank from the buffers."""
    p, r, table, item = load(state + RANKS), load(state + RANK), call + TABLE, load(call + ITEM)
    for q in range(p):
        store(table + W * q, buffer_of(state, q))
    store(table + W * r, load(call + SEND))
    lo, hi = block_start(call, state, r), block_start(call, state, r + 1)
    fold(load(call + FOLD), table, p, lo // item, load(call + RECV), (hi - lo) // item)
    end_probe(call, state)
    return DONE


def publish_scatter(call, state, k):
    """Publish segment k of every other rank's block, side by side."""
    p, r, g, size = load(state + RANKS), load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    slot, send = slot_of(state, r, g + k), load(call + SEND)
    for i in range(1, p):
        q = (r + i) % p
        lo, hi = block_start(call, state, q) + k * size, block_start(call, state, q + 1)
        if lo < hi:
            fill(state, slot + q * size, send + lo, min(size, hi - lo))
    signal(state, PUBLISHED, g + k + 1)


def reduce_scatter_pipelined(call, state):
    """Publish segment k, reduce segment k-1.

    Once all ranks have published segment k-2, all of them have reduced segment k-4.
    """
    p, r, g, size = load(state + RANKS), load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    item, table, blocks = load(call + ITEM), call + TABLE, 0
    for q in range(p):
        blocks = max(blocks, (block_start(call, state, q + 1) - block_start(call, state, q) + size - 1) // size)
    for k in range(blocks + 1):
        if 0 < k < blocks:
            publish_scatter(call, state, k)
        if k == 0:
            continue
        if not await_all(state, PUBLISHED, g + k):
            return STUCK
        lo, hi = block_start(call, state, r) + (k - 1) * size, block_start(call, state, r + 1)
        for q in range(p):
            store(table + W * q, slot_of(state, q, g + k - 1) + r * size)
        store(table + W * r, load(call + SEND) + lo)
        if lo < hi:
            fold(load(call + FOLD), table, p, 0, load(call + RECV) + (k - 1) * size, min(size, hi - lo) // item)
    finish(call, state, blocks)
    return DONE


# Allgather; the table continues with the bytes of each rank and their displacements, 2p words


def allgather(call):
    """Give the block of every rank to all ranks."""
    state = load(call + STATE)
    r, protocol = load(state + RANK), load(call + PROTOCOL)
    if load(call + WAITING) == 0:
        code = enter(call, state)
        if code != DONE:
            return code
        begin(call, state)
        if protocol == DIRECT:
            fill(state, buffer_of(state, r), load(call + SEND), block_bytes(call, state, r))
        elif protocol == PIPELINE:
            publish_segment(call, state, 0)
        store(line_of(state, r) + SEND_AT, load(call + SEND))
        arrive(state)
    code = await_barrier(call, state)
    if code != DONE:
        return code
    if protocol == IN_TREE:
        return DONE
    if protocol == SINGLE_COPY:
        return allgather_single_copy(call, state)
    copy_own(load(call + RECV) + displacement(call, state, r), load(call + SEND), block_bytes(call, state, r))
    if protocol == PIPELINE:
        return allgather_pipelined(call, state)
    for i in range(1, load(state + RANKS)):
        q = (r + i) % load(state + RANKS)
        fetch(load(call + RECV) + displacement(call, state, q), buffer_of(state, q), block_bytes(call, state, q))
    end_probe(call, state)
    return DONE


def block_bytes(call, state, q):
    """Bytes of the block of rank q."""
    return load(call + TABLE + W * (load(state + RANKS) + q))


def displacement(call, state, q):
    """Where the block of rank q belongs in the receive buffer."""
    return load(call + TABLE + W * (2 * load(state + RANKS) + q))


def copy_own(to, source, nbytes):
    """Copy the block that stays on this rank; an in-place call needs no copy."""
    if to != source:
        copy(to, source, nbytes)


def publish_segment(call, state, k):
    """Publish segment k of the block of this rank."""
    r, g, size = load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    n = block_bytes(call, state, r) - k * size
    if n > 0:
        fill(state, slot_of(state, r, g + k), load(call + SEND) + k * size, min(size, n))
    signal(state, PUBLISHED, g + k + 1)


def allgather_pipelined(call, state):
    """Publish segment k, copy segment k-1 of every rank; slots are safe as in reduce-scatter."""
    p, r, g, size = load(state + RANKS), load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    blocks = 0
    for q in range(p):
        blocks = max(blocks, (block_bytes(call, state, q) + size - 1) // size)
    for k in range(blocks + 1):
        if 0 < k < blocks:
            publish_segment(call, state, k)
        for i in range(1, p):
            q = (r + i) % p
            n = block_bytes(call, state, q) - (k - 1) * size
            if k > 0:
                if not await_count(state, q, PUBLISHED, g + k):
                    return STUCK
                if n > 0:
                    to = load(call + RECV) + displacement(call, state, q) + (k - 1) * size
                    fetch(to, slot_of(state, q, g + k - 1), min(size, n))
    finish(call, state, blocks)
    return DONE


def allgather_single_copy(call, state):
    """Copy every block directly from its owner's memory; through the slots where the system refuses.

    All ranks go through the blocks in step, one segment at a time: a segment that its owner has just copied is still in
    the cache that the ranks share, so it is read from memory once.
    """
    p, r, segment, longest, refused, k = load(state + RANKS), load(state + RANK), load(call + SEGMENT), 0, 0, 0
    for q in range(p):
        longest = max(longest, block_bytes(call, state, q))
    for lo in range(0, longest, segment):
        if k > 0 and not await_step(state, k):
            return STUCK
        for i in range(p):
            q = (r + i) % p
            n, to = (
                min(segment, block_bytes(call, state, q) - lo),
                load(call + RECV) + displacement(call, state, q) + lo,
            )
            if n > 0 and i == 0:
                copy_own(to, load(call + SEND) + lo, n)
            elif n > 0:
                refused += 1 - copy_single(state, q, to, load(line_of(state, q) + SEND_AT) + lo, n, 0)
        k += 1
    code = finish_single_copy(state, refused, k)
    if code != RETRY:
        return code
    publish_segment(call, state, 0)
    return allgather_pipelined(call, state)


# Broadcast


def bcast(call):
    """Give the bytes of the root to all ranks."""
    state = load(call + STATE)
    r, protocol, nbytes, mine = load(state + RANK), load(call + PROTOCOL), load(call + NBYTES), load(call + SEND)
    root = load(call + ROOT)
    if load(call + WAITING) == 0:
        code = enter(call, state)
        if code != DONE:
            return code
        begin(call, state)
        if r == root:
            if protocol == INLINE:
                copy(line_of(state, r) + PAYLOAD, mine, nbytes)
            elif protocol == BUFFERED:
                fill(state, buffer_of(state, r), mine, nbytes)
            elif protocol == IN_TREE:
                copy(data_of(state, r, line_of(state, r), nbytes), mine, nbytes)
            elif protocol == PIPELINE:
                publish_block(call, state, 0)
        store(line_of(state, r) + SEND_AT, mine)
        arrive(state)
    code = await_barrier(call, state)
    if code != DONE:
        return code
    if protocol == SINGLE_COPY:
        return bcast_single_copy(call, state, root)
    if protocol == PIPELINE:
        return bcast_pipelined(call, state, root)
    if protocol == IN_TREE:
        return DONE
    if r != root:
        fetch(mine, line_of(state, root) + PAYLOAD if protocol == INLINE else buffer_of(state, root), nbytes)
    end_probe(call, state)
    return DONE


def publish_block(call, state, k):
    """Publish the whole block k."""
    r, g, block = load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    n = min(block, load(call + NBYTES) - k * block)
    fill(state, slot_of(state, r, g + k), load(call + SEND) + k * block, n)
    signal(state, PUBLISHED, g + k + 1)


def bcast_pipelined(call, state, root):
    """The root publishes block k when all have finished block k-3."""
    nbytes, block, g = load(call + NBYTES), load(call + BLOCK), load(state + BLOCKS)
    blocks = (nbytes + block - 1) // block
    for k in range(blocks):
        if load(state + RANK) != root:
            if not await_count(state, root, PUBLISHED, g + k + 1):
                return STUCK
            n = min(block, nbytes - k * block)
            fetch(load(call + SEND) + k * block, slot_of(state, root, g + k), n)
            signal(state, FINISHED, g + k + 1)
        elif k > 0:
            if k >= RING - 1 and not await_all(state, FINISHED, g + k - 2):
                return STUCK
            publish_block(call, state, k)
    finish(call, state, blocks)
    return DONE


def bcast_single_copy(call, state, root):
    """Copy from the root's memory: each rank copies the same number of bytes, the root into the others' memory.

    Where the system refuses, all ranks learn it and the vector goes through the slots.
    """
    p, r, nbytes = load(state + RANKS), load(state + RANK), load(call + NBYTES)
    lo = nbytes - nbytes // p // 4096 * 4096
    refused = 0
    if r != root:
        refused = 1 - copy_single(state, root, load(call + SEND), load(line_of(state, root) + SEND_AT), lo, 0)
    else:
        for i in range(1, p):
            q = (r + i) % p
            to = load(line_of(state, q) + SEND_AT) + lo
            refused += 1 - copy_single(state, q, load(call + SEND) + lo, to, nbytes - lo, 1)
    code = finish_single_copy(state, refused, 1)
    if code != RETRY:
        return code
    if r == root:
        publish_block(call, state, 0)
    return bcast_pipelined(call, state, root)


def await_step(state, k):
    """Wait until every rank has copied k segments of this call."""
    signal(state, FINISHED, load(state + BLOCKS) + k)
    return await_all(state, FINISHED, load(state + BLOCKS) + k)


def finish_single_copy(state, refused, k):
    """After the last of k segments wait until every rank has copied its own; RETRY if the system refused a copy."""
    store(line_of(state, load(state + RANK)) + REFUSALS, refused)
    if not await_step(state, k):
        return STUCK
    store(state + BLOCKS, load(state + BLOCKS) + k)
    for q in range(load(state + RANKS)):
        if load(line_of(state, q) + REFUSALS) != 0:
            return RETRY
    return DONE


def copy_single(state, q, here, there, nbytes, outward):
    """Copy between this process and that of rank q; 1 if every byte was copied."""
    pid = load(region(state, q) + PID)
    for lo in range(0, nbytes, MAX_SINGLE_COPY):
        size = min(MAX_SINGLE_COPY, nbytes - lo)
        copied = push(pid, there + lo, here + lo, size) if outward != 0 else pull(pid, here + lo, there + lo, size)
        if copied != size:
            return 0
    return 1


# Alltoall; the table continues with bytes and displacement of each block sent, then of each block received, 4p words


def alltoall(call):
    """Give each rank its block of every rank; only sender and receiver know its length."""
    state = load(call + STATE)
    if load(call + WAITING) == 0:
        code = enter(call, state)
        if code != DONE:
            return code
        begin(call, state)
        store(line_of(state, load(state + RANK)) + LONGEST, load(call + CALL_LONGEST))
        store(line_of(state, load(state + RANK)) + SEND_AT, load(call + SEND))
        if load(call + PROTOCOL) != SINGLE_COPY:
            publish_messages(call, state, 0)
        arrive(state)
    code = await_barrier(call, state)
    if code != DONE:
        return code
    r = load(state + RANK)
    to, source = load(call + RECV) + table_word(call, state, 4, r), load(call + SEND) + table_word(call, state, 2, r)
    copy_own(to, source, min(table_word(call, state, 1, r), table_word(call, state, 3, r)))
    return (
        alltoall_single_copy(call, state) if load(call + PROTOCOL) == SINGLE_COPY else alltoall_pipelined(call, state)
    )


def alltoall_single_copy(call, state):
    """Copy blocks of one length directly from their owners' memory; through the slots where the system refuses."""
    p, r, refused = load(state + RANKS), load(state + RANK), 0
    for i in range(1, p):
        q = (r + i) % p
        n = table_word(call, state, 3, q)
        source = load(line_of(state, q) + SEND_AT) + r * n
        refused += 1 - copy_single(state, q, load(call + RECV) + table_word(call, state, 4, q), source, n, 0)
    code = finish_single_copy(state, refused, 1)
    if code != RETRY:
        return code
    publish_messages(call, state, 0)
    return alltoall_pipelined(call, state)


def table_word(call, state, row, q):
    """Word q of a row of the table."""
    return load(call + TABLE + W * (row * load(state + RANKS) + q))


def publish_messages(call, state, k):
    """Publish segment k of the block for each other rank, side by side."""
    p, r, g, size = load(state + RANKS), load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    slot = slot_of(state, r, g + k)
    for i in range(1, p):
        q = (r + i) % p
        n = table_word(call, state, 1, q) - k * size
        if n > 0:
            fill(state, slot + q * size, load(call + SEND) + table_word(call, state, 2, q) + k * size, min(size, n))
    signal(state, PUBLISHED, g + k + 1)


def alltoall_pipelined(call, state):
    """Publish segment k, copy segment k-1 that each rank has for this one; slots are safe as in reduce-scatter."""
    p, r, g, size = load(state + RANKS), load(state + RANK), load(state + BLOCKS), load(call + BLOCK)
    blocks = 0
    for q in range(p):
        blocks = max(blocks, (load(line_of(state, q) + LONGEST) + size - 1) // size)
    for k in range(blocks + 1):
        if 0 < k < blocks:
            publish_messages(call, state, k)
        for i in range(1, p):
            q = (r + i) % p
            n = table_word(call, state, 3, q) - (k - 1) * size
            if k > 0:
                if not await_count(state, q, PUBLISHED, g + k):
                    return STUCK
                if n > 0:
                    to = load(call + RECV) + table_word(call, state, 4, q) + (k - 1) * size
                    fetch(to, slot_of(state, q, g + k - 1) + r * size, min(size, n))
    finish(call, state, blocks)
    return DONE


# Barrier


def barrier(call):
    """Wait for all ranks."""
    state = load(call + STATE)
    if load(call + WAITING) == 0:
        code = enter(call, state)
        if code != DONE:
            return code
        begin(call, state)
        arrive(state)
    return await_barrier(call, state)
