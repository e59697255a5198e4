"""Two-level collectives on emulated nodes: shared memory inside, messages between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import verifiable
from mpi4py import MPI

from hpccomm import Communicator, context
from hpccomm.backends.schedules import Schedules
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.hierarchical import MESSAGE_BYTES, SEGMENT_BYTES, select_inter_node
from hpccomm.collectives.hierarchical import SHORT_BYTES as SHORT
from hpccomm.collectives.records import Program
from hpccomm.layout import Link

SHORT_BYTES, GATHERS_SHORT = SHORT["allreduce"], SHORT["allgather"]
PLACEMENTS = {
    2: ("01",),
    3: ("001", "010", "012"),
    4: ("0011", "0101", "0111", "2010"),
    7: ("0001122", "0120120", "0010000"),
}
LENGTHS = (0, 1, 3, SHORT_BYTES // 4, SHORT_BYTES // 4 + 1, 100_003, 2 * SEGMENT_BYTES // 4 + 5)
"""Of four bytes each: short, in one message, in several, in several segments."""


@pytest.fixture
def placed(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Communicator]]:
    """Communicators of the same ranks on several emulated nodes."""
    made = []
    for nodes in PLACEMENTS.get(comm.size, ()):
        here = int(nodes[comm.rank])
        monkeypatch.setattr(context, "ranks_of_this_node", lambda channel, here=here: channel.Split(here, channel.rank))
        each = Communicator(comm.Dup(), algorithm="hierarchical")
        assert each.layout.count == len(set(nodes))
        made.append(each)
    yield made
    for each in made:
        each.Free()


@pytest.mark.mpi(min_size=2)
def test_allreduces_of_every_placement_length_and_type(placed: list[Communicator]) -> None:
    for comm in placed:
        cases = [(n, "f4", "sum", placement) for n in LENGTHS for placement in (True, False)]
        cases += [(1000, dtype, op, False) for dtype in ("i1", "f8", "c16") for op in verifiable.operations(dtype)]
        for n, dtype, op, in_place in cases:
            given = verifiable.operand(comm.rank, comm.size, n, dtype, op)
            a, b = given.copy(), np.empty_like(given)
            comm.Allreduce(MPI.IN_PLACE if in_place else a, a if in_place else b, getattr(MPI, op.upper()))
            assert np.array_equal(a if in_place else b, verifiable.reduction(comm.size, n, dtype, op))
            assert in_place or a.tobytes() == given.tobytes()


@pytest.mark.mpi(min_size=2)
def test_broadcasts_of_every_placement_length_and_root(placed: list[Communicator]) -> None:
    for comm in placed:
        for n in (0, 1, SHORT_BYTES // 4 + 1, 2 * SEGMENT_BYTES // 4 + 5):
            for root in {0, comm.size // 2, comm.size - 1}:
                want = (np.arange(n) % 251 + root).astype("i4")
                found = want.copy() if comm.rank == root else np.full(n, -1, "i4")
                found.flags.writeable = comm.rank != root
                for _ in range(2):
                    comm.Bcast(found, root)
                    assert np.array_equal(found, want), (n, root)
                    if comm.rank != root:
                        found[...] = -1
        strided = np.zeros((5, 3), "f8")
        strided[:, 1] = comm.rank
        column = MPI.DOUBLE.Create_vector(5, 1, 3).Commit()
        comm.Bcast([strided.ravel()[1:], 1, column], comm.size - 1)
        column.Free()
        assert (strided[:, 1] == comm.size - 1).all()
        assert not strided[:, [0, 2]].any()


@pytest.mark.mpi(min_size=2)
def test_reductions_of_every_placement_length_type_and_root(placed: list[Communicator]) -> None:
    for comm in placed:
        cases = [(n, "f4", "sum") for n in (0, 1, SHORT_BYTES // 4 + 1, SEGMENT_BYTES // 4 + 5)]
        cases += [(1000, "i1", "prod"), (1000, "c16", "sum"), (3000, "f2", "sum")]
        for n, dtype, op in cases:
            for root in {0, comm.size // 2, comm.size - 1}:
                given = verifiable.operand(comm.rank, comm.size, n, dtype, op)
                want = verifiable.reduction(comm.size, n, dtype, op)
                a, b = given.copy(), np.empty_like(given)
                for _ in range(2):
                    comm.Reduce(a, b if comm.rank == root else None, getattr(MPI, op.upper()), root)
                    assert comm.rank != root or np.array_equal(b, want), (n, dtype, op, root)
                    assert a.tobytes() == given.tobytes()
                into = (MPI.IN_PLACE, a) if comm.rank == root else (a, None)
                comm.Reduce(*into, getattr(MPI, op.upper()), root)
                assert np.array_equal(a, want if comm.rank == root else given)


@pytest.mark.mpi(min_size=2)
def test_all_ranks_get_the_same_bits_again_and_again(placed: list[Communicator]) -> None:
    for comm in placed:
        for n in (17, 5000, 300_001):
            a = np.random.default_rng(comm.rank).standard_normal(n).astype("f4")
            b = np.empty_like(a)
            for _ in range(3):
                comm.Allreduce(a, b)
                assert len(set(comm.allgather(b.tobytes()))) == 1


@pytest.mark.mpi(sizes=(4,))
def test_sixteen_bits_users_operations_and_other_collectives(placed: list[Communicator]) -> None:
    for comm in placed:
        half = np.full(3000, comm.rank + 1, "f2")
        comm.Allreduce(MPI.IN_PLACE, half)
        assert (half == 10).all()
        largest = MPI.Op.Create(lambda a, b, _: np.maximum(view(a), view(b), out=view(b)), commute=True)
        x = np.array([comm.rank, -comm.rank], "f8")
        comm.Allreduce(MPI.IN_PLACE, x, largest)
        assert x.tolist() == [3, 0]
        x = np.array([comm.rank, -comm.rank], "f8")
        comm.Reduce(x, y := np.zeros(2), largest, 1)
        assert y.tolist() == ([3, 0] if comm.rank == 1 else [0, 0])
        largest.Free()
        everybody = np.empty(4, "i8")
        comm.Allgather(np.array([comm.rank]), everybody)
        assert everybody.tolist() == [0, 1, 2, 3]


@pytest.mark.mpi(sizes=(4,))
@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16], ids=str)
def test_16_bit_floats_travel_in_16_bits(
    placed: list[Communicator], comm: Communicator, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their records, of every schedule, send the bytes of int16 and meet in as many."""
    bound: list[Program] = []
    bind = Schedules.bind

    def note(self: Schedules, program: Program, *rest: Any) -> Any:
        bound.append(program)
        return bind(self, program, *rest)

    monkeypatch.setattr(Schedules, "bind", note)
    for ranks in (*placed, comm):
        names = ["hierarchical"] if ranks is not comm else None
        for n in (1003, 20_001):
            for collective in ("allreduce", "reduce", "reduce_scatter"):
                for name in names or ALGORITHMS[collective]:
                    for kind in (dtype, "i2"):
                        x, y = np.ones(4 * n, kind), np.zeros(4 * n, kind)
                        if collective == "reduce_scatter":
                            ranks.Reduce_scatter_block(x, y := y[:n], algorithm=name)
                        else:
                            getattr(ranks, collective.title())(x, y, algorithm=name)
                        assert (y == ranks.size).all() or (collective == "reduce" and ranks.rank)
                    halves, integers = bound.pop(), bound.pop()
                    assert not bound
                    assert halves.records.tobytes() == integers.records.tobytes()
                    assert len(halves.records)
                    assert halves[1:] == integers[1:]


