"""Thousands of random calls: mixed collectives, sizes, dtypes, memory and communicators; exact results and no leak.

All ranks of a communicator draw the same numbers, so they make the same calls.  Reductions are exact in any order.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import verifiable
from mpi4py import MPI
from open_files import count_open_files

from hpccomm import Communicator

CALLS = 3_000
"""Each of the four communicators gets about 750: several times as many as the plans that it caches."""
SIZES = (0, 1, 2, 7, 12, 13, 63, 64, 100, 511, 1000, 2048, 2049, 5000, 16_384, 30_000, 70_001)
LONG = (300_000, 1_000_003)
SHORT = (0, 1, 2, 7, 12, 13, 63, 100, 511, 1000, 2049, 5000)
MANY_CALLS = 5_000
DTYPES = ("i1", "u2", "i4", "i8", "f4", "f8", "c8", "?")
OPERATIONS = {name: getattr(MPI, name.upper()) for name in verifiable.FOLDS}


KINDS = {
    **dict.fromkeys(("allreduce", "reduce", "reduce_scatter", "allgather", "bcast", "alltoall", "barrier")),
    **{"allgatherv": "allgather", "reduce_scatter of few layouts": "reduce_scatter"},
    **dict.fromkeys(("gatherv", "scatterv", "alltoallv"), "barrier"),
}
"""The calls, and the collective whose algorithms each takes if not its own; those of a barrier are not named."""


class Draw:
    """The random choices of one call, the same on all ranks of its communicator."""

    def __init__(self, *seed: int, shared: bool = False) -> None:
        self.random = np.random.default_rng(seed)
        self.shared = shared
        """Whether all calls run in shared memory, on short vectors, with few kernels."""

    def pick(self, choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def algorithm(self, comm: Communicator, kind: str) -> str | None:
        if self.shared:
            return "shared"
        return self.pick(comm.algorithms(kind)) if self.random.random() < 0.3 and kind != "barrier" else None

    def length(self) -> int:
        if self.shared:
            return int(self.pick(SHORT))
        return int(self.pick(LONG) if self.random.random() < 0.005 else self.pick(SIZES))


class Pool(NamedTuple):
    """Communicators, with registered memory of each."""

    comms: list[Communicator]
    registered: list[Any]


@pytest.fixture
def pool(comm: Communicator) -> Any:
    """All ranks; every other rank; the ranks in reverse; a copy."""
    comms = [comm, comm.Split(comm.rank % 2, comm.rank), comm.Split(0, -comm.rank), comm.Dup()]
    yield Pool(comms, [each.zeros(40_000, "u1") for each in comms])
    for each in comms[1:]:
        each.Free()


def memory(draw: Draw, registered: Any, n: int, dtype: Any) -> Any:
    """Ordinary or registered memory for n elements."""
    nbytes = n * np.dtype(dtype).itemsize
    if draw.random.random() < 0.3 and nbytes < registered.size:
        return registered[:nbytes].view(dtype)
    return np.empty(n, dtype)


def one_call(comm: Communicator, draw: Draw, registered: Any) -> None:
    p, me, dtype = comm.size, comm.rank, draw.pick(("i4", "f8") if draw.shared else DTYPES)
    op = draw.pick(("sum", "max") if draw.shared else verifiable.operations(dtype))
    n, root, in_place = draw.length(), int(draw.random.integers(p)) if p > 1 else 0, draw.random.random() < 0.5
    kind = draw.pick(tuple(KINDS))
    algorithm = draw.algorithm(comm, KINDS[kind] or kind)
    a, want = verifiable.operand(me, p, n, dtype, op), verifiable.reduction(p, n, dtype, op)
    b = memory(draw, registered, n, dtype)
    b[...] = 0
    if kind == "allreduce":
        if in_place:
            b[...] = a
        comm.Allreduce(MPI.IN_PLACE if in_place else a, b, OPERATIONS[op], algorithm=algorithm)
        assert np.array_equal(b, want)
    elif kind == "reduce":
        comm.Reduce(a, b, OPERATIONS[op], root, algorithm=algorithm)
        assert np.array_equal(b, want if me == root else np.zeros(n, dtype))
    elif kind == "reduce_scatter":
        cuts = np.sort(draw.random.integers(0, n + 1, p - 1))
        ends = [0, *cuts.tolist(), n]
        comm.Reduce_scatter(a, part := b[: ends[me + 1] - ends[me]], np.diff(ends).tolist(), OPERATIONS[op], algorithm)
        assert np.array_equal(part, want[ends[me] : ends[me + 1]])
    elif kind == "reduce_scatter of few layouts":
        counts = few_counts(draw, p)
        a, want = verifiable.operand(me, p, sum(counts), dtype, op), verifiable.reduction(p, sum(counts), dtype, op)
        ends = [0, *np.cumsum(counts).tolist()]
        comm.Reduce_scatter(a, part := np.zeros(counts[me], dtype), counts, OPERATIONS[op], algorithm)
        assert np.array_equal(part, want[ends[me] : ends[me + 1]])
    elif kind in ("allgatherv", "gatherv", "scatterv", "alltoallv"):
        move_uneven(comm, kind, few_counts(draw, p), dtype, root, {"algorithm": algorithm} if algorithm else {})
    elif kind == "allgather":
        n = min(n, 5000)
        parts = [verifiable.operand(rank, p, n, dtype, op) for rank in range(p)]
        comm.Allgather(parts[me], out := np.zeros(n * p, dtype), algorithm=algorithm)
        assert np.array_equal(out, np.concatenate(parts))
    elif kind == "bcast":
        if me == root:
            b[...] = want
        comm.Bcast(b, root, algorithm=algorithm)
        assert np.array_equal(b, want)
    elif kind == "alltoall":
        n = min(n, 3000)
        parts = [verifiable.operand(rank, p, n * p, dtype, op)[n * me : n * (me + 1)] for rank in range(p)]
        comm.Alltoall(verifiable.operand(me, p, n * p, dtype, op), out := np.zeros(n * p, dtype), algorithm=algorithm)
        assert np.array_equal(out, np.concatenate(parts))
    else:
        comm.Barrier()


def few_counts(draw: Draw, p: int) -> list[int]:
    """The counts of all ranks: one of a few layouts, so that they come again; some counts are 0."""
    unit, shift = draw.pick((1, 7, 300)), int(draw.random.integers(3))
    return [(rank + shift) % 3 * unit for rank in range(p)]


def move_uneven(comm: Communicator, kind: str, counts: list[int], dtype: str, root: int, named: dict[str, Any]) -> None:
    """A collective that moves blocks of any length; rank q's block has ``counts[q]`` elements and begins with q."""
    p, me = comm.size, comm.rank
    blocks = [((np.arange(count) + rank) % 2).astype(dtype) for rank, count in enumerate(counts)]
    whole, out = np.concatenate(blocks), np.zeros(sum(counts), dtype)
    part = np.zeros(counts[me], dtype)
    if kind == "allgatherv":
        comm.Allgatherv(blocks[me], [out, counts], **named)
        assert np.array_equal(out, whole)
    elif kind == "gatherv":
        comm.Gatherv(blocks[me], [out, counts] if me == root else None, root)
        assert np.array_equal(out, whole if me == root else np.zeros_like(out))
    elif kind == "scatterv":
        comm.Scatterv([whole, counts] if me == root else None, part, root)
        assert np.array_equal(part, blocks[me])
    else:
        sent, taken = np.tile(blocks[me], p), np.zeros_like(whole)
        comm.Alltoallv([sent, [counts[me]] * p], [taken, counts])
        assert np.array_equal(taken, whole)


