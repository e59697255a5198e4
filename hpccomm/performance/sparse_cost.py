"""Predicted times of exchanges of compressed gradients, for comparison with dense allreduces of the same vector.

*N nodes of k ranks, p = N·k; n float32 elements; d density; links as in* :mod:`hpccomm.performance.cost`.  What an
exchange sends and costs is :mod:`hpccomm.collectives.compressed.prices`, by which ``exchange="auto"`` chooses:

======================  =================================================================  ============================
exchange                messages                                                           bytes into a node
======================  =================================================================  ============================
``sparse``              allgather of indices and values: DGC, top-k                        8dn for each remote rank
``words``               allgather of words: GTC                                            4dn for each remote rank
``recursive_doubling``  SparCML: sums of two ranks, of four, …                             8dn k, 16dn k, … to 4nk
``split``               SparCML: a block of the indices to each rank, sums of blocks to    8dn(p-k)k/p, and the sums
                        all
``onebit``              allgather of signs: 1-bit SGD                                      n/8 for each remote rank
``onebit_phases``       a block of signs to each rank, signs of the means to all: 1-bit    n/4 k(p-k)/p at best
                        Adam
``int8``, ``mx``, …     likewise in blocks of 8 or 4 bits; ``block_mean`` on even nodes:   2n k(p-k)/p at best
                        ``+ node``
``node``                messages are gathered between nodes and then in them, or added     as ``sparse``; or as
                        inside the nodes and the sums between first ranks                  ``split`` or ``sparse`` on
                                                                                           first ranks
======================  =================================================================  ============================

In an allgather a message enters a node once.  ``+ node``: dense inside the nodes, compressed between their first ranks
(``exchange="leaders"``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from hpccomm.collectives.compressed.prices import (
    Phase,
    Place,
    choose_by_price,
    exact_phases,
    inside_and_between,
    path_phases,
    price_phases,
)
from hpccomm.collectives.compressed.two_phase import CODES
from hpccomm.performance.cost import Prediction, bus_factor, wire_limit
from hpccomm.performance.machine import Machine

HEADERS = 48
"""Bytes of the header and the lengths of a message."""
MESSAGES = {"DGC": ("sparse", 8), "GTC": ("words", 4)}
"""The row of a method's messages, and the bytes of an element in them."""


def place_on(nodes: int, per_node: int, machine: Machine) -> Place:
    """The ranks on a machine."""
    return Place(nodes, per_node, machine.intra, machine.inter, machine.gamma)


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


def flat_phases(n: float, density: float, place: Place) -> dict[str, list[Phase]]:
    """What is sent where every rank compresses its own vector."""
    exact, p = exact_phases(n, density * n, place), place.ranks

    def two_phases(nbytes: float) -> list[Phase]:
        return [Phase("alltoall", nbytes), Phase("allgather", nbytes)]

    found = {
        "sparse": exact["allgather"],
        "words": [Phase("allgather", 4 * density * n, sums=True)],
        "recursive_doubling": exact["recursive_doubling"],
        "split": exact["split"],
        "onebit": [Phase("allgather", n / 8, sums=True)],
        "onebit_phases": two_phases(n / 8 / p),
        **{name: two_phases(code.nbytes(math.ceil(n / p))) for name, code in CODES.items()},
    }
    return {name: [each._replace(nbytes=HEADERS + each.nbytes) for each in phases] for name, phases in found.items()}


def rows(exchanges: Mapping[str, list[Phase]], nbytes: float, place: Place, machine: Machine) -> Iterator[Prediction]:
    """The predictions for some exchanges, with the bandwidths of a dense allreduce of as many bytes."""
    limit = wire_limit("allreduce", place.nodes, place.per_node, nbytes, machine)
    for name, phases in exchanges.items():
        us, rounds = price_phases(phases, place)
        algbw = nbytes / us / 1e3 if us else 0.0
        busbw = algbw * bus_factor("allreduce", place.ranks)
        yield Prediction(name, us, rounds, 1, algbw, busbw, limit / us if us else 1.0)


def flat_predictions(
    nodes: int, per_node: int, nbytes: float, density: float, machine: Machine
) -> Iterator[Prediction]:
    """The exchanges in which every rank compresses its own vector."""
    place = place_on(nodes, per_node, machine)
    return rows(flat_phases(nbytes / 4, density, place), nbytes, place, machine)


def two_level_predictions(
    nodes: int, per_node: int, nbytes: float, density: float, machine: Machine
) -> Iterator[Prediction]:
    """The exchanges between the first ranks of nodes, after a dense sum and before a broadcast inside; and ``node``."""
    place, n = place_on(nodes, per_node, machine), nbytes / 4
    between = flat_phases(n, density, place_on(nodes, 1, machine))
    found = {f"{name} + node": inside_and_between(n, phases) for name, phases in between.items()}
    found["node"] = path_phases(n, density * n, 8 * density * n, place)["node"]
    return rows(found, nbytes, place, machine)


def choose_row(
    nodes: int, per_node: int, nbytes: float, density: float, element_bytes: float, machine: Machine
) -> Prediction:
    """The path that ``exchange="auto"`` takes for such messages, with its predicted time."""
    place, n = place_on(nodes, per_node, machine), nbytes / 4
    sent = n, density * n, HEADERS + element_bytes * density * n, place
    name = choose_by_price(*sent)
    return next(rows({name: path_phases(*sent)[name]}, nbytes, place, machine))


def dense_cost(nodes: int, per_node: int, nbytes: float, machine: Machine) -> float:
    """Microseconds of a dense allreduce."""
    return price_phases([Phase("allreduce", nbytes)], place_on(nodes, per_node, machine)).us


def price_sparse(nodes: int, per_node: int, nbytes: float, density: float, machine: Machine) -> float:
    """Microseconds of an allgather of indices and values."""
    phase = Phase("allgather", HEADERS + 2 * density * nbytes, sums=True)
    return price_phases([phase], place_on(nodes, per_node, machine)).us


def break_even(nodes: int, per_node: int, nbytes: float, machine: Machine | None = None) -> float:
    """The density at which ``sparse`` takes as long as a dense allreduce: 1 if it always pays, 0 if never.

    It is about 1/p: there the 8dn(p-1) bytes of an allgather equal the 8n(p-1)/p of a ring.
    """
    machine = machine or Machine()
    limit = dense_cost(nodes, per_node, nbytes, machine)

    def pays(density: float) -> bool:
        return price_sparse(nodes, per_node, nbytes, density, machine) <= limit

    low, high = 4 / nbytes, 1.0
    if pays(high):
        return 1.0
    if not pays(low):
        return 0.0
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low
