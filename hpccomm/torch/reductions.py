"""Torch's reductions as operations of MPI."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpccomm.calls import operations
from hpccomm.errors import ArgumentError
from hpccomm.torch.tensors import HALVES, Tensor

KINDS = dist.ReduceOp.RedOpType

MEANINGS: dict[Any, Any] = {
    KINDS.SUM: MPI.SUM,
    KINDS.AVG: "avg",
    KINDS.PREMUL_SUM: operations.SUM_OF_SCALED,
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
REDUCED = frozenset((*HALVES, torch.float32, torch.float64, torch.complex64, torch.complex128, *INTEGERS, torch.bool))
"""The dtypes that can be reduced; others can be moved only."""


def prepare(tensor: Tensor, op: Any, who: str) -> tuple[Tensor, Any]:
    """The summands, and MPI's operation or ``"avg"``.

    The summands are the tensor itself, or for PREMUL_SUM a scaled copy, 16-bit floats in float32.
    """
    kind, dtype = op.op, tensor.dtype
    if dtype not in REDUCED:
        raise ArgumentError(f"{who}: {str(dtype).removeprefix('torch.')} cannot be reduced: cast it to float32")
    if kind == KINDS.PREMUL_SUM:
        tensor = scale(tensor.detach(), op.factor, who)
    return tensor, (ON_BOOLS.get(kind) if dtype is torch.bool else None) or MEANINGS[kind]


def scale(tensor: Tensor, factor: Any, who: str) -> Tensor:
    """The tensor times a number or a tensor of one element, 16-bit floats in float32."""
    wide = tensor.to(torch.float32) if tensor.dtype in HALVES else tensor
    scaled = wide * factor
    if not torch.can_cast(scaled.dtype, wide.dtype):
        names = [str(each.dtype).removeprefix("torch.") for each in (tensor, scaled)]
        raise ArgumentError(f"{who}: PREMUL_SUM of {names[0]} by {factor} would be {names[1]}: cast the tensor first")
    return scaled.to(wide.dtype)


def check_complex(op: Any, dtype: torch.dtype, who: str) -> Any:
    """The operation, if real and imaginary parts can be reduced each for itself."""
    if op.op not in (KINDS.SUM, KINDS.AVG, KINDS.PREMUL_SUM):
        raise ArgumentError(
            f"{who}: {op.op.name} of {str(dtype).removeprefix('torch.')} is not defined: use SUM or AVG"
        )
    return op
