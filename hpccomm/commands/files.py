"""Files that a command writes: checked on rank 0 before the work and not after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpccomm.errors import ArgumentError, HpccommError


def check_file(flag: str, file: Path | None) -> None:
    """Raise for a file that cannot be written."""
    try:
        if file:
            file.open("a").close()
    except OSError as error:
        raise ArgumentError(f"{flag} {file}: {error.strerror}: name a file that can be written") from None


PICTURES = (".png", ".svg", ".pdf")
"""The endings of files that are drawn."""


def check_drawable(flag: str, file: Path) -> None:
    """Raise for a picture that cannot be written, or has another ending."""
    if file.suffix not in PICTURES:
        raise ArgumentError(f"{flag} {file}: the file must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    check_folder(flag, file)


def check_folder(flag: str, file: Path | None) -> None:
    """Raise for a file in a folder that does not exist, and for a folder."""
    if file and file.is_dir():
        raise ArgumentError(f"{flag} {file}: this is a folder: name a file")
    if file and not file.parent.is_dir():
        raise ArgumentError(f"{flag} {file}: the folder {file.parent} does not exist: create it or name another file")


def run_on_root(action: Callable[[], Any], comm: Any) -> Any:
    """Run ``action`` on rank 0; all ranks return its result, or raise its error."""
    result: Any = None
    if comm.rank == 0:
        try:
            result = action()
        except HpccommError as error:
            result = error
    result = comm.bcast(result)
    if isinstance(result, HpccommError):
        raise result
    return result
