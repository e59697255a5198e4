"""A process group of torch whose collectives are those of a :class:`~hpccomm.Communicator`.

*p ranks, r this one.*  Torch calls one method a collective, with lists of tensors; each method describes the call and
hands it to the group's queue.  A tensor that is dense and on the CPU is used where it lies; others, also those on a
CUDA device, are copied to the host and back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from hpccomm.errors import ArgumentError
from hpccomm.torch import members, reductions, sparse
from hpccomm.torch.messages import receive, send
from hpccomm.torch.options import Options
from hpccomm.torch.tensors import Tensor, as_array, fill, fill_row, join, read, update
from hpccomm.torch.works import CallQueue, Work

IN_PLACE = MPI.IN_PLACE
SHORT_TIMEOUT = timedelta(minutes=30)
"""Torch's default.  With a shorter one, synchronous calls run on the group's thread as well, so that they can end."""

ALGORITHMS = ("allreduce", "reduce", "reduce_scatter", "reduce_scatter_block", "allgather", "allgatherv", "bcast")
"""Collectives that take the algorithm of the options, where they have it."""


def make_group(given: Any, options: Any = None) -> Group:
    """The process group for torch's ``DistributedBackendOptions`` (collective over its ranks)."""
    if options is not None and not isinstance(options, Options):
        raise ArgumentError(f"pg_options is {options!r}: pass hpccomm.torch.Options")
    comm, inherited = members.create(given)
    return Group(given, comm, options or inherited or Options())


