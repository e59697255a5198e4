"""The programs of examples/programs with plain mpi4py, with hpccomm, and with plain mpi4py again: is any slower?

In every round each program is launched three times: *native* is plain mpi4py, *ours* has the one changed line, and the
*null* is native once more, which shows how much two launches of the same program differ on this machine.  Ratios are
native's time by ours and native's by the null's, round by round; of the loop, as the program times it, and of the wall
time from the start of the launcher to its end, imports and set-up included.  hpccomm has its bytecode, as an installed
package has.

*Never slower* means: the worst of ours is not below the worst of the null, and the median of ours is 1.0 or more.
"""

from __future__ import annotations

import compileall
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import hpccomm
from benchmarks import harness
from hpccomm.launcher import launch_command, library

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "programs"
PROGRAMS = {
    "conjugate_gradient": "`Allreduce` of one new number, `Sendrecv`",
    "heat": "`Sendrecv` and `Allreduce` on a `Cartcomm`",
    "fft_transpose": "`Alltoall`",
    "kmeans": "`scatter`, `bcast`, `allreduce` (pickled)",
    "random_search": "`Allreduce` with `MINLOC`, `Bcast`, `Gatherv`",
    "sample_sort": "`Allgather`, `Alltoall`, `Alltoallv`",
    "matrix_vector": "`Allgatherv`, `Allreduce` in place",
    "particles": "`Alltoall`, `Alltoallv`, `Allreduce`",
    "pagerank": "`Reduce_scatter`, `Allreduce`",
    "data_parallel_sgd": "`Bcast`, `Allreduce`",
}
"""What each program calls in its loop."""
CONTENDERS = {"native": ["--mpi4py"], "ours": [], "null": ["--mpi4py"]}
"""The flags of the three launches of a round."""
TIMES = {"loop": ("ms", 1e3), "wall": ("s", 1.0)}
"""The unit of each time, and its number in a second."""
MPI_NAMES = ("Open MPI", "MPICH", "Intel MPI")

Row = dict[str, Any]


def read_output(text: str) -> tuple[float, str]:
    """The seconds of the loop, and the result line."""
    lines = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("loop: ", "result: ")))
    return float(lines["loop"].split()[0]), lines["result"]


