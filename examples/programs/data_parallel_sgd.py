"""Stochastic gradient descent on data that is distributed over the ranks: Bcast of weights, Allreduce of gradients.

    mpirun -n 4 python examples/programs/data_parallel_sgd.py

Two layers learn which of several spirals a point belongs to.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=64, iterations=1500)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size = comm.Get_rank(), comm.Get_size()
rng = np.random.default_rng(rank)
CLASSES, HIDDEN = 3, 64


def spirals(count):
    """Points of spirals, and the number of the spiral."""
    labels = rng.integers(CLASSES, size=count)
    radius = rng.random(count)
    angle = 4 * radius + 2 * np.pi * labels / CLASSES + 0.1 * rng.standard_normal(count)
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return np.concatenate([x, x**2], axis=1).astype("f4"), labels


def forward(x):
    """The hidden layer, and the probability of each class."""
    hidden = np.tanh(x @ weights[0] + weights[1])
    scores = hidden @ weights[2] + weights[3]
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return hidden, powers / powers.sum(axis=1, keepdims=True)


def gradients(x, labels):
    """The gradients of the mean cross-entropy, one for each array of weights."""
    hidden, error = forward(x)
    error[np.arange(len(x)), labels] -= 1
    error /= len(x)
    back = (error @ weights[2].T) * (1 - hidden**2)
    return [x.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]


shapes = [(4, HIDDEN), (HIDDEN,), (HIDDEN, CLASSES), (CLASSES,)]
weights = [rng.normal(size=shape).astype("f4") for shape in shapes]  # different on every rank
x, labels = spirals(5000)

comm.Barrier()
start = MPI.Wtime()
for each in weights:
    comm.Bcast([each, MPI.FLOAT], root=0)
for _ in range(args.iterations):
    batch = rng.integers(len(x), size=args.size)
    for k, gradient in enumerate(gradients(x[batch], labels[batch])):
        mean = np.empty_like(gradient)
        comm.Allreduce(gradient, mean, op=MPI.SUM)
        weights[k] = weights[k] - np.float32(0.5 / size) * mean
seconds = MPI.Wtime() - start

for each in weights:
    assert all((other == each).all() for other in comm.allgather(each)), "ranks have different weights"
x, labels = spirals(2000)
right = comm.allreduce(int((forward(x)[1].argmax(axis=1) == labels).sum()))
assert right > 0.8 * 2000 * size or args.iterations < 1000, f"only {right} of {2000 * size} are right"
report(seconds, right=right, norm=sum(float((each.astype(float) ** 2).sum()) for each in weights))
