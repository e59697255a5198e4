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


@pytest.mark.slow(keep=1)
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
    assert list_lines(done) == [f"sum [2.0, 2.0, 2.0] {rank} 2 hpccomm" for rank in range(2)]


@pytest.mark.slow(keep=1)
def test_one_rank_is_a_group_as_well(tmp_path: Path, entry_point: dict[str, str]) -> None:
    program = write(tmp_path, "dist.init_process_group('hpccomm')\ndist.barrier()\nprint(dist.get_world_size())\n")
    done = run_under_mpi(1, program, environ=entry_point)
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr


LATE = "dist.barrier()\ngroup.set_timeout(timedelta(seconds=1))\ntime.sleep(30 * dist.get_rank())\n"
LATE_RANK = f"import time\nfrom datetime import timedelta\ngroup = dist.new_group()\n{LATE}"
LONG_LIMIT = "import hpccomm.torch.group\nhpccomm.torch.group.DEFAULT_TIMEOUT = timedelta(0)  # half an hour\n"
LATE_EXCHANGE = (
    "import time\nfrom datetime import timedelta\nfrom hpccomm.progress import submit\n"
    "from hpccomm.torch.parameters import communicator\ngroup = dist.new_group()\ncomm = communicator(group)\n"
    f"{LATE}exchange = submit(comm, lambda channel: channel.Barrier(), 'an exchange')\n"
)
DDP = (
    "import time\nfrom datetime import timedelta\ngroup = dist.new_group()\n"
    "ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4), process_group=group)\n"
)
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
        f"{LATE_RANK}dist.all_reduce(torch.ones(8), group=group)",
        ("all_reduce timed out after 1 s: missing ranks: 1",),
    ),
    "a missing rank under DDP": (
        f"{DDP}{LATE}ddp(torch.ones(2, 4)).sum().backward()",
        ("all_reduce timed out after 1 s: missing ranks: 1", "program.py"),
    ),
    "a missing rank of a future": (
        f"{LATE_RANK}dist.all_reduce(torch.ones(8), group=group, async_op=True).get_future().wait()",
        ("all_reduce timed out after 1 s: missing ranks: 1",),
    ),
    "a missing rank with a long limit": (
        f"{LATE_RANK}{LONG_LIMIT}dist.all_reduce(torch.ones(8), group=group)",
        ("missing: rank 1", "rank 0 aborts all ranks: Allreduce", "timed out after 1 s"),
    ),
    "a missing rank with a long limit of a call with a root": (
        f"{LATE_RANK}{LONG_LIMIT}dist.broadcast(torch.ones(8), 0, group=group)",
        ("missing: rank 1", "rank 0 aborts all ranks: broadcast", "timed out after 1 s"),
    ),
    "a missing rank in an exchange of hpccomm": (
        f"{DDP}import hpccomm\nfrom hpccomm.torch import compress\ncompress(ddp, hpccomm.gtc)\n"
        f"{LATE}ddp(torch.ones(2, 4)).sum().backward()",
        ("missing: rank 1", "rank 0 aborts all ranks: bucket 0 of 1", "timed out after 1 s"),
    ),
    "a missing rank in an exchange before an asynchronous call": (
        f"{LATE_EXCHANGE}dist.all_reduce(torch.ones(8), group=group, async_op=True)\nexchange.wait()",
        ("missing: rank 1", "rank 0 aborts all ranks: an exchange", "timed out after 1 s"),
    ),
    "a missing rank of a call beside an exchange": (
        f"{LATE_EXCHANGE}group.set_timeout(timedelta(hours=1))\n"
        "dist.barrier(group=group, timeout=timedelta(seconds=1))",
        ("barrier timed out after 1 s: missing ranks: ",),
    ),
    "another call between those of DDP": (
        "ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))\n"
        "if dist.get_rank() == 0:\n    dist.all_reduce(torch.ones(9), async_op=True)\n"
        "ddp(torch.ones(2, 4)).sum().backward()",
        ("rank 0 called Allreduce(sum, 9 float32), rank 1 called Allreduce(sum, 20 float32)", "program.py"),
    ),
}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_the_job_with_a_traceback(mistake: str, tmp_path: Path, entry_point: dict[str, str]) -> None:
    code, sentences = MISTAKES[mistake]
    program = write(tmp_path, f"dist.init_process_group('hpccomm')\ndist.barrier()\n{code}\ndist.barrier()\n")
    done = run_under_mpi(2, program, timeout=100, environ=entry_point)
    assert done.returncode != 0
    for sentence in sentences:
        assert sentence in done.stderr, done.stderr


