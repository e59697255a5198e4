"""``hpccomm plot``: print or draw a schedule, or draw files of ``hpccomm bench --json``."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpccomm.arguments import unknown_name
from hpccomm.collectives import ALGORITHMS, draw
from hpccomm.collectives.hierarchical import HIERARCHICAL
from hpccomm.collectives.schedule import Algorithm
from hpccomm.collectives.verify import ROOTED_COLLECTIVES
from hpccomm.commands.files import check_drawable
from hpccomm.errors import ArgumentError
from hpccomm.performance.units import format_count

LARGEST = 256
"""Ranks of which the messages are shown."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("what", nargs="+", help="an algorithm (ring, butterfly …) or files of `hpccomm bench --json`")
    add("--collective", choices=sorted(ALGORITHMS), help="collective of the algorithm (default: the first that has it)")
    add("--size", type=int, default=4, metavar="P", help="number of ranks (default 4)")
    add("--root", type=int, default=0, metavar="R", help="root of bcast and reduce (default 0)")
    add("--per-node", type=int, default=2, metavar="K", help="ranks on a node, for hierarchical (default 2)")
    add("--out", metavar="FILE", help="draw into this file (png, svg or pdf)")


def run(args: argparse.Namespace) -> int:
    """Draw measurements if all arguments are files, else show an algorithm."""
    if all(Path(each).is_file() for each in args.what):
        return draw_measurements(args)
    if len(args.what) > 1:
        missing = [each for each in args.what if not Path(each).is_file()]
        raise ArgumentError(f"no such file: {', '.join(missing)}; give files that exist, or one algorithm")
    return show_schedule(args)


def draw_measurements(args: argparse.Namespace) -> int:
    """Draw one or several benchmark files."""
    from hpccomm.bench import plot

    if args.out is None:
        raise ArgumentError("measurements are drawn into a file: add --out FILE.png")
    check_drawable("--out", Path(args.out))
    plot.draw(args.what, args.out)
    return 0


def show_schedule(args: argparse.Namespace) -> int:
    """Print the rounds of a schedule; with ``--out``, draw them."""
    name = args.what[0]
    if not 1 <= args.size <= LARGEST or args.per_node < 1:
        raise ArgumentError(f"--size {args.size} --per-node {args.per_node}: use 1 or more, and up to {LARGEST} ranks")
    if not 0 <= args.root < args.size:
        raise ArgumentError(f"--root {args.root} --size {args.size}: use a root from 0 to size - 1")
    if args.out:
        check_drawable("--out", Path(args.out))
    collective, algorithm = resolve_algorithm(name, args)
    root = (args.root,) if collective in ROOTED_COLLECTIVES else ()
    title = f"{collective}, {name}, {format_count(args.size, 'rank')}" + (f", root {args.root}" if root else "")
    where = f", {format_count(args.per_node, 'rank')} on a node" if name == "hierarchical" else ""
    print(f"{title}, {format_count(algorithm.blocks(args.size), 'block')}{where}")
    print("\n".join(draw.text(algorithm, args.size, *root)))
    if args.out:
        nodes = nodes_of(args) if name == "hierarchical" else []
        draw.draw_schedule(algorithm, args.size, args.out, title, *root, nodes=nodes)
    return 0


def nodes_of(args: argparse.Namespace) -> list[int]:
    """The node of each rank."""
    return [r // args.per_node for r in range(args.size)]


def resolve_algorithm(name: str, args: argparse.Namespace) -> tuple[str, Algorithm]:
    """The collective and the algorithm with this name."""
    collective = args.collective or "allreduce"
    if name == "hierarchical" and collective in HIERARCHICAL:
        return collective, HIERARCHICAL[collective](nodes_of(args))
    for collective, algorithms in ALGORITHMS.items():
        if name in algorithms and args.collective in (None, collective):
            return collective, algorithms[name]
    known = sorted({each for c, names in ALGORITHMS.items() for each in names if args.collective in (None, c)})
    raise unknown_name(f"{name!r} is neither a file nor an algorithm", name, [*known, "hierarchical"])
