"""Collectives as functions of arrays of any library: the result has the type of the input, which is never written.

*p ranks; x has the same dtype on every rank.*  Every function copies its input at most once; results are new arrays in
C order.  16-bit floats are added in float32 (:mod:`hpccomm.arrays`).
"""

from __future__ import annotations

import math
import weakref
import zlib
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from hpccomm.arrays import (
    Array,
    DeviceArray,
    borrow,
    convert_like,
    is_on_device,
    narrow,
    reduction_dtype,
    view_for_mpi,
    widen,
)
from hpccomm.calls.operations import Reduction, resolve
from hpccomm.communicator import Communicator
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.observe.flight_recorder import count_bytes
from hpccomm.progress import Call, submit


def allreduce(
    x: Any,
    op: MPI.Op | str = "sum",
    comm: MPI.Intracomm | None = None,
    algorithm: str = "auto",
    reproducible: bool = False,
    stream: Any = None,
    wait: bool = True,
) -> Any:
    """Reduce ``x`` over all ranks by sum; every rank gets the result.

    ``op`` is ``"sum"``, ``"mean"`` or ``"avg"``, ``"min"``, ``"max"``, ``"prod"``, ``"land"`` … or an ``MPI.Op``.
    ``x`` is any array, tensor or scalar, of the same shape and dtype on all ranks; the result has the type, shape and
    dtype of ``x``.  ``comm=None`` means all ranks.  The mean of integers and the sum of bools are refused: cast them
    first.  The min and max of bools are *all* and *any*.  Integers wrap around.  A NaN makes any result NaN; with
    ``algorithm="native"`` min and max may lose it, as in MPI.  ``reproducible`` and ``stream`` are those of
    :meth:`Communicator.Allreduce <hpccomm.Communicator.Allreduce>`; the result of an array on a CUDA device lies on
    that device.

    ``wait=False`` returns a future at once, here as in the other functions: ``future.wait()`` sleeps until the call is
    complete and gives the array, or raises the call's error; ``future.done()`` tells whether it is complete.  ``x``
    must not be changed before.  A call on an array on a device is complete when the function returns.
    """
    ranks = communicator(comm)
    if not wait:
        rest: dict[str, Any] = {"algorithm": algorithm, "reproducible": reproducible, "stream": stream}
        return start(partial(allreduce, x, op, **rest), ranks)
    who = f"rank {ranks.rank}: allreduce"
    if is_on_device(x):
        return reduce_on_device(allreduce, x, op, ranks, algorithm, reproducible, stream)
    array, give_back = borrow(x, who)
    meaning = operation(op, array, who)
    send = prepare_reduction(array, meaning)
    total = np.empty_like(send)
    ranks.Allreduce(send, total, op=meaning.op, algorithm=algorithm_argument(algorithm), reproducible=reproducible)
    return give_back(finish(total, meaning, ranks.size, array))


def reduce_scatter(
    x: Any,
    op: MPI.Op | str = "sum",
    comm: MPI.Intracomm | None = None,
    algorithm: str = "auto",
    reproducible: bool = False,
    stream: Any = None,
    wait: bool = True,
) -> Any:
    """This rank's rows of the result of :func:`allreduce`, for half the traffic.

    Rows (indices of axis 0) are distributed as by ``np.array_split(x, p)``: if p does not divide their number, the
    first ranks get one more.  ``x`` is as in :func:`allreduce`, with one dimension or more.
    """
    ranks = communicator(comm)
    if not wait:
        rest: dict[str, Any] = {"algorithm": algorithm, "reproducible": reproducible, "stream": stream}
        return start(partial(reduce_scatter, x, op, **rest), ranks)
    who = f"rank {ranks.rank}: reduce_scatter"
    if is_on_device(x):
        return reduce_on_device(reduce_scatter, x, op, ranks, algorithm, reproducible, stream)
    array, give_back = borrow(x, who)
    if array.ndim == 0:
        raise ArgumentError(f"{who}: a scalar cannot be divided over the ranks: use allreduce")
    meaning = operation(op, array, who)
    send = prepare_reduction(array, meaning)
    rows = rows_per_rank(len(send), ranks.size)
    mine = np.empty((rows[ranks.rank], *send.shape[1:]), send.dtype)
    row = int(np.prod(send.shape[1:], dtype=np.int64))
    counts = [each * row for each in rows]
    ranks.Reduce_scatter(
        send, mine, counts, op=meaning.op, algorithm=algorithm_argument(algorithm), reproducible=reproducible
    )
    return give_back(finish(mine, meaning, ranks.size, array))


