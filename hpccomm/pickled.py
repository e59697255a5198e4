"""``allreduce``, ``allgather`` and ``bcast`` of ``pickle="auto"``: small objects in one call, arrays as memory.

*p ranks; a record is 8 bytes of header and room for 248 bytes.*  Every rank pickles its object with ``MPI.pickle``, as
mpi4py does, and one Allgather, or Bcast, moves the records.  An object that fits travels in its record.  Of others the
record tells the form, so all ranks decide alike what follows: a second call moves arrays as they lie in memory, other
objects as their pickles.  Types and shapes may differ between the ranks.

Results are those of mpi4py: an allreduce applies the operation to the objects themselves, in mpi4py's order, so
integers keep all digits and results their types.  Only sums and products of long arrays of floating point are rounded
in the order of ``Allreduce``.  ``reduce`` and ``gather`` stay mpi4py's: only their root receives the objects.
"""

from __future__ import annotations

import pickle
import struct
import zlib
from functools import partial, wraps
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.calls import operations
from hpccomm.calls.blocks import OBJECT_SIGNATURES, Signature
from hpccomm.calls.fingerprint import Fingerprint, format_ranks
from hpccomm.calls.plans import NativeCall
from hpccomm.errors import HpccommError, MismatchError
from hpccomm.kernels.entry.records import MISS
from hpccomm.observe.flight_recorder import recorder

HEADER, RECORD = 8, 256
"""Bytes of a record: length and code of the call, 32 bits each, and all of it."""
ROOM = RECORD - HEADER
READ_HEADER, WRITE_HEADER = struct.Struct("=ii").unpack_from, struct.Struct("=ii").pack_into
REST, FAILED = -1, -2
"""The length in the record of an object that follows in a second call, and of one that cannot be pickled."""
OURS_BYTES = 1 << 16
"""From this size on a second call is ours; a shorter one, on new memory, is faster as MPI's."""
GATHER_RANKS = 8
"""Up to so many ranks an allreduce gathers long pickles; above, mpi4py's tree moves fewer bytes."""

ELEMENTWISE = (MPI.SUM, MPI.PROD, MPI.BAND, MPI.BOR, MPI.BXOR)
"""Operations that mean the same for arrays in Python and in MPI."""
LOADS, DUMPS = MPI.pickle.loads, MPI.pickle.dumps
"""Of the object that a program may set up with functions of its own."""
PLAIN = "bhilqBHILQfdFD"
"""``dtype.char`` of the arrays that go as they lie in memory."""
Form = tuple[str, tuple[int, ...]]
"""``dtype.char`` and shape of an array; ``""`` and ``(bytes,)`` of a pickle."""


def install(comm: Any) -> None:
    """Give an intracommunicator with ``pickle="auto"`` these methods; others keep mpi4py's, at no cost."""
    if comm._pickle == "auto" and isinstance(comm, MPI.Intracomm):
        calls = ObjectCalls(comm)
        vars(comm).update(allreduce=calls.allreduce, allgather=calls.allgather, bcast=calls.bcast)


SET_UP_CALLS = 100
"""A program that makes so many calls of objects, and no other collective, gets shared memory and the compiled entry."""


def compare_objects(name: str) -> Any:
    """mpi4py's method for objects, before and after which the ranks of a node compare their calls."""
    native, form, door = getattr(MPI.Intracomm, name), OBJECT_SIGNATURES[name], f"{name}_object"
    defaults = {"op": MPI.SUM, "root": 0}
    places = [(each, place, defaults[each]) for place, each in enumerate(form.arguments, 1)]

    @wraps(native)
    def method(self: Any, *args: Any, **named: Any) -> Any:
        given = {each: args[k] if k < len(args) else named.get(each, other) for each, k, other in places}
        op, root = given.get("op"), given.get("root")
        if not callable(op) and "op" in given:  # a name, or what is no operation
            given["op"] = operations.read_op(given["op"], f"rank {self.rank}: {name}")
            return method(self, *args[:1], **(named | given))
        code = getattr(self._doors, door)(None, None, op, root, None, None)
        try:
            if code > MISS:
                if args and type(args[0]) is np.ndarray:
                    self.plans.entry.record_bytes(args[0].nbytes)
                return self.plans.entry.run_objects(code, run, self, root, args, named)
            with self.context.call(name, *args[:1]):
                return compare(self, code, op, root, args, named)
        except (MPI.Exception, HpccommError):
            raise
        except Exception:  # of an object, or of an operation
            self.context.doubt(name in ONE_WAY)
            raise

    def compare(self: Any, code: int, op: Any, root: Any, args: Any, named: Any) -> Any:
        context, planner, results = self.context, self._planner, list[Any]()
        context.check_open(name)
        table, kind = context.consistency, self._read_kind(code)
        if "root" in form.arguments:
            root = planner.reader.check_root(root, f"rank {self.rank}: {name}")
        if context.stage or (table and table.calls >= SET_UP_CALLS and context.has_all_tables):
            self._prepare(name)
        fingerprint, meets = describe_objects(name, form, op, root), form.synchronises or planner.in_lockstep
        waits = table is not None and form.synchronises and context.awaits_code
        if waits and table.all_had_code_in_objects():  # before this call, in which a rank may fail alone
            context.run_together(fingerprint, planner.use_code)
        try:
            planner.guard(fingerprint, lambda: results.append(run(self, root, args, named)), meets)()
        finally:
            if waits:
                table.met = table.calls
        if kind and self.plans.entry:
            made = NativeCall(fingerprint.word, (0, 0), meets)
            self.plans.entry.insert(kind, made, recorder().intern(name))
        return results[0]

    def run(self: Any, root: int | None, args: Any, named: Any) -> Any:
        table = self.context.consistency
        if table and form.recv_at_root and root == self.rank:  # who waits for all in MPI as well
            table.wait()
        return native(self, *args, **named)

    return method


