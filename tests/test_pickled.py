"""``pickle="auto"`` gives what mpi4py gives: the same values, types, dtypes and shapes, whatever each rank passes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from hpccomm import ArgumentError, Communicator, MismatchError, pickled
from hpccomm.calls.entry import COLLECTIVES

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
        (lambda comm, odd: comm.bcast(1, root=int(odd)), r"bcast\(root=0\).*rank 1 called bcast\(root=1\)"),
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
