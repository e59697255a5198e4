"""The heat equation in Fourier space: a two-dimensional FFT of distributed rows, transposed by Alltoall.

    mpirun -n 4 python examples/programs/fft_transpose.py

A rank transforms its rows, sends every rank a square block, and transforms its rows of the transposed matrix.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=256, iterations=30)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size = comm.Get_rank(), comm.Get_size()
rows = max(1, args.size // size)
n = rows * size
mine = np.arange(rank * rows, (rank + 1) * rows)
TIME = 1e-3


def transpose(block):
    """My rows of the transposed matrix."""
    send = block.reshape(rows, size, rows).swapaxes(0, 1).copy()
    recv = np.empty_like(send)
    comm.Alltoall(send, recv)
    return recv.reshape(n, rows).T.copy()


def wave(time):
    """Two waves, which shrink at different speeds."""
    x, y = np.meshgrid(2 * np.pi * mine / n, 2 * np.pi * np.arange(n) / n, indexing="ij")
    return np.exp(-5 * time) * np.sin(x) * np.cos(2 * y) + np.exp(-10 * time) * np.cos(3 * x + y)


k = np.fft.fftfreq(n, 1 / n)
decay = np.exp(-TIME * (k[mine, None] ** 2 + k[None, :] ** 2))  # of the transposed matrix, and it is symmetric
u = wave(0).astype(complex)

comm.Barrier()
start = MPI.Wtime()
for _ in range(args.iterations):
    spectrum = np.fft.fft(transpose(np.fft.fft(u, axis=1)), axis=1)
    spectrum *= decay
    u = np.fft.ifft(transpose(np.fft.ifft(spectrum, axis=1)), axis=1)
seconds = MPI.Wtime() - start

error = comm.allreduce(np.abs(u - wave(args.iterations * TIME)).max(), op=MPI.MAX)
checksum = comm.allreduce(np.abs(u).max(), op=MPI.MAX)
assert error < 1e-14 * (10 + args.iterations), f"the largest error is {error}"  # a few roundings in each step
report(seconds, error=error, largest=checksum)