@pytest.mark.slow
def test_a_rank_that_crashes_ends_the_job_within_seconds(tmp_path: Path, entry_point: dict[str, str]) -> None:
    program = write(
        tmp_path,
        """
import os, time
dist.init_process_group("hpccomm")
dist.barrier()
if dist.get_rank():
    os.write(2, f"crash {time.time()}\\n".encode())
    raise KeyError("lost")
dist.all_reduce(torch.ones(8))
""",
    )
    done = run_under_mpi(3, program, timeout=100, environ=entry_point)
    ended = time.time()
    assert done.returncode != 0
    assert "KeyError: 'lost'" in done.stderr
    crashes = [float(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("crash ")]
    assert crashes, done.stderr
    assert ended - max(crashes) < 30  # on a quiet machine 2


def write_late(folder: Path, late: int, how: str = "") -> str:
    """A program whose rank ``late`` does not come to the default group while the job lasts."""
    return write(
        folder,
        f"""
import time
from datetime import timedelta
from mpi4py import MPI
import hpccomm.torch.group, hpccomm.torch.meeting
MPI.COMM_WORLD.Barrier()
if MPI.COMM_WORLD.rank == {late}:
    time.sleep(90)
dist.init_process_group("hpccomm", {how}timeout=timedelta(seconds=1))
""",
    )


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_does_not_make_the_default_group_is_missing(
    late: int, tmp_path: Path, entry_point: dict[str, str]
) -> None:
    program = write_late(tmp_path, late, 'init_method="mpi://", ')
    done = run_under_mpi(3, program, timeout=100, environ=entry_point)
    assert done.returncode != 0
    assert f"init_process_group timed out after 1 s, missing: rank {late}" in done.stderr, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 2])
def test_ranks_that_do_not_make_the_default_group_end_under_plain_python(
    late: int, tmp_path: Path, entry_point: dict[str, str]
) -> None:
    program = write_late(tmp_path, late)
    done = run_under_mpi(3, "env", sys.executable, program, timeout=100, environ=entry_point)  # without -m mpi4py
    assert done.returncode != 0
    assert f"init_process_group timed out after 1 s, missing: rank {late}" in done.stderr, done.stderr
    assert "aborts all ranks" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_may_come_to_the_default_group_again(late: int, tmp_path: Path, entry_point: dict[str, str]) -> None:
    program = write(
        tmp_path,
        f"""
from datetime import timedelta
from mpi4py import MPI
world, failures = MPI.COMM_WORLD, 0
if world.rank == {late}:
    for _ in range(2):
        world.recv(tag=1)
while True:
    try:
        dist.init_process_group("hpccomm", init_method="mpi://", timeout=timedelta(seconds=1))
        break
    except RuntimeError as error:
        assert "init_process_group timed out after 1 s" in str(error)
        failures += 1
    if failures == 1 and world.rank != {late}:
        world.send("late", {late}, tag=1)
dist.barrier(dist.new_group())
sys.stdout.write("complete\\n")
""",
    )
    done = run_under_mpi(3, program, timeout=100, environ=entry_point)
    check_lines(done, ["complete"] * 3)


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("seconds", [0.0, 2.0])
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_comes_after_the_others_have_given_up_and_ended_is_told(
    late: int, seconds: float, tmp_path: Path, entry_point: dict[str, str]
) -> None:
    """All ranks end alike.  Two seconds are the limit of the others, who have a second for the answer of rank 0.

    Where the late rank waits for no time, it waits until the others have given up and begin to end.
    """
    program = write(
        tmp_path,
        f"""
import atexit, time
from datetime import timedelta
from pathlib import Path
from mpi4py import MPI
folder, rank = Path({str(tmp_path)!r}), MPI.COMM_WORLD.rank
atexit.register((folder / f"{{rank}}.ending").touch)
import hpccomm.torch.group, hpccomm.torch.meeting
MPI.COMM_WORLD.Barrier()
if rank == {late}:
    time.sleep({seconds})
    while not {seconds} and len([*folder.glob("*.ending")]) < 2:
        time.sleep(0.01)
began = time.monotonic()
try:
    dist.init_process_group("hpccomm", init_method="mpi://", timeout=timedelta(seconds=1))
    dist.barrier()
    sys.stdout.write("made\\n")
except RuntimeError as error:
    assert time.monotonic() - began < 30
    sys.stdout.write(str(error).partition(": ")[2] + "\\n")
""",
    )
    done = run_under_mpi(3, program, timeout=100, environ=entry_point)
    lines = list_lines(done)
    if seconds == 2.0 and lines == ["made"] * 3:
        return
    assert len(lines) == 3, done.stderr
    assert all(line.startswith("init_process_group timed out after 1 s, missing: ") for line in lines), lines
    assert late or any("ranks 1, 2 (ranks 1, 2 timed out before)" in line for line in lines), lines


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("late", [0, 1])
def test_a_group_that_some_ranks_have_given_up_is_made_by_none(
    late: int, tmp_path: Path, entry_point: dict[str, str]
) -> None:
    program = write(
        tmp_path,
        f"""
from datetime import timedelta
from mpi4py import MPI
dist.init_process_group("hpccomm")
if dist.get_rank() == {late}:
    for _ in range(2):
        MPI.COMM_WORLD.recv(tag=1)
try:
    dist.new_group(timeout=timedelta(seconds=1))
except RuntimeError as error:
    sys.stdout.write(str(error).partition(": ")[2] + "\\n")
    if dist.get_rank() != {late}:
        MPI.COMM_WORLD.send(None, {late}, tag=1)
dist.barrier()
dist.barrier(dist.new_group())
""",
    )
    done = run_under_mpi(3, program, timeout=100, environ=entry_point)
    first, *others = list_lines(done)
    assert first.startswith("the group of ranks 0, 1, 2 cannot be made, rank "), done.stdout
    assert " has waited and timed out before: make all ranks call new_group" in first
    wanted = f"the group of ranks 0, 1, 2 was not made in 1 s, missing: rank {late}: "
    assert [line[: len(wanted)] for line in others] == [wanted] * 2, done.stdout


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("progress", ["on", "off"])
def test_a_call_may_have_a_longer_time_limit_than_its_group(
    progress: str, tmp_path: Path, entry_point: dict[str, str]
) -> None:
    program = write(
        tmp_path,
        f"""
import time
from datetime import timedelta
dist.init_process_group("hpccomm")
group = dist.new_group()
{LONG_LIMIT}
dist.barrier()
group.set_timeout(timedelta(seconds=1))
time.sleep(3 * dist.get_rank())
dist.barrier(group=group, timeout=timedelta(hours=2))
group.set_timeout(timedelta(hours=1))
dist.barrier()
sys.stdout.write("complete\\n")
""",
    )
    done = run_under_mpi(2, program, timeout=100, environ={**entry_point, "HPCCOMM_PROGRESS": progress})
    check_lines(done, ["complete"] * 2)


