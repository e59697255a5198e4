"""Torch's reductions as operations of MPI."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpccomm.errors import ArgumentError
from hpccomm.torch.tensors import HALVES, Tensor

KINDS = dist.ReduceOp.RedOpType

MEANINGS: dict[Any, Any] = {
    KINDS.SUM: MPI.SUM,
    KINDS.AVG: "avg",
    KINDS.PREMUL_SUM: MPI.SUM,
    KINDS.PRODUCT: MPI.PROD,
    KINDS.MIN: MPI.MIN,
    KINDS.MAX: MPI.MAX,
    KINDS.BAND: MPI.BAND,
    KINDS.BOR: MPI.BOR,
    KINDS.BXOR: MPI.BXOR,
}
ON_BOOLS: dict[Any, Any] = {
    KINDS.SUM: MPI.LOR,
    KINDS.PRODUCT: MPI.LAND,
    KINDS.MIN: MPI.LAND,
    KINDS.MAX: MPI.LOR,
    KINDS.BAND: MPI.LAND,
    KINDS.BOR: MPI.LOR,
    KINDS.BXOR: MPI.LXOR,
}
"""A bool is 0 or 1, and whatever is not 0 is true."""


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
REDUCED = (*HALVES, torch.float32, torch.float64, torch.complex64, torch.complex128, *INTEGERS, torch.bool)
"""The dtypes that can be reduced; others can be moved only."""


def meaning(op: Any, dtype: torch.dtype, who: str) -> Any:
    """The operation of MPI, or ``"avg"``, for one of torch on a dtype."""
    if dtype not in REDUCED:
        raise ArgumentError(f"{who}: {str(dtype).removeprefix('torch.')} cannot be reduced: cast it to float32")
    return (ON_BOOLS.get(op.op) if dtype == torch.bool else None) or MEANINGS[op.op]


def scale(tensor: Tensor, op: Any) -> Tensor:
    """The summands: of PREMUL_SUM a scaled copy, 16-bit floats in float32; otherwise the tensor itself."""
    if op.op != KINDS.PREMUL_SUM:
        return tensor
    wide = tensor.detach().to(torch.float32) if tensor.dtype in HALVES else tensor.detach()
    return wide * op.factor


def check_complex(op: Any, dtype: torch.dtype, who: str) -> Any:
    """The operation, if real and imaginary parts can be reduced each for itself."""
    if op.op not in (KINDS.SUM, KINDS.AVG, KINDS.PREMUL_SUM):
        raise ArgumentError(
            f"{who}: {op.op.name} of {str(dtype).removeprefix('torch.')} is not defined: use SUM or AVG"
        )
    return op