def resident_bytes() -> int:
    """Resident memory of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.mpi(sizes=(3, 4), timeout=500)
def test_random_calls_are_exact_and_leak_nothing(comm: Communicator, pool: Pool) -> None:
    names = set(os.listdir("/dev/shm"))
    middle = files = 0
    for k in range(CALLS):
        draw = Draw(comm.size, k)
        which = int(draw.random.integers(len(pool.comms)))
        one_call(pool.comms[which], draw, pool.registered[which])
        if k == CALLS // 2:
            gc.collect()
            middle, files = resident_bytes(), count_open_files()
    gc.collect()
    assert count_open_files(files) <= files
    assert resident_bytes() - middle < 64 << 20, "the number of cached plans is bounded, and so is their memory"
    assert {name for name in os.listdir("/dev/shm") if name.startswith("hpccomm")} <= names


@pytest.mark.slow
@pytest.mark.mpi(sizes=(16,), timeout=1000)
def test_many_more_ranks_than_cores_agree_in_shared_memory(comm: Communicator) -> None:
    make_many_calls(comm)


def make_many_calls(comm: Communicator, say: Callable[[int], None] = lambda calls: None) -> None:
    """Random calls in shared memory, of the ranks in order or in reverse; now and then one is late and others sleep.

    Memory does not grow after half of the calls, in which the plans have filled their caches.  ``say`` is told how many
    calls are made.
    """
    comms, middle = [comm, comm.Split(0, -comm.rank)], 0
    registered = [each.zeros(40_000, "u1") for each in comms]
    for k in range(MANY_CALLS):
        draw = Draw(comm.size, k, shared=True)
        if int(draw.random.integers(50 * comm.size)) == comm.rank:
            time.sleep(0.002)
        which = int(draw.random.integers(len(comms)))
        one_call(comms[which], draw, registered[which])
        say(k + 1)
        if k == MANY_CALLS // 2:
            gc.collect()
            middle = resident_bytes()
    gc.collect()
    assert resident_bytes() - middle < 16 << 20


if __name__ == "__main__":  # hpccomm-run -n 64 tests/test_random_calls.py
    began = time.monotonic()

    def say(calls: int) -> None:
        if MPI.COMM_WORLD.rank == 0 and calls % 250 == 0:
            seconds = time.monotonic() - began
            print(f"{calls} calls of {MPI.COMM_WORLD.size} ranks are right, {seconds:.1f} s", flush=True)

    make_many_calls(Communicator(MPI.COMM_WORLD), say)
