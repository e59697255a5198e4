"""Assertions that all ranks make together, so that no rank is left behind when one of them finds a mistake.

A rank that fails alone leaves its test while the others wait for its next message.  And hypothesis, which looks for a
smaller example after a failure, would look on that rank only.  So: agree first, then fail everywhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any


def collective_assert(comm: Any, condition: object, message: str = "") -> None:
    """Raise AssertionError on all ranks of ``comm`` where ``condition`` is false on any; collective.

    The error names the ranks with their messages.
    """
    complaints = comm.allgather(None if condition else message or "assertion failed")
    wrong = [f"rank {rank} of {comm.size}: {text}" for rank, text in enumerate(complaints) if text is not None]
    if wrong:
        raise AssertionError("\n".join(wrong))


def use_mpi_profile() -> None:
    """Make hypothesis draw the same examples on all ranks: no randomness, no memory of earlier runs, no deadline."""
    if find_spec("hypothesis") is None:
        return
    from hypothesis import HealthCheck, settings

    quiet = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
    settings.register_profile(
        "mpi", derandomize=True, database=None, deadline=None, print_blob=False, suppress_health_check=quiet
    )
    settings.load_profile("mpi")
