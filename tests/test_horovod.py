"""Horovod's spelling: the functions of its examples give what Horovod gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mpi4py import MPI
from torch_world import torch

import hpccomm.horovod.torch as hvd
from hpccomm.errors import ArgumentError, MismatchError

pytestmark = pytest.mark.mpi(sizes=(1, 2, 3), timeout=200)


@pytest.fixture(scope="module", autouse=True)
def horovod() -> Iterator[None]:
    hvd.init()
    yield
    hvd.shutdown()


def make_model() -> Any:
    torch.manual_seed(hvd.rank())  # other weights on every rank, until they are broadcast
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def data_of(step: int, rank: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 4, generator=generator), torch.randint(2, (6,), generator=generator)


def backward(model: Any, step: int, rank: int) -> None:
    x, y = data_of(step, rank)
    torch.nn.functional.cross_entropy(model(x), y).backward()


def test_who_is_there() -> None:
    assert hvd.is_initialized()
    assert (hvd.rank(), hvd.size()) == (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    assert (hvd.local_rank(), hvd.local_size()) == (hvd.rank(), hvd.size())
    assert (hvd.cross_rank(), hvd.cross_size()) == (0, 1)
    assert hvd.mpi_threads_supported() == (MPI.Query_thread() == MPI.THREAD_MULTIPLE)
    assert (hvd.mpi_built(), hvd.nccl_built(), hvd.gloo_enabled()) == (True, False, False)


def test_collectives() -> None:
    rank, size = hvd.rank(), hvd.size()
    x = torch.full((3,), rank + 1.0)
    total = size * (size + 1) / 2
    assert torch.equal(hvd.allreduce(x, op=hvd.Sum), torch.full((3,), total))
    assert torch.equal(hvd.allreduce(x, average=False, prescale_factor=2.0), torch.full((3,), 2 * total))
    assert torch.allclose(hvd.allreduce(x), torch.full((3,), total / size))  # a mean, rounded
    assert torch.equal(hvd.allreduce(x, op=hvd.Max, compression=hvd.Compression.fp16), torch.full((3,), float(size)))
    handle = hvd.allreduce_async(x, op=hvd.Sum, name="x")
    assert torch.equal(hvd.synchronize(handle), torch.full((3,), total))
    assert hvd.poll(handle)
    assert hvd.allreduce_(x, op=hvd.Sum) is x
    assert torch.equal(x, torch.full((3,), total))
    assert torch.equal(
        hvd.allgather(torch.full((rank, 2), float(rank))).sum(), torch.tensor(2.0 * sum(r * r for r in range(size)))
    )
    assert torch.equal(hvd.broadcast(torch.tensor([rank]), size - 1), torch.tensor([size - 1]))
    gathered, copied = hvd.allgather_async(torch.tensor([rank])), hvd.broadcast_async(torch.tensor([rank]), 0)
    y = torch.tensor([rank])
    assert hvd.synchronize(hvd.broadcast_async_(y, size - 1)) is y
    assert (int(y), int(hvd.synchronize(copied))) == (size - 1, 0)
    assert hvd.synchronize(gathered).tolist() == list(range(size))
    assert hvd.broadcast_object({"rank": rank}, size - 1) == {"rank": size - 1}
    assert hvd.allgather_object(rank) == list(range(size))
    assert [float(each) for each in hvd.grouped_allreduce([x, x], op=hvd.Max)[0]] == [total] * 3
    hvd.barrier()
    with pytest.raises(ArgumentError, match="Adasum is not implemented"):
        hvd.allreduce(x, op=hvd.Adasum)
    with pytest.raises(ArgumentError, match="op or average, not both"):
        hvd.allreduce(x, average=True, op=hvd.Sum)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_is_that_of_one_process_with_all_batches(passes: int) -> None:
    model = make_model()
    base = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(
        base, named_parameters=model.named_parameters(), backward_passes_per_step=passes, op=hvd.Average
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    alone = make_model()
    alone.load_state_dict(model.state_dict())
    single = torch.optim.SGD(alone.parameters(), 0.1, momentum=0.9)
    steps = torch.optim.lr_scheduler.StepLR(single, 1, 0.5)
    for step in range(3):
        optimizer.zero_grad()
        single.zero_grad()
        for number in range(passes):
            backward(model, 10 * step + number, hvd.rank())
            for rank in range(hvd.size()):
                backward(alone, 10 * step + number, rank)
        for each in alone.parameters():
            each.grad /= passes * hvd.size()
        optimizer.step()
        single.step()
        schedule.step()
        steps.step()
    for mine, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)  # sums in another order


def test_gradients_may_be_clipped_between_synchronize_and_step() -> None:
    model = make_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters())
    hvd.broadcast_parameters(model.named_parameters(), root_rank=0)
    backward(model, 0, hvd.rank())
    optimizer.synchronize()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = [each.detach().clone() for each in model.parameters()]
    with optimizer.skip_synchronize():
        optimizer.step()
    moved = torch.cat([(x - y).reshape(-1) for x, y in zip(model.parameters(), before, strict=True)])
    assert float(moved.detach().norm()) <= 1.01e-4
    with pytest.raises(ArgumentError, match="not among named_parameters"):
        hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), [("other", torch.nn.Parameter(torch.ones(1)))]
        )


def test_a_division_before_the_sum_keeps_16_bits_from_overflow() -> None:
    for factor in (1.0, float(hvd.size())):
        weight = torch.nn.Parameter(torch.zeros(3))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([weight], 1.0), compression=hvd.Compression.fp16, gradient_predivide_factor=factor
        )
        weight.grad = torch.full((3,), 49152.0)
        optimizer.synchronize()
        fits = factor > 1 or hvd.size() == 1
        assert torch.equal(weight.grad, torch.full((3,), 49152.0 if fits else torch.inf))
    with pytest.raises(ArgumentError, match=r"use op=hvd\.Average"):
        hvd.DistributedOptimizer(torch.optim.SGD([weight], 1.0), op=hvd.Sum, gradient_predivide_factor=2.0)


def test_models_with_other_parameters_are_named(capfd: Any) -> None:
    if hvd.size() == 1:
        pytest.skip("one rank")
    weight = torch.nn.Parameter(torch.zeros((3, 2) if hvd.rank() == 1 else (2, 3)))
    weight.grad = torch.ones_like(weight)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([weight], 1.0), [("w", weight)])
    for call in (optimizer.step, lambda: hvd.broadcast_parameters({"w": weight}, 0)):
        with pytest.raises(MismatchError, match=r"the tensors of rank 1 .*'w' float32\[3, 2\] on rank 1, 'w' float32"):
            call()
    hvd._optimizers.pop()


def test_ranks_that_have_no_batches_left_join() -> None:
    model = make_model()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.named_parameters())
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    for step in range(1 + hvd.rank()):  # the last rank has the most
        optimizer.zero_grad()
        backward(model, step, hvd.rank())
        optimizer.step()
    assert hvd.join() == hvd.size() - 1
    hvd.broadcast_parameters(model.state_dict(), root_rank=hvd.size() - 1)
    weights = torch.cat([each.detach().reshape(-1) for each in model.parameters()])
    assert torch.equal(hvd.allreduce(weights, op=hvd.Max), weights)
