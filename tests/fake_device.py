"""A fake CUDA device in host memory, whose streams run their work when they are synchronised.

That is the latest moment that CUDA allows: code that reads before it synchronises reads old data, and code that reuses
memory before a copy has read it sends new data.  With ``eager`` all work runs at once, the earliest moment.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.kernels.reductions.reference import reduce

SIDE = 7001
"""The user's stream."""


class FakeDevice:
    """The methods of :class:`hpccomm.transports.cuda.Device`, in host memory."""

    def __init__(self, number: int = 0, eager: bool = False) -> None:
        self.number, self.eager = number, eager
        self.queues: dict[int, list[Callable[[], Any]]] = {1: [], SIDE: []}
        self.memory: dict[int, tuple[np.ndarray, int]] = {}
        self.files: dict[int, Path] = {}
        self.log: list[str] = []

    # Device

    @property
    def identity(self) -> str:
        return f"fake {self.number}"

    name, driver, count = "fake", "no driver", 1

    def use(self, number: int) -> None:
        self.number = number

    def find_device(self, address: int) -> int | None:
        for begin, (memory, number) in self.memory.items():
            if begin <= address < begin + max(memory.nbytes, 1):
                return number
        return None

    def allocate_pinned(self, nbytes: int) -> np.ndarray:
        return np.full(nbytes, 0xA5, np.uint8)

    def create_stream(self) -> int:
        handle = 100 + len(self.queues)
        self.queues[handle] = []
        return handle

    def begin(self, stream: int, act: Callable[[], Any]) -> None:
        if self.eager:
            act()
        else:
            self.queues[stream].append(act)

    def to_host(self, out: np.ndarray, address: int, stream: int) -> None:
        self.check(address, out.size)
        self.begin(stream, lambda: ctypes.memmove(out.ctypes.data, address, out.size))

    def to_device(self, address: int, octets: np.ndarray, stream: int) -> None:
        self.check(address, octets.size)
        self.begin(stream, lambda: ctypes.memmove(address, octets.ctypes.data, octets.size))

    def synchronize(self, stream: int) -> None:
        waiting, self.queues[stream] = self.queues[stream], []
        self.log.append(f"synchronize {stream}")
        for act in waiting:
            act()

    def allocate_like(self, x: Any, shape: tuple[int, ...], dtype: np.dtype) -> FakeArray:
        return self.array(np.empty(shape, dtype))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> FakeArray:
        return self.array(np.empty(shape, dtype))

    def allocate(self, nbytes: int) -> int:
        file, name = tempfile.mkstemp(dir="/dev/shm")
        os.ftruncate(file, nbytes)
        os.close(file)
        address = self.open(name.encode())
        self.files[address] = Path(name)
        weakref.finalize(self, Path(name).unlink, missing_ok=True)
        return address

    def release(self, address: int) -> None:
        self.files.pop(address).unlink()
        self.close(address)

    def handle(self, address: int) -> bytes:
        return str(self.files[address]).encode()

    def open(self, handle: bytes) -> int:
        with open(handle.decode(), "r+b") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        self.memory[memory.ctypes.data] = memory, self.number
        return memory.ctypes.data

    def close(self, address: int) -> None:
        del self.memory[address]

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        for address in (to, source):
            self.check(address, nbytes)
        self.begin(stream, lambda: ctypes.memmove(to, source, nbytes))

    def reduce(self, op: str, code: str, vectors: Sequence[int], out: int, n: int, stream: int) -> None:
        dtype = np.dtype(np.uint16 if code == "bf16" else code)
        for address in (*vectors, out):
            self.check(address, n * dtype.itemsize)
        there = [self.memory_at(address, n, dtype) for address in (*vectors, out)]
        self.begin(stream, lambda: reduce(op, "bfloat16" if code == "bf16" else code, there[:-1], there[-1]))

    def divide(self, address: int, n: int, dtype: np.dtype, by: int, stream: int) -> None:
        self.check(address, n * dtype.itemsize)
        there = self.memory_at(address, n, dtype)
        self.begin(stream, lambda: np.true_divide(there, dtype.type(by), out=there))

    # Tests

    def memory_at(self, address: int, n: int, dtype: np.dtype) -> np.ndarray:
        return np.frombuffer((ctypes.c_char * (n * dtype.itemsize)).from_address(address), dtype)

    def check(self, address: int, nbytes: int) -> None:
        ends = (address, address + nbytes - 1) if nbytes else ()
        assert all(self.find_device(each) is not None for each in ends)

    def array(self, values: Any, stream: int = 1, number: int | None = None) -> FakeArray:
        """An array on this device, or on another one."""
        memory = np.array(values, order="K")
        address = memory.ctypes.data
        self.memory[address] = memory, self.number if number is None else number
        return FakeArray(self, memory, stream)

    def free(self, x: FakeArray) -> None:
        del self.memory[x.memory.ctypes.data]


