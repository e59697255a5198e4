"""``scripts/bench_cluster``: dense allreduce between the nodes of a virtual cluster, beside what its links carry.

For each shape a cluster is made and, unless ``--untuned``, tuned; then, in every round, one launch measures native MPI
and ours in turns, and another native MPI with Open MPI's ``han``.  Figures are medians over the rounds; a share of the
wire is the least time that the nominal rate permits, 2(N-1)/N · bytes/rate, by the time that was measured.  A plain TCP
stream runs on the same links.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from hpccomm.cluster.nodes import Cluster, rate_of
from hpccomm.launcher import library

OUT = Path("docs/measurements")
ALGORITHMS = "native,auto,hierarchical,ring,butterfly,doubling"
SIZES = "8:16777216"
FACTOR, LONG = 8, 1 << 20
"""From one size to the next; bytes from which a call keeps links busy for long."""
SHORT_CALLS = 10
"""Timed calls of shorter vectors for each of a long one."""
TUNED = "native,hierarchical,ring,butterfly,doubling"
HAN = {"OMPI_MCA_coll_han_priority": "100"}

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
"""Bits a second that one connection carries, from its fifth megabyte to the peer's goodbye."""


class Shape(NamedTuple):
    """Where is measured."""

    nodes: int
    per_node: tuple[int, ...]
    placement: str
    rate: str

    @property
    def title(self) -> str:
        """In words."""
        each = set(self.per_node)
        ranks = str(*each) if len(each) == 1 else "+".join(map(str, self.per_node))
        order = "" if self.placement == "block" else f", {self.placement}"
        return f"{self.nodes} x {ranks}{order}, {self.rate}"


def shape_of(text: str) -> Shape:
    """A shape as on the command line: ``4x2``, ``4x2,100mbit``, ``3x2+1+3,1gbit,cyclic``."""
    where, rate, placement = [*text.split(","), *("", "1gbit", "block")[text.count(",") + 1 :]]
    nodes, _, ranks = where.partition("x")
    per_node = tuple(map(int, ranks.split("+")))
    return Shape(int(nodes), per_node * int(nodes) if len(per_node) == 1 else per_node, placement, rate)


def shapes() -> list[Shape]:
    """What is measured where nothing is said."""
    even = [Shape(n, (k,) * n, "block", rate) for rate in ("1gbit", "100mbit") for n in (2, 4, 8) for k in (1, 2)]
    return [
        *even,
        Shape(4, (2,) * 4, "cyclic", "1gbit"),
        Shape(2, (1, 3), "block", "1gbit"),
        Shape(3, (2, 1, 3), "cyclic", "1gbit"),
        Shape(16, (1,) * 16, "block", "100mbit"),
        Shape(16, (2,) * 16, "block", "100mbit"),
    ]


def measure_shape(shape: Shape, args: argparse.Namespace, han: dict[str, str]) -> dict[str, Any]:
    """One shape: its rows, and what a TCP stream carries; ``han`` turns that on where the MPI has it."""
    with Cluster(shape.nodes, shape.rate) as cluster, tempfile.TemporaryDirectory() as folder:
        table = Path(args.tables or folder, f"{shape.title.replace(' ', '')}.json")
        slow = rate_of(shape.rate) < 5e8
        most = 1 << (22 if slow else 24)
        tuned = "4,256,4Ki,32Ki,256Ki,1Mi" + ("" if slow else ",4Mi") + f",{most}"
        tune = ["hpccomm", "tune", "--collective", "allreduce", "--algorithm", TUNED, "--sizes", tuned]
        if not args.untuned and not table.exists():
            check_exit(launch(cluster, shape, [*tune, "--out", str(table)], {}))
        tables = {} if args.untuned else {"HPCCOMM_TUNING": str(table)}
        rows = []
        for number in range(args.rounds):
            for names, settings in [(args.algorithm, {}), *([("native", han)] if han else [])]:
                for sizes, calls in size_ranges(args.sizes, args.calls):
                    file = Path(folder, "rows.json")
                    bench = ["hpccomm", "bench", "allreduce", "--algorithm", names, "-m", sizes, "-i", str(calls)]
                    bench += ["--step-factor", str(FACTOR), "-x", "2", "-c", "-u", "0", "--json", str(file)]
                    check_exit(launch(cluster, shape, bench, {**tables, **settings}))
                    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
                        name = "native, han" if settings else row["algorithm"]
                        kept = {key: row[key] for key in ("bytes", "p50_us", "predicted_us")}
                        rows.append({"round": number, "algorithm": name, **kept})
        streams = [measure_stream(cluster) for _ in range(3)]
    return {**shape._asdict(), "tuned": not args.untuned, "stream_bps": median(streams), "rows": rows}


def size_ranges(sizes: str, calls: int) -> Iterator[tuple[str, int]]:
    """Ranges of sizes, and how many calls are timed: many where a rested link lets the first ones pass for free."""
    least, most = map(int, sizes.split(":"))
    ladder = [least]
    while ladder[-1] * FACTOR <= most:
        ladder.append(ladder[-1] * FACTOR)
    for part, count in (
        ([n for n in ladder if n < LONG], SHORT_CALLS * calls),
        ([n for n in ladder if n >= LONG], calls),
    ):
        if part:
            yield f"{part[0]}:{part[-1]}", count


