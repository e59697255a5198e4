"""hpccomm's methods in PyTorch: compressed DDP, optimizers, local steps and MiCS under FSDP2."""

from __future__ import annotations

import copy
import io
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
from test_torch_training import CONTEXT, batch_of, hash_of, hashes_of, make_model
from torch_world import dist, process_group, torch

import hpccomm
from hpccomm import progress
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.torch import LAMB, LARS, OneBitAdam, communicator, compress, local, second_hop
from hpccomm.torch.mics import SecondHop
from hpccomm.train.torch_networks import gpt_loss

pytestmark = pytest.mark.mpi(sizes=(2,), timeout=300)

EXCHANGES: dict[str, Any] = {
    "gtc": partial(hpccomm.gtc, density=0.05),
    "dgc": partial(hpccomm.dgc, density=0.05),
    "onebit": hpccomm.onebit_sgd,
    "powersgd": partial(hpccomm.powersgd, rank=2),
    "int8": lambda comm: hpccomm.feedback(hpccomm.qsgd(seed=comm.rank), comm),
    "mean": hpccomm.mean,
}


def run_steps(model: Any, optimizer: Any, first: int, last: int) -> float:
    loss = torch.tensor(0.0)
    for step in range(first, last):
        optimizer.zero_grad()
        loss = gpt_loss(model, batch_of(step))
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def write_and_read(state: Any) -> Any:
    """A state from a file, as a run that continues gets it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def wrap(method: Any) -> tuple[Any, Any, Any]:
    ddp = torch.nn.parallel.DistributedDataParallel(make_model(), bucket_cap_mb=0.01)
    made = compress(ddp, method)
    return ddp, made, torch.optim.SGD(ddp.parameters(), 0.05)


@pytest.mark.parametrize("name", EXCHANGES)
def test_a_compressed_training_continues_with_the_same_bits(name: str) -> None:
    ddp, made, optimizer = wrap(EXCHANGES[name])
    run_steps(ddp, optimizer, 0, 4)
    saved = write_and_read([ddp.module.state_dict(), made.state_dict(), optimizer.state_dict()])
    run_steps(ddp, optimizer, 4, 7)
    again, other, second = wrap(EXCHANGES[name])
    again.module.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    run_steps(again, second, 4, 7)
    assert hash_of(again.parameters()) == hash_of(ddp.parameters())
    assert len(hashes_of(ddp.parameters())) == 1


def test_calls_of_a_method_run_beside_those_of_its_group() -> None:
    from mpi4py import MPI

    from hpccomm.torch.members import find_missing

    group, method, rank = dist.group.WORLD, communicator(), dist.get_rank()
    assert communicator() is method
    for _ in range(3):
        x, y, z = torch.ones(100), np.full(100, 10, np.float32), np.empty(100, np.float32)
        if rank:
            MPI.COMM_WORLD.recv(source=0)
            time.sleep(0.05)  # rank 0 is in both calls meanwhile
        work = dist.all_reduce(x, async_op=True)
        while rank == 0 and find_missing(group.comm) != [1]:
            time.sleep(1e-3)
        if rank == 0:
            MPI.COMM_WORLD.send(None, 1)
        method.Allreduce(y, z)
        work.wait()
        assert x.tolist() == [2] * 100
        assert z.tolist() == [20] * 100
        dist.barrier()


def test_a_group_whose_ranks_are_out_of_step_can_be_destroyed() -> None:
    group = dist.new_group()
    comm = communicator(group)
    with pytest.raises(MismatchError, match="make all ranks call the same"):
        comm.Barrier() if dist.get_rank() else progress.submit(comm, lambda channel: None, "an exchange").wait()
    dist.destroy_process_group(group)
    dist.barrier()


def test_a_dense_exchange_is_that_of_ddp() -> None:
    ddp, _, optimizer = wrap(hpccomm.mean)
    plain = torch.nn.parallel.DistributedDataParallel(make_model())
    run_steps(ddp, optimizer, 0, 3)
    run_steps(plain, torch.optim.SGD(plain.parameters(), 0.05), 0, 3)
    assert hash_of(ddp.parameters()) == hash_of(plain.parameters())


@pytest.mark.parametrize("name", ["gtc", "powersgd", "mean"])
def test_the_exchange_beside_the_backward_pass_has_the_bits_of_one_that_waits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP has other buckets in the first step, and ours have tensors of several of DDP's."""
    ddp, made, optimizer = wrap(EXCHANGES[name])
    assert len(made.exchange.buckets) > 2
    run_steps(ddp, optimizer, 0, 4)
    monkeypatch.setattr(progress, "has_thread", lambda: False)
    again, _, second = wrap(EXCHANGES[name])
    run_steps(again, second, 0, 4)
    assert hash_of(again.parameters()) == hash_of(ddp.parameters())


