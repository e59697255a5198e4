"""Ranks of a node that read each other's memory on the device (CUDA IPC): nothing passes through the host.

*p ranks, several of them perhaps on one device; n bytes.*  Every rank has a part that all have opened.  A turn: copy
into one's part, meet, take from the parts of all.  Parts have two halves, used in turns, so that one meeting a turn is
enough: who has come to the next meeting has read all that he wanted of this one.

Reductions are made in rank order, so every rank gets the same bits.  Where all ranks want all of a result, up to
DIRECT_RANKS ranks make it each for themselves, which moves (p + 3) n bytes in a rank; more divide the work and meet
once more, which moves (5 + 1/p) n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hpccomm.errors import TransportError
from hpccomm.kernels.reductions.reference import itemsize
from hpccomm.transports.cuda import Device, Extent, wait

PART_BYTES = 64 << 20
"""Bytes of a rank's part, both halves."""
DIRECT_RANKS = 3
ALIGNMENT = 16
"""Bytes that the kernels read at once."""
MARK_BYTES = 64
"""Written and looked for to see whether memory is really shared."""


class NodeRanks(Protocol):
    """The ranks of a node, as much of them as peers need: mpi4py's communicator."""

    @property
    def rank(self) -> int:
        """This rank."""

    @property
    def size(self) -> int:
        """How many there are."""

    def allgather(self, sendobj: Any) -> list[Any]:
        """One thing of every rank, on all."""

    def Barrier(self) -> None:
        """Wait for all ranks."""


class PeerCopy(NamedTuple):
    """Bytes of a peer's part, and where they belong."""

    rank: int
    first: int
    nbytes: int
    address: int


class Fold(NamedTuple):
    """Bytes of all parts, to be reduced."""

    op: str
    code: str
    """The elements, as :func:`hpccomm.kernels.reductions.reference.code_of` calls them."""
    first: int
    nbytes: int
    address: int
    """Where the result belongs; 0 where this rank wants none."""
    shared: bool = True
    """Whether other ranks want the same bytes, so that work can be divided."""


class Phase(NamedTuple):
    """What is brought and taken at once."""

    reads: Sequence[Extent]
    folds: Sequence[Fold] = ()
    takes: Sequence[PeerCopy] = ()


class Peers:
    """The ranks of a node and their parts; creating it is collective.

    Raises :class:`~hpccomm.errors.TransportError` on all ranks where it does not work on one: what each rank wrote is
    looked for by all.
    """

    def __init__(self, device: Device, ranks: NodeRanks, nbytes: int | None = None) -> None:
        self.device, self.ranks = device, ranks
        self.room = (PART_BYTES if nbytes is None else nbytes) // 2
        """Bytes that a turn may bring."""
        self.stream, self._turn = device.create_stream(), 0
        self._mine, self._parts = 0, list[int]()
        handle, trouble = self._offer()
        offers = ranks.allgather((handle, trouble))
        trouble = next((words for _, words in offers if words), "") or self._open_peers([each for each, _ in offers])
        troubles = [words for words in ranks.allgather(trouble) if words]
        if troubles:
            self.free()
            raise TransportError(f"CUDA IPC does not work between these ranks: {troubles[0]}")

    def _offer(self) -> tuple[bytes, str]:
        """This rank's part, marked with its rank; or why there is none."""
        try:
            self._mine = self.device.allocate(2 * self.room)
            mark = np.full(MARK_BYTES, mark_of(self.ranks.rank), np.uint8)
            self.device.to_device(self._mine, mark, self.stream)
            self.device.synchronize(self.stream)
            return (self.device.handle(self._mine) if self.ranks.size > 1 else b""), ""
        except (RuntimeError, MemoryError) as error:
            return b"", f"rank {self.ranks.rank}: {error}"

    def _open_peers(self, handles: Sequence[bytes]) -> str:
        """Open the peers' parts and look for their marks; why they cannot be read, if so."""
        try:
            for rank, handle in enumerate(handles):
                self._parts.append(self._mine if rank == self.ranks.rank else self.device.open(handle))
                seen = np.zeros(MARK_BYTES, np.uint8)
                self.device.to_host(seen, self._parts[rank], self.stream)
                self.device.synchronize(self.stream)
                if (seen != mark_of(rank)).any():
                    return f"rank {self.ranks.rank} does not see what rank {rank} has written"
        except RuntimeError as error:
            return f"rank {self.ranks.rank}: {error}"
        return ""

    def run(self, turns: Sequence[Phase], streams: Iterable[int] = ()) -> None:
        """Take all turns; ``streams`` are those on which the arrays are written and read."""
        wait(self.device, streams)
        for turn in turns:
            self._run_phase(turn, self.room * (self._turn % 2))
            self._turn += 1
        self.device.synchronize(self.stream)

    def _run_phase(self, turn: Phase, half: int) -> None:
        """One turn in one half of the parts."""
        device, parts = self.device, [each + half for each in self._parts]
        for address, first, nbytes in turn.reads:
            device.copy(parts[self.ranks.rank] + first, address, nbytes, self.stream)
        self.barrier()
        for fold in turn.folds:
            self._fold(fold, parts)
        for rank, first, nbytes, address in turn.takes:
            device.copy(address, parts[rank] + first, nbytes, self.stream)

    def _fold(self, fold: Fold, parts: Sequence[int]) -> None:
        """Reduce the parts of all ranks."""
        if not fold.shared or len(parts) <= DIRECT_RANKS:
            if fold.address:
                self._reduce(fold, parts, 0, fold.nbytes, fold.address)
            return
        shares = divide_bytes(fold.nbytes, len(parts))
        lo, hi = shares[self.ranks.rank]
        self._reduce(fold, parts, lo, hi, parts[self.ranks.rank] + fold.first + lo)  # bytes that nobody else reads
        self.barrier()
        if fold.address:
            for part, (lo, hi) in zip(parts, shares, strict=True):
                self.device.copy(fold.address + lo, part + fold.first + lo, hi - lo, self.stream)

    def _reduce(self, fold: Fold, parts: Sequence[int], lo: int, hi: int, out: int) -> None:
        """Bytes [lo, hi) of a fold."""
        n = (hi - lo) // itemsize("bfloat16" if fold.code == "bf16" else fold.code)
        if n:
            vectors = [part + fold.first + lo for part in parts]
            self.device.reduce(fold.op, fold.code, vectors, out, n, self.stream)

    def barrier(self) -> None:
        """What every rank has begun is done, and all know it."""
        self.device.synchronize(self.stream)
        self.ranks.Barrier()

    def free(self) -> None:
        """Give the parts back (collective)."""
        for rank, address in enumerate(self._parts):
            if rank != self.ranks.rank:
                self.device.close(address)
        self.ranks.Barrier()
        if self._mine:
            self.device.release(self._mine)
        self._parts, self._mine = [], 0


def mark_of(rank: int) -> int:
    """What a rank writes into its part; new memory holds zeros."""
    return rank % 255 + 1


def divide_bytes(nbytes: int, ranks: int) -> list[tuple[int, int]]:
    """[lo, hi) of each rank's share of some bytes, whole elements each."""
    step = -(-nbytes // (ranks * ALIGNMENT)) * ALIGNMENT
    return [(min(k * step, nbytes), min((k + 1) * step, nbytes)) for k in range(ranks)]
