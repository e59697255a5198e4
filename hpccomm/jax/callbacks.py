"""An allreduce inside ``jit``: an ordered callback to the host."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback

from hpccomm import functional


def allreduce(tree: Any, op: Any = "mean", comm: Any = None) -> Any:
    """Reduce all leaves of a tree of JAX's arrays over the ranks, inside or outside ``jit`` (collective).

    Inside ``jit`` it is ``io_callback(ordered=True)``: calls run in the order of the program, on the host.  It has no
    derivative: reduce gradients, not losses.
    """
    leaves, form = jax.tree.flatten(tree)

    def reduce_all(*arrays: Any) -> tuple[Any, ...]:
        return tuple(np.asarray(functional.allreduce(np.asarray(each), op, comm)) for each in arrays)

    shapes = tuple(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in leaves)
    return jax.tree.unflatten(form, list(io_callback(reduce_all, shapes, *leaves, ordered=True)))
