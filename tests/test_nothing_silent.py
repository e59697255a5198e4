"""Wrong calls are refused or named, whatever collective they make; legal calls that look alike pass."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from late_rank import LATE_RANK
from mpi4py import MPI
from open_files import count_open_files

from hpccomm import ArgumentError, Communicator, planner
from hpccomm.calls.departures import Launchers
from hpccomm.observe.processes import find_process
from hpccomm.testing.jobs import run_under_mpi, start

Call = Callable[[Communicator], Any]


def freeze(n: int) -> Any:
    """A read-only array."""
    made = np.ones(n)
    made.flags.writeable = False
    return made


def fortran(p: int) -> Any:
    """An array in Fortran order, of a block of two elements for each rank."""
    return np.asfortranarray(np.ones((2, p)))


def on_parts(n: int, call: Callable[..., Any], *parts: tuple[int, int]) -> Any:
    """A call on parts (first, last) of one array."""
    x = np.ones(n)
    return call(*(x[first:last] for first, last in parts))


REFUSED: dict[str, tuple[Call, str]] = {
    "read-only Gather": (lambda c: c.Gather(np.ones(1), freeze(c.size), c.rank), "read-only"),
    "read-only Scatter": (lambda c: c.Scatter(np.ones(c.size), freeze(1), c.rank), "read-only"),
    "read-only Scan": (lambda c: c.Scan(np.ones(1), freeze(1)), "read-only"),
    "read-only Alltoallv": (
        lambda c: c.Alltoallv([np.ones(c.size), [1] * c.size], [freeze(c.size), [1] * c.size]),
        "read-only",
    ),
    "read-only Alltoall": (lambda c: c.Alltoall(np.ones(c.size), freeze(c.size), algorithm="native"), "read-only"),
    "aliased Alltoall": (
        lambda c: on_parts(
            2 * c.size + 1,
            lambda x, y: c.Alltoall(x, y, algorithm="native"),
            (0, 2 * c.size),
            (1, 2 * c.size + 1),
        ),
        "overlap",
    ),
    "aliased Scan": (lambda c: on_parts(5, c.Scan, (0, 4), (1, 5)), "overlap"),
    "aliased Gather": (
        lambda c: on_parts(2 * c.size + 1, lambda x, y: c.Gather(x, y, c.rank), (0, 2), (1, 2 * c.size + 1)),
        "overlap",
    ),
    "overlapping blocks": (
        lambda c: c.Gatherv(np.ones(2), [np.ones(4 * c.size), [2] * c.size, [1] * c.size, MPI.DOUBLE], c.rank),
        "overlap",
    ),
    "odd Alltoall": (lambda c: c.Alltoall(np.ones(2 * c.size + 1), np.ones(2 * c.size + 1)), "multiple"),
    "odd Gather": (lambda c: c.Gather(np.ones(2), np.ones(2 * c.size + 1), c.rank), "multiple"),
    "odd Scatter": (lambda c: c.Scatter(np.ones(2 * c.size + 1), np.ones(2), c.rank), "multiple"),
    "odd Allgather": (lambda c: c.Allgather(np.ones(2), np.ones(2 * c.size + 1)), "multiple"),
    "short Gather": (lambda c: c.Gather(np.ones(4), np.ones(3 * c.size), c.rank), "make both the same"),
    "short Gatherv": (
        lambda c: c.Gatherv(np.ones(4), [np.ones(4 * c.size), [5] * c.size], c.rank),
        "pass a longer buffer",
    ),
    "few counts": (lambda c: c.Scatterv([np.ones(8), [1] * (c.size + 1)], np.ones(1), c.rank), "one for each rank"),
    "negative counts": (lambda c: c.Scatterv([np.ones(8), [-1] * c.size], np.ones(1), c.rank), "negative"),
    "two dtypes": (lambda c: c.Gather(np.ones(4, "f4"), np.ones(2 * c.size), c.rank), "make both the same"),
    "two orders in Gather": (lambda c: c.Gather(np.ones((2, 1)), fortran(c.size), c.rank), "Fortran"),
    "two orders in Scatter": (lambda c: c.Scatter(fortran(c.size), np.ones(2), c.rank), "Fortran"),
    "two orders in Alltoall": (lambda c: c.Alltoall(fortran(c.size), np.ones((c.size, 2))), "Fortran"),
    "two orders in Allgather": (lambda c: c.Allgather(np.ones(2), fortran(c.size)), "Fortran"),
    "a list of numbers": (lambda c: c.Allreduce([1, 2, 3], np.ones(3)), r"np\.array"),
    "a list to receive": (lambda c: c.Allreduce(np.ones(3), [1.0, 2.0, 3.0]), r"np\.array"),
    "a list to broadcast": (lambda c: c.Bcast([1, 2, 3]), r"np\.array"),
    "a list to gather": (lambda c: c.Gather([1, 2], np.ones(2 * c.size), c.rank), r"np\.array"),
    "a dict": (lambda c: c.Allreduce({}, np.ones(3)), "has no memory"),
    "a number": (lambda c: c.Bcast(3), "has no memory"),
    "a text": (lambda c: c.Bcast("abc"), "has no memory"),
    "an unknown code of a datatype": (lambda c: c.Bcast([np.ones(1), "11"]), "no datatype '11': pass an MPI.Datatype"),
    "no datatype": (lambda c: c.Allgather([np.ones(1), MPI.DATATYPE_NULL], np.ones(c.size)), "is null or freed"),
    "a root of 1.5": (lambda c: c.Bcast(np.ones(1), 1.5), "not a rank"),
}


@pytest.mark.mpi(sizes=(1, 2, 3))
@pytest.mark.parametrize("mistake", REFUSED)
def test_a_wrong_argument_is_refused_before_the_first_message(comm: Communicator, mistake: str) -> None:
    call, remedy = REFUSED[mistake]
    if comm.size == 1 and mistake.startswith(("odd", "two orders", "overlapping")):
        pytest.skip("one block has no other length or order")
    for _ in range(2):
        with pytest.raises(ArgumentError, match=remedy) as refused:
            call(comm)
        assert f"rank {comm.rank}" in str(refused.value)
    comm.Barrier()


def with_datatypes(p: int, **other: Any) -> list[Any]:
    """A buffer of Alltoallw: a number for each rank, and what is different."""
    form = {"data": np.ones(p), "counts": [1] * p, "displs": [8 * k for k in range(p)], "types": [MPI.DOUBLE] * p}
    return list((form | other).values())


TYPED_MISTAKES: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "a read-only array": (lambda p: {"data": freeze(p)}, "read-only"),
    "negative strides": (lambda p: {"data": np.ones(p)[::-1]}, "not contiguous"),
    "blocks that overlap": (lambda p: {"displs": [0] * p}, "overlap"),
    "a block beyond the end": (lambda p: {"displs": [8 * (k + 1) for k in range(p)]}, "outside the buffer of"),
    "a block before the begin": (lambda p: {"displs": [8 * k - 8 for k in range(p)]}, "outside the buffer of"),
    "huge counts": (lambda p: {"counts": [2**61] * p}, "outside the buffer of"),
    "negative counts": (lambda p: {"counts": [-1] * p}, "outside the buffer of"),
    "fractions": (lambda p: {"counts": [1.5] * p}, "a list of one for each rank"),
    "a dict of counts": (lambda p: {"counts": dict.fromkeys(range(p), 1)}, "a list of one for each rank"),
    "too few counts": (lambda p: {"counts": [1] * (p - 1)}, "pass one for each rank"),
    "too few datatypes": (lambda p: {"types": [MPI.DOUBLE] * (p - 1)}, "pass one for each rank"),
    "a null datatype": (lambda p: {"types": [MPI.DATATYPE_NULL] * p}, "null or freed"),
}


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("mistake", TYPED_MISTAKES)
def test_blocks_of_several_datatypes_are_checked(comm: Communicator, mistake: str) -> None:
    p, (different, remedy) = comm.size, TYPED_MISTAKES[mistake]
    for call in (comm.Alltoallw, lambda *forms: comm.Ialltoallw(*forms).Wait(), comm.Alltoallw_init):
        with pytest.raises(ArgumentError, match=remedy):
            call(with_datatypes(p), with_datatypes(p, **different(p)))
    comm.Alltoallw(with_datatypes(p), with_datatypes(p))


NO_COUNTS: dict[str, Callable[[int], Any]] = {
    "fractions": lambda p: [1.5] * p,
    "whole floats": lambda p: [1.0] * p,
    "no number": lambda p: [float("nan")] * p,
    "None": lambda p: [None] * p,
    "a generator": lambda p: (1 for _ in range(p)),
    "a set": lambda p: set(range(p)),
    "lists": lambda p: [[1]] * p,
    "a matrix": lambda p: np.ones((p, 1), int),
    "an array of floats": np.ones,
}


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("kind", NO_COUNTS)
def test_counts_that_are_no_whole_numbers_are_refused(comm: Communicator, kind: str) -> None:
    p, one = comm.size, np.ones(1)
    for call in (
        lambda counts: comm.Allgatherv(one, [np.ones(p), counts]),
        lambda counts: comm.Gatherv(one, [np.ones(p), counts], comm.rank),
        lambda counts: comm.Alltoallv([np.ones(p), counts], [np.ones(p), [1] * p]),
        lambda counts: comm.Allgatherv(one, [np.ones(p), [1] * p, counts, MPI.DOUBLE]),
        lambda counts: comm.Reduce_scatter(np.ones(p), one, counts),
        lambda counts: comm.Iallgatherv(one, [np.ones(p), counts]),
        lambda counts: comm.Ireduce_scatter(np.ones(p), one, counts),
        lambda counts: comm.Allgatherv_init(one, [np.ones(p), counts]),
    ):
        with pytest.raises(ArgumentError, match=r"whole number, or a list of one for each rank"):
            call(NO_COUNTS[kind](p))
    comm.Barrier()


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("root", [float("nan"), None, "0", -1, 2**70, 0.0, [0]])
def test_a_root_that_is_no_rank_is_refused_by_every_call(comm: Communicator, root: Any) -> None:
    x = np.ones(2)
    for call in (
        lambda: comm.Bcast(x, root),
        lambda: comm.Gather(x, np.ones(4), root),
        lambda: comm.Reduce(x, np.ones(2), root=root),
        lambda: comm.Scatterv([x, [1, 1]], np.ones(1), root),
        lambda: comm.bcast(1, root),
        lambda: comm.reduce(1, root=root),
        lambda: comm.gather(1, root),
        lambda: comm.scatter([1, 2], root),
        lambda: comm.Ibcast(x, root),
        lambda: comm.Bcast_init(x, root),
    ):
        with pytest.raises(ArgumentError, match="is not a rank"):
            call()
    comm.Barrier()


@pytest.mark.mpi(sizes=(1, 2))
@pytest.mark.parametrize("used", [False, True])
def test_calls_of_a_communicator_that_was_freed_are_refused(comm: Communicator, used: bool) -> None:
    made, x = comm.Dup(), np.ones(2)
    if used:
        for _ in range(3):
            made.Allreduce(x, np.ones(2))
            made.Bcast(x)
    made.Free()
    for call in (
        lambda: made.Allreduce(x, np.ones(2)),
        lambda: made.Bcast(x),
        lambda: made.Gather(x, np.ones(4)),
        lambda: made.Reduce(x, np.ones(2)),
        made.Barrier,
        lambda: made.allreduce(1),
        lambda: made.bcast(1),
        lambda: made.Iallreduce(x, np.ones(2)),
        lambda: made.Allreduce_init(x, np.ones(2)),
        lambda: made.layout,
        lambda: made.intra_node,
        lambda: made.algorithms("allreduce"),
        lambda: made.empty(3),
        lambda: made.Allreduce_view(x),
        lambda: made.sparse_allgather(np.zeros(1, "u4"), np.ones(1, "f4"), 9),
    ):
        with pytest.raises(ArgumentError, match="has been freed: make a new one"):
            call()


@pytest.mark.mpi(sizes=(2, 3))
def test_a_receive_buffer_that_becomes_read_only_is_refused(comm: Communicator) -> None:
    x, y, z = np.ones(4), np.empty(4), np.empty(4 * comm.size)
    calls: list[tuple[Any, Callable[[], Any]]] = [
        (y, lambda: comm.Allreduce(x, y)),
        (y, lambda: comm.Scan(x, y)),
        (z, lambda: comm.Allgather(x, z)),
        (z, lambda: comm.Gather(x, z, comm.rank) if comm.size == 1 else comm.Alltoall(z + 1, z)),
        (y, lambda: comm.Scatter(np.ones(4 * comm.size), y, 0)),
    ]
    for received, call in calls:
        for _ in range(3):
            call()
        received.flags.writeable = False
        with pytest.raises(ArgumentError, match="read-only"):
            call()
        received.flags.writeable = True


LEGAL: dict[str, Call] = {
    "another shape in Gather": lambda c: c.Gather(np.ones((2, 2) if c.rank else 4), np.ones((c.size, 4)), 0),
    "a derived datatype in Gather": lambda c: c.Gather(
        [np.ones(4), 2, MPI.DOUBLE.Create_contiguous(2).Commit()] if c.rank == 1 else np.ones(4), np.ones(4 * c.size), 0
    ),
    "other lengths in Gatherv": lambda c: c.Gatherv(
        np.ones(c.rank), [np.ones(c.size**2), list(range(c.size))] if c.rank == 0 else None, 0
    ),
    "other lengths in Scatterv": lambda c: c.Scatterv(
        [np.ones(c.size**2), list(range(c.size))] if c.rank == 0 else None, np.ones(c.rank), 0
    ),
    "other lengths in Alltoallv": lambda c: c.Alltoallv(
        [np.ones(c.size**2), [c.rank + k for k in range(c.size)]],
        [np.ones(c.size**2), [c.rank + k for k in range(c.size)]],
    ),
    "gaps between blocks": lambda c: c.Gatherv(
        np.ones(1), [np.ones(2 * c.size), [1] * c.size, [2 * k for k in range(c.size)], MPI.DOUBLE], 0
    ),
    "both halves of one array": lambda c: on_parts(
        2 * c.size,
        lambda x: c.Alltoallv(
            [x, [1] * c.size, list(range(c.size)), MPI.DOUBLE],
            [x, [1] * c.size, list(range(c.size, 2 * c.size)), MPI.DOUBLE],
        ),
        (0, 2 * c.size),
    ),
    "anything where only the root receives": lambda c: c.Gather(
        np.ones(2), np.ones(2 * c.size) if c.rank == 0 else "x", 0
    ),
    "in place at the root": lambda c: c.Gather(MPI.IN_PLACE if c.rank == 0 else np.ones(2), np.ones(2 * c.size), 0),
    "Scatter in place": lambda c: c.Scatter(np.ones(2 * c.size), MPI.IN_PLACE if c.rank == 0 else np.ones(2), 0),
    "no elements": lambda c: c.Gather(np.ones(0), np.ones(0), 0),
    "barrier and Barrier": lambda c: c.barrier() if c.rank else c.Barrier(),
    "objects of any type": lambda c: c.allgather("x" * c.rank if c.rank else 3),
    "a function as operation": lambda c: c.allreduce(c.rank, op=max),
    "no operation and MPI.SUM": lambda c: c.allreduce(1, MPI.SUM) if c.rank else c.allreduce(1),
    "a root by name": lambda c: c.bcast(1, root=0) if c.rank else c.bcast(1),
    "Alltoallw": lambda c: c.Alltoallw(
        [np.ones(c.size), [1] * c.size, [8 * k for k in range(c.size)], [MPI.DOUBLE] * c.size],
        [np.ones(c.size), [1] * c.size, [8 * k for k in range(c.size)], [MPI.DOUBLE] * c.size],
    ),
}


@pytest.mark.mpi(sizes=(1, 2, 3))
@pytest.mark.parametrize("cousin", LEGAL)
def test_a_legal_call_that_looks_like_a_mistake_passes(comm: Communicator, cousin: str) -> None:
    for _ in range(4):
        LEGAL[cousin](comm)
    comm.Barrier()


@pytest.mark.mpi(sizes=(3, 5))
@pytest.mark.parametrize("name", ["Scatterv", "Gatherv"])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_rank_that_runs_ahead_is_no_mistake(comm: Communicator, name: str, compiled: bool) -> None:
    """Ranks that wait for nobody write the amounts of later calls while others still compare those of earlier ones."""
    parts = [np.full(k, comm.rank, "i8") for k in range(11)]
    wholes = [[np.zeros(k * comm.size, "i8"), [k] * comm.size] for k in range(11)]
    own = Communicator(comm)
    with mock.patch.object(planner, "why_no_entry", wraps=planner.why_no_entry if compiled else lambda size: "a test"):
        own.Barrier()
    for call in range(20_000):
        part, whole = parts[call % 11], wholes[call % 11] if comm.rank == 0 else None
        own.Scatterv(whole, part) if name == "Scatterv" else own.Gatherv(part, whole)
    assert not own.plans.entry or compiled


@pytest.mark.mpi(sizes=(1, 2, 3))
def test_what_looks_local_is_local(comm: Communicator) -> None:
    made = Communicator(comm.Dup())
    if made.rank == 0:
        assert made.layout.size == made.size
        assert "ring" in made.algorithms("allreduce")
        assert made.explain("allreduce", 1000).algorithm
        assert made.intra_node.size * made.inter_node.size >= made.size
        assert isinstance(made.topology, int)
    made.Free()


@pytest.mark.mpi(sizes=(1, 2))
def test_communicators_free_what_belongs_to_them(comm: Communicator) -> None:
    import hpccomm

    world, x = MPI.COMM_WORLD, np.ones(3)
    for _ in range(8):
        other = world.Dup()
        hpccomm.allreduce(x, comm=other)
        other.Free()
        Communicator(world).Allreduce(x, np.empty(3))
        kept = Communicator(comm.Dup())
        kept.Allreduce(MPI.IN_PLACE, x)
        kept.intra_node.Barrier()
        kept.Free()


@pytest.mark.mpi(sizes=(1, 2))
def test_two_wrappers_of_one_communicator_keep_their_own_algorithm(comm: Communicator) -> None:
    ring = Communicator(comm, "ring")
    x = np.ones(1000)
    for _ in range(3):
        assert (ring.Allreduce(x, y := np.empty(1000)) or y[0]) == comm.size
        assert (comm.Allreduce(x, y := np.empty(1000)) or y[0]) == comm.size
    assert (ring.algorithm, comm.algorithm) == ("ring", "auto")
    assert ring.context is comm.context


class WithArgument(Communicator):
    """A communicator with an argument of its own."""

    def __new__(cls, comm: Any = None, step: int = 1) -> Any:
        """Keep the argument."""
        made: Any = super().__new__(cls, comm)
        made.step = step
        return made


@pytest.mark.mpi(sizes=(1, 2))
def test_a_subclass_may_have_arguments_of_its_own(comm: Communicator) -> None:
    made = WithArgument(comm, step=3)
    assert made.Dup().Allreduce(np.ones(1), np.empty(1)) is None
    assert made.step == 3


@pytest.mark.mpi(sizes=(2,))
def test_views_of_arrays_that_are_made_again_at_other_addresses(comm: Communicator) -> None:
    """The old address comes back on some ranks only."""
    for step in range(40):
        x = comm.zeros(256)
        hole = bytearray(5000 * (1 + comm.rank) * (step % 3))
        x[...] = step
        assert (comm.Allreduce_view(x) == comm.size * step).all()
        assert (comm.Allreduce_view(x[:100]) == comm.size * step).all()
        del x, hole


@pytest.mark.mpi(sizes=(2, 3))
def test_what_a_view_needs_is_freed_with_its_array(comm: Communicator) -> None:
    """The plan that made it stays in the cache."""

    def make_view() -> None:
        x = comm.zeros(5000)
        comm.Allreduce_view(x)

    make_view()
    before = count_open_files()
    for _ in range(20):
        make_view()
    gc.collect()
    assert count_open_files(before) <= before


@pytest.mark.mpi(sizes=(1, 2))
def test_an_array_can_be_resized_after_a_call(comm: Communicator) -> None:
    x, y = np.ones(4), np.empty(4)
    for _ in range(3):
        comm.Allreduce(x, y)
    x.resize(8)
    y.resize(8)


SETUP = (
    """
