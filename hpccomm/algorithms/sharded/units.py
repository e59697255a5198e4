"""Model states sharded over ranks, in flat units of one layer each (ZeRO: Rajbhandari et al., SC 2020).

*N ranks; a partition group of p ranks holds one copy of the sharded states; a replication group, the R = N/p ranks at
the same position in their partition groups, hold the same shards; Ψ parameters, M bytes on the wire; s micro-steps in
an optimizer step.*  A unit is padded to p equal shards; rank j of every partition group holds shard j::

    gather(unit)              allgather in the partition group               (p−1)/p · M
    reduce_accumulate(unit)   first hop: reduce-scatter there, add to shard  (p−1)/p · M
    boundary()                second hop: one allreduce of all shards
                              in the replication group                       2(R−1)/(R·p) · M
                              ÷ (N·s), norm, clipping, optimizer on the shard

These are bytes for each rank and call.  A micro-step gathers in forward and in backward; the second hop comes once in
an optimizer step.  The ``stage`` selects the sharded states: 3 parameters, gradients and optimizer state; 2 gradients
and optimizer state; 1 optimizer state.  Partition groups of all ranks are ZeRO, groups of one rank data parallelism,
others MiCS (:mod:`hpccomm.algorithms.sharded.groups`).

Gradients are added in float32, whatever their dtype on the wire, and the optimizer works on a float32 master copy, from
which 16-bit parameters are rounded for every gather.  A rank holds 4 bytes of gradient, 4 of weights and the
optimizer's state, 8 for Adam: 16Ψ/p.  If a gradient is not finite, all ranks skip the step.

All vectors lie where the weights do: NumPy's on the host, CuPy's on a CUDA device.  PyTorch's tensors become views of
either.
"""

from __future__ import annotations

import math
import sys
import weakref
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpccomm.algorithms.agreement import (
    as_communicator,
    check_same_arguments,
    check_same_tensors,
    rows_of,
    run_collectively,
)
from hpccomm.algorithms.exchange import allreduce_bytes
from hpccomm.algorithms.fused import InPlaceTransform
from hpccomm.algorithms.loss_scaling import LossScale, find_scale
from hpccomm.algorithms.reports import ExchangeReport
from hpccomm.algorithms.sharded.call_threads import Buffer, CallThread, GradientBuffers
from hpccomm.algorithms.sharded.quantized import (
    CodedReduce,
    SecondaryShards,
    check_codes,
    gather_coded,
    make_secondary,
)
from hpccomm.algorithms.states import leaves
from hpccomm.algorithms.transforms import Schedule, Transform, Vector, check_count, check_limit, require
from hpccomm.algorithms.trust_ratio import NormReduce, global_norm
from hpccomm.arrays import (
    Converter,
    bfloat16,
    identity,
    is_bfloat16,
    is_on_device,
    library_of,
    narrow,
    reduction_dtype,
    to_device_like,
    to_host,
    view_array,
    view_for_mpi,
)
from hpccomm.buckets import BUCKET_BYTES, Bucket, group_by_size, memory_of
from hpccomm.errors import ArgumentError, MismatchError

if TYPE_CHECKING:
    from mpi4py import MPI

Tensors = Mapping[str, npt.NDArray[Any]]
Units = Mapping[str, Tensors] | Iterable[tuple[str, Tensors]]
Optimizer = Transform | Callable[[Bucket, NormReduce | None], Transform]
"""An elementwise transform, or a function that makes one from the bucket of this rank's shards and the reduction that
completes their norms: ``lambda bucket, reduce: lamb(bucket, 0.01, norm_reduce=reduce)``."""
NORMS = "pass lambda bucket, reduce: {}, which adds the squares of all shards"
SCALE_REMEDY = "leave it out, and pass loss_scale= beside the optimizer"
WHOLE_REMEDIES = {
    "clip": "leave it out, and pass max_norm= beside the optimizer",
    "scale_by_global_norm": NORMS.format('lamb(bucket, lr, grad_norm="clip", norm_reduce=reduce)'),
    "scale_by_trust_ratio": NORMS.format("lamb(bucket, lr, norm_reduce=reduce)"),
    "scale_loss": SCALE_REMEDY,
}
"""What to do about transforms that are wrong on shards, by their name in ``Transform.needs_whole``."""
GRADIENT_BUFFERS = 2
"""Gradients of whole units where reductions overlap: one is written while the other one is on its way."""


class Groups(NamedTuple):
    """All ranks, the ranks that share a copy of the model with this one, and the ranks that hold the same shards."""

    world: Any
    partition: Any
    replication: Any


class Outcome(NamedTuple):
    """The outcome of an optimizer step, the same on all ranks."""

    norm: float
    """Norm of the mean gradient of all ranks, before clipping."""
    overflow: bool
    """The gradient was not finite, and the step was skipped."""
    loss_scale: float
    """The loss scale of the next step."""


class Hops(NamedTuple):
    """The cost of each kind of exchange on this rank: seconds waited, and bytes sent by its formula."""

    gather: ExchangeReport = ExchangeReport()
    first: ExchangeReport = ExchangeReport()
    second: ExchangeReport = ExchangeReport()


class Memory(NamedTuple):
    """Bytes on this rank."""

    states: int
    """Weights, gradients, optimizer state, offloaded ones included."""
    parameters: int
    """Whole units: the gathered ones and the secondary shard, or at stages 1 and 2 the whole model."""
    workspace: int
    """Buffers for a whole unit's gradient, and for shards to be sent."""


