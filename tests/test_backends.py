"""Every backend of the table takes a call and gives MPI's result, or is refused by name before the first message."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator
from hpccomm.backends import cuda_ipc, nccl, schedules, shared
from hpccomm.backends.table import BACKENDS
from hpccomm.calls.blocks import EQUAL, NONE, PARTS, SIGNATURES
from hpccomm.calls.entry import COLLECTIVES
from hpccomm.calls.reader import READERS
from hpccomm.collectives import ALGORITHMS

N = 6
"""Elements of a block."""
FAMILIES = {form.family for form in SIGNATURES.values() if form.family}
OURS = [name for name, form in SIGNATURES.items() if form.family and name != "Barrier"]


def test_the_tables_name_the_same_collectives() -> None:
    assert set(READERS) == set(SIGNATURES)
    assert {name.lower() for name in SIGNATURES} - set(COLLECTIVES) == {"alltoallw"}
    assert set(shared.BINDERS) == FAMILIES
    assert set(schedules.WORKSPACES) == set(ALGORITHMS)
    assert set(cuda_ipc.PHASES) == FAMILIES - {"barrier"}
    assert set(nccl.CALLS) <= set(SIGNATURES)


def test_the_table_has_a_row_for_every_backend_of_the_design() -> None:
    assert [name for name, row in BACKENDS.items() if not row.on_device] == ["native", "shared", "schedules"]
    assert [name for name, row in BACKENDS.items() if row.on_device] == ["nccl", "ipc", "aware", "staged"]


LAST = MPI.Op.Create(lambda a, b, datatype: None, commute=False)
"""The highest rank's operand: an operation that does not commute."""
CALLS = [
    *itertools.product(OURS, ("plain", "in place")),
    *((name, "not commutative" if "op" in SIGNATURES[name].arguments else "derived") for name in OURS),
]


def buffers_of(name: str, rank: int, p: int, kind: str) -> list[Any]:
    """The buffers of a call: the one to send, if there is one, and that to receive into."""
    form = SIGNATURES[name]
    blocks = {NONE: 0, EQUAL: p, PARTS: p}
    sent = p if "recvcounts" in form.arguments else blocks.get(form.send, 1)
    arrays = [np.arange(N * sent) + 100 * rank, np.arange(N * blocks.get(form.recv, 1)) - 7 - rank]
    if kind == "in place":
        arrays = [MPI.IN_PLACE, arrays[0] if sent > 1 else arrays[1]]
    return arrays if form.send != NONE else arrays[1:]


def run(comm: Any, name: str, kind: str, pair: MPI.Datatype, algorithm: str | None) -> Any:
    """Make a call; returns what this rank has received."""
    form, p = SIGNATURES[name], comm.size
    buffers = buffers_of(name, comm.rank, p, kind)
    into = buffers[-1]
    if kind == "derived":
        buffers = [[each, N // 2, pair] for each in buffers]
    op = LAST if kind == "not commutative" else MPI.SUM
    rest = {"op": op, "root": p - 1, "recvcounts": [N] * p}
    if kind == "in place" and "root" in form.arguments and form.send != NONE and comm.rank != p - 1:
        buffers = [into, None]
    given = [*buffers, *(rest[each] for each in form.arguments)]
    getattr(comm, name)(*given) if algorithm is None else getattr(comm, name)(*given, algorithm=algorithm)
    return into[:N] if form.family == "reduce_scatter" else into  # in place the rest is MPI's


@pytest.mark.mpi(sizes=(1, 2, 3, 5), timeout=120)
@pytest.mark.parametrize(("name", "kind"), CALLS)
def test_every_algorithm_gives_the_result_of_mpi_or_is_refused_by_name(
    comm: Communicator, name: str, kind: str
) -> None:
    form, pair = SIGNATURES[name], MPI.INT64_T.Create_contiguous(2).Commit()
    want = run(comm.private_comm, name, kind, pair, None)
    for algorithm in comm.algorithms(form.family):
        known = comm.context.algorithms(form.family).get(algorithm)
        ordered = algorithm in ("auto", "native") or (known is not None and known.ordered)
        if kind == "not commutative" and not ordered:
            words = f"{name}: algorithm={algorithm!r} cannot apply this operation in rank order"
            with pytest.raises(ArgumentError, match=words):
                run(comm, name, kind, pair, algorithm)
        else:
            assert np.array_equal(run(comm, name, kind, pair, algorithm), want), algorithm
    pair.Free()


@pytest.mark.mpi(sizes=(1, 2, 3, 5), timeout=60)
def test_a_derived_datatype_is_gathered_into_blocks_of_any_length(comm: Communicator) -> None:
    pair = MPI.INT64_T.Create_contiguous(2).Commit()
    counts = [2 * (k + 1) for k in range(comm.size)]
    displs = [sum(counts[k + 1 :]) + 1 for k in range(comm.size)]  # the last rank's block comes first
    mine = np.arange(counts[comm.rank]) + 100 * comm.rank
    want = np.full(sum(counts) + 2, -1)
    for k, (count, displ) in enumerate(zip(counts, displs, strict=True)):
        want[displ : displ + count] = np.arange(count) + 100 * k
    for algorithm in comm.algorithms("allgather"):
        got = np.full_like(want, -1)
        comm.Allgatherv([mine, comm.rank + 1, pair], [got, counts, displs, MPI.INT64_T], algorithm=algorithm)
        assert np.array_equal(got, want), algorithm
    pair.Free()


@pytest.mark.mpi(sizes=(2, 3), timeout=60)
def test_ranks_may_describe_the_same_elements_by_different_datatypes(comm: Communicator) -> None:
    pair = MPI.INT64_T.Create_contiguous(2).Commit()
    for name in ("Allgather", "Allgatherv"):
        for algorithm in comm.algorithms("allgather"):
            mine, got = np.arange(4) + comm.rank, np.zeros(4 * comm.size, int)
            into = [got, 2, pair] if comm.rank == 0 else got
            getattr(comm, name)(mine, into, algorithm=algorithm)
            assert np.array_equal(got.reshape(-1, 4), np.arange(4) + np.arange(comm.size)[:, None]), (name, algorithm)
    pair.Free()


@pytest.mark.mpi(sizes=(2, 3), timeout=60)
def test_a_derived_datatype_of_another_size_than_the_block_is_refused(comm: Communicator) -> None:
    pair = MPI.INT64_T.Create_contiguous(2).Commit()
    for algorithm in set(comm.algorithms("allgather")) - {"auto", "native"}:
        with pytest.raises(ArgumentError, match="sends 16 bytes, the receive buffer has room for 32 from this rank"):
            comm.Allgather([np.zeros(2, int), 1, pair], np.zeros(4 * comm.size, int), algorithm=algorithm)
    pair.Free()


@pytest.mark.mpi(sizes=(2, 3), timeout=60)
def test_a_persistent_call_counts_the_elements_of_every_form_alike(comm: Communicator) -> None:
    p, n = comm.size, 3
    for in_place in (False, True):
        x, y = np.ones(n * p), np.zeros(n)
        form = x if comm.rank else [x, n, MPI.DOUBLE]
        request = comm.Reduce_scatter_block_init(*((MPI.IN_PLACE, form) if in_place else (form, y)))
        request.Start()
        request.Wait()
        request.Free()
        assert ((x if in_place else y)[:n] == p).all()
