"""Memory operations of the shared-memory collectives in plain Python: load, store, copy, wait, fold.

Addresses and words are 64-bit integers.  :mod:`hpccomm.kernels.intrinsics` has functions of the same names for Numba.
The functions here are correct on processors that keep stores, and loads, in order (x86); others need Numba.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from hpccomm.kernels.futex import DOZE_NS, EVERY_SLEEPER, FUTEX, FUTEX_WAIT, FUTEX_WAKE
from hpccomm.kernels.reductions.reference import reduce, storage

_word = ctypes.c_int64.from_address


def load(address: int) -> int:
    """Read a word that no other process writes at the same time."""
    return int(_word(address).value)


def store(address: int, value: int) -> None:
    """Write a word."""
    _word(address).value = value


def load_acquire(address: int) -> int:
    """Read a word of another process; all that this process wrote before it is visible afterwards."""
    return int(_word(address).value)


def store_release(address: int, value: int) -> None:
    """Write a word; a process that sees it also sees everything written before."""
    _word(address).value = value


def copy(to: int, source: int, nbytes: int) -> None:
    """Copy bytes; source and target are disjoint or equal."""
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
    """Copy between this process and another; returns the number of bytes copied, or -1."""
    function = getattr(_libc, call, None)
    if function is None:
        return -1
    function.restype = ctypes.c_ssize_t
    function.argtypes = (ctypes.c_int, *[ctypes.POINTER(Iovec), ctypes.c_ulong] * 2, ctypes.c_ulong)
    return int(function(pid, Iovec(here, nbytes), 1, Iovec(there, nbytes), 1, 0))


def pull(pid: int, to: int, source: int, nbytes: int) -> int:
    """Copy bytes of another process; returns their number, or -1."""
    return call_process_vm("process_vm_readv", pid, to, source, nbytes)


def push(pid: int, to: int, source: int, nbytes: int) -> int:
    """Copy bytes into another process; returns their number, or -1."""
    return call_process_vm("process_vm_writev", pid, source, to, nbytes)


def pause() -> None:
    """Do nothing for a moment."""


def yield_cpu() -> None:
    """Yield the core to another process."""
    os.sched_yield()


class Timespec(ctypes.Structure):
    """``struct timespec``."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def sleep(address: int, value: int, nanoseconds: int) -> None:
    """Sleep until a process wakes those that sleep at a word, unless the word no longer has this value; or a time."""
    if not FUTEX:
        time.sleep(min(nanoseconds, DOZE_NS) / 1e9)
        return
    limit = Timespec(*divmod(nanoseconds, 10**9))
    _libc.syscall(*map(ctypes.c_long, (FUTEX, address, FUTEX_WAIT, value & 0xFFFFFFFF)), ctypes.byref(limit), None, 0)


def wake(address: int) -> None:
    """Wake the processes that sleep at a word."""
    if FUTEX:
        _libc.syscall(*map(ctypes.c_long, (FUTEX, address, FUTEX_WAKE, EVERY_SLEEPER, 0, 0, 0)))


def nanoseconds() -> int:
    """A monotonic clock."""
    return time.monotonic_ns()


Fold = Callable[[list[npt.NDArray[Any]], npt.NDArray[Any]], None]
FOLDS: list[tuple[np.dtype[Any], Fold]] = []
"""The reductions that the handles of :func:`fold` number."""


@cache
def fold_handle(op: str, code: str) -> int:
    """A handle for :func:`fold`."""
    name = "bfloat16" if code == "bf16" else code
    FOLDS.append((storage(code), lambda vectors, out: reduce(op, name, vectors, out)))
    return len(FOLDS) - 1


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


def call_address(address: int, *arguments: int) -> int:
    """Call a function of words at an address."""
    return int(ctypes.PYFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * len(arguments))(address)(*arguments))


call_0 = call_1 = call_2 = call_3 = call_5 = call_7 = call_address


def call_9(address: int, words: int) -> int:
    """Call a function of up to 9 words, which lie at an address; what it returns has 32 bits."""
    arguments = [load(words + 8 * k) for k in range(9)]
    return int(ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 9)(address)(*arguments))
