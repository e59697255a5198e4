"""The heat equation on a periodic grid: halo exchange on a Cartesian communicator, and a residual in every step.

    mpirun -n 4 python examples/programs/heat.py

A wave that fits into the grid only shrinks, in every step by the same factor, so the result is known.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=256, iterations=500)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
n = args.size
cart = comm.Create_cart(MPI.Compute_dims(comm.size, 2), periods=[True, True])
north, south = cart.Shift(0, 1)
west, east = cart.Shift(1, 1)
my_rows, my_columns = (
    np.array_split(np.arange(n), parts)[at] for parts, at in zip(cart.dims, cart.coords, strict=True)
)
RATE = 0.2


def exchange(u):
    """Fill the border of u with the cells of the neighbours."""
    cart.Sendrecv(u[-2], dest=south, recvbuf=u[0], source=north)
    cart.Sendrecv(u[1], dest=north, recvbuf=u[-1], source=south)
    column = np.empty(len(u))
    cart.Sendrecv(u[:, -2].copy(), dest=east, recvbuf=column, source=west)
    u[:, 0] = column
    cart.Sendrecv(u[:, 1].copy(), dest=west, recvbuf=column, source=east)
    u[:, -1] = column


def wave(rows, columns):
    """The wave at the beginning."""
    return np.outer(np.cos(2 * np.pi * rows / n), np.cos(2 * np.pi * columns / n))


u = np.zeros((len(my_rows) + 2, len(my_columns) + 2))
u[1:-1, 1:-1] = wave(my_rows, my_columns)

comm.Barrier()
start = MPI.Wtime()
residual = np.empty(1)
for _ in range(args.iterations):
    exchange(u)
    change = RATE * (u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:] - 4 * u[1:-1, 1:-1])
    u[1:-1, 1:-1] += change
    cart.Allreduce(np.array([np.abs(change).max()]), residual, op=MPI.MAX)
seconds = MPI.Wtime() - start

factor = 1 - 4 * RATE * (1 - np.cos(2 * np.pi / n))
expected = factor**args.iterations * wave(my_rows, my_columns)
error = comm.allreduce(np.abs(u[1:-1, 1:-1] - expected).max(), op=MPI.MAX)
assert error < 1e-15 * (10 + args.iterations), f"the largest error is {error}"  # a rounding or so in each step
report(seconds, residual=residual[0], error=error)
