"""Least squares on data spread over the ranks:  mpirun -n 4 python examples/your_own_training.py

The calls of hpccomm are the chain, its ``init`` and its ``update``.
"""

import numpy as np
from mpi4py import MPI

import hpccomm

comm = hpccomm.Communicator(MPI.COMM_WORLD)
rng = np.random.default_rng(comm.rank)  # every rank has its own samples
truth = np.linspace(-1, 1, 20)
inputs = rng.standard_normal((1000, 20))
targets = inputs @ truth + 0.01 * rng.standard_normal(1000)

method = hpccomm.chain(
    hpccomm.mean(comm),  # the mean gradient of all ranks
    hpccomm.clip(10.0),
    hpccomm.momentum(0.9),
    hpccomm.scale(-0.02),
)
weights = hpccomm.broadcast(np.zeros(20), comm=comm)  # all ranks start from the same weights
state = method.init(weights)
for _ in range(200):
    gradient = inputs.T @ (inputs @ weights - targets) / len(targets)
    step, state = method.update(gradient, state, weights)
    weights += step

cost = hpccomm.report(state).cost
if comm.rank == 0:
    error = np.abs(weights - truth).max()
    print(f"{comm.size} ranks: largest error {error:.4f}, {cost.exchanges} exchanges, {cost.wire_bytes} bytes")
