"""BMUF: ranks train alone and average their models once a block.

hpccomm-run -n 4 examples/complete/block_momentum.py
"""

import numpy as np
from mpi4py import MPI

import hpccomm

comm = hpccomm.Communicator(MPI.COMM_WORLD)
rng = np.random.default_rng(comm.rank)
truth = np.linspace(-1, 1, 50)
inputs = rng.standard_normal((4000, 50))
targets = inputs @ truth + 0.01 * rng.standard_normal(4000)

local = hpccomm.chain(hpccomm.momentum(0.9), hpccomm.scale(-0.01))  # what a rank does alone, with the rate of one rank
method = hpccomm.bmuf(comm, local, period=20, warmup=20)

weights = hpccomm.broadcast(np.zeros(50), comm=comm)  # all ranks start from the same weights
state = method.init(weights)
for number in range(300):
    rows = np.random.default_rng((comm.rank, number)).integers(0, len(inputs), 32)
    gradient = inputs[rows].T @ (inputs[rows] @ weights - targets[rows]) / len(rows)  # by this rank's own samples
    step, state = method.update(gradient, state, weights)
    weights += step
step, state = method.finish(state, weights)  # the last, unfinished block
weights += step
model = method.export(state)  # the model of all ranks: test and save this one

cost = hpccomm.report(state).cost
if comm.rank == 0:
    print(f"largest error {np.abs(model - truth).max():.4f} after {cost.exchanges} exchanges in 300 steps")
