"""What compressed exchanges send and cost: one model for choices at run time, ``hpccomm predict`` and bench.

*N nodes of k ranks, p = N·k; m bytes of a rank's block, or of the vector; α, β and γ as in Hockney's model: a message
takes α + mβ, a sum of m bytes mγ; the ranks of a node share its link, and share memory inside it.*  An exchange is a
list of phases.  A phase is a dense collective with the time of its best schedule, in closed form (inside one node
α and β are those of shared memory, and the terms of its link are left out):

==============  ===========================================================  ==========================================
collective      between nodes                                                inside nodes
==============  ===========================================================  ==========================================
``allgather``   ⌈log₂N⌉α + (N-1)kmβ                                          α + (k-1)Nmβ
``alltoall``    (p-1)(α + mγ) + (p-k)kmβ
``allreduce``   2⌈log₂N⌉α + 2(N-1)/N mβ + (N-1)/N m/k γ                      2α + (k-1)/k m (2β + γ)
``sendrecv``    α + kmβ + mγ
``reduce``                                                                   ⌈log₂k⌉α + m (β + γ)
``bcast``                                                                    ⌈log₂k⌉α + mβ
``pass``                                                                     mγ
==============  ===========================================================  ==========================================

Only messages, sums of messages and what a path does to whole vectors beside (``pass``) are priced, not selection,
packing and decoding, which all paths have.  The closed forms agree with the
simulation of the schedules themselves (:mod:`hpccomm.performance.cost`) within 15 % where bytes decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from hpccomm.layout import ETHERNET, SHARED_MEMORY, Link

LONG = 1 << 16
"""Elements from which bytes, and not rounds, decide whether messages are worth it."""
PASSES = 5
"""What a dense sum inside the nodes adds to the work on whole vectors, counted with momentum: fifteen reads and writes
of one, of which a pass has three."""
DENSE_FROM = 4
"""A sparse vector with n/4 or more elements is sent dense: merging would cost more than adding."""
FORWARD = "forward"
"""The way of the path ``node`` that adds nothing before a rank has all messages."""
ALL, IN_NODE, BETWEEN_NODES = "all ranks", "the ranks of a node", "the first ranks of the nodes"


class Place(NamedTuple):
    """The ranks, N nodes of k, and their links; beta between nodes is that of the link that a node's ranks share."""

    nodes: int
    per_node: int
    intra: Link = SHARED_MEMORY
    inter: Link = ETHERNET
    gamma: float = 7.5e-5
    """Microseconds to sum one byte."""
    counted: int = 0
    """The number of ranks, where not every node has ``per_node``; 0 where it has."""

    @property
    def ranks(self) -> int:
        """p."""
        return self.counted or self.nodes * self.per_node

    def level(self, name: str) -> Place:
        """All ranks, those of a node, or the first ones of the nodes."""
        if name == ALL:
            return self
        even = self._replace(counted=0)
        if name == BETWEEN_NODES:
            return even._replace(per_node=1)
        moving = Link(self.intra.alpha, max(self.intra.beta, self.gamma))  # a fit to slow links says little of memory
        return even._replace(nodes=1, intra=moving)

    @property
    def has_nodes(self) -> bool:
        """Whether a node of several ranks exchanges with other nodes."""
        return self.nodes > 1 and self.per_node > 1


def place_of(comm: Any) -> Place:
    """The place of a communicator's ranks; ranks of nodes of their own where it does not know its nodes."""
    layout, machine = getattr(comm, "layout", None), getattr(comm, "machine", None)
    known = layout is not None and layout.size == comm.size
    place = Place(layout.count, max(layout.per_node)) if known and layout is not None else Place(comm.size, 1)
    if place.ranks != comm.size:
        place = place._replace(counted=comm.size)
    return place if machine is None else place._replace(intra=machine.intra, inter=machine.inter, gamma=machine.gamma)


class Cost(NamedTuple):
    """The price of an exchange."""

    us: float
    rounds: int


class Phase(NamedTuple):
    """A dense collective of an exchange."""

    collective: str
    """A row of ``COLLECTIVES``."""
    nbytes: float
    """Of a rank's block, or of the whole vector in a reduction or broadcast."""
    level: str = ALL
    sums: bool = False
    """Every rank adds the blocks of an allgather."""


