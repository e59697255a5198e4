"""Checkpoints: the leaves of a state by path, saved to a file and restored bit for bit.

*A state is nested tuples of arrays and numbers; a path names a leaf: ``outer.1.velocity``.*  Dicts and lists of arrays,
also PyTorch's and JAX's, are saved and restored likewise, by their names.  Every rank has a state of
its own (residuals, local moments, the position in a block), so every rank writes a file of its own; the files of all
ranks are a set, see :mod:`hpccomm.algorithms.checkpoint_sets`.  A run restored from a checkpoint takes the same steps,
bit for bit, as one that was never interrupted.

A file is an archive as of ``numpy.savez``, with a label in JSON: the version of the format, the types that NumPy's
files cannot name, and the set to which the file belongs.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.states import RankChange, leaves, leaves_with_changes, map_declared
from hpccomm.arrays import borrow, is_on_device, to_device_like, to_host
from hpccomm.errors import ArgumentError
from hpccomm.files import remove_parts, replace_file
from hpccomm.performance.units import format_count

Array = npt.NDArray[Any]

FORMAT = 2
"""Files of format 1 have no label."""
LABEL = "hpccomm.json"
CHUNK = 1 << 20
NUMBERS = (bool, int, float)
READABLE = (np.ndarray, np.generic, *NUMBERS)
READER = threading.Lock()
"""NumPy parses the header of each array as Python source, and two threads that parse at once raise SystemError (AST
constructor recursion depth mismatch, CPython 3.11.7)."""


def state_dict(state: Any) -> dict[str, Any]:
    """Copies of all arrays, and the numbers, by their paths.  Raises for a state that holds anything else."""
    return {path: leaf.copy() if isinstance(leaf, np.ndarray) else leaf for path, leaf in read_leaves(state)}


def read_leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a state by path, below a name, arrays as NumPy's; raises for what is neither array nor number."""
    for path, leaf in leaves(state):
        where = f"{name}.{path}" if name and path else name or path
        yield where, read_leaf(leaf, where)


def read_leaf(leaf: Any, path: str) -> Any:
    """A number, or an array of any library as NumPy's; raises for anything else."""
    found = leaf if isinstance(leaf, READABLE) else None
    if found is None and hasattr(leaf, "shape"):
        found = to_host(leaf) if is_on_device(leaf) else borrow(leaf, path)[0]
    if found is None or np.asarray(found).dtype.hasobject:
        what = f"of objects, {leaf.dtype}" if isinstance(leaf, np.ndarray) else type(leaf).__name__
        raise ArgumentError(
            f"{path or 'the state'} is {leaf if isinstance(leaf, int) else what}: pass arrays and numbers of at most "
            "64 bits, alone or in tuples, lists and dicts"
        )
    return found


def load_state_dict(like: Any, saved: dict[str, Any], other_ranks: bool = False) -> Any:
    """The saved values in the form of ``like``, which is what ``init(weights)`` returns; ``like`` is not written.

    ``other_ranks``: another number of ranks has saved; their shards have other lengths, and :func:`~hpccomm.for_ranks`
    divides them anew.  Raises where paths, shapes or dtypes differ: another method, model or number of ranks wrote
    them.
    """
    compare_paths(paths_by_need(like), saved)
    if not other_ranks:
        check_ranks((path, leaf, saved[path]) for path, leaf in group_sizes(like) if path in saved)

    def restore(path: str, leaf: Any, change: RankChange | None) -> Any:
        if change is RankChange.GROUP and path not in saved:
            return leaf
        found = restore_leaf(path, leaf, saved[path], change, other_ranks)
        return found.copy() if isinstance(found, np.ndarray) else found

    return map_declared(restore, like)


def paths_by_need(state: Any) -> dict[str, bool]:
    """The paths of a state, and whether every file has them; some states of older files do not count the ranks."""
    return {path: change is not RankChange.GROUP for path, _, change in leaves_with_changes(state)}


def group_sizes(state: Any) -> Iterator[tuple[str, int]]:
    """The numbers of ranks that exchange, by path."""
    return ((path, leaf) for path, leaf, change in leaves_with_changes(state) if change is RankChange.GROUP)


def check_ranks(rows: Iterable[tuple[str, int, Any]]) -> None:
    """Raise where a state is one of another number of ranks; a row is the path, the number here, and the saved one."""
    for path, here, saved in rows:
        if np.ndim(saved) == 0 and np.asarray(saved).dtype.kind in "iu" and int(saved) != here:
            raise ArgumentError(
                f"load_state_dict: saved by one of {format_count(int(saved), 'rank')}, this method exchanges between "
                f"{format_count(here, 'rank')} ({path}): save with save_set and load with load_set, or load the files "
                "of all ranks with other_ranks=True and pass the states to for_ranks"
            )


