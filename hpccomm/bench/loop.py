"""The measuring loop: at every size the algorithms take turns, so that all are measured under the same load.

Each call is timed as ``t0; call; t1`` and followed by a barrier that is not timed.  A row shows the minimum, mean and
maximum over the ranks of each rank's mean over its calls, as the OSU Micro-Benchmarks do.  Percentiles are of each
call's mean over the ranks.  Results are checked in separate calls, so that checking does not change the times.

Programs make new arrays for most of their calls.  With ``Options.new_arrays`` as many calls again are timed in that
way, with the making of the arrays and without it, and results are checked on new arrays.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from inspect import signature
from time import perf_counter_ns
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.arrays import read_device
from hpccomm.bench.cases import CASES, Call, Case, MethodCall, Shape
from hpccomm.bench.inputs import POISON, VARIANTS, Array, Blocks, Inputs
from hpccomm.collectives import ALGORITHMS
from hpccomm.communicator import Communicator
from hpccomm.errors import ArgumentError
from hpccomm.performance import cost
from hpccomm.transports import cuda

TURNS = 10
"""Turns of each algorithm at one size."""
MIN_CALLS = 10
"""Calls that are timed even if they take longer than ``Options.seconds``."""
LONG_CALL = 0.05
"""Calls of this many seconds or more are not affected by what ran before them."""
ALIGNMENT = 64
"""Alignment of buffers, bytes."""
MAX_CACHED = 1 << 20
"""Inputs of up to this many elements are cached for the next checked call."""
KEPT_ARRAYS = 2
"""New arrays live until so many calls later, so that two successive calls never get the same memory."""

BindArrays = Callable[[Any, Any], Call]
"""Makes a call from the send and the receive buffer."""


class NewCall(NamedTuple):
    """A call on arrays that are made for it."""

    make: Callable[[], tuple[Any, Any]]
    bind: BindArrays


@dataclass(frozen=True)
class Options:
    """Options of a measurement, the same for all sizes."""

    dtype: npt.DTypeLike = "f4"
    iterations: int | None = None
    """Timed calls; ``None``: as many as OSU, or fewer if they take more than ``seconds``."""
    warmup: int | None = None
    """Untimed calls before them."""
    seconds: float | None = 1.0
    """Time for each algorithm at each size; ``None``: no limit."""
    whole: bool = True
    """Sizes are bytes of the whole vector; else they are OSU's: of gathers and scatters, those of a rank's block."""
    check: bool = False
    """Check every element, in as many calls again."""
    check_warmup: int = 5
    """Unchecked calls before each checked one."""
    in_place: bool = False
    root: int | None = 0
    """``None``: another rank with every call."""
    registered: bool = False
    """Buffers from ``comm.empty``."""
    on_device: bool = False
    """Buffers on the CUDA device."""
    bare_native: bool = False
    """``"native"`` calls mpi4py's own method and not the communicator's."""
    streaming: bool = False
    """No barrier between calls, as in nccl-tests."""
    new_arrays: bool = False
    """Time as many calls again, and check results, on new arrays."""
    percentiles: tuple[int, ...] = (50, 99)
    """Empty: the times of single calls are not collected."""
    window: int = 64


@dataclass(frozen=True)
class Row:
    """One algorithm at one size; the same on all ranks.  Times in microseconds, bandwidths in 10^9 bytes a second."""

    collective: str
    algorithm: str
    datatype: str
    bytes: int
    """The size as it was given."""
    ranks: int
    nodes: int
    iterations: int
    min_us: float
    avg_us: float
    max_us: float
    p50_us: float | None
    p99_us: float | None
    algbw_GBps: float  # noqa: N815
    busbw_GBps: float  # noqa: N815
    validated: bool | None
    """``None``: not checked."""
    predicted_us: float | None
    """The time that the cost model predicts, if it covers the algorithm."""
    in_place: bool = False
    registered: bool = False
    new_avg_us: float | None = None
    """On new arrays, their making included; ``None``: not measured."""
    new_p50_us: float | None = None
    new_call_avg_us: float | None = None
    """The calls alone, on new arrays."""
    new_call_p50_us: float | None = None
    wrong: int = 0
    """Wrong elements over all ranks and checked calls."""
    complaint: str = ""
    """A sentence about the first of them."""
    tails: tuple[float, ...] = ()
    """The percentiles of ``Options``, microseconds (of bandwidth tests: percentiles of the bandwidth)."""

    def record(self) -> dict[str, Any]:
        """The fields that are written into a file."""
        return {name: value for name, value in asdict(self).items() if name not in ("wrong", "complaint", "tails")}


def measure(
    comm: Any,
    collective: str,
    sizes: Iterable[int],
    algorithms: Sequence[str] = ("auto",),
    options: Options | None = None,
) -> Iterator[Row]:
    """Measure ``collective`` at each size (bytes) with each algorithm; yields the rows, size by size (collective).

    ``comm`` is a Communicator, or any MPI.Intracomm, which has ``"native"`` only.  Sizes of less than one element are
    left out.  Raises ArgumentError for an algorithm, a datatype or a form of the call that does not exist.
    """
    options = options or Options()
    sizes = [size for size in sizes if has_elements(collective, size, comm.size, options)]
    check_algorithms(comm, collective, algorithms)
    bench = Bench(comm, collective, max(sizes, default=0), options)
    for size in sizes:
        yield from bench.rows(size, algorithms)


def has_elements(collective: str, size: int, ranks: int, options: Options) -> bool:
    """Whether a size is that of at least one element."""
    itemsize = np.dtype(options.dtype).itemsize
    return collective == "barrier" or CASES[collective].count(size, itemsize, ranks, options.whole) > 0


def check_algorithms(comm: Any, collective: str, algorithms: Sequence[str]) -> None:
    """Raise if an algorithm cannot be measured."""
    known = list_algorithms(comm, collective)
    unknown = [name for name in algorithms if name not in known]
    if unknown or not algorithms:
        raise ArgumentError(f"{collective} has no algorithm {', '.join(unknown)!r}: use {', '.join(known)}")


def list_algorithms(comm: Any, collective: str) -> tuple[str, ...]:
    """The algorithms that can be measured on a communicator (collective where its layout is not known yet)."""
    if not hasattr(comm, "algorithms"):
        return ("native",)
    case = CASES[collective]
    return tuple(comm.algorithms(case.algorithms)) if case.algorithms else ("auto", "native")


class Bench:
    """A collective on a communicator, with buffers for its largest size."""

    def __init__(self, comm: Any, collective: str, largest: int, options: Options) -> None:
        self.comm, self.collective, self.options = comm, collective, options
        self.case: Case = CASES[collective]
        self.plain = MPI.Intracomm(comm)
        self.dtype = np.dtype(options.dtype)
        self.inputs = Inputs(comm.size, self.dtype)
        self.nodes = count_nodes(comm)
        if options.in_place and not self.case.in_place:
            raise ArgumentError(f"MPI has no {collective} in place: use in_place=False")
        self.memory = self.allocate(largest)

    def shapes(self, size: int) -> list[Shape]:
        """The shapes of a size, one for each root."""
        count = self.case.count(size, self.dtype.itemsize, self.comm.size, self.options.whole)
        roots = range(self.comm.size) if self.options.root is None else [self.options.root]
        here = self.comm.size, self.comm.rank
        return [Shape(*here, root, count, self.dtype, self.options.in_place, self.options.window) for root in roots]

    def allocate(self, largest: int) -> list[Any]:
        """The send and the receive buffer, for all sizes and roots; of the same lengths on all ranks."""
        needs = [self.case.contents(shape).lengths() for shape in self.shapes(largest)]
        most = np.max(self.plain.allgather(np.max(needs, axis=0)), axis=0)
        if self.options.on_device:
            device = cuda.device()
            return [device.empty((int(count),), self.dtype) for count in most]
        if not self.options.registered:
            return [allocate_aligned(int(count), self.dtype) for count in most]
        if not hasattr(self.comm, "empty"):
            raise ArgumentError(
                "registered memory comes from comm.empty, which a plain communicator does not have: use a Communicator"
            )
        return [self.comm.empty(int(count), self.dtype) for count in most]

    def rows(self, size: int, algorithms: Sequence[str]) -> list[Row]:
        """Measure all algorithms at one size."""
        exercise = Exercise(self.case, self.shapes(size), self.inputs, self.memory)
        binds = {name: self.binds(exercise, name) for name in algorithms}
        calls = {name: [bind(exercise.send, exercise.recv) for bind in each] for name, each in binds.items()}
        exercise.clear_buffers()
        timed, untimed = self.repeats(size, calls)
        longest = max(max(self.time(each, untimed), default=0) for each in calls.values())
        short = self.max_over_ranks(longest) < LONG_CALL
        times, new = self.take_turns(calls, timed, short, self.time), {}
        if self.options.new_arrays:
            renewed = {name: exercise.renew_calls(each) for name, each in binds.items()}
            new = self.take_turns(renewed, timed, short, self.time_new)
        found = {name: self.check(exercise, each, timed) for name, each in binds.items()}
        return [self.row(size, name, times[name], found[name], new.get(name, [])) for name in algorithms]

    def binds(self, exercise: Exercise, algorithm: str) -> list[BindArrays]:
        """What makes the calls of an algorithm, one for each root; an algorithm that is the default is not named."""
        comm = self.plain if algorithm == "native" and self.options.bare_native else self.comm
        bind = self.case.bind
        by_name = isinstance(bind, MethodCall) and takes_algorithm(getattr(comm, bind.method))
        named = (algorithm,) if by_name and algorithm != getattr(comm, "algorithm", "") else ()
        return [partial(bind_arrays, bind, comm, shape, named) for shape in exercise.shapes]

    def repeats(self, size: int, calls: dict[str, list[Call]]) -> tuple[int, int]:
        """The numbers of timed and untimed calls."""
        options = self.options
        timed, untimed = self.case.repeats.counts(size)
        if options.seconds is not None and options.iterations is None:
            most = int(options.seconds / self.time_slowest(calls))
            timed, untimed = min(timed, max(MIN_CALLS, most)), min(untimed, max(2, most // 10))
        return options.iterations or timed, untimed if options.warmup is None else options.warmup

    def time_slowest(self, calls: dict[str, list[Call]]) -> float:
        """Seconds of the slowest algorithm's second call; the first one makes its plan."""
        return max(1e-9, self.max_over_ranks(max(self.time(each, 2)[-1] for each in calls.values())))

    def max_over_ranks(self, nanoseconds: int) -> float:
        """The longest of all ranks' times, in seconds (collective)."""
        return float(self.plain.allreduce(nanoseconds, MPI.MAX)) / 1e9

    def take_turns(self, calls: dict[str, list[Any]], timed: int, short: bool, time: Any) -> dict[str, list[Any]]:
        """What ``time`` finds, with the algorithms in turns.

        Each turn begins with another algorithm.  Where calls are ``short``, the first one of a turn is not timed.
        """
        times: dict[str, list[Any]] = {name: [] for name in calls}
        names = list(calls)
        turns = min(TURNS, timed) if len(names) > 1 else 1
        for turn in range(turns):
            length = timed * (turn + 1) // turns - timed * turn // turns
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                warm = int(short and turns > 1)
                times[name] += time(calls[name], length + warm, len(times[name]))[warm:]
        return times

    def time(self, calls: list[Call], count: int, first: int = 0) -> list[int]:
        """Time ``count`` calls, in nanoseconds."""
        return self.run_timer(time_calls, calls, count, first)

    def time_new(self, calls: list[NewCall], count: int, first: int = 0) -> list[tuple[int, int]]:
        """Time ``count`` times the making of arrays and a call on them, in nanoseconds."""
        return self.run_timer(time_new_calls, calls, count, first)

    def run_timer(self, timer: Any, calls: list[Any], count: int, first: int) -> list[Any]:
        """Run a timer over ``count`` calls, after a barrier and without garbage collection."""
        sequence = [calls[k % len(calls)] for k in range(first, first + count)]
        between = no_op if self.options.streaming or self.case.ends or self.collective == "barrier" else self.barrier
        self.barrier()
        collecting = gc.isenabled()
        gc.disable()
        try:
            times: list[Any] = timer(sequence, between)
            return times
        finally:
            if collecting:
                gc.enable()

    @property
    def barrier(self) -> Call:
        """The MPI library's barrier."""
        barrier: Call = self.plain.Barrier
        return barrier

    def check(self, exercise: Exercise, binds: list[BindArrays], count: int) -> tuple[int, str]:
        """Check ``count`` calls: the number of wrong elements over all ranks, and a sentence about the first one."""
        if not self.options.check:
            return 0, ""
        wrong, complaint = 0, ""
        for k in range(count):
            if self.options.new_arrays:
                exercise.renew(k)
            call = binds[k % len(binds)](exercise.send, exercise.recv)
            for _ in range(self.options.check_warmup):
                call()
            self.barrier()
            exercise.fill(k)
            self.barrier()
            call()
            self.barrier()
            bad = exercise.count_wrong(k)
            complaint = complaint or (exercise.describe_error(k) if bad else "")
            wrong += bad
        found = self.plain.allgather((wrong, complaint))
        return sum(each for each, _ in found), next((words for _, words in found if words), "")

    def row(
        self, size: int, algorithm: str, times: list[int], found: tuple[int, str], new: list[tuple[int, int]]
    ) -> Row:
        """The row of an algorithm (collective)."""
        case, options, p, itemsize = self.case, self.options, self.comm.size, self.dtype.itemsize
        samples = np.array(times) * (1e-3 / case.messages(options.window))
        means = np.array(self.plain.allgather(float(samples.mean())))[: 1 if case.ends else None]
        nbytes = case.nbytes(case.count(size, itemsize, p, options.whole), itemsize, p)
        algbw = nbytes / max(float(means.mean()), 1e-9) / 1e3
        wrong, complaint = found
        made = Row(
            collective=self.collective,
            algorithm=algorithm,
            datatype=self.dtype.name,
            bytes=size,
            ranks=p,
            nodes=self.nodes,
            iterations=len(times),
            min_us=float(means.min()),
            avg_us=float(means.mean()),
            max_us=float(means.max()),
            **self.tails(samples),
            algbw_GBps=algbw,
            busbw_GBps=algbw * case.bus(p),
            validated=wrong == 0 if options.check else None,
            predicted_us=predict_us(self.comm, case, algorithm, nbytes) if self.comm.rank == 0 else None,
            in_place=options.in_place,
            registered=options.registered,
            **self.summarise_new(new),
            wrong=wrong,
            complaint=complaint and f"{algorithm}: {complaint}",
        )
        row: Row = self.plain.bcast(made)
        return row

    def summarise_new(self, times: list[tuple[int, int]]) -> dict[str, Any]:
        """Mean and median of each call's mean over the ranks: with the making of the arrays, and without."""
        if not times:
            return {}
        total = np.empty((len(times), 2))
        self.plain.Allreduce(np.array(times) * (1e-3 / self.comm.size), total)
        columns = {"new": total.sum(axis=1), "new_call": total[:, 1]}
        means = {f"{name}_avg_us": float(each.mean()) for name, each in columns.items()}
        return means | {f"{name}_p50_us": percentile(each, 50) for name, each in columns.items()}

    def tails(self, samples: npt.NDArray[np.float64]) -> dict[str, Any]:
        """Percentiles of each call's mean over the ranks; of tests between two ranks, those of rank 0's times."""
        if not self.options.percentiles:
            return {"p50_us": None, "p99_us": None}
        mine = samples if not self.case.ends or self.comm.rank == 0 else np.zeros_like(samples)
        total = np.empty_like(samples)
        self.plain.Allreduce(mine / (1 if self.case.ends else self.comm.size), total)
        sign = -1 if self.case.ends < 0 else 1  # the lowest bandwidth is the longest time
        tails = tuple(sign * percentile(sign * total, p) for p in self.options.percentiles)
        return {"p50_us": percentile(total, 50), "p99_us": percentile(total, 99), "tails": tails}


