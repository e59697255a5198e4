"""Average a gradient over all ranks:  mpirun -n 4 python examples/allreduce_gradients.py"""

import numpy as np
from mpi4py import MPI

import hpccomm

comm = hpccomm.Communicator(MPI.COMM_WORLD)
gradient = np.full(1_000_000, comm.rank, np.float32)  # or a PyTorch tensor, a JAX array, ...

average = hpccomm.allreduce(gradient, op="mean", comm=comm)  # the same kind comes back
comm.Allreduce(MPI.IN_PLACE, gradient)  # or mpi4py's own spelling, without a copy

if comm.rank == 0:
    print(f"{comm.size} ranks: mean {average[0]}, sum {gradient[0]}")
