"""Memory that the ranks of a node share: every rank maps the pages of one anonymous file.

*p ranks on one node, r this one.*
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpccomm.errors import TransportError

PAGE = mmap.PAGESIZE
MADV_POPULATE_WRITE = 23  # Linux's mman.h


class SharedSegment:
    """``nbytes`` zeroed bytes that all ranks of ``node`` share (collective).

    The file is an anonymous file of rank 0 that the others open, or else a file in /dev/shm that is unlinked at once:
    a killed job leaves nothing behind.  The constructor checks free memory before it reserves any: when memory for an
    anonymous file runs out, the kernel kills processes instead of refusing.  Then every rank reserves an equal share:
    no page is missing later, and pages are placed close to the rank that reserved them.
    """

    def __init__(self, node: Any, nbytes: int) -> None:
        self.size = -(-max(1, nbytes) // PAGE) * PAGE
        free = free_bytes()
        raise_together(node, self.size, f"{free:,} bytes are free" if self.size > free else "")
        self.file = open_together(node, self.size)
        self._forget = weakref.finalize(self, os.close, self.file)
        try:
            self.buffer = map_together(node, self.file, self.size)
        except TransportError:
            self._forget()
            raise
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    def prefault(self) -> None:
        """Map all pages now, so the first call is not slow (Linux before 5.14 cannot)."""
        with suppress(OSError):
            self.buffer.madvise(MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Free the memory; arrays in it keep it until they are gone."""
        self._forget()
        with suppress(BufferError):
            self.buffer.close()


def free_bytes() -> int:
    """Bytes that this process may still allocate: the machine's, or those of its control groups if that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                free = min(free, free_in_group("/sys/fs/cgroup/memory", path, *GROUP_V1))
            elif not controllers:
                free = min(free, free_in_group("/sys/fs/cgroup", path, *GROUP_V2))
    return free


GROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUP_V2 = ("memory.max", "memory.current", "inactive_file")


def free_in_group(root: str, path: str, limit: str, used: str, cached: str) -> int:
    """The least free memory of a control group and the groups that contain it; file cache counts as free."""
    least, folder = 1 << 62, Path(root + path)
    for group in (folder, *folder.parents):
        with suppress(OSError, ValueError):
            most, taken = int((group / limit).read_text()), int((group / used).read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            least = min(least, most - taken + int(statistics.get(cached, 0)))
        if str(group) == root:
            break
    return least


def open_together(node: Any, size: int) -> int:
    """Open one file of ``size`` bytes on all ranks."""
    file = open_memfd(node, size)
    return open_shm_file(node, size) if file < 0 else file


def open_memfd(node: Any, size: int) -> int:
    """Open an anonymous file of rank 0; -1 on all ranks if one of them cannot open it."""
    file, offer = -1, None
    if node.Get_rank() == 0:
        with suppress(OSError, AttributeError):
            file = os.memfd_create("hpccomm", os.MFD_CLOEXEC)
            os.ftruncate(file, size)
            offer = (os.getpid(), file, os.fstat(file).st_ino)
    offer = node.bcast(offer)
    if offer and file < 0:
        file = open_peer_file(*offer)
    if node.allreduce(int(file >= 0)) == node.Get_size():
        return file
    if file >= 0:
        os.close(file)
    return -1


def open_peer_file(pid: int, file: int, inode: int) -> int:
    """Open a file of another process; -1 if that is forbidden or the process is a different one."""
    try:
        mine = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1
    if os.fstat(mine).st_ino == inode:
        return mine
    os.close(mine)
    return -1


def open_shm_file(node: Any, size: int) -> int:
    """Open a file in /dev/shm and unlink it before returning."""
    file, path, problem = -1, None, ""
    if node.Get_rank() == 0:
        try:
            file, path = tempfile.mkstemp(prefix="hpccomm-", dir="/dev/shm")
            os.ftruncate(file, size)
        except OSError as error:
            problem = str(error)
    path = node.bcast(path)
    try:
        if file < 0 and path:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        problem = str(error)
    node.Barrier()
    if path and node.Get_rank() == 0:
        os.unlink(path)
    try:
        raise_together(node, size, problem)
    except TransportError:
        if file >= 0:
            os.close(file)
        raise
    return file


def map_together(node: Any, file: int, size: int) -> mmap.mmap:
    """Map the file; every rank reserves its share of the pages."""
    p, r, pages, problem = node.Get_size(), node.Get_rank(), size // PAGE, ""
    first, last = pages * r // p * PAGE, pages * (r + 1) // p * PAGE
    try:
        if first < last:
            os.posix_fallocate(file, first, last - first)
        memory = mmap.mmap(file, size)
    except (OSError, OverflowError, ValueError) as error:
        problem = str(error)
    raise_together(node, size, problem)
    return memory


def raise_together(node: Any, size: int, problem: str) -> None:
    """Raise on all ranks if one of them has a problem."""
    found = [(rank, each) for rank, each in enumerate(node.allgather(problem)) if each]
    if found:
        raise TransportError(
            f"{size:,} bytes of memory shared by {node.Get_size()} ranks are not available (local rank {found[0][0]}: "
            f"{found[0][1]}): allow the job or container more memory (docker run --shm-size), "
            "or use algorithm='native'"
        )
