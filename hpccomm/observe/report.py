"""A trace as one page of HTML that needs no network: who waited for whom, time by collective, sizes, and the ranks."""

from __future__ import annotations

import html
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import log2
from pathlib import Path
from typing import NamedTuple

from hpccomm.errors import ArgumentError
from hpccomm.observe.nesting import ROW
from hpccomm.performance.units import format_count, format_size, format_time

MOST_RANKS = 64
"""The largest table of who waited for whom; of more ranks, those that were waited for the longest."""
MOST_MARKS = 3000
"""Calls that are drawn; of more, the longest."""
WIDTH, HEIGHT = 1000, 22
"""The picture: units of its width, and the height of a rank."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4A2B", "#5B2A86")

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#667;--line:#8884;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#9aa;--back:#15181c}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);margin:auto;
max-width:62rem;padding:1rem}
table{border-collapse:collapse}td,th{padding:.15rem .6rem;text-align:right;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left}.scroll{overflow-x:auto}.bar{background:#0072B2;height:.8em;display:block}
small,caption{color:var(--soft)}svg{min-width:640px;width:100%;height:auto}text{fill:var(--ink);font-size:12px}
"""


class Slice(NamedTuple):
    """One event of a trace, in microseconds."""

    rank: int
    name: str
    kind: str
    """``collective``, ``wait`` or ``part``."""
    begin: float
    us: float
    nbytes: int
    waited_for: int


