"""Sharded checkpoints: one copy of the model on disk, to be read by any number of ranks.

*p ranks of a partition group; Ψ parameters.*  Only the first partition group writes: each of its ranks one file of its
shards, together a set (:mod:`hpccomm.algorithms.checkpoint_sets`).  A reader takes the elements that it holds from
these files: any number of ranks, any partition size and any stage can continue.  :func:`export` writes the weights as
named arrays for any program with NumPy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpccomm.algorithms.agreement import run_collectively
from hpccomm.algorithms.checkpoint_sets import Manifest, find_set, open_member, write_set
from hpccomm.algorithms.checkpoints import CheckpointFile, write_arrays
from hpccomm.algorithms.loss_scaling import LossScale
from hpccomm.algorithms.sharded.units import ShardedModel, Unit, bounds
from hpccomm.algorithms.states import leaves, map_leaves
from hpccomm.algorithms.transforms import Vector
from hpccomm.arrays import to_device_like, to_host, view_array
from hpccomm.errors import ArgumentError
from hpccomm.files import remove_parts, replace_file


def save_shards(folder: str | os.PathLike[str], name: str, states: ShardedModel, /, **note: Any) -> None:
    """Save sharded states, with ``note`` in JSON beside them, in a folder shared by all ranks (collective).

    Call it between optimizer steps, not between micro-steps.  Raises on all ranks if one cannot write; the older
    checkpoint is then still complete.
    """
    what = f"save_shards {os.fspath(folder)}"
    check_model(what, states)
    comm, writes = states.groups.world, states.groups.replication.rank == 0
    taken = [name for name, count in states.counts.items() if count]
    if taken:
        raise ArgumentError(f"{what}: unit {taken[0]!r} has seen gradients since the last step: save after boundary()")
    shards = {
        "steps": states.steps,
        "ranks": states.ranks,
        "loss_scale": list(states.loss_scale),
        "units": {unit.name: unit.size for unit in states.units.values()},
        "dtype": str(states.master.dtype),
    }
    parts = run_collectively(comm, what, lambda: contents(states) if writes else None)
    write_set(comm, folder, name, what, note, parts, states.place, states.ranks, {"shards": shards})


def check_model(what: str, states: Any) -> None:
    """Raise for what is no sharded model."""
    if not isinstance(states, ShardedModel):
        raise ArgumentError(
            f"{what}: the states are a {type(states).__name__}: pass what mics, zero or data_parallel returned, other "
            "states to save_set and load_set"
        )


def contents(states: ShardedModel) -> dict[str, Any]:
    """This rank's shards by name, a tuple of units each, and the numbers of the optimizer's state."""
    found: dict[str, Any] = {"weights": split_by_unit(states, to_host(states.master))}
    for path, leaf in leaves(states.state):
        host = to_host(leaf)
        found[f"state:{path}"] = split_by_unit(states, host) if is_sharded(path, leaf, states) else host
    return found


def is_sharded(path: str, leaf: Any, states: ShardedModel) -> bool:
    """Whether a leaf of the optimizer's state has one number for each weight; raises for other arrays."""
    if not getattr(leaf, "ndim", 0):
        return False
    if leaf.shape != states.master.shape:
        raise ArgumentError(f"the optimizer's {path} has shape {leaf.shape}, weights {states.master.shape}: save alone")
    return True


def split_by_unit(states: ShardedModel, vector: Vector) -> tuple[Vector, ...]:
    """The shard of each unit in a vector of all shards."""
    return tuple(vector[unit.own_slice] for unit in states.units.values())


def load_shards(folder: str | os.PathLike[str], name: str, states: ShardedModel, /) -> dict[str, Any]:
    """Restore the states of :func:`save_shards`, on any number of ranks; returns the note alone (collective).

    In the middle of a step it discards the gradients since :meth:`ShardedModel.boundary`, and units count as released.
    Raises on all ranks for another model or optimizer and for files that are missing or truncated; the states are then
    unchanged.
    """
    what, where = f"load_shards {os.fspath(folder)}", Path(folder)
    check_model(what, states)
    comm = states.groups.world
    manifest = find_set(comm, folder, name, what)
    told, note = run_collectively(comm, what, lambda: read_description(manifest))
    master, state = run_collectively(comm, what, lambda: read_states(where, manifest, told, states))
    states.discard_step()
    states.master[...], states.state = to_device_like(master, states.master), state
    states.steps, states.loss_scale = told["steps"], LossScale(*told["loss_scale"])
    states.refresh()
    return note


OWN = ("steps", "ranks", "loss_scale", "units", "dtype")
"""What describes shards; older manifests hold it beside the note."""


def read_description(manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
    """What describes the shards, and the note; raises for a set that holds none."""
    told, note = manifest.own.get("shards"), dict(manifest.note)
    if told is None:
        told = {key: note.pop(key) for key in OWN if key in note}
    if absent := set(OWN) - told.keys():
        raise ArgumentError(
            f"{manifest.name}.json has no {min(absent)}, it names no sharded states: load a set of save_set with "
            "load_set"
        )
    return told, note


def read_states(folder: Path, manifest: Manifest, told: dict[str, Any], states: ShardedModel) -> tuple[Vector, Any]:
    """This rank's weights and optimizer state, assembled from the files."""
    opened = dict[int, CheckpointFile]()
    sizes = {unit.name: unit.size for unit in states.units.values()}
    if sizes != told["units"] or str(states.master.dtype) != told["dtype"]:
        raise ArgumentError(
            f"saved were units of {list_units(told['units'], told['dtype'])}, this model has "
            f"{list_units(sizes, str(states.master.dtype))}: load into the model that saved"
        )

    def entry(place: int, key: str) -> Any:
        if place not in opened:
            opened[place] = open_member(folder, manifest, place)
        return opened[place].read(key)

    def vector(key: str) -> Vector:
        parts = [block for unit in states.units.values() for block in read_blocks(unit, told["ranks"], key, entry)]
        return np.concatenate(parts) if parts else np.empty(0, states.master.dtype)

    def leaf(path: str, like: Any) -> Any:
        if is_sharded(path, like, states):
            return to_device_like(vector(f"state:{path}").astype(like.dtype, copy=False), like)
        value = entry(0, f"state:{path}")
        return value if isinstance(like, np.ndarray) else type(like)(value.item())

    try:
        return vector("weights"), map_leaves(leaf, states.state)
    finally:
        for each in opened.values():
            each.close()


def list_units(sizes: dict[str, int], dtype: str) -> str:
    """The units of a model by name and size."""
    return f"{dtype} {', '.join(f'{unit} {size}' for unit, size in sizes.items())}"


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
    check_model(what, states)
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
        remove_parts(target.parent)
        with replace_file(target) as file:
            tensors = ((f"{unit}.{name}", each) for unit, parts in units for name, each in parts.items())
            write_arrays(file, ((name, to_host(view_array(each)[0])) for name, each in tensors))
    except BaseException:
        for _ in units:
            pass
        raise
