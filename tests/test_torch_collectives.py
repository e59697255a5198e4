"""Every collective of torch.distributed, with every dtype, synchronous and asynchronous."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial, reduce
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from torch_world import COMPLEX, FLOATS, INTEGERS, MOVED, SHAPES, dist, numbers, process_group, same, torch

from hpccomm.errors import ArgumentError, MismatchError, TransportError
from hpccomm.transports.polling import await_request

pytestmark = pytest.mark.mpi(sizes=(1, 2, 3, 4))

Op = dist.ReduceOp
FOLDS: dict[Any, Callable[..., Any]] = {
    Op.SUM: torch.add,
    Op.PRODUCT: torch.mul,
    Op.MIN: torch.minimum,
    Op.MAX: torch.maximum,
    Op.BAND: torch.bitwise_and,
    Op.BOR: torch.bitwise_or,
    Op.BXOR: torch.bitwise_xor,
}
ON_BOOLS = {Op.SUM: torch.logical_or, Op.PRODUCT: torch.logical_and}
ORDERED = (Op.SUM, Op.PRODUCT, Op.MIN, Op.MAX)
BITS = (Op.BAND, Op.BOR, Op.BXOR)
REDUCTIONS = [
    *((op, dtype) for dtype in (*FLOATS, *INTEGERS) for op in ORDERED),
    *((op, dtype) for dtype in COMPLEX for op in (Op.SUM,)),
    *((op, dtype) for dtype in INTEGERS for op in BITS),
    *((op, torch.bool) for op in (*ORDERED, *BITS)),
    *((Op.AVG, dtype) for dtype in (*FLOATS, *COMPLEX)),
]


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.").removeprefix("RedOpType.")


def finish(work: Any, asynchronous: bool) -> None:
    """A call has a handle if it is asynchronous, and only then."""
    assert (work is not None) == asynchronous
    if work is not None:
        work.wait()
        assert work.is_completed()
        assert work.is_success()


def fold(op: Any, dtype: Any, tensors: list[Any]) -> Any:
    """What every rank should have: 16-bit floats are added in float32 and rounded once."""
    if op == Op.AVG and dtype in COMPLEX:  # real and imaginary parts are divided each for itself
        return torch.view_as_complex(fold(op, None, [torch.view_as_real(each) for each in tensors]))
    if op == Op.AVG and dtype is None:
        return reduce(torch.add, tensors) / len(tensors)
    if op == Op.AVG:
        wide = [each.to(torch.float32) if dtype in FLOATS[:2] else each for each in tensors]
        return (reduce(torch.add, wide) / len(tensors)).to(dtype)
    if dtype == torch.bool and op in ON_BOOLS:
        return reduce(ON_BOOLS[op], tensors)
    if dtype in (torch.uint16, torch.uint32, torch.uint64):  # torch itself cannot add them
        return reduce(FOLDS[op], [each.to(torch.int64) for each in tensors]).to(dtype)
    return reduce(FOLDS[op], tensors)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def asynchronous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize(("op", "dtype"), REDUCTIONS, ids=name_of)
def test_all_reductions_are_exact(op: Any, dtype: Any, asynchronous: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for shape in SHAPES:
        x = numbers(rank, shape, dtype)
        total = fold(op, dtype, [numbers(r, shape, dtype) for r in range(size)])
        finish(dist.all_reduce(x, op, async_op=asynchronous), asynchronous)
        assert same(x, total)
        root = size - 1
        x = numbers(rank, shape, dtype)
        finish(dist.reduce(x, root, op, async_op=asynchronous), asynchronous)
        assert same(x, total if rank == root else numbers(rank, shape, dtype))
        parts = [numbers(rank + q, shape, dtype) for q in range(size)]
        mine = torch.empty(shape, dtype=dtype)
        finish(dist.reduce_scatter(mine, parts, op, async_op=asynchronous), asynchronous)
        assert same(mine, fold(op, dtype, [numbers(rank + q, shape, dtype) for q in range(size)]))
        if shape:
            row, mine = torch.cat(parts), torch.empty(shape, dtype=dtype)
            finish(dist.reduce_scatter_tensor(mine, row, op, async_op=asynchronous), asynchronous)
            assert same(mine, fold(op, dtype, [numbers(rank + q, shape, dtype) for q in range(size)]))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("factor", [0.5, torch.tensor([2.0])], ids=["number", "tensor"])
def test_premultiplied_sums(dtype: Any, factor: Any, asynchronous: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    op, shape = dist._make_nccl_premul_sum(factor), (3, 5)
    x = numbers(rank, shape, dtype)
    total = reduce(torch.add, [numbers(r, shape, dtype).double() * float(factor) for r in range(size)]).to(dtype)
    finish(dist.all_reduce(x, op, async_op=asynchronous), asynchronous)
    assert same(x, total)
    mine = torch.empty(shape, dtype=dtype)
    finish(dist.reduce_scatter_tensor(mine, torch.cat([x] * size), op, async_op=asynchronous), asynchronous)
    assert same(mine, (x.double() * float(factor) * size).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=name_of)
def test_16_bit_floats_are_added_in_float32(dtype: Any, asynchronous: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    large = 2048 if dtype == torch.float16 else 256  # where the next number of the dtype is 2 away
    x = torch.tensor([large if rank == 0 else 1.0], dtype=dtype)
    finish(dist.all_reduce(x, async_op=asynchronous), asynchronous)
    assert same(x, torch.tensor([large + size - 1.0]).to(dtype))


@pytest.mark.parametrize("dtype", MOVED, ids=name_of)
def test_all_moves_keep_the_bytes(dtype: Any, asynchronous: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for shape in SHAPES:
        everyone = [numbers(r, shape, dtype) for r in range(size)]
        own, root = everyone[rank].clone(), size - 1
        x = own.clone()
        finish(dist.broadcast(x, root, async_op=asynchronous), asynchronous)
        assert same(x, everyone[root])
        found = [torch.empty_like(own) for _ in range(size)]
        finish(dist.all_gather(found, own, async_op=asynchronous), asynchronous)
        assert all(map(same, found, everyone))
        found = [torch.empty_like(own) for _ in range(size)]
        finish(dist.gather(own, found if rank == root else None, root, async_op=asynchronous), asynchronous)
        assert rank != root or all(map(same, found, everyone))
        x = torch.empty_like(own)
        finish(dist.scatter(x, everyone if rank == root else None, root, async_op=asynchronous), asynchronous)
        assert same(x, own)
        found = [torch.empty_like(own) for _ in range(size)]
        sent = [numbers(rank + 2 * q, shape, dtype) for q in range(size)]
        finish(dist.all_to_all(found, sent, async_op=asynchronous), asynchronous)
        assert all(map(same, found, [numbers(q + 2 * rank, shape, dtype) for q in range(size)]))
        assert same(own, everyone[rank])


@pytest.mark.parametrize("dtype", [each for each in MOVED if each != torch.complex32], ids=name_of)
def test_moves_into_one_tensor_keep_the_bytes(dtype: Any, asynchronous: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for shape in (each for each in SHAPES if each):
        own, everyone = numbers(rank, shape, dtype), [numbers(r, shape, dtype) for r in range(size)]
        whole = torch.cat([each.view(torch.uint8) if each.dim() else each for each in everyone]).view(dtype)
        row = torch.empty((size * shape[0], *shape[1:]), dtype=dtype)
        finish(dist.all_gather_into_tensor(row, own, async_op=asynchronous), asynchronous)
        assert same(row, whole)
        row = torch.empty_like(row)
        sent = torch.cat([numbers(rank + 2 * q, shape, dtype).view(torch.uint8) for q in range(size)]).view(dtype)
        finish(dist.all_to_all_single(row, sent, async_op=asynchronous), asynchronous)
        parts = [numbers(q + 2 * rank, shape, dtype).view(torch.uint8) for q in range(size)]
        assert same(row, torch.cat(parts).view(dtype))


def test_torchs_forms_for_one_tensor() -> None:
    rank, size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    own, root = torch.full((3,), rank + 1.0), size - 1
    everyone, total = [torch.full((3,), r + 1.0) for r in range(size)], size * (size + 1) / 2
    x = own.clone()
    group.allreduce(x).wait()
    assert torch.equal(x, torch.full((3,), total))
    for options in ((Op.MAX,), (Op(Op.MAX),)):
        x = own.clone()
        group.allreduce(x, *options).wait()
        assert torch.equal(x, everyone[-1])
    for named in ({"op": Op.MIN}, {"op": Op.MIN, "timeout": timedelta(seconds=60)}):
        x = own.clone()
        group.allreduce([x], **named).wait()
        assert torch.equal(x, everyone[0])
    x = own.clone()
    group.broadcast(x, root).wait()
    assert torch.equal(x, everyone[root])
    for arguments, named, result in (((), {"root": root}, total), ((root, Op.MAX), {}, float(size))):
        x = own.clone()
        group.reduce(x, *arguments, **named).wait()
        assert rank != root or torch.equal(x, torch.full((3,), result))
    gathered = [torch.zeros(3) for _ in range(size)]
    group.allgather(gathered, own).wait()
    assert all(map(torch.equal, gathered, everyone))
    gathered = [torch.zeros(3) for _ in range(size)] if rank == root else []
    group.gather(gathered, own, root=root).wait()
    assert rank != root or all(map(torch.equal, gathered, everyone))
    x = torch.zeros(3)
    group.scatter(x, everyone if rank == root else [], root).wait()
    assert torch.equal(x, own)
    group.reduce_scatter(x, everyone, Op.SUM).wait()
    assert torch.equal(x, own * size)
    group.reduce_scatter(x, everyone).wait()
    assert torch.equal(x, own * size)


def test_blocks_of_different_lengths(asynchronous: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    shapes = [(r, 3) for r in range(size)]
    found = [torch.empty(shape) for shape in shapes]
    finish(dist.all_gather(found, numbers(rank, shapes[rank], torch.float32), async_op=asynchronous), asynchronous)
    assert all(same(each, numbers(r, shapes[r], torch.float32)) for r, each in enumerate(found))
    mine = torch.empty(shapes[rank])
    finish(dist.reduce_scatter(mine, [torch.ones(shape) for shape in shapes], async_op=asynchronous), asynchronous)
    assert same(mine, torch.full(shapes[rank], float(size)))
    sends, receives = [rank + q for q in range(size)], [rank + q for q in range(size)]
    row = torch.arange(sum(sends) * 2.0).reshape(-1, 2) + 100 * rank
    got = torch.empty(sum(receives), 2)
    finish(dist.all_to_all_single(got, row, receives, sends, async_op=asynchronous), asynchronous)
    firsts = [sum(q + k for k in range(rank)) for q in range(size)]
    rows = [torch.arange(2.0 * sum(q + k for k in range(size))).reshape(-1, 2) + 100 * q for q in range(size)]
    assert same(got, torch.cat([rows[q][firsts[q] : firsts[q] + receives[q]] for q in range(size)]))


def test_tensors_that_are_not_dense(asynchronous: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(4, 6)
    views = [whole[:, ::2], whole.t(), whole[1:3, 1:5]]
    for x in views:
        x.copy_(numbers(rank, tuple(x.shape), torch.float32))
        finish(dist.all_reduce(x, async_op=asynchronous), asynchronous)
        assert torch.equal(x, sum(numbers(r, tuple(x.shape), torch.float32) for r in range(size)))
        x.copy_(numbers(rank, tuple(x.shape), torch.float32))
        finish(dist.broadcast(x, 0, async_op=asynchronous), asynchronous)
        assert torch.equal(x, numbers(0, tuple(x.shape), torch.float32))
        row = torch.empty(size, *x.shape).transpose(0, 1)
        outputs = [row[:, r] for r in range(size)]
        x.copy_(numbers(rank, tuple(x.shape), torch.float32))
        finish(dist.all_gather(outputs, x, async_op=asynchronous), asynchronous)
        assert all(torch.equal(each, numbers(r, tuple(x.shape), torch.float32)) for r, each in enumerate(outputs))
    z = torch.complex(torch.ones(3), torch.full((3,), float(rank))).conj()
    finish(dist.reduce(z, 0, async_op=asynchronous), asynchronous)
    if rank == 0:
        assert torch.equal(z.resolve_conj().imag, torch.full((3,), -size * (size - 1) / 2))
    weight = torch.nn.Parameter(numbers(rank, (3, 5), torch.float32))
    finish(dist.all_reduce(weight.data, async_op=asynchronous), asynchronous)
    finish(dist.broadcast(weight, 0, async_op=asynchronous), asynchronous)
    assert torch.equal(weight, sum(numbers(r, (3, 5), torch.float32) for r in range(size)))


def test_gathers_in_place_and_into_overlapping_memory(asynchronous: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone = torch.cat([numbers(r, (5,), torch.float32) for r in range(size)])
    row = torch.zeros(5 * size)
    row[5 * rank : 5 * rank + 5] = numbers(rank, (5,), torch.float32)
    finish(dist.all_gather_into_tensor(row, row[5 * rank : 5 * rank + 5], async_op=asynchronous), asynchronous)
    assert torch.equal(row, everyone)
    row = torch.zeros(5 * size)
    elsewhere = row[:5]
    elsewhere.copy_(numbers(rank, (5,), torch.float32))
    finish(dist.all_gather_into_tensor(row, elsewhere, async_op=asynchronous), asynchronous)
    assert torch.equal(row, everyone)
    row[5 * rank : 5 * rank + 5] = numbers(rank, (5,), torch.float32)
    chunks = list(row.chunk(size))
    finish(dist.all_gather(chunks, chunks[rank], async_op=asynchronous), asynchronous)
    assert torch.equal(row, everyone)
    row = torch.ones(5 * size)
    finish(dist.reduce_scatter_tensor(row[5 * rank : 5 * rank + 5], row, async_op=asynchronous), asynchronous)
    assert torch.equal(row[5 * rank : 5 * rank + 5], torch.full((5,), float(size)))
    row = torch.arange(2.0 * size) + 100 * rank
    finish(dist.all_to_all_single(row, row, async_op=asynchronous), asynchronous)
    assert torch.equal(row, torch.cat([torch.arange(2.0) + 2 * rank + 100 * q for q in range(size)]))


def test_calls_coalesced() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    for asynchronous in (False, True):
        xs = [torch.full((n,), rank + 1.0) for n in (1, 3, 0)]
        with dist._coalescing_manager(async_ops=asynchronous) as manager:
            for x in xs:
                dist.all_reduce(x)
        if asynchronous:
            manager.wait()
        assert all(torch.equal(x, torch.full_like(x, size * (size + 1) / 2)) for x in xs)
        rows = [torch.empty(size * n) for n in (2, 3)]
        with dist._coalescing_manager(async_ops=asynchronous) as manager:
            for row in rows:
                dist.all_gather_into_tensor(row, torch.full((len(row) // size,), float(rank)))
        if asynchronous:
            manager.wait()
        assert all(torch.equal(row, torch.arange(float(size)).repeat_interleave(len(row) // size)) for row in rows)
        parts = [torch.empty(n) for n in (2, 3)]
        with dist._coalescing_manager(async_ops=asynchronous) as manager:
            for part in parts:
                dist.reduce_scatter_tensor(part, torch.arange(float(size)).repeat_interleave(len(part)))
        if asynchronous:
            manager.wait()
        assert all(torch.equal(part, torch.full_like(part, float(rank * size))) for part in parts)
    lists = [[torch.empty(2), torch.empty(3)] for _ in range(size)]
    group.allgather_coalesced(lists, [torch.full((2,), float(rank)), torch.full((3,), rank + 0.5)]).wait()
    assert all(torch.equal(two, torch.full((2,), float(r))) for r, (two, _) in enumerate(lists))
    assert all(torch.equal(three, torch.full((3,), r + 0.5)) for r, (_, three) in enumerate(lists))


COALESCED: dict[str, Callable[[int, int], Any]] = {
    "all_reduce": lambda rank, size: dist.all_reduce(torch.ones(8 + rank % 2)),
    "all_gather": lambda rank, size: dist.all_gather_into_tensor(
        torch.ones(size * (8 + rank % 2)), torch.ones(8 + rank % 2)
    ),
    "reduce_scatter": lambda rank, size: dist.reduce_scatter_tensor(
        torch.ones(8 + rank % 2), torch.ones(size * (8 + rank % 2))
    ),
    "broadcast": lambda rank, size: dist.broadcast(torch.ones(8 + rank % 2), 0, async_op=True),
}


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", COALESCED)
def test_the_end_of_coalesced_calls_raises_their_error(name: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        COALESCED[name](rank, size)
    with pytest.raises(MismatchError, match=r"rank 0 called.*rank 1 called|ranks 0, 2 called"):
        manager.wait()
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        COALESCED[name](0, size)
    manager.wait()


@pytest.mark.mpi(sizes=(2,))
def test_the_end_of_coalesced_calls_keeps_no_later_call_waiting() -> None:
    rank, x, y = dist.get_rank(), torch.ones(3), torch.ones(4)
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        if rank == 0:
            dist.irecv(x, 1)
    dist.all_reduce(y)
    if rank == 1:
        dist.send(torch.full((3,), 5.0), 0)
    manager.wait()
    assert (x[0], y[0]) == (5 if rank == 0 else 1, 2)


def ones(count: int) -> list[Any]:
    return [torch.ones(4) for _ in range(count)]


def zeros(count: int) -> list[Any]:
    return [torch.zeros(4) for _ in range(count)]


LISTS: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[list[Any], list[Any]]]]] = {
    "allreduce": (lambda group, out, given: group.allreduce(out), lambda size: (ones(2), [])),
    "allreduce_coalesced": (lambda group, out, given: group.allreduce_coalesced(out), lambda size: (ones(2), [])),
    "reduce": (lambda group, out, given: group.reduce(out, 0), lambda size: (ones(1), [])),
    "broadcast": (lambda group, out, given: group.broadcast(out, 0), lambda size: (ones(1), [])),
    "reduce_scatter": (
        lambda group, out, given: group.reduce_scatter(out, [given]),
        lambda size: (zeros(1), ones(size)),
    ),
    "reduce_scatter of one": (
        lambda group, out, given: group.reduce_scatter(out[0], given),
        lambda size: (zeros(1), ones(size)),
    ),
    "reduce_scatter_tensor_coalesced": (
        lambda group, out, given: group.reduce_scatter_tensor_coalesced(out, given),
        lambda size: (zeros(1), [torch.ones(4 * size)]),
    ),
    "allgather": (lambda group, out, given: group.allgather([out], given), lambda size: (zeros(size), ones(1))),
    "allgather of one": (
        lambda group, out, given: group.allgather(out, given[0]),
        lambda size: (zeros(size), ones(1)),
    ),
    "allgather_coalesced": (
        lambda group, out, given: group.allgather_coalesced([[each] for each in out], given),
        lambda size: (zeros(size), ones(1)),
    ),
    "allgather_into_tensor_coalesced": (
        lambda group, out, given: group.allgather_into_tensor_coalesced(out, given),
        lambda size: ([torch.zeros(4 * size)], ones(1)),
    ),
    "gather": (
        lambda group, out, given: group.gather([out] if group.rank() == 0 else [], given),
        lambda size: (zeros(size), ones(1)),
    ),
    "scatter": (
        lambda group, out, given: group.scatter(out, [given] if group.rank() == 0 else []),
        lambda size: (zeros(1), ones(size)),
    ),
    "alltoall": (lambda group, out, given: group.alltoall(out, given), lambda size: (zeros(size), ones(size))),
}
"""Calls with lists, and the tensors that they write and read."""


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", LISTS)
def test_a_list_may_be_changed_while_its_call_is_under_way(name: str) -> None:
    call, make = LISTS[name]
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    out, given = make(dist.get_world_size())
    tensors = list(out)
    if rank == last:
        wait_until_given_up(last)
    before = dist.all_reduce(torch.ones(4), async_op=True)
    work = call(dist.group.WORLD, out, given)
    out.clear()
    given.clear()
    if rank != last:
        give_up(last)
    before.wait()
    work.wait()
    assert (name == "gather" and rank) or all(float(each.min()) >= 1 for each in tensors)


@pytest.mark.parametrize("dtype", MOVED, ids=name_of)
def test_messages(dtype: Any) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return
    after, before = (rank + 1) % size, (rank - 1) % size
    for shape in SHAPES:
        x, y = numbers(rank, shape, dtype), torch.empty(shape, dtype=dtype)
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, y, before)])
        for work in works:
            work.wait()
        assert same(y, numbers(before, shape, dtype))
    if rank == 0:
        for k in range(1, size):
            y = torch.empty(3)
            source = dist.recv(y, tag=5)
            assert torch.equal(y, torch.full((3,), float(source)))
            dist.send(torch.tensor([float(k)]), source, tag=7)
    else:
        dist.send(torch.full((3,), float(rank)), 0, tag=5)
        y = torch.empty(1)
        assert dist.recv(y, 0, tag=7) == 0
        assert 1 <= float(y) < size


def test_a_message_into_a_view_and_one_of_another_length() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return
    whole = torch.zeros(4, 4)
    if rank == 0:
        dist.send(torch.arange(4.0), 1)
        dist.send(torch.arange(3.0), 1)
        dist.send(torch.arange(9.0), 1)
    elif rank == 1:
        dist.recv(whole[:, 1], 0)
        assert torch.equal(whole[:, 1], torch.arange(4.0))
        assert whole.sum() == 6
        with pytest.raises(MismatchError, match=r"recv of 16 bytes.*rank 0 has sent 12"):
            dist.recv(torch.empty(4), 0)
        with pytest.raises(MismatchError, match=r"recv of 16 bytes.*from rank 0 got a longer message"):
            dist.recv(torch.empty(4), 0)
    dist.barrier()


@pytest.mark.parametrize(("count", "dtype"), [(1001, torch.float32), (1001, torch.uint8), (2048, torch.uint8)])
def test_messages_longer_than_mpi_counts(count: int, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpccomm.torch import messages

    monkeypatch.setattr(messages, "MOST_BYTES", 1000)
    monkeypatch.setattr(messages, "UNIT_BYTES", 64)
    rank, size = dist.get_rank(), dist.get_world_size()
    if size > 1 and rank == 0:
        for length in (count, 3, count - 1, count + 1):
            dist.send(numbers(0, (length,), dtype), 1)
    elif rank == 1:
        x = torch.empty(count, dtype=dtype)
        dist.recv(x, 0)
        assert same(x, numbers(0, (count,), dtype))
        for length in (3, count - 1):
            with pytest.raises(MismatchError, match=rf"rank 0 has sent {length * dtype.itemsize}:"):
                dist.recv(x, 0)
        with pytest.raises(MismatchError, match="got a longer message"):
            dist.recv(x, 0)
    dist.barrier()


def test_objects() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    found: list[Any] = [None] * size
    dist.all_gather_object(found, {"rank": rank, "text": "x" * rank})
    assert found == [{"rank": r, "text": "x" * r} for r in range(size)]
    words = ["a", {"b": 2}] if rank == size - 1 else [None, None]
    dist.broadcast_object_list(words, size - 1)
    assert words == ["a", {"b": 2}]
    out: list[Any] = [None]
    dist.scatter_object_list(out, [r * r for r in range(size)] if rank == 0 else None, 0)
    assert out == [rank * rank]
    gathered: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(rank, gathered, 0)
    assert gathered in (None, list(range(size)))


def test_groups_and_meshes() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(list(range(0, size, 2)))
    if rank % 2 == 0:
        x = torch.tensor([float(rank)])
        dist.all_reduce(x, group=group)
        assert float(x) == sum(range(0, size, 2))
        y = torch.tensor([float(rank)])
        dist.broadcast(y, 0, group=group)
        assert float(y) == 0
        assert dist.get_backend(group) == "hpccomm"
        assert dist.get_process_group_ranks(group) == list(range(0, size, 2))
        dist.destroy_process_group(group)
    if size == 4:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        x = torch.tensor([float(rank)])
        dist.all_reduce(x, group=mesh.get_group("shard"))
        assert float(x) == (1 if rank < 2 else 5)
        dist.all_reduce(x, group=mesh.get_group("replicate"))
        assert float(x) == 6
        for name in ("shard", "replicate"):
            dist.destroy_process_group(mesh.get_group(name))


def test_functional_collectives() -> None:
    import torch.distributed._functional_collectives as functional

    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = list(range(size))
    x = torch.full((size,), rank + 1.0)
    assert torch.equal(functional.all_reduce(x, "sum", ranks), torch.full((size,), size * (size + 1) / 2))
    assert torch.equal(functional.all_gather_tensor(x[:1], 0, ranks), torch.arange(1.0, size + 1))
    assert torch.equal(functional.reduce_scatter_tensor(x, "sum", 0, ranks), torch.tensor([size * (size + 1) / 2]))
    assert torch.equal(functional.broadcast(x, size - 1, ranks), torch.full((size,), float(size)))
    moved = functional.all_to_all_single(torch.arange(float(size)) + 10 * rank, None, None, ranks)
    assert torch.equal(moved, torch.arange(float(size)) * 10 + rank)


def test_sparse_tensors() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.sparse_coo_tensor([[rank, 7]], [1.0, 2.0], (8,)) if rank else torch.sparse_coo_tensor(size=(8,))
    dist.all_reduce(x)
    expected = torch.zeros(8)
    expected[1:size] = 1
    expected[7] += 2 * (size - 1)
    assert torch.equal(x.to_dense(), expected)
    with pytest.raises(ArgumentError, match="can be summed and averaged only"):
        dist.all_reduce(x, Op.MAX)


def test_asynchronous_calls_run_in_the_order_of_issue() -> None:
    size = dist.get_world_size()
    x = torch.ones(1000)
    works = [dist.all_reduce(x, async_op=True) for _ in range(3)]
    dist.all_reduce(x)  # queues behind them
    assert all(work.is_completed() for work in works)
    assert torch.equal(x, torch.full((1000,), float(size**4)))
    future = dist.all_reduce(x, async_op=True).get_future()
    assert future.wait()[0] is x
    assert torch.equal(x, torch.full((1000,), float(size**5)))


def test_one_rank_may_wait_at_once_where_another_waits_later() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    xs = [torch.ones(3) for _ in range(4)]
    works = [dist.all_reduce(x, async_op=(rank + k) % 2 == 0) for k, x in enumerate(xs)]
    for work in works:
        if work is not None:
            work.wait()
    assert all(float(x[0]) == size for x in xs)
    group = dist.new_group()
    order = [None, group] if rank % 2 else [group, None]  # the groups' calls in different orders
    works = [dist.all_reduce(x, group=each, async_op=True) for each, x in zip(order, xs[:2], strict=True)]
    for work in works:
        work.wait()
    assert [float(x[0]) for x in xs[:2]] == [size**2] * 2


def test_a_callback_of_a_future_may_make_calls_and_wait_for_them() -> None:
    size = dist.get_world_size()
    x, y = torch.ones(3), torch.ones(3)

    def add_up(future: Any) -> Any:
        return future.value()[0] + dist.all_reduce(y, async_op=True).get_future().wait()[0]

    future = dist.all_reduce(x, async_op=True).get_future().then(add_up)
    assert torch.equal(future.wait(), torch.full((3,), 2.0 * size))


def test_a_receive_that_is_late_and_a_group_that_was_destroyed() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if size > 1:
        work = dist.irecv(torch.ones(3), (rank + 1) % size, tag=99)
        with pytest.raises(MismatchError, match=r"timed out after 0\.1 s"):
            work.wait(timedelta(seconds=0.1))
        dist.barrier()
        dist.send(torch.ones(3), (rank - 1) % size, tag=99)
        work.wait()
    group = dist.new_group()
    dist.destroy_process_group(group)
    with pytest.raises(TransportError, match="has been destroyed"):
        group.allreduce([torch.ones(1)])


def test_a_group_is_destroyed_after_its_calls_have_ended() -> None:
    size = dist.get_world_size()
    for _ in range(3):
        group = dist.new_group()
        tensors = [torch.ones(100) for _ in range(200)]
        works = [dist.all_reduce(each, group=group, async_op=True) for each in tensors]
        dist.destroy_process_group(group)
        assert all(work.is_success() for work in works)
        assert all(torch.equal(each, torch.full((100,), float(size))) for each in tensors)


@pytest.mark.mpi(sizes=(2, 3))
def test_ranks_may_destroy_groups_in_different_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpccomm.torch import members
    from hpccomm.torch.parameters import communicator

    waits = list[float]()
    monkeypatch.setattr(
        members, "await_request", lambda request, seconds: (waits.append(seconds), await_request(request, seconds))[1]
    )
    groups = [dist.new_group() for _ in range(2)]
    communicator(groups[0])
    comms = [comm for group in groups for comm in group._comms]
    for group in groups if dist.get_rank() else reversed(groups):
        dist.destroy_process_group(group)
        dist.barrier()
    assert sum(waits) < 1
    dist.destroy_process_group(dist.new_group())
    until = time.monotonic() + 60
    while any(comms) and time.monotonic() < until:
        members.free_released()
    assert not any(comms)
    dist.barrier()


@pytest.mark.mpi(sizes=(2, 3))
def test_a_group_that_is_made_leaves_no_keys() -> None:
    group = dist.new_group()
    assert not group.store.check([f"member {dist.get_rank()}"])
    dist.barrier()
    assert not group.store.check(["decision"])
    dist.destroy_process_group(group)


def test_a_tensor_that_is_given_twice_is_reduced_once() -> None:
    x = torch.ones(3)
    dist.all_reduce_coalesced([x, x])
    assert torch.equal(x, torch.full((3,), float(dist.get_world_size())))


def test_options() -> None:
    from hpccomm.torch import Options

    rank, size = dist.get_rank(), dist.get_world_size()
    ranks = list(range(size))
    group = dist.new_group(ranks, pg_options=Options(algorithm="ring", reproducible=False))
    x = torch.full((10,), rank + 1.0)
    dist.all_reduce(x, group=group)
    assert torch.equal(x, torch.full((10,), size * (size + 1) / 2))
    dist.broadcast(x, 0, group=group)
    with pytest.raises(ArgumentError, match="algorithm='circle' is not available here"):
        dist.new_group(ranks, pg_options=Options(algorithm="circle"))
    with pytest.raises(ArgumentError, match=r"pass hpccomm\.torch\.Options"):
        dist.new_group(ranks, pg_options={"algorithm": "ring"})
    exact = dist.new_group(ranks, pg_options=Options(reproducible=True))
    summands = [torch.randn(100, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    sums = []
    for shift in range(size):
        x = summands[(rank + shift) % size].clone()
        dist.all_reduce(x, group=exact)
        sums.append(x)
    assert all(same(x, sums[0]) for x in sums)


MISTAKES: dict[str, tuple[Callable[[int, int], Any], type[Exception], str]] = {
    "operation": (
        lambda rank, size: dist.all_reduce(torch.ones(8), Op.MAX if rank == 1 else Op.SUM),
        MismatchError,
        r"Allreduce\((sum|max), 8 float32\).*Allreduce\((sum|max), 8 float32\)",
    ),
    "dtype": (
        lambda rank, size: dist.all_reduce(torch.ones(8, dtype=torch.int32 if rank == 1 else torch.float32)),
        MismatchError,
        "8 (int32|float32).*8 (int32|float32)",
    ),
    "length": (
        lambda rank, size: dist.all_reduce(torch.ones(9 if rank == 1 else 8)),
        MismatchError,
        "(8|9) float32.*(8|9) float32",
    ),
    "collective": (
        lambda rank, size: dist.barrier() if rank == 1 else dist.all_reduce(torch.ones(8)),
        MismatchError,
        r"(Barrier\b.*Allreduce\(|Allreduce\(.*Barrier\b)",
    ),
    **{
        f"{name} and sum in {where}": (
            partial(call, op),
            MismatchError,
            rf"rank 1 called [\w ]+\({name}, .*: (use the same operation|cast)",
        )
        for name, op in {"avg": Op.AVG, "premul_sum": dist._make_nccl_premul_sum(2.0)}.items()
        for where, call in {
            "all": lambda op, rank, size: dist.all_reduce(torch.ones(8), op if rank == 1 else Op.SUM),
            "halves": lambda op, rank, size: dist.all_reduce(torch.ones(8).half(), op if rank == 1 else Op.SUM),
            "nothing": lambda op, rank, size: dist.all_reduce(torch.ones(0), op if rank == 1 else Op.SUM),
            "complex numbers": lambda op, rank, size: dist.all_reduce(
                torch.ones(8, dtype=torch.complex64), op if rank == 1 else Op.SUM
            ),
            "parts": lambda op, rank, size: dist.reduce_scatter_tensor(
                torch.ones(8), torch.ones(8 * size), op if rank == 1 else Op.SUM
            ),
            "uneven parts": lambda op, rank, size: dist.reduce_scatter(
                torch.ones(8 + rank), [torch.ones(8 + r) for r in range(size)], op if rank == 1 else Op.SUM
            ),
            "the root": lambda op, rank, size: dist.reduce(torch.ones(7), 0, op if rank == 1 else Op.SUM),
            "sparse tensors": lambda op, rank, size: dist.all_reduce(
                torch.ones(8).to_sparse(), op if rank == 1 else Op.SUM
            ),
            "a long vector": lambda op, rank, size: dist.all_reduce(torch.ones(99_999), op if rank == 1 else Op.SUM),
        }.items()
    },
    "a fraction of integers": (
        lambda rank, size: dist.all_reduce(torch.ones(8, dtype=torch.int64), dist._make_nccl_premul_sum(0.5)),
        ArgumentError,
        r"PREMUL_SUM of int64 by 0\.5 would be float32: cast the tensor first",
    ),
    "blocks": (
        lambda rank, size: dist.all_gather_into_tensor(torch.empty((8 + rank % 2) * size), torch.ones(8 + rank % 2)),
        MismatchError,
        "Allgather",
    ),
    **{
        f"root of {name}": (call, MismatchError, r"root=0\), rank 1 called .*root=1\).*: name the same root")
        for name, call in {
            "broadcast": lambda rank, size: dist.broadcast(torch.ones(8), int(rank == 1)),
            "broadcast of nothing": lambda rank, size: dist.broadcast(torch.ones(0), int(rank == 1)),
            "objects": lambda rank, size: dist.broadcast_object_list([rank], int(rank == 1)),
            "reduce": lambda rank, size: dist.reduce(torch.ones(8), int(rank == 1)),
            "gather": lambda rank, size: dist.gather(
                torch.ones(8), [torch.ones(8)] * size if rank < 2 else None, int(rank == 1)
            ),
            "scatter": lambda rank, size: dist.scatter(
                torch.ones(8), [torch.ones(8)] * size if rank < 2 else None, int(rank == 1)
            ),
        }.items()
    },
    **{
        f"length of {name}": (call, MismatchError, r"8 float32, root=0\), rank 1 called .*9 float32.*make the counts")
        for name, call in {
            "broadcast": lambda rank, size: dist.broadcast(torch.ones(8 + (rank == 1)), 0),
            "reduce": lambda rank, size: dist.reduce(torch.ones(8 + (rank == 1)), 0),
            "gather": lambda rank, size: dist.gather(
                torch.ones(8 + (rank == 1)), None if rank else [torch.ones(8)] * size, 0
            ),
            "scatter": lambda rank, size: dist.scatter(
                torch.ones(8 + (rank == 1)), None if rank else [torch.ones(8)] * size, 0
            ),
        }.items()
    },
    "8-bit floats of two kinds": (
        lambda rank, size: dist.broadcast(torch.ones(8).to(torch.float8_e5m2 if rank == 1 else torch.float8_e4m3fn), 0),
        MismatchError,
        "8 float8_e4m3fn, root=0.*8 float8_e5m2, root=0",
    ),
    "sparse shapes": (
        lambda rank, size: dist.all_reduce(torch.ones((2, 6) if rank == 1 else (3, 4)).to_sparse()),
        MismatchError,
        r"sparse all_reduce\(sum, 3x4 float32\), rank 1 called sparse all_reduce\(sum, 2x6 float32\)",
    ),
    "root of another group": (
        lambda rank, size: dist.broadcast(torch.ones(8), 17),
        ArgumentError,
        r"the root is rank 17 of a group of \d ranks: name one of 0 to",
    ),
    "meta": (
        lambda rank, size: dist.all_reduce(torch.ones(8, device="meta")),
        ArgumentError,
        "a tensor on the meta device has no elements",
    ),
    "average of integers": (
        lambda rank, size: dist.all_reduce(torch.ones(8, dtype=torch.int64), Op.AVG),
        ArgumentError,
        "the avg of int64 is not defined: cast it to float64",
    ),
    "bits of floats": (
        lambda rank, size: dist.all_reduce(torch.ones(8), Op.BAND),
        ArgumentError,
        "does not define band",
    ),
    "8-bit floats": (
        lambda rank, size: dist.all_reduce(torch.ones(8).to(torch.float8_e5m2)),
        ArgumentError,
        "float8_e5m2 cannot be reduced: cast it to float32",
    ),
    "output": (
        lambda rank, size: dist.all_gather_into_tensor(torch.empty(7 * size + 1), torch.ones(7)),
        ArgumentError,
        "pass one block of the same length",
    ),
    "rows": (
        lambda rank, size: dist.all_to_all_single(torch.empty(size + 1), torch.ones(size + 1)),
        ArgumentError,
        "cannot be divided over",
    ),
    "sparse": (
        lambda rank, size: dist.broadcast(torch.sparse_coo_tensor(size=(3,)), 0),
        ArgumentError,
        r"pass x\.to_dense",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_on_all_ranks(mistake: str) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    call, kind, sentence = MISTAKES[mistake]
    if size == 1:
        return
    with pytest.raises(kind, match=sentence):
        call(rank, size)
    x = torch.ones(1)
    dist.all_reduce(x)
    assert float(x) == size


def test_a_call_before_the_first_sum_of_a_group_meets_later_ones_alike() -> None:
    """The first sum makes shared memory, in which the ranks meet from then on."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group()

    def scatter(n: int) -> None:
        dist.scatter(torch.zeros(n), [torch.ones(8)] * size if rank == 0 else None, 0, group=group)

    for _ in range(2):
        scatter(8)
        dist.all_reduce(torch.ones(1), group=group)
    if size > 1:
        with pytest.raises(MismatchError, match=r"8 float32, root=0\), rank 1 called scatter\(9 float32"):
            scatter(9 if rank == 1 else 8)
    x = torch.ones(1)
    dist.all_reduce(x, group=group)
    assert float(x) == size
    dist.destroy_process_group(group)