def launch_program(ranks: int, name: str, flags: Sequence[str]) -> dict[str, float]:
    """Seconds of the loop and from start to end of one launch."""
    command, env = launch_command(ranks, [str(FOLDER / f"{name}.py"), *flags])
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - began
    if done.returncode:
        raise harness.LaunchError(f"{name} on {ranks} ranks:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return {"loop": read_output(done.stdout)[0], "wall": wall}


def measure_round(key: tuple[int, str, int]) -> Row:
    """The three launches of a program, in another order with each round."""
    ranks, program, number = key
    names = list(CONTENDERS)
    order = names[number % len(names) :] + names[: number % len(names)]
    load = os.getloadavg()[0]
    times = {name: launch_program(ranks, program, CONTENDERS[name]) for name in order}
    return {"ranks": ranks, "program": program, "round": number, "load": load, **{name: times[name] for name in names}}


def ratios(rows: Sequence[Row], contender: str, what: str) -> list[float]:
    """Native's time by a contender's, round by round."""
    return harness.ratios([row["native"][what] for row in rows], [row[contender][what] for row in rows])


def never_slower(rows: Sequence[Row], what: str) -> bool:
    """Whether our worst launch is not below the null's, and our median is 1.0 or more."""
    ours, null = ratios(rows, "ours", what), ratios(rows, "null", what)
    return min(ours) >= min(null) and median(ours) >= 1.0


def is_faster(rows: Sequence[Row], what: str) -> bool:
    """Whether ours is never slower, and its median above everything that the null reached."""
    return never_slower(rows, what) and median(ratios(rows, "ours", what)) > max(ratios(rows, "null", what))


def verdict(rows: Sequence[Row], what: str) -> str:
    """A word for the table."""
    return "faster" if is_faster(rows, what) else "yes" if never_slower(rows, what) else "no"


def group(rows: Sequence[Row], ranks: int) -> dict[str, list[Row]]:
    """The rounds of each program on so many ranks."""
    found = {name: [row for row in rows if (row["ranks"], row["program"]) == (ranks, name)] for name in PROGRAMS}
    return {name: each for name, each in found.items() if each}


def table_of(programs: dict[str, list[Row]], what: str) -> str:
    """Native's median, and the ratios with their range, of one of the two times."""
    unit, scale = TIMES[what]
    rows = [
        [
            name,
            f"{scale * median(row['native'][what] for row in each):.3g}",
            harness.spread(ratios(each, "ours", what), ".2f"),
            harness.spread(ratios(each, "null", what), ".2f"),
            verdict(each, what),
        ]
        for name, each in programs.items()
    ]
    head = [f"program, {what}", f"native, {unit}", "native / ours", "native / native", "never slower"]
    return harness.table(head, rows, words=1)


def count_verdicts(programs: dict[str, list[Row]]) -> str:
    """A sentence."""
    words = [
        f"{what}: never slower {sum(never_slower(each, what) for each in programs.values())} of {len(programs)}, "
        f"faster {sum(is_faster(each, what) for each in programs.values())}"
        for what in TIMES
    ]
    return f"{'; '.join(words)}.\n"


def overview(records: dict[str, list[Row]]) -> str:
    """One line a program: what it calls, and the median ratios of the loop and of the wall time."""
    columns = [(mpi, ranks) for mpi, rows in records.items() for ranks in sorted({row["ranks"] for row in rows})]
    head = ["program", "its loop calls", *(f"{mpi}, {ranks} ranks: loop, wall" for mpi, ranks in columns)]
    lines = []
    for name, calls in PROGRAMS.items():
        cells = [group(records[mpi], ranks).get(name, []) for mpi, ranks in columns]
        medians = [", ".join(f"{median(ratios(each, 'ours', what)):.2f}" for what in TIMES if each) for each in cells]
        lines.append([name, calls, *medians])
    return harness.table(head, lines, words=2)


def sections(mpi: str, rows: Sequence[Row]) -> str:
    """The tables of one MPI library."""
    parts = []
    for ranks in sorted({row["ranks"] for row in rows}):
        programs = group(rows, ranks)
        parts += [f"## {mpi}, {ranks} ranks\n", *(table_of(programs, what) for what in TIMES), count_verdicts(programs)]
    return "\n".join(parts)


PAGE = """# Ten programs, with and without the changed line

```
{commands}
```

{machines}

The programs are those of [examples/programs](../programs.md). In every round each is launched three
times: *native* is plain mpi4py, *ours* has `comm = hpccomm.Communicator(MPI.COMM_WORLD)`, and
*native / native* compares native with itself, which shows how far two launches of the same program
differ on this machine. The order changes with every round. Ratios are taken round by round; above 1
ours is faster. Medians, with the worst and the best round in brackets. *Loop* is what the program
times; *wall* is from the start of the launcher to its end, with imports and set-up; hpccomm has its
bytecode, as an installed package has.

*Never slower*: our worst round is not below the worst of native / native, and our median is 1.0 or
more; *faster*: our median is also above the best of native / native.

What ours gains in `heat`, `fft_transpose` and `kmeans` is memory, not communication: glibc gives the
arrays of a loop back to the kernel and gets their pages zeroed again in each iteration, and a
process with a communicator of hpccomm keeps them (see [the programs](../programs.md)); in
`pagerank` on four ranks presumably, too, which was not measured apart. With
`MALLOC_MMAP_THRESHOLD_=4194304` and `MALLOC_TRIM_THRESHOLD_=8388608` set for all three launches
(Open MPI, 2 ranks, 3 rounds, otherwise the first command above) `heat` takes 45 ms natively,
`fft_transpose` 17, `kmeans` 18, and the medians of native / ours are between 0.88 (`pagerank`) and
1.11 (`data_parallel_sgd`). What remains below 1 is the first call of each kind, and on a new
communicator, as that of `heat`, which loops of some milliseconds do not make good.

Median of native / ours:

{overview}
{sections}"""


def describe(data: dict[str, Any]) -> str:
    """The machine, how busy it was, the software and the number of rounds."""
    machine, versions = data["machine"], data["versions"]
    rounds = len({row["round"] for row in data["records"]})
    return (
        f"{data['mpi']}: {machine['processor']}, {machine['cores']} cores; {machine['system']}, Python "
        f"{versions['python']}, mpi4py {versions['mpi4py']}, NumPy {versions['numpy']}; rounds: {rounds}, "
        f"{data['date'][:10]}. Load average before a round: "
        f"{harness.spread([row['load'] for row in data['records']], '.1f')}."
    )


def write_page(page: Path, files: Sequence[Path]) -> None:
    """The page of all results that exist, one section an MPI library."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    records = {data["mpi"]: data["records"] for data in found}
    text = PAGE.format(
        commands="\n".join(data["command"] for data in found),
        machines="\n\n".join(describe(data) for data in found),
        overview=overview(records),
        sections="\n".join(sections(mpi, rows) for mpi, rows in records.items()),
    )
    page.write_text(text, encoding="utf-8")


def main() -> int:
    """Launch what the file lacks, write, print."""
    parser = harness.parser("programs", __doc__, rounds=10, ranks="2,4", file="programs-{mpi}.json")
    parser.add_argument("--program", action="append", choices=PROGRAMS, help="only this one; may come several times")
    parser.add_argument("--page", type=Path, help="write the tables of all MPI libraries into this page")
    args = harness.parse(parser)
    mpi = library()
    compileall.compile_dir(Path(hpccomm.__file__).parent, quiet=1)  # as pip does when it installs a package
    record = harness.Record(
        harness.results_file(args, mpi=mpi.family.name),
        lambda row: (row["ranks"], row["program"], row["round"]),
        seconds=args.seconds,
    )
    record.data["mpi"] = f"{mpi.family.name} {re.findall(r'[0-9.]+', mpi.version)[0]}"
    rounds = range(args.rounds)
    keys = [(ranks, name, k) for k in rounds for ranks in args.ranks for name in args.program or PROGRAMS]
    record.recall_all(keys, measure_round)
    if record.rows:
        harness.emit(sections(record.data["mpi"], record.rows))
    if args.page:
        write_page(args.page, [harness.results_file(args, mpi=name) for name in MPI_NAMES])
    return 0


if __name__ == "__main__":
    sys.exit(main())
