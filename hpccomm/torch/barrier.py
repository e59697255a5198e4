"""A barrier that names the ranks that do not come."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hpccomm.calls.fingerprint import format_ranks
from hpccomm.errors import ArgumentError, MismatchError
from hpccomm.torch.decisions import COMPLETE, decide
from hpccomm.torch.group import Group

POLL_SECONDS = 0.005


def monitored_barrier(group: Any = None, timeout: timedelta | None = None, wait_all_ranks: bool = True) -> None:
    """Wait for all ranks of a group; after ``timeout`` raise MismatchError on every rank that came, naming the others.

    Then all ranks raise, also one that comes later.  It takes the place of ``torch.distributed.monitored_barrier``,
    which torch allows for gloo alone, and goes through torch's store.  ``timeout`` is that of the group by default;
    ``wait_all_ranks=False`` is accepted, all are named.
    """
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, Group):
        raise ArgumentError(f"monitored_barrier: {group!r} is not a group of hpccomm: make it with backend='hpccomm'")
    limit = group.timeout if timeout is None else timeout
    group.barriers += 1
    prefix, store, ranks = f"barrier {group.barriers}", group.store, range(group.size())
    store.set(f"{prefix} {group.rank()}", "here")
    until, missing = time.monotonic() + limit.total_seconds(), list(ranks)
    while missing := [rank for rank in missing if not store.check([f"{prefix} {rank}"])]:
        if time.monotonic() > until and decide(store, f"{prefix} decision", str(group.rank())) != COMPLETE:
            raise MismatchError(
                f"rank {group.rank()}: monitored_barrier timed out after {limit.total_seconds():g} s: "
                f"{format_ranks(missing)} did not call it"
            )
        time.sleep(POLL_SECONDS)
    first = decide(store, f"{prefix} decision", COMPLETE)
    if first != COMPLETE:
        raise MismatchError(
            f"rank {group.rank()}: monitored_barrier: rank {first} timed out before all ranks had come: call it on all "
            "ranks in time"
        )
