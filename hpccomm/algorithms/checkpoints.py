"""Checkpoints: the leaves of a state by path, saved to a file and restored bit for bit.

*A state is nested tuples of arrays and numbers; a path names a leaf: ``outer.1.velocity``.*  Every rank has a state of
its own (residuals, local moments, the position in a block), so every rank writes a file of its own.  A file is replaced
atomically.  A run restored from a checkpoint takes the same steps, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hpccomm.algorithms.states import leaves, map_leaves
from hpccomm.errors import ArgumentError

NUMBERS = (bool, int, float)
READER = threading.Lock()
"""NumPy parses the header of each array as Python source, and two threads that parse at once raise SystemError (AST
constructor recursion depth mismatch, CPython 3.11.7)."""


def state_dict(state: Any) -> dict[str, Any]:
    """Copies of all arrays, and the numbers, by their paths.  Raises for a state that holds anything else."""
    found: dict[str, Any] = {}
    for path, leaf in leaves(state):
        if not isinstance(leaf, np.ndarray | np.generic | bool | int | float):
            raise ArgumentError(
                f"state_dict: {path or 'the state'} is {type(leaf).__name__}: a state is nested tuples of arrays "
                "and numbers"
            )
        found[path] = leaf.copy() if isinstance(leaf, np.ndarray) else leaf
    return found


def load_state_dict(like: Any, saved: dict[str, Any]) -> Any:
    """The saved values in the form of ``like``, which is what ``init(weights)`` returns; ``like`` is not written.

    Raises where paths, shapes or dtypes differ: another method, model or number of ranks wrote them.
    """
    wanted = {path for path, _ in leaves(like)}
    if wanted != saved.keys():
        missing, extra = sorted(wanted - saved.keys()), sorted(saved.keys() - wanted)
        raise ArgumentError(
            f"load_state_dict: missing {missing}, not in this method's state {extra}: load into the method that saved"
        )
    return map_leaves(lambda path, leaf: restore_leaf(path, leaf, saved[path]), like)


def restore_leaf(path: str, like: Any, value: Any) -> Any:
    """One leaf: an array of the same shape and dtype, or a number."""
    if not isinstance(like, np.ndarray):
        return np.asarray(value).item() if isinstance(like, NUMBERS) else np.asarray(value)[()]
    array = np.asarray(value)
    if array.dtype.kind == "V" and array.dtype.itemsize == like.dtype.itemsize:  # bfloat16 in a file
        array = array.view(like.dtype)
    if array.shape != like.shape or array.dtype != like.dtype:
        raise ArgumentError(
            f"load_state_dict: {path} was saved as {array.dtype} of shape {array.shape}, this method has {like.dtype} "
            f"of shape {like.shape}: use the model, the dtype and the number of ranks of the run that saved"
        )
    return array.copy()


def save(path: str | os.PathLike[str], **states: Any) -> None:
    """Write states by name, ``save(f"step{n}.rank{comm.rank}.npz", weights=weights, method=state)``.

    The file is written under another name in the same folder, flushed to the disk and then renamed, so a reader finds
    the old file or the new one, never a partial one.
    """
    target = Path(path)
    found = state_dict(tuple(states.values()))
    names = list(states)
    entries = {entry_name(path, names): value for path, value in found.items()}
    with replace_file(target) as file:
        np.savez(file, **entries)


@contextmanager
def replace_file(target: Path) -> Iterator[BinaryIO]:
    """A new file that replaces ``target`` at the end, flushed to the disk; an error leaves ``target`` as it was."""
    remove_parts(target.parent)
    handle, temporary = tempfile.mkstemp(PART, f".{target.name}.", target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            lock(file.fileno(), fcntl.LOCK_EX)  # waits for a process that looks whether this file is a dead one's
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, target)  # while it is locked
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    flush_folder(target.parent)


NOW = fcntl.LOCK_EX | fcntl.LOCK_NB
PART = ".hpccomm-part"
"""The end of the name of a file that is being written."""


def lock(file: int, how: int) -> bool:
    """Lock a file; false if another process, which is alive, has locked it, or the file system has no locks."""
    try:
        fcntl.flock(file, how)
    except OSError:
        return False
    return True


def remove_parts(folder: Path) -> None:
    """Remove what processes that died while they were writing have left in a folder."""
    for part in folder.glob(f".*{PART}"):
        with suppress(OSError), part.open("rb") as file:
            if lock(file.fileno(), NOW) and file.seek(0, os.SEEK_END):  # a live process locks a file before it writes
                part.unlink()


def load(path: str | os.PathLike[str], **like: Any) -> tuple[Any, ...]:
    """What :func:`save` wrote, in the form of ``like``: ``weights, state = load(p, weights=weights, method=state)``.

    Raises where the file is no checkpoint or holds other names, shapes or dtypes.  Nothing in the file is executed.
    """
    try:
        with READER, np.load(path, allow_pickle=False) as file:
            entries = {name: file[name] for name in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError) as error:
        raise ArgumentError(f"load: {path} is no checkpoint ({error}): name a file that save wrote") from None
    names = list(like)
    known = {entry_name(path, names): path for path, _ in leaves(tuple(like.values()))}
    saved = {known.get(name, name): value for name, value in entries.items()}
    found: tuple[Any, ...] = load_state_dict(tuple(like.values()), saved)
    return found


def entry_name(path: str, names: list[str]) -> str:
    """A leaf's path with the name of its state in place of its number."""
    first, dot, rest = path.partition(".")
    return f"{names[int(first)]}{dot}{rest}"


def flush_folder(folder: Path) -> None:
    """Flush a folder, so that a rename in it is on disk, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
