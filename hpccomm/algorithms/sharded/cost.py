"""The predicted time of an optimizer step of sharded model states, on any cluster.

*N ranks, k on a node, p of them share a copy, R = N/p copies; s micro-steps; Ψ parameters in L layers of one size, M
bytes on the wire; α, β of :mod:`hpccomm.performance.cost`.*  The gather of a layer overlaps with computing the layer
before; in the backward pass the reduction uses the same links as the gather, so their times add up::

    forward       L · max(computing, gather)
    backward      L · max(computing, gather + reduce-scatter)      twice the computing, three times where recomputed
    step          s · (forward + backward) + one gather + second hop

Gathers are rings, inside a node at the node's rate; groups of whole nodes gather in two levels.  The second hop is a
ring over the copies, all ranks of a node on its link at once: an upper bound where several copies lie on a node.
Of ZeRO++ (:mod:`hpccomm.algorithms.sharded.quantized`) a code of weights makes gathers shorter, with secondary shards
only the first gather of a step leaves the node, and coded gradients travel by all-to-all inside nodes and between them.

Zhang et al., *MiCS*, VLDB 2022; Rajbhandari et al., *ZeRO*, SC 2020 (ZeRO-3 is one copy on all ranks, flat rings).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.collectives.compressed.prices import Phase, Place, price_phases
from hpccomm.collectives.compressed.two_phase import CODES
from hpccomm.collectives.schedule import Algorithm
from hpccomm.layout import Link
from hpccomm.performance.cost import price
from hpccomm.performance.machine import Machine

RING = {name: ALGORITHMS[name]["ring"] for name in ("allreduce", "allgather", "reduce_scatter")}
STATE_BYTES = 16
"""A parameter's weights, gradient and Adam's moments."""


class Shape(NamedTuple):
    """The ranks, and the p of them that share a copy."""

    ranks: int
    per_node: int
    partition: int
    two_levels: bool = True
    """Groups of whole nodes gather and reduce in two levels."""

    @property
    def copies(self) -> int:
        """The number of copies, R."""
        return self.ranks // self.partition

    @property
    def crosses_nodes(self) -> bool:
        """Whether a copy lies on several nodes."""
        return self.partition > self.per_node


class Codes(NamedTuple):
    """What ZeRO++ sends between nodes: the arguments of :class:`~hpccomm.algorithms.sharded.units.ShardedModel`."""

    weight: str | None = None
    gradient: str | None = None
    secondary: bool = False


NO_CODES = Codes()


class Job(NamedTuple):
    """The training job."""

    parameters: float
    layers: int
    micro_steps: int
    forward_us: float
    """Forward time of a layer, for a micro-step of one rank."""
    recompute: bool = True
    """The backward pass repeats the forward pass."""
    word: int = 2
    """Bytes of a parameter and of its gradient on the wire, in the partition group."""
    shard_word: int = 4
    """Bytes of a gradient in the second hop."""
    codes: Codes = NO_CODES


class Cost(NamedTuple):
    """A step and its parts in microseconds; the parts overlap, so their sum exceeds the step."""

    step: float
    computing: float
    gathers: float
    first: float
    """Reduce-scatters."""
    second: float


class Volume(NamedTuple):
    """Bytes of a step, in multiples of M (the same word length in both hops)."""

    gathers: float
    first: float
    second: float

    @property
    def total(self) -> float:
        """All hops."""
        return sum(self)


def link_volume(
    shape: Shape, micro_steps: int, codes: Codes = NO_CODES, word: int = 2, *, flat_reduce: bool = False
) -> Volume:
    """Bytes through a node's link in each direction; parameters have ``word`` bytes where no code is given.

    A gather or reduction takes (p-k)/p in two levels, (p-1)/p if flat, 0 inside nodes; hop two 2(R-1)/R · k/p.  With
    ``flat_reduce`` only gathers take two levels, as in the paper.
    """
    p, k, copies, s = shape.partition, shape.per_node, shape.copies, micro_steps
    flat = (p - 1) / p if shape.crosses_nodes else 0.0
    two = (p - k) / p if shape.crosses_nodes and shape.two_levels else flat
    gathers = (1 if codes.secondary else 2 * s) * two * length(codes.weight, word)
    reduces = (p - k) / p * length(codes.gradient, word) if codes.gradient and flat else flat if flat_reduce else two
    return Volume(gathers, s * reduces, 2 * (copies - 1) / copies * k / p)


def length(code: str | None, word: int) -> float:
    """The bytes of a coded parameter, in multiples of ``word``."""
    elements = 1 << 20
    return CODES[code].nbytes(elements) / (elements * word) if code else 1.0


def gather_us(shape: Shape, nbytes: float, machine: Machine) -> float:
    """Time to gather one unit."""
    return group_us(RING["allgather"], hierarchical.build_allgather, shape, nbytes, machine)


def reduce_us(shape: Shape, nbytes: float, machine: Machine) -> float:
    """Time to reduce-scatter one unit."""
    return group_us(RING["reduce_scatter"], hierarchical.build_reduce_scatter, shape, nbytes, machine)


def price_coded_reduce(shape: Shape, nbytes: float, machine: Machine) -> float:
    """Time to reduce-scatter one unit of ``nbytes`` as coded: rows for the local ranks, then those for the nodes."""
    p, k = shape.partition, min(shape.partition, shape.per_node)
    inside = Place(1, k, machine.intra, machine.inter, machine.gamma)
    between = inside._replace(nodes=p // k, per_node=1, inter=Link(machine.inter.alpha, machine.inter.beta * k))
    last = price_phases([Phase("alltoall", nbytes / p)], between).us if shape.crosses_nodes else 0.0
    return price_phases([Phase("alltoall", nbytes / k)], inside).us + last


def later_gather_us(shape: Shape, nbytes: float, machine: Machine) -> float:
    """Time to gather one unit from secondary shards."""
    return gather_us(shape._replace(partition=shape.per_node), nbytes, machine)


def group_us(
    flat: Algorithm, build: Callable[[list[int]], Algorithm], shape: Shape, nbytes: float, machine: Machine
) -> float:
    """Time of one call in a partition group, in two levels where ``build`` makes them."""
    if shape.partition == 1:
        return 0.0
    nodes = (np.arange(shape.partition) // shape.per_node).tolist()
    two_levels = shape.crosses_nodes and shape.two_levels and shape.per_node > 1
    return price(build(nodes) if two_levels else flat, nodes, nbytes, machine).us


def second_us(shape: Shape, nbytes: float, machine: Machine) -> float:
    """Time of the second hop of a model whose gradients take ``nbytes``."""
    if shape.copies == 1:
        return 0.0
    shared = Link(machine.inter.alpha, machine.inter.beta * min(shape.per_node, shape.ranks))
    alone = Machine(machine.intra, shared, machine.gamma)
    return price(RING["allreduce"], list(range(shape.copies)), nbytes / shape.partition, alone).us


def step_cost(job: Job, shape: Shape, machine: Machine) -> Cost:
    """The predicted time of one optimizer step."""
    nbytes, s, codes = job.parameters * job.word / job.layers, job.micro_steps, job.codes
    gather = later = gather_us(shape, nbytes * length(codes.weight, job.word), machine)
    if codes.secondary and shape.crosses_nodes:
        later = later_gather_us(shape, nbytes, machine)
    reduces = price_coded_reduce if codes.gradient else reduce_us
    first = reduces(shape, nbytes * length(codes.gradient, job.word), machine)
    second = second_us(shape, job.parameters * job.shard_word, machine)
    back_us = job.forward_us * (3 if job.recompute else 2)
    forward = max(job.forward_us, gather) + (s - 1) * max(job.forward_us, later)
    step = job.layers * (forward + s * max(back_us, later + first)) + gather + second
    computing = s * job.layers * (job.forward_us + back_us)
    gathers = job.layers * (gather + (2 * s - 1) * later)
    return Cost(step, computing, gathers, s * job.layers * first, second)


def weak_scaling(job: Job, before: Shape, after: Shape, machine: Machine) -> float:
    """Throughput of a rank on ``after`` relative to ``before``, at constant work for each rank."""
    return step_cost(job, before, machine).step / step_cost(job, after, machine).step


def fit_latency(job: Job, before: Shape, after: Shape, machine: Machine, left: float) -> Machine:
    """The machine whose inter-node latency reduces throughput to ``left`` (bisection between 0 and 1 ms)."""
    low, high = 0.0, 1e3
    for _ in range(16):
        tried = machine._replace(inter=Link((low + high) / 2, machine.inter.beta))
        enough = weak_scaling(job, before, after, tried) > left
        low, high = (tried.inter.alpha, high) if enough else (low, tried.inter.alpha)
    return tried
