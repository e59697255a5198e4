"""Collectives over shared memory are exact, report mistakes, tolerate late ranks and leave nothing behind."""

from __future__ import annotations

import gc
import itertools
import mmap
import os
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from open_files import count_holdings

from hpccomm.backends import live, shared_memory
from hpccomm.backends.shared_memory import (
    SharedMemory,
)
from hpccomm.errors import MismatchError, TransportError
from hpccomm.kernels.reductions.reference import DTYPES, narrow, reduce
from hpccomm.kernels.shared_memory import collectives as kernels
from hpccomm.kernels.shared_memory import memory, records
from hpccomm.performance.machine import DEFAULTS, LIMITS, NEVER, SINGLE_COPIES, Parameters
from hpccomm.performance.probe import Place
from hpccomm.transports.segment import GROUP_V2, SharedSegment, free_bytes, free_in_group

at = MPI.Get_address
CODES = ("compiled", "numpy")
TREE = DEFAULTS._replace(flat_ranks=1, tree_arity=2, in_tree=records.BUFFER)
LEAST = DEFAULTS._replace(**{name: least for name, (least, _) in LIMITS.items()}, **dict.fromkeys(SINGLE_COPIES, 4096))
MOST = DEFAULTS._replace(**{name: most for name, (_, most) in LIMITS.items()}, **dict.fromkeys(SINGLE_COPIES, NEVER))
MACHINES = {
    "reference": DEFAULTS,
    "tree": TREE,
    "least": LEAST._replace(fills_nontemporal=False, flat_ranks=2, tree_arity=1),
    "most": MOST,
}
"""Parameters of very different machines."""
BARRIERS = {"compiled": ("compiled", DEFAULTS), "numpy": ("numpy", DEFAULTS), "tree": ("compiled", TREE)}
"""Ways in which ranks meet: code and parameters."""
LENGTHS = (0, 1, 2, 5, 12, 13, 1000, 8193, 70001)
"""Elements that fit in a line, in the buffers, in one block, in several; not divisible by every p."""


@contextmanager
def open_memory(
    comm: MPI.Intracomm, code: str = "compiled", parameters: Parameters | None = DEFAULTS
) -> Iterator[SharedMemory]:
    shared = SharedMemory(MPI.Intracomm(comm), code, parameters=parameters)
    yield shared
    shared.close()


def pattern(n: int, rank: int, dtype: Any = "f4") -> np.ndarray:
    """Small integers, distinct for each rank and position."""
    return ((np.arange(n) * 31 + 17 * rank) % 61).astype(dtype)


def pattern_sum(n: int, size: int, dtype: Any = "f4", op: str = "sum") -> np.ndarray:
    out = np.empty(n, dtype)
    reduce(op, dtype, [pattern(n, q, dtype) for q in range(size)], out)
    return out


def check_all_raise(comm: MPI.Intracomm, kind: type[Exception], act: Any, match: str = "") -> None:
    """Every rank raises."""
    try:
        act()
        raised: Exception | None = None
    except kind as error:
        raised = error
    assert all(comm.allgather(raised is not None))
    assert match in str(raised)


@pytest.mark.mpi
@pytest.mark.parametrize("code", CODES)
def test_allreduce_is_exact(comm: MPI.Intracomm, code: str) -> None:
    with open_memory(comm, code) as shared:
        for n in LENGTHS:
            x, y = pattern(n, comm.rank), np.zeros(n, "f4")
            plan = shared.bind_allreduce(at(x), at(y), n, "f4", "sum", 1)
            in_place = shared.bind_allreduce(at(x), at(x), n, "f4", "sum", 2)
            for _ in range(2):
                y[:] = -1
                plan()
                assert np.array_equal(y, pattern_sum(n, comm.size)), n
            assert np.array_equal(x, pattern(n, comm.rank))
            in_place()
            assert np.array_equal(x, y), n


@pytest.mark.mpi(sizes=(3,))
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("op", DTYPES)
def test_every_operation_and_dtype(comm: MPI.Intracomm, code: str, op: str) -> None:
    with open_memory(comm, code) as shared:
        for name in ("i1", "u8", "f4", "f2", "c16", "b1"):
            if not shared.reduces(op, name):
                continue
            for n in (3, 500, 30000):
                x = pattern(n, comm.rank, name)
                shared.bind_allreduce(at(x), at(x), n, name, op, 3)()
                assert np.array_equal(x, pattern_sum(n, comm.size, name, op)), (op, name, n)


@pytest.mark.mpi
def test_sums_run_in_rank_order_on_every_rank(comm: MPI.Intracomm) -> None:
    vectors = [np.random.default_rng(q).normal(size=70001) * 10.0 ** (q - 3) for q in range(comm.size)]
    expected = vectors[0].copy()
    for vector in vectors[1:]:
        expected += vector
    with open_memory(comm) as shared:
        for n in (5, 900, 70001):
            y = np.empty(n)
            x = vectors[comm.rank][:n].copy()
            shared.bind_allreduce(at(x), at(y), n, "f8", "sum", 1)()
            assert np.array_equal(y, expected[:n])
        g = shared.empty(70001)
        g[:] = vectors[comm.rank]
        shared.bind_allreduce(at(g), at(g), g.size, "f8", "sum", 1)()
        assert np.array_equal(g, expected)


