"""Programs that import nothing of ours: how they start, and how mistakes end them."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch_world import entry_point

from hpccomm.testing.jobs import run_under_mpi

START = """
import sys
import torch
import torch.distributed as dist
"""


def write(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(START + text)
    return str(path)


def test_three_lines(tmp_path: Path, entry_point: dict[str, str]) -> None:
    program = write(
        tmp_path,
        """
assert not [name for name in sys.modules if name.startswith(("mpi4py.MPI", "numba", "hpccomm.communicator"))]
dist.init_process_group("hpccomm")
x = torch.ones(3, dtype=torch.bfloat16)
dist.all_reduce(x)
import os
print("sum", x.tolist(), os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], dist.get_backend())
dist.destroy_process_group()
dist.init_process_group("hpccomm", init_method="mpi://")
dist.barrier()
dist.destroy_process_group()
""",
    )
    done = run_under_mpi(2, program, environ=entry_point)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in done.stdout.splitlines() if line) == [
        f"sum [2.0, 2.0, 2.0] {rank} 2 hpccomm" for rank in range(2)
    ]


def test_one_rank_is_a_group_as_well(tmp_path: Path, entry_point: dict[str, str]) -> None:
    program = write(tmp_path, "dist.init_process_group('hpccomm')\ndist.barrier()\nprint(dist.get_world_size())\n")
    done = run_under_mpi(1, program, environ=entry_point)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


MISTAKES = {
    "operation": (
        "dist.all_reduce(torch.ones(8), dist.ReduceOp.MAX if dist.get_rank() else dist.ReduceOp.SUM)",
        ("rank 0 called Allreduce(sum, 8 float32), rank 1 called Allreduce(max, 8 float32)", "program.py"),
    ),
    "asynchronous shapes": (
        "dist.all_reduce(torch.ones(8 + dist.get_rank()), async_op=True).wait()",
        ("rank 0 called Allreduce(sum, 8 float32), rank 1 called Allreduce(sum, 9 float32)", "program.py"),
    ),
    "a rank that has ended": (
        "if dist.get_rank() == 0:\n    dist.all_reduce(torch.ones(8))",
        ("rank 1", "Allreduce(sum, 8 float32)"),
    ),
    "a rank that has crashed": (
        "if dist.get_rank():\n    raise KeyError('lost')\ndist.all_reduce(torch.ones(8))",
        ("KeyError: 'lost'", "program.py"),
    ),
    "a group that a rank does not make": (
        "import sys\nif dist.get_rank():\n    sys.exit()\ndist.new_group()",
        ("rank 0: the group of ranks 0, 1 cannot be made, rank 1 left the program before: make all ranks",),
    ),
    "groups of other ranks": (
        "dist.new_group([0, 1] if dist.get_rank() else [0])\ndist.new_group([0] if dist.get_rank() else [0, 1])",
        ("rank 1: the group of ranks 0, 1: rank 0 makes one of ranks 0: make all ranks call new_group",),
    ),
    "a message from a rank that has ended": (
        "import sys\nif dist.get_rank():\n    sys.exit()\ndist.recv(torch.ones(3), 1)",
        ("rank 0: recv of 12 bytes (3 torch.float32) from rank 1: the other rank has left the program",),
    ),
    "a missing rank": (
        "from datetime import timedelta\n"
        "group = dist.new_group(timeout=timedelta(seconds=1))\n"
        "import time\n"
        "time.sleep(9 * dist.get_rank())\n"
        "dist.all_reduce(torch.ones(8), group=group)",
        ("all_reduce timed out after 1 s: missing ranks: 1",),
    ),
}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_job_with_a_traceback(mistake: str, tmp_path: Path, entry_point: dict[str, str]) -> None:
    code, sentences = MISTAKES[mistake]
    program = write(tmp_path, f"dist.init_process_group('hpccomm')\ndist.barrier()\n{code}\ndist.barrier()\n")
    began = time.monotonic()
    done = run_under_mpi(2, program, timeout=100, environ=entry_point)
    assert time.monotonic() - began < 90
    assert done.returncode != 0
    for sentence in sentences:
        assert sentence in done.stderr, done.stderr


def test_without_an_mpi_launcher_the_error_names_ours(tmp_path: Path, entry_point: dict[str, str]) -> None:
    program = write(tmp_path, "dist.init_process_group('hpccomm')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", program]
    done = subprocess.run(command, env=entry_point, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode != 0
    assert "hpccomm-run -n 2" in done.stderr


__all__ = ["entry_point"]
