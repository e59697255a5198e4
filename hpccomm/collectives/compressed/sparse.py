"""Allgather and allreduce of sparse vectors.

*p ranks; n elements; k elements in the sparse vector of a rank; words of 4 bytes.*  A sparse vector is two flat arrays
of the same length: indices (uint32, ascending, below n) and values (float32).  On the wire indices precede values.

==========================  =====================  ====================================================================
:func:`sparse_allreduce`    messages of a rank     words that a rank sends
==========================  =====================  ====================================================================
``allgather``               p - 1                  2k(p-1)
``recursive_doubling``      log₂p                  2k in the first round, at most n in each
``split``                   2(p-1)                 2k(p-1)/p, then p-1 times its block of the sum, at most n/p
``dense``                   2(p-1)                 2n(p-1)/p
``ok_topk``                 2(p-1)                 about 4k(p-1)/p
``gtopk``                   2 log₂p                2k to its parent; rank 0 then 2k to each other rank
==========================  =====================  ====================================================================

The first four are exact.  The last two keep the k largest elements of the sum and return the others to the ranks that
contributed them: see :class:`SparseSum`.  Before data moves, all ranks compare their arguments; :mod:`messages
<hpccomm.collectives.compressed.messages>` defines "bytes sent" and the communicator ``comm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.collectives.compressed.messages import (
    BAD_PLAN,
    NO_K,
    NOT_ASCENDING,
    NOT_FINITE,
    NOT_FLAT,
    OK,
    UNKNOWN,
    Comm,
    CountingComm,
    Ints,
    check_arguments,
    demand_whole,
    number_of,
)
from hpccomm.collectives.compressed.prices import (
    DENSE_FROM,
    Place,
    cheapest,
    exact_phases,
    lossy_phases,
    place_of,
)
from hpccomm.collectives.engine import even_cuts
from hpccomm.errors import ArgumentError
from hpccomm.kernels.dispatch import kernels
from hpccomm.kernels.vectors.reference import Indices, Octets, Vector


class SparsePlan(NamedTuple):
    """Reusable results of Ok-Topk: the offsets of the ranks' blocks, and the magnitude from which elements are kept."""

    cuts: tuple[int, ...]
    threshold: float


class SparseSum(NamedTuple):
    """The result of a sparse allreduce."""

    total: Vector
    """Float32 of shape (n,), the same bits on all ranks."""
    remainder: tuple[Indices, Vector]
    """The elements of this rank that are not in ``total``: add them to the residual.  ``total`` and the remainders of
    all ranks add up to all contributions.  Empty after an exact algorithm."""
    path: str
    """The algorithm that ran."""
    bytes_sent: int
    """Bytes sent by this rank."""
    plan: SparsePlan | None = None
    """The plan of Ok-Topk, for the next call."""


def sparse_allgather(comm: Comm, indices: Indices, values: Vector, n: int) -> list[tuple[Indices, Vector]]:
    """The sparse vectors of all ranks in rank order, on every rank (collective).

    ``indices``: uint32, ascending, below ``n``; ``values``: float32; both flat, of any length, 0 included.  NaN and
    infinity are sent unchanged.  A rank sends 24 bytes of arguments to each other rank, and 8k bytes by
    :func:`~hpccomm.collectives.compressed.messages.gather_messages`.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves, where a rank passes other arrays or
    ``n`` differs.
    """
    wire = CountingComm(comm)
    check_arguments(wire, "sparse_allgather", find_vector_problem(indices, values, n, finite=False), 0, n=n)
    return [pairs_in(each, n) for each in wire.gather(octets_of(indices, values))]


