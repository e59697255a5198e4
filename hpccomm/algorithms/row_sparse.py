"""Gradients of embeddings: most of their rows are zero, and only the others travel.

*A tensor of m rows of w elements, of which a rank's gradient has k that are not zero.*  A rank sends 4 + wb bytes for
each of them (:mod:`hpccomm.collectives.compressed.rows`) instead of the whole tensor; nothing is lost.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms import exchange as dense
from hpccomm.algorithms.agreement import as_communicator
from hpccomm.algorithms.reports import ExchangeReport, MessageReport
from hpccomm.algorithms.transforms import Transform, Vector, check_choice, require
from hpccomm.buckets import Bucket
from hpccomm.collectives.compressed.rows import PATHS, allreduce_rows
from hpccomm.kernels.dispatch import kernels
from hpccomm.performance.units import format_count

if TYPE_CHECKING:
    from mpi4py import MPI

Octets = npt.NDArray[np.uint8]


class Region(NamedTuple):
    """Whole rows of one tensor inside a vector."""

    first: int
    rows: int
    width: int

    @property
    def part(self) -> slice:
        """The elements."""
        return slice(self.first, self.first + self.rows * self.width)

    def find_rows(self, vector: Vector) -> tuple[npt.NDArray[np.int64], Vector]:
        """The rows that are not zero, and all rows, (m, w)."""
        matrix = vector[self.part].reshape(self.rows, self.width)
        return np.flatnonzero((matrix != 0).any(axis=1)), matrix


def find_regions(bucket: Bucket, tensors: Collection[str], lo: int = 0, hi: int | None = None) -> list[Region]:
    """The named tensors' whole rows inside elements [lo, hi) of the bucket's vector, counted from lo."""
    require(not isinstance(tensors, str), f"rows: the tensors are the text {tensors!r}: pass a list of names")
    named = isinstance(tensors, Collection) and all(isinstance(each, str) for each in tensors)
    require(named, f"rows: the tensors are {tensors!r}: pass a list of names")
    names = [entry.name for entry in bucket.table]
    unknown = sorted(set(tensors) - set(names))
    require(not unknown, f"rows: no tensor is called {', '.join(unknown)}: pass names of {', '.join(names)}")
    found, hi = [], bucket.size if hi is None else hi
    for entry in bucket.table:
        if entry.name not in tensors or not entry.length:
            continue
        require(bool(entry.shape), f"rows: {entry.name} is a number: pass tensors with rows")
        width = entry.length // entry.shape[0]
        first = max(0, -(-(lo - entry.offset) // width))
        last = min(entry.shape[0], (hi - entry.offset) // width)
        if last > first:
            found.append(Region(entry.offset + first * width - lo, last - first, width))
    return found


def slices_between(regions: list[Region], size: int) -> list[slice]:
    """The elements outside all regions."""
    ends = [0, *(end for region in regions for end in (region.part.start, region.part.stop)), size]
    return [slice(a, b) for a, b in list(pairwise(ends))[::2] if b > a]


class RowMeanState(NamedTuple):
    """The mean of the other tensors, and what the rows have cost."""

    others: dense.MeanState
    report: ExchangeReport
    rows: int
    """Rows that this rank named in its last step."""

    def messages(self) -> MessageReport:
        """The rows of the last step; the other tensors travel densely."""
        return self.others.messages().add(
            MessageReport(elements=self.rows, path="rows" if self.report.exchanges else "")
        )


def mean_rows(comm: MPI.Intracomm, bucket: Bucket, tensors: Collection[str], *, exchange: str = "auto") -> Transform:
    """The mean of the gradients of all ranks, as :func:`~hpccomm.mean`; of some tensors only rows travel.

    ``tensors`` of the ``bucket`` are sent as their rows that are not zero, by ``exchange`` of
    :func:`~hpccomm.allreduce_rows`, which falls back to a dense allreduce where that is cheaper.  The sum is exact, up
    to the order of additions.

    >>> from mpi4py import MPI
    >>> from hpccomm import Bucket
    >>> bucket = Bucket({"embedding": (1000, 64), "w": (64, 2)})
    >>> method, weights = mean_rows(MPI.COMM_SELF, bucket, ["embedding"]), np.zeros(bucket.size, "f4")
    >>> step, state = method.update(np.ones(bucket.size, "f4"), method.init(weights), weights)
    >>> bool((step == 1).all())
    True
    """
    comm = as_communicator("mean_rows", comm)
    check_choice("mean_rows: exchange", exchange, PATHS)
    regions = find_regions(bucket, tensors)
    others = slices_between(regions, bucket.size)
    mean_of_others = dense.mean(comm)

    def pack(vector: Vector) -> Vector:
        return np.concatenate([vector[:0], *(vector[part] for part in others)])

    def init(weights: Vector) -> RowMeanState:
        check_size(weights)
        return RowMeanState(mean_of_others.init(pack(weights)), ExchangeReport(), 0)

    def update(gradient: Vector, state: RowMeanState, weights: Vector) -> tuple[Vector, RowMeanState]:
        check_size(weights)
        if comm.size == 1:
            return gradient, state
        total = np.zeros_like(gradient)
        packed = pack(gradient)
        average, after = mean_of_others.update(packed, state.others, packed)
        first = 0
        for part in others:
            total[part] = average[first : (first := first + part.stop - part.start)]
        report, named = state.report, 0
        for region in regions:
            began = time.perf_counter()
            rows, matrix = region.find_rows(gradient)
            found = allreduce_rows(comm, rows, matrix[rows], region.rows, reduce="mean", exchange=exchange)
            total[region.part].reshape(matrix.shape)[found.rows] = found.values
            named += rows.size
            report = report.add(ExchangeReport(1, time.perf_counter() - began, found.bytes_sent))
        return total, RowMeanState(after, report, named)

    def check_size(weights: Vector) -> None:
        require(
            weights.shape == (bucket.size,),
            f"mean_rows: the weights have shape {weights.shape}, the bucket {bucket.size} elements: make them alike",
        )

    return Transform(init, update, bucket, comm=comm, needs_whole="mean_rows")


class RowCode:
    """Elements [lo, hi) of a bucket's vector as bytes, of some tensors only the rows that are not zero.

    The number of rows of each region, −1 where all of them travel because that is shorter; their indices; their values;
    and all other elements.
    """

    def __init__(self, bucket: Bucket, tensors: Collection[str], part: slice) -> None:
        self.size = part.stop - part.start
        self.regions = find_regions(bucket, tensors, part.start, part.stop)
        self.others = slices_between(self.regions, self.size)

    def encode(self, vector: Vector) -> Octets:
        """The message."""
        counts, indices, values = [], [], []
        for region in self.regions:
            rows, matrix = region.find_rows(vector)
            sparse = rows.size * (4 + region.width * vector.itemsize) < matrix.nbytes
            counts.append(rows.size if sparse else -1)
            indices.append((rows if sparse else rows[:0]).astype(np.uint32))
            values.append((matrix[rows] if sparse else matrix).reshape(-1))
        parts = [np.array(counts, np.int64), *indices, *values, *(vector[part] for part in self.others)]
        return np.concatenate([np.empty(0, np.uint8), *(np.ascontiguousarray(each).view(np.uint8) for each in parts)])

    def decode(self, message: Octets, dtype: np.dtype[Any]) -> Vector:
        """The vector; raises :class:`~hpccomm.errors.ArgumentError` for a message of other rows, or a damaged one."""
        out, first = np.zeros(self.size, dtype), 0

        def take(count: int, kind: npt.DTypeLike) -> Vector:
            nonlocal first
            first, began = first + count * np.dtype(kind).itemsize, first
            check(first <= message.size, "is too short")
            return message[began:first].copy().view(kind)

        def check(holds: bool, what: str) -> None:
            require(
                holds,
                f"a message of {message.size} bytes {what} for the rows of {format_count(len(self.regions), 'tensor')} "
                f"in {self.size} elements of {dtype}: pass the same bucket and rows on all ranks",
            )

        counts = take(len(self.regions), np.int64).tolist()
        for region, count in zip(self.regions, counts, strict=True):
            check(-1 <= count <= region.rows, f"has {count} rows of {region.rows}")
        indices = [take(max(count, 0), np.uint32) for count in counts]
        for region, count, rows in zip(self.regions, counts, indices, strict=True):
            check(kernels().is_ascending(rows, region.rows), f"has rows out of order, or not below {region.rows},")
            k = region.rows if count < 0 else count
            matrix = out[region.part].reshape(region.rows, region.width)
            matrix[rows if count >= 0 else slice(None)] = take(k * region.width, dtype).reshape(k, region.width)
        for part in self.others:
            out[part] = take(part.stop - part.start, dtype)
        check(first == message.size, "is too long")
        return out
