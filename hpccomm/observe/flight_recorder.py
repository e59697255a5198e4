"""The flight recorder: the last calls of this process in memory that others of the same user can read.

*A ring of events; an event is one collective call or one part of a program, with its begin and its end.*  The memory is
an anonymous file of this process, so it needs no name, and it is gone with the process.  Other ranks of the node and
``hpccomm stacks`` open it by the number of the process.  Compiled code writes the same ring.  A request for the stacks
of the process is a number in the same memory, which the watchdog thread answers there: no signal is sent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import struct
import sys
import sysconfig
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpccomm.errors import ArgumentError
from hpccomm.kernels.entry.records import EVENT_RECORD
from hpccomm.kernels.shared_memory.records import W, offset_of, record, words
from hpccomm.observe.processes import find_launchers, find_process, read_process
from hpccomm.performance.units import format_size, format_time

VARIABLE = "HPCCOMM_TIMELINE"
EVENTS, TRACED_EVENTS = 1 << 10, 1 << 18
"""Events that a process keeps, and those that it keeps where a timeline is written: powers of two."""
TEXTS, TEXT_BYTES, ANSWER_BYTES, REPORT_BYTES = 4096, 120, 1 << 16, 1 << 20
FILE = "hpccomm-calls"
MAGIC = 0x68706363_00000001
"""The layout of the memory; another version of hpccomm has another number."""

TEXT_RECORD = record([*words("number"), ("text", f"S{TEXT_BYTES}")])
HEAD_RECORD = record(
    [
        *words("magic", "pid", "rank", "size", "length", "made"),  # made: events so far
        *words("alive"),  # when the watchdog has looked last
        *words("requested", "answered", "octets"),  # the stacks of this process
        *words("inquired", "reported", "report_octets"),  # where the ranks of other nodes stand
        ("texts", TEXT_RECORD, TEXTS),
        ("answer", np.uint8, ANSWER_BYTES),
        ("report", np.uint8, REPORT_BYTES),
    ]
)
MADE, ALIVE, REQUESTED, ANSWERED, INQUIRED, REPORTED = (
    offset_of(HEAD_RECORD, name) // W for name in ("made", "alive", "requested", "answered", "inquired", "reported")
)
END, NBYTES, TEXT = (offset_of(EVENT_RECORD, name) // W for name in ("end", "nbytes", "text"))
EVENT_WORDS, FIRST_EVENT = EVENT_RECORD.itemsize // W, HEAD_RECORD.itemsize // W
WRITE_EVENT = struct.Struct(f"{EVENT_WORDS}q").pack_into

clock = time.monotonic_ns
"""The clock of the kernels; one for all processes of a machine."""


class Event(NamedTuple):
    """One call, or one part of a program; times in nanoseconds, ``end`` is 0 while it runs."""

    text: str
    begin: int
    end: int
    nbytes: int
    label: str
    """The communicator as text; empty for a part of the program."""
    comm: int
    """The communicator: the same number on all of its ranks."""
    call: int
    """The number of the call on its communicator; -1 inside another one."""

    @property
    def name(self) -> str:
        """The collective, or the part of the program."""
        return self.text.partition("(")[0].partition(" ")[0] if self.comm else self.text

    def __str__(self) -> str:
        size = f", {format_size(self.nbytes)}" if self.nbytes else ""
        number = f" (call {self.call} of {self.label})" if self.call > 0 else ""
        return f"{self.text}{size}{number}"


class Ring:
    """The memory of one process, mapped by itself or by another one."""

    def __init__(self, file: int, size: int, present: bool = False) -> None:
        """``present``: its pages are made now, not one by one while calls are timed."""
        self.buffer = mmap.mmap(file, size, mmap.MAP_SHARED | mmap.MAP_POPULATE * present)
        self.head = np.frombuffer(self.buffer, HEAD_RECORD, 1)
        self.words = memoryview(self.buffer).cast("q")
        self.table = np.frombuffer(self.buffer, EVENT_RECORD, -1, HEAD_RECORD.itemsize)

    def read_text(self, number: int) -> str:
        """A text by its number; ``?`` if another one has taken its place."""
        found = self.head["texts"][0, number % TEXTS]
        return found["text"].decode(errors="replace") if found["number"] == number else "?"

    def _read(self, rows: Any) -> list[Event]:
        """The events of some rows, in the order of their begin."""
        rows = np.sort(rows[rows["number"] > 0].copy(), order="number")
        texts: dict[int, str] = {}
        for number in {*rows["text"].tolist(), *rows["label"].tolist()}:
            texts[number] = self.read_text(number) if number else ""
        return [
            Event(texts[text], begin, end, nbytes, texts[label], comm, call)
            for _, begin, end, nbytes, text, label, comm, call in rows.tolist()
        ]

    def events(self) -> list[Event]:
        """All events that are kept."""
        return self._read(self.table)

    def running(self) -> list[Event]:
        """The calls in which the process is, the innermost last."""
        return self._read(self.table[(self.table["end"] == 0) & (self.table["comm"] != 0)])

    def last_call(self, comm: int) -> Event | None:
        """The last call on a communicator, or on any (0), that is not inside another one."""
        chosen = self.table["comm"] == comm if comm else self.table["comm"] != 0
        found = self._read(self.table[chosen & (self.table["call"] > 0)])
        return found[-1] if found else None

    def request(self) -> int:
        """Ask for the stacks of the process; returns the number of the request."""
        self.words[REQUESTED] += 1
        return self.words[REQUESTED]

    def answer(self, number: int) -> list[Stack] | None:
        """The stacks that the process has written for a request; None if it has not yet."""
        if self.words[ANSWERED] < number:
            return None
        with contextlib.suppress(ValueError):  # a later answer is being written
            found = json.loads(self.head["answer"][0, : int(self.head["octets"][0])].tobytes())
            return [Stack.decode(each) for each in found]
        return None

    def report(self, number: int) -> list[State] | None:
        """Where the ranks of other nodes stand, as the process has written for an inquiry; None if it has not yet."""
        if self.words[REPORTED] < number:
            return None
        found = json.loads(self.head["report"][0, : int(self.head["report_octets"][0])].tobytes())
        return [State.decode(each) for each in found]

    def is_awake(self, seconds: float) -> bool:
        """Whether the watchdog of the process has looked after the calls in the last seconds."""
        return clock() - self.words[ALIVE] < 1e9 * seconds

    def close(self) -> None:
        """Unmap the memory."""
        self.words.release()
        del self.head, self.table
        with contextlib.suppress(BufferError):
            self.buffer.close()


class Frame(NamedTuple):
    """One function that runs."""

    file: str
    line: int
    function: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


class Stack(NamedTuple):
    """A thread and what it runs, the innermost function first."""

    thread: str
    frames: list[Frame]

    @classmethod
    def decode(cls, found: Any) -> Stack:
        """A stack from JSON."""
        return cls(found[0], [Frame(*each) for each in found[1]])

    @property
    def own(self) -> list[Frame]:
        """The functions of the program itself, not those of hpccomm and of libraries."""
        found = [each for each in self.frames if not each.file.startswith((PACKAGE, *library_folders()))]
        return found or self.frames


PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
MOST_FRAMES = 60


@cache
def library_folders() -> tuple[str, ...]:
    """Where Python's library and installed packages are; the first call takes milliseconds."""
    return tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


