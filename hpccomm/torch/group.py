"""A process group of torch whose collectives are those of a :class:`~hpccomm.Communicator`.

Torch calls one method a collective, with lists of tensors.  Each method describes the call, which runs at once, or, if
it is asynchronous, on the group's thread (:mod:`hpccomm.torch.works`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpccomm.calls.watchdog import limit_calls
from hpccomm.communicator import Communicator
from hpccomm.errors import ArgumentError
from hpccomm.progress import complete_at_end
from hpccomm.torch import members
from hpccomm.torch.collectives import Collectives
from hpccomm.torch.messages import Message, receive, send
from hpccomm.torch.options import Options
from hpccomm.torch.tensors import Tensor
from hpccomm.torch.works import DONE, NO_LIMIT, CallQueue, Together, Work, complete_all

SETTLE_SECONDS = 5.0
"""How long the end of a group waits for its calls under way."""
DEFAULT_TIMEOUT = timedelta(minutes=30)
"""Torch's default.  Synchronous calls of a group with a shorter limit, and calls with a limit of their own, run on the
group's thread as well, so that they can raise.  The others run in their caller's thread; the watchdog aborts all ranks
after the group's limit."""


TensorOrTensors: TypeAlias = Any
"""A list of tensors, or in torch's shorter form of a call one tensor."""


def is_one(tensors: TensorOrTensors) -> bool:
    """Whether a call is in the form for one tensor, as ``group.reduce(x, root, op)``."""
    return isinstance(tensors, torch.Tensor)


def as_list(tensors: TensorOrTensors) -> list[Tensor]:
    """One tensor as a list, others as a list that the caller cannot change."""
    return [tensors] if is_one(tensors) else list(tensors)


def find_gather(outputs: list[Any], inputs: TensorOrTensors) -> tuple[list[Tensor], Tensor]:
    """Where a gather writes, nowhere if there are no outputs, and what this rank sends."""
    into = outputs if is_one(inputs) or not outputs else outputs[0]
    return list(into), as_list(inputs)[0]


def read_options(make: type, given: Any, *more: Any) -> Any:
    """Torch's options of a call: as given, or made of a root and an operation."""
    if hasattr(given, "asyncOp"):
        return given
    options: Any = make()
    for each in (given, *more):
        if isinstance(each, int):
            options.rootRank = each
        elif each is not None:
            options.reduceOp = each
    return options


def find_excess(limit: timedelta, seconds: float) -> float | None:
    """The limit in seconds if a call that has taken so long is beyond it, 0 for none."""
    most = limit.total_seconds()
    return most if 0 < most < seconds else None


def make_group(given: Any, options: Any = None) -> Group:
    """The process group for torch's ``DistributedBackendOptions`` (collective over its ranks)."""
    if options is not None and not isinstance(options, Options):
        raise ArgumentError(f"pg_options is {options!r}: pass hpccomm.torch.Options")
    comm, store, inherited = members.create(given)
    complete_at_end(complete_all)
    return Group(given, comm, store, options or inherited or Options())


