"""Trees: a binomial tree in lg p rounds, a chain for long vectors in segments, and two binary trees at once.

*p ranks, r this one, v = r − root (mod p) its place counted from the root, mask the distance.*

==============  ===============================  =================================================
what            rounds                           bytes on the busiest rank
==============  ===============================  =================================================
binomial        ⌈lg p⌉ down, ⌈lg p⌉ up           n lg p sent by the root, n by the others
chain           p−1 down, p−1 up                 n; s segments take p−2+s times n/s
scatter-ring    ⌈lg p⌉ + p−1                     about 2 n
double tree     8 a level, most of them idle     2 n in, 2 n out: all links busy when segmented
==============  ===============================  =================================================

In the double tree every rank is inside one tree and a leaf of the other, each tree carrying half of the vector
(Sanders, Speck & Träff, Parallel Computing 2009).
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from hpccomm.collectives import ring
from hpccomm.collectives.schedule import NOBODY, Rank, Step, select_peer
from hpccomm.collectives.volume import Volume, ceil_lg, has_peers, ring_fraction

ALL = (0, 1)


def broadcast(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Whoever has it sends it as far again as it has come: 1, 2, 4 … places."""
    v = (np.asarray(r) - root) % p
    for mask in distances(p):
        to = select_peer((v < mask) & (v + mask < p), (r + mask) % p)
        source = select_peer((v >= mask) & (v < 2 * mask), (r - mask) % p)
        yield Step(to, ALL, source, ALL, reduce=False)