def allgather(
    x: Any, comm: MPI.Intracomm | None = None, algorithm: str = "auto", stream: Any = None, wait: bool = True
) -> Any:
    """Concatenate the arrays of all ranks along axis 0 in rank order; every rank gets the result.

    The ranks' arrays may differ in their number of rows, which may be 0; all other dimensions and the dtype must agree.
    A scalar is one row: the result has shape ``(p,)``.
    """
    ranks = communicator(comm)
    if not wait:
        return start(partial(allgather, x, algorithm=algorithm, stream=stream), ranks)
    if is_on_device(x):
        return allgather_on_device(x, ranks, algorithm, stream)
    array, give_back = borrow(x, f"rank {ranks.rank}: allgather")
    send = np.asarray(array, order="C").reshape(array.shape or (1,))
    rows = exchange_row_counts(send.shape, send.dtype, ranks)
    gathered = np.empty((sum(rows), *send.shape[1:]), send.dtype)
    row = int(np.prod(send.shape[1:], dtype=np.int64))
    ranks.Allgatherv(
        view_for_mpi(send),
        [view_for_mpi(gathered), [each * row for each in rows]],
        algorithm=algorithm_argument(algorithm),
    )
    return give_back(gathered)


def broadcast(
    x: Any,
    root: int = 0,
    comm: MPI.Intracomm | None = None,
    algorithm: str = "auto",
    stream: Any = None,
    wait: bool = True,
) -> Any:
    """A copy of ``root``'s array on all ranks, of the type that each rank passes.

    Other ranks pass an array of the same shape and dtype, whose values are ignored, or ``None`` for a NumPy array.
    """
    ranks = communicator(comm)
    if not wait:
        return start(partial(broadcast, x, root, algorithm=algorithm, stream=stream), ranks)
    who = f"rank {ranks.rank}: broadcast"
    root = ranks._planner.reader.check_root(root, who)
    if x is None and ranks.rank == root:
        raise ArgumentError(f"{who}: the root passed None: pass the array to broadcast")
    if is_on_device(x):  # no consistency check: the ranks' types may differ
        return ranks._device_planner.call_on_host("", x, lambda host: broadcast(host, root, ranks, algorithm), stream)
    array, give_back = (None, lambda result: result) if x is None else borrow(x, who)
    mine = (array.shape, array.dtype) if array is not None and ranks.rank == root else None
    shape, dtype = ranks.private_comm.bcast(mine, root)
    copy = np.empty(shape, dtype)
    if array is not None and ranks.rank == root:
        copy[...] = array
    ranks.Bcast(view_for_mpi(copy), root, algorithm=algorithm_argument(algorithm))
    # raised after the Bcast, for which the other ranks wait
    if array is not None and (array.shape, array.dtype) != (shape, dtype):
        raise MismatchError(
            f"{who}: passed an array of {array.dtype}{list(array.shape)}, the root, rank {root}, one of "
            f"{dtype}{list(shape)}: pass the same shape and dtype, or None"
        )
    return give_back(copy)


# Arrays on a device

DEVICE_MEANS = "fd"
"""``dtype.char`` of the dtypes whose means are divided on the device; other means are computed on the host."""


def reduce_on_device(
    function: Any, x: Any, op: MPI.Op | str, ranks: Communicator, algorithm: str, reproducible: bool, stream: Any
) -> Any:
    """:func:`allreduce` or :func:`reduce_scatter` of an array on a device, into a new one on the same device."""
    name = function.__name__
    x, known = to_c_order(x, name, ranks, stream)
    who = f"rank {ranks.rank}: {name}"
    if not known.shape and function is reduce_scatter:
        raise ArgumentError(f"{who}: a scalar cannot be divided over the ranks: use allreduce")
    meaning = operation(op, known, who)
    if meaning.divides and known.dtype.char not in DEVICE_MEANS:
        body = partial(function, op=op, comm=ranks, algorithm=algorithm, reproducible=reproducible)
        return ranks._device_planner.call_on_host(name.capitalize(), x, body, stream)
    rest = meaning.op, algorithm_argument(algorithm), reproducible, stream
    if function is allreduce:
        result = ranks._device_planner.empty_like(x, known.shape, known.dtype)
        ranks.Allreduce(x, result, *rest)
    else:
        rows, row = rows_per_rank(known.shape[0], ranks.size), math.prod(known.shape[1:])
        result = ranks._device_planner.empty_like(x, (rows[ranks.rank], *known.shape[1:]), known.dtype)
        ranks.Reduce_scatter(x, result, [each * row for each in rows], *rest)
    if meaning.divides:
        ranks._device_planner.divide(result)
    return convert_like(result, x)


