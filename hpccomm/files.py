"""Files that appear whole: a reader finds the old file or the new one, also after a crash.

A file is written under a random name in the same folder, its *part*, and then renamed.  A writer keeps its part locked,
which tells what a dead process has left, for the next one to remove, from what a living process still writes.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PART = ".hpccomm-part"
"""The end of the name of a part."""
NOW = fcntl.LOCK_EX | fcntl.LOCK_NB
NO_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
"""What a file system answers that cannot flush a folder."""


@contextmanager
def replace_file(target: Path, flush: bool = True, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A new file that replaces ``target`` at the end, after a flush to the disk; an error leaves ``target`` as it was.

    Its permissions are ``mode``, less what the process masks.
    """
    handle, part = open_part(target.parent, mode)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
            os.replace(part, target)  # while it is locked
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    if flush:
        flush_folder(target.parent)


def write_text(target: Path, text: str, flush: bool = False, mode: int = 0o600) -> None:
    """Write a file of text at once, as one of this user alone."""
    remove_parts(target.parent)
    with replace_file(target, flush, mode) as file:
        file.write(text.encode())


def open_part(folder: Path, mode: int) -> tuple[int, Path]:
    """A new file in a folder, locked, and its path."""
    while True:
        part = folder / f".{os.urandom(8).hex()}{PART}"
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        if lock(handle, fcntl.LOCK_EX) is not True or os.fstat(handle).st_nlink:
            return handle, part
        os.close(handle)  # before it was locked, another process has taken it for a dead one's


def lock(file: int, how: int) -> bool | None:
    """Lock a file: False if a living process has locked it, None where the file system has no locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_parts(folder: Path) -> None:
    """Remove what processes that died while they were writing have left in a folder."""
    for part in folder.glob(f".*{PART}"):
        with suppress(OSError):
            handle = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                if lock(handle, NOW):
                    part.unlink()
            finally:
                os.close(handle)


@contextmanager
def hold(path: Path) -> Iterator[bool]:
    """Create a file and keep it locked inside the block, then remove it; False while another process holds it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            held = lock(handle, NOW)
            if held and not os.fstat(handle).st_nlink:  # its last holder has removed it meanwhile
                continue
            try:
                yield held is not False
            finally:
                if held is not False:
                    path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def flush_folder(folder: Path) -> None:
    """Flush a folder, so that a rename in it is on disk, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # a folder that may be written to and not listed
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(handle)
