"""The first call: of the process, and of a new communicator.

Set-up is a part of both: ``Communicator(MPI.COMM_WORLD)`` of the first, ``Dup`` of the second.  A barrier of
MPI_COMM_WORLD precedes each, so that ranks start together; imports are not included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from hpccomm.bench.cases import CASES, Shape
from hpccomm.bench.inputs import Array
from hpccomm.bench.loop import Options, has_elements
from hpccomm.communicator import Communicator

REPETITIONS = 5
"""New communicators of each algorithm."""
MAKERS: dict[str, Callable[[Any], Any]] = {"native": lambda world: world, "auto": Communicator}
"""What a program calls collectives on."""


class FirstCalls(NamedTuple):
    """Microseconds of the slowest rank, set-up included."""

    algorithm: str
    bytes: int
    process_us: float
    communicator_us: float
    """The median over a few new communicators."""


def measure_first_calls(
    collective: str, sizes: Sequence[int], algorithms: Sequence[str], options: Options
) -> list[FirstCalls]:
    """Time first calls of ``"native"`` and ``"auto"`` on the smallest size that has elements (collective).

    Neither may have been used before.  ``"native"`` comes first; its first call sets up what the MPI library needs.
    """
    names = [name for name in MAKERS if name in algorithms or "all" in algorithms]
    size = next((size for size in sizes if has_elements(collective, size, MPI.COMM_WORLD.size, options)), None)
    if size is None:
        return []
    call = make_call(collective, size, options)
    first = {name: time_first(partial(MAKERS[name], MPI.COMM_WORLD), call) for name in names}
    later: dict[str, list[float]] = {name: [] for name in names}
    for name in names * REPETITIONS:
        comm, microseconds = time_first(first[name][0].Dup, call)
        later[name].append(microseconds)
        comm.Free()
    return [FirstCalls(name, size, first[name][1], median(later[name])) for name in names]


def make_call(collective: str, size: int, options: Options) -> Callable[[Any], object]:
    """A function that makes one call of this size on a communicator."""
    world, case, dtype = MPI.COMM_WORLD, CASES[collective], np.dtype(options.dtype)
    count = case.count(size, dtype.itemsize, world.size, options.whole)
    shape = Shape(world.size, world.rank, options.root or 0, count, dtype, options.in_place, options.window)
    send, recv = (np.zeros(length, dtype) for length in case.contents(shape).lengths())
    return partial(run_call, case.bind, shape, send, recv)


def run_call(bind: Any, shape: Shape, send: Array, recv: Array, comm: Any) -> object:
    """Bind a call and run it."""
    return bind(comm, shape, send, recv, ())()


def time_first(make: Callable[[], Any], call: Callable[[Any], object]) -> tuple[Any, float]:
    """A new communicator, and the microseconds of the slowest rank to make it and its first call (collective)."""
    MPI.COMM_WORLD.Barrier()
    began = perf_counter_ns()
    comm = make()
    call(comm)
    mine = (perf_counter_ns() - began) / 1e3
    return comm, float(MPI.COMM_WORLD.allreduce(mine, MPI.MAX))
