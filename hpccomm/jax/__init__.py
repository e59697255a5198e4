"""JAX and optax on hpccomm: transforms for optax, and one documented way inside ``jit``."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {"optax": "hpccomm.jax.gradients", "allreduce": "hpccomm.jax.callbacks"}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hpccomm.jax' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value
