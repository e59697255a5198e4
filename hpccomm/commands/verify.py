"""``hpccomm verify``: prove schedules: each contribution counts once, messages match, bytes are as in the formula."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hpccomm.collectives import ALGORITHMS, hierarchical
from hpccomm.collectives.hierarchical import HIERARCHICAL
from hpccomm.collectives.verify import ROOTED_COLLECTIVES, Report, layouts, verify_algorithm
from hpccomm.commands.progress import show_progress
from hpccomm.errors import ArgumentError, ScheduleError

SUMMARY = "prove schedules correct for a range of sizes"

EVERY_ROOT = 8
"""Up to this size, schedules with a root are proved for every root; above, for the first and the last."""


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
    try:
        if ":" in text:
            low, high = (int(part) for part in text.split(":"))
            sizes = list(range(low, high + 1))
        else:
            sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ArgumentError(f"--size {text}: give numbers of ranks as 7, 1:64 or 1,2,7")
    return sizes


def subjects(algorithm: str, collective: str | None) -> list[Subject]:
    """The algorithms that the arguments select."""
    every = [Subject(each, name) for each, names in ALGORITHMS.items() for name in names]
    every += [Subject(each, "hierarchical") for each in HIERARCHICAL]
    found = [each for each in every if algorithm in ("all", each.algorithm) and collective in (None, each.collective)]
    if not found:
        names = ", ".join(sorted({each.algorithm for each in every if collective in (None, each.collective)}))
        raise ArgumentError(
            f"no algorithm {algorithm!r} for {collective or 'any collective'}: use 'all' or one of {names}"
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
    """The reports of one size."""
    if subject.algorithm == "hierarchical":
        for nodes in layouts(p).values():
            yield from two_level_proofs(subject.collective, nodes)
        return
    roots = range(p) if p <= EVERY_ROOT else (0, p - 1)
    for root in roots if subject.collective in ROOTED_COLLECTIVES else (0,):
        yield verify_algorithm(subject.algorithm, subject.collective, p, root)


def two_level_proofs(collective: str, nodes: list[int]) -> Iterator[Report]:
    """The reports of one layout."""
    yield verify_algorithm(HIERARCHICAL[collective](nodes), collective, len(nodes))
    if collective == "allreduce":
        yield verify_algorithm(
            hierarchical.build_allreduce(nodes, ALGORITHMS["allreduce"]["butterfly"]), collective, len(nodes)
        )


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
