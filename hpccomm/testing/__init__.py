"""Tests of programs that use collectives: ranks that are threads, MPI tests at several sizes, whole jobs."""

from __future__ import annotations

from typing import Any

__all__ = ["run_on_ranks"]


def __getattr__(name: str) -> Any:
    if name != "run_on_ranks":
        raise AttributeError(f"module 'hpccomm.testing' has no attribute {name!r}")
    from hpccomm.testing.ranks import run_on_ranks

    return run_on_ranks