@cache
def starters() -> tuple[str, ...]:
    """The beginnings of the names of files whose functions only start the program."""
    return ("<frozen", *(os.path.join(each, "mpi4py", "") for each in library_folders()))


def read_stacks() -> list[Stack]:
    """The stacks of this process: the main thread's first, without the threads of hpccomm that only wait."""
    names = {each.ident: each.name for each in threading.enumerate()}
    main = threading.main_thread().ident
    found = []
    for ident, frame in sorted(sys._current_frames().items(), key=lambda each: each[0] != main):
        name, at = names.get(ident, "a thread"), frame
        frames: list[tuple[str, int, str]] = []
        while at is not None and len(frames) < MOST_FRAMES:
            if not at.f_code.co_filename.startswith(starters()):
                frames.append((at.f_code.co_filename, at.f_lineno, at.f_code.co_name))
            at = at.f_back  # type: ignore[assignment]
        idle = not frames or (
            name.startswith("hpccomm-") and frames[0][2] in ("run", "wait", "run_watchdog", "read_stacks")
        )
        if ident != threading.get_ident() and not idle:
            found.append(Stack(name, [Frame(*each, source_of(*each[:2])) for each in frames]))
    return found


def source_of(file: str, line: int) -> str:
    """A line of a program, without Python's cache of lines, which another thread may be filling."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        if Path(file).is_file():  # a program may be read from a pipe, where reading would wait
            return Path(file).read_text(errors="replace").splitlines()[line - 1].strip()
    return ""


class Comm:
    """A communicator in the recorder: its number and its text, and how many calls it has seen."""

    def __init__(self, recorder: Recorder, number: int, text: str) -> None:
        self.recorder, self.number, self.text = recorder, number, text
        self.label = recorder.intern(text)
        self.calls = np.zeros(2, np.int64)
        """Calls so far, and in how many this rank is."""
        self.counts = self.calls.data

    @property
    def place(self) -> dict[str, int]:
        """Where compiled code finds what it writes to an event."""
        calls = {"label": self.label, "comm": self.number, "comm_calls": self.calls.ctypes.data}
        return {**self.recorder.place, **calls}


class Call:
    """One call in the recorder: a context manager."""

    __slots__ = ("_at", "_comm", "_inside", "_number", "_text", "nbytes")

    def __init__(self, comm: Comm, name: str, nbytes: int = 0, inside: bool = False) -> None:
        self._comm, self.nbytes, self._inside = comm, nbytes, inside
        self._text = comm.recorder.intern(name)

    def __enter__(self) -> Call:
        comm, call = self._comm, -1
        if not (comm.counts[1] or self._inside):
            call = comm.counts[0] = comm.counts[0] + 1
        comm.counts[1] += not self._inside
        self._number, self._at = comm.recorder.begin(self._text, self.nbytes, comm.label, comm.number, call)
        return self

    def describe(self, text: int) -> None:
        """Name the call more exactly: a text of the recorder, or 0 where nothing more is known."""
        if text:
            self._comm.recorder.ring.words[self._at + TEXT] = text

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        comm = self._comm
        comm.counts[1] -= not self._inside
        if isinstance(error, ArgumentError) and not (comm.counts[1] or self._inside):
            comm.counts[0] -= 1  # it was refused before the other ranks knew of it
        comm.recorder.finish(self._number, self._at)


class Recorder:
    """The recorder of this process."""

    def __init__(self, length: int = EVENTS) -> None:
        size = HEAD_RECORD.itemsize + length * EVENT_RECORD.itemsize
        file = -1
        with contextlib.suppress(OSError, AttributeError):
            file = os.memfd_create(FILE, os.MFD_CLOEXEC)
            os.ftruncate(file, size)
            weakref.finalize(self, os.close, file)
        self.ring, self._length = Ring(file, size, present=length > EVENTS), length
        head = self.ring.head
        head["pid"], head["length"], head["rank"], head["size"] = os.getpid(), length, -1, -1
        head["magic"] = MAGIC
        self._numbers: dict[str, int] = {}
        self._texts, self._last = [""] * TEXTS, 0
        self._lock = threading.RLock()
        """Held while a number is taken; a signal handler may make a call, too."""

    def set_rank(self, rank: int, size: int) -> None:
        """Write which rank of how many this process is."""
        self.ring.head["rank"], self.ring.head["size"] = rank, size

    @property
    def place(self) -> dict[str, int]:
        """Where compiled code finds the ring."""
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.ring.buffer))
        return {"ring": start + W * MADE, "events": start + W * FIRST_EVENT, "last_event": self._length - 1}

    def intern(self, text: str) -> int:
        """The number of a text, which holds for half of :data:`TEXTS` further ones at least."""
        number = self._numbers.get(text, -TEXTS)
        if self._last - number > TEXTS // 2:
            with self._lock:
                number = self._numbers.get(text, -TEXTS)
                if self._last - number > TEXTS // 2:
                    number = self._write_text(text)
        return number

    def _write_text(self, text: str) -> int:
        """Write a text in the place of the oldest one."""
        number = self._last = self._last + 1
        place, texts = number % TEXTS, self.ring.head["texts"]
        if self._numbers.get(self._texts[place]) == number - TEXTS:  # it has not been written again since
            del self._numbers[self._texts[place]]
        self._texts[place] = text
        texts["number"][0, place] = 0
        texts["text"][0, place] = text.encode()[:TEXT_BYTES]
        texts["number"][0, place] = number
        self._numbers[text] = number
        return number

    def begin(self, text: int, nbytes: int, label: int, comm: int, call: int) -> tuple[int, int]:
        """Record that a call begins; returns what :meth:`finish` takes."""
        ring = self.ring.words
        with self._lock:
            number = ring[MADE] = ring[MADE] + 1
        at = FIRST_EVENT + EVENT_WORDS * (number & self._length - 1)
        WRITE_EVENT(self.ring.buffer, W * at, 0, clock(), 0, nbytes, text, label, comm, call)
        ring[at] = number
        return number, at

    def finish(self, number: int, at: int) -> None:
        """Record that a call has ended, unless later ones have taken its place."""
        ring = self.ring.words
        if ring[at] == number:
            ring[at + END] = clock()

    def record_bytes(self, number: int, nbytes: int) -> None:
        """Record the bytes of a call that is under way."""
        ring, at = self.ring.words, FIRST_EVENT + EVENT_WORDS * (number & self._length - 1)
        if number and ring[at] == number:
            ring[at + NBYTES] = min(nbytes, MOST_BYTES)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Record a part of the program."""
        begun = self.begin(self.intern(name), 0, 0, 0, -1)
        try:
            yield
        finally:
            self.finish(*begun)

    def answer_request(self) -> None:
        """Write the stacks of this process if somebody has asked for them; and that this thread is alive."""
        ring = self.ring
        ring.words[ALIVE] = clock()
        wanted = ring.words[REQUESTED]
        if ring.words[ANSWERED] < wanted:
            stacks = read_stacks()
            found = ([(each.thread, each.frames[:kept]) for each in stacks] for kept in range(MOST_FRAMES, 0, -10))
            self._write("answer", "octets", found)
            ring.words[ANSWERED] = wanted

    def write_report(self, number: int, states: Sequence[State]) -> None:
        """Write where the ranks of other nodes stand, for inquiry ``number``."""
        short = [each._replace(stacks=each.stacks and each.stacks[:1]) for each in states]
        self._write("report", "report_octets", (states, short, [each._replace(stacks=None) for each in states]))
        self.ring.words[REPORTED] = number

    def _write(self, place: str, length: str, choices: Iterable[Any]) -> None:
        """Write the first of several forms that there is room for."""
        room, head = self.ring.head[place].size, self.ring.head
        fits = (octets for octets in (json.dumps(each).encode() for each in choices) if len(octets) <= room)
        octets = next(fits, b"[]")
        head[length] = len(octets)
        head[place][0, : len(octets)] = np.frombuffer(octets, np.uint8)


