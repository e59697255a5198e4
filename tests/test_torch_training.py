"""Trainings of a small GPT by DDP and FSDP2 end with the weights that gloo gives, bit for bit where sums are exact."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch_world import dist, process_group, torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from hpccomm.train.torch_networks import GPT, ResNet, gpt_loss

pytestmark = pytest.mark.mpi(sizes=(2,), timeout=300)

STEPS, CONTEXT = 50, 16


def make_model() -> Any:
    torch.manual_seed(1)
    return GPT(layers=2, width=16, heads=2, context=CONTEXT)


def batch_of(step: int) -> Any:
    """The batch of this rank."""
    seed = 1000 * step + dist.get_rank()
    return torch.randint(256, (4, CONTEXT + 1), generator=torch.Generator().manual_seed(seed))


def train(model: Any, optimizer: Any, steps: int = STEPS) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = gpt_loss(model, batch_of(step))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def hash_of(parameters: Any) -> str:
    """The bytes of all parameters; sharded ones are gathered."""
    digest = hashlib.sha256()
    for each in parameters:
        whole = each.full_tensor() if hasattr(each, "full_tensor") else each
        digest.update(whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hashes_of(parameters: Any) -> set[str]:
    """The hashes of all ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, hash_of(parameters))
    return set(found)


def run_ddp(group: Any, dtype: Any) -> str:
    model = torch.nn.parallel.DistributedDataParallel(make_model().to(dtype), process_group=group)
    train(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    return hash_of(model.parameters())


def run_fsdp2(group: Any, dtype: Any) -> str:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.DeviceMesh.from_group(group, "cpu")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    model = make_model()
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    train(model, torch.optim.Adam(model.parameters(), 1e-3))
    return hash_of(model.parameters())


WAYS: dict[str, Callable[[Any, Any], str]] = {"DDP": run_ddp, "FSDP2": run_fsdp2}


@pytest.fixture(scope="module")
def gloo(process_group: Any) -> Any:
    return dist.new_group(backend="gloo")


@pytest.mark.parametrize(
    ("way", "dtype"),  # gloo adds DDP's 16-bit gradients in 16 bits, hpccomm in float32
    [("DDP", torch.float32), ("FSDP2", torch.float32), ("FSDP2", torch.bfloat16)],
)
def test_a_training_on_two_ranks_has_the_bits_of_gloo(gloo: Any, way: str, dtype: Any) -> None:
    assert WAYS[way](dist.group.WORLD, dtype) == WAYS[way](gloo, dtype)


def test_all_ranks_end_with_the_same_weights_and_a_smaller_loss() -> None:
    model = torch.nn.parallel.DistributedDataParallel(make_model())
    losses = train(model, torch.optim.Adam(model.parameters(), 1e-2))
    assert losses[-1] < losses[0]
    assert len(hashes_of(model.parameters())) == 1


def test_fsdp1_and_the_hooks_of_torch() -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
    from torch.distributed.algorithms.join import Join
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    layers = torch.nn.Sequential(torch.nn.Linear(17, 20), torch.nn.Linear(20, 3))
    sharded = FullyShardedDataParallel(layers, device_id=torch.device("cpu"))  # resizes the storage of its tensors
    optimizer = torch.optim.Adam(sharded.parameters())
    for _ in range(2):
        sharded(torch.ones(4, 17)).sum().backward()
        optimizer.step()
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(30, 20))
    state = powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)  # its callbacks call, and wait
    shards = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    for _ in range(3):
        model(torch.ones(4, 30)).sum().backward()
        shards.step()
    assert len(hashes_of(model.parameters())) == 1
    plain = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    with Join([plain]):  # the rank that has joined waits at once where the other waits later
        for _ in range(2 + dist.get_rank()):
            plain(torch.ones(4, 3)).sum().backward()


def test_batch_norms_buffers_and_unused_parameters_of_ddp() -> None:
    torch.manual_seed(dist.get_rank())
    net = ResNet(width=4, depth=1)
    net.unused = torch.nn.Linear(2, 2)
    model = torch.nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        model(x).square().mean().backward()
        optimizer.step()
    assert len(hashes_of(model.parameters())) == 1


__all__ = ["process_group"]