def sparse_allreduce(
    comm: Comm,
    indices: Indices,
    values: Vector,
    n: int,
    *,
    k: int | None = None,
    algorithm: str = "auto",
    plan: SparsePlan | None = None,
) -> SparseSum:
    """The sum of the sparse vectors of all ranks, dense, on every rank with the same bits (collective).

    ``indices``: uint32, ascending, below ``n``; ``values``: float32; both flat, of any length, 0 included.  The values
    of ``algorithm``:

    - ``"allgather"``: all ranks receive all vectors and add them in rank order.
    - ``"recursive_doubling"``: sums of 2, 4, … ranks; dense from n/4 elements (SparCML, Renggli et al., SC 2019).
      The order of addition is another, and so is the rounding.
    - ``"split"``: each rank sums one block of the indices in rank order; an allgather of the blocks follows, each
      sparse or dense, whichever is shorter (SparCML).
    - ``"dense"``: an ``Allreduce`` of n elements, in its order.
    - ``"ok_topk"``: as split, with blocks cut for equal load; keeps the ``k`` largest of the sum (Li & Hoefler, PPoPP
      2022), of equal magnitudes the lower index.  ``plan``, from an earlier call and the same on all ranks, saves the
      search for cuts and threshold; then every element that reaches the threshold is kept, not k of them.
    - ``"gtopk"``: a binomial tree of sums of two, each pruned to the ``k`` largest (Shi et al., ICDCS 2019).  An
      element that one rank prunes while another keeps its index is returned at the rank that pruned it, so nothing is
      lost.
    - ``"auto"``: the least time by :mod:`~hpccomm.collectives.compressed.prices`: of the exact algorithms without
      ``k``, of the last two with it.

    -0.0 becomes 0.0.  Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves, where a rank
    passes other arrays, a NaN or an infinity, or where ``n``, ``k``, ``algorithm`` or ``plan`` differ.
    """
    wire = CountingComm(comm)
    counts = check_arguments(
        wire,
        "sparse_allreduce",
        find_vector_problem(indices, values, n)
        or find_argument_problem(algorithm, k)
        or find_plan_problem(plan, n, wire.size),
        np.size(indices),
        n=n,
        k=k or 0,
        algorithm=number_of(algorithm),
        plan=number_of(plan),
    )
    path = algorithm
    if path == "auto":
        path = select_algorithm(n, int(counts.max()), k, place_of(comm))
    values = values + np.float32(0)
    if path in LOSSY_ALGORITHMS:
        assert k is not None
        total, returned, found = LOSSY_ALGORITHMS[path](wire, indices, values, n, k, plan)
        return SparseSum(total, returned, path, wire.bytes_sent, found)
    total = EXACT_ALGORITHMS[path](wire, indices, values, n)
    return SparseSum(total, (indices[:0], values[:0]), path, wire.bytes_sent)


def hierarchical_allreduce(comm: Any, vector: Vector, between: Callable[[Any, Vector], Vector]) -> Vector:
    """A dense sum inside each node and a compressed exchange between nodes; the same result on all ranks (collective).

    The ranks of a node sum ``vector`` (float32 of shape (n,)); the leader of each node, its first rank, calls
    ``between(leaders, sum)``, which returns float32 of shape (n,), the same on all leaders; all ranks receive it.
    ``comm`` has the communicators ``intra_node`` and ``inter_node``.  State that ``between`` keeps from step to step is
    kept on the leaders.

    Where ``between`` raises on the leaders, all ranks raise :class:`~hpccomm.errors.ArgumentError`.
    """
    node, leaders = comm.intra_node, comm.inter_node
    total = np.empty_like(vector)
    node.Reduce(vector, total, root=0)
    failed = np.zeros(1, np.int64)
    error: Exception | None = None
    if node.rank == 0:
        try:
            total = between(leaders, total)
        except ArgumentError as refused:
            failed[0], error = 1, refused
    node.Bcast(failed, 0)
    if failed[0]:
        raise error or ArgumentError(
            "hierarchical: the exchange between nodes failed, see the error of this node's first rank"
        )
    node.Bcast(total, 0)
    return total