def read(path: str) -> list[Slice]:
    """Read a trace; raises ArgumentError for a file that is none."""
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
        return [
            Slice(
                int(each["tid"]) % ROW,
                str(each["name"]),
                str(each.get("cat", "")),
                float(each["ts"]),
                float(each["dur"]),
                int(each.get("args", {}).get("bytes", 0)),
                int(each.get("args", {}).get("rank", -1)),
            )
            for each in events
            if each["ph"] == "X"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ArgumentError(f"{path} is no trace: write one with hpccomm-run --timeline trace.json") from None


def outermost(slices: Iterable[Slice]) -> list[Slice]:
    """The collectives that are not inside another one of their rank."""
    found, until = [], dict[int, float]()
    for each in sorted(slices, key=lambda each: (each.rank, each.begin, -each.us)):
        if each.kind == "collective" and each.begin >= until.get(each.rank, -1.0):
            until[each.rank] = each.begin + each.us
            found.append(each)
    return found


def render(slices: Sequence[Slice], title: str) -> str:
    """The page."""
    calls = outermost(slices)
    ranks = sorted({each.rank for each in slices})
    span = max((each.begin + each.us for each in slices), default=0.0)
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{format_count(len(ranks), 'rank')}, {format_time(span)} from the first call to the last, "
        f"{format_count(len(calls), 'collective call')} on all ranks.</p>",
        "<h2>Who waited for whom</h2>",
        waiting_table(slices),
        "<h2>The ranks</h2>",
        rank_table(slices, calls, ranks, span),
        "<h2>Time by collective</h2>",
        collective_table(calls),
        "<h2>Sizes</h2>",
        size_table(calls),
        "<h2>Calls in time</h2>",
        picture(slices, calls, ranks, span),
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def waiting(slices: Iterable[Slice]) -> dict[tuple[int, int], float]:
    """Microseconds that one rank waited for another."""
    found: dict[tuple[int, int], float] = defaultdict(float)
    for each in slices:
        if each.kind == "wait":
            found[each.rank, each.waited_for] += each.us
    return dict(found)


def waiting_table(slices: Iterable[Slice]) -> str:
    """A row for each rank that waited, a column for each that was waited for."""
    found = waiting(slices)
    if not found:
        return "<p>No rank waited for another.</p>"
    caused: dict[int, float] = defaultdict(float)
    for (_, late), us in found.items():
        caused[late] += us
    columns = sorted(caused, key=lambda rank: -caused[rank])[:MOST_RANKS]
    worst = columns[0]
    share = caused[worst] / sum(caused.values())
    said = f"<p>Rank {worst} was waited for the longest: {format_time(caused[worst])}, {share:.0%} of all waiting.</p>"
    rows = sorted({rank for rank, _ in found})[:MOST_RANKS]
    most = max(found.values())
    cells = [[f"rank {rank}", *(heat(found.get((rank, each), 0.0), most) for each in sorted(columns))] for rank in rows]
    return said + table(["waited \\ for", *(f"rank {each}" for each in sorted(columns))], cells)


def heat(us: float, most: float) -> str:
    """A cell with a colour by its share of the longest."""
    text = format_time(us) if us else ""
    return f"<span style='background:#d55e00{round(us / most * 160):02x};padding:.1rem .4rem'>{text}</span>"


def rank_table(slices: Iterable[Slice], calls: Sequence[Slice], ranks: Sequence[int], span: float) -> str:
    """Each rank's time in calls, and the part of it that was waiting."""
    slices = list(slices)
    cells = []
    for rank in ranks:
        inside = sum(each.us for each in calls if each.rank == rank)
        waited = sum(each.us for each in slices if each.rank == rank and each.kind == "wait")
        cells.append(
            [
                f"rank {rank}",
                format_time(inside),
                format_time(waited),
                f"{inside / span:.0%}" if span else "",
                bar(inside, span),
            ]
        )
    return table(["", "in calls", "of it waiting", "share", ""], cells)


def collective_table(calls: Sequence[Slice]) -> str:
    """Calls, time and bytes by name, the longest first."""
    groups: dict[str, list[Slice]] = defaultdict(list)
    for each in calls:
        groups[each.name].append(each)
    total = sum(each.us for each in calls)
    cells = [
        [
            html.escape(name),
            f"{len(group):,}",
            format_time(sum(each.us for each in group)),
            format_time(sum(each.us for each in group) / len(group)),
            format_size(sum(each.nbytes for each in group)) if any(each.nbytes for each in group) else "not known",
            bar(sum(each.us for each in group), total),
        ]
        for name, group in sorted(groups.items(), key=lambda item: -sum(each.us for each in item[1]))
    ]
    return table(["collective", "calls", "time", "mean", "bytes", ""], cells)


def size_table(calls: Sequence[Slice]) -> str:
    """Calls by size, in powers of four."""
    groups: dict[int, list[Slice]] = defaultdict(list)
    for each in calls:
        groups[int(log2(each.nbytes)) // 2 if each.nbytes else -1].append(each)
    most = max((len(group) for group in groups.values()), default=0)
    cells = [
        [
            "not known: objects, or no data" if key < 0 else f"from {format_size(4**key)}",
            f"{len(group):,}",
            format_time(sum(each.us for each in group)),
            bar(len(group), most),
        ]
        for key, group in sorted(groups.items())
    ]
    return table(["size", "calls", "time", ""], cells)


def picture(slices: Sequence[Slice], calls: Sequence[Slice], ranks: Sequence[int], span: float) -> str:
    """A row for each rank, with its calls and, darker, the waiting in them."""
    names = list(dict.fromkeys(each.name for each in calls))
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}
    places = {rank: k for k, rank in enumerate(ranks)}
    waits = [each for each in slices if each.kind == "wait"]
    drawn = sorted([*calls, *waits], key=lambda each: -each.us)[:MOST_MARKS]
    marks = [mark(each, places, span, colours) for each in sorted(drawn, key=lambda each: each.kind)]
    labels = [f"<text x='0' y='{k * HEIGHT + 15}'>rank {rank}</text>" for rank, k in places.items()]
    key = " ".join(f"<span style='color:{colours[name]}'>■</span> {html.escape(name)}" for name in names)
    size = f"viewBox='0 0 {WIDTH + 70} {HEIGHT * len(ranks) + 4}'"
    return f"<p>{key} ▨ grey: waiting</p><div class=scroll><svg {size} role=img>{''.join(labels + marks)}</svg></div>"


def mark(each: Slice, places: Mapping[int, int], span: float, colours: Mapping[str, str]) -> str:
    """One rectangle."""
    x, width = 70 + WIDTH * each.begin / span, max(0.3, WIDTH * each.us / span)
    colour = "#7778" if each.kind == "wait" else colours[each.name]
    where = f"x='{x:.2f}' y='{places[each.rank] * HEIGHT + 3}' width='{width:.2f}' height='{HEIGHT - 5}'"
    said = html.escape(f"{each.name}, {format_time(each.us)}")
    return f"<rect {where} fill='{colour}'><title>{said}</title></rect>"


def bar(value: float, most: float) -> str:
    """A bar in a cell."""
    return f"<span class=bar style='width:{12 * value / most if most else 0:.2f}rem'></span>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls on a narrow screen."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<div class=scroll><table><tr>{top}</tr>{''.join(f'<tr>{each}</tr>' for each in lines)}</table></div>"
