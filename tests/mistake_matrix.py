"""A program that makes mistakes: each cell is one call on a new communicator, which one rank makes in another way.

``mistake_matrix.py FOLDER 3,4,7`` runs those of these cells that no job with a folder next to this one has taken; each
rank appends what a cell gave to FOLDER/RANK.jsonl.  A cell is a collective, what the odd rank does, a path, and whether
the call is the communicator's first.  With a third argument, each node has so many ranks.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice, product
from pathlib import Path
from typing import Any, NamedTuple

PATHS = ("native", "shared", "ring")
WHEN = ("first", "later")
STALL_SECONDS, LATE_SECONDS = 0.5, 40.0
"""When a missing rank is named, and for how long the odd rank waits at the most until the others have named it."""
MOST_CELLS = 60
"""How many cells one job runs: their communicators are not freed."""
ROOTED = ("Bcast", "Gather", "Gatherv", "Reduce", "Scatter", "Scatterv", "bcast", "gather", "reduce", "scatter")
REDUCTIONS = ("Allreduce", "Reduce", "Reduce_scatter_block", "Reduce_scatter", "Scan", "Exscan")
COLLECTIVES = {
    **dict.fromkeys(("Allreduce", "Reduce_scatter_block", "Reduce_scatter"), PATHS),
    "Reduce": ("native", "shared", "tree"),
    **dict.fromkeys(("Allgather", "Allgatherv"), PATHS),
    "Bcast": ("native", "shared", "tree"),
    "Alltoall": ("native", "shared", "pairwise"),
    **dict.fromkeys(
        ("Scan", "Exscan", "Gather", "Gatherv", "Scatter", "Scatterv", "Alltoallv", "Alltoallw"), ("native",)
    ),
    **dict.fromkeys(
        ("allreduce", "reduce", "bcast", "gather", "allgather", "scatter", "alltoall", "barrier"), ("native",)
    ),
    **dict.fromkeys(("Allreduce_init", "Bcast_init", "Gather_init", "Reduce_init", "Allgather_init"), ("native",)),
    **dict.fromkeys(("Iallreduce", "Iallgather", "Ibcast", "Igather", "Iscatter", "Ialltoall"), ("auto",)),
    **dict.fromkeys(
        ("Allreduce_view", "empty", "sparse_allreduce", "sparse_allgather", "onebit_allreduce", "onebit_allgather"),
        ("auto",),
    ),
}
"""The collectives, and the paths on which they run."""
OWN = {
    "Allreduce_view": ("dtype", "count", "op"),
    "empty": ("dtype", "count"),
    **dict.fromkeys(
        ("sparse_allreduce", "sparse_allgather", "onebit_allreduce", "onebit_allgather"), ("count", "sibling")
    ),
}
"""Those that MPI does not have, and what a rank can pass in another way."""


SIBLINGS = {
    "sparse_allreduce": "sparse_allgather",
    "sparse_allgather": "onebit_allgather",
    "onebit_allreduce": "onebit_allgather",
    "onebit_allgather": "sparse_allgather",
}
"""Another one that moves arguments of nearly the same kind first."""


class Cell(NamedTuple):
    """One call and one mistake; ``legal`` if it is none."""

    collective: str
    mistake: str
    path: str
    when: str
    legal: bool = False


def blocking_name(name: str) -> str:
    """The blocking collective of a persistent or non-blocking one."""
    return name[1:].capitalize() if name[0] == "I" else name.removesuffix("_init")


def is_possible(name: str, mistake: str) -> bool:
    """Whether a mistake can be made in a collective."""
    always = {
        "missing": True,
        "collective": True,
        "unstarted": name.endswith("_init"),
        "place": blocking_name(name) in ("Alltoall", "Alltoallv", "Alltoallw"),
    }
    if mistake in always:
        return always[mistake]
    if name in OWN:
        return mistake in OWN[name]
    upper, name = name[0].isupper(), blocking_name(name)
    if mistake == "op":
        return name in (*REDUCTIONS, "allreduce", "reduce")
    if mistake == "root":
        return name in ROOTED
    return upper and mistake != "sibling" and not (mistake in ("dtype", "order") and name == "Alltoallw")


def all_cells() -> list[Cell]:
    """The whole matrix."""
    mistakes = ("dtype", "count", "order", "op", "root", "collective", "missing", "unstarted", "sibling", "place")
    cells = [
        Cell(name, mistake, path, when)
        for name, paths in COLLECTIVES.items()
        for mistake, path, when in product(mistakes, paths, WHEN)
        if is_possible(name, mistake)
    ]
    legal = [
        Cell(name, cousin, path, when, True)
        for name, paths in COLLECTIVES.items()
        for cousin, path, when in product(("same", "shape", "new arrays"), paths, WHEN)
        if name[0].isupper() or (name in OWN and cousin == "same")
    ]
    return cells + legal


def is_named(said: str) -> bool:
    """Whether a text names the odd rank."""
    return bool(re.search(r"\brank 1\b|\branks (\d+, )*1\b", said))


def is_missed(said: str) -> bool:
    """Whether a watchdog's report names the odd rank as missing; it has a line for every rank."""
    return bool(re.search(r"missing(?:, or on another node)?: ranks? (?:\d+, )*1\b", said))