ONE_WAY = ("exscan", "gather", "reduce", "scan")
"""In these a rank may have sent what another one, which an exception has ended, has not received."""


def describe_objects(name: str, form: Signature, op: Any, root: Any) -> Fingerprint:
    """The fingerprint of a lower-case collective."""
    reduction = operations.name_of(op) if isinstance(op, MPI.Op) else "a function"
    called = {"op": reduction, "root": str(root)}
    return Fingerprint(name, **{each: called[each] for each in form.arguments})


class ObjectCalls:
    """The calls of one communicator."""

    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.mine, self.everyone = np.zeros(RECORD, np.uint8), np.zeros(comm.size * RECORD, np.uint8)
        self._out, self._rows = self.mine.data, self.everyone.data
        self._read_headers = struct.Struct("=" + comm.size * f"ii{ROOM}x").unpack
        self._starts = range(HEADER, comm.size * RECORD, RECORD)
        self._codes: dict[str, int] = {}

    def allreduce(self, sendobj: Any, op: Any = MPI.SUM) -> Any:
        """mpi4py's ``allreduce``; ``op`` may also be a name."""
        if not callable(op):
            op = operations.read_op(op, f"rank {self.rank}: allreduce")
        if not (isinstance(op, MPI.Op) and op.handle in operations.PREDEFINED):
            return type(self.comm).allreduce(self.comm, sendobj, op)
        lengths, rest = self.gather_records(sendobj, operations.PREDEFINED[op.handle].name.upper())
        form = self.common_form(op) if lengths.count(REST) == self.size else None
        if form is not None:
            self.comm.Allreduce(sendobj, result := np.empty(form[1], form[0]), op)
            return result
        if REST in lengths and self.size > GATHER_RANKS:
            return MPI.Intracomm.allreduce(self.comm, sendobj, op)
        return fold(self.read_all(lengths, rest), op)

    def allgather(self, sendobj: Any) -> list[Any]:
        """mpi4py's ``allgather``; its long arrays are views of one new block of memory."""
        return self.read_all(*self.gather_records(sendobj, "allgather"))

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """mpi4py's ``bcast``; only the root's record travels."""
        rest, failure = self.write(obj, 0) if self.rank == root else (None, None)
        self.comm.Bcast(self.mine, root)
        if failure:
            raise failure
        record = bytes(self._out)  # to read an object may make calls
        length, _ = READ_HEADER(record)
        if length == FAILED:
            self.raise_failure("bcast", [root])
        if length != REST:
            return LOADS(record[HEADER : HEADER + length])
        char, shape = pickle.loads(record[HEADER:])
        block = np.empty(shape, char or "u1") if rest is None else rest
        (self.comm.Bcast if block.nbytes >= OURS_BYTES else partial(MPI.Intracomm.Bcast, self.comm))(block, root)
        if char:
            return block.copy() if self.rank == root else block
        return LOADS(block.data)

    def read_all(self, lengths: tuple[int, ...], rest: Any) -> list[Any]:
        """The objects of all ranks; ``rest`` is what this rank's record lacks."""
        rows = bytes(self._rows)  # to read an object may make calls
        if REST not in lengths:
            return [LOADS(rows[start : start + length]) for start, length in zip(self._starts, lengths, strict=True)]
        forms = [self.describe(k) if length == REST else ("", (0,)) for k, length in enumerate(lengths)]
        counts = [-(-count_bytes(form) // 64) * 64 for form in forms]  # every array is aligned
        own, block = np.zeros(counts[self.rank], np.uint8), np.empty(sum(counts), np.uint8)
        if rest is not None:
            own[: rest.nbytes] = rest.reshape(-1).view(np.uint8)
        native = partial(MPI.Intracomm.Allgatherv, self.comm)
        (self.comm.Allgatherv if block.nbytes >= OURS_BYTES else native)(own, [block, counts])
        places = pairwise(accumulate(counts, initial=0))
        return [
            LOADS(rows[start : start + length]) if length != REST else restore(block[lo:hi], form)
            for start, length, form, (lo, hi) in zip(self._starts, lengths, forms, places, strict=True)
        ]

    # Records

    def gather_records(self, obj: Any, call: str) -> tuple[tuple[int, ...], Any]:
        """Send this rank's record to all ranks; returns the lengths in all records, and what this rank's lacks."""
        code = self._codes.get(call)
        if code is None:
            code = self._codes[call] = zlib.crc32(call.encode()) & 0x7FFFFFFF
        rest, failure = self.write(obj, code)
        self.comm.Allgather(self.mine, self.everyone)
        if failure:
            raise failure
        headers = self._read_headers(self._rows)
        codes = headers[1::2]
        if codes.count(code) != self.size:
            self.raise_mismatch(call, codes, code)
        if FAILED in headers[::2]:
            self.raise_failure(call, [k for k, length in enumerate(headers[::2]) if length == FAILED])
        return headers[::2], rest

    def write(self, obj: Any, code: int) -> tuple[Any, Exception | None]:
        """Write an object, or its form, into this rank's record; what follows, if anything does, and why it failed.

        An object that cannot be pickled is told to the other ranks, which would wait for it.
        """
        rest = None
        if type(obj) is np.ndarray and is_long(obj):
            rest, octets = obj, pickle.dumps((obj.dtype.char, obj.shape))
        else:
            try:
                octets = DUMPS(obj)
            except Exception as failure:
                WRITE_HEADER(self._out, 0, FAILED, code)
                return None, failure
            if len(octets) > ROOM:
                rest = np.frombuffer(octets, np.uint8)
                octets = pickle.dumps(("", rest.shape))
        WRITE_HEADER(self._out, 0, len(octets) if rest is None else REST, code)
        self._out[HEADER : HEADER + len(octets)] = octets
        return rest, None

    def describe(self, k: int) -> Form:
        """The form of rank k's array."""
        start = k * RECORD + HEADER
        form: Form = pickle.loads(self._rows[start : start + ROOM])
        return form

    def common_form(self, op: MPI.Op) -> Form | None:
        """The form of the arrays, if all ranks' are alike and MPI reduces them as Python does."""
        first, *others = (self.describe(k) for k in range(self.size))
        if not first[0] or op not in ELEMENTWISE or any(each != first for each in others):
            return None
        return first if np.dtype(first[0]).kind in operations.PREDEFINED[op.handle].kinds else None

    def raise_failure(self, call: str, ranks: list[int]) -> None:
        """Raise because ranks could not pickle their objects."""
        who = f"rank {self.rank}: {call}: {format_ranks(ranks)}"
        raise MismatchError(f"{who} passed an object that cannot be pickled: pass one that can")

    def raise_mismatch(self, call: str, codes: tuple[int, ...], code: int) -> None:
        """Raise the error of ranks that call something else."""
        others = ", ".join(str(rank) for rank, each in enumerate(codes) if each != code)
        raise MismatchError(
            f"rank {self.rank} called {call}, ranks {others} another lower-case collective or operation: make all "
            "ranks call the same"
        )


def is_long(x: Any) -> bool:
    """Whether an array is longer than half a record and can go as it lies in memory."""
    return bool(
        x.nbytes > ROOM // 2 and 0 < x.ndim <= 8 and x.dtype.char in PLAIN and x.dtype.isnative and x.flags.c_contiguous
    )


def count_bytes(form: Form) -> int:
    """Bytes of an array or a pickle."""
    return int(np.prod(form[1], dtype=np.int64)) * np.dtype(form[0] or "u1").itemsize


def restore(octets: Any, form: Form) -> Any:
    """The array or the object in a block of bytes."""
    octets = octets[: count_bytes(form)]
    return octets.view(form[0]).reshape(form[1]) if form[0] else LOADS(octets.data)


def fold(objects: list[Any], op: MPI.Op) -> Any:
    """Reduce in the order of mpi4py: a binomial tree, lower ranks on the left."""
    distance = 1
    while distance < len(objects):
        for k in range(0, len(objects) - distance, 2 * distance):
            objects[k] = op(objects[k], objects[k + distance])
        distance *= 2
    return objects[0]
