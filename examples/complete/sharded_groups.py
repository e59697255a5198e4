"""MiCS with two groups: each half of the ranks holds one copy of the model states, divided over its ranks.

hpccomm-run -n 4 examples/complete/sharded_groups.py

A *unit* is a part of the model that is gathered at once, such as a layer.  Its weights exist only between ``gather``
and ``release``.
"""

import numpy as np
from mpi4py import MPI

import hpccomm
from hpccomm.algorithms.sharded.units import adamw

comm = hpccomm.Communicator(MPI.COMM_WORLD)
if comm.size % 2:
    raise SystemExit("start an even number of ranks: there are two groups")
rng = np.random.default_rng(0)
layers = [f"layer{number}" for number in range(3)]
units = {name: {"w": rng.standard_normal((32, 32)) / 6, "b": np.zeros(32)} for name in layers}  # the same on all ranks
states = hpccomm.mics(comm, units, adamw(3e-3), partition_size=comm.size // 2)

teacher = np.random.default_rng(7).standard_normal((32, 32)) / 6
samples = np.random.default_rng((1, comm.rank))
first = last = 0.0
for _ in range(60):
    inputs = samples.standard_normal((64, 32))
    activity, kept = inputs, []
    for name, ahead in zip(layers, [*layers[1:], None], strict=True):  # forward; the next unit is prefetched
        weights = states.gather(name, ahead=ahead)
        kept.append(activity)
        activity = np.tanh(activity @ weights["w"] + weights["b"])
        states.release(name)
    error = activity - np.tanh(inputs @ teacher)
    loss = float((error**2).mean())
    flow = 2 * error / error.size
    for number, name in reversed(list(enumerate(layers))):  # backward
        weights, gradient = states.gather(name), states.gradient(name)
        flow = flow * (1 - activity**2)
        gradient["w"][:], gradient["b"][:] = kept[number].T @ flow, flow.sum(axis=0)
        flow, activity = flow @ weights["w"].T, kept[number]
        states.release(name)
        states.reduce_accumulate(name, gradient)  # inside the group
    states.boundary()  # between the groups, then Adam on this rank's shard
    first, last = first or loss, loss

losses = comm.allreduce(np.array([first, last])) / comm.size
if comm.rank == 0:
    print(f"2 groups of {comm.size // 2}: loss {losses[0]:.4f}, after 60 steps {losses[1]:.4f}")
    print(f"model states of rank 0: {states.memory.states:,} bytes")
states.close()