def allgather_on_device(x: Any, ranks: Communicator, algorithm: str, stream: Any) -> Any:
    """:func:`allgather` of an array on a device."""
    x, known = to_c_order(x, "allgather", ranks, stream)
    shape = known.shape or (1,)
    rows, row = exchange_row_counts(shape, known.dtype, ranks), math.prod(shape[1:])
    gathered = ranks._device_planner.empty_like(x, (sum(rows), *shape[1:]), known.dtype)
    ranks.Allgatherv(x, [gathered, [each * row for each in rows]], algorithm_argument(algorithm), stream)
    return convert_like(gathered, x)


def to_c_order(x: Any, name: str, ranks: Communicator, stream: Any) -> tuple[Any, DeviceArray]:
    """The array in C order, and its description; an array in Fortran order is converted on the host."""
    known = ranks._device_planner.array(x, name, stream).owner
    if known.order == "C":
        return x, known
    copy = ranks._device_planner.call_on_host("", x, np.ascontiguousarray, stream)
    return copy, ranks._device_planner.array(copy, name, stream).owner


# Common to all functions


def start(function: partial[Any], ranks: Communicator) -> Call:
    """Run a function on ``comm=`` the channel of these ranks in a progress thread; on a device's arrays at once."""
    name, x = function.func.__name__, function.args[0]
    nbytes = count_bytes((x,))
    call: Call = submit(ranks, lambda channel: function(comm=channel), name, here=is_on_device(x), nbytes=nbytes)
    return call


def communicator(comm: MPI.Intracomm | None = None) -> Communicator:
    """``comm`` as a :class:`Communicator`, made once per communicator; all ranks for ``None``."""
    comm = MPI.COMM_WORLD if comm is None else comm
    if isinstance(comm, Communicator):
        return comm
    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ArgumentError(f"comm is {comm!r}: pass an MPI.Intracomm, an hpccomm.Communicator, or None for all ranks")
    if id(comm) not in _communicators:
        _communicators[id(comm)] = Communicator.__new__(Communicator, comm)
        weakref.finalize(comm, _communicators.pop, id(comm), None)
    return _communicators[id(comm)]


_communicators: dict[int, Communicator] = {}
"""By the identity of the user's communicator, which is not hashable; an entry is deleted with it."""


def operation(op: MPI.Op | str, array: Array | DeviceArray, who: str) -> Reduction:
    """The meaning of ``op`` on this dtype; 16-bit floats are added in float32."""
    return resolve(op, who, reduction_dtype(array.dtype))


def prepare_reduction(array: Array, meaning: Reduction) -> Array:
    """``x`` in C order; for a mean in the wide dtype, because the division comes before the rounding."""
    return widen(array) if meaning.divides else np.asarray(array, order="C")


def algorithm_argument(algorithm: str) -> str | None:
    """``"auto"`` leaves the choice to the communicator."""
    return None if algorithm == "auto" else algorithm


def finish(total: Array, meaning: Reduction, size: int, given: Array) -> Array:
    """Divide a mean, and round to the caller's dtype."""
    if meaning.divides:
        np.true_divide(total, size, out=total)
    return narrow(total, given.dtype)


def rows_per_rank(rows: int, ranks: int) -> list[int]:
    """Number of rows of each rank's block."""
    return [len(block) for block in np.array_split(np.empty(rows, "u1"), ranks)]


def exchange_row_counts(shape: tuple[int, ...], dtype: np.dtype[Any], ranks: Communicator) -> list[int]:
    """The number of rows of every rank's array; raises if the arrays cannot be concatenated."""
    form = (shape[1:], dtype.name)
    mine = np.array([shape[0], zlib.crc32(repr(form).encode())], np.int64)
    everyone = np.empty((ranks.size, 2), np.int64)
    ranks.Allgather(mine, everyone)
    odd = np.flatnonzero(everyone[:, 1] != everyone[0, 1])
    if odd.size:
        forms = ranks.private_comm.allgather(form)
        (its_shape, its_dtype), (other_shape, other_dtype) = forms[0], forms[odd[0]]
        raise MismatchError(
            f"rank {ranks.rank}: allgather: rank {odd[0]} passed rows of {other_dtype}{list(other_shape)}, rank 0 rows "
            f"of {its_dtype}{list(its_shape)}: make all dimensions but the first, and the dtype, agree"
        )
    return [int(rows) for rows in everyone[:, 0]]
