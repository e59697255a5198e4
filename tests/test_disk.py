"""A full disk or a damaged cache costs a compilation, and no program its life."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

PROGRAM = """
import os, resource, signal, sys, threading
import numpy as np
if sys.argv[1] == "full":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
from hpccomm.kernels.optimizers import loops
start = threading.Barrier(3)
def compile(found=[]):
    start.wait()
    found.append(loops.compile_kernel("add_scaled", "f4"))
    found.append(loops.compile_kernel("scale_tensors", "f4"))
threads = [threading.Thread(target=compile) for _ in range(3)]
for each in threads: each.start()
for each in threads: each.join()
x, one = np.ones(4, "f4"), np.ones(1, "f4")
loops.compile_kernel("add_scaled", "f4")(x, x.copy(), np.array([[0, 4]]), one, np.float32(2))
print(x.tolist(), len(compile.__defaults__[0]))
"""


def run(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    """Run the program with an empty or damaged cache in ``folder``."""
    environ = {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": ":".join(sys.path)}
    command = [sys.executable, "-B", "-c", PROGRAM, how]  # Python would write cut files of its own
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_threads_that_compile_at_once_with_a_full_disk_or_a_damaged_cache(tmp_path: Path) -> None:
    for how in ("full", "well", "cut", "torn"):
        for file in tmp_path.rglob("*.nb[ic]"):
            octets = file.read_bytes()
            file.write_bytes({"cut": octets[:40], "torn": octets[:-9] + b"x" * 9}.get(how, octets))
        done = run(tmp_path, how)
        assert done.returncode == 0, (how, done.stderr)
        assert done.stdout == "[3.0, 3.0, 3.0, 3.0] 6\n"
        assert done.stderr.count("compiled in memory") == (how != "well"), (how, done.stderr)
