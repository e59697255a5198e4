"""Where nothing was measured, the first use of a size compares with native MPI, for all ranks at one call."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm import first_use
from hpccomm.commands import tune
from hpccomm.errors import MismatchError
from hpccomm.performance import tuning
from hpccomm.performance.tuning import Row, Table

COLLECTIVES = ("allreduce", "reduce", "reduce_scatter", "allgather", "bcast", "alltoall")
N = 12_000
"""Elements; not a power of two."""


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """What would have been written to the file of the user."""
    rows: list[Row] = []
    monkeypatch.setattr(first_use, "save", lambda mpi, more: rows.extend(more))
    monkeypatch.setattr(first_use, "load", lambda mpi: ())
    return rows


@contextmanager
def open_unmeasured(world: MPI.Intracomm, guard: str = "on") -> Iterator[hpccomm.Communicator]:
    """A communicator on a processor that no row was measured on."""
    comm = hpccomm.Communicator(MPI.Intracomm(world).Dup())
    context = comm.context
    context.settings["HPCCOMM_GUARD"] = guard
    context.table = replace(context.table, cpu="a processor that nobody has" if guard == "on" else "")
    yield comm
    comm.Free()


def calls(comm: Any, n: int = N) -> dict[str, Callable[[], np.ndarray]]:
    """Each collective on small integers; what it gives on this rank."""
    p, r = comm.size, comm.rank
    x, y = np.full(n * p, r + 1, "f4"), np.zeros(n * p, "f4")

    def run(name: str, *arguments: Any) -> Callable[[], np.ndarray]:
        def act() -> np.ndarray:
            y[:] = x if name == "Bcast" else 0
            getattr(comm, name)(*arguments)
            return y.copy()

        return act

    return {
        "allreduce": run("Allreduce", x[:n], y[:n]),
        "reduce": run("Reduce", x[:n], y[:n]),
        "reduce_scatter": run("Reduce_scatter_block", x, y[:n]),
        "allgather": run("Allgather", x[:n], y),
        "bcast": run("Bcast", y[:n]),
        "alltoall": run("Alltoall", x, y),
    }


def nbytes_of(collective: str, p: int) -> int:
    """The length by which the table decides about the calls above."""
    return 4 * N * (p if collective in tuning.BLOCKWISE else 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("collective", COLLECTIVES)
def test_the_first_call_of_a_size_compares_and_all_ranks_decide_alike(
    comm: MPI.Intracomm, collective: str, kept: list[Row]
) -> None:
    with open_unmeasured(comm) as ours:
        length = nbytes_of(collective, ours.size)
        before = ours.explain(collective, length)
        act, native = calls(ours)[collective], calls(MPI.Intracomm(comm))[collective]
        for _ in range(4):
            assert np.array_equal(act(), native())
        after = ours.explain(collective, length)
        assert len(set(comm.allgather(after))) == 1
        rows = ours.context.table.first_use
        assert len(set(comm.allgather(rows))) == 1
        if not before.candidate:  # native was faster where it was measured
            assert not rows
            return
        assert (before.algorithm, after.candidate) == ("native", "")
        assert {row.algorithm for row in rows} == {"native", before.candidate}
        assert after.algorithm in ("native", before.candidate)
        assert all(row.us > 0 and row.collective == collective and row.per_node == ours.size for row in rows)
        assert kept in ((list(rows), []) if comm.rank == 0 else ([],))  # a busy machine is not kept


@pytest.mark.mpi(min_size=2)
def test_a_size_class_is_compared_once(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    inner = first_use.time_in_turns

    def count(*arguments: Any) -> Any:
        measured.append(1)
        return inner(*arguments)

    monkeypatch.setattr(first_use, "time_in_turns", count)
    monkeypatch.setattr(first_use, "ALL_SECONDS", 1e9)  # a busy machine spends the usual time on the first class
    with open_unmeasured(comm) as ours:
        for n in (100_000, 100_001, 99_999, 50_000, 100_000):
            x, y = np.full(n, ours.rank, "f8"), np.zeros(n, "f8")
            for _ in range(3):
                ours.Allreduce(x, y)
            assert (y == sum(range(ours.size))).all()
        assert len(measured) == 2  # 50,000 elements are of another class


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("winner", ["native", "shared"])
def test_the_faster_algorithm_takes_the_later_calls(
    comm: MPI.Intracomm, winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"native": 100.0, "shared": 50.0 if winner == "shared" else 99.0}
    monkeypatch.setattr(first_use, "time_in_turns", lambda comm, runs: (times, True))
    with open_unmeasured(comm) as ours:
        x, y = np.ones(N, "f4"), np.zeros(N, "f4")
        for _ in range(3):
            ours.Allreduce(x, y)
            assert (y == ours.size).all()
        found = ours.explain("allreduce", x.nbytes)
        assert found.algorithm == winner
        assert "50 us" in found.reason or winner == "native"


@pytest.mark.mpi(min_size=2)
def test_when_the_time_is_spent_sizes_stay_native(comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's clock decides for all ranks."""
    monkeypatch.setattr(first_use, "ALL_SECONDS", -1.0 if comm.rank == 0 else 1e9)
    monkeypatch.setattr(first_use, "SHARE", 0.0)
    with open_unmeasured(comm) as ours:
        x, y = np.ones(N, "f4"), np.zeros(N, "f4")
        for _ in range(3):
            ours.Allreduce(x, y)
            assert (y == ours.size).all()
        assert not ours.context.table.first_use
        assert ours.explain("allreduce", x.nbytes).algorithm == "native"


