"""What an optimizer step of divided model states costs on a cluster that need not exist.

*N ranks, k on a node, p of them share a copy, R = N/p copies; s micro-steps; Ψ parameters in L layers of one size, M
bytes of them as they travel; α, β of :mod:`hpccomm.performance.cost`.*  A layer is computed while the next one is
gathered; on the way back the layer's gradient is reduced on the same links, so both are added up::

    forward       L · max(computing, gather)
    backward      L · max(computing, gather + reduce-scatter)      twice the computing, three times where recomputed
    step          s · (forward + backward) + one gather + second hop

Gathers are rings, inside a node at the node's rate; groups of whole nodes gather in two levels.  The second hop is a
ring over the copies, all ranks of a node on its link at once: an upper bound where several copies lie on a node.

Zhang et al., *MiCS*, VLDB 2022; Rajbhandari et al., *ZeRO*, SC 2020 (ZeRO-3 is one copy on all ranks, flat rings).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.collectives.schedule import Algorithm
from hpccomm.layout import Link
from hpccomm.performance.cost import price
from hpccomm.performance.machine import Machine

RING = {name: ALGORITHMS[name]["ring"] for name in ("allreduce", "allgather", "reduce_scatter")}
STATE_BYTES = 16
"""A parameter's weights, gradient and Adam's moments."""


class Shape(NamedTuple):
    """Who divides what: p ranks a copy."""

    ranks: int
    per_node: int
    partition: int
    two_levels: bool = True
    """Groups of whole nodes gather and reduce in two levels."""

    @property
    def copies(self) -> int:
        """R."""
        return self.ranks // self.partition

    @property
    def spans(self) -> bool:
        """Whether a copy lies on several nodes."""
        return self.partition > self.per_node


class Job(NamedTuple):
    """What is trained."""

    parameters: float
    layers: int
    micro_steps: int
    forward_us: float
    """A layer's computing on the way forward, for a micro-step of one rank."""
    recompute: bool = True
    """Forward once more on the way back."""
    word: int = 2
    """Bytes of a parameter, and of its gradient, on their way in the partition group."""
    shard_word: int = 4
    """And of a gradient in the second hop."""


class Cost(NamedTuple):
    """A step in microseconds; what overlaps is not in their sum."""

    step: float
    computing: float
    gathers: float
    first: float
    """Reduce-scatters."""
    second: float


class Volume(NamedTuple):
    """Bytes of a step, in multiples of M where both hops travel alike."""

    gathers: float
    first: float
    second: float

    @property
    def total(self) -> float:
        """All hops."""
        return sum(self)


def rank_volume(shape: Shape, micro_steps: int) -> Volume:
    """What a rank sends: 2s(p-1)/p, s(p-1)/p, 2(R-1)/(R p)."""
    share, copies = (shape.partition - 1) / shape.partition, shape.copies
    return Volume(2 * micro_steps * share, micro_steps * share, 2 * (copies - 1) / (copies * shape.partition))


def link_volume(shape: Shape, micro_steps: int, *, flat_reduce: bool = False) -> Volume:
    """What passes a node's link in either direction.

    (p-k)/p a gather or reduction in two levels, (p-1)/p a flat one, nothing inside nodes; 2(R-1)/R · k/p.  With
    ``flat_reduce`` only gathers take two levels, as in the paper.
    """
    p, k, copies = shape.partition, shape.per_node, shape.copies
    flat = (p - 1) / p if shape.spans else 0.0
    two = (p - k) / p if shape.spans and shape.two_levels else flat
    return Volume(
        2 * micro_steps * two, micro_steps * (flat if flat_reduce else two), 2 * (copies - 1) / copies * k / p
    )


def gather_us(shape: Shape, nbytes: float, machine: Machine) -> float:
    """One unit's gather."""
    if shape.spans and shape.two_levels and shape.per_node > 1:
        return price(hierarchical.build_allgather(homes(shape)), homes(shape), nbytes, machine).us
    return group_us(RING["allgather"], shape, nbytes, machine)


def reduce_us(shape: Shape, nbytes: float, machine: Machine) -> float:
    """One unit's reduce-scatter."""
    if shape.spans and shape.two_levels and shape.per_node > 1:
        return price(hierarchical.build_reduce_scatter(homes(shape)), homes(shape), nbytes, machine).us
    return group_us(RING["reduce_scatter"], shape, nbytes, machine)


def group_us(algorithm: Algorithm, shape: Shape, nbytes: float, machine: Machine) -> float:
    """One call of a partition group."""
    return price(algorithm, homes(shape), nbytes, machine).us if shape.partition > 1 else 0.0


def homes(shape: Shape) -> list[int]:
    """The node of each rank of a partition group."""
    return (np.arange(shape.partition) // shape.per_node).tolist()


def second_us(shape: Shape, nbytes: float, machine: Machine) -> float:
    """The second hop of a model whose gradients take ``nbytes``."""
    if shape.copies == 1:
        return 0.0
    shared = Link(machine.inter.alpha, machine.inter.beta * min(shape.per_node, shape.ranks))
    alone = Machine(machine.intra, shared, machine.gamma)
    return price(RING["allreduce"], list(range(shape.copies)), nbytes / shape.partition, alone).us


def step_cost(job: Job, shape: Shape, machine: Machine) -> Cost:
    """One optimizer step."""
    nbytes, s = job.parameters * job.word / job.layers, job.micro_steps
    gather, first = gather_us(shape, nbytes, machine), reduce_us(shape, nbytes, machine)
    second = second_us(shape, job.parameters * job.shard_word, machine)
    back_us = job.forward_us * (3 if job.recompute else 2)
    micro = job.layers * (max(job.forward_us, gather) + max(back_us, gather + first))
    computing = s * job.layers * (job.forward_us + back_us)
    return Cost(s * micro + gather + second, computing, 2 * s * job.layers * gather, s * job.layers * first, second)


def weak_scaling(job: Job, before: Shape, after: Shape, machine: Machine) -> float:
    """How much of a rank's throughput is left when ``before`` grows to ``after``, each rank's work staying as it is."""
    return step_cost(job, before, machine).step / step_cost(job, after, machine).step


def fit_latency(job: Job, before: Shape, after: Shape, machine: Machine, left: float) -> Machine:
    """The machine whose latency between nodes leaves just ``left`` of the throughput (0 to 1 ms; by bisection)."""
    low, high = 0.0, 1e3
    for _ in range(16):
        tried = machine._replace(inter=Link((low + high) / 2, machine.inter.beta))
        enough = weak_scaling(job, before, after, tried) > left
        low, high = (tried.inter.alpha, high) if enough else (low, tried.inter.alpha)
    return tried