class Unit:
    """One layer's tensors as a flat vector of ``size`` elements, padded to equal shards; this rank holds [lo, hi)."""

    def __init__(self, name: str, number: int, bucket: Bucket, ranks: int, place: int, first: int) -> None:
        self.name, self.number, self.bucket = name, number, bucket
        self.size, self.shard_size = bucket.size, -(-bucket.size // ranks)
        self.padded_size = ranks * self.shard_size
        self.lo, self.hi = bounds(self.size, ranks, place)
        self.own_slice = slice(first, first + self.hi - self.lo)
        """This rank's shard in the vectors of all its shards."""
        self.tied: dict[str, tuple[Unit, str]] = {}
        """The tensors that an earlier unit holds, by their names here: that unit, and the name there."""
        self.back: dict[str, Converter] = {}
        """The converters to the library of each tensor."""

    @property
    def needed(self) -> list[Unit]:
        """This unit, and those that hold tensors of it."""
        return list(dict.fromkeys([self, *(owner for owner, _ in self.tied.values())]))

    def views(self, vector_of: Callable[[Unit], Vector]) -> dict[str, npt.NDArray[Any]]:
        """All tensors; ``vector_of(unit)`` begins with a unit's own ones."""
        return views(self, vector_of(self)) | {
            name: views(owner, vector_of(owner))[its] for name, (owner, its) in self.tied.items()
        }


def bounds(size: int, ranks: int, place: int) -> tuple[int, int]:
    """The elements of a unit in shard ``place`` of ``ranks``, without padding."""
    shard = -(-size // ranks)
    return min(place * shard, size), min((place + 1) * shard, size)


class Gather:
    """Allgathers in the partition group, on a communicator of their own, by ``algorithm`` or its choice."""

    def __init__(self, partition: Any, algorithm: str) -> None:
        self.comm, self.kwargs = partition.Dup(), algorithm_kwargs(algorithm)

    def __call__(self, shard: Vector, whole: Vector) -> int:
        """Gather equal shards, in rank order; returns the bytes sent."""
        self.comm.Allgather(view_for_mpi(shard), view_for_mpi(whole), **self.kwargs)
        return int((self.comm.size - 1) * shard.nbytes)


class Reduce:
    """Reduce-scatters of shards of up to ``longest`` elements; 16-bit floats are added in float32.

    16-bit shards travel by all-to-all and are summed in float32 at the receiver.  A named ``algorithm`` adds on the
    way, so it takes shards widened to float32.
    """

    def __init__(self, partition: Any, algorithm: str, longest: int, dtype: np.dtype[Any], library: Any) -> None:
        self.partition, self.ranks, self.kwargs = partition, partition.size, algorithm_kwargs(algorithm)
        self.uses_alltoall = dtype != reduction_dtype(dtype) and not algorithm
        whole = longest * self.ranks
        self.receive_buffer = library.empty(
            whole if self.uses_alltoall else longest, dtype if self.uses_alltoall else reduction_dtype(dtype)
        )
        self.wide_buffer = library.empty(
            0 if self.uses_alltoall or dtype == reduction_dtype(dtype) else whole, reduction_dtype(dtype)
        )
        self.nbytes = self.receive_buffer.nbytes + self.wide_buffer.nbytes

    def __call__(self, room: Vector, total: Vector) -> int:
        """Add this rank's shard of the sum, without padding, to ``total``; returns the bytes sent."""
        shard = room.size // self.ranks
        if self.uses_alltoall:
            arrived = self.receive_buffer[: room.size]
            self.partition.Alltoall(view_for_mpi(room), view_for_mpi(arrived))
            for each in arrived.reshape(self.ranks, shard):
                total += each[: total.size]
            return int((self.ranks - 1) * shard * room.itemsize)
        if self.wide_buffer.size:
            wider = self.wide_buffer[: room.size]
            wider[...] = room
            room = wider
        arrived = self.receive_buffer[:shard]
        self.partition.Reduce_scatter_block(room, arrived, **self.kwargs)
        total += arrived[: total.size]
        return int((self.ranks - 1) * shard * room.itemsize)


def algorithm_kwargs(algorithm: str) -> dict[str, str]:
    """The keyword for an algorithm; MPI's own communicators do not take it."""
    return {"algorithm": algorithm} if algorithm else {}


def allocate_shared(comm: Any, elements: int, dtype: np.dtype[Any], library: Any) -> Vector:
    """An array in memory shared by the ranks of a node, where the communicator has it; on the device (collective)."""
    made: Vector = (getattr(comm, "empty", np.empty) if library is np else library.empty)(elements, dtype)
    return made


class ShardedModel:
    """A model in training whose states are sharded over the ranks (the constructor is collective).

    ``units`` are the layers, ``{"layer0": {"w": array, "b": array}, …}`` or an iterable of such pairs, which is
    consumed one by one, so that no rank holds the whole model; float32 or float64; the values of rank 0 are used.
    Arrays are NumPy's, CuPy's or PyTorch's, all on the host or all on one device; parameters and buffers of gradients
    come in the same library, on the same memory.
    ``optimizer``: see :data:`Optimizer`; :func:`adamw` steps in place.  ``dtype`` is that of gathered parameters and
    of gradients: float32, float16 or bfloat16, by default the master's.  ``max_norm`` clips the global gradient.
    ``loss_scale`` is for float16.  ``algorithm`` names the partition group's algorithm for gathers and reductions; by
    default its communicator chooses.

    Gathers, first hops and second hops each run beside the program, on a thread and a communicator of their own, where
    the MPI library permits it; ``overlap=False`` turns the threads off, and gives the same bits.  ``prefetch`` units
    are gathered ahead of the one in use (``ahead=`` of :meth:`gather`).  The second hop of a unit begins with
    ``last=True`` of :meth:`reduce_accumulate`, else at the boundary; shards of several units, up to 25 MB, travel in
    one message.  On a device all of them run in the program's thread.

    ``offload=True`` keeps the master weights and the optimizer's state of a model on a device in the host's memory: in
    each optimizer step this rank's gradient shards are copied to the host, which steps, and rounded shards back.  For
    weights on the host it changes nothing, for they are there.

    An array that occurs in several units, or twice in one (tied weights), is kept in the first one, which is gathered
    with each of the others; its gradients are added on this rank before they travel.

    ``weight_code``, ``gradient_code`` and ``secondary_shard`` are qwZ, qgZ and hpZ of ZeRO++, for partition groups of
    several nodes (:mod:`hpccomm.algorithms.sharded.quantized`): the codes of :func:`~hpccomm.block_mean` in which
    parameters are gathered and gradients reduced, such as ``"int8"`` and ``"int4"``, and a copy of the gathered units
    inside each node, 1/k on each of its k ranks, so that only the first gather of a unit in a step leaves the node.

    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from hpccomm.algorithms.transforms import scale
    >>> states = zero(MPI.COMM_SELF, {"layer": {"w": np.array([1, 2], "f4")}}, scale(-0.5))
    >>> w = states.gather("layer")["w"]
    >>> states.reduce_accumulate("layer", {"w": 2 * w})
    >>> states.release("layer")
    >>> states.boundary().overflow
    False
    >>> states.gather("layer")["w"].tolist()
    [0.0, 0.0]
    """

    def __init__(
        self,
        groups: Groups,
        units: Units,
        optimizer: Optimizer,
        *,
        stage: int = 3,
        dtype: npt.DTypeLike | None = None,
        max_norm: float | None = None,
        loss_scale: LossScale | None = None,
        overlap: bool = True,
        prefetch: int = 1,
        algorithm: str = "",
        weight_code: str | None = None,
        gradient_code: str | None = None,
        secondary_shard: bool = False,
        offload: bool = False,
    ) -> None:
        require(stage in (1, 2, 3), f"zero: stage is {stage}: pass 1, 2 or 3; data_parallel divides nothing")
        check_count("zero: prefetch", prefetch, 0)
        if max_norm is not None:
            check_limit("zero: max_norm", max_norm, "pass a positive number, or None")
        self.groups, self.stage, self.max_norm = groups, stage, max_norm
        self.loss_scale = loss_scale or LossScale()
        self.ranks, self.place = groups.partition.size, groups.partition.rank
        self.who = f"rank {groups.world.rank}"
        self.units: dict[str, Unit] = {}
        shards, whole = self._take_shards(units)
        self.library = library_of(shards)
        """The module that allocates vectors: NumPy or CuPy."""
        self.offloads = offload and self.library is not np
        self.master = to_host(shards) if self.offloads else shards
        self.dtype = self.master.dtype if dtype is None else dtype_of(dtype)
        check_dtypes(self.master.dtype, self.dtype, self.library is not np)
        check_codes(stage, self.dtype, weight_code, gradient_code, secondary_shard)
        check_same_arguments(
            groups.world,
            self.who,
            stage=stage,
            dtype=str(self.dtype),
            algorithm=algorithm,
            weight_code=weight_code,
            gradient_code=gradient_code,
            secondary_shard=secondary_shard,
            prefetch=prefetch,
            overlap=overlap,
            offload=offload,
            library=self.library.__name__,
        )
        self.weight_code = weight_code
        size = self.master.size if stage > 1 else sum(unit.size for unit in self.units.values())
        self._total = self.library.zeros(size, self.master.dtype)
        bucket = Bucket(dict(self._shard_sizes()), self.master.dtype, exempt=list(self._exempt_names()))
        norms = self._sum_over_partition if self.ranks > 1 else None
        self.optimizer, self.state = run_collectively(
            groups.world, "zero", lambda: self._begin_optimizer(optimizer, bucket, norms)
        )
        self.steps, self.hops = 0, Hops()
        self.counts = dict.fromkeys(self.units, 0)
        """Gradients added for each unit since the last step."""
        self.calls: list[str] = []
        """The gathers and reductions since the last step, in order: they must be the same on all ranks."""
        overlap = overlap and groups.world.size > 1 and self.library is np and threads_may_talk()
        self._allocate_buffers(whole, overlap, prefetch, algorithm, gradient_code, secondary_shard)
        self._prepare_second_hops(overlap)

    def _begin_optimizer(self, optimizer: Optimizer, bucket: Bucket, norms: NormReduce | None) -> tuple[Transform, Any]:
        """The optimizer of this rank's shards, and its state; raises where it may refuse the shards of other ranks."""
        made = optimizer if isinstance(optimizer, Transform) else optimizer(bucket, norms)
        self._check_optimizer(made)
        state = made.init(self.master)
        skips = "scale_loss in the optimizer never sees an overflow, whose step boundary() skips"
        require(find_scale(state) is None, f"{skips}: {SCALE_REMEDY}")
        return made, state

    def _check_optimizer(self, optimizer: Transform) -> None:
        """Raise for an optimizer whose step on shards is another one than on the whole model."""
        part = getattr(optimizer, "needs_whole", "") if self.ranks > 1 else ""
        whole = f"{part} in the optimizer needs the whole model, each of {self.ranks} ranks holds a shard"
        require(part not in WHOLE_REMEDIES, f"{whole}: {WHOLE_REMEDIES.get(part)}")
        require(
            all(comm.size == 1 for comm in getattr(optimizer, "comms", ())),
            "the optimizer exchanges gradients itself, which both hops have averaged: leave the exchange out, e.g. "
            "chain(momentum(0.9), scale(-0.1)); in place of scale_loss pass loss_scale= beside the optimizer",
        )
        require(not part, f"{whole}: leave it out, the gradients have been averaged")

    @property
    def _gathers(self) -> bool:
        """Whether a gather communicates."""
        return self.stage == 3 and self.ranks > 1

    def _take_shards(self, units: Units) -> tuple[Vector, list[Vector]]:
        """This rank's shards of the initial weights, and at stages 1 and 2 all weights."""
        parts: list[Vector] = []
        whole, first = [], 0
        seen: dict[Any, tuple[Any, Unit, str]] = {}
        for name, tensors in read_units(self.who, units):
            require(name not in self.units, f"{self.who}: two units are called {name!r}: give each a name of its own")
            require(bool(tensors), f"{self.who}: unit {name!r} has no tensors: leave it out")
            tied = find_tied(tensors, seen)
            own = {each: tensor for each, tensor in tensors.items() if each not in tied}
            unit = Unit(name, len(self.units), Bucket(own), self.ranks, self.place, first)
            unit.tied = note_tensors(unit, own, tied, seen)
            unit.back = {each: converter_of(tensor) for each, tensor in tensors.items()}
            self._check_same_unit(repr(name), unit)
            vector = unit.bucket.flatten(own) if own else parts[-1][:0].copy()
            self.groups.world.Bcast(vector, 0)
            parts.append(vector[unit.lo : unit.hi].copy())
            whole += [vector] if self.stage < 3 and self.ranks > 1 else []
            self.units[name], first = unit, unit.own_slice.stop
        self._check_same_unit("nothing")
        require(bool(parts), f"{self.who}: a model has one unit or more: pass {{name: tensors}}")
        kinds = {part.dtype for part in parts}
        require(len(kinds) == 1, f"{self.who}: units of {', '.join(map(str, kinds))}: cast them to one dtype")
        places = {type(part) for part in parts}
        require(len(places) == 1, f"{self.who}: some units lie on a device, others on the host: move them to one place")
        return np.concatenate(parts), whole

    def _check_same_unit(self, name: str, unit: Unit | None = None) -> None:
        """Raise on all ranks unless the next unit of all of them has the same tensors (collective)."""
        tensors = [] if unit is None else rows_of(unit.bucket)
        tied = [] if unit is None else [f"{each!r} tied to {u.name}.{its}" for each, (u, its) in unit.tied.items()]
        check_same_tensors(self.groups.world, f"unit {len(self.units)}", [f"unit {name}", *tensors, *tied])

    def _allocate_buffers(
        self,
        whole: list[Vector],
        overlap: bool,
        prefetch: int,
        algorithm: str,
        gradient_code: str | None,
        secondary_shard: bool,
    ) -> None:
        """Allocate all buffers of the steps."""
        units = self.units.values()
        longest, shard = max(unit.padded_size for unit in units), max(unit.shard_size for unit in units)
        self._collect = Gather(self.groups.partition, algorithm) if self._gathers else None
        kind = self.dtype if self.stage > 1 else self.master.dtype
        self._reduce: Reduce | CodedReduce | None = None
        reduces = overlap and self.ranks > 1 and self.stage > 1
        self._copies = [self.groups.partition.Dup()] if reduces else []
        """The communicators of reductions beside the program."""
        partition = self._copies[0] if reduces else self.groups.partition
        if self.ranks > 1:
            self._reduce = (
                CodedReduce(partition, gradient_code)
                if gradient_code
                else Reduce(partition, algorithm, shard, kind, self.library)
            )
        self.secondary: SecondaryShards | None = None
        if self._collect and secondary_shard:
            sizes = [unit.padded_size for unit in units]
            self.secondary = make_secondary(self._collect.comm, sizes, self.dtype, self.library)
        rooms = min(max(len(each.needed) for each in units) + prefetch, len(units)) if self._gathers else 0
        self.buffers: list[Buffer[Unit]] = [Buffer(self.library.empty(longest, self.dtype)) for _ in range(rooms)]
        self._ahead: list[Unit] = []
        """The units that will be gathered next, until a buffer is free."""
        rooms = GRADIENT_BUFFERS if reduces else 1
        self.gradients: GradientBuffers[Unit] = GradientBuffers(
            [allocate_shared(partition, longest, self.dtype, self.library) for _ in range(rooms)]
        )
        self._members: dict[str, set[str]] = {}
        """The units that give gradients to a unit with tied tensors, by its name: itself, and the others."""
        for unit in units:
            for owner, _ in unit.tied.values():
                self._members.setdefault(owner.name, {owner.name}).add(unit.name)
        zeros = self.library.zeros
        self._sums = {name: Buffer[Unit](zeros(self.units[name].padded_size, self.dtype)) for name in self._members}
        """The sums of their gradients."""
        self._sent: set[str] = set()
        """The sums that were sent, and begin anew with the next gradient."""
        self.shard = (
            allocate_shared(self._collect.comm, shard, self.dtype, self.library)
            if self._collect
            else zeros(shard, self.dtype)
        )
        """The buffer of a shard to be sent."""
        if self._collect and self.dtype == self.master.dtype and self.library is np:
            room = allocate_shared(self._collect.comm, sum(unit.shard_size for unit in units), self.dtype, np)
            room[: self.master.size] = self.master
            self.master = room[: self.master.size]
        self.parameters: dict[str, Vector] = {}
        """All parameters, where a rank keeps them whole beside the master copy."""
        if self.stage < 3 and self.ranks > 1:
            self.parameters = {u.name: narrow(v, self.dtype).copy() for u, v in zip(units, whole, strict=True)}
        elif self.ranks == 1 and (self.dtype != self.master.dtype or self.offloads):
            self.parameters = {unit.name: self._round(self.master[unit.own_slice]) for unit in units}
        self.prefetcher = CallThread("gather", overlap and self._gathers)
        self._first_hops = CallThread("first hop", reduces)

    def _prepare_second_hops(self, overlap: bool) -> None:
        """Group the units, from the last to the first, whose shards travel in one message."""
        overlap = overlap and self.groups.replication.size > 1
        self._copies += [self.groups.replication.Dup()] if overlap else []
        self._replication = self._copies[-1] if overlap else self.groups.replication
        self._second_hops = CallThread("second hop", overlap)
        sizes = [(name, None, unit.shard_size * self._total.itemsize) for name, unit in self.units.items()]
        self._groups = [[self.units[name] for name in names] for names in group_by_size(reversed(sizes), BUCKET_BYTES)]
        self._complete: set[str] = set()
        """The units whose gradients of this step have all been added."""
        self._second: list[Future[int]] = []
        """The second hops of this step."""

    def _shard_sizes(self) -> Iterator[tuple[str, tuple[int]]]:
        """The name of each tensor, and the number of its elements on this rank."""
        for unit in self.units.values():
            for slot in unit.bucket.table:
                lo, hi = max(slot.offset, unit.lo), min(slot.offset + slot.length, unit.hi)
                yield f"{unit.name}.{slot.name}", (max(0, hi - lo),)

    def _exempt_names(self) -> Iterator[str]:
        """Tensors that neither decay nor adapt."""
        return (f"{u.name}.{slot.name}" for u in self.units.values() for slot in u.bucket.table if not slot.decay)

    def _unit(self, name: str, verb: str) -> Unit:
        if name not in self.units:
            raise ArgumentError(f"{self.who}: {verb}: no unit is called {name!r}: use one of {', '.join(self.units)}")
        return self.units[name]

    @property
    def memory(self) -> Memory:
        """The memory of this rank."""
        state = sum(leaf.nbytes for _, leaf in leaves(self.state) if isinstance(leaf, np.ndarray) or is_on_device(leaf))
        whole = sum(each.nbytes for each in (*self.parameters.values(), *(slot.room for slot in self.buffers)))
        whole += self.secondary.nbytes if self.secondary else 0
        working = self.gradients.nbytes + sum(each.room.nbytes for each in self._sums.values())
        working += self.shard.nbytes + (self._reduce.nbytes if self._reduce else 0)
        return Memory(self.master.nbytes + self._total.nbytes + state, whole, working)

    @property
    def total(self) -> Vector:
        """The sum of gradients: this rank's shards, at stage 1 the whole units one after the other."""
        self._finish_first_hops()
        return self._total

    def gather(self, name: str, ahead: str | Iterable[str] | None = None) -> dict[str, npt.NDArray[Any]]:
        """The unit's parameters by name, valid until :meth:`release` (collective in the partition group).

        ``ahead`` names the unit, or the units in order, that will be gathered next: their prefetch starts now, or as
        soon as a buffer is free.  All ranks of a partition group gather the same units in the same order.
        """
        unit = self._unit(name, "gather")
        names = [ahead] if isinstance(ahead, str) else list(ahead or ())
        following = [self._unit(each, "gather: ahead") for each in names]
        if not self._gathers:
            return convert(unit, unit.views(self._parameters_of))
        in_use = any(name in slot.users for slot in self.buffers)
        require(not in_use, f"{self.who}: gather: {name!r} is gathered: release it first")
        for each in unit.needed:
            slot = self._find_buffer(each) or self._begin(each)
            if slot.under_way is not None:
                self._take_gathered(slot)
            slot.users.add(name)
        self._ahead = [each for later in following if later is not unit for each in later.needed]
        self._prefetch()
        return convert(unit, unit.views(self._find_room))

    def _parameters_of(self, unit: Unit) -> Vector:
        """The unit's parameters where this rank keeps them whole."""
        return self.parameters[unit.name] if self.parameters else self.master[unit.own_slice]

    def _find_room(self, unit: Unit) -> Vector:
        """The unit's parameters in their buffer."""
        return next(slot.room for slot in self.buffers if slot.unit is unit)

    def _take_gathered(self, slot: Buffer[Unit]) -> None:
        """Wait for the gather of a unit."""
        assert slot.unit is not None
        assert slot.under_way is not None
        arrival, slot.under_way = slot.under_way, None
        try:
            self._take_result("gather", arrival)
        except MismatchError as error:
            raise MismatchError(
                f"{self.who} gathers unit {slot.unit.name!r} as call {len(self.calls)} of this step: {error}; "
                "gather the units in the same order on all ranks"
            ) from error

    def _take_result(self, hop: str, future: Future[int]) -> None:
        """Wait for an exchange, and count its cost."""
        began = perf_counter()
        self._record_cost(hop, began, future.result())

    def _prefetch(self) -> None:
        """Begin the gathers ahead for which there are free buffers."""
        while self._ahead and any(each.unit is None for each in self.buffers):
            following = self._ahead.pop(0)
            if not self._find_buffer(following):
                self._begin(following)

    def release(self, name: str) -> None:
        """End the use of the unit's parameters; the next gather may reuse their buffer."""
        self._unit(name, "release")
        if not self._gathers:
            return
        used = [slot for slot in self.buffers if name in slot.users]
        require(bool(used), f"{self.who}: release: {name!r} is not gathered: gather it first, release it once")
        for slot in used:
            slot.users.discard(name)
            if not slot.users:
                slot.unit = None
        self._prefetch()

    def _find_buffer(self, unit: Unit) -> Buffer[Unit] | None:
        return next((slot for slot in self.buffers if slot.unit is unit), None)

    def _begin(self, unit: Unit) -> Buffer[Unit]:
        """Start the gather of a unit into a free buffer, or into that of a unit that was prefetched in vain."""
        slot = next((each for each in self.buffers if each.unit is None), None)
        slot = slot or next((each for each in self.buffers if each.under_way is not None), None)
        if slot is None:
            held = " and ".join(repr(each.unit.name) for each in self.buffers if each.unit)
            raise ArgumentError(
                f"{self.who}: gather: {held} are gathered: release one first, or pass a larger prefetch"
            )
        if slot.under_way is not None:
            self._take_gathered(slot)
        slot.unit, room = unit, slot.room[: unit.padded_size]
        self.calls.append(f"gather {unit.name}")
        slot.under_way = self.prefetcher.submit(self._fetch, unit, room)
        return slot

    def _fetch(self, unit: Unit, room: Vector) -> int:
        """Gather a unit; gathers run one at a time, in the order of the calls."""
        if not unit.size or not self._collect:
            return 0
        gather = partial(self._gather_shards, unit, room)
        return self.secondary.fetch(unit.number, room, gather) if self.secondary else gather()

    def _gather_shards(self, unit: Unit, room: Vector) -> int:
        """Gather a unit from the ranks that hold its shards."""
        assert self._collect is not None
        shard = self._cast_shard(unit)
        if not self.weight_code:
            return self._collect(shard, room)
        return gather_coded(self._collect, self.weight_code, shard, room)

    def _cast_shard(self, unit: Unit) -> Vector:
        """This rank's shard, padded and in the dtype on the wire."""
        mine = self.master[unit.own_slice]
        if mine.size == unit.shard_size and mine.dtype == self.dtype and not self.offloads:
            return mine
        shard = self.shard[: unit.shard_size]
        shard[: mine.size] = self._round(mine)
        shard[mine.size :] = 0
        return shard

    def _round(self, weights: Vector) -> Vector:
        """Master weights in the dtype on the wire, where parameters lie."""
        return to_device_like(narrow(weights, self.dtype), self._total)  # type: ignore[no-any-return]

    def gradient(self, name: str) -> dict[str, npt.NDArray[Any]]:
        """A buffer for the unit's gradient by name, to be written and passed to :meth:`reduce_accumulate`.

        The next unit may use the same memory.
        """
        unit = self._unit(name, "gradient")
        room = views(unit, self._gradient_buffer(unit).room)
        tied = {each: views(owner, self._sums[owner.name].room)[its] for each, (owner, its) in unit.tied.items()}
        return convert(unit, room | {each: np.zeros_like(tensor) for each, tensor in tied.items()})

    def _gradient_buffer(self, unit: Unit) -> Buffer[Unit]:
        """The buffer handed out for this unit, or the oldest one, once its exchange is complete."""
        buffer = self.gradients.find(unit)
        self._finish_first_hop(buffer)
        buffer.unit = unit
        return buffer

    def _finish_first_hop(self, buffer: Buffer[Unit]) -> None:
        future, buffer.under_way = buffer.under_way, None
        if future is not None:
            buffer.unit = None
            self._take_result("first", future)

    def _finish_first_hops(self) -> None:
        """Wait until all gradients have arrived in the sum."""
        for buffer in (*self.gradients, *self._sums.values()):
            self._finish_first_hop(buffer)

    def reduce_accumulate(self, name: str, gradient: Tensors | Vector, last: bool = False) -> None:
        """Add a micro-step's gradient, of ``dtype``, to the shards (collective in the partition group).

        ``gradient``: the buffer of :meth:`gradient`, or tensors by name, or a flat vector; it is the mean over this
        rank's samples, times the loss scale.  ``last`` says that the unit gets no more gradients in this step, so that
        its second hop can begin.
        """
        unit = self._unit(name, "reduce_accumulate")
        if name in self._complete:
            raise ArgumentError(f"{self.who}: reduce_accumulate: {name!r} had its last gradient: call boundary first")
        gradient = self._read_gradient(name, gradient)
        tied = take_tied(unit, gradient, self.dtype, self.who)
        buffer = self._gradient_buffer(unit)
        if isinstance(gradient, Mapping):
            gradient = {each: tensor for each, tensor in gradient.items() if each not in tied}
        copy_gradient(unit, gradient, buffer.room[: unit.padded_size], self.who)
        self.counts[name] += 1
        self.calls.append(f"reduce {name}")
        for each, (owner, its) in unit.tied.items():
            views(owner, self._sum_of(owner).room)[its][...] += tied[each]
        if name in self._members:
            total = self._sum_of(unit)
            total.room += buffer.room[: unit.padded_size]
        else:
            self._add_to_shards(unit, buffer)
        for owner in unit.needed:
            counts = {self.counts[each] for each in self._members.get(owner.name, ())}
            if len(counts) == 1:
                self._sent.add(owner.name)
                self._add_to_shards(owner, self._sums[owner.name])
        if last:
            self._complete.add(name)
            if self.stage > 1 or self.ranks == 1:
                self._begin_second_hops(self._complete)

    def _read_gradient(self, name: str, gradient: Any) -> Any:
        """Tensors by name, or a vector, of any library as arrays where the weights lie; raises for other places."""
        if isinstance(gradient, Mapping):
            return {each: self._read_gradient(f"{name}.{each}", tensor) for each, tensor in gradient.items()}
        array, _ = view_array(gradient, f"{self.who}: the gradient of {name}")
        places = ["on the host" if isinstance(each, np.ndarray) else "on a device" for each in (array, self._total)]
        require(
            places[0] == places[1],
            f"{self.who}: the gradient of {name} lies {places[0]}, the weights {places[1]}: move it there",
        )
        return array

    def _sum_of(self, owner: Unit) -> Buffer[Unit]:
        """The sum of the gradients of a unit with tied tensors, of zeros where the last one was sent."""
        total = self._sums[owner.name]
        if owner.name in self._sent:
            self._finish_first_hop(total)
            total.room[...] = 0
            self._sent.discard(owner.name)
        return total

    def _add_to_shards(self, unit: Unit, buffer: Buffer[Unit]) -> None:
        """Add a unit's gradient to the shards, or at stage 1 to the whole unit."""
        room = buffer.room[: unit.padded_size]
        if self.stage == 1 or self.ranks == 1:
            total = self._total[self._unit_slice(unit)]
            total += room[: unit.size]
        elif unit.size:
            began = perf_counter()
            buffer.under_way = self._first_hops.submit(self._reduce_unit, unit, room, self._total[unit.own_slice])
            self._record_cost("first", began, 0, 0)

    def _begin_second_hops(self, complete: Container[str]) -> None:
        """Begin the second hop of each group of units that are complete, always from the last group to the first."""
        if self.groups.replication.size == 1:
            return
        for group in self._groups[len(self._second) :]:
            if not all(name in complete for unit in group for name in self._members.get(unit.name, (unit.name,))):
                return
            waits = self._first_hops.submit(int)  # complete when the first hops before it are
            self._second.append(self._second_hops.submit(self._allreduce_group, group, waits))

    def _allreduce_group(self, group: list[Unit], first_hops: Future[int]) -> int:
        """The second hop of some units, after their first ones; returns the bytes sent."""
        first_hops.result()
        slices = [unit.own_slice for unit in group]
        part = self._shards[min(each.start for each in slices) : max(each.stop for each in slices)]
        return self._allreduce_shards(part)

    def _unit_slice(self, unit: Unit) -> slice:
        """The slice of a whole unit in the vector of whole units."""
        first = sum(each.size for each in self.units.values() if each.number < unit.number)
        return slice(first, first + unit.size)

    def _reduce_unit(self, unit: Unit, room: Vector, total: Vector) -> int:
        """The first hop of a unit: add this rank's shard of the sum over the partition group to ``total``."""
        assert self._reduce is not None
        try:
            return self._reduce(room, total)
        except MismatchError as error:
            raise MismatchError(f"{self.who} reduces unit {unit.name!r}: {error}") from error

    def boundary(self) -> Outcome:
        """The second hop and the optimizer's step (collective).

        Every unit must have the same number of gradients on all ranks, and no unit may be gathered.
        """
        micro_steps = self._count_micro_steps()
        self._finish_first_hops()
        if self.stage == 1 and self.ranks > 1:
            self._divide()
        began = perf_counter()
        self._begin_second_hops(self.units)
        self._record_cost("second", began, 0, 0)
        for hop in self._second:
            self._take_result("second", hop)
        part = self._shards
        part /= self.groups.world.size * micro_steps * self.loss_scale.value
        norm = global_norm(part, self._sum_over_partition)
        overflow = not math.isfinite(norm)
        self.loss_scale = self.loss_scale.update(overflow)
        if not overflow:
            if self.max_norm is not None and norm > self.max_norm:
                part *= part.dtype.type(self.max_norm / norm)
            self._step(part)
            self.steps += 1
        self._begin_step()
        return Outcome(norm, overflow, self.loss_scale.value)

    def _begin_step(self) -> None:
        """Forget the gradients and the calls of the last step."""
        self._total[...] = 0
        self._second.clear()
        self._complete.clear()
        self._ahead.clear()
        self.counts = dict.fromkeys(self.units, 0)
        self.calls.clear()

    def discard_step(self) -> None:
        """Discard the gradients since the last step, and gathered units, once the exchanges under way have ended.

        Collective; raises on all ranks if they have made different calls since that step, of which some never end.
        """
        made = self.groups.world.allgather(self._digest_calls())
        if len({*made}) > 1:
            other = next(rank for rank, each in enumerate(made) if each != made[0])
            raise MismatchError(
                f"{self.who}: in this step rank 0 has made {made[0][0]} calls, rank {other} {made[other][0]} or "
                "others: free the states and make them anew"
            )
        buffers = [*self.buffers, *self.gradients, *self._sums.values()]
        for future in (*(each.under_way for each in buffers), *self._second):
            if future is not None:
                future.exception()  # an error of the step that is discarded
        for each in buffers:
            each.unit = each.under_way = None
            each.users.clear()
        for total in self._sums.values():
            total.room[...] = 0
        self._sent.clear()
        self._begin_step()

    def _count_micro_steps(self) -> int:
        """The number of micro-steps; raises where ranks or units disagree, before gradients are sent or changed."""
        held = [slot.unit.name for slot in self.buffers if slot.unit]
        require(not held, f"{self.who}: boundary: {held} are gathered, or on their way: release them first")
        few, most = min(self.units, key=self.counts.__getitem__), max(self.units, key=self.counts.__getitem__)
        if self.counts[few] != self.counts[most] or not self.counts[few]:
            raise ArgumentError(
                f"{self.who}: boundary: unit {few!r} has seen {self.counts[few]} gradients, {most!r} "
                f"{self.counts[most]}: reduce_accumulate every unit in every micro-step"
            )
        if self.ranks > 1:
            self._check_same_calls()
        self._check_micro_steps(self.counts[few])
        return self.counts[few]

    def _check_micro_steps(self, mine: int) -> None:
        """Raise on all ranks unless all made the same number of micro-steps: their gradients weigh the same."""
        world = self.groups.world
        if world.size == self.ranks:
            return  # as all of them made the same calls
        everyone = np.empty(world.size, np.int64)
        world.Allgather(np.array([mine], np.int64), everyone)
        odd = np.flatnonzero(everyone != everyone[0])
        if odd.size:
            raise MismatchError(
                f"{self.who}: boundary: rank {odd[0]} has made {everyone[odd[0]]} micro-steps, rank 0 {everyone[0]}: "
                "make as many on all ranks, with gradients of zeros where data is missing; the weights are as they were"
            )

    def _digest_calls(self) -> tuple[int, int]:
        """How many calls this rank has made in this step, and a hash of their names in order."""
        return len(self.calls), zlib.crc32("\n".join(self.calls).encode())

    def _check_same_calls(self) -> None:
        """Raise on all ranks of the partition group unless they made the same calls in the same order."""
        partition = self.groups.partition
        mine, everyone = np.array(self._digest_calls(), np.int64), np.empty((self.ranks, 2), np.int64)
        partition.Allgather(mine, everyone)
        if (everyone == everyone[0]).all():
            return
        lists = partition.allgather(self.calls)
        other = next(rank for rank, calls in enumerate(lists) if calls != lists[0])
        pairs = zip([*lists[0], "nothing"], [*lists[other], "nothing"], strict=False)
        at, (first, its) = next((at, pair) for at, pair in enumerate(pairs, 1) if pair[0] != pair[1])
        raise MismatchError(
            f"{self.who}: boundary: call {at} of this step was {its!r} on place {other} of the partition group, "
            f"{first!r} on place 0: gather and reduce the units in the same order on all ranks; the weights are as "
            "they were"
        )

    @property
    def _shards(self) -> Vector:
        """This rank's shards of the gradient."""
        return self._total if self.stage > 1 or self.ranks == 1 else self._total[: self.master.size]

    def _divide(self) -> None:
        """Stage 1: the first hop of all units, their shards go to the front of ``total``."""
        for unit in self.units.values():
            room = self.library.zeros(unit.padded_size, self._total.dtype)
            room[: unit.size] = self._total[self._unit_slice(unit)]
            self._total[unit.own_slice] = 0
            if unit.size:
                began = perf_counter()
                self._record_cost("first", began, self._reduce_unit(unit, room, self._total[unit.own_slice]))

    def _allreduce_shards(self, part: Vector) -> int:
        """The second hop of some shards: one allreduce; returns the bytes sent."""
        from mpi4py import MPI

        if part.size:
            self._replication.Allreduce(MPI.IN_PLACE, part)
        return allreduce_bytes(part.nbytes, self._replication.size)

    def _sum_over_partition(self, table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The sum over the partition group in rank order: the same bits in every group."""
        if self.ranks == 1:
            return table
        everyone = np.empty((self.ranks, *table.shape))
        self.groups.partition.Allgather(table, everyone)
        total = everyone[0]
        for each in everyone[1:]:
            total += each
        return total

    def _step(self, part: Vector) -> None:
        """The optimizer on the shards; at stages 1 and 2 all parameters are gathered afterwards."""
        part = to_host(part) if self.offloads else part
        if isinstance(self.optimizer, InPlaceTransform):
            self.state = self.optimizer.apply(part, self.state, self.master)
        else:
            step, self.state = self.optimizer.update(part, self.state, self.master)
            self.master += step
        self.refresh()

    def refresh(self) -> None:
        """Gather all parameters where a rank keeps them whole: after each step, and after loading."""
        if self.secondary:
            self.secondary.forget()
        for name, vector in self.parameters.items():
            unit = self.units[name]
            if self.ranks == 1 or not unit.size:
                vector[...] = self._round(self.master[unit.own_slice])
                continue
            began, room = perf_counter(), self._gradient_buffer(unit).room[: unit.padded_size]
            self.groups.partition.Allgather(view_for_mpi(self._cast_shard(unit)), view_for_mpi(room))
            vector[...] = room[: unit.size]
            self._record_cost("gather", began, (self.ranks - 1) * unit.shard_size * self.dtype.itemsize)

    def _record_cost(self, hop: str, began: float, sent: int, exchanges: int = 1) -> None:
        cost = ExchangeReport(exchanges, perf_counter() - began, sent)
        self.hops = self.hops._replace(**{hop: getattr(self.hops, hop).add(cost)})

    def consolidate(self) -> Iterator[tuple[str, dict[str, npt.NDArray[Any]]]]:
        """Each unit's name and master weights by tensor, one unit after the other (collective in the partition group).

        The arrays are new; a loop that ends early must end on all ranks.
        """
        whole: dict[Unit, Vector] = {}
        for unit in self.units.values():
            whole[unit] = self._assemble(unit)
            yield unit.name, convert(unit, unit.views(whole.__getitem__))
            if unit.name not in self._members:
                del whole[unit]

    def _assemble(self, unit: Unit) -> Vector:
        mine = self.library.zeros(unit.shard_size, self.master.dtype)
        mine[: unit.hi - unit.lo] = to_device_like(self.master[unit.own_slice], mine)
        whole = self.library.empty(unit.padded_size, self.master.dtype)
        if unit.size:
            self.groups.partition.Allgather(mine, whole)
        return whole[: unit.size]

    def close(self) -> None:
        """Stop the threads and free their communicators (collective)."""
        for thread in (self.prefetcher, self._first_hops, self._second_hops):
            thread.shutdown()
        for comm in [*self._copies, *([self._collect.comm] if self._collect else ())]:
            comm.Free()


def views(unit: Unit, vector: Vector) -> dict[str, npt.NDArray[Any]]:
    """The unit's tensors at the start of a vector of any dtype."""
    return {t.name: vector[t.offset : t.offset + t.length].reshape(t.shape) for t in unit.bucket.table}


def converter_of(tensor: Any) -> Converter:
    """The function that gives arrays the library of a tensor: PyTorch's; all others get NumPy's or CuPy's."""
    torch = sys.modules.get("torch")
    return view_array(tensor)[1] if torch is not None and isinstance(tensor, torch.Tensor) else identity


def convert(unit: Unit, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The unit's arrays in the libraries of its weights, on the same memory."""
    return {name: unit.back[name](each) for name, each in arrays.items()}


def find_tied(tensors: Tensors, seen: Mapping[Any, tuple[Any, Unit, str]]) -> dict[str, tuple[Unit | None, str]]:
    """The tensors that were seen before: their unit and name; None as unit where it is another one of these."""
    tied: dict[str, tuple[Unit | None, str]] = {}
    own: dict[Any, str] = {}
    for name, tensor in tensors.items():
        memory = memory_of(view_array(tensor, f"the weights {name}")[0])
        known = seen.get(memory)
        if memory is not None and known is not None and known[0]() is not None:  # else its memory was used again
            tied[name] = known[1:]
        elif memory in own:
            tied[name] = None, own[memory]
        elif memory is not None:
            own[memory] = name
    return tied


def note_tensors(
    unit: Unit,
    own: Tensors,
    tied: Mapping[str, tuple[Unit | None, str]],
    seen: dict[Any, tuple[Any, Unit, str]],
) -> dict[str, tuple[Unit, str]]:
    """Remember a unit's own tensors as long as they live; its tied ones, whose unit may be this one."""
    for name, tensor in own.items():
        memory = memory_of(view_array(tensor)[0])
        if memory is not None:
            seen[memory] = weakref.ref(tensor), unit, name
    return {name: (owner or unit, its) for name, (owner, its) in tied.items()}


def take_tied(unit: Unit, gradient: Tensors | Vector, dtype: np.dtype[Any], who: str) -> dict[str, Any]:
    """The gradients of a unit's tied tensors; raises for missing ones, wrong shapes or dtypes."""
    found = gradient if isinstance(gradient, Mapping) else {}
    shapes = {
        name: entry.shape
        for name, (owner, its) in unit.tied.items()
        for entry in owner.bucket.table
        if entry.name == its
    }
    wrong = [n for n, shape in shapes.items() if n not in found or (found[n].shape, found[n].dtype) != (shape, dtype)]
    require(
        not wrong,
        f"{who}: the gradient of unit {unit.name!r} is wrong at {', '.join(wrong)}, tied weights: pass tensors by "
        f"name, in {dtype} and in their shapes",
    )
    return {name: found[name] for name in shapes}


def copy_gradient(unit: Unit, gradient: Tensors | Vector, room: Vector, who: str) -> None:
    """Copy a unit's gradient into ``room`` and pad it with zeros; raises for wrong names, shapes or dtypes."""
    if not isinstance(gradient, Mapping):
        if gradient.shape != (unit.size,) or gradient.dtype != room.dtype:
            raise ArgumentError(
                f"{who}: the gradient of unit {unit.name!r} is {gradient.dtype} of shape {gradient.shape}: "
                f"pass {room.dtype} of shape ({unit.size},), or tensors by name"
            )
        room[: unit.size] = gradient
    else:
        there = views(unit, room)
        wrong = [name for name in there if name not in gradient or gradient[name].shape != there[name].shape]
        wrong += [name for name in gradient if name not in there]
        wrong += [name for name in there if name not in wrong and gradient[name].dtype != room.dtype]
        if wrong:
            raise ArgumentError(
                f"{who}: the gradient of unit {unit.name!r} is wrong at {', '.join(wrong)}: pass every tensor, once, "
                f"in {room.dtype} and in its shape"
            )
        for name, tensor in there.items():
            if memory_of(gradient[name]) != memory_of(tensor):
                tensor[...] = gradient[name]
    room[unit.size :] = 0


def dtype_of(given: Any) -> np.dtype[Any]:
    """A dtype of NumPy, ml_dtypes or PyTorch as NumPy's."""
    name = str(given).removeprefix("torch.")
    if name == "bfloat16":
        return bfloat16("zero: dtype")
    try:
        return np.dtype(name if name != str(given) else given)
    except TypeError:
        raise ArgumentError(f"zero: dtype is {given!r}: pass float32, float16 or bfloat16, or leave it out") from None


def check_dtypes(master: np.dtype[Any], travels: np.dtype[Any], on_device: bool) -> None:
    """Raise for unsupported dtypes of weights or parameters."""
    require(
        not (on_device and is_bfloat16(travels)),
        "zero: dtype is bfloat16, which CuPy does not have: pass float16 or float32",
    )
    require(master in (np.float32, np.float64), f"zero: the weights are {master}: pass float32, or float64")
    require(
        travels == master or reduction_dtype(travels) == np.float32,
        f"zero: dtype is {travels}, the weights {master}: pass float32, float16 or bfloat16, or leave it out",
    )


def threads_may_talk() -> bool:
    """Whether a second thread may call MPI."""
    from mpi4py import MPI

    return MPI.Query_thread() == MPI.THREAD_MULTIPLE


def adamw(
    lr: float | Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0
) -> Callable[[Bucket, NormReduce | None], Transform]:
    """AdamW for :class:`ShardedModel`, in place: it needs no memory besides its two moments."""
    from hpccomm.algorithms.large_batch import lamb

    return lambda bucket, reduce: lamb(bucket, lr, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, adapt=())


def zero(comm: MPI.Intracomm, units: Units, optimizer: Optimizer, **how: Any) -> ShardedModel:
    """ZeRO: model states sharded over all ranks; ``how``: ``stage=3``, … of :class:`ShardedModel` (collective)."""
    ranks = as_communicator("zero", comm)
    return ShardedModel(Groups(ranks, ranks, ranks.Split(ranks.rank, 0)), units, optimizer, **how)


def data_parallel(comm: MPI.Intracomm, units: Units, optimizer: Optimizer, **how: Any) -> ShardedModel:
    """Every rank holds the whole model; gradients are allreduced once in an optimizer step (collective)."""
    ranks = as_communicator("data_parallel", comm)
    return ShardedModel(Groups(ranks, ranks.Split(ranks.rank, 0), ranks), units, optimizer, **how)


def read_units(who: str, units: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The name and the tensors of every unit; raises for other forms."""
    form = f'{who}: the units are {{}}: pass {{{{"layer0": {{{{"w": array}}}}}}}}, or an iterable of such pairs'
    if isinstance(units, str | bytes) or not hasattr(units, "__iter__"):
        raise ArgumentError(form.format(f"a {type(units).__name__}"))
    for each in units.items() if isinstance(units, Mapping) else units:
        if not (isinstance(each, tuple | list) and len(each) == 2 and isinstance(each[0], str)):
            raise ArgumentError(form.format(f"a {type(units).__name__} of {type(each).__name__}"))
        if not isinstance(each[1], Mapping):
            raise ArgumentError(form.format(f"a {type(units).__name__} that has a {type(each[1]).__name__} of tensors"))
        yield each[0], each[1]
