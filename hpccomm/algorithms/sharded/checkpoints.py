"""Sharded checkpoints: one copy of the model on disk, to be read by any number of ranks.

*p ranks of a partition group; Ψ parameters.*  Only the first partition group writes: each of its ranks one file of its
shards.  When all files exist, rank 0 writes a note in JSON that names the set, and then removes all other files, so the
note names a complete set even if the run is killed at any point.  A reader takes the elements that it holds from these
files: any number of ranks, any partition size and any stage can continue.  :func:`export` writes the weights as named
arrays for any program with NumPy.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpccomm.algorithms.checkpoints import READER, flush_folder, replace_file, save
from hpccomm.algorithms.loss_scaling import LossScale
from hpccomm.algorithms.sharded.units import ShardedModel, Unit, bounds
from hpccomm.algorithms.states import leaves, map_leaves
from hpccomm.algorithms.transforms import Vector
from hpccomm.errors import ArgumentError

READ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def run_collectively(comm: Any, what: str, action: Callable[[], Any]) -> Any:
    """Run ``action`` on this rank; raises on all ranks if it raises on one (collective)."""
    found, problem = None, ""
    try:
        found = action()
    except (ArgumentError, OSError) as error:
        problem = str(error)
    for rank, each in enumerate(comm.allgather(problem)):
        if each:
            raise ArgumentError(f"{what}: rank {rank}: {each}")
    return found


def save_shards(folder: str | os.PathLike[str], name: str, states: ShardedModel, **note: Any) -> None:
    """Save sharded states, with ``note`` in JSON beside them, in a folder shared by all ranks (collective).

    Call it between optimizer steps, not between micro-steps.  Raises on all ranks if one cannot write; the older
    checkpoint is then still complete.
    """
    folder = Path(folder)
    comm, writes = states.groups.world, states.groups.replication.rank == 0
    taken = [name for name, count in states.counts.items() if count]
    what = f"save_shards {folder}"
    if taken:
        raise ArgumentError(f"{what}: unit {taken[0]!r} has seen gradients since the last step: save after boundary()")
    run_collectively(comm, what, lambda: files_of(folder, name) if comm.rank == 0 else [])
    part = file_of(folder, name, states.steps, states.place, states.ranks)
    run_collectively(comm, what, lambda: save(part, **contents(states)) if writes else None)
    written = {
        "steps": states.steps,
        "ranks": states.ranks,
        "loss_scale": list(states.loss_scale),
        "units": {unit.name: unit.size for unit in states.units.values()},
        "dtype": str(states.master.dtype),
        **note,
    }
    run_collectively(comm, what, lambda: write_note(folder / f"{name}.json", written) if comm.rank == 0 else None)
    if comm.rank == 0:
        remove_other_sets(folder, name)


def remove_other_sets(folder: Path, name: str) -> None:
    """Remove the files of older sets, and of sets whose run was killed before the note named them."""
    kept, form = set(files_of(folder, name)), re.compile(re.escape(name) + r"\.step\d+\.shard\d+of\d+\.npz")
    for file in list(folder.iterdir()):
        if form.fullmatch(file.name) and file not in kept:
            file.unlink(missing_ok=True)


def files_of(folder: Path, name: str) -> list[Path]:
    """The files that the note names; none without a note."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{name}.json"
    if not note.exists():
        return []
    saved = read_note(note)
    return [file_of(folder, name, saved["steps"], place, saved["ranks"]) for place in range(saved["ranks"])]


def file_of(folder: Path, name: str, steps: int, place: int, ranks: int) -> Path:
    """The file of one rank's shards."""
    return folder / f"{name}.step{steps}.shard{place}of{ranks}.npz"


def contents(states: ShardedModel) -> dict[str, Any]:
    """This rank's shards by name, a tuple of units each, and the numbers of the optimizer's state."""
    found: dict[str, Any] = {"weights": split_by_unit(states, states.master)}
    for path, leaf in leaves(states.state):
        found[f"state:{path}"] = split_by_unit(states, leaf) if is_sharded(path, leaf, states) else leaf
    return found


def is_sharded(path: str, leaf: Any, states: ShardedModel) -> bool:
    """Whether a leaf of the optimizer's state has one number for each weight; raises for other arrays."""
    if not isinstance(leaf, np.ndarray) or leaf.ndim == 0:
        return False
    if leaf.shape != states.master.shape:
        raise ArgumentError(f"the optimizer's {path} has shape {leaf.shape}, weights {states.master.shape}: save alone")
    return True


