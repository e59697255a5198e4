"""Draw a schedule, or what was measured."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpccomm.collectives import ALGORITHMS, draw
from hpccomm.collectives.schedule import Algorithm
from hpccomm.collectives.verify import ROOTED_COLLECTIVES
from hpccomm.errors import ArgumentError
from hpccomm.performance.cost import HIERARCHICAL

SUMMARY = "print or draw a schedule, or draw benchmark results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A name, or files."""
    parser.add_argument("what", nargs="+", help="an algorithm (ring, butterfly …) or files of `hpccomm bench --json`")
    parser.add_argument(
        "--collective", choices=sorted(ALGORITHMS), help="of the algorithm (default: the first that has it)"
    )
    parser.add_argument("--size", type=int, default=4, metavar="P", help="ranks (default 4)")
    parser.add_argument("--root", type=int, default=0, metavar="R", help="of bcast and reduce (default 0)")
    parser.add_argument(
        "--per-node", type=int, default=2, metavar="K", help="ranks a node, for hierarchical (default 2)"
    )
    parser.add_argument("--out", metavar="FILE", help="draw into this png, svg or pdf")


def run(args: argparse.Namespace) -> int:
    """Files are measurements, everything else is an algorithm."""
    if all(Path(each).is_file() for each in args.what):
        return draw_measurements(args)
    if len(args.what) > 1:
        missing = [each for each in args.what if not Path(each).is_file()]
        raise ArgumentError(f"no such file: {', '.join(missing)}; one algorithm can be shown at a time")
    return show_schedule(args)


def draw_measurements(args: argparse.Namespace) -> int:
    """Curves of one or several benchmark files."""
    from hpccomm.bench import plot

    if args.out is None:
        raise ArgumentError("measurements need --out FILE.png")
    plot.draw(args.what, args.out)
    return 0


def show_schedule(args: argparse.Namespace) -> int:
    """A line a round, and a drawing if asked for."""
    name = args.what[0]
    if not 0 <= args.root < args.size or args.per_node < 1:
        raise ArgumentError(
            f"--size {args.size} --root {args.root} --per-node {args.per_node}: the root is one of the ranks"
        )
    collective, algorithm = resolve_algorithm(name, args)
    root = (args.root,) if collective in ROOTED_COLLECTIVES else ()
    title = f"{collective}, {name}, {args.size} ranks" + (f", root {args.root}" if root else "")
    print(f"{title}, {algorithm.blocks(args.size)} blocks")
    print("\n".join(draw.text(algorithm, args.size, *root)))
    if args.out:
        draw.draw(algorithm, args.size, args.out, title, *root)
    return 0


def resolve_algorithm(name: str, args: argparse.Namespace) -> tuple[str, Algorithm]:
    """The collective and the algorithm that are meant."""
    collective = args.collective or "allreduce"
    if name == "hierarchical" and collective in HIERARCHICAL:
        return collective, HIERARCHICAL[collective]([r // args.per_node for r in range(args.size)])
    for collective, algorithms in ALGORITHMS.items():
        if name in algorithms and args.collective in (None, collective):
            return collective, algorithms[name]
    known = sorted({each for c, names in ALGORITHMS.items() for each in names if args.collective in (None, c)})
    raise ArgumentError(f"{name!r} is no file and no algorithm: take one of {', '.join([*known, 'hierarchical'])}")
