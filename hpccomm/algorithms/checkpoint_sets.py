"""Sets of checkpoints: one file a rank, and a manifest that names the files that belong together.

*p ranks; rank r writes ``name.SET.{r}of{p}.npz`` under a new random SET, which is also in its label.*  When all files
are on disk, rank 0 replaces the manifest ``name.json``, and then removes the files that it does not name: those of the
older set, and what killed saves have left.  So whenever a run ends, the manifest names one whole set.  It holds the
program's note, the lengths of the files, and a checksum of itself; the files hold checksums of their arrays.

Rank 0 keeps ``.name.lock`` locked meanwhile: two programs never save under one name in a folder at the same time.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from hpccomm.algorithms.agreement import as_communicator, run_collectively
from hpccomm.algorithms.checkpoints import FORMAT, CheckpointFile, write_file
from hpccomm.algorithms.states import for_ranks
from hpccomm.errors import ArgumentError
from hpccomm.files import hold, remove_parts, write_text

WAIT_S = 60.0
"""How long a save waits for another program that saves under the same name."""
OWN = ("checkpoint", "crc32")
"""Keys of a manifest that are not the program's note."""


class Manifest(NamedTuple):
    """What names a set."""

    note: dict[str, Any]
    name: str
    set: str
    """Empty for a set of format 1."""
    nbytes: list[int]
    """The lengths of the files; empty for a set of format 1."""
    own: dict[str, Any]
    """What this package says of the set beside its name and lengths; the note is the program's."""

    def places(self, size: int) -> int:
        """How many files there are; ``size`` where a set of format 1 does not tell."""
        run = self.note.get("run")
        told = self.note.get("ranks", run.get("ranks") if isinstance(run, dict) else None)
        return len(self.nbytes) or (told if isinstance(told, int) else size)

    def file_name(self, place: int) -> str:
        """The name of a file; those of format 1 had the number of steps in them."""
        if self.set:
            return file_name(self.name, self.set, place, len(self.nbytes))
        if "steps" in self.note:
            return f"{self.name}.step{self.note['steps']}.shard{place}of{self.note['ranks']}.npz"
        return f"{self.name}.step{self.note['step']}.rank{place}.npz"


def save_set(
    comm: Any, folder: str | os.PathLike[str], name: str, /, note: dict[str, Any] | None = None, **states: Any
) -> None:
    """Save the states of all ranks as one set, ``save_set(comm, folder, "run", weights=weights, method=state)``.

    Collective; ``folder`` is shared by all ranks.  ``note`` is kept in ``folder/name.json``, beside the keys
    ``checkpoint`` and ``crc32``.  Raises on all ranks if one cannot write; the older set is then unchanged.
    """
    comm = as_communicator("save_set", comm)
    write_set(comm, folder, name, f"save_set {os.fspath(folder)}", note or {}, states, comm.rank, comm.size)


def load_set(comm: Any, folder: str | os.PathLike[str], name: str, /, **like: Any) -> tuple[Any, ...]:
    """The states of :func:`save_set` in the form of ``like``, which is not written (collective).

    Another number of ranks may load: :func:`~hpccomm.for_ranks` divides the states anew.  Raises ArgumentError on all
    ranks for files that are missing, damaged, of another set, or of another method or model; where nothing was saved
    yet, ``folder/name.json`` does not exist.
    """
    comm = as_communicator("load_set", comm)
    what = f"load_set {os.fspath(folder)}"
    manifest = find_set(comm, folder, name, what)
    states = run_collectively(comm, what, lambda: restore_set(Path(folder), manifest, comm, like))
    found: tuple[Any, ...] = run_collectively(comm, what, lambda: take_own(states, manifest, comm, like))
    return found


def restore_set(folder: Path, manifest: Manifest, comm: Any, like: dict[str, Any]) -> list[tuple[Any, ...]]:
    """This rank's states where as many ranks saved, else those of all old ranks."""
    places, found = manifest.places(comm.size), []
    for place in [comm.rank] if places == comm.size else range(places):
        with open_member(folder, manifest, place) as file:
            found.append(file.restore(like, places != comm.size))
    return found


def take_own(states: list[tuple[Any, ...]], manifest: Manifest, comm: Any, like: dict[str, Any]) -> tuple[Any, ...]:
    """This rank's states out of those of :func:`restore_set`."""
    if manifest.places(comm.size) == comm.size:
        return states[0]
    found: tuple[Any, ...] = for_ranks(states, comm.rank, comm.size, tuple(like.values()))
    return found


# Writing


def write_set(
    comm: Any,
    folder: str | os.PathLike[str],
    name: str,
    what: str,
    note: dict[str, Any],
    states: dict[str, Any] | None,
    place: int,
    places: int,
    own: dict[str, Any] | None = None,
) -> None:
    """Write a set of ``places`` files, of which this rank writes one, unless ``states`` is None (collective)."""
    folder = Path(folder)
    with ExitStack() as stack:
        fresh = run_collectively(comm, what, lambda: begin(stack, folder, name, note) if comm.rank == 0 else None)
        identity, old = comm.bcast(fresh, 0)
        file = folder / file_name(name, identity, place, places)
        label = {"set": identity, "place": place, "places": places}
        try:
            nbytes = run_collectively(comm, what, lambda: None if states is None else write_file(file, states, **label))
        except ArgumentError:
            if states is not None:
                with suppress(OSError):
                    file.unlink()
            raise
        lengths = dict(comm.allgather((place if states is not None else -1, nbytes)))
        manifest = Manifest(note, name, identity, [lengths[each] for each in range(places)], own or {})
        run_collectively(comm, what, lambda: write_manifest(folder, manifest) if comm.rank == 0 else None)
        with suppress(OSError):
            if old:
                (folder / old.file_name(place)).unlink()  # where each node has a folder of its own
            if comm.rank == 0:
                remove_other_sets(folder, manifest)


