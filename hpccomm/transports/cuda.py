"""Staging: device memory passes through host collectives in chunks, so that copies overlap with messages.

*A chunk is read from the device, passes through a collective on the host, and is written to the device.*  While chunk k
is in the collective, chunk k + 1 is copied down on one stream and chunk k - 1 up on another::

    down    0   1   2   3
    host        0   1   2   3
    up              0   1   2   3

There are two pinned staging buffers in each direction.  Data is read only after the streams that wrote it have been
synchronised, and a call returns when its last chunk is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hpccomm.errors import ArgumentError, TransportError
from hpccomm.settings import DEVICE_SETTING

Octets = npt.NDArray[np.uint8]

TRANSPORT = DEVICE_SETTING

LEAST_CHUNK, MOST_CHUNK, FEWEST_CHUNKS = 1 << 20, 8 << 20, 4
"""Least and most bytes of a chunk, and the least number of chunks of a longer vector, so that copies overlap."""

UNREGISTERED, HOST = 0, 1
"""CUDA's memory types that are not device memory."""


class Ranks(Protocol):
    """The methods of mpi4py's communicator that the transports between devices use."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def bcast(self, obj: Any) -> Any:
        """Rank 0's object."""

    def allgather(self, sendobj: Any) -> list[Any]:
        """The objects of all ranks."""

    def Barrier(self) -> None:
        """Wait for all ranks."""