@pytest.mark.slow
def test_a_forked_process_ends_without_its_parents_calls(tmp_path: Path, entry_point: dict[str, str]) -> None:
    text = """
import atexit, os
from datetime import timedelta
from mpi4py import MPI
from hpccomm.errors import TransportError
dist.init_process_group("hpccomm")
x = torch.ones(1)
work = None
if dist.get_rank() == 0:
    work = dist.all_reduce(x, async_op=True)
    child = os.fork()
    if child == 0:
        try:
            work.wait(timedelta(seconds=1))
        except TransportError as error:
            print(error)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(child, 0)
    MPI.COMM_WORLD.send("the child has ended", 1)
else:
    MPI.COMM_WORLD.recv(source=0)
    dist.all_reduce(x)
if work:
    work.wait()
print(f"sum {float(x):g}")
"""
    done = run_under_mpi(2, write(tmp_path, text), environ=entry_point)
    assert done.returncode == 0, done.stderr
    assert "rank 0: all_reduce: this process was forked while the call was under way" in done.stdout
    assert done.stdout.count("sum 2") == 2


def run_under_torchrun(
    program: str, environ: dict[str, str], *more: str, ranks: int = 2
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *more, program]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=100, check=False)


def list_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of a program that has ended well, in alphabetical order: ranks write in any."""
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line)


def check_lines(done: subprocess.CompletedProcess[str], lines: list[str]) -> None:
    """The program has ended well, and has written these lines and no others."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == lines


TRAINING = """
from functools import partial
import hpccomm
from hpccomm import gtc
from hpccomm.torch import LARS, Options, compress  # MPI does not start here
dist.init_process_group("hpccomm", pg_options=Options(reproducible=True))
from mpi4py import MPI
assert MPI.COMM_WORLD.rank == dist.get_rank()
x = torch.full((3,), dist.get_rank() + 1.0)
dist.all_reduce(x)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 2))
compress(model, partial(gtc, density=0.5))
model(torch.ones(1, 4)).sum().backward()
dist.barrier(dist.new_group())
dist.destroy_process_group()
dist.init_process_group("hpccomm")
sys.stdout.write(f"sum {x[0]:g} of {dist.get_world_size()}\\n")
"""