def launch(cluster: Cluster, shape: Shape, program: Sequence[str], env: dict[str, str]) -> Any:
    """One launch on the cluster."""
    return cluster.run(program, shape.per_node, shape.placement, env=env, capture_output=True, text=True, timeout=900)


def check_exit(done: subprocess.CompletedProcess[str]) -> None:
    """Say what went wrong, and stop."""
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, done.args[-1:]))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


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
    return Shape(record["nodes"], tuple(record["per_node"]), record["placement"], record["rate"]).title


def wire_us(record: dict[str, Any], nbytes: int) -> float:
    """The least time that the nominal rate permits."""
    return 2 * (record["nodes"] - 1) / record["nodes"] * nbytes * 8e6 / rate_of(record["rate"])


def table(record: dict[str, Any]) -> str:
    """One shape's times, and how ours stands to native MPI and to the wire."""
    names = list(dict.fromkeys(row["algorithm"] for row in record["rows"]))
    ours = "auto" if "auto" in names else next(name for name in names if not name.startswith("native"))
    lines = [
        f"### {title(record)}",
        "",
        f"A TCP stream carries {record['stream_bps'] / rate_of(record['rate']):.1%} of the rate. "
        f"{prediction_summary(record)}",
        "",
    ]
    lines.append(
        "| bytes | "
        + " | ".join(f"{name}, µs" for name in names)
        + f" | best native / {ours} | of the wire | of a stream |"
    )
    lines.append("|" + "---:|" * (len(names) + 4))
    for nbytes in sorted({row["bytes"] for row in record["rows"]}):
        times = {name: round_medians(record, name, nbytes) for name in names}
        ratios = sorted(
            min(times[name][k] for name in names if name.startswith("native")) / times[ours][k]
            for k in range(len(times[ours]))
        )
        share = wire_us(record, nbytes) / median(times[ours])
        stream_share = share * rate_of(record["rate"]) / record["stream_bps"]
        cells = [str(nbytes), *(f"{median(times[name]):.4g}" for name in names)]
        cells.append(f"**{median(ratios):.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f})")
        cells += [f"{share:.1%}", f"{stream_share:.1%}"] if nbytes >= 1 << 20 else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def prediction_summary(record: dict[str, Any]) -> str:
    """How many of our algorithms' times were predicted within 15 %; nothing by prices that were not measured there."""
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


def round_medians(record: dict[str, Any], name: str, nbytes: int) -> list[float]:
    """An algorithm's medians, a round each."""
    return [row["p50_us"] for row in record["rows"] if (row["algorithm"], row["bytes"]) == (name, nbytes)]


def draw(records: Sequence[dict[str, Any]], out: Path) -> None:
    """Shares of the wire for the longest vectors, a group of bars a shape."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    names = ["native", "native, han", "ring", "butterfly", "hierarchical", "auto"]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for k, name in enumerate(names):
        heights = []
        for record in records:
            most = max(row["bytes"] for row in record["rows"])
            times = round_medians(record, name, most)
            heights.append(wire_us(record, most) / median(times) if times else 0.0)
        axes.bar([x + 0.13 * (k - 2.5) for x in range(len(records))], heights, 0.13, label=name)
    axes.set_xticks(range(len(records)), [title(record) for record in records], rotation=60, ha="right", fontsize=8)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(ylabel="share of the wire", title="Allreduce of the longest vector, float32 sums")
    axes.legend(fontsize=8, ncols=3)
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(prog="scripts/bench_cluster", description=__doc__)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument(
        "--shape", action="append", type=shape_of, metavar="NxK[,RATE[,PLACEMENT]]", help="4x2,1gbit,cyclic; several"
    )
    parser.add_argument("--algorithm", default=ALGORITHMS, metavar="NAMES", help=f"default {ALGORITHMS}")
    parser.add_argument(
        "--calls",
        type=int,
        default=7,
        help="timed for each algorithm from 1 MiB on; below ten times as many (default 7)",
    )
    parser.add_argument("--untuned", action="store_true", help="by the table at hand, not by one made for each shape")
    parser.add_argument("--sizes", default=SIZES, help=f"BYTES:BYTES (default {SIZES})")
    parser.add_argument(
        "--tables", type=Path, metavar="FOLDER", help="keep what tuning makes; what is there is not tuned again"
    )
    parser.add_argument("--out", type=Path, help="what it holds is not measured again (default: by the MPI's name)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is taken away
    mpi = library().family.name
    out = args.out or OUT / f"cluster-{mpi.replace(' ', '-').lower()}.json"
    records = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    done = {title(record) for record in records}
    for shape in args.shape or shapes():
        if shape.title not in done:
            records.append(measure_shape(shape, args, HAN if mpi == "Open MPI" else {}))
            out.write_text(json.dumps(records).replace("}, {", "},\n{") + "\n", encoding="utf-8")
    for record in records:
        sys.stdout.write("\n" + table(record))
    draw(records, out.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
