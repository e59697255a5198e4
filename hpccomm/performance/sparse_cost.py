"""Prices exchanges of compressed gradients on a machine, for comparison with dense allreduces of the same vector.

*N nodes of k ranks, p = N·k; n float32 elements; d density; links as in* :mod:`hpccomm.performance.cost`.  Only
messages are priced, not selection, packing and addition on the ranks.  What an exchange sends is what ``auto`` prices
at run time, on one link (:func:`~hpccomm.collectives.compressed.sparse.phases`).

====================  =====================================================================  ===========================
exchange              messages                                                               bytes into a node
====================  =====================================================================  ===========================
``sparse``            allgather of indices and values: DGC, top-k                            8dn for each remote rank
``words``             allgather of words: GTC                                                4dn for each remote rank
``split``             SparCML: a block of the indices to each rank, sums of blocks to all    8dn(p-k)k/p, and the sums
``onebit``            allgather of signs: 1-bit SGD                                          n/8 for each remote rank
``onebit_phases``     a block of signs to each rank, signs of the means to all: 1-bit Adam   n/4 k(p-k)/p at best
====================  =====================================================================  ===========================

In a flat allgather each rank of a node receives its own copy of a message; in a hierarchical one it enters a node once.
``+ node``: dense inside the nodes, compressed between them
(:func:`~hpccomm.collectives.compressed.sparse.hierarchical_allreduce`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

from hpccomm.collectives.compressed.sparse import Phase, phases
from hpccomm.performance.cost import Prediction, bus_factor, predict, prediction, wire_limit
from hpccomm.performance.machine import Machine

HEADERS = 48
"""Bytes of the header and the lengths of a message."""


def predictions(
    nodes: int, per_node: int, nbytes: float, density: float, machine: Machine | None = None
) -> list[Prediction]:
    """The predictions for all exchanges of ``nbytes`` of float32 on ``nodes`` x ``per_node`` ranks, the fastest first.

    ``wire`` relates to the least time of a dense allreduce, so it exceeds 100 % where compression pays.
    """
    machine = machine or Machine()
    found = list(flat_predictions(nodes, per_node, nbytes, density, machine))
    if nodes > 1 and per_node > 1:
        found += two_level_predictions(nodes, per_node, nbytes, density, machine)
    return sorted(found, key=lambda each: each.us)


def flat_predictions(
    nodes: int, per_node: int, nbytes: float, density: float, machine: Machine
) -> Iterator[Prediction]:
    """The exchanges in which every rank compresses its own vector."""
    n, p = nbytes / 4, nodes * per_node
    row = partial(exchange_prediction, nodes, per_node, nbytes, machine)

    sparse = phases(n, density * n, p, 4, 8)
    ways = {
        "sparse": sparse["allgather"],
        "words": [Phase("allgather", 4 * density * n)],
        "split": sparse["split"],
        "onebit": [Phase("allgather", n / 8)],
        "onebit_phases": [Phase("alltoall", n / 8 / p), Phase("allgather", n / 8 / p)],
    }
    for name, steps in ways.items():
        costs = [COSTS[each.collective](nodes, per_node, HEADERS + each.nbytes, machine) for each in steps]
        yield row(name, sum(us for us, _ in costs), sum(rounds for _, rounds in costs))


def exchange_prediction(
    nodes: int, per_node: int, nbytes: float, machine: Machine, name: str, us: float, rounds: int
) -> Prediction:
    """The prediction for an exchange, with the bandwidths of a dense allreduce of as many bytes."""
    algbw = nbytes / us / 1e3 if us else 0.0
    limit = wire_limit("allreduce", nodes, per_node, nbytes, machine)
    busbw = algbw * bus_factor("allreduce", nodes * per_node)
    return Prediction(name, us, rounds, 1, algbw, busbw, limit / us if us else 1.0)


def two_level_predictions(
    nodes: int, per_node: int, nbytes: float, density: float, machine: Machine
) -> Iterator[Prediction]:
    """The exchanges between the first ranks of nodes, after a dense reduce and before a broadcast inside the nodes."""
    inside = sum(
        min(prediction(name, what, 1, per_node, nbytes, machine).us for name in ("tree", "chain"))
        for what in ("reduce", "bcast")
    )
    for each in flat_predictions(nodes, 1, nbytes, density, machine):
        name, rounds = f"{each.algorithm} + node", each.rounds + 2
        yield exchange_prediction(nodes, per_node, nbytes, machine, name, each.us + inside, rounds)


def allgather_cost(nodes: int, per_node: int, each: float, machine: Machine) -> tuple[float, int]:
    """Microseconds and rounds of an allgather of ``each`` bytes a rank."""
    best = predict("allgather", nodes, per_node, nodes * per_node * each, machine)[0]
    return best.us, best.rounds


def alltoall_cost(nodes: int, per_node: int, each: float, machine: Machine) -> tuple[float, int]:
    """Microseconds and rounds of an all-to-all of ``each`` bytes a message, one message after the other."""
    p = nodes * per_node
    link, crossing = (machine.inter, per_node * (p - per_node)) if nodes > 1 else (machine.intra, p - 1)
    return (p - 1) * link.alpha + crossing * each * link.beta, p - 1


COSTS = {"allgather": allgather_cost, "alltoall": alltoall_cost}


def dense_cost(nodes: int, per_node: int, nbytes: float, machine: Machine) -> float:
    """Microseconds of the best dense allreduce."""
    return predict("allreduce", nodes, per_node, nbytes, machine)[0].us


def break_even(nodes: int, per_node: int, nbytes: float, machine: Machine | None = None) -> float:
    """The density at which ``sparse`` takes as long as the best dense allreduce: 1 if it always pays, 0 if never.

    It is about 1/p: there the 8dn(p-1) bytes of an allgather equal the 8n(p-1)/p of a ring.
    """
    machine = machine or Machine()
    limit = dense_cost(nodes, per_node, nbytes, machine)

    def pays(density: float) -> bool:
        return allgather_cost(nodes, per_node, HEADERS + 2 * density * nbytes, machine)[0] <= limit

    low, high = 4 / nbytes, 1.0
    if pays(high):
        return 1.0
    if not pays(low):
        return 0.0
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low
