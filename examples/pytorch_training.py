"""ResNet-20 on digits or a small GPT on Python's own sources, by any method:

    hpccomm-run -n 4 examples/pytorch_training.py --network resnet --method gtc
    hpccomm-run -n 4 examples/pytorch_training.py --network gpt --method bmuf --steps 300

Every rank has a batch of its own.  At the end rank 0 prints what the model has learned and what a step sent.
"""

from __future__ import annotations

import argparse
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import hpccomm
from hpccomm.torch import LAMB, LARS, OneBitAdam, communicator, compress, local
from hpccomm.train.torch_networks import GPT, ResNet, gpt_loss

EXCHANGES: dict[str, Any] = {  # what ranks send under DDP
    "gtc": partial(hpccomm.gtc, density=0.01),
    "dgc": partial(hpccomm.dgc, density=0.01, momentum=0.9),
    "onebit": hpccomm.onebit_sgd,
    "powersgd": partial(hpccomm.powersgd, rank=4),
    "int8": lambda comm: hpccomm.feedback(hpccomm.qsgd(seed=comm.rank), comm),
}
OPTIMIZERS: dict[str, Any] = {  # dense gradients under DDP, or none where the optimizer exchanges
    "dense": lambda params, lr, steps: torch.optim.SGD(params, lr, momentum=0.9),
    "adam": lambda params, lr, steps: torch.optim.Adam(params, lr / 50),
    "lars": lambda params, lr, steps: LARS(params, 20 * lr, weight_decay=1e-4),
    "lamb": lambda params, lr, steps: LAMB(params, lr / 10),
    "onebit_adam": lambda params, lr, steps: OneBitAdam(params, lr / 50, freeze_step=max(1, steps // 5)),
}
LOCAL: dict[str, Any] = {  # ranks step alone, and exchange models
    "bmuf": lambda comm, inner: hpccomm.bmuf(comm, inner, period=10),
    "hybrid": lambda comm, inner: hpccomm.hybrid(comm, hpccomm.gtc, inner, max(1, comm.size // 2), period=10),
    "diloco": lambda comm, inner: hpccomm.diloco(comm, inner, 10),
    "local_sgd": lambda comm, inner: hpccomm.local_sgd(comm, inner, 10),
}
METHODS = [*OPTIMIZERS, *EXCHANGES, *LOCAL]


def library_text(size: int = 2_000_000) -> torch.Tensor:
    """The first bytes of the sources of Python's standard library, as integers."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return torch.frombuffer(text[:size], dtype=torch.uint8).long()


def sample(text: torch.Tensor, batch: int, context: int, generator: torch.Generator) -> torch.Tensor:
    """A batch of random extracts, (batch, context + 1)."""
    starts = torch.randint(len(text) - context, (batch,), generator=generator)
    return torch.stack([text[start : start + context + 1] for start in starts])


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """scikit-learn's handwritten digits: 1,500 to train on and 297 to test, images (n, 1, 8, 8) and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(labels)[order]
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])


class Digits:
    """ResNet-20 on scikit-learn's digits."""

    lr, goal = 0.05, "accuracy"

    def __init__(self) -> None:
        self.train, self.test = digits()

    def make_model(self) -> torch.nn.Module:
        return ResNet()

    def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(self.train[0]), (32,), generator=generator)
        return cross_entropy(model(self.train[0][rows]), self.train[1][rows])

    def measure(self, model: torch.nn.Module) -> float:
        return float((model(self.test[0]).argmax(1) == self.test[1]).float().mean())


class Library:
    """A GPT of six layers on the standard library's text."""

    lr, goal = 0.1, "nats a byte"

    def __init__(self) -> None:
        text = library_text(500_000)
        self.train, self.test = text[:-10_000], text[-10_000:]

    def make_model(self) -> torch.nn.Module:
        return GPT()

    def loss(self, model: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        return gpt_loss(model, sample(self.train, 8, 64, generator))

    def measure(self, model: torch.nn.Module) -> float:
        return float(gpt_loss(model, sample(self.test, 32, 64, torch.Generator().manual_seed(0))))


def wrap(model: torch.nn.Module, method: str, lr: float, steps: int) -> tuple[Any, Any, Any]:
    """The model that computes gradients, the optimizer, and the object that knows what was sent."""
    if method in LOCAL:
        optimizer = local(torch.optim.SGD(model.parameters(), lr, momentum=0.9), LOCAL[method])
        return model, optimizer, lambda: optimizer.state_of_method
    if method == "onebit_adam":
        adam = OPTIMIZERS[method](model.parameters(), lr, steps)
        return model, adam, lambda: adam.states[0]
    ddp = DistributedDataParallel(model)
    if method in EXCHANGES:
        compression = compress(ddp, EXCHANGES[method])
        momentum = 0.0 if method == "dgc" else 0.9  # DGC's step has the momentum in it
        return ddp, torch.optim.SGD(ddp.parameters(), lr, momentum=momentum), lambda: compression.state
    return ddp, OPTIMIZERS[method](ddp.parameters(), lr, steps), None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=("resnet", "gpt"), default="resnet")
    parser.add_argument("--method", choices=METHODS, default="dense")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(1)
    dist.init_process_group("hpccomm")
    task = Digits() if args.network == "resnet" else Library()
    torch.manual_seed(args.seed)
    model = task.make_model()
    trained, optimizer, sent = wrap(model, args.method, args.lr or task.lr, args.steps)
    generator = torch.Generator().manual_seed(1000 * args.seed + dist.get_rank())
    for _ in range(args.steps):
        optimizer.zero_grad()
        task.loss(trained, generator).backward()
        optimizer.step()
    if args.method in LOCAL:
        optimizer.finish()
    for buffer in model.buffers():  # the statistics of batch norms are each rank's own
        if buffer.is_floating_point():
            dist.all_reduce(buffer, dist.ReduceOp.AVG)
    model.eval()
    with torch.no_grad():
        reached = task.measure(model)
    if communicator().rank == 0:
        dense = 4 * sum(each.numel() for each in model.parameters())
        per_step = (
            hpccomm.report(sent()).cost.wire_bytes / args.steps if sent else 2 * dense * (1 - 1 / dist.get_world_size())
        )
        print(f"{args.network} {args.method}: {task.goal} {reached:.4f}, {per_step:,.0f} bytes sent a step and rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
