"""The fingerprint of a call: the fields that must agree between ranks, and a digest of them that fits into a tag.

Ranks whose fingerprints differ have made a mistake to which MPI itself responds with wrong data or a hang.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

from hpccomm.kernels.entry.records import COUNT_MASK, COUNT_PRIME, COUNT_SHIFT, DIGEST_MASK

TEXT_BYTES = 248
"""The length of a fingerprint as bytes."""
IN_PLACE = "in place"
UNKNOWN = "?"
"""A field that is not compared, because this rank cannot determine it."""

REMEDIES = {
    "collective": "make all ranks call the same collective in the same order",
    "dtype": "cast before the call",
    "count": "make the counts the same on all ranks",
    "amounts": "make what a rank sends and what the other receives the same",
    "op": "use the same operation on all ranks",
    "root": "name the same root on all ranks",
    "order": "convert the arrays to one memory order, np.ascontiguousarray(x), before the call",
    "algorithm": "name the same algorithm on all ranks",
    "place": "pass MPI.IN_PLACE on all ranks or on none",
    "arguments": "pass the same arguments on all ranks",
    "memory": "pass arrays in the same memory on all ranks: x.get() (CuPy) or x.cpu() (PyTorch) copy one to the host",
}


class Fingerprint(NamedTuple):
    """The fields of one rank's call."""

    collective: str
    op: str = ""
    count: str = ""  # type: ignore[assignment]
    dtype: str = ""
    root: str = ""
    order: str = ""
    algorithm: str = ""
    memory: str = ""
    """The memory of the arrays, if it is not the host's."""
    place: str = ""
    """:data:`IN_PLACE`, in collectives that MPI's libraries run in place by another algorithm."""
    arguments: str = ""
    """Of a method that makes a communicator, the arguments that all ranks must pass alike."""

    @property
    def number(self) -> int:
        """The count, if it is a number; else 0."""
        return int(self.count) if self.count.isdecimal() else 0

    @property
    def uncounted(self) -> Fingerprint:
        """The fingerprint without its count, of which a program may use many."""
        return self._replace(count="")

    @property
    def template(self) -> Fingerprint:
        """The same call of no elements, if its count is a number."""
        return self._replace(count="0") if self.count.isdecimal() else self

    @property
    def digest(self) -> int:
        """A hash of 28 bits, which fit into a tag of every MPI in use; calls of one kind differ by their count only."""
        return self.word & DIGEST_MASK

    @property
    def word(self) -> int:
        """The digest and the count in one word, for shared memory."""
        return find_word(self)

    def __str__(self) -> str:
        amount = " ".join(part for part in (self.count, self.dtype, self.memory) if part not in ("", UNKNOWN))
        named = [f"{name}={value}" for name, value in (("root", self.root), ("algorithm", self.algorithm)) if value]
        order = ["Fortran order"] if self.order == "F" else []
        operands = [part for part in (self.op, amount, self.place, self.arguments) if part not in ("", UNKNOWN)]
        arguments = ", ".join(operands + order + named)
        return f"{self.collective}({arguments})" if arguments else self.collective

    def encode(self) -> bytes:
        """The fingerprint as :data:`TEXT_BYTES` bytes for other ranks."""
        return "|".join(self).encode()[:TEXT_BYTES].ljust(TEXT_BYTES)


@lru_cache(512)
def find_word(call: Fingerprint) -> int:
    """The word of a fingerprint, which is needed several times in every first call of a kind."""
    digest = zlib.crc32("|".join(call.template).encode()) + call.number * COUNT_PRIME & DIGEST_MASK
    return digest | (call.number & COUNT_MASK) << COUNT_SHIFT


def template_digest(word: int) -> tuple[int, int]:
    """The digest of the template and the count in a fingerprint's word."""
    count = word >> COUNT_SHIFT & COUNT_MASK
    return (word - count * COUNT_PRIME) & DIGEST_MASK, count


def decode(octets: bytes) -> Fingerprint | None:
    """The fingerprint in bytes that another rank encoded; None if they are cut."""
    fields = octets.decode(errors="replace").rstrip().split("|")
    return Fingerprint(*fields) if len(fields) == len(Fingerprint._fields) else None


def first_difference(a: Fingerprint, b: Fingerprint) -> str | None:
    """The first field in which two calls contradict each other, if any."""
    for field in ("collective", "memory", "dtype", "op", "root", "algorithm", "count", "order", "place", "arguments"):
        mine, theirs = getattr(a, field), getattr(b, field)
        if mine != theirs and UNKNOWN not in (mine, theirs):
            return field
    return None


def find_difference(calls: Iterable[Fingerprint | None]) -> str | None:
    """The first field in which two of these calls contradict each other, if any; the first call's fields come first.

    A field that is not compared contradicts nothing, so every two calls are compared.
    """
    known = dict.fromkeys(each for each in calls if each)
    return next(filter(None, (first_difference(a, b) for a, b in combinations(known, 2))), None)


def mismatch_message(calls: dict[int, Fingerprint | None], me: int) -> str:
    """The error sentence: the ranks, the call of each, and the remedy."""
    groups: dict[str, list[int]] = {}
    for rank, call in sorted(calls.items()):
        groups.setdefault("something else" if call is None else str(call), []).append(rank)
    parts = [f"{format_ranks(members)} called {call}" for call, members in groups.items()]
    field = find_difference([calls[me], *calls.values()]) or "collective"
    return f"{', '.join(parts)}: {REMEDIES[field]} (noticed by rank {me})"


def format_ranks(members: list[int]) -> str:
    """``rank 3`` or ``ranks 0, 2, 3``; lists of more than eight are shortened."""
    if len(members) == 1:
        return f"rank {members[0]}"
    shown = ", ".join(map(str, members[:8]))
    return f"ranks {shown}" + (f" and {len(members) - 8} more" if len(members) > 8 else "")
