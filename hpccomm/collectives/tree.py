"""Trees: a binomial tree in lg p rounds, a chain for long vectors in segments, and two binary trees at once.

*p ranks, r this one, v = r − root (mod p) its position counted from the root, mask the distance.*

==============  ===============================  =================================================
algorithm       rounds                           bytes sent by the busiest rank
==============  ===============================  =================================================
binomial        ⌈lg p⌉ down, ⌈lg p⌉ up           n lg p sent by the root, n by the others
chain           p−1 down, p−1 up                 n; s segments take p−2+s times n/s
scatter-ring    ⌈lg p⌉ + p−1                     about 2 n
double tree     8 a level, a rank idles in most  2 n in, 2 n out: all links busy when segmented
==============  ===============================  =================================================

In the double tree every rank is an inner node of one tree and a leaf of the other; each tree carries half of the vector
(Sanders, Speck & Träff, Parallel Computing 2009).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hpccomm.collectives import ring
from hpccomm.collectives.schedule import NOBODY, Rank, Step, select_peer
from hpccomm.collectives.volume import Vectors, Volume, ceil_lg, divide, has_peers, ring_fraction

ALL = (0, 1)


def broadcast(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Every rank that has the vector sends it 1, 2, 4 … positions on."""
    v = (np.asarray(r) - root) % p
    for mask in distances(p):
        to = select_peer((v < mask) & (v + mask < p), (r + mask) % p)
        source = select_peer((v >= mask) & (v < 2 * mask), (r - mask) % p)
        yield Step(to, ALL, source, ALL, reduce=False)


