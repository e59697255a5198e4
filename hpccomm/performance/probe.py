"""Measures the cores of this node once, in well under a second, and keeps the figures in a file of the user.

Two threads, each bound to a core, copy, add, hand over blocks and echo flags; the kernels that they run are those of
the collectives.  Every figure is the best of rounds in which all measurements take turns: other work only makes them
slower.  A machine on which the threads did not get their cores, or on which the rounds differ much, is *busy*: its
figures are shown but not kept.

The file is named by processor, kernel version and cores, and lies beside the compiled functions
(:func:`hpccomm.kernels.objects.folders`).  It is read by one rank a node and written at once.  A file that is damaged,
or that is another machine's, is as good as none.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.kernels import objects
from hpccomm.kernels.shared_memory.records import LINE_BYTES, PROBE_RECORD, RING, fill
from hpccomm.layout import read_attribute
from hpccomm.performance.machine import DEFAULTS, Probe, floor_power, parse_probe
from hpccomm.performance.units import format_ranges
from hpccomm.transports.segment import free_bytes

SCHEMA = 1
ROUNDS = 5
SECONDS = 0.7
"""After so long no further measurement begins."""
SHARE, SPREAD = 0.85, 1.6
"""On an idle machine threads have at least this share of their cores, and the middle round is this near the best."""
SYSTEM_CPUS = Path("/sys/devices/system/cpu")
LEAST_MEMORY, MOST_MEMORY = 1 << 25, 1 << 26
"""Bytes of each vector in measurements beyond the caches."""
Cores = tuple[int, ...]


# What the system says


class Caches(NamedTuple):
    """The caches of a core."""

    l1: int = 0
    l2: int = 0
    l3: int = 0
    group: str = ""
    """The cores that share the last-level cache."""

    def sizes(self) -> dict[str, Any]:
        """Bytes by name."""
        return {"l1": self.l1, "l2": self.l2, "l3": self.l3}


class Place(NamedTuple):
    """Where a core is: ranks are near each other in this order of importance."""

    package: str = ""
    domain: str = ""
    """The memory that is near it (NUMA)."""
    group: str = ""
    """The cores that share its last-level cache."""


UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def read_caches(core: int) -> Caches:
    """The sizes of the data caches of a core, and who shares the last one; 0 where the system does not say."""
    sizes, groups = dict.fromkeys((1, 2, 3), 0), {0: ""}
    for each in sorted((SYSTEM_CPUS / f"cpu{core}" / "cache").glob("index*")):
        level, text = read_attribute(each / "level"), read_attribute(each / "size")
        if read_attribute(each / "type") == "Instruction" or level not in ("1", "2", "3"):
            continue
        with contextlib.suppress(ValueError, KeyError):
            sizes[int(level)] = int(text[:-1]) * UNITS[text[-1]] if text[-1:] in UNITS else int(text or 0)
        groups[int(level)] = read_attribute(each / "shared_cpu_list")
    return Caches(sizes[1], sizes[2], sizes[3], groups[max(groups)])


@cache
def place_of(core: int) -> Place:
    """The package, the memory and the last-level cache of a core."""
    folder = SYSTEM_CPUS / f"cpu{core}"
    domain = next((each.name for each in folder.glob("node[0-9]*")), "")
    return Place(read_attribute(folder / "topology" / "physical_package_id"), domain, read_caches(core).group)


def common_place(cores: Iterable[int]) -> Place:
    """What all the cores have in common; empty fields where they differ, as for a rank that may run on any core."""
    common: Place | None = None
    for core in cores:
        here = place_of(core)
        common = Place(*(a if a == b else "" for a, b in zip(common or here, here, strict=True)))
        if common == Place():
            break
    return common or Place()


@cache
def processor_name() -> str:
    """The model name of the processor."""
    text = objects.read_beginning("/proc/cpuinfo").decode(errors="replace")
    facts = dict(line.partition(":")[::2] for line in text.splitlines())
    known = {name.strip(): value.strip() for name, value in facts.items()}
    arm = " ".join(known[name] for name in ("CPU implementer", "CPU part") if name in known)
    return known.get("model name") or arm or platform.machine()


def whole_cores(cores: Iterable[int]) -> Cores:
    """One processor of each core: threads of one core share its caches and its time."""
    first: dict[str, int] = {}
    for each in sorted(cores):
        siblings = read_attribute(SYSTEM_CPUS / f"cpu{each}" / "topology" / "thread_siblings_list")
        first.setdefault(siblings or str(each), each)
    return tuple(first.values())


def choose_pairs(cores: Cores) -> tuple[Cores, Cores]:
    """Two cores that share a last-level cache, and the two that are farthest apart; empty if there are none."""
    pairs = [(a, b) for a in cores[:1] for b in cores[1:]]
    near = next((each for each in pairs if place_of(each[0]).group == place_of(each[1]).group), ())
    other_package = [each for each in pairs if place_of(each[0]).package != place_of(each[1]).package]
    other_cache = [each for each in pairs if place_of(each[0]).group != place_of(each[1]).group]
    return near, next(iter(other_package or other_cache), ())


# Measuring


class Worker:
    """A thread that is bound to a core, and the record of what it measures."""

    def __init__(self, core: int) -> None:
        from concurrent.futures import ThreadPoolExecutor  # costs time that programs which only read files save

        self.core, self.pool = core, ThreadPoolExecutor(1)
        words = np.zeros(PROBE_RECORD.itemsize // 8 + 2, np.int64)
        self.record: npt.NDArray[Any] = words[: PROBE_RECORD.itemsize // 8].view(PROBE_RECORD)
        self.flag = np.zeros(2 * LINE_BYTES // 8, np.int64)
        self.got: list[float] = []
        """Seconds for which the thread had its core, in each measurement."""
        self.spent: list[float] = []
        """Seconds that each measurement took."""
        self.pool.submit(self._bind).result()

    def _bind(self) -> None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {self.core})

    @property
    def flag_address(self) -> int:
        """A word on a cache line of its own."""
        address: int = self.flag.ctypes.data
        return -(-address // LINE_BYTES) * LINE_BYTES

    def start(self, **fields: Any) -> Any:
        """Begin a measurement; the result is that of a future."""
        self.flag[:] = 0
        fill(self.record, **fields)
        return self.pool.submit(self._run)

    def _run(self) -> int:
        wall, mine = time.perf_counter(), time.thread_time()
        found = objects.kernel("run_probe")(self.record.ctypes.data)
        wall, mine = time.perf_counter() - wall, time.thread_time() - mine
        self.got.append(mine)
        self.spent.append(wall)
        return found


class Vectors:
    """Memory with its pages in place, as long as this object lives."""

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []

    def add(self, nbytes: int) -> int:
        """The address of a new vector."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
        self._held.append(mmap.mmap(-1, nbytes, flags))
        return ctypes.addressof(ctypes.c_char.from_buffer(self._held[-1]))


