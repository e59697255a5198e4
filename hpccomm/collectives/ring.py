"""Ring: every rank sends to its right neighbour and receives from its left one; blocks travel once around.

*p ranks, r this one, k the round.*  Reduce-scatter and allgather take p-1 rounds, and every rank sends (p-1)/p of the
vector, the least possible; allreduce runs one after the other (Patarasuk & Yuan, J. Parallel Distrib. Comput. 2009).
"""

from __future__ import annotations

from collections.abc import Iterator

from hpccomm.collectives.schedule import Rank, Step


def reduce_scatter(r: Rank, p: int) -> Iterator[Step]:
    """Block b starts at rank b+1, collects one contribution a round, and is complete at rank b."""
    for k in range(p - 1):
        send, recv = (r - 1 - k) % p, (r - 2 - k) % p
        yield Step((r + 1) % p, (send, send + 1), (r - 1) % p, (recv, recv + 1), reduce=True)


def allgather(r: Rank, p: int) -> Iterator[Step]:
    """Every rank sends its own block first, then forwards the block that it received in the previous round."""
    for k in range(p - 1):
        send, recv = (r - k) % p, (r - 1 - k) % p
        yield Step((r + 1) % p, (send, send + 1), (r - 1) % p, (recv, recv + 1), reduce=False)


def allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Reduce-scatter, then allgather."""
    yield from reduce_scatter(r, p)
    yield from allgather(r, p)
