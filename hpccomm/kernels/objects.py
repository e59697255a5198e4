"""Machine code that is compiled once, kept in files, and loaded without a compiler, each function in less than 1 ms.

Each function has a file, whose name ends with the :func:`key` of its module: a checksum of the rest, a line that
describes the code, the code.  The first folder that holds it is read, the first that can be written gets new ones.  A
file that is missing or damaged is made anew: one process compiles, others wait for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import platform
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hpccomm.kernels.builtins import make_builtin
from hpccomm.kernels.reductions.reference import DTYPES
from hpccomm.kernels.shared_memory.collectives import COLLECTIVES

KERNELS = Path(__file__).parent


def fold_name(op: str, code: str) -> str:
    """The name of a reduction; where the sign of integers does not matter, it is that of signed ones."""
    return f"{op}_{code}" if op in ("min", "max") else f"{op}_{code.replace('u', 'i').replace('b1', 'i1')}"


EMITTED = {
    **dict.fromkeys(COLLECTIVES, ("shared_memory.collectives", "int64(int64)")),
    **dict.fromkeys(("enter", "leave"), ("entry.body", "int64(int64, int64, int64)")),
    "interpret": ("interpreter.body", "int64(int64)"),
    "run_probe": ("shared_memory.probe", "int64(int64)"),
    "run_kernel": ("python_api", "int64(int64, int64, int64)"),
    **{fold_name(op, code): ("reductions.loops", "") for op, codes in DTYPES.items() for code in codes},
}
"""The functions: the module that has each, and its signature, which may be the function's attribute instead."""
SOURCES = {
    "": (
        *("compiler.py", "emission.py", "linker.py", "intrinsics.py", "futex.py"),
        *("shared_memory/memory.py", "reductions/reference.py"),
    ),
    "shared_memory.collectives": ("shared_memory/collectives.py", "shared_memory/records.py"),
    "shared_memory.probe": ("shared_memory/probe.py", "shared_memory/records.py"),
    "entry.body": (
        *("entry/body.py", "entry/records.py", "interpreter/records.py"),
        *("shared_memory/collectives.py", "shared_memory/records.py"),
    ),
    "interpreter.body": (
        *("interpreter/body.py", "interpreter/records.py"),
        *("shared_memory/collectives.py", "shared_memory/records.py"),
    ),
    "reductions.loops": ("reductions/loops.py",),
    "python_api": ("python_api.py",),
}
"""The files that the code of all modules depends on, and those that the code of one does."""
NUMBA_SETTINGS = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT")
PROCESSOR_FILES = ("/sys/devices/system/cpu/modalias", "/proc/cpuinfo")
"""Files that begin with model and features of the first processor; the second is slow to open on older kernels."""


@cache
def address(name: str) -> int:
    """The address of a function in this process; without a file it is compiled, which needs Numba."""
    return place(read(name) or compile_for_all(name))


def fold(op: str, code: str) -> int:
    """The address of a reduction, for :func:`hpccomm.kernels.intrinsics.fold`."""
    return address(fold_name(op, code))


@cache
def kernel(name: str) -> Callable[[int], int]:
    """A collective as a built-in function of the address of a call record; it runs without the GIL."""
    return make_builtin(name, address("run_kernel"), address(name))


def why_none() -> str:
    """Empty if functions can be loaded or compiled."""
    try:
        if read("run_kernel") and address("run_kernel"):
            return ""
    except OSError as error:
        return str(error)
    from hpccomm.kernels.numba_check import why_no_numba

    return why_no_numba()


# Where files are


@cache
def key(module: str) -> str:
    """What the machine code of a module depends on."""
    sources = [read_beginning(str(KERNELS / each)) for each in SOURCES[module]]
    return f"{platform.machine()}-{zlib.crc32(repr([describe_compiler(), sources]).encode()):08x}"


@cache
def describe_compiler() -> list[Any]:
    """Processor, compiler and its settings, common sources, and what of Python and NumPy these read."""
    versions = [read_beginning(each) for each in map(version_file, ("numba", "llvmlite"))]
    processor = next(filter(None, map(read_beginning, PROCESSOR_FILES)), b"")
    settings = [os.environ.get(each, "") for each in NUMBA_SETTINGS]
    python = [np.__version__, sys.implementation.cache_tag, getattr(sys, "abiflags", "")]
    return [versions, processor, settings, python, [read_beginning(str(KERNELS / each)) for each in SOURCES[""]]]


