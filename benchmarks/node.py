"""Allreduce on this node by every MPI library, beside ``auto`` and registered arrays of ours.

In every round each contender is launched once for each range of sizes; figures are medians over the rounds, ratios are
taken round by round.  ``auto`` and *registered* run in the same launch as the native algorithm of their own MPI.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks import harness
from hpccomm.bench.plot import COLOURS

CALLS = {"4:65536": ("1000", "100"), "262144:16777216": ("50", "28"), "67108864:268435456": ("8", "20")}
"""Timed calls, and the calls before them, for each range of sizes: ours try both ways to fill slots in 26 calls, or in
18 of long ones."""
FACTOR = 4

Times = dict[tuple[str, int], float]
"""Median microseconds of (contender, bytes)."""
Rounds = Sequence[tuple[Times, float]]
"""Of each round the times, and the GB/s of memory."""

STREAM = """
import sys, time, numpy as np
from mpi4py import MPI
comm, n = MPI.COMM_WORLD, 1 << 24
a, b = np.ones(n, "f4"), np.zeros(n, "f4")
best = 0.0
for _ in range(12):
    comm.Barrier()
    began = time.perf_counter()
    for _ in range(4):
        np.copyto(b, a)
    comm.Barrier()
    best = max(best, 8 * a.nbytes * comm.size / (time.perf_counter() - began))
if comm.rank == 0:
    print(best / 1e9)
