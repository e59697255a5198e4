"""MiCS: a copy of the model in a small group, so that communication does not grow with the cluster (Zhang et al. 2022).

*N ranks, k on a node; p consecutive ranks, a partition group, hold one copy of all model states, R = N/p copies; s
micro-steps in an optimizer step.*  Parameters are gathered and gradients reduced inside the partition group, in every
micro-step; only once in an optimizer step is there an allreduce between the copies, of each rank's shards
(:mod:`hpccomm.algorithms.sharded.units` has both hops).  With p ≤ k everything but that one stays inside nodes.

A group of whole nodes, p > k, gathers and reduces in two levels (:mod:`hpccomm.backends.hierarchical_gathers`): between
the nodes,
and inside each in its shared memory.  Of a unit (p−k)/p enter each node, instead of (p−1)/p.

Zhang et al., *MiCS: near-linear scaling for training gigantic model on public cloud*, VLDB 2022.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpccomm.algorithms.sharded.units import Groups, Optimizer, ShardedModel, Tensors
from hpccomm.algorithms.transforms import Vector
from hpccomm.errors import ArgumentError

if TYPE_CHECKING:
    from mpi4py import MPI


def mics(
    comm: MPI.Intracomm,
    units: Mapping[str, Tensors] | Iterable[tuple[str, Tensors]],
    optimizer: Optimizer,
    partition_size: int | None = None,
    *,
    hierarchical: bool = True,
    **how: Any,
) -> ShardedModel:
    """Model states divided over partition groups of ``partition_size`` ranks, a node's if not said (collective).

    ``comm`` knows its nodes, as an ``hpccomm.Communicator`` does.  ``hierarchical``: where a group spans nodes of
    several ranks, gather and reduce in two levels.  What else :class:`~hpccomm.algorithms.sharded.units.ShardedModel`
    takes.
    """
    nodes = comm.layout.nodes  # type: ignore[attr-defined]
    size = ranks_per_node(comm.rank, nodes) if partition_size is None else partition_size
    spans = check_placement(f"rank {comm.rank}", nodes, size)
    groups = partition_groups(comm, size)
    if 1 < spans < size and hierarchical:
        how.setdefault("algorithm", "hierarchical")
    return ShardedModel(groups, units, optimizer, **how)


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


def ranks_per_node(rank: int, nodes: Vector) -> int:
    """Ranks of a node."""
    counts = np.unique(nodes, return_counts=True)[1]
    if len(set(counts.tolist())) > 1:
        raise ArgumentError(
            f"rank {rank}: nodes of {counts.min()} to {counts.max()} ranks: pass partition_size, or start the same "
            "number of ranks on every node"
        )
    return int(counts[0])


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
