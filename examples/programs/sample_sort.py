"""Sample sort: Allgather of samples, Alltoall of counts, Alltoallv of the numbers themselves.

    mpirun -n 4 python examples/programs/sample_sort.py

Afterwards rank 0 holds the smallest numbers, in order, and the last rank the largest.
"""

from itertools import pairwise

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=20_000, iterations=100)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size = comm.Get_rank(), comm.Get_size()
rng = np.random.default_rng(rank)


def sort(numbers):
    """My part of all ranks' numbers in order."""
    numbers = np.sort(numbers)
    samples = numbers[np.linspace(0, len(numbers) - 1, size + 1).astype(int)[1:]]
    every = np.empty(size * size, dtype=numbers.dtype)
    comm.Allgather(samples, every)
    splitters = np.sort(every)[size - 1 :: size][:-1]

    cuts = np.concatenate([[0], np.searchsorted(numbers, splitters), [len(numbers)]])
    send_counts = np.diff(cuts).astype("i4")
    recv_counts = np.empty(size, dtype="i4")
    comm.Alltoall(send_counts, recv_counts)

    mine = np.empty(recv_counts.sum(), dtype=numbers.dtype)
    comm.Alltoallv([numbers, send_counts], [mine, recv_counts])
    return np.sort(mine)


def check(numbers, mine):
    """Compare the ends with those of the neighbours; nothing may be lost."""
    ends = comm.allgather((mine[0], mine[-1]) if len(mine) else None)
    ends = [each for each in ends if each]
    assert all(np.diff(mine) >= 0)
    assert all(before[1] <= after[0] for before, after in pairwise(ends))
    lost = np.array([len(numbers) - len(mine), numbers.sum() - mine.sum(), (numbers**2).sum() - (mine**2).sum()])
    comm.Allreduce(MPI.IN_PLACE, lost)
    assert not lost.any(), f"lost or changed: {lost}"


comm.Barrier()
start = MPI.Wtime()
longest = 0
for _ in range(args.iterations):
    numbers = rng.integers(1_000_000, size=args.size)
    mine = sort(numbers)
    longest = max(longest, len(mine))
seconds = MPI.Wtime() - start

check(numbers, mine)
middle = comm.bcast(mine[len(mine) // 2] if len(mine) else -1, root=size // 2)
report(seconds, longest=comm.allreduce(longest, op=MPI.MAX), middle=middle)
