"""Particles that fly through a ring of cells, one cell a rank: those that leave are sent with Alltoallv.

    mpirun -n 4 python examples/programs/particles.py

Positions and speeds are multiples of 1/1024, so that every sum of them is exact and the end is known.
"""

import numpy as np
from mpi4py import MPI
from shared import read_flags, report

import hpccomm

args = read_flags(__doc__, size=5_000, iterations=300)
comm = MPI.COMM_WORLD if args.mpi4py else hpccomm.Communicator(MPI.COMM_WORLD)
rank, size = comm.Get_rank(), comm.Get_size()
PARTICLE = np.dtype([("position", "f8"), ("speed", "f8"), ("number", "i8")])
FIELDS = len(PARTICLE.names)


def exchange(particles):
    """Send every particle to the rank in whose cell it is."""
    owner = particles["position"].astype(int)
    order = np.argsort(owner, kind="stable")
    send_counts = np.bincount(owner, minlength=size) * FIELDS
    recv_counts = np.zeros(size, dtype=send_counts.dtype)
    comm.Alltoall(send_counts, recv_counts)

    arrived = np.empty(recv_counts.sum() // FIELDS, dtype=PARTICLE)
    send, recv = particles[order].view("f8"), arrived.view("f8")
    comm.Alltoallv([send, send_counts, MPI.DOUBLE], [recv, recv_counts, MPI.DOUBLE])
    return arrived


rng = np.random.default_rng(rank)
particles = np.empty(args.size, dtype=PARTICLE)
particles["position"] = rank + rng.integers(1024, size=args.size) / 1024
particles["speed"] = rng.integers(-128, 129, size=args.size) / 1024
particles["number"] = np.arange(args.size) + rank * args.size
began = comm.allgather(particles)

comm.Barrier()
start = MPI.Wtime()
busiest = 0
for _ in range(args.iterations):
    particles["position"] = (particles["position"] + particles["speed"]) % size
    particles = exchange(particles)
    most = np.empty(1, dtype=int)
    comm.Allreduce(np.array([len(particles)]), most, op=MPI.MAX)
    busiest = max(busiest, most[0])
seconds = MPI.Wtime() - start

assert (particles["position"].astype(int) == rank).all(), "a particle is in the wrong cell"
ended = np.sort(np.concatenate(comm.allgather(particles)), order="number")
expected = np.concatenate(began)
expected["position"] = (expected["position"] + args.iterations * expected["speed"]) % size
assert (ended == expected).all(), "a particle was lost or is in the wrong place"
report(seconds, busiest=busiest, momentum=ended["speed"].sum(), centre=ended["position"].sum())