def find_vector_problem(indices: Any, values: Any, n: int, finite: bool = True) -> int:
    """The problem of a sparse vector, as an index of ``PROBLEMS``."""
    for array, dtype in ((indices, np.uint32), (values, np.float32)):
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous:
            return NOT_FLAT
    if indices.size != values.size:
        return NOT_FLAT
    if not kernels().is_ascending(indices, n):
        return NOT_ASCENDING
    return NOT_FINITE if finite and not kernels().all_finite(values) else OK


def find_argument_problem(algorithm: str, k: int | None) -> int:
    """The problem of the other arguments, as an index of ``PROBLEMS``."""
    if algorithm not in (*EXACT_ALGORITHMS, *LOSSY_ALGORITHMS, "auto"):
        return UNKNOWN
    return NO_K if (algorithm in LOSSY_ALGORITHMS and k is None) or (k is not None and k < 1) else OK


def find_plan_problem(plan: SparsePlan | None, n: int, p: int) -> int:
    """The problem of a plan, as an index of ``PROBLEMS``."""
    fits = plan is None or (len(plan.cuts) == p + 1 and list(plan.cuts) == sorted(plan.cuts) and plan.cuts[-1] == n)
    return OK if fits and (plan is None or plan.cuts[0] == 0) else BAD_PLAN


def octets_of(indices: Indices, values: Vector) -> Octets:
    """The bytes of a sparse vector: indices, then values."""
    return np.concatenate([indices.view(np.uint8), values.view(np.uint8)])


def pairs_in(octets: Octets, n: int) -> tuple[Indices, Vector]:
    """The indices and values in the bytes of a sparse vector of n elements; raises where there are none."""
    half = octets.size // 2
    demand_whole(octets.size % 8 == 0, f"{octets.size} bytes are no pairs")
    indices = octets[:half].view(np.uint32)
    demand_whole(kernels().is_ascending(indices, n), f"indices out of order, or not below {n}")
    return indices, octets[half:].view(np.float32)


def pack_vector(indices: Indices, values: Vector, n: int) -> Octets:
    """Pack a vector of n elements: sparse below n/4 elements, else dense, recognisable by its 4n bytes."""
    if indices.size * DENSE_FROM < n:
        return octets_of(indices, values)
    dense = np.zeros(n, np.float32)
    dense[indices] = values
    return dense.view(np.uint8)


def add_vector(octets: Octets, out: Vector) -> None:
    """Add a vector packed by :func:`pack_vector` into ``out``."""
    if octets.size == out.nbytes:
        out += octets.view(np.float32)
    else:
        kernels().scatter_add([pairs_in(octets, out.size)], out)


def merge_sparse(a: tuple[Indices, Vector], b: tuple[Indices, Vector]) -> tuple[Indices, Vector]:
    """The sum of two sparse vectors."""
    indices, position = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    values = np.zeros(indices.size, np.float32)
    values[position[: a[0].size]] += a[1]
    values[position[a[0].size :]] += b[1]
    return indices, values


# Exact sums


def sum_by_allgather(wire: CountingComm, indices: Indices, values: Vector, n: int) -> Vector:
    """All ranks receive all vectors."""
    total = np.zeros(n, np.float32)
    kernels().scatter_add([pairs_in(each, n) for each in wire.gather(octets_of(indices, values))], total)
    return total


def sum_by_allreduce(wire: CountingComm, indices: Indices, values: Vector, n: int) -> Vector:
    """A dense allreduce."""
    mine, total = np.zeros(n, np.float32), np.zeros(n, np.float32)
    mine[indices] = values
    wire.Allreduce(mine, total)
    return total


def sum_by_doubling(wire: CountingComm, indices: Indices, values: Vector, n: int) -> Vector:
    """Sums of two ranks, of four, …; a rank beyond the last power of two sends its vector to one below it first."""
    rank, inner = wire.rank, 1 << (wire.size.bit_length() - 1)
    partial = pack_vector(indices, values, n)
    if rank >= inner:
        partial = wire.sendrecv(partial, rank - inner, rank - inner)
    else:
        if rank + inner < wire.size:
            partial = sum_of(partial, wire.fetch(rank + inner), n)
        distance = 1
        while distance < inner:
            theirs = wire.sendrecv(partial, rank ^ distance, rank ^ distance)
            partial = sum_of(*((partial, theirs) if rank & distance == 0 else (theirs, partial)), n)
            distance *= 2
        if rank + inner < wire.size:
            wire.post(partial, rank + inner).Wait()
    total = np.zeros(n, np.float32)
    add_vector(partial, total)
    return total


