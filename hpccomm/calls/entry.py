"""The compiled way into a collective, and the table of the kinds of calls that it knows.

*A kind of call: collective, operation, root, algorithm, dtype, in place or not, and a range of lengths.*  The entry is
one built-in function a collective of a communicator.  It reads NumPy arrays and mpi4py's lists of array, count and
datatype, finds the row of the call's kind, writes addresses and length into that row's call record and runs its
kernel; or it compares the ranks' calls and calls MPI's function, or runs the records of a schedule for one length.  A
call that it does not know, or that fails, it answers with a code: the Python path takes the call, and adds a row.  The
key of a row consists of objects that the table keeps alive, never of the user's arrays.

``HPCCOMM_ENTRY=off`` leaves every call to the Python path.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from hpccomm.calls.blocks import EQUAL, NONE, OBJECT_SIGNATURES, ONE, PARTS, SIGNATURES, TYPED, Amounts, Signature
from hpccomm.calls.buffers import MPI_KINDS, element_of
from hpccomm.calls.consistency import EnteredCall
from hpccomm.calls.fingerprint import template_digest
from hpccomm.calls.operations import SUM_OF_AVERAGE, SUM_OF_SCALED
from hpccomm.calls.plans import COUNT_ARGUMENTS, NativeCall, RecordCall
from hpccomm.collectives import ALGORITHMS as SCHEDULES
from hpccomm.errors import ArgumentError, HpccommError, TransportError
from hpccomm.kernels import objects
from hpccomm.kernels.builtins import make_builtin
from hpccomm.kernels.entry import body, records
from hpccomm.kernels.reductions.reference import code_of
from hpccomm.kernels.shared_memory.memory import load
from hpccomm.kernels.shared_memory.records import W, fill, offset_of
from hpccomm.observe.flight_recorder import recorder

MAX_RANKS = 256
"""Python has one object each for the integers up to 256, so a root is recognised by its address."""
FIRST_ROWS, MAX_ROWS, MAX_RECORD_ROWS = 64, 4096, 256
DTYPE_CHARS = "?bhilqBHILQefdgFDG"

Door = Callable[..., Any]


class Key(NamedTuple):
    """What a door has read of a call: the key of its row, its length, and its addresses."""

    kind: int
    op: int
    root: int
    algorithm: int
    layout: int
    nbytes: int
    send: int
    recv: int


def decline(*arguments: Any) -> int:
    """The door of a communicator without a compiled entry."""
    return records.NOT_MINE


FREED = "the communicator has been freed: make a new one"


def refuse(*arguments: Any) -> int:
    """The door of a communicator that has been freed."""
    raise ArgumentError(FREED)


class Doors:
    """The way into each collective of a communicator: ``door(sendbuf, recvbuf, op, root, algorithm, rest)``.

    A door returns None when the call is done, else a code.
    """

    def __init__(self) -> None:
        self.close()

    def close(self, door: Door = decline) -> None:
        """Leave all calls to the Python path, or to another ``door``."""
        for name in COLLECTIVES:
            setattr(self, name, door)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Door: ...


FORMS = {
    **{name.lower(): form for name, form in SIGNATURES.items() if TYPED not in form},
    **{f"{name}_object": form for name, form in OBJECT_SIGNATURES.items()},
}
COLLECTIVES = tuple(FORMS)
INHERITED = tuple(name for name, form in FORMS.items() if not form.family)
"""Collectives that only MPI runs."""
ONE_BLOCK = tuple(name for name in INHERITED if FORMS[name].blockwise)
"""Collectives whose fingerprints count one block, although one rank has a block of every rank."""
UNCOUNTED = tuple(name for name in INHERITED if FORMS[name].varies)
"""Collectives of which every two ranks compare what one sends to the other."""


def door_facts(p: int) -> dict[str, dict[str, int]]:
    """The fields of each collective's door for p ranks."""
    return {name: read_facts(form, p) for name, form in FORMS.items()}


