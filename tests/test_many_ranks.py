"""Small calls of up to 128 ranks of one node: every interleaving gives the bits of rank order, and few lines cross."""

from __future__ import annotations

import numpy as np
import pytest
from one_process import FLAT, TREES, Call, OneProcess, advance_in_any_order, bind, count_lines, open_ranks

from hpccomm.backends import shared_memory
from hpccomm.backends.shared_memory import SharedMemory, plant_tree, slot_bytes
from hpccomm.kernels.shared_memory import collectives as kernels
from hpccomm.kernels.shared_memory import records
from hpccomm.performance.machine import DEFAULTS, LIMITS
from hpccomm.performance.probe import Place
from hpccomm.transports import segment

KINDS = ("allreduce", "reduce", "reduce_scatter", "allgather", "bcast", "barrier")


def draw_calls(p: int, number: int, shared: SharedMemory) -> list[Call]:
    """Calls of one barrier: lengths around those at which the way of a call changes."""
    rng, calls = np.random.default_rng(p), []
    for seed in range(number):
        dtype = str(rng.choice(["f4", "f8", "i2", "i4", "f2"]))
        item = np.dtype(dtype).itemsize
        limits = (records.PAYLOAD_BYTES // p, records.PAYLOAD_BYTES, records.BUFFER // p, shared.parameters.in_tree)
        n = max(0, (int(rng.choice(limits)) + int(rng.integers(-1, 2)) * item) // item)
        kind = str(rng.choice(KINDS))
        buffered = {"reduce_scatter": records.BUFFER // p, "allgather": records.BUFFER, "bcast": records.BUFFER}
        most = buffered.get(kind, shared._direct_sum)
        op = str(rng.choice(["sum", "max", "prod"]))
        calls.append(Call(kind, min(n, most // item), int(rng.integers(p)), dtype, op, seed))
    return calls


@pytest.mark.parametrize("way", TREES)
@pytest.mark.parametrize("p", [2, 3, 5, 7, 8, 16, 33, 64, 128])
def test_small_calls_of_any_number_of_ranks_have_the_bits_of_rank_order(p: int, way: str) -> None:
    with open_ranks(p, TREES[way]) as ranks:
        advance_in_any_order(ranks, draw_calls(p, 400 // p + 10, ranks[0]))


@pytest.mark.parametrize("p", [2, 5, 8])
def test_python_and_machine_code_follow_one_source(p: int) -> None:
    with open_ranks(p, TREES["pairs"], "numpy") as ranks:
        advance_in_any_order(ranks, draw_calls(p, 60, ranks[0]))


@pytest.mark.parametrize("seed", range(6))
def test_ranks_may_be_anywhere_on_the_machine(seed: int) -> None:
    """Ranks that are near each other need not have neighbouring numbers."""
    rng, p = np.random.default_rng(seed), 24
    places = [Place(*map(str, (q // 4, q // 2, q))) for q in rng.integers(8, size=p)]
    with open_ranks(p, TREES["eights"], places=places) as ranks:
        advance_in_any_order(ranks, draw_calls(p, 40, ranks[0]))


@pytest.mark.parametrize("way", TREES)
@pytest.mark.parametrize("culprit", [0, 1, 6, 10])
def test_one_different_call_is_a_mismatch_on_all_ranks_and_writes_nothing(culprit: int, way: str) -> None:
    p, call, other = 11, Call("allreduce", 5), Call("allgather", 5)
    with open_ranks(p, TREES[way]) as ranks:
        for word in (1, 2):
            mine = [other if rank == culprit else call for rank in range(p)]
            bound = [bind(ranks[rank], each, word, each.result(p)) for rank, each in enumerate(mine)]
            before = [each.out.copy() for each in bound]
            codes = dict.fromkeys(range(p), kernels.RETRY)
            while kernels.RETRY in codes.values():
                codes |= {r: bound[r].plan.kernel(bound[r].plan.address) for r in codes if codes[r] == kernels.RETRY}
            assert set(codes.values()) == {kernels.MISMATCH}
            assert all((each.out == old).all() for each, old in zip(bound, before, strict=True))
            advance_in_any_order(ranks, draw_calls(p, 4, ranks[0]))


@pytest.mark.parametrize("way", TREES)
@pytest.mark.parametrize("p", [2, 5, 24])
def test_all_lengths_that_one_record_serves_go_the_same_way(p: int, way: str) -> None:
    with open_ranks(p, TREES[way]) as ranks:
        assert ranks[0].lengths("gather", 8)[0] <= 8  # not a collective of shared memory
        for drawn in draw_calls(p, 200, ranks[0]):
            call = drawn._replace(dtype="i1", seed=0, n=drawn.n % 2000)
            plan = bind(ranks[0], call, 1, call.result(p)).plan
            if plan.lengths is None or not plan.sized + plan.table:
                continue
            for n in plan.lengths[0], min(plan.lengths[1], records.BUFFER):
                other = bind(ranks[0], call._replace(n=n), 1, call._replace(n=n).result(p)).plan
                assert (other.call["protocol"], other.call["carries"]) == (plan.call["protocol"], plan.call["carries"])


@pytest.mark.parametrize("arity", [1, 2, 8])
@pytest.mark.parametrize("p", [2, 3, 5, 16, 31, 128])
def test_the_places_of_a_tree_are_those_of_all_ranks_below(p: int, arity: int) -> None:
    rng = np.random.default_rng(p)
    places = [Place(str(q // 8), str(q // 4), str(q)) for q in rng.integers(16, size=p)]
    parents = shared_memory.parents_of(places, arity)
    below: list[set[int]] = [{q} for q in range(p)]
    for q in range(p - 1, 0, -1):
        below[parents[q]] |= below[q]
    for rank in range(p):
        state = np.zeros((), records.STATE_RECORD)
        state["rank"] = rank
        words = plant_tree(state, parents)
        order, rows = words[:p], words[p:].reshape(-1, 2)
        assert order[0] == 0
        assert set(order[state["first"] : state["end"]]) == below[rank]
        begin = int(state["first"]) + 1
        for child, end in rows:
            assert parents[child] == rank
            assert set(order[begin:end]) == below[child]
            begin = int(end)
        assert begin == state["end"]


# Memory


@pytest.mark.parametrize("most", [LIMITS["slot"][0], DEFAULTS.slot])
@pytest.mark.parametrize("p", [2, 8, 16, 32, 64, 128, 256, 1024])
def test_the_memory_of_a_node_is_linear_in_its_ranks_and_its_slots_are_bounded(p: int, most: int) -> None:
    slot = slot_bytes(p, most)
    assert slot & slot - 1 == 0
    assert slot <= most or slot < 2 * kernels.ALIGNMENT * p
    assert slot // p // kernels.ALIGNMENT > 0  # an all-to-all has a block for each rank in a slot
    assert records.RING * slot * p <= max(shared_memory.ALL_SLOTS, 2 * records.RING * kernels.ALIGNMENT * p * p)
    rest = records.region_record(slot).itemsize - records.RING * slot
    assert rest == records.PAGE + 2 * records.BUFFER


@pytest.mark.parametrize("p", [2, 3, 8, 64])
def test_every_rank_reserves_the_pages_of_its_own_region(p: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is near the rank that touches it first."""
    region = records.region_record(slot_bytes(p)).itemsize
    reserved: list[tuple[int, int]] = []
    monkeypatch.setattr(segment.os, "posix_fallocate", lambda file, first, n: reserved.append((first, n)))
    monkeypatch.setattr(segment.mmap, "mmap", lambda file, size: None)
    for rank in range(p):
        segment.map_share(OneProcess(rank, p, ()), -1, p * region)
    assert reserved == [(rank * region, region) for rank in range(p)]


# Lines that cross from core to core


SMALL = [Call(kind, 2) for kind in ("allreduce", "reduce", "reduce_scatter", "allgather", "bcast", "barrier")]


@pytest.mark.parametrize("call", SMALL, ids=[call.kind for call in SMALL])
def test_a_rank_in_a_tree_reads_a_few_lines_whatever_the_number_of_ranks(call: Call) -> None:
    data = 8 if call.kind in ("allgather", "reduce_scatter") else 1  # lines of what comes down, or goes up
    lines, _ = count_lines(64, TREES["eights"], call)
    assert lines <= 64 * (3 + 3 * data)
    assert count_lines(64, FLAT, call)[0] >= 64 * 63
