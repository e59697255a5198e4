"""How far a long command is: nothing in the first three seconds, then a line on stderr, with the time that is left.

Most launchers hide the terminal from the ranks; so a line is written every ten seconds even where there is none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from hpccomm.performance.units import format_seconds

QUIET_SECONDS = 3.0
"""A command that ends sooner shows nothing."""
LINE_SECONDS = 10.0
"""Between two lines where stderr is no terminal."""
TERMINAL_SECONDS = 0.5
"""Between two updates of the line of a terminal."""

Item = TypeVar("Item")


class Progress:
    """The lines of one command."""

    def __init__(
        self, label: str, unit: str, total: float, *, stream: Any = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.label, self.unit, self.total = label, unit, total
        self.stream, self.clock = stream or sys.stderr, clock
        self.terminal = self.stream.isatty()
        self.began = clock()
        self.first = 0.0, self.began
        """The work and the time from which the rate is taken."""
        self.due, self.width = self.began + QUIET_SECONDS, 0

    def begin(self, done: float) -> None:
        """Take the rate from now on, without the first ``done`` of the work: an earlier run's, or the start-up."""
        self.first = done, self.clock()

    def show(self, done: float, what: str) -> None:
        """Show that ``done`` of the total work is done, and that ``what`` comes next, if a line is due."""
        now = self.clock()
        if now < self.due:
            return
        self.due = now + (TERMINAL_SECONDS if self.terminal else LINE_SECONDS)
        spent = now - self.began
        before, since = self.first
        rest = (now - since) * (self.total - done) / (done - before) if done > before else None
        left = "" if rest is None else f", about {format_seconds(rest)} left"
        self.write(f"{self.label}: {what}, {format_seconds(spent)} so far{left}")

    def write(self, line: str) -> None:
        """Write a line; on a terminal, over the last one."""
        self.stream.write(f"\r{line:<{self.width}}" if self.terminal else f"{line}\n")
        self.stream.flush()
        self.width = len(line)

    def close(self) -> None:
        """Remove the line from a terminal."""
        if self.terminal and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()
            self.width = 0


def show_progress(
    items: Sequence[Item], label: str, unit: str, weigh: Callable[[Item], float] = lambda item: 1.0
) -> Iterator[Item]:
    """The items, with progress on stderr; ``weigh`` gives the work of an item beside that of the others."""
    work = [weigh(item) for item in items]
    progress = Progress(label, unit, sum(work))
    try:
        for k, item in enumerate(items):
            progress.show(sum(work[:k]), f"{unit} {k + 1} of {len(items)}")
            yield item
    finally:
        progress.close()