def read_facts(form: Signature, p: int) -> dict[str, int]:
    """The fields of a door for a collective that takes ``form``."""
    blocks = {NONE: 0, ONE: 1, EQUAL: p, PARTS: 1}
    counts_given, gathers = "recvcounts" in form.arguments, form.family == "allgather"
    in_place = blocks[form.recv] if form.send == ONE and not counts_given else 0
    uneven = (
        records.SENT_UNEVEN * (form.send == PARTS)
        | records.RECEIVED_UNEVEN * (form.recv == PARTS)
        | records.COUNTS_GIVEN * counts_given
    )
    sent_at_root = form.send == NONE != form.recv and "root" in form.arguments
    return {
        "send_blocks": blocks[form.send],
        "recv_blocks": blocks[form.recv],
        "in_place_blocks": in_place,
        "same_is_in_place": int(bool(form.family and in_place) and "op" in form.arguments),
        "send_counted": p if form.send == EQUAL else 1,
        "recv_counted": p if form.recv == EQUAL else 1,
        "own_block": int(gathers and form.recv == EQUAL),
        "rooted": records.RECEIVES_AT_ROOT * form.recv_at_root
        | records.SENDS_AT_ROOT * form.send_at_root
        | records.IS_SENT_AT_ROOT * sent_at_root,
        "uneven": uneven | records.ANY_LAYOUT * (form.varies and not form.family),
    }


