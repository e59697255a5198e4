"""Ranks of one node in one process, for tests: one thread advances any of them by one step at a time, in any order.

A kernel returns to Python while a rank is missing; with no patience it does so at once.  That holds for calls of one
barrier, which small ones are.  ``python tests/one_process.py`` prints what small calls read from other cores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm.backends import shared_memory
from hpccomm.backends.shared_memory import SharedMemory, slot_bytes
from hpccomm.kernels.reductions.reference import reduce
from hpccomm.kernels.shared_memory import collectives as kernels
from hpccomm.kernels.shared_memory import memory, records
from hpccomm.performance.machine import DEFAULTS, REFERENCE, Parameters
from hpccomm.performance.probe import Place

at = MPI.Get_address
NO_SPIN = DEFAULTS._replace(spin=0, crowded_spin=0)
FLAT = NO_SPIN._replace(flat_ranks=1 << 20)
TREES = {
    "pairs": NO_SPIN._replace(flat_ranks=1, tree_arity=2, in_tree=records.BUFFER),
    "chain": NO_SPIN._replace(flat_ranks=1, tree_arity=1, in_tree=records.BUFFER),
    "eights": NO_SPIN._replace(flat_ranks=1, tree_arity=8, in_tree=1536),
    "barriers only": NO_SPIN._replace(flat_ranks=1, tree_arity=4, in_tree=-1),
}
"""Parameters with which the calls of any number of ranks go along trees."""


class OneProcess:
    """What the constructor of shared memory asks of a communicator, where all ranks answer alike."""

    def __init__(self, rank: int, size: int, places: Sequence[Place], parameters: Parameters = DEFAULTS) -> None:
        self.rank, self.size, self.places, self.parameters = rank, size, places, parameters

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size

    def allgather(self, mine: Any) -> list[Any]:
        return list(self.places) if isinstance(mine, Place) else [mine] * self.size

    def bcast(self, mine: Any) -> Any:
        return self.parameters, ""  # as rank 0 has found them


class Segment:
    """Memory of all ranks of one process."""

    def __init__(self, nbytes: int) -> None:
        self.buffer = np.zeros(nbytes, np.uint8)
        self.address = self.buffer.ctypes.data + -self.buffer.ctypes.data % records.PAGE

    def prefault(self) -> None:
        pass

    def close(self) -> None:
        pass


@contextmanager
def open_ranks(
    p: int, parameters: Parameters, code: str = "compiled", places: Sequence[Place] = ()
) -> Iterator[list[SharedMemory]]:
    """The shared memory of each of p ranks."""
    whole = Segment(p * records.region_record(slot_bytes(p, parameters.slot)).itemsize + records.PAGE)
    places = places or [Place(str(rank * 2 // p), str(rank * 4 // p), str(rank * 8 // p)) for rank in range(p)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "SharedSegment", lambda node, nbytes: whole)
        made = [SharedMemory(OneProcess(r, p, places, parameters), code, -1, parameters) for r in range(p)]
    yield made
    for each in made:
        each.close()


class Call(NamedTuple):
    """A call as it was drawn for all ranks."""

    kind: str
    n: int
    root: int = 0
    dtype: str = "f4"
    op: str = "sum"
    seed: int = 0

    def operand(self, rank: int, n: int) -> np.ndarray:
        """Numbers whose sum depends on its order."""
        rng = np.random.default_rng((self.seed, rank))
        if self.dtype.startswith("f"):
            return (rng.standard_normal(n) * 10.0 ** rng.integers(-2, 3, n)).astype(self.dtype)
        return rng.integers(0, 100, n).astype(self.dtype)

    def counts(self, p: int) -> list[int]:
        """Elements of each rank, uneven in every second call."""
        return [self.n * (rank % 3) // 2 if self.seed & 1 else self.n for rank in range(p)]

    def result(self, p: int) -> np.ndarray:
        """What the collective gives, in rank order."""
        if self.kind == "barrier":
            return np.zeros(0)
        if self.kind == "bcast":
            return self.operand(self.root, self.n)
        if self.kind == "allgather":
            return np.concatenate([self.operand(q, count) for q, count in enumerate(self.counts(p))])
        n = sum(self.counts(p)) if self.kind == "reduce_scatter" else self.n
        out = np.empty(n, self.dtype)
        reduce(self.op, self.dtype, [self.operand(q, n) for q in range(p)], out)
        return out


class Bound(NamedTuple):
    """A rank's part of a call."""

    plan: Any
    out: np.ndarray
    want: np.ndarray
    held: Any = None


def bind(shared: SharedMemory, call: Call, word: int, whole: np.ndarray) -> Bound:
    """Bind a call of one rank; ``whole`` is the result of all."""
    p, r, item = shared.size, shared.rank, np.dtype(call.dtype).itemsize
    counts, reduction = call.counts(p), (call.dtype, call.op)
    starts = [0, *accumulate(counts)]
    if call.kind == "barrier":
        return Bound(shared.bind_barrier(word), whole, whole)
    if call.kind == "allgather":
        out = np.zeros(starts[-1], call.dtype)
        out[starts[r] : starts[r + 1]] = call.operand(r, counts[r])
        nbytes, places = [item * each for each in counts], [item * each for each in starts[:-1]]
        return Bound(shared.bind_allgather(at(out) + places[r], at(out), nbytes, places, word), out, whole)
    if call.kind == "reduce_scatter":
        send, out = call.operand(r, starts[-1]), np.zeros(counts[r], call.dtype)
        plan = shared.bind_reduce_scatter(at(send), at(out), counts, *reduction, word)
        return Bound(plan, out, whole[starts[r] : starts[r + 1]], send)
    out = call.operand(r, call.n)
    if call.kind == "bcast":
        return Bound(shared.bind_bcast(at(out), out.nbytes, call.root, word), out, whole)
    if call.kind == "reduce":
        recv = at(out) if r == call.root else 0
        plan = shared.bind_reduce(at(out), recv, call.n, *reduction, call.root, word)
        return Bound(plan, out, whole if r == call.root else out.copy())
    return Bound(shared.bind_allreduce(at(out), at(out), call.n, *reduction, word), out, whole)