class FakeArray:
    """An array with the CUDA array interface only; work on it waits on its stream."""

    def __init__(self, device: FakeDevice, memory: np.ndarray, stream: int) -> None:
        self.device, self.memory, self.stream = device, memory, stream

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        known = dict(self.memory.__array_interface__)
        contiguous = self.memory.flags.c_contiguous
        strides = None if contiguous else self.memory.strides
        return {
            "version": 3,
            "shape": known["shape"],
            "typestr": known["typestr"],
            "data": (known["data"][0], not self.memory.flags.writeable),
            "strides": strides,
            "stream": self.stream,
        }

    @property
    def dtype(self) -> np.dtype:
        return self.memory.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.memory.shape

    @property
    def size(self) -> int:
        return self.memory.size

    def __getitem__(self, part: slice) -> FakeArray:
        return FakeArray(self.device, self.memory[part], self.stream)

    def fill(self, values: Any) -> None:
        """Queue a kernel that writes the array."""
        copy = np.array(values)
        self.device.begin(self.stream, lambda: np.copyto(self.memory, copy))

    def get(self) -> np.ndarray:
        """The contents that a kernel queued now would see."""
        self.device.synchronize(self.stream)
        return self.memory.copy()


NCCL_OPERATIONS = (MPI.SUM, MPI.PROD, MPI.MAX, MPI.MIN)
NCCL_TYPES = tuple(map(np.dtype, ("i1", "u1", "i4", "u4", "i8", "u8", "f2", "f4", "f8")))


class FakeNccl:
    """The functions of ``cupy.cuda.nccl`` that hpccomm calls, for thread-ranks; collectives wait on their stream."""

    available = True
    NCCL_SUM, NCCL_PROD, NCCL_MAX, NCCL_MIN = range(4)
    NCCL_INT8, NCCL_UINT8, NCCL_INT32, NCCL_UINT32, NCCL_INT64, NCCL_UINT64, _, NCCL_FLOAT32, NCCL_FLOAT64 = range(9)

    def __init__(self, comm: Any, device: FakeDevice, version: int = 22703) -> None:
        self.comm, self.device, self.version = comm, device, version
        self.grouped: list[tuple[str, int, int, int, int]] | None = None
        self.made = 0

    def get_version(self) -> int:
        return self.version

    def get_unique_id(self) -> tuple[int, ...]:
        return (self.comm.size,) * 128

    def NcclCommunicator(self, size: int, word: tuple[int, ...], rank: int) -> FakeNccl:
        assert (size, word, rank) == (self.comm.size, (size,) * 128, self.comm.rank)
        self.made += 1
        return self

    def destroy(self) -> None:
        self.made -= 1

    def groupStart(self) -> None:
        self.grouped = []

    def groupEnd(self) -> None:
        if not self.grouped:
            return
        sent = {peer: (at, n) for name, at, n, peer, _ in self.grouped if name == "send"}
        received = {peer: (at, n) for name, at, n, peer, _ in self.grouped if name == "recv"}
        stream, self.grouped = self.grouped[0][4], None
        octet = np.dtype(np.uint8)

        def act() -> None:
            mine = [self.device.memory_at(*sent[peer], octet).copy() for peer in range(self.comm.size)]
            parts = self.comm.allgather(mine)
            for peer, (at, n) in received.items():
                self.device.memory_at(at, n, octet)[...] = parts[peer][self.comm.rank]

        self.device.begin(stream, act)

    def send(self, at: int, n: int, kind: int, peer: int, stream: int) -> None:
        assert self.grouped is not None
        self.grouped.append(("send", at, n * NCCL_TYPES[kind].itemsize, peer, stream))

    def recv(self, at: int, n: int, kind: int, peer: int, stream: int) -> None:
        assert self.grouped is not None
        self.grouped.append(("recv", at, n * NCCL_TYPES[kind].itemsize, peer, stream))

    def _begin(self, stream: int, call: Callable[..., Any], *vectors: tuple[int, int], kind: int) -> None:
        dtype = NCCL_TYPES[kind]
        for at, n in vectors:
            self.device.check(at, n * dtype.itemsize)
        there = [self.device.memory_at(at, n, dtype) for at, n in vectors]
        self.device.begin(stream, lambda: call(*there))

    def allReduce(self, a: int, b: int, n: int, kind: int, op: int, stream: int) -> None:
        self._begin(stream, lambda x, y: self.comm.Allreduce(x, y, NCCL_OPERATIONS[op]), (a, n), (b, n), kind=kind)

    def reduce(self, a: int, b: int, n: int, kind: int, op: int, root: int, stream: int) -> None:
        self._begin(stream, lambda x, y: self.comm.Reduce(x, y, NCCL_OPERATIONS[op], root), (a, n), (b, n), kind=kind)

    def reduceScatter(self, a: int, b: int, n: int, kind: int, op: int, stream: int) -> None:
        def call(x: np.ndarray, y: np.ndarray) -> None:
            self.comm.Reduce_scatter_block(x, y, NCCL_OPERATIONS[op])

        self._begin(stream, call, (a, n * self.comm.size), (b, n), kind=kind)

    def broadcast(self, a: int, b: int, n: int, kind: int, root: int, stream: int) -> None:
        assert a == b
        self._begin(stream, lambda x: self.comm.Bcast(x, root), (a, n), kind=kind)

    def allGather(self, a: int, b: int, n: int, kind: int, stream: int) -> None:
        self._begin(stream, self.comm.Allgather, (a, n), (b, n * self.comm.size), kind=kind)
