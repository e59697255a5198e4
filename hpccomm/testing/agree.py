"""Collective assertions: if the condition is false on any rank, the assertion fails on all of them.

A rank that fails alone leaves its test while the other ranks wait for its next message.  Hypothesis, which searches for
a smaller example after a failure, would search on that rank only.  So the ranks first exchange their results, then all
of them fail.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def collective_assert(comm: Any, condition: object, message: str = "") -> None:
    """Raise AssertionError on all ranks of ``comm`` where ``condition`` is false on any; collective.

    The error names the ranks with their messages.
    """
    messages = comm.allgather(None if condition else message or "assertion failed")
    failures = [f"rank {rank} of {comm.size}: {text}" for rank, text in enumerate(messages) if text is not None]
    if failures:
        raise AssertionError("\n".join(failures))


def use_mpi_profile() -> None:
    """Make hypothesis draw the same examples on all ranks: no randomness, no example database, no deadline."""
    if find_spec("hypothesis") is None:
        return
    from hypothesis import HealthCheck, settings

    suppressed = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
    settings.register_profile(
        "mpi", derandomize=True, database=None, deadline=None, print_blob=False, suppress_health_check=suppressed
    )
    settings.load_profile("mpi")