def advance_in_any_order(ranks: Sequence[SharedMemory], calls: Sequence[Call]) -> None:
    """Advance the ranks in turns of any order until all have made all calls; some are ahead of others."""
    p, rng = len(ranks), np.random.default_rng(len(ranks))
    results = [call.result(p) for call in calls]
    running: dict[int, Bound] = {}
    made = [0] * p
    while min(made) < len(calls):
        for r in rng.permutation(p)[: int(rng.integers(1, p + 1))]:
            for _ in range(int(rng.integers(1, 4))):
                k = made[r]
                if k == len(calls):
                    break
                if r not in running:
                    running[r] = bind(ranks[r], calls[k], k + 1, results[k])
                code = running[r].plan.kernel(running[r].plan.address)
                if code == kernels.RETRY:
                    break
                done = running.pop(r)
                assert code == kernels.DONE
                assert done.out.tobytes() == done.want.tobytes(), (r, calls[k])
                made[r] += 1


class Bus:
    """Counts the cache lines of other ranks that each rank reads in a call of the Python kernels, and what they cost.

    A rank reads its lines one after the other, and no two readers of a line wait for each other; cores overlap the
    first, and delay the second.
    """

    def __init__(self, ranks: Sequence[SharedMemory], line_ns: float, bytes_per_ns: float) -> None:
        self.ranks, self.line_ns, self.bytes_per_ns = ranks, line_ns, bytes_per_ns
        self.first, self.region, self.rank = ranks[0]._segment.address, ranks[0]._region, 0
        self.clock = [0.0] * len(ranks)
        self.written: dict[int, float] = {}
        self.read: set[tuple[int, int]] = set()
        self.seen: dict[tuple[int, int], int] = {}

    def note(self, address: int, nbytes: int = 8) -> None:
        """A rank reads bytes: the first line has the whole delay, the next ones follow at the rate of a copy."""
        new = [
            line
            for line in range(address // 64, -(-(address + nbytes) // 64) if nbytes else address // 64)
            if 0 <= line * 64 - self.first < self.region * len(self.ranks)
            and (line * 64 - self.first) // self.region != self.rank
            and (self.rank, line) not in self.read
        ]
        self.read |= {(self.rank, line) for line in new}
        if new:
            self.clock[self.rank] += self.line_ns + 64 * (len(new) - 1) / self.bytes_per_ns

    def load(self, address: int) -> int:
        self.note(address)
        return memory.load(address)

    def load_acquire(self, address: int) -> int:
        value = memory.load_acquire(address)
        if value != self.seen.get((self.rank, address), 0):
            self.seen[self.rank, address] = value
            self.clock[self.rank] = max(self.clock[self.rank], self.written.get(address, 0.0))
            self.note(address)
        return value

    def store_release(self, address: int, value: int) -> None:
        self.written[address] = self.clock[self.rank]
        memory.store_release(address, value)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        self.note(source, nbytes)
        memory.copy(to, source, nbytes)

    def fold(self, handle: int, sources: int, k: int, first: int, out: int, n: int) -> None:
        size = memory.FOLDS[handle][0].itemsize
        for j in range(k):
            self.note(memory.load(sources + 8 * j) + first * size, n * size)
        memory.fold(handle, sources, k, first, out, n)

    def run(self, call: Call) -> tuple[int, float]:
        """The lines that all ranks read in a call, and the nanoseconds until the last one is done."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("load", "load_acquire", "store_release", "copy", "fold"):
                patch.setattr(kernels, name, getattr(self, name))
            patch.setattr(kernels, "fetch", self.copy)
            whole = call.result(len(self.ranks))
            for word in (1, 2):  # the first call reads words that never change
                self.read, self.clock = set(), [0.0] * len(self.ranks)
                bound = {shared.rank: bind(shared, call, word, whole) for shared in self.ranks}
                while bound:
                    for self.rank in list(bound):
                        plan = bound[self.rank].plan
                        if plan.kernel(plan.address) == kernels.DONE:
                            del bound[self.rank]
        return len(self.read), max(self.clock)


def count_lines(p: int, parameters: Parameters, call: Call) -> tuple[int, float]:
    """Lines and nanoseconds of a call of p ranks on the reference machine."""
    with open_ranks(p, parameters, "numpy") as ranks:
        return Bus(ranks, REFERENCE.line_ns, REFERENCE.handover).run(call)


def main() -> None:
    """Print lines and computed times of small calls, of ranks that meet flat and along trees."""
    print("| call | ranks | lines, flat | lines, tree | µs, flat | µs, tree |\n|---|---:|---:|---:|---:|---:|")
    for call in (Call("barrier", 0), Call("allreduce", 2), Call("allreduce", 64), Call("allgather", 2)):
        for p in (16, 32, 64, 128):
            found = [count_lines(p, way, call) for way in (FLAT, NO_SPIN._replace(flat_ranks=1))]
            lines, times = ([each[k] for each in found] for k in range(2))
            name = f"{call.kind}, {4 * call.n} B" if call.n else call.kind
            print(f"| {name} | {p} | {lines[0]:,} | {lines[1]:,} | {times[0] / 1e3:.1f} | {times[1] / 1e3:.1f} |")


if __name__ == "__main__":  # python tests/one_process.py
    main()
