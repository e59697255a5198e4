"""Jacobi's method with a dense matrix: every matrix-vector product gathers the vector with Allgatherv.

    mpirun -n 4 python examples/programs/matrix_vector.py

A rank owns some rows of the matrix and computes the same part of the next vector.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=500, iterations=2000)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size, n = comm.Get_rank(), comm.Get_size(), args.size

mine = np.array_split(np.arange(n), size)[rank]
counts = np.empty(size, dtype="i4")
comm.Allgather(np.array([len(mine)], dtype="i4"), counts)
displs = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype("i4")


def gather(part):
    """The whole vector."""
    whole = np.empty(n)
    comm.Allgatherv(part, [whole, counts, displs, MPI.DOUBLE])
    return whole


rng = np.random.default_rng(rank)
matrix = rng.random((len(mine), n))
diagonal = 1.05 * matrix.sum(axis=1)  # larger than the rest of its row: Jacobi's method converges
matrix[np.arange(len(mine)), mine] = 0
exact = np.linspace(-1, 1, n)
b = matrix @ exact + diagonal * exact[mine]

comm.Barrier()
start = MPI.Wtime()
x = np.zeros(n)
change = np.array([np.inf])
steps = 0
while change[0] > 1e-12 and steps < args.iterations:
    part = (b - matrix @ x) / diagonal
    change = np.array([np.abs(part - x[mine]).max()])
    comm.Allreduce(MPI.IN_PLACE, change, op=MPI.MAX)
    x = gather(part)
    steps += 1
seconds = MPI.Wtime() - start

error = np.abs(x - exact).max()
assert error < 20 * change[0] + 1e-12, f"the largest error is {error}"  # 20 = q / (1 - q), q = 1 / 1.05
same = np.empty(size * n)
comm.Allgather(x, same)
assert (same.reshape(size, n) == x).all(), "ranks have different vectors"
report(seconds, steps=steps, error=error, norm=np.abs(x).sum())