def ceil_log2(p: int) -> int:
    """The rounds in which p ranks hear of each other."""
    return (p - 1).bit_length()


def price_allgather(at: Place, nbytes: float) -> Cost:
    """Between the nodes on all channels, then inside the nodes."""
    if at.nodes == 1:
        rounds = ceil_log2(at.per_node)
        return Cost(rounds * at.intra.alpha + (at.per_node - 1) * nbytes * at.intra.beta, rounds)
    rounds = ceil_log2(at.nodes)
    between = rounds * at.inter.alpha + (at.nodes - 1) * at.per_node * nbytes * at.inter.beta
    if at.per_node == 1:
        return Cost(between, rounds)
    inside = at.intra.alpha + (at.per_node - 1) * at.nodes * nbytes * at.intra.beta
    return Cost(between + inside, rounds + 1)


def price_alltoall(at: Place, nbytes: float) -> Cost:
    """One message after the other; the receiver adds them."""
    p, k = at.ranks, at.per_node
    link, crossing = (at.inter, k * (p - k)) if at.nodes > 1 else (at.intra, p - 1)
    return Cost((p - 1) * (link.alpha + nbytes * at.gamma) + crossing * nbytes * link.beta, p - 1)


def price_allreduce(at: Place, nbytes: float) -> Cost:
    """Reduce-scatter and allgather, inside the nodes and between them on all channels."""
    k, n = at.per_node, at.nodes
    inside, rounds = 0.0, 2 * ceil_log2(n)
    if k > 1:
        steps = 2 * ceil_log2(k) if n == 1 else 2
        inside = steps * at.intra.alpha + (k - 1) / k * nbytes * (2 * at.intra.beta + at.gamma)
        rounds += steps
    share = (n - 1) / n * nbytes
    between = 2 * ceil_log2(n) * at.inter.alpha + 2 * share * at.inter.beta + share / k * at.gamma
    return Cost(inside + between, rounds)


def price_sendrecv(at: Place, nbytes: float) -> Cost:
    """A message of every rank to another node, which adds it."""
    link = at.inter if at.nodes > 1 else at.intra
    return Cost(link.alpha + nbytes * ((at.per_node if at.nodes > 1 else 1) * link.beta + at.gamma), 1)


def price_bcast(at: Place, nbytes: float) -> Cost:
    """A pipeline."""
    link, rounds = (at.inter if at.nodes > 1 else at.intra), ceil_log2(at.ranks)
    return Cost(rounds * link.alpha + (nbytes * link.beta if rounds else 0), rounds)


def price_reduce(at: Place, nbytes: float) -> Cost:
    """A pipeline."""
    found = price_bcast(at, nbytes)
    return found._replace(us=found.us + (nbytes * at.gamma if found.rounds else 0))


def price_pass(at: Place, nbytes: float) -> Cost:
    """Each rank works on a vector once more: three reads or writes, as many as a sum has."""
    return Cost(nbytes * at.gamma, 0)


COLLECTIVES: dict[str, Callable[[Place, float], Cost]] = {
    "allgather": price_allgather,
    "alltoall": price_alltoall,
    "allreduce": price_allreduce,
    "sendrecv": price_sendrecv,
    "bcast": price_bcast,
    "reduce": price_reduce,
    "pass": price_pass,
}
"""``cost(place, bytes)``."""


def price_phases(phases: Iterable[Phase], place: Place) -> Cost:
    """Microseconds and rounds of an exchange."""
    us, rounds = 0.0, 0
    for each in phases:
        at = place.level(each.level)
        found = COLLECTIVES[each.collective](at, each.nbytes)
        us += found.us + (at.ranks - 1) * each.nbytes * at.gamma * each.sums
        rounds += found.rounds
    return Cost(us, rounds)


def cheapest(exchanges: Mapping[str, Iterable[Phase]], place: Place) -> str:
    """The first exchange within a tenth of the least time: the earlier ones add in rank order, or lose nothing."""
    times = {name: price_phases(phases, place).us for name, phases in exchanges.items()}
    return next(name for name, us in times.items() if us <= 1.1 * min(times.values()))


# What the exchanges send


def density_of_sum(density: float, ranks: int) -> float:
    """The density of the sum of ``ranks`` vectors with elements at random indices: 1 - (1-d)^r."""
    return 1 - (1 - min(1.0, density)) ** ranks