def test_an_asynchronous_mistake_is_raised_by_wait() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return
    work = dist.all_reduce(torch.ones(8), Op.MAX if rank == 1 else Op.SUM, async_op=True)
    with pytest.raises(MismatchError, match=r"rank 1 called|ranks? 0"):
        work.wait()
    assert work.is_completed()
    assert not work.is_success()
    assert isinstance(work.exception(), MismatchError)


LIMIT, NO_LIMIT, GIVEN_UP = timedelta(seconds=0.2), timedelta(0), 77
"""Time limits, and the tag of messages to a late rank by which the others say that they wait no longer."""
ROW = partial(torch.ones, 4)
TIMED: dict[str, Callable[[Any, timedelta], Any]] = {
    "torch's barrier": lambda group, limit: dist.barrier(timeout=limit or None),
    "an asynchronous barrier": lambda group, limit: dist.barrier(async_op=True, timeout=limit or None).wait(),
    "barrier": lambda group, limit: group.barrier(limit).wait(),
    "allreduce": lambda group, limit: group.allreduce([ROW()], Op.SUM, limit).wait(),
    "allreduce of one": lambda group, limit: group.allreduce(ROW(), op=Op.SUM, timeout=limit).wait(),
    "broadcast": lambda group, limit: group.broadcast(ROW(), 1, limit).wait(),
    "reduce": lambda group, limit: group.reduce(ROW(), 0, Op.SUM, limit).wait(),
    "allgather": lambda group, limit: group.allgather([ROW() for _ in range(group.size())], ROW(), limit).wait(),
    "gather": lambda group, limit: group.gather([ROW() for _ in range(group.size())], ROW(), 0, limit).wait(),
    "scatter": lambda group, limit: group.scatter(ROW(), [ROW() for _ in range(group.size())], 0, limit).wait(),
    "reduce_scatter": lambda group, limit: group.reduce_scatter(
        ROW(), [ROW() for _ in range(group.size())], Op.SUM, limit
    ).wait(),
    "alltoall": lambda group, limit: group.alltoall(
        [ROW() for _ in range(group.size())], [ROW() for _ in range(group.size())], timeout=limit
    ).wait(),
    "all_to_all_single": lambda group, limit: group.all_to_all_single(
        torch.ones(4 * group.size()), torch.ones(4 * group.size()), [], [], limit
    ).wait(),
}
"""Calls of a group that take so long at most."""


