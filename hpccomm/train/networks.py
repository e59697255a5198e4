"""Two small networks with explicit backpropagation, computed with NumPy or CuPy, whichever holds the samples.

*b samples, gradients summed over them.*  A network is a table of shapes and two functions of named weights, which are
views of one flat vector.  The gradient is written into such views too, so nothing is packed before the exchange.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hpccomm.train.datasets import CONTEXT, Dataset

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]
Shapes = dict[str, tuple[int, ...]]


class Network(Protocol):
    """The interface of a network."""

    shapes: Shapes

    def initial_weights(self, seed: int) -> dict[str, Array]:
        """New weights in float32."""

    def scores(self, weights: Tensors, inputs: Array) -> Array:
        """The score of each sample and class; the class of the largest score is the prediction."""

    def learn(self, weights: Tensors, inputs: Array, targets: Array, gradient: Tensors) -> float:
        """Write the gradient of the sum of the samples' losses into ``gradient``; returns that sum."""


class Drawn:
    """A network of matrices, embeddings and vectors that are added."""

    shapes: Shapes

    def initial_weights(self, seed: int) -> dict[str, Array]:
        """As :meth:`Network.initial_weights`."""
        return initial_weights(self.shapes, seed)


class Perceptron(Drawn):
    """inputs (b, n) → tanh(inputs · hidden + shift) → scores (b, classes); softmax, cross-entropy."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        self.shapes: Shapes = {
            "hidden": (inputs, hidden),
            "hidden_shift": (hidden,),
            "out": (hidden, classes),
            "out_shift": (classes,),
        }

    def activations(self, weights: Tensors, inputs: Array) -> Array:
        """The hidden layer, (b, hidden)."""
        return library_of(inputs).tanh(inputs @ weights["hidden"] + weights["hidden_shift"])

    def scores(self, weights: Tensors, inputs: Array) -> Array:
        """(b, classes)."""
        return self.activations(weights, inputs) @ weights["out"] + weights["out_shift"]

    def learn(self, weights: Tensors, inputs: Array, targets: Array, gradient: Tensors) -> float:
        """As :meth:`Network.learn`."""
        return self.backward(weights, inputs, targets, gradient)[0]

    def backward(self, weights: Tensors, inputs: Array, targets: Array, gradient: Tensors) -> tuple[float, Array]:
        """The loss, and its gradient with respect to the inputs of the hidden layer's tanh, (b, hidden)."""
        active = self.activations(weights, inputs)
        loss, error = cross_entropy(active @ weights["out"] + weights["out_shift"], targets)
        slope = (error @ weights["out"].T) * (1 - active * active)
        xp = library_of(inputs)
        xp.matmul(active.T, error, out=gradient["out"])
        xp.sum(error, axis=0, out=gradient["out_shift"])
        xp.matmul(inputs.T, slope, out=gradient["hidden"])
        xp.sum(slope, axis=0, out=gradient["hidden_shift"])
        return loss, slope


class Characters(Drawn):
    """Characters (b, 16) → embeddings side by side → perceptron → next character (Bengio et al. 2003)."""

    def __init__(self, classes: int, width: int, hidden: int) -> None:
        self.width = width
        self.body = Perceptron(CONTEXT * width, hidden, classes)
        self.shapes: Shapes = {"embedding": (classes, width), **self.body.shapes}

    def embed(self, weights: Tensors, inputs: Array) -> Array:
        """(b, 16 · width)."""
        return weights["embedding"][inputs].reshape(len(inputs), CONTEXT * self.width)

    def scores(self, weights: Tensors, inputs: Array) -> Array:
        """(b, classes)."""
        return self.body.scores(weights, self.embed(weights, inputs))

    def learn(self, weights: Tensors, inputs: Array, targets: Array, gradient: Tensors) -> float:
        """As :meth:`Network.learn`."""
        loss, slope = self.body.backward(weights, self.embed(weights, inputs), targets, gradient)
        by_character = (slope @ weights["hidden"].T).reshape(*inputs.shape, self.width)
        gradient["embedding"][...] = 0
        library_of(inputs).add.at(gradient["embedding"], inputs, by_character)
        return loss


def library_of(x: Array) -> Any:
    """NumPy, or CuPy for an array on a device."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def cross_entropy(scores: Array, targets: Array) -> tuple[float, Array]:
    """Sum over the samples of -log softmax(scores)[target], and its gradient with respect to the scores."""
    xp = library_of(scores)
    shifted = scores - scores.max(axis=1, keepdims=True)
    logs = shifted - xp.log(xp.exp(shifted).sum(axis=1, keepdims=True))
    rows = xp.arange(len(targets))
    error = xp.exp(logs)
    error[rows, targets] -= 1
    return -float(logs[rows, targets].sum(dtype=np.float64)), error


def initial_weights(shapes: Shapes, seed: int) -> dict[str, Array]:
    """Initial weights in float32: matrices scaled by 1/√rows, which keeps the size of activations, and zero vectors."""
    rng = np.random.default_rng(seed)
    return {name: draw_tensor(rng, name, shape).astype(np.float32) for name, shape in shapes.items()}


def draw_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Array:
    """One tensor of initial weights."""
    if len(shape) == 1:
        return np.zeros(shape)
    return rng.standard_normal(shape) / (1 if name == "embedding" else np.sqrt(shape[0]))


def network_for(data: Dataset) -> Network:
    """The network for a dataset: with embeddings for text, a plain perceptron for images."""
    if data.inputs.dtype == np.uint8:
        return Characters(data.classes, width=16, hidden=256)
    return Perceptron(data.inputs.shape[1], hidden=64, classes=data.classes)
