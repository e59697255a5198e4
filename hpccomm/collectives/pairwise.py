"""Direct: every rank exchanges each block with the owner of that block, without intermediate ranks.

*p ranks, r this one, k the round.*  As the ring, p-1 rounds and (p-1)/p of the vector from every rank, but each block
makes one hop only.  It suits shared memory, and networks in which all pairs of ranks can send at full rate at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpccomm.collectives.schedule import Rank, Step


def reduce_scatter(r: Rank, p: int) -> Iterator[Step]:
    """Send each rank its block; reduce the received blocks into the local one."""
    for k in range(1, p):
        to = (r + k) % p
        yield Step(to, (to, to + 1), (r - k) % p, (r, r + 1), reduce=True)


def allgather(r: Rank, p: int) -> Iterator[Step]:
    """Send the local block to each rank."""
    for k in range(1, p):
        source = (r - k) % p
        yield Step((r + k) % p, (r, r + 1), source, (source, source + 1), reduce=False)


def allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Reduce-scatter, then allgather."""
    yield from reduce_scatter(r, p)
    yield from allgather(r, p)
