"""Average a gradient over all ranks:  mpirun -n 4 python examples/allreduce_gradients.py"""

import numpy as np
from mpi4py import MPI

import hpccomm

comm = hpccomm.Communicator(MPI.COMM_WORLD)
gradient = np.full(1_000_000, comm.rank, np.float32)  # or a PyTorch tensor, a JAX array, ...

average = hpccomm.allreduce(gradient, op="mean", comm=comm)  # the result has the type of the input
comm.Allreduce(MPI.IN_PLACE, gradient)  # or mpi4py's spelling, in place

if comm.rank == 0:
    print(f"{comm.size} ranks: mean {average[0]}, sum {gradient[0]}")
