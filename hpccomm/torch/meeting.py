"""The rendezvous of ranks that MPI's launcher has started: MPI tells them where torch's store listens."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch.distributed as dist
from mpi4py import MPI

from hpccomm import launcher
from hpccomm.errors import TransportError

LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10
"""How long a rank tries one address of the store."""


def open_store(timeout: timedelta) -> tuple[Any, int, int]:
    """Torch's store, hosted by rank 0, this rank and the number of ranks (collective over all ranks of MPI)."""
    world = MPI.Intracomm(MPI.COMM_WORLD)
    launcher.check_world(world.size, os.environ)
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