class Device(Protocol):
    """The operations of a device; streams are CUDA handles as integers."""

    @property
    def number(self) -> int:
        """The device that this rank uses."""

    @property
    def count(self) -> int:
        """Number of devices that this process sees."""

    def use(self, number: int) -> None:
        """Select another device."""

    @property
    def name(self) -> str:
        """The vendor's name of the device."""

    @property
    def identity(self) -> str:
        """A name of the device on which all processes of its node agree."""

    @property
    def driver(self) -> str:
        """Versions of the driver and of the library that uses it."""

    def find_device(self, address: int) -> int | None:
        """The number of the device that owns an address; ``None`` for host memory and freed memory."""

    def allocate_pinned(self, nbytes: int) -> Octets:
        """Allocate pinned host memory."""

    def create_stream(self) -> int:
        """Create a stream."""

    def to_host(self, out: Octets, address: int, stream: int) -> None:
        """Start a copy from the device."""

    def to_device(self, address: int, octets: Octets, stream: int) -> None:
        """Start a copy to the device."""

    def synchronize(self, stream: int) -> None:
        """Wait for all work on a stream."""

    def allocate_like(self, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new array of the library that ``x`` belongs to, on the same device."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new array."""

    def allocate(self, nbytes: int) -> int:
        """Allocate memory that other processes can open; returns its address."""

    def release(self, address: int) -> None:
        """Free such memory."""

    def handle(self, address: int) -> bytes:
        """The handle by which another process opens such memory."""

    def open(self, handle: bytes) -> int:
        """Map another process's memory; returns its address here."""

    def close(self, address: int) -> None:
        """Unmap another process's memory."""

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Start a copy from device to device."""

    def divide(self, address: int, n: int, dtype: np.dtype[Any], by: int, stream: int) -> None:
        """Start the division of n elements by a number, in place."""

    def reduce(self, op: str, code: str, vectors: Sequence[int], out: int, n: int, stream: int) -> None:
        """Start the reduction of vectors of n elements, ((v0 + v1) + v2) + …"""


class CupyDevice:
    """:class:`Device` through CuPy: the device that is current at construction."""

    def __init__(self) -> None:
        import cupy

        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        self._streams: dict[int, Any] = {}
        self._number = int(self._runtime.getDevice())

    @property
    def number(self) -> int:
        """The device of this object, whichever device is current now."""
        return self._number

    def _activate(self) -> Any:
        """A context manager in which the device is current."""
        return self._cupy.cuda.Device(self._number)

    @property
    def count(self) -> int:
        """The number of devices in ``CUDA_VISIBLE_DEVICES``."""
        return int(self._runtime.getDeviceCount())

    def use(self, number: int) -> None:
        self._runtime.setDevice(number)
        self._number = number

    @property
    def name(self) -> str:
        return str(self._runtime.getDeviceProperties(self.number)["name"].decode())

    @property
    def identity(self) -> str:
        return str(self._runtime.deviceGetPCIBusId(self.number))

    @property
    def driver(self) -> str:
        return f"CUDA driver {self._runtime.driverGetVersion()}, CuPy {self._cupy.__version__}"

    def find_device(self, address: int) -> int | None:
        try:
            found = self._runtime.pointerGetAttributes(address)
        except self._runtime.CUDARuntimeError:
            return None
        return None if found.type in (UNREGISTERED, HOST) else int(found.device)

    def allocate_pinned(self, nbytes: int) -> Octets:
        """From CuPy's pool of pinned memory."""
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def create_stream(self) -> int:
        """A stream that does not synchronise with the default stream."""
        with self._activate():
            made = self._cupy.cuda.Stream(non_blocking=True)
        self._streams[int(made.ptr)] = made
        return int(made.ptr)

    def to_host(self, out: Octets, address: int, stream: int) -> None:
        to = out.__array_interface__["data"][0]
        self._runtime.memcpyAsync(to, address, out.size, self._runtime.memcpyDeviceToHost, stream)

    def to_device(self, address: int, octets: Octets, stream: int) -> None:
        source = octets.__array_interface__["data"][0]
        self._runtime.memcpyAsync(address, source, octets.size, self._runtime.memcpyHostToDevice, stream)

    def synchronize(self, stream: int) -> None:
        self._runtime.streamSynchronize(stream)

    def allocate_like(self, x: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """An array of PyTorch for its tensors, of CuPy for all others."""
        if type(x).__module__.partition(".")[0] == "torch":
            return x.new_empty(shape)
        return self.empty(shape, dtype)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        with self._activate():
            return self._cupy.empty(shape, dtype)

    def allocate(self, nbytes: int) -> int:
        """``cudaMalloc``: a handle names a whole allocation, and an array of CuPy's pool starts inside one."""
        with self._activate():
            return int(self._runtime.malloc(nbytes))

    def release(self, address: int) -> None:
        self._runtime.free(address)

    def handle(self, address: int) -> bytes:
        return bytes(self._runtime.ipcGetMemHandle(address))

    def open(self, handle: bytes) -> int:
        with self._activate():
            return int(self._runtime.ipcOpenMemHandle(handle))

    def close(self, address: int) -> None:
        self._runtime.ipcCloseMemHandle(address)

    def copy(self, to: int, source: int, nbytes: int, stream: int) -> None:
        self._runtime.memcpyAsync(to, source, nbytes, self._runtime.memcpyDeviceToDevice, stream)

    def divide(self, address: int, n: int, dtype: np.dtype[Any], by: int, stream: int) -> None:
        """CuPy's division, rounded according to IEEE 754."""
        if not n:
            return
        memory = self._cupy.cuda.UnownedMemory(address, n * dtype.itemsize, None)
        vector = self._cupy.ndarray((n,), dtype, self._cupy.cuda.MemoryPointer(memory, 0))
        with self._activate(), self._streams[stream]:
            self._cupy.true_divide(vector, dtype.type(by), out=vector)

    def reduce(self, op: str, code: str, vectors: Sequence[int], out: int, n: int, stream: int) -> None:
        """The kernels of ``reductions.cu``."""
        from hpccomm.kernels.cuda import kernels

        with self._activate(), self._streams[stream]:
            kernels().reduce_at(op, code, vectors, out, n)


@cache
def device() -> Device:
    """The device of this process; raises :class:`~hpccomm.errors.TransportError` if there is none."""
    trouble = unavailable_reason()
    if trouble:
        raise TransportError(trouble)
    return CupyDevice()


def claim_device(comm: Any, flag: str, instead: str) -> Device:
    """Assign the devices of a node to its ranks round-robin (collective).

    Raises :class:`~hpccomm.errors.ArgumentError` on all ranks if one of them has none.
    """
    everyone = comm.allgather(unavailable_reason())
    without = [rank for rank, why in enumerate(everyone) if why]
    if without:
        raise ArgumentError(f"{flag} needs a device, rank {without[0]} has none: {everyone[without[0]]}; or {instead}")
    found = device()
    found.use(int(comm.context.node.rank) % found.count)
    return found


@cache
def unavailable_reason() -> str:
    """What is missing for arrays on a device, and the remedy; empty if nothing is."""
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed: pip install cupy-cuda12x, or cupy-cuda13x for CUDA 13"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA driver, or one that is too old ({error}): install NVIDIA's driver"
    return "" if count else "no CUDA device: check CUDA_VISIBLE_DEVICES"


class Extent(NamedTuple):
    """Bytes that are contiguous on the device and in a chunk."""

    address: int
    """The address on the device."""
    first: int
    """The offset in the chunk."""
    nbytes: int


class Chunk(NamedTuple):
    """What passes through the host at once."""

    reads: Sequence[Extent]
    body: Callable[[Octets, Octets], Any]
    """``body(incoming, outgoing)``: a collective that reads the one and writes the other."""
    writes: Sequence[Extent]


def size_of(extents: Iterable[Extent]) -> int:
    """Bytes of a chunk with these extents."""
    return max((each.first + each.nbytes for each in extents), default=0)


def chunk_bytes(nbytes: int) -> int:
    """Most bytes of a chunk of a vector of ``nbytes`` bytes."""
    return max(LEAST_CHUNK, min(MOST_CHUNK, -(-nbytes // FEWEST_CHUNKS)))


class Staging:
    """Two streams, and pinned bounce buffers that grow on demand."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.down, self.up = device.create_stream(), device.create_stream()
        self._buffers: dict[str, list[Octets]] = {}

    def run(self, chunks: Sequence[Chunk], streams: Iterable[int] = ()) -> None:
        """Pass the chunks through the host; ``streams`` have pending work on the arrays."""
        device = self.device
        wait(device, streams)
        incoming = self.bounce_buffers("down", max((size_of(each.reads) for each in chunks), default=0))
        outgoing = self.bounce_buffers("up", max((size_of(each.writes) for each in chunks), default=0))
        try:
            for k, chunk in enumerate(chunks):
                if k == 0:
                    self.start_read(chunk, incoming[0])
                device.synchronize(self.down)
                if k + 1 < len(chunks):
                    self.start_read(chunks[k + 1], incoming[(k + 1) % 2])
                chunk.body(incoming[k % 2][: size_of(chunk.reads)], outgoing[k % 2][: size_of(chunk.writes)])
                device.synchronize(self.up)
                for address, first, nbytes in chunk.writes:
                    device.to_device(address, outgoing[k % 2][first : first + nbytes], self.up)
        finally:
            device.synchronize(self.down)
            device.synchronize(self.up)

    def fetch(self, address: int, out: Octets, streams: Iterable[int]) -> None:
        """Copy from the device to host memory, pinned or not."""
        places = chunk_ranges(out.size)
        self.run([Chunk([Extent(address + lo, 0, hi - lo)], copy_to(out[lo:hi]), []) for lo, hi in places], streams)

    def store(self, octets: Octets, address: int, streams: Iterable[int]) -> None:
        """Copy to the device from host memory, pinned or not."""
        places = chunk_ranges(octets.size)
        self.run(
            [Chunk([], copy_from(octets[lo:hi]), [Extent(address + lo, 0, hi - lo)]) for lo, hi in places], streams
        )

    def start_read(self, chunk: Chunk, buffer: Octets) -> None:
        """Start to copy a chunk to the host."""
        for address, first, nbytes in chunk.reads:
            self.device.to_host(buffer[first : first + nbytes], address, self.down)

    def bounce_buffers(self, which: str, nbytes: int) -> list[Octets]:
        """Pinned memory for two chunks in one direction."""
        buffers = self._buffers.get(which)
        if buffers is None or buffers[0].size < nbytes:
            buffers = self._buffers[which] = [self.device.allocate_pinned(max(nbytes, LEAST_CHUNK)) for _ in range(2)]
        return buffers


def wait(device: Device, streams: Iterable[int]) -> None:
    """Wait for all work on some streams."""
    for each in dict.fromkeys(streams):
        device.synchronize(each)


def chunk_ranges(nbytes: int) -> Iterable[tuple[int, int]]:
    """[lo, hi) of the chunks of ``nbytes`` bytes."""
    step = chunk_bytes(nbytes)
    return ((lo, min(lo + step, nbytes)) for lo in range(0, nbytes, step))


def copy_to(out: Octets) -> Callable[[Octets, Octets], None]:
    """The body of a chunk that ends on the host."""
    return lambda incoming, _: np.copyto(out, incoming)


def copy_from(octets: Octets) -> Callable[[Octets, Octets], None]:
    """The body of a chunk that begins on the host."""
    return lambda _, outgoing: np.copyto(outgoing, octets)
