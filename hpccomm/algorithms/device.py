"""Transforms of vectors in the memory of a CUDA device.

=====================================  ================================================================================
``scale``, ``momentum``, ``adam``, …,  CuPy's arithmetic; an allreduce of what lies on the device
dense ``mean``
``gtc``, ``dgc``, ``onebit_sgd``,      gradients and state stay on the device, the kernels of
``ef_signsgd``, ``onebit_adam``,       :mod:`hpccomm.kernels.cuda` run there; messages are assembled on the host
``onebit_lamb``                        from their results
``lars``, ``lamb``                     norms and steps by those kernels; two sums of squares a tensor go to the host
all others                             :func:`run_on_host`: vectors are copied to the host, the step to the device
=====================================  ================================================================================

The first three groups take CuPy arrays directly; with :func:`run_with_cupy` they take PyTorch's and JAX's, too.  The
results have the bits of the host's.  Exchanges of device vectors need a :class:`hpccomm.Communicator`, not mpi4py's.
"""

from __future__ import annotations

from typing import Any

from hpccomm.algorithms.transforms import Transform
from hpccomm.arrays import convert_like, to_device_like, to_host


def run_on_host(inner: Transform) -> Transform:
    """A transform that computes on the host, for vectors on a device (CuPy, PyTorch); its state lies on the host.

    Vectors on the host are not copied.  Each update copies n elements twice to the host and once back.
    """

    def init(weights: Any) -> Any:
        return inner.init(to_host(weights))

    def update(gradient: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        step, state = inner.update(to_host(gradient), state, to_host(weights))
        return to_device_like(step, weights), state

    return Transform(init, update)


def run_with_cupy(inner: Transform) -> Transform:
    """A transform of CuPy arrays for the arrays of any library that supports DLPack; no element is copied.

    The state consists of CuPy arrays.  Kernels run on CuPy's current stream.  DLPack makes that stream wait for the
    other library's stream when vectors are passed in, and the other one wait for CuPy's when the step is returned.
    """
    import cupy

    def update(gradient: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        step, state = inner.update(cupy.from_dlpack(gradient), state, cupy.from_dlpack(weights))
        return convert_like(step, weights), state

    return Transform(lambda weights: inner.init(cupy.from_dlpack(weights)), update)
