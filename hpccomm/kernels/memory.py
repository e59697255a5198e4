"""What a collective over shared memory does to memory, in plain Python: read a word, write a word, copy, wait, fold.

Addresses and words are 64-bit integers.  :mod:`hpccomm.kernels.intrinsics` holds functions of the same names for Numba.
These here are right where the processor keeps stores, and loads, in order (x86); elsewhere Numba is needed.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

_word = ctypes.c_int64.from_address


def load(address: int) -> int:
    """A word that no other process writes meanwhile."""
    return int(_word(address).value)


def store(address: int, value: int) -> None:
    """Write a word."""
    _word(address).value = value


def load_acquire(address: int) -> int:
    """A word of another process; what that process wrote before it is seen from now on."""
    return int(_word(address).value)


def store_release(address: int, value: int) -> None:
    """Write a word so that whoever sees it sees all that was written before."""
    _word(address).value = value


def copy(to: int, source: int, nbytes: int) -> None:
    """Copy bytes; the two do not overlap, or are the same."""
    ctypes.memmove(to, source, nbytes)


def fetch(to: int, source: int, nbytes: int) -> None:
    """Copy bytes that another core wrote last."""
    ctypes.memmove(to, source, nbytes)


def copy_nontemporal(to: int, source: int, nbytes: int) -> None:
    """Copy bytes that will not be read soon."""
    ctypes.memmove(to, source, nbytes)


class Iovec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)


def call_process_vm(call: str, pid: int, here: int, there: int, nbytes: int) -> int:
    """Copy between this process and another; the bytes that were copied, or -1."""
    function = getattr(_libc, call, None)
    if function is None:
        return -1
    function.restype = ctypes.c_ssize_t
    function.argtypes = (ctypes.c_int, *[ctypes.POINTER(Iovec), ctypes.c_ulong] * 2, ctypes.c_ulong)
    return int(function(pid, Iovec(here, nbytes), 1, Iovec(there, nbytes), 1, 0))


def pull(pid: int, to: int, source: int, nbytes: int) -> int:
    """Copy bytes of another process; how many, or -1."""
    return call_process_vm("process_vm_readv", pid, to, source, nbytes)


def push(pid: int, to: int, source: int, nbytes: int) -> int:
    """Copy bytes into another process; how many, or -1."""
    return call_process_vm("process_vm_writev", pid, source, to, nbytes)


def pause() -> None:
    """Nothing, for a moment."""


def yield_cpu() -> None:
    """Let another process have the core."""
    os.sched_yield()


def nanoseconds() -> int:
    """A clock that never goes back."""
    return time.monotonic_ns()


Fold = Callable[[list[npt.NDArray[Any]], npt.NDArray[Any]], None]
FOLDS: list[tuple[np.dtype[Any], Fold]] = []
"""What the handles of :func:`fold` stand for."""


def fold(handle: int, sources: int, k: int, first: int, out: int, n: int) -> None:
    """Reduce elements [first, first+n) of k vectors, in order; ``sources`` points to their addresses."""
    dtype, reduce = FOLDS[handle]
    size = dtype.itemsize
    vectors = [array_at(load(sources + 8 * j) + first * size, n, dtype) for j in range(k)]
    reduce(vectors, array_at(out, n, dtype))


def array_at(address: int, n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """``n`` elements at an address."""
    octets: Any = (ctypes.c_char * (n * dtype.itemsize)).from_address(address)
    return np.frombuffer(octets, dtype)