def test_a_bucket_is_exchanged_before_the_backward_pass_ends() -> None:
    if not progress.has_thread():
        pytest.skip("MPI without threads")
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    ddp = torch.nn.parallel.DistributedDataParallel(layers, bucket_cap_mb=0.0001)
    made = compress(ddp, hpccomm.mean)
    done: list[bool] = []

    def wait_for_last_layer(gradient: Any) -> None:
        until = time.monotonic() + 20
        while made.exchange.buckets[0].step is None and time.monotonic() < until:
            time.sleep(0.001)
        done.append(made.exchange.buckets[0].step is not None)

    ddp(torch.ones(2, 8)).sum().backward()  # DDP has its buckets in the order of the gradients from now on
    made._end_step()
    made.exchange.buckets[0].step = None
    layers[0].weight.register_hook(wait_for_last_layer)
    ddp(torch.ones(2, 8)).sum().backward()
    assert done == [True]


@pytest.mark.parametrize("layer", [0, 2])
def test_grad_scaler_skips_a_step_that_is_not_finite_on_one_rank(layer: int) -> None:
    """In whichever bucket: on all ranks, with the residuals of before, and the scale halves."""
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    ddp = torch.nn.parallel.DistributedDataParallel(layers, bucket_cap_mb=0.0001)
    made, optimizer = compress(ddp, partial(hpccomm.gtc, tau=0.01)), torch.optim.SGD(ddp.parameters(), 0.1)
    scaler, bad = torch.amp.GradScaler("cpu", init_scale=8.0), [False]
    layers[layer].weight.register_hook(lambda gradient: gradient * (torch.inf if bad[0] else 1))

    def step(number: int) -> None:
        optimizer.zero_grad()
        scaler.scale(ddp(torch.full((2, 8), 0.1 * (number + 1 + dist.get_rank()))).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    for number in range(3):
        step(number)
    made._end_step()
    before = hash_of(ddp.parameters())
    kept = [each.residual.copy() for each in made.state]
    bad[0] = dist.get_rank() == 1
    step(3)
    made._end_step()
    assert made.exchange.skipped == 1
    assert scaler.get_scale() == 4.0
    assert hash_of(ddp.parameters()) == before
    assert all(np.array_equal(each.residual, one) for each, one in zip(made.state, kept, strict=True))
    bad[0] = False
    step(4)
    assert hash_of(ddp.parameters()) != before
    assert len(hashes_of(ddp.parameters())) == 1


@pytest.mark.parametrize("layer", [0, 2])
def test_a_step_that_the_method_skips_is_not_finite_for_the_optimizer(layer: int) -> None:
    """In whichever bucket: its gradients are finite, but what the method makes of them is not."""
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    ddp = torch.nn.parallel.DistributedDataParallel(layers, bucket_cap_mb=0.0001)
    made, huge = compress(ddp, hpccomm.block_mean), [False]
    layers[layer].weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38) if huge[0] else gradient)
    for huge[0] in (False, True):
        ddp.zero_grad()
        ddp(torch.ones(2, 8)).sum().backward()
        gradient = torch.cat([each.grad.reshape(-1) for each in ddp.parameters()])
        assert bool(gradient.isfinite().all()) is not huge[0]
    made._end_step()
    assert made.exchange.skipped == 1


