"""Makers that differ between ranks where they must not are refused before MPI is called; legal differences pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator, MismatchError, TransportError, context
from hpccomm.calls.makers import MAKERS, MOST_BYTES, describe_making, shorten
from hpccomm.communicator import keep_ours
from hpccomm.observe.flight_recorder import recorder

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


def adjacent(weights: Any, reorder: bool = False) -> Make:
    def make(comm: Any) -> Any:
        before, after = [(comm.rank - 1) % comm.size], [(comm.rank + 1) % comm.size]
        return comm.Create_dist_graph_adjacent(before, after, weights, weights, reorder=reorder)

    return make


def graph(step: int, first: int = 1) -> Make:
    """A ring, whose index may begin with 0."""

    def make(comm: Any) -> Any:
        p = comm.size
        return comm.Create_graph(list(range(first, p + 1)), [(rank + step) % p for rank in range(p)])

    return make


def barrier(comm: Any) -> None:
    comm.Barrier()


def reduce_scatter(comm: Any) -> None:
    comm.Reduce_scatter(np.ones(comm.size), np.empty(1))


def between(leader: int) -> Make:
    """An intercommunicator, which is never made: the ranks of one side do not agree."""
    return lambda comm: comm.Create_intercomm(leader, comm, 0)


DUP, SPLIT = (lambda comm: comm.Dup()), (lambda comm: comm.Split(0, comm.rank))
TYPE = MPI.COMM_TYPE_SHARED

CONTRADICTIONS = {
    "another maker": Case(DUP, SPLIT, "Dup", "Split"),
    "Split and Create": Case(SPLIT, lambda comm: comm.Create(comm.Get_group()), "Split", "Create"),
    "Split_type and Split": Case(lambda comm: comm.Split_type(TYPE), SPLIT, "Split_type(", "Split"),
    "a barrier": Case(DUP, barrier, "Dup", "Barrier"),
    "a barrier of the usual ranks": Case(barrier, SPLIT, "Barrier", "Split"),
    "a call of objects": Case(SPLIT, lambda comm: comm.allgather(1), "Split", "allgather"),
    "a call that exchanges counts": Case(barrier, reduce_scatter, "Barrier", "Reduce_scatter without recvcounts"),
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
    "weights": Case(adjacent([1]), adjacent(None), "(weights, ", "(no weights, "),
    "reorder of a graph": Case(adjacent(None, True), adjacent(None), "reorder=True", "reorder=False"),
    "remaining dimensions": Case(sub_of(True, False), sub_of(False, True), "[True, False]", "[False, True]"),
    "leaders": Case(between(0), between(1), "local_leader=0", "local_leader=1"),
}
"""Mistakes, by what differs."""
OTHER_CALLS = ("a barrier", "a barrier of the usual ranks", "a call of objects", "a call that exchanges counts")
"""Those in which some ranks call no maker."""


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


def followers_pass_another_tag(comm: Any) -> Any:
    """An intercommunicator of the odd rank and the others; what the leaders alone must know is wrong elsewhere."""
    side = comm.Split(is_odd(comm), comm.rank)
    leads = side.rank == 0
    remote = 0 if is_odd(comm) else comm.size - 1
    made = side.Create_intercomm(0, comm, remote, 3) if leads else side.Create_intercomm(0, MPI.COMM_SELF, 0, 4)
    side.Free()
    return made


HALVES = "groups with no rank in common"
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
    HALVES: Case(halves, halves),
    "dims of another type": Case(cart("p1"), lambda comm: comm.Create_cart(np.array([comm.size, 1]), (0, 0), 0)),
    "no weights in two words": Case(adjacent(None), adjacent(MPI.UNWEIGHTED)),
    "an index with a 0 in front": Case(graph(1), graph(1, first=0)),
    "tags and leaders of others": Case(followers_pass_another_tag, followers_pass_another_tag),
    "edges": Case(adjacent(None), adjacent(None)),
    "ranks without edges": Case(without_edges, without_edges),
}
"""Differences that MPI allows."""


def split_nodes(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the odd rank, which is the last one, be on a node of its own."""
    per_node = max(1, comm.size - 1)
    monkeypatch.setattr(
        context, "ranks_of_this_node", lambda each: MPI.Intracomm(each).Split(each.rank // per_node, each.rank)
    )


@pytest.fixture(params=["one node", "a level", "several nodes", "several nodes in detail"])
def fresh(comm: Communicator, request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Communicator]:
    """A new communicator of all ranks, that of the node's ranks in one, or one on two nodes."""
    if request.param.startswith("several nodes"):
        split_nodes(comm, monkeypatch)
    if request.param.endswith("detail"):
        monkeypatch.setenv("HPCCOMM_DEBUG", "detail")
    made = Communicator(MPI.Intracomm(comm).Dup())
    yield made.intra_node if request.param == "a level" else made
    made.Free()


def compares_all(comm: Communicator) -> bool:
    """Whether every call is compared, not makers and the first other call only."""
    assert comm.context.consistency
    between = comm.context.consistency.between
    return between is None or not between.mask


def is_odd(comm: Communicator) -> bool:
    return comm.rank == comm.size - 1


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_makers_that_contradict_each_other_are_refused_on_all_ranks(
    comm: Communicator, fresh: Communicator, name: str
) -> None:
    case = CONTRADICTIONS[name]
    for _ in range(2 if compares_all(fresh) or name not in OTHER_CALLS else 1):  # it works after the first error
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
        if name != HALVES:
            raise
        pytest.skip(f"this MPI cannot: {error}")
    if made != MPI.COMM_NULL:
        made.Free()


@pytest.mark.mpi(sizes=(3,))
def test_calls_that_contradict_each_other_are_refused_by_a_rank_that_contradicts_neither(
    comm: Communicator, fresh: Communicator
) -> None:
    """Rank 0 has no edges, so none with weights and none without."""
    edges = [fresh.rank] if fresh.rank else []
    weights = [MPI.WEIGHTS_EMPTY, [1], None][fresh.rank]
    with pytest.raises(MismatchError, match="pass the same arguments on all ranks"):
        fresh.Create_dist_graph(edges, [1] * len(edges), edges, weights)
    assert fresh.allreduce(1) == fresh.size


@pytest.mark.mpi(sizes=(2, 3))
def test_the_first_call_after_makers_is_compared_between_nodes(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that is refused, the next one is the first."""
    split_nodes(comm, monkeypatch)
    made = Communicator(MPI.Intracomm(comm).Dup())
    for _ in range(2):
        made.Split(0).Free()
        with pytest.raises(MismatchError, match="same collective"):
            made.gather(1) if is_odd(made) else made.bcast(1)
    assert made.allgather(1) == [1] * made.size
    made.Free()


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize(("name", "arguments", "reported"), [("Dup", 0, True), ("Create_intercomm", 3, False)])
def test_a_wait_for_another_group_is_not_reported(
    comm: Communicator, name: str, arguments: int, reported: bool
) -> None:
    running: list[str] = []

    def native(self: Any, *args: Any) -> Any:
        running.extend(each.name for each in recorder().ring.running())
        return MPI.COMM_NULL

    native.__name__ = name
    keep_ours(native)(comm, *[0, comm, 0][:arguments])
    assert (name in running) == reported


@pytest.mark.mpi(sizes=(3,))
@pytest.mark.parametrize("name", ["Dup", "Create"])
def test_makers_run_where_a_node_has_no_consistency_table(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise TransportError("no space left on device")

    split_nodes(comm, monkeypatch)
    monkeypatch.setattr(context, "SharedSegment", fail)
    made = Communicator(MPI.Intracomm(comm).Dup())
    part = made.Dup() if name == "Dup" else made.Create(made.Get_group())
    assert part.allreduce(1) == comm.size
    part.Free()
    made.Free()


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("name", [*MAKERS, "Create_group"])
def test_arguments_that_mpi4py_does_not_take_give_its_own_error(comm: Communicator, name: str) -> None:
    ours = comm.Create_cart([comm.size]) if name == "Sub" else comm
    native = MPI.Cartcomm if name == "Sub" else MPI.Intracomm
    for given in ((), (None,), (3.5, "x", None, [])):
        errors = []
        for method in (getattr(native, name), getattr(type(ours), name)):
            try:
                method(ours, *given).Free()
                errors.append("")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        assert errors[0] == errors[1]
    if ours is not comm:
        ours.Free()


@pytest.mark.mpi(sizes=(2,))
def test_makers_of_a_communicator_that_another_object_has_freed_are_refused(comm: Communicator) -> None:
    first = Communicator(MPI.Intracomm(comm).Dup())
    second = Communicator(first)
    first.Free()
    calls: list[Callable[[], Any]] = [
        second.Dup,
        second.Split,
        lambda: second.Create_cart([2]),
        second.Barrier,
        lambda: second.allreduce(1),
        lambda: second.bcast(1),
        lambda: second.empty(3),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="has been freed: make a new one"):
            call()


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
    first, second = (describe_making(MPI.COMM_SELF, "Create_graph", (index, edges + k), {})[0] for k in range(2))
    assert first != second
    assert len("|".join(first)) < len(first.encode())


def test_every_maker_that_all_ranks_call_is_compared() -> None:
    """A maker of mpi4py is compared, or in the list of those whose call is another rank's, or no communicator's."""
    others = {"Create_group", "Idup", "Idup_with_info", "Spawn", "Spawn_multiple", "Accept", "Connect"}
    found = {each for each in dir(MPI.Cartcomm) if each.startswith(("Create_", "Dup", "Idup", "Split", "Spawn"))}
    found -= {each for each in found if each.endswith(("keyval", "errhandler", "from_group"))}
    assert found <= {*MAKERS} | others, found - {*MAKERS} - others