class Group(dist.ProcessGroup):
    """A process group; torch makes it, see :func:`make_group`."""

    def __init__(self, given: Any, comm: Any, store: Any, options: Options) -> None:
        super().__init__(given.group_rank, given.group_size)
        self.comm, self.options = comm, options
        self.store, self.timeout = store, given.timeout
        self.barriers = 0
        """How often :func:`~hpccomm.torch.monitored_barrier` was called."""
        self._collectives, self._calls = Collectives(comm, options), CallQueue()
        self._comms = [comm]
        """The communicators to free at the end: the group's own, and that of :meth:`methods_comm`."""
        self._coalesced: list[Any] | None = None
        """The calls since coalescing began, None where it is not under way."""
        self._label, self._name = f"rank {comm.rank}", ""
        members.remember(self, given.global_ranks_in_group)
        limit_calls(comm.context.recorded.number, self._check_time)

    # What torch asks about a group

    def getBackendName(self) -> str:
        """The name of the backend."""
        return "hpccomm"

    name = getBackendName

    def _set_group_name(self, name: str) -> None:
        self._name = name

    def getGroupName(self) -> str:
        """The name by which torch finds the group."""
        return self._name

    group_name = property(getGroupName)

    def get_group_store(self) -> Any:
        """Torch's store for this group."""
        return self.store

    @property
    def _device_types(self) -> list[Any]:
        return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]

    def _get_backend(self, device: Any) -> Group:
        return self

    supports_coalescing = supports_splitting = supports_time_estimate = supports_shrinking = False

    def supports_tensor_alloc(self, device: Any) -> bool:
        """Whether torch may ask for registered memory: not at every step, as making it is collective."""
        return False

    def set_timeout(self, timeout: timedelta) -> None:
        """The time after which calls that name none end."""
        self.timeout = timeout

    def _set_sequence_number_for_group(self) -> None: ...

    def _get_sequence_number_for_group(self) -> int:
        return 0

    def _start_coalescing(self, device: Any) -> None:
        self._coalesced = []

    def _end_coalescing(self, device: Any) -> Together:
        """The handle of all asynchronous calls since coalescing began; its ``wait`` raises their first error."""
        works, self._coalesced = self._coalesced or [], None
        return Together(works)

    def methods_comm(self) -> Communicator:
        """A communicator of the group's ranks for hpccomm's methods; the first call is collective.

        The group's thread may be in a call on the group's own communicator meanwhile.
        """
        if len(self._comms) < 2:
            options = dist.BarrierOptions()
            options.asyncOp = False
            self._run("communicator", options, lambda on: self._duplicate(), [])
        return self._comms[-1]

    def _duplicate(self) -> None:
        made = self.comm.Dup()
        limit_calls(made.context.recorded.number, lambda seconds: find_excess(self.timeout, seconds))
        self._comms.append(made)

    def _check_time(self, seconds: float) -> float | None:
        """The limit, if a call that cannot raise has taken longer; the oldest call has taken ``seconds``."""
        raises = self._calls.expire()
        return None if raises else find_excess(self._calls.limit_here or self.timeout, seconds)

    def shutdown(self) -> None:
        """End the threads; the communicators are freed once all calls have ended and all ranks have come here."""
        comms = self._close()
        if self._calls.settle(time.monotonic() + SETTLE_SECONDS):
            for each in comms:
                members.release(each)

    def abort(self) -> None:
        """As torch asks on errors: calls under way cannot be ended, the communicators stay as they are."""
        self._close()

    def _close(self) -> list[Communicator]:
        """Take no more calls; returns the communicators of the group."""
        comms, self._comms = self._comms, []
        for each in comms:
            limit_calls(each._own_context.recorded.number, None)
        self._calls.close()
        return comms

    # Running calls

    def _run(
        self,
        name: str,
        options: Any,
        body: Callable[[Collectives], None],
        results: list[Any],
        timeout: timedelta | None = None,
    ) -> Any:
        """Run ``body``, which is the call ``name``: at once if torch waits for it anyway.

        In torch's shorter forms of a call ``options`` are a time limit, or ``timeout`` is one.
        """
        asynchronous = getattr(options, "asyncOp", True)
        given = options if isinstance(options, timedelta) else timeout or getattr(options, "timeout", None)
        own = given or NO_LIMIT
        limit = own if own > NO_LIMIT else self.timeout
        raises = own > NO_LIMIT or NO_LIMIT < limit < DEFAULT_TIMEOUT
        if not (asynchronous or raises) and self._calls.enter():
            try:
                body(self._collectives)
            finally:
                self._calls.leave()
            return DONE
        work = Work(f"{self._label}: {name}", partial(body, self._collectives), results, self._describe_missing, limit)
        self._note(work)
        if asynchronous or raises:
            self._calls.submit(work)
        else:
            self._calls.put(work)
        if not asynchronous:
            work.wait()
        return work

    def _note(self, work: Any) -> Any:
        """The handle of a call, which that of coalesced calls waits for."""
        if self._coalesced is not None:
            self._coalesced.append(work)
        return work

    def _describe_missing(self) -> str:
        names = ", ".join(map(str, members.find_missing(self.comm))) or "unknown"
        return f"missing ranks: {names}; make all ranks of the group call it"

    def _who(self, name: str) -> str:
        return f"{self._label}: {name}"

    # Reductions

    def allreduce(self, tensors: TensorOrTensors, opts: Any = None, timeout: Any = None, *, op: Any = None) -> Work:
        """Reduce each tensor over the ranks, in place."""
        opts, tensors = read_options(dist.AllreduceOptions, opts, op), as_list(tensors)
        op = opts.reduceOp
        return self._run("all_reduce", opts, lambda on: on.allreduce(tensors, op), tensors, timeout)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """As :meth:`allreduce`."""
        return self.allreduce(tensors, opts)

    def reduce(
        self, tensors: TensorOrTensors, opts: Any = None, op: Any = None, timeout: Any = None, *, root: Any = None
    ) -> Work:
        """Reduce a tensor to the root, in place."""
        opts, tensors = read_options(dist.ReduceOptions, opts, op, root), as_list(tensors)
        op, root = opts.reduceOp, opts.rootRank
        return self._run("reduce", opts, lambda on: on.reduce(tensors[0], op, root), tensors, timeout)

    def reduce_scatter(
        self, outputs: TensorOrTensors, inputs: list[Any], opts: Any = None, timeout: Any = None, *, op: Any = None
    ) -> Work:
        """Reduce one tensor a rank; each rank gets its own."""
        opts, given = read_options(dist.ReduceScatterOptions, opts, op), list(inputs if is_one(outputs) else inputs[0])
        outputs, op = as_list(outputs), opts.reduceOp
        return self._run("reduce_scatter", opts, lambda on: on.reduce_scatter(outputs[0], given, op), outputs, timeout)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> Work:
        """Reduce tensors over the ranks; each rank gets an equal part of each."""
        opts = read_options(dist.ReduceScatterOptions, opts)
        op, pairs = opts.reduceOp, list(zip(outputs, tensors, strict=True))

        def body(on: Collectives) -> None:
            for output, tensor in pairs:
                on.reduce_scatter_tensor(output, tensor, op)

        return self._run("reduce_scatter_tensor", opts, body, outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Work:
        """Reduce a tensor over the ranks; each rank gets an equal part."""
        return self.reduce_scatter_single_coalesced([output], [tensor], opts)

    _reduce_scatter_base = reduce_scatter_single

    # Moves

    def broadcast(self, tensors: TensorOrTensors, opts: Any = None, timeout: Any = None, *, root: Any = None) -> Work:
        """Copy the root's tensor to all ranks."""
        opts, tensors = read_options(dist.BroadcastOptions, opts, root), as_list(tensors)
        root = opts.rootRank
        return self._run("broadcast", opts, lambda on: on.broadcast(tensors, root), tensors, timeout)

    def allgather(self, outputs: list[Any], inputs: TensorOrTensors, opts: Any = None, timeout: Any = None) -> Work:
        """Gather a tensor of each rank; they may be of different lengths."""
        into, tensor = find_gather(outputs, inputs)
        return self._run("all_gather", opts, lambda on: on.allgather(into, tensor), [into], timeout)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """Gather several tensors of each rank: ``outputs[k]`` are those of rank k."""
        pairs = [([each[k] for each in outputs], tensor) for k, tensor in enumerate(inputs)]

        def body(on: Collectives) -> None:
            for into, tensor in pairs:
                on.allgather(into, tensor)

        return self._run("all_gather_coalesced", opts, body, outputs)

    def all_gather_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> Work:
        """Gather tensors of each rank, each into one tensor."""
        pairs = list(zip(outputs, tensors, strict=True))

        def body(on: Collectives) -> None:
            for output, tensor in pairs:
                on.allgather_tensor(output, tensor)

        return self._run("all_gather_into_tensor", opts, body, outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Work:
        """Gather a tensor of each rank into one tensor."""
        return self.all_gather_single_coalesced([output], [tensor], opts)

    _allgather_base = all_gather_single

    def gather(
        self, outputs: list[Any], inputs: TensorOrTensors, opts: Any = None, timeout: Any = None, *, root: Any = None
    ) -> Work:
        """Gather a tensor of each rank on the root."""
        opts = read_options(dist.GatherOptions, opts, root)
        root, (into, tensor) = opts.rootRank, find_gather(outputs, inputs)
        return self._run("gather", opts, lambda on: on.gather(into, tensor, root), [into] if outputs else [], timeout)

    def scatter(
        self, outputs: TensorOrTensors, inputs: list[Any], opts: Any = None, timeout: Any = None, *, root: Any = None
    ) -> Work:
        """Send one of the root's tensors to each rank."""
        opts = read_options(dist.ScatterOptions, opts, root)
        given, root = list(inputs if is_one(outputs) or not inputs else inputs[0]), opts.rootRank
        outputs = as_list(outputs)
        return self._run("scatter", opts, lambda on: on.scatter(outputs[0], given, root), outputs, timeout)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None, timeout: Any = None) -> Work:
        """Send a tensor to each rank, and receive one from each."""
        outputs, inputs = list(outputs), list(inputs)
        return self._run("all_to_all", opts, lambda on: on.alltoall(outputs, inputs), outputs, timeout)

    def all_to_all_single(
        self,
        output: Tensor,
        tensor: Tensor,
        receives: Sequence[int],
        sends: Sequence[int],
        opts: Any = None,
        timeout: Any = None,
    ) -> Work:
        """Send rows of a tensor to each rank, equally many or as ``sends`` says."""
        rows = list(receives), list(sends)
        return self._run(
            "all_to_all_single", opts, lambda on: on.alltoall_tensor(output, tensor, *rows), [output], timeout
        )

    alltoall_base = all_to_all_single

    def barrier(self, opts: Any = None, timeout: Any = None) -> Work:
        """Wait for all ranks."""
        return self._run("barrier", opts, Collectives.barrier, [], timeout)

    # Messages

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Message:
        """Send a tensor to a rank."""
        return self._note(send(self.comm, tensors[0], rank, tag, self._who("send"), self.timeout))  # type: ignore[no-any-return]

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Message:
        """Receive a tensor from a rank."""
        return self._note(receive(self.comm, tensors[0], rank, tag, self._who("recv"), self.timeout))  # type: ignore[no-any-return]

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Message:
        """Receive a tensor from any rank."""
        return self._note(receive(self.comm, tensors[0], MPI.ANY_SOURCE, tag, self._who("recv"), self.timeout))  # type: ignore[no-any-return]
