"""Memory that the ranks of a node share: every rank maps the pages of one anonymous file.

*p ranks on one node, r this one.*
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from contextlib import suppress
from functools import cache
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
        self.file, self.buffer = open_memfd(node, self.size) or open_shm_file(node, self.size)
        self._forget = weakref.finalize(self, os.close, self.file)
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
    lines = read_text("/proc/meminfo").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError):
        for line in read_text("/proc/self/cgroup").splitlines():
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
    least, group = 1 << 62, (root + path).rstrip("/")
    while True:
        with suppress(OSError, ValueError):
            most, taken = (int(read_text(f"{group}/{name}")) for name in (limit, used))
            statistics = f"\n{read_text(f'{group}/memory.stat')}"
            least = min(least, most - taken + int(statistics.partition(f"\n{cached} ")[2].partition("\n")[0] or 0))
        if group in (root, "/"):
            return least
        group = os.path.dirname(group)


def read_text(path: str) -> str:
    """The content of a file of the system."""
    with open(path) as file:
        return file.read()


def open_memfd(node: Any, size: int) -> tuple[int, mmap.mmap] | None:
    """Open and map an anonymous file of rank 0; ``None`` on all ranks if one of them cannot open it."""
    file, offer, free = -1, None, free_bytes()
    if node.Get_rank() == 0 and size <= free:
        with suppress(OSError, AttributeError):
            file = os.memfd_create("hpccomm", os.MFD_CLOEXEC)
            os.ftruncate(file, size)
            offer = (os.getpid(), file, os.fstat(file).st_ino)
    offers = node.allgather((offer, f"{free:,} bytes are free" if size > free else ""))
    raise_together(node, size, [problem for _, problem in offers], file)
    if offers[0][0] and file < 0:
        file = open_peer_file(*offers[0][0])
    memory, problem = map_share(node, file, size) if file >= 0 else (None, "")
    results = node.allgather((file >= 0, problem))
    if all(opened for opened, _ in results):
        raise_together(node, size, [problem for _, problem in results], file)
        assert memory is not None
        return file, memory
    if file >= 0:
        os.close(file)
    return None


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


def open_shm_file(node: Any, size: int) -> tuple[int, mmap.mmap]:
    """Open and map a file in /dev/shm and unlink it before returning."""
    import tempfile

    file, offer, problem, memory = -1, None, "", None
    if node.Get_rank() == 0:
        try:
            file, path = tempfile.mkstemp(prefix="hpccomm-", dir="/dev/shm")
            offer = path, os.fstat(file).st_ino
            os.ftruncate(file, size)
        except OSError as error:
            problem = str(error)
    offer = node.bcast(offer)
    try:
        if file < 0 and offer:
            file = open_own_file(*offer)
    except OSError as error:
        problem = str(error)
    node.Barrier()
    if offer and node.Get_rank() == 0:
        os.unlink(offer[0])
    if file >= 0 and not problem:
        memory, problem = map_share(node, file, size)
    raise_together(node, size, node.allgather(problem), file)
    assert memory is not None
    return file, memory


def open_own_file(path: str, inode: int) -> int:
    """Open a file of this user that rank 0 has created; raises OSError for any other."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    seen = os.fstat(file)
    if (seen.st_ino, seen.st_uid) == (inode, os.geteuid()):
        return file
    os.close(file)
    raise OSError(f"{path} is not the file of rank 0")


def map_share(node: Any, file: int, size: int) -> tuple[mmap.mmap | None, str]:
    """Map the file and reserve this rank's share of its pages; the memory, or the reason why there is none."""
    p, r, pages = node.Get_size(), node.Get_rank(), size // PAGE
    first, last = pages * r // p * PAGE, pages * (r + 1) // p * PAGE
    try:
        if first < last:
            os.posix_fallocate(file, first, last - first)
        return mmap.mmap(file, size), ""
    except (OSError, OverflowError, ValueError) as error:
        return None, str(error)


def raise_together(node: Any, size: int, problems: list[str], file: int) -> None:
    """Raise and close the file if one of the ranks has a problem."""
    found = [(rank, each) for rank, each in enumerate(problems) if each]
    if not found:
        return
    if file >= 0:
        os.close(file)
    raise TransportError(
        f"{size:,} bytes of memory shared by {node.Get_size()} ranks are not available (local rank {found[0][0]}: "
        f"{found[0][1]}): allow the job or container more memory (docker run --shm-size), "
        "or use algorithm='native'"
    )


@cache
def unlink_memory_of_mpi() -> None:
    """Remove the name of memory that all ranks of this node have mapped, and that MPICH leaves if a rank is killed."""
    lines: list[str] = []
    with suppress(OSError), open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        lines = file.readlines()
    for name in {line.split()[5] for line in lines if "/dev/shm/mpich_shm_" in line}:
        with suppress(OSError):  # another rank was first
            os.unlink(name)
