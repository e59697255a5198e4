"""``pickle="auto"`` gives what mpi4py gives: the same values, types, dtypes and shapes, whatever each rank passes."""

from __future__ import annotations

import math
import pickle
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator, MismatchError, pickled
from hpccomm.calls.entry import COLLECTIVES
from hpccomm.errors import TransportError
from hpccomm.kernels.entry.records import STATUS

pytestmark = pytest.mark.mpi(sizes=(1, 2, 3))

OBJECTS: dict[str, Callable[[int], Any]] = {
    "int": lambda r: r + 1,
    "large int": lambda r: 10**30 + r,
    "an int beyond 64 bits on one rank": lambda r: 2**80 if r == 1 else r,
    "huge int": lambda r: 7**1000 + r,
    "float": lambda r: 0.1 + r,
    "nan": lambda r: math.nan if r == 1 else float(r),
    "complex": lambda r: 1j + r,
    "bool": lambda r: r == 0,
    "int and float": lambda r: 1.5 if r else 2,
    "float64": lambda r: np.float64(0.1) + r,
    "int8": lambda r: np.int8(3),
    "pair": lambda r: (1.5 * (r % 2), r),
    "string": lambda r: "ab" * r,
    "long string": lambda r: "ab" * 300,
    "list": lambda r: [r, "x"],
    "long list": lambda r: list(range(100 * (r + 1))),
    "short array": lambda r: np.arange(4.0) + 0.1 * r,
    "array": lambda r: np.arange(1000.0).reshape(10, 100) + r,
    "integers": lambda r: np.arange(500, dtype="i4") + r,
    "bytes": lambda r: np.full(500, 200, "u1"),
    "bools": lambda r: np.arange(500) % 2 == r % 2,
    "0-d array": lambda r: np.array(2.5),
    "Fortran order": lambda r: np.asfortranarray(np.arange(600.0).reshape(20, 30)),
    "every other element": lambda r: np.arange(2000.0)[::2],
    "arrays that broadcast": lambda r: np.ones((40, 50)) if r else np.ones(50),
    "an array and a number": lambda r: np.ones(500) if r else 2,
    "arrays of other dtypes": lambda r: np.ones(500, "f4" if r else "f8"),
    "objects": lambda r: np.array([r, "x", None], object),
}
"""An object for each rank."""

OPERATIONS = ("SUM", "PROD", "MAX", "MIN", "LAND", "LXOR", "BOR", "MAXLOC", "MINLOC")


def look(x: Any) -> Any:
    """What can be observed of a result: type, value, dtype, shape and order."""
    if isinstance(x, np.ndarray):
        flags = x.flags.writeable, x.flags.c_contiguous, x.flags.f_contiguous, x.flags.aligned
        return "array", x.dtype, x.shape, flags, x.tolist() if x.dtype == object else x.tobytes()
    if isinstance(x, list | tuple):
        return type(x), [look(each) for each in x]
    return type(x), repr(x)


def reduce_objects(objects: list[Any], op: MPI.Op) -> Any:
    """mpi4py's reduction, or the type of its error, without communication (where one rank alone would raise)."""
    objects, distance = [MPI.pickle.loads(MPI.pickle.dumps(each)) for each in objects], 1
    try:
        while distance < len(objects):
            for k in range(0, len(objects) - distance, 2 * distance):
                objects[k] = op(objects[k], objects[k + distance])
            distance *= 2
    except Exception as error:
        return type(error)
    return objects[0]


@pytest.fixture
def auto(comm: Communicator) -> Communicator:
    """The ranks of the test."""
    return Communicator(comm, pickle="auto")


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("name", OBJECTS)
@pytest.mark.filterwarnings("ignore:overflow")
def test_allreduce_is_mpi4pys(auto: Communicator, name: str, op: str) -> None:
    make, operation = OBJECTS[name], getattr(MPI, op)
    want = reduce_objects([make(rank) for rank in range(auto.size)], operation)
    if isinstance(want, type):
        with pytest.raises(want):
            auto.allreduce(make(auto.rank), operation)
        return
    mine = make(auto.rank)
    got = auto.allreduce(mine, operation)
    assert look(got) == look(want)
    assert look(mine) == look(make(auto.rank))
    if isinstance(mine, np.ndarray):
        assert got is not mine


