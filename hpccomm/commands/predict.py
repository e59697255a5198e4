"""Predict what every algorithm of a collective, or a step of a model in parts, would cost on a cluster elsewhere."""

from __future__ import annotations

import argparse
import re
import socket

import numpy as np

from hpccomm.algorithms.compression.format import check_density
from hpccomm.algorithms.sharded.cost import STATE_BYTES, Job, Shape, link_volume, step_cost
from hpccomm.algorithms.sharded.groups import check_placement, smallest_partition
from hpccomm.collectives import ALGORITHMS
from hpccomm.errors import ArgumentError, LaunchError
from hpccomm.launcher import library
from hpccomm.layout import Link
from hpccomm.performance import sparse_cost, tuning
from hpccomm.performance.cost import Prediction, predict
from hpccomm.performance.machine import Machine
from hpccomm.performance.units import beta_of, format_time, size_of

SUMMARY = "price every algorithm of a collective on a cluster of your choice"
STEPS = ("mics", "zero3")
"""Ways to divide a model, a step of which is priced."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What, where, how much."""
    parser.add_argument("collective", choices=[*sorted(ALGORITHMS), *STEPS], help="or a step of a model in parts")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument("--per-node", type=int, default=1, metavar="K", help="ranks a node (default 1)")
    parser.add_argument("--bytes", default="1M", metavar="SIZE", help="100M, 64Ki, 4 (default 1M)")
    parser.add_argument(
        "--density",
        type=float,
        metavar="D",
        help="of an allreduce, too: what is sent of a compressed gradient, as 0.001",
    )
    group = parser.add_argument_group("the machine", "what is not said comes from this machine's tuning table")
    group.add_argument("--alpha-intra", type=float, metavar="US", help="a message in a node, microseconds")
    group.add_argument("--alpha-inter", type=float, metavar="US", help="a message between nodes, microseconds")
    group.add_argument("--rate-intra", metavar="RATE", help="between ranks of a node: 80gbit, 10GB")
    group.add_argument("--rate", metavar="RATE", help="of a node's link: 100gbit, 1gbit, 12.5GB (per second)")
    group.add_argument("--rate-sum", metavar="RATE", help="at which a rank sums: 10GB")
    group = parser.add_argument_group("a step", "of mics and zero3: Adam, 16 bytes of states a parameter")
    group.add_argument("--model", default="1B", metavar="SIZE", help="parameters: 100B, 350M (default 1B)")
    group.add_argument("--layers", type=int, default=48, help="of one size (default 48)")
    group.add_argument("--micro-steps", type=int, default=4, metavar="S", help="of a step (default 4)")
    group.add_argument("--tokens", type=int, default=2048, help="of a rank's micro-step (default 2048)")
    group.add_argument("--flops", default="170T", help="a rank reaches in a second (default 170T: 54 %% of an A100)")
    group.add_argument("--partition-size", type=int, metavar="P", help="of mics (default: the smallest that fits)")
    group.add_argument("--memory", default="40G", metavar="SIZE", help="of a rank (default 40G)")
    group.add_argument("--working", default="10G", metavar="SIZE", help="of that, not for states (default 10G)")


def run(args: argparse.Namespace) -> int:
    """Print the table, the fastest first."""
    if args.nodes < 1 or args.per_node < 1:
        raise ArgumentError(f"--nodes {args.nodes} --per-node {args.per_node}: both must be 1 or more")
    if args.density is not None:
        check_density(args.density, "--density")
        if args.collective != "allreduce":
            raise ArgumentError(
                f"--density with {args.collective}: compressed gradients are priced beside an allreduce"
            )
    if args.collective in STEPS:
        return print_steps(args)
    nbytes, machine = size_of(args.bytes), machine_of(args)
    print(heading(args, nbytes, machine))
    titles = ("algorithm", "time", "algbw GB/s", "busbw GB/s", "rounds", "segments", "wire")
    print("{:<21}{:>12}{:>12}{:>12}{:>8}{:>10}{:>7}  by".format(*titles))
    for each in predict(args.collective, args.nodes, args.per_node, nbytes, machine):
        print(line(each))
    if args.density is not None:
        print_compressed(args, nbytes, machine)
    return 0


def print_compressed(args: argparse.Namespace, nbytes: float, machine: Machine) -> None:
    """Print what exchanges of compressed gradients take, and from which density on dense is as fast."""
    print(f"# compressed: {args.density:g} of the float32, or one bit of each; messages alone, without the computing")
    for each in sparse_cost.predictions(args.nodes, args.per_node, nbytes, args.density, machine):
        print(line(each))
    even = sparse_cost.break_even(args.nodes, args.per_node, nbytes, machine)
    print(f"# sparse takes as long as the fastest dense allreduce at density {even:.2g}")


