"""``scripts/cluster``: create nodes on this machine, run programs on them, start Slurm there, remove them."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Sequence

from hpccomm.cluster import slurm
from hpccomm.cluster.nodes import PLACEMENTS, Cluster, exit_on_signal
from hpccomm.errors import LaunchError
from hpccomm.performance.units import format_count


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="scripts/cluster", description="A virtual cluster of nodes on this machine.")
    commands = made.add_subparsers(dest="action", required=True)
    up = commands.add_parser("up", help="create the nodes")
    up.add_argument("--nodes", type=int, default=4, help="number of nodes (default 4)")
    up.add_argument(
        "--rate", default="1gbit", help="rate of each link, in either direction; '' for no limit (default 1gbit)"
    )
    up.add_argument("--nics", type=int, default=1, help="links of each node, each of that rate (default 1)")
    run = commands.add_parser("run", help="run a program on the nodes")
    run.add_argument(
        "--per-node", default="1", metavar="K", help="ranks on each node, or K,K,… with one number for each (default 1)"
    )
    run.add_argument(
        "--placement", default="block", choices=PLACEMENTS, help="order of placing ranks on nodes (default block)"
    )
    run.add_argument("--seed", type=int, default=0, help="seed of --placement random (default 0)")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM", help="program, as hpccomm-run takes it")
    slurm = commands.add_parser("slurm", help="start Slurm on the nodes")
    slurm.add_argument("--cpus", type=int, default=8, help="CPUs that Slurm counts on each node (default 8)")
    on = commands.add_parser("on", help="run a command on one host, for example sbatch")
    on.add_argument("host", help="n0, n1, …")
    on.add_argument("program", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    status = commands.add_parser("status", help="show the cluster")
    down = commands.add_parser("down", help="remove the cluster and end what runs on it")
    for each in (up, run, slurm, on, status, down):
        each.add_argument("--name", default="hpc", help="name of the cluster (default hpc)")
    return made


def execute(args: argparse.Namespace) -> int:
    """Run one command; returns the exit status."""
    if args.action == "up":
        began = time.monotonic()
        cluster = Cluster(args.nodes, args.rate, args.name, args.nics)
        cluster.up()
        rate = args.rate or "unlimited rate"
        hosts, seconds = ", ".join(cluster.hosts), time.monotonic() - began
        print(f"{format_count(args.nodes, 'node')} with links of {rate} up after {seconds:.1f} s: {hosts}")
        print("next: scripts/cluster run --per-node 2 -- -m hpccomm info")
        return 0
    if args.action == "down":
        with contextlib.suppress(LaunchError):
            Cluster.find(args.name).down()
        return 0
    cluster = Cluster.find(args.name)
    if args.action == "status":
        nodes, rate = format_count(cluster.state.nodes, "node"), cluster.state.rate or "unlimited rate"
        print(f"{nodes} with links of {rate}: {', '.join(cluster.namespaces)}")
        return 0
    if args.action == "slurm":
        began = time.monotonic()
        slurm.start(cluster, args.cpus)
        print(f"Slurm up on {', '.join(cluster.hosts)} after {time.monotonic() - began:.1f} s")
        print("next: scripts/cluster on n0 -- sbatch slurm/allreduce.sbatch")
        return 0
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        example = "run -- -m hpccomm info" if args.action == "run" else f"on {args.host} -- sinfo"
        raise LaunchError(f"no program to run: write it after --, for example scripts/cluster {example}")
    if args.action == "on":
        return cluster.run_on(args.host, program).returncode
    counts = [int(word) for word in args.per_node.split(",")]
    return cluster.run(program, counts[0] if len(counts) == 1 else counts, args.placement, args.seed).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and report an error in one line."""
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        return execute(parser().parse_args(argv))
    except LaunchError as error:
        sys.stderr.write(f"scripts/cluster: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