class Exercise:
    """The buffers of one size, which are filled before a checked call and compared after it."""

    def __init__(self, case: Case, shapes: list[Shape], inputs: Inputs, memory: list[Any]) -> None:
        self.shapes, self.inputs = shapes, inputs
        self.contents = [case.contents(shape) for shape in shapes]
        lengths = [max(each) for each in zip(*(layout.lengths() for layout in self.contents), strict=True)]
        self.send, self.recv = (buffer[:length] for buffer, length in zip(memory, lengths, strict=True))
        self.cache: dict[tuple[Blocks, int], Array] = {}

    def clear_buffers(self) -> None:
        """Fill the buffers with zeros for timed calls, as in-place sums would grow from call to call."""
        for buffer in (self.send, self.recv):
            write_buffer(buffer, np.zeros(buffer.shape, buffer.dtype))

    def fill(self, k: int) -> None:
        """Write the inputs of the k-th call, and poison where its results will be."""
        layout, variant = self.contents[k % len(self.contents)], k % VARIANTS
        before, content = self.numbers(layout.before, variant), np.full(self.recv.shape, POISON, self.recv.dtype)
        content[: before.size] = before
        write_buffer(self.send, self.numbers(layout.send, variant))
        write_buffer(self.recv, content)

    def renew_calls(self, binds: list[BindArrays]) -> list[NewCall]:
        """Calls on new arrays, one for each root."""
        return [NewCall(partial(self.make_arrays, k), bind) for k, bind in enumerate(binds)]

    def make_arrays(self, k: int) -> tuple[Any, Any]:
        """New arrays of the k-th call, as programs make them: copies of input, uninitialised ones for results."""
        layout = self.contents[k % len(self.contents)]
        send = self.send.copy() if layout.send else self.send
        return send, self.recv.copy() if layout.before else np.empty_like(self.recv)

    def renew(self, k: int) -> None:
        """Replace the buffers by new arrays of the k-th call."""
        self.send, self.recv = self.make_arrays(k)

    def count_wrong(self, k: int) -> int:
        """The number of wrong elements after the k-th call on this rank."""
        want = self.reference(k)
        return int(np.count_nonzero(fetch_buffer(self.recv)[: want.size] != want))

    def describe_error(self, k: int) -> str:
        """A sentence about the first wrong element after the k-th call on this rank."""
        want, shape = self.reference(k), self.shapes[k % len(self.shapes)]
        got = fetch_buffer(self.recv)
        bad = np.flatnonzero(got[: want.size] != want)
        first = int(bad[0])
        return (
            f"rank {shape.rank}: element {first} is {got[first]}, should be {want[first]} "
            f"({bad.size} of {want.size} wrong in call {k}, root {shape.root})"
        )

    def reference(self, k: int) -> Array:
        """The correct result of the k-th call."""
        return self.numbers(self.contents[k % len(self.contents)].after, k % VARIANTS)

    def numbers(self, blocks: Blocks, variant: int) -> Array:
        """The numbers of blocks; few ones are cached."""
        if (blocks, variant) in self.cache:
            return self.cache[blocks, variant]
        made = self.inputs.content(blocks, variant)
        if made.size <= MAX_CACHED:
            self.cache[blocks, variant] = made
        return made