@cache
def recorder() -> Recorder:
    """The recorder of this process."""
    return Recorder(TRACED_EVENTS if os.environ.get(VARIABLE) else EVENTS)


os.register_at_fork(after_in_child=recorder.cache_clear)


MOST_BYTES = (1 << 63) - 1
"""The largest number of bytes that an event can have: objects may claim more."""


def count_bytes(args: Sequence[Any]) -> int:
    """The bytes of the first array among the arguments of a call; 0 where there is none."""
    for each in args:
        first = each[0] if isinstance(each, (list, tuple)) and each else each
        with contextlib.suppress(Exception):  # a sparse tensor raises
            nbytes = first.nbytes
            if isinstance(nbytes, int):
                return min(nbytes, MOST_BYTES)
    return 0


# Other processes


@contextlib.contextmanager
def open_ring(pid: int) -> Iterator[Ring | None]:
    """The memory of another process; None if it has none, or this user may not see it."""
    ring, links = None, list[Path]()
    with contextlib.suppress(OSError):  # this process may have no file descriptor left
        links = sorted(Path(f"/proc/{pid}/fd").glob("*")) if pid else []
    for link in links:
        with contextlib.suppress(OSError, ValueError):
            if os.readlink(link) == f"/memfd:{FILE} (deleted)":
                with open(link, "r+b") as file:
                    ring = Ring(file.fileno(), 0)
                if (ring.head["magic"][0], ring.head["pid"][0]) == (MAGIC, pid):
                    break
                ring = None  # another version's, or that of the parent of a fork
    try:
        yield ring
    finally:
        if ring is not None:
            ring.close()


