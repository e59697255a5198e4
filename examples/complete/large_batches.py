"""LAMB whose trust ratio and weight decay leave biases alone:  hpccomm-run -n 4 examples/complete/large_batches.py"""

import numpy as np
from mpi4py import MPI

import hpccomm
from hpccomm.algorithms.lr_schedules import polynomial, sqrt_scaling, warm_up

STEPS, BATCH = 200, 2048  # samples of a step over all ranks

comm = hpccomm.Communicator(MPI.COMM_WORLD)
rng = np.random.default_rng(0)
truth = rng.standard_normal((40, 10))
tensors = {"w": rng.standard_normal((40, 10)) / 6, "b": np.zeros(10)}  # the same on all ranks

bucket = hpccomm.Bucket(tensors)  # a tensor of one dimension neither decays nor adapts
rate = warm_up(20, polynomial(sqrt_scaling(0.01, BATCH, 256), STEPS - 20))
method = hpccomm.chain(hpccomm.mean(comm), hpccomm.lamb(bucket, rate, weight_decay=1e-4, adapt="flags", decay="flags"))

weights = bucket.flatten(tensors)
state = method.init(weights)
model, gradient = bucket.views(weights), np.empty_like(weights)
slots = bucket.views(gradient)
for step in range(STEPS):
    inputs = np.random.default_rng((comm.rank, step)).standard_normal((BATCH // comm.size, 40))
    error = inputs @ model["w"] + model["b"] - (inputs @ truth + 1.0)
    slots["w"][:], slots["b"][:] = inputs.T @ error / len(inputs), error.mean(axis=0)
    change, state = method.update(gradient, state, weights)
    weights += change

if comm.rank == 0:
    print(f"largest error of w {np.abs(model['w'] - truth).max():.3f}, of b {np.abs(model['b'] - 1).max():.3f}")
    for entry in bucket.table:
        print(f"{entry.name}: decays {entry.decay}, adapts {entry.adapt}")
