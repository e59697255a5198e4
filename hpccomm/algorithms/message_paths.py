"""How compressed messages meet: flat allgather, a sum inside the nodes first, or one of the sparse allreduces.

*p ranks on N nodes, n elements, k the largest number of elements that a rank sends, α and β of the link.*  All paths
add the same messages; they differ in the order of additions, in bytes and in rounds (:func:`sparse.times` prices them):

===================  ===========================================================================================
path                 what happens
===================  ===========================================================================================
allgather            every rank receives all messages
node                 the ranks of a node add theirs in shared memory, the nodes' first ranks exchange the sums
split                each rank adds one block of the vector, all receive the blocks
recursive_doubling   sums of two ranks, of four, … travel
ok_topk              as split, of which the k largest sums travel; a rank keeps what was left out
dense                no message: gradients and residuals in an ordinary allreduce
===================  ===========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from hpccomm.algorithms.transforms import Vector
from hpccomm.collectives.compressed.sparse import hierarchical_allreduce, sparse_allreduce, times
from hpccomm.kernels.vectors.reference import Indices
from hpccomm.layout import ETHERNET

AUTO, ALLGATHER, NODE, DENSE = "auto", "allgather", "node", "dense"

LONG = 1 << 16
"""Elements from which bytes, and not rounds, decide whether messages are worth it."""
TRY_AGAIN = 64
"""Dense steps after which messages are tried again."""


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

EXCHANGES = (AUTO, ALLGATHER, DENSE, *PATHS)
"""The names of all exchanges; a state holds the position of the last one."""


def is_node_aware(comm: Any) -> bool:
    """Whether a node of several ranks exchanges with other nodes."""
    layout = getattr(comm, "layout", None)
    return layout is not None and layout.count > 1 and max(layout.per_node) > 1 and comm.size == layout.size


def choose_path(comm: Any, n: int, elements: int, steps: int) -> str:
    """The path of the next step by its price; ``elements`` of the longest message of the last step, 0 before."""
    if is_node_aware(comm):
        return NODE
    if n < LONG or not elements or steps % TRY_AGAIN == 0:
        return ALLGATHER
    price = times(n, elements, None, comm.size, getattr(comm, "link", ETHERNET))
    return DENSE if price[DENSE] < price[ALLGATHER] else ALLGATHER
