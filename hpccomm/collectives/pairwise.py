"""Direct: every rank deals with the owner of each block itself, with nobody in between.

*p ranks, r this one, k the round.*  p-1 rounds, (p-1)/p of the vector from every rank, as the ring, but each block
makes one hop only: what a network without hot spots, or memory that everybody can read, likes best.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpccomm.collectives.schedule import Rank, Step


def reduce_scatter(r: Rank, p: int) -> Iterator[Step]:
    """Send each rank its block; what arrives is for one's own."""
    for k in range(1, p):
        to = (r + k) % p
        yield Step(to, (to, to + 1), (r - k) % p, (r, r + 1), reduce=True)


def allgather(r: Rank, p: int) -> Iterator[Step]:
    """Send one's own block to each rank."""
    for k in range(1, p):
        source = (r - k) % p
        yield Step((r + k) % p, (r, r + 1), source, (source, source + 1), reduce=False)


def allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Reduce-scatter, then allgather."""
    yield from reduce_scatter(r, p)
    yield from allgather(r, p)