def print_steps(args: argparse.Namespace) -> int:
    """Print what a step costs on so many nodes, and on a quarter and half of them."""
    for flag in ("layers", "micro_steps", "tokens"):
        if getattr(args, flag) < 1:
            raise ArgumentError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be 1 or more")
    parameters, machine, k = parameters_of(args.model), machine_of(args), args.per_node
    forward = 2e6 * parameters / args.layers * args.tokens / size_of(args.flops)
    job = Job(parameters, args.layers, args.micro_steps, forward)
    last = shape_for(args, args.nodes * k)
    intra, inter = machine.intra, machine.inter
    print(
        f"# {args.collective}: {parameters:,.0f} parameters in {args.layers} layers, 16-bit, {last.partition} ranks a "
        f"copy: {STATE_BYTES * parameters / last.partition / 1e9:.3g} GB of states a rank\n"
        f"# {args.micro_steps} micro-steps of {args.tokens} tokens a rank at {size_of(args.flops) / 1e12:g} TFLOPS, "
        "forward once more on the way back\n"
        f"# in a node {intra.alpha:g} us + {rate(intra.beta)}, between nodes {inter.alpha:g} us + {rate(inter.beta)} "
        f"shared by its ranks; from: {machine.source}"
    )
    titles = ("nodes", "step", "computing", "gathers", "first hop", "second hop", "link, GB", "tokens/s", "scaling")
    print(("{:<8}" + "{:>12}" * 8).format(*titles))
    first = None
    for nodes in sorted({max(1, args.nodes // 4), max(1, args.nodes // 2), args.nodes}):
        shape = shape_for(args, nodes * k)
        if shape.ranks % shape.partition:
            continue
        cost = step_cost(job, shape, machine)
        first = first or cost.step
        volume = link_volume(shape, args.micro_steps)
        sent = parameters * (job.word * (volume.gathers + volume.first) + job.shard_word * volume.second)
        tokens = 1e6 * shape.ranks * args.micro_steps * args.tokens / cost.step
        cells = [format_time(each) for each in cost]
        cells += [f"{sent / 1e9:.4g}", f"{tokens:.4g}", f"{first / cost.step:.1%}"]
        print(f"{nodes:<8}" + "".join(f"{cell:>12}" for cell in cells))
    return 0


def shape_for(args: argparse.Namespace, ranks: int) -> Shape:
    """How so many ranks divide the model."""
    if args.collective == "zero3":
        return Shape(ranks, args.per_node, ranks, two_levels=False)
    most, size = args.nodes * args.per_node, args.partition_size
    if size is None:
        states, memory, working = STATE_BYTES * parameters_of(args.model), size_of(args.memory), size_of(args.working)
        size = smallest_partition(states, memory, most, args.per_node, working)
    check_placement("--partition-size", np.arange(most) // args.per_node, size)
    return Shape(ranks, args.per_node, size)


def parameters_of(text: str) -> float:
    """Parameters: ``100B`` are a hundred billion."""
    return size_of(text[:-1] + "G" if text[-1:] in ("B", "b") else text)


def heading(args: argparse.Namespace, nbytes: float, machine: Machine) -> str:
    """What is being priced."""
    intra, inter = machine.intra, machine.inter
    return (
        f"# {args.collective} of {nbytes:,.0f} bytes on {args.nodes} x {args.per_node} ranks\n"
        f"# in a node {intra.alpha:g} us + {rate(intra.beta)}, between nodes {inter.alpha:g} us + "
        f"{rate(inter.beta)} shared by its ranks, sums {rate(machine.gamma)}\n"
        f"# from: {machine.source}{format_shapes(machine)}\n"
        "# wire: the fastest that the link permits, as a share of the time"
    )


def format_shapes(machine: Machine) -> str:
    """The shapes whose rounds were measured, for people."""
    shapes = sorted({(each.nodes, each.per_node) for each in machine.curves})
    return f"; rounds measured on {', '.join(f'{n} x {k}' for n, k in shapes)} ranks" if shapes else ""


def line(each: Prediction) -> str:
    """One algorithm."""
    return (
        f"{each.algorithm:<21}{format_time(each.us):>12}{each.algbw:>12.3f}{each.busbw:>12.3f}"
        f"{each.rounds:>8}{each.segments:>10}{each.wire:>7.0%}  {each.source}"
    )


def rate(beta: float) -> str:
    """Bytes per second for people, from microseconds a byte."""
    return f"{1e-3 / beta:.3g} GB/s" if beta else "no limit"


def machine_of(args: argparse.Namespace) -> Machine:
    """This machine's table, and what the command line says instead."""
    known = tuning.load(this_mpi(), socket.gethostname()).machine or Machine()
    intra = Link(
        known.intra.alpha if args.alpha_intra is None else args.alpha_intra,
        known.intra.beta if args.rate_intra is None else beta_of(args.rate_intra),
    )
    inter = Link(
        known.inter.alpha if args.alpha_inter is None else args.alpha_inter,
        known.inter.beta if args.rate is None else beta_of(args.rate),
    )
    gamma = known.gamma if args.rate_sum is None else beta_of(args.rate_sum)
    changed = (intra, inter, gamma) != known[:3]
    return Machine(intra, inter, gamma, "command line, and " + known.source) if changed else known


def this_mpi() -> str:
    """Name and version of the MPI library, by which tables are found; nothing where there is none."""
    try:
        found = library()
    except LaunchError:
        return ""
    number = re.search(r"\d+(\.\d+)+", found.version)
    return f"{found.family.library} {number[0] if number else ''}".strip()