def compare_paths(wanted: Mapping[str, bool], found: Iterable[str]) -> None:
    """Raise where a checkpoint holds other paths than the state."""
    found = set(found)
    missing, extra = {path for path, needed in wanted.items() if needed and path not in found}, found - wanted.keys()
    if missing or extra:
        parts = [f"it lacks {list_some(missing)}"] * bool(missing) + [f"it also holds {list_some(extra)}"] * bool(extra)
        raise ArgumentError(
            f"load_state_dict: {', '.join(parts)}: pass every state that was saved, under its name, of the method that "
            "saved"
        )


def list_some(names: set[str]) -> str:
    """The first names, and how many others there are."""
    first = sorted(names)[:8]
    return f"{first}{f' and {len(names) - len(first):,} more' if len(names) > len(first) else ''}"


def restore_leaf(path: str, like: Any, value: Any, change: RankChange | None, other_ranks: bool) -> Any:
    """One leaf: an array of the same shape and dtype, or a number."""
    if read_leaf(like, path) is not like:
        found = restore_leaf(path, read_leaf(like, path), value, change, other_ranks)
        return to_device_like(found, like) if is_on_device(like) else borrow(like)[1](found.copy())
    array = np.asarray(value)
    if change is RankChange.SCRATCH and (array.shape, array.dtype) != (like.shape, like.dtype):
        return like.copy()
    if not isinstance(like, np.ndarray):
        number = array.item() if array.ndim == 0 and isinstance(like, NUMBERS) else array[()]
        if array.ndim or (isinstance(like, NUMBERS) and not isinstance(number, NUMBERS)):
            raise ArgumentError(
                f"load_state_dict: {path} was saved as {array.dtype} of shape {array.shape}, this method has a number: "
                "load into the method that saved"
            )
        return number
    if is_raw(array.dtype) and is_custom(like.dtype) and array.dtype.itemsize == like.dtype.itemsize:
        array = array.view(like.dtype)  # bfloat16 in a file of format 1
    resized = other_ranks and change is RankChange.SHARDED
    same = array.ndim == like.ndim if resized else array.shape == like.shape
    if not same or array.dtype != like.dtype:
        raise ArgumentError(
            f"load_state_dict: {path} was saved as {array.dtype} of shape {array.shape}, this method has {like.dtype} "
            f"of shape {like.shape}: use the model, the dtype and the number of ranks of the run that saved"
        )
    return array


def is_raw(dtype: np.dtype[Any]) -> bool:
    """Whether elements are bytes without a meaning."""
    return dtype.type is np.void and dtype.names is None


def is_custom(dtype: np.dtype[Any]) -> bool:
    """Whether NumPy's files cannot name this dtype, such as bfloat16."""
    return dtype.kind == "V" and dtype.type is not np.void


def save(path: str | os.PathLike[str], /, **states: Any) -> None:
    """Write states by name, ``save(f"step{n}.rank{comm.rank}.npz", weights=weights, method=state)``.

    The file is written under another name in the same folder, flushed to the disk and then renamed, so a reader finds
    the old file or the new one, never a partial one.
    """
    remove_parts(Path(path).parent)
    write_file(Path(path), states)


def write_file(target: Path, states: dict[str, Any], **label: Any) -> int:
    """Write states and a label; returns the bytes of the file."""
    if "other_ranks" in states:
        raise ArgumentError("save: a state is called 'other_ranks', which is an argument of load: rename the state")
    found = [(path, np.asarray(leaf)) for name, state in states.items() for path, leaf in read_leaves(state, name)]
    twice = {name for name, _ in found}
    if len(twice) < len(found):
        raise ArgumentError(f"save: two states have leaves of one name among {list_some(twice)}: rename a state")
    dtypes = {name: array.dtype.name for name, array in found if is_custom(array.dtype)}
    with replace_file(target) as file:
        write_arrays(file, found, json.dumps({"format": FORMAT, "dtypes": dtypes, **label}))
        return file.seek(0, os.SEEK_END)


def write_arrays(file: BinaryIO, arrays: Iterable[tuple[str, Array]], label: str = "") -> None:
    """Write an archive of arrays by name, for ``numpy.load``, one after the other."""
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        if label:
            archive.writestr(LABEL, label)
        for name, array in arrays:
            raw = array.view(f"V{array.itemsize}") if is_custom(array.dtype) else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, raw, allow_pickle=False)


def load(path: str | os.PathLike[str], /, *, other_ranks: bool = False, **like: Any) -> tuple[Any, ...]:
    """What :func:`save` wrote, in the form of ``like``: ``weights, state = load(p, weights=weights, method=state)``.

    The state of a run with another number of ranks is refused, but for ``other_ranks``, see :func:`load_state_dict`.
    Raises where the file is damaged or no checkpoint, or holds other names, shapes or dtypes.  Nothing in the file is
    executed, and no more memory is taken than the file has bytes.
    """
    with CheckpointFile(path) as file:
        return file.restore(like, other_ranks)