def split_by_unit(states: ShardedModel, vector: Vector) -> tuple[Vector, ...]:
    """The shard of each unit in a vector of all shards."""
    return tuple(vector[unit.own_slice] for unit in states.units.values())


def write_note(file: Path, note: dict[str, Any]) -> None:
    """Replace the note atomically."""
    new = file.with_suffix(".new")
    with new.open("w", encoding="utf-8") as stream:
        json.dump(note, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
    flush_folder(file.parent)


def read_note(file: Path) -> dict[str, Any]:
    """The note of :func:`save_shards`; raises for any other file."""
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        complete = {"steps", "ranks", "loss_scale", "units", "dtype"} <= note.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ArgumentError(f"{file} is no note of saved shards ({error}): name another folder") from None
    if not complete:
        raise ArgumentError(f"{file} is no note of saved shards: name another folder")
    return dict(note)


def load_shards(folder: str | os.PathLike[str], name: str, states: ShardedModel) -> dict[str, Any]:
    """Restore the states of :func:`save_shards`, on any number of ranks; returns the note (collective).

    Raises on all ranks for another model or optimizer and for files that are missing or truncated; the states are then
    unchanged.
    """
    what, where = f"load_shards {os.fspath(folder)}", Path(folder)
    note, master, state = run_collectively(states.groups.world, what, lambda: read_states(where, name, states))
    states.master[...], states.state = master, state
    states.steps, states.loss_scale = note["steps"], LossScale(*note["loss_scale"])
    states.refresh()
    return dict(note)


def read_states(folder: Path, name: str, states: ShardedModel) -> tuple[dict[str, Any], Vector, Any]:
    """The note, and this rank's weights and optimizer state, assembled from the files."""
    note = read_note(folder / f"{name}.json")
    sizes = {unit.name: unit.size for unit in states.units.values()}
    if sizes != note["units"] or str(states.master.dtype) != note["dtype"]:
        saved = ", ".join(f"{unit} {size}" for unit, size in note["units"].items())
        raise ArgumentError(f"saved were units of {note['dtype']} {saved}: load into the same model")
    files = files_of(folder, name)
    opened: dict[int, Any] = {}

    def entry(place: int, key: str) -> Any:
        try:
            if place not in opened:
                opened[place] = np.load(files[place], allow_pickle=False)
            with READER:
                return opened[place][key]
        except READ_ERRORS as error:
            raise ArgumentError(
                f"{files[place]} is no whole file of shards with {key} ({error}): load what the same optimizer saved, "
                "from another folder if this one was cut short"
            ) from None

    def vector(key: str) -> Vector:
        parts = [block for unit in states.units.values() for block in read_blocks(unit, note["ranks"], key, entry)]
        return np.concatenate(parts) if parts else np.empty(0, states.master.dtype)

    def leaf(path: str, like: Any) -> Any:
        if is_sharded(path, like, states):
            return vector(f"state:{path}").astype(like.dtype, copy=False)
        value = entry(0, f"state:{path}")
        return value if isinstance(like, np.ndarray) else type(like)(value.item())

    try:
        return note, vector("weights"), map_leaves(leaf, states.state)
    finally:
        for each in opened.values():
            each.close()


def read_blocks(unit: Unit, ranks: int, key: str, entry: Callable[[int, str], Any]) -> Iterator[Vector]:
    """This rank's elements of a unit, from the files of ``ranks`` ranks."""
    for place in range(ranks):
        lo, hi = bounds(unit.size, ranks, place)
        first, stop = max(lo, unit.lo), min(hi, unit.hi)
        if first < stop:
            yield entry(place, f"{key}.{unit.number}")[first - lo : stop - lo]


def export(path: str | os.PathLike[str], states: ShardedModel) -> None:
    """The whole model's weights, ``"layer.tensor"`` each, for ``numpy.load`` (collective).

    Rank 0 writes one unit at a time and never holds more than one.  The file is replaced atomically.
    """
    what = f"export {os.fspath(path)}"
    if states.groups.replication.rank == 0:
        if states.groups.world.rank == 0:
            run_collectively(states.groups.world, what, lambda: write_export(Path(path), states))
            return
        for _ in states.consolidate():
            pass
    run_collectively(states.groups.world, what, lambda: None)


def write_export(target: Path, states: ShardedModel) -> None:
    """Write the file on rank 0; an error is raised after all units have been gathered."""
    units = states.consolidate()
    try:
        with replace_file(target) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
            for unit, tensors in units:
                for name, tensor in tensors.items():
                    with archive.open(f"{unit}.{name}.npy", "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, tensor, allow_pickle=False)
    except BaseException:
        for _ in units:
            pass
        raise
