"""``scripts/bench_node``: what this node's libraries need for an allreduce, launch after launch in turn.

In every round each contender is started once and measures all sizes; figures are medians over the rounds, ratios are
taken round by round.  ``auto`` and *registered* run in the same launch as the native algorithm of their own MPI.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

OUT = Path("docs/measurements")
CALLS = {"4:65536": ("1000", "100"), "262144:16777216": ("50", "20"), "67108864:268435456": ("8", "16")}
"""Calls timed and calls before them, for each range of sizes: ours have tried how to fill slots after fourteen."""

Times = dict[tuple[str, int], float]
"""Median microseconds of (contender, bytes)."""

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
    """What is started: an environment, settings, and which of bench's columns it gives under which names."""

    environment: str
    settings: Mapping[str, str]
    columns: Mapping[str, str]
    flags: tuple[str, ...] = ()


REGISTERED = ("--registered", "--in-place")
CONTENDERS = (
    Contender(".venv", {}, {"native": "Open MPI", "auto": "auto on Open MPI"}),
    Contender(".venv", {}, {"auto": "registered on Open MPI"}, REGISTERED),
    Contender(".venv", {"OMPI_MCA_coll_han_priority": "100"}, {"native": "Open MPI, han"}),
    Contender(".venv", {"OMPI_MCA_coll_sm_priority": "100"}, {"native": "Open MPI, coll_sm"}),
    Contender(".venv", {"OMPI_MCA_pml": "ucx"}, {"native": "Open MPI, ucx"}),
    Contender(".venv-mpich", {}, {"native": "MPICH", "auto": "auto on MPICH"}),
    Contender(".venv-mpich", {}, {"auto": "registered on MPICH"}, REGISTERED),
    Contender(".venv-impi", {}, {"native": "Intel MPI", "auto": "auto on Intel MPI"}),
)
OURS = {"auto": "auto on Open MPI", "registered": "registered on Open MPI"}
REFERENCES = ("Open MPI", "MPICH", "best")
"""What ours are compared with: the MPI underneath, each its default, and at each size the fastest of all libraries."""
BEYOND_CACHE = 1 << 24


def launch_contender(contender: Contender, ranks: int, sizes: str) -> Times:
    """One launch; nothing where the library cannot run here."""
    calls, warmup = CALLS[sizes]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [f"{contender.environment}/bin/hpccomm-run", "-n", str(ranks), "-m", "hpccomm", "bench", "allreduce"]
        command += ["--algorithm", ",".join(contender.columns), "-m", sizes, "--step-factor", "4"]
        command += ["-M", str(1 << 29), "-i", calls, "-x", warmup, "--json", str(file), *contender.flags]
        settings = {**os.environ, **contender.settings}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        if done.returncode or not file.exists():
            names = ", ".join(contender.columns.values())
            sys.stderr.write(f"{names}: left out, {(done.stderr.strip() or 'no reason given').splitlines()[-1]}\n")
            return {}
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {(contender.columns[row["algorithm"]], row["bytes"]): row["p50_us"] for row in rows}


def gloo(ranks: int, sizes: str) -> Times:
    """One launch of PyTorch's gloo; nothing where there is no PyTorch."""
    python, (calls, warmup) = Path(".venv-gloo/bin/python"), CALLS[sizes]
    if not python.exists():
        return {}
    first, last = map(int, sizes.split(":"))
    todo = [first]
    while 4 * todo[-1] <= last:
        todo.append(4 * todo[-1])
    with tempfile.TemporaryDirectory() as folder:
        told = [json.dumps(todo), str(min(int(calls), 50)), warmup, f"{folder}/meet"]
        jobs = [
            subprocess.Popen([str(python), "-c", GLOO, str(rank), str(ranks), *told], stdout=subprocess.PIPE, text=True)
            for rank in range(ranks)
        ]
        said, *_ = [job.communicate()[0] for job in jobs]
    pairs = (line.split() for line in said.splitlines())
    return {("gloo", int(nbytes)): float(us) for nbytes, us in pairs}


