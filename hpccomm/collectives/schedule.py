"""A schedule lists, round by round, which blocks a rank sends to which peer and which blocks it receives from which.

*p ranks, r this one, k the round; a vector is cut into b blocks numbered 0 … b-1.*

One algorithm is one pure generator of :class:`Step`.  Step k of a rank matches step k of its peers: all ranks yield the
same number of steps, and a rank with nothing to do in a round yields ``idle_step``.  A rank sends the contents that its
blocks had before the round began.  Between two steps the ranks of a node may meet: a :class:`NodeStep` is one
collective among themselves.  ``r`` is an integer or ``np.arange(p)``; with an array, one step describes a whole
round and its fields are arrays, so that thousands of ranks are verified and priced at once.  Blocks ``[lo, hi)`` count
modulo b, so an interval may wrap around the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from hpccomm.collectives.volume import Volume

NOBODY = -1
"""The peer of a rank that sends (or receives) nothing in a round."""

Rank = Any
"""An ``int``, or an integer array with one entry a rank."""


class Step(NamedTuple):
    """One round of one rank: send blocks ``send`` to ``to`` while receiving blocks ``recv`` from ``source``."""

    to: Rank
    send: tuple[Rank, Rank]
    source: Rank
    recv: tuple[Rank, Rank]
    reduce: bool
    """Reduce the received blocks into the local ones (else replace these)."""


class NodeStep(NamedTuple):
    """A collective of the ranks of each node among themselves, the same object for every rank that it is generated for.

    Each rank has a part of the blocks, which may be empty; the parts of a node are disjoint and ascend with its ranks.
    """

    collective: str
    """``"reduce_scatter"``: a rank's part becomes the reduction of what all ranks of its node hold there; with one part
    a node, a reduce.  ``"allgather"``: every rank of the node receives every part; with one part, a broadcast."""
    node: Any
    """``(p,)`` the node of each rank; ``NOBODY`` for a rank that takes no part."""
    first: Any
    """``(p,)`` the first block of each rank's part."""
    end: Any
    """``(p,)`` the block after the last of each rank's part."""

    def members(self, r: int) -> list[int]:
        """The ranks that rank r meets, itself included; none if it takes no part."""
        rank = members_of_nodes(self.node)[1][self.node[r]]
        return [] if self.node[r] == NOBODY else rank[rank >= 0].tolist()


Steps = Callable[..., Iterator["Step | NodeStep"]]
"""``steps(r, p)``, or ``steps(r, p, root)`` for a collective with a root."""


class Algorithm(NamedTuple):
    """One algorithm of one collective."""

    steps: Steps
    blocks: Callable[[int], int]
    """The number of blocks into which p ranks cut the vector."""
    ordered: bool = False
    """Every reduction joins adjacent ranges of ranks, the lower on the left, for every root: correct for
    non-commutative operations."""
    segmented: bool = False
    """Faster for long vectors when pipelined in segments (chains and trees)."""
    own_blocks: Callable[[int], Any] | None = None
    """``(p,)`` the block that each rank of a reduce-scatter or allgather owns; ``None``: rank r owns block r."""
    volume: Volume | None = None
    """The rounds and bytes that the algorithm declares; ``verify`` checks them.  Steps inside nodes do not count."""


def block_per_rank(p: int) -> int:
    """One block for each rank."""
    return p


def one_block(p: int) -> int:
    """The whole vector in one block."""
    return 1


def power_of_two(p: int) -> int:
    """The largest power of two not above p."""
    return 1 << (p.bit_length() - 1)


def select_peer(active: Any, peer: Rank) -> Rank:
    """``peer`` where ``active`` holds, nobody elsewhere."""
    return np.where(active, peer, NOBODY)


def without_node_steps(steps: Iterable[Step | NodeStep], r: Rank) -> Iterator[Step]:
    """The steps with messages in place of every collective inside a node, for ranks that share no memory."""
    for step in steps:
        if isinstance(step, NodeStep):
            yield from expand(step, r)
        else:
            yield step


def expand(step: NodeStep, r: Rank) -> Iterator[Step]:
    """A collective inside each node as messages: every rank exchanges each part with the rank that has it."""
    local_rank, rank = members_of_nodes(step.node)
    sizes = (rank >= 0).sum(axis=1)
    node, empty = step.node[r], step.first >= step.end
    size, mine = np.where(node >= 0, sizes[node], 1), local_rank[r]
    gathers = step.collective == "allgather"
    for k in range(1, rank.shape[1]):
        active = (node >= 0) & (k < size)
        to, source = rank[node, (mine + k) % size], rank[node, (mine - k) % size]
        sent, received = (r, source) if gathers else (to, r)
        yield Step(
            select_peer(active & ~empty[sent], to),
            (step.first[sent], step.end[sent]),
            select_peer(active & ~empty[received], source),
            (step.first[received], step.end[received]),
            reduce=not gathers,
        )


def members_of_nodes(node: Any) -> tuple[Any, Any]:
    """``(p,)`` each rank's number in its node, and ``(N, most)`` the ranks of each node, -1 beyond its last."""
    return find_members(np.asarray(node, np.int64).tobytes())


@lru_cache(256)
def find_members(words: bytes) -> tuple[Any, Any]:
    """The same of the bytes of the nodes: every step of a schedule asks for them."""
    node = np.frombuffer(words, np.int64)
    order = np.argsort(node, kind="stable")
    order = order[np.searchsorted(node[order], 0) :]
    sizes = np.bincount(node[order], minlength=1)
    local_rank, rank = np.zeros(node.size, np.int64), np.full((sizes.size, int(sizes.max())), NOBODY)
    local_rank[order] = np.arange(order.size) - (np.cumsum(sizes) - sizes)[node[order]]
    rank[node[order], local_rank[order]] = order
    return local_rank, rank


def even_cuts(count: int, blocks: int) -> Any:
    """Offsets of ``blocks`` blocks of ``count`` elements; lengths differ by at most one, the longer blocks first."""
    base, longer = divmod(count, blocks)
    block = np.arange(blocks + 1, dtype=np.int64)
    return block * base + np.minimum(block, longer)


def idle_step(r: Rank) -> Step:
    """A round without messages."""
    nobody = np.full(np.shape(r), NOBODY)
    return Step(nobody, (0, 0), nobody, (0, 0), False)