def begin(stack: ExitStack, folder: Path, name: str, note: dict[str, Any]) -> tuple[str, Manifest | None]:
    """On rank 0: lock the name, and remove what killed saves have left; a new set, and the older one."""
    if not name or "/" in name or "\0" in name:
        raise ArgumentError(f"the name {name!r} is no file name: leave out slashes")
    check_note(note)
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(lock_name(folder, name))
    remove_parts(folder)
    old = None
    with suppress(ArgumentError):
        old = read_manifest(folder, name)
    return os.urandom(8).hex(), old


def check_note(note: Any) -> None:
    """Raise for a note that JSON cannot hold, or that uses a key of the manifest."""
    if not isinstance(note, dict):
        raise ArgumentError(f"the note is a {type(note).__name__}: pass a dict; a state needs another name")
    if other := [key for key in note if not isinstance(key, str)]:
        raise ArgumentError(f"the note has a key {other[0]!r}, which is no text: pass a dict by text")
    if taken := [key for key in OWN if key in note]:
        raise ArgumentError(f"the note has a key {taken[0]!r}, which the manifest uses itself: name it otherwise")
    try:
        json.dumps(note)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"the note cannot be kept ({error}): pass numbers, text, lists and dicts") from None


@contextmanager
def lock_name(folder: Path, name: str) -> Iterator[None]:
    """Keep other programs from saving under a name."""
    until = time.monotonic() + WAIT_S
    while True:
        with hold(folder / f".{name}.lock") as held:
            if held:
                yield
                return
        if time.monotonic() > until:
            raise ArgumentError(f"another program has been saving {name!r} for {WAIT_S:g} s: save under another name")
        time.sleep(0.05)


def file_name(name: str, identity: str, place: int, places: int) -> str:
    """The name of one rank's file."""
    return f"{name}.{identity}.{place}of{places}.npz"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest."""
    own = {**manifest.own, "format": FORMAT, "set": manifest.set, "bytes": manifest.nbytes}
    data = {**json.loads(json.dumps(manifest.note)), "checkpoint": own}
    text = json.dumps({**data, "crc32": checksum(data)}, indent=1)
    write_text(folder / f"{manifest.name}.json", text + "\n", flush=True, mode=0o666)


def checksum(data: dict[str, Any]) -> str:
    """The checksum of a manifest without it."""
    return f"{zlib.crc32(json.dumps(data, sort_keys=True).encode()):08x}"


def remove_other_sets(folder: Path, manifest: Manifest) -> None:
    """Remove the files of this name that the manifest does not name."""
    kept = {manifest.file_name(place) for place in range(len(manifest.nbytes))}
    old = r"step\d+\.(rank\d+|shard\d+of\d+)"
    form = re.compile(rf"{re.escape(manifest.name)}\.([0-9a-f]{{16}}\.\d+of\d+|{old})\.npz")
    for each in os.listdir(folder):
        if form.fullmatch(each) and each not in kept:
            (folder / each).unlink(missing_ok=True)


# Reading


def find_set(comm: Any, folder: str | os.PathLike[str], name: str, what: str) -> Manifest:
    """The manifest, which rank 0 reads; raises on all ranks where there is none (collective)."""
    read = run_collectively(comm, what, lambda: read_manifest(Path(folder), name) if comm.rank == 0 else None)
    found = comm.bcast(read, 0)
    if found is None:
        raise ArgumentError(f"{what}: there is no {name}.json: name the folder and the name of a run that saved")
    return Manifest(*found)


def read_manifest(folder: Path, name: str) -> Manifest | None:
    """The manifest of a name, None where there is none; raises where it is damaged, or another file."""
    path = folder / f"{name}.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        own, told = data.get("checkpoint"), data.pop("crc32", None)
        if own is None and told is None:
            return (
                Manifest(data, name, "", [], {})
                if {"step", "steps"} & data.keys()
                else demand(False, "it names no step")
            )
        demand(told == checksum(data), "its checksum differs")
        demand(own["format"] <= FORMAT, f"its format is {own['format']}, this version reads formats 1 to {FORMAT}")
        note = {key: each for key, each in data.items() if key not in OWN}
        return Manifest(note, name, own.pop("set"), own.pop("bytes"), own)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArgumentError(f"{path} does not describe a saved run ({error}): name another folder") from None


def demand(holds: bool, problem: str) -> Any:
    """Raise where something does not hold."""
    if not holds:
        raise ValueError(problem)


def open_member(folder: Path, manifest: Manifest, place: int) -> CheckpointFile:
    """One file of a set; raises where it is missing, cut short, or belongs to another set."""
    path = folder / manifest.file_name(place)
    try:
        file = CheckpointFile(path)
    except OSError as error:
        raise ArgumentError(
            f"{path} cannot be read ({error.strerror}), but {manifest.name}.json names it: copy all files of the set "
            "into one folder that every rank can read"
        ) from None
    found = file.label.get("set", ""), file.label.get("place", place), file.nbytes
    wanted = manifest.set, place, manifest.nbytes[place] if manifest.set else file.nbytes
    if found != wanted:
        file.close()
        raise ArgumentError(
            f"{path} is not the file that the manifest names (set, place and bytes {found}, not {wanted}): "
            "a file of another set, or cut short; copy the files of a set together"
        )
    return file
