"""What the ten programs share: their flags, and the lines that they print at the end."""

import argparse

from mpi4py import MPI


def read_flags(doc: str, size: int, iterations: int) -> argparse.Namespace:
    """The size, the number of iterations, and whether plain mpi4py runs instead of hpccomm."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--size", type=int, default=size, help=f"default {size}")
    parser.add_argument("--iterations", type=int, default=iterations, help=f"default {iterations}")
    parser.add_argument("--mpi4py", action="store_true", help="plain mpi4py instead of hpccomm")
    return parser.parse_args()


def report(seconds: float, **result: object) -> None:
    """Rank 0 prints the time of the slowest rank's loop, and the result with all digits (collective)."""
    slowest = MPI.COMM_WORLD.reduce(seconds, MPI.MAX)
    if MPI.COMM_WORLD.rank == 0:
        print(f"loop: {slowest:.6f} s")
        print("result:", *(f"{name}={value}" for name, value in result.items()))