class Group(dist.ProcessGroup):
    """A process group; torch makes it, see :func:`make_group`."""

    def __init__(self, given: Any, comm: Any, options: Options) -> None:
        super().__init__(given.group_rank, given.group_size)
        self.comm, self.options = comm, options
        self._store, self._timeout = given.store, given.timeout
        self._calls = CallQueue()
        self._label = f"rank {comm.rank}"
        self._in_thread = members.allows_threads()
        self._algorithms = choose_algorithms(comm, options)
        self._barriers, self._name = 0, ""
        members.remember(self, given.global_ranks_in_group)
        self._close = weakref.finalize(self, CallQueue.close, self._calls)

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
        return self._store

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
        """The time after which ``wait`` raises."""
        self._timeout = timeout

    def _set_sequence_number_for_group(self) -> None: ...

    def _get_sequence_number_for_group(self) -> int:
        return 0

    def _start_coalescing(self, device: Any) -> None: ...

    def _end_coalescing(self, device: Any) -> Work:
        return self._run("coalesced calls", None, lambda: None, [])

    def shutdown(self) -> None:
        """End the thread, and free the communicator once all ranks have come here."""
        self._calls.close()
        members.release(self.comm)

    def abort(self) -> None:
        """As torch asks on errors: the communicator stays as it is."""
        self._calls.close()

    # Running calls

    def _run(self, name: str, options: Any, body: Callable[[], None], results: list[Any]) -> Work:
        """Run ``body``, which is the call ``name``: at once if torch waits for it anyway."""
        asynchronous = options is None or options.asyncOp
        work = Work(f"{self._label}: {name}", body, results, self._describe_missing)
        short = self._timeout < SHORT_TIMEOUT
        if self._in_thread and (asynchronous or short):
            self._calls.submit(work)
        else:
            self._calls.run(work)
        if short and not asynchronous:
            work.wait(self._timeout)
        work.timeout = self._timeout
        return work

    def _describe_missing(self) -> str:
        missing = members.find_missing(self.comm)
        names = ", ".join(map(str, missing)) or "unknown"
        return f"ranks missing: {names}; make all ranks of the group call it"

    def _who(self, name: str) -> str:
        return f"{self._label}: {name}"

    def _reduce(self, collective: str, *buffers: Any, op: Any, **rest: Any) -> None:
        """Call one of the communicator's reductions with the options of the group."""
        algorithm = self._algorithms.get(collective.lower())
        reproducible = self.options.reproducible
        getattr(self.comm, collective)(*buffers, op=op, algorithm=algorithm, reproducible=reproducible, **rest)

    def _move(self, collective: str, *arguments: Any) -> None:
        """Call one of the communicator's gathers or broadcasts with the algorithm of the group."""
        algorithm = self._algorithms.get(collective.lower())
        named = {"algorithm": algorithm} if algorithm else {}
        getattr(self.comm, collective)(*arguments, **named)

    # Reductions

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Reduce each tensor over the ranks, in place."""
        opts = dist.AllreduceOptions() if opts is None else opts
        return self._run("all_reduce", opts, partial(self._allreduce_all, tensors, opts.reduceOp), tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """As :meth:`allreduce`."""
        return self.allreduce(tensors, dist.AllreduceCoalescedOptions() if opts is None else opts)

    def _allreduce_all(self, tensors: Sequence[Tensor], op: Any) -> None:
        for each in tensors:
            self._allreduce(each, op)

    def _allreduce(self, tensor: Tensor, op: Any) -> None:
        who = self._who("all_reduce")
        if tensor.layout == torch.sparse_coo:
            sparse.allreduce(self.comm, tensor, op, who)
            return
        with update(tensor, who) as dense:
            scaled = reductions.scale(dense, op)
            self._reduce("Allreduce", IN_PLACE, as_array(scaled), op=reductions.meaning(op, scaled.dtype, who))
            if scaled is not dense:
                dense.detach().copy_(scaled)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Reduce a tensor to the root, in place."""
        opts = dist.ReduceOptions() if opts is None else opts
        return self._run("reduce", opts, partial(self._reduce_to, tensors[0], opts.reduceOp, opts.rootRank), tensors)

    def _reduce_to(self, tensor: Tensor, op: Any, root: int) -> None:
        who = self._who("reduce")
        with update(tensor, who) as dense:
            scaled = reductions.scale(dense, op)
            array, meaning = as_array(scaled), reductions.meaning(op, scaled.dtype, who)
            at_root = self.comm.rank == root
            self._reduce("Reduce", *((IN_PLACE, array) if at_root else (array, None)), op=meaning, root=root)
            if at_root and scaled is not dense:
                dense.detach().copy_(scaled)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        """Reduce one tensor a rank; each rank gets its own."""
        opts = dist.ReduceScatterOptions() if opts is None else opts
        body = partial(self._reduce_scatter, outputs[0], inputs[0], opts.reduceOp)
        return self._run("reduce_scatter", opts, body, outputs)

    def _reduce_scatter(self, output: Tensor, inputs: list[Tensor], op: Any) -> None:
        who = self._who("reduce_scatter")
        self._check_number(inputs, who)
        self._scatter_sum(output, join(inputs, who), [each.numel() for each in inputs], op, who)

    def _scatter_sum(self, output: Tensor, row: Tensor, counts: list[int], op: Any, who: str) -> None:
        """Reduce ``row``, of which rank q gets ``counts[q]`` elements, into ``output``."""
        if output.numel() != counts[self.comm.rank]:
            raise ArgumentError(
                f"{who}: the output has {output.numel()} elements, this rank's part of the input "
                f"{counts[self.comm.rank]}: make them the same"
            )
        if output.dtype != row.dtype:
            raise ArgumentError(f"{who}: the output is {output.dtype}, the input {row.dtype}: pass one dtype")
        scaled = reductions.scale(row, op)
        meaning = reductions.meaning(op, scaled.dtype, who)
        target = torch.empty_like(output) if overlap(output, row) else output
        with fill(target, who, scaled.dtype) as dense:
            source, result = as_array(scaled), as_array(dense)
            if len(set(counts)) == 1:
                self._reduce("Reduce_scatter_block", source, result, op=meaning)
            else:
                self._reduce("Reduce_scatter", source, result, op=meaning, recvcounts=counts)
        if target is not output:
            output.detach().copy_(target)

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Work:
        """Reduce a tensor over the ranks; each rank gets an equal part."""
        opts = dist.ReduceScatterOptions() if opts is None else opts
        body = partial(self._reduce_scatter_tensor, output, tensor, opts.reduceOp)
        return self._run("reduce_scatter_tensor", opts, body, [output])

    _reduce_scatter_base = reduce_scatter_single

    def _reduce_scatter_tensor(self, output: Tensor, tensor: Tensor, op: Any) -> None:
        who = self._who("reduce_scatter_tensor")
        self._check_blocks(tensor, output, who)
        row = read(tensor, who).detach().view(-1)
        self._scatter_sum(output, row, [output.numel()] * self.comm.size, op, who)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> Work:
        """As :meth:`reduce_scatter_single`, for several tensors."""
        opts = dist.ReduceScatterOptions() if opts is None else opts

        def body() -> None:
            for output, tensor in zip(outputs, tensors, strict=True):
                self._reduce_scatter_tensor(output, tensor, opts.reduceOp)

        return self._run("reduce_scatter_tensor", opts, body, outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    # Moves

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Work:
        """Copy the root's tensor to all ranks."""
        opts = dist.BroadcastOptions() if opts is None else opts
        return self._run("broadcast", opts, partial(self._broadcast, tensors, opts.rootRank), tensors)

    def _broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        who = self._who("broadcast")
        for each in tensors:
            if self.comm.rank == root:
                self._move("Bcast", as_array(read(each, who)), root)
                continue
            with fill(each, who) as dense:
                self._move("Bcast", as_array(dense), root)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """Gather a tensor of each rank; they may be of different lengths."""
        return self._run("all_gather", opts, partial(self._allgather, outputs[0], inputs[0]), outputs)

    def _allgather(self, outputs: list[Tensor], tensor: Tensor) -> None:
        who = self._who("all_gather")
        self._check_number(outputs, who)
        counts = [each.numel() for each in outputs]
        check_same(tensor, outputs[self.comm.rank], who)
        with fill_row(outputs, who) as row:
            source, target = self._source(tensor, row, sum(counts[: self.comm.rank]), who), as_array(row)
            if len(set(counts)) == 1:
                self._move("Allgather", source, target)
            else:
                self._move("Allgatherv", source, [target, counts])

    def _source(self, tensor: Tensor, row: Tensor, first: int, who: str) -> Any:
        """The send buffer of a gather into ``row``: in place where the tensor lies at its own place already."""
        own = read(tensor, who).detach().view(-1)
        if own.numel() and own.data_ptr() == row.data_ptr() + first * row.element_size():
            return IN_PLACE
        return as_array(own.clone() if overlap(own, row) else own)

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """Gather several tensors of each rank: ``outputs[k]`` are those of rank k."""

        def body() -> None:
            for k, tensor in enumerate(inputs):
                self._allgather([each[k] for each in outputs], tensor)

        return self._run("all_gather_coalesced", opts, body, outputs)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Work:
        """Gather a tensor of each rank into one tensor."""
        return self._run("all_gather_into_tensor", opts, partial(self._allgather_tensor, output, tensor), [output])

    _allgather_base = all_gather_single

    def _allgather_tensor(self, output: Tensor, tensor: Tensor) -> None:
        who = self._who("all_gather_into_tensor")
        self._check_blocks(output, tensor, who)
        with fill(output, who) as dense:
            row = dense.detach().view(-1)
            source = self._source(tensor, row, self.comm.rank * tensor.numel(), who)
            self._move("Allgather", source, as_array(row))

    def all_gather_single_coalesced(self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None) -> Work:
        """As :meth:`all_gather_single`, for several tensors."""

        def body() -> None:
            for output, tensor in zip(outputs, tensors, strict=True):
                self._allgather_tensor(output, tensor)

        return self._run("all_gather_into_tensor", opts, body, outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Work:
        """Gather a tensor of each rank on the root."""
        opts = dist.GatherOptions() if opts is None else opts
        body = partial(self._gather, outputs[0] if outputs else [], inputs[0], opts.rootRank)
        return self._run("gather", opts, body, outputs)

    def _gather(self, outputs: list[Tensor], tensor: Tensor, root: int) -> None:
        who = self._who("gather")
        source = as_array(read(tensor, who))
        if self.comm.rank != root:
            self.comm.Gather(source, None, root)
            return
        self._check_number(outputs, who)
        for each in outputs:
            check_same(tensor, each, who)
        with fill_row(outputs, who) as row:
            self.comm.Gather(source.copy() if overlap(tensor, row) else source, as_array(row), root)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Work:
        """Send one of the root's tensors to each rank."""
        opts = dist.ScatterOptions() if opts is None else opts
        body = partial(self._scatter, outputs[0], inputs[0] if inputs else [], opts.rootRank)
        return self._run("scatter", opts, body, outputs)

    def _scatter(self, output: Tensor, inputs: list[Tensor], root: int) -> None:
        who = self._who("scatter")
        row = None
        if self.comm.rank == root:
            self._check_number(inputs, who)
            for each in inputs:
                check_same(output, each, who)
            row = join(inputs, who)
            row = row.clone() if overlap(output, row) else row
        with fill(output, who) as dense:
            self.comm.Scatter(None if row is None else as_array(row), as_array(dense), root)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Work:
        """Send a tensor to each rank, and receive one from each."""
        return self._run("all_to_all", opts, partial(self._alltoall, outputs, inputs), outputs)

    def _alltoall(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        who = self._who("all_to_all")
        self._check_number(inputs, who)
        self._check_number(outputs, who)
        row = join(inputs, who)
        with fill_row(outputs, who) as target:
            row = row.clone() if overlap(row, target) else row
            counts = [[each.numel() for each in tensors] for tensors in (inputs, outputs)]
            self.comm.Alltoallv([as_array(row), counts[0]], [as_array(target), counts[1]])

    def all_to_all_single(
        self, output: Tensor, tensor: Tensor, receives: list[int], sends: list[int], opts: Any = None
    ) -> Work:
        """Send rows of a tensor to each rank, equally many or as ``sends`` says."""
        body = partial(self._alltoall_tensor, output, tensor, receives, sends)
        return self._run("all_to_all_single", opts, body, [output])

    alltoall_base = all_to_all_single

    def _alltoall_tensor(self, output: Tensor, tensor: Tensor, receives: list[int], sends: list[int]) -> None:
        who = self._who("all_to_all_single")
        if output.dtype != tensor.dtype:
            raise ArgumentError(f"{who}: the output is {output.dtype}, the input {tensor.dtype}: pass one dtype")
        sent, received = self._rows(tensor, sends, who), self._rows(output, receives, who)
        row = read(tensor, who).detach().view(-1)
        with fill(output, who) as dense:
            row = row.clone() if overlap(row, dense) else row
            if sends or receives:
                self.comm.Alltoallv([as_array(row), sent], [as_array(dense), received])
            else:
                self._move("Alltoall", as_array(row), as_array(dense))

    def _rows(self, tensor: Tensor, rows: Sequence[int], who: str) -> list[int]:
        """How many elements each rank's rows have."""
        p, length = self.comm.size, tensor.shape[0] if tensor.dim() else 1
        if not rows:
            if length % p:
                raise ArgumentError(f"{who}: {length} rows cannot be divided over {p} ranks: pass split sizes")
            return [tensor.numel() // p] * p
        if len(rows) != p or sum(rows) != length or min(rows) < 0:
            raise ArgumentError(f"{who}: the split sizes {list(rows)} are not those of {length} rows over {p} ranks")
        each = tensor.numel() // length if length else 0
        return [each * count for count in rows]

    def barrier(self, opts: Any = None) -> Work:
        """Wait for all ranks."""
        return self._run("barrier", opts, self.comm.Barrier, [])

    # Messages

    def send(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Work:
        """Send a tensor to a rank."""
        return send(self.comm, tensors[0], rank, tag, self._who("send"))

    def recv(self, tensors: list[Tensor], rank: int, tag: int = 0) -> Work:
        """Receive a tensor from a rank."""
        return receive(self.comm, tensors[0], rank, tag, self._who("recv"))

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> Work:
        """Receive a tensor from any rank."""
        return receive(self.comm, tensors[0], MPI.ANY_SOURCE, tag, self._who("recv"))

    # Checks

    def _check_number(self, tensors: Sequence[Tensor], who: str) -> None:
        if len(tensors) != self.comm.size:
            raise ArgumentError(f"{who}: {len(tensors)} tensors for {self.comm.size} ranks: pass one for each rank")

    def _check_blocks(self, whole: Tensor, part: Tensor, who: str) -> None:
        if whole.numel() != part.numel() * self.comm.size or whole.dtype != part.dtype:
            raise ArgumentError(
                f"{who}: {whole.numel()} {whole.dtype} are not {self.comm.size} times {part.numel()} {part.dtype}: "
                "pass one block of the same length and dtype for each rank"
            )


def check_same(tensor: Tensor, other: Tensor, who: str) -> None:
    """Raise if a block of this rank is not as long as its place."""
    if tensor.numel() != other.numel() or tensor.dtype != other.dtype:
        raise ArgumentError(
            f"{who}: a tensor of {tensor.numel()} {tensor.dtype} does not fit one of {other.numel()} {other.dtype}: "
            "make them the same"
        )


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two dense tensors share memory."""
    if not a.numel() or not b.numel() or not (a.is_cpu and b.is_cpu):
        return False
    x, y = a.data_ptr(), b.data_ptr()
    return bool(x < y + b.numel() * b.element_size() and y < x + a.numel() * a.element_size())


def choose_algorithms(comm: Any, options: Options) -> dict[str, str]:
    """The algorithm of the options for each collective that has it."""
    if options.algorithm == "auto":
        return {}
    known = {each: comm.algorithms(each) for each in ALGORITHMS}
    found = {each: options.algorithm for each, names in known.items() if options.algorithm in names}
    if not found:
        names = ", ".join(sorted({name for each in known.values() for name in each}))
        raise ArgumentError(f"rank {comm.rank}: algorithm={options.algorithm!r} is not available here: use {names}")
    return found
