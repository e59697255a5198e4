"""Slices of a thread as viewers of traces need them: one inside the other, or apart.

Perfetto drops a slice that overlaps another one of its thread without lying inside it.  Two kinds do: the waiting of a
call lasts into calls that this one makes, so it is cut where they begin and end; and calls of several threads of a rank
overlap, so they are drawn in further rows of the rank.  Times are compared in whole nanoseconds.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

Slice = dict[str, Any]
ROW = 1 << 20
"""The thread of a slice is its rank plus a multiple of this, 0 in the rank's first row."""


def nest(events: Sequence[Slice]) -> list[Slice]:
    """The events of a trace, in which the waiting of a call follows it, with slices that nest."""
    threads: dict[tuple[int, int], list[Slice]] = defaultdict(list)
    for each in events:
        threads[each["pid"], each["tid"]].append(each)
    return [each for one in threads.values() for each in nest_thread(one)]


def nest_thread(events: Sequence[Slice]) -> Iterator[Slice]:
    """The events of one thread."""
    calls = [each for each in events if each["ph"] == "X" and each["cat"] != "wait"]
    rows = assign_rows([span(each) for each in calls])
    edges: dict[int, list[int]] = defaultdict(list)
    for each, row in zip(calls, rows, strict=True):
        edges[row] += span(each)
    for found in edges.values():
        found.sort()
    row, following = 0, iter(rows)
    for each in events:
        if each["ph"] != "X":
            yield each
        elif each["cat"] == "wait":
            yield from cut(each | {"tid": each["tid"] + ROW * row}, edges[row])
        else:
            row = next(following)
            yield each | {"tid": each["tid"] + ROW * row}
    names = [each for each in events if each["name"] == "thread_name"]
    for row in range(1, max(rows, default=0) + 1):
        for each in names:
            yield each | {"tid": each["tid"] + ROW * row}


def span(each: Slice) -> tuple[int, int]:
    """Begin and end in nanoseconds."""
    return round(each["ts"] * 1000), round(each["ts"] * 1000) + round(each["dur"] * 1000)


def assign_rows(intervals: Sequence[tuple[int, int]]) -> list[int]:
    """For each interval the first row in which it lies inside those that are open, or after them."""
    rows = [0] * len(intervals)
    open_ends: list[list[int]] = []
    for k in sorted(range(len(intervals)), key=lambda k: (intervals[k][0], -intervals[k][1])):
        begin, end = intervals[k]
        for ends in open_ends:
            while ends and ends[-1] <= begin:
                ends.pop()
        rows[k] = next((r for r, ends in enumerate(open_ends) if not ends or end <= ends[-1]), len(open_ends))
        if rows[k] == len(open_ends):
            open_ends.append([])
        open_ends[rows[k]].append(end)
    return rows


def cut(each: Slice, edges: Sequence[int]) -> Iterator[Slice]:
    """A slice in parts that end where another one begins or ends."""
    begin, end = span(each)
    inner = edges[bisect_right(edges, begin) : bisect_left(edges, end)]
    for a, b in pairwise(sorted({begin, *inner, end})):
        yield each | {"ts": a / 1000, "dur": (b - a) / 1000}