class CheckpointFile:
    """A file that :func:`save` wrote, open for reading.  Every length in it is checked before memory is taken."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.file = self.path.open("rb")
        try:
            with self.refuse_damage():
                self.archive, self.nbytes = zipfile.ZipFile(self.file), os.fstat(self.file.fileno()).st_size
                self.names, self.label = self.check_members(), self.read_label()
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    @contextmanager
    def refuse_damage(self) -> Iterator[None]:
        """Name the file in an error; the readers of archives and arrays raise a dozen kinds for what is damaged."""
        try:
            yield
        except Exception as error:
            raise ArgumentError(
                f"load: {self.path} is no checkpoint, or is damaged ({error or type(error).__name__}): name a whole "
                "file that save wrote"
            ) from None

    def check_members(self) -> list[str]:
        """The names of the arrays; raises for an archive that is none of ours."""
        members = self.archive.infolist()
        names = [each.filename for each in members]
        if sum(each.file_size for each in members) > self.nbytes or len(set(names)) < len(names):
            raise ValueError("its parts are longer than the file, or have one name")
        if any(each.compress_type != zipfile.ZIP_STORED for each in members):
            raise ValueError("it is compressed")
        arrays = [name for name in names if name != LABEL]
        if not all(name.endswith(".npy") for name in arrays):
            raise ValueError("it holds more than arrays")
        return [name.removesuffix(".npy") for name in arrays]

    def read_label(self) -> dict[str, Any]:
        """The label, empty in a file of format 1."""
        label = json.loads(self.archive.read(LABEL)) if LABEL in self.archive.namelist() else {"format": 1}
        if not isinstance(label["format"], int) or label["format"] > FORMAT:
            raise ValueError(f"its format is {label['format']}, this version of hpccomm reads formats 1 to {FORMAT}")
        return dict(label)

    def read(self, name: str) -> Array:
        """One array."""
        with self.refuse_damage(), self.archive.open(f"{name}.npy") as stream:
            shape, fortran, dtype = read_header(stream)
            nbytes = self.archive.getinfo(f"{name}.npy").file_size - stream.tell()
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != nbytes:
                raise ValueError(f"{name} has {nbytes} bytes for {dtype} of shape {shape}")
            array = np.empty(shape, dtype, "F" if fortran else "C")
            fill(array, stream)
            named = self.label.get("dtypes", {}).get(name)
            return array.view(find_dtype(named)) if named else array

    def restore(self, like: dict[str, Any], other_ranks: bool = False) -> tuple[Any, ...]:
        """The states in the form of ``like``, see :func:`load_state_dict`."""
        names, states = list(like), tuple(like.values())

        def restore(path: str, leaf: Any, change: RankChange | None) -> Any:
            name = entry_name(path, names)
            if change is RankChange.GROUP and name not in self.names:
                return leaf
            return restore_leaf(name, leaf, self.read(name), change, other_ranks)

        try:
            compare_paths({entry_name(path, names): each for path, each in paths_by_need(states).items()}, self.names)
            if not other_ranks:
                sizes = [(entry_name(path, names), size) for path, size in group_sizes(states)]
                check_ranks((name, size, self.read(name)) for name, size in sizes if name in self.names)
            found: tuple[Any, ...] = map_declared(restore, states)
        except ArgumentError as error:
            raise ArgumentError(str(error).replace("load_state_dict:", f"load: {self.path}:", 1)) from None
        return found


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, order and dtype of the array that follows."""
    formats = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with READER:
        return formats[np.lib.format.read_magic(stream)](stream)


def fill(array: Array, stream: Any) -> None:
    """Read all elements; raises where the stream is shorter or longer, or its checksum differs."""
    octets = array.reshape(-1, order="A").view(np.uint8).data if array.nbytes else memoryview(b"")
    for start in range(0, array.nbytes, CHUNK):
        block = stream.read(min(CHUNK, array.nbytes - start))
        octets[start : start + CHUNK] = block  # raises for a block that is cut short
    if stream.read(1):
        raise ValueError("an array is followed by other bytes")


def find_dtype(name: str) -> np.dtype[Any]:
    """A dtype by name, also one of ``ml_dtypes``."""
    with suppress(ImportError):
        import ml_dtypes  # noqa: F401 (registers its names)
    return np.dtype(name)


def entry_name(path: str, names: list[str]) -> str:
    """A leaf's path with the name of its state in place of its number."""
    first, dot, rest = path.partition(".")
    return f"{names[int(first)]}{dot}{rest}"
