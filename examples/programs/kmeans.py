"""k-means of the colours of a picture, with the lower-case calls that pickle any Python object.

    mpirun -n 4 python examples/programs/kmeans.py

Colours are whole numbers, so sums over ranks are exact and all numbers of ranks find the same centres.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=40_000, iterations=200)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size = comm.Get_rank(), comm.Get_size()
PALETTE = np.array([[40, 40, 40], [200, 60, 50], [60, 180, 70], [50, 80, 210], [230, 220, 90], [150, 150, 160]])


def paint(count):
    """The pixels of a picture: colours of the palette with noise."""
    rng = np.random.default_rng(7)
    return (PALETTE[rng.integers(len(PALETTE), size=count)] + rng.integers(-60, 61, size=(count, 3))).clip(0, 255)


def choose_centres(pixels):
    """Pixels that are far from each other."""
    centres = [pixels[0]]
    while len(centres) < len(PALETTE):
        distances = [((pixels - centre) ** 2).sum(axis=1) for centre in centres]
        centres.append(pixels[np.min(distances, axis=0).argmax()])
    return np.array(centres, float)


picture = paint(args.size) if rank == 0 else None
pixels = comm.scatter(np.array_split(picture, size) if rank == 0 else None, root=0)
centres = comm.bcast(choose_centres(picture) if rank == 0 else None, root=0)

comm.Barrier()
start = MPI.Wtime()
labels = np.full(len(pixels), -1)
steps = 0
for _ in range(args.iterations):
    distances = (centres**2).sum(axis=1) - 2 * pixels @ centres.T
    previous, labels = labels, distances.argmin(axis=1)
    members = [pixels[labels == each] for each in range(len(centres))]
    sums = comm.allreduce(np.array([each.sum(axis=0) for each in members]), op=MPI.SUM)
    counts = comm.allreduce(np.array([len(each) for each in members]), op=MPI.SUM)
    centres = sums / np.maximum(counts, 1)[:, None]
    steps += 1
    if comm.allreduce(int((labels != previous).sum())) == 0:
        break
seconds = MPI.Wtime() - start

nearest = [np.abs(centres - colour).max(axis=1).min() for colour in PALETTE]
assert max(nearest) < 25, f"a colour is {max(nearest)} away from every centre"  # clipping and overlap move centres
parts = comm.gather((len(labels), labels.sum()), root=0)
if rank == 0:
    assert sum(count for count, _ in parts) == args.size == counts.sum()
report(seconds, steps=steps, counts=",".join(map(str, counts)), red=centres[:, 0].sum())