def make_call(comm: Any, cell: Cell, odd: bool, wait: Callable[[], None] = lambda: None) -> Callable[[], Any]:
    """The call of one rank; ``wait`` waits until the others have missed it."""
    import numpy as np
    from mpi4py import MPI

    p, me, name = comm.size, comm.rank, cell.collective
    dtype = "f4" if odd and cell.mistake == "dtype" else "f8"
    n = 3 if odd and cell.mistake == "count" else 4
    op = MPI.MAX if odd and cell.mistake == "op" else MPI.SUM
    root = 1 if odd and cell.mistake == "root" else 0
    registered = comm.zeros(64, "u1") if name == "Allreduce_view" else np.zeros(64, "u1")
    if odd and cell.mistake == "collective":
        return comm.Barrier if name != "barrier" else lambda: comm.Allreduce(MPI.IN_PLACE, np.ones(4))
    order = "F" if odd and cell.mistake == "order" else "C"
    flat = not (cell.mistake == "order" or (odd and cell.mistake == "shape"))

    def array(blocks: int, value: float | None = None) -> Any:
        made = np.full(blocks * n, float(me + 1) if value is None else value, dtype)
        return made if flat else np.asarray(made.reshape(-1, n // 2 if n % 2 == 0 else 1), order=order)

    named = {} if cell.path == "auto" or COLLECTIVES[name] == ("native",) else {"algorithm": cell.path}
    one, each, into_one, into_each = array(1), array(p), array(1, 0), array(p, 0)
    even, places = [n] * p, [n * k for k in range(p)]
    at_root = me == root
    types = [MPI.DOUBLE] * p
    typed = [8 * k for k in places], types
    within = odd and cell.mistake == "place"
    begin = wait if odd and cell.mistake == "unstarted" else lambda: None
    indices, picked, signs = np.arange(2, dtype=np.uint32), np.ones(2, "f4"), 16 * p * n
    errors = np.zeros(signs, "f4"), np.zeros(signs // p, "f4")
    calls: dict[str, Callable[[], Any]] = {
        "Allreduce": lambda: comm.Allreduce(one, into_one, op, **named),
        "Reduce": lambda: comm.Reduce(one, into_one, op, root, **named),
        "Reduce_scatter_block": lambda: comm.Reduce_scatter_block(each, into_one, op, **named),
        "Reduce_scatter": lambda: comm.Reduce_scatter(each, into_one, even, op, **named),
        "Allgather": lambda: comm.Allgather(one, into_each, **named),
        "Allgatherv": lambda: comm.Allgatherv(one, into_each, **named),
        "Bcast": lambda: comm.Bcast(one, root, **named),
        "Alltoall": lambda: comm.Alltoall(MPI.IN_PLACE if within else each, into_each, **named),
        "Scan": lambda: comm.Scan(one, into_one, op),
        "Exscan": lambda: comm.Exscan(one, into_one, op),
        "Gather": lambda: comm.Gather(one, into_each if at_root else None, root),
        "Gatherv": lambda: comm.Gatherv(one, [into_each, even] if at_root else None, root),
        "Scatter": lambda: comm.Scatter(each if at_root else None, into_one, root),
        "Scatterv": lambda: comm.Scatterv([each, even] if at_root else None, into_one, root),
        "Alltoallv": lambda: comm.Alltoallv(MPI.IN_PLACE if within else [each, even], [into_each, even]),
        "Alltoallw": lambda: comm.Alltoallw(
            MPI.IN_PLACE if within else [each, even, *typed], [into_each, even, *typed]
        ),
        "allreduce": lambda: comm.allreduce(me, op),
        "reduce": lambda: comm.reduce(me, op, root),
        "bcast": lambda: comm.bcast(me, root),
        "gather": lambda: comm.gather(me, root),
        "allgather": lambda: comm.allgather(me),
        "scatter": lambda: comm.scatter(list(range(p)) if at_root else None, root),
        "alltoall": lambda: comm.alltoall(list(range(p))),
        "barrier": comm.barrier,
        "Allreduce_init": lambda: run_request(comm.Allreduce_init(one, into_one, op), begin),
        "Bcast_init": lambda: run_request(comm.Bcast_init(one, root), begin),
        "Gather_init": lambda: run_request(comm.Gather_init(one, into_each if at_root else None, root), begin),
        "Reduce_init": lambda: run_request(comm.Reduce_init(one, into_one, op, root), begin),
        "Allgather_init": lambda: run_request(comm.Allgather_init(one, into_each), begin),
        "Iallreduce": lambda: comm.Iallreduce(one, into_one, op).Wait(),
        "Iallgather": lambda: comm.Iallgather(one, into_each).Wait(),
        "Ibcast": lambda: comm.Ibcast(one, root).Wait(),
        "Igather": lambda: comm.Igather(one, into_each if at_root else None, root).Wait(),
        "Iscatter": lambda: comm.Iscatter(each if at_root else None, into_one, root).Wait(),
        "Ialltoall": lambda: comm.Ialltoall(MPI.IN_PLACE if within else each, into_each).Wait(),
        "Allreduce_view": lambda: comm.Allreduce_view(
            registered[: n * one.itemsize].view(dtype).reshape(one.shape), op
        ),
        "empty": lambda: comm.empty(n, dtype),
        "sparse_allreduce": lambda: comm.sparse_allreduce(indices, picked, 10 * n),
        "sparse_allgather": lambda: comm.sparse_allgather(indices, picked, 10 * n),
        "onebit_allreduce": lambda: comm.onebit_allreduce(np.ones(signs, "f4"), *errors),
        "onebit_allgather": lambda: comm.onebit_allgather(np.zeros(-(-10 * n // 8), "u1"), 1.0, -1.0, 10 * n),
    }
    return calls[SIBLINGS[name] if odd and cell.mistake == "sibling" else name]


def run_request(request: Any, begin: Callable[[], None]) -> None:
    """Start and complete a persistent call, after ``begin``."""
    begin()
    request.Start()
    request.Wait()
    request.Free()


class Output:
    """What the ranks print to FOLDER/RANK.stderr: a line at the begin and at the end of a cell, and all between."""

    def __init__(self, folder: Path, rank: int, ranks: int) -> None:
        with (folder / f"{rank}.stderr").open("w+b") as file:
            os.dup2(file.fileno(), 2)
        self.others = [folder / f"{each}.stderr" for each in range(ranks) if each != rank]

    def begin(self, number: int) -> None:
        """This rank begins a cell."""
        self.start, self.number = os.lseek(2, 0, os.SEEK_END), number
        os.write(2, f"\ncell {number}\n".encode())

    def end(self) -> None:
        """This rank has left its cell."""
        os.write(2, f"left {self.number}\n".encode())

    def read(self) -> str:
        """What this rank has printed in its cell."""
        return os.pread(2, 10000, self.start).decode(errors="replace")

    def read_others(self) -> list[str]:
        """What each other rank has printed in this rank's cell."""
        texts = [each.read_text(errors="replace") for each in self.others]
        return [each.partition(f"cell {self.number}\n")[2] for each in texts]

    def wait_until_missed(self) -> None:
        """Wait until another rank misses this one from now on, or all others have left its cell.

        A late sentence on the cell before may name this rank, too.
        """
        lengths, until = [len(each) for each in self.read_others()], time.monotonic() + LATE_SECONDS
        while time.monotonic() < until:
            texts = self.read_others()
            missed = any(is_missed(text[length:]) for text, length in zip(texts, lengths, strict=True))
            if missed or all(f"left {self.number}\n" in text for text in texts):
                return
            time.sleep(0.02)


def run_cell(world: Any, cell: Cell, wait: Callable[[], None]) -> str:
    """Run one cell; what this rank has seen: an error's class and sentence, or that there was none."""
    import hpccomm

    comm = hpccomm.Communicator(world.Dup())
    odd = comm.rank == 1
    if cell.when == "later":
        for _ in range(2):
            make_call(comm, cell, False, wait)()
    call = make_call(comm, cell, odd, wait)
    again = 2 if cell.mistake == "new arrays" else 1
    try:
        if odd and cell.mistake == "missing":
            wait()
        for _ in range(again):
            call()
    except Exception as error:  # every one counts
        return f"{type(error).__name__}: {error}"
    return "silent"


def take_cells(folder: Path, numbers: Sequence[int]) -> Iterator[int]:
    """The cells that no other job has taken."""
    for number in numbers:
        with suppress(FileExistsError):
            (folder / f"{number}.taken").touch(exist_ok=False)
            yield number


def main() -> None:
    """Run the cells and write what each gave."""
    from mpi4py import MPI

    folder, numbers = Path(sys.argv[1]), [int(each) for each in sys.argv[2].split(",")]
    world, cells = MPI.COMM_WORLD, all_cells()
    if sys.argv[3:]:
        from hpccomm import context

        per_node = int(sys.argv[3])
        context.ranks_of_this_node = lambda comm: comm.Split(comm.rank // per_node, comm.rank)
    os.environ["HPCCOMM_STALL_SECONDS"] = str(STALL_SECONDS)
    output, taken = Output(folder, world.rank, world.size), islice(take_cells(folder.parent, numbers), MOST_CELLS)
    with (folder / f"{world.rank}.jsonl").open("a", buffering=1) as log:
        while (number := world.bcast(next(taken, None) if world.rank == 0 else None)) is not None:
            output.begin(number)
            outcome = run_cell(world, cells[number], output.wait_until_missed)
            output.end()
            world.Barrier()
            log.write(json.dumps([number, outcome, output.read()]) + "\n")


if __name__ == "__main__":
    main()