def reduce(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Neighbours first, so every partial result covers neighbouring places."""
    v = (np.asarray(r) - root) % p
    for mask in distances(p):
        to = select_peer(v % (2 * mask) == mask, (r - mask) % p)
        source = select_peer((v % (2 * mask) == 0) & (v + mask < p), (r + mask) % p)
        yield Step(to, ALL, source, ALL, reduce=True)


def reduce_in_order(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Reduce to rank 0, where ranks stand in order, and pass the result to the root."""
    yield from reduce(r, p)
    if root:
        here = np.asarray(r)
        yield Step(select_peer(here == 0, root), ALL, select_peer(here == root, 0), ALL, reduce=False)


def allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Reduce to rank 0, then broadcast."""
    yield from reduce(r, p)
    yield from broadcast(r, p)


def scatter(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Hand on the far half of the blocks one holds; block b is for rank b."""
    v = (np.asarray(r) - root) % p
    for mask in reversed(distances(p)):
        to = select_peer((v % (2 * mask) == 0) & (v + mask < p), (r + mask) % p)
        source = select_peer(v % (2 * mask) == mask, (r - mask) % p)
        yield Step(to, places(v + mask, mask, p, root), source, places(v, mask, p, root), reduce=False)


def gather(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Scatter, backwards."""
    for step in reversed(list(scatter(r, p, root))):
        yield Step(step.source, step.recv, step.to, step.send, reduce=False)


def scatter_ring(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """Broadcast of many bytes: scatter down the tree, allgather around the ring (van de Geijn)."""
    yield from scatter(r, p, root)
    yield from ring.allgather(r, p)


def chain_broadcast(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """From each place to the next one."""
    v = (np.asarray(r) - root) % p
    for k in range(p - 1):
        yield Step(select_peer(v == k, (r + 1) % p), ALL, select_peer(v == k + 1, (r - 1) % p), ALL, reduce=False)


def chain_reduce(r: Rank, p: int, root: int = 0) -> Iterator[Step]:
    """From the last place towards the root."""
    v = (np.asarray(r) - root) % p
    for k in reversed(range(p - 1)):
        yield Step(select_peer(v == k + 1, (r - 1) % p), ALL, select_peer(v == k, (r + 1) % p), ALL, reduce=True)


def chain_allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Down the chain to rank 0, and back."""
    yield from chain_reduce(r, p)
    yield from chain_broadcast(r, p)


def double_allreduce(r: Rank, p: int) -> Iterator[Step]:
    """Reduce up and broadcast down two binary trees, block 0 in the first, block 1 in the second."""
    up = [step for mask in distances(p) for from_left in (True, False) for step in climb(r, p, mask, from_left)]
    yield from up
    for step in reversed(up):
        yield Step(step.source, step.recv, step.to, step.send, reduce=False)


def climb(r: Rank, p: int, mask: int, from_left: bool) -> Iterator[Step]:
    """In both trees, the children of one level on one side of their parents send what they have gathered."""
    for block in (0, 1):
        place = position_of(r, p, block)
        parent = parent_of(place, p)
        goes = climbs(place, parent, p, mask, from_left)
        child = np.where(from_left, place - mask, place + mask)
        comes = (child > 0) & (child < p) & climbs(child, parent_of(child, p), p, mask, from_left)
        comes &= parent_of(child, p) == place
        to, source = select_peer(goes, rank_at(parent, p, block)), select_peer(comes, rank_at(child, p, block))
        yield Step(to, (block, block + 1), source, (block, block + 1), reduce=True)


def climbs(place: Rank, parent: Rank, p: int, mask: int, from_left: bool) -> Rank:
    """Whether the rank in this place is of the level ``mask`` and sits on this side of its parent."""
    return (place > 0) & (place & -place == mask) & ((place < parent) == from_left)


def parent_of(place: Rank, p: int) -> Rank:
    """In a binary tree numbered from left to right whose leaves are odd; place 0 is the root."""
    place = np.asarray(place)
    low = place & -place
    above = (place ^ low) | (low << 1)
    return np.where(place <= 0, NOBODY, np.where(above < p, above, place ^ low))


def position_of(r: Rank, p: int, tree: int) -> Rank:
    """Where rank r sits: in order in the first tree; mirrored (p even) or one further (p odd) in the second."""
    if tree == 0:
        return np.asarray(r)
    return p - 1 - np.asarray(r) if p % 2 == 0 else (np.asarray(r) - 1) % p


def rank_at(place: Rank, p: int, tree: int) -> Rank:
    """Who sits there."""
    if tree == 0:
        return place
    return p - 1 - place if p % 2 == 0 else (place + 1) % p


def distances(p: int) -> list[int]:
    """1, 2, 4 … below p."""
    return [1 << k for k in range((p - 1).bit_length())]


def places(v: Rank, count: int, p: int, root: int) -> tuple[Rank, Rank]:
    """The blocks of up to ``count`` places from v on."""
    return v + root, np.minimum(v + count, p) + root


def scatter_volume(p: int) -> Fraction:
    """The vectors that all ranks send in a scatter down a binomial tree: the subtree of every position, once."""
    return Fraction(sum(min(v & -v, p - v) for v in range(1, p)), p)


TREE_ALLREDUCE = Volume(
    "n ⌈lg p⌉ (root)",
    lambda p, _: 2 * ceil_lg(p),
    lambda p, _: Fraction(ceil_lg(p)),
    lambda p, _: Fraction(2 * (p - 1)),
)
TREE_BROADCAST = Volume(
    "n ⌈lg p⌉ (root)", lambda p, _: ceil_lg(p), lambda p, _: Fraction(ceil_lg(p)), lambda p, _: Fraction(p - 1)
)
TREE_REDUCE = Volume("n", lambda p, _: ceil_lg(p), lambda p, _: has_peers(p), lambda p, _: Fraction(p - 1))
REDUCE_IN_ORDER = Volume(
    "n",
    lambda p, root: ceil_lg(p) + (root > 0),
    lambda p, _: has_peers(p),
    lambda p, root: Fraction(p - 1 + (root > 0)),
)
SCATTER_RING = Volume(
    "2(p-1)/p n (root)",
    lambda p, _: ceil_lg(p) + p - 1,
    lambda p, _: 2 * ring_fraction(p),
    lambda p, _: scatter_volume(p) + p - 1,
)
CHAIN = Volume("n", lambda p, _: p - 1, lambda p, _: has_peers(p), lambda p, _: Fraction(p - 1))
CHAIN_ALLREDUCE = Volume(
    "2n (p > 2)",
    lambda p, _: 2 * (p - 1),
    lambda p, _: Fraction(min(p - 1, 2)),
    lambda p, _: Fraction(2 * (p - 1)),
)
DOUBLE_TREE = Volume(
    "2n (p > 3)",
    lambda p, _: 8 * ceil_lg(p),
    lambda p, _: has_peers(p) * Fraction(min(p, 4), 2),
    lambda p, _: Fraction(2 * (p - 1)),
)