def test_gradients_of_16_bits_and_weights_that_decay() -> None:
    plain = torch.nn.parallel.DistributedDataParallel(make_model())
    ddp = torch.nn.parallel.DistributedDataParallel(make_model(), bucket_cap_mb=0.01)
    compress(ddp, lambda comm, bucket: hpccomm.dgc(comm, bucket, 1.0, momentum=0, mask=False, weight_decay=0.25))
    for step in range(2):
        for model in (plain, ddp):
            model.zero_grad()
            gpt_loss(model, batch_of(step)).backward()
            with torch.no_grad():
                for each in model.parameters():
                    each.mul_(2)
        for one, other in zip(plain.parameters(), ddp.parameters(), strict=True):
            decay = 0.25 * one / 2 if one.ndim > 1 else 0.0  # the weights at the time of the backward pass
            assert torch.equal(other.grad, one.grad + decay)
    half = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2).to(torch.bfloat16))
    compress(half, hpccomm.mean)
    for _ in range(2):
        half.zero_grad()
        (half(torch.ones(1, 3, dtype=torch.bfloat16)) * (1 + dist.get_rank())).sum().backward()
        assert (half.module.weight.grad == 1.5).all()


def test_parameters_on_the_same_memory_are_exchanged_apart_as_by_ddp() -> None:
    def model() -> Any:
        torch.manual_seed(3)
        made = torch.nn.Sequential(
            torch.nn.Linear(3, 3, bias=False), torch.nn.Tanh(), torch.nn.Linear(3, 3, bias=False)
        )
        made[2].weight = torch.nn.Parameter(made[0].weight.detach())
        return torch.nn.parallel.DistributedDataParallel(made)

    plain, ddp = model(), model()
    compress(ddp, hpccomm.mean)
    for each in (plain, ddp):
        each(torch.ones(2, 3) * (1 + dist.get_rank())).sum().backward()
    for one, other in zip(plain.parameters(), ddp.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_shards_of_errors_of_another_number_of_ranks_are_divided_anew() -> None:
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    made = compress(ddp, hpccomm.block_mean)
    ddp(torch.ones(2, 3) * (1 + dist.get_rank())).sum().backward()
    own = made.state_dict()
    everyone = communicator().allgather(own)
    joined = {f"rank {rank} of 2": each[f"rank {rank} of 2"] for rank, each in enumerate(everyone)}
    alone = dict(joined["rank 0 of 2"])
    for path in alone:
        if path.endswith("server"):
            alone[path] = torch.cat([each[path] for each in joined.values()])
    made.load_state_dict({"rank 0 of 1": alone})
    for path, value in made.state_dict()[f"rank {dist.get_rank()} of 2"].items():
        if path.endswith("server"):
            assert torch.equal(value, own[f"rank {dist.get_rank()} of 2"][path])


def test_a_second_hop_is_saved_before_its_first_step_too() -> None:
    hop = SecondHop(communicator(), EXCHANGES["gtc"])
    hop.exchange("block", torch.ones(6))
    saved = hop.state_dict()
    other = SecondHop(communicator(), EXCHANGES["gtc"])
    other.load_state_dict(saved)
    assert other.state_dict().keys() == saved.keys() == {"block"}
    assert all(
        torch.equal(torch.as_tensor(each), torch.as_tensor(saved["block"][path]))
        for path, each in other.state_dict()["block"].items()
    )


def test_unused_frozen_tied_and_ignored_parameters_and_gradients_that_accumulate() -> None:
    def model() -> Any:
        torch.manual_seed(2)
        made = torch.nn.ModuleDict(
            {name: torch.nn.Linear(4, 4) for name in ("a", "b", "tied", "frozen", "unused", "own")}
        )
        made["tied"].weight = made["a"].weight
        made["frozen"].requires_grad_(False)
        made.forward = lambda x: sum(made[name](x).tanh().sum() for name in ("a", "b", "tied", "frozen", "own"))
        torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            made, ["own.weight", "own.bias"]
        )
        return made

    grads = []
    for method in (None, hpccomm.mean):
        ddp = torch.nn.parallel.DistributedDataParallel(model(), bucket_cap_mb=0.0001, find_unused_parameters=True)
        if method:
            compress(ddp, method)
        for step in range(3):
            x = torch.full((2, 4), 0.25 * (1 + step + dist.get_rank()))
            if step == 1:
                with ddp.no_sync():
                    ddp(x).backward()
            ddp(x).backward()
        grads.append([each.grad for name, each in ddp.module.named_parameters() if "unused" not in name])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_failed_exchange_is_raised_by_the_backward_pass(capfd: Any) -> None:
    def fails(comm: Any) -> Any:
        def update(gradient: Any, state: int, weights: Any) -> Any:
            if state == 1:
                raise ValueError("no such device")
            return gradient, state + 1

        return hpccomm.Transform(lambda weights: 0, update)

    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    compress(ddp, fails)
    ddp(torch.ones(1, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="no such device"):
        ddp(torch.ones(1, 3)).sum().backward()


def residuals_of(saved: dict[str, Any]) -> Any:
    """What one rank has not sent, of all parameters."""
    ((_, leaves),) = saved.items()
    return np.concatenate([leaf.numpy() for path, leaf in leaves.items() if path.endswith("residual")])


def test_a_compressed_state_for_another_number_of_ranks() -> None:
    ddp, made, optimizer = wrap(EXCHANGES["gtc"])
    run_steps(ddp, optimizer, 0, 3)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, made.state_dict())
    both = made.merge(parts)
    residuals = [residuals_of(part) for part in parts]
    unsent = np.mean(residuals, axis=0, dtype=np.float64)
    four = {f"rank {r} of 4": next(iter(parts[r % 2].values())) for r in range(4)}
    made.load_state_dict(four)
    found = residuals_of(made.state_dict())
    assert np.allclose(found, unsent, rtol=1e-6, atol=1e-9)  # a mean of float32 in float64, rounded once
    for saved in (parts, both):
        made.load_state_dict(saved)
        assert np.array_equal(residuals_of(made.state_dict()), residuals[dist.get_rank()])
        run_steps(ddp, optimizer, 3, 4)
    with pytest.raises(ArgumentError, match=r"the state of rank . of 2 is not among rank 0 of 3"):
        made.load_state_dict({"rank 0 of 3": both["rank 0 of 2"]})


