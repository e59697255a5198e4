"""Who talks to whom, in which round, about which blocks; and everything that can be done with that."""

from __future__ import annotations

from hpccomm.collectives import pairwise, recursive, ring, tree
from hpccomm.collectives.schedule import Algorithm, one_each, power_of_two, whole

ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "allreduce": {
        "ring": Algorithm(ring.allreduce, one_each),
        "butterfly": Algorithm(recursive.halving_doubling, power_of_two, ordered=True),
        "doubling": Algorithm(recursive.doubling, whole, ordered=True),
        "tree": Algorithm(tree.allreduce, whole, ordered=True, lanes=True),
        "chain": Algorithm(tree.chain_allreduce, whole, ordered=True, lanes=True),
        "double_tree": Algorithm(tree.double_allreduce, lambda p: 2, lanes=True),
        "direct": Algorithm(pairwise.allreduce, one_each),
    },
    "reduce_scatter": {
        "ring": Algorithm(ring.reduce_scatter, one_each),
        "butterfly": Algorithm(recursive.reduce_scatter, one_each),
        "direct": Algorithm(pairwise.reduce_scatter, one_each),
    },
    "allgather": {
        "ring": Algorithm(ring.allgather, one_each),
        "butterfly": Algorithm(recursive.allgather, one_each),
        "bruck": Algorithm(recursive.bruck, one_each),
        "direct": Algorithm(pairwise.allgather, one_each),
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
