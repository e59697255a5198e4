"""MiCS: every small group holds a copy of the model; traffic does not grow with the cluster (Zhang et al. 2022).

*N ranks, k on a node; p consecutive ranks, a partition group, hold one copy of all model states, R = N/p copies; s
micro-steps in an optimizer step.*  Every micro-step gathers parameters and reduces gradients inside the partition
group; every optimizer step has one allreduce of each rank's shards between the copies
(:mod:`hpccomm.algorithms.sharded.units` has both hops).  With p ≤ k all traffic but that allreduce stays inside nodes.

A group of whole nodes, p > k, gathers and reduces in two levels (:mod:`hpccomm.backends.hierarchical_gathers`): between
the nodes, and in shared memory inside each node.  A fraction (p−k)/p of a unit enters each node, instead of (p−1)/p.

Zhang et al., *MiCS: near-linear scaling for training gigantic model on public cloud*, VLDB 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hpccomm.algorithms.agreement import as_communicator, check_same_arguments
from hpccomm.algorithms.sharded.units import Groups, Optimizer, ShardedModel, Units
from hpccomm.algorithms.transforms import Vector
from hpccomm.errors import ArgumentError
from hpccomm.performance.units import format_count

if TYPE_CHECKING:
    from mpi4py import MPI


def mics(
    comm: MPI.Intracomm,
    units: Units,
    optimizer: Optimizer,
    partition_size: int | None = None,
    *,
    hierarchical: bool = True,
    **how: Any,
) -> ShardedModel:
    """Model states divided over partition groups of ``partition_size`` ranks, by default a node's (collective).

    ``hierarchical``: groups of several nodes of several ranks gather and reduce in two levels.  ``how``: arguments of
    :class:`~hpccomm.algorithms.sharded.units.ShardedModel`.
    """
    ranks = as_communicator("mics", comm)
    who, nodes = f"rank {ranks.rank}", ranks.layout.nodes
    size = ranks_per_node(ranks.rank, nodes) if partition_size is None else partition_size
    check_same_arguments(ranks, f"{who}: mics", partition_size=size, hierarchical=hierarchical)
    nodes_of_group = check_placement(who, nodes, size)
    groups = partition_groups(ranks, size)
    if 1 < nodes_of_group < size and hierarchical:
        how.setdefault("algorithm", "hierarchical")
    return ShardedModel(groups, units, optimizer, **how)


def partition_groups(comm: MPI.Intracomm, size: int) -> Groups:
    """Groups of ``size`` consecutive ranks, and groups of the ranks at the same position in them (collective)."""
    return Groups(comm, comm.Split(comm.rank // size, comm.rank), comm.Split(comm.rank % size, comm.rank))


def check_placement(who: str, nodes: Sequence[int] | Vector, size: int) -> int:
    """The number of nodes of each partition group of ``size`` ranks; ``nodes`` holds the node of each rank.

    Raises unless every group lies inside one node, or every group fills whole nodes.
    """
    home = np.asarray(nodes)
    ranks = home.size
    if not 1 <= size <= ranks or ranks % size:
        near = ", ".join(str(each) for each in range(1, ranks + 1) if ranks % each == 0)
        world = format_count(ranks, "rank")
        raise ArgumentError(f"{who}: partition size {size} does not divide {world}: pass one of {near}")
    groups = home.reshape(-1, size)
    widths = [len(set(group.tolist())) for group in groups]
    for number, group in enumerate(groups):
        if widths[number] == max(widths) > 1 and not (
            len(set(widths)) == 1 and fills(group, np.delete(groups, number, 0))
        ):
            first, lies = number * size, ", ".join(map(str, sorted(set(group.tolist()))))
            raise ArgumentError(
                f"{who}: ranks {first} to {first + size - 1}, a partition group of {size}, lie on nodes {lies}, which "
                f"they do not fill alone, evenly and in order: {remedy(home)}"
            )
    return widths[0]


def fills(group: Vector, others: Vector) -> bool:
    """Whether a group has nodes of its own, equally many ranks on each, the ranks of a node consecutive."""
    nodes, counts = np.unique(group, return_counts=True)
    in_order = int((np.diff(group) != 0).sum()) + 1 == nodes.size
    return in_order and len(set(counts.tolist())) == 1 and not bool(np.isin(others, nodes).any())


def remedy(home: Vector) -> str:
    """The remedy in the error."""
    counts = np.unique(home, return_counts=True)[1]
    if (np.diff(home) != 0).sum() + 1 != counts.size:
        return "start consecutive ranks on one node (mpirun --map-by slot, srun --distribution=block)"
    if len(set(counts.tolist())) > 1:
        return f"start the same number of ranks on every node, here {counts.min()} to {counts.max()}"
    each = int(counts[0])
    return f"pass a divisor of the {each} ranks of a node, or a multiple of {each}"


def ranks_per_node(rank: int, nodes: Vector) -> int:
    """The number of ranks on every node."""
    counts = np.unique(nodes, return_counts=True)[1]
    if len(set(counts.tolist())) > 1:
        raise ArgumentError(
            f"rank {rank}: nodes of {counts.min()} to {counts.max()} ranks: pass partition_size, or start the same "
            "number of ranks on every node"
        )
    return int(counts[0])


def smallest_partition(states: float, memory: float, ranks: int, per_node: int, working: float = 0.0) -> int:
    """The smallest partition size for which ``states`` bytes of model states (16Ψ) fit into every rank.

    A rank has ``memory`` bytes, of which activations and buffers take ``working``.  The size divides ``ranks``, and its
    groups lie inside nodes of ``per_node`` ranks or fill them.

    >>> smallest_partition(16 * 1.5e9, 40e9, 64, 8, working=20e9)
    2
    """
    fits = [p for p in range(1, ranks + 1) if ranks % p == 0 and (per_node % p == 0 or p % per_node == 0)]
    for p in fits:
        if states / p + working <= memory:
            return p
    raise ArgumentError(
        f"{states:.3g} bytes of states over {format_count(ranks, 'rank')} and {working:.3g} of working memory do "
        f"not fit into {memory:.3g} bytes a rank: use more ranks or a smaller model"
    )
