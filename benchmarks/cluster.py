"""Dense allreduce between the nodes of a virtual cluster, beside the rate of its links.

For each shape a cluster is made and, unless ``--untuned``, tuned.  Then, in every round, one launch measures native MPI
and ours in turns, and another measures native MPI with Open MPI's ``han``.  Figures are medians over the rounds.  A
share of the wire is the least time that the nominal rate permits, 2(N-1)/N · bytes/rate, divided by the measured time.
A plain TCP stream runs on the same links.

``--against TREE`` compares with the package of another checkout: every round then has launches of ``auto`` from there,
from here, and from here again, whose ratio is the null.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness
from hpccomm.cluster.nodes import Cluster, rate_of
from hpccomm.launcher import library

ALGORITHMS = "native,auto,hierarchical,ring,butterfly,doubling"
SIZES = "8:16777216"
FACTOR, LONG = 8, 1 << 20
"""Factor between sizes; bytes from which a call occupies the links for long."""
SHORT_CALLS = 10
"""Timed calls of a shorter vector for each call of a long one."""
TUNED = "native,hierarchical,ring,butterfly,doubling"
HAN = {"OMPI_MCA_coll_han_priority": "100"}
VERSIONS = ("before", "now", "now again")
"""What ``--against`` launches in turns."""

STREAM = """
import socket, sys, threading, time
n, chunk = 1 << 26, bytes(1 << 20)
if sys.argv[1] == "serve":
    with socket.create_server(("", 5201)) as server:
        print("ready", flush=True)
        link, _ = server.accept()
        while link.recv(1 << 20):
            pass
