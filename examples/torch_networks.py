"""Two networks for the PyTorch examples: a small GPT, and ResNet-20 for small images.

The GPT reads bytes, so it needs no tokeniser; ResNet-20 is that of He et al., CVPR 2016, section 4.2.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, time, width)
        batch, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder of bytes; returns the logits of the next byte at every place."""

    def __init__(self, layers: int = 6, width: int = 128, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # (batch, time) -> (batch, time, 256)
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt_loss(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy in nats a byte of ``text``, (batch, time + 1) bytes."""
    return functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


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


class Residual(nn.Module):
    """Two convolutions and a shortcut without weights."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride = after // before if after > before else 1
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


class ResNet(nn.Module):
    """ResNet-20 with three blocks at each of three widths."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width] * depth + [2 * width] * depth + [4 * width] * depth
        pairs = zip([width, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Residual(before, after) for before, after in pairs))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, channels, height, width) -> (batch, classes)
        x = self.blocks(functional.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """scikit-learn's handwritten digits: 1,500 to train on and 297 to test, images (n, 1, 8, 8) and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.tensor(labels)[order]
    return (images[:1500], labels[:1500]), (images[1500:], labels[1500:])
