"""Transforms and vectors that lie on a CUDA device.

What is arithmetic takes CuPy's vectors as they are: ``scale``, ``momentum``, ``adam``, the dense ``mean``.  Vectors for
what calls the compiled kernels of the host are brought down by :func:`on_host`, and its step goes up.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from hpccomm.algorithms.transforms import Transform
from hpccomm.arrays import Array, lies_on_device


def on_host(inner: Transform) -> Transform:
    """A transform that computes on the host, for vectors on a device (CuPy, PyTorch); its state is the host's.

    Vectors on the host pass as they are.  Two copies to the host and one back in each update, n elements each.
    """

    def init(weights: Any) -> Any:
        return inner.init(brought(weights))

    def update(gradient: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        step, state = inner.update(brought(gradient), state, brought(weights))
        return returned(step, weights), state

    return Transform(init, update)


def brought(x: Any) -> Array:
    """A vector on the host; one that lies there already is not copied."""
    if not lies_on_device(x):
        return x  # type: ignore[no-any-return]
    copy: Array = x.get() if hasattr(x, "get") else x.detach().cpu().numpy()
    return copy


def returned(step: Array, like: Any) -> Any:
    """A vector of the host as one of ``like``'s library, where that lies."""
    if not lies_on_device(like):
        return step
    library: Any = sys.modules[type(like).__module__.partition(".")[0]]
    if hasattr(library, "as_tensor"):
        return library.as_tensor(np.ascontiguousarray(step), device=like.device)
    return library.asarray(step)
