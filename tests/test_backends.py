"""Every backend of the table takes a call and gives MPI's result, or is refused by name before the first message."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator
from hpccomm.backends import cuda_ipc, nccl, pairwise, schedules, shared
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
    on_host = {name for name, row in BACKENDS.items() if not row.on_device}
    assert {"native", "shared", "schedules", "pairwise"} <= on_host
    assert {"nccl", "ipc", "aware", "staged"} <= {name for name, row in BACKENDS.items() if row.on_device}


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


@pytest.mark.mpi(sizes=(1, 2, 3), timeout=60)
@pytest.mark.parametrize("derived", ["send", "recv"])
def test_a_reduction_of_one_derived_and_one_contiguous_buffer_is_refused(comm: Communicator, derived: str) -> None:
    """Packing one of them would reduce as many elements as it has, whatever the other has."""
    triple = MPI.INT64_T.Create_contiguous(3).Commit()
    for name, algorithm in itertools.product(
        ("Allreduce", "Reduce", "Reduce_scatter_block", "Scan"), comm.algorithms("allreduce")
    ):
        p = comm.size if name == "Reduce_scatter_block" else 1
        x, y = np.ones(3 * p, int), np.zeros(2, int)
        buffers = [[x, p, triple], y] if derived == "send" else [x, [y, 0, triple]]
        named = {} if name == "Scan" else {"algorithm": algorithm}
        if name != "Scan" and algorithm not in comm.algorithms(SIGNATURES[name].family):
            continue
        if name == "Reduce" and comm.rank:
            continue  # only the root has both
        with pytest.raises(ArgumentError, match=f"{name}: one buffer has a derived datatype, the other has not"):
            getattr(comm, name)(*buffers, **named)
        assert not y.any()
    triple.Free()


@pytest.mark.mpi(sizes=(2, 3), timeout=60)
@pytest.mark.parametrize("direction", ["Gather", "Scatter"])
def test_the_root_may_be_in_place_with_a_derived_datatype(comm: Communicator, direction: str) -> None:
    triple, p, root = MPI.INT64_T.Create_contiguous(3).Commit(), comm.size, comm.size - 1
    whole, mine = np.arange(3 * p), np.arange(3) + 3 * comm.rank
    if direction == "Gather":
        got = np.where(np.arange(3 * p) // 3 == root, whole, -1)
        comm.Gather(*((MPI.IN_PLACE, [got, triple]) if comm.rank == root else (mine, None)), root=root)
        assert comm.rank != root or np.array_equal(got, whole)
    else:
        got = np.zeros(3, int)
        comm.Scatter(*(([whole, triple], MPI.IN_PLACE) if comm.rank == root else (None, got)), root=root)
        assert comm.rank == root or np.array_equal(got, mine)
    triple.Free()


@pytest.mark.mpi(sizes=(1, 2, 3), timeout=60)
@pytest.mark.parametrize("name", ["Scan", "Exscan", "Allreduce"])
def test_overlapping_buffers_are_refused_in_every_call_of_their_kind(comm: Communicator, name: str) -> None:
    for _ in range(4):
        getattr(comm, name)(np.ones(2), np.ones(2))
    x = np.zeros(3)
    for _ in range(6):
        with pytest.raises(ArgumentError, match=f"{name}: the buffers overlap"):
            getattr(comm, name)(x[:2], x[1:])


@pytest.mark.mpi(sizes=(1, 2, 3), timeout=60)
def test_a_numpy_scalar_in_a_form_lives_as_long_as_its_call(comm: Communicator) -> None:
    for k in range(20):
        y = np.zeros(comm.size)
        comm.Allgather([np.float64(k + comm.rank), MPI.DOUBLE], y)
        assert np.array_equal(y, k + np.arange(comm.size))
        comm.Gather([np.float64(k - comm.rank), MPI.DOUBLE], y)
        assert comm.rank or np.array_equal(y, k - np.arange(comm.size))


@pytest.mark.mpi(sizes=(1, 2), timeout=60)
def test_no_counts_for_a_reduce_scatter_are_refused(comm: Communicator) -> None:
    with pytest.raises(ArgumentError, match=r"recvcounts \(\) for .* rank.*: pass one count per rank"):
        comm.Reduce_scatter(np.zeros(3), np.zeros(3), recvcounts=[])


@pytest.mark.mpi(sizes=(1, 2, 3, 5), timeout=60)
def test_pairwise_exchange_cuts_blocks_into_windows_and_segments(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of any length arrive, also in place, in forms with a count, and in non-blocking calls that overlap."""
    monkeypatch.setattr(pairwise, "SEGMENT_BYTES", 24)
    monkeypatch.setattr(pairwise, "WINDOW_BYTES", 72)
    comm = Communicator(comm, algorithm="pairwise")
    p, me = comm.size, comm.rank
    for n in (0, 1, 23, 24, 25, 71, 72, 73, 144, 200):
        given = [np.arange(n * p, dtype=np.uint8) + 7 * rank for rank in range(p)]
        want = np.concatenate([each[n * me : n * (me + 1)] for each in given])
        for _ in range(2):
            got, place = np.zeros_like(want), given[me].copy()
            comm.Alltoall(given[me], got)
            comm.Alltoall(MPI.IN_PLACE, place)
            assert np.array_equal(got, want), n
            assert np.array_equal(place, want), n
        send, place, got = given[me], given[me].copy(), np.zeros_like(want)
        room = np.zeros(n * p + 5, np.uint8)
        comm.Alltoall(send, [got, n, MPI.BYTE] if me else got)
        comm.Alltoall(MPI.IN_PLACE, [place, n, MPI.BYTE])
        comm.Alltoall([send, n, MPI.BYTE], [room, n, MPI.BYTE])
        for each in (got, place, room[: n * p]):
            assert np.array_equal(each, want), n
        several = [np.zeros_like(want) for _ in range(3)]
        MPI.Request.Waitall([comm.Ialltoall(given[me], each) for each in several])
        assert all(np.array_equal(each, want) for each in several), n
