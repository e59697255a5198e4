"""Random rounds of non-blocking calls: sixteen of mixed collectives on two communicators, completed in any order.

Usage: ``hpccomm-run -n 3 tests/nonblocking_rounds.py [ROUNDS] [SEED]``.  The calls of a communicator are issued in the
same order on all ranks; how the two communicators alternate, and in which order and by which function the requests are
completed, differs between ranks.  All values are integers, so every result is exact.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm import Communicator

CALLS = 16
"""Calls under way at a time."""
LENGTHS = (0, 1, 2, 7, 64, 1000, 5000, 40_000)
"""Elements of a block."""
DTYPES = ("f4", "f8", "i4", "i8")

Call = tuple[Any, Callable[[], bool]]
"""A request, and the function that compares the result once it is complete."""


def values(rank: int, n: int, salt: int, dtype: str) -> Any:
    """The numbers of a rank: small integers."""
    return ((np.arange(n) * 7 + rank * 13 + salt) % 50).astype(dtype)


def every(p: int, n: int, salt: int, dtype: str) -> list[Any]:
    """The numbers of all ranks."""
    return [values(rank, n, salt, dtype) for rank in range(p)]


def begin(comm: Any, name: str, n: int, salt: int, dtype: str) -> Call:  # noqa: PLR0911  one row a collective
    """Issue a call with n numbers a block."""
    p, me = comm.size, comm.rank
    root = salt % p
    one, all_of_them = values(me, n, salt, dtype), values(me, n * p, salt, dtype)
    out, wide = np.full(n, -1, dtype), np.full(n * p, -1, dtype)
    total = lambda length: sum(every(p, length, salt, dtype)).astype(dtype)  # noqa: E731
    uneven = [n + (k + salt) % 3 for k in range(p)]
    if name == "Iallreduce":
        return comm.Iallreduce(one, out), lambda: np.array_equal(out, total(n))
    if name == "Ireduce":
        return comm.Ireduce(
            one, out, MPI.MAX, root
        ), lambda: me != root or np.array_equal(out, np.max(every(p, n, salt, dtype), axis=0))
    if name == "Ireduce_scatter_block":
        return comm.Ireduce_scatter_block(all_of_them, out), lambda: np.array_equal(
            out, total(n * p)[n * me : n * (me + 1)]
        )
    if name == "Ireduce_scatter":
        first, into, send = sum(uneven[:me]), np.empty(uneven[me], dtype), values(me, sum(uneven), salt, dtype)
        return comm.Ireduce_scatter(send, into, uneven), lambda: np.array_equal(
            into, total(sum(uneven))[first : first + uneven[me]]
        )
    if name == "Iallgather":
        return comm.Iallgather(one, wide), lambda: np.array_equal(wide, np.concatenate(every(p, n, salt, dtype)))
    if name == "Iallgatherv":
        into = np.empty(sum(uneven), dtype)
        return comm.Iallgatherv(values(me, uneven[me], salt, dtype), [into, uneven]), lambda: np.array_equal(
            into, np.concatenate([values(rank, uneven[rank], salt, dtype) for rank in range(p)])
        )
    if name == "Ibcast":
        data = values(me, n, salt, dtype)
        return comm.Ibcast(data, root), lambda: np.array_equal(data, values(root, n, salt, dtype))
    if name == "Ialltoall":
        return comm.Ialltoall(all_of_them, wide), lambda: np.array_equal(
            wide, np.concatenate([part[n * me : n * (me + 1)] for part in every(p, n * p, salt, dtype)])
        )
    if name == "Ialltoallv":
        send, counts = values(me, sum(uneven), salt, dtype), [uneven[me]] * p
        first, into = sum(uneven[:me]), np.empty(p * uneven[me], dtype)
        return comm.Ialltoallv([send, uneven], [into, counts]), lambda: np.array_equal(
            into, np.concatenate([part[first : first + uneven[me]] for part in every(p, sum(uneven), salt, dtype)])
        )
    if name == "Igather":
        return comm.Igather(
            one, wide if me == root else None, root
        ), lambda: me != root or np.array_equal(wide, np.concatenate(every(p, n, salt, dtype)))
    if name == "Iscan":
        return comm.Iscan(one, out), lambda: np.array_equal(out, sum(every(me + 1, n, salt, dtype)).astype(dtype))
    return comm.Ibarrier(), lambda: True


NAMES = (
    *("Iallreduce", "Ireduce", "Ireduce_scatter_block", "Ireduce_scatter", "Iallgather", "Iallgatherv", "Ibcast"),
    *("Ialltoall", "Ialltoallv", "Igather", "Iscan", "Ibarrier"),
)


def complete(pending: list[Call], mine: random.Random) -> None:
    """Complete all requests by a random function, in a random order."""
    mine.shuffle(pending)
    requests = [request for request, _ in pending]
    way = mine.randrange(6)
    if way == 0:
        for each in requests:
            each.Wait()
    elif way == 1:
        MPI.Request.Waitall(requests)
    elif way == 2:
        for _ in list(requests):
            MPI.Request.Waitany(requests)
    elif way == 3:
        while any(requests):
            MPI.Request.Testsome(requests)
            requests[mine.randrange(len(requests))].Test()
    elif way == 4:
        while not MPI.Request.Testall(requests):
            mine.choice(requests).Test()
    else:
        while any(requests):
            mine.choice(requests).Test()
    wrong = [number for number, (_, is_right) in enumerate(pending) if not is_right()]
    assert not wrong, f"calls {wrong} of this order are wrong"


def run_rounds(comm: Any, rounds: int, seed: int) -> None:
    """Run random rounds; raises if a result is wrong."""
    other = Communicator(comm.Dup())
    common, mine = random.Random(seed), random.Random(1000 * seed + comm.rank)
    for _ in range(rounds):
        calls = [
            [
                (common.choice(NAMES), common.choice(LENGTHS), common.randrange(50), common.choice(DTYPES))
                for _ in range(half)
            ]
            for half in (CALLS // 2, CALLS - CALLS // 2)
        ]
        blocking = common.random() < 0.3
        turns = [0] * len(calls[0]) + [1] * len(calls[1])
        mine.shuffle(turns)
        pending = [begin((comm, other)[which], *calls[which].pop(0)) for which in turns]
        partner = comm.rank ^ 1
        if partner < comm.size:
            note = np.zeros(3)
            pending.append((comm.Irecv(note, partner, 5), lambda note=note, partner=partner: (note == partner).all()))
            pending.append((comm.Isend(np.full(3, float(comm.rank)), partner, 5), lambda: True))
        if blocking:
            total = np.zeros(4)
            comm.Allreduce(np.ones(4), total)
            assert (total == comm.size).all()
        complete(pending, mine)
    other.Free()


if __name__ == "__main__":
    ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    SEED = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    world = Communicator(MPI.COMM_WORLD)
    run_rounds(world, ROUNDS, SEED)
    if world.rank == 0:
        sys.stdout.write(f"{ROUNDS} rounds of {CALLS} calls on {world.size} ranks: every result is right\n")
