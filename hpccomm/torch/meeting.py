"""The rendezvous of ranks that MPI's launcher has started: MPI tells them where torch's store listens."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch.distributed as dist
from mpi4py import MPI

from hpccomm import launcher
from hpccomm.calls.fingerprint import format_ranks
from hpccomm.errors import MismatchError, TransportError
from hpccomm.transports.polling import await_request

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10
"""How long a rank tries one address of the store."""
MEETING_TAG = 31_877
"""The tag of the messages by which rank 0 learns which ranks have come."""
GRACE_SECONDS = 1.0
"""How much longer than rank 0 the others wait."""


def open_store(timeout: timedelta) -> tuple[Any, int, int]:
    """Torch's store, hosted by rank 0, this rank and the number of ranks (collective over all ranks of MPI)."""
    world = MPI.Intracomm(MPI.COMM_WORLD)
    launcher.check_world(world.size, os.environ)
    await_ranks(world, timeout.total_seconds())
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = node.size == world.size
    local = node.rank
    node.Free()
    store, offer = None, None
    if world.rank == 0:
        hosts = [LOOPBACK] if one_node else addresses()
        store = dist.TCPStore("localhost", 0, world.size, True, timeout, wait_for_workers=False)
        offer = (hosts, store.port)
    hosts, port = world.bcast(offer)
    if store is None:
        store = connect(hosts, port, world.size, timeout)
    for name, value in (("RANK", world.rank), ("WORLD_SIZE", world.size), ("LOCAL_RANK", local)):
        os.environ.setdefault(name, str(value))
    return store, world.rank, world.size


def await_ranks(world: Any, limit: float) -> None:
    """Wait until all ranks are here; after ``limit`` seconds raise MismatchError, naming the missing ones.

    Rank 0 tells the others, who wait for it a little longer.  The calls of MPI that follow would wait for ever.
    """
    absent, mine, missing = np.ones(world.size, np.uint8), np.zeros(1, np.uint8), ""
    if world.rank == 0:
        absent[0] = 0
        arrivals = [world.Irecv([absent[each:], 1, MPI.BYTE], each, MEETING_TAG) for each in range(1, world.size)]
        await_request(Together(arrivals), limit)
        found = absent.copy()
        here = (np.flatnonzero(found[1:] == 0) + 1).tolist()
        requests = [*arrivals, *(world.Isend([found, MPI.BYTE], each, MEETING_TAG) for each in here)]
        missing = format_ranks(np.flatnonzero(found).tolist()) if found.any() else ""
    else:
        requests = [world.Isend([mine, MPI.BYTE], 0, MEETING_TAG), world.Irecv([absent, MPI.BYTE], 0, MEETING_TAG)]
        if not await_request(requests[1], limit + GRACE_SECONDS):
            missing = "rank 0, or ranks for which it waits"
        elif absent.any():
            missing = format_ranks(np.flatnonzero(absent).tolist())
    if missing:
        _abandoned.append((requests, absent, mine))
        raise MismatchError(
            f"rank {world.rank}: init_process_group timed out after {limit:g} s, missing: {missing}: make all ranks "
            "call it"
        )
    MPI.Request.Waitall(requests)


class Together:
    """Several requests as one."""

    def __init__(self, requests: list[Any]) -> None:
        self.Test = partial(MPI.Request.Testall, requests)


_abandoned: list[Any] = []
"""Requests that nobody waits for any more, and their memory."""


def connect(hosts: list[str], port: int, size: int, timeout: timedelta) -> Any:
    """The store at the first of these addresses that can be reached."""
    for host in hosts:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError:
            continue
        return dist.TCPStore(host, port, size, False, timeout)
    raise TransportError(
        f"torch's store of rank 0 cannot be reached at port {port} of {', '.join(hosts)}: set MASTER_ADDR and "
        "MASTER_PORT to an address and a free port of rank 0's node, and RANK and WORLD_SIZE of every rank"
    )


def addresses() -> list[str]:
    """The addresses of this node that others may reach, that of its name first."""
    found = []
    for name in (socket.gethostname(), socket.getfqdn()):
        try:
            found += [each[4][0] for each in socket.getaddrinfo(name, None, socket.AF_INET)]
        except OSError:
            continue
    found += local_addresses()
    return [each for each in dict.fromkeys(map(str, found)) if not each.startswith("127.")] or [LOOPBACK]


def local_addresses() -> list[str]:
    """The addresses of this node's interfaces, as Linux lists them."""
    try:
        with open("/proc/net/fib_trie", encoding="ascii") as file:
            lines = file.read().split("\n")
    except OSError:
        return []
    return [before.split()[-1] for before, line in pairwise(lines) if "/32 host LOCAL" in line]
