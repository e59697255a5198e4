"""Shared memory inside nodes that are made believe, messages between them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import Communicator, resources
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.between import MESSAGE_BYTES, SEGMENT_BYTES, inter_node
from hpccomm.collectives.cost import Link
from hpccomm.testing import verifiable
from hpccomm.two_levels import SHORT_BYTES

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
    """Communicators of the same ranks, believed to be on several nodes."""
    made = []
    for nodes in PLACEMENTS.get(comm.size, ()):
        here = int(nodes[comm.rank])
        monkeypatch.setattr(
            resources, "ranks_of_this_node", lambda channel, here=here: channel.Split(here, channel.rank)
        )
        each = Communicator(comm.Dup(), algorithm="hierarchical")
        assert each.topology.count == len(set(nodes))
        made.append(each)
    yield made
    for each in made:
        each.Free()


@pytest.mark.mpi(min_size=2)
def test_every_placement_length_and_type(placed: list[Communicator]) -> None:
    for comm in placed:
        cases = [(n, "f4", "sum", placement) for n in LENGTHS for placement in (True, False)]
        cases += [(1000, dtype, op, False) for dtype in ("i1", "f8", "c16") for op in verifiable.operations(dtype)]
        for n, dtype, op, in_place in cases:
            given = verifiable.operand(comm.rank, comm.size, n, dtype, op)
            a, b = given.copy(), np.empty_like(given)
            comm.Allreduce(MPI.IN_PLACE if in_place else a, a if in_place else b, getattr(MPI, op.upper()))
            assert np.array_equal(a if in_place else b, verifiable.expected(comm.size, n, dtype, op))
            assert in_place or a.tobytes() == given.tobytes()


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
        largest.Free()
        everybody = np.empty(4, "i8")
        comm.Allgather(np.array([comm.rank]), everybody)
        assert everybody.tolist() == [0, 1, 2, 3]


def view(memory: MPI.memory) -> np.ndarray:
    """The numbers that an operation was given."""
    return np.frombuffer(memory, "f8")


def test_between_nodes_goes_what_costs_least() -> None:
    link = Link(25.0, 8e-3)
    names = {id(each): name for name, each in ALGORITHMS["allreduce"].items()}

    def chosen(nodes: int, nbytes: int) -> str:
        return names[id(inter_node(nodes, nbytes, 2, link))]

    assert [chosen(nodes, 8) for nodes in (2, 3, 4, 8)] == ["doubling"] * 4
    assert [chosen(nodes, 1 << 24) for nodes in (2, 3, 4, 8)] == ["doubling", "ring", "ring", "ring"]
    assert chosen(8, 4 * MESSAGE_BYTES) == "butterfly"
