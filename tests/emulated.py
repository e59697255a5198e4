"""The CUDA kernels' own sources, compiled for this processor (``cuda_on_cpu.h``), for NumPy or a fake library."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpccomm.kernels.cuda import every_reduction, reduction_source, source

FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread")
HEADER = Path(__file__).parent / "cuda_on_cpu.h"


@cache
def text_of(name: str) -> str:
    """A whole source; reductions with all operations and dtypes."""
    return reduction_source(*every_reduction()) if name == "reductions" else source(name)


@cache
def library(name: str) -> ctypes.CDLL:
    """A source's kernels as a shared library, compiled once for all processes; skips without a compiler."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine: install g++")
    text = HEADER.read_text() + text_of(name)
    folder = Path(tempfile.gettempdir()) / f"hpccomm-emulated-{os.getuid()}"
    made = folder / f"{name}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.so"
    if not made.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = made.with_suffix(f".{os.getpid()}.cpp")
        unfinished.write_text(text)
        subprocess.run([compiler, *FLAGS, "-o", str(unfinished.with_suffix(".so")), str(unfinished)], check=True)
        unfinished.unlink()
        unfinished.with_suffix(".so").replace(made)
    return ctypes.CDLL(str(made))


class Emulated:
    """Kernels on this processor; arrays are ``xp``'s, NumPy's or those of a library that keeps NumPy's as ``host``."""

    processors = 1

    def __init__(self, xp: Any = np) -> None:
        self.xp = xp
        self.launched: list[str] = []

    def launch(self, source: str, kernel: str, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        assert self.xp is np or not any(isinstance(each, np.ndarray) for each in arguments), "the host's array"
        bare = [getattr(each, "host", each) for each in arguments]
        for each in bare:
            assert not isinstance(each, np.ndarray) or each.flags.c_contiguous
        kept = [
            np.array(each.__array_interface__["data"][0], np.uint64) if isinstance(each, np.ndarray) else np.array(each)
            for each in bare
        ]
        addresses = (ctypes.c_void_p * len(kept))(*(each.__array_interface__["data"][0] for each in kept))
        name = next(name for name in ("reductions", "compression", "optimizers") if f'#line 1 "{name}.cu"' in source)
        self.launched.append(kernel)
        getattr(library(name), kernel)(blocks, threads, addresses)
