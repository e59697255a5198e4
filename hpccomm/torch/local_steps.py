"""Local steps around any optimizer of torch: BMUF, hybrid, DiLoCo, SlowMo, post-local SGD and local SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hpccomm.algorithms import checkpoints
from hpccomm.algorithms.agreement import check_same_tensors, rows_of
from hpccomm.algorithms.exact_steps import exact_step
from hpccomm.algorithms.local_steps import PeriodicTransform
from hpccomm.algorithms.transforms import Transform
from hpccomm.errors import ArgumentError
from hpccomm.torch.parameters import ParameterVector, communicator, from_tensors, name_groups, to_tensors
from hpccomm.torch.wrapper import OptimizerWrapper


class LocalOptimizer(OptimizerWrapper):
    """What :func:`local` returns; it has the methods of the optimizer that it wraps, and ``finish``."""

    def __init__(self, optimizer: Any, make: Callable[[Any, Transform], PeriodicTransform], group: Any) -> None:
        super().__init__(optimizer)
        self.vector = ParameterVector(name_groups(optimizer))
        comm = communicator(group)
        check_same_tensors(comm, "local", rows_of(self.vector.bucket), "make the model and the optimizer alike")
        self.method = make(comm, Transform(self._forget, self._step))
        if not isinstance(self.method, PeriodicTransform):
            raise ArgumentError(
                f"local: {make!r} made {self.method!r}: pass lambda comm, inner: hpccomm.bmuf(comm, inner)"
            )
        self.state_of_method = self.method.init(self.vector.weights())

    def _forget(self, weights: Any) -> int:
        """A new state: torch's optimizer makes its own anew."""
        self.optimizer.state.clear()
        return 0

    def _step(self, gradient: Any, state: int, weights: Any) -> tuple[Any, int]:
        """A step of torch's optimizer from these weights with this gradient."""
        self.vector.set_weights(weights)
        self.vector.set_gradients(gradient)
        self.optimizer.step()
        return exact_step(weights, self.vector.weights()), state + 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One local step; the last of a block also exchanges the models (collective then)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        weights = self.vector.weights()
        step, self.state_of_method = self.method.update(self.vector.gradients(), self.state_of_method, weights)
        self.vector.set_weights(weights + step)
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        """Call it once, when this rank has no more batches: the model becomes the global one (collective)."""
        _, self.state_of_method = self.method.finish(self.state_of_method, self.vector.weights())
        self.vector.set_weights(self.method.export(self.state_of_method))

    def state_dict(self) -> dict[str, Any]:
        """The states of this rank's optimizer and of the method."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "method": to_tensors(checkpoints.state_dict(self.state_of_method)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.state_of_method = checkpoints.load_state_dict(self.state_of_method, from_tensors(state_dict["method"]))


def local(optimizer: Any, method: Callable[[Any, Transform], PeriodicTransform], group: Any = None) -> LocalOptimizer:
    """Let every rank step alone with ``optimizer``, and exchange models as ``method(comm, inner)`` says.

    ``inner`` is the optimizer as a transform: ``lambda comm, inner: hpccomm.bmuf(comm, inner, period=50)``, or
    ``hpccomm.diloco``, ``slowmo``, ``local_sgd``, ``post_local_sgd`` likewise, and
    ``lambda comm, inner: hpccomm.hybrid(comm, hpccomm.gtc, inner, group_size=2)``.  Give it the parameters of the model
    itself, the same on all ranks at the start, not those of a DDP; end a run with ``finish()``.  Each rank's optimizer
    keeps its state; ``local_state="reset"`` makes it anew with each block.
    """
    return LocalOptimizer(optimizer, method, group)
