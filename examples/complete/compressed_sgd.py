"""Deep gradient compression that saves and resumes:  hpccomm-run -n 4 examples/complete/compressed_sgd.py --steps 200

Run it again with more steps: it continues from the folder ``saved`` with the bits of a run that was never interrupted.
"""

import argparse
from pathlib import Path

import numpy as np
from mpi4py import MPI

import hpccomm

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--folder", type=Path, default=Path("saved"))
args = parser.parse_args()

comm = hpccomm.Communicator(MPI.COMM_WORLD)
rng = np.random.default_rng(comm.rank)  # each rank has its own samples
truth = np.random.default_rng(99).standard_normal((200, 100)).astype("f4")
inputs = rng.standard_normal((2000, 200), dtype="f4")
targets = inputs @ truth

tensors = {"weight": np.zeros((200, 100), "f4"), "bias": np.zeros(100, "f4")}
bucket = hpccomm.Bucket(tensors)  # all tensors as one flat vector, in which gradients travel
weights = bucket.flatten(tensors)
method = hpccomm.chain(hpccomm.dgc(comm, bucket, density=0.01, warmup=40, clip=100.0), hpccomm.scale(-0.004))
state = method.init(weights)
step = np.zeros((), np.int64)

if comm.bcast((args.folder / "run.json").exists()):
    weights, state, step = hpccomm.load_set(comm, args.folder, "run", weights=weights, method=state, step=step)

model, gradient = bucket.views(weights), np.empty_like(weights)
slots = bucket.views(gradient)
while step < args.steps:
    rows = np.random.default_rng((comm.rank, int(step))).integers(0, len(inputs), 64)
    error = inputs[rows] @ model["weight"] + model["bias"] - targets[rows]
    slots["weight"][:] = inputs[rows].T @ error / len(rows)  # divided by this rank's samples: the exchange averages
    slots["bias"][:] = error.mean(axis=0)
    change, state = method.update(gradient, state, weights)
    weights += change  # in place, so that ``model`` sees it
    step = step + 1

hpccomm.save_set(comm, args.folder, "run", weights=weights, method=state, step=step)
cost = hpccomm.report(state).cost
if comm.rank == 0:
    dense = weights.nbytes * cost.exchanges
    print(f"step {step}: largest error {np.abs(model['weight'] - truth).max():.3f}")
    print(f"sent {cost.wire_bytes:,} bytes; the gradients themselves have {dense:,}")
