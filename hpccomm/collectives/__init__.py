"""Who talks to whom, in which round, about which blocks; and everything that can be done with that."""

from __future__ import annotations

from hpccomm.collectives import pairwise, recursive, ring, tree
from hpccomm.collectives.schedule import Algorithm, block_per_rank, one_block, power_of_two

ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "allreduce": {
        "ring": Algorithm(ring.allreduce, block_per_rank),
        "butterfly": Algorithm(recursive.halving_doubling, power_of_two, ordered=True),
        "doubling": Algorithm(recursive.doubling, one_block, ordered=True),
        "tree": Algorithm(tree.allreduce, one_block, ordered=True, segmented=True),
        "chain": Algorithm(tree.chain_allreduce, one_block, ordered=True, segmented=True),
        "double_tree": Algorithm(tree.double_allreduce, lambda p: 2, segmented=True),
        "direct": Algorithm(pairwise.allreduce, block_per_rank),
    },
    "reduce_scatter": {
        "ring": Algorithm(ring.reduce_scatter, block_per_rank),
        "butterfly": Algorithm(recursive.reduce_scatter, block_per_rank),
        "direct": Algorithm(pairwise.reduce_scatter, block_per_rank),
    },
    "allgather": {
        "ring": Algorithm(ring.allgather, block_per_rank),
        "butterfly": Algorithm(recursive.allgather, block_per_rank),
        "bruck": Algorithm(recursive.bruck, block_per_rank),
        "direct": Algorithm(pairwise.allgather, block_per_rank),
    },
    "bcast": {
        "tree": Algorithm(tree.broadcast, one_block, segmented=True),
        "chain": Algorithm(tree.chain_broadcast, one_block, segmented=True),
        "ring": Algorithm(tree.scatter_ring, block_per_rank),
    },
    "reduce": {
        "tree": Algorithm(tree.reduce, one_block, segmented=True),
        "tree_in_order": Algorithm(tree.reduce_in_order, one_block, ordered=True, segmented=True),
        "chain": Algorithm(tree.chain_reduce, one_block, segmented=True),
    },
}
"""For each collective, its algorithms by name.  To add one is to add a row here and a row in the tests."""
