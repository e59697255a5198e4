"""Collective algorithms as schedules, and the tools that run, verify and draw a schedule."""

from __future__ import annotations

from hpccomm.collectives import pairwise, recursive, ring, tree
from hpccomm.collectives.schedule import Algorithm, block_per_rank, one_block, power_of_two
from hpccomm.collectives.volume import FULL_VOLUME, HALF_VOLUME

ALGORITHMS: dict[str, dict[str, Algorithm]] = {
    "allreduce": {
        "ring": Algorithm(ring.allreduce, block_per_rank, volume=FULL_VOLUME),
        "butterfly": Algorithm(
            recursive.halving_doubling, power_of_two, ordered=True, volume=recursive.HALVING_DOUBLING
        ),
        "doubling": Algorithm(recursive.doubling, one_block, ordered=True, volume=recursive.DOUBLING),
        "tree": Algorithm(tree.allreduce, one_block, ordered=True, segmented=True, volume=tree.TREE_ALLREDUCE),
        "chain": Algorithm(tree.chain_allreduce, one_block, ordered=True, segmented=True, volume=tree.CHAIN_ALLREDUCE),
        "double_tree": Algorithm(tree.double_allreduce, lambda p: 2, segmented=True, volume=tree.DOUBLE_TREE),
        "direct": Algorithm(pairwise.allreduce, block_per_rank, volume=FULL_VOLUME),
    },
    "reduce_scatter": {
        "ring": Algorithm(ring.reduce_scatter, block_per_rank, volume=HALF_VOLUME),
        "butterfly": Algorithm(recursive.reduce_scatter, block_per_rank, volume=recursive.REDUCE_SCATTER),
        "direct": Algorithm(pairwise.reduce_scatter, block_per_rank, volume=HALF_VOLUME),
    },
    "allgather": {
        "ring": Algorithm(ring.allgather, block_per_rank, volume=HALF_VOLUME),
        "butterfly": Algorithm(recursive.allgather, block_per_rank, volume=recursive.ALLGATHER),
        "bruck": Algorithm(recursive.bruck, block_per_rank, volume=recursive.BRUCK),
        "direct": Algorithm(pairwise.allgather, block_per_rank, volume=HALF_VOLUME),
    },
    "bcast": {
        "tree": Algorithm(tree.broadcast, one_block, segmented=True, volume=tree.TREE_BROADCAST),
        "chain": Algorithm(tree.chain_broadcast, one_block, segmented=True, volume=tree.CHAIN),
        "ring": Algorithm(tree.scatter_ring, block_per_rank, volume=tree.SCATTER_RING),
    },
    "reduce": {
        "tree": Algorithm(tree.reduce, one_block, segmented=True, volume=tree.TREE_REDUCE),
        "tree_in_order": Algorithm(
            tree.reduce_in_order, one_block, ordered=True, segmented=True, volume=tree.REDUCE_IN_ORDER
        ),
        "chain": Algorithm(tree.chain_reduce, one_block, segmented=True, volume=tree.CHAIN),
    },
}
"""For each collective, its algorithms by name.  To add an algorithm is to write its generator and add a row here."""
