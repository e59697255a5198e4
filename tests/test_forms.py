"""Every form of a buffer that mpi4py takes means the same here; what mpi4py cannot take is refused by name."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator, requests
from hpccomm.calls.plans import member_key

VECTOR = MPI.DOUBLE.Create_vector(2, 1, 2).Commit()
"""Two doubles with a gap of one between them: 24 bytes."""
PAIR = np.dtype([("v", "f8"), ("i", "i4")], align=True)


def fill(dtype: str = "f8", n: int = 8) -> Any:
    """The numbers 0, 1, …."""
    return np.arange(n).astype(dtype)


# Blocks of any length


def move(comm: Any, name: str, x: Any, y: Any, count: int, first: int, into: int) -> None:
    """Send ``count`` elements of ``x`` from ``first`` to every rank, which receives them in ``y`` from ``into``."""
    p, root = comm.size, comm.rank == 0
    sent, received = ([count] * p, [first] * p), ([count] * p, [into + count * k for k in range(p)])
    if name == "Alltoallv":
        comm.Alltoallv([x, sent], [y, received])
    elif name == "Gatherv":
        comm.Gatherv(x[:count], [y, received] if root else None)
    else:
        comm.Scatterv([x, sent] if root else None, y[:count])


def takes(comm: Any, form: Any, errors: type[Exception]) -> bool:
    """Whether a communicator broadcasts a form, or refuses it by one of these errors."""
    try:
        comm.Bcast(form)
    except errors:
        return False
    return True


@pytest.mark.mpi(sizes=(1, 2), timeout=60)
@pytest.mark.parametrize("name", ["Alltoallv", "Gatherv", "Scatterv"])
@pytest.mark.parametrize("dtype", ["f2", "f8", "i4"])
def test_another_layout_on_the_same_memory_is_another_call(comm: Communicator, name: str, dtype: str) -> None:
    comm.Barrier()
    x, y = fill(dtype), np.zeros(8, dtype)
    for turn in [(2, 0, 0), (2, 4, 2), (1, 3, 4), (2, 0, 0)]:
        if comm.plans.entry:
            comm.plans.entry.clear()  # as it does when it is full
        y[:], want = 0, np.zeros(8)
        move(comm.private_comm, name, fill(), want, *turn)
        move(comm, name, x, y, *turn)
        assert np.array_equal(y, want), turn


@pytest.mark.parametrize("pair", [([2, 3], (2, 3)), ([2, [1]], (2, [1])), ([[1], [2]], ([1], [2]))])
def test_a_tuple_of_counts_and_displacements_has_another_key_than_a_list_of_counts(pair: tuple[Any, Any]) -> None:
    assert len({member_key(each) for each in pair}) == 2


COUNTS = [(2, [1]), (2, (1,)), (2, np.array([1])), ([2], 1), ([2], [1]), (np.array([2]), [1]), [2], np.array([2]), 2]


@pytest.mark.mpi(sizes=(1,), timeout=60)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("name", ["Gatherv", "Allgatherv", "Igatherv"])
def test_counts_and_displacements_are_those_of_mpi4py(comm: Communicator, name: str, counts: Any) -> None:
    got, want = np.zeros(8), np.zeros(8)
    for each, into in ((comm, got), (comm.private_comm, want)):
        request = getattr(each, name)(np.ones(2), [into, counts, MPI.DOUBLE])
        if request:
            request.Wait()
    assert np.array_equal(got, want)


@pytest.mark.mpi(sizes=(2,), timeout=60)
def test_an_array_of_counts_of_a_non_blocking_call_is_copied_as_counts(comm: Communicator) -> None:
    counts, x, y = np.array([2, 3]), fill(n=2 + comm.rank), np.full(8, -1.0)
    comm.Iallgatherv(x, [y, counts, MPI.DOUBLE]).Wait()
    assert y.tolist() == [0, 1, 0, 1, 2, -1, -1, -1]
    counts, r = np.array([3, 3]), np.zeros(3)
    request = comm.Ireduce_scatter(fill(n=6), r, counts)
    counts[:] = 0
    request.Wait()
    assert np.array_equal(r, 2 * fill(n=6)[3 * comm.rank :][:3])


# One block

ONE_BLOCK: list[Any] = [
    [2, 1],
    (2, 1),
    [2, 0],
    (None, 3),
    [None, 3],
    2,
    np.int64(2),
    np.array(2),
    None,
    [1],
    (1,),
    (1, 2, 3),
    [1, 1, 1],
    np.array([1, 1]),
    np.array([1]),
    range(2),
    2.0,
    ([1], 0),
    (1, [0]),
]
CALLS: dict[str, Callable[[Any, Any, Any], None]] = {
    "Allreduce": lambda comm, send, recv: comm.Allreduce(send, recv),
    "Reduce": lambda comm, send, recv: comm.Reduce(send, recv),
    "Bcast": lambda comm, send, recv: comm.Bcast(recv),
    "Alltoall": lambda comm, send, recv: comm.Alltoall(send, recv),
    "Allgather": lambda comm, send, recv: comm.Allgather(send, recv),
    "Gather": lambda comm, send, recv: comm.Gather(send, recv),
    "Scatter": lambda comm, send, recv: comm.Scatter(send, recv),
    "Scan": lambda comm, send, recv: comm.Scan(send, recv),
    "Iallreduce": lambda comm, send, recv: comm.Iallreduce(send, recv).Wait(),
    "Ibcast": lambda comm, send, recv: comm.Ibcast(recv).Wait(),
}


def attempt(comm: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """What a call leaves in its receive buffer; None if it is refused."""
    x, y = fill() + 1, np.full(8, -1.0)
    refused = ArgumentError if isinstance(comm, Communicator) else (TypeError, ValueError)
    try:
        CALLS[name](comm, make(x), make(y))
    except refused:
        assert (y == -1).all()
        return None
    return y.tolist()


@pytest.mark.mpi(sizes=(1,), timeout=60)
@pytest.mark.parametrize("name", CALLS)
def test_one_count_and_displacement_are_those_of_mpi4py(comm: Communicator, name: str) -> None:
    for numbers in ONE_BLOCK:
        for last in ((MPI.DOUBLE,), ()):
            make = partial(lambda array, numbers, last: [array, numbers, *last], numbers=numbers, last=last)
            assert attempt(comm, name, make) == attempt(comm.private_comm, name, make), (numbers, last)


@pytest.mark.mpi(sizes=(1,), timeout=60)
def test_forms_that_mpi4py_refuses_are_refused_and_those_that_it_takes_are_taken(comm: Communicator) -> None:
    record = np.dtype([("v", "f8"), ("i", "i8")])
    forms: dict[str, Callable[[], Any]] = {
        "records": lambda: [np.zeros(2, record), 2],
        "objects": lambda: [np.array([1, "a"], object), 2],
        "times": lambda: [np.zeros(3, "M8[s]"), 1],
        "words": lambda: [np.zeros(2, "S4"), 2],
        "void": lambda: [np.zeros(2, "V8"), 2],
        "half an element": lambda: [np.zeros(3, "f4"), MPI.DOUBLE],
        "half an element, None": lambda: [np.zeros(3, "f4"), None, MPI.DOUBLE],
        "records as bytes": lambda: [np.zeros(2, record), MPI.BYTE],
        "characters": lambda: [np.zeros(2, "S1"), 2],
        "wide characters": lambda: [np.zeros(2, "U1"), 2],
        "a count of what fits": lambda: [np.zeros(3, "f4"), 1, MPI.DOUBLE],
        "nothing": lambda: [np.zeros(0, "f4"), MPI.DOUBLE],
        "pairs": lambda: [np.zeros(2, PAIR), 2, MPI.DOUBLE_INT],
        "pairs, None": lambda: [np.zeros(2, PAIR), None, MPI.DOUBLE_INT],
        "pairs, place": lambda: [np.zeros(2, PAIR), (1, 1), MPI.DOUBLE_INT],
    }
    for label, make in forms.items():
        ours, mpi4py = takes(comm, make(), ArgumentError), takes(comm.private_comm, make(), Exception)
        assert ours == mpi4py, label
    with pytest.raises(ArgumentError, match="use the lower-case method, which pickles"):
        comm.Bcast([np.array([1, "a"], object), MPI.BYTE])  # addresses, which another rank cannot use


@pytest.mark.mpi(sizes=(1, 2), timeout=60)
@pytest.mark.parametrize("name", ["Gatherv", "Allgatherv", "Igatherv"])
def test_pairs_are_gathered_by_counts(comm: Communicator, name: str) -> None:
    p, q = np.zeros(2, PAIR), np.zeros(2 * comm.size, PAIR)
    p["v"], p["i"] = comm.rank + 0.5, comm.rank
    request = getattr(comm, name)([p, 2, MPI.DOUBLE_INT], [q, [2] * comm.size, MPI.DOUBLE_INT])
    if request:
        request.Wait()
    if comm.rank == 0 or name == "Allgatherv":
        assert q["i"].tolist() == [k for k in range(comm.size) for _ in range(2)]


@pytest.mark.mpi(sizes=(1,), timeout=60)
def test_memory_of_other_kinds_is_taken_and_refused_as_by_mpi4py(comm: Communicator) -> None:
    forms: dict[str, Callable[[], Any]] = {
        "bytes in Fortran order": lambda: memoryview(np.asfortranarray(np.zeros((2, 3), "u1"))),
        "long doubles": lambda: (ctypes.c_longdouble * 3)(1, 2, 3),
        "characters": lambda: memoryview(bytearray(4)).cast("c"),
        "characters of C": lambda: ctypes.create_string_buffer(4),
        "another byte order": lambda: memoryview(np.zeros(3, ">i4")),
        "a scalar of C": lambda: ctypes.c_int(3),
        "nothing": bytearray,
    }
    for label, make in forms.items():
        ours, mpi4py = takes(comm, make(), ArgumentError), takes(comm.private_comm, make(), Exception)
        assert ours == mpi4py, label
    got = bytearray(4 * comm.size)
    comm.Allgather(memoryview(bytearray(b"abcd")).cast("c"), got)
    assert got == b"abcd" * comm.size


# Derived datatypes


@pytest.mark.mpi(sizes=(2,), timeout=60)
def test_items_beyond_the_array_are_refused_and_those_in_the_array_of_a_view_are_not(comm: Communicator) -> None:
    p, whole = comm.size, np.zeros(12 * comm.size)
    beyond: list[Callable[[], None]] = [
        lambda: comm.Bcast([np.zeros(4), 100, VECTOR]),
        lambda: comm.Bcast([np.zeros(4), 1, 1, VECTOR]),
        lambda: comm.Allgather(np.zeros(2), [np.zeros(3 * p - 1), 1, VECTOR]),
        lambda: comm.Alltoall([np.zeros(3), 1, VECTOR], [np.zeros(3 * p), 1, VECTOR]),
        lambda: comm.Bcast_init([np.zeros(4), 100, VECTOR]),
    ]
    for call in beyond:
        with pytest.raises(ArgumentError, match=r"the buffer holds . elements of a derived datatype, the count is"):
            call()
    inside: list[Callable[[], None]] = [
        lambda: comm.Bcast([np.zeros(3), 1, VECTOR]),
        lambda: comm.Bcast([whole[1:2], 2, VECTOR]),
        lambda: comm.Allgather([whole[:2].copy(), 2, MPI.DOUBLE], [np.zeros(3 * p), 1, VECTOR]),
        lambda: comm.Bcast([bytearray(24), 1, VECTOR]),
        lambda: comm.Bcast([np.zeros(0), 0, VECTOR]),
    ]
    for call in inside:
        call()


@pytest.mark.mpi(sizes=(1, 2), timeout=60)
@pytest.mark.parametrize("name", ["Alltoall", "Allgather"])
def test_an_absolute_address_is_sent_by_mpi(comm: Communicator, name: str) -> None:
    p, each = comm.size, 3
    x = fill(n=each * (p if name == "Alltoall" else 1)) + 10 * comm.rank
    absolute = MPI.DOUBLE.Create_contiguous(each).Create_hindexed([1], [MPI.Get_address(x)]).Commit()
    absolute = absolute.Create_resized(0, 8 * each).Commit()
    got, want = np.zeros(each * p), np.zeros(each * p)
    getattr(comm, name)([MPI.BOTTOM, 1, absolute], got)
    getattr(comm.private_comm, name)([MPI.BOTTOM, 1, absolute], want)
    assert np.array_equal(got, want)
    absolute.Free()


# Reductions


@pytest.mark.mpi(sizes=(2,), timeout=60)
def test_a_reproducible_reduction_reads_its_buffers_as_the_ordinary_one(comm: Communicator) -> None:
    p, me, n = comm.size, comm.rank, 4
    whole, double = fill(n=n * p), partial(lambda *form: [*form, MPI.DOUBLE])
    guarded = np.full(3 * n, 7.0)
    refused: list[tuple[str, tuple[Any, ...]]] = [
        ("Reduce_scatter", (whole, guarded[:2], [n] * p)),
        ("Reduce_scatter_block", (whole, guarded[:2])),
        ("Reduce_scatter_block", (fill(n=n * p - 1), guarded[: n - 1])),
        ("Allreduce", (np.array([1.5]), np.zeros(1, "i8"))),
        ("Allreduce", (fill(), np.zeros(4, "c16"))),
        ("Allreduce", (fill(), np.zeros(8, "f4"))),
        ("Allreduce", (fill(), guarded[:4])),
        ("Reduce_scatter_block", (whole, np.zeros(n // 2, "c16"))),
    ]
    for name, buffers in refused:
        with pytest.raises(ArgumentError, match=f"{name}: sends"):
            getattr(comm, name)(*buffers, reproducible=True)
    assert (guarded == 7).all()
    own = p * whole[n * me :][:n]
    y, x = np.zeros(n), whole.copy()
    comm.Reduce_scatter_block(double(whole, n), y, reproducible=True)
    assert np.array_equal(y, own)
    comm.Reduce_scatter_block(MPI.IN_PLACE, double(x, n), reproducible=True)
    assert np.array_equal(x[:n], own)
    comm.Reduce_scatter(whole, guarded, [n] * p, reproducible=True)
    assert guarded.tolist() == [*own, *[7] * (2 * n)]


@pytest.mark.mpi(sizes=(1, 2), timeout=60)
@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("op", ["sum", "avg"])
def test_a_reduce_scatter_leaves_what_follows_its_block(comm: Communicator, dtype: str, op: str) -> None:
    p, n = comm.size, 4
    for algorithm in (*comm.algorithms("reduce_scatter"), None):
        r = np.full(n + 2, 8, dtype)
        comm.Reduce_scatter(np.ones(n * p, dtype), r, [n] * p, op=op, algorithm=algorithm)
        assert r.tolist() == [1 if op == "avg" else p] * n + [8, 8], algorithm


@pytest.mark.mpi(sizes=(1, 2), timeout=60)
def test_a_shared_result_has_the_shape_and_order_of_its_array(comm: Communicator) -> None:
    a, p = comm.empty(6, "f8"), comm.size
    a[:] = range(6)
    for _ in range(2):
        for view in (a.reshape(2, 3), a.reshape(3, 2), a, a.reshape(2, 3).T, a.reshape(1, 6)):
            got = comm.Allreduce_view(view)
            assert got.shape == view.shape
            assert np.array_equal(got, p * view)
    for wrong in ([a, 6, MPI.DOUBLE], memoryview(a)):
        with pytest.raises(ArgumentError, match="Allreduce_view: the buffer is not an array"):
            comm.Allreduce_view(wrong)  # type: ignore[arg-type]


# Lifetime


@pytest.mark.mpi(sizes=(1, 2), timeout=60)
def test_a_request_keeps_its_arrays_alive(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    forms: list[tuple[str, Callable[[Any], Any]]] = [
        ("f2", lambda x: x),
        ("f8", lambda x: x),
        ("f8", lambda x: [x, 1, VECTOR]),
        ("f2", lambda x: [x, 2]),
    ]
    monkeypatch.setattr(requests, "has_thread", lambda: False)
    for dtype, make in forms:
        for name in ("Bcast_init", "Ibcast"):
            x = fill(dtype)
            known, request = weakref.ref(x), getattr(comm, name)(make(x))
            del x
            gc.collect()
            assert known() is not None, (name, dtype)
            if name == "Bcast_init":
                request.Start()
            request.Wait()
            if name == "Bcast_init":
                request.Free()