else:
    link = socket.create_connection((sys.argv[2], 5201))
    link.sendall(chunk * 4)
    began = time.perf_counter()
    for _ in range(n // len(chunk)):
        link.sendall(chunk)
    link.shutdown(socket.SHUT_WR)
    link.recv(1)
    print(8 * n / (time.perf_counter() - began))
"""
"""Bits a second of one connection, from its fifth megabyte until the peer closes it."""


EVEN = [f"{n}x{k},{rate}" for rate in ("1gbit", "100mbit") for n in (2, 4, 8) for k in (1, 2)]
SHAPES = [*EVEN, "4x2,1gbit,cyclic", "2x1+3", "3x2+1+3,1gbit,cyclic", "16x1,100mbit", "16x2,100mbit"]


def measure_shape(shape: harness.Shape, args: argparse.Namespace, mpi: str) -> dict[str, Any]:
    """Measure one shape: its rows, and the rate of a TCP stream; Open MPI's native algorithm runs with ``han`` too."""
    with Cluster(shape.nodes, shape.rate) as cluster, tempfile.TemporaryDirectory() as folder:
        tuning = Path(args.tables or folder, f"{shape.title.replace(' ', '')}.json").resolve()
        if not args.untuned and not tuning.exists():
            tune = ["hpccomm", "tune", "--collective", "allreduce", "--algorithm", TUNED]
            tuned_by = harness.on_cluster(
                cluster, shape, tree=args.against
            )  # both versions read a table of the older one
            done = tuned_by([*tune, "--sizes", sizes_to_tune(shape), "--out", str(tuning)])
            if done.returncode:
                raise harness.LaunchError(f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
        settings = {} if args.untuned else {"HPCCOMM_TUNING": str(tuning)}
        launches = [(args.algorithm, harness.on_cluster(cluster, shape, settings), "")]
        if mpi == "Open MPI":
            launches.append(("native", harness.on_cluster(cluster, shape, {**settings, **HAN}), "native, han"))
        if args.against:
            trees = zip((args.against, None, None), VERSIONS, strict=True)
            launches += [
                ("auto", harness.on_cluster(cluster, shape, settings, tree=tree), name) for tree, name in trees
            ]
        rows = []
        for number in range(args.rounds):
            for names, run, title in launches:
                for row in launch_bench(run, names, args):
                    kept = {key: row[key] for key in ("bytes", "p50_us", "predicted_us")}
                    rows.append({"round": number, "algorithm": title or row["algorithm"], **kept})
        streams = [measure_stream(cluster) for _ in range(3)]
    return {**shape._asdict(), "tuned": not args.untuned, "stream_bps": median(streams), "rows": rows}


def sizes_to_tune(shape: harness.Shape) -> str:
    """Bytes at which a shape is tuned: up to 4 MiB over slow links, else up to 16 MiB."""
    return "4,256,4Ki,32Ki,256Ki,1Mi,4Mi" + ("" if rate_of(shape.rate) < 5e8 else ",16Mi")


def launch_bench(run: harness.Runner, algorithms: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of all sizes.  Short calls are timed more often, as an idle link lets the first ones pass at no cost."""
    sizes = list(harness.steps(args.sizes, FACTOR))
    short, long = [n for n in sizes if n < LONG], [n for n in sizes if n >= LONG]
    for part, calls in ((short, SHORT_CALLS * args.calls), (long, args.calls)):
        if part:
            bench = ["hpccomm", "bench", "allreduce", "--algorithm", algorithms, "-m", f"{part[0]}:{part[-1]}"]
            bench += ["-i", str(calls), "--step-factor", str(FACTOR), "-x", "2", "-c", "-u", "0"]
            yield from harness.launch(run, bench)["rows"]


def measure_stream(cluster: Cluster) -> float:
    """Bits a second of one TCP connection between two nodes."""
    serve = cluster.host_command("n1", [sys.executable, "-c", STREAM, "serve"])
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        done = cluster.run_on(
            "n0", [sys.executable, "-c", STREAM, "send", cluster.address("n1")], capture_output=True, text=True
        )
    return float(done.stdout)


def title(record: dict[str, Any]) -> str:
    """A record's shape in words."""
    return harness.Shape(record["nodes"], tuple(record["per_node"]), record["placement"], record["rate"]).title


def wire_us(record: dict[str, Any], nbytes: int) -> float:
    """The least time that the nominal rate permits."""
    return 2 * (record["nodes"] - 1) / record["nodes"] * nbytes * 8e6 / rate_of(record["rate"])


def table(record: dict[str, Any]) -> str:
    """One shape's times, and ours beside native MPI and beside the wire."""
    names = list(dict.fromkeys(row["algorithm"] for row in record["rows"]))
    ours = "auto" if "auto" in names else next(name for name in names if not name.startswith("native"))
    head = ["bytes", *(f"{name}, µs" for name in names), f"best native / {ours}", "of the wire", "of a stream"]
    stream = record["stream_bps"] / rate_of(record["rate"])
    rows = []
    for nbytes in sorted({row["bytes"] for row in record["rows"]}):
        times = {name: round_times(record, name, nbytes) for name in names}
        natives = [min(each) for each in zip(*(times[n] for n in names if n.startswith("native")), strict=True)]
        share = wire_us(record, nbytes) / median(times[ours])
        cells = [str(nbytes), *(harness.number(median(times[name])) for name in names)]
        cells.append(harness.spread(harness.ratios(natives, times[ours]), ".2f"))
        rows.append([*cells, *([f"{share:.1%}", f"{share / stream:.1%}"] if nbytes >= LONG else ["", ""])])
    if VERSIONS[0] in names:
        head += ["before / now", "now / now again"]
        for cells, nbytes in zip(rows, sorted({row["bytes"] for row in record["rows"]}), strict=True):
            times = [round_times(record, name, nbytes) for name in VERSIONS]
            cells += [harness.spread(harness.ratios(*pair), ".2f") for pair in pairwise(times)]
    summary = f"A TCP stream carries {stream:.1%} of the rate. {prediction_summary(record)}"
    return f"### {title(record)}\n\n{summary}\n\n{harness.table(head, rows)}"


def prediction_summary(record: dict[str, Any]) -> str:
    """The share of our algorithms' times that were predicted within 15 %; empty for shapes that were not tuned."""
    if not record["tuned"]:
        return ""
    found = []
    for name in TUNED.split(",")[1:]:
        for nbytes in sorted({row["bytes"] for row in record["rows"]}):
            here = [row for row in record["rows"] if (row["algorithm"], row["bytes"]) == (name, nbytes)]
            if here and here[0]["predicted_us"]:
                found.append(here[0]["predicted_us"] / median(row["p50_us"] for row in here))
    near = sum(abs(ratio - 1) <= 0.15 for ratio in found)
    return f"Predicted within 15 %: {near} of {len(found)} times of our algorithms."


def round_times(record: dict[str, Any], name: str, nbytes: int) -> list[float]:
    """An algorithm's medians, a round each."""
    return [row["p50_us"] for row in record["rows"] if (row["algorithm"], row["bytes"]) == (name, nbytes)]


def draw(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Shares of the wire for the longest vectors, a group of bars a shape."""
    names = ["native", "native, han", "ring", "butterfly", "hierarchical", "auto"]
    figure, [[axes]] = harness.panels(9, 5)
    for k, name in enumerate(names):
        heights = []
        for record in records:
            most = max(row["bytes"] for row in record["rows"])
            times = round_times(record, name, most)
            heights.append(wire_us(record, most) / median(times) if times else 0.0)
        axes.bar([x + 0.13 * (k - 2.5) for x in range(len(records))], heights, 0.13, label=name)
    axes.set_xticks(range(len(records)), [title(record) for record in records], rotation=60, ha="right", fontsize=8)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(ylabel="share of the wire", title="Allreduce of the longest vector, float32 sums")
    harness.put_legend_below(axes)
    harness.save(figure, out)


def main() -> int:
    """Measure the shapes that the file lacks, write, print."""
    parser = harness.parser("cluster", __doc__, rounds=3, file="cluster-{mpi}.json")
    harness.add_shapes(parser, SHAPES)
    parser.add_argument("--algorithm", default=ALGORITHMS, metavar="NAMES", help=f"default {ALGORITHMS}")
    parser.add_argument("--calls", type=int, default=7, help="timed from 1 MiB on; below ten times as many (default 7)")
    parser.add_argument("--untuned", action="store_true", help="by the tuning table in force, not by one for the shape")
    parser.add_argument("--against", type=Path, metavar="TREE", help="another checkout, whose package is compared")
    parser.add_argument("--sizes", default=SIZES, help=f"BYTES:BYTES (default {SIZES})")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="keep the tuning tables, and use those there")
    args = harness.parse(parser)
    mpi = library().family.name
    file = harness.results_file(args, mpi=mpi)
    record = harness.Record(file, title, seconds=args.seconds)
    shapes = {shape.title: shape for shape in args.shape}
    record.recall_all(shapes, lambda name: measure_shape(shapes[name], args, mpi))
    for each in record.rows:
        harness.emit("\n" + table(each))
    draw(record.rows, harness.plot_file(args, file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