@pytest.mark.slow
def test_torchrun(tmp_path: Path, entry_point: dict[str, str]) -> None:
    done = run_under_torchrun(write(tmp_path, TRAINING), entry_point, ranks=3)
    check_lines(done, ["sum 6 of 3"] * 3)


@pytest.mark.slow
def test_torchrun_starts_ranks_again(tmp_path: Path, entry_point: dict[str, str]) -> None:
    text = """
import os
dist.init_process_group("hpccomm")
dist.barrier()
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt < 1 and dist.get_rank() == attempt:
    os.kill(os.getpid(), 9)
dist.barrier()
sys.stdout.write(f"attempt {attempt}\\n")
"""
    done = run_under_torchrun(write(tmp_path, text), entry_point, "--max-restarts", "1")
    check_lines(done, ["attempt 1"] * 2)


STORE_THAT_STAYS = """
from datetime import timedelta
import time
from pathlib import Path
from hpccomm.torch import monitored_barrier
dist.init_process_group("hpccomm")
dist.new_group([0, 1])
monitored_barrier()
dist.destroy_process_group()
dist.init_process_group("hpccomm")
rank = dist.get_rank()
time.sleep(rank)
group = dist.new_group([0, 1, 2])
x = torch.ones(1)
dist.all_reduce(x, group=group)
came = Path(sys.argv[0]).with_name("rank 2 came")
if rank == 2:
    time.sleep(1)
    came.touch()
monitored_barrier(timeout=timedelta(seconds=30))
sys.stdout.write(f"sum {float(x):g}, waited {came.exists()}\\n")
"""


@pytest.mark.slow
def test_a_second_process_group_under_torchrun_is_as_new(tmp_path: Path, entry_point: dict[str, str]) -> None:
    """The store of torchrun keeps the keys of the first one."""
    done = run_under_torchrun(write(tmp_path, STORE_THAT_STAYS), entry_point, ranks=3)
    check_lines(done, ["sum 3, waited True"] * 3)


@pytest.mark.slow
def test_an_exception_under_torchrun_ends_the_job(tmp_path: Path, entry_point: dict[str, str]) -> None:
    text = """
import time
dist.init_process_group("hpccomm")
if dist.get_rank():
    raise KeyError("lost")
time.sleep(60)
"""
    began = time.monotonic()
    done = run_under_torchrun(write(tmp_path, text), entry_point)
    assert done.returncode != 0
    assert "KeyError: 'lost'" in done.stderr
    assert time.monotonic() - began < 50


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "other", "said"),
    [("3", "time.sleep(60)", "exitcode  : 3"), ("'lost'", "dist.barrier()", "lost"), ("True", "", "exitcode  : 1")],
)
def test_a_rank_that_exits_under_torchrun_ends_the_job_by_its_status(
    status: str, other: str, said: str, tmp_path: Path, entry_point: dict[str, str]
) -> None:
    text = f"""
import time
dist.init_process_group("hpccomm")
try:
    sys.exit(4)
except SystemExit as error:
    assert error.code == 4
dist.barrier()
sys.stderr.write(f"at {{time.time()}}\\n")
if dist.get_rank():
    sys.exit({status})
{other}
"""
    done = run_under_torchrun(write(tmp_path, text), entry_point)
    ended = time.time()
    assert done.returncode != 0
    assert said in done.stderr
    assert ended - max(float(line[3:]) for line in done.stderr.splitlines() if line.startswith("at ")) < 30


@pytest.mark.slow
def test_a_rank_that_exits_by_status_0_under_torchrun_lets_the_others_end(
    tmp_path: Path, entry_point: dict[str, str]
) -> None:
    text = """
import time
dist.init_process_group("hpccomm")
dist.barrier()
if dist.get_rank():
    sys.exit(0)
time.sleep(1)
sys.stdout.write("last\\n")
sys.exit()
"""
    check_lines(run_under_torchrun(write(tmp_path, text), entry_point), ["last"])