@pytest.mark.parametrize("name", OBJECTS)
def test_allgather_and_bcast_are_mpi4pys(auto: Communicator, name: str) -> None:
    make, native = OBJECTS[name], MPI.Intracomm(auto)
    mine = make(auto.rank)
    got = auto.allgather(mine)
    assert look(got) == look(native.allgather(mine))
    for root in range(auto.size):
        copy = auto.bcast(mine if auto.rank == root else None, root)
        assert look(copy) == look(native.bcast(mine if auto.rank == root else None, root))
        if isinstance(mine, np.ndarray | list):
            assert copy is not mine


def test_objects_of_all_lengths_around_a_record_arrive(auto: Communicator) -> None:
    for n in range(0, 600, 7):
        assert auto.allgather("x" * (n + auto.rank)) == ["x" * (n + rank) for rank in range(auto.size)]
        arrays = auto.allgather(np.full(n // 8, auto.rank, "f8"))
        assert [each.tolist() for each in arrays] == [[float(rank)] * (n // 8) for rank in range(auto.size)]


def test_other_operations_are_applied_by_mpi4py(auto: Communicator) -> None:
    assert auto.allreduce([auto.rank], lambda a, b: a + b) == list(range(auto.size))
    op = MPI.Op.Create(lambda a, b, _: a * b, commute=True)
    assert auto.allreduce(2, op) == MPI.Intracomm(auto).allreduce(2, op)
    op.Free()
    assert auto.allreduce(2, "prod") == 2**auto.size
    with pytest.raises(ArgumentError, match="allreduce: op='avg' is for reductions to whole results"):
        auto.allreduce(2, "avg")


def test_the_setting_is_kept_and_pickling_is_the_default(comm: Communicator, auto: Communicator) -> None:
    for made in (auto.Dup(), auto.Split(0, auto.rank), auto.Create_cart([auto.size])):
        assert "allreduce" in vars(made)
        assert made.allreduce(1) == auto.size
        made.Free()
    assert "allreduce" not in vars(comm)
    assert comm.allreduce(1) == comm.size
    with pytest.raises(ArgumentError, match="pickle='fast' is not known: use one of mpi4py, auto"):
        Communicator(comm, pickle="fast")


@pytest.mark.mpi(sizes=(2, 3))
def test_ranks_that_call_different_methods_are_named(auto: Communicator) -> None:
    call = auto.allgather if auto.rank == 1 else auto.allreduce
    with pytest.raises(MismatchError, match="another lower-case collective or operation: make all ranks call the same"):
        call(3)
    with pytest.raises(MismatchError, match=r"called (SUM|MAX)"):
        auto.allreduce(3, MPI.MAX if auto.rank == 1 else MPI.SUM)


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda comm, odd: comm.bcast(1, int(odd)), r"root=0\).*rank 1 called Bcast.*root=1\)"),
        (lambda comm, odd: comm.bcast(1) if odd else comm.allgather(1), r"called Allgather.*rank 1 called Bcast"),
        (lambda comm, odd: comm.allreduce(1, min) if odd else comm.allgather(1), r"Allgather.*allreduce\(a function\)"),
    ],
)
def test_mistakes_are_named_with_either_setting(auto: Communicator, mistake: Any, sentence: str) -> None:
    ours = Communicator(auto.Dup(), pickle="auto", algorithm="shared")
    ours.Barrier()
    with pytest.raises(MismatchError, match=sentence):
        mistake(ours, ours.rank == 1)


@pytest.mark.parametrize("pickle", ["mpi4py", "auto"])
def test_an_operation_of_objects_may_be_a_name_and_what_is_none_is_refused(comm: Communicator, pickle: str) -> None:
    ours = Communicator(comm, pickle=pickle)
    rank, last = ours.rank, ours.size - 1
    for _ in range(3):
        assert ours.allreduce(rank, op="max") == ours.allreduce(rank, "max") == last
        assert (
            ours.reduce(rank, "max", last) == ours.reduce(rank, op="max", root=last) == (last if rank == last else None)
        )
        assert ours.scan(1, op="sum") == ours.scan(sendobj=1, op="sum") == rank + 1
        assert ours.exscan(1, "sum") == (rank or None)
    for name in ("allreduce", "reduce", "scan", "exscan"):
        for op in ("summ", "mean", 3, None):
            with pytest.raises(ArgumentError, match=f"rank {rank}: {name}: op="):
                getattr(ours, name)(1, op=op)
    assert ours.allreduce(1) == ours.size


def call_objects(comm: Communicator, root: int) -> dict[str, Any]:
    """What every lower-case collective gives, by its name."""
    rank, size = comm.rank, comm.size
    return {
        "allgather": comm.allgather(rank),
        "allreduce": comm.allreduce((rank,)),
        "alltoall": comm.alltoall([(rank, k) for k in range(size)]),
        "bcast": comm.bcast([rank], root),
        "exscan": comm.exscan(rank + 1, op=MPI.MAX),
        "gather": comm.gather(rank, root=root),
        "reduce": comm.reduce(rank + 1, MPI.PROD, root),
        "scan": comm.scan(str(rank)),
        "scatter": comm.scatter([str(k) for k in range(size)] if rank == root else None, root=root),
    }


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("first", ["arrays", "objects"])
def test_the_entry_compares_the_calls_of_objects(comm: Communicator, first: str) -> None:
    """From the first collective of arrays on; where a program has none, after some calls."""
    ours, root = Communicator(comm.Dup()), comm.size - 1
    rank, size = ours.rank, ours.size
    if first == "arrays":
        ours.Allreduce(np.ones(2), np.empty(2))
    want = call_objects(ours, root)
    assert want["allgather"] == list(range(size))
    assert want["allreduce"] == tuple(range(size))
    assert want["alltoall"] == [(k, rank) for k in range(size)]
    assert want["bcast"] == [root]
    assert want["exscan"] == (rank or None)
    assert want["gather"] == (list(range(size)) if rank == root else None)
    assert want["reduce"] == (math.factorial(size) if rank == root else None)
    assert want["scan"] == "".join(map(str, range(rank + 1)))
    assert want["scatter"] == str(rank)
    for _ in range(pickled.SET_UP_CALLS // len(want) + 2 if first == "objects" else 2):
        assert call_objects(ours, root) == want
    entry = ours.plans.entry
    if entry is not None:  # else shared memory runs without compiled functions here
        rows = {COLLECTIVES[key.kind & 0xFF] for key, _ in entry._keys}
        assert rows >= {f"{name}_object" for name in want}
    assert ours.allreduce([rank], op=lambda a, b: a + b) == list(range(size))


@pytest.mark.mpi(sizes=(2,))  # of three ranks one would wait for ever for a message of MPI, and the watchdog end it
@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda comm, odd: comm.reduce(1, root=int(odd)), r"reduce\(sum, root=0\).*reduce\(sum, root=1\)"),
        (lambda comm, odd: comm.allreduce(1, MPI.MAX if odd else MPI.SUM), r"allreduce\(sum\).*allreduce\(max\)"),
        (lambda comm, odd: comm.scan(1) if odd else comm.alltoall([0] * comm.size), r"alltoall, .*scan\(sum\)"),
        (lambda comm, odd: comm.gather(1) if odd else comm.Barrier(), r"Barrier, .*gather\(root=0\)"),
        (lambda comm, odd: comm.allgather(1) if odd else comm.Allgather(np.ones(1), np.ones(comm.size)), "allgather"),
    ],
)
def test_mistakes_of_calls_of_objects_are_named(comm: Communicator, calls: int, mistake: Any, sentence: str) -> None:
    """By the Python path, and by the entry after calls of each kind."""
    ours = Communicator(comm.Dup())
    ours.Barrier()
    for _ in range(calls):
        call_objects(ours, 0)
        call_objects(ours, 1)
        ours.allreduce(1, MPI.MAX)
        ours.Allgather(np.ones(1), np.ones(ours.size))
    failed = ""
    try:
        mistake(ours, ours.rank == 1)
    except MismatchError as error:
        failed = str(error)
    told = comm.allgather(failed)
    assert any(re.search(sentence, each) for each in told), told


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("calls", [0, 1])
def test_a_root_that_is_many_calls_ahead_is_compared_with_a_late_rank(comm: Communicator, calls: int) -> None:
    """It waits before it overwrites what the other one has to compare."""
    ours, ahead = Communicator(comm.Dup()), 200
    ours.Barrier()
    for _ in range(calls):
        call_objects(ours, 0)
        call_objects(ours, 1)
    failed = ""
    table, before = ours.context.consistency, 0
    if ours.rank == 1 and table is not None:  # until the root is as far as it goes
        while (now := abs(table._words[table._peers[0] + STATUS])) != before or now == 0:
            before = now
            time.sleep(0.3)
    try:
        for k in range(ahead):
            assert ours.bcast(k, int(ours.rank == 1 and k == 3)) == k
    except MismatchError as error:
        failed = str(error)
    told = comm.allgather(failed)
    assert re.search(r"bcast\(root=0\), rank 1 called bcast\(root=1\)", told[1]), told


