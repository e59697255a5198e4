"""Two networks of PyTorch: a small GPT for text, and ResNet-20 for small images (He et al., CVPR 2016, section 4.2).

:class:`TorchNetwork` lets them train in the loop of NumPy's networks, by every method: the weights are one flat vector,
on whose memory torch computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

SEEDING = threading.Lock()
"""Ranks that are threads share torch's random numbers."""


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
        q, k, v = self.qkv(self.norm1(x)).view(batch, time, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder of bytes, or of other tokens; returns the logits of the next one at every place."""

    def __init__(self, layers: int = 6, width: int = 128, heads: int = 4, context: int = 64, tokens: int = 256) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(tokens, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # (batch, time) -> (batch, time, tokens)
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt_loss(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy in nats a byte of ``text``, (batch, time + 1) bytes."""
    return functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


class Residual(nn.Module):
    """Two convolutions and a shortcut without weights."""

    def __init__(self, before: int, after: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stride = after // before if after > before else 1
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = norm(after), norm(after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(y + functional.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1])))


class ResNet(nn.Module):
    """ResNet-20 with three blocks at each of three widths."""

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        width: int = 16,
        depth: int = 3,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, width, 3, 1, 1, bias=False), norm(width)
        widths = [width] * depth + [2 * width] * depth + [4 * width] * depth
        pairs = zip([width, *widths], widths, strict=False)
        self.blocks = nn.Sequential(*(Residual(before, after, norm) for before, after in pairs))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, channels, height, width) -> (batch, classes)
        x = self.blocks(functional.relu(self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


class TorchNetwork:
    """A module of torch without buffers as a :class:`~hpccomm.train.networks.Network`, for one thread.

    ``prepare`` makes the module's input of samples, ``losses`` the sum of the samples' losses of its output, the input
    and the targets, ``choose`` the scores of the output.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        prepare: Callable[[torch.Tensor], torch.Tensor],
        losses: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        choose: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._make, self._prepare, self._losses, self._choose = make, prepare, losses, choose
        with SEEDING:
            self.module = make()
        self.shapes = {name: tuple(each.shape) for name, each in self.module.named_parameters()}

    def initial_weights(self, seed: int) -> dict[str, npt.NDArray[Any]]:
        """As the module initialises itself."""
        with SEEDING, torch.random.fork_rng():
            torch.manual_seed(seed)
            return {name: each.detach().numpy() for name, each in self._make().named_parameters()}

    def _run(self, weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(self.module, weights, (inputs,))

    def scores(self, weights: Mapping[str, npt.NDArray[Any]], inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(b, classes)."""
        with torch.no_grad():
            tensors = {name: torch.from_numpy(each) for name, each in weights.items()}
            found = self._choose(self._run(tensors, self._prepare(torch.from_numpy(inputs))))
            return np.asarray(found.numpy())

    def learn(
        self,
        weights: Mapping[str, npt.NDArray[Any]],
        inputs: npt.NDArray[Any],
        targets: npt.NDArray[np.int64],
        gradient: Mapping[str, npt.NDArray[Any]],
    ) -> float:
        """Write the gradient of the sum of the samples' losses into ``gradient``; returns that sum."""
        tensors = {name: torch.from_numpy(each).requires_grad_() for name, each in weights.items()}
        samples = self._prepare(torch.from_numpy(inputs))
        loss = self._losses(self._run(tensors, samples), samples, torch.from_numpy(targets))
        for each, part in zip(gradient.values(), torch.autograd.grad(loss, list(tensors.values())), strict=True):
            torch.from_numpy(each).copy_(part)
        return float(loss.detach())


def text_losses(logits: torch.Tensor, text: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over the places of a sample, summed over the samples, (b, time, classes), (b, time), (b,)."""
    following = torch.cat([text[:, 1:], targets[:, None]], 1)
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum") / text.shape[1]


def network_for(data: Any) -> TorchNetwork:
    """The network for a dataset: a GPT of six layers for text, ResNet-20 for square images.

    ResNet-20 has group norms, so that the model is its weights alone, the same on all ranks.
    """
    torch.set_num_threads(1)
    if data.inputs.dtype == np.uint8:
        context = data.inputs.shape[1]
        return TorchNetwork(
            lambda: GPT(width=64, context=context, tokens=data.classes),
            lambda text: text.long(),
            text_losses,
            lambda logits: logits[:, -1],
        )
    side = round(data.inputs.shape[1] ** 0.5)
    return TorchNetwork(
        lambda: ResNet(classes=data.classes, norm=lambda width: nn.GroupNorm(8, width)),
        lambda images: 2 * images.view(-1, 1, side, side) - 1,
        lambda logits, images, targets: functional.cross_entropy(logits, targets, reduction="sum"),
        lambda logits: logits,
    )
