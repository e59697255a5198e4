"""Steps to a target: added to the weights that they were made for, they give the target, bit for bit.

``weights + (target − weights)`` is rounded, differently on ranks whose weights differ; where a weight is much larger
than its target, or not finite, no floating-point step reaches the target.  Adding a step of this module to those
weights therefore copies the target; in every other expression it is the ordinary array ``target − weights``.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.arrays import borrow, narrow, to_torch

Vector = npt.NDArray[Any]


class ExactStep(np.ndarray[Any, np.dtype[Any]]):
    """NumPy's step; ``weights + step``, ``step + weights`` and ``weights += step`` are ``target``."""

    target: Vector | None
    origin: Vector | None

    def __array_finalize__(self, source: Any) -> None:
        self.target = self.origin = None

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        others = [each for each in inputs if each is not self]
        if ufunc is np.add and method == "__call__" and len(others) == 1 and self.starts_from(others[0]):
            inputs, ufunc = (self.target,), np.positive
        plain = [np.asarray(each) if isinstance(each, ExactStep) else each for each in inputs]
        if "out" in kwargs:
            kwargs["out"] = tuple(np.asarray(each) if isinstance(each, ExactStep) else each for each in kwargs["out"])
        return getattr(ufunc, method)(*plain, **kwargs)

    def starts_from(self, weights: Any) -> bool:
        """Whether these are the weights that the step was made for."""
        return self.origin is not None and are_same(weights, self.origin)


def are_same(weights: Any, origin: Vector) -> bool:
    """Whether two arrays are alike and share memory or hold equal values."""
    return (
        getattr(weights, "shape", None) == origin.shape
        and weights.dtype == origin.dtype
        and (np.may_share_memory(weights, origin) or np.array_equal(weights, origin, equal_nan=True))
    )


def exact_step(weights: Vector, target: Vector) -> Vector:
    """The step from ``weights`` to ``target``, rounded to the weights' dtype."""
    target = narrow(target, weights.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        step: Any = np.asarray(np.subtract(target, weights)).view(ExactStep)
    step.target, step.origin = target, weights
    return step


def exact_tensor(weights: Any, target: Vector) -> Any:
    """PyTorch's step from ``weights``, a tensor on the host, to ``target``, an array of their shape and dtype."""
    origin, _ = borrow(weights)
    with np.errstate(invalid="ignore", over="ignore"):
        step = to_torch(np.subtract(target, origin, out=np.empty_like(target))).as_subclass(exact_tensor_type())
    step.target, step.origin, step.made = to_torch(target), origin, step._version
    return step


@cache
def exact_tensor_type() -> Any:
    """PyTorch's step: :class:`ExactStep` for the functions of torch that add."""
    import torch

    adds = {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__iadd__}
    in_place = {torch.Tensor.add_, torch.Tensor.__iadd__}

    class ExactTensor(torch.Tensor):  # type: ignore[misc]
        """A step; added to the weights that it was made for, it gives ``target``."""

        target: Any = None
        origin: Any = None
        made: int = -1
        """Its count of changes when it was made: a step that was changed is an ordinary tensor."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            with torch._C.DisableTorchFunctionSubclass():
                if function in adds and not kwargs and (target := target_of(*args)) is not None:
                    return args[0].copy_(target) if function in in_place else target.clone()
                plain = [each.as_subclass(torch.Tensor) if isinstance(each, cls) else each for each in args]
                return function(*plain, **kwargs)

    def target_of(first: Any, second: Any) -> Any:
        """The target of a step that is added to its weights, in either order; None for other sums."""
        pairs = ((first, second), (second, first))
        return next((step.target for weights, step in pairs if is_addend(weights, step)), None)

    def is_addend(weights: Any, step: Any) -> bool:
        """Whether a step is added to the weights that it was made for."""
        fits = isinstance(step, ExactTensor) and step.made == step._version and isinstance(weights, torch.Tensor)
        return fits and are_same(borrow(weights)[0], step.origin)

    return ExactTensor
