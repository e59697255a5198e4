"""Spellings of mpi4py's documentation give the answer of mpi4py's own communicator, at the first call and later."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from mpi4py import MPI

from benchmarks.spellings import SPELLINGS, Tensor, compile_call, make_names
from hpccomm import Communicator, planner
from hpccomm.errors import ArgumentError
from hpccomm.kernels.reductions.reference import INDEX, PAIRS, VALUE


def contents(names: dict[str, Any]) -> dict[str, Any]:
    """The values of all buffers; of a pair both fields, without the bytes between them."""
    arrays = {name: it.array if isinstance(it, Tensor) else it for name, it in names.items()}
    return {name: np.asarray(it).tolist() for name, it in arrays.items() if hasattr(it, "__len__") or name == "number"}


@cache
def our_world() -> Communicator:
    return Communicator(MPI.COMM_WORLD)


def compare_with_mpi4py(world: Communicator, spelling: str) -> None:
    """Make a call three times on mpi4py's world and on ours, and compare results and buffers."""
    plain, ours = make_names(MPI.COMM_WORLD), make_names(world)
    calls = compile_call(spelling, plain), compile_call(spelling, ours)
    for _ in range(3):
        expected, found = (call() for call in calls)
        assert found == expected
        assert contents(ours) == contents(plain)


@pytest.mark.mpi(sizes=(1, 2, 3))
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_gives_the_answer_of_mpi4py(comm: MPI.Intracomm, spelling: str) -> None:
    compare_with_mpi4py(our_world(), spelling)


@cache
def world_without_entry() -> Communicator:
    """Our world as with ``HPCCOMM_ENTRY=off``."""
    made = Communicator(MPI.COMM_WORLD)
    with mock.patch.object(planner, "why_no_entry", return_value="HPCCOMM_ENTRY=off"):
        made.Barrier()
    return made


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_gives_the_same_answer_without_the_entry(comm: MPI.Intracomm, spelling: str) -> None:
    compare_with_mpi4py(world_without_entry(), spelling)
    assert world_without_entry().plans.entry is None


@pytest.mark.mpi(sizes=(2,))
def test_an_array_of_another_byte_order_moves_as_bytes(comm: MPI.Intracomm) -> None:
    for world in (our_world(), world_without_entry()):
        array = np.arange(3, dtype=">f8") if comm.rank else np.zeros(3, ">f8")
        world.Bcast([array, MPI.BYTE], 1)
        assert array.tolist() == [0, 1, 2]
        world.Allgather([array, 24, MPI.BYTE], [both := np.zeros(6, ">f8"), 24, MPI.BYTE])
        assert both.tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.mpi(sizes=(2,))
def test_a_new_operation_with_a_freed_handle_is_not_taken_for_the_old_one(comm: MPI.Intracomm) -> None:
    x, y = np.ones(3), np.zeros(3)
    for extra in (10, 100):

        def add(a: Any, b: Any, datatype: Any, extra: int = extra) -> None:
            np.frombuffer(b)[:] += np.frombuffer(a) + extra

        op = MPI.Op.Create(add, commute=True)
        our_world().Allreduce(x, y, op)
        op.Free()
        assert y.tolist() == [2 + extra] * 3


@pytest.mark.mpi(sizes=(2,))
def test_a_new_datatype_with_a_freed_handle_is_not_taken_for_the_old_one(comm: MPI.Intracomm) -> None:
    x = np.arange(16.0) * (comm.rank + 1)
    for stride in (2, 4):
        datatype = MPI.DOUBLE.Create_vector(4, 1, stride).Commit()
        for call in (our_world().Bcast, lambda form: our_world().Gather(form, None if comm.rank else np.zeros(8))):
            call([x, 1, datatype])
        datatype.Free()
        assert x[: 4 * stride : stride].tolist() == [stride * k for k in range(4)]


@pytest.mark.mpi(sizes=(2, 3))
@pytest.mark.parametrize("op", [MPI.MINLOC, MPI.MAXLOC])
def test_pairs_with_nan_give_the_nan_of_the_lowest_index_on_every_rank(comm: MPI.Intracomm, op: MPI.Op) -> None:
    given, found = (np.zeros(2, PAIRS["DOUBLE_INT"]) for _ in range(2))
    given[VALUE], given[INDEX] = [np.nan, comm.rank if comm.rank else np.nan], 9 - comm.rank
    our_world().Allreduce([given, MPI.DOUBLE_INT], [found, MPI.DOUBLE_INT], op=op)
    assert np.isnan(found[VALUE]).all()
    assert found[INDEX].tolist() == [9 - comm.size + 1, 9]


@pytest.mark.parametrize(
    ("form", "op", "remedy"),
    [
        (np.zeros(2), MPI.MINLOC, "minloc for float64: pass pairs"),
        ([np.zeros((2, 2), "i4"), MPI.TWOINT], MPI.SUM, "sum for TWOINT: use MPI.MINLOC"),
        ([np.zeros((2, 2), "i4"), 3, MPI.TWOINT], MPI.MINLOC, "holds 2 elements of TWOINT"),
    ],
)
def test_a_reduction_that_mpi_does_not_define_is_refused(form: Any, op: MPI.Op, remedy: str) -> None:
    with pytest.raises(ArgumentError, match=remedy):
        Communicator(MPI.COMM_SELF).Allreduce(MPI.IN_PLACE, form, op=op)
