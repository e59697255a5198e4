"""Random calls of every kind on communicators that come and go: no wrong bit, no hang, nothing that grows.

``hpccomm-run -n 3 tests/random_calls.py --calls 1000000 --seconds 1200``.  Each step is one of :data:`STEPS`: blocking
calls, non-blocking ones that are completed in any order, persistent ones, calls of objects, calls of two threads on two
communicators, arrays that are freed and made again, communicators that are freed and made again.  All ranks draw the
same steps; results are exact.  Resident memory, file descriptors and /dev/shm are looked at as the program runs.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from collective_arguments import N, arguments, numbers
from mpi4py import MPI
from nonblocking_rounds import DTYPES, NAMES, begin, complete
from open_files import count_open_files
from test_random_calls import Draw, one_call, resident_bytes

from hpccomm import Communicator
from hpccomm.requests import COMPARED

REGISTERED_BYTES = 40_000
LENGTHS = (0, 1, 2, 7, 64, 1000)
SHORT, LONG = (0, 1, 2, 7, 12, 13, 63, 64, 100, 511, 1000, 2049), (5000, 16_384, 70_001)
CHECK_CALLS, GROWTH_BYTES = 5_000, 64 << 20
"""How often memory and files are looked at, and how much memory may grow after the first fifth of the calls."""

MAKERS: tuple[Callable[[Any], Any], ...] = (
    lambda world: world.Dup(),
    lambda world: world.Split(0, -world.rank),
    lambda world: world.Split(world.rank % 2, world.rank),
    lambda world: world.Create_cart([world.size]),
    lambda world: Communicator(MPI.Intracomm(world).Dup(), "butterfly"),
)


class ShortDraw(Draw):
    """The choices of a call on short vectors, and one in a hundred on a long one: checks take most of the time."""

    def length(self) -> int:
        return int(self.pick(LONG if self.random.random() < 0.01 else SHORT))


class Program:
    """The communicators of one rank, and what it has done."""

    def __init__(self, world: Communicator, seed: int) -> None:
        self.world, self.seed, self.counts = world, seed, Counter[str]()
        self.common, self.mine = random.Random(seed), random.Random(1000 * seed + world.rank)
        self.comms = [make(world) for make in MAKERS]
        self.registered: list[Any] = [each.zeros(REGISTERED_BYTES, "u1") for each in self.comms]
        self.step = 0

    def pick(self) -> int:
        """One of the communicators."""
        return self.common.randrange(len(self.comms))

    def run(self, name: str) -> None:
        """Make one step."""
        self.step += 1
        self.counts[name] += STEPS[name][1](self)

    def check(self, before: dict[str, int]) -> None:
        """Raise if something has grown."""
        now = measure()
        assert now["files"] <= before["files"], (before, now)
        assert now["bytes"] - before["bytes"] < GROWTH_BYTES, (before, now)
        assert now["shm"] <= before["shm"], (before, now)


def measure() -> dict[str, int]:
    """What must not grow."""
    gc.collect()
    names = [each for each in os.listdir("/dev/shm") if each.startswith("hpccomm")]
    return {"bytes": resident_bytes(), "files": count_open_files(), "shm": len(names)}


def call_blocking(program: Program) -> int:
    """Twenty blocking calls on random communicators."""
    for k in range(20):
        which = program.pick()
        one_call(program.comms[which], ShortDraw(program.seed, program.step, k), program.registered[which])
    return 20


def call_beside(program: Program) -> int:
    """Non-blocking calls on two communicators, completed in any order, and a blocking one between them."""
    first, second = program.comms[0], program.comms[1]
    drawn = [
        (program.common.choice(NAMES), program.common.choice(LENGTHS), program.common.randrange(50), dtype)
        for dtype in program.common.choices(DTYPES, k=6)
    ]
    pending = [begin((first, second)[k % 2], *each) for k, each in enumerate(drawn)]
    if program.common.random() < 0.5:
        assert first.allreduce(1) == first.size
    complete(pending, program.mine)
    return len(drawn) + 1


def call_persistent(program: Program) -> int:
    """A persistent call, started three times, beside the blocking call."""
    comm, name = program.comms[program.pick()], program.common.choice(sorted(COMPARED))
    p, me = comm.size, comm.rank
    send, recv, want = numbers(me, p * N), np.zeros(p * N), np.zeros(p * N)
    request = getattr(comm, f"{name}_init")(*arguments(name, p, me, send, recv))
    for step in range(3):
        send += step
        recv[...] = want[...] = 7 * me
        request.Start()
        request.Wait()
        getattr(comm, name)(*arguments(name, p, me, send, want))
        assert np.array_equal(recv, want), name
    request.Free()
    return 6


def call_objects(program: Program) -> int:
    """Calls of objects."""
    comm, value = program.comms[program.pick()], program.common.randrange(1000)
    root = value % comm.size
    assert comm.bcast([value, "x" * value] if comm.rank == root else None, root) == [value, "x" * value]
    assert comm.allgather((comm.rank, value)) == [(rank, value) for rank in range(comm.size)]
    assert comm.allreduce(value) == comm.size * value
    return 3


def call_in_threads(program: Program) -> int:
    """Two threads make calls at once, each on a communicator of its own."""
    errors: list[BaseException] = []

    def body(which: int) -> None:
        try:
            for k in range(8):
                one_call(
                    program.comms[which], ShortDraw(program.seed, program.step, which, k), program.registered[which]
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(which,)) for which in (0, 3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    if errors:
        raise errors[0]
    return 16


def make_arrays_again(program: Program) -> int:
    """Arrays whose memory is freed and taken again, at other addresses on some ranks."""
    comm, length = program.comms[program.pick()], program.common.choice((1, 64, 1000, 5000))
    for value in range(4):
        registered, plain = comm.zeros(length, "f8"), np.full(length, float(value))
        hole = bytearray(5000 * (1 + comm.rank) * (value % 3))
        registered[...] = value
        assert (comm.Allreduce_view(registered) == comm.size * value).all()
        comm.Allreduce(MPI.IN_PLACE, registered)
        comm.Allreduce(plain, total := np.empty(length))
        assert (total == comm.size * value).all()
        assert (registered == comm.size * value).all()
        del registered, plain, hole, total
    return 12


def make_communicator_again(program: Program) -> int:
    """Free a communicator and make another one."""
    which = program.pick()
    program.registered[which] = None
    program.comms[which].Free()
    program.comms[which] = MAKERS[which](program.world)
    program.registered[which] = program.comms[which].zeros(REGISTERED_BYTES, "u1")
    level = program.comms[which].intra_node
    assert level.allreduce(1) == level.size
    return 2


STEPS: dict[str, tuple[int, Callable[[Program], int]]] = {
    "blocking": (30, call_blocking),
    "non-blocking": (8, call_beside),
    "persistent": (6, call_persistent),
    "objects": (4, call_objects),
    "threads": (4, call_in_threads),
    "arrays made again": (4, make_arrays_again),
    "communicators made again": (1, make_communicator_again),
}
"""The steps: how often each comes, and the function, which returns how many calls it has made."""


def run(world: Communicator, calls: int, seconds: float, seed: int) -> Counter[str]:
    """Make at least so many calls, for at most so many seconds; returns how many of each kind."""
    program, until = Program(world, seed), time.monotonic() + seconds
    names, weights = list(STEPS), [weight for weight, _ in STEPS.values()]
    before, checked = dict[str, int](), 0
    while (done := program.counts.total()) < calls and world.bcast(time.monotonic() < until):
        for name in program.common.choices(names, weights, k=20):
            program.run(name)
        if done >= checked:
            checked = done + min(CHECK_CALLS, calls // 5)
            if done > calls // 5 and not before:
                before = measure()
            if before:
                program.check(before)
            if world.rank == 0:
                print(f"{done} calls", measure(), flush=True)
    program.registered.clear()
    for each in program.comms:
        each.Free()
    return program.counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so many, with the calls made until then")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    everyone = Communicator(MPI.COMM_WORLD)
    made = run(everyone, args.calls, args.seconds, args.seed)
    if everyone.rank == 0:
        print(f"{made.total()} calls on {everyone.size} ranks are right: {dict(made)}")
    sys.exit(0)
