"""Tensors as arrays: dense tensors on the CPU are lent as they lie in memory, others are copied and copied back."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from hpccomm.arrays import bfloat16
from hpccomm.errors import ArgumentError

Tensor: TypeAlias = Any
"""``torch.Tensor``."""
HALVES = (torch.float16, torch.bfloat16)


NUMPY = {
    getattr(torch, name): np.dtype(name).str
    for name in (
        *("float16", "float32", "float64", "complex64", "complex128", "bool"),
        *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    )
}
"""NumPy's name of torch's dtype."""
HUGE_PAGE, FEWEST_HUGE_PAGES = 1 << 21, 2
MADV_HUGEPAGE = getattr(mmap, "MADV_HUGEPAGE", 14)
madvise = ctypes.CDLL(None).madvise
madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Lender:
    """What keeps a tensor alive as long as the array on its memory."""

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, tensor: Tensor, count: int, typestr: str) -> None:
        self.tensor = tensor
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": (count,),
            "typestr": typestr,
            "version": 3,
        }


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The elements of a dense tensor on the CPU as a flat array on the same memory, which it keeps alive.

    Dtypes that NumPy lacks (8-bit floats, complex32) are lent as bytes: they may be moved, not reduced.  Not by
    ``tensor.numpy()``, after which torch cannot resize the storage any more, as FSDP does.
    """
    count = tensor.numel()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(Lender(tensor, count, "<u2")).view(bfloat16("bfloat16"))
    dtype = NUMPY.get(tensor.dtype)
    if dtype is None:
        return np.asarray(Lender(tensor, count * tensor.element_size(), "|u1"))
    return np.asarray(Lender(tensor, count, dtype))


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor's elements lie on the CPU in order."""
    return (
        tensor.layout is torch.strided
        and tensor.is_cpu
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def check_layout(tensor: Tensor, who: str) -> None:
    """Raise for tensors that are not strided, or have no memory."""
    if tensor.is_meta:
        raise ArgumentError(f"{who}: a tensor on the meta device has no elements: pass one on the CPU")
    if tensor.layout != torch.strided:
        raise ArgumentError(f"{who}: a tensor of layout {tensor.layout} cannot be sent: pass x.to_dense()")


def read(tensor: Tensor, who: str) -> Tensor:
    """A dense tensor of the same elements: itself, or a copy on the CPU."""
    if is_dense(tensor):
        return tensor
    check_layout(tensor, who)
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()


def find_room(tensor: Tensor, who: str, dtype: torch.dtype | None = None) -> Tensor:
    """A dense tensor as long as ``tensor`` and of this dtype: itself, or a new one for :func:`copy_back`."""
    if (dtype is None or dtype == tensor.dtype) and is_dense(tensor):
        return with_huge_pages(tensor)
    check_layout(tensor, who)
    return with_huge_pages(torch.empty(tensor.shape, dtype=dtype or tensor.dtype))


def copy_back(dense: Tensor, tensor: Tensor) -> None:
    """Give ``tensor`` the elements of the dense tensor that stood for it."""
    if dense is not tensor:
        tensor.detach().copy_(dense)


def join(tensors: Sequence[Tensor], who: str) -> Tensor:
    """The elements of several tensors in a row: where they lie, if they lie so, else in a copy."""
    whole = adjoin(tensors)
    if whole is not None:
        return whole
    parts = [read(each, who).detach().reshape(-1) for each in tensors]
    return torch.cat(parts) if len({each.dtype for each in parts}) == 1 else refuse_dtypes(tensors, who)


def find_row(tensors: Sequence[Tensor], who: str) -> Tensor:
    """A dense tensor as long as all tensors together: where they lie, or a new one for :func:`copy_apart`."""
    whole = adjoin(tensors)
    if whole is not None:
        return with_huge_pages(whole)
    for each in tensors:
        check_layout(each, who)
        if each.dtype != tensors[0].dtype:
            refuse_dtypes(tensors, who)
    return with_huge_pages(torch.empty(sum(each.numel() for each in tensors), dtype=tensors[0].dtype))


def with_huge_pages(tensor: Tensor) -> Tensor:
    """A dense tensor that a call fills; the kernel may from now on take huge pages for its memory.

    NumPy asks for them where it allocates, torch does not; most of the time of a call that fills a new tensor of some
    megabytes is that of its page faults.  Where the pages are there already this costs a microsecond.
    """
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes >= FEWEST_HUGE_PAGES * HUGE_PAGE:
        first = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        madvise(first, (tensor.data_ptr() + nbytes) // HUGE_PAGE * HUGE_PAGE - first, MADV_HUGEPAGE)
    return tensor


def copy_apart(row: Tensor, tensors: Sequence[Tensor]) -> None:
    """Give tensors the elements of the row that stood for them."""
    if adjoin(tensors) is None:
        for each, part in zip(tensors, row.split([each.numel() for each in tensors]), strict=True):
            each.detach().copy_(part.view(each.shape))


def refuse_dtypes(tensors: Sequence[Tensor], who: str) -> Any:
    """Raise for tensors of one call whose dtypes differ."""
    names = ", ".join(sorted({str(each.dtype) for each in tensors}))
    raise ArgumentError(f"{who}: the tensors of one call are of different dtypes ({names}): pass one dtype")


def adjoin(tensors: Sequence[Tensor]) -> Tensor | None:
    """One tensor on the memory of dense tensors that follow each other in memory, as ``chunk`` makes them."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.detach().view(-1) if is_dense(first) else None
    if first.layout != torch.strided:
        return None
    end, storage, total = first.data_ptr(), first.untyped_storage().data_ptr(), 0
    for each in tensors:
        if each.dtype != first.dtype or not is_dense(each):
            return None
        if each.untyped_storage().data_ptr() != storage or (each.numel() and each.data_ptr() != end):
            return None
        end += each.numel() * each.element_size()
        total += each.numel()
    return first.detach().as_strided((total,), (1,)) if first.numel() or not total else None