def exact_phases(
    n: float, count: float, place: Place, value_bytes: float = 4, index_bytes: float = 4
) -> dict[str, list[Phase]]:
    """The exact algorithms of :func:`~hpccomm.collectives.compressed.sparse.sparse_allreduce`.

    ``count`` pairs of index and value a rank of n elements at random indices; a sum is sent dense from density 1/4.
    """
    pair, p = value_bytes + index_bytes, place.ranks

    def bytes_of_sum(ranks: int, elements: float = n) -> float:
        filled = density_of_sum(count / max(n, 1), ranks)
        return elements * (pair * filled if filled * DENSE_FROM < 1 else value_bytes)

    # ranks beyond the last power of two send their vectors to others first, and get the sum at last
    rounds = [1 << each for each in range(p.bit_length() - 1)]
    beyond = p > 1 << len(rounds)
    doubling = [
        Phase("sendrecv", bytes_of_sum(each << beyond), IN_NODE if each < place.per_node else ALL) for each in rounds
    ]
    if beyond:
        doubling = [Phase("sendrecv", bytes_of_sum(1)), *doubling, Phase("sendrecv", bytes_of_sum(p))]
    return {
        "allgather": [Phase("allgather", pair * count, sums=True)],
        "recursive_doubling": doubling,
        "split": [Phase("alltoall", pair * count / p), Phase("allgather", bytes_of_sum(p, n / p))],
        "dense": [Phase("allreduce", value_bytes * n)],
    }


def lossy_phases(k: int, place: Place) -> dict[str, list[Phase]]:
    """The algorithms that keep the k largest elements of the sum."""
    p, rounds = place.ranks, ceil_log2(place.ranks)
    search = [Phase("allreduce", 8 * 256)] * 4 if p > 1 else []
    return {
        "ok_topk": [Phase("alltoall", 8 * k / p), *search, Phase("allgather", 8 * k / p)],
        "gtopk": [Phase("sendrecv", 8 * k)] * (2 * rounds),
    }


def inside_and_between(n: float, between: Iterable[Phase]) -> list[Phase]:
    """A dense float32 sum inside the nodes, phases between their first ranks, and a broadcast inside the nodes."""
    return [
        Phase("pass", PASSES * 4 * n, IN_NODE),
        Phase("reduce", 4 * n, IN_NODE),
        *(each._replace(level=BETWEEN_NODES) for each in between),
        Phase("bcast", 4 * n, IN_NODE),
    ]


def node_phases(n: float, elements: float, nbytes: float, place: Place) -> dict[str, list[Phase]]:
    """The ways of the path ``node``: even nodes may pass messages on, others add them inside the nodes."""
    leaders = place.level(BETWEEN_NODES)
    sums = exact_phases(n, n * density_of_sum(elements / max(n, 1), place.per_node), leaders)
    forward = {} if place.counted else {FORWARD: [Phase("allgather", nbytes, sums=True)]}
    return {**forward, "sum": inside_and_between(n, sums[cheapest(sums, leaders)])}


def path_phases(n: float, elements: float, nbytes: float, place: Place) -> dict[str, list[Phase]]:
    """The paths of :mod:`hpccomm.algorithms.message_paths` for messages of ``nbytes`` that name ``elements`` of n.

    The first of several within a tenth is taken: ``node``, which adds the same messages as ``allgather`` in the same
    order, has fewer rounds where that takes as long in its best schedule.
    """
    gather, exact = Phase("allgather", nbytes, sums=True), exact_phases(n, elements, place)
    found = {"allgather": [gather]}
    if place.has_nodes:
        ways = node_phases(n, elements, nbytes, place)
        name = cheapest(ways, place)
        node = {"node": ways[name]}
        found = node | found if name == FORWARD else found | node
    found |= {name: exact[name] for name in ("dense", "recursive_doubling", "split")}
    if place.has_nodes:
        found["leaders"] = inside_and_between(n, [gather])
    return found


def choose_by_price(n: float, elements: float, nbytes: float, place: Place) -> str:
    """The path of such messages by its price; that of the fewest messages for short vectors, or if nothing is known."""
    if n < LONG or not nbytes:
        return "node" if place.has_nodes else "allgather"
    return cheapest(path_phases(n, elements, nbytes, place), place)
