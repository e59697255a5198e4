"""A deep network that is computed layer by layer, so that no rank needs all weights at once.

*b samples; w the width; L inner layers; all computing in float32, whatever type the weights are gathered in.*  A layer
is a table of shapes, a forward function, and a backward function that writes the layer's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hpccomm.arrays import narrow, widen
from hpccomm.errors import ArgumentError
from hpccomm.train.datasets import CONTEXT, Dataset
from hpccomm.train.networks import Array, Shapes, Tensors, cross_entropy, draw_tensor

if TYPE_CHECKING:
    from hpccomm.algorithms.sharded.units import ShardedModel

EMBEDDING = 16
"""Numbers in the embedding of a character."""


class Layer(Protocol):
    """The interface of a layer."""

    shapes: Shapes

    def forward(self, weights: Tensors, x: Array) -> Array:
        """The output of the layer for an input, (b, …) each."""

    def backward(self, weights: Tensors, x: Array, y: Array, error: Array, gradient: Tensors) -> Array:
        """Write the gradient of the weights; ``error`` is the gradient of ``y``; returns the gradient of ``x``."""


class Embedding:
    """The embeddings of 16 characters (b, 16), concatenated to (b, 256)."""

    def __init__(self, classes: int) -> None:
        self.shapes: Shapes = {"embedding": (classes, EMBEDDING)}

    def forward(self, weights: Tensors, x: Array) -> Array:
        """As :meth:`Layer.forward`."""
        return np.asarray(weights["embedding"][x].reshape(len(x), CONTEXT * EMBEDDING))

    def backward(self, weights: Tensors, x: Array, y: Array, error: Array, gradient: Tensors) -> Array:
        """As :meth:`Layer.backward`; characters have no gradient."""
        total = np.zeros(self.shapes["embedding"], error.dtype)
        np.add.at(total, x, error.reshape(*x.shape, EMBEDDING))
        store_gradient(gradient["embedding"], total)
        return error


class Linear:
    """x·w + c."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.shapes: Shapes = {"w": (inputs, outputs), "c": (outputs,)}

    def forward(self, weights: Tensors, x: Array) -> Array:
        """As :meth:`Layer.forward`."""
        return np.asarray(x @ weights["w"] + weights["c"])

    def backward(self, weights: Tensors, x: Array, y: Array, error: Array, gradient: Tensors) -> Array:
        """As :meth:`Layer.backward`."""
        store_gradient(gradient["w"], x.T @ error)
        store_gradient(gradient["c"], error.sum(axis=0))
        return np.asarray(error @ weights["w"].T)


class Tanh(Linear):
    """tanh(x·w + c)."""

    def forward(self, weights: Tensors, x: Array) -> Array:
        """As :meth:`Layer.forward`."""
        return np.asarray(np.tanh(super().forward(weights, x)))

    def backward(self, weights: Tensors, x: Array, y: Array, error: Array, gradient: Tensors) -> Array:
        """As :meth:`Layer.backward`."""
        return super().backward(weights, x, y, error * (1 - y * y), gradient)


class Residual(Tanh):
    """x + tanh(x·w + c)."""

    def forward(self, weights: Tensors, x: Array) -> Array:
        """As :meth:`Layer.forward`."""
        return np.asarray(x + super().forward(weights, x))

    def backward(self, weights: Tensors, x: Array, y: Array, error: Array, gradient: Tensors) -> Array:
        """As :meth:`Layer.backward`."""
        return np.asarray(error + super().backward(weights, x, y - x, error, gradient))


class LayeredNetwork:
    """A network as its layers by name, in the order in which they are computed."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers

    @property
    def parameters(self) -> int:
        """The number of parameters, Ψ."""
        return sum(int(np.prod(shape)) for layer in self.layers.values() for shape in layer.shapes.values())

    def initial_weights(self, seed: int) -> Iterator[tuple[str, dict[str, Array]]]:
        """Initial weights, layer by layer: matrices are scaled by 1/√rows, those of inner layers by 1/√(rows · L)."""
        depth = max(1, sum(isinstance(layer, Residual) for layer in self.layers.values()))
        for number, (name, layer) in enumerate(self.layers.items()):
            rng = np.random.default_rng((seed, number))
            shrink = np.sqrt(depth) if isinstance(layer, Residual) else 1.0
            yield name, {key: (draw_tensor(rng, key, s) / shrink).astype(np.float32) for key, s in layer.shapes.items()}

    def scores(self, states: ShardedModel, inputs: Array) -> Array:
        """The score of each sample and class (collective in the partition group)."""
        return self.activations(states, inputs)[-1]

    def activations(self, states: ShardedModel, inputs: Array) -> list[Array]:
        """The input of each layer, and at the end the output of the last layer."""
        seen, names = [inputs], [*self.layers, None]
        for name, following in pairwise(names):
            assert name is not None
            weights = to_float32(states.gather(name, ahead=following))
            seen.append(self.layers[name].forward(weights, seen[-1]))
            states.release(name)
        return seen

    def learn(self, states: ShardedModel, inputs: Array, targets: Array, factor: float, last: bool = False) -> float:
        """Add ``factor`` times the gradient of the sum of the samples' losses to the shards; returns that sum.

        One micro-step (collective in the partition group), the ``last`` one of a step or not; a rank may have no
        samples.
        """
        seen = self.activations(states, inputs)
        y = seen.pop()
        loss, error = cross_entropy(y, targets)
        error *= factor
        for name, following in pairwise([*reversed(self.layers), None]):
            assert name is not None
            x, weights, gradient = seen.pop(), to_float32(states.gather(name, ahead=following)), states.gradient(name)
            error = self.layers[name].backward(weights, x, y, error, gradient)
            states.release(name)
            states.reduce_accumulate(name, gradient, last)
            y = x
        return loss


def store_gradient(there: Array, gradient: Array) -> None:
    """Round to the type in which gradients are reduced; an overflow becomes infinite, and the loss scale shrinks."""
    there[...] = narrow(gradient, there.dtype)


def to_float32(weights: Tensors) -> Tensors:
    """The weights in float32: those of 16 bits are widened."""
    return {name: widen(each) for name, each in weights.items()}


def deep_network_for(data: Dataset, width: int, layers: int) -> LayeredNetwork:
    """The network for text: embeddings, ``layers`` inner layers of ``width``² weights, scores."""
    if data.inputs.dtype != np.uint8:
        raise ArgumentError("mics, zero and ddp train a deep network on text: use the dataset stdlib")
    inner: dict[str, Layer] = {f"inner{number}": Residual(width, width) for number in range(layers)}
    return LayeredNetwork(
        {
            "embedding": Embedding(data.classes),
            "first": Tanh(CONTEXT * EMBEDDING, width),
            **inner,
            "scores": Linear(width, data.classes),
        }
    )