def reduce(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Neighbours first, so every partial result covers adjacent positions."""
    v = (np.asarray(r) - root) % p
    for mask in distances(p):
        to = select_peer(v % (2 * mask) == mask, (r - mask) % p)
        source = select_peer((v % (2 * mask) == 0) & (v + mask < p), (r + mask) % p)
        yield Step(to, ALL, source, ALL, reduce=True)


def reduce_in_order(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Reduce to rank 0, so that rank order is kept, then send the result to the root."""
    yield from reduce(r, p)
    if root:
        here = np.asarray(r)
        yield Step(select_peer(here == 0, root), ALL, select_peer(here == root, 0), ALL, reduce=False)


def allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Reduce to rank 0, then broadcast."""
    yield from reduce(r, p)
    yield from broadcast(r, p)


def scatter(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Send the far half of the blocks to another rank, in every round; block b is for rank b."""
    v = (np.asarray(r) - root) % p
    for mask in reversed(distances(p)):
        to = select_peer((v % (2 * mask) == 0) & (v + mask < p), (r + mask) % p)
        source = select_peer(v % (2 * mask) == mask, (r - mask) % p)
        yield Step(to, block_range(v + mask, mask, p, root), source, block_range(v, mask, p, root), reduce=False)


def gather(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """The rounds of scatter in reverse order and direction."""
    for step in reversed(list(scatter(r, p, root))):
        yield Step(step.source, step.recv, step.to, step.send, reduce=False)


def scatter_ring(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Broadcast of long vectors: scatter down the tree, allgather around the ring (van de Geijn)."""
    yield from scatter(r, p, root)
    yield from ring.allgather(r, p)


def chain_broadcast(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """From each position to the next."""
    v = (np.asarray(r) - root) % p
    for k in range(p - 1):
        yield Step(select_peer(v == k, (r + 1) % p), ALL, select_peer(v == k + 1, (r - 1) % p), ALL, reduce=False)


def chain_reduce(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """From the last position towards the root."""
    v = (np.asarray(r) - root) % p
    for k in reversed(range(p - 1)):
        yield Step(select_peer(v == k + 1, (r - 1) % p), ALL, select_peer(v == k, (r + 1) % p), ALL, reduce=True)


def chain_allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Reduce along the chain to rank 0, then broadcast."""
    yield from chain_reduce(r, p)
    yield from chain_broadcast(r, p)


def double_allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Reduce up and broadcast down two binary trees; block 0 travels in the first, block 1 in the second."""
    up = [step for mask in distances(p) for from_left in (True, False) for step in climb(r, p, mask, from_left)]
    yield from up
    for step in reversed(up):
        yield Step(step.source, step.recv, step.to, step.send, reduce=False)


def climb(r: Rank, p: int, mask: int, from_left: bool) -> Iterator[Step]:
    """In both trees, the children of one level on one side of their parents send their partial results."""
    for block in (0, 1):
        position = position_of(r, p, block)
        parent = parent_of(position, p)
        sends = climbs(position, parent, mask, from_left)
        child = np.where(from_left, position - mask, position + mask)
        receives = (child > 0) & (child < p) & climbs(child, parent_of(child, p), mask, from_left)
        receives &= parent_of(child, p) == position
        to, source = select_peer(sends, rank_at(parent, p, block)), select_peer(receives, rank_at(child, p, block))
        yield Step(to, (block, block + 1), source, (block, block + 1), reduce=True)


def climbs(position: Rank, parent: Rank, mask: int, from_left: bool) -> Rank:
    """Whether the position is of the level ``mask`` and on this side of its parent."""
    return (position > 0) & (position & -position == mask) & ((position < parent) == from_left)


def parent_of(position: Rank, p: int) -> Rank:
    """The parent in a binary tree numbered from left to right; odd positions are leaves, position 0 is the root."""
    position = np.asarray(position)
    low = position & -position
    above = (position ^ low) | (low << 1)
    return np.where(position <= 0, NOBODY, np.where(above < p, above, position ^ low))


def position_of(r: Rank, p: int, tree: int) -> Rank:
    """The position of rank r: r in the first tree; mirrored (p even) or shifted by one (p odd) in the second."""
    if tree == 0:
        return np.asarray(r)
    return p - 1 - np.asarray(r) if p % 2 == 0 else (np.asarray(r) - 1) % p


def rank_at(position: Rank, p: int, tree: int) -> Rank:
    """The rank at a position."""
    if tree == 0:
        return position
    return p - 1 - position if p % 2 == 0 else (position + 1) % p


def distances(p: int) -> list[int]:
    """1, 2, 4 … below p."""
    return [1 << k for k in range((p - 1).bit_length())]


def block_range(v: Rank, count: int, p: int, root: int) -> tuple[Rank, Rank]:
    """The blocks of up to ``count`` positions from v on."""
    return v + root, np.minimum(v + count, p) + root


def scatter_volume(p: int) -> Vectors:
    """The vectors that all ranks send in a scatter down a binomial tree: the subtree of every position, once."""
    return divide(sum(min(v & -v, p - v) for v in range(1, p)), p)


TREE_ALLREDUCE = Volume(
    "n ⌈lg p⌉ (root)", lambda p, _: 2 * ceil_lg(p), lambda p, _: ceil_lg(p), lambda p, _: 2 * (p - 1)
)
TREE_BROADCAST = Volume("n ⌈lg p⌉ (root)", lambda p, _: ceil_lg(p), lambda p, _: ceil_lg(p), lambda p, _: p - 1)
TREE_REDUCE = Volume("n", lambda p, _: ceil_lg(p), lambda p, _: has_peers(p), lambda p, _: p - 1)
REDUCE_IN_ORDER = Volume(
    "n",
    lambda p, root: ceil_lg(p) + (root > 0),
    lambda p, _: has_peers(p),
    lambda p, root: p - 1 + (root > 0),
)
SCATTER_RING = Volume(
    "2(p-1)/p n (root)",
    lambda p, _: ceil_lg(p) + p - 1,
    lambda p, _: 2 * ring_fraction(p),
    lambda p, _: scatter_volume(p) + p - 1,
)
CHAIN = Volume("n", lambda p, _: p - 1, lambda p, _: has_peers(p), lambda p, _: p - 1)
CHAIN_ALLREDUCE = Volume("2n (p > 2)", lambda p, _: 2 * (p - 1), lambda p, _: min(p - 1, 2), lambda p, _: 2 * (p - 1))
DOUBLE_TREE = Volume(
    "2n (p > 3)",
    lambda p, _: 8 * ceil_lg(p),
    lambda p, _: has_peers(p) * divide(min(p, 4), 2),
    lambda p, _: 2 * (p - 1),
)
