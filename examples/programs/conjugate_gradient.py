"""Conjugate gradients for Poisson's equation on a square: every dot product is an Allreduce of one new number.

    mpirun -n 4 python examples/programs/conjugate_gradient.py

A rank owns some rows of the grid and receives the rows next to its own from its neighbours.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=96, iterations=1000)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size, n = comm.Get_rank(), comm.Get_size(), args.size
up = rank - 1 if rank > 0 else MPI.PROC_NULL
down = rank + 1 if rank < size - 1 else MPI.PROC_NULL
mine = np.array_split(np.arange(n), size)[rank]


def dot(x, y):
    """The dot product of two vectors that are distributed over the ranks."""
    total = np.empty(1)
    comm.Allreduce(np.array([np.vdot(x, y)]), total, op=MPI.SUM)
    return total[0]


def laplace(x):
    """The five-point stencil, with zeros around the square."""
    padded = np.zeros((len(mine) + 2, n + 2))
    padded[1:-1, 1:-1] = x
    comm.Sendrecv(x[-1], dest=down, recvbuf=padded[0, 1:-1], source=up)
    comm.Sendrecv(x[0], dest=up, recvbuf=padded[-1, 1:-1], source=down)
    return 4 * x - padded[:-2, 1:-1] - padded[2:, 1:-1] - padded[1:-1, :-2] - padded[1:-1, 2:]


rows, columns = np.meshgrid((mine + 1) / (n + 1), (np.arange(n) + 1) / (n + 1), indexing="ij")
exact = rows * (1 - rows) * np.sin(3 * columns) * (1 - columns)
b = laplace(exact)

comm.Barrier()
start = MPI.Wtime()
x = np.zeros_like(b)
r = b.copy()
p = r.copy()
rho = dot(r, r)
target = 1e-20 * dot(b, b)
steps = 0
while rho > target and steps < args.iterations:
    q = laplace(p)
    alpha = rho / dot(p, q)
    x = x + alpha * p
    r = r - alpha * q
    rho, previous = dot(r, r), rho
    p = r + (rho / previous) * p
    steps += 1
seconds = MPI.Wtime() - start

error = comm.allreduce(np.abs(x - exact).max(), op=MPI.MAX)
bound = (n + 1) ** 2 / 19 * np.sqrt(rho)  # the residual by the smallest eigenvalue, 2 * pi^2 / (n + 1)^2
assert error < bound + 1e-12, f"the largest error is {error}, not below {bound}"
report(seconds, steps=steps, error=error)
