"""Transforms and vectors that lie on a CUDA device.

=====================================  ================================================================================
``scale``, ``momentum``, ``adam``, …,  CuPy's arithmetic; an allreduce of what lies on the device
dense ``mean``
``gtc``, ``dgc``, ``onebit_sgd``,      gradients and state stay on the device, the kernels of
``ef_signsgd``, ``onebit_adam``,       :mod:`hpccomm.kernels.cuda` run there; messages are made of what they found and
``onebit_lamb``                        pass through the host
``lars``, ``lamb``                     norms and steps by those kernels; a few numbers for each tensor come to the host
all others                             :func:`run_on_host`: vectors come down, the step goes up
=====================================  ================================================================================

The first three take CuPy's vectors as they are, and :func:`run_with_cupy` makes them take PyTorch's and JAX's.  Bits
are the
host's.  Exchanges of what lies on a device take a :class:`hpccomm.Communicator`, not mpi4py's.
"""

from __future__ import annotations

from typing import Any

from hpccomm.algorithms.transforms import Transform
from hpccomm.arrays import convert_like, to_device_like, to_host


def run_on_host(inner: Transform) -> Transform:
    """A transform that computes on the host, for vectors on a device (CuPy, PyTorch); its state is the host's.

    Vectors on the host pass as they are.  Two copies to the host and one back in each update, n elements each.
    """

    def init(weights: Any) -> Any:
        return inner.init(to_host(weights))

    def update(gradient: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        step, state = inner.update(to_host(gradient), state, to_host(weights))
        return to_device_like(step, weights), state

    return Transform(init, update)


def run_with_cupy(inner: Transform) -> Transform:
    """A transform of CuPy's vectors for those of any library that speaks DLPack; no element is copied.

    The state is CuPy's.  Kernels run on CuPy's current stream; by DLPack it waits for the other library's when
    vectors are handed over, and that one for CuPy's when the step is.
    """
    import cupy

    def update(gradient: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        step, state = inner.update(cupy.from_dlpack(gradient), state, cupy.from_dlpack(weights))
        return convert_like(step, weights), state

    return Transform(lambda weights: inner.init(cupy.from_dlpack(weights)), update)