def bandwidth(ranks: int) -> float:
    """GB/s of memory, as far as copying reaches."""
    command = [".venv/bin/hpccomm-run", "-n", str(ranks), "-c", STREAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def rounds(count: int, ranks: int) -> Iterator[tuple[Times, float]]:
    """All contenders in turn, ``count`` times, and the bandwidth in between."""
    for number in range(count):
        found: Times = {}
        for sizes in CALLS:
            for contender in CONTENDERS:
                found |= launch_contender(contender, ranks, sizes)
            found |= gloo(ranks, sizes)
        yield found, bandwidth(ranks)
        sys.stderr.write(f"{ranks} ranks: round {number + 1} of {count} done\n")


def traffic_bytes(name: str, nbytes: int, ranks: int) -> int:
    """Bytes that must be read and written: (5k+1)·S through slots, (3k+1)·S in registered memory (k ranks)."""
    return ((3 if name == "registered" else 5) * ranks + 1) * nbytes


def tables(found: list[tuple[Times, float]], ranks: int) -> str:
    """Medians in microseconds; then ratios with their range, and the share of the memory's bandwidth."""
    others = sorted({name for times, _ in found for name, _ in times} - {*OURS.values()})
    natives = [name for name in others if not name.startswith(("auto", "registered"))]
    gbps = median(rate for _, rate in found)
    sizes = sorted({nbytes for times, _ in found for _, nbytes in times})
    columns = [*natives, *OURS.values()]
    lines = [row("bytes", *columns), "|" + "---:|" * (len(columns) + 1)]
    lines += [row(str(nbytes), *(median_us(found, name, nbytes) for name in columns)) for nbytes in sizes]
    lines += ["", row("bytes", *(f"{other} / {ours}" for ours in OURS for other in REFERENCES), *OURS)]
    lines += ["|" + "---:|" * (len(OURS) * (len(REFERENCES) + 1) + 1)]
    for nbytes in sizes:
        cells = [ratio(found, natives, ours, other, nbytes) for ours in OURS for other in REFERENCES]
        cells += [bandwidth_share(found, ours, nbytes, ranks) for ours in OURS]
        lines.append(row(str(nbytes), *cells))
    told = f"The last two columns: share of the {gbps:.0f} GB/s that all ranks together reach when they copy."
    return "\n".join([*lines, "", told]) + "\n"


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def bandwidth_share(found: list[tuple[Times, float]], ours: str, nbytes: int, ranks: int) -> str:
    """Bytes that must move by the time they took, of the bandwidth in the same round; for vectors beyond the cache."""
    shares = [
        traffic_bytes(ours, nbytes, ranks) / times[OURS[ours], nbytes] / 1e3 / rate
        for times, rate in found
        if (OURS[ours], nbytes) in times
    ]
    return f"{median(shares):.0%}" if shares and nbytes >= BEYOND_CACHE else ""


def median_us(found: list[tuple[Times, float]], name: str, nbytes: int) -> str:
    """A contender's median in microseconds."""
    values = [times[name, nbytes] for times, _ in found if (name, nbytes) in times]
    return f"{median(values):.4g}" if values else "–"


def ratio(found: list[tuple[Times, float]], natives: list[str], ours: str, other: str, nbytes: int) -> str:
    """How many times as fast as another library on its own MPI, round by round; *best* is the fastest of all."""
    quotients = []
    for times, _ in found:
        mine = times.get((f"{ours} on {'MPICH' if other == 'MPICH' else 'Open MPI'}", nbytes))
        theirs = [times[name, nbytes] for name in natives if other in (name, "best") if (name, nbytes) in times]
        if mine and theirs:
            quotients.append(min(theirs) / mine)
    if not quotients:
        return "–"
    return f"**{median(quotients):.2f}** ({min(quotients):.2f}–{max(quotients):.2f})"


def draw(found: list[tuple[Times, float]], out: Path) -> None:
    """Medians against bytes, a line a contender."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for name in sorted({name for times, _ in found for name, _ in times}):
        sizes = sorted({nbytes for times, _ in found for each, nbytes in times if each == name})
        values = [median(times[name, size] for times, _ in found if (name, size) in times) for size in sizes]
        ours = name in OURS.values()
        axes.plot(sizes, values, label=name, linewidth=2.5 if ours else 1, marker="o" if ours else None)
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="µs, median", title="Allreduce, float32 sums")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="scripts/bench_node", description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=5)
    parser.add_argument("ranks", nargs="*", type=int, default=[2, 4])
    parser.add_argument("--tables", action="store_true", help="measure nothing, print what the files hold")
    args = parser.parse_args()
    for ranks in args.ranks:
        file = OUT / f"node-p{ranks}.json"
        if not args.tables:
            write(list(rounds(args.rounds, ranks)), ranks, file)
        found = read(file)
        draw(found, file.with_suffix(".svg"))
        sys.stdout.write(f"\n## {ranks} ranks\n\n{tables(found, ranks)}")
        sys.stdout.flush()
    return 0


def write(found: list[tuple[Times, float]], ranks: int, file: Path) -> None:
    """All figures, a line each."""
    rows = [
        {"round": number, "contender": name, "bytes": nbytes, "p50_us": us}
        for number, (times, _) in enumerate(found)
        for (name, nbytes), us in times.items()
    ]
    record = {"ranks": ranks, "copy_gbps": [rate for _, rate in found], "rows": rows}
    file.write_text(json.dumps(record).replace("}, {", "},\n{") + "\n", encoding="utf-8")


def read(file: Path) -> list[tuple[Times, float]]:
    """What was written."""
    record = json.loads(file.read_text(encoding="utf-8"))
    found: list[tuple[Times, float]] = [({}, rate) for rate in record["copy_gbps"]]
    for each in record["rows"]:
        found[each["round"]][0][each["contender"], each["bytes"]] = each["p50_us"]
    return found


if __name__ == "__main__":
    sys.exit(main())
