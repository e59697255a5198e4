"""One measurement of the cores of a node, made by one thread, or by two threads at the same time.

Like the collectives, this source runs in Python, and compiled with intrinsics in place of the memory operations.
:mod:`hpccomm.performance.probe` calls it.
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
    store,
    store_release,
    yield_cpu,
)
from hpccomm.kernels.shared_memory.records import PROBE_RECORD, RING, W, offsets

PROBE = offsets(PROBE_RECORD)
ECHOES, POLLS, YIELDS, COPIES, NONTEMPORAL_COPIES, ADDS, PULLS, HANDOVERS, NONTEMPORAL_HANDOVERS = range(9)
"""What can be measured."""
FAILED = -1
PATIENCE_NS = 200_000_000
"""After so long without the other thread a measurement fails."""
POLLS_BEFORE_YIELD = 2000


def run_probe(record):
    """Do a task ``repeats`` times; returns nanoseconds, or FAILED."""
    task, began = load(record + PROBE.task), nanoseconds()
    if task == ECHOES:
        done = echo(record)
    elif task in (HANDOVERS, NONTEMPORAL_HANDOVERS):
        done = hand_over(record, task == NONTEMPORAL_HANDOVERS)
    else:
        done = repeat(record, task)
    return nanoseconds() - began if done else FAILED


def await_peer(record, count):
    """Wait until the flag of the other thread reaches ``count``; false if it takes too long."""
    flag, polls, began = load(record + PROBE.theirs), 0, nanoseconds()
    while load_acquire(flag) < count:
        polls += 1
        if polls < POLLS_BEFORE_YIELD:
            pause()
        else:
            yield_cpu()
            if nanoseconds() - began > PATIENCE_NS:
                return False
    return True


def echo(record):
    """Send a flag to and fro; each repetition is two transfers of a cache line."""
    mine, first, reached = load(record + PROBE.mine), load(record + PROBE.first), True
    for k in range(1, load(record + PROBE.repeats) + 1):
        if reached and first != 0:
            store_release(mine, k)
            reached = await_peer(record, k)
        elif reached:
            reached = await_peer(record, k)
            store_release(mine, k)
    return reached


def hand_over(record, nontemporal):
    """Fill slot k of a ring, publish it, and copy slot k of the other thread, as collectives in a pipeline do."""
    mine, n, reached = load(record + PROBE.mine), load(record + PROBE.nbytes), True
    for k in range(load(record + PROBE.repeats)):
        at = n * (k & (RING - 1))
        if nontemporal:
            copy_nontemporal(load(record + PROBE.slot) + at, load(record + PROBE.source), n)
        else:
            fetch(load(record + PROBE.slot) + at, load(record + PROBE.source), n)
        store_release(mine, k + 1)
        reached = reached and await_peer(record, k + 1)
        if reached:
            fetch(load(record + PROBE.to), load(record + PROBE.their_slot) + at, n)
    return reached


def repeat(record, task):
    """What one thread does alone; false if the system refuses."""
    to, source, n, done = load(record + PROBE.to), load(record + PROBE.source), load(record + PROBE.nbytes), True
    for _ in range(load(record + PROBE.repeats)):
        if task == POLLS:
            load_acquire(load(record + PROBE.theirs))
            pause()
        elif task == YIELDS:
            yield_cpu()
        elif task == COPIES:
            copy(to, source, n)
        elif task == NONTEMPORAL_COPIES:
            copy_nontemporal(to, source, n)
        elif task == ADDS:
            add(record)
        elif task == PULLS:
            done = done and pull(load(record + PROBE.pid), to, source, n) == n
    return done


def add(record):
    """Add two vectors, half of the source each, into the target."""
    table, source, half = record + PROBE_RECORD_BYTES, load(record + PROBE.source), load(record + PROBE.nbytes) // 2
    store(table, source)
    store(table + W, source + half)
    fold(load(record + PROBE.fold), table, 2, 0, load(record + PROBE.to), half // 4)


PROBE_RECORD_BYTES = PROBE_RECORD.itemsize