def wait_until_given_up(ranks: int) -> None:
    """Wait until so many other ranks have given up waiting for this one."""
    from mpi4py import MPI

    for _ in range(ranks):
        MPI.COMM_WORLD.recv(tag=GIVEN_UP)


def give_up(late: int) -> None:
    """Tell the late rank that this one waits no longer."""
    from mpi4py import MPI

    MPI.COMM_WORLD.send(None, late, GIVEN_UP)


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", TIMED)
def test_a_call_with_a_time_limit_ends_on_the_ranks_that_wait(name: str) -> None:
    group, late = dist.group.WORLD, dist.get_rank() == dist.get_world_size() - 1
    last = dist.get_world_size() - 1
    if late:
        wait_until_given_up(last)
        TIMED[name](group, NO_LIMIT)
    else:
        with pytest.raises(MismatchError, match=rf"timed out after 0.2 s: missing ranks: .*{last}"):
            TIMED[name](group, LIMIT)
        give_up(last)
    dist.barrier()
    TIMED[name](group, timedelta(seconds=60))


@pytest.mark.slow
@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", ["all_reduce", "asynchronous all_reduce", "recv"])
def test_the_time_limit_of_a_group_ends_each_of_its_calls(name: str) -> None:
    group, last = dist.new_group(), dist.get_world_size() - 1
    dist.barrier()
    group.set_timeout(LIMIT)
    x, late = torch.ones(4), dist.get_rank() == last
    calls = {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "asynchronous all_reduce": lambda: dist.all_reduce(x, group=group, async_op=True).wait(),
        "recv": lambda: dist.send(x, 0, group) if late else dist.recv(x, last, group),
    }
    if late:
        wait_until_given_up(1 if name == "recv" else last)
        if name != "recv":
            group.set_timeout(timedelta(hours=1))
            calls[name]()
    elif name != "recv" or dist.get_rank() == 0:
        with pytest.raises(MismatchError, match=r"timed out after 0.2 s"):
            calls[name]()
        give_up(last)
    dist.barrier()
    if name == "recv" and late:
        calls[name]()
    dist.barrier()
    dist.destroy_process_group(group)


