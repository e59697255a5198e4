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
from torch.distributed import distributed_c10d

from hpccomm import launcher
from hpccomm.calls.fingerprint import format_ranks
from hpccomm.communicator import install_abort_hook
from hpccomm.errors import MismatchError, TransportError
from hpccomm.transports.polling import await_request

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10
"""How long a rank tries one address of the store."""
MEETING_TAG = 31_877
"""The tag of the messages by which rank 0 learns which ranks have come, and tells them."""
GRACE_SECONDS = 1.0
"""How much longer than its limit a rank waits for rank 0, whose time may have begun later."""

_arrivals: dict[int, Any] = {}
"""On rank 0: the requests of messages that have not come, by rank."""
_answer: list[Any] = []
"""On the other ranks: what they wait for from rank 0: an array of which ranks are absent, and the requests."""
_sent: list[Any] = []
"""On rank 0: the answers that name absent ranks, which not all ranks may have received."""


def open_store(timeout: timedelta) -> tuple[Any, int, int]:
    """Torch's store, hosted by rank 0, this rank and the number of ranks (collective over all ranks of MPI)."""
    install_abort_hook()
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

    The calls of MPI that follow would wait for ever.  Every rank sends rank 0 one message, and rank 0 answers all ranks
    that have come.  What has not been received when the time is over is received by the next call of this function: so
    a rank that has caught the error may come again.
    """
    missing = await_others(world, limit) if world.rank == 0 else await_first(world, limit)
    if missing:
        distributed_c10d._world.group_count = 0  # torch has counted this group; the names of others follow from it
        raise MismatchError(
            f"rank {world.rank}: init_process_group timed out after {limit:g} s, missing: {missing}: make all ranks "
            "call it"
        )


def await_others(world: Any, limit: float) -> str:
    """Rank 0: wait for the messages of all ranks and answer them; returns the missing ranks."""
    for rank in range(1, world.size):
        if rank not in _arrivals:
            _arrivals[rank] = world.Irecv([None, 0, MPI.BYTE], rank, MEETING_TAG)
    await_request(Together(list(_arrivals.values())), limit)
    absent = np.zeros(world.size, np.uint8)
    absent[list(_arrivals)] = [not each.Test() for each in _arrivals.values()]
    here, missing = np.flatnonzero(absent == 0).tolist(), np.flatnonzero(absent).tolist()
    answers = [world.Isend([absent, MPI.BYTE], each, MEETING_TAG) for each in here if each]
    for rank in here:
        _arrivals.pop(rank, None)
    if not missing:
        MPI.Request.Waitall(answers)
        return ""
    _sent.append((answers, absent))
    return format_ranks(missing)


def await_first(world: Any, limit: float) -> str:
    """The other ranks: wait for the answer of rank 0; returns the missing ranks."""
    if _answer and _answer[1].Test() and _answer[0].any():
        _answer.clear()  # the answer to a call of this function that has raised
    if not _answer:
        absent = np.ones(world.size, np.uint8)
        answer = world.Irecv([absent, MPI.BYTE], 0, MEETING_TAG)
        _answer[:] = absent, answer, world.Isend([None, 0, MPI.BYTE], 0, MEETING_TAG)
    absent, answer, arrival = _answer
    if not await_request(answer, limit + GRACE_SECONDS):
        return "rank 0, or ranks for which it waits"
    arrival.Wait()
    _answer.clear()
    return format_ranks(np.flatnonzero(absent).tolist()) if absent.any() else ""


class Together:
    """Several requests as one."""

    def __init__(self, requests: list[Any]) -> None:
        self.Test = partial(MPI.Request.Testall, requests)


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
