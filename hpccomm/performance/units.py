"""Sizes, rates, times and counts as people write them: ``64Ki``, ``100gbit``, ``8.76 ms``, ``1 rank``."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hpccomm.errors import ArgumentError

DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}


def size_of(text: str) -> float:
    """The bytes of a size: ``100M`` is a hundred million, ``64Ki`` is 65,536."""
    match = re.fullmatch(r"([\d.]+)\s*([kmgt]|ki|mi|gi)?b?", text.strip().lower())
    try:
        number, unit = match.groups() if match else ("", "")
        return float(number) * {**DECIMAL, **BINARY}[unit or ""]
    except ValueError:
        raise ArgumentError(f"{text!r} is no size: write 4, 64Ki, 100M") from None


def beta_of(text: str) -> float:
    """The microseconds per byte of a rate: ``100gbit`` is in bits a second, ``12.5GB`` in bytes a second."""
    match = re.fullmatch(r"([\d.]+)\s*([kmgt]?)(bit|b)(/s|ps)?", text.strip().lower())
    try:
        number, unit, what = match.groups()[:3] if match else ("", "", "")
        return 1e6 * (8 if what == "bit" else 1) / (float(number) * DECIMAL[unit])
    except (ValueError, ZeroDivisionError):
        raise ArgumentError(f"{text!r} is no rate: write 100gbit or 12.5GB") from None


def format_time(us: float) -> str:
    """A time in the largest unit of which it holds at least one: ``13.8 us``, ``8.76 ms``, ``1,240 s``."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{format_number(us / size)} {unit}"
    return f"{format_number(us)} us"


def format_number(value: float) -> str:
    """Four digits, never with an exponent between a ten-thousandth and a quadrillion: ``0.125``, ``123,457``."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    """A time to wait for, as people say it: ``4 s``, ``12 min``, ``3 h``."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1.0, seconds):.0f} s"


def format_count(number: int, noun: str) -> str:
    """A number of things: ``1 rank``, ``4 ranks``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def format_shape(nodes: int, per_node: int) -> str:
    """Nodes and ranks: ``1 node with 4 ranks``, ``8 nodes with 4 ranks each``."""
    each = "" if nodes == 1 else " each"
    return f"{format_count(nodes, 'node')} with {format_count(per_node, 'rank')}{each}"


def format_size(nbytes: float) -> str:
    """Bytes in the largest decimal unit of which they fill at least one: ``512 B``, ``1.28 MB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.3g} B"


def format_ranges(numbers: Iterable[int]) -> str:
    """Numbers in their order, neighbours as ranges: ``0-3,8``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(f"{each[0]}-{each[-1]}" if len(each) > 1 else str(each[0]) for each in found)