def test_a_compressed_state_in_torchs_distributed_checkpoints(tmp_path: Any) -> None:
    """Buckets of another size read the same checkpoint."""
    import torch.distributed.checkpoint as dcp

    folder: list[Any] = [str(tmp_path)]
    dist.broadcast_object_list(folder, 0)
    ddp, made, optimizer = wrap(EXCHANGES["onebit"])
    run_steps(ddp, optimizer, 0, 3)
    dcp.save({"model": ddp.module.state_dict(), "compression": made}, checkpoint_id=folder[0])
    kept = residuals_of(made.state_dict())
    run_steps(ddp, optimizer, 3, 4)
    assert not np.array_equal(residuals_of(made.state_dict()), kept)
    large = compress(torch.nn.parallel.DistributedDataParallel(make_model()), EXCHANGES["onebit"])
    assert len(large.exchange.buckets) < len(made.exchange.buckets)
    for each in (made, large):
        dcp.load({"model": ddp.module.state_dict(), "compression": each}, checkpoint_id=folder[0])
        assert np.array_equal(residuals_of(each.state_dict()), kept)


def test_mistakes_in_compress() -> None:
    with pytest.raises(ArgumentError, match="Linear is no DistributedDataParallel"):
        compress(torch.nn.Linear(2, 2), hpccomm.gtc)
    ddp = torch.nn.parallel.DistributedDataParallel(make_model())
    with pytest.raises(ArgumentError, match=r"pass hpccomm\.gtc"):
        compress(ddp, lambda comm: 3)
    with pytest.raises(ArgumentError, match="is not a group of hpccomm"):
        communicator(dist.new_group(backend="gloo"))