def test_the_end_waits_for_callbacks_of_a_future_beyond_its_time_limit() -> None:
    from hpccomm.torch.works import CallQueue, Work

    queue, ends, continues = CallQueue(), Event(), Event()
    work = Work("a call", ends.wait, [], lambda: "missing ranks: unknown", timedelta(milliseconds=1))
    work.get_future().then(lambda future: continues.wait())
    queue.put(work)
    until = time.monotonic() + 60
    while not work._expired and time.monotonic() < until:
        queue.expire()
    ends.set()
    assert work.sleep(60)
    assert not queue.settle(time.monotonic() + 0.1)
    continues.set()
    assert queue.settle(until)
    queue.close()


def test_monitored_barrier_names_missing_ranks() -> None:
    from hpccomm.torch import monitored_barrier

    rank, size = dist.get_rank(), dist.get_world_size()
    monitored_barrier()
    if size == 1:
        return
    if rank != size - 1:
        named = rf"ranks? .*\b{size - 1} did not call it"  # other ranks may be late as well
        with pytest.raises(MismatchError, match=named):
            monitored_barrier(timeout=timedelta(seconds=0.3))
    else:
        dist.group.WORLD.barriers += 1
    dist.barrier()
    monitored_barrier()
    with pytest.raises(ArgumentError, match="is not a group of hpccomm"):
        monitored_barrier(group=3)