def find_ranks(pid: int, launcher: int = -1) -> tuple[dict[int, int], int]:
    """The processes of this node's ranks of the job to which a process belongs, and the ranks of the job.

    ``launcher``: the one that has started them, of those from which the process descends: -1 the outermost, 0 the
    innermost.
    """
    parents = {int(each.name): find_process(int(each.name)).parent for each in Path("/proc").glob("[0-9]*")}
    root = (list(find_launchers(pid)) or [pid])[launcher]
    members = []
    for each in parents:
        above = each
        while above != root and above in parents and above > 1:
            above = parents[above]
        members += [each] if above == root else []
    found = list(read_ranks(members))
    return {rank: each for each, rank, _ in found}, found[-1][2] if found else 0


def read_ranks(pids: Iterable[int]) -> Iterator[tuple[int, int, int]]:
    """Of the processes that are ranks: the process, its rank, and the ranks of its job."""
    for pid in pids:
        with open_ring(pid) as ring:
            if ring is not None and ring.head["rank"][0] >= 0:
                yield pid, int(ring.head["rank"][0]), int(ring.head["size"][0])


class State(NamedTuple):
    """Where a rank stands: what it does on one communicator, and what its threads run."""

    rank: int
    call: int
    """The number of its last call on the communicator."""
    waits: bool
    """Whether it is in that call."""
    text: str
    """Its call, or what it has done last."""
    stacks: list[Stack] | None
    """None if it has not answered."""
    condition: str
    """Why it has not answered; empty if it has."""

    def __str__(self) -> str:
        at = "" if not self.stacks else ": " + " < ".join(map(str, self.stacks[0].own[:MOST_SHOWN]))
        return f"{self.text}{at}" + (f" ({self.condition})" if self.condition else "")

    @classmethod
    def decode(cls, found: Any) -> State:
        """A state from JSON."""
        rank, call, waits, text, stacks, condition = found
        return cls(rank, call, waits, text, stacks and [Stack.decode(each) for each in stacks], condition)