ENDS = {
    "rank 1 last": ("time.sleep(rank)", ""),
    "by an exception": ("if rank: raise KeyError('lost')\n    time.sleep(60)", "KeyError: 'lost'"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "method"),
    [("rank 1 last", each) for each in ("fork", "forkserver", "spawn")]
    + [("by an exception", each) for each in ("fork", "spawn")],
)
def test_processes_of_torch_multiprocessing(end: str, method: str, tmp_path: Path, entry_point: dict[str, str]) -> None:
    text, error = ENDS[end]
    program = f"""
import time


def main(rank, file):
    from hpccomm.torch import placeholders

    placeholders.END_SECONDS = 0.1
    dist.init_process_group("hpccomm", init_method=f"file://{{file}}", rank=rank, world_size=2)
    x = torch.ones(1)
    dist.all_reduce(x)
    sys.stdout.write(f"sum {{float(x)}}\\n")
    dist.destroy_process_group()
    {text}


if __name__ == "__main__":
    torch.multiprocessing.start_processes(main, (sys.argv[1],), 2, start_method="{method}")
"""
    command = [sys.executable, write(tmp_path, program), str(tmp_path / "store")]
    began = time.monotonic()
    done = subprocess.run(command, env=entry_point, capture_output=True, text=True, timeout=100, check=False)
    assert time.monotonic() - began < 50
    assert (done.returncode != 0) == bool(error), done.stderr
    assert error in done.stderr
    assert done.stdout.splitlines() == ["sum 2.0"] * 2


REPRODUCIBLE = """
import hashlib
from hpccomm.torch import Options
from hpccomm.train.torch_networks import GPT, gpt_loss

PARTS, STEPS, CONTEXT = 4, 50, 16
torch.set_num_threads(1)
dist.init_process_group("hpccomm")
exact = dist.new_group(pg_options=Options(reproducible=True))


def part_of(step, k):
    generator = torch.Generator().manual_seed(PARTS * step + k)
    return torch.randint(256, (1, CONTEXT + 1), generator=generator)


def flatten(tensors):
    return torch.cat([each.detach().reshape(-1) for each in tensors])


def train(dtype, group):
    # each part of the batch has a gradient of its own, whichever rank computes it, and their sum is in dtype
    torch.manual_seed(1)
    model = GPT(layers=2, width=16, heads=2, context=CONTEXT)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    weights = list(model.parameters())
    for step in range(STEPS):
        total = torch.zeros(sum(each.numel() for each in weights), dtype=dtype)
        for k in range(dist.get_rank(), PARTS, dist.get_world_size()):
            total += flatten(torch.autograd.grad(gpt_loss(model, part_of(step, k)), weights))
        dist.all_reduce(total, group=group)
        for each, gradient in zip(weights, total.split([each.numel() for each in weights])):
            each.grad = (gradient / PARTS).to(each.dtype).view_as(each)
        optimizer.step()
    return hashlib.sha256(flatten(weights).numpy()).hexdigest()


sys.stdout.write(f"{train(torch.float64, exact)} {train(torch.float32, dist.group.WORLD)}\\n")
"""


@pytest.mark.slow
def test_a_reproducible_training_ends_with_one_hash_on_1_2_and_4_ranks(
    tmp_path: Path, entry_point: dict[str, str]
) -> None:
    program, found = write(tmp_path, REPRODUCIBLE), []
    for ranks in (1, 2, 4):
        done = run_under_mpi(ranks, program, environ=entry_point)
        assert done.returncode == 0, done.stderr
        lines = set(done.stdout.split("\n")) - {""}
        assert len(lines) == 1
        found.append(lines.pop().split())
    assert len({exact for exact, _ in found}) == 1
    assert len({plain for _, plain in found}) > 1  # sums of float32 round differently


TOO_EARLY = {
    "MPI": (
        "from mpi4py import MPI\nassert MPI.COMM_WORLD.size == 1\ndist.init_process_group('hpccomm')",
        ("MPI has started on ranks 0, 1 before init_process_group", "hpccomm-run -n 2"),
    ),
    "a communicator": (
        "from hpccomm import Communicator\nfrom mpi4py import MPI\nCommunicator(MPI.COMM_WORLD)",
        ("MPI has not started: under torchrun, torch.distributed.init_process_group('hpccomm') starts it",),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", TOO_EARLY)
def test_what_comes_before_the_process_group_is_refused(what: str, tmp_path: Path, entry_point: dict[str, str]) -> None:
    text, sentences = TOO_EARLY[what]
    done = run_under_torchrun(write(tmp_path, text + "\n"), entry_point)
    assert done.returncode != 0
    for sentence in sentences:
        assert sentence in done.stderr


__all__ = ["entry_point"]
