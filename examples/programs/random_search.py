"""The lowest point of a bumpy function by random search: MINLOC finds the rank that has it, Bcast sends it to all.

    mpirun -n 4 python examples/programs/random_search.py

The ranks search around the best point so far; every rank keeps the points that it found, and Gatherv collects them.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=500, iterations=2000)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size = comm.Get_rank(), comm.Get_size()
rng = np.random.default_rng(100 + rank)
PAIR = np.dtype([("value", "f8"), ("rank", "i4")], align=True)
DIMENSIONS = 3


def height(x):
    """Rastrigin's function: bumps on a bowl, 0 at the origin."""
    return 10 * DIMENSIONS + (x**2 - 10 * np.cos(2 * np.pi * x)).sum(axis=-1)


comm.Barrier()
start = MPI.Wtime()
best, lowest, radius = np.full(DIMENSIONS, 4.3), np.inf, 4.0
found = []
for _ in range(args.iterations):
    points = best + radius * rng.uniform(-1, 1, size=(args.size, DIMENSIONS))
    heights = height(points)
    here = heights.argmin()

    mine = np.array([(heights[here], rank)], dtype=PAIR)
    winner = np.empty(1, dtype=PAIR)
    comm.Allreduce([mine, 1, MPI.DOUBLE_INT], [winner, 1, MPI.DOUBLE_INT], op=MPI.MINLOC)
    if winner["value"][0] < lowest:
        lowest = winner["value"][0]
        best = points[here].copy()
        comm.Bcast([best, MPI.DOUBLE], root=winner["rank"][0])
        if winner["rank"][0] == rank:
            found.append([lowest, *best])
    else:
        radius = max(0.99 * radius, 1e-6)
seconds = MPI.Wtime() - start

mine = np.array(found, float).reshape(-1, DIMENSIONS + 1)
counts = np.empty(size, dtype="i4") if rank == 0 else None
comm.Gather(np.array([mine.size], dtype="i4"), counts, root=0)
everything = np.empty(counts.sum()) if rank == 0 else None
comm.Gatherv(mine, [everything, counts] if rank == 0 else None, root=0)
if rank == 0:
    history = everything.reshape(-1, DIMENSIONS + 1)
    last = history[history[:, 0].argmin()]
    assert last[0] == lowest == height(last[1:]), "the best point has another height"
    assert len(np.unique(history[:, 0])) == len(history), "two ranks were the best at the same time"
assert lowest < 1e-9 or args.iterations < 2000, f"the lowest point is 0, not {lowest}"
report(seconds, lowest=lowest, improvements=counts.sum() // (DIMENSIONS + 1) if rank == 0 else 0)
