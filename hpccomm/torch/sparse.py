"""The sum of sparse tensors: their indices and values are gathered, and added on each rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hpccomm.errors import ArgumentError
from hpccomm.torch.tensors import Tensor, as_array


def allreduce(comm: Any, tensor: Tensor, op: Any, who: str) -> None:
    """Add a sparse COO tensor over the ranks, in place; the sum is coalesced."""
    kinds = dist.ReduceOp.RedOpType
    if op.op not in (kinds.SUM, kinds.AVG):
        raise ArgumentError(f"{who}: sparse tensors can be summed and averaged only: pass x.to_dense()")
    mine = tensor.detach().cpu().coalesce()
    indices, values = mine.indices(), mine.values()
    counts = np.empty(comm.size, np.int64)
    comm.Allgather(np.array([values.shape[0]], np.int64), counts)
    every_index = gather(comm, indices.t().contiguous(), counts)
    every_value = gather(comm, values.contiguous(), counts)
    total = torch.sparse_coo_tensor(every_index.t(), every_value, tensor.shape).coalesce()
    with torch.no_grad():  # not tensor.detach(), whose number of elements is its own
        tensor.copy_(total / comm.size if op.op == kinds.AVG else total)


def gather(comm: Any, rows: Tensor, counts: Any) -> Tensor:
    """The rows of all ranks, in rank order."""
    found = torch.empty((int(counts.sum()), *rows.shape[1:]), dtype=rows.dtype)
    row = rows[0:1].numel() if len(rows) else int(np.prod(rows.shape[1:], dtype=np.int64))
    comm.Allgatherv(as_array(rows), [as_array(found), [int(each) * row for each in counts]])
    return found
