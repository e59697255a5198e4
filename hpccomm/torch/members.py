"""The communicators behind process groups.

The default group's ranks are those of torch; a communicator of all of them, on which nothing is sent, makes the others.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from typing import Any

import torch.distributed as dist
from mpi4py import MPI

from hpccomm import launcher
from hpccomm.calls.fingerprint import format_ranks
from hpccomm.communicator import Communicator, install_abort_hook
from hpccomm.errors import HpccommError, LaunchError, MismatchError
from hpccomm.torch.decisions import COMPLETE, decide
from hpccomm.torch.meeting import GROUP_TAG, Place, await_ranks
from hpccomm.torch.options import Options
from hpccomm.transports.polling import LONGEST_SECONDS, await_request

MEETING_SECONDS = 0.01
"""The longest time between two looks for the other ranks of a new group."""

RELEASE_SECONDS = 0.1
"""How long a rank that releases a communicator waits for the others, before it frees that later."""

DECISION = "decision"
"""The key under which the ranks of a group decide whether it is made."""

_base: dict[str, Any] = {}
"""``"world"``: all ranks in torch's order; ``"comm"``, ``"options"``: those of the default group."""

_released: list[tuple[Communicator, Any]] = []
"""Communicators to free, and the requests that complete once all ranks have released them."""

_made: Counter[str] = Counter()
"""How often this rank has made the default group (``""``), and groups of each name since then."""


def separate_store(given: Any) -> Any:
    """Torch's store for this group, with keys that no other group of its name has had.

    A store may outlive ``destroy_process_group``, as that of torchrun does, and then torch gives the same names again.
    All ranks make the default group equally often, and so do the members of a group of one name since then.
    """
    name = given.group_id if given.global_ranks_in_group else ""
    if not name:
        for each in [each for each in _made if each]:
            del _made[each]
    _made[name] += 1
    return dist.PrefixStore(f"{_made['']}/{_made[name]}", given.store)


def create(given: Any) -> tuple[Communicator, Any, Options | None]:
    """A communicator of the group's ranks in torch's order, its store, and the options of the default group.

    Collective.
    """
    ranks = given.global_ranks_in_group
    if not ranks:
        comm = create_default(given.group_rank, given.group_size, given.timeout.total_seconds())
        return comm, separate_store(given), None
    store = separate_store(given)
    await_members(store, ranks, dist.get_rank(), given.timeout.total_seconds())
    world = _base["world"]
    everyone = world.Get_group()
    group = everyone.Incl(ranks)
    comm = Communicator(MPI.Intracomm(world.Create_group(group)))
    group.Free()
    everyone.Free()
    comm.context  # noqa: B018  makes it now, while all ranks are here
    forget_members(store, ranks)
    free_released()
    return comm, store, _base["options"]


def await_members(store: Any, ranks: list[int], me: int, limit: float) -> None:
    """Wait in torch's store until all ranks make this group; raise MismatchError if one cannot, or names other ranks.

    MPI, which makes the communicator, would wait for ever.  Whether it is made or given up is decided once for all.
    """
    store.set(f"member {me}", ",".join(map(str, ranks)))
    keys, began = [f"member {rank}" for rank in ranks], time.monotonic()
    who = f"rank {me}: the group of {format_ranks(ranks)}"
    remedy = "make all ranks call new_group with the same ranks, in the same order"
    while not store.check(keys):
        waited, left = time.monotonic() - began, set(find_left(_base["comm"])) & set(ranks)
        if left or waited > limit:
            missing = [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
            gone = [rank for rank in missing if rank in left]
            if gone:
                raise MismatchError(f"{who} cannot be made, {format_ranks(gone)} left the program before: {remedy}")
            if missing and waited > limit and decide(store, DECISION, str(me)) != COMPLETE:
                raise MismatchError(f"{who} was not made in {limit:g} s, missing: {format_ranks(missing)}: {remedy}")
        drive(min(MEETING_SECONDS, waited))
    named = {rank: store.get(key).decode() for rank, key in zip(ranks, keys, strict=True)}
    other = next((rank for rank in ranks if named[rank] != named[me]), None)
    if other is not None:
        raise MismatchError(f"{who}: rank {other} makes one of ranks {named[other].replace(',', ', ')}: {remedy}")
    decision = decide(store, DECISION, COMPLETE)
    if decision != COMPLETE:
        raise MismatchError(f"{who} cannot be made, rank {decision} has waited and timed out before: {remedy}")


def drive(seconds: float) -> None:
    """Drive MPI between two looks in the store: another rank may wait for a message of this one."""
    until = time.monotonic() + seconds
    while True:
        MPI.COMM_SELF.Iprobe()
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(LONGEST_SECONDS, left))


def forget_members(store: Any, ranks: list[int]) -> None:
    """Delete this rank's keys of a group that is made; all ranks have read them."""
    me = dist.get_rank()
    store.delete_key(f"member {me}")
    if me == ranks[0]:
        store.delete_key(DECISION)


def find_left(comm: Any) -> list[int]:
    """The ranks of this node that have left the program."""
    table = comm._own_context.consistency
    return table.left_ranks() if table else []


def create_default(rank: int, size: int, limit: float) -> Communicator:
    """The communicator of the default group."""
    install_abort_hook()
    launcher.check_world(MPI.COMM_WORLD.size, os.environ)
    if size != MPI.COMM_WORLD.size:
        raise LaunchError(
            f"torch was told that there are {size} ranks, MPI has started {MPI.COMM_WORLD.size}: start the program "
            f"with hpccomm-run -n {size}, or leave out RANK and WORLD_SIZE"
        )
    everyone = MPI.Intracomm(MPI.COMM_WORLD)
    await_ranks(Place(everyone, GROUP_TAG), limit)
    world = everyone.Split(0, rank)
    if "world" in _base:
        _base.pop("world").Free()
    _base["world"] = world
    comm = Communicator(MPI.Intracomm(world.Split(0, rank)))
    comm.context  # noqa: B018
    free_released()
    return comm


def remember(group: Any, ranks: list[int]) -> None:
    """Keep the communicator of the default group, and its options for groups that are made without."""
    if not ranks:
        _base["options"], _base["comm"] = group.options, group.comm


def find_missing(comm: Any) -> list[int]:
    """The ranks of this node that have not entered the call that this rank is in."""
    context = comm._own_context  # also while calls are under way, for which the property would wait
    table, memory = context.consistency, context.shared_memory
    found = table.missing_ranks() if table else []
    if not found and memory and table:  # calls in shared memory have no entry in the table
        found = [table.members[position] for position in memory.missing_ranks()]
    return found


def release(comm: Communicator) -> None:
    """Free a communicator once all its ranks have released it: now, or when a group is made or released later.

    Ranks may release their communicators in different orders, so none waits for the others.  What is not free when MPI
    ends lives until then, and so does a communicator whose ranks are out of step.
    """
    if MPI.Is_finalized() or comm == MPI.COMM_NULL:
        return
    try:
        request = comm.private_comm.Ibarrier()
    except HpccommError:
        return
    await_request(request, RELEASE_SECONDS)
    _released.append((comm, request))
    free_released()


def free_released() -> None:
    """Free the communicators that all their ranks have released."""
    for _ in range(len(_released)):
        comm, request = _released.pop(0)
        if request.Test():
            comm.Free()
        else:
            _released.append((comm, request))