import os, sys, threading, time
import numpy as np
from mpi4py import MPI
import hpccomm
comm = hpccomm.Communicator(MPI.COMM_WORLD)
odd, x = comm.rank == 1, np.ones(4)
"""
    + LATE_RANK
)


def run_job(ranks: int, body: str, seconds: float = 90.0) -> tuple[int, str]:
    """Exit status and output of a job."""
    began = time.monotonic()
    done = run_under_mpi(ranks, "-c", SETUP + textwrap.dedent(body), timeout=seconds)
    assert time.monotonic() - began < seconds
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            'comm.Allreduce(x, np.empty(4), MPI.MAX if odd else MPI.SUM, algorithm="shared")',
            "ranks 0, 2 called Allreduce(sum, 4 float64, algorithm=shared), rank 1 called Allreduce(max, 4 float64",
        ),
        (
            "comm.Bcast(x) if odd else comm.Allreduce(x, np.empty(4))",
            "ranks 0, 2 called Allreduce, rank 1 called Bcast:",
        ),
        (
            "comm.Iallreduce(x, np.empty(4), MPI.MAX if odd else MPI.SUM).Wait()",
            "ranks 0, 2 called Iallreduce(sum, 4 float64), rank 1 called Iallreduce(max, 4 float64)",
        ),
        ("comm.Bcast(x, comm.size)", ": Bcast: root 3 is not a rank: pass one of 0 … 2"),
        ("comm.Ibcast(x, comm.size)", ": Ibcast: root 3 is not a rank: pass one of 0 … 2"),
        ("hpccomm.allreduce(x, op='nonsense', comm=comm)", "op='nonsense' is not an operation"),
    ],
)
def test_a_mistake_of_all_ranks_prints_its_sentence_once_and_a_line_for_each_rank(body: str, sentence: str) -> None:
    status, said = run_job(3, body)
    ours = [line for line in said.splitlines() if "hpccomm" in line]
    assert status != 0
    assert ours[0].startswith("[hpccomm] "), said
    assert said.count(sentence) == 1, said
    assert any(sentence in line for line in ours)
    assert "Traceback" not in said
    assert len(ours) <= 2 * 3


@pytest.mark.slow(keep=2)
def test_eight_threads_with_a_communicator_each() -> None:
    status, said = run_job(
        2,
        """
        comms = [MPI.COMM_WORLD.Dup() for _ in range(8)]
        def body(k):
            mine = hpccomm.Communicator(comms[k])
            for _ in range(5):
                y = np.empty(4)
                mine.Allreduce(x * k, y)
                assert (y == 2 * k).all()
        threads = [threading.Thread(target=body, args=(k,)) for k in range(8)]
        for each in threads: each.start()
        for each in threads: each.join(60)
        assert not any(each.is_alive() for each in threads)
        print("done", flush=True)
        """,
    )
    assert (status, said.count("done")) == (0, 2), said


def test_two_threads_on_two_communicators_in_different_orders() -> None:
    status, said = run_job(
        2,
        """
        a, b = comm.Dup(), comm.Dup()
        def body(mine, late):
            time.sleep(late)
            for _ in range(20): mine.Allreduce(x, np.empty(4))
        first = threading.Thread(target=body, args=(a, 0.2 * comm.rank))
        second = threading.Thread(target=body, args=(b, 0.2 * (1 - comm.rank)))
        for each in (first, second): each.start()
        for each in (first, second): each.join(30)
        assert not first.is_alive() and not second.is_alive()
        print("done", flush=True)
        """,
    )
    assert (status, said.count("done")) == (0, 2), said


def test_exit_handlers_and_forked_children_may_end_as_they_like() -> None:
    status, said = run_job(
        2,
        """
        import atexit
        pid = os.fork()
        if pid == 0:
            atexit._run_exitfuncs()
            os._exit(0)
        os.waitpid(pid, 0)
        time.sleep(0.7)
        comm.Allreduce(x, np.empty(4))
        atexit.register(comm.Barrier)
        """,
    )
    assert status == 0, said
    assert "has left" not in said


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("algorithm", ["native", "shared"])
def test_a_rank_that_ends_mpi_before_the_others_is_named(algorithm: str) -> None:
    began = time.monotonic()
    status, said = run_job(
        3,
        f"""
        comm.Barrier()
        if odd:
            MPI.Finalize()
            time.sleep(80)
            sys.exit()
        comm.Allreduce(x, np.empty(4), algorithm={algorithm!r})
        """,
    )
    assert status != 0, said
    assert "rank 1 has left the program" in said
    assert time.monotonic() - began < 60


@pytest.mark.slow(keep=2)
def test_a_rank_that_misses_the_first_collective_is_named() -> None:
    status, said = run_job(
        3,
        """
        os.environ["HPCCOMM_STALL_SECONDS"] = "1"
        if odd: sleep_until_asked()
        comm.Gather(x, np.empty(12) if comm.rank == 0 else None)
        """,
    )
    assert status == 0, said
    assert "missing: rank 1" in said


GOES_ON = {
    "Bcast": 'comm.Bcast(x, root, algorithm="native")',
    "Scatter": "comm.Scatter(wide if comm.rank == root else None, y, root)",
    "Scatterv": "comm.Scatterv([wide, [4] * p] if comm.rank == root else None, y, root)",
    "bcast": "comm.bcast(1, root)",
    "scatter": "comm.scatter([1] * p if comm.rank == root else None, root)",
    "Scan": "comm.Scan(x, y, op)",
    "Exscan": "comm.Exscan(x, y, op)",
    "Ibcast": "comm.Ibcast(x, root).Wait()",
}
"""Calls that rank 0 can complete before the others have made theirs."""

NOT_TOLD = """
p, wide, y = comm.size, np.ones(4 * comm.size), np.empty(4)
def call(root, op):
    CALL