def sum_of(a: Octets, b: Octets, n: int) -> Octets:
    """The sum of two packed vectors, packed."""
    if 4 * n not in (a.size, b.size):
        return pack_vector(*merge_sparse(pairs_in(a, n), pairs_in(b, n)), n)
    total = np.zeros(n, np.float32)
    add_vector(a, total)
    add_vector(b, total)
    return total.view(np.uint8)


def sum_by_split(wire: CountingComm, indices: Indices, values: Vector, n: int) -> Vector:
    """Each rank sums one block; all ranks receive all blocks."""
    cuts = even_cuts(n, wire.size)
    mine = reduce_block(wire, indices, values, cuts)
    nonzero = np.flatnonzero(mine).astype(np.uint32)
    blocks = wire.gather(pack_vector(nonzero, mine[nonzero], mine.size))
    total = np.zeros(n, np.float32)
    for rank, block in enumerate(blocks):
        add_vector(block, total[cuts[rank] : cuts[rank + 1]])
    return total


def reduce_block(wire: CountingComm, indices: Indices, values: Vector, cuts: Ints) -> Vector:
    """This rank's block of the sum, added in rank order."""
    at = np.searchsorted(indices, cuts)
    messages = [
        octets_of(indices[lo:hi] - np.uint32(first), values[lo:hi])
        for lo, hi, first in zip(at[:-1], at[1:], cuts[:-1], strict=True)
    ]
    mine = np.zeros(int(cuts[wire.rank + 1] - cuts[wire.rank]), np.float32)
    kernels().scatter_add([pairs_in(each, mine.size) for each in wire.alltoall(messages)], mine)
    return mine


# The k largest


LossyResult = tuple[Vector, tuple[Indices, Vector], SparsePlan | None]
"""The sum, the remainder of this rank, and the plan of Ok-Topk."""


def sum_by_ok_topk(
    wire: CountingComm, indices: Indices, values: Vector, n: int, k: int, plan: SparsePlan | None
) -> LossyResult:
    """Each rank sums one block; all ranks receive the k largest elements of all blocks."""
    cuts = balance_cuts(wire, indices, n) if plan is None else np.array(plan.cuts, np.int64)
    mine = reduce_block(wire, indices, values, cuts)
    nonzero = np.flatnonzero(mine).astype(np.uint32)
    magnitudes = np.abs(mine[nonzero])
    threshold = kth_largest(wire, magnitudes, k) if plan is None else plan.threshold
    keep = magnitudes >= threshold if plan is not None else select_k(wire, magnitudes, threshold, k)
    kept = nonzero[keep]
    blocks = [pairs_in(each, n) for each in wire.gather(octets_of(kept + np.uint32(cuts[wire.rank]), mine[kept]))]
    total = np.zeros(n, np.float32)
    kernels().scatter_add(blocks, total)
    back = ~np.isin(indices, np.concatenate([block[0] for block in blocks]))
    return total, (indices[back], values[back]), SparsePlan(tuple(int(each) for each in cuts), threshold)


