"""What a call costs beyond native MPI's, for each of many spellings of mpi4py's documentation and tutorial.

Each spelling is the text of a call; ``tests/test_spellings.py`` runs the same table against mpi4py.  A launch times
native MPI and ours in turns, and takes the least time of each: on a machine with other work everything else is waiting.
"""

from __future__ import annotations

import argparse
import array
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness

SPELLINGS = """
comm.Allreduce(x, y)
comm.Allreduce(x, y, op=MPI.MAX)
comm.Allreduce([x, MPI.DOUBLE], [y, MPI.DOUBLE], op=MPI.SUM)
comm.Allreduce([x, 'd'], [y, 'd'])
comm.Allreduce([x, 'f8'], [y, 'f8'])
comm.Allreduce([x, 3, MPI.DOUBLE], [y, 3, MPI.DOUBLE])
comm.Allreduce([x, 2, 1, MPI.DOUBLE], [y, 2, 2, MPI.DOUBLE])
comm.Allreduce((x, 3), (y, 3))
comm.Allreduce(x[1:3], y[2:])
comm.Allreduce(MPI.IN_PLACE, x)
comm.Allreduce(MPI.IN_PLACE, [x, MPI.DOUBLE])
comm.Allreduce(None, x)
comm.Allreduce(np.array([r]), k)
comm.Allreduce(np.float64(r), y[:1])
comm.Allreduce(np.array(3.0), number)
comm.Allreduce([i, MPI.INT], [j, MPI.INT], op=MPI.PROD)
comm.Allreduce([i, MPI.INT if r else MPI.INT32_T], [j, MPI.INT if r else 'i4'])
comm.Allreduce([x, MPI.DOUBLE] if r else x, [y, 4, 'd'] if r else y)
comm.Allreduce(flags, seen, op=MPI.LOR)
comm.Allreduce([z, MPI.C_DOUBLE_COMPLEX], [w, MPI.C_DOUBLE_COMPLEX])
comm.Allreduce([i, MPI.INTEGER], [j, MPI.INTEGER])
comm.Allreduce(array.array('d', [1, r]), numbers)
comm.Allreduce(memoryview(x), memoryview(y))
comm.Allreduce(tensor, other)
comm.Allreduce(m, n)
comm.Allreduce(m.T, n.T)
comm.Allreduce([a, 2, MPI.DOUBLE_INT], [b, 2, MPI.DOUBLE_INT], op=MPI.MINLOC)
comm.Allreduce([a, MPI.DOUBLE_INT], [b, MPI.DOUBLE_INT], op=MPI.MAXLOC)
comm.Allreduce((a, 3, MPI.DOUBLE_INT), (b, 3, MPI.DOUBLE_INT), op=MPI.MINLOC)
comm.Allreduce([a, 1, 2, MPI.DOUBLE_INT], [b, 1, 1, MPI.DOUBLE_INT], op=MPI.MINLOC)
comm.Allreduce(MPI.IN_PLACE, [a, 1, MPI.DOUBLE_INT], op=MPI.MAXLOC)
comm.Allreduce([table, MPI.TWOINT], [table2, MPI.TWOINT], op=MPI.MINLOC)
comm.Allreduce([raw, MPI.FLOAT_INT], [raw2, MPI.FLOAT_INT], op=MPI.MAXLOC)
comm.Allreduce([shorts, MPI.SHORT_INT], [shorts2, MPI.SHORT_INT], op=MPI.MINLOC)
comm.Allreduce([longs, MPI.LONG_INT], [longs2, MPI.LONG_INT], op=MPI.MINLOC)
comm.Allreduce(x, y, op=add)
comm.Reduce(x, y if r == 0 else None, op=MPI.SUM, root=0)
comm.Reduce([x, MPI.DOUBLE], [y, MPI.DOUBLE] if r == 0 else None, op=MPI.SUM)
comm.Reduce(MPI.IN_PLACE if r == p - 1 else x, x if r == p - 1 else None, MPI.MIN, p - 1)
comm.Reduce([a, MPI.DOUBLE_INT], [b, MPI.DOUBLE_INT] if r == 0 else None, op=MPI.MINLOC)
comm.Reduce_scatter_block(xs, y)
comm.Reduce_scatter_block([xs, MPI.DOUBLE], [y, MPI.DOUBLE], op=MPI.MAX)
comm.Reduce_scatter_block([xs, 4, MPI.DOUBLE], [y, 4, MPI.DOUBLE])
comm.Reduce_scatter_block(MPI.IN_PLACE, [xs, 2, MPI.DOUBLE]) or xs[2:].fill(0)
comm.Reduce_scatter_block([many, 1, MPI.DOUBLE_INT], [b, 1, MPI.DOUBLE_INT], MPI.MINLOC)
comm.Reduce_scatter(vs, v, counts)
comm.Reduce_scatter([many, MPI.DOUBLE_INT], [b, r + 1, MPI.DOUBLE_INT], counts, MPI.MAXLOC)
comm.Reduce_scatter(MPI.IN_PLACE, vs, counts) or vs[r + 1 :].fill(0)
comm.Reduce_scatter([vs, MPI.DOUBLE], [v, MPI.DOUBLE], recvcounts=counts, op=MPI.SUM)
comm.Bcast(x)
comm.Bcast(x, root=p - 1)
comm.Bcast([x, MPI.DOUBLE], root=0)
comm.Bcast([x, 4, MPI.DOUBLE] if r else x, 0)
comm.Bcast([i, MPI.INT], root=0)
comm.Bcast(octets, root=0)
comm.Bcast([octets, MPI.CHAR if r else MPI.BYTE])
comm.Bcast(letters)
comm.Gather([letters, 2, MPI.CHAR], [octets, 2, MPI.CHAR] if r == 0 else None)
comm.Bcast(f)
comm.Bcast(x.reshape(2, 2))
comm.Bcast(half)
comm.Bcast([x, 2, 1, MPI.DOUBLE])
comm.Bcast([m, 1, column])
comm.Bcast([m, 1, 1, column])
comm.Bcast([m, 1, column] if r else m[:, 0].copy())
comm.Bcast([a, 3, MPI.DOUBLE_INT])
comm.Bcast([table, 2, MPI.TWOINT] if r else [table, 4, MPI.INT])
comm.Bcast([raw, MPI.FLOAT_INT])
comm.Gather(x, ys if r == 0 else None, root=0)
comm.Gather(x, [ys, MPI.DOUBLE] if r == 0 else None)
comm.Gather(MPI.IN_PLACE if r == 0 else x, xs if r == 0 else None)
comm.Gather(np.float64(r), ys[:p] if r == 0 else None)
comm.Gather([a, 1, MPI.DOUBLE_INT], [many, 1, MPI.DOUBLE_INT] if r == 0 else None)
comm.Scatter(xs if r == 0 else None, y, root=0)
comm.Scatter([xs, MPI.DOUBLE] if r == 0 else None, [y, MPI.DOUBLE])
comm.Scatter(xs, MPI.IN_PLACE if r == 0 else y)
comm.Gatherv(v, (vs, counts) if r == 0 else None)
comm.Gatherv([v, MPI.DOUBLE], [vs, counts, displs, MPI.DOUBLE] if r == 0 else None, root=0)
comm.Scatterv([vs, counts, displs, MPI.DOUBLE] if r == 0 else None, v)
comm.Scatterv([vs, (counts, displs), MPI.DOUBLE], [v, MPI.DOUBLE])
comm.Allgather(x, ys)
comm.Allgather([x, MPI.DOUBLE], [ys, MPI.DOUBLE])
comm.Allgather([x, 4, MPI.DOUBLE], [ys, 4, MPI.DOUBLE])
comm.Allgather(MPI.IN_PLACE, xs)
comm.Allgather(None, [xs, MPI.DOUBLE])
comm.Allgather([i, MPI.INT], [js, MPI.INT])
comm.Allgather([m, 1, column], ys)
comm.Allgather([a, 1, MPI.DOUBLE_INT], [many, 1, MPI.DOUBLE_INT])
comm.Allgather(half, halves)
comm.Allgatherv(v, [vs, counts])
comm.Allgatherv([v, MPI.DOUBLE], [vs, counts, displs, MPI.DOUBLE])
comm.Allgatherv([v, MPI.DOUBLE], [vs, (counts, displs), MPI.DOUBLE])
comm.Allgatherv(MPI.IN_PLACE, [vs, counts, displs, MPI.DOUBLE])
comm.Allgatherv([a, r + 1, MPI.DOUBLE_INT], [many, counts, displs, MPI.DOUBLE_INT])
comm.Alltoall(xs, ys)
comm.Alltoall([xs, MPI.DOUBLE], [ys, 4, MPI.DOUBLE])
comm.Alltoall(MPI.IN_PLACE, xs)
comm.Alltoall([many, 1, MPI.DOUBLE_INT], [more, 1, MPI.DOUBLE_INT])
comm.Alltoallv([xs, [1] * p], [ys, [1] * p])
comm.Alltoallv([xs, [1] * p, range(0, 2 * p, 2), MPI.DOUBLE], [ys, ([1] * p, None), MPI.DOUBLE])
comm.Alltoallw([xs, [1] * p, range(0, 8 * p, 8), doubles], [ys, [1] * p, range(0, 8 * p, 8), doubles])
comm.Scan(x, y)
comm.Scan([i, MPI.INT], [j, MPI.INT], op=MPI.MAX)
comm.Scan([a, MPI.DOUBLE_INT], [b, MPI.DOUBLE_INT], op=MPI.MINLOC)
comm.Exscan(MPI.IN_PLACE, x)
comm.Barrier()
comm.barrier()
comm.bcast({'key1': [7, 2.72, 2 + 3j], 'key2': ('abc', r)}, root=0)
comm.scatter([(q + 1) ** 2 for q in range(p)] if r == 0 else None, root=0)
comm.gather((r + 1) ** 2, root=0)
comm.allgather({'rank': r})
comm.alltoall([r * p + q for q in range(p)])
comm.allreduce(r)
comm.allreduce(r + 0.5, op=MPI.MAX)
comm.allreduce((float(r), r), op=MPI.MINLOC)
comm.reduce(r, op=MPI.SUM, root=0)
comm.scan(r)
comm.exscan(r)
""".strip().splitlines()