def write_buffer(buffer: Any, values: Array) -> None:
    """Write values to the start of a buffer in host or device memory."""
    if isinstance(buffer, np.ndarray):
        buffer[: values.size] = values
        return
    there = read_device(buffer, "bench")
    staging().store(values.view(np.uint8), there.address, there.streams)


def fetch_buffer(buffer: Any) -> Array:
    """The content of a buffer, in host memory."""
    if isinstance(buffer, np.ndarray):
        return buffer
    there = read_device(buffer, "bench")
    content: Array = np.empty(there.size, there.dtype)
    staging().fetch(there.address, content.view(np.uint8), there.streams)
    return content


@cache
def staging() -> cuda.Staging:
    """The copies to and from this process's device."""
    return cuda.Staging(cuda.device())


def time_calls(sequence: list[Call], between: Call) -> list[int]:
    """Time each call, in nanoseconds; ``between`` runs after each and is not timed."""
    now, times = perf_counter_ns, list[int]()
    keep = times.append
    for call in sequence:
        began = now()
        call()
        keep(now() - began)
        between()
    return times


def time_new_calls(sequence: list[NewCall], between: Call) -> list[tuple[int, int]]:
    """Time the making of the arrays of each call, and the call, in nanoseconds; binding and freeing are not timed."""
    now, times, kept = perf_counter_ns, list[tuple[int, int]](), deque[Any](maxlen=KEPT_ARRAYS)
    for make, bind in sequence:
        began = now()
        arrays = make()
        making = now() - began
        call = bind(*arrays)
        began = now()
        call()
        times.append((making, now() - began))
        kept.append(arrays)
        between()
    return times


