"""Who talks to whom, in which round, about which blocks; and everything that can be done with that."""

from __future__ import annotations

from hpccomm.collectives import butterfly, direct, ring, tree
from hpccomm.collectives.schedule import Algorithm, one_each, power_of_two, whole

ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "allreduce": {
        "ring": Algorithm(ring.allreduce, one_each),
        "butterfly": Algorithm(butterfly.halving_doubling, power_of_two, ordered=True),
        "doubling": Algorithm(butterfly.doubling, whole, ordered=True),
        "tree": Algorithm(tree.allreduce, whole, ordered=True, lanes=True),
        "chain": Algorithm(tree.chain_allreduce, whole, ordered=True, lanes=True),
        "double_tree": Algorithm(tree.double_allreduce, lambda p: 2, lanes=True),
        "direct": Algorithm(direct.allreduce, one_each),
    },
    "reduce_scatter": {
        "ring": Algorithm(ring.reduce_scatter, one_each),
        "butterfly": Algorithm(butterfly.reduce_scatter, one_each),
        "direct": Algorithm(direct.reduce_scatter, one_each),
    },
    "allgather": {
        "ring": Algorithm(ring.allgather, one_each),
        "butterfly": Algorithm(butterfly.allgather, one_each),
        "bruck": Algorithm(butterfly.bruck, one_each),
        "direct": Algorithm(direct.allgather, one_each),
    },
    "bcast": {
        "tree": Algorithm(tree.broadcast, whole, lanes=True),
        "chain": Algorithm(tree.chain_broadcast, whole, lanes=True),
        "ring": Algorithm(tree.scatter_ring, one_each),
    },
    "reduce": {
        "tree": Algorithm(tree.reduce, whole, lanes=True),
        "tree_in_order": Algorithm(tree.reduce_in_order, whole, ordered=True, lanes=True),
        "chain": Algorithm(tree.chain_reduce, whole, lanes=True),
    },
}
"""For each collective, its algorithms by name.  To add one is to add a row here and a row in the tests."""