class Tensor:
    """An array that only DLPack can read."""

    def __init__(self, array: Any) -> None:
        self.array = array
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def make_names(comm: Any) -> dict[str, Any]:
    """The names in the spellings, with fresh arrays of this rank."""
    from mpi4py import MPI

    p, r = comm.size, comm.rank
    counts, total = [q + 1 for q in range(p)], p * (p + 1) // 2
    displs = [q * (q + 1) // 2 for q in range(p)]
    pair = np.dtype([("value", "f8"), ("index", "i4")], align=True)
    x, xs, m = np.arange(4.0) + r, np.arange(4.0 * p) + 100 * r, np.arange(16.0).reshape(4, 4) + r

    def pairs(n: int, dtype: Any = pair) -> Any:
        made = np.zeros(n, dtype)
        made[dtype.names[0]], made[dtype.names[1]] = (np.arange(n) + r) % 3, np.arange(n) % 2 + 7 - r
        return made

    shorts, longs, floats, wide = (
        np.dtype([("value", each), ("index", "i4")], align=True) for each in ("i2", "i8", "f4", "g")
    )
    return {
        "comm": comm, "MPI": MPI, "np": np, "array": array, "p": p, "r": r,
        "counts": counts, "displs": displs, "doubles": [MPI.DOUBLE] * p,
        "x": x, "y": np.zeros(4), "xs": xs, "ys": np.zeros(4 * p),
        "i": np.arange(4, dtype="i4") + r, "j": np.zeros(4, "i4"), "js": np.zeros(4 * p, "i4"),
        "v": np.arange(r + 1.0) + r, "vs": np.arange(1.0 * total) + r,
        "m": m, "n": np.zeros((4, 4)), "f": np.asfortranarray(m[:, :3]),
        "z": x + 1j * r, "w": np.zeros(4, "c16"),
        "k": np.zeros(1, int),
        "letters": np.array([b"a", b"b", b"c", b"d"]) if r else np.array([b"w", b"x", b"y", b"z"]),
        "number": np.zeros(()), "numbers": array.array("d", [0, 0]),
        "flags": np.arange(4) == r, "seen": np.zeros(4, bool),
        "octets": bytearray(range(r, r + 8)), "half": x.astype("f2"), "halves": np.zeros(4 * p, "f2"),
        "tensor": Tensor(x.copy()), "other": Tensor(np.zeros(4)),
        "a": pairs(max(3, p)), "b": pairs(max(3, p)), "many": pairs(total), "more": pairs(p),
        "table": pairs(2, np.dtype([("value", "i4"), ("index", "i4")])).view("i4").reshape(2, 2),
        "table2": np.zeros((2, 2), "i4"),
        "raw": pairs(3, floats).view("u1"), "raw2": np.zeros(24, "u1"),
        "shorts": pairs(3, shorts), "shorts2": pairs(3, shorts), "longs": pairs(3, longs), "longs2": pairs(3, longs),
        "wide": pairs(3, wide), "wide2": pairs(3, wide), "column": column(), "add": addition(),
    }  # fmt: skip


@cache
def column() -> Any:
    """The datatype of a column of a matrix of four rows and four columns, one element after the other."""
    from mpi4py import MPI

    return MPI.DOUBLE.Create_vector(4, 1, 4).Create_resized(0, 8).Commit()


@cache
def addition() -> Any:
    """A user-defined operation."""
    from mpi4py import MPI

    def add(a: Any, b: Any, datatype: Any) -> None:
        np.frombuffer(b)[:] += np.frombuffer(a)

    return MPI.Op.Create(add, commute=True)


def compile_call(spelling: str, names: dict[str, Any]) -> Callable[[], Any]:
    """The call of a spelling as a function."""
    call: Callable[[], Any] = eval(f"lambda: {spelling}", names)
    return call


TURNS, CALLS = 15, 200


def measure(spellings: list[str]) -> list[dict[str, Any]]:
    """The least microseconds of a call, by spelling and contender (collective)."""
    from mpi4py import MPI

    from hpccomm import Communicator

    comms = {"native": MPI.COMM_WORLD, "again": MPI.COMM_WORLD, "ours": Communicator(MPI.COMM_WORLD)}
    rows = []
    for spelling in spellings:
        runs = {}
        for name, comm in comms.items():
            call = compile_call(spelling, make_names(comm))
            runs[name] = partial(harness.time_collective, MPI.COMM_WORLD, call, CALLS)
            for _ in range(4):
                call()
        found = harness.take_turns(runs, TURNS)
        rows.append({"spelling": spelling, **{name: 1e6 * min(times) for name, times in found.items()}})
    return rows


def table(launches: list[list[dict[str, Any]]]) -> str:
    """The least of all launches, and the difference to native; the dearest first."""
    lines = []
    for at in zip(*launches, strict=True):
        native, again, ours = (min(row[name] for row in at) for name in ("native", "again", "ours"))
        lines.append((ours - min(native, again), at[0]["spelling"], native, again, ours))
    lines.sort(reverse=True)
    cells = [[f"`{text}`", *(f"{us:.2f}" for us in (*times, extra))] for extra, text, *times in lines]
    return harness.table(["call", "native, µs", "native again", "ours", "more than native"], cells, words=1)


def main() -> int:
    """Launch, write, print; inside a launch, measure."""
    parser = harness.parser("spellings", __doc__, rounds=3, ranks="1,2", file="spellings-p{ranks}.json")
    parser.add_argument("--only", default="", help="spellings that contain this text")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = harness.parse(parser)
    spellings = [each for each in SPELLINGS if args.only in each]
    if args.work:
        harness.write_on_rank0(args.work, measure(spellings))
        return 0
    for ranks in args.ranks:
        run, file = harness.on_node(ranks), harness.results_file(args, ranks=ranks)
        record = harness.Record(file, lambda row: row["round"], seconds=args.seconds)
        program = ["-m", "benchmarks.spellings", "--only", args.only]
        record.recall_all(range(args.rounds), lambda k: {"round": k, "rows": harness.launch(run, program, "--work")})  # noqa: B023
        harness.emit(f"\n## {ranks} {'rank' if ranks == 1 else 'ranks'}\n", table([row["rows"] for row in record.rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
