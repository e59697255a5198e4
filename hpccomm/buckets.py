"""Buckets: many tensors in one flat vector, so that one message carries all of them.

*n elements in all.*  The tensors follow one another in C order without padding; the bucket's table holds the offset of
each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.arrays import library_of, view_array
from hpccomm.errors import ArgumentError

Vector = npt.NDArray[Any]


class TensorEntry(NamedTuple):
    """The place of one tensor in the vector, and the flags for optimizers."""

    name: str
    offset: int
    length: int
    shape: tuple[int, ...]
    decay: bool
    """Weight decay applies."""
    adapt: bool
    """The trust ratio (LARS, LAMB) applies."""


class Bucket:
    """The layout of named tensors in one vector.

    ``tensors`` maps names to arrays (then all of one dtype) or to shapes (then of ``dtype``).  ``exempt``
    names the tensors without weight decay and trust ratio; by default these are the tensors of fewer
    than two dimensions (biases, scales of normalisations).  For other combinations replace rows of
    ``table``.
    """

    def __init__(
        self, tensors: Mapping[str, Any], dtype: npt.DTypeLike | None = None, exempt: Collection[str] | None = None
    ) -> None:
        shapes = {name: shape_of(each) for name, each in tensors.items()}
        unknown = sorted(set(exempt or ()) - set(shapes))
        if unknown:
            raise ArgumentError(f"Bucket: exempt names {', '.join(unknown)}, which are not in the bucket")
        self.dtype = np.dtype(dtype) if dtype is not None else common_dtype(tensors)
        self.table = tuple(table_entries(shapes, exempt))
        self.size = sum(entry.length for entry in self.table)

    def flatten(self, tensors: Mapping[str, Any], out: Vector | None = None) -> Vector:
        """All tensors, of the host or of one device, as one vector of shape ``(size,)``: ``out``, or a new one."""
        self._check_names(tensors)
        arrays = [self._check_tensor(entry, tensors[entry.name]) for entry in self.table]
        if len({isinstance(each, np.ndarray) for each in arrays}) > 1:
            raise ArgumentError("Bucket.flatten: some tensors lie on the host, others on a device: move them together")
        if out is None:
            library = library_of(arrays[0]) if arrays else np
            out = library.empty(self.size, self.dtype)
        else:
            self._check_vector(out, "flatten")
        for entry, array in zip(self.table, arrays, strict=True):
            tensor_view(out, entry)[...] = array
        return out

    def views(self, vector: Vector) -> dict[str, npt.NDArray[Any]]:
        """Each tensor as a view of ``vector``: they share memory."""
        self._check_vector(vector, "views")
        return {entry.name: tensor_view(vector, entry) for entry in self.table}

    def mask(self, flag: str | Callable[[TensorEntry], bool]) -> npt.NDArray[np.bool_]:
        """A mask of the elements whose tensor has the flag ``"decay"`` or ``"adapt"``, or for which a function holds.

        ``bucket.mask(lambda entry: len(entry.shape) > 1 and "norm" not in entry.name)``.
        """
        flags = [flag(entry) if callable(flag) else getattr(entry, flag) for entry in self.table]
        return np.repeat(np.array(flags, bool), [entry.length for entry in self.table])

    def _check_names(self, tensors: Mapping[str, Any]) -> None:
        wanted = {entry.name for entry in self.table}
        if tensors.keys() != wanted:
            missing, extra = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
            raise ArgumentError(
                f"Bucket.flatten: missing {missing}, not in the bucket {extra}: pass every tensor, once"
            )

    def _check_tensor(self, entry: TensorEntry, tensor: Any) -> npt.NDArray[Any]:
        array, _ = view_array(tensor, f"Bucket.flatten: {entry.name}")
        if array.shape != entry.shape:
            raise ArgumentError(f"Bucket.flatten: {entry.name} has shape {array.shape}, its place is {entry.shape}")
        if array.dtype != self.dtype:
            raise ArgumentError(
                f"Bucket.flatten: {entry.name} is {array.dtype}, the bucket {self.dtype}: "
                "cast it, or make one bucket for each dtype"
            )
        return array

    def _check_vector(self, vector: Vector, who: str) -> Vector:
        if vector.shape != (self.size,) or vector.dtype != self.dtype or not vector.flags.c_contiguous:
            raise ArgumentError(
                f"Bucket.{who}: the vector is {vector.dtype} of shape {vector.shape}: "
                f"pass a contiguous one, {self.dtype} of shape ({self.size},)"
            )
        return vector


def table_entries(shapes: Mapping[str, tuple[int, ...]], exempt: Collection[str] | None) -> Iterator[TensorEntry]:
    """The rows of the table."""
    offset = 0
    for name, shape in shapes.items():
        flag = len(shape) > 1 if exempt is None else name not in exempt
        yield TensorEntry(name, offset, prod(shape), shape, decay=flag, adapt=flag)
        offset += prod(shape)


def tensor_view(vector: Vector, entry: TensorEntry) -> npt.NDArray[Any]:
    """One tensor as a view of the vector."""
    return vector[entry.offset : entry.offset + entry.length].reshape(entry.shape)


def shape_of(given: Any) -> tuple[int, ...]:
    """The shape of an array, or the shape itself."""
    if isinstance(given, Mapping):
        raise ArgumentError(
            "Bucket: a dict in a dict: pass one dict by full names, "
            "dict(hpccomm.algorithms.trees.tree_leaves(weights)) makes it"
        )
    try:
        return tuple(int(each) for each in getattr(given, "shape", given))
    except (TypeError, ValueError):
        raise ArgumentError(f"Bucket: {given!r} is neither an array nor a shape: pass np.asarray(x)") from None


def common_dtype(tensors: Mapping[str, Any]) -> np.dtype[Any]:
    """The common dtype of all arrays; float32 where only shapes are given."""
    dtypes = {
        name: view_array(each, f"Bucket: {name}")[0].dtype for name, each in tensors.items() if hasattr(each, "shape")
    }
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in examples_by_dtype(dtypes).items())
        raise ArgumentError(f"Bucket: mixed dtypes ({listed}): cast them, or make one bucket for each dtype")
    return next(iter(dtypes.values()), np.dtype(np.float32))


def examples_by_dtype(dtypes: Mapping[str, np.dtype[Any]]) -> dict[str, np.dtype[Any]]:
    """One name for each dtype."""
    return {name: dtype for dtype, name in {dtype: name for name, dtype in dtypes.items()}.items()}


def memory_of(array: npt.NDArray[Any]) -> tuple[Any, ...] | None:
    """What two arrays have in common only if they are the same tensor (tied weights); None without elements."""
    if not array.size:
        return None
    interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    return interface["data"][0], array.shape, array.strides, array.dtype


BUCKET_BYTES = 25 << 20
"""The default limit of a bucket, as in PyTorch's DDP: large enough for the link's rate, small enough to overlap."""


def group_by_size(sizes: Iterable[tuple[str, Any, int]], limit: int) -> list[list[str]]:
    """Names in groups of one kind each, whose bytes add up to at most ``limit``; a larger one has a group of its own.

    ``sizes`` holds name, kind and bytes in the order in which the names become ready; the groups are in the order in
    which they become complete.

    >>> group_by_size([("d", "f4", 4), ("c", "f8", 8), ("b", "f4", 4), ("a", "f4", 4)], 8)
    [['c'], ['d', 'b'], ['a']]
    """
    filled: dict[Any, tuple[list[str], int]] = {}
    """The group of each kind that is being filled, and its bytes."""
    groups: list[list[str]] = []
    place: dict[str, int] = {}
    for name, kind, nbytes in sizes:
        place[name] = len(place)
        names, total = filled.get(kind, ([], 0))
        if not names or total + nbytes > limit:
            names, total = [], 0
            groups.append(names)
        names.append(name)
        filled[kind] = names, total + nbytes
    return sorted(groups, key=lambda names: place[names[-1]])
