"""LARS, LAMB and 1-bit Adam as optimizers of torch, on hpccomm's own methods and their fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from hpccomm.algorithms import checkpoints
from hpccomm.algorithms.large_batch import lamb, lars
from hpccomm.algorithms.onebit import onebit_adam
from hpccomm.errors import ArgumentError
from hpccomm.torch.parameters import ParameterVector, communicator, from_tensors, name_parameters, to_tensors

Exclude = Callable[[str, Any], bool]


def is_vector(name: str, parameter: Any) -> bool:
    """Biases and the scales of normalisations: no weight decay and no trust ratio."""
    return bool(parameter.ndim < 2)


class MethodOptimizer(torch.optim.Optimizer):
    """An optimizer whose steps are those of hpccomm's transforms; its state is that of the transforms.

    Parameters are those of ``torch.optim``: an iterable, pairs of name and parameter, or param groups, which may have
    a rate and options of their own.
    """

    def __init__(self, parameters: Any, defaults: dict[str, Any]) -> None:
        super().__init__(parameters, defaults)
        self._names: list[dict[str, Any]] = [name_group(each) for each in self.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Options of the groups, and the methods' states."""
        return {**super().state_dict(), "methods": [to_tensors(checkpoints.state_dict(each)) for each in self.states]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, bit for bit."""
        given = dict(state_dict)
        saved = given.pop("methods", None)
        if saved is None or len(saved) != len(self.states):
            raise ArgumentError(f"load_state_dict: the state is not one of {type(self).__name__} with as many groups")
        super().load_state_dict(given)
        pairs = zip(self.states, saved, strict=True)
        self.states = [checkpoints.load_state_dict(like, from_tensors(each)) for like, each in pairs]

    states: list[Any]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is made: a method's state has the length of its parameters."""
        if hasattr(self, "states"):
            raise ArgumentError(f"{type(self).__name__}: parameters cannot be added later: make a new optimizer")
        super().add_param_group(param_group)


def name_group(group: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a group by name."""
    names = group.get("param_names")
    return name_parameters(zip(names, group["params"], strict=True) if names else group["params"])


class TrustRatioOptimizer(MethodOptimizer):
    """LARS and LAMB: one method for each param group, on all ranks the same, after gradients were averaged."""

    def __init__(self, parameters: Any, defaults: dict[str, Any], exclude: Exclude) -> None:
        super().__init__(parameters, defaults)
        self.vectors, self.methods = [], []
        for group, named in zip(self.param_groups, self._names, strict=True):
            exempt = [name for name, each in named.items() if exclude(name, each)]
            vector = ParameterVector(named, exempt)
            self.vectors.append(vector)
            self.methods.append(self.make(vector.bucket, partial(rate_of, group), group))
        pairs = zip(self.methods, self.vectors, strict=True)
        self.states = [method.init(vector.weights()) for method, vector in pairs]

    def make(self, bucket: Any, lr: Callable[[int], float], group: dict[str, Any]) -> Any:
        """The method of a param group."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every group."""
        loss = run_closure(closure)
        for k, (method, vector) in enumerate(zip(self.methods, self.vectors, strict=True)):
            weights = vector.weights()
            step, self.states[k] = method.update(vector.gradients(), self.states[k], weights)
            vector.set_weights(weights + step)
        return loss


def rate_of(group: dict[str, Any], count: int) -> float:
    """The rate of a param group, which a scheduler of torch may change."""
    return float(group["lr"])


def run_closure(closure: Any) -> Any:
    """The loss of torch's closure, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class LARS(TrustRatioOptimizer):
    """Layer-wise adaptive rate scaling (You, Gitman & Ginsburg 2017), :func:`hpccomm.lars`.

    ``exclude(name, parameter)`` says which parameters have neither weight decay nor trust ratio, by default those of
    fewer than two dimensions.  Further ``options`` are those of :func:`hpccomm.lars`.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        exclude: Exclude = is_vector,
        **options: Any,
    ) -> None:
        self.options = options
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}, exclude
        )

    def make(self, bucket: Any, lr: Callable[[int], float], group: dict[str, Any]) -> Any:
        """LARS on a group."""
        named = {name: group[name] for name in ("momentum", "weight_decay", "trust")}
        return lars(bucket, lr, **named, **self.options)


class LAMB(TrustRatioOptimizer):
    """Layer-wise adaptive moments (You et al., ICLR 2020), :func:`hpccomm.lamb`.

    ``exclude(name, parameter)`` says which parameters have no weight decay, by default those of fewer than two
    dimensions; ``adapt="flags"`` takes the trust ratio from them as well.  Further ``options`` are those of
    :func:`hpccomm.lamb`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        exclude: Exclude = is_vector,
        **options: Any,
    ) -> None:
        self.options = options
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, exclude)

    def make(self, bucket: Any, lr: Callable[[int], float], group: dict[str, Any]) -> Any:
        """LAMB on a group."""
        b1, b2 = group["betas"]
        return lamb(bucket, lr, b1=b1, b2=b2, eps=group["eps"], weight_decay=group["weight_decay"], **self.options)


class OneBitAdam(MethodOptimizer):
    """1-bit Adam (Tang et al., ICML 2021), :func:`hpccomm.onebit_adam`: it exchanges the gradients itself.

    Give it the model, not a DDP of it: ranks pass their own gradients.  The first ``freeze_step`` steps are dense.
    ``group`` is a process group of hpccomm, a communicator, or None for all ranks.  ``lr`` and ``weight_decay`` may
    differ between param groups.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        freeze_step: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        group: Any = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        named = {f"{k}.{name}": each for k, part in enumerate(self._names) for name, each in part.items()}
        self.vector = ParameterVector(named)
        self._places = np.cumsum([0, *(sum(each.numel() for each in part.values()) for part in self._names)])
        b1, b2 = betas
        self.method = onebit_adam(
            communicator(group), 1.0, freeze_step, bucket=self.vector.bucket, b1=b1, b2=b2, eps=eps
        )
        self.states = [self.method.init(self.vector.weights())]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Exchange and step (collective)."""
        loss = run_closure(closure)
        weights = self.vector.weights()
        step, self.states[0] = self.method.update(self.vector.gradients(), self.states[0], weights)
        moves = step.any()  # no rank steps where a gradient is not finite
        for group, lo, hi in zip(self.param_groups, self._places, self._places[1:], strict=False):
            part, rate = weights[lo:hi], np.float32(group["lr"])
            decay = rate * np.float32(group["weight_decay"] if moves else 0) * part
            part += rate * step[lo:hi] - decay
        self.vector.set_weights(weights)
        return loss
