"""What ranks that share torch's store decide once for all of them, also before MPI has started."""

from __future__ import annotations

from typing import Any

COMPLETE = "complete"
"""What the first rank that has seen all ranks decides; one whose time is over decides its own number."""


def decide(store: Any, key: str, choice: str) -> str:
    """What the ranks have decided: the choice of the first one that calls this."""
    return str(store.compare_set(key, "", choice).decode())
