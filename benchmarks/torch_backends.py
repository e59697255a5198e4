"""Calls of torch.distributed on hpccomm beside gloo, and steps of DDP and FSDP2: run it on a quiet machine.

    hpccomm-run -n 2 -m benchmarks.torch_backends --json torch-p2.json
    hpccomm-run -n 4 -m benchmarks.torch_backends --rounds 3 --largest 65536
    python -m benchmarks.torch_backends --page torch-p2.json torch-p4.json --plot torch.svg

*One launch, groups interleaved.*  A round measures every group once, each after a barrier, in an order that changes;
the slowest rank counts.  The null is a second group of hpccomm: its ratio to the first one is what noise alone does.
``--page`` prints the tables of some files, of every fourth size, as the documentation shows them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from benchmarks import harness
from hpccomm.train.torch_networks import GPT, gpt_loss

BUDGET_S = 0.02
"""Time of a measurement, which decides how often a call is repeated."""
LOADER = """
import time
import numpy as np
numbers = np.random.default_rng(0)
while True:
    began = time.perf_counter()
    images = numbers.integers(0, 256, (64, 32, 32, 3), np.uint8)[:, ::-1].astype(np.float32)
    np.save("/dev/null", (images - images.mean()) / images.std())
    time.sleep(time.perf_counter() - began)
"""
"""A data loader's worker: it makes batches for half of the time, and waits for its consumer for the other half."""


def calls(group: Any, length: int, ranks: int) -> dict[str, Callable[[], Any]]:
    """The collectives on ``length`` float32, the length of the whole vector."""
    x, row = torch.ones(length), torch.ones(max(ranks, length // ranks * ranks))
    part = torch.ones(row.numel() // ranks)
    return {
        "all_reduce": lambda: dist.all_reduce(x, group=group),
        "broadcast": lambda: dist.broadcast(x, 0, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(row, part, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, row, group=group),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(row), row, group=group),
    }


def steps(group: Any) -> dict[str, Callable[[], Any]]:
    """A step of DDP and one of FSDP2 on the GPT of six layers."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    ddp = torch.nn.parallel.DistributedDataParallel(GPT(), process_group=group)
    sharded, mesh = GPT(), dist.DeviceMesh.from_group(group, "cpu")
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    text = torch.randint(256, (4, 65))

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        gpt_loss(model, text).backward()
        optimizer.step()

    models = {"DDP step": ddp, "FSDP2 step": sharded}
    made = {name: (model, torch.optim.SGD(model.parameters(), 0.01)) for name, model in models.items()}
    return {name: lambda pair=pair: step(*pair) for name, pair in made.items()}


def compare(rows: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """The seconds of every round by group."""
    measure = partial(harness.time_collective, MPI.COMM_WORLD)
    repeats = {name: max(1, min(1000, int(BUDGET_S / measure(call, 3)))) for name, call in rows.items()}
    turns = {name: partial(measure, call, repeats[name]) for name, call in rows.items()}
    return harness.take_turns(turns, rounds, warmup=0, shuffle=True)


def table(results: list[dict[str, Any]]) -> str:
    """One launch: gloo's time by ours round by round, its median and worst, and the worst of the null's."""
    lines = []
    for row in results:
        if row["bytes"] and math.log2(row["bytes"]) % 4 != 2:
            continue
        ours, gloo = (row["seconds"][name] for name in ("hpccomm", "gloo"))
        gains, nulls = harness.ratios(gloo, ours), null_ratios(row)
        times = [harness.number(median(each) * 1e6) for each in (ours, gloo)]
        size = f"{row['bytes']}" if row["bytes"] else ""
        lines.append([row["call"], size, *times, f"**{median(gains):.3g}**", f"{min(gains):.3g}", f"{min(nulls):.2f}"])
    head = ["call", "bytes", "hpccomm, µs", "gloo, µs", "gloo / hpccomm", "worst round", "worst null"]
    return f"## {results[0]['ranks']} ranks\n\n{harness.table(head, lines, words=1)}"


def draw(launches: list[list[dict[str, Any]]], out: Path) -> None:
    """Gloo's time by ours against the size, and the range of the null."""
    figure, axes = harness.panels(9, 3.6, columns=len(launches), sharey=True)
    for axis, results in zip(axes[0], launches, strict=True):
        sized = [row for row in results if row["bytes"]]
        sizes = sorted({row["bytes"] for row in sized})
        for name in dict.fromkeys(row["call"] for row in sized):
            seconds = [row["seconds"] for row in sized if row["call"] == name]
            gains = [median(harness.ratios(each["gloo"], each["hpccomm"])) for each in seconds]
            axis.plot(sizes, gains, marker="o", markersize=3, label=name)
        nulls = [[r for row in sized if row["bytes"] == n for r in null_ratios(row)] for n in sizes]
        axis.fill_between(sizes, [min(each) for each in nulls], [max(each) for each in nulls], alpha=0.2, label="null")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="bytes", title=f"{results[0]['ranks']} ranks")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("gloo / hpccomm, median")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    harness.save(figure, out)


@contextmanager
def data_loaders(workers: int) -> Iterator[None]:
    """Run so many workers of data loaders beside."""
    running = [subprocess.Popen([sys.executable, "-c", LOADER]) for _ in range(workers)]
    try:
        yield
    finally:
        for each in running:
            each.kill()
            each.wait()


def null_ratios(row: dict[str, Any]) -> list[float]:
    """The second group's time by the first one's, round by round."""
    return harness.ratios(row["seconds"]["null"], row["seconds"]["hpccomm"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--largest", type=int, default=64 << 20, help="bytes of the longest vector, up to 256 MB")
    parser.add_argument("--loaders", type=int, default=0, help="workers of data loaders that run beside, default none")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, nargs="+", help="print the tables of these files and measure nothing")
    parser.add_argument("--plot", type=Path, help="with --page: draw the ratios of all sizes into this file")
    args = parser.parse_args()
    if args.page:
        launches = [json.loads(file.read_text()) for file in args.page]
        harness.emit(*map(table, launches))
        if args.plot:
            draw(launches, args.plot)
        return
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    dist.init_process_group("hpccomm")
    rank = dist.get_rank()
    groups = {"hpccomm": dist.new_group(), "null": dist.new_group(), "gloo": dist.new_group(backend="gloo")}
    sizes = [4**k for k in range(1, 15) if 4**k <= args.largest]
    with data_loaders(args.loaders if rank == 0 else 0):
        results = measure([*sizes, 0], groups, args.rounds)
    if args.json and rank == 0:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


def measure(sizes: list[int], groups: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The seconds of all calls, by size; 0 are steps of models."""
    results, rank, ranks = [], dist.get_rank(), dist.get_world_size()
    for size in sizes:
        make = partial(calls, length=size // 4, ranks=ranks) if size else steps
        made = {name: make(group) for name, group in groups.items()}
        for name in made["gloo"]:
            seconds = compare({group: made[group][name] for group in groups}, rounds)
            results.append({"call": name, "bytes": size, "ranks": ranks, "seconds": seconds})
            if rank == 0:
                middle = {group: median(each) for group, each in seconds.items()}
                null, gain = middle["null"] / middle["hpccomm"], middle["gloo"] / middle["hpccomm"]
                times = " ".join(f"{group} {each * 1e6:10.1f}" for group, each in middle.items())
                print(f"{name:15}{size:>11} B  µs: {times}  null {null:5.2f}  gloo/hpccomm {gain:6.2f}", flush=True)
    return results


if __name__ == "__main__":
    main()
