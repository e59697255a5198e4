"""The collectives of torch on the communicator of a group.

*p ranks, r this one.*  A tensor that is dense and on the CPU is used where it lies; others, also those on a CUDA
device, are copied to the host and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mpi4py import MPI

from hpccomm.calls.fingerprint import Fingerprint
from hpccomm.errors import ArgumentError
from hpccomm.torch import reductions, sparse
from hpccomm.torch.options import Options
from hpccomm.torch.tensors import (
    Tensor,
    as_array,
    copy_apart,
    copy_back,
    find_room,
    find_row,
    join,
    read,
)

IN_PLACE = MPI.IN_PLACE

REDUCTIONS = ("Allreduce", "Reduce", "Reduce_scatter", "Reduce_scatter_block")
COLLECTIVES = (*REDUCTIONS, "Allgather", "Allgatherv", "Bcast")
"""Collectives that take the algorithm of the options, where they have it."""
COMPARISONS = 1024
"""So many comparisons of calls with a root are kept."""


class Collectives:
    """The collectives of one communicator; they return when they are complete."""

    def __init__(self, comm: Any, options: Options) -> None:
        self.comm, self.options = comm, options
        self._who = Labels(f"rank {comm.rank}: ")
        self._context = comm.context
        self._call = bind_calls(comm, options)
        self._comparisons: dict[tuple[Any, ...], Callable[[], None]] = {}

    def _compare(self, name: str, tensor: Tensor, root: int | None = None, op: Any = None) -> None:
        """Raise on all ranks if their calls differ, before a collective in which some ranks wait for no others.

        ``tensor`` is what every rank has of it: the root's part of a gather or scatter.
        """
        sparse_shape = (tensor.sparse_dim(), *tensor.shape) if tensor.layout == torch.sparse_coo else ()
        key = name, tensor.numel(), tensor.dtype, root, op, self._context.stage, sparse_shape
        compare = self._comparisons.get(key)
        if compare is None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            count = "x".join(map(str, tensor.shape)) if sparse_shape else str(tensor.numel())
            call = Fingerprint(name, "" if op is None else op.name.lower(), count, dtype)
            if root is not None:
                self._check_root(name, root)
                call = call._replace(root=str(root))
            if len(self._comparisons) >= COMPARISONS:
                self._comparisons.clear()
            compare = self.comm._planner.guard(call, lambda: None, lockstep=True)
            self._comparisons[key] = compare
        with self._context.call(name):  # in which the watchdog sees a rank that waits for others
            compare()

    def _check_root(self, name: str, root: int) -> None:
        if not 0 <= root < self.comm.size:
            raise ArgumentError(
                f"{self._who[name]}: the root is rank {root} of a group of {self.comm.size} ranks: "
                f"name one of 0 to {self.comm.size - 1}"
            )

    def allreduce(self, tensors: Sequence[Tensor], op: Any) -> None:
        """Reduce each tensor over the ranks, in place; one that is given twice is reduced once."""
        who = self._who["all_reduce"]
        for each in {id(each): each for each in tensors}.values():
            if each.layout is torch.sparse_coo:
                self._compare("sparse all_reduce", each, op=op.op)
                sparse.allreduce(self.comm, each, op, who)
                continue
            summands, meaning = reductions.prepare(read(each, who), op, who)
            self._call["Allreduce"](IN_PLACE, as_array(summands), meaning)
            if summands is not each:
                each.detach().copy_(summands)

    def reduce(self, tensor: Tensor, op: Any, root: int) -> None:
        """Reduce a tensor to the root, in place."""
        who = self._who["reduce"]
        self._compare("reduce", tensor, root, op.op)
        if tensor.is_complex():
            op = reductions.check_complex(op, tensor.dtype, who)
        whole = read(tensor, who)
        summands, meaning = reductions.prepare(
            torch.view_as_real(whole.detach()) if whole.is_complex() else whole, op, who
        )
        array, at_root = as_array(summands), self.comm.rank == root
        self._call["Reduce"](*((IN_PLACE, array) if at_root else (array, None)), meaning, root)
        if at_root and tensor.is_complex():
            torch.view_as_real(whole.detach()).copy_(summands)
            copy_back(whole, tensor)
        elif at_root:
            copy_back(summands, tensor)

    def reduce_scatter(self, output: Tensor, inputs: list[Tensor], op: Any) -> None:
        """Reduce one tensor a rank; each rank gets its own."""
        who = self._who["reduce_scatter"]
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
        if row.is_complex():  # real and imaginary parts are divided each for itself, as torch does in all_reduce
            parts = torch.view_as_real(output), torch.view_as_real(row)
            self._scatter_sum(*parts, [2 * each for each in counts], reductions.check_complex(op, row.dtype, who), who)
            return
        summands, meaning = reductions.prepare(row, op, who)
        target = find_room(torch.empty_like(output) if overlap(output, row) else output, who, summands.dtype)
        if len(set(counts)) == 1:
            self._call["Reduce_scatter_block"](as_array(summands), as_array(target), meaning)
        else:
            self._call["Reduce_scatter"](as_array(summands), as_array(target), counts, meaning)
        copy_back(target, output)

    def reduce_scatter_tensor(self, output: Tensor, tensor: Tensor, op: Any) -> None:
        """Reduce a tensor over the ranks; each rank gets an equal part."""
        who = self._who["reduce_scatter_tensor"]
        self._check_blocks(tensor, output, who)
        self._scatter_sum(output, read(tensor, who), [output.numel()] * self.comm.size, op, who)

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        """Copy the root's tensors to all ranks."""
        who = self._who["broadcast"]
        for each in tensors:
            self._compare("broadcast", each, root)
            if self.comm.rank == root:
                self._call["Bcast"](as_array(read(each, who)), root)
                continue
            dense = find_room(each, who)
            self._call["Bcast"](as_array(dense), root)
            copy_back(dense, each)

    def allgather(self, outputs: list[Tensor], tensor: Tensor) -> None:
        """Gather a tensor of each rank; they may be of different lengths."""
        who = self._who["all_gather"]
        self._check_number(outputs, who)
        counts = [each.numel() for each in outputs]
        check_same(tensor, outputs[self.comm.rank], who)
        row = find_row(outputs, who)
        source, target = self._source(tensor, row, sum(counts[: self.comm.rank]), who), as_array(row)
        if len(set(counts)) == 1:
            self._call["Allgather"](source, target)
        else:
            self._call["Allgatherv"](source, [target, counts])
        copy_apart(row, outputs)

    def _source(self, tensor: Tensor, row: Tensor, first: int, who: str) -> Any:
        """The send buffer of a gather into ``row``: in place where the tensor lies at its own place already."""
        own = read(tensor, who)
        if own.numel() and own.data_ptr() == row.data_ptr() + first * row.element_size():
            return IN_PLACE
        return as_array(own.clone() if overlap(own, row) else own)

    def allgather_tensor(self, output: Tensor, tensor: Tensor) -> None:
        """Gather a tensor of each rank into one tensor."""
        who = self._who["all_gather_into_tensor"]
        self._check_blocks(output, tensor, who)
        dense = find_room(output, who)
        source = self._source(tensor, dense, self.comm.rank * tensor.numel(), who)
        self._call["Allgather"](source, as_array(dense))
        copy_back(dense, output)

    def gather(self, outputs: list[Tensor], tensor: Tensor, root: int) -> None:
        """Gather a tensor of each rank on the root."""
        who = self._who["gather"]
        self._compare("gather", tensor, root)
        source = as_array(read(tensor, who))
        if self.comm.rank != root:
            self.comm.Gather(source, None, root)
            return
        self._check_number(outputs, who)
        for each in outputs:
            check_same(tensor, each, who)
        row = find_row(outputs, who)
        self.comm.Gather(source.copy() if overlap(tensor, row) else source, as_array(row), root)
        copy_apart(row, outputs)

    def scatter(self, output: Tensor, inputs: list[Tensor], root: int) -> None:
        """Send one of the root's tensors to each rank."""
        who = self._who["scatter"]
        self._compare("scatter", output, root)
        row = None
        if self.comm.rank == root:
            self._check_number(inputs, who)
            for each in inputs:
                check_same(output, each, who)
            row = join(inputs, who)
            row = row.clone() if overlap(output, row) else row
        dense = find_room(output, who)
        self.comm.Scatter(None if row is None else as_array(row), as_array(dense), root)
        copy_back(dense, output)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """Send a tensor to each rank, and receive one from each."""
        who = self._who["all_to_all"]
        self._check_number(inputs, who)
        self._check_number(outputs, who)
        row = join(inputs, who)
        target = find_row(outputs, who)
        row = row.clone() if overlap(row, target) else row
        counts = [[each.numel() for each in tensors] for tensors in (inputs, outputs)]
        self.comm.Alltoallv([as_array(row), counts[0]], [as_array(target), counts[1]])
        copy_apart(target, outputs)

    def alltoall_tensor(self, output: Tensor, tensor: Tensor, receives: list[int], sends: list[int]) -> None:
        """Send rows of a tensor to each rank, equally many or as ``sends`` says."""
        who = self._who["all_to_all_single"]
        if output.dtype != tensor.dtype:
            raise ArgumentError(f"{who}: the output is {output.dtype}, the input {tensor.dtype}: pass one dtype")
        sent, received = self._rows(tensor, sends, who), self._rows(output, receives, who)
        row, dense = read(tensor, who), find_room(output, who)
        row = row.clone() if overlap(row, dense) else row
        if sends or receives:
            self.comm.Alltoallv([as_array(row), sent], [as_array(dense), received])
        else:
            self.comm.Alltoall(as_array(row), as_array(dense))
        copy_back(dense, output)

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

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.comm.Barrier()


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


