"""``logging.getLogger("hpccomm")``: what hpccomm says while a program runs, each sentence with the rank that says it.

A program that has set up logging gets the records in its own handlers.  Without that, they are lines on stderr, each in
one write.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os

NAME = "hpccomm"


class DefaultHandler(logging.Handler):
    """Lines on stderr, unless the program has handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a library may have redirected ``sys.stderr``."""
        if self.is_replaced():
            return
        with contextlib.suppress(OSError):
            os.write(2, f"[hpccomm] {self.format(record)}\n".encode(errors="replace"))

    def is_replaced(self) -> bool:
        """Whether the program has handlers of its own; those of pytest only look on."""
        others = {*logging.getLogger().handlers, *logging.getLogger(NAME).handlers} - {self}
        return any(not type(each).__module__.startswith("_pytest.") for each in others)


@functools.cache
def logger() -> logging.Logger:
    """The logger of the package."""
    found = logging.getLogger(NAME)
    found.addHandler(DefaultHandler())
    return found
