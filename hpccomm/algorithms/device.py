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

The first three groups take CuPy arrays, and those of PyTorch and JAX by DLPack without a copy.  The results have the
bits of the host's.  Exchanges of device vectors need a :class:`hpccomm.Communicator`, not mpi4py's.
"""

from __future__ import annotations

from typing import Any

from hpccomm.algorithms.transforms import Transform
from hpccomm.arrays import to_device_like, to_host


def run_on_host(inner: Transform) -> Transform:
    """A transform that computes on the host, for vectors on a device (CuPy, PyTorch); its state lies on the host.

    Vectors on the host are not copied.  Each update copies n elements twice to the host and once back.
    """

    def init(weights: Any) -> Any:
        return inner.init(to_host(weights))

    def update(gradient: Any, state: Any, weights: Any) -> tuple[Any, Any]:
        step, state = inner.update(to_host(gradient), state, to_host(weights))
        return to_device_like(step, weights), state

    made = Transform(init, update, parts=[inner])
    plain = made._replace(init=init, update=update)
    vars(plain).update(vars(made))
    return plain
