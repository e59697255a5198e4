"""A call: what a collective was asked to do, read and checked once, for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mpi4py import MPI

from hpccomm.calls import operations
from hpccomm.calls.blocks import EQUAL, ONE, PARTS, SIGNATURES, TYPED, Amounts, Signature
from hpccomm.calls.buffers import Buffer
from hpccomm.calls.fingerprint import IN_PLACE, UNKNOWN, Fingerprint
from hpccomm.calls.plans import Run
from hpccomm.performance.tuning import Choice

NO_CHOICE, NO_FINGERPRINT = Choice("native", None, ""), Fingerprint("")
"""Of a call for which nothing has been decided."""


@dataclass(eq=False)
class Call:
    """One call on one of ``size`` ranks."""

    name: str
    who: str
    """The rank and the call, with which every error begins."""
    rank: int
    size: int
    send: Buffer
    recv: Buffer
    """The same object as :attr:`send` in place; a buffer of ``None`` where this rank has none."""
    op: Any = None
    """The :class:`MPI.Op` of a reduction, or ``None``."""
    root: int | None = None
    recvcounts: tuple[int, ...] | None = None
    algorithm: str | None = None
    """The algorithm that the caller has named."""
    reproducible: bool = False
    data: Any = None
    """The :class:`Buffer` whose elements describe the call; ``None`` for a call without buffers."""
    nbytes: int = 0
    """The bytes by which an algorithm is chosen, the same on all ranks; 0 where only MPI has one."""
    counts: tuple[int, ...] = ()
    """Elements of each rank's block of a reduce-scatter."""
    count: str | None = None
    """The elements that its fingerprint names, or ``UNKNOWN``; ``None`` for those of :attr:`data`."""
    amounts: Amounts | None = None
    memory: str = ""
    """The memory of the arrays, if it is not the host's."""
    choice: Choice = NO_CHOICE
    fingerprint: Fingerprint = NO_FINGERPRINT
    before: Run | None = None
    after: Run | None = None
    """What a rewrite of the call does before and after it."""

    def __post_init__(self) -> None:
        self.signature: Signature = SIGNATURES[self.name]
        """What the collective takes."""
        self.collective: str = self.signature.family or self.name.lower()
        """The collective whose algorithms the call uses."""

    @property
    def in_place(self) -> bool:
        """Whether there is one buffer for both directions."""
        return self.send is self.recv

    @property
    def here(self) -> bool:
        """Whether this rank is the root, or there is none."""
        return self.root is None or self.root == self.rank

    @property
    def op_name(self) -> str:
        """The name of the operation; empty without one."""
        return "" if self.op is None else operations.name_of(self.op)

    @property
    def uneven(self) -> bool:
        """Whether blocks may have any length."""
        return self.signature.varies or self.recvcounts is not None

    @property
    def gathers(self) -> bool:
        """Whether each rank sends one block and receives one of every rank."""
        return self.signature.send == ONE and self.signature.recv != ONE

    @cached_property
    def readable(self) -> bool:
        """Whether others than mpi4py can move its elements or, with an operation, reduce them, as it was read."""
        moved = [each for each in (self.send, self.recv) if not is_absent(each)] or [self.data]
        return self.data is None or all(
            each.dtype is not None or (self.op is None and each.datatype is not None) for each in (self.data, *moved)
        )

    def blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Elements and displacements of the blocks that this rank receives."""
        if self.signature.recv != EQUAL:
            return self.recv.blocks(self.size)
        each = self.recv.block_length(self.size)
        return (each,) * self.size, tuple(each * k for k in range(self.size))

    def describe(self, algorithm: str) -> Fingerprint:
        """The fingerprint, which other ranks compare with theirs; ``algorithm`` is what the caller has named."""
        op = "" if self.op is None else operations.name_in_fingerprint(self.op)
        root = "" if self.root is None else str(self.root)
        exchanges = self.signature.send == self.signature.recv in (EQUAL, PARTS, TYPED)
        place = IN_PLACE if exchanges and (self.in_place or is_absent(self.send)) else ""
        if self.data is None:
            return Fingerprint(self.name, op, "", "", root, "", algorithm, self.memory, place)
        dtype = self.data.dtype or self.data.base
        count, kind, order = self.count, UNKNOWN, UNKNOWN
        if dtype is not None:
            count = str(self.data.nbytes // dtype.itemsize) if count is None else count
            kind = dtype.name if self.data.opaque else self.data.element_name or self.data.kind
            order = self.data.order
        return Fingerprint(
            self.name, op, UNKNOWN if count is None else count, kind, root, order, algorithm, self.memory, place
        )


def is_absent(buffer: Buffer) -> bool:
    """Whether a rank does not have a buffer of its call, or has another in its place."""
    return buffer.raw is None or buffer.raw is MPI.IN_PLACE


def describe_counts(counts: tuple[int, ...]) -> str:
    """The counts of all ranks for a fingerprint: their sum where they are alike, else at most eight, and a hash."""
    if min(counts) == max(counts):
        return str(sum(counts))
    known = counts if len(counts) <= 8 else (*counts[:8], f"and {len(counts) - 8} more", hash(counts))
    return "+".join(map(str, known))
