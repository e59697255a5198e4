"""hpccomm's transforms as optax's: ``optax.chain(hpccomm.optax(hpccomm.gtc(comm)), optax.adam(1e-3))``."""

from __future__ import annotations

from typing import Any

import jax

from hpccomm.algorithms.transforms import Transform
from hpccomm.errors import ArgumentError


def optax(method: Transform) -> Any:
    """A transform of hpccomm as an ``optax.GradientTransformation``, for trees of JAX's arrays.

    Its ``update`` gives updates to *add*, as optax wants them; an exchange, such as ``hpccomm.gtc``, gives gradients,
    which optax's optimizers take.  The state is that of hpccomm and is consumed by ``update``.  Call ``update`` outside
    ``jit``: it sends messages.  ``hpccomm.jax.allreduce`` works inside.
    """
    from optax import GradientTransformation

    if not isinstance(method, Transform):
        raise ArgumentError(f"optax: {method!r} is no transform of hpccomm: pass hpccomm.gtc(comm)")

    def init(params: Any) -> Any:
        return method.init(flatten(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, form = jax.tree.flatten(updates)
        if any(isinstance(each, jax.core.Tracer) for each in leaves):
            raise ArgumentError(
                "optax: update was called inside jit, where no message can be sent: call it outside, or use "
                "hpccomm.jax.allreduce"
            )
        weights = flatten(updates if params is None else params)
        step, state = method.update(dict(zip(weights, leaves, strict=True)), state, weights)
        return jax.tree.unflatten(form, list(step.values())), state

    return GradientTransformation(init, update)


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of any tree that JAX knows, by path."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