class Labels(dict[str, str]):
    """The names of calls, with this rank before them."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix = prefix

    def __missing__(self, name: str) -> str:
        label = self[name] = self._prefix + name
        return label


def bind_calls(comm: Any, options: Options) -> dict[str, Callable[..., None]]:
    """The communicator's reductions, gathers and broadcasts by name, with the options of the group."""
    algorithms = choose_algorithms(comm, options)
    calls = {}
    for name in COLLECTIVES:
        named: dict[str, Any] = {"algorithm": algorithms[name]} if name in algorithms else {}
        if options.reproducible and name in REDUCTIONS:
            named["reproducible"] = True
        calls[name] = partial(getattr(comm, name), **named) if named else getattr(comm, name)
    return calls


def choose_algorithms(comm: Any, options: Options) -> dict[str, str]:
    """The algorithm of the options for each collective that has it."""
    if options.algorithm == "auto":
        return {}
    known = {each: comm.algorithms(each.lower()) for each in COLLECTIVES}
    found = {each: options.algorithm for each, names in known.items() if options.algorithm in names}
    if not found:
        names = ", ".join(sorted({name for each in known.values() for name in each}))
        raise ArgumentError(f"rank {comm.rank}: algorithm={options.algorithm!r} is not available here: use {names}")
    return found