def alone(worker: Worker, task: int, repeats: int, **fields: int) -> int:
    """Nanoseconds of a task of one thread; FAILED if the system refuses."""
    return int(worker.start(task=task, repeats=repeats, **fields).result())


def together(pair: Sequence[Worker], task: int, repeats: int, fields: Sequence[dict[str, int]]) -> int:
    """Nanoseconds of a task of two threads; FAILED if one has waited too long for the other."""
    from hpccomm.kernels.shared_memory import probe as tasks

    for worker, other, more in zip(pair, reversed(pair), fields, strict=True):
        fill(worker.record, mine=worker.flag_address, theirs=other.flag_address, first=int(worker is pair[0]), **more)
        worker.flag[:] = 0
    found = [int(each.result()) for each in [worker.start(task=task, repeats=repeats) for worker in pair]]
    return max(found) if min(found) >= 0 else tasks.FAILED


Measurement = tuple[str, Callable[[], int], int]
"""Name of a figure; what measures its nanoseconds; units of work: a rate is units a nanosecond, a time its inverse."""
ECHOES, POLLS, YIELDS, HANDOVERS = 400, 4000, 400, 48


def list_pair_measurements(
    near: Sequence[Worker], far: Sequence[Worker], slot: int, vectors: Vectors
) -> Iterator[Measurement]:
    """What two threads measure."""
    from hpccomm.kernels.shared_memory import probe as tasks

    nothing: list[dict[str, int]] = [{}, {}]
    if near:
        yield "line_ns", lambda: together(near, tasks.ECHOES, ECHOES, nothing), 2 * ECHOES
    if far:
        yield "far_line_ns", lambda: together(far, tasks.ECHOES, ECHOES, nothing), 2 * ECHOES
    pair = far or near
    if not pair:
        return
    rings, ends = [vectors.add(RING * slot) for _ in pair], [vectors.add(slot) for _ in range(4)]
    fields = [
        {"slot": rings[k], "their_slot": rings[1 - k], "nbytes": slot, "source": ends[k], "to": ends[2 + k]}
        for k in range(2)
    ]
    for name, task in (("handover", tasks.HANDOVERS), ("handover_nontemporal", tasks.NONTEMPORAL_HANDOVERS)):
        yield name, lambda task=task: together(pair, task, HANDOVERS, fields), HANDOVERS * slot  # type: ignore[misc]