for _ in range(2): call(0, MPI.SUM)
comm.Barrier()
time.sleep(0.5 * odd)
try:
    call(comm.rank % 2, MPI.MAX if odd else MPI.SUM)
except hpccomm.MismatchError as error:
    print(f"rank {comm.rank} raised: {error}", flush=True)
"""


@pytest.mark.slow(keep=2)
@pytest.mark.parametrize("name", GOES_ON)
def test_a_rank_that_has_completed_a_call_is_told_that_others_refuse_it(name: str) -> None:
    """Also a rank whose program ends with the call."""
    for end in ("", "MPI.Finalize()"):
        _, said = run_job(3, NOT_TOLD.replace("CALL", GOES_ON[name]) + end)
        assert "rank 1 raised" in said, said
        told = "rank 0: the ranks' calls were different in one that this rank has completed: ranks? 0"
        assert re.search(told, said) or "rank 0 raised" in said, said
        assert re.search(rf"rank 1 called I?{name}\(.*noticed by rank 0", said), said


@pytest.mark.slow(keep=2)
def test_a_rank_is_told_once_while_it_goes_on() -> None:
    status, said = run_job(2, NOT_TOLD.replace("CALL", GOES_ON["Bcast"]) + "\ntime.sleep(1.5)")
    assert (status, said.count("this rank has completed"), said.count("raised")) == (0, 1, 1), said


@pytest.mark.slow(keep=2)
def test_no_rank_outlives_its_launcher() -> None:
    body = """
    comm.Barrier()
    print(os.getpid(), flush=True)
    if odd: time.sleep(100)
    comm.Allreduce(x, np.empty(4))
    """
    process = start(3, ["-c", SETUP + textwrap.dedent(body)], stdout=subprocess.PIPE, text=True)
    ranks = [int(process.stdout.readline()) for _ in range(3)]
    os.kill(process.pid, signal.SIGKILL)
    until = time.monotonic() + 60
    while any(find_process(rank).started for rank in ranks) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(find_process(rank).started for rank in ranks)
    process.stdout.close()
    process.wait()


def test_a_process_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    name = Path("/proc/self/comm")
    before = name.read_bytes()
    name.write_bytes(b"Pr\xc3")
    try:
        assert find_process(os.getpid()).parent == os.getppid()
    finally:
        name.write_bytes(before)
    monkeypatch.setattr(Path, "read_text", lambda *_, **named: "")
    assert find_process(1).started == 0


def test_a_launcher_that_is_gone_is_noticed() -> None:
    process = subprocess.Popen(["/bin/sleep", "60"])
    found = find_process(process.pid)
    launchers = Launchers()
    launchers._found = {process.pid: found.started}
    assert (found.name, found.parent, launchers.describe_loss()) == ("sleep", os.getpid(), "")
    process.kill()
    process.wait()
    assert f"the launcher (process {process.pid}) is gone" in launchers.describe_loss()