def view(memory: MPI.memory) -> np.ndarray:
    """The numbers that an operation was given."""
    return np.frombuffer(memory, "f8")


GATHERED = (0, 1, 3, GATHERS_SHORT // 28, 60_001, 300_007)
"""Elements of four bytes a rank: by the first ranks of the nodes, by all channels in one message a round, or more."""


def parts_of(p: int, n: int, uneven: bool) -> list[int]:
    """Elements of each rank; uneven ones with an empty part among them."""
    return [n * (rank % 3) + rank if uneven else n for rank in range(p)]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("uneven", [False, True])
def test_allgathers_of_every_placement_and_length(placed: list[Communicator], uneven: bool) -> None:
    for comm in placed:
        for n in GATHERED:
            counts = parts_of(comm.size, n, uneven)
            parts = [verifiable.operand(rank, comm.size, count, "i4", "sum") for rank, count in enumerate(counts)]
            whole, mine = np.full(sum(counts), -1, "i4"), parts[comm.rank].copy()
            for _ in range(2):
                if uneven:
                    comm.Allgatherv(mine, [whole, counts])
                else:
                    comm.Allgather(mine, whole)
                assert np.array_equal(whole, np.concatenate(parts))
                lo = sum(counts[: comm.rank])
                whole[:lo], whole[lo + counts[comm.rank] :] = -1, -1
                if uneven:
                    comm.Allgatherv(MPI.IN_PLACE, [whole, counts])
                else:
                    comm.Allgather(MPI.IN_PLACE, whole)
                assert np.array_equal(whole, np.concatenate(parts))
            assert np.array_equal(mine, parts[comm.rank])


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("uneven", [False, True])
def test_reduce_scatters_of_every_placement_length_and_type(placed: list[Communicator], uneven: bool) -> None:
    for comm in placed:
        cases = [(n, "i4", "sum") for n in GATHERED] + [(300, "f8", "max"), (7, "c16", "prod"), (300, "f2", "sum")]
        for n, dtype, op in cases:
            counts = parts_of(comm.size, n, uneven)
            total, lo = sum(counts), sum(counts[: comm.rank])
            given = verifiable.operand(comm.rank, comm.size, total, dtype, op)
            want = verifiable.reduction(comm.size, total, dtype, op)[lo : lo + counts[comm.rank]]
            a, b = given.copy(), np.empty(counts[comm.rank], dtype)
            for _ in range(2):
                comm.Reduce_scatter(a, b, counts, getattr(MPI, op.upper()))
                assert np.array_equal(b, want)
                assert a.tobytes() == given.tobytes()
            if not uneven:
                comm.Reduce_scatter_block(a, b, getattr(MPI, op.upper()))
                assert np.array_equal(b, want)
                comm.Reduce_scatter_block(MPI.IN_PLACE, a, getattr(MPI, op.upper()))
                assert np.array_equal(a[: counts[comm.rank]], want)


@pytest.mark.mpi(sizes=(3,))
def test_gathers_with_displacements_and_users_operations(placed: list[Communicator]) -> None:
    largest = MPI.Op.Create(lambda a, b, _: np.maximum(view(a), view(b), out=view(b)), commute=True)
    for comm in placed:
        whole = np.full(9, -1, "i4")
        comm.Allgatherv(np.full(comm.rank, comm.rank, "i4"), [whole, [0, 1, 2], [0, 7, 2]])
        assert whole.tolist() == [-1, -1, 2, 2, -1, -1, -1, 1, -1]
        most = np.empty(2)
        comm.Reduce_scatter_block(np.arange(6.0) * (comm.rank + 1), most, largest)
        assert most.tolist() == [6.0 * comm.rank, 6.0 * comm.rank + 3]
        assert "hierarchical" in comm.algorithms("allgather")
        assert "hierarchical" in comm.algorithms("reduce_scatter")
    largest.Free()


@pytest.mark.mpi(sizes=(2,))
def test_a_reduce_scatter_is_selected_by_its_bytes(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, asked = Communicator(comm.Dup()), []
    decide = nodes.context.decide

    def record(collective: str, nbytes: int, *rest: Any) -> Any:
        asked.append((collective, nbytes))
        return decide(collective, nbytes, *rest)

    monkeypatch.setattr(nodes.context, "decide", record)
    nodes.Reduce_scatter_block(np.ones(6, "f8"), np.empty(3))
    nodes.Reduce_scatter(np.ones(5, "f4"), np.empty(2 + comm.rank, "f4"), [2, 3])
    (least, most), (first, last) = asked[:2], asked[2:4]  # the shortest and the longest of their size
    assert ("reduce_scatter", 24) < least <= ("reduce_scatter", 48) <= most < ("reduce_scatter", 96)
    assert ("reduce_scatter", 10) < first <= ("reduce_scatter", 20) <= last < ("reduce_scatter", 40)
    nodes.Free()


@pytest.mark.mpi(sizes=(1, 3))
def test_on_one_node_hierarchical_runs_as_a_schedule_on_messages(comm: Communicator) -> None:
    for n in (0, 1, 5):
        whole = np.empty(n * comm.size, "i4")
        comm.Allgather(np.full(n, comm.rank, "i4"), whole, algorithm="hierarchical")
        assert np.array_equal(whole, np.repeat(np.arange(comm.size), n))
        total = np.empty(n, "i4")
        comm.Reduce_scatter_block(whole, total, algorithm="hierarchical")
        assert np.array_equal(total, np.full(n, comm.rank * comm.size))


def test_the_cheapest_algorithm_is_selected_between_nodes() -> None:
    link = Link(25.0, 8e-3)
    names = {id(each): name for name, each in ALGORITHMS["allreduce"].items()}

    def select(nodes: int, nbytes: int) -> str:
        return names[id(select_inter_node(nodes, nbytes, 2, link))]

    assert [select(nodes, 8) for nodes in (2, 3, 4, 8)] == ["doubling"] * 4
    assert [select(nodes, 1 << 24) for nodes in (2, 3, 4, 8)] == ["doubling", "ring", "ring", "ring"]
    assert select(8, 4 * MESSAGE_BYTES) == "butterfly"