@pytest.fixture(params=["mpi4py", "auto", "before the entry"])
def entered(comm: Communicator, request: pytest.FixtureRequest) -> Communicator:
    """A communicator of its own whose entry knows the calls of objects, or that has none yet."""
    made = Communicator(comm.Dup(), pickle="auto" if request.param == "auto" else "mpi4py")
    if request.param != "before the entry":
        made.Barrier()
        for root in range(made.size):
            call_objects(made, root)
    return made


@pytest.mark.mpi(sizes=(2, 3))
def test_ranks_may_spell_the_calls_of_objects_differently(entered: Communicator) -> None:
    """Some of them through the entry, others not: they meet in the same way."""
    rank, size = entered.rank, entered.size
    for spelt in (int, np.int64):
        root = spelt(1) if rank == 0 else 1
        op = MPI.Op(MPI.SUM) if rank == 0 and spelt is np.int64 else MPI.SUM
        for _ in range(2):
            assert entered.reduce(rank, op, root) == (size * (size - 1) // 2 if rank == 1 else None)
            assert entered.gather(rank, root=root) == (list(range(size)) if rank == 1 else None)
            assert entered.bcast(rank, root) == 1
            assert entered.scan(1, op) == rank + 1
            assert entered.allreduce(1, op) == size
            assert entered.alltoall(list(range(size))) == [rank] * size


class Distributed:
    """An object whose ranks exchange something while it is pickled and while it is read."""

    comm: Any = None

    def __init__(self, value: int) -> None:
        self.value = value

    def __reduce__(self) -> Any:
        return restore_distributed, (self.comm.allreduce(self.value),)

    def __add__(self, other: Distributed) -> Distributed:
        return Distributed(self.value + other.value)


def restore_distributed(total: int) -> Distributed:
    """What a rank reads."""
    return Distributed(Distributed.comm.allreduce(total) // Distributed.comm.size)


@pytest.mark.mpi(sizes=(1, 2, 3))
def test_objects_may_make_calls_while_they_are_pickled_and_read(entered: Communicator) -> None:
    Distributed.comm, size = entered, entered.size
    total = size * (size + 1) // 2
    for _ in range(3):
        made = entered.allgather(Distributed(entered.rank + 1))
        assert [each.value for each in made] == [total] * size
        made = entered.alltoall([Distributed(entered.rank + 1)] * size)
        assert [each.value for each in made] == [total] * size
        entered.Allreduce(np.ones(3), np.empty(3))
        assert entered.context.recorded.counts[1] == 0, "no call is under way"
    table = entered.context.consistency
    assert table is None or table.active_seq == 0


class Unpicklable:
    """An object that cannot be pickled."""

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("not this one")


class Unreadable:
    """An object that can be pickled and not be read."""

    def __reduce__(self) -> Any:
        return refuse_to_read, ()


def refuse_to_read() -> None:
    """Raise."""
    raise pickle.UnpicklingError("not this one")


class Picky:
    """An object that rank 0 cannot read."""

    def __reduce__(self) -> Any:
        return read_on_other_ranks, ()


def read_on_other_ranks() -> int:
    """The rank, or an error on rank 0."""
    if Distributed.comm.rank == 0:
        raise pickle.UnpicklingError("not on this rank")
    return int(Distributed.comm.rank)


def fail(call: Callable[[], Any], *errors: type[BaseException]) -> None:
    """Make a call that raises one of these errors."""
    with pytest.raises(errors):
        call()


FAILURES: dict[str, Callable[[Communicator], Any]] = {
    **{
        f"{what.__name__} in {name}": lambda comm, name=name, what=what: call_with(comm, name, what)
        for name, what in (
            *((name, Unpicklable) for name in ("allgather", "allreduce", "alltoall", "gather", "scan")),
            *((name, Unreadable) for name in ("allgather", "alltoall", "bcast")),
        )
    },
    "too few objects": lambda comm: comm.alltoall([1] * (comm.size - 1)),
    "an unknown argument": lambda comm: comm.allgather(1, wrong=2),
}


def call_with(comm: Communicator, name: str, make: Callable[[], Any]) -> Any:
    """A call of objects of one kind."""
    return getattr(comm, name)([make() for _ in range(comm.size)] if name == "alltoall" else make())


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", FAILURES)
def test_after_an_exception_on_all_ranks_the_next_call_works(entered: Communicator, name: str) -> None:
    for _ in range(2):
        fail(lambda: FAILURES[name](entered), pickle.PickleError, TypeError, ValueError)
        assert entered.allgather(entered.rank) == list(range(entered.size))
        entered.Allreduce(np.ones(3), total := np.empty(3))
        assert (total == entered.size).all()
        assert entered.bcast(entered.rank, 1) == 1


@pytest.mark.mpi(sizes=(2, 3))
def test_after_an_exception_on_one_rank_when_all_messages_had_come_the_next_call_works(entered: Communicator) -> None:
    Distributed.comm = entered
    for call in (lambda: entered.bcast(Picky(), 1), lambda: entered.allgather(Picky())[0]):
        for _ in range(2):
            try:
                made = call()
            except pickle.UnpicklingError:
                made = 0
            assert entered.allgather(made) == list(range(entered.size))
            assert entered.bcast(entered.rank, 1) == 1


@pytest.mark.mpi(sizes=(2,))
def test_after_an_exception_before_the_messages_of_one_rank_the_ranks_are_out_of_step(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The root of a gather has not received what the other rank has sent."""
    ours = Communicator(comm.Dup())
    if ours.context.consistency is None:
        pytest.skip("the ranks' calls are not compared here")
    if ours.rank == 0:
        fail(lambda: ours.gather(Unpicklable()), pickle.PicklingError)
        fail(lambda: ours.gather(1), TransportError)
        fail(ours.Barrier, TransportError)
    else:
        ours.gather(1)
    assert comm.allgather(ours.rank) == [0, 1]


class Unreadable:
    """An object that cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("this object cannot be pickled")


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("name", ["allgather", "allreduce", "bcast"])
def test_an_object_of_one_rank_that_cannot_be_pickled_is_told_to_all(auto: Communicator, name: str) -> None:
    ours = Communicator(auto.Dup(), pickle="auto")
    odd = ours.rank == 0  # the root of the bcast
    given = Unreadable() if odd else 1
    with pytest.raises(TypeError if odd else MismatchError, match="cannot be pickled"):
        getattr(ours, name)(given)
    assert ours.allgather(ours.rank) == list(range(ours.size)), "the ranks are in step"


class Nested:
    """An object whose reading makes a call of objects."""

    comm: Any = None

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> Any:
        return read_nested, (self.text,)


def read_nested(text: str) -> str:
    assert Nested.comm.allgather("inner" + "x" * 300) == ["inner" + "x" * 300] * Nested.comm.size
    assert Nested.comm.allgather("i") == ["i"] * Nested.comm.size
    return text


@pytest.mark.mpi(sizes=(2, 3))
def test_reading_an_object_may_make_calls_that_use_the_same_records(auto: Communicator) -> None:
    """A long object, one that makes calls, and short ones: all come as they were passed."""
    ours = Nested.comm = Communicator(auto.Dup(), pickle="auto")
    wanted = ["long" * 200, "nested", "short"][: ours.size]
    mine = Nested("nested") if ours.rank == 1 else wanted[ours.rank]
    assert ours.allgather(mine) == wanted
    first = Nested("nested" * 40) if ours.rank == 0 else None
    assert ours.bcast(first) == "nested" * 40
