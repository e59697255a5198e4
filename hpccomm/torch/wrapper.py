"""An optimizer around another one, which torch's learning-rate schedulers and gradient scalers take as an optimizer."""

from __future__ import annotations

from typing import Any

import torch


class OptimizerWrapper(torch.optim.Optimizer):
    """Everything but what a subclass defines is that of ``optimizer``, which it wraps."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer  # nothing of torch's own constructor: parameters and state are those of optimizer

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        return self.optimizer.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        self.optimizer.load_state_dict(state_dict)
