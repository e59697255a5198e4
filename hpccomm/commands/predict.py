"""``hpccomm predict``: the time of every algorithm of a collective, or of a step of a sharded model, on any cluster."""

from __future__ import annotations

import argparse
import socket

import numpy as np

from hpccomm.algorithms.compression.format import check_density
from hpccomm.algorithms.sharded.cost import STATE_BYTES, Codes, Job, Shape, link_volume, step_cost
from hpccomm.algorithms.sharded.groups import check_placement, smallest_partition
from hpccomm.arguments import flag_of
from hpccomm.collectives import ALGORITHMS
from hpccomm.collectives.compressed.two_phase import CODES
from hpccomm.errors import ArgumentError, LaunchError
from hpccomm.launcher import library
from hpccomm.layout import Link
from hpccomm.performance import sparse_cost, tuning
from hpccomm.performance.cost import Prediction, predict
from hpccomm.performance.machine import Machine
from hpccomm.performance.units import beta_of, format_count, format_shape, format_size, format_time, size_of

STEPS = ("mics", "zero3")
"""Sharded training methods whose step is priced."""
MOST_RANKS = 1 << 20
"""The largest number of ranks whose messages are priced."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("collective", choices=[*sorted(ALGORITHMS), *STEPS], help="a collective; mics, zero3: step of a sharded model")
    add("--nodes", type=int, default=4, metavar="N", help="number of nodes (default 4)")
    add("--per-node", type=int, default=4, metavar="K", help="ranks on a node (default 4)")
    add("--bytes", default="1M", metavar="SIZE", help="size of the vector: 100M, 64Ki, 4 (default 1M)")
    add(
        "--density",
        type=float,
        metavar="D",
        help="also price compressed allreduces that send this share of the elements, such as 0.001",
    )
    add = parser.add_argument_group(
        "the machine", "values that are not given come from this machine's tuning table"
    ).add_argument
    add("--alpha-intra", type=float, metavar="US", help="latency of a message inside a node, microseconds")
    add("--alpha-inter", type=float, metavar="US", help="latency of a message between nodes, microseconds")
    add("--rate-intra", metavar="RATE", help="bandwidth between ranks of a node: 80gbit, 10GB (per second)")
    add("--rate", metavar="RATE", help="bandwidth of a node's link: 100gbit, 1gbit, 12.5GB (per second)")
    add("--rate-sum", metavar="RATE", help="rate at which a rank sums: 10GB (per second)")
    add = parser.add_argument_group(
        "mics and zero3", "a training step with Adam, 16 bytes of model states a parameter"
    ).add_argument
    add("--model", default="1B", metavar="SIZE", help="number of parameters: 100B, 350M (default 1B)")
    add("--layers", type=int, default=48, help="layers, all of one size (default 48)")
    add("--micro-steps", type=int, default=4, metavar="S", help="micro-steps of a step (default 4)")
    add("--tokens", type=int, default=2048, help="tokens of a rank in a micro-step (default 2048)")
    add("--flops", default="170T", help="operations that a rank reaches per second (default 170T: 54 %% of an A100)")
    add("--partition-size", type=int, metavar="P", help="partition size of mics (default: the smallest that fits)")
    add("--memory", default="40G", metavar="SIZE", help="memory of a rank (default 40G)")
    add("--working", default="10G", metavar="SIZE", help="part of it that model states cannot use (default 10G)")
    add("--weight-code", choices=CODES, help="ZeRO++: gather parameters in this code (qwZ)")
    add("--gradient-code", choices=CODES, help="ZeRO++: reduce gradients in this code (qgZ)")
    add("--secondary-shard", action="store_true", help="ZeRO++: gather outside the node once in a step (hpZ)")


def run(args: argparse.Namespace) -> int:
    """Print the table, the fastest algorithm first."""
    if args.nodes < 1 or args.per_node < 1 or args.nodes * args.per_node > MOST_RANKS:
        raise ArgumentError(
            f"--nodes {args.nodes} --per-node {args.per_node}: give 1 or more of each, and up to {MOST_RANKS:,} ranks"
        )
    if args.density is not None:
        check_density(args.density, "--density")
        if args.collective != "allreduce":
            raise ArgumentError(
                f"--density with {args.collective}: compressed exchanges are priced for allreduce only: leave it out"
            )
    given = [name for name in ("weight_code", "gradient_code", "secondary_shard") if getattr(args, name)]
    if given and args.collective not in STEPS:
        flags = ", ".join(map(flag_of, given))
        raise ArgumentError(f"{flags} with {args.collective}: these are for mics and zero3: leave them out")
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
    """Print the time of compressed exchanges, and the density at which sparse and dense are equally fast."""
    what = f"{args.density:g} of the float32 elements, or a code of each"
    print(f"# compressed: {what}; messages and sums of them, no coding")
    for each in sparse_cost.predictions(args.nodes, args.per_node, nbytes, args.density, machine):
        print(line(each))
    for method, (_, width) in sparse_cost.MESSAGES.items():
        path = sparse_cost.choose_row(args.nodes, args.per_node, nbytes, args.density, width, machine)
        print(f'# {method}, exchange="auto": {path.algorithm}, {format_time(path.us)}')
    even = sparse_cost.break_even(args.nodes, args.per_node, nbytes, machine)
    print(f"# at density {even:.2g} the sparse exchange is as fast as a dense allreduce")


def print_steps(args: argparse.Namespace) -> int:
    """Print the time of a step on the given nodes, and on a quarter and half of them."""
    for flag in ("layers", "micro_steps", "tokens"):
        if getattr(args, flag) < 1:
            raise ArgumentError(f"{flag_of(flag)} {getattr(args, flag)}: give 1 or more")
    parameters, machine, k = parameters_of(args.model), machine_of(args), args.per_node
    forward = 2e6 * parameters / args.layers * args.tokens / size_of(args.flops)
    codes = Codes(args.weight_code, args.gradient_code, args.secondary_shard)
    job = Job(parameters, args.layers, args.micro_steps, forward, codes=codes)
    last = shape_for(args, args.nodes * k)
    states = format_size(STATE_BYTES * parameters / last.partition)
    micro_steps, tokens = format_count(args.micro_steps, "micro-step"), format_count(args.tokens, "token")
    print(
        f"# {args.collective}: {parameters:,.0f} parameters of 16 bits in {format_count(args.layers, 'layer')}; "
        f"a copy on {format_count(last.partition, 'rank')}: {states} of model states a rank\n"
        f"# {micro_steps} of {tokens} a rank at {size_of(args.flops) / 1e12:g} TFLOPS, "
        "the forward pass is computed again in the backward pass\n"
        f"{describe_codes(codes)}"
        f"# {links(machine)}; from: {machine.source}"
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
        volume = link_volume(shape, args.micro_steps, codes, job.word)
        sent = parameters * (job.word * (volume.gathers + volume.first) + job.shard_word * volume.second)
        tokens = 1e6 * shape.ranks * args.micro_steps * args.tokens / cost.step
        cells = [format_time(each) for each in cost]
        cells += [f"{sent / 1e9:.4g}", f"{tokens:,.0f}", f"{first / cost.step:.1%}"]
        print(f"{nodes:<8}" + "".join(f"{cell:>12}" for cell in cells))
    return 0


def describe_codes(codes: Codes) -> str:
    """A line about what ZeRO++ sends, if it is used."""
    parts = [
        f"{what} in {code}" for what, code in (("parameters", codes.weight), ("gradients", codes.gradient)) if code
    ]
    parts += ["one gather of a unit in a step between nodes"] * codes.secondary
    return f"# ZeRO++: {', '.join(parts)}; messages only, no coding\n" if parts else ""


def shape_for(args: argparse.Namespace, ranks: int) -> Shape:
    """The layout of the model on so many ranks."""
    if args.collective == "zero3":
        return Shape(ranks, args.per_node, ranks, two_levels=False)
    most, size = args.nodes * args.per_node, args.partition_size
    if size is None:
        states, memory, working = STATE_BYTES * parameters_of(args.model), size_of(args.memory), size_of(args.working)
        size = smallest_partition(states, memory, most, args.per_node, working)
    check_placement("--partition-size", np.arange(most) // args.per_node, size)
    return Shape(ranks, args.per_node, size)


def parameters_of(text: str) -> float:
    """A number of parameters: ``100B`` is a hundred billion."""
    return size_of(text[:-1] + "G" if text[-1:] in ("B", "b") else text)


def heading(args: argparse.Namespace, nbytes: float, machine: Machine) -> str:
    """The lines above the table: the call, the machine and the source of its parameters."""
    return (
        f"# {args.collective} of {nbytes:,.0f} bytes on {format_shape(args.nodes, args.per_node)}\n"
        f"# {links(machine)}, sums {rate(machine.gamma)}\n"
        f"# from: {machine.source}{format_shapes(machine)}\n"
        "# wire: the time that the link needs for the bytes alone, as a share of the predicted time"
    )


def links(machine: Machine) -> str:
    """Latency and bandwidth inside a node and between nodes, as text."""
    intra, inter = machine.intra, machine.inter
    return (
        f"inside a node {format_time(intra.alpha)} + {rate(intra.beta)}, between nodes {format_time(inter.alpha)} + "
        f"{rate(inter.beta)} shared by its ranks"
    )


def format_shapes(machine: Machine) -> str:
    """The shapes on which rounds were measured, as text."""
    shapes = sorted({(each.nodes, each.per_node) for each in machine.curves})
    return f"; rounds measured on {', '.join(f'{n} x {k}' for n, k in shapes)} ranks" if shapes else ""


def line(each: Prediction) -> str:
    """The line of one algorithm; compressed exchanges send fewer bytes and have no share of the wire."""
    wire = f"{each.wire:.0%}" if each.wire <= 1 else "-"
    return (
        f"{each.algorithm:<21}{format_time(each.us):>12}{each.algbw:>12.3f}{each.busbw:>12.3f}"
        f"{each.rounds:>8}{each.segments:>10}{wire:>7}  {each.source}"
    )


def rate(beta: float) -> str:
    """A bandwidth as text, from microseconds per byte."""
    return f"{1e-3 / beta:.3g} GB/s" if beta else "unlimited"


def machine_of(args: argparse.Namespace) -> Machine:
    """The machine of the tuning table, with the values of the command line."""
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
    return Machine(intra, inter, gamma, "the command line and " + known.source) if changed else known


def this_mpi() -> str:
    """Name and version of the MPI library, for which a tuning table is looked up; empty without MPI."""
    try:
        return library().name
    except LaunchError:
        return ""
