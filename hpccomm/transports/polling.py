"""Pauses between the polls of a wait: none that matter at first, then longer ones, so that the core is free for others.

A rank that polls also drives MPI, so it never sleeps for long: a message of its own may be under way.
"""

from __future__ import annotations

import os
import time

SHORTEST_SECONDS, LONGEST_SECONDS = 5e-5, 1e-3
"""Limits of one sleep."""


def pause(began: float, eager: float, share: int) -> None:
    """Pause in a wait that began at this time of :func:`time.monotonic`.

    For ``eager`` seconds the core is only yielded; then every sleep lasts 1/``share`` of the time waited so far, within
    limits, so the end of the wait is noticed that much too late at most.
    """
    waited = time.monotonic() - began
    if waited < eager:
        os.sched_yield()
    else:
        time.sleep(min(LONGEST_SECONDS, max(SHORTEST_SECONDS, waited / share)))
