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
from hpccomm.torch.members import DECISION, drive

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
    await_all(group.store, group.rank(), group.size(), group.barriers, limit.total_seconds())


def await_all(store: Any, me: int, size: int, number: int, limit: float) -> None:
    """Wait in torch's store until all ranks are in the barrier of this number, or one has waited longer than its limit.

    Then all ranks have left the barrier before, whose keys are deleted.
    """
    prefix, ranks = f"barrier {number}", range(size)
    store.set(f"{prefix} {me}", "here")
    until, missing = time.monotonic() + limit, list(ranks)
    while missing := [rank for rank in missing if not store.check([f"{prefix} {rank}"])]:
        if time.monotonic() > until and decide(store, f"{prefix} {DECISION}", str(me)) != COMPLETE:
            raise MismatchError(
                f"rank {me}: monitored_barrier timed out after {limit:g} s: {format_ranks(missing)} did not call it"
            )
        drive(POLL_SECONDS)
    first = decide(store, f"{prefix} {DECISION}", COMPLETE)
    for name in (me, *([DECISION] if me == 0 else [])):
        store.delete_key(f"barrier {number - 1} {name}")
    if first != COMPLETE:
        raise MismatchError(
            f"rank {me}: monitored_barrier: rank {first} timed out before all ranks had come: call it on all ranks in "
            "time"
        )
