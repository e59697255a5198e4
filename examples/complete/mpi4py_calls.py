"""Mean and spread of numbers on all ranks, in mpi4py's spelling:  hpccomm-run -n 4 examples/complete/mpi4py_calls.py"""

import numpy as np
from mpi4py import MPI

import hpccomm

comm = hpccomm.Communicator(MPI.COMM_WORLD)  # the only line of hpccomm

numbers = np.random.default_rng(comm.rank).normal(3.0, 2.0, 100_000)
sums = np.array([len(numbers), numbers.sum(), (numbers**2).sum()])
total = np.empty_like(sums)
comm.Allreduce(sums, total, op=MPI.SUM)
count, mean = total[0], total[1] / total[0]
spread = np.sqrt(total[2] / count - mean**2)

largest = np.empty(comm.size)
comm.Allgather(np.array([numbers.max()]), largest)  # one number from each rank
limits = np.array([mean - spread, mean + spread]) if comm.rank == 0 else np.empty(2)
comm.Bcast(limits, root=0)
inside = comm.allreduce(int(((limits[0] < numbers) & (numbers < limits[1])).sum()))  # Python objects, pickled

if comm.rank == 0:
    print(
        f"{count:.0f} numbers on {comm.size} ranks: mean {mean:.3f}, spread {spread:.3f}, largest {largest.max():.2f}"
    )
    print(f"{inside / count:.1%} lie within one spread of the mean")