@pytest.mark.mpi
def test_bfloat16_is_summed_in_float32(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        x = narrow(pattern(3000, comm.rank), "bf16")
        shared.bind_allreduce(at(x), at(x), x.size, "bfloat16", "sum", 1)()
        assert np.array_equal(x, narrow(pattern_sum(3000, comm.size), "bf16"))


@pytest.mark.mpi
def test_nontemporal_results_are_the_same(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        n = 400_003
        x, y = pattern(n, comm.rank), np.zeros(n + 1, "f4")
        shared.bind_allreduce(at(x), at(y[1:]), n, "f4", "sum", 1, nontemporal=True)()
        assert np.array_equal(y[1:], pattern_sum(n, comm.size))


@pytest.mark.mpi
@pytest.mark.parametrize("code", CODES)
def test_reduce_is_exact_for_every_root(comm: MPI.Intracomm, code: str) -> None:
    with open_memory(comm, code) as shared:
        for root in range(comm.size):
            for n in (1, 300, 70001, 200_003):
                x, y = pattern(n, comm.rank), np.zeros(n, "f4")
                recv = at(y) if comm.rank == root else 0
                shared.bind_reduce(at(x), recv, n, "f4", "sum", root, 4)()
                assert comm.rank != root or np.array_equal(y, pattern_sum(n, comm.size))
                recv = at(x) if comm.rank == root else 0
                shared.bind_reduce(at(x), recv, n, "f4", "sum", root, 5)()
                assert np.array_equal(x, pattern_sum(n, comm.size) if comm.rank == root else pattern(n, comm.rank))


@pytest.mark.mpi
@pytest.mark.parametrize("code", CODES)
def test_reduce_scatter_is_exact_with_uneven_blocks(comm: MPI.Intracomm, code: str) -> None:
    with open_memory(comm, code) as shared:
        for unit in (0, 1, 700, 60001):
            counts = [unit * (q % 3) + q for q in range(comm.size)]
            cuts = np.cumsum([0, *counts])
            n = int(cuts[-1])
            part = slice(cuts[comm.rank], cuts[comm.rank + 1])
            x, y = pattern(n, comm.rank), np.zeros(counts[comm.rank], "f4")
            shared.bind_reduce_scatter(at(x), at(y), counts, "f4", "sum", 6)()
            assert np.array_equal(y, pattern_sum(n, comm.size)[part])
            assert np.array_equal(x, pattern(n, comm.rank))
            shared.bind_reduce_scatter(at(x), at(x), counts, "f4", "sum", 7)()
            assert np.array_equal(x[: counts[comm.rank]], pattern_sum(n, comm.size)[part])


@pytest.mark.mpi
@pytest.mark.parametrize("code", CODES)
def test_allgather_is_exact_with_uneven_blocks_and_gaps(comm: MPI.Intracomm, code: str) -> None:
    with open_memory(comm, code) as shared:
        for unit in (0, 3, 5000, 150_001):
            counts = [unit * (q % 3 + 1) + q for q in range(comm.size)]
            places = [int(place) for place in np.cumsum([1, *(count + 2 for count in counts)])[:-1]]
            expected = np.zeros(places[-1] + counts[-1] + 5, "u1")
            for q, (count, place) in enumerate(zip(counts, places, strict=True)):
                expected[place : place + count] = pattern(count, q, "u1")
            x, y = pattern(counts[comm.rank], comm.rank, "u1"), np.zeros_like(expected)
            shared.bind_allgather(at(x), at(y), counts, places, 8)()
            assert np.array_equal(y, expected)
            z = np.zeros_like(expected)
            z[places[comm.rank] : places[comm.rank] + counts[comm.rank]] = x
            shared.bind_allgather(at(z) + places[comm.rank], at(z), counts, places, 9)()
            assert np.array_equal(z, expected)


@pytest.mark.mpi
@pytest.mark.parametrize("code", CODES)
def test_bcast_is_exact_from_every_root(comm: MPI.Intracomm, code: str) -> None:
    with open_memory(comm, code) as shared:
        for root in range(comm.size):
            for n in (0, 5, 48, 49, 32768, 32769, 1_000_003):
                x = pattern(n, comm.rank, "u1")
                shared.bind_bcast(at(x), n, root, 10)()
                assert np.array_equal(x, pattern(n, root, "u1"))


@pytest.mark.mpi
@pytest.mark.parametrize("code", CODES)
def test_alltoall_is_exact_with_uneven_blocks(comm: MPI.Intracomm, code: str) -> None:
    r, p = comm.rank, comm.size

    def length(source: int, to: int, unit: int) -> int:
        return unit * ((source + 2 * to) % 3) + to

    def letter(source: int, to: int, unit: int) -> np.ndarray:
        return pattern(length(source, to, unit), 7 * source + to, "u1")

    with open_memory(comm, code) as shared:
        for unit in (0, 10, 300_001):
            send_counts, recv_counts = (
                [length(r, q, unit) for q in range(p)],
                [length(q, r, unit) for q in range(p)],
            )
            x = np.concatenate([letter(r, q, unit) for q in range(p)])
            y = np.zeros(sum(recv_counts), "u1")
            shared.bind_alltoall(at(x), at(y), send_counts, starts(send_counts), recv_counts, starts(recv_counts), 11)()
            assert np.array_equal(y, np.concatenate([letter(q, r, unit) for q in range(p)]))


def starts(counts: Sequence[int]) -> list[int]:
    return [int(start) for start in np.cumsum([0, *counts])[:-1]]


@pytest.mark.mpi
@pytest.mark.parametrize("way", BARRIERS)
def test_no_rank_leaves_a_barrier_before_all_have_entered(comm: MPI.Intracomm, way: str) -> None:
    with open_memory(comm, *BARRIERS[way]) as shared:
        barrier, entered = shared.bind_barrier(12), shared.empty(1, "i8")
        entered[0] = 0
        comm.Barrier()
        for turn in range(1, 30):
            if turn % comm.size == comm.rank:
                time.sleep(0.001)
            entered[0] = turn
            barrier()
            others = [peek(shared, entered, q) for q in range(comm.size)]
            assert min(others) >= turn


def peek(shared: SharedMemory, array: np.ndarray, rank: int) -> int:
    """The first word of another rank's copy of a registered array."""
    allocation = next(iter(shared._registered.values()))
    return kernels.load(allocation.copies + rank * allocation.stride)


@pytest.mark.mpi
@pytest.mark.parametrize("machine", MACHINES)
def test_a_thousand_mixed_calls_in_any_order(comm: MPI.Intracomm, machine: str) -> None:
    """Calls of all kinds and sizes follow each other at once; lines, buffers and slots are never reused too early."""
    rng = np.random.default_rng(comm.size)
    p, r = comm.size, comm.rank
    with open_memory(comm, parameters=MACHINES[machine]) as shared:
        registered = shared.empty(50_000, "i4")
        for turn in range(1500 if machine == "reference" else 500):
            kind, root = int(rng.integers(7)), int(rng.integers(p))
            n = int(rng.integers(1, 10 ** int(rng.integers(1, 6)) // 2))
            pause = int(rng.integers(8 * p))
            if pause == r:
                time.sleep(0.0005)
            x, total = pattern(n, r + turn, "i4"), sum(pattern(n, q + turn, "i4") for q in range(p))
            if kind == 0:
                y = np.zeros(n, "i4")
                shared.bind_allreduce(at(x), at(y), n, "i4", "sum", turn)()
                assert np.array_equal(y, total)
            elif kind == 1:
                y = registered[:n]
                y[:] = x
                shared.bind_allreduce(at(y), at(y), n, "i4", "sum", turn)()
                assert np.array_equal(y, total)
            elif kind == 2:
                shared.bind_reduce(at(x), at(x) if r == root else 0, n, "i4", "sum", root, turn)()
                assert np.array_equal(x, total if r == root else pattern(n, r + turn, "i4"))
            elif kind == 3:
                shared.bind_bcast(at(x), x.nbytes, root, turn)()
                assert np.array_equal(x, pattern(n, root + turn, "i4"))
            elif kind == 4:
                counts = [n // p + (q < n % p) for q in range(p)]
                mine = slice(sum(counts[:r]), sum(counts[: r + 1]))
                y = np.zeros(counts[r], "i4")
                shared.bind_reduce_scatter(at(x), at(y), counts, "i4", "sum", turn)()
                assert np.array_equal(y, total[mine])
            elif kind == 5:
                y = np.zeros(n * p, "i4")
                shared.bind_allgather(at(x), at(y), [4 * n] * p, [4 * n * q for q in range(p)], turn)()
                assert np.array_equal(y, np.concatenate([pattern(n, q + turn, "i4") for q in range(p)]))
            else:
                each = n // p
                y, sizes, places = np.zeros(each * p, "i4"), [4 * each] * p, [4 * each * q for q in range(p)]
                shared.bind_alltoall(at(x), at(y), sizes, places, sizes, places, turn)()
                parts = [pattern(n, q + turn, "i4")[r * each : (r + 1) * each] for q in range(p)]
                assert np.array_equal(y, np.concatenate(parts))


@pytest.mark.mpi
def test_a_plan_may_run_thousands_of_times(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        small, large = np.zeros(4, "i8"), np.zeros(20_000, "i8")
        plans = [shared.bind_allreduce(at(x), at(x), x.size, "i8", "max", 1) for x in (small, large)]
        turns = 3000 if comm.size <= 2 else 300
        for turn in range(turns):
            small[:], large[:] = turn + comm.rank, turn - comm.rank
            for plan in plans:
                plan()
            assert small[0] == small[3] == turn + comm.size - 1
            assert large[0] == large[-1] == turn


# Mistakes


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", BARRIERS)
def test_different_fingerprints_raise_on_all_ranks_and_the_next_call_works(comm: MPI.Intracomm, way: str) -> None:
    odd = comm.size - 1
    with open_memory(comm, *BARRIERS[way]) as shared:
        for n in (4, 1000, 100_000):
            x, y = pattern(n, comm.rank), np.full(n, -1, "f4")
            wrong = shared.bind_allreduce(at(x), at(y), n, "f4", "sum", 100 + (comm.rank == odd))
            right = shared.bind_allreduce(at(x), at(y), n, "f4", "sum", 7)
            for _ in range(3):
                y[:] = -1
                check_all_raise(comm, MismatchError, wrong, f"local ranks {odd}: 0x65")
                assert shared.peer_fingerprints() == [100 + (q == odd) for q in range(comm.size)]
                assert (y == -1).all()
                right()
                assert np.array_equal(y, pattern_sum(n, comm.size))


@pytest.mark.mpi(min_size=2)
def test_different_calls_raise_even_with_equal_fingerprints(comm: MPI.Intracomm) -> None:
    x, y = pattern(9000, comm.rank), np.zeros(9000, "f4")
    with open_memory(comm) as shared:
        odd = comm.rank == comm.size // 2
        pairs = [
            (shared.bind_barrier(1), shared.bind_bcast(at(y), 9000, 0, 1)),
            (shared.bind_bcast(at(y), 9000, 0, 1), shared.bind_bcast(at(y), 36000, 0, 1)),
            (shared.bind_bcast(at(y), 36000, 0, 1), shared.bind_bcast(at(y), 36000, 1, 1)),
            (
                shared.bind_allreduce(at(x), at(y), 9000, "f4", "sum", 1),
                shared.bind_allreduce(at(x), at(y), 8999, "f4", "sum", 1),
            ),
            (
                shared.bind_allreduce(at(x), at(y), 9000, "f4", "sum", 1),
                shared.bind_allreduce(at(x), at(y), 9000, "i4", "sum", 1),
            ),
            (
                shared.bind_allreduce(at(x), at(y), 9000, "f4", "max", 1),
                shared.bind_reduce(at(x), at(y), 9000, "f4", "max", 0, 1),
            ),
            (
                shared.bind_reduce_scatter(at(x), at(y), [9] * comm.size, "f4", "sum", 1),
                shared.bind_reduce_scatter(at(x), at(y), [8] * comm.size, "f4", "sum", 1),
            ),
            (
                shared.bind_allgather(at(x), at(y), [9] * comm.size, starts([9] * comm.size), 1),
                shared.bind_allgather(at(x), at(y), [8] * comm.size, starts([8] * comm.size), 1),
            ),
        ]
        right = shared.bind_allreduce(at(x), at(x), 9000, "f4", "max", 2)
        for usual, other in pairs:
            check_all_raise(comm, MismatchError, other if odd else usual)
            assert not y.any()
            right()
        assert np.array_equal(x, pattern_sum(9000, comm.size, op="max"))


@pytest.mark.mpi(min_size=2)
def test_the_owner_provides_the_mismatch_error(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        shared.mismatch = lambda fingerprints: MismatchError(f"calls {fingerprints}")
        wrong = shared.bind_barrier(comm.rank)
        check_all_raise(comm, MismatchError, wrong, f"calls {list(range(comm.size))}")


# Waiting


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", BARRIERS)
def test_a_late_rank_is_named_while_the_others_wait(comm: MPI.Intracomm, way: str) -> None:
    late = comm.size - 1
    with open_memory(comm, *BARRIERS[way]) as shared:
        reports: list[tuple[float, list[int]]] = []
        requests: list[MPI.Request] = []

        def report(seconds: float, missing: list[int]) -> None:
            reports.append((seconds, missing))
            if missing == [late] and seconds > 0.02 and not requests:  # with few cores others may be late as well
                requests.append(comm.isend(None, late))

        shared.stall_handler = report
        for n in (4, 1000, 100_000):
            x = pattern(n, comm.rank)
            plan = shared.bind_allreduce(at(x), at(x), n, "f4", "sum", 1)
            comm.Barrier()
            if comm.rank == late:
                for waiting in range(late):
                    comm.recv(source=waiting)
            plan()
            MPI.Request.waitall(requests)
            assert np.array_equal(x, pattern_sum(n, comm.size))
            assert comm.rank == late or any(missing == [late] and 0.02 < after < 30 for after, missing in reports)
            reports.clear()
            requests.clear()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", BARRIERS)
def test_an_abandoned_call_raises_on_the_other_ranks_instead_of_hanging(comm: MPI.Intracomm, way: str) -> None:
    class EnoughError(Exception):
        pass

    def give_up(seconds: float, missing: list[int]) -> None:
        if comm.rank == 0:
            raise EnoughError

    with open_memory(comm, *BARRIERS[way]) as shared:
        shared.stall_handler = give_up
        x = pattern(100_000, comm.rank)
        plan = shared.bind_allreduce(at(x), at(x), x.size, "f4", "sum", 1)
        comm.Barrier()  # binding may have compiled
        if comm.rank == comm.size - 1:
            comm.recv(source=0)
        with pytest.raises(EnoughError if comm.rank == 0 else TransportError):
            plan()
        if comm.rank == 0:
            comm.send("gave up", comm.size - 1)
        check_all_raise(comm, TransportError, plan, "local rank 0 left a collective half done")
    with open_memory(comm, *BARRIERS[way]) as shared:
        shared.bind_barrier(1)()


@pytest.mark.mpi(sizes=(4,))
def test_overlapping_communicators_work_at_the_same_time(comm: MPI.Intracomm) -> None:
    half = MPI.Intracomm(comm).Split(comm.rank % 2, -comm.rank)
    with open_memory(half) as ours, open_memory(comm) as all_ranks:
        for turn in range(50):
            x, y = pattern(30_000, half.rank + turn), pattern(100, comm.rank)
            ours.bind_allreduce(at(x), at(x), x.size, "f4", "sum", turn)()
            all_ranks.bind_allreduce(at(y), at(y), y.size, "f4", "sum", turn)()
            assert np.array_equal(x, sum(pattern(30_000, q + turn) for q in range(half.size)))
            assert np.array_equal(y, pattern_sum(100, comm.size))
    half.Free()


# Registered arrays


@pytest.mark.mpi
def test_registered_arrays_give_the_same_bits(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        a, b = shared.empty((7, 9001), "f4"), shared.empty(63_007, "f4")
        assert a.shape == (7, 9001)
        for lo, hi in ((0, 63_007), (5, 5 + 2048), (1, 40_000), (3, 3)):
            a.ravel()[:], b[:] = pattern(63_007, comm.rank), -1
            x, n = a.ravel()[lo:hi], hi - lo
            expected = pattern_sum(63_007, comm.size)[lo:hi]
            shared.bind_allreduce(at(x), at(b), n, "f4", "sum", 1)()  # two allocations: through the slots
            assert np.array_equal(b[:n], expected)
            assert (b[n:] == -1).all()
            shared.bind_allreduce(at(x), at(x), n, "f4", "sum", 2)()
            assert np.array_equal(x, expected)


@pytest.mark.mpi
def test_registered_and_ordinary_arrays_may_be_mixed_in_one_call(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        a, b = shared.empty(50_000, "f4"), shared.empty(50_000, "f4")
        for n in (2500, 50_000):
            for turn in range(2 * comm.size):
                kind = (comm.rank + turn) % 3
                x = (a, b, np.empty(50_000, "f4"))[kind][turn : turn + n]
                x[:] = pattern(x.size, comm.rank)
                shared.bind_allreduce(at(x), at(x), 2500, "f4", "sum", turn)()
                assert np.array_equal(x[:2500], pattern_sum(x.size, comm.size)[:2500])


@pytest.mark.mpi
def test_ranks_may_pass_different_offsets_of_one_registered_array(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        a = shared.empty(100_000, "f4")
        a[:] = -1
        x = a[100 * comm.rank :][:50_000]
        x[:] = pattern(50_000, comm.rank)
        shared.bind_allreduce(at(x), at(x), 50_000, "f4", "sum", 1)()
        assert np.array_equal(x, pattern_sum(50_000, comm.size))
        assert (a[: 100 * comm.rank] == -1).all()
        assert (a[100 * comm.rank + 50_000 :] == -1).all()


@pytest.mark.mpi
def test_out_of_place_between_parts_of_one_registered_array(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        a = shared.empty((2, 50_000), "f4")
        a[0], a[1] = pattern(50_000, comm.rank), -1
        shared.bind_allreduce(at(a[0]), at(a[1]), 50_000, "f4", "sum", 1)()
        assert np.array_equal(a[0], pattern(50_000, comm.rank))
        assert np.array_equal(a[1], pattern_sum(50_000, comm.size))


@pytest.mark.mpi
def test_a_plan_is_correct_after_its_registered_array_is_freed(comm: MPI.Intracomm) -> None:
    """A cached plan may find an ordinary array at the address of a registered one, on some ranks or all."""
    with open_memory(comm) as shared:
        a = shared.empty(50_000, "f4")
        plan = shared.bind_allreduce(at(a), at(a), a.size, "f4", "sum", 1)
        (allocation,) = shared._registered.values()
        for gone in ([], [0], range(comm.size)):
            if comm.rank in gone:
                shared.forget(allocation)
            a[:] = pattern(50_000, comm.rank)
            plan()
            assert np.array_equal(a, pattern_sum(50_000, comm.size))


@pytest.mark.mpi
def test_a_registered_array_is_freed_with_its_last_view(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        a = shared.empty(50_000, "f4")
        (allocation,) = shared._registered.values()
        view = a[100:]
        del a
        gc.collect()
        assert shared._registered
        assert allocation.alive[0] == 1
        del view
        gc.collect()
        assert not shared._registered
        assert allocation.alive[0] == 0


# Resources


@pytest.mark.mpi
def test_nothing_leaks(comm: MPI.Intracomm) -> None:
    def use(close: bool) -> None:
        shared = SharedMemory(MPI.Intracomm(comm))
        a, x = shared.empty(10_000), np.zeros(10_000)
        for y in (a, x):
            y[:] = 1
            shared.bind_allreduce(at(y), at(y), y.size, "f8", "sum", 1)()
            assert (y == comm.size).all()
        if close:
            shared.close()

    use(close=True)
    before = count_holdings()
    for close in (True, False, True):
        use(close)
    count_holdings(before)


@pytest.mark.mpi
def test_arrays_outlive_the_transport(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        a = shared.empty(1000)
        a[:] = comm.rank
    assert (a == comm.rank).all()


@pytest.mark.mpi(min_size=2)
def test_a_plan_that_outlives_the_transport_raises(comm: MPI.Intracomm) -> None:
    with open_memory(comm) as shared:
        plan = shared.bind_barrier(1)
        plan()
    with pytest.raises(TransportError, match="outlived"):
        plan()
    with pytest.raises(TransportError, match="closed"):
        shared.empty(3)


@pytest.mark.mpi
def test_missing_memory_is_an_error_on_all_ranks(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    node, odd = MPI.Intracomm(comm), comm.size - 1
    segment = SharedSegment(node, 5000)
    assert len(segment.buffer) == 8192
    segment.close()

    def refuse(file: int, first: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    check_all_raise(comm, TransportError, lambda: SharedSegment(node, 1 << 60), "bytes are free")
    if comm.rank != odd:
        monkeypatch.undo()
    before = count_holdings()
    check_all_raise(comm, TransportError, lambda: SharedSegment(node, 1 << 20), f"local rank {odd}: [Errno 28]")
    count_holdings(before)


def test_prefault_maps_all_pages_before_the_first_call() -> None:
    if tuple(map(int, os.uname().release.split("-")[0].split(".")[:2])) < (5, 14):
        pytest.skip("this kernel fills page tables only when a page is used: it needs Linux 5.14")
    pages, segment = 512, SharedSegment(MPI.COMM_SELF, 512 * mmap.PAGESIZE)
    segment.prefault()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    segment.buffer[:: mmap.PAGESIZE] = bytes(pages)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    segment.close()
    assert faults < pages // 8  # those of the interpreter; without prefault one for each page


def test_free_memory_is_the_least_of_all_control_group_limits(tmp_path: Path) -> None:
    inner = tmp_path / "job" / "step"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, "max", 10), (inner.parent, "1000", 700), (tmp_path, "5000", 800)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 50\n")
    assert free_in_group(str(tmp_path), "/job/step", *GROUP_V2) == 350
    assert free_in_group(str(tmp_path), "/", *GROUP_V2) == 4250
    assert free_in_group(str(tmp_path), "/../outside", *GROUP_V2) == 4250, "as a namespace of groups shows them"
    assert 0 < free_bytes() < 1 << 50


@pytest.mark.mpi
def test_without_anonymous_files_the_named_file_is_unlinked_at_once(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed job then leaves nothing in /dev/shm."""
    monkeypatch.delattr(os, "memfd_create")
    ours = {name for name in os.listdir("/dev/shm") if name.startswith("hpccomm-")}
    with open_memory(comm) as shared:
        comm.Barrier()
        assert {name for name in os.listdir("/dev/shm") if name.startswith("hpccomm-")} <= ours
        x = pattern(100_000, comm.rank)
        shared.bind_allreduce(at(x), at(x), x.size, "f4", "sum", 1)()
        assert np.array_equal(x, pattern_sum(x.size, comm.size))


@pytest.mark.mpi
def test_all_ranks_run_the_code_that_rank_0_chose(comm: MPI.Intracomm) -> None:
    with open_memory(comm, CODES[comm.rank % 2]) as shared:
        assert shared._compiled == (CODES[0] == "compiled")
        x = pattern(10_000, comm.rank)
        shared.bind_allreduce(at(x), at(x), x.size, "f4", "sum", 1)()
        assert np.array_equal(x, pattern_sum(x.size, comm.size))


@pytest.mark.mpi(sizes=(2,))
def test_pure_python_refuses_processors_with_weak_memory_order(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    check_all_raise(comm, TransportError, lambda: SharedMemory(MPI.Intracomm(comm), "numpy"), "pip install numba")


@pytest.mark.mpi(min_size=2)
def test_all_ranks_choose_the_same_way_to_fill_slots(comm: MPI.Intracomm) -> None:
    """Calls try both ways, all ranks decide alike for the slowest of them, and results stay right throughout."""
    n, rounds = 40_000, 256 + 30
    with open_memory(comm) as shared:
        x, y, expected = pattern(n, comm.rank), np.zeros(n, "f4"), pattern_sum(n, comm.size)
        plan = shared.bind_allreduce(at(x), at(y), n, "f4", "sum", 1)
        row = shared._tuning[(4 * n).bit_length()]
        for _ in range(rounds):
            y[:] = 0
            plan()
            assert np.array_equal(y, expected)
        assert row["decisions"] >= 1
        assert 256 <= row["period"] <= 16 * 256
        assert row["time_cached"] > 0
        assert row["time_nontemporal"] > 0
        shared_facts = [name for name in row.dtype.names if name != "samples"]
        assert len(set(comm.allgather(tuple(int(row[name]) for name in shared_facts)))) == 1


@pytest.mark.mpi(min_size=2)
def test_a_user_sees_what_running_programs_have_decided(comm: MPI.Intracomm) -> None:
    n, mine = 40_000, DEFAULTS._replace(source="this test")

    def find() -> list[live.Running]:
        return [each for each in live.find_running() if each.facts["parameters"]["source"] == "this test"]

    with open_memory(comm, parameters=mine) as shared:
        x, y = pattern(n, comm.rank), np.zeros(n, "f4")
        plan = shared.bind_allreduce(at(x), at(y), n, "f4", "sum", 1)
        for _ in range(60):
            plan()
        comm.Barrier()
        (seen,) = find()
        assert seen.pid == comm.bcast(os.getpid())
        assert seen.facts["ranks"] == comm.size
        assert seen.facts["parameters"]["slot"] == DEFAULTS.slot
        (decision,) = seen.decisions
        row = shared._tuning[(4 * n).bit_length()]
        assert (decision.collective, decision.first) == ("allreduce", 131_072)
        assert decision.way == live.WAYS[int(row["choice"])]
        assert decision.us_ordinary == row["time_cached"] / 1e3
        assert decision.decisions == row["decisions"] >= 1
        comm.Barrier()
    comm.Barrier()
    assert not find()


FAST, SLOW = 1000, 5000


def decide_alone(
    times: Callable[[int, int], int], calls: int, trial: int = kernels.LONG_TRIAL
) -> tuple[Any, list[int]]:
    """Run the autotuner of one rank: ``times(call, way)`` is what a call takes; returns its row and the ways taken."""
    region = np.zeros(1, records.region_record(1 << 12))
    state, row = np.zeros((), records.STATE_RECORD), np.zeros((), records.TUNING_RECORD)
    records.fill(state, memory=region.ctypes.data, region=region.itemsize, ranks=1)
    records.fill(row, trial=trial, period=64, shortest=64, longest=256, choice=1)
    there, at_row, ways = state.ctypes.data, row.ctypes.data, []
    for call in range(calls):
        state["calls"] += 1
        kernels.begin_probe(at_row, kernels.line_of(there, 0), there)
        kernels.decide(at_row, there)
        way = int(state["nontemporal_fill"])
        ways.append(way)
        if state["probe"] and (int(state["probe"]) - 1) & 1:
            at_sample = kernels.TUNING.samples + records.W * (records.SAMPLES * way + ((int(state["probe"]) - 1) >> 2))
            kernels.store(at_row + at_sample, times(call, way))
    return row, ways


def test_a_trial_takes_turns_and_stops_early_where_one_way_is_clearly_slower() -> None:
    row, ways = decide_alone(lambda _, way: (FAST, SLOW)[way], 21)
    assert ways[:13] == [0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert set(ways[13:]) == {0}
    assert (row["decisions"], row["changes"], row["choice"], row["period"]) == (1, 1, 0, 64)


@pytest.mark.parametrize("late", range(20))
def test_one_noisy_call_decides_nothing(late: int) -> None:
    """Wherever a delay falls, the way that is faster in all other calls is taken."""
    for fast in (0, 1):
        row, _ = decide_alone(lambda call, way: (FAST if way == fast else SLOW) + 50 * SLOW * (call == late), 30)
        assert row["choice"] == fast


def test_a_small_advantage_changes_nothing_and_makes_trials_rarer() -> None:
    row, ways = decide_alone(lambda _, way: (1000, 1050)[way], 64)
    assert (row["decisions"], row["changes"], row["choice"], row["period"]) == (1, 0, 1, 128)
    assert sorted(ways[:20]) == [0] * 10 + [1] * 10


def test_a_machine_that_changes_is_tried_again() -> None:
    row, ways = decide_alone(lambda call, way: SLOW if way == (call < 100) else FAST, 400)
    assert row["changes"] == 2
    assert row["choice"] == 1
    assert set(ways[13:50]) == {0}


def test_a_short_trial_ends_after_twelve_calls() -> None:
    row, ways = decide_alone(lambda _, way: (1000, 1120)[way], 20, kernels.SHORT_TRIAL)
    assert (row["decisions"], row["choice"]) == (1, 0)
    assert set(ways[13:]) == {0}


def test_a_class_of_long_vectors_begins_as_the_last_trial_of_another_has_decided() -> None:
    """Where the cores lie decides for all of them alike; short vectors and decided classes keep their own way."""
    region = np.zeros(1, records.region_record(1 << 12))
    state, rows = np.zeros((), records.STATE_RECORD), np.zeros(4, records.TUNING_RECORD)
    records.fill(state, memory=region.ctypes.data, region=region.itemsize, ranks=1, way=1)
    rows["long"], rows["choice"], rows["decisions"] = [1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 1]
    rows["trial"], rows["period"], rows["count"] = kernels.SHORT_TRIAL, 64, [kernels.SHORT_TRIAL, 40, 40, 40]
    there = state.ctypes.data
    line = kernels.line_of(there, 0)
    rows["samples"][0] = [[FAST] * records.SAMPLES, [SLOW] * records.SAMPLES]

    def begin(row: int) -> int:
        kernels.begin_probe(rows[row:].ctypes.data, line, there)
        return int(state["nontemporal_fill"])

    assert [begin(row) for row in (1, 2, 3)] == [1, 0, 1]
    begin(0)
    kernels.decide(rows.ctypes.data, there)
    assert [begin(row) for row in (0, 1, 2, 3)] == [0, 0, 0, 1]


@pytest.mark.parametrize("n", range(1, records.SAMPLES + 1))
def test_the_middle_time_is_the_median(n: int) -> None:
    for times in itertools.product((1, 2, 3), repeat=n):
        words = np.array(times, np.int64)
        assert kernels.middle(words.ctypes.data, n) == sorted(times)[(n - 1) // 2]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("system", ["allows", "refuses one rank", "refuses"])
def test_single_copy_is_exact_even_if_the_system_refuses(comm: MPI.Intracomm, system: str, code: str) -> None:
    """If the system refuses in the middle of a call, all ranks fall back together."""
    early = DEFAULTS._replace(**dict.fromkeys(SINGLE_COPIES, 10_000), allgather_segment=65_536)
    p, r, n = comm.size, comm.rank, 300_001
    with open_memory(comm, code, early) as shared:
        if not shared.reaches:
            pytest.skip("this system forbids a process to read the memory of another")
        if system == "refuses" or (system == "refuses one rank" and r == p - 1):
            no_process = 2**22 + 1  # above the largest process number of Linux
            kernels.store(shared._segment.address + r * shared._region + kernels.REGION.pid, no_process)
        for root in range(p):
            x = pattern(n, r, "i4")
            plan = shared.bind_bcast(at(x), x.nbytes, root, 1)
            for _ in range(3):
                x[:] = pattern(n, r, "i4")
                plan()
                assert np.array_equal(x, pattern(n, root, "i4"))
        y, want = np.zeros(n * p, "i4"), np.concatenate([pattern(n, q, "i4") for q in range(p)])
        x = pattern(n, r, "i4")
        shared.bind_allgather(at(x), at(y), [4 * n] * p, [4 * n * q for q in range(p)], 2)()
        assert np.array_equal(y, want)
        counts = [4 * n // (1 + q) for q in range(p)]
        ends = np.cumsum([0, *counts])
        want = np.concatenate([pattern(count, q, "u1") for q, count in enumerate(counts)])
        z = np.zeros_like(want)
        z[ends[r] : ends[r + 1]] = pattern(counts[r], r, "u1")
        shared.bind_allgather(at(z) + int(ends[r]), at(z), counts, [int(end) for end in ends[:-1]], 5)()
        assert np.array_equal(z, want)
        each = n // p
        sizes, places = [4 * each] * p, [4 * each * q for q in range(p)]
        shared.bind_alltoall(at(x), at(y), sizes, places, sizes, places, 3)()
        parts = [pattern(n, q, "i4")[r * each : (r + 1) * each] for q in range(p)]
        assert np.array_equal(y[: each * p], np.concatenate(parts))
        shared.bind_allreduce(at(x), at(y), n, "i4", "sum", 4)()
        assert np.array_equal(y[:n], sum(pattern(n, q, "i4") for q in range(p)))


@pytest.mark.mpi(min_size=2)
def test_a_system_that_forbids_single_copy_is_detected_at_construction(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank == 0:
        monkeypatch.setattr(memory, "pull", lambda *_: -1)
    with open_memory(comm) as shared:
        assert not shared.reaches


def test_short_blocks_use_the_parts_of_a_slot_in_turn() -> None:
    """A rank then writes where no other rank has just read."""
    state, slot = np.zeros((), records.STATE_RECORD), 1 << 18
    state["slot"] = slot
    for block in (1, 4096, 5000, 1 << 16, 1 << 18):
        part = shared_memory.slot_stride(block, slot)
        assert min(block, slot) <= part <= slot
        state["slot_stride"] = part
        places = [kernels.slot_of(state.ctypes.data, 0, k) - kernels.SLOTS for k in range(records.RING * slot // part)]
        assert [place // slot for place in places] == [k % records.RING for k in range(len(places))]
        assert sorted(places) == list(range(0, records.RING * slot, part))


def test_the_first_probe_waits_until_every_part_of_every_slot_was_used() -> None:
    """Before that no other cache holds the lines, and the wrong way to fill slots looks like the right one."""
    slot = 1 << 18
    rows = shared_memory.new_tuning_table(slot).reshape(len(kernels.COLLECTIVES), shared_memory.SIZE_CLASSES, -1)
    for name, nbytes in (("allreduce", 16384), ("bcast", 1 << 16), ("reduce", 100_000), ("bcast", 1 << 24)):
        row = rows[kernels.COLLECTIVES.index(name), nbytes.bit_length() :]
        state, line = np.zeros((), records.STATE_RECORD), np.zeros((), records.LINE_RECORD)
        state["slot"], state["way"] = slot, 1
        state["slot_stride"] = shared_memory.slot_stride(nbytes, slot)
        blocks, used = -(-nbytes // slot), set[int]()
        for call in range(300):
            kernels.begin_probe(row.ctypes.data, line.ctypes.data, state.ctypes.data)
            if state["probe"]:
                break
            assert state["nontemporal_fill"] == (nbytes >= 1 << 16)
            used |= {kernels.slot_of(state.ctypes.data, 0, call * blocks + k) for k in range(blocks)}
        size = int(state["slot_stride"])
        assert len(used) == records.RING * slot // size, (name, nbytes)


@pytest.mark.parametrize("arity", [1, 2, 8])
@pytest.mark.parametrize("placement", [(1, 1), (2, 1), (2, 4), (8, 2)])
@pytest.mark.parametrize("p", [1, 2, 3, 5, 16, 31, 128])
def test_a_tree_joins_all_ranks_and_crosses_caches_as_seldom_as_possible(
    p: int, placement: tuple[int, int], arity: int
) -> None:
    packages, groups = placement
    rng = np.random.default_rng(p)
    where = rng.integers(packages * groups, size=p)
    places = [Place(str(each // groups), str(each // max(1, groups // 2)), str(each)) for each in where]
    parents = shared_memory.parents_of(places, arity)
    assert parents[0] == -1
    assert all(0 <= parents[r] < r for r in range(1, p))  # so that there is no cycle
    for level in range(len(Place._fields)):
        crossings = sum(places[r][level] != places[parents[r]][level] for r in range(1, p))
        assert crossings == len({each[level] for each in places}) - 1
    assert max(parents.count(r) for r in range(p)) <= 4 * arity


# The layout


def fields_of(layout: np.dtype[Any], start: int = 0) -> list[tuple[int, int]]:
    """First byte and end of every field, those of nested records and of each entry of an array included."""
    if layout.subdtype is not None:
        base, shape = layout.subdtype
        count = int(np.prod(shape))
        return (
            [each for i in range(count) for each in fields_of(base, start + i * base.itemsize)]
            if base.names
            else [(start, start + layout.itemsize)]
        )
    if layout.fields is None:
        return [(start, start + layout.itemsize)]
    return [each for kind, at, *_ in layout.fields.values() for each in fields_of(kind, start + at)]


LAYOUTS = {name: each for name, each in vars(records).items() if isinstance(each, np.dtype)}


@pytest.mark.parametrize("name", [*LAYOUTS, "region"])
def test_no_two_fields_of_a_record_overlap(name: str) -> None:
    layout = records.region_record(1 << 17) if name == "region" else LAYOUTS[name]
    places = sorted(fields_of(layout))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert all(hi - lo != records.W or lo % records.W == 0 for lo, hi in places)
    assert places[-1][1] <= layout.itemsize
    assert layout.itemsize % records.W == 0


def test_compiled_code_uses_every_field_of_its_records_and_no_other() -> None:
    source = Path(kernels.__file__).read_text()
    for layout in ("REGION", "LINE", "STATE", "CALL", "TUNING"):
        record = LAYOUTS[f"{layout}_RECORD"]
        used = set(re.findall(rf"\b{layout}\.(\w+)", source))
        assert used == set(record.names) - {"REGION": {"lines", "unused"}, "LINE": {"number"}}.get(layout, set()), (
            layout
        )
        assert all(getattr(getattr(kernels, layout), name) == record.fields[name][1] for name in used)


def test_words_that_different_ranks_write_share_no_cache_line() -> None:
    for slot in (1 << 17, 1 << 18):
        region = records.region_record(slot)
        assert region.itemsize % records.PAGE == 0  # so the regions of two ranks share no line
    layout = records.REGION_RECORD
    for name in ("lines", "published", "finished", "abandoned", "pid", "gathered", "released", "buffers"):
        assert layout.fields[name][1] % records.LINE_BYTES == 0, name
    assert records.LINE_RECORD.itemsize == records.LINE_BYTES
    assert kernels.LINE.fingerprint == 64  # what small calls read is one cache line
    assert kernels.SLOTS % records.PAGE == kernels.REGION.buffers % records.PAGE == 0


@pytest.mark.mpi
def test_allocated_bytes_are_those_of_the_records(comm: MPI.Intracomm) -> None:
    with open_memory(comm, "numpy") as shared:
        region = records.region_record(shared_memory.slot_bytes(comm.size))
        assert len(shared._segment.buffer) == comm.size * region.itemsize
        assert region.fields["slots"][1] == kernels.SLOTS
        assert shared._state.nbytes == records.STATE_RECORD.itemsize
        call = shared._call(("test",), 1, rows=[7] * 2 * comm.size)
        assert call.nbytes == kernels.TABLE
        words = [kernels.load(call.ctypes.data + kernels.TABLE + records.W * i) for i in range(3 * comm.size)]
        assert words == [0] * comm.size + [7] * 2 * comm.size
        assert (
            shared._tuning.nbytes
            == len(kernels.COLLECTIVES) * shared_memory.SIZE_CLASSES * records.TUNING_RECORD.itemsize
        )
