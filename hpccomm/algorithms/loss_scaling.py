"""Loss scaling: the loss is multiplied by a factor, so that 16-bit gradients do not underflow, and steps divided by it.

A gradient that is not finite skips the step on all ranks and halves the factor; many good steps double it (Micikevicius
et al., *Mixed precision training*, ICLR 2018).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.error_feedback import all_ranks_true
from hpccomm.algorithms.reports import MessageReport
from hpccomm.algorithms.states import children_of, skip_step
from hpccomm.algorithms.transforms import (
    SkipState,
    Transform,
    Vector,
    check_transform,
    require,
    round_like,
)
from hpccomm.arrays import widen

if TYPE_CHECKING:
    from mpi4py import MPI


class LossScale(NamedTuple):
    """The factor of the loss that keeps 16-bit gradients from underflow; the same on all ranks."""

    value: float = 1.0
    interval: int = 0
    """Steps without overflow after which the factor doubles (0: it is constant).  An overflow halves it."""
    good_steps: int = 0
    """Steps since the last change."""

    def update(self, overflow: bool) -> LossScale:
        """The loss scale of the next step."""
        if not self.interval:
            return self
        if overflow:
            return self._replace(value=max(1.0, self.value / 2), good_steps=0)
        if self.good_steps + 1 == self.interval:
            return self._replace(value=min(2.0**24, self.value * 2), good_steps=0)
        return self._replace(good_steps=self.good_steps + 1)


class ScaledState(NamedTuple):
    """The loss scale of the next step, and what was skipped before the inner state."""

    scale: LossScale
    inner: SkipState

    def messages(self) -> MessageReport:
        """The messages of the inner state."""
        return self.inner.messages()

    def skip(self) -> ScaledState:
        """After a step that all ranks skip."""
        return ScaledState(self.scale.update(True), skip_step(self.inner))


def scale_loss(comm: MPI.Intracomm, inner: Transform, first: LossScale | None = None) -> Transform:
    """Divide the gradient of a scaled loss by :func:`loss_scale` before ``inner``, which holds the exchange.

    Multiply the loss of every step by ``loss_scale(state)``.  Before anything is exchanged the ranks of ``comm`` agree,
    in one byte each, whether all gradients are finite; where one is not, all step by zero, ``inner`` and its residuals
    stay as they are, and the factor halves.  ``first``: by default 65,536, doubled after 2,000 good steps.  Around
    compressed exchanges too: residuals are in the units of the gradient, whatever the factor was.

    16-bit gradients are divided in float32 and rounded to their dtype again, in which the exchange sends them: what
    float16 cannot hold without the factor, below 3e-8, is lost here.  Where that matters keep the weights in float32,
    as PyTorch's GradScaler does, and pass ``gradient.astype("f4")``.

    >>> from mpi4py import MPI
    >>> from hpccomm import scale
    >>> method, weights = scale_loss(MPI.COMM_SELF, scale(-1), LossScale(8.0, 2)), np.zeros(1)
    >>> step, state = method.update(np.array([16.0]), method.init(weights), weights)
    >>> step.tolist(), loss_scale(state)
    ([-2.0], 8.0)
    >>> step, state = method.update(np.array([np.inf]), state, weights)
    >>> step.tolist(), loss_scale(state)
    ([0.0], 4.0)
    """
    comm = as_communicator("scale_loss", comm)
    check_transform("scale_loss", inner)
    first = LossScale(2.0**16, 2000) if first is None else first
    require(isinstance(first, LossScale), f"scale_loss: first is {first!r}: pass hpccomm.LossScale(65536.0, 2000)")
    require(first.value > 0, f"scale_loss: the scale is {first.value}: pass a positive number")

    def update(gradient: Vector, state: ScaledState, weights: Vector) -> tuple[Vector, ScaledState]:
        if not all_ranks_true(comm, bool(np.isfinite(gradient).all())):
            return np.zeros_like(weights), state.skip()
        unscaled = round_like(widen(gradient) / state.scale.value, gradient.dtype)  # 65,536 is infinite in float16
        step, after = inner.update(unscaled, state.inner.inner, weights)
        return step, ScaledState(state.scale.update(False), state.inner._replace(inner=after))

    def init(weights: Vector) -> ScaledState:
        return ScaledState(first, SkipState(0, inner.init(weights)))

    return Transform(init, update, flag_comm=comm, needs_whole="scale_loss", parts=[inner])


def loss_scale(state: Any) -> float:
    """The factor by which to multiply the loss of the next step: of a state at any depth, 1 where it has none."""
    found = find_scale(state)
    return 1.0 if found is None else found.value


def find_scale(state: Any) -> LossScale | None:
    """The loss scale in a state at any depth, the first whose factor is not 1; None where it has none."""
    if isinstance(state, LossScale) or not isinstance(state, tuple):
        return state if isinstance(state, LossScale) else None
    scales = [found for _, each, _ in children_of(state) if (found := find_scale(each)) is not None]
    return next((each for each in scales if each.value != 1), scales[0] if scales else None)