def read_beginning(path: str) -> bytes:
    """The beginning of a file; empty if there is none."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 18 if path.endswith(".py") else 1 << 12)
    except OSError:
        return b""


def version_file(package: str) -> str:
    """The file with the version of a package, which need not be imported for it."""
    spec = find_spec(package) if package not in sys.modules else getattr(sys.modules[package], "__spec__", None)
    return str(Path(spec.origin).parent / "_version.py") if spec and spec.origin else ""


def folders() -> Iterator[Path]:
    """Folders for the files, the best first: ``HPCCOMM_CACHE``, else one of the user, else one of all users."""
    chosen = os.environ.get("HPCCOMM_CACHE")
    if chosen:
        yield Path(chosen)
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    yield Path(f"{home}/hpccomm/kernels")
    yield Path(f"{KERNELS}/__pycache__")
    private = Path(os.environ.get("TMPDIR", "/tmp")) / f"hpccomm-{os.getuid()}"
    with contextlib.suppress(OSError):
        private.mkdir(mode=0o700, exist_ok=True)
        seen = private.lstat()
        if stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.getuid() and not seen.st_mode & 0o077:
            yield private


def file_name(name: str) -> str:
    """The name of the file of a function."""
    return f"{name}.{key(EMITTED[name][0])}"


def writable_folder() -> Path | None:
    """The first folder that files can be written to."""
    for folder in folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    return None


def missing() -> list[str]:
    """The functions that have no file yet."""
    return [name for name in EMITTED if read(name) is None]


def complete() -> bool:
    """Whether every function has a file."""
    return bool(_COMPLETE) or find_all()


_COMPLETE: list[bool] = []
"""Not empty once all functions have had files."""


def find_all() -> bool:
    """Whether all functions have files that this user can read now; remembered once they have."""
    absent = set(map(file_name, EMITTED))
    for folder in folders():
        with contextlib.suppress(OSError):
            absent -= {
                each for each in absent.intersection(os.listdir(folder)) if os.access(f"{folder}/{each}", os.R_OK)
            }
    found = not absent
    _COMPLETE.extend([True] * found)
    return found


@cache
def compile_in_background() -> Any:
    """Start a process that compiles what is missing while this program goes on, and beyond its end."""
    import subprocess

    command = [sys.executable, "-m", "hpccomm", "warm", "--quiet", "--background"]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True)


def can_compile() -> bool:
    """Whether :func:`compile_in_background` is likely to succeed."""
    return bool(version_file("numba")) and writable_folder() is not None


def describe() -> str:
    """Where the files are, or why there are none."""
    absent = len(missing())
    if absent == len(EMITTED):
        return f"not compiled yet: {why_none() or 'run `hpccomm warm`'}"
    used = {str(folder) for folder in folders() for name in EMITTED if (folder / file_name(name)).exists()}
    return f"{len(EMITTED) - absent} of {len(EMITTED)} in {', '.join(sorted(used))}"


# Reading and writing


def read(name: str) -> bytes | None:
    """The content of the file of a function, if it is as it was written."""
    for folder in folders():
        try:
            with open(f"{folder}/{file_name(name)}", "rb") as file:
                data = file.read()
        except OSError:
            continue
        if data[:9] == checksum(data[9:]):
            return data[9:]
    return None


def checksum(content: bytes) -> bytes:
    """What a file begins with."""
    return b"%08x\n" % zlib.crc32(content)


def compile_for_all(name: str) -> bytes:
    """Compile a function and write its file; only one process does so, others wait and read."""
    from hpccomm.kernels import emission

    folder = writable_folder()
    with lock(folder, name):
        content = read(name)
        if content is None:
            content = pack(*emission.emit(name, *EMITTED[name]))
            write(folder, name, content)
    return content


@contextlib.contextmanager
def lock(folder: Path | None, name: str, wait: bool = True) -> Iterator[bool]:
    """Wait for the process that compiles a function, or see whether there is one: then False.

    Where files cannot be locked each process compiles for itself.
    """
    with contextlib.ExitStack() as stack:
        free = True
        with contextlib.suppress(OSError):
            if folder is not None:
                # a process that closes one of these files gives up all its locks on it
                file = stack.enter_context(open(folder / ("lock" if wait else "lock.trial"), "a"))
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, zlib.crc32(name.encode()))
                except BlockingIOError:
                    free = False
        yield free


def write(folder: Path | None, name: str, content: bytes) -> None:
    """Write a file at once; without a folder or with a full disk the function is compiled again next time."""
    from hpccomm.files import replace_file

    if folder is None:
        return
    with contextlib.suppress(OSError), replace_file(folder / file_name(name), flush=False) as file:
        file.write(checksum(content) + content)


# Loading


def pack(code: bytes, description: dict[str, Any]) -> bytes:
    """A file's content."""
    return json.dumps(description).encode() + b"\n" + code


def place(content: bytes) -> int:
    """Load a function; returns its address."""
    line, _, code = content.partition(b"\n")
    description = json.loads(line)
    loader = place_image if "table" in description else place_object
    return loader(code, **description)


KEPT: list[Any] = []
"""Loaded code, which is never freed."""


def place_image(code: bytes, offset: int, table: int, pointers: list[int], externals: list[str]) -> int:
    """Copy an image of :mod:`hpccomm.kernels.linker` into memory and complete it."""
    memory = mmap.mmap(-1, len(code), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
    memory[:] = code
    base = ctypes.addressof(first := ctypes.c_char.from_buffer(memory))
    for i, name in enumerate(externals):
        ctypes.c_uint64.from_address(base + table + 8 * i).value = external_address(name)
    for each in pointers:
        ctypes.c_uint64.from_address(base + each).value += base
    if protect(base, len(code), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "this system does not let a process run code that it has loaded")
    KEPT.append(first)
    return base + offset


protect = ctypes.CDLL(None, use_errno=True).mprotect
protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@cache
def external_address(name: str) -> int:
    """The address of a function of Python or of the C library."""
    return ctypes.cast(ctypes.pythonapi[name], ctypes.c_void_p).value or 0


def place_object(code: bytes, name: str, externals: list[str]) -> int:
    """Load an object file with LLVM's linker."""
    from llvmlite import binding  # type: ignore[import-untyped]

    for each in externals:
        binding.add_symbol(each, external_address(each))
    target = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    KEPT.append(engine)
    return int(engine.get_function_address(name))
