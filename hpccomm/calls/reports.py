"""Errors that several ranks of a node have, and one of them writes."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

CLAIM_SECONDS = 0.1
"""How long a rank that will write an error waits for others that say so at the same time."""
WRITE_SECONDS = 2.0
"""How long the others wait for that rank, which may have ended; then they write the error themselves."""
WRITTEN, PROCESS_BITS, MARK_BITS = 1, 22, 40
"""A claim is one word: the mark of the error, the number of the process that writes it, and whether it has."""


class Reports:
    """The errors that this process has written to stderr, or another one of its node for it.

    ``tables`` are those that this process shares with others; tests give the number of the ``process``.  An error is
    always written: a rank leaves it to another one only if that one says that it has written it.
    """

    def __init__(self, tables: Iterable[Any], process: int | None = None) -> None:
        self._tables, self._known, self._process = tables, dict[int, int](), process
        self._lock = threading.RLock()  # a second thread with the same error waits until it is written

    def write(self, sentence: str) -> None:
        """Write an error once a node; when this returns, it is written.

        The ranks have the same sentence but for the number of the rank that says it.  Of the ranks that come at the
        same time the one with the lowest process number writes.
        """
        mark = mark_of(sentence)
        with self._lock:
            if mark in self._known:
                return
            number = self._known[mark] = len(self._known)
            try:
                self._write_once(sentence, mark, number)
            except BaseException:  # an interrupt
                del self._known[mark]
                raise

    def _write_once(self, sentence: str, mark: int, number: int) -> None:
        """Write an error, or wait until another rank has written it."""
        claim = (mark << PROCESS_BITS | (self._process or os.getpid()) % (1 << PROCESS_BITS)) << 1
        before = self._find_claims(mark)
        if not before:
            self._claim(number, claim)
            time.sleep(CLAIM_SECONDS)
            before = [other for other in self._find_claims(mark) if other < claim or other & WRITTEN]
        if not (before and self._await_writer(mark)):
            os.write(2, f"[hpccomm] {sentence}\n".encode(errors="replace"))
        self._claim(number, claim | WRITTEN)

    def _list_tables(self) -> list[Any]:
        """The tables, of which another thread may make or free one meanwhile."""
        while True:
            with contextlib.suppress(RuntimeError):
                return list(self._tables)

    def _find_claims(self, mark: int) -> list[int]:
        """The claims of other ranks to this error."""
        found = []
        for table in self._list_tables():
            with contextlib.suppress(ValueError):  # it is closed
                found += [claim for claim in table.list_claims() if claim >> PROCESS_BITS + 1 == mark]
        return found

    def _claim(self, number: int, claim: int) -> None:
        for table in self._list_tables():
            with contextlib.suppress(ValueError):
                table.write_claim(number, claim)

    def _await_writer(self, mark: int) -> bool:
        """Wait until another rank has written the error; False if none does."""
        until = time.monotonic() + WRITE_SECONDS
        while not any(claim & WRITTEN for claim in self._find_claims(mark)):
            if time.monotonic() > until:
                return False
            time.sleep(CLAIM_SECONDS / 10)
        return True


def mark_of(sentence: str) -> int:
    """A hash of an error's sentence without the rank that says it."""
    import hashlib

    plain = re.sub(r"^rank \d+: |\(noticed by rank \d+\)", "", sentence)
    return int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=MARK_BITS // 8).digest(), "little") | 1
