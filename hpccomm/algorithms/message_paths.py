"""How compressed messages meet: flat allgather, a sum inside the nodes first, or one of the sparse allreduces.

*p ranks on N nodes, n elements, k the largest number of elements that a rank sends.*  The first four paths add the same
messages, in other orders; they differ in bytes and in rounds (:mod:`hpccomm.collectives.compressed.prices`):

===================  ===========================================================================================
path                 what happens
===================  ===========================================================================================
allgather            every rank receives all messages
node                 ranks of the same place on their nodes exchange theirs, and the nodes share them in memory;
                     where sums are priced lower, where nodes are uneven, and as long as lengths are not known, the
                     ranks of a node add theirs, and the nodes' first ranks exchange the sums
split                each rank adds one block of the vector, all receive the blocks
recursive_doubling   sums of two ranks, of four, … travel
ok_topk              as split, of which the k largest sums travel; a rank keeps what was left out
leaders              the gradients and residuals of a node are added, and its first rank sends one message of them
dense                no message: gradients and residuals in an ordinary allreduce
===================  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hpccomm.algorithms.compression.format import Kind
from hpccomm.algorithms.transforms import Vector
from hpccomm.collectives.compressed import prices
from hpccomm.collectives.compressed.prices import place_of
from hpccomm.collectives.compressed.sparse import hierarchical_allreduce, sparse_allreduce
from hpccomm.kernels.vectors.reference import Indices

AUTO, ALLGATHER, NODE, DENSE, LEADERS = "auto", "allgather", "node", "dense", "leaders"

TRY_AGAIN = 64
"""Dense steps after which messages are tried again."""
ELEMENT_BYTES = {Kind.WORDS: 4, Kind.SPARSE: 8, Kind.CELLS: 4}
"""About the bytes of an element in messages that name elements; others hold all of them."""


class MessageSum(NamedTuple):
    """The sum of the decoded messages of all ranks."""

    total: Vector
    """The same bits on all ranks."""
    returned: tuple[Indices, Vector] | None
    """What was left out of this rank's message, to be added to its residual."""
    bytes_sent: int


def sum_inside_nodes(comm: Any, own: Vector, k: int) -> MessageSum:
    """Add inside the nodes, exchange between their first ranks."""
    sent = [4 * own.size if comm.intra_node.rank else 4 * own.size * (comm.intra_node.size - 1)]

    def between(leaders: Any, vector: Vector) -> Vector:
        index = np.flatnonzero(vector).astype(np.uint32)
        found = sparse_allreduce(leaders, index, vector[index], vector.size)
        sent.append(found.bytes_sent)
        return found.total

    return MessageSum(hierarchical_allreduce(comm, own, between), None, sum(sent))


def sum_by(algorithm: str) -> Callable[[Any, Vector, int], MessageSum]:
    """One of the sparse allreduces."""

    def add(comm: Any, own: Vector, k: int) -> MessageSum:
        index = np.flatnonzero(own).astype(np.uint32)
        found = sparse_allreduce(comm, index, own[index], own.size, k=k or None, algorithm=algorithm)
        return MessageSum(found.total, found.remainder if k else None, found.bytes_sent)

    return add


PATHS: dict[str, Callable[[Any, Vector, int], MessageSum]] = {
    NODE: sum_inside_nodes,
    "split": sum_by("split"),
    "recursive_doubling": sum_by("recursive_doubling"),
    "ok_topk": sum_by("ok_topk"),
}
"""``add(comm, own decoded message, k)`` (collective)."""

EXCHANGES = (AUTO, ALLGATHER, DENSE, *PATHS, LEADERS)
"""The names of all exchanges; a state holds the position of the last one."""


def choose_path(comm: Any, n: int, nbytes: int, elements: int) -> str:
    """The path of the next step by its price; ``nbytes`` and ``elements`` of the longest message, 0 if not known."""
    return prices.choose_by_price(n, elements, nbytes, place_of(comm))


def forwards_messages(comm: Any, n: int, nbytes: int, elements: int) -> bool:
    """Whether the path ``node`` passes such messages on, or adds them inside the nodes."""
    place = place_of(comm)
    if not place.has_nodes:
        return True
    return bool(nbytes) and prices.cheapest(prices.node_phases(n, elements, nbytes, place), place) == prices.FORWARD


def elements_in(nbytes: int, kinds: frozenset[Kind], n: int) -> int:
    """About the elements of n that a message of so many bytes names, all of them where it holds the whole vector."""
    width = max((ELEMENT_BYTES.get(kind, 0) for kind in kinds), default=0)
    return min(n, nbytes // width) if width else n


def is_worth_messages(comm: Any, n: int, density: float, exchange: str) -> bool:
    """Whether messages of this density take less time than a dense allreduce; of short vectors, fewer bytes."""
    if not n:
        return False
    if n < prices.LONG or exchange != AUTO:
        senders = place_of(comm).nodes if exchange == LEADERS else comm.size
        return density * senders <= 1
    return prices.choose_by_price(n, density * n, 8 * density * n, place_of(comm)) != DENSE
