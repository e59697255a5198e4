"""What a program pays before its first collective: files, modules, messages and communicators of MPI."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm import context
from hpccomm.errors import ArgumentError

PROGRAM = """
import sys
before, opened = set(sys.modules), []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
import numpy as np
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
for each in (comm, comm.Dup(), comm.intra_node, comm.inter_node):
    each.Allreduce(np.ones(3), np.empty(3))
tables = [name for name in opened if name.endswith("tuning_default.json")]
print(len(tables), *sorted(set(sys.modules) - before))
"""

OF_OTHER_PROGRAMS = (
    "argparse",
    "asyncio",
    "decimal",
    "difflib",
    "fractions",
    "hashlib",
    "inspect",
    "logging",
    "subprocess",
    "tempfile",
    "hpccomm.device_planner",
    "hpccomm.algorithms",
    "hpccomm.collectives.compressed",
    "hpccomm.files",
    "hpccomm.kernels.numba_check",
    "hpccomm.kernels.shared_memory.probe",
    "hpccomm.observe.nesting",
    "hpccomm.performance.cost",
    "hpccomm.transports.cuda",
    "numba",
)
"""Modules for other programs: commands, proofs, prices, devices, compressed collectives, errors; and the compiler."""


def test_a_program_imports_what_it_uses_and_reads_the_table_once() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    tables, *modules = done.stdout.split()
    assert tables == "1"
    assert "hpccomm.planner" in modules
    unneeded = [each for each in OF_OTHER_PROGRAMS if each in modules]
    assert unneeded == [each for each in unneeded if each in list_imports_of_mpi4py()]


def list_imports_of_mpi4py() -> list[str]:
    """The modules that NumPy and mpi4py import themselves."""
    code = "import sys, numpy, mpi4py.MPI; print(*sys.modules)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


BLOCKS = """
import ctypes, sys
import numpy as np
from mpi4py import MPI
import hpccomm
mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = type("Info", (ctypes.Structure,), {"_fields_": [(f"f{k}", ctypes.c_int) for k in range(10)]})
if sys.argv[1:] == ["ours"]:
    hpccomm.Communicator(MPI.COMM_SELF)
before = mallinfo().f3
array = np.empty(3 << 20, np.uint8)
print(mallinfo().f3 - before)
"""
"""How many blocks the C library has mapped for an array, which it gives back to the kernel with that."""


@pytest.mark.parametrize(("whose", "blocks"), [("ours", 0), ("mpi4py", 1)])
def test_arrays_take_the_memory_that_others_have_freed(whose: str, blocks: int) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKS, whose], capture_output=True, text=True, check=True)
    assert int(done.stdout) == blocks


@pytest.mark.mpi(sizes=(1, 2, 3))
def test_levels_on_one_node_cost_no_message(comm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = hpccomm.Communicator(comm.Dup())
    if made.rank == 0:  # no other rank takes part
        assert (made.intra_node.size, made.inter_node.size) == (made.size, 1)
        assert made.intra_node.layout.per_node == made.layout.per_node
        assert made.inter_node.layout.size == 1
        assert made.intra_node.context.settings is made.context.settings
        assert made.intra_node.context.table is made.context.table
    for level in (made.intra_node, made.inter_node):
        level.Allreduce(np.full(3, level.rank + 1), total := np.empty(3, int))
        assert total.tolist() == [level.size * (level.size + 1) // 2] * 3
    assert MPI.Comm.Compare(made, made.intra_node) in (MPI.CONGRUENT, MPI.IDENT)
    assert made.intra_node != made, "messages of a level never meet those of the communicator"
    assert (made.intra_node.intra_node.size, made.inter_node.intra_node.size) == (made.size, 1)
    made.Free()


@pytest.mark.mpi(sizes=(1, 2, 3, 5))
@pytest.mark.parametrize("per_node", [1, 2, 3])
def test_levels_on_several_nodes_are_those_of_the_layout(
    comm: Any, monkeypatch: pytest.MonkeyPatch, per_node: int
) -> None:
    """Nodes in turn, so that ranks of a node are not consecutive; the last node may have fewer ranks."""
    nodes = -(-comm.size // per_node)
    monkeypatch.setattr(
        context, "ranks_of_this_node", lambda channel: channel.Split(channel.rank % nodes, channel.rank)
    )
    made = hpccomm.Communicator(comm.Dup())
    node, place = made.rank % nodes, made.rank // nodes
    mine = [r for r in range(made.size) if r % nodes == node]
    channel = [r for r in range(made.size) if r // nodes == place]
    for level, ranks, count in ((made.intra_node, mine, 1), (made.inter_node, channel, len(channel))):
        assert (level.size, level.layout.count, level.layout.size) == (len(ranks), count, len(ranks))
        level.Allgather(np.array([made.rank]), found := np.empty(level.size, int))
        assert found.tolist() == ranks
        total = np.array([made.rank])
        level.Allreduce(MPI.IN_PLACE, total)
        assert total[0] == sum(ranks)
    made.Free()


@pytest.mark.mpi(sizes=(2,))
def test_a_mismatch_in_a_level_is_told(comm: Any) -> None:
    level = hpccomm.Communicator(comm.Dup()).intra_node
    with pytest.raises(hpccomm.MismatchError, match="Allreduce"):
        level.Allreduce(np.ones(3 + level.rank), np.empty(3 + level.rank))


@pytest.mark.mpi(sizes=(1, 2))
def test_a_level_that_was_freed_is_not_made_again(comm: Any) -> None:
    made = hpccomm.Communicator(comm.Dup())
    made.intra_node.Barrier()
    made.intra_node.Free()
    with pytest.raises(ArgumentError, match="intra_node has been freed"):
        _ = made.intra_node
    assert made.inter_node.size == 1
    made.Allreduce(np.ones(2), np.empty(2))
    made.Free()


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize(("folder", "lines"), [(None, 1), ("/somewhere", 0)])
def test_rank_0_says_once_that_compiled_functions_can_be_kept_nowhere(
    folder: str | None, lines: int, comm: hpccomm.Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, said = hpccomm.Communicator(comm.Dup()), list[str]()
    ours.Barrier()
    if ours.context.consistency is None:
        pytest.skip("there is no consistency table here")
    monkeypatch.setitem(ours.context.settings, "HPCCOMM_COMPILE", "background")
    monkeypatch.setattr(context.watchdog, "log_line", said.append)
    monkeypatch.setattr(context.objects, "complete", lambda: False)
    monkeypatch.setattr(context.objects, "can_compile", lambda: False)
    monkeypatch.setattr(context.objects, "writable_folder", lambda: folder)
    context.tell_no_folder.cache_clear()
    assert not any(ours.context.must_await_code() for _ in range(2))
    assert sum("set HPCCOMM_CACHE" in each for each in said) == (lines if ours.rank == 0 else 0)
    context.tell_no_folder.cache_clear()
    ours.Free()