MOST_SHOWN = 3
"""Functions of the program that a line of a report shows."""


def describe(ring: Ring, comm: int) -> tuple[int, bool, str]:
    """The last call of a process on a communicator, or on any (0), whether it is in it, and what it does."""
    last, running, now = ring.last_call(comm), ring.running(), clock()
    inside = [each for each in running if comm in (0, each.comm)]
    call = last.call if last else 0
    if running:
        each = inside[0] if inside else running[0]
        return call, bool(inside), f"in {each}"
    if last is None:
        return call, False, "has made no call yet"
    return call, False, f"in no call since {last}, {(now - last.end) / 1e9:.0f} s ago"


def describe_calls(pid: int, count: int) -> list[str]:
    """The last calls of a process, and when they began."""
    with open_ring(pid) as ring:
        found = [each for each in ring.events() if each.comm][-count:] if ring and count > 0 else []
    now = clock()
    return [
        f"{each}, {format_time((each.end - each.begin) / 1e3) if each.end else 'not complete'}, "
        f"began {(now - each.begin) / 1e9:.1f} s ago"
        for each in found
    ]


def condition_of(pid: int) -> str:
    """Why a process does not answer: it is stopped or gone, or it may hold the interpreter or wait for a core."""
    states = {"T": "is stopped", "t": "is stopped by a debugger", "": "has ended"}
    try:
        return states.get(read_process(pid).state, NO_ANSWER)
    except OSError:
        return NO_ANSWER


NO_ANSWER = "does not answer"


class Inquiry:
    """Asks processes of this node where they stand; ``collect`` until ``done``."""

    def __init__(self, processes: dict[int, int], comm: int) -> None:
        """``processes``: the number of the process of each rank."""
        self._processes, self._comm, self._numbers = processes, comm, dict[int, int]()
        self.states: dict[int, State] = {}
        for rank, pid in processes.items():
            with open_ring(pid) as ring:
                if ring is None:
                    self.states[rank] = State(rank, 0, False, "cannot be read", None, condition_of(pid))
                else:
                    self._numbers[rank] = ring.request()

    def collect(self, last: bool = False) -> bool:
        """Read what has been answered; with ``last``, also of ranks that have not.  Returns whether all is there."""
        for rank in [each for each in self._processes if each not in self.states]:
            pid = self._processes[rank]
            with open_ring(pid) as ring:
                if ring is None:
                    self.states[rank] = State(rank, 0, False, "cannot be read", None, condition_of(pid))
                    continue
                stacks = read_stacks() if pid == os.getpid() else ring.answer(self._numbers[rank])
                condition = "" if stacks is not None else condition_of(pid)
                if stacks is not None or last or condition != NO_ANSWER:
                    self.states[rank] = State(rank, *describe(ring, self._comm), stacks, condition)
        return len(self.states) == len(self._processes)
