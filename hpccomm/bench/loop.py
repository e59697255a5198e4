"""The one measuring loop: algorithms take turns, so that all of them see the same machine.

Per iteration ``t0; call; t1; sum += t1 - t0; barrier``, the barrier untimed; a rank's mean; then minimum, mean and
maximum over the ranks (as the OSU Micro-Benchmarks do).  Percentiles are of each iteration's mean over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.bench.cases import CASES, Case, Exercise, Setting
from hpccomm.errors import ArgumentError

LARGE = 8192
"""Bytes above which OSU takes fewer iterations."""
TURNS = 10
"""How often the algorithms take turns at one size."""


@dataclass
class Options:
    """What is the same for all sizes of a run."""

    dtype: Any = "f4"
    iterations: int | None = None
    """Timed calls; ``None``: 1000 up to 8 KiB, 100 above."""
    warmup: int | None = None
    """Untimed calls before; ``None``: 100 up to 8 KiB, 10 above."""
    check: bool = False
    check_calls: int = 5
    in_place: bool = False
    registered: bool = False
    roots: Callable[[int], int] = lambda iteration: 0
    """The root of the k-th call."""

    def repeats(self, size: int) -> tuple[int, int]:
        """Timed and untimed calls at a size."""
        timed, untimed = (1000, 100) if size <= LARGE else (100, 10)
        return self.iterations or timed, untimed if self.warmup is None else self.warmup


@dataclass
class Row:
    """One size of one collective with one algorithm; microseconds, and 10^9 bytes a second."""

    collective: str
    algorithm: str
    datatype: str
    bytes: int
    """As OSU counts them."""
    ranks: int
    nodes: int
    iterations: int
    min_us: float
    avg_us: float
    max_us: float
    p50_us: float
    p99_us: float
    algbw_GBps: float  # noqa: N815
    busbw_GBps: float  # noqa: N815
    validated: bool | None
    predicted_us: float | None
    in_place: bool = False
    wrong: int = 0
    samples: npt.NDArray[np.float64] | None = None

    def record(self) -> dict[str, Any]:
        """What goes into a file."""
        kept = asdict(self)
        del kept["samples"]
        return kept

    def percentile(self, p: int) -> float:
        """OSU's: the sorted sample at iterations·p/100 − 1."""
        assert self.samples is not None
        return percentile(self.samples, p)


def percentile(samples: npt.NDArray[np.float64], p: int) -> float:
    """The sorted sample at len·p/100 − 1, the first one at least."""
    return float(np.sort(samples)[max(0, samples.size * p // 100 - 1)])


def measure(
    comm: Any,
    collective: str,
    sizes: Iterable[int],
    algorithms: Sequence[str] = ("auto",),
    options: Options | None = None,
) -> Iterator[Row]:
    """Measure a collective at each size (bytes, as OSU counts them) with each algorithm; a row each (collective)."""
    options = options or Options()
    for size in sizes:
        count = size // np.dtype(options.dtype).itemsize
        if count or collective == "barrier":
            yield from measured(comm, collective, size, count, algorithms, options)


def measured(
    comm: Any, collective: str, size: int, count: int, algorithms: Sequence[str], options: Options
) -> list[Row]:
    """One size."""
    case = CASES[collective]
    exercise = case.make(Setting(comm, count, options.dtype, options.in_place, allocator(comm, options)))
    calls = {name: caller(comm, case, exercise, name) for name in algorithms}
    wrong = {name: checked(comm, exercise, call, options) for name, call in calls.items()}
    exercise.fill()
    timed, untimed = options.repeats(case.whole(size, comm.size))
    for call in calls.values():
        for k in range(untimed):
            call(options.roots(k))
    times = {name: np.empty(timed) for name in calls}
    for turn in np.array_split(np.arange(timed), min(TURNS, timed)):
        for name, call in calls.items():
            time_calls(plain(comm), call, turn.tolist(), times[name], options.roots)
    return [summarised(comm, collective, name, size, times[name], wrong[name], options) for name in algorithms]


def caller(comm: Any, case: Case, exercise: Exercise, algorithm: str) -> Callable[[int], None]:
    """The call with its algorithm named; native is mpi4py's own method, with nothing of ours around it."""
    call = exercise.call
    if algorithm == "native":
        bare = plain(comm)
        return lambda root: call(bare, root)
    if not case.chosen:
        return lambda root: call(comm, root)
    return lambda root: call(comm, root, algorithm=algorithm)


def allocator(comm: Any, options: Options) -> Any:
    """Where the buffers come from."""
    if not options.registered:
        return np.zeros
    if not hasattr(comm, "empty"):
        raise ArgumentError("registered memory is made by comm.empty, which this communicator has not")
    return comm.empty


def plain(comm: Any) -> MPI.Intracomm:
    """For what is not to be measured."""
    return MPI.Intracomm(comm)


def time_calls(
    comm: MPI.Intracomm,
    call: Callable[[int], None],
    turn: list[int],
    times: npt.NDArray[np.float64],
    roots: Callable[[int], int],
) -> None:
    """A turn of one algorithm; the barrier is not timed."""
    barrier = comm.Barrier
    barrier()
    for k in turn:
        root = roots(k)
        began = perf_counter()
        call(root)
        times[k] = perf_counter() - began
        barrier()


def checked(comm: Any, exercise: Exercise, call: Callable[[int], None], options: Options) -> int:
    """Wrong elements over all ranks and all checked calls."""
    if not options.check:
        return 0
    wrong = 0
    for k in range(options.check_calls):
        exercise.fill()
        call(options.roots(k))
        wrong += exercise.wrong(options.roots(k))
    return int(plain(comm).allreduce(wrong))


def summarised(
    comm: Any,
    collective: str,
    algorithm: str,
    size: int,
    times: npt.NDArray[np.float64],
    wrong: int,
    options: Options,
) -> Row:
    """The row of one algorithm at one size."""
    means = np.array(plain(comm).allgather(times.mean())) * 1e6
    samples = np.empty_like(times)
    plain(comm).Allreduce(times * (1e6 / comm.size), samples)
    case, p = CASES[collective], comm.size
    algbw = case.whole(size, p) / means.mean() / 1e3
    nodes = comm.topology.count if hasattr(comm, "topology") else 1
    return Row(
        collective,
        algorithm,
        np.dtype(options.dtype).name,
        size,
        p,
        nodes,
        times.size,
        float(means.min()),
        float(means.mean()),
        float(means.max()),
        percentile(samples, 50),
        percentile(samples, 99),
        algbw,
        algbw * case.bus(p),
        wrong == 0 if options.check else None,
        predicted(comm, collective, algorithm, case.whole(size, p)),
        options.in_place,
        wrong,
        samples,
    )


def predicted(comm: Any, collective: str, algorithm: str, nbytes: int) -> float | None:
    """The model's price, where it has one for this algorithm on this many ranks."""
    from hpccomm.collectives import ALGORITHMS, cost

    resources: Any = getattr(comm, "resources", None)
    if (
        resources is None
        or not comm.topology.even
        or comm.size == 1
        or algorithm not in (*ALGORITHMS.get(collective, {}), "hierarchical")
    ):
        return None
    shape = comm.topology.count, comm.topology.per_node[0]
    return float(cost.prediction(algorithm, collective, *shape, nbytes, resources.table.machine).us)
