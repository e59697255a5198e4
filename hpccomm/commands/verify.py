"""``hpccomm verify``: prove schedules: each contribution counts once, messages match, bytes are as in the formula."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hpccomm.arguments import unknown_name
from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.collectives.check import check_algorithm
from hpccomm.collectives.hierarchical import HIERARCHICAL
from hpccomm.collectives.lowering import Pipeline
from hpccomm.collectives.schedule import Algorithm
from hpccomm.collectives.verify import BLOCK_IS_RANK, ROOTED_COLLECTIVES, Report, layouts, verify_algorithm
from hpccomm.commands.progress import show_progress
from hpccomm.errors import ArgumentError, ScheduleError

EVERY_ROOT = 8
"""Up to this size, schedules with a root are proved for every root; above, for the first and the last."""


LARGEST = 4096
"""The largest number of ranks that is proved; the work grows with its square."""
MOST_RANKS = 16
"""Up to this size the records of all ranks are checked."""
PIPELINES = (Pipeline(), Pipeline(3, 1, hierarchical.MANY, 1), Pipeline(2, 0, hierarchical.WINDOW, 1))
"""Step by step; segments of a vector that follow one another; parts of blocks in a window."""


class Subject(NamedTuple):
    """One row of the report."""

    collective: str
    algorithm: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("algorithm", help="'all', or the name of an algorithm: ring, butterfly, hierarchical …")
    add("--size", default="1:64", metavar="RANGE", help="numbers of ranks: 7, 1:64 or 1,2,7 (default 1:64)")
    add("--collective", choices=sorted(ALGORITHMS), help="prove this collective only")


def run(args: argparse.Namespace) -> int:
    """Print one line for each algorithm; returns 1 if any is wrong."""
    sizes = parse_sizes(args.size)
    chosen = subjects(args.algorithm, args.collective)
    wrong = 0
    print(f"{'collective':<15}{'algorithm':<15}{'sizes':<10}{'rounds':>10}  {'ordered':<8}busiest rank sends")
    for subject in chosen:
        try:
            print(line(subject, args.size, prove(subject, sizes)))
        except ScheduleError as error:
            wrong += 1
            print(f"{subject.collective:<15}{subject.algorithm:<15}{args.size:<10}{'WRONG':>10}  {error}")
    return 1 if wrong else 0


def parse_sizes(text: str) -> list[int]:
    """``7``, ``1:64`` (both ends included) or ``1,2,7``."""
    sizes: Sequence[int] = ()
    with contextlib.suppress(ValueError):
        if ":" in text:
            low, high = (int(part) for part in text.split(":"))
            sizes = range(max(low, 0), min(high, LARGEST + 1) + 1)
        else:
            sizes = [int(part) for part in text.split(",")]
    if not sizes or min(sizes) < 1 or max(sizes) > LARGEST:
        raise ArgumentError(f"--size {text}: give numbers of ranks from 1 to {LARGEST:,} as 7, 1:64 or 1,2,7")
    return list(sizes)


def subjects(algorithm: str, collective: str | None) -> list[Subject]:
    """The algorithms that the arguments select."""
    every = [Subject(each, name) for each, names in ALGORITHMS.items() for name in names]
    every += [Subject(each, "hierarchical") for each in HIERARCHICAL]
    found = [each for each in every if algorithm in ("all", each.algorithm) and collective in (None, each.collective)]
    if not found:
        names = sorted({each.algorithm for each in every if collective in (None, each.collective)})
        raise unknown_name(
            f"no algorithm {algorithm!r} for {collective or 'any collective'}", algorithm, ["all", *names]
        )
    return found


def prove(subject: Subject, sizes: Sequence[int]) -> list[Report]:
    """The reports of all sizes, with all roots or layouts that the algorithm has."""
    return [
        report
        for p in show_progress(sizes, f"{subject.collective} {subject.algorithm}", "size")
        for report in proofs(subject, p)
    ]


def proofs(subject: Subject, p: int) -> Iterator[Report]:
    """The reports of one size; the records of all ranks are checked where they are not too many."""
    collective = subject.collective
    rooted = collective in ROOTED_COLLECTIVES
    roots = (range(p) if p <= EVERY_ROOT else (0, p - 1)) if rooted else (0,)
    levels = subject.algorithm == "hierarchical"
    for nodes in dict.fromkeys(map(tuple, layouts(p).values())) if levels else ((),):  # few ranks: some are equal
        for algorithm, how in forms(collective, nodes) if levels else ((subject.algorithm, PIPELINES[:1]),):
            for root in roots if p <= EVERY_ROOT or not levels else roots[-1:]:
                yield verify_algorithm(algorithm, collective, p, root)
                if p <= MOST_RANKS:
                    for pipeline in how:
                        check_algorithm(algorithm, collective, p, root, pipeline)


def forms(collective: str, nodes: Sequence[int]) -> Iterator[tuple[Algorithm, Sequence[Pipeline]]]:
    """The hierarchical algorithm for long and for short vectors, and how each is pipelined."""
    build = HIERARCHICAL[collective]
    yield build(nodes), PIPELINES[1 + (collective in BLOCK_IS_RANK) :][:1]
    short = {"inter": ALGORITHMS["allreduce"]["doubling"]} if collective == "allreduce" else {}
    yield build(nodes, width=1, **short), PIPELINES[:1]


def line(subject: Subject, sizes: str, reports: Sequence[Report]) -> str:
    """The line of an algorithm."""
    rounds = {report.rounds for report in reports}
    orders = {report.ordered for report in reports}
    ordered = "-" if None in orders else "no" if False in orders else "yes"
    if subject.algorithm == "hierarchical":
        volume = HIERARCHICAL[subject.collective]([0]).volume
    else:
        volume = ALGORITHMS[subject.collective][subject.algorithm].volume
    sends = volume.text if volume else "not declared"
    span = f"{min(rounds)}-{max(rounds)}" if len(rounds) > 1 else str(max(rounds))
    return f"{subject.collective:<15}{subject.algorithm:<15}{sizes:<10}{span:>10}  {ordered:<8}{sends}"
