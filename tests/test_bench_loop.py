"""Every benchmark gives the right results, and a wrong result of a collective is always detected."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError
from hpccomm.bench import Options, Row, measure
from hpccomm.bench.cases import CASES
from hpccomm.bench.cold import measure_first_calls
from hpccomm.bench.loop import TURNS

COLLECTIVES = [name for name, case in CASES.items() if not case.ends]
MESSAGES = [name for name, case in CASES.items() if case.ends]
SHORT = Options(iterations=4, warmup=1, check=True, check_warmup=1)


def options(**more: Any) -> Options:
    return Options(**{**vars(SHORT), **more})


# --- right -----------------------------------------------------------------------------------------


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("collective", COLLECTIVES)
@pytest.mark.parametrize("dtype", ["f4", "i1"])
def test_every_algorithm_of_every_collective_is_right(comm: Any, collective: str, dtype: str) -> None:
    case = CASES[collective]
    names = comm.algorithms(case.algorithms) if case.algorithms else ("auto", "native")
    roots = (comm.size - 1, None) if case.has_root else (0, 0)
    variants = dict.fromkeys(zip((False, case.in_place), roots, strict=True))
    for in_place, root in variants if dtype == "f4" else [(False, roots[0])]:
        chosen = options(dtype=dtype, in_place=in_place, root=root, whole=False)
        rows = list(measure(comm, collective, [4, 60, 4000], names, chosen))
        assert [row.complaint for row in rows if not row.validated] == []
        assert [row.algorithm for row in rows[: len(names)]] == list(names)
        assert len(rows) == 3 * len(names)


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("name", MESSAGES)
def test_messages_arrive(comm: Any, name: str) -> None:
    rows = list(measure(comm, name, [0, 1, 1000, 100000], ("native",), options(dtype="i1", window=4)))
    assert [(row.bytes, row.validated) for row in rows] == [(1, True), (1000, True), (100000, True)]


@pytest.mark.mpi(sizes=(2,))
def test_windows_in_both_directions_need_no_answer(comm: Any) -> None:
    class Logged(MPI.Intracomm):
        def Isend(self, *message: Any) -> Any:
            sent.append("Isend")
            return super().Isend(*message)

        def Send(self, *message: Any) -> None:
            sent.append("Send")
            super().Send(*message)

    for name, answers in (("bw", comm.rank), ("bibw", 0)):
        sent: list[str] = []
        list(measure(Logged(comm), name, [8], ("native",), Options(iterations=3, warmup=2, dtype="i1", window=4)))
        assert sent.count("Isend") == (0 if answers else 5 * 4)
        assert sent.count("Send") == 5 * answers


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("collective", [name for name in COLLECTIVES if name != "barrier"])
def test_calls_on_new_arrays_are_timed_and_right(comm: Any, collective: str) -> None:
    case = CASES[collective]
    roots = (0, None) if case.has_root else (0,)
    for in_place, root in itertools.product({False, case.in_place}, roots):
        chosen = options(new_arrays=True, in_place=in_place, root=root)
        for row in measure(comm, collective, [60, 4000], ("native", "auto"), chosen):
            assert row.complaint == ""
            assert row.validated
            assert 0 < row.new_call_avg_us < row.new_avg_us  # type: ignore[operator]
            assert 0 < row.new_call_p50_us < row.new_p50_us  # type: ignore[operator]


@pytest.mark.mpi(sizes=(2,))
def test_successive_calls_on_new_arrays_never_have_the_same_memory(comm: Any) -> None:
    class Logged(MPI.Intracomm):
        def Allreduce(self, send: Any, recv: Any, op: MPI.Op = MPI.SUM) -> None:
            addresses.append((send.ctypes.data, recv.ctypes.data))
            super().Allreduce(send, recv, op)

    addresses: list[tuple[int, int]] = []
    list(measure(Logged(comm), "allreduce", [4096], ("native",), Options(iterations=50, warmup=0, new_arrays=True)))
    same, new = addresses[:50], addresses[50:]
    assert len(set(same)) == 1
    assert len(new) == 50
    assert not any({*a} & {*b} for a, b in itertools.pairwise(new))


@pytest.mark.mpi(sizes=(2,))
def test_a_result_that_goes_to_the_arrays_of_an_earlier_call_is_wrong(comm: Any) -> None:
    class Remembering(MPI.Intracomm):
        first: Any = None

        def Allreduce(self, send: Any, recv: Any, op: MPI.Op = MPI.SUM) -> None:
            self.first = recv if self.first is None else self.first
            super().Allreduce(send, self.first, op)

    for new_arrays in (False, True):
        [row] = measure(Remembering(comm), "allreduce", [64], ("native",), options(new_arrays=new_arrays))
        assert row.validated is not new_arrays


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("collective", [*COLLECTIVES, *MESSAGES])
def test_first_calls_of_the_process_and_of_a_new_communicator_are_timed(comm: Any, collective: str) -> None:
    if CASES[collective].ends and comm.size != 2:
        return
    found = measure_first_calls(collective, (0, 1, 64, 128), ("auto", "ring", "native"), Options())
    assert [(each.algorithm, each.bytes) for each in found] == [
        (name, 0 if collective == "barrier" else 64) for name in ("native", "auto")
    ]
    assert all(each.process_us > 0 and each.communicator_us > 0 for each in found)
    assert comm.allgather(found) == [found] * comm.size
    assert measure_first_calls(collective, (), ("auto",), Options()) == []


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("collective", ["allreduce", "reduce_scatter", "allgather", "alltoall"])
def test_registered_buffers_are_measured_too(comm: Any, collective: str) -> None:
    for in_place in (False, True):
        rows = list(measure(comm, collective, [4096], options=options(registered=True, in_place=in_place)))
        assert [(row.validated, row.registered) for row in rows] == [(True, True)]


@pytest.mark.mpi(sizes=(3,))
def test_a_plain_communicator_has_native_alone_and_no_registered_memory(comm: Any) -> None:
    plain = MPI.Intracomm(comm)
    assert all(row.validated for row in measure(plain, "allreduce", [40], ("native",), SHORT))
    with pytest.raises(ArgumentError, match="use native"):
        next(measure(plain, "allreduce", [40], ("auto",), SHORT))
    with pytest.raises(ArgumentError, match=r"comm\.empty"):
        next(measure(plain, "allreduce", [40], ("native",), options(registered=True)))


@pytest.mark.mpi(sizes=(2,))
def test_unknown_algorithms_and_forms_are_refused(comm: Any) -> None:
    with pytest.raises(ArgumentError, match="allreduce has no algorithm 'fastest': use auto, native"):
        next(measure(comm, "allreduce", [4], ("auto", "fastest")))
    with pytest.raises(ArgumentError, match="no bcast in place"):
        next(measure(comm, "bcast", [4], ("auto",), options(in_place=True)))


@pytest.mark.mpi(sizes=(3,))
def test_rows_are_the_same_on_all_ranks_and_their_numbers_are_consistent(comm: Any) -> None:
    rows = list(measure(comm, "allgather", [3, 1200, 2400], ("native", "ring"), options(percentiles=(50, 90))))
    assert all(each == rows for each in comm.allgather(rows))
    assert [(row.bytes, row.algorithm) for row in rows] == [
        (size, name) for size in (1200, 2400) for name in ("native", "ring")
    ]
    for row in rows:
        assert row.ranks == 3
        assert row.nodes == comm.layout.count
        assert row.iterations == 4
        assert 0 < row.min_us <= row.avg_us <= row.max_us
        assert row.tails[0] == row.p50_us <= row.tails[1] <= row.p99_us
        assert row.algbw_GBps == pytest.approx(row.bytes / row.avg_us / 1e3)
        assert row.busbw_GBps == pytest.approx(row.algbw_GBps * 2 / 3)
        assert (row.predicted_us is None) == (row.algorithm == "native")


@pytest.mark.mpi(sizes=(2,))
def test_a_size_is_that_of_the_whole_vector_or_as_osu_counts_it(comm: Any) -> None:
    [whole] = measure(comm, "allgather", [4096], ("native",), options())
    [part] = measure(comm, "allgather", [4096], ("native",), options(whole=False))
    assert whole.algbw_GBps * whole.avg_us == pytest.approx(4.096)
    assert part.algbw_GBps * part.avg_us == pytest.approx(2 * 4.096)


@pytest.mark.mpi(sizes=(2,))
def test_a_time_limit_reduces_the_number_of_calls(comm: Any) -> None:
    [row] = measure(comm, "allreduce", [4 << 20], ("native",), Options(seconds=1e-6))
    assert row.iterations == 10
    [row] = measure(comm, "allreduce", [4], ("native",), Options(seconds=100.0, warmup=1))
    assert row.iterations == 1000


# --- in turns --------------------------------------------------------------------------------------


class LoggingComm(MPI.Intracomm):
    """Writes down which algorithm is called."""

    calls: list[str]

    def algorithms(self, collective: str) -> tuple[str, ...]:
        return ("one", "two", "three")

    def Allreduce(self, send: Any, recv: Any, op: MPI.Op = MPI.SUM, algorithm: str = "") -> None:
        self.calls.append(algorithm)
        super().Allreduce(send, recv, op)


@pytest.mark.mpi(sizes=(2,))
def test_algorithms_take_turns_and_none_is_always_first(comm: Any) -> None:
    logged = LoggingComm(comm)
    logged.calls = []
    chosen = Options(iterations=40, warmup=0, seconds=None)
    list(measure(logged, "allreduce", [64], ("one", "two", "three"), chosen))
    changes = [name for k, name in enumerate(logged.calls) if k == 0 or logged.calls[k - 1] != name]
    assert len(changes) >= 2 * TURNS
    assert {changes[0], *changes[1:]} == {"one", "two", "three"}
    assert [logged.calls.count(name) for name in ("one", "two", "three")] == [40 + TURNS] * 3
    assert logged.calls[: 5 * 3 : 5] == ["one", "two", "three"]
    assert logged.calls[15] == "two"


@pytest.mark.mpi(sizes=(3,))
def test_a_rotating_root_changes_with_every_call(comm: Any) -> None:
    class Rooted(MPI.Intracomm):
        def Bcast(self, buf: Any, root: int = 0) -> None:
            roots.append(root)
            super().Bcast(buf, root)

    roots: list[int] = []
    list(measure(Rooted(comm), "bcast", [64], ("native",), Options(iterations=6, warmup=3, root=None)))
    assert roots == [0, 1, 2, 0, 1, 2, 0, 1, 2]


# --- wrong -----------------------------------------------------------------------------------------


def make_weighted_comm(*weights: int) -> type[MPI.Intracomm]:
    """A communicator whose sum counts some ranks more than once, and others not at all."""

    class Weighted(MPI.Intracomm):
        def Allreduce(self, send: Any, recv: Any, op: MPI.Op = MPI.SUM) -> None:
            super().Allreduce((send * weights[self.rank]).astype(send.dtype), recv, op)

    return Weighted


class LastBitComm(MPI.Intracomm):
    """One element of one rank is one unit in the last place too large."""

    def Allreduce(self, send: Any, recv: Any, op: MPI.Op = MPI.SUM) -> None:
        super().Allreduce(send, recv, op)
        if self.rank == 1:
            recv[-1] = np.nextafter(recv[-1], np.float32(np.inf))


class SwappingComm(MPI.Intracomm):
    """Two blocks changed places."""

    def Allgather(self, send: Any, recv: Any) -> None:
        super().Allgather(send, recv)
        n = send.size
        recv[:n], recv[n : 2 * n] = recv[n : 2 * n].copy(), recv[:n].copy()


class StaleComm(MPI.Intracomm):
    """Every other call returns the result of the call before."""

    calls = 0
    last: Any = None

    def Bcast(self, buf: Any, root: int = 0) -> None:
        super().Bcast(buf, root)
        self.calls += 1
        if self.calls % 2 and self.last is not None:
            buf[:] = self.last
        self.last = buf.copy()


class LazyComm(MPI.Intracomm):
    """Does nothing."""

    def Alltoall(self, send: Any, recv: Any) -> None:
        pass


class RootBlockComm(MPI.Intracomm):
    """Gives every rank the block of rank 0."""

    def Scatter(self, send: Any, recv: Any, root: int = 0) -> None:
        super().Scatter(None if send is None else np.tile(send[: recv.size], self.size), recv, root)


def measure_one(kind: type[MPI.Intracomm], comm: Any, collective: str, **more: Any) -> Row:
    chosen = options(check_warmup=0, **more)
    [row] = measure(kind(comm), collective, [more.pop("size", 64)], ("native",), chosen)
    return row


@pytest.mark.mpi(sizes=(4,))
@pytest.mark.parametrize("dtype", ["f4", "f8", "i4", "i1"])
def test_a_rank_counted_twice_while_another_is_dropped_is_wrong_in_every_element(comm: Any, dtype: str) -> None:
    for weights in ((2, 0, 1, 1), (1, 1, 0, 2), (0, 1, 2, 1)):
        for count in (1, 25):
            size = count * np.dtype(dtype).itemsize
            [row] = measure(make_weighted_comm(*weights)(comm), "allreduce", [size], ("native",), options(dtype=dtype))
            assert row.validated is False
            assert row.wrong == count * comm.size * row.iterations


@pytest.mark.mpi(sizes=(4,))
def test_pairs_that_would_cancel_are_wrong_too(comm: Any) -> None:
    assert measure_one(make_weighted_comm(2, 0, 0, 2), comm, "allreduce").validated is False
    assert measure_one(make_weighted_comm(0, 2, 2, 0), comm, "allreduce").validated is False
    assert measure_one(make_weighted_comm(1, 1, 1, 1), comm, "allreduce").validated is True


@pytest.mark.mpi(sizes=(3,))
@pytest.mark.parametrize(
    ("kind", "collective"),
    [
        (LastBitComm, "allreduce"),
        (SwappingComm, "allgather"),
        (StaleComm, "bcast"),
        (LazyComm, "alltoall"),
        (RootBlockComm, "scatter"),
    ],
)
def test_every_other_kind_of_wrong_result_is_detected(comm: Any, kind: Callable[..., Any], collective: str) -> None:
    row = measure_one(kind, comm, collective)
    assert row.validated is False
    assert all(each == row for each in comm.allgather(row))


@pytest.mark.mpi(sizes=(3,))
def test_the_first_wrong_element_is_named(comm: Any) -> None:
    row = measure_one(LastBitComm, comm, "allreduce")
    assert row.wrong == row.iterations
    assert row.complaint.startswith("native: rank 1: element 15 is ")
    assert "1 of 16 wrong in call 0" in row.complaint