def bind_arrays(bind: Any, comm: Any, shape: Shape, named: tuple[str, ...], send: Any, recv: Any) -> Call:
    """The call of a benchmark on two buffers."""
    call: Call = bind(comm, shape, send, recv, named)
    return call


def no_op() -> None:
    """Do nothing between calls."""


def takes_algorithm(method: Any) -> bool:
    """Whether a method has a parameter ``algorithm``."""
    try:
        return "algorithm" in signature(method).parameters
    except ValueError:  # a compiled method of mpi4py has no signature
        return False


def percentile(samples: npt.NDArray[np.float64], p: int) -> float:
    """The percentile as OSU defines it: the sorted sample at n·p/100 − 1, at least the first."""
    return float(np.sort(samples)[max(0, samples.size * p // 100 - 1)])


def allocate_aligned(count: int, dtype: np.dtype[Any]) -> Array:
    """An array that starts at a cache line."""
    raw = np.empty(count * dtype.itemsize + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + count * dtype.itemsize].view(dtype)


def count_nodes(comm: Any) -> int:
    """The number of nodes of a communicator (collective)."""
    if isinstance(comm, Communicator):
        return int(comm.layout.count)
    return len(set(comm.allgather(MPI.Get_processor_name())))


def predict_us(comm: Any, case: Case, algorithm: str, nbytes: int) -> float | None:
    """The cost model's prediction for an algorithm, or for the one that ``"auto"`` selects; None without one."""
    if not isinstance(comm, Communicator) or not case.algorithms or comm.size == 1 or not comm.layout.even:
        return None
    machine = comm.context.table.machine
    name = comm.explain(case.algorithms, nbytes).algorithm if algorithm == "auto" else algorithm
    if machine is None or name not in (*ALGORITHMS.get(case.algorithms, {}), "hierarchical"):
        return None
    shape = comm.layout.count, comm.layout.per_node[0]
    return float(cost.prediction(name, case.algorithms, *shape, nbytes, machine).us)
