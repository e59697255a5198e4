"""Makers that differ between ranks where they must not are refused before MPI is called; legal differences pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import Communicator, MismatchError, context
from hpccomm.calls.makers import MAKERS, MOST_BYTES, describe_making, shorten

Make = Callable[[Any], Any]


class Case(NamedTuple):
    """What the usual ranks call, what the odd one calls, and the words of the error about each."""

    usual: Make
    odd: Make
    usual_text: str = ""
    odd_text: str = ""


def group_of(comm: Any, *ranks: int) -> MPI.Group:
    return MPI.Group(comm.Get_group().Incl(list(ranks)))


def cart(dims: Any, *rest: Any) -> Make:
    """A Cartesian topology, which has two dimensions and all ranks."""
    return lambda comm: comm.Create_cart([comm.size, 1] if dims == "p1" else [1, comm.size], *rest)


def sub_of(*remain: bool) -> Make:
    return lambda comm: comm.Create_cart([comm.size, 1]).Sub(remain)


def adjacent(weighted: bool, reorder: bool = False) -> Make:
    def make(comm: Any) -> Any:
        before, after = [(comm.rank - 1) % comm.size], [(comm.rank + 1) % comm.size]
        weights = {"sourceweights": [1], "destweights": [1]} if weighted else {}
        return comm.Create_dist_graph_adjacent(before, after, **weights, reorder=reorder)

    return make


def graph(step: int) -> Make:
    def make(comm: Any) -> Any:
        p = comm.size
        return comm.Create_graph(list(range(1, p + 1)), [(rank + step) % p for rank in range(p)])

    return make


def barrier(comm: Any) -> None:
    comm.Barrier()


def between(leader: int, tag: int) -> Make:
    """An intercommunicator, which is never made: the ranks of one side do not agree."""
    return lambda comm: comm.Create_intercomm(leader, comm, 0, tag)


DUP, SPLIT = (lambda comm: comm.Dup()), (lambda comm: comm.Split(0, comm.rank))
TYPE = MPI.COMM_TYPE_SHARED

CONTRADICTIONS = {
    "another maker": Case(DUP, SPLIT, "Dup", "Split"),
    "Split and Create": Case(SPLIT, lambda comm: comm.Create(comm.Get_group()), "Split", "Create"),
    "Split_type and Split": Case(lambda comm: comm.Split_type(TYPE), SPLIT, "Split_type(", "Split"),
    "a barrier": Case(DUP, barrier, "Dup", "Barrier"),
    "a barrier of the usual ranks": Case(barrier, SPLIT, "Barrier", "Split"),
    "a call of objects": Case(SPLIT, lambda comm: comm.allgather(1), "Split", "allgather"),
    "a smaller group": Case(
        lambda comm: comm.Create(comm.Get_group()),
        lambda comm: comm.Create(group_of(comm, comm.rank)),
        "Create(group of ranks 0, 1",
        "Create(group of rank ",
    ),
    "no group": Case(
        lambda comm: comm.Create(comm.Get_group()),
        lambda comm: comm.Create(MPI.GROUP_EMPTY),
        "Create(group of ranks 0, 1",
        "Create(group of 0 ranks",
    ),
    "a group in another order": Case(
        lambda comm: comm.Create(comm.Get_group()),
        lambda comm: comm.Create(group_of(comm, *reversed(range(comm.size)))),
        "Create(group of ranks 0, 1",
        "Create(group of ranks ",
    ),
    "dims": Case(cart("p1"), cart("1p"), "Create_cart(dims=[", "dims=[1, "),
    "periods": Case(cart("p1", [True, False]), cart("p1"), "periods=[True, False]", "periods=[False, False]"),
    "reorder": Case(cart("p1", None, True), cart("p1"), "reorder=True", "reorder=False"),
    "a graph": Case(graph(1), graph(0), "Create_graph(index=[1, 2", "edges=[0, 1"),
    "weights": Case(adjacent(True), adjacent(False), "(weights, ", "(no weights, "),
    "reorder of a graph": Case(adjacent(False, True), adjacent(False), "reorder=True", "reorder=False"),
    "remaining dimensions": Case(sub_of(True, False), sub_of(False, True), "[True, False]", "[False, True]"),
    "leaders": Case(between(0, 3), between(1, 3), "local_leader=0, tag=3", "local_leader=1, tag=3"),
    "tags": Case(between(0, 3), between(0, 4), "local_leader=0, tag=3", "local_leader=0, tag=4"),
}
"""Mistakes, by what differs."""


def halves(comm: Any) -> Any:
    """Create with two groups that have no rank in common, each called by its ranks; some MPIs have only one of both."""
    first = range(comm.size // 2)
    mine = first if comm.rank in first else range(comm.size // 2, comm.size)
    return comm.Create(group_of(comm, *mine))


def without_edges(comm: Any) -> Any:
    """Edges from rank 0 only, with weights that ranks without edges do not pass."""
    last = comm.size - 1
    if comm.rank == 0:
        return comm.Create_dist_graph([0], [1], [last], [2])
    return comm.Create_dist_graph([], [], [], MPI.WEIGHTS_EMPTY)


LEGAL = {
    "colors and keys": Case(SPLIT, lambda comm: comm.Split(1, -comm.rank)),
    "a rank outside": Case(SPLIT, lambda comm: comm.Split(MPI.UNDEFINED)),
    "keys of types": Case(lambda comm: comm.Split_type(TYPE), lambda comm: comm.Split_type(TYPE, -5)),
    "a rank outside a type": Case(lambda comm: comm.Split_type(TYPE), lambda comm: comm.Split_type(MPI.UNDEFINED)),
    "duplicates": Case(DUP, lambda comm: comm.Clone()),
    "hints": Case(DUP, lambda comm: comm.Dup(MPI.INFO_ENV)),
    "a group without the odd rank": Case(
        *2 * (lambda comm: comm.Create(group_of(comm, *range(comm.size - 1))),),
    ),
    "groups with no rank in common": Case(halves, halves),
    "dims of another type": Case(cart("p1"), lambda comm: comm.Create_cart(np.array([comm.size, 1]), (0, 0), 0)),
    "edges": Case(adjacent(False), adjacent(False)),
    "ranks without edges": Case(without_edges, without_edges),
}
"""Differences that MPI allows."""


@pytest.fixture(params=["one node", "several nodes"])
def fresh(comm: Communicator, request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """A new communicator; the odd rank, which is the last one, may be on a node of its own.

    There every call is compared, because each case makes several.
    """
    if request.param == "several nodes":
        monkeypatch.setenv("HPCCOMM_DEBUG", "detail")
        per_node = max(1, comm.size - 1)
        monkeypatch.setattr(
            context, "ranks_of_this_node", lambda each: MPI.Intracomm(each).Split(each.rank // per_node, each.rank)
        )
    made = Communicator(MPI.Intracomm(comm).Dup())
    yield made
    made.Free()


def is_odd(comm: Communicator) -> bool:
    return comm.rank == comm.size - 1


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_makers_that_contradict_each_other_are_refused_on_all_ranks(
    comm: Communicator, fresh: Communicator, name: str
) -> None:
    case = CONTRADICTIONS[name]
    for _ in range(2):  # the communicator works after the first error
        with pytest.raises(MismatchError) as raised:
            (case.odd if is_odd(fresh) else case.usual)(fresh)
        usual, _, odd = str(raised.value).partition(f"rank {fresh.size - 1} called ")
        assert case.usual_text in usual + odd
        assert case.odd_text in odd
        fresh.Dup().Free()
        assert fresh.allreduce(1) == fresh.size


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", LEGAL)
def test_what_may_differ_passes(comm: Communicator, fresh: Communicator, name: str) -> None:
    case = LEGAL[name]
    try:
        made = (case.odd if is_odd(fresh) else case.usual)(fresh)
    except MPI.Exception as error:
        pytest.skip(f"this MPI cannot: {error}")
    if made != MPI.COMM_NULL:
        made.Free()


@pytest.mark.mpi(sizes=(2, 3))
def test_a_maker_may_follow_a_call_under_way(comm: Communicator, fresh: Communicator) -> None:
    for _ in range(20):
        request = fresh.Iallreduce(np.ones(5), total := np.empty(5))
        made = fresh.Split(0, -fresh.rank)
        request.Wait()
        assert (total == fresh.size).all()
        made.Free()


def test_arguments_of_a_maker_fit_into_a_fingerprint_and_differ_if_they_do() -> None:
    for length in (1, MOST_BYTES, 10 * MOST_BYTES):
        texts = shorten("7" * length), shorten("7" * (length - 1) + "8")
        assert texts[0] != texts[1]
        assert max(map(len, texts)) <= MOST_BYTES
    index, edges = np.arange(1, 200), np.zeros(199, int)
    first, second = (describe_making("Create_graph", (index, edges + k), {}) for k in range(2))
    assert first != second
    assert len("|".join(first)) < len(first.encode())


def test_every_maker_that_all_ranks_call_is_compared() -> None:
    """A maker of mpi4py is compared, or in the list of those whose call is another rank's, or no communicator's."""
    others = {"Create_group", "Idup", "Idup_with_info", "Spawn", "Spawn_multiple", "Accept", "Connect"}
    found = {each for each in dir(MPI.Cartcomm) if each.startswith(("Create_", "Dup", "Idup", "Split", "Spawn"))}
    found -= {each for each in found if each.endswith(("keyval", "errhandler", "from_group"))}
    assert found <= {*MAKERS} | others, found - {*MAKERS} - others