@pytest.mark.mpi(min_size=2)
def test_a_comparison_is_short(comm: MPI.Intracomm) -> None:
    """The numbers of rounds and repetitions are bounded by the time of the first round, for all ranks alike."""
    slept = 0.03

    def run() -> None:
        counted.append(1)
        if comm.rank == 0 and len(counted) == 1:
            time.sleep(slept)

    counted: list[int] = []
    first_use.time_in_turns(comm, {"a": run, "native": lambda: None})
    assert len(set(comm.allgather(len(counted)))) == 1
    assert len(counted) <= 3


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("noise", [0.0, 0.004])
def test_what_a_busy_machine_decides_is_not_kept(comm: MPI.Intracomm, noise: float) -> None:
    """One rank sees the noise, all ranks learn of it."""
    slow = itertools.cycle([noise, noise, noise, 0.0] if comm.rank == 0 else [0.0])
    runs = {name: (lambda: time.sleep(0.0002 + next(slow))) for name in ("shared", "native")}
    times, steady = first_use.time_in_turns(comm, runs)
    assert len(set(comm.allgather((tuple(times.items()), steady)))) == 1
    assert min(times.values()) >= 200
    assert not (noise and steady)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("keep", [False, True])
def test_kept_decisions_are_those_of_rank_0(comm: MPI.Intracomm, keep: bool, kept: list[Row]) -> None:
    with open_unmeasured(comm) as ours:
        rows = [first_use.row_of("allreduce", "native", ours.size, 1024, 3.5)]
        ours.context.add_first_use(rows, keep)
        assert ours.context.table.first_use == tuple(rows)
        assert kept == (rows if keep and comm.rank == 0 else [])


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("guard", ["off", "on"])
def test_reproducible_runs_and_those_without_guard_compare_nothing(comm: MPI.Intracomm, guard: str) -> None:
    with open_unmeasured(comm, guard) as ours:
        x, y = np.full(N, 0.1 * ours.rank, "f4"), np.zeros(N, "f4")
        ours.Allreduce(x, y, reproducible=guard == "on")
        ours.Reduce(x, y, reproducible=guard == "on")
        assert not ours.context.table.first_use


@pytest.mark.mpi(min_size=2)
def test_explain_compares_nothing(comm: MPI.Intracomm) -> None:
    with open_unmeasured(comm) as ours:
        if ours.rank == 0:
            assert ours.explain("allreduce", 4 * N).candidate == "shared"
        comm.Barrier()
        assert not ours.context.table.first_use


@pytest.mark.mpi(min_size=2)
def test_ranks_that_make_different_calls_at_a_first_use_are_named(comm: MPI.Intracomm) -> None:
    with open_unmeasured(comm) as ours:
        x, y = np.ones(N, "f4"), np.zeros(N, "f4")
        act = (lambda: ours.Allreduce(x, y)) if ours.rank == 0 else ours.Barrier
        with pytest.raises(MismatchError):
            act()
        comm.Barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("kind", ["float16", "pairs", "complex", "small integers", "user's operation"])