def balance_cuts(wire: CountingComm, indices: Indices, n: int) -> Ints:
    """The mean over the ranks of the offsets that cut each rank's own indices into equal blocks."""
    mine = even_cuts(n, wire.size)
    if indices.size:
        mine[1:-1] = indices[np.arange(1, wire.size) * indices.size // wire.size]
    table = np.empty(wire.size * mine.size, np.int64)
    wire.Allgather(mine, table)
    return table.reshape(wire.size, mine.size).sum(axis=0) // wire.size


def kth_largest(wire: CountingComm, magnitudes: Vector, k: int) -> float:
    """The k-th largest magnitude of all ranks, 0 if there are fewer: a radix search with one allreduce a byte."""
    bits = magnitudes.view(np.uint32)
    prefix, left = 0, k
    for shift in (24, 16, 8, 0):
        candidates = bits[(bits.astype(np.uint64) >> np.uint64(shift + 8)) == prefix]
        counts = np.bincount((candidates >> np.uint32(shift)) & np.uint32(255), minlength=256).astype(np.int64)
        together = np.empty_like(counts)
        wire.Allreduce(counts, together)
        above = np.cumsum(together[::-1])
        if above[-1] < left:
            return 0.0
        larger = int(np.searchsorted(above, left))
        left -= int(above[larger - 1]) if larger else 0
        prefix = prefix << 8 | (255 - larger)
    return float(np.uint32(prefix).view(np.float32))


def select_k(wire: CountingComm, magnitudes: Vector, threshold: float, k: int) -> npt.NDArray[np.bool_]:
    """Which elements of this block are among the k largest; of those equal to the threshold, the first ones."""
    keep, equal = magnitudes > threshold, np.flatnonzero(magnitudes == threshold)
    table = np.empty(2 * wire.size, np.int64)
    wire.Allgather(np.array([np.count_nonzero(keep), equal.size], np.int64), table)
    above, ties = table.reshape(wire.size, 2).T
    room = k - int(above.sum()) - int(ties[: wire.rank].sum())
    keep[equal[: max(room, 0)]] = True
    return keep


def sum_by_gtopk(
    wire: CountingComm, indices: Indices, values: Vector, n: int, k: int, plan: SparsePlan | None
) -> LossyResult:
    """Sums of two ranks, pruned to k, up a binomial tree; rank 0 broadcasts the last."""
    rank, distance = wire.rank, 1
    held, lost = prune((indices, values), k)
    while distance < wire.size:
        if rank & distance:
            wire.post(octets_of(*held), rank - distance).Wait()
            break
        if rank + distance < wire.size:
            held, more = prune(merge_sparse(held, pairs_in(wire.fetch(rank + distance), n)), k)
            lost = merge_sparse(lost, more)
        distance *= 2
    length = np.array([8 * held[0].size], np.int64)
    wire.Bcast(length)
    result = octets_of(*held) if rank == 0 else np.empty(int(length[0]), np.uint8)
    wire.Bcast(result)
    final, sums = pairs_in(result, n)
    total = np.zeros(n, np.float32)
    total[final] = sums
    pruned, passed = ~np.isin(indices, final), np.isin(lost[0], final)
    return total, merge_sparse((indices[pruned], values[pruned]), (lost[0][passed], lost[1][passed])), None


def prune(pairs: tuple[Indices, Vector], k: int) -> tuple[tuple[Indices, Vector], tuple[Indices, Vector]]:
    """Divide a sparse vector into its k largest elements and the others."""
    indices, values = pairs
    keep = kernels().keep_largest(values, k)
    return (indices[keep], values[keep]), (indices[~keep], values[~keep])


EXACT_ALGORITHMS: dict[str, Callable[[CountingComm, Indices, Vector, int], Vector]] = {
    "allgather": sum_by_allgather,
    "recursive_doubling": sum_by_doubling,
    "split": sum_by_split,
    "dense": sum_by_allreduce,
}
LOSSY_ALGORITHMS: dict[str, Callable[[CountingComm, Indices, Vector, int, int, SparsePlan | None], LossyResult]] = {
    "ok_topk": sum_by_ok_topk,
    "gtopk": sum_by_gtopk,
}


def select_algorithm(n: int, count: int, k: int | None, place: Place) -> str:
    """The cheapest algorithm for ``count`` elements a rank: of the exact ones, or with ``k`` of those that keep k."""
    return cheapest(exact_phases(n, count, place) if k is None else lossy_phases(k, place), place)