def test_a_rank_that_comes_late_to_monitored_barrier_raises_as_well() -> None:
    from hpccomm.torch import monitored_barrier

    if dist.get_world_size() == 1:
        return
    dist.barrier()
    if dist.get_rank() == 0:
        wait_until_given_up(dist.get_world_size() - 1)
    told = "before all ranks had come"
    with pytest.raises(MismatchError, match=f"did not call it|{told}" if dist.get_rank() else told):
        monitored_barrier(timeout=timedelta(seconds=0.3))
    if dist.get_rank():
        give_up(0)
    dist.barrier()
    monitored_barrier()


__all__ = ["process_group"]


def may_have_huge_pages(tensor: Any) -> bool:
    """Whether the kernel has been told so of the middle of a tensor's memory."""
    at = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        ends = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if ends:
            inside = int(ends[1], 16) <= at < int(ends[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("the tensor is not in the memory of this process")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
@pytest.mark.parametrize("name", ["all_to_all_single", "all_gather_into_tensor", "broadcast", "scatter", "all_gather"])
def test_new_tensors_that_a_call_fills_may_have_huge_pages(name: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    length = 3 * (1 << 20) * ranks
    old, new = torch.ones(length), torch.empty(length)
    part = length // ranks
    rows = list(new.chunk(ranks))
    calls = {
        "all_to_all_single": lambda: dist.all_to_all_single(new, old),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(new, old[:part]),
        "all_gather": lambda: dist.all_gather(rows, old[:part]),
        "broadcast": lambda: dist.broadcast(old if rank == 0 else new, 0),
        "scatter": lambda: dist.scatter(new, [old] * ranks if rank == 0 else None, 0),
    }
    calls[name]()
    if not (name == "broadcast" and rank == 0):
        assert may_have_huge_pages(new)
        assert bool((new == 1).all())
