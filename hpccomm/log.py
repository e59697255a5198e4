"""``logging.getLogger("hpccomm")``: what hpccomm says while a program runs, each sentence with the rank that says it.

A program that has set up logging gets the records in its own handlers.  Without that, they are lines on stderr, each in
one write.
"""

from __future__ import annotations

import functools
import logging
import sys

NAME = "hpccomm"


class DefaultHandler(logging.Handler):
    """Lines on stderr, unless the program has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        if logging.getLogger().handlers or logging.getLogger(NAME).handlers != [self]:
            return
        sys.stderr.write(f"[hpccomm] {self.format(record)}\n")
        sys.stderr.flush()


@functools.cache
def logger() -> logging.Logger:
    """The logger of the package."""
    found = logging.getLogger(NAME)
    found.addHandler(DefaultHandler())
    return found
