"""PageRank of a random web: Reduce_scatter sums what the pages of all ranks give to each page.

    mpirun -n 4 python examples/programs/pagerank.py

A rank owns some pages with their outgoing links.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=40_000, iterations=200)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size, n = comm.Get_rank(), comm.Get_size(), args.size
DAMPING = 0.85

counts = [len(each) for each in np.array_split(np.arange(n), size)]
mine = counts[rank]
rng = np.random.default_rng(rank)
degree = rng.integers(0, 10, size=mine)  # one page in ten has no links: what it has goes to all pages
source = np.repeat(np.arange(mine), degree)
target = (n * rng.random(len(source)) ** 3).astype(int)  # the first pages are popular


def step(score):
    """The next scores of my pages."""
    share = score / np.maximum(degree, 1)
    given = np.bincount(target, weights=share[source], minlength=n)
    received = np.empty(mine)
    comm.Reduce_scatter(given, received, counts, op=MPI.SUM)
    without_links = np.array(score[degree == 0].sum())
    comm.Allreduce(MPI.IN_PLACE, without_links)
    return (1 - DAMPING + DAMPING * without_links) / n + DAMPING * received


comm.Barrier()
start = MPI.Wtime()
score = np.full(mine, 1 / n)
steps = 0
while steps < args.iterations:
    previous, score = score, step(score)
    change = np.empty(1)
    comm.Allreduce(np.abs(score - previous).sum(keepdims=True), change)
    steps += 1
    if change[0] < 1e-12:
        break
seconds = MPI.Wtime() - start

total = comm.allreduce(score.sum())
assert abs(total - 1) < 1e-12, f"the scores sum to {total}"  # rounding of n numbers around 1 / n
residual = comm.allreduce(np.abs(step(score) - score).sum())
assert residual < 1e-12 or steps == args.iterations, f"a further step changes the scores by {residual}"
score, page = comm.allreduce((score.max(), sum(counts[:rank]) + score.argmax()), op=MPI.MAXLOC)
report(seconds, steps=steps, page=page, score=score)
