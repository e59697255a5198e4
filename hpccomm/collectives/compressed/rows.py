"""The sum of row-sparse matrices, such as the gradients of embeddings: one index and w values for each row.

*p ranks; matrices of m rows of w elements of b bytes, of which a rank names k rows.*

=============  =====================================================================  =================================
path           what happens                                                           bytes that a rank sends
=============  =====================================================================  =================================
``allgather``  all ranks receive all rows, and add them in rank order                 k(4 + wb)(p-1)
``node``       the same inside each node, then the nodes' sums between first ranks    of a node: its rows to each node
``dense``      an allreduce of the whole matrix                                       2mwb(p-1)/p
=============  =====================================================================  =================================

``auto`` adds inside nodes of several ranks, and takes ``dense`` where its price between the nodes is lower
(:mod:`~hpccomm.collectives.compressed.prices`).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.arrays import narrow, reduction_dtype
from hpccomm.collectives.compressed.messages import (
    BAD_ROWS,
    NOT_FLAT,
    OK,
    UNKNOWN,
    Comm,
    CountingComm,
    Ints,
    check_arguments,
    number_of,
)
from hpccomm.collectives.compressed.prices import BETWEEN_NODES, exact_phases, place_of, price_phases
from hpccomm.kernels.vectors.reference import Octets

Matrix = npt.NDArray[Any]
PATHS = ("auto", "allgather", "node", "dense")
INDEX = np.dtype(np.uint32)


class Rows(NamedTuple):
    """Some rows of a matrix, ascending, each once."""

    rows: npt.NDArray[np.uint32]
    values: Matrix
    """(k, w)."""


class RowSum(NamedTuple):
    """The result of :func:`allreduce_rows`, the same bits on all ranks."""

    rows: npt.NDArray[np.uint32]
    """Those that any rank has named, ascending; all of them where the exchange was dense."""
    values: Matrix
    """(k, w), the sum in these rows."""
    path: str
    bytes_sent: int
    """By this rank."""


def allreduce_rows(
    comm: Comm,
    rows: Any,
    values: Matrix,
    count: int,
    *,
    reduce: Literal["sum", "mean"] = "sum",
    exchange: str = "auto",
) -> RowSum:
    """The sum, or mean, of the ranks' row-sparse matrices of ``count`` rows (collective).

    ``rows``: (k,) whole numbers from 0 to below ``count``, in any order; rows that come twice are added; k differs
    between ranks and may be 0.  ``values``: (k, w) of a floating-point dtype; 16-bit floats are added in float32 and
    rounded once.  NaN and infinity travel.  ``exchange``: a path of the table above, or ``"auto"``.

    Raises :class:`~hpccomm.errors.ArgumentError` on every rank, before data moves, where a rank passes other arrays, or
    where ``count``, w, the dtype, ``reduce`` or ``exchange`` differ.

    >>> from mpi4py import MPI
    >>> found = allreduce_rows(MPI.COMM_SELF, [4, 1, 4], np.float32([[1, 2], [3, 4], [5, 6]]), 9)
    >>> found.rows.tolist(), found.values.tolist()
    ([1, 4], [[3.0, 4.0], [6.0, 8.0]])
    """
    wire, index, values = CountingComm(comm), np.asarray(rows), np.asarray(values)
    common = {
        "count": int(count) if is_count(count) else -1,
        "number of columns": values.shape[1] if values.ndim == 2 else -1,
        "dtype": number_of(str(values.dtype)),
        "exchange": number_of(exchange),
        "reduce": number_of(reduce),
    }
    problem = find_problem(comm, index, values, count, reduce, exchange)
    counts = check_arguments(wire, "allreduce_rows", problem, index.size, **common)
    path = choose(comm, counts, count, values) if exchange == "auto" else exchange
    total = add_rows([Rows(index, values)], reduction_dtype(values.dtype))
    if path == "dense":
        whole, added = (np.zeros((count, values.shape[1]), total.values.dtype) for _ in range(2))
        whole[total.rows] = total.values
        wire.Allreduce(whole, added)
        total = Rows(np.arange(count, dtype=INDEX), added)
    elif path == "node":
        total = add_between_nodes(wire, comm, total, values.dtype)
    else:
        total = gather_rows(wire, total, values.dtype)
    if reduce == "mean":
        total.values[...] /= total.values.dtype.type(comm.size)
    return RowSum(total.rows, narrow(total.values, values.dtype), path, wire.bytes_sent)


def find_problem(comm: Any, rows: Matrix, values: Matrix, count: int, reduce: str, exchange: str) -> int:
    """The problem of the arguments, as an index of ``PROBLEMS``."""
    if (
        reduce not in ("sum", "mean")
        or exchange not in PATHS
        or (exchange == "node" and not hasattr(comm, "intra_node"))
    ):
        return UNKNOWN
    floats = values.dtype.kind == "f" or reduction_dtype(values.dtype) == np.float32
    if rows.ndim != 1 or values.ndim != 2 or len(rows) != len(values) or not floats:
        return NOT_FLAT
    whole = rows.dtype.kind in "iu" or not rows.size
    fits = is_count(count) and whole and (not rows.size or (rows.min() >= 0 and rows.max() < count))
    return OK if fits else BAD_ROWS


def is_count(count: Any) -> bool:
    """Whether this is a number of rows whose indices fit."""
    return isinstance(count, int | np.integer) and bool(0 <= count <= 1 << 32)


def choose(comm: Any, counts: Ints, count: int, values: Matrix) -> str:
    """The cheaper of messages and an allreduce, by the rows of each rank; the same on all ranks."""
    place, path, longest = place_of(comm), "allgather", int(counts.max())
    if 1 < place.nodes < comm.size:
        path, place = "node", place.level(BETWEEN_NODES)
        longest = min(count, int(np.bincount(comm.layout.nodes, counts).max()))
    phases = exact_phases(count, longest, place, values.shape[1] * values.itemsize, INDEX.itemsize)
    return "dense" if price_phases(phases["dense"], place) < price_phases(phases["allgather"], place) else path


def add_rows(parts: list[Rows], dtype: np.dtype[Any]) -> Rows:
    """The sum of row-sparse matrices in their order, in another dtype; rows that come twice are added."""
    named = [part.rows.astype(INDEX, copy=False) for part in parts]
    rows, place = np.unique(np.concatenate(named), return_inverse=True)
    total, first = np.zeros((rows.size, parts[0].values.shape[1]), dtype), 0
    for part in parts:
        np.add.at(total, place[first : first + len(part.rows)], part.values.astype(dtype, copy=False))
        first += len(part.rows)
    return Rows(rows, total)


def gather_rows(wire: CountingComm, mine: Rows, dtype: np.dtype[Any]) -> Rows:
    """The sum in rank order, from messages in ``dtype``."""
    width = mine.values.shape[1]
    octets = np.concatenate([mine.rows.view(np.uint8), octets_of(narrow(mine.values, dtype))])
    found = [unpack(each, width, dtype) for each in wire.gather(octets)]
    return add_rows(found, mine.values.dtype)


def octets_of(values: Matrix) -> Octets:
    """The bytes of an array."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def unpack(octets: Octets, width: int, dtype: np.dtype[Any]) -> Rows:
    """The rows in a message."""
    k = octets.size // (INDEX.itemsize + width * dtype.itemsize)
    first = k * INDEX.itemsize
    return Rows(octets[:first].view(INDEX), octets[first:].copy().view(dtype).reshape(k, width))


def add_between_nodes(wire: CountingComm, comm: Any, mine: Rows, dtype: np.dtype[Any]) -> Rows:
    """The sums of the nodes, exchanged by the first rank of each; every rank of a node then receives the total."""
    node, leaders = CountingComm(comm.intra_node), CountingComm(comm.inter_node)  # on all ranks: they may be made now
    total = gather_rows(node, mine, dtype)
    message = np.empty(0, np.uint8)
    if node.rank == 0:
        total = gather_rows(leaders, total, total.values.dtype)
        message = np.concatenate([total.rows.view(np.uint8), octets_of(total.values)])
        wire.bytes_sent += leaders.bytes_sent
    length = np.array([message.size], np.int64)
    node.Bcast(length)
    message = message if node.rank == 0 else np.empty(int(length[0]), np.uint8)
    node.Bcast(message)
    wire.bytes_sent += node.bytes_sent
    return unpack(message, mine.values.shape[1], mine.values.dtype)