def test_calls_of_every_dtype_and_operation_are_right_at_a_first_use(comm: MPI.Intracomm, kind: str) -> None:
    with open_unmeasured(comm) as ours:
        p = ours.size
        if kind == "pairs":
            x = np.zeros(500, np.dtype([("value", "f8"), ("index", "i4")], align=True))
            x["value"], x["index"] = 1, 5 + ours.rank
            y = np.zeros_like(x)
            ours.Allreduce([x, MPI.DOUBLE_INT], [y, MPI.DOUBLE_INT], MPI.MAXLOC)
            assert (y["index"] == 5).all()
            return
        if kind == "user's operation":
            op = MPI.Op.Create(lambda a, b, t: np.frombuffer(b, "f4").__iadd__(np.frombuffer(a, "f4")), commute=True)
            x, y = np.ones(500, "f4"), np.zeros(500, "f4")
            ours.Allreduce(x, y, op)
            op.Free()
        else:
            dtype = {"float16": "f2", "complex": "c16", "small integers": "i1"}[kind]
            x, y = np.ones(500, dtype), np.zeros(500, dtype)
            ours.Allreduce(x, y)
        assert (y == p).all()


@pytest.mark.mpi(sizes=(2, 3))
def test_vectors_of_one_element_are_compared_and_those_without_never(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that stays undecided would be compared by the ranks alone that bind their call anew."""
    compared: list[int] = []
    measure = first_use.FirstUse._measure

    def note(self: Any, collective: str, length: int, candidate: str) -> Any:
        compared.append(length)
        return measure(self, collective, length, candidate)

    monkeypatch.setattr(first_use.FirstUse, "_measure", note)
    with open_unmeasured(comm) as ours:
        for n in (0, 1):
            for name, act in calls(ours, n).items():
                assert np.array_equal(act(), calls(MPI.Intracomm(comm), n)[name]())
            assert bool(compared) == bool(n)
        for _ in range(3):
            counts = [0] * ours.size
            ours.Allgatherv(np.empty(0), [np.empty(4 if ours.rank else 0), counts])


def test_decisions_are_kept_and_merged_with_those_of_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("HPCCOMM_CACHE", str(tmp_path))
    mpi = "Open MPI 5.0.11"
    row = first_use.row_of("allreduce", "native", 8, 1024, 3.5)._replace(mpi=mpi)
    other, again = row._replace(algorithm="shared"), row._replace(us=4.0)
    assert first_use.load(mpi) == ()
    path = first_use.save(mpi, [row])
    assert path is not None
    assert first_use.load(mpi) == (row,)
    first_use.save(mpi, [other, again])
    assert first_use.load(mpi) == (again, other)
    assert first_use.load("MPICH 5.0.2") == ()
    tuning.write(Table((row._replace(cpu="another"),)), path)
    assert first_use.load(mpi) == ()
    for content in ("", "[]", '{"schema": 1, "machine": null, "rows": [{"us": -1}]}', "\x00"):
        path.write_text(content)
        assert first_use.load(mpi) == ()
    path.unlink()
    path.mkdir()
    assert first_use.load(mpi) == ()
    assert first_use.save(mpi, [row]) is None


@pytest.mark.mpi(min_size=2)
def test_frozen_decisions_are_complete_and_need_no_measurement(
    comm: MPI.Intracomm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(comm.bcast(str(tmp_path))) / "frozen.json"
    monkeypatch.setattr(
        first_use, "time_in_turns", lambda comm, runs: (dict.fromkeys(runs, 10.0) | {"shared": 5.0}, True)
    )
    monkeypatch.setattr(tune, "COLLECTIVES", ("bcast", "alltoall"))
    with open_unmeasured(comm) as ours:
        assert tune.freeze(ours, path) == 0
        comm.Barrier()
        frozen = tuning.read(path)
        assert frozen.frozen
        for collective in ("bcast", "alltoall"):
            for nbytes in (ours.size << k for k in range(2, 26)):
                found = frozen.choose(collective, 1, ours.size, nbytes)
                assert not found.candidate
                assert found.algorithm == ours.explain(collective, nbytes).algorithm
        ours.context.table = frozen
        before = len(ours.context.table.first_use)
        for act in calls(ours).values():
            act()
        assert len(ours.context.table.first_use) == before