def list_measurements(worker: Worker, caches: Caches, vectors: Vectors) -> Iterator[Measurement]:
    """What one thread measures alone."""
    from hpccomm.kernels.shared_memory import probe as tasks

    word = worker.flag_address
    yield "poll_ns", lambda: alone(worker, tasks.POLLS, POLLS, theirs=word), POLLS
    yield "yield_ns", lambda: alone(worker, tasks.YIELDS, YIELDS), YIELDS
    most = min(max(2 * caches.l3, LEAST_MEMORY), MOST_MEMORY)
    if free_bytes() < 8 * most:
        most = caches.l2 or 1 << 20
    ends = {"source": vectors.add(most), "to": vectors.add(most)}

    def row(name: str, task: int, nbytes: int, repeats: int, **more: int) -> Measurement:
        fields = {**ends, "nbytes": nbytes, **more}
        return name, lambda: alone(worker, task, repeats, **fields), nbytes * repeats

    in_l2, in_l3 = min(most, (caches.l2 or 1 << 20) // 4), min(most, (caches.l3 or 1 << 24) // 8)
    yield row("l2_copy", tasks.COPIES, in_l2, 16)
    yield row("l3_copy", tasks.COPIES, in_l3, 2)
    yield row("single_copy", tasks.PULLS, min(most, 1 << 20), 4, pid=os.getpid())
    if most >= LEAST_MEMORY:
        yield row("memory_copy", tasks.COPIES, most, 1)
        yield row("memory_copy_nontemporal", tasks.NONTEMPORAL_COPIES, most, 1)
        name, measure, units = row("memory_add", tasks.ADDS, most, 1, fold=objects.fold("sum", "f4"))
        yield name, measure, units // 2


TIMES = frozenset(name for name in Probe._fields if name.endswith("_ns"))


def measure(cores: Iterable[int]) -> tuple[Probe, bool]:
    """Probe these cores; also whether the machine was idle enough for the figures to be kept.

    Raises ``ImportError`` or ``OSError`` where the kernels are not compiled and cannot be.
    """
    whole = whole_cores(cores)
    near, far = choose_pairs(whole)
    workers = {core: Worker(core) for core in dict.fromkeys((*whole[:1], *near, *far))}
    caches = read_caches(whole[0])
    slot = max(1 << 15, min(DEFAULTS.slot, floor_power(caches.l2 // 4) or DEFAULTS.slot))
    objects.kernel("run_probe")
    vectors = Vectors()
    try:
        near_pair, far_pair = ([workers[core] for core in each] for each in (near, far))
        todo = [
            *list_measurements(workers[whole[0]], caches, vectors),
            *list_pair_measurements(near_pair, far_pair, slot, vectors),
        ]
        rounds: dict[str, list[float]] = {name: [] for name, _, _ in todo}
        began = time.perf_counter()
        for number in range((ROUNDS + 1) * len(todo)):
            name, act, units = todo[number % len(todo)]
            spent = act()
            if number >= len(todo) and spent > 0:  # the first round fills caches and pages
                rounds[name].append(spent / units if name in TIMES else units / spent)
            if number >= 2 * len(todo) and time.perf_counter() - began > SECONDS:
                break
    finally:
        for each in workers.values():
            each.pool.shutdown()
    figures: dict[str, Any] = {name: round(best_of(name, found), 3) for name, found in rounds.items() if found}
    groups = len({place_of(core).group for core in whole})
    idle = all(is_steady(name, found) for name, found in rounds.items()) and all(
        sum(each.got) >= SHARE * sum(each.spent) for each in workers.values()
    )
    facts: dict[str, Any] = {"cpu": processor_name(), "cores": len(whole), "cache_groups": groups}
    return Probe(**facts, **caches.sizes(), **figures), idle


def best_of(name: str, found: Sequence[float]) -> float:
    """The shortest time, or the highest rate."""
    return min(found) if name in TIMES else max(found)


def is_steady(name: str, found: Sequence[float]) -> bool:
    """Whether the middle round is near the best one."""
    if not found:
        return True
    middle, best = sorted(found)[len(found) // 2], best_of(name, found)
    return max(middle / best, best / middle) <= SPREAD


# Files


def describe_cores(cores: Iterable[int]) -> str:
    """Numbers of cores as ranges: ``0-3,8``."""
    return format_ranges(sorted(cores))


def identify(cores: Iterable[int]) -> dict[str, Any]:
    """What a probe belongs to."""
    return {
        "schema": SCHEMA,
        "processor": processor_name(),
        "kernel": platform.release(),
        "cores": describe_cores(cores),
    }


def file_name(cores: Iterable[int]) -> str:
    """The name of the file for these cores."""
    return f"machine-{zlib.crc32(json.dumps(identify(cores)).encode()):08x}.json"


def all_cores() -> Cores:
    """All processors of this machine."""
    return tuple(range(os.cpu_count() or 1))


class Found(NamedTuple):
    """What was found in files."""

    probe: Probe | None = None
    path: Path | None = None
    trouble: str = ""
    """Why a file could not be used, as a sentence."""


@cache
def load_once(cores: Cores) -> Found:
    """What :func:`load` finds, read once in a process."""
    return load(cores)


def load(cores: Iterable[int]) -> Found:
    """The probe of these cores, else of all cores of this machine; never raises."""
    trouble = ""
    for wanted in dict.fromkeys((tuple(sorted(cores)), all_cores())):
        for folder in objects.folders():
            path = folder / file_name(wanted)
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
                if data["of"] != identify(wanted):
                    raise ValueError("it is of another machine")
                return Found(parse_probe(data["probe"]), path)
            except OSError:
                continue
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                problem = f"{type(error).__name__}: {error}"
                trouble = f"{path} holds no probe of this machine ({problem}): remove it, or run `hpccomm tune --probe`"
    return Found(trouble=trouble)


def save(probe: Probe, cores: Iterable[int]) -> Path | None:
    """Write the file of these cores; readers see the old or the new one.  None if no folder can be written to."""
    wanted = tuple(sorted(cores))
    folder = objects.writable_folder()
    if folder is None:
        return None
    path = folder / file_name(wanted)
    return path if write_json(path, {"of": identify(wanted), "probe": probe._asdict()}) else None


def write_json(path: Path, data: Any) -> bool:
    """Write a file at once; False if the system refuses."""
    from hpccomm.files import write_text

    try:
        write_text(path, json.dumps(data, indent=1) + "\n")
    except OSError:
        return False
    return True


def ensure(cores: Iterable[int], again: bool = False) -> tuple[Found, bool]:
    """The probe of these cores, measured now if there is none, or ``again``; also whether the machine was idle.

    Where nothing can be compiled there is none.
    """
    wanted = tuple(sorted(cores))
    found = load(wanted)
    if found.probe and not again:
        return found, True
    try:
        probe, idle = measure(wanted)
    except (ImportError, OSError) as error:
        return Found(trouble=f"this machine cannot be probed ({error})"), True
    return Found(probe, save(probe, wanted) if idle else None, found.trouble), idle