"""
"""GB/s that all ranks together read and write when each copies 64 MiB."""

GLOO = """
import json, os, sys, time
import torch, torch.distributed as dist
rank, size, sizes, calls, warm = (int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), *map(int, sys.argv[4:6]))
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + sys.argv[6], rank=rank, world_size=size)
for nbytes in sizes:
    x, times = torch.zeros(max(1, nbytes // 4)), []
    for k in range(calls + warm):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(x)
        times.append(time.perf_counter() - began)
    mean = torch.tensor(times[warm:], dtype=torch.float64)
    dist.all_reduce(mean)
    if rank == 0:
        print(nbytes, 1e6 * float((mean / size).median()), flush=True)
"""


class Contender(NamedTuple):
    """One launch: an environment, settings, and the names of those columns of ``hpccomm bench`` that count."""

    environment: str
    settings: Mapping[str, str]
    columns: Mapping[str, str]
    flags: tuple[str, ...] = ()


REGISTERED, NEW_ARRAYS = ("--registered", "--in-place"), ("--new-arrays",)
ON_NEW = ", new arrays"
"""Ends the names of times on new arrays, whose making counts."""
CONTENDERS = (
    Contender(".venv", {}, {"native": "Open MPI", "auto": "auto on Open MPI"}, NEW_ARRAYS),
    Contender(".venv", {}, {"auto": "registered on Open MPI"}, REGISTERED),
    Contender(".venv", {"OMPI_MCA_coll_han_priority": "100"}, {"native": "Open MPI, han"}),
    Contender(".venv", {"OMPI_MCA_coll_sm_priority": "100"}, {"native": "Open MPI, coll_sm"}),
    Contender(".venv", {"OMPI_MCA_pml": "ucx"}, {"native": "Open MPI, ucx"}),
    Contender(".venv-mpich", {}, {"native": "MPICH", "auto": "auto on MPICH"}, NEW_ARRAYS),
    Contender(".venv-mpich", {}, {"auto": "registered on MPICH"}, REGISTERED),
    Contender(".venv-impi", {}, {"native": "Intel MPI", "auto": "auto on Intel MPI"}, NEW_ARRAYS),
)
OURS = {"auto": "auto on Open MPI", "registered": "registered on Open MPI"}
REFERENCES = ("Open MPI", "MPICH", "best")
"""Each MPI's default beside ours on that MPI, and the fastest of all libraries at each size."""
BEYOND_CACHE = 1 << 24


def launch_contender(contender: Contender, ranks: int, sizes: str) -> Times:
    """One launch; no times if the library does not run here."""
    calls, warmup = CALLS.get(sizes, ("50", "20"))
    bench = ["-m", "hpccomm", "bench", "allreduce", "--algorithm", ",".join(contender.columns), "-m", sizes]
    bench += ["--step-factor", str(FACTOR), "-M", str(1 << 29), "-i", calls, "-x", warmup, *contender.flags]
    try:
        run = harness.on_node(ranks, contender.environment, contender.settings)
        rows = harness.launch(run, bench)["rows"]
    except (harness.LaunchError, OSError) as error:
        names = ", ".join(contender.columns.values())
        harness.progress(f"{names}: left out, {str(error).splitlines()[-1]}")
        return {}
    found = {(contender.columns[row["algorithm"]], row["bytes"]): row["p50_us"] for row in rows}
    new = {(contender.columns[row["algorithm"]] + ON_NEW, row["bytes"]): row["new_p50_us"] for row in rows}
    return found | (new if contender.flags == NEW_ARRAYS else {})


def launch_gloo(ranks: int, sizes: str) -> Times:
    """One launch of PyTorch's gloo; no times without PyTorch."""
    python, (calls, warmup) = Path(".venv-gloo/bin/python"), CALLS.get(sizes, ("50", "20"))
    if not python.exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        todo = json.dumps(list(harness.steps(sizes, FACTOR)))
        words = [todo, str(min(int(calls), 50)), warmup, f"{folder}/meet"]
        jobs = [
            subprocess.Popen(
                [str(python), "-c", GLOO, str(rank), str(ranks), *words], stdout=subprocess.PIPE, text=True
            )
            for rank in range(ranks)
        ]
        text, *_ = [job.communicate()[0] for job in jobs]
    pairs = (line.split() for line in text.splitlines())
    return {("gloo", int(nbytes)): float(us) for nbytes, us in pairs}


def measure_bandwidth(ranks: int) -> float:
    """GB/s of memory, as far as copying reaches."""
    return float(harness.on_node(ranks)(["-c", STREAM]).stdout.split()[-1])


def measure_round(key: tuple[int, int], ranges: Sequence[str]) -> dict[str, Any]:
    """All contenders in turn, then the bandwidth."""
    (ranks, number), found = key, Times()
    for sizes in ranges:
        for contender in CONTENDERS:
            found |= launch_contender(contender, ranks, sizes)
        found |= launch_gloo(ranks, sizes)
    times = [{"contender": name, "bytes": nbytes, "p50_us": us} for (name, nbytes), us in found.items()]
    return {"ranks": ranks, "round": number, "copy_gbps": measure_bandwidth(ranks), "times": times}


def read_old_form(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rounds of files in which all times are one list."""
    ranks, rates, rows = (data.pop(key, []) for key in ("ranks", "copy_gbps", "rows"))
    return [
        {"ranks": ranks, "round": k, "copy_gbps": rate, "times": [row for row in rows if row["round"] == k]}
        for k, rate in enumerate(rates)
    ]


def read_rounds(file: Path) -> list[dict[str, Any]]:
    """The rounds of a file of results, of either form."""
    data = json.loads(file.read_text())
    return [*read_old_form(data), *data.get("records", [])]


def rounds_of(rows: Sequence[dict[str, Any]]) -> Rounds:
    """Times and bandwidth of each round."""
    return [
        ({(each["contender"], each["bytes"]): each["p50_us"] for each in row["times"]}, row["copy_gbps"])
        for row in rows
    ]


def traffic_bytes(name: str, nbytes: int, ranks: int) -> int:
    """Bytes that must be read and written: (5k+1)·S through slots, (3k+1)·S in registered memory (k ranks)."""
    return ((3 if name == "registered" else 5) * ranks + 1) * nbytes


def tables(found: Rounds, ranks: int) -> str:
    """Medians in microseconds; then ratios with their range, and the share of the memory's bandwidth."""
    others = sorted({name for times, _ in found for name, _ in times} - {*OURS.values()})
    natives = [name for name in others if not name.startswith(("auto", "registered")) and not name.endswith(ON_NEW)]
    sizes = sorted({nbytes for times, _ in found for _, nbytes in times})
    columns = [*natives, *OURS.values()]
    pairs = [(ours, other) for ours in OURS for other in REFERENCES]
    rows = [
        [
            str(nbytes),
            *(harness.spread(ratios(found, natives, *pair, nbytes), ".2f") or "–" for pair in pairs),
            *(bandwidth_share(found, ours, nbytes, ranks) for ours in OURS),
        ]
        for nbytes in sizes
    ]
    times = [[str(nbytes), *(median_us(found, name, nbytes) for name in columns)] for nbytes in sizes]
    head = ["bytes", *(f"{other} / {ours}" for ours, other in pairs), *OURS]
    gbps = median(rate for _, rate in found)
    note = f"The last two columns: share of the {gbps:.0f} GB/s that all ranks together reach when they copy.\n"
    return "\n".join([harness.table(["bytes", *columns], times), harness.table(head, rows), note, *new_table(found)])


def new_table(found: Rounds) -> list[str]:
    """Each MPI by ours on new arrays; older files have none."""
    sizes = sorted({nbytes for times, _ in found for name, nbytes in times if name.endswith(ON_NEW)})
    libraries = ("Open MPI", "MPICH", "Intel MPI")
    names = [name for name in libraries if any(new_ratios(found, name, nbytes) for nbytes in sizes)]
    rows = [
        [str(nbytes), *(harness.spread(new_ratios(found, name, nbytes), ".2f") or "–" for name in names)]
        for nbytes in sizes
    ]
    return [harness.table(["bytes", *(f"{name} / auto{ON_NEW}" for name in names)], rows)] if names else []


def new_ratios(found: Rounds, mpi: str, nbytes: int) -> list[float]:
    """How many times as fast ours is on new arrays, round by round."""
    pairs = [(times.get((mpi + ON_NEW, nbytes)), times.get((f"auto on {mpi}{ON_NEW}", nbytes))) for times, _ in found]
    return [theirs / ours for theirs, ours in pairs if theirs and ours]


def bandwidth_share(found: Rounds, ours: str, nbytes: int, ranks: int) -> str:
    """Bytes that must move by the time they took, of the bandwidth in the same round; for vectors beyond the cache."""
    shares = [
        traffic_bytes(ours, nbytes, ranks) / times[OURS[ours], nbytes] / 1e3 / rate
        for times, rate in found
        if (OURS[ours], nbytes) in times
    ]
    return f"{median(shares):.0%}" if shares and nbytes >= BEYOND_CACHE else ""


def median_us(found: Rounds, name: str, nbytes: int) -> str:
    """A contender's median in microseconds."""
    values = [times[name, nbytes] for times, _ in found if (name, nbytes) in times]
    return harness.number(median(values)) if values else "–"


def ratios(found: Rounds, natives: Sequence[str], ours: str, other: str, nbytes: int) -> list[float]:
    """How many times as fast as another library on its own MPI, round by round; *best* is the fastest of all."""
    quotients = []
    for times, _ in found:
        mine = times.get((f"{ours} on {'MPICH' if other == 'MPICH' else 'Open MPI'}", nbytes))
        theirs = [times[name, nbytes] for name in natives if other in (name, "best") if (name, nbytes) in times]
        if mine and theirs:
            quotients.append(min(theirs) / mine)
    return quotients


def draw(found: Rounds, out: Path) -> None:
    """Medians against bytes, a line a contender."""
    from cycler import cycler

    figure, [[axes]] = harness.panels(9.5, 5.5)
    axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=COLOURS))
    for name in sorted({name for times, _ in found for name, _ in times if not name.endswith(ON_NEW)}):
        sizes = sorted({nbytes for times, _ in found for each, nbytes in times if each == name})
        values = [median(times[name, size] for times, _ in found if (name, size) in times) for size in sizes]
        ours = name in OURS.values()
        axes.plot(sizes, values, label=name, linewidth=2.5 if ours else 1, marker="o" if ours else None)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="µs, median", title="Allreduce, float32 sums")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    harness.save(figure, out)


def main() -> int:
    """Measure the rounds that the file lacks, write, print."""
    parser = harness.parser("node", __doc__, rounds=5, ranks="2,4", file="node-p{ranks}.json")
    parser.add_argument("--sizes", action="append", help=f"BYTES:BYTES (default {' and '.join(CALLS)})")
    args = harness.parse(parser)
    for ranks in args.ranks:
        file = harness.results_file(args, ranks=ranks)
        record = harness.Record(file, lambda row: (row["ranks"], row["round"]), seconds=args.seconds)
        record.rows.extend(read_old_form(record.data))
        keys = [(ranks, number) for number in range(args.rounds)]
        record.recall_all(keys, lambda key: measure_round(key, args.sizes or list(CALLS)))
        found = rounds_of(record.rows)
        draw(found, harness.plot_file(args, file))
        harness.emit(f"\n## {ranks} ranks\n", tables(found, ranks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
