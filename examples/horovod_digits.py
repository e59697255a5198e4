"""A program written for Horovod: a small convolutional network on scikit-learn's digits, with the import line changed.

    hpccomm-run -n 4 examples/horovod_digits.py --epochs 3 --fp16

Each rank trains on its part of the samples, which torch's DistributedSampler chooses, and the gradients are averaged in
the optimizer's step.  Rank 0 saves the model, and prints what all ranks have measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import hpccomm.horovod.torch as hvd  # was: import horovod.torch as hvd

TRAINED = 1500


class Net(nn.Module):
    """Two convolutions and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 20, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()
        )
        self.classes = nn.Sequential(nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Dropout(0.2), nn.Linear(50, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 1, 8, 8) -> (batch, 10)
        return self.classes(self.features(x))


def load() -> TensorDataset:
    """All digits, in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return TensorDataset(pixels[order], torch.tensor(labels)[order])


def parts(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, DistributedSampler]:
    """This rank's samples to train on and to test."""
    everything = load()
    trained = Subset(everything, range(TRAINED))
    tested = Subset(everything, range(TRAINED, len(everything)))
    samplers = [DistributedSampler(each, num_replicas=hvd.size(), rank=hvd.rank()) for each in (trained, tested)]
    return (
        DataLoader(trained, args.batch_size, sampler=samplers[0]),
        DataLoader(tested, args.batch_size, sampler=samplers[1]),
        samplers[0],
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: DataLoader) -> None:
    """One pass through this rank's samples."""
    model.train()
    for x, y in batches:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()


def measure(model: nn.Module, batches: DataLoader) -> tuple[float, float]:
    """Loss and accuracy, the means over all ranks."""
    model.eval()
    loss, right, count = torch.tensor(0.0), torch.tensor(0.0), 0
    with torch.no_grad():
        for x, y in batches:
            scores = model(x)
            loss += cross_entropy(scores, y, reduction="sum")
            right += (scores.argmax(1) == y).sum()
            count += len(y)
    return float(hvd.allreduce(loss / count, name="loss")), float(hvd.allreduce(right / count, name="accuracy"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="samples of a step and rank")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of one rank")
    parser.add_argument("--fp16", action="store_true", help="gradients travel in 16 bits")
    parser.add_argument("--save", type=Path, help="where rank 0 saves the model")
    args = parser.parse_args()

    hvd.init()
    torch.manual_seed(42)
    torch.set_num_threads(1)
    batches, tests, sampler = parts(args)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), args.lr * hvd.size(), momentum=0.5)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=hvd.Compression.fp16 if args.fp16 else hvd.Compression.none,
        op=hvd.Average,
    )
    for epoch in range(1, args.epochs + 1):
        sampler.set_epoch(epoch)
        train(model, optimizer, batches)
        loss, accuracy = measure(model, tests)
        if hvd.rank() == 0:
            print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.3f}", flush=True)
    if args.save and hvd.rank() == 0:
        torch.save(model.state_dict(), args.save)


if __name__ == "__main__":
    main()
