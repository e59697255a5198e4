"""The compiled interpreter of records does what the engine in Python does, on MPI messages, and raises MPI's errors."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import verifiable
from mpi4py import MPI

import hpccomm
from hpccomm import Communicator
from hpccomm.backends import interpreter, schedules
from hpccomm.backends.interpreter import CompiledSchedule
from hpccomm.backends.schedules import Reduction
from hpccomm.calls import operations
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.engine import BoundSchedule
from hpccomm.collectives.lowering import Layout, Pipeline, lower
from hpccomm.kernels import objects
from hpccomm.kernels.interpreter import body
from hpccomm.transports.mpi import message_functions, tag_place

pytestmark = pytest.mark.mpi(min_size=2)
WORD = 77
EVERY = [(collective, name) for collective in ("allreduce", "bcast", "reduce") for name in ALGORITHMS[collective]]


@pytest.fixture
def ours(comm: Communicator) -> Iterator[Communicator]:
    """A communicator of the same ranks, with a context of its own; its collectives are compiled."""
    if not (objects.complete() or all(objects.address(name) for name in objects.EMITTED)):
        pytest.skip("nothing is compiled")
    made = Communicator(comm.Dup())
    yield made
    made.Free()


def reduction_of(op: str, kind: str) -> Reduction:
    return Reduction(operations.combiner(getattr(MPI, op.upper()), kind), kind, op)


def run(comm: Communicator, collective: str, name: str, mine: Any, op: str, kind: str, how: Pipeline) -> Any:
    """A collective on a copy of a vector, in place, as the schedules of the communicator bind it."""
    vector, algorithm = mine.copy(), ALGORITHMS[collective][name]
    root = () if collective == "allreduce" else (comm.size - 1,)
    layout = Layout(vector.size, vector.itemsize, algorithm.blocks(comm.size))
    program = lower(algorithm.steps(comm.rank, comm.size, *root), comm.rank, layout, how)
    plan = comm.context.schedules.bind(program, vector, None, reduction_of(op, kind), WORD)
    for _ in range(2):
        vector[...] = mine
        plan()
    plan.free()
    return vector, plan


@pytest.mark.parametrize(("collective", "name"), EVERY)
def test_compiled_records_give_the_bits_of_the_engine(
    ours: Communicator, collective: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [("f4", "sum"), ("f8", "max"), ("i2", "prod"), ("c16", "sum"), ("u1", "bxor"), ("f2", "sum")]
    for dtype, op in cases:
        for n in (0, 3, 5000):
            for how in (Pipeline(), Pipeline(2, 1, 3, 4096)):
                given = verifiable.operand(ours.rank, ours.size, n, dtype, op)
                mine = given.view("u2") if dtype == "f2" else given
                kind = "float16" if dtype == "f2" else str(np.dtype(dtype))
                compiled, plan = run(ours, collective, name, mine, op, kind, how)
                assert isinstance(plan, CompiledSchedule)
                with monkeypatch.context() as patched:
                    patched.setattr(schedules.Schedules, "runs_compiled", lambda self, program: False)
                    wanted, plan = run(ours, collective, name, mine, op, kind, how)
                assert isinstance(plan, BoundSchedule)
                assert compiled.tobytes() == wanted.tobytes(), (dtype, op, n, how)


@pytest.mark.mpi(sizes=(2, 3))
def test_the_same_source_runs_in_python(ours: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = verifiable.operand(ours.rank, ours.size, 700, "i4", "sum")
    want = verifiable.reduction(ours.size, 700, "i4", "sum")
    monkeypatch.setattr(interpreter.objects, "kernel", lambda name: body.interpret)
    monkeypatch.setattr(Reduction, "fold", property(lambda self: 0))
    found, _ = run(ours, "allreduce", "ring", mine, "sum", "int32", Pipeline())
    assert np.array_equal(found, want)


@pytest.mark.mpi(sizes=(2, 3))
def test_operations_without_a_kernel_are_reduced_by_python(ours: Communicator) -> None:
    largest = MPI.Op.Create(lambda a, b, _: np.maximum(view(a), view(b), out=view(b)), commute=True)
    x = np.array([ours.rank, -ours.rank], "f8")
    y = np.empty_like(x)
    ours.Allreduce(x, y, largest, algorithm="ring")
    assert y.tolist() == [ours.size - 1, 0]
    pairs = np.zeros(2, np.dtype([("value", "f8"), ("index", "i4")], align=True))
    pairs["value"], pairs["index"] = [5, ours.rank], ours.rank
    found = np.empty_like(pairs)
    ours.Allreduce([pairs, 2, MPI.DOUBLE_INT], [found, 2, MPI.DOUBLE_INT], MPI.MAXLOC, algorithm="butterfly")
    assert found["index"].tolist() == [0, ours.size - 1]
    largest.Free()


def view(memory: MPI.memory) -> Any:
    return np.frombuffer(memory, "f8")


@pytest.mark.mpi(sizes=(2,))
def test_an_error_of_mpi_is_raised_with_its_text(ours: Communicator) -> None:
    vector = np.ones(4)
    steps = [step._replace(to=99, source=99) for step in ALGORITHMS["allreduce"]["doubling"].steps(ours.rank, 2)]
    program = lower(steps, ours.rank, Layout(4, 8, 1))
    plan = ours.context.schedules.bind(program, vector, None, reduction_of("sum", "float64"), WORD)
    for _ in range(2):
        with pytest.raises(MPI.Exception, match=r"(?i)rank") as raised:
            plan()
        assert raised.value.Get_error_class() == MPI.ERR_RANK


@pytest.mark.slow
@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("elements", [0, 4, 100])
def test_a_message_of_another_call_is_named(ours: Communicator, elements: int) -> None:
    """Of another tag, or longer than the room for it; not much longer, for which Open MPI itself crashes."""
    vector = np.ones(4 + elements * ours.rank)
    steps = ALGORITHMS["bcast"]["tree"].steps(ours.rank, 2, 1)
    program = lower(steps, ours.rank, Layout(vector.size, 8, 1))
    plan = ours.context.schedules.bind(program, vector, None, None, WORD + ours.rank)
    if ours.rank:
        plan()
        return
    with pytest.raises(hpccomm.MismatchError, match="message of another call from rank 1"):
        plan()


@pytest.mark.mpi(sizes=(2,))
@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_other_threads_run_while_a_rank_waits(ours: Communicator, elements: int, monkeypatch: Any) -> None:
    """A thread of rank 1 counts within a call of compiled code; rank 0 comes when it has counted, or after 20 s."""
    vector, counted, rises, world = np.ones(elements), 0, [0], MPI.COMM_WORLD
    ended = threading.Event()

    def count() -> None:
        nonlocal counted
        while not ended.is_set():
            counted += 1
            time.sleep(0.001)

    program = lower(ALGORITHMS["bcast"]["tree"].steps(ours.rank, 2, 0), ours.rank, Layout(elements, 8, 1))
    plan = ours.context.schedules.bind(program, vector, None, None, WORD)
    assert isinstance(plan, CompiledSchedule)
    kernel = plan.kernel

    def run(address: int) -> int:
        before = counted
        code = kernel(address)
        rises.append(counted - before)
        if max(rises) > 1:
            world.send(None, 0, 7)
        return code

    ours.barrier()
    if ours.rank == 0:
        until = time.monotonic() + 20
        while not world.Iprobe(1, 7) and time.monotonic() < until:
            time.sleep(0.001)
        plan()
    else:
        monkeypatch.setattr(plan, "kernel", run)
        thread = threading.Thread(target=count)
        thread.start()
        plan()
        ended.set()
        thread.join()
        world.send(None, 0, 8)
        assert max(rises) > 1, "no thread ran while compiled code waited"
    if ours.rank == 0:
        world.recv(source=1, tag=8)
        while world.Iprobe(1, 7):
            world.recv(source=1, tag=7)


@pytest.mark.mpi(sizes=(2,))
def test_a_signal_ends_a_wait(ours: Communicator) -> None:
    class InterruptionError(Exception):
        pass

    def interrupt(*_: Any) -> None:
        raise InterruptionError

    program = lower(ALGORITHMS["bcast"]["tree"].steps(ours.rank, 2, 0), ours.rank, Layout(1, 8, 1))
    plan = ours.context.schedules.bind(program, np.ones(1), None, None, WORD)
    if ours.rank == 1:
        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(InterruptionError):
            plan()
        signal.signal(signal.SIGALRM, before)
    ours.barrier()
    if ours.rank == 0:
        plan()  # which the receive of the abandoned call completes


@pytest.mark.mpi(sizes=(2,))
def test_what_compiled_code_needs_of_mpi_is_found(comm: Communicator) -> None:
    assert set(message_functions()) == {"isend", "irecv", "test", "probe"}
    assert all(message_functions().values())
    offset, shift = tag_place()
    assert offset % 8 == 0
    assert shift in (0, 32)
