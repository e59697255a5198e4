"""Communicators made from ours keep our collectives, the algorithm, and what mpi4py's class of them can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import hpccomm
from hpccomm import Communicator

pytestmark = pytest.mark.mpi(sizes=(1, 2, 3))


def ring(comm: Any) -> tuple[list[int], list[int]]:
    """This rank's neighbours in a ring: sources and destinations."""
    return [(comm.rank - 1) % comm.size], [(comm.rank + 1) % comm.size]


def edges_of_ring(p: int) -> tuple[list[int], list[int]]:
    """``index`` and ``edges`` of ``Create_graph``: every rank has the next one as its neighbour."""
    return list(range(1, p + 1)), [(rank + 1) % p for rank in range(p)]


def make_dist_graph(comm: Any) -> Any:
    _, destinations = ring(comm)
    return comm.Create_dist_graph([comm.rank], [1], destinations)


def complete_idup(comm: Any, *info: Any) -> Any:
    made, request = (comm.Idup_with_info if info else comm.Idup)(*info)
    request.Wait()
    return made


def merge(comm: Any) -> Any:
    """An intercommunicator of rank 0 and the others, merged again."""
    local = comm.Split(comm.rank > 0, comm.rank)
    if comm.size == 1:
        return local
    between = local.Create_intercomm(0, comm, int(comm.rank == 0), 7).Dup()
    assert isinstance(between, MPI.Intercomm)
    return between.Merge(comm.rank > 0)