OPTIMIZERS: dict[str, Any] = {
    "LARS": lambda params: LARS(params, 1.0, weight_decay=1e-4),
    "LAMB": lambda params: LAMB(params, 1e-2),
    "OneBitAdam": lambda params: OneBitAdam(params, 1e-2, freeze_step=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_continue_with_the_same_bits_and_learn(name: str) -> None:
    model = make_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = float(gpt_loss(model, batch_of(0)))
    run_steps(model, optimizer, 0, 5)
    saved = write_and_read([model.state_dict(), optimizer.state_dict()])
    run_steps(model, optimizer, 5, 8)
    assert float(gpt_loss(model, batch_of(0))) < before
    again = make_model()
    again.load_state_dict(saved[0])
    other = OPTIMIZERS[name](again.parameters())
    other.load_state_dict(saved[1])
    run_steps(again, other, 5, 8)
    assert hash_of(again.parameters()) == hash_of(model.parameters())
    if name == "OneBitAdam":
        assert len(hashes_of(model.parameters())) == 1


def test_lars_on_one_matrix_is_its_formula() -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    bias = torch.nn.Parameter(torch.tensor([1.0]))
    weight.grad, bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([0.5])
    optimizer = LARS([{"params": [weight]}, {"params": [bias], "lr": 0.25}], 0.5, momentum=0.0, trust=0.5)
    optimizer.step()
    # the trust ratio is 0.5 · 5 / 2; a bias has none
    assert torch.equal(weight.data, torch.tensor([[3.0, 4.0 - 0.5 * 1.25 * 2]]))
    assert torch.equal(bias.data, torch.tensor([1.0 - 0.25 * 0.5]))
    optimizer.param_groups[1]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(bias.data, torch.tensor([0.875]))
    with pytest.raises(ArgumentError, match="cannot be added later"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


def test_param_groups_of_onebit_adam() -> None:
    x, y = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    x.grad, y.grad = torch.ones(4), torch.ones(4)
    optimizer = OneBitAdam([{"params": [x]}, {"params": [y], "lr": 0.0, "weight_decay": 0.5}], 0.1, freeze_step=2)
    optimizer.step()
    direction = (1 - x.data) / 0.1
    assert torch.allclose(direction, torch.full((4,), 0.1 / 0.001**0.5), rtol=1e-5)  # (1 - b1) / sqrt(1 - b2), rounded
    assert torch.equal(y.data, torch.ones(4))


LOCAL: dict[str, Any] = {
    "bmuf": lambda comm, inner: hpccomm.bmuf(comm, inner, period=3),
    "bmuf, reset": lambda comm, inner: hpccomm.bmuf(comm, inner, period=3, local_state="reset"),
    "local_sgd": lambda comm, inner: hpccomm.local_sgd(comm, inner, 3),
    "post_local_sgd": lambda comm, inner: hpccomm.post_local_sgd(comm, inner, 3, after=2),
    "slowmo": lambda comm, inner: hpccomm.slowmo(comm, inner, 0.05, 3),
    "diloco": lambda comm, inner: hpccomm.diloco(comm, inner, 3),
    "hybrid": lambda comm, inner: hpccomm.hybrid(comm, hpccomm.gtc, inner, 1, period=3),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_methods_end_with_one_model_and_learn(name: str) -> None:
    model = make_model()
    before = float(gpt_loss(model, batch_of(0)))
    optimizer = local(torch.optim.SGD(model.parameters(), 0.05, momentum=0.5), LOCAL[name])
    run_steps(model, optimizer, 0, 7 + dist.get_rank())  # one rank has a batch more
    optimizer.finish()
    assert len(hashes_of(model.parameters())) == 1
    assert float(gpt_loss(model, batch_of(0))) < before


def test_models_with_other_parameters_are_named_before_the_first_step(capfd: Any) -> None:
    """Under DDP they are refused by torch itself, as far as shapes go."""
    shape = (3, 2) if dist.get_rank() else (2, 3)
    parameters = [torch.nn.Parameter(torch.zeros(shape))]
    makes: list[Any] = [
        lambda: local(torch.optim.SGD(parameters, 0.1), lambda comm, inner: hpccomm.local_sgd(comm, inner, 2)),
        lambda: OneBitAdam(parameters, 0.1, 3),
        lambda: hpccomm.BucketedExchange(communicator(), {"w": parameters[0]}, hpccomm.mean),
    ]
    for make in makes:
        with pytest.raises(MismatchError, match=r"float32\[3, 2\] on rank 1, .* float32\[2, 3\] on rank 0"):
            make()


def test_local_sgd_with_a_period_of_one_is_the_mean_of_the_models() -> None:
    model = make_model()
    start = [each.detach().clone() for each in model.parameters()]
    optimizer = local(torch.optim.SGD(model.parameters(), 0.5), lambda comm, inner: hpccomm.local_sgd(comm, inner, 1))
    run_steps(model, optimizer, 0, 1)
    gradients = [each.grad for each in model.parameters()]
    for weight, begin, gradient in zip(model.parameters(), start, gradients, strict=True):
        dist.all_reduce(gradient, dist.ReduceOp.AVG)
        assert torch.allclose(weight, begin - 0.5 * gradient, atol=1e-6)  # other roundings


def test_local_steps_continue_with_the_same_bits() -> None:
    model = make_model()
    optimizer = local(torch.optim.Adam(model.parameters(), 1e-3), LOCAL["bmuf"])
    run_steps(model, optimizer, 0, 4)
    saved = write_and_read([model.state_dict(), optimizer.state_dict()])
    run_steps(model, optimizer, 4, 7)
    again = make_model()
    again.load_state_dict(saved[0])
    other = local(torch.optim.Adam(again.parameters(), 1e-3), LOCAL["bmuf"])
    other.load_state_dict(saved[1])
    run_steps(again, other, 4, 7)
    assert hash_of(again.parameters()) == hash_of(model.parameters())
    with pytest.raises(ArgumentError, match="pass lambda comm, inner"):
        local(torch.optim.SGD(again.parameters(), 0.1), lambda comm, inner: inner)


def shard_on(mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.mpi(sizes=(4,), timeout=300)
def test_mics_is_data_parallel_training_in_two_hops() -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = shard_on(mesh["shard"])
    second_hop(model, mesh.get_group("replicate"), hpccomm.mean)
    run_steps(model, torch.optim.SGD(model.parameters(), 0.05), 0, 4)
    plain = torch.nn.parallel.DistributedDataParallel(make_model())
    run_steps(plain, torch.optim.SGD(plain.parameters(), 0.05), 0, 4)
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.full_tensor(), other, atol=1e-6)  # sums of four float32 in another order
    assert len(hashes_of(model.parameters())) == 1


@pytest.mark.mpi(sizes=(4,), timeout=300)
def test_a_second_hop_with_few_elements_sends_less_than_a_fortieth_of_a_dense_one() -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    sent = []
    for make in (hpccomm.mean, partial(hpccomm.gtc, density=0.005)):
        model = shard_on(mesh["shard"])
        hop = second_hop(model, mesh.get_group("replicate"), make)
        run_steps(model, torch.optim.SGD(model.parameters(), 0.05), 0, 10)
        sent.append(sum(hpccomm.report(each).cost.wire_bytes for each in hop.states.values()))
    assert sent[1] < sent[0] / 40


@pytest.mark.mpi(sizes=(4,), timeout=300)
@pytest.mark.parametrize("name", ["gtc", "int8", "onebit"])
def test_mics_with_a_compressed_second_hop_sends_less_and_continues_with_the_same_bits(name: str) -> None:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = mesh.get_group("replicate")
    model = shard_on(mesh["shard"])
    hop = second_hop(model, group, EXCHANGES[name])
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    run_steps(model, optimizer, 0, 3)
    weights = copy.deepcopy([each.to_local().detach().clone() for each in model.parameters()])
    saved = write_and_read(hop.state_dict())
    run_steps(model, optimizer, 3, 5)
    again = shard_on(mesh["shard"])
    for each, value in zip(again.parameters(), weights, strict=True):
        each.to_local().detach().copy_(value)
    other = second_hop(again, group, EXCHANGES[name])
    other.load_state_dict(saved)
    run_steps(again, torch.optim.SGD(again.parameters(), 0.05), 3, 5)
    assert hash_of(again.parameters()) == hash_of(model.parameters())
    sent = sum(hpccomm.report(each).cost.wire_bytes for each in hop.states.values())
    dense = 5 * sum(each.to_local().numel() * 4 for each in model.parameters())
    assert sent < dense / 2
    with pytest.raises(ArgumentError, match="no module of fully_shard"):
        second_hop(torch.nn.Linear(2, 2), group, hpccomm.mean)


__all__ = ["CONTEXT", "process_group"]