class Entry:
    """The doors of one communicator, and its rows.

    ``memory`` is the shared memory of all ranks, ``table`` the consistency table, ``meeting`` the call in shared memory
    in which ranks meet before MPI's synchronising collectives; each may be None.  ``recorded`` are the addresses of the
    flight recorder, and how it names the communicator.
    """

    def __init__(
        self, doors: Doors, rank: int, size: int, memory: Any, table: Any, meeting: Any, recorded: dict[str, int]
    ) -> None:
        self._doors, self._rank, self._memory, self._meeting, self._table = doors, rank, memory, meeting, table
        self._resumes = False
        """Whether Python continues a call, during which signal handlers run."""
        self._facts = door_facts(size)
        self._types, self._items = type_table(), item_sizes()
        self._record, self._blocks = np.zeros((), records.ENTRY_RECORD), np.zeros(4 * size, np.int64)
        self._counts = np.zeros((4, size), np.int32)
        self._no_row = np.zeros(1, records.ROW_RECORD)
        self._inside = ctypes.c_int64.from_address(recorded["comm_calls"] + W)
        """In how many calls this rank is that Python has recorded."""
        self._pending, self._event = (
            ctypes.c_int64.from_address(self._record.ctypes.data + offset_of(records.ENTRY_RECORD, name))
            for name in ("pending", "event")
        )
        fill(self._record, **python_addresses(), rank=rank, rank_object=id(rank), size=size)
        fill(self._record, row=self._no_row.ctypes.data)
        fill(self._record, blocks=self._blocks.ctypes.data, counts=self._counts.ctypes.data, **recorded)
        fill(self._record, types=self._types.ctypes.data, types_mask=len(self._types) - 1)
        if memory:
            fill(self._record, state=memory.state_address, patience=memory.patience_ns)
            registered, count = memory.allocations.ctypes.data, memory.allocation_count.ctypes.data
            fill(self._record, registered=registered, registrations=count)
        if table:
            self._entered = EnteredCall(table, self._leave_native, self._clear_pending)
            self._members = np.array(table.members, np.int64)
            fill(self._record, **table.place, member_ranks=self._members.ctypes.data)
            fill(self._record, between=table.between.mask if table.between else -1)
        if meeting:
            fill(self._record, meeting=meeting.address, meet=meeting.kernel_address)
        self.clear()
        self._kept = [self._open_door(name) for name in COLLECTIVES]
        self._leave = make_builtin("leave", objects.address("leave"), self._kept[0])

    def _open_door(self, name: str) -> npt.NDArray[Any]:
        """Open the door of a collective; returns its record, which must stay alive."""
        door = np.zeros(1, records.DOOR_RECORD)
        fill(door[0:1], entry=self._record.ctypes.data, collective=COLLECTIVES.index(name), **self._facts[name])
        setattr(self._doors, name, make_builtin(name, objects.address("enter"), door))
        return door

    def clear(self) -> None:
        """Forget all rows."""
        self._calls: list[Any] = []
        self._places: list[npt.NDArray[np.int64]] = []
        self._seen: set[tuple[int, ...]] = set()
        """Kinds of calls of one layout or length that this rank has made once."""
        self._keys: list[tuple[Key, dict[str, int]]] = []
        self._resize(FIRST_ROWS)

    def _resize(self, length: int) -> None:
        """Make a table of ``length`` rows and write the known rows to it."""
        self._rows = np.zeros(length, records.ROW_RECORD)
        fill(self._record, rows=self._rows.ctypes.data, mask=length - 1)
        for key, values in self._keys:
            self._write_row(key, values)

    def key(self) -> Key:
        """The key, length and addresses of the call that a door has just answered with MISS."""
        words = self._record[()]
        return Key(*(int(words[name]) for name in Key._fields))

    def insert(self, key: Key, call: Any, text: int = 0) -> None:
        """Let the entry take the calls of the kind of ``key``, as ``call`` has taken one of them.

        ``text`` names them in the flight recorder.
        """
        by_records = isinstance(call, RecordCall)
        exact = bool(key.layout) or by_records
        full = by_records and sum(each["backend"] == records.BY_RECORDS for _, each in self._keys) >= MAX_RECORD_ROWS
        if full or (exact and self._is_first(key)):
            return  # many programs use one layout or length once
        name, item = COLLECTIVES[key.kind & 0xFF], self._items[key.kind >> records.TOKEN_BITS]
        blocks = 1 if name in ONE_BLOCK else max(1, self._facts[name]["recv_blocks"]) * (name not in UNCOUNTED)
        if isinstance(call, NativeCall):
            values = self._native_values(call, name, item)
        else:
            values = record_values(call, key) if by_records else shared_values(call, key)
        template, count = template_digest(values["fingerprint"])
        first, last = class_lengths(key.nbytes)
        if exact:
            least = most = item = key.nbytes  # the row takes this one length, whatever is counted
            blocks = count
        else:
            least, most = max(call.lengths[0], first), min(call.lengths[1], last)
        if count != key.nbytes // item * blocks or not least <= key.nbytes <= most:
            return
        if len(self._keys) >= MAX_ROWS:
            self.clear()
        values |= {"text": text, "least": least, "most": most, "item": item, "blocks": blocks, "template": template}
        values |= {"number": len(self._calls), **{name: getattr(key, name) for name in ROW_KEY}}
        if name in UNCOUNTED:
            root = next((rank for rank in range(len(self._blocks) // 4) if id(rank) == key.root), -1)
            values |= {
                "uneven": self._facts[name]["uneven"] & (records.SENT_UNEVEN | records.RECEIVED_UNEVEN),
                "root_rank": root,
            }
        if not isinstance(call, NativeCall):
            own = call.schedule.copy(key.send, key.recv) if by_records else call.copy()
            self._calls.append(own)
            values |= {"call": own.address, "kernel": own.kernel_address, "last": key.nbytes if key.layout else -1}
        if key.layout:
            self._places.append(self._blocks.copy())
            values["places"] = self._places[-1].ctypes.data
        del values["fingerprint"]
        self._keys.append((key, values))
        if 2 * len(self._keys) > len(self._rows):
            self._resize(2 * len(self._rows))
        else:
            self._write_row(key, values)

    def _is_first(self, key: Key) -> bool:
        """Whether this rank has made no call of this kind, layout and length before."""
        seen = key[: Key._fields.index("send")]
        if seen in self._seen:
            return False
        if len(self._seen) >= MAX_ROWS:
            self._seen.clear()
        self._seen.add(seen)
        return True

    def _native_values(self, call: NativeCall, name: str, item: int) -> dict[str, Any]:
        """The fields of the row for one of MPI's own collectives, whose elements have ``item`` bytes."""
        counts = dict(zip(COUNT_ARGUMENTS, self._counts, strict=True))
        words = [counts[each].ctypes.data if each in counts else each for each in call.arguments]
        at = {each: k for k, each in enumerate(words) if isinstance(each, str)}
        words = [0 if isinstance(each, str) else each for each in words]
        return {
            "fingerprint": call.word,
            "backend": records.BY_MPI,
            "compares": records.COMPARED_TOGETHER if call.synchronises else records.COMPARED_AT_ENTRY,
            "function": call.function,
            "unit": item,
            "splits": self._facts[name]["uneven"],
            "arguments": words + [0] * (records.MOST_ARGUMENTS + 1 - len(words)),
            **{
                f"{each}_argument": at.get(each, records.MOST_ARGUMENTS)
                for each in ("send", "recv", "count", "recv_count")
            },
        }

    def _write_row(self, key: Key, values: dict[str, int]) -> None:
        """Write a row to the first free place after its hash."""
        mask = len(self._rows) - 1
        at = hash_words(key.kind, key.op, key.root ^ key.layout, key.algorithm) & mask
        while self._rows["backend"][at]:
            at = (at + 1) & mask
        fill(self._rows[at : at + 1], **values)

    def run_native(self, code: int, native: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call on messages whose door has returned ``code``, and compare the ranks' calls.

        ``native`` is MPI's own collective, which is not called if records run here.
        """
        answer = code & ~records.NATIVE_IN_PLACE
        if answer == records.INTERRUPTED:
            self.check_interrupted()
        if answer in (records.FAILED, records.LEAVING):
            native, arguments = self._check_failure, ()
        elif self._read_row("backend") == records.BY_RECORDS:
            native, arguments = self._run_records, (answer, arguments)
        try:
            if self._table is None:
                return self._run_uncompared(native, *arguments)
            with self._entered:
                if answer not in (records.NATIVE, records.FAILED, records.LEAVING, records.UNFINISHED):
                    self._settle(answer)
                result = native(*arguments)
            return result
        except BaseException:
            self._end_event()
            raise

    def _run_uncompared(self, native: Callable[..., Any], *arguments: Any) -> Any:
        """Make a call on messages where the ranks' calls are not compared."""
        try:
            result = native(*arguments)
        except (MPI.Exception, HpccommError):
            self._clear_pending()
            raise
        self._clear_pending()
        self._leave()
        return result

    def _read_row(self, name: str) -> int:
        """A field of the row of the running call."""
        return load(int(self._record["row"]) + offset_of(records.ROW_RECORD, name))

    @property
    def _row_call(self) -> Any:
        """What the row of the running call runs."""
        return self._calls[self._read_row("number")]

    def _run_records(self, answer: int, buffers: tuple[Any, ...]) -> None:
        """Run the records of the row on the call's ``buffers``, or go on with them."""
        code, self._resumes = int(self._record["left"]) if answer == records.UNFINISHED else None, True
        try:
            self._row_call.resume(code, *buffers)
        finally:
            self._resumes = False
            self._let_go()
        self._copy_short()

    def _let_go(self) -> None:
        """Let go of the buffers of a call that compiled code has left to Python."""
        for name in ("held_send", "held_recv"):
            ctypes.pythonapi.Py_DecRef(ctypes.c_void_p(int(self._record[name])))
            self._record[name] = 0

    def _copy_short(self) -> None:
        """Copy the result of a call whose receive buffer ends before the padding of its last pair."""
        if self._record["short"]:
            ctypes.memmove(*(int(self._record[name]) for name in ("short", "recv", "short_bytes")))

    def _check_failure(self) -> None:
        """Raise if MPI has returned an error to the compiled entry."""
        if self._record["failure"]:
            raise MPI.Exception(int(self._record["failure"]))

    def run_objects(self, code: int, native: Callable[..., Any], *arguments: Any) -> Any:
        """Run one of MPI's collectives of objects as :meth:`run_native` does.

        Pickling and operations run code of the program, which may make other calls on this communicator.
        """
        return self.run_native(code, self._let_others_pass, native, *arguments)

    def _let_others_pass(self, native: Callable[..., Any], *arguments: Any) -> Any:
        """Run a call during which the doors take others."""
        event, pending, self._pending.value = self._event.value, self._pending.value, 0
        self._inside.value += 1
        try:
            return native(*arguments)
        except BaseException:
            self._pending.value = pending
            raise
        finally:
            self._inside.value -= 1
            self._event.value = event
            self._record["row"] = self._no_row.ctypes.data  # calls inside this one may have moved its own row

    def _leave_native(self) -> None:
        """Leave a call on messages."""
        self._pending.value = 0
        if self._leave() is not None:
            self._table.leave()

    def _clear_pending(self) -> None:
        """Forget a call that has failed."""
        self._pending.value = 0

    def record_bytes(self, nbytes: int) -> None:
        """Record the bytes of the call that compiled code has begun, which has not read its array."""
        recorder().record_bytes(int(self._record["event"]), nbytes)

    def _end_event(self) -> None:
        """Record the end of a call that compiled code has begun."""
        body.end_event(self._record.ctypes.data)  # type: ignore[no-untyped-call]

    def resume(self, code: int) -> None:
        """Continue a call in shared memory whose kernel has ended with ``code``, which its door has returned."""
        self._resumes = True
        try:
            self._row_call.resume(code)
        except HpccommError:
            self._pending.value = 0
            raise
        finally:
            self._resumes = False
            self._end_event()
        self._pending.value = 0
        self._copy_short()

    def check_interrupted(self) -> None:
        """Raise if a call is made inside another one, or if an exception, such as Ctrl-C, has ended the last one."""
        if self._resumes:
            raise ArgumentError(
                f"rank {self._rank}: this call is made while another one of its communicator runs, by a signal "
                "handler, __del__ or a thread: let it wait for the end of that one, or use another communicator"
            )
        if self._pending.value:
            self._end_event()
            error = TransportError(
                f"rank {self._rank}: an exception has ended the last call before it was complete, so this communicator "
                "is out of step: free it and make a new one"
            )
            if self._pending.value == records.UNFINISHED and self._record["held_send"]:
                self._row_call.abandon(error)
            if self._table:  # the others read the reason of the last error that this rank has written
                self._table.write_reason(error)
            for each in filter(None, (self._memory, self._table)):
                each.abandon()
            raise error

    def _settle(self, code: int) -> None:
        """Wait for the other ranks, where the entry has not, and compare their calls with this rank's."""
        amounts, self._resumes = self._read_amounts(), True
        try:
            if code >= records.BEFORE_NATIVE:
                self._meeting.resume(code - records.BEFORE_NATIVE)
            if code == records.LATE:
                self._table.compare_nodes(amounts)
                self._table.wait(amounts)
            self._table.compare_entries()
        finally:
            self._resumes = False

    def _read_amounts(self) -> Amounts | None:
        """What the running call sends to each rank and receives from each, if that may differ between ranks."""
        if not self._read_row("uneven"):
            return None
        entry, row, size = self._record.ctypes.data, int(self._record["row"]), int(self._record["size"])
        sends, receives = (
            tuple(body.amount(entry, row, side, rank) for rank in range(size))  # type: ignore[no-untyped-call]
            for side in (body.SENT, body.RECEIVED)
        )
        return Amounts(sends, receives)


ROW_KEY = Key._fields[:5]
"""The fields by which a row is found; the others differ between the calls of a kind."""


def class_lengths(nbytes: int) -> tuple[int, int]:
    """The first and last length with as many bits as this one."""
    first = 1 << nbytes.bit_length() >> 1
    return first, max(2 * first - 1, 0)


def hash_words(*key: int) -> int:
    """The hash with which the entry looks up up to four words."""
    words = (*key, 0, 0, 0)[:4]
    return int(body.hash_words(*words))  # type: ignore[no-untyped-call]


def record_values(call: RecordCall, key: Key) -> dict[str, int]:
    """The fields of the row for a call that records run."""
    at = {key.send: records.FROM_SENT, key.recv: records.FROM_RECEIVED}  # in place they are the same
    vector, source = (at.get(int(call.schedule.run[name]), 0) for name in ("vector", "source"))
    return {
        "fingerprint": call.word,
        "backend": records.BY_RECORDS,
        "compares": records.COMPARED_AFTERWARDS if call.synchronises else records.COMPARED_AT_ENTRY,
        "vector": vector,
        "source": source,
    }


def shared_values(call: Any, key: Key) -> dict[str, int]:
    """The fields of the row for a call in shared memory."""
    fingerprint, check = int(call.call["fingerprint"]), int(call.call["check"])
    salt = (
        check - fingerprint * records.CHECK_PRIME - key.nbytes * call.checked * records.COUNT_CHECK
    ) & records.CHECK_MASK
    general = {name: getattr(call, name) for name in ("checked", "table", "sized", "registers", "releases")}
    return {"fingerprint": fingerprint, "backend": records.IN_SHARED_MEMORY, "salt": salt, **general}


# What the entry knows of Python, NumPy and MPI


SCHEDULE_NAMES = sorted({name for each in SCHEDULES.values() for name in each})
ALGORITHMS = tuple(sys.intern(name) for name in (*SCHEDULE_NAMES, "auto", "native", "shared", "hierarchical"))
"""Names of algorithms; the entry finds a program's own strings of the same text by interning them."""


def list_objects() -> tuple[tuple[Any, int, int], ...]:
    """All objects that the entry recognises by their addresses, each with a number and the bytes of an element."""
    return (*list_types(), *((name, 0, 1) for name in ALGORITHMS))


@cache
def item_sizes() -> dict[int, int]:
    """Bytes of an element by the number of its dtype; 1 for calls without one."""
    return {token: item for _, token, item in list_types()} | {0: 1}


@cache
def list_types() -> tuple[tuple[Any, int, int], ...]:
    """Objects that calls name, with the number of their dtype, and the bytes of an element.

    They are never freed, so their addresses identify them.  Operations have the number 0.
    """
    found: dict[int, tuple[Any, str, int]] = {}
    for char in DTYPE_CHARS:
        dtype = np.dtype(char)
        found[id(dtype)] = (dtype, code_of(dtype), dtype.itemsize)
        if dtype.kind in MPI_KINDS and dtype != np.float16:
            found[id(char)] = (sys.intern(char), code_of(dtype), dtype.itemsize)
    for each in vars(MPI).values():
        element = element_of(each) if isinstance(each, MPI.Datatype) and each != MPI.DATATYPE_NULL else None
        if element:
            found[id(each)] = (each, element.code, element.extent)
    codes = sorted({code for _, code, _ in found.values()})
    types = tuple((each, 1 + codes.index(code), item) for each, code, item in found.values())
    known_ops = (
        *(each for each in vars(MPI).values() if isinstance(each, MPI.Op) and each != MPI.OP_NULL),
        SUM_OF_AVERAGE,
        SUM_OF_SCALED,
    )
    return (*types, *((each, 0, 1) for each in known_ops))


@cache
def type_table() -> npt.NDArray[Any]:
    """The hash table of the known objects by address, which all communicators read."""
    entries = list_objects()
    table = np.zeros(1 << (3 * len(entries)).bit_length(), records.TYPE_RECORD)
    for each, token, item in entries:
        used = each.Get_true_extent()[1] if isinstance(each, MPI.Datatype) else item
        at = hash_words(id(each)) & (len(table) - 1)
        while table["object"][at]:
            at = (at + 1) & (len(table) - 1)
        table[at] = (id(each), token, item, item - used)
    return table


@cache
def python_addresses() -> dict[str, int]:
    """Addresses of Python's own objects and functions."""
    functions = {
        "as_integer": ctypes.pythonapi.PyLong_AsLongLongAndOverflow,
        "hold": ctypes.pythonapi.Py_IncRef,
        "let_go": ctypes.pythonapi.Py_DecRef,
        "intern": ctypes.pythonapi.PyUnicode_InternInPlace,
        "save_thread": ctypes.pythonapi.PyEval_SaveThread,
        "restore_thread": ctypes.pythonapi.PyEval_RestoreThread,
    }
    return {
        **{name: ctypes.cast(each, ctypes.c_void_p).value or 0 for name, each in functions.items()},
        "array_type": id(np.ndarray),
        "list_type": id(list),
        "tuple_type": id(tuple),
        "int_type": id(int),
        "int64_type": id(np.int64),
        "int32_type": id(np.int32),
        "string_type": id(str),
        "none": id(None),
        "in_place": id(MPI.IN_PLACE),
        "answers": ANSWERS.ctypes.data,
        "counts_references": int(sys.version_info < (3, 12)),
        "item_size": item_size_offset(),
        "tuple_items": tuple_items_offset(),
    }


ANSWERS = np.array([id(number) for number in range(MAX_RANKS)])
"""The addresses of integers, which are answers of doors and ranks; Python has one object for each."""


def item_size_offset() -> int:
    """Where a dtype object has the bytes of its elements: NumPy 2 has moved it."""
    return 40 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32


def tuple_items_offset() -> int:
    """Where a tuple has its items: since Python 3.14 its hash stands before them."""
    return 32 if sys.version_info >= (3, 14) else 24


def why_no_entry(ranks: int) -> str:
    """Why a communicator has no compiled entry; empty if it has one."""
    return f"more than {MAX_RANKS} ranks" if ranks > MAX_RANKS else why_python_has_none()


@cache
def why_python_has_none() -> str:
    """Why this process has no compiled entry."""
    if os.environ.get("HPCCOMM_ENTRY") == "off":
        return "HPCCOMM_ENTRY=off"
    if sys.implementation.name != "cpython" or "t" in getattr(sys, "abiflags", ""):
        return "the entry reads objects of CPython with its global lock"
    if objects.why_none():
        return objects.why_none()
    try:
        objects.address("enter"), objects.address("leave")
    except (ImportError, OSError) as error:
        return f"its code is missing ({error})"
    return "" if reads_objects() else "objects of Python or NumPy are laid out in an unknown way"


def reads_objects() -> bool:
    """Whether arrays, dtypes, lists and tuples are laid out as the entry reads them."""
    array = np.zeros((3, 5), "f8")
    known = {
        records.OBJECT_TYPE: id(np.ndarray),
        records.ARRAY_DATA: array.ctypes.data,
        records.ARRAY_DTYPE: id(array.dtype),
    }
    shape = load(id(array) + records.ARRAY_SHAPE)
    pair, row = [array, 7], (array, 7, 9)
    void, scalars = np.dtype("V24"), (np.int64(-(1 << 40)), np.int32(77))
    return (
        ctypes.sizeof(ctypes.c_void_p) == 8
        and sys.byteorder == "little"
        and all(load(id(array) + offset) == value for offset, value in known.items())
        and load(id(array) + records.ARRAY_DIMENSIONS) & records.LOW_HALF == 2
        and [load(shape), load(shape + 8)] == [3, 5]
        and load(id(array) + records.ARRAY_FLAGS) & 0xFFFF == array.flags.num
        and load(id(scalars[0]) + records.SCALAR_VALUE) == -(1 << 40)
        and load(id(scalars[1]) + records.SCALAR_VALUE) & records.LOW_HALF == 77
        and load(id(void) + item_size_offset()) & records.LOW_HALF == 24
        and load(id(void) + records.DTYPE_KIND) & 0xFF == records.VOID_KIND
        and load(load(id(pair) + records.LIST_ITEMS)) == id(array)
        and [load(id(pair) + records.SEQUENCE_LENGTH), load(id(row) + records.SEQUENCE_LENGTH)] == [2, 3]
        and load(id(row) + tuple_items_offset()) == id(array)
    )
