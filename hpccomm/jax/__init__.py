"""JAX and optax on hpccomm: transforms for optax, and one documented way inside ``jit``."""

from __future__ import annotations

from typing import Any

from hpccomm import import_name

_HOME = {"optax": "hpccomm.jax.gradients", "allreduce": "hpccomm.jax.callbacks"}

__all__ = sorted(_HOME)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    return import_name(__name__, _HOME, name)
