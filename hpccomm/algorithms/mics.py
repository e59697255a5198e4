"""MiCS: a copy of the model in a small group, so that communication does not grow with the cluster (Zhang et al. 2022).

*N ranks, k on a node; p consecutive ranks, a partition group, hold one copy of all model states, R = N/p copies; s
micro-steps in an optimizer step.*  Parameters are gathered and gradients reduced inside the partition group, in every
micro-step; only once in an optimizer step is there an allreduce between the copies, of each rank's shards
(:mod:`hpccomm.algorithms.zero` has both hops).  With p ≤ k everything but that one stays inside nodes.

A group of whole nodes, p > k, gathers in two levels (:mod:`hpccomm.collectives.gathers` is the schedule): the ranks
with the same place on their nodes first, then each node in its shared memory, one gather for the chunks of each of the
group's nodes, straight into their places.  Gradients take the way back.  Of a unit (p−k)/p enter each node, instead of
(p−1)/p.

Zhang et al., *MiCS: near-linear scaling for training gigantic model on public cloud*, VLDB 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpccomm.algorithms.transforms import Vector
from hpccomm.algorithms.zero import Groups, Optimizer, Sharded, Tensors, registered
from hpccomm.arrays import movable, wide
from hpccomm.errors import ArgumentError

if TYPE_CHECKING:
    from mpi4py import MPI

SHORT_BYTES = 1 << 18
"""Up to here one call inside the node and a copy that puts chunks in order are faster than a call for each node."""


def between_nodes(nbytes: int) -> str:
    """The algorithm between nodes: a ring for long vectors, as a link carries both directions at once then."""
    return "auto" if nbytes <= SHORT_BYTES else "ring"


def mics(
    comm: MPI.Intracomm,
    units: Mapping[str, Tensors] | Iterable[tuple[str, Tensors]],
    optimizer: Optimizer,
    partition_size: int | None = None,
    *,
    hierarchical: bool = True,
    **how: Any,
) -> Sharded:
    """Model states divided over partition groups of ``partition_size`` ranks, a node's if not said (collective).

    ``comm`` knows its nodes, as an ``hpccomm.Communicator`` does.  ``hierarchical``: where a group spans nodes of
    several ranks, gather and reduce in two levels.  What else :class:`~hpccomm.algorithms.zero.Sharded` takes.
    """
    nodes = comm.topology.nodes  # type: ignore[attr-defined]
    size = per_node(comm.rank, nodes) if partition_size is None else partition_size
    spans = check_placement(f"rank {comm.rank}", nodes, size)
    groups = partition_groups(comm, size)
    if 1 < spans < size and hierarchical:
        how["reduce"] = TwoLevelReduce(groups.partition, size // spans)
        if how.get("stage", 3) == 3:
            how["collect"] = TwoLevelGather(groups.partition, size // spans)
    return Sharded(groups, units, optimizer, **how)


def partition_groups(comm: MPI.Intracomm, size: int) -> Groups:
    """Groups of ``size`` consecutive ranks, and of the ranks with the same place in theirs (collective)."""
    return Groups(comm, comm.Split(comm.rank // size, comm.rank), comm.Split(comm.rank % size, comm.rank))


def check_placement(who: str, nodes: Sequence[int] | Vector, size: int) -> int:
    """How many nodes each partition group of ``size`` ranks spans; ``nodes`` says where each rank lives.

    Raises unless all groups lie alike: each inside one node, or on whole nodes.
    """
    home = np.asarray(nodes)
    ranks = home.size
    if not 1 <= size <= ranks or ranks % size:
        near = ", ".join(str(each) for each in range(1, ranks + 1) if ranks % each == 0)
        raise ArgumentError(f"{who}: partition size {size} does not divide {ranks} ranks: pass one of {near}")
    groups = home.reshape(-1, size)
    spans = [len(set(group.tolist())) for group in groups]
    for number, group in enumerate(groups):
        if spans[number] == max(spans) > 1 and not (
            len(set(spans)) == 1 and fills(group, np.delete(groups, number, 0))
        ):
            first, lies = number * size, ", ".join(map(str, sorted(set(group.tolist()))))
            raise ArgumentError(
                f"{who}: ranks {first} to {first + size - 1}, a partition group of {size}, lie on nodes {lies}, which "
                f"they do not fill alone, evenly and in order: {remedy(home)}"
            )
    return spans[0]


def fills(group: Vector, others: Vector) -> bool:
    """Whether a group has nodes of its own, as many ranks on each, those of a node one after the other."""
    nodes, counts = np.unique(group, return_counts=True)
    in_order = int((np.diff(group) != 0).sum()) + 1 == nodes.size
    return in_order and len(set(counts.tolist())) == 1 and not bool(np.isin(others, nodes).any())


def remedy(home: Vector) -> str:
    """What to do instead."""
    counts = np.unique(home, return_counts=True)[1]
    if (np.diff(home) != 0).sum() + 1 != counts.size:
        return "start consecutive ranks on one node (mpirun --map-by slot, srun --distribution=block)"
    if len(set(counts.tolist())) > 1:
        return f"start the same number of ranks on every node, here {counts.min()} to {counts.max()}"
    each = int(counts[0])
    return f"pass a divisor of the {each} ranks of a node, or a multiple of {each}"


def per_node(rank: int, nodes: Vector) -> int:
    """Ranks of a node."""
    counts = np.unique(nodes, return_counts=True)[1]
    if len(set(counts.tolist())) > 1:
        raise ArgumentError(
            f"rank {rank}: nodes of {counts.min()} to {counts.max()} ranks: pass partition_size, or start the same "
            "number of ranks on every node"
        )
    return int(counts[0])


class Levels:
    """A partition group on nodes of ``each`` ranks: who shares this rank's node, and who its place on the others."""

    def __init__(self, partition: Any, each: int) -> None:
        self.nodes, self.each = partition.size // each, each
        self.inside = partition.Split(partition.rank // each, partition.rank)
        self.between = partition.Split(partition.rank % each, partition.rank)
        self._seen, self._own = self.empty(0, np.dtype("u1")), np.empty(0, np.uint8)

    @property
    def nbytes(self) -> int:
        """As :class:`~hpccomm.algorithms.zero.Way`."""
        return int(self._seen.nbytes + self._own.nbytes)

    def free(self) -> None:
        """As :class:`~hpccomm.algorithms.zero.Way`."""
        self.inside.Free()
        self.between.Free()

    def empty(self, elements: int, dtype: np.dtype[Any]) -> Vector:
        """As :class:`~hpccomm.algorithms.zero.Way`."""
        return registered(self.inside, elements, dtype)

    def chunks(self, shard: int, dtype: np.dtype[Any]) -> Vector:
        """Shared room for a shard from, or for, each node: made for the longest one, then the same in every call."""
        nbytes = self.nodes * shard * dtype.itemsize
        if self._seen.size < nbytes:
            self._seen = self.empty(nbytes, self._own.dtype)
        return self._seen[:nbytes].view(dtype).reshape(self.nodes, shard)

    def arrivals(self, elements: int, dtype: np.dtype[Any]) -> Vector:
        """Room of this rank's own."""
        nbytes = elements * dtype.itemsize
        if self._own.size < nbytes:
            self._own = np.empty(nbytes, np.uint8)
        return self._own[:nbytes].view(dtype)

    def turned(self, shard: int, dtype: np.dtype[Any]) -> Vector:
        """Room for a short vector in the order of places, for one call inside the node: (each, nodes, shard)."""
        return self.arrivals(self.nodes * self.each * shard, dtype).reshape(self.each, self.nodes, shard)


class TwoLevelGather(Levels):
    """An allgather: between the nodes, then inside them, each node's chunks straight into their places.

    A short vector is gathered in one call inside the node and put in order afterwards.
    """

    def __call__(self, shard: Vector, whole: Vector) -> int:
        """Gather equal shards, in the order of the group's ranks."""
        shard, whole = movable(shard), movable(whole)
        chunks = self.chunks(shard.size, shard.dtype)
        self.between.Allgather(shard, chunks.reshape(-1), algorithm=between_nodes(whole.nbytes))
        if whole.nbytes <= SHORT_BYTES:
            turned = self.turned(shard.size, shard.dtype)
            self.inside.Allgather(chunks.reshape(-1), turned.reshape(-1))
            whole.reshape(self.nodes, self.each, shard.size)[...] = turned.swapaxes(0, 1)
        else:
            for chunk, places in zip(chunks, whole.reshape(self.nodes, -1), strict=True):
                self.inside.Allgather(chunk, places)
        return int(shard.nbytes * (self.nodes * self.each - 1))


class TwoLevelReduce(Levels):
    """A reduce-scatter: inside the nodes, a node's chunks at a time, then between them, where 16 bits are 32 by now.

    A short vector is put in order first, and reduced in one call inside the node.
    """

    def __call__(self, room: Vector, total: Vector) -> int:
        """Add this rank's shard of the group's sum to ``total``; padding, which ``room`` has, is left out."""
        kind, shard = wide(room.dtype), room.size // (self.nodes * self.each)
        chunks = self.chunks(shard, kind)
        if room.nbytes <= SHORT_BYTES and room.dtype == kind:
            turned = self.turned(shard, kind)
            turned[...] = room.reshape(self.nodes, self.each, shard).swapaxes(0, 1)
            self.inside.Reduce_scatter_block(turned.reshape(-1), chunks.reshape(-1))
        else:
            for places, chunk in zip(room.reshape(self.nodes, -1), chunks, strict=True):
                self._in_node(places, chunk)
        arrived = self.arrivals(shard, kind)
        self.between.Reduce_scatter_block(chunks.reshape(-1), arrived, algorithm=between_nodes(room.nbytes))
        total += arrived[: total.size]
        near, far = self.nodes * (self.each - 1) * room.itemsize, (self.nodes - 1) * kind.itemsize
        return int(shard * (near + far))

    def _in_node(self, places: Vector, chunk: Vector) -> None:
        """The node's sum of the shards of one node's ranks: this rank's place of it."""
        if places.dtype == chunk.dtype:
            self.inside.Reduce_scatter_block(places, chunk)
            return
        arrived = self.arrivals(places.size, places.dtype)
        self.inside.Alltoall(movable(places), movable(arrived))
        np.sum(arrived.reshape(self.each, -1), axis=0, dtype=chunk.dtype, out=chunk)


def smallest_partition(states: float, memory: float, ranks: int, per_node: int, working: float = 0.0) -> int:
    """The smallest partition size with which ``states`` bytes of model states (16Ψ) fit, in all ranks alike.

    ``memory`` bytes of a rank, of which ``working`` go to activations and buffers.  A divisor of ``ranks`` that lies
    inside nodes of ``per_node`` ranks or fills them.

    >>> smallest_partition(16 * 1.5e9, 40e9, 64, 8, working=20e9)
    2
    """
    fits = [p for p in range(1, ranks + 1) if ranks % p == 0 and (per_node % p == 0 or p % per_node == 0)]
    for p in fits:
        if states / p + working <= memory:
            return p
    raise ArgumentError(
        f"{states:.3g} bytes of states over {ranks} ranks and {working:.3g} of working memory do not fit into "
        f"{memory:.3g} bytes a rank: use more ranks or a smaller model"
    )