MAKERS: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
    "Dup": (MPI.Intracomm, lambda comm: comm.Dup()),
    "Clone": (MPI.Intracomm, lambda comm: comm.Clone()),
    "Dup_with_info": (MPI.Intracomm, lambda comm: comm.Dup_with_info(MPI.INFO_NULL)),
    "Idup": (MPI.Intracomm, complete_idup),
    "Split": (MPI.Intracomm, lambda comm: comm.Split(0, comm.rank)),
    "Split_type": (MPI.Intracomm, lambda comm: comm.Split_type(MPI.COMM_TYPE_SHARED)),
    "Create": (MPI.Intracomm, lambda comm: comm.Create(comm.Get_group())),
    "Create_group": (MPI.Intracomm, lambda comm: comm.Create_group(comm.Get_group())),
    "Merge": (MPI.Intracomm, merge),
    "Create_cart": (MPI.Cartcomm, lambda comm: comm.Create_cart([comm.size], periods=True)),
    "Sub": (MPI.Cartcomm, lambda comm: comm.Create_cart([comm.size, 1], periods=True).Sub([True, False])),
    "Dup of Cartcomm": (MPI.Cartcomm, lambda comm: comm.Create_cart([comm.size], periods=True).Dup()),
    "Split of Cartcomm": (MPI.Intracomm, lambda comm: comm.Create_cart([comm.size]).Split(0, comm.rank)),
    "Create_graph": (MPI.Graphcomm, lambda comm: comm.Create_graph(*edges_of_ring(comm.size))),
    "Create_dist_graph": (MPI.Distgraphcomm, make_dist_graph),
    "Create_dist_graph_adjacent": (
        MPI.Distgraphcomm,
        lambda comm: comm.Create_dist_graph_adjacent(*ring(comm)),
    ),
    "Idup of Distgraphcomm": (
        MPI.Distgraphcomm,
        lambda comm: complete_idup(comm.Create_dist_graph_adjacent(*ring(comm))),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_derived_communicator_is_ours_and_of_mpi4pys_class(comm: Communicator, name: str) -> None:
    theirs, make = MAKERS[name]
    comm.algorithm = "butterfly"
    made = make(comm)
    assert isinstance(made, Communicator)
    assert isinstance(made, theirs)
    assert isinstance(made, MPI.Topocomm) == issubclass(theirs, MPI.Topocomm)
    assert made.algorithm == "butterfly"
    assert made.size == comm.size
    total = np.empty(3)
    made.Allreduce(np.full(3, made.rank + 1.0), total, algorithm="native")
    assert np.array_equal(total, np.full(3, sum(range(1, made.size + 1))))
    assert "native" in made.algorithms("allreduce")
    made.Free()


@pytest.mark.parametrize("name", ["Create_cart", "Sub", "Create_dist_graph", "Create_dist_graph_adjacent"])
def test_neighbourhood_collectives_are_mpis(comm: Communicator, name: str) -> None:
    made = MAKERS[name][1](comm)
    sent = np.full(2, made.rank, "i4")
    degree = 2 if isinstance(made, MPI.Cartcomm) else 1
    got = np.empty((degree, 2), "i4")
    made.Neighbor_allgather(sent, got)
    before, after = (made.rank - 1) % made.size, (made.rank + 1) % made.size
    assert got[:, 0].tolist() == [before, after][:degree]
    assert made.neighbor_allgather(made.rank) == [before, after][:degree]
    made.Free()


def test_topology_is_mpis_integer_and_layout_is_ours(comm: Communicator) -> None:
    for made, kind in (
        (comm.Dup(), MPI.UNDEFINED),
        (comm.Create_cart([comm.size]), MPI.CART),
        (comm.Create_graph(*edges_of_ring(comm.size)), MPI.GRAPH),
        (comm.Create_dist_graph_adjacent(*ring(comm)), MPI.DIST_GRAPH),
    ):
        assert made.topology == made.Get_topology() == kind
        assert made.is_topo == (kind != MPI.UNDEFINED)
        assert made.layout.size == made.size
        made.Free()


def test_a_communicator_of_mpi4py_with_a_topology_keeps_it(comm: Communicator) -> None:
    theirs = MPI.Intracomm(comm).Create_cart([comm.size], periods=True)
    ours = Communicator(theirs, "native")
    assert isinstance(ours, hpccomm.communicator.Cartcomm)
    assert (ours.algorithm, ours.dims, ours.Shift(0, 1)) == ("native", [comm.size], theirs.Shift(0, 1))
    ours.Free()


def test_a_rank_outside_gets_the_null_communicator(comm: Communicator) -> None:
    made = comm.Split(MPI.UNDEFINED if comm.rank else 0)
    cart = comm.Create_cart([1])
    assert (made == MPI.COMM_NULL) == (cart == MPI.COMM_NULL) == (comm.rank > 0)
    assert isinstance(cart, MPI.Cartcomm)
    if comm.rank == 0:
        assert isinstance(made, Communicator)
        made.Free()
        cart.Free()


class Named(Communicator):
    """A subclass whose second argument is its own."""

    name_given: str

    def __new__(cls, comm: Any = None, name_given: str = "unnamed") -> Named:
        self: Any = super().__new__(cls, comm)
        self.name_given = name_given
        return self  # type: ignore[no-any-return]


def test_a_subclass_never_gets_the_algorithm_for_its_own_argument(comm: Communicator) -> None:
    named = Named(comm, "solver")
    named.algorithm = "native"
    for made in (named.Dup(), named.Split(0, comm.rank)):
        assert type(made) is Named
        assert made.algorithm == "native"
        assert getattr(made, "name_given", "unnamed") == "unnamed"
        made.Free()
    cart = named.Create_cart([comm.size])
    assert type(cart) is hpccomm.communicator.Cartcomm
    cart.Free()


def test_create_from_group_makes_one_of_ours(comm: Communicator) -> None:
    try:
        made = Communicator.Create_from_group(comm.Get_group(), f"hpccomm.test.{comm.size}")
    except (NotImplementedError, MPI.Exception) as error:
        pytest.skip(f"this MPI cannot: {error}")
    assert type(made) is Communicator
    assert made.allreduce(1) == comm.size
    made.Free()


def test_no_attribute_of_the_user_is_copied_and_nothing_is_received_from_us(comm: Communicator) -> None:
    """The set-up of a communicator runs no copy callback, and no message of a collective matches a user's receive."""
    plain = MPI.Intracomm(comm).Dup()
    copies: list[Any] = []
    keyval = MPI.Comm.Create_keyval(copy_fn=lambda handle, key, value: copies.append(value) or value)
    plain.Set_attr(keyval, "the user's")
    ours = Communicator(plain)
    pending = plain.irecv(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
    x = np.ones(1 << 16)
    for algorithm in ours.algorithms("allreduce"):
        ours.Allreduce(x, np.empty_like(x), algorithm=algorithm)
    for call in (ours.Barrier, lambda: ours.Bcast(x, 0), lambda: hpccomm.allgather(x[:3], ours)):
        call()
    hpccomm.broadcast(x[:3], 0, ours)
    assert copies == []
    arrived, _ = pending.test()
    assert not arrived
    pending.cancel()
    pending.wait()
    MPI.Comm.Free_keyval(keyval)
    ours.Free()
