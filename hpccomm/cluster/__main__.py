"""``scripts/cluster``: make nodes on this machine, run programs on them, start Slurm there, take them away."""

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


def parser() -> argparse.ArgumentParser:
    """``scripts/cluster``."""
    made = argparse.ArgumentParser(prog="scripts/cluster", description="Several nodes on this machine.")
    commands = made.add_subparsers(dest="action", required=True)
    up = commands.add_parser("up", help="make the nodes")
    up.add_argument("--nodes", type=int, default=4)
    up.add_argument("--rate", default="1gbit", help="of each node's link, either way; '' for no limit (default 1gbit)")
    up.add_argument("--nics", type=int, default=1, help="links of each node, every one of that rate (default 1)")
    run = commands.add_parser("run", help="run a program on them")
    run.add_argument("--per-node", default="1", metavar="K", help="ranks of every node, or K,K,… of each")
    run.add_argument("--placement", default="block", choices=PLACEMENTS)
    run.add_argument("--seed", type=int, default=0, help="for --placement random")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="-- PROGRAM", help="as for hpccomm-run")
    slurm = commands.add_parser("slurm", help="start Slurm on the nodes")
    slurm.add_argument("--cpus", type=int, default=8, help="that each node is said to have (default 8)")
    on = commands.add_parser("on", help="run a command on one host, such as sbatch")
    on.add_argument("host")
    on.add_argument("program", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    status = commands.add_parser("status", help="what stands")
    down = commands.add_parser("down", help="take everything away")
    for each in (up, run, slurm, on, status, down):
        each.add_argument("--name", default="hpc", help="which cluster (default hpc)")
    return made


def execute(args: argparse.Namespace) -> int:
    """Do what was asked."""
    if args.action == "up":
        began = time.monotonic()
        cluster = Cluster(args.nodes, args.rate, args.name, args.nics)
        cluster.up()
        rate = args.rate or "no limit"
        print(f"{args.nodes} nodes ({', '.join(cluster.hosts)}), links of {rate}: {time.monotonic() - began:.1f} s")
        print("scripts/cluster run --per-node 2 -- -m hpccomm info")
        return 0
    if args.action == "down":
        with contextlib.suppress(LaunchError):
            Cluster.find(args.name).down()
        return 0
    cluster = Cluster.find(args.name)
    if args.action == "status":
        print(
            f"{cluster.state.nodes} nodes, links of {cluster.state.rate or 'no limit'}: {', '.join(cluster.namespaces)}"
        )
        return 0
    if args.action == "slurm":
        began = time.monotonic()
        slurm.start(cluster, args.cpus)
        print(f"Slurm is up on {', '.join(cluster.hosts)}: {time.monotonic() - began:.1f} s")
        print("scripts/cluster on n0 -- sbatch slurm/allreduce.sbatch")
        return 0
    program = args.program[1:] if args.program[:1] == ["--"] else args.program
    if not program:
        raise LaunchError(f"say what to run: scripts/cluster {args.action} … -- -m hpccomm info")
    if args.action == "on":
        return cluster.run_on(args.host, program).returncode
    counts = [int(word) for word in args.per_node.split(",")]
    return cluster.run(program, counts[0] if len(counts) == 1 else counts, args.placement, args.seed).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """``scripts/cluster``."""
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
