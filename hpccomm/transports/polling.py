"""Pauses between the polls of a wait: none that matter at first, then longer ones, so that the core is free for others.

A rank that polls also drives MPI, so it never sleeps for long: a message of its own may be under way.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

SHORTEST_SECONDS, LONGEST_SECONDS = 5e-5, 1e-3
"""Limits of one sleep."""
EAGER_SECONDS = 1e-3
"""How long a wait for a request polls before it sleeps between two polls."""
CHECK_SECONDS = 0.05
"""Seconds between two calls of ``check``: short, so that a waiting rank raises its error before the watchdog ends the
job."""


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


def await_request(request: Any, seconds: float = math.inf, check: Callable[[], object] = lambda: None) -> bool:
    """Wait for a request of MPI, and leave the core to others while it takes long; False once ``seconds`` are over.

    ``check()`` is called now and then, and may raise.
    """
    began = checked = time.monotonic()
    while not request.Test():
        now = time.monotonic()
        if now - began > seconds:
            return False
        pause(began, EAGER_SECONDS, 32)
        if now - checked > CHECK_SECONDS:
            checked = now
            check()
    return True
